"""Selections recorded from a trained model, and replayed at another shape.

Random weights attend to all tokens about equally. Their selection hardly changes, so hardly any row moves. A `Trace` holds
how Sparse Window Attention ranks the tokens of a text that a trained model reads; under `Replay` another model attends the
same positions. `Replay` has the arrays and does the work of `Swa`, sums included; only the ranking comes from the trace,
which is a constant of the compiled programs and no part of the cache. A rank is a byte:

    255            attended
    254 and less   the others by their sums, the best first, equal sums alike; the rank decides which of them keep a spare
                   slot, and so which returns cost a copy

Rankings are indexed by the number n of tokens before the query. Layer i of L selecting layers maps to layer i * l // L of
the trace's l. Sequence b of a part maps to sequence b modulo the trace's; each part of a batch counts from 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from alisa_jax import Engine, policies
from alisa_jax.engine import step
from alisa_jax.kv.buckets import bucket
from alisa_jax.placement.plan import ALL, Positions
from alisa_jax.policies import Dense, Policy, Swa
from eval.modelled import shapes
from eval.script import inputs
from eval.script.common import UserError
from eval.speed import systems
from eval.text import windows

ATTENDED = 255


@dataclass(frozen=True, eq=False)
class Trace:
    """The ranks of B sequences and P selection heads at T positions in a row, the first of them `first`.

    One array for each layer, so that layers of a program that replay the same one share it.
    """

    first: int
    ranks: tuple[np.ndarray, ...]  # [B, P, T, S] uint8; 0 for the query's own token and later ones
    loads: (
        np.ndarray
    )  # [l, B, T] int32: rows that entered the working set after each query and were not in a spare slot

    @property
    def sequences(self) -> int:
        return len(self.ranks[0])

    def layer(self, i: int, layers: int) -> int:
        """The layer of the trace that layer i of `layers` replays."""
        return i * len(self.ranks) // layers

    def sets(self, layer: int, sequence: int, first: int, steps: int, heads: int | None = None) -> list[np.ndarray]:
        """What the queries at positions first .. first + steps - 1 attend besides themselves, ascending, in any of the
        selection heads that a model with `heads` of them replays; None: in any."""
        ranks = self.ranks[layer][sequence % self.sequences]
        P, T, S = ranks.shape
        used = range(P) if heads is None else sorted({p * P // heads for p in range(heads)})
        n = np.arange(first, first + steps)
        rows = np.clip(n - self.first, 0, T - 1)
        attended = (ranks[np.array(used)[:, None], rows[None]] == ATTENDED).any(0) & (np.arange(S) < n[:, None])
        return [np.flatnonzero(row) for row in attended]

    def positions(self, layer: int, sequence: int, n: int, heads: int | None = None) -> tuple[int, ...]:
        """`sets` of one query."""
        return tuple(self.sets(layer, sequence, n, 1, heads)[0].tolist())

    def fields(self) -> dict:
        """What a record says of it."""
        return {
            "trace_sequences": self.sequences,
            "trace_entering_tokens": self.entering_tokens(),
            "trace_loaded_tokens": float(self.loads[..., :-1].mean()) if self.loads.shape[-1] > 1 else 0.0,
        }

    def entering_tokens(self) -> float:
        """Tokens that enter a set per step, layer, sequence and head, besides the one that was just made."""
        rows = [row for ranks in self.ranks for row in ranks.reshape(-1, *ranks.shape[2:]) == ATTENDED]
        steps, count = len(rows[0]) - 1, 0
        for attended in rows:
            new = attended[1:] & ~attended[:-1]
            new[np.arange(steps), self.first + np.arange(steps)] = False
            count += int(new.sum())
        return count / max(1, steps * len(rows))


def record(model, policy: Swa, sequences: Sequence[Sequence[int]], prompt_tokens: int) -> Trace:
    """Let `model` read sequences, all of one length, under `policy`: their first `prompt_tokens` tokens as a dense prompt,
    the others one by one through the real decode path. Raises ValueError where no layer selects."""
    engine = Engine(model, policy, route="working_set")
    placed = [i for i, spec in enumerate(engine.layers) if spec.policy.selects]
    if not placed:
        raise ValueError(f"all {len(engine.layers)} layers of {model.name} attend densely under {policy}")
    decoder, tokens = model.decoder, np.asarray(sequences, np.int32)
    B, n = tokens.shape
    S = bucket(n)

    @jax.jit
    def prompt(params, tokens, length):
        return step.prefill(decoder, engine.layers, params, tokens, length)[1]

    @functools.partial(jax.jit, donate_argnums=1)
    def chunk(params, kv, tokens, steps):
        """Feed tokens [B, C] up to `steps`: kv, sums [C, l, B, P, S], the sets that they chose [C, l, B, P, M], loads."""

        def seen(kv, pos, loads):
            sums = [kv.layers[i][0].stats.sums.hi for i in placed]
            return tuple(jnp.stack(part) for part in (sums, pos, loads))

        def one(i, carry):
            kv, out = carry
            _, after, taps = step.decode(decoder, params, kv, tokens[:, i])
            taps = [taps[layer][0] for layer in placed]
            now = seen(kv, [tap.pos for tap in taps], [tap.loads for tap in taps])
            return after, jax.tree.map(lambda old, new: old.at[i].set(new), out, now)

        states = [kv.layers[i][0] for i in placed]
        shapes = seen(kv, [state.ws.pos for state in states], [state.length for state in states])
        room = jax.tree.map(lambda x: jnp.zeros((tokens.shape[1], *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, steps, one, (kv, room))

    first = np.pad(tokens[:, :prompt_tokens], ((0, 0), (0, S - prompt_tokens)))
    kv = prompt(model.params, jnp.asarray(first), jnp.full((B,), prompt_tokens, jnp.int32))
    found, loads, size = [], [], step.CHUNK_STEPS
    for start in tqdm(range(prompt_tokens, n, size), desc="trace", disable=None, leave=False):
        some = np.pad(tokens[:, start : start + size], ((0, 0), (0, max(0, start + size - n))))
        steps = min(size, n - start)
        kv, out = chunk(model.params, kv, jnp.asarray(some), jnp.int32(steps))
        sums, pos, count = (np.asarray(x)[:steps] for x in out)
        loads.append(np.moveaxis(count, 0, 2))
        found += [_ranks(*one, start + i) for i, one in enumerate(zip(sums, pos, strict=True))]
    ranks = tuple(np.stack(layer, axis=2) for layer in zip(*found, strict=True))
    return Trace(prompt_tokens, ranks, np.concatenate(loads, axis=2))


def _ranks(sums: np.ndarray, pos: np.ndarray, n: int) -> np.ndarray:
    """[..., S] uint8 from the sums [..., S] that chose a set and the set [..., M], -1 for none, at position n."""
    S = sums.shape[-1]
    attended = np.zeros((*pos.shape[:-1], S + 1), bool)
    np.put_along_axis(attended, np.where(pos < 0, S, pos), True, axis=-1)
    past, attended = np.arange(S) < n, attended[..., :S]
    value = np.where(past & ~attended, sums, -np.inf)
    order = np.argsort(-value, axis=-1, kind="stable")
    ordered = np.take_along_axis(value, order, axis=-1)
    begins = np.arange(S) * (ordered != np.roll(ordered, 1, axis=-1))  # where a run of equal ones does
    rank = np.empty(sums.shape, np.int64)
    np.put_along_axis(rank, order, np.maximum.accumulate(begins, axis=-1), axis=-1)
    rank = np.where(attended, ATTENDED, np.maximum(ATTENDED - 1 - rank, 0))
    return np.where(past, rank, 0).astype(np.uint8)


@dataclass(frozen=True)
class Replay(Swa):
    """`Swa` that ranks as a trace does. `replay` makes one for all layers of a model."""

    trace: Trace | None = dataclasses.field(default=None, repr=False)
    layers: int = 1  # of the model
    layer: int = 0  # of the trace

    def for_layer(self, layer):
        if layer < self.dense_layers:
            return Dense()
        mine = self.trace.layer(layer - self.dense_layers, self.layers - self.dense_layers)
        return dataclasses.replace(self, layer=mine)

    def ranking(self, stats, length: jax.Array) -> jax.Array:
        """The trace's ranks at position `length` [B] in place of the sums."""
        B, P, S = stats.slot_of.shape
        ranks = self.trace.ranks[self.layer]
        b, p = (jnp.arange(n, dtype=jnp.int32) for n in (B, P))
        row = jnp.clip(length - self.trace.first, 0, ranks.shape[2] - 1)
        score = jnp.asarray(ranks)[(b % ranks.shape[0])[:, None], (p * ranks.shape[1] // P)[None], row[:, None]]
        score = score[..., :S].astype(jnp.float32)
        return jnp.pad(score, ((0, 0), (0, 0), (0, S - score.shape[-1])))


def replay(policy: Swa, trace: Trace, layers: int) -> Replay:
    """`policy` for a model of `layers` layers, with the selections of `trace`."""
    options = {field.name: getattr(policy, field.name) for field in dataclasses.fields(Swa)}
    return Replay(**options, trace=trace, layers=layers)


def wanted(
    trace: Trace, layers: int, whole: int, heads: int | None = None
) -> Callable[[int, tuple[int, ...]], Positions]:
    """The trace as `simulate` reads it, for `layers` layers that select, each with its own set, and each sequence too;
    `whole`: so many sequences are a part of their own; heads: as of `Trace.sets`."""
    used = [trace.layer(i, layers) for i in range(layers)]

    def at(step: int, lengths: tuple[int, ...]) -> Positions:
        del step
        found = {}
        for sequence, n in enumerate(lengths):
            b = sequence if sequence < whole else sequence - whole
            sets = {layer: trace.positions(layer, b, n, heads) for layer in set(used)}
            found |= {(i, sequence): sets[layer] for i, layer in enumerate(used)}
        return found

    return at


def check_priced(system: systems.System) -> None:
    """Raises UserError where neither a trace nor `computed` tells what a system's policy selects."""
    policy = policies.parse(system.policy)
    kind = type(policy)
    by_positions = kind.select is not Policy.select and kind.init is Policy.init
    if policy.selects and not isinstance(policy, Swa) and not (by_positions or policy.needs_query):
        raise UserError(
            f"--simulate: {system}: a run is priced by what it attends, which is known of swa, of policies whose "
            "query chooses, and of policies that go by positions alone"
        )


def computed(policy, S: int) -> Callable[[int, tuple[int, ...]], Positions]:
    """What a policy selects that needs no statistics, as `simulate` reads it.

    Where the query chooses: as many tokens, evenly spread.
    """

    def spread(step: int, lengths: tuple[int, ...]) -> Positions:
        del step
        counts = [policy.capacity(n) - 1 for n in lengths]
        return {(ALL, b): tuple(range(n))[:: max(1, n // c)][:c] for b, (n, c) in enumerate(zip(lengths, counts))}

    if policy.needs_query:
        return spread

    @jax.jit
    def select(lengths):
        return policy.select((), lengths, S)[:, 0]

    def at(step: int, lengths: tuple[int, ...]) -> Positions:
        del step
        kept = np.asarray(select(jnp.asarray(lengths, jnp.int32)))
        return {(ALL, b): tuple(np.flatnonzero(row).tolist()) for b, row in enumerate(kept)}

    return at


def card(name: str, chosen: Sequence[systems.System], work: systems.Work) -> inputs.Card:
    """What is known of the model `name` before it is read for a trace; raises UserError where it cannot give one."""
    mine = [policy for policy in (policies.parse(system.policy) for system in chosen) if isinstance(policy, Swa)]
    if not mine:
        raise UserError("--trace: no system selects by swa, so there is nothing to replay")
    if name.startswith("random:"):
        raise UserError(f"--trace: the weights of {name} are random; give bundled or the folder of a trained model")
    try:
        config, found = shapes.config(name), inputs.card(name)
    except UserError as error:
        raise UserError(str(error).replace("--model", "--trace", 1)) from None
    if not systems.has_tokenizer(name):
        raise UserError(f"--trace: {name} has no tokenizer, which a text needs")
    if work.context > config.max_positions:
        raise UserError(
            f"--trace: {name} reads {config.max_positions} tokens at most, and {work.context} are asked for"
        )
    for policy in mine:
        if policy.dense_layers >= config.n_layers:
            raise UserError(f"--trace: all {config.n_layers} layers of {name} attend densely under {policy}")
    return found


def recorded(
    name: str, waiting: Sequence[systems.System], work: systems.Work, source: windows.Source, load: Callable
) -> dict[str, Trace]:
    """A trace of the model `name` for each text of an SWA policy among the systems `waiting`.

    It has as many sequences as the batch, or as the text holds where these are fewer.
    """
    parsed = {system.policy: policies.parse(system.policy) for system in waiting}
    wanting = {text: policy for text, policy in parsed.items() if isinstance(policy, Swa)}
    if not wanting:
        return {}
    model = inputs.model(load, name)
    sequences = cut(source, model, work.context, len(work.prompt_tokens))
    return {text: record(model, policy, sequences, min(work.prompt_tokens)) for text, policy in wanting.items()}


def policy(text: str, trace: Trace | None, layers: int) -> Policy:
    """The policy that `text` names, for a model of `layers` layers, under the trace where there is one."""
    chosen = policies.parse(text)
    return chosen if trace is None else replay(chosen, trace, layers)


def cut(source: windows.Source, model, tokens: int, count: int) -> list[list[int]]:
    """At most `count` sequences of `tokens` tokens of a text, evenly spread over it and apart from one another."""
    text = windows.tokenize(source.characters, inputs.tokenizer(model))
    size = max(2, tokens)
    plan = windows.plan(len(text.tokens), size, size, model.bos_id is not None)
    whole = [w for w in plan if w.stop - w.start == plan[0].stop - plan[0].start]
    return [windows.sequence(text, w, model.bos_id)[:tokens] for w in windows.spread(whole, min(count, len(whole)))]
