"""Scoring: the log-probability of given tokens, by each of three protocols.

    decode         token by token through the decode path
    prefill_mask   one pass per layer under the row-by-row selection mask, the reference
    prompt         all but the last tokens as a dense prompt, the last ones decoded

Contexts that several sequences share are read once. Under "decode" they are a batch of their own,
ragged like any other; at the step where a context ends, its state is adopted by every sequence that
goes on from it, and then all sequences decode their last tokens together.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.engine import finite, prompts, shared
from alisa_jax.engine.batch import Batch
from alisa_jax.engine.feed import Feed, Found
from alisa_jax.engine.offload import scoring as placed
from alisa_jax.engine.progress import progress_bar
from alisa_jax.engine.report import PlacementReport
from alisa_jax.kv.buckets import bucket, next_bucket, stages

PROTOCOLS = ("decode", "prefill_mask", "prompt")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What `Engine.score` returns; one entry per sequence in `logprobs` and `correct`."""

    # [len - 1], or [last[i]] with `last`: nats of token t + 1 given tokens 0 .. t, float32
    logprobs: list[np.ndarray]
    correct: list[np.ndarray]  # of these, bool: the greedy token is the next token
    attended_frac: np.ndarray  # [L]: attended share of the context, the token itself included
    loads_per_token: np.ndarray  # [L]: rows copied to the working set; nan under "prefill_mask"
    clipped_frac: np.ndarray  # [L]: share of the elements of K and V outside the codec's range
    kv_bytes_per_token: float  # resident K and V, all layers, per token of the context bucket
    stats_bytes_per_token: float  # resident statistics, positions and biases, per token as well
    compiles: int
    wall_s: float
    implementation: str  # what ran
    implementation_reason: str  # why it was that, where `attention_impl` was auto
    decoded_tokens: int  # tokens that the fractions are means over
    placement: PlacementReport | None  # bytes held and moved; None where the cache is resident


def score(engine, sequences, protocol: str, progress: bool, last: Sequence[int] | None) -> Scores:
    """See `Engine.score`."""
    start, compiles = time.perf_counter(), engine.compiles
    batch, wanted = checked(engine, sequences, protocol, last)
    B, T = batch.tokens.shape
    decoded = wanted if protocol == "prompt" else batch.length - 1
    common = None
    if last is not None and protocol == "decode" and engine.placement is None:
        common = shared.contexts(batch, wanted, engine.codec.frozen_after)
    if engine.placement is not None:
        found = placed.score(engine, batch, wanted if protocol == "prompt" else None, progress)
    elif protocol == "prompt":
        found = _prompt(engine, batch, wanted, progress)
    elif common is not None:
        decoded = wanted
        found = _shared(engine, batch, wanted, *common, progress)
    else:
        found = (_decode if protocol == "decode" else _masked)(engine, batch, progress)
    kind, reason = engine.implementation, engine.implementation_reason
    if protocol == "prefill_mask":
        kind, reason = "xla:masked", "prefill_mask is the reference, which XLA computes"
    c = engine.model.decoder.config
    spans = [slice(b - n, b) for b, n in zip(decoded, wanted, strict=True)]
    rows = [row[span] for row, span in zip(found.logprobs, spans, strict=True)]
    finite.check(rows, engine.model, finite.SCORED, batch.length - wanted)
    return Scores(
        logprobs=rows,
        correct=[row[span] for row, span in zip(found.correct, spans, strict=True)],
        attended_frac=found.attended / max(1, found.counted),
        loads_per_token=found.loads / max(1, found.counted),
        clipped_frac=found.clipped / max(1, found.coded * 2 * c.n_kv_heads * c.head_dim),
        kv_bytes_per_token=found.bytes[0] / (B * bucket(T)),
        stats_bytes_per_token=found.bytes[1] / (B * bucket(T)),
        compiles=engine.compiles - compiles,
        wall_s=time.perf_counter() - start,
        implementation=kind,
        implementation_reason=reason,
        decoded_tokens=found.counted,
        placement=found.placement,
    )


