"""Where the new tokens of a placed run come from: the model (`Drawn`), or a text (`Forced`)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.engine import step
from alisa_jax.engine.sampling import Draw, now

Columns = tuple[np.ndarray, ...]  # [B, n]


class Steps(NamedTuple):
    """What some decode steps gave."""

    columns: Columns
    token: jax.Array  # [B] int32: the newest
    kv: object
    waiting: object  # see `programs.waiting`


class Drawn:
    """Tokens that the model chooses; columns are tokens, margins and log-probabilities.

    eos: stop tokens [E]. draw: before the first new token; None: greedy.
    """

    def __init__(self, eos: jax.Array, draw: Draw | None):
        self.eos = eos
        self.draw = draw

    def first(self, programs, logits: jax.Array, made: int) -> tuple[Columns, jax.Array]:
        """Of the logits [B, V] of one step: columns [B, 1], and the token [B] as an array."""
        found = programs.next_token(logits, now(self.draw, made), jnp.int32(0))
        return tuple(np.array(x)[:, None] for x in found), found[0]

    def steps(self, programs, params, kv, token, done, made: int, n: int) -> Steps:
        """Up to n steps in one program, behind `made` new tokens."""
        draw = now(self.draw, made)
        out, kv, waiting = programs.steps(params, kv, token, done, self.eos, jnp.int32(n), draw)
        taken = int(out.steps)
        # copies: what is kept keeps no device array alive
        found = tuple(np.array(x[:, :taken]) for x in (out.tokens, out.margins, out.logprobs))
        return Steps(found, out.token, kv, waiting)

    def streamed(self, made: int, clipped: list, shares: list | None = None) -> None:
        """A step went layer by layer, and clipped so many elements [L][B].

        shares [L][B]: of the context that was attended; None: all.
        """


class Forced:
    """Tokens of a text; columns are log-probabilities and hits.

    tokens [B, T] int32; valid [B, T] bool: what is counted, in `attended` and `clipped`, sums [L].
    """

    def __init__(self, tokens: np.ndarray, valid: np.ndarray, layers: int):
        room = ((0, 0), (1, step.CHUNK_STEPS))  # [:, i] is token i - 1
        self.tokens = jnp.asarray(np.pad(tokens, room).astype(np.int32))
        self.valid = np.pad(valid, room)
        self.attended = np.zeros(layers)
        self.clipped = np.zeros(layers)

    def first(self, programs, logits: jax.Array, made: int) -> tuple[Columns, jax.Array]:
        """As `Drawn.first`."""
        token = self.tokens[:, made + 1]
        return tuple(np.array(x)[:, None] for x in programs.judge(logits, token)), token

    def steps(self, programs, params, kv, token, done, made: int, n: int) -> Steps:
        """As `Drawn.steps`; the sequences that are done go on."""
        del token, done
        fed = slice(made, made + step.CHUNK_STEPS)
        told = slice(made + 1, made + 1 + step.CHUNK_STEPS)
        given = self.tokens[:, fed], self.tokens[:, told], jnp.asarray(self.valid[:, told])
        out, kv, waiting = programs.score(params, kv, *given, jnp.int32(n))
        taken = int(out.steps)
        self.attended += np.asarray(out.attended)
        self.clipped += np.asarray(out.clipped)
        found = tuple(np.array(x[:, :taken]) for x in (out.logprobs, out.correct))
        return Steps(found, self.tokens[:, made + taken], kv, waiting)

    def streamed(self, made: int, clipped: list, shares: list | None = None) -> None:
        """As `Drawn.streamed`."""
        valid = self.valid[:, made + 1]
        shares = [np.ones(len(valid))] * len(clipped) if shares is None else shares
        self.attended += np.array([np.asarray(share)[valid].sum() for share in shares])
        self.clipped += np.array([np.asarray(some)[valid].sum() for some in clipped])
