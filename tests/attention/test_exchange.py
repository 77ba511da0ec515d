"""Layers that exchange together end with the sets, statistics and rows that each would have by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import attention, policies
from alisa_jax.attention import layer as module
from alisa_jax.codecs.raw import Raw
from alisa_jax.kv.state import LayerSpec
from alisa_jax.policies import Swa

B, N, K, H, S, LAYERS = 3, 4, 2, 4, 64, 3
STARTS = (9, 1, 20)


def states(policy, route="working_set"):
    rng = np.random.default_rng(5)
    made = [[rng.normal(size=(B, 32, heads, H)).astype(np.float32) * 3 for heads in (N, K, K)] for _ in range(LAYERS)]
    return [filled(policy, route, *tokens) for tokens in made]


@functools.partial(jax.jit, static_argnums=(0, 1))
def filled(policy, route, q, k, v):
    spec = LayerSpec(policy, Raw("float32"), route)
    empty = attention.init(spec, attention.dims_of(spec, B, N, K, S), H)
    return attention.prefill(empty, q, k, v, jnp.asarray(STARTS, jnp.int32))[1]


@functools.partial(jax.jit, static_argnums=2)
def step(kv, new, together):
    made = [attention.decode((state,), *x) for state, x in zip(kv, new, strict=True)]
    outs, layers = [m[0] for m in made], [m[1] for m in made]
    if together:
        layers, loads = attention.exchange_sets(layers, outs)
    else:
        each = [attention.exchange_sets([layer], [out]) for layer, out in zip(layers, outs, strict=True)]
        layers, loads = [e[0][0] for e in each], [e[1][0] for e in each]
    return outs, [layer[0] for layer in layers], [load[0] for load in loads]


@pytest.mark.parametrize(
    "text", ["swa(kv_sparsity=0.5,spare_slots=0,window=3)", "swa(tokens=8,shared_heads=false,window=2)"]
)
def test_layers_exchange_together_as_they_do_one_by_one(text):
    together = states(policies.parse(text))
    alone, rng, moved = together, np.random.default_rng(6), 0
    for _ in range(S - max(STARTS)):
        new = [[jnp.asarray(rng.normal(size=(B, n, H)) * 3, jnp.float32) for n in (N, K, K)] for _ in range(LAYERS)]
        outs, together, loads = step(together, new, True)
        expected, alone, alone_loads = step(alone, new, False)
        for a, b in zip(
            jax.tree.leaves((outs, together, loads)), jax.tree.leaves((expected, alone, alone_loads)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        moved += int(sum(x.sum() for x in loads))
    assert moved > 0
    assert any((a != b).any() for a, b in zip(together[0].ws.pos, together[1].ws.pos, strict=True))


def test_only_layers_that_go_about_it_alike_exchange_together():
    swa, other = (states(policies.parse(f"swa(kv_sparsity={s})"))[0] for s in (0.5, 0.8))
    assert module.joint_key(swa) == module.joint_key(swa.replace(length=swa.length + 1))
    assert module.joint_key(swa) != module.joint_key(other)
    for text in ("dense", "local(kv_sparsity=0.5)", "h2o(kv_sparsity=0.5)"):
        assert module.joint_key(states(policies.parse(text))[0]) is None
    assert module.joint_key(states(policies.parse("swa(kv_sparsity=0.5)"), "indexed")[0]) is None


class Own(Swa):
    def exchange(self, stats, pos, bias, length, S):
        return super().exchange(stats, pos, bias, length, S)


def test_a_policy_with_an_exchange_of_its_own_is_not_passed_over():
    own = states(Own(kv_sparsity=0.5))[0]
    assert module.joint_key(own) is None
    new = [jnp.zeros((B, n, H)) for n in (N, K, K)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Own, "exchange", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attention.step(own, *new)
