"""What the scripts take in, checked before any weight is read: policy, codec, model, window, results file.

Every function raises UserError with one sentence; `load` and `make_engine` are the two doors to the library.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.script import common, hashes
from eval.script.common import UserError


@dataclass(frozen=True)
class Card:
    """What is known of a model before it is loaded."""

    name: str
    hashes: hashes.Hashes  # of the files; none for random weights
    max_positions: int
    dtype: str = "float32"  # that the weights are held in

    @property
    def sha256(self) -> str | None:
        """Of configuration and weights; None for random weights."""
        return self.hashes.model_sha256

    def fields(self) -> dict:
        """The fields that identify the model in a record."""
        return {"model": self.name, **self.hashes.fields(), "dtype": self.dtype}


def policy(text: str) -> str:
    """The canonical text of a policy."""
    from alisa_jax import policies

    return _canonical(text, policies.POLICIES, "--policy")


def check_policy(text: str, context: int) -> None:
    """Raise UserError when the policy `text` cannot serve a context of `context` tokens."""
    from alisa_jax import policies

    try:
        policies.parse(text).validate(context)
    except ValueError as error:
        raise UserError(f"--policy: {text}: {error}") from None


def endless(text: str) -> bool:
    """Whether the policy `text` may go on beyond the model's context."""
    from alisa_jax import policies

    return policies.parse(text).endless


def codec(text: str) -> str:
    """The canonical text of a codec."""
    from alisa_jax import codecs

    return _canonical(text, codecs.CODECS, "--codec")


def calibration_tokens(codec: str) -> int:
    """How many tokens of a sequence the codec has to see before it encodes; 0: none."""
    from alisa_jax import codecs

    return codecs.parse(codec).resolve("float32").frozen_after


def check_codec(text: str, tokens: int, what: str) -> None:
    """Raise UserError when sequences of `tokens` tokens, called `what`, are too short for the codec `text`."""
    needed = calibration_tokens(text)
    if tokens <= needed:
        raise UserError(
            f"--codec: {text} takes its range from the first {needed} tokens of a sequence, so {what} need more than"
            f" {needed}, got {tokens}"
        )


def placement(values) -> str:
    """The canonical text of `--placement`; refuses budgets that are no sizes, and machines that cannot offload."""
    from alisa_jax import placement
    from alisa_jax.placement import bytes_text, mover

    for name in ("device_kv_bytes", "host_kv_bytes"):
        try:
            bytes_text.read_bytes(getattr(values, name), 1.0, f"--{name}: ")
        except ValueError as error:
            raise UserError(str(error)) from None
    text = _canonical(values.placement, placement.CONTROLLERS, "--placement")
    placed = text != "resident" or (values.device_kv_bytes, values.host_kv_bytes) != ("inf", "inf")
    if placed and "protocol" in values and values.protocol == "prefill_mask":
        raise UserError("--protocol=prefill_mask keeps no cache that could be placed: leave it or the placement out")
    if placement.parse(text).offloads:
        try:
            mover.self_test()
        except RuntimeError as error:
            raise UserError(f"--placement: {error}") from None
    return text


def check_placed(engine, groups: Sequence[Sequence[Sequence[int]]], protocol: str, last=None) -> None:
    """Raise UserError where the placement of `engine` refuses to score one of `groups` of sequences.

    last: of each group, as of `Engine.score`; None: of none.
    """
    for i, sequences in enumerate(groups):
        try:
            engine.check_score(sequences, protocol, None if last is None else last[i])
        except ValueError as error:
            raise UserError(f"--placement: {error}") from None


def _canonical(text, registry, flag) -> str:
    from alisa_jax import spec

    try:
        return spec.to_text(spec.parse(text, registry), registry)
    except spec.SpecError as error:
        raise UserError(f"{flag}: {error}") from None


def card(name: str, dtype: str = "auto") -> Card:
    """Read the model's size, and hash what identifies it (`hashes.py`). A name of the hub is downloaded.

    dtype: as `--dtype` says it.
    """
    from alisa_jax.models import CheckpointError, context, shapes, weights

    if name.startswith("random:"):
        shape = name.removeprefix("random:")
        if shape not in shapes.SHAPES:
            raise UserError(f"--model: unknown random model {shape!r}; known: {', '.join(sorted(shapes.SHAPES))}")
        return Card(name, hashes.Hashes(), shapes.SHAPES[shape].max_positions, resolved(name, dtype))
    folder, called = locate(name)
    try:
        if not folder.is_file():
            weights.refuse_pointer(folder / "config.json")
        positions = context.context_of(configuration(folder))
        found = hashes.of(folder)
    except OSError as error:
        raise UserError(f"--model: no model at {name!r}: {error.strerror} ({Path(error.filename).name})") from None
    except CheckpointError as error:
        raise UserError(f"--model: {error}") from None
    except (ValueError, AttributeError):
        raise UserError(f"--model: the config.json of {name!r} is no model configuration") from None
    return Card(called, found, positions, resolved(name, dtype))


