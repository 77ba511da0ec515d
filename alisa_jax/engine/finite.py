"""A run whose numbers are not numbers ends with a sentence, and not with a token or a score."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

NEW, SCORED = "new token {token} of prompt {sequence}", "token {token} of sequence {sequence}"


def check(
    rows: Sequence[Sequence[float]], model, what: str, first: Sequence[int], sequence: int = 0
) -> None:
    """Raise FloatingPointError where a log-probability is NaN; see `sampling.next_token`.

    rows: of each sequence, those of the tokens from first[i] on. what: `NEW` or `SCORED`. sequence:
    the number of the first row.
    """
    for i, row in enumerate(rows):
        wrong = np.isnan(row)
        if wrong.any():
            at = what.format(token=first[i] + int(wrong.argmax()), sequence=sequence + i)
            raise FloatingPointError(f"the logits of {model.name} are NaN at {at}; {_hint(model)}")


def _hint(model) -> str:
    dtype = jax.tree.leaves(model.params)[0].dtype.name
    if dtype == "float32":
        return "in float32 that means damaged weights, or values beyond its range"
    return f"it computes in {dtype}: load it with dtype=float32"
