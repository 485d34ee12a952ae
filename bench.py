"""bench: predict each phase from flops and bytes, measure it, and print both side by side.

    python bench.py [--quick]                             every phase of the default model
    python bench.py generate|prefill|train|serve ...      one phase alone
    python bench.py train --text FILE --save DIR          train on a text file
    python bench.py complete --model DIR "So long"        write on, with a real model
    python bench.py shard --devices 8                     what several devices send each other

Tables go to stdout, whose last line is one JSON object; progress goes to stderr.
"""
import argparse
import itertools
import json
import os
import pathlib
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import shard
from infer import (decode_bytes, decode_flops, generate, init_cache, kv_bytes, load, model_draft,
                   ngram_draft, prefill, prefill_flops, quantize_params, read_json, save, serve,
                   speculate, weight_bytes)
from minillm import (Config, adam_init, cast, check_tokens, init, loss, param_count, train_flops,
                     train_step)

MB, GB = 1e6, 1e9
SENTENCE = "So long and thanks for all the fish"
PROMPT = "So long and thanks for"
DEFAULT = "L6,E1024,H16,K4,D64,F2816,V256"
QUICK = "L2,E1024,H16,K4,D64,F2816,V256"
SHARDED = "L2,E512,H8,K8,D64,F1408,V256"
REQUESTS = 3  # that `serve` gets for each row, so that it is refilled twice
STRIDE = 8  # tokens between two looks at what was made
SMALL = "L4,E256,H8,K2,D32,F704,V256"  # learns a text of some KB in a minute on two cores

gemma = partial(Config, V=256000, act="gelu", embed_scale=True)
llama2 = partial(Config, D=128, V=32000, eps=1e-5, tied=False)
llama3 = partial(Config, K=8, V=128256, rope_base=5e5, eps=1e-5)
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
    "smollm2-135m": smollm2(L=30, E=576, H=9, K=3, F=1536),
    "smollm2-360m": smollm2(L=32, E=960, H=15, K=5, F=2560),
    "smollm2-1.7b": smollm2(L=24, E=2048, H=32, K=32, F=8192, rope_base=1.3e5),
    "tinyllama-1.1b": Config(L=22, E=2048, H=32, K=4, D=64, F=5632, V=32000, eps=1e-5, tied=False),
}


train_jit = jax.jit(train_step, static_argnames="cfg", donate_argnames=("params", "adam"))
prefill_jit = jax.jit(prefill, static_argnames="cfg", donate_argnames="cache")
HOW = ("n", "cfg", "temperature", "top_k", "top_p", "end")
generate_jit = jax.jit(generate, static_argnames=HOW, donate_argnames=("cache", "logits"))
speculate_jit = jax.jit(speculate, static_argnames=HOW, donate_argnames=("cache", "tokens"))
DTYPES = ("float32", "bfloat16", "int8")


def on_cpu():
    """-> bool: what is fastest there differs."""
    return jax.default_backend() == "cpu"


def default_cache(dtype):
    """dtype of the weights -> of the cache: on a CPU bf16 slots are copied and int8 ones widened at
    every step, so f32 is the fastest; elsewhere fewer bytes are."""
    return "float32" if on_cpu() or dtype == "float32" else "bfloat16"


def computing_in(cfg, dtype):
    """Config, dtype of the weights -> Config: around int8 weights, activations are wide."""
    wide = "float32" if on_cpu() else "bfloat16"
    return replace(cfg, dtype=wide if dtype == "int8" else dtype)


def in_dtype(params, cfg, dtype):
    """Params, cfg, dtype -> Params: cast, or quantised to int8 weights for int8 activations."""
    if dtype == "int8":
        return quantize_params(params, cfg)
    return params if params.embed.dtype == dtype else cast(params, dtype)


def say(*words, end="\n"):
    """Progress, to stderr."""
    print(*words, file=sys.stderr, end=end, flush=True)


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
    """dtype -> flops/s of one large product, its best run: weights stored output x input."""
    size = 2048 if on_cpu() else 8192
    sums = jnp.int32 if dtype == "int8" else jnp.float32
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jax.lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), preferred_element_type=sums))
    run = partial(seconds_of, lambda: product(a, a).block_until_ready(), for_seconds=1.5)
    return 2 * size ** 3 / run()[0]


def measure_read():
    """-> bytes/s of reading half a GiB, more than any cache holds: the best run of two programs."""
    a = jnp.ones((1 << 15, 1 << 12))
    row = jnp.ones((1 << 12,))
    programs = jax.jit(lambda a: jnp.sum(a)), jax.jit(lambda a: a @ row)
    return a.nbytes / min(seconds_of(lambda: program(a).block_until_ready())[0]
                          for program in programs)


def ceilings(dtypes):
    """dtypes -> dict: what this machine can do at best, the denominators of MFU and MBU."""
    say("measuring the machine:", end=" ")
    flops = {}
    for dtype in dtypes:
        flops[dtype] = measure_flops(dtype)
        say(f"{dtype} {flops[dtype] / GB:.0f} GFLOP/s,", end=" ")
    read = measure_read()
    say(f"reading {read / GB:.1f} GB/s")
    return {"flops_per_second": flops, "read_bytes_per_second": read}


