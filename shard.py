"""shard: the same model on several devices, with every collective written out.

BT(E/t) reads: E, split over the t devices of the mesh axis "tensor". Training splits weights over
"data" as well and gathers them one layer at a time (FSDP), and tokens over "context" (ring
attention). Generating splits weights and cache over "tensor", and rows over "data", where each part
has a copy of the weights: to gather weights for every token would send all of them over the links,
which are slower than memory. A function that names an axis runs inside `jax.shard_map`, on the
device's own part; a function that takes a mesh calls it. Letters as in minillm.py.
"""
import inspect
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from infer import (Cache, Parts, Q8, attend_cache, attend_prompt, cached_attention, filter_logits,
                   init_cache, insert, kth_largest, no_nan, noise, one_hot, read_prompts, row_max,
                   run_layers, sample, slots_of, to_cache, write)
from minillm import (KEEPABLE, Adam, Layer, Params, Partial, attend_with, block,
                     causal_attention, causal_backward, causal_blocks, causal_forward, check_tokens,
                     chunked_mean, dims, dot, embed, finite, join_blocks, loss, loss_chunks, merge,
                     normalize, require, rms_norm, rotary, size_of, split_blocks, traced_counts,
                     unembedding)

P = jax.P
TENSOR = dict(H="tensor", K="tensor", F="tensor", V="tensor")  # letters to mesh axes
FSDP = dict(matrix="data")  # every matrix, over each axis of data and context: see `spec`
KEPT = "attention", "gate"  # of KEEPABLE: saves the most recomputation per byte

# --------------------------------------------------------------------------- meshes and shardings


def mesh_axes(**axes):
    """-> dict: mesh axes and sizes. An int is one axis; a tuple makes numbered axes, one for each
    size. ValueError for two axes of one name, or for an axis of no device."""
    pairs = [pair for name, size in axes.items() for pair in (
        [(f"{name}{i}", n) for i, n in enumerate(size)] if isinstance(size, tuple)
        else [(name, size)])]
    require(pairs and min(n for _, n in pairs) > 0 and len(dict(pairs)) == len(pairs), f"a mesh of "
            f"{axes}: expected axes of different names and of at least one device each")
    return dict(pairs)


def make_mesh(devices=None, **axes):
    """-> Mesh: with named axes, as `make_mesh(data=2, tensor=4)`.

    A tuple makes one axis for each of its sizes: data=(4, 4) is data0 and data1, and collectives go
    over one after the other. Devices are sorted by their coordinates, where they have some, so that
    a mesh in the shape of a slice has one axis for each axis of the torus. ValueError where there
    are fewer devices. `jax.config.update("jax_num_cpu_devices", 8)` before anything else simulates
    8 of them.
    """
    devices, named = jax.devices() if devices is None else devices, mesh_axes(**axes)
    n = math.prod(named.values())
    require(n <= len(devices), f"a mesh of {axes} takes {n} devices, there are {len(devices)}: "
            f'jax.config.update("jax_num_cpu_devices", {n}) simulates them')
    ordered = sorted(devices, key=lambda d: (*getattr(d, "coords", ()), d.id))[:n]
    return jax.sharding.Mesh(np.array(ordered).reshape(*named.values()), tuple(named),
                             axis_types=(jax.sharding.AxisType.Auto,) * len(named))


def abstract_mesh(**axes):
    """-> AbstractMesh: `make_mesh` without devices, on which programs can be traced and counted."""
    named = mesh_axes(**axes)
    return jax.sharding.AbstractMesh(tuple(named.values()), tuple(named), axis_types=(
        jax.sharding.AxisType.Auto,) * len(named))


def axes_of(mesh, *words):
    """Mesh, strs -> tuple: the axes with these names: for "data" it, or data0, data1, and so on."""
    return tuple(axis for word in words for axis in mesh.shape
                 if word in (axis, axis.rstrip("0123456789")))


def size_over(mesh, axes):
    """Mesh, tuple -> int: the number of devices along these axes together."""
    return math.prod(mesh.shape[axis] for axis in axes)


def degree(cfg, n):
    """cfg, int -> int: how many of n devices can share one copy of the weights: the greatest common
    divisor of n, E, F, H and V. The others hold further copies."""
    return math.gcd(n, cfg.E, cfg.F, cfg.H, cfg.V)


