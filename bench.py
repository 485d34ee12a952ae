"""bench: predict a step from its shapes, run it or compile it, and explain the difference.

    python bench.py [--quick]                                 all phases of the default model
    python bench.py generate --batch 1,8 --dtype bfloat16     one phase, measured here
    python bench.py train --devices 8                         split over devices here, or simulated
    python bench.py generate --chip tpu-v4 --chips 4          compiled for chips that are not here
    python bench.py plan --model gemma-7b --chip tpu-v4       predicted, without running anything
    python bench.py train --text FILE --save DIR              train on a text file
    python bench.py complete --model DIR "So long"            continue a text with a real model

A Job says what to do, and a row holds what was found: predicted, read in the compiled program, and
measured. Tables go to stdout, progress to stderr, rows as JSON to --json FILE (- is stdout).
"""
import argparse
import ctypes
import difflib
import glob
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

COMPILERS = {  # what compilers for chips that are not here read before JAX is imported
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
if __name__ == "__main__":
    if any(word.startswith("--chip") for word in sys.argv):
        os.environ.update(COMPILERS)
    elif sys.platform == "linux" and not any(map(glob.glob, ("/dev/nvidia*", "/dev/accel*",
                                                             "/dev/vfio/*"))):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else installed compilers print warnings

import jax
import jax.numpy as jnp
import numpy as np

import shard
from infer import (CACHE_DTYPES, HERE, Q8, Q8A8, Cache, Sampling, array_bytes, decode_bytes,
                   decode_flops, extend, generate, init_cache, kv_bytes, library, load, load_state,
                   model_draft, ngram_draft, prefill, prefill_flops, quantize_params, read_arrays,
                   read_json, save, save_state, serve, slots_of, speculate, weight_bytes)
from minillm import (KEEPABLE, Adam, Config, Layer, Params, adam_init, cast, check_tokens, init,
                     loss, param_count, require, size_of, traced_flops, train_flops, train_step)

MB, GB = 1e6, 1e9
SENTENCE = "So long and thanks for all the fish; "
DEFAULT = "L6,E1024,H16,K4,D64,F2816,V256"
LARGE = "L8,E2048,H32,K8,D64,F8192,V32000"  # the default on a GPU or TPU: half of llama-3.2-1b
QUICK = "L2,E1024,H16,K4,D64,F2816,V256"
SMALL = "L4,E256,H8,K2,D32,F704,V256"  # learns a text of some KB in a minute on two cores
REQUESTS = 2  # requests that `serve` gets for each row, so that a row is refilled twice
STRIDE = 8  # tokens that `complete` makes before it prints them
HOP_SECONDS = 1e-6  # from one device to the next
RESERVE = 0.08  # share of the memory that a plan leaves for what is neither weights nor cache
DTYPES = "float32", "bfloat16", "int8"
INT8 = {"Q8": Q8, "Q8A8": Q8A8}  # weight-only int8, and W8A8

# ------------------------------------------------------------------------------- models and chips

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
    """What the data sheet of one chip says. Matmuls are dense; those of float32 are as JAX makes
    them by default: rounded to bf16 on a TPU, to TF32 on a GPU."""
    flops: dict    # dtype -> flops/s
    read: float    # bytes/s of its memory
    memory: float  # bytes
    link: float    # bytes/s that it sends over one axis, in both directions together
    axes: int      # of links
    kind: str      # a regular expression for `device_kind`
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


def find(what, text, known):
    """str, str, names -> str: the name in `known`, in any case. ValueError with the nearest names,
    or with all."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(text.lower(), names, cutoff=0.7)
    require(text.lower() in names, f"{what} {text!r} is unknown: " + (
        f"did you mean {' or '.join(names[name] for name in near)}?" if near else
        f"one of {', '.join(known)}"))
    return names[text.lower()]


@lru_cache
def config_of(text):
    """str -> Config: a name in MODELS, or letters such as L8,E512,H8,K8,D64,F1408,V256[,untied]."""
    if text in MODELS:
        return MODELS[text]
    letters = dict(re.findall(r"([LEHKDFV])([0-9]+)(?:,|$)", text))
    shape = ",".join(letter + size for letter, size in letters.items())
    if len(letters) < 7 or text not in (shape, shape + ",untied"):
        require("," not in text, f"model {text!r} is no shape such as {DEFAULT}[,untied]")
        return MODELS[find("model", text, MODELS)]
    return Config(**{letter: int(size) for letter, size in letters.items()}, tied=text == shape)


def chip_of(text):
    """str -> Chip: a name in CHIPS, or flops/s, bytes/s, bytes of memory, bytes/s over links."""
    if "," not in text:
        return CHIPS[find("chip", text, CHIPS)]
    with suppress(ValueError):
        peak, read, memory, link = map(float, text.split(","))
        if 0 < min(peak, read, memory, link) and max(peak, read, memory, link) < math.inf:
            return Chip(dict.fromkeys(DTYPES, peak), read, memory, link, 1, "", "given by hand")
    raise ValueError(f"chip {text!r}: expected one of {', '.join(CHIPS)}, or flops/s,bytes/s,bytes,"
                     "link bytes/s such as 275e12,1.23e12,32e9,9e10")


def running_chip():
    """-> str or None: the name in CHIPS of the device here."""
    kind = jax.devices()[0].device_kind
    return next((name for name, chip in CHIPS.items() if re.search(chip.kind, kind)), None)


def on_cpu():
    """-> bool: do programs run on this machine's CPU?"""
    return jax.default_backend() == "cpu"


# ---------------------------------------------------------------------- chips that are not here


class Target(NamedTuple):
    """What a chip's compiler is asked for, and how its cycles become seconds."""
    extra: str     # that installs the compiler
    name: str      # of the chip, to its compiler
    slices: str    # shapes that exist
    clock: float = 0.0  # cycles/s; 0 where its estimates are worth nothing
    devices: int = 1    # that JAX sees, a chip
    wraps: int = 4      # the size from which an axis of a slice is a ring


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
TARGETS = {  # clocks: the sheet's peak over what the matrix units multiply a cycle
    "tpu-v4": Target("tpu", "v4", TORUS, 1.05e9),
    "tpu-v5e": Target("tpu", "v5e", PLANE + " 16x16", 1.5e9, wraps=16),
    "tpu-v5p": Target("tpu", "v5p", TORUS, 1.75e9),
    "tpu-v6e": Target("tpu", "v6e", PLANE, 1.75e9, wraps=16),
    "tpu-v7x": Target("tpu", "tpu7x", TORUS, 2.2e9, devices=2),
    **{name: Target("gpu", name, HOSTS) for name in GPUS}}
EXTRAS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}  # and the module that each brings
FLAGS = dict.fromkeys(  # the lecture's, for collectives beside matmuls on a TPU
    ("xla_enable_async_all_gather", "xla_enable_async_collective_permute",
     "xla_tpu_enable_async_collective_fusion",
     "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
     "xla_tpu_overlap_compute_collective_tc"), "true")


def slice_of(name, chips):
    """str, int -> str: the slice of so many chips; 1 is one of the smallest. ValueError where there
    is none, naming the nearest."""
    sizes = {math.prod(map(int, shape.split("x"))): shape for shape in TARGETS[name].slices.split()}
    near = [max((n for n in (1, *sizes) if n < chips), default=1),
            *(n for n in sizes if n > chips)][:2]
    require(chips in (1, *sizes), f"{name} has no slice of {chips} chips: --chips "
            + " or ".join(f"{n} ({sizes[n]})" if n in sizes else str(n) for n in near))
    return sizes[max(chips, min(sizes))]


def check_compiler(name):
    """str -> None: ValueError unless its compiler is here."""
    extra, here = TARGETS[name].extra, (sys.platform, platform.machine()) == ("linux", "x86_64")
    require(here and importlib.util.find_spec(EXTRAS[extra]),
            f'{name} needs its compiler, the extra {extra}: pip install ".[{extra}]"'
            + ", on Linux and x86-64" * (not here))


def torus_axes(shape, tensor):
    """str, int -> int or tuple: the axes of a slice that are left to data, where tensor takes the
    last ones. ValueError where it cannot."""
    axes = []
    for size in map(int, reversed(shape.split("x"))):
        taken = math.gcd(size, tensor)
        tensor, axes = tensor // taken, [size // taken] * (size > taken) + axes
    require(tensor == 1, f"a slice of {shape} has no part of {tensor} more devices for tensor")
    return tuple(axes) if len(axes) > 1 else math.prod(axes)


def compiled_with(lowered, flags):
    """Lowered, dict -> Compiled or None, dict: with the flags that this compiler takes; where the
    program does not fit, what it needs and what there is."""
    try:
        return lowered.compile(compiler_options=flags or None), {}
    except Exception as error:
        message, size = str(error), r"\((\d[\d.]*)([KMGT])\)"
        # from 0.0.50 on libtpu fuses gathers with matmuls on v5e alone, and names wrong results
        kept = {name: on for name, on in flags.items() if "fuse_all_gather" not in name}
        if kept != flags and "AllGather is enabled on platform" in message:
            return compiled_with(lowered, kept)
        if not (match := re.search(f"{size} exceeds available HBM {size}", message)):
            raise ValueError(f"the compiler: {message.splitlines()[0]}") from None
        needed, granted = (int(float(match[i]) * 1024 ** "BKMGT".index(match[i + 1]))
                           for i in (1, 3))
        return None, {"message": message.splitlines()[0], "needed_bytes": needed,
                      "memory_bytes": granted}


@lru_cache
def chip_devices(name, chips):
    """str, int -> devices, dict: and their compiler, and the memory that it grants a program, as it
    says when it refuses one of 4 TiB."""
    from jax.experimental.topologies import get_topology_desc
    check_compiler(name)
    target, shape = TARGETS[name], slice_of(name, chips)
    package = EXTRAS[target.extra].replace("_", "-")
    found = {"compiler": f"{package} {version(package)}, jax {jax.__version__}",
             "slice": f"{target.name} {shape}"}
    if target.extra == "gpu":
        text = GPU.format(*GPUS[name], name)
        devices = get_topology_desc(name, "cuda", topology=shape, target_config=text).devices
        return devices, found | {"memory_bytes": GPUS[name][7]}
    megacore = {"chip_config_name": "megacore"} if name in ("tpu-v4", "tpu-v5p") else {}
    devices = get_topology_desc(f"{target.name}:{shape}", "tpu", **megacore).devices
    large = jax.ShapeDtypeStruct((1 << 40,), jnp.float32,
                                 sharding=jax.sharding.SingleDeviceSharding(devices[0]))
    _, refusal = compiled_with(jax.jit(lambda x: x + 1).lower(large), {})
    return devices[:chips * target.devices], found | {"memory_bytes": refusal["memory_bytes"]}


# ------------------------------------------------------------------------- a job and its options


def option(text, default, **how):
    """-> a field of Job that is an option; `how` goes to argparse. Of an option whose type is
    `several` each value makes a job."""
    return field(default=default, metadata={"help": text, **how})


def number(text, least=1, most=2 ** 31 - 1):
    """str -> int."""
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a whole number from {least} to {most}")
    return int(text)


def above(text, most=math.inf):
    """str -> float."""
    with suppress(ValueError):
        if 0 < float(text) <= most and float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0" + (
        f", at most {most}" if most < math.inf else ""))


def typed(parse, names=()):
    """fn, names -> an option's type: the text, if `parse` takes it; else one line says why not. A
    name in any case becomes the one that is known."""
    def read(text):
        try:
            text and parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return next((name for name in names if name.lower() == text.lower()), text)
    return read


def one_of(*known):
    """names -> an option's type."""
    return typed(lambda text: require(text in known, f"{text!r}: expected one of "
                                      f"{', '.join(known)}"))


def several(read):
    """type -> type of an option that takes several, with commas between them."""
    return lambda text: [read(part) for part in text.split(",")]


def parse_mesh(text):
    """str -> dict: axes and sizes, from text such as data=16,tensor=4x4."""
    pairs = [part.split("=") for part in text.split(",")] if text else []
    require(all(re.fullmatch(r"(data|context|tensor)=\d+(x\d+)*", "=".join(pair)) for pair in pairs)
            and len(dict(pairs)) == len(pairs), f"{text!r}: expected axes and sizes, each once, as "
            "data=16,tensor=4, or tensor=4x4")
    return {name: tuple(map(int, sizes.split("x"))) if "x" in sizes else int(sizes)
            for name, sizes in pairs}


def mesh_text(axes):
    """dict -> str: undo `parse_mesh`."""
    return ",".join(f"{name}={'x'.join(map(str, shard.as_axes(sizes)))}"
                    for name, sizes in axes.items())


def parse_kept(text):
    """str -> tuple of str: what a layer keeps for its gradient."""
    names = () if text == "none" else tuple(text.split(","))
    shard.check_kept(names)
    return names


@dataclass(frozen=True)
class Job:
    """What makes one row: scalars, each an option of the command line."""
    phase: str = "generate"
    model: str = option("a name, or a shape in letters", DEFAULT, type=typed(config_of, MODELS),
                        metavar="NAME|SHAPE")
    layers: int = option("in place of the model's", 0, type=number)
    kv_heads: int = option("in place of the model's", 0, type=several(number), metavar="K")
    batch: int = option("sequences", 1, type=several(number))
    prompt: int = option("tokens of a sequence", 256, type=number)
    new: int = option("tokens to generate", 32, type=number)
    dtype: str = option("of the weights", "float32", type=several(one_of(*DTYPES)))
    cache: str = option("dtype of the cache (the fastest)", "", choices=CACHE_DTYPES)
    int8: str = option("weight-only int8 (Q8), or W8A8 (Q8A8)", "", choices=tuple(INT8))
    n_draft: int = option("proposed tokens", 4, type=number)
    chip: str = option("compile for this chip, and measure nothing", "",
                      type=typed(chip_of, CHIPS),
                       metavar="NAME")
    chips: int = option("how many of them", 1, type=number)
    devices: int = option("devices here; a CPU simulates them", 1, type=number)
    mesh: str = option("how devices are divided (train: all data; others: all tensor)", "",
                       type=typed(parse_mesh), metavar="data=N,tensor=N")
    layout: str = option("of a cache on several devices (the first that divides)", "",
                         choices=tuple(shard.LAYOUTS))
    ring: int = option("collective matmuls: 0 references, 1 or 2 rings of so many directions", 0,
                       type=several(lambda text: int(one_of("0", "1", "2")(text))))
    by: str = option("who chooses training's collectives", "hand", choices=("hand", "compiler"))
    keep: str = option("what a layer keeps for its gradient on several devices, of "
                       f"{', '.join(KEEPABLE)}, or none", ",".join(shard.KEPT),
                       type=typed(parse_kept), metavar="NAMES")
    flags: str = option("compile with the lecture's flags for a TPU", "off",
                        type=several(one_of("off", "on")), metavar="off|on")

    @property
    def cfg(self):
        """-> Config: of the model, with the dtype of its activations."""
        cfg, low = config_of(self.model), "float32" if self.here else "bfloat16"
        return replace(cfg, L=self.layers or cfg.L, K=self.kv_heads or cfg.K,
                       dtype=low if self.dtype == "int8" else self.dtype)

    @property
    def here(self):
        """-> bool: does it run on this machine's CPU?"""
        return not self.chip and on_cpu()

    @property
    def axes(self):
        """-> dict: of the mesh."""
        return parse_mesh(self.mesh)

    @property
    def matmul_dtype(self):
        """-> str: in which its weights are multiplied."""
        return self.cfg.dtype if (self.dtype, self.int8) == ("int8", "Q8") else self.dtype


