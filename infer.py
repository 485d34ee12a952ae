"""infer: prefill once, then generate a token at a time, around an explicit KV cache.

Prefill is bound by flops: every weight meets B*T tokens. A generate step is bound by bytes: it
reads all weights and all S slots of the cache to make B tokens. So: many rows at once (`serve`),
fewer bytes (int8), idle flops put to use (`speculate`). Letters as in minillm.py.
"""
import dataclasses
import json
import math
import operator
import pathlib
import re
import uuid
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from minillm import (Adam, Config, attention, block, causal_attention, causal_pairs, check_tokens,
                     dims, embed, extremes, forward, frequencies, in_twos, matmul, normalised,
                     product, product_flops, rotary, size_of, sizes, unembed)

TINY, HUGE = 1.2e-38, 1e37  # f32 takes what is below the one for 0, and 1 / the other is above it

# --------------------------------------------------------------------------------------------- int8


class Q8(NamedTuple):
    """int8 numbers and their f32 scales: q * scale. As a weight, it is widened for its product."""
    q: Any      # int8
    scale: Any  # f32, in the shape of q but for contracted letters, which are 1

    shape = property(lambda self: self.q.shape)
    dtype = property(lambda self: self.q.dtype)

    def rows(self, index, dtype):
        """Those rows of the table, wide."""
        return (self.q[index] * self.scale[index]).astype(dtype)

    def matmul(self, x):
        """MC -> MO."""
        w = self.q.reshape(-1, x.shape[-1]).astype(x.dtype)
        return matmul(x, w) * self.scale.reshape(-1)


class Q8A8(Q8):
    """int8 weights that meet int8 activations: each row of x is quantised, sums are int32."""
    def matmul(self, x):
        """MC -> MO."""
        x, w = quantize(x, -1), self.q.reshape(-1, x.shape[-1])
        return product(x.q, w, jnp.int32) * x.scale * self.scale.reshape(-1)


def quantize(x, axes):
    """BTE, axes -> Q8: one scale for all of `axes`: their largest magnitude becomes 127.

    q * scale is within scale / 2 of x; zeros stay zeros.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest) / 127
    return Q8(jnp.round(x / scale).astype(jnp.int8), scale)


def dequantize(x, dtype="float32"):
    """Q8, dtype -> BTE: the numbers that it stands for."""
    return (x.q * x.scale).astype(dtype)


def quantize_params(params, cfg, kind=Q8A8):
    """Params, cfg -> int8 Params: every matrix that is multiplied, a scale for each output.

    `kind` is Q8 or Q8A8. Norm scales, and an embedding table of which only rows are read, are cast
    to cfg.dtype, which is that of the activations.
    """
    def leaf(name, w):
        contracted = tuple(range(-len(name.split()[-1]), 0))
        return kind(*quantize(w, contracted)) if " " in name else w.astype(cfg.dtype)

    if cfg.tied:
        return jax.tree.map(leaf, dims(cfg), params)
    others = jax.tree.map(leaf, read_arrays(cfg), params._replace(embed=None))
    return others._replace(embed=params.embed.astype(cfg.dtype))


# ---------------------------------------------------------------------------------------- the cache


class Cache(NamedTuple):
    """Keys and values of the tokens so far: slot s of a row holds position s.

    Rows may differ in length. To take tokens back, lower it: `cache._replace(length=...)`.
    """
    k: tuple     # L arrays BKSD, or Q8 of them, with a scale a row, head and slot: BKS1; where
    # slots are split over n devices, BKnSD: see shard.striped
    v: tuple
    length: Any  # B, int32: filled slots, which is also the position of the next token


def init_cache(cfg, B, S, dtype="float32"):
    """cfg, int, int, dtype -> Cache: B empty rows of S slots.

    Every step reads all S slots, so its cost is linear in S: start small and `resize`. With "int8"
    a slot holds D + 4 bytes a head.
    """
    if B < 1 or S < 1:
        raise ValueError(f"a cache of {B} rows and {S} slots: at least one of each")
    if jnp.dtype(dtype).name not in ("float32", "bfloat16", "float16", "int8"):
        raise ValueError(f"a cache of {jnp.dtype(dtype).name}: expected float32, bfloat16, float16 "
                         "or int8")

    def layer():
        slots = jnp.zeros((B, cfg.K, S, cfg.D), dtype)
        if slots.dtype != jnp.int8:
            return slots
        return Q8(slots, jnp.zeros((B, cfg.K, S, 1), jnp.float32))

    def layers():
        return tuple(layer() for _ in range(cfg.L))

    return Cache(layers(), layers(), jnp.zeros((B,), jnp.int32))


def resize(cache, S):
    """Cache, S -> Cache: the same rows with S slots. ValueError where one holds more than S."""
    check_room(cache, 0, S)
    if S < 1:
        raise ValueError(f"a cache of {S} slots: at least one")
    if cache.k[0].ndim != 4:
        raise ValueError("a cache whose slots are split cannot be resized: move it to another "
                         'layout first (shard.place_cache(cache, mesh, "batch"))')

    def fit(a):
        return jnp.pad(a[:, :, :S], ((0, 0), (0, 0), (0, max(0, S - a.shape[2])), (0, 0)))

    return Cache(*jax.tree.map(fit, cache[:2]), cache.length)


def slots_of(cache):
    """Cache -> int: slots of a row: S of BKSD, or where they are split, of BKnSD, all n parts."""
    return math.prod(cache.k[0].shape[2:-1])


def check_room(cache, new, S=None):
    """Cache, int -> None: ValueError unless every row has room for `new` more tokens in S slots.

    Under jit lengths are unknown, and only `new` > S is refused: a write past the end is then
    dropped, and later queries miss that token.
    """
    if new < 0:
        raise ValueError(f"{new} new tokens: 0 or more")
    S = slots_of(cache) if S is None else S
    held = max(extremes(cache.length), default=0)
    if held + new > S:
        raise ValueError(f"{held} tokens in the cache + {new} new > {S} slots: "
                         f"init_cache or resize with S={held + new}")


def check_batch(cache, tokens):
    """Cache, BT -> None: ValueError unless there is one row of tokens, or of logits, for each of
    the cache."""
    rows = len(cache.length)
    if len(tokens) != rows:
        what = "tokens" if jnp.issubdtype(tokens.dtype, jnp.integer) else "logits"
        raise ValueError(f"{len(tokens)} rows of {what} for a cache of {rows}: "
                         f"init_cache(B={len(tokens)})")


def as_held(new, slots):
    """BKTD, BKSD -> BKTD: new tokens as the cache holds them: Q8, or in its dtype, whose largest
    number stands for what is beyond it."""
    if isinstance(slots, Q8):
        return quantize(new, -1)
    most = jnp.finfo(slots.dtype).max
    return new if new.dtype == slots.dtype else jnp.clip(new, -most, most).astype(slots.dtype)


def as_seen(held, dtype):
    """BKTD, dtype -> BKTD: what it stands for, wide."""
    return dequantize(held, dtype) if isinstance(held, Q8) else held.astype(dtype)


def write(slots, new, pos):
    """BKSD, BKTD, BT -> BKSD: each row's T new tokens stand at the slots of their positions.

    In place in a donated cache. For that every index is named: with heads as a slice, compilers
    hold the cache in another layout and copy all of it. Positions outside 0 to S - 1 are dropped.
    """
    B, K, T, _ = new.shape
    row, head = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    slot = jnp.where(pos < 0, slots.shape[2], pos)[:, None]

    def put(slots, new):
        def plain(row, slot, new):
            return slots.at[row, head, slot].set(new, mode="drop")

        return in_twos("write", B * K * T == 1, plain, row, slot, new)

    return jax.tree.map(put, slots, as_held(new, slots))


def cached_attention(q, k, v, pos, finish=normalised):
    """BTHD, BKSD, BKSD, BT -> BTHD: `attention` to a cache, int8 or not, 128 slots at a time
    or, of fewer than 8,192 tokens, as many as make 2^20 scores of a row and head."""
    return attention(q, k, v, pos, finish, max(128, 2 ** 20 // q.shape[1]))


def check_prompts(cache, tokens, lengths):
    """Cache, BT, B -> None: ValueError unless prompts and lengths fit each other and the cache."""
    (B, T), S = tokens.shape, slots_of(cache)
    if T > S:
        raise ValueError(f"prompt of {T} tokens > {S} slots: init_cache(S={T})")
    if jnp.shape(lengths) != (B,):
        raise ValueError(f"lengths of shape {jnp.shape(lengths)} for {B} prompts: expected [{B}]")
    for length in extremes(lengths):
        if not 1 <= length <= T:
            raise ValueError(f"lengths hold {length}: prompts padded to {T} tokens have lengths of "
                             f"1 to {T}")


# ------------------------------------------------------------------------ prefill, extend, generate


def insert(slots, new, row):
    """BKSD, BKTD, int -> BKSD: new rows, from `row` on, at slots 0 to T - 1. Trees of them, too."""
    return jax.tree.map(lambda slots, new: jax.lax.dynamic_update_slice(
        slots, new, (row, 0, 0, 0)), slots, new)


def extend_cache(q, k, v, old_k, old_v, pos):
    """BTHD, BKTD, BKTD, BKSD, BKSD, BT -> BTHD, (BKSD, BKSD): write a layer's cache, then look."""
    k, v = write(old_k, k, pos), write(old_v, v, pos)
    return cached_attention(q, k, v, pos), (k, v)


