"""infer: prefill once, then generate one token after another, with an explicit KV cache.

Prefill is bound by flops: every weight meets B*T tokens. A decode step is bound by bytes: it reads
all weights and all S slots of the cache to make B tokens. Hence many rows at once (`serve`), fewer
bytes (int8), and a use for the idle flops (`speculate`). Letters as in minillm.py.

Functions that take `where` run on one device by default; a `shard.Where` splits them over several.
"""
import json
import math
import os
import re
import sys
import time
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random, tree, vmap
from jax.experimental import multihost_utils

from minillm import (Adam, Config, block, causal_attention, causal_pairs, check_tokens, dims, dot,
                     dots, embed, forward, join_blocks, matmul, merge, normalize,
                     partial_attention, product, product_flops, require, rotary, size_of, sizes,
                     split_blocks, unembed, value_range)

TINY = 1.2e-38  # below it float32 flushes to zero
fold_in = vmap(random.fold_in)  # a key per row and a number per row -> a key per row

# --------------------------------------------------------------------------------------------- int8


class Q8(namedtuple("Q8", "q scale")):
    """int8 numbers q, and float32 scales in the shape of q, with 1 for the contracted letters: it
    represents q * scale. A weight of this type is weight-only int8: it is converted to the dtype of
    the activations in its matmul."""
    shape = property(lambda self: self.q.shape)
    dtype = property(lambda self: self.q.dtype)

    def astype(self, dtype):
        """dtype -> array: the numbers that it represents, as floats."""
        return (self.q * self.scale).astype(dtype)

    def rows(self, index, dtype):
        """index, dtype -> array: these rows of the table, as floats."""
        return (self.q[index] * self.scale[index]).astype(dtype)

    def matmul(self, x, n=1):
        """MC -> MO: n letters are contracted."""
        return matmul(x, self.q.astype(x.dtype), n) * self.scale.reshape(self.shape[:-n])


class Q8A8(Q8):
    """int8 weights times int8 activations (W8A8): each row of x is quantized, sums are int32."""
    def matmul(self, x, n=1):
        """MC -> MO: n letters are contracted."""
        outputs = self.shape[:-n]
        x = quantize(x, tuple(range(-n, 0)))
        row_scale = x.scale.reshape(x.shape[:-n] + (1,) * len(outputs))
        return product(x.q, self.q, n, "int32") * row_scale * self.scale.reshape(outputs)


def quantize(x, axes):
    """BTE, axes -> Q8: one scale for all of `axes`, which maps their largest magnitude to 127.

    q * scale is within scale / 2 of x. Zeros stay zeros, and numbers below TINY * 127 become 0.
    """
    x = x.astype("float32")
    largest = jnp.max(jnp.abs(x), axes, keepdims=True)
    scale = jnp.where(largest < 127 * TINY, 1, largest) / 127
    return Q8(jnp.round(x / scale).astype("int8"), scale)


def quantize_params(params, cfg, kind=Q8A8):
    """Params, cfg -> int8 Params: every matrix that is multiplied, with a scale for each output.

    `kind` is Q8 or Q8A8. Norm scales, and an embedding table that is only looked up, are cast to
    cfg.dtype, the dtype of the activations.
    """
    def leaf(name, w):
        contracted = tuple(range(-len(name.split()[-1]), 0))
        return kind(*quantize(w, contracted)) if " " in name else w.astype(cfg.dtype)

    names = dims(cfg)._replace(embed="V E" if cfg.tied else "VE")
    return tree.map(leaf, names, params)


# ---------------------------------------------------------------------------------------- the cache


# Keys and values of the tokens so far: slot s of a row belongs to position s.
#     k, v    tuples of L arrays BKSD, or of Q8 of them with a scale per row, head and slot, BKS1;
#             BKnSD where slots are split over n devices: see shard.stripe
#     length  B, int32: filled slots of each row, which is also the position of its next token
# Rows may differ in length. To roll tokens back, lower it: `cache._replace(length=...)`.
Cache = namedtuple("Cache", "k v length")
CACHE_DTYPES = "float32", "bfloat16", "float16", "int8"


def init_cache(cfg, B, S, dtype="float32"):
    """cfg, int, int, dtype -> Cache: B empty rows of S slots.

    Every decode step reads all S slots, filled or not: start small and `resize`. In int8 a slot
    takes D + 4 bytes per head. ValueError for an empty cache, or another dtype than these four.
    """
    dtype = jnp.dtype(dtype)
    require(B > 0 and S > 0 and dtype.name in CACHE_DTYPES, f"a cache of {B} rows and {S} slots of "
            f"{dtype}: expected 1 or more of each, and one of {', '.join(CACHE_DTYPES)}")

    def layer():
        slots = jnp.zeros((B, cfg.K, S, cfg.D), dtype)
        return Q8(slots, slots[..., :1].astype("float32")) if dtype == "int8" else slots

    k, v = (tuple(layer() for _ in range(cfg.L)) for _ in "kv")
    return Cache(k, v, jnp.zeros(B, "int32"))


