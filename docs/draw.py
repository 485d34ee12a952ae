"""Draws the pictures of README.md and docs/: python docs/draw.py [--json FILE ...].

Their figures are the library's. The roofline of a run and the timeline of a layer are drawn from
what `bench.py --json FILE` wrote, of a run here and of chips that are not here; without a FILE
these pictures stay as they are. Each line of output says where a picture went. Needs the extra
`plot`.
"""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[0] = str(FOLDER.parent)  # the libraries'; in this one copy.py would hide Python's own
import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
from collections import Counter  # noqa: E402
from dataclasses import replace  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib import pyplot  # noqa: E402

import shard  # noqa: E402
from bench import (CHIPS, GB, MODELS, Job, layer_steps, predict, sheet, si,  # noqa: E402
                   tensor_parallel)
from infer import kv_bytes, weight_bytes  # noqa: E402
from minillm import causal_blocks, causal_pairs, matmul, traced_flops  # noqa: E402

matplotlib.rcParams.update({"svg.hashsalt": "minillm", "svg.fonttype": "none"})


def lecture(batch=110):
    """int -> Job: the lecture's own decode step: Gemma 7B on v4 chips, 2,048 slots a row."""
    return Job("generate", "gemma-7b", batch=batch, prompt=2032, new=16, dtype="bfloat16",
               cache="bfloat16", chip="tpu-v4", chips=4)


def save(figure, name):
    """Figure, str -> None: writes a picture, the same bytes each time."""
    path = FOLDER / name
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(path)


def sketch(name, height, x, y, boxes=(), notes=(), lines=(), **axes):
    """str, inches, pairs, lists -> None: a picture of boxes (x, y, width, height, text, color,
    strength), notes (x, y, text) and lines (xs, ys, style), as wide as a page."""
    figure, axis = pyplot.subplots(figsize=(9, height), layout="constrained")
    for left, bottom, width, tall, text, color, strength in boxes:
        axis.add_patch(pyplot.Rectangle((left, bottom), width, tall, facecolor=color,
                                        edgecolor="white", alpha=strength))
        axis.text(left + width / 2, bottom + tall / 2, text, ha="center", va="center", fontsize=9)
    for left, middle, text in notes:
        axis.text(left, middle, text, va="center", fontsize=9)
    for xs, ys, style in lines:
        axis.plot(xs, ys, style)
    axis.set(xlim=x, ylim=y, **axes)
    if not axes:
        axis.set_axis_off()
    save(figure, name)


