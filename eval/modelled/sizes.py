"""What a plan is made from: a model's numbers, a machine's rates, bytes in the spellings of people.

Every function raises UserError with one sentence.
"""

import dataclasses
import json
import math
import runpy
from pathlib import Path

from alisa_jax import policies
from alisa_jax.kv import codec as codecs
from alisa_jax.models import hf, shapes
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder
from alisa_jax.placement import sizes
from alisa_jax.placement.cost import Hardware, Shape, statistics_bytes
from alisa_jax.placement.plan import PAGE_TOKENS, Setting, pages
from eval.script import inputs
from eval.script.common import UserError

HARDWARE = Path(__file__).resolve().parents[2] / "configs" / "hardware"
THIS_MACHINE = "this_machine.json"  # what --profile writes by default, and what --hardware=this_machine reads
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def read_bytes(text: str, dense_kv_bytes: float, flag: str) -> float:
    """'2GB', '512MiB' and '1000' in bytes; '0.33x' times `dense_kv_bytes`."""
    try:
        return sizes.read_bytes(text, dense_kv_bytes, f"{flag}: ")
    except ValueError as error:
        raise UserError(str(error)) from None


def bytes_text(number: float) -> str:
    """Bytes as a table shows them; "any" for no limit."""
    if not math.isfinite(number):
        return "any"
    unit = next((u for u in ("TiB", "GiB", "MiB", "KiB") if number >= sizes.UNITS[u]), "B")
    return f"{number / sizes.UNITS[unit]:.2f} {unit}"


def model(name: str) -> ModelConfig:
    """The configuration behind random:NAME, NAME, bundled, a folder or a name of the hub; weights are not read."""
    if name.removeprefix("random:") in shapes.SHAPES:
        return shapes.SHAPES[name.removeprefix("random:")]
    folder, _ = inputs.locate(name)
    if not folder.is_dir():
        raise UserError(f"--model: {name!r} is no folder; known shapes: {', '.join(shapes.SHAPES)}")
    try:
        return hf.config_from_hf(json.loads((folder / "config.json").read_text()))
    except OSError as error:
        raise UserError(f"--model: {name!r} has no readable config.json: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--model: {error}") from None


def hardware(name: str) -> Hardware:
    """The page of configs/hardware called `name`, or a file that --profile wrote."""
    known = sorted(path.stem for path in HARDWARE.glob("*.py"))
    if name in known:
        return runpy.run_path(str(HARDWARE / f"{name}.py"))["HARDWARE"]
    path = Path(THIS_MACHINE if name == "this_machine" else name)
    if not path.is_file():
        if name == "this_machine":
            raise UserError(f"--hardware: no {THIS_MACHINE} here; make it with python -m eval.plan --profile")
        raise UserError(
            f"--hardware: {name!r} is unknown; known: {', '.join(known)}, this_machine, or a profile's file"
        )
    try:
        return Hardware(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--hardware: {name} is no profile: {error}") from None


def shape(config: ModelConfig, codec, dtype: str) -> Shape:
    """The numbers of a model whose weights are `dtype` and whose cache is stored by the resolved `codec`."""
    decoder = Decoder(config)
    return Shape(
        weight_bytes=decoder.count_params() * ELEMENT_BYTES[dtype],
        weight_flops=decoder.flops_per_token(0),
        attention_flops=decoder.flops_per_token(1) - decoder.flops_per_token(0),
        layers=config.n_layers,
        d_model=config.d_model,
        d_ff=config.d_ff,
        vocab_size=config.vocab_size,
        kv_token_bytes=codec.token_bytes(config.n_kv_heads, config.head_dim),
        element_bytes=ELEMENT_BYTES[dtype],
    )


def codec(text: str, dtype: str):
    """The codec that `text` names, for a model that computes in `dtype`."""
    return codecs.parse(inputs.codec(text)).resolve(dtype)


def policy(kv_sparsity: float, window: str = "k") -> policies.Policy:
    """SWA at this sparsity, with its window ("k", "2k" or a number of rows); dense for 0."""
    if not 0.0 <= kv_sparsity < 1.0:
        raise UserError(f"--kv_sparsity must be at least 0 and below 1, got {kv_sparsity}")
    try:
        rows = int(window) if window.isdigit() else window
        return policies.Swa(kv_sparsity=kv_sparsity, window=rows) if kv_sparsity else policies.Dense()
    except ValueError as error:
        raise UserError(f"--window: {error}") from None


def setting(config: ModelConfig, stored, chosen, batch: int, prompt_tokens: int, new_tokens: int) -> Setting:
    """A run of `batch` equal prompts without budgets, under the policy `chosen` and the codec `stored`.

    Working set and statistics are as large as the context at the end, in pages.
    """
    context = PAGE_TOKENS * pages(prompt_tokens + new_tokens - 1)
    K, H, L = config.n_kv_heads, config.head_dim, config.n_layers
    selects = isinstance(chosen, policies.Swa)
    statistics = 0.0
    if selects:
        slots = chosen.capacity(context)
        rows = int(chosen.counts(context).width.max())
        statistics = statistics_bytes(rows, context, L) + L * slots * 8  # position and bias of each slot
    return Setting(
        layers=L,
        prompt_tokens=(prompt_tokens,) * batch,
        new_tokens=new_tokens,
        token_bytes=stored.token_bytes(K, H),
        device_kv_bytes=math.inf,
        slots=slots if selects else 0,
        sequence_bytes=L * stored.sequence_bytes(K, H) * (2 if selects else 1),
        stats_bytes=statistics,
        selects=selects,
        evicts=False,
    )


def budgeted(run: Setting, device_kv_bytes: float, host_kv_bytes: float) -> Setting:
    """`run` with its budgets."""
    return dataclasses.replace(run, device_kv_bytes=device_kv_bytes, host_kv_bytes=host_kv_bytes)
