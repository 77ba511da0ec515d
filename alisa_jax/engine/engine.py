"""`Engine`: a model, a policy, a codec and a route; `generate` and `score`.

Everything is resident on the device here. Python is entered once per chunk of steps and at the
borders of context buckets, where the states grow by one layer at a time.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.calibration import Calibration
from alisa_jax.engine import finite, generate, prompts, shared, step, stops
from alisa_jax.engine.batch import Batch
from alisa_jax.engine.generate import Generated
from alisa_jax.engine.layers import assemble
from alisa_jax.engine.progress import progress_bar
from alisa_jax.engine.sampling import Sampling, batch_keys, next_token
from alisa_jax.kv.buckets import bucket, stages
from alisa_jax.kv.state import bytes_of

PROTOCOLS = ("decode", "prefill_mask", "prompt")


@dataclass(frozen=True)
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


class Engine:
    """Runs `model` with its KV cache kept under `policy`, stored by `codec`, read by `route`.

    model: as returned by `alisa_jax.load`. policy, codec: specs such as "swa(kv_sparsity=0.8)" and
    "raw", or the objects. route: "working_set", "indexed", "masked", or "auto" for the first that
    the policy serves. attention_impl: "xla", "pallas" (the kernels of `pallas_kernels`, which need
    a GPU), "interpret" (the same kernels interpreted, for tests), or "auto" for kernels where they
    run and XLA elsewhere; `attention_choice` says which, and why. calibration: statistics of the
    model (`eval.calibrate`) for the methods that need them, or the path of their file; None:
    `calibration.json` in the folder that the model was read from, if there is one. Raises
    ValueError or `spec.SpecError`, in one sentence, for what does not go together.
    """

    def __init__(
        self,
        model,
        policy="dense",
        codec="raw",
        route: str = "auto",
        attention_impl: str = "auto",
        calibration: Calibration | str | os.PathLike | None = None,
    ):
        self.model, decoder = model, model.decoder
        if calibration is None:
            calibration = model.calibration()
        elif not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        dtype = jax.tree.leaves(model.params)[0].dtype
        self.policy, self.codec, self.layers, self.attention_choice = assemble(
            decoder, policy, codec, dtype, route, attention_impl, calibration
        )
        self.compiles = 0
        self._prefill = self._jit(
            functools.partial(step.prefill, decoder, self.layers), static_argnums=3
        )
        self._filter_prompt = self._jit(
            functools.partial(step.filter_prompt, decoder, self.policy, self.attention_choice.impl),
            static_argnums=3,
        )
        self._judge = self._jit(step.judge)
        self._next_token = self._jit(next_token)
        self._generate = self._jit(
            functools.partial(step.generate_chunk, decoder), donate_argnums=1
        )
        self._score = self._jit(functools.partial(step.score_chunk, decoder), donate_argnums=1)
        self._masked = self._jit(functools.partial(step.score_masked, decoder, self.layers))
        self._grow = self._jit(step.grow, static_argnums=(1, 2))
        self._freeze = self._jit(step.freeze, static_argnums=1)
        self._adopt = self._jit(step.adopt, donate_argnums=0)

    def _jit(self, function, **options):
        """`jax.jit` that counts how often the function is traced."""

        def counted(*args):
            self.compiles += 1
            return function(*args)

        return jax.jit(counted, **options)

    @property
    def implementation(self) -> str:
        """The routes that run and what computes them, for example "xla:working_set"."""
        return f"{self.attention_choice.impl}:" + "+".join(
            sorted({layer.route for layer in self.layers})
        )

    @property
    def implementation_reason(self) -> str:
        """Why attention is computed by what `implementation` names."""
        return self.attention_choice.reason

    def validate(self, tokens: int, prompt_tokens: int = 0) -> None:
        """Raise ValueError unless `tokens` tokens, `prompt_tokens` of a prompt, can be served."""
        limit = self.model.decoder.config.max_positions
        endless = all(layer.policy.endless for layer in self.layers)
        longest = prompt_tokens if endless else max(tokens, prompt_tokens)
        if longest > limit:
            raise ValueError(f"the model's context is {limit} tokens; got {longest}")
        for layer in self.layers:
            layer.policy.validate(tokens)

    def batch(self, sequences) -> Batch:
        """A batch of token ids or texts. Raises ValueError for ids that the model does not have."""
        if isinstance(sequences, str):
            raise ValueError(f"give a list of sequences; got one text, {sequences!r:.60}")
        if not isinstance(sequences, Batch):
            sequences = Batch.from_lists(
                [self.model.encode(s) if isinstance(s, str) else s for s in sequences]
            )
        V = self.model.decoder.config.vocab_size
        wrong = (sequences.tokens < 0) | (sequences.tokens >= V)
        if wrong.any():
            i, t = np.argwhere(wrong)[0].tolist()
            raise ValueError(
                f"token ids must be in [0, {V}); sequence {i} has {sequences.tokens[i, t]} at "
                f"position {t}"
            )
        return sequences

    def check_calibration(self, length: np.ndarray) -> None:
        """Raise ValueError where a sequence, of `length` [B] tokens, cannot calibrate the codec."""
        needed = self.codec.frozen_after
        if length.min() < needed:
            raise ValueError(
                f"the codec takes its range from the first {needed} tokens of each sequence; "
                f"sequence {length.argmin()} has {length.min()}: give "
                f"calibration_tokens={length.min()} or fewer, or axis=token"
            )

    def validate_prompts(self, length: np.ndarray, new_tokens: int) -> None:
        """Raise ValueError unless prompts of `length` [B] tokens can go on for `new_tokens`."""
        fed = self.policy.feeds(length)
        self.validate(int(fed.max()) + new_tokens, int(length.max()))
        self.check_calibration(fed)

    def init(self, B: int, context_tokens: int, room: int | None = None):
        """Empty states for B sequences of up to `context_tokens` tokens; room: see `step.init`."""
        return step.init(self.model.decoder, self.layers, B, bucket(context_tokens), room)

    def state_bytes(self, B: int, context_tokens: int) -> tuple[int, int]:
        """Bytes of K and V, and of all else, that B sequences of `context_tokens` tokens keep."""
        return bytes_of(
            jax.eval_shape(
                lambda: tuple(step.freeze(s, s.context) for s in self.init(B, context_tokens))
            )
        )

    def generate(
        self,
        prompts: Batch | Sequence[Sequence[int] | str],
        max_new_tokens: int,
        eos_ids: Sequence[int] | None = None,
        progress: bool = False,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        key: jax.Array | None = None,
        stop: str | Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
    ) -> Generated:
        """Continue a ragged batch of prompts by up to `max_new_tokens` tokens each.

        A token of `eos_ids` or a stop string ends a sequence earlier. prompts: token ids as they
        are, or texts as `Model.encode` reads them. eos_ids: None for the model's own, () for none.
        sampling: None is greedy. seed, or key instead: a typed key [] for the run, or keys [B], one
        per prompt (see `sampling.sequence_keys`); the same key gives the same tokens. stop: texts
        that end a sequence where its new text, special tokens included, first holds one; the text
        is cut before it. on_text(i, piece): called with new text of prompt i as it becomes final;
        the pieces of a prompt joined are its completion. Raises ValueError, before anything runs,
        for an empty prompt, an id outside the vocabulary, prompt + new tokens beyond the model's
        context, and text asked of a model without a tokenizer.
        """
        batch = self.batch(prompts)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        self.validate_prompts(batch.length, max_new_tokens)
        stop = stops.check_stops(stop)
        if self.model.tokenizer is None and (stop or on_text is not None):
            raise ValueError(
                f"stop strings and on_text need text, and the model {self.model.name} has no "
                "tokenizer"
            )
        greedy = sampling is None or sampling.greedy
        drawn = None if greedy else (batch_keys(len(batch.length), seed, key), sampling.settings())
        eos = frozenset(int(t) for t in (self.model.eos_ids if eos_ids is None else eos_ids))
        return generate.run(self, batch, max_new_tokens, eos, drawn, stop, on_text, progress)

    def score(
        self,
        sequences,
        protocol: str = "decode",
        progress: bool = False,
        *,
        last: Sequence[int] | None = None,
    ) -> Scores:
        """Log-probability of every token but the first of each sequence, from an empty cache.

        protocol "decode" feeds token by token through the real decode path; "prefill_mask" does one
        pass per layer under the row-by-row selection mask. Both give the same numbers; they differ
        in what they exercise. "prompt" does what `generate` does: it reads all but the last tokens
        as a dense prompt, of which the policy keeps what it will, and decodes the last ones. last:
        one count per sequence; only the last `last[i]` entries of `logprobs` and `correct` are
        returned. Under "decode" and "prompt", sequences whose other tokens are equal, the choices
        of an item, share the work on these; attended, loaded and clipped are means over the tokens
        that were decoded, and the bytes of "prompt" are those of the cache at the end. Raises
        ValueError, before anything runs, for what `generate` refuses, a sequence of one token, a
        wrong `last`, and "prompt" without `last`.
        """
        start, compiles = time.perf_counter(), self.compiles
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}")
        batch = self.batch(sequences)
        if batch.length.min() < 2:
            raise ValueError(
                f"a sequence to score needs at least 2 tokens; number {batch.length.argmin()} has 1"
            )
        B, T = batch.tokens.shape
        if protocol == "prompt" and last is None:
            raise ValueError("protocol prompt needs last=, how many tokens come after each prompt")
        if protocol == "prompt":
            given = batch.length - shared.check(batch, last)
            fed = self.policy.feeds(given)
            self.validate(int((fed + batch.length - given).max()), int(given.max()))
            self.check_calibration(fed)
        else:
            self.validate(T)
            self.check_calibration(batch.length - 1)
        content, other = (None, None) if protocol == "prompt" else self.state_bytes(B, T)
        raw_tokens = self.codec.frozen_after
        decoded = batch.length - 1
        wanted = batch.length - 1
        kind, reason = self.implementation, self.implementation_reason
        common = None
        if last is not None:
            wanted = shared.check(batch, last)
            common = shared.contexts(batch, wanted, raw_tokens) if protocol == "decode" else None
        if protocol == "prompt":
            *out, content, other = prompts.score(self, batch, wanted, progress)
            decoded, counted = wanted, int((wanted - 1).sum())
            coded = counted
        elif common is not None:
            out = shared.score(self, batch, wanted, *common, progress)
            decoded, counted = wanted, int(common[0].length.sum() + wanted.sum())
            coded = counted - raw_tokens * len(common[0].length)
        else:
            targets = np.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
            valid = np.arange(T)[None] < decoded[:, None]
            out = (self._score_decode if protocol == "decode" else self._score_masked)(
                batch.tokens, targets, valid, progress
            )
            counted, coded = int(valid.sum()), int(valid[:, raw_tokens:].sum())
        if protocol == "prefill_mask":
            kind, reason = "xla:masked", "prefill_mask is the reference, which XLA computes"
        logprobs, correct, attended, loads, clipped = out
        c = self.model.decoder.config
        ends = list(zip(decoded - wanted, decoded, strict=True))
        rows = [row[a:b] for row, (a, b) in zip(logprobs, ends, strict=True)]
        finite.check(rows, self.model, finite.SCORED, batch.length - wanted)
        return Scores(
            rows,
            [row[a:b] for row, (a, b) in zip(correct, ends, strict=True)],
            attended / max(1, counted),
            loads / max(1, counted),
            clipped / max(1, coded * 2 * c.n_kv_heads * c.head_dim),
            content / (B * bucket(T)),
            other / (B * bucket(T)),
            self.compiles - compiles,
            time.perf_counter() - start,
            kind,
            reason,
            counted,
        )

    def _score_decode(self, tokens, targets, valid, progress):
        B, T = tokens.shape
        raw_tokens = self.codec.frozen_after
        appends = any(layer.policy.appends for layer in self.layers)
        sizes = [S for S in stages(T) if S > raw_tokens][-1 if appends else 0 :]
        kv, feed = self.init(B, raw_tokens or sizes[0]), shared.Feed(self, tokens, targets, valid)
        with progress_bar(progress, T - 1, "score") as bar:
            if raw_tokens:
                kv = feed(kv, 0, raw_tokens, bar)
                kv = tuple(self._freeze(state, sizes[0]) for state in kv)
            made = raw_tokens
            for S in sizes:
                if made > raw_tokens:
                    layers = list(kv)
                    del kv  # as in `generate.run`
                    kv = self._grow_each(layers, S, T - made)
                end = min(S, T - 1)
                kv, made = feed(kv, made, end, bar), end
        return *feed.rows(), *feed.sums()

    def _score_masked(self, tokens, targets, valid, progress):
        del progress  # one program, one pass
        T = bucket(tokens.shape[1])
        padded = [
            jnp.asarray(np.pad(x, ((0, 0), (0, T - x.shape[1])))) for x in (tokens, targets, valid)
        ]
        found = jax.tree.map(np.asarray, self._masked(self.model.params, *padded))
        logprobs, correct, attended, clipped = found
        return logprobs, correct, attended, np.full(attended.shape, np.nan), clipped

    def _grow_each(self, layers: list, S: int, tokens: int):
        """Grow each of `layers` in place to the bucket S, with `tokens` more to come."""
        room = prompts.room(self, tokens)
        for i in range(len(layers)):
            layers[i] = self._grow(layers[i], S, room)
        return tuple(layers)
