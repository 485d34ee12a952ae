"""Theorems about minillm: a test is a sentence, and hypothesis looks for what would refute it.

Everything is f32. f32 rounds at 6e-8 of a value; a logit of order 1 passes some hundred roundings,
in an order that differs between two ways to the same number, so TOLERANCE is 2e-5.
"""
import ast
import concurrent.futures
import contextlib
import html
import importlib.util
import inspect
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache, partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import bench
import infer
import minillm
import shard
from infer import (Q8, Q8A8, Cache, accept, acceptance, decode_bytes, decode_flops, dequantize,
                   extend, generate, generate_reference, init_cache, kv_bytes, load, log_probs,
                   model_draft, ngram_draft, prefill, prefill_flops, quantize, quantize_params,
                   resize, sample, save, serve, speculate, weight_bytes)
from minillm import (Config, adam_init, adamw, attention, block, cast, causal_attention, dims, dot,
                     forward, forward_flops, init, lookup, loss, matmul, param_count, rope, rotary,
                     traced_flops, train_flops, train_step, unembed)

jax.config.update("jax_disable_most_optimizations", True)  # compiles faster, computes the same
jax.config.update("jax_num_cpu_devices", 8)  # for shard.py; the others use the first
if jax.__version_info__ < (0, 11):  # compiles faster still; later ones do not know it
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                               + " --xla_cpu_use_fusion_emitters=false")
settings.register_profile("minillm", deadline=None, derandomize=True, max_examples=3)
settings.load_profile("minillm")
TOLERANCE = 2e-5
SLOTS = 24

CONFIGS = [
    Config(L=2, E=16, H=4, K=2, D=8, F=24, V=31),
    Config(L=2, E=16, H=4, K=1, D=4, F=20, V=17, tied=False, qk_norm=True),
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
speculate_jit = jax.jit(speculate, static_argnames=GENERATE_STATIC)
accept_jit, acceptance_jit = jax.jit(accept), jax.jit(acceptance)
reference_jit = jax.jit(generate_reference, static_argnames=("n", "cfg"))
loss_jit = jax.jit(loss, static_argnames="cfg")
attention_jit, causal_jit = jax.jit(attention), jax.jit(causal_attention)


README = pathlib.Path(__file__).with_name("README.md").read_text()
DOCS = pathlib.Path(__file__).with_name("docs")
RUN = (DOCS / "run.md").read_text()  # a default run's output
TWO_PROCESSES = ("shard --devices 4 --processes 2 --model L1,E32,H4,K4,D8,F48,V64 --batch 4 "
                 "--prompt 6 --new 3 --form").split() + ["hand ring", "--form", "heads ring"]


TWO_SAVES = """
import multiprocessing, socket, sys
from dataclasses import replace
from functools import partial

def one(address, i, n, folder):
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, n, i)
    import infer, shard
    from minillm import Config, adam_init, init
    cfg = Config(L=1, E=16, H=4, K=4, D=4, F=24, V=32, act="gelu", embed_scale=True)
    held = partial(shard.shardings, mesh=shard.make_mesh(tensor=2 * n), rules=shard.TENSOR)
    params = jax.jit(init, static_argnums=1, out_shardings=held(cfg))(jax.random.key(0), cfg)
    for _ in range(2):  # once where nothing is, once over what is there
        infer.save(folder, cfg, params, adam=adam_init(params))
    found, again = infer.load(folder, shardings=held)
    again, adam = infer.load_adam(folder, found, again)
    assert found == cfg and adam.m.embed.sharding == params.embed.sharding
    for a, b in zip(*map(jax.tree.leaves, (again, params))):
        assert all((x.data == y.data).all() for x, y in zip(a.addressable_shards,
                                                            b.addressable_shards))

if __name__ == "__main__":
    from concurrent.futures import ProcessPoolExecutor
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    n, folder = int(sys.argv[1]), sys.argv[2]
    with ProcessPoolExecutor(n, multiprocessing.get_context("fork")) as pool:
        list(pool.map(one, [address] * n, range(n), [n] * n, [folder] * n))
"""


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """What takes processes of its own: begun at once, one after the other beside all other tests;
    each value waits for its end and gives its output."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) >= 2
    each = "import sys\nfor source in sys.argv[1:]:\n    exec(source, {})"
    folder = tmp_path_factory.mktemp("beside")
    commands = {"README": ["-c", each, *snippets], "two": [bench.__file__, *TWO_PROCESSES],
                "saves": ["-c", TWO_SAVES, "2", str(folder / "saved")]}
    asked = " ".join(item.nodeid for item in request.session.items)
    for name, test in (("README", "readmes_python"), ("two", "two_processes_compute"),
                       ("saves", "two_processes_save")):
        if test not in asked or name == "saves" and not importlib.util.find_spec("safetensors"):
            del commands[name]
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "8",
           "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    started = {}

    def start(name):
        return subprocess.run([sys.executable, *commands[name]], cwd=folder, env=env, text=True,
                              capture_output=True)

    with concurrent.futures.ThreadPoolExecutor(1) as queue:
        for name in commands:
            started[name] = queue.submit(start, name)

        def output(name):
            done = started[name].result()
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield {name: partial(output, name) for name in commands} | {"folder": folder}


def files(test):
    """A test of files of weights: it runs where the extra hf is installed."""
    return pytest.mark.files(pytest.mark.skipif(
        importlib.util.find_spec("safetensors") is None, reason='pip install ".[hf]"')(test))


@pytest.fixture
def optimised():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


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


@given(configs, st.integers(1, 3), st.sampled_from([1, 7, 130]),
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


@given(st.booleans(), st.integers(1, 13), st.sampled_from([1.0, -2.5]))
def test_a_loss_by_blocks_of_tokens_is_the_loss_and_so_is_its_gradient(tied, blocks, times):
    """Beside logits that are all there, and the compiler's gradient of them."""
    cfg = replace(WIDE, L=1, tied=tied)
    params, tokens = weights(cfg), draw_tokens(cfg, 2, 7)

    def plain(params):
        logits = jax.nn.log_softmax(forward(params, tokens[:, :-1], cfg))
        return -times * jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], 2))

    expected = jax.value_and_grad(plain)(params)
    ours = jax.value_and_grad(lambda params: times * loss(params, tokens, cfg, blocks=blocks))(
        params)
    jax.tree.map(close, ours, expected)


@pytest.mark.parametrize("M, V, n", [(2048, 256000, 1), (8192, 256000, 4), (7, 3, 1),
                                     (3, 2 ** 31, 3), (30, 2 ** 27, 8), (5003, 128256, 2)])
def test_logits_of_a_block_of_tokens_take_two_GiB_at_most(M, V, n):
    assert minillm.token_blocks(M, V) == n


def test_a_loss_by_blocks_of_tokens_holds_one_blocks_logits():
    """Compiled, not run: of 8,192 tokens and a vocabulary of 32,768 they take 1.07 GB in f32."""
    cfg = Config(L=1, E=32, H=2, K=1, D=16, F=32, V=2 ** 15)

    def temporaries(blocks):
        run = jax.jit(jax.value_and_grad(partial(loss, cfg=cfg, blocks=blocks)))
        return run.lower(abstract(cfg), shaped(64, 129)).compile().memory_analysis() \
            .temp_size_in_bytes

    whole, parts = temporaries(1), temporaries(16)
    assert whole > 2 ** 30 and parts < whole / 8


@given(configs, st.integers(1, 4), st.integers(1, 100))
def test_training_costs_6BP_of_the_weights_and_forward_2BP(cfg, B, T):
    multiplied = sum(minillm.size_of(name, cfg) for name in jax.tree.leaves(dims(cfg))
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
    assert traced_flops(lambda x: jax.lax.cond(x.sum() < 1, lambda c: c @ c, lambda c: c.T @ c, x),
                        x) == 2 * 4 ** 3
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


@pytest.mark.parametrize("T", [1, 2, 64, 65, 130, 257, 521, 1025])
def test_causal_attention_is_attention_at_positions_0_to_T(T):
    q, k, v = normals((2, T, 4, 8), (2, 2, T, 8), (2, 2, T, 8))
    pos = np.broadcast_to(np.arange(T), (2, T))
    close(causal_jit(q, k, v), attention_jit(q, k, v, pos))


def gradient_by_hand(q, k, v, dy):
    """Of attention_by_hand at positions 0 to T - 1, in f64: for each row, head and query."""
    q, k, v, dy = (np.asarray(a, float) for a in (q, k, v, dy))
    dq, dk, dv = (np.zeros(a.shape) for a in (q, k, v))
    B, T, H, D = q.shape
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        at = b, h // (H // k.shape[1]), slice(0, t + 1)
        p = np.exp(k[at] @ q[b, t, h] / np.sqrt(D))
        p /= p.sum()
        dp = v[at] @ dy[b, t, h]
        ds = p * (dp - p @ dp) / np.sqrt(D)
        dq[b, t, h] = ds @ k[at]
        dk[at] += np.outer(ds, q[b, t, h])
        dv[at] += np.outer(p, dy[b, t, h])
    return dq, dk, dv


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T, H, K", [(1, 4, 2), (9, 3, 3), (130, 4, 1), (257, 6, 2)])
def test_causal_attention_and_its_gradient_are_the_definition(T, H, K, dtype):
    """T = 130 and 257 are 2 and 3 blocks, of which the last may be padded. In bf16 p, ds, the
    result and its gradient are each rounded at 2**-8, of values of order 1, and summed."""
    q, k, v, dy = (jnp.asarray(a, dtype) for a in normals(
        (2, T, H, 8), (2, K, T, 8), (2, K, T, 8), (2, T, H, 8)))
    pos = np.broadcast_to(np.arange(T), (2, T))
    out, back = jax.jit(lambda *qkv: jax.vjp(causal_attention, *qkv))(q, k, v)
    exact = attention_by_hand(*(np.asarray(a, float) for a in (q, k, v)), pos)
    limit = TOLERANCE if dtype == "float32" else 2 ** -6 * (1 + np.abs(exact).max())
    assert out.dtype == dtype and np.abs(out - exact).max() <= limit
    for ours, exact in zip(back(dy), gradient_by_hand(q, k, v, dy)):
        limit = TOLERANCE if dtype == "float32" else 2 ** -5 * np.sqrt(T * H / K) + 0.05
        assert ours.dtype == dtype and np.abs(ours - exact).max() <= limit


@given(st.integers(0, 99), st.sampled_from([(2, 3, 7), (1, 11), (5, 1, 1, 5)]),
       st.sampled_from(["float32", "int8"]))
def test_parts_are_merged_in_any_order_and_an_empty_one_changes_nothing(seed, widths, dtype):
    q, k, v = normals((2, 3, 4, 8), (2, 3, 12, 8), (2, 3, 12, 8), seed=seed)
    k, v = (quantize(a, -1) for a in (k, v)) if dtype == "int8" else (k, v)
    seen = np.random.default_rng(seed).random((2, 1, 4, 12)) < 0.5  # a row may miss a whole part
    seen[..., 0] = True
    ends = np.cumsum(widths)
    look = jax.jit(minillm.partial_attention)

    def part(start, stop, seen):
        return look(q, *(jax.tree.map(lambda a: a[:, :, start:stop], a) for a in (k, v)), seen)

    parts = [part(end - n, end, seen[..., end - n:end]) for n, end in zip(widths, ends)]
    empty = part(0, 2, np.zeros((4, 2), bool))
    assert np.all(empty.largest == -np.inf) and not np.any(empty.total) and not np.any(empty.values)
    whole = minillm.normalised(minillm.partial_attention(q, k, v, seen))
    for order in (parts, parts[::-1], [empty, empty, *parts, empty]):
        left, right = reduce(minillm.merge, order), reduce(
            lambda a, b: minillm.merge(b, a), order[::-1])
        close(minillm.normalised(left), whole)
        close(minillm.normalised(right), whole)
    garbage = empty._replace(values=empty.values + 1e30, total=empty.total - 3)
    for merged in (minillm.merge(parts[0], garbage), minillm.merge(garbage, parts[0])):
        jax.tree.map(np.testing.assert_array_equal, merged, parts[0])


@pytest.mark.parametrize("T, t, garbage", [(9, 4, 3.0), (300, 150, 1e30), (300, 1, -1e30)])
def test_what_a_query_does_not_see_changes_neither_it_nor_its_gradient(T, t, garbage):
    q, k, v = normals((1, T, 2, 4), (1, 1, T, 4), (1, 1, T, 4))
    dy = np.where(np.arange(T)[:, None, None] < t, *normals((1, T, 2, 4), seed=1), 0)

    def run(q, k, v):
        out, back = jax.vjp(causal_attention, q, k, v)
        return out[:, :t], [d[:, :t] if i == 0 else d[:, :, :t] for i, d in enumerate(back(dy))]

    later = np.arange(T)[:, None] >= t
    clean, dirty = map(jax.tree.leaves, (jax.jit(run)(q, k, v), jax.jit(run)(
        q, *(np.where(later, np.float32(garbage), a) for a in (k, v)))))
    assert len(clean) == 4 and all(map(np.array_equal, clean, dirty))


@settings(max_examples=4)
@given(st.sampled_from([1, 3]), st.sampled_from([5, 24, 37]), st.sampled_from([1, 7, 64]),
       st.sampled_from(["float32", "int8"]))
def test_slots_looked_at_some_at_a_time_are_slots_looked_at_together(T, S, width, dtype):
    q, k, v = normals((2, T, 4, 8), (2, 2, S, 8), (2, 2, S, 8))
    pos = np.array([[0], [S - T]]) + np.arange(T)
    k, v = (quantize(a, -1) for a in (k, v)) if dtype == "int8" else (k, v)
    look = jax.jit(attention, static_argnames="width")
    close(look(q, k, v, pos, width=width), look(q, k, v, pos))
    assert traced_flops(partial(attention, width=width), q, k, v, pos) \
        == 2 * 2 * 2 * T * S * 4 * 8


@pytest.mark.parametrize("what", ["forward", "gradient", "chunk"])
def test_attentions_memory_grows_as_its_tokens_do(what, optimised):
    """Twice T tokens take less than 2.2 times the temporaries: what is squared would take four.
    A chunk of 1,024 tokens behind S slots takes no more for twice the slots."""
    def backward(*qkv):
        out, back = jax.vjp(causal_attention, *qkv)
        return back(out)

    def temporaries(T):
        q, k = shaped(1, T, 4, 16, dtype="float32"), shaped(1, 2, T, 16, dtype="float32")
        run = {"forward": causal_attention, "gradient": backward, "chunk": partial(
            infer.cached_attention, pos=jnp.arange(T - 1024, T)[None])}[what]
        q = q if what != "chunk" else shaped(1, 1024, 4, 16, dtype="float32")
        return jax.jit(run).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    once, twice = temporaries(4096), temporaries(8192)  # compiled, not run
    assert once < 4096 * 4096 * 4 and twice < (1.2 if what == "chunk" else 2.2) * once


@pytest.mark.parametrize("platform, own", [("cpu", True), ("tpu", False), ("cuda", False)])
def test_a_lone_row_is_doubled_or_summed_few_turned_and_cosines_stored_only_where_that_is_faster(
        platform, own):
    """Elsewhere the program that is handed to the compiler is the plain form's."""
    def text(fn, *args):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    for M, dtype in itertools.product((1, 2, 16, 17), ("float32", "bfloat16", "int8")):
        sums = jnp.int32 if dtype == "int8" else jnp.float32
        program = text(partial(minillm.product, sums=sums), shaped(M, 8, dtype=dtype),
                       shaped(40, 8, dtype=dtype))
        doubled = own and M == 1 and dtype != "float32"
        assert ("concatenate" in program) == doubled
        turned = own and (M in (2, 16) or doubled)
        assert ("optimization_barrier" in program) == ("transpose" in program) == turned
        summed = platform == "cuda" and M == 1 and dtype != "int8"
        assert program.count("dot_general") == 1 - summed and ("reduce" in program) == summed
        assert (f"-> tensor<40x{2 if doubled else M}x" in program) == turned
    for M in (1, 3, 16, 17):
        program = text(lambda q, k, seen: minillm.partial_attention(q, k, k, seen).largest,
                       shaped(2, 3, M, 8, dtype="float32"), shaped(2, 3, 40, 8, dtype="float32"),
                       shaped(M, 40, dtype="bool"))
        assert (f"tensor<2x3x40x{M}xf32>" in program) == (own and 1 < M <= 16)
        assert ("tensor<2x3x2x40xf32>" in program) == (platform == "tpu" and M == 1)
    for B, K, T in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)):
        program = text(infer.write, shaped(B, K, 9, 4, dtype="float32"),
                       shaped(B, K, T, 4, dtype="float32"), shaped(B, T))
        assert ("tensor<1x1x1x4xf32>) -> tensor<2x1x1x4xf32>" in program) == (
            own and B * K * T == 1)
    backward = jax.grad(lambda w, x: jnp.sum(matmul(x, w)))
    for dtype in ("bfloat16", "float32"):
        program = text(backward, shaped(30, 8, dtype=dtype), shaped(50, 8, dtype=dtype))
        assert ("optimization_barrier" in program) == (own and dtype == "bfloat16")
    assert ("optimization_barrier" in text(partial(rotary, cfg=grouped), shaped(2, 3))) == own


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_products_are_the_definition_however_many_rows_there_are(dtype):
    for M in (1, 2, 15, 16, 17):
        x, w = normals((M, 8), (21, 8), seed=M)
        x, w = (np.round(30 * a).astype("int8") if dtype == "int8" else jnp.asarray(a, dtype)
                for a in (x, w))
        y = jax.jit(partial(minillm.product, sums=jnp.int32 if dtype == "int8" else jnp.float32))(
            x, w)
        exact = np.einsum("mc,oc->mo", np.asarray(x, float), np.asarray(w, float))
        assert y.dtype == ("int32" if dtype == "int8" else "float32")
        assert np.allclose(y, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gated_product_rounds_once(act, dtype):
    gate, up = (jnp.asarray(a, dtype) for a in normals((3, 5, 8), (3, 5, 8)))
    gate = 4 * gate
    out = minillm.gated(gate, up, act)
    x, y = np.asarray(gate, float), np.asarray(up, float)
    tanh = np.tanh(x / 2 if act == "silu" else np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3))
    exact = x * (1 + tanh) / 2 * y
    rounding = {"float32": 1e-6, "bfloat16": 1.01 * 2 ** -8}[dtype]
    tail = 2e-7 * np.abs(x * y)  # 1 + tanh is known to an f32 rounding or two of 1
    assert np.all(np.abs(out - exact) <= rounding * np.abs(exact) + tail + 1e-6)


def test_a_position_is_turned_into_cosines_once_for_all_layers():
    for cfg in CONFIGS:
        program = str(jax.make_jaxpr(partial(forward, cfg=cfg))(abstract(cfg), shaped(2, 9)))
        assert len(re.findall(r"= cos ", program)) == len(re.findall(r"= sin ", program)) == 1


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
        if cfg.qk_norm:
            q, k = norm(q, w.q_norm), norm(k, w.k_norm)
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


def test_gradients_by_hand_go_backwards_alone():
    x, table = normals((1, 4, 2, 8), (5, 8))
    for fn, *at in ((lambda x: matmul(x[0, 0], x[0, 1]), x),
                    (lambda x: causal_attention(x, *2 * [x.swapaxes(1, 2)]), x),
                    (lambda x: lookup(x, np.arange(3)[None]), table)):
        jax.vjp(fn, *at)
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(fn, at, at)


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


@pytest.mark.parametrize("cfg", CONFIGS[1::3] + CONFIGS[3:4], ids=repr)
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
            fan_in = minillm.size_of(name.split()[1], cfg)
            # the variance of n normals is known to sqrt(2 / n): five times that
            assert abs(jnp.var(w) * fan_in - 1) < 5 * math.sqrt(2 / w.size)
            drawn.append(float(w.ravel()[0]) * fan_in ** 0.5)
    assert len(set(drawn)) == len(drawn)  # no two from the same key


PUBLISHED = {
    "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "mistral-7b": 7_248_023_552,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384}


def test_every_published_model_has_its_published_number_of_parameters():
    assert PUBLISHED.keys() == bench.MODELS.keys()
    for name, cfg in bench.MODELS.items():
        leaves = jax.tree.leaves(abstract(cfg))
        assert param_count(cfg) == sum(math.prod(w.shape) for w in leaves) == PUBLISHED[name], name


def test_a_backend_is_named_only_where_it_has_a_form_of_its_own():
    """In one section at the end of minillm.py, of at most three functions."""
    source = pathlib.Path(minillm.__file__).read_text()
    plain, section = re.split(r"# -+ what one backend", source)
    folklore = r"platform_dependent|optimization_barrier|default_b|\b(cpu|[gt]pu|cuda|xla)s?\b"
    for text in (plain, *(pathlib.Path(m.__file__).read_text() for m in (infer, shard))):
        assert not re.findall(folklore, text, re.I)
    assert section.count("platform_dependent") == section.count("\ndef ") == 3
    assert not re.search(r"^# -", section, re.M)


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
    found = re.findall(r"\.\.\.|\([^)]*\)|[A-Zn1]", term)
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
        "n": size["n"], "str": "HD", "act": "silu", "None": None,
        "table": (shaped(*half, dtype="float32"),) * 2,
        **{letter: size[letter] for letter in "HKSTV"}, "Q8": jax.eval_shape(
            partial(quantize, axes=-1), shaped(*(size[letter] for letter in "BTE"))),
        "int8 Params": jax.eval_shape(lambda p: quantize_params(p, cfg), params), "axes": -1,
        "draft": ngram_draft(cfg, 2), "n_draft": 2, "end": 1, "counts": shaped(size["B"], 3),
        "temperature": 0.5,
        "keys": jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size["n"])), "top_k": 2,
        "top_p": 0.9, "scalar": shaped(dtype="float32"), "fn": jnp.sum,
        "eqn": jax.make_jaxpr(jax.jit(jnp.sin))(1.0).eqns[0],
        "list": [],
        "array": np.ones(3), "arrays": np.ones(3), "bool": True, "dict": {}, "tuple": (),
        "attend": lambda q, k, v, *old: (minillm.causal_attention(q, k, v), old[:2]), "state": None,
        "step": lambda state, *_: state, "nats": minillm.nats,
        "plain": partial(jnp.einsum, "BKMD,BKSD->BKMS")}
    if term in named:
        return named[term]
    if term == "Partial":
        wide, narrow = (shaped(*term_shape(term, size), dtype="float32") for term in (
            "BKMD", "BKM1"))
        return minillm.Partial(wide, narrow, narrow)
    if term == "saved":
        qkv = (contract_value(term, size, cfg) for term in ("BTHD", "BKTD", "BKTD"))
        return jax.eval_shape(minillm.causal_forward, *qkv)[1]
    if term.startswith("(") and "," in term:
        return tuple(contract_value(part, size, cfg) for part in split_terms(term[1:-1]))
    whole = ("BT", "B(T+1)", "B", "Bn", "BS", "1T", "1", "B(n+1)", "M")
    dtype = "int32" if term in whole else "float32"
    return shaped(*term_shape(term, size), dtype=dtype)


def is_abstract(value):
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))


CONTRACTS = [fn for module in (minillm, infer, shard)
             for name, fn in inspect.getmembers(module, inspect.isroutine)
             if getattr(fn, "__module__", "") == module.__name__ and not name.startswith("_")]
ON_THE_HOST = {"serve", "check_prompt", "load", "save", "parse_config", "understood", "alike",
               "rotary_settings", "read_json", "library", "open_tensors", "find_tensors", "part_of",
               "config_of", "write_tensors", "in_shards", "as_files_hold", "model_draft", "in_twos",
               "adam_file", "load_adam", "adam_arrays", "frequencies", "check_speculation",
               "rounds", "slots_of", "empty", "commit", "on_host"}  # each has tests of its own


@pytest.mark.parametrize("fn", CONTRACTS + [matmul, lookup, rope, causal_attention],
                         ids=lambda fn: fn.__name__)
