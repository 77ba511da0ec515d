"""Arguments as the harness hands them over, checked: what is wrong is told in one sentence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from alisa_jax.engine.sampling import Sampling
from alisa_jax.engine.scoring import PROTOCOLS

# settings of a request to generate
ASKED = ("until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks")


class UserError(ValueError):
    """What the person at the keyboard can put right, in one sentence."""


@contextlib.contextmanager
def sentences():
    """What the library refuses with a ValueError is a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def count(name: str, value) -> int:
    """`value`, a number or a text, as a whole number of at least 1. Raises UserError."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UserError(f"{name} must be a whole number of at least 1; got {value!r}")
    return number


def check_specs(**texts: str) -> None:
    """Raise UserError for a spec that the reader of model_args has cut at a comma."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{name} is a spec, a text such as 'dense'; got {text!r}")
        if text.count("(") != text.count(")"):
            raise UserError(
                f"{name}={text} lacks a bracket, as a spec does that was cut at a comma; "
                "write it as a word of its own after --model_args, "
                "or give model_args as a dictionary or as JSON"
            )


def pairs_of(text: str) -> dict[str, str]:
    """Names and values of "key=value,key=value"; commas inside brackets are part of the value."""
    pairs = [part.partition("=") for part in re.findall(r"(?:\([^)]*\)?|[^,(])+", text)]
    if bad := [key for key, sign, _ in pairs if not sign]:
        raise UserError(f"model_args are key=value pairs between commas; got {bad[0]!r}")
    return {key.strip(): value for key, _, value in pairs}


def check_arguments(unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError for arguments that the model does not have."""
    if unknown := list(unknown):
        raise UserError(
            f"the model alisa has no argument {', '.join(unknown)}; its arguments are "
            f"{', '.join(known)}"
        )


def check_name(pretrained: object) -> str:
    """The name of a model with a tokenizer. Raises UserError for none and for random weights."""
    name = str(pretrained)
    if not name or name.startswith("random:"):
        says = f"{name} has no tokenizer" if name else "it is missing"
        raise UserError(f"pretrained must name a folder, a model of the Hub, or bundled; {says}")
    return name


def check_protocol(placement: str, protocol: str) -> None:
    """Raise UserError for an unknown protocol, and for one that a placement rules out."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    if placement not in ("", "resident") and protocol == "prefill_mask":
        raise UserError(
            "prefill_mask keeps no cache that could be placed; leave out placement or "
            "protocol=prefill_mask"
        )


@dataclass(frozen=True)
class Asked:
    """How a text is to be continued; requests with equal ones run together."""

    new_tokens: int
    until: tuple[str, ...]
    sampling: Sampling


def asked_of(found: dict) -> Asked:
    """What the harness's settings of a request ask for. Raises UserError for what is not known."""
    if found.get("num_beams") == 1:
        del found["num_beams"]
    if unknown := [key for key in found if key not in ASKED]:
        raise UserError(
            f"no setting {', '.join(unknown)} of generation is known; known are {', '.join(ASKED)}"
        )
    until = found.get("until") or []
    temperature = float(found.get("temperature") or 0.0) if found["do_sample"] else 0.0
    if found["do_sample"] and temperature == 0:
        raise UserError("do_sample=true needs a temperature above 0")
    top_p = found.get("top_p")
    with sentences():
        sampling = Sampling(temperature, found.get("top_k") or 0, 1.0 if top_p is None else top_p)
    return Asked(
        count("max_gen_toks", found["max_gen_toks"]), tuple(t for t in until if t), sampling
    )
