"""How a check of `checks.py` is run: inputs, calls, and how far the outputs are from an oracle's.

Both functions return errors by name, and a list of other faults in words:

    error   at small shapes, oracle in float64 NumPy       at named shapes, oracle in float32 XLA
    out     of decode to the greatest value of v, int8     length of the difference to the row's
            and prompts: to the greatest value of out
    lse     as it is below 1, else relative                as it is below 1, else relative
    mass    to the greatest mass                           to the mass itself
    sum     see below, relative

At real sizes most values are far smaller than the greatest, which would hide them.

    kind        is asked beside the right numbers
    poison      NaN where nothing is attended changes no bit
    no mass     without the mass no bit of the rest changes
    sums        mass sums to the heads that share it, and over queries to that of prompt_mass_sum
    own lse     prompt_mass gets the lse that flash_prefill returned, not the oracle's
    overflow    logits of some hundreds; own lse
    beyond      a length that exceeds the array means all of it
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    cases,
    flash_prefill,
    int8_decode,
    oracle,
    packed_decode,
    prompt_mass,
    shapes,
    sparse_decode,
)
from pallas_kernels.partial import Partial, merge, merge_axis

KV_SPARSITY = 0.8  # at named shapes
CUTS = (0, 5, 5, 16, 40)  # of a list into pieces, one of them empty, the last to its end


class Limits(NamedTuple):
    """Errors that are allowed; None: this is not compared."""

    out: float | None
    lse: float | None
    mass: float | None
    sum: float | None = None


class Lists(NamedTuple):
    """Lists of rows, for decode."""

    batch: int
    n_kv_heads: int
    group: int  # query heads of a kv head
    head_dim: int
    context: int  # rows of a store
    attended: int  # rows of a list, or of a working set
    lists: int  # of a sequence: 1 or n_kv_heads


class Prompt(NamedTuple):
    """Prompts, and the mass that is asked of them."""

    context: int
    n_kv_heads: int
    group: int
    head_dim: int
    lengths: tuple[int, ...] | None  # of the prompts; None: two that fill the context
    queries: int | None = None
    groups: int = 1  # that heads are summed in
    chunk: int | None = None  # queries that are given; None: those of the whole context
    first: tuple[int, ...] | None = None  # the position of each first one


# ---- small shapes


def at_small_shape(check, impl: str, seed: int) -> tuple[dict[str, float], list[str]]:
    """Errors and faults against float64 NumPy."""
    if check.kernel == "partial":
        return _pieces(check, impl, seed)
    run = _prompt if isinstance(check.shape, Prompt) else _decode
    return run(check, impl, seed)


def _decode(check, impl: str, seed: int) -> tuple[dict[str, float], list[str]]:
    q, k, v, index, bias, wide = lists(check, seed)
    coded, indexed = "_int8_" in check.kernel, check.kernel.startswith("sparse")
    dense = check.kernel == "dense_decode"
    listed = () if dense else (index, bias) if indexed else (bias,)
    with_mass = compiled(_function(check.kernel), impl, check.tiling, mass=not dense)
    part, mass = with_mass(q, k, v, *listed)
    bias = jnp.zeros_like(bias) if dense else bias
    out, lse, weights, _ = oracle.decode(q, *wide, index if indexed else None, bias, not indexed)
    greatest = 1e-30 if coded else float(np.max(np.abs(wide[1])))
    errors = {
        "out": oracle.error(part.out, out, least=greatest),
        "lse": oracle.lse_error(part.lse, lse),
    }
    faults = _faults(part, lse)
    if not dense:
        errors["mass"] = oracle.error(mass, weights)
        faults += _wrong_type(mass=mass)
    if check.kind == "no mass":
        again, none = compiled(_function(check.kernel), impl, check.tiling, mass=False)(
            q, k, v, *listed
        )
        faults += _changed("without mass", again, part)
        faults += [] if none is None else ["there is a mass where none was asked for"]
    if check.kind == "poison":
        unread = _unread(index if indexed else None, bias, k.shape)
        poisoned = (jnp.where(unread, jnp.nan, x) for x in (k, v))
        faults += _changed("with poison", with_mass(q, *poisoned, *listed), (part, mass))
    if check.kind == "sums":
        heads = q.shape[1] / bias.shape[1]
        errors["sum"] = float(np.max(np.abs(np.asarray(mass, np.float64).sum(-1) / heads - 1)))
    return errors, faults


def lists(check, seed: int):
    """q, k, v, index, bias, and k and v in float64.

    Ragged lists, an empty one, repeated and unsorted rows, rows that are none, biases -inf and
    log n.
    """
    B, K, G, H, S, M, P = check.shape
    kernel, _, codes = check.kernel.partition("_int8_")
    token_axis = 1 if kernel in ("sparse_decode", "partial") else 2
    rows = (B, S, K, H) if token_axis == 1 else (B, K, M, H)
    r = np.random.default_rng(seed)
    q = jnp.asarray(r.normal(size=(B, K * G, H)), jnp.dtype(check.dtype))
    if codes:
        k, wide_k = _codes(r, codes, rows, token_axis)
        v, wide_v = _codes(r, codes, rows, token_axis)
    else:
        k = jnp.asarray(r.normal(size=rows), jnp.dtype(check.dtype))
        v = jnp.asarray(r.normal(size=rows), jnp.dtype(check.dtype))
        wide_k, wide_v = np.asarray(k, np.float64), np.asarray(v, np.float64)
    index = r.integers(0, S, (B, P, M))
    index[r.random(index.shape) < 0.2] = -1
    bias = r.choice([0.0, 0.0, np.log(3.0), -np.inf], (B, P, M)).astype(np.float32)
    if M > 1:
        index[0, 0, -1] = S  # beyond the store: no row
    if B > 1:  # an empty sequence, or a sequence with an empty list
        index[1, 0] = -1
        bias[1, 0] = -np.inf
    if check.kind == "sums":
        index[:, :, 0] = 3
        bias[:, :, 0] = 0.0
    return q, k, v, jnp.asarray(index, jnp.int32), jnp.asarray(bias), (wide_k, wide_v)


def _codes(r, kind: str, rows, token_axis: int):
    """Codes with zero points over the whole of int8, and their values in float64."""
    each = rows[:3] if kind == "token" else (rows[0], rows[3 - token_axis], rows[3])
    scale = r.uniform(0.002, 0.02, each).astype(np.float32)
    zero = r.integers(-128, 128, each).astype(np.int8 if kind == "token" else np.float32)
    if kind == "token":
        scale = np.asarray(jnp.asarray(scale, jnp.bfloat16))
    codes = r.integers(-128, 128, rows).astype(np.int8)
    axis = 3 if kind == "token" else token_axis
    values = codes.astype(np.float64) - np.expand_dims(zero, axis)
    made = int8_decode.PerToken if kind == "token" else int8_decode.PerChannel
    arrays = made(*(jnp.asarray(x) for x in (codes, scale, zero)))
    return arrays, values * np.expand_dims(scale.astype(np.float64), axis)


def _unread(index, bias, rows):
    """True in [B, S, K, 1] or [B, K, M, 1] for rows of K and V that nobody attends."""
    bias = np.asarray(bias)
    if index is None:
        B, K, M, _ = rows
        return np.broadcast_to(bias == -np.inf, (B, K, M))[..., None]
    B, S, K, _ = rows
    listed = np.broadcast_to(np.asarray(index), (B, K, bias.shape[2]))
    attended = (listed >= 0) & (listed < S) & (np.broadcast_to(bias, listed.shape) > -np.inf)
    unread = np.ones((B, S, K), bool)
    for b, h, m in np.argwhere(attended):
        unread[b, listed[b, h, m], h] = False
    return unread[..., None]


def _pieces(check, impl: str, seed: int) -> tuple[dict[str, float], list[str]]:
    """A list that is cut, attended piece by piece, and joined one by one and at once."""
    q, k, v, index, bias, wide = lists(check, seed)
    run = compiled(sparse_decode.sparse_decode, impl, check.tiling, mass=True)
    at = np.arange(bias.shape[2])
    parts = []
    for low, high in zip(CUTS, (*CUTS[1:], len(at)), strict=True):
        inside = jnp.asarray((at >= low) & (at < high))[None, None]
        parts.append(run(q, k, v, index, jnp.where(inside, bias, -jnp.inf))[0])
    one_by_one, at_once = _joined(parts)
    out, lse, _, _ = oracle.decode(q, *wide, index, bias, False)
    found = [
        (oracle.error(part.out, out), oracle.lse_error(part.lse, lse))
        for part in (one_by_one, at_once)
    ]
    errors = {what: float(np.max(worst)) for what, worst in zip(("out", "lse"), zip(*found))}
    return errors, _faults(one_by_one, lse) + _faults(at_once, lse)


@jax.jit
def _joined(parts: list[Partial]) -> tuple[Partial, Partial]:
    stacked = Partial(*(jnp.stack(x, 2) for x in zip(*parts, strict=True)))
    return functools.reduce(merge, parts), merge_axis(stacked, 2)


def _prompt(check, impl: str, seed: int) -> tuple[dict[str, float], list[str]]:
    q, k, v, length, first = prompts(check, seed)
    out, lse, weights = oracle.prompt(q, k, v, length, first)
    program = compiled(flash_prefill.flash_prefill, impl, check.tiling)
    attend = lambda q, k, v, length: program(q, k, v, length, first=first)
    faults = []
    if check.kind == "overflow" and np.max(lse) <= 100:
        faults.append(f"the inputs are wrong: the greatest lse is {np.max(lse):.3g}, not over 100")
    none = (lse == -np.inf).all(axis=2)
    unread = none if first is None else _behind(k.shape[1], q.shape[1], length, first)
    poison = lambda x, rows: jnp.where(rows[(...,) + (None,) * (x.ndim - 2)], jnp.nan, x)
    if check.kernel == "flash_prefill":
        part = attend(q, k, v, length)
        faults += _faults(part, lse)
        if check.kind == "poison":
            again = attend(poison(q, none), poison(k, unread), poison(v, unread), length)
            faults += _changed("with poison", again, part)
        if check.kind == "beyond":
            further = jnp.where(length == q.shape[1], 2**30, length)
            faults += _changed("with a length of 2**30", attend(q, k, v, further), part)
        found = oracle.error(part.out, out), oracle.lse_error(part.lse, lse)
        return dict(zip(("out", "lse"), found)), faults
    own = check.kind in ("own lse", "overflow", "sums")
    norm = attend(q, k, v, length).lse if own else jnp.asarray(lse, jnp.float32)
    W, P = check.shape.queries, check.shape.groups

    def mass_of(reduce, q, k, norm):
        options = dict(queries=W, heads=P, reduce=reduce)
        run = compiled(prompt_mass.prompt_mass, impl, check.tiling, **options)
        return run(q, k, norm, length, first=first)

    reduce = check.kernel.removeprefix("prompt_mass_")
    all_of_them = (q if reduce == "rows" else k).shape[1]
    rows = oracle.last_rows(weights, length, W or all_of_them, P, first)
    got = mass_of(reduce, q, k, norm)
    errors = {"mass": oracle.error(got, rows if reduce == "rows" else rows.sum(axis=2))}
    faults += _wrong_type(mass=got)
    if check.kind == "poison":
        again = mass_of(reduce, poison(q, none), poison(k, unread), poison(norm, none))
        faults += _changed("with poison", again, got)
    if check.kind == "sums":
        heads = q.shape[2] / P
        if reduce == "rows":
            off = np.asarray(got, np.float64).sum(-1) / heads - (rows.sum(-1) > 0)
        else:  # near zero the sum over queries is told relative to 0.2
            total = np.asarray(mass_of("rows", q, k, norm), np.float64).sum(2)
            off = (np.asarray(got) - total) / (0.2 + total)
        errors["sum"] = float(np.max(np.abs(off)))
    return errors, faults


def _behind(T: int, C: int, length, first) -> np.ndarray:
    """[B, T] bool: keys behind a prompt, or behind all queries of its chunk."""
    end = np.minimum(np.asarray(length), np.asarray(first) + C)
    return np.arange(T)[None] >= end[:, None]


def prompts(check, seed: int):
    """q, k, v, lengths [B] and first [B].

    For `overflow` one channel of q and one key are large.
    """
    T, K, G, H, length, *_, chunk, first = check.shape
    r = np.random.default_rng(seed)
    B = 2 if length is None else len(length)
    q = r.normal(size=(B, chunk or T, K * G, H))
    k = r.normal(size=(B, T, K, H))
    v = r.normal(size=(B, T, K, H))
    if check.kind == "overflow":
        q[..., 0] *= 30.0
        k[:, 7] *= 30.0
    numbers = (None if x is None else jnp.asarray(x, jnp.int32) for x in (length, first))
    return *(jnp.asarray(x, jnp.dtype(check.dtype)) for x in (q, k, v)), *numbers


# ---- named shapes


def at_named_shape(check, impl: str, seed: int) -> tuple[dict[str, float], list[str]]:
    """Errors and faults against the reference in float32, sequence by sequence to save memory."""
    shape = shapes.named(check.shape)
    build = lambda dtype, impl: cases.build(
        check.kernel, shape, dtype, KV_SPARSITY, impl, check.tiling
    )
    case, exact = build(check.dtype, impl), build("float32", "xla").function
    args = jax.jit(case.inputs)(jnp.uint32(seed % 2**32))
    got = _outputs(check.kernel, jax.jit(case.function)(*args))
    with jax.default_matmul_precision("highest"):
        want = _outputs(check.kernel, jax.jit(lambda args: _one_by_one(exact, args))(args))
    faults = _wrong_type(**got)
    faults += [f"{what} is not finite" for what, x in got.items() if not jnp.isfinite(x).all()]
    return {what: float(_off(what, got[what], x)) for what, x in want.items()}, faults


def _one_by_one(function, args):
    """`function` of each sequence alone, floats as float32."""

    def one(args):
        wide = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return function(*jax.tree.map(lambda x: wide(x)[None], args))

    return jax.tree.map(lambda x: x[:, 0], jax.lax.map(one, args))


def _outputs(kernel: str, found) -> dict[str, jax.Array]:
    """What a kernel of `cases.py` returned, by name."""
    if kernel.startswith("prompt_mass"):
        return {"mass": found}
    part, mass = (found, None) if isinstance(found, Partial) else found
    return part._asdict() | ({} if mass is None else {"mass": mass})


@functools.partial(jax.jit, static_argnums=0)
def _off(what: str, got, want) -> jax.Array:
    """The worst error, see the table above; NaN where a number is."""
    difference, size = jnp.abs(got - want), jnp.abs(want)
    if what == "out":
        length = lambda x: jnp.sqrt(jnp.sum(x * x, axis=-1))
        return jnp.max(length(difference) / length(size))
    if what == "lse":
        return jnp.max(difference / jnp.maximum(size, 1.0))
    return jnp.max(jnp.where(difference == 0, 0.0, difference / size))


# ---- calls


@functools.cache
def compiled(function, impl: str, tiling, **options):
    """`function` inside jit; references have no tiling."""
    tiling = None if impl == "xla" else tiling
    return jax.jit(functools.partial(function, impl=impl, tiling=tiling, **options))


def _function(kernel: str):
    name, _, codes = kernel.partition("_int8_")
    if codes:
        return getattr(int8_decode, f"{name}_int8")
    return sparse_decode.sparse_decode if name == "sparse_decode" else packed_decode.packed_decode


# ---- faults


def _faults(part: Partial, lse) -> list[str]:
    """Types, and outputs of queries that attend nothing."""
    found = _wrong_type(out=part.out, lse=part.lse)
    out = np.asarray(part.out)
    if out.shape[:-1] == lse.shape and np.any(out[lse == -np.inf] != 0):
        found.append("out is not 0 where nothing is attended")
    return found


def _wrong_type(**arrays) -> list[str]:
    return [
        f"{name} is {x.dtype.name}, not float32"
        for name, x in arrays.items()
        if x.dtype != jnp.float32
    ]


def _changed(how: str, got, want) -> list[str]:
    """A fault where two runs differ in a bit, or in whether a number is NaN."""
    same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), got, want)
    return [] if all(jax.tree.leaves(same)) else [f"{how} the results change"]
