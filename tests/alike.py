"""'The same tokens': equal, or first different at a margin that rounding can turn."""

import numpy as np

MARGIN = 1e-4  # nats


def same_tokens(made, wanted, atol: float = 1e-4) -> int:
    """How many sequences of two `Generated` part at a margin below MARGIN; all others have to be equal.

    Up to there log-probabilities agree to `atol`.
    """
    parted = 0
    for i, (tokens, others) in enumerate(zip(made.tokens, wanted.tokens, strict=True)):
        n = next((j for j, (a, b) in enumerate(zip(tokens, others)) if a != b), min(len(tokens), len(others)))
        np.testing.assert_allclose(made.logprobs[i][:n], wanted.logprobs[i][:n], atol=atol)
        if tokens != others:
            margin = min(made.margins[i][n], wanted.margins[i][n]) if n < min(len(tokens), len(others)) else np.inf
            assert margin < MARGIN, f"sequence {i} parts at token {n}, whose margin is {margin}"
            parted += 1
    if parted:
        print(f"{parted} of {len(made.tokens)} sequences part at a margin below {MARGIN:g}")
    return parted
