"""infer: prefill once, then generate one token after another, with an explicit KV cache.

Prefill is bound by flops: every weight meets B*T tokens. A decode step is bound by bytes: it reads
all weights and all S slots of the cache to make B tokens. Hence many rows at once (`serve`), fewer
bytes (int8), and a use for the idle flops (`speculate`). Letters as in minillm.py.

Functions that take `where` run on one device by default; a `shard.Where` splits them over several.
"""
import dataclasses
import json
import math
import operator
import pathlib
import re
from functools import lru_cache, partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random, tree, vmap
from jax.experimental import multihost_utils

from minillm import (Adam, Config, block, causal_attention, causal_pairs, check_tokens, dims, dot,
                     dots, embed, forward, frequencies, join_blocks, matmul, merge, normalize,
                     partial_attention, product, product_flops, require, rotary, size_of, sizes,
                     split_blocks, unembed, value_range)

TINY = 1.2e-38  # below it float32 flushes to zero
fold_in = vmap(random.fold_in)  # a key per row and a number per row -> a key per row

# --------------------------------------------------------------------------------------------- int8


class Q8(NamedTuple):
    """int8 numbers and float32 scales: q * scale. A weight of this type is weight-only int8: it is
    converted to the dtype of the activations in its matmul."""
    q: Any      # int8
    scale: Any  # float32, in the shape of q, with 1 for the contracted letters

    shape = property(lambda self: self.q.shape)
    dtype = property(lambda self: self.q.dtype)

    def rows(self, index, dtype):
        """These rows of the table, in a float dtype."""
        return (self.q[index] * self.scale[index]).astype(dtype)

    def matmul(self, x):
        """MC -> MO."""
        w = self.q.reshape(-1, x.shape[-1]).astype(x.dtype)
        return matmul(x, w) * self.scale.reshape(-1)


class Q8A8(Q8):
    """int8 weights times int8 activations (W8A8): each row of x is quantized, sums are int32."""
    def matmul(self, x):
        """MC -> MO."""
        x, w = quantize(x, -1), self.q.reshape(-1, x.shape[-1])
        return product(x.q, w, "int32") * x.scale * self.scale.reshape(-1)


def quantize(x, axes):
    """BTE, axes -> Q8: one scale for all of `axes`, which maps their largest magnitude to 127.

    q * scale is within scale / 2 of x; zeros stay zeros.
    """
    x = x.astype("float32")
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest) / 127
    return Q8(jnp.round(x / scale).astype("int8"), scale)


def dequantize(x, dtype="float32"):
    """Q8, dtype -> BTE: the numbers that it represents."""
    return (x.q * x.scale).astype(dtype)


def quantize_params(params, cfg, kind=Q8A8):
    """Params, cfg -> int8 Params: every matrix that is multiplied, with a scale for each output.

    `kind` is Q8 or Q8A8. Norm scales, and an embedding table that is only looked up, are cast to
    cfg.dtype, the dtype of the activations.
    """
    def leaf(name, w):
        contracted = tuple(range(-len(name.split()[-1]), 0))
        return kind(*quantize(w, contracted)) if " " in name else w.astype(cfg.dtype)

    names = dims(cfg) if cfg.tied else dims(cfg)._replace(embed="VE")
    return tree.map(leaf, names, params)


# ---------------------------------------------------------------------------------------- the cache


class Cache(NamedTuple):
    """Keys and values of the tokens so far: slot s of a row belongs to position s.

    Rows may differ in length. To roll tokens back, lower it: `cache._replace(length=...)`.
    """
    k: tuple     # L arrays BKSD, or Q8 of them with a scale per row, head and slot, BKS1; where
    # slots are split over n devices, BKnSD: see shard.stripe
    v: tuple
    length: Any  # B, int32: filled slots, which is also the position of the next token


CACHE_DTYPES = "float32", "bfloat16", "float16", "int8"


def init_cache(cfg, B, S, dtype="float32"):
    """cfg, int, int, dtype -> Cache: B empty rows of S slots.

    Every decode step reads all S slots, filled or not: start small and `resize`. In int8 a slot
    takes D + 4 bytes per head. ValueError for an empty cache, or another dtype than these four.
    """
    dtype = jnp.dtype(dtype)
    require(B > 0 and S > 0 and dtype.name in CACHE_DTYPES, f"a cache of {B} rows and {S} slots of "
            f"{dtype}: expected at least one of each, of {', '.join(CACHE_DTYPES)}")

    def layer():
        slots = jnp.zeros((B, cfg.K, S, cfg.D), dtype)
        return Q8(slots, jnp.zeros((B, cfg.K, S, 1), "float32")) if dtype == "int8" else slots

    k, v = (tuple(layer() for _ in range(cfg.L)) for _ in "kv")
    return Cache(k, v, jnp.zeros((B,), "int32"))


def slots_of(cache):
    """Cache -> int: slots of a row: S of BKSD, or n times S where slots are split, BKnSD."""
    return math.prod(cache.k[0].shape[2:-1])


def check_room(cache, new, S=None):
    """Cache, int -> None: ValueError unless every row has room for `new` more tokens in S slots.

    Under jit lengths are unknown, and only `new` > S is refused. A write past the last slot is
    dropped, and later queries miss that token.
    """
    S = slots_of(cache) if S is None else S
    require(new >= 0 and S > 0, f"{new} new tokens in {S} slots: expected 0 or more in one or more")
    longest = max(value_range(cache.length), default=0)
    require(longest + new <= S, f"{longest} tokens in the cache + {new} new > {S} slots: "
            f"init_cache or resize with S={longest + new}")