def test_every_contract_line_holds(fn):
    """And with 64-bit numbers switched on, every result has the dtype that it has without."""
    contract = re.match(r"(.*?) ?-> ([^:]*)", inspect.getdoc(fn) or "")
    assert contract, f"{fn.__name__} has no contract line"
    if fn.__name__ in ON_THE_HOST or fn.__module__ == "shard":  # a mesh gives shapes their meaning
        return
    draw = np.random.default_rng(len(fn.__name__))
    size = {letter: int(draw.integers(1, 5)) for letter in "BTKEFVMCOn"}
    size |= {"S": size["T"] + size["n"], "D": 2 * int(draw.integers(1, 4))}
    size["G"] = int(draw.integers(1, 4))
    size["H"] = size["K"] * size["G"]
    cfg = Config(L=2, **{letter: size[letter] for letter in "EHKDFV"})
    arguments = [contract_value(term, size, cfg) for term in split_terms(contract[1])]
    expected = [contract_value(term, size, cfg) for term in split_terms(contract[2])]
    if not any(map(is_abstract, arguments)):  # it takes and gives no arrays: call it
        result = fn(*arguments)
        for got, want in zip(result if len(expected) > 1 else [result], expected, strict=True):
            assert isinstance(got, type(want))
        return

    def call(traced):
        return fn(*(traced.get(i, argument) for i, argument in enumerate(arguments)))

    traced = {i: a for i, a in enumerate(arguments) if is_abstract(a)}
    result = jax.eval_shape(call, traced)
    with jax.enable_x64(True):
        wide = jax.eval_shape(call, traced)
    assert [a.dtype for a in jax.tree.leaves(wide)] == [a.dtype for a in jax.tree.leaves(result)]
    for got, want in zip(result if len(expected) > 1 else [result], expected, strict=True):
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


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_prefill_of_some_rows_at_a_time_is_that_of_all(rows, dtype):
    cfg, lengths = CONFIGS[0], np.array([3, 6, 1, 6, 2, 5])
    params, text, cache = weights(cfg), draw_tokens(cfg, 6, 6), init_cache(cfg, 6, 8, dtype)
    cache = jax.tree.map(jnp.ones_like, cache)  # slots 6 and 7 stay as they are
    some = jax.jit(partial(prefill, cfg=cfg, rows=rows))
    whole = prefill_jit(params, cache, text, lengths, cfg=cfg)
    for got, want in zip(*map(jax.tree.leaves, (some(params, cache, text, lengths), whole)),
                         strict=True):
        assert got.dtype == want.dtype
        close(got, want, 1 if got.dtype == jnp.int8 else TOLERANCE)  # next to a rounding's edge
    for cfg in (cfg, replace(cfg, dtype="bfloat16")):
        assert (traced_flops(partial(prefill, cfg=cfg, rows=rows), abstract(cfg), cache, text,
                             lengths)
                == 6 // rows * sum(prefill_flops(cfg, B=rows, T=6).values()))


def test_prefill_of_some_rows_holds_the_temporaries_of_some_and_refuses_a_remainder():
    cfg = Config(L=2, E=64, H=4, K=2, D=16, F=256, V=32)

    def temporaries(rows):
        cache = jax.eval_shape(lambda: init_cache(cfg, 16, 64))
        return jax.jit(partial(prefill, cfg=cfg, rows=rows), donate_argnums=1).lower(
            abstract(cfg), cache, shaped(16, 64), shaped(16)).compile().memory_analysis(
            ).temp_size_in_bytes

    assert temporaries(2) < temporaries(None) / 4
    for rows in (5, 0, 32, 2.0, True):
        with pytest.raises(ValueError, match=f"rows={rows} at a time of 16"):
            prefill(weights(cfg), init_cache(cfg, 16, 4), draw_tokens(cfg, 16, 4), np.full(16, 4),
                    cfg, rows=rows)


@example(B=32, T=256)
@given(B=st.integers(1, 64), T=st.sampled_from([16, 64, 100, 192, 256, 1000, 3000]))
def test_bench_prefills_groups_of_one_to_two_thousand_tokens_or_all(B, T):
    rows = bench.rows_at_a_time(bench.Job("prefill", "", CONFIGS[0], B, T, 0))
    assert B % rows == 0 and (rows == B or 1024 <= rows * T <= 2048 < B * T)


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


def test_an_int8_cache_is_updated_in_place_and_half_as_many_bytes_again_are_scales():
    """A CPU widens a layer's int8 K and V for their products, 4 bytes for each, one layer at a time
    (8.3 times one int8 array was seen); a copy of the cache would come on top for every layer."""
    cfg, S = Config(L=8, E=64, H=4, K=2, D=32, F=64, V=32), 2048
    cache = jax.eval_shape(lambda: init_cache(cfg, 2, S, "int8"))
    step = jax.jit(partial(generate, n=4, cfg=cfg), donate_argnums=1)
    memory = step.lower(abstract(cfg), cache, shaped(2, cfg.V, dtype="float32"),
                        jax.random.key(0)).compile().memory_analysis()
    one = 2 * cfg.K * S * cfg.D
    assert memory.alias_size_in_bytes >= 2 * cfg.L * one * 9 // 8 == kv_bytes(cfg, 2, S, "int8")
    assert memory.temp_size_in_bytes < 11 * one


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


def test_a_program_that_asks_for_64_bits_elsewhere_is_served_and_speculates_the_same():
    """Where loops carry what they make; of all other functions the contracts are tested so."""
    cfg, text, key = CONFIGS[2], draw_tokens(CONFIGS[2], 2, 4), jax.random.key(1)
    params, known = weights(cfg), np.zeros((2, SLOTS), int)

    def told():
        cache = init_cache(cfg, 2, SLOTS, "int8")
        made = jax.eval_shape(lambda: generate(params, cache, jnp.zeros((2, cfg.V)), key, 3, cfg))
        assert [a.dtype.name for a in made[:2]] == ["int32", "float32"]
        cache = cache._replace(length=jnp.array([3, 3], jnp.int32))
        drafts = (ngram_draft(cfg, 2), None), (model_draft(params, cfg, 2), cache)
        return dict(serve(params, list(text), 2, SLOTS, 5, key, cfg, 0.7, top_k=3, end=0)), [
            jax.eval_shape(lambda: speculate(params, cache, known, key, 5, cfg, *draft))
            for draft in drafts]

    narrow = told()
    with jax.enable_x64(True):
        wide = told()
    assert [a.dtype for a in jax.tree.leaves(narrow)] == [a.dtype for a in jax.tree.leaves(wide)]
    assert all(np.array_equal(narrow[0][i], wide[0][i]) for i in range(2))


KINDS = ["threefry2x32", "rbg", "unsafe_rbg"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_draws_the_same_whatever_stands_beside_it_with_any_kind_of_key(kind):
    """And other rows draw something else: 64 rows of 50 tokens hit 36 of them on average, and fewer
    than 20 once in 10**9."""
    key, pos, logits = jax.random.key(3, impl=kind), jnp.arange(64), jnp.zeros((64, 50))
    how = (1.0, 0, 1.0)
    for keys in (key, jnp.stack([jax.random.fold_in(key, i) for i in range(64)])):
        drawn = sample(keys, logits, pos, *how)
        assert len(np.unique(drawn)) >= 20
        beside = sample(keys, logits.at[1:].set(jnp.arange(50.0)), pos, *how)
        assert drawn[0] == beside[0] and np.any(drawn != beside)
    assert np.array_equal(sample(keys[5:6], logits[:1], pos[5:6], *how), drawn[5:6])
    proposals, even = jnp.zeros((64, 3), jnp.int32), jnp.log(jnp.full((64, 4, 2), 0.5))
    draft = jnp.log(jnp.tile(jnp.array([0.9, 0.1]), (64, 3, 1)))
    counts, tokens = accept(key, proposals, draft, even)
    assert len(np.unique(counts)) == 4 and len(np.unique(tokens)) == 2


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_request_is_told_the_same_with_any_kind_of_key(kind):
    cfg, text, key = CONFIGS[2], draw_tokens(CONFIGS[2], 1, 4), jax.random.key(3, impl=kind)
    params = weights(cfg)
    told = dict(serve(params, [text[0]] * 4, 2, 12, 6, key, cfg, 1.0))
    assert len({tuple(map(int, told[i])) for i in told}) == 4
    logits, cache = prefill_jit(params, init_cache(cfg, 1, 12), text, np.array([4]), cfg=cfg)
    alone, _, _ = generate_jit(params, cache, logits, jax.random.fold_in(key, 2)[None], n=6,
                               cfg=cfg, temperature=1.0)
    assert np.array_equal(alone[0], told[2])


@pytest.mark.parametrize("temperature", [1e-37, 1e-38, 1e-40, 1e-46, 5e-324])
def test_a_temperature_near_0_is_greedy(temperature):
    logits = jnp.asarray(*normals((5, 9)))
    best = np.argmax(logits, -1)
    assert np.array_equal(sample(jax.random.key(0), logits, jnp.arange(5), temperature, 0, 1), best)
    close(jnp.exp(log_probs(logits, temperature)), np.eye(9)[best])


@pytest.mark.parametrize("top_p", [1e-38, 1e-40, 1e-46, 5e-324])
def test_a_top_p_near_0_keeps_the_most_probable_token(top_p):
    logits = jnp.asarray(*normals((5, 9)))
    close(jnp.exp(log_probs(logits, 1.0, 0, top_p)), np.eye(9)[np.argmax(logits, -1)])


@pytest.mark.parametrize("row, p", [
    ([0, -math.inf, 0, -math.inf], [.5, 0, .5, 0]), ([1, math.inf, 2, 3], [0, 1, 0, 0]),
    ([math.inf, 1, math.inf, -math.inf], [.5, 0, .5, 0]),
    ([0, math.nan, 0, math.nan], [.5, 0, .5, 0]),
    ([-math.inf] * 4, [.25] * 4), ([math.nan] * 4, [.25] * 4)], ids=repr)
@pytest.mark.parametrize("how", [(0.7, 0, 1.0), (0.7, 4, 1.0), (1e-40, 0, 1.0), (0.7, 0, 0.999),
                                 (9e37, 0, 1.0), (1e300, 0, 1.0)])
def test_logits_that_are_not_finite_are_certain_or_impossible(row, p, how):
    """+inf is certain, -inf and NaN impossible, and where there is nothing else, all are alike."""
    logits, p = jnp.tile(jnp.array(row), (40, 1)), np.array(p)
    if how[0] < 1e-38:
        p = np.eye(4)[np.argmax(p)]
    close(jnp.exp(log_probs(logits, *how))[0], p)
    assert {*np.unique(sample(jax.random.key(0), logits, jnp.arange(40), *how))} == {
        *np.flatnonzero(p)}


def test_numbers_of_any_library_say_how_to_sample():
    logits = jnp.asarray(*normals((5, 9)))
    wanted = log_probs(logits, 0.5, 3, 0.75)
    for how in ((np.float32(0.5), np.int64(3), np.float64(0.75)),
                (jnp.float32(0.5), jnp.int32(3), jnp.float32(0.75)), (jnp.array(0.5), 3, 0.75)):
        assert np.array_equal(log_probs(logits, *how), wanted)
        assert np.array_equal(jax.jit(lambda x: log_probs(x, *how))(logits), wanted)
    for how in ((math.nan, 0, 1), (10 ** 400, 0, 1), ("warm", 0, 1), ([1], 0, 1), (1, 0.5, 1),
                (1, 0, None)):
        check(lambda: log_probs(logits, *how), "temperature=")
    check(lambda: jax.jit(log_probs)(logits, 0.5), "static under jit")


# -------------------------------------------------------------------------------------- infer: int8


@given(st.integers(0, 99), st.sampled_from([1e-30, 1.0, 1e30]), st.sampled_from([-1, 0, (0, 1)]))
def test_a_quantised_number_is_within_half_a_scale_and_its_extremes_are_127(seed, size, axes):
    (x,) = normals((5, 8), seed=seed)
    x[1], x[:, 2] = 0, 0
    x = x * np.float32(size)
    held = quantize(jnp.asarray(x), axes)
    q, scale = np.asarray(held.q, float), np.asarray(held.scale, float)
    assert np.abs(q).max() <= 127 and np.all(q[x == 0] == 0)
    # x / scale is rounded at 6e-8 of up to 127 before it is rounded to an integer
    assert np.all(np.abs(x - q * scale) <= scale * (0.5 + 127 * 6e-8))
    extreme = (np.abs(x) == np.abs(x).max(axes, keepdims=True)) & (x != 0)
    assert np.all(np.abs(q[extreme]) == 127)
    np.testing.assert_allclose(dequantize(held)[extreme], x[extreme], rtol=2.4e-7)  # two roundings


def test_what_is_not_a_number_does_not_become_one():
    held = quantize(jnp.array([[1.0, jnp.nan, 3.0], [1.0, 2.0, 3.0]]), -1)
    assert np.all(np.isnan(dequantize(held)[0])) and np.all(np.isfinite(dequantize(held)[1]))


@pytest.mark.parametrize("kind", [Q8, Q8A8])
@pytest.mark.parametrize("rows", [1, 5])
def test_an_int8_dot_is_off_by_no_more_than_its_roundings(kind, rows):
    x, w = normals((rows, 2, 30), (7, 2, 30))
    held = kind(*quantize(jnp.asarray(w), (1, 2)))
    ours, exact = dot(x, held, 2), np.einsum("mhd,nhd->mn", x.astype(float), w)
    x_error = np.abs(x).max((1, 2))[:, None] / 254 if kind is Q8A8 else np.zeros((rows, 1))
    w_error = np.asarray(held.scale)[:, 0].T / 2
    bound = np.abs(x).sum((1, 2))[:, None] * w_error + x_error * (
        np.abs(w).sum((1, 2)) + 60 * w_error)
    assert np.all(np.abs(ours - exact) <= bound * 1.001) and np.any(ours != exact)
    if kind is Q8:
        close(ours, dot(x, dequantize(held), 2))


@given(st.lists(st.integers(0, 8), min_size=2, max_size=2), st.integers(0, 99))
def test_attention_to_an_int8_cache_is_attention_to_what_it_stands_for(starts, seed):
    q, k, v = normals((2, 3, 6, 4), (2, 2, 12, 4), (2, 2, 12, 4), seed=seed)
    pos = np.array(starts)[:, None] + np.arange(3)
    held_k, held_v = quantize(jnp.asarray(k), -1), quantize(jnp.asarray(v), -1)
    ours = infer.cached_attention(q, held_k, held_v, pos)
    close(ours, attention_jit(q, dequantize(held_k), dequantize(held_v), pos))
    # a score moves by s = |q|_1 * scale / 2 / sqrt(D) at most, a probability by a factor within
    # exp(+-2s), and the result by that much of v, and by v's own rounding
    s = np.abs(q).sum(-1).max() * np.asarray(held_k.scale).max() / 2 / np.sqrt(4)
    bound = np.expm1(2 * s) * np.abs(v).max() + np.asarray(held_v.scale).max() / 2
    assert np.all(np.abs(ours - attention_jit(q, k, v, pos)) <= bound)


OVERFLOWS = 9  # a token of `narrow`


@lru_cache(maxsize=None)
def narrow():
    """cfg, Params of float16, all finite, with a token whose values leave its range."""
    cfg = replace(CONFIGS[4], L=2, dtype="float16")
    params = cast(weights(replace(cfg, dtype="float32")), "float16")
    return cfg, params._replace(embed=params.embed.at[OVERFLOWS].set(6e4))


def well(cfg, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, OVERFLOWS, shape).astype(np.int32)


@given(st.integers(1, 7), st.integers(0, 1), st.integers(0, 99))
def test_a_token_that_overflows_touches_nobody_who_does_not_see_it(at, row, seed):
    """Later in its row, as padding of a prompt, and in slots that were rolled back: in every kind
    of cache, bit for bit."""
    cfg, params = narrow()
    text, lengths = well(cfg, 2, 8, seed=seed), np.full(2, 8)
    lengths[row] = at
    sick = text.copy()
    sick[row, at:] = OVERFLOWS
    logits = [forward_jit(params, tokens, cfg=cfg) for tokens in (text, sick)]
    assert np.array_equal(logits[0][row, :at], logits[1][row, :at])
    assert np.array_equal(logits[0][1 - row], logits[1][1 - row])
    assert not np.any(np.isfinite(logits[1][row, at:])) and np.all(np.isfinite(logits[0]))
    for dtype in ("float16", "int8"):
        empty, more = init_cache(cfg, 2, SLOTS, dtype), well(cfg, 2, 3, seed=seed + 1)
        (a, held), (b, padded) = (prefill_jit(params, empty, tokens, lengths, cfg=cfg)
                                  for tokens in (text, sick))
        assert np.array_equal(a, b)
        _, back = extend_jit(params, padded, np.full((2, 3), OVERFLOWS), cfg=cfg)
        back = back._replace(length=padded.length)
        for cache in (padded, back):
            assert np.array_equal(extend_jit(params, cache, more, cfg=cfg)[0],
                                  extend_jit(params, held, more, cfg=cfg)[0])
            assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(cache))


def refused_draft(key, tokens, length, state):
    made = jnp.full((len(tokens), 2), OVERFLOWS)
    return made, infer.one_hot(made, narrow()[0].V), state


def test_what_a_row_held_before_and_a_draft_that_is_refused_leave_nothing_behind():
    cfg, params = narrow()
    text, key = well(cfg, 3, 6), jax.random.key(0)
    told = dict(serve(params, [text[0], np.array([1, OVERFLOWS]), text[1], text[2]], 2, SLOTS, 5,
                      key, cfg))
    alone = dict(serve(params, list(text), 2, SLOTS, 5, key, cfg))
    assert all(np.array_equal(told[i], alone[j]) for i, j in ((0, 0), (2, 1), (3, 2)))
    cache, lengths = init_cache(cfg, 3, SLOTS, "float16"), np.full(3, 6)
    _, cache = prefill_jit(params, cache, text, lengths, cfg=cfg)
    cache, known = cache._replace(length=cache.length - 1), np.zeros((3, SLOTS), np.int32)
    known[:, :6] = text
    told, other = (speculate_jit(params, cache, known, key, n=6, cfg=cfg, draft=draft, state=None)
                   for draft in (jax.tree_util.Partial(refused_draft), ngram_draft(cfg, 2)))
    assert np.array_equal(told[0][:, :12], other[0][:, :12])


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_float16_around_an_int8_cache_is_as_near_as_bf16(size):
    """Its scales are of 1e-6 here, and with weights of 1e-2 below the least of float16."""
    q, k, v = normals((2, 3, 6, 4), (2, 2, 40, 4), (2, 2, 40, 4))
    pos, off = np.full((2, 3), 39), []
    for dtype in ("float16", "bfloat16"):
        held = [quantize(jnp.asarray(a, dtype), -1) for a in (k, v * size)]
        ours = infer.cached_attention(jnp.asarray(q, dtype), *held, pos)
        exact = attention_jit(q, *map(dequantize, held), pos)
        off.append(np.abs(ours - exact).max() / np.abs(exact).max())
    assert off[0] <= off[1] < 2 ** -6


def test_masters_of_any_dtype_train_and_a_gradient_in_float16_is_refused():
    cfg, text = CONFIGS[2], draw_tokens(CONFIGS[2], 4, 9)
    step, losses = jax.jit(train_step, static_argnames="cfg"), []
    for kind in ("float32", "float16", "bfloat16"):
        params = cast(weights(cfg), kind)
        adam = adam_init(params)
        for _ in range(30):
            params, adam, value = step(params, adam, text, cfg, 2e-2)
        losses.append(float(value))
        assert {a.dtype.name for a in jax.tree.leaves(params)} == {kind}
        assert {a.dtype.name for a in jax.tree.leaves(adam[1:])} == {"float32"}
    assert abs(losses[1] - losses[0]) < 0.02 * losses[0] < 0.02
    assert abs(losses[2] - losses[0]) < 0.3 * losses[0]
    half = replace(cfg, dtype="float16")
    check(lambda: train_step(params, adam, text, half, 1e-2), "float16", "bfloat16")
    check(lambda: jax.grad(loss)(cast(params, "float16"), text, half), "float16", "bfloat16")


def test_the_program_makes_no_wide_copy_of_int8_slots():
    cache = jax.eval_shape(lambda: init_cache(grouped, 2, 9, "int8"))
    program = jax.make_jaxpr(partial(extend, cfg=grouped))(abstract(grouped), cache, shaped(2, 1))
    shape = f"[2,{grouped.K},9,{grouped.D}]"
    assert f"i8{shape}" in str(program) and f"f32{shape}" not in str(program)


def test_an_int8_model_in_bf16_computes_what_its_numbers_say():
    cfg = replace(CONFIGS[4], dtype="bfloat16")
    params, tokens = quantize_params(weights(CONFIGS[4]), cfg, Q8), draw_tokens(cfg, 2, 9)
    params = params._replace(out_norm=params.out_norm.astype("bfloat16"))
    wide = jax.tree.map(lambda w: dequantize(w, "bfloat16") if isinstance(w, Q8) else w, params,
                        is_leaf=lambda w: isinstance(w, Q8))
    assert minillm.embed(params, tokens, cfg).dtype == jnp.bfloat16
    ours, theirs = (forward_jit(p, tokens, cfg=cfg) for p in (params, wide))
    close(ours, theirs, 0.1)  # q * scale is rounded to 2**-8 here and not there


# ------------------------------------------------------------------------------- infer: speculation


def distributions(seed, V, n, kind):
    """[p_0, ..., p_n]: p_i holds a distribution over V for each of V**i prefixes."""
    draw = np.random.default_rng(seed)
    tables = []
    for i in range(n):
        p = draw.dirichlet(np.ones(V), V ** i)
        if kind == "zeros":
            p = p * (draw.random(p.shape) < 0.5) + 1e-9 * (np.arange(V) == draw.integers(V))
        if kind == "one-hot":
            p = np.eye(V)[draw.integers(V, size=V ** i)]
        tables.append((p / p.sum(-1, keepdims=True)).astype(np.float32))
    return tables


@settings(max_examples=25)
@given(st.integers(2, 6), st.integers(1, 3), st.sampled_from(["dense", "zeros", "one-hot"]),
       st.sampled_from(["dense", "zeros", "one-hot", "equal"]), st.integers(0, 999))
def test_speculation_makes_every_output_with_the_targets_probability(V, n, kind, draft_kind, seed):
    """A round makes 1 to n + 1 tokens; continue it by the target itself. Summed over all V**n
    drafts, outcomes and continuations, each of V**(n+1) outputs has probability p_0 p_1 .. p_n."""
    p = distributions(seed, V, n + 1, kind)
    q = p[:n] if draft_kind == "equal" else distributions(seed + 1, V, n, draft_kind)
    drafts = np.array(list(itertools.product(range(V), repeat=n)))
    prefix = [drafts[:, :i] @ V ** np.arange(i)[::-1] for i in range(n + 1)]  # as a number
    with np.errstate(divide="ignore"):
        logq = np.log(np.stack([q[i][prefix[i]] for i in range(n)], 1))
        logp = np.log(np.stack([p[i][prefix[i]] for i in range(n + 1)], 1))
    probability, residual = map(np.asarray, acceptance_jit(drafts, logq, logp))
    assert np.all((probability >= 0) & (probability <= 1)) and np.all(residual >= 0)
    close(residual.sum(-1), 1)
    drawn = np.prod([q[i][prefix[i], drafts[:, i]] for i in range(n)], 0)
    total = np.zeros(V ** (n + 1))
    for kept in range(n + 1):
        refused = 1 - probability[:, kept] if kept < n else 1
        weight = drawn * probability[:, :kept].prod(1) * refused
        made = np.zeros((V ** kept, V))
        np.add.at(made, prefix[kept], weight[:, None] * residual[:, kept])
        made = made.ravel()
        for later in range(kept + 1, n + 1):
            made = (made[:, None] * p[later]).ravel()
        total += made
    expected = np.ones(1)
    for table in p:
        expected = (expected[:, None] * table).ravel()
    close(total, expected)


def test_nothing_in_acceptance_is_nan_at_the_edges():
    inf = np.inf
    same, one, other = np.log([0.3, 0.7, 1e-30]), [0, -inf, -inf], [-inf, 0, -inf]
    for logq, logp in itertools.product((same, one, other), repeat=2):
        for token in range(3):  # also tokens that a draft could not have drawn
            probability, residual = acceptance(jnp.full((1, 1), token), jnp.array([[logq]]),
                                               jnp.array([[logp, logp]]))
            assert 0 <= probability[0, 0] <= 1 and np.all(np.isfinite(residual))
            close(residual.sum(-1), 1)


def chi_square(counts, probability):
    expected = counts.sum() * np.asarray(probability, float)
    assert np.all(counts[expected == 0] == 0)
    return np.sum((counts - expected)[expected > 0] ** 2 / expected[expected > 0])


def test_accept_draws_what_acceptance_says():
    """40,000 rounds, V = 3, n = 2: 9 outcomes (3 tokens after 0, 1 or 2 kept); chi-square with 8
    degrees of freedom exceeds 26.1 once in 1,000; keeping 5% too often would give 50 or more."""
    rounds, draft = 40_000, np.array([[2, 0]])
    q = np.array([[[0.2, 0.2, 0.6], [0.5, 0.25, 0.25]]])
    p = np.array([[[0.3, 0.4, 0.3], [0.4, 0.1, 0.5], [0.1, 0.2, 0.7]]])
    given_ = draft, np.log(q), np.log(p)
    count, token = accept_jit(jax.random.split(jax.random.key(2), rounds), *(
        jnp.tile(a, (rounds,) + (1,) * (a.ndim - 1)) for a in given_))
    probability, residual = (np.asarray(a[0], float) for a in acceptance(*map(jnp.asarray, given_)))
    reach = np.cumprod([1, *probability])
    expected = (reach * (1 - np.append(probability, 0)))[:, None] * residual
    counts = np.bincount(3 * count + token, minlength=9)
    assert chi_square(counts, expected.ravel()) < 26.1


@pytest.mark.parametrize("a, n", [(0.8, 3), (0.5, 1), (0.3, 2)])
def test_rounds_make_the_mean_number_of_tokens_that_the_formula_says(a, n):
    """Where each proposal is accepted with probability a: (1 - a**(n+1)) / (1 - a)."""
    rounds = 20_000
    logp = jnp.log(jnp.array([a, 1 - a]))
    count, _ = accept_jit(jax.random.key(0), jnp.zeros((rounds, n), jnp.int32),
                          jnp.tile(jnp.array([0, -jnp.inf]), (rounds, n, 1)),
                          jnp.tile(logp, (rounds, n + 1, 1)))
    made = np.asarray(count) + 1
    assert abs(made.mean() - (1 - a ** (n + 1)) / (1 - a)) < 4 * made.std() / math.sqrt(rounds)


def draft_for(cfg, kind, n, text, lengths, slots, **how):
    """A draft and its state: n-grams, another model that has read the text, or the same one."""
    if kind == "ngram":
        return ngram_draft(cfg, n), None
    other = cfg if kind == "itself" else replace(CONFIGS[4], V=cfg.V)
    params = weights(other)
    _, cache = prefill_jit(params, init_cache(other, len(text), slots), text, lengths, cfg=other)
    return model_draft(params, other, n, **how), cache


@lru_cache(maxsize=None)
def draft_tree(cfg, kind, n):
    """One draft for all examples: a function compiled for another would be compiled again."""
    text = draw_tokens(cfg, 3, 6)
    return jax.tree.structure(draft_for(cfg, kind, n, text, np.full(3, 6), 8)[0])


@pytest.mark.parametrize("cfg, kind, n_draft", [
    (CONFIGS[0], "other", 3), (CONFIGS[0], "itself", 2), (CONFIGS[1], "ngram", 1),
    (CONFIGS[2], "other", 1)])
@settings(max_examples=4)
@given(st.integers(0, 99))
def test_greedy_speculation_is_greedy_decoding_for_any_draft(cfg, kind, n_draft, seed):
    params, slots, n, lengths = weights(cfg), 48, 9, np.array([2, 6, 4])
    text = np.zeros((3, slots), np.int32)
    text[:, :6] = draw_tokens(cfg, 3, 6, seed=seed)
    logits, cache = prefill_jit(params, init_cache(cfg, 3, slots), text[:, :6], lengths, cfg=cfg)
    plain, _, _ = generate_jit(params, cache, logits, jax.random.key(0), n=30, cfg=cfg)
    draft, state = draft_for(cfg, kind, n_draft, text[:, :6], lengths, slots)
    draft = jax.tree.unflatten(draft_tree(cfg, kind, n_draft), jax.tree.leaves(draft))
    cache, tokens = cache._replace(length=cache.length - 1), text
    for part in range(1, 3):  # it goes on where it stopped
        tokens, cache, state, counts = speculate_jit(
            params, cache, tokens, jax.random.key(1), n=n, cfg=cfg, draft=draft, state=state,
            end=cfg.V if kind == "itself" else None)  # one that never comes changes nothing
        made = np.asarray(cache.length) + 1 - lengths
        assert np.all(made >= part * n) and np.all(made <= part * (n + n_draft))
        if kind == "itself":  # accepts everything: no hole is left where all were kept
            assert np.all(counts[:, :-1] == 0)
    rounds = jnp.arange(n_draft + 1) + 1
    for b, T in enumerate(lengths):
        whole = text[b:b + 1].copy()
        whole[0, T:T + 30] = plain[b]
        known = min(made[b], *sure(params, cfg, whole, [T], 30))
        assert np.array_equal(tokens[b, T:T + known], plain[b, :known])
    assert np.all(counts @ rounds >= n)


@given(st.lists(st.integers(0, 2), min_size=4, max_size=4), st.integers(0, 3))
def test_nothing_follows_an_end_token(new, count):
    made = new[:count + 1]
    kept = infer.cut_at_end(np.array([new]), np.array([count]), 2)
    assert kept[0] == (made.index(2) if 2 in made else count)


def test_speculation_stops_at_the_end_token_and_fills_the_row_with_it():
    cfg, params, lengths, slots = grouped, weights(grouped), np.array([4, 6]), 32
    text = np.pad(draw_tokens(cfg, 2, 6), ((0, 0), (0, slots - 6)))
    logits, cache = prefill_jit(params, init_cache(cfg, 2, slots), text[:, :6], lengths, cfg=cfg)
    plain, _, _ = generate_jit(params, cache, logits, jax.random.key(0), n=12, cfg=cfg)
    end = int(plain[0, 4])
    first = list(np.asarray(plain[0])).index(end)
    draft, state = draft_for(cfg, "itself", 3, text[:, :6], lengths, slots)
    tokens, out, _, counts = speculate_jit(
        params, cache._replace(length=cache.length - 1), text, jax.random.key(0), n=12, cfg=cfg,
        draft=draft, state=state, end=end)
    assert np.array_equal(tokens[0, 4:4 + first], plain[0, :first])
    assert np.all(tokens[0, 4 + first:] == end)
    assert out.length[0] == 4 + first and counts[0] @ np.arange(1, 5) == first + 1


@pytest.mark.parametrize("kind", ["ngram", "other"])
def test_sampled_speculation_draws_what_the_target_would(kind):
    """4,000 equal rows, V = 11, so 11 * 11 pairs of next tokens: chi-square with 120 degrees of
    freedom exceeds 173 once in 1,000. Drawing from the draft instead would give thousands."""
    cfg, rows, how = CONFIGS[3], 4_000, dict(temperature=1.3)
    params, prompt = weights(cfg), draw_tokens(cfg, 1, 4)
    text = np.tile(np.pad(prompt, ((0, 0), (0, 8))), (rows, 1))
    lengths = np.full(rows, 4)
    _, cache = prefill_jit(params, init_cache(cfg, rows, 12), text[:, :4], lengths, cfg=cfg)
    draft, state = draft_for(cfg, kind, 2, text[:, :4], lengths, 12, **how)
    tokens, *_ = speculate_jit(params, cache._replace(length=lengths - 1), text, jax.random.key(4),
                               n=2, cfg=cfg, draft=draft, state=state, **how)
    both = np.concatenate([np.repeat(prompt, cfg.V, 0), np.arange(cfg.V)[:, None]], 1)
    p = np.exp(log_probs(forward_jit(params, both, cfg=cfg), **how))
    pairs = p[0, 3][:, None] * p[:, 4]
    # pairs that are expected less than 5 times are taken together
    counts = np.bincount(tokens[:, 4] * cfg.V + tokens[:, 5], minlength=cfg.V ** 2)
    rare = pairs.ravel() * rows < 5
    counts, pairs = (np.append(a[~rare], a[rare].sum()) for a in (counts, pairs.ravel()))
    assert chi_square(counts, pairs) < 173


def test_ngrams_propose_what_followed_the_longest_latest_repetition():
    def propose(text, n):
        tokens = np.pad(np.array([text]), ((0, 0), (0, 4)), constant_values=9)
        draft, logq, _ = infer.propose_by_ngram(None, jnp.asarray(tokens), jnp.array([len(text)]),
                                                None, replace(grouped, V=10), n)
        assert np.array_equal(np.exp(logq), np.eye(10)[draft])
        return draft[0].tolist()

    assert propose([1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert propose([1, 2, 3, 7, 2, 4, 1, 2], 2) == [3, 7]  # 1 2 is longer than the later 2
    assert propose([1, 2, 5, 1, 2, 6, 1, 2], 1) == [6]     # the latest of two
    assert propose([7, 7], 3) == [7, 7, 7]                 # goes round where the text ends


# --------------------------------------------------------------------- infer: many requests, mixed


@pytest.mark.parametrize("how, dtype", [(dict(temperature=1.1, top_k=12), "float32"),
                                        (dict(temperature=0.7, end=5), "int8")], ids=repr)
def test_each_request_is_told_what_it_would_be_told_alone(how, dtype):
    cfg, n, S, key = grouped, 7, 40, jax.random.key(3)
    params = weights(cfg)
    prompts = [draw_tokens(cfg, T, seed=T) for T in (3, 17, 1, 9, 16, 2, 5)]
    told = dict(serve(params, iter(prompts), 3, S, n, key, cfg, **how, stride=4,
                      cache_dtype=dtype))
    assert sorted(told) == list(range(len(prompts)))
    for i, prompt in enumerate(prompts):
        padded = np.pad(prompt, (0, 17 - len(prompt)))[None]
        logits, cache = prefill_jit(params, init_cache(cfg, 1, S, dtype), padded,
                                    np.array([len(prompt)]), cfg=cfg)
        alone, _, _ = generate_jit(params, cache, logits, jax.random.fold_in(key, i)[None], n=n,
                                   cfg=cfg, **how)
        alone = alone[0].tolist()
        if how.get("end") in alone:
            alone = alone[:alone.index(how["end"]) + 1]
        assert told[i].tolist() == alone


@pytest.mark.parametrize("row", [0, 2])
def test_in_bf16_a_request_is_told_the_same_in_any_of_as_many_rows_whatever_they_hold(row):
    """At another number of rows, products are summed in another order: then ties may fall either
    way. And it is told in slots that hold it and no more, however seldom the host looks."""
    cfg, n, S, key = replace(grouped, dtype="bfloat16"), 7, 16, jax.random.key(3)
    params, how = cast(weights(grouped), "bfloat16"), dict(temperature=1.1, top_k=12)
    prompts = [draw_tokens(cfg, T, seed=T) for T in (3, 9, 1, 9, 6)]
    told = dict(serve(params, prompts, 3, S, n, key, cfg, **how, stride=50))
    fill = jax.jit(infer.refill, static_argnames="cfg")
    for i, prompt in enumerate(prompts):
        logits, cache = jnp.zeros((3, cfg.V), jnp.float32), init_cache(cfg, 3, S)
        for at in range(3):
            text = prompt if at == row else draw_tokens(cfg, 5, seed=at)
            logits, cache = fill(params, cache, logits, at, np.pad(text, (0, 16 - text.size))[None],
                                 np.array([text.size], np.int32), cfg)
        keys = jnp.stack([jax.random.fold_in(key, i if at == row else 99) for at in range(3)])
        made, _, _ = generate_jit(params, cache, logits, keys, n=n, cfg=cfg, **how)
        assert np.array_equal(made[row], told[i])


def test_what_a_jitted_function_closes_over_is_checked_as_it_would_be_outside():
    cfg, params = grouped, weights(grouped)
    text, lengths = jnp.asarray(draw_tokens(cfg, 2, 7)), jnp.array([3, 6])
    _, cache = prefill_jit(params, init_cache(cfg, 2, SLOTS), text, lengths, cfg=cfg)
    draft, known = ngram_draft(cfg, 2), jnp.zeros((2, SLOTS), jnp.int32).at[:, :7].set(text)
    adam, logits, key = adam_init(params), jnp.zeros((2, cfg.V)), jax.random.key(0)

    def steps(params, text):
        return jax.lax.scan(lambda state, _: (train_step(*state, text, cfg, 1e-2)[:2], None),
                            (params, adam), length=2)[0]

    for call, wrong in (
            (lambda p, t=text: forward(p, t, cfg), text.at[1, 2].set(cfg.V)),
            (lambda p, t=text: jax.grad(loss)(p, t, cfg), text.at[0, 0].set(-1)),
            (lambda p, t=text: steps(p, t), text.at[0, 0].set(-1)),
            (lambda p, t=lengths: prefill(p, cache, text, t, cfg), lengths.at[0].set(8)),
            (lambda p, t=cache: extend(p, t, text, cfg), cache._replace(length=lengths + 15)),
            (lambda p, t=cache: generate(p, t, logits, key, 3, cfg),
             cache._replace(length=lengths + 16)),
            (lambda p, t=cache: resize(t, 7), cache._replace(length=lengths + 2)),
            (lambda p, t=cache: speculate(p, t, known, key, 3, cfg, draft, None),
             cache._replace(length=lengths + 15))):
        jax.eval_shape(call, params)
        with pytest.raises(ValueError) as outside:
            call(params, wrong)
        check(lambda: jax.eval_shape(lambda p: call(p, wrong), params), str(outside.value))


def rounding(cfg, dtype):
    """block -> block: keys and values as a cache of `dtype` would give them back."""
    def rounded(x, w, table, cfg, attend):
        def look(q, k, v):
            held = (infer.as_held(a, infer.init_cache(cfg, 1, 1, dtype).k[0]) for a in (k, v))
            return attend(q, *(dequantize(a) if isinstance(a, Q8) else a for a in held))
        return block(x, w, table, cfg, look)
    return rounded


class Mixture:
    """Rows that are prefilled, told things, generate, speculate, are rolled back and refilled, and
    what recomputation says: `logits` must be those after each row's whole text."""
    slots, rows = 40, 3

    def __init__(self, kind, dtype, seed):
        self.cfg, self.dtype, self.draw = grouped, dtype, np.random.default_rng(seed)
        self.params = weights(grouped) if kind is None else \
            quantize_params(weights(grouped), grouped, kind)
        # an int8 at the edge of rounding may fall either way: a 127th of one key or value
        self.tolerance = TOLERANCE if dtype == "float32" else 0.05
        self.cache = init_cache(self.cfg, self.rows, self.slots, dtype)
        lengths = self.draw.integers(1, 7, self.rows)
        text = self.tokens(self.rows, 6)
        self.text = [list(row[:T]) for row, T in zip(text, lengths)]
        self.logits, self.cache = prefill_jit(self.params, self.cache, text, lengths, cfg=self.cfg)

    def tokens(self, *shape):
        return self.draw.integers(0, self.cfg.V, shape).astype(np.int32)

    def tell(self, new):
        x, self.cache = extend_jit(self.params, self.cache, new, cfg=self.cfg)
        self.logits = unembed_jit(self.params, x, cfg=self.cfg)[:, -1]
        self.text = [text + list(row) for text, row in zip(self.text, new)]

    def extend(self):
        self.tell(self.tokens(self.rows, self.draw.choice([1, 3])))

    def generate(self):
        new, self.logits, self.cache = generate_jit(self.params, self.cache, self.logits,
                                                    jax.random.key(0), n=3, cfg=self.cfg)
        self.greedy([list(row) for row in np.asarray(new)])

    def speculate(self):
        text = np.zeros((self.rows, self.slots), np.int32)
        for b, row in enumerate(self.text):
            text[b, :len(row) + 1] = row + [int(jnp.argmax(self.logits[b]))]
        text, cache, _, _ = speculate_jit(self.params, self.cache, text, jax.random.key(0), n=3,
                                          cfg=self.cfg, draft=ngram_draft_2, state=None)
        before = [len(row) for row in self.text]
        self.cache = cache._replace(length=cache.length)
        self.greedy([list(np.asarray(text)[b, T:int(cache.length[b])])
                     for b, T in enumerate(before)])
        self.tell(np.asarray(text)[np.arange(self.rows), np.asarray(cache.length)][:, None])

    def rollback(self):
        keep = [self.draw.integers(1, len(row) + 1) for row in self.text]
        self.text = [row[:T] for row, T in zip(self.text, keep)]
        self.cache = self.cache._replace(length=jnp.asarray(keep))
        self.tell(self.tokens(self.rows, 1))

    def refill(self):
        row, T = self.draw.integers(self.rows), self.draw.integers(1, 7)
        prompt = self.tokens(1, 6)
        self.logits, self.cache = refill_jit(self.params, self.cache, self.logits, row, prompt,
                                             np.array([T]), cfg=self.cfg)
        self.text[row] = list(prompt[0, :T])

    def recompute(self):
        whole = np.zeros((self.rows, self.slots), np.int32)
        for b, row in enumerate(self.text):
            whole[b, :len(row)] = row
        return rounded_forward_jit(self.params, whole, cfg=self.cfg, dtype=self.dtype)

    def greedy(self, new):
        """The tokens that were made were best, up to what rounding decides."""
        before = [len(row) for row in self.text]
        self.text = [text + row for text, row in zip(self.text, new)]
        whole = np.asarray(self.recompute())
        for b, (start, made) in enumerate(zip(before, new)):
            for i, token in enumerate(made):
                logits = whole[b, start + i - 1]
                assert logits[token] >= logits.max() - 2 * self.tolerance * (1 + abs(logits.max()))

    def check(self):
        assert np.array_equal(self.cache.length, [len(row) for row in self.text])
        whole = self.recompute()
        for b, row in enumerate(self.text):
            close(self.logits[b], whole[b, len(row) - 1], self.tolerance)


ngram_draft_2 = ngram_draft(grouped, 2)
refill_jit = jax.jit(infer.refill, static_argnames="cfg")
rounded_forward_jit = jax.jit(lambda params, tokens, cfg, dtype: forward(
    params, tokens, cfg, rounding(cfg, dtype)), static_argnames=("cfg", "dtype"))


@settings(max_examples=4)
@given(st.sampled_from([(None, "float32"), (None, "int8"), (Q8, "float32"), (Q8, "int8")]),
       st.lists(st.sampled_from(["extend", "generate", "speculate", "rollback", "refill"]),
                min_size=4, max_size=9), st.integers(0, 999))
def test_any_mixture_of_everything_is_recomputation(how, moves, seed):
    state = Mixture(*how, seed)
    state.check()
    for move in moves:
        if max(map(len, state.text)) > state.slots - 8:
            break
        getattr(state, move)()
        state.check()


# ----------------------------------------------------------------------------- infer: real weights


def in_file(folder, tensors=None):
    """The tensors of a folder's one file; or replaces them, as another program would."""
    from safetensors.numpy import load_file, save_file
    if tensors is None:
        return load_file(folder / "model.safetensors")
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()},
              folder / "model.safetensors")


def edit(folder, **more):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


def same(a, b):
    return all(x.dtype == y.dtype and np.array_equal(x, y)
               for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@files
@pytest.mark.parametrize("cfg, dtype, shard_bytes", [
    (CONFIGS[0], "float32", 5e9), (CONFIGS[1], "bfloat16", 700), (CONFIGS[2], "float16", 5e9),
    (replace(CONFIGS[4], rope_scaling=(8, 1, 4, 64)), "float32", 1)], ids=repr)
def test_what_is_saved_is_loaded_bit_for_bit(cfg, dtype, shard_bytes, tmp_path):
    cfg, params = replace(cfg, dtype=dtype), cast(weights(cfg), dtype)
    if cfg.embed_scale:  # stored less one: what has been 1 + w in f32 comes back whole
        params = jax.tree.map(lambda w: 1 + (w - 1) if w.ndim == 1 else w, params)
    save(tmp_path, cfg, weights(cfg))  # an earlier one, in one file
    save(tmp_path, cfg, params, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes < 5e9)
    found, ours = load(tmp_path)
    assert found == cfg and same(ours, params)
    _, wide = load(tmp_path, "float32")
    assert all(np.array_equal(a, b.astype("float32")) and a.dtype == jnp.float32
               for a, b in zip(*map(jax.tree.leaves, (wide, params))))


def small_file(tmp_path):
    """A safetensors file written by hand: a length, a header and raw arrays, in order."""
    a, b = np.arange(6, dtype="<f4").reshape(2, 3), np.array([1.5, -2], "<f2")
    header = {"b": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
              "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]}}
    return tmp_path / "x.safetensors", header, b.tobytes() + a.tobytes(), {"a": a, "b": b}


def write_file(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


@files
@given(st.data())
def test_a_damaged_file_is_refused_by_its_name_or_holds_what_it_says(tmp_path_factory, data):
    path, header, raw, arrays = small_file(tmp_path_factory.mktemp("files"))
    write_file(path, header, raw)
    whole, found = path.read_bytes(), infer.open_tensors(path)
    assert {*found.keys()} == {*arrays} and all(
        np.array_equal(found.get_slice(name)[:], a) for name, a in arrays.items())
    start = data.draw(st.integers(0, len(whole) - 29))
    stop = data.draw(st.integers(start + 1, len(whole) - 28))
    size = stop - start
    path.write_bytes(whole[:start] + data.draw(st.binary(min_size=size, max_size=size))
                     + whole[stop:])
    try:
        found = infer.open_tensors(path)
        for name in found.keys():
            found.get_slice(name)[:]
    except ValueError as error:
        assert str(path) in str(error)


@files
def test_what_does_not_fit_in_a_file_is_refused_by_the_files_name(tmp_path):
    path, header, raw, _ = small_file(tmp_path)

    def with_a(**more):
        return {**header, "a": {**header["a"], **more}}

    for text, data, *length in (
            (with_a(data_offsets=[0, 24]), raw[:24]), (with_a(data_offsets=[8, 32]), raw + b"1234"),
            (header, raw + b"more"), (header, raw[:-1]), (with_a(shape=[-2, -3]), raw),
            (with_a(shape=[2 ** 62, 6]), raw), (with_a(dtype="I64", shape=[3]), raw),
            (json.dumps(header).encode("utf-16"), raw), (b"[" * 10 ** 5, b""),
            (b'{"a":' * 10 ** 5, b""), (header, raw, 2 ** 60), (header, raw, 9), (b"", b"")):
        write_file(path, text, data, *length)
        check(lambda: infer.open_tensors(path), path)
    path.write_bytes(b"")
    check(lambda: infer.open_tensors(path), path)


PUBLISHED_JSON = {  # as each model's own config.json spells it, without what changes nothing
    "llama-3.2-1b": dict(
        model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256,
        hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
        max_position_embeddings=131072, attention_bias=False, mlp_bias=False, pretraining_tp=1,
        rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                          original_max_position_embeddings=8192, rope_type="llama3"),
        torch_dtype="bfloat16"),
    "llama-2-7b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, vocab_size=32000, hidden_act="silu", rms_norm_eps=1e-5,
        rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16"),
    "smollm2-135m": dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, hidden_act="silu",
        rms_norm_eps=1e-5, rope_theta=100000, tie_word_embeddings=True, is_llama_config=True,
        rope_interleaved=False, rope_scaling=None, head_dim=None, dtype="bfloat16"),
    "mistral-7b": dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32768, hidden_act="silu",
        rms_norm_eps=1e-5, rope_parameters=dict(rope_theta=1e6, rope_type="default"),
        sliding_window=None, max_position_embeddings=32768),
    "qwen3-0.6b": dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None,
        attention_bias=False, sliding_window=4096, use_sliding_window=False, max_window_layers=28,
        max_position_embeddings=40960, tie_word_embeddings=True, torch_dtype="bfloat16"),
    "gemma-2b": dict(
        model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
        num_attention_heads=8, num_key_value_heads=1, head_dim=256, vocab_size=256000,
        hidden_act="gelu", hidden_activation=None, rms_norm_eps=1e-6, rope_theta=10000.0)}


