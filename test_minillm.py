"""Theorems about minillm: a test is a sentence, and hypothesis looks for what would refute it.

Everything is f32. f32 rounds at 6e-8 of a value; a logit of order 1 passes some hundred roundings,
in an order that differs between two ways to the same number, so TOLERANCE is 2e-5.
"""
import inspect
import json
import math
import pathlib
import re
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
import infer
import minillm
from infer import (Cache, decode_bytes, decode_flops, extend, generate, generate_reference,
                   init_cache, kv_bytes, log_probs, prefill, prefill_flops, resize, sample)
from minillm import (Config, adam_init, adamw, attention, block, cast, causal_attention, dims, dot,
                     forward, forward_flops, init, lookup, loss, matmul, param_count, rope, rotary,
                     traced_flops, train_flops, train_step, unembed)

settings.register_profile("minillm", deadline=None, derandomize=True, max_examples=8)
settings.load_profile("minillm")
TOLERANCE = 2e-5
SLOTS = 24

CONFIGS = [
    Config(L=2, E=16, H=4, K=2, D=8, F=24, V=31),
    Config(L=2, E=16, H=4, K=1, D=4, F=20, V=17, tied=False),
    Config(L=1, E=12, H=3, K=3, D=4, F=16, V=13, rope_base=100.0),
    Config(L=2, E=15, H=6, K=2, D=2, F=7, V=11, eps=1e-5),
    Config(L=1, E=8, H=2, K=1, D=6, F=12, V=19, act="gelu", embed_scale=True),
]
configs = st.sampled_from(CONFIGS)
grouped = CONFIGS[0]

forward_jit = jax.jit(forward, static_argnames="cfg")
extend_jit = jax.jit(extend, static_argnames="cfg")
prefill_jit = jax.jit(prefill, static_argnames="cfg")
unembed_jit = jax.jit(unembed, static_argnames="cfg")
GENERATE_STATIC = ("n", "cfg", "temperature", "top_k", "top_p", "end")
generate_jit = jax.jit(generate, static_argnames=GENERATE_STATIC)
reference_jit = jax.jit(generate_reference, static_argnames=("n", "cfg"))
loss_jit = jax.jit(loss, static_argnames="cfg")
attention_jit, causal_jit = jax.jit(attention), jax.jit(causal_attention)


@lru_cache(maxsize=None)
def weights(cfg, seed=0):
    """Random parameters, norm scales too: ones would hide a scale that is left out."""
    draw = np.random.default_rng(seed)

    def leaf(name):
        w = draw.normal(size=minillm.sizes(name, cfg)).astype(np.float32)
        return jnp.asarray(w / np.sqrt(w[0].size) if " " in name else 1 + 0.3 * w)

    return jax.tree.map(leaf, dims(cfg))


def draw_tokens(cfg, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, cfg.V, shape).astype(np.int32)


def normals(*shapes, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.normal(size=shape).astype(np.float32) for shape in shapes]


def close(a, b, tolerance=TOLERANCE):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@lru_cache(maxsize=None)
def abstract(cfg):
    """Shapes of the parameters in the dtype that cfg computes in."""
    return jax.eval_shape(lambda: init(jax.random.key(0), cfg, cfg.dtype))


def shaped(*shape, dtype="int32"):
    return jax.ShapeDtypeStruct(shape, dtype)


# ----------------------------------------------------------------------------------- minillm: flops


@given(configs, st.integers(1, 3), st.sampled_from([1, 2, 7, 65, 130]),
       st.sampled_from(["float32", "bfloat16"]))
def test_forward_and_its_gradient_multiply_what_the_formulas_say(cfg, B, T, dtype):
    cfg = replace(cfg, dtype=dtype)
    params, tokens = abstract(cfg), shaped(B, T + 1)
    assert traced_flops(partial(forward, cfg=cfg), params, shaped(B, T)) \
        == sum(forward_flops(cfg, B, T).values())
    expected = sum(train_flops(cfg, B, T).values())
    assert traced_flops(jax.grad(partial(loss, cfg=cfg)), params, tokens) == expected
    masters = abstract(replace(cfg, dtype="float32"))
    assert traced_flops(partial(train_step, cfg=cfg, lr=1e-3), masters,
                        jax.eval_shape(adam_init, masters), tokens) == expected
    again = partial(loss, cfg=cfg, block=jax.checkpoint(block, static_argnums=(3, 4)))
    assert traced_flops(jax.grad(again), params, tokens) \
        == sum(train_flops(cfg, B, T, remat=True).values())


@given(configs, st.integers(1, 4), st.integers(1, 100))
def test_training_costs_6BP_of_the_weights_and_forward_2BP(cfg, B, T):
    multiplied = sum(math.prod(minillm.sizes(name, cfg)) for name in jax.tree.leaves(dims(cfg))
                     if " " in name) - (0 if cfg.tied else cfg.V * cfg.E)
    for flops, each in ((forward_flops, 2), (train_flops, 6)):
        items = flops(cfg, B, T)
        attended = items.pop("scores") + items.pop("values")
        assert sum(items.values()) == each * B * T * multiplied
        assert attended >= each * 2 * B * T * (T + 1) // 2 * cfg.L * cfg.H * cfg.D


def test_one_weight_is_multiplied_once_forwards_and_twice_backwards():
    x, w = shaped(5, 7, dtype="float32"), shaped(3, 7, dtype="float32")
    assert traced_flops(matmul, x, w) == 2 * 5 * 7 * 3
    spine = jax.grad(lambda x, w: matmul(x, w).sum(), argnums=0)
    both = jax.grad(lambda x, w: matmul(x, w).sum(), argnums=(0, 1))
    products = [str(eqn) for eqn in jax.make_jaxpr(both)(x, w).eqns if "dot_general" in str(eqn)]
    assert traced_flops(both, x, w) == 3 * 2 * 5 * 7 * 3 and len(products) == 3
    assert traced_flops(spine, x, w) <= traced_flops(both, x, w)


