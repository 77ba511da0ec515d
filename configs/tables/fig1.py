"""Figure 1: seconds and memory of dense inference by placement of the KV cache, modelled for the V100 and measured here.

    python -m eval.reproduce --only=fig1

47 seconds of core time were measured on 2 CPU cores that other work shared, nearly all of it compiling. Modelled
seconds are within 12 % of the paper's and W2 on the GPU only is out of memory, as there. QUICK measures W1, and W2
where it is out of memory.
"""

QUICK = dict(
    batch=8,
    prompt_tokens=64,
    new_tokens=dict(W1=32, W2=64),
    measured=(("W1", "cpu_only"), ("W1", "half_half"), ("W1", "gpu_only"), ("W2", "gpu_only")),
    repeats=1,
)
FULL = dict(
    batch=64,
    prompt_tokens=128,
    new_tokens=dict(W1=256, W2=512),
    measured=tuple((name, where) for name in ("W1", "W2") for where in ("cpu_only", "half_half", "gpu_only")),
    repeats=3,
)
