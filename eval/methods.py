"""The methods that are here, what each needs and keeps, and which of them go together: read from the registries.

    python -m eval.methods
    python -m eval.methods --json

The first line of a method's module says what it does and names its paper. `scores`: it reads the attention weights of past
queries; `query`: it reads the next query; `evicts`: it deletes what it leaves out. Pairs are tried on the configuration of
the bundled model with a prompt of 128 tokens and 128 new ones, without budgets; no weights are read. For a pair that does
not run the table shows the reason.
"""

import re
import sys
from collections.abc import Sequence
from types import MappingProxyType

from absl import flags

from alisa_jax import codecs, placement, policies, spec
from alisa_jax.calibration import Calibration
from alisa_jax.models import checkpoint
from alisa_jax.policies.base import Policy
from eval.modelled import shapes
from eval.script import common
from eval.script.common import UserError
from eval.speed import systems

TOKENS, DTYPE = 128, "float32"
REGISTRIES = MappingProxyType(
    {"policy": policies.POLICIES, "codec": codecs.CODECS, "controller": placement.CONTROLLERS}
)


def main(argv: Sequence[str]) -> None:
    """flags -> registries -> tables."""
    values = flags.FlagValues()
    where = {"flag_values": values}
    flags.DEFINE_bool("json", False, "One record a method and a pair on stdout; the tables on stderr.", **where)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", **where)
    common.parse(values, argv, __doc__)
    found = methods()
    tried = pairs()
    common.emit(found + tried, report(found, tried), values.json)


def example(kind: type) -> str:
    """A spec of the class `kind`, at 80 % where it has a sparsity."""
    one = kind(kv_sparsity=0.8) if "kv_sparsity" in getattr(kind, "__dataclass_fields__", {}) else kind()
    return next(spec.to_text(one, r) for r in REGISTRIES.values() if kind in r.values())


def methods() -> list[dict]:
    """A record for every policy, codec and controller."""
    found = []
    for sort, registry in REGISTRIES.items():
        for name, kind in registry.items():
            text = sys.modules[kind.__module__].__doc__
            signature, does = re.match(r"`(.*?)`: (.*)", text.split("\n\n")[0].replace("\n", " ")).groups()
            record = {"kind": sort, "name": name, "spec": signature, "does": does.rstrip(".")}
            record["papers"] = sorted(set(re.findall(r"arXiv (\d{4}\.\d{5})", text)))
            if sort == "policy":
                one = policies.parse(example(kind))
                record["scores"] = kind.observe is not Policy.observe
                record |= {"query": one.needs_query, "evicts": one.evicts and one.selects, "routes": list(one.routes)}
            found.append(record)
    return found


def pairs() -> list[dict]:
    """Every policy with every codec, and every policy with every controller; `refused` is None or a sentence."""
    config = shapes.config("bundled")
    calibration = Calibration.load(checkpoint.BUNDLED / checkpoint.CALIBRATION)
    work = systems.Work(config, DTYPE, (TOKENS,) * 2, TOKENS, calibration=calibration)
    others = [("codec", name, f"resident | {{}} | {example(kind)}") for name, kind in codecs.CODECS.items()]
    others += [("controller", n, f"{example(kind)} | {{}} | raw") for n, kind in placement.CONTROLLERS.items()]
    tried = []
    for name, kind in policies.POLICIES.items():
        for sort, other, text in others:
            system = systems.parse(text.format(example(kind)))
            try:
                if sort == "codec":  # what an engine takes; the cache is all on the device
                    refused = systems.layers(system, config, DTYPE, work.calibration) and None
                else:
                    refused = systems.refusal(system, work)
            except UserError as error:
                refused = str(error).removeprefix(f"--system: {system}: ")
            tried.append({"kind": "pair", "policy": name, "with": sort, "name": other, "refused": refused})
    return tried


def report(found: Sequence[dict], tried: Sequence[dict]) -> str:
    """The tables for people; sentences stand below, each once."""
    words, parts = {True: "yes", False: "-"}, []
    for sort in dict.fromkeys(r["kind"] for r in found):
        mine = [r for r in found if r["kind"] == sort]
        more = ("scores", "query", "evicts") if sort == "policy" else ()
        head = (sort, *more, "arXiv", "what it does")
        rows = [(r["name"], *(words[r[k]] for k in more), " ".join(r["papers"]) or "-", r["does"]) for r in mine]
        parts.append(common.table(head, rows, left=len(head)))
    sentences: list[str] = []
    for sort in ("codec", "controller"):
        names = list(dict.fromkeys(r["name"] for r in tried if r["with"] == sort))
        rows = []
        for policy in dict.fromkeys(r["policy"] for r in tried):
            row = [policy]
            for name in names:
                refused = next(
                    r["refused"] for r in tried if (r["policy"], r["with"], r["name"]) == (policy, sort, name)
                )
                if refused is not None and refused not in sentences:
                    sentences.append(refused)
                row.append("runs" if refused is None else f"no ({sentences.index(refused) + 1})")
            rows.append(row)
        parts.append(common.table((f"policy with {sort}", *names), rows))
    if sentences:
        parts.append("\n".join(f"({i}) {sentence}" for i, sentence in enumerate(sentences, start=1)))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(common.run(main))
