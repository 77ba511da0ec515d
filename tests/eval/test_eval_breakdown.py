"""eval.speed.breakdown and Figures 11 and 2c: counts, timed operations against float64 NumPy, parts against the whole,
tables.
"""

import functools
import inspect
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import policies, records
from alisa_jax.codecs import Raw
from alisa_jax.models import Decoder
from alisa_jax.models.config import ModelConfig
from eval.figures import fig2c, fig11
from eval.script import tables
from eval.script.common import UserError
from eval.script.resume import Setup
from eval.speed import breakdown
from eval.speed.breakdown import Amount, Past, Shape
from eval.text import windows

SHAPE, SPARSITY, REPEATS = Shape(batch=2, tokens=24, heads=3, head_dim=8), 0.5, 5
CODEC = Raw("float32")
TINY = ModelConfig(
    arch="llama",
    vocab_size=50,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=24,
    max_positions=64,
)


def draw(rng, *shape) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def past() -> Past:
    """Sharp queries, so that some token comes back into the selection."""
    rng = np.random.default_rng(0)
    T = breakdown.context_tokens(SHAPE.tokens, REPEATS)
    q, k, v = (draw(rng, SHAPE.batch, T, SHAPE.heads, SHAPE.head_dim) for _ in range(3))
    return Past(3 * q, k, v)


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(TINY)
    return SimpleNamespace(
        decoder=decoder,
        params=decoder.init(jax.random.key(0)),
        name="tiny",
        tokenizer=None,
        bos_id=None,
        calibration=lambda: None,
    )


# What is counted


def test_kept_tokens_are_those_that_the_labels_of_figure_11_imply():
    assert [breakdown.kept_tokens(128, s) for s in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)] == [128, 102, 76, 51, 25, 12]


def test_operations_are_those_of_a_loop_and_bytes_those_of_the_arrays():
    B, n, N, H = SHAPE
    c, M, S, moved = 11, 17, 31, 4.0
    rng = np.random.default_rng(0)
    q, k, z = draw(rng, B, N, 1, H), draw(rng, B, N, c, H), draw(rng, B, N, 1, c)
    rows, pos, sums = draw(rng, B, N, c, c), np.zeros((B, 1, c), np.int32), draw(rng, B, 1, n)
    macs = sum(1 for _ in itertools.product(range(B), range(N), range(c), range(H)))
    adds = sum(rows[b, h, w].size for b in range(B) for h in range(N) for w in range(c))
    found = breakdown.amounts(SHAPE, c, M, S, moved, 4)
    assert found["qk"] == Amount(q.nbytes + k.nbytes + z.nbytes, macs=macs)
    assert found["softmax"] == Amount(2 * z.nbytes)
    assert found["awv"] == Amount(z.nbytes + k.nbytes + q.nbytes, macs=macs)
    assert found["local_sum"] == Amount(rows.nbytes + pos.nbytes, adds=adds)
    assert found["selection"] == Amount(sums.nbytes + pos.nbytes)
    assert found["gather"] == Amount(2 * (2 * k.nbytes) + pos.nbytes)
    token = 2 * q.nbytes
    assert found["append"].bytes == 3 * token and breakdown.amounts(SHAPE, n, n, S, 0.0, 4)["append"].bytes == 2 * token
    slots = draw(rng, B, N, M, H)
    assert found["attend"] == Amount(2 * slots.nbytes + 2 * q.nbytes + 2 * 4 * B * M, macs=2 * slots.size)
    still, moving = (breakdown.amounts(SHAPE, c, M, S, loads, 4)["exchange"].bytes for loads in (0.0, moved))
    assert moving - still == moved * 2 * 2 * 4 * N * H, "K and V of a row are read and written"


