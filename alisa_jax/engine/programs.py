"""`Programs`: the functions of `step` and `lanes`, jitted for one model, policy and codec."""

from __future__ import annotations

import functools

import jax

from alisa_jax import attention
from alisa_jax.engine import lanes, sampling, step
from alisa_jax.kv.cache import KVState
from alisa_jax.kv.state import LayerSpec
from alisa_jax.models.decoder import Decoder


class Programs:
    """What an engine, a benchmark or a server calls; `compiles` counts the traces of all.

        prefill(params, tokens [B, T], length [B], room)            logits [B, V], kv
        filter_prompt(params, tokens [B, T], length [B], layer)     positions [B, n]
        generate(params, kv, token [B], done [B], eos [E], n, draw) step.Chunk, kv
        score(params, kv, tokens, targets, valid [B, 64], n)        step.Scored, kv
        score_masked(params, tokens, targets, valid [B, T])         see `step.score_masked`
        judge(logits, target), next_token(logits, draw, i)          see `step` and `sampling`
        grow(state, S, room), freeze(state, S)                      the state of one part of a layer
        adopt(kv, other, rows [B], which [B])                       kv

    Prompts in chunks: `begin`, `extend`, then `finish` layer by layer and `last_logits`; those of a
    prompt filter: `begin_filter`, `extend_filter`, `choose`. generate, score, adopt, extend and
    extend_filter donate the state that they are given.
    """

    def __init__(self, decoder: Decoder, policy, layers: tuple[LayerSpec, ...], impl: str):
        self.compiles = 0
        on = functools.partial
        jit = self.jit
        self.prefill = jit(on(step.prefill, decoder, layers), static_argnums=3)
        self.filter_prompt = jit(on(step.filter_prompt, decoder, policy, impl), static_argnums=3)
        self.generate = jit(on(step.generate_chunk, decoder), donate_argnums=1)
        self.score = jit(on(step.score_chunk, decoder), donate_argnums=1)
        self.score_masked = jit(on(step.score_masked, decoder, layers))
        self.judge = jit(step.judge)
        self.next_token = jit(sampling.next_token)
        self.grow = jit(attention.grow, static_argnums=(1, 2))
        self.freeze = jit(step.freeze, static_argnums=1)
        self.adopt = jit(step.adopt, donate_argnums=0)
        self.begin = jit(on(lanes.begin, decoder, layers), static_argnums=(0, 1, 2, 3))
        self.extend = jit(on(lanes.extend, decoder), donate_argnums=1)
        self.finish = jit(on(lanes.finish, decoder), static_argnums=(1, 2))
        self.begin_filter = jit(
            on(lanes.begin_filter, decoder, layers[0]), static_argnums=(0, 1, 2, 3)
        )
        self.extend_filter = jit(on(lanes.extend_filter, decoder), donate_argnums=1)
        self.choose = jit(policy.choose)
        self.last_logits = jit(lambda params, x: decoder.unembed(params, x[:, None])[:, 0])

    def jit(self, function, **options):
        """`jax.jit` that counts in `compiles` how often the function is traced."""

        def counted(*args):
            self.compiles += 1
            return function(*args)

        return jax.jit(counted, **options)

    def grow_each(self, layers: list, S: int, room: int | None) -> KVState:
        """Grow each of `layers`, a list that alone holds them, in place to the bucket S.

        An old layer is freed before the next one grows.
        """
        for i in range(len(layers)):
            (layers[i],) = layers[i]
            layers[i] = (self.grow(layers[i], S, room),)
        return KVState(tuple(layers))

    def freeze_each(self, kv: KVState, S: int) -> KVState:
        """All layers with their tokens encoded, for the bucket S."""
        return KVState(tuple((self.freeze(state, S),) for (state,) in kv.layers))

    def finish_each(self, layers: list, S: int, room: int | None) -> KVState:
        """The states of `layers`, a list that alone holds the lanes, one after the other."""
        for i in range(len(layers)):
            layers[i] = (self.finish(layers[i], S, room),)
        return KVState(tuple(layers))
