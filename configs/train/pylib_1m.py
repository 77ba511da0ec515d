"""The bundled model: a LLaMA-shaped decoder of 1.0 M parameters beside its token table, context 1024.

    python -m eval.train --config=configs/train/pylib_1m.py --workdir=runs/pylib_1m --out=alisa_jax/bundled/pylib_1m

Expected time: 59 minutes were measured on 2 CPU cores that other work shared; 5.7 M tokens at the 4,000 tokens a second
of two free cores would be 25. It should reach, on held-out text at length 1024, 2.77 nats per token (1.24 bits per byte)
and a recall accuracy of at least 0.99 for copies and lookups at lengths 256 to 1024 (copies at 128: 0.98).

The shipped weights come from a run that was stopped and continued several times; the steps of stages that had not begun
were set while it ran, to fit an hour. Copying is learnt within 200 steps of length 32 with few ids, and then carries over
to all ids, to lookups and to each longer length within some 60 steps.
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
        dict(steps=380, length=32, batch=64, copy=0.75, lookup=0.0, ids=64),
        dict(steps=120, length=64, batch=32, copy=0.3, lookup=0.2, ids=2046),
        dict(steps=240, length=128, batch=16, copy=0.2, lookup=0.3, ids=2046),
        dict(steps=260, length=256, batch=8, copy=0.2, lookup=0.3, ids=2046),
        dict(steps=200, length=512, batch=4, copy=0.2, lookup=0.3, ids=2046),
        dict(steps=800, length=1024, batch=4, copy=0.2, lookup=0.3, ids=2046),
    ),
    learning_rate=2e-3,
    warmup_steps=50,
    decay_steps=380,
    weight_decay=0.01,
    beta2=0.98,
    clip_norm=1.0,
    answer_weight=2.0,
)
