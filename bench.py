"""bench: the napkin (a prediction from shapes and a sheet), the program, the profile, and why they
differ.

    python bench.py [--quick]                                every phase of the default model
    python bench.py plan --model gemma-7b --chip tpu-v4      predict, on chips that are not here
    python bench.py generate --batch 1,8 --dtype bfloat16    one phase alone: measured here
    python bench.py generate --chip tpu-v4 --chips 4         or made by a chip's own compiler
    python bench.py train --text FILE --save DIR             train on a text file
    python bench.py train --kv-heads 8,2,1                   the same model with fewer key heads
    python bench.py complete --model DIR "So long"           write on, with a real model
    python bench.py scale                                    how time grows with each size
    python bench.py shard --devices 8                        what several devices send each other
    python bench.py draw docs                                the README's pictures

Tables go to stdout, whose last line is one JSON object; progress goes to stderr.
"""
import argparse
import contextlib
import ctypes
import importlib.util
import itertools
import json
import math
import os
import pathlib
import pickle
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import shard
from infer import (GREEDY, HERE, Q8, Q8A8, Cache, Sampling, array_bytes, decode_bytes, decode_flops,
                   extend, generate, init_cache, kv_bytes, library, load, load_state, model_draft,
                   ngram_draft, prefill, prefill_flops, quantize_params, read_arrays, read_json,
                   refill, save, save_state, serve, slots_of, speculate, weight_bytes)
from minillm import (KEEPABLE, Adam, Config, Layer, Params, adam_init, cast, causal_attention,
                     causal_blocks, causal_pairs, check_tokens, init, loss, matmul, param_count,
                     size_of, traced_flops, train_flops, train_step)

MB, GB = 1e6, 1e9
SENTENCE = "So long and thanks for all the fish; "
PROMPT = "So long and thanks for"
DEFAULT = "L6,E1024,H16,K4,D64,F2816,V256"
WIDER = "L8,E2048,H32,K8,D64,F8192,V32000"  # the default on a GPU or TPU: half of llama-3.2-1b
QUICK = "L2,E1024,H16,K4,D64,F2816,V256"
SHARDED = "L2,E512,H8,K8,D64,F1408,V256"
SMALL = "L4,E256,H8,K2,D32,F704,V256"  # learns a text of some KB in a minute on two cores
REQUESTS = 3  # requests that `serve` gets for each row, so that a row is refilled twice
STRIDE = 8  # tokens that `complete` makes before it looks at them
HOP_SECONDS = 1e-6  # from one device to the next
HELD_BACK = 0.08  # share of the memory that a plan leaves for what is neither weights nor cache
DTYPES = ("float32", "bfloat16", "int8")
INT8 = {"Q8": Q8, "Q8A8": Q8A8}  # widened in the product; or meeting int8 activations

gemma = partial(Config, V=256000, act="gelu", embed_scale=True)
llama2 = partial(Config, D=128, V=32000, eps=1e-5, tied=False)
llama3 = partial(Config, K=8, V=128256, rope_base=5e5, eps=1e-5)
qwen3 = partial(Config, K=8, D=128, V=151936, rope_base=1e6, qk_norm=True)
smollm2 = partial(Config, D=64, V=49152, rope_base=1e5, eps=1e-5)
MODELS = {  # from each model's own config.json on huggingface.co
    "gemma-2b": gemma(L=18, E=2048, H=8, K=1, D=256, F=16384),
    "gemma-7b": gemma(L=28, E=3072, H=16, K=16, D=256, F=24576),
    "llama-2-7b": llama2(L=32, E=4096, H=32, K=32, F=11008),
    "llama-2-13b": llama2(L=40, E=5120, H=40, K=40, F=13824),
    "llama-2-70b": llama2(L=80, E=8192, H=64, K=8, F=28672),
    "llama-3-8b": llama3(L=32, E=4096, H=32, D=128, F=14336, tied=False),
    "llama-3-70b": llama3(L=80, E=8192, H=64, D=128, F=28672, tied=False),
    "llama-3.1-405b": llama3(L=126, E=16384, H=128, D=128, F=53248, tied=False,
                             rope_scaling=(8, 1, 4, 8192)),
    "llama-3.2-1b": llama3(L=16, E=2048, H=32, D=64, F=8192, rope_scaling=(32, 1, 4, 8192)),
    "llama-3.2-3b": llama3(L=28, E=3072, H=24, D=128, F=8192, rope_scaling=(32, 1, 4, 8192)),
    "mistral-7b": Config(L=32, E=4096, H=32, K=8, D=128, F=14336, V=32768, rope_base=1e6,
                         eps=1e-5, tied=False),
    "qwen3-0.6b": qwen3(L=28, E=1024, H=16, F=3072),
    "qwen3-1.7b": qwen3(L=28, E=2048, H=16, F=6144),
    "qwen3-4b": qwen3(L=36, E=2560, H=32, F=9728),
    "qwen3-8b": qwen3(L=36, E=4096, H=32, F=12288, tied=False),
    "qwen3-14b": qwen3(L=40, E=5120, H=40, F=17408, tied=False),
    "qwen3-32b": qwen3(L=64, E=5120, H=64, F=25600, tied=False),
    "smollm2-135m": smollm2(L=30, E=576, H=9, K=3, F=1536),
    "smollm2-360m": smollm2(L=32, E=960, H=15, K=5, F=2560),
    "smollm2-1.7b": smollm2(L=24, E=2048, H=32, K=32, F=8192, rope_base=1.3e5),
    "tinyllama-1.1b": Config(L=22, E=2048, H=32, K=4, D=64, F=5632, V=32000, eps=1e-5, tied=False),
}


class Chip(NamedTuple):
    """What the sheet of one chip says. Products are dense; those of float32 are as JAX makes them
    by default: rounded to bf16 on a TPU, to TF32 on a GPU."""
    flops: dict    # dtype -> flops/s
    read: float    # bytes/s of its memory
    memory: float  # bytes
    link: float    # bytes/s that it sends over one axis, both ways around it together
    axes: int      # of links
    kind: str      # what `device_kind` looks like, a regular expression
    source: str


def chip(f32, bf16, int8, *rest):
    """-> Chip."""
    return Chip({"float32": f32, "bfloat16": bf16, "int8": int8}, *rest)


CLOUD, NVIDIA = "docs.cloud.google.com/tpu/docs/", "nvidia.com/en-us/data-center/"
CHIPS = {
    "tpu-v4": chip(275e12, 275e12, 275e12, 1.23e12, 32e9, 9e10, 3, "TPU v4$",
                   CLOUD + "v4; links: jax-ml.github.io/scaling-book/tpus"),
    "tpu-v5e": chip(197e12, 197e12, 393e12, 8.19e11, 16e9, 1e11, 2, "TPU v5 ?(lite|e)$",
                    CLOUD + "v5e"),
    "tpu-v5p": chip(459e12, 459e12, 918e12, 2.765e12, 95e9, 2e11, 3, "TPU v5p?$", CLOUD + "v5p"),
    "tpu-v6e": chip(918e12, 918e12, 1836e12, 1.638e12, 32e9, 2e11, 2, "TPU v6 ?(lite|e)$",
                    CLOUD + "v6e"),
    "tpu-v7x": chip(2307e12, 2307e12, 2307e12, 7.37e12, 192e9, 4e11, 3, "TPU ?v?7x?$",
                    CLOUD + "tpu7x"),
    "a100": chip(156e12, 312e12, 624e12, 2.039e12, 80e9, 3e11, 1, "A100",
                 NVIDIA + "a100 (SXM, 80 GB)"),
    "h100": chip(494.5e12, 989e12, 1979e12, 3.35e12, 80e9, 4.5e11, 1, "H100",
                 NVIDIA + "h100 (SXM)"),
    "h200": chip(494.5e12, 989e12, 1979e12, 4.8e12, 141e9, 4.5e11, 1, "H200",
                 NVIDIA + "h200 (SXM)"),
    "b200": chip(1.125e15, 2.25e15, 4.5e15, 8e12, 180e9, 9e11, 1, "B200",
                 NVIDIA + "dgx-b200, an eighth"),
}


def recognised(kind):
    """str -> str or None: the name in CHIPS of a running device, from its `device_kind`."""
    return next((name for name, chip in CHIPS.items() if re.search(chip.kind, kind)), None)


train_jit = jax.jit(train_step, static_argnames="cfg", donate_argnames=("params", "adam"))
prefill_jit = jax.jit(prefill, static_argnames="cfg", donate_argnames="cache")
HOW = ("n", "cfg", "sampling", "end")
generate_jit = jax.jit(generate, static_argnames=HOW, donate_argnames=("cache", "logits"))


def on_cpu():
    """-> bool: do programs run on this machine's CPU?"""
    return jax.default_backend() == "cpu"


def in_kind(job, dtype, cache=None, int8=None):
    """Job, dtypes, str -> Job: its weights in that dtype. What is left out is what is fastest: a
    CPU copies bf16 slots and widens int8 ones at every step, computes in f32 around int8 weights,
    and multiplies int8 with int8 (Q8A8) fastest of all; elsewhere fewer bytes are faster, and
    quantising rows takes a TPU longer than widening weights."""
    cpu = not job.chip and on_cpu()
    wide = "float32" if cpu else "bfloat16"
    return job._replace(
        cfg=replace(job.cfg, dtype=wide if dtype == "int8" else dtype), dtype=dtype,
        cache_dtype=cache or ("float32" if dtype == "float32" else wide),
        int8=int8 or ("Q8A8" if cpu else "Q8"))


def products_in(job):
    """Job -> dtype in which its weights are multiplied."""
    return job.cfg.dtype if (job.dtype, job.int8) == ("int8", "Q8") else job.dtype


def held_in(job, params):
    """Job, Params -> Params: cast to its dtype, or quantised to its kind of int8 weights."""
    if job.dtype == "int8":
        return quantize_params(params, job.cfg, INT8[job.int8])
    return params if params.embed.dtype == job.dtype else cast(params, job.dtype)


def drawn(job, key):
    """Job, key -> Params: random ones."""
    return held_in(job, init(key, job.cfg, job.cfg.dtype))


def say(*words, end="\n"):
    """Progress, to stderr."""
    print(*words, file=sys.stderr, end=end, flush=True)


@contextlib.contextmanager
def interruptible(done):
    """str -> Ctrl-C ends what stands inside, and what is done so far is printed."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\ninterrupted: what was {done} so far")


def finish(args, **result):
    """The result as one JSON object: into --json FILE where given, and as stdout's last line."""
    text = json.dumps(result)
    if args.json:
        pathlib.Path(args.json).write_text(text + "\n")
    print(text, flush=True)


def parse_model(text):
    """str -> Config: a name in MODELS, or letters such as L8,E512,H8,K8,D64,F1408,V256[,untied]."""
    if text in MODELS:
        return MODELS[text]
    *letters, last = text.split(",")
    given = letters if last == "untied" else letters + [last]
    found = {part[:1]: part[1:] for part in given}
    if len(found) != len(given) or sorted(found) != sorted("LEHKDFV") \
            or not all(size.isascii() and size.isdigit() for size in found.values()):
        raise ValueError(f"model {text!r} is neither a shape such as {DEFAULT}[,untied] "
                         "nor one of " + ", ".join(MODELS))
    return Config(**{letter: int(size) for letter, size in found.items()}, tied=last != "untied")


def parse_chip(text):
    """str -> Chip: a name in CHIPS, or flops/s, bytes/s, bytes of memory, bytes/s over links."""
    if text in CHIPS:
        return CHIPS[text]
    try:
        peak, read, memory, link = map(float, text.split(","))
        if min(peak, read, memory, link) > 0 and max(peak, read, memory, link) < math.inf:
            return Chip(dict.fromkeys(DTYPES, peak), read, memory, link, 1, "", "given by hand")
    except ValueError:
        pass
    raise ValueError(f"chip {text!r} is neither flops/s,bytes/s,bytes,link bytes/s such as "
                     "275e12,1.23e12,32e9,9e10 nor one of " + ", ".join(CHIPS))


# ------------------------------------------------------------------------------------------- tables


def si(x, unit):
    """number, unit -> str: three digits and a prefix."""
    for power, prefix in zip(range(18, -10, -3), "EPTGMk mun"):
        size = 10.0 ** power
        if abs(x) >= 0.9995 * size:
            return f"{x / size:.{max(0, 2 - int(math.log10(max(1, x / size * 1.0005))))}f} " \
                   + prefix.strip() + unit
    return f"0 {unit}"


class Column(NamedTuple):
    """A column of a table."""
    head: str
    width: int          # negative: to the left
    figure: object      # a key of each row, or what makes the figure of a row
    form: str = ""      # its unit, or as `format` takes it
    wide: bool = False  # shown with --wide alone


UNITS = (" ", "B", "s", "FLOP")


def shown(figure, form):
    """figure, str -> str: with three digits and a prefix where the form is a unit."""
    if isinstance(figure, str):
        return figure
    return si(figure, form.strip()) if form in UNITS else format(figure, form)


def print_table(columns, rows, heads=True):
    """list of Column, list of dict -> lines. What a row lacks is "-"; None, what cannot be."""
    def text(column, row):
        found = column.figure(row) if callable(column.figure) else row.get(column.figure, "-")
        return "error" if found is None else shown(found, column.form)

    lines = [[column.head for column in columns]] * heads + [
        [text(column, row) for column in columns] for row in rows]
    for line in lines:
        print(" ".join(f"{word:<{-column.width}}" if column.width < 0 else
                       f"{word:>{column.width}}" for word, column in zip(line, columns)).rstrip())


# -------------------------------------------------------------------------- this machine's ceilings


def seconds_of(call, at_least=5, for_seconds=0.5, at_most=20):
    """call -> sorted list of float: wall seconds of each run, after one that is not counted."""
    call()
    times, began = [], time.perf_counter()
    while len(times) < at_least or (len(times) < at_most
                                    and time.perf_counter() - began < for_seconds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)


def measure_flops(dtype):
    """dtype -> flops/s of one large product, its best run: weights stored output x input, of random
    numbers: a chip that multiplies ones takes less power, and runs faster."""
    size = 2048 if on_cpu() else 8192
    sums = jnp.int32 if dtype == "int8" else jnp.float32
    a = jax.random.randint(jax.random.key(0), (size, size), -127, 128).astype(dtype)
    product = jax.jit(lambda a, b: jax.lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), preferred_element_type=sums))
    run = partial(seconds_of, lambda: product(a, a).block_until_ready(), for_seconds=1.5)
    return 2 * size ** 3 / run()[0]


def measure_read():
    """-> bytes/s of reading more than any cache holds, the best of two programs: half a GiB on a
    CPU; elsewhere 4 GiB four times in a row, beside which starting a program takes no time."""
    rows, times = (1 << 15, 1) if on_cpu() else (1 << 18, 4)
    a, row = jnp.ones((rows, 1 << 12), "float32"), jnp.ones((1 << 12,), "float32")
    programs = jax.jit(lambda a: jnp.sum(a)), jax.jit(lambda a: a @ row)
    return times * a.nbytes / min(seconds_of(lambda: jax.block_until_ready(
        [program(a) for _ in range(times)]))[0] for program in programs)


def ceilings(jobs):
    """list of Job -> dict: what this machine can do at best, the denominators of MFU and MBU."""
    say("measuring the machine:", end=" ")
    flops = {}
    for dtype in sorted({part.dtype for job in jobs for part in PHASES[job.phase].cost(job).parts}
                        | {job.dtype for job in jobs}, key=DTYPES.index):
        flops[dtype] = measure_flops(dtype)
        say(f"{dtype} {flops[dtype] / GB:.0f} GFLOP/s,", end=" ")
    read = measure_read()
    say(f"reading {read / GB:.1f} GB/s")
    return {"flops_per_second": flops, "read_bytes_per_second": read}


def sheet(chip, chips=1):
    """Chip, int -> dict: what so many chips should do, in the form of `ceilings`."""
    return {"flops_per_second": {dtype: chips * peak for dtype, peak in chip.flops.items()},
            "read_bytes_per_second": chips * chip.read}


def machine():
    """-> dict: where the figures come from."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "chip": recognised(device.device_kind),
            "count": jax.device_count(), "cores": os.cpu_count(), "jax": jax.__version__,
            "python": platform.python_version()}


# ------------------------------------------------------------------------------------------ predict


class Part(NamedTuple):
    """A part of a step: bound by its products or by its bytes."""
    name: str
    flops: int
    bytes: int
    dtype: str  # that its products multiply


class Cost(NamedTuple):
    """What one step takes, from the shapes alone."""
    T: int             # new tokens a row
    S: int             # slots a row that attention looks at
    tokens: int        # made or read, in all rows
    flops: dict        # by product, as the program multiplies them
    weight_bytes: int
    cache_bytes: int
    parts: tuple       # of Part


class Job(NamedTuple):
    """What is to be measured: one row of the table."""
    phase: str
    model: str
    cfg: Config
    B: int
    prompt: int
    new: int
    dtype: str = "float32"        # of the weights
    cache_dtype: str = "float32"
    n_draft: int = 4
    chip: str = ""        # "" is this machine
    chips: int = 1
    mesh: tuple = ()      # of (axis, size or sizes); () is one device
    layout: str = "heads"  # of a cache over a mesh
    ring: int = 0         # ways of the collective matmuls; 0: their references
    by: str = "hand"      # whose choice training's collectives are; or the "compiler"'s
    flags: bool = False   # the lecture's, for a TPU's compiler
    keep: tuple = shard.KEPT  # what a layer keeps for its gradient
    int8: str = "Q8A8"    # kind of int8 weights, of INT8


def cost(job, T, S, tokens, flops, weight_bytes, cache_bytes, attends_in, *parts):
    """-> Cost: attention's flops go with `cache_bytes`, all others with `weight_bytes`."""
    attention = flops["scores"] + flops["values"]
    return Cost(T, S, tokens, flops, weight_bytes, cache_bytes, (
        Part("weights", sum(flops.values()) - attention, weight_bytes, products_in(job)),
        Part("attention", attention, cache_bytes, attends_in), *parts))


def train_cost(job):
    """Weights are read forwards, read backwards, and written as gradients: three times their bytes.
    AdamW reads p, m, v and the gradient and writes p, m and v: 28 bytes a parameter. What is saved
    between the passes is not predicted: it need not leave the chip, and where it does, shows."""
    cfg, B, T = job.cfg, job.B, job.prompt
    wide = jnp.dtype(cfg.dtype).itemsize
    return cost(job, T, T, B * T, train_flops(cfg, B, T), 3 * wide * param_count(cfg), 0, cfg.dtype,
                Part("optimizer", 0, 28 * param_count(cfg), "float32"))


def prefill_cost(job):
    """All weights once (`rows_at_a_time` may read them again, beside many flops), and the cache
    written once."""
    cfg, B, T, S = job.cfg, job.B, job.prompt, slots(job, job.prompt)
    return cost(job, T, S, B * T, prefill_flops(cfg, B, T), weight_bytes(cfg, job.dtype),
                kv_bytes(cfg, B, S, job.cache_dtype), cfg.dtype)


def extend_cost(job, T, S):
    """T tokens behind others: all weights, and all slots of the cache whether filled or not. A
    query meets the cache in the wider dtype of both; int8 is widened."""
    cfg, B, S = job.cfg, job.B, slots(job, S)
    moved = decode_bytes(cfg, B, S, T, cache_dtype=job.cache_dtype, dtype=job.dtype)
    narrow = cfg.dtype if job.cache_dtype == "int8" else job.cache_dtype
    return cost(job, T, S, B * T, decode_flops(cfg, B, S, T), moved["weights"],
                moved["cache_read"] + moved["cache_write"],
                str(jnp.promote_types(cfg.dtype, narrow)))


def generate_cost(job):
    """One step."""
    return extend_cost(job, 1, job.prompt + job.new)


def verify_cost(job):
    """A round of speculation: the last token and a draft of n_draft. The n-grams cost nothing."""
    return extend_cost(job, job.n_draft + 1, verify_slots(job))


def verify_slots(job):
    """Job -> int: for what is known, what is made, and a draft."""
    return job.prompt + job.new + job.n_draft + 1


def serve_cost(job):
    """A prefill for each request, and steps for B at a time."""
    requests = REQUESTS * job.B
    each = [("prefill", requests, prefill_cost(job._replace(B=1))),
            ("generate", REQUESTS * job.new, generate_cost(job))]
    flops = {name: sum(n * c.flops.get(name, 0) for _, n, c in each)
             for name in each[0][2].flops | each[1][2].flops}
    weights, cached = (sum(n * getattr(c, name) for _, n, c in each)
                       for name in ("weight_bytes", "cache_bytes"))
    return Cost(1, job.prompt + job.new, requests * job.new, flops, weights, cached, tuple(
        Part(f"{word}, {part.name}", n * part.flops, n * part.bytes, part.dtype)
        for word, n, c in each for part in c.parts))


def product_cost(job):
    """B rows with one weight of E x F."""
    flops = {"mlp": 2 * job.B * job.cfg.E * job.cfg.F, "scores": 0, "values": 0}
    moved = job.cfg.E * job.cfg.F * jnp.dtype(job.cfg.dtype).itemsize
    return cost(job, 1, 0, job.B, flops, moved, 0, job.cfg.dtype)


def attention_cost(job):
    """What one layer of `train_flops` has of it."""
    one = train_flops(replace(job.cfg, L=1), job.B, job.prompt)
    flops = {name: one[name] for name in ("scores", "values")}
    return cost(job, job.prompt, job.prompt, job.B * job.prompt, flops, 0, 0, job.cfg.dtype)


