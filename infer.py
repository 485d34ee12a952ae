"""infer: prefill once, then generate a token at a time, around an explicit KV cache.

Prefill is bound by flops: every weight meets B*T tokens. A generate step is bound by bytes: it
reads all weights and all S slots of the cache to make B tokens. So: many rows at once (`serve`),
fewer bytes (int8), idle flops put to use (`speculate`). Letters as in minillm.py.
"""
import dataclasses
import json
import math
import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minillm import (Config, attention, block, causal_attention, causal_pairs, check_tokens, dims,
                     embed, extremes, forward, in_twos, matmul, normalised, product, product_flops,
                     rotary, size_of, sizes, unembed)

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
    k: tuple     # L arrays BKSD, or Q8 of them, with a scale a row, head and slot: BKS1
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

    def empty():
        slots = jnp.zeros((B, cfg.K, S, cfg.D), dtype)
        return Q8(slots, jnp.zeros((B, cfg.K, S, 1))) if slots.dtype == jnp.int8 else slots

    def layers():
        return tuple(empty() for _ in range(cfg.L))

    return Cache(layers(), layers(), jnp.zeros((B,), jnp.int32))


def resize(cache, S):
    """Cache, S -> Cache: the same rows with S slots. ValueError where one holds more than S."""
    check_room(cache, 0, S)
    if S < 1:
        raise ValueError(f"a cache of {S} slots: at least one")

    def fit(a):
        return jnp.pad(a[:, :, :S], ((0, 0), (0, 0), (0, max(0, S - a.shape[2])), (0, 0)))

    return Cache(*jax.tree.map(fit, cache[:2]), cache.length)


def check_room(cache, new, S=None):
    """Cache, int -> None: ValueError unless every row has room for `new` more tokens in S slots.

    Under jit lengths are unknown, and only `new` > S is refused: a write past the end is then
    dropped, and later queries miss that token.
    """
    if new < 0:
        raise ValueError(f"{new} new tokens: 0 or more")
    S = cache.k[0].shape[2] if S is None else S
    held = max(extremes(cache.length), default=0)
    if held + new > S:
        raise ValueError(f"{held} tokens in the cache + {new} new > {S} slots: "
                         f"init_cache or resize with S={held + new}")


def check_batch(cache, tokens):
    """Cache, BT -> None: ValueError unless there is one row of tokens for each of the cache."""
    rows = len(cache.length)
    if len(tokens) != rows:
        raise ValueError(f"{len(tokens)} rows of tokens for a cache of {rows}: "
                         f"init_cache(B={len(tokens)})")


def as_held(new, slots):
    """BKTD, BKSD -> BKTD: new tokens in the form that the cache has: its dtype, or Q8."""
    return quantize(new, -1) if isinstance(slots, Q8) else new.astype(slots.dtype)


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
        return in_twos(B * K * T == 1, lambda row, slot, new: slots.at[row, head, slot].set(
            new, mode="drop"), row, slot, new)

    return jax.tree.map(put, slots, as_held(new, slots))


