"""Context buckets: the sizes in tokens for which programs are compiled.

Sizes are multiples of 32 that grow by 1.25, so a run of n tokens meets O(log n) of them, and at
most a fifth of a large bucket is still empty when the run moves into it.

A prompt is read once, so its padding is finer: an eighth of the bucket at most (`prompt_bucket`).
"""

from __future__ import annotations

STEP_TOKENS = 32
GROWTH = 1.25


def next_bucket(size: int) -> int:
    """The bucket after `size` tokens: 1.25 times as many, a multiple of 32, at least 32 more."""
    return max(-(-int(size * GROWTH) // STEP_TOKENS) * STEP_TOKENS, size + STEP_TOKENS)


def bucket(tokens: int) -> int:
    """The smallest bucket that holds `tokens` tokens. Raises ValueError below 1."""
    if tokens < 1:
        raise ValueError(f"a context needs at least 1 token; got {tokens}")
    size = STEP_TOKENS
    while size < tokens:
        size = next_bucket(size)
    return size


def stages(tokens: int) -> list[int]:
    """Context sizes for scoring a text of known length: a quarter, a half, and all of it.

    Attention reads all slots of a bucket, empty ones too. Below 1,024 tokens that costs less than
    compiling more programs, and there is one bucket.
    """
    return [bucket(-(-tokens // part)) for part in ((4, 2, 1) if tokens >= 1024 else (1,))]


def prompt_bucket(tokens: int) -> int:
    """The number of tokens to which a prompt of `tokens` is padded.

    It is a multiple of a power of two that is at most an eighth of the bucket, and at least 32. It
    never exceeds the bucket, whose state the padded prompt leaves:
    `bucket(prompt_bucket(n)) == bucket(n)`.
    """
    size = bucket(tokens)
    grain = STEP_TOKENS
    while 16 * grain <= size:
        grain *= 2
    return min(size, -(-tokens // grain) * grain)
