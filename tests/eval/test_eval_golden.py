"""Golden records: how they are compared, made and resumed, and that the library still gives those that are committed."""

import copy
import json
import os
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest

from alisa_jax import records
from eval import golden
from eval.quality import golden_arrays, golden_cells, golden_compare
from eval.quality.golden_cells import Cell, Measured
from eval.script import common, inputs

SEED = int(os.environ.get("ALISA_TEST_SEED") or np.random.SeedSequence().generate_state(1)[0])
SAMPLE = 12
SWA = Cell("bundled", "swa(kv_sparsity=0.8)", "raw")
H2O = Cell("bundled", "h2o(kv_sparsity=0.8)", "int4")
ALISA = Cell("bundled", "swa(kv_sparsity=0.6,spare_slots=0)", "int8", "alisa(beta=0.3,p2=4)", placed=True)


@pytest.fixture(scope="module")
def kept(repository):
    return records.read(repository / "eval" / "results" / "golden.jsonl")


@pytest.fixture(scope="module")
def repository(request):
    return request.config.rootpath


@pytest.fixture
def of(kept):
    """`of(cell)`: its record, and what running the cell gave when it was made, to be changed at will."""

    def make(cell):
        record = next(r for r in reversed(kept) if all(r[k] == v for k, v in cell.fields().items()))
        values = copy.deepcopy({name: record[name] for name in golden_compare.VALUES if name in record})
        return record, Measured(values, [[None] * len(entry["layers"]) for entry in values["sets"]])

    return make


def changed(text: str, by) -> str:
    """An array of a record with `by(array)` in its place."""
    kind, x = golden_arrays.array_of(text)
    return golden_arrays.array_text(by(x.copy()))


CHANGES = MappingProxyType(
    {
        "tokens": lambda v: v["tokens"][1].__setitem__(3, 7),
        "logprobs": lambda v: v["logprobs"][2].__setitem__(0, float(np.nextafter(np.float32(v["logprobs"][2][0]), 0))),
        "margins": lambda v: v["margins"][0].__setitem__(23, v["margins"][0][23] + 1e-6),
        "sets": lambda v: v["sets"][1]["layers"].reverse(),
        "kv_bytes": lambda v: v.update(kv_bytes=v["kv_bytes"] + 1),
        "other_bytes": lambda v: v.update(other_bytes=v["other_bytes"] + 1),
        "codes": lambda v: v["codes"].update({k: list(reversed(x)) for k, x in v["codes"].items()}),
    }
)


@pytest.mark.parametrize("name", CHANGES)
def test_to_the_bit_every_difference_is_found_and_named(of, name):
    record, got = of(H2O)
    assert not golden_compare.compare(record, got, H2O, exact=True).differs
    CHANGES[name](got.values)
    assert list(golden_compare.compare(record, got, H2O, exact=True).differs) == [name]


@pytest.mark.parametrize("exact", [True, False])
def test_moves_of_placed_runs_are_compared_and_a_missing_value_is_named(of, exact):
    record, got = of(ALISA)
    got.values["moved"]["loaded_rows"] += 1
    one = golden_compare.compare(record, got, ALISA, exact)
    assert one.differs == {
        "moved": f"[loaded_rows] is {record['moved']['loaded_rows'] + 1}, was {record['moved']['loaded_rows']}"
    }
    got.values["moved"] |= {"loaded_rows": record["moved"]["loaded_rows"], "device_peak_bytes": 1}
    assert not golden_compare.compare(record, got, ALISA, exact).differs, "peaks hang on when a copy ends"
    del got.values["moved"]
    assert one.differs.keys() == golden_compare.compare(record, got, ALISA, exact).differs.keys()


@pytest.mark.parametrize("margin, ties", [(5e-5, 1), (1e-3, 0)])
def test_another_token_is_a_tie_only_at_a_small_margin_and_what_follows_is_not_compared(of, margin, ties):
    record, got = of(SWA)
    record = record | {"margins": copy.deepcopy(record["margins"])}
    record["margins"][1][20] = margin
    got.values["tokens"][1][20] += 1
    got.values["logprobs"][1][21] += 1.0
    got.values["sets"][-1]["layers"] = got.values["sets"][0]["layers"]  # of other sequences as well
    one = golden_compare.compare(record, got, SWA, exact=False)
    assert one.ties == ties and ("tokens" in one.differs) == (not ties)
    assert "logprobs" not in one.differs and "sequence 1" not in one.differs["sets"]


