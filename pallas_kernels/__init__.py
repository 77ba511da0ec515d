"""Attention kernels that are useful on their own: nothing of the library around is imported."""
