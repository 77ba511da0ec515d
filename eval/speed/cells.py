"""The suites of `eval.bench`, their cells (a model at a batch and a context) and the systems, which are rows of a cell."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from alisa_jax.models.config import ModelConfig
from eval.modelled import shapes
from eval.script import inputs
from eval.script.common import UserError

SUITES = ("decode", "prefill", "perplexity")
OURS = "alisa-jax"
SWA = "swa(kv_sparsity=0.8)"
SMALL, BUNDLED = "random:opt_125m", "bundled"


@dataclass(frozen=True)
class System:
    """A row: what runs it, and how K and V are kept. `compiled` and `cache` are of peers alone."""

    runs: str  # as records name it
    policy: str = "dense"
    codec: str = "raw"
    cache: str | None = None
    compiled: bool = False
    protocol: str | None = None  # of perplexity

    @property
    def ours(self) -> bool:
        return self.runs == OURS

    def fields(self) -> dict:
        """As a record identifies it."""
        protocol = {} if self.protocol is None else {"protocol": self.protocol}
        return {"system": self.runs, "policy": self.policy, "codec": self.codec, **protocol}


def _peer(cache: str, compiled: bool) -> System:
    return System(f"transformers {cache} {'compiled' if compiled else 'eager'}", cache=cache, compiled=compiled)


def _scored(policy: str, protocol: str) -> System:
    return System(OURS, policy, protocol=protocol)


_CACHED = MappingProxyType(
    {
        "dense": System(OURS),
        "dense-int8": System(OURS, codec="int8"),
        "swa": System(OURS, SWA),
        "swa-int8": System(OURS, SWA, "int8"),
        "dynamic": _peer("dynamic", False),
        "dynamic-compiled": _peer("dynamic", True),
    }
)
SYSTEMS = MappingProxyType(
    {
        "decode": MappingProxyType(
            {**_CACHED, "static": _peer("static", False), "static-compiled": _peer("static", True)}
        ),
        "prefill": _CACHED,
        "perplexity": MappingProxyType(
            {
                "dense": _scored("dense", "decode"),
                "swa": _scored(SWA, "decode"),
                "dense-mask": _scored("dense", "prefill_mask"),
                "swa-mask": _scored(SWA, "prefill_mask"),
                "forward": System("transformers forward", protocol="forward"),
            }
        ),
    }
)
NAMES = tuple(dict.fromkeys(name for systems in SYSTEMS.values() for name in systems))


@dataclass(frozen=True)
class Cell:
    """One group of rows that are measured together.

    context: tokens in the caches when the last round ends; of a prompt under prefill; of a window under perplexity.
    """

    suite: str
    model: str
    batch: int
    context: int
    rounds: int  # timed
    steps: int = 0  # of a round, decode alone
    tokens: int = 0  # of the text, perplexity alone

    @property
    def title(self) -> str:
        return f"{self.suite} {self.model} ({self.batch}, {self.context})"

    def start(self, rounds: int) -> int:
        """Tokens in the caches before the first of `rounds` rounds, the warm-up among them."""
        return self.context - rounds * self.steps

    def replays(self, systems: Mapping[str, System], trace: str) -> bool:
        """Whether SWA rows attend what a trained model selects, `trace` or "none"."""
        return self.suite == "decode" and trace != "none" and any(s.policy == SWA for s in systems.values())

    def fields(self) -> dict:
        """As a record identifies it, but for the model."""
        more = {"decode": {"steps": self.steps}, "prefill": {}, "perplexity": {"max_tokens": self.tokens}}
        return {"suite": self.suite, "batch": self.batch, "context_tokens": self.context, "rounds": self.rounds} | more[
            self.suite
        ]


def steps_of(context: int) -> int:
    """Decode steps of a round: few where attention is long, and never so many that nothing comes before them."""
    return 8 if context >= 4096 else max(1, min(16, context // 24))


def asked(text: str) -> tuple[int, int]:
    """--cell=BATCHxCONTEXT as two numbers."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise UserError(f"--cell must be BATCHxCONTEXT, such as 8x1024, got {text!r}")
    return int(found[1]), int(found[2])


def shape(name: str, context: int) -> ModelConfig:
    """The configuration of a model that reads `context` tokens: random weights get as many positions as they need."""
    config = shapes.config(name)
    if name.startswith("random:"):
        return dataclasses.replace(config, max_positions=max(config.max_positions, context))
    if context > config.max_positions:
        raise UserError(f"{name} reads {config.max_positions} tokens at most, and {context} are asked for")
    return config


def cells(suites: Sequence[str], models: Sequence[str], values) -> list[Cell]:
    """The cells of a command: those of --cell for every model, or what each model has; raises UserError."""
    made, given = [], [asked(text) for text in values.cell or ()]
    for suite in suites:
        for name in models:
            if suite == "perplexity":
                if not name.startswith("random:"):
                    made.append(_perplexity(name, values))
                continue
            pairs = given or ([(1, 96)] if values.quick else _default(suite, name))
            for batch, context in pairs:
                shape(name, context)
                steps = 0 if suite == "prefill" else values.steps or steps_of(context)
                cell = Cell(suite, name, batch, context, values.repeats, steps)
                if suite == "decode" and cell.start(values.repeats + 2) < 1:
                    raise UserError(
                        f"a context of {context} tokens has no room for {values.repeats + 2} rounds of {steps} steps"
                    )
                made.append(cell)
    if not made:
        raise UserError("perplexity needs a model that was trained; give --model=bundled or a folder")
    return made


def _default(suite: str, name: str) -> list[tuple[int, int]]:
    most = inputs.card(name).max_positions
    if suite == "prefill":
        return [(batch, min(1024, most)) for batch in (1, 8)]
    if name.startswith("random:"):
        return [(1, 128), (8, 1024), (4, 4096)]
    return [(1, min(128, most)), (8, min(1024 if name == BUNDLED else 512, most))]


def _perplexity(name: str, values) -> Cell:
    window = min(values.window_tokens, inputs.card(name).max_positions)
    tokens = 100_000 if values.full else values.perplexity_tokens
    windows = max(1, -(-tokens // (window - 1)))
    return Cell("perplexity", name, max(1, min(8, windows // values.repeats)), window, values.repeats, tokens=tokens)


def chosen(suite: str, names: Sequence[str]) -> dict[str, System]:
    """The systems of a suite, those of `names` where any are named."""
    return {name: system for name, system in SYSTEMS[suite].items() if not names or name in names}


def drawn(config: ModelConfig, cell: Cell, tokens: int, seed: int, layer: int) -> tuple[np.ndarray, ...]:
    """q [B, T, N, H], k and v [B, T, K, H] float32 of one layer, T = `tokens`: normal numbers, a function of the rest."""
    draw = np.random.default_rng([seed, cell.batch, cell.context, layer]).standard_normal
    size = cell.batch, tokens
    heads = config.n_heads, config.n_kv_heads, config.n_kv_heads
    return tuple(draw((*size, n, config.head_dim), np.float32) for n in heads)
