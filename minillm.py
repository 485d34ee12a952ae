"""minillm: a decoder-only transformer, its training step, and what both cost, in raw JAX.

One alphabet, here and in every other file. A shape is written as its letters, BTHD:

    B batch   T new tokens   S cache slots   L layers   V vocabulary
    E embed   F feed-forward   H query heads   K key/value heads   G = H/K   D head dim
    and for any product: M rows   C contracted   O outputs

`BT, E -> BTE` at the top of a docstring is its contract: shapes in, shapes out. State goes in and
comes out, nothing is mutated, and `jax.jit` and donation belong to the caller.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Config:
    """What picks a program: a static argument of `jax.jit`. ValueError where sizes do not fit."""
    L: int
    E: int
    H: int
    K: int
    D: int
    F: int
    V: int
    rope_base: float = 1e4     # the slowest rotation takes about 2 pi * rope_base tokens
    eps: float = 1e-6          # added to the mean square in rms_norm
    act: str = "silu"          # "silu" as in Llama, "gelu" (its tanh form) as in Gemma
    embed_scale: bool = False  # Gemma multiplies embeddings by sqrt(E)
    tied: bool = True          # unembed with the embedding matrix
    dtype: str = "float32"     # train_step computes in this, as do int8 weights; masters are f32
    rope_scaling: tuple = None  # Llama 3.1's (factor, low, high, context): see `rotary`

    def __post_init__(self):
        for letter in "LEHKDFV":
            size = getattr(self, letter)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{letter}={size!r}: every size is an integer of at least 1")
        if self.H % self.K:
            raise ValueError(f"H={self.H} query heads cannot share K={self.K} key/value heads: "
                             "choose K that divides H")
        if self.D % 2:
            raise ValueError(f"D={self.D} is odd: rotary positions turn pairs, choose an even D")
        known = dict(act=("silu", "gelu"), dtype=("float32", "bfloat16", "float16"))
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: {values}")
        if self.rope_scaling and len(self.rope_scaling) != 4:
            raise ValueError(f"rope_scaling={self.rope_scaling}: (factor, low, high, context)")


class Layer(NamedTuple):
    """One layer's arrays, or what stands for them: `dims` says what each one is."""
    attn_norm: Any
    wq: Any
    wk: Any
    wv: Any
    wo: Any
    mlp_norm: Any
    w_gate: Any
    w_up: Any
    w_down: Any


class Params(NamedTuple):
    """All arrays of a model. Layers are walked by a Python loop: on a CPU a scan over stacked ones
    copies each layer's weights before it uses them, and reads at a third of the speed."""
    embed: Any
    layers: tuple  # of Layer
    out_norm: Any
    unembed: Any   # None when tied


def dims(cfg):
    """cfg -> Params: every array, declared once: output letters, a blank, contracted letters.

    A single word is a vector of norm scales. Shapes, init, sharding and all counts are maps over
    this tree. Contracted letters come last: on a CPU the same bf16 bytes stream 3 to 4 times
    faster than when stored input x output, and published checkpoints load without a transpose.
    """
    layer = Layer(attn_norm="E", wq="HD E", wk="KD E", wv="KD E", wo="E HD",
                  mlp_norm="E", w_gate="F E", w_up="F E", w_down="E F")
    return Params(embed="V E", layers=(layer,) * cfg.L, out_norm="E",
                  unembed=None if cfg.tied else "V E")


def sizes(letters, cfg):
    """str, cfg -> tuple: the shape that the letters stand for."""
    return tuple(getattr(cfg, letter) for letter in letters.replace(" ", ""))


def init(key, cfg, dtype="float32"):
    """key, cfg -> Params: normal with variance 1 / fan-in, drawn in f32; norm scales are one.

    Better not under `jax.jit`: as it is, it makes one array after another, in little more memory
    than the result takes, and starts at once; compiling takes 0.1 s an array.
    """
    names, tree = jax.tree.flatten(dims(cfg))

    def leaf(name, key):
        if " " not in name:
            return jnp.ones(sizes(name, cfg), dtype)
        fan_in = math.prod(sizes(name.split()[1], cfg))
        return (fan_in ** -0.5 * jax.random.normal(key, sizes(name, cfg))).astype(dtype)

    return tree.unflatten(map(leaf, names, jax.random.split(key, len(names))))


