"""shard: the same model on several devices, every collective written out.

BT(E/t) reads: E, split over the t devices of the mesh axis "tensor". Training splits weights over
"data" too (FSDP) and gathers them a layer at a time. Generating splits weights and cache over
"tensor", and rows over "data", where each part has a copy of the weights: gathering would send all
weights through the links for every token, and links are slower than memory. Functions that name an
axis run inside `jax.shard_map`, on a device's own part; those that take a mesh call it. Letters as
in minillm.py.
"""
import math
from functools import partial
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from infer import (Cache, Q8, append, as_held, as_seen, cached_attention, check_batch,
                   check_prompts, check_room, check_speculation, draw, extend_cache, fill_cache,
                   insert, read_prompts, rounds, row_keys, write)
from minillm import (block, causal, causal_attention, check_tokens, dims, dot, embed, finite,
                     inner_jaxprs, loss, rotary, size_of)

P = jax.P
TENSOR = dict(H="tensor", K="tensor", F="tensor", V="tensor")  # letters to mesh axes
FSDP = dict(matrix="data")  # every matrix, over each axis of data: see `spec`

# ------------------------------------------------------------------------------- who holds what


def make_mesh(devices=None, **axes):
    """-> Mesh: of named axes and their sizes, as `make_mesh(data=2, tensor=4)`.

    A tuple makes an axis of each of its sizes: data=(4, 4) is data0 and data1. Axes follow the
    devices' coordinates where they have some, so that with the slice's own shape each is one axis
    of its torus. ValueError where there are fewer devices.
    `jax.config.update("jax_num_cpu_devices", 8)` before anything else simulates 8 of them.
    """
    devices = jax.devices() if devices is None else devices
    named = mesh_axes(**axes)
    wanted, there = math.prod(named.values()), len(devices)
    if not named or min(named.values()) < 1:
        raise ValueError(f"a mesh of {axes}: at least one axis, of at least one device")
    if wanted > there:
        raise ValueError(f"a mesh of {axes} takes {wanted} devices, there are {there}: "
                         f'jax.config.update("jax_num_cpu_devices", {wanted}) simulates them')
    ordered = sorted(devices, key=lambda d: (*getattr(d, "coords", ()), d.id))[:wanted]
    return jax.sharding.Mesh(np.array(ordered).reshape(*named.values()), tuple(named),
                             axis_types=(jax.sharding.AxisType.Auto,) * len(named))


def mesh_axes(**axes):
    """-> dict: mesh axes and sizes: an int is one axis, of a tuple each size is one, numbered."""
    named = {}
    for name, size in axes.items():
        named |= {f"{name}{i}": n for i, n in enumerate(size)} if isinstance(size, tuple) else {
            name: size}
    return named


def data_axes(mesh):
    """Mesh -> tuple: the axes that rows are split over: "data", or data0, data1, and so on."""
    return tuple(axis for axis in mesh.shape if axis.startswith("data"))


def split_over(axes):
    """str, tuple or None -> tuple: the axes that one dimension of a spec is split over."""
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def spec(name, cfg, mesh, rules):
    """str, cfg, Mesh, dict -> P: the mesh axes that each dimension of one array is split over.

    Rules are of letters, but for "matrix": each data axis in turn splits a letter that it divides,
    further where "tensor" already does: the first letter, or else from the last one backwards. (Of
    a letter in between a compiler made no scatter.) Vectors stay whole. ValueError where an axis
    divides no letter.
    """
    letters = name.replace(" ", "")
    held = {letter: [*split_over(rules.get(letter))] for letter in letters}

    def part(letter):
        return getattr(cfg, letter) // math.prod(mesh.shape[axis] for axis in held[letter])

    order = letters[0] + letters[:0:-1]
    for axis in data_axes(mesh) if "matrix" in rules and " " in name else ():
        n = mesh.shape[axis]
        letter = next((letter for letter in order if part(letter) % n == 0), None)
        if letter is None:
            raise ValueError(f"{name!r} of {[part(letter) for letter in letters]} cannot be split "
                             f"over {n} devices of axis {axis!r}: choose a size that divides one")
        held[letter].append(axis)
    return P(*((*axes, None)[0] if len(axes) < 2 else tuple(axes) for axes in held.values()))


def specs(cfg, mesh, rules):
    """cfg, Mesh, dict -> Params: `spec` of each array."""
    return jax.tree.map(partial(spec, cfg=cfg, mesh=mesh, rules=rules), dims(cfg))


def specs_of(params, cfg, mesh, rules):
    """Params, cfg, Mesh, dict -> Params: `specs`, also of int8 weights, whose scales have
    contracted letters of 1."""
    def leaf(name, w, spec):
        if not isinstance(w, Q8):
            return spec
        kept = len(name.split()[0])
        return type(w)(spec, P(*spec[:kept], *(None for _ in spec[kept:])))

    return jax.tree.map(leaf, dims(cfg), params, specs(cfg, mesh, rules))