def free_memory():
    """-> int: bytes that are free here: of the device where it tells, else of this machine;
    infinite where neither does."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if jax.default_backend() == "cpu" and sys.platform == "linux":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)


def slots_of(cache):
    """Cache -> int: slots of a row: S of BKSD, or n times S where slots are split, BKnSD."""
    return math.prod(cache.k[0].shape[2:-1])


def check_room(cache, new, S=None, remedy="init_cache or resize with S="):
    """Cache, int -> None: ValueError unless every row has room for `new` more tokens in S slots.

    Under jit lengths are unknown, and only `new` > S is refused. A write past the last slot is
    dropped, and later queries miss that token.
    """
    S = slots_of(cache) if S is None else S
    require(new >= 0 and S > 0, f"{new} new tokens in {S} slots: expected 0 or more in one or more")
    longest = max(value_range(cache.length), default=0)
    require(longest + new <= S, f"{longest} tokens in the cache + {new} new > {S} slots: "
            f"{remedy}{longest + new}")


def check_rows(cache, tokens, new):
    """Cache, BT, int -> None: `check_room`, and ValueError unless tokens, or logits, have as many
    rows as the cache."""
    require(len(tokens) == len(cache.length), f"{len(tokens)} rows of tokens or logits for a cache "
            f"of {len(cache.length)}: init_cache(B={len(tokens)})")
    check_room(cache, new)


def check_prompts(cache, tokens, lengths):
    """Cache, BT, B -> None: ValueError unless prompts and lengths fit each other and the cache."""
    B, T = tokens.shape
    check_rows(cache._replace(length=0 * cache.length), tokens, T)
    require(jnp.shape(lengths) == (B,),
            f"lengths of shape {jnp.shape(lengths)} for {B} prompts: expected [{B}]")
    for length in value_range(lengths):
        require(1 <= length <= T, f"a prompt of length {length}: prompts padded to {T} tokens have "
                f"lengths of 1 to {T}")


def insert(slots, new, row=0):
    """BKSD, BKTD -> BKSD: store whole rows, from `row` on, at slots 0 to T - 1. Also for trees."""
    return tree.map(lambda slots, new: lax.dynamic_update_slice(slots, new, (row, 0, 0, 0)),
                    slots, new)


def resize(cache, S):
    """Cache, S -> Cache: the same rows with S slots. ValueError where a row has more tokens."""
    check_room(cache, 0, S)
    require(cache.k[0].ndim == 4, "a cache whose slots are split cannot be resized: move it to "
            'another layout first: shard.Where(mesh, "batch").place_cache(cfg, cache)')

    def fit(a):
        B, K, _, D = a.shape
        return insert(jnp.zeros((B, K, S, D), a.dtype), a[:, :, :S])

    return Cache(*tree.map(fit, cache[:2]), cache.length)


def to_cache(new, slots):
    """BKTD, BKSD -> BKTD: keys or values in the form of the cache: Q8, or its dtype, whose largest
    number replaces what is beyond it."""
    if isinstance(slots, Q8):
        return quantize(new, -1)
    largest = jnp.finfo(slots.dtype).max
    return jnp.clip(new, -largest, largest).astype(slots.dtype)


def write(slots, new, pos):
    """BKSD, BKTD, BT -> BKSD: store each row's T new tokens at the slots of their positions. Also
    for trees.

    A donated cache is updated in place, because row, head and slot are explicit indices: with a
    slice for the heads, compilers choose another layout and copy the cache. (XLA's CPU compiler
    copies a cache of one row and one head all the same.) Positions outside 0 to S - 1 are dropped.
    """
    def store(slots, new):
        B, K, *_ = new.shape
        index = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], pos[:, None]
        return slots.at[index].set(new, mode="drop", wrap_negative_indices=False)

    return tree.map(store, slots, new)


def cached_attention(q, k, v, pos, finish=normalize):
    """BTHD, BKSD, BKSD, BT -> BTHD: `attention` to a cache, int8 or not, over pieces of
    max(128, 2^20 / T) slots, one after another.

    `finish` makes values of the Partial of all slots: see shard.normalize_over.
    """
    (_, T, H, _), (_, K, S, _) = q.shape, k.shape
    width = min(S, max(128, 2 ** 20 // T))
    rows, last = split_blocks(q, K)[0], jnp.repeat(pos, H // K, 1)[:, None, :, None]

    def piece(start, width):
        kv = tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, width, 2), (k, v))
        return partial_attention(rows, *kv, start + jnp.arange(width) <= last)

    first = S % width or width
    part = piece(0, first)
    if first < S:
        part, _ = lax.scan(lambda part, start: (merge(part, piece(start, width)), None), part,
                           jnp.arange(first, S, width))
    return join_blocks(finish(part)[None], T, H).astype(q.dtype)


def splash(q, k, v, interpret=False):
    """BTHD, BKTD, BKTD -> BTHD: `causal_attention` by a kernel of JAX for TPUs. The kernel takes
    heads before tokens, queries that are scaled already (here), and blocks of 128 or more tokens
    that divide T. What it saves for its gradient has the name "attention" for `jax.checkpoint`, as
    in `causal_forward`."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels
    (_, T, H, D), block = q.shape, math.gcd(q.shape[1], 512)
    require(block >= 128, f"T={T}: splash attention takes a multiple of 128 tokens")
    blocks = kernels.BlockSizes(**dict.fromkeys((
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
        "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"), block))
    run = kernels.make_splash_mha(
        kernels.MultiHeadMask([kernels.CausalMask((T, T))] * H), block_sizes=blocks, head_shards=1,
        q_seq_shards=1, residual_checkpoint_name="attention", interpret=interpret)
    return vmap(run)((q * D ** -0.5).astype(q.dtype).swapaxes(1, 2), k, v).swapaxes(1, 2)


def cudnn(q, k, v, pos=None):
    """BTHD, BKSD, BKSD, BT -> BTHD: `cached_attention` by NVIDIA's kernels, and without positions
    `causal_attention`. They take tokens before heads, and no int8."""
    k, v = (a.astype(q.dtype).swapaxes(1, 2) for a in (k, v))
    mask = None if pos is None else jnp.arange(k.shape[1]) <= pos[:, None, :, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=pos is None,
                                        implementation="cudnn")


# ----------------------------------------------------------------------- a model around the cache


def attend_cache(q, k, v, old, pos, cached=cached_attention):
    """BTHD, BKTD, BKTD, (BKSD, BKSD), BT -> BTHD, (BKSD, BKSD): write new tokens to a layer's
    cache, then attend to all of it."""
    new = write(old, tree.map(to_cache, (k, v), old), pos)
    return cached(q, *new, pos), new


def attend_prompt(q, k, v, old, pos, causal=causal_attention, row=0, insert=insert):
    """BTHD, BKTD, BKTD, (BKSD, BKSD), BT -> BTHD, (BKSD, BKSD): fill slots 0 to T - 1 of the rows
    from `row` on, and attend to these tokens alone. Keys and values are rounded as they will be
    in the cache, so that a prompt that `extend` reads in chunks gives the same."""
    new = tree.map(to_cache, (k, v), old)
    return causal(q, *(a.astype(q.dtype) for a in new)), insert(old, new, row)


def run_layers(parts, params, cache, tokens, pos, length, cfg, attend):
    """Parts, Params, Cache, BT, BT, B, cfg, attend -> BTE, Cache: embed tokens and run all blocks,
    without the final norm. `attend(q, k, v, old, pos)` returns a layer's BTHD and its pair of
    BKSD; `length` is that of the new cache."""
    x, table, kv = parts.embed(params, tokens, cfg), rotary(pos, cfg), []
    for w, *old in zip(params.layers, cache.k, cache.v, strict=True):
        x, new = block(x, w, table, cfg, lambda q, k, v: attend(q, k, v, (*old,), pos),
                       parts.enter, parts.leave)
        kv.append(new)
    return x, Cache(*zip(*kv), length)


def append(parts, params, cache, tokens, cfg):
    """Parts, Params, Cache, BT, cfg -> BTE, Cache: `extend` on each device."""
    T = tokens.shape[1]
    pos = cache.length[:, None] + jnp.arange(T)
    return run_layers(parts, params, cache, tokens, pos, cache.length + T, cfg,
                      partial(parts.attend, cached=parts.cached))


def read_prompts(parts, params, cache, tokens, lengths, cfg, **row):
    """Parts, Params, Cache, BT, B, cfg -> BV, Cache: `prefill` on each device, of the rows from
    `row` on where it is given."""
    x, cache = run_layers(parts, params, cache, tokens, jnp.arange(tokens.shape[1])[None], lengths,
                          cfg, partial(parts.attend_prompt, causal=parts.causal, **row))
    x = x[jnp.arange(len(x)), lengths - 1][:, None]
    return parts.unembed(params, x, cfg)[:, 0], cache


# ----------------------------------------------------------------------------------------- sampling


