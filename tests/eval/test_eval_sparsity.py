"""`python -m eval.sparsity` and Figures 3, 4, 5, 10: measures against plain loops over saved maps, resuming, mistakes."""

import itertools
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from alisa_jax import models as checkpoints
from alisa_jax.models import Decoder, ModelConfig
from alisa_jax.records import Results
from eval import sparsity
from eval.drawing import style
from eval.figures import base, fig3, fig4, fig5, fig10
from eval.quality import attention_measures
from eval.script import common, inputs, measure, resume, tables

pytestmark = pytest.mark.slow

TEXT = "the cat sat on the mat; the dog did not. a cat and a dog sat down, so the mat was full.\n" * 8
POLICIES = ("dense", "swa(kv_sparsity=0.7,shared_heads=false)", "local(kv_sparsity=0.8)")
CONTEXT, WINDOWS, SKIP = 30, 3, 6
FIGURES = (fig3, fig4, fig5, fig10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers with 4 query heads over 2 kv heads, random weights, one token a byte, context 64; and a text."""
    home = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<bos>": 0, **{c: i for i, c in enumerate(alphabet, start=1)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(["<bos>"])
    sizes = dict(vocab_size=257, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=26, max_positions=64)
    config = ModelConfig(arch="llama", **sizes)
    params = jax.tree.map(lambda x: 12 * x if x.ndim == 2 else x, Decoder(config).init(jax.random.key(2)))
    checkpoints.save(config, params, home / "model", "float32", tokenizer=tokenizer, bos_id=0)
    (home / "text.txt").write_text(TEXT)
    return home


@pytest.fixture
def call(folder, capsys):
    """`call(*flags)` -> exit code, stdout, stderr and the names that were loaded and engines that were made."""

    def run(*flags, stop_at=None):
        loads, engines = [], []

        def make_engine(*args, **options):
            if len(engines) == stop_at:
                raise KeyboardInterrupt
            engines.append(args[1])
            return inputs.make_engine(*args, **options)

        def load(name):
            loads.append(name)
            return inputs.load(name)

        shared = (f"--model={folder / 'model'}", f"--text={folder / 'text.txt'}", f"--windows={WINDOWS}")
        argv = ["sparsity", *shared, f"--context={CONTEXT}", f"--skip={SKIP}", "--batch=3", *flags]
        code = common.run(lambda argv: sparsity.main(argv, load, make_engine), argv)
        out = capsys.readouterr()
        return SimpleNamespace(code=code, out=out.out, err=out.err, loads=loads, engines=engines)

    return run


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    """The records and the npz of a run with maps."""
    home = tmp_path_factory.mktemp("measured")
    argv = [
        "sparsity", f"--model={folder / 'model'}", f"--text={folder / 'text.txt'}", f"--windows={WINDOWS}", "--batch=3",
        f"--context={CONTEXT}", f"--skip={SKIP}", *(f"--policy={p}" for p in POLICIES), f"--out={home / 'out.jsonl'}",
        f"--npz={home / 'maps.npz'}", "--maps", f"--plot={home / 'plot.png'}",
    ]  # fmt: skip
    assert common.run(sparsity.main, argv) == 0
    with np.load(home / "maps.npz") as file:
        return SimpleNamespace(home=home, records=list(Results(home / "out.jsonl")), arrays=dict(file))


def rank(values, at: int) -> float:
    """The rank of one value by counting."""
    return sum(v < values[at] for v in values) + (sum(v == values[at] for v in values) + 1) / 2


def rho(a, b) -> float:
    """Spearman's rho by counting, and Pearson's formula in plain Python."""
    a, b = ([rank(x, i) for i in range(len(x))] for x in (list(a), list(b)))
    mean = (len(a) + 1) / 2
    top = math.fsum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(math.fsum((x - mean) ** 2 for x in a) * math.fsum((y - mean) ** 2 for y in b))


def by_hand(weights, kept, dense) -> dict[str, list[float]]:
    """The measures of one sequence and layer, entry by entry in float64; head h has selection h * P // N."""
    N, P, n = len(weights), len(kept), weights.shape[-1]
    found = {name: [] for name in attention_measures.BY_ROW}
    for i in range(n):
        rows = {h: [float(x) for x in weights[h, i, : i + 1]] for h in range(N)}
        allowed = {h: [j for j in range(n) if kept[h * P // N, i, j]] for h in range(N)}
        pooled = [sum(rows[h][j] for h in range(N)) / N for j in range(i + 1)]

        def zeros(row, among):
            return sum(row[j] < 0.01 * max(row) for j in among) / len(among)

        found["sparsity"].append(sum(zeros(rows[h], range(i + 1)) for h in range(N)) / N)
        found["sparsity_kept"].append(sum(zeros(rows[h], allowed[h]) for h in range(N)) / N)
        found["sparsity_pooled"].append(zeros(pooled, range(i + 1)))
        found["attended"].append(sum(len(allowed[h]) for h in range(N)) / N / (i + 1))
        found["missed"].append(1 - sum(float(dense[h, i, j]) for h in range(N) for j in allowed[h]) / N)
        found["first_token"].append(sum(rows[h][0] for h in range(N)) / N)
        sets = [[{j for j in range(n) if kept[p, t, j]} if t >= 0 else set() for t in (i - 1, i)] for p in range(P)]
        found["entered"].append(sum(len(now - before - {i}) for before, now in sets) / P)
    found["received"] = [sum(float(weights[h, i, j]) for h in range(N) for i in range(j, n)) / N for j in range(n)]
    return found


def test_every_array_equals_plain_loops_over_the_saved_maps(measured):
    arrays = measured.arrays
    assert arrays["policies"].tolist() == list(POLICIES) and arrays["tokens"].shape == (WINDOWS, CONTEXT)
    for at in range(len(POLICIES)):
        maps = [arrays[f"{at}_{name}"] for name in ("weights", "kept", "dense")]
        P = 2 if at == 1 else 1
        assert [m.shape for m in maps] == [(2, 3, heads, CONTEXT, CONTEXT) for heads in (4, P, 4)]
        for layer, b in itertools.product(range(2), range(WINDOWS)):
            for name, row in by_hand(*(m[layer, b] for m in maps)).items():
                np.testing.assert_allclose(arrays[f"{at}_{name}"][layer, b], row, atol=1e-6, err_msg=name)
        square = np.where(np.tri(16, dtype=bool), maps[0][:, :, :, :16, :16].mean(axis=2, dtype=np.float64), 0)
        np.testing.assert_allclose(arrays[f"{at}_first_map"], square, atol=1e-7)
    assert arrays["1_entered"].sum() > 0 and arrays["1_missed"].mean() > 0.1 and (arrays["0_missed"] == 0).all()


def test_a_record_holds_the_means_of_its_arrays_and_their_errors_over_windows(measured):
    for at, record in enumerate(measured.records):
        assert record["policy"] == POLICIES[at] and record["windows"] == WINDOWS
        for name, unit in attention_measures.UNITS.items():
            x = measured.arrays[f"{at}_{name}"][:, :, SKIP:]
            windows = [
                np.mean([x[layer, b, t] for layer in range(2) for t in range(x.shape[2])]) for b in range(WINDOWS)
            ]
            assert record[unit] == pytest.approx(np.mean(windows), abs=1e-12)
            assert record[f"{unit}_stderr"] == pytest.approx(np.std(windows, ddof=1) / WINDOWS**0.5, abs=1e-12)
            for axis, per in ((2, "layer"), (0, "step")):
                each = [x[:, b].mean(axis=axis - 1 if axis else 0) for b in range(WINDOWS)]
                mean, error = np.mean(each, axis=0), np.std(each, axis=0, ddof=1) / WINDOWS**0.5
                np.testing.assert_allclose(record[f"{unit}_by_{per}"], mean, rtol=1e-4, atol=1e-9)
                np.testing.assert_allclose(record[f"{unit}_by_{per}_stderr"], error, rtol=1e-4, atol=1e-9)
        assert len(record["sparsity_frac_by_step"]) == CONTEXT - SKIP and len(record["sparsity_frac_by_layer"]) == 2


def test_rank_correlations_equal_those_by_counting(measured):
    tokens, dense = measured.arrays["tokens"], np.array(measured.records[0]["received"])
    assert "rho_by_id" not in measured.records[0]
    for at in (1, 2):
        record, mine = measured.records[at], np.array(measured.records[at]["received"])
        np.testing.assert_allclose(mine, measured.arrays[f"{at}_received"].mean(axis=0), rtol=1e-6)

        def pooled(which, mine=mine):
            sums = {}
            for b, t in itertools.product(which, range(CONTEXT)):
                one = sums.setdefault(int(tokens[b, t]), [0.0, 0.0, 0])
                one[0], one[1], one[2] = one[0] + mine[b, t], one[1] + dense[b, t], one[2] + 1
            a, d, n = (np.array(x) for x in zip(*sums.values(), strict=True))
            return rho(a, d), rho(a / n, d / n)

        for i, name in enumerate(("rho_by_id", "rho_by_occurrence")):
            assert record[name] == pytest.approx(pooled(range(WINDOWS))[i], abs=1e-12)
            without = [pooled([c for c in range(WINDOWS) if c != b])[i] for b in range(WINDOWS)]
            assert record[f"{name}_stderr"] == pytest.approx(math.sqrt((WINDOWS - 1) * np.var(without)), abs=1e-9)
        each = [rho(mine[b], dense[b]) for b in range(WINDOWS)]
        assert record["rho_by_position"] == pytest.approx(np.mean(each), abs=1e-12)
        assert record["rho_by_position"] < 0.999


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-2, 2, width=16)), min_size=2, max_size=12))
def test_spearman_of_any_lists_with_ties_is_that_by_counting(pairs):
    a, b = (np.array(x, np.float64) for x in zip(*pairs, strict=True))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(attention_measures.spearman(a, b))
    else:
        assert attention_measures.spearman(a, b) == pytest.approx(rho(a, b), abs=1e-12)