@pytest.mark.parametrize("name", PUBLISHED_JSON)
def test_published_configurations_are_understood_however_they_spell_it(name):
    assert infer.parse_config(PUBLISHED_JSON[name]) == bench.MODELS[name]


@pytest.mark.parametrize("asked", [
    dict(model_type="gemma2"), dict(model_type=None), dict(attention_bias=True),
    dict(mlp_bias=True),
    dict(rope_scaling=dict(type="linear", factor=2.0)), dict(hidden_act="relu"),
    dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), dict(partial_rotary_factor=0.5),
    dict(rope_parameters=dict(rope_type="yarn", factor=4.0), rope_scaling=None),
    dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), dict(use_qk_norm=True),
    dict(attn_logit_softcapping=50.0), dict(final_logit_softcapping=30.0),
    dict(quantization_config=dict(bits=4)),
    dict(sliding_window=64, use_sliding_window=True, model_type="qwen3"),
    dict(sliding_window=64, max_position_embeddings=128),
    dict(layer_types=["sliding_attention"]), dict(rope_scaling=dict(rope_type="llama3", factor=8)),
    dict(hidden_size=None), dict(num_key_value_heads=9), dict(rope_scaling="wrong kind"),
    dict(head_dim=2 ** 70), dict(rms_norm_eps=10 ** 400), dict(max_position_embeddings=0),
    dict(layer_types=[{}]), dict(hidden_size=-64),
    dict(tie_word_embeddings="false"), dict(rms_norm_eps="1e-6"), dict(rms_norm_eps=-1),
    dict(rope_theta=math.nan), dict(hidden_size="32"), dict(hidden_size=32.0),
    dict(hidden_size=True), dict(hidden_act=None, hidden_activation=["silu"]),
    dict(hidden_activation="gelu_pytorch_tanh"), dict(layer_types="full_attention"),
    dict(rope_parameters=dict(rope_theta=1e4, rope_type="default"))], ids=repr)
