"""Attention kernels that are useful on their own: imports jax and nothing of the library around
them.
"""