def one_hot(token, V):
    """..., V -> ...V: log-probabilities of a certain token."""
    return jnp.where(jnp.arange(V) == token[..., None], jnp.float32(0), -jnp.inf)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: a static argument of `jax.jit`.

    Logits are divided by the temperature; of the results the top_k largest are kept (0: all), then
    the most probable that together reach top_p; ties with the last one are kept. A temperature of
    0 is greedy: the first of the largest logits. ValueError for what makes no distribution in
    float32.
    """
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        require((self.temperature == 0 or TINY <= self.temperature <= 1 / TINY)
                and type(self.top_k) is not float and self.top_k >= 0
                and TINY <= self.top_p <= 1, f"{self}: expected a temperature of 0, or {TINY} to "
                f"{1 / TINY:.1e}, an integer top_k from 0, and a top_p of {TINY} to 1")


GREEDY = Sampling()


def row_max(x):
    """BV -> B1: each row's largest number."""
    return jnp.max(x, -1, keepdims=True)


def kth_largest(x, k):
    """BV, int -> B1: each row's k-th largest number, or its smallest where V < k."""
    return lax.top_k(x, min(k, x.shape[-1]))[0][..., -1:]


def no_nan(logits):
    """BV -> BV: in float32, with -inf for NaN."""
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits.astype("float32"))


def filter_logits(logits, sampling, row_max=row_max, kth=kth_largest):
    """BV, Sampling -> BV: log-probabilities up to a constant per row, in float32; what is filtered
    out is -inf. For a temperature above 0.

    What is not finite: a logit of NaN or -inf is never drawn, +inf is certain, and a row of NaN and
    -inf alone is uniform. `row_max` and `kth` are replaced where V is split.
    """
    logits = no_nan(logits)
    largest = row_max(logits)
    logits = jnp.where(logits == largest, 0, logits - largest) / sampling.temperature
    if sampling.top_k:
        logits = jnp.where(logits < kth(logits, sampling.top_k), -jnp.inf, logits)
    if sampling.top_p < 1:
        falling = -jnp.sort(-logits, -1)
        p = jax.nn.softmax(falling)
        keep = jnp.cumsum(p, -1) - p < sampling.top_p  # always the first
        smallest = jnp.min(falling, -1, keepdims=True, where=keep, initial=jnp.inf)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def log_probs(logits, sampling):
    """BV, Sampling -> BV: the log-probabilities that `sample` draws from, normalized, in float32.
    What is not finite: see `filter_logits`."""
    if sampling.temperature == 0:
        return one_hot(jnp.argmax(no_nan(logits), -1), logits.shape[-1])
    return jax.nn.log_softmax(filter_logits(logits, sampling))


def row_keys(key, B):
    """key, int -> keys: a key per row, folded from one key by row number; B keys stay.

    Keys of any kind become threefry keys, made of their first two words: under vmap, "rbg" would
    draw a whole batch from its first key. ValueError for another number of keys than rows.
    """
    keys = random.wrap_key_data(random.key_data(key)[..., :2], impl="threefry2x32")
    require(keys.shape in ((), (B,)),
            f"keys of shape {keys.shape} for {B} rows: expected one key, or one per row")
    return keys if keys.ndim else fold_in(jnp.broadcast_to(keys, B), jnp.arange(B))


def noise(key, pos, V):
    """key, B, V -> BV: Gumbel noise for each row and position. Added to log-probabilities, the
    largest sum is a draw. In JAX's default mode noise ends near 16, and tokens whose probability is
    below 1e-7 of the largest are never drawn."""
    return vmap(lambda key: random.gumbel(key, (V,), "float32", mode="high"))(
        fold_in(row_keys(key, len(pos)), pos))


@jax.named_scope("sample")
def sample(key, logits, pos, sampling):
    """key, BV, B, Sampling -> B: a token per row, drawn from `log_probs`.

    The draw depends on key, row and position alone, so a run that stops and goes on draws what one
    longer run draws. `key` may also be B keys, one per row.
    """
    scores = no_nan(logits)
    if sampling.temperature:
        scores = filter_logits(logits, sampling) + noise(key, pos, logits.shape[-1])
    return jnp.argmax(scores, -1).astype("int32")


# ------------------------------------------------------------------------ prefill, extend, generate


class Parts(namedtuple(
        "Parts", "embed enter leave attend attend_prompt read unembed gather sample one_hot "
        "local_row causal cached", defaults=(
            embed, dots, dot, attend_cache, attend_prompt, read_prompts, unembed,
            lambda logits: logits, sample, one_hot, lambda row, B: row, causal_attention,
            cached_attention))):
    """The functions that a generating model is made of, and where it runs: here, on one device.

        embed          Params, BT, cfg -> BTE
        enter, leave   the hooks of minillm.block
        attend         q, k, v, (old k, old v), pos, cached -> BTHD, (k, v)
        attend_prompt  the same, for a prompt, with `causal`, and `row`
        read           all of a prefill: see `read_prompts`
        unembed        Params, BTE, cfg -> BTV
        gather         BTV -> BTV: whole logits, where V is split
        sample         key, BV, B, Sampling -> B
        one_hot        B, V -> BV
        local_row      int, B -> int: a row's number on the device that has it
        causal         q, k, v -> BTHD: attention of a prompt, such as a fused kernel
        cached         q, k, v, pos -> BTHD: attention to a cache

    shard.Where has other parts, for each device of a mesh, and its own `run` and `empty`.
    """
    def run(self, cfg, body, results, *args):
        """cfg, fn, names, arrays -> arrays: `body(parts, *args)`. By the names of the body's
        arguments, and of the results, shard.Where splits them."""
        return body(self, *args)

    def empty(self, cfg, B, S, dtype="float32"):
        """cfg, int, int, dtype -> Cache, BV: empty rows, and zero logits."""
        return init_cache(cfg, B, S, dtype), jnp.zeros((B, cfg.V), "float32")


HERE = Parts()


def extend(params, cache, tokens, cfg, where=HERE):
    """Params, Cache, BT, cfg -> BTE, Cache: append T tokens to every row, each at its own length.

    T = 1 is a decode step, T = n_draft + 1 verifies a draft, more is a chunk of a prompt. The
    result stands before the final norm: `where.unembed` makes logits of it. ValueError for tokens
    outside the vocabulary, another number of rows than the cache's, or more tokens than free slots.
    """
    tokens = check_tokens(tokens, cfg)
    check_rows(cache, tokens, tokens.shape[1])
    return where.run(cfg, partial(append, cfg=cfg), ("x", "cache"), params, cache, tokens)


