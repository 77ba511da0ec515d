"""`KVState`: the cache of a whole model, and the verbs that users of a cache expect.

kv.lengths          tokens of each sequence
kv.bytes            bytes of K and V, and of all else
kv.select([2, 0])   sequences 2 and 0, in this order
kv.repeat(4)        every sequence four times, neighbours of one another (beams, samples)
kv.crop(100)        the first 100 tokens of every sequence, where the policy allows it
"""

from __future__ import annotations

from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.kv.state import LayerState, bias_of, tree_bytes

Layer = tuple[LayerState, ...]  # its parts: neighbouring sequences each; one where all are resident


@flax.struct.dataclass
class KVState:
    """The layers' states; a pytree, and an argument and a result of every program."""

    layers: tuple[Layer, ...]

    @property
    def lengths(self) -> jax.Array:
        """[B] int32: tokens that each sequence has seen."""
        return lengths(self.layers[0])

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of K and V, and of everything else; also of shapes (`jax.eval_shape`)."""
        parts = [part for layer in self.layers for part in layer]
        homes = [home for part in parts for home in (part.ws, part.store) if home is not None]
        content = sum(tree_bytes((home.k, home.v)) for home in homes)
        return content, tree_bytes(self) - content

    def select(self, rows: Sequence[int] | np.ndarray) -> KVState:
        """The sequences `rows` of this cache, in this order; one may be there more than once.

        Raises ValueError for a row that is not there, and where a layer is in several parts.
        """
        B = self._sequences("select")
        index = np.asarray(rows)
        if index.ndim != 1 or not index.size or index.dtype.kind not in "iu":
            raise ValueError(f"rows is a list of sequence numbers; got {rows!r:.60}")
        if (index < 0).any() or (index >= B).any():
            raise ValueError(f"rows must be in 0..{B - 1}; got {rows!r:.60}")
        index = jnp.asarray(index, jnp.int32)
        return _taken(self, index)

    def repeat(self, n: int) -> KVState:
        """Every sequence `n` times: those of sequence i are n * i .. n * i + n - 1."""
        if not _whole(n) or n < 1:
            raise ValueError(f"n must be a whole number of at least 1; got {n!r:.60}")
        return self.select(np.repeat(np.arange(self._sequences("repeat")), n))

    def crop(self, length: int) -> KVState:
        """The first `length` tokens of every sequence; shorter ones stay as they are.

        Tokens are those that were read: a prompt filter chose them by all of its prompt. Raises
        ValueError where tokens cannot be taken back: a policy that selects has forgotten what it
        would have kept, and a codec may have read the tokens that go.
        """
        self._sequences("crop")
        if not _whole(length) or length < 1:
            raise ValueError(
                f"length must be a whole number of tokens, at least 1; got {length!r:.60}"
            )
        for (part,) in self.layers:
            policy, codec = part.spec.policy, part.spec.codec
            if policy.selects:
                raise ValueError(
                    f"crop takes tokens back, and {policy} has chosen by them what it keeps: only "
                    "dense caches are cropped"
                )
            if not codec.crops:
                raise ValueError(
                    f"crop takes tokens back, and {codec} has dropped the raw form of the tokens "
                    "before its window"
                )
            if length < codec.frozen_after:
                raise ValueError(
                    f"crop keeps at least the {codec.frozen_after} tokens by which the codec "
                    f"encodes the others; got {length}"
                )
        return _cropped(self, jnp.int32(length))

    def _sequences(self, verb: str) -> int:
        """B. Raises ValueError where a layer is in several parts."""
        if any(len(layer) > 1 for layer in self.layers):
            raise ValueError(
                f"{verb} is of caches that are on the device whole; this one is placed"
            )
        return self.layers[0][0].length.shape[0]


def _whole(number) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def lengths(layer: Layer) -> jax.Array:
    """[B] int32: tokens that a layer has seen of each sequence."""
    return jnp.concatenate([part.length for part in layer])


@jax.jit
def _taken(kv: KVState, rows: jax.Array) -> KVState:
    return KVState(tuple((part.adopt(part, rows, None),) for (part,) in kv.layers))


@jax.jit
def _cropped(kv: KVState, length: jax.Array) -> KVState:
    def crop(part: LayerState) -> LayerState:
        ws = part.ws
        if ws is not None:
            pos = jnp.where(ws.pos < length, ws.pos, -1)
            ws = ws.replace(pos=pos, bias=bias_of(pos))
        return part.replace(ws=ws, length=jnp.minimum(part.length, length))

    return KVState(tuple((crop(part),) for (part,) in kv.layers))
