"""Continue prompts with a model under a KV policy: greedy or sampled, one by one or a file of them.

    python -m eval.generate --prompt='def fibonacci(n):' --max_new_tokens=64 --stream
    python -m eval.generate --model=FOLDER --chat --system='Answer in one word.' --prompt='What is the capital of France?'
    python -m eval.generate --prompts_file=prompts.jsonl --policy='swa(kv_sparsity=0.8)' --temperature=0.8 --top_p=0.95 \\
        --stop=$'\\n\\n' --out=completions.jsonl

A prompts file is .txt (one prompt a line; empty lines are left out) or .jsonl (one object a line with a text "prompt" and
perhaps an "id"). Prompts run `--batch` at a time, in the order of the file. A sequence ends with one of the model's stop
tokens, with a `--stop` string (which is not part of the completion), or after `--max_new_tokens`. Prompt number i draws
from its own key, made of `--seed` and i: neither the batch nor a resumed run changes what it gets. With `--chat` a prompt is
what a user says, and the model's chat template makes a text of it, behind what `--system` says (extra `chat`).

`--placement` says where the cache lives, within `--device_kv_bytes` and `--host_kv_bytes`:

    python -m eval.generate --prompts_file=prompts.txt --policy='swa(kv_sparsity=0.8)' --placement=alisa \\
        --device_kv_bytes=0.5x

Each finished prompt is one record: `completion`, its `tokens`, `finish_reason` and the settings. `prefill_s`, `decode_s` and
`batch_tokens_per_s` (new tokens of all sequences / (prefill_s + decode_s)) are those of its batch of `batch` sequences; they
include compilation where `compiles` is not 0. `load_bytes`, `store_bytes`, `recomputed_tokens`, the peaks of bytes on both
sides, the steps `p1` and `p2` and the `groups` are those of the batch as well (`alisa_jax/engine/report.py`).
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from eval.modelled import machines
from eval.script import common, hashes, inputs, measure
from eval.script.common import UserError

HEAD_PROMPT, HEAD_COMPLETION = "--- prompt", "--- continuation"


@dataclass(frozen=True)
class Prompt:
    """One prompt; `index` is its place among the prompts of the run, `id` the one its file gives or None."""

    index: int
    id: str | None
    text: str


def config(argv: Sequence[str]) -> tuple[flags.FlagValues, tuple[Prompt, ...], object]:
    """The flags, checked as far as they can be without the model, the prompts, and an `alisa_jax.Sampling`.

    Raises UserError.
    """
    values = common.shared_flags(model="bundled", text="", out=None)
    del values.text  # prompts take its place
    where = {"flag_values": values}
    flags.DEFINE_string("prompt", None, "One prompt.", **where)
    flags.DEFINE_string("prompts_file", None, "A .txt or .jsonl file of prompts.", **where)
    flags.DEFINE_string("policy", "dense", "Policy spec.", **where)
    flags.DEFINE_string("codec", "raw", "How K and V are stored.", **where)
    flags.DEFINE_integer("max_new_tokens", 64, "New tokens of each prompt at most.", 1, **where)
    flags.DEFINE_float("temperature", 0.0, "Divides the logits; 0: greedy.", **where)
    flags.DEFINE_integer("top_k", 0, "Draw from so many tokens at most; 0: from all.", **where)
    flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens that hold this probability; 1: from all.", **where)
    flags.DEFINE_multi_string("stop", [], "A text that ends a completion; may be given several times.", **where)
    flags.DEFINE_bool("chat", False, "Each prompt is a message of a user, by the model's chat template.", **where)
    flags.DEFINE_string("system", None, "With --chat: the message of the system, before that of the user.", **where)
    flags.DEFINE_integer("batch", 8, "Prompts that run together.", 1, **where)
    flags.DEFINE_bool("stream", False, "Show the completion of --prompt as it comes.", **where)
    common.placement_flags(values)
    common.dtype_flag(values)
    common.impl_flag(values)
    common.parse(values, argv, __doc__)
    if (values.prompt is None) == (values.prompts_file is None):
        raise UserError("give one of --prompt and --prompts_file, and not both")
    if values.stream and (values.prompt is None or values.json):
        raise UserError("--stream shows one text on stdout: it goes with --prompt, and not with --json")
    if values.system is not None and not values.chat:
        raise UserError("--system is a message of a chat: it goes with --chat")
    if not 0 <= values.seed < 2**32:
        raise UserError(f"--seed must be in 0..{2**32 - 1}, got {values.seed}")
    if values.model.startswith("random:"):
        raise UserError(f"--model: {values.model} has no tokenizer, which a prompt needs")
    if values.prompt is not None:
        prompts = (Prompt(0, None, _utf8(values.prompt, "--prompt")),)
    else:
        prompts = read(values.prompts_file)
    if values.system is not None:
        values.system = _utf8(values.system, "--system")
    values.policy = inputs.policy(values.policy)
    values.codec = inputs.codec(values.codec)
    values.placement = inputs.placement(values)
    values.stop = _stops(values.stop)
    sampling = _sampling(values.temperature, values.top_k, values.top_p)
    return values, prompts, sampling


def settings(values) -> dict:
    """The fields of a record that say how its completion is made."""
    names = "max_new_tokens temperature top_k top_p".split()
    return {
        "policy": values.policy,
        "codec": values.codec,
        **common.placement_fields(values),
        **{name: getattr(values, name) for name in names},
        "stop": list(values.stop),
        "seed": values.seed,
    }


def chat_fields(values) -> dict:
    """What `--chat` adds to a cell: nothing, unless it was given."""
    said = {} if values.system is None else {"system": values.system}
    return {"chat": True} | said if values.chat else {}


def finished(results, cell: dict) -> dict | None:
    """The record of a cell; that of a chat is none of a text, though it holds all of its fields."""
    found = results.find(cell)
    same = found is not None and all(found.get(name) == cell.get(name) for name in ("chat", "system"))
    return found if same else None


def encode(model, text: str, values) -> list[int]:
    """Token ids of a prompt: of a text, or of a chat. Raises UserError for a model without a chat template."""
    if not values.chat:
        return model.encode(text)
    system = [] if values.system is None else [{"role": "system", "content": values.system}]
    try:
        return model.encode_chat([*system, {"role": "user", "content": text}])
    except ValueError as error:
        raise UserError(f"--chat: {str(error).removesuffix('.')}") from None


def read(path: str) -> tuple[Prompt, ...]:
    """The prompts of a file; raises UserError with the line that is wrong."""
    kind = Path(path).suffix
    if kind not in (".txt", ".jsonl"):
        raise UserError(f"--prompts_file must end in .txt or .jsonl, got {path!r}")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the prompts {path!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the prompts {path!r} are not UTF-8: byte {error.start} cannot be decoded") from None
    lines = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"the prompts file {path!r} is empty")
    if kind == ".txt":
        return tuple(Prompt(i, None, line) for i, (_, line) in enumerate(lines))
    return tuple(_object(i, line, f"{path!r}, line {n}") for i, (n, line) in enumerate(lines))


def _object(index: int, line: str, where: str) -> Prompt:
    try:
        given = json.loads(line)
    except ValueError:
        given = None
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise UserError(f'{where}: not an object with a text "prompt"')
    name = given.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
        raise UserError(f"{where}: an id is a text or a whole number, got {name!r:.60}")
    return Prompt(index, None if name is None else str(name), _utf8(given["prompt"], where))


def _utf8(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the prompt is not UTF-8 at character {error.start}") from None
    return text


def _sampling(temperature, top_k, top_p):
    from alisa_jax import Sampling

    try:
        return Sampling(temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def _stops(given):
    from alisa_jax.engine import stops

    try:
        return stops.check_stops(given)
    except ValueError as error:
        raise UserError(f"--stop: {error}") from None


def main(argv: Sequence[str], load: Callable = inputs.load, make_engine: Callable = inputs.make_engine) -> None:
    """flags -> config -> load -> loop -> records. The arguments beside `argv` are for tests."""
    values, prompts, sampling = config(argv)
    inputs.check_impl(values.attention_impl)
    card = inputs.card(values.model, values.dtype)
    if values.max_new_tokens >= card.max_positions and not inputs.endless(values.policy):
        raise UserError(
            f"--max_new_tokens must be below {card.max_positions}, the context of {card.name}, got {values.max_new_tokens}"
        )
    inputs.check_policy(values.policy, values.max_new_tokens + 1)
    results = inputs.results(values.out)
    model = inputs.model(inputs.loading(load, values.dtype), values.model)
    inputs.tokenizer(model)
    encoded = [encode(model, p.text, values) for p in prompts]
    cells = [
        {
            "script": "eval.generate",
            **card.fields(),
            **settings(values),
            "prompt_index": p.index,
            "prompt_id": p.id,
            "prompt": p.text,
            **chat_fields(values),
            "ids_sha256": hashes.of_ids([ids]),
            **common.impl_field(values.attention_impl),
        }
        for p, ids in zip(prompts, encoded, strict=True)
    ]
    records = [None if results is None or values.rerun else finished(results, cell) for cell in cells]
    waiting = [i for i, found in enumerate(records) if found is None]
    reused = len(cells) - len(waiting)

    if waiting:
        placed = common.placement_fields(values)
        engine = inputs.engine(make_engine, model, values.policy, values.codec, values.attention_impl, placed)
        check(engine, {i: encoded[i] for i in waiting}, values.max_new_tokens)
        groups = [waiting[i : i + values.batch] for i in range(0, len(waiting), values.batch)]
        if placed != common.RESIDENT:
            check_placed(engine, [[encoded[i] for i in group] for group in groups], values.max_new_tokens)
        if values.stream:
            print(HEAD_PROMPT, prompts[0].text, HEAD_COMPLETION, sep="\n", flush=True)
        for group in tqdm(groups, desc="batches", disable=True if values.stream else None, leave=False):
            made, wall_s, how = generate(engine, {i: encoded[i] for i in group}, values, sampling, model.eos_ids)
            for i, found in zip(group, made, strict=True):
                records[i] = inputs.record(results, cells[i], found, wall_s, how)

    if reused:
        common.say(f"{reused} of {len(cells)} prompts were already in {values.out}; --rerun runs them again")
    shown_already = values.stream and bool(waiting)
    common.emit(records, summary(records) if shown_already else report(records), values.json)


def check(engine, encoded: dict[int, list[int]], new: int) -> None:
    """Raise UserError where a prompt (by its index) is one that the engine cannot continue by `new` tokens."""
    for i, ids in encoded.items():
        try:
            engine.validate_prompts(np.array([len(ids)]), new)
        except ValueError as error:
            raise UserError(f"prompt {i} of {len(ids)} tokens with --max_new_tokens={new}: {error}") from None


def check_placed(engine, groups: Sequence[Sequence[list[int]]], new: int) -> None:
    """Raise UserError where the placement of `engine` refuses one of `groups` of prompts."""
    for prompts in groups:
        try:
            engine.check_generate(prompts, new)
        except ValueError as error:
            raise UserError(f"--placement: {error}") from None


def generate(engine, prompts: dict[int, list[int]], values, sampling, eos_ids):
    """Run one batch of prompts by index; returns the values of each one's record, the seconds, and how they were got."""
    from alisa_jax.engine import sequence_keys

    def show(_, piece: str) -> None:
        print(piece, end="", flush=True)

    try:
        made = engine.generate(
            list(prompts.values()),
            values.max_new_tokens,
            eos_ids=eos_ids,
            progress=not values.stream,
            sampling=sampling,
            key=sequence_keys(values.seed, list(prompts)),
            stop=values.stop,
            on_text=show if values.stream else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if values.stream:
        print(flush=True)
    counts = [len(tokens) for tokens in made.tokens]
    rate = sum(counts) / (made.prefill_s + made.decode_s)
    found = [
        {
            "completion": completion,
            "tokens": tokens,
            "finish_reason": reason,
            "n": len(tokens),
            "prompt_tokens": len(prompt),
            "nats_per_token": -math.fsum(logprobs) / len(tokens),
            "prefill_s": made.prefill_s,
            "decode_s": made.decode_s,
            "batch_tokens_per_s": rate,
            **measure.moved(made.placement),
        }
        for prompt, completion, tokens, reason, logprobs in zip(
            prompts.values(), made.completions, made.tokens, made.finish_reasons, made.logprobs, strict=True
        )
    ]
    ran = {"implementation": engine.implementation, "implementation_reason": engine.implementation_reason}
    how = {**ran, "compiles": made.compiles, "warmup": 0, "repeats": 1}
    return found, made.wall_s, {**how, "batch": len(prompts)}


def report(records: Sequence[dict]) -> str:
    """What people read: each prompt and, apart from it, its continuation; then `summary`."""
    parts = []
    for r in records:
        name = "" if len(records) == 1 else f" {r['prompt_index']}"
        name += "" if r["prompt_id"] is None else f" ({r['prompt_id']})"
        end = f" ({r['n']} tokens, {r['finish_reason']})"
        parts += [f"{HEAD_PROMPT}{name}", r["prompt"], f"{HEAD_COMPLETION}{name}{end}", r["completion"]]
    return "\n".join([*parts, summary(records)])


def summary(records: Sequence[dict]) -> str:
    """The settings and the counts that all prompts share."""
    r = records[0]
    how = "greedy"
    placed = "" if r["placement"] == "resident" else f"placement {r['placement']}"
    if r.get("store_bytes"):
        moved = " loaded, ".join(machines.bytes_text(r[f"{side}_bytes"]) for side in ("load", "store"))
        placed += f" ({moved} stored by the first batch)"
    placed = f"{placed}, " if placed else ""
    if r["temperature"]:
        how = f"temperature {r['temperature']:g}, top_k {r['top_k']}, top_p {r['top_p']:g}, seed {r['seed']}"
    n = sum(r["n"] for r in records)
    ends = [r["finish_reason"] for r in records]
    ended = ", ".join(f"{ends.count(reason)} {reason}" for reason in dict.fromkeys(ends))
    rates = [r["batch_tokens_per_s"] for r in records]
    rate = " to ".join(dict.fromkeys(f"{x:.1f}" for x in (min(rates), max(rates))))
    compiled = "with" if any(r["compiles"] for r in records) else "without"
    return (
        f"---\n{r['model']}, policy {r['policy']}, codec {r['codec']}, {placed}{how}\n"
        f"prompts: {len(records)}, new tokens: {n}, ended by: {ended}, "
        f"tokens/s of a batch: {rate} {compiled} compilation"
    )


if __name__ == "__main__":
    sys.exit(common.run(main))