def prefill(params, cache, tokens, lengths, cfg, rows=None, where=HERE):
    """Params, Cache, BT, B, cfg -> BV, Cache: read prompts into all rows, from slot 0 on.

    Prompts are padded on the right to T; row b is its first lengths[b] tokens. Attention sees T
    tokens, not S slots, and only each row's last position is unembedded: its logits, in float32,
    are returned. ValueError for tokens outside the vocabulary, an empty prompt, lengths beyond T, T
    beyond the cache, or `rows` that are no int, do not divide B, or stand beside a mesh.

    With `rows`, a Python int, the batch is read that many rows at a time, in a scan: each group
    reads all weights again, which the flops of a thousand tokens hide, and temporaries are those of
    one group. (`prefill_flops` of a group, times groups.)
    """
    tokens = check_tokens(tokens, cfg)
    check_prompts(cache, tokens, lengths)
    B, T = tokens.shape
    require(rows is None or type(rows) is int and rows > 0 and B % rows == 0
            and where == HERE, f"rows={rows!r} at a time of {B} prompts: choose an int "
            f"that divides {B} (under jit, name it in static_argnames), on one device; else None")

    def body(parts, params, cache, tokens, lengths):
        if rows is None:
            return parts.read(parts, params, cache, tokens, lengths, cfg)

        def step(cache, group):
            row, *prompts = group
            logits, new = parts.read(parts, params, cache, *prompts, cfg, row=row)
            return new._replace(length=cache.length), logits

        groups = jnp.arange(0, B, rows), tokens.reshape(-1, rows, T), lengths.reshape(-1, rows)
        cache, logits = lax.scan(step, cache, groups)
        return logits.reshape(B, -1), cache._replace(length=lengths)

    return where.run(cfg, body, ("logits", "cache"), params, cache, tokens,
                     jnp.asarray(lengths, "int32"))


def is_end(token, end):
    """B, end -> B: is it the end token, or one of several? None is no token."""
    return jnp.isin(token, jnp.array(-1 if end is None else end))


def decode(parts, params, cache, logits, keys, n, cfg, sampling, end=None, report=lambda x: None):
    """Parts, Params, Cache, BV, keys, n, cfg, Sampling -> Bn, BV, Cache, reports: `generate` on
    each device, and what `report` returns of each token's logits, rows first."""
    def step(state, _):
        cache, logits = state
        token = parts.sample(keys, logits, cache.length, sampling)
        x, new = append(parts, params, cache, token[:, None], cfg)
        new_logits = parts.unembed(params, x, cfg)[:, 0]
        if end is not None:
            goes_on = ~is_end(token, end)
            new = new._replace(length=cache.length + goes_on)
            new_logits = jnp.where(goes_on[:, None], new_logits, parts.one_hot(token, cfg.V))
        return (new, new_logits), (token, report(logits))

    (cache, logits), outputs = lax.scan(step, (cache, logits), length=n)
    tokens, reports = tree.map(lambda a: a.swapaxes(0, 1), outputs)
    return tokens, logits, cache, reports


def generate(params, cache, logits, key, n, cfg, sampling=GREEDY, end=None, where=HERE):
    """Params, Cache, BV, key, n, cfg -> Bn, BV, Cache: n tokens per row, in one scan on the device.

    `logits` are those of the next token, from `prefill` or an earlier `generate`; the new ones are
    returned, to continue with. A row that draws `end`, or one of a tuple of end tokens, stops: its
    length excludes that token and its logits become one-hot on it, so that it draws nothing else,
    in a later call too. n, cfg, sampling, end and where are static under `jax.jit`. ValueError
    where the cache has no room for n tokens.
    """
    check_rows(cache, logits, n)
    body = partial(decode, n=n, cfg=cfg, sampling=sampling, end=end)
    return where.run(cfg, body, ("tokens", "logits", "cache", "reports"), params, cache,
                     logits.astype("float32"), row_keys(key, len(logits)))[:3]


def generate_reference(params, prompt, n, cfg):
    """Params, BT, n, cfg -> Bn: the definition of greedy decoding: all tokens are read again for
    each new one."""
    T = prompt.shape[1]
    for _ in range(n):
        token = jnp.argmax(forward(params, prompt, cfg)[:, -1:], -1)
        prompt = jnp.concatenate([prompt, token.astype(prompt.dtype)], 1)
    return prompt[:, T:]


# ------------------------------------------------------------------------- many requests, few rows


def refill(params, cache, logits, row, prompt, length, cfg, where=HERE):
    """Params, Cache, BV, int, 1T, 1, cfg -> BV, Cache: one row starts over with a prompt; the other
    rows do not change."""
    prompt = check_tokens(prompt, cfg)

    def body(parts, params, cache, logits, row, prompt, length):
        first, new = read_prompts(parts, params, cache, prompt, length, cfg, row=row)
        row = parts.local_row(row, len(logits))
        return logits.at[row].set(first[0], mode="drop"), new._replace(
            length=cache.length.at[row].set(length[0], mode="drop"))

    return where.run(cfg, body, ("logits", "cache"), params, cache, logits, row, prompt, length)


def read_requests(prompts, n, S, cfg):
    """prompts, n, S, cfg -> iterator of (int, 1T, n) or None: each request of `serve` with its
    number, checked."""
    number = 0
    for request in prompts:
        if request is None:
            yield None
            continue
        pair = isinstance(request, tuple) and len(request) == 2 and np.ndim(request[0]) == 1
        prompt, most = request if pair else (request, n)
        try:
            prompt = check_tokens(np.asarray(prompt)[None], cfg)
            require(isinstance(most, (int, np.integer)), f"n={most!r} of a pair is no integer")
            require(most > 0 and prompt.size + most <= S, f"prompt of {prompt.size} tokens + {most}"
                    f" to generate > {S} slots: serve(S={prompt.size + most})")
        except ValueError as error:
            raise ValueError(f"request {number}: {error}") from None
        yield number, prompt, most
        number += 1


@jax.jit
def request_keys(key, numbers):
    """key, B -> keys: one for each request, by its number. They are computed one after another:
    under `vmap` some kinds of key, such as rbg, give others."""
    return lax.map(partial(random.fold_in, key), numbers)


def serve(params, prompts, B, S, n, key, cfg, sampling=GREEDY, end=None, stride=8,
          cache_dtype="float32", where=HERE):
    """Params, prompts, B, S, n, key, cfg -> iterator of (int, tokens): continuous batching.

    Requests go through B rows of S slots. A request is a prompt, or a pair (prompt, n); it gets n
    tokens, or fewer where the last is an `end` token. It is yielded with its number as soon as it
    is done, and the next one takes its row while the others go on. The host looks at the rows every
    `stride` tokens. The tokens of request i do not depend on its neighbours: they are those that
    `generate` makes in any B rows, with the row's key `jax.random.fold_in(key, i)`. With another B
    rounding may break ties differently, more often in bfloat16, since sums run in another order.

    `prompts` is any iterable. When a row is free, it is asked for a request, and all rows wait for
    its answer: a live source that has none yet answers None, and rows that run go on. While a
    prompt is read, all rows wait for the whole of it.

    This is the one loop that runs on the host, so it compiles its two steps itself; prompts are
    padded to powers of two, for few programs. ValueError for a prompt that does not fit, when it is
    taken. Nothing runs before the first `next`; then a list is checked as a whole.
    """
    require(n > 0 and stride > 0, f"n={n}, stride={stride}: expected at least one token of each")
    fill = jax.jit(refill, static_argnames=("cfg", "where"), donate_argnames=("cache", "logits"))
    advance = jax.jit(generate, donate_argnames=("cache", "logits"),
                      static_argnames=("n", "cfg", "sampling", "end", "where"))
    ends = () if end is None else np.atleast_1d(end).tolist()
    waiting = read_requests(prompts, n, S, cfg)
    waiting = iter([*waiting]) if hasattr(prompts, "__len__") else waiting
    (cache, logits), active = where.empty(cfg, B, S, cache_dtype), {}  # row -> request, n, tokens
    while True:
        for row in [row for row in range(B) if row not in active]:
            request = next(waiting, ())
            if not request:
                break
            number, prompt, most = request
            active[row] = number, most, []
            T = min(S, 1 << max(4, (prompt.size - 1).bit_length()))
            padded = np.pad(prompt, ((0, 0), (0, T - prompt.size)))
            logits, cache = fill(params, cache, logits, row, padded, np.int32([prompt.size]),
                                 cfg=cfg, where=where)
        if not active:
            if request == ():
                return
            time.sleep(0.001)  # then the source is asked again
            continue
        keys = request_keys(key, jnp.array([active.get(row, [0])[0] for row in range(B)]))
        tokens, logits, cache = advance(params, cache, logits, keys, n=min(stride, n), cfg=cfg,
                                        sampling=sampling, end=(*ends,) or None, where=where)
        for row, (number, most, output) in [*active.items()]:
            output.extend(np.asarray(tokens)[row])
            stop = min([most, *(output.index(token) + 1 for token in ends if token in output)])
            if len(output) >= stop:
                yield number, np.array(output[:stop])
                del active[row]


