"""Attention under KV policies: sparsity by step and layer, what is missed, turnover, and rank correlation with dense.

    python -m eval.sparsity --policy='swa(kv_sparsity=0.8)' --policy='local(kv_sparsity=0.8)' --plot=attention.png
    python -m eval.sparsity --model=FOLDER --text=FILE --windows=8 --context=378 --skip=128 --out=FILE --json
    python -m eval.sparsity --policy='swa(kv_sparsity=0.8)' --windows=1 --context=64 --npz=maps.npz --maps

Windows of `--context` tokens are spread evenly over the text; each runs alone from an empty cache. Row i attends what the
policy selects after the rows before it (protocol `prefill_mask`, which gives the numbers of decoding token by token). Dense
is always measured, as the reference. `eval/quality/attention_measures.py` defines the measures: the share of weights below
1 % of the row's maximum, over all entries, over the kept ones, and in rows averaged over heads; the dense attention mass
that a policy misses; tokens that enter the selection; the weight on the first token; accumulated scores and their Spearman
correlation with dense, mean over layers. ± is one standard error over windows. Accumulated scores count all rows; the other
measures leave out the first `--skip` rows of a window, so step 1 is row `--skip`.

`--npz` writes the arrays, so it measures every policy again. Policy number p of `policies` [n] has, over `tokens` [B, T],

    p_sparsity, p_sparsity_kept, p_sparsity_pooled, p_attended, p_missed, p_entered, p_first_token, p_received
                                                                                                [L, B, T] float64
    p_first_map [L, B, F, F] float64: weights among the first F = 16 tokens, mean over heads
    p_weights, p_dense [L, B, N, T, T] float32, p_kept [L, B, P, T, T] bool                     with --maps

The maps are B * T * T * (8 * N + P) bytes a layer and policy. Nothing is drawn at random: `--seed` is recorded only.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags

from alisa_jax.analysis.attention_maps import attentions
from eval.drawing import attention
from eval.quality import attention_measures
from eval.script import common, hashes, inputs, measure, resume, tables
from eval.script.common import UserError
from eval.text import windows

DENSE = "dense"
FIRST_TOKENS = 16  # of the first window, whose maps are in every record: what Figure 5 shows
RHOS = ("rho_by_id", "rho_by_occurrence", "rho_by_position")
GROUP = 4  # windows that run together


@dataclass(frozen=True)
class Sizes:
    """How much is looked at; `skip_tokens`: rows at the start of a window that are left out."""

    context_tokens: int = 384
    windows: int = 8
    skip_tokens: int = 0

    @classmethod
    def of(cls, config: Mapping) -> "Sizes":
        """The sizes in QUICK or FULL of a figure's config."""
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True, eq=False)
class Sample:
    """A model, and the windows of a text that all policies run on."""

    model: object
    text: windows.Text
    plan: Sequence[windows.Window]
    batch: Sequence[Sequence[int]]


def check(setup: resume.Setup, sizes: Sizes, policies: Iterable[str], codec: str = "raw") -> None:
    """Raise UserError for what cannot run, before a model is loaded: text, tokenizer, sizes, policies, codec."""
    card, folder = setup.card(), Path(setup.model)
    if card.sha256 is None or (folder.is_dir() and not (folder / "tokenizer.json").exists()):
        raise UserError(f"--model: {card.name} has no tokenizer, which a text needs")
    inputs.window(sizes.context_tokens, None, card, sizes.context_tokens)
    if not 0 <= sizes.skip_tokens < sizes.context_tokens:
        raise UserError(f"--skip must be in 0..{sizes.context_tokens - 1}, below the context, got {sizes.skip_tokens}")
    for policy in policies:
        inputs.check_policy(inputs.policy(policy), sizes.context_tokens)
    inputs.check_codec(codec, sizes.context_tokens, "windows")


def draw(setup: resume.Setup, source: windows.Source, sizes: Sizes) -> Sample:
    """Load the model and cut the text; raises UserError."""
    context, model = sizes.context_tokens, inputs.model(setup.load, setup.model)
    bos = model.bos_id is not None
    text, plan = windows.sample(source, inputs.tokenizer(model), context, context - 1, sizes.windows, bos)
    return Sample(model, text, plan, [windows.sequence(text, w, model.bos_id) for w in plan])


