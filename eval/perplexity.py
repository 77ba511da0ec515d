"""Perplexity of a model on a text under one or more KV policies.

    python -m eval.perplexity --policy=dense --policy='swa(kv_sparsity=0.8)'
    python -m eval.perplexity --model=FOLDER --text=FILE --context=512 --stride=256 --max_tokens=20000 --json

The text is cut into windows of `--context` tokens, one every `--stride` tokens, each run alone from an empty
cache; a token is scored by the first window that holds it (`eval/text/windows.py`). With nll the sum of -ln p over
the n scored tokens:

    token_perplexity = exp(nll / n)                    word_perplexity = exp(nll / words of the scored text)
    bits_per_byte    = nll / (ln 2 * UTF-8 bytes of the scored text)

`stderr` is the standard error of token_perplexity over windows; `x_stderr` is that of `x`. `attended_frac` is attended
tokens over past tokens. `clipped_frac` is the share of the elements of K and V outside the codec's range. Both are means
over layers; bytes per token are sums over layers. A codec that takes its range from the first tokens of a sequence needs
windows that are longer.

`--context` may be longer than the model's under policies that have no end, such as streaming(positions=cache).

`--placement` says where the cache lives, within `--device_kv_bytes` and `--host_kv_bytes`; tokens are then decoded.

Protocols: `decode` goes token by token through the decode path; `prefill_mask` is one pass with the causal selection
mask row by row. Nothing here is drawn at random: `--seed` is recorded only.
"""

import sys
import time
from collections.abc import Callable, Sequence

from absl import flags
from tqdm import tqdm

from eval.script import common, hashes, inputs, measure
from eval.script.common import UserError
from eval.text import windows