def test_a_scan_counts_its_length_and_a_loop_of_unknown_length_is_refused():
    x = shaped(4, 4, dtype="float32")
    assert traced_flops(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0], x) \
        == 5 * 2 * 4 ** 3
    assert traced_flops(lambda x: jax.jit(jax.checkpoint(lambda x: x @ x))(x), x) == 2 * 4 ** 3
    with pytest.raises(ValueError, match="while"):
        traced_flops(lambda x: jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c @ c, x), x)
    with pytest.raises(ValueError, match="cond"):
        traced_flops(lambda x: jax.lax.cond(x.sum() < 1, lambda c: c @ c, lambda c: c, x), x)


# ---------------------------------------------------------------------------------- minillm: values


def attention_by_hand(q, k, v, pos):
    """The definition, in f64: for each row, head and query, a softmax over what it sees."""
    B, T, H, D = q.shape
    out = np.zeros(q.shape)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                kv = h // (H // k.shape[1])
                seen = slice(0, pos[b, t] + 1)
                scores = k[b, kv, seen].astype(float) @ q[b, t, h] / np.sqrt(D)
                share = np.exp(scores - scores.max())
                out[b, t, h] = share / share.sum() @ v[b, kv, seen]
    return out


@given(st.sampled_from([(6, 1), (6, 2), (6, 3), (6, 6), (1, 1)]), st.integers(1, 4),
       st.lists(st.integers(0, 8), min_size=2, max_size=2), st.integers(0, 99))
def test_attention_is_the_definition_for_every_K_that_divides_H(heads, T, starts, seed):
    (H, K), S, D = heads, 12, 4
    q, k, v = normals((2, T, H, D), (2, K, S, D), (2, K, S, D), seed=seed)
    pos = np.array(starts)[:, None] + np.arange(T)
    close(attention_jit(q, k, v, pos), attention_by_hand(q, k, v, pos))


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130, 521])
def test_causal_attention_is_attention_at_positions_0_to_T(T):
    q, k, v = normals((2, T, 4, 8), (2, 2, T, 8), (2, 2, T, 8))
    pos = np.broadcast_to(np.arange(T), (2, T))
    close(causal_jit(q, k, v), attention_jit(q, k, v, pos))


def forward_by_hand(params, tokens, cfg):
    """The model, in NumPy and f64, with no line in common."""
    def norm(x, scale):
        return x / np.sqrt(np.mean(x ** 2, -1, keepdims=True) + cfg.eps) * scale

    def turn(x):  # BTHD as complex numbers, d with d + D/2
        z = x[..., :cfg.D // 2] + 1j * x[..., cfg.D // 2:]
        speed = cfg.rope_base ** (-2 * np.arange(cfg.D // 2) / cfg.D)
        z = z * np.exp(1j * np.arange(x.shape[1])[:, None, None] * speed)
        return np.concatenate([z.real, z.imag], -1)

    params = jax.tree.map(lambda w: np.asarray(w, float), params)
    pos = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    x = params.embed[tokens] * (cfg.E ** 0.5 if cfg.embed_scale else 1)
    for w in params.layers:
        q, k, v = (np.einsum("bte,hde->bthd", norm(x, w.attn_norm), m) for m in (w.wq, w.wk, w.wv))
        out = attention_by_hand(turn(q), turn(k).swapaxes(1, 2), v.swapaxes(1, 2), pos)
        x = x + np.einsum("bthd,ehd->bte", out, w.wo)
        gate, up = (norm(x, w.mlp_norm) @ m.T for m in (w.w_gate, w.w_up))
        inner = gate + 0.044715 * gate ** 3
        act = gate / (1 + np.exp(-gate)) if cfg.act == "silu" else \
            gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * inner))
        x = x + (act * up) @ w.w_down.T
    return norm(x, params.out_norm) @ (params.embed if cfg.tied else params.unembed).T


@pytest.mark.parametrize("cfg", [*CONFIGS, replace(CONFIGS[1], eps=0.1, rope_base=3.0)], ids=repr)
def test_forward_is_the_model_as_written_in_numpy(cfg):
    params, tokens = weights(cfg), draw_tokens(cfg, 3, SLOTS)
    close(forward_jit(params, tokens, cfg=cfg), forward_by_hand(params, tokens, cfg))


@given(configs, st.integers(1, SLOTS - 1), st.integers(0, 99))
def test_a_later_token_does_not_touch_an_earlier_logit(cfg, t, seed):
    params, before = weights(cfg), draw_tokens(cfg, 3, SLOTS, seed=seed)
    after = before.copy()
    after[:, t] = (after[:, t] + 1 + seed % (cfg.V - 1)) % cfg.V
    a, b = forward_jit(params, before, cfg=cfg), forward_jit(params, after, cfg=cfg)
    assert np.array_equal(a[:, :t], b[:, :t])
    assert not np.array_equal(a[:, t], b[:, t])


@given(configs, st.integers(0, 500))
def test_rotary_turns_keep_lengths_and_see_only_distance(cfg, shift):
    x, y = normals((1, 1, 1, cfg.D), (1, 1, 1, cfg.D))

    def product(p, s):
        a, b = (rope(z, rotary(jnp.array([[at]]), cfg)) for z, at in ((x, p), (y, s)))
        return jnp.sum(a * b)

    close(rope(x, rotary(jnp.array([[0]]), cfg)), x, 0)
    close(jnp.sum(rope(x, rotary(jnp.array([[shift]]), cfg)) ** 2), jnp.sum(x ** 2))
    # an angle of 500 radians is known to 500 * 6e-8
    close(product(shift + 5, shift + 2), product(5, 2), 500 * 6e-8 * 10)


def test_shared_key_heads_are_separate_heads_with_equal_weights():
    params, wide = weights(grouped), replace(grouped, K=grouped.H)
    copies = grouped.H // grouped.K
    layers = tuple(w._replace(wk=jnp.repeat(w.wk, copies, 0), wv=jnp.repeat(w.wv, copies, 0))
                   for w in params.layers)
    tokens = draw_tokens(grouped, 2, 9)
    close(forward_jit(params, tokens, cfg=grouped),
          forward_jit(params._replace(layers=layers), tokens, cfg=wide))


@pytest.mark.parametrize("cfg", CONFIGS[:2], ids=repr)
def test_a_model_that_knows_nothing_loses_log_V(cfg):
    params = weights(cfg)
    blank = params._replace(out_norm=jnp.zeros_like(params.out_norm))
    close(loss_jit(blank, draw_tokens(cfg, 2, 9), cfg=cfg), math.log(cfg.V))


def test_dot_and_its_gradient_are_the_plain_product_and_its_own():
    x, w, dy = normals((2, 3, 4, 6), (5, 4, 6), (2, 3, 5))

    def plain(x, w):
        return jnp.einsum("btcd,ncd->btn", x, w)

    y, back = jax.vjp(partial(dot, n=2), x, w)
    expected, plain_back = jax.vjp(plain, x, w)
    close(y, expected)
    for ours, theirs in zip(back(dy), plain_back(dy)):
        close(ours, theirs)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_narrow_product_sums_in_f32_and_a_single_row_is_no_exception(rows):
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in normals((rows, 999), (3, 999)))
    exact = np.asarray(x, float) @ np.asarray(w, float).T
    # products of bf16 are exact in f32, and 999 sums of them lose at most 999 * 6e-8 of the total
    limit = 999 * 6e-8 * (np.abs(np.asarray(x, float)) @ np.abs(np.asarray(w, float)).T)
    assert np.all(np.abs(dot(x, w, dtype=jnp.float32) - exact) <= limit)