def machine():
    """-> dict: where the figures come from."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "count": jax.device_count(), "cores": os.cpu_count(),
            "jax": jax.__version__, "python": platform.python_version()}


# ------------------------------------------------------------------------------------------- phases


class Cost(NamedTuple):
    """What one step takes, from the shapes alone."""
    T: int             # new tokens a row
    S: int             # slots a row that attention looks at
    tokens: int        # made or read, in all rows
    flops: dict        # by product, as the program multiplies them
    weight_bytes: int
    cache_bytes: int
    parts: dict        # name -> (flops, bytes), each bound by one or the other


def cost(T, S, tokens, flops, weight_bytes, cache_bytes, **parts):
    """-> Cost: attention's flops go with `cache_bytes`, all others with `weight_bytes`."""
    attention = flops["scores"] + flops["values"]
    return Cost(T, S, tokens, flops, weight_bytes, cache_bytes,
                {"weights": (sum(flops.values()) - attention, weight_bytes),
                 "attention": (attention, cache_bytes), **parts})


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


def train_cost(job):
    """Weights are read forwards, read backwards, and written as gradients: three times their bytes.

    AdamW reads p, m, v and the gradient and writes p, m and v: 28 bytes a parameter. What is saved
    between the two passes is not predicted: it need not leave the chip, and where it does, shows.
    """
    cfg, B, T = job.cfg, job.B, job.prompt
    wide = jnp.dtype(cfg.dtype).itemsize
    return cost(T, T, B * T, train_flops(cfg, B, T), 3 * wide * param_count(cfg), 0,
                optimizer=(0, 28 * param_count(cfg)))


def prefill_cost(job):
    """All weights once, and the cache written once."""
    cfg, B, T = job.cfg, job.B, job.prompt
    return cost(T, T, B * T, prefill_flops(cfg, B, T, job.dtype), weight_bytes(cfg, job.dtype),
                kv_bytes(cfg, B, T, job.cache_dtype))


def generate_cost(job):
    """One step: all weights, and all slots of the cache whether filled or not."""
    cfg, B, S = job.cfg, job.B, job.prompt + job.new
    moved = decode_bytes(cfg, B, S, cache_dtype=job.cache_dtype, dtype=job.dtype)
    return cost(1, S, B, decode_flops(cfg, B, S, dtype=job.dtype), moved["weights"],
                moved["cache_read"] + moved["cache_write"])


def serve_cost(job):
    """A prefill for each request, and steps for B at a time."""
    steps, requests = REQUESTS * job.new, REQUESTS * job.B
    each = [(requests, prefill_cost(job._replace(B=1))), (steps, generate_cost(job))]
    names = {name for _, c in each for name in c.flops}
    flops = {name: sum(n * c.flops.get(name, 0) for n, c in each) for name in names}
    parts = {f"{word}, {name}": (n * part[0], n * part[1])
             for word, (n, c) in zip(("prefill", "generate"), each)
             for name, part in c.parts.items()}
    return Cost(1, job.prompt + job.new, requests * job.new, flops,
                sum(n * c.weight_bytes for n, c in each), sum(n * c.cache_bytes for n, c in each),
                parts)


def build_train(job, params, key):
    """-> a whole step of AdamW on random tokens, from f32 masters that are its own."""
    params = jax.tree.map(lambda w: jnp.array(w, jnp.float32), params)  # a copy: it is donated
    tokens = jax.random.randint(key, (job.B, job.prompt + 1), 0, job.cfg.V)
    step = jax.jit(partial(train_step, cfg=job.cfg, lr=1e-4), donate_argnums=(0, 1))
    return step, (params, adam_init(params), tokens), lambda out, args: (*out[:2], tokens)


def build_prefill(job, params, key):
    """-> B random prompts of T tokens, read into a cache of T slots."""
    cfg, B, T = job.cfg, job.B, job.prompt
    tokens = jax.random.randint(key, (B, T), 0, cfg.V)
    step = jax.jit(lambda params, cache, tokens: prefill(
        params, cache, tokens, jnp.full((B,), T), cfg), donate_argnums=1)
    args = params, init_cache(cfg, B, T, job.cache_dtype), tokens
    return step, args, lambda out, args: (args[0], out[1], tokens)


def build_generate(job, params, key):
    """-> `new` steps behind a prompt, greedily, in one scan. The prompt's slots hold zeros."""
    cfg, B, prompt = job.cfg, job.B, job.prompt

    def run(params, cache, logits):  # every run starts behind the prompt
        cache = cache._replace(length=jnp.full((B,), prompt, jnp.int32))
        return generate(params, cache, logits, key, job.new, cfg)

    cache = init_cache(cfg, B, prompt + job.new, job.cache_dtype)
    args = params, cache, jax.random.normal(key, (B, cfg.V))
    return jax.jit(run, donate_argnums=1), args, lambda out, args: (args[0], out[2], out[1])


def build_serve(job, params, key):
    """-> REQUESTS * B random prompts through B rows. Runs on the host: it compiles itself."""
    cfg, S = job.cfg, job.prompt + job.new
    prompts = np.asarray(jax.random.randint(key, (REQUESTS * job.B, job.prompt), 0, cfg.V))

    def run(params):
        return dict(serve(params, prompts, job.B, S, job.new, key, cfg,
                          stride=min(8, job.new), cache_dtype=job.cache_dtype))

    return run, (params,), lambda out, args: args


class Phase(NamedTuple):
    """cost(job) predicts; build(job, params, key) gives what to run: a function, jitted where it is
    to be compiled, its first arguments, and the next call's from (result, arguments)."""
    cost: Callable
    build: Callable
    steps: Callable = lambda new: 1  # in one call


PHASES = {"train": Phase(train_cost, build_train),
          "prefill": Phase(prefill_cost, build_prefill),
          "generate": Phase(generate_cost, build_generate, lambda new: new),
          "serve": Phase(serve_cost, build_serve)}