def configuration(where: Path) -> dict:
    """What the config.json of a folder says, or what a .gguf file has in its place.

    Raises OSError or ValueError for a config.json that cannot be read, UserError for such a file.
    """
    if not where.is_file():
        return json.loads((where / "config.json").read_bytes())
    from alisa_jax.models import gguf_config

    try:
        return gguf_config.read(where)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None


def resolved(name: str, dtype: str, platform: str | None = None) -> str:
    """The type that `--dtype` means for the model `name`, as `alisa_jax.load` takes it.

    platform: of the device that the weights are for, "cpu" or another; None: of the one at hand.
    """
    from alisa_jax.models import dtypes

    if dtype != dtypes.AUTO:
        return dtype
    if name == "bundled" or name.startswith("random:"):
        return "float32"
    raw = configuration(locate(name)[0])
    stated = raw.get("dtype") or raw.get("torch_dtype")
    try:
        found = dtypes.resolve(dtype, stated, platform=platform)
    except ValueError:
        found = None
    if found is None:
        known = ", ".join(common.DTYPES[1:])
        raise UserError(f"--model: the config.json of {name!r} states the type {stated}; give --dtype, one of {known}")
    return found.name


def locate(name: str) -> tuple[Path, str]:
    """The folder or the .gguf file of a model, which is downloaded where it is of the hub, and what to call the model."""
    from alisa_jax.models import checkpoint

    try:
        return checkpoint.locate(name)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None


def window(
    context: int | None, stride: int | None, of: Card, at_most: int, policies: Sequence[str] = ()
) -> tuple[int, int]:
    """Context and stride in tokens, defaults filled in: min(the model's, `at_most`), and context - 1.

    policies: canonical texts; where all of them are endless, a context that is given may be longer than the model's.
    """
    context = min(of.max_positions, at_most) if context is None else context
    bounded = [text for text in policies if not endless(text)] or not policies
    if context < 2 or (bounded and context > of.max_positions):
        raise UserError(f"--context must be in 2..{of.max_positions}, the context of {of.name}, got {context}")
    stride = context - 1 if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"--stride must be in 1..{context}, the context, got {stride}")
    return context, stride


def results(path: str | None):
    """The results file, opened and repaired, or None for none."""
    from alisa_jax import records

    try:
        return None if path is None else records.Results(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {error}") from None


def load(name: str, dtype: str = "auto"):
    """`alisa_jax.load`."""
    import alisa_jax

    return alisa_jax.load(name, dtype)


def loading(load: Callable, dtype: str) -> Callable:
    """`load` of a name alone, with `dtype` where it is not auto."""
    return load if dtype == "auto" else lambda name: load(name, dtype=dtype)


def model(load: Callable, name: str):
    """`load(name)`; raises UserError for a checkpoint that cannot be read."""
    try:
        return load(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {error}") from None


def tokenizer(model):
    """The model's tokenizer."""
    if model.tokenizer is None:
        raise UserError(f"--model: {model.name} has no tokenizer, which a text needs")
    return model.tokenizer


def make_engine(model, policy: str, codec: str, **options):
    """`alisa_jax.Engine`."""
    import alisa_jax

    return alisa_jax.Engine(model, policy, codec, **options)


def check_impl(impl: str) -> None:
    """Raise UserError when `impl` is named and cannot run on the device at hand."""
    from alisa_jax.attention import compute
    from alisa_jax.codecs.raw import Raw

    try:
        compute.choose(impl, Raw("float32"), "float32", 64)
    except ValueError as error:
        raise UserError(f"--attention_impl: {error}") from None


def engine(make: Callable, model, policy: str, codec: str, impl: str = "auto", placed: Mapping | None = None):
    """`make(model, policy, codec)`, with `attention_impl` where it is not auto; raises UserError for what cannot work.

    placed: `common.placement_fields`; None for a resident cache.
    """
    options = common.impl_field(impl)
    if placed is not None and placed != common.RESIDENT:
        options |= placed
    try:
        return make(model, policy, codec, **options)
    except ValueError as error:
        raise UserError(f"--policy: {error}") from None


def here() -> dict:
    """Fields of a measured record that say what it ran on, and that another machine does not share."""
    import jax

    device = jax.devices()[0]
    return {"platform": device.platform, "device_kind": device.device_kind}


def record(into, cell: dict, values: dict, wall_s: float, how: dict) -> dict:
    """Make the record of a finished cell and append it to the results file `into`, where there is one."""
    from alisa_jax import records

    made = records.make_record(cell, values, wall_s=wall_s, **how)
    try:
        if into is not None:
            into.add(made)
    except OSError as error:
        raise UserError(f"--out: {error}") from None
    return made
