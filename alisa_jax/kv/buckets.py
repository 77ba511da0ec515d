"""Context buckets: the sizes in tokens for which programs are compiled.

Sizes are multiples of 32 that grow by 1.25, so a run of n tokens meets O(log n) of them, and at
most a fifth of a large bucket is still empty when the run moves into it.

A prompt is read once, so its padding is finer: an eighth of the bucket at most (`prompt_bucket`).
"""

from __future__ import annotations

STEP_TOKENS = 32
GROWTH = 1.25


def next_bucket(size: int) -> int:
    """The bucket after `size` tokens: 1.25 times, rounded up to a multiple of 32, at
    least 32 more.
    """
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
    """Buckets of a run from nothing to `tokens` tokens, all of which is known before: of a quarter,
    a half and all of them.

    Attention reads the slots of a bucket, also those that are still empty. Below 1,024 tokens that
    is little beside the programs that would be compiled for it, and there is one.
    """
    return [bucket(-(-tokens // part)) for part in ((4, 2, 1) if tokens >= 1024 else (1,))]


def prompt_bucket(tokens: int) -> int:
    """To how many tokens a prompt of `tokens` is padded: to a power of two at most an eighth of its
    bucket, at least 32.

    Never more than the bucket, whose state the padded prompt leaves:
    `bucket(prompt_bucket(n)) == bucket(n)`.
    """
    size = bucket(tokens)
    grain = STEP_TOKENS
    while 16 * grain <= size:
        grain *= 2
    return min(size, -(-tokens // grain) * grain)
