"""Systems to compare, written 'controller | policy | codec': what each needs of memory and what it refuses.

All of it follows from the configuration of a model; no weights are read. Every function raises UserError with one sentence.
"""

import math
from dataclasses import dataclass

from alisa_jax import codecs, placement, policies, spec
from alisa_jax.calibration import Calibration
from alisa_jax.engine.layers import assemble
from alisa_jax.engine.offload import settings
from alisa_jax.kv.state import LayerSpec
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder
from alisa_jax.placement.plan import Setting
from eval.script import inputs
from eval.script.common import UserError

DEFAULTS = (
    "resident | dense",
    "waves | dense",
    "accelerate | dense",
    "flexgen | dense",
    "flexgen | swa(kv_sparsity=0.8)",
    "alisa(traffic=paper) | swa(kv_sparsity=0.8)",
    "alisa | swa(kv_sparsity=0.8)",
    "alisa | swa(kv_sparsity=0.8) | int8",
)


@dataclass(frozen=True)
class System:
    """Canonical texts."""

    controller: str
    policy: str
    codec: str

    def __str__(self):
        return f"{self.controller} | {self.policy} | {self.codec}"

    def fields(self) -> dict:
        """As other records name them."""
        return {"placement": self.controller, "policy": self.policy, "codec": self.codec}


@dataclass(frozen=True)
class Work:
    """What every system is given; a budget of infinity is none. gather: single rows can be read from host pages."""

    config: ModelConfig
    dtype: str
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    device_kv_bytes: float = math.inf
    host_kv_bytes: float = math.inf
    gather: bool = True
    calibration: Calibration | None = None  # of the model, for the methods that need one

    @property
    def context(self) -> int:
        """Tokens of the longest sequence at its end."""
        return max(self.prompt_tokens) + self.new_tokens


def parse(text: str) -> System:
    """'controller | policy | codec'; without a policy dense, without a codec raw."""
    parts = [part.strip() for part in text.split("|")]
    if len(parts) > 3 or not all(parts):
        raise UserError(f"--system: {text!r} is not 'controller | policy | codec'; an example is {DEFAULTS[-1]!r}")
    registries = (placement.CONTROLLERS, policies.POLICIES, codecs.CODECS)
    parts += ["dense", "raw"][len(parts) - 1 :]
    try:
        return System(*(spec.to_text(spec.parse(p, of), of) for p, of in zip(parts, registries, strict=True)))
    except spec.SpecError as error:
        raise UserError(f"--system: {error}") from None


def has_tokenizer(model: str) -> bool:
    """Whether the model comes with one; a .gguf file does."""
    if model.startswith("random:"):
        return False
    where, _ = inputs.locate(model)
    return where.is_file() or any((where / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def dense_kv_bytes(config: ModelConfig, dtype: str, batch: int, tokens: int) -> float:
    """K and V of `tokens` tokens in `batch` sequences, unsparsed and raw: what `1x` stands for."""
    return config.n_layers * codecs.Raw(dtype).token_bytes(config.n_kv_heads, config.head_dim) * batch * tokens


def layers(
    system: System, config: ModelConfig, dtype: str, calibration: Calibration | None = None
) -> tuple[LayerSpec, ...]:
    """Policy, codec and route of every layer, as an engine chooses them; refuses what does not go together."""
    try:
        return assemble(Decoder(config), system.policy, system.codec, dtype, calibration=calibration).layers
    except ValueError as error:
        raise UserError(f"--system: {system}: {error}") from None


def setting(system: System, work: Work, budgeted: bool = True) -> Setting:
    """The run in numbers, as the arrays will be; not `budgeted`: without a limit on either side."""
    limits = (work.device_kv_bytes, work.host_kv_bytes) if budgeted else (math.inf, math.inf)
    specs = layers(system, work.config, work.dtype, work.calibration)
    return settings.setting_of(work.config, specs, work.prompt_tokens, work.new_tokens, *limits, work.gather)


def refusal(system: System, work: Work) -> str | None:
    """Why the budgets refuse `system`, or None. What no budget could make possible is a mistake."""
    controller, specs = placement.parse(system.controller), layers(system, work.config, work.dtype, work.calibration)
    needed, shortest = specs[0].codec.frozen_after, min(work.prompt_tokens)
    if shortest < needed:
        raise UserError(
            f"--system: {system.codec} takes its range from the first {needed} tokens of a prompt, and the shortest "
            f"prompt has {shortest}: give longer prompts, calibration_tokens={shortest}, or axis=token"
        )
    try:
        for one in specs:
            one.policy.validate(work.context)
        settings.check(controller, setting(system, work, budgeted=False))
    except ValueError as error:
        raise UserError(f"--system: {system}: {error}") from None
    try:
        settings.check(controller, setting(system, work))
    except ValueError as error:
        return str(error)
    return None