@pytest.mark.parametrize("nats, named", [(5e-5, []), (3e-4, ["logprobs"])])
def test_log_probabilities_may_differ_by_a_ten_thousandth(of, nats, named):
    record, got = of(SWA)
    got.values["logprobs"][0][5] += nats
    assert list(golden_compare.compare(record, got, SWA, exact=False).differs) == named
    got.values["logprobs"][0][5] = float("nan")
    assert list(golden_compare.compare(record, got, SWA, exact=False).differs) == ["logprobs"]


@pytest.mark.parametrize("token, nats, named", [(0, 3e-4, ["logprobs"]), (5, 3e-3, []), (5, 1.0, ["logprobs"])])
def test_a_code_step_may_move_what_reads_codes_but_not_the_first_token(of, token, nats, named):
    record, got = of(H2O)
    got.values["logprobs"][0][token] += nats
    one = golden_compare.compare(record, got, H2O, exact=False)
    assert list(one.differs) == named and one.stepped == 1


@pytest.mark.parametrize("apart, ties", [(5e-5, 1), (1e-3, 0), (np.nan, 0)])
def test_sets_may_exchange_members_of_equal_score(of, apart, ties):
    record, got = of(SWA)
    last = got.values["sets"][-1]
    bits = golden_arrays.bits_of(last["layers"][2])
    out, into = np.flatnonzero(bits[1, 0])[0], np.flatnonzero(~bits[1, 0])[0]
    bits[1, 0, [out, into]] = False, True
    last["layers"][2] = golden_arrays.bits_text(bits)
    score = np.zeros(bits.shape, np.float32)
    score[1, 0, out] = apart
    got.scores[-1][2] = score
    got.values["logprobs"][1][golden_cells.NEW_TOKENS - 1] += 1.0  # it follows
    one = golden_compare.compare(record, got, SWA, exact=False)
    assert one.ties == ties
    assert list(one.differs) == ([] if ties else ["sets", "logprobs"])
    assert ties or f"layer 2, sequence 1, head 0, after 24 tokens: [{into}] instead of [{out}]" in one.differs["sets"]


@pytest.mark.parametrize("steps, named", [(1, []), (2, ["codes"])])
def test_codes_may_be_one_step_apart_also_those_that_share_a_byte(of, steps, named):
    record, got = of(H2O)
    key = next(iter(got.values["codes"]))
    kinds = [golden_arrays.array_of(text)[0] for text in got.values["codes"][key]]
    i = kinds.index("uint8")

    def move(x):
        high = x[0] >> 4
        x[0] = (x[0] & 15) | ((high + steps if high < 8 else high - steps) << 4)
        return x

    got.values["codes"][key][i] = changed(got.values["codes"][key][i], move)
    one = golden_compare.compare(record, got, H2O, exact=False)
    assert list(one.differs) == named and one.code_steps == (steps == 1)


def test_an_exception_is_named_and_none_where_bits_are_compared(of, monkeypatch):
    record, got = of(SWA)
    got.values["logprobs"][0][5] += 1e-3
    monkeypatch.setattr(golden_compare, "EXCEPTIONS", {"bundled | swa* | raw*": (("logprobs",), "they may")})
    one = golden_compare.compare(record, got, SWA, exact=False)
    assert not one.differs and one.excepted["logprobs"].endswith("1.0e-03 nats apart; they may")
    assert list(golden_compare.compare(record, got, SWA, exact=True).differs) == ["logprobs"]


VALUES = SimpleNamespace(reordered=False, json=False)


@pytest.mark.parametrize(
    "other, reordered, right",
    [({}, False, False), ({}, True, True), ({"jaxlib": "0.0"}, False, True), ({"processor": "x"}, False, True)],
)
def test_only_a_record_of_equal_settings_is_compared_to_the_bit(of, monkeypatch, capsys, other, reordered, right):
    record, got = of(SWA)
    got.values["logprobs"][0][5] += 1e-6
    here = {name: record[name] for name in golden.SAME}
    monkeypatch.setattr(records, "environment", lambda: here)
    monkeypatch.setattr(golden, "settings", dict)
    values = SimpleNamespace(reordered=reordered, json=False)
    hashes = {"bundled": record["model_sha256"]}
    assert golden.check([SWA], hashes, lambda cell: got, [record | other], values) == right
    said = capsys.readouterr().out
    assert ("1 within tolerance" in said) == right and ("logprobs" in said) == (not right)