def over_heads(cfg, n):
    """cfg, int -> int or tuple: the size of an axis "tensor" of n devices. Where n and the number
    of key heads have only a smaller divisor in common, the sizes of two axes: the first splits
    heads by it, the second rows or slots."""
    heads = math.gcd(cfg.K, n)
    return n if heads in (1, n) else (heads, n // heads)


def torus_axes(shape, tensor):
    """str, int -> int or tuple: the axes of a slice, such as 4x4x4, that are left to data, where
    tensor takes the last ones. ValueError where it cannot."""
    axes = []
    for size in map(int, reversed(shape.split("x"))):
        taken = math.gcd(size, tensor)
        tensor, axes = tensor // taken, [size // taken] * (size > taken) + axes
    require(tensor == 1, f"a slice of {shape} has no part of {tensor} more devices for tensor")
    return tuple(axes) if len(axes) > 1 else math.prod(axes)


def as_axes(axes):
    """str or int or tuple or None -> tuple: several axes, or their sizes, or one, or none."""
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def check_divides(letter, size, mesh, axes, remedy="choose a multiple"):
    """str, int, Mesh, axes, str -> None: ValueError unless the axes divide the letter's size."""
    n = size_over(mesh, axes)
    require(size % n == 0, f"{letter}={size} cannot be split over {n} devices of "
            f"{', '.join(axes)}: {remedy}")


def spec(name, cfg, mesh, rules):
    """str, cfg, Mesh, dict -> P: the mesh axes that split each dimension of one array.

    Rules map letters to axes. Under the rule "matrix" each axis of data and context also splits one
    letter of every matrix that it divides: it tries the first letter, then the last, then backwards
    (along a middle letter the compiler would all-reduce the whole gradient). Vectors stay whole.
    ValueError where an axis divides no letter.
    """
    letters = name.replace(" ", "")
    split = {letter: [*axes_of(mesh, *as_axes(rules.get(letter)))] for letter in letters}

    def part(letter):
        return getattr(cfg, letter) // size_over(mesh, split[letter])

    order = letters[0] + letters[:0:-1]
    for axis in axes_of(mesh, "data", "context") if "matrix" in rules and " " in name else ():
        n = mesh.shape[axis]
        letter = next((letter for letter in order if part(letter) % n == 0), None)
        require(letter, f"{name!r} of {[part(letter) for letter in letters]} cannot be split over "
                f"{n} devices of axis {axis!r}: choose a size that divides one")
        split[letter].append(axis)
    return P(*((*axes, None)[0] if len(axes) < 2 else tuple(axes) for axes in split.values()))


def specs(cfg, mesh, rules):
    """cfg, Mesh, dict -> Params: `spec` of each array. ValueError for a rule that names no letter
    or no axis, does not divide, or splits two letters of one array over the same axis."""
    for letter, words in rules.items():
        axes = axes_of(mesh, *as_axes(words))
        require(letter in (*"EHKDFV", "matrix") and all(
            axes_of(mesh, word) for word in as_axes(words)), f"rule {letter}={words!r}: expected "
            f"one of the letters EHKDFV, and of the mesh's axes {tuple(mesh.shape)}")
        if letter != "matrix":
            check_divides(letter, getattr(cfg, letter), mesh, axes)

    def leaf(name):
        array = spec(name, cfg, mesh, rules)
        axes = [axis for part in array for axis in as_axes(part)]
        require(len({*axes}) == len(axes),
                f"rules {rules} split two letters of {name!r} over the same axis")
        return array

    return jax.tree.map(leaf, dims(cfg))


def specs_of(params, cfg, mesh, rules):
    """Params, cfg, Mesh, dict -> Params: `specs`, also for int8 weights, whose scales have 1 for
    the contracted letters."""
    def leaf(name, w, spec):
        if not isinstance(w, Q8):
            return spec
        outputs = len(name.split()[0])
        return type(w)(spec, P(*spec[:outputs], *(None for _ in spec[outputs:])))

    return jax.tree.map(leaf, dims(cfg), params, specs(cfg, mesh, rules))


def shardings(cfg, mesh, rules):
    """cfg, Mesh, dict -> Params: of NamedShardings, for `jax.device_put`, for `infer.load` (as
    `partial(shardings, mesh=mesh, rules=rules)`), or for parameters that are made where they stay:
    `jax.jit(init, static_argnums=1, out_shardings=...)`. ValueError as in `specs`."""
    return jax.tree.map(partial(jax.NamedSharding, mesh), specs(cfg, mesh, rules))


def place(params, cfg, mesh, rules):
    """Params, cfg, Mesh, dict -> Params: each array, int8 too, split by the rules.

    With int8 activations (`Q8A8`) each device quantizes its own part of a row before a scatter, and
    each part in a ring, with a scale of its own: the result differs from that of one device, and
    its error bound is the same. With `Q8` the result is the same.
    """
    return jax.device_put(params, jax.tree.map(partial(jax.NamedSharding, mesh),
                                               specs_of(params, cfg, mesh, rules)))


def stack(params):
    """Params -> Params: its layers as one Layer of arrays with a leading L, for `lax.scan`."""
    return params._replace(layers=jax.tree.map(lambda *ws: jnp.stack(ws), *params.layers))


def stacked(tree):
    """Params of specs -> Params: those of `stack`ed parameters, whose L is not split."""
    return tree._replace(layers=jax.tree.map(lambda spec: P(None, *spec), tree.layers[0]))


# -------------------------------------------------------------------------- collective matmuls


def all_gather(x, axes, dim, **how):
    """array, axes, int -> array: whole along `dim`, over one axis of the torus after another. With
    to="invarying" `jax.shard_map` knows that the result is the same on all devices."""
    for axis in reversed(as_axes(axes)):
        x = lax.all_gather(x, axis, axis=dim, tiled=True, **how)
    return x


def reduce_scatter(x, axes, dim):
    """array, axes, int -> array: summed, and split along `dim`, over one axis after another. Over
    all axes at once it may become an all-reduce: twice the bytes, and whole sums on every device.
    """
    for axis in as_axes(axes):
        x = lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    return x


def check_contracted(x, ws, n, norm=None):
    """...(E/t), (FE, ...), int, (E, eps) -> None: ValueError unless n parts of x are what every w
    contracts, and what the norm scales."""
    for letters, size in [(f"a weight of {w.shape}", w.shape[-1]) for w in ws] + (
            [("a norm", len(norm[0]))] if norm else []):
        require(size == n * x.shape[-1], f"x has {n} parts of {x.shape[-1]} numbers, and {letters} "
                f"takes {size}: E must be divisible by {n}, and each device takes all scales")


def check_outputs(size, n, directions=1):
    """int, int, int -> None: ValueError unless E can be split over n devices, and each part go in
    so many directions."""
    require(size % (n * directions) == 0, f"E={size} cannot be split over {n} devices in "
            f"{directions} direction(s): choose a multiple of {n * directions}, or ring=0")


def split_norm(x, scale, eps, axis="tensor"):
    """BT(E/t), E, eps -> BT(E/t): `rms_norm`; one sum of squares per token is reduced."""
    part, x32 = x.shape[-1], x.astype("float32")
    squares = lax.psum(jnp.sum(x32 * x32, axis=-1, keepdims=True), axis)
    unit = x32 * lax.rsqrt(squares / (part * lax.axis_size(axis)) + eps)
    local = lax.dynamic_slice_in_dim(scale, lax.axis_index(axis) * part, part)
    return (unit * local.astype("float32")).astype(x.dtype)


def is_norm_split(rows, E):
    """int, int -> bool: does each device normalize its own part of the rows before a gather? Else
    each normalizes all of them after it. For 2^20 numbers that takes a chip as long as the
    all-reduce of `split_norm`, about 10 us."""
    return rows * E >= 2 ** 20


def gather_matmul(x, ws, axis="tensor", dtype=None, norm=None):
    """...(E/t), ((F/t)E, ...) -> (...(F/t), ...): gather the contracted letter, then multiply.

    Each w is this device's part of the outputs, so the result is split as w is. One gather of x
    serves all weights. With norm=(E, eps), of all E scales, rows are normalized: many of them
    before the gather, few after it (`is_norm_split`). The reference of `gather_matmul_ring`.
    """
    n = lax.axis_size(axis)
    check_contracted(x, ws, n, norm)
    first = norm and n > 1 and is_norm_split(math.prod(x.shape[:-1]), n * x.shape[-1])
    x = split_norm(x, *norm, axis) if first else x
    x = all_gather(x, axis, x.ndim - 1)
    x = rms_norm(x, *norm) if norm and not first else x
    return tuple(dot(x, w, dtype=dtype) for w in ws)


def matmul_scatter(x, w, axis="tensor", n=1, sums="float32"):
    """...(F/t), E(F/t) -> ...(E/t): multiply, then sum over devices and split over E.

    The last n letters of w are contracted. Partial sums travel, and are added, in the dtype `sums`;
    so does the gradient, which is gathered. The reference of `matmul_scatter_ring`.
    """
    check_outputs(w.shape[0], lax.axis_size(axis))
    return reduce_scatter(dot(x, w, n, dtype=sums), axis, x.ndim - n).astype(x.dtype)


def pass_on(x, axis, way=1):
    """array, axis, int -> array: send it to the next device of the ring, in direction `way`, 1 or
    -1."""
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + way) % n) for i in range(n)])


def columns(w, start, width):
    """FE, int, int -> F(width): a slice of the contracted letter; int8 keeps its scales."""
    if hasattr(w, "scale"):
        return type(w)(columns(w.q, start, width), w.scale)
    return lax.dynamic_slice_in_dim(w, start, width, w.ndim - 1)