# -------------------------------------------------------------------------------------- speculation


def acceptance(proposals, logp_draft, logp_target):
    """Bn, BnV, B(n+1)V -> Bn, B(n+1)V: the rule of speculative decoding, without any draw.

    The first result is the probability with which each of n proposals is accepted: min(1, p / q),
    with the target's probability p and the draft's q. The second is the distribution of the token
    that replaces the first rejected proposal: the positive part of p - q, normalized; and last,
    after n accepted ones, p itself. What comes out is distributed as p for any q. arXiv:2211.17192.
    """
    p, q = jnp.exp(logp_target), jnp.pad(jnp.exp(logp_draft), ((0, 0), (0, 1), (0, 0)))
    p_at, q_at = (jnp.take_along_axis(d[:, :-1], proposals[..., None], -1)[..., 0] for d in (p, q))
    excess = jnp.maximum(p - q, 0)
    total = jnp.sum(excess, -1, keepdims=True)
    residual = jnp.where(total > 0, excess / total, p)  # p = q is never rejected
    return jnp.where(p_at < q_at, p_at / q_at, p_at > 0), residual


def accept(key, proposals, logp_draft, logp_target):
    """key, Bn, BnV, B(n+1)V -> B, B: how many proposals a row keeps, and the token after them,
    drawn from what `acceptance` returns. `key` may also be B keys."""
    def draw(key, probability, residual):
        accept_key, token_key = random.split(key)
        keep = random.bernoulli(accept_key, probability, mode="high")
        count = jnp.argmin(jnp.append(keep, False)).astype("int32")  # the first that is rejected
        token = random.categorical(token_key, jnp.log(residual[count]), mode="high")
        return count, token.astype("int32")

    return vmap(draw)(row_keys(key, len(proposals)),
                      *acceptance(proposals, logp_draft, logp_target))


def last_token(tokens, length):
    """BS, B -> B1: the last of each row's first length[b] tokens."""
    return jnp.take_along_axis(tokens, length[:, None] - 1, 1)


def ngram_draft(key, tokens, length, state, n, V, longest=3):
    """key, BS, B, state, n, V -> Bn, BnV, state: a draft without a model, with probability 1 for
    its proposals; its state is None.

    Proposes the tokens that followed the latest match of the longest suffix of the row, up to
    `longest` tokens. Past the row's end it repeats them; without a match it repeats the last token.
    """
    index = jnp.arange(tokens.shape[1])
    before_last = index < length[:, None] - 1
    same, run = before_last, 0
    for back in range(longest):
        token = last_token(tokens, length - back)
        same = same & (index >= back) & (jnp.roll(tokens, back, 1) == token)
        run = run + same
    best = jnp.argmax(jnp.where(before_last, run * len(index) + index, -1), 1)
    period = (length - 1 - best)[:, None]
    proposals = jnp.take_along_axis(tokens, best[:, None] + 1 + jnp.arange(n) % period, 1)
    return proposals, one_hot(proposals, V), state


@lru_cache
def model_draft(cfg, sampling=GREEDY):
    """cfg -> draft: n tokens of a smaller model, whose state is its Params and its Cache, which
    holds what the target's cache holds. Equal arguments give the same function, for `jax.jit`."""
    def draft(key, tokens, length, state, n, V):
        params, cache = state
        x, cache = append(HERE, params, cache._replace(length=length - 1),
                          last_token(tokens, length), cfg)
        proposals, _, cache, logp = decode(
            HERE, params, cache, unembed(params, x, cfg)[:, 0], key, n, cfg, sampling,
            report=partial(log_probs, sampling=sampling))
        return proposals, logp, (params, cache)

    return draft


def check_speculation(cache, tokens, n, cfg, state, n_draft):
    """Cache, BS, n, cfg, state, n_draft -> None: ValueError unless rows have room for all new
    tokens, in the caches and in `tokens`."""
    def is_cache(part):
        return isinstance(part, Cache)

    new = n + n_draft + 1
    check_tokens(tokens, cfg)
    check_rows(cache, tokens, n)
    require(n_draft > 0, f"n_draft={n_draft}: a draft proposes at least one token")
    for part in filter(is_cache, tree.leaves((cache, state), is_leaf=is_cache)):
        check_room(part._replace(length=cache.length), new)
    check_room(cache, new, tokens.shape[1], "pad `tokens` to width ")
    require(min(value_range(cache.length), default=1) > 0, "a row of one known token: speculation "
            "needs two or more, all but the last in the cache")


# What a round of speculation starts from:
#     tokens  BS, the known ones of each row and free places
#     cache   lacks the last known token of each row
#     state   the draft's
#     counts  B(n+1): in how many rounds a row accepted 0, 1, .. n proposals
Round = namedtuple("Round", "tokens cache state counts")