def test_narrow_values_are_rounded_once_and_never_inside():
    """bf16 rounds at 2**-8 of a value. Norm, rotation and attention work in f32."""
    def exact(*arrays):
        return [np.asarray(a, float) for a in arrays]

    x, scale = (jnp.asarray(a, jnp.bfloat16) for a in normals((1, 9, 2, 64), (64,)))
    mean_square = np.mean(exact(x)[0] ** 2, -1, keepdims=True)
    unit = exact(x)[0] / np.sqrt(mean_square) * exact(scale)[0]
    assert np.all(np.abs(minillm.rms_norm(x, scale, 0.0) - unit) <= 1.01 * 2 ** -8 * np.abs(unit))
    pos, half = 257 + np.arange(9)[None], exact(x)[0][..., :32] + 1j * exact(x)[0][..., 32:]
    cfg = replace(grouped, D=64)
    half = half * np.exp(1j * pos[..., None, None] * 1e4 ** (-np.arange(32) / 32))
    turned = np.concatenate([half.real, half.imag], -1)
    limit = 1.01 * 2 ** -8 * np.abs(turned) + 1e-4  # 265 radians are known to 265 * 6e-8
    assert np.all(np.abs(rope(x, rotary(jnp.asarray(pos), cfg)) - turned) <= limit)
    k, seen = x.swapaxes(1, 2), np.arange(9)[None]
    q = 8 * x[:, ::-1]  # scores of order 10: rounded to bf16 they would move a weight by 4%
    out, hand = attention(q, k, k, jnp.asarray(seen)), attention_by_hand(*exact(q, k, k), seen)
    assert np.all(np.abs(out - hand) <= 2 ** -7 * np.abs(exact(k)[0]).max())


def test_no_product_of_a_bf16_program_rounds_its_sums():
    cfg = replace(grouped, dtype="bfloat16")
    cache = jax.eval_shape(lambda: init_cache(cfg, 2, 9))
    for program in (jax.make_jaxpr(jax.grad(partial(loss, cfg=cfg)))(abstract(cfg), shaped(2, 9)),
                    jax.make_jaxpr(partial(extend, cfg=cfg))(abstract(cfg), cache, shaped(2, 1))):
        sums = re.findall(r":(\w+)\[[\d,]*\] = dot_general", str(program))
        assert len(sums) > 7 * cfg.L and set(sums) == {"f32"}


def test_the_gradient_of_a_frequent_token_is_summed_in_f32():
    dy = jnp.asarray(*normals((3, 333, 4)), jnp.bfloat16)
    _, back = jax.vjp(lambda table: lookup(table, jnp.ones((3, 333), jnp.int32)),
                      jnp.zeros((2, 4), jnp.bfloat16))
    exact = np.asarray(dy, float).sum((0, 1))
    # rounded to bf16 once, after 999 sums
    limit = 2 ** -8 * np.abs(exact) + 999 * 6e-8 * np.abs(np.asarray(dy, float)).sum((0, 1))
    gradient = np.asarray(back(dy)[0], float)
    assert np.all(np.abs(gradient[1] - exact) <= limit) and np.all(gradient[0] == 0)


@pytest.mark.parametrize("cfg", CONFIGS, ids=repr)
def test_every_gradient_is_the_slope_of_the_loss(cfg):
    """Along its own direction, a gradient g has slope |g|. Two central differences make one whose
    error grows with h**4: 0.02 was seen at h = 0.04, 256 times less remains at 0.01. The loss, of
    order 3, is rounded at 6e-8 and divided by h: 2e-4."""
    params, tokens = weights(cfg), draw_tokens(cfg, 2, 9)
    value = partial(loss_jit, cfg=cfg)
    grads, tree = jax.tree.flatten(jax.jit(jax.grad(value))(params, tokens))
    leaves = jax.tree.leaves(params)
    for i, g in enumerate(grads):
        norm = float(jnp.linalg.norm(g))

        def slope(h):
            moved = [tree.unflatten(leaves[:i] + [leaves[i] + s * h * g / norm] + leaves[i + 1:])
                     for s in (1, -1)]
            return float(value(moved[0], tokens) - value(moved[1], tokens)) / (2 * h)

        assert norm > 0
        assert abs((4 * slope(0.005) - slope(0.01)) / 3 - norm) < 5e-4 + 1e-3 * norm


