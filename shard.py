"""shard: the same model on several devices, every collective written out.

BT(E/t) reads: E, split over the t devices of the mesh axis "tensor". Training splits weights over
"data" too (FSDP) and gathers them a layer at a time, and tokens over "context" (ring attention).
Generating splits weights and cache over "tensor", and rows over "data", where each part has a copy
of the weights: gathering would send all weights through the links for every token, and links are
slower than memory. Functions that name an axis run inside `jax.shard_map`, on a device's own part;
those that take a mesh call it. Letters as in minillm.py.
"""
import math
from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from infer import (TINY, Cache, Q8, append, array_bytes, as_held, as_seen, cached_attention,
                   check_batch, check_prompts, check_room, check_speculation, draw, empty,
                   extend_cache, fill_cache, filtered, insert, kth_largest, noise, one_hot,
                   read_prompts, rounds, row_keys, row_largest, sample, sampling, serve, slots_of,
                   through_layers, usable, write)
from minillm import (KEEPABLE, Partial, block, by_token, causal, causal_attention, causal_backward,
                     causal_blocks, causal_forward, check_tokens, dims, dot, embed, finite,
                     in_blocks, inner_jaxprs, loss, mean_nats, merge, normalised, rms_norm,
                     rotary, size_of, token_blocks, unembedding)

P = jax.P
TENSOR = dict(H="tensor", K="tensor", F="tensor", V="tensor")  # letters to mesh axes
FSDP = dict(matrix="data")  # every matrix, over each axis of data and context: see `spec`
KEPT = "attention", "gate"  # of `KEEPABLE`: what costs most to make again, for its bytes

# ------------------------------------------------------------------------------- who holds what


def make_mesh(devices=None, **axes):
    """-> Mesh: of named axes and their sizes, as `make_mesh(data=2, tensor=4)`.

    A tuple makes an axis of each of its sizes: data=(4, 4) is data0 and data1. Axes follow the
    devices' coordinates where they have some, so that with the slice's own shape each is one axis
    of its torus, and what goes over several goes over one after another. ValueError where there are
    fewer devices.
    `jax.config.update("jax_num_cpu_devices", 8)` before anything else simulates 8 of them.
    """
    devices = jax.devices() if devices is None else devices
    named = mesh_axes(**axes)
    wanted, there = math.prod(named.values()), len(devices)
    if not named:
        raise ValueError("a mesh of no axes: at least one")
    if wanted > there:
        raise ValueError(f"a mesh of {axes} takes {wanted} devices, there are {there}: "
                         f'jax.config.update("jax_num_cpu_devices", {wanted}) simulates them')
    ordered = sorted(devices, key=lambda d: (*getattr(d, "coords", ()), d.id))[:wanted]
    return jax.sharding.Mesh(np.array(ordered).reshape(*named.values()), tuple(named),
                             axis_types=(jax.sharding.AxisType.Auto,) * len(named))


def mesh_axes(**axes):
    """-> dict: mesh axes and sizes: an int is one axis, of a tuple each size is one, numbered.
    ValueError for two of one name, or of no device."""
    named = [pair for name, size in axes.items() for pair in (
        [(f"{name}{i}", n) for i, n in enumerate(size)] if isinstance(size, tuple)
        else [(name, size)])]
    if min([n for _, n in named], default=1) < 1 or len(dict(named)) < len(named):
        raise ValueError(f"a mesh of {axes}: each axis is of another name and of at least one "
                         "device")
    return dict(named)


def axes_of(mesh, *words):
    """Mesh, strs -> tuple: the axes of those names: of "data" it, or data0, data1, and so on."""
    return tuple(axis for word in words for axis in mesh.shape
                 if word in (axis, axis.rstrip("0123456789")))


def size_over(mesh, axes):
    """Mesh, tuple -> int: devices along those axes together."""
    return math.prod(mesh.shape[axis] for axis in axes)


def as_axes(axes):
    """str, int, tuple or None -> tuple: several axes, or their sizes, or one, or none."""
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def spec(name, cfg, mesh, rules):
    """str, cfg, Mesh, dict -> P: the mesh axes that each dimension of one array is split over.

    Rules are of letters, but for "matrix": each axis of data and context in turn splits a letter
    that it divides, on top of what "tensor" splits: the first letter, or else from the last one
    backwards. (Split along one in between, a gradient was added up whole.) Vectors stay whole.
    ValueError where an axis divides no letter.
    """
    letters = name.replace(" ", "")
    held = {letter: [*axes_of(mesh, *as_axes(rules.get(letter)))] for letter in letters}

    def part(letter):
        return getattr(cfg, letter) // size_over(mesh, held[letter])

    order = letters[0] + letters[:0:-1]
    for axis in axes_of(mesh, "data", "context") if "matrix" in rules and " " in name else ():
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
    letters = {letter: axes_of(mesh, *as_axes(axes)) for letter, axes in rules.items()
               if letter != "matrix"}
    names = set(jax.tree.leaves(dims(cfg)._replace(layers=dims(cfg).layers[0])))
    for name in names:
        axes = [axis for letter in name.replace(" ", "") for axis in letters.get(letter, ())]
        if len(set(axes)) < len(axes):
            raise ValueError(f"rules {rules} split two letters of one array, {name!r}, over the "
                             "same axis")
    for letter, axes in letters.items():
        known = all(axes_of(mesh, word) for word in as_axes(rules[letter]))
        if letter not in tuple("EHKDFV") or not known:
            raise ValueError(f"rule {letter}={rules[letter]!r}: expected one of the letters EHKDFV,"
                             f" and of the mesh's axes {tuple(mesh.shape)}")
        size, n = getattr(cfg, letter), size_over(mesh, axes)
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


def gathered(x, axes, dim, **how):
    """array, axes, int -> array: whole again along `dim`, one axis of the torus after another. With
    to="invarying" `jax.shard_map` knows that it is the same on all of them."""
    for axis in reversed(as_axes(axes)):
        x = lax.all_gather(x, axis, axis=dim, tiled=True, **how)
    return x


def scattered(x, axes, dim):
    """array, axes, int -> array: added up, and split along `dim`, one axis after another. Over all
    axes at once it may become an all-reduce: twice the bytes, and whole sums on every device."""
    for axis in as_axes(axes):
        x = lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    return x


def gather_matmul(x, ws, axis="tensor", dtype=None, norm=None):
    """...(E/t), ((F/t)E, ...) -> (...(F/t), ...): gather the contracted letter, then multiply.

    Each w is this device's part of the outputs: the result is split as w is. One trip of x serves
    all. With norm=(E, eps), of all E scales, its rows are normalised where they are whole:
    `rms_norm`. The reference of `gather_matmul_ring`.
    """
    check_contracted(x, ws, lax.axis_size(axis), norm)
    x = gathered(x, axis, x.ndim - 1)
    x = rms_norm(x, *norm) if norm else x
    return tuple(dot(x, w, dtype=dtype) for w in ws)


