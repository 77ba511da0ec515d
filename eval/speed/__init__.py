"""Timed runs: cells, systems and models, our side and the peers', limits, growth, traces."""
