"""infer: prefill once, then generate a token at a time, around an explicit KV cache.

Prefill is bound by flops: every weight meets B*T tokens. A generate step is bound by bytes: it
reads all weights and all S slots of the cache to make B tokens. Letters as in minillm.py.
"""
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minillm import (attention, block, causal_attention, causal_pairs, check_tokens, dims,
                     embed, forward, product_flops, rotary, sizes, unembed)


class Cache(NamedTuple):
    """Keys and values of the tokens so far: slot s of a row holds position s.

    Rows may differ in length. To take tokens back, lower it: `cache._replace(length=...)`.
    """
    k: tuple     # L arrays BKSD
    v: tuple     # L arrays BKSD
    length: Any  # B, int32: filled slots, which is also the position of the next token


def init_cache(cfg, B, S, dtype="float32"):
    """cfg, int, int, dtype -> Cache: B empty rows of S slots.

    Every step reads all S slots, so its cost is linear in S: start small and `resize`.
    """
    if B < 1 or S < 1:
        raise ValueError(f"a cache of {B} rows and {S} slots: at least one of each")
    k, v = (tuple(jnp.zeros((B, cfg.K, S, cfg.D), dtype) for _ in range(cfg.L)) for _ in "kv")
    return Cache(k, v, jnp.zeros((B,), jnp.int32))


def resize(cache, S):
    """Cache, S -> Cache: the same rows with S slots. ValueError where one holds more than S."""
    check_room(cache, 0, S)

    def fit(a):
        return jnp.pad(a[:, :, :S], ((0, 0), (0, 0), (0, max(0, S - a.shape[2])), (0, 0)))

    return Cache(tuple(map(fit, cache.k)), tuple(map(fit, cache.v)), cache.length)


def concrete(x):
    """array -> bool: can its values be looked at now, or only once the program runs?"""
    return not isinstance(x, jax.core.Tracer)


def check_room(cache, new, S=None):
    """Cache, int -> None: ValueError unless every row has room for `new` more tokens in S slots.

    Unchecked, a write past the end is dropped, and later queries miss that token.
    """
    S = S or cache.k[0].shape[2]
    held = int(np.max(cache.length)) if concrete(cache.length) else 0
    if held + new > S:
        raise ValueError(f"{held} tokens in the cache + {new} new > {S} slots: "
                         f"init_cache or resize with S={held + new}")


def check_batch(cache, tokens):
    """Cache, BT -> None: ValueError unless there is one row of tokens for each of the cache."""
    rows = len(cache.length)
    if len(tokens) != rows:
        raise ValueError(f"{len(tokens)} rows of tokens for a cache of {rows}: init_cache(B=...)")


# ------------------------------------------------------------------------ prefill, extend, generate


def write(slots, new, start):
    """BKSD, BKTD, B -> BKSD: row b's T new tokens stand at its slots start[b] to start[b] + T - 1.

    In place in a donated cache, for which it must stay a scatter: XLA turns one of a single index
    into a dynamic_update_slice and then fuses it twice, once for the carry and once for the read
    that follows, which copies all S slots, 8 times in a step. So a lone token is listed twice, and
    the second, at a row that is not there, is dropped.
    """
    B, T = len(new), new.shape[2]
    row, slot = jnp.arange(B)[:, None], start[:, None] + jnp.arange(T)
    new = new.swapaxes(1, 2).astype(slots.dtype)
    if B * T == 1:
        row, slot, new = jnp.arange(2)[:, None], jnp.tile(slot, (2, 1)), jnp.tile(new, (2, 1, 1, 1))
    return slots.at[row, :, slot].set(new, mode="drop")


def through_layers(params, cache, x, table, cfg, look):
    """Params, Cache, BTE, table, cfg, look -> BTE, k, v: every block, and the cache's new arrays.

    `look(q, k, v, old_k, old_v)` gives one layer's BTHD and its pair of BKSD.
    """
    written = []
    for w, *old in zip(params.layers, cache.k, cache.v):
        x, kv = block(x, w, table, cfg, lambda q, k, v: look(q, k, v, *old))
        written.append(kv)
    return x, *zip(*written)


def extend(params, cache, tokens, cfg):
    """Params, Cache, BT, cfg -> BTE, Cache: append T tokens to every row, each at its own length.

    T = 1 generates, T = n_draft + 1 verifies a draft, more are a chunk of a prompt. The result is
    what stands before the final norm: `unembed` makes logits of it. ValueError for tokens outside
    the vocabulary, another number of rows than the cache's, or more tokens than slots are left.
    """
    check_tokens(tokens, cfg)
    check_batch(cache, tokens)
    check_room(cache, tokens.shape[1])
    pos = cache.length[:, None] + jnp.arange(tokens.shape[1])
    table = rotary(pos, cfg)
    x = embed(params, tokens, cfg)

    def look(q, k, v, old_k, old_v):
        k, v = write(old_k, k, cache.length), write(old_v, v, cache.length)
        return attention(q, k, v, pos), (k, v)

    x, k, v = through_layers(params, cache, x, table, cfg, look)
    return x, Cache(k, v, cache.length + tokens.shape[1])


