"""bench: the napkin, the program, the profile, and why they differ.

    python bench.py [--quick]                                every phase of the default model
    python bench.py plan --model gemma-7b --chip tpu-v4      predict, on chips that are not here
    python bench.py generate|verify|speculate|prefill|serve|train ...    one phase alone
    python bench.py scale                                    how time grows with each size
    python bench.py train --text FILE --save DIR             train on a text file
    python bench.py train --kv-heads 8,2,1                   the same model with fewer key heads
    python bench.py complete --model DIR "So long"           write on, with a real model
    python bench.py shard --devices 8                        what several devices send each other
    python bench.py generate --chip tpu-v4 --chips 4 ...     what a chip's own compiler makes of it

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
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import shard
from infer import (Q8, Q8A8, Cache, array_bytes, decode_bytes, decode_flops, empty, extend,
                   generate, init_cache, kv_bytes, library, load, load_adam, model_draft,
                   ngram_draft, prefill, prefill_flops, quantize_params, read_arrays, read_json,
                   refill, save, serve, slots_of, speculate, weight_bytes, wide_bytes)
from minillm import (KEEPABLE, Adam, Config, Params, adam_init, cast, causal_attention,
                     causal_pairs, check_tokens, init, loss, param_count, size_of, traced_flops,
                     train_flops, train_step, unembed)

MB, GB = 1e6, 1e9
SENTENCE = "So long and thanks for all the fish; "
PROMPT = "So long and thanks for"
DEFAULT = "L6,E1024,H16,K4,D64,F2816,V256"
WIDER = "L8,E2048,H32,K8,D64,F8192,V32000"  # the default on a GPU or TPU: half of llama-3.2-1b
QUICK = "L2,E1024,H16,K4,D64,F2816,V256"
SHARDED = "L2,E512,H8,K8,D64,F1408,V256"
SMALL = "L4,E256,H8,K2,D32,F704,V256"  # learns a text of some KB in a minute on two cores
REQUESTS = 3  # that `serve` gets for each row, so that it is refilled twice
STRIDE = 8  # tokens between two looks at what was made
HOP_SECONDS = 1e-6  # from one device to the next
HELD_BACK = 0.08  # of the memory, for what is neither weights nor cache
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
HOW = ("n", "cfg", "temperature", "top_k", "top_p", "end")
generate_jit = jax.jit(generate, static_argnames=HOW, donate_argnames=("cache", "logits"))


def on_cpu():
    """-> bool: what is fastest there differs."""
    return jax.default_backend() == "cpu"


def default_cache(dtype, chip=None):
    """dtype of the weights -> of the cache: on a CPU bf16 slots are copied and int8 ones widened at
    every step, so f32 is the fastest; elsewhere, as on a chip that is not here, fewer bytes are."""
    return "float32" if dtype == "float32" or not chip and on_cpu() else "bfloat16"


def computing_in(cfg, dtype, chip=None):
    """Config, dtype of the weights -> Config: around int8 weights, activations are wide."""
    wide = "float32" if not chip and on_cpu() else "bfloat16"
    return replace(cfg, dtype=wide if dtype == "int8" else dtype)


def default_int8(chip=None):
    """-> str, of INT8: on a CPU Q8A8, whose products are four times as fast; elsewhere Q8: a step
    waits for bytes, a TPU's spends more on quantising rows than on widening weights (cycles), and a
    GPU's takes as long either way."""
    return "Q8" if chip or not on_cpu() else "Q8A8"


def products_in(job):
    """Job -> dtype in which its weights are multiplied."""
    return job.cfg.dtype if (job.dtype, job.int8) == ("int8", "Q8") else job.dtype


def in_dtype(params, cfg, dtype, int8=None):
    """Params, cfg, dtype, str -> Params: cast, or quantised to int8 weights of that kind."""
    if dtype == "int8":
        return quantize_params(params, cfg, INT8[int8 or default_int8()])
    return params if params.embed.dtype == dtype else cast(params, dtype)


def say(*words, end="\n"):
    """Progress, to stderr."""
    print(*words, file=sys.stderr, end=end, flush=True)


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


def cost(job, T, S, tokens, flops, weight_bytes, cache_bytes, attends_in, *parts):
    """-> Cost: attention's flops go with `cache_bytes`, all others with `weight_bytes`."""
    attention = flops["scores"] + flops["values"]
    return Cost(T, S, tokens, flops, weight_bytes, cache_bytes, (
        Part("weights", sum(flops.values()) - attention, weight_bytes, products_in(job)),
        Part("attention", attention, cache_bytes, attends_in), *parts))


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


def cached_dtype(job):
    """Job -> dtype in which a query meets the cache: the wider of both; int8 is widened."""
    narrow = job.cfg.dtype if job.cache_dtype == "int8" else job.cache_dtype
    return str(jnp.promote_types(job.cfg.dtype, narrow))


def train_cost(job):
    """Weights are read forwards, read backwards, and written as gradients: three times their bytes.

    AdamW reads p, m, v and the gradient and writes p, m and v: 28 bytes a parameter. What is saved
    between the two passes is not predicted: it need not leave the chip, and where it does, shows.
    """
    cfg, B, T = job.cfg, job.B, job.prompt
    wide = jnp.dtype(cfg.dtype).itemsize
    return cost(job, T, T, B * T, train_flops(cfg, B, T), 3 * wide * param_count(cfg), 0, cfg.dtype,
                Part("optimizer", 0, 28 * param_count(cfg), "float32"))


def prefill_cost(job):
    """All weights once, and the cache written once. (`rows_at_a_time` may read weights again
    for each thousand tokens or two: nothing beside their flops.)"""
    cfg, B, T, S = job.cfg, job.B, job.prompt, slots(job, job.prompt)
    return cost(job, T, S, B * T, prefill_flops(cfg, B, T), weight_bytes(cfg, job.dtype),
                kv_bytes(cfg, B, S, job.cache_dtype), cfg.dtype)


def extend_cost(job, T, S):
    """T tokens behind others: all weights, and all slots of the cache whether filled or not."""
    cfg, B, S = job.cfg, job.B, slots(job, S)
    moved = decode_bytes(cfg, B, S, T, cache_dtype=job.cache_dtype, dtype=job.dtype)
    return cost(job, T, S, B * T, decode_flops(cfg, B, S, T), moved["weights"],
                moved["cache_read"] + moved["cache_write"], cached_dtype(job))


def generate_cost(job):
    """One step."""
    return extend_cost(job, 1, job.prompt + job.new)


def verify_slots(job):
    """Job -> int: for what is known, what is made, and a draft."""
    return job.prompt + job.new + job.n_draft + 1


def verify_cost(job):
    """A round of speculation: the last token and a draft of n_draft. The n-grams cost nothing."""
    return extend_cost(job, job.n_draft + 1, verify_slots(job))


def product_cost(job):
    """B rows with one weight of E x F."""
    flops = {"mlp": 2 * job.B * job.cfg.E * job.cfg.F, "scores": 0, "values": 0}
    moved = job.cfg.E * job.cfg.F * jnp.dtype(job.cfg.dtype).itemsize
    return cost(job, 1, 0, job.B, flops, moved, 0, job.cfg.dtype)


def serve_cost(job):
    """A prefill for each request, and steps for B at a time."""
    steps, requests = REQUESTS * job.new, REQUESTS * job.B
    each = [("prefill", requests, prefill_cost(job._replace(B=1))),
            ("generate", steps, generate_cost(job))]
    names = {name for _, _, c in each for name in c.flops}
    return Cost(1, job.prompt + job.new, requests * job.new,
                {name: sum(n * c.flops.get(name, 0) for _, n, c in each) for name in names},
                sum(n * c.weight_bytes for _, n, c in each),
                sum(n * c.cache_bytes for _, n, c in each),
                tuple(Part(f"{word}, {part.name}", n * part.flops, n * part.bytes, part.dtype)
                      for word, n, c in each for part in c.parts))


def timed(part, peak, read):
    """Part, flops/s, bytes/s -> dict: its flops' time or its bytes' time, whichever is longer."""
    name, flops, moved, _ = part
    return {"name": name, "flops": flops, "bytes": moved,
            "seconds": max(flops / peak, moved / read),
            "bound": "flops" if flops / peak > moved / read else "bytes"}


def predict(cost, ceilings):
    """Cost, dict -> dict: seconds of a step: its parts follow one another."""
    parts = [timed(part, ceilings["flops_per_second"][part.dtype],
                   ceilings["read_bytes_per_second"]) for part in cost.parts]
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


def critical_batch(job, ceilings):
    """Job, dict -> float: rows at which a step's products with the weights take as long as reading
    them."""
    peak, read = ceilings["flops_per_second"][products_in(job)], ceilings["read_bytes_per_second"]
    return weight_bytes(job.cfg, job.dtype) / read * peak / (2 * multiplied(job.cfg))


# ------------------------------------------------------------------------- plan: chips not here


def degree(cfg, chips):
    """cfg, int -> int: how many of the chips can share one copy by tensor parallelism: a divisor of
    their number and of E, F, H and V. The others hold further copies."""
    return max(n for n in range(1, chips + 1)
               if not any(size % n for size in (chips, cfg.E, cfg.F, cfg.H, cfg.V)))


def communication(job, T, n, link, hop):
    """Job, int, int, bytes/s, seconds -> dict: the part of a step that n devices send, all bytes
    together, with the cache over heads where it can be, else over rows, else over slots: each
    device's bytes over its link, both ways, and a latency for each hop."""
    layout = "sequence" if job.B % n else "batch"
    if not job.cfg.K % n:
        layout = "heads"
    events = shard.comm_events(job.cfg, job.phase, job.B, T, tensor=n, layout=layout)
    formula, hops = shard.tally(events), shard.hops(events)
    return {"name": "communication", "flops": 0, "bound": "links", "hops": hops,
            "bytes": n * sum(size for _, size in formula.values()),
            "seconds": shard.comm_seconds(formula, link / 2, 1, hops, hop)}


def step_parts(job, chip, chips, parameters=None, hop=HOP_SECONDS):
    """Job, Chip, int -> list of dict: weights, attention and communication of one step, all chips'
    flops and bytes together. `parameters` replaces the exact count of what is multiplied."""
    cost = PHASES[job.phase].cost(job)
    weights, attention = cost.parts
    if parameters:
        weights = weights._replace(flops=2 * job.B * cost.T * parameters,
                                   bytes=parameters * jnp.dtype(job.dtype).itemsize)
    limits = sheet(chip, chips)
    found = [timed(part, limits["flops_per_second"][part.dtype], limits["read_bytes_per_second"])
             for part in (weights, attention)]
    return found + [communication(job, cost.T, chips, chip.link, hop)] * (chips > 1)


def in_all(parts, hidden=False):
    """list of dict, bool -> seconds: parts that follow one another or, `hidden`, what is sent
    behind the weights' products, as rings can do: then the longer of the two counts."""
    took = {part["name"]: part["seconds"] for part in parts}
    behind = min(took["weights"], took.get("communication", 0.0)) if hidden else 0.0
    return sum(took.values()) - behind