def test_spearman_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).integers(0, 20, (2, 200))
    assert attention_measures.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_measures_of_rows_written_out_by_hand():
    weights = np.array([[[1, 0, 0], [0.005, 0.995, 0], [0.0, 0.4, 0.6]]], np.float32)
    kept = np.array([[[1, 0, 0], [1, 1, 0], [0, 1, 1]]], bool)
    dense = np.array([[[1, 0, 0], [0.005, 0.995, 0], [0.25, 0.3, 0.45]]], np.float32)
    found = attention_measures.measure(weights, kept, dense)
    expected = {
        "sparsity": [0, 1 / 2, 1 / 3],
        "sparsity_kept": [0, 1 / 2, 0],
        "sparsity_pooled": [0, 1 / 2, 1 / 3],
        "attended": [1, 1, 2 / 3],
        "missed": [0, 0, 0.25],
        "entered": [0, 0, 0],  # token 1 was row 1's own
        "first_token": [1, 0.005, 0],
        "received": [1.005, 1.395, 0.6],
    }
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        np.testing.assert_allclose(found[name], row, atol=1e-7, err_msg=name)
    back = np.array([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]], bool)  # token 0 returns, token 1 is dropped
    assert attention_measures.measure(weights, back, dense)["entered"].tolist() == [0, 0, 1]


