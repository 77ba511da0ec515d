"""Pythia-12B (arXiv 2304.01373, table 1).

36 layers of width 5,120, 40 heads of 128, vocabulary 50,688,
context 2,048, 32 channels of each head rotated.

    parameters            11,846,072,320
    weights, 16 bits      22.07 GiB
    KV per token, 16 bits 737,280 bytes
    KV of a full context  1.406 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:pythia_12b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["pythia_12b"]