# ------------------------------------------------------------------------------ predict and measure


def predict(cost, dtype, ceilings):
    """Cost, dtype, dict -> dict: seconds of a step: every part takes its flops' time or its bytes'
    time, whichever is longer, and parts follow one another."""
    peak, read = ceilings["flops_per_second"][dtype], ceilings["read_bytes_per_second"]
    parts = [{"name": name, "flops": flops, "bytes": moved,
              "seconds": max(flops / peak, moved / read),
              "bound": "flops" if flops / peak > moved / read else "bytes"}
             for name, (flops, moved) in cost.parts.items()]
    by = {bound: sum(part["seconds"] for part in parts if part["bound"] == bound)
          for bound in ("flops", "bytes")}
    return {"predicted_seconds": sum(by.values()), "bound": max(by, key=by.get), "parts": parts}


def utilisation(done, seconds, ceiling, what, row):
    """-> share of the ceiling, or None and an error in the row: nothing runs faster than it can."""
    share = done / seconds / ceiling
    if share <= 1:
        return share
    row["errors"].append(
        f"{what} would be {share:.0%}: the ceiling was measured too low (was another program "
        "running?) or what is read stays in a cache: take a larger model, and measure again alone")
    return None


def predicted_row(job, ceilings):
    """Job, dict -> dict: the half of a row that is known before anything runs."""
    cost = PHASES[job.phase].cost(job)
    padding = cost.flops.get("padding", 0)
    return {"phase": job.phase, "model": job.model, "dtype": job.dtype,
            "cache_dtype": job.cache_dtype, "B": job.B, "T": cost.T, "S": cost.S,
            "tokens": cost.tokens,
            "flops": sum(cost.flops.values()) - padding, "padding_flops": padding,
            "weight_bytes": cost.weight_bytes, "cache_bytes": cost.cache_bytes,
            **predict(cost, job.dtype, ceilings)}


def measured_row(row, times, compile_seconds, ceilings):
    """dict, list of seconds, float, dict -> dict: the whole row."""
    seconds, row = statistics.median(times), dict(row, compile_seconds=compile_seconds, errors=[])
    row |= {"measured_seconds": seconds, "p10_seconds": float(np.quantile(times, 0.1)),
            "p90_seconds": float(np.quantile(times, 0.9)), "runs": len(times),
            "ratio": seconds / row["predicted_seconds"],
            "tokens_per_second": row["tokens"] / seconds,
            "tokens_per_second_per_sequence": row["tokens"] / seconds / row["B"]}
    peak, read = ceilings["flops_per_second"][row["dtype"]], ceilings["read_bytes_per_second"]
    row["mfu"] = utilisation(row["flops"], seconds, peak, "MFU", row)
    moved = row["weight_bytes"] + row["cache_bytes"]
    row["mbu"] = utilisation(moved, seconds, read, "MBU", row)
    return row


def measure(job, params, ceilings, seed):
    """Job, Params, dict, int -> dict: one row, predicted first, then compiled, then measured."""
    row = predicted_row(job, ceilings)
    say(f"{job.phase} {job.dtype} B={job.B}: predicted {row['predicted_seconds'] * 1e3:.1f} ms",
        end="")
    step, args, feed = PHASES[job.phase].build(job, params, jax.random.key(seed))
    start = time.perf_counter()
    if hasattr(step, "lower"):
        step = step.lower(*args).compile()
    compile_seconds = time.perf_counter() - start

    def call():
        nonlocal args
        out = jax.block_until_ready(step(*args))
        args = feed(out, args)

    times = [seconds / PHASES[job.phase].steps(job.new) for seconds in seconds_of(call)]
    row = measured_row(row, times, compile_seconds, ceilings)
    say(f", measured {row['measured_seconds'] * 1e3:.1f} ms")
    return row


COLUMNS = (  # heading, width, text of a row
    ("phase", -9, lambda r: r["phase"]), ("dtype", -9, lambda r: r["dtype"]),
    ("cache", -9, lambda r: r["cache_dtype"] if r["phase"] != "train" else "-"),
    ("B", 3, lambda r: r["B"]), ("T", 4, lambda r: r["T"]), ("S", 5, lambda r: r["S"]),
    ("weights MB", 10, lambda r: f"{r['weight_bytes'] / MB:.1f}"),
    ("cache MB", 8, lambda r: f"{r['cache_bytes'] / MB:.1f}"),
    ("predict ms", 10, lambda r: f"{r['predicted_seconds'] * 1e3:.1f}"),
    ("measured ms", 11, lambda r: f"{r['measured_seconds'] * 1e3:.1f}"),
    ("p10 to p90", 15, lambda r: f"{r['p10_seconds'] * 1e3:.1f}-{r['p90_seconds'] * 1e3:.1f}"),
    ("ratio", 5, lambda r: f"{r['ratio']:.2f}"), ("bound", 5, lambda r: r["bound"]),
    ("MFU", 5, lambda r: "error" if r["mfu"] is None else f"{r['mfu']:.0%}"),
    ("MBU", 5, lambda r: "error" if r["mbu"] is None else f"{r['mbu']:.0%}"),
    ("tok/s/seq", 9, lambda r: f"{r['tokens_per_second_per_sequence']:.1f}"),
    ("tok/s", 8, lambda r: f"{r['tokens_per_second']:.1f}"),
    ("compile s", 9, lambda r: f"{r['compile_seconds']:.1f}"))


