"""Pythia-1.4B (arXiv 2304.01373, table 1).

24 layers of width 2,048, 16 heads of 128, vocabulary 50,304,
context 2,048, 32 channels of each head rotated.

    parameters            1,414,647,808
    weights, 16 bits      2.63 GiB
    KV per token, 16 bits 196,608 bytes
    KV of a full context  0.375 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:pythia_1.4b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["pythia_1.4b"]