def prefill(params, cache, tokens, lengths, cfg):
    """Params, Cache, BT, B, cfg -> BV, Cache: read prompts into rows, which start over.

    Prompts are padded on the right to T; row b is its first lengths[b] tokens. Attention looks at T
    tokens, not S slots, and one position a row is unembedded: its last, whose f32 logits are
    returned. ValueError for tokens outside the vocabulary, an empty prompt, lengths beyond T, or T
    beyond the cache.
    """
    check_tokens(tokens, cfg)
    check_batch(cache, tokens)
    B, T = tokens.shape
    if T > cache.k[0].shape[2]:
        raise ValueError(f"prompt of {T} tokens > {cache.k[0].shape[2]} slots: init_cache(S={T})")
    if jnp.shape(lengths) != (B,):
        raise ValueError(f"lengths of shape {jnp.shape(lengths)} for {B} prompts: expected [{B}]")
    if concrete(lengths) and (np.min(lengths) < 1 or np.max(lengths) > T):
        raise ValueError(f"lengths {np.min(lengths)} to {np.max(lengths)}: prompts padded to {T} "
                         f"tokens have lengths of 1 to {T}")
    table = rotary(jnp.arange(T)[None], cfg)
    x = embed(params, tokens, cfg)

    def look(q, k, v, *old):
        return causal_attention(q, k, v), [
            jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), (0, 0, 0, 0))
            for slots, new in zip(old, (k, v))]

    x, k, v = through_layers(params, cache, x, table, cfg, look)
    last = x[jnp.arange(B), lengths - 1][:, None]
    return unembed(params, last, cfg)[:, 0], Cache(k, v, jnp.asarray(lengths, jnp.int32))


def log_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """BV -> BV: log-probabilities to sample from, normalised, f32; what is left out is -inf.

    Divides by the temperature, keeps the top_k largest (0: all), then the most probable tokens that
    together reach top_p; a tie with the last one kept is kept. Temperature 0 is all on the argmax.
    All three are Python numbers. ValueError where they make no distribution.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected "
                         "temperature >= 0, top_k >= 0, 0 < top_p <= 1")
    if temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    logits = logits.astype(jnp.float32) / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1:
        down = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(down, axis=-1), axis=-1) - jax.nn.softmax(down, axis=-1)
        smallest = jnp.min(jnp.where(before < top_p, down, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


def sample(key, logits, pos, temperature, top_k, top_p):
    """key, BV, B, temperature, top_k, top_p -> B: a token a row.

    The draw depends on key, row and position alone: stopping and going on draws what one longer
    run would have drawn. `key` may also be B keys.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(pos)))
    draw = jax.vmap(jax.random.categorical)
    logp = log_probs(logits, temperature, top_k, top_p)
    return draw(jax.vmap(jax.random.fold_in)(keys, pos), logp).astype(jnp.int32)


def generate(params, cache, logits, key, n, cfg, temperature=0.0, top_k=0, top_p=1.0, end=None):
    """Params, Cache, BV, key, n, cfg -> Bn, BV, Cache: n tokens a row, in one scan on the device.

    `logits` are those of the next token, from `prefill` or an earlier `generate`, and the new ones
    are returned to go on with. A row that draws `end` stays there: its length stops before it and
    its logits are all on `end`, so that it draws nothing else, in a later call too. ValueError
    where the cache has no room for n tokens.
    """
    check_room(cache, n)

    def step(state, _):
        cache, logits = state
        token = sample(key, logits, cache.length, temperature, top_k, top_p)
        x, new = extend(params, cache, token[:, None], cfg)
        new_logits = unembed(params, x, cfg)[:, 0]
        if end is not None:
            goes_on = token != end
            new = new._replace(length=jnp.where(goes_on, new.length, cache.length))
            only_end = jnp.where(jnp.arange(cfg.V) == end, 0.0, -jnp.inf)
            new_logits = jnp.where(goes_on[:, None], new_logits, only_end)
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


# ----------------------------------------------------------------------------------- what they cost


def prefill_flops(cfg, B, T):
    """cfg, int, int -> dict: `forward_flops`, but only B positions are unembedded, not B*T."""
    return product_flops(cfg, B * T, B, B * causal_pairs(T))


def decode_flops(cfg, B, S, T=1):
    """cfg, int, int, int -> dict: `extend` by T tokens and `unembed`: each meets all S slots."""
    return product_flops(cfg, B * T, B * T, B * T * S)


def kv_bytes(cfg, B, S, dtype="float32"):
    """cfg, int, int, dtype -> int: keys and values of S slots in B rows, for every layer."""
    return 2 * cfg.L * B * cfg.K * S * cfg.D * jnp.dtype(dtype).itemsize


def decode_bytes(cfg, B, S, T=1, cache_dtype="float32"):
    """cfg, int, int, int, dtype -> dict: bytes to and from memory in `extend` by T and `unembed`.

    Weights, in cfg.dtype, are read once whatever B is; of an untied embedding table only B*T rows.
    """
    wide = jnp.dtype(cfg.dtype).itemsize
    read = dims(cfg)._replace(embed="V E" if cfg.tied else None)
    weights = sum(math.prod(sizes(name, cfg)) for name in jax.tree.leaves(read))
    return {"weights": weights * wide, "embed": B * T * cfg.E * wide,
            "cache_read": kv_bytes(cfg, B, S, cache_dtype),
            "cache_write": kv_bytes(cfg, B, T, cache_dtype), "logits": B * T * cfg.V * 4}