def test_the_published_labels_imply_the_operations_that_are_counted():
    paper = fig11.base.paper(fig11.PUBLISHED)
    for name, shape in paper["shapes"].items():
        for key, bar in paper["data"][name].items():
            kept = breakdown.kept_tokens(128, 0.0 if key == "dense" else int(key) / 100)
            count = breakdown.amounts(Shape(64, 128, shape["n_heads"], 128), kept, 1, 1, 0.0, 2)
            for op in ("qk", "awv"):
                assert fig11._implied(bar, op, paper, name) == pytest.approx(
                    count[op].macs / 64 / shape["d_model"], rel=0.012
                )
            if key in ("20", "40", "60"):  # the smaller counts are read too coarsely
                adds = count["local_sum"].adds / 64 / shape["n_heads"]
                assert fig11._implied(bar, "local_sum", paper, name) == pytest.approx(adds, rel=0.05)


# What is timed


def test_each_operation_of_the_papers_way_is_that_of_numpy_in_float64():
    rng = np.random.default_rng(1)
    B, n, N, H = SHAPE
    c, S = 7, n + 3
    q, k, v = draw(rng, B, N, 1, H), draw(rng, B, S, N, H), draw(rng, B, S, N, H)
    pos = np.stack([np.sort(rng.permutation(n)[:c]) for _ in range(B)])[:, None].astype(np.int32)
    rows = draw(rng, B, N, c, c)
    taken = [np.stack([x[b, pos[b, 0]] for b in range(B)]).swapaxes(1, 2).astype(np.float64) for x in (k, v)]
    for x, want in zip((k, v), taken, strict=True):
        assert np.array_equal(breakdown.gather(CODEC, jnp.asarray(x), jnp.asarray(pos)), want)
    z = np.einsum("bnqh,bnch->bnqc", q.astype(np.float64), taken[0]) / np.sqrt(H)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    k32, v32, z32, p32 = (jnp.asarray(x, jnp.float32) for x in (*taken, z, p))
    np.testing.assert_allclose(breakdown.qk(CODEC, jnp.asarray(q), k32), z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(breakdown.softmax(z32), p, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        breakdown.awv(CODEC, p32, v32), np.einsum("bnqc,bnch->bnqh", p, taken[1]), rtol=1e-4, atol=1e-5
    )
    want = [
        [sum(rows[b, h, w, i].astype(np.float64) for h in range(N) for w in range(c)) for i in range(c)]
        for b in range(B)
    ]
    np.testing.assert_allclose(breakdown.local_sum(jnp.asarray(rows)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [1, 6, 7, 13])
def test_the_selection_is_the_last_half_and_the_largest_sums_of_the_rest(kept):
    sums = np.random.default_rng(kept).integers(0, 5, (3, 1, 13)).astype(np.float32)  # with ties
    found = np.asarray(breakdown.selection(jnp.asarray(sums), kept))
    first = 13 - -(-kept // 2)
    for b in range(3):
        best = sorted(range(first), key=lambda p: (-sums[b, 0, p], p))[: kept // 2]
        assert found[b, 0].tolist() == sorted([*best, *range(first, 13)])


def test_repeated_heads_and_channels_keep_every_logit():
    rng = np.random.default_rng(2)
    few = Past(*(draw(rng, 2, 5, 3, 4) for _ in range(3)))
    many = breakdown.stretched(few, 7, 12)
    logits = lambda p: np.einsum("btnh,bsnh->bnts", p.q, p.k) / np.sqrt(p.q.shape[-1])
    np.testing.assert_allclose(logits(many), logits(few)[:, np.arange(7) % 3], rtol=1e-4, atol=1e-5)
    assert np.array_equal(many.v[..., :4], few.v[:, :, np.arange(7) % 3]) and many.v.shape == (2, 5, 7, 12)


@pytest.mark.slow
def test_what_is_recorded_is_what_attention_of_that_layer_is_given(model):
    rows = np.random.default_rng(5).integers(0, 50, (2, 9))
    found = breakdown.recorded(model, rows, 1)

    def attend(q, k, v):
        z = jnp.einsum("btkgh,bskh->bkgts", q.reshape(2, 9, 2, 2, 8), k) / jnp.sqrt(jnp.float32(8))
        z = jnp.where(np.tril(np.ones((9, 9), bool)), z, -jnp.inf)
        return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(z), v).reshape(2, 9, 4, 8), (q, k, v)

    @jax.jit
    def read(params, tokens):
        at = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], (2, 9))
        x, _ = model.decoder.block(params["blocks"][0], model.decoder.embed(params, tokens, at), at, attend)
        return model.decoder.block(params["blocks"][1], x, at, attend)[1]

    q, k, v = read(model.params, jnp.asarray(rows, jnp.int32))
    for ours, want in zip(found, (q, k[:, :, [0, 0, 1, 1]], v[:, :, [0, 0, 1, 1]]), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def decoded(past):
    """(in one program, in parts, the last state, the columns fed) of the same steps from the same prompt."""
    start = 16
    context = breakdown.context_tokens(SHAPE.tokens, REPEATS)
    begin = breakdown.beginning(policies.Swa(kv_sparsity=SPARSITY, spare_slots=0), past, start, context)
    columns = [tuple(jnp.asarray(x[:, t]) for x in past) for t in range(start, context)]
    _, whole = breakdown.own_steps(begin(), columns)
    taken, parts, state = breakdown.own_parts(begin(), columns)
    assert {name: len(times) for name, times in taken.items()} == dict.fromkeys(breakdown.PARTS, len(columns))
    return whole, parts, state, columns


@pytest.mark.slow
def test_the_parts_of_a_step_compose_to_what_a_whole_step_gives(decoded):
    whole, parts, _, _ = decoded
    for (out, loads), (part, moved) in zip(whole, parts, strict=True):
        np.testing.assert_allclose(part[:, :, 0], out, rtol=1e-5, atol=1e-6)
        assert np.array_equal(moved, loads)
    assert sum(int(np.asarray(loads).sum()) for _, loads in whole) > 0, "a selection that never moves tells nothing"


@pytest.mark.slow
def test_the_papers_way_composes_to_attention_over_the_selected_tokens(decoded, past):
    _, _, state, columns = decoded
    q, kept = columns[0][0], 11
    seconds, out = breakdown.separate(state, SHAPE, kept, q[:, :, None], REPEATS)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(breakdown.SEPARATE, REPEATS)
    sums = np.asarray(state.stats.sums.hi)[:, 0, : SHAPE.tokens].astype(np.float64)
    first = SHAPE.tokens - 6
    for b, h in itertools.product(range(SHAPE.batch), range(SHAPE.heads)):
        best = sorted(range(first), key=lambda p: (-sums[b, p], p))[:5]
        chosen = [*best, *range(first, SHAPE.tokens)]
        z = past.k[b, chosen, h].astype(np.float64) @ np.asarray(q)[b, h] / np.sqrt(SHAPE.head_dim)
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        np.testing.assert_allclose(out[b, h, 0], p @ past.v[b, chosen, h], rtol=1e-4, atol=1e-5)


def test_a_shape_that_the_model_cannot_stand_in_for_is_refused():
    check = functools.partial(breakdown.check, TINY, repeats=REPEATS)
    check(1, SHAPE)
    for layer, shape, why in (
        (2, SHAPE, r"layer must be in 0\.\.1, the layers of the model, got 2"),
        (0, SHAPE._replace(head_dim=12), "head_dim must be a multiple of 8, that of the model, got 12"),
        (0, SHAPE._replace(tokens=5), "tokens must be above 5"),
        (0, SHAPE._replace(tokens=62), "65 tokens are needed, and the model reads 64 at most"),
    ):
        with pytest.raises(UserError, match=why):
            check(layer, shape)


# Figure 11


SMALL = dict(shapes=("OPT-6.7B",), batch=2, tokens=24, heads=4, head_dim=64, sparsities=(0.6,), repeats=3, layer=0)


def setup(results, sizes, text=windows.BUNDLED, **changes) -> Setup:
    return Setup("bundled", text, "quick", 0, 1, False, results, sizes=sizes, **changes)


@pytest.fixture(scope="module")
def figure_11(tmp_path_factory):
    """(setup, records) of a small Figure 11, and what a second call finds on file."""
    folder = tmp_path_factory.mktemp("fig11")
    (folder / "text.py").write_text(inspect.getsource(breakdown), encoding="utf-8")
    asked = setup(records.Results(folder / "r.jsonl"), SMALL, text=str(folder / "text.py"))
    fig11.check(asked)
    found = fig11.records(asked)
    assert found.reused == 0 and not found.interrupted
    assert fig11.records(asked).reused == 2
    return asked, found.records


@pytest.mark.slow
def test_a_record_of_figure_11_has_time_and_amount_of_every_operation(figure_11):
    _, (dense, swa) = figure_11
    assert (dense["kv_sparsity"], dense["kept_tokens"], swa["kv_sparsity"], swa["kept_tokens"]) == (0.0, 24, 0.6, 9)
    for record, ops in (
        (swa, (*breakdown.SEPARATE, *breakdown.PARTS, "step")),
        (dense, ("qk", "softmax", "awv", "attend")),
    ):
        for op in ops:
            low, high = record[f"{op}_s_quartiles"]
            assert 0 < low <= record[f"{op}_s"] <= high and record[f"{op}_bytes"] > 0
    assert swa["qk_macs"] == 2 * 4 * 9 * 64 and swa["local_sum_adds"] == 2 * 4 * 9**2
    assert swa["paper_way_s"] == pytest.approx(sum(swa[f"{op}_s"] for op in breakdown.PAPER_WAY))
    assert swa["moved_rows"] < swa["gathered_rows"] == 9 and "gather_s" not in dense


@pytest.mark.slow
def test_the_tables_of_figure_11_have_every_cell_of_the_paper_and_a_dash_where_nothing_ran(figure_11):
    asked, found = figure_11
    shares, ours, details = made = fig11.tables(asked, found)
    assert all(len(row) == len(table.head) for table in made for row in table.rows)
    assert [row[0] for row in shares.rows] == ["dense", "20 %", "40 %", "60 %", "80 %", "90 %"]
    by_key = {row[0]: row for row in shares.rows}
    assert by_key["dense"][8] == "1.00 / 1.00" and by_key["60 %"][1:3] == ["9", "51.0"]
    assert by_key["80 %"][1] == "-" and by_key["80 %"][3] == "- / 0.29"
    assert ours.rows[1][1:11] == ["-"] * 9 + ["1.58"] and {row[0] for row in details.rows} == {"dense", "60 %"}
    assert all("bundled" in table.caption and "float32" in table.caption for table in made)
    values = {v.what: v for v in shares.versus}
    assert values["OPT-6.7B, 60 %: kept tokens"].ours == 9
    assert values["OPT-6.7B, 60 %: additions per sequence and head"].ours == 81
    assert values["OPT-6.7B, 90 %: attention over dense attention, the paper's way"].ours is None
    assert "- / 0.29" in tables.text(shares) and all(v.basis == "measured" for v in shares.versus)
    empty = fig11.tables(asked, [])
    assert empty[0].rows[0][3] == "- / 0.47" and empty[2].rows == []


@pytest.mark.slow
def test_figure_11_is_drawn(figure_11, tmp_path):
    pytest.importorskip("matplotlib")
    asked, found = figure_11
    assert "fig11.png" in fig11.draw(asked, found, tmp_path / "fig11.png")
    assert (tmp_path / "fig11.png").read_bytes().startswith(b"\x89PNG")


def test_figure_11_refuses_what_cannot_stand_in():
    with pytest.raises(UserError, match="from a trained model, got random weights"):
        fig11.check(Setup("random:opt_125m", windows.BUNDLED, "quick", 0, 1, False, None, sizes=SMALL))
    with pytest.raises(UserError, match="shapes are those of OPT-6.7B, OPT-30B, got 'OPT-1B'"):
        fig11.check(setup(None, SMALL | dict(shapes=("OPT-1B",))))
    with pytest.raises(UserError, match="head_dim must be a multiple of 64"):
        fig11.check(setup(None, SMALL | dict(head_dim=32)))


# Figure 2c


STEPS = dict(model="random:opt_125m", batch=2, prompt_tokens=28, new_tokens=8, buckets="all", every=3, repeats=1)


@pytest.fixture(scope="module")
def figure_2c(model, tmp_path_factory):
    """(setup, records) of Figure 2c on the tiny model: 4 steps in a bucket of 32 tokens, 4 in one of 64."""
    results = records.Results(tmp_path_factory.mktemp("fig2c") / "r.jsonl")
    asked = setup(results, STEPS, load=lambda name: model)
    fig2c.check(asked)
    found = fig2c.records(asked).records
    assert fig2c.records(asked).reused == 2
    return asked, found


@pytest.mark.slow
def test_steps_with_and_without_a_cache_are_recorded_with_their_bytes(figure_2c, model):
    _, (cached, uncached) = figure_2c
    assert cached["step"] == list(range(8)) and cached["bucket_tokens"] == [32] * 4 + [64] * 4
    assert uncached["step"] == [0, 3, 4, 6, 7] and uncached["bucket_tokens"] == [32, 32, 64, 64, 64]
    rows = [2 * 2 * 2 * 2 * 8 * 4 * size for size in (32, 64)]  # K and V, layers, sequences, kv heads, channels, bytes
    for have, want in zip(cached["cache_bytes"], [rows[0]] * 4 + [rows[1]] * 4, strict=True):
        assert want < have < 1.2 * want, "K and V, and little beside them: positions, biases, lengths"
    assert uncached["cache_bytes"] == [0] * 5 and all(size > 0 for size in uncached["temporary_bytes"])
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert cached["weight_bytes"] == uncached["weight_bytes"] == weights
    assert all(seconds > 0 for record in (cached, uncached) for seconds in record["time_s"])


@pytest.mark.slow
def test_the_table_of_figure_2c_has_both_series_and_the_papers_steps(figure_2c, tmp_path):
    asked, found = figure_2c
    (table,) = fig2c.tables(asked, found)
    assert all(len(row) == len(table.head) for row in table.rows)
    cells = {(row[0], int(row[1])): row for row in table.rows}
    assert cells["with cache", 0][9:] == ["1.00 / 1.00", "1.000 / 1.000"]
    assert cells["without cache", 96][2:5] == ["-", "-", "90"] and cells["without cache", 96][9] == "- / 2.37"
    assert cells["with cache", 127][4] == "34" and cells["with cache", 127][8] == "22.5"
    assert "random:opt_125m" in table.caption and {v.basis for v in table.versus} == {"measured"}
    published = {v.what: v.paper for v in fig2c.tables(setup(None, STEPS | dict(new_tokens=128)), [])[0].versus}
    assert published["without cache: seconds of step 127 over step 0"] == pytest.approx(0.094 / 0.038)
    pytest.importorskip("matplotlib")
    assert "fig2c.png" in fig2c.draw(asked, found, tmp_path / "fig2c.png")


def test_ends_only_measures_the_first_and_the_last_bucket():
    config = STEPS | dict(prompt_tokens=32, new_tokens=128)
    assert fig2c._buckets(config) == [64, 96, 128, 160] and fig2c._buckets(config | dict(buckets="ends")) == [64, 160]


def test_figure_2c_refuses_a_model_that_reads_too_little():
    with pytest.raises(UserError, match="reads 2048 tokens at most, and 2056 are needed"):
        fig2c.check(setup(None, STEPS | dict(prompt_tokens=2048)))
