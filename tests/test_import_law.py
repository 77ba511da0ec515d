"""The import law: what each part of the code may import and do, read from the syntax trees.

    0   axes, spec, records, calibration, ops and the leaf package pallas_kernels
    1   kv
    2   codecs, policies        siblings: neither imports the other
    3   attention               its compute.py alone imports pallas_kernels
    4   models, placement       siblings; models alone imports flax.linen, only placement/mover.py speaks of memory kinds
    5   engine, parallel, planning    siblings
    6   analysis
    top alisa_jax itself, lm_eval and testing

A module imports from strictly lower layers or from its own package. Further:

* alisa_jax imports, besides itself, the standard library and its dependencies: no configs, no eval;
* pallas_kernels imports itself, jax, NumPy, the standard library; Triton and Mosaic in its backend.py only;
* torch, huggingface_hub, jinja2, gguf and lm_eval, which are extras, are imported in the modules that `OPTIONAL` names,
  and inside functions, but for lm_eval, whose classes `alisa_jax.lm_eval` inherits;
* nothing mutable lives at the level of a module or a class: a list, dict or set there is a tuple, a frozenset
  or a ``MappingProxyType({...})`` (tables inside it may be plain dicts), arrays are made in functions, no
  function says ``global``; ``__all__`` is free;
* no statement assigns three or more values side by side (``a, b, c = x, y, z``), and none unpacks a generator
  (``a, b = (f(x) for x in pair)``): one thing a line;
* a module has a docstring and at most 350 lines, a kernel 400.
"""

import ast
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TOP = 7
LAYERS = {
    **dict.fromkeys(["axes", "spec", "records", "calibration", "ops"], 0),
    "kv": 1,
    **dict.fromkeys(["codecs", "policies"], 2),
    "attention": 3,
    **dict.fromkeys(["models", "placement"], 4),
    **dict.fromkeys(["engine", "parallel", "planning"], 5),
    "analysis": 6,
    **dict.fromkeys(["", "lm_eval", "testing"], TOP),
}
LIBRARIES = {"numpy", "jax"}
DEPENDENCIES = LIBRARIES | set(
    "absl flax jaxlib ml_dtypes optax orbax safetensors tokenizers tqdm pallas_kernels".split()
)
OPTIONAL = {
    "torch": ("alisa_jax/models/bin.py", "pallas_kernels/peers.py"),
    "huggingface_hub": ("alisa_jax/models/hub.py",),
    "jinja2": ("alisa_jax/models/chat.py",),
    "gguf": ("alisa_jax/models/gguf.py",),
    "lm_eval": ("alisa_jax/lm_eval/__init__.py",),
}
MEMORY = {"memory_kind", "with_memory_kind", "TransferToMemoryKind"}
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MAKERS = set("list dict set bytearray defaultdict OrderedDict Counter deque ChainMap WeakKeyDictionary local".split())
ARRAYS = set("array asarray zeros ones full empty arange linspace eye".split())


def violations(path: str, source: str) -> list[str]:
    """The sentences in which the module at `path` (from the root, with slashes) breaks the law."""
    tree = ast.parse(source)
    found = [*_size(path, source, tree), *_state(tree), *_eager(path, tree), *_crowded(tree)]
    for line, target in _imports(path, tree):
        found += [f"line {line}: {complaint}" for complaint in _import(path, target)]
    if path != "alisa_jax/placement/mover.py":
        found += _memory_kinds(tree)
    return found


