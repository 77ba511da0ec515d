"""What golden records are made of: the cells, how one is run, and what is looked at inside the library.

A cell is a model, a policy, a codec and a controller. All of them continue the same three ragged prompts greedily, without
stop tokens; the prompts are ids by a formula, so neither tokenizers nor what texts begin with have a say in them. They cross
the border of a context bucket after 11 steps, and their repetitions give the policies something to choose by.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax import codecs, policies, spec
from alisa_jax.analysis.calibrate import calibrate
from alisa_jax.engine import step
from alisa_jax.kv.state import LayerState
from eval import methods
from eval.quality.golden_arrays import POSITIONS, array_text, bits_text, short
from eval.script.common import UserError

LENGTHS, NEW_TOKENS = (117, 93, 70), 24
RESIDENT = "resident"

# Settings small enough to leave something out of these prompts; what is not named here has 80 % sparsity or its defaults.
POLICIES = MappingProxyType(
    {"merge": "merge(share=0.6)", "snapkv": "snapkv(capacity=40,window=8)", "gemfilter": "gemfilter(tokens=90)"}
)
CODECS = MappingProxyType(
    {
        "int8": ("int8(axis=channel)", "int8(axis=token)"),
        "skvq": ("skvq(group=32,window=16)",),
    }
)
# Where a codec refuses a policy: the same codec as it would serve it.
INSTEAD = MappingProxyType({"skvq(group=32,window=16)": "skvq(group=32,window=16,span=head)"})
MORE = (  # policy, codec: options that take ways of their own
    ("h2o(kv_sparsity=0.8,gqa=max)", "raw"),
    ("strided(kv_sparsity=0.8,anchor=query)", "raw"),
    ("streaming(kv_sparsity=0.8,positions=cache)", "raw"),
    ("swa(kv_sparsity=0.8,decay=0.9,refresh_every=4)", "int8(axis=token)"),
    ("swa(kv_sparsity=0.8,shared_heads=false,dense_layers=1)", "raw"),
)
_SWA = "swa(kv_sparsity=0.6,spare_slots=0)"
PLACED = (  # controller, policy, codec: each at the smallest of `SHARES` that it accepts; on other models every second
    ("resident", "swa(kv_sparsity=0.8)", "raw"),
    ("waves", "h2o(kv_sparsity=0.8)", "int8(axis=token)"),
    ("waves", "dense", "raw"),
    ("accelerate", "gemfilter(tokens=90)", "raw"),
    ("accelerate", _SWA, "raw"),
    ("accelerate", "dense", "int4"),
    ("flexgen(cache_device_frac=0.5)", "swa(kv_sparsity=0.3,local_frac=0.0,dense_layers=1)", "raw"),
    ("flexgen(cache_device_frac=0.4)", "dense", "int8(axis=token)"),
    ("alisa(beta=0.3,p2=4)", _SWA, "int8(axis=channel)"),
    ("alisa(p1=0,beta=0.3,p2=4)", "dense", "raw"),
    ("alisa(traffic=paper,beta=0.4,p2=2)", "swa(kv_sparsity=0.6,shared_heads=false,spare_slots=0)", "raw"),
    ("alisa(lag=1)", _SWA, "raw"),
)
SHARES = tuple(i / 40 for i in range(1, 41))  # of what a run keeps that is all on the device


class Cell(NamedTuple):
    """What is run; canonical texts. placed: under a budget, also where the controller is resident."""

    model: str
    policy: str
    codec: str
    controller: str = RESIDENT
    placed: bool = False

    def __str__(self):
        through = f"placed {self.controller}" if self.placed else self.controller
        return f"{self.model} | {self.policy} | {self.codec} | {through}"

    def fields(self) -> dict:
        """What identifies it in a record, beside the hash of the model."""
        how = {"policy": self.policy, "codec": self.codec, "placement": self.controller, "placed": self.placed}
        return {"script": "eval.golden", "model": self.model, **how, "prompt_tokens": list(LENGTHS), "n": NEW_TOKENS}


class Measured(NamedTuple):
    """The values of a record, and what decides about ties in them, which is not recorded."""

    values: dict
    scores: list[list[np.ndarray | None]]  # of each entry of `sets` and layer: [B, P, POSITIONS], nan: not known


def prompts() -> list[list[int]]:
    """Three lists of ids, all of them in 3..511."""
    return [[3 + (17 * (i * i % 61) + 101 * (i % 7) + 29 * b) % 509 for i in range(n)] for b, n in enumerate(LENGTHS)]


def cells(name: str, model, make_engine: Callable) -> list[Cell]:
    """Every policy with every codec that serves it, a few options more, and a sample under every controller."""
    found = []
    for policy, kind in policies.POLICIES.items():
        text = POLICIES.get(policy) or methods.example(kind)
        for codec in [c for key in codecs.CODECS for c in CODECS.get(key, (key,))]:
            for stored in (codec, INSTEAD.get(codec)):
                if stored is not None and _serves(make_engine, model, text, stored):
                    found.append((text, stored))
                    break
    found += [pair for pair in MORE if _serves(make_engine, model, *pair)]
    canon = lambda policy, codec: (
        spec.to_text(policies.parse(policy), policies.POLICIES),
        spec.to_text(codecs.parse(codec), codecs.CODECS),
    )
    resident = [Cell(name, *canon(*pair)) for pair in found]
    placed = PLACED if name == "bundled" else PLACED[::2]
    return resident + [Cell(name, *canon(*pair), controller, True) for controller, *pair in placed]


def _engine(make_engine: Callable, model, policy: str, codec: str):
    """An engine. Where the policy needs a calibration that the model's folder lacks, it is that of the prompts."""
    if isinstance(policies.parse(policy), policies.DoubleSparsity) and model.calibration() is None:
        blocks = [row[: min(LENGTHS)] for row in prompts()]
        return make_engine(model, policy, codec, calibration=calibrate(model, blocks, data="eval.golden"))
    return make_engine(model, policy, codec)