def speculate(params, cache, tokens, key, n, cfg, draft, state, n_draft, sampling=GREEDY, end=None,
              where=HERE):
    """Params, Cache, BS, key, n, cfg, draft, state, n_draft -> BS, Cache, state, counts: n tokens
    or more per row.

    Row b's first cache.length[b] + 1 tokens are known, and the cache holds all but the last of
    them: after `prefill`, roll one back. The same is true of the results, so that they can be
    continued. A row stops after n new tokens, up to n_draft more, or at an `end` token, which then
    fills the row; a row whose last known token is one has stopped.

    In a round, `draft(key, tokens, length, state, n_draft, V) -> Bn, BnV, state` proposes n_draft
    tokens, one pass reads them, and each row gets those that it accepts and one more. counts[b, i]
    is the number of rounds in which i were accepted. The tokens are distributed as those of
    `generate` for any draft, and equal to them at temperature 0, except for ties within rounding.
    draft, n_draft and what `generate` says are static. ValueError where there is no room for
    n + n_draft more.
    """
    check_speculation(cache, tokens, n, cfg, state, n_draft)
    slots, index = jnp.arange(jnp.shape(tokens)[1]), jnp.arange(n_draft + 1)

    def body(parts, params, cache, tokens, keys, state):
        goal = cache.length + n

        def last_known(r):
            return last_token(r.tokens, r.cache.length + 1)

        def goes_on(r):
            return (r.cache.length < goal) & ~is_end(last_known(r), end)[:, 0]

        def advance(r):
            length = r.cache.length + 1
            proposals, logp_draft, state = draft(keys, r.tokens, length, r.state, n_draft, cfg.V)
            require(logp_draft.shape[2] == cfg.V, f"a draft of V={logp_draft.shape[2]} for a model "
                    f"of V={cfg.V}: they must share a vocabulary")
            read = jnp.concatenate([last_token(r.tokens, length), proposals], 1)
            x, cache = append(parts, params, r.cache, read, cfg)
            # `sample` folds in positions, from 0 on: -length gives other keys
            count, token = accept(fold_in(keys, -length), proposals, logp_draft, log_probs(
                parts.gather(parts.unembed(params, x, cfg)), sampling))
            new = jnp.where(index < count[:, None], jnp.roll(read, -1, 1), token[:, None])
            ends = is_end(new, end) | (index == count[:, None])  # nothing counts after an end token
            count = jnp.argmax(ends, 1).astype("int32")
            gain = goes_on(r) * (count + 1)
            at = jnp.where(index < gain[:, None], length[:, None] + index, slots.size)
            rows = jnp.arange(len(at))
            return Round(r.tokens.at[rows[:, None], at].set(new, mode="drop"),
                         cache._replace(length=r.cache.length + gain), state,
                         r.counts.at[rows, count].add(gain > 0))

        counts = jnp.zeros_like(tokens, shape=(len(tokens), index.size))
        r = lax.while_loop(lambda r: jnp.any(goes_on(r)), advance,
                           Round(tokens, cache, state, counts))
        last = last_known(r)
        fill = is_end(last, end) & (slots > r.cache.length[:, None])
        return jnp.where(fill, last, r.tokens), *r[1:]

    return where.run(cfg, body, ("tokens", "cache", "state", "counts"), params, cache,
                     jnp.asarray(tokens, "int32"), row_keys(key, len(tokens)), state)


# ----------------------------------------------------------------------------------- what they cost


def prefill_flops(cfg, B, T):
    """cfg, int, int -> dict: `forward_flops`, but only B positions are unembedded, not B*T."""
    return product_flops(cfg, B * T, B, B * causal_pairs(T))


def decode_flops(cfg, B, S, T=1):
    """cfg, int, int, int -> dict: `extend` by T tokens and `unembed`: each token meets S slots."""
    return product_flops(cfg, B * T, B * T, B * T * S)


def kv_bytes(cfg, B, S, dtype="float32"):
    """cfg, int, int, dtype -> int: keys and values of S slots in B rows, for all layers.

    int8 adds a float32 scale per row, head and slot.
    """
    dtype = jnp.dtype(dtype)
    return 2 * cfg.L * B * cfg.K * S * (cfg.D * dtype.itemsize + 4 * (dtype == "int8"))


def array_bytes(name, cfg, dtype):
    """str, cfg, dtype -> int: bytes of one array of `dims` in a model with weights of that dtype;
    an empty name means one number.

    In int8 each output of a matrix has a float32 scale, and norm scales stay in cfg.dtype.
    """
    int8 = jnp.dtype(dtype) == "int8"
    if int8 and " " in name:
        return size_of(name, cfg) + 4 * size_of(name.split()[0], cfg)
    return size_of(name, cfg) * jnp.dtype(cfg.dtype if int8 else dtype).itemsize


def read_arrays(cfg):
    """cfg -> Params: names of the arrays that a step reads whole: not a table that is only looked
    up."""
    return dims(cfg)._replace(embed="V E" if cfg.tied else None)


def multiplied(cfg):
    """cfg -> int: parameters in matmuls: all but norms and an untied embedding table."""
    return sum(size_of(name, cfg) for name in tree.leaves(read_arrays(cfg)) if " " in name)


def weight_bytes(cfg, dtype=None):
    """cfg, dtype -> int: all weights that a step reads."""
    return sum(array_bytes(name, cfg, dtype or cfg.dtype)
               for name in tree.leaves(read_arrays(cfg)))


def decode_bytes(cfg, B, S, T=1, cache_dtype="float32", dtype=None):
    """cfg, int, int, int, dtype -> dict: bytes read and written by `extend` of T tokens and
    `unembed`. Weights are read once for any B."""
    dtype = dtype or cfg.dtype
    row = array_bytes("V E" if cfg.tied else "VE", cfg, dtype) // cfg.V
    return {"weights": weight_bytes(cfg, dtype), "embed": B * T * row,
            "cache_read": kv_bytes(cfg, B, S, cache_dtype),
            "cache_write": kv_bytes(cfg, B, T, cache_dtype), "logits": B * T * cfg.V * 4}


# ------------------------------------------------------------------------------ Hugging Face files

WEIGHTS, STATE, INDEX = "model.safetensors", "state.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as files spell them
NAMES = dict(  # of each array in files
    embed="model.embed_tokens", out_norm="model.norm", unembed="lm_head",
    attn_norm="input_layernorm", wq="self_attn.q_proj", wk="self_attn.k_proj",
    wv="self_attn.v_proj", wo="self_attn.o_proj", q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm", mlp_norm="post_attention_layernorm", w_gate="mlp.gate_proj",
    w_up="mlp.up_proj", w_down="mlp.down_proj")
SIZES = dict(  # fields of Config, and their keys in config.json
    L="num_hidden_layers", E="hidden_size", H="num_attention_heads", K="num_key_value_heads",
    D="head_dim", F="intermediate_size", V="vocab_size")
FIELDS = SIZES | dict(rope_base="rope_theta", eps="rms_norm_eps", tied="tie_word_embeddings",
                      dtype="torch_dtype")
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ALIASES = {"hidden_activation": "hidden_act", "type": "rope_type", "dtype": "torch_dtype"}
RULES = [  # what is implemented: in words, the types or values, and of which keys
    ("a whole number above 0", [int], *SIZES.values(), "max_position_embeddings", "sliding_window"),
    ("a number above 0", [int, float], "rms_norm_eps", "rope_theta", *SCALING),
    ("true or false", [True, False], "tie_word_embeddings", "use_sliding_window"),
    ("llama, mistral, gemma or qwen3", ["llama", "mistral", "gemma", "qwen3"], "model_type"),
    ("silu or gelu_pytorch_tanh", ["silu", "gelu_pytorch_tanh"], "hidden_act"),
    ("default or llama3", ["default", "llama3"], "rope_type"),
    ("1, or nothing", [1], "partial_rotary_factor"),
    ("false, or nothing", [False], "attention_bias", "mlp_bias", "quantization_config")]


