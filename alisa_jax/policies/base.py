"""What a policy is: which past tokens may this query attend to?

A policy is a frozen dataclass of pure methods; what it remembers is a pytree (`stats`) that it gets
and returns. The query at position n attends the tokens that the policy keeps among positions 0 ..
n-1, and itself. One decode step is

    stats = policy.observe(stats, mass, ...)          what the query at n paid to each slot
    stats, ex = policy.exchange(stats, pos, bias, n+1)   the set for the query at n+1, as changes of
                                                         slots

and `select` states the same set from scratch, as a boolean mask: the reference for `exchange`, the
first set after a prompt, and the whole policy on the routes that do not keep a working set.

Some methods need more, and say so: what the model is (`resolve`), the keys as they are written
(`takes_keys`), mass of every query head (`mass_heads`), keys before their rotation
(`raw_keys`, `places`), a set that grows by all that comes after a prompt (`appends`), keys and
values of a prompt changed (`compacts`), or a prompt of chosen tokens (`reads_layer`).
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
    H: int = 0  # channels of a head; 0 where nobody needs to know


class Exchange(NamedTuple):
    """The working set after an exchange. Rows of `load_pos` are to be copied from the store into
    `load_slot`.
    """

    pos: jax.Array  # [B, P, M] int32
    bias: jax.Array  # [B, P, M] float32
    load_slot: jax.Array  # [B, P, E] int32, -1 = none; E may be 0
    load_pos: jax.Array  # [B, P, E] int32, -1 = none
    more: jax.Array  # [] bool: the list of loads was full; call again


class Compacted(NamedTuple):
    """What the slots of a working set hold once `compact` has changed keys and values."""

    k: jax.Array  # [B, K, M, H]
    v: jax.Array  # [B, K, M, H]
    pos: jax.Array  # [B, P, M] int32, -1 = empty
    # [B, P, M] float32: log n for a token that stands for n, -inf where a slot is empty
    bias: jax.Array


@dataclass(frozen=True)
class Policy:
    """Base of all policies; what is not overridden is a stateless policy that shares its selection
    between heads.
    """

    evicts: ClassVar[bool] = True  # what is not kept is gone; no store
    selects: ClassVar[bool] = True  # False: every query attends every token
    needs_query: ClassVar[bool] = False  # cannot be chosen one step ahead
    routes: ClassVar[tuple[str, ...]] = ("working_set", "indexed", "masked")
    seed_kind: ClassVar[str] = "none"  # what a prefill hands to `seed`: "none" | "rows" | "sum"
    takes_keys: ClassVar[bool] = False  # `note` gets every key
    # what comes after a prompt is kept: the set grows by what the prompt left
    appends: ClassVar[bool] = False
    compacts: ClassVar[bool] = False  # `compact` changes the keys and values of a prompt

    def __str__(self) -> str:
        """The spec that gives this policy, for messages; of a class without a name, its Python
        form.
        """
        from alisa_jax import policies  # which imports this module

        try:
            return spec.to_text(self, policies.POLICIES)
        except spec.SpecError:
            return repr(self)

    @property
    def raw_keys(self) -> bool:
        """Keys are stored before their rotation, and turned to `places` at every step."""
        return False

    @property
    def endless(self) -> bool:
        """Places stay below the capacity, so that contexts may be longer than the model's
        positions.
        """
        return False

    def reads_layer(self, tokens: int) -> int | None:
        """The layer whose attention chooses what is fed of prompts, the longest of `tokens`
        (`choose`); None: all is fed.
        """
        return None

    def feeds(self, tokens):
        """At most how many tokens of a prompt of `tokens`, a number or an array of
        them, are fed.
        """
        return tokens

    def resolve(self, config, calibration=None) -> Policy:
        """This policy for a model: config is a `ModelConfig`, calibration a `Calibration` of the
        model or None.

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
        """Groups of the N query heads over which the mass for `observe` and `seed` is summed:
        `selection_heads`, or N for
        every query head by itself, where head n belongs to kv head n // (N / K)."""
        return self.selection_heads(K)

    def capacity(self, S: int) -> int:
        """Slots of the working set that a context bucket of S tokens needs when all of them are
        decoded.
        """
        raise NotImplementedError

    def prompt_capacity(self, S: int) -> int:
        """Slots that a prompt in a bucket of S tokens leaves taken, for a policy that `appends`."""
        return self.capacity(S)

    @classmethod
    def sized(cls, kept: int, tokens: int) -> Policy | None:
        """This method with room for `kept` of a prompt of `tokens` tokens in every layer, else at
        its defaults; None for a method that has no such size.

        What comes after the prompt is kept as the method does: as a share of what is there, or all
        of it. Raises ValueError for a size that the method cannot have.
        """
        fields = cls.__dataclass_fields__
        if "kv_sparsity" not in fields:
            return None
        return cls(
            kv_sparsity=round(1.0 - kept / tokens, 6),
            **({"dense_layers": 0} if "dense_layers" in fields else {}),
        )

    def validate(self, S: int) -> None:
        """Raise ValueError when this policy cannot serve a context of S tokens."""

    def init(self, dims: Dims) -> Stats:
        """Statistics before the first token."""
        return ()

    def grow(self, stats: Stats, S: int, M: int) -> Stats:
        """Statistics for the next context bucket."""
        return stats

    def seed_rows(self, S: int) -> int:
        """How many of the last rows of attention `seed` wants (`seed_kind` "rows")."""
        return 0

    def seed(self, stats: Stats, rows, length: jax.Array, dims: Dims) -> tuple[Stats, jax.Array]:
        """Statistics and first set after a dense prompt.

        rows: `seed_kind` "rows": [B, mass_heads, W, S] float32, W = seed_rows(S), the last row
        belongs to the last query of each sequence; "sum": [B, mass_heads, S] float32, summed over
        all queries; "none": None. length: [B]. Returns the statistics and `pos` [B, P, M]: which
        token each slot of the working set is to hold.
        """
        return stats, slots_of(self.select(stats, length, dims.S), dims.M)

    def compact(self, k: jax.Array, v: jax.Array, rows, length: jax.Array, dims: Dims) -> Compacted:
        """Keys and values of a dense prompt as the slots are to hold them, for a policy that
        `compacts`.

        k, v [B, T, K, H]; tokens from `length` [B] on are padding; rows as for `seed`. With M = S
        slot p holds a token of position p.
        """
        raise NotImplementedError

    def choose(self, q: jax.Array, k: jax.Array, length: jax.Array) -> jax.Array:
        """Which tokens of a prompt are fed, for a policy with `reads_layer`: [B, n] int32,
        ascending, -1 behind them.

        q [B, N, H]: the query of each prompt's last token in that layer; k [B, T, K, H]: its keys,
        padding behind `length`.
        """
        raise NotImplementedError

    def note(self, stats: Stats, k: jax.Array, first: jax.Array) -> Stats:
        """Take in the keys k [B, T, K, H], rotated, of positions first [B] .. first + T - 1, for a
        policy that `takes_keys`.

        One token before its query selects; a whole prompt, padding included, with first = 0.
        """
        return stats

    def places(self, pos: jax.Array, length: jax.Array) -> jax.Array:
        """Rotary positions [B, P, M] of the tokens `pos` for the query at `length` [B]; asked where
        `raw_keys`.
        """
        return pos

    def place(self, length: jax.Array) -> jax.Array:
        """Rotary position [B] of the query at `length`; asked where `raw_keys`."""
        return length

    def refresh(self, length: jax.Array) -> jax.Array | None:
        """[B] bool: sequences whose query at position `length` attends every token;
        None for never.
        """
        return None

    def observe(self, stats: Stats, mass, pos, slot, length, dense=None) -> Stats:
        """Take in one step.

        mass [B, mass_heads, M] float32: attention that the query at position `length` [B] paid to
        each slot, summed over the heads of a group; pos [B, P, M]; slot [B, P]: where the query's
        own token lies; dense: None or (which [B] bool, row [B, mass_heads, S] float32): for those
        sequences the attention paid to every position instead.
        """
        return stats

    def exchange(self, stats: Stats, pos, bias, length, S: int) -> tuple[Stats, Exchange]:
        """Change the set into the one for the query at position `length` [B]; leaves a slot empty
        for that query.

        Evicting policies set `pos` to -1 and load nothing.
        """
        raise NotImplementedError

    def joint(self) -> Hashable | None:
        """Layers whose policies give the same value exchange in one go (`exchange_layers`); None:
        each by itself.
        """
        return None

    def exchange_layers(
        self, policies: Sequence[Policy], stats: Sequence[Stats], pos, bias, length, S: int
    ) -> tuple[list[Stats], list[Exchange]]:
        """`exchange` of layers whose policies are `joint` with this one: lists of one entry a
        layer, `length` [B] of all.

        All layers report the same `more`.
        """
        raise NotImplementedError

    def adopt(self, stats: Stats, other: Stats, rows: jax.Array, which: jax.Array) -> Stats:
        """`stats` with its sequences `which` [B] bool replaced by `rows` [B] of `other`, of the
        same bucket.
        """
        return jax.tree.map(lambda a, b: adopted(a, b, rows, which), stats, other)

    def select(self, stats: Stats, length, S: int, q=None) -> jax.Array:
        """[B, P, S] bool: the tokens that the query at position `length` [B] may attend, itself not
        counted.

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
    """Slots for a mask: `keep` [B, P, S] bool -> `pos` [B, P, M] int32, -1 where a slot stays
    empty.

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