def test_adamw_is_the_textbook_over_several_steps():
    params = weights(grouped)
    adam, lr = adam_init(params), 0.01
    p = [np.asarray(w, float) for w in jax.tree.leaves(params)]
    m, v = [[np.zeros(w.shape) for w in p] for _ in "mv"]
    for t in range(1, 6):
        grads = weights(grouped, seed=10 + t)
        params, adam = adamw(params, adam, grads, lr)
        for i, g in enumerate(np.asarray(g, float) for g in jax.tree.leaves(grads)):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            decay = 0.1 * p[i] if p[i].ndim > 1 else 0
            p[i] = p[i] - lr * (m[i] / (1 - 0.9 ** t) / (np.sqrt(v[i] / (1 - 0.95 ** t)) + 1e-8)
                                + decay)
    assert int(adam.step) == 5
    for ours, theirs in zip(jax.tree.leaves((params, adam.m, adam.v)), p + m + v):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_is_the_gradient_then_adamw_on_f32_masters(dtype):
    cfg, params = replace(grouped, dtype=dtype), weights(grouped)
    tokens = draw_tokens(cfg, 2, 9)
    step = jax.jit(train_step, static_argnames="cfg")
    new, adam, value = step(params, adam_init(params), tokens, cfg=cfg, lr=1e-2)
    grads = jax.jit(jax.grad(lambda p: loss(cast(p, dtype), tokens, cfg)))(params)
    for ours, theirs in zip(*map(jax.tree.leaves, (
            new, jax.jit(adamw)(params, adam_init(params), grads, 1e-2)[0]))):
        close(ours, theirs)
    assert {w.dtype for w in jax.tree.leaves((new, adam.m, adam.v))} == {jnp.dtype("float32")}
    exact = loss_jit(params, tokens, cfg=cfg)
    assert abs(value - exact) <= 2 ** -6 * exact  # bf16 rounds at 2 ** -8


@pytest.mark.parametrize("cfg", CONFIGS[:2], ids=repr)
def test_init_has_variance_one_over_fan_in_and_norms_of_one(cfg):
    cfg, drawn = replace(cfg, E=48, F=96, V=160), []
    for name, w in zip(jax.tree.leaves(dims(cfg)), jax.tree.leaves(init(jax.random.key(3), cfg))):
        if " " not in name:
            assert np.all(w == 1)
        else:
            fan_in = math.prod(minillm.sizes(name.split()[1], cfg))
            # the variance of n normals is known to sqrt(2 / n): five times that
            assert abs(jnp.var(w) * fan_in - 1) < 5 * math.sqrt(2 / w.size)
            drawn.append(float(w.ravel()[0]) * fan_in ** 0.5)
    assert len(set(drawn)) == len(drawn)  # no two from the same key


PUBLISHED = {
    "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "mistral-7b": 7_248_023_552,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384}


def test_every_published_model_has_its_published_number_of_parameters():
    assert PUBLISHED.keys() == bench.MODELS.keys()
    for name, cfg in bench.MODELS.items():
        leaves = jax.tree.leaves(abstract(cfg))
        assert param_count(cfg) == sum(math.prod(w.shape) for w in leaves) == PUBLISHED[name], name


# ----------------------------------------------------------------------------------- contract lines


def split_terms(text):
    """str -> list: at its commas outside parentheses."""
    depth, terms = 0, [""]
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            terms.append("")
        else:
            terms[-1] += letter
    return [term.strip() for term in terms]


def term_shape(term, size):
    """`B(T+1)` -> (size["B"], size["T"] + 1); three dots stand for 2 x 3. None: not a shape."""
    found = re.findall(r"\.\.\.|\([^)]*\)|[A-Zn]", term)
    if "".join(found) != term:
        return None
    return sum(((2, 3) if part == "..." else (eval(part, {}, size),) for part in found), ())


def contract_value(term, size, cfg):
    """One term of a contract as an argument: a shape as a ShapeDtypeStruct, or what it names."""
    params, half = abstract(cfg), (size["B"], size["T"], cfg.D // 2)
    cache = jax.eval_shape(lambda: init_cache(cfg, size["B"], size["S"]))
    named = {
        "cfg": cfg, "Params": params, "Layer": params.layers[0], "Cache": cache, "k": cache.k,
        "v": cache.v, "Adam": jax.eval_shape(adam_init, params), "eps": 1e-6, "lr": 1e-3,
        "key": jax.eval_shape(lambda: jax.random.key(0)), "dtype": "float32", "int": size["n"],
        "n": size["n"], "str": "HD", "table": (shaped(*half, dtype="float32"),) * 2, "None": None,
        "S": size["S"], "temperature": 0.5, "top_k": 2,
        "top_p": 0.9, "scalar": shaped(dtype="float32"), "attend": minillm.causal, "fn": jnp.sum,
        "list": [],
        "array": np.ones(3), "arrays": np.ones(3), "bool": True, "dict": {}, "tuple": (),
        "look": lambda q, k, v, *old: (minillm.causal_attention(q, k, v), old), "state": ...}
    if term in named:
        return named[term]
    if term.startswith("(") and "," in term:
        return tuple(contract_value(part, size, cfg) for part in split_terms(term[1:-1]))
    dtype = "int32" if term in ("BT", "B(T+1)", "B", "Bn") else "float32"
    return shaped(*term_shape(term, size), dtype=dtype)


def is_abstract(value):
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))


CONTRACTS = [fn for module in (minillm, infer)
             for name, fn in inspect.getmembers(module, inspect.isroutine)
             if getattr(fn, "__module__", "") == module.__name__ and not name.startswith("_")]