def predict(cost, ceilings):
    """Cost, dict -> dict: seconds of a step: its parts follow one another, and each takes its
    flops' time or its bytes' time, whichever is longer."""
    parts = []
    for part in cost.parts:
        times = {"flops": part.flops / ceilings["flops_per_second"][part.dtype],
                 "bytes": part.bytes / ceilings["read_bytes_per_second"]}
        bound = "flops" if times["flops"] > times["bytes"] else "bytes"
        parts.append({"name": part.name, "flops": part.flops, "bytes": part.bytes,
                      "seconds": times[bound], "bound": bound})
    by = {bound: sum(part["seconds"] for part in parts if part["bound"] == bound)
          for bound in ("flops", "bytes")}
    return {"predicted_seconds": sum(by.values()), "bound": max(by, key=by.get), "parts": parts}


def multiplied(cfg):
    """cfg -> int: parameters that each token is multiplied with: not norms, nor an untied table of
    which rows are read."""
    return sum(size_of(name, cfg) for name in jax.tree.leaves(read_arrays(cfg)) if " " in name)


def crossover(cfg):
    """cfg -> int, int: T of a causal pass, and S of a generate step, at which attention's flops
    equal the weights'. Per token: 2 a weight; 4 * L*H*D a slot, of which a query sees T/2."""
    heads = cfg.L * cfg.H * cfg.D
    return multiplied(cfg) // heads, multiplied(cfg) // (2 * heads)


def critical_batch(job, ceilings, parameters=None):
    """Job, dict -> float: rows at which a step's products with the weights take as long as reading
    them."""
    peak, read = ceilings["flops_per_second"][products_in(job)], ceilings["read_bytes_per_second"]
    held = parameters * jnp.dtype(job.dtype).itemsize if parameters else weight_bytes(
        job.cfg, job.dtype)
    return held / read * peak / (2 * (parameters or multiplied(job.cfg)))


# ------------------------------------------------------------------- plan: chips that are not here


def degree(cfg, chips):
    """cfg, int -> int: how many of the chips can share one copy by tensor parallelism: a divisor of
    their number and of E, F, H and V. The others hold further copies."""
    return max(n for n in range(1, chips + 1)
               if not any(size % n for size in (chips, cfg.E, cfg.F, cfg.H, cfg.V)))


