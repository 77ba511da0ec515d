"""LLaMA-33B (arXiv 2302.13971, table 2).

60 layers of width 6,656, 52 heads of 128, vocabulary 32,000,
context 2,048.

    parameters            32,528,943,616
    weights, 16 bits      60.59 GiB
    KV per token, 16 bits 1,597,440 bytes
    KV of a full context  3.047 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:llama_33b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["llama_33b"]