def collect(
    setup: resume.Setup,
    sizes: Sizes,
    policies: Sequence[str],
    codec: str = "raw",
    group: int = GROUP,
    keep: Callable[[str, dict], None] | None = None,
) -> resume.Found:
    """The record of dense and of every policy, those on file taken from there.

    keep(policy, arrays): called with what was measured, arrays of `look` with their maps; nothing is then taken from file.
    """
    source = windows.read(setup.text)
    sample = draw(setup, source, sizes)
    fields = {
        "script": "eval.sparsity",
        **setup.card().fields(),
        **source.fields,
        "ids_sha256": hashes.of_ids(sample.batch),
        "codec": inputs.codec(codec),
        "placement": "resident",
        "protocol": "prefill_mask",
        "window_tokens": sizes.context_tokens,
        "windows_asked": sizes.windows,
        "skip_tokens": sizes.skip_tokens,
        "seed": setup.seed,
    }

    def run(cell: dict, dense: dict | None = None) -> tuple[dict, dict]:
        engine = inputs.engine(setup.make_engine, sample.model, cell["policy"], cell["codec"])
        arrays, logprobs = look(engine, sample.batch, group, with_maps=keep is not None)
        if keep is not None:
            keep(cell["policy"], {**arrays, "tokens": np.asarray(sample.batch, np.int32)})
        return values(sample, sizes, arrays, logprobs, dense), {"implementation": "xla:masked", "repeats": 1}

    setup = setup if keep is None else dataclasses.replace(setup, rerun=True)
    dense = resume.collect(setup, [{**fields, "policy": DENSE}], run, "dense")
    others = [text for text in dict.fromkeys(map(inputs.policy, policies)) if text != DENSE]
    cells = [{**fields, "policy": policy} for policy in others]
    found = resume.collect(setup, cells, lambda cell: run(cell, dense.records[0]), "policies")
    return resume.Found(dense.records + found.records, dense.reused + found.reused)


def look(engine, batch, group: int = GROUP, with_maps: bool = False) -> tuple[dict, list[np.ndarray]]:
    """Arrays [L, B, T] of `attention_measures.batch` on sequences, `group` at a time, and their log-probabilities.

    `first_map` [L, B, F, F] is the weights among the first `FIRST_TOKENS` tokens, mean over heads; with_maps: also `weights`
    and `dense` [L, B, N, T, T] and `kept` [L, B, P, T, T]. With several groups all sequences have one length.
    """
    groups, logprobs = [], []
    for first in range(0, len(batch), group):
        layers: list[dict] = []

        def see(layer, maps, length, layers=layers):
            found = attention_measures.batch(*maps, length)
            found["first_map"] = maps.weights[:, :, :FIRST_TOKENS, :FIRST_TOKENS].mean(axis=1, dtype=np.float64)
            layers.append(found | (maps._asdict() if with_maps else {}))

        logprobs += attentions(engine, batch[first : first + group], see)
        groups.append({name: np.stack([layer[name] for layer in layers]) for name in layers[0]})
    return {name: np.concatenate([one[name] for one in groups], axis=1) for name in groups[0]}, logprobs


def values(sample: Sample, sizes: Sizes, arrays: Mapping, logprobs, dense: dict | None) -> dict:
    """The values of a record; `dense` is the record of dense attention, None for dense itself."""
    tokens = np.asarray(sample.batch)
    received = np.array(
        attention_measures.short(arrays["received"].mean(axis=0), digits=7)
    )  # more is rounding of float32
    rho = {} if dense is None else attention_measures.correlations(received, np.array(dense["received"]), tokens)
    maps = arrays["first_map"][:, 0]
    return {
        **measure.perplexities(sample.text, sample.plan, logprobs),
        **attention_measures.summary(arrays, sizes.skip_tokens),
        **rho,
        "received": received,
        "first_map": [[attention_measures.short(row[: i + 1]) for i, row in enumerate(one)] for one in maps],
        **({"tokens": tokens, "first_texts": texts(sample, tokens[0, : maps.shape[-1]])} if dense is None else {}),
    }


def at_step(record: Mapping, name: str, step: int) -> tuple[float | None, float | None]:
    """A measure at step 1, 2, ... and its standard error; None where the windows end before."""
    found = (record[f"{name}_by_step{end}"] for end in ("", "_stderr"))
    return tuple(None if row is None or step > len(row) else row[step - 1] for row in found)


def caption(record: Mapping, counted: bool = True) -> str:
    """The sample and the device in one sentence or two, for a table; counted: the first rows were left out."""
    after = f", rows after the first {record['skip_tokens']}" if counted and record["skip_tokens"] else ""
    return (
        f"{record['model']} on {record['data']} ({record['data_sha256'][:12]}), {record['windows']} windows of "
        f"{record['window_tokens']} tokens{after}; {tables.device([record])}."
    )


def texts(sample: Sample, ids: np.ndarray) -> list[str]:
    """The text of each token by itself."""
    return [sample.model.tokenizer.decode([int(i)], skip_special_tokens=False) for i in ids]


