"""What each choice inside SWA is worth: a table, a figure and records of one config.

    python -m eval.ablations                                  all groups of configs/tables/swa_ablations.py
    python -m eval.ablations --only=window,codec              some of them
    python -m eval.ablations --config=FILE --out=RECORDS      others; FILE defines CONFIG as that file does

Every cell scores the same batch (`eval/quality/paired.py`): windows of held-out standard library text (perplexity) and
generated recall episodes (accuracy). Differences are from the default SWA at the same sparsity, window by window and
episode by episode. The protocol is `decode`, token by token through the working set. It is also the faster one: at 80 %
sparsity `prefill_mask` computes every past token under its mask and takes 3 times as long.

Writes eval/results/swa_ablations.jsonl, one record per cell, and eval/results/swa_ablations.png (needs matplotlib). An
interrupted run continues where it stopped.
"""

import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from eval.drawing import quality
from eval.perplexity import PROTOCOLS
from eval.quality import paired
from eval.script import common, inputs
from eval.script.common import UserError
from eval.text import windows

RESULTS = Path(__file__).parent / "results"
CONFIG = "configs/tables/swa_ablations.py"


@dataclass(frozen=True)
class Variant:
    """One point of a group: the fields of swa(...) that it sets, and its codec."""

    group: str
    label: str
    options: tuple[tuple[str, object], ...]
    codec: str

    @property
    def is_default(self) -> bool:
        return (self.policy(0.5), self.codec) == (inputs.policy("swa(kv_sparsity=0.5)"), "raw")

    def policy(self, sparsity: float) -> str:
        """The spec of its policy; raises UserError."""
        pairs = (f"{name}={str(value).lower()}" for name, value in (("kv_sparsity", f"{sparsity:g}"), *self.options))
        return inputs.policy(f"swa({','.join(pairs)})")


@dataclass(frozen=True)
class Table:
    """A config, read and checked."""

    sizes: paired.Sizes
    sparsities: tuple[float, ...]
    variants: tuple[Variant, ...]


def read(path: str, only: Sequence[str] = ()) -> Table:
    """The table of a config file, or the groups `only` of it; raises UserError in one sentence."""
    if not Path(path).is_file():
        raise UserError(f"--config: no config at {path!r}")
    config = runpy.run_path(path).get("CONFIG")
    try:
        groups = {str(group): dict(variants) for group, variants in config["groups"].items()}
        sizes, sparsities = paired.Sizes(**config["sizes"]), tuple(float(s) for s in config["sparsities"])
        variants = [
            Variant(
                group,
                label,
                tuple((name, value) for name, value in fields.items() if name != "codec"),
                inputs.codec(fields.get("codec", "raw")),
            )
            for group, members in groups.items()
            for label, fields in members.items()
        ]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"--config: {path!r} does not define a CONFIG of sizes, sparsities and groups: {error}"
        ) from None
    unknown = [name for name in only if name not in groups]
    if unknown:
        raise UserError(f"--only: unknown group {unknown[0]!r}; known: {', '.join(groups)}")
    chosen = tuple(v for v in variants if v.group in only or not only)
    without = [g for g in groups if not any(v.is_default for v in variants if v.group == g)]
    if without or not sparsities:
        what = f"a default in the group {without[0]!r}, to compare with" if without else "sparsities"
        raise UserError(f"--config: {path!r} needs {what}")
    for variant in chosen:
        inputs.check_codec(variant.codec, sizes.shortest, "windows and episodes")
        for sparsity in sparsities:
            inputs.check_policy(variant.policy(sparsity), sizes.context_tokens)
    return Table(sizes, sparsities, chosen)