def over_heads(cfg, n):
    """cfg, int -> int or tuple: n devices of an axis "tensor", or of two where there are fewer key
    heads: the first over them, the second over rows or slots of each."""
    heads = math.gcd(cfg.K, n)
    return n if heads in (1, n) else (heads, n // heads)


def cache_split(layout, n):
    """str, n -> str: what a device holds of a layer's k, or v, in that layout."""
    letter = shard.LAYOUTS[layout].letter
    return "[" + ",".join(name + f"/{n}" * (name == letter) for name in "BKSD") + "]"


HOPS = {  # to the farthest of n devices around a ring, both ways
    "all_gather": lambda n: n // 2, "reduce_scatter": lambda n: n // 2,
    "all_reduce": lambda n: 2 * (n // 2), "all_to_all": lambda n: n // 2, "permute": lambda n: 1}


def hops_of(events, ways=1):
    """Counter of shard.traced_events, int -> int: how many hops from device to device follow one
    another; rings in two directions run side by side."""
    return sum(number * HOPS[kind](n) // (ways if kind == "permute" else 1)
               for (kind, _, n), number in events.items())


def comm_seconds(sent, link, ways, hops, hop=HOP_SECONDS):
    """dict, bytes/s, int, int, seconds -> seconds: of what shard.tally gives, over links of so many
    bytes a second each way, and of so many `hops_of`, each of `hop` seconds. Permutes go `ways`
    ways around a ring, all others both."""
    return hops * hop + sum(size / link / (ways if kind == "permute" else 2)
                              for kind, (_, size) in sent.items())


def layer_steps(job, T, n, link, hop=HOP_SECONDS):
    """Job, int, int, bytes/s, seconds -> list of dict: what each step of T tokens a row sends among
    n devices, with the cache over heads where it can be, else over rows, else over slots: how often
    it does, what a device holds before and after, its collectives, bytes and seconds.

    They are `shard.step_comm`. Bytes go both ways over a link; a latency for each hop.
    """
    cfg = job.cfg
    layout = next(name for name, size in (("heads", cfg.K), ("batch", job.B), ("sequence", n))
                  if size % n == 0)
    x, heads, last = "[B,T,E/n]", "[B,T,H/n,D]", "[B,1,V/n]"
    keys = "[B,T,K/n,D]" if layout == "heads" else "[B,T,K,D]"
    shapes = {
        "embed": ("[B,T]", x), "q, k, v": (x, f"{heads}, 2 x {keys}"),
        "attention": (f"{heads}, 2 x {cache_split(layout, 'n')}", heads), "out": (heads, x),
        "gate, up": (x, "2 x [B,T,F/n]"), "down": ("[B,T,F/n]", x), "logits": ("[B,1,E/n]", last),
        "draw": (last, "[B]")}
    rows, sizes = [], dict(cfg.__dict__, B=job.B, T=T, S=job.prompt + job.new)

    def sized(shapes):
        return re.sub(r"([A-Z])(/n)?", lambda m: f"{sizes[m[1]] // (n if m[2] else 1)}", shapes)

    for name, (times, events) in shard.step_comm(
            cfg, job.B, T, (n,), layout, job.ring, job.phase == "prefill").items():
        (before, after), sent = shapes[name], shard.tally(events)
        hops = hops_of(events, max(1, job.ring))
        rows.append({
            "step": name, "times": times, "shapes": f"{before} -> {after}".replace("/n", f"/{n}"),
            "before": sized(before), "after": sized(after),
            "collectives": {kind: number for kind, (number, _) in sent.items()},
            "bytes": sum(size for _, size in sent.values()), "hops": hops,
            "seconds": comm_seconds(sent, link / 2, max(1, job.ring), hops, hop)})
    return rows


def step_parts(job, chip, chips, parameters=None, hop=HOP_SECONDS):
    """Job, Chip, int -> list of dict: weights, attention and communication of one step, all chips'
    flops and bytes together. `parameters` replaces the exact count of what is multiplied."""
    cost = PHASES[job.phase].cost(job)
    weights, attention = cost.parts
    if parameters:
        weights = weights._replace(flops=2 * job.B * cost.T * parameters,
                                   bytes=parameters * jnp.dtype(job.dtype).itemsize)
    found = predict(cost._replace(parts=(weights, attention)), sheet(chip, chips))["parts"]
    if chips == 1:
        return found
    sent = layer_steps(job, cost.T, chips, chip.link, hop)
    hops, size, seconds = (sum(step["times"] * step[key] for step in sent)
                           for key in ("hops", "bytes", "seconds"))
    return found + [{"name": "communication", "flops": 0, "bound": "links", "hops": hops,
                     "bytes": chips * size, "seconds": seconds}]


def in_all(parts, hidden=False):
    """list of dict, bool -> seconds: parts that follow one another or, `hidden`, what is sent
    behind the weights' products, as rings can do: then the longer of the two counts."""
    took = {part["name"]: part["seconds"] for part in parts}
    behind = min(took["weights"], took.get("communication", 0.0)) if hidden else 0.0
    return sum(took.values()) - behind


def useful_degree(job, chip, parameters, hop):
    """Job, Chip -> int: the most chips, in powers of two, whose links take no longer than their
    memory and products do. More would wait for links."""
    best = 1
    while degree(job.cfg, 2 * best) == 2 * best:
        *parts, sent = step_parts(job, chip, 2 * best, parameters, hop)
        if sent["seconds"] > sum(part["seconds"] for part in parts):
            break
        best *= 2
    return best


def napkin(job, chip, chips, parameters=None, batch=None, hop=HOP_SECONDS):
    """Job, Chip, int -> dict: memory, batch and times, from the sheet alone. `parameters` is a
    rounded count in place of the exact one; job.prompt is the context, job.new is 0. Copies of the
    model that share no chips share the batch."""
    cfg, dtype, count = job.cfg, job.dtype, parameters or param_count(job.cfg)
    table = (not cfg.tied) * cfg.V * cfg.E * array_bytes("", cfg, dtype)
    weights = count * jnp.dtype(dtype).itemsize if parameters else weight_bytes(cfg, dtype) + table
    n = degree(cfg, chips)
    copies, memory = chips // n, n * chip.memory
    token, sequence = (kv_bytes(cfg, 1, S, job.cache_dtype) for S in (1, job.prompt))
    most, taken = (max(0, int((share * memory - weights) // sequence))
                   for share in (1, 1 - HELD_BACK))
    B = -(-batch // copies) if batch else max(1, taken)  # of each copy
    parts = {word: step_parts(job._replace(phase=phase, B=rows), chip, n, parameters, hop)
             for word, phase, rows in (("prefill", "prefill", B), ("generate", "generate", B),
                                       ("alone", "generate", 1), ("first", "prefill", 1))}
    total = {word: in_all(found) for word, found in parts.items()}
    for part in parts["prefill"] + parts["generate"]:
        part["flops"], part["bytes"] = part["flops"] * copies, part["bytes"] * copies
    needed, all_rows = weights + B * sequence, batch or B * copies
    return {
        "parameters": count, "multiplied_parameters": parameters or multiplied(cfg),
        "weight_bytes": weights, "cache_bytes_per_token": token,
        "cache_bytes_per_sequence": sequence, "chips_per_copy": n, "copies": copies,
        "max_batch": most * copies, "batch_with_room": taken * copies,
        "critical_batch": critical_batch(job, sheet(chip), parameters),
        "batch": all_rows, "fits": needed <= memory,
        "chips_needed": 2 ** max(0, math.ceil(math.log2(needed / chip.memory))),
        "cache_bytes": copies * B * sequence,
        "step_bytes": sum(part["bytes"] for part in parts["generate"][:2]),
        **{f"{word}_{key}": value for word in ("prefill", "generate") for key, value in (
            ("seconds", total[word]), ("parts", parts[word]),
            ("hidden_seconds", in_all(parts[word], hidden=True)))},
        "first_token_seconds": total["first"],
        "tokens_per_second": all_rows / total["generate"],
        "seconds_per_token_alone": total["alone"],
        "weights_over_memory_seconds": weights / n / chip.read,
        "weights_over_links_seconds": weights * (chips - 1) / chips / chip.link,
        "tensor_parallel_degree": useful_degree(job._replace(B=B), chip, parameters, hop)}


WAYS = {  # to have a smaller cache: Config, dtype of the cache -> those to take in their place
    "as it is": lambda cfg, dtype: (cfg, dtype),
    "grouped queries, K=1": lambda cfg, dtype: (replace(cfg, K=1), dtype),
    "int8": lambda cfg, dtype: (cfg, "int8"),
    "both": lambda cfg, dtype: (replace(cfg, K=1), "int8")}


def million(job, chip, chips, weights, context=1_000_000):
    """Job, Chip, int, bytes -> list of dict: what a very long sequence's cache takes, and the ways
    out of it, each once."""
    ways = {way(job.cfg, job.cache_dtype): name for name, way in reversed(WAYS.items())}
    held = {name: kv_bytes(cfg, 1, context, dtype) for (cfg, dtype), name in ways.items()}
    return [{"way": name, "cache_bytes": held[name], "bytes_per_chip": held[name] / chips,
             "chips_needed": math.ceil((held[name] + weights) / chip.memory),
             "generate_seconds": (held[name] + weights) / chips / chip.read}
            for name in WAYS if name in held]


def training(job, chip, chips, tokens, mfu, parameters=None):
    """Job, Chip, int, float, float -> dict: a step of AdamW and a whole training, with weights
    sharded over all chips (FSDP)."""
    cfg, B, T = job.cfg, job.B, job.prompt
    if B % chips:
        raise ValueError(f"a training batch of {B} sequences cannot be split over {chips} chips: "
                         f"--batch {-(-B // chips) * chips}")
    count, flops = parameters or param_count(cfg), train_flops(cfg, B, T)
    attention = flops["scores"] + flops["values"]
    weights = 6 * B * T * parameters if parameters else sum(flops.values()) - attention
    wide, peak = jnp.dtype(cfg.dtype).itemsize, chips * chip.flops[job.dtype]
    sent = 3 * wide * count * (chips - 1) / chips  # gathered twice, gradients scattered once
    compute, links = (weights + attention) / peak, sent / chip.link
    return {"batch": B, "tokens_per_step": B * T, "step_flops": weights + attention,
            "weight_flops": weights, "attention_flops": attention, "mfu": mfu, "tokens": tokens,
            "step_seconds": compute / mfu, "days": tokens / (B * T) * compute / mfu / 86400,
            "optimizer_bytes": 12 * count, "gradient_bytes": 4 * count,
            "bytes_per_chip": 16 * count / chips, "fits": 16 * count <= chips * chip.memory,
            "fsdp_bytes_per_chip": sent, "fsdp_seconds": links, "compute_seconds": compute,
            "communication_bound": links > compute}


PLAN = (  # a line of the napkin: what it says, of what, and its unit or form
    ("parameters", "parameters", ",.0f"),
    ("of them multiplied for each token", "multiplied_parameters", ",.0f"),
    ("weights", "weight_bytes", "B"), ("cache of a token", "cache_bytes_per_token", "B"),
    ("cache of a sequence", "cache_bytes_per_sequence", "B"),
    ("chips that share a copy", "chips_per_copy", "d"), ("copies", "copies", "d"),
    ("sequences that fit, in theory", "max_batch", "d"),
    (f"with {HELD_BACK:.0%} of memory held back", "batch_with_room", "d"),
    ("critical batch", "critical_batch", ".0f"), ("batch taken", "batch", "d"),
    ("cache of the batch", "cache_bytes", "B"), ("a generate step reads", "step_bytes", "B"),
    ("a generate step takes", "generate_seconds", "s"),
    ("if products hid its links", "generate_hidden_seconds", "s"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("a token at batch 1 takes", "seconds_per_token_alone", "s"),
    ("prefill of one sequence", "first_token_seconds", "s"),
    ("prefill of the batch", "prefill_seconds", "s"),
    ("if products hid its links", "prefill_hidden_seconds", "s"),
    ("useful tensor-parallel degree", "tensor_parallel_degree", "d"),
    ("weights over memory, a part each", "weights_over_memory_seconds", "s"),
    ("weights over links (FSDP), all each", "weights_over_links_seconds", "s"))
TRAINING = (
    ("tokens in a step", "tokens_per_step", ",d"), ("a step multiplies", "step_flops", "FLOP"),
    ("of it 6BP", "weight_flops", "FLOP"), ("and attention", "attention_flops", "FLOP"),
    ("a step at full speed", "compute_seconds", "s"), ("MFU that is assumed", "mfu", ".0%"),
    ("a step at that MFU", "step_seconds", "s"), ("days for all tokens", "days", ",.1f"),
    ("f32 masters and Adam's two means", "optimizer_bytes", "B"),
    ("f32 gradients", "gradient_bytes", "B"),
    ("both, a chip, beside activations", "bytes_per_chip", "B"),
    ("FSDP sends, a chip", "fsdp_bytes_per_chip", "B"), ("over its links", "fsdp_seconds", "s"))
PART = (Column("", -8, "phase"), Column("", -13, "name"), Column("", 11, "flops", "FLOP"),
        Column("", 8, "bytes", "B"), Column("", 8, "seconds", "s"),
        Column("", -14, lambda part: f" bound by {part['bound']}"),
        Column("", 9, lambda part: f"{part['hops']} hops" if "hops" in part else ""))
STEP = (Column("step", -9, "step"), Column("times", 5, "times", "d"),
        Column("a device holds before -> after", -47, "shapes"),
        Column("collectives", -19, lambda step: ", ".join(
            f"{n} {kind}" if n > 1 else kind for kind, n in step["collectives"].items())
            or "none: purely local"),
        Column("sends", 7, "bytes", "B"), Column("time", 7, "seconds", "s"))
WAY = (Column("at a million tokens", -20, "way"), Column("a sequence", 10, "cache_bytes", "B"),
       Column("of it a chip", 12, "bytes_per_chip", "B"),
       Column("chips that hold it", 18, "chips_needed", "d"),
       Column("a step", 8, "generate_seconds", "s"))


def print_facts(facts, columns):
    """list of (text, key, form), dict of heading -> dict -> lines."""
    print_table([Column("", -42, "what"), *(Column(name, 18, name) for name in columns)],
                [{"what": text, **{name: shown(n[key], form) for name, n in columns.items()}}
                 for text, key, form in facts])


def plan(args):
    """Prints the napkin of a model on chips that need not be here."""
    (name, chip), (model_name, cfg), B = args.chip, args.model, args.batch
    if args.compile:
        check_compiler(name)
    cfg = replace(cfg, K=args.kv_heads or cfg.K)
    job = in_kind(Job("generate", model_name, cfg, B or 1, args.context, 0, chip=name),
                  args.weights, args.cache, args.int8)
    trained = training(job._replace(B=B or 4 * args.chips, dtype=job.cfg.dtype), chip, args.chips,
                       args.tokens, args.mfu, args.parameters) if args.train else None
    counts = {f"{args.parameters:g} parameters": args.parameters} if args.parameters else {}
    numbers = {heading: napkin(job, chip, args.chips, count, B, args.hop)
               for heading, count in {**counts, "exact": None}.items()}
    first = next(iter(numbers.values()))
    n, rows = first["chips_per_copy"], -(-first["batch"] // first["copies"])
    sent = layer_steps(job._replace(B=rows), 1, n, chip.link, args.hop) if n > 1 else []
    ways = million(job, chip, args.chips, first["weight_bytes"])
    print(f"{model_name} on {args.chips} x {name}: {si(chip.flops[products_in(job)], 'FLOP/s')} in "
          f"{products_in(job)}, {si(chip.read, 'B/s')}, {si(chip.memory, 'B')}, links "
          f"{si(chip.link, 'B/s')} an axis ({chip.axes})\n({chip.source})\n"
          f"weights {args.weights}, cache {args.cache}, context {args.context}")
    print_facts(PLAN, numbers)
    for heading, napkin_ in numbers.items():
        if not napkin_["fits"]:
            print(f"DOES NOT FIT ({heading}): batch {napkin_['batch']} takes more memory: --chips "
                  f"{napkin_['chips_needed']}, or a smaller --batch, --weights or --cache")
    print_table(PART, [{"phase": word, **part} for word in ("prefill", "generate")
                       for part in first[f"{word}_parts"]], heads=False)
    if sent:
        print(f"\na generate step at B={rows} over {n} devices: what each sends, over its links "
              "both ways and a latency a hop")
        print_table(STEP, sent)
        print("FSDP is for training: a step that makes one token a row has nothing to hide the "
              "weights' trip behind")
    print(f"\nthe cache is {1_000_000 / args.context:.0f} times as large, with slots over "
          f"{args.chips} chip(s):")
    print_table(WAY, ways)
    if trained:
        print(f"\ntraining on {args.tokens:.3g} tokens, {trained['batch']} sequences a step"
              + ("" if trained["fits"] else ", WHICH DOES NOT FIT: more --chips"))
        print_facts(TRAINING, {"by AdamW": trained})
        print("FSDP's links take " + ("longer than the products: a step waits for them"
              if trained["communication_bound"] else "less than the products, which can hide them"))
    more = {"exact": numbers["exact"]} if args.parameters else {}
    if args.compile:
        more["compiled"] = compiled_plan(job._replace(new=min(16, args.context - 1)), args, numbers,
                                         ways)
    finish(args, model=model_name, chip=name, chips=args.chips, context=args.context,
           weights=args.weights, cache=args.cache, **first, steps=sent, million=ways,
           training=trained, **more)


def compiled_plan(job, args, numbers, ways):
    """Job, args, napkins, ways -> dict: what the chip's compiler accepts of a plan: the largest
    batch, and a step at a million tokens on as many chips as the plan says."""
    (name, _), rows = args.chip, []
    job = job._replace(prompt=args.context - job.new)

    def tried(job, chips):
        try:
            layout = "sequence" if job.cfg.K % (chips * TARGETS[name].devices) else "heads"
            row = ask(on_chips(job, name, chips, layout=layout))
        except ValueError as error:
            raise ValueError(f"--compile on {chips} chips: {error}") from None
        row["told"] = (f"it fits: {si(row['peak_bytes'], 'B')} of {si(row['memory_bytes'], 'B')} "
                       "a device" if row["fits"] else f"it is refused: {row['message']}")
        say(f"B={job.B} S={job.prompt + job.new} on {chips} x {name}: {row['told']}")
        return row

    with compilers() as ask:
        low, high = 0, int(1.1 * max(n["max_batch"] for n in numbers.values())) + 2
        while high - low > 1:  # low fits
            middle = (low + high) // 2
            fits = tried(job._replace(B=middle), args.chips)["fits"]
            low, high = (middle, high) if fits else (low, middle)
        print(f"compiled: the largest batch that {name}'s compiler accepts is {low}, beside "
              + ", ".join(f"{n['max_batch']} and {n['batch_with_room']} ({heading})"
                          for heading, n in numbers.items()))
        for way in ways:
            cfg, cache = WAYS[way["way"]](job.cfg, job.cache_dtype)
            sizes = sorted(map(chips_of, TARGETS[name].slices.split()))
            chips = 1 if way["chips_needed"] == 1 else next(
                (n for n in sizes if n >= way["chips_needed"]), sizes[-1])
            row = tried(job._replace(B=1, cfg=cfg, cache_dtype=cache,
                                     prompt=1_000_000 - job.new), chips)
            rows.append({"way": way["way"], "chips": chips, **{key: row[key] for key in (
                "fits", "peak_bytes", "memory_bytes", "compiler_seconds", "message")}})
            print(f"compiled at 1,000,000 tokens, {way['way']}: {way['chips_needed']} chip(s) by "
                  f"the plan; on {chips} {row['told']}"
                  + (f", {si(row['compiler_seconds'], 's')} a step by its cycles"
                     if row["compiler_seconds"] else ""))
    return {"max_batch": low, "million": rows}


def chips_of(shape):
    """str -> int: chips of a slice."""
    return math.prod(map(int, shape.split("x")))


# ------------------------------------------------------------------------------------------ program


class Program(NamedTuple):
    """A step, on one device or on the devices of a mesh, here or elsewhere."""
    step: Callable        # to be jitted, but for serve's, which compiles itself
    make: Callable        # (params, key) -> its first arguments; traced, it says their shapes
    donated: tuple = ()   # which of them
    returned: tuple = ()  # which results take their places in the next run


ROWS = jax.P(None, None, "tensor")  # how activations are split, before a product and after it
WEIGHTS = {"gather_matmul": jax.P("tensor"), "matmul_scatter": jax.P(None, "tensor")}  # and weights
PRODUCTS = tuple(WEIGHTS)
PARTIAL = (*PRODUCTS, "attention", "refill")  # no commands of their own


def where_of(job, mesh):
    """Job, Mesh or None -> where its functions run: here, or split as the job says."""
    return HERE if mesh is None or job.phase == "train" else shard.Where(
        mesh, job.layout, job.ring)


def functions(job, mesh):
    """Job, Mesh or None -> namespace of the model's functions, on one device or split."""
    where = where_of(job, mesh)
    fns = dict(prefill=partial(prefill, rows=None if mesh else rows_at_a_time(job)), extend=extend,
               generate=generate, speculate=partial(speculate, n_draft=job.n_draft))
    return SimpleNamespace(unembed=partial(where.unembed, cfg=job.cfg), **{
        name: partial(fn, cfg=job.cfg, where=where) for name, fn in fns.items()})


def rows_at_a_time(job):
    """Job -> int: of a prefill. On this machine's CPU the largest divisor of B, from 2 on, whose
    rows hold 1,024 to 2,048 tokens; elsewhere, or where there is none, B."""
    B, T = job.B, job.prompt
    some = [rows for rows in range(2, B) if B % rows == 0 and 1024 <= rows * T <= 2048]
    return max(some, default=B) if not job.chip and on_cpu() and B * T > 2048 else B


def slots(job, S):
    """Job, int -> int: S, or where slots are split the next number that divides."""
    n = shard.as_axes(dict(job.mesh).get("tensor", 1))[-1]
    return -(-S // n) * n if shard.LAYOUTS[job.layout].letter == "S" else S


def build(job, mesh):
    """Job, Mesh or None -> Program: of its phase, greedily, with random tokens and logits. The
    prompt's slots of the cache hold zeros; speculation alone reads a prompt first, SENTENCE."""
    cfg, B, T, new, S = job.cfg, job.B, job.prompt, job.new, job.prompt + job.new
    fns = functions(job, mesh)

    def tokens(*shape):
        return lambda key: jax.random.randint(key, shape, 0, cfg.V)

    def logits(key):
        return jax.random.normal(key, (B, cfg.V), "float32")

    def begin(S, *draws):
        """-> make: parameters, a cache of S slots a row, and what is drawn with a key."""
        def make(params, key):
            cache = init_cache(cfg, B, slots(job, S), job.cache_dtype)
            drawn = [draw(key) for draw in draws]
            if job.phase == "speculate":
                _, cache = prefill_jit(params, cache, drawn[0][:, :T], jnp.full(B, T), cfg)
            return params, where_of(job, mesh).move(cache) if mesh else cache, *drawn
        return make

    def behind(cache, length=T):  # every run starts there
        return cache._replace(length=jnp.full_like(cache.length, length))

    match job.phase:
        case "train":  # a whole step of AdamW, from f32 masters that are its own
            def masters(params, key):
                params = jax.tree.map(lambda w: jnp.array(w, jnp.float32), params)  # a copy
                params = shard.stack(params) if mesh and job.by == "hand" else params
                drawn = tokens(B, T + 1)(key)
                return params, adam_init(params), drawn
            split = {} if mesh is None else {"loss": partial(
                shard.fsdp_loss, mesh=mesh) if job.by == "compiler" else partial(
                shard.sharded_loss, mesh=mesh, ring=job.ring, keep=job.keep)}
            return Program(partial(train_step, cfg=cfg, lr=1e-4, **split), masters, (0, 1), (0, 1))
        case "prefill":  # into a cache that is full then
            return Program(lambda params, cache, tokens: fns.prefill(
                params, cache, tokens, jnp.full((B,), T)), begin(T, tokens(B, T)), (1,), (1,))
        case "generate":  # in one scan
            return Program(lambda params, cache, logits: fns.generate(
                params, behind(cache), logits, jax.random.key(0), new),
                begin(S, logits), (1, 2), (2, 1))
        case "verify":  # the last token and n_draft more, of which all make logits
            def verify(params, cache, tokens):
                x, cache = fns.extend(params, behind(cache), tokens)
                return fns.unembed(params, x), cache
            return Program(verify, begin(verify_slots(job), tokens(B, job.n_draft + 1)), (1,), (1,))
        case "speculate":  # by n-grams; worth looking at with parameters from `learn`
            def text(key):
                known = np.resize(encode(SENTENCE), T) % cfg.V
                return jnp.zeros((B, verify_slots(job)), jnp.int32).at[:, :T].set(known)
            return Program(lambda params, cache, text: fns.speculate(  # the last is not read yet
                params, behind(cache, T - 1), text, jax.random.key(0), new,
                draft=ngram_draft, state=None),
                begin(verify_slots(job), text), (1,), (1,))
        case "serve":  # REQUESTS for each of B rows
            return Program(lambda params, prompts: dict(serve(
                params, np.asarray(prompts), B, S, new, jax.random.key(0), cfg,
                stride=min(8, new), cache_dtype=job.cache_dtype)),
                lambda params, key: (params, tokens(REQUESTS * B, T)(key)))
        case "refill":  # the other step of `serve`: one row starts over with a prompt
            return Program(lambda params, cache, logits, prompt: refill(
                params, cache, logits, 0, prompt, jnp.full((1,), T), cfg),
                begin(S, logits, tokens(1, T)), (1, 2), (1, 0))
        case "attention":  # of ones, causal, forwards and backwards
            @jax.named_scope("attention")
            def attend(q, k, v):
                out, back = jax.vjp(causal_attention, q, k, v)
                return back(out)
            return Program(attend, lambda params, key: (
                jnp.ones((B, T, cfg.H, cfg.D), cfg.dtype),
                *(jnp.ones((B, cfg.K, T, cfg.D), cfg.dtype),) * 2))
        case _:  # a collective matmul of B rows of ones
            enter, leave = shard.RINGS[job.ring]
            multiply, width, weight = {
                "gather_matmul": (lambda x, w: enter(x, (w,))[0], cfg.E, "w_gate"),
                "matmul_scatter": (lambda x, w: leave(x, w), cfg.F, "w_down")}[job.phase]
            return Program(jax.shard_map(
                multiply, mesh=mesh, in_specs=(ROWS, WEIGHTS[job.phase]), out_specs=ROWS),
                lambda params, key: (jnp.ones((B, 1, width), cfg.dtype),
                                     getattr(params.layers[0], weight)))


def speculated(job, out):
    """Job, result -> dict: a row's rounds, and what came of them. A step is a round of all rows:
    the rows that are done wait for the others."""
    counts = np.asarray(out[3])  # of rounds in which 0, 1, .. n_draft were accepted
    rounds, accepted = counts.sum(1), counts @ np.arange(job.n_draft + 1)
    return {"steps": int(rounds.max()), "tokens": float((rounds + accepted).sum() / rounds.max()),
            "acceptance": float(accepted.sum() / rounds.sum() / job.n_draft),
            "tokens_per_round": float(1 + accepted.sum() / rounds.sum())}


class Phase(NamedTuple):
    """cost(job) predicts a step; tell(job, result) says how many steps that was, and what else the
    row should hold; build(job, mesh) gives its Program."""
    mark: str  # in the picture
    cost: Callable
    tell: Callable = lambda job, out: {"steps": 1}
    build: Callable = build


PHASES = {"train": Phase("T", train_cost, lambda job, out: {"steps": 1, "loss": float(out[2])}),
          "prefill": Phase("P", prefill_cost),
          "generate": Phase("G", generate_cost, lambda job, out: {"steps": job.new}),
          "verify": Phase("V", verify_cost),
          "speculate": Phase("D", verify_cost, speculated),
          "serve": Phase("S", serve_cost),
          "refill": Phase("R", lambda job: prefill_cost(job._replace(B=1))),
          "attention": Phase("A", attention_cost),
          **dict.fromkeys(PRODUCTS, Phase("M", product_cost))}


def counted(job, L):
    """Job, int -> Counter: the collectives of its program with L layers, counted on a mesh without
    devices."""
    job = job._replace(cfg=replace(job.cfg, L=L))
    step, make, *_ = PHASES[job.phase].build(job, shard.abstract_mesh(**dict(job.mesh)))
    return shard.traced_events(step, *jax.eval_shape(make, abstract(job), jax.random.key(0)))


def sent(job):
    """Job -> Counter or None: the collectives of a step: by the formula of tensor parallelism; of
    other programs counted with one layer and with two. None where the compiler chooses them."""
    if job.by == "compiler":
        return None
    if job.phase in ("train", *PRODUCTS) or job.phase == "prefill" \
            and shard.LAYOUTS[job.layout].by_token:
        one, two = counted(job, 1), counted(job, 2)
        return one + shard.repeat(job.cfg.L - 1, two - one)
    axes, data = (shard.as_axes(dict(job.mesh).get(name, 1)) for name in ("tensor", "data"))
    B, T = job.B // math.prod(data), PHASES[job.phase].cost(job).T
    logits = B * T * job.cfg.V // math.prod(axes) * 4
    events = shard.gather_comm(logits, axes if job.phase == "speculate" else ())
    for times, step in shard.step_comm(job.cfg, B, T, axes, job.layout, job.ring,
                                       job.phase == "prefill").values():
        events += shard.repeat(times, step)
    return events


def on_links(job, link):
    """Job, bytes/s one way -> dict: what each device sends in a step, collective by collective, and
    the seconds that it takes; None where that is the compiler's choice, and nothing alone."""
    events, ways = sent(job) if job.mesh else Counter(), max(1, job.ring)
    if events is None:
        return dict.fromkeys(("predicted_collectives", "link_seconds", "hops"))
    formula, hops = shard.tally(events), hops_of(events, ways)
    return {"predicted_collectives": formula, "hops": hops,
            "link_seconds": comm_seconds(formula, link, ways, hops)}


def abstract(job):
    """Job -> Params: shapes of its parameters."""
    return jax.eval_shape(partial(drawn, job), jax.random.key(0))


def mesh_of(job, devices=None):
    """Job, devices -> Mesh or None where it is of one device."""
    return shard.make_mesh(devices, **dict(job.mesh)) if job.mesh else None


def placed(job, mesh, args):
    """Job, Mesh, arguments -> their shardings on the real machine, one for what is alike."""
    cfg, rows, where = job.cfg, shard.axes_of(mesh, "data"), where_of(job, mesh)
    if job.phase == "train":
        rules = shard.FSDP if job.by == "compiler" else {**shard.TENSOR, **shard.FSDP}
    else:
        rules = where.rules
        shard.check_divides("E", cfg.E, mesh, where.axes)

    def spec(a):
        match a:
            case Params(layers=Layer()):
                return shard.stacked(shard.specs(cfg, mesh, rules))
            case Params():
                return shard.specs_of(a, cfg, mesh, rules)
            case Adam():
                return Adam(jax.P(), spec(a.m), spec(a.v))
            case Cache():
                where.check(cfg, a)
                return where.cache_specs()
        logits = a.shape == (job.B, cfg.V) and a.dtype == jnp.float32
        return jax.P(rows or None, *[shard.axes_of(mesh, "tensor")] * logits)

    split = (ROWS, WEIGHTS[job.phase]) if job.phase in PRODUCTS else tuple(map(spec, args))
    return jax.tree.map(partial(jax.NamedSharding, mesh), split)


def program(step, args, compiled):
    """-> dict: flops of the jaxpr's products (None where a loop's length is unknown), and what the
    compiled program holds at once: its arguments, its results but for those that take an argument's
    place (alias), and temporaries."""
    flops, held = None, compiled.memory_analysis()
    with contextlib.suppress(ValueError):
        flops = traced_flops(step, *args)
    sizes = {f"{name}_bytes": getattr(held, f"{name}_size_in_bytes")
             for name in ("argument", "output", "alias", "temp")}
    return {"program_flops": flops, **sizes,
            "peak_bytes": sum(sizes.values()) - 2 * sizes["alias_bytes"]}


def prepare(job, params, seed, traced=False):
    """Job, Params or None, int, bool -> namespace: `call` runs it, again and again, on the first
    device, or on its mesh, where parameters are made as they are split; `row` is what the program
    says, `ops` its operations, None where it runs on the host. Traced, a GPU starts each kernel
    alone: of those that start together a trace does not say which is which."""
    mesh, key = mesh_of(job), jax.random.key(seed)
    step, make, donated, returned = PHASES[job.phase].build(job, mesh)
    if mesh:
        def born(key):
            return make(drawn(job, key), key)
        args = jax.jit(born, out_shardings=placed(job, mesh, jax.eval_shape(born, key)))(key)
    else:
        args = make(params, key)
    row, ops, start = {"compile_seconds": 0.0}, None, time.perf_counter()
    if job.phase != "serve":
        apart = {"xla_gpu_enable_command_buffer": ""}
        compiled = jax.jit(step, donate_argnums=donated).lower(*args).compile(
            apart if traced and jax.default_backend() == "gpu" else None)
        row["compile_seconds"] = time.perf_counter() - start
        ops = operations(compiled.as_text(), job)
        row = program(step, args, compiled) | row | {"collectives": collectives(ops)}
        if mesh:
            row["counted"] = shard.traced_comm(step, *args)
        step = compiled

    def call():
        nonlocal args
        out, args = jax.block_until_ready(step(*args)), list(args)
        for argument, result in zip(donated, returned):
            args[argument] = out[result]
        return out

    return SimpleNamespace(call=call, row=row, ops=ops)


# ---------------------------------------------------------------------------------- compiled text


REGIONS = ("embed", "qkv", "attention", "out", "mlp", "unembed", "sample", "loss", "cast",
           "optimizer")  # that the model's functions name: jax.named_scope
SCHEDULED = {"while": "body", "call": "to_apply", "conditional":
             "true_computation|branch_computations"}  # what runs another computation, and which
WRAPPERS = {"tuple", "get-tuple-element", "parameter", "constant", *SCHEDULED}
UNSEEN = {"bitcast", "after-all", "partition-id", "copy-done", "slice-done", "opt-barrier",
          *WRAPPERS}  # take no time
MOVES = {"copy", "transpose", "bitcast", "slice", "concatenate", "reshape", "broadcast", "pad",
         "dynamic-slice", "dynamic-update-slice", "copy-start", "copy-done", *WRAPPERS}
PARTS = {"slice", "dynamic-slice", "gather"}  # read a part of their first operand
WRITES = {"dynamic-update-slice": 1, "scatter": 2}  # write an operand, this one, into their first


class Array(NamedTuple):
    """One array of a shape in compiled text."""
    bytes: int   # of its numbers
    padded: int  # that it takes: a TPU pads its last dimensions to tiles
    far: bool    # in the chip's main memory; not in a core's own, S(1) and so on


@lru_cache(1 << 14)
def arrays(shape):
    """str -> list of Array: `bf16[110,4,2048,256]{3,1,2,0:T(4,128)(2,1)S(1)}`, or a tuple of such.
    A layout gives dimensions from the last one in memory, and their tile."""
    found = []
    for bits, *numbers, space in re.findall(
            r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([\d,]*):?(?:T\(([\d,]+)\))?([^{}]*)\})?",
            shape):
        sizes, order, tile = ([int(n) for n in part.split(",") if n] for part in numbers)
        held = [sizes[i] for i in order] or sizes[::-1] or [1]
        for i, size in zip(range(len(held)), reversed(tile)):
            held[i] += -held[i] % size
        whole, padded = (math.prod(each) * int(bits or 8) // 8 for each in (sizes, held))
        found.append(Array(whole, padded, not re.search(r"S\([1-9]", space)))
    return found


def named_region(path):
    """str -> the innermost of REGIONS in it, or None."""
    return next((word for word in reversed(re.split(r"[/()]", path)) if word in REGIONS), None)


class Instruction(SimpleNamespace):
    """A line of compiled text. `made` are the Arrays of its result, of `size` bytes, `far` of them
    in main memory. It `calls` a computation, whose instructions are `body`, `again` times; `inner`
    are that computation's parameters, an operand each. `users` are pairs: an instruction that takes
    it, and the parameter that it is there, or None. `contents` is itself, or what a fusion holds;
    `kind` that of a collective, of shard.SENT."""

    def origin(self):
        """-> its region and source. The compiler drops the name of some operations that it makes,
        such as a product of one row: they belong where their result is used, inside a fusion as
        outside, or where it came from."""
        seen, ahead = set(), [self]
        while ahead and len(seen) <= 200:
            op = ahead.pop()
            if op.region:
                return op.region, op.source
            if op.name not in seen:
                seen.add(op.name)
                near = [(each, each is inner) for user, inner in op.users for each in (inner, user)]
                near += [(operand, False) for operand in op.operands]
                ahead += [each for each, inside in reversed(near)
                          if each and (inside or each.opcode not in WRAPPERS)]
        return None, ""

    def work(self):
        """-> str: product, copy or elementwise."""
        held = {inner.opcode for inner in self.contents}
        if held & {"dot", "convolution"} or re.search(r'target="[^"]*(gemm|matmul|dot)', self.line):
            return "product"
        return "copy" if held <= MOVES else "elementwise"

    def part_read(self, whole):
        """-> int: bytes that a fusion reads of this parameter: where it only slices it, those;
        where it only writes into it, none."""
        total = 0
        for user, inner in self.users:
            if user.opcode in ("bitcast", "fusion"):
                total += (inner or user).part_read(whole)
            elif user.opcode in PARTS and user.operands[0] is self:
                total += user.size
            elif user.opcode not in WRITES or user.operands[0] is not self:
                return whole
        return min(total, whole)

    def part_written(self):
        """-> int: bytes that it writes: of an update in place what is new."""
        if self.opcode in ("bitcast", "tuple", "fusion"):  # whose last instruction is its result
            return sum(op.part_written() for op in self.body[-1:] or self.operands)
        return self.operands[WRITES[self.opcode]].size if self.opcode in WRITES else self.far

    def moved(self):
        """-> int, int: bytes that it reads and writes in main memory. Of what is sliced, gathered
        or updated in place only that part. A prefetch counts where it starts."""
        if self.opcode in ("copy-start", "slice-start"):
            made = self.made[self.opcode == "slice-start"]
            return self.operands[0].made[0].far * made.padded, made.far * made.padded
        if self.opcode == "fusion":
            return sum(inner.part_read(operand.far) for inner, operand in zip(
                self.inner, self.operands)), min(self.part_written(), self.far)
        whole = 0 if self.opcode in WRITES else sum(operand.far for operand in self.operands)
        return min(whole, self.far) if self.opcode in PARTS else whole, self.part_written()

    def flops(self):
        """-> int: of its products. A TPU's are convolutions: each dimension of their windows is one
        of a product, which one or two of the three arrays lack."""
        total = 0
        for op in (inner for inner in self.contents if inner.opcode in ("dot", "convolution")):
            left, right, out = ([int(n) for n in re.search(r"\[([\d,]*)", each.shape)[1].split(",")
                                 if n] for each in (*op.operands[:2], op))
            if op.opcode == "dot":
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)", op.line)[1].split(",")
                total += 2 * math.prod(out + [left[int(i)] for i in contracted if i])
            else:
                labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.line).groups()
                left, right, out = map(dict, map(zip, labels, (left, right, out)))
                total += 2 * out["b"] * right["i"] * right["o"] * math.prod(
                    max(left[i], right[i], out[i]) for i in out if i.isdigit())
        return total

    def seconds(self, size, target):
        """bytes that it moves, Target -> seconds, bool: by the compiler's cycles or those bytes,
        whichever take longer; where it has no estimate by its flops or bytes, and False."""
        if target is None or self.opcode.endswith("-start"):
            return 0.0, True
        told, memory = re.search(r'"estimated_cycles":"(\d+)"', self.line), size / target.read
        if told and 0 < int(told[1]) < 1e12:  # more stands where there is none
            return max(int(told[1]) / target.clock, memory), True
        took = max(self.flops() / target.flops, memory)
        return took, took == 0  # what takes no time needs no estimate

    def group_size(self, devices):
        """int -> int: devices that a collective is among, of so many."""
        if told := re.search(r"(?:groups|pairs)=\{\{?([\d,]*)\}", self.line):
            return told[1].count(",") + 1 if told[1] else devices
        if told := re.search(r"groups=\[\d+,(\d+)\]", self.line):
            return int(told[1])
        if told := re.search(r"groups=@?mesh\[(.*?)\] ?\{(.*?)\}", self.line):
            axes = dict(re.findall(r"'(\w+)'=(\d+)", told[1]))
            return math.prod(int(axes[axis]) for axis in re.findall(r"'(\w+)'", told[2]))
        raise ValueError(f"a collective among unknown devices: {self.line.strip()[:200]}")

    def transfer(self, devices, target):
        """int, Target or None -> namespace: what it has to do with a collective, or None. On a TPU
        one may hide in a fusion: a scatter as an all-reduce of which a part is kept; a gather in
        what starts it, in each product beside it, and in what ends it."""
        first = self.operands[0] if self.opcode.endswith("-done") else self
        inner = next((inner for inner in first.contents if inner.kind in shard.SENT), None)
        named = re.search("-(start|update|done)$", self.opcode)
        mark = named or re.search("AsyncCollective(Start|Done)", " ".join(
            inner.line for inner in first.contents if inner.opcode == "custom-call"))
        if inner is None or mark is None and "async_collective" in self.calls:
            return None
        kind = "reduce_scatter" if "all-reduce-scatter" in self.calls else inner.kind
        given = [each.made for each in self.operands if each.made and each.opcode != "call-start"]
        n = inner.group_size(devices)
        sent = shard.SENT[kind](sum(a.bytes for made in given for a in made), n)
        return SimpleNamespace(
            kind=kind, number=len(given), sent=sent,
            stage=mark[1].lower().replace("update", "start") if mark else "whole",
            seconds=link_seconds(kind, sent, n, target) if target else 0.0,
            # the same for a start and its done; and for what follows one another on its way
            key=first.name if named else tuple(re.findall(r"channel_id=\d+", inner.line)),
            route=tuple(re.findall(r"(?:groups|pairs)=\S+", inner.line)))


@lru_cache(maxsize=1)
def parse_program(text):
    """str -> dict: Instructions by computation, as scheduled; what runs first is the last one."""
    known, computations, parameters, sources, computation = {}, {}, {}, {}, ""
    tables = {name: dict(re.findall(r'^(\d+) "?(.*?)"?$', rows, re.M))
              for name, rows in re.findall(r"^(\w+)\n((?:\d+ .*\n)+)", text, re.M)}
    for frame, entry in tables.get("StackFrames", {}).items():
        place = tables["FileLocations"][re.search(r"file_location_id=(\d+)", entry)[1]]
        file, function, line = re.findall(r"=(\d+)", place)[:3]
        sources[frame] = (f"{pathlib.Path(tables['FileNames'][file]).name}:{line} "
                          + tables["FunctionNames"][function].replace(".<locals>", ""))
    for line in text.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)", line)
        if match:
            name, shape, opcode, rest = match.groups()
            called = SCHEDULED.get(opcode.removesuffix("-start"), "calls")
            calls, condition, trips, path, frame = (
                found[1] if (found := re.search(pattern, line)) else "" for pattern in (
                    rf"(?:{called})=\{{?%?([\w.\-]+)", r"condition=%?([\w.\-]+)",
                    r'known_trip_count":\{"n":"(\d+)"', r'op_name="([^"]*)"',
                    r"stack_frame_id=(\d+)"))
            limits = [trips] if trips else [
                limit for other in computations.get(condition, ())
                for limit in re.findall(r"s32\[\]\S* constant\((\d+)\)", other.line)]
            operands = [known[word] for word in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
                        if word in known]
            made, body = arrays(shape), computations.get(calls, [])
            op = known[name] = Instruction(
                name=name, opcode=opcode, shape=shape, line=line, operands=operands, users=[],
                kind=re.sub("collective-|-(start|done)$", "", opcode).replace("-", "_"),
                region=named_region(path), source=sources.get(frame, ""), made=made,
                size=sum(a.padded for a in made), far=sum(a.padded for a in made if a.far),
                calls=calls, body=body, again=int(limits[0]) if len(limits) == 1 else 1,
                inner=[parameters.get((calls, place)) for place in range(len(operands))])
            op.contents = operands[0].contents if opcode == "call-update" else [
                each for inner in body for each in inner.contents] if opcode in (
                    "fusion", "async-start", "call-start") else [op]
            computations[computation].append(op)
            if opcode == "parameter":
                parameters[computation, int(rest.split(")")[0])] = op
            for operand, inner in zip(operands, op.inner):
                operand.users.append((op, inner))
        elif line.endswith("{") and not line.startswith(("HloModule", " ")):
            computation = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            computations[computation] = []
    return computations


class Op(NamedTuple):
    """An operation of a compiled program, where its schedule has it. Times are those of the first
    trip of its loop, in seconds; None where the compiler's estimates are worth nothing."""
    name: str
    shape: str        # of its result
    region: str       # of the model, or None
    kind: str         # product, copy, elementwise; or of a collective, as in shard.comm_bytes
    source: str       # file, line and function
    read: int         # bytes, main memory
    written: int
    start: float
    end: float
    times: int        # how often a step runs it; 0: it stands around the loop of steps
    loop: str         # the computation that it stands in
    estimated: bool = True  # has the compiler an estimate of its cycles?
    sent: int = 0     # bytes that a device sends
    number: int = 0   # of arrays
    asynchronous: bool = False  # does anything run between its start and its done?
    waited: float = 0.0  # seconds in which nothing hides the transfer
    done: float = 0.0    # when what waits for it goes on


def link_seconds(kind, size, n, target):
    """str, bytes, int, Target -> seconds: of a collective among n devices, along the slice's axes,
    the last ones first. A microsecond a hop to the farthest device; an all-reduce goes there twice,
    a permute one. Bytes go both ways around a ring, or over two axes; else, as a permute's, one."""
    far, ways, left = 0, 0, n
    for length in reversed(target.torus or (target.wraps,)):
        along = math.gcd(length, left)
        left //= along
        rings = along >= target.wraps
        far += along // 2 if rings else along - 1
        ways += (1 + rings) * (along > 1)
    far, ways = {"permute": (1, 1), "all_reduce": (2 * far, ways)}.get(kind, (far, ways))
    return far * HOP_SECONDS + size / (target.link / 2 * min(2, max(1, ways)))


def operations(text, job=None, target=None):
    """str, Job, Target -> list of Op: a compiled program's, in the order of its schedule. Whatever
    the bench says of a compiled program is a sum over them. `target` is given where its compiler's
    cycles can be used. A transfer delays only what waits for it. A generate step is a trip of the
    outermost loop."""
    computations, ops, free = parse_program(text), [], {}  # until when a route is taken
    entry, told = list(computations)[-1], re.match(r".*num_partitions=(\d+)", text)
    loops = [op for op in computations[entry] if op.opcode == "while"]
    stepped = max(loops, key=lambda op: len(op.body), default=None) \
        if job and job.phase in ("generate", "speculate") else None

    def end_transfer(at, t):  # -> when what waits for it goes on
        done = max(t, ops[at].end)
        ops[at] = ops[at]._replace(waited=done - t, done=done, asynchronous=any(
            not op.number for op in ops[at + 1:]))
        return done

    def walk(computation, t, times):  # -> when it ends
        started = {}  # a transfer's place in ops, by its key
        for op in computations[computation]:
            if op.opcode in SCHEDULED and op.body:
                again, often = (0, 1) if op is stepped else (op.again, op.again * times)
                t += (walk(op.calls, t, often) - t) * again
            if op.opcode in UNSEEN or (  # a call may wait for call-update, with its data
                    op.opcode == "call-start" and op.shape.startswith("((), ")):
                continue
            link = op.transfer(int(told[1]) if told else 1, target)
            if link and link.stage == "done":
                t = end_transfer(started[link.key], t) if link.key in started else t
                continue
            (region, source), (read, written) = op.origin(), op.moved()
            took, known = (link.seconds, True) if link else op.seconds(read + written, target)
            start = max(t, free.get(link.route, t)) if link and link.stage == "start" else t
            ops.append(Op(op.name, op.shape, region, link.kind if link else op.work(), source,
                          read, written, start, start + took, times, computation, known,
                          *(link.sent, link.number) if link else ()))
            if link is None:
                t = start + took
                continue
            free[link.route] = start + took
            if link.stage == "start":
                started[link.key] = len(ops) - 1
            else:
                t = end_transfer(len(ops) - 1, t)
        return t

    walk(entry, 0.0, 0 if stepped else 1)
    return ops


def collectives(ops):
    """list of Op -> dict: of a step, by kind: number, bytes sent, how many are asynchronous."""
    found = {}
    for op in ops:
        if op.number and op.times:
            kind = found.setdefault(op.kind, {"number": 0, "bytes": 0, "asynchronous": 0})
            kind["number"] += op.number * op.times
            kind["bytes"] += op.sent * op.times
            kind["asynchronous"] += op.number * op.times * op.asynchronous
    return found


def by_region(spans):
    """list of (region or None, seconds) -> dict: their sums, where there is one."""
    found = {}
    for region, took in spans:
        found[region or "?"] = found.get(region or "?", 0.0) + took
    return {region: took for region, took in found.items() if took}


def step_seconds(ops, read):
    """list of Op, bytes/s -> dict: seconds of a step in all and by region, and the share of those
    operations for which the compiler gives no cycles. What transfers make wait is a region of its
    own, and so is what memory takes beyond the schedule: a prefetch that nothing hides."""
    regions = by_region(("transfers", op.waited * op.times) if op.number else
                        (op.region, (op.end - op.start) * op.times) for op in ops)
    total = sum(regions.values())
    memory = sum((op.read + op.written) * op.times for op in ops) / read
    if memory > total:
        regions["memory"] = memory - total
    blind = sum((op.end - op.start) * op.times for op in ops if not op.estimated)
    return {"compiler_seconds": max(total, memory),
            "unestimated": blind / (max(total, memory) or 1), "regions": regions}


def beside(ops):
    """list of Op -> dict: by region, seconds of a step that run between the start and the done of
    an asynchronous transfer."""
    spans = [(op.loop, op.start, op.done) for op in ops if op.asynchronous and op.times]
    return by_region((op.region, (op.end - op.start) * op.times) for op in ops
                     if not op.number and op.end > op.start and any(
                         loop == op.loop and start <= op.start and op.end <= done
                         for loop, start, done in spans))


def copied(ops, arguments):
    """list of Op, dict -> int: bytes of arrays alike one of a program's arguments of two dimensions
    or more, a weight or a cache, that a step copies from memory to memory."""
    def alike(shape):  # dtype and sizes of the first array, whatever their order and layout
        dtype, sizes = re.search(r"(\w+)\[([\d,]*)\]", shape).groups()
        return dtype, *sorted(size for size in sizes.split(",") if size != "1")

    held = {kind for kind in map(alike, arguments.values()) if len(kind) > 2}
    return sum(op.written * op.times for op in ops if op.kind == "copy" and op.read and op.written
               and alike(op.shape) in held and op.written >= arrays(op.shape)[0].padded)


# ------------------------------------------------------------------------------------------ profile


def trace(call, folder):
    """call, path -> wall seconds, list of (start, end, operation). Leaves a trace in the folder
    that Perfetto and XProf show."""
    options, spans = jax.profiler.ProfileOptions(), []
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
        start = time.perf_counter()
        call()
        wall = time.perf_counter() - start
    file = max(pathlib.Path(folder).glob("**/*.xplane.pb"), key=os.path.getmtime)
    with warnings.catch_warnings():  # newer Pythons: builtin type event_stats has no __module__
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for row, event in ((row, event) for row in plane.lines for event in row.events):
                name = dict(event.stats).get("hlo_op")
                if name is None and row.name == "XLA Ops":  # a TPU's
                    name = event.name.split(" = ")[0].lstrip("%")
                if name is not None:
                    spans.append((event.start_ns / 1e9, event.end_ns / 1e9, name))
    return wall, spans


def profile(prepared, folder=None):
    """what `prepare` gives -> dict: operations by time, shares of kinds and regions: of the time
    that all took, which on a CPU overlap. "between" is the share of the wall time when none ran."""
    with tempfile.TemporaryDirectory() as temporary:
        wall, spans = trace(prepared.call, folder or temporary)
    where = {op.name: (op.region, op.kind, op.source) for op in prepared.ops}
    groups, busy, until = {}, 0, 0
    for start, end, name in sorted(span for span in spans if span[2] in where):
        groups.setdefault(where[name], []).append(end - start)
        busy += max(0, end - max(start, until))
        until = max(until, end)
    total = sum(map(sum, groups.values())) or 1
    found, regions = [], dict.fromkeys((*REGIONS, "?"), 0)
    kinds = dict.fromkeys(("weights", "attention", "elementwise", "copies"), 0)
    for (region, kind, source), took in sorted(groups.items(), key=lambda item: -sum(item[1])):
        share = sum(took) / total
        found.append(dict(share=share, times=len(took), region=region, kind=kind, source=source))
        kinds["attention" if region == "attention" else
              {"product": "weights", "copy": "copies"}.get(kind, kind)] += share
        regions[region or "?"] += share
    return {"operations": found, "kinds": kinds, "wall_seconds": wall,
            "regions": {name: share for name, share in regions.items() if share},
            "between": max(0, 1 - busy / wall)}


def print_profile(row, found, most=8):
    """A row, its profile -> the top operations, and one sentence made from them."""
    name, shares = f"{row['phase']} {row['dtype']} B={row['B']}", found["kinds"]
    print(f"\n{name}: share of the operations' time, times, region, kind, source")
    for op in found["operations"][:most]:
        print("  {share:6.1%}  x{times:<5} {region:10} {kind:12} {source}".format_map(
            op | {"region": op["region"] or "?"}))
    print("  regions: " + ", ".join(f"{region} {share:.1%}"
                                    for region, share in found["regions"].items()))
    print(f"{name} takes {row['ratio']:.2f} times what was predicted: of the operations' time "
          f"{shares['weights']:.0%} is the weights' products,\n  {shares['attention']:.0%} "
          f"attention, {shares['elementwise']:.0%} elementwise work, "
          f"{shares['copies']:.0%} copies; for {found['between']:.0%} of the wall time none ran")
    for part in row["parts"]:
        if part["name"] in shares:
            print(f"  {part['name']}: predicted {si(part['seconds'], 's')}, took about "
                  + si(shares[part["name"]] * row["measured_seconds"], "s"))


# ------------------------------------------------------------------------------ measure and compare


def read_by_all(job, cost):
    """Job, Cost -> Cost: what all devices of a mesh read together: weights as often as devices hold
    them, and in training all that each gathers. As such they count once a copy of the model."""
    if not job.mesh or job.phase in PRODUCTS:
        return cost
    mesh = shard.abstract_mesh(**dict(job.mesh))
    axes = shard.axes_of(mesh, "tensor")
    copies = mesh.size // shard.size_over(mesh, axes)
    moved, held = cost.weight_bytes * copies, cost.weight_bytes
    if job.phase != "train":
        held *= copies
        rules, cfg = where_of(job, mesh).rules, job.cfg
        if job.phase == "prefill" and shard.LAYOUTS[job.layout].by_token:  # gathered over the last
            rules = {letter: axes[:-1] for letter in rules}
        moved = sum(array_bytes(name, cfg, job.dtype) * mesh.size // math.prod(
            mesh.shape[axis] for axes in shard.spec(name, cfg, mesh, rules)
            for axis in shard.as_axes(axes)) for name in jax.tree.leaves(read_arrays(cfg)))
    first, *others = cost.parts
    return cost._replace(weight_bytes=held, parts=(first._replace(bytes=moved), *others))


def predicted_row(job, ceilings):
    """Job, dict -> dict: the half of a row that is known before anything runs."""
    cost = read_by_all(job, PHASES[job.phase].cost(job))
    return {"phase": job.phase, "model": job.model, "K": job.cfg.K, "dtype": job.dtype,
            "products": products_in(job), **({"int8": job.int8} if job.dtype == "int8" else {}),
            "cache_dtype": job.cache_dtype, "B": job.B, "T": cost.T, "S": cost.S,
            "tokens": cost.tokens, "flops": sum(cost.flops.values()),
            "weight_bytes": cost.weight_bytes, "cache_bytes": cost.cache_bytes,
            **predict(cost, ceilings)}


def measured_row(row, times, ceilings):
    """dict, list of seconds, dict -> dict: the whole row. Nothing runs faster than the machine can:
    a utilisation above 1 is None, and an error."""
    seconds, (low, high) = statistics.median(times), np.quantile(times, (0.1, 0.9)).tolist()
    row = row | {"measured_seconds": seconds, "p10_seconds": low, "p90_seconds": high,
                 "runs": len(times), "ratio": seconds / row["predicted_seconds"],
                 "tokens_per_second": row["tokens"] / seconds, "errors": [], "notes": [],
                 "tokens_per_second_per_sequence": row["tokens"] / seconds / row["B"]}
    for name, done, ceiling in (
            ("mfu", row["flops"], ceilings["flops_per_second"][row["products"]]),
            ("mbu", row["weight_bytes"] + row["cache_bytes"], ceilings["read_bytes_per_second"])):
        share = done / seconds / ceiling
        row[name] = share if share <= 1 else None
        if share > 1:
            row["errors"].append(
                f"{name.upper()} would be {share:.0%}: the ceiling was measured too low (was "
                "another program running?) or what is read stays in a cache: take a larger model, "
                "and measure again alone")
    if high - low > 0.25 * seconds:
        row["notes"].append(f"runs spread by {(high - low) / seconds:.0%} of their median "
                            f"({len(times)} runs, p10 to p90): measure again on a calm machine")
    return row


def measure(job, params, ceilings, seed, folder=None):
    """Job, Params, dict, int -> dict: one row, predicted first, then compiled, then measured."""
    row = predicted_row(job, ceilings)
    say(f"{job.phase} {job.dtype} B={job.B}: predicted {si(row['predicted_seconds'], 's')}", end="")
    prepared = prepare(job, params, seed, traced=bool(folder))
    told = PHASES[job.phase].tell(job, prepared.call())
    times = [seconds / told["steps"] for seconds in seconds_of(prepared.call)]
    row = measured_row(row | prepared.row | told, times, ceilings)
    say(f", measured {si(row['measured_seconds'], 's')}")
    if folder:
        folder = pathlib.Path(folder) / f"{job.phase}-{job.dtype}-{job.cache_dtype}-{job.B}"
        if prepared.ops:
            row["profile"] = profile(prepared, folder)
        else:
            trace(prepared.call, folder)
    return row


RUN = (  # the table of a run
    Column("phase", -9, "phase"), Column("dtype", -8, "dtype"),
    Column("cache", -8, lambda r: "-" if r["phase"] == "train" else r["cache_dtype"]),
    Column("B", 3, "B", "d"), Column("T/S", 7, lambda r: f"{r['T']}/{r['S']}"),
    Column("FLOP", 6, "flops", " "), Column("weights", 7, "weight_bytes", "B", True),
    Column("cached", 7, "cache_bytes", "B", True),
    Column("bytes", 7, lambda r: r["weight_bytes"] + r["cache_bytes"], "B"),
    Column("predict", 7, "predicted_seconds", "s"), Column("bound", 5, "bound"),
    Column("program", 7, lambda r: r["program_flops"] / r["steps"] if r.get("program_flops")
           else "-", " ", True),
    *(Column(name, 8, f"{name}_bytes", "B", True)
      for name in ("argument", "alias", "temp", "peak")),
    Column("coll.", 5, lambda r: sum(c["number"] for c in r["collectives"].values())
           if "collectives" in r else "-", "d", True),
    Column("compile", 7, "compile_seconds", "s", True), Column("took", 7, "measured_seconds", "s"),
    Column("p10", 7, "p10_seconds", "s", True), Column("p90", 7, "p90_seconds", "s", True),
    Column("MFU", 4, "mfu", ".0%"), Column("MBU", 4, "mbu", ".0%"),
    Column("tok/s/row", 9, "tokens_per_second_per_sequence", " ", True),
    Column("tok/s", 6, "tokens_per_second", " "), Column("ratio", 5, "ratio", ".2f"))


def print_limits(limits):
    """What the machine can do, and what its sheet says where it is a chip that we know."""
    for word, found in (("ceilings", limits), ("its sheet", limits.get("sheet"))):
        if found:
            print(f"{word}: " + ", ".join(f"{dtype} {peak / GB:.0f} GFLOP/s" for dtype, peak in
                                          found["flops_per_second"].items())
                  + f", reading {found['read_bytes_per_second'] / GB:.1f} GB/s")


def speedups(rows):
    """list of rows -> list of dict: each speculation beside the generating that it replaces."""
    found = []
    for row in rows:
        plain = [r for r in rows if r["phase"] == "generate" and all(
            r[key] == row[key] for key in ("model", "K", "dtype", "cache_dtype", "B"))]
        if row["phase"] == "speculate" and plain:
            a_round, step = row["tokens_per_round"], plain[0]
            found.append({
                "dtype": row["dtype"], "B": row["B"], "n_draft": row["T"] - 1,
                "acceptance": row["acceptance"], "tokens_per_round": a_round,
                "predicted_speedup": a_round * step["predicted_seconds"] / row["predicted_seconds"],
                "measured_speedup": row["tokens_per_second"] / step["tokens_per_second"]})
    return found


def report(args, rows, limits, **more):
    """Prints the table, its notes and errors, the roofline, what speculation gave, profiles, and
    the JSON object."""
    print_limits(limits)
    gained = speedups(rows)
    if rows:
        print("predicted from the shapes (bytes: weights and cache), then measured; ratio: measured"
              " over predicted.\nA step of generate makes a token a row; one of speculate is a "
              "round; --wide shows what was compiled, and the spread")
        print_table([column for column in RUN if args.wide or not column.wide], rows)
    for row in rows:
        for word, texts in (("error", row["errors"]), ("noise", row["notes"])):
            for text in texts:
                print(f"{word}: {row['phase']} {row['dtype']} B={row['B']}: {text}")
    if rows:
        print("\n" + picture(rows, limits))
    for s in gained:
        print(f"speculation {s['dtype']} B={s['B']}: of {s['n_draft']} proposals "
              f"{s['acceptance']:.0%} accepted, {s['tokens_per_round']:.2f} tokens a round; "
              f"speed-up {s['predicted_speedup']:.2f} predicted, {s['measured_speedup']:.2f} "
              "measured")
    for row in rows:
        if "profile" in row:
            print_profile(row, row["profile"])
    if args.plot and rows:
        plot(rows, limits, args.plot)
        print(f"roofline: {args.plot}")
    finish(args, machine=machine(), ceilings=limits, rows=rows, speculation=gained, **more)


def print_attention(job):
    """The share of attention in the flops, and where it would be half."""
    for name, letter, flops, size, equal in zip(
            ("a causal pass", "a generate step"), "TS",
            (prefill_flops(job.cfg, 1, job.prompt), decode_flops(job.cfg, 1, job.prompt + job.new)),
            (job.prompt, job.prompt + job.new), crossover(job.cfg)):
        share = (flops["scores"] + flops["values"]) / sum(flops.values())
        print(f"attention is {share:.1%} of the flops of {name} at {letter} = {size}, "
              f"and as much as the weights' at {letter} = {equal}")


def print_split(job, ways=4):
    """Job, int -> list of dict: prints what tensor parallelism over so many devices would send, by
    formula and counted in the jaxpr, which needs no device; nothing where it cannot be split so."""
    found = []
    for phase, T in (("prefill", job.prompt), ("generate", 1)):
        own = job._replace(phase=phase, new=1, mesh=(("tensor", ways),))
        try:
            formula, program = shard.tally(sent(own)), shard.tally(counted(own, own.cfg.L))
        except ValueError as error:
            print(f"tensor parallel over {ways}: {error}")
            return []
        found.append({"form": phase, "devices": ways, "B": job.B, "T": T, **{
            f"{name}_{what}": sum(pair[i] for pair in told.values())
            for name, told in (("predicted", formula), ("counted", program))
            for i, what in enumerate(("collectives", "bytes"))}})
        f = found[-1]
        print(f"tensor parallel over {ways} devices, {phase} of B={f['B']} T={T}: each sends "
              f"{f['predicted_bytes']:,} bytes in {f['predicted_collectives']} collectives by "
              f"formula,\n  {f['counted_bytes']:,} in {f['counted_collectives']} in the program")
    return found


# --------------------------------------------------------------------- compiled for chips not here


class Target(NamedTuple):
    """What a chip's compiler is asked for, and how its cycles become seconds."""
    extra: str     # that installs the compiler
    name: str      # of the chip, to its compiler
    slices: str    # shapes that exist
    clock: float   # cycles/s; 0 where its estimates are worth nothing
    flops: float   # flops/s of a large bf16 product, by its cycles
    read: float = 0.0  # bytes/s, from the sheet
    link: float = 0.0
    devices: int = 1  # that JAX sees, a chip
    wraps: int = 4    # the size from which an axis of a slice is a ring
    torus: tuple = ()  # the slice's own


TORUS, PLANE = "2x2x1 2x2x2 2x2x4 4x4x4 4x4x8", "2x2 2x4 4x4 4x8 8x8"
HOSTS = "1x1x1 1x1x2 1x1x4 1x1x8 1x2x8 1x4x8 1x8x8"  # partitions, hosts, GPUs a host
GPU = """gpu_device_info {{ core_count: {} fpus_per_core: {} shared_memory_per_core: {}
    shared_memory_per_block_optin: {} memory_bandwidth: {} l2_cache_size: {} clock_rate_ghz: {}
    device_memory_size: {} cuda_compute_capability {{ major: {} {} }}
    threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
    shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
    runtime_version {{ major: 12 minor: 9 }} device_description_str: "{}" """
FAST = "feature_extension: ACCELERATED_FEATURES"
GPUS = {  # what stands in it: openxla/xla, xla/backends/gpu/target_config/specs
    "a100": (108, 64, 167936, 166912, 2039040000000, 41943040, 1.41, 85100068864, 8, ""),
    "h100": (132, 128, 233472, 232448, 3352320000000, 52428800, 1.98, 84942979072, 9, FAST),
    "h200": (132, 128, 233472, 232448, 4800000000000, 52428800, 1.98, 151397597184, 9, FAST),
    "b200": (148, 128, 233472, 232448, 7672320000000, 132644864, 1.965, 191514411008, 10, FAST)}
TARGETS = {  # clocks: the sheet's peak over what the matrix units multiply a cycle; flops: 8192^3
    # in bf16 over the cycles that the compiler gives it
    "tpu-v4": Target("tpu", "v4", TORUS, 1.05e9, 1.05e9 * 239e3),
    "tpu-v5e": Target("tpu", "v5e", PLANE + " 16x16", 1.5e9, 1.5e9 * 115e3, wraps=16),
    "tpu-v5p": Target("tpu", "v5p", TORUS, 1.75e9, 1.75e9 * 236e3),
    "tpu-v6e": Target("tpu", "v6e", PLANE, 1.75e9, 1.75e9 * 352e3, wraps=16),
    "tpu-v7x": Target("tpu", "tpu7x", TORUS, 2.2e9, 2.2e9 * 403e3, devices=2),
    **{name: Target("gpu", name, HOSTS, 0.0, 0.0) for name in GPUS}}
EXTRAS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}  # and the module that each brings
FLAGS = dict.fromkeys(  # the lecture's, for collectives beside products on a TPU
    """xla_enable_async_all_gather xla_enable_async_collective_permute
    xla_tpu_enable_async_collective_fusion xla_tpu_enable_async_collective_fusion_fuse_all_gather
    xla_tpu_overlap_compute_collective_tc""".split(), "true")
COMPILERS = {  # what their process needs to know of the machine that is not here
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def slice_of(name, chips):
    """str, int -> str: the slice of so many chips; 1 is one of the smallest. ValueError for a chip
    that no compiler is known for, and where there is no slice, naming the nearest."""
    if name not in TARGETS:
        raise ValueError(f"chip {name!r} has no compiler here: one of " + ", ".join(TARGETS))
    sizes = {chips_of(shape): shape for shape in TARGETS[name].slices.split()}
    if chips in (1, *sizes):
        return sizes[max(chips, min(sizes))]
    near = ([n for n in sizes if n < chips] or [1])[-1:] + [n for n in sizes if n > chips][:1]
    raise ValueError(f"{name} has no slice of {chips} chips: --chips "
                     + " or ".join(f"{n} ({sizes[n]})" if n in sizes else f"{n}" for n in near))


def check_compiler(name):
    """str -> None: ValueError unless its compiler is here."""
    slice_of(name, 1)  # of an unknown chip there is none
    extra, here = TARGETS[name].extra, (sys.platform, platform.machine()) == ("linux", "x86_64")
    if not here or importlib.util.find_spec(EXTRAS[extra]) is None:
        raise ValueError(f'{name} needs its compiler, the extra {extra}: pip install ".[{extra}]"'
                         + ", on Linux and x86-64" * (not here))


def torus_axes(shape, tensor):
    """str, int -> int or tuple: the axes of a slice that are left to data, where tensor takes the
    last ones. ValueError where it cannot."""
    left = []
    for size in map(int, reversed(shape.split("x"))):
        taken = math.gcd(size, tensor)
        tensor, left = tensor // taken, [size // taken] * (size > taken) + left
    if tensor > 1:
        raise ValueError(f"a slice of {shape} has no part of {tensor} more devices for tensor")
    return tuple(left) if len(left) > 1 else math.prod(left)


def on_chips(job, name, chips, mesh=None, layout=None):
    """Job, str, int, dict, str -> Job: as it is split over that slice. ValueError where it is not.
    Left out, training is FSDP over all of it, and all else tensor parallel (`over_heads`), its
    cache split over heads if they divide, else rows, else slots."""
    shape, each, train = slice_of(name, chips), TARGETS[name].devices, job.phase == "train"
    n, alone = chips * each, train and job.by == "compiler"
    mesh = mesh or ({"data": n} if train else {"tensor": over_heads(job.cfg, n)})
    known, ways = ["data", *["context"] * train, "tensor"], mesh.get("tensor", 1)
    data, context, tensor = (math.prod(shard.as_axes(mesh.get(axis, 1)))
                             for axis in ("data", "context", "tensor"))
    others = context * tensor
    if unknown := ", ".join(set(mesh) - {*known}):
        raise ValueError(f"--mesh {unknown}: {job.phase} takes {' and '.join(known)}")
    if data * others != n:
        raise ValueError(f"a mesh of {mesh} on {chips} x {name}: {n} devices in all, not "
                         f"{data * others}")
    for wrong, why in (
            (job.prompt % context, f"--prompt {job.prompt} tokens over {context} devices of "
             f"context: --prompt {-(-job.prompt // context) * context}"),
            (train and job.B % data, f"B={job.B} rows over {data} devices of data: --batch "
             f"{-(-job.B // data) * data}"),
            (alone and others > 1, f"B={job.B} rows over {data} devices of data and {others} "
             "others: by the compiler training is split over data alone"),
            (job.ring and tensor == 1, f"ring={job.ring} on a mesh of {mesh}: rings go around an "
             "axis tensor of two or more")):
        if wrong:
            raise ValueError(why)
    job = job._replace(chip=name, chips=chips)
    if n == 1:
        return job
    axes = (("data", torus_axes(f"{shape}x{each}", others), train or data > 1),
            ("context", context, context > 1), ("tensor", ways, not alone))
    job = job._replace(mesh=tuple((axis, size) for axis, size, used in axes if used))
    if train or job.phase in PRODUCTS:
        return job
    *first, last = shard.as_axes(ways)
    heads, rows = job.cfg.K // math.prod(first), job.B // data  # to be split over the last axis
    fit = ["heads"] * (heads % last == 0) + ["batch"] * (rows % last == 0) + ["sequence", "context"]
    if layout not in (None, *fit):
        raise ValueError(f"layout {layout!r} does not divide over {tensor} devices of tensor with "
                         f"K={job.cfg.K} and B={rows} rows a copy: --layout " + " or ".join(fit))
    return job._replace(layout=layout or fit[0])


def compiled_with(lowered, flags):
    """Lowered, dict -> Compiled or None, and for its row: the flags that this compiler took, or
    what the program needs that does not fit."""
    try:
        return lowered.compile(compiler_options=flags or None), {"flags": list(flags)}
    except Exception as error:
        said, size = str(error), r"\((\d[\d.]*)([KMGT])\)"
        # from 0.0.50 on libtpu fuses gathers with products on v5e alone, and names wrong results
        kept = {name: on for name, on in flags.items() if "fuse_all_gather" not in name}
        if kept != flags and "AllGather is enabled on platform" in said:
            return compiled_with(lowered, kept)
        if not (found := re.search(f"{size} exceeds available HBM {size}", said)):
            raise
        needed, granted = (int(float(found[i]) * 1024 ** "BKMGT".index(found[i + 1]))
                           for i in (1, 3))
        return None, {"message": said.splitlines()[0], "needed_bytes": needed,
                      "memory_bytes": granted}


@lru_cache
def devices_of(name, chips):
    """str, int -> devices, and for a row: their compiler, and what it grants a program, as it says
    when it refuses one of 4 TiB. In the compilers' own process."""
    from jax.experimental.topologies import get_topology_desc
    target, shape = TARGETS[name], slice_of(name, chips)
    package = EXTRAS[target.extra].replace("_", "-")
    told = {"compiler": f"{package} {version(package)}", "jax": jax.__version__}
    if target.extra == "gpu":
        text = GPU.format(*GPUS[name], name)
        devices = get_topology_desc(name, "cuda", topology=shape, target_config=text).devices
        return devices, told | {"memory_bytes": GPUS[name][7]}
    megacore = {"chip_config_name": "megacore"} if name in ("tpu-v4", "tpu-v5p") else {}
    devices = get_topology_desc(f"{target.name}:{shape}", "tpu", **megacore).devices
    where = jax.sharding.SingleDeviceSharding(devices[0])
    large = jax.ShapeDtypeStruct((1 << 40,), jnp.float32, sharding=where)
    _, refusal = compiled_with(jax.jit(lambda x: x + 1).lower(large), {})
    return devices[:chips * target.devices], told | {"memory_bytes": refusal["memory_bytes"]}


def held_by(args):
    """arguments -> dict, list: bytes of each kind on a device; the largest arrays of all layers."""
    held, sizes = {"weights": 0, "cache": 0, "optimizer": 0}, {}
    for arg in args:
        kind = dict(zip((Params, Cache, Adam), held)).get(type(arg), "inputs")
        for path, a in jax.tree.leaves_with_path(arg):
            name = kind + re.sub(r"\d", "", jax.tree_util.keystr(path))
            size = math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
            sizes[name] = sizes.get(name, 0) + size
            if kind in held and name not in ("cache.length", "optimizer.step"):
                held[kind] += size
    return held, listed(sizes, "B", most=3).split(", ")


def compile_job(job):
    """Job -> dict: the program half of its row, by the chip's compiler. In its own process."""
    target, chip = TARGETS[job.chip], CHIPS[job.chip]
    target = target._replace(read=chip.read / target.devices, link=chip.link / target.devices,
                             torus=tuple(map(int, slice_of(job.chip, job.chips).split("x"))))
    devices, told = devices_of(job.chip, job.chips)
    mesh = mesh_of(job, devices)
    step, make, donated, _ = PHASES[job.phase].build(job, mesh)
    args = jax.eval_shape(make, abstract(job), jax.random.key(0))
    shards = placed(job, mesh, args) if mesh else jax.sharding.SingleDeviceSharding(devices[0])
    args = jax.tree.map(lambda where, part: jax.tree.map(  # one stands for all that is in its place
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), part), shards, args)
    held, largest = held_by(args)
    row = told | {"formula_bytes": sum(held.values()), "formula": held, "largest": largest,
                  "fits": False, "message": None, "flags": [], "schedule": [], **dict.fromkeys((
                      "argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "peak_bytes",
                      "collectives", "compiler_seconds", "regions", "copies", "program_flops",
                      "padding", "unestimated", "hbm_bytes", "beside"))}
    start, lowered = time.perf_counter(), jax.jit(step, donate_argnums=donated).lower(*args)
    compiled, told = compiled_with(lowered, FLAGS if job.flags else {})
    row |= told
    if compiled is None:
        return row
    text = compiled.as_text()
    ops, (*_, entry) = operations(text, job, target if target.clock else None), parse_program(
        text).values()
    left = {(re.search(r'op_name="([^"]*)"', op.line) or ("", op.name))[1]: op.shape
            for op in entry if op.opcode == "parameter"}  # of the arguments
    row |= program(step, args, compiled) | {
        "compile_seconds": time.perf_counter() - start,
        "inputs": sum(a.bytes for name, shape in left.items() for a in arrays(shape)
                      if not re.match(r"params\b|adam\.[mv]\b|cache\.[kv]\b", name)),
        "padding": {name: more for name, shape in left.items()
                    if (more := sum(a.padded - a.bytes for a in arrays(shape)))},
        "collectives": collectives(ops), "copies": copied(ops, left), "schedule": ops,
        "hbm_bytes": sum((op.read + op.written) * op.times for op in ops),
        **(step_seconds(ops, target.read) | {"beside": beside(ops)} if target.clock else {})}
    if row["program_flops"]:  # of a step; in a shard_map each device's part
        row["program_flops"] *= mesh.size if mesh and job.by == "hand" else 1
        row["program_flops"] //= job.new if job.phase == "generate" else 1
    return row | {"fits": target.extra == "tpu" or row["peak_bytes"] <= row["memory_bytes"]}


def compiler_process():
    """Answers jobs, pickled one after another into stdin, into what was stdout."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # compilers print
    while sys.stdin.buffer.peek(1):
        try:
            answer = compile_job(pickle.load(sys.stdin.buffer))
        except Exception as error:  # whatever it is, it is the answer
            answer = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        pickle.dump(answer, answers)
        answers.flush()


@contextlib.contextmanager
def compilers():
    """-> ask(job) -> the program half of its row: by a process that has what the chips' compilers
    need in its environment. ValueError with the compiler's own message where it fails."""
    env = {**os.environ, **COMPILERS, "PYTHONPATH": str(pathlib.Path(__file__).resolve().parent)}
    code = "from bench import *; compiler_process()"  # a script's __main__.Job is known there too
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors) as process:
        def ask(job):
            try:
                os.write(process.stdin.fileno(), pickle.dumps(job))
                answer = pickle.load(process.stdout)
            except (BrokenPipeError, EOFError):
                errors.seek(0)
                said = re.search(r"^(?:F\d{4}|\w*Error).*", errors.read(), re.M) or ["no message"]
                raise ValueError(f"{job.chip}: its compiler ended: {said[0].strip()}") from None
            if isinstance(answer, str):
                raise ValueError(f"{job.chip}: its compiler: {answer}")
            return answer

        try:
            yield ask
        finally:
            process.kill()


def chip_row(job, ask):
    """Job, ask -> dict: predicted from the sheet, then compiled; nothing is measured. Its flops are
    without what is computed again, and of a causal pass those of pairs at or below the diagonal."""
    chip, cost, T = CHIPS[job.chip], PHASES[job.phase].cost(job), job.prompt
    flops, where = dict(cost.flops), f"{TARGETS[job.chip].name} {slice_of(job.chip, job.chips)}"
    if job.phase in ("train", "prefill"):
        flops["scores"] = flops["values"] = flops["values"] * (T * (T + 1) // 2) // causal_pairs(T)
    mesh = {axis: math.prod(shard.as_axes(n)) if axis == "data" else n for axis, n in job.mesh}
    row = predicted_row(job, sheet(chip, job.chips)) | on_links(job, chip.link / 2) | {
        "form": form_name(job), "flops": sum(flops.values()), "chip": job.chip, "chips": job.chips,
        "mesh": mesh, "layout": job.layout, "ring": job.ring, "by": job.by,
        "slice": "one of " * (job.chips == 1) + where,
        **({"keep": job.keep} if job.phase == "train" and mesh and job.by == "hand" else {})}
    say(f"{row['form']} {job.dtype} B={job.B} on {row['slice']}: predicted "
        f"{si(row['predicted_seconds'], 's')}, compiling ...")
    row |= ask(job)
    if took := row["compiler_seconds"]:
        moved, peak = row["weight_bytes"] + row["cache_bytes"], chip.flops[cost.parts[0].dtype]
        row |= {"mfu": row["flops"] / took / (job.chips * peak),
                "mbu": moved / took / (job.chips * chip.read)}
    return row


def form_name(job):
    """Job -> str: of one way to run a phase."""
    over = f" over {job.layout}" if job.mesh and job.phase not in ("train", *PRODUCTS) else ""
    by = (", by hand" if job.by == "hand" else ", by the compiler") * (job.phase == "train")
    ring = ("", " ring", " ring both ways")[job.ring]
    return job.phase + by + over + ring + " with flags" * job.flags


def listed(parts, unit, least=0.0, most=None):
    """dict, str -> str: the largest first, without what is no more than that share of all."""
    first, least = sorted(parts, key=parts.get, reverse=True)[:most], least * sum(parts.values())
    return ", ".join(f"{name} {si(parts[name], unit)}" for name in first if parts[name] > least)


def print_chip_row(row):
    """A row's lines: what was predicted, and what the compiler made of it."""
    units = {"bytes": "B", "inputs": "B", "copies": "B", "flops": "FLOP", "seconds": "s"}
    said = SimpleNamespace(**row | {
        name: si(n, units[kind]) for name, n in row.items()
        if n is not None and (kind := name.split("_")[-1]) in units})
    mesh = ", ".join(f"{axis} {n}" for axis, n in row["mesh"].items())
    formula = ", ".join(f"{kind} {si(n, 'B')}" for kind, n in row["formula"].items() if n)
    print(f"\n{said.form}: {said.model} in {said.dtype}"
          + f", cache {said.cache_dtype}" * (said.phase != "train")
          + f", B={said.B} T={said.T} S={said.S},\non {said.chips} x {said.chip} ({said.slice}"
          + f"; mesh {mesh}" * bool(mesh)
          + f"; keeps {', '.join(row.get('keep') or ['nothing'])}" * ("keep" in row) + ")")
    read, links = row["parts"][0]["bytes"], said.link_seconds or "the compiler's choice"
    often = f" (read {si(read, 'B')})" * (read > 1.01 * row["weight_bytes"])
    flags = ("; flags: " + ", ".join(said.flags)) * bool(said.flags)
    lines = {"predict": f"{said.flops}, weights {said.weight_bytes}{often}, cache "
             f"{said.cache_bytes}: {said.predicted_seconds} bound by {said.bound}; links {links}",
             "program": f"{said.compiler}, jax {said.jax}: not measured; bytes are of one device"
             + flags}
    if said.message:
        over = si(row["needed_bytes"] - row["memory_bytes"], "B")
        lines["REFUSED"] = f"{said.needed_bytes} needed, {said.memory_bytes} granted: {over} too " \
            f"much; arguments by formula: {formula}; largest: {', '.join(said.largest)}"
    else:
        padding = sum(said.padding.values())
        mbu = f", {said.mbu:.0%} MBU" * (said.phase not in ("train", "prefill")) \
            if said.compiler_seconds else ""
        lines |= {
            "arguments": f"{said.argument_bytes}: {formula}, inputs {said.inputs}, padding "
            + si(padding, "B") + f" ({listed(said.padding, 'B', most=2)})" * bool(padding),
            "memory": f"outputs {said.output_bytes}, in place {said.alias_bytes}, temporaries "
            f"{said.temp_bytes}, peak {said.peak_bytes} of {said.memory_bytes}: "
            + ("fits" if said.fits else "DOES NOT FIT"),
            "sends": ("; ".join(
                f"{c['number']} {kind} {si(c['bytes'], 'B')} ({c['asynchronous']} asynchronous)"
                for kind, c in said.collectives.items()) or "nothing") + ", a step",
            "beside": said.beside and "what is asynchronous runs: " + listed(
                said.beside, "s", 0.005),
            "copies": f"{said.copies} of arrays of a weight's or a cache's size, a step",
            "time": f"{said.compiler_seconds} by the compiler's cycles and bytes ("
            f"{said.unestimated:.1%} without an estimate), {said.mfu:.0%} MFU{mbu}: "
            + listed(said.regions, "s", 0.005) if said.compiler_seconds else
            "unknown: a GPU's compiler chooses products by timing them"}
    for label, text in lines.items():
        if text:
            print(textwrap.fill(f"  {label:9} {text}", 100, subsequent_indent=12 * " "))


def run_chips(args, jobs):
    """Prints each job's prediction and what the chip's compiler makes of it."""
    rows, name = [], jobs[0].chip
    check_compiler(name)
    with compilers() as ask:
        for job in jobs:
            try:
                rows.append(chip_row(job, ask))
            except ValueError as error:
                if args.phase != "shard":
                    raise
                say(f"{form_name(job)} cannot: {error}")
    print(f"{name} ({CHIPS[name].source}): nothing is measured;\npredict: from the sheet and the "
          "shapes; program: what the chip's own compiler made")
    for row in rows:
        print_chip_row(row)
    if args.timeline:
        draw_timeline(rows, args.timeline)
    finish(args, machine={"jax": jax.__version__, "python": platform.python_version()},
           ceilings=sheet(CHIPS[name], jobs[0].chips),
           rows=[{key: row[key] for key in row if key != "schedule"} for row in rows])


def one_layer(ops):
    """list of Op -> list of (heading, list of Op): a trip of each loop over layers, as training's
    forward and backward; or the middle layer, from its first product to the next's. What loops
    within a layer is one bar, of its longest operation's region."""
    loops = list(dict.fromkeys(op.loop for op in ops if op.times > 1 and op.region == "mlp"))
    trips = [list(trip) for _, trip in itertools.groupby(
        [op for op in ops if op.times], lambda op: op.loop)]
    step, loop = [], ""
    for trip, after in itertools.zip_longest(trips, trips[1:]):
        if trip[0].times == 1 or trip[0].loop in loops:
            step, loop = step + trip, trip[0].loop
        elif after and (after[0].loop == loop or after[0].loop not in loops):
            step.append(max(trip, key=lambda op: op.end - op.start)._replace(
                start=trip[0].start, end=after[0].start, done=after[0].start, number=0, loop=loop))
    if loops:
        names = ("a layer forwards", "a layer backwards") if len(loops) == 2 else [
            f"a trip of loop {i + 1}" for i in range(len(loops))]
        return [(name, [op for op in step if op.loop == loop]) for name, loop in zip(names, loops)]
    timed = [op for op in step if op.region in ("qkv", "mlp") and op.kind == "product"]
    begins = [b.start for a, b in itertools.pairwise(timed)
              if (a.region, b.region) == ("mlp", "qkv")]
    if len(begins) < 2:
        return [("a step", step)]
    first, last = begins[len(begins) // 2 - 1:len(begins) // 2 + 1]
    return [("a layer", [op for op in step if op.end > first and op.start < last])]


# ------------------------------------------------------------------------------------ the pictures


def points(rows):
    """list of rows -> list of (mark, dtype, flops a byte, flops a second)."""
    return [(PHASES[row["phase"]].mark, row["dtype"],
             row["flops"] / (row["weight_bytes"] + row["cache_bytes"]),
             row["flops"] / row["measured_seconds"]) for row in rows]


def frame(rows, limits):
    """list of rows, dict -> (x from, x to), (y from, y to): whole decades around points and
    corners."""
    peaks, read = limits["flops_per_second"].values(), limits["read_bytes_per_second"]
    xs = [x for _, _, x, _ in points(rows)] + [peak / read for peak in peaks]
    ys = [y for _, _, _, y in points(rows)] + list(peaks)
    return tuple((math.floor(math.log10(min(v))), math.ceil(math.log10(max(v)))) for v in (xs, ys))


def picture(rows, limits, width=72, height=18):
    """list of rows, dict -> str: the roofline in plain characters, both axes logarithmic."""
    (x0, x1), (y0, y1) = frame(rows, limits)
    grid = [[" "] * width for _ in range(height)]

    def put(x, y, mark):
        column = round((math.log10(x) - x0) / (x1 - x0) * (width - 1))
        line = round((math.log10(y) - y0) / (y1 - y0) * (height - 1))
        if 0 <= line < height:
            grid[height - 1 - line][column] = mark

    limits_of = dict(zip(limits["flops_per_second"], "-=~"))
    for dtype, peak in limits["flops_per_second"].items():
        for column in range(width):
            x = 10 ** (x0 + column / (width - 1) * (x1 - x0))
            slope = limits["read_bytes_per_second"] * x
            put(x, min(peak, slope), "/" if slope < peak else limits_of[dtype])
    for mark, _, x, y in points(rows):
        put(x, y, mark)
    labels = {0: f"1e{y1}", height - 1: f"1e{y0}"}
    marks = dict.fromkeys((PHASES[row["phase"]].mark, row["phase"]) for row in rows)
    return "\n".join([
        "flops/s over flops/byte; " + ", ".join(f"{mark} {name}" for mark, name in marks),
        "limits: / memory, " + ", ".join(f"{mark} {dtype}" for dtype, mark in limits_of.items()),
        *(f"{labels.get(i, ''):>5} |" + "".join(row).rstrip() for i, row in enumerate(grid)),
        "      +" + "-" * width, f"       1e{x0}" + f"1e{x1}".rjust(width - len(f"1e{x0}"))])


def pyplot():
    """-> matplotlib.pyplot, drawing into files: the same ones each time, their text as text."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError('a picture needs the extra plot: pip install ".[plot]"') from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "minillm", "svg.fonttype": "none"})
    from matplotlib import pyplot
    return pyplot


@contextlib.contextmanager
def figure(path, height, lines=1):
    """path, inches, int -> so many axes, as wide as a page; what is drawn on them is written at the
    end."""
    plt = pyplot()
    drawn, axes = plt.subplots(lines, figsize=(9, height), layout="constrained", squeeze=False)
    yield axes[:, 0]
    drawn.savefig(path, metadata={"Date": None} if str(path).endswith("svg") else None)
    plt.close(drawn)


def plot(rows, limits, path):
    """list of rows, dict, path -> None: the roofline as a PNG or SVG. Needs the extra `plot`."""
    read, (xs, _) = limits["read_bytes_per_second"], frame(rows, limits)
    with figure(path, height=5.5) as (axes,):
        for color, (dtype, peak) in zip(("C0", "C1", "C2"), limits["flops_per_second"].items()):
            x = np.logspace(*xs, 200)
            axes.loglog(x, np.minimum(peak, read * x), color=color, label=f"{dtype} limit")
            for name, phase in PHASES.items():
                own = [row for row in rows if (row["phase"], row["dtype"]) == (name, dtype)]
                if own:
                    _, _, x, y = zip(*points(own))
                    axes.scatter(x, y, marker=f"${phase.mark}$", s=70, color=color)
                    axes.scatter([], [], marker=f"${phase.mark}$", color="black",
                                 label=name if dtype == rows[0]["dtype"] else None)
        axes.set(xlabel="flops per byte of weights and cache", ylabel="flops per second",
                 title=f"{rows[0]['model']} on {machine()['device']}, {os.cpu_count()} cores, "
                 f"jax {jax.__version__}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")


def draw_timeline(rows, path):
    """list of rows, path -> None: one layer of each as scheduled: what computes on one track,
    transfers on another, from start to done."""
    colors, bands = {}, [(row, *layer) for row in rows if row["compiler_seconds"]
                         for layer in one_layer(row["schedule"])]
    if not bands:
        return say("--timeline has nothing to draw: no program fits")
    with figure(path, height=0.6 + 1.3 * len(bands), lines=len(bands)) as axes:
        for (row, heading, ops), axis in zip(bands, axes):
            zero, spans = min(op.start for op in ops), {}
            for op in ops:
                name, track = (op.kind, 0) if op.number else (op.region or "other", 1)
                color = colors.setdefault(name, f"C{len(colors) % 10}")
                for end, strength in ((op.end, 1.0), (op.done, 0.3)):  # till it is done
                    spans.setdefault((track, color, strength), []).append((op.start, end))
            for (track, color, strength), times in spans.items():
                axis.broken_barh([((start - zero) * 1e3, (end - start) * 1e3)
                                  for start, end in times if end > start], (track, 0.8),
                                 color=color, alpha=strength)
            axis.set(yticks=(0.4, 1.4), yticklabels=("transfers", "compute"))
            axis.set_title(f"{row['form']}, {heading}, in milliseconds (a step takes "
                           f"{si(row['compiler_seconds'], 's')}, of it "
                           f"{si(row['regions'].get('transfers', 0), 's')} waits for transfers)",
                           fontsize=9, loc="left")
        axis.figure.legend([pyplot().Rectangle((0, 0), 1, 1, color=color)
                            for color in colors.values()], list(colors),
                           loc="outside lower center", ncols=6, fontsize="small")
    print(f"timeline: {path}")


class Sketch(NamedTuple):
    """A picture of boxes, lines and words, of which the figures are the library's."""
    height: float      # inches; the width is a page's
    x: tuple           # from and to
    y: tuple
    boxes: list = []   # of (x, y, width, height, text, color, strength)
    notes: list = []   # of (x, y, text), from the left
    lines: list = []   # of (xs, ys, style)
    axes: dict = {}    # of a diagram: labels and scales


def render(sketch, path):
    """Sketch, path -> None."""
    with figure(path, sketch.height) as (axis,):
        for x, y, width, height, text, color, strength in sketch.boxes:
            axis.add_patch(pyplot().Rectangle((x, y), width, height, facecolor=color,
                                              edgecolor="white", alpha=strength))
            axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)
        for x, y, text in sketch.notes:
            axis.text(x, y, text, va="center", fontsize=9)
        for xs, ys, style in sketch.lines:
            axis.plot(xs, ys, style)
        axis.set(xlim=sketch.x, ylim=sketch.y, **sketch.axes)
        if not sketch.axes:
            axis.set_axis_off()


def lecture(phase="generate", B=110, chips=4):
    """str, int, int -> Job: the lecture's own, Gemma 7B on v4 chips, 2,048 tokens a row."""
    return on_chips(in_kind(Job(phase, "gemma-7b", MODELS["gemma-7b"], B, 2032, 16, chip="tpu-v4"),
                            "bfloat16"), "tpu-v4", chips)


def sketch_product():
    """One product forwards and its two backwards, with flops as counted in the program."""
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
    return Sketch(2.2, (-0.2, 26), (-2, 2), boxes, notes)


def sketch_phases():
    """A prefill and three generate steps over the cache of one sequence."""
    cfg, S = MODELS["gemma-7b"], 2048
    slot, full, weights = (*(kv_bytes(cfg, 1, n, "bfloat16") for n in (1, S)),
                           weight_bytes(cfg, "bfloat16"))
    told = [f"prefill of {S:,} tokens: reads {si(weights, 'B')} of weights once,\n"
            f"writes {S:,} slots, {si(full, 'B')}"] + [
        f"generate, token {i + 1}: reads {si(weights, 'B')} of weights and\n"
        f"{si(full, 'B')} of cache, writes a slot, {si(slot, 'B')}" if i == 0 else
        f"generate, token {i + 1}: the same, and one slot more" for i in range(3)]
    boxes = []
    for step, place in itertools.product(range(4), range(12)):
        first, last = 7 + step if step else 0, 7 + step  # of the slots that are written
        word, color = ("write", "C1") if first <= place <= last else ("read", "C0")
        filled = place <= last
        boxes.append((place, -step, 1, 0.8, word * filled, color, 0.4 if filled else 0.1))
    return Sketch(2.8, (0, 21), (-3.2, 1), boxes,
                  [(12.4, 0.4 - step, text) for step, text in enumerate(told)])


def sketch_memory(row):
    """row of `chip_row` -> where the memory of one of four chips goes, by its compiler."""
    parts = {"weights": row["formula"]["weights"], "cache": row["formula"]["cache"],
             "temporaries and inputs": row["peak_bytes"] - row["formula_bytes"],
             "free": row["memory_bytes"] - row["peak_bytes"]}
    boxes, notes, at = [], [], 0.0
    for i, (name, size) in enumerate(parts.items()):
        text = f"{name}\n{si(size, 'B')}"
        boxes.append((at, 0, size / GB, 1, text if size > 2 * GB else "", f"C{i}", 0.4))
        notes += [(at - 7, 1.3, text.replace("\n", " "))] * (size <= 2 * GB)
        at += size / GB
    return Sketch(1.4, (0, at), (0, 1.6), boxes, notes)


def sketch_roofline():
    """A generate step's two parts under the roof of four chips, at three batches."""
    limits, notes = sheet(CHIPS["tpu-v4"], 4), []
    peak, read = limits["flops_per_second"]["bfloat16"], limits["read_bytes_per_second"]
    xs = np.logspace(-1, 3.5, 100)
    lines = [(xs, np.minimum(peak, read * xs), "k-")]
    for B in (1, 110, 224):
        for part in predict(generate_cost(lecture(B=B)), limits)["parts"]:
            at = part["flops"] / part["bytes"], part["flops"] / part["seconds"]
            weights = part["name"] == "weights"
            lines.append(([at[0]], [at[1]], "C0o" if weights else "C1s"))
            below = 0.6 if weights else {1: 0.33, 110: 0.18, 224: 0.1}[B]
            notes.append((at[0] * 1.2, at[1] * below,
                          f"{part['name']}, B = {B}: {si(part['seconds'], 's')}"))
    return Sketch(3.6, (0.1, 3e3), (2e11, 2e15), [], notes, lines, dict(
        xscale="log", yscale="log", xlabel="flops a byte", ylabel="flops a second"))


def sketch_layer():
    """A tensor-parallel layer: what two of four devices hold, and what each step sends."""
    job = lecture()
    steps = layer_steps(job, 1, 4, CHIPS["tpu-v4"].link)[1:6]
    boxes, notes = [], [(0, 0.4, "device 0"), (10, 0.4, "device 1, and so devices 2 and 3")]
    for i, step in enumerate([{"step": "x", "after": steps[0]["before"]}, *steps]):
        color = "C1" if step["step"] in ("x", "out", "down") else "C0"
        boxes += [(x, -2 * i - 1, 8, 1, step["after"], color, 0.35) for x in (0, 10)]
        notes.append((19, -2 * i - 0.5, step["step"]))
        if step.get("bytes"):
            kind, = step["collectives"]
            boxes.append((3, -2 * i + 0.15, 12, 0.7, f"{kind}: each sends {si(step['bytes'], 'B')} "
                          f"in {si(step['seconds'], 's')}", "C2", 0.35))
        elif i:
            notes.append((5.5, -2 * i + 0.5, "purely local: nothing is sent"))
    return Sketch(4.6, (0, 23), (-11.2, 0.9), boxes, notes)


def sketch_layouts():
    """The three ways to split a cache over four devices, and what attention then sends."""
    job, boxes, notes = lecture(), [], []
    for place, name in enumerate(("heads", "batch", "sequence")):
        at, sent = 9.0 * place, shard.tally(shard.attend_comm(job.cfg, 112, (4,), name))
        letter = shard.LAYOUTS[name].letter
        for k, b, s in itertools.product(reversed(range(4)), range(4), range(4)):
            boxes.append((at + s + 0.7 * k, -b + 0.7 * k, 1, 1, "", (
                "#9ecae1", "#fdae6b", "#a1d99b", "#bcbddc")[dict(K=k, B=b, S=s)[letter]], 1))
        size = sum(size for _, size in sent.values())
        told = f"{si(size, 'B')} a layer:\n{', '.join(sent)}" if size else "nothing"
        notes += [(at, 3.9, f"{name}: each holds {cache_split(name, 4)}"),
                  (at, -3.9, f"attention sends {told}")]
    notes.append((24.2, -2.5, "across: slots\ndown: rows\nbehind: heads"))
    return Sketch(3.4, (-0.2, 27.5), (-4.7, 4.4), boxes, notes)


def sketch_causal():
    """The pairs of blocks that causal attention multiplies, and those that it skips."""
    T = 2048
    n, size = causal_blocks(T)
    boxes = [(j, -i, 1, 1, "skipped" if j > i else "all" if j < i else "half",
              "C7" if j > i else "C0" if j < i else "C1", 0.12 if j > i else 0.4)
             for i in range(n) for j in range(n)]
    told = (f"{T:,} tokens in {n} blocks of {size}: queries down, keys across",
            f"multiplied: {n * (n + 1) // 2} of {n * n} pairs of blocks, {causal_pairs(T):,} pairs",
            f"seen: T(T+1)/2 = {T * (T + 1) // 2:,}", f"without blocks: T T = {T * T:,}",
            f"f32 scores that are held, a head and sequence: {si(4 * size * size, 'B')},",
            f"where all of them would take {si(4 * T * T, 'B')}")
    return Sketch(2.8, (-0.1, 10), (1 - n, 1), boxes,
                  [(n + 0.4, 0.6 - 0.5 * i, text) for i, text in enumerate(told)])


SKETCHES = {"product": sketch_product, "phases": sketch_phases, "roofline": sketch_roofline,
            "layer": sketch_layer, "layouts": sketch_layouts, "causal": sketch_causal}


def timelines():
    """-> dict of list of Job: a generate step with references and with rings; training as FSDP
    without the lecture's flags and with them."""
    train = lecture("train", 256, 64)._replace(prompt=2048)
    return {"timeline_ring": [lecture()._replace(ring=ring) for ring in (0, 1)],
            "timeline_fsdp": [train, train._replace(flags=True)]}


def draw(args):
    """Draws the README's pictures into a folder: `SKETCHES`, and what a v4's compiler says."""
    folder = pathlib.Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, sketch in SKETCHES.items():
        render(sketch(), folder / f"{name}.svg")
    check_compiler("tpu-v4")
    with compilers() as ask:
        render(sketch_memory(chip_row(lecture(), ask)), folder / "memory.svg")
        for name, jobs in timelines().items():
            draw_timeline([chip_row(job, ask) for job in jobs], folder / f"{name}.svg")
    finish(args, pictures=sorted(map(str, folder.glob("*.svg"))))


# ------------------------------------------------------------------------------------------ growth


GROWTH = "L2,E512,H8,K8,D64,F1408,V256"


def sweeps(job):
    """Job -> dict: what grows -> list of (size, Job), all else as in the job; a wider model keeps
    its proportions."""
    cfg, S = job.cfg, job.prompt + job.new
    read = job._replace(phase="prefill", B=1)
    wider = [replace(cfg, **{name: max(1, getattr(cfg, name) * times // 2) for name in "EHKF"})
             for times in (1, 2, 4, 8)]
    return {
        "batch": [(B, job._replace(B=B)) for B in (1, 4, 16, 64)],
        "slots": [(S * n, job._replace(B=8, prompt=S * n - job.new)) for n in (1, 4, 16, 32)],
        "layers": [(L, job._replace(cfg=replace(cfg, L=L))) for L in (1, 2, 4, 8)],
        "tokens": [(T, read._replace(prompt=T)) for T in (64, 256, 1024, 2048)],
        "width": [(wide.E, job._replace(cfg=wide)) for wide in wider]}


def exponent(sizes, values):
    """sizes, values -> k of the best size ** k: the slope of a line through their logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def scale(args):
    """Prints how time grows with each size, beside how it should."""
    name, cfg = args.model or (GROWTH, parse_model(GROWTH))
    dtype, rows = args.dtype, []
    base = in_kind(Job("generate", name, cfg, 1, 240, 16), dtype, int8=args.int8)
    grown = [(what, size, job) for what, jobs in sweeps(base).items() for size, job in jobs]
    for _, _, job in grown:
        check_memory(job)
    limits = ceilings([base])
    with interruptible("measured"):
        for what, size, job in grown:
            say(f"{what} {size}:", end=" ")
            rows.append({"grows": what, "size": size} | measure(
                job, drawn(job, jax.random.key(args.seed)), limits, args.seed))
    found = []
    for (what, phase), own in itertools.groupby(rows, lambda row: (row["grows"], row["phase"])):
        own = list(own)
        sizes = [row["size"] for row in own]
        if len(own) > 1:
            found.append({"grows": what, "phase": phase, "sizes": sizes, "milliseconds": ", ".join(
                f"{row['size']}: {row['measured_seconds'] * 1e3:.2f}" for row in own)} | {
                    f"{word}_exponent": exponent(sizes, [row[f"{word}_seconds"] for row in own])
                    for word in ("measured", "predicted")})
    print_limits(limits)
    print(f"{name} in {dtype}: a step's milliseconds at each size, and k where time grows as size "
          "** k")
    print_table((Column("phase", -8, "phase"), Column("grows", -6, "grows"),
                 Column("size: ms", -52, "milliseconds"),
                 Column("k", 5, "measured_exponent", ".2f"),
                 Column("predicted", 9, "predicted_exponent", ".2f")), found)
    finish(args, machine=machine(), ceilings=limits, rows=rows, growth=found)


# --------------------------------------------------------------------------------------- real input


def encode(text):
    """str -> 1T: a byte a token."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)[None]


def decode(tokens):
    """T -> str: what is no UTF-8 shows as a replacement character."""
    return bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")


def recite(params, cfg, prompt, new, key, sampling=GREEDY):
    """Params, cfg, 1T, int, key -> str: prefill, then generate, in a model of bytes."""
    T = prompt.shape[1]
    logits, cache = prefill_jit(params, init_cache(cfg, 1, T + new), prompt, jnp.full(1, T), cfg)
    return decode(generate_jit(params, cache, logits, key, new, cfg, sampling)[0][0])


def learn(cfg, seed, steps=300):
    """cfg, int -> Params: f32, trained on SENTENCE again and again until the model knows it."""
    if cfg.V < 256:
        raise ValueError(f"V={cfg.V}: a model that learns a sentence in bytes has V=256 or more")
    say(f"learning {SENTENCE!r} ...", end=" ")
    cfg, text = replace(cfg, dtype="float32"), encode(4 * SENTENCE)
    params = init(jax.random.key(seed), cfg)
    adam = adam_init(params)
    for trained in range(1, steps + 1):
        params, adam, value = train_jit(params, adam, text, cfg, 0.3 / cfg.E)
        if value < 0.01:
            break
    say(f"{trained} steps, {value:.3f} nats a byte")
    return params


def check_recital(params, cfg):
    """Params, cfg -> None: SystemExit where a model that should know SENTENCE goes on otherwise."""
    cfg, rest = replace(cfg, dtype="float32"), SENTENCE[len(PROMPT):]
    said = recite(params, cfg, encode(PROMPT), len(rest), jax.random.key(0))
    say(f"{PROMPT!r} goes on {said!r}")
    if said != rest:
        sys.exit(f"bench.py: error: trained on {SENTENCE!r}, the model goes on {said!r}: a wrong "
                 "program's figures are void")


def read_text(path, T):
    """path, int -> bytes as int32, the first nine tenths and the last."""
    try:
        text = np.frombuffer(pathlib.Path(path).read_bytes(), np.uint8).astype(np.int32)
    except OSError as error:
        raise ValueError(f"text file {path}: {error.strerror}") from None
    held = len(text) // 10
    if held < 2 or len(text) - held < T + 1:
        raise ValueError(f"text file {path} has {len(text)} bytes: training on {T} at a time takes "
                         f"{max(20, (T + 1) * 10 // 9 + 1)} or more; a smaller --prompt takes less")
    return text[:-held], text[-held:]


def train_text(args, job, params, adam, limits, text, held):
    """-> row, Params, Adam: trains on bytes, and measures each step as it goes."""
    cfg, T, began, times, live = job.cfg, job.prompt, int(adam.step), [], sys.stderr.isatty()
    nats = jax.jit(lambda params, tokens: loss(cast(params, cfg.dtype), tokens, cfg))

    def held_out():
        """-> mean nats a byte over all of `held`, in windows of T, the last one shorter."""
        total = 0.0
        for start in range(0, len(held) - 1, T):
            window = held[None, start:start + T + 1]
            total += float(nats(params, window)) * (window.shape[1] - 1)
        return total / (len(held) - 1)

    draw = np.random.default_rng(args.seed)
    draw.integers(0, len(text) - T, (began, job.B))  # what was read before
    row = predicted_row(job, limits) | {
        "parameters": param_count(cfg),
        "cache_bytes_per_token": kv_bytes(cfg, 1, 1, job.cache_dtype), "loss_before": held_out()}
    say(f"{args.text}: {len(text)} bytes to train on, {len(held)} held out, K={cfg.K}, "
        f"{param_count(cfg)} parameters; held-out loss {row['loss_before']:.3f} nats/byte")
    start, shape = time.perf_counter(), jax.ShapeDtypeStruct((job.B, T + 1), jnp.int32)
    step = train_jit.lower(params, adam, shape, cfg, args.lr).compile()
    row["compile_seconds"] = time.perf_counter() - start
    try:
        for i in range(1, args.steps + 1):
            starts = draw.integers(0, len(text) - T, (job.B, 1))
            tokens, start = text[starts + np.arange(T + 1)], time.perf_counter()
            params, adam, value = step(params, adam, tokens, args.lr * min(1, (began + i) / 20))
            value = float(value)
            times.append(time.perf_counter() - start)
            if live or i % 10 == 1 or i == args.steps:
                now = measured_row(row, times[-9:], limits)
                mfu = "error, above 100%" if now["mfu"] is None else f"{now['mfu']:.0%}"
                say(f"\rstep {i}/{args.steps}  loss {value:.3f} nats/byte  "
                    f"{now['tokens_per_second']:.0f} tokens/s  MFU {mfu} ",
                    end="" if live else "\n")
    except KeyboardInterrupt:
        if not times:
            raise
        say(f"\ninterrupted after {len(times)} steps")
    say()
    row |= {"loss_after": held_out(), "steps": len(times)}
    # the first fetches all memory
    return measured_row(row, times[1:] or times, limits), params, adam


def train_on_text(args, jobs):
    """Trains on args.text, once for each job, and prints held-out loss before and after."""
    text, held = read_text(args.text, jobs[0].prompt)
    if args.resume:
        job, (cfg, params, adam) = jobs[0], load_state(args.resume)
        if args.model and replace(job.cfg, dtype=cfg.dtype) != cfg:
            raise ValueError(f"--model {job.model} is not the model in --resume {args.resume}: "
                             "leave it out")
        jobs = [job._replace(model=args.resume, cfg=replace(cfg, dtype=job.cfg.dtype))]
    if jobs[0].cfg.V != 256:
        raise ValueError(f"V={jobs[0].cfg.V}: a model of bytes has V=256")
    if args.save:
        library()
        try:
            pathlib.Path(args.save).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--save {args.save}: {error.strerror}") from None
    limits, rows, more = ceilings(jobs), [], {}
    with interruptible("trained"):
        for job in jobs:
            if not args.resume:
                params = init(jax.random.key(args.seed), job.cfg)
                adam = adam_init(params)
            row, params, adam = train_text(args, job, params, adam, limits, text, held)
            rows.append(row)
    for row in rows:
        print(f"K={row['K']}: held-out loss: {row['loss_before']:.3f} nats a byte before, "
              f"{row['loss_after']:.3f} after {row['steps']} steps of "
              f"{row['measured_seconds'] * 1e3:.1f} ms; {row['parameters']} parameters, cache "
              f"{row['cache_bytes_per_token']} bytes a token")
    if rows:
        if args.save:
            save_state(args.save, job.cfg, params, adam)
            save(args.save, job.cfg, params)
            say(f"saved to {args.save}")
        prompt, params = held[None, :min(job.prompt, 64)], cast(params, job.cfg.dtype)
        said = recite(params, job.cfg, prompt, args.new, jax.random.key(args.seed), Sampling(0.5))
        print(f"{decode(prompt[0])!r} goes on {said!r}")
        more = {"continuation": said, **{name: rows[-1][name] for name in (
            "loss_before", "loss_after", "steps")}}
    report(args, rows, limits, text=str(args.text), **more)


def end_tokens(path):
    """path -> tuple: what ends a text: generation_config.json counts before config.json."""
    for file in (path / "generation_config.json", path / "config.json"):
        end = read_json(file).get("eos_token_id") if file.exists() else None
        ends = end if isinstance(end, list) else [] if end is None else [end]
        if any(type(end) is not int for end in ends):
            raise ValueError(f"{file}: eos_token_id={end!r} should be a token or a list of them")
        if ends:
            return tuple(ends)
    return ()


def tokenizer(path, cfg):
    """path, Config -> namespace of `encode` and `decode`: of tokenizer.json, or of bytes where V is
    256; what `ends` a text; and how many tokens, from the first, are `settled`: no later token
    changes their text."""
    file = pathlib.Path(path) / "tokenizer.json"
    if not file.exists():
        if cfg.V != 256:
            raise ValueError(f"{file} is missing, and V={cfg.V} is not 256, a model of bytes")
        return SimpleNamespace(encode=lambda text: encode(text)[0], decode=decode, ends=(),
                               settled=len)
    try:
        from tokenizers import Tokenizer
        words = Tokenizer.from_file(str(file))
    except ImportError:
        raise ValueError(f'{file} needs the extra hf: pip install ".[hf]"') from None
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{file} is no tokenizer: {error}") from None
    words.no_truncation()  # which, as padding, was meant for training
    words.no_padding()

    def settled(ids):  # a run of single bytes may yet become other characters
        some = len(ids)
        while some and re.fullmatch("<0x[0-9A-F]{2}>", words.id_to_token(ids[some - 1]) or ""):
            some -= 1
        return some

    return SimpleNamespace(encode=lambda text: words.encode(text).ids, decode=words.decode,
                           ends=end_tokens(file.parent), settled=settled)


def simulate(devices):
    """int -> None: makes so many devices of a CPU, unless what is here was looked at before."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def load_in(args, path, devices=1):
    """args, path, int or None -> Job, Params: to go on with one sequence, in --dtype or the file's
    own. Of several devices (None: all that divide the model) each reads its own part alone."""
    def split(cfg):
        n = devices or degree(cfg, jax.device_count())
        if degree(cfg, n) < n:
            fit = [str(m) for m in range(1, 65) if degree(cfg, m) == m]
            raise ValueError(f"--devices {n} cannot share a model of E={cfg.E}, H={cfg.H}, "
                             f"F={cfg.F}, V={cfg.V}: {', '.join(fit)} can")
        mesh, layout = (("tensor", over_heads(cfg, n)),), "sequence" if cfg.K % n else "heads"
        return Job("generate", path, cfg, 1, 0, 0, mesh=mesh if n > 1 else (), layout=layout)

    def apart(by, job, *params):
        """-> by(*params, cfg, mesh, rules), None where all is on one device."""
        mesh = mesh_of(job)
        return by(*params, job.cfg, mesh, where_of(job, mesh).rules) if mesh else None

    cfg, params = load(path, shardings=lambda cfg: apart(shard.shardings, split(cfg)))
    job = in_kind(split(cfg), args.dtype or cfg.dtype, args.cache, args.int8)
    params = held_in(job, params)
    return job, apart(shard.place, job, params) or params


def load_draft(args, cfg, prompt, S, how):
    """-> draft and its state for `speculate`: n-grams, or a smaller model from a folder, of which
    every device has all."""
    if args.draft == "ngram":
        return ngram_draft, None
    job, params = load_in(args, args.draft)
    if job.cfg.V != cfg.V:
        raise ValueError(f"draft {args.draft} has V={job.cfg.V}, and the model V={cfg.V}: "
                         "they must share a tokenizer")
    _, cache = prefill_jit(params, init_cache(job.cfg, 1, S, args.cache), prompt,
                           np.array([prompt.shape[1]]), job.cfg)
    return model_draft(job.cfg, **how), (params, cache)


def generating(fns, mesh, params, cache, logits, prompt, key, how, draft=None, state=None):
    """-> iterator: compiles, then gives all tokens made so far, and in how many rounds of a draft.
    What is known of the next token is its logits; with a draft, the text, whose last token the
    cache lacks."""
    T, made, rounds, step, known, more = prompt.shape[1], [], 0, fns.generate, logits, {}
    if draft:
        cache, step = cache._replace(length=cache.length - 1), fns.speculate
        known = jnp.zeros((1, slots_of(cache)), jnp.int32).at[:, :T].set(prompt)
        step, more = partial(step, draft=draft), {"state": state}
        if mesh:
            known, more = jax.device_put((known, more), jax.NamedSharding(mesh, jax.P()))
    step = jax.jit(partial(step, n=STRIDE, **how), donate_argnums=(1, 2)).lower(
        params, cache, known, key, **more).compile()
    while True:
        yield made, rounds
        if draft:
            known, cache, more["state"], counts = step(params, cache, known, key, **more)
            made = np.asarray(known)[0, T:int(cache.length[0]) + 1].tolist()
            rounds += int(np.sum(counts))
        else:
            tokens, known, cache = step(params, cache, known, key)
            made = made + np.asarray(tokens[0]).tolist()


def stream(args):
    """args -> iterator of (str, str, dict): of the prompt and what follows so far the text that is
    final, all of it, and how fast it came."""
    job, params = load_in(args, args.model, args.devices)
    args.dtype, args.cache, cfg = job.dtype, job.cache_dtype, job.cfg
    words, key, mesh = tokenizer(args.model, cfg), jax.random.key(args.seed), mesh_of(job)
    prompt = np.asarray(words.encode(args.prompt), np.int32)[None]
    T, least = prompt.shape[1], 2 if args.draft else 1
    if T < least:
        raise ValueError(f"prompt {args.prompt!r} makes {T} tokens: {least} or more"
                         + (", or no --draft" if args.draft else ""))
    check_tokens(prompt, cfg)
    S = T + args.new + STRIDE + args.n_draft + 1
    free, needed = memory(), kv_bytes(cfg, 1, S, args.cache)
    if free is not None and needed > free:
        raise ValueError(f"a cache of {S} slots holds {needed / GB:.1f} GB and {free / GB:.1f} GB "
                         "are free: a smaller --new")
    how = dict(sampling=Sampling(args.temperature, args.top_k, args.top_p))
    draft = load_draft(args, cfg, prompt, S, how) if args.draft else ()
    how["end"] = words.ends[0] if words.ends and prompt[0, -1] not in words.ends else None
    fns, S = functions(job._replace(prompt=T), mesh), slots(job, S)
    fresh = where_of(job, mesh).empty
    read = jax.jit(fns.prefill, donate_argnums=1)
    for _ in range(3):  # compiled; then weights are fetched from wherever they were
        cache, _ = fresh(cfg, 1, S, args.cache)
        given = jax.block_until_ready((params, cache, prompt, np.array([T])))
        start = time.perf_counter()
        logits, cache = jax.block_until_ready(read(*given))
    told = {"prompt": T, "prefill_seconds": time.perf_counter() - start}
    for made, rounds in generating(fns, mesh, params, cache, logits, prompt, key, how, *draft):
        start = start if made else time.perf_counter()  # compiled
        stop = min([args.new, *(made.index(end) for end in words.ends if end in made)])
        told |= {"seconds": time.perf_counter() - start, "rounds": rounds,
                 "a_round": len(made) / max(1, rounds), "tokens": len(made[:stop])}
        ids = prompt[0].tolist() + made[:stop]
        stays = words.decode(ids[:words.settled(ids)])
        yield stays.rstrip("\ufffd"), words.decode(ids), told  # a character's rest may come yet
        if len(made) >= args.new or stop < len(made):
            return


def complete(args):
    """Writes on from a prompt, to stdout as it goes, and says how fast that was."""
    if args.devices:
        simulate(args.devices)
    shown, text, told = "", "", {}
    try:
        for stays, text, told in stream(args):
            if stays.startswith(shown):
                print(stays[len(shown):], end="", flush=True)
                shown = stays
    except KeyboardInterrupt:
        if not told:
            raise
        say("\ninterrupted")
    print(text[len(shown):])
    rounds = f", {told['a_round']:.2f} tokens a round" if told["rounds"] else ""
    print(f"prefill of {told['prompt']} tokens {told['prefill_seconds'] * 1e3:.1f} ms, then "
          f"{told['tokens'] / told['seconds']:.1f} tokens/s{rounds}: weights {args.dtype}, "
          f"cache {args.cache}")
    if args.json:  # stdout is the text
        pathlib.Path(args.json).write_text(json.dumps(told | {"text": text}) + "\n")


# ------------------------------------------------------------------------------- several devices


def form_jobs(args, name, cfg, n):
    """args, str, Config, int -> list of Job: every program on n devices, reference and rings."""
    base = Job("train", name, cfg, args.batch, args.prompt, args.new, cfg.dtype, cfg.dtype,
               mesh=(("tensor", n),))
    meshes = [dict(data=n, tensor=1), dict(data=1, tensor=n), dict(data=n // 2, tensor=2)]
    jobs = [base._replace(phase=phase, ring=ring) for ring in shard.RINGS for phase in PRODUCTS]
    jobs += [base._replace(by="compiler", mesh=(("data", n),))]
    jobs += [base._replace(ring=ring, mesh=tuple(mesh.items()))
             for mesh in meshes[:3 if n % 2 == 0 and n > 2 else 2]
             for ring in (0, 1)[:1 + (mesh["tensor"] > 1)]]
    jobs += [base._replace(mesh=(("data", 1), ("context", n), ("tensor", 1)))] * (n > 1)
    jobs += [base._replace(phase=phase, layout=layout, ring=ring) for layout in shard.LAYOUTS
             for ring in (0, 1) for phase in ("prefill", "generate")
             if layout != "context" or phase == "prefill" and not ring]
    if args.chip:
        jobs = [job._replace(flags=flags) for job in jobs for flags in (False, True)
                if not flags or job.phase == "train" and TARGETS[args.chip[0]].extra == "tpu"]
    found = [job for job in jobs if any(word in form_name(job) for word in args.form or [""])]
    if not found:
        raise ValueError(f"--form {' --form '.join(args.form)}: a word of "
                         + "; ".join(dict.fromkeys(map(form_name, jobs))))
    return found


def measure_form(job, link, seed):
    """Job, bytes/s, int -> dict: predicted, counted in the jaxpr, compiled, measured, and what it
    gave."""
    links, prepared = on_links(job, link), prepare(job, None, seed)
    formula, result = links["predicted_collectives"], prepared.call()
    told = PHASES[job.phase].tell(job, result)
    # a fixed number: processes that each stopped by their own clock would wait for one another
    times, steps = seconds_of(prepared.call, at_most=5), told["steps"]
    counted = prepared.row["counted"]
    if job.phase in ("prefill", "generate"):
        told["tokens"] = np.asarray(result[0] if job.phase == "generate" else
                                    jnp.argmax(result[0], axis=-1)).tolist()
    row = {"form": form_name(job), "mesh": dict(job.mesh), **told,
           "collectives": prepared.row["collectives"],
           "measured_seconds": statistics.median(times) / steps}
    return row if formula is None else row | {
        "predicted_bytes": sum(size for _, size in formula.values()),
        "counted_bytes": sum(size for _, size in counted.values()) // steps,
        "as_predicted": counted == {kind: (steps * number, steps * size)
                                    for kind, (number, size) in formula.items()},
        "link_seconds": links["link_seconds"], "hops": links["hops"]}


FORMS = (Column("form and mesh", -29, lambda row: row["form"] + " " + "x".join(
             map(str, row["mesh"].values()))),
         Column("sends", 7, "predicted_bytes", "B"),
         Column("counted", 8, lambda row: "the same" if row.get("as_predicted") else
                row.get("counted_bytes", "-"), "B"),
         Column("links", 7, "link_seconds", "s"), Column("took", 7, "measured_seconds", "s"),
         Column("collectives of the compiled program", -57, lambda row: ", ".join(
             f"{c['number']} {kind}" for kind, c in row["collectives"].items())))


def run_shard(args):
    """Prints, for each program on several devices, what it sends: predicted, counted; measured."""
    name, cfg = args.model or (SHARDED, parse_model(SHARDED))
    cfg = replace(cfg, dtype=args.dtype)
    if args.chip:
        jobs = []
        for job in form_jobs(args, name, cfg, args.chips * TARGETS[args.chip[0]].devices):
            try:
                jobs.append(on_chips(job, args.chip[0], args.chips, dict(job.mesh), job.layout))
            except ValueError as error:
                say(f"{form_name(job)} cannot: {error}")
        if not jobs:
            raise ValueError(f"no such form can be split over --chips {args.chips}")
        return run_chips(args, jobs)
    if args.processes > 1 and args.process is None:
        return start_processes(args)
    if args.process is not None or args.distributed:
        found = dict(coordinator_address=args.coordinator, num_processes=args.processes,
                     process_id=args.process) if args.process is not None else {}
        jax.config.update("jax_num_cpu_devices", args.devices // args.processes)
        jax.distributed.initialize(**found)
    else:
        simulate(args.devices)
    n, rows, first = jax.device_count(), [], jax.process_index() == 0
    with interruptible("measured"):
        for job in form_jobs(args, name, cfg, n):
            try:
                rows.append(measure_form(job, args.link, args.seed))
                told = si(rows[-1]["measured_seconds"], "s")
            except ValueError as error:  # the same in every process
                told = f"cannot: {error}"
            if first:
                say(f"{form_name(job)}: {told}")
    if not rows:
        raise ValueError(f"no such form can be split over --devices {n}")
    if first:
        print(f"{name}, B={args.batch}, {n} device(s) in {jax.process_count()} process(es): what a "
              f"device sends in a step,\nby formula and counted in the program; links: at "
              f"{args.link / GB:g} GB/s one way. CPU devices share this\nmachine's cores: bytes "
              "and steps carry over, what it took does not")
        print_table(FORMS, rows)
        finish(args, machine=machine(), ceilings={}, rows=rows)


def start_processes(args):
    """Starts this command in several local processes that find each other; the first one prints."""
    if args.devices % args.processes:
        raise ValueError(f"--devices {args.devices} cannot be split over --processes "
                         f"{args.processes}")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    again = [sys.executable, __file__, *args.argv, "--coordinator", address, "--process"]
    started = [subprocess.Popen([*again, str(i)], stdout=None if i == 0 else subprocess.DEVNULL)
               for i in range(args.processes)]
    try:  # where one fails, the others would wait for it
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started):
                break
            time.sleep(0.1)
        if any(process.poll() != 0 for process in started):
            raise ValueError("a process failed: its own message stands above")
    finally:
        for process in started:
            process.kill()


# ------------------------------------------------------------------------------------- command line


def typed(parse, known=None):
    """fn, str -> an option's type: where `parse` refuses a text, one line says what is known."""
    def read(text):
        try:
            return parse(text)
        except (ValueError, KeyError) as error:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected {known}" if known else str(error)) from None
    return read


def whole(text, least=1, most=2 ** 31 - 1):
    """str -> int, from `least` to `most`, by default what int32 holds; ValueError otherwise."""
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ValueError
    return int(text)


def no_less(text, least=sys.float_info.min):
    """str -> float, finite and no less, by default above 0; ValueError otherwise."""
    if not least <= float(text) < math.inf:
        raise ValueError
    return float(text)


def some_of(known):
    """dict of str -> the type of an option that takes several of them."""
    return typed(lambda text: [known[word] for word in text.split(",")],
                 "some of " + ", ".join(known))


def parse_kept(text):
    """str -> tuple of str: what a layer keeps."""
    names = () if text == "none" else tuple(text.split(","))
    shard.check_kept(names)
    return names


def parse_mesh(text):
    """str -> dict: axes and sizes; ValueError for one that is named twice, or otherwise."""
    pairs = [part.split("=") for part in text.split(",")]
    mesh = {name: whole(n) if "x" not in n else tuple(map(whole, n.split("x")))
            for name, n in pairs}
    if len(mesh) < len(pairs):
        raise ValueError
    return mesh


def writable(text, ends=("",)):
    """str -> the path; refused before any work where nothing can be written there."""
    if not text.endswith(ends):
        raise ValueError(f"{text!r}: expected a name that ends in {' or '.join(ends)}")
    if ends != ("",):
        pyplot()
    try:
        with open(text, "a"):
            return text
    except OSError as error:
        raise ValueError(f"{text!r}: {error.strerror}") from None


def option(text, default=None, type=None, metavar=None, **more):
    """-> what argparse is told of an option."""
    given = dict(type=type, metavar=metavar, **more)
    return {"help": text, "default": default} | {
        name: value for name, value in given.items() if value is not None}


NUMBER, ABOVE = typed(whole, "one whole number from 1 to 2147483647"), typed(
    no_less, "a number above 0")
NUMBERS = typed(lambda text: [whole(n) for n in text.split(",")], "whole numbers from 1, as 1,8,32")
MODEL, CHIP = (typed(lambda text, parse=parse: (text, parse(text)))
               for parse in (parse_model, parse_chip))
PICTURE = typed(partial(writable, ends=(".png", ".svg")))
OPTIONS = {  # each declared once; a command may change a part
    "seed": option("of weights, tokens and draws (0)", 0, typed(
        partial(whole, least=0, most=2 ** 32 - 1), "a whole number from 0 to 4294967295")),
    "json": option("write the result there too", None, typed(writable), "FILE"),
    "wide": option("a table with every column", False, action="store_true"),
    "profile": option("write traces for Perfetto or XProf there, and print where time goes",
                      metavar="DIR"),
    "plot": option("draw the roofline", None, PICTURE, "FILE.png|svg"),
    "model": option(f"letters ({DEFAULT}[,untied]) or one of {', '.join(MODELS)}", None, MODEL,
                    "NAME|SHAPE"),
    "batch": option("sequences, as 1,8,32", None, NUMBERS),
    "dtype": option("of the weights: float32 (default), bfloat16, int8, or several", ["float32"],
                    some_of(dict(zip(DTYPES, DTYPES)))),
    "int8": option("int8 weights are widened in the product (Q8: on any chip) or meet int8 "
                   "activations (Q8A8: on this machine's CPU)", choices=tuple(INT8)),
    "cache": option("dtype of the cache (the fastest here)", choices=DTYPES),
    "prompt": option("tokens a sequence (%(default)s)", 256, NUMBER),
    "new": option("tokens to generate (%(default)s)", 32, NUMBER),
    "kv-heads": option("in place of the model's, as 8,2,1; train: each on a text", None, NUMBERS,
                       "K"),
    "n-draft": option("tokens proposed (4)", 4, NUMBER),
    "text": option("a file to train on (README.md)"),
    "steps": option("train on --text so often (100)", None, NUMBER),
    "lr": option("learning rate (0.001)", 1e-3, ABOVE),
    "save": option("write what was trained there", metavar="DIR"),
    "resume": option("go on from what --save wrote, as one longer run: with the same --text, "
                     "--batch, --prompt, --lr and --seed", metavar="DIR"),
    "chip": option("predict and compile for this chip, measure nothing: one of "
                   + ", ".join(TARGETS), None, CHIP, "NAME"),
    "chips": option("so many of them (1)", 1, NUMBER),
    "mesh": option("of the chips (train: all data; others: all tensor); tensor=MxN: keys over M, "
                   "the layout over N; train: context=N too", None, typed(
                       parse_mesh, "axes and sizes, each once, as data=16,tensor=4, or tensor=4x4"),
                   "data=N,tensor=N"),
    "layout": option("of a cache on several chips (the first that divides); context: slots, and "
                     "prompts too", choices=tuple(shard.LAYOUTS)),
    "ring": option("collective matmuls: 0 the references (default), 1 or 2 rings of so many ways, "
                   "or several", [0], some_of({"0": 0, "1": 1, "2": 2})),
    "flags": option("compile with the lecture's flags for a TPU: off (default), on, or off,on",
                    [False], some_of({"off": False, "on": True})),
    "by": option("who chooses training's collectives (hand)", "hand", choices=("hand", "compiler")),
    "keep": option("what a layer keeps for its gradient on several chips, of "
                   f"{', '.join(KEEPABLE)}, or none ({','.join(shard.KEPT)})", None,
                   typed(parse_kept, f"none, or some of {', '.join(KEEPABLE)}"), "NAMES"),
    "timeline": option("draw a layer of each row as the chip's compiler schedules it", None,
                       PICTURE, "FILE.png|svg"),
    "context": option("tokens a sequence (2048)", 2048, NUMBER),
    "weights": option("(bfloat16)", "bfloat16", choices=DTYPES),
    "parameters": option("a rounded count, as 7e9; the exact one stands beside it", None, ABOVE),
    "train": option("training, too", False, action="store_true"),
    "tokens": option("to train on (1e12)", 1e12, ABOVE),
    "mfu": option("model flops utilisation of training (0.5)", 0.5, ABOVE),
    "hop": option("seconds from device to device (1e-6)", HOP_SECONDS, typed(
        partial(no_less, least=0), "a number from 0")),
    "compile": option("and ask the chip's compiler what fits", False, action="store_true"),
    "temperature": option("0 (default) is greedy", 0.0, float),
    "top-k": option("of the k most probable (0: all)", 0, int),
    "top-p": option("of those reaching p (1: all)", 1.0, float),
    "draft": option("speculate with a smaller model, or with what the text said before",
                    metavar="DIR|ngram"),
    "devices": option("so many; on a CPU they are made", None, NUMBER),
    "form": option("only forms whose name holds the word, as train or ring; more than once for "
                   "more (all)", metavar="WORD", action="append"),
    "link": option("bytes/s that a device sends one way (4.5e10: a TPU v4 link)", 4.5e10, ABOVE),
    "processes": option("start so many here (1)", 1, NUMBER),
    "distributed": option("this is one process of a pod or a Slurm job, and finds the others",
                          False, action="store_true"),
    "coordinator": option(argparse.SUPPRESS), "process": option(argparse.SUPPRESS, None, int)}
EVERYWHERE = "seed json wide profile plot".split()
ON_CHIPS = "chip chips timeline mesh layout ring flags by".split()
PHASE = "model batch prompt new dtype kv-heads".split()
CACHED = [*PHASE, "cache", "int8"]
ONE_DTYPE = dict(type=None, choices=DTYPES, default="float32", help="of the weights (float32)")
COMMANDS = {  # what it does, an example of it, its options, and what differs in them
    "train": ("measure a training step, or train on a text",
              "--text README.md --steps 100 --save DIR",
              [*PHASE, *"keep text steps lr save resume".split(), *ON_CHIPS], {}),
    "prefill": ("measure reading prompts", "--batch 8 --prompt 512", CACHED + ON_CHIPS, {}),
    "generate": ("measure a step that makes one token a row",
                 "--model gemma-7b --chip tpu-v4 --chips 4 --batch 110 --prompt 2032 --new 16 "
                 "--dtype bfloat16", CACHED + ON_CHIPS, {}),
    "verify": ("measure reading a draft at once", "--n-draft 7 --profile DIR",
               [*CACHED, "n-draft", *ON_CHIPS], {}),
    "speculate": ("measure rounds of a draft and its verification, beside generating",
                  "--prompt 96", [*CACHED, "n-draft", *ON_CHIPS], {}),
    "serve": ("measure many requests through few rows", "--batch 1,8 --dtype int8", CACHED, {}),
    "plan": ("predict, without running", "--model gemma-7b --chip tpu-v4 --chips 4 --train",
             "model chip chips context batch weights cache kv-heads int8 parameters train tokens "
             "mfu hop compile".split(),
             {"model": dict(default="gemma-7b"), "cache": dict(default="bfloat16"),
              "chip": dict(default="tpu-v4", help=f"one of {', '.join(CHIPS)}, or flops/s,bytes/s,"
                           "bytes,link bytes/s (tpu-v4)"), "kv-heads": dict(type=NUMBER),
              "batch": dict(type=NUMBER, help="sequences (as many as fit with "
                            f"{HELD_BACK:.0%}% of memory held back; --train: 4 a chip)")}),
    "scale": ("measure how time grows with each size", "--dtype bfloat16",
              ["model", "dtype", "int8"], {"dtype": ONE_DTYPE}),
    "complete": ("write on from a prompt with a real model",
                 '--model DIR "So long" --temperature 0.8', "model new temperature top-k top-p "
                 "dtype cache int8 draft n-draft devices".split(),
                 {"prompt": dict(help="the text to go on from"),
                  "model": dict(type=str, required=True, metavar="DIR", help="config.json, "
                                "model.safetensors and tokenizer.json, or what --save wrote"),
                  "dtype": ONE_DTYPE | dict(default=None), "new": dict(default=64)}),
    "shard": ("what several devices send each other", "--devices 8 --form ring",
              "model dtype batch prompt new form devices link processes distributed coordinator "
              "process chip chips timeline".split(),
              {"dtype": ONE_DTYPE | dict(choices=DTYPES[:2]), "devices": dict(default=8),
               "batch": dict(type=NUMBER, default=8), "prompt": dict(default=64),
               "new": dict(default=8)}),
    "draw": ("draw the README's pictures, from today's figures", "docs", [],
             {"folder": dict(help="where they go")})}


def parse(argv):
    """list of str -> the command line's arguments; SystemExit with one line where they are bad."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"{self.prog}: error: {message}\n")

    def declare(parser, names, own={}, **at_all):
        for name in names:
            parser.add_argument(f"--{name}", **OPTIONS[name] | own.get(name, {}) | at_all)

    def refuse(wrong, message):
        if wrong:
            parser.error(message)

    parser = Parser(prog="bench.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(**{name.replace("-", "_"): None for name in OPTIONS.keys() - EVERYWHERE})
    parser.add_argument("--quick", action="store_true", help="a small model, under a minute")
    declare(parser, EVERYWHERE)
    commands = parser.add_subparsers(dest="phase", metavar="|".join(COMMANDS))
    for name, (text, example, options, own) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text,
                                      epilog=f"for example: python bench.py {name} {example}")
        for positional in own.keys() - {*options}:
            command.add_argument(positional, **own[positional])
        declare(command, options, own)
        declare(command, EVERYWHERE, default=argparse.SUPPRESS)
    args, unknown = parser.parse_known_args(argv)
    refuse(unknown, f"{args.phase or 'the default run'} takes no {' '.join(unknown)}: --help says "
           "what it takes")
    args.argv = sys.argv[1:] if argv is None else argv
    name, elsewhere = args.chip[0] if args.chip else "", args.chip and args.phase != "plan"
    refuse(args.quick and args.phase,
           f"--quick is for all phases: leave out --quick or {args.phase}")
    refuse(args.mfu and args.mfu > 1, f"--mfu {args.mfu}: a share of 1 at most, as 0.5")
    try:
        if elsewhere or args.compile:
            slice_of(name, args.chips)
    except ValueError as error:
        parser.error(str(error))
    for own in "text steps save resume profile plot".split():
        refuse(elsewhere and getattr(args, own),
               f"--{own} is for this machine: leave out --{own} or --chip")
    for own in (*ON_CHIPS[1:], "keep"):
        refuse(not args.chip and getattr(args, own) not in (None, OPTIONS[own]["default"]),
               f"--{own} is for a --chip that is not here" + "; or: bench.py shard" * (
                   args.phase != "shard" and own != "keep"))
    if elsewhere and TARGETS[name].extra != "tpu":
        refuse(True in (args.flags or ()), f"--flags are a TPU compiler's: {name} has none")
        refuse(args.timeline, f"--timeline takes a TPU's times: {name}'s compiler gives none")
    refuse(args.keep is not None and (args.by == "compiler" or args.chips == 1),
           "--keep is for several chips, by hand: leave it out")
    refuse(args.int8 and "int8" not in (args.weights or args.dtype or ""), f"--int8 {args.int8} is "
           f"for int8 weights: --{'weights' if args.weights else 'dtype'} int8")
    if args.phase == "train":
        refuse("int8" in args.dtype,
               "train takes --dtype float32 or bfloat16: int8 has no gradient")
        refuse(args.resume and args.kv_heads,
               "--resume goes on with the heads that were saved: leave out --kv-heads")
        if args.text or args.steps or args.save or args.resume or args.kv_heads and not args.chip:
            args.text = args.text or pathlib.Path(__file__).with_name("README.md")
            args.steps = args.steps or 100
            refuse(len(args.dtype) > 1 or len(args.batch or [8]) > 1,
                   "training on a text takes one --batch and one --dtype")
            refuse(args.save and len(args.kv_heads or [1]) > 1,
                   "--save keeps one model: give one of --kv-heads")
    return args


def memory():
    """-> bytes that are free here: of the device where it tells, else of this machine; None where
    neither does."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if on_cpu() else None
    except (AttributeError, ValueError, OSError):
        return None


def needed_bytes(job):
    """Job -> int: weights and cache, and in training f32 masters, two means and a gradient."""
    cfg, train = job.cfg, job.phase == "train"
    wide = jnp.dtype(cfg.dtype).itemsize  # int8 weights are made from wide ones
    needed = param_count(cfg) * (wide + (job.dtype == "int8") + 16 * train)
    return needed + (0 if train else kv_bytes(cfg, job.B, job.prompt + job.new, job.cache_dtype))


def check_memory(job):
    """ValueError where weights and cache alone are more than there is."""
    free, needed = memory(), needed_bytes(job)
    if free is not None and needed > free:
        raise ValueError(f"{job.phase} of {job.model} in {job.dtype} at B={job.B} holds "
                         f"{needed / GB:.1f} GB and {free / GB:.1f} GB are free: "
                         "a smaller --model, --batch or --dtype")


def grown_batches(job, free, critical):
    """Job, bytes, float -> list of int: 1, 8, 64 and so on until four fifths of the memory are full
    or the critical batch is passed."""
    batches = [1]
    while batches[-1] < critical and needed_bytes(job._replace(B=8 * batches[-1])) <= 0.8 * free:
        batches.append(8 * batches[-1])
    return batches


def default_jobs(quick):
    """bool -> list of Job: of the default run, or of the quick one. Batches of generating are fixed
    on a CPU, so that its time is; elsewhere as many as memory and sheet suggest."""
    name = QUICK if quick else DEFAULT if on_cpu() else WIDER
    job = in_kind(Job("generate", name, parse_model(name), 1, 240, 16), "bfloat16")
    free, known, many = memory(), recognised(jax.devices()[0].device_kind), [1, 8, 32]
    if free is not None and not on_cpu():
        many = grown_batches(job, free, critical_batch(job, sheet(CHIPS[known])) if known else 256)
    shapes = [("train", 2 if quick else 4, 128, 0),
              *[("prefill", B, 128 if quick else 64, 0) for B in ([1] if quick else [1, 8])],
              *[("generate", B, 240, 16) for B in many],
              ("verify", 1, 240, 16), ("speculate", 1, 96, 32), ("serve", 8, 64, 32)]
    kinds = [(dtype, None) for dtype in DTYPES] + [("int8", "int8")]
    return [in_kind(job._replace(phase=phase, B=B, prompt=prompt, new=new), dtype, cache)
            for dtype, cache in kinds[:1 if quick else 4] for phase, B, prompt, new in shapes
            if (not cache or phase == "generate") and (phase, dtype) != ("train", "int8")
            and not (quick and phase == "serve")]


def jobs_of(args):
    """-> list of Job: those of one phase, or of the default run."""
    if not args.phase:
        return default_jobs(args.quick)
    size, chip = SMALL if args.phase == "train" and args.text else DEFAULT, args.chip
    name, cfg = args.model or (size, parse_model(size))
    few = {"train": [8], "verify": [1], "speculate": [1]}.get(args.phase, [1, 8, 32])
    phases = ["generate"] * (args.phase == "speculate" and not chip) + [args.phase]
    more = {name: getattr(args, name) for name in ("n_draft", "keep")
            if getattr(args, name) is not None}
    jobs = [in_kind(Job(phase, name, replace(cfg, K=K), B, args.prompt, args.new,
                        chip=chip[0] if chip else "", **more), dtype, args.cache, args.int8)
            for dtype in args.dtype for K in args.kv_heads or [cfg.K] for phase in phases
            for B in args.batch or few]
    return jobs if not chip else [
        on_chips(job._replace(ring=ring, flags=flags, by=args.by), chip[0], args.chips, args.mesh,
                 args.layout) for job in jobs for ring in args.ring for flags in args.flags]


def run(args):
    """Measures what the command line asks for, and prints it."""
    others = {"plan": plan, "scale": scale, "complete": complete, "shard": run_shard, "draw": draw}
    if args.phase in others:
        return others[args.phase](args)
    jobs = jobs_of(args)
    if jobs[0].chip:
        return run_chips(args, jobs)
    for job in jobs:
        check_memory(job)
    if args.text:
        return train_on_text(args, jobs)
    limits, rows, split, known = ceilings(jobs), [], [], {}
    chip = recognised(jax.devices()[0].device_kind)
    limits |= {"sheet": sheet(CHIPS[chip])} if chip else {}

    @lru_cache(maxsize=1)
    def shared(job):
        return drawn(job, jax.random.key(args.seed))

    def params_of(job):
        if job.phase == "speculate":
            return held_in(job, known[job.cfg.K])
        return shared(jobs[0]._replace(cfg=job.cfg, dtype=job.dtype))

    with interruptible("measured"):
        if not args.phase or args.phase == "speculate":
            known |= {K: learn(cfg, args.seed)
                      for K, cfg in {job.cfg.K: job.cfg for job in jobs}.items()}
        if not args.phase:
            check_recital(known[jobs[0].cfg.K], jobs[0].cfg)
        for job in jobs:
            rows.append(measure(job, params_of(job), limits, args.seed, args.profile))
        if not args.phase and not args.profile:  # of each phase that is compiled the largest gap
            gaps, pairs = {}, [pair for pair in zip(jobs, rows) if "temp_bytes" in pair[1]]
            for job, row in sorted(pairs, key=lambda pair: -pair[1]["ratio"]):
                gaps.setdefault(job.phase, (job, row))
            for job, row in list(gaps.values())[:1 if args.quick else 3]:
                say(f"profiling {job.phase} {job.dtype} B={job.B}")
                row["profile"] = profile(prepare(job, params_of(job), args.seed, traced=True))
    if not args.phase:
        print_attention(jobs[-1])
        split = print_split(max((job for job in jobs if job.phase == "generate" and job.B < 10),
                                key=lambda job: job.B))
    report(args, rows, limits, tensor_parallel=split)


def keep_freed_memory():
    """-> bool: has the C library been told to keep what is freed? Only glibc can be, on the CPU.

    XLA's CPU code asks for its temporaries anew at every step. By default glibc returns each large
    one to the kernel, which has to zero every page again; kept, an f32 step takes 12 to 15% less.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(trim_threshold, -1), libc.mallopt(mmap_max, 0),
                libc.mallopt(arena_max, 1)])


def main(argv=None):
    """The program: what is wrong with the input is said in one line."""
    keep_freed_memory()  # before XLA starts its threads
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nbench.py: interrupted before there was anything to print")


if __name__ == "__main__":
    main()
