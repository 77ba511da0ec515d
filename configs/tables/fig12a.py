"""Figure 12a: ALISA's phases, seconds and memory by KV sparsity, beside FlexGen, modelled.

    python -m eval.reproduce --only=fig12a

Nothing of it runs: 5 seconds of one core price about 30 runs of OPT-30B. p1 is modelled at 92 where the paper has 144,
because the GPU is full then; p2 is a third too early; seconds of the whole runs are within 3 %, memory at the marks is
not: the paper leaves room on the GPU while rows are on the CPU. No size is smaller than full, so QUICK is FULL.
"""

QUICK = dict()
FULL = dict()
