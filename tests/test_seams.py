"""Seams, read from the syntax trees of the library, the commands, the tests and the notebooks' cells:

* nothing asks of which kind a store, a layer or a state is: no isinstance, type, hasattr or getattr of one, and no
  isinstance or match against `Store`, `Ring`, `LayerState`;
* no private name of an engine, of its programs or of a placed run is used outside its module.
"""

import ast
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("alisa_jax", "eval", "tests")
OF_KIND = frozenset(("isinstance", "issubclass"))
QUESTIONS = OF_KIND | {"type", "hasattr", "getattr"}
BY_NAME = frozenset(("hasattr", "getattr", "setattr", "delattr"))
ASKED = frozenset(("store", "layer", "state"))
KINDS = frozenset(("Store", "Ring", "LayerState", "TokenStore"))
OWNERS = frozenset(("engine", "programs", "run", "placed"))


def complaints(source: str) -> list[str]:
    """What the code asks or uses that it should not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args:
            found += [f"line {node.lineno}: {text}" for text in _call(name_of(node.func), *node.args)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and name_of(node.value) in OWNERS:
            found.append(f"line {node.lineno}: {name_of(node.value)}.{node.attr} is private")
        elif isinstance(node, ast.match_case):
            kinds = {name_of(x.cls) for x in ast.walk(node.pattern) if isinstance(x, ast.MatchClass)}
            found += [f"line {node.pattern.lineno}: match against {kind}" for kind in sorted(kinds & KINDS)]
    return found


def _call(function: str, first: ast.expr, *others: ast.expr):
    subject = name_of(first)
    if function in QUESTIONS and subject in ASKED:
        yield f"{function} of a {subject}"
    elif function in OF_KIND and others:
        for kind in sorted(KINDS & {name_of(node) for node in ast.walk(others[0])}):
            yield f"{function} against {kind}"
    named = others[0].value if others and isinstance(others[0], ast.Constant) else ""
    if function in BY_NAME and subject in OWNERS and is_private(str(named)):
        yield f"{subject}.{named} is private"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def name_of(node: ast.AST) -> str:
    """The last name of `a`, `b.a`, `a[0]` and `a()`; none of anything else."""
    while isinstance(node, (ast.Subscript, ast.Call)):
        node = node.value if isinstance(node, ast.Subscript) else node.func
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def cells(notebook: Path) -> str:
    """The code of a notebook; lines of IPython's own are left out."""
    code = [
        cell["source"]
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    lines = "\n".join("".join(source) for source in code).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def sources() -> dict[str, str]:
    found = {path: path.read_text(encoding="utf-8") for part in FOLDERS for path in (ROOT / part).rglob("*.py")}
    found |= {path: cells(path) for path in (ROOT / "eval" / "notebooks").glob("*.ipynb")}
    return {path.relative_to(ROOT).as_posix(): text for path, text in found.items()}


def test_nothing_asks_for_a_kind_or_uses_a_private_name_of_another_module():
    found = {path: complaints(source) for path, source in sources().items()}
    assert {path: said for path, said in found.items() if said} == {}


def test_all_code_is_looked_at():
    read = set(sources())
    assert {"alisa_jax/kv/state.py", "eval/speed/breakdown.py", "tests/test_seams.py"} <= read
    assert sum(path.endswith(".ipynb") for path in read) >= 1


@pytest.mark.parametrize(
    "code, says",
    [
        ("isinstance(state.store, Ring)", "isinstance of a store"),
        ("isinstance(x, Ring)", "isinstance against Ring"),
        ("isinstance(x, (int, kv.LayerState))", "isinstance against LayerState"),
        ("isinstance(x, Store | None)", "isinstance against Store"),
        ("issubclass(cls, Store)", "issubclass against Store"),
        ("type(layer) is tuple", "type of a layer"),
        ("type(kv.layer[0])", "type of a layer"),
        ("hasattr(state, 'pending')", "hasattr of a state"),
        ("getattr(part.store, 'host', None)", "getattr of a store"),
        ("match x:\n case Ring(): pass", "match against Ring"),
        ("match x:\n case [kv.Store(), _]: pass", "match against Store"),
        ("engine._prefill(x)", "engine._prefill is private"),
        ("self.engine._prefill", "engine._prefill is private"),
        ("engine.programs._score", "programs._score is private"),
        ("side.run._take(x)", "run._take is private"),
        ("runs[0].placed._run", "placed._run is private"),
        ("make().engine._step", "engine._step is private"),
        ("setattr(engine, '_step', x)", "engine._step is private"),
    ],
)
def test_a_planted_question_is_found(code, says):
    assert [text.partition(": ")[2] for text in complaints(code)] == [says]


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(codec, Calibrating)",
        "isinstance(x, str)",
        "type(policy)",
        "store.k.astype(dtype)",
        "engine.programs.score(x)",
        "run.__class__",
        "self._run(x)",
        "match x:\n case int(): pass",
        "monkeypatch.setattr(layer, 'measured', x)",
        "getattr(policy, 'dense_layers', 0)",
        "Store.empty(codec, 1, 2, 3, 4)",
    ],
)
def test_other_code_is_left_alone(code):
    assert complaints(code) == []
