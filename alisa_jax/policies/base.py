"""The contract of a policy: which past tokens may this query attend to?

A policy is a frozen dataclass of pure methods; what it remembers is a pytree (`stats`) that it gets
and returns. The query at position n attends itself and the tokens that the policy keeps among the
positions 0 .. n-1. One decode step is

    stats = policy.observe(stats, mass, ...)              the query at n paid `mass` to the slots
    stats, ex = policy.exchange(stats, pos, bias, n+1)    changes of slots for the query at n+1

and `select` states the same set from scratch, as a boolean mask: the reference for `exchange`, the
first set after a prompt, and the whole policy on the routes that do not keep a working set.

Some methods need more, and declare it:

    resolve             the sizes and the calibration of the model
    takes_keys          the keys as they are written
    mass_heads          the mass of every query head
    raw_keys, places    keys before their rotation
    appends             a set that grows by every token after a prompt
    compacts            changed keys and values of a prompt
    reads_layer         a prompt of chosen tokens
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax import spec
from alisa_jax.axes import adopted

Stats = Any


class Dims(NamedTuple):
    """Sizes that a policy may need for its statistics."""

    B: int  # sequences
    N: int  # query heads
    K: int  # kv heads
    S: int  # context bucket
    M: int  # slots of the working set (M = S on the routes where slot = position)
    H: int = 0  # channels of a head; 0 where no method reads it


class Exchange(NamedTuple):
    """The working set after an exchange; rows `load_pos` of the store go to slots `load_slot`."""

    pos: jax.Array  # [B, P, M] int32
    bias: jax.Array  # [B, P, M] float32
    load_slot: jax.Array  # [B, P, E] int32, -1 = none; E may be 0
    load_pos: jax.Array  # [B, P, E] int32, -1 = none
    more: jax.Array  # [] bool: the list of loads was full; call again


class Compacted(NamedTuple):
    """The content of the slots of a working set after `compact` has changed keys and values."""

    k: jax.Array  # [B, K, M, H]
    v: jax.Array  # [B, K, M, H]
    pos: jax.Array  # [B, P, M] int32, -1 = empty
    bias: jax.Array  # [B, P, M] float32: log n for a token that stands for n, -inf = empty


@dataclass(frozen=True)
class Policy:
    """Base of all policies; its defaults are stateless, with one selection for all heads."""

    evicts: ClassVar[bool] = True  # tokens that are not kept are lost; no store
    selects: ClassVar[bool] = True  # False: every query attends every token
    needs_query: ClassVar[bool] = False  # cannot be chosen one step ahead
    routes: ClassVar[tuple[str, ...]] = ("working_set", "indexed", "masked")
    seed_kind: ClassVar[str] = "none"  # what a prefill hands to `seed`: "none" | "rows" | "sum"
    takes_keys: ClassVar[bool] = False  # `note` gets every key
    appends: ClassVar[bool] = False  # all tokens after a prompt are kept: the set grows
    compacts: ClassVar[bool] = False  # `compact` changes the keys and values of a prompt

    def __str__(self) -> str:
        """The spec of this policy, for messages; the Python form if its class has no name."""
        from alisa_jax import policies  # which imports this module

        try:
            return spec.to_text(self, policies.POLICIES)
        except spec.SpecError:
            return repr(self)

    @property
    def raw_keys(self) -> bool:
        """Whether keys are stored before their rotation, and rotated to `places` at every step."""
        return False

    @property
    def endless(self) -> bool:
        """Whether places stay below the capacity, so contexts may exceed the model's positions."""
        return False

    def reads_layer(self, tokens: int) -> int | None:
        """The layer that picks the prompt tokens to keep (`choose`); None keeps all.

        tokens: the length of the longest prompt.
        """
        return None

    def feeds(self, tokens):
        """Upper bound on the tokens read from a prompt of `tokens` tokens (int or array)."""
        return tokens

    def resolve(self, config, calibration=None) -> Policy:
        """This policy for a model, given its `ModelConfig` and its `Calibration` or None.

        Raises ValueError, in one sentence, for what the model does not have.
        """
        if (dense := getattr(self, "dense_layers", 0)) > config.n_layers:
            raise ValueError(f"dense_layers must be at most {config.n_layers}; got {dense}")
        return self

    def for_layer(self, layer: int) -> Policy:
        """The policy of layer `layer`, counted from 0."""
        return self

    def selection_heads(self, K: int) -> int:
        """P: 1 when heads share a selection, K when every kv head has its own."""
        return 1

    def mass_heads(self, N: int, K: int) -> int:
        """Groups of the N query heads over which the mass for `observe` and `seed` is summed.

        `selection_heads`, or N for every query head by itself, where head n belongs to kv head
        n // (N / K).
        """
        return self.selection_heads(K)

    def capacity(self, S: int) -> int:
        """Slots of the working set for a context bucket of S tokens that are all decoded."""
        raise NotImplementedError

    def prompt_capacity(self, S: int) -> int:
        """Slots that a prompt in a bucket of S tokens fills, for a policy that `appends`."""
        return self.capacity(S)

    @classmethod
    def sized(cls, kept: int, tokens: int) -> Policy | None:
        """This policy set to keep `kept` of `tokens` prompt tokens per layer; None if it cannot.

        Other settings have their defaults. Tokens after the prompt are kept as the method does: a
        share of them, or all. Raises ValueError for a size that the method cannot have.
        """
        fields = cls.__dataclass_fields__
        if "kv_sparsity" not in fields:
            return None
        every_layer = {"dense_layers": 0} if "dense_layers" in fields else {}
        return cls(kv_sparsity=round(1.0 - kept / tokens, 6), **every_layer)

    def validate(self, S: int) -> None:
        """Raise ValueError when this policy cannot serve a context of S tokens."""

    def init(self, dims: Dims) -> Stats:
        """Statistics before the first token."""
        return ()

    def grow(self, stats: Stats, S: int, M: int) -> Stats:
        """Statistics for the next context bucket."""
        return stats

    def seed_rows(self, S: int) -> int:
        """The number of last rows of attention that `seed` reads (`seed_kind` "rows")."""
        return 0

    def seed(self, stats: Stats, rows, length: jax.Array, dims: Dims) -> tuple[Stats, jax.Array]:
        """Statistics and first set after a dense prompt of `length` [B] tokens.

        rows, for each `seed_kind`:

            "rows"   [B, mass_heads, W, S] float32, W = seed_rows(S); the last row belongs to the
                     last query of each sequence
            "sum"    [B, mass_heads, S] float32, summed over all queries
            "none"   None

        Returns the statistics and `pos` [B, P, M]: the token that each slot is to hold.
        """
        return stats, slots_of(self.select(stats, length, dims.S), dims.M)

    def compact(self, k: jax.Array, v: jax.Array, rows, length: jax.Array, dims: Dims) -> Compacted:
        """Keys and values of a dense prompt as the slots will hold them, if the policy `compacts`.

        k, v [B, T, K, H]; tokens from `length` [B] on are padding; rows as for `seed`. With M = S
        slot p holds a token of position p.
        """
        raise NotImplementedError

    def choose(self, q: jax.Array, k: jax.Array, length: jax.Array) -> jax.Array:
        """The tokens of a prompt to keep, [B, n] int32, ascending, -1 behind them (`reads_layer`).

        q [B, N, H]: the query of each prompt's last token in that layer; k [B, T, K, H]: its keys,
        padding from `length` on.
        """
        raise NotImplementedError

    def note(self, stats: Stats, k: jax.Array, first: jax.Array) -> Stats:
        """Read rotated keys k [B, T, K, H] of positions first [B] .. first + T - 1 (`takes_keys`).

        One token before its query selects, or a whole prompt, padding included, with first = 0.
        """
        return stats

    def places(self, pos: jax.Array, length: jax.Array) -> jax.Array:
        """Rotary positions [B, P, M] of tokens `pos` for the query at `length` [B] (`raw_keys`)."""
        return pos

    def place(self, length: jax.Array) -> jax.Array:
        """Rotary position [B] of the query at `length` (`raw_keys`)."""
        return length

    def refresh(self, length: jax.Array) -> jax.Array | None:
        """[B] bool: whether the query at position `length` attends every token; None for never."""
        return None

    def without_refresh(self) -> Policy:
        """This policy for steps of which none is a `refresh`."""
        return self

    def observe(self, stats: Stats, mass, pos, slot, length, dense=None) -> Stats:
        """Read the attention of one step.

        mass [B, mass_heads, M] float32: attention that the query at position `length` [B] paid to
        each slot, summed over the heads of a group; pos [B, P, M]; slot [B, P]: where the query's
        own token lies; dense: None or (which [B] bool, row [B, mass_heads, S] float32): for those
        sequences, the attention paid to every position, which replaces mass.
        """
        return stats

    def exchange(self, stats: Stats, pos, bias, length, S: int) -> tuple[Stats, Exchange]:
        """Change the set into the one for the query at position `length` [B].

        One slot stays empty for that query. Evicting policies set `pos` to -1 and load nothing.
        """
        raise NotImplementedError

    def joint(self) -> Hashable | None:
        """Grouping key: layers with equal keys are exchanged in one batch; None means alone.

        See `exchange_layers`.
        """
        return None

    def exchange_layers(
        self, policies: Sequence[Policy], stats: Sequence[Stats], pos, bias, length, S: int
    ) -> tuple[list[Stats], list[Exchange]]:
        """`exchange` of layers with this policy's `joint` key: lists of one entry per layer.

        `length` [B] is that of all layers, and all report the same `more`.
        """
        raise NotImplementedError

    def adopt(self, stats: Stats, other: Stats, rows: jax.Array, which: jax.Array | None) -> Stats:
        """`stats` with sequences `which` [B] bool replaced by `rows` [B] of `other`.

        which: None for the sequences `rows` alone, however many (`axes.adopted`).
        """
        return jax.tree.map(lambda a, b: adopted(a, b, rows, which), stats, other)

    def select(self, stats: Stats, length, S: int, q=None) -> jax.Array:
        """[B, P, S] bool: the past tokens that the query at position `length` [B] may attend.

        q [B, K, G, H] only for policies with `needs_query`.
        """
        raise NotImplementedError