def test_padding_is_left_out_of_a_batch():
    rng = np.random.default_rng(4)
    weights = np.tril(rng.random((2, 2, 7, 7)))
    kept = np.broadcast_to(np.tri(7, dtype=bool), (2, 1, 7, 7)).copy()
    found = attention_measures.batch(weights, kept, weights, np.array([7, 4]))
    alone = attention_measures.measure(weights[1, :, :4, :4], kept[1, :, :4, :4], weights[1, :, :4, :4])
    for name, rows in found.items():
        assert rows.shape == (2, 7) and np.isnan(rows[1, 4:]).all() and not np.isnan(rows[0]).any()
        np.testing.assert_array_equal(rows[1, :4], alone[name])


# ---- the script


def test_the_figure_and_the_table_are_there_and_the_perplexity_is_that_of_score(measured, folder):
    if style.pyplot() is not None:
        assert (measured.home / "plot.png").read_bytes()[:4] == b"\x89PNG"
    text = sparsity.report(measured.records)
    assert all(policy in text for policy in POLICIES) and "missed mass, %, per layer, local(kv_sparsity=0.8)" in text
    setup = resume.Setup(str(folder / "model"), str(folder / "text.txt"), "quick", 0, 1, False, None)
    sample = sparsity.draw(setup, sparsity.windows.read(setup.text), sparsity.Sizes(CONTEXT, WINDOWS, SKIP))
    assert np.array_equal(measured.arrays["tokens"], sample.batch)
    score = inputs.make_engine(sample.model, POLICIES[2], "raw").score(sample.batch, protocol="prefill_mask")
    wanted = measure.perplexities(sample.text, sample.plan, score.logprobs)["token_perplexity"]
    assert measured.records[2]["token_perplexity"] == pytest.approx(wanted, rel=1e-5)


