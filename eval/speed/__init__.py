"""Timed runs: cells and systems, our side and the peers', limits, contexts, traces."""