def fill_cache(q, k, v, old_k, old_v, pos, row=0, insert=insert):
    """BTHD, BKTD, BKTD, BKSD, BKSD, BT -> BTHD, (BKSD, BKSD): write slots 0 to T - 1 of the rows
    from `row` on; look at them alone, rounded as the cache holds them, so that `extend` in any
    chunks gives the same."""
    old, held = (old_k, old_v), (as_held(k, old_k), as_held(v, old_v))
    seen = (as_seen(new, q.dtype) for new in held)
    return causal_attention(q, *seen), insert(old, held, row)


def through_layers(params, cache, x, pos, cfg, attend, **seams):
    """Params, Cache, BTE, BT, cfg, attend -> BTE, k, v: every block, and the cache's new arrays.

    `attend(q, k, v, old_k, old_v, pos)` gives one layer's BTHD and its pair of BKSD.
    """
    table, written = rotary(pos, cfg), []
    for w, *old in zip(params.layers, cache.k, cache.v, strict=True):
        x, kv = block(x, w, table, cfg, lambda q, k, v: attend(q, k, v, *old, pos), **seams)
        written.append(kv)
    return x, *zip(*written, strict=True)


def append(params, cache, tokens, cfg, attend=extend_cache, embed=embed, **seams):
    """Params, Cache, BT, cfg -> BTE, Cache: `extend`, unchecked, of parts that can be replaced
    where a model lives on several devices."""
    pos = cache.length[:, None] + jnp.arange(tokens.shape[1])
    x = embed(params, tokens, cfg)
    x, k, v = through_layers(params, cache, x, pos, cfg, attend, **seams)
    return x, Cache(k, v, cache.length + tokens.shape[1])


def extend(params, cache, tokens, cfg):
    """Params, Cache, BT, cfg -> BTE, Cache: append T tokens to every row, each at its own length.

    T = 1 generates, T = n_draft + 1 verifies a draft, more are a chunk of a prompt. The result is
    what stands before the final norm: `unembed` makes logits of it. ValueError for tokens outside
    the vocabulary, another number of rows than the cache's, or more tokens than slots are left.
    """
    check_tokens(tokens, cfg)
    check_batch(cache, tokens)
    check_room(cache, tokens.shape[1])
    return append(params, cache, tokens, cfg)


def read_prompts(params, cache, tokens, lengths, cfg, attend=fill_cache, embed=embed,
                 unembed=unembed, **seams):
    """Params, Cache, BT, B, cfg -> BV, Cache: `prefill`, unchecked, of parts that can be replaced
    where a model lives on several devices."""
    (B, T), lengths = tokens.shape, jnp.asarray(lengths, jnp.int32)
    x, pos = embed(params, tokens, cfg), jnp.broadcast_to(jnp.arange(T), (B, T))
    x, k, v = through_layers(params, cache, x, pos, cfg, attend, **seams)
    last = x[jnp.arange(B), lengths - 1][:, None]
    return unembed(params, last, cfg)[:, 0], Cache(k, v, lengths)


def prefill(params, cache, tokens, lengths, cfg, rows=None):
    """Params, Cache, BT, B, cfg -> BV, Cache: read prompts into rows, which start over.

    Prompts are padded on the right to T; row b is its first lengths[b] tokens. Attention looks at T
    tokens, not S slots, and one position a row is unembedded: its last, whose f32 logits are
    returned. ValueError for tokens outside the vocabulary, an empty prompt, lengths beyond T, T
    beyond the cache, or `rows` that are no int or do not divide B.

    With `rows`, a Python int, the batch is read that many rows at a time, in a scan: each group
    reads all weights again, which the flops of a thousand tokens hide, and temporaries are those of
    one group. (`prefill_flops` of a group, times groups.)
    """
    check_tokens(tokens, cfg)
    check_batch(cache, tokens)
    check_prompts(cache, tokens, lengths)
    B, T = tokens.shape
    if rows is not None and (type(rows) is not int or rows < 1 or B % rows):
        raise ValueError(f"rows={rows!r} at a time of {B} prompts: choose an int that divides {B} "
                         "(under jit, name it in static_argnames)")
    if rows in (None, B):
        return read_prompts(params, cache, tokens, lengths, cfg)

    def read(cache, group):
        row, *prompts = group
        logits, new = read_prompts(params, cache, *prompts, cfg, partial(fill_cache, row=row))
        return cache._replace(k=new.k, v=new.v), logits

    lengths = jnp.asarray(lengths, jnp.int32)
    groups = jnp.arange(0, B, rows), tokens.reshape(-1, rows, T), lengths.reshape(-1, rows)
    cache, logits = jax.lax.scan(read, cache, groups)
    return logits.reshape(B, -1), cache._replace(length=lengths)


def one_hot(token, V):
    """..., V -> ...V: log-probabilities of one token that is certain."""
    return jnp.where(jnp.arange(V) == token[..., None], jnp.float32(0), -jnp.inf)


def sampling(temperature, top_k, top_p):
    """temperature, top_k, top_p -> temperature, top_k, top_p: as Python numbers, so that a program
    can depend on them. ValueError where they are no numbers or make no distribution."""
    try:
        how = float(temperature), operator.index(top_k), float(top_p)
        if 0 <= how[0] < math.inf and how[1] >= 0 and 0 < how[2] <= 1:
            return how
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected numbers, "
                     "static under jit: a finite temperature >= 0, an integer top_k >= 0, "
                     "0 < top_p <= 1")


def row_largest(logits):
    """BV -> B1: each row's largest logit; where V is split, another function finds it."""
    return jnp.max(logits, axis=-1, keepdims=True)