def test_what_config_json_asks_for_and_is_not_implemented_is_refused_by_name(asked):
    name = next(iter(asked))
    if name == "rope_scaling" and "factor': 8" in str(asked):
        name = "low_freq_factor"
    elif "wrong" in str(asked):
        name = "wrong kind"
    name = {"rope_scaling": "rope_type", "num_key_value_heads": "K=9"}.get(name, name)
    name = "yarn" if "yarn" in str(asked) else name
    check(lambda: infer.parse_config({**PUBLISHED_JSON["llama-3.2-1b"], **asked}), name)
    assert infer.parse_config({**PUBLISHED_JSON["mistral-7b"], "sliding_window": 32768})
    without = {**PUBLISHED_JSON["mistral-7b"]}
    del without["sliding_window"]  # Mistral's default is 4,096
    check(lambda: infer.parse_config(without), "sliding_window=4096", 32768)


@files
def test_a_folder_that_does_not_hold_the_model_is_refused_by_name(tmp_path, monkeypatch):
    cfg, params = CONFIGS[1], weights(CONFIGS[1])
    check(lambda: load(tmp_path / "none"), "none", "No such file")
    check(lambda: save(tmp_path, cfg, quantize_params(params, cfg)), "int8")
    check(lambda: save(tmp_path, replace(cfg, qk_norm=False), params), "qk_norm")
    check(lambda: forward(params, draw_tokens(cfg, 1, 3), replace(cfg, qk_norm=False)), "qk_norm")
    check(lambda: save(tmp_path, replace(cfg, F=21), params), "gate_proj", "(20, 16)", "(21, 16)")
    check(lambda: save(tmp_path, replace(cfg, rope_base=math.nan), params), "rope_theta=nan")
    assert not list(tmp_path.iterdir())
    save(tmp_path, cfg, params)
    found = in_file(tmp_path)
    lost = {name: a for name, a in found.items() if "layers.1.mlp.up" not in name}
    norm = found["model.norm.weight"]
    for tensors, words in (
            (lost, ["model.layers.1.mlp.up_proj.weight", "missing"]),
            ({**found, "model.layers.0.self_attn.sinks": norm}, ["sinks", "not part"]),
            ({**found, "x.rotary_emb.inv_freq": norm}, ["inv_freq", "frequencies"]),
            ({**found, "model.layers.2.input_layernorm.weight": norm}, ["3 layers", "=2"]),
            ({**found, "model.norm.weight": np.ones(9, np.float32)}, ["model.norm", "[9]", "16"])):
        in_file(tmp_path, tensors)
        check(lambda: load(tmp_path), *words)
    in_file(tmp_path, {**found, "x.rotary_emb.inv_freq": np.float16(minillm.frequencies(cfg))})
    assert load(tmp_path)[0] == cfg
    edit(tmp_path, num_hidden_layers=10 ** 9)
    check(lambda: load(tmp_path), "num_hidden_layers=1000000000", "2 layers")
    (tmp_path / "model.safetensors").unlink()
    check(lambda: load(tmp_path), "model.safetensors", "No such file")
    for text in (b"{", b"[" * 10 ** 5, b"[]", b"\xff"):
        (tmp_path / "config.json").write_bytes(text)
        check(lambda: load(tmp_path), "config.json", "JSON")
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    check(lambda: save(tmp_path / "new", cfg, params), 'pip install ".[hf]"')


@files
def test_a_head_of_its_own_counts_and_tied_tables_stand_under_either_name(tmp_path):
    """As transformers 5.24 reads them: where config.json says tied, the file has the last word."""
    cfg, params = CONFIGS[0], weights(CONFIGS[0])
    save(tmp_path, cfg, params)
    found = in_file(tmp_path)
    table = found["model.embed_tokens.weight"]
    both, own = {**found, "lm_head.weight": table}, {**found, "lm_head.weight": table[::-1]}
    alone = {name: a for name, a in both.items() if "embed_tokens" not in name}
    for tensors, head in ((both, None), (alone, None), (own, table[::-1])):
        in_file(tmp_path, tensors)
        other, theirs = load(tmp_path)
        assert other == replace(cfg, tied=head is None)
        assert same(theirs, params._replace(unembed=head))
    edit(tmp_path, tie_word_embeddings=False)
    in_file(tmp_path, found)
    check(lambda: load(tmp_path), "lm_head.weight", "missing")


@files
@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "", "..", "x.bin", 3, None,
                                  ["model.safetensors"], {}, "no\0where.safetensors"], ids=repr)
def test_an_index_names_files_of_its_own_folder_and_each_holds_what_it_says(file, tmp_path):
    cfg, params = CONFIGS[0], weights(CONFIGS[0])
    save(tmp_path, cfg, params, shard_bytes=700)
    index = tmp_path / infer.INDEX
    whole = json.loads(index.read_text())
    name, *_, other = whole["weight_map"]
    for said, words in (
            ({**whole["weight_map"], name: file}, [name, repr(file)]),
            ({**whole["weight_map"], name: whole["weight_map"][other]}, [name]),
            ({**whole["weight_map"], "more": whole["weight_map"][other]}, ["more"])):
        index.write_text(json.dumps({**whole, "weight_map": said}))
        check(lambda: load(tmp_path), index, *words)
    for said in (None, [], {"weight_map": "all"}):
        index.write_text(json.dumps(said))
        check(lambda: load(tmp_path), index)
    save(tmp_path, cfg, params)  # one file counts before an index, as in transformers
    index.write_text(json.dumps(whole))
    assert same(load(tmp_path)[1], params)


@files
@pytest.mark.parametrize("axes, rules", [
    (dict(tensor=4), shard.TENSOR), (dict(data=8, tensor=1), {"matrix": "data"}),
    (dict(data=2, tensor=2), {**shard.TENSOR, "matrix": "data"}),
    (dict(tensor=2), dict(D="tensor"))])
@pytest.mark.parametrize("cfg", [
    Config(L=2, E=16, H=8, K=4, D=4, F=24, V=32, tied=False, qk_norm=True),
    Config(L=1, E=8, H=4, K=4, D=2, F=16, V=16, act="gelu", embed_scale=True)])
def test_each_device_is_given_its_part_of_each_tensor_and_no_more_is_read(
        cfg, axes, rules, tmp_path, monkeypatch):
    class Counted(NamedTuple):
        tensor: object
        get_shape = property(lambda self: self.tensor.get_shape)

        def __getitem__(self, index):
            read.append(self.tensor[index].nbytes)
            return self.tensor[index]

    save(tmp_path, cfg, weights(cfg))
    _, whole = load(tmp_path)
    found, mark = infer.find_tensors(tmp_path)
    counted, read = {name: Counted(tensor) for name, tensor in found.items()}, []
    monkeypatch.setattr(infer, "find_tensors", lambda path: (counted, mark))
    mesh = shard.make_mesh(**axes)
    _, split = load(tmp_path, shardings=partial(shard.shardings, mesh=mesh, rules=rules))
    assert same(whole, split)
    assert all(a.sharding == b for a, b in zip(*map(jax.tree.leaves, (
        split, shard.shardings(cfg, mesh, rules)))))
    inner = rules == dict(D="tensor")  # rows of a head are read together, and cut
    assert sum(read) == 4 * param_count(cfg) or inner and sum(read) <= 8 * param_count(cfg)


@files
@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_model_saved_from_four_devices_is_loaded_on_any_number(n, tmp_path):
    cfg = Config(L=1, E=24, H=24, K=24, D=2, F=24, V=24, tied=False)
    params = weights(cfg)
    save(tmp_path, cfg, shard.place(params, cfg, shard.make_mesh(tensor=4), shard.TENSOR),
         adam=adam_init(params))
    held = shard.shardings(cfg, shard.make_mesh(tensor=n), shard.TENSOR)
    found, split = load(tmp_path, shardings=held)
    split, adam = infer.load_adam(tmp_path, found, split)
    assert same(split, params) and same(adam, adam_init(params)) and all(
        a.sharding == b for tree in (split, adam.m, adam.v)
        for a, b in zip(*map(jax.tree.leaves, (tree, held))))
    check(lambda: load(tmp_path, shardings=lambda cfg: shard.shardings(
        cfg, shard.make_mesh(tensor=7), shard.TENSOR)), "=24", "7 devices")


@files
def test_two_processes_save_what_they_hold_together_and_each_loads_its_part(beside):
    beside["saves"]()
    found, params = load(beside["folder"] / "saved")
    jax.tree.map(close, params, init(jax.random.key(0), found))
    assert np.all(infer.load_adam(beside["folder"] / "saved", found, params)[1].m.embed == 0)


@files
@pytest.mark.parametrize("before", [5e9, 700])
@pytest.mark.parametrize("after", [5e9, 700])
def test_a_save_cut_short_anywhere_leaves_a_whole_model(before, after, tmp_path, monkeypatch):
    """With its optimizer's state, at every call that touches the disk; and what others put there
    stays."""
    old, new = (CONFIGS[1], weights(CONFIGS[1])), (CONFIGS[0], weights(CONFIGS[0]))
    third, calls = (replace(CONFIGS[1], rope_base=5e5), weights(CONFIGS[1], seed=1)), 0
    others = "model_ema.safetensors", "model.lora.safetensors", "tokenizer.json"

    def state(params):
        return minillm.Adam(jnp.int32(7), params, jax.tree.map(jnp.square, params))

    def cut(call):
        def instead(*args, **more):
            nonlocal calls
            calls -= 1
            if calls == 0:
                raise KeyboardInterrupt
            return call(*args, **more)
        return instead

    def run(most):
        nonlocal calls
        folder = tmp_path / str(most)
        save(folder, *old, before, adam=state(old[1]))
        for other in others:
            (folder / other).write_text(other)
        for cfg, params in (third, new):  # twice
            calls = most
            with contextlib.suppress(KeyboardInterrupt):
                save(folder, cfg, params, after, adam=state(params))
        done, calls, found = calls > 0, 0, load(folder)
        assert any(found[0] == cfg and same(found[1], params) for cfg, params in (old, third, new))
        assert same(infer.load_adam(folder, *found), (found[1], state(found[1])))
        save(folder, *new)  # and the next one clears up
        assert same(load(folder)[1], new[1]) and {path.name for path in folder.iterdir()} == {
            "config.json", "model.safetensors", *others}
        assert all((folder / other).read_text() == other for other in others)
        return done

    for name in ("replace", "unlink", "write_text", "write_bytes", "mkdir"):
        monkeypatch.setattr(pathlib.Path, name, cut(getattr(pathlib.Path, name)))
    monkeypatch.setattr(infer, "write_tensors", cut(infer.write_tensors))
    assert next(most for most in itertools.count(1) if run(most)) > 5


@files
def test_a_file_of_others_that_would_be_read_instead_is_not_replaced(tmp_path):
    cfg, params = CONFIGS[0], weights(CONFIGS[0])
    save(tmp_path, cfg, params)
    in_file(tmp_path, in_file(tmp_path))  # as another program writes it
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    check(lambda: save(tmp_path, cfg, params, shard_bytes=700), "model.safetensors", "elsewhere")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_llama_3_scaling_slows_slow_pairs_and_leaves_fast_ones():
    """Llama 3.2 1B: of 32 pairs, those that turn more than 4 times in 8,192 tokens are as before,
    those of less than once turn 32 times slower, and speeds stay in order."""
    cfg = bench.MODELS["llama-3.2-1b"]
    before, after = (np.arctan2(np.asarray(sin), np.asarray(cos))[0, 0].astype(float)
                     for cos, sin in (rotary(jnp.array([[1]]), c)
                                      for c in (replace(cfg, rope_scaling=None), cfg)))
    turns = 8192 * before / (2 * np.pi)
    close(after[turns > 4], before[turns > 4])
    np.testing.assert_allclose(after[turns < 1], before[turns < 1] / 32, rtol=1e-4)
    between = (turns >= 1) & (turns <= 4)
    mixed = before * ((turns - 1) / 3 + (1 - (turns - 1) / 3) / 32)
    assert between.sum() == 3 and np.all(np.diff(after) < 0)
    np.testing.assert_allclose(after[between], mixed[between], rtol=1e-4)


# --------------------------------------------------------------------------------- infer: its costs


def narrowed(cfg, dtype):
    """cfg and abstract parameters, int8 ones too, whose activations are bf16."""
    cfg = replace(cfg, dtype="bfloat16" if dtype == "int8" else dtype)
    params = abstract(cfg)
    return cfg, jax.eval_shape(lambda p: quantize_params(p, cfg), params) if dtype == "int8" \
        else params


@given(configs, st.integers(1, 3), st.sampled_from([1, 3, 70]), st.integers(1, 5),
       st.sampled_from(["float32", "bfloat16", "int8"]))
def test_prefill_extend_and_generate_multiply_what_the_formulas_say(cfg, B, T, n, dtype):
    cfg, params, S = *narrowed(cfg, dtype), T + n
    cache = jax.eval_shape(lambda: init_cache(cfg, B, S, "int8" if B == 2 else "float32"))
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


@settings(max_examples=20)
@given(configs, st.integers(1, 3), st.integers(1, 9), st.sampled_from(bench.DTYPES),
       st.sampled_from(bench.DTYPES))
def test_decode_bytes_are_those_of_the_trees_that_are_read(cfg, B, S, dtype, cache_dtype):
    cfg, params = narrowed(cfg, dtype)
    cache = jax.eval_shape(lambda: init_cache(cfg, B, S, cache_dtype))

    def held(tree):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))

    moved = decode_bytes(cfg, B, S, cache_dtype=cache_dtype, dtype=dtype)
    assert moved["weights"] == held(params if cfg.tied else params._replace(embed=None))
    assert moved["cache_read"] == held(cache[:2]) == kv_bytes(cfg, B, S, cache_dtype)
    assert moved["cache_write"] * S == moved["cache_read"]
    rows = params.embed if hasattr(params.embed, "q") else [params.embed]
    assert moved["embed"] == B * held([jax.eval_shape(lambda a: a[0], a) for a in rows])
    assert moved["logits"] == held(jax.eval_shape(
        lambda p: unembed(p, jnp.zeros((B, 1, cfg.E), cfg.dtype), cfg), params))


def test_the_lectures_cache_is_939_MB_a_sequence():
    assert kv_bytes(bench.MODELS["gemma-7b"], 1, 2048, "bfloat16") == 939_524_096


# -------------------------------------------------------------------------------------------- shard


WIDE = Config(L=2, E=16, H=8, K=4, D=4, F=24, V=32)  # everything divides by 4, and H, E, F, V by 8
RINGS = bench.RINGS


def abstract_mesh(**axes):
    axes = shard.mesh_axes(**axes)
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(
        jax.sharding.AxisType.Auto,) * len(axes))


@pytest.mark.parametrize("n", [1, 2, 3, 8, (2, 2)])
def test_a_ring_is_its_reference_is_the_product_and_so_are_its_gradients(n):
    E, F, rules = 48, 24, jax.P
    x, y, a, b, c = normals((2, 3, E), (2, 3, F), (F, E), (F, 2, E), (E, F))
    mesh = shard.make_mesh(tensor=n)
    axes = shard.axes_of(mesh, "tensor")

    def whole(x, y, a, b, c):
        one, two = dot(x, a), dot(x, b.reshape(-1, E)).reshape(2, 3, F, 2)
        return one, two, dot(y, c)

    def split(ring):
        enter, leave = RINGS[ring]

        def both(x, y, a, b, c):
            return *enter(x, (a, b), axes), leave(y, c, axes)

        over, last, second = rules(axes), rules(None, None, axes), rules(None, axes)
        return jax.shard_map(both, mesh=mesh, in_specs=(last, last, over, over, second),
                             out_specs=(last, last, last))

    def values_and_gradients(*args):
        out = []
        for fn in (whole, *(split(ring) for ring in RINGS)):
            value, back = jax.vjp(fn, *args)
            out.append((value, back(jax.tree.map(jnp.sin, value))))
        return out

    expected, *ours = jax.jit(values_and_gradients)(x, y, a, b, c)
    assert len(ours) == len(RINGS) == 3
    for got in ours:
        jax.tree.map(close, got, expected)


@pytest.mark.parametrize("axes, ring, blocks, keep, cfg", [
    (dict(data=(2, 2), context=2, tensor=1), 0, 2, minillm.KEEPABLE, replace(WIDE, L=1)),
    (dict(data=1, context=3, tensor=1), 0, 1, (), replace(WIDE, L=1, E=24, tied=False)),
    (dict(data=1, tensor=8), 0, 3, (), replace(WIDE, L=1, K=8, tied=False, qk_norm=True)),
    (dict(data=1, context=2, tensor=(2, 2)), 0, 1, shard.KEPT, replace(WIDE, L=1, qk_norm=True)),
    (dict(data=4, tensor=2), 2, 2, minillm.KEEPABLE,
     replace(WIDE, act="gelu", embed_scale=True, qk_norm=True))])
def test_a_sharded_loss_its_gradients_and_training_are_one_devices(
        axes, ring, blocks, keep, cfg, monkeypatch):
    mesh, params, tokens = shard.make_mesh(**axes), weights(cfg), draw_tokens(cfg, 8, 7)
    monkeypatch.setattr(shard, "token_blocks", lambda N, V: blocks)
    split = partial(shard.sharded_loss, mesh=mesh, enter=RINGS[ring][0], leave=RINGS[ring][1],
                    keep=keep)
    alone, grads = jax.jit(jax.value_and_grad(loss), static_argnums=2)(params, tokens, cfg)
    ours, split_grads = jax.jit(jax.value_and_grad(split), static_argnums=2)(
        shard.stack(params), tokens, cfg)
    close(ours, alone)
    jax.tree.map(close, split_grads, shard.stack(grads))
    if axes["data"] == 1 and axes["tensor"] == 1:
        step = jax.jit(train_step, static_argnames=("cfg", "loss"))
        one, many = (params, adam_init(params)), (shard.stack(params),
                                                  adam_init(shard.stack(params)))
        for _ in range(3):
            *one, before = step(*one, tokens, cfg=cfg, lr=1e-2)
            *many, split_before = step(*many, tokens, cfg=cfg, lr=1e-2, loss=split)
            close(split_before, before, 1e-4)  # Adam divides small gradients by their own size


def test_gathered_weights_keep_their_dtype_and_scales_become_f32():
    """Matrices too that no device splits: wk and wv where slots are."""
    mesh = shard.make_mesh(tensor=4)
    layer, split = (tree.layers[0] for tree in (abstract(replace(WIDE, dtype="bfloat16")),
                    shard.specs(WIDE, mesh, shard.layout_rules(mesh, "context"))))
    run = jax.shard_map(partial(shard.gather_weights, split=split, over=("tensor",)), mesh=mesh,
                        in_specs=(split,), out_specs=jax.P(), check_vma=False)
    for before, after in zip(*map(jax.tree.leaves, (layer, jax.eval_shape(run, layer))),
                             strict=True):
        assert after.shape == before.shape
        assert after.dtype == ("float32" if before.ndim == 1 else "bfloat16")


def test_the_compilers_fsdp_is_the_loss_of_one_device():
    mesh, params, tokens = shard.make_mesh(data=8), weights(WIDE), draw_tokens(WIDE, 8, 7)
    alone = jax.jit(jax.value_and_grad(loss), static_argnums=2)(params, tokens, WIDE)
    placed = shard.place(params, WIDE, mesh, shard.FSDP)
    assert placed.layers[0].wq.addressable_shards[3].data.shape == (1, 4, 16)
    born = jax.jit(init, static_argnums=1, out_shardings=shard.shardings(WIDE, mesh, shard.FSDP))
    made = born(jax.random.key(0), WIDE)
    assert made.embed.sharding == placed.embed.sharding
    run = jax.jit(jax.value_and_grad(partial(shard.fsdp_loss, cfg=WIDE, mesh=mesh)))
    ours = run(placed, tokens)
    jax.tree.map(close, ours, alone)


def split_causally(run, mesh, T, *args):
    """`run` of arrays whose T tokens, in BTHD or BKTD, are split as ring attention wants them; and
    the way back."""
    n = mesh.shape["context"]
    token = np.concatenate([np.arange(T)[i::n] for i in range(n)])
    by = [jax.P(*(["context" if size == T else None for size in a.shape])) for a in args]
    places = [spec.index("context") for spec in by]
    given = [jnp.take(a, token, place) for a, place in zip(args, places)]
    out = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=tuple(by), out_specs=(
        by[0], *by[:3])))(*given)
    return [jnp.take(a, np.argsort(token), place) for a, place in zip(
        out, (places[0], *places[:3]))]


@pytest.mark.parametrize("n, H, K, dtype", [(2, 4, 2, "float32"), (3, 3, 1, "float32"),
                                            (4, 2, 2, "bfloat16"), (8, 4, 1, "float32")])
