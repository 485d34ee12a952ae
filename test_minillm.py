"""Theorems about minillm: a test is a sentence, and hypothesis looks for what would refute it.

Everything is f32. f32 rounds at 6e-8 of a value; a logit of order 1 passes some hundred roundings,
in an order that differs between two ways to the same number, so TOLERANCE is 2e-5.
"""
import concurrent.futures
import contextlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # also where a chip's compiler is installed, or a GPU

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bench
import infer
import minillm
import shard
from infer import (GREEDY, HERE, Q8, Q8A8, Sampling, accept, acceptance, decode_bytes,
                   decode_flops, extend, generate, generate_reference, init_cache, kv_bytes, load,
                   load_state, log_probs, model_draft, ngram_draft, prefill, prefill_flops,
                   quantize, quantize_params, resize, sample, save, save_state, serve, speculate,
                   weight_bytes)
from minillm import (KEEPABLE, Adam, Config, adam_init, adamw, attention, block, cast,
                     causal_attention, dims, dot, forward, forward_flops, init, lookup, loss,
                     matmul, param_count, rope, rotary, traced_flops, train_flops, train_step,
                     unembed)

os.environ.update(bench.COMPILERS)
jax.config.update("jax_disable_most_optimizations", True)  # compiles faster, computes the same
jax.config.update("jax_num_cpu_devices", 8)  # for shard.py; the others use the first
if jax.__version_info__ < (0, 11):  # compiles faster still; later ones do not know it
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                               + " --xla_cpu_use_fusion_emitters=false")
settings.register_profile("minillm", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "minillm"))
TOLERANCE = 2e-5
SLOTS = 24

CONFIGS = [
    Config(L=2, E=16, H=4, K=2, D=8, F=24, V=31),
    Config(L=2, E=16, H=4, K=1, D=4, F=20, V=17, tied=False, qk_norm=True),
    Config(L=1, E=12, H=3, K=3, D=4, F=16, V=13, rope_base=100.0),
    Config(L=2, E=15, H=6, K=2, D=2, F=7, V=11, eps=1e-5),
    Config(L=1, E=8, H=2, K=1, D=6, F=12, V=19, act="gelu", embed_scale=True),
]
grouped = CONFIGS[0]

forward_jit = jax.jit(forward, static_argnames="cfg")
extend_jit = jax.jit(extend, static_argnames="cfg")
prefill_jit = jax.jit(prefill, static_argnames="cfg")
STATIC = ("n", "cfg", "sampling", "end", "where")
generate_jit = jax.jit(generate, static_argnames=STATIC)
speculate_jit = jax.jit(speculate, static_argnames=(*STATIC, "draft", "n_draft"))
accept_jit, acceptance_jit = jax.jit(accept), jax.jit(acceptance)
reference_jit = jax.jit(generate_reference, static_argnames=("n", "cfg"))
loss_jit = jax.jit(loss, static_argnames="cfg")
attention_jit, causal_jit = jax.jit(attention), jax.jit(causal_attention)


README = pathlib.Path(__file__).with_name("README.md").read_text()
DOCS = pathlib.Path(__file__).with_name("docs")
RUN = (DOCS / "run.md").read_text()  # a default run's output
TWO_PROCESSES = """
import multiprocessing, socket, sys
from functools import partial

def train(address, i, n, folder):
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, n, i)
    import bench, infer, shard
    from minillm import Config, adam_init, init
    bench.measure_flops, bench.measure_read = lambda dtype: 1e15, lambda: 1e15
    assert jax.device_count() == 2 * n
    bench.main("train --model L1,E32,H4,K4,D8,F48,V64 --batch 4 --prompt 6 --devices 4 --mesh "
               "data=2,tensor=2 --ring 1 --json rows.json".split())
    if not folder:
        return
    cfg = Config(L=1, E=16, H=4, K=4, D=4, F=24, V=32, act="gelu", embed_scale=True)
    shardings = partial(shard.shardings, mesh=shard.make_mesh(tensor=2 * n), rules=shard.TENSOR)
    params = jax.jit(init, static_argnums=1, out_shardings=shardings(cfg))(jax.random.key(0), cfg)
    for _ in range(2):  # once into an empty folder, once over an earlier model
        infer.save(folder, cfg, params)
        infer.save_state(folder, cfg, params, adam_init(params))
    for loaded in (infer.load(folder, shardings=shardings), infer.load_state(folder, shardings)):
        assert loaded[0] == cfg
        for a, b in zip(*map(jax.tree.leaves, (loaded[1], params))):
            assert a.sharding == b.sharding and all(
                (x.data == y.data).all()
                for x, y in zip(a.addressable_shards, b.addressable_shards))

if __name__ == "__main__":
    from concurrent.futures import ProcessPoolExecutor
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    n, folder = int(sys.argv[1]), sys.argv[2]
    with ProcessPoolExecutor(n, multiprocessing.get_context("fork")) as pool:
        list(pool.map(train, [address] * n, range(n), [n] * n, [folder] * n))
"""


@pytest.fixture(scope="session", autouse=True)
def halves(request):
    """Compiling takes one core: where all tests run, those of several devices and of bench run in a
    second process, which takes the same arguments. The last line of its report stands at the end.
    """
    items, second = request.session.items, "MINILLM_SECOND_HALF" in os.environ
    middle = next((i for i, item in enumerate(items) if "a_ring_is_its_reference" in item.name), 0)
    if len(items) < 400 or not middle:
        yield
        return
    items[:] = [items[0], *items[middle:]] if second else items[:middle]
    if second:
        yield
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *request.config.invocation_params.args], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=request.config.rootpath,
        env={**os.environ, "MINILLM_SECOND_HALF": "1"})
    yield
    report, _ = process.communicate()
    *_, summary = report.strip().splitlines()
    plugins = request.config.pluginmanager
    with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
        plugins.get_plugin("terminalreporter").write_line(f"\nsecond process: {summary}")
    assert process.returncode == 0, report


@pytest.fixture(scope="session", autouse=True)
def beside(halves, request, tmp_path_factory):
    """What takes processes of its own: begun at once, one after the other beside all other tests;
    each value waits for its end and gives its output."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    with_files = [text for text in snippets if text.startswith('# pip install ".[hf]"')]
    assert len(with_files) == 2 and len(snippets) > 10
    each = "import sys\nfor source in sys.argv[1:]:\n    exec(source, {})"
    folder = tmp_path_factory.mktemp("beside")
    saved = folder / "saved" if importlib.util.find_spec("safetensors") else ""
    commands = {"README": ["-c", each, *(text for text in snippets if text not in with_files)],
                "files": ["-c", each, *with_files], "two": ["-c", TWO_PROCESSES, "2", str(saved)]}
    asked = " ".join(item.nodeid for item in request.session.items)
    for name, test in (("README", "readmes_python"), ("files", "recipes_with_files"),
                       ("two", "two_processes")):
        if test not in asked:
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


HAS_FILES = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None,
                               reason='pip install ".[hf]"')


def files(test):
    """A test of files of weights: it runs where the extra hf is installed."""
    return pytest.mark.files(HAS_FILES(test))


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


def check(call, *words):
    """One ValueError of one line, naming each of the words."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def same(a, b):
    """Are two trees equal, bit for bit?"""
    return all(x.dtype == y.dtype and np.array_equal(x, y)
               for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def memory(fn, *args, **options):
    """fn, shapes -> the compiler's analysis of the memory of `fn(*args)`, which does not run."""
    return jax.jit(fn, **options).lower(*args).compile().memory_analysis()


# ----------------------------------------------------------------------------------- minillm: flops

partial_jit, merge_jit = jax.jit(minillm.partial_attention), jax.jit(minillm.merge)
quantize_jit, adamw_jit = jax.jit(quantize, static_argnums=1), jax.jit(adamw)


def doubles(*arrays):
    return [np.asarray(a, float) for a in arrays]


@partial(jax.jit, static_argnums=0)
def output_and_gradient(fn, dy, *args):
    out, back = jax.vjp(fn, *args)
    return out, *back(dy)


@pytest.mark.parametrize("cfg, B, T", [
    *[(cfg, 2, 131) for cfg in CONFIGS], (replace(CONFIGS[1], dtype="bfloat16"), 3, 1)], ids=repr)
def test_forward_and_its_gradient_multiply_what_the_formulas_say(cfg, B, T):
    """131 tokens are two blocks, of which the second is padded."""
    params, tokens = abstract(cfg), shaped(B, T + 1)
    masters = abstract(replace(cfg, dtype="float32"))
    assert traced_flops(partial(forward, cfg=cfg), params, shaped(B, T)) \
        == sum(forward_flops(cfg, B, T).values())
    assert traced_flops(partial(train_step, cfg=cfg, lr=1e-3), masters,
                        jax.eval_shape(adam_init, masters), tokens) \
        == sum(train_flops(cfg, B, T).values())
    for keep in [(), *zip(KEEPABLE), KEEPABLE[:2], KEEPABLE]:
        remat = jax.checkpoint(block, static_argnums=(3, 4), policy=(
            jax.checkpoint_policies.save_only_these_names(*keep)))
        assert traced_flops(jax.grad(partial(loss, cfg=cfg, block=remat)), params, tokens) \
            == sum(train_flops(cfg, B, T, keep).values()), keep


@partial(jax.jit, static_argnames=("fn", "cfg", "chunks"))
def scaled_gradient(fn, params, tokens, scale, **static):
    return jax.value_and_grad(lambda params: scale * fn(params, tokens, **static))(params)


def plain_loss(params, tokens, cfg):
    """From all logits at once, with the compiler's gradient of them."""
    logp = jax.nn.log_softmax(forward(params, tokens[:, :-1], cfg))
    return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], 2))


@pytest.mark.parametrize("cfg, chunks", [(CONFIGS[4], 1), (CONFIGS[4], 20), (CONFIGS[1], 4)])
@given(st.floats(-3, 3, width=32), st.integers(0, 99))
def test_a_loss_in_chunks_is_the_loss_and_so_is_its_gradient(cfg, chunks, scale, seed):
    """Of 14 tokens: the last of 4 chunks is padded, and of 20 chunks six have no token."""
    args = weights(cfg, seed % 5), draw_tokens(cfg, 2, 8, seed=seed), scale
    jax.tree.map(close, scaled_gradient(loss, *args, cfg=cfg, chunks=chunks),
                 scaled_gradient(plain_loss, *args, cfg=cfg))


def test_a_loss_in_chunks_stores_the_logits_of_one_chunk():
    """The logits of 8,192 tokens over a vocabulary of 32,768 take 2**30 bytes in float32, and so
    does their gradient. 16 chunks take a 16th of both; the rest is the same within 1%."""
    cfg = Config(L=1, E=32, H=2, K=1, D=16, F=32, V=2 ** 15)
    whole, chunked = (memory(
        jax.value_and_grad(partial(loss, cfg=cfg, chunks=chunks)), abstract(cfg),
        shaped(64, 129)).temp_size_in_bytes for chunks in (1, 16))
    assert abs(whole - chunked - 2 ** 31 * 15 / 16) < 2 ** 31 / 100


@pytest.mark.parametrize("cfg", CONFIGS, ids=repr)
@given(st.integers(1, 4), st.integers(1, 5000))
def test_training_costs_6BP_of_the_weights_and_forward_2BP(cfg, B, T):
    """And attention two matmuls per pair of query and key forwards, seven in training: the forward
    pass has two, the backward pass five."""
    names = jax.tree.leaves(infer.read_arrays(cfg))  # without a table that is only looked up
    P = sum(minillm.size_of(name, cfg) for name in names if " " in name)
    for flops, per_weight, per_pair in ((forward_flops, 2, 2), (train_flops, 6, 7)):
        items = flops(cfg, B, T)
        pairs = B * minillm.causal_pairs(T) * cfg.L * cfg.H
        assert items.pop("scores") + items.pop("values") == per_pair * 2 * pairs * cfg.D
        assert sum(items.values()) == per_weight * B * T * P


def test_one_weight_is_multiplied_once_forwards_and_twice_backwards():
    """The gradient of a sum needs no product y, that of a sum of squares does. The spine alone, or
    the weight gradient alone, is one matmul more; a jaxpr lists all three, the compiler gets those
    that are needed."""
    x, w = shaped(17, 7, dtype="float32"), shaped(3, 7, dtype="float32")
    assert traced_flops(matmul, x, w) == 2 * 17 * 7 * 3
    for power, forwards in ((1, 0), (2, 1)):
        for arguments in ((0,), (1,), (0, 1)):  # the spine, the weight gradient, both
            gradient = jax.grad(lambda x, w: jnp.sum(matmul(x, w) ** power), arguments)
            program = jax.jit(gradient).lower(x, w).as_text()
            assert program.count("dot_general") == forwards + len(arguments)
            assert traced_flops(gradient, x, w) == 3 * 2 * 17 * 7 * 3


def test_a_scan_counts_its_length_and_a_loop_of_unknown_length_is_refused():
    """A choice by platform counts as its default, a `cond` as one of its equal branches."""
    def square(x):
        return x @ x

    def repeat(n, fn, x):
        return jax.lax.scan(lambda x, _: (fn(x), None), x, length=n)[0]

    def branch(other, x):
        return jax.lax.cond(x.sum() < 1, square, other, x)

    x = shaped(4, 4, dtype="float32")
    for times, fn in ((15, partial(repeat, 3, partial(repeat, 5, jax.jit(square)))),
                      (1, partial(branch, lambda x: x.T @ x)), (1, partial(
                          jax.lax.platform_dependent, cpu=lambda x: x @ x @ x, default=square))):
        assert traced_flops(fn, x) == times * 2 * 4 ** 3
    with pytest.raises(ValueError, match="cond"):
        traced_flops(partial(branch, lambda x: x), x)
    with pytest.raises(ValueError, match="while"):
        traced_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, square, x), x)


def test_a_kernel_counts_once_a_point_of_its_grid_and_what_is_not_shown_is_refused():
    """Of a Pallas kernel 4 * 2 blocks are multiplied, also in a scan; an operation that holds a
    program in another way, or has flops that a jaxpr does not show, is refused."""
    from jax.experimental import pallas

    def kernel(x, w, out):
        out[...] = jnp.dot(x[...], w[...])

    def multiply(x, w):
        return pallas.pallas_call(kernel, jax.ShapeDtypeStruct((64, 32), x.dtype), grid=(4, 2),
                                  in_specs=[pallas.BlockSpec((16, 8), lambda i, j: (i, 0)),
                                            pallas.BlockSpec((8, 16), lambda i, j: (0, j))],
                                  out_specs=pallas.BlockSpec((16, 16), lambda i, j: (i, j)))(x, w)

    x, w = shaped(64, 8, dtype="float32"), shaped(8, 32, dtype="float32")
    assert traced_flops(multiply, x, w) == 2 * 64 * 8 * 32
    assert traced_flops(lambda x, w: jax.lax.scan(
        lambda c, _: (c, multiply(x, w)), 0, length=3), x, w) == 3 * 2 * 64 * 8 * 32
    square = shaped(8, 8, dtype="float32")
    check(lambda: traced_flops(lambda a: jax.lax.custom_linear_solve(
        lambda x: a @ x, a[0], lambda matvec, b: matvec(b), symmetric=True), square),
        "custom_linear_solve", "unknown")
    check(lambda: traced_flops(lambda a: jax.lax.conv(a[None, None], a[None, None], (1, 1), "SAME"),
                               square), "conv_general_dilated", "unknown")


# ---------------------------------------------------------------------------------- minillm: values


