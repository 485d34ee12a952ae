"""minillm: a decoder-only transformer, its training step, and what both cost, in raw JAX.

One alphabet, here and in every other file. A shape is written as its letters, BTHD:

    B batch   T new tokens   S cache slots   L layers   V vocabulary
    E embed   F feed-forward   H query heads   K key/value heads   G = H/K   D head dim
    and in a matmul: M rows   C contracted   O outputs, each of one letter or more: BT, HD

The first line of a docstring is its contract: `BT, E -> BTE` gives the shapes of arguments and
results; cfg is a Config. Functions are pure: state goes in and comes out, and the caller adds
`jax.jit` and donation. Results stand in this order: the output, the new state, what is only
reported.
"""
import math
from collections import Counter, namedtuple
from dataclasses import dataclass
from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
from jax import custom_vjp, lax, named_scope, tree
from jax.ad_checkpoint import checkpoint_name

einsum = partial(jnp.einsum, preferred_element_type="float32")  # accumulates in float32
tensordot = partial(jnp.tensordot, preferred_element_type="float32")


def require(condition, message):
    """bool, str -> None: ValueError with this message unless the condition is true."""
    if not condition:
        raise ValueError(message)


# ------------------------------------------------------------------------------- matmuls and norms


def product(x, w, n=1, sums="float32"):
    """MC, OC -> MO: the dot product of every row of x with every row of w, over the last n letters
    of both, summed in `sums`. BTHD times EHD is BTE, with n = 2."""
    contracted = tuple(range(-n, 0))
    return tensordot(x, w, (contracted, contracted), preferred_element_type=sums)


@partial(custom_vjp, nondiff_argnums=(2,))
def matmul(x, w, n=1):
    """MC, OC -> MO: activations times a weight, contracted over n letters: 2BP flops for B = M rows
    and P = OC weights."""
    return product(x, w, n)


def matmul_forward(x, w, n=1):
    """MC, OC -> MO, (MC, OC): the product, and both operands for its gradient. ValueError in
    float16: its smallest number is 6e-8, so most gradients would become 0."""
    require(x.dtype != "float16", "float16 gradients underflow: set Config.dtype to bfloat16")
    return product(x, w, n), (x, w)


def matmul_backward(n, saved, dy):
    """n, (BTHD, EHD), BTE -> BTHD, EHD: two matmuls for the one of the forward pass, so training
    costs 6BP: the spine, which is the gradient with respect to the input, and the weight gradient.
    """
    x, w = saved
    dy, outputs, rows = dy.astype(w.dtype), w.ndim - n, tuple(range(x.ndim - n))
    spine = tensordot(dy, w, outputs)                 # MO, OC -> MC: goes on to the layer below
    weight_gradient = tensordot(dy, x, (rows, rows))  # MO, MC -> OC: stays here
    return spine.astype(x.dtype), weight_gradient.astype(w.dtype)


matmul.defvjp(matmul_forward, matmul_backward)


def dot(x, w, n=1, dtype=None):
    """MC, OC -> MO: x times a weight, contracted over the last n letters of both.

    The result has the dtype of x unless `dtype` is given. A weight that is not an array brings a
    `matmul` method of its own: see infer.Q8. Letters stay apart in a matmul: to join H and D, or B
    and T, a TPU would copy the array, for 6% of the time of a training step.
    """
    y = w.matmul(x, n) if hasattr(w, "matmul") else matmul(x, w, n)
    return y.astype(dtype or x.dtype)


def rms_norm(x, scale, eps):
    """BTE, E, eps -> BTE: x over its root mean square, in float32, times a scale.
    arXiv:1910.07467."""
    x32 = x.astype("float32")
    unit = x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (unit * scale.astype("float32")).astype(x.dtype)


def dots(x, ws, norm):
    """BTE, (FE, FE), (E, eps) -> (BTF, BTF): normalize an input, then multiply it with several
    weights."""
    x = rms_norm(x, *norm)
    return tuple(dot(x, w) for w in ws)


