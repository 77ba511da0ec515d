"""`Engine`: a model, a policy, a codec and a placement; `generate` and `score`.

A cache that is resident grows at the borders of context buckets, by one layer at a time
(`resident.py`); any other is moved as its controller plans (`offload/`). Python is entered once per
chunk of steps, and where something grows or moves.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax import placement as placements
from alisa_jax.calibration import Calibration
from alisa_jax.engine import generate, lanes, scoring, step, stops
from alisa_jax.engine.batch import Batch
from alisa_jax.engine.generate import Generated
from alisa_jax.engine.layers import assemble
from alisa_jax.engine.offload.placement import Placement
from alisa_jax.engine.programs import Programs
from alisa_jax.engine.resident import ResidentRun
from alisa_jax.engine.sampling import Draw, Sampling, batch_keys
from alisa_jax.engine.scoring import Scores
from alisa_jax.kv.buckets import bucket, prompt_bucket
from alisa_jax.kv.cache import KVState
from alisa_jax.kv.state import tree_bytes


class Engine:
    """Runs `model` with its KV cache kept under `policy`, stored by `codec`, placed by `placement`.

        Engine(model, "swa(kv_sparsity=0.8)", "int8(axis=token)", "alisa", device_kv_bytes="0.5x")

    model: as returned by `alisa_jax.load`. policy, codec: specs such as "swa(kv_sparsity=0.8)" and
    "raw", or the objects. placement: a controller, as a spec such as "alisa(traffic=paper)" or the
    object. device_kv_bytes, host_kv_bytes: budgets for all that the cache keeps on each side, as
    numbers or as in "2GB", "512MiB" and "0.33x", a share of the dense K and V of a call in the type
    of the weights. A resident cache without a budget grows with the context; one with a budget, and
    any other, has its size from the first step on. route: "working_set", "indexed", "masked", or
    "auto" for the first that the policy serves. attention_impl: "xla", "pallas" (the kernels of
    `pallas_kernels`, which need a GPU), "interpret" (the same kernels interpreted, for tests), or
    "auto" for kernels where they run and XLA elsewhere; `attention_choice` says which, and why.
    calibration: statistics of the model (`eval.calibrate`) for the methods that need them, or the
    path of their file; None: `calibration.json` in the folder that the model was read from, if
    there is one. chunk_tokens: prompts are read so many tokens at a time, which bounds the work of
    one program; None reads them whole. While prompts are read in chunks, dense keys and values of
    all layers are held (`state_bytes` counts them); a placement reads prompts whole. `placement` is
    None where the cache grows. Raises ValueError or `spec.SpecError`, in one sentence, for what
    does not go together, RuntimeError where the machine cannot offload.
    """

    def __init__(
        self,
        model,
        policy="dense",
        codec="raw",
        placement="resident",
        device_kv_bytes: float | str = math.inf,
        host_kv_bytes: float | str = math.inf,
        *,
        route: str = "auto",
        attention_impl: str = "auto",
        calibration: Calibration | str | os.PathLike | None = None,
        chunk_tokens: int | None = None,
    ):
        whole = isinstance(chunk_tokens, int) and not isinstance(chunk_tokens, bool)
        if chunk_tokens is not None and not (whole and chunk_tokens >= 1):
            raise ValueError(
                "chunk_tokens must be a whole number of at least 1, or None for whole prompts; got "
                f"{chunk_tokens!r}"
            )
        self.chunk_tokens = chunk_tokens
        self.model, decoder = model, model.decoder
        if calibration is None:
            calibration = model.calibration()
        elif not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        self.dtype = jax.tree.leaves(model.params)[0].dtype
        self.policy, self.codec, self.layers, self.attention_choice = assemble(
            decoder, policy, codec, self.dtype, route, attention_impl, calibration
        )
        self.programs = Programs(decoder, self.policy, self.layers, self.attention_choice.impl)
        self.placement = self._placed(placement, device_kv_bytes, host_kv_bytes, None)

    def under(
        self,
        placement,
        device_kv_bytes: float | str = math.inf,
        host_kv_bytes: float | str = math.inf,
    ) -> Engine:
        """The same engine, with what it has compiled, under another placement and other budgets."""
        other = copy.copy(self)
        programs = None if self.placement is None else self.placement.programs
        other.placement = other._placed(placement, device_kv_bytes, host_kv_bytes, programs)
        return other

    def _placed(self, placement, device_kv_bytes, host_kv_bytes, programs) -> Placement | None:
        if isinstance(placement, str):
            placement = placements.parse(placement)
        budgets = device_kv_bytes, host_kv_bytes
        unlimited = all(value in (math.inf, "inf") for value in budgets)
        if isinstance(placement, placements.Resident) and unlimited:
            return None
        return Placement(self, placement, *budgets, programs)

    @property
    def compiles(self) -> int:
        """Programs that were traced so far."""
        return self.programs.compiles

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

    def check_generate(self, prompts, max_new_tokens: int) -> Batch:
        """The batch. Raises ValueError where `generate` would, before anything runs."""
        batch = self.batch(prompts)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        self.validate_prompts(batch.length, max_new_tokens)
        if self.placement is not None:
            self.placement.check(self.policy.feeds(batch.length).tolist(), max_new_tokens)
        return batch

    def check_score(
        self, sequences, protocol: str = "decode", last: Sequence[int] | None = None
    ) -> Batch:
        """The batch. Raises ValueError where `score` would, before anything runs."""
        return scoring.checked(self, sequences, protocol, last)[0]

    def init(self, B: int, context_tokens: int, room: int | None = None) -> KVState:
        """Empty states for B sequences of up to `context_tokens` tokens; room: see `step.init`."""
        return step.init(self.model.decoder, self.layers, B, bucket(context_tokens), room)

    def state_bytes(self, B: int, context_tokens: int) -> tuple[int, int]:
        """Bytes of K and V, and of all else, that B sequences of `context_tokens` tokens keep.

        With `chunk_tokens` those of the lanes of such prompts count beside the states.
        """
        S = bucket(context_tokens)

        def held():
            kv = self.init(B, context_tokens)
            return KVState(tuple((step.freeze(state, S),) for (state,) in kv.layers))

        content, other = jax.eval_shape(held).bytes
        if self.chunk_tokens is None:
            return content, other
        T = prompt_bucket(context_tokens)
        read = jax.eval_shape(
            lambda: lanes.begin(self.model.decoder, self.layers, B, S, T, self.dtype)
        )
        rows = sum(tree_bytes((lane.k, lane.v)) for lane in read.layers)
        return content + rows, other + tree_bytes(read) - rows

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
        batch = self.check_generate(prompts, max_new_tokens)
        stop = stops.check_stops(stop)
        if self.model.tokenizer is None and (stop or on_text is not None):
            raise ValueError(
                f"stop strings and on_text need text, and the model {self.model.name} has no "
                "tokenizer"
            )
        drawn = None
        if sampling is not None and not sampling.greedy:
            keys = batch_keys(len(batch.length), seed, key)
            drawn = Draw(keys, jnp.int32(0), sampling.settings())
        eos = frozenset(int(t) for t in (self.model.eos_ids if eos_ids is None else eos_ids))
        return generate.run(self, batch, max_new_tokens, eos, drawn, stop, on_text, progress)

    def runs(self, batch: Batch, new_tokens: int, eos: jax.Array, drawn: Draw | None) -> list:
        """What continues `batch`, run after run: `ResidentRun` or `PlacedRun`s, not begun.

        eos: stop tokens [E], -1 for none. drawn: before the first new token; None: greedy.
        """
        if self.placement is None:
            return [ResidentRun(self, batch, new_tokens, eos, drawn)]
        return self.placement.runs(batch, new_tokens, eos, drawn)

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
        that were decoded, and the bytes of "prompt" are those of the cache at the end.

        Under a placement "prefill_mask" is refused, contexts are not shared, loads are nan, and
        "decode" reads its first tokens, one or those that the codec calibrates on, as a dense
        prompt. Raises ValueError, before anything runs, for what `generate` refuses,
        a sequence of one token, a wrong `last`, and "prompt" without `last`.
        """
        return scoring.score(self, sequences, protocol, progress, last)
