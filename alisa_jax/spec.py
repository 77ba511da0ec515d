"""Specs: a line of text such as ``swa(kv_sparsity=0.8,window=16)`` to a frozen dataclass, and back.

    spec  = name [ "(" [ key "=" value { "," key "=" value } [","] ] ")" ]
    value = bare word | 'quoted text' | "quoted text"

Inside quotes a backslash takes the next character literally. The annotation of the dataclass field
decides how a bare word is read: of the types that the field allows the first that fits wins, in the
order none, bool, int, float, str. Quoted text is always a str. So ``window: int | str`` reads
``16`` as an integer and ``2k`` as text. Which values make sense is the dataclass's own business:
its ``__post_init__`` raises ValueError. A field that is hidden (``repr=False``) or not for the
constructor is no part of a spec; one whose metadata has a name under ``spec`` goes by that name.
"""

import dataclasses
import difflib
import math
import numbers
import operator
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    r"""|(?P<word>[^\s,()='"]+)|(?P<mark>[,()=]))""",
    re.DOTALL,
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:inf|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)")
_BOOLS = types.MappingProxyType({"true": True, "True": True, "false": False, "False": False})
_CALLED = types.MappingProxyType(
    {type(None): "none", bool: "true or false", int: "an integer", float: "a number", str: "text"}
)


class SpecError(ValueError):
    """A spec that cannot be read or printed; the message is one sentence, which starts with it."""


def parse(text: str, registry: Mapping[str, type]) -> Any:
    """Read a spec.

    Args:
      text: the spec, for instance ``"dense"``, ``"dense()"`` or ``"local(tokens=64)"``.
      registry: from name to frozen dataclass.

    Returns:
      An instance of the dataclass under that name in `registry`, fields coerced to annotations.

    Raises:
      SpecError: a syntax error, an unknown name or key (the known ones are listed), a key given
        twice or missing, a value of the wrong type, or a value that the dataclass refuses.
    """
    if not isinstance(text, str):
        raise SpecError(f"a spec is text such as {_example(registry)!r}, got {text!r}")
    name, values = _split(text)
    if name not in registry:
        raise SpecError(f"{text}: unknown name {name!r}; known names are {_listed(registry, name)}")
    cls = registry[name]
    fields = _fields(cls)
    given = {}
    for key, (value, quoted) in values:
        if key not in fields:
            allowed = f"{name} takes {_listed(fields, key)}" if fields else f"{name} takes no keys"
            raise SpecError(f"{text}: unknown key {key!r}; {allowed}")
        if key in given:
            raise SpecError(f"{text}: the key {key!r} is given twice")
        try:
            given[key] = _read(value, quoted, fields[key].type)
        except _Misfit:
            raise SpecError(
                f"{text}: {key} must be {_expected(fields[key].type)}, got {value!r}"
            ) from None
    missing = [key for key, field in fields.items() if field.required and key not in given]
    if missing:
        raise SpecError(f"{text}: {name} needs a value for {', '.join(missing)}")
    try:
        return cls(**{fields[key].name: value for key, value in given.items()})
    except ValueError as error:
        raise SpecError(f"{text}: {error}") from error


def to_text(obj: Any, registry: Mapping[str, type]) -> str:
    """Print a spec: the name and, in the order of the fields, those that are not at their default.

    ``parse(to_text(obj, registry), registry) == obj`` if the fields have their annotated types.

    Raises:
      SpecError: the class of `obj` is not in `registry`, or a field holds something that a spec
        cannot say.
    """
    name = next((name for name, cls in registry.items() if cls is type(obj)), None)
    if name is None:
        raise SpecError(
            f"{obj!r}: {type(obj).__name__} has no name; known names are {_listed(registry)}"
        )
    pairs = []
    for key, field in _fields(type(obj)).items():
        value = getattr(obj, field.name)
        if field.required or value != field.default:
            pairs.append(f"{key}={_write(value, f'{name}: {key}')}")
    return f"{name}({','.join(pairs)})" if pairs else name


class _Misfit(Exception):
    """A value that no type of its field can read."""


@dataclasses.dataclass(frozen=True)
class _Field:
    name: str  # of the dataclass
    type: Any
    required: bool
    default: Any