@pytest.mark.parametrize("fn", CONTRACTS + [matmul, lookup], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_contract_line_holds(fn, seed):
    contract = re.match(r"(.*?) -> ([^:]*)", inspect.getdoc(fn) or "")
    assert contract, f"{fn.__name__} has no contract line"
    draw = np.random.default_rng(seed)
    size = {letter: int(draw.integers(1, 5)) for letter in "BTKEFVMCOn"}
    size |= {"S": size["T"] + size["n"], "D": 2 * int(draw.integers(1, 4))}
    size["H"] = size["K"] * int(draw.integers(1, 4))
    cfg = Config(L=2, **{letter: size[letter] for letter in "EHKDFV"})
    arguments = [contract_value(term, size, cfg) for term in split_terms(contract[1])]
    expected = [contract_value(term, size, cfg) for term in split_terms(contract[2])]
    if not any(map(is_abstract, arguments)):  # it takes and gives no arrays: call it
        assert isinstance(fn(*arguments), type(expected[0]))
        return

    def call(traced):
        return fn(*(traced.get(i, argument) for i, argument in enumerate(arguments)))

    result = jax.eval_shape(call, {i: a for i, a in enumerate(arguments) if is_abstract(a)})
    for got, want in zip(result if len(expected) > 1 else [result], expected, strict=True):
        if want is not ...:  # what `state` is, the caller decides
            got, want = ([a.shape for a in jax.tree.leaves(tree)] for tree in (got, want))
            assert got == want


# --------------------------------------------------------------------------------- infer: the cache


@given(configs, st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=4),
       st.lists(st.integers(1, 6), min_size=3, max_size=3), st.integers(0, 2), st.integers(0, 99))
def test_extending_ragged_rows_in_any_chunks_and_after_rollback_is_forward_on_the_whole(
        cfg, chunks, lengths, back, seed):
    params, B = weights(cfg), len(lengths)
    lengths, text = np.array(lengths), draw_tokens(cfg, B, SLOTS, seed=seed)
    _, cache = prefill_jit(params, init_cache(cfg, B, SLOTS), text[:, :6], lengths, cfg=cfg)
    chunks = [*chunks, None, *chunks]  # half way, rows are rolled back and then told something else
    for T in chunks:
        at = np.asarray(cache.length)
        if T is None:
            keep = np.maximum(1, at - back - np.arange(B))
            cache = cache._replace(length=jnp.asarray(keep))
            for b in range(B):
                text[b, keep[b]:] = (text[b, keep[b]:] + 1) % cfg.V
            continue
        if at.max() + T > SLOTS:
            break
        new = np.stack([text[b, at[b]:at[b] + T] for b in range(B)])
        x, cache = extend_jit(params, cache, new, cfg=cfg)
        logits, whole = unembed_jit(params, x, cfg=cfg), forward_jit(params, text, cfg=cfg)
        for b in range(B):
            close(logits[b], whole[b, at[b]:at[b] + T])


@given(configs, st.lists(st.integers(1, 6), min_size=3, max_size=3), st.integers(0, 99))
def test_prefill_gives_forwards_last_logits_and_padding_changes_nothing(cfg, lengths, seed):
    params, text, lengths = weights(cfg), draw_tokens(cfg, 3, 6, seed=seed), np.array(lengths)
    logits, cache = prefill_jit(params, init_cache(cfg, 3, 8), text, lengths, cfg=cfg)
    whole = forward_jit(params, text, cfg=cfg)
    close(logits, whole[np.arange(3), lengths - 1])
    assert np.array_equal(cache.length, lengths)
    other = np.where(np.arange(6) < lengths[:, None], text, (text + 1) % cfg.V)
    padded, _ = prefill_jit(params, init_cache(cfg, 3, 8), other, lengths, cfg=cfg)
    assert np.array_equal(logits, padded)


def sure(params, cfg, text, lengths, n):
    """B -> how many of n tokens after each prompt are decided: the two best logits differ by more
    than both may be wrong. Rows of different batch sizes are not equal to the bit."""
    best = np.sort(forward_jit(params, text, cfg=cfg), axis=-1)
    decided = best[:, :, -1] - best[:, :, -2] > 10 * TOLERANCE
    return [np.argmin(np.append(decided[b, T - 1:T - 1 + n], False)) for b, T in enumerate(lengths)]


@settings(max_examples=5)
@given(configs, st.lists(st.sampled_from([1, 4, 6]), min_size=3, max_size=3), st.integers(0, 99))
def test_generate_is_generate_reference_for_every_row_alone_token_for_token(cfg, lengths, seed):
    params, text, n = weights(cfg), draw_tokens(cfg, 3, SLOTS, seed=seed), 7
    logits, cache = prefill_jit(params, init_cache(cfg, 3, SLOTS), text[:, :6], np.array(lengths),
                                cfg=cfg)
    tokens, logits, cache = generate_jit(params, cache, logits, jax.random.key(0), n=n, cfg=cfg)
    assert tokens.shape == (3, n) and np.array_equal(cache.length, np.array(lengths) + n)
    for b, T in enumerate(lengths):
        text[b, T:T + n] = reference_jit(params, text[b:b + 1, :T], n=n, cfg=cfg)[0]
    whole = forward_jit(params, text, cfg=cfg)
    for b, (T, known) in enumerate(zip(lengths, sure(params, cfg, text, lengths, n))):
        assert np.array_equal(tokens[b, :known], text[b, T:T + known])
        if known == n:
            close(logits[b], whole[b, T + n - 1])


def prompted(cfg, B, T=5, slots=SLOTS):
    """A model that has read a prompt: params, cache, logits."""
    params = weights(cfg)
    logits, cache = prefill_jit(params, init_cache(cfg, B, slots), draw_tokens(cfg, B, T),
                                np.arange(B) % T + 1, cfg=cfg)
    return params, cache, logits


@given(configs, st.sampled_from([1e30, -1e30, 3.0]))
def test_what_stands_in_unwritten_slots_changes_nothing(cfg, garbage):
    params, cache, logits = prompted(cfg, 3)
    filled = np.arange(SLOTS)[None, None, :, None] < cache.length[:, None, None, None]
    dirty = Cache(*([jnp.where(filled, a, garbage) for a in part] for part in cache[:2]),
                  cache.length)
    new = draw_tokens(cfg, 3, 2, seed=7)
    clean_x, _ = extend_jit(params, Cache(*map(list, cache[:2]), cache.length), new, cfg=cfg)
    dirty_x, _ = extend_jit(params, dirty, new, cfg=cfg)
    assert np.array_equal(clean_x, dirty_x)


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_a_generate_step_updates_the_cache_in_place(B, K):
    """Aliased and still copied is possible: temporaries below one K array are the proof."""
    cfg, S = Config(L=2, E=64, H=4, K=K, D=32, F=64, V=32), 8192
    cache = jax.eval_shape(lambda: init_cache(cfg, B, S))
    step = jax.jit(partial(generate, n=4, cfg=cfg), donate_argnums=1)
    memory = step.lower(abstract(cfg), cache, shaped(B, cfg.V, dtype="float32"),
                        jax.random.key(0)).compile().memory_analysis()
    one = B * K * S * cfg.D * 4
    assert memory.alias_size_in_bytes >= 2 * cfg.L * one
    assert memory.temp_size_in_bytes < one