def line(texts):
    """-> str: one line of the table."""
    return "  ".join(f"{text:<{-width}}" if width < 0 else f"{text:>{width}}"
                     for text, (_, width, _) in zip(texts, COLUMNS)).rstrip()


def report(rows, ceilings, **more):
    """Prints the table, its errors, and the JSON object: the last line of stdout."""
    print("ceilings: " + ", ".join(f"{dtype} {peak / GB:.0f} GFLOP/s" for dtype, peak in
                                   ceilings["flops_per_second"].items())
          + f", reading {ceilings['read_bytes_per_second'] / GB:.1f} GB/s")
    if rows:
        print("predict: sum over parts of max(flops / peak, bytes / bandwidth); ratio: measured "
              "over predicted; a step of generate makes one token a row")
        print(line([heading for heading, _, _ in COLUMNS]))
    for row in rows:
        print(line([text(row) for _, _, text in COLUMNS]))
    for row in rows:
        for error in row["errors"]:
            print(f"error: {row['phase']} {row['dtype']} B={row['B']}: {error}")
    result = {"machine": machine(), "ceilings": ceilings, "rows": rows, **more}
    print(json.dumps(result), flush=True)


def crossover(cfg):
    """cfg -> int, int: T of a causal pass, and S of a generate step, at which attention's flops
    equal the weights'. Per token: 2 a weight; 4 * L*H*D a slot, of which a query sees T/2."""
    multiplied = param_count(cfg) - (2 * cfg.L + 1) * cfg.E - (not cfg.tied) * cfg.V * cfg.E
    return multiplied // (cfg.L * cfg.H * cfg.D), multiplied // (2 * cfg.L * cfg.H * cfg.D)


def print_attention(job):
    """The share of attention in the flops, and where it would be half."""
    T, S = job.prompt, job.prompt + job.new
    for name, flops, size, equal in zip(
            ("a causal pass", "a generate step"),
            (prefill_flops(job.cfg, 1, T), decode_flops(job.cfg, 1, S)),
            (f"T = {T}", f"S = {S}"), crossover(job.cfg)):
        useful = sum(flops.values()) - flops.get("padding", 0)
        share = (flops["scores"] + flops["values"]) / useful
        print(f"attention is {share:.1%} of the flops of {name} at {size}, "
              f"and as much as the weights' at {size[0]} = {equal}")


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


def check_values(seed, steps=400):
    """Trains on one sentence until the model recites it; SystemExit where it does not."""
    cfg = parse_model("L2,E64,H4,K2,D16,F192,V256")
    say(f"checking values: {PROMPT!r} ...", end=" ")
    params = init(jax.random.key(seed), cfg)
    adam, tokens = adam_init(params), encode(SENTENCE)
    for trained in range(steps):
        params, adam, value = train_jit(params, adam, tokens, cfg, 3e-3)
        if value < 0.02:
            break
    rest = SENTENCE[len(PROMPT):]
    said = recite(params, cfg, encode(PROMPT), len(rest), jax.random.key(seed))
    say(f"{said!r} after {trained + 1} steps")
    if said != rest:
        sys.exit(f"bench.py: error: trained {trained + 1} steps on {SENTENCE!r} to a loss of "
                 f"{value:.3f}, the model goes on {said!r}: a wrong program's figures are void")


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


def train_on_text(args, job):
    """Trains on args.text and prints held-out loss before and after, and a continuation."""
    cfg, B, T, key = job.cfg, job.B, job.prompt, jax.random.key(args.seed)
    if cfg.V != 256:
        raise ValueError(f"V={cfg.V}: a model of bytes has V=256")
    if args.save:
        try:
            pathlib.Path(args.save).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--save {args.save}: {error.strerror}") from None
    text, held = read_text(args.text, T)
    limits = ceilings([cfg.dtype])
    row, params, draw = predicted_row(job, limits), init(key, cfg), np.random.default_rng(args.seed)
    adam = adam_init(params)
    nats = jax.jit(lambda params, tokens: loss(cast(params, cfg.dtype), tokens, cfg))
    before = held_out_loss(params, held, T, nats)
    say(f"{args.text}: {len(text)} bytes to train on, {len(held)} held out, "
        f"{param_count(cfg)} parameters; held-out loss {before:.3f} nats/byte")
    start = time.perf_counter()
    step = train_jit.lower(params, adam, jnp.zeros((B, T + 1), jnp.int32), cfg, args.lr).compile()
    compile_seconds, times, live = time.perf_counter() - start, [], sys.stderr.isatty()
    for i in range(args.steps):
        starts = draw.integers(0, len(text) - T, B)
        tokens = np.stack([text[start:start + T + 1] for start in starts])
        start = time.perf_counter()
        params, adam, value = step(params, adam, tokens, args.lr * min(1, (i + 1) / 20))
        value = float(value)
        times.append(time.perf_counter() - start)
        if live or i % 10 == 0 or i == args.steps - 1:
            now = measured_row(row, times[-9:], compile_seconds, limits)
            mfu = "error, above 100%" if now["mfu"] is None else f"{now['mfu']:.0%}"
            say(f"\rstep {i + 1}/{args.steps}  loss {value:.3f} nats/byte  "
                f"{now['tokens_per_second']:.0f} tokens/s  MFU {mfu} ", end="" if live else "\n")
    say()
    after = held_out_loss(params, held, T, nats)
    prompt = held[None, :min(T, len(held), 64)]
    if args.save:
        save(args.save, cfg, params)
        say(f"saved to {args.save}")
    said = recite(cast(params, cfg.dtype), cfg, prompt, args.new, key, 0.5)
    print(f"held-out loss: {before:.3f} nats a byte before, {after:.3f} after {args.steps} steps")
    print(f"{decode(prompt[0])!r} goes on {said!r}")
    report([measured_row(row, times, compile_seconds, limits)], limits, text=str(args.text),
           steps=args.steps, loss_before=before, loss_after=after, continuation=said)


