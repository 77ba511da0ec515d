"""Documents agree with the checkout: links, anchors, file names, commands, and the methods that the README lists."""

import ast
import re
from pathlib import Path

import pytest

from alisa_jax.codecs import CODECS
from alisa_jax.placement import CONTROLLERS
from alisa_jax.policies import POLICIES

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ("README.md", "WORKSPACE.md", "docs/*.md")  # these describe the checkout of today
HISTORY = ("CHANGELOG.md", "eval/results/**/*.md", "configs/**/*.md")  # these may name what is gone
METHODS = (
    *(("alisa_jax/policies", name) for name in POLICIES),
    *(("alisa_jax/codecs", name) for name in CODECS),
    *(("alisa_jax/placement/controllers", name) for name in CONTROLLERS),
)
LINK = re.compile(r"(!?)\[((?:`[^`]*`|[^\[\]`])*)\]\(([^()\s]+)\)")


def found(patterns):
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def prose(path):
    """The text of a document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S)


def links(path):
    """(text, target) of every link and image that does not begin with a scheme."""
    pairs = [(text, target) for _, text, target in LINK.findall(prose(path))]
    pairs += [("", target) for target in re.findall(r'(?:src|href)="([^"]+)"', prose(path))]
    return [(text, target) for text, target in pairs if not re.match(r"[a-z]+:", target)]


def anchors(path):
    """The anchors that GitHub gives the headings of a document."""
    seen, out = {}, set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(path), flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub(r"\2", heading).lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        out.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
    return out


def spans(path):
    """The words of all code in backticks."""
    return [word for span in re.findall(r"`([^`\n]+)`", prose(path)) for word in span.split()]


def broken(path):
    """The targets of links in the document at `path` that are not there."""
    out = []
    for _, target in links(path):
        name, _, anchor = target.partition("#")
        file = (ROOT / path).parent / name if name else ROOT / path
        inside = file.resolve().is_relative_to(ROOT)
        if not inside or not file.exists() or (anchor and anchor not in anchors(file)):
            out.append(target)
    return out


@pytest.mark.parametrize("path", found(GUIDES + HISTORY))
def test_every_link_leads_to_a_file_and_a_heading(path):
    assert broken(path) == []


@pytest.mark.parametrize("path", found(GUIDES))
def test_every_file_name_is_that_of_a_file(path):
    names = {word for word in spans(path) if re.fullmatch(r"[\w.\-]+(/[\w.\-]+)+\.py", word)}
    assert [name for name in sorted(names) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("path", found(GUIDES))
def test_every_command_is_that_of_a_module(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    names = set(re.findall(r"-m ((?:eval|pallas_kernels)\.\w+)", text))
    names |= {word for word in spans(path) if re.fullmatch(r"eval\.\w+", word)}
    assert [name for name in sorted(names) if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []


def test_the_usage_page_lists_every_command():
    commands = {f"eval.{path.stem}" for path in (ROOT / "eval").glob("*.py")} - {"eval.__init__"}
    assert sorted(commands - set(spans("docs/usage.md"))) == []


def test_the_readme_has_at_most_130_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize(("folder", "name"), METHODS)
def test_the_readme_links_every_method_to_its_file(folder, name):
    targets = [target for text, target in links("README.md") if re.match(rf"`{name}\(", text)]
    assert targets, f"{name} stands in no link of the README"
    for target in targets:
        assert target.startswith(f"{folder}/") and (ROOT / target).is_file()


def snippet():
    """(first line, source) of the first Python block of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    return text[: block.start()].count("\n") + 1, block[1]


def test_the_readme_shows_python_before_line_45():
    line, source = snippet()
    assert line < 45
    ast.parse(source)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(capsys):
    exec(compile(snippet()[1], "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("def __init__(self")


@pytest.mark.slow
def test_the_first_policy_of_the_guide_keeps_the_contract_and_leaves_tokens_out(capsys):
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", text, re.S)[1], "extending.md", "exec"), names)
    assert "'routes'" in capsys.readouterr().out
    shares = names["engine"].score(["for i in range(10):\n    print(i)\n" * 9]).attended_frac
    assert (shares < 0.8).all()


@pytest.mark.parametrize(
    "line",
    ["[a](none.md)", "![a](none.png)", "[a](README.md#none)", "[`f(a | b)`](none.py)", "[a](../outside.md)", "[a](#b)"],
)
def test_a_broken_link_is_seen(line, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"# A heading\n{line}\n[good](#a-heading) [far](https://example.org/x)\n")
    assert len(broken("README.md")) == 1


def test_a_link_in_a_code_block_is_no_link(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "README.md").write_text("```\n[a](none.md)\n```\n")
    assert broken("README.md") == []