def test_ring_attention_and_its_gradient_are_causal_attentions(n, H, K, dtype):
    T, mesh = n * (131 if n == 2 else 5), shard.make_mesh(context=n)  # two blocks a device, or one
    q, k, v, dy = (jnp.asarray(a, dtype) for a in normals(
        (2, T, H, 4), (2, K, T, 4), (2, K, T, 4), (2, T, H, 4)))

    def both(attention, q, k, v, dy):
        out, back = jax.vjp(attention, q, k, v)
        return out, *back(dy)

    ours = split_causally(partial(both, lambda *qkv: shard.ring_attention(*qkv, "context")), mesh,
                          T, q, k, v, dy)
    alone = jax.jit(partial(both, causal_attention))(q, k, v, dy)
    tolerance = TOLERANCE if dtype == "float32" else 2 ** -6  # parts are rounded, then their sum
    for a, b in zip(ours, alone):
        close(np.asarray(a, np.float32), np.asarray(b, np.float32), tolerance)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_ring_attention_gives_all_devices_the_same_work(n):
    """Pairs of query and key that a device's tokens see; and each runs the same program, whose
    products are those of n causal passes over T/n tokens."""
    T, mesh, last = 768, shard.make_mesh(context=n), jax.P(None, "context")
    pairs = jax.jit(jax.shard_map(lambda: jnp.sum(shard.own_places(T, "context") + 1)[None],
                                  mesh=mesh, in_specs=(), out_specs=jax.P("context")))()
    assert sum(pairs) == T * (T + 1) // 2 and max(pairs) <= 1.05 * min(pairs)
    q, kv = shaped(1, T, 4, 2, dtype="float32"), shaped(1, 2, T, 2, dtype="float32")
    flops = traced_flops(jax.shard_map(
        lambda q, k, v: shard.ring_attention(q, k, v, "context"), mesh=mesh, in_specs=(
            last, jax.P(None, None, "context"), jax.P(None, None, "context")), out_specs=last),
        q, kv, kv)
    assert flops == n * 4 * 4 * 2 * minillm.causal_pairs(T // n)


@pytest.mark.parametrize("axes, layout, K, ring, dtype, kind", [
    (dict(data=2, tensor=2), "heads", 4, 1, "float32", None),
    (dict(tensor=4), "context", 1, 0, "int8", Q8),
    (dict(tensor=3), "sequence", 2, 0, "float32", None),
    (dict(tensor=(2, 2)), "batch", 2, 0, "int8", Q8),
    (dict(tensor=(2, 4)), "context", 2, 0, "float32", None)])
def test_a_split_model_reads_and_generates_what_one_device_does(axes, layout, K, ring, dtype, kind):
    cfg, mesh, B, S = replace(WIDE, K=K, qk_norm=True, L=1 + ring), shard.make_mesh(**axes), 4, 24
    cfg = replace(cfg, E=24, H=6, V=33) if axes == dict(tensor=3) else cfg
    params, text, lengths = weights(cfg), draw_tokens(cfg, B, 8), np.array([3, 8, 5, 1])
    params = params if kind is None else quantize_params(params, cfg, kind)
    enter, leave = RINGS[ring]
    rules, parts = shard.layout_rules(mesh, layout), dict(mesh=mesh, layout=layout, enter=enter,
                                                          leave=leave)
    how = dict(temperature=0.9, end=3)

    def everything(prefill, extend, generate, params, cache):
        logits, cache = prefill(params, cache, text, lengths, cfg)
        x, cache = extend(params, cache, text[:, :3], cfg)
        tokens, last, cache = generate(params, cache, logits, jax.random.key(1), 5, cfg, **how)
        return logits, x, last, tokens, cache.length

    alone = jax.jit(partial(everything, prefill, extend, generate))(
        params, init_cache(cfg, B, S, dtype))
    ours = jax.jit(partial(everything, *(partial(fn, **parts) for fn in (
        shard.tp_prefill, shard.tp_extend, shard.tp_generate))))(
        shard.place(params, cfg, mesh, rules),
        shard.place_cache(init_cache(cfg, B, S, dtype), mesh, layout))
    assert np.array_equal(alone[3], ours[3]) and np.array_equal(alone[4], ours[4])
    # an int8 slot at the edge of rounding may fall either way
    jax.tree.map(partial(close, tolerance=TOLERANCE if dtype == "float32" else 0.05), ours[:3],
                 alone[:3])


@pytest.mark.parametrize("axes, layout", [(dict(data=(2, 2), tensor=2), "heads"),
                                          (dict(tensor=4), "sequence")])
def test_a_split_model_speculates_what_one_device_does(axes, layout):
    mesh, params, text = shard.make_mesh(**axes), weights(WIDE), draw_tokens(WIDE, 4, 24)
    cache = init_cache(WIDE, 4, 24)
    _, cache = prefill_jit(params, cache, text[:, :7], np.array([7, 4, 5, 6]), cfg=WIDE)
    cache = cache._replace(length=cache.length - 1)  # which nobody has placed: it is moved
    how = dict(n=6, cfg=WIDE, draft=ngram_draft(WIDE, 3), state=None, temperature=0.7, end=3)
    alone, ours = (jax.jit(lambda params, cache, fn=fn, **more: fn(
        params, cache, text, jax.random.key(2), **how, **more), static_argnames=("mesh", "layout"))
        (params, cache, **more) for fn, more in (
            (speculate, {}), (shard.tp_speculate, dict(mesh=mesh, layout=layout))))
    assert np.array_equal(ours[0], alone[0]) and np.array_equal(ours[3], alone[3])
    assert np.array_equal(ours[1].length, alone[1].length)


@pytest.mark.parametrize("axes, layout, how", [
    (dict(data=2, tensor=(2, 2)), "batch", dict(temperature=0.8, top_k=9)),
    (dict(data=2, tensor=4), "sequence", dict(end=3))])
def test_a_split_model_serves_what_one_device_does(axes, layout, how):
    cfg, mesh = replace(WIDE, L=1), shard.make_mesh(**axes)
    params, prompts = weights(cfg), [draw_tokens(cfg, 1, T, seed=T)[0] for T in (3, 11, 5, 8, 2)]
    given = prompts, 4, 20, 6, jax.random.key(1), cfg
    more = how | dict(stride=4, cache_dtype="int8")
    placed = shard.place(params, cfg, mesh, shard.layout_rules(mesh, layout))
    alone, ours = dict(serve(params, *given, **more)), dict(
        shard.tp_serve(placed, *given, mesh, layout, **more))
    assert len(ours) == 5 and all(np.array_equal(ours[i], alone[i]) for i in alone)


@settings(max_examples=10)
@given(st.sampled_from([2, 3, 8, (2, 3)]), st.sampled_from([0.0, 1e-40, 0.7, 30.0]),
       st.sampled_from([0, 1, 3, 40]), st.sampled_from([1.0, 0.6]), st.booleans(),
       st.integers(0, 99))
def test_split_logits_draw_the_token_that_whole_ones_do(n, temperature, top_k, top_p, wild, seed):
    """From the same logits, with ties; also where they are not finite."""
    V, B, mesh = 24, 5, shard.make_mesh(tensor=n)
    logits = np.round(normals((B, V), seed=seed)[0], 1)
    if wild:
        np.put(logits, np.random.default_rng(seed).integers(0, B * V, 30),
               [np.inf, -np.inf, np.nan])
        logits[1] = -np.inf
    pos, split = jnp.arange(B), jax.P(None, shard.axes_of(mesh, "tensor"))
    given, how = (jax.random.key(seed), logits, pos), (temperature, top_k, top_p)
    ours = jax.shard_map(lambda *given: shard.split_sample(*given, *how, axis=split[1]), mesh=mesh,
                         in_specs=(jax.P(), split, jax.P()), out_specs=jax.P())
    assert np.array_equal(jax.jit(ours)(*given), sample(*given, *how))


def test_a_cache_moved_from_layout_to_layout_holds_what_it_held():
    mesh, cfg = shard.make_mesh(tensor=(2, 2)), WIDE
    shape = (4, cfg.K, 24, cfg.D)
    cache = init_cache(cfg, 4, 24)._replace(k=tuple(map(jnp.asarray, normals(shape, shape))))
    moved = cache
    for layout in ("sequence", "heads", "context", "batch"):
        moved = shard.place_cache(moved, mesh, layout)
        k = moved.k[0]
        assert infer.slots_of(moved) == 24 and (k.ndim == 5) == (layout in ("sequence", "context"))
        if k.ndim == 5:  # every other slot of a row is a device's
            part = next(part for part in k.addressable_shards if part.index[2].start)
            assert np.array_equal(part.data[:, :, 0], cache.k[0][part.index[:2]][:, :, 1::2])
    assert same(shard.as_laid_out(moved, mesh, "heads"), cache)
    made, logits = shard.tp_empty(cfg, 4, 24, "int8", mesh, "sequence")
    assert made.k[0].q.sharding.shard_shape(made.k[0].q.shape) == (4, 2, 1, 12, cfg.D)
    assert logits.sharding.shard_shape(logits.shape) == (4, cfg.V // 4)


def test_axes_of_a_mesh_follow_the_devices_coordinates():
    class Device:
        def __init__(self, id, coords):
            self.id, self.coords, self.process_index, self.platform = id, coords, 0, "tpu"

    there = [Device(i, (i % 2, i // 2 % 2, i // 4)) for i in range(16)]
    mesh = shard.make_mesh(there, data=(2, 2), tensor=4)
    assert dict(mesh.shape) == {"data0": 2, "data1": 2, "tensor": 4}
    assert all(mesh.devices[place].coords == place for place in np.ndindex(2, 2, 4))
    assert shard.axes_of(mesh, "data") == ("data0", "data1")
    assert shard.spec("HD E", WIDE, mesh, {**shard.TENSOR, **shard.FSDP}) == jax.P(
        ("tensor", "data0"), None, "data1")  # of 8 heads 4 x 2 parts, then of E
    assert shard.spec("E", WIDE, mesh, {**shard.TENSOR, **shard.FSDP}) == jax.P(None)


def test_a_cache_split_over_slots_takes_more_tokens_than_a_device_has_slots():
    mesh, params, text = shard.make_mesh(tensor=4), weights(WIDE), draw_tokens(WIDE, 2, 11)

    def everything(extend, generate, cache):
        x, cache = extend(params, cache, text, WIDE)
        return x, *generate(params, cache, jnp.zeros((2, WIDE.V)), jax.random.key(0), 9, WIDE)[:2]

    alone = jax.jit(partial(everything, extend, generate))(init_cache(WIDE, 2, 20))
    split = (partial(fn, mesh=mesh, layout="sequence") for fn in (
        shard.tp_extend, shard.tp_generate))
    x, tokens, last = jax.jit(partial(everything, *split))(init_cache(WIDE, 2, 20))  # 5 a device
    assert np.array_equal(tokens, alone[1])
    jax.tree.map(close, (x, last), (alone[0], alone[2]))


def test_activations_quantised_on_their_own_device_are_off_by_no_more_than_together():
    """Q8A8: behind a gather, rows are quantised whole, as on one device. Before a scatter and in a
    ring each part has the scale of its own largest number, never above that of the whole row."""
    x, w = normals((3, 1, 32), (8, 32))
    x[..., :8] *= 30  # one device's part is much larger
    held, mesh = Q8A8(*quantize(jnp.asarray(w), -1)), shard.make_mesh(tensor=4)
    last = jax.P(None, None, "tensor")
    gathered = jax.jit(jax.shard_map(
        lambda x, w: shard.gather_matmul(x, (w,))[0], mesh=mesh, in_specs=(
            last, Q8A8(jax.P("tensor"), jax.P("tensor"))), out_specs=last))(x, held)
    close(gathered, dot(x, held))
    exact = np.einsum("bte,fe->btf", x.astype(float), np.asarray(dequantize(held), float))
    parts = np.abs(x).reshape(3, 1, 4, 8).max(-1, keepdims=True)
    magnitude = np.abs(np.asarray(dequantize(held), float)).reshape(8, 4, 8)
    bound = np.einsum("btnk,fnk->btf", np.broadcast_to(parts / 254, (3, 1, 4, 8)), magnitude)
    together = np.abs(x).max() / 254 * magnitude.sum((1, 2))
    for run, specs in ((shard.matmul_scatter, (last, Q8A8(jax.P(None, "tensor"), jax.P()))),
                       (lambda x, w: shard.gather_matmul_ring(x, (w,))[0],
                        (last, Q8A8(jax.P("tensor"), jax.P("tensor"))))):
        ours = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=last))(x, held)
        assert np.all(np.abs(ours - exact) <= bound * 1.001) and np.all(bound <= together)


@pytest.mark.parametrize("ring, dtype", [(0, "float32"), (2, "bfloat16")])
def test_every_form_sends_what_the_formula_says_to_the_byte(ring, dtype, monkeypatch):
    enter, leave = RINGS[ring]
    cfg = replace(WIDE, dtype=dtype)
    forms = [(dict(data=1, tensor=4), cfg),
             (dict(data=2, tensor=(2, 2), context=2), replace(cfg, L=1, qk_norm=True)),
             (dict(data=(2, 2), tensor=1, context=3), replace(cfg, L=1, E=48, F=48)),
             (dict(data=2, tensor=4), replace(cfg, tied=False, L=3, qk_norm=True))]
    for i, (axes, cfg) in enumerate(forms[:1 if ring else 4]):
        monkeypatch.setattr(shard, "token_blocks", lambda N, V: (1, 2, 4, 3)[i])
        keep = minillm.KEEPABLE[:i]
        run = partial(shard.sharded_loss, cfg=cfg, enter=enter, leave=leave, keep=keep,
                      mesh=abstract_mesh(**axes))
        stacked = jax.eval_shape(shard.stack, abstract(cfg))
        assert shard.traced_comm(jax.grad(run), stacked, shaped(8, 7)) \
            == shard.comm_bytes(cfg, "train", 8, 6, **axes, ring=ring, keep=keep)
    cfg, B, T, key = replace(WIDE, dtype=dtype, L=1 if ring else 2), 8, 6, jax.random.key(0)
    cache = jax.eval_shape(lambda: init_cache(cfg, B, 24, dtype))

    def verified(params, cache, tokens, **parts):
        x, cache = shard.tp_extend(params, cache, tokens, **parts)
        return shard.tp_unembed(params, x, **{k: v for k, v in parts.items() if k != "leave"})

    for data, tensor, layout in ((1, 4, "heads"), (1, 4, "context")) if ring else (
            *((2, 4, layout) for layout in shard.LAYOUTS), (1, (2, 2), "batch"),
            (1, (2, 2), "context")):
        parts = dict(cfg=cfg, mesh=abstract_mesh(data=data, tensor=tensor), layout=layout,
                     enter=enter, leave=leave)
        for form, fn, args in (
                ("verify", verified, (shaped(B, T),)), ("extend", shard.tp_extend, (shaped(B, T),)),
                ("prefill", shard.tp_prefill, (shaped(B, T), shaped(B))),
                ("generate", partial(shard.tp_generate, n=T),
                 (shaped(B, cfg.V, dtype="float32"), key))):
            sent = shard.traced_comm(partial(fn, **parts), abstract(cfg), cache, *args)
            assert sent == shard.comm_bytes(cfg, form, B, T, data, tensor, layout, ring)
            if ring and tensor == 4 and form == "extend" and layout == "heads":
                assert sent["permute"][0] == 4 * cfg.L * ring * (tensor - 1)
                assert "all_gather" not in sent


@pytest.mark.parametrize("how", [dict(temperature=0.9), dict(temperature=0.9, top_k=5),
                                 dict(temperature=0.9, top_k=5, top_p=0.9)])
def test_of_split_logits_a_draw_sends_what_the_formula_says(how):
    """Two numbers a row and device, a largest, some candidates; or all, where all are asked for."""
    cfg, B, args = replace(WIDE, L=1), 4, dict(tensor=(2, 2))
    cache = jax.eval_shape(lambda: init_cache(cfg, B, 24))
    sent = shard.traced_comm(partial(shard.tp_generate, n=3, cfg=cfg, mesh=abstract_mesh(**args),
                                     **how),
                             abstract(cfg), cache, shaped(B, cfg.V, dtype="float32"),
                             jax.random.key(0))
    assert sent == shard.comm_bytes(cfg, "generate", B, 3, **args, **how)
    greedy = shard.comm_bytes(cfg, "generate", B, 3, **args)
    more = sent["all_gather"][1] - greedy["all_gather"][1]
    assert more == 3 * 3 * B * {1: 0, 2: 4 * 5, 3: 4 * cfg.V // 4 - 8}[len(how)]


def test_a_prompt_split_over_tokens_sends_int8_as_it_is():
    cfg, mesh = replace(WIDE, tied=False), abstract_mesh(tensor=(2, 4))
    params = jax.eval_shape(lambda p: quantize_params(p, cfg), abstract(cfg))
    cache = jax.eval_shape(lambda: init_cache(cfg, 2, 24, "int8"))
    sent = shard.traced_comm(partial(shard.tp_prefill, cfg=cfg, mesh=mesh, layout="context"),
                             params, cache, shaped(2, 21), shaped(2))
    assert sent == shard.comm_bytes(cfg, "prefill", 2, 21, tensor=(2, 4), layout="context",
                                    dtype="int8", cache_dtype="int8")


def test_collectives_are_counted_as_a_ring_sends_them():
    mesh, last = abstract_mesh(tensor=4), jax.P("tensor")

    def sent(fn, out=last):
        run = jax.shard_map(fn, mesh=mesh, in_specs=last, out_specs=out)
        return shard.traced_comm(run, shaped(16, dtype="float32"))  # 4 numbers, 16 bytes a device

    axis = "tensor"
    assert sent(lambda x: jax.lax.all_gather(x, axis, tiled=True)) == {"all_gather": (1, 3 * 16)}
    assert sent(lambda x: jax.lax.psum_scatter(x, axis, tiled=True)) \
        == {"reduce_scatter": (1, 3 * 4)}
    assert sent(lambda x: jax.lax.psum(x, axis), jax.P()) == {"all_reduce": (1, 2 * 3 * 4)}
    assert sent(lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True)) == {
        "all_to_all": (1, 3 * 4)}
    assert sent(lambda x: jax.lax.scan(lambda c, _: (shard.pass_on(c, axis, 1), None), x,
                                       length=5)[0]) == {"permute": (5, 5 * 16)}
    assert shard.comm_seconds({"permute": (5, 80)}, link=10.0, ways=2, hop=0) == 4.0
    assert shard.comm_seconds({"permute": (5, 80)}, link=10.0, hop=0.5) == 8 + 2.5
    events = [("all_reduce", 3, 8, 4), ("all_gather", 1, 8, 3), ("permute", 6, 8, 4)]
    assert shard.hops(events) == 3 * 4 + 1 + 6 and shard.hops(events, ways=2) == 3 * 4 + 1 + 3
    with pytest.raises(ValueError, match="while"):
        sent(lambda x: jax.lax.while_loop(lambda c: True, lambda c: shard.pass_on(c, axis, 1), x))


@pytest.mark.parametrize("keep", [(), minillm.KEEPABLE])
def test_fsdp_keeps_a_layers_inputs_what_it_is_told_to_and_one_gathered_layer(keep):
    """12 more layers may keep 12 more of BTE, of what is named and of what the program carries:
    their gradients' parts, which are outputs, not temporaries; a gathered layer is there once."""
    B, T, mesh = 8, 64, shard.make_mesh(data=8, tensor=1)
    cfg = Config(L=4, E=64, H=4, K=4, D=16, F=128, V=32)

    def temp(L):
        deep = replace(cfg, L=L)
        params = jax.eval_shape(shard.stack, abstract(deep))
        split = shard.stacked(shard.specs(deep, mesh, {**shard.TENSOR, **shard.FSDP}))
        params = jax.tree.map(lambda a, spec: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec)), params, split)
        run = jax.jit(jax.value_and_grad(partial(shard.sharded_loss, cfg=deep, mesh=mesh,
                                                 keep=keep)))
        return run.lower(params, shaped(B, T + 1)).compile().memory_analysis().temp_size_in_bytes

    named = dict(attention=cfg.H * (cfg.D + 1), qkv=(cfg.H + 2 * cfg.K) * cfg.D, gate=cfg.F,
                 up=cfg.F)
    inputs = B // 8 * T * (cfg.E + sum(named[name] for name in keep)) * 4
    layer = sum(4 * minillm.size_of(name, cfg)
                for name in jax.tree.leaves(dims(cfg).layers[0]))
    assert temp(16) <= temp(4) + 12 * inputs + layer


def test_what_cannot_be_split_is_refused_by_name_before_compiling():
    mesh, params, text = shard.make_mesh(data=2, tensor=4), weights(WIDE), draw_tokens(WIDE, 4, 6)
    cache, four = init_cache(WIDE, 4, 24), shard.make_mesh(tensor=4)
    check(lambda: shard.make_mesh(tensor=9), "9 devices", "there are 8", "jax_num_cpu_devices")
    check(lambda: shard.place(params, WIDE, mesh, dict(E="model")), "'model'", "data")
    check(lambda: shard.shardings(WIDE, mesh, dict(Q="data")), "Q=", "EHKDFV")
    odd = replace(WIDE, F=22)
    check(lambda: shard.place(weights(odd), odd, mesh, shard.TENSOR), "F=22", "4 devices")
    check(lambda: shard.sharded_loss(shard.stack(params), text[:3], WIDE, mesh), "3 rows", "data")
    few = replace(WIDE, K=2)
    check(lambda: shard.tp_extend(weights(few), init_cache(few, 4, 24), text, few, four), "K=2")
    check(lambda: shard.tp_extend(params, cache, text, WIDE, four, "slots"), "slots", "sequence")
    check(lambda: shard.tp_extend(params, init_cache(WIDE, 3, 24), text[:3], WIDE, four, "batch"),
          "B=3")
    check(lambda: shard.tp_extend(params, init_cache(WIDE, 4, 22), text, WIDE, four, "sequence"),
          "S=22")
    held = cache._replace(length=jnp.full(4, 20))
    check(lambda: shard.tp_extend(params, held, text, WIDE, four), "20 tokens", "24 slots")
    check(lambda: shard.sharded_loss(shard.stack(params), text, WIDE, mesh, keep=("gates",)),
          "gates", "attention, qkv, gate, up")
    check(lambda: shard.sharded_loss(shard.stack(params), text, WIDE, mesh, keep="up"), "'up'")
    check(lambda: shard.comm_bytes(WIDE, "train", 4, 4, keep=("gates",)), "gates", "attention")
    check(lambda: shard.comm_bytes(WIDE, "extend", 4, keep=("gate",)), "extend", "keep")
    check(lambda: loss(params, text, WIDE, blocks=0), "blocks=0", "at least one")
    check(lambda: shard.comm_bytes(WIDE, "fly", 1), "fly", "prefill")
    check(lambda: shard.comm_bytes(WIDE, "train", 3, data=2), "B=3", "2 devices")
    check(lambda: shard.comm_bytes(WIDE, "extend", 3, tensor=4, layout="batch"), "B=3", "4 devices")
    check(lambda: shard.comm_bytes(WIDE, "extend", 4, ring=3), "ring=3")
    check(lambda: shard.comm_bytes(WIDE, "extend", 4, tensor=3), "cannot be split over 3")
    check(lambda: shard.make_mesh(tensor=0), "at least one")
    check(lambda: shard.shardings(WIDE, mesh, dict(HK="data")), "HK=")
    check(lambda: shard.shardings(WIDE, mesh, dict(H="data", E="data")), "same axis")
    check(lambda: shard.place_cache(cache, four, "rows"), "rows", "heads")
    check(lambda: shard.place_cache(init_cache(few, 4, 24), four, "heads"), "K=2")
    check(lambda: shard.place_cache(cache, shard.make_mesh(data=4), "batch"), "'tensor'")
    check(lambda: shard.sharded_loss(params, text, WIDE, mesh), "stack(params)")
    check(lambda: shard.sharded_loss(shard.stack(params), text[:, :1], WIDE, mesh), "two or more")
    check(lambda: shard.fsdp_loss(params, text[:3], WIDE, mesh), "3 rows")
    check(lambda: shard.sharded_loss(shard.stack(params), text, WIDE, shard.make_mesh(
        data=1, context=4, tensor=1)), "T=5", "4 devices", "context")
    check(lambda: shard.comm_bytes(WIDE, "train", 4, 5, context=4), "T=5", "multiple of 4")
    check(lambda: shard.tp_extend(params, init_cache(few, 4, 24), text, few, shard.make_mesh(
        tensor=(4, 2)), "batch"), "K=2", "4 devices")
    check(lambda: shard.tp_empty(WIDE, 4, 22, "float32", four, "context"), "S=22", "4 devices")
    check(lambda: shard.shardings(WIDE, mesh, dict(H=("tensor", "model"))), "model", "tensor")
    check(lambda: shard.fsdp_loss(params, text, WIDE, four), "'data'")
    last = jax.P(None, None, "tensor")
    x, w = normals((1, 1, 24), (8, 32))
    for enter, _ in RINGS.values():
        check(lambda: jax.shard_map(lambda x, w: enter(x, (w,))[0], mesh=four, in_specs=(
            last, jax.P("tensor")), out_specs=last)(x, w), "4 parts of 6", "32")
        check(lambda: jax.shard_map(lambda x, w: enter(x, (w,), norm=(x[0, 0], 0.0))[0], mesh=four,
                                    in_specs=(last, jax.P("tensor")), out_specs=last)(x, w),
              "6 scales", "4 times 6")
    for _, leave in RINGS.values():
        check(lambda: jax.shard_map(leave, mesh=four, in_specs=(last, jax.P(None, "tensor")),
                                    out_specs=last)(x, normals((6, 24))[0]), "E=6", "4 devices")


def test_two_processes_compute_what_one_device_does(beside):
    told, name = json.loads(beside["two"]().splitlines()[-1]), "L1,E32,H4,K4,D8,F48,V64"
    assert told["machine"]["count"] == 4
    assert [row["form"] for row in told["rows"]] == 2 * ["train, by hand ring"] + [
        "prefill over heads ring", "generate over heads ring"]
    assert all(row["as_predicted"] for row in told["rows"])

    def alone(phase):
        job = bench.Job(phase, name, bench.parse_model(name), 4, 6, 3)
        return bench.prepare(job, init(jax.random.key(0), job.cfg), 0).call()

    assert all(abs(row["loss"] - alone("train")[2]) < 1e-4 for row in told["rows"][:2])
    assert np.array_equal(told["rows"][2]["tokens"], np.argmax(alone("prefill")[0], -1))
    assert np.array_equal(told["rows"][3]["tokens"], alone("generate")[0])


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
    check(lambda: prefill(params, cache, text, np.array([0, 6]), cfg), "lengths", "0", "1 to 6")
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
    known = jnp.pad(text, ((0, 0), (0, 2)))
    one_more = partial(speculate, params, tokens=known, key=key, cfg=cfg, draft=ngram_draft(cfg, 2),
                       state=None)
    check(lambda: one_more(held, n=1), "6 tokens", "8 slots", "S=10")
    check(lambda: one_more(init_cache(cfg, 2, 20), n=9), "width 8", "pad them to 12")
    check(lambda: ngram_draft(cfg, 0), "n_draft=0")
    check(lambda: list(serve(params, [text[0]], 2, 8, 0, key, cfg)), "n=0")
    check(lambda: sample(key, logits, jnp.zeros(2), 0.0, -1, 1.0), "top_k=-1")
    check(lambda: log_probs(logits, math.nan), "nan")
    check(lambda: resize(cache, 0), "0 slots")
    check(lambda: one_more(cache, n=1), "two or more")
    check(lambda: one_more(init_cache(cfg, 3, 8), n=1), "cache of 3")
    check(lambda: list(serve(params, [text[0], [cfg.V]], 2, 9, 2, key, cfg)), "request 1", cfg.V)
    check(lambda: list(serve(params, [text[0]], 2, 7, 2, key, cfg)), "request 0", "S=8")
    check(lambda: list(serve(params, [[]], 2, 7, 2, key, cfg)), "request 0")
    check(lambda: log_probs(logits, -1.0), -1.0)
    check(lambda: log_probs(logits, 1.0, 0, 0.0), "top_p=0.0")


# -------------------------------------------------------------------------------------------- bench


TINY = "L1,E16,H2,K1,D8,F24,V256"
LIMITS = {"flops_per_second": {"float32": 1e12, "bfloat16": 2e12}, "read_bytes_per_second": 1e11}


@pytest.fixture
def calm(monkeypatch):
    """Fixed ceilings that no machine reaches at toy sizes, so that nothing depends on timing; and
    few runs, of a model that knows nothing."""
    monkeypatch.setattr(bench, "measure_flops", lambda dtype: 1e15)
    monkeypatch.setattr(bench, "measure_read", lambda: 1e15)
    monkeypatch.setattr(bench, "seconds_of", partial(bench.seconds_of, for_seconds=0))
    monkeypatch.setattr(bench, "learn", lambda cfg, seed: weights(cfg))


KEYS = {"phase", "model", "dtype", "cache_dtype", "B", "T", "S", "flops",
        "weight_bytes", "cache_bytes", "predicted_seconds", "measured_seconds", "p10_seconds",
        "p90_seconds", "runs", "compile_seconds", "bound", "mfu", "mbu", "tokens_per_second"}


def result_of(capsys, *argv):
    """The JSON object that ends a command's output, and all of the output."""
    capsys.readouterr()
    bench.main([*map(str, argv)])
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


@pytest.mark.parametrize("phase", [name for name in bench.PHASES if name not in bench.PARTIAL])
def test_a_phase_alone_ends_in_one_json_line_whose_flops_are_the_programs(phase, calm, capsys):
    many = phase in ("generate", "prefill")
    batches, dtypes = ([1, 2], ["float32", "bfloat16"]) if many else ([2], ["bfloat16"])
    result, _ = result_of(capsys, phase, "--model", TINY, "--batch", ",".join(map(str, batches)),
                          "--dtype", ",".join(dtypes), "--prompt", 6, "--new", 3)
    assert result["machine"].keys() >= {"device", "count", "cores", "jax", "python"}
    rows = [row for row in result["rows"] if row["phase"] == phase]
    assert [(r["B"], r["dtype"]) for r in rows] == [
        (B, dtype) for dtype in dtypes for B in batches]
    for row in rows:
        assert row.keys() >= KEYS and row["runs"] >= 5 and not row["errors"]
        assert row["p10_seconds"] <= row["measured_seconds"] <= row["p90_seconds"]
        assert sum(part["seconds"] for part in row["parts"]) == row["predicted_seconds"]
        if phase == "serve":  # it runs on the host, of programs that the other rows hold
            continue
        cfg = replace(bench.parse_model(TINY), dtype=row["dtype"])
        job = bench.Job(phase, TINY, cfg, row["B"], 6, 3, row["dtype"])
        step, make, *_ = bench.PHASES[phase].build(job, None)
        args = make(init(jax.random.key(0), cfg, cfg.dtype), jax.random.key(0))
        assert row["alias_bytes"] <= row["argument_bytes"] <= row["peak_bytes"]
        assert row["argument_bytes"] >= sum(a.nbytes for a in jax.tree.leaves(args[0]))
        if phase == "speculate":  # in a loop of unknown length; a round is what verify is
            assert row["program_flops"] is None and 1 <= row["tokens_per_round"] <= 5
            assert 0 <= row["acceptance"] <= 1
            assert row["flops"] == sum(decode_flops(cfg, 2, row["S"], 5).values())
            continue
        assert row["program_flops"] == traced_flops(step, *args) \
            == row["flops"] * row["steps"]
        if phase != "train":  # whose bytes come and go three times
            slots = sum(a.nbytes for a in jax.tree.leaves(args[1][:2]))
            written = 0 if phase == "prefill" else kv_bytes(cfg, row["B"], row["T"])
            assert row["cache_bytes"] == slots + written
            assert row["weight_bytes"] == sum(w.nbytes for w in jax.tree.leaves(args[0]))


def test_the_same_command_predicts_the_same_and_writes_what_it_prints(calm, capsys, tmp_path):
    first, again = (result_of(
        capsys, "--json", tmp_path / "result", "verify", "--model", TINY, "--prompt", 6, "--seed",
        3, "--batch", 2)[0]["rows"][0] for _ in "12")
    for key in ("flops", "program_flops", "temp_bytes", "predicted_seconds", "parts"):
        assert first[key] == again[key]
    assert json.loads((tmp_path / "result").read_text())["rows"] == [again]


def test_interrupted_it_prints_what_it_has(calm, capsys, monkeypatch):
    measure, rows = bench.measure, []

    def interrupted(*args):
        if rows:
            raise KeyboardInterrupt
        rows.append(measure(*args))
        return rows[0]

    monkeypatch.setattr(bench, "measure", interrupted)
    result, _ = result_of(capsys, "prefill", "--model", TINY, "--batch", "1,2", "--prompt", 6)
    assert result["rows"] == rows


def test_a_wide_spread_is_said():
    row = bench.predicted_row(bench.Job("prefill", "", CONFIGS[0], 1, 4, 0), LIMITS)
    calm, wild = ([1.0] * 9 + [1.2], [1.0] * 7 + [1.4] * 3)
    assert not bench.measured_row(row, calm, LIMITS)["notes"]
    assert "spread by 40%" in bench.measured_row(row, wild, LIMITS)["notes"][0]


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(list(bench.PHASES)),
       st.sampled_from(["float32", "bfloat16"]))
