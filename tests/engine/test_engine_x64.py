"""Under JAX_ENABLE_X64 every policy and codec gives what it gives without, under strict promotion.

This process and one with 64 bits run the same pairs: greedy and drawn tokens, scores, and a cache placed by a controller.
"""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from alisa_jax.codecs import CODECS
from alisa_jax.policies import POLICIES
from tests.full import seed

POLICY_TEXTS = (
    "dense",
    "local(kv_sparsity=0.5)",
    "strided(kv_sparsity=0.5)",
    "streaming(tokens=8)",
    "streaming(tokens=8,positions=cache)",
    "h2o(kv_sparsity=0.5)",
    "swa(kv_sparsity=0.5)",
    "merge",
    "snapkv(capacity=12,window=4)",
    "double_sparsity(kv_sparsity=0.5,dense_layers=0)",
    "gemfilter(tokens=10,layer=0)",
)
CODEC_TEXTS = (
    "raw",
    "int8(calibration_tokens=6)",
    "int8(axis=token)",
    "int4(group=8)",
    "skvq(group=8,window=7,sinks=2,span=head)",
)
REFUSED = {("merge", CODEC_TEXTS[4])}  # it joins keys that carry their positions
PAIRS = [pair for pair in itertools.product(POLICY_TEXTS, CODEC_TEXTS) if pair not in REFUSED]
PLACED = {"dense": "flexgen(cache_device_frac=0.5)", "swa(kv_sparsity=0.5)": "alisa(alpha=0.5,p1=0,beta=0.3,p2=4)"}


def draw(model):
    """A calibration of `model` with numbers of its own."""
    from alisa_jax.calibration import Calibration

    c, rng = model.decoder.config, np.random.default_rng(4)
    q, k = (c.n_layers, c.n_heads, c.head_dim), (c.n_layers, c.n_kv_heads, c.head_dim)
    positive = {name: np.abs(rng.normal(size=size)) for name, size in (("q_abs", q), ("k_abs", k), ("qk_abs", q))}
    ranges = {f"{part}_{end}": sign * np.ones(k) for part in "kv" for end, sign in (("min", -3.0), ("max", 3.0))}
    return Calibration(**positive, **ranges, n_tokens=9, model="random", data="")


def measure(pairs) -> dict:
    """What each pair gives."""
    import jax
    import jax.numpy as jnp

    import alisa_jax
    from alisa_jax.models import Decoder, Model, ModelConfig

    sizes = dict(
        vocab_size=37, d_model=22, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=26, max_positions=160
    )
    decoder, rng = Decoder(ModelConfig(arch="llama", **sizes)), np.random.default_rng(3)

    def weights(like):
        scale, mean = (like.shape[0] ** -0.5, 0.0) if len(like.shape) == 2 else (0.2, 1.0)
        return jnp.asarray(rng.normal(mean, scale, like.shape), like.dtype)

    params = jax.tree.map(weights, jax.eval_shape(decoder.init, jax.random.key(0)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    model = Model(decoder, params, None, "random", None, (), "random")
    sequences, found = [rng.integers(0, 37, n).tolist() for n in (19, 12)], {}
    for policy, codec in pairs:
        engine = alisa_jax.Engine(model, policy, codec, calibration=draw(model))
        greedy, scored = engine.generate(sequences, 4), engine.score(sequences)
        one = {"tokens": greedy.tokens, "logprobs": [float(x) for row in scored.logprobs for x in row]}
        if codec == "raw":
            one["drawn"] = engine.generate(sequences, 4, sampling=alisa_jax.Sampling(0.9, 20, 0.9), seed=1).tokens
        if codec == "raw" and policy in PLACED:
            long = [rng.integers(0, 37, 150).tolist() for _ in range(2)]
            placed = engine.under(PLACED[policy]).generate(long, 8)
            one["placed"] = [placed.tokens, placed.placement.stored_rows > 0]
        found[f"{policy} {codec}"] = one
    return found


def with_64_bits(pairs) -> dict:
    code = (
        "import jax, json, sys, warnings\n"
        "jax.config.update('jax_numpy_dtype_promotion', 'strict')\n"
        "jax.config.update('jax_numpy_rank_promotion', 'raise')\n"
        "warnings.simplefilter('error')\n"
        "from tests.engine.test_engine_x64 import measure\n"
        "print(json.dumps(measure(json.loads(sys.argv[1]))))\n"
    )
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(pairs)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_all_policies_and_codecs_are_here():
    assert {text.split("(")[0] for text in POLICY_TEXTS} == set(POLICIES)
    assert {text.split("(")[0] for text in CODEC_TEXTS} == set(CODECS)


@pytest.fixture
def pairs(pytestconfig):
    """All pairs under --full; else one that is drawn anew at every run, and one that is placed."""
    drawn = PAIRS[int(np.random.default_rng(seed()).integers(len(PAIRS)))]
    return PAIRS if pytestconfig.getoption("--full") else list(dict.fromkeys([drawn, ("swa(kv_sparsity=0.5)", "raw")]))


def test_sixty_four_bits_change_nothing(pairs):
    all_found, all_wanted = with_64_bits(pairs), json.loads(json.dumps(measure(pairs)))
    for pair, want in all_wanted.items():
        found = all_found[pair]
        np.testing.assert_allclose(found.pop("logprobs"), want.pop("logprobs"), atol=1e-5, err_msg=pair)
        assert found == want, pair
        assert want.get("placed", [0, True])[1], f"{pair}: nothing was placed on the host"