def cached_attention(q, k, v, pos, finish=normalised):
    """BTHD, BKSD, BKSD, BT -> BTHD: `attention` to a cache, int8 or not, 128 slots at a time
    or, of fewer than 8,192 tokens, as many as make 2^20 scores of a row and head."""
    return attention(q, k, v, pos, finish, max(128, 2 ** 20 // q.shape[1]))


def check_prompts(cache, tokens, lengths):
    """Cache, BT, B -> None: ValueError unless prompts and lengths fit each other and the cache."""
    (B, T), S = tokens.shape, cache.k[0].shape[2]
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


def fill_cache(q, k, v, old_k, old_v, pos):
    """BTHD, BKTD, BKTD, BKSD, BKSD, BT -> BTHD, (BKSD, BKSD): write slots 0 to T - 1; look at them
    alone, rounded as the cache holds them, so that `extend` in any chunks gives the same."""
    old, held = (old_k, old_v), (as_held(k, old_k), as_held(v, old_v))
    seen = (as_seen(new, q.dtype) for new in held)
    return causal_attention(q, *seen), insert(old, held, 0)


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

    lengths = jnp.asarray(lengths, jnp.int32)
    groups = jnp.arange(0, B, rows), tokens.reshape(-1, rows, T), lengths.reshape(-1, rows)
    kv, logits = jax.lax.scan(lambda kv, group: read_apart(params, kv, *group, cfg)[::-1],
                              cache[:2], groups)
    return logits.reshape(B, -1), Cache(*kv, lengths)


def read_apart(params, kv, row, tokens, lengths, cfg):
    """Params, (k, v), int, BT, B, cfg -> BV, (k, v): prompts read in a cache of their own, which is
    then inserted from `row` on."""
    own = init_cache(cfg, *tokens.shape, kv[0][0].dtype)
    logits, own = prefill(params, own, tokens, lengths, cfg)
    return logits, insert(kv, own[:2], row)


def one_hot(token, V):
    """..., V -> ...V: log-probabilities of one token that is certain."""
    return jnp.where(jnp.arange(V) == token[..., None], 0.0, -jnp.inf)


def check_sampling(temperature, top_k, top_p):
    """temperature, top_k, top_p -> None: ValueError where they make no distribution."""
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected a "
                         "finite temperature >= 0, top_k >= 0, 0 < top_p <= 1")


def log_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """BV -> BV: log-probabilities to sample from, normalised, f32; what is left out is -inf.

    Divides by the temperature, keeps the top_k largest (0: all), then the most probable tokens that
    together reach top_p; a tie with the last one kept is kept. Temperature 0 is all on the argmax.
    All three are Python numbers. ValueError where they make no distribution.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    logits = logits.astype(jnp.float32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1:
        down = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(down, axis=-1), axis=-1) - jax.nn.softmax(down, axis=-1)
        smallest = jnp.min(jnp.where(before < top_p, down, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


def row_keys(key, B):
    """key, int -> keys: B of them, folded from one by row; B keys are what they are."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))


@jax.named_scope("sample")
def sample(key, logits, pos, temperature, top_k, top_p):
    """key, BV, B, temperature, top_k, top_p -> B: a token a row.

    The draw depends on key, row and position alone: stopping and going on draws what one longer
    run would have drawn. `key` may also be B keys, one a row whatever its number.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(row_keys(key, len(pos)), pos)
    logp = log_probs(logits, temperature, top_k, top_p)
    return jax.vmap(jax.random.categorical)(keys, logp).astype(jnp.int32)


def generate(params, cache, logits, key, n, cfg, temperature=0.0, top_k=0, top_p=1.0, end=None):
    """Params, Cache, BV, key, n, cfg -> Bn, BV, Cache: n tokens a row, in one scan on the device.

    `logits` are those of the next token, from `prefill` or an earlier `generate`, and the new ones
    are returned to go on with. A row that draws `end` stays there: its length stops before it and
    its logits are all on `end`, so that it draws nothing else, in a later call too. n, temperature,
    top_k, top_p and end are static under `jax.jit`. ValueError where the cache has no room for n
    tokens.
    """
    check_room(cache, n)
    return draw(params, cache, logits, key, n, cfg, temperature, top_k, top_p, end)


def draw(params, cache, logits, key, n, cfg, temperature=0.0, top_k=0, top_p=1.0, end=None,
         append=append, unembed=unembed):
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

    (cache, logits), tokens = jax.lax.scan(step, (cache, logits), length=n)
    return tokens.T, logits, cache


def generate_reference(params, prompt, n, cfg):
    """Params, BT, n, cfg -> Bn: the definition: read everything again for each token. Greedy."""
    T = prompt.shape[1]

    def step(t, tokens):
        logits = forward(params, tokens, cfg)[:, t - 1]  # what stands at t and later is not seen
        return tokens.at[:, t].set(jnp.argmax(logits, axis=-1).astype(tokens.dtype))

    return jax.lax.fori_loop(T, T + n, step, jnp.pad(prompt, ((0, 0), (0, n))))[:, T:]


# ------------------------------------------------------------------------- many requests, few rows


def refill(params, cache, logits, row, prompt, length, cfg):
    """Params, Cache, BV, int, 1T, 1, cfg -> BV, Cache: one row starts over with a prompt.

    The prompt is read on its own and its cache inserted; the other rows do not notice.
    """
    new_logits, kv = read_apart(params, cache[:2], row, prompt, length, cfg)
    lengths = cache.length.at[row].set(length[0])
    return logits.at[row].set(new_logits[0]), Cache(*kv, lengths)


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
          stride=8, cache_dtype="float32"):
    """Params, prompts, B, S, n, key, cfg -> iterator of (int, tokens): continuous batching.

    Any iterable of prompts, through B rows of S slots. Each request gets n tokens, or fewer where
    the last is `end`; it is yielded with its number as soon as it is done, and the next prompt
    takes its row while the others go on. Rows are looked at every `stride` tokens. Request i is
    told what `generate` would tell it alone with the keys `jax.random.fold_in(key, i)[None]`.

    The one loop here that runs on the host, so it compiles its two steps itself: prompts are padded
    to powers of two, for few programs. ValueError for a prompt that does not fit, when it is taken;
    those of a list are all looked at first.
    """
    if n < 1 or stride < 1:
        raise ValueError(f"n={n}, stride={stride}: at least one token of each")
    fill = jax.jit(refill, static_argnames="cfg", donate_argnames=("cache", "logits"))
    go_on = jax.jit(generate, static_argnames=("n", "cfg", "temperature", "top_k", "top_p", "end"),
                    donate_argnames=("cache", "logits"))
    checked = (check_prompt(i, prompt, n, S, cfg) for i, prompt in enumerate(prompts))
    waiting = enumerate(list(checked) if hasattr(prompts, "__len__") else checked)
    cache, logits = init_cache(cfg, B, S, cache_dtype), jnp.zeros((B, cfg.V))
    requests, made = np.full(B, -1), [[] for _ in range(B)]
    while True:
        for row in np.flatnonzero(requests < 0):
            if (taken := next(waiting, None)) is not None:
                requests[row], prompt = taken
                padded = min(S, 1 << max(4, (prompt.size - 1).bit_length()))
                prompt_padded = np.pad(prompt, ((0, 0), (0, padded - prompt.size)))
                logits, cache = fill(params, cache, logits, row, prompt_padded,
                                     np.array([prompt.size]), cfg)
        if np.all(requests < 0):
            return
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.maximum(requests, 0))
        tokens, logits, cache = go_on(params, cache, logits, keys, stride, cfg, temperature, top_k,
                                      top_p, end)
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
        kept = jax.random.uniform(key, probability.shape) < probability
        count = jnp.sum(jnp.cumprod(kept.astype(jnp.int32)))
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
    return jnp.argmax((new == end) | (jnp.arange(new.shape[1]) == count[:, None]), axis=1)


def check_speculation(params, cache, tokens, key, n, cfg, draft, state):
    """Params, Cache, BS, key, n, cfg, draft, state -> keys, int: 2B keys and n_draft.

    ValueError where rows have no room for it all, or the draft another vocabulary.
    """
    check_tokens(tokens, cfg)
    check_batch(cache, tokens)
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


SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NAMES = dict(  # of each array in Hugging Face's files
    embed="model.embed_tokens", out_norm="model.norm", unembed="lm_head",
    attn_norm="input_layernorm", wq="self_attn.q_proj", wk="self_attn.k_proj",
    wv="self_attn.v_proj", wo="self_attn.o_proj", q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm", mlp_norm="post_attention_layernorm", w_gate="mlp.gate_proj",
    w_up="mlp.up_proj", w_down="mlp.down_proj")
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
PLAIN = {  # what config.json may ask for, where any other value is another model
    "model_type": ("llama", "mistral", "gemma", "qwen3"),
    "hidden_act": (None, "silu", "gelu_pytorch_tanh"),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_qk_norm", "qk_layernorm",
                     "rope_interleaved", "use_bidirectional_attention", "attn_logit_softcapping",
                     "final_logit_softcapping", "quantization_config"), (None, False)),
    "partial_rotary_factor": (None, 1), "rope_type": ("default", "llama3")}


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


def parse_config(config):
    """dict -> Config: of a config.json. ValueError naming what it lacks, or asks for in vain."""
    try:
        return understood(config)
    except KeyError as error:
        raise ValueError(f"config.json: {error} is missing") from None
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json holds something of the wrong kind: {error}") from None


def understood(config):
    """dict -> Config: `parse_config`, but for errors of its own kind."""
    kind = config.get("model_type")
    window = config.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "qwen3" and not config.get("use_sliding_window"):
        window = None
    config = {name: value for name, value in config.items() if value is not None}
    gemma = kind == "gemma"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    act = config.get("hidden_activation", config.get("hidden_act"))
    if gemma and act in (None, "gelu"):
        act = "gelu_pytorch_tanh"  # what "gelu" means in the files that Gemma came with
    asked = {**config, "hidden_act": act, "partial_rotary_factor": rope.get(
                 "partial_rotary_factor", config.get("partial_rotary_factor")),
             "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    for name, values in PLAIN.items():
        if asked.get(name) not in values:
            raise ValueError(f"config.json: {name}={asked.get(name)!r} is not implemented: "
                             f"expected one of {values}")
    context = config.get("max_position_embeddings", 131072)
    if "sliding_attention" in config.get("layer_types", ()) or window and window < context:
        raise ValueError(f"config.json: sliding_window={window} below max_position_embeddings="
                         f"{context} is not implemented: every query sees all tokens before it")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"config.json: rope_parameters={rope} differ between layers: that is not "
                         "implemented")
    L, E, H, F, V = (config[name] for name in (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
        "vocab_size"))
    scaling = None if asked["rope_type"] == "default" else tuple(rope[name] for name in SCALING)
    return Config(L, E, H, config.get("num_key_value_heads", H),
                  config.get("head_dim", {"gemma": 256, "qwen3": 128}.get(kind, E // H)), F, V,
                  rope_base=float(rope.get("rope_theta", config.get("rope_theta", 1e4))),
                  eps=config.get("rms_norm_eps", 1e-6), embed_scale=gemma,
                  act="gelu" if act == "gelu_pytorch_tanh" else "silu",
                  tied=config.get("tie_word_embeddings", gemma),
                  rope_scaling=scaling, qk_norm=kind == "qwen3")


def read_json(path):
    """path -> dict. ValueError for what is not there, or no JSON object."""
    try:
        read = json.loads(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds no JSON object")
    return read


def read_safetensors(path):
    """path -> dict: every tensor by name, mapped: nothing is read before it is used.

    The file is 8 bytes of header size, a JSON header, raw arrays. ValueError where it is not.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header, tensors = json.loads(data[8:start].tobytes()), {}
        for name in header.keys() - {"__metadata__"}:
            begin, stop = header[name]["data_offsets"]
            if not 0 <= begin <= stop <= len(data) - start:
                raise ValueError(f"{name} ends at byte {start + stop} of {len(data)}")
            if header[name]["dtype"] not in SAFETENSORS_DTYPES:
                raise ValueError(f"{name} is {header[name]['dtype']}: expected one of "
                                 + ", ".join(SAFETENSORS_DTYPES))
            dtype = jnp.dtype(SAFETENSORS_DTYPES[header[name]["dtype"]])
            tensors[name] = data[start + begin:start + stop].view(dtype).reshape(
                header[name]["shape"])
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None
    return tensors


def load(path, dtype=None):
    """path -> cfg, Params: a Hugging Face folder: config.json and model.safetensors, or its shards.

    Llama 2 and 3, SmolLM2, TinyLlama, Mistral, Gemma 1 and Qwen 3 (dense), in the file's dtype
    (then cfg.dtype) or the one given. Tensors are mapped from the file and copied once. Gemma
    stores norm scales less one; here they are whole, and f32, since bf16 would round the sum.
    ValueError that names what is not implemented, missing, unexpected, or of another shape.
    """
    path = pathlib.Path(path)
    cfg = parse_config(read_json(path / "config.json"))
    files, index, found = ["model.safetensors"], path / "model.safetensors.index.json", {}
    if index.exists():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict):
            raise ValueError(f"{index} has no weight_map of tensors and files")
        files = sorted(set(where.values()))
    for file in files:
        found |= read_safetensors(path / file)
    names = tensor_names(cfg)
    known = {*jax.tree.leaves(names), "lm_head.weight"}  # some tied models store it all the same
    for name in found.keys() - known:
        if not name.endswith("rotary_emb.inv_freq"):  # a table, not a weight
            raise ValueError(f"{path}: tensor {name} is not part of the model that is implemented")

    def read(letters, name):
        if name not in found:
            raise ValueError(f"{path}: tensor {name} is missing")
        a, stored = found.pop(name), tuple(size_of(word, cfg) for word in letters.split())
        if a.shape != stored:
            raise ValueError(f"{path}: tensor {name} has shape {a.shape}, not {stored}, which "
                             "config.json says")
        if cfg.embed_scale and " " not in letters:
            return jnp.array(1 + a.astype(np.float32))
        return jnp.array(a.reshape(sizes(letters, cfg)), dtype)  # a copy: files may be replaced

    params = jax.tree.map(read, dims(cfg), names)
    return dataclasses.replace(cfg, dtype=params.embed.dtype.name), params