def draw_product():
    """-> None: one matmul forwards and its two backwards, with flops as counted in the program."""
    B, E, F = 2048, 3072, 24576
    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((B, E), (F, E)))
    forward = traced_flops(matmul, x, w)
    back = traced_flops(lambda x, w: jax.vjp(matmul, x, w)[1](jnp.ones((B, F))), x, w) - forward
    sides, boxes, notes = {"B": 1.0, "E": 1.2, "F": 2.2}, [], []
    for i, (title, names, flops) in enumerate((
            ("forwards", "y:BF = x:BE w:FE", forward),
            ("backwards, the spine", "dx:BE = dy:BF w:FE", back // 2),
            ("backwards, the weight gradient", "dw:FE = dy:BF x:BE", back // 2))):
        at = 9.0 * i
        for name, color in zip(names.replace("= ", "").split(), ("C1", "C0", "C2")):
            word, (tall, wide) = name.split(":")
            boxes.append((at, -sides[tall] / 2, sides[wide], sides[tall], f"{word}\n{tall}{wide}",
                          color, 0.4))
            at += sides[wide] + 0.6
            notes += [(at - 0.45, 0, "=" if color == "C1" else "x")] * (color != "C2")
        notes.append((9.0 * i, 1.6, f"{title}: 2BP = {si(flops, 'FLOP')}"))
    notes.append((0, -1.7, f"B = {B:,} tokens, a weight of P = E F = {E * F:,}: 2BP forwards "
                  f"({si(forward, 'FLOP')}), 4BP backwards ({si(back, 'FLOP')}), 6BP in all"))
    sketch("product.svg", 2.2, (-0.2, 26), (-2, 2), boxes, notes)


def draw_phases():
    """-> None: a prefill and three decode steps over the cache of one sequence."""
    cfg, S = replace(MODELS["gemma-7b"], dtype="bfloat16"), 2048
    slot, full, weights = (*(kv_bytes(cfg, 1, n, "bfloat16") for n in (1, S)), weight_bytes(cfg))
    texts = [f"prefill of {S:,} tokens: reads {si(weights, 'B')} of weights once,\n"
             f"writes {S:,} slots, {si(full, 'B')}",
             f"decode step, token 1: reads {si(weights, 'B')} of weights and\n"
             f"{si(full, 'B')} of cache, writes a slot, {si(slot, 'B')}",
             *(f"decode step, token {i}: the same, and one slot more" for i in (2, 3))]
    boxes = []
    for step, place in itertools.product(range(4), range(12)):
        first, last = 7 + step if step else 0, 7 + step  # of the slots that are written
        word, color = ("write", "C1") if first <= place <= last else ("read", "C0")
        filled = place <= last
        boxes.append((place, -step, 1, 0.8, word * filled, color, 0.4 if filled else 0.1))
    sketch("phases.svg", 2.8, (0, 21), (-3.2, 1), boxes,
           [(12.4, 0.4 - step, text) for step, text in enumerate(texts)])


def draw_roofline():
    """-> None: a decode step's two parts under the roof of four chips, at three batches."""
    limits, notes = sheet(CHIPS["tpu-v4"], 4), []
    peak, read = limits["flops_per_second"]["bfloat16"], limits["read_bytes_per_second"]
    xs = np.logspace(-1, 4, 999)
    lines = [(xs, np.minimum(peak, read * xs), "k-")]
    for B in (1, 110, 224):
        for part in predict(lecture(B), limits)["parts"][:2]:
            x, y = part["flops"] / part["bytes"], part["flops"] / part["seconds"]
            weights = part["name"] == "weights"
            lines.append(([x], [y], "C0o" if weights else "C1s"))
            below = 0.6 if weights else {1: 0.33, 110: 0.18, 224: 0.1}[B]
            notes.append((x * 1.2, y * below,
                          f"{part['name']}, B = {B}: {si(part['seconds'], 's')}"))
    sketch("roofline.svg", 3.6, (0.1, 3e3), (2e11, 2e15), notes=notes, lines=lines, xscale="log",
           yscale="log", xlabel="flops per byte", ylabel="flops per second",
           title=f"four TPU v4: {si(read, 'B/s')}, then {si(peak, 'FLOP/s')}")


def draw_layer():
    """-> None: a tensor-parallel layer: what two of four devices hold, and what each step sends."""
    job = lecture()
    steps = layer_steps(tensor_parallel(job, 4))[1:6]
    sizes = dict(vars(job.cfg), B=job.batch, T=1, S=2048)

    def sized(shape):
        for letter, size in sizes.items():
            if len(letter) == 1:
                shape = shape.replace(f"{letter}/n", str(size // 4 if isinstance(size, int) else 0))
        return "".join(str(sizes[c]) if c in "BTSDEHKFV" else c for c in shape)

    boxes, notes = [], [(0, 0.4, "device 0"), (10, 0.4, "device 1, and so devices 2 and 3")]
    for i, step in enumerate([{"step": "x", "after": steps[0]["before"]}, *steps]):
        color = "C1" if step["step"] in ("x", "out", "down") else "C0"
        boxes += [(x, -2 * i - 1, 8, 1, sized(step["after"]), color, 0.35) for x in (0, 10)]
        notes.append((19, -2 * i - 0.5, step["step"]))
        if step.get("bytes"):
            kind, = step["collectives"]
            boxes.append((3, -2 * i + 0.15, 12, 0.7, f"{kind}: each sends {si(step['bytes'], 'B')} "
                          f"in {si(step['seconds'], 's')}", "C2", 0.35))
        elif i:
            notes.append((5.5, -2 * i + 0.5, "purely local: nothing is sent"))
    sketch("layer.svg", 4.6, (0, 23), (-11.2, 0.9), boxes, notes)


def draw_layouts():
    """-> None: three ways to split a cache over four devices, and what attention then sends."""
    job, boxes, notes = lecture(), [], []
    for place, name in enumerate(("heads", "batch", "sequence")):
        left, sent = 9.0 * place, shard.tally(shard.attend_comm(job.cfg, 112, (4,), name))
        letter = shard.LAYOUTS[name].letter
        for k, b, s in itertools.product(reversed(range(4)), range(4), range(4)):
            boxes.append((left + s + 0.7 * k, -b + 0.7 * k, 1, 1, "", (
                "#9ecae1", "#fdae6b", "#a1d99b", "#bcbddc")[dict(K=k, B=b, S=s)[letter]], 1))
        size = sum(size for _, size in sent.values())
        text = f"{si(size, 'B')} a layer:\n{', '.join(sent)}" if size else "nothing"
        shape = ",".join(axis + "/4" * (axis == letter) for axis in "BKSD")
        notes += [(left, 3.9, f"{name}: each holds [{shape}]"),
                  (left, -3.9, f"attention sends {text}")]
    notes.append((24.2, -2.5, "across: slots\ndown: rows\nbehind: heads"))
    sketch("layouts.svg", 3.4, (-0.2, 27.5), (-4.7, 4.4), boxes, notes)


def draw_causal():
    """-> None: the pairs of blocks that causal attention multiplies, and those that it skips."""
    T = 2048
    n, size = causal_blocks(T)
    boxes = [(j, -i, 1, 1, "skipped" if j > i else "all" if j < i else "half",
              "C7" if j > i else "C0" if j < i else "C1", 0.12 if j > i else 0.4)
             for i in range(n) for j in range(n)]
    texts = (f"{T:,} tokens in {n} blocks of {size}: queries down, keys across",
             f"multiplied: {n * (n + 1) // 2} of {n * n} pairs of blocks, {causal_pairs(T):,} "
             "pairs",
             f"visible: T(T+1)/2 = {T * (T + 1) // 2:,}", f"without blocks: T T = {T * T:,}",
             f"f32 scores in memory, a head and sequence: {si(4 * size * size, 'B')},",
             f"where all of them would take {si(4 * T * T, 'B')}")
    sketch("causal.svg", 2.8, (-0.1, 10), (1 - n, 1), boxes,
           [(n + 0.4, 0.6 - 0.5 * i, text) for i, text in enumerate(texts)])


def draw_memory(row):
    """row -> None: where the memory of one chip goes, by its compiler."""
    parts = {"weights": row["formula"]["weights"], "cache": row["formula"]["cache"]}
    parts["temporaries and inputs"] = row["peak_bytes"] - sum(parts.values())
    parts["free"] = row["memory_bytes"] - row["peak_bytes"]
    boxes, notes, left = [], [], 0.0
    for i, (name, size) in enumerate(parts.items()):
        text = f"{name}\n{si(size, 'B')}"
        boxes.append((left, 0, size / GB, 1, text if size > 2 * GB else "", f"C{i}", 0.4))
        notes += [(left - 7, 1.3, text.replace("\n", " "))] * (size <= 2 * GB)
        left += size / GB
    sketch("memory.svg", 1.4, (0, left), (0, 1.6), boxes, notes)


def draw_run(result):
    """result of a run -> None: its rows under the limits of that machine."""
    read, peaks = (result["ceilings"][key] for key in ("read_bytes_per_second", "flops_per_second"))
    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    points = [(row, row["flops"] / (row["weight_bytes"] + row["cache_bytes"]),
               row["tokens_per_second"] / row["tokens"] * row["flops"]) for row in result["rows"]]
    span = [x for _, x, _ in points] + [peak / read for peak in peaks.values()]
    xs = np.logspace(math.floor(math.log10(min(span))), math.ceil(math.log10(max(span))), 200)
    for color, (dtype, peak) in zip(("C0", "C1", "C2"), peaks.items()):
        axis.loglog(xs, np.minimum(peak, read * xs), color=color, label=f"{dtype} limit")
        for phase in dict.fromkeys(row["phase"] for row in result["rows"]):
            chosen = [(x, y) for row, x, y in points
                      if (row["phase"], row["dtype"]) == (phase, dtype)]
            axis.scatter(*zip(*chosen or [(math.nan, math.nan)]), color=color, s=70,
                         marker=f"${'D' if phase == 'speculate' else phase[0].upper()}$")
    for phase in dict.fromkeys(row["phase"] for row in result["rows"]):
        axis.scatter([], [], color="black", label=phase,
                     marker=f"${'D' if phase == 'speculate' else phase[0].upper()}$")
    axis.set(xlabel="flops per byte of weights and cache", ylabel="flops per second",
             title=f"{result['rows'][0]['model']} on {result['machine']['device']}, "
             f"{result['machine']['cores']} cores, jax {result['machine']['jax']}")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize="small")
    save(figure, "roofline_run.svg")


def one_layer(ops):
    """list of operations of a row -> list: those of the middle layer of three or more, from its
    first matmul to that of the next one; of a loop over layers, its body. `beside` of an
    asynchronous transfer is how many of these operations run before it is awaited."""
    loops = Counter(op["loop"] for op in ops if op["times"] > 1 and op["region"] == "mlp")
    matmuls = [i for i, op in enumerate(ops)
               if op["kind"] == "product" and op["region"] in ("qkv", "mlp")]
    begins = [b for a, b in itertools.pairwise(matmuls)
              if (ops[a]["region"], ops[b]["region"]) == ("mlp", "qkv")]
    if loops:
        ops = [op for op in ops if op["loop"] == max(loops, key=loops.get)]
    elif len(begins) > 1:
        ops = ops[begins[len(begins) // 2 - 1]:begins[len(begins) // 2]]
    return [{**op, "beside": op["asynchronous"] * sum(
        op["start"] < other["start"] < op["done"] for other in ops)} for op in ops]


def draw_timeline(rows, name):
    """rows, str -> None: one layer of each, in the order of its compiler's schedule: what computes,
    by cycles, on one track, and transfers on another. Synchronous transfers stand between
    operations, asynchronous ones beside those that run before they are awaited."""
    figure, axes = pyplot.subplots(len(rows), figsize=(9, 0.6 + 1.3 * len(rows)),
                                   layout="constrained", squeeze=False)
    colors = {}
    for row, axis in zip(rows, axes[:, 0]):
        layer, starts, now = one_layer(row["operations"]), [], 0.0
        for op in layer:
            starts.append(now)
            now += 0 if op["beside"] else op["seconds"]
        starts.append(now)
        for i, op in enumerate(layer):
            label = op["kind"] if op["number"] else op["region"] or "other"
            color = colors.setdefault(label, f"C{len(colors) % 10}")
            end = starts[min(i + 1 + op["beside"], len(starts) - 1)] if op["beside"] \
                else starts[i] + op["seconds"]
            axis.broken_barh([(starts[i] * 1e3, (end - starts[i]) * 1e3)],
                             (0 if op["number"] else 1, 0.8), color=color)
        axis.set(yticks=(0.4, 1.4), yticklabels=("transfers", "compute"))
        axis.set_title(f"{row['phase']} {row['layout'] or row['mesh']} ring={row['ring']} "
                       f"flags={row['flags']}, a layer, in milliseconds (a step: cycles "
                       f"{si(row['cycle_seconds'], 's')}, transfers that wait "
                       f"{si(row['transfer_seconds'], 's')})", fontsize=9, loc="left")
    figure.legend([pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()],
                  list(colors), loc="outside lower center", ncols=6, fontsize="small")
    save(figure, name)


def main():
    """Draws all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", nargs="*", default=[], help="what bench.py --json wrote")
    for draw in (draw_product, draw_phases, draw_roofline, draw_layer, draw_layouts, draw_causal):
        draw()
    for file in parser.parse_args().json:
        result = json.loads(Path(file).read_text())
        rows = [row for row in result["rows"] if row.get("operations")]
        if rows:
            draw_timeline(rows, f"timeline_{Path(file).stem}.svg")
            if (rows[0]["phase"], rows[0]["model"]) == ("generate", "gemma-7b"):
                draw_memory(rows[0])
        else:
            draw_run(result)


if __name__ == "__main__":
    main()