def test_a_cell_without_a_record_differs_and_the_exit_code_tells(kept, repository, monkeypatch, capsys, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in kept if r["policy"] == SWA.policy and not r["placed"]))
    argv = ["x", f"--check={path}", "--only=bundled | dense | raw | resident", "--compile_cache=none"]
    with pytest.raises(SystemExit) as error:
        golden.main(argv, make_engine=lambda *_: None)
    assert error.value.code == golden.EXIT_DIFFERS
    assert "there is none of this cell and model" in capsys.readouterr().out


def test_finished_cells_are_not_run_again(of, monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(golden_cells, "measure", lambda cell, *_: ran.append(cell) or of(SWA)[1])
    out = tmp_path / "golden.jsonl"
    argv = ["x", f"--out={out}", "--only=bundled | local", "--compile_cache=none"]
    run = lambda *more: golden.main([*argv, *more], make_engine=lambda *_: None)
    run("--cells=2")
    assert len(ran) == len(records.read(out)) == 2
    run()
    cells = len(ran)
    assert len(set(ran)) == cells == len(records.read(out)) == 5
    assert "2 of 5 cells were finished in golden.jsonl" in capsys.readouterr().err
    run("--rerun")
    assert len(ran) == 2 * cells and len(records.read(out)) == 2 * cells


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--check=a.jsonl", "--out=b.jsonl"], "and not both"),
        (["--reordered"], "needs --check"),
        (["--check=nothing.jsonl"], "cannot read results"),
        (["--only=nobody"], "no cell's name contains 'nobody'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(flags, says):
    with pytest.raises(common.UserError, match=says):
        golden.main(["x", "--compile_cache=none", *flags], make_engine=lambda *_: None)


def test_a_sample_takes_from_every_kind_and_its_seed_gives_it_again():
    cells = [Cell(m, str(i), "raw", placed=p) for m in ("a", "b") for p in (False, True) for i in range(20 - 14 * p)]
    some = golden.sample(cells, 8, 3)
    assert some == golden.sample(cells, 8, 3) != golden.sample(cells, 8, 4)
    assert [sum((c.model, c.placed) == kind for c in some) for kind in (("a", False), ("b", True))] == [2, 2]
    assert len(golden.sample(cells, 45, 0)) == 45 and golden.sample(cells, 99, 0) == cells


def test_sets_are_bits_of_all_positions():
    assert golden_arrays.POSITIONS == max(golden_cells.LENGTHS) + golden_cells.NEW_TOKENS


def test_committed_records_hold_runs_that_leave_out_move_and_recompute(kept):
    for record in kept:
        policy, controller = (record[k].split("(")[0] for k in ("policy", "placement"))
        if not record["placed"]:
            held = [golden_arrays.bits_of(text) for text in record["sets"][-1]["layers"]]
            fewest = min(int(x.sum(-1).min()) for x in held)
            assert (fewest < 70) == (policy not in ("dense", "gemfilter"))
            assert [s["made"] for s in record["sets"]] == ([1, 7, 24] if policy == "gemfilter" else [1, 12, 24])
        elif controller in ("accelerate", "flexgen", "alisa"):
            moved = record["moved"]
            assert moved["load_bytes"] > 0 and moved["store_bytes"] > 0 and moved["p1"] < 24
            assert ("p2" in record["placement"]) == (moved["recomputed_tokens"] > 0)
    assert {r["placement"].split("(")[0] for r in kept if r["placed"]} >= {
        "resident",
        "waves",
        "accelerate",
        "flexgen",
        "alisa",
    }


def test_what_the_library_gives_is_what_it_gave(kept, repository, request, capsys):
    """A sample of the cells, with tolerance: the settings of the tests are not those of the records."""
    names = ["bundled"]
    try:
        names.append(str(request.getfixturevalue("stories")))
    except pytest.skip.Exception:
        pass
    cards = [inputs.card(name) for name in names]
    models = {card.name: inputs.load(name) for card, name in zip(cards, names, strict=True)}
    cells = [cell for name, model in models.items() for cell in golden_cells.cells(name, model, inputs.make_engine)]
    run = lambda cell: golden_cells.measure(cell, models[cell.model], inputs.make_engine)
    hashes = {card.name: card.sha256 for card in cards}
    right = golden.check(golden.sample(cells, SAMPLE, SEED), hashes, run, kept, VALUES)
    said = capsys.readouterr().out
    assert right, f"ALISA_TEST_SEED={SEED}\n{said}"
