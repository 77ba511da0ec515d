"""Pythia-6.9B (arXiv 2304.01373, table 1).

32 layers of width 4,096, 32 heads of 128, vocabulary 50,432,
context 2,048, 32 channels of each head rotated.

    parameters            6,857,302,016
    weights, 16 bits      12.77 GiB
    KV per token, 16 bits 524,288 bytes
    KV of a full context  1.000 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:pythia_6.9b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["pythia_6.9b"]