@jax.named_scope("cast")
def cast(params, dtype):
    """Params, dtype -> Params: what `forward` computes in is the dtype of the parameters."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


def param_count(cfg):
    """cfg -> int: all parameters. Gemma 7B has 8,537,680,896."""
    return sum(math.prod(sizes(name, cfg)) for name in jax.tree.leaves(dims(cfg)))


# -------------------------------------------------------------------------------- the layer's parts


@jax.custom_vjp
def matmul(x, w):
    """MC, OC -> MO: every product with a weight, an f32 sum: 2BP flops, B = M and P = OC."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())),
                               preferred_element_type=jnp.float32)


def laid_out(x):
    """BTE -> BTE: x; on a CPU a bf16 x is written out in the order of its axes.

    Only then does XLA's CPU library multiply it as bf16. One that a transpose has merely relabelled
    is widened to f32, and weight gradients run at 145 GFLOP/s instead of 280 to 330 (Zen 4, whose
    peaks are 200 in f32 and 400 in bf16). The barrier keeps the two reshapes from cancelling.
    """
    def written(x):
        return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)

    if x.dtype != jnp.bfloat16:
        return x
    return jax.lax.platform_dependent(x, cpu=written, default=lambda x: x)


def matmul_backward(saved, dy):
    """(MC, OC), MO -> MC, OC: two products for the one forwards, so 6BP in all.

    dy is cast to the dtype of w; sums are f32.
    """
    x, w = saved
    dy = dy.astype(w.dtype)
    f32 = dict(preferred_element_type=jnp.float32)
    spine = jnp.einsum("MO,OC->MC", dy, w, **f32)            # passed down to the layer below
    weight_gradient = jnp.einsum("OM,MC->OC", laid_out(dy.T), x, **f32)  # stays here
    return spine.astype(x.dtype), weight_gradient.astype(w.dtype)


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), matmul_backward)