def gather_matmul_ring(x, ws, axis="tensor", dtype=None, norm=None, both=False):
    """...(E/t), ((F/t)E, ...) -> (...(F/t), ...): multiply what is here while the rest travels.

    Each part of x goes once around the ring, in n - 1 permutes, and meets the columns of w that
    stand for it; sums are f32. `both`: half of each part goes either way, over both links of a
    torus axis at once. With norm=(E, eps) rows are normalised before they set out: one sum of
    squares a row travels first.
    """
    n, here = lax.axis_size(axis), lax.axis_index(axis)
    check_contracted(x, ws, n, norm)
    x = split_norm(x, *norm, axis) if norm else x
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
    return scattered(dot(x, w, n, dtype=jnp.float32), axis, x.ndim - n).astype(x.dtype)


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


def check_contracted(x, ws, n, norm=None):
    """...(E/t), (FE, ...), int, (E, eps) -> None: ValueError unless n parts of x are what w
    contracts, and what is scaled."""
    if norm and len(norm[0]) != n * x.shape[-1]:
        raise ValueError(f"{len(norm[0])} scales for rows of {n} times {x.shape[-1]} numbers: each "
                         "device takes all of them")
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
    return scattered(jnp.where(((local >= 0) & (local < rows))[..., None], x, 0), axis, 2)


def split_unembed(params, x, cfg, axis="tensor", enter=gather_matmul):
    """Params, BT(E/t), cfg -> BT(V/t): f32 logits of this device's part of the vocabulary."""
    return enter(x, (unembedding(params, cfg),), axis=axis, dtype=jnp.float32,
                 norm=(params.out_norm, cfg.eps))[0]


def split_nats(logits, targets, axis="tensor"):
    """BT(V/t), BT -> BT: cross-entropies from split logits: no device ever holds BTV."""
    top = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), axis)
    total = lax.psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), axis)
    local = targets - lax.axis_index(axis) * logits.shape[-1]
    mine = (local >= 0) & (local < logits.shape[-1])
    at = jnp.clip(local, 0, logits.shape[-1] - 1)[..., None]
    chosen = jnp.where(mine, jnp.take_along_axis(logits, at, axis=-1)[..., 0], 0)
    return jnp.log(total) + top - lax.psum(chosen, axis)


def split_one_hot(token, part, axis="tensor"):
    """B, int -> B(V/t): this device's part of `one_hot`."""
    return one_hot(token - lax.axis_index(axis) * part, part)


@jax.named_scope("sample")
def split_sample(key, logits, pos, temperature, top_k, top_p, axis="tensor"):
    """key, B(V/t), B, temperature, top_k, top_p -> B: the token that `sample` draws.

    Each device adds its part of the noise, and two numbers a row travel: its best sum, and which
    token's that is. At a temperature each row's largest logit travels too, and for top_k as many of
    each part. For top_p below 1, which asks for the probability of each, all logits do.
    """
    temperature, top_k, top_p = sampling(temperature, top_k, top_p)
    if top_p < 1 and temperature >= TINY:
        return sample(key, gathered(logits, axis, 1, to="invarying"), pos, temperature, top_k,
                      top_p)
    part, first = logits.shape[-1], lax.axis_index(axis) * logits.shape[-1]

    def largest(logits):
        return lax.pmax(row_largest(logits), axis)

    def kth(logits, k):
        return kth_largest(gathered(lax.top_k(logits, min(k, part))[0], axis, 1), k)

    scores = usable(logits)
    if temperature >= TINY:
        drawn = noise(key, pos, lax.axis_size(axis) * part)
        scores = filtered(logits, temperature, top_k, 1.0, largest, kth) \
            + lax.dynamic_slice_in_dim(drawn, first, part, 1)
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    # the sum's bits beside the index, so that one collective takes both
    pair = lax.bitcast_convert_type(row_largest(scores), jnp.int32), (first + best)[:, None]
    pairs = gathered(jnp.stack(pair, axis=-1), axis, 1, to="invarying")  # Bt2
    winner = jnp.argmax(lax.bitcast_convert_type(pairs[..., 0], jnp.float32), axis=1)
    return jnp.take_along_axis(pairs[..., 1], winner[:, None], axis=1)[:, 0]


# -------------------------------------------------------------------------------------- training


def check_rows(tokens, mesh):
    """B(T+1), Mesh -> None: ValueError unless rows of two or more tokens can be split over "data",
    and their tokens over "context"."""
    rows, context = (size_over(mesh, axes_of(mesh, word)) for word in ("data", "context"))
    if not axes_of(mesh, "data"):
        raise ValueError(f"a mesh of {tuple(mesh.shape)}: rows are split over an axis 'data'")
    if len(tokens) % rows:
        raise ValueError(f"{len(tokens)} rows cannot be split over {rows} devices of axis 'data'")
    if tokens.shape[1] < 2:
        raise ValueError(f"tokens of shape {tokens.shape}: a loss takes B(T+1), two or more a row")
    if (tokens.shape[1] - 1) % context:
        raise ValueError(f"T={tokens.shape[1] - 1} tokens cannot be split over {context} devices "
                         f"of axis 'context': choose a multiple of {context}")


def fsdp_loss(params, tokens, cfg, mesh):
    """Params, B(T+1), cfg, Mesh -> scalar: `loss`, fully sharded, the compiler's way.

    Parameters are split over "data" by `place(..., FSDP)`, and rows are kept there; what is
    gathered when is the compiler's choice. All logits are held: blocks of tokens that are split
    would travel. To be jitted.
    """
    check_tokens(tokens, cfg)
    check_rows(tokens, mesh)
    if axes_of(mesh, "context"):
        raise ValueError(f"a mesh of {tuple(mesh.shape)}: tokens are split over an axis 'context' "
                         "by hand: sharded_loss")

    def over_data(a):
        return lax.with_sharding_constraint(a, jax.NamedSharding(mesh, P(axes_of(mesh, "data"))))

    def whole(x, w, table, cfg, attend):
        x, state = block(over_data(x), w, table, cfg, attend)
        return over_data(x), state

    return loss(params, over_data(tokens), cfg, whole, blocks=1)


def check_kept(keep):
    """tuple of str -> None: ValueError for what no layer can keep."""
    if isinstance(keep, str) or not {*keep} <= {*KEEPABLE}:
        raise ValueError(f"keep={keep!r}: a tuple of names, of {', '.join(KEEPABLE)}")