def test_an_interrupted_run_goes_on_and_finished_cells_are_not_run_again(call, tmp_path, measured):
    flags = (f"--out={tmp_path / 'out.jsonl'}", *(f"--policy={policy}" for policy in POLICIES), "--json")
    stopped = call(*flags, stop_at=1)
    assert (stopped.code, stopped.engines) == (common.EXIT_INTERRUPTED, ["dense"])
    rest = call(*flags)
    assert (rest.code, rest.engines) == (0, list(POLICIES[1:])) and "1 of 3 cells were already" in rest.err
    again = call(*flags)
    assert again.engines == [] and again.out == rest.out
    times = {"wall_s", "git_dirty", "git_commit"}
    for line, record in zip(rest.out.splitlines(), measured.records, strict=True):
        mine = json.loads(line)
        assert {k: v for k, v in mine.items() if k not in times} == {k: v for k, v in record.items() if k not in times}
    assert call(*flags[:2], "--rerun").engines == ["dense"]


def test_the_arrays_are_measured_again_and_hold_no_maps_unless_asked(call, tmp_path):
    flags = (f"--out={tmp_path / 'out.jsonl'}", "--policy=dense")
    assert call(*flags).engines == ["dense"]
    assert call(*flags, f"--npz={tmp_path / 'a.npz'}").engines == ["dense"]
    with np.load(tmp_path / "a.npz") as file:
        measures = {f"0_{name}" for name in (*attention_measures.BY_ROW, "received", "first_map")}
        assert set(file) == {"policies", "tokens", *measures}
    assert [path.name for path in tmp_path.glob("*.part")] == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--policy=swa(kv_sparsity=2)"], "kv_sparsity"),
        (["--policy=swo"], "swa"),
        (["--maps"], "--npz was not given"),
        (["--skip=30"], "--skip must be in 0..29, below the context, got 30"),
        (["--context=65"], "--context must be in 2..64"),
        (["--codec=int8(calibration_tokens=32)"], "takes its range from the first 32 tokens"),
        (["--model=random:opt_125m"], "random:opt_125m has no tokenizer, which a text needs"),
        (["--npz=nowhere/x.npz"], "there is no folder for 'x.npz'"),
        (["--text=missing.txt"], "cannot read the text 'missing.txt'"),
        (["--windows=0"], "windows"),
    ],
)
def test_mistakes_are_told_in_one_sentence_before_a_model_is_loaded(call, flags, sentence):
    done = call(*flags)
    assert done.code == common.EXIT_MISTAKE and done.loads == [] and done.out == ""
    assert sentence in done.err and done.err.count("\n") == 1 and done.err.startswith("error: ")


# ---- the figures


@pytest.fixture(scope="module")
def drawn(folder, tmp_path_factory):
    """Every figure's records, tables and sentence on its picture, from one file of records."""
    home = tmp_path_factory.mktemp("figures")
    sizes = dict(context_tokens=CONTEXT, windows=WINDOWS, skip_tokens=SKIP, kv_sparsity=0.8, sparsities=(0.4, 0.8))
    results = Results(home / "out.jsonl")
    setup = resume.Setup(str(folder / "model"), str(folder / "text.txt"), "quick", 0, 1, False, results, sizes=sizes)
    found = {}
    for module in FIGURES:
        name = module.__name__.rpartition(".")[2]
        module.check(setup)
        records = module.records(setup)
        made = module.tables(setup, records.records)
        sentence = module.draw(setup, records.records, home / f"{name}.png")
        found[name] = SimpleNamespace(records=records.records, reused=records.reused, tables=made, sentence=sentence)
    return SimpleNamespace(**found, home=home, count=len(results))


def test_figures_share_their_records(drawn):
    assert [f.reused for f in (drawn.fig3, drawn.fig4, drawn.fig5, drawn.fig10)] == [0, 1, 1, 2]
    assert [len(f.records) for f in (drawn.fig3, drawn.fig4, drawn.fig5, drawn.fig10)] == [
        1,
        4,
        1,
        3,
    ] and drawn.count == 5


