"""The engine's sides of `eval.bench`: the programs that `Engine.generate` and `Engine.score` call, on drawn caches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax import Engine, attention, policies
from alisa_jax.kv.buckets import bucket, prompt_bucket
from alisa_jax.kv.cache import KVState
from eval.script import inputs
from eval.speed import cells, models, traces
from eval.speed.cells import Cell, System
from eval.text import windows


def model(name: str, context: int, seed: int):
    """The model of a cell in float32: random weights for as many positions as `context` needs, or a checkpoint."""
    config = cells.shape(name, context)
    if not name.startswith("random:"):
        import alisa_jax

        return inputs.model(lambda folder: alisa_jax.load(folder, dtype="float32"), name)
    return models.random_weights(config, "float32", seed, name)


def trace(name: str, cell: Cell, start: int, text: str) -> traces.Trace:
    """What SWA selects in `cell` when the model `name` reads a text: prompts of `start` tokens, then up to the context."""
    reader = models.stretched(inputs.model(inputs.load, name), cell.context)
    sequences = traces.cut(windows.read(text), reader, cell.context, cell.batch)
    return traces.record(reader, policies.parse(cells.SWA), sequences, start)


def engine(model, system: System, trace: traces.Trace | None, impl: str = "auto") -> Engine:
    """An engine of one row; SWA attends what `trace` says, where there is one."""
    if system.policy != cells.SWA or trace is None:
        policy = system.policy
    else:
        policy = traces.policy(system.policy, trace, model.decoder.config.n_layers)
    return inputs.engine(inputs.make_engine, model, policy, system.codec, impl)


class Decoding:
    """Greedy decoding of B sequences from caches that are filled layer by layer."""

    def __init__(self, engine: Engine, cell: Cell, start: int):
        self.engine, self.cell, self.start = engine, cell, start
        self.kv = KVState(())
        self._filled = {}
        B = cell.batch
        self.token = jnp.zeros(B, jnp.int32)
        self._rest = jnp.zeros(B, jnp.bool_), jnp.asarray([-1], jnp.int32), jnp.int32(cell.steps)

    def fill(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Give the next layer the keys and values of `start` tokens; its policy is seeded by what the queries attend."""
        spec, B, S = self.engine.layers[layer], self.cell.batch, self.cell.context
        if spec not in self._filled:

            def prefill(q, k, v, length):
                (empty,) = self.engine.init(B, S).layers[layer]
                return attention.prefill(empty, q, k, v, length)[1]

            self._filled[spec] = jax.jit(prefill)
        length = jnp.full((B,), self.start, jnp.int32)
        state = jax.block_until_ready(self._filled[spec](q, k, v, length))
        self.kv = KVState((*self.kv.layers, (state,)))

    def advance(self) -> np.ndarray:
        """The tokens [B, steps] of one round."""
        done, eos, n = self._rest
        kv, self.kv = self.kv, None
        out, self.kv = self.engine.programs.generate(self.engine.model.params, kv, self.token, done, eos, n, None)
        jax.block_until_ready((out, self.kv))
        self.token = out.token
        return np.asarray(out.tokens)[:, : self.cell.steps]

    @property
    def compiles(self) -> int:
        return self.engine.compiles

    def values(self) -> dict:
        """What its record says beside times."""
        content, stats = self.kv.bytes
        return {
            "kv_bytes": content,
            "stats_bytes": stats,
            "bucket_tokens": bucket(self.cell.context),
            **ran(self.engine),
        }


class Prefilling:
    """B prompts that are read again and again, padded as the engine pads them."""

    def __init__(self, engine: Engine, tokens: np.ndarray):
        self.engine, (B, T) = engine, tokens.shape
        padded = np.pad(tokens, ((0, 0), (0, prompt_bucket(T) - T)))
        self._prompts = jnp.asarray(padded), jnp.full((B,), T, jnp.int32)
        self._bytes = 0, 0

    def advance(self) -> np.ndarray:
        """The greedy tokens [B, 1] that follow the prompts."""
        logits, kv = jax.block_until_ready(self.engine.programs.prefill(self.engine.model.params, *self._prompts, 0))
        self._bytes = kv.bytes
        return np.asarray(jnp.argmax(logits, axis=-1))[:, None]

    @property
    def compiles(self) -> int:
        return self.engine.compiles

    def values(self) -> dict:
        """What its record says beside times."""
        content, stats = self._bytes
        return {
            "kv_bytes": content,
            "stats_bytes": stats,
            "bucket_tokens": self._prompts[0].shape[1],
            **ran(self.engine),
        }


class Scoring:
    """Windows of a text, a group of them at a time."""

    def __init__(self, engine: Engine, protocol: str):
        self.engine, self.protocol, self._ran = engine, protocol, {}

    def score(self, sequences: list[list[int]]) -> float:
        """Nats of all tokens of the sequences but their first."""
        found = self.engine.score(sequences, self.protocol)
        self._ran = {name: getattr(found, name) for name in ("implementation", "implementation_reason")}
        return -sum(float(np.sum(row, dtype=np.float64)) for row in found.logprobs)

    @property
    def compiles(self) -> int:
        return self.engine.compiles

    def values(self) -> dict:
        """What its record says beside times."""
        return self._ran


def ran(engine: Engine) -> dict:
    """What attended, and why that."""
    return {"implementation": engine.implementation, "implementation_reason": engine.implementation_reason}