def test_predictions_grow_with_batch_and_tokens_and_no_part_beats_either_limit(B, T, phase, dtype):
    cfg = replace(bench.parse_model("L2,E64,H4,K2,D16,F192,V256"), dtype=dtype)

    def seconds(B, T):
        cost = bench.PHASES[phase].cost(bench.Job(phase, "", cfg, B, T, 8, dtype))
        result = bench.predict(cost, LIMITS)
        for part, own in zip(result["parts"], cost.parts):
            times = {"flops": part["flops"] / LIMITS["flops_per_second"][own.dtype],
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


@files
def test_a_saved_model_is_completed_alike_with_every_draft(calm, capsys, tmp_path):
    text, folder = tmp_path / "text", tmp_path / "model"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    bench.main(["train", "--text", str(text), "--steps", "60", "--model", TINY, "--prompt", "32",
                "--lr", "0.01", "--new", "8", "--save", str(folder)])

    def complete(*more):
        capsys.readouterr()
        bench.main(["complete", "--model", str(folder), "the quick", "--new", "20", *more])
        said, told = capsys.readouterr().out[:-1].rsplit("\n", 1)
        assert "prefill of 9 tokens" in told and "tokens/s" in told
        assert ("tokens a round" in told) == ("--draft" in more)
        return said, told

    plain, _ = complete()
    assert plain.startswith("the quick") and len(plain) == 29
    assert complete("--draft", "ngram", "--n-draft", "3", "--devices", "2")[0] == plain
    assert complete("--devices", "2", "--cache", "int8")[0] == complete("--cache", "int8")[0]
    again, told = complete("--draft", str(folder), "--dtype", "float32")
    assert again == plain and "5.00 tokens a round" in told  # all 4 and one more: it is itself
    assert "weights int8, cache int8" in complete("--dtype", "int8", "--cache", "int8")[1]
    sampled = [complete("--temperature", "1", "--top-k", "9", "--seed", seed)[0] for seed in "112"]
    assert sampled[0] == sampled[1] != sampled[2]


@files
@pytest.mark.parametrize("cfg", [CONFIGS[4], CONFIGS[1]])
def test_training_that_is_saved_and_goes_on_is_one_longer_training_bit_for_bit(cfg, tmp_path):
    """Gemma's norm scales too, which files of weights round."""
    step, text = jax.jit(train_step, static_argnames="cfg"), draw_tokens(cfg, 6, 2, 7)
    params, adam = weights(cfg), adam_init(weights(cfg))
    for i in range(6):
        if i == 3:
            save(tmp_path, cfg, params, adam=adam)
        params, adam, _ = step(params, adam, text[i], cfg, 1e-2)
    found, theirs = load(tmp_path)
    theirs, state = infer.load_adam(tmp_path, found, theirs)
    for i in range(3, 6):
        theirs, state, _ = step(theirs, state, text[i], cfg, 1e-2)
    assert found == cfg and same((params, adam), (theirs, state))
    save(tmp_path / "other", replace(cfg, F=7), weights(replace(cfg, F=7)), adam=adam_init(
        weights(replace(cfg, F=7))))
    file = next(tmp_path.glob("*-adam*"))
    file.write_bytes(next((tmp_path / "other").glob("*-adam*")).read_bytes())
    check(lambda: infer.load_adam(tmp_path, cfg, params), file.name, "shape")
    save(tmp_path, cfg, params)  # without a state: the earlier one does not belong to these
    check(lambda: infer.load_adam(tmp_path, cfg, params), str(tmp_path), "--save")
    check(lambda: save(tmp_path, cfg, params, adam=adam_init(weights(replace(cfg, F=7)))), "adam")


@files
def test_a_resumed_run_is_one_longer_run_bit_for_bit(calm, capsys, tmp_path):
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)

    def train(steps, *more):
        bench.main(["train", "--text", str(text), "--steps", str(steps), "--prompt", "16", "--new",
                    "2", "--batch", "3", *map(str, more)])

    train(5, "--model", TINY, "--save", tmp_path / "whole")
    train(3, "--model", TINY, "--save", tmp_path / "part")
    train(2, "--resume", tmp_path / "part", "--save", tmp_path / "part")
    assert same(*(infer.load_adam(tmp_path / name, *load(tmp_path / name))
                  for name in ("whole", "part")))
    for more, words in ((["--resume", tmp_path], "config.json"),
                        (["--resume", tmp_path / "part", "--model", "L1,E8,H2,K1,D4,F8,V256"],
                         "--model"), (["--resume", tmp_path / "part", "--kv-heads", "1"], "heads")):
        with pytest.raises(SystemExit) as caught:
            train(1, *more)
        assert words in f"{caught.value.code}{capsys.readouterr().err}"


def byte_fallback(folder):
    """A tokenizer of letters that spells others in bytes and joins them again, as Llama 2's and
    Gemma's do, saved with what training left in it."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {word: i for i, word in enumerate(
        ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh"])}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    words.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    words.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse()])
    words.enable_truncation(2)
    words.enable_padding(length=30)
    words.save(str(folder / "tokenizer.json"))
    return words, len(vocab)


@files
@pytest.mark.parametrize("seed", range(3))
def test_text_is_printed_once_and_whole_however_it_is_spelled(seed, capsys, tmp_path, monkeypatch):
    """Most tokens of this model are single bytes, of which few make a character; and a byte that is
    a character on its own is none any more once its neighbours are broken."""
    _, V = byte_fallback(tmp_path)
    cfg, step, prompt = Config(L=1, E=8, H=2, K=1, D=4, F=8, V=V), bench.generating, "abc \u6c34 a"
    save(tmp_path, cfg, weights(cfg))
    spelled = [2 + byte for byte in "\u6c34".encode()] + [V - 1, 2 + ord("b"), V - 2]

    def spelling(*args):
        for made, rounds in step(*args):  # some of what it draws is replaced by whole characters
            draw = np.random.default_rng(seed)
            yield [spelled[i % 6] if draw.random() < 0.8 else token
                   for i, token in enumerate(made)], rounds

    monkeypatch.setattr(bench, "generating", spelling)
    monkeypatch.setattr(bench, "STRIDE", 1)
    whole = tmp_path / "result"
    bench.main(["complete", "--model", str(tmp_path), prompt, "--temperature", "3", "--new", "24",
                "--seed", str(seed), "--json", str(whole)])
    out = capsys.readouterr().out[:-1].rsplit("\n", 1)
    result = json.loads(whole.read_text())
    assert out[0] == result["text"] and out[0].startswith(prompt)
    assert "prefill of 9 tokens" in out[1] and "\u6c34hb" in out[0][len(prompt):]


@files
@pytest.mark.parametrize("general, own, ends", [
    (None, 5, [5]), ([7, 8], 5, [7, 8]), (6, None, [6]), (None, None, [])])
def test_a_text_ends_where_generation_config_says_or_else_config(general, own, ends, tmp_path):
    _, V = byte_fallback(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": own}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": general}))
    cfg = Config(L=1, E=8, H=2, K=1, D=4, F=8, V=V)
    assert list(bench.tokenizer(tmp_path, cfg).ends) == ends
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    check(lambda: bench.tokenizer(tmp_path, cfg), "generation_config.json", "eos_token_id")


@files
def test_completing_needs_a_tokenizer_and_a_draft_of_the_same_vocabulary(tmp_path, monkeypatch):
    save(tmp_path / "small", CONFIGS[0], weights(CONFIGS[0]))
    cfg = bench.parse_model(TINY)
    save(tmp_path / "bytes", cfg, weights(cfg))

    def refused(*argv):
        with pytest.raises(SystemExit) as caught:
            bench.main(["complete", *argv])
        return str(caught.value.code)

    small, whole = str(tmp_path / "small"), str(tmp_path / "bytes")
    assert "tokenizer.json is missing" in refused("--model", small, "a")
    assert "share a tokenizer" in refused("--model", whole, "ab", "--draft", small)
    assert "0 tokens: 1 or more" in refused("--model", whole, "")
    assert "1 tokens: 2 or more" in refused("--model", whole, "a", "--draft", "ngram")
    assert "top_p=0.0" in refused("--model", whole, "ab", "--top-p", "0")
    with pytest.raises(SystemExit, match="--save"):
        bench.main(["train", "--model", TINY, "--save", f"{small}/config.json"])
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert 'pip install ".[hf]"' in refused("--model", small, "a")


def test_the_sentence_is_learned_and_a_program_that_does_not_recite_it_stops_the_bench(monkeypatch):
    cfg = bench.parse_model("L1,E64,H4,K2,D16,F192,V256")
    bench.check_recital(bench.learn(cfg, seed=0), cfg)
    monkeypatch.setattr(bench, "recite", lambda *_: " all the cats")
    with pytest.raises(SystemExit, match="all the cats"):
        bench.check_recital(None, cfg)


def test_fewer_key_heads_are_trained_beside_each_other(calm, capsys, tmp_path):
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    result, out = result_of(capsys, "train", "--text", tmp_path / "text", "--model", TINY,
                            "--kv-heads", "2,1", "--steps", 3, "--prompt", 8, "--new", 4)
    two, one = result["rows"]
    assert (two["K"], one["K"]) == (2, 1) and "K=2: held-out loss" in out and "K=1" in out
    assert two["cache_bytes_per_token"] == 2 * one["cache_bytes_per_token"]
    assert two["parameters"] == one["parameters"] + 2 * 8 * 16 and one["loss_after"] < 7


@pytest.mark.parametrize("argv, words", [
    (["generate", "--model", "gpt-9"], ["gpt-9", "smollm2-135m", "gemma-7b"]),
    (["generate", "--model", "L1,E16,H2,K1,D8,F24"], ["L1,E16", "shape"]),
    (["generate", "--model", "L1,E16,H2,K1,D8,F24,Vx"], ["Vx"]),
    (["generate", "--model", "L1,E16,H3,K2,D8,F24,V9"], ["H=3", "K=2"]),
    (["generate", "--model", "L1,E16,H2,K2,D7,F24,V9"], ["D=7"]),
    (["--seed", "9" * 20], ["9" * 20, "4294967295"]), (["--seed", "-1"], ["--seed"]),
    (["generate", "--batch", "0"], ["'0'"]), (["prefill", "--batch", "1,a"], ["1,a"]),
    (["train", "--dtype", "float8"], ["float8", "bfloat16"]),
    (["train", "--text", "no-such-file"], ["no-such-file"]),
    (["train", "--steps", "0"], ["'0'"]), (["train", "--dtype", "int8"], ["int8", "bfloat16"]),
    (["generate", "--cache", "int4"], ["int4", "int8"]), (["complete", "x"], ["--model"]),
    (["complete", "--model", "no-such-folder", "x"], ["no-such-folder", "config.json"]),
    (["fly"], ["fly", "generate", "plan"]),
    (["plan", "--chip", "tpu-v9"], ["tpu-v9", "tpu-v4", "h100"]),
    (["plan", "--chip", "1,2,3"], ["1,2,3"]), (["plan", "--mfu", "2"], ["2"]),
    (["plan", "--chips", "0"], ["'0'"]), (["plan", "--kv-heads", "5"], ["K=5", "H=16"]),
    (["plan", "--train", "--chips", "4", "--batch", "6"], ["6", "4 chips", "--batch 8"]),
    (["--json", "no-such-folder/x"], ["no-such-folder"]), (["--plot", "x.gif"], [".png", ".svg"]),
    (["generate", "--model", "llama-3.1-405b"], ["GB", "free", "--model"]),
    (["generate", "--chip", "9,9,9,9"], ["9,9,9,9", "tpu-v4"]),
    (["prefill", "--layout", "heads"], ["--layout", "--chip"]),
    (["train", "--mesh", "data=2"], ["--mesh", "--chip"]),
    (["generate", "--mesh", "data=2,", "--chip", "tpu-v4"], ["data=2,", "tensor=4"]),
    (["generate", "--ring", "3", "--chip", "tpu-v4"], ["'3'", "0, 1, 2"]),
    (["serve", "--chip", "tpu-v4"], ["--chip"]), (["train", "--keep", "up"], ["--keep", "--chip"]),
    (["train", "--keep", "gate,down", "--chip", "tpu-v4"], ["gate,down", "attention", "none"]),
    (["generate", "--int8", "Q4"], ["Q4", "Q8A8"]),
    (["generate", "--int8", "Q8"], ["--int8 Q8", "--dtype int8"]),
    (["plan", "--int8", "Q8"], ["--int8 Q8", "--weights int8"]),
    (["train", "--keep", "up", "--chip", "tpu-v4", "--by", "compiler"], ["--keep", "by hand"]),
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


# ------------------------------------------------------------------- bench: plan, profile, picture


def test_the_lectures_napkin_line_by_line(capsys):
    command = "plan --model gemma-7b --chip tpu-v4 --chips 4 --context 2048 --parameters 7e9"
    n, out = result_of(capsys, *command.split())
    assert n["weight_bytes"] == 14e9 and n["cache_bytes_per_sequence"] == 939_524_096
    assert n["cache_bytes_per_token"] == 458_752 and round(n["critical_batch"]) == 224
    assert (n["max_batch"], n["batch"]) == (121, 110)
    assert int(n["cache_bytes"] / 1e9) == 103 and int(n["step_bytes"] / 1e9) == 117
    exact = n["exact"]
    assert exact["parameters"] == 8_537_680_896 and exact["max_batch"] == 118
    assert exact["weight_bytes"] == 17_075_361_792
    assert all(word in out for word in ("8,537,680,896", "17.1 GB", "14.0 GB", "103 GB", "117 GB"))
    as_is, grouped, small, both = n["million"]
    assert as_is["cache_bytes"] == 458_752e6 and "488 times" in out  # the lecture: 500
    assert grouped["cache_bytes"] * 16 == as_is["cache_bytes"]
    assert small["cache_bytes"] < 0.51 * as_is["cache_bytes"] and both["chips_needed"] == 1
    by_hand, _ = result_of(capsys, *command.replace("tpu-v4", "275e12,1.23e12,32e9,9e10").split())
    assert by_hand | {"chip": "tpu-v4"} == n


MODEL_CHIP = st.tuples(st.sampled_from(sorted(bench.MODELS)), st.sampled_from(sorted(bench.CHIPS)))


def napkin(name, chip, n, context, batch, dtype="bfloat16", cache="bfloat16"):
    cfg = replace(bench.MODELS[name], dtype="float32" if dtype == "float32" else "bfloat16")
    job = bench.Job("generate", name, cfg, 1, context, 0, dtype, cache)
    return bench.napkin(job, bench.CHIPS[chip], n, None, batch)


@settings(max_examples=15)
@given(MODEL_CHIP, st.sampled_from([1, 2]), st.integers(1, 5000), st.integers(1, 999))
def test_a_plan_grows_with_batch_and_context_and_fewer_bytes_never_slow_it(of, n, context, batch):
    name, chip = of
    if bench.degree(bench.MODELS[name], n) < n:
        n = 1
    plan = napkin(name, chip, n, context, batch)
    for phase in ("prefill", "generate"):
        parts, seconds = plan[f"{phase}_parts"], plan[f"{phase}_seconds"]
        assert sum(part["seconds"] for part in parts) == seconds
        assert {part["name"] for part in parts} == {"weights", "attention"} | (
            {"communication"} if n > 1 else set())
        assert napkin(name, chip, n, context, batch + n)[f"{phase}_seconds"] >= seconds
        more = napkin(name, chip, n, context + 1, batch)[f"{phase}_seconds"]
        assert more >= seconds * (1 if phase == "generate" else 0.97)  # blocks are cut anew
        for small in (dict(dtype="int8"), dict(cache="int8"), dict(dtype="int8", cache="int8")):
            assert napkin(name, chip, n, context, batch, **small)[f"{phase}_seconds"] <= seconds
    assert plan["max_batch"] >= plan["batch_with_room"]
    assert plan["fits"] == (batch <= plan["max_batch"])


@given(MODEL_CHIP, st.sampled_from(bench.DTYPES), st.sampled_from(list(bench.INT8)))
def test_at_the_critical_batch_flops_take_as_long_as_bytes(of, dtype, int8):
    name, chip = of
    cfg = replace(bench.MODELS[name], dtype="float32" if dtype == "float32" else "bfloat16")
    limits = bench.sheet(bench.CHIPS[chip])
    job = bench.Job("", "", cfg, 10 ** 6, 1, 0, dtype, int8=int8)
    peak = limits["flops_per_second"]["bfloat16" if (dtype, int8) == ("int8", "Q8") else dtype]
    B, read = bench.critical_batch(job, limits), limits["read_bytes_per_second"]
    weights = bench.generate_cost(job).parts[0]
    assert weights.flops / 10 ** 6 * B / peak == pytest.approx(weights.bytes / read)


def test_chips_that_cannot_share_a_copy_hold_further_ones():
    one, six = (napkin("llama-3.2-3b", "h100", n, 2048, None) for n in (2, 6))
    assert (one["chips_per_copy"], one["copies"]) == (2, 1) and six["copies"] == 3  # V: by 2 alone
    assert six["max_batch"] == 3 * one["max_batch"] and six["fits"]
    assert six["generate_seconds"] == one["generate_seconds"]
    assert six["tokens_per_second"] == pytest.approx(3 * one["tokens_per_second"])


def test_training_is_planned_from_6BP_and_whether_links_hide(capsys):
    command = "plan --model llama-2-7b --chip tpu-v5p --chips 64 --train --context 4096"
    t = result_of(capsys, *command.split(), "--mfu", 0.5, "--tokens", "2e12")[0]["training"]
    N = 6_738_415_616
    assert t["optimizer_bytes"] == 12 * N and t["gradient_bytes"] == 4 * N
    assert t["weight_flops"] == 6 * t["tokens_per_step"] * bench.multiplied(
        bench.MODELS["llama-2-7b"])
    steps = t["tokens"] / t["tokens_per_step"]
    assert t["days"] == pytest.approx(
        steps * t["step_flops"] / (64 * 459e12 * 0.5) / 86400)
    assert not t["communication_bound"]
    few = result_of(capsys, *command.split(), "--batch", 64, "--context", 16)[0]["training"]
    assert few["communication_bound"]  # 16 tokens a chip cannot hide all weights


@pytest.mark.parametrize("kind, name", [
    ("TPU v4", "tpu-v4"), ("TPU v5 lite", "tpu-v5e"), ("TPU v5", "tpu-v5p"), ("cpu", None),
    ("TPU v6 lite", "tpu-v6e"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H200", "h200"),
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA B200", "b200"), ("TPU v4 lite", None)])
def test_a_running_chip_is_recognised(kind, name):
    assert bench.recognised(kind) == name


@given(st.integers(1, 4096), st.sampled_from([1e9, 16e9, 80e9]), st.floats(1, 1000))
def test_batches_grow_until_memory_or_the_critical_batch(S, free, critical):
    job = bench.Job("generate", "", CONFIGS[0], 1, S, 0)
    batches = bench.grown_batches(job, free, critical)
    assert all(bench.needed_bytes(job._replace(B=B)) <= 0.8 * free for B in batches[1:])
    assert batches[-1] >= critical \
        or bench.needed_bytes(job._replace(B=8 * batches[-1])) > 0.8 * free
    assert all(B < critical for B in batches[:-1])


@given(st.floats(-3, 3), st.floats(0.1, 10), st.integers(0, 99))
def test_a_planted_exponent_is_recovered(k, factor, seed):
    sizes = np.array([1, 4, 16, 64])
    assert bench.exponent(sizes, factor * sizes ** k) == pytest.approx(k, abs=1e-9)
    noise = np.exp(np.random.default_rng(seed).normal(size=4) * 0.01)
    assert abs(bench.exponent(sizes, factor * sizes ** k * noise) - k) < 0.02


def test_growth_is_predicted_with_the_lectures_exponents_and_measured(calm, capsys, monkeypatch):
    cfg = bench.parse_model(bench.GROWTH)
    grown = bench.sweeps(bench.Job("generate", "", cfg, 1, 240, 16))
    k = {what: bench.exponent([size for size, _ in jobs], [
        bench.predict(bench.PHASES[job.phase].cost(job), LIMITS)["predicted_seconds"]
        for _, job in jobs]) for what, jobs in grown.items()}
    assert 0.9 < k["layers"] <= 1 <= k["tokens"] < 1.2 and 1.7 < k["width"] < 2.1
    assert 0 < k["batch"] < 0.5 and 0 < k["slots"] < 1  # rows share the weights, slots do not
    monkeypatch.setattr(bench, "sweeps", lambda job: {
        "batch": [(B, job._replace(B=B, prompt=4, new=2)) for B in (1, 2)]})
    result, out = result_of(capsys, "scale", "--model", TINY)
    assert len(result["rows"]) == 2 and result["growth"][0]["sizes"] == [1, 2]
    assert out.splitlines()[-2].split()[-1] == f"{result['growth'][0]['predicted_exponent']:.2f}"


def products(jaxpr, path=""):
    """Of every product: the named scopes that it stands in."""
    for eqn in jaxpr.eqns:
        own = f"{path}/{eqn.source_info.name_stack}"
        if eqn.primitive.name == "dot_general":
            yield own
        for inner in minillm.inner_jaxprs(eqn):
            yield from products(inner, own)


@pytest.mark.parametrize("phase", bench.PHASES.keys() - {"serve", "attention", *bench.PRODUCTS})
def test_every_product_stands_in_a_named_region(phase):
    cfg = CONFIGS[1] if phase != "speculate" else bench.parse_model(TINY)
    step, make, *_ = bench.PHASES[phase].build(bench.Job(phase, "", cfg, 2, 5, 2), None)
    args = make(weights(cfg), jax.random.key(0))
    paths = list(products(jax.make_jaxpr(step)(*args).jaxpr))
    found = {bench.named_region(path) for path in paths}
    assert found == {"qkv", "attention", "out", "mlp", "unembed"}


@pytest.mark.parametrize("phase, B", [("train", 2), ("generate", 1)])
def test_a_profile_attributes_the_operations_time_to_named_regions(phase, B, optimised, tmp_path):
    cfg = bench.parse_model("L1,E128,H4,K2,D32,F384,V256")
    job = bench.Job(phase, "", cfg, B, 64, 4)
    prepared = bench.prepare(job, init(jax.random.key(0), cfg), 0)
    prepared.call()
    found = bench.profile(prepared, tmp_path)
    assert sum(op["share"] for op in found["operations"]) == pytest.approx(1)
    assert sum(found["kinds"].values()) == pytest.approx(1)
    named = {op["region"]: 0 for op in found["operations"] if op["region"]}
    for op in found["operations"]:  # by number, which no other program's work changes
        if op["region"]:
            named[op["region"]] += op["times"]
    # of a single row's products the compiler drops the names
    assert sum(named.values()) >= 0.94 * sum(op["times"] for op in found["operations"])
    assert named.keys() >= {"qkv", "attention", "out", "mlp", "unembed"} | (
        {"loss", "optimizer"} if phase == "train" else set())
    assert any(op["kind"] == "product" and op["region"] == "mlp" and "product" in op["source"]
               for op in found["operations"])
    assert list(tmp_path.glob("**/perfetto_trace.json.gz"))


def test_what_has_lost_its_name_belongs_where_it_is_used():
    text = """HloModule jit_run