def over_heads(cfg, n):
    """cfg, int -> int or tuple: n devices of an axis "tensor", or of two where there are fewer key
    heads: the first over them, the second over rows or slots of each."""
    heads = math.gcd(cfg.K, n)
    return n if heads in (1, n) else (heads, n // heads)


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
    table = (not cfg.tied) * cfg.V * cfg.E * wide_bytes(cfg, dtype)
    weights = count * jnp.dtype(dtype).itemsize if parameters else weight_bytes(cfg, dtype) + table
    n = degree(cfg, chips)
    copies, memory = chips // n, n * chip.memory
    sequence = kv_bytes(cfg, 1, job.prompt, job.cache_dtype)
    most, taken = (max(0, int((share * memory - weights) // sequence))
                   for share in (1, 1 - HELD_BACK))
    B = -(-batch // copies) if batch else max(1, taken)  # of each copy
    parts = {word: step_parts(job._replace(phase=phase, B=rows), chip, n, parameters, hop)
             for word, phase, rows in (("prefill", "prefill", B), ("generate", "generate", B),
                                       ("alone", "generate", 1), ("first", "prefill", 1))}
    total = {word: in_all(found) for word, found in parts.items()}
    for part in parts["prefill"] + parts["generate"]:
        part["flops"], part["bytes"] = part["flops"] * copies, part["bytes"] * copies
    needed, limits = weights + B * sequence, sheet(chip)
    return {
        "parameters": count, "multiplied_parameters": parameters or multiplied(cfg),
        "weight_bytes": weights, "cache_bytes_per_token": kv_bytes(cfg, 1, 1, job.cache_dtype),
        "cache_bytes_per_sequence": sequence, "chips_per_copy": n, "copies": copies,
        "max_batch": most * copies, "batch_with_room": taken * copies,
        "critical_batch": parameters * jnp.dtype(dtype).itemsize / chip.read * chip.flops[
            products_in(job)] / (2 * parameters) if parameters else critical_batch(job, limits),
        "batch": batch or B * copies, "fits": needed <= memory,
        "chips_needed": 2 ** max(0, math.ceil(math.log2(needed / chip.memory))),
        "cache_bytes": copies * B * sequence,
        "step_bytes": sum(part["bytes"] for part in parts["generate"][:2]),
        "prefill_seconds": total["prefill"], "prefill_parts": parts["prefill"],
        **{f"{word}_hidden_seconds": in_all(parts[word], hidden=True)
           for word in ("prefill", "generate")},
        "first_token_seconds": total["first"],
        "generate_seconds": total["generate"], "generate_parts": parts["generate"],
        "tokens_per_second": (batch or B * copies) / total["generate"],
        "seconds_per_token_alone": total["alone"],
        "weights_over_memory_seconds": weights / n / chip.read,
        "weights_over_links_seconds": weights * (chips - 1) / chips / chip.link,
        "tensor_parallel_degree": useful_degree(job._replace(B=B), chip, parameters, hop)}


WAYS = {  # out of a large cache: its model and dtype, instead of these
    "as it is": lambda cfg, dtype: (cfg, dtype),
    "grouped queries, K=1": lambda cfg, dtype: (replace(cfg, K=1), dtype),
    "int8": lambda cfg, dtype: (cfg, "int8"),
    "both": lambda cfg, dtype: (replace(cfg, K=1), "int8")}


def million(job, chip, chips, weights, context=1_000_000):
    """Job, Chip, int, bytes -> list of dict: what a very long sequence's cache takes, and the ways
    out of it."""
    found, told = [], []
    ways = {name: way(job.cfg, job.cache_dtype) for name, way in WAYS.items()}
    for way, (cfg, dtype) in ways.items():
        if (cfg, dtype) in [known for name, known in ways.items() if name in told]:
            continue
        told.append(way)
        held = kv_bytes(cfg, 1, context, dtype)
        found.append({"way": way, "cache_bytes": held, "bytes_per_chip": held / chips,
                      "chips_needed": math.ceil((held + weights) / chip.memory),
                      "generate_seconds": (held + weights) / chips / chip.read})
    return found


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


def si(x, unit):
    """number, unit -> str: three digits and a prefix."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"),
                         (1, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n")):
        if abs(x) >= 0.9995 * size:
            return f"{x / size:.{max(0, 2 - int(math.log10(max(1, x / size * 1.0005))))}f} " \
                   f"{prefix}{unit}"
    return f"0 {unit}"


PLAN = (  # a line of the napkin: what it says, and the figure
    ("parameters", lambda n: f"{n['parameters']:,.0f}"),
    ("of them multiplied for each token", lambda n: f"{n['multiplied_parameters']:,.0f}"),
    ("weights", lambda n: si(n["weight_bytes"], "B")),
    ("cache of a token", lambda n: si(n["cache_bytes_per_token"], "B")),
    ("cache of a sequence", lambda n: si(n["cache_bytes_per_sequence"], "B")),
    ("chips that share a copy, copies", lambda n: f"{n['chips_per_copy']}, {n['copies']}"),
    ("sequences that fit, in theory", lambda n: f"{n['max_batch']}"),
    (f"with {HELD_BACK:.0%} of memory held back", lambda n: f"{n['batch_with_room']}"),
    ("critical batch", lambda n: f"{n['critical_batch']:.0f}"),
    ("batch taken", lambda n: f"{n['batch']}"),
    ("its cache", lambda n: si(n["cache_bytes"], "B")),
    ("a generate step reads", lambda n: si(n["step_bytes"], "B")),
    ("and takes", lambda n: si(n["generate_seconds"], "s")),
    ("or, with links behind products (rings)", lambda n: si(n["generate_hidden_seconds"], "s")),
    ("which makes", lambda n: f"{n['tokens_per_second']:,.0f} tokens/s"),
    ("a token at batch 1 takes", lambda n: si(n["seconds_per_token_alone"], "s")),
    ("prefill of one sequence", lambda n: si(n["first_token_seconds"], "s")),
    ("prefill of the batch", lambda n: si(n["prefill_seconds"], "s")),
    ("or, with links behind products", lambda n: si(n["prefill_hidden_seconds"], "s")),
    ("useful tensor-parallel degree", lambda n: f"{n['tensor_parallel_degree']}"),
    ("weights over memory, a part each", lambda n: si(n["weights_over_memory_seconds"], "s")),
    ("weights over links (FSDP), all each",
     lambda n: si(n["weights_over_links_seconds"], "s")))


def print_plan(columns, chips):
    """dict of heading -> napkin, int -> the table, and what the first one's parts are bound by."""
    print(f"{'':42}" + "".join(f"{heading:>20}" for heading in columns))
    for label, text in PLAN:
        print(f"{label:42}" + "".join(f"{text(n):>20}" for n in columns.values()))
    for heading, n in columns.items():
        if not n["fits"]:
            print(f"DOES NOT FIT ({heading}): batch {n['batch']} takes more memory: --chips "
                  f"{n['chips_needed']}, or a smaller --batch, --weights or --cache")
    for word, key in (("prefill", "prefill_parts"), ("generate", "generate_parts")):
        for part in next(iter(columns.values()))[key]:
            print(f"{word:8}  {part['name']:13}  {si(part['flops'], 'FLOP'):>11}  "
                  f"{si(part['bytes'], 'B'):>8}  {si(part['seconds'], 's'):>8}  bound by "
                  + part["bound"] + (f", {part['hops']} hops" if "hops" in part else ""))
    if chips > 1:
        print("FSDP is for training: a step that makes one token a row has nothing to hide the "
              "weights' trip behind")


def plan(args):
    """Prints the napkin of a model on chips that need not be here."""
    if args.compile:
        check_compiler(args.chip[0])
    name, cfg = args.model
    if args.kv_heads:
        cfg = replace(cfg, K=args.kv_heads)
    cfg = replace(cfg, dtype="float32" if args.weights == "float32" else "bfloat16")
    (chip_name, chip), B = args.chip, args.batch
    job = Job("generate", name, cfg, B or 1, args.context, 0, args.weights, args.cache,
              int8=args.int8 or default_int8(chip))
    numbers = {"exact": napkin(job, chip, args.chips, None, B, args.hop)}
    if args.parameters:
        numbers = {f"{args.parameters:g} parameters":
                   napkin(job, chip, args.chips, args.parameters, B, args.hop), **numbers}
    first = next(iter(numbers.values()))
    print(f"{name} on {args.chips} x {chip_name} ({chip.source}): "
          f"{si(chip.flops[products_in(job)], 'FLOP/s')} in {products_in(job)}, "
          f"{si(chip.read, 'B/s')}, {si(chip.memory, 'B')}, "
          f"links {si(chip.link, 'B/s')} an axis ({chip.axes})\n"
          f"weights {args.weights}, cache {args.cache}, context {args.context}")
    print_plan(numbers, args.chips)
    ways = million(job, chip, args.chips, first["weight_bytes"])
    times = 1_000_000 / args.context
    print(f"at 1,000,000 tokens the cache is {times:.0f} times as large:")
    for way in ways:
        print(f"  {way['way']:22}{si(way['cache_bytes'], 'B'):>8} a sequence, "
              f"{si(way['bytes_per_chip'], 'B'):>8} a chip with slots over {args.chips}; "
              f"{way['chips_needed']} chip(s) hold it and the weights; "
              f"a step {si(way['generate_seconds'], 's')}")
    trained = None
    if args.train:
        trained = training(job._replace(B=B or 4 * args.chips, dtype=cfg.dtype), chip, args.chips,
                           args.tokens, args.mfu, args.parameters)
        print_training(trained)
    if args.compile:
        compiled = compiled_plan(job._replace(new=min(16, args.context - 1)), args, numbers, ways)
    exact = {"exact": numbers["exact"]} if args.parameters else {}
    finish(args, model=name, chip=chip_name, chips=args.chips, context=args.context,
           weights=args.weights, cache=args.cache, **first, million=ways, training=trained, **exact,
           **({"compiled": compiled} if args.compile else {}))


def largest(fits, low, high):
    """int -> bool, int, int -> int: the largest that fits, of `low` (which does) to `high` - 1."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def compiled_plan(job, args, numbers, ways):
    """Job, args, napkins, ways -> dict: what the chip's compiler accepts of a plan: the largest
    batch, and a step at a million tokens on as many chips as the plan says."""
    (name, _), rows = args.chip, []
    told = {"max_batch": None, "million": rows}
    job = job._replace(prompt=args.context - job.new)

    def tried(job, chips):
        try:
            layout = "sequence" if job.cfg.K % (chips * TARGETS[name].devices) else "heads"
            row = ask(on_chips(job, name, chips, layout=layout))
        except ValueError as error:
            raise ValueError(f"--compile on {chips} chips: {error}") from None
        say(f"B={job.B} S={job.prompt + job.new} on {chips} x {name}: "
            + (f"fits, {si(row['peak_bytes'], 'B')} of {si(row['memory_bytes'], 'B')} a device"
               if row["fits"] else f"refused: {row['message']}"))
        return row

    with compilers() as ask:
        most = max(n["max_batch"] for n in numbers.values())
        told["max_batch"] = largest(lambda B: tried(job._replace(B=B), args.chips)["fits"], 0,
                                    int(1.1 * most) + 2)
        print(f"compiled: the largest batch that {name}'s compiler accepts is {told['max_batch']}, "
              "beside " + ", ".join(f"{n['max_batch']} and {n['batch_with_room']} ({heading})"
                                    for heading, n in numbers.items()))
        for way in ways:
            cfg, cache = WAYS[way["way"]](job.cfg, job.cache_dtype)
            chips = min((n for n in map(chips_of, TARGETS[name].slices.split())
                         if n >= way["chips_needed"]), default=None)
            if chips is None or way["chips_needed"] == 1:
                chips = 1 if chips else chips_of(TARGETS[name].slices.split()[-1])
            row = tried(job._replace(B=1, cfg=cfg, cache_dtype=cache,
                                     prompt=1_000_000 - job.new), chips)
            rows.append({"way": way["way"], "chips": chips, **{key: row[key] for key in (
                "fits", "peak_bytes", "memory_bytes", "compiler_seconds", "message")}})
            print(f"compiled at 1,000,000 tokens, {way['way']}: {way['chips_needed']} chip(s) by "
                  f"the plan; on {chips} " + (
                      f"it fits: {si(row['peak_bytes'], 'B')} of {si(row['memory_bytes'], 'B')} a "
                      "chip" if row["fits"] else f"it is refused: {row['message']}")
                  + (f", {si(row['compiler_seconds'], 's')} a step by its cycles"
                     if row["compiler_seconds"] else ""))
    return told


def chips_of(shape):
    """str -> int: chips of a slice."""
    return math.prod(map(int, shape.split("x")))


def print_training(t):
    """dict of `training` -> its lines."""
    bound = "communication bound" if t["communication_bound"] else "hidden behind the products"
    print(f"training on {t['tokens']:.3g} tokens, {t['batch']} sequences a step "
          f"({t['tokens_per_step']:,} tokens):\n"
          f"  a step multiplies {si(t['step_flops'], 'FLOP')} (6BP: "
          f"{si(t['weight_flops'], 'FLOP')}, attention: {si(t['attention_flops'], 'FLOP')}), at "
          f"{t['mfu']:.0%} MFU {si(t['step_seconds'], 's')}; all of it {t['days']:,.1f} days\n"
          f"  f32 masters and Adam's two means: {si(t['optimizer_bytes'], 'B')}, gradients "
          f"{si(t['gradient_bytes'], 'B')}: {si(t['bytes_per_chip'], 'B')} a chip beside "
          "activations"
          + ("" if t["fits"] else ", WHICH DOES NOT FIT: more --chips") + "\n"
          f"  FSDP sends {si(t['fsdp_bytes_per_chip'], 'B')} a chip, {si(t['fsdp_seconds'], 's')}, "
          f"beside {si(t['compute_seconds'], 's')} of products at full speed: {bound}")


# ------------------------------------------------------------------------------------------ program


class Program(NamedTuple):
    """A step, on one device or on the devices of a mesh, here or elsewhere."""
    step: Callable     # to be jitted; run on the host where nothing is donated
    make: Callable     # (params, key) -> its first arguments; traced, it says their shapes
    donated: tuple     # which of them
    feed: Callable     # (result, arguments) -> the next call's


RINGS = {0: (shard.gather_matmul, shard.matmul_scatter),
         1: (shard.gather_matmul_ring, shard.matmul_scatter_ring),
         2: (partial(shard.gather_matmul_ring, both=True),
             partial(shard.matmul_scatter_ring, both=True))}


def functions(job, mesh):
    """Job, Mesh or None -> namespace of the model's functions, on one device or split."""
    cfg = job.cfg
    if mesh is None:
        read = partial(prefill, rows=rows_at_a_time(job))
        return SimpleNamespace(loss=loss, **{name: partial(fn, cfg=cfg) for name, fn in dict(
            prefill=read, extend=extend, unembed=unembed, generate=generate,
            speculate=speculate).items()}, empty=partial(empty, cfg))
    enter, leave = RINGS[job.ring]
    split = dict(cfg=cfg, mesh=mesh, layout=job.layout, enter=enter)
    by_hand = partial(shard.sharded_loss, mesh=mesh, enter=enter, leave=leave, keep=job.keep)
    return SimpleNamespace(
        loss=by_hand if job.by == "hand" else partial(shard.fsdp_loss, mesh=mesh),
        unembed=partial(shard.tp_unembed, **split),
        empty=lambda B, S, dtype: shard.tp_empty(cfg, B, S, dtype, mesh, job.layout),
        **{name: partial(getattr(shard, f"tp_{name}"), leave=leave, **split)
           for name in ("prefill", "extend", "generate", "speculate")})


def build_train(job, mesh):
    """-> a whole step of AdamW on random tokens, from f32 masters that are its own."""
    def make(params, key):
        params = jax.tree.map(lambda w: jnp.array(w, jnp.float32), params)  # a copy: it is donated
        params = shard.stack(params) if mesh and job.by == "hand" else params
        tokens = jax.random.randint(key, (job.B, job.prompt + 1), 0, job.cfg.V)
        return params, adam_init(params), tokens

    step = partial(train_step, cfg=job.cfg, lr=1e-4, loss=functions(job, mesh).loss)
    return Program(step, make, (0, 1), lambda out, args: (*out[:2], args[2]))


def rows_at_a_time(job):
    """Job -> int: of a prefill. On this machine's CPU the largest divisor of B, from 2 on, whose
    rows hold 1,024 to 2,048 tokens; elsewhere, or where there is none, B."""
    B, T = job.B, job.prompt
    some = [rows for rows in range(2, B) if B % rows == 0 and 1024 <= rows * T <= 2048]
    return max(some, default=B) if not job.chip and on_cpu() and B * T > 2048 else B


def slots(job, S):
    """Job, int -> int: S, or where slots are split the next number that divides."""
    by_slots = shard.LAYOUTS[job.layout].letter == "S"
    n = shard.as_axes(dict(job.mesh).get("tensor", 1))[-1] if by_slots else 1
    return -(-S // n) * n


def empty_cache(job, S, mesh=None):
    """Job, int, Mesh or None -> Cache."""
    cache = init_cache(job.cfg, job.B, slots(job, S), job.cache_dtype)
    return shard.as_laid_out(cache, mesh, job.layout) if mesh else cache


def behind(cache, length):
    """Cache, int -> Cache: every row holds so many tokens, so that every run starts there."""
    return cache._replace(length=jnp.full_like(cache.length, length))


def build_prefill(job, mesh):
    """-> B random prompts of T tokens, read into a cache of T slots."""
    read, B, T = functions(job, mesh).prefill, job.B, job.prompt
    return Program(lambda params, cache, tokens: read(params, cache, tokens, jnp.full((B,), T)),
                   lambda params, key: (params, empty_cache(job, T, mesh),
                                        jax.random.randint(key, (B, T), 0, job.cfg.V)),
                   (1,), lambda out, args: (args[0], out[1], args[2]))


def build_generate(job, mesh):
    """-> `new` steps behind a prompt, greedily, in one scan. The prompt's slots hold zeros."""
    go_on = functions(job, mesh).generate
    return Program(lambda params, cache, logits: go_on(
                       params, behind(cache, job.prompt), logits, jax.random.key(0), job.new),
                   lambda params, key: (params, empty_cache(job, job.prompt + job.new, mesh),
                                        jax.random.normal(key, (job.B, job.cfg.V), "float32")),
                   (1, 2), lambda out, args: (args[0], out[2], out[1]))


def build_verify(job, mesh):
    """-> the last token and n_draft more are read behind a prompt, and all make logits."""
    fns = functions(job, mesh)

    def step(params, cache, tokens):
        x, cache = fns.extend(params, behind(cache, job.prompt), tokens)
        return fns.unembed(params, x), cache

    return Program(step, lambda params, key: (
        params, empty_cache(job, verify_slots(job), mesh),
        jax.random.randint(key, (job.B, job.n_draft + 1), 0, job.cfg.V)),
        (1,), lambda out, args: (args[0], out[1], args[2]))


def build_speculate(job, mesh):
    """-> `new` tokens behind a prompt of one sentence again and again, drafted by n-grams. Worth
    looking at with parameters that know the sentence: see `learn`."""
    cfg, T, S = job.cfg, job.prompt, verify_slots(job)
    rounds, draft = functions(job, mesh).speculate, ngram_draft(cfg, job.n_draft)

    def make(params, key):
        known = np.resize(np.frombuffer(SENTENCE.encode(), np.uint8).astype(np.int32), T)
        text = jnp.zeros((job.B, S), jnp.int32).at[:, :T].set(known % cfg.V)
        _, cache = prefill_jit(params, empty_cache(job, S), text[:, :T], jnp.full(job.B, T), cfg)
        return params, shard.as_laid_out(cache, mesh, job.layout) if mesh else cache, text

    return Program(lambda params, cache, text: rounds(  # the last token is not read yet
                       params, behind(cache, T - 1), text, jax.random.key(0), job.new, draft=draft,
                       state=None),
                   make, (1,), lambda out, args: (args[0], out[1], args[2]))


def build_serve(job, mesh):
    """-> REQUESTS * B random prompts through B rows. Runs on the host: it compiles itself."""
    S, shape = job.prompt + job.new, (REQUESTS * job.B, job.prompt)

    def step(params, prompts):
        return dict(serve(params, np.asarray(prompts), job.B, S, job.new, jax.random.key(0),
                          job.cfg, stride=min(8, job.new), cache_dtype=job.cache_dtype))

    return Program(step, lambda params, key: (params, jax.random.randint(
        key, shape, 0, job.cfg.V)), (), lambda out, args: args)


def build_refill(job, mesh):
    """-> one row of a cache of B starts over with a prompt: `serve`'s other step."""
    S = job.prompt + job.new

    def step(params, cache, logits, prompt):
        return refill(params, cache, logits, 0, prompt, jnp.full((1,), job.prompt), job.cfg)

    return Program(step, lambda params, key: (
        params, empty_cache(job, S), jax.random.normal(key, (job.B, job.cfg.V), "float32"),
        jax.random.randint(key, (1, job.prompt), 0, job.cfg.V)),
        (1, 2), lambda out, args: (args[0], out[1], out[0], args[3]))


def build_product(job, mesh):
    """-> a collective matmul of B rows of ones: gather_matmul or matmul_scatter."""
    cfg, gathers = job.cfg, job.phase == "gather_matmul"
    last, out = jax.P(None, None, "tensor"), jax.P(*[None] * (not gathers), "tensor")
    enter, leave = RINGS[job.ring]
    return Program(
        jax.shard_map(lambda x, w: enter(x, (w,))[0] if gathers else leave(x, w), mesh=mesh,
                      in_specs=(last, out), out_specs=last),
        lambda params, key: (jnp.ones((job.B, 1, cfg.E if gathers else cfg.F), cfg.dtype),
                             params.layers[0].w_gate if gathers else params.layers[0].w_down),
        (), lambda out, args: args)


def build_attention(job, mesh):
    """-> causal attention of B rows of ones, forwards and backwards."""
    cfg = job.cfg

    @jax.named_scope("attention")
    def step(q, k, v):
        out, back = jax.vjp(causal_attention, q, k, v)
        return back(out)

    return Program(step, lambda params, key: (
        jnp.ones((job.B, job.prompt, cfg.H, cfg.D), cfg.dtype),
        *(jnp.ones((job.B, cfg.K, job.prompt, cfg.D), cfg.dtype),) * 2), (),
        lambda out, args: args)


def attention_cost(job):
    """What one layer of `train_flops` has of it."""
    one = train_flops(replace(job.cfg, L=1), job.B, job.prompt)
    flops = {name: one[name] for name in ("scores", "values")}
    return cost(job, job.prompt, job.prompt, job.B * job.prompt, flops, 0, 0, job.cfg.dtype)


def speculated(job, out):
    """Job, result -> dict: a row's rounds, and what came of them. A step is a round of all rows:
    the rows that are done wait for the others."""
    counts = np.asarray(out[3])  # of rounds in which 0, 1, .. n_draft were accepted
    rounds, accepted = counts.sum(1), counts @ np.arange(job.n_draft + 1)
    return {"steps": int(rounds.max()), "tokens": float((rounds + accepted).sum() / rounds.max()),
            "acceptance": float(accepted.sum() / rounds.sum() / job.n_draft),
            "tokens_per_round": float(1 + accepted.sum() / rounds.sum())}


def sent(job):
    """Job -> list of events or None: what each device sends in a step, by formula; None where that
    is the compiler's choice."""
    if job.by == "compiler":
        return None
    if job.phase in PRODUCTS:
        return shard.trips(job.cfg, job.B, dict(job.mesh)["tensor"], job.ring)[
            PRODUCTS.index(job.phase)]
    T = {"generate": 1, "verify": job.n_draft + 1, "speculate": job.n_draft + 1}
    return shard.comm_events(job.cfg, job.phase, job.B, T.get(job.phase, job.prompt), **dict(
        job.mesh), layout=job.layout, ring=job.ring, dtype=job.dtype, cache_dtype=job.cache_dtype,
        keep=job.keep if job.phase == "train" else None)


def on_links(job, link):
    """Job, bytes/s one way -> dict: what each device sends in a step, collective by collective, and
    the seconds that it takes; None where that is the compiler's choice, and nothing alone."""
    events = sent(job) if job.mesh else []
    if events is None:
        return {"predicted_collectives": None, "link_seconds": None, "hops": None}
    formula, ways = shard.tally(events), max(1, job.ring)
    hops = shard.hops(events, ways)
    return {"predicted_collectives": formula, "hops": hops,
            "link_seconds": shard.comm_seconds(formula, link, ways, hops)}


class Phase(NamedTuple):
    """cost(job) predicts a step; build(job, mesh) gives its Program; tell(job, result) says how
    many steps that was, and what else the row should hold."""
    mark: str  # in the picture
    cost: Callable
    build: Callable
    tell: Callable = lambda job, out: {"steps": 1}


PRODUCTS = ("gather_matmul", "matmul_scatter")
PARTIAL = (*PRODUCTS, "attention", "refill")  # no commands of their own
PHASES = {"train": Phase("T", train_cost, build_train,
                         lambda job, out: {"steps": 1, "loss": float(out[2])}),
          "prefill": Phase("P", prefill_cost, build_prefill),
          "generate": Phase("G", generate_cost, build_generate,
                            lambda job, out: {"steps": job.new}),
          "verify": Phase("V", verify_cost, build_verify),
          "speculate": Phase("D", verify_cost, build_speculate, speculated),
          "serve": Phase("S", serve_cost, build_serve),
          "refill": Phase("R", lambda job: prefill_cost(job._replace(B=1)), build_refill),
          "attention": Phase("A", attention_cost, build_attention),
          **{name: Phase("M", product_cost, build_product) for name in PRODUCTS}}


def abstract(job):
    """Job -> Params: shapes of its parameters."""
    cfg = job.cfg
    return jax.eval_shape(lambda: in_dtype(init(jax.random.key(0), cfg, cfg.dtype), cfg, job.dtype,
                                           job.int8))


def mesh_of(job, devices=None):
    """Job, devices -> Mesh or None where it is of one device."""
    return shard.make_mesh(devices, **dict(job.mesh)) if job.mesh else None


def placed(job, mesh, args):
    """Job, Mesh, arguments -> their shardings on the real machine, one for what is alike."""
    cfg, rows = job.cfg, jax.P(shard.axes_of(mesh, "data") or None)
    rules, draws = shard.layout_rules(mesh, job.layout), jax.P(*rows, shard.axes_of(mesh, "tensor"))
    if job.phase == "train":
        rules = {**(shard.TENSOR if job.by == "hand" else {}), **shard.FSDP}
    elif job.phase in PRODUCTS:
        rules = dict(F="tensor")
        shard.check_rules(cfg, mesh, dict(E="tensor"))
    shard.check_rules(cfg, mesh, rules)

    def spec(a):
        if isinstance(a, Params):
            if isinstance(a.layers, tuple) and not hasattr(a.layers, "wq"):
                return shard.specs_of(a, cfg, mesh, rules)
            return shard.stacked(shard.specs(cfg, mesh, rules))
        if isinstance(a, Adam):
            return Adam(jax.P(), spec(a.m), spec(a.v))
        if isinstance(a, Cache):
            shard.check_layout(a, mesh, job.layout)
            return shard.cache_specs(mesh, job.layout)
        return draws if a.shape == (job.B, cfg.V) and a.dtype == jnp.float32 else rows

    split = tuple(map(spec, args))
    if job.phase in PRODUCTS:
        split = jax.P(None, None, "tensor"), jax.P(*[None] * PRODUCTS.index(job.phase), "tensor")
    return jax.tree.map(partial(jax.NamedSharding, mesh), split)


def program(step, args, compiled):
    """-> dict: flops of the jaxpr's products (None where a loop's length is unknown), and what the
    compiled program holds at once: its arguments, its results but for those that take an argument's
    place (alias), and temporaries."""
    try:
        flops = traced_flops(step, *args)
    except ValueError:
        flops = None
    held = compiled.memory_analysis()
    sizes = {name: getattr(held, f"{name}_size_in_bytes")
             for name in ("argument", "output", "alias", "temp")}
    return {"program_flops": flops, **{f"{name}_bytes": size for name, size in sizes.items()},
            "peak_bytes": sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]}


class Prepared(NamedTuple):
    """A phase that is ready to run."""
    call: Callable  # -> result, of one run after another
    row: dict       # what the program says
    ops: list       # of the compiled program; None where it runs on the host


def prepare(job, params, seed, traced=False):
    """Job, Params or None, int, bool -> Prepared: on this machine's first device, or on its mesh,
    where parameters are made as they are split. To be traced, a GPU starts each kernel by itself:
    of those that it starts together a trace does not say which operation they are."""
    mesh, cfg, key = mesh_of(job), job.cfg, jax.random.key(seed)
    step, make, donated, feed = PHASES[job.phase].build(job, mesh)
    if mesh:
        def born(key):
            return make(in_dtype(init(key, cfg, cfg.dtype), cfg, job.dtype, job.int8), key)
        args = jax.jit(born, out_shardings=placed(job, mesh, jax.eval_shape(born, key)))(key)
    else:
        args = make(params, key)
    row, ops = {"compile_seconds": 0.0}, None
    if job.phase != "serve":
        start = time.perf_counter()
        apart = {"xla_gpu_enable_command_buffer": ""}
        compiled = jax.jit(step, donate_argnums=donated).lower(*args).compile(
            apart if traced and jax.default_backend() == "gpu" else None)
        seconds, ops = time.perf_counter() - start, operations(compiled.as_text(), job)
        row = program(step, args, compiled) | {"compile_seconds": seconds,
                                               "collectives": collectives(ops)}
        if mesh:
            row["counted"] = shard.traced_comm(step, *args)
        step = compiled

    def call():
        nonlocal args
        out = jax.block_until_ready(step(*args))
        args = feed(out, args)
        return out

    return Prepared(call, row, ops)


# ---------------------------------------------------------------------------------- compiled text


REGIONS = ("embed", "qkv", "attention", "out", "mlp", "unembed", "sample", "loss", "cast",
           "optimizer")  # that the model's functions name: jax.named_scope
SCHEDULED = {"while": ("body",), "call": ("to_apply",), "conditional": (
    "true_computation", "branch_computations")}  # what runs another computation, and which
HOLDING = {"fusion", "async-start", "call-start", "call-update"}  # a computation
UNSEEN = {"tuple", "get-tuple-element", "parameter", "constant", "bitcast", "after-all",
          "partition-id", "copy-done", "slice-done", "opt-barrier"}  # take no time
WRAPPERS = {"tuple", "while", "conditional", "call", "get-tuple-element", "parameter", "constant"}
MOVES = {"copy", "transpose", "bitcast", "slice", "concatenate", "reshape", "broadcast", "pad",
         "dynamic-slice", "dynamic-update-slice", "copy-start", "copy-done", *WRAPPERS}
PARTS = {"slice", "dynamic-slice", "gather"}  # read a part of their first operand
WRITES = {"dynamic-update-slice": 1, "scatter": 2}  # write an operand, this one, into their first
KINDS = {"all-gather": "all_gather", "all-reduce": "all_reduce", "all-to-all": "all_to_all",
         "reduce-scatter": "reduce_scatter", "collective-permute": "permute"}
ABSURD = 1e12  # cycles: what stands where the compiler has no estimate


class Instruction(NamedTuple):
    name: str
    opcode: str
    shape: str      # of its result, with layouts
    operands: list
    calls: str      # the computation that a fusion holds, or that a loop runs
    path: str       # of named regions
    frame: str      # of the source line
    line: str


class Array(NamedTuple):
    """One array of a shape in compiled text."""
    bytes: int   # of its numbers
    padded: int  # that it takes: a TPU pads its last dimensions to tiles
    far: bool    # in the chip's main memory; not in a core's own, S(1) and so on


class Text(NamedTuple):
    """A compiled program's text, read."""
    found: dict   # Instruction by name
    inside: dict  # names by computation, in the order of the schedule
    entry: str    # the computation that runs first
    devices: int  # that it runs on


def parse_program(text):
    """str -> Text."""
    found, inside, computation, entry = {}, {}, None, None
    for line in text.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)", line)
        if match:
            name, shape, opcode, rest = match.groups()
            arguments = rest if opcode == "parameter" else rest.split("), ")[0]
            called = "|".join(("calls", *SCHEDULED.get(opcode.removesuffix("-start"), ())))
            calls, path, frame = (re.search(pattern, rest) for pattern in (
                rf"(?:{called})=\{{?%?([\w.\-]+)", r'op_name="([^"]*)"', r"stack_frame_id=(\d+)"))
            found[name] = Instruction(
                name, opcode, shape, re.findall(r"%([\w.\-]+)", arguments),
                *(match[1] if match else "" for match in (calls, path, frame)), line)
            inside.setdefault(computation, []).append(name)
        elif line.endswith("{") and not line.startswith(("HloModule", " ")):
            computation = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            entry = computation if line.startswith("ENTRY") else entry
    told = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    return Text(found, inside, entry, int(told[1]) if told else 1)


def arrays(shape):
    """str -> list of Array: `bf16[110,4,2048,256]{3,1,2,0:T(4,128)(2,1)S(1)}`, or a tuple of such.
    A layout gives dimensions from the last one in memory, and their tile."""
    found = []
    for dtype, sizes, layout in re.findall(
            r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\](?:\{([^{}]*)\})?", shape):
        bits = re.search(r"\d+", dtype)
        sizes = [int(size) for size in sizes.split(",") if size]
        order, tile = layout.split(":")[0], re.search(r"T\(([\d,]+)\)", layout)
        held = [sizes[int(i)] for i in order.split(",")] if order else sizes[::-1] or [1]
        for i, size in enumerate(reversed(tile[1].split(",")) if tile else ()):
            if i < len(held):
                held[i] = -(-held[i] // int(size)) * int(size)
        each = int(bits[0]) / 8 if bits else 1
        found.append(Array(int(math.prod(sizes) * each), int(math.prod(held) * each),
                           not re.search(r"S\([1-9]", layout)))
    return found


def far_bytes(shape):
    """str -> int: what reading or writing it whole moves in main memory."""
    return sum(a.padded for a in arrays(shape) if a.far)


def source_lines(text):
    """str -> dict: "file.py:line function" by frame, from the tables at the program's head."""
    def table(name):
        found = re.search(rf"^{name}\n((?:\d+ .*\n)+)", text, re.M)
        return dict(line.split(" ", 1) for line in found[1].splitlines()) if found else {}

    def field(entry, name):
        found = re.search(rf"{name}=(\d+)", entry)
        return found[1] if found else ""

    files, functions, places = map(table, ("FileNames", "FunctionNames", "FileLocations"))
    lines = {}
    for frame, entry in table("StackFrames").items():
        place = places.get(field(entry, "file_location_id"), "")
        file = files.get(field(place, "file_name_id"), "").strip('"')
        function = functions.get(field(place, "function_name_id"), "").strip('"')
        lines[frame] = f"{pathlib.Path(file).name}:{field(place, 'line')} " \
                       f"{function.replace('.<locals>', '')}"
    return lines


def named_region(path):
    """str -> the innermost of REGIONS in it, or None."""
    return next((word for word in reversed(re.split(r"[/()]", path)) if word in REGIONS), None)


def origins(program):
    """Text -> function: name -> the Instruction that says where it belongs, or None.

    The compiler drops the name of some operations that it makes, such as a product of one row.
    Those belong where their result is used, inside a fusion as outside, or where it came from.
    """
    found, inside = program.found, program.inside
    users = {}
    for name, op in found.items():
        for place, operand in enumerate(op.operands):
            users.setdefault(operand, []).append((name, place))

    def known(name, seen):
        if name in seen or name not in found or len(seen) > 200:
            return None
        seen.add(name)
        op = found[name]
        if named_region(op.path):
            return op
        for user, place in users.get(name, ()):
            within = [p for p in inside.get(found[user].calls, ())
                      if found[p].opcode == "parameter" and f"parameter({place})" in found[p].line]
            for candidate in (*within, user):
                if found[candidate].opcode not in WRAPPERS or candidate in within:
                    origin = known(candidate, seen)
                    if origin:
                        return origin
        for operand in op.operands:
            if operand in found and found[operand].opcode not in WRAPPERS:
                origin = known(operand, seen)
                if origin:
                    return origin
        return None

    return lambda name: known(name, set())


def contents(program, op):
    """Text, Instruction -> list of Instruction: itself, or what a fusion holds, fusions inside it
    too."""
    if op.opcode not in HOLDING:
        return [op]
    if op.opcode == "call-update":
        return contents(program, program.found[op.operands[0]])
    return [inner for name in program.inside.get(op.calls, ())
            for inner in contents(program, program.found[name])]


def kind_of(program, op):
    """Text, Instruction -> str: product, copy or elementwise."""
    held = {inner.opcode for inner in contents(program, op)}
    if held & {"dot", "convolution"} or re.search(r'target="[^"]*(gemm|matmul|dot)', op.line):
        return "product"
    return "copy" if held <= MOVES else "elementwise"


def parameter_of(program, computation, place):
    """Text, str, int -> str or None: the name of a computation's parameter."""
    return next((name for name in program.inside[computation]
                 if program.found[name].opcode == "parameter"
                 and f"parameter({place})" in program.found[name].line), None)


def part_read(program, name, computation, whole):
    """Text, str, str, int -> int: bytes that a fusion reads of its parameter, of `whole`: where it
    only slices it, those; where it only writes into it, none."""
    total = 0
    for user in (program.found[user] for user in program.inside[computation]):
        if name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += part_read(program, user.name, computation, whole)
        elif user.opcode in PARTS and user.operands[0] == name:
            total += sum(a.padded for a in arrays(user.shape))
        elif user.opcode == "fusion":
            inner = parameter_of(program, user.calls, user.operands.index(name))
            total += part_read(program, inner, user.calls, whole) if inner else whole
        elif user.opcode not in WRITES or user.operands[0] != name:
            return whole
    return min(total, whole)


def part_written(program, name):
    """Text, str -> int: bytes that an instruction, at the root of a fusion, writes: of an update in
    place what is new."""
    root = program.found[name]
    if root.opcode in ("bitcast", "tuple", "fusion"):
        below = [program.inside[root.calls][-1]] if root.opcode == "fusion" else root.operands
        return sum(part_written(program, name) for name in below)
    new = root.operands[WRITES[root.opcode]] if root.opcode in WRITES else None
    return sum(a.padded for a in arrays(program.found[new].shape)) if new in program.found \
        else far_bytes(root.shape)


def moved(program, op):
    """Text, Instruction -> int, int: bytes that it reads and writes in main memory.

    Of what is sliced, gathered or updated in place only that part. A prefetch counts where it
    starts.
    """
    given = [(place, program.found[name]) for place, name in enumerate(op.operands)
             if name in program.found]
    whole = sum(far_bytes(operand.shape) for _, operand in given)
    if op.opcode in UNSEEN | WRAPPERS:
        return 0, 0
    if op.opcode in ("copy-start", "slice-start"):
        made = arrays(op.shape)[op.opcode == "slice-start"]
        return arrays(given[0][1].shape)[0].far * made.padded, made.far * made.padded
    if op.opcode in PARTS:
        return min(whole, far_bytes(op.shape)), far_bytes(op.shape)
    if op.opcode in WRITES:
        return 0, part_written(program, op.name)
    if op.opcode != "fusion":
        return whole, far_bytes(op.shape)
    reads = 0
    for place, operand in given:
        inner, size = parameter_of(program, op.calls, place), far_bytes(operand.shape)
        reads += part_read(program, inner, op.calls, size) if size and inner else size
    return reads, min(part_written(program, program.inside[op.calls][-1]), far_bytes(op.shape))


def product_flops_of(program, op):
    """Text, Instruction -> int: of the products that it holds, from their shapes."""
    def sizes(shape):
        return [int(size) for size in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if size]

    total = 0
    for inner in contents(program, op):
        if inner.opcode not in ("dot", "convolution") or not all(
                name in program.found for name in inner.operands[:2]):
            continue
        left, right = (sizes(program.found[name].shape) for name in inner.operands[:2])
        if inner.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", inner.line)[1]
            total += 2 * math.prod(sizes(inner.shape)) * math.prod(
                left[int(i)] for i in contracted.split(",") if i)
            continue
        a, b, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", inner.line).groups()
        windows = re.search(r"size=([\dx]+)(?: stride=([\dx]+))?(?: pad=([\d_x\-]+))?", inner.line)
        each = 2 * sizes(inner.shape)[out.index("b")] * math.prod(
            right[b.index(letter)] for letter in "io")
        for i, size in enumerate(windows[1].split("x") if windows else ()):
            before = int(windows[3].split("x")[i].split("_")[0]) if windows[3] else 0
            step = int(windows[2].split("x")[i]) if windows[2] else 1
            width, made = left[a.index(str(i))], sizes(inner.shape)[out.index(str(i))]
            each *= sum(0 <= place * step + offset - before < width
                        for place in range(made) for offset in range(int(size))) \
                if made * int(size) < 1e6 else made
        total += each
    return total


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


class Transfer(NamedTuple):
    """What an instruction has to do with a collective."""
    kind: str      # as in shard.comm_bytes
    stage: str     # it is the "whole", a "start" or a "done"
    channel: str   # the same for a start and its done
    route: str     # who sends to whom: what has the same follows one another
    sent: int      # bytes that a device sends
    number: int    # of arrays
    seconds: float  # over the link


def transfer(program, op, target):
    """Text, Instruction, Target or None -> Transfer or None.

    On a TPU a collective may hide in a fusion: a scatter as an all-reduce of which a part is kept;
    an asynchronous gather in what starts it, in each product beside it, and in what ends it.
    """
    held = contents(program, op)
    inner = next((inner for inner in held
                  if re.sub("-(start|done)$", "", inner.opcode) in KINDS), None)
    marks = " ".join(other.line for other in held if other.opcode == "custom-call")
    stage = "done" if "AsyncCollectiveDone" in marks else "start" if op.opcode.endswith(
        ("-start", "-update")) or "AsyncCollectiveStart" in marks else "whole"
    if inner is None or stage == "whole" and "async_collective" in op.calls:
        return None
    kind = KINDS[re.sub("-(start|done)$", "", inner.opcode)]
    kind = "reduce_scatter" if "all-reduce-scatter" in op.calls else kind
    given = [program.found[name] for name in op.operands if name in program.found]
    given = [a for a in given if a.opcode != "call-start" and arrays(a.shape)]
    n = group_size(inner.line, program.devices)
    sent = shard.SENT[kind](sum(a.bytes for each in given for a in arrays(each.shape)), n)
    seconds = 0.0 if target is None else link_seconds(kind, sent, n, target)
    channel, route = ("".join(re.findall(pattern, inner.line)) for pattern in (
        r"channel_id=\d+|chain_id=\S+", r"(?:replica_groups|source_target_pairs)=\S+"))
    return Transfer(kind, stage, channel, route, sent, len(given), seconds)


def group_size(line, devices):
    """str, int -> int: devices that a collective is among, of so many."""
    if "replica_groups={}" in line:
        return devices
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return listed[1].count(",") + 1
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if counted:
        return int(counted[1])
    named = re.search(r"replica_groups=@?mesh\[(.*?)\] ?\{(.*?)\}", line)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(axes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if "source_target_pairs" in line:
        return 2
    raise ValueError(f"a collective among unknown devices: {line.strip()[:200]}")


def repeats(program, op):
    """Text, Instruction -> int or None: how often a `while` runs, where its text says so."""
    told = re.search(r'known_trip_count":\{"n":"(\d+)"', op.line)
    if told:
        return int(told[1])
    names = program.inside.get(re.search(r"condition=%?([\w.\-]+)", op.line)[1], [])
    limits = [int(found[1]) for name in names for found in re.finditer(
        r"s32\[\]\S* constant\((\d+)\)", program.found[name].line)]
    return limits[0] if len(limits) == 1 else None


def link_seconds(kind, size, n, target):
    """str, bytes, int, Target -> seconds: of a collective among n devices, along the slice's axes,
    of which the last ones come first.

    A microsecond a hop to the farthest device; an all-reduce goes there twice, a permute one. Bytes
    go both ways around a ring, or over two axes; one way along a line, as a permute does.
    """
    far, ways, left = 0, 0, n
    for length in reversed(target.torus or (target.wraps,)):
        along = math.gcd(length, left)
        left //= along
        rings = along >= target.wraps
        far += along // 2 if rings else along - 1
        ways += (1 + rings) * (along > 1)
    far = {"permute": 1, "all_reduce": 2 * far}.get(kind, far)
    return far * HOP_SECONDS + size / (
        target.link / 2 * (1 if kind == "permute" else min(2, max(1, ways))))


def estimate(program, op, moved_bytes, target):
    """Text, Instruction, int, Target -> seconds, bool: the larger of its cycles and its bytes; if
    the compiler has no estimate, of its flops and its bytes, and False."""
    if op.opcode.endswith("-start"):
        return 0.0, True
    cycles = float("".join(re.findall(r'"estimated_cycles":"(\d+)"', op.line)) or 0)
    memory = moved_bytes / target.read
    if 0 < cycles < ABSURD:
        return max(cycles / target.clock, memory), True
    took = max(product_flops_of(program, op) / target.flops, memory)
    return took, took == 0  # what takes no time needs no estimate


def step_loop(program, job):
    """Text, Job or None -> str: the loop whose trips are steps, if the phase has one: the entry's
    longest."""
    loops = [name for name in program.inside[program.entry]
             if program.found[name].opcode == "while"]
    if job is None or job.phase not in ("generate", "speculate") or not loops:
        return ""
    return max(loops, key=lambda name: len(program.inside[program.found[name].calls]))


def operations(text, job=None, target=None):
    """str, Job, Target -> list of Op: a compiled program's, in the order of its schedule.

    Everything that is said of a compiled program is a sum over these. `target` is given where its
    compiler's cycles can be used: an operation takes its cycles or its bytes, whichever take
    longer; a transfer its bytes over the link and a microsecond a hop, and delays only what waits
    for it. For generating, a step is one trip of the outermost loop.
    """
    program, lines = parse_program(text), source_lines(text)
    origin, ops, free, stepped = origins(program), [], {}, step_loop(program, job)

    def described(op, link, t, times, computation):
        home, (read, written) = origin(op.name), moved(program, op)
        took, told = (0.0, True) if link or not target else estimate(
            program, op, read + written, target)
        return Op(op.name, op.shape, named_region(home.path) if home else None,
                  link.kind if link else kind_of(program, op),
                  lines.get(home.frame, "") if home else "", read, written, t, t + took, times,
                  computation, told)

    def end_transfer(at, t):  # -> when what waits for it goes on
        done = max(t, ops[at].end)
        ops[at] = ops[at]._replace(waited=done - t, done=done, asynchronous=any(
            not op.number for op in ops[at + 1:]))
        return done

    def add(op, t, times, computation, started):  # -> when the next one may start
        link = transfer(program, op, target)
        if link and link.stage == "done":
            at = next((at for at, channel in started.values() if channel == link.channel), None)
            return t if at is None else end_transfer(at, t)
        ops.append(described(op, link, t, times, computation))
        if link is None:
            return ops[-1].end
        begin = max(t, free.get(link.route, 0.0)) if link.stage == "start" else t
        free[link.route] = end = begin + link.seconds
        ops[-1] = ops[-1]._replace(start=begin, end=end, sent=link.sent, number=link.number)
        if link.stage == "whole":
            return end_transfer(len(ops) - 1, t)
        started[op.name] = len(ops) - 1, link.channel
        return t

    def walk(computation, t, times):  # -> when it ends
        started = {}
        for op in (program.found[name] for name in program.inside[computation]):
            if op.opcode in SCHEDULED and op.calls in program.inside:
                again = (repeats(program, op) or 1) if op.opcode == "while" else 1
                if op.name == stepped:
                    walk(op.calls, t, 1)
                else:
                    t += (walk(op.calls, t, times * again) - t) * again
            elif op.opcode.endswith("-done") and op.operands[0] in started:
                t = end_transfer(started.pop(op.operands[0])[0], t)
            elif op.opcode not in WRAPPERS | UNSEEN and not (  # a call may wait for call-update,
                    op.opcode == "call-start" and op.shape.startswith("((), ")):  # with its data
                t = add(op, t, times, computation, started)
        return t

    walk(program.entry, 0.0, 0 if stepped else 1)
    return ops


def collectives(ops):
    """list of Op -> dict: of a step, by kind: their number, bytes that a device sends, and how many
    are asynchronous."""
    found = {}
    for op in ops:
        if op.number and op.times:
            kind = found.setdefault(op.kind, {"number": 0, "bytes": 0, "asynchronous": 0})
            for name, count in (("number", op.number), ("bytes", op.sent),
                                ("asynchronous", op.number * op.asynchronous)):
                kind[name] += count * op.times
    return found


def step_seconds(ops, read):
    """list of Op, bytes/s -> dict: seconds of a step in all and by region, and the share of those
    operations for which the compiler gives no cycles. What transfers make wait is a region of its
    own, and so is what memory takes beyond the schedule: a prefetch that nothing hides."""
    regions = {}
    for op in ops:
        took = op.waited if op.number else op.end - op.start
        region = "transfers" if op.number else op.region or "?"
        regions[region] = regions.get(region, 0.0) + took * op.times
    total, memory = sum(regions.values()), sum(
        (op.read + op.written) * op.times for op in ops) / read
    if memory > total:
        regions["memory"] = memory - total
    blind = sum((op.end - op.start) * op.times for op in ops if not op.estimated)
    whole = max(total, memory)
    return {"compiler_seconds": whole, "unestimated": blind / whole if whole else 0.0,
            "regions": {name: took for name, took in regions.items() if took}}


def beside(ops):
    """list of Op -> dict: by region, seconds of a step that run between the start and the done of
    an asynchronous transfer."""
    spans, found = {}, {}
    for op in ops:
        if op.asynchronous and op.times:
            spans.setdefault(op.loop, []).append((op.start, op.done))
    for op in ops:
        if not op.number and op.end > op.start and any(
                start <= op.start and op.end <= done for start, done in spans.get(op.loop, ())):
            region = op.region or "?"
            found[region] = found.get(region, 0.0) + (op.end - op.start) * op.times
    return found


def alike(shape):
    """str -> str: dtype and sizes of a shape's first array, whatever their order and layout."""
    dtype, sizes = re.search(r"(\w+)\[([\d,]*)\]", shape).groups()
    return f"{dtype}{sorted(size for size in sizes.split(',') if size != '1')}"


def copied(ops, arguments):
    """list of Op, dict -> int: bytes of arrays alike one of a program's arguments of two dimensions
    or more, a weight or a cache, that a step copies from memory to memory."""
    held = {alike(shape) for shape in arguments.values() if "," in alike(shape)}
    return sum(op.written * op.times for op in ops if op.kind == "copy" and op.read and op.written
               and alike(op.shape) in held and op.written >= arrays(op.shape)[0].padded)


# ------------------------------------------------------------------------------------------ profile


def trace(call, folder):
    """call, path -> (wall seconds, list of (start, end, operation)). Leaves a trace in the folder
    that Perfetto and XProf show."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
        start = time.perf_counter()
        call()
        wall = time.perf_counter() - start
    file = max(pathlib.Path(folder).glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    events = [(row.name, event) for plane in jax.profiler.ProfileData.from_file(str(file)).planes
              for row in plane.lines for event in row.events]
    spans = []
    with warnings.catch_warnings():  # newer Pythons: builtin type event_stats has no __module__
        warnings.simplefilter("ignore", DeprecationWarning)
        for row, event in events:
            name = next((value for key, value in event.stats if key == "hlo_op"), None)
            if name is None and row == "XLA Ops":  # a TPU's
                name = event.name.split(" = ")[0].lstrip("%")
            if name is not None:
                spans.append((event.start_ns / 1e9, event.end_ns / 1e9, name))
    return wall, spans


def profile(prepared, folder=None):
    """Prepared -> dict: operations by time, shares of kinds and regions.

    Shares are of the time that operations took: on a CPU they overlap, so that their sum may be
    more than the wall time. "between" is the share of the wall time in which none ran.
    """
    with tempfile.TemporaryDirectory() as temporary:
        wall, spans = trace(prepared.call, folder or temporary)
    where = {op.name: (op.region, op.kind, op.source) for op in prepared.ops}
    took = {}
    spans = sorted(span for span in spans if span[2] in where)
    busy = until = 0
    for start, end, name in spans:
        region, kind, source = where[name]
        group = took.setdefault((region, kind, source), [0, 0])
        group[0] += end - start
        group[1] += 1
        busy += max(0, end - max(start, until))
        until = max(until, end)
    total = sum(seconds for seconds, _ in took.values()) or 1
    kinds = dict.fromkeys(("weights", "attention", "elementwise", "copies"), 0)
    regions = dict.fromkeys((*REGIONS, None), 0)
    for (region, kind, _), (seconds, _) in took.items():
        kinds["attention" if region == "attention" else
              {"product": "weights", "copy": "copies"}.get(kind, kind)] += seconds / total
        regions[region] += seconds / total
    return {"operations": [
        {"share": seconds / total, "times": times, "region": region, "kind": kind, "source": source}
        for (region, kind, source), (seconds, times) in
        sorted(took.items(), key=lambda item: -item[1][0])],
        "kinds": kinds, "regions": {name or "?": share for name, share in regions.items() if share},
        "wall_seconds": wall, "between": max(0, 1 - busy / wall)}


def print_profile(row, found, most=8):
    """A row, its profile -> the top operations, and one sentence made from them."""
    name, shares = f"{row['phase']} {row['dtype']} B={row['B']}", found["kinds"]
    print(f"\n{name}: share of the operations' time, times, region, kind, source")
    for op in found["operations"][:most]:
        print(f"  {op['share']:6.1%}  x{op['times']:<5} {op['region'] or '?':10} {op['kind']:12} "
              f"{op['source']}")
    print("  regions: " + ", ".join(f"{region} {share:.1%}"
                                    for region, share in found["regions"].items()))
    print(f"{name} takes {row['ratio']:.2f} times what was predicted: of the operations' time "
          f"{shares['weights']:.0%} is the weights' products, {shares['attention']:.0%} attention, "
          f"{shares['elementwise']:.0%} elementwise work, {shares['copies']:.0%} copies; for "
          f"{found['between']:.0%} of the wall time none ran (dispatch)")
    parts = {part["name"]: part["seconds"] for part in row["parts"]}
    if {"weights", "attention"} <= set(parts):
        print("  " + ", ".join(
            f"{word}: predicted {parts[part] * 1e3:.1f} ms, took about "
            f"{shares[part] * row['measured_seconds'] * 1e3:.1f}" for word, part in (
                ("the weights' products", "weights"), ("attention", "attention"))))


# ------------------------------------------------------------------------------ measure and compare


def utilisation(done, seconds, ceiling, what, row):
    """-> share of the ceiling, or None and an error in the row: nothing runs faster than it can."""
    share = done / seconds / ceiling
    if share <= 1:
        return share
    row["errors"].append(
        f"{what} would be {share:.0%}: the ceiling was measured too low (was another program "
        "running?) or what is read stays in a cache: take a larger model, and measure again alone")
    return None


def read_by_all(job, cost):
    """Job, Cost -> Cost: what all devices of a mesh read together: weights as often as devices hold
    them, and in training all that each gathers. As such they count once a copy of the model."""
    shape = shard.mesh_axes(**dict(job.mesh))
    if not shape or job.phase in PRODUCTS:
        return cost
    mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
    axes = shard.axes_of(mesh, "tensor")
    copies = mesh.size // shard.size_over(mesh, axes)
    moved, held = cost.weight_bytes * copies, cost.weight_bytes
    if job.phase != "train":
        held *= copies
        rules, cfg = shard.layout_rules(mesh, job.layout), job.cfg
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
            "tokens": cost.tokens,
            "flops": sum(cost.flops.values()),
            "weight_bytes": cost.weight_bytes, "cache_bytes": cost.cache_bytes,
            **predict(cost, ceilings)}


def measured_row(row, times, ceilings):
    """dict, list of seconds, dict -> dict: the whole row."""
    seconds, row = statistics.median(times), dict(row, errors=[], notes=[])
    low, high = np.quantile(times, (0.1, 0.9)).tolist()
    row |= {"measured_seconds": seconds, "p10_seconds": low, "p90_seconds": high,
            "runs": len(times), "ratio": seconds / row["predicted_seconds"],
            "tokens_per_second": row["tokens"] / seconds,
            "tokens_per_second_per_sequence": row["tokens"] / seconds / row["B"]}
    peak, read = ceilings["flops_per_second"][row["products"]], ceilings["read_bytes_per_second"]
    row["mfu"] = utilisation(row["flops"], seconds, peak, "MFU", row)
    moved = row["weight_bytes"] + row["cache_bytes"]
    row["mbu"] = utilisation(moved, seconds, read, "MBU", row)
    if high - low > 0.25 * seconds:
        row["notes"].append(f"runs spread by {(high - low) / seconds:.0%} of their median "
                            f"({len(times)} runs, p10 to p90): measure again on a calm machine")
    return row


def measure(job, params, ceilings, seed, folder=None):
    """Job, Params, dict, int -> dict: one row, predicted first, then compiled, then measured."""
    row = predicted_row(job, ceilings)
    say(f"{job.phase} {job.dtype} B={job.B}: predicted {row['predicted_seconds'] * 1e3:.1f} ms",
        end="")
    prepared = prepare(job, params, seed, traced=bool(folder))
    told = PHASES[job.phase].tell(job, prepared.call())
    times = [seconds / told["steps"] for seconds in seconds_of(prepared.call)]
    row = measured_row(row | prepared.row | told, times, ceilings)
    say(f", measured {row['measured_seconds'] * 1e3:.1f} ms")
    if folder:
        folder = pathlib.Path(folder) / f"{job.phase}-{job.dtype}-{job.cache_dtype}-{job.B}"
        if prepared.ops:
            row["profile"] = profile(prepared, folder)
        else:
            trace(prepared.call, folder)
    return row


def megabytes(key):
    """str -> what shows that figure of a row, in MB."""
    return lambda row: f"{row[key] / MB:.1f}" if key in row else "-"


def milliseconds(key):
    """str -> what shows that figure of a row, in ms."""
    return lambda row: f"{row[key] * 1e3:.1f}"


COLUMNS = (  # heading, width, text of a row
    ("phase", -9, lambda r: r["phase"]), ("dtype", -8, lambda r: r["dtype"]),
    ("cache", -8, lambda r: r["cache_dtype"] if r["phase"] != "train" else "-"),
    ("B", 3, lambda r: r["B"]), ("T", 4, lambda r: r["T"]), ("S", 5, lambda r: r["S"]),
    ("|", 1, lambda r: "|"),
    ("GFLOP", 7, lambda r: f"{r['flops'] / GB:.2f}"),
    ("weights MB", 10, megabytes("weight_bytes")), ("cache MB", 8, megabytes("cache_bytes")),
    ("predict ms", 10, milliseconds("predicted_seconds")), ("bound", 5, lambda r: r["bound"]),
    ("|", 1, lambda r: "|"),
    ("GFLOP", 7, lambda r: f"{r['program_flops'] / r['steps'] / GB:.2f}"
     if r.get("program_flops") else "-"),
    ("args MB", 7, megabytes("argument_bytes")), ("alias MB", 8, megabytes("alias_bytes")),
    ("temp MB", 7, megabytes("temp_bytes")), ("peak MB", 7, megabytes("peak_bytes")),
    ("coll.", 5, lambda r: sum(c["number"] for c in r["collectives"].values())
     if "collectives" in r else "-"),
    ("compile s", 9, lambda r: f"{r['compile_seconds']:.1f}"),
    ("|", 1, lambda r: "|"),
    ("measured ms", 11, milliseconds("measured_seconds")),
    ("p10 to p90", 15, lambda r: f"{r['p10_seconds'] * 1e3:.1f}-{r['p90_seconds'] * 1e3:.1f}"),
    ("MFU", 5, lambda r: "error" if r["mfu"] is None else f"{r['mfu']:.0%}"),
    ("MBU", 5, lambda r: "error" if r["mbu"] is None else f"{r['mbu']:.0%}"),
    ("tok/s/seq", 9, lambda r: f"{r['tokens_per_second_per_sequence']:.1f}"),
    ("tok/s", 8, lambda r: f"{r['tokens_per_second']:.1f}"),
    ("ratio", 5, lambda r: f"{r['ratio']:.2f}"))


def line(texts):
    """-> str: one line of the table."""
    return "  ".join(f"{text:<{-width}}" if width < 0 else f"{text:>{width}}"
                     for text, (_, width, _) in zip(texts, COLUMNS)).rstrip()


def print_limits(limits):
    """What the machine can do, and what its sheet says where it is a chip that we know."""
    for word, found in (("ceilings", limits), ("its sheet", limits.get("sheet"))):
        if found:
            print(f"{word}: " + ", ".join(f"{dtype} {peak / GB:.0f} GFLOP/s" for dtype, peak in
                                          found["flops_per_second"].items())
                  + f", reading {found['read_bytes_per_second'] / GB:.1f} GB/s")


def print_rows(rows, limits):
    """The table, its notes and errors, and the roofline."""
    print_limits(limits)
    if not rows:
        return
    print("predict: from the shapes; program: what the jaxpr multiplies and the compiled program "
          "holds; profile: measured\na step of generate makes one token a row, one of speculate is "
          "a round; ratio: measured over predicted")
    heads = [heading for heading, _, _ in COLUMNS]
    groups = {7: "predict", 13: "program", 21: "profile"}
    print(line([groups.get(i, heads[i] if heads[i] == "|" else "") for i in range(len(heads))]))
    print(line(heads))
    for row in rows:
        print(line([text(row) for _, _, text in COLUMNS]))
    for row in rows:
        for word, texts in (("error", row["errors"]), ("noise", row["notes"])):
            for text in texts:
                print(f"{word}: {row['phase']} {row['dtype']} B={row['B']}: {text}")
    print()
    print(picture(rows, limits))


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
    """Prints the table, the roofline, what speculation gave, and the JSON object."""
    print_rows(rows, limits)
    gained = speedups(rows)
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
    T, S = job.prompt, job.prompt + job.new
    for name, flops, size, equal in zip(
            ("a causal pass", "a generate step"),
            (prefill_flops(job.cfg, 1, T), decode_flops(job.cfg, 1, S)),
            (f"T = {T}", f"S = {S}"), crossover(job.cfg)):
        share = (flops["scores"] + flops["values"]) / sum(flops.values())
        print(f"attention is {share:.1%} of the flops of {name} at {size}, "
              f"and as much as the weights' at {size[0]} = {equal}")


def split_counts(job, ways):
    """Job, int -> list of dict: what tensor parallelism over so many devices would send, by formula
    and counted in the jaxpr, which needs no device."""
    mesh = jax.sharding.AbstractMesh((ways,), ("tensor",),
                                     axis_types=(jax.sharding.AxisType.Auto,))
    found = []
    for phase, T in (("prefill", job.prompt), ("generate", 1)):
        own = job._replace(phase=phase, new=1, mesh=(("tensor", ways),))
        formula, (step, make, *_) = shard.tally(sent(own)), PHASES[phase].build(own, mesh)
        counted = shard.traced_comm(step, *jax.eval_shape(make, abstract(own), jax.random.key(0)))
        found.append({"form": phase, "devices": ways, "B": job.B, "T": T, **{
            f"{name}_{what}": sum(pair[i] for pair in told.values())
            for name, told in (("predicted", formula), ("counted", counted))
            for i, what in enumerate(("collectives", "bytes"))}})
    return found


def print_split(job, ways=4):
    """Prints `split_counts` -> them; nothing where the model cannot be split so."""
    try:
        found = split_counts(job, ways)
    except ValueError as error:
        print(f"tensor parallel over {ways}: {error}")
        return []
    for f in found:
        print(f"tensor parallel over {ways} devices, {f['form']} of B={f['B']} T={f['T']}: each "
              f"sends {f['predicted_bytes']:,} bytes in {f['predicted_collectives']} collectives "
              f"by formula, {f['counted_bytes']:,} in {f['counted_collectives']} in the program")
    return found


# ------------------------------------------------------------------------------------ the picture


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

    for mark, (dtype, peak) in zip("-=~", limits["flops_per_second"].items()):
        for column in range(width):
            x = 10 ** (x0 + column / (width - 1) * (x1 - x0))
            slope = limits["read_bytes_per_second"] * x
            put(x, min(peak, slope), "/" if slope < peak else mark)
    for mark, _, x, y in points(rows):
        put(x, y, mark)
    labels = {0: f"1e{y1}", height - 1: f"1e{y0}"}
    lines = [f"{labels.get(i, ''):>5} |" + "".join(row).rstrip() for i, row in enumerate(grid)]
    marks = dict.fromkeys((PHASES[row["phase"]].mark, row["phase"]) for row in rows)
    return "\n".join([
        "flops/s over flops/byte; " + ", ".join(f"{mark} {name}" for mark, name in marks)
        + "; / memory, " + ", ".join(f"{mark} {dtype}" for mark, dtype in
                                     zip("-=~", limits["flops_per_second"])),
        *lines, "      +" + "-" * width,
        f"       1e{x0}" + f"1e{x1}".rjust(width - len(f"1e{x0}"))])


def plot(rows, limits, path):
    """list of rows, dict, path -> None: the roofline as a PNG or SVG. Needs the extra `plot`."""
    figure, axes = pyplot().subplots(figsize=(9, 5.5), layout="constrained")
    read, (xs, _) = limits["read_bytes_per_second"], frame(rows, limits)
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
    figure.savefig(path)


def pyplot():
    """-> matplotlib.pyplot, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError('a picture needs the extra plot: pip install ".[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


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
TARGETS = {  # clocks: the sheet's peak over what the matrix units multiply a cycle; flops: 8192^3
    # in bf16 over the cycles that the compiler gives it
    "tpu-v4": Target("tpu", "v4", TORUS, 1.05e9, 1.05e9 * 239e3),
    "tpu-v5e": Target("tpu", "v5e", PLANE + " 16x16", 1.5e9, 1.5e9 * 115e3, wraps=16),
    "tpu-v5p": Target("tpu", "v5p", TORUS, 1.75e9, 1.75e9 * 236e3),
    "tpu-v6e": Target("tpu", "v6e", PLANE, 1.75e9, 1.75e9 * 352e3, wraps=16),
    "tpu-v7x": Target("tpu", "tpu7x", TORUS, 2.2e9, 2.2e9 * 403e3, devices=2),
    **{name: Target("gpu", name, HOSTS, 0.0, 0.0) for name in ("a100", "h100", "h200", "b200")}}
GPUS = {  # core_count, fpus_per_core, shared_memory_per_core, .._optin, memory_bandwidth,
    # l2_cache_size, clock_rate_ghz, device_memory_size, compute capability: openxla/xla,
    # xla/backends/gpu/target_config/specs
    "a100": (108, 64, 167936, 166912, 2039040000000, 41943040, 1.41, 85100068864, 8),
    "h100": (132, 128, 233472, 232448, 3352320000000, 52428800, 1.98, 84942979072, 9),
    "h200": (132, 128, 233472, 232448, 4800000000000, 52428800, 1.98, 151397597184, 9),
    "b200": (148, 128, 233472, 232448, 7672320000000, 132644864, 1.965, 191514411008, 10)}
EXTRAS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}  # and the module that each brings
FLAGS = {name: "true" for name in (  # the lecture's, for collectives beside products on a TPU
    "xla_enable_async_all_gather", "xla_enable_async_collective_permute",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_overlap_compute_collective_tc")}
COMPILERS = {  # what their process needs to know of the machine that is not here
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def target_of(name, chips):
    """str, int -> Target, with the sheet's bandwidths for one of its devices."""
    target, chip = TARGETS[name], CHIPS[name]
    return target._replace(read=chip.read / target.devices, link=chip.link / target.devices,
                           torus=tuple(map(int, slice_of(name, chips).split("x"))))


def known_target(name):
    """str -> Target: ValueError for a chip that no compiler is known for."""
    if name not in TARGETS:
        raise ValueError(f"chip {name!r} has no compiler here: one of " + ", ".join(TARGETS))
    return TARGETS[name]


def slice_of(name, chips):
    """str, int -> str: the slice of so many chips; 1 is the first of the smallest. ValueError where
    there is none, naming the nearest."""
    sizes = {chips_of(shape): shape for shape in known_target(name).slices.split()}
    if chips in sizes:
        return sizes[chips]
    if chips == 1:
        return sizes[min(sizes)]
    near = [n for n in (max((n for n in sizes if n < chips), default=1),
                        min((n for n in sizes if n > chips), default=None)) if n]
    raise ValueError(f"{name} has no slice of {chips} chips: --chips "
                     + " or ".join(f"{n} ({sizes[n]})" if n in sizes else f"{n}" for n in near))


def check_compiler(name):
    """str -> None: ValueError unless its compiler is here."""
    extra = known_target(name).extra
    there = (sys.platform, platform.machine()) == ("linux", "x86_64")
    if not there or importlib.util.find_spec(EXTRAS[extra]) is None:
        raise ValueError(f'{name} needs its compiler, the extra {extra}: pip install ".[{extra}]"'
                         + ("" if there else ", on Linux and x86-64"))


def torus_axes(shape, tensor):
    """str, int -> int or tuple: the axes of a slice that are left to data, where tensor takes the
    last ones. ValueError where it cannot."""
    left = []
    for size in reversed(list(map(int, shape.split("x")))):
        taken = math.gcd(size, tensor)
        tensor, left = tensor // taken, [size // taken, *left]
    if tensor > 1:
        raise ValueError(f"a slice of {shape} has no part of {tensor} more devices for tensor")
    axes = tuple(n for n in left if n > 1)
    return axes if len(axes) > 1 else math.prod(axes)


def on_chips(job, name, chips, mesh=None, layout=None):
    """Job, str, int, dict, str -> Job: as it is split over that slice. ValueError where it is not.

    Left out, training is FSDP over all of it, and all else tensor parallel (`over_heads`), its
    cache split over heads if they divide, else rows, else slots.
    """
    shape, target = slice_of(name, chips), TARGETS[name]
    n = chips * target.devices
    shape += "x2" * (target.devices == 2)
    mesh = mesh or ({"data": n} if job.phase == "train" else {"tensor": over_heads(job.cfg, n)})
    data, context, tensor = (math.prod(shard.as_axes(mesh.get(axis, 1)))
                             for axis in ("data", "context", "tensor"))
    known = ("data", "context", "tensor") if job.phase == "train" else ("data", "tensor")
    if other := ", ".join(set(mesh) - {*known}):
        raise ValueError(f"--mesh {other}: {job.phase} takes {' and '.join(known)}")
    if data * context * tensor != n:
        raise ValueError(f"a mesh of {mesh} on {chips} x {name}: {n} devices in all, not "
                         f"{data * context * tensor}")
    if job.prompt % context:
        raise ValueError(f"--prompt {job.prompt} tokens over {context} devices of context: "
                         f"--prompt {-(-job.prompt // context) * context}")
    if job.phase == "train" and (job.B % data or job.by == "compiler" and context * tensor > 1):
        raise ValueError(f"B={job.B} rows over {data} devices of data" + (
            f": --batch {-(-job.B // data) * data}" if job.B % data else f" and {context * tensor} "
            "others: by the compiler training is split over data alone"))
    job = job._replace(chip=name, chips=chips)
    if job.ring and tensor == 1:
        raise ValueError(f"ring={job.ring} on a mesh of {mesh}: rings go around an axis tensor of "
                         "two or more")
    if n == 1:
        return job
    axes = {"tensor": mesh.get("tensor", 1)}
    if data > 1 or job.phase == "train":
        axes = {"data": torus_axes(shape, context * tensor), **axes}
    if context > 1:
        axes = {"data": axes["data"], "context": context, "tensor": axes["tensor"]}
    if job.phase == "train" and job.by == "compiler":
        axes = {"data": axes["data"]}
    job = job._replace(mesh=tuple(axes.items()))
    if job.phase == "train" or job.phase in PRODUCTS:
        return job
    *first, last = shard.as_axes(axes["tensor"])
    fit = [name for name, size in (("heads", job.cfg.K // math.prod(first)),
                                   ("batch", job.B // (n // tensor))) if size % last == 0]
    fit += ["sequence", "context"]
    if layout not in (None, *fit):
        raise ValueError(f"layout {layout!r} does not divide over {tensor} devices of tensor with "
                         f"K={job.cfg.K} and B={job.B // (n // tensor)} rows a copy: --layout "
                         + " or ".join(fit))
    return job._replace(layout=layout or fit[0])


def gpu_text(name):
    """str -> str: a GPU's description, as XLA's compiler reads it."""
    (cores, fpus, shared, optin, bandwidth, l2, clock, memory, major) = GPUS[name]
    feature = "" if major < 9 else "feature_extension: ACCELERATED_FEATURES"
    return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
      shared_memory_per_block: 49152 shared_memory_per_core: {shared} core_count: {cores}
      threads_per_core_limit: 2048 fpus_per_core: {fpus} block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
      l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
      shared_memory_per_block_optin: {optin} registers_per_core_limit: 65536
      registers_per_block_limit: 65536 cuda_compute_capability {{ major: {major} {feature} }} }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
      runtime_version {{ major: 12 minor: 9 }} device_description_str: "{name}" """


@lru_cache
def devices_of(name, chips):
    """str, int -> devices, and the compiler's version. In the compilers' own process."""
    from jax.experimental import topologies
    target, shape = TARGETS[name], slice_of(name, chips)
    if target.extra == "gpu":
        found = topologies.get_topology_desc(platform="cuda", topology_name=name, topology=shape,
                                             target_config=gpu_text(name))
        return found.devices, "jax-cuda12-plugin " + version("jax-cuda12-plugin")
    megacore = {"chip_config_name": "megacore"} if name in ("tpu-v4", "tpu-v5p") else {}
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{target.name}:{shape}", **megacore)
    return found.devices[:chips * target.devices], "libtpu " + version("libtpu")


def refused(error):
    """Exception -> str, bytes, bytes or None: a compiler's message where a program does not fit,
    what it needs, and what is granted."""
    text = str(error)
    sizes = re.search(r"\((\d[\d.]*)([KMGT])\) exceeds available HBM \((\d[\d.]*)([KMGT])\)", text)
    if not sizes:
        return None
    unit = {letter: 1024 ** i for i, letter in enumerate("KMGT", 1)}
    return (text.splitlines()[0], *(int(float(sizes[i]) * unit[sizes[i + 1]]) for i in (1, 3)))


@lru_cache
def granted(name):
    """str -> bytes that the compiler grants a program on one device: what it says when it refuses
    one of 4 TiB."""
    if TARGETS[name].extra == "gpu":
        return GPUS[name][7]
    one = jax.sharding.SingleDeviceSharding(devices_of(name, 1)[0][0])
    try:
        jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct(
            (1 << 40,), jnp.float32, sharding=one)).compile()
    except Exception as error:
        return refused(error)[2]


def held_by(args, shards):
    """arguments, shardings -> dict, list: bytes of each kind on a device; the largest arrays."""
    found, largest = {"weights": 0, "cache": 0, "optimizer": 0}, {}
    kinds = {Params: "weights", Cache: "cache", Adam: "optimizer"}
    for arg, shard_ in zip(args, shards):
        for (path, a), where in zip(jax.tree.leaves_with_path(arg), jax.tree.leaves(shard_),
                                    strict=True):
            size = math.prod(where.shard_shape(a.shape)) * a.dtype.itemsize
            kind = kinds.get(type(arg), "inputs")
            name = f"{kind}{re.sub('[0-9]+', '', jax.tree_util.keystr(path))}"  # of all layers
            largest[name] = largest.get(name, 0) + size
            if kind != "inputs" and name not in ("cache.length", "optimizer.step"):
                found[kind] += size
    first = sorted(largest, key=largest.get, reverse=True)[:3]
    return found, [f"{name} {si(largest[name], 'B')}" for name in first]


def broadcast(shards, args):
    """shardings, arguments -> of each array, its sharding."""
    return jax.tree.map(lambda where, part: jax.tree.map(lambda _: where, part), shards, args)


def compiled_with(lowered, flags):
    """Lowered, dict -> Compiled, list: with those flags, or those that this compiler takes: from
    libtpu 0.0.50 on it refuses to fuse gathers with products but on v5e, naming wrong results."""
    try:
        return lowered.compile(compiler_options=flags or None), list(flags)
    except Exception as error:
        kept = {name: on for name, on in flags.items() if "fuse_all_gather" not in name}
        if "AllGather is enabled on platform" not in str(error) or kept == flags:
            raise
        return lowered.compile(compiler_options=kept), list(kept)


HELD = r"params\b|adam\.[mv]\b|cache\.[kv]\b"  # names of arguments that formulas count


def entry_arguments(text):
    """str -> dict: the arguments that a compiled program has left, by name: their shape."""
    entry = text[text.index("\nENTRY"):]
    found = {}
    for line in entry[:entry.index("\n}")].splitlines():
        match = re.match(r"\s+%?([\w.\-]+) = (\S+) parameter\(", line)
        if match:
            name = re.search(r'op_name="([^"]*)"', line)
            found[name[1] if name else match[1]] = match[2]
    return found


def compile_job(job):
    """Job -> dict: the program half of its row, by the chip's compiler. In its own process."""
    devices, told = devices_of(job.chip, job.chips)
    mesh = mesh_of(job, devices)
    step, make, donated, _ = PHASES[job.phase].build(job, mesh)
    args = jax.eval_shape(make, abstract(job), jax.random.key(0))
    one = jax.sharding.SingleDeviceSharding(devices[0])
    shards = broadcast(placed(job, mesh, args) if mesh else (one,) * len(args), args)
    args = jax.tree.map(lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
                        args, shards)
    formula, largest = held_by(args, shards)
    row = {"compiler": told, "jax": jax.__version__, "memory_bytes": granted(job.chip),
           "formula_bytes": sum(formula.values()), "formula": formula,
           "largest": largest, "fits": False, "message": None, "flags": [], **dict.fromkeys((
               "argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "peak_bytes",
               "collectives", "compiler_seconds", "regions", "copies", "program_flops", "padding",
               "unestimated", "hbm_bytes", "beside"))}
    start, lowered = time.perf_counter(), jax.jit(step, donate_argnums=donated).lower(*args)
    try:
        compiled, row["flags"] = compiled_with(lowered, FLAGS if job.flags else {})
    except Exception as error:
        if not refused(error):
            raise
        message, needed, _ = refused(error)
        return row | {"message": message, "needed_bytes": needed}
    text, target = compiled.as_text(), target_of(job.chip, job.chips)
    ops, given = operations(text, job, target if target.clock else None), entry_arguments(text)
    row |= program(step, args, compiled) | {
        "compile_seconds": time.perf_counter() - start,
        "inputs": sum(a.bytes for name, shape in given.items()
                      for a in arrays(shape) if not re.match(HELD, name)),
        "padding": {name: more for name, shape in given.items()
                    if (more := sum(a.padded - a.bytes for a in arrays(shape)))},
        "collectives": collectives(ops), "copies": copied(ops, given),
        "hbm_bytes": sum((op.read + op.written) * op.times for op in ops), "schedule": ops,
        **(step_seconds(ops, target.read) | {"beside": beside(ops)} if target.clock else {})}
    if row["program_flops"]:  # of a step; in a shard_map each device's part
        row["program_flops"] = row["program_flops"] * (
            mesh.size if mesh and job.by == "hand" else 1) // (
            job.new if job.phase == "generate" else 1)
    return row | {"fits": target.extra == "tpu" or row["peak_bytes"] <= row["memory_bytes"]}


def compiler_process():
    """Answers jobs, a JSON object a line of stdin and of what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print
    for asked in sys.stdin:
        told = json.loads(asked)
        cfg = Config(**told["cfg"] | {"rope_scaling": told["cfg"]["rope_scaling"] and tuple(
            told["cfg"]["rope_scaling"])})
        mesh = tuple((axis, tuple(n) if isinstance(n, list) else n) for axis, n in told["mesh"])
        try:
            answer = compile_job(Job(**told | {"cfg": cfg, "mesh": mesh}))
        except Exception as error:  # whatever it is, it is the answer
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


@contextlib.contextmanager
def compilers():
    """-> ask(job) -> the program half of its row: by a process that has what the chips' compilers
    need in its environment. ValueError with the compiler's own message where it fails."""
    folder = str(pathlib.Path(__file__).resolve().parent)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", "import bench; bench.compiler_process()"], text=True,
            env={**os.environ, **COMPILERS, "PYTHONPATH": folder}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors)

        def ask(job):
            try:
                print(json.dumps(job._replace(cfg=job.cfg.__dict__)._asdict()), file=process.stdin,
                      flush=True)
            except BrokenPipeError:
                pass
            answer = process.stdout.readline()
            if answer:
                told = json.loads(answer)
                if "error" in told:
                    raise ValueError(f"{job.chip}: its compiler: {told['error']}")
                return told | {"schedule": [Op(*op) for op in told.get("schedule", ())]}
            errors.seek(0)
            said = [line for line in errors if re.match(r"F\d{4}|\w*Error", line)] or ["no message"]
            raise ValueError(f"{job.chip}: its compiler ended: {said[0].strip()}")

        try:
            yield ask
        finally:
            process.kill()
            process.wait()


def useful_flops(job, cost):
    """Job, Cost -> int: without what is computed again, and of a causal pass only the pairs at and
    below the diagonal."""
    flops, T = dict(cost.flops), job.prompt
    if job.phase in ("train", "prefill"):
        flops["scores"] = flops["values"] = flops["values"] * (T * (T + 1) // 2) // causal_pairs(T)
    return sum(flops.values())


def chip_row(job, ask):
    """Job, ask -> dict: predicted from the sheet, then compiled; nothing is measured."""
    chip, mesh = CHIPS[job.chip], {axis: math.prod(n) if axis == "data" and isinstance(n, tuple)
                                   else n for axis, n in job.mesh}
    row, cost = predicted_row(job, sheet(chip, job.chips)), PHASES[job.phase].cost(job)
    row |= {"flops": useful_flops(job, cost), "chip": job.chip,
            "chips": job.chips, "mesh": mesh, "layout": job.layout, "ring": job.ring, "by": job.by,
            **({"keep": job.keep} if job.phase == "train" and mesh and job.by == "hand" else {}),
            "slice": "one of " * (job.chips == 1) + f"{TARGETS[job.chip].name} "
            + slice_of(job.chip, job.chips), **on_links(job, chip.link / 2)}
    say(f"{form_name(job)} {job.dtype} B={job.B} on {row['slice']}: predicted "
        f"{si(row['predicted_seconds'], 's')}, compiling ...")
    row |= ask(job)
    if row["compiler_seconds"]:
        row["mfu"] = row["flops"] / row["compiler_seconds"] / (
            job.chips * chip.flops[cost.parts[0].dtype])
        row["mbu"] = (row["weight_bytes"] + row["cache_bytes"]) / row["compiler_seconds"] / (
            job.chips * chip.read)
    return row


def form_name(job):
    """Job -> str: of one way to run a phase."""
    over = f" over {job.layout}" if job.mesh and job.phase not in ("train", *PRODUCTS) else ""
    by = (", by hand" if job.by == "hand" else ", by the compiler") * (job.phase == "train")
    return job.phase + by + over + ("", " ring", " ring both ways")[job.ring] \
        + " with flags" * job.flags


def listed(regions):
    """dict -> str: its seconds, the longest first, without what is below 0.5% of all."""
    least = 0.005 * sum(regions.values())
    return ", ".join(f"{region} {si(took, 's')}" for region, took in sorted(
        regions.items(), key=lambda item: -item[1]) if took > least)


def print_chip_row(row):
    """A row's lines: predict and program, for one chip."""
    def gb(name):
        return "unknown" if row[name] is None else si(row[name], "B")

    mesh = ", ".join(f"{axis} {n}" for axis, n in row["mesh"].items())
    print(f"\n{row['form']}: {row['model']} in {row['dtype']}"
          + (f", cache {row['cache_dtype']}" if row["phase"] != "train" else "")
          + f", B={row['B']} T={row['T']} S={row['S']}, on {row['chips']} x {row['chip']} "
          f"({row['slice']}" + f"; mesh {mesh}" * bool(mesh)
          + f"; keeps {', '.join(row.get('keep') or ['nothing'])}" * ("keep" in row)
          + ")")
    links = "the compiler's choice" if row["link_seconds"] is None else si(row["link_seconds"], "s")
    read = row["parts"][0]["bytes"]
    often = f" (read {si(read, 'B')})" * (read > 1.01 * row["weight_bytes"])
    print(f"  predict   {si(row['flops'], 'FLOP')}, weights {gb('weight_bytes')}{often}, cache "
          f"{gb('cache_bytes')}: {si(row['predicted_seconds'], 's')} bound by {row['bound']}; "
          f"links {links}")
    print(f"  program   {row['compiler']}, jax {row['jax']}: not measured; bytes are of one "
          "device" + ("; flags: " + ", ".join(row["flags"]) if row["flags"] else ""))
    formula = ", ".join(f"{name} {si(size, 'B')}" for name, size in row["formula"].items() if size)
    if row["message"]:
        over = row["needed_bytes"] - row["memory_bytes"]
        print(f"  REFUSED   {si(row['needed_bytes'], 'B')} needed, {gb('memory_bytes')} granted: "
              f"{si(over, 'B')} too much; arguments by formula: {formula}; largest: "
              + ", ".join(row["largest"]))
        return
    padded = sorted(row["padding"].items(), key=lambda item: -item[1])
    print(f"  arguments {gb('argument_bytes')}: {formula}, inputs {gb('inputs')}, padding "
          f"{si(sum(row['padding'].values()), 'B')}"
          + (" (" + ", ".join(f"{name} {si(size, 'B')}" for name, size in padded[:2]) + ")"
             if padded else ""))
    print(f"  memory    outputs {gb('output_bytes')}, in place {gb('alias_bytes')}, temporaries "
          f"{gb('temp_bytes')}, peak {gb('peak_bytes')} of {gb('memory_bytes')}: "
          + ("fits" if row["fits"] else "DOES NOT FIT"))
    print("  sends     " + ("; ".join(
        f"{c['number']} {kind} {si(c['bytes'], 'B')} ({c['asynchronous']} asynchronous)"
        for kind, c in row["collectives"].items()) or "nothing") + ", a step")
    if row["beside"]:
        print("  beside    what is asynchronous runs: " + listed(row["beside"]))
    print(f"  copies    {gb('copies')} of arrays of a weight's or a cache's size, a step")
    if row["compiler_seconds"] is None:
        print("  time      unknown: a GPU's compiler chooses products by timing them")
        return
    print(f"  time      {si(row['compiler_seconds'], 's')} by the compiler's cycles and bytes ("
          f"{row['unestimated']:.1%} without an estimate), {row['mfu']:.0%} MFU"
          + (f", {row['mbu']:.0%} MBU" if row["phase"] not in ("train", "prefill") else "") + ": "
          + listed(row["regions"]))


def run_chips(args, jobs):
    """Prints each job's prediction and what the chip's compiler makes of it."""
    rows, name = [], jobs[0].chip
    check_compiler(name)
    with compilers() as ask:
        for job in jobs:
            try:
                rows.append(chip_row(job, ask) | {"form": form_name(job)})
            except ValueError as error:
                if args.phase != "shard":
                    raise
                say(f"{form_name(job)} cannot: {error}")
    print(f"{name} ({CHIPS[name].source}): nothing is measured; predict: from the sheet and the "
          "shapes; program: what the chip's own compiler made")
    for row in rows:
        print_chip_row(row)
    if args.timeline:
        draw_timeline(rows, args.timeline)
    for row in rows:
        row.pop("schedule", None)
    finish(args, machine={"jax": jax.__version__, "python": platform.python_version()},
           ceilings=sheet(CHIPS[name], jobs[0].chips), rows=rows)


def one_layer(ops):
    """list of Op -> list of (heading, list of Op): a trip of each loop over layers, as training's
    forward and backward; or the middle layer, from its first product to the next's. What loops
    within a layer is one bar, of its longest operation's region."""
    loops, step = dict.fromkeys(op.loop for op in ops if op.times > 1 and op.region == "mlp"), []
    for loop, trip in itertools.groupby((op for op in ops if op.times), lambda op: op.loop):
        trip = list(trip)
        if step and step[-1].end is None and (loop == step[-1].loop or loop not in loops):
            step[-1] = step[-1]._replace(end=trip[0].start, done=trip[0].start)
        if trip[0].times == 1 or loop in loops:
            step += trip
        else:
            longest = max(trip, key=lambda op: op.end - op.start)
            step.append(longest._replace(start=trip[0].start, end=None, number=0,
                                         loop=step[-1].loop if step else ""))
    step = [op for op in step if op.end is not None]
    if loops:
        names = ("a layer forwards", "a layer backwards") if len(loops) == 2 else [
            f"a trip of loop {i + 1}" for i in range(len(loops))]
        return [(name, [op for op in step if op.loop == loop])
                for name, loop in zip(names, loops)]
    timed = [op for op in step if op.region in ("qkv", "mlp") and op.kind == "product"]
    begins = [b.start for a, b in zip(timed, timed[1:]) if (a.region, b.region) == ("mlp", "qkv")]
    if len(begins) < 2:
        return [("a step", step)]
    first, last = begins[len(begins) // 2 - 1:len(begins) // 2 + 1]
    return [("a layer", [op for op in step if op.end > first and op.start < last])]


def draw_timeline(rows, path):
    """list of rows, path -> None: one layer of each as scheduled: what computes on one track,
    transfers on another, from start to done. Needs the extra `plot`."""
    plt = pyplot()
    bands = [(row, heading, ops) for row in rows if row["compiler_seconds"]
             for heading, ops in one_layer(row["schedule"])]
    if not bands:
        return say("--timeline has nothing to draw: no program fits")
    figure, axes = plt.subplots(len(bands), figsize=(11, 0.6 + 1.5 * len(bands)),
                                layout="constrained", squeeze=False)
    names = dict.fromkeys(op.kind if op.number else op.region or "other"
                          for _, _, ops in bands for op in ops)
    colors = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for (row, heading, ops), axis in zip(bands, axes[:, 0]):
        zero, spans = min(op.start for op in ops), {}
        for op in ops:
            name, track = (op.kind, 0) if op.number else (op.region or "other", 1)
            spans.setdefault((name, track, 1.0), []).append((op.start, op.end))
            spans.setdefault((name, track, 0.3), []).append((op.start, op.done))  # till it is done
        for (name, track, alpha), times in spans.items():
            axis.broken_barh([((start - zero) * 1e6, (end - start) * 1e6) for start, end in times
                              if end > start], (track, 0.8), color=colors[name], alpha=alpha)
        axis.set(yticks=(0.4, 1.4), yticklabels=("transfers", "compute"), xlabel="microseconds",
                 title=f"{row['form']}, {row['model']} B={row['B']} on {row['slice']}: {heading}")
    figure.legend([plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()],
                  list(colors), loc="outside lower center", ncols=8, fontsize="small")
    figure.savefig(path)
    print(f"timeline: {path}")


# ------------------------------------------------------------------------------------------ growth


GROWTH = "L2,E512,H8,K8,D64,F1408,V256"


def wider(cfg, E):
    """Config, int -> Config: the same proportions at another width."""
    return replace(cfg, E=E, H=max(1, cfg.H * E // cfg.E), K=max(1, cfg.K * E // cfg.E),
                   F=cfg.F * E // cfg.E)


def sweeps(job):
    """Job -> dict: what grows -> list of (size, Job), all else as in the job."""
    cfg, S = job.cfg, job.prompt + job.new
    read = job._replace(phase="prefill", B=1)
    return {
        "batch": [(B, job._replace(B=B)) for B in (1, 4, 16, 64)],
        "slots": [(S * n, job._replace(B=8, prompt=S * n - job.new)) for n in (1, 4, 16, 32)],
        "layers": [(L, job._replace(cfg=replace(cfg, L=L))) for L in (1, 2, 4, 8)],
        "tokens": [(T, read._replace(prompt=T)) for T in (64, 256, 1024, 2048)],
        "width": [(E, job._replace(cfg=wider(cfg, E))) for E in
                  (cfg.E // 2, cfg.E, 2 * cfg.E, 4 * cfg.E)]}


def exponent(sizes, values):
    """sizes, values -> k of the best size ** k: the slope of a line through their logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def scale(args):
    """Prints how time grows with each size, beside how it should."""
    name, cfg = args.model or (GROWTH, parse_model(GROWTH))
    dtype, found, rows = args.dtype, [], []
    base = Job("generate", name, computing_in(cfg, dtype), 1, 240, 16, dtype, default_cache(dtype),
               int8=args.int8 or default_int8())
    grown = sweeps(base)
    for job in (job for jobs in grown.values() for _, job in jobs):
        check_memory(job)
    limits = ceilings([base])
    try:
        for what, jobs in grown.items():
            own = []
            for size, job in jobs:
                params = in_dtype(init(jax.random.key(args.seed), job.cfg, job.cfg.dtype), job.cfg,
                                  dtype, job.int8)
                own.append(measure(job, params, limits, args.seed) | {"size": size, "grows": what})
                rows.append(own[-1])
            sizes = [row["size"] for row in own]
            found.append({"grows": what, "phase": own[0]["phase"], "sizes": sizes, **{
                f"{word}_exponent": exponent(sizes, [row[f"{word}_seconds"] for row in own])
                for word in ("predicted", "measured")}})
    except KeyboardInterrupt:
        say("\ninterrupted: what was measured so far")
    print_limits(limits)
    print(f"{name} in {dtype}: milliseconds of a step at each size, and k where time grows as "
          "size ** k")
    for f in found:
        own = [row for row in rows if row["grows"] == f["grows"]]
        print(f"{f['phase']:8} {f['grows']:6} " + "  ".join(
            f"{row['size']}: {row['measured_seconds'] * 1e3:.2f}" for row in own)
            + f"   k {f['measured_exponent']:.2f}, predicted {f['predicted_exponent']:.2f}")
    finish(args, machine=machine(), ceilings=limits, rows=rows, growth=found)


# --------------------------------------------------------------------------------------- real input


def encode(text):
    """str -> 1T: a byte a token."""
    return jnp.asarray(np.frombuffer(text.encode(), np.uint8).astype(np.int32))[None]


def decode(tokens):
    """T -> str: what is no UTF-8 shows as a replacement character."""
    return bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")


def recite(params, cfg, prompt, new, key, temperature=0.0):
    """Params, cfg, 1T, int, key -> str: prefill, then generate, in a model of bytes."""
    T = prompt.shape[1]
    cache = init_cache(cfg, 1, T + new)
    logits, cache = prefill_jit(params, cache, prompt, jnp.full((1,), T), cfg)
    return decode(generate_jit(params, cache, logits, key, new, cfg, temperature)[0][0])


def learn(cfg, seed, steps=300):
    """cfg, int -> Params: f32, trained on SENTENCE again and again until the model knows it."""
    if cfg.V < 256:
        raise ValueError(f"V={cfg.V}: a model that learns a sentence in bytes has V=256 or more")
    say(f"learning {SENTENCE!r} ...", end=" ")
    cfg = replace(cfg, dtype="float32")
    params, tokens = init(jax.random.key(seed), cfg), encode(4 * SENTENCE)
    adam = adam_init(params)
    for trained in range(1, steps + 1):
        params, adam, value = train_jit(params, adam, tokens, cfg, 0.3 / cfg.E)
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


def held_out_loss(params, held, T, nats):
    """-> mean nats a byte over all of `held`, in windows of T, the last one shorter."""
    total = count = 0
    for start in range(0, len(held) - 1, T):
        window = held[None, start:start + T + 1]
        total += float(nats(params, window)) * (window.shape[1] - 1)
        count += window.shape[1] - 1
    return total / count


def new_state(job, seed):
    """Job, int -> Params, Adam: where training begins."""
    params = init(jax.random.key(seed), job.cfg)
    return params, adam_init(params)


def resume(args, job):
    """args, Job -> Job, Params, Adam: of the model in --resume DIR, where its training stopped."""
    cfg, params = load(args.resume, "float32")
    if args.model and replace(job.cfg, dtype=cfg.dtype) != cfg:
        raise ValueError(f"--model {job.model} is not the model in --resume {args.resume}: leave "
                         "it out")
    job = job._replace(model=args.resume, cfg=replace(cfg, dtype=job.cfg.dtype))
    return job, *load_adam(args.resume, cfg, params)


def train_text(args, job, params, adam, limits, text, held):
    """args, Job, Params, Adam, dict, bytes, bytes -> row, Params, Adam: trains, and measures each
    step as it goes."""
    cfg, B, T, began = job.cfg, job.B, job.prompt, int(adam.step)
    row, draw = predicted_row(job, limits), np.random.default_rng(args.seed)
    draw.integers(0, len(text) - T, (began, B))  # what was read before
    nats = jax.jit(lambda params, tokens: loss(cast(params, cfg.dtype), tokens, cfg))
    row |= {"parameters": param_count(cfg),
            "cache_bytes_per_token": kv_bytes(cfg, 1, 1, job.cache_dtype),
            "loss_before": held_out_loss(params, held, T, nats)}
    say(f"{args.text}: {len(text)} bytes to train on, {len(held)} held out, K={cfg.K}, "
        f"{param_count(cfg)} parameters; held-out loss {row['loss_before']:.3f} nats/byte")
    start = time.perf_counter()
    step = train_jit.lower(params, adam, jnp.zeros((B, T + 1), jnp.int32), cfg, args.lr).compile()
    row["compile_seconds"], times = time.perf_counter() - start, []
    live = sys.stderr.isatty()
    try:
        for i in range(args.steps):
            starts = draw.integers(0, len(text) - T, B)
            tokens = np.stack([text[start:start + T + 1] for start in starts])
            start = time.perf_counter()
            params, adam, value = step(params, adam, tokens,
                                       args.lr * min(1, (began + i + 1) / 20))
            value = float(value)
            times.append(time.perf_counter() - start)
            if live or i % 10 == 0 or i == args.steps - 1:
                now = measured_row(row, times[-9:], limits)
                mfu = "error, above 100%" if now["mfu"] is None else f"{now['mfu']:.0%}"
                say(f"\rstep {i + 1}/{args.steps}  loss {value:.3f} nats/byte  "
                    f"{now['tokens_per_second']:.0f} tokens/s  MFU {mfu} ",
                    end="" if live else "\n")
    except KeyboardInterrupt:
        if not times:
            raise
        say(f"\ninterrupted after {len(times)} steps")
    say()
    row |= {"loss_after": held_out_loss(params, held, T, nats), "steps": len(times)}
    # the first fetches all memory
    return measured_row(row, times[1:] or times, limits), params, adam


def train_on_text(args, jobs):
    """Trains on args.text, once for each job, and prints held-out loss before and after."""
    T = jobs[0].prompt
    text, held = read_text(args.text, T)
    began = None
    if args.resume:
        job, *began = resume(args, jobs[0])
        jobs = [job]
    for job in jobs:
        if job.cfg.V != 256:
            raise ValueError(f"V={job.cfg.V}: a model of bytes has V=256")
    if args.save:
        library()
        try:
            pathlib.Path(args.save).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--save {args.save}: {error.strerror}") from None
    limits, rows = ceilings(jobs), []
    try:
        for job in jobs:
            params, adam = began or new_state(job, args.seed)
            row, params, adam = train_text(args, job, params, adam, limits, text, held)
            rows.append(row)
    except KeyboardInterrupt:
        say("\ninterrupted: what was trained so far")
    for row in rows:
        print(f"K={row['K']}: held-out loss: {row['loss_before']:.3f} nats a byte before, "
              f"{row['loss_after']:.3f} after {row['steps']} steps of "
              f"{row['measured_seconds'] * 1e3:.1f} ms; {row['parameters']} parameters, cache "
              f"{row['cache_bytes_per_token']} bytes a token")
    more = {}
    if rows:
        cfg, prompt = job.cfg, held[None, :min(T, len(held), 64)]
        if args.save:
            save(args.save, cfg, params, adam=adam)
            say(f"saved to {args.save}")
        said = recite(cast(params, cfg.dtype), cfg, prompt, args.new, jax.random.key(args.seed), .5)
        print(f"{decode(prompt[0])!r} goes on {said!r}")
        more = {"continuation": said, "loss_before": rows[-1]["loss_before"],
                "loss_after": rows[-1]["loss_after"], "steps": rows[-1]["steps"]}
    report(args, rows, limits, text=str(args.text), **more)


class Words(NamedTuple):
    """What turns text into tokens and back. `settled` tells how many of a list of tokens, from its
    beginning, make text that no later token changes: a run of single bytes may yet become other
    characters."""
    encode: Callable
    decode: Callable
    ends: tuple = ()
    settled: Callable = len


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
    """path, Config -> Words: of tokenizer.json, or of bytes where V is 256. The whole prompt, as it
    is: what the file says of truncation and padding was meant for training."""
    file = pathlib.Path(path) / "tokenizer.json"
    if not file.exists():
        if cfg.V != 256:
            raise ValueError(f"{file} is missing, and V={cfg.V} is not 256, a model of bytes")
        return Words(lambda text: encode(text)[0], decode)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(f'{file} needs the extra hf: pip install ".[hf]"') from None
    try:
        words = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{file} is no tokenizer: {error}") from None
    words.no_truncation()
    words.no_padding()

    def settled(ids):
        some = len(ids)
        while some and re.fullmatch("<0x[0-9A-F]{2}>", words.id_to_token(int(ids[some - 1])) or ""):
            some -= 1
        return some

    return Words(lambda text: words.encode(text).ids, lambda ids: words.decode(list(map(int, ids))),
                 end_tokens(file.parent), settled)


def simulate(devices):
    """int -> None: makes so many devices of a CPU, unless what is here was looked at before."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def split_over(cfg, devices):
    """Config, int or None -> dict, layout: the mesh and the cache of one sequence over so many
    devices, or over as many of those that are here as divide the model."""
    n = devices or degree(cfg, jax.device_count())
    if degree(cfg, n) < n:
        fit = [str(m) for m in range(1, 65) if degree(cfg, m) == m]
        raise ValueError(f"--devices {n} cannot share a model of E={cfg.E}, H={cfg.H}, F={cfg.F}, "
                         f"V={cfg.V}: {', '.join(fit)} can")
    over = {"tensor": over_heads(cfg, n)} if n > 1 else {}
    return over, "sequence" if cfg.K % n else "heads"


def load_in(path, dtype, devices=1, int8=None):
    """path, dtype or None, int or None -> Config, Params, dtype: in the file's own unless one is
    given. Of several devices each is given its part, and no more is read."""
    def apart(by, cfg, *params):
        """-> by(*params, cfg, mesh, rules), None where all is on one device."""
        over, layout = split_over(cfg, devices)
        if over:
            mesh = shard.make_mesh(**over)
            return by(*params, cfg, mesh, shard.layout_rules(mesh, layout))

    cfg, params = load(path, shardings=partial(apart, shard.shardings))
    dtype = dtype or cfg.dtype
    cfg = computing_in(cfg, dtype)
    params = in_dtype(params, cfg, dtype, int8)
    return cfg, apart(shard.place, cfg, params) or params, dtype


def load_draft(args, cfg, prompt, S, how):
    """-> draft and its state for `speculate`: a smaller model from a folder, of which every device
    has all, or n-grams."""
    if args.draft == "ngram":
        return ngram_draft(cfg, args.n_draft), None
    draft_cfg, params, _ = load_in(args.draft, args.dtype, int8=args.int8)
    if draft_cfg.V != cfg.V:
        raise ValueError(f"draft {args.draft} has V={draft_cfg.V}, and the model V={cfg.V}: "
                         "they must share a tokenizer")
    _, cache = prefill_jit(params, init_cache(draft_cfg, 1, S, args.cache), prompt,
                           np.array([prompt.shape[1]]), draft_cfg)
    return model_draft(params, draft_cfg, args.n_draft, **how), cache


def generating(generate, params, cache, logits, key, how):
    """-> iterator: compiles, then gives all tokens made so far, and no rounds."""
    step, made = jax.jit(partial(generate, n=STRIDE, **how), donate_argnums=(1, 2)).lower(
        params, cache, logits, key).compile(), []
    while True:
        yield made, 0
        tokens, logits, cache = step(params, cache, logits, key)
        made = made + np.asarray(tokens[0]).tolist()


def speculating(speculate, params, cache, prompt, key, how, mesh, draft, state):
    """-> iterator: compiles, then gives all tokens made so far, and in how many rounds."""
    T, made, rounds = prompt.shape[1], [], 0
    text = jnp.zeros((1, slots_of(cache)), jnp.int32).at[:, :T].set(prompt)
    cache = cache._replace(length=cache.length - 1)
    if mesh:
        text, draft, state = jax.device_put((text, draft, state), jax.NamedSharding(mesh, jax.P()))
    step = jax.jit(partial(speculate, n=STRIDE, **how), donate_argnums=(1, 2)).lower(
        params, cache, text, key, draft=draft, state=state).compile()
    while True:
        yield made, rounds
        text, cache, state, counts = step(params, cache, text, key, draft=draft, state=state)
        made = np.asarray(text)[0, T:int(cache.length[0]) + 1].tolist()
        rounds += int(np.sum(counts))


def stream(args):
    """args -> iterator of (str, str, dict): of the prompt and what follows so far the text that is
    final, all of it, and how fast it came."""
    cfg, params, args.dtype = load_in(args.model, args.dtype, args.devices, args.int8)
    args.cache = args.cache or default_cache(args.dtype)
    encode, decode, ends, settled = tokenizer(args.model, cfg)
    prompt = np.asarray(encode(args.prompt), np.int32)[None]
    T, key, least = prompt.shape[1], jax.random.key(args.seed), 2 if args.draft else 1
    if T < least:
        raise ValueError(f"prompt {args.prompt!r} makes {T} tokens: {least} or more"
                         + (", or no --draft" if args.draft else ""))
    check_tokens(prompt, cfg)
    S = T + args.new + STRIDE + args.n_draft + 1
    free, needed = memory(), kv_bytes(cfg, 1, S, args.cache)
    if free is not None and needed > free:
        raise ValueError(f"a cache of {S} slots holds {needed / GB:.1f} GB and {free / GB:.1f} GB "
                         "are free: a smaller --new")
    how = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    draft = load_draft(args, cfg, prompt, S, how) if args.draft else None
    how["end"] = ends[0] if ends and prompt[0, -1] not in ends else None
    over, layout = split_over(cfg, args.devices)
    job = Job("generate", "", cfg, 1, T, S - T, args.dtype, args.cache, mesh=tuple(over.items()),
              layout=layout, int8=args.int8 or default_int8())
    mesh = mesh_of(job)
    fns, S = functions(job, mesh), slots(job, S)
    read = jax.jit(fns.prefill, donate_argnums=1)
    for _ in range(3):  # compiled; then weights are fetched from wherever they were
        given = jax.block_until_ready((params, fns.empty(1, S, args.cache)[0], prompt,
                                       np.array([T])))
        start = time.perf_counter()
        logits, cache = jax.block_until_ready(read(*given))
    told = {"prompt": T, "prefill_seconds": time.perf_counter() - start}
    steps = speculating(fns.speculate, params, cache, prompt, key, how, mesh, *draft) \
        if args.draft else generating(fns.generate, params, cache, logits, key, how)
    made, rounds = next(steps)
    start = time.perf_counter()
    while True:
        stop = min([args.new, *(made.index(end) for end in ends if end in made)])
        told |= {"seconds": time.perf_counter() - start, "rounds": rounds,
                 "a_round": len(made) / max(1, rounds), "tokens": len(made[:stop])}
        ids = [*prompt[0], *made[:stop]]
        text, final = decode(ids), settled(ids)
        stays = text if final == len(ids) else decode(ids[:final])
        yield stays.rstrip("\ufffd"), text, told  # the rest of a character may come yet
        if len(made) >= args.new or stop < len(made):
            return
        made, rounds = next(steps)


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
    base = Job("train", name, cfg, args.batch, args.prompt, args.new, cfg.dtype,
               "bfloat16" if cfg.dtype == "bfloat16" else "float32", mesh=(("tensor", n),))
    jobs = [base._replace(phase=phase, ring=ring) for ring in RINGS for phase in PRODUCTS]
    jobs.append(base._replace(by="compiler", mesh=(("data", n),)))
    pairs = [(n, 1), (1, n)] + ([(n // 2, 2)] if n % 2 == 0 and n > 2 else [])
    jobs += [base._replace(ring=ring, mesh=(("data", data), ("tensor", tensor)))
             for (data, tensor), ring in itertools.product(pairs, (0, 1)) if tensor > 1 or not ring]
    jobs += [base._replace(mesh=(("data", 1), ("context", n), ("tensor", 1)))] * (n > 1)
    jobs += [base._replace(phase=phase, layout=layout, ring=ring) for layout in shard.LAYOUTS
             for ring in (0, 1) for phase in ("prefill", "generate")
             if layout != "context" or phase == "prefill" and not ring]
    if args.chip:
        jobs = [job._replace(flags=flags) for job in jobs for flags in (False, True)
                if not flags or job.phase == "train" and TARGETS[args.chip[0]].extra == "tpu"]
    return [job for job in jobs
            if any(word in form_name(job) for word in args.form or [""])]


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
    return {"form": form_name(job), "mesh": dict(job.mesh), **told,
            "collectives": prepared.row["collectives"],
            **({} if formula is None else {
                "predicted_bytes": sum(size for _, size in formula.values()),
                "counted_bytes": sum(size for _, size in counted.values()) // steps,
                "as_predicted": counted == {kind: (steps * number, steps * size)
                                            for kind, (number, size) in formula.items()},
                "link_seconds": links["link_seconds"], "hops": links["hops"]}),
            "measured_seconds": statistics.median(times) / steps}


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
            raise ValueError(f"nothing to compile: --form {' --form '.join(args.form or ['any'])}")
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
    n, first, rows = jax.device_count(), jax.process_index() == 0, []
    if first:
        print(f"{name}, B={args.batch}, {n} device(s) in {jax.process_count()} process(es); sent: "
              f"bytes a device and step, link: at {args.link / GB:g} GB/s\nCPU devices share this "
              "machine's cores: bytes and steps carry over to other machines, time and overlap do "
              "not")
        print(f"{'form':36} {'mesh':>9} {'predicted':>11} {'counted':>11} {'link us':>9} "
              f"{'measured ms':>11}  collectives")
    for job in form_jobs(args, name, cfg, n):
        try:
            row = measure_form(job, args.link, args.seed)
        except KeyboardInterrupt:
            say("\ninterrupted: what was measured so far")
            break
        except ValueError as error:  # the same in every process
            if first:
                print(f"{form_name(job):36} cannot: {error}")
            continue
        rows.append(row)
        if first:
            amounts, link = ("the compiler's",) * 2, "-"
            if "predicted_bytes" in row:
                amounts = row["predicted_bytes"], row["counted_bytes"]
                link = f"{row['link_seconds'] * 1e6:.3g}"
            print(f"{row['form']:36} {'x'.join(map(str, row['mesh'].values())):>9} {amounts[0]:>11}"
                  f" {amounts[1]:>11} {link:>9} {row['measured_seconds'] * 1e3:>11.2f}  "
                  + ", ".join(f"{c['number']} {kind}" for kind, c in row["collectives"].items()))
    if not rows:
        raise ValueError("nothing to measure: " + (f"--form {' --form '.join(args.form)}" if
                         args.form else f"no form can be split over --devices {n}"))
    if first:
        finish(args, machine=machine(), ceilings={}, rows=rows)


def start_processes(args):
    """Starts this command in several local processes that find each other; the first one prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    if args.devices % args.processes:
        raise ValueError(f"--devices {args.devices} cannot be split over --processes "
                         f"{args.processes}")
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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def checked(parse, known):
    """fn, str -> an argument's type: where `parse` refuses a text, one line says what is known."""
    def read(text):
        try:
            return parse(text)
        except (ValueError, KeyError) as error:
            raise argparse.ArgumentTypeError(
                str(error) if known is None else f"{text!r}: expected {known}") from None
    return read


def whole(text, least=1, most=2 ** 31 - 1):
    """str -> int, from `least` to `most`, by default what int32 holds; ValueError otherwise."""
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ValueError
    return int(text)


def above_zero(text):
    """str -> float, above 0 and finite; ValueError otherwise."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def some_dtypes(text):
    """str -> list of str; ValueError otherwise."""
    if not set(text.split(",")) <= set(DTYPES):
        raise ValueError
    return text.split(",")


def some_kept(text):
    """str -> tuple of str: what a layer keeps; ValueError otherwise."""
    names = () if text == "none" else tuple(text.split(","))
    shard.check_kept(names)
    return names


number = checked(whole, "one whole number from 1 to 2147483647")
seed = checked(partial(whole, least=0, most=2 ** 32 - 1), "a whole number from 0 to 4294967295")
numbers = checked(lambda text: [whole(part) for part in text.split(",")],
                  "whole numbers from 1, as 1,8,32")
positive = checked(above_zero, "a number above 0")
latency = checked(lambda text: above_zero(text) if float(text) else 0.0, "a number from 0")
dtypes = checked(some_dtypes, f"some of {', '.join(DTYPES)}")
kept_names = checked(some_kept, f"none, or some of {', '.join(KEEPABLE)}")
model = checked(lambda text: (text, parse_model(text)), None)
chip_name = checked(lambda text: (text, parse_chip(text)), None)
ring_ways = checked(lambda text: [{"0": 0, "1": 1, "2": 2}[n] for n in text.split(",")],
                    "some of 0, 1, 2")
switch = checked(lambda text: [{"off": False, "on": True}[word] for word in text.split(",")],
                 "off, on, or off,on")


def parse_mesh(text):
    """str -> dict: axes and sizes; ValueError for one that is named twice, or otherwise."""
    pairs = [part.split("=") for part in text.split(",")]
    mesh = {name: whole(n) if "x" not in n else tuple(map(whole, n.split("x")))
            for name, n in pairs}
    if len(mesh) < len(pairs):
        raise ValueError
    return mesh


mesh_sizes = checked(parse_mesh, "axes and sizes, each once, as data=16,tensor=4, or tensor=4x4")


def writable(text):
    """str -> the path; refused before any work where nothing can be written there."""
    try:
        with open(text, "a"):
            return text
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}") from None


def picture_path(text):
    """str -> the path of a picture, for which there is what draws it."""
    if not text.endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name that ends in .png or .svg")
    checked(lambda _: pyplot(), None)(text)
    return writable(text)


def add_int8(command):
    """Parser -> None: what commands take that take int8 weights."""
    command.add_argument("--int8", choices=tuple(INT8), help="int8 weights are widened in the "
                         "product (Q8: left out, on any chip) or meet int8 activations (Q8A8: on "
                         "this machine's CPU)")


def add_plan(command):
    """Parser -> None: what `plan` takes."""
    command.add_argument("--model", type=model, metavar="NAME|SHAPE", default="gemma-7b",
                         help="letters, or one of " + ", ".join(MODELS) + " (gemma-7b)")
    command.add_argument("--chip", type=chip_name, default="tpu-v4", metavar="NAME|NUMBERS",
                         help="one of " + ", ".join(CHIPS) + ", or flops/s,bytes/s,bytes,link "
                         "bytes/s (tpu-v4)")
    command.add_argument("--chips", type=number, default=1, help="tensor parallel over them (1)")
    command.add_argument("--context", type=number, default=2048, help="tokens a sequence (2048)")
    command.add_argument("--batch", type=number, help="sequences (as many as fit with "
                         f"{HELD_BACK:.0%} of memory held back; --train: 4 a chip)")
    command.add_argument("--weights", choices=DTYPES, default="bfloat16", help="(bfloat16)")
    command.add_argument("--cache", choices=DTYPES, default="bfloat16", help="(bfloat16)")
    command.add_argument("--kv-heads", type=number, metavar="K", help="in place of the model's")
    add_int8(command)
    command.add_argument("--parameters", type=positive, metavar="N", help="a rounded count, as "
                         "7e9; the exact one stands beside it")
    command.add_argument("--train", action="store_true", help="training, too")
    command.add_argument("--tokens", type=positive, default=1e12, help="to train on (1e12)")
    command.add_argument("--mfu", type=positive, default=0.5, help="model flops utilisation of "
                         "training (0.5)")
    command.add_argument("--hop", type=latency, default=HOP_SECONDS, metavar="SECONDS", help="from "
                         "device to device (1e-6)")
    command.add_argument("--compile", action="store_true", help="and ask the chip's compiler what "
                         "fits (needs its extra)")


def add_complete(command):
    """Parser -> None: what `complete` takes."""
    command.add_argument("prompt", help="the text to go on from")
    command.add_argument("--model", required=True, metavar="DIR", help="config.json, "
                         "model.safetensors and tokenizer.json, or what train --save wrote")
    command.add_argument("--new", type=number, default=64, help="tokens to generate (64)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    command.add_argument("--top-k", type=int, default=0, help="of the k most probable (0: all)")
    command.add_argument("--top-p", type=float, default=1.0, help="of those reaching p (1: all)")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (the file's)")
    command.add_argument("--cache", choices=DTYPES, help="of the cache (what is fastest here)")
    add_int8(command)
    command.add_argument("--draft", metavar="DIR|ngram", help="speculate with a smaller model, or "
                         "with what the text said before")
    command.add_argument("--n-draft", type=number, default=4, help="tokens it proposes (4)")
    command.add_argument("--devices", type=number, metavar="N", help="tensor parallel over so many "
                         "(as many as are here and divide the model; on a CPU so many are made)")


def add_chip(command):
    """Parser -> None: what the phases take that chips which are not here can be asked for."""
    command.add_argument("--chip", type=chip_name, metavar="NAME", help="predict and compile for "
                         "this chip, measure nothing: one of " + ", ".join(TARGETS))
    command.add_argument("--chips", type=number, default=1, help="so many of them (1)")
    command.add_argument("--timeline", type=picture_path, metavar="FILE.png|svg", help="draw a "
                         "layer of each row as the chip's compiler schedules it")


def add_shard(command):
    """Parser -> None: what `shard` takes."""
    add_chip(command)
    command.add_argument("--dtype", choices=DTYPES[:2], default="float32", help="(float32)")
    command.add_argument("--model", type=model, metavar="NAME|SHAPE", help=f"({SHARDED})")
    command.add_argument("--devices", type=number, default=8, help="on a CPU, so many are made: "
                         "in all, or with --distributed in each process (8)")
    command.add_argument("--batch", type=number, default=8, help="sequences (8)")
    command.add_argument("--prompt", type=number, default=64, help="tokens a sequence (64)")
    command.add_argument("--new", type=number, default=8, help="tokens to generate (8)")
    command.add_argument("--form", action="append", metavar="WORD", help="only forms whose name "
                         "holds the word, such as loss, or ring; more than once for more (all)")
    command.add_argument("--link", type=positive, default=4.5e10, metavar="BYTES_PER_SECOND",
                         help="that a device sends one way (4.5e10: a TPU v4 link)")
    command.add_argument("--processes", type=number, default=1, help="start so many here (1)")
    command.add_argument("--distributed", action="store_true", help="this is one process of a pod "
                         "or a Slurm job: jax.distributed.initialize() finds the others")
    command.add_argument("--coordinator", help=argparse.SUPPRESS)
    command.add_argument("--process", type=int, help=argparse.SUPPRESS)


def add_scale(command):
    """Parser -> None: what `scale` takes."""
    command.add_argument("--model", type=model, metavar="NAME|SHAPE", help=f"({GROWTH})")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights "
                         "(float32)")
    add_int8(command)


def add_phase(command, name):
    """Parser, str -> None: what the phases take."""
    command.add_argument("--model", type=model, metavar="NAME|SHAPE",
                         help=f"letters ({DEFAULT}) or one of {', '.join(MODELS)}")
    command.add_argument("--batch", type=numbers, help="sequences, as 1,8,32")
    command.add_argument("--dtype", type=dtypes, default=["float32"], help="of the weights: "
                         "float32 (default), bfloat16, int8 (not for train), or several")
    command.add_argument("--prompt", type=number, help="tokens a sequence (256)", default=256)
    command.add_argument("--new", type=number, default=32, help="tokens to generate (32)")
    command.add_argument("--kv-heads", type=numbers, metavar="K", help="in place of the model's, "
                         "as 8,2,1" + ": trains each on a text" * (name == "train"))
    if name == "train":
        command.add_argument("--keep", type=kept_names, metavar="NAMES",
                             help="what a layer keeps for its gradient on several chips, of "
                             f"{', '.join(KEEPABLE)}, or none ({','.join(shard.KEPT)})")
        command.add_argument("--text", help="a file to train on (README.md)")
        command.add_argument("--steps", type=number, help="train on --text so often (100)")
        command.add_argument("--lr", type=positive, default=1e-3, help="learning rate (0.001)")
        command.add_argument("--save", metavar="DIR", help="write what was trained there")
        command.add_argument("--resume", metavar="DIR", help="go on from what --save wrote, as one "
                             "longer run: with the same --text, --batch, --prompt, --lr and --seed")
    else:
        add_int8(command)
        command.add_argument("--cache", choices=DTYPES, help="dtype of the cache (the fastest here:"
                             " float32 on a CPU, elsewhere bfloat16 for narrow weights)")
    if name != "serve":
        add_chip(command)
        command.add_argument("--mesh", type=mesh_sizes, metavar="data=N,tensor=N", help="of the "
                             "chips (train: all data; others: all tensor); tensor=MxN: keys over "
                             "M, the layout over N; train: context=N too")
        command.add_argument("--layout", choices=tuple(shard.LAYOUTS), help="of a cache on several "
                             "chips (the first that divides); context: slots, and prompts too")
        command.add_argument("--ring", type=ring_ways, default=[0], help="collective matmuls: 0 "
                             "the references (default), 1 or 2 rings of so many ways, or several")
        command.add_argument("--flags", type=switch, default=[False], help="compile with the "
                             "lecture's flags for a TPU: off (default), on, or off,on")
        command.add_argument("--by", choices=("hand", "compiler"), default="hand", help="who "
                             "chooses training's collectives (hand)")
    if name in ("verify", "speculate"):
        command.add_argument("--n-draft", type=number, default=4, help="tokens proposed (4)")


def add_everywhere(parser, **how):
    """Parser -> None: what every command takes, before its name or after it."""
    def add(*names, default, **more):
        parser.add_argument(*names, **more, **({"default": default} | how))

    add("--seed", type=seed, default=0, help="of weights, tokens and draws (0)")
    add("--json", type=writable, metavar="FILE", default=None, help="write the result there too")
    add("--profile", metavar="DIR", default=None, help="write traces for Perfetto or XProf there, "
        "and print where each row's time goes")
    add("--plot", type=picture_path, metavar="FILE.png|svg", default=None, help="draw the roofline")


def parse(argv):
    """list of str -> the command line's arguments; SystemExit with one line where they are bad."""
    parser = Parser(prog="bench.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, under a minute")
    add_everywhere(parser)
    others = {"plan": ("predict, without running", add_plan),
              "scale": ("how time grows with each size", add_scale),
              "complete": ("write on from a prompt", add_complete),
              "shard": ("what several devices send each other", add_shard)}
    phases = [name for name in PHASES if name not in PARTIAL]
    commands = parser.add_subparsers(dest="phase", metavar="|".join([*phases, *others]))
    for name in [*phases, *others]:
        text, add = others.get(name, (f"measure {name} alone", partial(add_phase, name=name)))
        command = commands.add_parser(name, help=text)
        add_everywhere(command, default=argparse.SUPPRESS)
        add(command)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.quick and args.phase:
        parser.error(f"--quick is for all phases: leave out --quick or {args.phase}")
    if args.phase == "plan" and args.mfu > 1:
        parser.error(f"--mfu {args.mfu:g}: a share of 1 at most, as 0.5")
    if getattr(args, "chip", None) and (args.phase != "plan" or args.compile):
        try:
            slice_of(args.chip[0], args.chips)
        except ValueError as error:
            parser.error(str(error))
    if getattr(args, "chip", None) and args.phase != "plan":
        here = [name for name in ("text", "steps", "save", "resume", "profile", "plot")
                if getattr(args, name, None)]
        if here:
            parser.error(f"--{here[0]} is for this machine: leave out --{here[0]} or --chip")
        if TARGETS[args.chip[0]].extra != "tpu" and True in getattr(args, "flags", ()):
            parser.error(f"--flags are a TPU compiler's: {args.chip[0]} has none")
        if TARGETS[args.chip[0]].extra != "tpu" and args.timeline:
            parser.error(f"--timeline takes a TPU's times: {args.chip[0]}'s compiler gives none")
    elif args.phase in (*PHASES, "shard") and args.phase != "serve":
        usual = dict(mesh=None, layout=None, timeline=None, chips=1, ring=[0], flags=[False],
                     by="hand", keep=None)
        given = [name for name, value in usual.items() if getattr(args, name, value) != value]
        if given:
            parser.error(f"--{given[0]} is for a --chip that is not here" + (
                "; or: bench.py shard" if args.phase != "shard" and given[0] != "keep" else ""))
    if getattr(args, "keep", None) is not None and args.chip and (
            args.by == "compiler" or args.chips == 1):
        parser.error("--keep is for several chips, by hand: leave it out")
    if getattr(args, "int8", None) and "int8" not in (
            args.weights if args.phase == "plan" else args.dtype or ""):
        parser.error(f"--int8 {args.int8} is for int8 weights: "
                     + ("--weights int8" if args.phase == "plan" else "--dtype int8"))
    if args.phase == "train":
        if "int8" in args.dtype:
            parser.error("train takes --dtype float32 or bfloat16: int8 has no gradient")
        if args.resume and args.kv_heads:
            parser.error("--resume goes on with the heads that were saved: leave out --kv-heads")
        if args.text or args.steps or args.save or args.resume or args.kv_heads and not args.chip:
            args.text = args.text or pathlib.Path(__file__).with_name("README.md")
            args.steps = args.steps or 100
            if len(args.dtype) > 1 or len(args.batch or [8]) > 1:
                parser.error("training on a text takes one --batch and one --dtype")
            if args.save and len(args.kv_heads or [1]) > 1:
                parser.error("--save keeps one model: give one of --kv-heads")
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


def default_batches(job):
    """Job -> list of int: of the default run's generating. On a CPU they are fixed, so that its
    time is; elsewhere as many as its memory and its sheet suggest."""
    free, known = memory(), recognised(jax.devices()[0].device_kind)
    if on_cpu() or free is None:
        return [1, 8, 32]
    limits = sheet(CHIPS[known]) if known else None
    return grown_batches(job, free, critical_batch(job, limits) if limits else 256)


def jobs_of(args):
    """-> list of Job: those of one phase, or of the default run."""
    chip = getattr(args, "chip", None)
    if args.phase:
        size = SMALL if args.phase == "train" and args.text else DEFAULT
        name, cfg = args.model or (size, parse_model(size))
        usual = {"train": [8], "verify": [1], "speculate": [1]}
        batches = args.batch or usual.get(args.phase, [1, 8, 32])
        shapes = {args.phase: (batches, args.prompt, args.new)}
        if args.phase == "speculate" and not chip:  # and what it replaces
            shapes = {"generate": shapes["speculate"], **shapes}
        kinds = [(dtype, args.cache if args.phase != "train" and args.cache
                  else default_cache(dtype, chip)) for dtype in args.dtype]
    else:
        name, kinds = DEFAULT if on_cpu() else WIDER, [
            (dtype, default_cache(dtype)) for dtype in DTYPES] + [("int8", "int8")]
        if args.quick:
            name, kinds = QUICK, [("float32", "float32")]
        cfg = parse_model(name)
        many = default_batches(Job("generate", name, computing_in(cfg, "bfloat16"), 1, 240, 16,
                                   "bfloat16", default_cache("bfloat16")))
        shapes = {"train": ([2 if args.quick else 4], 128, 0),
                  "prefill": ([1] if args.quick else [1, 8], 128 if args.quick else 64, 0),
                  "generate": (many, 240, 16), "verify": ([1], 240, 16),
                  "speculate": ([1], 96, 32), **({} if args.quick else {"serve": ([8], 64, 32)})}
    heads = getattr(args, "kv_heads", None) or [cfg.K]
    extra = {name: getattr(args, name) for name in ("n_draft", "keep")
             if getattr(args, name, None) is not None}
    extra["int8"] = getattr(args, "int8", None) or default_int8(chip)
    jobs = [Job(phase, name, computing_in(replace(cfg, K=K), dtype, chip), B, prompt, new, dtype,
                cache, **extra) for dtype, cache in kinds for K in heads
            for phase, (batches, prompt, new) in shapes.items() for B in batches
            if args.phase or cache != "int8" or phase == "generate"
            if (phase, dtype) != ("train", "int8")]
    if not chip:
        return jobs
    return [on_chips(job._replace(ring=ring, flags=flags, by=args.by), chip[0], args.chips,
                     args.mesh, args.layout)
            for job in jobs for ring in args.ring for flags in args.flags]


def worst(jobs, rows):
    """list of Job, list of rows -> list of (Job, row): of each phase that is compiled the one with
    the largest gap, the largest first."""
    down = sorted(zip(jobs, rows), key=lambda pair: -pair[1]["ratio"])
    found = {}
    for job, row in down:
        if "temp_bytes" in row:
            found.setdefault(job.phase, (job, row))
    return list(found.values())


def run(args):
    """Measures what the command line asks for, and prints it."""
    others = {"plan": plan, "scale": scale, "complete": complete, "shard": run_shard}
    if args.phase in others:
        return others[args.phase](args)
    jobs = jobs_of(args)
    if jobs[0].chip:
        return run_chips(args, jobs)
    for job in jobs:
        check_memory(job)
    if args.phase == "train" and args.text:
        return train_on_text(args, jobs)
    limits, rows, split, learned = ceilings(jobs), [], [], None
    known = recognised(jax.devices()[0].device_kind)
    limits |= {"sheet": sheet(CHIPS[known])} if known else {}
    try:
        if not args.phase or args.phase == "speculate":
            learned = {K: learn(cfg, args.seed) for K, cfg in
                       {job.cfg.K: job.cfg for job in jobs}.items()}
        if not args.phase:
            check_recital(learned[jobs[0].cfg.K], jobs[0].cfg)
        for (dtype, cfg), group in itertools.groupby(jobs, lambda job: (job.dtype, job.cfg)):
            params = in_dtype(init(jax.random.key(args.seed), cfg, cfg.dtype), cfg, dtype,
                              jobs[0].int8)
            for job in group:
                own = in_dtype(learned[cfg.K], cfg, dtype, job.int8) if job.phase == "speculate" \
                    else params
                rows.append(measure(job, own, limits, args.seed, args.profile))
        if not args.phase and not args.profile:  # for those with the largest gap, why
            for job, row in worst(jobs, rows)[:1 if args.quick else 3]:
                say(f"profiling {job.phase} {job.dtype} B={job.B}")
                own = learned[job.cfg.K] if job.phase == "speculate" else init(
                    jax.random.key(args.seed), job.cfg, job.cfg.dtype)
                row["profile"] = profile(prepare(job, in_dtype(own, job.cfg, job.dtype, job.int8),
                                                 args.seed, traced=True))
    except KeyboardInterrupt:
        say("\ninterrupted: what was measured so far")
    print_attention(jobs[-1])
    if not args.phase:
        split = print_split(max((job for job in jobs if job.phase == "generate" and job.B < 10),
                                key=lambda job: job.B))
    report(args, rows, limits, tensor_parallel=split)


def keep_freed_memory():
    """-> bool: has the C library been told to keep what is freed? Only glibc can be, on the CPU.

    XLA's CPU code asks for its temporaries anew at every step. By default glibc returns each large
    one to the kernel, which then has to zero every page again: 294,000 page faults and 0.6 s of the
    kernel's time in a training step with 1.2 GB of them. Kept, an f32 step takes 12 to 15% less.
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
    except ValueError as error:
        sys.exit(f"bench.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nbench.py: interrupted before there was anything to print")


if __name__ == "__main__":
    main()