def frequencies(cfg):
    """cfg -> D/2: the angle in radians by which each pair of a head's numbers turns per token.

    `cfg.rope_scaling` is Llama 3.1's: over the `context` that the model was first trained on, pairs
    that turn fewer than `low` times become `factor` times slower, pairs that turn more than `high`
    times stay, and those between are interpolated.
    """
    frequency = cfg.rope_base ** (-jnp.arange(0, cfg.D, 2, dtype="float32") / cfg.D)
    if cfg.rope_scaling:
        factor, low, high, context = cfg.rope_scaling
        keep = jnp.clip((context * frequency / (2 * jnp.pi) - low) / (high - low), 0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    return frequency


@named_scope("embed")
def rotary(pos, cfg):
    """BT, cfg -> table: cosine and sine of every position's angles, each BT(D/2).

    In float32: bfloat16 rounds position 257 to 256, and sin(257) is not sin(256).
    """
    angle = pos[..., None].astype("float32") * frequencies(cfg)
    return jnp.cos(angle), jnp.sin(angle)


def rope(x, table):
    """BTHD, table -> BTHD: rotate the pairs (d, d + D/2) of each head by position.
    arXiv:2104.09864."""
    cos, sin = (part[:, :, None] for part in table)
    a, b = jnp.split(x.astype("float32"), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


# ------------------------------------------------------------------------------------- attention


# Attention to some of the slots, in float32; `merge` joins two parts, `normalize` finishes one:
#     values   BKMD: the sum of exp(score - largest) * value
#     total    BKM1: the sum of exp(score - largest)
#     largest  BKM1: the largest score; -inf for an empty part, in which no slot is visible
Partial = namedtuple("Partial", "values total largest")


def finite(x):
    """... -> ...: replace inf and NaN by 0, since 0 * inf is NaN."""
    return jnp.where(jnp.isfinite(x), x, 0)


def scores(q, k):
    """BKMD, BKSD -> BKMS: the dot product of every query with every key of its head."""
    return einsum("BKMD,BKSD->BKMS", q, k)


def partial_attention(q, k, v, visible):
    """BKMD, BKSD, BKSD, MS -> Partial: softmax attention of each row of q to its visible slots.

    k and v are arrays, or int8 with a scale per slot: k's scales multiply the scores, v's the
    weights. `visible` may be B1MS, where sequences differ. Keys and values of invisible slots must
    be finite, since they are multiplied by 0. With an int8 cache and float16 queries the softmax
    weights are bfloat16: a scale of 1e-4 times a weight of 1e-4 is 0 in float16.
    """
    (k, k_scale), (v, v_scale) = ((a.q, a.scale.mT) if hasattr(a, "scale") else (a, 1.0)
                                  for a in (k, v))
    dtype = "bfloat16" if (q.dtype, v.dtype) == ("float16", "int8") else q.dtype
    logits = jnp.where(visible, scores(q, k) * k_scale * q.shape[-1] ** -0.5, -jnp.inf)
    largest = lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    weights = jnp.exp(logits - finite(largest))
    scaled = (weights * v_scale).astype(jnp.promote_types(dtype, v.dtype))
    values = einsum("BKMS,BKSD->BKMD", scaled, v)
    return Partial(values, jnp.sum(weights, -1, keepdims=True), largest)


def merge(a, b):
    """Partial, Partial -> Partial: attention to the slots of both parts, which share none. An empty
    part changes nothing. arXiv:1805.02867."""
    largest = jnp.maximum(a.largest, b.largest)
    scale_a, scale_b = (jnp.exp(part.largest - finite(largest)) for part in (a, b))
    return Partial(*(x * scale_a + y * scale_b for x, y in zip(a[:2], b[:2])), largest)


def normalize(part):
    """Partial -> BKMD: each row's weighted mean of the values."""
    return part.values / part.total


def split_blocks(x, K, n=1):
    """BTHD, K -> 1BK(T*G)D: the queries that share a key head as rows of one matmul: row t * G + g
    is token t's g-th query. With n, the same for n blocks of tokens, the last one padded: the
    result begins with n in place of 1."""
    B, T, H, D = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % n), (0, 0), (0, 0))).reshape(B, n, -1, K, H // K, D)
    return x.transpose(1, 0, 3, 2, 4, 5).reshape(n, B, K, -1, D)


def join_blocks(x, T, H):
    """1BK(T*G)D, T, H -> BTHD: undo `split_blocks`, for any number of blocks."""
    n, B, K, _, D = x.shape
    x = x.reshape(n, B, K, -1, H // K, D).transpose(1, 0, 3, 2, 4, 5)
    return x.reshape(B, -1, H, D)[:, :T]


def attention(q, k, v, pos):
    """BTHD, BKSD, BKSD, BT -> BTHD: a query at position p attends to slots 0 to p. The reference:
    it holds all scores, BHTS."""
    (_, T, H, _), (_, K, S, _) = q.shape, k.shape
    last = jnp.repeat(pos, H // K, 1)[:, None, :, None]
    part = partial_attention(split_blocks(q, K)[0], k, v, jnp.arange(S) <= last)
    return join_blocks(normalize(part)[None], T, H).astype(q.dtype)


def causal_blocks(T):
    """int -> int, int: number and size of the blocks of `causal_attention`, which are equal: of at
    most min(1024, max(128, T / 4)) tokens. Small blocks
    multiply less that is masked, large ones are merged less often."""
    n = -(-T // min(max(-(-T // 4), 128), 1024))
    return n, -(-T // n)


def causal_pairs(T):
    """int -> int: pairs of query and key that `causal_attention` multiplies per head and sequence:
    those of n(n+1)/2 pairs of blocks, which is T(T+1)/2 and half a block more per query."""
    n, size = causal_blocks(T)
    return n * (n + 1) // 2 * size * size


def causal_operands(q, k, v):
    """BTHD, BKTD, BKTD -> 1BK(T*G)D, 1BKTD, 1BKTD: in n blocks where T is larger than one."""
    K, n = k.shape[1], causal_blocks(q.shape[1])[0]
    return tuple(split_blocks(a, K, n) for a in (q, k.swapaxes(1, 2), v.swapaxes(1, 2)))


def scan_pairs(q, k, v, step, state, strict=0):
    """nBKMD, nBKSD, nBKSD, step, state -> state: visit each pair of a block of queries and a block
    of keys that it sees, in order: `step(state, i, j, q, k, v, visible) -> state`.

    A query sees the keys up to its own place or, with `strict` 1, those before it. The mask is
    recomputed in the backward pass: saved, it would take memory for every pair and layer.
    """
    n, size = len(k), k.shape[3]
    token, G = jnp.arange(size), q.shape[3] // size

    @partial(jax.checkpoint, prevent_cse=False)
    def visit(state, pair):
        i, j = pair
        visible = j * size + token + strict <= (i * size + jnp.repeat(token, G))[:, None]
        return step(state, i, j, q[i], k[j], v[j], visible), None

    return lax.scan(visit, state, np.tril_indices(n))[0]  # i, and j from 0 to i


@custom_vjp
def causal_attention(q, k, v):
    """BTHD, BKTD, BKTD -> BTHD: `attention` at positions 0 to T - 1, in memory linear in T.

    Each block of queries attends to one block of keys after another, up to its own place, and the
    parts are merged. arXiv:2205.14135.
    """
    return causal_forward(q, k, v)[0]


def causal_forward(q, k, v, strict=0):
    """BTHD, BKTD, BKTD -> BTHD, saved: and for the gradient the operands, the result, and the
    logarithm of each query's sum of exponentials. (`strict`: see `scan_pairs`.)"""
    blocks = causal_operands(q, k, v)

    def step(parts, i, j, q, k, v, visible):
        part = merge(tree.map(lambda a: a[i], parts), partial_attention(q, k, v, visible))
        return tree.map(lambda a, block: a.at[i].set(block), parts, part)

    zeros = jnp.zeros_like(blocks[0], "float32")
    empty = Partial(zeros, zeros[..., :1], zeros[..., :1] - jnp.inf)
    parts = scan_pairs(*blocks, step, empty, strict)
    out = join_blocks(normalize(parts).astype(q.dtype), *q.shape[1:3])
    out, log_total = (checkpoint_name(a, "attention") for a in (
        out, jnp.log(parts.total) + parts.largest))
    return out, (q, k, v, out, log_total)


def causal_backward(saved, dy, strict=0):
    """saved, BTHD -> BTHD, BKTD, BKTD: five matmuls per pair of blocks; the forward pass has two.

    The softmax p is recomputed from the scores s. Its gradient is ds = p (dp - sum(p dp)), and that
    sum is dy . out. Keys come first in all matmuls, so that dk and dv need no transpose. Recomputed
    scores may be rounded otherwise, and exceed the logarithm of their sum: hence the minimum. In
    float32 the third digit of p is lost for a score of 1e3 or more. One row of blocks is
    summed in float32 at a time: all of dq in float32 would need half a GB more for 32k tokens.
    """
    q, k, v, out, log_total = saved
    (_, T, H, D), K, n = q.shape, k.shape[1], len(log_total)
    dy_out = jnp.sum(dy.astype("float32") * out, -1, keepdims=True)
    blocks = causal_operands(q, k, v)
    dy, dy_out = split_blocks(dy, K, n), split_blocks(dy_out, K, n)

    def step(grads, i, j, q, k, v, visible):
        row, dq, dk, dv = grads
        s = einsum("BKSD,BKMD->BKSM", k, q) * D ** -0.5
        p = jnp.where(visible.T, jnp.exp(jnp.minimum(s - log_total[i].mT, 0)), 0)
        dp = einsum("BKSD,BKMD->BKSM", v, dy[i])
        ds, p = (p * (dp - dy_out[i].mT) * D ** -0.5).astype(q.dtype), p.astype(q.dtype)
        row = jnp.where(j == 0, 0, row) + einsum("BKSM,BKSD->BKMD", ds, k)
        return (row, dq.at[i].set(row.astype(dq.dtype)),
                dk.at[j].add(einsum("BKSM,BKMD->BKSD", ds, q)),
                dv.at[j].add(einsum("BKSM,BKMD->BKSD", p, dy[i])))

    row, dk, dv = (jnp.zeros_like(a, "float32") for a in (blocks[0][0], *blocks[1:]))
    _, dq, dk, dv = scan_pairs(*blocks, step, (row, jnp.zeros_like(blocks[0]), dk, dv), strict)
    dk, dv = (join_blocks(d, T, K).swapaxes(1, 2).astype(k.dtype) for d in (dk, dv))
    return join_blocks(dq, T, H), dk, dv


causal_attention.defvjp(causal_forward, causal_backward)


# ---------------------------------------------------------------------------- a model's arrays


@dataclass(frozen=True)
class Config:
    """A model's shape and constants: a static argument of `jax.jit`. ValueError for a bad size."""
    L: int
    E: int
    H: int
    K: int
    D: int
    F: int
    V: int
    rope_base: float = 1e4     # the slowest pair takes about 2 pi * rope_base tokens for a turn
    eps: float = 1e-6          # added to the mean square in rms_norm
    act: str = "silu"          # "silu" as in Llama, "gelu" (its tanh form) as in Gemma
    embed_scale: bool = False  # Gemma multiplies embeddings by sqrt(E)
    tied: bool = True          # unembed with the embedding matrix
    dtype: str = "float32"     # of activations, and of the weights that train_step multiplies
    rope_scaling: tuple = None  # Llama 3.1's (factor, low, high, context): see `frequencies`
    qk_norm: bool = False      # Qwen 3 normalizes each head's queries and keys

    def __post_init__(self):
        def expect(name, valid, what):
            require(valid, f"{name}={getattr(self, name)!r}: expected {what}")

        for letter in "LEHKDFV":
            size = getattr(self, letter)
            expect(letter, isinstance(size, int) and size > 0, "an integer from 1")
        expect("act", self.act in ("silu", "gelu"), "silu or gelu")
        expect("dtype", self.dtype in ("float32", "bfloat16", "float16"),
               "float32, bfloat16 or float16")
        expect("K", self.H % self.K == 0, f"a divisor of H={self.H} query heads")
        expect("D", self.D % 2 == 0, "an even number, since rotary positions turn pairs")
        if self.rope_scaling:
            _, low, high, _ = self.rope_scaling
            expect("rope_scaling", low < high, "(factor, low, high, context), low < high")


# Names under which a layer's values can be saved for the backward pass by a policy of
# `jax.checkpoint`; what is not saved is recomputed. "attention" is its result and log-sum-exp,
# "qkv" are the matmuls before it, "gate" and "up" the two of the gated MLP.
KEEPABLE = ("attention", "qkv", "gate", "up")

# One layer's arrays, or anything with one entry for each of them: see `dims`.
Layer = namedtuple("Layer", "attn_norm wq wk wv wo mlp_norm w_gate w_up w_down q_norm k_norm")


# All arrays of a model: `layers` is a tuple of Layer, `unembed` is None when tied.
Params = namedtuple("Params", "embed layers out_norm unembed")


def dims(cfg):
    """cfg -> Params: every array, declared once: output letters, a blank, contracted letters.

    A single word is a vector of norm scales. Shapes, initial values, shardings, files and counts
    are maps over this tree. Contracted letters come last, as in published checkpoints.
    """
    head_norm = "D" if cfg.qk_norm else None
    layer = Layer(attn_norm="E", wq="HD E", wk="KD E", wv="KD E", wo="E HD", mlp_norm="E",
                  w_gate="F E", w_up="F E", w_down="E F", q_norm=head_norm, k_norm=head_norm)
    return Params(embed="V E", layers=(layer,) * cfg.L, out_norm="E",
                  unembed=None if cfg.tied else "V E")


def sizes(letters, cfg):
    """str, cfg -> tuple: the shape of an array with these letters."""
    return tuple(getattr(cfg, letter) for letter in letters.replace(" ", ""))


def size_of(letters, cfg):
    """str, cfg -> int: the number of elements of an array with these letters."""
    return math.prod(sizes(letters, cfg))


def param_count(cfg):
    """cfg -> int: the number of parameters. Gemma 7B has 8,537,680,896."""
    return sum(size_of(name, cfg) for name in tree.leaves(dims(cfg)))


def init(key, cfg, dtype="float32"):
    """key, cfg -> Params: normal with variance 1 / fan-in, drawn in float32; norm scales are one.

    Call it without `jax.jit` on one device: it makes one array after another, in little more memory
    than the result takes, while compiling takes 0.1 s per array.
    """
    names, structure = tree.flatten(dims(cfg))

    def leaf(name, key):
        if " " not in name:
            return jnp.ones(sizes(name, cfg), dtype)
        normal = jax.random.normal(key, sizes(name, cfg), "float32")
        return (normal * size_of(name.split()[1], cfg) ** -0.5).astype(dtype)

    return structure.unflatten(map(leaf, names, jax.random.split(key, len(names))))


@named_scope("cast")
def cast(params, dtype):
    """Params, dtype -> Params: in another dtype. `forward` computes in the parameters' dtype."""
    return tree.map(lambda w: w.astype(dtype), params)


# ------------------------------------------------------------------------------------- the model
#
# A hook is an argument that replaces a part of the model. `block` has three:
#
#     hook     contract                           default           replaced
#     attend   q, k, v -> BTHD, state             (none)            by training, and by a cache
#     enter    BTE, (FE, FE), norm -> (BTF, BTF)  dots              where weights are split
#     leave    BTF, EF -> BTE                     dot               where weights are split
#
# `forward` and `loss` take another `block`, and a fused kernel as `causal` in place of
# `causal_attention`: a kernel needs no `block` of its own, which is for other layers and for
# rematerialization. `train_step` takes another `loss`, and another optimizer as `update`.
# infer.Parts lists the parts of a model that generates.


def glu(gate, up, act):
    """BTF, BTF, act -> BTF: the gated linear unit act(gate) * up, computed in float32 and rounded
    once. arXiv:2002.05202."""
    gate32 = getattr(jax.nn, act)(gate.astype("float32"))  # gelu is its tanh form
    return (gate32 * up.astype("float32")).astype(gate.dtype)


def block(x, w, table, cfg, attend, enter=dots, leave=dot):
    """BTE, Layer, table, cfg, attend -> BTE, state: one layer: attention, then an MLP. `attend`
    takes q as BTHD, k and v as BKTD."""
    with named_scope("qkv"):
        q, k, v = (checkpoint_name(a, "qkv") for a in enter(
            x, (w.wq, w.wk, w.wv), norm=(w.attn_norm, cfg.eps)))
        require(cfg.qk_norm == (w.q_norm is not None), f"cfg.qk_norm={cfg.qk_norm}: not so params")
        if cfg.qk_norm:
            q, k = rms_norm(q, w.q_norm, cfg.eps), rms_norm(k, w.k_norm, cfg.eps)
        q, k, v = rope(q, table), finite(rope(k, table)), finite(v)
    with named_scope("attention"):
        out, state = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2))
    with named_scope("out"):
        x = x + leave(out, w.wo, n=2)
    with named_scope("mlp"):
        gate, up = enter(x, (w.w_gate, w.w_up), norm=(w.mlp_norm, cfg.eps))
        hidden = glu(checkpoint_name(gate, "gate"), checkpoint_name(up, "up"), cfg.act)
        return x + leave(hidden, w.w_down), state


def attend_with(causal):
    """fn -> attend: the hook `attend` of training, which needs no state, of a function of q, k
    and v such as `causal_attention`."""
    return lambda q, k, v: (causal(q, k, v), None)


def value_range(x):
    """array -> tuple: its least and greatest value; empty where they are not known: while JAX
    traces, or where other processes hold a part of the array."""
    unknown = isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True)
    return () if unknown else (np.asarray(x).min(), np.asarray(x).max())


def check_tokens(tokens, cfg):
    """BT, cfg -> BT: the tokens as int32. ValueError unless they are integers of 0 to V - 1 (where
    values are known), in a dtype that can hold V - 1."""
    tokens = tokens if hasattr(tokens, "dtype") else np.asarray(tokens)
    require(tokens.ndim == 2 and tokens.size and jnp.issubdtype(tokens.dtype, jnp.integer),
            f"tokens of shape {tokens.shape}, {tokens.dtype}: expected integers [B, T], not empty")
    require(jnp.iinfo(tokens.dtype).max >= cfg.V - 1,
            f"tokens of {tokens.dtype} cannot hold V={cfg.V} tokens: convert them to int32")
    for token in value_range(tokens):
        require(0 <= token < cfg.V, f"token {token} is outside the vocabulary: 0 to {cfg.V - 1}")
    return tokens.astype("int32")


@custom_vjp
def lookup(table, tokens):
    """VE, BT -> BTE: a row of the table per token. The gradient of a row is summed in float32: in
    bfloat16, that of a token which occurs 400 times would be off by 7%."""
    return table[tokens]


def lookup_backward(saved, dy):
    """(VE, BT), BTE -> VE, None: each token adds to its row, in float32."""
    table, tokens = saved
    return jnp.zeros_like(table, "float32").at[tokens].add(dy).astype(table.dtype), None


lookup.defvjp(lambda table, tokens: (table[tokens], (table, tokens)), lookup_backward)


@named_scope("embed")
def embed(params, tokens, cfg):
    """Params, BT, cfg -> BTE: the input of the first layer, from a table of floats or of int8."""
    table = params.embed
    x = table.rows(tokens, cfg.dtype) if hasattr(table, "rows") else lookup(table, tokens)
    return x * jnp.asarray(cfg.E ** 0.5, x.dtype) if cfg.embed_scale else x


def unembedding(params, cfg):
    """Params, cfg -> VE: the matrix that makes logits."""
    return params.embed if cfg.tied else params.unembed


@named_scope("unembed")
def unembed(params, x, cfg):
    """Params, BTE, cfg -> BTV: the final norm, then logits in float32."""
    return dot(rms_norm(x, params.out_norm, cfg.eps), unembedding(params, cfg), dtype="float32")


def trunk(params, tokens, cfg, block=block, causal=causal_attention):
    """Params, BT, cfg -> BTE: `forward` without the final norm and the unembedding."""
    tokens = check_tokens(tokens, cfg)
    table, attend = rotary(jnp.arange(tokens.shape[1])[None], cfg), attend_with(causal)
    x = embed(params, tokens, cfg)
    for w in params.layers:
        x, _ = block(x, w, table, cfg, attend)
    return x


def forward(params, tokens, cfg, block=block, causal=causal_attention):
    """Params, BT, cfg -> BTV: logits of the next token at every position, in float32.

    `block=jax.checkpoint(block, static_argnums=(3, 4))` saves one BTE per layer for the backward
    pass and recomputes the rest. `causal` is a function BTHD, BKTD, BKTD -> BTHD such as a fused
    kernel. ValueError for tokens outside the vocabulary.
    """
    return unembed(params, trunk(params, tokens, cfg, block, causal), cfg)


# -------------------------------------------------------------------------------------- training


def cross_entropy(table, x, targets):
    """VE, ME, M -> M: the cross-entropy of each target in nats, from normalized x."""
    logits = dot(x, table, dtype="float32")
    target_logits = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return jax.nn.logsumexp(logits, -1) - target_logits


def loss_chunks(M, V):
    """int, int -> int: the smallest number of chunks into which M tokens are divided so that a
    chunk's float32 logits over V take at most 2 GiB (or a chunk is one token)."""
    return -(-M // max(1, 2 ** 29 // V))


def chunked(losses, n, x, targets):
    """losses, n, ME, M -> fn, (n(M/n)E, n(M/n), n(M/n)): a chunk's share of the mean loss, and its
    arguments: n chunks of tokens. Zeros pad the last one, where n does not divide M."""
    def chunk_loss(table, x, targets, share):
        return jnp.sum(losses(table, x, targets) * share)

    share = jnp.full(len(x), 1 / len(x), "float32")
    return chunk_loss, tuple(
        jnp.pad(a, ((0, -len(a) % n), *((0, 0),) * (a.ndim - 1))).reshape(n, -1, *a.shape[1:])
        for a in (x, targets, share))


@partial(custom_vjp, nondiff_argnums=(0, 1))
def chunked_mean(losses, n, table, x, targets):
    """losses, n, VE, ME, M -> scalar: the mean of `losses(table, x, targets)`, n chunks of tokens
    one after another, so that only one chunk's logits exist at a time.

    The forward pass computes each chunk's gradient beside its loss, so that no logits are
    recomputed. `losses` may close over no array.
    """
    chunk_loss, chunks = chunked(losses, n, x, targets)
    return jnp.sum(lax.map(lambda chunk: chunk_loss(table, *chunk), chunks))


def chunked_mean_forward(losses, n, table, x, targets):
    """losses, n, VE, ME, M -> scalar, (VE, ME): and its gradients; the table's is summed in
    float32."""
    chunk_loss, chunks = chunked(losses, n, x, targets)

    def step(total, chunk):
        value, (dtable, dx) = jax.value_and_grad(chunk_loss, (0, 1))(table, *chunk)
        return total + dtable.astype("float32"), (value, dx)

    dtable, (values, dx) = lax.scan(step, jnp.zeros_like(table, "float32"), chunks)
    return jnp.sum(values), (dtable.astype(table.dtype), dx.reshape(-1, x.shape[1])[:len(x)])


chunked_mean.defvjp(chunked_mean_forward, lambda losses, n, saved, dy: (
    *((d * dy).astype(d.dtype) for d in saved), None))


@named_scope("loss")
def loss(params, tokens, cfg, block=block, chunks=None, causal=causal_attention):
    """Params, B(T+1), cfg -> scalar: mean cross-entropy of the next token, in nats per token.

    The logits of the BT tokens are computed in this many `chunks` (None: `loss_chunks`); `block`
    and `causal` are those of `forward`. ValueError for fewer than one chunk.
    """
    tokens = check_tokens(tokens, cfg)
    require(chunks is None or chunks > 0, f"chunks={chunks}: expected at least one, or None")
    x = trunk(params, tokens[:, :-1], cfg, block, causal)
    x = rms_norm(x, params.out_norm, cfg.eps)
    targets = tokens[:, 1:].reshape(-1)
    with named_scope("unembed"):
        return chunked_mean(cross_entropy, chunks or loss_chunks(len(targets), cfg.V),
                            unembedding(params, cfg), x.reshape(-1, cfg.E), targets)


# The state of AdamW: an int32 scalar, and Params: running means of the gradient and of its square.
Adam = namedtuple("Adam", "step m v")


def adam_init(params):
    """Params -> Adam: zeros in the parameters' shapes, in float32 whatever the parameters are:
    float16 cannot hold squares of gradients, and bfloat16 loses small changes of a mean. They are
    computed from the parameters, so that they are sharded as these are, under `jax.jit` too."""
    m, v = tree.map(lambda p: jnp.where(p == p, jnp.float32(0), 0), (params, params))
    return Adam(jnp.int32(0), m, v)


@named_scope("optimizer")
def adamw(params, adam, grads, lr, b1=0.9, b2=0.95, eps=1e-8, decay=0.1):
    """Params, Adam, Params, lr -> Params, Adam: one update. Norm scales do not decay.
    arXiv:1711.05101."""
    step, grads = adam.step + 1, cast(grads, "float32")
    m = tree.map(lambda m, g: b1 * m + (1 - b1) * g, adam.m, grads)
    v = tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, adam.v, grads)

    def update(path, p, m, v):
        mean, square = m / (1 - b1 ** step), v / (1 - b2 ** step)  # bias correction
        shrink = 0 if "norm" in jax.tree_util.keystr(path) else decay * p
        return (p - lr * (mean / (jnp.sqrt(square) + eps) + shrink)).astype(p.dtype)

    return tree.map_with_path(update, params, m, v), Adam(step, m, v)


def train_step(params, adam, tokens, cfg, lr, loss=loss, update=adamw):
    """Params, Adam, B(T+1), cfg, lr -> Params, Adam, scalar: one step of AdamW, and the loss at the
    old parameters.

    Parameters of any dtype are converted to float32, cast to `cfg.dtype` for the loss, and receive
    float32 gradients; the update is rounded back to their dtype. Another optimizer is a function
    `update(params, state, grads, lr)` that returns new params and a new state, which is given in
    place of `adam`. ValueError if cfg.dtype is float16.
    """
    value, grads = jax.value_and_grad(lambda p: loss(cast(p, cfg.dtype), tokens, cfg))(
        cast(params, "float32"))
    return *update(params, adam, grads, lr), value


# ----------------------------------------------------------------------------------- what they cost

REGIONS = {"qkv": ("wq", "wk", "wv"), "out": ("wo",), "mlp": ("w_gate", "w_up", "w_down")}


def product_flops(cfg, tokens, logits, pairs):
    """cfg, int, int, int -> dict: flops of all matmuls, by region of the model.

    Each parameter costs 2 flops per token: 2BP. `logits` counts the positions that are unembedded,
    `pairs` the pairs of a query and a slot in attention: 2D flops per head and layer for a score,
    and 2D for a value.
    """
    layer, attention = dims(cfg).layers[0], 2 * pairs * cfg.L * cfg.H * cfg.D
    weights = {region: 2 * tokens * cfg.L * sum(size_of(getattr(layer, name), cfg)
                                                for name in names)
               for region, names in REGIONS.items()}
    return weights | {"scores": attention, "values": attention,
                      "unembed": 2 * logits * size_of("V E", cfg)}


def forward_flops(cfg, B, T):
    """cfg, int, int -> dict: flops of `forward`, whose attention multiplies `causal_pairs`."""
    return product_flops(cfg, B * T, B * T, B * causal_pairs(T))


def train_flops(cfg, B, T, keep=None):
    """cfg, int, int, names -> dict: flops of the matmuls in a training step: three times
    `forward`'s.

    Each matmul runs once forwards and twice backwards, so the weights cost 6BP; scores run a fourth
    time, since the softmax is recomputed. With rematerialization `keep` names what of KEEPABLE a
    block saves: () nothing, None all. The rest of it is recomputed, but for its last matmul, whose
    result no gradient needs.
    """
    keep = ("out", *KEEPABLE) if keep is None else keep
    values = {"qkv": ["qkv"], "scores": ["attention"], "values": ["attention"], "out": ["out"],
              "mlp": ["gate", "up", "down"], "unembed": []}
    return {name: (3 + (name == "scores")) * flops + sum(
        flops // len(values[name]) for value in values[name] if value not in (*keep, "down"))
        for name, flops in forward_flops(cfg, B, T).items()}


# Operations that run the programs they hold once (a scan and a Pallas kernel: so many times), and
# names of operations whose flops a jaxpr does not show.
CALLS = {"jit", "call", "closed_call", "eval_jaxpr", "remat2", "custom_jvp_call", "custom_vjp_call",
         "shard_map", "xla_metadata_call", "scan", "pallas_call"}
OPAQUE = "conv_general", "ragged_dot", "dot_product_attention", "ffi_call", "kernel_call"


def inner_jaxprs(eqn):
    """eqn -> list: the programs that an operation calls: of a scan, a jit, a shard_map."""
    items = [getattr(item, "jaxpr", item) for item in tree.leaves(eqn.params)]
    return [item for item in items if hasattr(item, "eqns")]


def traced_counts(fn, args, measure):
    """fn, arrays, measure -> Counter: the sum of `measure(eqn, axes)` over the operations that the
    program `fn(*args)` runs; `axes` are the sizes of the mesh axes around one.

    Counted in the jaxpr, through calls. The body of a scan counts once per iteration, that of a
    Pallas kernel once per point of its grid; `platform_dependent` counts its default branch, and a
    `cond` one branch, if all count the same. Arguments may be `jax.ShapeDtypeStruct`. ValueError
    where something countable is inside a `while`, a `cond` whose branches differ, or any other
    operation that is not in CALLS: how often it runs is unknown.
    """
    def total(jaxpr, axes):
        counts = Counter()
        for eqn in jaxpr.eqns:
            name, params = eqn.primitive.name, eqn.params
            inner_axes = dict(params["mesh"].shape) if name == "shard_map" else axes
            parts = [total(inner, inner_axes) for inner in inner_jaxprs(eqn)]
            if name == "cond" and (params.get("branches_platforms") or parts[1:] == parts[:-1]):
                parts = parts[-1:]
            elif any(parts) and name not in CALLS:
                raise ValueError(f"how often an operation inside `{name}` runs is unknown")
            grid = params["grid_mapping"].grid if name == "pallas_call" else ()
            require(all(isinstance(n, int) for n in grid), f"a kernel's grid of {grid} is unknown")
            times = params["length"] if name == "scan" else math.prod(grid)
            for part in (measure(eqn, axes), *parts):
                counts.update({key: times * number for key, number in part.items()})
        return counts

    return total(jax.make_jaxpr(fn)(*args).jaxpr, {})


def traced_flops(fn, *args):
    """fn, arrays -> int: 2MCO of every dot_general that the program `fn(*args)` runs, counted by
    `traced_counts`: what the formulas above are tested against. ValueError, too, for an operation
    that is OPAQUE: its flops are not shown."""
    def flops(eqn, axes):
        name = eqn.primitive.name
        require(not any(word in name for word in OPAQUE), f"the flops of `{name}` are unknown")
        if name != "dot_general":
            return {}
        (contracted, _), _ = eqn.params["dimension_numbers"]
        terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return {"flops": 2 * terms * math.prod(eqn.outvars[0].aval.shape)}

    return traced_counts(fn, args, flops)["flops"]


# ------------------------------------------------------------ forms that one backend needs
#
# Elsewhere the plain form above is the program. A copied function works without them.


def materialized(plain):
    """fn -> fn: the same function, whose results a CPU writes to memory. XLA's CPU compiler would
    recompute the cosines of `rotary` for every head and layer: 15% of a prefill at batch 1."""
    return wraps(plain)(lambda *args, **kwargs: tree.map(lambda x: lax.platform_dependent(
        x, cpu=lambda x: lax.optimization_barrier(x.reshape(-1)).reshape(x.shape),
        default=lambda x: x), plain(*args, **kwargs)))


def few_rows(plain):
    """fn -> fn: the same product of rows and a weight, or of queries and keys, for few rows.

    XLA's CPU compiler transposes the second operand: for 2 to 16 rows it is faster to make the rows
    the second operand and transpose the result (weights are read 1.3 to 2 times as fast). For a
    single row in bfloat16 or int8 it runs a scalar loop, 8 to 20 times slower than for two rows, so
    the row is duplicated. On a GPU a single row times a weight is faster as multiply-and-sum than
    as a padded matmul: a decode step takes 0.9 of its time in bfloat16, 0.8 in int8.
    """
    def form(x, w, *args, **kwargs):
        def multiply(x, w):
            return plain(x, w, *args, **kwargs)

        rows, forms = x.shape[-2], {}
        lone = rows == 1 and w.ndim == 2
        if lone and w.dtype.itemsize <= 2:
            forms["cpu"] = lambda x, w: form(jnp.concatenate([x, x]), w, *args, **kwargs)[:1]
        if lone and x.dtype != "int8":
            forms["cuda"] = lambda x, w: jnp.sum(
                x.astype("float32") * w.astype("float32"), -1)[None]
        if 1 < rows <= 16 and rows * w.shape[-2] <= 2 ** 17:
            forms["cpu"] = lambda x, w: materialized(multiply)(w, x).mT
        return lax.platform_dependent(x, w, default=multiply, **forms) if forms else multiply(x, w)

    return wraps(plain)(form)


def flattened(form, plain):
    """fn, fn -> fn: the plain product, whose few rows meet a weight in another form, as matrices.
    """
    def choose(x, w, n=1, sums="float32"):
        rows = math.prod(x.shape[:-n])
        if rows > 16:
            return plain(x, w, n, sums)
        C = math.prod(w.shape[-n:])
        y = form(x.reshape(rows, C), w.reshape(-1, C), sums=sums)
        return y.reshape(x.shape[:-n] + w.shape[:-n])

    return wraps(plain)(choose)


def one_query(plain):
    """fn -> fn: the same `partial_attention`. For a single query per key head a TPU would not use
    its matrix units, and would take 2 to 4 times as long, so the query is duplicated there."""
    def form(q, k, v, visible):
        def attend(q, visible):
            return plain(q, k, v, visible)

        def doubled(*rows):
            part = attend(*(jnp.concatenate([a, a], -2) for a in rows))
            return tree.map(lambda a: a[..., :1, :], part)

        forms = dict(tpu=doubled) if q.shape[2] == 1 else {}
        return lax.platform_dependent(q, visible, default=attend, **forms)

    return wraps(plain)(form)


product, scores = flattened(few_rows(product), product), few_rows(scores)
partial_attention, rotary = one_query(partial_attention), materialized(rotary)
