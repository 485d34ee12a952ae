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
import hashlib
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
from collections import Counter, namedtuple
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

warnings.filterwarnings("ignore", message="builtin type event_stats")  # of newer Pythons' traces
COMPILERS = {  # what compilers for chips that are not here read before JAX is imported
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
if __name__ == "__main__":
    if any(word.startswith("--chip") for word in sys.argv):
        os.environ.update(COMPILERS)
    elif sys.platform == "linux" and not re.search("nvidia|accel|vfio", str(os.listdir("/dev"))):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else installed compilers print warnings

import jax
import jax.numpy as jnp
import numpy as np

import shard
from infer import (CACHE_DTYPES, HERE, Q8, Q8A8, Sampling, array_bytes, byte_text, byte_tokens,
                   cached_attention, cudnn, decode_bytes, decode_flops, extend, free_memory,
                   generate, init_cache, kv_bytes, library, load, load_state, model_draft,
                   multiplied, ngram_draft, prefill, prefill_flops, quantize_params, read_json,
                   save, save_state, serve, speculate, splash, tokenizer, weight_bytes)
from minillm import (KEEPABLE, Adam, Config, adam_init, adamw, cast, causal_attention, check_tokens,
                     dims, dot, init, loss, param_count, product, require, size_of, traced_flops,
                     train_flops, train_step)

GB = 1e9
SENTENCE = "So long and thanks for all the fish; "
DEFAULT = "L2,E1024,H16,K4,D64,F10240,V256"
LARGE = "L8,E2048,H32,K8,D64,F8192,V32000"  # the default on a GPU or TPU: half of llama-3.2-1b
QUICK = "L2,E1024,H16,K4,D64,F2816,V256"
SMALL = "L4,E256,H8,K2,D32,F704,V256"  # learns a text of some KB in a minute on two cores
REQUESTS = 2  # requests that `serve` gets for each row, so that a row is refilled twice
STRIDE = 8  # tokens that `complete` makes before it prints them
RESERVE = 0.08  # share of the memory that a plan leaves for what is neither weights nor cache
DTYPES = "float32", "bfloat16", "int8"
INT8 = {"Q8": Q8, "Q8A8": Q8A8}  # weight-only int8, and W8A8

# ------------------------------------------------------------------------------- models and chips

gemma = partial(Config, act="gelu", embed_scale=True)
llama2 = partial(Config, eps=1e-5, tied=False)
llama3 = partial(llama2, rope_base=5e5)
small_llama3 = partial(llama3, rope_scaling=(32, 1, 4, 8192), tied=True)
qwen3 = partial(Config, rope_base=1e6, qk_norm=True)
smollm2 = partial(Config, rope_base=1e5, eps=1e-5)
MODELS = {  # L, E, H, K, D, F, V: from each model's own config.json on huggingface.co
    "gemma-2b": gemma(18, 2048, 8, 1, 256, 16384, 256000),
    "gemma-7b": gemma(28, 3072, 16, 16, 256, 24576, 256000),
    "llama-2-7b": llama2(32, 4096, 32, 32, 128, 11008, 32000),
    "llama-2-13b": llama2(40, 5120, 40, 40, 128, 13824, 32000),
    "llama-2-70b": llama2(80, 8192, 64, 8, 128, 28672, 32000),
    "llama-3-8b": llama3(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3-70b": llama3(80, 8192, 64, 8, 128, 28672, 128256),
    "llama-3.1-405b": llama3(126, 16384, 128, 8, 128, 53248, 128256, rope_scaling=(8, 1, 4, 8192)),
    "llama-3.2-1b": small_llama3(16, 2048, 32, 8, 64, 8192, 128256),
    "llama-3.2-3b": small_llama3(28, 3072, 24, 8, 128, 8192, 128256),
    "mistral-7b": llama2(32, 4096, 32, 8, 128, 14336, 32768, rope_base=1e6),
    "qwen3-0.6b": qwen3(28, 1024, 16, 8, 128, 3072, 151936),
    "qwen3-1.7b": qwen3(28, 2048, 16, 8, 128, 6144, 151936),
    "qwen3-4b": qwen3(36, 2560, 32, 8, 128, 9728, 151936),
    "qwen3-8b": qwen3(36, 4096, 32, 8, 128, 12288, 151936, tied=False),
    "qwen3-14b": qwen3(40, 5120, 40, 8, 128, 17408, 151936, tied=False),
    "qwen3-32b": qwen3(64, 5120, 64, 8, 128, 25600, 151936, tied=False),
    "smollm2-135m": smollm2(30, 576, 9, 3, 64, 1536, 49152),
    "smollm2-360m": smollm2(32, 960, 15, 5, 64, 2560, 49152),
    "smollm2-1.7b": smollm2(24, 2048, 32, 32, 64, 8192, 49152, rope_base=130000),
    "tinyllama-1.1b": llama2(22, 2048, 32, 4, 64, 5632, 32000),
}


# What the data sheet of one chip says. Matmuls are dense; those of float32 are as JAX makes them by
# default: rounded to bf16 on a TPU, to TF32 on a GPU.
#     float32, bfloat16, int8  flops/s
#     read                     bytes/s of its memory
#     memory                   bytes
#     link                     bytes/s that it sends over one axis, in both directions together
#     axes                     how many axes of links it has
#     source                   where all this stands
Chip = namedtuple("Chip", "float32 bfloat16 int8 read memory link axes source")
CLOUD, NVIDIA = "docs.cloud.google.com/tpu/docs/", "nvidia.com/en-us/data-center/"
CHIPS = {
    "tpu-v4": Chip(275e12, 275e12, 275e12, 1.23e12, 32e9, 9e10, 3,
                   CLOUD + "v4; links: jax-ml.github.io/scaling-book/tpus"),
    "tpu-v5e": Chip(197e12, 197e12, 393e12, 8.19e11, 16e9, 1e11, 2, CLOUD + "v5e"),
    "tpu-v5p": Chip(459e12, 459e12, 918e12, 2.765e12, 95e9, 2e11, 3, CLOUD + "v5p"),
    "tpu-v6e": Chip(918e12, 918e12, 1836e12, 1.638e12, 32e9, 2e11, 2, CLOUD + "v6e"),
    "tpu-v7x": Chip(2307e12, 2307e12, 2307e12, 7.37e12, 192e9, 4e11, 3, CLOUD + "tpu7x"),
    "a100": Chip(156e12, 312e12, 624e12, 2.039e12, 80e9, 3e11, 1, NVIDIA + "a100 (SXM, 80 GB)"),
    "h100": Chip(494.5e12, 989e12, 1979e12, 3.35e12, 80e9, 4.5e11, 1, NVIDIA + "h100 (SXM)"),
    "h200": Chip(494.5e12, 989e12, 1979e12, 4.8e12, 141e9, 4.5e11, 1, NVIDIA + "h200 (SXM)"),
    "b200": Chip(1.125e15, 2.25e15, 4.5e15, 8e12, 180e9, 9e11, 1, NVIDIA + "dgx-b200, an eighth"),
}


def number(text, least=1, most=2 ** 31 - 1):
    """str -> int. ValueError outside of the two limits."""
    require(text.isascii() and text.isdigit() and least <= int(text) <= most,
            f"{text!r}: expected a whole number from {least} to {most}")
    return int(text)


def positive(text, most=math.inf):
    """str -> float, above 0. ValueError for another."""
    value = float(text)
    require(0 < value <= most and value < math.inf, f"{text!r}: expected a number above 0"
            + f", at most {most}" * (most < math.inf))
    return value


def find(what, values, text):
    """str, names, str -> str: the name in `values`, which are in lower case, for text in any case;
    an empty text (a default), or one with commas (a shape), as it is. ValueError with the nearest
    names, or with all."""
    name = text.lower()
    near = difflib.get_close_matches(name, values, cutoff=0.7)
    require(name in values or not text or "," in text, f"{what} {text!r} is unknown: " + (
        f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(values)}"))
    return name if name in values else text


def config_of(text):
    """str -> Config: a name in MODELS, or a shape such as L8,E512,H8,K8,D64,F1408,V256[,untied]."""
    if text in MODELS:
        return MODELS[text]
    shape = re.fullmatch(r"L(\d+),E(\d+),H(\d+),K(\d+),D(\d+),F(\d+),V(\d+)(,untied)?", text)
    require(shape, f"model {text!r} is no shape such as {DEFAULT}[,untied]")
    *sizes, untied = shape.groups()
    return Config(*map(int, sizes), tied=not untied)


def chip_of(text):
    """str -> Chip: a name in CHIPS, or flops/s, bytes/s, bytes of memory, bytes/s over links."""
    if text in CHIPS:
        return CHIPS[text]
    with suppress(ValueError):
        peak, read, memory, link = map(positive, text.split(","))
        return Chip(peak, peak, peak, read, memory, link, 1, "given by hand")
    raise ValueError(f"chip {text!r}: expected one of {', '.join(CHIPS)}, or flops/s,bytes/s,bytes,"
                     "link bytes/s such as 275e12,1.23e12,32e9,9e10")


def on_cpu():
    """-> bool: do programs run on this machine's CPU?"""
    return jax.default_backend() == "cpu"


# ---------------------------------------------------------------------- chips that are not here


# What a chip's compiler is asked for, and how its cycles become seconds:
#     extra    that installs the compiler
#     name     of the chip, to its compiler
#     slices   shapes that exist
#     clock    cycles/s; 0 where its estimates are worth nothing
#     devices  that JAX sees, a chip
Target = namedtuple("Target", "extra name slices clock devices", defaults=(0.0, 1))


TORUS, PLANE = "2x2x1 2x2x2 2x2x4 4x4x4 4x4x8", "2x2 2x4 4x4 4x8 8x8"
HOSTS = "1x1x1 1x1x2 1x1x4 1x1x8 1x2x8 1x4x8 1x8x8"  # partitions, hosts, GPUs a host
GPU = """gpu_device_info {{ core_count: {} fpus_per_core: {} shared_memory_per_core: {}
    shared_memory_per_block_optin: {} memory_bandwidth: {} l2_cache_size: {} clock_rate_ghz: {}
    device_memory_size: {} cuda_compute_capability {{ major: {} {} }} threads_per_block_limit: 1024
    threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152
    registers_per_core_limit: 65536 registers_per_block_limit: 65536 block_dim_limit_x: 2147483647
    block_dim_limit_y: 65535 block_dim_limit_z: 65535 }} platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}
    device_description_str: "{}" """
FAST = "feature_extension: ACCELERATED_FEATURES"
GPUS = {  # what stands in it: openxla/xla, xla/backends/gpu/target_config/specs
    "a100": (108, 64, 167936, 166912, 2039040000000, 41943040, 1.41, 85100068864, 8, ""),
    "h100": (132, 128, 233472, 232448, 3352320000000, 52428800, 1.98, 84942979072, 9, FAST),
    "h200": (132, 128, 233472, 232448, 4800000000000, 52428800, 1.98, 151397597184, 9, FAST),
    "b200": (148, 128, 233472, 232448, 7672320000000, 132644864, 1.965, 191514411008, 10, FAST)}
TARGETS = {  # clocks: the sheet's peak over what the matrix units multiply a cycle
    "tpu-v4": Target("tpu", "v4", TORUS, 1.05e9),
    "tpu-v5e": Target("tpu", "v5e", PLANE + " 16x16", 1.5e9),
    "tpu-v5p": Target("tpu", "v5p", TORUS, 1.75e9),
    "tpu-v6e": Target("tpu", "v6e", PLANE, 1.75e9),
    "tpu-v7x": Target("tpu", "tpu7x", TORUS, 2.2e9, devices=2),
    **{name: Target("gpu", name, HOSTS) for name in GPUS}}
EXTRAS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}  # and the module that each brings
FLAGS = (  # the lecture's, for collectives beside matmuls on a TPU
    "xla_enable_async_all_gather", "xla_enable_async_collective_permute",
    "xla_tpu_enable_async_collective_fusion", "xla_tpu_overlap_compute_collective_tc",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather")


def slice_of(name, chips):
    """str, int -> str: the slice of so many chips; for one chip the smallest. ValueError where
    there is none, naming those that exist."""
    sizes = {math.prod(map(int, shape.split("x"))): shape for shape in TARGETS[name].slices.split()}
    require(chips in (1, *sizes), f"{name} has no slice of {chips} chips: --chips 1, "
            + ", ".join(f"{n} ({shape})" for n, shape in sizes.items()))
    return sizes[max(chips, min(sizes))]


def check_compiler(name):
    """str -> None: ValueError unless its compiler is here."""
    require(name in TARGETS, f"chip {name!r} has no compiler: one of {', '.join(TARGETS)}")
    extra, here = TARGETS[name].extra, (sys.platform, platform.machine()) == ("linux", "x86_64")
    require(here and importlib.util.find_spec(EXTRAS[extra]),
            f'{name} needs its compiler, the extra {extra}: pip install ".[{extra}]"'
            + ", on Linux and x86-64" * (not here))


def compiled_with(lowered, flags):
    """Lowered, dict -> Compiled or None, dict: with these flags; where the program does not fit,
    what it needs and what there is."""
    try:
        return lowered.compile(compiler_options=flags or None), {}
    except Exception as error:
        message, *_ = str(error).splitlines()
        size = r"\((\d[\d.]*)([KMGT])\)"
        match = re.search(f"{size} exceeds available HBM {size}", str(error))
        require(match, f"the compiler: {message}")
        needed, granted = (int(float(number) * 1024 ** "BKMGT".index(prefix))
                           for number, prefix in re.findall(size, match[0]))
        return None, {"message": message, "needed_bytes": needed, "memory_bytes": granted}


@lru_cache
def chip_devices(name, chips):
    """str, int -> devices, dict: and their compiler, and the memory that it grants a program, as it
    says when it refuses one of 4 TiB."""
    from jax.experimental.topologies import get_topology_desc
    check_compiler(name)
    target, shape = TARGETS[name], slice_of(name, chips)
    package = EXTRAS[target.extra].replace("_", "-")
    facts = {"compiler": f"{package} {version(package)}, jax {jax.__version__}",
             "slice": f"{target.name} {shape}"}
    if target.extra == "gpu":
        text = GPU.format(*GPUS[name], name)
        devices = get_topology_desc(name, "cuda", topology=shape, target_config=text).devices
        return devices, facts | {"memory_bytes": GPUS[name][7]}
    how = {"chip_config_name": "megacore"} if name in ("tpu-v4", "tpu-v5p") else {}
    # from this size on a slice is a torus: its ends are connected
    how |= {"wrap": (True, True, True)} if shape.startswith("4x4x") else {}
    devices = get_topology_desc(f"{target.name}:{shape}", "tpu", **how).devices
    where = jax.sharding.SingleDeviceSharding(devices[0])
    _, refusal = compiled_with(jax.jit(partial(jnp.ones, 1 << 40), out_shardings=where).lower(), {})
    return devices[:chips * target.devices], facts | {"memory_bytes": refusal["memory_bytes"]}


# ------------------------------------------------------------------------- a job and its options


def option(text, default, parse=str, several=False, **how):
    """-> a field of Job that is an option: `parse` reads its text, and raises ValueError for a bad
    one; where it takes `several`, with commas between them, each makes a job. `how` goes to
    argparse."""
    def read(text):
        try:
            return [*map(parse, text.split(","))] if several else parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return field(default=default, metadata=dict(help=text, type=read, **how))


def mesh_text(axes):
    """dict -> str: axes and sizes as text, such as data=16,tensor=4x4."""
    return ",".join(f"{name}={'x'.join(map(str, shard.as_axes(sizes)))}"
                    for name, sizes in axes.items())


@dataclass(frozen=True)
class Job:
    """What makes one row: scalars, each an option of the command line."""
    phase: str = "generate"
    model: str = option("a name, or a shape in letters", DEFAULT, partial(find, "model", MODELS))
    kv_heads: int = option("in place of the model's", 0, number, several=True)
    batch: int = option("sequences", 1, number, several=True)
    prompt: int = option("tokens of a sequence", 256, number)
    new: int = option("tokens to generate", 32, number)
    dtype: str = option("of the weights", "float32", partial(find, "dtype", DTYPES), several=True)
    cache: str = option("dtype of the cache, else the fastest", "", choices=CACHE_DTYPES)
    int8: str = option("weight-only int8 (Q8), or W8A8 (Q8A8)", "", choices=INT8)
    n_draft: int = option("proposed tokens", 4, number)
    chip: str = option("one that is not here: predict, and compile for it", "",
                       partial(find, "chip", CHIPS))
    chips: int = option("how many of them", 1, number)
    devices: int = option("devices here; a CPU simulates them", 1, number)
    mesh: str = option("of devices, as data=2,tensor=4 (training: data; others: tensor)", "")
    layout: str = option("of a cache on several devices (the first that divides)", "",
                         choices=shard.LAYOUTS)
    ring: int = option("collective matmuls: 0 references, 1 or 2 rings of so many directions", 0,
                       partial(number, least=0, most=2), several=True)
    attention: str = option("a kernel: splash (a TPU's prefill and training), cudnn (on a GPU)",
                            "plain", choices=("plain", "splash", "cudnn"))
    sums: str = option("dtype in which partial sums travel between devices", "float32",
                       choices=("float32", "bfloat16"))
    by: str = option("who chooses training's collectives", "hand", choices=("hand", "compiler"))
    keep: str = option("what a layer keeps for its gradient on several devices, of "
                       f"{', '.join(KEEPABLE)}, or none ({','.join(shard.KEPT)})", "")
    flags: str = option("compile with the lecture's flags for a TPU: off, on", "off",
                        partial(find, "flags", ("off", "on")), several=True)

    # whether it runs on this machine's CPU; slots for the prompt, the new tokens, and a draft; and
    # sizes of the mesh's axes of "tensor"
    here = property(lambda self: not self.chip and on_cpu())
    most_slots = property(lambda self: self.prompt + self.new + self.n_draft + 1)
    tensor = property(lambda self: shard.as_axes(self.axes.get("tensor", 1)))

    @property
    def cfg(self):
        """-> Config: of the model, with the dtype of its activations."""
        cfg, low = config_of(self.model), "float32" if self.here else "bfloat16"
        return replace(cfg, K=self.kv_heads or cfg.K,
                       dtype=low if self.dtype == "int8" else self.dtype)

    @property
    def axes(self):
        """-> dict: of the mesh, with sizes. ValueError for text that `mesh_text` does not make."""
        pairs = re.findall(r"(data|context|tensor)=([1-9]\d*(?:x[1-9]\d*)*)", self.mesh)
        axes = {name: tuple(map(int, sizes.split("x"))) if "x" in sizes else int(sizes)
                for name, sizes in pairs}
        require(mesh_text(axes) == self.mesh, f"--mesh {self.mesh!r}: expected axes and sizes, "
                "each once, as data=16,tensor=4, or tensor=4x4")
        return axes

    @property
    def copies(self):
        """-> int: of the weights: devices of axes other than "tensor" read them once each. `split`
        makes "context" one axis."""
        return math.prod(shard.as_axes(self.axes.get("data", 1))) * self.axes.get("context", 1)

    @property
    def kept(self):
        """-> tuple or None: what a layer keeps for its gradient; None where it keeps all."""
        return None if not self.keep else () if self.keep == "none" else tuple(self.keep.split(","))

    @property
    def matmul_dtype(self):
        """-> str: in which its weights are multiplied."""
        return self.cfg.dtype if (self.dtype, self.int8) == ("int8", "Q8") else self.dtype


def split(job):
    """Job -> Job: with its mesh and the layout of its cache. Where none is given, training is FSDP
    over all devices, and all else is tensor parallel (`shard.over_heads`), its cache split over
    heads if they divide, else rows, else slots. ValueError where it cannot be."""
    target, train, n = TARGETS.get(job.chip), job.phase == "train", job.devices
    if target:
        n, sizes = job.chips * target.devices, slice_of(job.chip, job.chips)
        shape = f"{sizes}x{target.devices}" if job.chips > 1 else str(n)
    if n == 1:
        require(not job.mesh, f"--mesh {job.mesh} takes several devices: --devices, or --chip and "
                "--chips")
        return job
    axes = job.axes or ({"data": n} if train else {"tensor": shard.over_heads(job.cfg, n)})
    data, context, tensor = (math.prod(shard.as_axes(axes.get(name, 1)))
                             for name in ("data", "context", "tensor"))
    alone = train and job.by == "compiler"
    require(data * context * tensor == n, f"a mesh of {mesh_text(axes)} has "
            f"{data * context * tensor} devices: {n} are asked for")
    require(train or context == 1, "--mesh context=: only training has this axis")
    require(job.batch % data == 0, f"B={job.batch} rows over {data} devices of data: --batch "
            f"{-(-job.batch // data) * data}")
    require(not alone or n == data, "by the compiler training is split over data alone")
    require(shard.degree(job.cfg, tensor) == tensor, f"{tensor} devices of tensor must divide E, "
            f"F, H and V, which are {', '.join(str(getattr(job.cfg, name)) for name in 'EFHV')}")
    require(job.cfg.K % math.prod(shard.as_axes(axes.get("tensor", 1))[:-1]) == 0, f"K={job.cfg.K} "
            f"cannot be split over the first axes of {mesh_text(axes)}: give their sizes otherwise")
    parts = shard.torus_axes(shape, n // data) if target else axes.get("data", 1)
    job = replace(job, mesh=mesh_text({name: sizes for name, sizes, named in (
        ("data", parts, train or data > 1), ("context", context, context > 1),
        ("tensor", axes.get("tensor", 1), not alone)) if named}))
    if train:
        return replace(job, keep=job.keep or ("" if alone else ",".join(shard.KEPT)))
    fit = shard.layouts(job.cfg, job.batch // data, job.tensor)
    require(job.layout in ("", *fit), f"layout {job.layout!r} does not divide over {tensor} "
            f"devices of tensor with K={job.cfg.K} and B={job.batch // data} rows a copy: --layout "
            f"{' or '.join(fit)}")
    return replace(job, layout=job.layout or fit[0])


def settle(job):
    """Job -> Job: with the fastest choice for what is not given, but for `fastest_int8`. A CPU
    copies bf16 slots and widens int8 ones at every step, and computes in float32 around int8
    weights; elsewhere fewer bytes are faster, and weight-only int8 is faster on a TPU."""
    wide = "float32" if job.here or job.dtype == "float32" else "bfloat16"
    kind = "Q8" * (job.dtype == "int8" and bool(job.chip))
    return split(replace(job, cache=job.cache or wide, int8=job.int8 or kind))


# ------------------------------------------------------------------------------------------ tables


def si(x, unit):
    """number, unit -> str: three digits and a prefix."""
    for size, prefix in zip(10.0 ** np.arange(18, -10, -3), "EPTGMk mun"):
        if abs(x) >= 0.9995 * size:
            digits = max(0, 2 - int(math.log10(max(1, x / size * 1.0005))))
            return f"{x / size:.{digits}f} {prefix.strip()}{unit}"
    return f"0 {unit}"


# The unit of what has one of these words in its name.
UNITS = {"seconds|regions": "s", "bytes|formula|copies": "B", "flops": "FLOP", "mfu|mbu|share": "%"}


def cell(key, value):
    """str, value -> str: three digits and the unit that the key names; whole numbers in full; of a
    tally the number of collectives and what they send."""
    if isinstance(value, dict):
        return ", ".join(f"{name} ({cell(key, item)})" if isinstance(item, dict) else
                         f"{name} {cell(f'{key} {name}', item)}" for name, item in value.items())
    if isinstance(value, tuple):
        return f"{value[0]} of {si(value[1], 'B')}"
    if value is None or isinstance(value, (str, bool)):
        return "-" if value in (None, "") else str(value)
    if unit := next((unit for words, unit in UNITS.items() if re.search(words, key)), None):
        return f"{value:.0%}" if unit == "%" else si(value, unit)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_rows(rows):
    """list of dict with the same keys -> None: prints a table; a list in a row is left out."""
    columns = []
    for key, value in rows[0].items():
        if not isinstance(value, list):
            words = [key.replace("_", " "), *(cell(key, row[key]) for row in rows)]
            justify = str.ljust if isinstance(value, (str, dict)) else str.rjust
            columns.append([justify(word, max(map(len, words))) for word in words])
    for line in zip(*columns):
        print("  ".join(line).rstrip())


PREDICTED = ("T", "S", "limit_seconds", "bound", "library_seconds", "expected_seconds", "flops",
             "program_flops", "weight_bytes", "cache_bytes", "byte_seconds", "kernel_seconds")
COMPILED = ("compiler", "slice", "formula", "formula_bytes", "argument_bytes", "output_bytes",
            "alias_bytes", "temp_bytes", "peak_bytes", "memory_bytes", "fits", "message",
            "needed_bytes", "copies", "collectives", "sent", "counted", "cycle_seconds", "regions",
            "unestimated", "transfer_seconds", "hidden_transfer_seconds")
ROW = dict.fromkeys((*PREDICTED, *COMPILED, "measured_seconds", "mfu", "mbu", "tokens_per_second",
                     "operations"))  # what stages add to a row, each None where it does not apply


def say(text):
    """str -> None: progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------- this machine's ceilings


def seconds_of(call, seconds=0.3):
    """call -> list of float: seconds until each run's result is there: until `seconds` are spent,
    once at least and nine times at most."""
    times = []
    while len(times) < 9 and sum(times) <= seconds:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def seconds_alone(fn, arguments, seconds=0.1, choose=statistics.median):
    """fn, list of arguments -> seconds of a call. One program calls fn on each entry of the list;
    it runs for so many `seconds`, and `choose` takes one of its times: the median, as for a row."""
    program = partial(jax.jit(lambda arguments: [fn(*each) for each in arguments]), arguments)
    jax.block_until_ready(program())  # compiled
    return choose(seconds_of(program, seconds=seconds)) / len(arguments)


def measure_flops(dtype):
    """dtype -> flops/s of one large matmul, its best run. Weights are stored output x input. The
    numbers are random, since a chip that multiplies ones takes less power, and runs faster."""
    size = 2048 if on_cpu() else 8192
    a = jax.random.randint(jax.random.key(0), (size, size), -127, 128).astype(dtype)
    multiply = partial(product, sums="int32" if dtype == "int8" else "float32")
    return 2 * size ** 3 / seconds_alone(multiply, [(a, a)], 1, min)


def measure_read():
    """-> bytes/s of reading more than any cache holds, the best of two programs: half a GiB on a
    CPU; elsewhere 4 GiB four times in a row, beside which starting a program takes no time."""
    rows, times = (1 << 15, 1) if on_cpu() else (1 << 18, 4)
    a = jnp.ones((rows, 1 << 12), "float32")
    return a.nbytes / min(seconds_alone(jnp.sum, times * [(a,)], 0.3, min),
                          seconds_alone(jnp.matmul, times * [(a, a[0])], 0.3, min))


def ceilings(dtypes):
    """names -> dict: what this machine can do at best, the denominators of MFU and MBU; simulated
    devices share it."""
    flops = {dtype: measure_flops(dtype) for dtype in DTYPES if dtype in dtypes}
    return {"flops_per_second": flops, "read_bytes_per_second": measure_read()}


def sheet(chip, chips=1):
    """Chip, int -> dict: what so many chips should do, in the form of `ceilings`."""
    return {"flops_per_second": {dtype: chips * getattr(chip, dtype) for dtype in DTYPES},
            "read_bytes_per_second": chips * chip.read}


def machine():
    """-> dict: where figures come from."""
    return {"device": jax.devices()[0].device_kind, "count": jax.device_count(),
            "cores": os.cpu_count(), "jax": jax.__version__, "python": platform.python_version()}


# ------------------------------------------------------------------------------------------ predict


# A part of a step, bound by its flops or by its bytes; `dtype` is what its matmuls multiply.
Part = namedtuple("Part", "name flops bytes dtype")

# What one step takes, from shapes alone:
#     T       new tokens a row
#     S       slots a row that attention attends to
#     tokens  made or read, in all rows
#     flops   of the model: MFU counts no recomputation
#     parts   a tuple of Part, with what the program multiplies
Cost = namedtuple("Cost", "T S tokens flops parts")


def cost_of(job, T, S, flops, weight_bytes, cache_bytes, attention_dtype, *parts):
    """-> Cost: attention's flops go with `cache_bytes`, all others with `weight_bytes`, which each
    copy of the weights reads."""
    attention, total = flops["scores"] + flops["values"], sum(flops.values())
    return Cost(T, S, job.batch * T, total, (
        Part("weights", total - attention, job.copies * weight_bytes, job.matmul_dtype),
        Part("attention", attention, cache_bytes, attention_dtype), *parts))


def train_cost(job):
    """Job -> Cost: weights are read forwards, read backwards, and written as gradients: three times
    their bytes. AdamW reads p, m, v and the gradient and writes p, m and v: 28 bytes a parameter.
    What is saved between the passes is not predicted: it need not leave the chip."""
    cfg, B, T = job.cfg, job.batch, job.prompt
    size, count = jnp.dtype(cfg.dtype).itemsize, param_count(cfg)
    step = cost_of(job, T, T, train_flops(cfg, B, T, job.kept), 3 * size * count, 0, cfg.dtype,
                Part("optimizer", 0, 28 * count, "float32"))
    return step._replace(flops=sum(train_flops(cfg, B, T).values()))


def slots(job, S):
    """Job, int -> int: S, or where slots are split the next number that divides."""
    return S + -S % job.tensor[-1] if job.layout in ("sequence", "context") else S


def prefill_cost(job):
    """Job -> Cost: all weights once, and the cache written once."""
    cfg, B, T, S = job.cfg, job.batch, job.prompt, slots(job, job.prompt)
    return cost_of(job, T, S, prefill_flops(cfg, B, T), weight_bytes(cfg, job.dtype),
                kv_bytes(cfg, B, S, job.cache), cfg.dtype)


def extend_cost(job):
    """Job -> Cost: a decode step, or a round of speculation: the last token and a draft (n-grams
    cost nothing). All weights, and all slots of the cache, filled or not. A query meets the cache
    in the wider dtype of both."""
    plain, cfg, B = job.phase == "generate", job.cfg, job.batch
    T, S = (1, job.prompt + job.new) if plain else (job.n_draft + 1, job.most_slots)
    S = slots(job, S)
    moved = decode_bytes(cfg, B, S, T, cache_dtype=job.cache, dtype=job.dtype)
    return cost_of(job, T, S, decode_flops(cfg, B, S, T), moved["weights"],
                moved["cache_read"] + moved["cache_write"],
                str(jnp.promote_types(cfg.dtype, job.cache)))


def serve_steps(job):
    """Job -> list of (int, Job): a prefill for each request, and decode steps for B at a time."""
    return [(REQUESTS * job.batch, replace(job, phase="prefill", batch=1)),
            (REQUESTS * job.new, replace(job, phase="generate"))]


def serve_cost(job):
    """Job -> Cost: of all its steps."""
    parts = tuple(part._replace(flops=times * part.flops, bytes=times * part.bytes)
                  for times, step in serve_steps(job) for part in COSTS[step.phase](step).parts)
    return Cost(1, job.prompt + job.new, REQUESTS * job.batch * job.new,
                sum(part.flops for part in parts), parts)


COSTS = {"train": train_cost, "prefill": prefill_cost, "generate": extend_cost,
         "verify": extend_cost, "speculate": extend_cost, "serve": serve_cost}


def step_events(job):
    """Job -> dict: what each step of a tensor-parallel model sends: see `shard.step_comm`. Empty
    for a prompt that is split over its tokens, which has no closed form."""
    if job.phase == "prefill" and shard.LAYOUTS[job.layout].by_token:
        return {}
    return shard.step_comm(job.cfg, job.batch // job.copies, COSTS[job.phase](job).T, job.tensor,
                           job.layout, job.ring, job.phase == "prefill", job.sums)


def links_of(job):
    """Job -> bytes/s, tuple: of a chip's links, an axis; and the shape of the slice. A switch, and
    a number of chips that is no slice, have one axis."""
    shape = str(job.chips)
    if job.chip.startswith("tpu"):
        with suppress(ValueError):
            shape = slice_of(job.chip, job.chips)
    return chip_of(job.chip).link, tuple(map(int, shape.split("x")))


def layer_steps(job):
    """Job -> list of dict: what each device sends in each step of a tensor-parallel model, and the
    least time that its links take. Empty where nothing waits for links: in training gathers, and
    in a ring permutes, run beside matmuls."""
    if not (job.chip and job.layout) or job.ring:
        return []
    return shard.step_table(step_events(job), job.tensor, job.layout, *links_of(job))


# What good programs take of a chip: a fit to PUBLISHED, in the tests.
EXPECTED = {
    # seconds for each second that the data sheet gives
    "reading": 1.16,      # of weights, cache and optimizer: they reach 86% of its bandwidth
    "matmuls": 1.14,      # they reach 88% of its peak
    "links": 1.24,        # 81%
    "activations": 4.08,  # of reading each matmul's input and writing its output once: norms,
                          # gates, softmax and casts read and write them again
    # more seconds on a GPU
    "GPU, 8 bits": 0.214,    # for a second of matmuls with 8-bit weights: scales, and conversions
    "GPU, training": 0.433,  # for a second of matmuls: collectives run on the same cores
    # seconds a layer of inference
    "GPU, layer": 53.3e-6,    # kernels start and end
    "links, layer": 14.7e-6}  # collectives start and end, where a layer is on several chips


def terms(job, ceilings, tokens, parts):
    """Job, dict, int, parts -> dict: what each number of EXPECTED multiplies. Reading and matmuls
    follow one another: in the limit one of them hides the other."""
    cfg, gpu, train = job.cfg, job.chip in GPUS, job.phase == "train"
    matmuls, reading, links = (sum(part[f"{kind}_seconds"] for part in parts)
                               for kind in ("matmul", "byte", "link"))
    sizes = [size_of(letters, cfg) for name in jax.tree.leaves(dims(cfg).layers) if " " in name
             for letters in name.split()]
    activations = (1 + 2 * train) * tokens * sum(sizes) * jnp.dtype(cfg.dtype).itemsize
    layers = cfg.L * (not train)
    return dict(zip(EXPECTED, (
        reading, matmuls, links, activations / ceilings["read_bytes_per_second"],
        gpu * (job.dtype == "int8") * (parts[0]["matmul_seconds"] + parts[0]["byte_seconds"]),
        gpu * train * matmuls, gpu * layers, (job.chips > 1) * layers)))


def expected(terms):
    """dict -> seconds: of a good program."""
    return sum(EXPECTED[name] * term for name, term in terms.items())


def predict(job, ceilings, parameters=None):
    """Job, dict, number -> dict: the part of a row that is known before anything is compiled.

    The limit is the least seconds of a step: its parts follow one another, and each takes its
    flops' time or its bytes' time, whichever is longer. It is bound by what its longest part is
    bound by. Chips that are not here also wait for links, and `expected_seconds` are those of a
    good program. `parameters` replaces the exact count of what is multiplied.
    """
    cost, sizes, parts = COSTS[job.phase](job), Counter(), []

    def add(part, matmul, byte, link=0):
        sizes[part.name] += part.bytes
        seconds = {"flops": matmul, "bytes": byte, "links": link}
        bound = max(seconds, key=seconds.get)
        parts.append({**part._asdict(), "matmul_seconds": matmul, "byte_seconds": byte,
                      "link_seconds": link, "seconds": seconds[bound], "bound": bound})

    for part in cost.parts:
        if parameters and part.name == "weights":
            part = part._replace(flops=2 * cost.tokens * parameters,
                                 bytes=parameters * jnp.dtype(job.dtype).itemsize)
        add(part, part.flops / ceilings["flops_per_second"][part.dtype],
            part.bytes / ceilings["read_bytes_per_second"])
    if steps := layer_steps(job):
        size, seconds = (sum(step["times"] * step[key] for step in steps)
                         for key in ("bytes", "seconds"))
        add(Part("links", 0, job.chips * size, ""), 0, 0, seconds)
    row = {**cost._asdict(), "weight_bytes": sizes["weights"], "cache_bytes": sizes["attention"],
           "parts": parts, "limit_seconds": sum(part["seconds"] for part in parts),
           "bound": max(parts, key=lambda part: part["seconds"])["bound"],
           "byte_seconds": sum(part["byte_seconds"] for part in parts)}
    if job.attention != "plain":
        row["kernel_seconds"] = parts[1]["seconds"]
    if job.chip:
        row["terms"] = terms(job, ceilings, cost.tokens, parts)
        row["expected_seconds"] = expected(row["terms"])
    return row


def limits_of(jobs):
    """list of Job -> dict: what their figures are limits of, printed, too: of this machine as it is
    measured, or of a data sheet. ValueError for a chip that is not here, without its compiler."""
    name = jobs[0].chip
    if name:
        check_compiler(name)
        print(f"{name} ({CHIPS[name].source}): limits are the sheet's; cycles are its compiler's "
              "cost model, not a clock")
        return sheet(CHIPS[name], jobs[0].chips)
    limits = ceilings({part.dtype for job in jobs for part in COSTS[job.phase](job).parts})
    peaks = ", ".join(f"{dtype} {peak / GB:,.0f} GFLOP/s" for dtype, peak in
                      limits["flops_per_second"].items())
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}: {peaks};"
          f" reading {limits['read_bytes_per_second'] / GB:.1f} GB/s")
    return limits


def critical_batch(job, ceilings):
    """Job, dict -> float: rows at which a step's matmuls with the weights take as long as reading
    them."""
    peak, read = ceilings["flops_per_second"][job.matmul_dtype], ceilings["read_bytes_per_second"]
    return weight_bytes(job.cfg, job.dtype) / read * peak / (2 * multiplied(job.cfg))


# -------------------------------------------------- a command line's jobs, and what they may not be


def needed_bytes(job):
    """Job -> int: weights and cache; in training float32 masters, two means and a gradient."""
    cfg, train = job.cfg, job.phase == "train"
    wide = jnp.dtype(cfg.dtype).itemsize  # int8 weights are made from wide ones
    weights = param_count(cfg) * (wide + (job.dtype == "int8") + 16 * train)
    return weights + (0 if train else kv_bytes(cfg, job.batch, COSTS[job.phase](job).S, job.cache))


def check_memory(what, size, remedy):
    """str, bytes, str -> None: ValueError unless so much memory is free here."""
    free = free_memory()
    require(size <= free, f"{what} holds {size / GB:.1f} GB, {free / GB:.1f} GB are free: {remedy}")


def check(job):
    """Job -> None: ValueError, in one line, for what cannot be."""
    train, alone = job.phase == "train", job.by == "compiler"
    backend = TARGETS[job.chip].extra if job.chip in TARGETS else jax.default_backend()
    require(job.attention != "splash" or backend == "tpu" and job.phase in ("train", "prefill"),
            f"--attention splash is for train and prefill on a TPU, not for {job.phase} on a "
            f"{backend}")
    require(train or not alone, "--by compiler is for train")
    require(job.chip or job.chips == 1, f"--chips {job.chips}: of which --chip?")
    require(job.attention != "cudnn" or backend == "gpu" and not job.chip,
            "--attention cudnn is for a GPU that is here: JAX asks its cuDNN what it can do")
    require(job.attention == "plain" or not alone,
            f"--attention {job.attention}: by the compiler training has plain attention")
    require(not train or job.dtype != "int8",
            "train takes --dtype float32 or bfloat16: int8 has no gradient")
    require(job.phase != "serve" or not job.chip, "serve runs on the host: leave out --chip")
    require(job.flags == "off" or job.chip.startswith("tpu"),
            "--flags are a TPU compiler's: choose a --chip tpu-...")
    require(job.mesh or not (job.layout or job.ring or alone),
            "--layout, --ring and --by take several devices: --devices, or --chip and --chips")
    require(not job.keep or train and job.mesh and not alone,
            "--keep is for training on several devices by hand")
    require(not (train and job.layout), f"--layout {job.layout}: training has no cache to split")
    require(job.phase != "speculate" or job.mesh or job.chip or job.cfg.V >= 256,
            f"V={job.cfg.V}: a model that learns a sentence in bytes has V=256 or more")
    require(not job.int8 or job.dtype == "int8", f"--int8 {job.int8}: for --dtype int8")
    shard.check_kept(job.kept or ())
    if not job.chip:
        check_memory(f"{job.phase} of {job.model} in {job.dtype} at B={job.batch}",
                     needed_bytes(job) / (1 if on_cpu() else job.devices), "more --devices, or a "
                     "smaller --model, --batch, --prompt, --new or --dtype")


def default_jobs(quick):
    """bool -> list of Job: of the default run, or of the quick one, that fit the memory."""
    model = QUICK if quick else DEFAULT if on_cpu() else LARGE
    batches = [1, 8] if quick else [1, 8, 32] if on_cpu() else [1, 8, 64, 512]
    steps = [Job("train", batch=2, prompt=128),
             *(Job("prefill", batch=B, prompt=64) for B in batches[:2]),
             *(Job("generate", batch=B, prompt=252, new=4) for B in batches),
             Job("verify", prompt=240, new=16), Job("speculate", prompt=224),
             *(() if quick else [Job("serve", batch=4, prompt=32, new=8)])]
    kinds = [("float32", ""), ("bfloat16", ""), ("int8", ""), ("int8", "int8")]
    jobs = [settle(replace(job, model=model, dtype=dtype, cache=cache))
            for dtype, cache in kinds[:1 if quick else 4] for job in steps
            if job.phase == "generate" or not cache and (job.phase, dtype) != ("train", "int8")]
    most = 0.8 * free_memory()
    return [job for job in jobs if needed_bytes(job) <= most]


def jobs_of(args):
    """args -> list of Job: the product of what its options give."""
    if args.command == "all":
        return default_jobs(args.quick)
    values = {name: value for name, value in vars(args).items() if hasattr(Job, name)}
    values["phase"] = ["generate", "speculate"] if args.command == "speculate" and not args.chip \
        else args.command
    values["model"] = args.model or (SMALL if getattr(args, "text", None) else DEFAULT)
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    return [Job(**dict(zip(values, each))) for each in itertools.product(*lists)]


def one_job(args):
    """args -> Job: of a command that makes no rows. ValueError where an option has several values.
    """
    jobs = jobs_of(args)
    require(len(jobs) == 1, f"{args.command} takes one value of each option: {len(jobs)} jobs")
    return replace(jobs[0], phase="generate")


# --------------------------------------------------- library: this machine's operations, each alone


def gradients(fn, *operands):
    """fn, arrays -> tuple: the gradients of its operands. The result is used as its own gradient,
    so that XLA cannot drop the forward pass."""
    result, pull = jax.vjp(fn, *operands)
    return pull(result)


def some_numbers(shape, dtype):
    """tuple, dtype -> array: between -1 and 1, or any int8. NumPy makes it: nothing is compiled."""
    numbers = np.random.default_rng(0).integers(-127, 128, shape, "int8")
    return jnp.asarray(numbers if dtype == "int8" else numbers / np.float32(127), dtype)


@lru_cache
def matmul_rate(cfg, rows, kind="", train=False):
    """cfg, int, str, bool -> flops/s of so many rows times the weights of MLPs, in training with
    their gradients: of as many MLPs as 64 MB take, which is more than a processor's cache, but at
    most L."""
    inputs = {size: some_numbers((rows, size), cfg.dtype) for size in (cfg.E, cfg.F)}
    w = some_numbers((cfg.F, cfg.E), "int8" if kind else cfg.dtype)
    n = min(cfg.L, math.ceil(64e6 / (3 * w.nbytes)))
    weights = map(jnp.array, n * [w, w, w.T])  # copies
    operands = [(inputs[w.shape[1]], INT8[kind](w, jnp.full((len(w), 1), 1e-2)) if kind else w)
                for w in weights]
    seconds = seconds_alone(partial(gradients, dot) if train else dot, operands)
    return (2 + 4 * train) * rows * cfg.E * cfg.F / seconds


@lru_cache
def attention_seconds(cfg, B, T, S, cache, train=False):
    """cfg, int, int, int, dtype, bool -> seconds of a layer's attention: of a prompt where S is T,
    in training with its gradient, else to a cache."""
    q = some_numbers((B, T, cfg.H, cfg.D), cfg.dtype)
    if S == T:
        k = some_numbers((B, cfg.K, T, cfg.D), cfg.dtype)
        return seconds_alone(partial(gradients, causal_attention) if train else causal_attention,
                             [(q, k, k)])
    slots = init_cache(replace(cfg, L=min(cfg.L, 4)), B, S, cache)
    pos = np.full((B, T), S - 1)
    return seconds_alone(cached_attention, [(q, k, v, pos) for k, v in zip(slots.k, slots.v)])


@lru_cache
def optimizer_rate(cfg):
    """cfg -> parameters/s of AdamW."""
    p, m, v, gradient = ([abs(some_numbers((cfg.F, cfg.E), "float32"))] for _ in range(4))
    return cfg.F * cfg.E / seconds_alone(adamw, [(p, Adam(jnp.int32(1), m, v), gradient, 1e-3)])


def rows_at_a_time(job):
    """Job -> int or None: how many rows a prefill reads at once. On a CPU, for more than 2,048
    tokens: the largest divisor of B whose rows hold 1,024 to 2,048; else, and in other phases,
    None: all rows."""
    B, T = job.batch, job.prompt
    fit = (rows for rows in range(2, B) if B % rows == 0 and 1024 <= rows * T <= 2048 < B * T)
    return max(fit, default=None) if job.phase == "prefill" and job.here else None


def library_seconds(job):
    """Job -> list of float: seconds of each part of its step when it runs alone here: matmuls with
    weights, attention to a cache of its size, the optimizer, times how often each occurs."""
    if job.phase == "serve":
        return [times * seconds for times, step in serve_steps(job)
                for seconds in library_seconds(step)]
    cfg, cost, train = job.cfg, COSTS[job.phase](job), job.phase == "train"
    B = rows_at_a_time(job) or job.batch
    seconds = [cost.parts[0].flops / matmul_rate(cfg, B * cost.T, job.int8, train),
               cfg.L * (job.batch // B) * attention_seconds(
                   cfg, B, cost.T, cost.S, job.cache, train)]
    return seconds + [param_count(cfg) / optimizer_rate(cfg)] if train else seconds


def fastest_int8(job):
    """Job -> Job: with the kind of int8 weights whose matmul is faster here, if none is given."""
    if job.dtype != "int8" or job.int8:
        return job
    rows = (rows_at_a_time(job) or job.batch) * COSTS[job.phase](job).T
    return replace(job, int8=max(INT8, key=partial(matmul_rate, job.cfg, rows)))


# ------------------------------------------------------------------- plan: chips that are not here


def tensor_parallel(job, n):
    """Job, int -> Job: on n chips that share one copy of the weights."""
    job = replace(job, chips=n, mesh=mesh_text({"tensor": shard.over_heads(job.cfg, n)}))
    return replace(job, layout=(n > 1) * shard.layouts(job.cfg, job.batch, job.tensor)[0])


def on_chips(job, parameters=None):
    """Job, number -> dict: `predict` on its own chips."""
    return predict(job, sheet(chip_of(job.chip), job.chips), parameters)


def useful_degree(job, parameters):
    """Job, number -> int: the most chips, in powers of two, that can share the model, and whose
    links take no longer than their memory and matmuls do. More would wait for links."""
    n = 2
    while shard.degree(job.cfg, n) == n:
        row = on_chips(tensor_parallel(job, n), parameters)
        if row["parts"][-1]["seconds"] > row["limit_seconds"] / 2:
            break
        n *= 2
    return n // 2


def phase_facts(job, parameters, copies):
    """Job, number, int -> dict: a step of its phase on the chips of one copy of the weights, and
    the bytes of all copies. `hidden` is the time of a step whose matmuls hide its links."""
    row, chip, n = on_chips(job, parameters), chip_of(job.chip), job.chips
    parts, seconds = row["parts"], row["limit_seconds"]
    moved = row["weight_bytes"] + row["cache_bytes"]
    compute = sum(part["flops"] for part in parts) / (n * getattr(chip, job.matmul_dtype))
    hidden = min(parts[0]["seconds"], parts[-1]["seconds"]) * (n > 1)  # weights, and links
    facts = {"bytes": copies * moved, "seconds": seconds, "hidden_seconds": seconds - hidden,
             "expected_seconds": row["expected_seconds"], "parts": parts}
    for name in ("limit", "expected"):
        facts |= {f"{name}_mfu": compute / row[f"{name}_seconds"],
                  f"{name}_mbu": moved / (n * chip.read) / row[f"{name}_seconds"]}
    return {f"{job.phase}_{name}": value for name, value in facts.items()}


def napkin(job, parameters=None, batch=None):
    """Job, number, int -> dict: memory, batch and times, from the sheet alone. `parameters` is a
    rounded count in place of the exact one; job.prompt is the context, job.new is 0. Copies of the
    model that share no chips share the batch."""
    cfg, chip, chips = job.cfg, chip_of(job.chip), job.chips
    n = shard.degree(cfg, chips)
    copies = chips // n
    weights = parameters * jnp.dtype(job.dtype).itemsize if parameters else (
        weight_bytes(cfg, job.dtype) + (not cfg.tied) * array_bytes("VE", cfg, job.dtype))
    token, sequence = (kv_bytes(cfg, 1, S, job.cache) for S in (1, job.prompt))

    def most(chips, share=1):
        n = shard.degree(cfg, chips)
        return chips // n * max(0, int((share * n * chip.memory - weights) // sequence))

    room = most(chips, 1 - RESERVE)
    batch = batch or max(copies, room)
    rows = -(-batch // copies)  # of each copy

    def one_copy(phase, rows):
        return tensor_parallel(replace(job, phase=phase, batch=rows), n)

    facts = {
        "parameters": parameters or param_count(cfg),
        "multiplied_parameters": parameters or multiplied(cfg), "weight_bytes": weights,
        "cache_bytes_per_token": token, "cache_bytes_per_sequence": sequence,
        "chips_per_replica": n, "replicas": copies, "max_batch": most(chips),
        "batch_with_room": room, "critical_batch": critical_batch(job, sheet(chip)),
        "batch": batch, "cache_bytes": copies * rows * sequence, "fits": batch <= most(chips),
        "chips_needed": next((2 ** i for i in range(15) if batch <= most(2 ** i)), None)}
    for phase in ("prefill", "generate"):
        facts |= phase_facts(one_copy(phase, rows), parameters, copies)
    return facts | {
        "tokens_per_second": batch / facts["generate_seconds"],
        "expected_tokens_per_second": batch / facts["generate_expected_seconds"],
        "seconds_per_token_alone": on_chips(one_copy("generate", 1), parameters)["limit_seconds"],
        "first_token_seconds": on_chips(one_copy("prefill", 1), parameters)["limit_seconds"],
        "useful_degree": useful_degree(one_copy("generate", rows), parameters),
        "weights_over_memory_seconds": weights / n / chip.read,
        "weights_over_links_seconds": weights * (chips - 1) / chips / chip.link}


def million(job, weights):
    """Job, bytes -> list of dict: what the cache of a million tokens takes, and what makes it
    smaller."""
    cfg, chip, rows = job.cfg, chip_of(job.chip), {}
    for name, K, cache in (("as it is", cfg.K, job.cache), ("grouped queries, K=1", 1, job.cache),
                           ("int8", cfg.K, "int8"), ("both", 1, "int8")):
        size = kv_bytes(replace(cfg, K=K), 1, 1_000_000, cache)
        rows.setdefault(size, {
            "cache": name, "cache_bytes": size, "bytes_per_chip": size / job.chips,
            "chips_needed": math.ceil((size + weights) / chip.memory),
            "generate_seconds": (size + weights) / job.chips / chip.read})
    return [*rows.values()]


def training(job, tokens, mfu):
    """Job, float, float -> dict: a step of AdamW and a whole training, with weights sharded over
    all chips (FSDP)."""
    B, chips, chip, count = job.batch, job.chips, chip_of(job.chip), param_count(job.cfg)
    require(B % chips == 0, f"a training batch of {B} sequences cannot be split over {chips} chips:"
            f" --batch {-(-B // chips) * chips}")
    row = on_chips(replace(job, phase="train", mesh=f"data={chips}"))
    compute = row["flops"] / (chips * getattr(chip, job.dtype))
    sent = row["weight_bytes"] // chips * (chips - 1) / chips  # by each, of its own copy
    links = sent / chip.link
    return {"batch": B, "tokens_per_step": row["tokens"], "step_flops": row["flops"],
            "weight_flops": row["parts"][0]["flops"], "attention_flops": row["parts"][1]["flops"],
            "compute_seconds": compute, "expected_seconds": row["expected_seconds"],
            "assumed_mfu": mfu, "step_seconds": compute / mfu, "tokens": tokens,
            "days": tokens / row["tokens"] * compute / mfu / 86400, "optimizer_bytes": 12 * count,
            "gradient_bytes": 4 * count, "bytes_per_chip": 16 * count / chips,
            "fits": 16 * count <= chips * chip.memory, "fsdp_bytes_per_chip": sent,
            "fsdp_seconds": links, "communication_bound": links > compute}


def print_facts(columns):
    """dict of heading -> dict -> None: a line for each key whose value is no list."""
    first, *_ = columns.values()
    print_rows([{"figure": key.replace("_", " "), **{
        heading: cell(key, facts[key]) for heading, facts in columns.items()}}
        for key, value in first.items() if not isinstance(value, list)])


def plan(args):
    """args -> dict: prints the napkin of a model on chips that need not be here."""
    job = one_job(args)
    chip, chips, B = chip_of(job.chip), job.chips, job.batch
    job = replace(job, new=0, batch=B or 1, int8=job.int8 or "Q8" * (job.dtype == "int8"))
    check(job)
    trained = args.train and training(replace(  # refused before anything is printed
        job, batch=B or 4 * chips, dtype=job.cfg.dtype, int8=""), args.tokens, args.mfu)
    columns = {f"{args.parameters:g} parameters": napkin(job, args.parameters, B)} \
        if args.parameters else {}
    columns["exact"] = exact = napkin(job, None, B)
    rounded, *_ = columns.values()
    n, rows = exact["chips_per_replica"], -(-rounded["batch"] // exact["replicas"])
    steps = layer_steps(tensor_parallel(replace(job, batch=rows), n))
    remedies = million(job, rounded["weight_bytes"])
    print(f"{job.model} on {chips} x {job.chip}: {si(getattr(chip, job.matmul_dtype), 'FLOP/s')} "
          f"in {job.matmul_dtype}, {si(chip.read, 'B/s')}, {si(chip.memory, 'B')}, links "
          f"{si(chip.link, 'B/s')} an axis ({chip.axes})\n({chip.source})\n"
          f"weights {job.dtype}, cache {job.cache}, context {job.prompt}. Times are limits, which "
          "no program beats; expected: what good programs reach;\nhidden: the limit if matmuls hid "
          f"the links. Batch with room: {RESERVE:.0%} of the memory is left free")
    for name, facts in columns.items():
        if not facts["fits"]:
            print(f"DOES NOT FIT ({name}): batch {facts['batch']} takes more memory: "
                  + f"--chips {facts['chips_needed']}, or " * bool(facts["chips_needed"])
                  + "a smaller --batch, --prompt, --dtype or --cache")
    print_facts(columns)
    for title, table in (
            ("prefill", rounded["prefill_parts"]), ("decode step", rounded["generate_parts"]),
            (f"what each of {n} devices sends in a decode step at B={rows}", steps),
            (f"the cache at a million tokens, {1_000_000 / job.prompt:.0f} times as many, over "
             f"{chips} chips", remedies)):
        if table:
            print(f"\n{title}:")
            print_rows(table)
    result = vars(job) | rounded | dict(exact=exact, steps=steps, million=remedies)
    if trained:
        result["training"] = trained
        print("\ntraining, with weights sharded over all chips (FSDP):")
        print_facts({"by AdamW": trained})
    return result


# ---------------------------------------------------------------- published: what others measured


# PUBLISHED begins: what others measured. `seconds` of a step; of `prompt` tokens in each row, the
# slots that a decode step attends to on average. Where `made` is given, seconds are those of a
# whole run over the tokens that it made, so they hold a share of reading `read` tokens a row. Rows
# of fp8 are counted as int8 with int8 (its peak and bytes are alike). `keep` is the nearest to what
# the program saved. MaxText's own models have no gate: F is 2/3 of theirs, with as many flops.
PUBLISHED = [
    dict(system="gpt-fast (330 W)", seconds=0.0095329, phase="generate", model="llama-2-7b",
         chip="a100", chips=1, batch=1, prompt=205, dtype="bfloat16", cache="bfloat16",
         source="meta-pytorch/gpt-fast README.md @6ecad9b5b"),
    dict(system="gpt-fast (330 W)", seconds=0.0064276, phase="generate", model="llama-2-7b",
         chip="a100", chips=1, batch=1, prompt=205, dtype="int8", cache="bfloat16", int8="Q8",
         source="meta-pytorch/gpt-fast README.md @6ecad9b5b"),
    dict(system="gpt-fast (330 W)", seconds=0.0030448, phase="generate", model="llama-2-7b",
         chip="a100", chips=8, batch=1, prompt=205, dtype="bfloat16", cache="bfloat16",
         source="meta-pytorch/gpt-fast README.md @6ecad9b5b"),
    dict(system="gpt-fast (330 W)", seconds=0.010651, phase="generate", model="llama-3-8b",
         chip="a100", chips=1, batch=1, prompt=205, dtype="bfloat16", cache="bfloat16",
         source="meta-pytorch/gpt-fast README.md @6ecad9b5b"),
    dict(system="gpt-fast (330 W)", seconds=0.052274, phase="generate", model="llama-2-70b",
         chip="a100", chips=1, batch=1, prompt=205, dtype="int8", cache="bfloat16", int8="Q8",
         source="meta-pytorch/gpt-fast README.md @6ecad9b5b"),
    dict(system="gpt-fast (330 W)", seconds=0.064103, phase="generate", model="llama-3.1-405b",
         chip="a100", chips=8, batch=1, prompt=205, dtype="int8", cache="bfloat16", int8="Q8",
         source="meta-pytorch/gpt-fast README.md @6ecad9b5b"),
    dict(system="lmdeploy v0.1.0a1 TurboMind, fp16", seconds=0.015832, phase="generate",
         model="llama-2-7b", chip="a100", chips=1, batch=16, prompt=1152, dtype="bfloat16",
         cache="bfloat16", read=128, made=2048,
         source="InternLM/lmdeploy docs/en/benchmark/a100_fp16.md @3e391df46"),
    dict(system="lmdeploy v0.1.0a1 TurboMind, fp16", seconds=0.045984, phase="generate",
         model="llama-2-70b", chip="a100", chips=4, batch=64, prompt=1152, dtype="bfloat16",
         cache="bfloat16", read=128, made=2048,
         source="InternLM/lmdeploy docs/en/benchmark/a100_fp16.md @3e391df46"),
    dict(system="TensorRT-LLM v0.6.1, fp16", seconds=0.03112, phase="generate", model="llama-2-7b",
         chip="a100", chips=1, batch=60, prompt=1152, dtype="bfloat16", cache="bfloat16", read=128,
         made=2048,
         source="NVIDIA/TensorRT-LLM docs/source/performance.md @138f96d45"),
    dict(system="TensorRT-LLM v0.6.1, fp8", seconds=0.016427, phase="generate", model="llama-2-7b",
         chip="h100", chips=1, batch=112, prompt=1152, dtype="int8", cache="int8", int8="Q8A8",
         read=128, made=2048, fp8=True,
         source="NVIDIA/TensorRT-LLM docs/source/performance.md @138f96d45"),
    dict(system="TensorRT-LLM v0.7a, fp8", seconds=0.25243, phase="generate", model="llama-2-70b",
         chip="h200", chips=1, batch=960, prompt=192, dtype="int8", cache="int8", int8="Q8A8",
         read=128, made=128, fp8=True,
         source="NVIDIA/TensorRT-LLM docs/source/blogs/Falcon180B-H200.md @3c44cb974"),
    dict(system="PyTorch/XLA 2.1 nightly (2023-06)", seconds=0.0047, phase="generate",
         model="llama-2-7b", chip="tpu-v4", chips=4, batch=1, prompt=256, dtype="bfloat16",
         cache="bfloat16",
         source="pytorch/pytorch.github.io _posts/"
                "2023-06-28-path-achieve-low-inference-latency.md @14a982404"),
    dict(system="PyTorch/XLA 2.1 nightly (2023-06), Llama 65B", seconds=0.0145, phase="generate",
         model="L80,E8192,H64,K64,D128,F22016,V32000,untied", chip="tpu-v4", chips=16, batch=1,
         prompt=256, dtype="bfloat16", cache="bfloat16",
         source="pytorch/pytorch.github.io _posts/"
                "2023-06-28-path-achieve-low-inference-latency.md @14a982404"),
    dict(system="jax-llm-examples llama3, jax 0.6.0, TP 16", seconds=0.0062893, phase="generate",
         model="llama-3-70b", chip="tpu-v5e", chips=16, batch=8, prompt=2048, dtype="int8",
         cache="int8", int8="Q8",
         source="jax-ml/jax-llm-examples llama3/README.md @8b4b24602"),
    dict(system="jax-llm-examples llama3, jax 0.6.0, TP 16", seconds=0.025445, phase="generate",
         model="llama-3-70b", chip="tpu-v5e", chips=16, batch=128, prompt=2048, dtype="int8",
         cache="int8", int8="Q8",
         source="jax-ml/jax-llm-examples llama3/README.md @8b4b24602"),
    dict(system="TensorRT-LLM v0.5, fp16", seconds=0.133, phase="prefill", model="llama-2-7b",
         chip="a100", chips=1, batch=1, prompt=2048, dtype="bfloat16", cache="bfloat16",
         source="NVIDIA/TensorRT-LLM docs/source/performance.md @138f96d45"),
    dict(system="TensorRT-LLM v0.5, fp8", seconds=0.036, phase="prefill", model="llama-2-7b",
         chip="h100", chips=1, batch=1, prompt=2048, dtype="int8", cache="int8", int8="Q8A8",
         fp8=True,
         source="NVIDIA/TensorRT-LLM docs/source/performance.md @138f96d45"),
    dict(system="TensorRT-LLM v0.5, fp8", seconds=0.109, phase="prefill", model="llama-2-70b",
         chip="h100", chips=4, batch=1, prompt=2048, dtype="int8", cache="int8", int8="Q8A8",
         fp8=True,
         source="NVIDIA/TensorRT-LLM docs/source/performance.md @138f96d45"),
    dict(system="lmdeploy v0.1.0a1 TurboMind, fp16", seconds=0.242, phase="prefill",
         model="llama-2-13b", chip="a100", chips=1, batch=1, prompt=2048, dtype="bfloat16",
         cache="bfloat16",
         source="InternLM/lmdeploy docs/en/benchmark/a100_fp16.md @3e391df46"),
    dict(system="lmdeploy v0.1.0a1 TurboMind, fp16", seconds=0.401, phase="prefill",
         model="llama-2-70b", chip="a100", chips=4, batch=1, prompt=2048, dtype="bfloat16",
         cache="bfloat16",
         source="InternLM/lmdeploy docs/en/benchmark/a100_fp16.md @3e391df46"),
    dict(system="torchtitan FSDP2, selective op AC", seconds=2.7555, phase="train",
         model="llama-3-8b", chip="a100", chips=64, batch=64, prompt=8192, dtype="bfloat16",
         keep="attention,gate",
         source="pytorch/torchtitan docs/performance.md @041336434"),
    dict(system="torchtitan FSDP2, no AC", seconds=3.7891, phase="train", model="llama-2-13b",
         chip="a100", chips=64, batch=128, prompt=4096, dtype="bfloat16",
         source="pytorch/torchtitan docs/performance.md @041336434"),
    dict(system="torchtitan 2024-12 FSDP + compile, selective AC (an H100 of 2.4 TB/s)",
         seconds=2.4575, phase="train", model="llama-3-8b", chip="h100", chips=8, batch=16,
         prompt=8192, dtype="bfloat16", keep="attention,gate",
         source="pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md @b5bcd76c6"),
    dict(system="MaxText 2025-03 (JAX 0.5.1), A3 Ultra, FSDP", seconds=15.516, phase="train",
         model="llama-3-70b", chip="h200", chips=256, batch=512, prompt=8192, dtype="bfloat16",
         keep="attention,qkv",
         source="AI-Hypercomputer/gpu-recipes training/a3ultra/llama3-1-70b/"
                "maxtext-pretraining-gke/README.md @2e1fd5efb"),
    dict(system="Megatron-Bridge 25.11, FP8-CS, GBS 128", seconds=4.28, phase="train",
         model="llama-3-8b", chip="b200", chips=8, batch=128, prompt=8192, dtype="int8",
         int8="Q8A8", fp8=True,
         source="NVIDIA-NeMo/Megatron-Bridge docs/performance-summary-archive.md @067f987df"),
    dict(system="Megatron-Bridge 25.11, FP8-CS, GBS 128", seconds=9.0701, phase="train",
         model="llama-3-8b", chip="h100", chips=8, batch=128, prompt=8192, dtype="int8",
         int8="Q8A8", fp8=True,
         source="NVIDIA-NeMo/Megatron-Bridge docs/performance-summary-archive.md @067f987df"),
    dict(system="MaxText 22B", seconds=13.829, phase="train",
         model="L48,E6144,H24,K24,D256,F16384,V32768", chip="tpu-v4", chips=64, batch=1024,
         prompt=1024, dtype="bfloat16", keep="none",
         source="AI-Hypercomputer/maxtext src/maxtext/configs/tpu/v4/README.md @e591f30cb"),
    dict(system="MaxText 16B", seconds=10.658, phase="train",
         model="L32,E5120,H32,K32,D256,F21845,V32768", chip="tpu-v5e", chips=256, batch=1536,
         prompt=2048, dtype="bfloat16", keep="none",
         source="AI-Hypercomputer/maxtext src/maxtext/configs/tpu/v5e/README.md @e591f30cb"),
    dict(system="MaxText 32B", seconds=12.52, phase="train",
         model="L32,E10240,H32,K32,D256,F21845,V32768", chip="tpu-v5e", chips=256, batch=1024,
         prompt=2048, dtype="bfloat16", keep="none",
         source="AI-Hypercomputer/maxtext src/maxtext/configs/tpu/v5e/README.md @e591f30cb"),
    dict(system="MaxText, remat save_dot_except_mlpwi", seconds=23.676, phase="train",
         model="llama-2-70b", chip="tpu-v5p", chips=512, batch=2048, prompt=4096, dtype="bfloat16",
         keep="attention,qkv",
         source="AI-Hypercomputer/maxtext docs/reference/models/tiering.md @e591f30cb"),
    dict(system="MaxText tpu-recipes-v0.1.4 (JAX 0.6.1)", seconds=4.5465, phase="train",
         model="llama-3-8b", chip="tpu-v6e", chips=256, batch=1024, prompt=8192, dtype="bfloat16",
         keep="qkv",
         source="AI-Hypercomputer/tpu-recipes training/trillium/Llama3.1-8B-MaxText/v6e-256/"
                "README.md @c8cfe2f68")]
# PUBLISHED ends


def published_row(row):
    """dict of PUBLISHED -> dict: its limit, and `terms`, of all chips."""
    job = Job(**{name: value for name, value in row.items() if hasattr(Job, name)}, new=0)
    job = replace(job, mesh=f"data={job.chips}") if job.phase == "train" else tensor_parallel(
        job, job.chips)
    result = on_chips(job)
    if made := row.get("made"):
        read = on_chips(replace(job, phase="prefill", prompt=row["read"]))
        result["limit_seconds"] += read["limit_seconds"] / made
        for name, term in read["terms"].items():
            result["terms"][name] += term / made
    return result


def published(args):
    """args -> dict: prints what others measured beside its limit and what was expected."""
    rows, table = [], []
    for row in PUBLISHED:
        result, took = published_row(row), row["seconds"]
        limit, good = result["limit_seconds"], expected(result["terms"])
        rows.append({
            "phase": row["phase"], "model": row["model"].split(",")[0],
            "dtype": "fp8" if "fp8" in row else row["dtype"], "B": row["batch"],
            "chips": f"{row['chips']} x {row['chip']}", "limit_seconds": limit,
            "expected_seconds": good, "published_seconds": took, "published/limit": took / limit,
            "expected/published": good / took, "system": row["system"]})
    print_rows(rows)
    for phase in (*dict.fromkeys(row["phase"] for row in rows), "all"):
        some = [row for row in rows if phase in (row["phase"], "all")]
        errors = [abs(row["expected/published"] - 1) for row in some]
        table.append({
            "phase": phase, "rows": len(some),
            "published/limit": statistics.median(row["published/limit"] for row in some),
            "median error": f"{statistics.median(errors):.0%}",
            "worst error": f"{max(errors):.0%}"})
    print()
    print_rows(table)
    return {"rows": rows, "phases": table, "expected": EXPECTED}


# ------------------------------------------------------------------------------------------ program

train_jit = jax.jit(train_step, static_argnames="cfg", donate_argnames=("params", "adam"))
prefill_jit = jax.jit(prefill, static_argnames="cfg", donate_argnames="cache")


# Job.attention, where it is not plain: of a prompt, and to a cache
KERNELS = {"plain": {}, "splash": {"causal": splash}, "cudnn": {"causal": cudnn, "cached": cudnn}}


def where_of(job, mesh):
    """Job, Mesh or None -> where its functions run: here, or split as the job says."""
    if mesh and job.layout:
        return shard.Where(mesh, job.layout, job.ring, job.sums, **KERNELS[job.attention])
    return HERE._replace(**KERNELS[job.attention])


def for_job(fn, job, mesh, **how):
    """fn of infer, Job, Mesh or None -> fn: of this model, on one device or split."""
    return partial(fn, cfg=job.cfg, where=where_of(job, mesh), **how)


def train_program(job, mesh, _, state, tokens):
    """Job, Mesh, None, state, B(T+1) -> state, loss: a whole step of AdamW."""
    causal = where_of(job, mesh).causal
    own_loss = {
        "here": partial(loss, causal=causal), "compiler": partial(shard.fsdp_loss, mesh=mesh),
        "hand": partial(shard.sharded_loss, mesh=mesh, ring=job.ring, keep=job.kept, sums=job.sums,
                        causal=causal)}[job.by if mesh else "here"]
    *state, value = train_step(*state, tokens, job.cfg, 1e-4, own_loss)
    return tuple(state), value


def prefill_program(job, mesh, params, cache, tokens):
    """Job, Mesh, Params, Cache, BT -> Cache, logits: into a cache that is full then."""
    read = for_job(prefill, job, mesh, rows=None if mesh else rows_at_a_time(job))
    logits, cache = read(params, cache, tokens, jnp.full(job.batch, job.prompt))
    return cache, logits


def at_length(cache, length):
    """Cache, int -> Cache: every run starts there."""
    return cache._replace(length=jnp.full_like(cache.length, length))


def generate_program(job, mesh, params, state, _):
    """Job, Mesh, Params, state, None -> state, tokens: all new tokens in one scan, greedily."""
    cache, logits = state
    tokens, logits, cache = for_job(generate, job, mesh)(
        params, at_length(cache, job.prompt), logits, jax.random.key(0), job.new)
    return (cache, logits), tokens


def verify_program(job, mesh, params, cache, tokens):
    """Job, Mesh, Params, Cache, BT -> Cache, logits: the last token and n_draft more, all of which
    make logits."""
    x, cache = for_job(extend, job, mesh)(params, at_length(cache, job.prompt), tokens)
    return cache, where_of(job, mesh).unembed(params, x, job.cfg)


def speculate_program(job, mesh, params, cache, text):
    """Job, Mesh, Params, Cache, BS -> Cache, counts: rounds of n-grams and their verification. The
    last token of the prompt is read with the draft."""
    run = for_job(speculate, job, mesh, draft=ngram_draft, state=None, n_draft=job.n_draft)
    _, cache, _, counts = run(params, at_length(cache, job.prompt - 1), text, jax.random.key(0),
                              job.new)
    return cache, counts


def serve_program(job, mesh, params, _, prompts):
    """Job, Mesh, Params, None, prompts -> None, dict: REQUESTS for each of B rows."""
    run = for_job(serve, job, mesh, B=job.batch, S=job.prompt + job.new, n=job.new,
                key=jax.random.key(0), stride=min(STRIDE, job.new), cache_dtype=job.cache)
    return None, dict(run(params, np.asarray(prompts)))


PROGRAMS = {"train": train_program, "prefill": prefill_program, "generate": generate_program,
            "verify": verify_program, "speculate": speculate_program, "serve": serve_program}


def arguments(job, mesh, params, key):
    """Job, Mesh or None, Params, key -> what a step takes: parameters, what it updates, and what it
    reads. AdamW has float32 masters of its own; serving makes its own cache. All others have one of
    as many slots as a step attends to. All read random tokens, but generation starts from zero
    logits, and speculation after a prompt of SENTENCE."""
    cfg, B, cost, where = job.cfg, job.batch, COSTS[job.phase](job), where_of(job, mesh)

    def random_tokens(B, T):
        return jax.random.randint(key, (B, T), 0, cfg.V)

    if job.phase == "train":
        params = jax.tree.map(lambda w: jnp.array(w, jnp.float32), params)  # a copy
        params = shard.stack(params) if mesh and job.by == "hand" else params
        return None, (params, adam_init(params)), random_tokens(B, cost.T + 1)
    if job.phase == "serve":
        return params, None, random_tokens(REQUESTS * B, job.prompt)
    if job.phase == "speculate":
        prompt = jnp.tile(np.resize(byte_tokens(SENTENCE), job.prompt) % cfg.V, (B, 1))
        _, cache = prefill_jit(params, init_cache(cfg, B, cost.S, job.cache), prompt,
                               jnp.full(B, job.prompt), cfg)
        text = jnp.pad(prompt, ((0, 0), (0, job.most_slots - job.prompt)))
        return params, where.move(cache) if mesh else cache, text
    cache, logits = where.empty(cfg, B, cost.S, job.cache)
    if job.phase == "generate":
        return params, (cache, logits), None
    return params, cache, random_tokens(B, cost.T)


def outcome(job, result):
    """Job, result -> dict: how many steps a run was, and what else its row holds. A step of
    speculation is a round of all rows: the rows that are done wait for the others."""
    if job.phase == "train" and jax.process_index() == 0:  # the loss may live on one device
        return {"steps": 1, "loss": float(result)}
    if job.phase != "speculate":
        return {"steps": job.new if job.phase == "generate" else 1}
    counts = np.asarray(result)  # of rounds in which 0, 1, .. n_draft were accepted
    rounds, accepted = counts.sum(1), counts @ np.arange(job.n_draft + 1)
    mean = accepted.sum() / rounds.sum()
    return {"steps": int(rounds.max()), "tokens": float((rounds + accepted).sum() / rounds.max()),
            "acceptance": float(mean / job.n_draft), "tokens_per_round": float(1 + mean)}


def in_dtype(job, params):
    """Job, Params -> Params: cast to its dtype, or quantized to its kind of int8 weights."""
    if job.dtype == "int8":
        return quantize_params(params, job.cfg, INT8[job.int8])
    return params if params.embed.dtype == job.dtype else cast(params, job.dtype)


def draw(job, key):
    """Job, key -> Params: random ones."""
    return in_dtype(job, init(key, job.cfg, job.cfg.dtype))


def mesh_of(job, devices=None):
    """Job, devices -> Mesh or None: of these devices, or of those here."""
    return shard.make_mesh(devices, **job.axes) if job.mesh else None


def prepare(job, params=None, seed=0):
    """Job, Params or None, int -> namespace: its step and arguments: parameters, what it updates,
    and what it reads; made here, where they stay, or shapes of them for chips that are not here."""
    devices, facts = chip_devices(job.chip, job.chips) if job.chip else (None, {})
    mesh, key = mesh_of(job, devices), jax.random.key(seed)

    def make(key, params=None):
        return arguments(job, mesh, params or draw(job, key), key)

    if not (job.chip or mesh) or job.phase == "serve":
        args = make(key, params)
    else:
        where, shapes = where_of(job, mesh), jax.eval_shape(make, key)
        rules = where.rules if job.layout else {
            "hand": shard.TENSOR | shard.FSDP, "compiler": shard.FSDP}[job.by]
        shardings = shard.argument_shardings(shapes, job.cfg, mesh, rules, where) if mesh \
            else jax.sharding.SingleDeviceSharding(devices[0])
        placed = jax.jit(make, out_shardings=shardings)
        args = placed.eval_shape(key) if job.chip else placed(key)
    return SimpleNamespace(job=job, mesh=mesh, step=partial(PROGRAMS[job.phase], job, mesh),
                           args=args, facts=facts, ops=None)


def sent(job):
    """Job -> dict or None: what a step sends, by the closed forms: of FSDP's weights, or of tensor
    parallelism; None where there is no closed form."""
    if job.phase == "train":
        alone = math.prod(job.tensor) == job.axes.get("context", 1) == 1
        events = shard.fsdp_comm(job.cfg, shard.as_axes(job.axes["data"])) if alone else Counter()
    else:
        events = sum((shard.repeat(*step) for step in step_events(job).values()), Counter())
    return shard.tally(events) or None


def measure(prepared, step):
    """namespace, compiled step -> dict: seconds of a step, and what came of it."""
    def call():
        params, state, inputs = prepared.args
        state, result = jax.block_until_ready(step(params, state, inputs))
        prepared.args = params, state, inputs
        return result

    prepared.call = call
    facts = outcome(prepared.job, call())
    # several processes must make as many runs each: one
    times = seconds_of(call, seconds=0.3 if jax.process_count() == 1 else 0)
    return facts | {"measured_seconds": statistics.median(times) / facts["steps"],
                    "runs": len(times)}


def shares(row, seconds, ceilings, name):
    """dict, seconds, dict, str -> dict: MFU and MBU, as shares of what is possible. A few percent
    above a measured ceiling are 1; more is None, an error."""
    done = {"mfu": row["flops"] / ceilings["flops_per_second"][name],
            "mbu": (row["weight_bytes"] + row["cache_bytes"]) / ceilings["read_bytes_per_second"]}
    return {"tokens_per_second": row["tokens"] / seconds, **{
        key: min(1, least / seconds) if least <= 1.05 * seconds else None
        for key, least in done.items()}}


# ---------------------------------------------------------------------------------- compiled text


REGIONS = ("embed", "qkv", "attention", "out", "mlp", "unembed", "sample", "loss", "cast",
           "optimizer")  # that the model's functions name: jax.named_scope
OPERATION = r" +(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<opcode>[a-z][\w-]*)\((?P<rest>.*)"
CALLED = r"(?:body|calls|to_apply|true_computation|branch_computations)=\{?%([\w.-]+)"
WRAPPERS = {"tuple", "get-tuple-element", "parameter", "constant", "while", "call", "conditional"}
UNSEEN = {"bitcast", "after-all", "partition-id", "copy-done", "slice-done", "opt-barrier",
          *WRAPPERS}  # take no time
MOVES = {"copy", "transpose", "bitcast", "slice", "concatenate", "reshape", "broadcast", "pad",
         "dynamic-slice", "copy-start", "copy-done", *WRAPPERS}


@lru_cache(1 << 14)
def arrays(shape):
    """str -> list of (bytes, in HBM): of `bf16[110,4,2048,256]{3,1,2,0:T(4,128)(2,1)S(1)}`, or of a
    tuple of such. S(1) and so on are a core's own memory."""
    return [(math.prod(map(int, re.findall(r"\d+", sizes))) * int(bits or 8) // 8,
             not re.search(r"S\([1-9]", layout)) for bits, sizes, layout in re.findall(
                 r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?", shape)]


def first_group(pattern, line):
    """str, str -> str: what the pattern's group matches, or nothing."""
    return next(iter(re.findall(pattern, line)), "")


@lru_cache(maxsize=1)
def parse_program(text):
    """str -> list: the operations of what runs first, in the order of its schedule. An operation
    runs the operations of its `body` `trips` times; `contents` is itself, or what a fusion holds;
    `users` are what takes its result."""
    ops, computations, computation = {}, {}, []
    for line in text.splitlines():
        if match := re.match(OPERATION, line):
            op = SimpleNamespace(**match.groupdict(), line=line, users=[])
            op.operands = [ops[word] for word in re.findall(
                r"%([\w.-]+)", op.rest.split("), ")[0]) if word in ops]
            op.calls = first_group(CALLED, line)
            op.body = computations.get(op.calls, [])
            limits = re.findall(r'known_trip_count":\{"n":"(\d+)"', line) or [
                limit for other in computations.get(first_group(r"condition=%([\w.-]+)", line), ())
                for limit in re.findall(r"s32\[\]\S* constant\((\d+)\)", other.line)]
            op.trips = int(limits[0]) if len(limits) == 1 else 1
            op.kind = re.sub("collective-|-(start|done)$", "", op.opcode).replace("-", "_")
            *_, op.source = path = re.split(r"[/()]+", first_group(r'op_name="([^"]*)"', line))
            op.region = next((word for word in reversed(path) if word in REGIONS), None)
            op.contents = op.operands[0].contents if op.opcode == "call-update" else [
                each for inner in op.body for each in inner.contents] if op.opcode in (
                    "fusion", "async-start", "call-start") else [op]
            ops[op.name] = op
            computation.append(op)
            for operand in op.operands:
                operand.users.append(op)
        elif header := re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line):
            computation = computations[header[1]] = []
    return computation


def origin(op):
    """operation -> dict: region and source, its own; or of what is nearest, first of what uses it:
    compilers drop the names of some operations that they make."""
    ahead = [op]
    for near in itertools.islice(ahead, 200):  # it grows
        for each in (near, *near.contents):
            if each.region:
                return dict(region=each.region, source=each.source)
        names = {each.name for each in ahead}
        ahead += [each for each in near.users + near.operands
                  if each.opcode not in WRAPPERS and each.name not in names]
    return dict(region=None, source="")


def kind_of(op):
    """operation -> str: product, copy or elementwise."""
    opcodes = {inner.opcode for inner in op.contents}
    if opcodes & {"dot", "convolution"} or re.search(r'target="[^"]*(gemm|matmul|dot)', op.line):
        return "product"
    return "copy" if opcodes <= MOVES else "elementwise"


def group_size(line, devices):
    """str, int -> int: devices that a collective is among, of so many."""
    if sizes := first_group(r"groups=\[\d+,(\d+)\]", line):
        return int(sizes)
    if axes := first_group(r"groups=@?mesh\[.*?\] ?\{(.*?)\}", line):
        return math.prod(int(first_group(rf"{axis}=(\d+)", line)) for axis in axes.split(","))
    group = re.search(r"(?:groups|pairs)=\{\{?([\d,]*)\}", line)
    require(group, f"a collective among unknown devices: {line.strip()[:200]}")
    return len(re.findall(r"\d+", group[1])) or devices


def transfer(op, devices):
    """operation, int -> str, key, dict: what it has to do with a collective: its stage, start,
    update or done, if it is asynchronous; what its stages have in common; and what `operations`
    says of it. On a TPU a collective may hide in a fusion: a scatter as an all-reduce of which a
    part is kept; a gather in what starts it, in each matmul beside it, and in what ends it."""
    first = op.operands[0] if op.opcode.endswith("-done") else op
    inner = next((inner for inner in first.contents if inner.kind in shard.SENT), None)
    named = first_group("-(start|update|done)$", op.opcode)
    stage = named or first_group("AsyncCollective(Start|Done)", " ".join(
        each.line for each in first.contents)).lower()
    if inner is None or not stage and "async_collective" in op.calls:
        cycles = first_group(r'"estimated_cycles":"(\d{1,12})"', op.line)  # longer where unknown
        return "", None, dict(kind=kind_of(op), cycles=int(cycles or 0), number=0, sent=0, n=0)
    given = [sum(size for size, _ in arrays(each.shape)) for each in op.operands
             if each.opcode != "call-start"]
    kind = "reduce_scatter" if "all-reduce-scatter" in op.calls else inner.kind
    n = group_size(inner.line, devices)
    key = first.name if named else tuple(re.findall(r"channel_id=\d+", inner.line))
    return stage, key, dict(kind=kind, cycles=0, number=sum(map(bool, given)),
                            sent=shard.SENT[kind](sum(given), n), n=n)


def operations(text, job=None):
    """str, Job -> list of namespace: the operations of a compiled program, in the order of its
    schedule; `times` is how often a step runs one, 0 where it stands around the loop of steps. A
    collective is asynchronous where anything else stands between its `start`, a place in this list,
    and `done`."""
    entry, ops = parse_program(text), []
    devices = int(first_group(r"num_partitions=(\d+)", text) or 1)
    loops = [op for op in entry if op.opcode == "while" and job and job.phase in (
        "generate", "speculate")]
    steps = max(loops, key=lambda op: len(op.body), default=None)

    def walk(computation, times):
        started = {}
        for op in computation:
            if op.opcode in WRAPPERS:  # a loop, a call, a branch: others have no body
                walk(op.body, 1 if op is steps else times * op.trips)
            # a call may wait for call-update, with its data
            if op.opcode in UNSEEN or op.opcode == "call-start" and op.shape.startswith("((), "):
                continue
            stage, key, facts = transfer(op, devices)
            if stage == "done":
                if start := started.get(key):
                    start.done, start.asynchronous = len(ops), any(
                        not other.number for other in ops[start.start + 1:])
                continue
            reads = [size for each in op.operands for size, hbm in arrays(each.shape) if hbm]
            ops.append(SimpleNamespace(
                name=op.name, shape=op.shape, **origin(op), times=times, loop=id(computation),
                reads=max(reads, default=0), **facts, asynchronous=False, start=len(ops),
                done=len(ops) + 1))
            if stage:
                started[key] = ops[-1]

    walk(entry, 0 if steps else 1)
    return ops


def collectives(ops):
    """list of operations -> dict: of a step, by kind: number, bytes sent, how many are
    asynchronous."""
    sums = {}
    for op in ops:
        if number := op.number * op.times:
            sums.setdefault(op.kind, Counter()).update(
                number=number, bytes=op.sent * op.times, asynchronous=number * op.asynchronous)
    return sums


def copied_bytes(ops, text):
    """list of operations, str -> int: bytes that a step copies, from memory to memory, of arrays as
    large as one of the program's arguments of two dimensions or more: a weight or a cache."""
    sizes = {arrays(op.shape)[0] for op in parse_program(text)
             if op.opcode == "parameter" and re.search(r"\d,\d", op.shape)}
    return sum(copied[0] * op.times for op in ops if op.kind == "copy"
               for copied in arrays(op.shape)[:1] if copied in sizes and op.reads >= copied[0])


def by_cycles(ops, job):
    """list of operations, Job -> dict: of a step on a TPU: the compiler's cycles as seconds, by
    region; seconds of collectives over the sheet's links, of those that wait and of those that are
    asynchronous; and the operations. They are estimates, and no sum of them is a time."""
    target, regions, waits = TARGETS[job.chip], Counter(), Counter()
    link, shape = links_of(job)
    for op in ops:
        op.seconds = op.cycles / target.clock
        if op.number:
            op.seconds = shard.link_seconds(op.kind, op.sent, op.n, link / target.devices,
                                            (*shape, target.devices))
            waits[op.asynchronous] += op.times * op.seconds
        elif op.cycles * op.times:
            regions[op.region or "?"] += op.times * op.seconds
    return {"cycle_seconds": sum(regions.values()), "regions": dict(regions.most_common()),
            "transfer_seconds": waits[False], "hidden_transfer_seconds": waits[True],
            "unestimated": sum(op.times for op in ops if not (
                op.number or op.cycles or "-start" in op.name)),
            "operations": [vars(op) for op in ops if op.times]}


def inspect(prepared, traced=False):
    """namespace, bool -> Compiled or None, dict: of a prepared job: what its compiled program says.
    When it is traced, it has no GPU command buffers: a trace cannot tell apart kernels that start
    together."""
    job, step, args = prepared.job, prepared.step, prepared.args
    on_tpu, by_hand = job.chip.startswith("tpu"), prepared.mesh and job.by == "hand"
    # libtpu fuses gathers with matmuls on v5e alone: others' were wrong
    flags = [flag for flag in FLAGS if job.chip == "tpu-v5e" or "fuse_all_gather" not in flag]
    options = dict.fromkeys(flags, "true") if job.flags == "on" else {}
    if traced and jax.default_backend() == "gpu":
        options = {"xla_gpu_enable_command_buffer": ""}
    compiled, refusal = compiled_with(jax.jit(step, donate_argnums=1).lower(*args), options)
    sizes = shard.device_bytes(args)
    facts = {"formula": sizes, "formula_bytes": sum(sizes.values()), "fits": False,
             **prepared.facts, **refusal}
    if compiled is None:
        return None, facts
    memory, text = compiled.memory_analysis(), compiled.as_text()
    facts |= {f"{name}_bytes": getattr(memory, f"{name}_size_in_bytes")
              for name in ("argument", "output", "alias", "temp")}
    facts["peak_bytes"] = (memory.argument_size_in_bytes + memory.output_size_in_bytes
                           + memory.temp_size_in_bytes - memory.alias_size_in_bytes)
    most = facts.get("memory_bytes") or free_memory()
    facts["fits"] = on_tpu or facts["peak_bytes"] <= most
    steps = job.new if job.phase == "generate" else 1
    with suppress(ValueError):  # a loop of unknown length
        facts["program_flops"] = traced_flops(step, *args) // steps * (
            prepared.mesh.size if by_hand else 1)
    if by_hand and job.phase != "speculate":
        facts["sent"] = sent(job)
        facts["counted"] = {kind: (number // steps, size // steps) for kind, (number, size) in
                            shard.traced_comm(step, *args).items()}
    ops = prepared.ops = operations(text, job)
    facts |= {"collectives": collectives(ops), "copies": copied_bytes(ops, text)}
    return compiled, facts | (by_cycles(ops, job) if on_tpu else {})


# ------------------------------------------------------------------------------------------ profile


def profile(prepared, folder=None):
    """namespace, path -> dict: operations by time, and shares of regions, of the time that all
    took, which on a CPU overlap; "idle" is the share of the wall time when none ran. Leaves a trace
    in the folder that Perfetto and XProf show."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(folder or temporary)
        with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
            wall, = seconds_of(prepared.call, seconds=0)
        file = max(Path(folder).glob("**/*.xplane.pb"), key=os.path.getmtime)
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
    spans, places = [], {op.name: (op.region or "?", op.kind, op.source) for op in prepared.ops}
    for row in itertools.chain.from_iterable(plane.lines for plane in planes):
        for event in row.events:
            on_tpu = event.name.split(" = ")[0].lstrip("%") if row.name == "XLA Ops" else ""
            name = dict(event.stats).get("hlo_op", on_tpu)
            if name in places:
                spans.append((event.start_ns / 1e9, event.end_ns / 1e9, places[name]))
    took, times, regions, busy, until = Counter(), Counter(), Counter(), 0, 0
    for start, end, place in sorted(spans):
        took[place] += end - start
        times[place] += 1
        regions[place[0]] += end - start
        busy += max(0, end - max(start, until))
        until = max(until, end)
    total = took.total() or 1
    return {"operations": [
        dict(zip(("region", "kind", "source"), place), share=seconds / total, times=times[place])
        for place, seconds in took.most_common()],
        "regions": {region: seconds / total for region, seconds in regions.most_common()},
        "idle": max(0, 1 - busy / wall)}


def name_of(row):
    """row -> str: what tells it apart."""
    return (f"{row['phase']} {row['int8'] or row['dtype']}"
            + " int8 cache" * (row["cache"] == "int8") + f" B={row['batch']}"
            + "".join(f" {key}={row[key]}" for key in ("kv_heads", "ring") if row[key]))


def explain(rows):
    """list of rows -> None: prints how far limit, library and measurement differ, why where it is
    most, and what cannot be."""
    print(f"\nof {len(rows)} rows:" if len(rows) > 1 else "")
    for above, below in (("measured", "library"), ("library", "limit"), ("measured", "limit")):
        title = f"{above}/{below}".replace("measured", "took")
        ratios = sorted((row[f"{above}_seconds"] / row[f"{below}_seconds"], name_of(row))
                        for row in rows if row[f"{above}_seconds"] and row[f"{below}_seconds"])
        if len(ratios) > 1:
            print(f"  {title:13} median {statistics.median(ratio for ratio, _ in ratios):.2f}, "
                  + " to ".join(f"{ratio:.2f} ({name})" for ratio, name in (ratios[0], ratios[-1])))
            if title == "took/library":
                error = statistics.median(abs(ratio - 1) for ratio, _ in ratios)
                print(f"{'':16}median of |took/library - 1| {error:.0%}")
    for row in rows:
        name = name_of(row)
        if None in (row["mfu"], row["mbu"]):
            print(f"error: {name}: faster than a ceiling: it was measured too low (was another "
                  "program running?), or what is read stays in a cache (choose a larger model)")
        if row["phase"] == "speculate":
            plain = [r for r in rows if r["phase"] == "generate" and all(
                r[key] == row[key] for key in ("model", "kv_heads", "dtype", "cache", "batch"))]
            print(f"{name}: {row['acceptance']:.0%} of {row['n_draft']} proposals accepted, "
                  f"{row['tokens_per_round']:.2f} tokens a round" + "".join(
                      f", {row['tokens_per_second'] / r['tokens_per_second']:.2f} times the speed "
                      f"of generate with {r['S']} slots" for r in plain))
        if profile := row.get("profile"):
            alone = {part["name"]: part["library_seconds"] for part in row["parts"]
                     if "library_seconds" in part}
            print(f"{name} takes {si(row['measured_seconds'], 's')}, for the profile again "
                  f"{si(profile['measured_seconds'], 's')}; alone its parts take: "
                  f"{cell('seconds', alone) or '-'}. Of the time of all operations "
                  f"{cell('share', profile['regions'])}; no operation runs for "
                  f"{profile['idle']:.0%}")
            for op in profile["operations"][:3]:
                print("  {share:6.1%} x{times:<5} {region:10} {kind:12} {source}".format(**op))


# ---------------------------------------------------------------------------------------- real text


def recite(params, cfg, prompt, new, seed, sampling=Sampling()):
    """Params, cfg, T, int, int -> str: how a model of bytes goes on, as a server's one request."""
    (_, tokens), = serve(params, [prompt], 1, len(prompt) + new, new, jax.random.key(seed), cfg,
                         sampling)
    return byte_text(tokens)


def train_steps(job, params, adam, text, steps, lr, seed):
    """Job, Params, Adam, bytes, int, float, int -> iterator of Params, Adam, loss, seconds:
    training on random windows of a text, after those that `adam` has seen."""
    B, T, began = job.batch, job.prompt, int(adam.step)
    windows = np.random.default_rng(seed).integers(0, len(text) - T, (began + steps, B, 1))
    step = train_jit.lower(params, adam, np.zeros((B, T + 1), "int32"), job.cfg, lr).compile()
    for i, window in enumerate(windows[began:], began + 1):
        tokens, start = text[window + np.arange(T + 1)], time.perf_counter()
        params, adam, value = step(params, adam, tokens, lr * min(1, i / 20))
        yield params, adam, float(value), time.perf_counter() - start


@lru_cache(maxsize=1)
def learn(job, seed, most=200):
    """Job, int -> Params: float32, trained on SENTENCE until the model recites it. ValueError where
    it does not."""
    job = replace(job, dtype="float32", batch=1, prompt=2 * len(SENTENCE))
    cfg, text = job.cfg, byte_tokens(8 * SENTENCE)
    say(f"learning {SENTENCE!r} ...")
    params = init(jax.random.key(seed), cfg)
    steps = train_steps(job, params, adam_init(params), text, most, 1 / cfg.E, seed)
    for i, (params, _, value, _) in enumerate(steps, 1):
        if value < 0.2 and i % 5 == 0 or i == most:
            words = recite(params, cfg, text[:22], len(SENTENCE), seed)
            if words == (2 * SENTENCE)[22:22 + len(SENTENCE)]:
                return params
    raise ValueError(f"trained on {SENTENCE!r} to {value:.3f} nats a byte, the model goes on "
                     f"{words!r}: figures of a wrong program are void")


def read_text(path, T):
    """path, int -> bytes as int32, the first nine tenths and the last. ValueError where there are
    too few bytes."""
    text = np.fromfile(path, "uint8").astype("int32")
    held_out = len(text) // 10
    require(held_out >= 2 and len(text) - held_out > T, f"text file {path} has {len(text)} bytes: "
            f"training on {T} at a time takes {max(20, T * 10 // 9 + 1)} or more; a smaller "
            "--prompt takes less")
    return np.split(text, [-held_out])


def held_out_loss(params, cfg, text, T):
    """Params, cfg, bytes, int -> mean nats a byte, in windows of T, the last one shorter."""
    nats = jax.jit(lambda params, tokens: loss(cast(params, cfg.dtype), tokens, cfg))
    windows = [text[None, start:start + T + 1] for start in range(0, len(text) - 1, T)]
    return sum(float(nats(params, window)) * (window.size - 1) for window in windows) / (
        len(text) - 1)


def train_text(args, job, params, adam, ceilings, text, held_out):
    """args, Job, Params, Adam, dict, bytes, bytes -> row, Params, Adam: trains on a text, and
    measures each step."""
    cfg, T, times = job.cfg, job.prompt, []
    row = ROW | asdict(job) | predict(job, ceilings) | {
        "parameters": param_count(cfg), "cache_bytes_per_token": kv_bytes(cfg, 1, 1, job.cache),
        "loss_before": held_out_loss(params, cfg, held_out, T)}
    with suppress(KeyboardInterrupt):
        for params, adam, value, seconds in train_steps(
                job, params, adam, text, args.steps, args.lr, args.seed):
            times.append(seconds)
            if len(times) % 10 == 1 or len(times) == args.steps:
                say(f"step {len(times)}/{args.steps}: {value:.3f} nats a byte, "
                    f"{row['tokens'] / seconds:.0f} tokens/s")
    require(times, "interrupted before the first step was made")
    seconds = statistics.median(times[1:] or times)  # the first fetches all memory
    row |= {"loss_after": held_out_loss(params, cfg, held_out, T), "steps": len(times),
            "measured_seconds": seconds, **shares(row, seconds, ceilings, job.matmul_dtype)}
    print(f"K={cfg.K}: held-out loss: {row['loss_before']:.3f} nats a byte before, "
          f"{row['loss_after']:.3f} after {len(times)} steps of {si(seconds, 's')}; MFU "
          f"{cell('mfu', row['mfu'])}, {row['parameters']} parameters, cache "
          f"{row['cache_bytes_per_token']} bytes a token")
    return row, params, adam


def train_on_text(args, jobs):
    """args, list of Job -> dict: trains once for each job, saves the model, and continues the text
    that is held out. ValueError before anything is measured."""
    job, rows = jobs[0], []
    text, held_out = read_text(args.text, job.prompt)
    values = vars(args) | vars(job) | {
        "text": hashlib.sha256(Path(args.text).read_bytes()).hexdigest()}
    settings = {name: values[name] for name in ("text", "batch", "prompt", "dtype", "lr", "seed")}
    require(not (args.save or args.resume) or len(jobs) == 1 and not (args.resume and job.kv_heads),
            "--save and --resume take one model: one of each option, and the saved number of heads")
    if args.resume:
        cfg, params, adam = load_state(args.resume)
        require(not args.model or replace(job.cfg, dtype=cfg.dtype) == cfg, f"--model {job.model} "
                f"is not the model in --resume {args.resume}: leave it out")
        for name, value in read_json(Path(args.resume) / "run.json").items():
            require(value == settings[name], f"--resume {args.resume} was trained with --{name} "
                    f"{value}, not {settings[name]}: the two would not be one longer run")
        MODELS[args.resume] = cfg
        jobs = [job] = [replace(job, model=args.resume)]
    require(job.cfg.V == 256, f"V={job.cfg.V}: a model of bytes has V=256")
    if args.save:
        library()
        Path(args.save).mkdir(parents=True, exist_ok=True)
    limits = limits_of(jobs)
    for job in jobs:
        if not args.resume:
            params = init(jax.random.key(args.seed), job.cfg)
            adam = adam_init(params)
        row, params, adam = train_text(args, job, params, adam, limits, text, held_out)
        rows.append(row)
    if args.save:
        Path(args.save, "run.json").write_text(json.dumps(settings))
        save_state(args.save, job.cfg, params, adam)
        save(args.save, job.cfg, params)
        say(f"saved to {args.save}")
    prompt, params = held_out[:min(job.prompt, 64)], cast(params, job.cfg.dtype)
    words = recite(params, job.cfg, prompt, job.new, args.seed, Sampling(0.5))
    print(f"{byte_text(prompt)!r} goes on {words!r}")
    return {"machine": machine(), "ceilings": limits, "rows": rows, "continuation": words}


def load_split(job):
    """Job -> Job, Params: of the model in the folder job.model, in its dtype or the file's own. Of
    several devices each reads its own part alone."""
    def job_of(cfg):
        MODELS[job.model] = cfg
        return settle(replace(job, dtype=job.dtype or cfg.dtype))

    def shardings(cfg):
        split_job = job_of(cfg)
        mesh = mesh_of(split_job)
        return mesh and shard.shardings(cfg, mesh, where_of(split_job, mesh).rules)

    cfg, params = load(job.model, shardings=shardings)
    job = fastest_int8(job_of(cfg))
    params, mesh = in_dtype(job, params), mesh_of(job)
    return job, where_of(job, mesh).place(params, job.cfg) if mesh else params


def generating(args, job, params, prompt, sampling, end):
    """-> iterator of (tokens, dict): reads a prompt, then gives all tokens made so far, and how
    fast they came. What is known of the next token is `latest`: its logits; with a draft, the text,
    whose last token the cache lacks. A draft is n-grams, or a smaller model from a folder, of which
    every device has all."""
    T, mesh, key = prompt.shape[1], mesh_of(job), jax.random.key(args.seed)
    S = slots(job, T + job.new + STRIDE + job.n_draft + 1)
    check_memory(f"a cache of {S} slots", kv_bytes(job.cfg, 1, S, job.cache), "a smaller --new")
    lengths, tokens, rounds = np.array([T]), [], 0
    propose, state = ngram_draft, {"state": None} if args.draft else {}
    if args.draft not in (None, "ngram"):
        small, weights = load_split(replace(one_job(args), model=args.draft, devices=1))
        require(small.cfg.V == job.cfg.V, f"draft {args.draft} has V={small.cfg.V}, and the model "
                f"V={job.cfg.V}: they must share a tokenizer")
        _, draft_cache = prefill_jit(weights, init_cache(small.cfg, 1, S, job.cache), prompt,
                                     lengths, small.cfg)
        propose, state["state"] = model_draft(small.cfg, sampling), jax.device_put(
            (weights, draft_cache), jax.NamedSharding(mesh, jax.P()) if mesh else None)
    cache, _ = where_of(job, mesh).empty(job.cfg, 1, S, job.cache)
    arguments = params, cache, prompt, lengths
    read = jax.jit(for_job(prefill, job, mesh), donate_argnums=1).lower(*arguments).compile()
    start = time.perf_counter()
    latest, cache = jax.block_until_ready(read(*arguments))
    speed = {"prompt": T, "dtype": job.dtype, "cache": job.cache,
             "prefill_seconds": time.perf_counter() - start}
    step = for_job(generate, job, mesh)
    if args.draft:
        step = for_job(speculate, job, mesh, draft=propose, n_draft=job.n_draft)
        cache = cache._replace(length=cache.length - 1)
        latest = jnp.pad(prompt, ((0, 0), (0, S - T)))
    step = jax.jit(partial(step, n=STRIDE, sampling=sampling, end=end), donate_argnums=(
        1, 2)).lower(params, cache, latest, key, **state).compile()
    start = time.perf_counter()
    while True:
        yield tokens, speed | {"seconds": time.perf_counter() - start, "rounds": rounds,
                               "tokens_per_round": len(tokens) / max(1, rounds)}
        if args.draft:
            latest, cache, state["state"], counts = step(params, cache, latest, key, **state)
            tokens = np.asarray(latest)[0, T:int(cache.length[0]) + 1].tolist()
            rounds += int(counts.sum())
        else:
            new, latest, cache = step(params, cache, latest, key)
            tokens += new[0].tolist()


def complete(args):
    """args -> dict: continues a prompt, to stdout as it goes, and prints how fast that was."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    job, params = load_split(one_job(args))
    words = tokenizer(args.model, job.cfg)
    prompt = np.asarray(words.encode(args.text), np.int32)[None]
    T, least = prompt.shape[1], 2 if args.draft else 1
    require(T >= least, f"prompt {args.text!r} makes {T} tokens: {least} or more"
            + (", or no --draft" if args.draft else ""))
    check_tokens(prompt, job.cfg)
    end = None if prompt[0, -1] in words.ends else words.ends or None
    printed = text = ""
    try:
        for new, speed in generating(args, job, params, prompt, sampling, end):
            stop = min([job.new, *(new.index(token) for token in words.ends if token in new)])
            ids = prompt[0].tolist() + new[:stop]
            text = words.decode(ids)
            final = words.decode(ids[:words.settled(ids)]).rstrip("\ufffd")  # whole characters
            if final.startswith(printed):
                print(final[len(printed):], end="", flush=True)
                printed = final
            if len(new) >= stop:
                break
    except KeyboardInterrupt:
        if not text:
            raise
        say("\ninterrupted")
    print(text[len(printed):])
    rounds = f", {speed['tokens_per_round']:.2f} tokens a round" if speed["rounds"] else ""
    print(f"prefill of {T} tokens {si(speed['prefill_seconds'], 's')}, then "
          f"{len(new) / speed['seconds']:.1f} tokens/s{rounds}: weights {job.dtype}, cache "
          f"{job.cache}")
    return speed | {"tokens": len(ids) - T, "text": text}


# ------------------------------------------------------------------------------------- command line


def switch(text):
    """str -> a field that is an option without a value."""
    return field(default=False, metadata=dict(help=text, action="store_true"))


STEP = {f.name: f for f in fields(Job) if f.name != "phase"} | {  # of a command that runs a phase
    "profile": option("write traces for Perfetto or XProf there, and print where time goes", None),
    "distributed": switch("this is one process of several, which find each other")}
OPTIONS = STEP | {
    "seed": option("of weights, tokens and draws", 0, partial(number, least=0, most=2 ** 32 - 1)),
    "json": option("write rows there as JSON (- is stdout, and nothing else there)", None),
    "quick": switch("a small model, under a minute"),
    "text": option("a file to train on (README.md for --steps, --save, --resume or --lr)", None),
    "steps": option("training steps", None, number), "lr": option("learning rate", 1e-3, positive),
    "save": option("write what was trained there", None),
    "resume": option("continue what --save wrote there, with the same options", None),
    "parameters": option("a rounded count, as 7e9, beside the exact one", None, positive),
    "train": switch("plan training, too"),
    "tokens": option("to train on", 1e12, positive),
    "mfu": option("model flops utilization, assumed of training", 0.5, partial(positive, most=1)),
    "temperature": option("0 is greedy", 0.0, float),
    "top_k": option("draw from the k most probable (0: all)", 0, int),
    "top_p": option("draw from those that reach p", 1.0, float),
    "draft": option("speculate with a smaller model, or with n-grams of the text", None)}
COMMANDS = {  # its options, their defaults where they differ, what it does, and an example
    "all": (["quick", "profile"], {}, "all phases of the default model, which need not be named",
            "--quick"),
    "train": ([*STEP, "text", "steps", "lr", "save", "resume"], dict(model="", batch=8),
              "a training step, or training on a text", "--text README.md --steps 100 --save DIR"),
    "prefill": (STEP, {}, "reading prompts", "--batch 8 --prompt 512"),
    "generate": (STEP, {}, "a decode step", "--model gemma-7b --chip tpu-v4 --chips 4 --batch 110 "
                 "--prompt 2032 --new 16 --dtype bfloat16"),
    "verify": (STEP, {}, "reading a draft at once", "--n-draft 7 --profile DIR"),
    "speculate": (STEP, dict(prompt=96), "rounds of a draft and its verification", "--batch 1,4"),
    "serve": (STEP, dict(batch=8, prompt=64), "many requests through few rows", "--dtype int8"),
    "plan": (["model", "kv_heads", "batch", "prompt", "dtype", "cache", "int8", "chip", "chips",
              "parameters", "train", "tokens", "mfu"],
             dict(model="gemma-7b", batch=0, prompt=2048, dtype="bfloat16", cache="bfloat16",
                  chip="tpu-v4"),
             "predict, without running anything", "--model gemma-7b --chips 4 --train"),
    "published": ([], {}, "what others measured, beside its limit and what was expected",
                  "--json FILE"),
    "complete": (["new", "dtype", "cache", "int8", "n_draft", "devices", "temperature", "top_k",
                  "top_p", "draft"], dict(new=64, dtype=""), "continue a text with a real model",
                 '--model DIR "So long" --temperature 0.8')}


def parse(argv):
    """list of str -> namespace: the arguments of a command line. SystemExit, with one line, for bad
    ones."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"{self.prog}: error: {message}\n")

    parser = Parser(prog="bench.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    for name, (options, defaults, text, example) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False,
                                      epilog=f"for example: python bench.py {name} {example}")
        for word in (*options, "seed", "json"):
            default = defaults.get(word, OPTIONS[word].default)
            argument = command.add_argument(f"--{word.replace('_', '-')}", default=default,
                                            **OPTIONS[word].metadata)
            argument.help += f" ({default})" if default else ""
        if name == "complete":
            command.add_argument("text", help="the text to continue")
            command.add_argument("--model", required=True, help="a folder of --save or the Hub")
    named = argv and (argv[0][:1] != "-" or argv[0] in ("-h", "--help"))
    return parser.parse_args(argv if named else ["all", *argv])


drawn = lru_cache(maxsize=1)(lambda job, seed: draw(job, jax.random.key(seed)))


def params_of(job, seed):
    """Job, int -> Params or None: random ones, drawn once for what is alike, and for speculation
    some that know SENTENCE. Of several devices, and chips that are not here, each makes its own."""
    if job.mesh or job.chip:
        return None
    alike = Job(model=job.model, kv_heads=job.kv_heads)
    if job.phase == "speculate":
        return in_dtype(job, learn(alike, seed))
    return drawn(replace(alike, dtype=job.dtype, int8=job.int8), seed)


LINE = "{:9} {:8} {:8} {:>3} {:>8} {:>7} {:>7} {:>7} {:>12} {:>5} {:>5} {:>9}".format


def print_row(row):
    """row -> None: of a step that was measured here, or of a chip that is not here."""
    if row["chip"]:
        print(f"\n{name_of(row)}: {row['model']} on {row['chips']} x {row['chip']}, mesh "
              f"{row['mesh'] or '-'}, layout {row['layout'] or '-'}, flags {row['flags']}")
        for title, keys in (("predicted, of all", PREDICTED), ("compiled, of each", COMPILED)):
            print_facts({title: {key: row[key] for key in keys if row[key] is not None}})
        return
    took, alone = row["measured_seconds"], row["library_seconds"]
    print(LINE(row["phase"], row["int8"] or row["dtype"],
               "-" if row["phase"] == "train" else row["cache"], row["batch"],
               f"{row['T']}/{row['S']}", si(row["limit_seconds"], "s"), cell("seconds", alone),
               si(took, "s"), f"{took / alone:.2f}" if alone else "-",
               *("error" if row[key] is None else cell(key, row[key]) for key in ("mfu", "mbu")),
               cell("", row["tokens_per_second"])), flush=True)
    if row["sent"]:
        print(f"  each device sends {cell('sent', row['sent'])}; counted in the program: "
              f"{cell('sent', row['counted'])}")


def make_row(job, limits, args, traced):
    """Job, dict, args, bool -> dict: predicted, compiled and, here, measured; and profiled where it
    is traced."""
    job = fastest_int8(job)
    row = ROW | asdict(job) | predict(job, limits)
    say(f"{name_of(row)}: limit {si(row['limit_seconds'], 's')} ...")
    prepared = prepare(job, params_of(job, args.seed), args.seed)
    step, facts = (prepared.step, {}) if job.phase == "serve" else inspect(prepared, traced)
    row |= facts
    if not (job.chip or job.mesh):  # just before the step runs: a machine's speed changes
        alone = library_seconds(job)
        for part, seconds in zip(row["parts"], alone, strict=True):
            part["library_seconds"] = seconds
        row["library_seconds"] = sum(alone)
    if not job.chip:
        row |= measure(prepared, step)
        row |= shares(row, row["measured_seconds"], limits, job.matmul_dtype)
        if traced and prepared.ops:
            row["profile"] = {"measured_seconds": row["measured_seconds"], **profile(
                prepared, args.profile and Path(args.profile) / name_of(row).replace(" ", "-"))}
    return row


def run(args):
    """args -> dict: measures, or compiles, what the command line asks for, and prints it."""
    jobs, rows, text = [*map(settle, jobs_of(args))], [], getattr(args, "text", None)
    require(jobs, "no model of the default run fits the memory that is free: --quick, or a phase "
            "with a smaller --model")
    for job in jobs:
        check(job)
    chip = jobs[0].chip
    require(not (args.profile and (chip or text or args.command == "serve")), "--profile is for a "
            "phase on this machine, but not for serve, which runs on the host, or for a text")
    require(not (text and (chip or jobs[0].mesh)), "training on a text (--text, --steps) takes one "
            "device of this machine: leave out --chip and --devices")
    if text:
        return train_on_text(args, jobs)
    limits = limits_of(jobs)
    if not chip:
        print(LINE("phase", "dtype", "cache", "B", "T/S", "limit", "library", "took",
                   "took/library", "MFU", "MBU", "tokens/s"))
    with suppress(KeyboardInterrupt):  # what was measured so far is printed
        for job in jobs:
            rows.append(make_row(job, limits, args, args.profile))
            print_row(rows[-1])
        if args.command == "all":  # profile the row that is farthest from the library
            _, i = max((abs(math.log(row["measured_seconds"] / row["library_seconds"])), i)
                       for i, row in enumerate(rows) if row["phase"] != "serve")
            rows[i]["profile"] = make_row(jobs[i], limits, args, True)["profile"]
    if rows and not chip:
        explain(rows)
    return {"machine": machine(), "ceilings": limits, "rows": rows}


def keep_freed_memory():
    """-> None: tells the C library to keep what is freed. Only glibc can.

    XLA's CPU code asks for its temporaries anew at every step. By default glibc returns each large
    one to the kernel, which has to zero every page again; kept, an f32 step takes 12 to 15% less.
    """
    if platform.libc_ver()[0] == "glibc":
        # M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX of malloc.h
        for option_number, value in ((-1, -1), (-4, 0), (-8, 1)):
            ctypes.CDLL(None).mallopt(option_number, value)


def main(argv=None):
    """The program: bad input is refused in one line."""
    keep_freed_memory()  # before XLA starts its threads
    args = parse(sys.argv[1:] if argv is None else argv)
    with suppress(AttributeError):  # a terminal may lack characters
        sys.stdout.reconfigure(errors="replace")
    if args.command == "train" and (args.text or args.resume or args.save or args.steps
                                    or args.lr != OPTIONS["lr"].default):
        args.text = args.text or Path(__file__).with_name("README.md")
        args.steps = args.steps or 100
    try:
        file = Path(args.json or "-").absolute()
        require(file.parent.is_dir() and not file.is_dir(), f"--json {file}: there is no such "
                "folder, or it is one")
        if getattr(args, "distributed", False):
            jax.distributed.initialize()
        elif getattr(args, "devices", 1) > 1:
            with suppress(RuntimeError):  # too late where JAX has been used
                jax.config.update("jax_num_cpu_devices", args.devices)
        first, to_stdout = jax.process_index() == 0, args.json == "-"
        with redirect_stdout(sys.stdout if first and not to_stdout else None):  # None is silent
            commands = {"plan": plan, "published": published, "complete": complete}
            result = commands.get(args.command, run)(args)
        if args.json and first:
            text = json.dumps(result, default=str) + "\n"
            print(text, end="") if to_stdout else file.write_text(text)
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nbench.py: interrupted before there was anything to print")


if __name__ == "__main__":
    main()