def tokenizer(path, cfg):
    """path, Config -> encode, decode, end tokens: of tokenizer.json, or of bytes where V is 256."""
    file = pathlib.Path(path) / "tokenizer.json"
    if not file.exists():
        if cfg.V != 256:
            raise ValueError(f"{file} is missing, and V={cfg.V} is not 256, a model of bytes")
        return lambda text: encode(text)[0], decode, ()
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(f'{file} needs the extra hf: pip install ".[hf]"') from None
    try:
        words = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{file} is no tokenizer: {error}") from None
    end = read_json(file.with_name("config.json")).get("eos_token_id")
    return (lambda text: words.encode(text).ids, lambda ids: words.decode(list(map(int, ids))),
            end if isinstance(end, list) else [] if end is None else [end])


def load_in(path, dtype):
    """path, dtype or None -> Config, Params, dtype: in the file's own unless one is given."""
    cfg, params = load(path)
    dtype = dtype or cfg.dtype
    cfg = computing_in(cfg, dtype)
    return cfg, in_dtype(params, cfg, dtype), dtype


def load_draft(args, cfg, prompt, S, how):
    """-> draft and its state for `speculate`: a smaller model from a folder, or n-grams."""
    if args.draft == "ngram":
        return ngram_draft(cfg, args.n_draft), None
    draft_cfg, params, _ = load_in(args.draft, args.dtype)
    if draft_cfg.V != cfg.V:
        raise ValueError(f"draft {args.draft} has V={draft_cfg.V}, and the model V={cfg.V}: "
                         "they must share a tokenizer")
    _, cache = prefill_jit(params, init_cache(draft_cfg, 1, S, args.cache), prompt,
                           np.array([prompt.shape[1]]), draft_cfg)
    return model_draft(params, draft_cfg, args.n_draft, **how), cache


def generating(params, cache, logits, key, cfg, how):
    """-> iterator: compiles, then gives all tokens made so far, and no rounds."""
    step = generate_jit.lower(params, cache, logits, key, STRIDE, cfg, **how).compile()
    made = []
    while True:
        yield made, 0
        tokens, logits, cache = step(params, cache, logits, key)
        made = made + np.asarray(tokens[0]).tolist()


def speculating(params, cache, prompt, key, cfg, how, draft, state):
    """-> iterator: compiles, then gives all tokens made so far, and in how many rounds."""
    T, made, rounds = prompt.shape[1], [], 0
    text = jnp.zeros((1, cache.k[0].shape[2]), jnp.int32).at[:, :T].set(prompt)
    cache = cache._replace(length=cache.length - 1)
    step = speculate_jit.lower(params, cache, text, key, STRIDE, cfg, draft, state, **how).compile()
    while True:
        yield made, rounds
        text, cache, state, counts = step(params, cache, text, key, draft, state)
        made = np.asarray(text)[0, T:int(cache.length[0]) + 1].tolist()
        rounds += int(np.sum(counts))


def stream(args):
    """args -> iterator of (str, dict): the prompt and what follows so far, and how fast."""
    cfg, params, args.dtype = load_in(args.model, args.dtype)
    args.cache = args.cache or default_cache(args.dtype)
    encode, decode, ends = tokenizer(args.model, cfg)
    prompt = np.asarray(encode(args.prompt), np.int32)[None]
    T, key, least = prompt.shape[1], jax.random.key(args.seed), 2 if args.draft else 1
    if T < least:
        raise ValueError(f"prompt {args.prompt!r} makes {T} tokens: {least} or more"
                         + (", or no --draft" if args.draft else ""))
    check_tokens(prompt, cfg)
    S = T + args.new + STRIDE + args.n_draft + 1
    how = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    draft = load_draft(args, cfg, prompt, S, how) if args.draft else None
    how["end"] = ends[0] if ends and prompt[0, -1] not in ends else None
    read = prefill_jit.lower(params, init_cache(cfg, 1, S, args.cache), prompt, np.array([T]),
                             cfg).compile()
    for _ in range(2):  # the first run also fetches the weights from wherever they were
        given = jax.block_until_ready((params, init_cache(cfg, 1, S, args.cache), prompt,
                                       np.array([T])))
        start = time.perf_counter()
        logits, cache = jax.block_until_ready(read(*given))
    told = {"prompt": T, "prefill_seconds": time.perf_counter() - start}
    steps = speculating(params, cache, prompt, key, cfg, how, *draft) if args.draft else \
        generating(params, cache, logits, key, cfg, how)
    made, rounds = next(steps)
    start = time.perf_counter()
    while True:
        stop = min([args.new, *(made.index(end) for end in ends if end in made)])
        told |= {"seconds": time.perf_counter() - start, "rounds": rounds,
                 "a_round": len(made) / max(1, rounds), "tokens": len(made[:stop])}
        yield decode([*prompt[0], *made[:stop]]), told
        if len(made) >= args.new or stop < len(made):
            return
        made, rounds = next(steps)


