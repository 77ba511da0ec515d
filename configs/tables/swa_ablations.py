"""What each choice inside Sparse Window Attention is worth: one table and one figure on the bundled model.

    python -m eval.ablations --config=configs/tables/swa_ablations.py

Expected time: 6.5 minutes were measured on 2 CPU cores that other work shared (40 cells, 12 minutes of core time).

Each group changes one choice of swa(kv_sparsity=...) and keeps the others: the rows of the window, or a decay instead;
one selection for all heads or one for each kv head; how much of the budget goes to the most recent tokens; how many
first layers attend densely; how often all tokens are attended, so that tokens can return; and how K and V are stored. The
empty variant is the default and stands in every group. The differences are paired with it at the same sparsity. A variant
may attend more tokens than the default does (`dense_layers`, `refresh_every`): the table shows the attended fraction.
"""

CONFIG = dict(
    sparsities=(0.8, 0.9),
    sizes=dict(context_tokens=1024, windows=8, episode_lengths=(256, 512, 1024), episodes=3),
    # Fields of swa(...), and `codec`.
    groups={
        "window": {
            "k": {},
            "2k": dict(window="2k"),
            "16 rows": dict(window=16),
            "64 rows": dict(window=64),
            "256 rows": dict(window=256),
            "decay 0.9": dict(decay=0.9),
            "decay 0.99": dict(decay=0.99),
        },
        "heads": {
            "shared": {},
            "per kv head": dict(shared_heads=False),
        },
        "local share": {
            "0 %": dict(local_frac=0.0),
            "25 %": dict(local_frac=0.25),
            "50 %": {},
            "75 %": dict(local_frac=0.75),
            "100 %": dict(local_frac=1.0),
        },
        "dense layers": {
            "0": {},
            "1": dict(dense_layers=1),
            "2": dict(dense_layers=2),
        },
        "refresh": {
            "never": {},
            "every 64": dict(refresh_every=64),
            "every 16": dict(refresh_every=16),
        },
        "codec": {
            "raw": {},
            "int8": dict(codec="int8"),
            "int8 minmax": dict(codec="int8(key_range=minmax)"),
            "int8 headroom 0": dict(codec="int8(headroom=0.0)"),
            "int8 token": dict(codec="int8(axis=token)"),
        },
    },
)