@pytest.mark.parametrize("slots", [5, SLOTS, 40])
def test_resizing_keeps_what_is_held(slots):
    _, cache, _ = prompted(grouped, 3)
    other, shared = resize(cache, slots), min(slots, SLOTS)
    assert np.array_equal(other.length, cache.length)
    for a, b in zip(jax.tree.leaves(cache[:2]), jax.tree.leaves(other[:2]), strict=True):
        assert b.shape == (3, grouped.K, slots, grouped.D)
        assert np.array_equal(a[:, :, :shared], b[:, :, :shared])


# --------------------------------------------------------------------------- infer: what comes next


@pytest.mark.parametrize("how", [{}, {"temperature": 1.5, "top_k": 9, "top_p": 0.9}], ids=repr)
def test_generating_in_two_calls_is_generating_in_one(how):
    params, cache, logits = prompted(grouped, 3)
    go_on = partial(generate_jit, params, key=jax.random.key(5), cfg=grouped, **how)
    whole, last, _ = go_on(cache, logits, n=8)
    first, logits, cache = go_on(cache, logits, n=3)
    second, logits, _ = go_on(cache, logits, n=5)
    assert np.array_equal(whole, np.concatenate([first, second], axis=1))
    close(last, logits)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.2}], ids=repr)
def test_a_row_that_reaches_the_end_token_stays_there_and_others_go_on(how):
    params, cache, logits = prompted(grouped, 3)
    go_on = partial(generate_jit, params, key=jax.random.key(5), n=8, cfg=grouped, **how)
    free, _, _ = go_on(cache, logits)
    end = int(free[0, 3])
    held, last, stopped = go_on(cache, logits, end=end)
    for b in range(3):
        hits = np.flatnonzero(free[b] == end)
        until = hits[0] if len(hits) else 8
        assert np.array_equal(held[b, :until], free[b, :until]) and np.all(held[b, until:] == end)
        assert stopped.length[b] == cache.length[b] + until
    again, _, _ = generate_jit(params, resize(stopped, 40), last, jax.random.key(6), n=4,
                               cfg=grouped, end=end, temperature=2.0)
    assert np.all(again[0] == end)  # with any key and temperature


@given(st.sampled_from([1, 5, 8]), st.integers(0, 9), st.sampled_from([0.2, 0.5, 0.9, 1.0]),
       st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 99))
def test_log_probs_keep_the_right_tokens_ties_included(V, top_k, top_p, temperature, seed):
    logits = np.random.default_rng(seed).integers(-2, 3, V).astype(np.float32)  # ties abound
    share = np.exp(logits / temperature)
    keep = np.ones(V, bool) if not 0 < top_k < V else logits >= np.sort(logits)[-top_k]
    share = np.where(keep, share, 0) / share[keep].sum()
    for value in np.unique(logits[keep]):
        keep &= (logits != value) | (share[logits > value].sum() < top_p - 1e-6)
    logp = log_probs(jnp.asarray(logits), temperature, top_k, top_p)
    if all(abs(share[logits > value].sum() - top_p) > 1e-5 for value in np.unique(logits)):
        assert np.array_equal(np.isfinite(logp), keep)
        close(np.exp(logp), np.where(keep, share, 0) / share[keep].sum())
    close(jnp.exp(logp).sum(), 1)


def test_temperature_0_is_all_on_the_best_token():
    logits = jnp.array([[0.5, 2.0, 2.0, -1.0]])
    assert np.array_equal(jnp.exp(log_probs(logits, 0.0)), [[0, 1, 0, 0]])


def test_old_style_keys_draw_what_new_ones_draw():
    logits, pos = jnp.asarray(*normals((64, 9))), jnp.arange(64)
    old, new = (sample(key(3), logits, pos, 1.0, 0, 1.0) for key in (jax.random.PRNGKey,
                                                                     jax.random.key))
    assert np.array_equal(old, new) and len(np.unique(new)) > 1


def test_draws_have_the_frequencies_of_log_probs():
    """Chi-square of 20,000 draws over 6 tokens: 5 degrees of freedom exceed 20.5 once in 1,000; a
    probability of 1/6 that is off by 10% would give 40."""
    logits, draws = jnp.array([0.3, -1.0, 0.0, 1.2, 0.7, -0.4]), 20_000
    tokens = sample(jax.random.key(1), jnp.tile(logits, (draws, 1)), jnp.zeros(draws, jnp.int32),
                    0.9, 0, 1.0)
    expected = draws * np.exp(log_probs(logits, 0.9))
    counts = np.bincount(tokens, minlength=6)
    assert np.sum((counts - expected) ** 2 / expected) < 20.5


# --------------------------------------------------------------------------------- infer: its costs


@given(configs, st.integers(1, 3), st.sampled_from([1, 3, 70]), st.integers(1, 5),
       st.sampled_from(["float32", "bfloat16"]))
def test_prefill_extend_and_generate_multiply_what_the_formulas_say(cfg, B, T, n, dtype):
    cfg, S = replace(cfg, dtype=dtype), T + n
    params, cache = abstract(cfg), jax.eval_shape(lambda: init_cache(cfg, B, S))
    assert traced_flops(partial(prefill, cfg=cfg), params, cache, shaped(B, T), shaped(B)) \
        == sum(prefill_flops(cfg, B, T).values())

    def verify(params, cache, tokens):
        x, cache = extend(params, cache, tokens, cfg)
        return unembed(params, x, cfg), cache

    assert traced_flops(verify, params, cache, shaped(B, T)) \
        == sum(decode_flops(cfg, B, S, T).values())
    assert traced_flops(partial(generate, n=n, cfg=cfg), params, cache,
                        shaped(B, cfg.V, dtype="float32"), jax.random.key(0)) \
        == n * sum(decode_flops(cfg, B, S).values())


