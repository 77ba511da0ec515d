"""Streams of queries, keys and values driven through one layer's decode step, shared by all tests of a process."""

from __future__ import annotations

from alisa_jax.testing import streams
from alisa_jax.testing.streams import BUCKETS, CODEC, PADDED, STARTS, B, H, K, N, Run, Stream, T, stream

__all__ = [
    "BUCKETS",
    "CODEC",
    "PADDED",
    "QUICK",
    "STARTS",
    "STREAM",
    "B",
    "H",
    "K",
    "N",
    "Run",
    "Stream",
    "T",
    "stream",
]

DRIVER = streams.Driver()  # the tests of all policies share its stream, so that they share compiled programs too
STREAM, QUICK, traces = DRIVER.tokens, dict(streams.QUICK), DRIVER.traces
step, run, shared_run = DRIVER.step, DRIVER.run, DRIVER.shared_run
