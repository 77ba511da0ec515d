"""The paper's Figure 4 on the bundled model: rank correlation of accumulated attention scores with dense.

    python -m eval.reproduce --only=fig4

Expected time: Figures 3, 4, 5 and 10 share one sample and their records. All four took 38 s together, compilation included,
on 2 CPU cores that other work shared (39 s of core time). FULL has eight times as many windows.

Expected: rho by vocabulary id 0.979 for local, 0.775 for strided, 0.960 for SWA; by position 0.898, 0.251, 0.832. The
paper's 0.008, 0.003 and 0.973 separate local from SWA; none of the three readings does so here.
"""

QUICK = dict(
    context_tokens=384,
    windows=8,
    skip_tokens=128,
    kv_sparsity=0.8,  # the paper does not state it
)
FULL = QUICK | dict(windows=64)