def check_rules(cfg, mesh, rules):
    """cfg, Mesh, dict -> None: ValueError unless rules name axes that divide their letters."""
    letters = {letter: split_over(axes) for letter, axes in rules.items() if letter != "matrix"}
    names = set(jax.tree.leaves(dims(cfg)._replace(layers=dims(cfg).layers[0])))
    for name in names:
        axes = [axis for letter in name.replace(" ", "") for axis in letters.get(letter, ())]
        if len(set(axes)) < len(axes):
            raise ValueError(f"rules {rules} split two letters of one array, {name!r}, over the "
                             "same axis")
    for letter, axes in letters.items():
        if letter not in tuple("EHKDFV") or not set(axes) <= set(mesh.shape):
            raise ValueError(f"rule {letter}={rules[letter]!r}: expected one of the letters EHKDFV,"
                             f" and of the mesh's axes {tuple(mesh.shape)}")
        size, n = getattr(cfg, letter), math.prod(mesh.shape[axis] for axis in axes)
        if size % n:
            raise ValueError(f"{letter}={size} cannot be split over {n} devices of axis "
                             f"{rules[letter]!r}: choose an axis whose size divides {size}")
    for name in names:
        spec(name, cfg, mesh, rules)


def check_split(cfg, mesh, rules):
    """cfg, Mesh, dict -> None: `check_rules`, where x is split over E between layers as well."""
    check_rules(cfg, mesh, rules)
    check_rules(cfg, mesh, dict(E="tensor"))


def shardings(cfg, mesh, rules):
    """cfg, Mesh, dict -> Params: for `jax.device_put`, and so that parameters are born where they
    live: `jax.jit(init, static_argnums=1, out_shardings=shardings(...))`."""
    check_rules(cfg, mesh, rules)
    return jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs(cfg, mesh, rules))


def place(params, cfg, mesh, rules):
    """Params, cfg, Mesh, dict -> Params: each array, int8 too, split as the rules say.

    Where activations are quantised (`Q8A8`), each device scales its own part of a row before a
    scatter, and each part that passes in a ring: off by no more than on one device, but not equal
    to it. `Q8` is equal.
    """
    check_rules(cfg, mesh, rules)
    return jax.device_put(params, jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec),
                                               specs_of(params, cfg, mesh, rules)))


def stack(params):
    """Params -> Params: its layers as one Layer of arrays with a leading L, for `lax.scan`."""
    return params._replace(layers=jax.tree.map(lambda *ws: jnp.stack(ws), *params.layers))


def stacked(tree):
    """Params of specs -> Params: those of `stack`ed parameters: L is not split."""
    return tree._replace(layers=jax.tree.map(lambda spec: P(None, *spec), tree.layers[0]))


# -------------------------------------------------------------------------- collective matmuls


def gather_matmul(x, ws, axis="tensor", dtype=None):
    """...(E/t), ((F/t)E, ...) -> (...(F/t), ...): gather the contracted letter, then multiply.

    Each w is this device's part of the outputs: the result is split as w is. One trip of x serves
    all. The reference of `gather_matmul_ring`.
    """
    check_contracted(x, ws, lax.axis_size(axis))
    x = lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)
    return tuple(dot(x, w, dtype=dtype) for w in ws)


def gather_matmul_ring(x, ws, axis="tensor", dtype=None, both=False):
    """...(E/t), ((F/t)E, ...) -> (...(F/t), ...): multiply what is here while the rest travels.

    Each part of x goes once around the ring, in n - 1 permutes, and meets the columns of w that
    stand for it; sums are f32. `both`: half of each part goes either way, over both links of a
    torus axis at once.
    """
    n, here = lax.axis_size(axis), lax.axis_index(axis)
    check_contracted(x, ws, n)
    ways = check_ways(x.shape[-1], both)
    parts, width, total = jnp.split(x, len(ways), -1), x.shape[-1] // len(ways), [0.0] * len(ws)
    for i in range(n):
        for half, (way, part) in enumerate(zip(ways, parts, strict=True)):
            start = (here - way * i) % n * x.shape[-1] + half * width
            total = [sum_ + dot(part, columns(w, start, width), dtype=jnp.float32)
                     for sum_, w in zip(total, ws, strict=True)]
        if i < n - 1:
            parts = [pass_on(part, axis, way) for way, part in zip(ways, parts, strict=True)]
    return tuple(sum_.astype(dtype or x.dtype) for sum_ in total)