def _serves(make_engine: Callable, model, policy: str, codec: str) -> bool:
    try:
        _engine(make_engine, model, policy, codec)
    except ValueError:
        return False
    return True


def measure(cell: Cell, model, make_engine: Callable) -> Measured:
    """Run a cell."""
    engine = _engine(make_engine, model, cell.policy, cell.codec)
    if cell.placed:
        engine = _budgeted(engine, cell)
        watch = Watch(engine)
        run = engine.generate(prompts(), NEW_TOKENS, eos_ids=())
        more = {"moved": {name: _plain(getattr(run.placement, name)) for name in MOVED}}
        more["moved"]["device_kv_bytes"] = engine.placement.device_kv_bytes
    else:
        watch = Watch(engine)
        run = engine.generate(prompts(), NEW_TOKENS, eos_ids=())
        kv = watch.end()
        content, other = kv.bytes
        more = {"kv_bytes": int(content), "other_bytes": int(other), "codes": token_codes(kv)}
    values = {
        "tokens": [list(map(int, row)) for row in run.tokens],
        "logprobs": [short(row) for row in run.logprobs],
        "margins": [short(row) for row in run.margins],
        "sets": [{"made": s.made, "first": s.first, "layers": [bits_text(x) for x in s.layers]} for s in watch.sets],
        **({} if watch.fed is None else {"fed": bits_text(watch.fed)}),
        **more,
    }
    return Measured(values, [s.scores for s in watch.sets])


MOVED = (
    "load_bytes store_bytes loaded_rows stored_rows recomputed_rows recomputed_tokens device_peak_bytes host_peak_bytes"
    " p1 p2 groups effective_batch decisions notes host_reads"
).split()
TIMED = ("device_peak_bytes", "host_peak_bytes")  # they hang on when a copy in the background ends


def untimed(values: Mapping) -> dict:
    """`values` without what another run of the same program may give otherwise."""
    if "moved" not in values:
        return dict(values)
    return {**values, "moved": {name: x for name, x in values["moved"].items() if name not in TIMED}}


def _budgeted(engine, cell: Cell):
    """`engine` under the controller of `cell` at the smallest budget of `SHARES` that it accepts."""
    lengths = [int(engine.policy.feeds(n)) for n in LENGTHS]
    setting = engine.under("waves").placement.setting(lengths, NEW_TOKENS)
    total = setting.fixed_bytes + setting.store_bytes(setting.final_tokens)
    for share in SHARES:
        one = engine.under(cell.controller, float(int(share * total)))
        try:
            one.placement.check(lengths, NEW_TOKENS)
        except ValueError as error:
            refused = error
        else:
            return one
    raise UserError(f"{cell} refuses every budget: {refused}")


# What is looked at inside the library: all names that are not part of its face stand in this section.


class Sets(NamedTuple):
    """What the next query of some sequences attends, after `made` new tokens."""

    made: int
    first: int  # the first of these sequences in the batch
    layers: list[np.ndarray]  # [B, P, POSITIONS] bool
    scores: list[np.ndarray | None]  # likewise, see `Measured`