def positions(S: int) -> jax.Array:
    """[1, 1, S] int32: 0 .. S-1, to be compared with [B, P, 1] bounds."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, 1, S), 2)


def column(length: jax.Array) -> jax.Array:
    """[B] -> [B, 1, 1]."""
    return length[:, None, None]


def slots_of(keep: jax.Array, M: int) -> jax.Array:
    """`pos` [B, P, M] int32 for a mask `keep` [B, P, S] bool; -1 where a slot stays empty.

    With M = S slot p holds position p; otherwise the kept positions are packed in ascending order.
    """
    S = keep.shape[-1]
    at = jnp.where(keep, positions(S), S)
    if M != S:
        at = jnp.sort(at, axis=-1)
        at = at[..., :M] if M < S else jnp.pad(at, ((0, 0), (0, 0), (0, M - S)), constant_values=S)
    return jnp.where(at < S, at, -1)


def evicted(pos: jax.Array, bias: jax.Array, gone: jax.Array) -> Exchange:
    """The exchange that empties the slots where `gone` [B, P, M] is true."""
    none = jnp.zeros((*pos.shape[:2], 0), jnp.int32)
    return Exchange(
        jnp.where(gone, -1, pos),
        jnp.where(gone, jnp.float32(-jnp.inf), bias),
        none,
        none,
        jnp.zeros((), jnp.bool_),
    )