def _fields(cls: type) -> dict[str, _Field]:
    hints = typing.get_type_hints(cls)
    fields = {}
    for field in dataclasses.fields(cls):
        if not (field.init and field.repr):
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        required = default is dataclasses.MISSING
        key = field.metadata.get("spec", field.name)
        fields[key] = _Field(field.name, hints[field.name], required, None if required else default)
    return fields


def _split(text: str) -> tuple[str, list[tuple[str, tuple[str, bool]]]]:
    """The name and the (key, (value, quoted)) pairs of a spec, in order."""
    tokens = []
    at = 0
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:  # every character but a quote starts a token
            raise SpecError(f"{text}: a quote is opened and not closed")
        token = match[match.lastgroup]
        tokens.append((token if match["mark"] else match.lastgroup, token))
        at = match.end()
    tokens.append(("end", "the end"))
    tokens.reverse()  # the next token is the last of the list

    def take(kinds: tuple[str, ...], wanted: str) -> tuple[str, str]:
        kind, token = tokens.pop()
        if kind not in kinds:
            got = token if kind == "end" else repr(token)
            raise SpecError(f"{text or 'an empty spec'}: expected {wanted}, got {got}")
        return kind, token

    _, name = take(("word",), "a name such as name or name(key=value)")
    if not _NAME.fullmatch(name):
        raise SpecError(f"{text}: expected a name such as name or name(key=value), got {name!r}")
    pairs = []
    if tokens[-1][0] != "end":
        take(("(",), f"'(' after {name}")
        while tokens[-1][0] != ")":
            _, key = take(("word",), "key=value")
            take(("=",), f"key=value, that is '=' after {key}")
            kind, value = take(("word", "quoted"), f"a value for {key}")
            quoted = kind == "quoted"
            plain = re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL) if quoted else value
            pairs.append((key, (plain, quoted)))
            if tokens[-1][0] != ")":
                take((",",), f"',' or ')' after {key}={value}")
        tokens.pop()
    take(("end",), "nothing more after the spec")
    return name, pairs


def _choices(annotation: Any) -> tuple[tuple[type, ...], tuple[Any, ...]]:
    """The plain types and the literal values that an annotation allows."""
    parts = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    kinds = tuple(part for part in parts if part in _CALLED)
    literal = [part for part in parts if typing.get_origin(part) is typing.Literal]
    if len(kinds) + len(literal) < len(parts):
        raise TypeError(
            f"a spec field is none, bool, int, float, str, Literal or their union, not {annotation}"
        )
    literals = tuple(value for part in literal for value in typing.get_args(part))
    return kinds, literals


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def _read(word: str, quoted: bool, annotation: Any) -> Any:
    kinds, literals = _choices(annotation)
    for value in [word] if quoted else _readings(word):
        if type(value) in kinds or any(
            value == one and type(value) is type(one) for one in literals
        ):
            return value
    raise _Misfit


def _readings(word: str) -> list[Any]:
    """Every value that a bare word may stand for, the most special first."""
    readings: list[Any] = []
    if word in ("none", "None"):
        readings.append(None)
    if word in _BOOLS:
        readings.append(_BOOLS[word])
    if _INTEGER.fullmatch(word) and len(word) <= 4000:  # Python refuses to convert longer ones
        readings.append(int(word))
    if _NUMBER.fullmatch(word) and (math.isfinite(float(word)) or word.endswith("inf")):
        readings.append(float(word))
    return [*readings, word]


def _write(value: Any, where: str) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, numbers.Integral):
        return str(operator.index(value))
    if isinstance(value, numbers.Real) and not math.isnan(value):
        return float.__repr__(float(value))
    if not isinstance(value, str):
        raise SpecError(
            f"{where} holds {value!r}, and a spec can only say {', '.join(_CALLED.values())}"
        )
    match = _TOKEN.fullmatch(value)
    if match and match["word"] == value and _readings(value) == [value]:
        return value
    return "'" + re.sub(r"(['\\])", r"\\\1", value) + "'"


def _expected(annotation: Any) -> str:
    kinds, literals = _choices(annotation)
    return " or ".join(
        [*(_write(one, "a literal") for one in literals), *(_CALLED[kind] for kind in kinds)]
    )


def _listed(names: Mapping[str, Any], like: str | None = None) -> str:
    close = difflib.get_close_matches(like, names, n=1) if like else []
    return ", ".join(names) + (f" (did you mean {close[0]!r}?)" if close else "")


def _example(registry: Mapping[str, type]) -> str:
    return next(iter(registry), "name") + "(key=value)"