def matmul_scatter(x, w, axis="tensor", n=1):
    """...(F/t), E(F/t) -> ...(E/t): multiply what is here, then add up and split over E, in f32.

    The last n letters of w are contracted. The reference of `matmul_scatter_ring`.
    """
    check_scattered(w, lax.axis_size(axis))
    y = dot(x, w, n, dtype=jnp.float32)
    return lax.psum_scatter(y, axis, scatter_dimension=y.ndim - 1, tiled=True).astype(x.dtype)


def matmul_scatter_ring(x, w, axis="tensor", n=1, both=False):
    """...(F/t), E(F/t) -> ...(E/t): partial sums ride the ring and come to rest where they belong.

    Each passes every device once, in as many permutes as there are others, and takes up what that
    device has to add: the sum for device d is begun by the one after it, and reaches it last.
    """
    size, here = lax.axis_size(axis), lax.axis_index(axis)
    check_scattered(w, size)
    part = w.shape[0] // size
    ways = check_ways(part, both)
    width, total = part // len(ways), [0.0] * len(ways)
    for i in range(size):
        if i:
            total = [pass_on(sum_, axis, way) for way, sum_ in zip(ways, total, strict=True)]
        starts = [(here - way * (i + 1)) % size * part + half * width
                  for half, way in enumerate(ways)]
        total = [sum_ + dot(x, outputs(w, start, width), n, dtype=jnp.float32)
                 for sum_, start in zip(total, starts, strict=True)]
    return jnp.concatenate(total, -1).astype(x.dtype)


def pass_on(x, axis, way):
    """array, axis, +-1 -> array: to the next device of the ring, from the one before."""
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


def check_ways(size, both):
    """int, bool -> tuple: +1, and -1 with `both`. ValueError for an odd size both ways."""
    if both and size % 2:
        raise ValueError(f"{size} numbers a device cannot go half each way: both=False")
    return (1, -1) if both else (1,)


def check_contracted(x, ws, n):
    """...(E/t), (FE, ...), int -> None: ValueError unless n parts of x are what w contracts."""
    for w in ws:
        if w.shape[-1] != n * x.shape[-1]:
            raise ValueError(f"{n} parts of {x.shape[-1]} do not make the {w.shape[-1]} numbers "
                             f"that a weight of {w.shape} contracts: E must divide by {n}")


def check_scattered(w, n):
    """EF, int -> None: ValueError unless the outputs can be split over n devices."""
    if w.shape[0] % n:
        raise ValueError(f"E={w.shape[0]} outputs cannot be split over {n} devices")


# ------------------------------------------------------------------- the parts between products


def split_norm(x, scale, eps, axis="tensor"):
    """BT(E/t), E, eps -> BT(E/t): `rms_norm`: one sum of squares a token travels."""
    part, wide = x.shape[-1], x.astype(jnp.float32)
    squares = lax.psum(jnp.sum(wide * wide, axis=-1, keepdims=True), axis)
    unit = wide * lax.rsqrt(squares / (part * lax.axis_size(axis)) + eps)
    mine = lax.dynamic_slice_in_dim(scale, lax.axis_index(axis) * part, part)
    return (unit * mine.astype(jnp.float32)).astype(x.dtype)


def split_embed(params, tokens, cfg, axis="tensor"):
    """Params, BT, cfg -> BT(E/t): each device looks up the tokens of its part of the vocabulary;
    one device has each row, so that the sum is exact."""
    rows = cfg.V // lax.axis_size(axis)
    local = tokens - lax.axis_index(axis) * rows
    x = embed(params, jnp.clip(local, 0, rows - 1), cfg)
    x = jnp.where(((local >= 0) & (local < rows))[..., None], x, 0)
    return lax.psum_scatter(x, axis, scatter_dimension=2, tiled=True)


def split_unembed(params, x, cfg, axis="tensor", enter=gather_matmul):
    """Params, BT(E/t), cfg -> BT(V/t): f32 logits of this device's part of the vocabulary."""
    table = params.embed if cfg.tied else params.unembed
    x = split_norm(x, params.out_norm, cfg.eps, axis)
    return enter(x, (table,), axis=axis, dtype=jnp.float32)[0]


def split_nats(logits, targets, axis="tensor"):
    """BT(V/t), BT -> BT: cross-entropies from split logits: no device ever holds BTV."""
    top = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), axis)
    total = lax.psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), axis)
    local = targets - lax.axis_index(axis) * logits.shape[-1]
    mine = (local >= 0) & (local < logits.shape[-1])
    at = jnp.clip(local, 0, logits.shape[-1] - 1)[..., None]
    chosen = jnp.where(mine, jnp.take_along_axis(logits, at, axis=-1)[..., 0], 0)
    return jnp.log(total) + top - lax.psum(chosen, axis)


# -------------------------------------------------------------------------------------- training