def attention_by_hand(q, k, v, pos):
    """The definition, in float64: a softmax over the visible slots of each row, head and query."""
    q, k, v = doubles(q, k, v)
    k, v = (np.repeat(a, q.shape[2] // a.shape[1], axis=1) for a in (k, v))
    p = np.exp(np.einsum("bthd,bhsd->bhts", q, k) / np.sqrt(q.shape[3]))
    p = p * (np.arange(k.shape[2]) <= pos[:, None, :, None])
    return np.einsum("bhts,bhsd->bthd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("H, K", [(6, 1), (6, 2), (6, 3), (6, 6), (1, 1)])
@given(st.sampled_from([1, 3]), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
def test_attention_is_the_definition_for_every_K_that_divides_H(H, K, T, a, b, seed):
    q, k, v = normals((2, T, H, 4), (2, K, 12, 4), (2, K, 12, 4), seed=seed)
    pos = np.array([[a], [b]]) + np.arange(T)
    close(attention_jit(q, k, v, pos), attention_by_hand(q, k, v, pos))


def attention_from_0(q, k, v):
    return attention(q, k, v, jnp.arange(q.shape[1])[None])


@pytest.mark.parametrize("dtype, rounding", [("float32", TOLERANCE), ("bfloat16", 2 ** -7)])
@pytest.mark.parametrize("T, H, K", [(1, 4, 2), (9, 3, 3), (129, 4, 1), (257, 6, 2), (1025, 2, 2)])
def test_causal_attention_and_its_gradient_are_those_of_attention(T, H, K, dtype, rounding):
    """Of the reference, in float32 with JAX's gradient. T = 129, 257 and 1025 are 2, 3 and 4
    blocks, of which the last is padded.

    In bfloat16 the weights or their gradient, the output of attention, and the result are each
    rounded by 2**-8 of their value at most. Three independent errors add up to sqrt(3) * 2**-8 <
    2**-7 of the root mean square. No element is off by more than eight times that, relative to the
    root mean square or to itself: of 10**4 normal errors the largest is four standard deviations,
    and tokens that see few keys have larger ones. At T = 1, q and k have a gradient of 0.
    """
    arrays = [jnp.asarray(a, dtype) for a in normals(  # dy, q, k, v
        (2, T, H, 8), (2, T, H, 8), (2, K, T, 8), (2, K, T, 8))]
    results = output_and_gradient(causal_attention, *arrays)
    exact_results = output_and_gradient(attention_from_0, *map(np.float32, arrays))
    for result, exact in zip(doubles(*results), doubles(*exact_results)):
        error, size = result - exact, np.sqrt(np.mean(exact ** 2))
        assert np.sqrt(np.mean(error ** 2)) <= rounding * size + 1e-6
        assert np.all(np.abs(error) <= 8 * rounding * (np.abs(exact) + size) + 1e-6)
    assert {a.dtype for a in results} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@given(st.integers(0, 9999))
def test_parts_are_merged_in_any_order_and_an_empty_one_changes_nothing(dtype, seed):
    """Of five parts. One without a slot is empty, one without a visible slot is empty for a row."""
    q, k, v = normals((2, 3, 4, 8), (2, 3, 12, 8), (2, 3, 12, 8), seed=seed)
    k, v = (quantize_jit(a, -1) for a in (k, v)) if dtype == "int8" else (k, v)
    draw = np.random.default_rng(seed)
    visible = draw.random((2, 1, 4, 12)) < 0.5
    visible[..., 0] = True
    whole, empty = partial_jit(q, k, v, visible), partial_jit(q, k, v, visible & False)
    jax.tree.map(np.testing.assert_array_equal, empty, minillm.Partial(0, 0, -np.inf))
    garbage = empty._replace(values=empty.values + 1e30, total=empty.total - 3)
    for merged in (merge_jit(whole, garbage), merge_jit(garbage, whole)):
        jax.tree.map(np.testing.assert_array_equal, merged, whole)
    part_of_slot = draw.integers(0, 5, 12)
    parts = [partial_jit(q, k, v, visible & (part_of_slot == i)) for i in range(5)]
    while len(parts) > 1:
        draw.shuffle(parts)
        parts.append(merge_jit(parts.pop(), parts.pop()))
    close(minillm.normalize(parts[0]), minillm.normalize(whole))


@pytest.mark.parametrize("T, t, garbage", [(9, 4, 3.0), (300, 150, 1e30), (300, 1, -1e30)])
def test_tokens_that_a_query_does_not_see_change_neither_it_nor_its_gradient(T, t, garbage):
    dy, q, k, v = normals((1, T, 2, 4), (1, T, 2, 4), (1, 1, T, 4), (1, 1, T, 4))
    dy[:, t:], earlier = 0, np.arange(T)[:, None] < t
    changed = (np.where(earlier, a, np.float32(garbage)) for a in (k, v))
    clean, dirty = (output_and_gradient(causal_attention, dy, q, *kv) for kv in ((k, v), changed))
    for axis, *pair in zip((1, 1, 2, 2), clean, dirty):  # out and dq are BTHD, dk and dv BKTD
        assert np.array_equal(*(np.moveaxis(a, axis, 0)[:t] for a in pair))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("S", [100, 256, 300])
def test_attention_to_slots_in_pieces_is_attention_to_all_at_once(S, dtype):
    """8,192 queries, each at a position of its own, attend to 128 slots at a time: one piece, two,
    and two and a rest."""
    q, k, v = normals((1, 8192, 2, 4), (1, 1, S, 4), (1, 1, S, 4))
    pos = np.random.default_rng(0).integers(0, S, (1, 8192))
    k, v = (quantize(a, -1) for a in (k, v)) if dtype == "int8" else (k, v)
    close(jax.jit(infer.cached_attention)(q, k, v, pos), attention_jit(q, k, v, pos))
    assert traced_flops(infer.cached_attention, q, k, v, pos) == 2 * 2 * 8192 * S * 2 * 4


def test_the_memory_of_attention_grows_as_its_tokens_do(optimised):
    """Twice the tokens take twice the temporaries, not four times; a tenth more is left for what
    does not depend on them."""
    def temporaries(T):
        q, k = shaped(1, T, 4, 16, dtype="float32"), shaped(1, 2, T, 16, dtype="float32")
        return memory(partial(output_and_gradient, causal_attention), q, q, k,
                      k).temp_size_in_bytes

    once, twice = temporaries(4096), temporaries(8192)
    assert once < 4096 * 4096 * 4 and twice < 1.1 * 2 * once


@pytest.mark.parametrize("name, M, dtype, platforms", [
    ("product", 1, "float32", {"cuda"}), ("product", 1, "bfloat16", {"cpu", "cuda"}),
    ("product", 1, "int8", {"cpu"}), ("product", 16, "float32", {"cpu"}),
    ("partial_attention", 1, "float32", {"tpu"}), ("partial_attention", 2, "float32", set()),
    ("rotary", 1, "int32", {"cpu"})])
def test_a_form_for_one_backend_is_in_the_programs_of_that_backend_alone(name, M, dtype, platforms):
    """Elsewhere the compiler is given the operations of the plain form."""
    rows, slots, constants = (2, 3, M, 8), (2, 3, 40, 8), [grouped] * (name == "rotary")
    arrays = [shaped(*shape, dtype=dtype) for shape in dict(
        product=[(M, 8), (40, 8)], partial_attention=[rows, slots, slots, (M, 40)],
        rotary=[(2, M)])[name]]

    def operations(fn, platform):
        traced = jax.jit(lambda *arrays: fn(*arrays, *constants)).trace(*arrays)
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        return [operation for operation in re.findall(r"stablehlo\.(\w+)", program)
                if operation not in ("case", "return", "constant")]  # the choice of a platform

    fn = getattr(minillm, name)
    assert platforms == {platform for platform in ("cpu", "cuda", "tpu")
                         if operations(fn, platform) != operations(fn.__wrapped__, platform)}


@pytest.mark.parametrize("B, T", [(1, 1), (2, 1), (3, 5), (4, 4), (1, 17)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_product_is_summed_in_float32_or_int32_over_one_letter_or_two(B, T, dtype):
    """For any number of rows, of weights [F, E] and [E, H, D]. One product of bfloat16 is exact in
    float32, and 999 sums lose at most 999 * 6e-8 of the total of magnitudes; int32 loses nothing.
    """
    sums = jnp.dtype("int32" if dtype == "int8" else "float32")
    for n, letters in ((1, (999,)), (2, (9, 111))):
        x, w = (jnp.asarray(30 * a, dtype) for a in normals((B, T, *letters), (21, *letters)))
        y = jax.jit(partial(minillm.product, n=n, sums=sums))(x, w)
        x, w = (a.reshape(-1, 999) for a in doubles(x, w))
        limit = 0 if dtype == "int8" else 999 * 6e-8 * np.abs(x) @ np.abs(w).T
        assert y.dtype == sums and y.shape == (B, T, 21)
        assert np.all(np.abs(y.reshape(-1, 21) - x @ w.T) <= limit)


@pytest.mark.parametrize("B, T", [(2, 3), (3, 7)])
def test_letters_that_stay_apart_have_the_gradients_of_matrices(B, T):
    """[B, T, E] times [H, D, E], and [B, T, H, D] times [E, H, D], for few rows and for many."""
    x, w, out, back = normals((B, T, 12), (4, 6, 12), (B, T, 4, 6), (12, 4, 6))
    for a, b, n in ((x, w, 1), (out, back, 2)):
        (dy,) = normals(a.shape[:-n] + b.shape[:-n])
        y, pull = jax.vjp(lambda a, b: matmul(a, b, n), a, b)
        spine, weight_gradient = pull(dy)
        C = np.prod(b.shape[-n:])
        rows, matrix, dy = (np.asarray(array).reshape(-1, width) for array, width in (
            (a, C), (b, C), (dy, b.size // C)))
        for result, expected in ((y, rows @ matrix.T), (spine, dy @ matrix),
                                 (weight_gradient, dy.T @ rows)):
            close(result.reshape(expected.shape), expected)


def act_by_hand(x, act):
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)
    return x / (1 + np.exp(-x)) if act == "silu" else x / 2 * (1 + np.tanh(inner))


def test_cosines_of_positions_are_computed_once_for_all_layers():
    counts = minillm.traced_counts(
        partial(forward, cfg=grouped), (abstract(grouped), shaped(2, 9)), lambda eqn, axes: {
            name: 1 for name in ("cos", "sin") if eqn.primitive.name == name})
    assert counts == {"cos": 1, "sin": 1}


def norm_by_hand(x, scale, eps):
    return x / np.sqrt(np.mean(x ** 2, -1, keepdims=True) + eps) * scale


def rope_by_hand(x, pos, cfg):
    """BTHD as complex numbers, d with d + D/2."""
    a, b = np.split(x, 2, axis=-1)
    angle = pos[:, :, None, None] * cfg.rope_base ** (-2 * np.arange(cfg.D // 2) / cfg.D)
    z = (a + 1j * b) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def forward_by_hand(params, tokens, cfg):
    """The model, in NumPy and float64, with no line in common."""
    params = jax.tree.map(lambda w: np.asarray(w, float), params)
    norm, pos = partial(norm_by_hand, eps=cfg.eps), np.arange(tokens.shape[1])[None]
    x = params.embed[tokens] * (cfg.E ** 0.5 if cfg.embed_scale else 1)
    for w in params.layers:
        q, k, v = (np.einsum("bte,hde->bthd", norm(x, w.attn_norm), m) for m in (w.wq, w.wk, w.wv))
        if cfg.qk_norm:
            q, k = norm(q, w.q_norm), norm(k, w.k_norm)
        q, k = (rope_by_hand(a, pos, cfg) for a in (q, k))
        out = attention_by_hand(q, k.swapaxes(1, 2), v.swapaxes(1, 2), pos)
        x = x + np.einsum("bthd,ehd->bte", out, w.wo)
        gate, up = (norm(x, w.mlp_norm) @ m.T for m in (w.w_gate, w.w_up))
        x = x + (act_by_hand(gate, cfg.act) * up) @ w.w_down.T
    return norm(x, params.out_norm) @ (params.embed if cfg.tied else params.unembed).T


@pytest.mark.parametrize("cfg", [*CONFIGS, replace(CONFIGS[1], eps=0.1, rope_base=3.0)], ids=repr)
def test_forward_is_the_model_as_written_in_numpy(cfg):
    params, tokens = weights(cfg), draw_tokens(cfg, 3, SLOTS)
    close(forward_jit(params, tokens, cfg=cfg), forward_by_hand(params, tokens, cfg))


@pytest.mark.parametrize("cfg", CONFIGS, ids=repr)
@given(st.integers(1, SLOTS - 1), st.integers(0, 9999))
def test_a_later_token_does_not_change_an_earlier_logit(cfg, t, seed):
    params, tokens = weights(cfg), draw_tokens(cfg, 3, SLOTS, seed=seed)
    changed = np.where(np.arange(SLOTS) == t, (tokens + 1) % cfg.V, tokens)
    a, b = doubles(*(forward_jit(params, x, cfg=cfg) for x in (tokens, changed)))
    assert np.array_equal(a[:, :t], b[:, :t]) and not np.array_equal(a[:, t], b[:, t])


rope_jit = jax.jit(lambda x, pos, cfg: rope(x, rotary(pos, cfg)), static_argnums=2)


@pytest.mark.parametrize("cfg", CONFIGS, ids=repr)
@given(st.integers(0, 500), st.integers(0, 9999))
def test_rotations_keep_lengths_and_products_depend_on_distance_alone(cfg, shift, seed):
    """An angle of 505 radians is known to 505 * 6e-8, and a product has two of them."""
    x, pos = *normals((1, 2, 1, cfg.D), seed=seed), np.array([[5, 2]])
    assert np.array_equal(rope_jit(x, 0 * pos, cfg), x)
    (a, b), (c, d) = (rope_jit(x, pos + n, cfg)[0, :, 0] for n in (0, shift))
    lengths = np.linalg.norm(x[0, :, 0], axis=-1)
    close(np.linalg.norm([c, d], axis=-1), lengths)
    assert abs(a @ b - c @ d) <= (2 * 505 * 6e-8 + TOLERANCE) * lengths.prod()


def test_no_matmul_of_a_bf16_program_rounds_its_sums():
    """A layer has seven weights, each multiplied three times in training, and attention, whose two
    matmuls need five for the gradient. Unembedding is one weight more in training."""
    def sums(eqn, axes):
        return {eqn.outvars[0].aval.dtype.name: 1} if eqn.primitive.name == "dot_general" else {}

    cfg = replace(grouped, dtype="bfloat16")
    cache = jax.eval_shape(lambda: init_cache(cfg, 2, 9))
    for fn, number, *args in (
            (jax.grad(partial(loss, cfg=cfg)), cfg.L * (3 * 7 + 2 + 5) + 3, shaped(2, 9)),
            (partial(extend, cfg=cfg), cfg.L * (7 + 2), cache, shaped(2, 1))):
        assert minillm.traced_counts(fn, (abstract(cfg), *args), sums) == {"float32": number}


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    """And rounded to bfloat16 once, after 999 sums."""
    dy = jnp.asarray(*normals((3, 333, 4)), jnp.bfloat16)
    table, tokens = jnp.zeros((2, 4), jnp.bfloat16), jnp.ones((3, 333), jnp.int32)
    _, gradient = output_and_gradient(lambda table: lookup(table, tokens), dy, table)
    gradient, dy = doubles(gradient, dy)
    exact, magnitudes = dy.sum((0, 1)), np.abs(dy).sum((0, 1))
    assert np.all(np.abs(gradient[1] - exact) <= 2 ** -8 * np.abs(exact) + 999 * 6e-8 * magnitudes)
    assert np.all(gradient[0] == 0)


@pytest.mark.parametrize("cfg", [CONFIGS[1], CONFIGS[3], CONFIGS[4]], ids=repr)
def test_every_gradient_is_the_slope_of_the_loss(cfg):
    """Along its own direction, a gradient g has slope |g|. Two central differences make one whose
    error grows with h**4: 0.02 was measured at h = 0.04, 256 times less remains at 0.01. The loss,
    of order 3, is rounded at 6e-8 and divided by h: 2e-4."""
    params, tokens = jax.tree.map(np.asarray, weights(cfg)), draw_tokens(cfg, 2, 9)
    value = partial(loss_jit, cfg=cfg)
    grads, tree = jax.tree.flatten(jax.jit(jax.grad(value))(params, tokens))
    leaves = jax.tree.leaves(params)
    for i, g in enumerate(map(np.asarray, grads)):
        norm = np.linalg.norm(g)

        def slope(h):
            a, b = (value(tree.unflatten([*leaves[:i], leaves[i] + step * g / norm,
                                          *leaves[i + 1:]]), tokens) for step in (h, -h))
            return float(a - b) / (2 * h)

        assert norm > 0
        assert abs((4 * slope(0.005) - slope(0.01)) / 3 - norm) < 5e-4 + 1e-3 * norm


def test_adamw_is_the_textbook_over_several_steps():
    params, lr = weights(grouped), 0.01
    adam, p = adam_init(params), doubles(*jax.tree.leaves(params))
    m = v = [0] * len(p)
    for t in range(1, 6):
        grads = weights(grouped, seed=10 + t)
        params, adam = adamw_jit(params, adam, grads, lr)
        g = doubles(*jax.tree.leaves(grads))
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g)]
        v = [0.95 * a + 0.05 * b * b for a, b in zip(v, g)]
        step = [a / (1 - 0.9 ** t) / (np.sqrt(b / (1 - 0.95 ** t)) + 1e-8) for a, b in zip(m, v)]
        p = [w - lr * (a + 0.1 * w * (w.ndim > 1)) for w, a in zip(p, step)]  # norms do not decay
    jax.tree.map(close, jax.tree.leaves((params, adam)), [*p, 5, *m, *v])


@pytest.mark.parametrize("jit", [jax.jit, lambda fn: fn])
def test_a_state_is_sharded_as_its_parameters(jit):
    mesh = shard.make_mesh(data=8)
    params = shard.place(weights(WIDE), WIDE, mesh, shard.FSDP)
    adam = jit(adam_init)(params)
    for p, m, v in zip(*map(jax.tree.leaves, (params, adam.m, adam.v))):
        assert m.sharding.is_equivalent_to(p.sharding, p.ndim) and not np.any(m)
        assert v.sharding.is_equivalent_to(p.sharding, p.ndim)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", list])
def test_tokens_of_any_integer_dtype_are_those_of_int32_or_refused_by_name(dtype):
    cfg, params, tokens = small, weights(small), draw_tokens(small, 2, 6)
    other = tokens.tolist() if dtype is list else tokens.astype(dtype)
    cache, mesh = init_cache(cfg, 2, 8), shard.make_mesh(data=1, tensor=1)
    assert same(minillm.check_tokens(other, cfg), tokens)
    for call in (lambda t: loss(params, t, cfg), lambda t: extend(params, cache, t, cfg),
                 lambda t: prefill(params, cache, t, np.array([6, 2]), cfg),
                 lambda t: shard.sharded_loss(shard.stack(params), t, cfg, mesh)):
        used = jax.make_jaxpr(lambda: call(other))()
        assert str(used) == str(jax.make_jaxpr(lambda: call(tokens))())
    if dtype == "int8":
        check(lambda: loss(params, other, replace(cfg, V=256)), "int8", "V=256", "int32")


@pytest.mark.parametrize("dtype, limit", [("float32", TOLERANCE), ("bfloat16", 2 ** -6)])
def test_a_training_step_is_the_gradient_then_adamw_on_float32_masters(dtype, limit):
    """In bfloat16 some 16 operations, one after another, round logits of order 1 at 2**-8: together
    2**-6 a token, and a quarter of that in the mean of 16 tokens. Four standard deviations are
    2**-6 again."""
    cfg = replace(CONFIGS[4], dtype=dtype)
    params, tokens = weights(cfg), draw_tokens(cfg, 2, 9)
    new, adam, value = jax.jit(train_step, static_argnames="cfg")(
        params, adam_init(params), tokens, cfg=cfg, lr=1e-2)
    grads = jax.jit(jax.grad(lambda p: loss(cast(p, dtype), tokens, cfg)))(params)
    jax.tree.map(close, new, adamw_jit(params, adam_init(params), grads, 1e-2)[0])
    assert {w.dtype for w in jax.tree.leaves((new, adam.m, adam.v))} == {jnp.dtype("float32")}
    assert abs(value - loss_jit(params, tokens, cfg=CONFIGS[4])) <= limit
    seen, state, _ = jax.jit(partial(train_step, cfg=cfg, update=lambda p, s, g, lr: (g, s + lr)))(
        params, 3.0, tokens, lr=1e-2)  # another optimizer gets what AdamW gets
    jax.tree.map(close, (seen, state), (cast(grads, "float32"), 3.01))


def test_init_has_variance_one_over_fan_in_and_norms_of_one():
    cfg, first_numbers = replace(CONFIGS[1], E=48, F=96, V=160), []
    for name, w in zip(jax.tree.leaves(dims(cfg)), jax.tree.leaves(init(jax.random.key(3), cfg))):
        if " " not in name:
            assert np.all(w == 1)
        else:
            fan_in = minillm.size_of(name.split()[1], cfg)
            # the variance of n normals is known to sqrt(2 / n): five times that
            assert abs(np.var(w) * fan_in - 1) < 5 * math.sqrt(2 / w.size)
            first_numbers.append(float(w.ravel()[0]) * fan_in ** 0.5)
    assert len(set(first_numbers)) == len(first_numbers)  # no two from the same key


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
    assert PUBLISHED == {name: param_count(cfg) for name, cfg in bench.MODELS.items()
                         if name in PUBLISHED or "/" not in name}  # not folders of other tests
    for cfg in CONFIGS:
        assert param_count(cfg) == sum(w.size for w in jax.tree.leaves(abstract(cfg)))


# ----------------------------------------------------------------------------------- contract lines

# A size for each letter. No two are equal, so that no letter can stand for another.
SIZE = dict(n=2, B=3, D=4, T=5, G=6, K=7, M=8, S=9, t=10, E=11, width=12, F=13, V=17, C=19, O=23,
            H=42)
CONTRACT_CFG = Config(L=2, **{letter: SIZE[letter] for letter in "EHKDFV"})
INTEGERS = {"BT", "B(T+1)", "B", "Bn", "BS", "1T", "1", "B(n+1)", "M"}  # tokens and lengths
HOST_WORDS = ("path module namespace tensor slices iterator prompts names shardings Mesh "
              "AbstractMesh Where P specs axis strs").split()  # of files, a mesh, or a host's loop
ON_THE_HOST = {"serve", "read_requests", "library", "read_json", "open_tensors", "find_tensors",
               "load", "read_params", "load_state", "host_arrays", "put_in_place", "write_tensors",
               "save", "save_state", "byte_tokens", "byte_text", "end_tokens", "tokenizer", "splash",
               "cudnn"}  # the last two: on a chip
CONTRACTS = [fn for module in (minillm, infer, shard) for name, fn in inspect.getmembers(module)
             if callable(fn) and not inspect.isclass(fn) and not name.startswith("_")
             and getattr(fn, "__module__", "") == module.__name__]


def split_terms(text):
    """str -> list: the text, split at its commas outside parentheses, which nest twice at most."""
    terms = re.findall(r"(?:[^,()]|\((?:[^()]|\([^()]*\))*\))+", text)
    return [term.strip() for term in terms if term.strip()]


def array_of(term):
    """`B(T+1)` -> an abstract array of 3 x 6 numbers; three dots stand for 2 x 3."""
    factor = r"\.\.\.|\([\w+*/]+\)|[A-Z]/\w|[A-Zn1]"
    assert re.fullmatch(f"({factor})+", term), f"{term!r} is neither a known word nor a shape"
    shape = sum(((2, 3) if part == "..." else (eval(part.replace("/", "//"), {}, SIZE),)
                 for part in re.findall(factor, term)), ())
    return shaped(*shape, dtype="int32" if term in INTEGERS else "float32")


@lru_cache
def vocabulary():
    """-> dict: what the words of contract lines stand for. Arrays are abstract."""
    params, key = abstract(CONTRACT_CFG), jax.eval_shape(lambda: jax.random.key(0))
    cache = jax.eval_shape(lambda: init_cache(CONTRACT_CFG, SIZE["B"], SIZE["S"]))
    total, qkv = array_of("BKM1"), map(array_of, ("BTHD", "BKTD", "BKTD"))
    return {
        **dict.fromkeys(HOST_WORDS), **{letter: SIZE[letter] for letter in "nHKSTV"},
        "cfg": CONTRACT_CFG, "Config": CONTRACT_CFG, "Params": params, "Layer": params.layers[0],
        "int8 Params": jax.eval_shape(partial(quantize_params, cfg=CONTRACT_CFG), params),
        "Adam": jax.eval_shape(adam_init, params), "Cache": cache, "k": cache.k, "v": cache.v,
        "Parts": HERE, "Partial": minillm.Partial(array_of("BKMD"), total, total),
        "saved": jax.eval_shape(minillm.causal_forward, *qkv)[1], "state": (),
        "table": (array_of("BT(D/2)"),) * 2, "tokens": np.zeros(SIZE["T"], np.int32),
        "Q8": jax.eval_shape(partial(quantize, axes=-1), array_of("BTE")), "axes": -1,
        "key": key, "keys": jax.eval_shape(partial(jax.random.split, num=SIZE["B"]), key),
        "eps": 1e-6, "lr": 1e-3, "dtype": "float32", "str": "HD", "act": "silu", "None": None,
        "Sampling": Sampling(0.5, 2, 0.9), "end": 1, "reports": None,
        "scalar": shaped(dtype="float32"), "dict": infer.config_json(CONTRACT_CFG),
        "list": [], "tuple": (), "bool": True,
        "Counter": Counter(), "array": np.ones(3), "arrays": (np.ones(3),), "fn": lambda x: x,
        "draft": ngram_draft, "n_draft": 2, "counts": shaped(SIZE["B"], 3),
        "losses": minillm.cross_entropy, "measure": lambda eqn, axes: {},
        "attend": lambda q, k, v, old=(), pos=None: (causal_attention(q, k, v), old),
        "step": lambda state, *_: state, "eqn": jax.make_jaxpr(jax.jit(jnp.sin))(1.0).eqns[0]}


def value_of(term, parameter=""):
    """What a term stands for. An int has the size of its parameter's letter, if it has one."""
    if term == "int":
        return SIZE.get(parameter, SIZE["n"])
    if term in vocabulary():
        return vocabulary()[term]
    tuples = re.fullmatch(r"\((.*,.*)\)", term)  # as in "(FE, FE)"
    parts = split_terms(tuples[1]) if tuples else re.split(" of | or ", term)  # "Params of specs"
    return tuple(map(value_of, parts)) if len(parts) > 1 else array_of(term)


def arrays_in(tree):
    return [a for a in jax.tree.leaves(tree) if isinstance(a, (jax.Array, jax.ShapeDtypeStruct))]


@pytest.mark.parametrize("fn", CONTRACTS, ids=lambda fn: fn.__name__)
def test_every_contract_line_holds(fn):
    """Its terms are known, and the function takes as many arguments. Where no file or mesh is
    needed, its results have the shapes or types that the line gives, and with 64-bit numbers
    enabled the same dtypes."""
    text = " ".join((fn.__doc__ or "").split())
    contract = re.match(r"(.*?) ?-> (.*?)(: |(?<!\.)\. |[:.]?$)", text)
    assert contract, f"{fn.__name__} has no contract line"
    terms, signature = split_terms(contract[1]), inspect.signature(fn)
    signature.bind(*terms)
    arguments = list(map(value_of, terms, [*signature.parameters, *terms]))
    expected = list(map(value_of, split_terms(contract[2])))
    if fn.__name__ in ON_THE_HOST or fn.__module__ == "shard":  # a mesh gives shapes their meaning
        return

    def call(abstract_arguments):
        result = fn(*(abstract_arguments.get(i, a) for i, a in enumerate(arguments)))
        for part, value in zip(result if len(expected) > 1 else [result], expected, strict=True):
            if arrays_in(part):
                assert [a.shape for a in arrays_in(part)] == [a.shape for a in arrays_in(value)]
            else:
                assert isinstance(part, type(value))
        return arrays_in(result)

    abstract_arguments = {i: a for i, a in enumerate(arguments) if arrays_in(a)}
    dtypes = [a.dtype for a in jax.eval_shape(call, abstract_arguments)]
    with jax.enable_x64(True):
        assert dtypes == [a.dtype for a in jax.eval_shape(call, abstract_arguments)]


# --------------------------------------------------------------------------------- infer: the cache

ROWS, PROMPT = 4, 6  # most tests share these shapes, and so their compiled programs
small = CONFIGS[2]   # of one layer
seeds = st.integers(0, 2 ** 32 - 1)
prefill_jit = jax.jit(prefill, static_argnames=("cfg", "rows", "where"))
refill_jit = jax.jit(infer.refill, static_argnames=("cfg", "where"))
quantize_params_jit = jax.jit(quantize_params, static_argnames=("cfg", "kind"))
dot_jit, cached_attention_jit = jax.jit(partial(dot, n=2)), jax.jit(infer.cached_attention)


def row_lengths(*lengths):
    """A strategy: one of these lengths for each row."""
    return st.tuples(*[st.sampled_from(lengths)] * ROWS).map(np.array)


def prompted(cfg, seed=0, lengths=(2, 6, 4, 1), dtype="float32"):
    """A model that has read prompts, each the start of a row of text: Params, Cache, logits, text.
    """
    params, text = weights(cfg), draw_tokens(cfg, ROWS, SLOTS, seed=seed)
    logits, cache = prefill_jit(params, init_cache(cfg, ROWS, SLOTS, dtype), text[:, :PROMPT],
                                np.array(lengths), cfg=cfg)
    return params, cache, logits, text


@pytest.mark.parametrize("rows, dtype", [(1, "float32"), (2, "float32"), (2, "int8")])
@given(row_lengths(1, 2, 3, 4, 5, 6), seeds)
def test_prefill_of_some_rows_at_a_time_is_prefill_of_all(rows, dtype, lengths, seed):
    params, text = weights(small), draw_tokens(small, ROWS, PROMPT, seed=seed)
    cache = jax.tree.map(jnp.ones_like, init_cache(small, ROWS, SLOTS, dtype))  # later slots stay
    results = [prefill_jit(params, cache, text, lengths, cfg=small, rows=n) for n in (None, rows)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        if a.dtype == jnp.int8:  # a number between two integers may be rounded to either
            assert b.dtype == jnp.int8 and np.abs(a.astype(int) - b.astype(int)).max() <= 1
        else:
            close(a, b)


def decided(logits, lengths):
    """BSV, B -> B: the first position after each prompt whose greedy token depends on rounding: the
    two largest logits differ by no more than their errors. Where sums run in another order, logits
    are not equal bit for bit."""
    largest = np.sort(logits, axis=-1)[:, :, -2:]
    close_calls = largest[:, :, 1] - largest[:, :, 0] <= 10 * TOLERANCE
    close_calls[:, -1] = True
    return [T + np.argmax(row[T - 1:]) for row, T in zip(close_calls, lengths)]


@given(row_lengths(1, 6), seeds)
def test_generate_is_generate_reference_for_every_row_alone_token_for_token(lengths, seed):
    (params, cache, logits, text), n = prompted(small, seed, lengths), 8
    tokens, _, cache = generate_jit(params, cache, logits, jax.random.key(0), n=n, cfg=small)
    assert tokens.shape == (ROWS, n) and np.array_equal(cache.length, lengths + n)
    for b, T in enumerate(lengths):
        text[b, T:T + n] = reference_jit(params, text[b:b + 1, :T], n=n, cfg=small)[0]
    ends = decided(forward_jit(params, text, cfg=small), lengths)
    for b, (T, end) in enumerate(zip(lengths, ends)):
        assert np.array_equal(tokens[b, :end - T], text[b, T:min(end, T + n)])


@pytest.mark.parametrize("B, K, dtype", [(1, 2, "float32"), (2, 1, "float32"), (2, 4, "float32"),
                                         (2, 2, "int8")])
def test_a_generate_step_updates_the_cache_in_place(B, K, dtype):
    """An array can be aliased and copied all the same, so temporaries stay below one array of the
    cache; in int8 beside the K and V of one layer, which a CPU converts to float32 to multiply
    them, and which take 8 bytes per number. (A CPU copies a cache of one row and one head; the
    chips' compilers do not: test_a_cache_on_a_chip_is_updated_in_place.)"""
    cfg, S = Config(L=2, E=64, H=4, K=K, D=32, F=64, V=32), 4096
    cache = jax.eval_shape(lambda: init_cache(cfg, B, S, dtype))
    step = memory(partial(generate, n=4, cfg=cfg), abstract(cfg), cache,
                  shaped(B, cfg.V, dtype="float32"), jax.random.key(0), donate_argnums=1)
    assert step.alias_size_in_bytes >= kv_bytes(cfg, B, S, dtype)
    assert step.temp_size_in_bytes < B * K * S * cfg.D * (8 + 1 if dtype == "int8" else 4)


@pytest.mark.parametrize("slots", [5, SLOTS, 40])
def test_resizing_keeps_the_slots_of_both_sizes(slots):
    _, cache, _, _ = prompted(small, lengths=(2, 5, 4, 1))
    resized = resize(cache, slots)
    assert infer.slots_of(resized) == slots and same(
        *(jax.tree.map(lambda a: a[:, :, :min(slots, SLOTS)] if a.ndim > 1 else a, tree)
          for tree in (cache, resized)))


# --------------------------------------------------------------------------------- infer: sampling


@given(seeds)
def test_generating_in_two_calls_is_generating_in_one(seed):
    params, cache, logits, _ = prompted(small, seed)
    run = partial(generate_jit, params, key=jax.random.key(seed), cfg=small,
                  sampling=Sampling(1.5, top_k=9, top_p=0.9))
    whole, last, _ = run(cache, logits, n=8)
    start, logits, cache = run(cache, logits, n=3)
    rest, logits, _ = run(cache, logits, n=5)
    assert np.array_equal(whole, np.concatenate([start, rest], axis=1))
    close(last, logits)


@given(seeds)
def test_a_row_that_reaches_the_end_token_stays_there_and_other_rows_go_on(seed):
    (params, cache, logits, _), end, n = prompted(small, seed), 5, 8
    run = partial(generate_jit, params, n=n, cfg=small, sampling=Sampling(1.2))
    free, _, _ = run(cache, logits, key=jax.random.key(seed))
    tokens, last, stopped = run(cache, logits, key=jax.random.key(seed), end=end)
    later, _, _ = run(stopped, last, key=jax.random.key(seed + 1), end=end)
    for b in range(ROWS):
        until = [*free[b], end].index(end)
        assert np.array_equal(tokens[b, :until], free[b, :until])
        assert np.all(tokens[b, until:] == end) and stopped.length[b] == cache.length[b] + until
        assert until == n or np.all(later[b] == end)  # with another key


@given(st.sampled_from([1, 5, 8]), st.integers(0, 9), st.sampled_from([0.2, 0.5, 0.9, 1.0]),
       st.sampled_from([0.5, 1.0, 2.0]), seeds)
def test_log_probs_keep_the_right_tokens_ties_included(V, top_k, top_p, temperature, seed):
    logits = np.random.default_rng(seed).integers(-2, 3, V).astype(np.float32)  # ties abound
    share = np.exp(logits / temperature)
    keep = np.ones(V, bool) if not 0 < top_k < V else logits >= np.sort(logits)[-top_k]
    share = np.where(keep, share, 0) / share[keep].sum()
    for value in np.unique(logits[keep]):
        keep &= (logits != value) | (share[logits > value].sum() < top_p - 1e-6)
    logp = log_probs(jnp.asarray(logits), Sampling(temperature, top_k, top_p))
    if all(abs(share[logits > value].sum() - top_p) > 1e-5 for value in np.unique(logits)):
        assert np.array_equal(np.isfinite(logp), keep)
        close(np.exp(logp), np.where(keep, share, 0) / share[keep].sum())
    close(jnp.exp(logp).sum(), 1)


def chi_square(counts, probability):
    expected = counts.sum() * np.asarray(probability, float)
    assert np.all(counts[expected == 0] == 0)
    return np.sum((counts - expected)[expected > 0] ** 2 / expected[expected > 0])


def test_draws_have_the_frequencies_of_log_probs():
    """Chi-square of 20,000 draws over 6 tokens: 5 degrees of freedom exceed 20.5 once in 1,000; a
    probability of 1/6 that is off by 10% would give 40."""
    logits, draws = jnp.array([0.3, -1.0, 0.0, 1.2, 0.7, -0.4]), 20_000
    rows = jnp.tile(logits, (draws, 1))
    tokens = sample(jax.random.key(1), rows, jnp.zeros(draws, int), Sampling(0.9))
    expected = np.exp(log_probs(logits, Sampling(0.9)))
    assert chi_square(np.bincount(tokens, minlength=6), expected) < 20.5


def test_noise_reaches_the_tail():
    """One of 2**22 numbers is above 17 once in six times, as for this key. JAX's default mode ends
    at log(2**23) = 15.9, so that tokens of probability 3e-8 would never be drawn."""
    assert infer.noise(jax.random.key(9), jnp.zeros(1, int), 2 ** 22).max() > 17


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_with_any_kind_of_key_a_row_draws_the_same_beside_any_other_rows(kind):
    """And other rows draw other tokens: 64 rows of 50 tokens hit 36 of them on average, and fewer
    than 20 once in 10**9."""
    key, pos, logits = jax.random.key(3, impl=kind), jnp.arange(64), jnp.zeros((64, 50))
    sampling = Sampling(1.0)
    for keys in (key, jnp.stack([jax.random.fold_in(key, i) for i in range(64)])):
        tokens = sample(keys, logits, pos, sampling)
        assert len(np.unique(tokens)) >= 20
        others = sample(keys, logits.at[1:].set(jnp.arange(50.0)), pos, sampling)
        assert tokens[0] == others[0] and np.any(tokens != others)
        if kind == "threefry2x32":  # JAX takes raw keys of the default kind alone
            assert np.array_equal(tokens, sample(jax.random.key_data(keys), logits, pos, sampling))
    assert np.array_equal(sample(keys[5:6], logits[:1], pos[5:6], sampling), tokens[5:6])
    proposals, even = jnp.zeros((64, 3), jnp.int32), jnp.log(jnp.full((64, 4, 2), 0.5))
    draft = jnp.log(jnp.tile(jnp.array([0.9, 0.1]), (64, 3, 1)))
    counts, tokens = accept(key, proposals, draft, even)
    assert len(np.unique(counts)) == 4 and len(np.unique(tokens)) == 2


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(infer.TINY), Sampling(1, 0, infer.TINY)])
def test_the_least_temperature_and_top_p_leave_the_most_probable_token(sampling):
    """Of two equal logits both stay, unless the temperature is 0."""
    logits = jnp.array([[0.5, 2.0, 2.0, -1.0], [1.0, 0.9, 0.8, 0.7]])
    logp, tokens = log_probs(logits, sampling), sample(
        jax.random.key(0), jnp.repeat(logits, 20, axis=0), jnp.arange(40), sampling)
    tie = 0.5 if sampling.temperature else 0
    close(jnp.exp(logp), [[0, 1 - tie, tie, 0], [1, 0, 0, 0]])
    assert {*np.asarray(tokens[:20])} == ({1, 2} if tie else {1}) and np.all(tokens[20:] == 0)


@pytest.mark.parametrize("row, p", [
    ([0, -math.inf, 0, -math.inf], [.5, 0, .5, 0]), ([1, math.inf, 2, 3], [0, 1, 0, 0]),
    ([math.inf, 1, math.inf, -math.inf], [.5, 0, .5, 0]),
    ([0, math.nan, 0, math.nan], [.5, 0, .5, 0]),
    ([-math.inf] * 4, [.25] * 4), ([math.nan] * 4, [.25] * 4)], ids=repr)
@pytest.mark.parametrize("sampling", [
    Sampling(0.7), Sampling(0.7, 4), GREEDY, Sampling(0.7, 0, 0.999), Sampling(8e37)])
def test_logits_that_are_not_finite_are_certain_or_impossible(row, p, sampling):
    """+inf is certain, -inf and NaN are impossible, and a row of these alone is uniform."""
    logits, p = jnp.tile(jnp.array(row), (40, 1)), np.array(p)
    if not sampling.temperature:
        p = np.eye(4)[np.argmax(p)]
    close(jnp.exp(log_probs(logits, sampling))[0], p)
    assert {*np.unique(sample(jax.random.key(0), logits, jnp.arange(40), sampling))} == {
        *np.flatnonzero(p)}


def test_what_makes_no_distribution_is_refused_with_its_value():
    logits = jnp.asarray(*normals((5, 9)))
    numpy = Sampling(np.float32(0.5), np.int64(3), np.float64(0.75))
    assert np.array_equal(log_probs(logits, numpy), log_probs(logits, Sampling(0.5, 3, 0.75)))
    for numbers in ((-1,), (math.nan,), (1e-38,), (1e38,), (math.inf,), (10 ** 400,), (1, -1),
                    (1, 0.5), (1, 0, 0.0), (1, 0, 1e-38), (1, 0, 1.1), (1, 0, math.nan)):
        check(lambda: Sampling(*numbers), "temperature=", numbers[-1])


# -------------------------------------------------------------------------------------- infer: int8


@given(seeds, st.sampled_from([1e-30, 1.0, 1e30]), st.sampled_from([-1, 0, (0, 1)]))
def test_a_quantized_number_is_within_half_a_scale_and_the_largest_is_127(seed, size, axes):
    (x,) = normals((5, 8), seed=seed)
    x[1], x[:, 2] = 0, 0
    x = x * np.float32(size)
    quantized = quantize(jnp.asarray(x), axes)
    q, scale = np.asarray(quantized.q, float), np.asarray(quantized.scale, float)
    assert np.abs(q).max() <= 127 and np.all(q[x == 0] == 0)
    # x / scale is rounded at 6e-8 of up to 127 before it is rounded to an integer
    assert np.all(np.abs(x - q * scale) <= scale * (0.5 + 127 * 6e-8))
    extreme = (np.abs(x) == np.abs(x).max(axes, keepdims=True)) & (x != 0)
    assert np.all(np.abs(q[extreme]) == 127)
    # of x / 127, and of 127 times that
    np.testing.assert_allclose(quantized.astype("float32")[extreme], x[extreme], rtol=2.4e-7)


def test_nan_stays_nan_in_int8_and_other_rows_stay_finite():
    numbers = quantize(jnp.array([[1.0, jnp.nan, 3.0], [1.0, 2.0, 3.0]]), -1).astype("float32")
    assert np.all(np.isnan(numbers[0])) and np.all(np.isfinite(numbers[1]))


@pytest.mark.parametrize("kind", [Q8, Q8A8])
@pytest.mark.parametrize("rows", [1, 5])
@given(seeds)
def test_an_int8_dot_is_off_by_no_more_than_its_roundings(kind, rows, seed):
    """And by 1/1000 of them for the float32 sums: 60 products, each rounded at 6e-8, of 254 times
    the bound at most."""
    x, w = normals((rows, 2, 30), (7, 2, 30), seed=seed)
    weight = kind(*quantize(jnp.asarray(w), (1, 2)))
    result, exact = dot_jit(x, weight), np.einsum("mhd,nhd->mn", x.astype(float), w)
    x_error = np.abs(x).max((1, 2))[:, None] / 254 if kind is Q8A8 else np.zeros((rows, 1))
    w_error = np.asarray(weight.scale)[:, 0].T / 2
    bound = np.abs(x).sum((1, 2))[:, None] * w_error + x_error * (
        np.abs(w).sum((1, 2)) + 60 * w_error)
    assert np.all(np.abs(result - exact) <= bound * 1.001) and np.any(result != exact)
    if kind is Q8:
        close(result, dot_jit(x, weight.astype("float32")))


OVERFLOWS = 9  # a token of `overflowing_model`


@lru_cache(maxsize=None)
def overflowing_model():
    """cfg, Params of float16, all finite, with a token whose values leave its range."""
    cfg = replace(CONFIGS[4], L=2, dtype="float16")
    params = cast(weights(replace(cfg, dtype="float32")), "float16")
    return cfg, params._replace(embed=params.embed.at[OVERFLOWS].set(6e4))


@given(st.integers(1, 5), st.integers(0, 1), seeds)
def test_a_token_that_overflows_changes_no_bit_of_what_does_not_see_it(at, row, seed):
    """Later in its row, as padding of a prompt, and in slots that were rolled back: in every kind
    of cache."""
    cfg, params = overflowing_model()
    text, visible = draw_tokens(cfg, 2, PROMPT, seed=seed) % OVERFLOWS, np.ones((2, PROMPT), bool)
    visible[row, at:] = False
    infected, lengths = np.where(visible, text, OVERFLOWS), visible.sum(1)
    clean, others = (forward_jit(params, tokens, cfg=cfg) for tokens in (text, infected))
    assert np.array_equal(clean[visible], others[visible])
    assert not np.any(np.isfinite(others[~visible])) and np.all(np.isfinite(clean))
    for dtype in ("float16", "int8"):
        (logits, cache), (padded_logits, padded) = (prefill_jit(
            params, init_cache(cfg, 2, SLOTS, dtype), tokens, lengths, cfg=cfg)
            for tokens in (text, infected))
        _, longer = extend_jit(params, padded, np.full((2, 3), OVERFLOWS), cfg=cfg)
        caches = cache, padded, longer._replace(length=padded.length)
        assert np.array_equal(logits, padded_logits) and np.all(
            [np.all(np.isfinite(a)) for a in jax.tree.leaves(caches)])
        x, *others = (extend_jit(params, cache, text[:, :3], cfg=cfg)[0] for cache in caches)
        assert all(np.array_equal(x, other) for other in others)


def test_an_int8_model_computes_with_the_numbers_that_it_represents():
    """In bfloat16 the two sums differ in their last bit, and of some thousand activations one or
    two are rounded the other way, by 2**-8 of themselves."""
    for cfg, tolerance in ((replace(CONFIGS[1], dtype="bfloat16"), 2 ** -6),
                           (CONFIGS[4], TOLERANCE)):
        params = quantize_params_jit(weights(replace(cfg, dtype="float32")), cfg, Q8)
        numbers = jax.tree.map(lambda w: w.astype("float32") if isinstance(w, Q8) else w, params,
                               is_leaf=lambda w: isinstance(w, Q8))
        tokens = draw_tokens(cfg, ROWS, SLOTS)
        close(*(forward_jit(p, tokens, cfg=cfg) for p in (params, numbers)), tolerance)
    assert same(params.embed.rows(tokens, "bfloat16"), params.embed.astype("bfloat16")[tokens])


# ------------------------------------------------------------------------------- infer: speculation


def distributions(seed, V, n, kind):
    """[p_0, ..., p_n]: p_i holds a distribution over V for each of V**i prefixes."""
    random = np.random.default_rng(seed)
    tables = []
    for i in range(n):
        p = random.dirichlet(np.ones(V), V ** i)
        if kind == "zeros":
            p = p * (random.random(p.shape) < 0.5) + 1e-9 * (np.arange(V) == random.integers(V))
        if kind == "one-hot":
            p = np.eye(V)[random.integers(V, size=V ** i)]
        tables.append((p / p.sum(-1, keepdims=True)).astype(np.float32))
    return tables


def after_prefixes(tables, tokens):
    """[p_0, ..], Nn -> NnV, Nn: the distribution of each token after those before it, and the
    probability of the token itself."""
    V = tables[0].shape[1]
    prefixes = [tokens[:, :i] @ V ** np.arange(i)[::-1] for i in range(len(tables))]  # as numbers
    p = np.stack([table[prefix] for table, prefix in zip(tables, prefixes)], 1)
    return p, np.take_along_axis(p, tokens[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("V, n", [(2, 3), (4, 2), (6, 1)])
@given(st.sampled_from(["dense", "zeros", "one-hot"]),
       st.sampled_from(["dense", "zeros", "one-hot", "equal"]), seeds)
def test_speculation_makes_every_output_with_the_targets_probability(V, n, kind, draft_kind, seed):
    """A round makes 1 to n + 1 tokens; the target itself continues it. Summed over all V**n drafts,
    outcomes and continuations, each of V**(n+1) outputs has probability p_0 p_1 .. p_n."""
    p = distributions(seed, V, n + 1, kind)
    q = p[:n] if draft_kind == "equal" else distributions(seed + 1, V, n, draft_kind)
    drafts, outputs = (np.array(list(itertools.product(range(V), repeat=T))) for T in (n, n + 1))
    (q_draft, drawn), (_, expected) = after_prefixes(q, drafts), after_prefixes(p, outputs)
    p_draft, _ = after_prefixes(p, np.pad(drafts, ((0, 0), (0, 1))))
    with np.errstate(divide="ignore"):
        probability, residual = acceptance_jit(drafts, np.log(q_draft), np.log(p_draft))
    assert np.all((probability >= 0) & (probability <= 1)) and np.all(residual >= 0)
    close(residual.sum(-1), 1)
    rejects, total = 1 - np.pad(probability, ((0, 0), (0, 1))), np.zeros(len(outputs))
    for count in range(n + 1):
        starts = np.all(drafts[:, None, :count] == outputs[:, :count], axis=-1)
        weight = drawn.prod(1) * probability[:, :count].prod(1) * rejects[:, count]
        new = residual[:, count, outputs[:, count]]
        total += weight @ (starts * new) * expected[:, count + 1:].prod(1)
    close(total, expected.prod(1))


def test_accept_draws_what_acceptance_says():
    """40,000 rounds, V = 3, n = 2: 9 outcomes (3 tokens after 0, 1 or 2 kept); chi-square with 8
    degrees of freedom exceeds 26.1 once in 1,000; keeping 5% too often would give 50 or more."""
    proposals, q = [2, 0], [[0.2, 0.2, 0.6], [0.5, 0.25, 0.25]]
    p = [[0.3, 0.4, 0.3], [0.4, 0.1, 0.5], [0.1, 0.2, 0.7]]
    rounds = [jnp.array([a] * 40_000) for a in (proposals, np.log(q), np.log(p))]
    count, token = accept_jit(jax.random.key(2), *rounds)
    probability, residual = (np.asarray(a[0], float) for a in acceptance_jit(*rounds))
    reach = np.cumprod([1, *probability])
    expected = (reach * (1 - np.append(probability, 0)))[:, None] * residual
    assert chi_square(np.bincount(3 * count + token, minlength=9), expected.ravel()) < 26.1


def draft_of(cfg, kind, prompts, lengths, sampling=GREEDY):
    """A draft and its state: n-grams, or a model that has read the prompts: another, or the same.
    """
    if kind == "ngram":
        return dict(draft=ngram_draft, state=None)
    other = cfg if kind == "itself" else replace(CONFIGS[4], V=cfg.V)
    _, cache = prefill_jit(weights(other), init_cache(other, len(prompts), SLOTS), prompts, lengths,
                           cfg=other)
    return dict(draft=model_draft(other, sampling), state=(weights(other), cache))


@pytest.mark.parametrize("cfg, kind, n_draft, end", [
    (CONFIGS[0], "itself", 3, 5), (CONFIGS[0], "other", 2, None), (CONFIGS[1], "ngram", 1, 4)])
@given(row_lengths(2, 4, 6), seeds)
def test_greedy_speculation_is_greedy_decoding_for_any_draft(
        cfg, kind, n_draft, end, lengths, seed):
    """In two calls, each of n tokens or up to n_draft more. A row stops at `end`, which then fills
    it."""
    params, cache, _, tokens = prompted(cfg, seed, lengths)
    draft, n, row = draft_of(cfg, kind, tokens[:, :PROMPT], lengths), 5, np.arange(ROWS)
    cache = cache._replace(length=cache.length - 1)
    for call in (1, 2):
        before = cache.length
        tokens, cache, draft["state"], counts = speculate_jit(
            params, cache, tokens, jax.random.key(1), n=n, cfg=cfg, n_draft=n_draft, end=end,
            **draft)
        new, last = cache.length + 1 - lengths, tokens[row, cache.length]
        assert np.all((last == end) | (call * n <= new) & (new <= call * (n + n_draft)))
        assert np.array_equal(counts @ np.arange(1, n_draft + 2), cache.length - before)
    logits = forward_jit(params, tokens, cfg=cfg)
    best, clear = np.argmax(logits, axis=-1), decided(logits, lengths)
    for b, (T, length) in enumerate(zip(lengths, cache.length + 1)):
        until = min(clear[b], int(length))
        assert np.array_equal(tokens[b, T:until], best[b, T - 1:until - 1])
        assert end not in tokens[b, T:length - 1].tolist()
        assert last[b] != end or np.all(tokens[b, length:] == end)
        if kind == "itself" and until == length and last[b] != end:  # accepts everything: its cache
            assert np.all(counts[b, :-1] == 0)                        # has no hole


@pytest.mark.parametrize("kind", ["ngram", "other"])
def test_sampled_speculation_draws_what_the_target_would(kind):
    """4,000 equal rows, V = 11, so 11 * 11 pairs of next tokens, each expected 5 times or more:
    chi-square with 120 degrees of freedom exceeds 173 once in 1,000. Drawing from the draft instead
    would give 2,000."""
    cfg, rows, sampling = CONFIGS[3], 4_000, Sampling(3.0)
    params, text = weights(cfg), np.tile(draw_tokens(cfg, 1, SLOTS), (rows, 1))
    lengths = np.full(rows, 4)
    _, cache = prefill_jit(params, init_cache(cfg, rows, SLOTS), text[:, :4], lengths, cfg=cfg)
    tokens, *_ = speculate_jit(params, cache._replace(length=lengths - 1), text, jax.random.key(4),
                               n=2, cfg=cfg, n_draft=2, sampling=sampling,
                               **draft_of(cfg, kind, text[:, :4], lengths, sampling))
    both = np.concatenate([text[:cfg.V, :4], np.arange(cfg.V)[:, None]], 1)
    p = np.exp(log_probs(forward_jit(params, both, cfg=cfg), sampling))
    pairs = (p[0, 3][:, None] * p[:, 4]).ravel()
    counts = np.bincount(tokens[:, 4] * cfg.V + tokens[:, 5], minlength=cfg.V ** 2)
    assert pairs.min() * rows >= 5 and chi_square(counts, pairs) < 173


@pytest.mark.parametrize("text, proposals", [
    ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
    ([1, 2, 3, 7, 2, 4, 1, 2], [3, 7, 2]),  # 1 2 is longer than the later 2
    ([1, 2, 5, 1, 2, 6, 1, 2], [6, 1, 2]),  # the latest of two
    ([7, 7], [7, 7, 7]),                    # repeats where the text ends
    ([1, 2, 3], [3, 3, 3])])                # no match: the last token
def test_ngrams_propose_what_followed_the_latest_match_of_the_longest_suffix(text, proposals):
    tokens = jnp.array([text + [9] * (12 - len(text))])
    draft, logq, _ = ngram_draft(None, tokens, jnp.array([len(text)]), None, 3, 10)
    assert draft[0].tolist() == proposals and np.array_equal(np.exp(logq), np.eye(10)[draft])


# --------------------------------------------------------------------- infer: many requests, mixed


@pytest.mark.parametrize("dtype, cache_dtype, stride, kind, options", [
    ("bfloat16", "float32", 50, "rbg", dict(sampling=Sampling(1.1, 12))),
    ("float32", "int8", 4, "unsafe_rbg", dict(sampling=Sampling(0.7), end=5))])
@settings(max_examples=10)  # `serve` takes its time on the host
@given(st.lists(st.integers(1, 9), min_size=4, max_size=7), st.integers(0, 2), seeds)
def test_a_request_gets_the_tokens_that_generate_makes_in_any_row_beside_any_others(
        dtype, cache_dtype, stride, kind, options, lengths, row, seed):
    """Bit for bit, where there are as many rows: in another number of rows, sums run in another
    order, and ties may fall otherwise. Slots hold a request and no more, however seldom the host
    looks at the rows."""
    cfg, B, n, S, key = replace(small, dtype=dtype), 3, 7, 16, jax.random.key(seed, impl=kind)
    params, end = cast(weights(small), dtype), options.get("end")
    prompts = [draw_tokens(cfg, T, seed=seed + i) for i, T in enumerate(lengths)]
    served = dict(serve(params, iter(prompts), B, S, n, key, cfg, **options, stride=stride,
                        cache_dtype=cache_dtype))
    assert sorted(served) == list(range(len(prompts)))
    i, (cache, logits) = seed % len(prompts), HERE.empty(cfg, B, S, cache_dtype)
    for b in range(B):
        prompt = prompts[i] if b == row else draw_tokens(cfg, 5, seed=b)
        logits, cache = refill_jit(params, cache, logits, b, np.pad(prompt, (0, S - prompt.size))[
            None], np.array([prompt.size], np.int32), cfg=cfg)
    keys = jnp.stack([jax.random.fold_in(key, i if b == row else 99) for b in range(B)])
    tokens, _, _ = generate_jit(params, cache, logits, keys, n=n, cfg=cfg, **options)
    until = [*tokens[row], end].index(end) + 1
    assert np.array_equal(served[i], tokens[row, :until])


def test_a_live_source_stalls_no_row_and_a_request_has_its_own_length_and_several_ends():
    cfg, params, asked = small, weights(small), []
    prompts = [draw_tokens(cfg, 3, seed=i) for i in range(3)]

    def source():
        yield prompts[0]
        while len(asked) < 5:
            asked.append(len(served))
            yield None
        yield prompts[1], 2
        yield prompts[2]

    served, run = {}, partial(serve, params, B=2, S=16, n=6, key=jax.random.key(0), cfg=cfg)
    for number, tokens in run(source(), stride=2):
        served[number] = tokens
    expected = dict(run([*prompts]))
    assert asked == [0, 0, 0, 1, 1]  # the first request was done before the second came
    for i, n in enumerate((6, 2, 6)):
        assert np.array_equal(served[i], expected[i][:n])
    first, second = expected[0][3], expected[2][2]
    ends = int(first), int(second)
    for i, tokens in dict(run([*prompts], end=ends)).items():
        stop = min([6, *([*expected[i]].index(end) + 1 for end in ends if end in expected[i])])
        assert np.array_equal(tokens, expected[i][:stop])


def rounding(cfg, dtype):
    """cfg, dtype -> block: keys and values as a cache of `dtype` gives them back."""
    slots = init_cache(cfg, 1, 1, dtype).k[0]

    def rounded(x, w, table, cfg, attend):
        def attend_rounded(q, *kv):
            return attend(q, *(infer.to_cache(a, slots).astype(a.dtype) for a in kv))

        return block(x, w, table, cfg, attend_rounded)

    return rounded


def extend_logits(params, cache, tokens, cfg, where):
    """Params, Cache, BT, cfg -> BTV, Cache: `extend`, and logits of its result."""
    x, cache = extend(params, cache, tokens, cfg, where=where)
    return where.unembed(params, x, cfg), cache


extend_logits_jit = jax.jit(extend_logits, static_argnames=("cfg", "where"))
rounded_forward_jit = jax.jit(lambda params, tokens, cfg, dtype: forward(
    params, tokens, cfg, rounding(cfg, dtype)), static_argnames=("cfg", "dtype"))


class Mixture:
    """Rows of text, each of its length, and a cache that has read them in any mixture of moves.
    `logits` are those after each row's last T tokens, BTV: `check` compares them to a forward pass
    over the whole text."""
    rows = ROWS
    growth = 9  # tokens that a move adds to a row at most, or needs room for

    def __init__(self, cfg, where, dtype, kind, seed):
        self.cfg, self.dtype, self.model = cfg, dtype, dict(cfg=cfg, where=where)
        self.random, self.row = np.random.default_rng(seed), np.arange(self.rows)
        self.params = weights(cfg) if kind is None else quantize_params_jit(
            weights(cfg), cfg, kind)
        # a number between two integers may be rounded to either, 1/127 of the largest apart, and of
        # the thousands in a forward pass this happens to a few
        self.tolerance = 4 / 127 if dtype == "int8" or kind is Q8A8 else TOLERANCE
        self.text = self.tokens(self.rows, SLOTS)
        self.lengths = self.random.integers(1, PROMPT + 1, self.rows)
        cache, _ = where.empty(cfg, self.rows, SLOTS, dtype)
        logits, self.cache = prefill_jit(self.params, cache, self.text[:, :PROMPT], self.lengths,
                                         **self.model)
        self.logits = logits[:, None]

    def tokens(self, *shape):
        return self.random.integers(0, self.cfg.V, shape).astype(np.int32)

    def places(self, start, stop):
        """Indices of the text, from `start` to `stop` after each row's end."""
        return self.row[:, None], self.lengths[:, None] + np.arange(start, stop)

    def append(self, new):
        self.logits, self.cache = extend_logits_jit(self.params, self.cache, new, **self.model)
        self.text[self.places(0, new.shape[1])] = new
        self.lengths = self.lengths + new.shape[1]

    def extend(self):
        self.append(self.tokens(self.rows, 3))

    def generate(self):
        tokens, logits, self.cache = generate_jit(self.params, self.cache, self.logits[:, -1],
                                                  jax.random.key(0), n=3, **self.model)
        self.text[self.places(0, 3)] = tokens
        self.lengths, self.logits = self.lengths + 3, logits[:, None]
        self.check_greedy(self.lengths - 3, self.lengths)

    def speculate(self):
        start = self.lengths
        self.text[self.row, start] = np.argmax(self.logits[:, -1], axis=-1)
        text, self.cache, _, _ = speculate_jit(
            self.params, self.cache, self.text, jax.random.key(0), n=3, n_draft=2,
            draft=ngram_draft, state=None, **self.model)
        self.text, self.lengths = np.array(text), np.asarray(self.cache.length)
        new = self.tokens(self.rows, 3)
        new[:, 0] = self.text[self.row, self.lengths]  # the last known token, which the cache lacks
        self.append(new)
        self.check_greedy(start, self.lengths - 2)

    def rollback(self):
        self.lengths = self.random.integers(1, np.minimum(self.lengths, SLOTS - 3) + 1)
        self.cache = self.cache._replace(length=jnp.asarray(self.lengths, jnp.int32))
        self.extend()

    def refill(self):
        row, T = self.random.integers(self.rows), self.random.integers(1, PROMPT + 1)
        prompt = self.tokens(1, PROMPT)
        logits, self.cache = refill_jit(self.params, self.cache, self.logits[:, -1], row, prompt,
                                        np.array([T]), **self.model)
        self.text[row, :PROMPT], self.lengths = prompt, np.where(self.row == row, T, self.lengths)
        self.logits = logits[:, None]

    def recompute(self):
        return np.asarray(rounded_forward_jit(self.params, self.text, cfg=self.cfg,
                                              dtype=self.dtype))

    def check_greedy(self, start, stop):
        """From `start` to `stop`, each token's logit is the largest, within the errors of both."""
        logits, index = self.recompute()[:, :-1], np.arange(1, SLOTS)
        largest = logits.max(-1)
        gap = largest - np.take_along_axis(logits, self.text[:, 1:, None], axis=-1)[..., 0]
        new = (index >= start[:, None]) & (index < stop[:, None])
        assert np.all((gap <= 2 * self.tolerance * (1 + np.abs(largest)))[new])

    def check(self):
        assert np.array_equal(self.cache.length, self.lengths)
        T = self.logits.shape[1]
        close(self.logits, self.recompute()[self.places(-T, 0)], self.tolerance)


MOVES = st.lists(st.sampled_from(["extend", "generate", "speculate", "rollback", "refill"]),
                 min_size=1, max_size=9)


def mix(state, moves):
    """Check a Mixture, then after each move; a row that is full is rolled back."""
    state.check()
    for move in moves:
        full = state.lengths.max() + state.growth > SLOTS
        getattr(state, "rollback" if full and move != "refill" else move)()
        state.check()


@pytest.mark.parametrize("cfg, dtype, kind", [
    (CONFIGS[0], "float32", None), (replace(CONFIGS[1], L=1), "int8", None),
    (CONFIGS[2], "float32", Q8), (replace(CONFIGS[3], L=1), "float32", None),
    (CONFIGS[4], "int8", Q8A8)])
@given(MOVES, seeds)
def test_any_mixture_of_everything_is_recomputation(cfg, dtype, kind, moves, seed):
    mix(Mixture(cfg, HERE, dtype, kind, seed), moves)

# ------------------------------------------------------------------------ infer: Hugging Face files


def read_file(folder, name="model.safetensors"):
    from safetensors.numpy import load_file
    return load_file(folder / name)


def write_file(folder, tensors, name="model.safetensors"):
    """As another program writes it, without the metadata of `save`."""
    from safetensors.numpy import save_file
    save_file({key: np.ascontiguousarray(a) for key, a in tensors.items()}, folder / name)


def write_shards(folder, tensors):
    """Two files and their index, in place of one, named as by the second edition of minillm; they
    are symlinks, as in a cache of downloads."""
    files = {name: f"minillm-01ab-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(tensors)}
    for file in {*files.values()}:
        part = {name: tensors[name] for name in tensors if files[name] == file}
        write_file(folder.parent, part, file)
        (folder / file).symlink_to(folder.parent / file)
    index = {"metadata": {"minillm_save": "01ab"}, "weight_map": files}
    (folder / infer.INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def some_adam(params):
    """An optimizer's state without zeros."""
    return Adam(jnp.int32(7), *(jax.tree.map(f, params) for f in (jnp.sin, jnp.square)))


@files
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cfg", [*CONFIGS[:2], replace(CONFIGS[4], rope_scaling=(8, 1, 4, 64))])
def test_what_is_saved_is_loaded_bit_for_bit(cfg, dtype, tmp_path):
    cfg, params = replace(cfg, dtype=dtype), weights(cfg)
    adam = some_adam(params)
    save_state(tmp_path, cfg, params, adam)  # parameters stay float32 whatever cfg computes in
    loaded_cfg, *state = load_state(tmp_path)
    assert loaded_cfg == cfg and same(state, [params, adam]) and same(load(tmp_path)[1], params)
    params = cast(params, dtype)
    if cfg.embed_scale:  # files store norm scales less one, in float32
        params = jax.tree.map(lambda w: 1 + jnp.float32(w - 1) if w.ndim == 1 else w, params)
    save(tmp_path, cfg, params)  # counts before the state
    assert same(load(tmp_path, "float32")[1], cast(params, "float32"))
    for write in (lambda *_: None, write_file, write_shards):
        write(tmp_path, read_file(tmp_path))  # without metadata, config.json counts
        loaded_cfg, loaded = load(tmp_path)
        assert loaded_cfg == cfg and same(loaded, params)


def published(family, layers, width, heads, inner, vocab, **others):
    return dict(model_type=family, num_hidden_layers=layers, hidden_size=width, hidden_act="silu",
                num_attention_heads=heads, intermediate_size=inner, vocab_size=vocab) | others


PUBLISHED_JSON = {  # as each model's own config.json spells it, without what changes nothing
    "llama-3.2-1b": published(
        "llama", 16, 2048, 32, 8192, 128256, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5,
        rope_theta=500000.0, tie_word_embeddings=True, attention_bias=False, torch_dtype="bfloat16",
        rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                          original_max_position_embeddings=8192, rope_type="llama3")),
    "llama-2-7b": published(
        "llama", 32, 4096, 32, 11008, 32000, rms_norm_eps=1e-5, rope_scaling=None,
        tie_word_embeddings=False, torch_dtype="float16"),
    "smollm2-135m": published(
        "llama", 30, 576, 9, 1536, 49152, num_key_value_heads=3, rms_norm_eps=1e-5, head_dim=None,
        rope_theta=100000, tie_word_embeddings=True, rope_interleaved=False, dtype="bfloat16"),
    "mistral-7b": published(
        "mistral", 32, 4096, 32, 14336, 32768, num_key_value_heads=8, rms_norm_eps=1e-5,
        rope_theta=1e6, sliding_window=None, max_position_embeddings=32768),
    "qwen3-0.6b": published(
        "qwen3", 28, 1024, 16, 3072, 151936, num_key_value_heads=8, rms_norm_eps=1e-6,
        head_dim=128, rope_theta=1000000, sliding_window=4096, use_sliding_window=False,
        max_position_embeddings=40960, tie_word_embeddings=True),
    "gemma-2b": published(
        "gemma", 18, 2048, 8, 16384, 256000, num_key_value_heads=1, hidden_act="gelu",
        head_dim=256, rms_norm_eps=1e-6, hidden_activation=None, rope_theta=10000.0)}


@pytest.mark.parametrize("name", PUBLISHED_JSON)
def test_published_configs_are_understood_as_transformers_4_and_5_spell_them(name):
    config = PUBLISHED_JSON[name]
    cfg = infer.parse_config(config)
    assert replace(cfg, dtype="float32") == bench.MODELS[name]
    version_5 = {key: value for key, value in config.items() if not key.startswith("rope_")}
    version_5 |= {"layer_types": ["full_attention"] * cfg.L, "rope_parameters": {
        "rope_type": "default", "rope_theta": cfg.rope_base, **(config.get("rope_scaling") or {})}}
    assert infer.parse_config(version_5) == cfg
    if defaults := infer.DEFAULTS.get(config["model_type"]):
        few = {key: value for key, value in config.items() if key not in defaults}
        few = infer.parse_config(few | {"num_attention_heads": 32})
        assert few.K == defaults["num_key_value_heads"]
        assert few.D == defaults.get("head_dim", config["hidden_size"] // 32)
    edited = {**config, "num_key_value_heads": None, "sliding_window": 2 ** 17,
              "max_position_embeddings": 2 ** 17}
    assert infer.parse_config(edited) == replace(cfg, K=cfg.H)


REFUSED = dict(
    model_type=["gemma2", None], hidden_size=[None, -64, "32", 32.0, True], head_dim=[2 ** 70],
    rms_norm_eps=["1e-6", -1, 10 ** 400], rope_theta=[math.nan], max_position_embeddings=[0],
    tie_word_embeddings=["false"], hidden_act=["relu", "gelu", ["silu"]], attention_bias=[True],
    partial_rotary_factor=[0.5], quantization_config=[dict(bits=4)], sliding_window=[64])


@pytest.mark.parametrize("word, changes", [
    *((key, {key: value}) for key, values in REFUSED.items() for value in values),
    ("K=9", dict(num_key_value_heads=9)), ("wrong kind", dict(rope_scaling="wrong kind")),
    ("sliding_window", dict(model_type="qwen3", sliding_window=64, use_sliding_window=True)),
    ("linear", dict(rope_scaling=dict(type="linear", factor=2.0))),
    ("low_freq_factor", dict(rope_scaling=dict(rope_type="llama3", factor=8))),
    ("yarn", dict(rope_parameters=dict(rope_type="yarn", factor=4.0), rope_scaling=None))],
    ids=repr)
def test_a_config_that_is_not_implemented_is_refused_by_name(word, changes):
    check(lambda: infer.parse_config({**PUBLISHED_JSON["llama-3.2-1b"], **changes}), word)


@files
def test_a_folder_without_the_whole_model_is_refused_by_name(tmp_path, monkeypatch):
    cfg, params = CONFIGS[1], weights(CONFIGS[1])
    check(lambda: load(tmp_path), "model.safetensors", "No such file")
    save(tmp_path, cfg, params)
    tensors = read_file(tmp_path)
    check(lambda: load_state(tmp_path), "state.safetensors", "No such file")
    write_file(tmp_path, tensors, "state.safetensors")
    check(lambda: load_state(tmp_path), "state.safetensors", "save_state")
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    scales = tensors[norm]
    for changes, *words in (
            ({up: None}, up, "missing"), ({"x.sinks": scales}, "x.sinks", "not part"),
            ({up.replace("1", "2"): tensors[up]}, "layers.2"),
            ({norm: scales[:9]}, norm, (9,), (16,)), ({norm: np.int64(scales)}, "I64")):
        arrays = {**tensors, **changes}
        write_file(tmp_path, {name: a for name, a in arrays.items() if a is not None})
        check(lambda: load(tmp_path), tmp_path, *words)
    write_file(tmp_path, {**tensors, "model.rotary_emb.inv_freq": scales})  # of old files
    assert load(tmp_path)[0] == cfg
    for prefix in ("_orig_mod.", "base_model.model."):
        write_file(tmp_path, {prefix + name: a for name, a in tensors.items()})
        check(lambda: load(tmp_path), prefix + min(tensors), "not part")
    for text in (b"{", b"[" * 10 ** 5, b"[]", b"\xff"):
        (tmp_path / "config.json").write_bytes(text)
        check(lambda: load(tmp_path), "config.json", "JSON")
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    check(lambda: load(tmp_path), 'pip install ".[hf]"')
    check(lambda: save(tmp_path / "new", cfg, params), 'pip install ".[hf]"')
    assert not (tmp_path / "new").exists()


@files
@pytest.mark.parametrize("change", [
    lambda file: file[:-1], lambda file: file + b"0", lambda file: b"", lambda file: b"PK" + file,
    lambda file: file.replace(b"F32", b"F16", 1)])
def test_a_damaged_or_foreign_file_is_refused_by_its_name(change, tmp_path):
    save(tmp_path, grouped, weights(grouped))
    file = tmp_path / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    check(lambda: load(tmp_path), file)


@files
def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    cfg, params = CONFIGS[1], weights(CONFIGS[1])
    for write in (save, partial(save_state, adam=adam_init(params))):
        check(lambda: write(tmp_path, replace(cfg, qk_norm=False), params), "qk_norm")
        check(lambda: write(tmp_path, replace(cfg, F=21), params), "gate_proj", 20, 21)
        check(lambda: write(tmp_path, cfg, quantize_params(params, cfg)), "int8")
    check(lambda: save_state(tmp_path, cfg, params, adam_init(weights(grouped))), "params")
    assert not [*tmp_path.iterdir()]


@files
def test_a_head_that_differs_counts_and_a_tied_table_stands_under_either_name(tmp_path):
    """As transformers 5.24 reads them: where config.json says tied, the file has the last word."""
    cfg, params = grouped, weights(grouped)
    save(tmp_path, cfg, params)
    tensors = read_file(tmp_path)
    table = tensors["model.embed_tokens.weight"]
    head_only = {**tensors, "lm_head.weight": table}
    del head_only["model.embed_tokens.weight"]
    for arrays, head in ((head_only, None), (tensors | head_only, None),
                         ({**tensors, "lm_head.weight": table[::-1]}, table[::-1])):
        write_file(tmp_path, arrays)
        loaded_cfg, loaded = load(tmp_path)
        assert loaded_cfg == replace(cfg, tied=head is None)
        assert same(loaded, params._replace(unembed=head))
    edit_config(tmp_path, tie_word_embeddings=False)
    write_file(tmp_path, tensors)
    check(lambda: load(tmp_path), "lm_head.weight", "missing")


@files
def test_a_model_without_a_head_needs_no_prefix(tmp_path):
    save(tmp_path, grouped, weights(grouped))
    write_file(tmp_path, {name.removeprefix("model."): a for name, a in read_file(
        tmp_path).items()})
    assert same(load(tmp_path)[1], weights(grouped))


@files
def test_shards_that_are_missing_are_refused_and_one_file_counts_before_them(tmp_path):
    save(tmp_path, grouped, weights(grouped))
    tensors = read_file(tmp_path)
    write_shards(tmp_path, tensors)
    index = tmp_path / infer.INDEX
    places = json.loads(index.read_text())["weight_map"]
    name, *_ = places
    index.write_text(json.dumps({"weight_map": {**places, name: "no-such.safetensors"}}))
    check(lambda: load(tmp_path), tmp_path / "no-such.safetensors")
    index.write_text(json.dumps({"weight_map": {name: places[name]}}))
    check(lambda: load(tmp_path), tmp_path, "missing")
    write_file(tmp_path, tensors)
    assert same(load(tmp_path)[1], weights(grouped))


@files
@pytest.mark.parametrize("axes, rules", [
    (dict(tensor=3), shard.TENSOR), (dict(tensor=8), shard.TENSOR),
    (dict(data=8, tensor=1), {"matrix": "data"}), (dict(tensor=2), dict(D="tensor")),
    (dict(data=2, tensor=2), {**shard.TENSOR, "matrix": "data"})])
def test_a_model_saved_from_four_devices_is_loaded_on_any_number_and_each_reads_only_its_part(
        axes, rules, tmp_path, monkeypatch):
    class Counted(NamedTuple):
        array: np.ndarray
        shape = property(lambda self: self.array.shape)

        def reshape(self, shape):
            return Counted(self.array.reshape(shape))

        def __getitem__(self, index):
            bytes_read.append(self.array[index].nbytes)
            return self.array[index]

    cfg = Config(L=1, E=24, H=24, K=24, D=2, F=24, V=24, tied=False, act="gelu", embed_scale=True)
    params = shard.place(weights(cfg), cfg, shard.make_mesh(tensor=4), shard.TENSOR)
    adam = some_adam(params)
    save(tmp_path, cfg, params)
    save_state(tmp_path, cfg, params, adam)
    expected = load(tmp_path)[1], params, adam.m, adam.v
    tensors, config = infer.find_tensors(tmp_path)
    counted, bytes_read = {name: Counted(array) for name, array in tensors.items()}, []
    monkeypatch.setattr(infer, "find_tensors", lambda path: (counted, config))
    shardings = partial(shard.shardings, mesh=shard.make_mesh(**axes), rules=rules)
    _, *state = load_state(tmp_path, shardings)
    split = load(tmp_path, shardings=shardings)[1], state[0], *state[1][1:]
    assert sum(bytes_read) == 4 * param_count(cfg) and same(split, expected)
    assert jax.tree.map(lambda w: w.sharding, split) == (shardings(cfg),) * 4


@files
def test_two_processes_save_a_split_model_together_and_each_loads_its_part(beside):
    beside["two"]()
    cfg, params = load(beside["folder"] / "saved")
    jax.tree.map(close, params, init(jax.random.key(0), cfg))
    assert same(load_state(beside["folder"] / "saved")[1:], (params, adam_init(params)))


@files
@pytest.mark.parametrize("shards", [False, True])
def test_a_save_cut_short_anywhere_leaves_a_whole_model(shards, tmp_path, monkeypatch):
    """At every call that touches the disk; after it none works, as after a kill."""
    old, new, calls = CONFIGS[1], grouped, math.inf

    def cut(call):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise KeyboardInterrupt
            return call(*args, **kwargs)
        return wrapper

    def save_both(cfg):
        save(folder, cfg, weights(cfg))
        save_state(folder, cfg, weights(cfg), some_adam(weights(cfg)))

    for name in ("replace", "unlink", "write_text", "mkdir", "chmod"):
        monkeypatch.setattr(pathlib.Path, name, cut(getattr(pathlib.Path, name)))
    tensors = infer.library().numpy
    monkeypatch.setattr(tensors, "save_file", cut(tensors.save_file))
    for limit in itertools.count():
        folder = tmp_path / str(limit)
        save_both(old)
        edit_config(folder, eos_token_id=3)
        if shards:
            write_shards(folder, read_file(folder))
        (folder / "tokenizer.json").touch()
        others = {path: path.read_bytes() for path in folder.iterdir()
                  if path.name not in ("config.json", "model.safetensors", "state.safetensors")}
        calls = limit
        with contextlib.suppress(KeyboardInterrupt):
            save_both(new)
        finished, calls = calls >= 0, math.inf
        cfg, params = load(folder)
        assert cfg in (old, new) and same(params, weights(cfg))
        state_cfg, *state = load_state(folder)
        assert state_cfg in (old, new)
        assert same(state, [weights(state_cfg), some_adam(weights(state_cfg))])
        assert infer.read_json(folder / "config.json")["eos_token_id"] == 3
        assert all(path.read_bytes() == content for path, content in others.items())
        if finished:
            break
    assert limit > 10 and cfg == state_cfg == new and len([*folder.iterdir()]) == len(others) + 3


@files
def test_keys_of_an_earlier_config_that_config_does_not_know_stay(tmp_path):
    save(tmp_path, CONFIGS[4], weights(CONFIGS[4]))
    edit_config(tmp_path, eos_token_id=[1, 7], max_position_embeddings=64, dtype="float16",
                quantization_config={}, hidden_activation="gelu_pytorch_tanh",
                layer_types=["sliding_attention"], rope_parameters=dict(rope_theta=7.0))
    save(tmp_path, grouped, weights(grouped))
    config = infer.read_json(tmp_path / "config.json")
    assert infer.parse_config(config) == grouped and config["eos_token_id"] == [1, 7]
    assert config["max_position_embeddings"] == 64 and "quantization_config" not in config
    save(tmp_path / "new", grouped, weights(grouped), dict(eos_token_id=[3], vocab_size=9))
    config = infer.read_json(tmp_path / "new" / "config.json")
    assert (config["eos_token_id"], config["vocab_size"]) == ([3], grouped.V)


def test_llama_3_scaling_slows_slow_pairs_and_leaves_fast_ones():
    """Llama 3.2 1B: of 32 pairs, those that turn more than 4 times in 8,192 tokens stay as they
    are, those that turn less than once become 32 times slower, and the 3 between are interpolated.
    They stay in order."""
    cfg = bench.MODELS["llama-3.2-1b"]
    before, after = (np.arctan2(np.asarray(sin), np.asarray(cos))[0, 0].astype(float)
                     for cos, sin in (rotary(jnp.array([[1]]), c)
                                      for c in (replace(cfg, rope_scaling=None), cfg)))
    turns = 8192 * before / (2 * np.pi)
    share = np.clip((turns - 1) / 3, 0, 1)
    np.testing.assert_allclose(after, before * (share + (1 - share) / 32), rtol=TOLERANCE)
    assert np.sum((turns > 1) & (turns < 4)) == 3 and np.all(np.diff(after) < 0)


# --------------------------------------------------------------------------------- infer: its costs


def abstract_in(cfg, dtype):
    """cfg, dtype -> cfg, Params: shapes of weights of this dtype, and cfg with that of activations,
    which for int8 is bfloat16."""
    cfg = replace(cfg, dtype="bfloat16" if dtype == "int8" else dtype)
    convert = partial(quantize_params, cfg=cfg) if dtype == "int8" else lambda params: params
    return cfg, jax.eval_shape(convert, abstract(cfg))


def read_and_unembed(params, cache, tokens, cfg):
    """Params, Cache, BT, cfg -> BTV, Cache: what `decode_flops` and `decode_bytes` count."""
    x, cache = extend(params, cache, tokens, cfg)
    return unembed(params, x, cfg), cache


@pytest.mark.parametrize("cfg", CONFIGS)
@pytest.mark.parametrize("dtype, cache_dtype, B, T, n", [("float32", "int8", 2, 3, 5),
                                                         ("int8", "float32", 3, 70, 2)])
def test_prefill_extend_and_generate_multiply_what_formulas_say(cfg, dtype, cache_dtype, B, T, n):
    (cfg, params), S = abstract_in(cfg, dtype), T + n
    cache = jax.eval_shape(lambda: init_cache(cfg, B, S, cache_dtype))
    assert traced_flops(partial(prefill, cfg=cfg), params, cache, shaped(B, T), shaped(B)) \
        == sum(prefill_flops(cfg, B, T).values())
    assert traced_flops(partial(read_and_unembed, cfg=cfg), params, cache, shaped(B, T)) \
        == sum(decode_flops(cfg, B, S, T).values())
    assert traced_flops(partial(generate, n=n, cfg=cfg), params, cache,
                        shaped(B, cfg.V, dtype="float32"), jax.random.key(0)) \
        == n * sum(decode_flops(cfg, B, S).values())


def follow_arrays(jaxpr, arrays, accesses):
    """jaxpr, arrays, dict -> arrays: which array each result of a program is, given which ones its
    arguments are: (name, shape and dtype), or None.

    Appends to `accesses[name]` each operation that computes with that array, and how many of its
    bytes: all of them, but as many as a gather returns, or as the update of a scatter has, whose
    result is another array, `name after`. A view computes nothing. A conversion does, except of
    norm scales: no other array may be copied in another dtype.
    """
    views = "reshape", "transpose", "squeeze", "broadcast_in_dim", "dynamic_slice"
    array_of = dict(zip(map(id, jaxpr.invars), arrays))
    for eqn in jaxpr.eqns:
        kind, operands = eqn.primitive.name, [array_of.get(id(v)) for v in eqn.invars]
        inner, results = minillm.inner_jaxprs(eqn), []
        if inner and kind != "scatter":  # of a choice by platform the default, which is the last
            results = follow_arrays(inner[-1], operands[-len(inner[-1].invars):], accesses)
        for name, a in filter(None, [] if results else operands):
            result, update = eqn.outvars[0].aval, eqn.invars[-1].aval
            copies_scale = kind == "convert_element_type" and "norm" in name
            if (kind in views or copies_scale) and result.size >= a.size:
                results = [(name, a)]
            else:
                size = {"gather": result, "scatter": update}.get(kind, a).size * a.dtype.itemsize
                accesses.setdefault(name, []).append((kind, size))
                results = [(name + " after", a)] if kind == "scatter" else []
        array_of.update(zip(map(id, eqn.outvars), results))
    return [array_of.get(id(v)) for v in jaxpr.outvars]


@pytest.mark.parametrize("cfg", CONFIGS)
@pytest.mark.parametrize("dtype, cache_dtype, B, T", [
    ("float32", "bfloat16", 3, 1), ("bfloat16", "int8", 1, 1), ("int8", "float32", 20, 4)])
def test_a_decode_step_reads_each_array_once_writes_T_slots_and_moves_decode_bytes(
        cfg, dtype, cache_dtype, B, T):
    """Weights in one matmul each, scales in one product, and a table of embeddings by rows, and
    whole where it makes the logits too. A cache is written, and then read whole."""
    (cfg, params), S, accesses = abstract_in(cfg, dtype), 9, {}
    cache = jax.eval_shape(lambda: init_cache(cfg, B, S, cache_dtype))
    program = jax.make_jaxpr(partial(read_and_unembed, cfg=cfg))(params, cache, shaped(B, T)).jaxpr
    weights, slots = ([(jax.tree_util.keystr(path), a) for path, a in
                       jax.tree.leaves_with_path(tree)] for tree in (params, cache[:2]))
    results = follow_arrays(program, [*weights, *slots, None, None], accesses)
    assert results == [None, *((name + " after", a) for name, a in slots), None]
    moved = dict.fromkeys(decode_bytes(cfg, B, S), 0) | {"logits": program.outvars[0].aval.size * 4}

    def expect(part, name, operation, size):
        assert accesses[name].pop(0) == (operation, size)
        moved[part] += size

    for name, a in weights + slots:
        size = a.size * a.dtype.itemsize
        reader = "mul" if "norm" in name or "scale" in name else "dot_general"
        if (name, a) in slots:
            expect("cache_write", name, "scatter", size // S * T)
            expect("cache_read", name + " after", reader, size)
        elif name.startswith(".embed"):
            expect("embed", name, "gather", size // cfg.V * B * T)
        if (name, a) in weights and (cfg.tied or not name.startswith(".embed")):
            expect("weights", name, reader, size)
    assert not any(accesses.values())
    assert moved == decode_bytes(cfg, B, S, T, cache_dtype, dtype)


def test_the_lectures_cache_is_939_MB_a_sequence():
    assert kv_bytes(bench.MODELS["gemma-7b"], 1, 2048, "bfloat16") == 939_524_096
# -------------------------------------------------------------------------------------------- shard


WIDE = Config(L=2, E=16, H=8, K=4, D=4, F=24, V=32)  # everything divides by 4, and H, E, F, V by 8


@pytest.mark.parametrize("n", [1, 2, 3, 8, (2, 2)])
@pytest.mark.parametrize("split_norm", [False, True])
def test_a_ring_is_its_reference_is_the_product_and_so_are_their_gradients(
        n, split_norm, monkeypatch):
    E, F, spec = 48, 24, jax.P
    monkeypatch.setattr(shard, "is_norm_split", lambda rows, E: split_norm)
    x, y, *weights, scale = normals((2, 3, E), (2, 3, F), (F, E), (F, 2, E), (E, F), (E,))
    a, b, c = (w * E ** -0.5 for w in weights)
    mesh = shard.make_mesh(tensor=n)
    axes = shard.axes_of(mesh, "tensor")

    def on_one_device(x, y, a, b, c, scale):
        unit = minillm.rms_norm(x, scale, 0.1)
        return dot(unit, a), dot(unit, b.reshape(-1, E)).reshape(2, 3, F, 2), dot(y, c)

    def split(ring):
        enter, leave = shard.RINGS[ring]
        over, last, second = spec(axes), spec(None, None, axes), spec(None, axes)
        return jax.shard_map(
            lambda x, y, a, b, c, scale: (*enter(x, (a, b), axes, norm=(scale, 0.1)),
                                          leave(y, c, axes)), mesh=mesh,
            in_specs=(last, last, over, over, second, spec()), out_specs=(last, last, last))

    def values_and_gradients(*args):
        results = []
        for fn in (on_one_device, *map(split, shard.RINGS)):
            value, back = jax.vjp(fn, *args)
            results.append((value, back(jax.tree.map(jnp.sin, value))))
        return results

    expected, *results = jax.jit(values_and_gradients)(x, y, a, b, c, scale)
    assert len(results) == len(shard.RINGS) == 3
    for result in results:
        jax.tree.map(close, result, expected)


@pytest.mark.parametrize("axes, ring, chunks, keep, cfg", [
    (dict(data=(2, 2), context=2, tensor=1), 0, 2, KEEPABLE, replace(WIDE, L=1)),
    (dict(data=1, context=3, tensor=1), 0, 1, (), replace(WIDE, L=1, E=24, tied=False)),
    (dict(data=1, tensor=8), 0, 3, (), replace(WIDE, L=1, K=8, tied=False, qk_norm=True)),
    (dict(data=1, context=2, tensor=(2, 2)), 0, 1, shard.KEPT, replace(WIDE, L=1, qk_norm=True)),
    (dict(data=4, tensor=2), 2, 2, KEEPABLE,
     replace(WIDE, act="gelu", embed_scale=True, qk_norm=True))])
def test_a_sharded_loss_and_its_gradients_are_those_of_one_device(
        axes, ring, chunks, keep, cfg, monkeypatch):
    mesh, params, tokens = shard.make_mesh(**axes), weights(cfg), draw_tokens(cfg, 8, 7)
    monkeypatch.setattr(shard, "loss_chunks", lambda N, V: chunks)
    monkeypatch.setattr(shard, "is_norm_split", lambda rows, E: chunks > 1)
    split = partial(shard.sharded_loss, mesh=mesh, ring=ring, keep=keep)
    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=2)(params, tokens, cfg)
    split_value, split_grads = jax.jit(jax.value_and_grad(split), static_argnums=2)(
        shard.stack(params), tokens, cfg)
    close(split_value, value)
    jax.tree.map(close, split_grads, shard.stack(grads))


def reference(q, k, v, pos=None):
    """Attention as a caller may give it, in place of a fused kernel."""
    B, T = q.shape[:2]
    return minillm.attention(q, k, v, jnp.broadcast_to(jnp.arange(T), (B, T)) if pos is None
                             else pos)


@pytest.mark.parametrize("axes", [None, dict(data=2, tensor=2), dict(data=1, tensor=(2, 2))])
@pytest.mark.parametrize("kernel", ["reference", "splash"])
def test_any_attention_in_the_hook_gives_the_same_loss_and_gradients(axes, kernel):
    """Also a Pallas kernel, which `jax.shard_map` takes with check_vma=False alone, under which it
    differentiates collectives by other rules."""
    T = 128 if kernel == "splash" else 7
    causal = reference if kernel == "reference" else partial(infer.splash, interpret=True)
    cfg = replace(WIDE, L=1, E=32, H=4, D=128 if kernel == "splash" else 4, qk_norm=True)
    params, tokens = weights(cfg), draw_tokens(cfg, 2, T + 1)
    expected = jax.jit(jax.value_and_grad(loss), static_argnums=2)(params, tokens, cfg)
    if axes is None:
        run = partial(loss, cfg=cfg, causal=causal)
    else:
        params, expected = shard.stack(params), (expected[0], shard.stack(expected[1]))
        run = partial(shard.sharded_loss, cfg=cfg, mesh=shard.make_mesh(**axes), causal=causal)
    jax.tree.map(close, jax.jit(jax.value_and_grad(run))(params, tokens), expected)


@pytest.mark.parametrize("axes, layout", [
    (None, ""), (dict(data=2, tensor=4), "heads"), (dict(tensor=(2, 2)), "batch")])
def test_any_attention_in_the_hook_gives_the_same_logits(axes, layout):
    how = dict(causal=reference, cached=reference)
    where = shard.Where(shard.make_mesh(**axes), layout, **how) if axes else HERE._replace(**how)
    params, text, n = weights(WIDE), draw_tokens(WIDE, 4, 6), np.array([6, 2, 4, 1])

    def logits_of(where):
        first, cache = prefill(params, init_cache(WIDE, 4, 24), text, n, WIDE, where=where)
        x, cache = extend(params, cache, text[:, :3], WIDE, where=where)
        return first, where.unembed(params, x, WIDE), generate(
            params, cache, first, jax.random.key(0), 4, WIDE, where=where)[0]

    jax.tree.map(close, jax.jit(partial(logits_of, where))(), jax.jit(partial(logits_of, HERE))())


def test_fsdp_by_the_compiler_is_the_loss_of_one_device():
    mesh, params, tokens = shard.make_mesh(data=8), weights(WIDE), draw_tokens(WIDE, 8, 7)
    expected = jax.jit(jax.value_and_grad(loss), static_argnums=2)(params, tokens, WIDE)
    placed = shard.place(params, WIDE, mesh, shard.FSDP)
    assert placed.layers[0].wq.addressable_shards[3].data.shape == (1, 4, 16)
    run = jax.jit(jax.value_and_grad(partial(shard.fsdp_loss, cfg=WIDE, mesh=mesh)))
    jax.tree.map(close, run(placed, tokens), expected)


def split_causally(run, mesh, T, *args):
    """`run` of arrays BTHD or BKTD whose T tokens are split as ring attention needs them, with
    results in the order of one device."""
    n = mesh.shape["context"]
    token = np.concatenate([np.arange(T)[i::n] for i in range(n)])
    by = [jax.P(*("context" if size == T else None for size in a.shape)) for a in args]
    dims_ = [spec.index("context") for spec in by]
    split = [jnp.take(a, token, dim) for a, dim in zip(args, dims_)]
    results = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=tuple(by), out_specs=(
        by[0], *by[:3])))(*split)
    return [jnp.take(a, np.argsort(token), dim)
            for a, dim in zip(results, (dims_[0], *dims_[:3]))]


@pytest.mark.parametrize("n, H, K, dtype", [(2, 4, 2, "float32"), (3, 3, 1, "float32"),
                                            (4, 2, 2, "bfloat16"), (8, 4, 1, "float32")])
def test_ring_attention_and_its_gradient_are_those_of_causal_attention(n, H, K, dtype):
    T, mesh = n * (131 if n == 2 else 5), shard.make_mesh(context=n)  # two blocks a device, or one
    q, k, v, dy = (jnp.asarray(a, dtype) for a in normals(
        (2, T, H, 4), (2, K, T, 4), (2, K, T, 4), (2, T, H, 4)))

    def value_and_gradient(attention, q, k, v, dy):
        out, back = jax.vjp(attention, q, k, v)
        return out, *back(dy)

    results = split_causally(partial(value_and_gradient, lambda *qkv: shard.ring_attention(
        *qkv, "context")), mesh, T, q, k, v, dy)
    expected = jax.jit(partial(value_and_gradient, causal_attention))(q, k, v, dy)
    tolerance = TOLERANCE if dtype == "float32" else 2 ** -6  # parts are rounded, then their sum
    for a, b in zip(results, expected):
        close(np.asarray(a, np.float32), np.asarray(b, np.float32), tolerance)


def where_of(axes, layout="heads", ring=0):
    return shard.Where(shard.make_mesh(**axes), layout, ring)


@pytest.mark.parametrize("axes, layout, ring, cfg, dtype, kind", [
    (dict(tensor=2), "heads", 1, replace(WIDE, L=1), "float32", None),
    (dict(data=(2, 2), tensor=2), "heads", 0, replace(WIDE, qk_norm=True), "int8", None),
    (dict(tensor=4), "context", 0, replace(WIDE, L=1, K=1), "int8", Q8),
    (dict(tensor=3), "sequence", 0, replace(WIDE, L=1, E=24, H=6, K=2, V=33), "float32", None),
    (dict(tensor=(2, 2)), "batch", 0, replace(WIDE, K=2, tied=False), "float32", Q8),
    (dict(tensor=(2, 2)), "context", 2, replace(WIDE, L=1, K=2), "float32", None)])
@settings(max_examples=settings.default.max_examples // 16)
@given(MOVES, seeds)
def test_any_mixture_on_a_mesh_is_recomputation(axes, layout, ring, cfg, dtype, kind, moves, seed):
    """The cache lives on the mesh from the start; weights that nobody placed are moved there."""
    mix(Mixture(cfg, where_of(axes, layout, ring), dtype, kind, seed), moves)


@pytest.mark.parametrize("axes, layout, how", [
    (dict(data=2, tensor=(2, 2)), "batch", dict(sampling=Sampling(0.8, 9))),
    (dict(data=2, tensor=4), "context", dict(end=3))])
def test_a_split_model_serves_what_one_device_does(axes, layout, how):
    cfg, where = replace(WIDE, L=1), where_of(axes, layout)
    params, prompts = weights(cfg), [draw_tokens(cfg, 1, T, seed=T)[0] for T in (3, 11, 5, 8, 2)]
    requests = prompts, 4, 20, 6, jax.random.key(1), cfg
    how = how | dict(stride=4, cache_dtype="int8")
    alone, split = dict(serve(params, *requests, **how)), dict(
        serve(where.place(params, cfg), *requests, **how, where=where))
    assert len(split) == 5 and all(np.array_equal(split[i], alone[i]) for i in alone)


@pytest.mark.parametrize("n, sampling", [
    (3, GREEDY), (8, Sampling(0.7)), ((2, 3), Sampling(0.7, 3)), (8, Sampling(30.0, 40)),
    (3, Sampling(0.7, 1, 0.6)), ((2, 3), Sampling(30.0, 0, 0.6))])
@given(st.booleans(), st.integers(0, 9999))
def test_split_logits_draw_the_token_that_whole_ones_do(n, sampling, wild, seed):
    """From the same logits, with ties, and where they are not finite."""
    V, B = 24, 5
    logits = np.round(normals((B, V), seed=seed)[0], 1)
    if wild:
        np.put(logits, np.random.default_rng(seed).integers(0, B * V, 30),
               [np.inf, -np.inf, np.nan])
        logits[1] = -np.inf
    args = jax.random.key(seed), logits, jnp.arange(B)
    assert np.array_equal(*(draw(*args) for draw in draws(n, sampling)))


@lru_cache(maxsize=None)
def draws(n, sampling):
    """`split_sample` over n devices, and `sample`, compiled."""
    mesh = shard.make_mesh(tensor=n)
    split = jax.P(None, shard.axes_of(mesh, "tensor"))
    return jax.jit(jax.shard_map(
        lambda *args: shard.split_sample(*args, sampling, axis=split[1]), mesh=mesh,
        in_specs=(jax.P(), split, jax.P()), out_specs=jax.P())), jax.jit(
            lambda *args: sample(*args, sampling))


def test_a_cache_that_is_moved_from_layout_to_layout_keeps_its_contents():
    mesh, cfg = shard.make_mesh(tensor=(2, 2)), WIDE
    shape = (4, cfg.K, 24, cfg.D)
    cache = init_cache(cfg, 4, 24)._replace(k=tuple(map(jnp.asarray, normals(shape, shape))))
    moved = cache
    for layout in ("sequence", "heads", "context", "batch"):
        moved = shard.Where(mesh, layout).place_cache(cfg, moved)
        k = moved.k[0]
        assert infer.slots_of(moved) == 24 and (k.ndim == 5) == (layout in ("sequence", "context"))
        if k.ndim == 5:  # a device has every other slot of a row
            part = next(part for part in k.addressable_shards if part.index[2].start)
            assert np.array_equal(part.data[:, :, 0], cache.k[0][part.index[:2]][:, :, 1::2])
    assert same(shard.Where(mesh).move(moved), cache)
    empty, logits = shard.Where(mesh, "sequence").empty(cfg, 4, 24, "int8")
    assert empty.k[0].q.sharding.shard_shape(empty.k[0].q.shape) == (4, 2, 1, 12, cfg.D)
    assert logits.sharding.shard_shape(logits.shape) == (4, cfg.V // 4)


def test_axes_of_a_mesh_follow_the_devices_coordinates():
    class Device:
        def __init__(self, id, coords):
            self.id, self.coords, self.process_index, self.platform = id, coords, 0, "tpu"

    devices = [Device(i, (i % 2, i // 2 % 2, i // 4)) for i in range(16)]
    mesh = shard.make_mesh(devices, data=(2, 2), tensor=4)
    assert dict(mesh.shape) == {"data0": 2, "data1": 2, "tensor": 4}
    assert all(mesh.devices[place].coords == place for place in np.ndindex(2, 2, 4))
    assert shard.axes_of(mesh, "data") == ("data0", "data1")
    assert shard.spec("HD E", WIDE, mesh, {**shard.TENSOR, **shard.FSDP}) == jax.P(
        ("tensor", "data0"), None, "data1")  # 8 heads in 4 x 2 parts, then E
    assert shard.spec("E", WIDE, mesh, {**shard.TENSOR, **shard.FSDP}) == jax.P(None)


# ------------------------------------------------------------------------------ shard: what is sent


@pytest.mark.parametrize("axes, layout, ring, dtype", [
    (dict(data=2, tensor=4), "heads", 0, "float32"), (dict(tensor=4), "heads", 1, "bfloat16"),
    (dict(tensor=4), "heads", 2, "float32"), (dict(tensor=(2, 2)), "batch", 0, "bfloat16"),
    (dict(data=2, tensor=4), "sequence", 0, "float32"), (dict(tensor=4), "context", 2, "bfloat16"),
    (dict(data=(2, 2), tensor=1), "heads", 1, "float32")])
def test_the_steps_of_a_layer_send_what_the_program_sends_to_the_byte(
        axes, layout, ring, dtype, monkeypatch):
    """A decode step, a chunk with the logits of all its tokens, and a prefill, with partial sums in
    the dtype of the activations. Norms of a chunk and of a prefill are split."""
    cfg, B, T, n = replace(WIDE, dtype=dtype), 8, 6, 3
    where = shard.Where(shard.abstract_mesh(**axes), layout, ring, dtype)
    monkeypatch.setattr(shard, "is_norm_split", lambda rows, E: rows > B and E == cfg.E)
    cache, params = jax.eval_shape(lambda: init_cache(cfg, B, 24, dtype)), abstract(cfg)
    data, tensor = (shard.as_axes(axes.get(name, 1)) for name in ("data", "tensor"))
    formula = partial(shard.step_comm, cfg, B // math.prod(data), axes=tensor, layout=layout,
                      ring=ring, sums=dtype)

    def verify(params, cache, tokens):
        x, cache = extend(params, cache, tokens, cfg, where=where)
        return where.unembed(params, x, cfg), cache

    def total(times, steps):
        return sum((shard.repeat(times * number, events) for number, events in steps.values()),
                   Counter())

    assert shard.traced_events(partial(generate, n=n, cfg=cfg, where=where), params, cache,
                   shaped(B, cfg.V, dtype="float32"), jax.random.key(0)) == total(n, formula(T=1))
    assert shard.traced_events(verify, params, cache, shaped(B, T)) == total(1, formula(T=T))
    if layout != "context":
        assert shard.traced_events(partial(prefill, cfg=cfg, where=where), params, cache,
                                   shaped(B, T), shaped(B)) == total(1, formula(T=T, prompt=True))
    if ring:
        layer = total(1, {name: formula(T=1)[name] for name in ("q, k, v", "out")})
        hops = sum(n for (kind, *_), n in layer.items() if kind == "permute")
        assert hops == 2 * cfg.L * ring * (math.prod(tensor) - 1)


@pytest.mark.parametrize("axes, L", [((8,), 2), ((2, 4), 3), ((2, 2, 2), 1)])
@pytest.mark.parametrize("tied", [True, False])
def test_fsdp_sends_a_layers_weights_three_times(axes, L, tied):
    """The gathers and scatters of the program are those of the formula; what else it sends are the
    gradients of norm scales and the loss. In bytes: three times what the other devices hold."""
    cfg = replace(WIDE, E=32, L=L, tied=tied, dtype="bfloat16")
    run = jax.grad(partial(shard.sharded_loss, cfg=cfg, mesh=shard.abstract_mesh(
        data=axes, tensor=1)))
    sent = shard.traced_events(run, jax.eval_shape(shard.stack, abstract(cfg)), shaped(8, 7))
    weights = shard.tally({event: n for event, n in sent.items() if event[0] != "all_reduce"})
    assert weights == shard.tally(shard.fsdp_comm(cfg, axes))
    matrices = [name for name in jax.tree.leaves(dims(cfg).layers) if " " in name]
    tables = [name for name in jax.tree.leaves(dims(cfg)._replace(layers=())) if " " in name]
    size = 3 * sum(minillm.size_of(name, cfg) for name in matrices) + 2 * sum(
        minillm.size_of(name, cfg) for name in tables)
    assert sum(sent for _, sent in weights.values()) == 2 * size * 7 // 8


def test_collectives_are_counted_as_a_ring_sends_them():
    mesh, last, axis = shard.abstract_mesh(tensor=4), jax.P("tensor"), "tensor"

    def sent(fn, out=last):
        run = jax.shard_map(fn, mesh=mesh, in_specs=last, out_specs=out)
        return shard.traced_comm(run, shaped(16, dtype="float32"))  # 4 numbers, 16 bytes a device

    assert sent(lambda x: jax.lax.all_gather(x, axis, tiled=True)) == {"all_gather": (1, 3 * 16)}
    assert sent(lambda x: jax.lax.psum_scatter(x, axis, tiled=True)) \
        == {"reduce_scatter": (1, 3 * 4)}
    for reduce_ in (jax.lax.psum, jax.lax.pmax, jax.lax.pmin):
        assert sent(lambda x: reduce_(x, axis), jax.P()) == {"all_reduce": (1, 2 * 3 * 4)}
    assert sent(lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True)) == {
        "all_to_all": (1, 3 * 4)}
    assert sent(lambda x: jax.lax.scan(lambda c, _: (shard.pass_on(c, axis), None), x,
                                       length=5)[0]) == {"permute": (5, 5 * 16)}
    with pytest.raises(ValueError, match="while"):
        sent(lambda x: jax.lax.while_loop(lambda c: True, lambda c: shard.pass_on(c, axis), x))


@pytest.mark.parametrize("keep", [(), KEEPABLE])
def test_fsdp_saves_a_layers_input_what_it_is_told_to_keep_and_one_gathered_layer(keep):
    """12 more layers may save 12 times BTE and what is named; gradients are outputs, not
    temporaries, and a gathered layer exists once."""
    B, T, mesh = 8, 64, shard.make_mesh(data=8, tensor=1)
    cfg = Config(L=4, E=64, H=4, K=4, D=16, F=128, V=32)

    def temporaries_of(L):
        deep = replace(cfg, L=L)
        split = shard.stacked(shard.specs(deep, mesh, {**shard.TENSOR, **shard.FSDP}))
        params = jax.tree.map(lambda a, spec: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec)),
            jax.eval_shape(shard.stack, abstract(deep)), split)
        run = jax.value_and_grad(partial(shard.sharded_loss, cfg=deep, mesh=mesh, keep=keep))
        return memory(run, params, shaped(B, T + 1)).temp_size_in_bytes

    named = dict(attention=cfg.H * (cfg.D + 1), qkv=(cfg.H + 2 * cfg.K) * cfg.D, gate=cfg.F,
                 up=cfg.F)
    saved = B // 8 * T * (cfg.E + sum(named[name] for name in keep)) * 4
    layer = sum(4 * minillm.size_of(name, cfg) for name in jax.tree.leaves(dims(cfg).layers[0]))
    assert temporaries_of(16) <= temporaries_of(4) + 12 * saved + layer


def test_what_cannot_be_split_is_refused_by_name_before_compiling():
    mesh, params, text = shard.make_mesh(data=2, tensor=4), weights(WIDE), draw_tokens(WIDE, 4, 6)
    cache, four = init_cache(WIDE, 4, 24), shard.make_mesh(tensor=4)
    few, odd, stacked = replace(WIDE, K=2), replace(WIDE, F=22), shard.stack(params)

    def extended(cache, mesh=four, layout="heads", cfg=WIDE, rows=4):
        return lambda: extend(weights(cfg), cache, text[:rows], cfg,
                              where=shard.Where(mesh, layout))

    def trained(tokens=text, mesh=mesh, params=stacked, **how):
        return lambda: shard.sharded_loss(params, tokens, WIDE, mesh, **how)

    for call, *words in (
            (lambda: shard.make_mesh(tensor=9), "9 devices", "there are 8", "jax_num_cpu_devices"),
            (lambda: shard.place(params, WIDE, mesh, dict(E="model")), "'model'", "data"),
            (lambda: shard.shardings(WIDE, mesh, dict(Q="data")), "Q=", "EHKDFV"),
            (lambda: shard.shardings(WIDE, mesh, dict(H=("tensor", "model"))), "model", "tensor"),
            (lambda: shard.shardings(WIDE, mesh, dict(H="data", E="data")), "same axis"),
            (lambda: shard.place(weights(odd), odd, mesh, shard.TENSOR), "F=22", "4 devices"),
            (extended(init_cache(few, 4, 24), cfg=few), "K=2", "batch and sequence", "'heads'"),
            (extended(cache, layout="slots"), "slots", "sequence"),
            (extended(init_cache(WIDE, 4, 22), layout="sequence"), "S=22"),
            (extended(cache._replace(length=jnp.full(4, 20))), "20 tokens", "24 slots"),
            (lambda: shard.Where(four, ring=3), "ring=3", "(0, 1, 2)"),
            (lambda: shard.Where(four, "sequence", cached=reference), "sequence", "reference"),
            (lambda: shard.Where(four, "context", causal=reference), "context", "reference"),
            (lambda: shard.sharded_loss(stacked, text, WIDE, shard.make_mesh(
                data=1, context=5, tensor=1), causal=reference), "context", "reference"),
            (lambda: shard.Where(four, "context").empty(WIDE, 4, 22), "S=22", "4 devices"),
            (lambda: prefill(params, cache, text, np.full(4, 6), WIDE, rows=2, where=shard.Where(
                four)), "rows=2", "one device"),
            (trained(text[:3]), "B=3", "2 devices", "data"),
            (trained(keep=("gates",)), "gates", "attention, qkv, gate, up"),
            (trained(params=params), "stack(params)"),
            (trained(mesh=shard.make_mesh(data=4)), "tensor=1"),
            (trained(mesh=shard.make_mesh(data=1, context=4, tensor=1)), "T=5", "4 devices",
             "context"),
            (lambda: shard.fsdp_loss(params, text, WIDE, four), "'data'"),
            (lambda: shard.fsdp_loss(params, text, WIDE, shard.make_mesh(data=1, context=5)),
             "sharded_loss")):
        check(call, *words)
    last = jax.P(None, None, "tensor")
    x, w = normals((1, 1, 24), (8, 32))
    for enter, leave in shard.RINGS.values():
        for norm, words in ((None, ["4 parts of 6", "32"]), ((x[0, 0, :6], 0.0), ["norm", "6"])):
            weight = w if norm is None else w[:, :24]
            check(lambda: jax.shard_map(lambda x, w: enter(x, (w,), norm=norm)[0], mesh=four,
                                        in_specs=(last, jax.P("tensor")), out_specs=last)(
                                            x, weight), *words)
        check(lambda: jax.shard_map(leave, mesh=four, in_specs=(last, jax.P(None, "tensor")),
                                    out_specs=last)(x, normals((6, 24))[0]), "E=6", "4 devices")


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("words", [
    (lambda c: replace(c.cfg, H=5), "K=2", "H=5"), (lambda c: replace(c.cfg, D=7), "D=7", "even"),
    (lambda c: replace(c.cfg, dtype="int3"), "int3", "bfloat16"),
    (lambda c: replace(c.cfg, rope_scaling=(8, 4, 1, 64)), "(8, 4, 1, 64)", "low < high"),
    (lambda c: forward(c.params, c.text + c.cfg.V, c.cfg), "vocabulary", grouped.V - 1),
    (lambda c: loss(c.params, c.text, c.cfg, chunks=0), "chunks=0", "at least one"),
    (lambda c: forward(c.params, c.text[0], c.cfg), "[B, T]"),
    (lambda c: forward(c.params, c.text[:, :0], c.cfg), "empty"),
    (lambda c: c.prefill(c.text[:, :0], [1, 1]), "empty"),
    (lambda c: c.prefill(c.text, [1, 7]), "length 7", "padded to 6"),
    (lambda c: c.prefill(c.text, [6]), "2 prompts"),
    (lambda c: c.prefill(c.text, [6, 6], B=3), "cache of 3"),
    (lambda c: prefill(c.params, c.cache, c.text, np.full(2, 6), c.cfg, rows=3), "rows=3", "of 2"),
    (lambda c: extend(c.params, c.filled, c.text[:, :3], c.cfg), "6 tokens", "8 slots", "S=9"),
    (lambda c: c.generate(3), "3 new", "8 slots"), (lambda c: c.generate(-1), "-1 new"),
    (lambda c: jax.jit(c.generate, static_argnums=0)(9), "9 new"),
    (lambda c: resize(c.filled, 5), "5 slots"), (lambda c: resize(c.cache, 0), "0 slots"),
    (lambda c: init_cache(c.cfg, 1, 8, "int16"), "int16", "float16"),
    (lambda c: c.speculate(c.filled, n=1), "6 tokens", "8 slots", "S=10"),
    (lambda c: c.speculate(init_cache(c.cfg, 2, 20), n=9), "8 slots", "width 12"),
    (lambda c: c.speculate(c.cache, n=1, n_draft=0), "n_draft=0"),
    (lambda c: c.speculate(c.cache, n=1), "two or more"),
    (lambda c: c.serve([c.text[0], [c.cfg.V]]), "request 1", grouped.V),
    (lambda c: c.serve([[]]), "request 0")],
    ids=lambda words: " ".join(map(str, words[1:])))
def test_bad_input_is_refused_by_name_before_work_starts(words):
    class case:
        cfg, params, key = grouped, weights(grouped), jax.random.key(0)
        text, cache = draw_tokens(cfg, 2, 6), init_cache(cfg, 2, 8)
        filled, logits = cache._replace(length=jnp.array([3, 6])), jnp.zeros((2, cfg.V))

        def prefill(text, lengths, B=2, S=8):
            return prefill(case.params, init_cache(grouped, B, S), text, np.array(lengths), grouped)

        def generate(n):
            return generate(case.params, case.filled, case.logits, case.key, n, grouped)

        def speculate(cache, n, n_draft=2):
            return speculate(case.params, cache, jnp.pad(case.text, ((0, 0), (0, 2))), case.key, n,
                             grouped, ngram_draft, None, n_draft)

        def serve(prompts, S=8, n=2):
            return list(serve(case.params, prompts, 2, S, n, case.key, grouped))

    call, *expected = words
    check(lambda: call(case), *expected)


# -------------------------------------------------------------------------------------------- bench


TINY = "L1,E16,H2,K1,D8,F24,V256"
LIMITS = {"flops_per_second": {"float32": 1e12, "bfloat16": 2e12, "int8": 4e12},
          "read_bytes_per_second": 1e11}


def settled(phase, model=TINY, **options):
    return bench.settle(bench.Job(phase, model, **options))


@pytest.fixture
def calm(monkeypatch):
    """Fixed ceilings that no machine reaches at toy sizes, and a library that takes a millisecond,
    so that nothing depends on timing; and few runs."""
    monkeypatch.setattr(bench, "measure_flops", lambda dtype: 1e15)
    monkeypatch.setattr(bench, "measure_read", lambda: 1e15)
    monkeypatch.setattr(bench, "seconds_alone", lambda fn, arguments: 1e-3)
    monkeypatch.setattr(bench, "seconds_of", partial(bench.seconds_of, seconds=0))


def result_of(capsys, tmp_path, *argv):
    """A command's result as JSON, and what it prints."""
    capsys.readouterr()
    bench.main([*map(str, argv), "--json", str(tmp_path / "rows.json")])
    return json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out


@pytest.mark.parametrize("phase", bench.COSTS)
def test_a_row_has_its_job_its_prediction_and_the_programs_flops_and_bytes(
        phase, calm, capsys, tmp_path):
    batches = [1, 2] if phase in ("generate", "prefill") else [2]
    result, out = result_of(capsys, tmp_path, phase, "--model", TINY, "--batch", ",".join(
        map(str, batches)), "--dtype", "bfloat16", "--prompt", 6, "--new", 3)
    assert result["machine"].keys() >= {"device", "count", "cores", "jax", "python"}
    rows = [row for row in result["rows"] if row["phase"] == phase]
    assert [row["batch"] for row in rows] == batches and "took/library" in out
    for row in rows:
        job = settled(phase, batch=row["batch"], dtype="bfloat16", prompt=6, new=3)
        assert row.keys() >= bench.ROW.keys() and row["mfu"] is not None and row["runs"] >= 1
        assert {name: row[name] for name in vars(job)} == vars(job)
        for name, each in (("limit_seconds", "seconds"), ("library_seconds", "library_seconds")):
            assert row[name] == pytest.approx(sum(part[each] for part in row["parts"]))
        if phase == "serve":  # it runs on the host, of programs that the other rows hold
            continue
        args = bench.prepare(job).args
        assert row["alias_bytes"] <= row["argument_bytes"] <= row["peak_bytes"]
        assert row["formula_bytes"] >= row["argument_bytes"] >= sum(
            a.nbytes for a in jax.tree.leaves(args[0]))
        if phase == "speculate":  # in a loop of unknown length; a round is what verify is
            assert row["program_flops"] is None and 1 <= row["tokens_per_round"] <= 5
            assert row["flops"] == sum(decode_flops(job.cfg, 2, row["S"], 5).values())
            continue
        assert row["program_flops"] == row["flops"]
        if phase != "train":  # whose bytes come and go three times
            cache = args[1][0] if phase == "generate" else args[1]
            slots = sum(a.nbytes for a in jax.tree.leaves(cache[:2]))
            written = 0 if phase == "prefill" else kv_bytes(job.cfg, row["batch"], row["T"])
            assert row["cache_bytes"] == slots + written
            assert row["weight_bytes"] == sum(w.nbytes for w in jax.tree.leaves(args[0]))


def test_json_to_stdout_is_all_that_stands_there(calm, capsys):
    bench.main(["verify", "--model", TINY, "--prompt", "6", "--batch", "2", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["rows"][0]["phase"] == "verify"


def test_interrupted_it_prints_what_it_has(calm, capsys, monkeypatch, tmp_path):
    make_row, rows = bench.make_row, []

    def interrupted(*args):
        if rows:
            raise KeyboardInterrupt
        rows.append(make_row(*args))
        return rows[0]

    monkeypatch.setattr(bench, "make_row", interrupted)
    result, _ = result_of(capsys, tmp_path, "prefill", "--model", TINY, "--batch", "1,2",
                          "--prompt", 6)
    assert len(result["rows"]) == 1


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([*bench.COSTS]),
       st.sampled_from(["float32", "bfloat16"]))
def test_limits_grow_with_batch_and_tokens_and_no_part_beats_either_limit(B, T, phase, dtype):
    def seconds(B, T):
        job = settled(phase, "L2,E64,H4,K2,D16,F192,V256", batch=B, prompt=T, new=8, dtype=dtype)
        cost, result = bench.COSTS[phase](job), bench.predict(job, LIMITS)
        for part, own in zip(result["parts"], cost.parts):
            times = {"flops": part["flops"] / LIMITS["flops_per_second"][own.dtype],
                     "bytes": part["bytes"] / LIMITS["read_bytes_per_second"]}
            assert part["seconds"] == max(times.values()) == times[part["bound"]]
        assert result["limit_seconds"] == pytest.approx(sum(
            part["seconds"] for part in result["parts"]))
        return result["limit_seconds"]

    assert seconds(B, T) <= seconds(B + 1, T) and seconds(B, T) <= seconds(B, T + 1)


@pytest.mark.parametrize("phase, dtype, int8", [
    ("train", "float32", ""), *((phase, *kind) for phase in bench.COSTS if phase != "train"
                                for kind in (("float32", ""), ("int8", "Q8"), ("int8", "Q8A8")))])
def test_operations_that_run_alone_multiply_what_the_step_multiplies(
        phase, dtype, int8, monkeypatch):
    """If an operation alone takes a second for each flop of its program, the library's parts take
    as many seconds as the step's parts have flops."""
    monkeypatch.setattr(bench, "seconds_alone", lambda fn, arguments: traced_flops(
        fn, *arguments[0]) or 1)
    for name in ("matmul_rate", "attention_seconds", "optimizer_rate"):
        monkeypatch.setattr(bench, name, getattr(bench, name).__wrapped__)
    for B, T in ((2, 6), (20, 128)):
        job = settled(phase, "L2,E16,H4,K2,D8,F24,V256", batch=B, prompt=T, new=5, dtype=dtype,
                      int8=int8)
        parts = bench.COSTS[phase](job).parts
        flops = [part.flops for part in parts if part.flops]
        assert bench.library_seconds(job)[:len(flops)] == pytest.approx(flops)


def test_the_kind_of_int8_is_given_or_the_faster_one(monkeypatch):
    for faster in bench.INT8:
        monkeypatch.setattr(bench, "matmul_rate", lambda cfg, rows, kind: kind == faster)
        jobs = [settled("generate", dtype=dtype, int8=kind) for dtype, kind in (
            ("float32", ""), ("int8", ""), ("int8", "Q8"), ("int8", "Q8A8"))]
        assert [bench.fastest_int8(job).int8 for job in jobs] == ["", faster, "Q8", "Q8A8"]


def test_a_few_percent_above_a_ceiling_are_all_of_it_and_more_is_an_error():
    row = bench.predict(settled("prefill", prompt=4), LIMITS)
    fastest = row["flops"] / 1e12
    for share, expected in ((0.5, 0.5), (1.04, 1), (1.06, None)):
        found = bench.shares(row, fastest / share, LIMITS, "float32")
        assert found["mfu"] == (expected and pytest.approx(expected))


def quick_text(tmp_path):
    path = tmp_path / "text"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    return str(path)


@files
def test_a_trained_model_is_saved_and_completed_alike_with_every_draft(calm, capsys, tmp_path):
    folder = str(tmp_path / "model")
    result, out = result_of(capsys, tmp_path, "train", "--text", quick_text(tmp_path), "--steps",
                            60, "--model", TINY, "--prompt", 32, "--lr", 0.01, "--new", 8, "--save",
                            folder)
    row, = result["rows"]
    assert abs(row["loss_before"] - math.log(256)) < 1 and row["loss_after"] < 2.5
    assert "goes on" in out and row["mfu"] is not None

    def complete(*more):
        capsys.readouterr()
        bench.main(["complete", "--model", folder, "the quick", "--new", "20", *more])
        text, speed = capsys.readouterr().out[:-1].rsplit("\n", 1)
        assert "prefill of 9 tokens" in speed and "tokens/s" in speed
        assert ("tokens a round" in speed) == ("--draft" in more)
        return text, speed

    plain, _ = complete()
    assert plain.startswith("the quick") and len(plain) == 29
    assert complete("--draft", "ngram", "--n-draft", "3", "--devices", "2")[0] == plain
    again, speed = complete("--draft", folder, "--dtype", "float32")
    assert again == plain and "5.00 tokens a round" in speed  # all 4 and one more: it is itself
    assert "weights int8, cache int8" in complete("--dtype", "int8", "--cache", "int8")[1]
    sampled = [complete("--temperature", "1", "--top-k", "9", "--seed", seed)[0] for seed in "112"]
    assert sampled[0] == sampled[1] != sampled[2]


@files
def test_a_resumed_run_is_one_longer_run_bit_for_bit(calm, capsys, tmp_path):
    text = quick_text(tmp_path)

    def train(steps, *more):
        bench.main(["train", "--text", text, "--steps", str(steps), "--prompt", "16", "--new", "2",
                    "--batch", "3", *map(str, more)])

    train(5, "--model", TINY, "--save", tmp_path / "whole")
    train(3, "--model", TINY, "--save", tmp_path / "part")
    train(2, "--resume", tmp_path / "part", "--save", tmp_path / "part")
    assert same(*(load_state(tmp_path / name)[1:] for name in ("whole", "part")))
    for more, word in ((["--resume", tmp_path], "state.safetensors"),
                       (["--resume", tmp_path / "part", "--batch", "4"], "--batch 3"),
                       (["--resume", tmp_path / "part", "--lr", "0.1"], "--lr 0.001"),
                       (["--resume", tmp_path / "part", "--text", __file__], "--text"),
                       (["--resume", tmp_path / "part", "--model", "L1,E8,H2,K1,D4,F8,V256"],
                        "--model"), (["--resume", tmp_path / "part", "--kv-heads", "1"], "heads")):
        with pytest.raises(SystemExit) as caught:
            train(1, *more)
        assert word in str(caught.value.code)


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
    words.add_special_tokens(["<pad>"])  # decodes to nothing
    words.enable_truncation(2)
    words.enable_padding(length=30)
    words.save(str(folder / "tokenizer.json"))
    return words, len(vocab) + 1


@files
@pytest.mark.parametrize("seed", range(3))
def test_text_is_printed_once_and_whole_however_it_is_spelled(seed, capsys, tmp_path, monkeypatch):
    """Most tokens of this model are single bytes, of which few make a character, and some decode to
    nothing; a byte that is a character on its own is none any more once its neighbours are broken.
    """
    _, V = byte_fallback(tmp_path)
    cfg, step, prompt = Config(L=1, E=8, H=2, K=1, D=4, F=8, V=V), bench.generating, "abc \u6c34 a"
    save(tmp_path, cfg, weights(cfg))
    spelled = [2 + byte for byte in "\u6c34".encode()] + [V - 2, 2 + ord("b"), V - 1]

    def spelling(*args):
        for made, rounds in step(*args):  # some of what it draws is replaced by whole characters
            draw = np.random.default_rng(seed)
            yield [spelled[i % 6] if draw.random() < 0.8 else token
                   for i, token in enumerate(made)], rounds

    monkeypatch.setattr(bench, "generating", spelling)
    monkeypatch.setattr(bench, "STRIDE", 1)
    result, out = result_of(capsys, tmp_path, "complete", "--model", tmp_path, prompt,
                            "--temperature", 3, "--new", 24, "--seed", seed)
    text, speed = out[:-1].rsplit("\n", 1)
    assert text == result["text"] and text.startswith(prompt)
    assert "prefill of 9 tokens" in speed and "\u6c34hb" in text[len(prompt):]


@lru_cache(maxsize=1)
def byte_words():
    folder = pathlib.Path(tempfile.mkdtemp())
    _, V = byte_fallback(folder)
    return infer.tokenizer(folder, Config(L=1, E=8, H=2, K=1, D=4, F=8, V=V))


@files
@given(st.lists(st.integers(0, 266), min_size=1, max_size=12))
def test_what_is_final_is_a_prefix_of_the_text_for_any_cut_of_any_ids(ids):
    words = byte_words()
    for cut in range(len(ids) + 1):
        final = words.decode(ids[:words.settled(ids[:cut])]).rstrip("\ufffd")
        assert words.decode(ids).startswith(final)


@files
def test_every_terminal_and_every_prompt(tmp_path, monkeypatch):
    """A terminal of ASCII shows what it lacks as `?`; a model of bytes takes bytes that are no
    UTF-8, and a tokenizer refuses them."""
    cfg = bench.config_of(TINY)
    save(tmp_path / "bytes", cfg, weights(cfg))
    (tmp_path / "words").mkdir()
    _, V = byte_fallback(tmp_path / "words")
    cfg = Config(L=1, E=8, H=2, K=1, D=4, F=8, V=V)
    save(tmp_path / "words", cfg, weights(cfg))

    def run(folder, text):
        screen = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
        monkeypatch.setattr(sys, "stdout", screen)
        bench.main(["complete", "--model", str(tmp_path / folder), text, "--new", "4"])
        return screen.buffer.getvalue().decode()

    assert run("words", "a\u6c34b").startswith("a?b") and "tokens/s" in run("bytes", "a\udcffb")
    with pytest.raises(SystemExit, match="no UTF-8"):
        run("words", "a\udcffb")


@files
@pytest.mark.parametrize("general, own, ends", [
    (None, 5, [5]), ([7, 8], 5, [7, 8]), (6, None, [6]), (None, None, [])])
def test_a_text_ends_where_generation_config_says_or_else_config(general, own, ends, tmp_path):
    _, V = byte_fallback(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": own}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": general}))
    cfg = Config(L=1, E=8, H=2, K=1, D=4, F=8, V=V)
    assert list(infer.tokenizer(tmp_path, cfg).ends) == ends
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    check(lambda: infer.tokenizer(tmp_path, cfg), "generation_config.json", "eos_token_id")


@files
def test_completing_needs_a_tokenizer_and_a_draft_of_the_same_vocabulary(tmp_path, monkeypatch):
    save(tmp_path / "small", CONFIGS[0], weights(CONFIGS[0]))
    cfg = bench.config_of(TINY)
    save(tmp_path / "bytes", cfg, weights(cfg))

    def refused(*argv):
        with pytest.raises(SystemExit) as caught:
            bench.main([*argv])
        return str(caught.value.code)

    small, whole = str(tmp_path / "small"), str(tmp_path / "bytes")
    run = partial(refused, "complete", "--model")
    assert "tokenizer.json is missing" in run(small, "a")
    assert "share a tokenizer" in run(whole, "ab", "--draft", small)
    assert "0 tokens: 1 or more" in run(whole, "")
    assert "1 tokens: 2 or more" in run(whole, "a", "--draft", "ngram")
    assert "top_p=0.0" in run(whole, "ab", "--top-p", "0")
    assert "No such file" in run(str(tmp_path / "nowhere"), "x")
    assert "config.json" in refused("train", "--model", TINY, "--save", f"{small}/config.json")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert 'pip install ".[hf]"' in run(small, "a")


def test_a_program_that_does_not_recite_what_it_learned_stops_the_bench(monkeypatch):
    monkeypatch.setattr(bench, "recite", lambda *_: " all the cats")
    check(lambda: bench.learn(settled("speculate"), seed=0, most=1), "all the cats", "void")


def test_fewer_key_heads_are_trained_beside_each_other(calm, capsys, tmp_path):
    result, out = result_of(capsys, tmp_path, "train", "--text", quick_text(tmp_path), "--model",
                            TINY, "--kv-heads", "2,1", "--steps", 3, "--prompt", 8, "--new", 4)
    two, one = result["rows"]
    assert (two["kv_heads"], one["kv_heads"]) == (2, 1) and "K=2: held-out loss" in out
    assert two["cache_bytes_per_token"] == 2 * one["cache_bytes_per_token"]
    assert two["parameters"] == one["parameters"] + 2 * 8 * 16 and one["loss_after"] < 7


@pytest.mark.parametrize("argv, words", [
    (["generate", "--model", "gpt-9"], ["gpt-9", "smollm2-135m", "gemma-7b"]),
    (["generate", "--model", "gema-7b"], ["did you mean gemma-7b"]),
    (["generate", "--model", "L1,E16,H2,K1,D8,F24"], ["L1,E16", "shape"]),
    (["generate", "--model", "L1,E16,H3,K2,D8,F24,V9"], ["H=3", "K=2"]),
    (["--seed", "9" * 20], ["9" * 20, "4294967295"]), (["prefill", "--batch", "1,a"], ["'a'"]),
    (["train", "--dtype", "float6"], ["float6", "float32"]),
    (["train", "--text", "no-such-file"], ["no-such-file"]),
    (["train", "--text", os.devnull], ["0 bytes"]),
    (["train", "--steps", "0"], ["'0'"]), (["train", "--dtype", "int8"], ["int8", "bfloat16"]),
    (["generate", "--cache", "int4"], ["int4", "int8"]), (["complete", "x"], ["--model"]),
    (["fly"], ["fly", "generate", "plan"]), (["generate", "--fly"], ["--fly"]),
    (["plan", "--chip", "abacus"], ["abacus", "h100"]), (["plan", "--chip", "1,2,3"], ["1,2,3"]),
    (["plan", "--mfu", "2"], ["'2'"]), (["plan", "--kv-heads", "5"], ["K=5", "H=16"]),
    (["plan", "--batch", "1,2"], ["plan takes one value"]),
    (["plan", "--train", "--chips", "4", "--batch", "6"], ["6", "4 chips", "--batch 8"]),
    (["--json", "no-such-folder/x"], ["no-such-folder"]),
    (["generate", "--model", "llama-3.1-405b"], ["GB", "free", "--model"]),
    (["generate", "--chip", "9,9,9,9"], ["9,9,9,9", "tpu-v4"]),
    (["prefill", "--layout", "heads"], ["--layout", "--chip"]),
    (["generate", "--devices", "8", "--mesh", "data=2,"], ["data=2,", "tensor=4"]),
    (["generate", "--ring", "3"], ["'3'", "0 to 2"]),
    (["serve", "--chip", "tpu-v4"], ["--chip"]), (["train", "--keep", "up"], ["--keep"]),
    (["train", "--devices", "8", "--keep", "down"], ["down", "attention"]),
    (["generate", "--int8", "Q8"], ["--int8 Q8", "--dtype int8"]),
    (["generate", "--mesh", "tensor=2"], ["tensor=2", "--devices", "--chips"]),
    (["generate", "--devices", "4", "--mesh", "data=0,tensor=4"], ["data=0", "tensor=4x4"]),
    (["generate", "--devices", "3"], ["3 devices", "E, F, H and V", "1024, 10240, 16, 256"]),
    (["generate", "--chips", "4"], ["--chips 4", "--chip"]),
    (["generate", "--devices", "2", "--by", "compiler"], ["--by compiler", "train"]),
    (["train", "--text", "x", "--profile", "y"], ["--profile", "text"]),
    (["generate", "--json", "/tmp"], ["--json /tmp", "folder"]),
    (["generate", "--chip", "tpu-v4", "--attention", "splash"], ["splash", "generate", "prefill"]),
    (["train", "--attention", "cudnn"], ["cudnn", "GPU that is here"]),
    (["generate", "--chip", "h100", "--flags", "on"], ["--flags", "TPU"]),
    (["train", "--text", "x", "--chip", "tpu-v4"], ["--text", "this machine"]),
    (["train", "--devices", "8", "--batch", "8", "--layout", "heads"], ["--layout heads", "cache"]),
    (["generate", "--devices", "8", "--mesh", "tensor=8x1"], ["K=4", "tensor=8x1"]),
    (["train", "--text", "x", "--devices", "8"], ["--text", "one device", "--devices"]),
    (["serve", "--profile", "x"], ["--profile", "serve"]), (["", "--seed", "1"], ["''", "train"]),
    (["speculate", "--model", "L2,E64,H8,K2,D8,F192,V100"], ["V=100", "V=256"]),
    (["train", "--devices", "8", "--mesh", "data=3"], ["3 devices: 8"])])
def test_a_bad_command_line_gets_one_line_that_names_the_remedy(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(argv)
    message = capsys.readouterr().err or str(caught.value.code)
    assert caught.value.code != 0 and message.strip().count("\n") == 0
    assert all(word in message for word in words), message


# --------------------------------------------------------------------------- bench: plan, profile


def test_the_lectures_napkin_line_by_line(capsys, tmp_path):
    command = "plan --model Gemma-7B --chip tpu-v4 --chips 4 --prompt 2048 --parameters 7e9"
    n, out = result_of(capsys, tmp_path, *command.split())
    assert n["weight_bytes"] == 14e9 and n["cache_bytes_per_sequence"] == 939_524_096
    assert n["cache_bytes_per_token"] == 458_752 and round(n["critical_batch"]) == 224
    assert (n["max_batch"], n["batch"]) == (121, 110)
    assert int(n["cache_bytes"] / 1e9) == 103 and int(n["generate_bytes"] / 1e9) == 117
    exact = n["exact"]
    assert exact["parameters"] == 8_537_680_896 and exact["max_batch"] == 118
    assert exact["weight_bytes"] == 17_075_361_792
    assert all(word in out for word in ("8,537,680,896", "17.1 GB", "14.0 GB", "103 GB", "117 GB"))
    as_is, grouped, small, both = n["million"]
    assert as_is["cache_bytes"] == 458_752e6 and "488 times" in out  # the lecture: 500
    assert grouped["cache_bytes"] * 16 == as_is["cache_bytes"]
    assert small["cache_bytes"] < 0.51 * as_is["cache_bytes"] and both["chips_needed"] == 1
    by_hand, _ = result_of(capsys, tmp_path, *command.replace(
        "tpu-v4", "275e12,1.23e12,32e9,18e10").split())  # two axes of links
    of_links = {"chip", "exact", "useful_degree", "weights_over_links_seconds"}
    for hand, sheet in ((by_hand, n), (by_hand["exact"], exact)):
        assert {key for key in hand if hand[key] != sheet[key]} <= of_links
    assert n["generate_expected_seconds"] > n["generate_seconds"]


MODEL_CHIP = st.tuples(st.sampled_from(sorted(bench.MODELS)), st.sampled_from(sorted(bench.CHIPS)))


def napkin(name, chip, n, context, batch, dtype="bfloat16", cache="bfloat16"):
    job = bench.Job("generate", name, chip=chip, chips=n, prompt=context, new=0, dtype=dtype,
                    cache=cache)
    return bench.napkin(job, None, batch)


@given(MODEL_CHIP, st.sampled_from([1, 2]), st.integers(1, 5000), st.integers(1, 999))
def test_a_plan_grows_with_batch_and_context_and_fewer_bytes_never_slow_it(of, n, context, batch):
    name, chip = of
    if shard.degree(bench.MODELS[name], n) < n:
        n = 1
    plan = napkin(name, chip, n, context, batch)
    for phase in ("prefill", "generate"):
        parts, seconds = plan[f"{phase}_parts"], plan[f"{phase}_seconds"]
        assert sum(part["seconds"] for part in parts) == seconds
        assert {part["name"] for part in parts} == {"weights", "attention"} | (
            {"links"} if n > 1 else set())
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
    limits = bench.sheet(bench.CHIPS[chip])
    job = bench.Job("generate", name, chip=chip, batch=10 ** 6, prompt=1, new=0, dtype=dtype,
                    cache="bfloat16", int8=int8)
    peak = limits["flops_per_second"]["bfloat16" if (dtype, int8) == ("int8", "Q8") else dtype]
    B, read = bench.critical_batch(job, limits), limits["read_bytes_per_second"]
    weights = bench.extend_cost(job).parts[0]
    assert weights.flops / 10 ** 6 * B / peak == pytest.approx(weights.bytes / read)


def fit(rows, least):
    """list of (`terms`, seconds), array -> array: the numbers for EXPECTED: least squares of the
    relative errors, of which those above 10% count linearly (Huber's loss), and none below `least`.
    """
    from scipy.optimize import least_squares  # JAX brings SciPy
    x = np.array([[term / seconds for term in terms.values()] for terms, seconds in rows])
    return least_squares(lambda numbers: x @ numbers - 1, least + 1e-3, bounds=(least, np.inf),
                         x_scale="jac", loss="huber", f_scale=0.1).x


def test_no_published_figure_is_below_its_limit_and_what_is_expected_is_their_fit():
    """With links and without; a good program's terms are never less than the limit."""
    rows = [(bench.published_row(row), row["seconds"]) for row in bench.PUBLISHED]
    for row, seconds in rows:
        assert seconds >= row["limit_seconds"] <= bench.expected(row["terms"])
    least = np.array([1, 1, 1, 1, 0, 0, 0, 0])  # nothing is faster than the sheet
    numbers = fit([(row["terms"], seconds) for row, seconds in rows], least)
    assert np.allclose(numbers, [*bench.EXPECTED.values()], rtol=5e-3)
    assert (np.array([*bench.EXPECTED.values()]) >= least).all()
    errors = [abs(bench.expected(row["terms"]) / seconds - 1) for row, seconds in rows]
    assert np.median(errors) < 0.08 and max(errors) < 0.5


def test_a_rounded_count_in_int8_takes_a_byte_a_parameter():
    job = settled("generate", "gemma-7b", chip="tpu-v4", dtype="int8", int8="Q8", new=0)
    facts = bench.napkin(job, 7e9)
    assert facts["weight_bytes"] == facts["generate_parts"][0]["bytes"] == 7e9


def test_training_is_planned_from_6BP_and_whether_links_hide(capsys, tmp_path):
    command = "plan --model llama-2-7b --chip tpu-v5p --chips 64 --train --prompt 4096"
    t = result_of(capsys, tmp_path, *command.split(), "--tokens", "2e12")[0]["training"]
    N = 6_738_415_616
    assert t["optimizer_bytes"] == 12 * N and t["gradient_bytes"] == 4 * N
    assert t["weight_flops"] == 6 * t["tokens_per_step"] * infer.multiplied(
        bench.MODELS["llama-2-7b"])
    steps = t["tokens"] / t["tokens_per_step"]
    assert t["days"] == pytest.approx(steps * t["step_flops"] / (64 * 459e12 * 0.5) / 86400)
    assert not t["communication_bound"]
    few, _ = result_of(capsys, tmp_path, *command.split(), "--batch", 64, "--prompt", 16)
    assert few["training"]["communication_bound"]  # 16 tokens a chip cannot hide all weights


@example(B=32, T=256)
@given(B=st.integers(1, 64), T=st.sampled_from([16, 64, 100, 192, 256, 1000, 3000]))
def test_bench_prefills_groups_of_one_to_two_thousand_tokens_or_all(B, T):
    rows = bench.rows_at_a_time(settled("prefill", batch=B, prompt=T))
    assert rows is None or B % rows == 0 and 1024 <= rows * T <= 2048 < B * T


def products(jaxpr, path=""):
    """Of every product: the named scopes that it stands in."""
    for eqn in jaxpr.eqns:
        own = f"{path}/{eqn.source_info.name_stack}"
        if eqn.primitive.name == "dot_general":
            yield own
        for inner in minillm.inner_jaxprs(eqn):
            yield from products(inner, own)


@pytest.mark.parametrize("phase", sorted({*bench.COSTS} - {"serve"}))
def test_every_product_stands_in_a_named_region(phase):
    prepared = bench.prepare(settled(phase, TINY + ",untied", batch=2, prompt=5, new=2))
    paths = products(jax.make_jaxpr(prepared.step)(*prepared.args).jaxpr)
    assert {next(word for word in re.split(r"[/()]", path)[::-1] if word in bench.REGIONS)
            for path in paths} == {"qkv", "attention", "out", "mlp", "unembed"}


@pytest.mark.parametrize("phase, B", [("train", 2), ("generate", 1)])
def test_a_profile_attributes_the_operations_time_to_named_regions(phase, B, optimised, tmp_path):
    job = settled(phase, "L1,E128,H4,K2,D32,F384,V256", batch=B, prompt=64, new=4)
    prepared = bench.prepare(job)
    bench.measure(prepared, bench.inspect(prepared)[0])
    found = bench.profile(prepared, tmp_path)
    assert sum(op["share"] for op in found["operations"]) == pytest.approx(1)
    assert sum(found["regions"].values()) == pytest.approx(1)
    # by number, which no other program's work changes; some names a compiler drops
    named = [op for op in found["operations"] if op["region"] != "?"]
    assert sum(op["times"] for op in named) >= 0.94 * sum(
        op["times"] for op in found["operations"] if op["kind"] != "copy" or op in named)
    assert {op["region"] for op in named} >= {"qkv", "attention", "out", "mlp", "unembed"} | (
        {"loss", "optimizer"} if phase == "train" else set())
    assert any((op["kind"], op["region"]) == ("product", "mlp") for op in found["operations"])
    assert list(tmp_path.glob("**/perfetto_trace.json.gz"))


HIDDEN = """HloModule jit_step, is_scheduled=true

%cond (c: (s32[], f32[1000,1000])) -> pred[] {
  %c = (s32[], f32[1000,1000]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%fused (p: f32[1000,1000]) -> f32[1000,1000] {
  %p = f32[1000,1000]{1,0} parameter(0)
  ROOT %copied = f32[1000,1000]{1,0} copy(%p)
}

%body (b: (s32[], f32[1000,1000])) -> (s32[], f32[1000,1000]) {
  %b = (s32[], f32[1000,1000]{1,0}) parameter(0)
  %x = f32[1000,1000]{1,0} get-tuple-element(%b), index=1
  %start = (f32[1000,1000]{1,0}, f32[4000,1000]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}
  %work = f32[1000,1000]{1,0} multiply(%x, %x), metadata={op_name="step/mlp/mul"}, backend_config={"estimated_cycles":"4200"}
  %done = f32[4000,1000]{1,0} all-gather-done(%start)
  %near = f32[1000,1000]{1,0:S(1)} copy(%x)
  %far = f32[1000,1000]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %sum = f32[1000,1000]{1,0} all-reduce(%far), replica_groups=mesh['data'=2,'tensor'=2] {'tensor'}, metadata={op_name="step/out/psum"}
  ROOT %next = (s32[], f32[1000,1000]{1,0}) tuple(%x, %sum)
}

ENTRY %main (a: f32[1000,1000]) -> f32[1000,1000] {
  %a = f32[1000,1000]{1,0} parameter(0)
  %loop = (s32[], f32[1000,1000]{1,0}) while(%a), condition=%cond, body=%body
  ROOT %out = f32[1000,1000]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_compiled_text_is_read_with_loops_multiplied_out():
    """A copy into a core's own memory is none, one inside a fusion is; what has lost its name
    belongs where it is used."""
    ops = {op.name: op for op in bench.operations(HIDDEN)}
    assert set(ops) == {"start", "work", "near", "far", "sum"}
    assert all(op.times == 3 for op in ops.values())
    assert (ops["far"].region, ops["far"].kind, ops["work"].cycles) == ("out", "copy", 4200)
    assert bench.collectives(ops.values()) == {
        "all_gather": {"number": 3, "bytes": 36_000_000, "asynchronous": 3},
        "all_reduce": {"number": 3, "bytes": 12_000_000, "asynchronous": 0}}
    assert bench.copied_bytes(ops.values(), HIDDEN) == 3 * 4_000_000
    job = bench.Job("train", TINY, chip="tpu-v4", chips=4)
    found = bench.by_cycles([*ops.values()], job)
    assert found["regions"] == {"mlp": pytest.approx(3 * 4200 / 1.05e9)}
    # 12 MB over both axes of a plane of 2 x 2; 4 MB, between two devices, over one
    assert found["hidden_transfer_seconds"] == pytest.approx(3 * 12e6 / 18e10)
    assert found["transfer_seconds"] == pytest.approx(3 * 4e6 / 9e10)
    step = bench.operations(HIDDEN, bench.Job("generate", TINY))
    assert {op.times for op in step} == {1}  # a step is a trip


# ------------------------------------------------------------------------ bench: several devices


@pytest.mark.parametrize("phase, options", [
    ("train", {}), ("train", dict(mesh="data=2,tensor=4", ring=1)),
    ("train", dict(mesh="data=1,context=8,tensor=1", prompt=8)),
    ("prefill", dict(layout="heads", mesh="tensor=4", devices=4)), ("prefill", dict(ring=2)),
    ("generate", dict(layout="sequence")), ("generate", dict(mesh="data=2,tensor=4")),
    ("verify", dict(mesh="tensor=4x2", layout="batch"))])
def test_a_program_on_several_devices_sends_what_the_formula_says(phase, options):
    job = settled(phase, "L2,E32,H8,K4,D8,F48,V64", batch=8, **dict(devices=8, prompt=6, new=3)
                  | options)
    prepared = bench.prepare(job)
    step, found = bench.inspect(prepared)
    formula, counted = found["sent"] or {}, found["counted"]
    assert sum(size for _, size in counted.values()) > 0
    if phase == "train":  # of FSDP's weights; without a closed form there is none
        counted = {kind: counted[kind] for kind in formula}
        assert bool(formula) == (job.axes == {"data": 8, "tensor": 1})
    assert formula == counted
    if phase != "prefill":  # a layer's wk and wv are whole on each device where slots are split
        assert found["program_flops"] >= bench.predict(job, LIMITS)["flops"]
    step(*prepared.args)


def test_two_processes_compute_what_one_device_does(beside):
    beside["two"]()
    result = json.loads((beside["folder"] / "rows.json").read_text())
    row, = result["rows"]
    assert result["machine"]["count"] == 4 and row["counted"].keys() >= {"permute", "all_reduce"}
    prepared = bench.prepare(settled("train", row["model"], batch=4, prompt=6))
    _, value = prepared.step(*prepared.args)
    assert abs(row["loss"] - value) < 1e-4


SPLIT = "L2,E512,H8,K8,D128,F1024,V1024"  # small, with dimensions that fill a TPU's tiles
CACHES = [  # chip, chips, phase, layout, cache, K, B: each value at least once
    ("tpu-v4", 4, "generate", "heads", "bfloat16", 4, 8),
    ("tpu-v4", 1, "generate", "", "int8", 1, 1),
    ("tpu-v5e", 1, "generate", "", "float32", 2, 1),
    ("tpu-v5e", 8, "generate", "batch", "bfloat16", 1, 16),
    ("tpu-v5p", 4, "generate", "sequence", "int8", 2, 4),
    ("tpu-v6e", 1, "verify", "", "bfloat16", 4, 8),
    ("tpu-v6e", 4, "verify", "sequence", "float32", 8, 2),
    ("h100", 1, "generate", "", "bfloat16", 1, 1),
    ("h100", 4, "verify", "batch", "int8", 2, 8)]


def on_chip(phase, model, chip, chips=1, **options):
    return settled(phase, model, chip=chip, chips=chips, **dict(
        batch=8, prompt=240, new=16, dtype="bfloat16", cache="bfloat16") | options)


RINGED = [on_chip("generate", SPLIT, chip, 4, ring=ring) for chip, ring in (
    ("tpu-v4", 1), ("tpu-v5e", 2))]


@pytest.fixture(scope="session")
def compiled():
    """job -> its row and operations, by the chip's compiler; skipped without its extra."""
    rows = {}

    def row(job):
        try:
            bench.check_compiler(job.chip)
        except ValueError as error:
            pytest.skip(str(error))
        if job not in rows:
            jax.config.update("jax_disable_most_optimizations", False)
            prepared = bench.prepare(job)
            rows[job] = SimpleNamespace(**bench.ROW | bench.inspect(prepared)[1], ops=prepared.ops)
            jax.config.update("jax_disable_most_optimizations", True)
        return rows[job]

    return row


@pytest.mark.parametrize("case", CACHES, ids=lambda case: "-".join(map(str, case)))
def test_a_cache_on_a_chip_is_updated_in_place(case, compiled):
    """K arrays take 64 MiB a device, then 128: more than is prefetched. Twice the slots add less
    than half of what one K array grows by, the scores of its queries apart, and no step copies an
    array of the cache from memory to memory."""
    chip, chips, phase, layout, cache, K, B = case

    def job(times):
        S = times * chips * (1 << 26) // (B * K * 128 * jnp.dtype(cache).itemsize)
        return on_chip(phase, f"L2,E512,H8,K{K},D128,F512,V512", chip, chips, batch=B, cache=cache,
                       prompt=S - 4 if phase == "generate" else S - 3, n_draft=2, layout=layout,
                       new=4 if phase == "generate" else 0)

    once, twice = compiled(job(1)), compiled(job(2))
    S = [bench.COSTS[phase](job(times)).S for times in (1, 2)]
    scores = 2 * B * 8 * {"generate": 1, "verify": 3}[phase] * (S[1] - S[0]) * 4
    scales = cache == "int8"  # which some chips turn, a thirty-second of what they scale
    assert max(once.copies, twice.copies // 2) <= scales * 2 * 2 * (1 << 26) // 32
    assert twice.temp_bytes - once.temp_bytes < (1 << 25) + scores
    assert twice.alias_bytes - once.alias_bytes >= 4 * (1 << 26)


def memory_on_chip(chip, fn, *shapes, **options):
    """Of a function that is no phase of bench, by a chip's compiler; skipped without its extra."""
    try:
        devices, _ = bench.chip_devices(chip, 1)
    except ValueError as error:
        pytest.skip(str(error))
    where = jax.sharding.SingleDeviceSharding(devices[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)
    jax.config.update("jax_disable_most_optimizations", False)
    found = jax.jit(fn, **options).lower(*shapes).compile().memory_analysis()
    jax.config.update("jax_disable_most_optimizations", True)
    return found


def test_attention_of_32768_tokens_and_its_gradient_fit_1500_MB_of_a_v4_chip():
    """H = 32, K = 8, D = 128 in bf16; half the tokens take no less than 0.45 of it."""
    def attend(q, k, v):
        out, back = jax.vjp(causal_attention, q, k, v)
        return back(out)

    half, whole = (memory_on_chip("tpu-v4", attend, *(
        shaped(*shape, dtype="bfloat16") for shape in (
            (1, T, 32, 128), (1, 8, T, 128), (1, 8, T, 128)))).temp_size_in_bytes
        for T in (16384, 32768))
    assert half < whole < min(1.5e9, 2.2 * half)


@pytest.mark.parametrize("chip", ["tpu-v5p", "h100"])
def test_a_row_is_refilled_in_place_on_a_chip(chip):
    cfg, B, S = Config(L=2, E=512, H=8, K=8, D=128, F=512, V=512, dtype="bfloat16"), 8, 8192
    cache = jax.eval_shape(lambda: init_cache(cfg, B, S, "bfloat16"))
    found = memory_on_chip(chip, partial(infer.refill, cfg=cfg), abstract(cfg), cache, shaped(
        B, cfg.V, dtype="float32"), shaped(), shaped(1, 256), shaped(1), donate_argnums=(1, 2))
    size = kv_bytes(cfg, B, S, "bfloat16")
    assert found.temp_size_in_bytes < size / 8 and found.alias_size_in_bytes >= size


def test_a_training_step_on_chips_never_holds_the_logits_of_all_its_tokens(compiled):
    """Of 8,192 tokens a chip they would take 8.6 GB in f32, and their gradient 4.3 in bf16."""
    row = compiled(on_chip("train", "L1,E256,H2,K2,D128,F256,V262144", "tpu-v4", 4, batch=16,
                           prompt=2048))
    assert row.temp_bytes < 5e9


@pytest.mark.parametrize("job", [
    on_chip("generate", SPLIT, "tpu-v5e", 4, dtype="int8", cache="int8"),
    on_chip("prefill", SPLIT + ",untied", "tpu-v4", batch=3, prompt=100),
    on_chip("verify", SPLIT, "h100", 2),
    on_chip("train", SPLIT, "tpu-v6e", 8, dtype="float32", mesh="data=4,tensor=2")],
    ids=lambda job: f"{job.phase}-{job.chip}")
def test_arguments_by_formula_are_the_compilers_but_for_padding(job, compiled):
    row, cfg, n = compiled(job), job.cfg, job.chips
    formula, table = row.formula, (not job.cfg.tied) * job.cfg.V * job.cfg.E * 2
    assert sum(formula.values()) == row.formula_bytes
    if job.chip == "h100":
        assert 0 <= row.formula_bytes - row.argument_bytes < 1024  # lengths are not looked at
    else:
        assert 0.999 < row.argument_bytes / row.formula_bytes < 1.05
    norms = (2 * cfg.L + 1) * cfg.E * (4 if job.phase == "train" else 2)
    if job.phase == "train":
        weights = norms + (param_count(cfg) * 4 - norms) // n
        assert formula["weights"] == weights and formula["optimizer"] == 2 * weights
    elif job.dtype != "int8":
        assert formula["weights"] == norms + (weight_bytes(cfg, job.dtype) + table - norms) // n
    if job.phase == "generate":
        assert 0 < formula["cache"] - kv_bytes(cfg, job.batch, 256, job.cache) // n <= 4 * 8


def test_gemma_7b_generates_110_sequences_on_four_v4_chips_and_128_are_refused(compiled):
    job = on_chip("generate", "gemma-7b", "tpu-v4", 4, batch=110, prompt=2032)
    row = compiled(job)
    assert row.fits and row.copies == 0 and row.peak_bytes < row.memory_bytes
    assert row.temp_bytes < 0.3e9 and row.alias_bytes >= kv_bytes(job.cfg, 110, 2048,
                                                                  "bfloat16") // 4
    needed = weight_bytes(job.cfg, "bfloat16") + kv_bytes(job.cfg, 128, 2048, "bfloat16")
    assert needed > 4 * row.memory_bytes
    refused = compiled(replace(job, batch=128))
    assert refused.fits is False and refused.argument_bytes is None
    assert refused.needed_bytes > refused.memory_bytes == row.memory_bytes
    assert "exceeds available HBM" in refused.message


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the newest compiler's")
def test_the_readmes_rows_of_chips_are_what_their_compilers_say(compiled, capsys):
    job = on_chip("generate", "gemma-7b", "tpu-v4", 4, batch=110, prompt=2032)
    row = vars(compiled(job)) | vars(job) | bench.predict(
        job, bench.sheet(bench.CHIPS["tpu-v4"], 4))
    bench.print_row(bench.ROW | row)
    shown = re.search(r"```\n(generate bfloat16 B=110: .*?)```", README, re.S)[1].splitlines()
    printed = capsys.readouterr().out.splitlines()
    for line in shown:  # an excerpt; versions differ in cycles, and in order
        label = line.split()[0]
        assert label in ("...", "compiler", "cycle", "regions") or line in printed
    cycles = float(re.search(r"cycle seconds +([\d.]+) ms", "\n".join(shown))[1])
    assert row["cycle_seconds"] * 1e3 == pytest.approx(cycles, rel=0.05)
    text = " ".join(README.split())
    cycles, transfers, peak, memory = map(float, re.search(
        r"compiler: (\S+) ms of cycles a step, (\S+) us of transfers, and (\S+) of (\S+) GB",
        text).groups())
    row = compiled(on_chip("generate", "llama-3-8b", "tpu-v5e", 8, prompt=2032))
    assert [row.cycle_seconds, row.transfer_seconds, row.peak_bytes, row.memory_bytes] \
        == pytest.approx([cycles / 1e3, transfers / 1e6, peak * 1e9, memory * 1e9], rel=0.05)


@pytest.mark.parametrize("chip", ["tpu-v4", "tpu-v5p"])
def test_fsdp_on_a_torus_of_chips_sends_the_formula_and_adds_up_no_whole_weight(chip, compiled):
    job = on_chip("train", "L2,E1024,H16,K16,D128,F4096,V8192", chip, 64, batch=64, prompt=128)
    assert job.axes == {"data": (4, 4, 4), "tensor": 1}
    row, flagged = compiled(job), compiled(replace(job, flags="on"))
    for found in (row, flagged):
        for kind in ("all_gather", "reduce_scatter"):
            sent = found.collectives[kind]
            assert (sent["number"], sent["bytes"]) == found.sent[kind]
        assert found.program_flops >= sum(train_flops(job.cfg, 64, 128).values())
    smallest = min(minillm.size_of(name, job.cfg) * 2
                   for name in jax.tree.leaves(dims(job.cfg).layers[0]) if " " in name)
    assert row.collectives["all_reduce"]["bytes"] < smallest
    assert row.collectives["all_gather"]["asynchronous"] == 0
    if chip == "tpu-v4":  # v5p's newest compiler refuses one of the flags
        assert flagged.collectives["all_gather"]["asynchronous"] > 0


@pytest.mark.parametrize("job", RINGED, ids=lambda job: f"{job.chip}-{job.ring}")
def test_a_ring_on_a_chip_is_asynchronous_with_a_product_between_start_and_done(job, compiled):
    row, n = compiled(job), job.chips
    sent, ops = row.collectives["permute"], [op for op in row.ops if op.times]
    assert (sent["number"], sent["bytes"]) == row.sent["permute"]
    assert sent["number"] == sent["asynchronous"] == 4 * job.cfg.L * (n - 1) * job.ring \
        + (n - 1) * job.ring
    trips = [op for op in ops if op.kind == "permute"]
    beside = [any(other.kind == "product" for other in row.ops[op.start:op.done]) for op in trips]
    # of a scatter's ring one may go alone: what it brings is added to a product made before
    assert len(trips) == sent["number"] and len(trips) - sum(beside) <= 2 * job.cfg.L


def test_ring_attention_on_a_chip_attends_to_one_part_while_the_next_one_travels(compiled):
    job = on_chip("prefill", SPLIT, "tpu-v5p", 4, batch=1, prompt=4096, cache="int8",
                  mesh="tensor=4", layout="context")
    row = compiled(job)
    sent = row.collectives["permute"]
    assert (sent["number"], sent["bytes"]) == row.counted["permute"]
    assert sent["asynchronous"] == sent["number"] == 4 * job.cfg.L * 3 and row.fits


@pytest.mark.parametrize("layout", ["batch", "sequence"])
def test_few_key_heads_on_a_plane_of_chips_send_the_formula_and_no_whole_sum(layout, compiled):
    """Of 16 chips 8 share out the key heads, and 2 the rows or slots of each; the same sums over
    all 16 at once become all-reduces."""
    job = on_chip("generate", "L2,E2048,H16,K8,D128,F4096,V4096,untied", "tpu-v5e", 16,
                  dtype="int8", layout=layout)
    assert job.axes == {"tensor": (8, 2)}
    row = compiled(job)
    for kind in ("all_gather", "reduce_scatter", "all_to_all"):
        assert (kind in row.collectives) == (kind in row.sent)
        # of a few kB, a sum is kept whole
        assert kind not in row.sent \
            or 0 <= row.sent[kind][1] - row.collectives[kind]["bytes"] <= 6144
    assert row.copies == 0 and row.collectives["all_reduce"]["bytes"] < 2e4


@pytest.mark.parametrize("phase", ["prefill", "train"])
def test_a_chips_kernel_has_no_cycles_and_a_time_by_closed_form(phase, compiled):
    """Less of attention is left to the compiler, and what chips send does not change."""
    plain, fused = (compiled(on_chip(phase, SPLIT, "tpu-v5p", 4, prompt=256, attention=attention))
                    for attention in ("plain", "splash"))
    assert fused.regions["attention"] < plain.regions["attention"] and fused.sent == plain.sent
    job = on_chip(phase, SPLIT, "tpu-v5p", 4, prompt=256, attention="splash")
    row = bench.predict(job, bench.sheet(bench.CHIPS["tpu-v5p"], 4))
    attention = row["parts"][1]
    assert row["kernel_seconds"] == max(attention["flops"] / (4 * 459e12),
                                        attention["bytes"] / (4 * 2.765e12))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the table is the newest compiler's")
@pytest.mark.parametrize("i", range(4))
def test_a_million_tokens_are_read_by_chips_and_go_on_as_the_readmes_table_says(i, compiled):
    table = re.search(r"\| 1,048,576 tokens \|.*?\n\n", README, re.S)[0].splitlines()[2:]
    phase, chips, mesh, formula, peak, planned, cycles = (
        cell.strip() for cell in table[i].strip("|").split("|"))
    job = on_chip(phase, "llama-3-8b", "tpu-v5p", int(chips), batch=1, cache="int8",
                  prompt=2 ** 20 - 16 * (phase == "generate"),
                  **dict(mesh=f"tensor={mesh}", layout="context") if mesh != "1" else {})
    row, plan = compiled(job), bench.predict(job, bench.sheet(bench.CHIPS["tpu-v5p"], job.chips))
    assert row.fits and formula == bench.si(row.formula_bytes, "B")
    assert planned == bench.si(plan["limit_seconds"], "s")
    digits = [float(text.split()[0]) * {"G": 1e9, "m": 1e-3, "s": 1}[text.split()[1][0]]
              for text in (peak, cycles)]
    assert row.peak_bytes == pytest.approx(digits[0], rel=0.05)
    assert row.cycle_seconds == pytest.approx(digits[1], rel=0.1)


@pytest.mark.parametrize("shape", sorted({shape for target in bench.TARGETS.values()
                                          for shape in target.slices.split()}))
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_axes_of_a_slice_that_tensor_leaves_are_data(shape, tensor):
    sizes = [int(size) for size in shape.split("x")]
    n = math.prod(sizes)
    if n % tensor == 0:
        data = shard.torus_axes(shape, tensor)
        assert math.prod(shard.as_axes(data)) * tensor == n
    check(lambda: shard.torus_axes(shape, 2 * n), shape, "tensor")


def test_what_no_chip_can_do_is_refused_by_name(monkeypatch):
    few = SPLIT.replace("K8", "K2")
    check(lambda: on_chip("generate", SPLIT, "tpu-v5e", 8, mesh="data=3,tensor=2"), "data=3",
          "6 devices: 8")
    check(lambda: on_chip("generate", SPLIT, "tpu-v5e", 7), "7 chips", "4 (2x2), 8 (2x4)")
    check(lambda: on_chip("generate", few, "tpu-v5e", 8, batch=16, layout="heads",
                          mesh="tensor=8"), "'heads'", "K=2", "batch or sequence")
    assert on_chip("generate", few, "tpu-v5e", 8, mesh="tensor=8").layout == "batch"
    assert on_chip("generate", few, "tpu-v5e", 8, batch=1, mesh="tensor=8").layout == "sequence"
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    for name, target in bench.TARGETS.items():
        check(lambda: bench.check_compiler(name), name, f'pip install ".[{target.extra}]"')
    monkeypatch.setattr(bench.platform, "machine", lambda: "arm64")
    check(lambda: bench.check_compiler("tpu-v4"), "Linux", "x86-64")


def test_a_phase_on_chips_prints_what_was_predicted_and_what_was_compiled(compiled, capsys,
                                                                          tmp_path):
    compiled(RINGED[0])
    result, out = result_of(
        capsys, tmp_path, "generate", "--model", SPLIT, "--chip", "tpu-v4", "--chips", 4, "--batch",
        8, "--prompt", 240, "--new", 16, "--dtype", "bfloat16", "--cache", "bfloat16", "--ring",
        "0,1")
    reference, ring = result["rows"]
    assert (ring["slice"], ring["mesh"], ring["layout"], ring["ring"]) == (
        "v4 2x2x1", "tensor=4", "heads", 1)
    assert reference["collectives"].keys() == {"all_gather", "reduce_scatter", "all_reduce"}
    assert sum(reference["regions"].values()) == pytest.approx(reference["cycle_seconds"])
    assert reference["measured_seconds"] is None and reference["operations"]
    assert any(op["number"] and op["asynchronous"] and op["done"] > op["start"] + 2
               for op in ring["operations"])
    assert "cost model, not a clock" in out and "libtpu" in out and "v4 2x2x1" in out


# ---------------------------------------------------------------------------------------- README


def test_the_readmes_python_runs_and_its_asserts_hold(beside):
    beside["README"]()


@files
def test_the_readmes_recipes_with_files_run(beside):
    beside["files"]()


def test_the_readmes_plans_are_what_the_command_prints(capsys, tmp_path):
    shown = re.findall(r"```sh\npython bench\.py (plan [^\n]*)\n```\n\n```\n(.*?)```", README, re.S)
    assert len(shown) == 3
    for command, expected in shown:
        printed = result_of(capsys, tmp_path, *shlex.split(command))[1]
        assert all(excerpt in printed for excerpt in expected.split("\n...\n"))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason='pip install ".[plot]"')
def test_all_pictures_are_drawn(calm, capsys, tmp_path, monkeypatch):
    result_of(capsys, tmp_path, "generate", "--model", TINY, "--prompt", 4, "--new", 2)
    row = dict(bench.ROW, phase="generate", model="gemma-7b", layout="heads", ring=0, flags="off",
               cycle_seconds=3e-3, transfer_seconds=1e-3, peak_bytes=9e9, memory_bytes=30e9,
               formula=dict(weights=3e9, cache=5e9), operations=[dict(
                   region=region, kind=kind, seconds=1e-3, number=int(done > start + 1), times=1,
                   loop=0, start=start, done=done, asynchronous=done > start + 1)
                   for start, region, kind, done in (
                       (0, "qkv", "product", 1), (1, "out", "permute", 3),
                       (2, "mlp", "product", 3))])
    (tmp_path / "ring.json").write_text(json.dumps(dict(rows=[row])))
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["draw.py", "--json", str(tmp_path / "rows.json"),
                                      str(tmp_path / "ring.json")])
    draw.main()
    assert {path.stem for path in tmp_path.glob("*.svg")} == {
        "product", "phases", "roofline", "layer", "layouts", "causal", "memory", "roofline_run",
        "timeline_ring"}


ALONE = {  # functions of the libraries, and what their copies do
    "causal_attention": """
q, k = jnp.ones((1, 9, 4, 8)), jnp.ones((1, 2, 9, 8))
assert jax.grad(lambda q: jnp.sum(causal_attention(q, k, k)))(q).shape == q.shape""",
    "write": """
import jax.numpy as jnp
slots = write(jnp.zeros((1, 1, 4, 2)), jnp.ones((1, 1, 1, 2)), jnp.array([[2]]))
assert slots[0, 0, :, 0].tolist() == [0, 0, 1, 0]""",
    "acceptance": """
import numpy as np
assert acceptance(np.zeros((1, 1), int), np.zeros((1, 1, 1)), np.zeros((1, 2, 1)))[0] == 1""",
    "quantize": """
assert quantize(jnp.array([[1.0, -2.0]]), -1).q.tolist() == [[64, -127]]""",
    "tokenizer": """
from collections import namedtuple
assert tokenizer('.', namedtuple('Cfg', 'V')(256)).decode([104, 105]) == 'hi'"""}


def test_copied_functions_run_in_an_empty_folder(tmp_path):
    spec = importlib.util.spec_from_file_location("copy_function", DOCS / "copy.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name, use in ALONE.items():
        text = tool.copy(name)
        assert not re.search("^(import|from) (minillm|infer|shard)", text, re.M)
        (tmp_path / f"{name}.py").write_text(f"{text}{use}\n")
    run = "import runpy, sys\nfor name in sys.argv[1:]:\n    runpy.run_path(f'{name}.py')"
    subprocess.run([sys.executable, "-I", "-c", run, *ALONE], cwd=tmp_path, check=True)
    space = {"__name__": "alone"}
    exec(tool.copy("write") + tool.copy("causal_attention"), space)
    write, causal = space["write"], space["causal_attention"]
    slots, new = jnp.zeros((1, 1, 4, 2)), jnp.ones((1, 1, 1, 2))
    assert same(write(slots, new, jnp.array([[2]])), infer.write(slots, new, jnp.array([[2]])))
    q, k, v = normals((2, 9, 4, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    assert same(*(jax.jit(jax.grad(lambda *qkv: jnp.sum(fn(*qkv) ** 2), (0, 1, 2)))(q, k, v)
                  for fn in (causal, causal_attention)))
    with pytest.raises(SystemExit, match="'attend' is no name of minillm, infer, shard"):
        tool.copy("attend")


def test_what_the_readme_names_is_there():
    names = re.findall(r"`(minillm|infer|shard|bench)\.(\w+)`", README)
    assert len(names) > 10
    for module, name in names:
        assert name == "py" or hasattr(sys.modules[module], name), name
    tests = re.findall(r"`(test_\w+)`", README)
    assert len(tests) > 5 and set(tests) <= set(globals())
    assert all(name in README for name in PUBLISHED)
    for line in re.findall(r"^python bench\.py (.*?)(?: *#.*)?$", README, re.M):
        bench.parse(shlex.split(line))
    for picture in re.findall(r"\]\((docs/[^)]*)\)", README):
        assert (DOCS.parent / picture).exists(), picture


def test_every_commands_help_shows_an_example_that_it_takes_and_lists_what_it_takes(capsys):
    for name, (options, _, text, shown) in bench.COMMANDS.items():
        assert bench.parse([name, *shlex.split(shown)]).command == name
        with pytest.raises(SystemExit):
            bench.parse([name, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert text in printed and shown in printed
        assert all(f"--{option.replace('_', '-')}" in printed for option in options)


def test_the_lectures_figures_are_printed_by_the_commands_beside_them(capsys, tmp_path):
    """Those of a plan; a chip's compiler's stand in tests of their own."""
    commands = re.findall(r"^python bench\.py (plan .*?) +# (\d)$", README, re.M)
    printed = {number: result_of(capsys, tmp_path, *shlex.split(command))[1]
               for command, number in commands}
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