def write_safetensors(path, tensors):
    """path, dict -> None: arrays by name. The file is replaced once it is whole: the old one, where
    it is mapped, stays what it was."""
    spelled, header, end = {ours: theirs for theirs, ours in SAFETENSORS_DTYPES.items()}, {}, 0
    tensors = {name: np.asarray(a) for name, a in tensors.items()}
    for name, a in tensors.items():
        if a.dtype.name not in spelled:
            raise ValueError(f"{name} is {a.dtype}: expected {', '.join(spelled)}")
        header[name] = {"dtype": spelled[a.dtype.name], "shape": a.shape,
                        "data_offsets": [end, end := end + a.nbytes]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    partial_file = pathlib.Path(f"{path}.partial")
    with open(partial_file, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for a in tensors.values():
            a.tofile(file)
    partial_file.replace(path)


def as_files_hold(cfg, params):
    """cfg, Params -> dict: every array by its name in files, and as it stands there. ValueError
    where files cannot hold it, or it is not cfg's."""
    names, found = tensor_names(cfg), {}
    for dtype in {w.dtype.name for w in jax.tree.leaves(params)} - {*SAFETENSORS_DTYPES.values()}:
        raise ValueError(f"{dtype} weights are not saved, but float32, float16 and bfloat16: save "
                         "those that int8 ones were made from")
    if jax.tree.structure(params) != jax.tree.structure(names):
        raise ValueError("params hold other arrays than dims(cfg) names: L, qk_norm and tied must "
                         "be those that they were made with, and layers a tuple, not `stack`ed")
    for letters, name, w in zip(*map(jax.tree.leaves, (dims(cfg), names, params)), strict=True):
        if w.shape != sizes(letters, cfg):
            raise ValueError(f"{name} has shape {w.shape}, not {sizes(letters, cfg)}, as cfg says")
        found[name] = np.asarray(w).reshape([size_of(word, cfg) for word in letters.split()])
        if cfg.embed_scale and " " not in letters:
            found[name] = np.asarray(w, np.float32) - 1
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
        "rms_norm_eps": cfg.eps, "rope_theta": cfg.rope_base,
        "rope_scaling": cfg.rope_scaling and {
            "rope_type": "llama3", **dict(zip(SCALING, cfg.rope_scaling, strict=True))},
        "max_position_embeddings": 131072, "tie_word_embeddings": cfg.tied}


def save(path, cfg, params, shard_bytes=5e9):
    """path, cfg, Params -> None: a folder that `load` and transformers read.

    More than `shard_bytes` go into several files and their index. ValueError, before anything is
    written, for int8, and for parameters that are not cfg's.
    """
    path, shards, room = pathlib.Path(path), [{}], shard_bytes
    tensors, config = as_files_hold(cfg, params), config_json(cfg)
    config["torch_dtype"] = params.embed.dtype.name
    for name, w in tensors.items():
        if shards[-1] and w.nbytes > room:
            shards, room = [*shards, {}], shard_bytes
        room -= w.nbytes
        shards[-1][name] = w
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    index = path / "model.safetensors.index.json"
    for earlier in (index, *path.glob("model*.safetensors")):
        earlier.unlink(missing_ok=True)
    if len(shards) == 1:
        return write_safetensors(path / "model.safetensors", *shards)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        write_safetensors(path / file, tensors)
    index.write_text(json.dumps({
        "metadata": {"total_size": sum(w.nbytes for shard in shards for w in shard.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True)
                       for name in shard}}))