def check_rows(tokens, mesh):
    """B(T+1), Mesh -> None: ValueError unless rows of two or more tokens can be split over "data".
    """
    n = math.prod(mesh.shape[axis] for axis in data_axes(mesh))
    if not data_axes(mesh):
        raise ValueError(f"a mesh of {tuple(mesh.shape)}: rows are split over an axis 'data'")
    if len(tokens) % n:
        raise ValueError(f"{len(tokens)} rows cannot be split over {n} devices of axis 'data'")
    if tokens.shape[1] < 2:
        raise ValueError(f"tokens of shape {tokens.shape}: a loss takes B(T+1), two or more a row")


def fsdp_loss(params, tokens, cfg, mesh):
    """Params, B(T+1), cfg, Mesh -> scalar: `loss`, fully sharded, the compiler's way.

    Parameters are split over "data" by `place(..., FSDP)`, and rows are kept there; what is
    gathered when is the compiler's choice. To be jitted.
    """
    check_tokens(tokens, cfg)
    check_rows(tokens, mesh)

    def over_data(a):
        return lax.with_sharding_constraint(a, jax.NamedSharding(mesh, P(data_axes(mesh))))

    def kept(x, w, table, cfg, attend):
        x, state = block(over_data(x), w, table, cfg, attend)
        return over_data(x), state

    return loss(params, over_data(tokens), cfg, kept)


def gather_data(w, split):
    """Params, specs -> Params: what FSDP split is whole again, one axis of the torus after another.

    The gradient is scattered and added up, an axis at a time too. Gathered over all axes at once,
    each gather and scatter may become an all-reduce: twice the bytes, and whole gradients on every
    device.
    """
    def whole(w, spec):
        for i, axes in enumerate(spec):
            for axis in reversed(split_over(axes)):
                if axis.startswith("data"):
                    w = lax.all_gather(w, axis, axis=i, tiled=True)
        return w

    return jax.tree.map(whole, w, split)


def sharded_loss(params, tokens, cfg, mesh, enter=gather_matmul, leave=matmul_scatter):
    """Params, B(T+1), cfg, Mesh -> scalar: `loss`, by hand, on a mesh of "data" and "tensor".

    (n, 1) is FSDP, (1, n) tensor parallelism, (n, m) both. `params` are `stack`ed. Rows are split
    over "data"; each layer's weights are gathered there before use, and again for its gradient.
    Over "tensor" weights stay where they are, and x is split over E between layers. ValueError for
    what does not divide.
    """
    check_tokens(tokens, cfg)
    rules = {**TENSOR, **FSDP}
    check_split(cfg, mesh, rules)
    check_rows(tokens, mesh)
    if not hasattr(params.layers, "wq"):
        raise ValueError("params hold a tuple of layers: stack(params) makes them one")
    split, rows = specs(cfg, mesh, rules), P(data_axes(mesh))
    run = partial(local_loss, cfg=cfg, split=split, rows=data_axes(mesh),
                  seams=dict(enter=enter, leave=leave, norm=split_norm))
    return jax.shard_map(run, mesh=mesh, in_specs=(stacked(split), rows), out_specs=P())(
        params, tokens)


def local_loss(params, tokens, cfg, split, rows, seams):
    """Params, B(T+1), cfg, specs, axes, dict -> scalar: one device's part of `sharded_loss`."""
    table = rotary(jnp.arange(tokens.shape[1] - 1)[None], cfg)
    ends = gather_data(params._replace(layers=()), split._replace(layers=()))

    def one(x, w):
        return block(x, gather_data(w, split.layers[0]), table, cfg, causal, **seams)

    x = split_embed(ends, tokens[:, :-1], cfg)
    x, _ = lax.scan(jax.checkpoint(one), x, params.layers)
    logits = split_unembed(ends, x, cfg, enter=seams["enter"])
    return lax.pmean(jnp.mean(split_nats(logits, tokens[:, 1:])), rows)


# ------------------------------------------------------------------------------------ generating


def own_rows(a, axis="tensor"):
    """B..., axis -> (B/t)...: this device's rows."""
    rows = len(a) // lax.axis_size(axis)
    return lax.dynamic_slice_in_dim(a, lax.axis_index(axis) * rows, rows)


def over_batch(attend, axis="tensor"):
    """attend -> attend: each device holds all heads of B/t rows. wk and wv are whole, so k and v
    are here already; two all-to-alls bring every row's queries to its device, and the results back.
    """
    def attending(q, k, v, old_k, old_v, pos):
        q = lax.all_to_all(q, axis, split_axis=0, concat_axis=2, tiled=True)
        k, v, pos = (own_rows(a, axis) for a in (k, v, pos))
        out, kv = attend(q, k, v, old_k, old_v, pos)
        return lax.all_to_all(out, axis, split_axis=2, concat_axis=0, tiled=True), kv

    return attending


