"""Pythia-2.8B (arXiv 2304.01373, table 1).

32 layers of width 2,560, 32 heads of 80, vocabulary 50,304,
context 2,048, 20 channels of each head rotated.

    parameters            2,775,208,960
    weights, 16 bits      5.17 GiB
    KV per token, 16 bits 327,680 bytes
    KV of a full context  0.625 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:pythia_2.8b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["pythia_2.8b"]
