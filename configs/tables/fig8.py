"""Quality against KV sparsity: dense, local, strided, SWA and SWA with INT8 (the paper's Figure 8).

    python -m eval.reproduce --only=fig8 --quick      13 cells, 3.5 minutes on 2 CPU cores
    python -m eval.reproduce --only=fig8 --full       27 cells; stories260K took 2 min 48 s

Expected on the bundled model: dense 11.90, SWA 15.58 and local 14.95 at 80 %; the paper's collapse of local attention does
not appear on a model of this size. A real checkpoint goes by `--model` and `--text`, and `--task` adds the accuracy panels.
`episodes` are those of the task that the bundled model is trained for; other models get the text alone.
"""

SAMPLE = dict(context_tokens=1024, windows=8, episode_lengths=(256, 512, 1024), episodes=3, episodes_for="bundled")

QUICK = dict(
    SAMPLE,
    sparsities={
        "local": (0.4, 0.8, 0.9),
        "strided": (0.4, 0.8, 0.9),
        "swa": (0.0, 0.4, 0.8, 0.9),
        "swa+int8": (0.4, 0.8),
    },
    task_items=100,
    shots=4,
)

FULL = dict(
    SAMPLE,
    sparsities={
        "local": (0.2, 0.4, 0.6, 0.8, 0.9, 0.95),
        "strided": (0.2, 0.4, 0.6, 0.8, 0.9, 0.95),
        "swa": (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95),
        "swa+int8": (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95),
    },
    task_items=None,  # all
    shots=4,
)