DEFAULTS = {  # of keys that a family's config.json may leave out; null is another matter
    "mistral": {"num_key_value_heads": 8}, "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True}}


def tensor_names(cfg):
    """cfg -> Params: each array's name in Hugging Face's files: see `NAMES`."""
    def name(path, _):
        *layer, field = path
        prefix = f"model.layers.{layer[1].idx}." if layer else ""
        return f"{prefix}{NAMES[field.name]}.weight"

    return tree.map_with_path(name, dims(cfg))


def parse_config(config):
    """dict -> Config: of a config.json, as transformers 4 or 5 writes it; a key that is absent has
    its family's default, and one that is null none: as many key/value heads as query heads.
    ValueError that names the key that is missing, of the wrong type, or not implemented."""
    flat = {"rope_theta": 1e4, "torch_dtype": "float32", "model_type": "missing",
            "hidden_act": "silu", "rms_norm_eps": 1e-6}
    for place in config, config.get("rope_scaling") or {}, config.get("rope_parameters") or {}:
        require(isinstance(place, dict), f"config.json: rotary settings {place!r} are no object")
        flat |= {ALIASES.get(key, key): place[key] for key in place if place[key] is not None}
    gemma, qwen = (flat["model_type"] == family for family in ("gemma", "qwen3"))
    if gemma:
        flat["hidden_act"] = "gelu_pytorch_tanh"  # whatever its files say, as "gelu"
    for expected, allowed, *keys in RULES:
        for key in keys:
            value = flat.get(key)
            require(value is None or value in allowed
                    or type(value) in allowed and 0 < value < 2 ** 63,
                    f"config.json: {key}={value!r}: only {expected} is implemented")
    require(flat.get("sliding_window", math.inf) >= flat.get("max_position_embeddings", math.inf)
            or qwen and not flat.get("use_sliding_window"), "config.json: sliding_window is below "
            "max_position_embeddings: only attention to all earlier tokens is implemented")
    try:
        heads = flat["num_attention_heads"]
        defaults = DEFAULTS.get(flat["model_type"], {})
        flat = {"num_key_value_heads": heads, "head_dim": flat["hidden_size"] // heads,
                "tie_word_embeddings": False,
                **{key: defaults[key] for key in defaults.keys() - config.keys()},
                **flat, "rope_theta": flat["rope_theta"] * 1.0}
        return Config(**{field: flat[key] for field, key in FIELDS.items()},
                      act="silu" if flat["hidden_act"] == "silu" else "gelu",
                      embed_scale=gemma, qk_norm=qwen,
                      rope_scaling=tuple(flat[key] for key in SCALING)
                      if flat.get("rope_type") == "llama3" else None)
    except KeyError as error:
        raise ValueError(f"config.json: {error} is missing") from None


def read_json(path):
    """path -> dict. ValueError where there is no file, or no JSON object in it."""
    try:
        return {**json.loads(Path(path).read_bytes())}
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object that can be read: {error}") from None


def library():
    """-> module: safetensors, which checks and writes files. ValueError without the extra `hf`."""
    try:
        import safetensors.numpy
    except ImportError:
        raise ValueError('files of weights need the extra hf: pip install ".[hf]"') from None
    return safetensors


def open_tensors(path):
    """path -> dict, dict: the arrays of one file by name, and the config that `save` put into it,
    or {}. Arrays are mapped into memory: a part is read when it is used. ValueError where it is no
    safetensors file that can be read, or holds another dtype."""
    def array(dtype, shape, data_offsets):
        return data[start:][slice(*data_offsets)].view(DTYPES[dtype]).reshape(shape)

    safetensors = library()
    try:
        safetensors.safe_open(path, "numpy")  # checks the header and the size of every tensor
        data = np.asarray(np.memmap(path, mode="r"))
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:start]))
        metadata = header.pop("__metadata__", {})
        tensors = {name: array(**entry) for name, entry in header.items()}
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} is no safetensors file with {', '.join(DTYPES)}: {error}") from None
    return tensors, json.loads(metadata.get("minillm", "{}"))


def find_tensors(path):
    """path -> dict, dict: `open_tensors` of a folder. As in transformers, model.safetensors counts
    before an index of shards; where there is neither, a training state counts."""
    # the first that exists, or else model.safetensors
    file = max(map(path.joinpath, (WEIGHTS, INDEX, STATE)), key=Path.exists)
    if file.name != INDEX:
        return open_tensors(file)
    tensors = {}
    for shard in {*map(str, dict(read_json(file).get("weight_map", {})).values())}:
        tensors |= open_tensors(path / shard)[0]
    return tensors, {}


def read_params(path, tensors, cfg, shardings, dtype=None, prefix=""):
    """path, dict, cfg, shardings -> Params: the arrays whose names have this prefix. Gemma's norm
    scales are stored less one where there is no prefix. ValueError for an array that is missing, or
    of another shape."""
    def read(letters, name, sharding=None):
        array = tensors.get(prefix + name)
        shape = getattr(array, "shape", "missing")
        file_shape = tuple(size_of(word, cfg) for word in letters.split())
        require(shape == file_shape, f"{path}: tensor {prefix}{name} is {shape}: expected "
                f"{file_shape}, as the config says")

        def part(index):
            a = array.reshape(sizes(letters, cfg))[index]
            if cfg.embed_scale and not prefix and " " not in letters:
                return 1 + np.float32(a)
            return a.astype(dtype or a.dtype)

        if sharding is None:
            return jnp.asarray(part(...))
        return jax.make_array_from_callback(sizes(letters, cfg), sharding, part)

    places = shardings and shardings(cfg)  # None, too, is one device
    return tree.map(read, dims(cfg), tensor_names(cfg), *([places] if places else []))


def load(path, dtype=None, shardings=None):
    """path -> cfg, Params: a Hugging Face folder: config.json and model.safetensors, or shards.

    Llama 2 and 3, SmolLM2, TinyLlama, Mistral, Gemma 1 and Qwen 3 (dense), in the file's dtype
    (which becomes cfg.dtype) or in `dtype`. Gemma's files store norm scales less one; here they are
    whole, and float32, since bfloat16 would round the sum. An output head that differs from the
    embedding table is used, whatever config.json says of tying. `shardings` is a function of cfg
    that returns a Params of shardings, as `partial(shard.shardings, mesh=mesh, rules=shard.TENSOR)`
    does: each device is given its part of each array, and no more is read. ValueError that names
    what is not implemented, missing, unexpected, damaged or of another shape, and for a missing
    extra `hf`.
    """
    path = Path(path)
    tensors, config = find_tensors(path)
    config = config or read_json(path / "config.json")
    cfg, prefix = parse_config(config), "params." if "adam_step" in config else ""
    names = tensor_names(replace(cfg, tied=False))
    whole = {f"model.{name}": array for name, array in tensors.items()}
    if names.embed in whole:  # a model without a head, whose names lack the prefix
        tensors = whole
    head = tensors.get(names.unembed)
    if cfg.tied and head is not None:  # a tied matrix may have either name, or both
        cfg = replace(cfg, tied=np.array_equal(tensors.setdefault(names.embed, head), head))
    for name in sorted(tensors.keys() - {*tree.leaves(names)}):
        require(prefix or name.endswith("rotary_emb.inv_freq"),  # follows from the config
                f"{path}: tensor {name} is not part of the model that its config describes")
    params = read_params(path, tensors, cfg, shardings, dtype, prefix)
    return replace(cfg, dtype=params.embed.dtype.name), params