def _imports(path: str, tree: ast.Module):
    """Each import as (line, dotted name); ``from a import b`` counts as a.b."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            named = node.args and isinstance(node.args[0], ast.Constant)
            yield node.lineno, str(node.args[0].value) if named else "a computed name"
        elif isinstance(node, ast.Attribute) and node.attr == "linen" and _name(node.value) == "flax":
            yield node.lineno, "flax.linen"


def _import(path: str, target: str):
    own, parts = _part(path), target.split(".")
    home, extra = path.split("/")[0], path in OPTIONAL.get(parts[0], ())
    if home == "alisa_jax" and own not in LAYERS:
        yield f"alisa_jax/{own} has no layer; give it one in the import law"
        return
    if any(part.startswith(("triton", "mosaic")) for part in parts) and path != "pallas_kernels/backend.py":
        yield f"{target} is imported outside pallas_kernels/backend.py"
    if parts[:2] == ["flax", "linen"] and own != "models":
        yield "flax.linen is imported outside alisa_jax/models"
    if home == "pallas_kernels":
        if parts[0] not in {"pallas_kernels", *LIBRARIES, *sys.stdlib_module_names} and not extra:
            yield f"pallas_kernels imports {target}"
    elif parts[0] == "alisa_jax":
        other = parts[1] if len(parts) > 1 and parts[1] in LAYERS else ""
        if other != own and LAYERS[other] >= LAYERS[own]:
            yield f"{own} (layer {LAYERS[own]}) imports {target} (layer {LAYERS[other]})"
        if (own, other) == ("placement", "models"):
            yield f"placement knows no model, and imports {target}"
    elif parts[0] == "pallas_kernels" and path != "alisa_jax/attention/compute.py":
        yield "pallas_kernels is imported outside alisa_jax/attention/compute.py"
    elif parts[0] not in DEPENDENCIES | sys.stdlib_module_names and not extra:
        yield f"alisa_jax imports {target}, which is not one of its dependencies"


def _eager(path: str, tree: ast.Module):
    imports = [n for n in _outside_functions(tree.body) if isinstance(n, (ast.Import, ast.ImportFrom))]
    for line, target in _imports(path, ast.Module(imports, [])):
        if target.split(".")[0] in OPTIONAL.keys() - {"lm_eval"}:
            yield f"line {line}: {target} is an extra and is imported outside a function"


def _part(path: str) -> str:
    """alisa_jax/kv/ring.py -> kv, alisa_jax/axes.py -> axes, alisa_jax/__init__.py -> the empty name."""
    part = path.split("/")[1].removesuffix(".py")
    return "" if part == "__init__" else part


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _memory_kinds(tree: ast.Module):
    for node in ast.walk(tree):
        word = node.arg if isinstance(node, ast.keyword) else node.attr if isinstance(node, ast.Attribute) else ""
        if word == "memory_kind" and isinstance(node, ast.Attribute):
            continue  # to look at a memory kind is not to choose one
        imported = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        space = isinstance(node, ast.Attribute) and word == "memory" and _name(node.value) == "jax"
        space |= isinstance(node, ast.ImportFrom) and node.module == "jax" and "memory" in imported
        if word in MEMORY or MEMORY & set(imported) or space:
            yield f"line {node.lineno}: a memory kind is chosen outside alisa_jax/placement/mover.py"


def _state(tree: ast.Module):
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: a function says global"
    for node in _outside_functions(tree.body):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value and [_name(target) for target in targets] != ["__all__"] and _mutable(node.value):
                yield f"line {node.lineno}: mutable state at the level of a module or class"


def _outside_functions(body: list[ast.stmt]):
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            for inner in ("body", "orelse", "finalbody"):
                yield from _outside_functions(getattr(node, inner, []))
            for handler in getattr(node, "handlers", []):
                yield from _outside_functions(handler.body)


def _mutable(value: ast.expr) -> bool:
    if isinstance(value, MUTABLE):
        return True
    if isinstance(value, ast.Tuple):
        return any(_mutable(item) for item in value.elts)
    if isinstance(value, (ast.BinOp, ast.IfExp, ast.BoolOp)):
        return any(_mutable(item) for item in ast.iter_child_nodes(value) if isinstance(item, ast.expr))
    if not isinstance(value, ast.Call):
        return False
    if _name(value.func) == "MappingProxyType" and isinstance(value.args[0], ast.Dict):
        return any(_mutable(item) for item in _table_values(value.args[0]))
    if isinstance(value.func, ast.Attribute) and _name(value.func.value) in ("np", "numpy", "jnp"):
        return value.func.attr in ARRAYS
    return _name(value.func) in MAKERS


def _table_values(table: ast.Dict):
    for value in table.values:
        yield from _table_values(value) if isinstance(value, ast.Dict) else [value]


def _crowded(tree: ast.Module):
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Tuple) for target in node.targets):
            if isinstance(node.value, ast.GeneratorExp):
                yield f"line {node.lineno}: a generator is unpacked; give each name a line"
            elif isinstance(node.value, ast.Tuple) and len(node.value.elts) > 2:
                yield f"line {node.lineno}: {len(node.value.elts)} values side by side; give each name a line"


def _size(path: str, source: str, tree: ast.Module):
    limit = 400 if path.startswith("pallas_kernels/") else 350
    lines = source.count("\n")
    if lines > limit:
        yield f"{lines} lines, at most {limit} are allowed"
    if source.strip() and ast.get_docstring(tree) is None:
        yield "no docstring"


MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("alisa_jax", "pallas_kernels")
    for path in (ROOT / package).rglob("*.py")
)


def test_the_law_finds_the_modules():
    assert {"alisa_jax/axes.py", "alisa_jax/spec.py", "alisa_jax/records.py"} <= set(MODULES)


@pytest.mark.parametrize("path", MODULES)
def test_module_keeps_the_law(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "code", "complaint"),
    [
        (
            "alisa_jax/axes.py",
            "from alisa_jax import spec",
            "axes (layer 0) imports alisa_jax.spec (layer 0)",
        ),
        ("alisa_jax/kv/ring.py", "import alisa_jax.policies.swa", "kv (layer 1) imports"),
        ("alisa_jax/kv/ring.py", "from alisa_jax.codecs import base", "kv (layer 1) imports"),
        ("alisa_jax/policies/swa.py", "from alisa_jax.codecs.raw import Raw", "policies (layer 2) imports"),
        (
            "alisa_jax/policies/swa.py",
            "from ..codecs import raw",
            "policies (layer 2) imports alisa_jax.codecs.raw",
        ),
        (
            "alisa_jax/policies/swa.py",
            "from .. import codecs",
            "policies (layer 2) imports alisa_jax.codecs (layer 2)",
        ),
        ("alisa_jax/kv/ring.py", "import alisa_jax", "kv (layer 1) imports alisa_jax (layer 7)"),
        (
            "alisa_jax/kv/ring.py",
            "from alisa_jax import load",
            "kv (layer 1) imports alisa_jax.load (layer 7)",
        ),
        (
            "alisa_jax/attention/layer.py",
            "def f():\n    from alisa_jax import models",
            "attention (layer 3) imports",
        ),
        ("alisa_jax/models/llama.py", "from alisa_jax.placement import plan", "models (layer 4) imports"),
        ("alisa_jax/placement/plan.py", "import alisa_jax.models.decoder", "placement knows no model"),
        ("alisa_jax/parallel/tensor.py", "import alisa_jax.engine", "parallel (layer 5) imports"),
        ("alisa_jax/planning/request.py", "from alisa_jax import engine", "planning (layer 5) imports"),
        (
            "alisa_jax/engine/loop.py",
            "import importlib\nimportlib.import_module('alisa_jax.lm_eval')",
            "engine",
        ),
        ("alisa_jax/engine/loop.py", "import importlib\nimportlib.import_module(name)", "a computed name"),
        ("alisa_jax/newpart/x.py", "import jax", "alisa_jax/newpart has no layer"),
        ("alisa_jax/models/llama.py", "import configs.models.llama_7b", "not one of its dependencies"),
        ("alisa_jax/__init__.py", "from eval import perplexity", "imports eval.perplexity"),
        ("alisa_jax/models/llama.py", "import transformers", "imports transformers"),
        ("alisa_jax/models/weights.py", "def f():\n    import torch", "imports torch"),
        ("alisa_jax/models/bin.py", "import torch", "torch is an extra and is imported outside"),
        ("alisa_jax/models/hub.py", "from huggingface_hub import hf_api", "an extra and is imported outside"),
        ("alisa_jax/models/chat.py", "import jinja2.sandbox", "an extra and is imported outside"),
        ("alisa_jax/models/tokenizer.py", "def f():\n    import jinja2", "imports jinja2"),
        ("alisa_jax/lm_eval/__init__.py", "def f():\n    import torch", "imports torch"),
        ("alisa_jax/engine/loop.py", "def f():\n    from lm_eval.api import model", "imports lm_eval.api.model"),
        ("alisa_jax/__init__.py", "from alisa_jax.lm_eval import AlisaLM", "imports alisa_jax.lm_eval"),
        ("alisa_jax/kv/ring.py", "from pallas_kernels import bench", "outside alisa_jax/attention/compute.py"),
        ("alisa_jax/__init__.py", "import pallas_kernels", "outside alisa_jax/attention/compute.py"),
        ("pallas_kernels/shapes.py", "from alisa_jax import axes", "pallas_kernels imports alisa_jax.axes"),
        ("pallas_kernels/shapes.py", "import flax", "pallas_kernels imports flax"),
        ("pallas_kernels/bench.py", "def f():\n    import torch", "pallas_kernels imports torch"),
        ("pallas_kernels/peers.py", "import torch", "torch is an extra and is imported outside"),
        (
            "pallas_kernels/int8.py",
            "from jax.experimental.pallas import triton as plt",
            "outside pallas_kernels",
        ),
        (
            "pallas_kernels/int8.py",
            "import jax.experimental.pallas.mosaic_gpu",
            "outside pallas_kernels/backend",
        ),
        (
            "alisa_jax/attention/layer.py",
            "from jax.experimental.pallas.triton import load",
            "outside pallas_kernels",
        ),
        ("alisa_jax/engine/step.py", "from flax import linen as nn", "flax.linen is imported outside"),
        ("alisa_jax/engine/step.py", "import flax.linen", "flax.linen is imported outside"),
        ("alisa_jax/engine/step.py", "import flax\nx = flax.linen.Dense", "flax.linen is imported outside"),
        ("alisa_jax/engine/step.py", "s = Sharding(d, memory_kind='device')", "a memory kind is chosen"),
        ("alisa_jax/placement/plan.py", "s = old.with_memory_kind('device')", "a memory kind is chosen"),
        ("alisa_jax/placement/plan.py", "x = jax.memory.Space.Host", "a memory kind is chosen"),
        ("alisa_jax/kv/ring.py", "from jax.sharding import TransferToMemoryKind", "a memory kind is chosen"),
        ("alisa_jax/kv/ring.py", "from jax import memory", "a memory kind is chosen"),
        ("alisa_jax/spec.py", "CACHE = {}", "line 2: mutable state"),
        ("alisa_jax/spec.py", "names: list[str] = []", "mutable state"),
        ("alisa_jax/spec.py", "A = (1, [2])", "mutable state"),
        ("alisa_jax/spec.py", "A = B = {n for n in range(3)}", "mutable state"),
        ("alisa_jax/spec.py", "if True:\n    A = dict(a=1)", "mutable state"),
        ("alisa_jax/spec.py", "try:\n    A = 1\nexcept ValueError:\n    A = []", "mutable state"),
        ("alisa_jax/spec.py", "A = collections.defaultdict(int)", "mutable state"),
        ("alisa_jax/spec.py", "A = MappingProxyType({'a': [1]})", "mutable state"),
        ("alisa_jax/spec.py", "A = MappingProxyType({'a': {'b': [1]}})", "mutable state"),
        ("alisa_jax/spec.py", "A = [1] * 3", "mutable state"),
        ("alisa_jax/spec.py", "class C:\n    seen = {}", "mutable state"),
        ("alisa_jax/spec.py", "ONES = jnp.ones(3)", "mutable state"),
        ("alisa_jax/spec.py", "def f():\n    global x\n    x = 1", "a function says global"),
        ("alisa_jax/spec.py", "a, b, c = x, y, z", "line 2: 3 values side by side"),
        ("alisa_jax/spec.py", "def f():\n    q, k = (g(x) for x in pair)", "line 3: a generator is unpacked"),
        ("pallas_kernels/online.py", "q, k = (g(x) for x in pair)", "a generator is unpacked"),
        ("alisa_jax/spec.py", "x = 1\n" * 350, "351 lines, at most 350 are allowed"),
        ("pallas_kernels/shapes.py", "x = 1\n" * 400, "401 lines, at most 400 are allowed"),
    ],
)
def test_the_law_sees_a_breach(path, code, complaint):
    found = violations(path, f'"""A module."""\n{code}')
    assert any(complaint in sentence for sentence in found), found


def test_the_law_sees_a_missing_docstring():
    assert violations("alisa_jax/spec.py", "import jax") == ["no docstring"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (
            "alisa_jax/kv/ring.py",
            "from alisa_jax import axes\nfrom alisa_jax.ops.writes import put\nfrom . import rows",
        ),
        ("alisa_jax/attention/compute.py", "from alisa_jax import codecs, kv\nimport pallas_kernels.sparse_decode"),
        ("alisa_jax/attention/layer.py", "from alisa_jax import kv\nfrom alisa_jax.attention import compute"),
        ("alisa_jax/engine/offload/run.py", "from alisa_jax.engine import step\nfrom alisa_jax.placement import plan"),
        (
            "alisa_jax/models/llama.py",
            "import flax.linen as nn\nfrom flax import linen\nimport jax.numpy as jnp",
        ),
        (
            "alisa_jax/placement/plan.py",
            "from alisa_jax.kv import state\nfrom alisa_jax.attention.compute import merge",
        ),
        (
            "alisa_jax/placement/mover.py",
            "import jax\nx = jax.device_put(y, s.with_memory_kind('pinned_host'))",
        ),
        ("alisa_jax/placement/plan.py", "kind = array.sharding.memory_kind"),
        (
            "alisa_jax/engine/loop.py",
            "from alisa_jax.models.decoder import Decoder\nimport alisa_jax.placement.plan",
        ),
        ("alisa_jax/__init__.py", "from alisa_jax.engine import Engine\n__all__ = ['Engine']"),
        ("alisa_jax/lm_eval/__init__.py", "import alisa_jax.engine\nfrom lm_eval.api.model import TemplateLM"),
        ("alisa_jax/models/bin.py", "def f():\n    import torch"),
        ("pallas_kernels/peers.py", "def f():\n    import torch"),
        ("pallas_kernels/backend.py", "from jax.experimental.pallas import triton, mosaic_gpu"),
        ("pallas_kernels/bench.py", "import time\nimport numpy as np\nfrom pallas_kernels import backend"),
        (
            "alisa_jax/spec.py",
            "A = MappingProxyType({'a': (1, 2), 'b': {'c': 1}})\nB = frozenset({1, 2})\nC = tuple([1, 2])",
        ),
        (
            "alisa_jax/spec.py",
            "class C:\n    names: list = field(default_factory=list)\n    def f(self):\n        x = []",
        ),
        ("alisa_jax/spec.py", "A = jnp.float32\nB = np.dtype('int8')\nx: dict[str, int]"),
        ("alisa_jax/spec.py", "B, T, N, H = q.shape\na, b = x, y\nfor a, b, c in rows:\n    pass\nx = (a, b, c)"),
        ("alisa_jax/kv/__init__.py", ""),
    ],
)
def test_the_law_allows(path, code):
    assert violations(path, f'"""A module."""\n{code}') == []