def kth_largest(logits, k):
    """BV, int -> B1: each row's k-th largest logit, its least where V < k. Replaced like
    `row_largest`."""
    return jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]


def usable(logits):
    """BV -> BV: f32, and NaN as -inf."""
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits.astype(jnp.float32))


def below_largest(logits, largest=row_largest):
    """BV -> BV: `usable`, less each row's largest. So +inf is certain, -inf is never drawn, and
    where there is nothing else, all are alike."""
    logits = usable(logits)
    most = largest(logits)
    return jnp.where(logits == most, 0, logits - most)


def filtered(logits, temperature, top_k=0, top_p=1.0, largest=row_largest, kth=kth_largest):
    """BV, temperature, top_k, top_p -> BV: log-probabilities but for a constant a row, f32; what is
    left out is -inf. Of a temperature that is not 0."""
    logits = below_largest(logits, largest) / min(temperature, HUGE)
    if top_k:
        logits = jnp.where(logits < kth(logits, top_k), -jnp.inf, logits)
    if top_p < 1:
        down = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(down, axis=-1)
        most = jnp.cumsum(p, axis=-1) - p < max(top_p, TINY)  # the first at least
        smallest = jnp.min(jnp.where(most, down, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def log_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """BV -> BV: log-probabilities to sample from, normalised, f32; what is left out is -inf.

    Divides by the temperature, keeps the top_k largest (0: all), then the most probable tokens that
    together reach top_p; a tie with the last one kept is kept. Temperature 0, or what f32 takes for
    0, is all on the first of the largest. +inf is certain, -inf and NaN are impossible, and a row
    of them alone is even. ValueError where the three make no distribution.
    """
    temperature, top_k, top_p = sampling(temperature, top_k, top_p)
    if temperature < TINY:
        return one_hot(jnp.argmax(usable(logits), axis=-1), logits.shape[-1])
    return jax.nn.log_softmax(filtered(logits, temperature, top_k, top_p), axis=-1)


def row_keys(key, B):
    """key, int -> keys: B of them, folded from one by row; B keys are one a row.

    Keys of any kind become threefry keys, of their first two words: under vmap, "rbg" would draw a
    whole batch from its first key. ValueError for another number of keys than rows.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(key) if typed else key
    keys = jax.random.wrap_key_data(words[..., :2], impl="threefry2x32")
    if keys.ndim and keys.shape != (B,):
        raise ValueError(f"keys of shape {keys.shape} for {B} rows: expected one key, or one a row")
    return keys if keys.ndim else jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(B))


def noise(key, pos, V):
    """key, B, V -> BV: for each row and position, Gumbel's: added to log-probabilities, the largest
    sum is a draw."""
    keys = jax.vmap(jax.random.fold_in)(row_keys(key, len(pos)), pos)
    return jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32))(keys)


@jax.named_scope("sample")
def sample(key, logits, pos, temperature, top_k, top_p):
    """key, BV, B, temperature, top_k, top_p -> B: a token a row.

    The draw depends on key, row and position alone: stopping and going on draws what one longer
    run would have drawn. `key` may also be B keys, one a row whatever its number. What logits that
    are not finite mean, `log_probs` says.
    """
    temperature, top_k, top_p = sampling(temperature, top_k, top_p)
    scores = usable(logits)
    if temperature >= TINY:
        scores = filtered(logits, temperature, top_k, top_p) + noise(key, pos, logits.shape[-1])
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def generate(params, cache, logits, key, n, cfg, temperature=0.0, top_k=0, top_p=1.0, end=None):
    """Params, Cache, BV, key, n, cfg -> Bn, BV, Cache: n tokens a row, in one scan on the device.

    `logits` are those of the next token, from `prefill` or an earlier `generate`, and the new ones
    are returned to go on with. A row that draws `end` stays there: its length stops before it and
    its logits are all on `end`, so that it draws nothing else, in a later call too. n, temperature,
    top_k, top_p and end are static under `jax.jit`. ValueError where the cache has no room for n
    tokens.
    """
    check_batch(cache, logits)
    check_room(cache, n)
    return draw(params, cache, logits, key, n, cfg, temperature, top_k, top_p, end)


def draw(params, cache, logits, key, n, cfg, temperature=0.0, top_k=0, top_p=1.0, end=None,
         append=append, unembed=unembed, sample=sample, one_hot=one_hot):
    """Params, Cache, BV, key, n, cfg -> Bn, BV, Cache: `generate`, unchecked, of parts that can be
    replaced where a model lives on several devices."""
    def step(state, _):
        cache, logits = state
        token = sample(key, logits, cache.length, temperature, top_k, top_p)
        x, new = append(params, cache, token[:, None], cfg)
        new_logits = unembed(params, x, cfg)[:, 0]
        if end is not None:
            goes_on = token != end
            new = new._replace(length=jnp.where(goes_on, new.length, cache.length))
            new_logits = jnp.where(goes_on[:, None], new_logits, one_hot(token, cfg.V))
        return (new, new_logits), token

    state = cache, logits.astype(jnp.float32)
    (cache, logits), tokens = jax.lax.scan(step, state, length=n)
    return tokens.T, logits, cache


def generate_reference(params, prompt, n, cfg):
    """Params, BT, n, cfg -> Bn: the definition: read everything again for each token. Greedy."""
    T = prompt.shape[1]

    def step(t, tokens):
        logits = forward(params, tokens, cfg)[:, t - 1]  # what stands at t and later is not seen
        return tokens.at[:, t].set(jnp.argmax(logits, axis=-1).astype(tokens.dtype))

    return jax.lax.fori_loop(T, T + n, step, jnp.pad(prompt, ((0, 0), (0, n))))[:, T:]


# ------------------------------------------------------------------------- many requests, few rows


def empty(cfg, B, S, dtype):
    """cfg, int, int, dtype -> Cache, BV: empty rows, and logits that tell nothing."""
    return init_cache(cfg, B, S, dtype), jnp.zeros((B, cfg.V), jnp.float32)


def refill(params, cache, logits, row, prompt, length, cfg):
    """Params, Cache, BV, int, 1T, 1, cfg -> BV, Cache: one row starts over with a prompt, which is
    read on its own; the other rows do not notice."""
    told, new = read_prompts(params, cache, prompt, length, cfg, partial(fill_cache, row=row))
    return logits.at[row].set(told[0]), new._replace(
        length=cache.length.at[row].set(new.length[0]))


def check_prompt(request, prompt, n, S, cfg):
    """int, T, n, S, cfg -> array: the prompt, 1T. ValueError, by number, where it does not fit."""
    prompt = np.asarray(prompt)[None]
    try:
        check_tokens(prompt, cfg)
    except ValueError as error:
        raise ValueError(f"request {request}: {error}") from None
    if prompt.size + n > S:
        raise ValueError(f"request {request}: prompt of {prompt.size} tokens + {n} to generate "
                         f"> {S} slots: serve(S={prompt.size + n})")
    return prompt


def serve(params, prompts, B, S, n, key, cfg, temperature=0.0, top_k=0, top_p=1.0, end=None,
          stride=8, cache_dtype="float32", empty=empty, refill=refill, generate=generate):
    """Params, prompts, B, S, n, key, cfg -> iterator of (int, tokens): continuous batching.

    Any iterable of prompts, through B rows of S slots. Each request gets n tokens, or fewer where
    the last is `end`; it is yielded with its number as soon as it is done, and the next prompt
    takes its row while the others go on. Rows are looked at every `stride` tokens. Request i is
    told what `generate` tells it in any B rows, whatever stands beside it, with its row's key
    `jax.random.fold_in(key, i)`. Alone, at B = 1, it is told the same but for ties within rounding:
    products of another number of rows are summed in another order, which bf16 shows more often.

    The one loop here that runs on the host, so it compiles its two steps itself: prompts are padded
    to powers of two, for few programs. ValueError for a prompt that does not fit, when it is taken;
    those of a list are all looked at before the first is. (Nothing is until the iterator is asked.)
    `empty`, `refill` and `generate` can be replaced where a model lives on several devices.
    """
    if n < 1 or stride < 1:
        raise ValueError(f"n={n}, stride={stride}: at least one token of each")
    fill = jax.jit(refill, static_argnames="cfg", donate_argnames=("cache", "logits"))
    go_on = jax.jit(generate, static_argnames=("n", "cfg", "temperature", "top_k", "top_p", "end"),
                    donate_argnames=("cache", "logits"))
    how = dict(zip(("temperature", "top_k", "top_p"), sampling(temperature, top_k, top_p)), end=end)
    stride = min(stride, n)
    checked = (check_prompt(i, prompt, n, S, cfg) for i, prompt in enumerate(prompts))
    waiting = enumerate(list(checked) if hasattr(prompts, "__len__") else checked)
    cache, logits = empty(cfg, B, S, cache_dtype)
    requests, made, keys = np.full(B, -1), [[] for _ in range(B)], row_keys(key, B)
    while True:
        for row in np.flatnonzero(requests < 0):
            if (taken := next(waiting, None)) is not None:
                requests[row], prompt = taken
                padded = min(S, 1 << max(4, (prompt.size - 1).bit_length()))
                prompt_padded = np.pad(prompt, ((0, 0), (0, padded - prompt.size)))
                logits, cache = fill(params, cache, logits, row, prompt_padded,
                                     np.array([prompt.size], np.int32), cfg=cfg)
                own = jax.random.fold_in(key, requests[row])
                keys = keys.at[row].set(row_keys(own[None], 1)[0])
        if np.all(requests < 0):
            return
        tokens, logits, cache = go_on(params, cache, logits, keys, n=stride, cfg=cfg, **how)
        for row, new in enumerate(np.asarray(tokens)):
            made[row] = [*made[row], *new][:n]
            if end in made[row]:
                made[row] = made[row][:made[row].index(end) + 1]
            if requests[row] >= 0 and (len(made[row]) == n or made[row][-1] == end):
                yield int(requests[row]), np.array(made[row])
                requests[row], made[row] = -1, []


# -------------------------------------------------------------------------------------- speculation


def acceptance(proposals, logp_draft, logp_target):
    """Bn, BnV, B(n+1)V -> Bn, B(n+1)V: the rule of speculative decoding, apart from any draw.

    First, with what probability each of n proposals is accepted: min(1, p / q), p the target's
    probability and q the draft's. Then the probabilities of the token that takes the place of the
    first one refused: the positive part of p - q, normalised; and last, where all are accepted, of
    one more: p. What comes out is distributed as p, whatever q is. arXiv:2211.17192.
    """
    p, q = jnp.exp(logp_target), jnp.exp(logp_draft)
    p_next, bonus = p[:, :-1], p[:, -1:]
    p_at, q_at = (jnp.take_along_axis(d, proposals[..., None], -1)[..., 0] for d in (p_next, q))
    probability = jnp.where(p_at < q_at, p_at / q_at, p_at > 0)
    more = jnp.maximum(p_next - q, 0)
    total = jnp.sum(more, axis=-1, keepdims=True)
    residual = jnp.where(total > 0, more / total, p_next)  # p = q: never refused
    return probability, jnp.concatenate([residual, bonus], axis=1)


def accept(key, proposals, logp_draft, logp_target):
    """key, Bn, BnV, B(n+1)V -> B, B: how many proposals a row keeps, and the token after them.

    Draws, no more: `acceptance` says from what. `key` may also be B keys.
    """
    def draw(key, probability, residual):
        key, other = jax.random.split(key)
        kept = jax.random.uniform(key, probability.shape, probability.dtype) < probability
        count = jnp.sum(jnp.cumprod(kept.astype(jnp.int32)), dtype=jnp.int32)
        return count, jax.random.categorical(other, jnp.log(residual[count])).astype(jnp.int32)

    keys = row_keys(key, len(proposals))
    return jax.vmap(draw)(keys, *acceptance(proposals, logp_draft, logp_target))


def propose_by_model(params, key, tokens, length, cache, cfg, n, temperature=0.0, top_k=0,
                     top_p=1.0):
    """Params, key, BS, B, Cache, cfg, n -> Bn, BnV, Cache: n tokens from a smaller model.

    It first reads each row's last two known tokens: where all proposals of the last round were
    accepted, its cache lacks the last of them; elsewhere the slot is written as it was.
    """
    def draw(x, pos):
        logits = unembed(params, x[:, -1:], cfg)[:, 0]
        return (sample(key, logits, pos, temperature, top_k, top_p),
                log_probs(logits, temperature, top_k, top_p))

    def step(state, _):
        cache, token = state
        x, cache = extend(params, cache, token[:, None], cfg)
        drawn = draw(x, cache.length)
        return (cache, drawn[0]), drawn

    last_two = jnp.take_along_axis(tokens, length[:, None] + jnp.arange(-2, 0), axis=1)
    x, cache = extend(params, cache._replace(length=length - 2), last_two, cfg)
    first = draw(x, length)
    (cache, _), rest = jax.lax.scan(step, (cache, first[0]), length=n - 1)
    made = (jnp.moveaxis(jnp.concatenate([a[None], b]), 0, 1)
            for a, b in zip(first, rest, strict=True))
    return *made, cache


def last_token(tokens, length):
    """BS, B -> B: the last of each row's first length[b] tokens."""
    return jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]


def propose_by_ngram(key, tokens, length, state, cfg, n, longest=3):
    """key, BS, B, state, cfg, n -> Bn, BnV, state: what followed when the row last said the same.

    Of its last tokens, up to `longest`, as many as stood together before; of several places, the
    latest. Past the row's end it goes round; where nothing matches, it repeats the last token. It
    needs no model, and gives its proposals probability 1.
    """
    at = jnp.arange(tokens.shape[1])
    same, run = at < length[:, None] - 1, 0
    for back in range(longest):
        wanted = last_token(tokens, length - back)[:, None]
        same = same & (at >= back) & (jnp.roll(tokens, back, axis=1) == wanted)
        run = run + same
    best = jnp.argmax(jnp.where(at < length[:, None] - 1, run * len(at) + at, -1), axis=1)
    period = (length - 1 - best)[:, None]
    proposals = jnp.take_along_axis(tokens, best[:, None] + 1 + jnp.arange(n) % period, axis=1)
    return proposals, one_hot(proposals, cfg.V), state


def model_draft(params, cfg, n_draft, **how):
    """Params, cfg, n_draft -> draft: another model's; its state is that model's Cache, which holds
    the prompts. `how` is temperature, top_k, top_p. Make it once: `jax.jit` compiles for each anew.
    """
    check_draft(n_draft)
    return jax.tree_util.Partial(partial(propose_by_model, cfg=cfg, n=n_draft, **how), params)


def ngram_draft(cfg, n_draft, longest=3):
    """cfg, n_draft -> draft: proposes from the row's own past; its state is None. Make it once."""
    check_draft(n_draft)
    return jax.tree_util.Partial(partial(propose_by_ngram, cfg=cfg, n=n_draft, longest=longest))


def check_draft(n_draft):
    """int -> None: ValueError unless a draft proposes something."""
    if n_draft < 1:
        raise ValueError(f"n_draft={n_draft}: a draft proposes at least one token")


def verify(params, cache, last, proposals, logp_draft, key, cfg, temperature=0.0, top_k=0,
           top_p=1.0, append=append, unembed=unembed):
    """Params, Cache, B, Bn, BnV, key, cfg -> B, B(n+1), Cache: one reading of all n proposals.

    `last` is each row's last known token, which the cache does not hold yet. How many proposals are
    kept, and the tokens: that many, and all that follow are the one drawn after them.
    """
    x, cache = append(params, cache, jnp.concatenate([last[:, None], proposals], axis=1), cfg)
    logp = log_probs(unembed(params, x, cfg), temperature, top_k, top_p)
    count, token = accept(key, proposals, logp_draft, logp)
    kept = jnp.arange(proposals.shape[1] + 1) < count[:, None]
    return count, jnp.where(kept, jnp.pad(proposals, ((0, 0), (0, 1))), token[:, None]), cache


def cut_at_end(new, count, end):
    """B(n+1), B, end -> B: count, or the place of an end token before it: nothing follows one."""
    if end is None:
        return count
    ends = (new == end) | (jnp.arange(new.shape[1]) == count[:, None])
    return jnp.argmax(ends, axis=1).astype(jnp.int32)


def check_speculation(params, cache, tokens, key, n, cfg, draft, state):
    """Params, Cache, BS, key, n, cfg, draft, state -> keys, int: 2B keys and n_draft.

    ValueError where rows have no room for it all, or the draft another vocabulary.
    """
    check_tokens(tokens, cfg)
    check_batch(cache, tokens)
    check_room(cache, n)
    keys, S = jax.vmap(jax.random.split, out_axes=1)(row_keys(key, len(tokens))), tokens.shape[1]
    _, n_draft, V = jax.eval_shape(draft, keys[0], tokens, cache.length, state)[1].shape
    if V != cfg.V:
        raise ValueError(f"a draft of V={V} for a model of V={cfg.V}: they share no vocabulary")
    for held in (cache, state) if isinstance(state, Cache) else (cache,):
        check_room(held._replace(length=cache.length), n + n_draft + 1)
    for length in extremes(cache.length):
        if length + 1 + n + n_draft > S:
            raise ValueError(f"tokens of width {S} hold {length + 1} known + {n} new + {n_draft} "
                             f"proposed: pad them to {length + 1 + n + n_draft}")
        if length < 1:
            raise ValueError("a row of one known token: speculation starts behind two or more, all "
                             "but the last in the cache")
    return keys, n_draft


def speculate(params, cache, tokens, key, n, cfg, draft, state, temperature=0.0, top_k=0,
              top_p=1.0, end=None):
    """Params, Cache, BS, key, n, cfg, draft, state -> BS, Cache, state, counts: n tokens or more.

    Row b's first cache.length[b] + 1 tokens are known, and the cache holds all but the last of
    them: after `prefill`, take one back. The same holds of what is returned, so that it can go on.
    Rows stop at n new tokens, up to n_draft more, or at `end`, which then fills the row; one whose
    last known token is `end` has stopped.

    A round: `draft(key, tokens, length, state) -> Bn, BnV, state` proposes n_draft tokens, `verify`
    reads them, and each row makes as many as it accepts and one more. counts[b, i] is the number of
    rounds that made i + 1. Tokens are distributed as `generate`'s, whatever the draft; at
    temperature 0 they are the same, but for ties within rounding. ValueError where there is no room
    for n + n_draft more.
    """
    keys, n_draft = check_speculation(params, cache, tokens, key, n, cfg, draft, state)
    return rounds(params, cache, tokens, keys, n, n_draft, cfg, draft, state, temperature, top_k,
                  top_p, end)


def rounds(params, cache, tokens, keys, n, n_draft, cfg, draft, state, temperature=0.0, top_k=0,
           top_p=1.0, end=None, append=append, unembed=unembed):
    """Params, Cache, BS, keys, n, int, cfg, draft, state -> BS, Cache, state, counts: `speculate`,
    unchecked, of parts that can be replaced where a model lives on several devices."""
    B, S = tokens.shape
    row, i, goal = jnp.arange(B)[:, None], jnp.arange(n_draft + 1), cache.length + 1 + n

    def goes_on(tokens, length, *_):
        return (length < goal) & (True if end is None else last_token(tokens, length) != end)

    def advance(loop):
        tokens, length, cache, state, counts = loop
        proposals, logp, state = draft(keys[0], tokens, length, state)
        count, new, cache = verify(
            params, cache._replace(length=length - 1), last_token(tokens, length), proposals, logp,
            jax.vmap(jax.random.fold_in)(keys[1], length), cfg, temperature, top_k, top_p, append,
            unembed)
        count = cut_at_end(new, count, end)
        made = jnp.where(goes_on(*loop), count + 1, 0)
        slot = jnp.where(i < made[:, None], length[:, None] + i, S)
        counts = counts.at[row[:, 0], count].add((made > 0).astype(jnp.int32))
        tokens = tokens.at[row, slot].set(new, mode="drop")
        return tokens, length + made, cache, state, counts

    tokens, length, cache, state, counts = jax.lax.while_loop(
        lambda loop: jnp.any(goes_on(*loop)), advance,
        (jnp.asarray(tokens, jnp.int32), cache.length + 1, cache, state,
         jnp.zeros_like(tokens, jnp.int32, shape=(B, n_draft + 1))))
    if end is not None:
        ended = (last_token(tokens, length) == end)[:, None] & (jnp.arange(S) >= length[:, None])
        tokens = jnp.where(ended, end, tokens)
    return tokens, cache._replace(length=length - 1), state, counts


# ----------------------------------------------------------------------------------- what they cost


def prefill_flops(cfg, B, T):
    """cfg, int, int -> dict: `forward_flops`, but only B positions are unembedded, not B*T."""
    return product_flops(cfg, B * T, B, B * causal_pairs(T))


def decode_flops(cfg, B, S, T=1):
    """cfg, int, int, int -> dict: `extend` by T tokens and `unembed`: each meets all S slots."""
    return product_flops(cfg, B * T, B * T, B * T * S)


def kv_bytes(cfg, B, S, dtype="float32"):
    """cfg, int, int, dtype -> int: keys and values of S slots in B rows, for every layer.

    int8 adds an f32 scale a row, head and slot.
    """
    dtype = jnp.dtype(dtype)
    return 2 * cfg.L * B * cfg.K * S * (cfg.D * dtype.itemsize + 4 * (dtype == jnp.int8))


def wide_bytes(cfg, dtype):
    """cfg, dtype -> int: bytes of a number that is not int8, where weights are of that dtype."""
    return jnp.dtype(cfg.dtype if jnp.dtype(dtype) == jnp.int8 else dtype).itemsize


def array_bytes(name, cfg, dtype):
    """str, cfg, dtype -> int: of one array, as `dims` names it, where weights are of that dtype.

    In int8 each output of a matrix has an f32 scale, and norm scales stay in cfg.dtype.
    """
    if " " in name and jnp.dtype(dtype) == jnp.int8:
        return size_of(name, cfg) + 4 * size_of(name.split()[0], cfg)
    return size_of(name, cfg) * wide_bytes(cfg, dtype)


def read_arrays(cfg):
    """cfg -> Params: names of the arrays that a step reads whole; of an untied table only rows."""
    return dims(cfg)._replace(embed="V E" if cfg.tied else None)


def weight_bytes(cfg, dtype=None):
    """cfg, dtype -> int: all that a step reads of the parameters."""
    return sum(array_bytes(name, cfg, dtype or cfg.dtype)
               for name in jax.tree.leaves(read_arrays(cfg)))


def decode_bytes(cfg, B, S, T=1, cache_dtype="float32", dtype=None):
    """cfg, int, int, int, dtype -> dict: bytes to and from memory in `extend` by T and `unembed`.

    Weights are read once whatever B is.
    """
    dtype = jnp.dtype(dtype or cfg.dtype)
    row = cfg.E + 4 if dtype == jnp.int8 and cfg.tied else cfg.E * wide_bytes(cfg, dtype)
    return {"weights": weight_bytes(cfg, dtype), "embed": B * T * row,
            "cache_read": kv_bytes(cfg, B, S, cache_dtype),
            "cache_write": kv_bytes(cfg, B, T, cache_dtype), "logits": B * T * cfg.V * 4}


# ------------------------------------------------------------------------------------ real weights


STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # the dtypes of files, and ours
NAMES = dict(  # of each array in Hugging Face's files
    embed="model.embed_tokens", out_norm="model.norm", unembed="lm_head",
    attn_norm="input_layernorm", wq="self_attn.q_proj", wk="self_attn.k_proj",
    wv="self_attn.v_proj", wo="self_attn.o_proj", q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm", mlp_norm="post_attention_layernorm", w_gate="mlp.gate_proj",
    w_up="mlp.up_proj", w_down="mlp.down_proj")
INDEX, MARK, PREFIX = "model.safetensors.index.json", "minillm_save", "minillm-"  # by `save`
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
IMPLEMENTED = {  # what config.json may ask for, where any other value is another model
    "model_type": ("llama", "mistral", "gemma", "qwen3"),
    "hidden_act": ("silu", "gelu_pytorch_tanh"),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_qk_norm", "qk_layernorm",
                     "rope_interleaved", "use_bidirectional_attention", "attn_logit_softcapping",
                     "final_logit_softcapping", "quantization_config"), (None, False)),
    "partial_rotary_factor": (None, 1), "rope_type": ("default", "llama3")}
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
         "vocab_size")