def load_state(path, shardings=None):
    """path -> cfg, Params, Adam: what `save_state` wrote, bit for bit, to resume training, split by
    `shardings` as in `load`. ValueError where the folder has no training state."""
    path = Path(path) / STATE
    tensors, config = open_tensors(path)
    require("adam_step" in config, f"{path} is no training state that save_state wrote")
    cfg = parse_config(config)
    params, m, v = (read_params(path, tensors, cfg, shardings, prefix=prefix)
                    for prefix in ("params.", "m.", "v."))
    return cfg, params, Adam(jnp.int32(config["adam_step"]), m, v)


def config_json(cfg):
    """cfg -> dict: its config.json. ValueError where no family of models is like it."""
    family = "gemma" if cfg.embed_scale else "qwen3" if cfg.qk_norm else "llama"
    config = {
        "architectures": [f"{family.title()}ForCausalLM"], "model_type": family,
        **{key: getattr(cfg, field) for field, key in FIELDS.items()},
        "hidden_act": "silu" if cfg.act == "silu" else "gelu_pytorch_tanh",
        "rope_scaling": cfg.rope_scaling and {
            "rope_type": "llama3", **dict(zip(SCALING, cfg.rope_scaling))}}
    require(parse_config(config) == cfg,
            f"{cfg} is not what config.json can say of it: {parse_config(config)}")
    return config


def host_arrays(cfg, params, prefix=""):
    """cfg, Params -> dict: the arrays that `read_params` reads, by name, on the host. Those split
    over several processes are gathered on each. ValueError for arrays of another cfg, or of a dtype
    that is not saved."""
    names, arrays = tensor_names(cfg), {}
    require(tree.structure(params) == tree.structure(names),
            "params hold other arrays than dims(cfg) names: int8 weights are not saved, and L, "
            "qk_norm and tied must be those that params were made with")
    for letters, name, w in zip(*map(tree.leaves, (dims(cfg), names, params))):
        require(w.shape == sizes(letters, cfg) and w.dtype.name in DTYPES.values(),
                f"{prefix}{name} is {w.dtype.name} {w.shape}: expected {sizes(letters, cfg)}, in "
                f"{', '.join(DTYPES.values())}")
        if not getattr(w, "is_fully_addressable", True):
            w = multihost_utils.process_allgather(w, tiled=True)
        w = np.asarray(w).reshape([size_of(word, cfg) for word in letters.split()])
        if cfg.embed_scale and not prefix and w.ndim == 1:
            w = np.float32(w) - 1
        arrays[prefix + name] = np.ascontiguousarray(w)
    return arrays


def put_in_place(path, write):
    """path, fn -> None: `write(new)` writes a file beside `path`, and one rename moves it
    there: a kill leaves the old file or the new one. Of several processes the first writes, and all
    wait."""
    new = path.with_name(f"{path.name}.new{jax.process_index()}")
    try:
        if not jax.process_index():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(new)
            new.chmod(0o644)  # safetensors makes files that only their owner can read
            new.replace(path)
    finally:
        new.unlink(missing_ok=True)
        multihost_utils.sync_global_devices(path.name)


def write_tensors(path, arrays, config):
    """path, dict, dict -> None: a file of arrays, with their config in its metadata."""
    put_in_place(path, partial(library().numpy.save_file, arrays, metadata={
        "format": "pt", "minillm": json.dumps(config)}))


def save(path, cfg, params, others=None):
    """path, cfg, Params -> None: a folder that `load` and transformers read.

    Writes model.safetensors, then config.json for other programs. `load` takes the config from the
    first file's metadata, and each file is put in place by one rename, so that a kill leaves the
    old model or the new one, whole. `others` are keys of config.json that `cfg` does not know, as
    {"eos_token_id": [2, 7]}; of an earlier config.json the token ids and max_position_embeddings
    are kept, and no other file is touched. Several processes all call
    it, with whole or global arrays; each holds the whole model in host memory, and the first
    writes. ValueError, before anything is written, for int8, for parameters that are not cfg's, and
    for a cfg that `load` would refuse.
    """
    path, arrays = Path(path), host_arrays(cfg, params)
    config = config_json(replace(cfg, dtype=params.embed.dtype.name))
    file = path / "config.json"
    earlier = read_json(file) if file.exists() else {}
    kept = {key: earlier[key] for key in earlier
            if key.endswith(("_token_id", "max_position_embeddings"))}
    write_tensors(path / WEIGHTS, arrays, config)
    put_in_place(file, lambda new: new.write_text(
        json.dumps({"max_position_embeddings": 131072, **kept, **(others or {}), **config},
                   indent=2)))


def save_state(path, cfg, params, adam):
    """path, cfg, Params, Adam -> None: a training state that `load_state` resumes bit for bit, and
    that `load` reads where there is no model.safetensors.

    One file, state.safetensors, holds the parameters in their dtype, both means, the step and the
    config. It is put in place, and checked before anything is written, as in `save`.
    """
    arrays = (host_arrays(cfg, params, "params.") | host_arrays(cfg, adam.m, "m.")
              | host_arrays(cfg, adam.v, "v."))
    write_tensors(Path(path) / STATE, arrays,
                  config_json(cfg) | {"adam_step": int(adam.step)})


# --------------------------------------------------------------------------------- texts and tokens


def byte_tokens(text):
    """str -> T: a byte a token, as int32; bytes of a command line that are no UTF-8, too."""
    return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8).astype(np.int32)


def byte_text(tokens):
    """T -> str: what is no UTF-8 shows as a replacement character."""
    return bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")


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
    256; the tokens that `ends` has end a text; `settled(ids)` is the number of leading tokens whose
    text no later token can change."""
    file = Path(path) / "tokenizer.json"
    if not file.exists():
        require(cfg.V == 256, f"{file} is missing, and V={cfg.V} is not 256, a model of bytes")
        return SimpleNamespace(encode=byte_tokens, decode=byte_text, ends=(), settled=len)
    try:
        from tokenizers import Tokenizer
        words = Tokenizer.from_file(str(file))
    except ImportError:
        raise ValueError(f'{file} needs the extra hf: pip install ".[hf]"') from None
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{file} is no tokenizer: {error}") from None
    words.no_truncation()  # files may set truncation and padding for training
    words.no_padding()

    def read(text):
        require(text.encode(errors="ignore").decode() == text, f"prompt {text!r} is no UTF-8")
        return words.encode(text).ids

    def settled(ids):  # a run of bytes, and of tokens without text, may become other characters
        n = len(ids)
        while n and (re.fullmatch("<0x[0-9A-F]{2}>", words.id_to_token(ids[n - 1]) or "")
                     or not words.decode(ids[n - 1:n])):
            n -= 1
        return n

    return SimpleNamespace(encode=read, decode=words.decode, ends=end_tokens(file.parent),
                           settled=settled)
