"""The methods that are here, what each needs and keeps, and which of them go together: read from the registries.

    python -m eval.methods
    python -m eval.methods --json

The first line of a method's module says what it does and names its paper. `scores`: it reads the attention weights of past
queries; `query`: it reads the next query; `evicts`: it deletes what it leaves out. Pairs are tried on the configuration of
the bundled model with a prompt of 128 tokens and 128 new ones, without budgets; no weights are read. Controllers that
offload are set so that tokens leave the device all the same. For a pair that does not run the table shows the reason.
"""

import re
import sys
from collections.abc import Callable, Sequence
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
# under these, tokens leave the device whatever its budget is
LEAVING = MappingProxyType({"flexgen": "flexgen(cache_device_frac=0)", "alisa": "alisa(p1=0)"})
# further rows of the table of controllers: options by which it may differ from the policy's own row
OPTIONS = (
    "swa(kv_sparsity=0.8,refresh_every=8)",
    "streaming(kv_sparsity=0.8,positions=cache)",
    "strided(kv_sparsity=0.8,anchor=query)",
)
PLACED = ("dense", "swa(kv_sparsity=0.8)")  # the policies with which codecs are placed
PLAIN = MappingProxyType(
    {"skvq": "skvq(reorder=false)"}
)  # to place a codec its channels need no order, which takes a while


def main(argv: Sequence[str]) -> None:
    """flags -> registries -> tables."""
    values = flags.FlagValues()
    where = {"flag_values": values}
    flags.DEFINE_bool("json", False, "One record a method and a pair on stdout; the tables on stderr.", **where)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", **where)
    common.parse(values, argv, __doc__)
    found = methods()
    tried = pairs()
    moved = placed()
    common.emit(found + tried + moved, report(found, tried, moved), values.json)


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
    work = _work()
    tried = []
    for name, kind in policies.POLICIES.items():
        for codec, other in codecs.CODECS.items():
            system = systems.parse(f"resident | {example(kind)} | {example(other)}")
            # what an engine takes; the cache is all on the device
            refused = _refused(system, lambda one: systems.layers(one, work.config, DTYPE, work.calibration) and None)
            tried.append({"kind": "pair", "policy": name, "with": "codec", "name": codec, "refused": refused})
    rows = {name: example(kind) for name, kind in policies.POLICIES.items()} | {text: text for text in OPTIONS}
    for name, policy in rows.items():
        for controller in placement.CONTROLLERS:
            system = systems.parse(f"{offloading(controller)} | {policy} | raw")
            refused = _refused(system, lambda one: systems.refusal(one, work))
            tried.append({"kind": "pair", "policy": name, "with": "controller", "name": controller, "refused": refused})
    return tried


def placed() -> list[dict]:
    """Every codec under every controller, with each of the policies `PLACED`; `refused` as of `pairs`."""
    work = _work()
    tried = []
    for policy in PLACED:
        for name, kind in codecs.CODECS.items():
            for controller in placement.CONTROLLERS:
                system = systems.parse(f"{offloading(controller)} | {policy} | {PLAIN.get(name) or example(kind)}")
                refused = _refused(system, lambda one: systems.refusal(one, work))
                tried.append(
                    {"kind": "placed", "codec": name, "policy": policy, "controller": controller, "refused": refused}
                )
    return tried


def offloading(controller: str) -> str:
    """The spec of a controller under which tokens leave the device if they ever do."""
    return LEAVING.get(controller) or example(placement.CONTROLLERS[controller])


def _work() -> systems.Work:
    calibration = Calibration.load(checkpoint.BUNDLED / checkpoint.CALIBRATION)
    return systems.Work(shapes.config("bundled"), DTYPE, (TOKENS,) * 2, TOKENS, calibration=calibration)


def _refused(system: systems.System, attempt: Callable[[systems.System], str | None]) -> str | None:
    try:
        return attempt(system)
    except UserError as error:
        return str(error).removeprefix(f"--system: {system}: ")


def report(found: Sequence[dict], tried: Sequence[dict], moved: Sequence[dict]) -> str:
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
        cells = {(r["policy"], r["name"]): r["refused"] for r in tried if r["with"] == sort}
        parts.append(_grid(f"policy with {sort}", cells, sentences))
    cells = {(f"{r['codec']}, {r['policy']}", r["controller"]): r["refused"] for r in moved}
    parts.append(_grid("codec with controller", cells, sentences))
    if sentences:
        parts.append("\n".join(f"({i}) {sentence}" for i, sentence in enumerate(sentences, start=1)))
    return "\n\n".join(parts)


def _grid(title: str, cells: dict[tuple[str, str], str | None], sentences: list[str]) -> str:
    """A table of `cells` by row and column, each None or why not; adds new reasons to `sentences`, which are numbered."""
    rows = list(dict.fromkeys(key[0] for key in cells))
    columns = list(dict.fromkeys(key[1] for key in cells))
    sentences += [some for some in dict.fromkeys(cells.values()) if some is not None and some not in sentences]
    word = lambda refused: "runs" if refused is None else f"no ({sentences.index(refused) + 1})"
    return common.table((title, *columns), [(row, *(word(cells[row, name]) for name in columns)) for row in rows])


if __name__ == "__main__":
    sys.exit(common.run(main))
