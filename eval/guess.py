"""Double Sparsity with its tokens on the host: how good the guesses of the next layer's query are, and what they move.

    python -m eval.guess                                  the bundled model; two minutes on two busy cores
    python -m eval.guess --model=smollm2-135m --calibration=calibration.json --windows=1

`--windows` windows of `--tokens` tokens are spread over the text. All of a window but its last `--new_tokens` is a prompt;
these are decoded under `--placement`, which keeps the next layer in flight. While a layer runs, its input goes through the
next layer's query projection, and the tokens that this guess chooses are fetched (`alisa_jax/engine/offload/by_guess.py`).

    recall       of the tokens that guesses chose, the share that the true query of that layer chooses too, its own left
                 out; over heads and steps. The first layer knows its query
    load / stream  bytes that went to the device over those that go where every full page of the same layers is streamed at
                 every step, as a dense cache is
    nats         mean -ln p of the new tokens, by guesses, by true queries (all on the device), and dense

A policy with `channels` below 1 needs a calibration (`eval.calibrate`); the bundled model has one.
"""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from eval.script import common, hashes, inputs
from eval.script.common import UserError
from eval.text import windows

POLICY = "double_sparsity(kv_sparsity=0.8)"
PLACEMENT = "flexgen(cache_device_frac=0.0)"


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked as far as they can be without model and text; raises UserError."""
    values = common.shared_flags(model="bundled", text=windows.BUNDLED, out=None)
    where, one = {"flag_values": values}, {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_string("policy", POLICY, "A policy whose query chooses.", **where)
    flags.DEFINE_string("codec", "raw", "How K and V are stored.", **where)
    flags.DEFINE_string(
        "calibration", None, "The model's statistics. Default: calibration.json of its folder.", **where
    )
    common.placement_flags(values)
    values.set_default("placement", PLACEMENT)
    flags.DEFINE_integer("tokens", 1000, "Tokens of a window, prompt and new ones.", **one)
    flags.DEFINE_integer("new_tokens", 32, "Of these, decoded.", **one)
    flags.DEFINE_integer("windows", 4, "Windows, which run together.", **one)
    common.dtype_flag(values)
    common.parse(values, argv, __doc__)
    values.policy, values.codec = inputs.policy(values.policy), inputs.codec(values.codec)
    values.placement = inputs.placement(values)
    if values.tokens <= values.new_tokens + 1:
        raise UserError(f"--tokens must be above --new_tokens + 1, got {values.tokens} and {values.new_tokens}")
    return values


def main(argv: Sequence[str], load: Callable = inputs.load) -> None:
    """flags -> config -> load -> three runs -> record. The argument beside `argv` is for tests."""
    values = config(argv)
    source, card = windows.read(values.text), inputs.card(values.model, values.dtype)
    if values.tokens > card.max_positions:
        raise UserError(
            f"--tokens must be at most {card.max_positions}, the context of {card.name}, got {values.tokens}"
        )
    results = inputs.results(values.out)
    options, named = {}, {}
    if values.calibration is not None:
        try:
            named["calibration_sha256"] = hashlib.sha256(Path(values.calibration).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"--calibration: {values.calibration!r}: {error.strerror}") from None
        options["calibration"] = values.calibration
    model = inputs.model(inputs.loading(load, values.dtype), values.model)
    size = values.tokens
    count = values.windows
    bos = model.bos_id is not None
    text, plan = windows.sample(source, inputs.tokenizer(model), size, size, count, bos)
    sequences = [windows.sequence(text, window, model.bos_id) for window in plan]
    names = ("policy", "codec", "tokens", "new_tokens", "seed")
    cell = {"script": "eval.guess", **card.fields(), **named, **source.fields, "ids_sha256": hashes.of_ids(sequences)}
    cell |= {name: getattr(values, name) for name in names} | common.placement_fields(values)
    cell["windows"] = len(sequences)
    record = None if results is None or values.rerun else results.find(cell | inputs.here())
    if record is None:
        start = time.perf_counter()

        def engine(policy: str, placed: dict):
            make = lambda *args, **more: inputs.make_engine(*args, **more, **options)
            return inputs.engine(make, model, policy, values.codec, placed=placed)

        found = measure(engine, values.policy, common.placement_fields(values), sequences, values.new_tokens)
        how = {"implementation": "xla:indexed", "warmup": 0, "repeats": 1}
        record = inputs.record(results, cell, found, time.perf_counter() - start, how)
    common.emit([record], report(record), values.json)


def measure(engine: Callable, policy: str, placed: dict, sequences: list[list[int]], new: int) -> dict:
    """The values of a record; see the module."""
    one = engine(policy, placed)
    inputs.check_placed(one, [sequences], "prompt", [[new] * len(sequences)])
    setting = one.placement.setting([len(ids) - new for ids in sequences], new)
    if not setting.chosen:
        raise UserError(f"--policy: {policy} does not choose by its query, so nothing is guessed")
    one.placement.counts_recall = True
    last = [new] * len(sequences)
    guessed = one.score(sequences, "prompt", last=last)
    run = guessed.placement
    if run.guess_recall is None:
        raise UserError(f"--placement: {placed['placement']} has no layer in flight here, so nothing is guessed")
    nats = {"guess_nats": guessed}
    for name, spec in (("true_nats", policy), ("dense_nats", "dense")):
        nats[name] = engine(spec, common.RESIDENT).score(sequences, "prompt", last=last)
    stream = streamed_bytes(one.placement.controller, setting)
    return {
        "layers": [layer for layer in one.placement.placed if layer],
        "recall_per_layer": list(run.guess_recall_per_layer),
        "guess_recall": run.guess_recall,
        "load_bytes": run.load_bytes,
        "stream_bytes": stream,
        "load_frac": run.load_bytes / stream,
        "device_peak_bytes": run.device_peak_bytes,
        "host_peak_bytes": run.host_peak_bytes,
        **{name: float(-np.mean(np.concatenate(scores.logprobs))) for name, scores in nats.items()},
        "n": new * len(sequences),
    }


def streamed_bytes(controller, setting) -> float:
    """Bytes that `controller` loads where every query of `setting` attends everything."""
    from alisa_jax.placement.modelled.simulate import walk
    from alisa_jax.placement.plan import moved_bytes

    dense = dataclasses.replace(setting, selects=False, chosen=0, heads=1)
    return sum(moved_bytes(plan.load, dense, view.lengths) for view, plan, _ in walk(controller, dense))


def report(record: dict) -> str:
    """What people read."""
    r = record
    rows = [(str(i), common.number(x)) for i, x in zip(r["layers"], r["recall_per_layer"], strict=True)]
    rows.append(("mean", common.number(r["guess_recall"])))
    return (
        f"{common.table(('layer', 'recall'), rows)}\n"
        f"load / stream {r['load_frac']:.3f} ({r['load_bytes'] / 1e6:.1f} of {r['stream_bytes'] / 1e6:.1f} MB); nats by"
        f" guesses {r['guess_nats']:.4f}, by true queries {r['true_nats']:.4f}, dense {r['dense_nats']:.4f}\n"
        f"{r['model']} on {r['data']}: {r['policy']} | {r['codec']} | {r['placement']}; {r['windows']} windows of"
        f" {r['tokens']} tokens, the last {r['new_tokens']} decoded; {r['n']} tokens scored"
    )


if __name__ == "__main__":
    sys.exit(common.run(main))
