"""Context buckets: multiples of 32 that grow by 1.25."""

import math

import pytest

from alisa_jax.kv.buckets import bucket, next_bucket, prompt_bucket, stages


def test_a_bucket_is_the_smallest_that_holds_the_tokens():
    ladder = [32]
    while ladder[-1] < 20000:
        ladder.append(next_bucket(ladder[-1]))
    for tokens in range(1, 20001, 7):
        assert bucket(tokens) == min(size for size in ladder if size >= tokens)
    for size in ladder[:-1]:
        assert bucket(size) == size and bucket(size + 1) == next_bucket(size)


def test_buckets_are_multiples_of_32_and_grow_by_at_most_a_quarter_and_32():
    size = 32
    while size < 10**6:
        larger = next_bucket(size)
        assert larger % 32 == 0 and size + 32 <= larger < 1.25 * size + 32
        size = larger


@pytest.mark.parametrize("tokens", [100, 1000, 10_000, 100_000, 1_000_000])
def test_a_run_of_n_tokens_meets_few_buckets(tokens):
    count, size = 1, 32
    while size < tokens:
        size, count = next_bucket(size), count + 1
    # up to 128 tokens a bucket grows by 32, from there by at least 1.25
    assert count <= 4 + max(0, math.log(tokens / 128, 1.25)) + 1


@pytest.mark.parametrize("tokens", [0, -5])
def test_a_context_without_tokens_is_refused(tokens):
    with pytest.raises(ValueError, match=f"a context needs at least 1 token; got {tokens}"):
        bucket(tokens)


def test_a_prompt_is_padded_by_an_eighth_of_its_bucket_at_most():
    for tokens in range(1, 20001, 7):
        padded, size = prompt_bucket(tokens), bucket(tokens)
        assert tokens <= padded <= size and bucket(padded) == size and padded % 32 == 0
        assert padded - tokens < max(32, size / 8)
    assert [prompt_bucket(n) for n in (33, 128, 512, 1024, 2048, 4096)] == [64, 128, 512, 1024, 2048, 4096]


@pytest.mark.parametrize("tokens", [1, 600, 1023, 1024, 1025, 4097, 100_000])
def test_stages_are_rising_buckets_of_which_the_last_holds_all(tokens):
    sizes = stages(tokens)
    assert sizes[-1] == bucket(tokens) and sizes == sorted(set(sizes))
    assert len(sizes) == (3 if tokens >= 1024 else 1)
    assert all(bucket(size) == size and size * part >= tokens for size, part in zip(sizes[::-1], (1, 2, 4)))