def dot(x, w, n=1, dtype=None):
    """...C, OC -> ...O: x with one weight, over the last n letters of both, as one 2-D product.

    The result has the dtype of x unless one is given. A single row is doubled if w is below f32:
    XLA's CPU code for one bf16 row is a scalar loop, 8 to 20 times slower than two rows. A weight
    that is no array brings its own product of MC -> MO: see infer.Q8.
    """
    contracted = math.prod(w.shape[-n:])
    rows = x.reshape(-1, contracted)
    if len(rows) == 1 and w.dtype.itemsize < 4:
        rows = jnp.concatenate([rows, rows])
    y = w.matmul(rows) if hasattr(w, "matmul") else matmul(rows, w.reshape(-1, contracted))
    return y[:x.size // contracted].reshape(x.shape[:-n] + w.shape[:-n]).astype(dtype or x.dtype)


def dots(x, ws):
    """BTE, (FE, FE) -> (BTF, BTF): one input, several weights."""
    return tuple(dot(x, w) for w in ws)


def rms_norm(x, scale, eps):
    """BTE, E, eps -> BTE: x over its root mean square, taken in f32. arXiv:1910.07467."""
    wide = x.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (unit * scale.astype(jnp.float32)).astype(x.dtype)


@jax.named_scope("embed")
def rotary(pos, cfg):
    """BT, cfg -> table: cosines and sines of every position's angles, both BT(D/2), f32.

    In f32: bf16 rounds 257 to 256, and sin(257) is not sin(256). Made once and passed to every
    layer: XLA's CPU code would fuse a bare cosine into whatever reads it, and compute it again for
    every head of every layer, 6% of a bf16 prefill; a quotient it keeps.
    Where `cfg.rope_scaling` is given, pairs that turn less than `low` times in the `context` first
    trained on turn `factor` times slower, those of more than `high` as before, others in between.
    """
    frequency = cfg.rope_base ** (-jnp.arange(0, cfg.D, 2, dtype=jnp.float32) / cfg.D)
    if cfg.rope_scaling:
        factor, low, high, context = cfg.rope_scaling
        turns = context * frequency / (2 * jnp.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = pos[..., None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    length = jnp.sqrt(cos * cos + sin * sin)  # 1, which XLA does not know
    return cos / length, sin / length


@jax.custom_vjp
def rope(x, table):
    """BTHD, table -> BTHD: turns each head's pairs (d, d + D/2). arXiv:2104.09864."""
    cos, sin = (part[:, :, None] for part in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    a, b = pairs[..., 0, :], pairs[..., 1, :]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -2).reshape(x.shape).astype(x.dtype)


def rope_backward(table, dy):
    """table, BTHD -> BTHD, None: the gradient of a turn is the turn back.

    The table is a constant: it gets none.
    """
    cos, sin = table
    return rope(dy, (cos, -sin)), None


rope.defvjp(lambda x, table: (rope(x, table), table), rope_backward)


def by_key_head(x, K):
    """BTHD, K -> BK(T*G)D: the rows of one product for each key head: row t * G + g is token t's
    g-th query of the G that share it."""
    B, T, H, D = x.shape
    return x.reshape(B, T, K, H // K, D).swapaxes(1, 2).reshape(B, K, T * (H // K), D)


def by_token(x, T):
    """BK(T*G)D, T -> BTHD: the way back."""
    B, K, M, D = x.shape
    return x.reshape(B, K, T, M // T, D).swapaxes(1, 2).reshape(B, T, K * (M // T), D)


def scores_of(q, k):
    """BKMD, BKSD -> BKMS: every query with every key, an f32 sum.

    XLA's CPU code turns a product's second operand before it multiplies. Few queries, as of a
    generate step, are better turned than all keys of the cache: a step at batch 32 takes 7 to 18%
    less with jax 0.10.2, as long with 0.12. The barrier keeps the transpose out of the product.
    """
    def product(rows, columns):
        return jnp.einsum("BKMD,BKSD->BKMS", rows, columns, preferred_element_type=jnp.float32)

    def keys_first(q, k):
        return jax.lax.optimization_barrier(product(k, q)).swapaxes(2, 3)

    if q.shape[2] >= 16:
        return product(q, k)
    return jax.lax.platform_dependent(q, k, cpu=keys_first, default=product)


def dot_product_attention(q, k, v, seen, k_scale=1.0, v_scale=1.0, softmax=jax.nn.softmax):
    """BKMD, BKSD, BKSD, MS -> BKMD, BKMS: each row's mean of the values seen, and its weights.

    Scores and softmax are f32; what is not seen may hold anything finite. `seen` may differ by row
    of the batch, as B1MS; the weights returned are times `v_scale`.
    """
    scores = scores_of(q, k) * k_scale * q.shape[-1] ** -0.5
    weights = softmax(jnp.where(seen, scores, -jnp.inf))
    weights = (weights * v_scale).astype(jnp.promote_types(q.dtype, v.dtype))
    out = jnp.einsum("BKMS,BKSD->BKMD", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype), weights


def attention(q, k, v, pos, k_scale=1.0, v_scale=1.0, softmax=jax.nn.softmax):
    """BTHD, BKSD, BKSD, BT -> BTHD: a query at position p sees slots 0 to p. The reference.

    An int8 k and v have scales, BK1S: k's multiply the scores, v's the softmax, and no wide
    copy is asked for. `softmax` is replaced where the slots live on several devices.
    """
    (_, T, H, _), (K, S) = q.shape, k.shape[1:3]
    seen = jnp.arange(S) <= jnp.repeat(pos, H // K, axis=1)[:, None, :, None]
    out, _ = dot_product_attention(by_key_head(q, K), k, v, seen, k_scale, v_scale, softmax)
    return by_token(out, T)


def query_blocks(T):
    """int -> list: (start, stop) of causal_attention's blocks of queries: half of T within 64 to
    128, or above T = 1024 an eighth of T; the last may be shorter.

    Half as large they multiply a sixth less at T = 256, in twice as many operations: with jax
    0.10.2 a bf16 prefill takes 8% longer at one row, 2% less at eight; with 0.12 the same.
    """
    half, eighth = -(-T // 2), -(-T // 8)
    size = max(min(max(half, 64), 128), eighth)
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def causal_pairs(T):
    """int -> int: pairs of query and key that causal_attention multiplies for one head of one
    sequence: T(T+1)/2 at and below the diagonal, and above it about half a block for each query."""
    return sum((stop - start) * stop for start, stop in query_blocks(T))


@jax.custom_vjp
def causal_attention(q, k, v):
    """BTHD, BKTD, BKTD -> BTHD: `attention` at positions 0 to T - 1, without most of what it masks.

    A block of queries meets only the keys up to its own last one.
    """
    return causal_forward(q, k, v)[0]


def causal_forward(q, k, v):
    """BTHD, BKTD, BKTD -> BTHD, saved: with what the gradient needs: operands, softmax, result."""
    T, K, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[1]
    q, k, v, found = by_key_head(q, K), laid_out(k), laid_out(v), []
    for start, stop in query_blocks(T):
        seen = jnp.arange(stop) <= jnp.repeat(jnp.arange(start, stop), G)[:, None]
        found.append(dot_product_attention(q[:, :, start * G:stop * G], k[:, :, :stop],
                                           v[:, :, :stop], seen))
    out, weights = zip(*found)
    out = jnp.concatenate(out, axis=2)
    return by_token(out, T), (q, k, v, out, weights)


def causal_backward(saved, dy):
    """saved, BTHD -> BTHD, BKTD, BKTD: four products for the two forwards.

    Through the softmax p of scores s goes ds = p (dp - sum(p dp)), and that sum is dy . out
    (arXiv:2205.14135; there p is computed again, here it is kept). What has to be turned is q, dy
    and the results, D wide. What JAX derives turns p and ds, S wide: a bf16 training step takes 17
    to 23% longer.
    """
    q, k, v, out, weights = saved
    (K, T, D), G = k.shape[1:], q.shape[2] // k.shape[2]
    f32 = dict(preferred_element_type=jnp.float32)
    dy = by_key_head(dy, K)
    total = jnp.sum(dy.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    q_turned, dy_turned = laid_out(q.swapaxes(2, 3)), laid_out(dy.swapaxes(2, 3))
    dq, dk, dv = [], *jnp.zeros((2, len(k), K, D, T))
    for (start, stop), p in zip(query_blocks(T), weights):
        rows = slice(start * G, stop * G)
        dp = jnp.einsum("BKMD,BKSD->BKMS", dy[:, :, rows], v[:, :, :stop], **f32)
        ds = (p * (dp - total[:, :, rows]) * D ** -0.5).astype(q.dtype)
        dq.append(jnp.einsum("BKMS,BKSD->BKMD", ds, k[:, :, :stop], **f32).astype(q.dtype))
        dk = dk.at[..., :stop].add(jnp.einsum("BKDM,BKMS->BKDS", q_turned[..., rows], ds, **f32))
        dv = dv.at[..., :stop].add(jnp.einsum("BKDM,BKMS->BKDS", dy_turned[..., rows], p, **f32))
    # laid out, or XLA folds this transpose into the product, which it then cannot run in bf16
    dk, dv = (laid_out(d.astype(x.dtype)).swapaxes(2, 3) for d, x in ((dk, k), (dv, v)))
    return by_token(jnp.concatenate(dq, axis=2), T), dk, dv


causal_attention.defvjp(causal_forward, causal_backward)


@partial(jax.checkpoint, static_argnums=2)
def gated(gate, up, act, /):
    """BTF, BTF, act -> BTF: act(gate) * up, rounded once, at the end.

    Its gradient keeps the two and computes the rest again: a training step has 0.75 to 0.92 of the
    temporaries, and takes no longer. Rounding bf16 after every operation takes a CPU 2.5 times as
    long as f32.
    """
    wide = gate.astype(jnp.float32)
    wide = jax.nn.silu(wide) if act == "silu" else jax.nn.gelu(wide, approximate=True)
    return (wide * up.astype(jnp.float32)).astype(gate.dtype)


def mlp(x, w, cfg, enter=dots, leave=dot):
    """BTE, Layer, cfg -> BTE: down(act(gate(x)) * up(x)). arXiv:2002.05202."""
    gate, up = enter(x, (w.w_gate, w.w_up))
    return leave(gated(gate, up, cfg.act), w.w_down)


def block(x, w, table, cfg, attend, enter=dots, leave=dot, norm=rms_norm):
    """BTE, Layer, table, cfg, attend -> BTE, state: one layer, with seams.

    `attend(q, k, v) -> BTHD, state` of BTHD, BKTD, BKTD says what the queries look at: causal
    attention, or a cache that is written first. `enter` (one input, several weights), `leave` and
    `norm` are replaced where the weights live on several devices.
    """
    with jax.named_scope("qkv"):
        q, k, v = enter(norm(x, w.attn_norm, cfg.eps), (w.wq, w.wk, w.wv))
        q, k = rope(q, table), rope(k, table)
    with jax.named_scope("attention"):
        out, state = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2))
    with jax.named_scope("out"):
        x = x + leave(out, w.wo, 2)
    with jax.named_scope("mlp"):
        return x + mlp(norm(x, w.mlp_norm, cfg.eps), w, cfg, enter, leave), state


# ----------------------------------------------------------------------- the model and its training


def check_tokens(tokens, cfg):
    """BT, cfg -> None: ValueError unless they are integers of 0 to V - 1 (seen where concrete)."""
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens of shape {tokens.shape}, {tokens.dtype}: expected integers "
                         "[B, T], not empty")
    if not isinstance(tokens, jax.core.Tracer):
        low, high = tokens.min(), tokens.max()
        if low < 0 or high >= cfg.V:
            raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary: "
                             f"0 to {cfg.V - 1}")


@jax.custom_vjp
def lookup(table, tokens):
    """VE, BT -> BTE: a row a token. The gradient of a row is summed in f32: summed in bf16,
    that of a token which occurs 400 times is off by 7%; in f32 by 1%, like any other."""
    return table[tokens]


def lookup_backward(saved, dy):
    """(VE, BT), BTE -> VE, None: each token adds to its row, in f32."""
    table, tokens = saved
    return jnp.zeros(table.shape).at[tokens].add(dy).astype(table.dtype), None


lookup.defvjp(lambda table, tokens: (table[tokens], (table, tokens)), lookup_backward)


@jax.named_scope("embed")
def embed(params, tokens, cfg):
    """Params, BT, cfg -> BTE: what enters the first layer. An int8 table's rows are widened."""
    table = params.embed
    x = table.rows(tokens, cfg.dtype) if hasattr(table, "rows") else lookup(table, tokens)
    return x * jnp.asarray(cfg.E ** 0.5, x.dtype) if cfg.embed_scale else x


@jax.named_scope("unembed")
def unembed(params, x, cfg):
    """Params, BTE, cfg -> BTV: the final norm, then f32 logits."""
    table = params.embed if cfg.tied else params.unembed
    return dot(rms_norm(x, params.out_norm, cfg.eps), table, dtype=jnp.float32)


def causal(q, k, v):
    """BTHD, BKTD, BKTD -> BTHD, None: what training's queries look at, in the form of `attend`."""
    return causal_attention(q, k, v), None


def forward(params, tokens, cfg, block=block):
    """Params, BT, cfg -> BTV: f32 logits of every next token.

    `block=jax.checkpoint(block, static_argnums=(3, 4))` keeps one BTE a layer for the gradient and
    computes the rest again. ValueError for tokens outside the vocabulary.
    """
    check_tokens(tokens, cfg)
    table = rotary(jnp.arange(tokens.shape[1])[None], cfg)
    x = embed(params, tokens, cfg)
    for w in params.layers:
        x, _ = block(x, w, table, cfg, causal)
    return unembed(params, x, cfg)


@jax.named_scope("loss")
def loss(params, tokens, cfg, block=block):
    """Params, B(T+1), cfg -> scalar: mean cross-entropy of the next token, in nats a token."""
    check_tokens(tokens, cfg)
    logits = forward(params, tokens[:, :-1], cfg, block)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


class Adam(NamedTuple):
    step: Any  # int32 scalar
    m: Any     # Params: running mean of the gradient
    v: Any     # Params: running mean of its square


def adam_init(params):
    """Params -> Adam: zeros, in the parameters' shapes and dtypes."""
    m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    return Adam(jnp.zeros((), jnp.int32), m, v)


@jax.named_scope("optimizer")
def adamw(params, adam, grads, lr, b1=0.9, b2=0.95, eps=1e-8, decay=0.1):
    """Params, Adam, Params, lr -> Params, Adam: one update. arXiv:1711.05101.

    Weights decay; what has "norm" in its name does not.
    """
    step = adam.step + 1
    m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, adam.m, grads)
    v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, adam.v, grads)

    def update(path, p, m, v):
        mean, square = m / (1 - b1 ** step), v / (1 - b2 ** step)  # both began at zero
        shrink = 0 if "norm" in jax.tree_util.keystr(path) else decay * p
        return p - lr * (mean / (jnp.sqrt(square) + eps) + shrink)

    return jax.tree.map_with_path(update, params, m, v), Adam(step, m, v)


def train_step(params, adam, tokens, cfg, lr, loss=loss):
    """Params, Adam, B(T+1), cfg, lr -> Params, Adam, scalar: one step of AdamW down `loss`.

    The scalar is the loss before it. f32 master weights are cast to `cfg.dtype` once a step, and
    gradients come back through the cast.
    """
    value, grads = jax.value_and_grad(lambda p: loss(cast(p, cfg.dtype), tokens, cfg))(params)
    params, adam = adamw(params, adam, grads, lr)
    return params, adam, value


# ----------------------------------------------------------------------------------- what they cost


def product_flops(cfg, tokens, unembedded, pairs, dtype=None):
    """cfg, int, int, int -> dict: flops of every product, for the shapes that it has.

    Each weight costs 2 flops a token: 2BP. `unembedded` tokens make logits. Each of `pairs` of a
    query and a slot costs 2D flops a head and layer in the scores, and again in the values.
    "padding", never useful work, is there where `dot` doubles a single row: with weights narrower
    than f32. Their `dtype` is cfg.dtype unless given.
    """
    each, one = 2 * tokens * cfg.L * cfg.E, 2 * pairs * cfg.L * cfg.H * cfg.D
    flops = {"qkv": each * (cfg.H + 2 * cfg.K) * cfg.D, "scores": one, "values": one,
             "out": each * cfg.H * cfg.D, "mlp": each * 3 * cfg.F,
             "unembed": 2 * unembedded * cfg.E * cfg.V}
    padding = (tokens == 1) * (flops["qkv"] + flops["out"] + flops["mlp"])
    padding += (unembedded == 1) * flops["unembed"]
    if padding and jnp.dtype(dtype or cfg.dtype).itemsize < 4:
        flops["padding"] = padding
    return flops


def forward_flops(cfg, B, T):
    """cfg, int, int -> dict: flops of `forward`; attention's are those of `causal_pairs`."""
    return product_flops(cfg, B * T, B * T, B * causal_pairs(T))


def train_flops(cfg, B, T, remat=False):
    """cfg, int, int -> dict: flops of a training step's products: three times `forward`'s.

    Each product goes once forwards and twice backwards, so the weights cost 6BP. With `remat` each
    block is computed again, save its last product, whose result no gradient asks for.
    """
    once = forward_flops(cfg, B, T)
    flops = {name: 3 * count for name, count in once.items()}
    if remat:
        again = once | {"mlp": once["mlp"] * 2 // 3, "unembed": 0}
        if "padding" in once:
            again["padding"] = again["qkv"] + again["out"] + again["mlp"]
        flops = {name: count + again[name] for name, count in flops.items()}
    return flops


def inner_jaxprs(eqn):
    """eqn -> list: the programs that one equation calls: of a scan, a jit, a shard_map."""
    found = [getattr(item, "jaxpr", item) for value in eqn.params.values()
             for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return [item for item in found if hasattr(item, "eqns")]


def traced_flops(fn, *args):
    """fn, arrays -> int: 2MCO of every dot_general that the program `fn(*args)` holds. The oracle.

    Counted in the jaxpr, through calls, a scan's body times its length, one of a choice's branches
    where all multiply the same; arguments may be `jax.ShapeDtypeStruct`. ValueError for a product
    in a `while`, or in a `cond` whose branches differ: it may run any number of times.
    """
    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            name, params = eqn.primitive.name, eqn.params
            if name == "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
                total += 2 * terms * math.prod(eqn.outvars[0].aval.shape)
            inside = [count(inner) for inner in inner_jaxprs(eqn)]
            if name == "cond" and len(set(inside)) == 1:
                inside = inside[:1]
            elif any(inside) and name in ("while", "cond"):
                raise ValueError(f"a product inside `{name}`: how often it runs is unknown")
            total += sum(inside) * (params["length"] if name == "scan" else 1)
        return total

    return count(jax.make_jaxpr(fn)(*args).jaxpr)