def normalised_over(part, axis="tensor"):
    """Partial -> BKMD: this device's share of the mean of the values that all devices saw:
    two numbers a query travel."""
    largest = lax.pmax(part.largest, axis)
    here = jnp.exp(part.largest - finite(largest))
    return part.values * here / lax.psum(part.total * here, axis)


def extend_slots(q, k, v, old_k, old_v, pos, axis="tensor"):
    """BT(H/t)D, BKTD, BKTD, BK(S/t)D, BK(S/t)D, BT -> BT(H/t)D, (BK(S/t)D, BK(S/t)D): each device
    holds S/t slots of all heads; the shares of the values are added up."""
    pos = pos - lax.axis_index(axis) * old_k.shape[2]  # below 0, or beyond: another device's
    k, v = write(old_k, k, pos), write(old_v, v, pos)
    q = lax.all_gather(q, axis, axis=2, tiled=True)
    out = cached_attention(q, k, v, pos, partial(normalised_over, axis=axis))
    return lax.psum_scatter(out, axis, scatter_dimension=2, tiled=True), (k, v)


def fill_slots(q, k, v, old_k, old_v, pos, axis="tensor"):
    """BT(H/t)D, BKTD, BKTD, BK(S/t)D, BK(S/t)D, BT -> BT(H/t)D, (BK(S/t)D, BK(S/t)D): a prompt's
    heads are split, its slots written where they belong."""
    n, here, heads = lax.axis_size(axis), lax.axis_index(axis), q.shape[2]
    held = as_held(k, old_k), as_held(v, old_v)
    group = n * heads // k.shape[1]  # query heads that share a key head; all of k and v is here
    kv = (here * heads + jnp.arange(heads)) // group
    seen = (as_seen(new, q.dtype)[:, kv] for new in held)

    def mine(new, old):
        S = old.shape[2]
        new = jnp.pad(new, ((0, 0), (0, 0), (0, n * S - new.shape[2]), (0, 0)))
        return lax.dynamic_slice_in_dim(new, here * S, S, axis=2)

    return causal_attention(q, *seen), insert((old_k, old_v), jax.tree.map(
        mine, held, (old_k, old_v)), 0)


class Layout(NamedTuple):
    """A way to split a cache over the mesh axis "tensor"."""
    letter: str       # of BKSD, that is split
    rules: dict       # for the weights beside it
    attend: Callable  # what `extend` does at a layer: extend_cache's contract
    fill: Callable    # what `prefill` does there


WHOLE_KV = {letter: axis for letter, axis in TENSOR.items() if letter != "K"}
LAYOUTS = {"heads": Layout("K", TENSOR, extend_cache, fill_cache),
           "batch": Layout("B", WHOLE_KV, over_batch(extend_cache), over_batch(fill_cache)),
           "sequence": Layout("S", WHOLE_KV, extend_slots, fill_slots)}


def cache_specs(mesh, layout):
    """Mesh, str -> Cache of specs: rows are split over data's axes too, where there are some: each
    part of them has a copy of the model."""
    rows, letter = data_axes(mesh), LAYOUTS[layout].letter
    over = {"B": rows} | {letter: (*(rows if letter == "B" else ()), "tensor")}
    split = P(*(over.get(letter) or None for letter in "BKS"))
    return Cache(split, split, P(rows or None))