def outputs(w, start, width):
    """EF, int, int -> (width)F: a slice of the outputs, and of their scales."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, width, 0), w)


def gather_matmul_ring(x, ws, axis="tensor", dtype=None, norm=None, directions=1):
    """...(E/t), ((F/t)E, ...) -> (...(F/t), ...): multiply one part of x while the next one
    travels.

    Each part of x goes around the ring in n - 1 permutes, and meets the columns of w that belong to
    it; sums are float32. With two directions each half of a part goes around a ring of its own, so
    that both links of a torus axis are used. With norm=(E, eps) rows are normalized before they are
    sent, for which one sum of squares per row is reduced first.
    """
    n, here, part = lax.axis_size(axis), lax.axis_index(axis), x.shape[-1]
    check_contracted(x, ws, n, norm)
    check_outputs(n * part, n, directions)
    x = split_norm(x, *norm, axis) if norm else x
    width, total = part // directions, [0.0] * len(ws)
    for half, (way, x) in enumerate(zip((1, -1), jnp.split(x, directions, -1))):
        for i in range(n):
            x = pass_on(x, axis, way) if i else x
            start = (here - way * i) % n * part + half * width
            total = [sums + dot(x, columns(w, start, width), dtype="float32")
                     for sums, w in zip(total, ws, strict=True)]
    return tuple(sums.astype(dtype or x.dtype) for sums in total)


def matmul_scatter_ring(x, w, axis="tensor", n=1, sums="float32", directions=1):
    """...(F/t), E(F/t) -> ...(E/t): partial sums travel around the ring to the device of their
    part.

    A sum passes every device once, in n - 1 permutes, and each device adds its product: the sum for
    device d starts at the next one in the ring, and reaches d last.
    """
    size, here, halves = lax.axis_size(axis), lax.axis_index(axis), []
    check_outputs(w.shape[0], size, directions)
    part = w.shape[0] // size
    for half, way in enumerate((1, -1)[:directions]):
        width, total = part // directions, 0.0
        for i in range(size):
            total = pass_on(total.astype(sums), axis, way) if i else total
            start = (here - way * (i + 1)) % size * part + half * width
            total = total + dot(x, outputs(w, start, width), n, dtype="float32")
        halves.append(total)
    return jnp.concatenate(halves, -1).astype(x.dtype)


RINGS = {0: (gather_matmul, matmul_scatter), 1: (gather_matmul_ring, matmul_scatter_ring),
         2: (partial(gather_matmul_ring, directions=2), partial(matmul_scatter_ring, directions=2))}

# ------------------------------------------------------------------- the parts between matmuls


def split_embed(params, tokens, cfg, axis="tensor"):
    """Params, BT, cfg -> BT(E/t): each device looks up the tokens of its part of the vocabulary.
    Each row is on exactly one device, so the sum adds zeros and is exact."""
    rows = cfg.V // lax.axis_size(axis)
    local = tokens - lax.axis_index(axis) * rows
    x = embed(params, jnp.clip(local, 0, rows - 1), cfg)
    return reduce_scatter(jnp.where(((local >= 0) & (local < rows))[..., None], x, 0), axis, 2)


def split_unembed(params, x, cfg, axis="tensor", enter=gather_matmul):
    """Params, BT(E/t), cfg -> BT(V/t): float32 logits of this device's part of the vocabulary."""
    return enter(x, (unembedding(params, cfg),), axis=axis, dtype="float32",
                 norm=(params.out_norm, cfg.eps))[0]


def split_parts(axis, ring, sums):
    """axis, int, dtype -> dict: the infer.Parts of a model whose weights are split over that axis.
    """
    enter, leave = RINGS[ring]
    return dict(embed=partial(split_embed, axis=axis), enter=partial(enter, axis=axis),
                leave=partial(leave, axis=axis, sums=sums),
                unembed=partial(split_unembed, axis=axis, enter=enter))


def split_cross_entropy(logits, targets, axis="tensor"):
    """BT(V/t), BT -> BT: cross-entropies of split logits: no device ever holds BTV."""
    top = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), axis)
    total = lax.psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), axis)
    local = targets - lax.axis_index(axis) * logits.shape[-1]
    mine = (local >= 0) & (local < logits.shape[-1])
    at = jnp.clip(local, 0, logits.shape[-1] - 1)[..., None]
    target_logits = jnp.where(mine, jnp.take_along_axis(logits, at, axis=-1)[..., 0], 0)
    return jnp.log(total) + top - lax.psum(target_logits, axis)


@jax.named_scope("sample")
def split_sample(key, logits, pos, sampling, axis="tensor"):
    """key, B(V/t), B, Sampling -> B: the token that `sample` draws.

    Each device adds its part of the noise, and two numbers per row are reduced: the best sum, and
    the first token that has it. With a temperature so is each row's largest logit, and for top_k
    each device's k largest are gathered. top_p below 1 depends on all logits, so they are gathered.
    """
    if sampling.top_p < 1 and sampling.temperature:
        return sample(key, all_gather(logits, axis, 1, to="invarying"), pos, sampling)
    part, n = logits.shape[-1], lax.axis_size(axis)
    first, scores = lax.axis_index(axis) * part, no_nan(logits)

    def kth(logits, k):
        return kth_largest(all_gather(lax.top_k(logits, min(k, part))[0], axis, 1), k)

    if sampling.temperature:
        scores = filter_logits(logits, sampling, lambda x: lax.pmax(row_max(x), axis), kth)
        scores += lax.dynamic_slice_in_dim(noise(key, pos, n * part), first, part, 1)
    best = jnp.max(scores, axis=-1)
    token = first + jnp.argmax(scores, axis=-1).astype("int32")
    return lax.pmin(jnp.where(best == lax.pmax(best, axis), token, n * part), axis)


# -------------------------------------------------------------------------------------- training


def check_rows(tokens, mesh):
    """B(T+1), Mesh -> None: ValueError unless rows can be split over "data", and their T tokens
    over "context"."""
    B, T = tokens.shape[0], tokens.shape[1] - 1
    require(axes_of(mesh, "data"),
            f"a mesh of axes {tuple(mesh.shape)} has no axis 'data', over which rows are split")
    require(T > 0, f"tokens of shape {tokens.shape}: a loss takes B(T+1), two or more a row")
    check_divides("B", B, mesh, axes_of(mesh, "data"))
    check_divides("T", T, mesh, axes_of(mesh, "context"))


def fsdp_loss(params, tokens, cfg, mesh):
    """Params, B(T+1), cfg, Mesh -> scalar: `loss`, fully sharded, the compiler's way.

    Parameters are split over "data" by `place(..., FSDP)`, and rows are kept there; the compiler
    chooses what is gathered when. All logits exist at once, since chunks of split rows would move
    between devices.
    To be jitted.
    """
    check_tokens(tokens, cfg)
    check_rows(tokens, mesh)
    require(not axes_of(mesh, "context"), f"a mesh of {tuple(mesh.shape)}: only sharded_loss "
            "splits tokens over an axis 'context'")

    def over_data(a):
        return lax.with_sharding_constraint(a, jax.NamedSharding(mesh, P(axes_of(mesh, "data"))))

    def layer(x, w, table, cfg, attend):
        x, state = block(over_data(x), w, table, cfg, attend)
        return over_data(x), state

    return loss(params, over_data(tokens), cfg, layer, chunks=1)