def complete(args):
    """Writes on from a prompt, to stdout as it goes, and says how fast that was."""
    shown, text, told = "", "", {}
    for text, told in stream(args):
        whole = text.rstrip("\ufffd")  # the rest of a character may come yet
        print(whole[len(shown):], end="", flush=True)
        shown = whole
    print(text[len(shown):])
    rounds = f", {told['a_round']:.2f} tokens a round" if told["rounds"] else ""
    print(f"prefill of {told['prompt']} tokens {told['prefill_seconds'] * 1e3:.1f} ms, then "
          f"{told['tokens'] / told['seconds']:.1f} tokens/s{rounds}: weights {args.dtype}, "
          f"cache {args.cache}")


# ------------------------------------------------------------------------------- several devices


class Form(NamedTuple):
    """A program on several devices, and what it must send by formula: None where that is the
    compiler's choice."""
    name: str
    mesh: Any
    run: Callable
    args: tuple
    sent: dict
    ways: int = 1


def born(fn, shardings):
    """fn, shardings -> its arrays, made where they live, on one process or many."""
    return jax.jit(fn, out_shardings=shardings)()


RINGS = {0: (shard.gather_matmul, shard.matmul_scatter),
         1: (shard.gather_matmul_ring, shard.matmul_scatter_ring),
         2: (partial(shard.gather_matmul_ring, both=True),
             partial(shard.matmul_scatter_ring, both=True))}


def matmul_form(name, cfg, B, n, ring):
    """-> Form: a collective matmul of B rows."""
    P, mesh, gathers = jax.P, shard.make_mesh(tensor=n), name.startswith("gather")
    shard.check_rules(cfg, mesh, dict(F="tensor"))
    shard.check_rules(cfg, mesh, dict(E="tensor"))
    last, out = P(None, None, "tensor"), P("tensor") if gathers else P(None, "tensor")
    enter, leave = RINGS[ring]
    x, w = (born(lambda shape=shape: jnp.ones(shape), jax.NamedSharding(mesh, spec))
            for shape, spec in (((B, 1, cfg.E if gathers else cfg.F), last),
                                ((cfg.F, cfg.E) if gathers else (cfg.E, cfg.F), out)))
    run = jax.shard_map(lambda x, w: enter(x, (w,))[0] if gathers else leave(x, w), mesh=mesh,
                        in_specs=(last, out), out_specs=last)
    sent = shard.tally([shard.trips(cfg, B, n, ring)[0 if gathers else 1]])
    return Form(name, mesh, run, (x, w), sent, max(1, ring))


def draw_tokens(cfg, seed, *shape):
    """-> random tokens, the same in every process."""
    return np.random.default_rng(seed).integers(0, cfg.V, shape).astype(np.int32)


def fsdp_form(name, cfg, args, n):
    """-> Form: the loss and its gradient, sharded by the compiler."""
    mesh, tokens = shard.make_mesh(data=n), draw_tokens(cfg, args.seed, args.batch, args.prompt + 1)
    shard.check_rows(tokens, mesh)
    params = born(lambda: init(jax.random.key(args.seed), cfg),
                  shard.shardings(cfg, mesh, shard.FSDP))
    run = jax.value_and_grad(partial(shard.fsdp_loss, cfg=cfg, mesh=mesh))
    return Form(name, mesh, run, (params, tokens), None)


def loss_form(name, cfg, args, data, tensor, ring):
    """-> Form: the loss and its gradient by hand, on a mesh of data x tensor."""
    mesh, rules = shard.make_mesh(data=data, tensor=tensor), {**shard.TENSOR, **shard.FSDP}
    sent = shard.comm_bytes(cfg, "train", args.batch, args.prompt, data, tensor, ring=ring)
    params = born(lambda: shard.stack(init(jax.random.key(args.seed), cfg)), jax.tree.map(
        partial(jax.NamedSharding, mesh), shard.stacked(shard.specs(cfg, rules))))
    run = jax.value_and_grad(partial(shard.sharded_loss, cfg=cfg, mesh=mesh, enter=RINGS[ring][0],
                                     leave=RINGS[ring][1]))
    tokens = draw_tokens(cfg, args.seed, args.batch, args.prompt + 1)
    return Form(name, mesh, run, (params, tokens), sent)