KINDS = {**dict.fromkeys((*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings",
                          "sliding_window"), int),
         **dict.fromkeys(("rms_norm_eps", "rope_theta", *SCALING), float),
         **dict.fromkeys(("rope_parameters", "rope_scaling"), dict), "layer_types": list,
         **dict.fromkeys(("tie_word_embeddings", "use_sliding_window"), bool),
         **dict.fromkeys(("hidden_act", "hidden_activation"), str)}
DEFAULTS = {  # what is meant where nothing is said: in every family, and in one
    "": dict(hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False,
             max_position_embeddings=131072),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096),
    "gemma": dict(num_key_value_heads=16, head_dim=256, tie_word_embeddings=True,
                  hidden_act="gelu_pytorch_tanh"),
    "qwen3": dict(num_key_value_heads=32, head_dim=128)}


def tensor_names(cfg):
    """cfg -> Params: the name of each array in Hugging Face's files. ValueError for one without."""
    def name(path, _):
        *layer, field = path
        if field.name not in NAMES:
            raise ValueError(f"no name in files is known for the array {field.name}: add it to "
                             "infer.NAMES")
        inside = "".join(f"model.layers.{at.idx}." for at in layer[1:])
        return f"{inside}{NAMES[field.name]}.weight"

    return jax.tree.map_with_path(name, dims(cfg))


