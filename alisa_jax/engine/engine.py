"""`Engine`: a model, a policy, a codec and a route; `generate` and `score`.

Everything is resident on the device here. Python is entered once per chunk of steps and at the borders of context buckets,
where the states grow by one layer at a time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from alisa_jax import attention, policies
from alisa_jax.engine import step
from alisa_jax.engine.batch import Batch
from alisa_jax.kv import codec as codecs
from alisa_jax.kv.buckets import bucket, next_bucket
from alisa_jax.kv.state import tree_bytes

PROTOCOLS = ("decode", "prefill_mask")


@dataclass(frozen=True)
class Generated:
    """What `Engine.generate` returns; one entry per prompt."""

    tokens: list[list[int]]  # new tokens, up to and including the stop token
    texts: list[str] | None  # prompt and new tokens together as text; None for a model without a tokenizer
    margins: list[np.ndarray]  # best minus second best logit of each new token
    compiles: int  # programs traced during the call
    wall_s: float


@dataclass(frozen=True)
class Scores:
    """What `Engine.score` returns; one entry per sequence in `logprobs` and `correct`."""

    logprobs: list[np.ndarray]  # [len - 1] float32, nats of token t + 1 given tokens 0 .. t
    correct: list[np.ndarray]  # [len - 1] bool, the greedy token is the next token
    attended_frac: np.ndarray  # [L]: attended share of the context, the token itself included, mean over tokens
    loads_per_token: np.ndarray  # [L]: rows copied from the store into the working set (nan: not that protocol)
    kv_bytes_per_token: float  # resident K and V, all layers, per token of the context bucket
    stats_bytes_per_token: float  # resident statistics, positions and biases, likewise
    compiles: int
    wall_s: float
    implementation: str  # what ran


class Engine:
    """Runs `model` with the past of every layer kept under `policy`, stored by `codec`, read by `route`.

    model: as returned by `alisa_jax.load`. policy, codec: specs such as "swa(kv_sparsity=0.8)" and "raw", or the objects.
    route: "working_set", "indexed", "masked", or "auto" for the first that the policy serves. Raises ValueError or
    `spec.SpecError`, in one sentence, for what does not go together.
    """

    def __init__(self, model, policy="dense", codec="raw", route: str = "auto"):
        self.model = model
        self.policy = policies.parse(policy) if isinstance(policy, str) else policy
        chosen = codecs.parse(codec) if isinstance(codec, str) else codec
        dtype = jax.tree.leaves(model.params)[0].dtype
        self.codec = chosen.resolve(dtype)
        c = model.decoder.config
        if getattr(self.policy, "dense_layers", 0) > c.n_layers:
            raise ValueError(f"dense_layers must be at most {c.n_layers}; got {self.policy.dense_layers}")
        layers = [self.policy.for_layer(i) for i in range(c.n_layers)]
        self.layers = tuple(step.Layer(p, self.codec, p.routes[0] if route == "auto" else route) for p in layers)
        for layer in self.layers:
            attention.check(layer.policy, layer.codec, layer.route, 1, c.n_heads, c.n_kv_heads)
        self.compiles = 0
        decoder = model.decoder
        self._prefill = self._jit(functools.partial(step.prefill, decoder, self.layers))
        self._greedy = self._jit(functools.partial(step.greedy_chunk, decoder), donate_argnums=1)
        self._score = self._jit(functools.partial(step.score_chunk, decoder), donate_argnums=1)
        self._masked = self._jit(functools.partial(step.score_masked, decoder, self.layers))
        self._grow = self._jit(step.grow, static_argnums=1)

    def _jit(self, function, **options):
        """`jax.jit` that counts how often the function is traced."""

        def counted(*args):
            self.compiles += 1
            return function(*args)

        return jax.jit(counted, **options)

    @property
    def implementation(self) -> str:
        """The routes that run and what computes them, for example "xla:working_set"."""
        return "xla:" + "+".join(sorted({layer.route for layer in self.layers}))

    def validate(self, tokens: int) -> None:
        """Raise ValueError unless sequences of `tokens` tokens can be served."""
        limit = self.model.decoder.config.max_positions
        if tokens > limit:
            raise ValueError(f"the model's context is {limit} tokens; got {tokens}")
        for layer in self.layers:
            layer.policy.validate(tokens)

    def batch(self, sequences) -> Batch:
        """A batch of token ids, or of texts for a model with a tokenizer. Raises ValueError for ids the model lacks."""
        if isinstance(sequences, str):
            raise ValueError(f"give a list of sequences; got one text, {sequences!r:.60}")
        if not isinstance(sequences, Batch):
            sequences = Batch.from_lists([self.model.encode(s) if isinstance(s, str) else s for s in sequences])
        V = self.model.decoder.config.vocab_size
        wrong = (sequences.tokens < 0) | (sequences.tokens >= V)
        if wrong.any():
            i, t = (int(x) for x in np.argwhere(wrong)[0])
            raise ValueError(
                f"token ids must be in [0, {V}); sequence {i} has {sequences.tokens[i, t]} at position {t}"
            )
        return sequences

    def init(self, B: int, context_tokens: int):
        """Empty states for B sequences of up to `context_tokens` tokens."""
        return step.init(self.model.decoder, self.layers, B, bucket(context_tokens))

    def state_bytes(self, B: int, context_tokens: int) -> tuple[int, int]:
        """Bytes of K and V, and of all else, that B sequences of `context_tokens` tokens keep resident."""
        kv = jax.eval_shape(lambda: self.init(B, context_tokens))
        whole = sum(tree_bytes(state) for state in kv)
        homes = [h for state in kv for h in (state.ws, state.store) if h is not None]
        content = sum(tree_bytes((h.k, h.v)) for h in homes)
        return content, whole - content

    def generate(
        self,
        prompts: Batch | Sequence[Sequence[int] | str],
        max_new_tokens: int,
        eos_ids: Sequence[int] = (),
        progress: bool = False,
    ) -> Generated:
        """Greedy continuation of a ragged batch of prompts, up to `max_new_tokens` each or a token of `eos_ids`.

        prompts: token ids as they are, or texts as `Model.encode` reads them. Raises ValueError, before anything runs,
        for an empty prompt, an id outside the vocabulary, and prompt + new tokens beyond the model's context.
        """
        start, compiles = time.perf_counter(), self.compiles
        batch = self.batch(prompts)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        longest = int(batch.length.max())
        self.validate(longest + max_new_tokens)
        S = bucket(longest)
        eos = jnp.asarray(list(eos_ids) or [-1], jnp.int32)
        logits, kv = self._prefill(self.model.params, jnp.asarray(batch.padded(S)), jnp.asarray(batch.length))
        token, margin = step.pick(logits)
        done = step.is_stop(token, eos)
        columns, margins, made = [np.asarray(token)[:, None]], [np.asarray(margin)[:, None]], 1
        with _bar(progress, max_new_tokens, "generate") as bar:
            bar.update(1)
            while made < max_new_tokens and not bool(done.all()):
                room = S - (longest + made - 1)
                if room == 0:
                    S, layers = next_bucket(S), list(kv)
                    del kv  # `_grow_each` holds the only reference: an old layer is freed before the next one grows
                    kv = self._grow_each(layers, S)
                    room = S - (longest + made - 1)
                n = min(step.CHUNK_STEPS, room, max_new_tokens - made)
                out, kv = self._greedy(self.model.params, kv, token, done, eos, jnp.int32(n))
                token, done, taken = out.token, out.done, int(out.steps)
                columns.append(np.asarray(out.tokens)[:, :taken])
                margins.append(np.asarray(out.margins)[:, :taken])
                made += taken
                bar.update(taken)
        new, margin = np.concatenate(columns, axis=1), np.concatenate(margins, axis=1)
        ends = [_end(row, eos_ids) for row in new]
        tokens = [row[:end].tolist() for row, end in zip(new, ends, strict=True)]
        given = [row[:n].tolist() for row, n in zip(batch.tokens, batch.length, strict=True)]
        known = self.model.tokenizer is not None
        return Generated(
            tokens,
            [self.model.decode(a + b) for a, b in zip(given, tokens, strict=True)] if known else None,
            [row[:end] for row, end in zip(margin, ends, strict=True)],
            self.compiles - compiles,
            time.perf_counter() - start,
        )

    def score(self, sequences, protocol: str = "decode", progress: bool = False) -> Scores:
        """Log-probability of every token but the first of a ragged batch of sequences, from an empty cache.

        protocol "decode" feeds token by token through the real decode path; "prefill_mask" does one pass per layer under
        the row-by-row selection mask. Both give the same numbers; they differ in what they exercise.
        Raises ValueError, before anything runs, for what `generate` refuses and for a sequence of one token.
        """
        start, compiles = time.perf_counter(), self.compiles
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}")
        batch = self.batch(sequences)
        if batch.length.min() < 2:
            raise ValueError(f"a sequence to score needs at least 2 tokens; number {batch.length.argmin()} has 1")
        B, T = batch.tokens.shape
        self.validate(T)
        targets = np.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
        valid = np.arange(T)[None] < (batch.length - 1)[:, None]
        run = self._score_decode if protocol == "decode" else self._score_masked
        logprobs, correct, attended, loads = run(batch.tokens, targets, valid, progress)
        content, other = self.state_bytes(B, T)
        count = int(valid.sum())
        kind = self.implementation if protocol == "decode" else "xla:masked"
        return Scores(
            [row[: n - 1] for row, n in zip(logprobs, batch.length, strict=True)],
            [row[: n - 1] for row, n in zip(correct, batch.length, strict=True)],
            attended / count,
            loads / count,
            content / (B * bucket(T)),
            other / (B * bucket(T)),
            self.compiles - compiles,
            time.perf_counter() - start,
            kind,
        )

    def _score_decode(self, tokens, targets, valid, progress):
        B, T = tokens.shape
        kv, C = self.init(B, T), step.CHUNK_STEPS
        width = -(-(T - 1) // C) * C
        padded = [jnp.asarray(np.pad(x, ((0, 0), (0, max(0, width - T))))) for x in (tokens, targets, valid)]
        parts = []
        with _bar(progress, T - 1, "score") as bar:
            for first in range(0, T - 1, C):
                n = min(C, T - 1 - first)
                piece = [x[:, first : first + C] for x in padded]
                out, kv = self._score(self.model.params, kv, *piece, jnp.int32(n))
                parts.append(jax.tree.map(np.asarray, out))
                bar.update(n)
        logprobs, correct = (np.concatenate([getattr(p, f) for p in parts], 1) for f in ("logprobs", "correct"))
        return logprobs, correct, sum(p.attended for p in parts), sum(p.loads.astype(np.float64) for p in parts)

    def _score_masked(self, tokens, targets, valid, progress):
        del progress  # one program, one pass
        T = bucket(tokens.shape[1])
        padded = [jnp.asarray(np.pad(x, ((0, 0), (0, T - x.shape[1])))) for x in (tokens, targets, valid)]
        logprobs, correct, attended = (np.asarray(x) for x in self._masked(self.model.params, *padded))
        return logprobs, correct, attended, np.full(attended.shape, np.nan)

    def _grow_each(self, layers: list, S: int):
        """The states of all layers for the bucket S; `layers` is emptied on the way."""
        for i in range(len(layers)):
            layers[i] = self._grow(layers[i], S)
        return tuple(layers)


def _end(row: np.ndarray, eos_ids: Sequence[int]) -> int:
    stops = np.flatnonzero(np.isin(row, list(eos_ids)))
    return int(stops[0]) + 1 if len(stops) else len(row)


def _bar(progress: bool, total: int, label: str) -> tqdm:
    """A progress bar on stderr: only when wanted, and silent when stderr is not a terminal."""
    return tqdm(total=total, desc=label, unit="token", disable=None if progress else True, leave=False)
