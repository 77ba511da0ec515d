"""The paper's Figure 11 on the device at hand: one attention module, a single query per sequence, split by operation.

    python -m eval.reproduce --only=fig11

QUICK takes 28 seconds of processor time, nearly all of it compiling. FULL has 12 cells and took 2 min 56 s on 2 cores.
On a CPU the shares differ from the paper's: softmax is little beside the reads of K and V, gathering costs more than it
saves at low sparsity, and our whole step takes about as long as dense at 20 % and half as long at 80 % (0.98, 0.45).
"""

QUICK = dict(
    shapes=("OPT-6.7B",),  # of eval/paper/alisa_fig11.json, where the length and the paper's batch stand too
    batch=8,
    sparsities=(0.2, 0.8),
    repeats=15,  # timed steps, and timed calls of each operation
    layer=2,  # of the model whose queries and keys stand in
)
FULL = QUICK | dict(shapes=("OPT-6.7B", "OPT-30B"), batch=64, sparsities=(0.2, 0.4, 0.6, 0.8, 0.9))
