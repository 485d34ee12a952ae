"""Print the size of each file of .ci/sizes, and fail where one is larger than its line there.

A code line is one that is neither blank, nor a comment, nor part of a docstring. Tokens are names,
operators, numbers and strings, docstrings left out; an f-string is one token in every Python.
Other people's figures, between "# PUBLISHED begins" and "# PUBLISHED ends", are not counted.
"""
import ast
import io
import pathlib
import re
import sys
import tokenize

ROOT = pathlib.Path(__file__).parents[1]
COUNTED = tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING
START, END = (getattr(tokenize, f"FSTRING_{name}", None) for name in ("START", "END"))


def size(text):
    """str -> int, int: code lines and tokens."""
    text = re.sub("(?ms)^# PUBLISHED begins.*?^# PUBLISHED ends$", "", text)
    docs = set()
    for node in ast.walk(ast.parse(text)):
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False):
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = sum(bool(line.strip()) and not line.strip().startswith("#") and i not in docs
                for i, line in enumerate(text.splitlines(), 1))
    tokens = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth += token.type == START is not None
        if token.type in COUNTED and not depth:
            tokens += token.type != tokenize.STRING or token.start[0] not in docs
        if token.type == END is not None:
            depth, tokens = depth - 1, tokens + (depth == 1)
    return lines, tokens


too_large = False
for line in (ROOT / ".ci" / "sizes").read_text().splitlines():
    name, *limits = line.split()
    sizes = size((ROOT / name).read_text())
    over = any(n > int(limit) for n, limit in zip(sizes, limits, strict=True))
    print(f"{name}: {sizes[0]} code lines of {limits[0]}, {sizes[1]} tokens of {limits[1]}"
          + ("  TOO LARGE" if over else ""))
    too_large = too_large or over
sys.exit(too_large)