def settle(job):
    """Job -> Job: with the fastest choice for what is not given. A CPU copies bf16 slots and widens
    int8 ones at every step, computes in float32 around int8 weights, and multiplies int8 with int8
    fastest; elsewhere fewer bytes are faster, and weight-only int8 is faster on a TPU."""
    wide = "float32" if job.here or job.dtype == "float32" else "bfloat16"
    kind = ("Q8A8" if job.here else "Q8") * (job.dtype == "int8")
    return split(replace(job, cache=job.cache or wide, int8=job.int8 or kind))


def over_heads(cfg, n):
    """cfg, int -> int or tuple: n devices of an axis "tensor", or of two where there are fewer key
    heads: the first over them, the second over rows or slots."""
    heads = math.gcd(cfg.K, n)
    return n if heads in (1, n) else (heads, n // heads)


def split(job):
    """Job -> Job: with its mesh and the layout of its cache. Where none is given, training is FSDP
    over all devices, and all else is tensor parallel (`over_heads`), its cache split over heads if
    they divide, else rows, else slots. ValueError where it cannot be."""
    target, train = TARGETS.get(job.chip), job.phase == "train"
    n = job.chips * target.devices if target else job.devices
    shape = f"{slice_of(job.chip, job.chips)}x{target.devices}" if target else str(n)
    if n == 1:
        return job
    axes = job.axes or ({"data": n} if train else {"tensor": over_heads(job.cfg, n)})
    data, context, tensor = (math.prod(shard.as_axes(axes.get(name, 1)))
                             for name in ("data", "context", "tensor"))
    cfg, rows, alone = job.cfg, job.batch, train and job.by == "compiler"
    for right, why in (
            (data * context * tensor == n, f"a mesh of {mesh_text(axes)} has "
             f"{data * context * tensor} devices: {n} are asked for"),
            (train or context == 1, "--mesh context=: only training has this axis"),
            (job.prompt % context == 0, f"--prompt {job.prompt} tokens over {context} devices of "
             f"context: --prompt {-(-job.prompt // context) * context}"),
            (rows % data == 0, f"B={rows} rows over {data} devices of data: --batch "
             f"{-(-rows // data) * data}"),
            (not alone or n == data, "by the compiler training is split over data alone"),
            (not job.ring or tensor > 1, f"--ring {job.ring} on a mesh of {mesh_text(axes)}: rings "
             "go around an axis tensor of two or more")):
        require(right, why)
    used = {"data": torus_axes(shape, context * tensor) if target else axes.get("data", 1)} \
        if train or data > 1 else {}
    used |= ({"context": context} if context > 1 else {}) | (
        {} if alone else {"tensor": axes.get("tensor", 1)})
    job = replace(job, mesh=mesh_text(used))
    if train:
        return job
    *first, last = shard.as_axes(used["tensor"])
    heads, rows = cfg.K // math.prod(first), rows // data  # to be split over the last axis
    fit = ["heads"] * (heads % last == 0) + ["batch"] * (rows % last == 0) + ["sequence", "context"]
    require(job.layout in ("", *fit), f"layout {job.layout!r} does not divide over {tensor} "
            f"devices of tensor with K={cfg.K} and B={rows} rows a copy: --layout "
            f"{' or '.join(fit)}")
    return replace(job, layout=job.layout or fit[0])


def free_memory():
    """-> bytes that are free here: of the device where it tells, else of this machine; None where
    neither does."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if on_cpu() else None


def needed_bytes(job):
    """Job -> int: weights and cache; in training float32 masters, two means and a gradient."""
    cfg, train = job.cfg, job.phase == "train"
    wide = jnp.dtype(cfg.dtype).itemsize  # int8 weights are made from wide ones
    weights = param_count(cfg) * (wide + (job.dtype == "int8") + 16 * train)
    return weights + (0 if train else kv_bytes(cfg, job.batch, job.prompt + job.new, job.cache))


def check(job):
    """Job -> None: ValueError, in one line, for what cannot be."""
    train, several_devices = job.phase == "train", bool(job.mesh)
    for wrong, why in (
            (train and job.dtype == "int8", "train takes --dtype float32 or bfloat16: int8 has no "
             "gradient"),
            (job.phase == "serve" and job.chip, "serve runs on the host: leave out --chip"),
            (job.chip and job.devices > 1, "--devices is for this machine: leave out --chip"),
            (job.chip and job.chip not in TARGETS, f"chip {job.chip!r} has no compiler here: one "
             f"of {', '.join(TARGETS)}"),
            (job.flags == "on" and not job.chip.startswith("tpu"), "--flags are a TPU compiler's: "
             "choose a --chip tpu-..."),
            (not several_devices and (job.layout or job.ring or job.by == "compiler"),
             "--layout, --ring and --by take several devices: --devices, or --chip and --chips"),
            (job.keep != ",".join(shard.KEPT) and (not several_devices or job.by == "compiler"),
             "--keep is for training on several devices by hand"),
            (job.int8 and job.dtype != "int8", f"--int8 {job.int8}: for --dtype int8")):
        require(not wrong, why)
    if not job.chip:
        free, needed = free_memory(), needed_bytes(job)
        require(free is None or needed <= free, f"{job.phase} of {job.model} in {job.dtype} at "
                f"B={job.batch} holds {needed / GB:.1f} GB and {(free or 0) / GB:.1f} GB are free: "
                "a smaller --model, --batch or --dtype")


# ------------------------------------------------------------------------------------------ tables


def si(x, unit):
    """number, unit -> str: three digits and a prefix."""
    for power, prefix in zip(range(18, -10, -3), "EPTGMk mun"):
        size = 10.0 ** power
        if abs(x) >= 0.9995 * size:
            digits = max(0, 2 - int(math.log10(max(1, x / size * 1.0005))))
            return f"{x / size:.{digits}f} {prefix.strip()}{unit}"
    return f"0 {unit}"


class Column(NamedTuple):
    """A column of a table."""
    head: str
    width: int      # negative: aligned to the left
    value: object   # a key of each row, or a function of a row
    form: str = ""  # its unit, or a format


def shown(value, form):
    """value, str -> str: with three digits and a prefix where the form is a unit."""
    if value is None or isinstance(value, str):
        return value or "-"
    return si(value, form.strip()) if form in (" ", "B", "s", "FLOP") else format(value, form)


def print_line(columns, row=None):
    """list of Column, dict or None -> None: prints a row, or the heads."""
    words = [column.head if row is None else shown(column.value(row) if callable(column.value) else
             row[column.value], column.form) for column in columns]
    print(" ".join(f"{word:<{-column.width}}" if column.width < 0 else f"{word:>{column.width}}"
                   for word, column in zip(words, columns)).rstrip(), flush=True)


def print_table(columns, rows, heads=True):
    """list of Column, list of dict -> None."""
    for row in [None] * heads + rows:
        print_line(columns, row)


def say(*words, end="\n"):
    """words -> None: progress, to stderr."""
    print(*words, file=sys.stderr, end=end, flush=True)


# -------------------------------------------------------------------------- this machine's ceilings


def seconds_of(call, at_most=9, seconds=0.4):
    """call -> list of float: seconds of each run, after one that is not counted: at least two,
    until they take so many seconds together."""
    call()
    times = []
    while len(times) < 2 or len(times) < at_most and sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def measure_flops(dtype):
    """dtype -> flops/s of one large matmul, its best run: weights stored output x input, of random
    numbers: a chip that multiplies ones takes less power, and runs faster."""
    size = 2048 if on_cpu() else 8192
    sums = jnp.int32 if dtype == "int8" else jnp.float32
    a = jax.random.randint(jax.random.key(0), (size, size), -127, 128).astype(dtype)
    product = jax.jit(lambda a, b: jax.lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), preferred_element_type=sums))
    return 2 * size ** 3 / min(seconds_of(lambda: product(a, a).block_until_ready(), seconds=1))


def measure_read():
    """-> bytes/s of reading more than any cache holds, the best of two programs: half a GiB on a
    CPU; elsewhere 4 GiB four times in a row, beside which starting a program takes no time."""
    rows, times = (1 << 15, 1) if on_cpu() else (1 << 18, 4)
    a, row = jnp.ones((rows, 1 << 12), "float32"), jnp.ones((1 << 12,), "float32")
    programs = jax.jit(lambda a: jnp.sum(a)), jax.jit(lambda a: a @ row)
    return times * a.nbytes / min(min(seconds_of(lambda: jax.block_until_ready(
        [program(a) for _ in range(times)]))) for program in programs)


def ceilings(dtypes):
    """names -> dict: what this machine can do at best, the denominators of MFU and MBU; simulated
    devices share it."""
    flops = {dtype: measure_flops(dtype) for dtype in DTYPES if dtype in dtypes}
    return {"flops_per_second": flops, "read_bytes_per_second": measure_read()}


def sheet(chip, chips=1):
    """Chip, int -> dict: what so many chips should do, in the form of `ceilings`."""
    return {"flops_per_second": {dtype: chips * peak for dtype, peak in chip.flops.items()},
            "read_bytes_per_second": chips * chip.read}


def machine():
    """-> dict: where figures come from."""
    return {"device": jax.devices()[0].device_kind, "chip": running_chip(),
            "count": jax.device_count(), "cores": os.cpu_count(), "jax": jax.__version__,
            "python": platform.python_version()}


def print_ceilings(limits, name):
    """dict, str -> None."""
    print(f"{name}: " + ", ".join(f"{dtype} {peak / GB:,.0f} GFLOP/s" for dtype, peak in
                                  limits["flops_per_second"].items())
          + f"; reading {limits['read_bytes_per_second'] / GB:.1f} GB/s", flush=True)


# ------------------------------------------------------------------------------------------ predict


class Part(NamedTuple):
    """A part of a step: bound by its flops or by its bytes."""
    name: str
    flops: int
    bytes: int
    dtype: str  # that its matmuls multiply


class Cost(NamedTuple):
    """What one step takes, from shapes alone."""
    T: int             # new tokens a row
    S: int             # slots a row that attention attends to
    tokens: int        # made or read, in all rows
    flops: dict        # by region, as the program multiplies them
    weight_bytes: int
    cache_bytes: int
    parts: tuple       # of Part


def cost(job, T, S, tokens, flops, weight_bytes, cache_bytes, attention_dtype, *parts):
    """-> Cost: attention's flops go with `cache_bytes`, all others with `weight_bytes`."""
    attention = flops["scores"] + flops["values"]
    return Cost(T, S, tokens, flops, weight_bytes, cache_bytes, (
        Part("weights", sum(flops.values()) - attention, weight_bytes, job.matmul_dtype),
        Part("attention", attention, cache_bytes, attention_dtype), *parts))


def train_cost(job):
    """Job -> Cost: weights are read forwards, read backwards, and written as gradients: three times
    their bytes. AdamW reads p, m, v and the gradient and writes p, m and v: 28 bytes a parameter.
    What is saved between the passes is not predicted: it need not leave the chip."""
    cfg, B, T = job.cfg, job.batch, job.prompt
    size, count = jnp.dtype(cfg.dtype).itemsize, param_count(cfg)
    return cost(job, T, T, B * T, train_flops(cfg, B, T), 3 * size * count, 0, cfg.dtype,
                Part("optimizer", 0, 28 * count, "float32"))


def prefill_cost(job):
    """Job -> Cost: all weights once, and the cache written once."""
    cfg, B, T, S = job.cfg, job.batch, job.prompt, slots(job, job.prompt)
    return cost(job, T, S, B * T, prefill_flops(cfg, B, T), weight_bytes(cfg, job.dtype),
                kv_bytes(cfg, B, S, job.cache), cfg.dtype)


def extend_cost(job, T, S):
    """Job, int, int -> Cost: of T tokens behind others: all weights, and all slots of the cache,
    filled or not. A query meets the cache in the wider dtype of both."""
    cfg, B, S = job.cfg, job.batch, slots(job, S)
    moved = decode_bytes(cfg, B, S, T, cache_dtype=job.cache, dtype=job.dtype)
    slot_dtype = cfg.dtype if job.cache == "int8" else job.cache
    return cost(job, T, S, B * T, decode_flops(cfg, B, S, T), moved["weights"],
                moved["cache_read"] + moved["cache_write"],
                str(jnp.promote_types(cfg.dtype, slot_dtype)))


def generate_cost(job):
    """Job -> Cost: one decode step."""
    return extend_cost(job, 1, job.prompt + job.new)


def verify_slots(job):
    """Job -> int: for the prompt, the new tokens, and a draft."""
    return job.prompt + job.new + job.n_draft + 1


def verify_cost(job):
    """Job -> Cost: a round of speculation: the last token and a draft. N-grams cost nothing."""
    return extend_cost(job, job.n_draft + 1, verify_slots(job))


def serve_cost(job):
    """Job -> Cost: a prefill for each request, and decode steps for B at a time."""
    requests = REQUESTS * job.batch
    each = [("prefill", requests, prefill_cost(replace(job, batch=1))),
            ("generate", REQUESTS * job.new, generate_cost(job))]
    flops = sum((Counter({name: n * size for name, size in c.flops.items()}) for _, n, c in each),
                Counter())
    weights, slots = (sum(n * getattr(c, name) for _, n, c in each)
                      for name in ("weight_bytes", "cache_bytes"))
    return Cost(1, job.prompt + job.new, requests * job.new, flops, weights, slots, tuple(
        Part(f"{word}, {part.name}", n * part.flops, n * part.bytes, part.dtype)
        for word, n, c in each for part in c.parts))


COSTS = {"train": train_cost, "prefill": prefill_cost, "generate": generate_cost,
         "verify": verify_cost, "speculate": verify_cost, "serve": serve_cost}


def slots(job, S):
    """Job, int -> int: S, or where slots are split the next number that divides."""
    n = shard.as_axes(job.axes.get("tensor", 1))[-1]
    return -(-S // n) * n if job.layout and shard.LAYOUTS[job.layout].letter == "S" else S


def limit(cost, ceilings):
    """Cost, dict -> dict: the least seconds of a step: its parts follow one another, and each takes
    its flops' time or its bytes' time, whichever is longer."""
    parts = []
    for part in cost.parts:
        times = {"flops": part.flops / ceilings["flops_per_second"][part.dtype],
                 "bytes": part.bytes / ceilings["read_bytes_per_second"]}
        bound = max(times, key=times.get)
        parts.append({"name": part.name, "flops": part.flops, "bytes": part.bytes,
                      "seconds": times[bound], "bound": bound})
    by = Counter()
    for part in parts:
        by[part["bound"]] += part["seconds"]
    return {"limit_seconds": sum(by.values()), "bound": max(by, key=by.get), "parts": parts}


def read_by_all(job, cost):
    """Job, Cost -> Cost: what all devices of a mesh read together: weights as often as devices hold
    them, and in training all that each gathers. `weight_bytes` counts them once a copy."""
    if not job.mesh:
        return cost
    mesh = shard.abstract_mesh(**job.axes)
    axes = shard.axes_of(mesh, "tensor")
    copies, rules = mesh.size // shard.size_over(mesh, axes), None
    moved = cost.weight_bytes * copies
    if job.phase != "train":
        rules = shard.Where(mesh, job.layout, job.ring).rules
        if job.phase == "prefill" and shard.LAYOUTS[job.layout].by_token:  # gathered over the last
            rules = {letter: axes[:-1] for letter in rules}
        moved = sum(array_bytes(name, job.cfg, job.dtype) * mesh.size // math.prod(
            mesh.shape[axis] for axes in shard.spec(name, job.cfg, mesh, rules)
            for axis in shard.as_axes(axes)) for name in jax.tree.leaves(read_arrays(job.cfg)))
    first, *others = cost.parts
    return cost._replace(weight_bytes=cost.weight_bytes * (copies if rules else 1),
                         parts=(first._replace(bytes=moved), *others))


def predict(job, ceilings):
    """Job, dict -> dict: the part of a row that is known before anything is compiled."""
    cost = read_by_all(job, COSTS[job.phase](job))
    return {"T": cost.T, "S": cost.S, "tokens": cost.tokens, "flops": sum(cost.flops.values()),
            "weight_bytes": cost.weight_bytes, "cache_bytes": cost.cache_bytes,
            "byte_seconds": sum(part.bytes for part in cost.parts)
            / ceilings["read_bytes_per_second"], **limit(cost, ceilings)}


def multiplied(cfg):
    """cfg -> int: parameters that each token is multiplied with: not norms, nor an untied table of
    which rows are read."""
    return sum(size_of(name, cfg) for name in jax.tree.leaves(read_arrays(cfg)) if " " in name)


def crossover(cfg):
    """cfg -> int, int: T of a causal pass, and S of a decode step, at which attention's flops equal
    the weights'. Per token: 2 a weight; 4 * L*H*D a slot, of which a query sees T/2."""
    heads = cfg.L * cfg.H * cfg.D
    return multiplied(cfg) // heads, multiplied(cfg) // (2 * heads)


def critical_batch(job, ceilings, parameters=None):
    """Job, dict -> float: rows at which a step's matmuls with the weights take as long as reading
    them."""
    peak, read = ceilings["flops_per_second"][job.matmul_dtype], ceilings["read_bytes_per_second"]
    size = parameters * jnp.dtype(job.dtype).itemsize if parameters else weight_bytes(
        job.cfg, job.dtype)
    return size / read * peak / (2 * (parameters or multiplied(job.cfg)))


# ------------------------------------------------------------------- plan: chips that are not here


def degree(cfg, chips):
    """cfg, int -> int: how many of the chips can share one copy by tensor parallelism: a divisor of
    their number and of E, F, H and V. The others hold further copies."""
    return max(n for n in range(1, chips + 1)
               if not any(size % n for size in (chips, cfg.E, cfg.F, cfg.H, cfg.V)))


HOPS = {  # to the farthest of n devices around a ring, in both directions
    "all_gather": lambda n: n // 2, "reduce_scatter": lambda n: n // 2,
    "all_reduce": lambda n: 2 * (n // 2), "all_to_all": lambda n: n // 2, "permute": lambda n: 1}


def comm_seconds(events, link, ring=0):
    """Counter of shard.traced_events, bytes/s, int -> seconds, int: over links of so many bytes a
    second in each direction, and the hops among them. Permutes go `ring` ways around, all others
    both."""
    hops = sum(times * HOPS[kind](n) // (max(1, ring) if kind == "permute" else 1)
               for (kind, _, n), times in events.items())
    sent = sum(size / link / (max(1, ring) if kind == "permute" else 2)
               for kind, (_, size) in shard.tally(events).items())
    return hops * HOP_SECONDS + sent, hops


def layer_steps(job, T, n, link):
    """Job, int, int, bytes/s -> list of dict: what each step of T tokens a row sends among n
    devices, with the cache over heads where it can be, else over rows, else over slots. The
    collectives are `shard.step_comm`."""
    layout = next(name for name, size in (("heads", job.cfg.K), ("batch", job.batch),
                                          ("sequence", n)) if size % n == 0)
    x, heads, last = "[B,T,E/n]", "[B,T,H/n,D]", "[B,1,V/n]"
    keys = "[B,T,K/n,D]" if layout == "heads" else "[B,T,K,D]"
    letter = shard.LAYOUTS[layout].letter
    slots = "[" + ",".join(name + "/n" * (name == letter) for name in "BKSD") + "]"
    shapes = {
        "embed": ("[B,T]", x), "q, k, v": (x, f"{heads}, 2 x {keys}"),
        "attention": (f"{heads}, 2 x {slots}", heads), "out": (heads, x),
        "gate, up": (x, "2 x [B,T,F/n]"), "down": ("[B,T,F/n]", x), "logits": ("[B,1,E/n]", last),
        "draw": (last, "[B]")}
    rows = []
    for name, (times, events) in shard.step_comm(
            job.cfg, job.batch, T, (n,), layout, job.ring, job.phase == "prefill").items():
        sent, (seconds, hops) = shard.tally(events), comm_seconds(events, link / 2, job.ring)
        rows.append({
            "step": name, "times": times, "before": shapes[name][0], "after": shapes[name][1],
            "shapes": " -> ".join(shapes[name]).replace("/n", f"/{n}"),
            "collectives": {kind: number for kind, (number, _) in sent.items()}, "hops": hops,
            "bytes": sum(size for _, size in sent.values()), "seconds": seconds})
    return rows


def step_parts(job, chip, n, parameters=None):
    """Job, Chip, int -> list of dict: weights, attention and communication of one step, all chips'
    flops and bytes together. `parameters` replaces the exact count of what is multiplied."""
    cost = COSTS[job.phase](job)
    weights, attention = cost.parts
    if parameters:
        weights = weights._replace(flops=2 * job.batch * cost.T * parameters,
                                   bytes=parameters * jnp.dtype(job.dtype).itemsize)
    parts = limit(cost._replace(parts=(weights, attention)), sheet(chip, n))["parts"]
    if n == 1:
        return parts
    hops, size, seconds = (sum(step["times"] * step[key] for step in layer_steps(
        job, cost.T, n, chip.link)) for key in ("hops", "bytes", "seconds"))
    return parts + [{"name": "communication", "flops": 0, "bound": "links", "hops": hops,
                     "bytes": n * size, "seconds": seconds}]


def in_all(parts):
    """list of dict -> seconds: of parts that follow one another."""
    return sum(part["seconds"] for part in parts)


def useful_degree(job, chip, parameters):
    """Job, Chip -> int: the most chips, in powers of two, whose links take no longer than their
    memory and matmuls do. More would wait for links."""
    best = 1
    while degree(job.cfg, 2 * best) == 2 * best:
        *parts, sent = step_parts(job, chip, 2 * best, parameters)
        if sent["seconds"] > in_all(parts):
            break
        best *= 2
    return best


def napkin(job, chip, chips, parameters=None, batch=None):
    """Job, Chip, int -> dict: memory, batch and times, from the sheet alone. `parameters` is a
    rounded count in place of the exact one; job.prompt is the context, job.new is 0. Copies of the
    model that share no chips share the batch."""
    cfg, dtype, count = job.cfg, job.dtype, parameters or param_count(job.cfg)
    table = (not cfg.tied) * cfg.V * cfg.E * array_bytes("", cfg, dtype)
    weights = count * jnp.dtype(dtype).itemsize if parameters else weight_bytes(cfg, dtype) + table
    n = degree(cfg, chips)
    copies, memory = chips // n, n * chip.memory
    token, sequence = (kv_bytes(cfg, 1, S, job.cache) for S in (1, job.prompt))
    most, roomy = (max(0, int((share * memory - weights) // sequence))
                   for share in (1, 1 - RESERVE))
    B = -(-batch // copies) if batch else max(1, roomy)  # of each copy
    parts = {word: step_parts(replace(job, phase=phase, batch=rows), chip, n, parameters)
             for word, phase, rows in (("prefill", "prefill", B), ("generate", "generate", B),
                                       ("alone", "generate", 1), ("first", "prefill", 1))}
    peak, read = (n * rate for rate in (chip.flops[job.matmul_dtype], chip.read))
    used = {f"{phase}_{name}": sum(part[unit] for part in parts[phase][:2]) / in_all(parts[phase])
            / rate for phase in ("prefill", "generate")
            for name, unit, rate in (("mfu", "flops", peak), ("mbu", "bytes", read))}
    needed, all_rows = weights + B * sequence, batch or B * copies
    return {
        "parameters": count, "multiplied_parameters": parameters or multiplied(cfg),
        "weight_bytes": weights, "cache_bytes_per_token": token,
        "cache_bytes_per_sequence": sequence, "chips_per_copy": n, "copies": copies,
        "max_batch": most * copies, "batch_with_room": roomy * copies,
        "critical_batch": critical_batch(job, sheet(chip), parameters), "batch": all_rows,
        "fits": needed <= memory, "cache_bytes": copies * B * sequence,
        "chips_needed": 2 ** max(0, math.ceil(math.log2(needed / chip.memory))),
        "step_bytes": copies * sum(part["bytes"] for part in parts["generate"][:2]), **used,
        **{f"{word}_{key}": value for word in ("prefill", "generate") for key, value in (
            ("seconds", in_all(parts[word])), ("parts", parts[word]),
            ("hidden_seconds", in_all(parts[word]) - min(
                part["seconds"] for part in parts[word] if part["name"] != "attention")
                * (n > 1)))},
        "first_token_seconds": in_all(parts["first"]),
        "tokens_per_second": all_rows / in_all(parts["generate"]),
        "seconds_per_token_alone": in_all(parts["alone"]),
        "weights_over_memory_seconds": weights / n / chip.read,
        "weights_over_links_seconds": weights * (chips - 1) / chips / chip.link,
        "tensor_parallel_degree": useful_degree(replace(job, batch=B), chip, parameters)}


REMEDIES = {  # against a large cache: Job -> the Job with a smaller one
    "as it is": lambda job: job, "grouped queries, K=1": lambda job: replace(job, kv_heads=1),
    "int8": lambda job: replace(job, cache="int8"),
    "both": lambda job: replace(job, kv_heads=1, cache="int8")}


def million(job, chip, chips, weights, context=1_000_000):
    """Job, Chip, int, bytes -> list of dict: what the cache of a very long sequence takes, and what
    makes it smaller."""
    rows = []
    for name, change in REMEDIES.items():
        size = kv_bytes(change(job).cfg, 1, context, change(job).cache)
        if all(size != row["cache_bytes"] for row in rows):
            rows.append({"remedy": name, "cache_bytes": size, "bytes_per_chip": size / chips,
                         "chips_needed": math.ceil((size + weights) / chip.memory),
                         "generate_seconds": (size + weights) / chips / chip.read})
    return rows


def training(job, chip, chips, tokens, mfu, parameters=None):
    """Job, Chip, int, float, float -> dict: a step of AdamW and a whole training, with weights
    sharded over all chips (FSDP)."""
    cfg, B, T = job.cfg, job.batch, job.prompt
    require(B % chips == 0, f"a training batch of {B} sequences cannot be split over {chips} chips:"
            f" --batch {-(-B // chips) * chips}")
    count, flops = parameters or param_count(cfg), train_flops(cfg, B, T)
    attention = flops["scores"] + flops["values"]
    weights = 6 * B * T * parameters if parameters else sum(flops.values()) - attention
    size, peak = jnp.dtype(cfg.dtype).itemsize, chips * chip.flops[job.dtype]
    sent = 3 * size * count * (chips - 1) / chips  # gathered twice, gradients scattered once
    compute, links = (weights + attention) / peak, sent / chip.link
    return {"batch": B, "tokens_per_step": B * T, "step_flops": weights + attention,
            "weight_flops": weights, "attention_flops": attention, "mfu": mfu, "tokens": tokens,
            "step_seconds": compute / mfu, "days": tokens / (B * T) * compute / mfu / 86400,
            "optimizer_bytes": 12 * count, "gradient_bytes": 4 * count,
            "bytes_per_chip": 16 * count / chips, "fits": 16 * count <= chips * chip.memory,
            "fsdp_bytes_per_chip": sent, "fsdp_seconds": links, "compute_seconds": compute,
            "communication_bound": links > compute}


PLAN = (  # a line: what it says, its key, and its unit or format
    ("parameters", "parameters", ",.0f"),
    ("of them multiplied with each token", "multiplied_parameters", ",.0f"),
    ("weights", "weight_bytes", "B"), ("cache of a token", "cache_bytes_per_token", "B"),
    ("cache of a sequence", "cache_bytes_per_sequence", "B"),
    ("chips that share a copy", "chips_per_copy", "d"), ("copies", "copies", "d"),
    ("sequences that fit, in theory", "max_batch", "d"),
    (f"with {RESERVE:.0%} of the memory in reserve", "batch_with_room", "d"),
    ("critical batch", "critical_batch", ".0f"), ("batch", "batch", "d"),
    ("cache of the batch", "cache_bytes", "B"), ("a decode step reads", "step_bytes", "B"),
    ("a decode step takes", "generate_seconds", "s"),
    ("if matmuls hid its links", "generate_hidden_seconds", "s"),
    ("its MFU", "generate_mfu", ".0%"), ("its MBU", "generate_mbu", ".0%"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("a token at batch 1 takes", "seconds_per_token_alone", "s"),
    ("prefill of one sequence", "first_token_seconds", "s"),
    ("prefill of the batch", "prefill_seconds", "s"),
    ("if matmuls hid its links", "prefill_hidden_seconds", "s"), ("its MFU", "prefill_mfu", ".0%"),
    ("useful tensor-parallel degree", "tensor_parallel_degree", "d"),
    ("weights over memory, a part each", "weights_over_memory_seconds", "s"),
    ("weights over links (FSDP), all each", "weights_over_links_seconds", "s"))
TRAINING = (
    ("tokens in a step", "tokens_per_step", ",d"), ("flops of a step", "step_flops", "FLOP"),
    ("of them 6BP", "weight_flops", "FLOP"), ("and attention", "attention_flops", "FLOP"),
    ("a step at full speed", "compute_seconds", "s"), ("assumed MFU", "mfu", ".0%"),
    ("a step at that MFU", "step_seconds", "s"), ("days for all tokens", "days", ",.1f"),
    ("f32 masters and Adam's two means", "optimizer_bytes", "B"),
    ("f32 gradients", "gradient_bytes", "B"),
    ("both, a chip, beside activations", "bytes_per_chip", "B"),
    ("FSDP sends, a chip", "fsdp_bytes_per_chip", "B"), ("over its links", "fsdp_seconds", "s"))
PART = (Column("", -8, "phase"), Column("", -13, "name"), Column("", 11, "flops", "FLOP"),
        Column("", 8, "bytes", "B"), Column("", 8, "seconds", "s"),
        Column("", -14, lambda part: f" bound by {part['bound']}"),
        Column("", 9, lambda part: f"{part['hops']} hops" if "hops" in part else " "))
STEP = (Column("step", -9, "step"), Column("times", 5, "times", "d"),
        Column("a device holds before -> after", -47, "shapes"),
        Column("collectives", -19, lambda step: ", ".join(
            f"{n} {kind}" if n > 1 else kind for kind, n in step["collectives"].items())
            or "none: purely local"),
        Column("sends", 7, "bytes", "B"), Column("time", 7, "seconds", "s"))
MILLION = (Column("at a million tokens", -20, "remedy"),
           Column("a sequence", 10, "cache_bytes", "B"),
           Column("of it a chip", 12, "bytes_per_chip", "B"),
           Column("chips that hold it", 18, "chips_needed", "d"),
           Column("a step", 8, "generate_seconds", "s"))


def print_facts(facts, columns):
    """list of (text, key, form), dict of heading -> dict -> None."""
    print_table([Column("", -42, "what"), *(Column(name, 18, name) for name in columns)],
                [{"what": text, **{name: shown(n[key], form) for name, n in columns.items()}}
                 for text, key, form in facts])


def plan(args, job):
    """args, Job -> dict: prints the napkin of a model on chips that need not be here."""
    chip, chips, B = chip_of(job.chip), job.chips, job.batch
    job = replace(job, batch=B or 1)
    counts = {f"{args.parameters:g} parameters": args.parameters} if args.parameters else {}
    numbers = {heading: napkin(job, chip, chips, count, B)
               for heading, count in {**counts, "exact": None}.items()}
    first = next(iter(numbers.values()))
    n, rows = first["chips_per_copy"], -(-first["batch"] // first["copies"])
    steps = layer_steps(replace(job, batch=rows), 1, n, chip.link) if n > 1 else []
    remedies = million(job, chip, chips, first["weight_bytes"])
    trained = training(replace(job, batch=B or 4 * chips, dtype=job.cfg.dtype), chip, chips,
                       args.tokens, args.mfu, args.parameters) if args.train else None
    print(f"{job.model} on {chips} x {job.chip}: {si(chip.flops[job.matmul_dtype], 'FLOP/s')} in "
          f"{job.matmul_dtype}, {si(chip.read, 'B/s')}, {si(chip.memory, 'B')}, links "
          f"{si(chip.link, 'B/s')} an axis ({chip.axes})\n({chip.source})\n"
          f"weights {job.dtype}, cache {job.cache}, context {job.prompt}; times are limits")
    for heading, facts in numbers.items():
        if not facts["fits"]:
            print(f"DOES NOT FIT ({heading}): batch {facts['batch']} takes more memory: --chips "
                  f"{facts['chips_needed']}, or a smaller --batch, --dtype or --cache")
    print_facts(PLAN, numbers)
    print_table(PART, [{"phase": word, **part} for word in ("prefill", "generate")
                       for part in first[f"{word}_parts"]], heads=False)
    if steps:
        print(f"\na decode step at B={rows} over {n} devices: what each device sends, over its "
              "links in both directions and a latency a hop")
        print_table(STEP, steps)
        print("FSDP is for training: a step that makes one token a row has nothing behind which "
              "weights could travel")
    print(f"\nthe cache is {1_000_000 / job.prompt:.0f} times as large, with slots over {chips} "
          "chip(s):")
    print_table(MILLION, remedies)
    if trained:
        print(f"\ntraining on {args.tokens:.3g} tokens, {trained['batch']} sequences a step"
              + ("" if trained["fits"] else ", WHICH DOES NOT FIT: more --chips"))
        print_facts(TRAINING, {"by AdamW": trained})
        print("FSDP's links take " + ("longer than the matmuls: a step waits for them"
              if trained["communication_bound"] else "less than the matmuls, which can hide them"))
    return dict(model=job.model, chip=job.chip, chips=chips, context=job.prompt, dtype=job.dtype,
                cache=job.cache, **first, exact=numbers["exact"], steps=steps, million=remedies,
                training=trained)


# ------------------------------------------------------------------------------------------ program

train_jit = jax.jit(train_step, static_argnames="cfg", donate_argnames=("params", "adam"))
prefill_jit = jax.jit(prefill, static_argnames="cfg", donate_argnames="cache")
generate_jit = jax.jit(generate, static_argnames=("n", "cfg", "sampling", "end"),
                       donate_argnames=("cache", "logits"))


class Program(NamedTuple):
    """A step, on one device or on the devices of a mesh, here or elsewhere."""
    step: Callable        # to be jitted, but for serve's, which compiles itself
    make: Callable        # (params, key) -> its first arguments; traced, it gives their shapes
    donated: tuple = ()   # which of them
    returned: tuple = ()  # which results take their places in the next run


def where_of(job, mesh):
    """Job, Mesh or None -> where its functions run: here, or split as the job says."""
    return shard.Where(mesh, job.layout, job.ring) if mesh and job.layout else HERE


def functions(job, mesh):
    """Job, Mesh or None -> namespace: the model's functions, on one device or split."""
    where = where_of(job, mesh)
    fns = dict(prefill=partial(prefill, rows=None if mesh else rows_at_a_time(job)), extend=extend,
               generate=generate, speculate=partial(speculate, n_draft=job.n_draft))
    return SimpleNamespace(unembed=partial(where.unembed, cfg=job.cfg), **{
        name: partial(fn, cfg=job.cfg, where=where) for name, fn in fns.items()})


def rows_at_a_time(job):
    """Job -> int or None: of a prefill. On this machine's CPU the largest divisor of B, from 2 on,
    whose rows hold 1,024 to 2,048 tokens; elsewhere, or where there is none, all."""
    B, T = job.batch, job.prompt
    fit = [rows for rows in range(2, B) if B % rows == 0 and 1024 <= rows * T <= 2048]
    return max(fit, default=None) if job.here and B * T > 2048 else None


def random_tokens(cfg, *shape):
    """cfg, ints -> fn of a key."""
    return lambda key: jax.random.randint(key, shape, 0, cfg.V)


def with_cache(job, mesh, S, *draws):
    """Job, Mesh, int, fns -> make: parameters, a cache of S slots a row, whose prompt is zeros, and
    what each of `draws` makes of a key."""
    def make(params, key):
        cache = init_cache(job.cfg, job.batch, slots(job, S), job.cache)
        return params, where_of(job, mesh).move(cache) if mesh else cache, *(
            draw(key) for draw in draws)
    return make


def at_length(cache, length):
    """Cache, int -> Cache: every run starts there."""
    return cache._replace(length=jnp.full_like(cache.length, length))


def train_program(job, mesh):
    """Job, Mesh -> Program: a whole step of AdamW, from float32 masters of its own."""
    def masters(params, key):
        params = jax.tree.map(lambda w: jnp.array(w, jnp.float32), params)  # a copy
        params = shard.stack(params) if mesh and job.by == "hand" else params
        return params, adam_init(params), random_tokens(job.cfg, job.batch, job.prompt + 1)(key)

    split = {} if mesh is None else {"loss": partial(shard.fsdp_loss, mesh=mesh) if job.by != "hand"
                                     else partial(shard.sharded_loss, mesh=mesh, ring=job.ring,
                                                  keep=parse_kept(job.keep))}
    return Program(partial(train_step, cfg=job.cfg, lr=1e-4, **split), masters, (0, 1), (0, 1))


def prefill_program(job, mesh):
    """Job, Mesh -> Program: into a cache that is full then."""
    fns, B, T = functions(job, mesh), job.batch, job.prompt
    return Program(lambda params, cache, tokens: fns.prefill(
        params, cache, tokens, jnp.full(B, T)), with_cache(
            job, mesh, T, random_tokens(job.cfg, B, T)), (1,), (1,))


def generate_program(job, mesh):
    """Job, Mesh -> Program: all new tokens in one scan, greedily, from random logits."""
    fns = functions(job, mesh)

    def logits(key):
        return jax.random.normal(key, (job.batch, job.cfg.V), "float32")

    return Program(lambda params, cache, logits: fns.generate(
        params, at_length(cache, job.prompt), logits, jax.random.key(0), job.new),
        with_cache(job, mesh, job.prompt + job.new, logits), (1, 2), (2, 1))


def verify_program(job, mesh):
    """Job, Mesh -> Program: the last token and n_draft more, all of which make logits."""
    fns = functions(job, mesh)

    def verify(params, cache, tokens):
        x, cache = fns.extend(params, at_length(cache, job.prompt), tokens)
        return fns.unembed(params, x), cache

    return Program(verify, with_cache(job, mesh, verify_slots(job), random_tokens(
        job.cfg, job.batch, job.n_draft + 1)), (1,), (1,))


def speculate_program(job, mesh):
    """Job, Mesh -> Program: rounds of n-grams and their verification, after a prompt of SENTENCE.
    The last token of the prompt is read with the draft."""
    fns, T = functions(job, mesh), job.prompt

    def text(key):
        known = np.resize(encode(SENTENCE), T) % job.cfg.V
        return jnp.zeros((job.batch, verify_slots(job)), jnp.int32).at[:, :T].set(known)

    def make(params, key):
        params, cache, tokens = with_cache(job, None, verify_slots(job), text)(params, key)
        _, cache = prefill_jit(params, cache, tokens[:, :T], jnp.full(job.batch, T), job.cfg)
        return params, where_of(job, mesh).move(cache) if mesh else cache, tokens

    return Program(lambda params, cache, text: fns.speculate(
        params, at_length(cache, T - 1), text, jax.random.key(0), job.new, draft=ngram_draft,
        state=None), make, (1,), (1,))


def serve_program(job, mesh):
    """Job, Mesh -> Program: REQUESTS for each of B rows."""
    S, new = job.prompt + job.new, job.new
    return Program(lambda params, prompts: dict(serve(
        params, np.asarray(prompts), job.batch, S, new, jax.random.key(0), job.cfg,
        stride=min(STRIDE, new), cache_dtype=job.cache, where=where_of(job, mesh))),
        lambda params, key: (params, random_tokens(
            job.cfg, REQUESTS * job.batch, job.prompt)(key)))


PROGRAMS = {"train": train_program, "prefill": prefill_program, "generate": generate_program,
            "verify": verify_program, "speculate": speculate_program, "serve": serve_program}


def outcome(job, out):
    """Job, result -> dict: how many steps a run was, and what else its row holds. A step of
    speculation is a round of all rows: the rows that are done wait for the others."""
    if job.phase == "train":
        return {} if jax.process_index() else {"loss": float(out[2])}  # it may live on one device
    if job.phase != "speculate":
        return {"steps": job.new if job.phase == "generate" else 1}
    counts = np.asarray(out[3])  # of rounds in which 0, 1, .. n_draft were accepted
    rounds, accepted = counts.sum(1), counts @ np.arange(job.n_draft + 1)
    return {"steps": int(rounds.max()), "tokens": float((rounds + accepted).sum() / rounds.max()),
            "acceptance": float(accepted.sum() / rounds.sum() / job.n_draft),
            "tokens_per_round": float(1 + accepted.sum() / rounds.sum())}


def in_dtype(job, params):
    """Job, Params -> Params: cast to its dtype, or quantized to its kind of int8 weights."""
    if job.dtype == "int8":
        return quantize_params(params, job.cfg, INT8[job.int8])
    return params if params.embed.dtype == job.dtype else cast(params, job.dtype)


def draw(job, key):
    """Job, key -> Params: random ones."""
    return in_dtype(job, init(key, job.cfg, job.cfg.dtype))


def placed(job, mesh, args):
    """Job, Mesh, arguments -> their shardings, one for what is alike."""
    cfg, rows, where = job.cfg, shard.axes_of(mesh, "data"), where_of(job, mesh)
    rules = {**shard.TENSOR, **shard.FSDP} if job.by == "hand" else shard.FSDP
    if job.phase != "train":
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
        logits = a.shape == (job.batch, cfg.V) and a.dtype == jnp.float32
        return jax.P(rows or None, *[shard.axes_of(mesh, "tensor")] * logits)

    return jax.tree.map(partial(jax.NamedSharding, mesh), tuple(map(spec, args)))


def mesh_of(job, devices=None):
    """Job, devices -> Mesh or None: of these devices, or of those here."""
    return shard.make_mesh(devices, **job.axes) if job.mesh else None


def prepare(job, params=None, seed=0):
    """Job, Params or None, int -> namespace: its program and arguments: made here, where they stay,
    or shapes of them for chips that are not here."""
    devices, found = chip_devices(job.chip, job.chips) if job.chip else (jax.devices(), {})
    mesh = mesh_of(job, devices)
    program, key = PROGRAMS[job.phase](job, mesh), jax.random.key(seed)

    def born(key):
        return program.make(draw(job, key), key)

    if not job.chip and mesh is None or job.phase == "serve":
        args = program.make(draw(job, key) if params is None else params, key)
    else:
        shapes = jax.eval_shape(born, key)
        where = placed(job, mesh, shapes) if mesh else jax.sharding.SingleDeviceSharding(devices[0])
        args = jax.tree.map(lambda where, part: jax.tree.map(  # one for all that is in its place
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), part),
            where, shapes) if job.chip else jax.jit(born, out_shardings=where)(key)
    return SimpleNamespace(job=job, mesh=mesh, program=program, args=args, found=found, ops=None)


def counted(job, L):
    """Job, int -> Counter: the collectives of its program with L layers, counted on a mesh without
    devices."""
    job = replace(job, layers=L)
    step, make, *_ = PROGRAMS[job.phase](job, shard.abstract_mesh(**job.axes))
    params = jax.eval_shape(partial(draw, job), jax.random.key(0))
    return shard.traced_events(step, *jax.eval_shape(make, params, jax.random.key(0)))


def sent(job):
    """Job -> Counter or None: the collectives of a step: by the formula of tensor parallelism; of
    other programs counted with one layer and with two. None where the compiler chooses them."""
    if job.by == "compiler":
        return None
    if job.phase == "train" or job.phase == "prefill" and shard.LAYOUTS[job.layout].by_token:
        one, two = counted(job, 1), counted(job, 2)
        return one + shard.repeat(job.cfg.L - 1, two - one)
    axes, data = (shard.as_axes(job.axes.get(name, 1)) for name in ("tensor", "data"))
    B, T = job.batch // math.prod(data), COSTS[job.phase](job).T
    logits = B * T * job.cfg.V // math.prod(axes) * 4
    events = shard.gather_comm(logits, axes if job.phase == "speculate" else ())
    for times, step in shard.step_comm(job.cfg, B, T, axes, job.layout, job.ring,
                                       job.phase == "prefill").values():
        events += shard.repeat(times, step)
    return events


def argument_kinds(args):
    """arguments -> dict: bytes of each kind on one device, by formula."""
    sizes = dict.fromkeys(("weights", "cache", "optimizer", "inputs"), 0)
    for arg in args:
        kind = dict(zip((Params, Cache, Adam), sizes)).get(type(arg), "inputs")
        for a in jax.tree.leaves(arg):
            shape = a.sharding.shard_shape(a.shape)
            sizes[kind if len(shape) > 0 else "inputs"] += math.prod(shape) * a.dtype.itemsize
    return sizes


def compile_step(prepared, traced=False):
    """namespace, bool -> Compiled or None, dict: of a program, and what is known of it. When it is
    traced, turn off GPU command buffers: a trace cannot tell apart kernels launched together."""
    job, (step, _, donated, _), args = prepared.job, prepared.program, prepared.args
    options = FLAGS if job.flags == "on" else {"xla_gpu_enable_command_buffer": ""} \
        if traced and not job.chip and jax.default_backend() == "gpu" else {}
    start = time.perf_counter()
    compiled, found = compiled_with(jax.jit(step, donate_argnums=donated).lower(*args), options)
    sizes = argument_kinds(args)
    found = {"compile_seconds": time.perf_counter() - start, "formula": sizes,
             "formula_bytes": sum(sizes.values()), "fits": False} | prepared.found | found
    if compiled is None:
        return None, found
    memory = compiled.memory_analysis()
    found |= {f"{name}_bytes": getattr(memory, f"{name}_size_in_bytes")
              for name in ("argument", "output", "alias", "temp")}
    peak = sum(found[f"{name}_bytes"] for name in ("argument", "output", "temp"))
    found["peak_bytes"] = peak - found["alias_bytes"]
    steps = job.new if job.phase == "generate" else 1
    with suppress(ValueError):  # a loop of unknown length
        found["program_flops"] = traced_flops(step, *args) // steps * (
            prepared.mesh.size if prepared.mesh and job.by == "hand" else 1)
    if prepared.mesh and job.by == "hand" and job.phase != "speculate":
        found["sent"] = shard.tally(sent(job))
        found["counted"] = {kind: (number // steps, size // steps) for kind, (number, size) in
                            shard.traced_comm(step, *args).items()}
    limit = found.get("memory_bytes") or free_memory()
    return compiled, found | {"fits": job.chip.startswith("tpu") or limit is None
                              or found["peak_bytes"] <= limit}


def measure(prepared, step):
    """namespace, compiled step -> dict: seconds of a step, and what came of it."""
    def call():
        out, args = jax.block_until_ready(step(*prepared.args)), list(prepared.args)
        for argument, result in zip(prepared.program.donated, prepared.program.returned):
            args[argument] = out[result]
        prepared.args = tuple(args)
        return out

    prepared.call = call
    found = {"steps": 1} | outcome(prepared.job, call())
    times = [seconds / found["steps"] for seconds in seconds_of(
        call, seconds=0.4 if jax.process_count() == 1 else 0)]  # as many runs in every process
    low, middle, high = np.quantile(times, (0.1, 0.5, 0.9)).tolist()
    return found | {"measured_seconds": middle, "runs": len(times), "spread": (high - low) / middle}


def shares(row, seconds, ceilings, name):
    """dict, seconds, dict, str -> dict: MFU and MBU, as shares of what is possible. A few percent
    above a measured ceiling are 1; more is None, and an error."""
    found = {"tokens_per_second": row["tokens"] / seconds, "errors": []}
    for key, done, ceiling in (
            ("mfu", row["flops"], ceilings["flops_per_second"][name]),
            ("mbu", row["weight_bytes"] + row["cache_bytes"], ceilings["read_bytes_per_second"])):
        share = done / seconds / ceiling
        found[key] = min(share, 1) if share <= 1.05 else None
        if share > 1.05:
            found["errors"].append(
                f"{key.upper()} would be {share:.0%}: the ceiling was measured too low (was another"
                " program running?) or what is read stays in a cache: choose a larger model, and "
                "measure again alone")
    return found


# ---------------------------------------------------------------------------------- compiled text


REGIONS = ("embed", "qkv", "attention", "out", "mlp", "unembed", "sample", "loss", "cast",
           "optimizer")  # that the model's functions name: jax.named_scope
SCHEDULED = {"while": "body", "call": "to_apply", "conditional":
             "true_computation|branch_computations"}  # what runs another computation, and which
WRAPPERS = {"tuple", "get-tuple-element", "parameter", "constant", *SCHEDULED}
UNSEEN = {"bitcast", "after-all", "partition-id", "copy-done", "slice-done", "opt-barrier",
          *WRAPPERS}  # take no time
MOVES = {"copy", "transpose", "bitcast", "slice", "concatenate", "reshape", "broadcast", "pad",
         "dynamic-slice", "copy-start", "copy-done", *WRAPPERS}


class Array(NamedTuple):
    """One array of a shape in compiled text."""
    bytes: int   # of its numbers
    padded: int  # that it takes: a TPU pads its last dimensions to tiles
    hbm: bool    # in the chip's main memory; not in a core's own, S(1) and so on


@lru_cache(1 << 14)
def arrays(shape):
    """str -> list of Array: `bf16[110,4,2048,256]{3,1,2,0:T(4,128)(2,1)S(1)}`, or a tuple of such.
    A layout gives dimensions from the last one in memory, and their tile."""
    found = []
    for bits, *numbers, space in re.findall(
            r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([\d,]*):?(?:T\(([\d,]+)\))?([^{}]*)\})?",
            shape):
        sizes, order, tile = ([int(n) for n in part.split(",") if n] for part in numbers)
        stored = [sizes[i] for i in order] or sizes[::-1] or [1]
        for i, size in zip(range(len(stored)), reversed(tile)):
            stored[i] += -stored[i] % size
        whole, padded = (math.prod(each) * int(bits or 8) // 8 for each in (sizes, stored))
        found.append(Array(whole, padded, not re.search(r"S\([1-9]", space)))
    return found


def named_region(path):
    """str -> the innermost of REGIONS in it, or None."""
    return next((word for word in reversed(re.split(r"[/()]", path)) if word in REGIONS), None)


def source_lines(text):
    """str -> dict: file, line and function of each stack frame."""
    tables = {name: dict(re.findall(r'^(\d+) "?(.*?)"?$', rows, re.M))
              for name, rows in re.findall(r"^(\w+)\n((?:\d+ .*\n)+)", text, re.M)}
    found = {}
    for frame, entry in tables.get("StackFrames", {}).items():
        place = tables["FileLocations"][re.search(r"file_location_id=(\d+)", entry)[1]]
        file, function, line = re.findall(r"=(\d+)", place)[:3]
        found[frame] = (f"{Path(tables['FileNames'][file]).name}:{line} "
                        + tables["FunctionNames"][function].replace(".<locals>", ""))
    return found


def first_group(pattern, line):
    """str, str -> str: what the pattern's group matches, or nothing."""
    match = re.search(pattern, line)
    return match[1] if match else ""


@lru_cache(maxsize=1)
def parse_program(text):
    """str -> dict: computations, each a list of operations in the order of its schedule; what runs
    first is the last one. An operation `calls` a computation, whose list is its `body`, `trips`
    times; `contents` is itself, or what a fusion holds; `users` are what takes its result."""
    known, computations, sources, computation = {}, {}, source_lines(text), ""
    for line in text.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)", line)
        if match:
            name, shape, opcode, rest = match.groups()
            called = SCHEDULED.get(opcode.removesuffix("-start"), "calls")
            calls = first_group(rf"(?:{called})=\{{?%?([\w.\-]+)", line)
            limits = re.findall(r'known_trip_count":\{"n":"(\d+)"', line) or [
                limit for other in computations.get(first_group(r"condition=%?([\w.\-]+)", line),
                                                    ())
                for limit in re.findall(r"s32\[\]\S* constant\((\d+)\)", other.line)]
            operands = [known[word] for word in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
                        if word in known]
            body = computations.get(calls, [])
            op = known[name] = SimpleNamespace(
                name=name, opcode=opcode, shape=shape, line=line, operands=operands, users=[],
                calls=calls, body=body, trips=int(limits[0]) if len(limits) == 1 else 1,
                kind=re.sub("collective-|-(start|done)$", "", opcode).replace("-", "_"),
                region=named_region(first_group(r'op_name="([^"]*)"', line)),
                source=sources.get(first_group(r"stack_frame_id=(\d+)", line), ""))
            op.contents = operands[0].contents if opcode == "call-update" else [
                each for inner in body for each in inner.contents] if opcode in (
                    "fusion", "async-start", "call-start") else [op]
            computations[computation].append(op)
            for operand in operands:
                operand.users.append(op)
        elif line.endswith("{") and not line.startswith(("HloModule", " ")):
            computation = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            computations[computation] = []
    return computations


def origin(op):
    """operation -> region, source: its own; or of what is nearest, first of what uses it: compilers
    drop the names of some operations that they make."""
    seen, ahead = set(), [op]
    while ahead and len(seen) < 200:
        near = ahead.pop(0)
        for each in (near, *near.contents):
            if each.region:
                return each.region, each.source
        if near.name not in seen:
            seen.add(near.name)
            ahead += [each for each in near.users + near.operands if each.opcode not in WRAPPERS]
    return None, ""


def kind_of(op):
    """operation -> str: product, copy or elementwise."""
    opcodes = {inner.opcode for inner in op.contents}
    if opcodes & {"dot", "convolution"} or re.search(r'target="[^"]*(gemm|matmul|dot)', op.line):
        return "product"
    return "copy" if opcodes <= MOVES else "elementwise"


def group_size(line, devices):
    """str, int -> int: devices that a collective is among, of so many."""
    if match := re.search(r"(?:groups|pairs)=\{\{?([\d,]*)\}", line):
        return match[1].count(",") + 1 if match[1] else devices
    if match := re.search(r"groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    match = re.search(r"groups=@?mesh\[(.*?)\] ?\{(.*?)\}", line)
    require(match, f"a collective among unknown devices: {line.strip()[:200]}")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))


def transfer(op, devices):
    """operation, int -> namespace or None: what it has to do with a collective. On a TPU one may
    hide in a fusion: a scatter as an all-reduce of which a part is kept; a gather in what starts
    it, in each matmul beside it, and in what ends it."""
    first = op.operands[0] if op.opcode.endswith("-done") else op
    inner = next((inner for inner in first.contents if inner.kind in shard.SENT), None)
    named = re.search("-(start|update|done)$", op.opcode)
    mark = named or re.search("AsyncCollective(Start|Done)", " ".join(
        inner.line for inner in first.contents if inner.opcode == "custom-call"))
    if inner is None or mark is None and "async_collective" in op.calls:
        return None
    given = [arrays(each.shape) for each in op.operands if each.opcode != "call-start"]
    kind = "reduce_scatter" if "all-reduce-scatter" in op.calls else inner.kind
    n, size = group_size(inner.line, devices), sum(a.bytes for made in given for a in made)
    return SimpleNamespace(
        kind=kind, number=sum(bool(made) for made in given), n=n, sent=shard.SENT[kind](size, n),
        stage=mark[1].lower().replace("update", "start") if mark else "whole",
        key=first.name if named else tuple(re.findall(r"channel_id=\d+", inner.line)))


def operations(text, job=None):
    """str, Job -> list of namespace: the operations of a compiled program, in the order of its
    schedule; `times` is how often a step runs one, 0 where it stands around the loop of steps. A
    collective is asynchronous where anything else stands between its `start`, a place in this list,
    and `done`."""
    computations, found = parse_program(text), []
    entry = computations[list(computations)[-1]]
    devices = int(first_group(r"num_partitions=(\d+)", text.split("\n", 1)[0]) or 1)
    loops = [op for op in entry if op.opcode == "while"]
    stepped = max(loops, key=lambda op: len(op.body), default=None) \
        if job and job.phase in ("generate", "speculate") else None

    def walk(computation, times):
        started = {}
        for op in computation:
            if op.opcode in SCHEDULED and op.body:
                walk(op.body, 1 if op is stepped else times * op.trips)
            if op.opcode in UNSEEN or (  # a call may wait for call-update, with its data
                    op.opcode == "call-start" and op.shape.startswith("((), ")):
                continue
            link = transfer(op, devices)
            if link and link.stage == "done":
                if link.key in started:
                    start = found[started[link.key]]
                    start.done, start.asynchronous = len(found), any(
                        not other.number for other in found[started[link.key] + 1:])
                continue
            region, source = origin(op)
            cycles = int(first_group(r'"estimated_cycles":"(\d+)"', op.line) or 0)
            found.append(SimpleNamespace(
                name=op.name, shape=op.shape, region=region, source=source, times=times,
                kind=link.kind if link else kind_of(op), loop=id(computation),
                cycles=0 if link else cycles if cycles < 1e12 else 0,  # more where there is none
                reads=max((a.padded for each in op.operands for a in arrays(each.shape) if a.hbm),
                          default=0), waits=op.opcode.endswith("-start"),
                number=link.number if link else 0, sent=link.sent if link else 0,
                n=link.n if link else 0, asynchronous=False, start=len(found),
                done=len(found) + 1))
            if link and link.stage == "start":
                started[link.key] = len(found) - 1

    walk(entry, 0 if stepped else 1)
    return found


def collectives(ops):
    """list of operations -> dict: of a step, by kind: number, bytes sent, how many are
    asynchronous."""
    found = {}
    for op in ops:
        if op.number and op.times:
            kind = found.setdefault(op.kind, {"number": 0, "bytes": 0, "asynchronous": 0})
            kind["number"] += op.number * op.times
            kind["bytes"] += op.sent * op.times
            kind["asynchronous"] += op.number * op.times * op.asynchronous
    return found


def copied_bytes(ops, text):
    """list of operations, str -> int: bytes that a step copies, from memory to memory, of arrays
    alike one of the program's arguments of two dimensions or more: a weight or a cache."""
    def alike(shape):  # dtype and sizes of the first array, whatever their order and layout
        dtype, sizes = re.search(r"(\w+)\[([\d,]*)\]", shape).groups()
        return dtype, *sorted(size for size in sizes.split(",") if size != "1")

    *_, entry = parse_program(text).values()
    arguments = {alike(op.shape) for op in entry if op.opcode == "parameter" and arrays(op.shape)}
    arguments = {kind for kind in arguments if len(kind) > 2}
    return sum(arrays(op.shape)[0].padded * op.times for op in ops if op.kind == "copy"
               and arrays(op.shape) and arrays(op.shape)[0].hbm and alike(op.shape) in arguments
               and op.reads >= arrays(op.shape)[0].padded)


def link_seconds(op, link, shape, wraps):
    """operation, bytes/s, sizes, int -> seconds: of a collective among n devices, along the axes of
    a slice, the last ones first. A latency for each hop to the farthest device; an all-reduce goes
    there twice, a permute one. Bytes go both ways around a ring, or over two axes; else, as a
    permute's, one."""
    far, ways, left = 0, 0, op.n
    for length in reversed(shape):
        along = math.gcd(length, left)
        left //= along
        rings = along >= wraps
        far += along // 2 if rings else along - 1
        ways += (1 + rings) * (along > 1)
    far, ways = {"permute": (1, 1), "all_reduce": (2 * far, ways)}.get(op.kind, (far, ways))
    return far * HOP_SECONDS + op.sent / (link / 2 * min(2, max(1, ways)))


def by_cycles(ops, job):
    """list of operations, Job -> dict: of a step on a TPU: the compiler's cycles as seconds, by
    region; seconds of collectives over the sheet's links, of those that wait and of those that are
    asynchronous; and the operations of one layer. They are estimates, and no sum of them is a time.
    """
    target, chip = TARGETS[job.chip], CHIPS[job.chip]
    shape = tuple(map(int, slice_of(job.chip, job.chips).split("x")))
    regions, waits, link = Counter(), Counter(), chip.link / target.devices
    for op in ops:
        op.seconds = op.cycles / target.clock
        if op.number:
            op.seconds = link_seconds(op, link, shape, target.wraps)
            waits[op.asynchronous] += op.times * op.seconds
        elif op.cycles:
            regions[op.region or "?"] += op.times * op.seconds
    blind = sum(op.times for op in ops if not (op.number or op.cycles or op.waits))
    return {"cycle_seconds": sum(regions.values()), "regions": dict(regions.most_common()),
            "transfer_seconds": waits[False], "hidden_transfer_seconds": waits[True],
            "unestimated": blind, "layer": one_layer([op for op in ops if op.times])}


def one_layer(ops):
    """list of operations -> list of dict: those of the middle layer, from its first matmul to that
    of the next one; of a loop over layers, its body."""
    loops = Counter(op.loop for op in ops if op.times > 1 and op.region == "mlp")
    if loops:
        ops = [op for op in ops if op.loop == loops.most_common(1)[0][0]]
    else:
        matmuls = [i for i, op in enumerate(ops)
                   if op.kind == "product" and op.region in ("qkv", "mlp")]
        begins = [b for a, b in itertools.pairwise(matmuls)
                  if (ops[a].region, ops[b].region) == ("mlp", "qkv")]
        middle = len(begins) // 2
        first, last = begins[middle - 1:middle + 1] if len(begins) > 1 else (0, len(ops))
        ops = ops[first:last]
    return [{"region": op.region, "kind": op.kind, "seconds": op.seconds,
             "transfer": bool(op.number), "ends": op.asynchronous * sum(
                 op.start < other.start < op.done for other in ops)} for op in ops]


def inspect(prepared, traced=False):
    """namespace, bool -> Compiled or None, dict: of a prepared job: what its compiled program says.
    """
    job = prepared.job
    compiled, found = compile_step(prepared, traced)
    if compiled is None:
        return None, found
    text = compiled.as_text()
    ops = prepared.ops = operations(text, job)
    found |= {"collectives": collectives(ops), "copies": copied_bytes(ops, text)}
    return compiled, found | (by_cycles(ops, job) if job.chip.startswith("tpu") else {})


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
    file = max(Path(folder).glob("**/*.xplane.pb"), key=os.path.getmtime)
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
    """namespace, path -> dict: operations by time, shares of kinds and regions: of the time that
    all took, which on a CPU overlap; "idle" is the share of the wall time when none ran."""
    with tempfile.TemporaryDirectory() as temporary:
        wall, spans = trace(prepared.call, folder or temporary)
    places = {op.name: (op.region, op.kind, op.source) for op in prepared.ops}
    groups, busy, until = {}, 0, 0
    for start, end, name in sorted(span for span in spans if span[2] in places):
        groups.setdefault(places[name], []).append(end - start)
        busy += max(0, end - max(start, until))
        until = max(until, end)
    total = sum(map(sum, groups.values())) or 1
    found, regions, kinds = [], Counter(), Counter()
    for (region, kind, source), seconds in sorted(groups.items(), key=lambda item: -sum(item[1])):
        share = sum(seconds) / total
        found.append(dict(share=share, times=len(seconds), region=region, kind=kind, source=source))
        regions[region or "?"] += share
        kinds["attention" if region == "attention" else
              {"product": "weights", "copy": "copies"}.get(kind, "elementwise")] += share
    return {"operations": found, "kinds": dict(kinds), "regions": dict(regions),
            "wall_seconds": wall, "idle": max(0, 1 - busy / wall)}


def explain(rows):
    """list of rows -> None: prints, in at most twenty lines, how far limit and measurement differ,
    and why where it is most."""
    ratios = {name_of(row): row["measured_seconds"] / row["limit_seconds"] for row in rows}
    worst = max(ratios, key=ratios.get)
    print(f"\nof {len(rows)} rows: took/limit median {statistics.median(ratios.values()):.2f}, "
          f"worst {ratios[worst]:.2f} ({worst})")
    for row in rows:
        if row["phase"] == "speculate":
            plain = [r for r in rows if r["phase"] == "generate" and all(
                r[key] == row[key] for key in ("model", "kv_heads", "dtype", "cache", "batch"))]
            gain = [row["tokens_per_second"] / r["tokens_per_second"] for r in plain]
            print(f"{name_of(row)}: {row['acceptance']:.0%} of {row['n_draft']} proposals "
                  f"accepted, {row['tokens_per_round']:.2f} tokens a round"
                  + "".join(f", {x:.2f} times the speed of generate" for x in gain))
    for row in sorted(rows, key=lambda row: -ratios[name_of(row)]):
        if found := row.get("profile"):
            kinds = ", ".join(f"{share:.0%} {kind}" for kind, share in sorted(
                found["kinds"].items(), key=lambda item: -item[1]))
            print(f"{name_of(row)} takes {ratios[name_of(row)]:.2f} times its limit: of the time "
                  f"of its operations {kinds}; none ran for {found['idle']:.0%}")
            for op in found["operations"][:3]:
                print(f"  {op['share']:6.1%} x{op['times']:<5} {op['region'] or '?':10} "
                      f"{op['kind']:12} {op['source']}")


def name_of(row):
    """row -> str: what tells it apart."""
    keys = ("phase", "dtype") if row["cache"] != "int8" else ("phase", "dtype", "cache")
    more = "".join(f" {key}={row[key]}" for key in ("kv_heads", "ring") if row[key])
    return " ".join(row[key] for key in keys) + f" B={row['batch']}{more}"


# ---------------------------------------------------------------------------------------- real text


def encode(text):
    """str -> 1T: a byte a token."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)[None]


def decode(tokens):
    """T -> str: what is no UTF-8 shows as a replacement character."""
    return bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")


def recite(params, cfg, prompt, new, key, sampling=Sampling()):
    """Params, cfg, 1T, int, key -> str: prefill, then generate, in a model of bytes."""
    T = prompt.shape[1]
    logits, cache = prefill_jit(params, init_cache(cfg, 1, T + new), prompt, jnp.full(1, T), cfg)
    return decode(generate_jit(params, cache, logits, key, new, cfg, sampling)[0][0])


def train_steps(cfg, params, adam, text, B, T, lr, seed):
    """cfg, Params, Adam, bytes, int, int, float, int -> iterator of Params, Adam, loss, seconds:
    training on random windows of a text; those that `adam` has seen are not drawn again."""
    draw, began = np.random.default_rng(seed), int(adam.step)
    draw.integers(0, len(text) - T, (began, B))
    shape = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    step = train_jit.lower(params, adam, shape, cfg, lr).compile()
    for i in itertools.count(began + 1):
        starts = draw.integers(0, len(text) - T, (B, 1))
        tokens, start = text[starts + np.arange(T + 1)], time.perf_counter()
        params, adam, value = step(params, adam, tokens, lr * min(1, i / 20))
        yield params, adam, float(value), time.perf_counter() - start


def learn(job, seed, most=200):
    """Job, int -> Params: float32, trained on SENTENCE until the model knows it. ValueError for a
    model that is not of bytes; SystemExit where it does not recite the sentence."""
    cfg, text = replace(job.cfg, dtype="float32"), encode(8 * SENTENCE)[0]
    require(cfg.V >= 256, f"V={cfg.V}: a model that learns a sentence in bytes has V=256 or more")
    say(f"learning {SENTENCE!r} ...", end=" ")
    params = init(jax.random.key(seed), cfg)
    steps = train_steps(cfg, params, adam_init(params), text, 1, 2 * len(SENTENCE), 0.5 / cfg.E,
                        seed)
    for i, (params, _, value, _) in enumerate(steps):
        if value < 0.02 or i == most:
            break
    said = recite(params, cfg, text[None, :22], len(SENTENCE) - 22, jax.random.key(0))
    say(f"{i + 1} steps, {value:.3f} nats a byte; {SENTENCE[:22]!r} goes on {said!r}")
    if said != SENTENCE[22:]:
        sys.exit(f"bench.py: error: trained on {SENTENCE!r}, the model goes on {said!r}: figures "
                 "of a wrong program are void")
    return params


def read_text(path, T):
    """path, int -> bytes as int32, the first nine tenths and the last. ValueError where there are
    too few bytes."""
    text = np.frombuffer(Path(path).read_bytes(), np.uint8).astype(np.int32)
    held_out = len(text) // 10
    require(held_out >= 2 and len(text) - held_out > T, f"text file {path} has {len(text)} bytes: "
            f"training on {T} at a time takes {max(20, (T + 1) * 10 // 9 + 1)} or more; a smaller "
            "--prompt takes less")
    return text[:-held_out], text[-held_out:]


def held_out_loss(params, cfg, text, T):
    """Params, cfg, bytes, int -> mean nats a byte, in windows of T, the last one shorter."""
    nats, total = jax.jit(lambda params, tokens: loss(cast(params, cfg.dtype), tokens, cfg)), 0.0
    for start in range(0, len(text) - 1, T):
        window = text[None, start:start + T + 1]
        total += float(nats(params, window)) * (window.shape[1] - 1)
    return total / (len(text) - 1)


def train_text(args, job, params, adam, ceilings):
    """args, Job, Params, Adam, dict -> row, Params, Adam: trains on a text, and measures each step.
    """
    cfg, T, times, live = job.cfg, job.prompt, [], sys.stderr.isatty()
    text, held_out = read_text(args.text, T)
    row = asdict(job) | predict(job, ceilings) | {
        "parameters": param_count(cfg), "cache_bytes_per_token": kv_bytes(cfg, 1, 1, job.cache),
        "loss_before": held_out_loss(params, cfg, held_out, T)}
    say(f"{args.text}: {len(text)} bytes to train on, {len(held_out)} held out, K={cfg.K}, "
        f"{row['parameters']} parameters; held-out loss {row['loss_before']:.3f} nats/byte")
    with suppress(KeyboardInterrupt):
        for params, adam, value, seconds in itertools.islice(train_steps(
                cfg, params, adam, text, job.batch, T, args.lr, args.seed), args.steps):
            times.append(seconds)
            if live or len(times) % 10 == 1 or len(times) == args.steps:
                speed = shares(row, statistics.median(times[-9:]), ceilings, job.matmul_dtype)
                mfu = "above 100%: an error" if speed["mfu"] is None else f"{speed['mfu']:.0%}"
                say(f"\rstep {len(times)}/{args.steps}  loss {value:.3f} nats/byte  "
                    f"{speed['tokens_per_second']:.0f} tokens/s  MFU {mfu} ",
                    end="" if live else "\n")
    seconds = statistics.median(times[1:] or times or [math.inf])  # the first fetches all memory
    row |= {"loss_after": held_out_loss(params, cfg, held_out, T), "steps": len(times),
            "measured_seconds": seconds, **shares(row, seconds, ceilings, job.matmul_dtype)}
    print(f"K={cfg.K}: held-out loss: {row['loss_before']:.3f} nats a byte before, "
          f"{row['loss_after']:.3f} after {len(times)} steps of {si(seconds, 's')}; "
          f"{row['parameters']} parameters, cache {row['cache_bytes_per_token']} bytes a token")
    return row, params, adam


def train_on_text(args, jobs):
    """args, list of Job -> dict: trains once for each job, saves the model, and continues a text.
    """
    job = jobs[0]
    require(not (args.save or args.resume) or len(jobs) == 1 and not (args.resume and job.kv_heads),
            "--save and --resume take one model: one of each option, and the saved number of heads")
    if args.resume:
        cfg, params, adam = load_state(args.resume)
        require(not args.model or replace(job.cfg, dtype=cfg.dtype) == cfg, f"--model {job.model} "
                f"is not the model in --resume {args.resume}: leave it out")
        MODELS[args.resume] = cfg
        jobs = [job] = [replace(job, model=args.resume)]
    require(job.cfg.V == 256, f"V={job.cfg.V}: a model of bytes has V=256")
    _, held_out = read_text(args.text, job.prompt)
    if args.save:
        library()
        Path(args.save).mkdir(parents=True, exist_ok=True)
    limits, rows = ceilings({job.matmul_dtype, "float32"}), []
    print_ceilings(limits, "ceilings")
    for job in jobs:
        if not args.resume:
            params = init(jax.random.key(args.seed), job.cfg)
            adam = adam_init(params)
        row, params, adam = train_text(args, job, params, adam, limits)
        rows.append(row)
    if args.save:
        save_state(args.save, job.cfg, params, adam)
        save(args.save, job.cfg, params)
        say(f"saved to {args.save}")
    prompt, params = held_out[None, :min(job.prompt, 64)], cast(params, job.cfg.dtype)
    text = recite(params, job.cfg, prompt, job.new, jax.random.key(args.seed), Sampling(0.5))
    print(f"{decode(prompt[0])!r} goes on {text!r}")
    return {"machine": machine(), "ceilings": limits, "rows": rows, "continuation": text}


def end_tokens(path):
    """path -> tuple: what ends a text: generation_config.json counts before config.json."""
    for file in (path / "generation_config.json", path / "config.json"):
        end = read_json(file).get("eos_token_id") if file.exists() else None
        ends = end if isinstance(end, list) else [] if end is None else [end]
        require(all(type(end) is int for end in ends), f"{file}: eos_token_id={end!r} should be a "
                "token or a list of them")
        if ends:
            return tuple(ends)
    return ()


def tokenizer(path, cfg):
    """path, Config -> namespace: `encode` and `decode` of tokenizer.json, or of bytes where V is
    256; what `ends` a text; and how many tokens are `settled`: no later token changes their text.
    """
    file = Path(path) / "tokenizer.json"
    if not file.exists():
        require(cfg.V == 256, f"{file} is missing, and V={cfg.V} is not 256, a model of bytes")
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

    def settled(ids):  # a run of bytes, and of tokens without text, may become other characters
        n = len(ids)
        while n and (re.fullmatch("<0x[0-9A-F]{2}>", words.id_to_token(ids[n - 1]) or "")
                     or not words.decode(ids[n - 1:n])):
            n -= 1
        return n

    return SimpleNamespace(encode=lambda text: words.encode(text).ids, decode=words.decode,
                           ends=end_tokens(file.parent), settled=settled)


def job_values(args):
    """args -> dict: what they say of the fields of Job."""
    return {f.name: getattr(args, f.name) for f in fields(Job) if hasattr(args, f.name)}


def one_job(args, **changes):
    """args -> Job: of a command that makes no rows. ValueError where an option has several values.
    """
    values = job_values(args)
    for name, value in values.items():
        require(not isinstance(value, list) or len(value) == 1,
                f"{args.command} takes one --{name.replace('_', '-')}")
    return Job(**{name: value[0] if isinstance(value, list) else value
                  for name, value in values.items()} | changes)


def load_split(args, path, devices=1):
    """args, path, int -> Job, Params: of a model in a folder, in --dtype or the file's own. Of
    several devices each reads its own part alone."""
    def job_of(cfg):
        n = degree(cfg, devices)
        fit = ", ".join(str(m) for m in range(1, 65) if degree(cfg, m) == m)
        require(n == devices, f"--devices {devices} cannot share a model of E={cfg.E}, H={cfg.H}, "
                f"F={cfg.F}, V={cfg.V}: {fit} can")
        MODELS[path] = cfg
        layout = "sequence" if cfg.K % devices and devices > 1 else ""
        return settle(one_job(args, model=path, devices=devices, layout=layout,
                              dtype=args.dtype[0] or cfg.dtype))

    def rules_of(job):
        return where_of(job, mesh_of(job)).rules

    def shardings(cfg):
        job = job_of(cfg)
        return shard.shardings(job.cfg, mesh_of(job), rules_of(job)) if job.mesh else None

    cfg, params = load(path, shardings=shardings)
    job = job_of(cfg)
    params = in_dtype(job, params)
    return job, shard.place(params, job.cfg, mesh_of(job), rules_of(job)) if job.mesh else params


def draft_of(args, job, prompt, S, sampling):
    """-> draft, state: for `speculate`: n-grams, or a smaller model from a folder, of which every
    device has all."""
    if args.draft == "ngram":
        return ngram_draft, None
    small, params = load_split(args, args.draft)
    require(small.cfg.V == job.cfg.V, f"draft {args.draft} has V={small.cfg.V}, and the model "
            f"V={job.cfg.V}: they must share a tokenizer")
    _, cache = prefill_jit(params, init_cache(small.cfg, 1, S, job.cache), prompt,
                           np.array([prompt.shape[1]]), small.cfg)
    return model_draft(small.cfg, sampling), (params, cache)


def generating(job, mesh, params, cache, logits, prompt, key, sampling, end, draft=None):
    """-> iterator of (tokens, rounds): compiles, then gives all tokens made so far, and in how many
    rounds of a draft. What is known of the next token is its logits; with a draft, the text, whose
    last token the cache lacks."""
    fns, T, tokens, rounds, more = functions(job, mesh), prompt.shape[1], [], 0, {}
    step, known = fns.generate, logits
    if draft:
        cache, step = cache._replace(length=cache.length - 1), fns.speculate
        known = jnp.zeros((1, slots_of(cache)), jnp.int32).at[:, :T].set(prompt)
        step, more = partial(step, draft=draft[0]), {"state": draft[1]}
        if mesh:
            known, more = jax.device_put((known, more), jax.NamedSharding(mesh, jax.P()))
    step = jax.jit(partial(step, n=STRIDE, sampling=sampling, end=end), donate_argnums=(
        1, 2)).lower(params, cache, known, key, **more).compile()
    while True:
        yield tokens, rounds
        if draft:
            known, cache, more["state"], counts = step(params, cache, known, key, **more)
            tokens = np.asarray(known)[0, T:int(cache.length[0]) + 1].tolist()
            rounds += int(np.sum(counts))
        else:
            new, known, cache = step(params, cache, known, key)
            tokens = tokens + np.asarray(new[0]).tolist()


def stream(args):
    """args -> iterator of (str, str, dict): of the prompt and what follows so far the text that is
    final, all of it, and how fast it came."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    job, params = load_split(args, args.model, args.devices)
    words, key, mesh = tokenizer(args.model, job.cfg), jax.random.key(args.seed), mesh_of(job)
    prompt = np.asarray(words.encode(args.text), np.int32)[None]
    T, least = prompt.shape[1], 2 if args.draft else 1
    require(T >= least, f"prompt {args.text!r} makes {T} tokens: {least} or more"
            + (", or no --draft" if args.draft else ""))
    check_tokens(prompt, job.cfg)
    S = slots(job, T + job.new + STRIDE + job.n_draft + 1)
    job = replace(job, prompt=T)
    free, needed = free_memory(), kv_bytes(job.cfg, 1, S, job.cache)
    require(free is None or needed <= free, f"a cache of {S} slots holds {needed / GB:.1f} GB and "
            f"{(free or 0) / GB:.1f} GB are free: a smaller --new")
    draft = draft_of(args, job, prompt, S, sampling) if args.draft else None
    end = words.ends[0] if words.ends and prompt[0, -1] not in words.ends else None
    read = jax.jit(functions(job, mesh).prefill, donate_argnums=1)
    for _ in range(3):  # compiled; then weights are fetched from wherever they were
        cache, _ = where_of(job, mesh).empty(job.cfg, 1, S, job.cache)
        jax.block_until_ready((params, cache))
        start = time.perf_counter()
        logits, cache = jax.block_until_ready(read(params, cache, prompt, np.array([T])))
    speed = {"prompt": T, "dtype": job.dtype, "cache": job.cache,
             "prefill_seconds": time.perf_counter() - start}
    for new, rounds in generating(job, mesh, params, cache, logits, prompt, key, sampling, end,
                                  draft):
        start = start if new else time.perf_counter()  # compiled
        stop = min([job.new, *(new.index(end) for end in words.ends if end in new)])
        speed |= {"seconds": time.perf_counter() - start, "rounds": rounds,
                  "tokens_per_round": len(new) / max(1, rounds), "tokens": len(new[:stop])}
        ids = prompt[0].tolist() + new[:stop]
        final = words.decode(ids[:words.settled(ids)])
        yield final.rstrip("\ufffd"), words.decode(ids), speed  # a character may not be whole yet
        if len(new) >= job.new or stop < len(new):
            return


def complete(args):
    """args -> dict: continues a prompt, to stdout as it goes, and prints how fast that was."""
    printed, text, speed = "", "", {}
    try:
        for final, text, speed in stream(args):
            if final.startswith(printed):
                print(final[len(printed):], end="", flush=True)
                printed = final
    except KeyboardInterrupt:
        if not speed:
            raise
        say("\ninterrupted")
    print(text[len(printed):])
    rounds = f", {speed['tokens_per_round']:.2f} tokens a round" if speed["rounds"] else ""
    print(f"prefill of {speed['prompt']} tokens {si(speed['prefill_seconds'], 's')}, then "
          f"{speed['tokens'] / speed['seconds']:.1f} tokens/s{rounds}: weights {speed['dtype']}, "
          f"cache {speed['cache']}")
    return speed | {"text": text}


# ------------------------------------------------------------------------------------- command line


PHASES = tuple(COSTS)
OPTIONS = {f.name: {**f.metadata} for f in fields(Job) if f.name != "phase"} | {
    "seed": dict(help="of weights, tokens and draws", type=partial(number, least=0,
                                                                   most=2 ** 32 - 1)),
    "json": dict(help="write rows there as JSON (- is stdout, and nothing else there)",
                 metavar="FILE"),
    "profile": dict(help="write traces for Perfetto or XProf there, and print where time goes",
                    metavar="DIR"),
    "distributed": dict(help="this is one process of several, which find each other",
                        action="store_true"),
    "text": dict(help="a file to train on"), "steps": dict(help="training steps", type=number),
    "lr": dict(help="learning rate", type=above),
    "save": dict(help="write what was trained there", metavar="DIR"),
    "resume": dict(help="continue what --save wrote, as one longer run: with the same --text, "
                   "--batch, --prompt, --lr and --seed", metavar="DIR"),
    "parameters": dict(help="a rounded count, as 7e9, beside the exact one", type=above),
    "train": dict(help="plan training, too", action="store_true"),
    "tokens": dict(help="to train on", type=above),
    "mfu": dict(help="model flops utilization of training", type=partial(above, most=1)),
    "temperature": dict(help="0 is greedy", type=float),
    "top_k": dict(help="draw from the k most probable (0: all)", type=int),
    "top_p": dict(help="draw from those that reach p", type=float),
    "draft": dict(help="speculate with a smaller model, or with n-grams of the text",
                  metavar="DIR|ngram")}
EVERYWHERE = ("seed", "json")
ON_SEVERAL = "chip chips devices mesh layout ring by flags distributed".split()
STEP_OPTIONS = "model layers kv_heads batch prompt new dtype".split()
CACHED = [*STEP_OPTIONS, "cache", "int8", "profile", *ON_SEVERAL]
COMMANDS = {  # its options, their defaults where they differ, what it does, and an example
    "train": ([*STEP_OPTIONS, "profile", *ON_SEVERAL, *"keep text steps lr save resume".split()],
              dict(model="", batch=[8], lr=1e-3), "a training step, or training on a text",
              "--text README.md --steps 100 --save DIR"),
    "prefill": (CACHED, {}, "reading prompts", "--batch 8 --prompt 512"),
    "generate": (CACHED, {}, "a decode step", "--model gemma-7b --chip tpu-v4 --chips 4 --batch "
                 "110 --prompt 2032 --new 16 --dtype bfloat16"),
    "verify": ([*CACHED, "n_draft"], {}, "reading a draft at once", "--n-draft 7 --profile DIR"),
    "speculate": ([*CACHED, "n_draft"], dict(prompt=96),
                  "rounds of a draft and its verification", "--batch 1,4"),
    "serve": (CACHED, dict(batch=[8], prompt=64), "many requests through few rows", "--dtype int8"),
    "plan": ("model layers kv_heads batch prompt dtype cache int8 chip chips parameters train "
             "tokens mfu".split(),
             dict(model="gemma-7b", batch=[0], prompt=2048, dtype=["bfloat16"], cache="bfloat16",
                  chip="tpu-v4", tokens=1e12, mfu=0.5),
             "predict, without running anything", "--model gemma-7b --chips 4 --train"),
    "complete": ("new temperature top_k top_p dtype cache int8 draft n_draft devices".split(),
                 dict(new=64, dtype=[""], temperature=0.0, top_k=0, top_p=1.0),
                 "continue a text with a real model", '--model DIR "So long" --temperature 0.8')}


def parse(argv):
    """list of str -> namespace: the arguments of a command line. SystemExit, with one line, for bad
    ones."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"{self.prog}: error: {message}\n")

    def declare(parser, names, defaults):
        for name in names:
            default = defaults.get(name, getattr(Job, name, None))
            how = {**OPTIONS[name], "default": default}
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            if shown not in (None, "", 0, False):
                how["help"] += f" ({shown})"
            parser.add_argument(f"--{name.replace('_', '-')}", **how)

    common = Parser(add_help=False)
    declare(common, EVERYWHERE, dict(seed=0))
    parser = Parser(prog="bench.py", description=__doc__, parents=[common],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, under a minute")
    parser.set_defaults(text=None, profile=None)
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    for name, (options, defaults, text, example) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, parents=[common],
                                      epilog=f"for example: python bench.py {name} {example}")
        declare(command, options, defaults)
        if name == "complete":
            command.add_argument("text", help="the text to continue")
            command.add_argument("--model", required=True, metavar="DIR", help="config.json, "
                                 "model.safetensors and tokenizer.json, or what --save wrote")
    args, unknown = parser.parse_known_args(argv)
    if args.quick and args.command:
        parser.error(f"--quick is for all phases: leave out --quick or {args.command}")
    if unknown:
        parser.error(f"{args.command or 'the default run'} takes no {' '.join(unknown)}: --help "
                     "says what it takes")
    return args


def default_jobs(quick):
    """bool -> list of Job: of the default run, or of the quick one, that fit the memory."""
    model = QUICK if quick else DEFAULT if on_cpu() else LARGE
    batches = [1, 8] if quick else [1, 8, 32] if on_cpu() else [1, 8, 64, 512]
    shapes = [("train", 2, 128, 0),
              *[("prefill", B, 128 if quick else 64, 0) for B in ([1] if quick else [1, 8])],
              *[("generate", B, 240, 16) for B in batches],
              ("verify", 1, 240, 16), ("speculate", 1, 96, 32), ("serve", 8, 64, 16)]
    kinds = [("float32", ""), ("bfloat16", ""), ("int8", ""), ("int8", "int8")]
    jobs = [settle(Job(phase, model, batch=B, prompt=prompt, new=new, dtype=dtype, cache=cache))
            for dtype, cache in kinds[:1 if quick else 4] for phase, B, prompt, new in shapes
            if (not cache or phase == "generate") and (phase, dtype) != ("train", "int8")
            and not (quick and phase == "serve")]
    free = free_memory()
    return [job for job in jobs if free is None or needed_bytes(job) <= 0.8 * free]


def jobs_of(args):
    """args -> list of Job: the product of what its options give."""
    if not args.command:
        return default_jobs(args.quick)
    values = job_values(args)
    values["model"] = args.model or (SMALL if args.text else DEFAULT)
    values["phase"] = ["generate", "speculate"] if args.command == "speculate" and not args.chip \
        else args.command
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    return [settle(Job(**dict(zip(values, each)))) for each in itertools.product(*lists)]


ROW = dict.fromkeys(
    "limit_seconds bound measured_seconds flops program_flops weight_bytes cache_bytes mfu mbu "
    "tokens_per_second argument_bytes formula_bytes output_bytes alias_bytes temp_bytes peak_bytes "
    "memory_bytes fits message copies collectives sent counted cycle_seconds regions byte_seconds "
    "transfer_seconds hidden_transfer_seconds layer".split())  # null where it does not apply
TABLE = (
    Column("phase", -9, "phase"), Column("dtype", -8, "dtype"),
    Column("cache", -8, lambda row: row["cache"] if row["phase"] != "train" else "-"),
    Column("B", 3, "batch", "d"), Column("T/S", 8, lambda row: f"{row['T']}/{row['S']}"),
    Column("limit", 7, "limit_seconds", "s"), Column("bound", 5, "bound"),
    Column("took", 7, "measured_seconds", "s"),
    Column("took/limit", 10, lambda row: row["measured_seconds"] / row["limit_seconds"], ".2f"),
    Column("MFU", 5, lambda row: "error" if row["mfu"] is None else f"{row['mfu']:.0%}"),
    Column("MBU", 5, lambda row: "error" if row["mbu"] is None else f"{row['mbu']:.0%}"),
    Column("tokens/s", 9, "tokens_per_second", " "))


def make_row(job, limits, args, params=None):
    """Job, dict, args, Params -> dict: predicted, compiled and, here, measured."""
    row = ROW | asdict(job) | predict(job, limits)
    say(f"{name_of(row)}: limit {si(row['limit_seconds'], 's')} ...")
    prepared = prepare(job, params, args.seed)
    step, found = prepared.program.step, {}
    if job.phase != "serve":
        step, found = inspect(prepared, traced=bool(args.profile))
    row |= found
    if job.chip:
        return row
    row |= measure(prepared, step)
    row |= shares(row, row["measured_seconds"], limits, job.matmul_dtype)
    if args.profile:
        folder = Path(args.profile) / name_of(row).replace(" ", "-")
        row |= {"profile": profile(prepared, folder)} if prepared.ops else {}
    return row


def shown_sent(sent):
    """dict of (number, bytes) by collective -> str."""
    return "; ".join(f"{number} {kind} {si(size, 'B')}" for kind, (number, size) in sent.items()) \
        or "nothing"


def print_sent(row):
    """row -> None: what each device sends in a step, by formula and counted in the program."""
    if row["sent"] is not None:
        program = "the same" if row["sent"] == row["counted"] else shown_sent(row["counted"])
        print(f"  each of {row['devices'] if not row['chip'] else row['chips']} sends "
              f"{shown_sent(row['sent'])} by formula, the program {program}")


def print_chip_row(row):
    """row -> None: what was predicted, and what the chip's compiler made of it."""
    mesh, formula = f", mesh {row['mesh']}" * bool(row["mesh"]), ", ".join(
        f"{kind} {si(size, 'B')}" for kind, size in row["formula"].items() if size)
    print(f"\n{row['phase']} {row['layout']}: {row['model']} in {row['dtype']}"
          + f", cache {row['cache']}" * (row["phase"] != "train")
          + f", B={row['batch']} T={row['T']} S={row['S']},\non {row['chips']} x {row['chip']} "
          f"({row['slice']}{mesh})")
    print(f"  limit     {si(row['limit_seconds'], 's')} bound by {row['bound']}: "
          f"{si(row['flops'], 'FLOP')}, weights {si(row['weight_bytes'], 'B')}, cache "
          f"{si(row['cache_bytes'], 'B')}; bytes alone {si(row['byte_seconds'], 's')}")
    print(f"  compiler  {row['compiler']}; what follows is of one device, and nothing is measured")
    if row["message"]:
        print(f"  REFUSED   {si(row['needed_bytes'], 'B')} needed, {si(row['memory_bytes'], 'B')} "
              f"granted; arguments by formula: {formula}")
        return
    print(f"  memory    arguments {si(row['argument_bytes'], 'B')} (by formula {formula}), "
          f"temporaries {si(row['temp_bytes'], 'B')},\n            in place "
          f"{si(row['alias_bytes'], 'B')}, peak {si(row['peak_bytes'], 'B')} of "
          f"{si(row['memory_bytes'], 'B')}: " + ("fits" if row["fits"] else "DOES NOT FIT"))
    print("  sends     " + (";\n            ".join(
        f"{c['number']} {kind} {si(c['bytes'], 'B')} ({c['asynchronous']} asynchronous)"
        for kind, c in row["collectives"].items()) or "nothing"))
    print_sent(row)
    print(f"  copies    {si(row['copies'], 'B')} of arrays of a weight's or a cache's size")
    if row["cycle_seconds"]:
        largest = ", ".join(f"{region} {si(seconds, 's')}" for region, seconds in
                            list(row["regions"].items())[:6])
        print(f"  cycles    {si(row['cycle_seconds'], 's')}: {largest} ({row['unestimated']} "
              "operations without an estimate)\n"
              f"  transfers {si(row['transfer_seconds'], 's')} that wait, "
              f"{si(row['hidden_transfer_seconds'], 's')} asynchronous, by the sheet's links")


def print_attention(job):
    """Job -> None: the share of attention in the flops, and where it would be half."""
    for name, letter, flops, size, equal in zip(
            ("a causal pass", "a decode step"), "TS",
            (prefill_flops(job.cfg, 1, job.prompt), decode_flops(job.cfg, 1, job.prompt + job.new)),
            (job.prompt, job.prompt + job.new), crossover(job.cfg)):
        share = (flops["scores"] + flops["values"]) / sum(flops.values())
        print(f"attention is {share:.1%} of the flops of {name} at {letter} = {size}, "
              f"and as much as the weights' at {letter} = {equal}")


def run_chips(args, jobs):
    """args, list of Job -> dict: prints each job's limit and what the chip's compiler makes of it.
    """
    check_compiler(jobs[0].chip)
    chip, rows = CHIPS[jobs[0].chip], []
    print(f"{jobs[0].chip} ({chip.source}): limits are the sheet's; cycles are its compiler's cost "
          "model, not a clock")
    for job in jobs:
        rows.append(make_row(job, sheet(chip, job.chips), args))
        print_chip_row(rows[-1])
    return {"jax": jax.__version__, "ceilings": sheet(chip, jobs[0].chips), "rows": rows}


def profile_worst(jobs, rows, params_of, seed):
    """jobs, rows, fn, int -> None: adds a profile to the row of the largest gap among phases that
    are compiled."""
    pairs = [pair for pair in zip(jobs, rows) if pair[1]["temp_bytes"] is not None]
    job, row = max(pairs, key=lambda pair: pair[1]["measured_seconds"] / pair[1]["limit_seconds"])
    prepared = prepare(job, params_of(job), seed)
    measure(prepared, inspect(prepared, traced=True)[0])
    row["profile"] = profile(prepared)


def print_notes(rows):
    """rows -> None: their errors, and what was measured on a noisy machine."""
    for row in rows:
        for error in row["errors"]:
            print(f"error: {name_of(row)}: {error}")
        if row["spread"] > 0.5:
            print(f"noise: {name_of(row)}: {row['runs']} runs spread by {row['spread']:.0%} of "
                  "their median: measure again on a calm machine")


def run(args):
    """args -> dict: measures what the command line asks for, and prints it."""
    jobs = jobs_of(args)
    for job in jobs:
        check(job)
    require(not (args.text or args.profile) or not (jobs[0].chip or args.text and jobs[0].mesh),
            "--text and --profile are for this machine, and --text for one device")
    if jobs[0].chip:
        return run_chips(args, jobs)
    if args.text:
        return train_on_text(args, jobs)
    limits = ceilings({part.dtype for job in jobs for part in COSTS[job.phase](job).parts})
    device, rows, learned = machine(), [], {}
    print_ceilings(limits, f"{device['device']}, {device['cores']} cores, jax {device['jax']}")
    if not args.command:
        print_attention(jobs[-1])

    drawn = lru_cache(maxsize=1)(partial(draw, key=jax.random.key(args.seed)))

    def params_of(job):
        if job.mesh:  # they are made where they stay
            return None
        if job.phase != "speculate":
            return drawn(Job(model=job.model, layers=job.layers, kv_heads=job.kv_heads,
                             dtype=job.dtype, int8=job.int8))
        if job.kv_heads not in learned:
            learned[job.kv_heads] = learn(job, args.seed)
        return in_dtype(job, learned[job.kv_heads])

    print_line(TABLE)
    with suppress(KeyboardInterrupt):  # what was measured so far is printed
        for job in jobs:
            rows.append(make_row(job, limits, args, params_of(job)))
            print_line(TABLE, rows[-1])
            print_sent(rows[-1])
        if not args.command and not args.profile:
            profile_worst(jobs, rows, params_of, args.seed)
    print_notes(rows)
    if rows:
        explain(rows)
    return {"machine": device, "ceilings": limits, "rows": rows}


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


def run_plan(args):
    """args -> dict: of `plan`."""
    job = one_job(args, new=0)
    return plan(args, replace(job, int8=job.int8 or "Q8" * (job.dtype == "int8")))


def main(argv=None):
    """The program: bad input is refused in one line."""
    keep_freed_memory()  # before XLA starts its threads
    args = parse(argv)
    if args.command == "train" and (args.text or args.resume or args.save or args.steps):
        args.text = args.text or Path(__file__).with_name("README.md")
        args.steps = args.steps or 100
    stdout = sys.stdout
    try:
        file = args.json and (stdout if args.json == "-" else open(args.json, "a+"))
        if getattr(args, "distributed", False):
            jax.distributed.initialize()
        elif getattr(args, "devices", 1) > 1:
            with suppress(RuntimeError):  # too late where JAX has been used
                jax.config.update("jax_num_cpu_devices", args.devices)
        if args.json == "-" or jax.process_index() and not getattr(args, "chip", ""):
            sys.stdout = open(os.devnull, "w")
        result = {"plan": run_plan, "complete": complete}.get(args.command, run)(args)
        if file and not jax.process_index():
            if args.json != "-":
                file.truncate(0)
            file.write(json.dumps(result, default=str) + "\n")
            file.flush()
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nbench.py: interrupted before there was anything to print")
    finally:
        sys.stdout = stdout


if __name__ == "__main__":
    main()