def checked(engine, sequences, protocol, last) -> tuple[Batch, np.ndarray]:
    """The batch, and how many of the last tokens of each are wanted [B]. Raises ValueError."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    batch = engine.batch(sequences)
    if batch.length.min() < 2:
        raise ValueError(
            f"a sequence to score needs at least 2 tokens; number {batch.length.argmin()} has 1"
        )
    if protocol == "prefill_mask" and engine.placement is not None:
        raise ValueError(
            "prefill_mask attends a whole text under a mask and keeps no cache that could be "
            "placed: give placement=resident, or the protocol decode or prompt"
        )
    if protocol == "prompt" and last is None:
        raise ValueError("protocol prompt needs last=, how many tokens come after each prompt")
    if protocol == "prompt":
        given = batch.length - shared.check(batch, last)
        fed = engine.policy.feeds(given)
        engine.validate(int((fed + batch.length - given).max()), int(given.max()))
        engine.check_calibration(fed)
    else:
        engine.validate(batch.tokens.shape[1])
        engine.check_calibration(batch.length - 1)
    if engine.placement is not None:
        asked = placed.prompts_of(engine, batch, None if protocol == "decode" else last)
        fed = engine.policy.feeds(asked.heads.length)
        engine.check_calibration(fed)
        engine.placement.check(fed.tolist(), asked.new_tokens)
    return batch, batch.length - 1 if last is None else shared.check(batch, last)


def _next(tokens: np.ndarray) -> np.ndarray:
    """The token after each of `tokens` [B, T]; 0 for the last."""
    return np.pad(tokens[:, 1:], ((0, 0), (0, 1)))


def _valid(batch: Batch) -> np.ndarray:
    """[B, T] bool: tokens with a next one."""
    return np.arange(batch.tokens.shape[1])[None] < (batch.length - 1)[:, None]


def _decode(engine, batch: Batch, progress: bool) -> Found:
    programs = engine.programs
    valid = _valid(batch)
    B, T = batch.tokens.shape
    raw_tokens = engine.codec.frozen_after
    appends = any(spec.policy.appends for spec in engine.layers)
    sizes = [S for S in stages(T) if S > raw_tokens][-1 if appends else 0 :]
    kv = engine.init(B, raw_tokens or sizes[0])
    feed = Feed(engine, batch.tokens, _next(batch.tokens), valid)
    with progress_bar(progress, T - 1, "score") as bar:
        if raw_tokens:
            kv = programs.freeze_each(feed(kv, 0, raw_tokens, bar), sizes[0])
        made = raw_tokens
        for S in sizes:
            if made > raw_tokens:
                layers = list(kv.layers)
                del kv  # as in `generate.run`
                kv = programs.grow_each(layers, S, prompts.room(engine, T - made))
            end = min(S, T - 1)
            kv, made = feed(kv, made, end, bar), end
    counted, coded = int(valid.sum()), int(valid[:, raw_tokens:].sum())
    return Found(*feed.rows(), *feed.sums(), counted, coded, engine.state_bytes(B, T))


def _masked(engine, batch: Batch, progress: bool) -> Found:
    del progress  # one program, one pass
    valid = _valid(batch)
    B, length = batch.tokens.shape
    T = bucket(length)
    padded = [
        jnp.asarray(np.pad(x, ((0, 0), (0, T - length))))
        for x in (batch.tokens, _next(batch.tokens), valid)
    ]
    found = engine.programs.score_masked(engine.model.params, *padded)
    logprobs, correct, attended, clipped = jax.tree.map(np.asarray, found)
    loads = np.full(attended.shape, np.nan)
    counted, coded = int(valid.sum()), int(valid[:, engine.codec.frozen_after :].sum())
    size = engine.state_bytes(B, length)
    return Found(logprobs, correct, attended, loads, clipped, counted, coded, size)


def _shared(
    engine, batch: Batch, last: np.ndarray, common: Batch, of: np.ndarray, progress: bool
) -> Found:
    """Decode `common`, then the last tokens of `batch`; sequence i continues sequence of[i]."""
    programs = engine.programs
    S, raw_tokens = bucket(batch.tokens.shape[1]), engine.codec.frozen_after
    decoded = common.length
    ends = sorted(set(decoded.tolist()))
    valid = np.arange(common.tokens.shape[1])[None] < decoded[:, None]
    feed = Feed(engine, common.tokens, np.zeros_like(common.tokens), valid)
    kv = engine.init(len(decoded), raw_tokens or S)
    new = engine.init(len(of), raw_tokens or S)
    with progress_bar(progress, int(ends[-1] + last.max()), "score") as bar:
        if raw_tokens:
            kv = programs.freeze_each(feed(kv, 0, raw_tokens, bar), S)
            new = programs.freeze_each(new, S)
        for first, end in itertools.pairwise([raw_tokens, *ends]):
            kv = feed(kv, first, end, bar)
            new = programs.adopt(new, kv, jnp.asarray(of), jnp.asarray(decoded[of] == end))
        del kv
        rows = np.arange(last.max())[None]
        at = np.minimum((batch.length - last - 1)[:, None] + rows, batch.tokens.shape[1] - 1)
        padded = np.pad(batch.tokens, ((0, 0), (0, 1)))
        tokens = np.take_along_axis(padded, at, 1)
        targets = np.take_along_axis(padded, at + 1, 1)
        end = Feed(engine, tokens, targets, rows < last[:, None])
        end(new, 0, int(last.max()), bar)
    sums = [a + b for a, b in zip(feed.sums(), end.sums(), strict=True)]
    counted = int(decoded.sum() + last.sum())
    size = engine.state_bytes(*batch.tokens.shape)
    return Found(*end.rows(), *sums, counted, counted - raw_tokens * len(decoded), size)


def _prompt(engine, batch: Batch, last: np.ndarray, progress: bool) -> Found:
    """The last tokens of `batch`, `last` [B] of each, after the others as a dense prompt."""
    programs = engine.programs
    heads = [
        tuple(row[: n - k].tolist())
        for row, n, k in zip(batch.tokens, batch.length, last, strict=True)
    ]
    start, of = shared.distinct(heads)
    begun = prompts.begin(engine, start, int(last.max()))
    rows, first = np.arange(last.max())[None], batch.length - last
    at = np.minimum(first[:, None] + rows, batch.tokens.shape[1] - 1)
    tokens = np.take_along_axis(batch.tokens, at, 1)
    opening = programs.judge(begun.logits[jnp.asarray(of)], jnp.asarray(tokens[:, 0]))
    logprob, hit = jax.tree.map(np.asarray, opening)
    feed = Feed(engine, tokens, _next(tokens), rows < last[:, None] - 1)
    steps, kv = int(last.max()) - 1, begun.kv
    logprobs = logprob[:, None]
    correct = hit[:, None]
    sums = tuple(np.zeros(len(kv.layers)) for _ in range(3))
    if steps:
        S = bucket(int(begun.fed.length.max()))
        if len(of) > len(start.length):
            kv = kv.select(of)
        with progress_bar(progress, steps, "score") as bar:
            done, free = 0, S - int(begun.fed.length.max())
            while done < steps:
                if not free:
                    grown = next_bucket(S)
                    layers = list(kv.layers)
                    del kv
                    kv = programs.grow_each(layers, grown, prompts.room(engine, steps - done))
                    free, S = grown - S, grown
                n = min(free, steps - done)
                kv = feed(kv, done, done + n, bar)
                done, free = done + n, free - n
        later = feed.rows()
        logprobs = np.concatenate([logprobs, later[0]], 1)
        correct = np.concatenate([correct, later[1]], 1)
        sums = feed.sums()
    each = len(of) / len(kv.lengths)
    content, other = kv.bytes
    counted = int((last - 1).sum())
    size = each * content, each * other
    return Found(logprobs, correct, *sums, counted, counted, size)