def check_kept(keep):
    """tuple of str -> None: ValueError for a name that is not in KEEPABLE."""
    require(not isinstance(keep, str) and {*keep} <= {*KEEPABLE},
            f"keep={keep!r}: expected a tuple of names, of {', '.join(KEEPABLE)}")


def gather_weights(w, split, over):
    """Params, specs, axes -> Params: undo the splits over these axes; also for a Layer.

    The gradient is reduce-scattered, one axis after another too. Norm scales, which every device
    has, become float32, and their gradients are summed in one all-reduce.
    """
    def whole(w, spec):
        if w.ndim == 1:
            return lax.pcast(w.astype("float32"), over, to="varying")
        for dim, axes in enumerate(spec):
            w = all_gather(w, tuple(axis for axis in as_axes(axes) if axis in over), dim)
        return w

    return jax.tree.map(whole, w, split)


def sharded_loss(params, tokens, cfg, mesh, ring=0, keep=KEPT, sums="float32",
                 causal=causal_attention):
    """Params, B(T+1), cfg, Mesh -> scalar: `loss`, by hand, on a mesh of "data", "tensor" and, for
    long rows, "context".

    A mesh (data, tensor) = (n, 1) is FSDP, (1, n) tensor parallelism, (n, m) both. `params` are
    `stack`ed. Rows are split over "data", the tokens of each over "context", where device i has
    every n-th from i on. Each layer's weights are gathered over both before use, and again for its
    gradient. Over "tensor" weights stay split, and so is x over E between layers, with matmuls by
    `RINGS[ring]`, whose partial sums travel in the dtype `sums`. For the backward pass each layer
    saves its input and the values named in `keep`; the rest is recomputed. `causal` is that of
    `minillm.forward`, for a mesh without "context". ValueError for what does not divide, and for
    names that cannot be kept.
    """
    check_kept(keep)
    require(causal is causal_attention or not axes_of(mesh, "context"), f"{causal}: ring attention "
            "over an axis 'context' takes no other attention")
    tokens = check_tokens(tokens, cfg)
    check_rows(tokens, mesh)
    tensor = axes_of(mesh, "tensor")
    require(tensor, f"a mesh of {tuple(mesh.shape)}: weights are split over an axis 'tensor', of "
            "one device or more: make_mesh(..., tensor=1)")
    require(hasattr(params.layers, "wq"),
            "params hold a tuple of layers: stack(params) makes them one")
    check_divides("E", cfg.E, mesh, tensor)
    split, rows = specs(cfg, mesh, {**TENSOR, **FSDP}), P(axes_of(mesh, "data"))
    run = partial(local_loss, cfg=cfg, split=split, mesh=mesh, keep=keep, causal=causal,
                  parts=split_parts(tensor, ring, sums))
    return jax.shard_map(run, mesh=mesh, in_specs=(stacked(split), rows), out_specs=P(),
                         check_vma=causal is causal_attention)(params, tokens)