def check_rows(cache, tokens, new):
    """Cache, BT, int -> None: `check_room`, and ValueError unless tokens, or logits, have as many
    rows as the cache."""
    require(len(tokens) == len(cache.length), f"{len(tokens)} rows of tokens or logits for a cache "
            f"of {len(cache.length)}: init_cache(B={len(tokens)})")
    check_room(cache, new)


def check_prompts(cache, tokens, lengths):
    """Cache, BT, B -> None: ValueError unless prompts and lengths fit each other and the cache."""
    (B, T), S = tokens.shape, slots_of(cache)
    require(T <= S, f"prompt of {T} tokens > {S} slots: init_cache(S={T})")
    require(jnp.shape(lengths) == (B,),
            f"lengths of shape {jnp.shape(lengths)} for {B} prompts: expected [{B}]")
    for length in value_range(lengths):
        require(1 <= length <= T, f"a prompt of length {length}: prompts padded to {T} tokens have "
                f"lengths of 1 to {T}")


def resize(cache, S):
    """Cache, S -> Cache: the same rows with S slots. ValueError where a row has more tokens."""
    check_room(cache, 0, S)
    require(cache.k[0].ndim == 4, "a cache whose slots are split cannot be resized: move it to "
            'another layout first: shard.Where(mesh, "batch").place_cache(cfg, cache)')

    def fit(a):
        return jnp.pad(a[:, :, :S], ((0, 0), (0, 0), (0, max(0, S - a.shape[2])), (0, 0)))

    return Cache(*tree.map(fit, cache[:2]), cache.length)


def to_cache(new, slots):
    """BKTD, BKSD -> BKTD: keys or values in the form of the cache: Q8, or its dtype, whose largest
    number replaces what is beyond it."""
    if isinstance(slots, Q8):
        return quantize(new, -1)
    largest = jnp.finfo(slots.dtype).max
    return new if new.dtype == slots.dtype else jnp.clip(new, -largest, largest).astype(slots.dtype)


def from_cache(slots, dtype):
    """BKTD, dtype -> BKTD: the keys or values that slots of a cache represent, as floats."""
    return dequantize(slots, dtype) if isinstance(slots, Q8) else slots.astype(dtype)


def write(slots, new, pos):
    """BKSD, BKTD, BT -> BKSD: store each row's T new tokens at the slots of their positions.

    In place in a donated cache, since every index is named: with a slice for the heads, compilers
    keep the cache in another layout and copy all of it. (XLA's CPU compiler copies a cache of one
    row and one head all the same.) Positions outside 0 to S - 1 are dropped.
    """
    B, K, *_ = new.shape
    index = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None], jnp.where(
        pos < 0, slots.shape[2], pos)[:, None]
    return tree.map(lambda slots, new: slots.at[index].set(new, mode="drop"), slots,
                        to_cache(new, slots))


def insert(slots, new, row=0):
    """BKSD, BKTD -> BKSD: store whole rows, from `row` on, at slots 0 to T - 1. Also for trees."""
    return tree.map(lambda slots, new: lax.dynamic_update_slice(slots, new, (row, 0, 0, 0)),
                        slots, new)


def cached_attention(q, k, v, pos, finish=normalize):
    """BTHD, BKSD, BKSD, BT -> BTHD: `attention` to a cache, int8 or not, over pieces of the slots:
    128, or with fewer than 8,192 tokens as many as make 2^20 scores per row and head.

    `finish` makes values of the Partial of all slots: see shard.normalize_over.
    """
    (_, T, H, _), (_, K, S, _) = q.shape, k.shape
    width = min(S, max(128, 2 ** 20 // T))
    rows, last = split_blocks(q, K)[0], jnp.repeat(pos, H // K, axis=1)[:, None, :, None]

    def piece(start, width):
        kv = tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, width, 2), (k, v))
        return partial_attention(rows, *kv, start + jnp.arange(width) <= last)

    part = piece(0, width)
    if width < S:
        part, _ = lax.scan(lambda part, start: (merge(part, piece(start, width)), None), part,
                           jnp.arange(width, S - width + 1, width))
    if S % width:
        part = merge(part, piece(S - S % width, S % width))
    return join_blocks(finish(part)[None], T, H).astype(q.dtype)


# ----------------------------------------------------------------------- a model around the cache


def attend_cache(q, k, v, old_k, old_v, pos):
    """BTHD, BKTD, BKTD, BKSD, BKSD, BT -> BTHD, (BKSD, BKSD): write new tokens to a layer's cache,
    then attend to all of it."""
    k, v = write(old_k, k, pos), write(old_v, v, pos)
    return cached_attention(q, k, v, pos), (k, v)


def attend_prompt(q, k, v, old_k, old_v, pos, row=0, insert=insert):
    """BTHD, BKTD, BKTD, BKSD, BKSD, BT -> BTHD, (BKSD, BKSD): fill slots 0 to T - 1 of the rows
    from `row` on, and attend to these tokens alone. They are rounded as in the cache, so that
    `extend` gives the same in any chunks."""
    old, new = (old_k, old_v), (to_cache(k, old_k), to_cache(v, old_v))
    rounded = (from_cache(a, q.dtype) for a in new)
    return causal_attention(q, *rounded), insert(old, new, row)


def run_layers(parts, params, cache, tokens, pos, length, cfg, attend):
    """Parts, Params, Cache, BT, BT, B, cfg, attend -> BTE, Cache: embed tokens and run all blocks,
    up to the final norm. `attend(q, k, v, old_k, old_v, pos)` returns a layer's BTHD and its pair
    of BKSD; `length` is that of the new cache."""
    x, table, kv = parts.embed(params, tokens, cfg), rotary(pos, cfg), []
    for w, *old in zip(params.layers, cache.k, cache.v, strict=True):
        x, new = block(x, w, table, cfg, lambda q, k, v: attend(q, k, v, *old, pos), parts.enter,
                       parts.leave)
        kv.append(new)
    return x, Cache(*zip(*kv, strict=True), length)


def append(parts, params, cache, tokens, cfg):
    """Parts, Params, Cache, BT, cfg -> BTE, Cache: `extend` on each device."""
    T = tokens.shape[1]
    pos = cache.length[:, None] + jnp.arange(T)
    return run_layers(parts, params, cache, tokens, pos, cache.length + T, cfg, parts.attend)


def read_prompts(parts, params, cache, tokens, lengths, cfg, **row):
    """Parts, Params, Cache, BT, B, cfg -> BV, Cache: `prefill` on each device, of the rows from
    `row` on where it is given."""
    pos = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, cache = run_layers(parts, params, cache, tokens, pos, lengths, cfg,
                          partial(parts.attend_prompt, **row))
    last = x[jnp.arange(len(x)), lengths - 1][:, None]
    return parts.unembed(params, last, cfg)[:, 0], cache


# ----------------------------------------------------------------------------------------- sampling


def one_hot(token, V):
    """..., V -> ...V: log-probabilities of a certain token."""
    return jnp.where(jnp.arange(V) == token[..., None], jnp.float32(0), -jnp.inf)


def sampling(temperature, top_k, top_p):
    """temperature, top_k, top_p -> temperature, top_k, top_p: as Python numbers, on which a program
    can depend. ValueError where they are no numbers or make no distribution."""
    try:
        numbers = float(temperature), operator.index(top_k), float(top_p)
    except (TypeError, ValueError, OverflowError):
        numbers = math.nan, 0, 1
    require(0 <= numbers[0] < math.inf and numbers[1] >= 0 and 0 < numbers[2] <= 1,
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected numbers, static "
            "under jit: a finite temperature >= 0, an integer top_k >= 0, 0 < top_p <= 1")
    return numbers


def row_max(x):
    """BV -> B1: each row's largest number."""
    return jnp.max(x, axis=-1, keepdims=True)


def kth_largest(x, k):
    """BV, int -> B1: each row's k-th largest number, or its smallest where V < k."""
    return lax.top_k(x, min(k, x.shape[-1]))[0][..., -1:]


def no_nan(logits):
    """BV -> BV: in float32, with -inf for NaN."""
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits.astype("float32"))


