"""Specs parse to dataclasses and print back."""

import dataclasses
import math
from typing import ClassVar, Literal, Optional

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from alisa_jax import spec
from alisa_jax.spec import SpecError


@dataclasses.dataclass(frozen=True)
class Dense:
    evicts: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Local:
    kv_sparsity: float | None = None
    tokens: int | None = None

    def __post_init__(self):
        if self.kv_sparsity is not None and not 0 <= self.kv_sparsity < 1:
            raise ValueError(f"kv_sparsity must be in [0, 1), got {self.kv_sparsity}")


@dataclasses.dataclass(frozen=True)
class Full:
    count: int
    share: float = 0.5
    on: bool = True
    word: str = "k"
    window: int | str = "k"
    maybe: "float | None" = None
    old: Optional[str] = None  # noqa: UP045
    anchor: Literal["position", "query"] = "position"
    size: Literal[1, 2] | None = 2
    any: bool | int | float | str | None = None
    made: str = dataclasses.field(default_factory=lambda: "made")
    derived: int = dataclasses.field(default=0, init=False)


KNOWN = {"dense": Dense, "local": Local, "full": Full}


def parse(text):
    return spec.parse(text, KNOWN)


def sentence(text):
    with pytest.raises(SpecError) as error:
        parse(text)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("text", ["dense", "dense()", "  dense  ", "dense ( )"])
def test_a_name_alone_is_the_defaults(text):
    assert parse(text) == Dense()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("local(kv_sparsity=0.8)", Local(0.8)),
        ("local(kv_sparsity=0)", Local(0.0)),
        ("local(kv_sparsity=8e-1, tokens = 16)", Local(0.8, 16)),
        ("local(tokens=16,)", Local(None, 16)),
        ("local(tokens=none,kv_sparsity=None)", Local()),
        ("full(count=-3)", Full(-3)),
        ("full(count=1,on=false)", Full(1, on=False)),
        ("full(count=1,on=True)", Full(1, on=True)),
        ("full(count=1,word=2k)", Full(1, word="2k")),
        ("full(count=1,word=16)", Full(1, word="16")),
        ("full(count=1,word=none)", Full(1, word="none")),
        ("full(count=1,word='a, b=(c)')", Full(1, word="a, b=(c)")),
        ('full(count=1,word="it\'s")', Full(1, word="it's")),
        (r"full(count=1,word='a\'b\\')", Full(1, word="a'b\\")),
        ("full(count=1,window=16)", Full(1, window=16)),
        ("full(count=1,window='16')", Full(1, window="16")),
        ("full(count=1,window=2k)", Full(1, window="2k")),
        ("full(count=1,maybe=3)", Full(1, maybe=3.0)),
        ("full(count=1,maybe=-inf)", Full(1, maybe=-math.inf)),
        ("full(count=1,old=none)", Full(1)),
        ("full(count=1,old='none')", Full(1, old="none")),
        ("full(count=1,anchor=query)", Full(1, anchor="query")),
        ("full(count=1,size=1)", Full(1, size=1)),
        ("full(count=1,any=true)", Full(1, any=True)),
        ("full(count=1,any=1)", Full(1, any=1)),
        ("full(count=1,any=1.0)", Full(1, any=1.0)),
        ("full(count=1,any=x/y:z)", Full(1, any="x/y:z")),
    ],
)
def test_values_are_read_as_their_fields_say(text, value):
    parsed = parse(text)
    assert parsed == value
    for field in dataclasses.fields(value):
        assert type(getattr(parsed, field.name)) is type(getattr(value, field.name))


@pytest.mark.parametrize(
    ("obj", "text"),
    [
        (Dense(), "dense"),
        (Local(), "local"),
        (Local(tokens=16, kv_sparsity=0.8), "local(kv_sparsity=0.8,tokens=16)"),
        (Local(np.float64(0.5), np.int32(3)), "local(kv_sparsity=0.5,tokens=3)"),
        (Full(7), "full(count=7)"),
        (
            Full(7, on=False, word="", window="16", old="none"),
            "full(count=7,on=false,word='',window='16',old='none')",
        ),
        (Full(7, size=None, made="it's"), r"full(count=7,size=none,made='it\'s')"),
    ],
)
def test_only_what_differs_from_the_defaults_is_printed(obj, text):
    assert spec.to_text(obj, KNOWN) == text
    assert parse(text) == obj


finite = st.floats(allow_nan=False)
fulls = st.builds(
    Full,
    count=st.integers(),
    share=finite,
    on=st.booleans(),
    word=st.text(),
    window=st.integers() | st.text(),
    maybe=st.none() | finite,
    old=st.none() | st.text() | st.sampled_from(["none", "true", "1", "1e5", "'", "\\"]),
    anchor=st.sampled_from(["position", "query"]),
    size=st.sampled_from([None, 1, 2]),
    any=st.none() | st.booleans() | st.integers() | finite | st.text(),
    made=st.text(),
)


