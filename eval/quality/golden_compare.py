"""A cell beside its golden record: to the bit, or with tolerance; `eval.golden` says which holds where."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from eval.quality import golden_arrays, golden_cells
from eval.quality.golden_cells import NEW_TOKENS, Cell, Measured
from eval.script import common

TOLERANCE = 1e-4  # nats, and units of attention: of margins, scores and log-probabilities
VALUES = ("tokens", "logprobs", "margins", "sets", "fed", "kv_bytes", "other_bytes", "codes", "moved")
# Of codecs that round: how far log-probabilities after the first token may be apart, which reads no code. Sums in another
# order end up on the other side of a border now and then, and a step of one code moves what reads it by more than rounding:
# 6e-3 at most with int8 here. With int4 and skvq, whose borders are fewer, it was seen once, among `EXCEPTIONS`.
STEP_NATS = MappingProxyType({"int8": 1e-2, "int4": 5e-2, "skvq": 5e-2})
CODE_BITS = MappingProxyType({"int4": 4, "skvq": 2})  # of codes that share bytes
EXCEPTIONS = MappingProxyType(  # pattern of cells -> fields, reason
    {
        "stories260K | local(kv_sparsity=0.8) | int4 | resident": (
            ("logprobs", "margins"),
            "without LLVM's optimisation a code of token 86 steps in layer 3 of sequence 2, then a zero point of token 89",
        )
    }
)


@dataclass
class Compared:
    """A cell beside its record; fields by name with what differs."""

    exact: bool
    differs: dict[str, str] = field(default_factory=dict)
    excepted: dict[str, str] = field(default_factory=dict)
    ties: int = 0
    code_steps: int = 0
    stepped: int = 0  # log-probabilities and half margins beyond TOLERANCE, whether `STEP_NATS` allows them or not


def compare(record: Mapping, got: Measured, cell: Cell, exact: bool) -> Compared:
    """`got` beside `record`, to the bit (`exact`) or with the tolerance of the module's docstring."""
    one, record = Compared(exact), golden_cells.untimed(record)
    got = got._replace(values=golden_cells.untimed(got.values))
    missing = [name for name in VALUES if (name in record) != (name in got.values)]
    if missing:
        one.differs |= dict.fromkeys(missing, "one of the two has none")
    elif exact:
        there = [name for name in VALUES if record.get(name) != got.values.get(name)]
        one.differs |= {name: _first(record[name], got.values[name]) for name in there}
    else:
        _tolerant(one, record, got, cell)
    for pattern, (names, reason) in EXCEPTIONS.items():
        for name in one.differs.keys() & set(names) if not exact and fnmatch.fnmatchcase(str(cell), pattern) else ():
            one.excepted[name] = f"{one.differs.pop(name)}; {reason}"
    return one