def check_layout(cache, mesh, layout):
    """Cache, Mesh, str -> None: ValueError unless the mesh can split what the layout splits."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    if "tensor" not in mesh.shape:
        raise ValueError(f"a mesh of {tuple(mesh.shape)}: a cache is split over an axis 'tensor'")
    sizes_ = dict(zip("BKSD", cache.k[0].shape, strict=True))
    split = {name: dict(zip("BKS", cache_specs(mesh, name).k, strict=True)) for name in LAYOUTS}

    def lacks(name):
        return [(letter, n) for letter, axes in split[name].items() if sizes_[letter] % (
            n := math.prod(mesh.shape[axis] for axis in split_over(axes)))]

    for letter, n in lacks(layout):
        fit = [name for name in LAYOUTS if not lacks(name)]
        raise ValueError(f"{letter}={sizes_[letter]} cannot be split over {n} devices: that is "
                         f"what the layout {layout!r} does"
                         + (f"; {' and '.join(fit)} can" if fit else ""))


def tp_specs(params, cache, cfg, mesh, layout):
    """Params, Cache, cfg, Mesh, str -> specs of params, of cache, of rows: for what runs in
    `layout`. ValueError where a letter that is split does not divide."""
    check_layout(cache, mesh, layout)
    rules, split = LAYOUTS[layout].rules, cache_specs(mesh, layout)
    check_split(cfg, mesh, rules)
    return specs_of(params, cfg, mesh, rules), split, split.length


def place_cache(cache, mesh, layout):
    """Cache, Mesh, str -> Cache: split over heads, batch or sequence."""
    check_layout(cache, mesh, layout)
    return jax.device_put(cache, jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec),
                                              cache_specs(mesh, layout)))


def whole_unembed(params, x, cfg, enter=gather_matmul):
    """Params, BT(E/t), cfg -> BTV: every device has all logits, and draws the same tokens."""
    logits = split_unembed(params, x, cfg, enter=enter)
    return lax.all_gather(logits, "tensor", axis=2, tiled=True, to="invarying")


def tp_parts(enter, leave):
    """-> dict: what `extend` and `prefill` take in place of their own parts."""
    return dict(embed=split_embed, enter=enter, leave=leave, norm=split_norm)


def tp_extend(params, cache, tokens, cfg, mesh, layout="heads", enter=gather_matmul,
              leave=matmul_scatter):
    """Params, Cache, BT, cfg, Mesh -> BTE, Cache: `extend` over the mesh axis "tensor".

    A layer goes BT(E/t) -> BT(H/t)D and k, v -> attention -> BT(E/t) -> BT(F/t) -> BT(E/t). The
    cache is split over "heads": attention is local, k and v are BT(K/t)D, and K must divide; over
    "batch": for K smaller than the axis; or over "sequence": for a cache that is too large for a
    device. Rows are split over axes of data, where the mesh has some. What was placed in another
    way is moved first. ValueError for what does not divide, and those of `extend`.
    """
    check_tokens(tokens, cfg)
    check_batch(cache, tokens)
    check_room(cache, tokens.shape[1])
    split, held, rows = tp_specs(params, cache, cfg, mesh, layout)
    run = partial(append, cfg=cfg, attend=LAYOUTS[layout].attend, **tp_parts(enter, leave))
    return jax.shard_map(run, mesh=mesh, in_specs=(split, held, rows), out_specs=(
        P(*rows, None, "tensor"), held))(params, cache, tokens)


def tp_unembed(params, x, cfg, mesh, layout="heads", enter=gather_matmul):
    """Params, BTE, cfg, Mesh -> BTV: f32 logits of what `tp_extend` gave, whole on each device."""
    rules, rows = LAYOUTS[layout].rules, P(data_axes(mesh) or None)
    return jax.shard_map(partial(whole_unembed, cfg=cfg, enter=enter), mesh=mesh, in_specs=(
        specs_of(params, cfg, mesh, rules), P(*rows, None, "tensor")), out_specs=rows)(params, x)


def tp_prefill(params, cache, tokens, lengths, cfg, mesh, layout="heads", enter=gather_matmul,
               leave=matmul_scatter):
    """Params, Cache, BT, B, cfg, Mesh -> BV, Cache: `prefill`, of all rows at once, over the mesh
    axis "tensor"."""
    check_tokens(tokens, cfg)
    check_batch(cache, tokens)
    check_prompts(cache, tokens, lengths)
    split, held, rows = tp_specs(params, cache, cfg, mesh, layout)
    run = partial(read_prompts, cfg=cfg, attend=LAYOUTS[layout].fill,
                  unembed=partial(whole_unembed, enter=enter), **tp_parts(enter, leave))
    return jax.shard_map(run, mesh=mesh, in_specs=(split, held, rows, rows), out_specs=(
        rows, held))(params, cache, tokens, lengths)


def tp_generate(params, cache, logits, key, n, cfg, mesh, layout="heads", enter=gather_matmul,
                leave=matmul_scatter, **how):
    """Params, Cache, BV, key, n, cfg, Mesh -> Bn, BV, Cache: `generate`, one scan on all devices.

    `how` is temperature, top_k, top_p and end. ValueError as of `tp_extend` and `generate`.
    """
    check_room(cache, n)
    split, held, rows = tp_specs(params, cache, cfg, mesh, layout)
    run = partial(draw, n=n, cfg=cfg, **how, unembed=partial(whole_unembed, enter=enter),
                  append=partial(append, attend=LAYOUTS[layout].attend, **tp_parts(enter, leave)))
    return jax.shard_map(run, mesh=mesh, in_specs=(split, held, rows, rows), out_specs=(
        rows, rows, held))(params, cache, logits, row_keys(key, len(logits)))


def tp_speculate(params, cache, tokens, key, n, cfg, mesh, draft, state, layout="heads",
                 enter=gather_matmul, leave=matmul_scatter, **how):
    """Params, Cache, BS, key, n, cfg, Mesh, draft, state -> BS, Cache, state, counts: `speculate`.

    The draft is not split: every device proposes the same. ValueError as of `tp_extend` and
    `speculate`.
    """
    keys, n_draft = check_speculation(params, cache, tokens, key, n, cfg, draft, state)
    split, held, rows = tp_specs(params, cache, cfg, mesh, layout)
    run = partial(rounds, n=n, n_draft=n_draft, cfg=cfg, **how,
                  unembed=partial(whole_unembed, enter=enter),
                  append=partial(append, attend=LAYOUTS[layout].attend, **tp_parts(enter, leave)))
    return jax.shard_map(
        lambda params, cache, tokens, keys, draft, state: run(
            params, cache, tokens, keys, draft=draft, state=state),
        mesh=mesh, in_specs=(split, held, rows, P(None, *rows), P(), rows),
        out_specs=(rows, held, rows, rows))(params, cache, tokens, keys, draft, state)


# ------------------------------------------------------------------------------ what travels


SENT = {  # what one device sends, of its own `size` bytes, to n - 1 others around a ring
    "all_gather": lambda size, n: size * (n - 1),
    "reduce_scatter": lambda size, n: -(-size // n) * (n - 1),
    "all_reduce": lambda size, n: 2 * -(-size // n) * (n - 1),  # scattered, then gathered
    "all_to_all": lambda size, n: -(-size // n) * (n - 1),
    "permute": lambda size, n: size}
COLLECTIVES = {"all_gather": "all_gather", "all_gather_invariant": "all_gather",
               "reduce_scatter": "reduce_scatter", "psum": "all_reduce",
               "psum_invariant": "all_reduce", "pmax": "all_reduce", "all_to_all": "all_to_all",
               "ppermute": "permute"}


def tally(events):
    """list of (collective, times, bytes, devices) -> dict: collective -> (number, bytes sent)."""
    sent = {}
    for kind, times, size, n in events:
        if n > 1 and times:
            number, total = sent.get(kind, (0, 0))
            sent[kind] = number + times, total + times * SENT[kind](size, n)
    return sent


def traced_comm(fn, *args):
    """fn, arrays -> dict: collective -> (number, bytes each device sends). The oracle.

    Counted in the jaxpr, through calls, a scan's body times its length, of what COLLECTIVES names
    and none that the compiler adds; an all-reduce is taken as a ring's. ValueError for a collective
    in a `while` or `cond`.
    """
    def events(jaxpr, axes):
        found = []
        for eqn in jaxpr.eqns:
            name, params = eqn.primitive.name, eqn.params
            if name in COLLECTIVES:
                over = params.get("axes", params.get("axis_name"))
                n = math.prod(axes[axis] for axis in (over if isinstance(over, tuple) else (over,)))
                found += [(COLLECTIVES[name], 1, v.aval.size * v.aval.dtype.itemsize, n)
                          for v in eqn.invars]
            inner = dict(params["mesh"].shape) if name == "shard_map" else axes
            inside = [event for item in inner_jaxprs(eqn) for event in events(item, inner)]
            if inside and name in ("while", "cond"):
                raise ValueError(f"a collective inside `{name}`: how often it runs is unknown")
            times = params["length"] if name == "scan" else 1
            found += [(kind, times * k, size, n) for kind, k, size, n in inside]
        return found

    return tally(events(jax.make_jaxpr(fn)(*args).jaxpr, {}))


def trips(cfg, rows, t, ring):
    """cfg, int, int, int -> event, event: one gather_matmul's and one matmul_scatter's trip.

    `ring` is 0 for the references, or the number of ways, 1 or 2. x travels in cfg.dtype, sums in
    f32.
    """
    wide = jnp.dtype(cfg.dtype).itemsize
    if ring:
        part = rows * cfg.E // t // ring
        return tuple(("permute", (t - 1) * ring, part * size, t) for size in (wide, 4))
    return (("all_gather", 1, rows * cfg.E // t * wide, t),
            ("reduce_scatter", 1, rows * cfg.E * 4, t))


def repeated(times, *events):
    """int, events -> list: each of them so often."""
    return [(kind, times * number, size, n) for kind, number, size, n in events]


def train_comm(cfg, B, T, mesh, ring):
    """cfg, int, int, Mesh, int -> list of events: `sharded_loss` and its gradient.

    Over "tensor", a layer gathers x twice, again when it is computed again, and scatters twice,
    once again: its last product is not computed again. The gradient of a gather is a scatter in
    x's dtype, that of a scatter a gather in f32. Over "data", matrices are gathered twice and their
    gradients scattered once, an axis at a time; gradients of norm scales are added up.
    """
    axes, tensor = [mesh.shape[axis] for axis in data_axes(mesh)], mesh.shape["tensor"]
    data = math.prod(axes)
    rows, wide = B // data * T, jnp.dtype(cfg.dtype).itemsize
    gather, scatter = trips(cfg, rows, tensor, ring)
    x, squares = rows * cfg.E * wide, rows * 4
    gather_back = gather if ring else ("reduce_scatter", 1, x, tensor)
    scatter_back = scatter if ring else ("all_gather", 1, rows * cfg.E // tensor * 4, tensor)
    # all-reduces of a sum of squares: two norms forwards, again, and backwards; at the end one norm
    # both ways, and the loss's largest, total and chosen logit
    found = repeated(cfg.L, *repeated(4, gather), *repeated(3, scatter), *repeated(2, gather_back),
                     *repeated(2, scatter_back), ("all_reduce", 6, squares, tensor))
    found += [("reduce_scatter", 1, x, tensor), ("all_gather", 1, x // tensor, tensor),
              gather, gather_back, ("all_reduce", 5, squares, tensor), ("all_reduce", 1, 4, data)]
    names = dims(cfg)
    for tree, again in ((names.layers, 2), (names._replace(layers=()), 1)):
        for name in jax.tree.leaves(tree):
            size = size_of(name, cfg)
            if name == "E":  # of x's split letter each device scales its own part
                found += [("all_reduce", 1, size * wide, tensor),
                          ("all_reduce", 1, size // tensor * 4, data)]
            elif " " not in name:
                found.append(("all_reduce", 1, size * 4, data * tensor))
            for i, n in enumerate(axes if " " in name else ()):
                part = size // tensor // math.prod(axes[:i]) * wide
                found += [("all_gather", again, part // n, n), ("reduce_scatter", 1, part, n)]
    return found


def extend_comm(cfg, B, T, tensor, layout, ring):
    """cfg, ... -> list of events: `tp_extend` by T tokens."""
    rows, wide = B * T, jnp.dtype(cfg.dtype).itemsize
    heads = rows * cfg.H * cfg.D * wide
    attend = {"heads": [], "batch": [("all_to_all", 2, heads // tensor, tensor)],
              "sequence": [("all_gather", 1, heads // tensor, tensor),
                           ("all_reduce", 2, rows * cfg.H * 4, tensor),
                           ("reduce_scatter", 1, heads, tensor)]}[layout]
    return repeated(cfg.L, *repeated(2, *trips(cfg, rows, tensor, ring)),
                    ("all_reduce", 2, rows * 4, tensor), *attend) + [
        ("reduce_scatter", 1, rows * cfg.E * wide, tensor)]


def unembed_comm(cfg, rows, tensor, ring):
    """cfg, int, int, int -> list of events: logits of so many positions, on every device."""
    return [("all_reduce", 1, rows * 4, tensor), trips(cfg, rows, tensor, ring)[0],
            ("all_gather", 1, rows * cfg.V // tensor * 4, tensor)]


def comm_bytes(cfg, form, B, T=1, data=1, tensor=1, layout="heads", ring=0):
    """cfg, form, int -> dict: collective -> (number, bytes each device sends), as the program says.

    `form` is "train" (`sharded_loss` with its gradient, B rows of T + 1 tokens), "extend",
    "prefill" (T tokens), "generate" (T steps) or "verify" (`extend` and logits of all T); `data`
    may be a tuple, as of `make_mesh`; `ring` is 0 for the reference collectives, 1 or 2 for rings
    of so many ways. ValueError for another form, or where it cannot be split so.
    """
    if ring not in (0, 1, 2) or layout not in LAYOUTS:
        raise ValueError(f"ring={ring}, layout={layout!r}: expected 0, 1 or 2, and one of "
                         + ", ".join(LAYOUTS))
    axes = mesh_axes(data=data, tensor=tensor)
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    copies = math.prod(mesh.shape[axis] for axis in data_axes(mesh))
    n = copies * (tensor if layout == "batch" and form != "train" else 1)
    if B % n:
        raise ValueError(f"B={B} rows cannot be split over {n} devices: choose a multiple of {n}")
    check_split(cfg, mesh, {**TENSOR, **FSDP} if form == "train" else LAYOUTS[layout].rules)
    if form == "train":
        return tally(train_comm(cfg, B, T, mesh, ring))
    B //= copies
    extended = partial(extend_comm, cfg, B, tensor=tensor, layout=layout, ring=ring)
    if form == "extend":
        return tally(extended(T))
    if form == "generate":
        return tally(repeated(T, *extended(1), *unembed_comm(cfg, B, tensor, ring)))
    if form == "verify":
        return tally(extended(T) + unembed_comm(cfg, B * T, tensor, ring))
    if form == "prefill":  # a prompt's slots are split where they are made
        read = extended(T, layout="heads" if layout == "sequence" else layout)
        return tally(read + unembed_comm(cfg, B, tensor, ring))
    raise ValueError(f"form={form!r}: expected train, extend, prefill, generate or "
                     "verify")


def comm_seconds(sent, link, ways=1):
    """dict, bytes/s, int -> seconds: of what `comm_bytes` gives, over links of so many bytes a
    second each way. Permutes go `ways` ways around a ring, all others both. Latency, a microsecond
    or so for each hop, is not in it."""
    return sum(size / link / (ways if kind == "permute" else 2)
               for kind, (_, size) in sent.items())
