"""Print a function of the libraries, with all that it needs, as a file that runs alone:

    python docs/copy.py causal_attention > attention.py

The file has the plain forms: what one backend needs (the end of minillm.py) is left out. A function
that needs most of a library is better copied with the whole file.
"""
import ast
import symtable
import sys
from pathlib import Path

MODULES = "minillm", "infer", "shard"


def find_pieces():
    """-> dict of (module, name) -> list of (place, module, source): the statements that define each
    name: one import, or a definition with the comment above it, and after it the statement that
    gives it a gradient. Places sort the statements: (number of the module, line), imports first."""
    pieces = {}
    for number, module in enumerate(MODULES):
        text = Path(__file__).parents[1].joinpath(f"{module}.py").read_text()
        lines = text.splitlines()
        for node in ast.parse(text).body:
            first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
            while lines[first - 2].startswith("# ") and "---" not in lines[first - 2]:
                first -= 1
            piece = (number, first), module, "\n".join(lines[first - 1:node.end_lineno])
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                origin = getattr(node, "module", None)
                for alias in node.names:
                    line = f"from {origin} " * bool(origin) + f"import {ast.unparse(alias)}"
                    pieces[module, alias.asname or alias.name] = pieces.get(
                        (origin, alias.name), [((-1, line), module, line)])
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                pieces[module, node.name] = [piece]
            elif isinstance(node, ast.Assign):  # a second one, a form for one backend, is dropped
                for part in ast.walk(ast.Tuple(node.targets)):
                    if isinstance(part, ast.Name):
                        pieces.setdefault((module, part.id), [piece])
            elif isinstance(node.value, ast.Call):  # matmul.defvjp(...)
                pieces[module, ast.unparse(node.value.func).split(".")[0]].append(piece)
    return pieces


def global_names(table):
    """symbol table -> set of str: the global names that a piece of source uses."""
    names = {symbol.get_name() for symbol in table.get_symbols()
             if symbol.is_global() or table.get_type() == "module" and symbol.is_referenced()}
    return names.union(*map(global_names, table.get_children()))


def copy(name):
    """str -> str: a file that defines it. SystemExit for an unknown name."""
    pieces, chosen = find_pieces(), {}
    wanted = [key for key in pieces if name in (key[1], ".".join(key))][:1]
    if not wanted:
        sys.exit(f"copy.py: {name!r} is no name of {', '.join(MODULES)}")
    while wanted:
        for place, module, source in pieces.get(wanted.pop(), ()):  # nothing for names of Python
            if place not in chosen:
                chosen[place] = source
                wanted += [(module, used) for used in global_names(
                    symtable.symtable(source, module, "exec"))]
    imports, definitions = ([source for place, source in sorted(chosen.items())
                             if (place[0] < 0) == first] for first in (True, False))
    return "\n".join(imports) + "\n\n\n" + "\n\n\n".join(definitions) + "\n"


if __name__ == "__main__":
    print(copy(sys.argv[1]) if sys.argv[1:] else __doc__, end="")