def _first(old, new, at: str = "") -> str:
    """Where two values differ first, in words."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return next(_first(old[k], new[k], f"{at}[{k}]") for k in old if old[k] != new[k])
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return next(_first(a, b, f"{at}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    return f"{at or 'it'} is {str(new)[:60]}, was {str(old)[:60]}"


def _tolerant(one: Compared, old: Mapping, got: Measured, cell: Cell) -> None:
    new, codec = got.values, cell.codec.split("(")[0]
    nats = STEP_NATS.get(codec, TOLERANCE)
    upto = _tokens(one, old, new, nats)
    if old.get("fed") != new.get("fed"):
        one.differs["fed"] = "other tokens of a prompt are fed"
    _sets(one, old["sets"], new["sets"], got.scores, upto, nats)
    for b, n in enumerate(upto):
        for name, times in (("logprobs", 1), ("margins", 2)):  # a margin is a difference of two
            far = np.abs(np.subtract(*(np.asarray(of[name][b][:n], np.float64) for of in (old, new)))) / times
            one.stepped += int((far > TOLERANCE).sum())
            wrong = ~(far <= np.where(np.arange(n) > 0, nats, TOLERANCE))
            if wrong.any():
                t = int(wrong.argmax())
                one.differs.setdefault(name, f"sequence {b}, token {t}: {times * far[t]:.1e} nats apart")
    for name in ("kv_bytes", "other_bytes"):
        if old.get(name) != new.get(name):
            one.differs[name] = f"{new[name]}, was {old[name]}"
    if old.get("moved") != new.get("moved") and not one.ties:
        one.differs["moved"] = _first(old["moved"], new["moved"])
    if "codes" in old:
        _codes(one, old["codes"], new["codes"], upto, CODE_BITS.get(codec, 8))


def _tokens(one: Compared, old: Mapping, new: Mapping, nats: float) -> list[int]:
    """Up to which new token each sequence can be compared."""
    upto = []
    for b, (was, now) in enumerate(zip(old["tokens"], new["tokens"], strict=True)):
        t = next((t for t, (x, y) in enumerate(zip(was, now, strict=True)) if x != y), len(was))
        if t < len(was):
            if (margin := min(old["margins"][b][t], new["margins"][b][t])) < nats:
                one.ties += 1
            else:
                text = f"sequence {b}, token {t}: {now[t]}, was {was[t]}, at a margin of {margin:.1e} nats"
                one.differs.setdefault("tokens", text)
        upto.append(t)
    return upto


def _sets(one: Compared, old: list, new: list, scores, upto: list[int], nats: float) -> None:
    """Compare sets, as far as tokens are equal; what follows a tie is taken out of `upto`."""
    agreed = [1] * len(upto)  # tokens before which the sets were equal
    if [(s["made"], s["first"]) for s in old] != [(s["made"], s["first"]) for s in new]:
        if not one.ties:
            one.differs["sets"] = "they are of other steps"
        return
    for was, now, score in zip(old, new, scores, strict=True):
        for layer, pair in enumerate(zip(was["layers"], now["layers"], strict=True)):
            a, b = map(golden_arrays.bits_of, pair)
            if a.shape != b.shape:
                one.differs["sets"] = f"layer {layer}: of {b.shape[:2]} sequences and heads, was {a.shape[:2]}"
                return
            for i, p in np.argwhere((a != b).any(-1)).tolist():
                if was["made"] > upto[sequence := was["first"] + i] + 1:
                    continue
                out, into = (np.flatnonzero(x) for x in (a[i, p] & ~b[i, p], b[i, p] & ~a[i, p]))
                if _tied(None if score[layer] is None else score[layer][i, p], out, into, nats):
                    one.ties += 1
                    upto[sequence] = min(upto[sequence], agreed[sequence])
                else:
                    where = f"layer {layer}, sequence {sequence}, head {p}, after {was['made']} tokens"
                    one.differs.setdefault("sets", f"{where}: {into.tolist()} instead of {out.tolist()}")
        rows = range(was["first"], was["first"] + len(golden_arrays.bits_of(was["layers"][0])))
        agreed[rows.start : rows.stop] = [was["made"]] * len(rows)


def _tied(score: np.ndarray | None, out: np.ndarray, into: np.ndarray, nats: float) -> bool:
    """Members `out` and `into` have the same scores up to `nats`; not where one is unknown (nan)."""
    if score is None or len(out) != len(into):
        return False
    return bool((np.abs(np.sort(score[out]) - np.sort(score[into])) < nats).all())


def _codes(one: Compared, old: Mapping, new: Mapping, upto: list[int], bits: int) -> None:
    for key in old:
        if upto[int(key.split(".")[1])] < NEW_TOKENS:
            continue
        if key not in new or len(old[key]) != len(new[key]):
            one.differs.setdefault("codes", f"{key} is not among them")
            continue
        for was, now in zip(old[key], new[key], strict=True):
            (kind, a), (other, b) = golden_arrays.array_of(was), golden_arrays.array_of(now)
            if kind != other or a.shape != b.shape:
                one.differs.setdefault("codes", f"{key}: {other} of {b.shape}, was {kind} of {a.shape}")
            elif a.dtype.kind == "f":
                far, most = np.abs(a - b).max(), TOLERANCE * max(1.0, float(np.abs(a).max()))
                if not far <= most:
                    one.differs.setdefault("codes", f"{key}: {far:.1e} apart")
            else:
                if kind == "uint8" and bits < 8:
                    a, b = (np.concatenate([(x >> i) & (2**bits - 1) for i in range(0, 8, bits)]) for x in (a, b))
                far = np.abs(a.astype(int) - b.astype(int))
                one.code_steps += int((far == 1).sum())
                if far.max() > 1:
                    one.differs.setdefault("codes", f"{key}: {far.max()} steps apart")


def summary(cells: Sequence[Cell], found: Sequence[Compared]) -> list[str]:
    """What differs, what may, and how many cells are as they were."""
    lines = []
    for title in ("differs", "excepted"):
        each = zip(cells, found, strict=True)
        rows = [(str(c), *item) for c, one in each for item in getattr(one, title).items()]
        if rows:
            lines += [common.table(("cell", title, "how"), rows, left=3), ""]
    total = lambda name: sum(getattr(one, name) for one in found)
    right = [one.exact for one in found if not one.differs]
    near = f"{right.count(False)} within tolerance ({total('ties')} ties, {total('code_steps')} code steps,"
    parts = [
        f"{right.count(True)} equal to the bit",
        f"{near} {total('stepped')} values beyond {TOLERANCE:g})",
        f"{len(found) - len(right)} different",
    ]
    lines.append(f"{len(cells)} cells: {', '.join(parts)}")
    return lines