%fused (p.0: f32[4], p.1: f32[4]) -> f32[4] {
  %p.0 = f32[4]{0} parameter(0)
  %p.1 = f32[4]{0} parameter(1)
  %add.1 = f32[4]{0} add(%p.0, %p.1), metadata={op_name="jit(run)/out/add" stack_frame_id=1}
  ROOT %mul.1 = f32[4]{0} multiply(%add.1, %add.1), metadata={op_name="jit(run)/mlp/mul"}
}

ENTRY %main (a: f32[4]) -> (f32[4]) {
  %a = f32[4]{0} parameter(0)
  %dot.1 = f32[4]{0} dot(%a, %a), lhs_contracting_dims={0}
  %fusion.1 = f32[4]{0} fusion(%dot.1, %a), kind=kLoop, calls=%fused, metadata={op_name="jit(run)/mlp/mul"}
  %copy.1 = f32[4]{0} copy(%fusion.1)
  ROOT %tuple.1 = (f32[4]{0}) tuple(%copy.1)
}
"""  # noqa: E501
    found = {op.name: (op.region, op.kind) for op in bench.operations(text)}
    assert found == {"dot.1": ("out", "product"),  # inside the fusion, where its result goes
                     "fusion.1": ("mlp", "elementwise"),
                     "copy.1": ("mlp", "copy")}  # where it came from


def test_a_step_as_fast_as_predicted_stands_on_the_roof():
    jobs = [bench.Job(phase, "", CONFIGS[0], B, 64, 8) for phase in ("train", "prefill", "generate")
            for B in (1, 64)]
    peak, read = LIMITS["flops_per_second"]["float32"], LIMITS["read_bytes_per_second"]
    limits = LIMITS | {"flops_per_second": {"float32": peak}}
    rows = [bench.predicted_row(job, LIMITS) for job in jobs]
    for row in rows:
        row["measured_seconds"] = max(row["flops"] / peak,
                                      (row["weight_bytes"] + row["cache_bytes"]) / read)
    grid = [line[7:] for line in bench.picture(rows, limits).splitlines() if line[5:7] == " |"]
    marks = set("".join(grid)) & set("TPG")
    assert marks == set("TPG")
    for column in itertools.zip_longest(*grid, fillvalue=" "):  # on it, and one cell a column
        assert sum(mark != " " for mark in column) == 1
    for row in rows:
        row["measured_seconds"] *= 10  # a decade below it
    below = [line[7:] for line in bench.picture(rows, limits).splitlines() if line[5:7] == " |"]
    for column in itertools.zip_longest(*below, fillvalue=" "):
        roof = [i for i, mark in enumerate(column) if mark in "/-"]
        assert all(i > roof[0] for i, mark in enumerate(column) if mark in "TPG")


def words_in(picture):
    """Lines of text in an SVG."""
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", picture)]


@pytest.mark.parametrize("name", bench.SKETCHES)
def test_a_picture_in_docs_says_what_the_functions_give_today(name):
    found = words_in((DOCS / f"{name}.svg").read_text())
    sketch = bench.SKETCHES[name]()
    told = [line for *_, text in sketch.notes for line in text.split("\n")] + [
        line for *_, text, _, _ in sketch.boxes for line in text.split("\n")]
    assert len(told) > 5 and any(re.search(r"\d", line) for line in told)
    for line in filter(None, map(str.strip, told)):
        assert line in found, line


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason='pip install ".[plot]"')
def test_pictures_are_drawn_into_files_that_read_alike_each_time(tmp_path):
    files = [tmp_path / f"{i}.svg" for i in range(2)]
    for file in files:
        bench.render(bench.sketch_layer(), file)
    assert files[0].read_text() == files[1].read_text()
    assert sorted(words_in(files[0].read_text())) == sorted(words_in(
        (DOCS / "layer.svg").read_text()))


@settings(max_examples=15)
@given(st.sampled_from(sorted(bench.MODELS)), st.sampled_from([2, 4, 8]), st.integers(1, 64),
       st.sampled_from(["prefill", "generate"]), st.sampled_from([0, 1, 2]))
def test_the_steps_of_a_layer_send_together_what_the_formula_says(name, n, B, phase, ring):
    cfg = replace(bench.MODELS[name], dtype="bfloat16")
    assume(bench.degree(cfg, n) == n)
    T = 128 if phase == "prefill" else 1
    steps = bench.layer_steps(bench.Job(phase, name, cfg, B, T, 0, ring=ring), T, n, 9e10)
    layout = "heads" if cfg.K % n == 0 else "sequence" if B % n else "batch"
    formula = shard.comm_bytes(cfg, phase, B, T, tensor=n, layout=layout, ring=ring)
    assert sum(step["times"] * step["bytes"] for step in steps) == sum(
        size for _, size in formula.values())
    assert sum(step["times"] * number for step in steps
               for number in step["collectives"].values()) == sum(
                   number for number, _ in formula.values())


def test_a_picture_needs_its_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        bench.main(["--plot", str(tmp_path / "x.png")])
    assert 'pip install ".[plot]"' in capsys.readouterr().err


# ------------------------------------------------------------ bench: chips that are not here


SPLIT = "L2,E512,H8,K8,D128,F1024,V1024"  # small, with dimensions that fill a TPU's tiles
CACHES = [  # chip, chips, phase, layout, cache, K, B: each value at least once
    ("tpu-v4", 4, "generate", "heads", "bfloat16", 4, 8),
    ("tpu-v4", 1, "generate", "heads", "int8", 1, 1),
    ("tpu-v5e", 1, "generate", "heads", "float32", 2, 1),
    ("tpu-v5e", 8, "generate", "batch", "bfloat16", 1, 16),
    ("tpu-v5p", 4, "generate", "sequence", "int8", 2, 4),
    ("tpu-v6e", 1, "verify", "heads", "bfloat16", 4, 8),
    ("tpu-v6e", 4, "verify", "sequence", "float32", 8, 2),
    ("h100", 1, "generate", "heads", "bfloat16", 1, 1),
    ("h100", 4, "verify", "batch", "int8", 2, 8),
    ("tpu-v4", 1, "refill", "heads", "float32", 4, 4),
    ("tpu-v5p", 1, "refill", "heads", "int8", 1, 8),
    ("h100", 1, "refill", "heads", "bfloat16", 8, 2)]


def on_chip(phase, model, chip, chips=1, B=8, prompt=240, new=16, dtype="bfloat16", cache=None,
            mesh=None, layout=None, **more):
    cfg = bench.parse_model(model)
    job = bench.Job(phase, model, replace(cfg, dtype="bfloat16" if dtype == "int8" else dtype), B,
                    prompt, new, dtype, cache or dtype, **more)
    return bench.on_chips(job, chip, chips, mesh, layout)


def cached_on_chip(chip, chips, phase, layout, cache, K, B, times):
    """A job whose K arrays take 64 MiB a device, times `times`: more than is prefetched."""
    S = times * chips * (1 << 26) // (B * K * 128 * jnp.dtype(cache).itemsize)
    prompt, new = dict(generate=(S - 4, 4), verify=(S - 3, 0), refill=(256, S - 256))[phase]
    return on_chip(phase, f"L2,E512,H8,K{K},D128,F512,V512", chip, chips, B, prompt, new,
                   cache=cache, layout=layout if chips > 1 else None, n_draft=2)


def fsdp_on_chip(chip, **more):
    return on_chip("train", "L2,E1024,H16,K16,D128,F4096,V8192", chip, 64, B=64, prompt=128, **more)


RINGED = [on_chip("generate", SPLIT, chip, 4, ring=ring) for chip, ring in (
    ("tpu-v4", 1), ("tpu-v5e", 2))]
ITEMISED = [on_chip("generate", SPLIT, "tpu-v5e", 4, dtype="int8", cache="int8"),
            on_chip("prefill", SPLIT + ",untied", "tpu-v4", 1, B=3, prompt=100),
            on_chip("verify", SPLIT, "h100", 2),
            on_chip("train", SPLIT, "tpu-v6e", 8, dtype="float32", mesh={"data": 4, "tensor": 2})]


@pytest.fixture(scope="session")
def compiled():
    """job -> its row, by the chip's compiler, in one process for all; skipped without its extra."""
    rows = {}
    with bench.compilers() as ask:
        def row(job):
            try:
                bench.check_compiler(job.chip)
            except ValueError as error:
                pytest.skip(str(error))
            if job not in rows:
                rows[job] = ask(job)
            return rows[job]

        yield row


@pytest.mark.parametrize("case", CACHES, ids=lambda case: "-".join(map(str, case)))
def test_a_cache_on_a_chip_is_updated_in_place(case, compiled):
    """Twice the slots add less than half of what one K array grows by, the scores of its queries
    apart, and no step copies an array of the cache from memory to memory."""
    jobs = [cached_on_chip(*case, times) for times in (1, 2)]
    once, twice = map(compiled, jobs)
    cache, K, B = case[4:]
    T = {"generate": 1, "verify": 3, "refill": 256}[case[2]]
    S = [bench.PHASES[job.phase].cost(job).S for job in jobs]
    scores = 0 if case[2] == "refill" else 2 * B * 8 * T * (S[1] - S[0]) * 4
    scales = cache == "int8"  # which some chips turn, a thirty-second of what they scale
    assert max(once["copies"], twice["copies"] // 2) <= scales * 2 * 2 * (1 << 26) // 32
    assert twice["temp_bytes"] - once["temp_bytes"] < (1 << 25) + scores
    assert twice["alias_bytes"] - once["alias_bytes"] >= 4 * (1 << 26)


def test_attention_of_32768_tokens_and_its_gradient_fit_1500_MB_of_a_v4_chip(compiled):
    """H = 32, K = 8, D = 128 in bf16; half the tokens take no less than 0.45 of it."""
    job = on_chip("attention", "L1,E4096,H32,K8,D128,F128,V128", "tpu-v4", B=1, prompt=32768)
    whole, half = compiled(job), compiled(job._replace(prompt=16384))
    assert half["temp_bytes"] < whole["temp_bytes"] < min(1.5e9, 2.2 * half["temp_bytes"])
    assert whole["program_flops"] == sum(bench.attention_cost(job).flops.values())
    assert whole["copies"] == 0


def test_a_training_step_on_chips_never_holds_the_logits_of_all_its_tokens(compiled):
    """Of 8,192 tokens a chip they would take 8.6 GB in f32, and their gradient 4.3 in bf16."""
    row = compiled(on_chip("train", "L1,E256,H2,K2,D128,F256,V262144", "tpu-v4", 4, B=16,
                           prompt=2048))
    assert row["temp_bytes"] < 5e9


@pytest.mark.parametrize("job", ITEMISED, ids=lambda job: f"{job.phase}-{job.chip}")
def test_formula_inputs_and_padding_are_the_compilers_argument_bytes(job, compiled):
    row = compiled(job)
    formula, cfg = row["formula"], job.cfg
    assert sum(formula[kind] for kind in ("weights", "cache", "optimizer")) == row["formula_bytes"]
    assert row["formula_bytes"] + row["inputs"] + sum(row["padding"].values()) \
        == row["argument_bytes"]
    norms = (2 * cfg.L + 1) * cfg.E * (4 if job.phase == "train" else 2)
    table = (not cfg.tied) * cfg.V * cfg.E * 2
    n = job.chips
    if job.phase == "train":
        weights = norms + (param_count(cfg) * 4 - norms) // n
        assert formula["weights"] == weights and formula["optimizer"] == 2 * weights
        assert formula["cache"] == 0
    elif job.dtype != "int8":
        assert formula["weights"] == norms + (weight_bytes(cfg, job.dtype) + table - norms) // n
    if job.phase == "generate":
        assert formula["cache"] == kv_bytes(cfg, job.B, 256, job.cache_dtype) // n
    if job.chip == "h100":
        assert row["padding"] == {}


def test_gemma_7b_generates_110_sequences_on_four_v4_chips_and_128_are_refused(compiled):
    job = on_chip("generate", "gemma-7b", "tpu-v4", 4, B=110, prompt=2032)
    row = compiled(job)
    assert row["fits"] and row["copies"] == 0 and row["peak_bytes"] < row["memory_bytes"]
    assert row["formula_bytes"] == sum(row["formula"][kind] for kind in ("weights", "cache"))
    assert row["temp_bytes"] < 0.3e9 and row["alias_bytes"] >= kv_bytes(
        job.cfg, 110, 2048, "bfloat16") // 4
    many = job._replace(B=128)
    needed = weight_bytes(job.cfg, "bfloat16") + kv_bytes(job.cfg, 128, 2048, "bfloat16")
    assert needed > 4 * row["memory_bytes"]
    refused = compiled(many)
    assert refused["fits"] is False and refused["argument_bytes"] is None
    assert refused["needed_bytes"] > refused["memory_bytes"] == row["memory_bytes"]
    assert "exceeds available HBM" in refused["message"] and "cache.k" in refused["largest"][0]


def test_the_picture_of_a_chips_memory_says_what_its_compiler_says(compiled):
    row = bench.chip_row(bench.lecture(), compiled)
    found = words_in((DOCS / "memory.svg").read_text())
    told = [line for *_, text, _, _ in bench.sketch_memory(row).boxes if text
            for line in text.split("\n")]
    assert all(line in found for line in told) and any("cache" in line for line in told)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="drawn with the newest compiler")
@pytest.mark.parametrize("name", bench.timelines())
def test_the_pictures_of_timelines_say_what_the_chips_compiler_says(name, compiled):
    found = " ".join(words_in((DOCS / f"{name}.svg").read_text()))
    for job in bench.timelines()[name]:
        row = bench.chip_row(job, compiled)
        told = re.search(re.escape(row["form"]) + r", .*?a step takes ([\d.]+) (m?s), of it "
                         r"([\d.]+) ([mu]s) waits", found)
        took = [float(told[i]) * {"s": 1, "ms": 1e-3, "us": 1e-6}[told[i + 1]] for i in (1, 3)]
        assert took == pytest.approx([row["compiler_seconds"], row["regions"]["transfers"]],
                                     rel=0.05)
        told = re.search(r"([\d,]+) of ([\d,]+) gathers", README)
        if job.flags:
            sent = row["collectives"]["all_gather"]
            assert [sent["asynchronous"], sent["number"]] == pytest.approx(
                [int(n.replace(",", "")) for n in told.groups()], rel=0.05)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the newest compiler's")
def test_what_the_readme_says_of_compilers_in_passing_is_what_they_say(compiled):
    said = " ".join(README.split())
    most = int(re.search(r"asks the v4's own compiler what fits: (\d+) rows", said)[1])
    job = bench.lecture()
    assert [compiled(job._replace(B=B))["fits"] for B in (most, most + 1)] == [True, False]
    row = compiled(on_chip("generate", "llama-3-8b", "tpu-v5e", 8, prompt=2032))
    step, links, held, of = map(float, re.search(
        r"compiler: (\S+) ms a step, of which (\S+) us are links, and (\S+) of (\S+) GB",
        said).groups())
    assert [row["compiler_seconds"], row["regions"]["transfers"], row["peak_bytes"],
            row["memory_bytes"]] == pytest.approx(
                [step / 1e3, links / 1e6, held * 1e9, of * 1e9], rel=0.05)


def test_the_readmes_row_of_four_v4_chips_is_what_their_compiler_says(compiled, capsys):
    def unwrapped(text):
        return re.sub(r"\n {12}", " ", text.strip()).splitlines()

    shown = unwrapped(re.search(r"```\n(generate over heads: gemma-7b.*?)```", README, re.S)[1])
    job = on_chip("generate", "gemma-7b", "tpu-v4", 4, B=110, prompt=2032)
    row = bench.chip_row(job, compiled) | {"form": bench.form_name(job)}
    bench.print_chip_row(row)
    said = unwrapped(capsys.readouterr().out)
    for ours, theirs in zip(said, shown, strict=True):  # versions differ, and so may their cycles
        assert ours == theirs or ours.split()[0] in ("program", "time")
    told = float(re.search(r"time +([\d.]+) ms", shown[-1])[1])
    assert row["compiler_seconds"] * 1e3 == pytest.approx(told, rel=0.05)