def check_kinds(config):
    """dict -> None: ValueError where a value of config.json is of another kind than it must be."""
    for name, kind in KINDS.items():
        value = config.get(name)
        right = type(value) is kind or kind is float and type(value) is int
        if kind in (int, float):
            right = right and 0 < value < (2 ** 31 if kind is int else 1e38)
        if value is not None and not right:
            raise ValueError(f"config.json: {name}={value!r} should be " + {
                int: "a whole number from 1", float: "a number above 0, below 1e38"}.get(
                    kind, kind.__name__))


def rotary_settings(config, place):
    """dict, str -> dict: what is said of rotary positions, in `place` or else outside of it."""
    rope = {name: value for name, value in config.get(place, {}).items() if value is not None}
    check_kinds(rope)
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"config.json: {place}={rope} differs between layers: that is not "
                         "implemented")
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {"rope_type": kind, "rope_theta": float(rope.get("rope_theta", config["rope_theta"])),
            "partial_rotary_factor": rope.get("partial_rotary_factor",
                                              config.get("partial_rotary_factor")),
            "scaling": tuple(rope[name] for name in SCALING) if kind == "llama3" else None}


def parse_config(config):
    """dict -> Config: of a config.json, as transformers 5 reads it. ValueError that names what it
    lacks, what is of another kind than it should be, and what it asks for in vain."""
    try:
        return understood(config)
    except KeyError as error:
        raise ValueError(f"config.json: {error} is missing") from None