def main(argv: Sequence[str], load: Callable = inputs.load, make_engine: Callable = inputs.make_engine) -> None:
    """flags -> config -> load -> loop -> records. The arguments beside `argv` are for tests."""
    flag = common.shared_flags(model="bundled", text=windows.BUNDLED, out=None)
    at_least = {"lower_bound": 1, "flag_values": flag}
    flags.DEFINE_multi_string("policy", ["swa(kv_sparsity=0.8)"], "Policy spec; several times.", flag_values=flag)
    flags.DEFINE_string("codec", "raw", "How K and V are stored.", flag_values=flag)
    flags.DEFINE_integer(
        "context", None, f"Window, tokens. Default: {Sizes.context_tokens}, or the model's.", **at_least
    )
    flags.DEFINE_integer("windows", Sizes.windows, "Windows of the text.", **at_least)
    flags.DEFINE_integer("skip", 0, "First rows of a window that are not counted.", 0, flag_values=flag)
    flags.DEFINE_integer("batch", GROUP, "Windows that run together; no result depends on it.", **at_least)
    flags.DEFINE_string("npz", None, "File for the arrays.", flag_values=flag)
    flags.DEFINE_bool("maps", False, "Attention maps in --npz as well.", flag_values=flag)
    flags.DEFINE_string("plot", None, "PNG file.", flag_values=flag)
    common.dtype_flag(flag)
    common.parse(flag, argv, __doc__)
    if flag.maps and not flag.npz:
        raise UserError("--maps writes attention maps to the file that --npz names, and --npz was not given")
    results = inputs.results(flag.out)
    load = inputs.loading(load, flag.dtype)
    setup = resume.Setup(
        flag.model, flag.text, "full", flag.seed, 1, flag.rerun, results, load, make_engine, dtype=flag.dtype
    )
    context = flag.context or min(Sizes.context_tokens, inputs.card(flag.model).max_positions)
    sizes = Sizes(context, flag.windows, flag.skip)
    policies = [inputs.policy(text) for text in flag.policy]
    check(setup, sizes, policies, inputs.codec(flag.codec))
    archive = Archive(Path(flag.npz), flag.maps) if flag.npz else None
    found = collect(setup, sizes, policies, flag.codec, flag.batch, archive and archive.add)
    if found.reused:
        common.say(
            f"{found.reused} of {len(found.records)} cells were already in {flag.out}; --rerun measures them again"
        )
    common.emit(found.records, report(found.records), flag.json)
    if archive:
        common.say(archive.write())
    if flag.plot:
        common.say(attention.overview(found.records, Path(flag.plot)))


class Archive:
    """Arrays of policies on their way to one npz file."""

    def __init__(self, path: Path, with_maps: bool):
        self.path, self.left_out = path, () if with_maps else ("weights", "dense", "kept")
        self.policies, self.arrays = [], {}
        if not path.parent.is_dir():
            raise UserError(f"--npz: there is no folder for {path.name!r}")

    def add(self, policy: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Note what was measured under `policy`."""
        at = len(self.policies)
        self.policies.append(policy)
        self.arrays["tokens"] = arrays["tokens"]
        kept = {name: x for name, x in arrays.items() if name not in ("tokens", *self.left_out)}
        self.arrays |= {f"{at}_{name}": x for name, x in kept.items()}

    def write(self) -> str:
        """Write the file, whole or not at all, and say so; raises UserError."""
        part = self.path.with_name(self.path.name + ".part")
        try:
            with open(part, "wb") as file:
                np.savez(file, policies=np.array(self.policies), **self.arrays)
            os.replace(part, self.path)
        except OSError as error:
            raise UserError(f"--npz: cannot write {self.path.name!r}: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)
        return f"arrays: {self.path}"


def report(records: Sequence[dict]) -> str:
    """The tables for people; the settings that all rows share stand above them."""
    head = [
        "policy",
        "token ppl",
        "attended",
        "sparsity",
        "of kept",
        "pooled",
        "missed",
        "entered",
        "first token",
        *RHOS,
    ]
    columns = (
        ("attended_frac", ".1f", 100, False),
        ("sparsity_frac", ".1f", 100, True),
        ("sparsity_kept_frac", ".1f", 100, True),
        ("sparsity_pooled_frac", ".1f", 100, True),
        ("missed_frac", ".1f", 100, True),
        ("entered_tokens", ".3f", 1, True),
        ("first_token_frac", ".1f", 100, False),
        *((name, ".3f", 1, True) for name in RHOS),
    )
    rows = []
    for r in records:
        row = [r["policy"], common.number(r["token_perplexity"], ".2f", stderr=r["stderr"])]
        for name, form, scale, with_error in columns:
            stderr = r.get(f"{name}_stderr") if with_error else None
            row.append(common.number(r.get(name), form, scale, stderr))
        rows.append(row)
    r = records[0]
    above = (
        f"{r['model']} on {r['data']} ({r['data_sha256'][:12]}), protocol {r['protocol']}, codec {r['codec']}; "
        f"{r['windows']} windows of {r['window_tokens']} tokens without their first {r['skip_tokens']} rows\n"
        "attended, sparsity (of all entries, of kept ones, of all in rows averaged over heads), missed mass and weight on "
        "the first token in %;\nentered: tokens per step, layer and sequence; rho: Spearman's, of the accumulated scores "
        "against dense; ± is one standard error over windows"
    )
    lines = [
        f"{what} per layer, {r['policy']}: " + " ".join(f"{100 * x:.1f}" for x in r[f"{name}_by_layer"])
        for what, name in (("sparsity, %,", "sparsity_frac"), ("missed mass, %,", "missed_frac"))
        for r in records
        if name == "sparsity_frac" or r["policy"] != DENSE
    ]
    return "\n".join([above, common.table(head, rows), *lines])


if __name__ == "__main__":
    sys.exit(common.run(main))
