"""The paper's Figure 3 on the bundled model: how sparse dense attention is, by step and by layer.

    python -m eval.reproduce --only=fig3

Expected time: Figures 3, 4, 5 and 10 share one sample and their records. All four took 38 s together, compilation included,
on 2 CPU cores that other work shared (39 s of core time). FULL has eight times as many windows.

Expected: 93.5 ± 0.1 % of dense attention counts as zero, 90 % at step 1 and 94.5 % at step 250; by layer 98.8, 92.7, 93.4
and 88.9 %: the first layer of this model is its sparsest, where OPT's is its densest (52 %).
"""

QUICK = dict(
    context_tokens=384,
    windows=8,
    skip_tokens=128,
)
FULL = QUICK | dict(windows=64)