def local_loss(params, tokens, cfg, split, mesh, keep, causal, parts):
    """Params, B(T+1), cfg, specs, Mesh, names, fn, dict -> scalar: `sharded_loss` on one device,
    from its parts; the mean is over all devices."""
    over, context, tensor = (axes_of(mesh, *words) for words in (
        ("data", "context"), ("context",), ("tensor",)))
    T = tokens.shape[1] - 1
    pos, attend = (local_positions(T, context), partial(attend_ring, axis=context)) \
        if context else (jnp.arange(T), attend_with(causal))
    inputs, targets = (tokens[:, pos], tokens[:, pos + 1]) if context else (
        tokens[:, :-1], tokens[:, 1:])
    ends = gather_weights(params._replace(layers=()), split._replace(layers=()), over)
    table, x = rotary(pos[None], cfg), parts["embed"](ends, inputs, cfg)

    def layer(x, w):
        return block(x, gather_weights(w, split.layers[0], over), table, cfg, attend,
                     parts["enter"], parts["leave"])

    policy = jax.checkpoint_policies.save_only_these_names(*keep)
    x, _ = lax.scan(jax.checkpoint(layer, policy=policy), x, params.layers)
    x, N = rms_norm(all_gather(x, tensor, 2), ends.out_norm, cfg.eps), targets.size

    def losses(table, x, targets):
        return split_cross_entropy(dot(x, table, dtype="float32"), targets, tensor)

    with jax.named_scope("unembed"):
        mean = chunked_mean(losses, loss_chunks(N, cfg.V // size_over(mesh, tensor)),
                            unembedding(ends, cfg), x.reshape(N, -1), targets.reshape(-1))
    return lax.pmean(mean, over)


# ------------------------------------------------------------------------------ ring attention


def local_positions(T, axis):
    """int, axis -> T/n: this device's positions: every n-th, from its own number on.

    So each device has an equal share of early and late tokens, and with them of the work of causal
    attention, for any T. arXiv:2311.09431.
    """
    n = lax.axis_size(axis)
    return lax.axis_index(axis) + n * jnp.arange(-(-T // n))


def is_later(i, axis):
    """int, axis -> int: 1 if the device i steps back in the ring has a larger index, else 0. Then
    its j-th token follows this device's j-th, which must not attend to it."""
    here = lax.axis_index(axis)
    return ((here - i) % lax.axis_size(axis) > here).astype("int32")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def ring_attention(q, k, v, axis):
    """B(T/n)HD, BK(T/n)D, BK(T/n)D, axis -> B(T/n)HD: `causal_attention` of tokens that are split
    by `local_positions`: device i holds tokens i, i + n, i + 2n and so on.

    k and v go once around the ring; each part is attended to while the next one travels.
    arXiv:2310.01889.
    """
    return ring_forward(q, k, v, axis)[0]


def ring_forward(q, k, v, axis, convert=lambda kv: kv):
    """B(T/n)HD, BK(T/n)D, BK(T/n)D, axis -> B(T/n)HD, saved: k and v travel as they are, int8 too,
    and are converted where they are used. A finished part has total 1, and its log-sum-exp as
    largest, so that it is merged like any other."""
    T, H = q.shape[1:3]

    def add(part, k, v, i):
        out, (*_, log_total) = causal_forward(q, convert(k), convert(v), is_later(i, axis))
        log_total = join_blocks(log_total, T, H)
        out = jnp.where(log_total > -jnp.inf, out, 0)  # the first token may see nothing: 0 / 0
        return merge(part, Partial(out, jnp.ones_like(log_total), log_total))

    def step(state, i):
        part, *kv = state
        next_kv = jax.tree.map(lambda a: pass_on(a, axis), kv)
        return (add(part, *kv, i), *next_kv), None

    n, zeros = lax.axis_size(axis), jnp.zeros_like(q, "float32")
    empty = Partial(zeros, zeros[..., :1], zeros[..., :1] - jnp.inf)
    (part, *kv), _ = lax.scan(step, (empty, k, v), jnp.arange(n - 1))
    part = add(part, *kv, n - 1)
    out, log_total = (checkpoint_name(a, "attention") for a in (
        normalize(part).astype(q.dtype), jnp.log(part.total) + part.largest))
    return out, (q, k, v, out, log_total)


def ring_backward(axis, saved, dy):
    """axis, saved, B(T/n)HD -> B(T/n)HD, BK(T/n)D, BK(T/n)D: the gradients of k and v travel with
    them, in float32, and one place further, which brings them home."""
    q, k, v, out, log_total = saved
    log_total = split_blocks(log_total, k.shape[1], causal_blocks(q.shape[1])[0])

    def add(grads, kv, i):
        new = causal_backward((q, *kv, out, log_total), dy, is_later(i, axis))
        return [total + d for total, d in zip(grads, new, strict=True)]

    def step(state, i):
        grads, kv = state
        next_kv = [pass_on(a, axis) for a in kv]
        dq, *dkv = add(grads, kv, i)
        return ([dq, *(pass_on(d, axis) for d in dkv)], next_kv), None

    n, zeros = lax.axis_size(axis), [jnp.zeros_like(a, "float32") for a in (q, k, v)]
    (grads, kv), _ = lax.scan(step, (zeros, [k, v]), jnp.arange(n - 1))
    dq, *dkv = add(grads, kv, n - 1)
    return dq.astype(q.dtype), *(pass_on(d, axis).astype(k.dtype) for d in dkv)


ring_attention.defvjp(ring_forward, ring_backward)


def attend_ring(q, k, v, axis):
    """B(T/n)HD, BK(T/n)D, BK(T/n)D, axis -> B(T/n)HD, None: the hook `attend` of training."""
    return ring_attention(q, k, v, axis), None


# ------------------------------------------------------------------------ a cache over devices


def local_rows(a, axis="tensor"):
    """B..., axis -> (B/t)...: this device's rows. Also for trees."""
    def rows(a):
        n = len(a) // lax.axis_size(axis)
        return lax.dynamic_slice_in_dim(a, lax.axis_index(axis) * n, n)

    return jax.tree.map(rows, a)


def stripe(a, n):
    """BKSD, int -> BKnSD: slot s becomes the (s // n)-th of part s % n."""
    B, K, S, D = a.shape
    return a.reshape(B, K, S // n, n, D).swapaxes(2, 3)


def local_slots(a, axis="tensor"):
    """BKTD, axis -> BK(T/t)D: this device's slots. Also for trees."""
    def slots(a):
        n = lax.axis_size(axis)
        a = stripe(jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % n), (0, 0))), n)
        return lax.dynamic_index_in_dim(a, lax.axis_index(axis), 2, keepdims=False)

    return jax.tree.map(slots, a)


def attend_rows(q, k, v, old, pos, axis="tensor", cached=cached_attention):
    """BT(H/t)D, BKTD, BKTD, ((B/t)KSD, (B/t)KSD), BT -> BT(H/t)D, ((B/t)KSD, (B/t)KSD): each device
    holds all heads of its rows. wk and wv are whole, so k and v are here already; two all-to-alls
    bring every row's queries to its device, and the results back."""
    q = lax.all_to_all(q, axis, split_axis=0, concat_axis=2, tiled=True)
    out, kv = attend_cache(q, *local_rows((k, v), axis), old, local_rows(pos, axis), cached)
    return lax.all_to_all(out, axis, split_axis=2, concat_axis=0, tiled=True), kv


def normalize_over(part, axis="tensor"):
    """Partial -> BKMD: this device's summand of each row's weighted mean over all devices' slots;
    two numbers per query are reduced."""
    largest = lax.pmax(part.largest, axis)
    scale = jnp.exp(part.largest - finite(largest))
    return part.values * scale / lax.psum(part.total * scale, axis)


def over_slots(attend):
    """attend -> attend: on the one part of BKnSD that a device holds, as BKSD."""
    def form(q, k, v, old, pos, **how):
        old = jax.tree.map(lambda a: a[:, :, 0], old)
        out, kv = attend(q, k, v, old, pos, **how)
        return out, jax.tree.map(lambda a: a[:, :, None], kv)

    return form


def attend_slots(q, k, v, old, pos, axis="tensor", cached=cached_attention):
    """BT(H/t)D, BKTD, BKTD, (BK(S/t)D, BK(S/t)D), BT -> BT(H/t)D, (BK(S/t)D, BK(S/t)D): each device
    holds every t-th slot of all heads; the summands of the values are reduced."""
    n, pos = lax.axis_size(axis), pos - lax.axis_index(axis)
    slot = jnp.where(pos % n == 0, pos // n, -1)  # those of other devices are dropped
    new = write(old, jax.tree.map(to_cache, (k, v), old), slot)
    q = lax.all_gather(q, axis, axis=2, tiled=True)
    out = cached(q, *new, pos // n, partial(normalize_over, axis=axis))
    return lax.psum_scatter(out, axis, scatter_dimension=2, tiled=True), new


def insert_local(slots, new, row, axes, data):
    """BKSD, BKTD, int or None, axes, axes -> BKSD: `insert` this device's part of `new`. Rows are
    split over `data` and `axes`. With row=None, `new` holds the rows of this part of data, and the
    device stores its share; with a number, `new` is the one row with that global index, which only
    its owner stores."""
    if row is None:
        return insert(slots, local_rows(new, axes))

    def put(slots, new):
        at = row - lax.axis_index((*data, *axes)) * len(slots)
        place = jnp.clip(at, 0, len(slots) - 1), *(0,) * (slots.ndim - 1)
        new = jnp.where(at == place[0], new, lax.dynamic_slice(slots, place, new.shape))
        return lax.dynamic_update_slice(slots, new, place)

    return jax.tree.map(put, slots, new)


def fill_whole(q, k, v, old, pos, causal=causal_attention, row=None, axis="tensor", insert=insert):
    """BT(H/t)D, BKTD, BKTD, (BKSD, BKSD), BT -> BT(H/t)D, (BKSD, BKSD): `attend_prompt` where k and
    v are whole: each device attends with its own heads."""
    n, here, heads = lax.axis_size(axis), lax.axis_index(axis), q.shape[2]
    new = jax.tree.map(to_cache, (k, v), old)
    group = n * heads // k.shape[1]  # query heads that share a key head
    kv = (here * heads + jnp.arange(heads)) // group
    rounded = (a.astype(q.dtype)[:, kv] for a in new)
    return causal(q, *rounded), insert(old, new, row)


def fill_ring(q, k, v, old, pos, axis="tensor"):
    """B(T/t)HD, BK(T/t)D, BK(T/t)D, (BK(S/t)D, BK(S/t)D), BT -> B(T/t)HD, (BK(S/t)D, BK(S/t)D):
    each device's tokens are those of its slots, so what it writes stays there."""
    new = jax.tree.map(to_cache, (k, v), old)
    out, _ = ring_forward(q, *new, axis, lambda kv: kv.astype(q.dtype))
    return out, insert(old, new)


class Layout(NamedTuple):
    """A way to split a cache: the last axis of "tensor" splits `letter`, those before it split
    K."""
    letter: str       # of BKSD
    attend: Callable  # axis -> infer.Parts.attend
    fill: Callable    # axis, insert -> infer.Parts.attend_prompt
    by_token: bool = False  # prompts are split over their tokens, and weights gathered for them


LAYOUTS = {
    "heads": Layout("K", lambda axis: attend_cache, lambda axis, insert: partial(
        attend_prompt, row=None, insert=insert)),
    "batch": Layout("B", lambda axis: partial(attend_rows, axis=axis), lambda axis, insert: partial(
        fill_whole, axis=axis, insert=insert)),
    "sequence": Layout(
        "S", lambda axis: over_slots(partial(attend_slots, axis=axis)),
        lambda axis, insert: over_slots(partial(
            fill_whole, axis=axis, insert=lambda slots, new, row: insert(
                slots, local_slots(new, axis), row))))}
LAYOUTS["context"] = LAYOUTS["sequence"]._replace(by_token=True)


def layouts(cfg, rows, axes):
    """cfg, int, tuple -> list of str: the layouts whose letter (heads, rows or slots) the last of
    these axes of "tensor" divides, for a cache of so many rows; the best one first."""
    sizes = {"heads": cfg.K // math.prod(axes[:-1]), "batch": rows}
    return [layout for layout in LAYOUTS if sizes.get(layout, 0) % axes[-1] == 0]


def read_context(parts, params, cache, tokens, lengths, cfg, where, **row):
    """Parts, Params, Cache, BT, B, cfg, Where -> B(V/t), Cache: a prefill of prompts that are split
    over their tokens.

    The last axis of "tensor" splits tokens as it splits slots, so that k and v are written where
    they are computed, and travel for `ring_attention` alone. Weights are gathered over that axis,
    one layer at a time; over the axes before it they stay split. The last token's logits are split
    over all. A single `row`, of `infer.refill`, is read as in the layout "sequence".
    """
    if row:
        return read_prompts(parts, params, cache, tokens, lengths, cfg, **row)
    over, last = where.axes[:-1], where.axes[-1]
    n, at, pos = lax.axis_size(last), lengths - 1, local_positions(tokens.shape[1], last)[None]
    ends = params._replace(unembed=None, out_norm=None)
    split = specs_of(params, cfg, where.mesh, where.rules)._replace(unembed=None, out_norm=None)
    whole, parts = gather_weights(ends, split, (last,)), parts._replace(
        **split_parts(over, where.ring, where.sums))
    local = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % n)))[:, pos[0]]
    x, cache = run_layers(parts, whole, cache, local, pos, lengths, cfg,
                          over_slots(partial(fill_ring, axis=last)))
    mine = (at % n == lax.axis_index(last))[:, None]
    x = lax.psum(jnp.where(mine, x[jnp.arange(len(at)), at // n], 0), last)[:, None]
    return parts.unembed(params, x, cfg)[:, 0], cache


@dataclass(frozen=True)
class Where:
    """Where a generating model lives: the argument `where` of infer's functions.

    A layer goes BT(E/t) -> BT(H/t)D and k, v -> attention -> BT(E/t) -> BT(F/t) -> BT(E/t). The
    cache is split over "heads": attention is local, k and v are BT(K/t)D, and t must divide K; over
    "batch", for fewer key heads than devices; or over "sequence", for a cache too large for a
    device; "context" is "sequence" whose prompts are split over their tokens (`read_context`). With
    tensor=(m, n) the first axis splits K in any layout, and the last one splits heads, rows or
    slots within each of the m groups. Rows are split over axes of data, where the mesh has some.
    `ring` picks the matmuls: 0 for the references, 1 or 2 for rings of so many directions. A cache
    in another layout is converted first. ValueError for an unknown layout or ring, and for what
    does not divide.
    """
    mesh: Any            # with an axis "tensor"
    layout: str = "heads"
    ring: int = 0
    sums: str = "float32"  # dtype of partial sums that travel: see `matmul_scatter`
    causal: Callable = causal_attention  # see infer.Parts; "context" takes no other one
    cached: Callable = cached_attention  # likewise; layouts that split slots take no other one

    data = property(lambda self: axes_of(self.mesh, "data"))
    axes = property(lambda self: axes_of(self.mesh, "tensor"))
    plain = property(lambda self: self.causal is causal_attention
                     and self.cached is cached_attention)

    def __post_init__(self):
        require(self.layout in LAYOUTS and self.ring in RINGS and self.axes,
                f"layout={self.layout!r}, ring={self.ring!r} on a mesh of {(*self.mesh.shape,)}: "
                f"expected one of {', '.join(LAYOUTS)}, one of {(*RINGS,)}, and an axis 'tensor'")
        layout = LAYOUTS[self.layout]
        require((layout.letter != "S" or self.cached is cached_attention) and (
            not layout.by_token or self.causal is causal_attention), f"layout {self.layout!r} "
            f"merges parts of attention, which {self.causal} or {self.cached} does not give: heads "
            "or batch can")

    @property
    def rules(self):
        """-> dict: for the weights. Where the last axis does not split K, its devices share heads.
        """
        return TENSOR if LAYOUTS[self.layout].letter == "K" else {**TENSOR, "K": self.axes[:-1]}

    def cache_axes(self, layout):
        """str -> dict: the axes that split B, K and S of a cache."""
        axes = {"B": self.data, "K": self.axes[:-1], "S": ()}
        axes[LAYOUTS[layout].letter] += self.axes[-1:]
        return axes

    def cache_specs(self):
        """-> Cache of specs."""
        split = P(*(axes or None for axes in self.cache_axes(self.layout).values()))
        return Cache(split, split, P(self.data or None))

    def check(self, cfg, cache):
        """cfg, Cache -> None: ValueError unless the mesh divides what is split."""
        check_divides("E", cfg.E, self.mesh, self.axes)
        sizes = dict(zip("BK", cache.k[0].shape), S=slots_of(cache))

        def divides(layout):
            return all(sizes[letter] % size_over(self.mesh, axes) == 0
                       for letter, axes in self.cache_axes(layout).items())

        fit = " and ".join(filter(divides, LAYOUTS))
        for letter, axes in self.cache_axes(self.layout).items():
            check_divides(letter, sizes[letter], self.mesh, axes, f"layout {self.layout!r} cannot, "
                          + (f"{fit} can" if fit else "choose a multiple"))

    def move(self, cache):
        """Cache -> Cache: slots that are split as BKnSD, each device's together; others as BKSD."""
        parts = self.mesh.shape[self.axes[-1]] if LAYOUTS[self.layout].letter == "S" else 0

        def fit(a):
            if a.ndim == 5 and a.shape[2] != parts:
                a = a.swapaxes(2, 3).reshape(*a.shape[:2], -1, a.shape[4])
            return stripe(a, parts) if parts and a.ndim == 4 else a

        return Cache(*jax.tree.map(fit, cache[:2]), cache.length)

    def place(self, params, cfg):
        """Params, cfg -> Params: split as this layout needs them."""
        return place(params, cfg, self.mesh, self.rules)

    def place_cache(self, cfg, cache):
        """cfg, Cache -> Cache: split in this layout. One that no device can hold whole: `empty`."""
        self.check(cfg, cache)
        return jax.device_put(self.move(cache), jax.tree.map(
            partial(jax.NamedSharding, self.mesh), self.cache_specs()))

    def empty(self, cfg, B, S, dtype="float32"):
        """cfg, int, int, dtype -> Cache, BV: infer.Parts.empty, made where it stays."""
        def make():
            cache, logits = Parts().empty(cfg, B, S, dtype)
            return self.move(cache), logits

        self.check(cfg, jax.eval_shape(lambda: init_cache(cfg, B, S, dtype)))
        return jax.jit(make, out_shardings=jax.tree.map(partial(jax.NamedSharding, self.mesh), (
            self.cache_specs(), P(self.data or None, self.axes))))()

    def parts(self):
        """-> infer.Parts: for each device, inside `jax.shard_map`."""
        layout, axes, data = LAYOUTS[self.layout], self.axes, self.data

        def local_row(row, B):
            row = row - lax.axis_index(data) * B
            return jnp.where(row < 0, B, row)  # beyond the end: dropped

        def local_one_hot(token, V):
            part = V // size_over(self.mesh, axes)
            return one_hot(token - lax.axis_index(axes) * part, part)

        return Parts(
            **split_parts(axes, self.ring, self.sums), attend=layout.attend(axes[-1]),
            attend_prompt=layout.fill(axes[-1], partial(
                insert_local, axes=axes[-1:] if layout.letter == "B" else (), data=data)),
            read=partial(read_context, where=self) if layout.by_token else read_prompts,
            gather=lambda logits: all_gather(logits, axes, 2, to="invarying"),
            sample=partial(split_sample, axis=axes), one_hot=local_one_hot, local_row=local_row,
            causal=self.causal, cached=self.cached)

    def run(self, cfg, body, results, *args):
        """cfg, fn, names, arrays -> arrays: infer.Parts.run in `jax.shard_map`; the names of
        arguments and results say how they are split."""
        args = dict(zip([*inspect.signature(body).parameters][1:], args))
        rows, whole = self.data or None, P()
        kinds = dict(logits=P(rows, self.axes), x=P(rows, None, self.axes), row=whole, prompt=whole,
                     length=whole, cache=self.cache_specs(), state=jax.tree.map(
                         lambda part: P(rows) if isinstance(part, Cache) else whole,
                         args.get("state"), is_leaf=lambda part: isinstance(part, Cache)))
        if "cache" in args:
            self.check(cfg, args["cache"])
            args["cache"] = self.move(args["cache"])
        kinds["params"] = specs_of(args["params"], cfg, self.mesh, self.rules)
        return jax.shard_map(partial(body, self.parts()), mesh=self.mesh, in_specs=tuple(
            kinds.get(name, P(rows)) for name in args), out_specs=tuple(
            kinds.get(name, P(rows)) for name in results), check_vma=self.plain)(*args.values())

    def unembed(self, params, x, cfg):
        """Params, BTE, cfg -> BTV: float32 logits of what `extend` returned, split over V."""
        return self.run(cfg, lambda parts, params, x: (parts.unembed(params, x, cfg),), ("x",),
                        params, x)[0]


def argument_shardings(args, cfg, mesh, rules, where=None):
    """tuple, cfg, Mesh, dict, Where -> tuple: NamedShardings of a step's arguments, one for what is
    alike: parameters, also `stack`ed or int8, by the rules, and AdamW's means as they; a cache as
    `where` splits it, logits over the vocabulary, and all else by rows."""
    rows = axes_of(mesh, "data") or None

    def leaf(a):
        match a:
            case Params(layers=Layer()):
                return stacked(specs(cfg, mesh, rules))
            case Params():
                return specs_of(a, cfg, mesh, rules)
            case Adam():
                return Adam(P(), leaf(a.m), leaf(a.v))
            case Cache():
                where.check(cfg, a)
                return where.cache_specs()
        logits = a.ndim == 2 and a.shape[1] == cfg.V and a.dtype == jnp.float32
        return P(rows, *[axes_of(mesh, "tensor")] * logits)

    return jax.tree.map(partial(jax.NamedSharding, mesh), jax.tree.map(
        leaf, args, is_leaf=lambda a: isinstance(a, (Params, Adam, Cache))))


def device_bytes(args):
    """arrays -> dict: bytes that a step's arguments take on each device, by kind: their shapes,
    split as they are."""
    kinds = {Params: "weights", Cache: "cache", Adam: "optimizer"}
    sizes = dict.fromkeys((*kinds.values(), "inputs"), 0)
    for arg in jax.tree.leaves(args, is_leaf=lambda arg: type(arg) in kinds):
        for a in jax.tree.leaves(arg):
            sizes[kinds.get(type(arg), "inputs") if a.ndim else "inputs"] += (
                a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape)))
    return sizes


# ------------------------------------------------------------------------------ what is sent


SENT = {  # bytes that a device sends around a ring of n, from `size` bytes of its own
    "all_gather": lambda size, n: size * (n - 1),
    "reduce_scatter": lambda size, n: -(-size // n) * (n - 1),
    "all_reduce": lambda size, n: 2 * -(-size // n) * (n - 1),  # scattered, then gathered
    "all_to_all": lambda size, n: -(-size // n) * (n - 1),
    "permute": lambda size, n: size}
COLLECTIVES = {"all_gather": "all_gather", "all_gather_invariant": "all_gather",
               "reduce_scatter": "reduce_scatter", "psum": "all_reduce",
               "psum_invariant": "all_reduce", "pmax": "all_reduce", "pmin": "all_reduce",
               "all_to_all": "all_to_all", "ppermute": "permute"}


def traced_events(fn, *args):
    """fn, arrays -> Counter: how often the program `fn(*args)` runs each (collective, bytes of one
    device, devices), counted by `minillm.traced_counts`.

    On an `abstract_mesh` it needs no devices. Only what COLLECTIVES names counts, and none that the
    compiler adds. ValueError for a collective in a `while` or `cond`.
    """
    def events(eqn, axes):
        kind, axis = COLLECTIVES.get(eqn.primitive.name), eqn.params.get(
            "axes", eqn.params.get("axis_name"))
        n = math.prod(axes[name] for name in as_axes(axis)) if kind else 1
        return Counter((kind, v.aval.size * v.aval.dtype.itemsize, n) for v in eqn.invars if n > 1)

    return traced_counts(fn, args, events)


def tally(events):
    """Counter -> dict: collective -> (number, bytes that each device sends)."""
    sent = {}
    for (kind, size, n), times in events.items():
        number, total = sent.get(kind, (0, 0))
        sent[kind] = number + times, total + times * SENT[kind](size, n)
    return sent


def traced_comm(fn, *args):
    """fn, arrays -> dict: collective -> (number, bytes that each device sends) of `traced_events`:
    what the formulas below are tested against. An all-reduce is taken as a ring's."""
    return tally(traced_events(fn, *args))


def link_seconds(kind, size, n, link, shape):
    """str, int, int, scalar, tuple -> scalar: the least seconds of a collective among n devices,
    each of which sends `size` bytes, over links of `link` bytes/s an axis, both directions
    together. ValueError where n devices are no part of a slice of this shape.

    They stand along the axes of the slice, the last ones first, and use all of these at once, in
    both directions; a permute uses one direction of one. A latency is not counted: a published
    decode step of Llama 3 70B on 16 TPU v5e leaves half a microsecond for each of its collectives.
    """
    axes, rest = 0, n
    for length in reversed(shape):
        along = math.gcd(length, rest)
        rest, axes = rest // along, axes + (along > 1)
    require(rest == 1, f"{n} devices are no part of a slice of {'x'.join(map(str, shape))}")
    return size / (link / 2 if kind == "permute" else link * max(1, axes))


def repeat(times, events):
    """int, Counter -> Counter: each event so many times as often."""
    return Counter({event: times * number for event, number in events.items()})


def gather_comm(size, axes):
    """int, tuple -> Counter: `all_gather` of so many bytes, the last axis first."""
    return Counter(("all_gather", size * math.prod(axes[i + 1:]), n)
                   for i, n in enumerate(axes) if n > 1)


def scatter_comm(size, axes):
    """int, tuple -> Counter: `reduce_scatter` of so many bytes."""
    return Counter(("reduce_scatter", size // math.prod(axes[:i]), n)
                   for i, n in enumerate(axes) if n > 1)


def attend_comm(cfg, rows, axes, layout):
    """cfg, int, tuple, str -> Counter: a layer's attention to the cache in that layout."""
    t, last, letter = math.prod(axes), axes[-1], LAYOUTS[layout].letter
    heads = rows * cfg.H * cfg.D * jnp.dtype(cfg.dtype).itemsize // t
    events = {"K": {}, "B": {("all_to_all", heads, last): 2},
              "S": {("all_gather", heads, last): 1, ("reduce_scatter", heads * last, last): 1,
                    ("all_reduce", rows * cfg.H * last // t * 4, last): 2}}[letter]
    return Counter(events if last > 1 else {})


def step_comm(cfg, B, T, axes, layout="heads", ring=0, prompt=False, sums="float32"):
    """cfg, int, int, tuple, str, int -> dict: step -> (how often, Counter): what each step of the
    tensor-parallel model sends, over axes of these sizes, for T tokens in each of B rows: a decode
    step or a draft to verify, or with `prompt` a prefill (but in the layout "context").

    Of a layer five steps send: a gather before q, k and v, what attention needs, a scatter, a
    gather before gate and up, a scatter; where norms are split, each gather has an all-reduce of a
    number a row before it. Activations travel in cfg.dtype, sums in `sums`.
    """
    rows, itemsize, t = B * T, jnp.dtype(cfg.dtype).itemsize, math.prod(axes)

    def around(size):
        return Counter({("permute", size // t // ring, t): (t - 1) * ring} if t > 1 else {})

    def enter(rows):
        first = t > 1 and (ring or is_norm_split(rows, cfg.E))
        norm = Counter({("all_reduce", rows * 4, t): 1} if first else {})
        return norm + (around(rows * cfg.E * itemsize) if ring else
                       gather_comm(rows * cfg.E // t * itemsize, axes))

    size = rows * cfg.E * jnp.dtype(sums).itemsize
    leave = around(size) if ring else scatter_comm(size, axes)
    steps = {"embed": (1, scatter_comm(rows * cfg.E * itemsize, axes)),
             "q, k, v": (cfg.L, enter(rows)),
             "attention": (cfg.L, Counter() if prompt else attend_comm(cfg, rows, axes, layout)),
             "out": (cfg.L, leave), "gate, up": (cfg.L, enter(rows)), "down": (cfg.L, leave),
             "logits": (1, enter(B if prompt else rows))}
    draw = Counter({("all_reduce", B * 4, t): 2} if t > 1 else {})
    return steps if prompt or T > 1 else steps | {"draw": (1, draw)}


def step_shapes(axes, layout):
    """tuple, str -> dict: step of `step_comm` -> what each device holds before and after it, in
    letters. Over two axes m is the first one and n the last one."""
    t, K = ("mn", "K/m") if len(axes) > 1 else ("n", "K")
    letter = LAYOUTS[layout].letter
    slots = {"K": f"[B,K/{t},S,D]", "B": f"[B/n,{K},S,D]", "S": f"[B,{K},S/n,D]"}[letter]
    keys = f"2 x [B,T,{f'K/{t}' if letter == 'K' else K},D]"
    x, heads, hidden, last = f"[B,T,E/{t}]", f"[B,T,H/{t},D]", f"[B,T,F/{t}]", f"[B,1,V/{t}]"
    return {
        "embed": ("[B,T]", x), "q, k, v": (x, f"{heads}, {keys}"),
        "attention": (f"{heads}, 2 x {slots}", heads), "out": (heads, x),
        "gate, up": (x, f"2 x {hidden}"), "down": (hidden, x), "logits": (x, last),
        "draw": (last, "[B]")}


def step_table(steps, axes, layout, link, shape):
    """dict, tuple, str, scalar, tuple -> list of dict: of each step of `step_comm` what a device
    holds before and after it, what it sends, and the least seconds of that by `link_seconds`."""
    rows, shapes = [], step_shapes(axes, layout)
    for name, (times, events) in steps.items():
        sent, (before, after) = tally(events), shapes[name]
        rows.append({
            "step": name, "times": times, "before": before, "after": after,
            "collectives": {kind: number for kind, (number, _) in sent.items()},
            "bytes": sum(size for _, size in sent.values()),
            "seconds": sum(number * link_seconds(kind, SENT[kind](size, n), n, link, shape)
                           for (kind, size, n), number in events.items())})
    return rows


def fsdp_comm(cfg, axes):
    """cfg, tuple -> Counter: what `sharded_loss` and its gradient send of the weights over axes of
    data of these sizes: three times a layer's matrices, which are gathered forwards and again
    backwards, while their gradients are scattered; the tables at both ends are gathered once."""
    events, tables = Counter(), dims(cfg)._replace(layers=())
    for tree, gathers in ((dims(cfg).layers, 2), (tables, 1)):
        for name in filter(lambda name: " " in name, jax.tree.leaves(tree)):
            size = size_of(name, cfg) * jnp.dtype(cfg.dtype).itemsize
            events += repeat(gathers, gather_comm(size // math.prod(axes), axes))
            events += scatter_comm(size, axes)
    return events