def understood(config):
    """dict -> Config: `parse_config`, but for what is missing."""
    check_kinds(config)
    kind = config.get("model_type")
    config = {**DEFAULTS[""], **DEFAULTS.get(str(kind), {}), **{
        name: value for name, value in config.items() if value is not None
        or name == "sliding_window"}}
    acts = [config[name] for name in ("hidden_act", "hidden_activation") if name in config]
    if kind == "gemma":  # whose files mean the tanh form by either name
        acts = ["gelu_pytorch_tanh" if act == "gelu" else act for act in acts]
    ropes = [rotary_settings(config, place) for place in ("rope_parameters", "rope_scaling")
             if config.get(place)] or [rotary_settings(config, "")]
    for what, said in (("hidden_act and hidden_activation", acts),
                       ("rope_parameters and rope_scaling", ropes)):
        if said[0] != said[-1]:
            raise ValueError(f"config.json: {what} disagree, {said}: leave out the wrong one")
    config |= ropes[0] | {"hidden_act": acts[0]}
    for name, values in IMPLEMENTED.items():
        if config.get(name) not in values:
            raise ValueError(f"config.json: {name}={config.get(name)!r} is not implemented: "
                             f"expected one of {values}")
    window, context = config.get("sliding_window"), config["max_position_embeddings"]
    if kind == "qwen3" and not config.get("use_sliding_window"):
        window = None
    others = [kind for kind in config.get("layer_types", ()) if kind != "full_attention"]
    if others:
        raise ValueError(f"config.json: layer_types hold {others[0]!r}: only full_attention is "
                         "implemented")
    if window and window < context:
        raise ValueError(f"config.json: sliding_window={window} below max_position_embeddings="
                         f"{context} is not implemented: every query sees all tokens before it")
    L, E, H, F, V = (config[name] for name in SIZES)
    return Config(L, E, H, config.get("num_key_value_heads", H),
                  config.get("head_dim", E // max(1, H)), F, V, rope_base=config["rope_theta"],
                  eps=config["rms_norm_eps"], embed_scale=kind == "gemma",
                  act="silu" if acts[0] == "silu" else "gelu", tied=config["tie_word_embeddings"],
                  rope_scaling=config["scaling"], qk_norm=kind == "qwen3")


def read_json(path):
    """path -> dict. ValueError for what is not there, or no JSON object."""
    try:
        read = json.loads(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds no JSON object")
    return read


def library():
    """-> safetensors, which reads, checks and writes files. ValueError where it is missing."""
    try:
        import safetensors.numpy
    except ImportError:
        raise ValueError('files of weights need the extra hf: pip install ".[hf]"') from None
    return safetensors


def open_tensors(path):
    """path -> an open safetensors file: nothing is read before it is asked for. ValueError where it
    is none, or holds anything but f32, f16 and bf16."""
    files = library()
    try:
        file = files.safe_open(path, framework="numpy")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except files.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None
    for name in file.keys():
        if (held := file.get_slice(name).get_dtype()) not in STORED:
            raise ValueError(f"{path}: {name} is {held}: expected one of {', '.join(STORED)}")
    return file


def find_tensors(path):
    """path -> dict, str: each tensor of a folder by name, not read yet, and what `save` put beside
    them. As in transformers, model.safetensors counts before an index of shards."""
    index, found, where = path / INDEX, {}, None
    files, mark = ["model.safetensors"], None
    if index.exists() and not (path / "model.safetensors").exists():
        read = read_json(index)
        where, mark = read.get("weight_map"), index_metadata(read).get(MARK)
        if not isinstance(where, dict):
            raise ValueError(f"{index} has no weight_map of tensors and files")
        for name, file in where.items():
            if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
                raise ValueError(f"{index} says that {name} is in {file!r}: expected the name of a "
                                 "safetensors file in its folder")
        files = sorted(set(where.values()))
    for file in files:
        opened = open_tensors(path / file)
        mark = mark or (opened.metadata() or {}).get(MARK)
        for name in opened.keys():
            if where and where.get(name) != file:
                raise ValueError(f"{path / file} holds {name}, which {index} says is in "
                                 f"{where.get(name)}")
            found[name] = opened.get_slice(name)
    for name in (where or {}).keys() - found.keys():
        raise ValueError(f"{index} says that {name} is in {where[name]}, which does not hold it")
    return found, mark


def index_metadata(index):
    """dict -> dict: what an index says beside where its tensors are."""
    return index["metadata"] if isinstance(index.get("metadata"), dict) else {}


def config_of(path, mark):
    """path, str -> path: of the config.json of weights with that mark. Where another save was cut
    short, config.json is that one's already, and it kept the earlier one beside it."""
    other = read_json(path / "config.json").get(MARK)
    kept = path / f"{PREFIX}{str(other)[:8]}-config.json"
    return kept if other != mark and kept.exists() else path / "config.json"


def alike(a, b):
    """tensor, tensor -> bool: do two tensors in files hold the same numbers?"""
    return a.get_shape() == b.get_shape() and np.array_equal(a[:], b[:])


def part_of(tensor, letters, index, cfg):
    """tensor, str, slices, cfg -> array: of an array of those letters what `index` asks for, of the
    file only the rows that hold it: letters that the file joins are cut after the first."""
    index, rows, shape, cut = list(index), [], [], []
    for word in letters.split():
        first, *inner = (index.pop(0) for _ in word)
        size, *others = sizes(word, cfg)
        start, stop, _ = first.indices(size)
        rows.append(slice(start * math.prod(others), stop * math.prod(others)))
        shape += [stop - start, *others]
        cut += [slice(None), *inner]
    return tensor[tuple(rows)].reshape(shape)[tuple(cut)]


def load(path, dtype=None, shardings=None):
    """path -> cfg, Params: a Hugging Face folder: config.json and model.safetensors, or its shards.

    Llama 2 and 3, SmolLM2, TinyLlama, Mistral, Gemma 1 and Qwen 3 (dense), in the file's dtype
    (then cfg.dtype) or the one given. Gemma stores norm scales less one; here they are whole, and
    f32, since bf16 would round the sum. A head that differs from the table counts, whatever
    config.json says of tying. With `shardings`, Params of them or what gives these for a cfg (as
    `partial(shard.shardings, mesh=mesh, rules=shard.TENSOR)` does), each device is given its part
    of each array, and no more is read. ValueError that names what is not implemented, missing,
    unexpected, damaged or of another shape; where the extra `hf` is missing, too.
    """
    path = pathlib.Path(path)
    read_json(path / "config.json")
    found, mark = find_tensors(path)
    cfg = parse_config(read_json(config_of(path, mark)))
    layers = {name.split(".")[2] for name in found if name.startswith("model.layers.")}
    if len(layers) != cfg.L:
        raise ValueError(f"{path}: {len(layers)} layers in files, and config.json says "
                         f"num_hidden_layers={cfg.L}")
    table, head = (f"{NAMES[field]}.weight" for field in ("embed", "unembed"))
    if cfg.tied and head in found:  # one of a tied pair may stand under either name, or both
        found.setdefault(table, found[head])
        cfg = dataclasses.replace(cfg, tied=alike(found[table], found[head]))
        if cfg.tied:
            del found[head]
    names = tensor_names(cfg)
    tables = {name for name in found if name.endswith("rotary_emb.inv_freq")}  # no weights
    for name in found.keys() - tables - {*jax.tree.leaves(names)}:
        raise ValueError(f"{path}: tensor {name} is not part of the model that is implemented")

    def read(letters, name, place=None):
        if name not in found:
            raise ValueError(f"{path}: tensor {name} is missing")
        shape = [size_of(word, cfg) for word in letters.split()]
        if found[name].get_shape() != shape:
            raise ValueError(f"{path}: tensor {name} has shape {found[name].get_shape()}, not "
                             f"{shape}, which config.json says")

        def part(index):
            a = part_of(found[name], letters, index, cfg)
            if cfg.embed_scale and " " not in letters:
                return 1 + a.astype(np.float32)
            return a if dtype is None else a.astype(dtype)

        shape = sizes(letters, cfg)
        if place is None:
            return jnp.asarray(part((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, place, part)

    places = shardings(cfg) if callable(shardings) else shardings
    params = jax.tree.map(read, dims(cfg), names, *([] if places is None else [places]))
    for name in tables:
        if found[name].get_shape() != [cfg.D // 2] or not np.allclose(
                found[name][:].astype(np.float32), frequencies(cfg), rtol=2 ** -8, atol=6e-8):
            raise ValueError(f"{path}: {name} holds other frequencies than config.json gives")
    return dataclasses.replace(cfg, dtype=params.embed.dtype.name), params


def adam_file(path, mark):
    """path, str -> path: of the optimizer's state that was saved with weights of that mark."""
    return path / f"{PREFIX}{mark}-adam.safetensors"


def adam_arrays(cfg, params, adam):
    """cfg, Params, Adam -> dict: what is saved of an optimizer, by name: both means of each array,
    and norm scales themselves, since files of weights may hold them less one, and so rounded."""
    trees, found = (dims(cfg), tensor_names(cfg), params, adam.m, adam.v), {}
    for letters, name, w, m, v in zip(*map(jax.tree.leaves, trees), strict=True):
        if m.shape != w.shape or v.shape != w.shape:
            raise ValueError(f"adam's means of {name} have shapes {m.shape} and {v.shape}, not "
                             f"{w.shape}: they are another model's")
        found |= {f"m.{name}": m, f"v.{name}": v} | ({} if " " in letters else {name: w})
    return found


def load_adam(path, cfg, params):
    """path, cfg, Params -> Params, Adam: beside weights that `load` gave, and split as they are,
    the state that `save` was given with them, to go on from bit for bit. ValueError where it was
    given none, or the state is another model's."""
    path = pathlib.Path(path)
    file = adam_file(path, find_tensors(path)[1])
    if not file.exists():
        raise ValueError(f"{path} holds no optimizer's state: training goes on from what was saved "
                         "with one (bench.py train --save)")
    found, like = open_tensors(file), adam_arrays(cfg, params, Adam(0, params, params))
    for name in {*found.keys()} ^ {*like}:
        raise ValueError(f"{file} holds another model's state: {name} is in one and not the other")

    def read(name):
        a, w = found.get_slice(name), like[name]
        if tuple(a.get_shape()) != w.shape:
            raise ValueError(f"{file}: {name} has shape {a.get_shape()}, not {w.shape}")
        return jax.make_array_from_callback(w.shape, w.sharding, lambda index: a[index])

    names = tensor_names(cfg)
    params = jax.tree.map(lambda letters, name, w: w if " " in letters else read(name),
                          dims(cfg), names, params)
    m, v = (jax.tree.map(lambda name: read(f"{mean}.{name}"), names) for mean in "mv")
    return params, Adam(jnp.int32(int(found.metadata()["step"])), m, v)


def write_tensors(path, tensors, mark, **more):
    """path, dict, str -> None: arrays by name. ValueError where the disk does not take them."""
    files = library()
    try:
        files.numpy.save_file(tensors, path, {"format": "pt", MARK: mark, **more})
        path.chmod(0o644)  # the library's files are their owner's alone
    except (OSError, files.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from None


def on_host(w):
    """array -> array: all of it, also of one that several processes hold: each gets it."""
    if not isinstance(w, jax.Array) or w.is_fully_addressable or w.is_fully_replicated:
        return np.asarray(w)
    return multihost_utils.process_allgather(w, tiled=True)


def as_files_hold(cfg, params):
    """cfg, Params -> dict: every array by its name in files, and as it stands there. ValueError
    where files cannot hold it, or it is not cfg's."""
    names, found = tensor_names(cfg), {}
    for dtype in {w.dtype.name for w in jax.tree.leaves(params)} - {*STORED.values()}:
        raise ValueError(f"{dtype} weights are not saved, but float32, float16 and bfloat16: save "
                         "those that int8 ones were made from")
    if jax.tree.structure(params) != jax.tree.structure(names):
        raise ValueError("params hold other arrays than dims(cfg) names: L, qk_norm and tied must "
                         "be those that they were made with, and layers a tuple, not `stack`ed")
    for letters, name, w in zip(*map(jax.tree.leaves, (dims(cfg), names, params)), strict=True):
        if w.shape != sizes(letters, cfg):
            raise ValueError(f"{name} has shape {w.shape}, not {sizes(letters, cfg)}, as cfg says")
        w = on_host(w)
        w = w.astype(np.float32) - 1 if cfg.embed_scale and " " not in letters else w
        found[name] = np.ascontiguousarray(w).reshape(
            [size_of(word, cfg) for word in letters.split()])
    return found


def config_json(cfg):
    """cfg -> dict: what config.json says of it. ValueError where no family of models is so."""
    if cfg.embed_scale and cfg.qk_norm:
        raise ValueError("no family of files has both embed_scale and qk_norm")
    kind = "gemma" if cfg.embed_scale else "qwen3" if cfg.qk_norm else "llama"
    return {
        "architectures": [f"{kind.title()}ForCausalLM"], "model_type": kind, "vocab_size": cfg.V,
        "hidden_size": cfg.E, "intermediate_size": cfg.F, "num_hidden_layers": cfg.L,
        "num_attention_heads": cfg.H, "num_key_value_heads": cfg.K, "head_dim": cfg.D,
        "hidden_act": {"silu": "silu", "gelu": "gelu_pytorch_tanh"}[cfg.act],
        "rms_norm_eps": float(cfg.eps), "rope_theta": float(cfg.rope_base),
        "rope_scaling": cfg.rope_scaling and {
            "rope_type": "llama3", **dict(zip(SCALING, cfg.rope_scaling, strict=True))},
        "max_position_embeddings": 131072, "tie_word_embeddings": cfg.tied}


def in_shards(tensors, most):
    """dict, bytes -> list of dict: in order, each of at most so many bytes, or of one array."""
    shards, room = [{}], most
    for name, w in tensors.items():
        if shards[-1] and w.nbytes > room:
            shards, room = [*shards, {}], most
        room -= w.nbytes
        shards[-1][name] = w
    return shards


def save(path, cfg, params, shard_bytes=5e9, adam=None):
    """path, cfg, Params -> None: a folder that `load` and transformers read, and with `adam`, an
    optimizer's state, one that training goes on from (`load_adam`).

    More than `shard_bytes` go into several files and their index. Split arrays are written whole;
    of several processes, which all call it, the first writes. ValueError, before anything is
    written, for int8, for parameters that are not cfg's, for a cfg that `load` would refuse, and
    where a file of others would be read in their place.

    New files stand beside the old until one call, the last that `load` sees, puts them in their
    place: cut short before it, `load` gives the earlier model. config.json, model.safetensors and
    its index are replaced; of all others only what `save` wrote is ever removed.
    """
    tensors, config = as_files_hold(cfg, params), config_json(cfg)
    if dataclasses.replace(parse_config(config), dtype=cfg.dtype) != cfg:
        raise ValueError(f"{cfg} is not what config.json can say of it: {parse_config(config)}")
    config["torch_dtype"] = params.embed.dtype.name
    state = adam and {name: np.ascontiguousarray(on_host(a))
                      for name, a in adam_arrays(cfg, params, adam).items()}
    try:
        if jax.process_index() == 0:
            commit(pathlib.Path(path), config, tensors, shard_bytes, state,
                   state and int(on_host(adam.step)))
    finally:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("minillm.save")


def commit(path, config, tensors, shard_bytes, state, step):
    """path, dict, dict, bytes, dict or None, int or None -> None: what `save` writes."""
    mark = uuid.uuid4().hex[:8]
    config[MARK] = mark
    shards, at, index = in_shards(tensors, shard_bytes), path / "config.json", path / INDEX
    n, single = len(shards), path / "model.safetensors"
    if n > 1 and single.exists() and not (open_tensors(single).metadata() or {}).get(MARK):
        raise ValueError(f"{single} would be read before several files: remove it, or save "
                         "elsewhere")
    our_index = index.exists() and MARK in index_metadata(read_json(index))
    try:
        before = config_of(path, find_tensors(path)[1])
    except ValueError:  # there is no whole model to keep
        before = None
    files = [path / f"{PREFIX}{mark}-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    new_config, new_index = (path / f"{PREFIX}{mark}-new-{name}.json"
                             for name in ("config", "index"))
    where = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(w.nbytes for w in tensors.values())
    path.mkdir(parents=True, exist_ok=True)
    try:
        for file, shard in zip(files, shards, strict=True):
            write_tensors(file, shard, mark)
        if state:
            write_tensors(adam_file(path, mark), state, mark, step=str(step))
        if before:
            (path / f"{PREFIX}{mark}-config.json").write_bytes(before.read_bytes())
        new_config.write_text(json.dumps(config, indent=2))
        new_index.write_text(json.dumps({"metadata": {"total_size": total, MARK: mark},
                                         "weight_map": where}))
    except BaseException:
        for file in path.glob(f"{PREFIX}{mark}*"):
            file.unlink()
        raise
    new_config.replace(at)
    if n == 1:
        files.pop().replace(single)
        if our_index:
            index.unlink()
    else:
        new_index.replace(index)
        single.unlink(missing_ok=True)
    for file in {*path.glob(f"{PREFIX}*")} - {*files, adam_file(path, mark)}:
        file.unlink()