def test_tables_are_whole_and_have_the_papers_numbers_beside_ours(drawn):
    for figure in (drawn.fig3, drawn.fig4, drawn.fig5, drawn.fig10):
        for table in figure.tables:
            assert all(len(row) == len(table.head) for row in table.rows) and "text.txt" in table.caption
            assert "|" in tables.markdown(table)
        assert any(table.versus for table in figure.tables)
    by_step, by_layer = drawn.fig3.tables
    ours = drawn.fig3.records[0]["sparsity_frac_by_step"]
    assert by_step.rows[0][0] == "1" and by_step.rows[0][1].startswith(f"{100 * ours[0]:.1f} ±")
    assert by_step.rows[0][2:] == ["82.9", "83.6", "85.5"]
    assert by_step.rows[-1] == ["250", "-", "89.6", "94.0", "95.7"], "the windows of this test end before step 250"
    assert [row[2] for row in by_layer.rows] == ["52 (layer 0)", "97.6 (layer 30)"]
    (ranks,) = drawn.fig4.tables
    assert [(row[0], row[-1]) for row in ranks.rows] == [("local", "0.008"), ("strided", "0.003"), ("swa", "0.973")]
    assert {v.ours for v in ranks.versus if v.what == "swa, rho_by_id"} == {drawn.fig4.records[3]["rho_by_id"]}
    kept = drawn.fig10.tables[1]
    assert [row[0] for row in kept.rows] == ["dense", "40", "80"] and kept.rows[2][1].endswith("/ 81.6 / 84.7")
    shown = 100 * drawn.fig10.records[2]["sparsity_kept_frac_by_step"][2]
    assert kept.rows[2][1].startswith(f"{shown:.1f} / ")


def test_the_numbers_of_the_maps_are_those_of_the_maps(drawn):
    (table,) = drawn.fig5.tables
    for layer, rows in enumerate(drawn.fig5.records[0]["first_map"]):
        assert [len(row) for row in rows] == list(range(1, 17)) and all(
            sum(row) == pytest.approx(1, abs=1e-3) for row in rows
        )
        means = [
            np.mean([pick(row) for row in rows[2:]]) for pick in (lambda r: r[0], lambda r: r[-1], lambda r: r[-2])
        ]
        assert table.rows[layer][1:4] == [f"{100 * x:.1f}" for x in means]
    assert [fig5.shown(n) for n in (1, 2, 4, 32)] == [[0], [0, 1], [0, 1, 2, 3], [0, 10, 21, 31]]


def test_which_sparsities_are_below_dense_is_read_off_the_records(drawn):
    dense, *others = drawn.fig10.records
    for table, (name, _) in zip(drawn.fig10.tables, fig10.MEASURES, strict=True):
        below = [s for s, r in zip(("40", "80"), others, strict=True) if r[name] < dense["sparsity_frac"]]
        assert f"ours at {', '.join(below)} %;" in table.why[1] or (
            not below and "ours at no KV sparsity;" in table.why[1]
        )
        assert "OPT-6.7B at 40 %; OPT-30B at 40, 80 %." in table.why[1]


def test_every_picture_is_a_png(drawn):
    if style.pyplot() is None:
        pytest.skip("matplotlib is not installed")
    for module in FIGURES:
        name = module.__name__.rpartition(".")[2]
        assert (drawn.home / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert getattr(drawn, name).sentence == f"figure: {drawn.home / name}.png"


@pytest.mark.parametrize("size", ["quick", "full"])
def test_the_configs_of_the_figures_share_one_sample_that_the_papers_steps_fit_in(size):
    setup = resume.Setup("bundled", "bundled:heldout", size, 0, 1, False, None)
    samples = {sparsity.Sizes.of(setup.config(name)) for name in ("fig3", "fig4", "fig5", "fig10")}
    assert len(samples) == 1
    sizes = samples.pop()
    assert sizes.context_tokens - sizes.skip_tokens >= max(base.paper("alisa_fig3")["by_step"]["step"])
    assert setup.config("fig4")["kv_sparsity"] in setup.config("fig10")["sparsities"], "SWA is run once for both"


@pytest.mark.parametrize("module", FIGURES)
def test_a_figure_refuses_a_model_without_tokenizer(module, folder):
    setup = resume.Setup("random:opt_125m", str(folder / "text.txt"), "quick", 0, 1, False, None)
    with pytest.raises(common.UserError, match="has no tokenizer, which a text needs"):
        module.check(setup)