def gather_weights(w, split, over):
    """Params, specs, axes -> Params: what is split over those axes is whole again; of a Layer too.

    The gradient is scattered and added up, an axis at a time too. A norm's scales, which every
    device has, become f32, in which their gradient is added up in one all-reduce.
    """
    def whole(w, spec):
        if w.ndim == 1:
            return lax.pcast(w.astype(jnp.float32), over, to="varying")
        for dim, axes in enumerate(spec):
            w = gathered(w, tuple(axis for axis in as_axes(axes) if axis in over), dim)
        return w

    return jax.tree.map(whole, w, split)


def sharded_loss(params, tokens, cfg, mesh, enter=gather_matmul, leave=matmul_scatter,
                 keep=KEPT):
    """Params, B(T+1), cfg, Mesh -> scalar: `loss`, by hand, on a mesh of "data", "tensor" and, for
    long rows, "context".

    Over data (n, 1) is FSDP, (1, n) tensor parallelism, (n, m) both. `params` are `stack`ed. Rows
    are split over "data", the tokens of each over "context", where every n-th is a device's; each
    layer's weights are gathered over both before use, and again for its gradient. Over "tensor"
    weights stay where they are, and x is split over E between layers. Of what a layer makes its
    gradient finds the input and what `keep` names; all else is made again. ValueError for what does
    not divide, and for what cannot be kept.
    """
    check_kept(keep)
    check_tokens(tokens, cfg)
    rules, rows = {**TENSOR, **FSDP}, P(axes_of(mesh, "data"))
    check_rows(tokens, mesh)
    if not axes_of(mesh, "tensor"):
        raise ValueError(f"a mesh of {tuple(mesh.shape)}: weights are split over an axis 'tensor', "
                         "of one device or more: make_mesh(..., tensor=1)")
    check_split(cfg, mesh, rules)
    if not hasattr(params.layers, "wq"):
        raise ValueError("params hold a tuple of layers: stack(params) makes them one")
    split = specs(cfg, mesh, rules)
    run = partial(local_loss, cfg=cfg, split=split, mesh=mesh, enter=enter, leave=leave,
                  keep=keep)
    return jax.shard_map(run, mesh=mesh, in_specs=(stacked(split), rows), out_specs=P())(
        params, tokens)


def local_loss(params, tokens, cfg, split, mesh, enter, leave, keep):
    """Params, B(T+1), cfg, specs, Mesh, enter, leave, names -> scalar: `sharded_loss` on one of the
    devices, from its parts; the mean is over all."""
    over, context, tensor = (axes_of(mesh, *words) for words in (
        ("data", "context"), ("context",), ("tensor",)))
    T, seams = tokens.shape[1] - 1, tp_parts(tensor, enter, leave)
    if context:
        pos, attend = own_places(T, context), partial(attend_ring, axis=context)
        before, after = tokens[:, pos], tokens[:, pos + 1]
    else:
        pos, attend, before, after = jnp.arange(T), causal, tokens[:, :-1], tokens[:, 1:]
    ends = gather_weights(params._replace(layers=()), split._replace(layers=()), over)
    table, x = rotary(pos[None], cfg), seams.pop("embed")(ends, before, cfg)

    def one(x, w):
        return block(x, gather_weights(w, split.layers[0], over), table, cfg, attend, **seams)

    policy = jax.checkpoint_policies.save_only_these_names(*keep)
    x, _ = lax.scan(jax.checkpoint(one, policy=policy), x, params.layers)
    x, N = rms_norm(gathered(x, tensor, 2), ends.out_norm, cfg.eps), after.size

    def nats(table, x, targets):
        return split_nats(dot(x, table, dtype=jnp.float32), targets, tensor)

    with jax.named_scope("unembed"):
        mean = mean_nats(nats, token_blocks(N, cfg.V // size_over(mesh, tensor)),
                         unembedding(ends, cfg), x.reshape(N, -1), after.reshape(-1))
    return lax.pmean(mean, over)


# ------------------------------------------------------------------------------ ring attention


def own_places(T, axis):
    """int, axis -> T/n: of T places those of this device: every n-th, from its own number on.

    So each has an equal share of early and of late tokens: an equal share of what a causal pass
    multiplies, however long. arXiv:2311.09431.
    """
    n = lax.axis_size(axis)
    return lax.axis_index(axis) + n * jnp.arange(-(-T // n))


def later(i, axis):
    """int, axis -> int: 1 where the device i places before this one in the ring has a larger
    number. Then its j-th token comes after this device's j-th, which must not see it."""
    here = lax.axis_index(axis)
    return ((here - i) % lax.axis_size(axis) > here).astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def ring_attention(q, k, v, axis):
    """B(T/n)HD, BK(T/n)D, BK(T/n)D, axis -> B(T/n)HD: `causal_attention` of tokens that are split
    as `own_places` says.

    k and v go once around the ring, and each part is attended to while the next one travels.
    arXiv:2310.01889.
    """
    return ring_forward(q, k, v, axis)[0]


def ring_forward(q, k, v, axis, widen=lambda held: held):
    """B(T/n)HD, BK(T/n)D, BK(T/n)D, axis -> B(T/n)HD, saved. k and v travel as they are, int8 too,
    and are widened where they are used. A part that a device is done with is a Partial of one
    value, its mean, and merged like any other."""
    T, H = q.shape[1:3]

    def add(found, k, v, i):
        out, (*_, log_total) = causal_forward(q, widen(k), widen(v), later(i, axis))
        log_total = by_token(log_total, T, H)
        out = jnp.where(log_total > -jnp.inf, out, 0)  # a first token that saw nothing: 0 / 0
        new = Partial(out, jnp.ones_like(log_total), log_total)
        return merge(found, new)

    def step(state, i):
        found, k, v = state
        following = [jax.tree.map(lambda a: pass_on(a, axis, 1), a) for a in (k, v)]
        return (add(found, k, v, i), *following), None

    n = lax.axis_size(axis)
    none, narrow = (jnp.zeros_like(a, jnp.float32) for a in (q, q[..., :1]))
    nothing = Partial(none, narrow, narrow - jnp.inf)
    (found, last_k, last_v), _ = lax.scan(step, (nothing, k, v), jnp.arange(n - 1))
    found = add(found, last_k, last_v, n - 1)
    out, log_total = (checkpoint_name(a, "attention") for a in (
        normalised(found).astype(q.dtype), jnp.log(found.total) + found.largest))
    return out, (q, k, v, out, log_total)


def ring_backward(axis, saved, dy):
    """axis, saved, B(T/n)HD -> B(T/n)HD, BK(T/n)D, BK(T/n)D: the gradients of k and v travel with
    them, in f32, and one step further: home."""
    q, k, v, out, log_total = saved
    log_total = in_blocks(log_total, k.shape[1], causal_blocks(q.shape[1])[0])

    def add(grads, k, v, i):
        new = causal_backward((q, k, v, out, log_total), dy, later(i, axis))
        return [total + d for total, d in zip(grads, new, strict=True)]

    def step(state, i):
        (dq, *dkv), *kv = state
        following = [pass_on(a, axis, 1) for a in kv]
        dq, *dkv = add((dq, *dkv), *kv, i)
        return ([dq, *(pass_on(d, axis, 1) for d in dkv)], *following), None

    n, none = lax.axis_size(axis), [jnp.zeros_like(a, jnp.float32) for a in (q, k, v)]
    (grads, *kv), _ = lax.scan(step, (none, k, v), jnp.arange(n - 1))
    dq, *dkv = add(grads, *kv, n - 1)
    return dq.astype(q.dtype), *(pass_on(d, axis, 1).astype(k.dtype) for d in dkv)


ring_attention.defvjp(ring_forward, ring_backward)


def attend_ring(q, k, v, axis):
    """B(T/n)HD, BK(T/n)D, BK(T/n)D, axis -> B(T/n)HD, None: `ring_attention` as an `attend`."""
    return ring_attention(q, k, v, axis), None


# ------------------------------------------------------------------------------------ generating


def own_rows(a, axis="tensor"):
    """B..., axis -> (B/t)...: this device's rows."""
    rows = len(a) // lax.axis_size(axis)
    return lax.dynamic_slice_in_dim(a, lax.axis_index(axis) * rows, rows)


def own_slots(a, axis="tensor"):
    """BKTD, axis -> BK(T/t)D: of T slots this device's."""
    n = lax.axis_size(axis)
    a = striped(jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % n), (0, 0))), n)
    return lax.dynamic_index_in_dim(a, lax.axis_index(axis), 2, keepdims=False)