class Watch:
    """Listens to what the jitted functions of an engine are given: the states before each chunk of steps and at the end."""

    def __init__(self, engine):
        self.engine, self.sets, self.fed = engine, [], None
        self._taps = jax.jit(
            lambda params, kv, token: [t.pos for (t,) in step.decode(engine.model.decoder, params, kv, token)[2]]
        )
        self._made, self._first, self._last = 1, 0, None
        programs = engine.programs
        filter_prompt = programs.filter_prompt

        def watched(*args):
            at = np.array(filter_prompt(*args))
            self.fed = _bits(at[:, None])
            return at

        programs.filter_prompt = watched
        if engine.placement is None:
            programs.generate = self._resident(programs.generate)
        elif engine.layers[0].policy.selects or engine.layers[-1].policy.selects:
            placed = engine.placement.programs
            placed.steps = self._placed(placed.steps)

    def end(self):
        """The states at the end of a resident run, whose sets are noted."""
        kv, token = self._last
        self._note(kv, token)
        return kv

    def _resident(self, function):
        def heard(params, kv, token, *rest):
            self._note(kv, token)
            out, kv = function(params, kv, token, *rest)
            self._made += int(out.steps)
            self._last = kv, out.token
            return out, kv

        return heard

    def _placed(self, function):
        def heard(*args):
            out, kv, waiting = function(*args)
            before, self._made = self._made, self._made + int(out.steps)
            half = NEW_TOKENS // 2
            if before < half <= self._made or self._made == NEW_TOKENS:
                self._add([_joined(parts) for parts in kv.layers])
            if self._made == NEW_TOKENS:  # the next group of sequences begins
                self._made, self._first = 1, self._first + len(out.token)
            return out, kv, waiting

        return heard

    def _note(self, kv, token) -> None:
        found = [_joined(parts) for parts in kv.layers]
        if any(state.ws is None for (state,) in kv.layers):  # the set is chosen by the query
            pos = self._taps(self.engine.model.params, kv, token)
            found = [(_bits(np.asarray(p)), s[1]) if s[0] is None else s for p, s in zip(pos, found, strict=True)]
        self._add(found)

    def _add(self, found) -> None:
        self.sets.append(Sets(self._made, self._first, *map(list, zip(*found, strict=True))))


def _joined(parts: Sequence[LayerState]):
    sets, scores = zip(*map(_set, parts), strict=True)
    join = lambda found: None if any(x is None for x in found) else np.concatenate(found)
    return join(sets), join(scores)


def _set(state: LayerState):
    """(active tokens, scores) of a layer; (None, None) without a working set."""
    ws, stats = state.ws, state.stats
    if ws is None:
        return None, None
    pos = np.asarray(jnp.where(ws.bias > -jnp.inf, ws.pos, -1))
    score = None
    if hasattr(stats, "sums"):  # by position
        hi = np.asarray(jnp.copy(stats.sums.hi))[..., :POSITIONS]
        score = np.pad(hi, ((0, 0), (0, 0), (0, POSITIONS - hi.shape[-1])), constant_values=np.nan)
    elif isinstance(stats, jax.Array) and stats.shape == pos.shape:  # by slot
        score = np.full((*pos.shape[:2], POSITIONS + 1), np.nan, np.float32)
        np.put_along_axis(score, np.where(pos >= 0, pos, POSITIONS), np.asarray(jnp.copy(stats)), 2)
        score = score[..., :POSITIONS]
    return _bits(pos), score


def token_codes(kv) -> dict[str, list[str]]:
    """'layer.sequence.position': the arrays of K and of V of one token in a kv head, of the first and the last layer.

    Of the first sequence it is the first token that its head attends, of the second one in the middle, of the last the last.
    """
    found = {}
    for layer in (0, len(kv.layers) - 1):
        (state,) = kv.layers[layer]
        ws = state.ws is not None
        home = state.ws if ws else state.store
        for b, part in enumerate((0.0, 0.5, 1.0)):
            if ws:
                active = np.asarray(jnp.where(state.ws.bias > -jnp.inf, state.ws.pos, -1))[b, 0]
            else:
                active = np.arange(int(state.length[b]))
            held = np.sort(active[active >= 0])
            pos = int(held[int(part * (len(held) - 1))])
            at = (b, 0, int(np.flatnonzero(active == pos)[0])) if ws else (b, pos, 0)
            leaves = [x for packed in (home.k, home.v) for x in state.spec.codec.leaves(packed)]
            found[f"{layer}.{b}.{pos}"] = [array_text(np.asarray(x[at])) for x in leaves]
    return found


def _bits(pos: np.ndarray) -> np.ndarray:
    """[B, P, M] int32, -1 for none -> [B, P, POSITIONS] bool."""
    bits = np.zeros((*pos.shape[:2], POSITIONS + 1), bool)
    np.put_along_axis(bits, np.where(pos >= 0, pos, POSITIONS), True, 2)
    return bits[..., :POSITIONS]


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