def main(argv: Sequence[str], load: Callable = inputs.load, make_engine: Callable = inputs.make_engine) -> None:
    """flags -> config -> load -> loop -> records. The arguments beside `argv` are for tests."""
    setup = common.shared_flags("bundled", windows.BUNDLED, str(RESULTS / "swa_ablations.jsonl"))
    where = {"flag_values": setup}
    flags.DEFINE_string("config", CONFIG, "Python file that defines CONFIG.", **where)
    flags.DEFINE_list("only", [], "Groups to run, comma-separated. Default: all.", **where)
    flags.DEFINE_enum("protocol", "decode", PROTOCOLS, "How the policy is applied.", **where)
    flags.DEFINE_string("figure", None, "PNG file. Default: --out with the ending .png.", **where)
    paired.jobs_flag(setup)
    common.dtype_flag(setup)
    common.parse(setup, argv, __doc__)
    table = read(setup.config, setup.only)
    source = windows.read(setup.text)
    card = inputs.card(setup.model, setup.dtype)
    results = inputs.results(setup.out)
    sample = paired.draw(inputs.loading(load, setup.dtype), setup.model, card, source, table.sizes, setup.seed)
    points = {("dense", "raw", 0.0): None}
    points |= {(v.policy(s), v.codec, s): None for s in table.sparsities for v in table.variants}
    cells = [
        {
            "script": "eval.ablations",
            "kv_sparsity": sparsity,
            "policy": policy,
            "codec": codec,
            "protocol": setup.protocol,
            **sample.fields,
        }
        for policy, codec, sparsity in points
    ]
    found, reused, interrupted = paired.run(cells, sample, make_engine, results, rerun=setup.rerun, jobs=setup.jobs)
    records = {(r["policy"], r["codec"], r["kv_sparsity"]): r for r in found if r is not None}
    if reused:
        common.say(f"{reused} of {len(records)} cells were already in {setup.out}; --rerun measures them again")
    text = report(records, table) if records else "no cell was finished"
    common.emit(records.values(), text, setup.json)
    if interrupted:
        raise KeyboardInterrupt
    figure = Path(setup.figure) if setup.figure else Path(setup.out).with_suffix(".png")
    common.say(quality.ablations(panels(records, table), records["dense", "raw", 0.0], figure))


def panels(records: Mapping[tuple[str, str, float], dict], table: Table) -> dict[float, list]:
    """For each sparsity (variant, its record, record of the default) of every variant; a missing record is {}."""

    def of(variant: Variant, sparsity: float) -> dict:
        return records.get((variant.policy(sparsity), variant.codec, sparsity), {})

    default = next(v for v in table.variants if v.is_default)
    return {s: [(v, of(v, s), of(default, s)) for v in table.variants] for s in table.sparsities}


def report(records: Mapping[tuple[str, str, float], dict], table: Table) -> str:
    """The tables for people, one for each sparsity; a cell that is missing is `-`."""
    first = next(iter(records.values()))
    dense = records.get(("dense", "raw", 0.0), {})
    head = ["group", "variant", "token ppl", "nats from default", "recall", "points from default"]
    head += ["attended", "KV B/tok", "stats B/tok", "clipped"]
    parts = [
        f"SWA on {first['model']}, {first['data']} ({first['data_sha256'][:12]}), protocol {first['protocol']}: "
        f"{first['windows']} windows of {first['window_tokens']}\n"
        f"tokens (n = {first['n']}) and {first['recall_episodes']} recall episodes (n = {first['recall_n']} answers). "
        f"Dense: perplexity {common.number(dense.get('token_perplexity'))}, recall "
        f"{common.number(dense.get('recall_accuracy_frac'), '.1f', 100)} %.\n"
        "± is one standard error, of differences that of the paired difference, * above two of them. Recall, attended\n"
        "and clipped in %, recall's differences in points."
    ]
    for sparsity in table.sparsities:
        rows, last = [], None
        for variant, r, default in panels(records, table)[sparsity]:
            pairs = [
                paired.difference(r, default, metric) if r and default and not variant.is_default else None
                for metric in paired.METRICS
            ]
            rows.append(
                [
                    "" if variant.group == last else variant.group,
                    variant.label + (" (default)" if variant.is_default else ""),
                    common.number(r.get("token_perplexity"), ".3f", 1, r.get("stderr")),
                    paired.show(pairs[0], ".4f"),
                    common.number(r.get("recall_accuracy_frac"), ".1f", 100, r.get("recall_accuracy_frac_stderr")),
                    paired.show(pairs[1], ".1f", 100),
                    common.number(r.get("attended_frac"), ".1f", 100),
                    common.number(r.get("kv_bytes_per_token"), ".0f"),
                    common.number(r.get("stats_bytes_per_token"), ".0f"),
                    "-" if variant.codec == "raw" else common.number(r.get("clipped_frac"), ".3f", 100),
                ]
            )
            last = variant.group
        parts.append(f"KV sparsity {100 * sparsity:g} %\n{common.table(head, rows, left=2)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(common.run(main))
