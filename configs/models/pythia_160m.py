"""Pythia-160M (arXiv 2304.01373, table 1).

12 layers of width 768, 12 heads of 64, vocabulary 50,304,
context 2,048, 16 channels of each head rotated.

    parameters            162,322,944
    weights, 16 bits      0.30 GiB
    KV per token, 16 bits 36,864 bytes
    KV of a full context  0.070 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:pythia_160m"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["pythia_160m"]
