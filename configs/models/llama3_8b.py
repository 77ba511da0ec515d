"""Llama-3-8B (arXiv 2407.21783, table 3).

32 layers of width 4,096, 32 heads of 128 over 8 kv heads, vocabulary 128,256,
context 8,192.

    parameters            8,030,261,248
    weights, 16 bits      14.96 GiB
    KV per token, 16 bits 131,072 bytes
    KV of a full context  1.000 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:llama3_8b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["llama3_8b"]
