"""The bundled model: a LLaMA-shaped decoder of 1.0 M parameters beside its token table, context 1024.

python -m eval.train --config=configs/train/pylib_1m.py --workdir=runs/pylib_1m --out=alisa_jax/bundled/pylib_1m
"""

CONFIG = dict(
    model=dict(
        arch="llama",
        vocab_size=2048,
        d_model=128,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        d_ff=384,
        max_positions=1024,
        tie_embeddings=True,
    ),
    # `copy` and `lookup` are shares of the episodes, the rest is text; recall draws from the first `ids` ids.
    stages=(
        dict(steps=500, length=128, batch=16, copy=0.75, lookup=0.0, ids=256),
        dict(steps=300, length=128, batch=16, copy=0.25, lookup=0.35, ids=2046),
        dict(steps=400, length=256, batch=16, copy=0.2, lookup=0.3, ids=2046),
        dict(steps=500, length=512, batch=8, copy=0.2, lookup=0.3, ids=2046),
        dict(steps=800, length=1024, batch=4, copy=0.2, lookup=0.3, ids=2046),
    ),
    learning_rate=2e-3,
    warmup_steps=50,
    decay_steps=800,
    weight_decay=0.01,
    beta2=0.98,
    clip_norm=1.0,
    answer_weight=2.0,
)