@given(configs, st.integers(1, 3), st.integers(1, 9), st.sampled_from(["float32", "bfloat16"]),
       st.sampled_from(["float32", "bfloat16"]))
def test_decode_bytes_are_those_of_the_trees_that_are_read(cfg, B, S, dtype, cache_dtype):
    cfg = replace(cfg, dtype=dtype)
    params, cache = abstract(cfg), jax.eval_shape(lambda: init_cache(cfg, B, S, cache_dtype))

    def held(tree):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))

    moved = decode_bytes(cfg, B, S, cache_dtype=cache_dtype)
    assert moved["weights"] == held(params if cfg.tied else params._replace(embed=None))
    assert moved["cache_read"] == held(cache[:2]) == kv_bytes(cfg, B, S, cache_dtype)
    assert moved["cache_write"] * S == moved["cache_read"]
    assert moved["embed"] == B * cfg.E * jnp.dtype(dtype).itemsize
    assert moved["logits"] == held(jax.eval_shape(
        lambda p: unembed(p, jnp.zeros((B, 1, cfg.E), dtype), cfg), params))


def test_the_lectures_cache_is_939_MB_a_sequence():
    assert kv_bytes(bench.MODELS["gemma-7b"], 1, 2048, "bfloat16") == 939_524_096


# ---------------------------------------------------------------------------------------- bad input