@hypothesis.given(fulls)
def test_what_is_printed_parses_back_to_the_same(obj):
    assert parse(spec.to_text(obj, KNOWN)) == obj


@hypothesis.given(st.text(alphabet="dense local(),='\"\\ 0.5tk_\n", max_size=30))
def test_any_text_parses_or_raises_spec_error(text):
    try:
        obj = parse(text)
    except SpecError:
        return
    assert parse(spec.to_text(obj, KNOWN)) == obj


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "locl(tokens=3)",
            "locl(tokens=3): unknown name 'locl'; known names are dense, local, full (did you mean 'local'?)",
        ),
        ("zzz", "zzz: unknown name 'zzz'; known names are dense, local, full"),
        (
            "local(token=3)",
            "local(token=3): unknown key 'token'; local takes kv_sparsity, tokens (did you mean 'tokens'?)",
        ),
        ("dense(x=3)", "dense(x=3): unknown key 'x'; dense takes no keys"),
        ("dense(evicts=true)", "dense(evicts=true): unknown key 'evicts'; dense takes no keys"),
        ("local(tokens=3,tokens=4)", "local(tokens=3,tokens=4): the key 'tokens' is given twice"),
        ("full", "full: full needs a value for count"),
        ("local(kv_sparsity=1.5)", "local(kv_sparsity=1.5): kv_sparsity must be in [0, 1), got 1.5"),
        ("local(tokens=1.5)", "local(tokens=1.5): tokens must be an integer or none, got '1.5'"),
        ("local(tokens=true)", "local(tokens=true): tokens must be an integer or none, got 'true'"),
        ("local(tokens='3')", "local(tokens='3'): tokens must be an integer or none, got '3'"),
        ("local(kv_sparsity=nan)", "local(kv_sparsity=nan): kv_sparsity must be a number or none, got 'nan'"),
        (
            "local(kv_sparsity=1e999)",
            "local(kv_sparsity=1e999): kv_sparsity must be a number or none, got '1e999'",
        ),
        ("full(count=1,on=1)", "full(count=1,on=1): on must be true or false, got '1'"),
        ("full(count=1,anchor=key)", "full(count=1,anchor=key): anchor must be position or query, got 'key'"),
        ("full(count=1,size=3)", "full(count=1,size=3): size must be 1 or 2 or none, got '3'"),
        (
            "full(count=1,derived=3)",
            "full(count=1,derived=3): unknown key 'derived'; full takes "
            "count, share, on, word, window, maybe, old, anchor, size, any, made",
        ),
        ("", "an empty spec: expected a name such as name or name(key=value), got the end"),
        ("3()", "3(): expected a name such as name or name(key=value), got '3'"),
        ("(a=1)", "(a=1): expected a name such as name or name(key=value), got '('"),
        ("local tokens=3", "local tokens=3: expected '(' after local, got 'tokens'"),
        ("local(3)", "local(3): expected key=value, that is '=' after 3, got ')'"),
        ("local(=3)", "local(=3): expected key=value, got '='"),
        ("local(,)", "local(,): expected key=value, got ','"),
        ("local(tokens=)", "local(tokens=): expected a value for tokens, got ')'"),
        ("local(tokens=3", "local(tokens=3: expected ',' or ')' after tokens=3, got the end"),
        ("local(tokens=3 4)", "local(tokens=3 4): expected ',' or ')' after tokens=3, got '4'"),
        ("local(tokens=3))", "local(tokens=3)): expected nothing more after the spec, got ')'"),
        ("dense() end", "dense() end: expected nothing more after the spec, got 'end'"),
        ("local(tokens='3)", "local(tokens='3): a quote is opened and not closed"),
    ],
)
def test_errors_say_what_is_wrong_and_what_is_allowed(text, message):
    assert sentence(text) == message


def test_what_is_no_text_is_refused():
    with pytest.raises(SpecError, match=r"^a spec is text such as 'dense\(key=value\)', got 3$"):
        parse(3)


def test_an_object_without_a_name_cannot_be_printed():
    with pytest.raises(SpecError, match=r"int has no name; known names are dense, local, full$"):
        spec.to_text(3, KNOWN)


@pytest.mark.parametrize("value", [math.nan, [1], 1j])
def test_a_value_that_specs_cannot_say_cannot_be_printed(value):
    with pytest.raises(SpecError, match="^full: any holds .*, and a spec can only say none"):
        spec.to_text(Full(1, any=value), KNOWN)


def test_a_field_of_another_type_is_a_mistake_of_the_program():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        sizes: tuple[int, ...] = ()

    with pytest.raises(TypeError, match="a spec field is none, bool, int, float, str, Literal or their union"):
        spec.parse("odd(sizes=3)", {"odd": Odd})
