"""The paper's Figure 10 on the bundled model: sparsity of attention under SWA, by step.

    python -m eval.reproduce --only=fig10

Expected time: Figures 3, 4, 5 and 10 share one sample and their records. All four took 38 s together, compilation included,
on 2 CPU cores that other work shared (39 s of core time). FULL has eight times as many windows.

Expected, over all steps, for SWA at 20, 40, 60, 80, 90 % and dense (93.5 %): of all entries 94.0, 94.6, 95.4, 96.6,
97.5; of the kept ones 92.5, 91.0, 88.7, 83.3, 75.7; in rows averaged over heads 91.8, 92.2, 92.9, 94.2, 95.5. Only the last,
beside dense by head, has the paper's order for OPT-6.7B: below dense up to 60 %, above it from 80 % on.
"""

QUICK = dict(
    context_tokens=384,
    windows=8,
    skip_tokens=128,
    sparsities=(0.2, 0.4, 0.6, 0.8, 0.9),
)
FULL = QUICK | dict(windows=64)