def check(call, *words):
    """One ValueError of one line, naming each of the words."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def test_bad_input_is_refused_by_name_before_work_starts():
    cfg, params = grouped, weights(grouped)
    text, cache = draw_tokens(cfg, 2, 6), init_cache(cfg, 2, 8)
    logits, key = jnp.zeros((2, cfg.V)), jax.random.key(0)
    check(lambda: replace(cfg, H=5), "H=5", "K=2")
    check(lambda: replace(cfg, D=7), "D=7")
    check(lambda: replace(cfg, L=0), "L=0")
    check(lambda: replace(cfg, act="relu"), "relu", "silu")
    check(lambda: replace(cfg, dtype="int3"), "int3", "bfloat16")
    check(lambda: forward(params, text + cfg.V, cfg), "vocabulary", cfg.V - 1)
    check(lambda: forward(params, text - cfg.V, cfg), "vocabulary", "-")
    check(lambda: loss(params, text + cfg.V, cfg), "vocabulary")
    check(lambda: forward(params, text[0], cfg), "[B, T]")
    check(lambda: forward(params, text * 1.0, cfg), "float")
    check(lambda: forward(params, text[:, :0], cfg), "empty")
    check(lambda: prefill(params, cache, text[:, :0], np.array([1, 1]), cfg), "empty")
    check(lambda: prefill(params, cache, text, np.array([0, 6]), cfg), "lengths 0")
    check(lambda: prefill(params, cache, text, np.array([1, 7]), cfg), 7, "padded to 6")
    check(lambda: prefill(params, cache, text, np.array([6]), cfg), "2 prompts")
    check(lambda: prefill(params, cache, text + cfg.V, np.array([6, 6]), cfg), "vocabulary")
    check(lambda: prefill(params, init_cache(cfg, 2, 5), text, np.array([6, 6]), cfg), "S=6")
    check(lambda: prefill(params, init_cache(cfg, 3, 8), text, np.array([6, 6]), cfg), "cache of 3")
    held = cache._replace(length=jnp.array([3, 6]))
    check(lambda: extend(params, held, text[:, :3], cfg), "6 tokens", "8 slots", "S=9")
    check(lambda: generate(params, held, logits, key, 3, cfg), "3 new", "8 slots")
    check(lambda: jax.jit(generate, static_argnums=(4, 5))(params, held, logits, key, 9, cfg), 9)
    check(lambda: resize(held, 5), "5 slots")
    check(lambda: init_cache(cfg, 0, 8), "0 rows")
    check(lambda: log_probs(logits, -1.0), -1.0)
    check(lambda: log_probs(logits, 1.0, 0, 0.0), "top_p=0.0")


# -------------------------------------------------------------------------------------------- bench


TINY = "L1,E16,H2,K1,D8,F24,V256"
LIMITS = {"flops_per_second": {"float32": 1e12, "bfloat16": 2e12}, "read_bytes_per_second": 1e11}


@pytest.fixture
def calm(monkeypatch):
    """Fixed ceilings that no machine reaches at toy sizes, so that nothing depends on timing."""
    monkeypatch.setattr(bench, "measure_flops", lambda dtype: 1e15)
    monkeypatch.setattr(bench, "measure_read", lambda: 1e15)


KEYS = {"phase", "model", "dtype", "cache_dtype", "B", "T", "S", "flops", "padding_flops",
        "weight_bytes", "cache_bytes", "predicted_seconds", "measured_seconds", "p10_seconds",
        "p90_seconds", "runs", "compile_seconds", "bound", "mfu", "mbu", "tokens_per_second"}


@pytest.mark.parametrize("phase", list(bench.PHASES))
def test_a_phase_alone_ends_in_one_json_line_whose_flops_are_the_programs(phase, calm, capsys):
    batches = [2] if phase == "train" else [1, 2]
    bench.main([phase, "--model", TINY, "--batch", ",".join(map(str, batches)), "--dtype",
                "float32,bfloat16", "--prompt", "6", "--new", "3"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["machine"].keys() >= {"device", "count", "cores", "jax", "python"}
    assert [(r["B"], r["dtype"]) for r in result["rows"]] == [
        (B, dtype) for dtype in ("float32", "bfloat16") for B in batches]
    for row in result["rows"]:
        assert row.keys() >= KEYS and row["runs"] >= 5 and not row["errors"]
        assert row["p10_seconds"] <= row["measured_seconds"] <= row["p90_seconds"]
        cfg = replace(bench.parse_model(TINY), dtype=row["dtype"])
        step, args, _ = bench.PHASES[phase].build(cfg, init(jax.random.key(0), cfg, cfg.dtype),
                                                  jax.random.key(0), row["B"], 6, 3, "float32")
        assert traced_flops(step, *args) \
            == (row["flops"] + row["padding_flops"]) * bench.PHASES[phase].steps(3)
        assert sum(part["seconds"] for part in row["parts"]) == row["predicted_seconds"]


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(list(bench.PHASES)),
       st.sampled_from(["float32", "bfloat16"]))
def test_predictions_grow_with_batch_and_tokens_and_no_part_beats_either_limit(B, T, phase, dtype):
    cfg = replace(bench.parse_model("L2,E64,H4,K2,D16,F192,V256"), dtype=dtype)

    def seconds(B, T):
        cost = bench.PHASES[phase].cost(cfg, B, T, 8, "float32")
        result = bench.predict(cost, dtype, LIMITS)
        for part in result["parts"]:
            times = {"flops": part["flops"] / LIMITS["flops_per_second"][dtype],
                     "bytes": part["bytes"] / LIMITS["read_bytes_per_second"]}
            assert part["seconds"] == max(times.values()) == times[part["bound"]]
        assert result["predicted_seconds"] == pytest.approx(sum(
            part["seconds"] for part in result["parts"]))
        return result["predicted_seconds"]

    assert seconds(B, T) <= seconds(B + 1, T) and seconds(B, T) <= seconds(B, T + 1)


@pytest.mark.parametrize("cfg", CONFIGS + [bench.MODELS["llama-2-7b"]], ids=repr)
def test_at_the_crossover_attention_multiplies_as_much_as_the_weights(cfg):
    T, S = bench.crossover(cfg)
    for slots in (S, S + 1):
        flops = decode_flops(cfg, 1, slots)
        attended = flops.pop("scores") + flops.pop("values")
        assert (attended <= sum(flops.values())) == (slots == S)
    pairs = 4 * cfg.L * cfg.H * cfg.D * T * T / 2  # the triangle alone
    flops = forward_flops(cfg, 1, T)
    others = sum(flops.values()) - flops["scores"] - flops["values"]
    assert pairs == pytest.approx(others, rel=2 / T)


def test_a_utilisation_above_1_is_an_error_and_never_a_figure(monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_flops", lambda dtype: 1.0)
    monkeypatch.setattr(bench, "measure_read", lambda: 1.0)
    bench.main(["generate", "--model", TINY, "--batch", "1", "--prompt", "4", "--new", "2"])
    out = capsys.readouterr().out
    row = json.loads(out.splitlines()[-1])["rows"][0]
    assert row["mfu"] is None and row["mbu"] is None and len(row["errors"]) == 2
    assert "error: generate float32 B=1: MFU would be" in out and "ceiling" in out


def test_training_on_a_text_lowers_its_held_out_loss(calm, capsys, tmp_path):
    path = tmp_path / "text"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    bench.main(["train", "--text", str(path), "--steps", "60", "--model", TINY, "--prompt", "32",
                "--lr", "0.01", "--new", "8"])
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert abs(result["loss_before"] - math.log(256)) < 1 and result["loss_after"] < 2.5
    assert "nats/byte" in captured.err and "MFU" in captured.err and "goes on" in captured.out


def test_the_sentence_is_recited_and_a_program_that_does_not_stops_the_bench(monkeypatch):
    bench.check_values(seed=0)
    monkeypatch.setattr(bench, "complete", lambda *_: " all the cats")
    with pytest.raises(SystemExit, match="all the cats"):
        bench.check_values(seed=0, steps=1)


@pytest.mark.parametrize("argv, words", [
    (["generate", "--model", "gpt-9"], ["gpt-9", "smollm2-135m", "gemma-7b"]),
    (["generate", "--model", "L1,E16,H2,K1,D8,F24"], ["L1,E16", "shape"]),
    (["generate", "--model", "L1,E16,H2,K1,D8,F24,Vx"], ["Vx"]),
    (["generate", "--model", "L1,E16,H3,K2,D8,F24,V9"], ["H=3", "K=2"]),
    (["generate", "--model", "L1,E16,H2,K2,D7,F24,V9"], ["D=7"]),
    (["generate", "--batch", "0"], ["'0'"]), (["prefill", "--batch", "1,a"], ["1,a"]),
    (["train", "--dtype", "float8"], ["float8", "bfloat16"]),
    (["train", "--text", "no-such-file"], ["no-such-file"]),
    (["train", "--steps", "0"], ["'0'"]),
    (["fly"], ["fly", "generate"]),
    (["generate", "--model", "llama-3.1-405b"], ["GB", "free", "--model"]),
])
def test_a_bad_command_line_gets_one_line_that_names_the_remedy(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(argv)
    message = capsys.readouterr().err or str(caught.value.code)
    assert caught.value.code != 0 and message.strip().count("\n") == 0
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", [b"", b"short"])
def test_a_text_too_short_to_train_on_is_refused_with_its_size(content, tmp_path, capsys):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"{len(content)} bytes"):
        bench.main(["train", "--text", str(path)])


# ---------------------------------------------------------------------------------------- README


README = pathlib.Path(__file__).with_name("README.md").read_text()


def test_the_readmes_python_runs_and_its_asserts_hold():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    for source in blocks:
        exec(source, {})


def test_what_the_readme_names_is_there():
    names = re.findall(r"`(minillm|infer|bench)\.(\w+)`", README)
    assert len(names) > 10
    for module, name in names:
        assert name == "py" or hasattr({"minillm": minillm, "infer": infer, "bench": bench}[module],
                                       name), name
    tests = re.findall(r"`(test_\w+)`", README)
    assert len(tests) > 5 and set(tests) <= set(globals())
    assert all(name in README for name in bench.MODELS)
    for line in re.findall(r"^python bench\.py (.*?)(?: *#.*)?$", README, re.M):
        bench.parse(line.split())
