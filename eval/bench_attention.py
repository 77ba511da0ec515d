"""One layer's decode step under a policy against dense, replaying a trained model's queries.

    python -m eval.bench_attention                          about 3 minutes on 2 CPU cores
    python -m eval.bench_attention --layers=0 --steps=200

The model reads a dense prompt of a long text, then decodes `--steps` steps under the policy; the queries, keys and values of
all layers are recorded. Positions beyond the model's context are interpolated linearly. Heads are repeated until there are
`--heads`, each with its own keys and values. `alisa_jax.attention.step` then replays each layer's trace with donated
states; the policy and dense take turns step by step in this process:

    speedup_whole_step   dense (append, attend) / policy (append, attend, observe, window update, exchange)
    speedup_attend       dense (attend) / policy (attend, exchange)

each a ratio of medians over all steps of all layers. `limit` is the bandwidth bound: the tokens that dense reads over those
that the policy attends. Writes one summary record; expected on CPU: at least 2.5 and 3.5 at 80 % sparsity.
"""

import functools
import sys
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

from eval.script import common, inputs
from eval.script.common import UserError
from eval.text import windows


def main(argv: Sequence[str]) -> None:
    """flags -> model -> trace -> replay -> record."""
    values = common.shared_flags("bundled", windows.BUNDLED, None)
    where = {"flag_values": values}
    flags.DEFINE_string("policy", "swa(kv_sparsity=0.8)", "The policy that is measured against dense.", **where)
    flags.DEFINE_integer("batch", 4, "Sequences.", lower_bound=1, **where)
    flags.DEFINE_integer("context", 4096, "Tokens of the context bucket; the replay ends when it is full.", **where)
    flags.DEFINE_integer("heads", 12, "Heads, each with its own keys and values.", lower_bound=1, **where)
    flags.DEFINE_integer("steps", 200, "Consecutive decode steps.", lower_bound=1, **where)
    flags.DEFINE_multi_integer("layers", None, "A layer to replay (repeatable; default: all).", **where)
    common.dtype_flag(values)
    common.parse(values, argv, __doc__)
    text = inputs.policy(values.policy)
    if not values.steps < values.context:
        raise UserError(f"--steps must be below --context, {values.context}, got {values.steps}")
    source = windows.read(values.text)
    card = inputs.card(values.model, values.dtype)
    results = inputs.results(values.out)
    model = inputs.model(inputs.loading(inputs.load, values.dtype), values.model)
    n_layers, n_heads = model.decoder.config.n_layers, model.decoder.config.n_heads
    if values.heads % n_heads:
        raise UserError(f"--heads must be a multiple of {n_heads}, the query heads of {card.name}, got {values.heads}")
    layers = list(range(n_layers)) if values.layers is None else values.layers
    if not set(layers) <= set(range(n_layers)):
        raise UserError(f"--layers must be in 0..{n_layers - 1}, got {', '.join(map(str, layers))}")
    tokens = windows.tokenize(source.characters, inputs.tokenizer(model)).tokens
    if len(tokens) < values.batch * values.context:
        raise UserError(f"--text has {len(tokens)} tokens, and {values.batch} x {values.context} are needed")

    began = time.perf_counter()
    rows = np.asarray(tokens[: values.batch * values.context], np.int32).reshape(values.batch, values.context)
    common.say(f"recording {values.steps} steps of {card.name} under {text}")
    traces = record_trace(model, text, rows, values.steps, values.heads)
    timings = []
    for layer in layers:
        timings.append(replay(text, traces[layer], values.steps))
        medians = {k: f"{1e3 * np.median(v):.2f} ms" for k, v in timings[-1].items() if k.endswith("_s")}
        common.say(f"layer {layer}: " + ", ".join(f"{k.removesuffix('_s')} {v}" for k, v in medians.items()))
    seconds = {key: np.concatenate([t[key] for t in timings]) for key in timings[0] if key.endswith("_s")}
    summary = summarise(seconds, np.concatenate([t["attended"] for t in timings]), values.context)
    cell = {
        "script": "eval.bench_attention",
        **card.fields(),
        "data": source.name,
        "data_sha256": source.sha256,
        "policy": text,
        "codec": "raw(dtype=float32)",
        "placement": "resident",
        "batch": values.batch,
        "context_tokens": values.context,
        "heads": values.heads,
        "head_dim": model.decoder.config.head_dim,
        "layers": layers,
        "steps": values.steps,
        "seed": values.seed,
    }
    summary["loads_per_step_and_sequence"] = float(np.mean([t["loads"].mean() for t in timings]) / values.batch)
    how = {"implementation": "xla:working_set", "warmup": WARM_UP, "repeats": values.steps * len(layers)}
    made = inputs.record(results, cell, summary, time.perf_counter() - began, how)
    common.emit([made], report(made), values.json)