def striped(a, n):
    """BKSD, int -> BKnSD: slot s is the (s // n)-th of part s % n."""
    B, K, S, D = a.shape
    return a.reshape(B, K, S // n, n, D).swapaxes(2, 3)


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
    """Partial -> BKMD: this device's share of the mean of the values that all devices saw, to be
    added up: two numbers a query travel."""
    largest = lax.pmax(part.largest, axis)
    here = jnp.exp(part.largest - finite(largest))
    return part.values * here / lax.psum(part.total * here, axis)


def extend_slots(q, k, v, old_k, old_v, pos, axis="tensor"):
    """BT(H/t)D, BKTD, BKTD, BK(S/t)D, BK(S/t)D, BT -> BT(H/t)D, (BK(S/t)D, BK(S/t)D): each device
    holds every t-th slot of all heads; the shares of the values are added up."""
    n, pos = lax.axis_size(axis), pos - lax.axis_index(axis)
    own = jnp.where(pos % n == 0, pos // n, -1)  # not its own are dropped
    k, v = write(old_k, k, own), write(old_v, v, own)
    q = lax.all_gather(q, axis, axis=2, tiled=True)
    out = cached_attention(q, k, v, pos // n, partial(normalised_over, axis=axis))
    return lax.psum_scatter(out, axis, scatter_dimension=2, tiled=True), (k, v)


def over_slots(attend):
    """attend -> attend: of BKnSD, the one part that is a device's, as BKSD."""
    def attending(q, k, v, old_k, old_v, pos):
        old = jax.tree.map(lambda a: a[:, :, 0], (old_k, old_v))
        out, kv = attend(q, k, v, *old, pos)
        return out, jax.tree.map(lambda a: a[:, :, None], kv)

    return attending


def insert_own(slots, new, row, rows):
    """BKSD, BKTD, int or None, axes -> BKSD: `insert` of rows that are all there, and split over
    those axes: each device keeps its own; or, with a number, of one row, where it is a device's."""
    if row is None:
        return insert(slots, jax.tree.map(lambda a: own_rows(a, rows), new), 0)

    def put(slots, new):
        at = row - lax.axis_index(rows) * len(slots)
        place = jnp.clip(at, 0, len(slots) - 1), *(0,) * (slots.ndim - 1)
        new = jnp.where(at == place[0], new, lax.dynamic_slice(slots, place, new.shape))
        return lax.dynamic_update_slice(slots, new, place)

    return jax.tree.map(put, slots, new)


def fill_whole(q, k, v, old_k, old_v, pos, axis="tensor", insert=insert, row=None):
    """BT(H/t)D, BKTD, BKTD, BKSD, BKSD, BT -> BT(H/t)D, (BKSD, BKSD): a prompt where k and v are
    whole: each device looks at it with its own heads."""
    n, here, heads = lax.axis_size(axis), lax.axis_index(axis), q.shape[2]
    held = as_held(k, old_k), as_held(v, old_v)
    group = n * heads // k.shape[1]  # query heads that share a key head
    kv = (here * heads + jnp.arange(heads)) // group
    seen = (as_seen(new, q.dtype)[:, kv] for new in held)
    return causal_attention(q, *seen), insert((old_k, old_v), held, row)


def fill_ring(q, k, v, old_k, old_v, pos, axis="tensor"):
    """B(T/t)HD, BK(T/t)D, BK(T/t)D, BK(S/t)D, BK(S/t)D, BT -> B(T/t)HD, (BK(S/t)D, BK(S/t)D): each
    device's tokens are those of its slots: what it writes stays where it is."""
    held = as_held(k, old_k), as_held(v, old_v)
    out, _ = ring_forward(q, *held, axis, widen=lambda held: as_seen(held, q.dtype))
    return out, insert((old_k, old_v), held, 0)


class Layout(NamedTuple):
    """A way to split a cache over "tensor": over its last axis a letter, K over those before it."""
    letter: str       # of BKSD
    attend: Callable  # axis -> what `extend` does at a layer: extend_cache's contract
    by_token: bool = False  # are prompts split over their tokens, and weights gathered for them?


LAYOUTS = {"heads": Layout("K", lambda axis: extend_cache),
           "batch": Layout("B", lambda axis: over_batch(extend_cache, axis)),
           "sequence": Layout("S", lambda axis: over_slots(partial(extend_slots, axis=axis)))}
LAYOUTS["context"] = LAYOUTS["sequence"]._replace(by_token=True)


def layout_of(name):
    """str -> Layout. ValueError for another."""
    if name not in LAYOUTS:
        raise ValueError(f"layout={name!r}: expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def layout_rules(mesh, layout):
    """Mesh, str -> dict: rules for the weights beside a cache. Where its last axis does not split
    K, each of its devices has the keys of those before it."""
    few = {} if layout_of(layout).letter == "K" else {"K": axes_of(mesh, "tensor")[:-1]}
    return {**TENSOR, **few}


def cache_specs(mesh, layout):
    """Mesh, str -> Cache of specs: rows are split over data's axes too, where there are some: each
    part of them has a copy of the model."""
    rows, axes = axes_of(mesh, "data"), axes_of(mesh, "tensor")
    over = {"B": rows, "K": axes[:-1], "S": ()}
    over[layout_of(layout).letter] += axes[-1:]
    split = P(*(over[letter] or None for letter in "BKS"))
    return Cache(split, split, P(rows or None))


def check_layout(cache, mesh, layout):
    """Cache, Mesh, str -> None: ValueError unless the mesh can split what the layout splits."""
    layout_of(layout)
    if not axes_of(mesh, "tensor"):
        raise ValueError(f"a mesh of {tuple(mesh.shape)}: a cache is split over an axis 'tensor'")
    B, K = cache.k[0].shape[:2]
    sizes_ = dict(B=B, K=K, S=slots_of(cache))

    def lacks(name):
        split = dict(zip("BKS", cache_specs(mesh, name).k, strict=True))
        return [(letter, axes) for letter, axes in split.items()
                if sizes_[letter] % size_over(mesh, as_axes(axes))]

    for letter, axes in lacks(layout):
        fit, n = [name for name in LAYOUTS if not lacks(name)], size_over(mesh, as_axes(axes))
        raise ValueError(f"{letter}={sizes_[letter]} cannot be split over {n} devices of "
                         f"{', '.join(as_axes(axes))}, as the layout {layout!r} does: "
                         + (f"{' and '.join(fit)} can" if fit else f"choose a multiple of {n}"))


def as_laid_out(cache, mesh, layout):
    """Cache, Mesh, str -> Cache: slots that are split stand as BKnSD, those of each device together
    (`striped`); others as BKSD."""
    parts = mesh.shape[axes_of(mesh, "tensor")[-1]] if LAYOUTS[layout].letter == "S" else 0

    def fit(a):
        if a.ndim == 5 and a.shape[2] != parts:
            a = a.swapaxes(2, 3).reshape(*a.shape[:2], -1, a.shape[4])
        return striped(a, parts) if parts and a.ndim == 4 else a

    return Cache(*jax.tree.map(fit, cache[:2]), cache.length)


def place_cache(cache, mesh, layout):
    """Cache, Mesh, str -> Cache: split over heads, batch or sequence. One that no device holds
    whole: `tp_empty`."""
    check_layout(cache, mesh, layout)
    return jax.device_put(as_laid_out(cache, mesh, layout), jax.tree.map(
        lambda spec: jax.NamedSharding(mesh, spec), cache_specs(mesh, layout)))


class Split(NamedTuple):
    """What a function in `shard_map` needs to know of who holds what."""
    cache: Cache    # as the layout has it
    params: Any     # specs
    held: Cache     # specs of the cache
    rows: P         # spec of an array B
    logits: P       # spec of BV
    axes: tuple     # of "tensor"
    attend: Callable


def split_as(params, cache, cfg, mesh, layout):
    """Params, Cache, cfg, Mesh, str -> Split: for what runs in `layout`. ValueError where a letter
    that is split does not divide."""
    check_layout(cache, mesh, layout)
    rules, axes, held = layout_rules(mesh, layout), axes_of(mesh, "tensor"), cache_specs(
        mesh, layout)
    check_split(cfg, mesh, rules)
    return Split(as_laid_out(cache, mesh, layout), specs_of(params, cfg, mesh, rules), held,
                 held.length, P(*held.length, axes), axes, LAYOUTS[layout].attend(axes[-1]))


def fill_in(layout, axes, data, row=None):
    """str, axes of tensor, axes of data, int or None -> attend: what `prefill` does at a layer, of
    all rows that this part of data has, or of one, whose number counts over all parts."""
    letter, last = LAYOUTS[layout].letter, axes[-1:]
    own = last if letter == "B" else ()
    keep = partial(insert_own, rows=own if row is None else (*data, *own))
    if letter == "K":
        return partial(fill_cache, row=row, insert=keep)
    if letter == "B":
        return partial(fill_whole, axis=last, row=row, insert=keep)
    return over_slots(partial(fill_whole, axis=last, row=row, insert=lambda slots, new, row: keep(
        slots, jax.tree.map(lambda a: own_slots(a, last), new), row)))


def tp_parts(axis, enter, leave):
    """-> dict: what a model takes in place of its own parts, where weights are split."""
    return dict(embed=partial(split_embed, axis=axis), enter=partial(enter, axis=axis),
                leave=partial(leave, axis=axis))


def tp_draws(axis, enter, part):
    """-> dict: what `generate` takes, of logits that stay split: each device has `part` of V."""
    return dict(unembed=partial(split_unembed, axis=axis, enter=enter),
                sample=partial(split_sample, axis=axis),
                one_hot=lambda token, V: split_one_hot(token, part, axis))


def tp_extend(params, cache, tokens, cfg, mesh, layout="heads", enter=gather_matmul,
              leave=matmul_scatter):
    """Params, Cache, BT, cfg, Mesh -> BTE, Cache: `extend` over the mesh axis "tensor".

    A layer goes BT(E/t) -> BT(H/t)D and k, v -> attention -> BT(E/t) -> BT(F/t) -> BT(E/t). The
    cache is split over "heads": attention is local, k and v are BT(K/t)D, and K must divide; over
    "batch": for K smaller than the axis; or over "sequence" (or "context"): for a cache that is too
    large for a device. Of tensor=(m, n) the first axis splits K in any case, and the last one the
    heads, rows or slots that each group of devices holds: so K may be m, and the others share a
    head's keys. Rows are split over axes of data, where the mesh has some. What was placed in
    another way is moved first. ValueError for what does not divide, and those of `extend`.
    """
    check_tokens(tokens, cfg)
    check_batch(cache, tokens)
    check_room(cache, tokens.shape[1])
    cache, split, held, rows, _, axes, attend = split_as(params, cache, cfg, mesh, layout)
    run = partial(append, cfg=cfg, attend=attend, **tp_parts(axes, enter, leave))
    return jax.shard_map(run, mesh=mesh, in_specs=(split, held, rows), out_specs=(
        P(*rows, None, axes), held))(params, cache, tokens)


def tp_unembed(params, x, cfg, mesh, layout="heads", enter=gather_matmul):
    """Params, BTE, cfg, Mesh -> BTV: f32 logits of what `tp_extend` gave, split over V."""
    rules, axes, rows = layout_rules(mesh, layout), axes_of(mesh, "tensor"), P(
        axes_of(mesh, "data") or None)
    run = partial(split_unembed, cfg=cfg, axis=axes, enter=enter)
    return jax.shard_map(run, mesh=mesh, in_specs=(
        specs_of(params, cfg, mesh, rules), P(*rows, None, axes)), out_specs=P(*rows, None, axes))(
        params, x)


def tp_prefill(params, cache, tokens, lengths, cfg, mesh, layout="heads", enter=gather_matmul,
               leave=matmul_scatter):
    """Params, Cache, BT, B, cfg, Mesh -> BV, Cache: `prefill`, of all rows at once, over the mesh
    axis "tensor"; logits are split over V.

    Each device reads all tokens with its part of the weights, and writes its part of the cache; in
    the layout "context" its part of the tokens, with weights that are gathered a layer at a time:
    for prompts so long that they outweigh the weights (`read_context`).
    """
    check_tokens(tokens, cfg)
    check_batch(cache, tokens)
    check_prompts(cache, tokens, lengths)
    cache, split, held, rows, split_logits, axes, _ = split_as(params, cache, cfg, mesh, layout)
    run = partial(read_context, cfg=cfg, split=split, axes=axes, enter=enter, leave=leave) \
        if LAYOUTS[layout].by_token else partial(
            read_prompts, cfg=cfg, attend=fill_in(layout, axes, ()),
            unembed=partial(split_unembed, axis=axes, enter=enter), **tp_parts(axes, enter, leave))
    return jax.shard_map(run, mesh=mesh, in_specs=(split, held, rows, rows), out_specs=(
        split_logits, held))(params, cache, tokens, lengths)


def read_context(params, cache, tokens, lengths, cfg, split, axes, enter, leave):
    """Params, Cache, BT, B, cfg, specs, axes -> B(V/t), Cache: prompts split over their tokens.

    The last axis of "tensor" splits tokens as it splits slots, so that k and v are written where
    they are made, and travel for `ring_attention` alone. Weights are gathered over it, a layer at a
    time; over axes before it they stay split. Of the last token, the logits are split over all.
    """
    over, last = axes[:-1], axes[-1]
    n, lengths = lax.axis_size(last), jnp.asarray(lengths, jnp.int32)
    whole = gather_weights(params._replace(unembed=None, out_norm=None),
                           split._replace(unembed=None, out_norm=None), (last,))
    seams, pos = tp_parts(over, enter, leave), own_places(tokens.shape[1], last)[None]
    own = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % n)))[:, pos[0]]
    x, k, v = through_layers(whole, cache, seams.pop("embed")(whole, own, cfg), pos, cfg,
                             over_slots(partial(fill_ring, axis=last)), **seams)
    at = lengths - 1
    mine = (at % n == lax.axis_index(last))[:, None]
    x = lax.psum(jnp.where(mine, x[jnp.arange(len(at)), at // n], 0), last)[:, None]
    return split_unembed(params, x, cfg, over, enter)[:, 0], Cache(k, v, lengths)


def tp_generate(params, cache, logits, key, n, cfg, mesh, layout="heads", enter=gather_matmul,
                leave=matmul_scatter, **how):
    """Params, Cache, BV, key, n, cfg, Mesh -> Bn, BV, Cache: `generate`, one scan on all devices.

    `how` is temperature, top_k, top_p and end. Logits stay split over V: see `split_sample`.
    ValueError as of `tp_extend` and `generate`.
    """
    check_batch(cache, logits)
    check_room(cache, n)
    cache, split, held, rows, split_logits, axes, attend = split_as(
        params, cache, cfg, mesh, layout)
    run = partial(draw, n=n, cfg=cfg, **how, append=partial(
        append, attend=attend, **tp_parts(axes, enter, leave)), **tp_draws(
            axes, enter, cfg.V // size_over(mesh, axes)))
    return jax.shard_map(run, mesh=mesh, in_specs=(split, held, split_logits, rows), out_specs=(
        rows, split_logits, held))(params, cache, logits, row_keys(key, len(logits)))


def tp_speculate(params, cache, tokens, key, n, cfg, mesh, draft, state, layout="heads",
                 enter=gather_matmul, leave=matmul_scatter, **how):
    """Params, Cache, BS, key, n, cfg, Mesh, draft, state -> BS, Cache, state, counts: `speculate`.

    The draft is not split: every device proposes the same. To accept or refuse takes each
    proposal's whole distribution: logits are gathered. ValueError as of `tp_extend` and
    `speculate`.
    """
    keys, n_draft = check_speculation(params, cache, tokens, key, n, cfg, draft, state)
    cache, split, held, rows, _, axes, attend = split_as(params, cache, cfg, mesh, layout)

    def whole(params, x, cfg):
        return gathered(split_unembed(params, x, cfg, axes, enter), axes, 2, to="invarying")

    run = partial(rounds, n=n, n_draft=n_draft, cfg=cfg, **how, unembed=whole, append=partial(
        append, attend=attend, **tp_parts(axes, enter, leave)))
    return jax.shard_map(
        lambda params, cache, tokens, keys, draft, state: run(
            params, cache, tokens, keys, draft=draft, state=state),
        mesh=mesh, in_specs=(split, held, rows, P(None, *rows), P(), rows),
        out_specs=(rows, held, rows, rows))(params, cache, tokens, keys, draft, state)


def tp_empty(cfg, B, S, dtype, mesh, layout="heads"):
    """cfg, int, int, dtype, Mesh -> Cache, BV: `empty`, made where it lives."""
    def made():
        cache, logits = empty(cfg, B, S, dtype)
        return as_laid_out(cache, mesh, layout), logits

    check_layout(jax.eval_shape(lambda: empty(cfg, B, S, dtype))[0], mesh, layout)
    held = cache_specs(mesh, layout)
    return jax.jit(made, out_shardings=jax.tree.map(partial(jax.NamedSharding, mesh), (
        held, P(*held.length, axes_of(mesh, "tensor")))))()


def tp_refill(params, cache, logits, row, prompt, length, cfg, mesh, layout="heads",
              enter=gather_matmul, leave=matmul_scatter):
    """Params, Cache, BV, int, 1T, 1, cfg, Mesh -> BV, Cache: `refill`: every copy of the model
    reads the prompt, whole in every layout, and the devices that hold the row keep it."""
    cache, split, held, rows, split_logits, axes, _ = split_as(params, cache, cfg, mesh, layout)
    data = axes_of(mesh, "data")
    read = partial(read_prompts, cfg=cfg, unembed=partial(split_unembed, axis=axes, enter=enter),
                   **tp_parts(axes, enter, leave))

    def run(params, cache, logits, row, prompt, length):
        told, new = read(params, cache, prompt, length, attend=fill_in(layout, axes, data, row))
        at, B = row - lax.axis_index(data) * len(logits), len(logits)
        at = jnp.where(at < 0, B, at)  # not its own are dropped
        return logits.at[at].set(told[0], mode="drop"), new._replace(
            length=cache.length.at[at].set(new.length[0], mode="drop"))

    return jax.shard_map(run, mesh=mesh, in_specs=(split, held, split_logits, P(), P(), P()),
                         out_specs=(split_logits, held))(params, cache, logits, row, prompt, length)


def tp_serve(params, prompts, B, S, n, key, cfg, mesh, layout="heads", enter=gather_matmul,
             leave=matmul_scatter, **how):
    """Params, prompts, B, S, n, key, cfg, Mesh -> iterator of (int, tokens): `serve`, through rows
    that are split. In several processes, where no axis of data splits them."""
    where = dict(mesh=mesh, layout=layout)
    parts = where | dict(enter=enter, leave=leave)
    return serve(params, prompts, B, S, n, key, cfg, **how, empty=partial(tp_empty, **where),
                 refill=partial(tp_refill, **parts), generate=partial(tp_generate, **parts))


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


def gathers(size, axes):
    """int, tuple -> list of events: `gathered`: the last axis first, each of what is there."""
    return [("all_gather", 1, size * math.prod(axes[i + 1:]), axes[i])
            for i in reversed(range(len(axes)))]


def scatters(size, axes):
    """int, tuple -> list of events: `scattered`."""
    return [("reduce_scatter", 1, size // math.prod(axes[:i]), n) for i, n in enumerate(axes)]


def trips(cfg, rows, axes, ring):
    """cfg, int, int or tuple, int -> events, events: one gather_matmul's and one matmul_scatter's
    trip.

    `ring` is 0 for the references, or the number of ways, 1 or 2. x travels in cfg.dtype, sums in
    f32.
    """
    wide, axes = jnp.dtype(cfg.dtype).itemsize, as_axes(axes)
    t = math.prod(axes)
    if ring:
        part = rows * cfg.E // t // ring
        return tuple([("permute", (t - 1) * ring, part * size, t)] for size in (wide, 4))
    return gathers(rows * cfg.E // t * wide, axes), scatters(rows * cfg.E * 4, axes)


def norm_comm(rows, axes, ring):
    """int, tuple, int -> list of events: `split_norm`, which rings need before they set out."""
    return [("all_reduce", 1, rows * 4, math.prod(axes))] if ring else []


def repeated(times, events):
    """int, events -> list: each of them so often."""
    return [(kind, times * number, size, n) for kind, number, size, n in events]


def train_comm(cfg, B, T, mesh, ring, keep):
    """cfg, int, int, Mesh, int, names -> list of events: `sharded_loss` and its gradient.

    Over "tensor", a layer gathers x twice, again when it is computed again, and scatters twice,
    once again: its last product is not computed again. The gradient of a gather is a scatter in
    x's dtype, that of a scatter a gather in f32. Over "context", k and v go around forwards, again
    unless attention is kept, and backwards with their gradients, in f32, which go one step further.
    Over "data" and "context", matrices are gathered twice and their gradients scattered once, an
    axis at a time; gradients of norm scales are added up.
    """
    axes, rings, tensor = ([mesh.shape[axis] for axis in axes_of(mesh, *words)] for words in (
        ("data", "context"), ("context",), ("tensor",)))
    copies, context, t, tensor = math.prod(axes), math.prod(rings), math.prod(tensor), tuple(tensor)
    rows, wide = B * T // copies, jnp.dtype(cfg.dtype).itemsize
    gather, scatter = trips(cfg, rows, tensor, ring)
    x = rows * cfg.E * wide
    gather_back = gather if ring else scatters(x, tensor)
    scatter_back = scatter if ring else gathers(rows * cfg.E // t * 4, tensor)
    kv = rows * cfg.K * cfg.D // t
    around = [("permute", (6 - 2 * ("attention" in keep)) * (context - 1), kv * wide, context),
              ("permute", 2 * context, kv * 4, context)] if context > 1 else []
    found = repeated(cfg.L, repeated(4, gather) + repeated(3, scatter) + repeated(2, gather_back)
                     + repeated(2, scatter_back) + around
                     + repeated(6, norm_comm(rows, tensor, ring)))
    # at both ends the embedding's scatter, the final norm's gather and their gradients; of each
    # block of the loss's tokens the largest, total and chosen logits; the mean loss
    found += repeated(2, scatters(x, tensor) + gathers(x // t, tensor))
    n = token_blocks(rows, cfg.V // t)
    found += [("all_reduce", 3 * n, -(-rows // n) * 4, t), ("all_reduce", 1, 4, copies)]
    names = dims(cfg)
    for tree, again in ((names.layers, 2), (names._replace(layers=()), 1)):
        for name in jax.tree.leaves(tree):
            size = size_of(name, cfg)
            if " " not in name:
                found += [("all_reduce", 1, size * 4, n) for n in (t, copies)]
            for i, n in enumerate(axes if " " in name else ()):
                part = size // t // math.prod(axes[:i]) * wide
                found += [("all_gather", again, part // n, n), ("reduce_scatter", 1, part, n)]
    return found


def attend_comm(cfg, rows, axes, layout):
    """cfg, int, tuple, str -> list of events: a layer's attention to the cache in that layout."""
    t, last, letter = math.prod(axes), axes[-1] if axes else 1, LAYOUTS[layout].letter
    heads = rows * cfg.H * cfg.D * jnp.dtype(cfg.dtype).itemsize // t
    return {"K": [], "B": [("all_to_all", 2, heads, last)],
            "S": [("all_gather", 1, heads, last), ("reduce_scatter", 1, heads * last, last),
                  ("all_reduce", 2, rows * cfg.H * last // t * 4, last)]}[letter]


def extend_comm(cfg, B, T, axes, layout, ring, reads=False):
    """cfg, ... -> list of events: `tp_extend` by T tokens; with `reads`, what `tp_prefill` does
    before it makes logits, of a prompt whose k and v stay where they are made."""
    rows, wide = B * T, jnp.dtype(cfg.dtype).itemsize
    gather, scatter = trips(cfg, rows, axes, ring)
    return repeated(cfg.L, repeated(2, norm_comm(rows, axes, ring) + gather + scatter)
                    + ([] if reads else attend_comm(cfg, rows, axes, layout))) \
        + scatters(rows * cfg.E * wide, axes)


def context_comm(cfg, B, T, axes, ring, dtype, cache_dtype):
    """cfg, ... -> list of events: what `read_context` does before it makes logits: weights are
    gathered over the last axis, those that it splits; k and v go around it; the last token's x is
    everywhere."""
    *over, n = axes
    others, t, T, split = math.prod(over), math.prod(axes), -(-T // n), {"H", "F", "V"}
    found = extend_comm(cfg, B, T, tuple(over), "heads", ring, reads=True)
    table = (dims(cfg).embed, dtype if cfg.tied else cfg.dtype)  # of which rows are read
    for name, kind in [table] + [(name, dtype) for name in jax.tree.leaves(dims(cfg).layers)]:
        size = array_bytes(name, cfg, kind)
        scales = size - size_of(name, cfg) if kind == "int8" and " " in name else 0
        found += [("all_gather", 1, part // t, n) for part, letters in (
            (size - scales, name), (scales, name.split()[0])) if part and split & {*letters}]
    rows = B * T * cfg.K // others
    parts = (cfg.D, 4) if cache_dtype == "int8" else (cfg.D * jnp.dtype(cache_dtype).itemsize,)
    return found + [("permute", 2 * cfg.L * (n - 1), rows * part, n) for part in parts] + [
        ("all_reduce", 1, B * cfg.E // others * jnp.dtype(cfg.dtype).itemsize, n)]


def unembed_comm(cfg, rows, axes, ring):
    """cfg, int, tuple, int -> list of events: logits of so many positions, split over V."""
    return norm_comm(rows, axes, ring) + trips(cfg, rows, axes, ring)[0]


def draw_comm(cfg, B, axes, temperature=0.0, top_k=0, top_p=1.0):
    """cfg, int, tuple, ... -> list of events: `split_sample`."""
    temperature, top_k, top_p = sampling(temperature, top_k, top_p)
    part = cfg.V // math.prod(axes)
    if temperature >= TINY and top_p < 1:
        return gathers(B * part * 4, axes)
    more = [] if temperature < TINY else [("all_reduce", 1, B * 4, math.prod(axes))] + (
        gathers(B * min(top_k, part) * 4, axes) if top_k else [])
    return more + gathers(B * 8, axes)


def comm_events(cfg, form, B, T=1, data=1, tensor=1, layout="heads", ring=0, context=1, dtype=None,
                cache_dtype=None, keep=None, **how):
    """cfg, form, int -> list of events: (collective, number, bytes, devices): see `comm_bytes`."""
    if ring not in (0, 1, 2):
        raise ValueError(f"ring={ring}: expected 0, 1 or 2")
    for name, given, taker in (("context", context > 1, "train"),
                               ("keep", keep is not None, "train"),
                               (" and ".join(how), how, "generate")):
        if given and form != taker:
            raise ValueError(f"{form} takes no {name}: {taker} does")
    named = mesh_axes(data=data, tensor=tensor, **({"context": context} if context > 1 else {}))
    mesh = jax.sharding.AbstractMesh(tuple(named.values()), tuple(named))
    copies, axes = size_over(mesh, axes_of(mesh, "data")), as_axes(tensor)
    by_rows = form != "train" and layout_of(layout).letter == "B"
    for what, size, n in (("B", B, copies * (axes[-1] if by_rows else 1)), ("T", T, context)):
        if size % n:
            raise ValueError(f"{what}={size} cannot be split over {n} devices: choose a multiple "
                             f"of {n}")
    check_split(cfg, mesh, {**TENSOR, **FSDP} if form == "train" else layout_rules(mesh, layout))
    if form == "train":
        keep = KEPT if keep is None else keep
        check_kept(keep)
        return train_comm(cfg, B, T, mesh, ring, keep)
    B //= copies
    extended = partial(extend_comm, cfg, B, axes=axes, layout=layout, ring=ring)
    if form == "extend":
        return extended(T)
    if form == "generate":
        return repeated(T, extended(1) + unembed_comm(cfg, B, axes, ring)
                        + draw_comm(cfg, B, axes, **how))
    if form in ("verify", "speculate"):
        gathered = gathers(B * T * cfg.V // math.prod(axes) * 4, axes)
        return extended(T) + unembed_comm(cfg, B * T, axes, ring) + gathered * (form != "verify")
    if form == "prefill" and LAYOUTS[layout].by_token:
        return context_comm(cfg, B, T, axes, ring, dtype or cfg.dtype, cache_dtype or cfg.dtype) \
            + unembed_comm(cfg, B, axes[:-1], ring)
    if form == "prefill":
        return extended(T, reads=True) + unembed_comm(cfg, B, axes, ring)
    raise ValueError(f"form={form!r}: expected train, extend, prefill, generate, verify or "
                     "speculate")


def comm_bytes(cfg, form, B, T=1, data=1, tensor=1, layout="heads", ring=0, **more):
    """cfg, form, int -> dict: collective -> (number, bytes each device sends), as the program says.

    `form` is "train" (`sharded_loss` with its gradient, B rows of T + 1 tokens), "extend",
    "prefill" (T tokens), "generate" (T steps), "verify" (`extend` and logits of all T) or
    "speculate" (a round of T, whose logits are gathered); `data` and `tensor` may be tuples, as of
    `make_mesh`; `ring` is 0 for the reference collectives, 1 or 2 for rings of so many ways. `more`
    is context=n and keep for training; temperature, top_k and top_p for generating; and dtype and
    cache_dtype for a prefill in the layout "context", where weights and cache travel. ValueError
    for another form, or where it cannot be split so.
    """
    return tally(comm_events(cfg, form, B, T, data, tensor, layout, ring, **more))


HOPS = {  # to the farthest of n devices around a ring, both ways
    "all_gather": lambda n: n // 2, "reduce_scatter": lambda n: n // 2,
    "all_reduce": lambda n: 2 * (n // 2), "all_to_all": lambda n: n // 2, "permute": lambda n: 1}


def hops(events, ways=1):
    """list of events, int -> int: of `comm_events`, how many hops from device to device follow one
    another; rings of two ways run side by side."""
    return sum(number * HOPS[kind](n) // (ways if kind == "permute" else 1)
               for kind, number, _, n in events if n > 1)


def comm_seconds(sent, link, ways=1, n_hops=None, hop=1e-6):
    """dict, bytes/s, int, int, seconds -> seconds: of what `comm_bytes` gives, over links of so
    many bytes a second each way, and of so many `hops` (None: one a collective), each of
    `hop` seconds. Permutes go `ways` ways around a ring, all others both."""
    n_hops = sum(number for number, _ in sent.values()) if n_hops is None else n_hops
    return n_hops * hop + sum(size / link / (ways if kind == "permute" else 2)
                              for kind, (_, size) in sent.items())