@pytest.mark.parametrize("chip", ["tpu-v4", "tpu-v5p"])
def test_fsdp_on_a_torus_of_chips_sends_the_formula_and_adds_up_no_whole_weight(chip, compiled):
    job = fsdp_on_chip(chip)
    assert dict(job.mesh) == {"data": (4, 4, 4), "tensor": 1}
    formula = shard.comm_bytes(job.cfg, "train", job.B, job.prompt, (4, 4, 4), 1)
    sent = compiled(job)["collectives"]
    for kind in ("all_gather", "reduce_scatter"):
        assert (sent[kind]["number"], sent[kind]["bytes"]) == formula[kind]
    smallest = min(minillm.size_of(name, job.cfg) * 2
                   for name in jax.tree.leaves(dims(job.cfg).layers[0]) if " " in name)
    assert sent["all_reduce"]["bytes"] < smallest
    assert sent["all_gather"]["asynchronous"] == 0
    with_flags = compiled(job._replace(flags=True))
    flagged = with_flags["collectives"]
    for kind in ("all_gather", "reduce_scatter"):
        assert (flagged[kind]["number"], flagged[kind]["bytes"]) == formula[kind]
    if chip == "tpu-v4" or with_flags["flags"] == list(bench.FLAGS):  # else it refused some
        assert flagged["all_gather"]["asynchronous"] > 0


@pytest.mark.parametrize("job", RINGED, ids=lambda job: f"{job.chip}-{job.ring}")
def test_a_ring_on_a_chip_is_asynchronous_with_a_product_between_start_and_done(job, compiled):
    row, n = compiled(job), job.chips
    formula, sent = shard.tally(bench.sent(job)), row["collectives"]["permute"]
    assert (sent["number"], sent["bytes"]) == formula["permute"]
    assert sent["number"] == sent["asynchronous"] == 4 * job.cfg.L * (n - 1) * job.ring \
        + (n - 1) * job.ring
    products = [op for op in row["schedule"] if op.kind == "product" and op.times]
    trips = [op for op in row["schedule"] if op.kind == "permute" and op.times]
    beside = [any(trip.start <= op.start and op.end <= trip.done for op in products)
              for trip in trips]
    # of a scatter's ring one may go alone: what it brings is added to a product made before
    assert len(trips) == sent["number"] and len(trips) - sum(beside) <= 2 * job.cfg.L


def test_ring_attention_on_a_chip_looks_at_one_part_while_the_next_one_travels(compiled):
    job = on_chip("prefill", SPLIT, "tpu-v5p", 4, B=1, prompt=4096, cache="int8",
                  mesh={"tensor": 4}, layout="context")
    row = compiled(job)
    formula, sent = shard.tally(bench.sent(job)), row["collectives"]
    assert (sent["permute"]["number"], sent["permute"]["bytes"]) == formula["permute"]
    assert sent["permute"]["asynchronous"] == sent["permute"]["number"] == 4 * job.cfg.L * 3
    assert row["beside"]["attention"] > 0 and row["fits"]


@pytest.mark.parametrize("layout", ["batch", "sequence"])
def test_few_key_heads_on_a_plane_of_chips_send_the_formula_and_no_whole_sum(layout, compiled):
    """Of 16 chips 8 share out the key heads, and 2 the rows or slots of each; the same sums over
    all 16 at once become all-reduces."""
    model = "L2,E2048,H16,K8,D128,F4096,V4096,untied"
    job = on_chip("generate", model, "tpu-v5e", 16, B=8, dtype="int8", layout=layout)
    assert dict(job.mesh) == {"tensor": (8, 2)}
    row, formula = compiled(job), shard.tally(bench.sent(job))
    sent = row["collectives"]
    for kind in ("all_gather", "reduce_scatter", "all_to_all"):
        assert (kind in sent) == (kind in formula)
        # of a few kB, a sum is kept whole
        assert kind not in sent or 0 <= formula[kind][1] - sent[kind]["bytes"] <= 6144
    assert row["copies"] == 0 and sent["all_reduce"]["bytes"] < 2e4


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the table is the newest compiler's")
@pytest.mark.parametrize("i", range(4))
def test_a_million_tokens_are_read_by_chips_and_go_on_as_the_readmes_table_says(i, compiled):
    table = re.search(r"\| 1,048,576 tokens \|.*?\n\n", README, re.S)[0].splitlines()[2:]
    phase, chips, mesh, held, peak, planned, took = (
        cell.strip() for cell in table[i].strip("|").split("|"))
    where = {"tensor": tuple(map(int, mesh.split("x"))) if "x" in mesh else int(mesh)}
    job = on_chip(phase, "llama-3-8b", "tpu-v5p", int(chips.split()[0]), B=1, cache="int8",
                  prompt=2 ** 20 - 16 * (phase == "generate"),
                  **dict(mesh=where, layout="context") if where["tensor"] != 1 else {})
    row = bench.chip_row(job, compiled)
    assert row["fits"] and held == bench.si(row["formula_bytes"], "B")
    assert planned == bench.si(row["predicted_seconds"], "s")
    digits = {name: float(text.split()[0]) * {"G": 1e9, "m": 1e-3, "s": 1}[text.split()[1][0]]
              for name, text in (("peak_bytes", peak), ("compiler_seconds", took))}
    assert row["peak_bytes"] == pytest.approx(digits["peak_bytes"], rel=0.05)
    assert row["compiler_seconds"] == pytest.approx(digits["compiler_seconds"], rel=0.1)


@pytest.mark.parametrize("phase", ["train", "prefill", "generate", "verify"])
def test_the_same_program_multiplies_the_same_on_every_chip(phase, compiled):
    """Seen here and on two chips; on several the parts of all make the whole."""
    job = on_chip(phase, SPLIT, "tpu-v5e", B=4, prompt=64)
    here = bench.PHASES[phase].build(job._replace(chip=""), None)
    args = jax.eval_shape(here.make, bench.abstract(job), jax.random.key(0))
    flops = traced_flops(here.step, *args)
    flops //= job.new if phase == "generate" else 1  # of a step
    assert compiled(job)["program_flops"] == flops
    assert compiled(on_chip(phase, SPLIT, "h100", B=4, prompt=64))["program_flops"] == flops
    split = compiled(on_chip(phase, SPLIT, "tpu-v5e", 4, B=4, prompt=64, mesh={"data": 4} if
                             phase == "train" else None))["program_flops"]
    assert split == flops or phase == "train" and split > flops  # layers are computed again


@pytest.mark.parametrize("name", list(bench.TARGETS))
def test_every_slice_resolves_and_another_number_names_the_nearest(name):
    shapes = bench.TARGETS[name].slices.split()
    assert [bench.slice_of(name, bench.chips_of(shape)) for shape in shapes] == shapes
    assert bench.slice_of(name, 1) == shapes[0]
    check(lambda: bench.slice_of(name, 6), name, "6 chips", "--chips 4", "or 8")
    check(lambda: bench.slice_of(name, 5000), "5000 chips", shapes[-1])


@given(shape=st.sampled_from("2x2x1 2x2x4 4x4x4 4x4x8 2x4 4x8".split()), i=st.integers(0, 7))
def test_tensor_takes_the_last_axes_of_a_torus_and_data_what_is_left(shape, i):
    n = bench.chips_of(shape)
    tensor = min(2 ** i, n)
    data = bench.torus_axes(shape, tensor)
    assert math.prod(data if isinstance(data, tuple) else (data,)) * tensor == n
    if tensor == 1:
        assert data == tuple(int(size) for size in shape.split("x") if size != "1")
    check(lambda: bench.torus_axes(shape, 2 * n), shape, "tensor")


def test_what_no_chip_can_do_is_refused_by_name(monkeypatch):
    few = SPLIT.replace("K8", "K2")
    check(lambda: on_chip("generate", SPLIT, "tpu-v5e", 8, mesh={"data": 3, "tensor": 2}),
          "'data': 3", "8 devices")
    check(lambda: on_chip("generate", SPLIT, "tpu-v5e", 8, mesh={"pipe": 8}), "pipe", "tensor")
    check(lambda: on_chip("generate", few, "tpu-v5e", 8, B=16, layout="heads"), "'heads'", "K=2",
          "batch or sequence")
    assert on_chip("generate", few, "tpu-v5e", 8, B=16).layout == "batch"
    assert on_chip("generate", few, "tpu-v5e", 8, B=1).layout == "sequence"
    check(lambda: bench.check_compiler("1,2,3,4"), "1,2,3,4", "tpu-v4", "h100")
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    for name, target in bench.TARGETS.items():
        check(lambda: bench.check_compiler(name), name, f'pip install ".[{target.extra}]"')
    monkeypatch.setattr(bench.platform, "machine", lambda: "arm64")
    check(lambda: bench.check_compiler("tpu-v4"), "Linux", "x86-64")


def test_a_compiler_that_fails_says_why_in_its_own_words(compiled, monkeypatch):
    compiled(RINGED[0])  # or skipped
    with bench.compilers() as ask:
        odd = RINGED[0]._replace(cfg=replace(RINGED[0].cfg, H=6, K=6))
        check(lambda: ask(odd), "tpu-v4: its compiler", "H=6 cannot be split over 4 devices")
        assert ask(RINGED[0])["fits"]  # and goes on
    monkeypatch.setattr(bench, "COMPILERS", {"PYTHONSTARTUP": "", "PATH": "", "PYTHONHOME": "/no"})
    with bench.compilers() as ask:
        check(lambda: ask(RINGED[0]), "tpu-v4: its compiler ended")


def test_a_phase_on_chips_prints_what_was_predicted_and_what_was_compiled(compiled, capsys,
                                                                          tmp_path):
    compiled(RINGED[0])
    argv = ["generate", "--model", SPLIT, "--chip", "tpu-v4", "--chips", 4, "--batch", 8,
            "--prompt", 240, "--new", 16, "--dtype", "bfloat16", "--ring", "0,1"]
    with_picture = importlib.util.find_spec("matplotlib") is not None
    result, out = result_of(capsys, *argv, *(
        ["--timeline", tmp_path / "line.svg"] if with_picture else []))
    reference, ring = result["rows"]
    told = {**compiled(RINGED[0])}
    assert {key: ring[key] for key in told if key not in ("compile_seconds", "schedule")} \
        == {key: told[key] for key in told if key not in ("compile_seconds", "schedule")}
    assert (ring["slice"], ring["mesh"], ring["layout"], ring["ring"]) == (
        "v4 2x2x1", {"tensor": 4}, "heads", 1)
    assert reference["collectives"].keys() == {"all_gather", "reduce_scatter", "all_reduce"}
    assert sum(reference["regions"].values()) == pytest.approx(reference["compiler_seconds"])
    assert 0 <= reference["unestimated"] < 0.05 and "measured_seconds" not in reference
    assert reference["compiler_seconds"] >= reference["hbm_bytes"] / bench.CHIPS["tpu-v4"].read
    assert "nothing is measured" in out and "libtpu" in out and "v4 2x2x1" in out
    if with_picture:
        drawn = (tmp_path / "line.svg").read_text()
        assert drawn.count("transfers") >= 2 or drawn.count("<g id=\"axes_") == 2


def test_a_plan_is_checked_by_the_chips_compiler(compiled, capsys):
    """Of a model that fills a v5e with few sequences; fewer chips than the plan says do not hold a
    million tokens."""
    compiled(ITEMISED[0])
    result, out = result_of(capsys, "plan", "--model", "L4,E512,H8,K8,D128,F1024,V1024", "--chip",
                            "tpu-v5e", "--chips", 4, "--context", 300_000, "--compile")
    checked, planned = result["compiled"], result["max_batch"]
    assert 0.8 * planned <= checked["max_batch"] <= 1.1 * planned + 1
    assert [way["fits"] for way in checked["million"]] == [True] * len(result["million"])
    for way, plan in zip(checked["million"], result["million"], strict=True):
        assert way["way"] == plan["way"] and way["chips"] >= plan["chips_needed"]
    assert f"compiler accepts is {checked['max_batch']}" in out


def test_tiles_and_memory_spaces_are_read_from_a_layout():
    def read(shape):
        return [tuple(a) for a in bench.arrays(shape)]

    assert read("bf16[110,4,2048,256]{3,1,2,0:T(4,128)(2,1)}") == [
        (461373440, 461373440, True)]
    assert read("f32[110,256000]{1,0:T(8,128)S(1)}") == [(112640000, 112 * 256000 * 4, False)]
    assert read("(s32[]{:T(128)}, pred[3,5]{0,1}, token[])") == [(4, 512, True), (15, 15, True)]
    assert read("bf16[500,48]{0,1:T(8,128)(2,1)}") == [(48000, 48 * 512 * 2, True)]


HIDDEN = """HloModule jit_step, is_scheduled=true

%cond (c: (s32[], f32[1000000])) -> pred[] {
  %c = (s32[], f32[1000000]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%fused (p: f32[1000000]) -> f32[1000] {
  %p = f32[1000000]{0} parameter(0)
  ROOT %part = f32[1000]{0} dynamic-slice(%p), dynamic_slice_sizes={1000}
}

%body (b: (s32[], f32[1000000])) -> (s32[], f32[1000000]) {
  %b = (s32[], f32[1000000]{0}) parameter(0)
  %x = f32[1000000]{0} get-tuple-element(%b), index=1
  %start = (f32[1000000]{0}, f32[4000000]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, metadata={op_name="step/mlp/gather"}
  %work = f32[1000000]{0} multiply(%x, %x), metadata={op_name="step/mlp/mul"}, backend_config={"estimated_cycles":"4000"}
  %done = f32[4000000]{0} all-gather-done(%start)
  %slow = f32[1000]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="step/qkv/slice"}
  %sum = f32[1000000]{0} all-reduce(%work), replica_groups=mesh['data'=2,'tensor'=2] {'tensor'}, metadata={op_name="step/out/psum"}
  ROOT %next = (s32[], f32[1000000]{0}) tuple(%x, %sum)
}

ENTRY %main (a: f32[1000000]) -> f32[1000000] {
  %a = f32[1000000]{0} parameter(0)
  %loop = (s32[], f32[1000000]{0}) while(%a), condition=%cond, body=%body
  ROOT %out = f32[1000000]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_schedule_hides_what_runs_beside_and_multiplies_loops_out():
    """At 1e9 cycles, 4e12 bytes and 1e9 link bytes a second, both ways: the gather among four sends
    12 MB around a ring in 12.002 ms, of which 4 us of work hide what they last; the sum's 4 MB go
    one way between two, in 8.002, and wait whole."""
    target = bench.Target("tpu", "", "", clock=1e9, flops=1e12, read=4e12, link=1e9)
    ops = {op.name: op for op in bench.operations(HIDDEN, target=target)}
    assert set(ops) == {"start", "work", "slow", "sum"}
    assert all(op.times == 3 for op in ops.values())
    gather, total = ops["start"], ops["sum"]
    assert (gather.kind, gather.sent, gather.asynchronous) == ("all_gather", 12_000_000, True)
    assert gather.end - gather.start == pytest.approx(12.002e-3)
    assert gather.waited == pytest.approx(12.002e-3 - 4e-6) and gather.done == gather.end
    assert (total.kind, total.sent, total.asynchronous) == ("all_reduce", 4_000_000, False)
    assert total.waited == pytest.approx(8.002e-3)
    assert (ops["slow"].read, ops["slow"].written) == (4000, 4000)  # of what it slices, a part
    assert not ops["work"].asynchronous and ops["work"].end - ops["work"].start == 4e-6
    assert bench.collectives(ops.values()) == {
        "all_gather": {"number": 3, "bytes": 36_000_000, "asynchronous": 3},
        "all_reduce": {"number": 3, "bytes": 12_000_000, "asynchronous": 0}}
    told = bench.step_seconds(ops.values(), 4e12)
    assert told["compiler_seconds"] == pytest.approx(3 * (12.002e-3 + 8.002e-3 + 8000 / 4e12))
    assert told["regions"]["mlp"] == pytest.approx(3 * 4e-6)
    step = bench.operations(HIDDEN, bench.Job("generate", "", None, 1, 1, 3), target)
    assert {op.times for op in step} == {1}  # a step is a trip


# ---------------------------------------------------------------------------------------- README


def test_the_readmes_python_runs_and_its_asserts_hold(beside):
    beside["README"]()


def test_the_readmes_plans_are_what_the_command_prints(capsys):
    shown = re.findall(r"```sh\npython bench\.py (plan [^\n]*)\n```\n\n```\n(.*?)```", README, re.S)
    assert len(shown) == 2
    for command, expected in shown:
        assert expected in result_of(capsys, *shlex.split(command))[1]


def test_freed_memory_is_kept():
    """A second 64 MB is had without asking the kernel for a page."""
    source = """
import resource, bench, numpy as np
kept = bench.keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(64 << 20, 1, np.int8)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", source], text=True, capture_output=True,
                          cwd=pathlib.Path(bench.__file__).parent)
    assert done.returncode == 0, done.stderr
    kept, faults = map(int, done.stdout.split())
    assert kept == (bench.platform.libc_ver()[0] == "glibc") and (faults < 8 or not kept)


def test_the_default_runs_table_is_predicted_from_its_ceilings(capsys):
    told = re.search(r"^ceilings: (.*), reading (.*) GB/s$", RUN, re.M)
    limits = {"flops_per_second": {
        part.split()[0]: float(part.split()[1]) * 1e9 for part in told[1].split(", ")},
        "read_bytes_per_second": float(told[2]) * 1e9}
    table = RUN[RUN.index("\nphase "):].split("\n\n")[0].splitlines()[2:]
    shown = [line for line in table if line.split()[0] in bench.PHASES]
    jobs = bench.jobs_of(bench.parse([]))
    assert len(jobs) == len(shown) > 20
    given = [column for column in bench.RUN if not column.wide]
    given = given[:[column.head for column in given].index("predict")]
    capsys.readouterr()
    bench.print_table(given, [bench.predicted_row(job, limits) for job in jobs], heads=False)
    for job, ours, line in zip(jobs, capsys.readouterr().out.splitlines(), shown, strict=True):
        assert line.startswith(ours)
        took, unit = line[len(ours):].split()[:2]  # ceilings are printed with three digits
        assert float(took) * {"s": 1, "ms": 1e-3, "us": 1e-6}[unit] == pytest.approx(
            bench.predicted_row(job, limits)["predicted_seconds"], rel=0.011)


def needed_by(name, defined, found):
    """Names of this project that a function's text needs, its neighbours' included."""
    nodes = [*ast.walk(defined[name])]
    own = {node.arg for node in nodes if isinstance(node, ast.arg)} | {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        other = node.id if isinstance(node, ast.Name) else ""
        if other in defined.keys() - own - found:
            found.add(other)
            needed_by(other, defined, found)
    return found


BODIES = [ast.parse(inspect.getsource(module)).body for module in (minillm, infer, shard)]


def definitions():
    """Top-level names of the libraries -> their node."""
    defined = {}
    for body in BODIES:
        for node in body:
            names = [node.name] if hasattr(node, "name") else [
                target.id for each in getattr(node, "targets", []) for target in ast.walk(each)
                if isinstance(target, ast.Name)]
            defined |= dict.fromkeys(names, node)
    return defined


def copied(name):
    """What a function becomes in a file of its own: with its neighbours, the imports of each file
    that something comes from, and lines such as `NAME.defvjp(..)`."""
    defined, needed, more, lines = definitions(), set(), {name, "F32"}, []
    gradients = {node.value.func.value.id: node for body in BODIES for node in body if isinstance(
        node, ast.Expr) and isinstance(node.value, ast.Call)}
    defined = {**defined, **{f"{name}.defvjp": node for name, node in gradients.items()}}
    while more - needed:
        needed |= more
        more = needed.union(*(needed_by(other, defined, set()) for other in needed))
        more |= {f"{other}.defvjp" for other in more & gradients.keys()}
    for body in BODIES:
        own = [node for node in body if any(node is defined[other] for other in needed)]
        imports = [node for node in body if isinstance(node, ast.Import) or isinstance(
            node, ast.ImportFrom) and node.module not in ("minillm", "infer")]
        lines += [ast.unparse(node) for node in (imports + own if own else ())]
    space = {"__name__": "alone"}
    exec("\n".join(lines), space)
    return space[name]


def test_three_functions_run_in_files_of_their_own():
    slots, new = jnp.zeros((1, 1, 4, 2)), jnp.ones((1, 1, 1, 2))
    assert same(copied("write")(slots, new, jnp.array([[2]])),
                infer.write(slots, new, jnp.array([[2]])))
    q, k, v = normals((2, 9, 4, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    assert same(jax.jit(copied("causal_attention"))(q, k, v), jax.jit(causal_attention)(q, k, v))
    x, w = normals((2, 3, 8), (16, 8))
    last = jax.P(None, None, "tensor")
    close(jax.shard_map(copied("matmul_scatter_ring"), mesh=shard.make_mesh(tensor=4), in_specs=(
        last, jax.P(None, "tensor")), out_specs=last)(x, w), x @ w.T)


def test_a_function_that_is_copied_takes_along_what_the_readmes_table_says():
    defined = definitions()
    table = README[README.index("| function | takes |"):].split("\n\n")[0]
    rows = [[re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:3]]
            for line in table.splitlines()[3:] if line.startswith("| `")]
    listed = {name: {*left, *right, f"{name}_forward", f"{name}_backward"}
              for left, right in rows for name in left}
    assert len(listed) > 20
    for name in listed.keys() - {"prefill", "extend", "generate"}:  # take the files
        taken, more = set(), {name, "F32"}
        while more - taken:
            taken |= more
            more = set().union(*(listed.get(other, ()) for other in taken))
        assert needed_by(name, defined, set()) <= taken, name


def test_what_the_readme_names_is_there():
    names = re.findall(r"`(minillm|infer|shard|bench)\.(\w+)`", README)
    assert len(names) > 10
    for module, name in names:
        assert name == "py" or hasattr(sys.modules[module], name), name
    tests = re.findall(r"`(test_\w+)`", README)
    assert len(tests) > 5 and set(tests) <= set(globals())
    assert all(name in README for name in bench.MODELS)
    for line in re.findall(r"^python bench\.py (.*?)(?: *#.*)?$", README, re.M):
        bench.parse(shlex.split(line))
    for picture in re.findall(r"\]\((docs/[^)]*)\)", README):
        assert (DOCS.parent / picture).exists(), picture


def test_every_commands_help_shows_an_example_that_it_takes_and_lists_what_it_takes(capsys):
    for name, (does, shown, options, _) in bench.COMMANDS.items():
        assert bench.parse([name, *shlex.split(shown)]).phase == name
        with pytest.raises(SystemExit):
            bench.parse([name, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert does in told and shown in told
        assert all(f"--{option}" in told for option in options
                   if bench.OPTIONS[option]["help"] != bench.argparse.SUPPRESS)


def test_the_readme_is_a_course_of_2000_words_with_tables_that_fit():
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert len(" ".join(prose).split()) <= 2000
    rows = [line for line in README.splitlines() if len(line) > 70 and line in RUN.splitlines()
            and line.split()[0] in bench.PHASES]
    assert 5 <= len(rows) <= 10 and all(len(line) <= 100 for line in rows)


def test_the_lectures_figures_are_printed_by_the_commands_beside_them(capsys):
    """Those of a plan; a chip's compiler's stand in tests of their own."""
    commands = re.findall(r"^python bench\.py (plan .*?) +# (\d)$", README, re.M)
    printed = {number: result_of(capsys, *shlex.split(command))[1] for command, number in commands}
    table = README[README.index("| the lecture says |"):].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 15 and len(printed) == 2
    checked = 0
    for line in table:
        *_, figure, number = (cell.strip() for cell in line.strip("|").split("|"))
        if number == "`bench.py`":
            assert all(found in RUN for found in re.findall(r"\d\.\d+", figure))
        if number[0] in printed:
            for found in re.findall(r"[\d.,]*\d(?: [kMGTP]?(?:B|FLOP)| [mu]?s)?\b", figure):
                assert found in printed[number[0]], (line, found)
                checked += 1
    assert checked > 15