PROTOCOLS = ("decode", "prefill_mask")
DEFAULT_CONTEXT = 1024  # at most; less where the model's own context is shorter


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked as far as they can be without model and text; raises UserError. max_tokens: None for all."""
    values = common.shared_flags(model="bundled", text=windows.BUNDLED, out=None)
    at_least = {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_multi_string("policy", ["dense"], "Policy spec; may be given several times.", flag_values=values)
    flags.DEFINE_string("codec", "raw", "How K and V are stored.", flag_values=values)
    flags.DEFINE_enum("protocol", "decode", PROTOCOLS, "How the policy is applied.", flag_values=values)
    flags.DEFINE_integer(
        "context", None, f"Window, tokens. Default: the model's, at most {DEFAULT_CONTEXT}.", **at_least
    )
    flags.DEFINE_integer("stride", None, "Distance of windows, tokens. Default: context - 1.", **at_least)
    flags.DEFINE_integer("max_tokens", 8192, "Tokens of the text that are used; 0 for all.", 0, flag_values=values)
    flags.DEFINE_integer("batch", 8, "Windows that run together.", **at_least)
    common.placement_flags(values)
    common.dtype_flag(values)
    common.impl_flag(values)
    common.parse(values, argv, __doc__)
    if values.context is not None and values.stride is not None and values.stride > values.context:
        raise UserError(f"--stride must be in 1..context, got stride={values.stride} with context={values.context}")
    values.policy = tuple(dict.fromkeys(inputs.policy(text) for text in values.policy))
    values.codec = inputs.codec(values.codec)
    values.placement = inputs.placement(values)
    values.max_tokens = values.max_tokens or None
    return values


def main(argv: Sequence[str], load: Callable = inputs.load, make_engine: Callable = inputs.make_engine) -> None:
    """flags -> config -> load -> loop -> records. The arguments beside `argv` are for tests."""
    values = config(argv)
    inputs.check_impl(values.attention_impl)
    source = windows.read(values.text)
    card = inputs.card(values.model, values.dtype)
    context, stride = inputs.window(values.context, values.stride, card, DEFAULT_CONTEXT, values.policy)
    for policy in values.policy:
        inputs.check_policy(policy, context)
    inputs.check_codec(values.codec, context, "windows")
    results = inputs.results(values.out)
    model = inputs.model(inputs.loading(load, values.dtype), values.model)
    text = windows.tokenize(source.characters, inputs.tokenizer(model), values.max_tokens)
    plan = windows.plan(len(text.tokens), context, stride, model.bos_id is not None)
    plan = long_enough(plan, values.codec, model.bos_id)
    ids = hashes.of_ids([windows.sequence(text, w, model.bos_id) for w in plan])

    records, reused = [], 0
    for policy in tqdm(values.policy, desc="policies", disable=None, leave=False):
        cell = {
            "script": "eval.perplexity",
            **card.fields(),
            "data": source.name,
            "data_sha256": source.sha256,
            "ids_sha256": ids,
            "policy": policy,
            "codec": values.codec,
            **common.placement_fields(values),
            "protocol": values.protocol,
            "window_tokens": context,
            "stride_tokens": stride,
            "max_tokens": values.max_tokens,
            "batch": values.batch,
            "seed": values.seed,
            **common.impl_field(values.attention_impl),
        }
        record = None if results is None or values.rerun else results.find(cell)
        reused += record is not None
        if record is None:
            began = time.perf_counter()
            placed = common.placement_fields(values)
            engine = inputs.engine(make_engine, model, policy, values.codec, values.attention_impl, placed)
            if placed != common.RESIDENT:
                groups = [[windows.sequence(text, w, model.bos_id) for w in g] for g in grouped(plan, values.batch)]
                inputs.check_placed(engine, groups, values.protocol)
            found, ran = evaluate(engine, text, plan, model.bos_id, values.batch, values.protocol)
            record = inputs.record(results, cell, found, time.perf_counter() - began, ran)
        records.append(record)

    if reused:
        common.say(f"{reused} of {len(records)} cells were already in {values.out}; --rerun measures them again")
    common.emit(records, report(records), values.json)


def long_enough(plan: Sequence[windows.Window], codec: str, bos_id: int | None) -> list[windows.Window]:
    """`plan` without a last window that is too short for the codec to take its range from, and a line that says so."""
    last = plan[-1].stop - plan[-1].start + (bos_id is not None)
    needed = inputs.calibration_tokens(codec)
    if last > needed:
        return list(plan)
    common.say(
        f"the last window is left out: it has {last} tokens, and {codec} takes its range from the first {needed} of"
        f" a window (--max_tokens or --stride can avoid it)"
    )
    return list(plan[:-1])


def grouped(plan: Sequence[windows.Window], batch: int) -> list[Sequence[windows.Window]]:
    """`plan` in batches."""
    return [plan[i : i + batch] for i in range(0, len(plan), batch)]


def evaluate(engine, text: windows.Text, plan, bos_id, batch: int, protocol: str) -> tuple[dict, dict]:
    """Score every window of `plan`; returns (values, how they were got)."""
    logprobs, scores = [], []
    for group in tqdm(grouped(plan, batch), desc="batches", disable=None, leave=False):
        try:
            score = engine.score([windows.sequence(text, w, bos_id) for w in group], protocol=protocol)
        except ValueError as error:
            raise UserError(f"--context: {error}") from None
        logprobs += score.logprobs
        scores.append(score)
    return {**measure.perplexities(text, plan, logprobs), **measure.footprint(scores)}, measure.how(scores)


def report(records: Sequence[dict]) -> str:
    """The table for people; the settings that all rows share stand above it."""
    coded = not records[0]["codec"].startswith("raw")
    head = [
        "policy",
        "token ppl",
        "bits/byte",
        "word ppl",
        "attended",
        "KV B/token",
        "stats B/token",
        *(["clipped"] if coded else []),
        "ran",
        "s",
    ]
    rows = []
    for r in records:
        rows.append(
            [
                r["policy"],
                common.number(r["token_perplexity"], ".4f", stderr=r["stderr"]),
                common.number(r["bits_per_byte"], ".4f"),
                common.number(r["word_perplexity"], ".4g"),
                common.number(r["attended_frac"], ".1f", 100) + " %",
                common.number(r["kv_bytes_per_token"], ".0f"),
                common.number(r["stats_bytes_per_token"], ".0f"),
                *([common.number(r["clipped_frac"], ".4f", 100) + " %"] if coded else []),
                r["implementation"],
                common.number(r["wall_s"], ".1f"),
            ]
        )
    r = records[0]
    above = (
        f"{r['model']} on {r['data']} ({r['data_sha256'][:12]}), "
        f"protocol {r['protocol']}, codec {r['codec']}, placement {r['placement']}\n"
        f"{r['windows']} windows of {r['window_tokens']} tokens every {r['stride_tokens']}, "
        f"n = {r['n']} tokens ({r['scored_bytes']} bytes, {r['scored_words']} words); "
        "± is one standard error over windows"
    )
    layers = "\n".join(
        f"attended fraction per layer, {r['policy']}: " + " ".join(f"{x:.3f}" for x in r["attended_frac_per_layer"])
        for r in records
    )
    return f"{above}\n{common.table(head, rows)}\n{layers}"


if __name__ == "__main__":
    sys.exit(common.run(main))