WARM_UP = 8  # steps of each replay that are not timed


def record_trace(model, policy: str, tokens: np.ndarray, steps: int, heads: int):
    """[(q, k, v)] per layer, each [B, T, heads, H] float32: a dense prompt, then `policy` in the loop."""
    import jax
    import jax.numpy as jnp

    from alisa_jax import attention, policies
    from alisa_jax.codecs import Raw
    from alisa_jax.kv.state import LayerSpec
    from eval.speed import models

    B, T = tokens.shape
    decoder = models.stretched(model, T, "--context").decoder
    c, chosen, prompt = decoder.config, policies.parse(policy), T - steps

    def blocks(params, tokens, at, attend):
        x, seen = decoder.embed(params, tokens, at), []
        for layer in range(c.n_layers):
            x, aux = decoder.block(params["blocks"][layer], x, at, lambda q, k, v, i=layer: attend(i, q, k, v))
            seen.append(aux)
        return seen

    def first(params, tokens):
        def attend(layer, q, k, v):
            p = chosen.for_layer(layer)
            spec = LayerSpec(p, Raw("float32"), p.routes[0])
            state = attention.init(spec, attention.dims_of(spec, B, c.n_heads, c.n_kv_heads, T), c.head_dim)
            out, state = attention.prefill(state, q, k, v, jnp.full((B,), prompt, jnp.int32))
            return out, (state, (q, k, v))

        at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        states, seen = zip(*blocks(params, tokens, at, attend), strict=True)
        return states, jax.tree.map(lambda x: x[:, :prompt], seen)

    def rest(params, states, tokens):
        def one(states, token):
            def attend(layer, q, k, v):
                out, state, _ = attention.step(states[layer], q[:, 0], k[:, 0], v[:, 0])
                return out[:, None], (state, (q[:, 0], k[:, 0], v[:, 0]))

            states, seen = zip(*blocks(params, token[:, None], states[0].length[:, None], attend), strict=True)
            return states, seen

        return jax.lax.scan(one, states, tokens[:, prompt:].T)[1]

    params = jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
    states, head = jax.jit(first)(params, jnp.asarray(tokens))
    tail = jax.jit(rest)(params, states, jnp.asarray(tokens))

    def whole(head, tail):
        x = np.concatenate([np.asarray(head), np.moveaxis(np.asarray(tail), 0, 1)], axis=1)
        x = np.repeat(x, c.n_heads // x.shape[2], axis=2)  # keys and values of their own for every query head
        return np.tile(x, (1, 1, heads // c.n_heads, 1))

    return [tuple(whole(h, t) for h, t in zip(*pair, strict=True)) for pair in zip(head, tail, strict=True)]


def replay(policy: str, trace, steps: int) -> dict[str, np.ndarray]:
    """Seconds of each step, [steps - WARM_UP], for both sides and both cuts; tokens attended and rows loaded."""
    import jax
    import jax.numpy as jnp

    from alisa_jax import attention, policies
    from alisa_jax.attention.compute import slots
    from alisa_jax.codecs import Raw
    from alisa_jax.kv.state import LayerSpec

    codec, (B, T, N, H) = Raw("float32"), trace[0].shape
    prompt = [
        jnp.asarray(x) for x in trace
    ]  # whole, so that its length is a round number; the prefill stops at `length`
    columns = [tuple(jnp.asarray(x[:, T - steps + i]) for x in trace) for i in range(steps)]
    length = jnp.full((B,), T - steps, jnp.int32)

    def start(p):
        spec = LayerSpec(p, codec, "working_set")
        state = attention.init(spec, attention.dims_of(spec, B, N, N, T), H)
        return _compiled_prefill()(state, *prompt, length)

    def attend(ws, q):
        return slots(codec, q[:, :, None], ws.k, ws.v, ws.bias)

    def whole(state, q, k, v):
        out, state, taps = attention.step(state, q, k, v)
        return (out, taps.attended, taps.loads), state

    def before(state, k, v):
        codes = codec.encode_token(state.ws.k, k), codec.encode_token(state.ws.v, v)
        store = None if state.store is None else state.store.append(codec, *codes, state.length)
        ws, slot = state.ws.append(codec, *codes, state.length)
        return state.replace(ws=ws, store=store), slot

    def observe(state, slot, mass):
        stats = state.spec.policy.observe(state.stats, mass, state.ws.pos, slot, state.length)
        return state.replace(stats=stats, length=state.length + 1)

    def change(state):
        ((state,),), _ = attention.exchange_sets([(state,)], [state.ws.bias])
        return state

    attend = jax.jit(attend)
    whole, before, observe, change = (jax.jit(f, donate_argnums=0) for f in (whole, before, observe, change))

    def timed(function, *args):
        began = time.perf_counter()
        out = jax.block_until_ready(function(*args))
        return out, time.perf_counter() - began

    sides = {"dense": policies.Dense(), "policy": policies.parse(policy)}
    times = {f"{side}_{cut}_s": [] for side in sides for cut in ("whole_step", "attend")}
    attended, loads = [], []
    states = {side: start(p) for side, p in sides.items()}
    for q1, k1, v1 in columns:
        for side in sides:
            (seen, states[side]), seconds = timed(whole, states[side], q1, k1, v1)
            times[f"{side}_whole_step_s"].append(seconds)
        attended.append(np.asarray(seen[1]))
        loads.append(np.asarray(seen[2]).sum())
    states = {side: start(p) for side, p in sides.items()}
    for q1, k1, v1 in columns:
        for side in sides:
            state, slot = before(states[side], k1, v1)
            (_, mass), seconds = timed(attend, state.ws, q1)
            state = jax.block_until_ready(observe(state, slot, mass))
            if side == "policy":
                state, more = timed(change, state)
                seconds += more
            times[f"{side}_attend_s"].append(seconds)
            states[side] = state
    out = {key: np.asarray(t[WARM_UP:]) for key, t in times.items()}
    return {**out, "attended": np.asarray(attended), "loads": np.asarray(loads)}


@functools.cache
def _compiled_prefill():
    import jax

    from alisa_jax import attention

    return jax.jit(lambda *args: attention.prefill(*args)[1])


def summarise(seconds: dict[str, np.ndarray], attended: np.ndarray, context: int) -> dict:
    """Medians in ms with quartiles, and the ratios."""
    median = {key: float(np.median(t)) for key, t in seconds.items()}
    values = {
        "speedup_whole_step": median["dense_whole_step_s"] / median["policy_whole_step_s"],
        "speedup_attend": median["dense_attend_s"] / median["policy_attend_s"],
        "limit": context / float(attended.mean()),
    }
    for key, t in seconds.items():
        values[f"{key.removesuffix('_s')}_ms"] = 1e3 * median[key]
        values[f"{key.removesuffix('_s')}_ms_quartiles"] = [1e3 * float(x) for x in np.percentile(t, [25, 75])]
    return values


def report(r: dict) -> str:
    """The table for people."""
    head = ["", "dense ms", "policy ms", "speed-up"]
    rows = [
        [name, *(common.number(r[f"{side}_{cut}_ms"], ".2f") for side in ("dense", "policy")), f"{r[key]:.2f}x"]
        for name, cut, key in (
            ("whole step", "whole_step", "speedup_whole_step"),
            ("attend (+ exchange)", "attend", "speedup_attend"),
        )
    ]
    above = (
        f"{r['policy']} against dense, one layer, B = {r['batch']}, S = {r['context_tokens']}, {r['heads']} heads of "
        f"{r['head_dim']}, float32, {r['device_kind']}, {r['cpu_count']} cores;\nqueries of {r['model']}, layers "
        f"{r['layers']}, {r['steps']} steps; {r['loads_per_step_and_sequence']:.2f} rows loaded a step and sequence; "
        f"bandwidth limit {r['limit']:.2f}x"
    )
    return f"{above}\n\n{common.table(head, rows)}"


if __name__ == "__main__":
    sys.exit(common.run(main))