def filter_logits(logits, temperature, top_k=0, top_p=1.0, row_max=row_max, kth=kth_largest):
    """BV, temperature, top_k, top_p -> BV: log-probabilities up to a constant per row, in float32;
    what is filtered out is -inf. For a temperature above 0.

    What is not finite: a logit of NaN or -inf is never drawn, +inf is certain, and a row of NaN and
    -inf alone is uniform. `row_max` and `kth` are replaced where V is split.
    """
    logits = no_nan(logits)
    largest = row_max(logits)
    logits = jnp.where(logits == largest, 0, logits - largest) / min(temperature, 1 / TINY)
    if top_k:
        logits = jnp.where(logits < kth(logits, top_k), -jnp.inf, logits)
    if top_p < 1:
        falling = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(falling, axis=-1)
        keep = jnp.cumsum(p, axis=-1) - p < max(top_p, TINY)  # always the first
        smallest = jnp.min(jnp.where(keep, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def log_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """BV -> BV: the log-probabilities that `sample` draws from, normalized, in float32.

    Divides by the temperature, keeps the top_k largest (0: all), then the most probable tokens that
    together reach top_p; ties with the last one are kept. A temperature below TINY is greedy: all
    on the first of the largest. What is not finite: see `filter_logits`. ValueError where the three
    make no distribution.
    """
    temperature, top_k, top_p = sampling(temperature, top_k, top_p)
    if temperature < TINY:
        return one_hot(jnp.argmax(no_nan(logits), axis=-1), logits.shape[-1])
    return jax.nn.log_softmax(filter_logits(logits, temperature, top_k, top_p), axis=-1)


def row_keys(key, B):
    """key, int -> keys: a key per row, folded from one key by row number; B keys stay.

    Keys of any kind become threefry keys, made of their first two words: under vmap, "rbg" would
    draw a whole batch from its first key. ValueError for another number of keys than rows.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = random.key_data(key) if typed else key
    keys = random.wrap_key_data(words[..., :2], impl="threefry2x32")
    require(keys.shape in ((), (B,)),
            f"keys of shape {keys.shape} for {B} rows: expected one key, or one per row")
    return keys if keys.ndim else fold_in(jnp.broadcast_to(keys, B), jnp.arange(B))


def noise(key, pos, V):
    """key, B, V -> BV: Gumbel noise for each row and position. Added to log-probabilities, the
    largest sum is a draw."""
    keys = fold_in(row_keys(key, len(pos)), pos)
    return vmap(lambda key: random.gumbel(key, (V,), "float32"))(keys)


@jax.named_scope("sample")
def sample(key, logits, pos, temperature, top_k, top_p):
    """key, BV, B, temperature, top_k, top_p -> B: a token per row, drawn from `log_probs`.

    The draw depends on key, row and position alone, so a run that stops and goes on draws what one
    longer run draws. `key` may also be B keys, one per row.
    """
    temperature, top_k, top_p = sampling(temperature, top_k, top_p)
    scores = no_nan(logits)
    if temperature >= TINY:
        scores = filter_logits(logits, temperature, top_k, top_p)
        scores = scores + noise(key, pos, logits.shape[-1])
    return jnp.argmax(scores, axis=-1).astype("int32")


# ------------------------------------------------------------------------ prefill, extend, generate


class Parts(NamedTuple):
    """The functions that a generating model is made of, and where it runs: here, on one device.

    shard.Where has other parts, for each device of a mesh, and its own `run` and `empty`.
    """
    embed: Callable = embed                  # Params, BT, cfg -> BTE
    enter: Callable = dots                   # the hooks of minillm.block
    leave: Callable = dot
    attend: Callable = attend_cache          # q, k, v, old_k, old_v, pos -> BTHD, (k, v)
    attend_prompt: Callable = attend_prompt  # the same, and row=
    read: Callable = read_prompts            # all of a prefill
    unembed: Callable = unembed              # Params, BTE, cfg -> BTV
    gather: Callable = lambda logits: logits         # BTV -> BTV, where V is split
    sample: Callable = sample                # key, BV, B, temperature, top_k, top_p -> B
    one_hot: Callable = one_hot              # B, V -> BV
    local_row: Callable = lambda row, B: row         # a row's number on the device that has it

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
    check_tokens(tokens, cfg)
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
    check_tokens(tokens, cfg)
    check_rows(cache, tokens, 0)
    check_prompts(cache, tokens, lengths)
    B, T = tokens.shape
    require(rows is None or type(rows) is int and rows > 0 and B % rows == 0
            and isinstance(where, Parts), f"rows={rows!r} at a time of {B} prompts: choose an int "
            f"that divides {B} (under jit, name it in static_argnames), or on a mesh None")

    def body(parts, params, cache, tokens, lengths):
        if rows in (None, B):
            return parts.read(parts, params, cache, tokens, lengths, cfg)

        def step(cache, group):
            row, *prompts = group
            logits, new = parts.read(parts, params, cache, *prompts, cfg, row=row)
            return cache._replace(k=new.k, v=new.v), logits

        groups = jnp.arange(0, B, rows), tokens.reshape(-1, rows, T), lengths.reshape(-1, rows)
        cache, logits = lax.scan(step, cache, groups)
        return logits.reshape(B, -1), cache._replace(length=lengths)

    return where.run(cfg, body, ("logits", "cache"), params, cache, tokens,
                     jnp.asarray(lengths, "int32"))


def generate(params, cache, logits, key, n, cfg, temperature=0.0, top_k=0, top_p=1.0, end=None,
             where=HERE):
    """Params, Cache, BV, key, n, cfg -> Bn, BV, Cache: n tokens per row, in one scan on the device.

    `logits` are those of the next token, from `prefill` or an earlier `generate`; the new ones are
    returned, to continue with. A row that draws `end` stops: its length stays before it and its
    logits are all on `end`, so that it draws nothing else, in a later call too. n, temperature,
    top_k, top_p, end and where are static under `jax.jit`. ValueError where the cache has no room
    for n tokens.
    """
    check_rows(cache, logits, n)

    def body(parts, params, cache, logits, keys):
        def step(state, _):
            cache, logits = state
            token = parts.sample(keys, logits, cache.length, temperature, top_k, top_p)
            x, new = append(parts, params, cache, token[:, None], cfg)
            new_logits = parts.unembed(params, x, cfg)[:, 0]
            if end is not None:
                goes_on = token != end
                new = new._replace(length=jnp.where(goes_on, new.length, cache.length))
                new_logits = jnp.where(goes_on[:, None], new_logits, parts.one_hot(token, cfg.V))
            return (new, new_logits), token

        (cache, logits), tokens = lax.scan(step, (cache, logits), length=n)
        return tokens.T, logits, cache

    return where.run(cfg, body, ("tokens", "logits", "cache"), params, cache,
                     logits.astype("float32"), row_keys(key, len(logits)))


def generate_reference(params, prompt, n, cfg):
    """Params, BT, n, cfg -> Bn: the definition of greedy decoding: all tokens are read again for
    each new one."""
    T = prompt.shape[1]

    def step(t, tokens):
        logits = forward(params, tokens, cfg)[:, t - 1]  # does not depend on tokens at t and later
        return tokens.at[:, t].set(jnp.argmax(logits, axis=-1).astype(tokens.dtype))

    return lax.fori_loop(T, T + n, step, jnp.pad(prompt, ((0, 0), (0, n))))[:, T:]


# ------------------------------------------------------------------------- many requests, few rows


def refill(params, cache, logits, row, prompt, length, cfg, where=HERE):
    """Params, Cache, BV, int, 1T, 1, cfg -> BV, Cache: one row starts over with a prompt; the other
    rows do not change."""
    def body(parts, params, cache, logits, row, prompt, length):
        first, new = read_prompts(parts, params, cache, prompt, length, cfg, row=row)
        row = parts.local_row(row, len(logits))
        return logits.at[row].set(first[0], mode="drop"), new._replace(
            length=cache.length.at[row].set(new.length[0], mode="drop"))

    return where.run(cfg, body, ("logits", "cache"), params, cache, logits, row, prompt, length)


def check_prompt(request, prompt, n, S, cfg):
    """int, tokens, n, S, cfg -> array: the prompt, 1T. ValueError, by its number, if it does not
    fit."""
    prompt = np.asarray(prompt)[None]
    try:
        check_tokens(prompt, cfg)
    except ValueError as error:
        raise ValueError(f"request {request}: {error}") from None
    require(prompt.size + n <= S, f"request {request}: prompt of {prompt.size} tokens + {n} to "
            f"generate > {S} slots: serve(S={prompt.size + n})")
    return prompt


def serve(params, prompts, B, S, n, key, cfg, temperature=0.0, top_k=0, top_p=1.0, end=None,
          stride=8, cache_dtype="float32", where=HERE):
    """Params, prompts, B, S, n, key, cfg -> iterator of (int, tokens): continuous batching.

    Any iterable of prompts goes through B rows of S slots. Each request gets n tokens, or fewer
    where the last is `end`; it is yielded with its number as soon as it is done, and the next
    prompt takes its row while the others go on. The host looks at the rows every `stride` tokens.
    The tokens of request i do not depend on its neighbours: they are those that `generate` makes
    in any B rows, with the row's key `jax.random.fold_in(key, i)`. With another number of rows ties
    within rounding may fall otherwise, more often in bfloat16, since sums run in another order.

    This is the one loop that runs on the host, so it compiles its two steps itself; prompts are
    padded to powers of two, for few programs. ValueError for a prompt that does not fit, when it is
    taken; the prompts of a list are all checked before the first is taken, which happens when the
    iterator is first advanced.
    """
    require(n > 0 and stride > 0, f"n={n}, stride={stride}: expected at least one token of each")
    fill = jax.jit(refill, static_argnames=("cfg", "where"), donate_argnames=("cache", "logits"))
    advance = jax.jit(generate, donate_argnames=("cache", "logits"), static_argnames=(
        "n", "cfg", "temperature", "top_k", "top_p", "end", "where"))
    temperature, top_k, top_p = sampling(temperature, top_k, top_p)
    checked = (check_prompt(i, prompt, n, S, cfg) for i, prompt in enumerate(prompts))
    waiting = enumerate(list(checked) if hasattr(prompts, "__len__") else checked)
    cache, logits = where.empty(cfg, B, S, cache_dtype)
    requests, outputs = np.full(B, -1), [[] for _ in range(B)]
    while True:
        for row in np.flatnonzero(requests < 0):
            requests[row], prompt = next(waiting, (-1, None))
            if prompt is not None:
                T = min(S, 1 << max(4, (prompt.size - 1).bit_length()))
                padded = np.pad(prompt, ((0, 0), (0, T - prompt.size)))
                logits, cache = fill(params, cache, logits, row, padded,
                                     np.array([prompt.size], np.int32), cfg=cfg, where=where)
        if np.all(requests < 0):
            return
        # one key after another: vmap gives some kinds of key other results
        keys = lax.map(partial(random.fold_in, key), jnp.asarray(requests))
        tokens, logits, cache = advance(
            params, cache, logits, keys, n=min(stride, n), cfg=cfg, temperature=temperature,
            top_k=top_k, top_p=top_p, end=end, where=where)
        for row, new in enumerate(np.asarray(tokens)):
            output = [*outputs[row], *new][:n]
            output = output[:output.index(end) + 1] if end in output else output
            done = len(output) == n or output[-1] == end
            if done and requests[row] >= 0:
                yield int(requests[row]), np.array(output)
                requests[row] = -1
            outputs[row] = [] if done else output


# -------------------------------------------------------------------------------------- speculation


def acceptance(proposals, logp_draft, logp_target):
    """Bn, BnV, B(n+1)V -> Bn, B(n+1)V: the rule of speculative decoding, without any draw.

    The first result is the probability with which each of n proposals is accepted: min(1, p / q),
    with the target's probability p and the draft's q. The second is the distribution of the token
    that replaces the first rejected proposal: the positive part of p - q, normalized; and last,
    after n accepted ones, p itself. What comes out is distributed as p for any q. arXiv:2211.17192.
    """
    p, q = jnp.exp(logp_target), jnp.exp(logp_draft)
    p_next, bonus = p[:, :-1], p[:, -1:]
    p_at, q_at = (jnp.take_along_axis(d, proposals[..., None], -1)[..., 0] for d in (p_next, q))
    probability = jnp.where(p_at < q_at, p_at / q_at, p_at > 0)
    excess = jnp.maximum(p_next - q, 0)
    total = jnp.sum(excess, axis=-1, keepdims=True)
    residual = jnp.where(total > 0, excess / total, p_next)  # p = q is never rejected
    return probability, jnp.concatenate([residual, bonus], axis=1)


def accept(key, proposals, logp_draft, logp_target):
    """key, Bn, BnV, B(n+1)V -> B, B: how many proposals a row keeps, and the token after them,
    drawn from what `acceptance` returns. `key` may also be B keys."""
    def draw(key, probability, residual):
        accept_key, token_key = random.split(key)
        keep = random.uniform(accept_key, probability.shape, probability.dtype) < probability
        count = jnp.sum(jnp.cumprod(keep.astype("int32")), dtype="int32")
        token = random.categorical(token_key, jnp.log(residual[count]))
        return count, token.astype("int32")

    keys = row_keys(key, len(proposals))
    return vmap(draw)(keys, *acceptance(proposals, logp_draft, logp_target))


def last_token(tokens, length):
    """BS, B -> B: the last of each row's first length[b] tokens."""
    return jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]


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
        token = last_token(tokens, length - back)[:, None]
        same = same & (index >= back) & (jnp.roll(tokens, back, axis=1) == token)
        run = run + same
    best = jnp.argmax(jnp.where(before_last, run * len(index) + index, -1), axis=1)
    period = (length - 1 - best)[:, None]
    proposals = jnp.take_along_axis(tokens, best[:, None] + 1 + jnp.arange(n) % period, axis=1)
    return proposals, one_hot(proposals, V), state


@lru_cache
def model_draft(cfg, temperature=0.0, top_k=0, top_p=1.0):
    """cfg -> draft: n tokens of a smaller model, whose state is its Params and its Cache, which
    holds what the target's cache holds. Equal arguments give the same function, for `jax.jit`."""
    def draft(key, tokens, length, state, n, V):
        params, cache = state

        def step(carry, _):
            cache, logits = carry
            token = sample(key, logits, cache.length, temperature, top_k, top_p)
            x, cache = append(HERE, params, cache, token[:, None], cfg)
            logp = log_probs(logits, temperature, top_k, top_p)
            return (cache, unembed(params, x, cfg)[:, 0]), (token, logp)

        last = last_token(tokens, length)[:, None]
        x, cache = append(HERE, params, cache._replace(length=length - 1), last, cfg)
        (cache, _), outputs = lax.scan(step, (cache, unembed(params, x, cfg)[:, 0]), length=n)
        return *(jnp.moveaxis(a, 0, 1) for a in outputs), (params, cache)

    return draft


def cut_at_end(new, count, end):
    """B(n+1), B, end -> B: count, or the place of an earlier end token, after which nothing counts.
    """
    ends = (new == end) | (jnp.arange(new.shape[1]) == count[:, None])
    return jnp.argmax(ends, axis=1).astype("int32")


def check_speculation(cache, tokens, n, cfg, state, n_draft):
    """Cache, BS, n, cfg, state, n_draft -> None: ValueError unless rows have room for all new
    tokens, in the caches and in `tokens`."""
    check_tokens(tokens, cfg)
    check_rows(cache, tokens, n)
    S, new, lengths = tokens.shape[1], n + n_draft + 1, value_range(cache.length) or (1, 0)
    require(n_draft > 0, f"n_draft={n_draft}: a draft proposes at least one token")
    for part in tree.leaves((cache, state), is_leaf=lambda part: isinstance(part, Cache)):
        if isinstance(part, Cache):
            check_room(part._replace(length=cache.length), new)
    require(lengths[1] + new <= S, f"tokens of width {S} for {lengths[1] + 1} known + {n} new + "
            f"{n_draft} proposed: pad them to {lengths[1] + new}")
    require(lengths[0] > 0, "a row of one known token: speculation needs two or more, all but the "
            "last in the cache")


class Round(NamedTuple):
    """What a round of speculation starts from; the cache lacks the last known token of each row."""
    tokens: Any   # BS
    cache: Cache
    state: Any    # the draft's
    counts: Any   # B(n+1): in how many rounds a row accepted 0, 1, .. n proposals


def verify(parts, params, cache, last, proposals, logp_draft, keys, cfg, *how):
    """Parts, Params, Cache, B, Bn, BnV, keys, cfg, temperature, top_k, top_p -> B, B(n+1), Cache:
    one forward pass over n proposals: how many a row keeps, those and the one after them. `last`
    are the last known tokens, which the cache lacks."""
    new = jnp.concatenate([last[:, None], proposals], axis=1)
    x, new_cache = append(parts, params, cache, new, cfg)
    logp = log_probs(parts.gather(parts.unembed(params, x, cfg)), *how)
    require(logp_draft.shape[2] == cfg.V, f"a draft of V={logp_draft.shape[2]} for a model of "
            f"V={cfg.V}: they must share a vocabulary")
    count, token = accept(fold_in(keys, cache.length + 1), proposals, logp_draft, logp)
    kept = jnp.arange(new.shape[1]) < count[:, None]
    return count, jnp.where(kept, jnp.roll(new, -1, axis=1), token[:, None]), new_cache


def speculate(params, cache, tokens, key, n, cfg, draft, state, n_draft, temperature=0.0, top_k=0,
              top_p=1.0, end=None, where=HERE):
    """Params, Cache, BS, key, n, cfg, draft, state, n_draft -> BS, Cache, state, counts: n tokens
    or more per row.

    Row b's first cache.length[b] + 1 tokens are known, and the cache holds all but the last of
    them: after `prefill`, roll one back. The same is true of the results, so that they can be
    continued. A row stops after n new tokens, up to n_draft more, or at `end`, which then fills the
    row; a row whose last known token is `end` has stopped.

    In a round, `draft(key, tokens, length, state, n_draft, V) -> Bn, BnV, state` proposes n_draft
    tokens, `verify` reads them, and each row gets those that it accepts and one more. counts[b, i]
    is the number of rounds in which i were accepted. The tokens are distributed as those of
    `generate` for any draft, and equal to them at temperature 0, except for ties within rounding.
    draft, n_draft and what `generate` says are static. ValueError where there is no room for
    n + n_draft more.
    """
    check_speculation(cache, tokens, n, cfg, state, n_draft)
    slots, index = jnp.arange(tokens.shape[1]), jnp.arange(n_draft + 1)
    end = -1 if end is None else end  # which is no token

    def body(parts, params, cache, tokens, draft_keys, verify_keys, state):
        goal = cache.length + n

        def ended(r):
            return last_token(r.tokens, r.cache.length + 1) == end

        def goes_on(r):
            return (r.cache.length < goal) & ~ended(r)

        def advance(r):
            length = r.cache.length + 1
            proposals, logp, state = draft(draft_keys, r.tokens, length, r.state, n_draft, cfg.V)
            count, new, cache = verify(
                parts, params, r.cache, last_token(r.tokens, length), proposals, logp, verify_keys,
                cfg, temperature, top_k, top_p)
            count = cut_at_end(new, count, end)
            gain = jnp.where(goes_on(r), count + 1, 0)
            at = jnp.where(index < gain[:, None], length[:, None] + index, slots.size)
            rows = jnp.arange(len(at))
            return Round(r.tokens.at[rows[:, None], at].set(new, mode="drop"),
                         cache._replace(length=r.cache.length + gain), state,
                         r.counts.at[rows, count].add(jnp.minimum(gain, 1)))

        counts = jnp.zeros_like(tokens, shape=(len(tokens), n_draft + 1))
        r = lax.while_loop(lambda r: jnp.any(goes_on(r)), advance,
                           Round(tokens, cache, state, counts))
        fill = ended(r)[:, None] & (slots > r.cache.length[:, None])
        return jnp.where(fill, end, r.tokens), r.cache, r.state, r.counts

    keys = vmap(random.split, out_axes=1)(row_keys(key, len(tokens)))
    return where.run(cfg, body, ("tokens", "cache", "state", "counts"), params, cache,
                     jnp.asarray(tokens, "int32"), *keys, state)


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


def float_bytes(cfg, dtype):
    """cfg, dtype -> int: bytes of a number that is not int8, where weights are of that dtype."""
    return jnp.dtype(cfg.dtype if jnp.dtype(dtype) == "int8" else dtype).itemsize


def array_bytes(name, cfg, dtype):
    """str, cfg, dtype -> int: of one array of `dims`, where weights are of that dtype.

    In int8 each output of a matrix has a float32 scale, and norm scales stay in cfg.dtype.
    """
    if " " in name and jnp.dtype(dtype) == "int8":
        return size_of(name, cfg) + 4 * size_of(name.split()[0], cfg)
    return size_of(name, cfg) * float_bytes(cfg, dtype)


def read_arrays(cfg):
    """cfg -> Params: names of the arrays that a step reads whole: not a table that is only looked
    up."""
    return dims(cfg)._replace(embed="V E" if cfg.tied else None)


def weight_bytes(cfg, dtype=None):
    """cfg, dtype -> int: all weights that a step reads."""
    return sum(array_bytes(name, cfg, dtype or cfg.dtype)
               for name in tree.leaves(read_arrays(cfg)))


def decode_bytes(cfg, B, S, T=1, cache_dtype="float32", dtype=None):
    """cfg, int, int, int, dtype -> dict: bytes read and written by `extend` of T tokens and
    `unembed`. Weights are read once for any B."""
    dtype = jnp.dtype(dtype or cfg.dtype)
    row = array_bytes("V E", cfg, dtype) // cfg.V if cfg.tied else array_bytes("E", cfg, dtype)
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
DEFAULTS = dict(  # what an absent key means in every family, and in one
    hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False,
    max_position_embeddings=131072, torch_dtype="float32")
FAMILIES = dict(
    llama={}, mistral=dict(num_key_value_heads=8, sliding_window=4096),
    gemma=dict(num_key_value_heads=16, head_dim=256, tie_word_embeddings=True,
               hidden_act="gelu_pytorch_tanh"),
    qwen3=dict(num_key_value_heads=32, head_dim=128))
RULES = [  # what is implemented: in words, the types or values, and of which keys
    ("a whole number above 0", [int], *SIZES.values(), "max_position_embeddings", "sliding_window"),
    ("a number above 0", [int, float], "rms_norm_eps", "rope_theta", *SCALING),
    ("true or false", [True, False], "tie_word_embeddings", "use_sliding_window"),
    ("llama, mistral, gemma or qwen3", [*FAMILIES], "model_type"),
    ("silu or gelu_pytorch_tanh", ["silu", "gelu_pytorch_tanh"], "hidden_act"),
    ("default or llama3", ["default", "llama3"], "rope_type"),
    ("1, or nothing", [1], "partial_rotary_factor"),
    ("false, or nothing", [False], "attention_bias", "mlp_bias", "use_qk_norm", "qk_layernorm",
     "rope_interleaved", "use_bidirectional_attention", "attn_logit_softcapping",
     "final_logit_softcapping", "quantization_config", "full_attention", "sliding_attention")]


def tensor_names(cfg):
    """cfg -> Params: each array's name in Hugging Face's files: see `NAMES`."""
    def name(path, _):
        *layer, field = path
        prefix = f"model.layers.{layer[1].idx}." if layer else ""
        return f"{prefix}{NAMES[field.name]}.weight"

    return tree.map_with_path(name, dims(cfg))


def flat_config(config):
    """dict -> dict: the settings of a config.json, those of rotary positions beside all others, and
    a family's defaults. ValueError where two settings disagree."""
    family, flat = config.get("model_type"), {}
    for place in (config, config.get("rope_scaling"), config.get("rope_parameters")):
        settings = place or {}
        require(isinstance(settings, dict), f"config.json: rotary settings {place!r} are no object")
        for name, value in settings.items():
            key = ALIASES.get(name, name)
            if family == "gemma" and value == "gelu":
                value = "gelu_pytorch_tanh"  # Gemma's files mean the tanh form by either name
            if value is not None or key in ("sliding_window", "num_key_value_heads"):
                require(flat.setdefault(key, value) == value, f"config.json: {name}={value!r}, and "
                        f"elsewhere {flat[key]!r}: leave out the wrong one")
    return {**DEFAULTS, **FAMILIES.get(str(family), {}), **flat}


def parse_config(config):
    """dict -> Config: of a config.json, as transformers 5 reads it. ValueError that names the key
    that is missing, of the wrong type, or not implemented."""
    flat = flat_config(config)
    for expected, allowed, *keys in RULES:
        for key in keys:
            value = flat.get(key)
            require(value is None or value in allowed
                    or type(value) in allowed and 0 < value < 2 ** 63,
                    f"config.json: {key}={value!r}: only {expected} is implemented")
    layers = str(flat.get("layer_types", []))
    require(re.fullmatch(r"\[('full_attention'(, )?)*\]", layers), f"config.json: layer_types="
            f"{layers}: only full_attention is implemented")
    try:
        qwen, heads = flat["model_type"] == "qwen3", flat["num_attention_heads"]
        context = flat["max_position_embeddings"]
        window = flat.get("sliding_window") or context
        require(window >= context or qwen and not flat.get("use_sliding_window"),
                f"config.json: sliding_window={window} is below max_position_embeddings={context}, "
                "which is not implemented: every query attends to all tokens before it")
        flat["num_key_value_heads"] = flat.get("num_key_value_heads") or heads
        flat.setdefault("head_dim", flat["hidden_size"] // heads)
        flat["rope_theta"] *= 1.0  # as an integer it might exceed int32
        return Config(**{field: flat[key] for field, key in FIELDS.items()},
                      act="silu" if flat["hidden_act"] == "silu" else "gelu",
                      embed_scale=flat["model_type"] == "gemma", qk_norm=qwen,
                      rope_scaling=tuple(flat[key] for key in SCALING)
                      if flat.get("rope_type") == "llama3" else None)
    except KeyError as error:
        raise ValueError(f"config.json: {error} is missing") from None


def read_json(path):
    """path -> dict. ValueError where there is no file, or no JSON object in it."""
    try:
        return {**json.loads(pathlib.Path(path).read_bytes())}
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
        raise ValueError(f"{path} is no safetensors file of {', '.join(DTYPES)}: {error}") from None
    return tensors, json.loads(metadata.get("minillm", "{}"))


def find_tensors(path):
    """path -> dict, dict: `open_tensors` of a folder. As in transformers, model.safetensors counts
    before an index of shards; where there is neither, a training state counts."""
    files = (path / name for name in (WEIGHTS, INDEX, STATE))
    file = max(files, key=pathlib.Path.exists)  # the first that exists, or else model.safetensors
    if file.name != INDEX:
        return open_tensors(file)
    shards, tensors = read_json(file).get("weight_map"), {}
    require(isinstance(shards, dict), f"{file} has no weight_map of tensors and files")
    opened = lru_cache(lambda shard: open_tensors(path / shard)[0])
    for name, shard in shards.items():
        plain = re.fullmatch(r"[^/\\\0]+\.safetensors", str(shard))
        require(plain and name in opened(shard), f"{file} says that {name} is in {shard!r}: "
                "expected a safetensors file in its folder that holds it")
        tensors[name] = opened(shard)[name]
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
                return 1 + a.astype(np.float32)
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
    path = pathlib.Path(path)
    tensors, config = find_tensors(path)
    config = config or read_json(path / "config.json")
    cfg, prefix = parse_config(config), "params." if "adam_step" in config else ""
    require(cfg.L < len(tensors), f"{path}: {len(tensors)} tensors in files, and config.json says "
            f"num_hidden_layers={cfg.L}")
    names = tensor_names(dataclasses.replace(cfg, tied=False))
    head = tensors.get(names.unembed)
    if cfg.tied and head is not None:  # a tied matrix may have either name, or both
        same = np.array_equal(tensors.setdefault(names.embed, head), head)
        cfg = dataclasses.replace(cfg, tied=same)
    for name in tensors.keys() - {*tree.leaves(names)}:
        require(prefix or name.endswith("rotary_emb.inv_freq") and np.allclose(
            np.resize(frequencies(cfg), tensors[name].shape), tensors[name], 2 ** -8, 6e-8),
            f"{path}: tensor {name} is not part of the model that its config describes")
    params = read_params(path, tensors, cfg, shardings, dtype, prefix)
    return dataclasses.replace(cfg, dtype=params.embed.dtype.name), params


def load_state(path, shardings=None):
    """path -> cfg, Params, Adam: what `save_state` wrote, bit for bit, to resume training, split by
    `shardings` as in `load`. ValueError where the folder has no training state."""
    path = pathlib.Path(path) / STATE
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
            w = w.astype(np.float32) - 1
        arrays[prefix + name] = np.ascontiguousarray(w)
    return arrays


def put_in_place(path, write):
    """path, fn -> None: `write(new)` writes a file beside `path`, and one rename moves it
    there: a kill leaves the old file or the new one. Of several processes the first writes, and all
    wait."""
    new = path.with_name(f"{path.name}.new{jax.process_index()}")
    try:
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(new)
            new.chmod(0o644)  # safetensors makes files that only their owner can read
            new.replace(path)
    finally:
        new.unlink(missing_ok=True)
        multihost_utils.sync_global_devices(path.name)


def write_tensors(path, arrays, config):
    """path, dict, dict -> None: a file of arrays, with their config in its metadata."""
    metadata = {"format": "pt", "minillm": json.dumps(config)}
    put_in_place(path, partial(library().numpy.save_file, arrays, metadata=metadata))


def save(path, cfg, params):
    """path, cfg, Params -> None: a folder that `load` and transformers read.

    Writes model.safetensors, then config.json for other programs. `load` takes the config from the
    first file's metadata, and each file is put in place by one rename, so that a kill leaves the
    old model or the new one, whole. Keys of an earlier config.json that are no fields of Config,
    such as end tokens, stay, and no other file is touched. Several processes all call it, with
    whole or global arrays; each holds the whole model in host memory, and the first writes.
    ValueError, before anything is written, for int8, for parameters that are not cfg's, and for a
    cfg that `load` would refuse.
    """
    path, arrays = pathlib.Path(path), host_arrays(cfg, params)
    config = config_json(dataclasses.replace(cfg, dtype=params.embed.dtype.name))
    file = path / "config.json"
    earlier = read_json(file) if file.exists() else {}
    settings = {"rope_parameters", "layer_types", *ALIASES}.union(*(keys for _, _, *keys in RULES))
    kept = {key: earlier[key] for key in earlier
            if key == "max_position_embeddings" or key not in settings}
    write_tensors(path / WEIGHTS, arrays, config)
    put_in_place(file, lambda new: new.write_text(
        json.dumps(DEFAULTS | kept | config, indent=2)))


def save_state(path, cfg, params, adam):
    """path, cfg, Params, Adam -> None: a training state that `load_state` resumes bit for bit, and
    that `load` reads where there is no model.safetensors.

    One file, state.safetensors, holds the parameters in their dtype, both means, the step and the
    config. It is put in place, and checked before anything is written, as in `save`.
    """
    arrays = (host_arrays(cfg, params, "params.") | host_arrays(cfg, adam.m, "m.")
              | host_arrays(cfg, adam.v, "v."))
    write_tensors(pathlib.Path(path) / STATE, arrays,
                  config_json(cfg) | {"adam_step": int(adam.step)})
