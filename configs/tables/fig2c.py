"""The paper's Figure 2c on the device at hand: seconds and memory of decode steps with and without a KV cache.

    python -m eval.reproduce --only=fig2c

QUICK took 51 seconds on 2 CPU cores, much of it compiling and making weights. A step without a cache takes about twice
as long at step 127 as at step 0 (1.88 measured, 2.47 in the paper), as it runs 160 tokens in place of 64; with a cache 1.21
times as long, as in the paper. FULL has a larger batch; it has not been timed.
"""

QUICK = dict(
    model="random:opt_125m",  # where --model names no folder: time and bytes depend on the shape alone
    batch=1,
    prompt_tokens=32,  # the paper's jumps at steps 32 and 96 are those of lengths 64 and 128, if its prompt has 32
    new_tokens=128,
    buckets="all",  # context buckets that the steps meet, or "ends": the first and the last
    every=16,  # steps between two that are measured without a cache, beside those at the borders of buckets
    repeats=3,  # of a step without a cache
)
FULL = QUICK | dict(batch=8, every=8)