def generate_form(name, cfg, args, n, layout, ring):
    """-> Form: prefill and generate, with the cache over heads, batch or sequence."""
    mesh, (rules, spec, _, _) = shard.make_mesh(tensor=n), shard.LAYOUTS[layout]
    B, T, key = args.batch, args.prompt, jax.random.key(args.seed)
    sent = [shard.comm_bytes(cfg, form, B, count, tensor=n, layout=layout, ring=ring)
            for form, count in (("prefill", T), ("generate", args.new))]
    both = {kind: tuple(map(sum, zip(*(part[kind] for part in sent if kind in part))))
            for kind in {**sent[0], **sent[1]}}
    params = born(lambda: init(key, cfg), shard.shardings(cfg, mesh, rules))
    over, slots = jax.NamedSharding(mesh, spec), -(-(T + args.new) // n) * n
    shard.check_layout(jax.eval_shape(lambda: init_cache(cfg, B, slots)), mesh, layout)
    cache = born(lambda: init_cache(cfg, B, slots), init_cache(cfg, 1, 1)._replace(
        k=over, v=over, length=jax.NamedSharding(mesh, jax.P())))
    parts = dict(cfg=cfg, mesh=mesh, layout=layout, enter=RINGS[ring][0], leave=RINGS[ring][1])

    def run(params, cache, prompts):
        logits, cache = shard.tp_prefill(params, cache, prompts, jnp.full((B,), T), **parts)
        return shard.tp_generate(params, cache, logits, key, args.new, **parts)[0]

    return Form(name, mesh, run, (params, cache, draw_tokens(cfg, args.seed, B, T)), both)


def all_forms(cfg, args, n):
    """-> iterator of partial(fn, name, ...): each makes its Form when its turn comes."""
    for ring, word in enumerate(("", " ring", " ring both ways")):
        for name in ("gather_matmul", "matmul_scatter"):
            yield partial(matmul_form, name + word, cfg, args.batch, n, ring)
    yield partial(fsdp_form, "loss, fsdp by the compiler", cfg, args, n)
    pairs = [(n, 1), (1, n)] + ([(n // 2, 2)] if n % 2 == 0 and n > 2 else [])
    for (data, tensor), ring in itertools.product(pairs, (0, 1)):
        if tensor > 1 or not ring:
            name = "loss, by hand" + ring * " ring"
            yield partial(loss_form, name, cfg, args, data, tensor, ring)
    for layout, ring in itertools.product(shard.LAYOUTS, (0, 1)):
        name = f"prefill, generate over {layout}" + ring * " ring"
        yield partial(generate_form, name, cfg, args, n, layout, ring)


def compiled_collectives(text):
    """str -> dict: how many of each the compiled program holds."""
    found = re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
                       r"(?:-start)?\(", text)
    return {kind: (found.count(kind), 0) for kind in dict.fromkeys(found)}


def measure_form(form, link):
    """Form, bytes/s -> dict: predicted, counted in the jaxpr, measured, and what it gave."""
    counted = shard.traced_comm(form.run, *form.args)
    program = jax.jit(form.run).lower(*form.args).compile()
    result = program(*form.args)
    # a fixed number: processes that each stopped by their own clock would wait for one another
    times = seconds_of(lambda: jax.block_until_ready(program(*form.args)), at_most=5)
    collectives = counted or compiled_collectives(program.as_text())
    return {"form": form.name, "mesh": dict(form.mesh.shape),
            "collectives": {kind: number for kind, (number, _) in collectives.items()},
            **({} if form.sent is None else {
                "predicted_bytes": sum(size for _, size in form.sent.values()),
                "counted_bytes": sum(size for _, size in counted.values()),
                "as_predicted": counted == form.sent,
                "link_seconds": shard.comm_seconds(form.sent, link, form.ways)}),
            "measured_seconds": statistics.median(times),
            **({"loss": float(result[0])} if form.name.startswith("loss") else {}),
            **({"tokens": np.asarray(result).tolist()} if "generate" in form.name else {})}


def run_shard(args):
    """Prints, for each program on several devices, what it sends: predicted, counted; measured."""
    if args.processes > 1 and args.process is None:
        return start_processes(args)
    if args.process is not None or args.distributed:
        found = dict(coordinator_address=args.coordinator, num_processes=args.processes,
                     process_id=args.process) if args.process is not None else {}
        jax.config.update("jax_num_cpu_devices", args.devices // args.processes)
        jax.distributed.initialize(**found)
    else:
        jax.config.update("jax_num_cpu_devices", args.devices)
    name, cfg = args.model or (SHARDED, parse_model(SHARDED))
    n, first = jax.device_count(), jax.process_index() == 0
    forms, rows = [form for form in all_forms(cfg, args, n)
                   if any(word in form.args[0] for word in args.form or [""])], []
    if first:
        print(f"{name}, B={args.batch}, {n} device(s) in {jax.process_count()} process(es); sent: "
              f"bytes a device, link: at {args.link / GB:g} GB/s\nCPU devices share this machine's "
              "cores: bytes and steps carry over to other machines, time and overlap do not")
        print(f"{'form':36} {'mesh':>9} {'predicted':>11} {'counted':>11} {'link us':>9} "
              f"{'measured ms':>11}  collectives")
    for form in forms:
        try:
            row = measure_form(form(), args.link)
        except ValueError as error:  # the same in every process
            if first:
                print(f"{form.args[0]:36} cannot: {error}")
            continue
        rows.append(row)
        if first:
            sent, link = ("the compiler's",) * 2, "-"
            if "predicted_bytes" in row:
                sent = row["predicted_bytes"], row["counted_bytes"]
                link = f"{row['link_seconds'] * 1e6:.3g}"
            print(f"{row['form']:36} {'x'.join(map(str, row['mesh'].values())):>9} {sent[0]:>11} "
                  f"{sent[1]:>11} {link:>9} {row['measured_seconds'] * 1e3:>11.2f}  "
                  + ", ".join(f"{number} {kind}" for kind, number in row["collectives"].items()))
    if not rows:
        raise ValueError(f"nothing to measure: --form {' --form '.join(args.form or ['any'])}")
    if first:
        print(json.dumps({"machine": machine(), "ceilings": {}, "rows": rows}), flush=True)


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


def numbers(text):
    """str -> list of int, each at least 1."""
    if not all(part.isascii() and part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers from 1, as 1,8,32")
    return [int(part) for part in text.split(",")]


def number(text):
    """str -> int, at least 1."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one whole number from 1")
    return int(text)


def positive(text):
    """str -> float, above 0 and finite."""
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")


def dtypes(text):
    """str -> list of str."""
    if not set(text.split(",")) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(DTYPES)}")
    return text.split(",")


def model(text):
    """str -> the text itself, and its Config."""
    try:
        return text, parse_model(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    command.add_argument("--draft", metavar="DIR|ngram", help="speculate with a smaller model, or "
                         "with what the text said before")
    command.add_argument("--n-draft", type=number, default=4, help="tokens it proposes (4)")


def add_shard(command):
    """Parser -> None: what `shard` takes."""
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


def add_phase(command, name):
    """Parser, str -> None: what the phases take."""
    command.add_argument("--model", type=model, metavar="NAME|SHAPE",
                         help=f"letters ({DEFAULT}) or one of {', '.join(MODELS)}")
    command.add_argument("--batch", type=numbers, help="sequences, as 1,8,32")
    command.add_argument("--dtype", type=dtypes, default=["float32"], help="of the weights: "
                         "float32 (default), bfloat16, int8 (not for train), or several")
    command.add_argument("--prompt", type=number, help="tokens a sequence (256)", default=256)
    command.add_argument("--new", type=number, default=32, help="tokens to generate (32)")
    if name == "train":
        command.add_argument("--text", help="a file to train on (README.md)")
        command.add_argument("--steps", type=number, help="train on --text so often (100)")
        command.add_argument("--lr", type=float, default=1e-3, help="learning rate (0.001)")
        command.add_argument("--save", metavar="DIR", help="write what was trained there")
    else:
        command.add_argument("--cache", choices=DTYPES, help="dtype of the cache (the fastest here:"
                             " float32 on a CPU, elsewhere bfloat16 for narrow weights)")


def parse(argv):
    """list of str -> the command line's arguments; SystemExit with one line where they are bad."""
    parser = Parser(prog="bench.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, under a minute")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and draws (0)")
    commands = parser.add_subparsers(dest="phase", metavar="|".join([*PHASES, "complete", "shard"]))
    others = {"complete": ("write on from a prompt", add_complete),
              "shard": ("what several devices send each other", add_shard)}
    for name in [*PHASES, *others]:
        text, add = others.get(name, (f"measure {name} alone", partial(add_phase, name=name)))
        command = commands.add_parser(name, help=text)
        command.add_argument("--seed", type=int, default=argparse.SUPPRESS)
        add(command)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.quick and args.phase:
        parser.error(f"--quick is for all phases: leave out --quick or {args.phase}")
    if args.phase == "train":
        if "int8" in args.dtype:
            parser.error("train takes --dtype float32 or bfloat16: int8 has no gradient")
        if args.text or args.steps or args.save:
            args.text = args.text or pathlib.Path(__file__).with_name("README.md")
            args.steps = args.steps or 100
            if len(args.dtype) > 1 or len(args.batch or [8]) > 1:
                parser.error("training on a text takes one --batch and one --dtype")
    return args


def check_memory(job):
    """ValueError where weights and cache alone are more than this machine has free."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    cfg, train = job.cfg, job.phase == "train"
    wide = jnp.dtype(cfg.dtype).itemsize  # int8 weights are made from wide ones
    needed = param_count(cfg) * (wide + (job.dtype == "int8") + 16 * train)
    needed += 0 if train else kv_bytes(cfg, job.B, job.prompt + job.new, job.cache_dtype)
    if on_cpu() and needed > free:
        raise ValueError(f"{job.phase} of {job.model} in {job.dtype} at B={job.B} holds "
                         f"{needed / GB:.1f} GB and {free / GB:.1f} GB are free: "
                         "a smaller --model, --batch or --dtype")


def jobs_of(args):
    """-> list of Job: those of one phase, or of the default run."""
    if args.phase:
        size = SMALL if args.phase == "train" and args.text else DEFAULT
        name, cfg = args.model or (size, parse_model(size))
        batches = args.batch or ([8] if args.phase == "train" else [1, 8, 32])
        shapes, dtypes = {args.phase: (batches, args.prompt, args.new)}, args.dtype
    elif args.quick:
        name, cfg, dtypes = QUICK, parse_model(QUICK), ["float32"]
        shapes = {"train": ([2], 128, 0), "prefill": ([1], 128, 0),
                  "generate": ([1, 8, 32], 240, 16)}
    else:
        name, cfg, dtypes = DEFAULT, parse_model(DEFAULT), DTYPES
        shapes = {"train": ([4], 128, 0), "prefill": ([1, 8, 32], 64, 0),
                  "generate": ([1, 8, 32], 240, 16), "serve": ([8], 64, 32)}
    return [Job(phase, name, computing_in(cfg, dtype), B, prompt, new, dtype,
                getattr(args, "cache", None) or default_cache(dtype)) for dtype in dtypes
            for phase, (batches, prompt, new) in shapes.items() for B in batches
            if (phase, dtype) != ("train", "int8")]


def run(args):
    """Measures what the command line asks for, and prints it."""
    if args.phase in ("complete", "shard"):
        return complete(args) if args.phase == "complete" else run_shard(args)
    jobs = jobs_of(args)
    for job in jobs:
        check_memory(job)
    if args.phase == "train" and args.text:
        return train_on_text(args, *jobs)
    limits = ceilings(list(dict.fromkeys(job.dtype for job in jobs)))
    if not args.phase:
        check_values(args.seed)
    rows = []
    try:
        for (dtype, cfg), group in itertools.groupby(jobs, lambda job: (job.dtype, job.cfg)):
            params = init(jax.random.key(args.seed), cfg, cfg.dtype)
            params = in_dtype(params, cfg, dtype)
            rows += [measure(job, params, limits, args.seed) for job in group]
    except KeyboardInterrupt:
        say("\ninterrupted: what was measured so far")
    print_attention(jobs[-1])
    report(rows, limits)


def main(argv=None):
    """The program: what is wrong with the input is said in one line."""
    try:
        run(parse(argv))
    except ValueError as error:
        sys.exit(f"bench.py: error: {error}")


if __name__ == "__main__":
    main()
