"""Scoring a long text lets the cache grow in three stages: nothing that is reported may change with that."""

import numpy as np
import pytest

import alisa_jax
from alisa_jax.engine import scoring as module
from alisa_jax.kv.buckets import bucket

LENGTHS = 1040, 601


@pytest.mark.full(sample=1, per="codec")
@pytest.mark.parametrize(
    "policy, codec, bound",
    [
        ("dense", "raw", 1e-5),
        ("swa(kv_sparsity=0.7)", "raw", 2e-5),
        ("swa(kv_sparsity=0.7,window=2k,shared_heads=false)", "int8(calibration_tokens=300)", 2e-5),
        ("h2o(kv_sparsity=0.7)", "int8(axis=token)", 2e-5),
        ("merge", "raw", 1e-5),
    ],
)
def test_stages_change_no_score(random_model, monkeypatch, policy, codec, bound):
    model = random_model(max_positions=1100)
    rng = np.random.default_rng(8)
    texts = [rng.integers(0, 37, n).tolist() for n in LENGTHS]
    contexts, found = [], []
    for stages in (module.stages, lambda tokens: [bucket(tokens)]):
        monkeypatch.setattr(module, "stages", stages)
        engine = alisa_jax.Engine(model, policy, codec=codec)
        run = engine.programs.score
        seen = set()

        def watched(params, kv, *rest, run=run, seen=seen):
            seen.add(kv.layers[0][0].context)
            return run(params, kv, *rest)

        engine.programs.score = watched
        found.append(engine.score(texts, "decode"))
        contexts.append(sorted(seen))
    grown, whole = found
    first = [300] if "300" in codec else []
    if policy.startswith("merge"):
        assert contexts[0] == contexts[1] == [bucket(1040)]
    else:
        assert contexts[1] == sorted({*(bucket(n) for n in first), bucket(1040)})
        assert contexts[0] == sorted({bucket(n) for n in (*first, 260, 520, 1040) if not first or n >= 300})
    for a, b in zip(grown.logprobs, whole.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=bound)
    np.testing.assert_allclose(grown.attended_frac, whole.attended_frac, rtol=1e-6)
    for name in ("kv_bytes_per_token", "stats_bytes_per_token", "decoded_tokens"):
        assert getattr(grown, name) == getattr(whole, name)
