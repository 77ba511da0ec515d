"""The benchmark of the kernels: what it counts, that its loop makes every call, its rows, its peers, its mistakes."""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend, bench, bench_rows, cases, peers, shapes, tilings, timing
from pallas_kernels.oracle import decode, error
from pallas_kernels.shapes import Shape
from pallas_kernels.tilings import DecodeTiling, PrefillTiling

TINY = "llama-3-8b/b1/c64"
SMALL = Shape(n_heads=8, n_kv_heads=2, head_dim=32, batch=3, context=80)
KERNELS = (*cases.DECODE, *cases.PROMPT)
RATES = timing.Ceilings(1e10, 1e11)
QUICK = ("--calls=2", "--repeats=2", "--max_bytes=64e6")
HOW = bench_rows.Settings("float32", 0.8, "auto", repeats=1, calls=2, max_bytes=64e6)


def shaped(case):
    """Shapes of what a case's function gets and returns."""
    args = jax.eval_shape(case.inputs, jnp.uint32(0))
    return args, jax.eval_shape(case.function, *args)


def nbytes(*arrays) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def run(capsys, *argv):
    """Exit code, records on stdout, and stderr."""
    code = bench.main([*argv, "--json"])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


# ---- what is counted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bytes_are_those_of_the_arrays_a_call_reads_and_returns(kernel, dtype):
    """Of the store only the listed rows are read, and for rows of mass only the last queries."""
    case = cases.build(kernel, SMALL, dtype, 0.8, "xla")
    args, outs = shaped(case)
    read = nbytes(args)
    if kernel.startswith("sparse"):
        by_token = [x for x in jax.tree.leaves(args[1:3]) if x.shape[1] == SMALL.context]
        read -= nbytes(by_token) // SMALL.context * (SMALL.context - SMALL.kept(0.8))
    if kernel == "prompt_mass_rows":
        read -= nbytes(args[0], args[2]) // SMALL.context * (SMALL.context - cases.WINDOW)
    assert (case.work.read_bytes, case.work.written_bytes) == (read, nbytes(outs))


@pytest.mark.parametrize("kernel", KERNELS)
def test_flops_are_two_products_for_each_pair_of_a_query_and_a_key(kernel):
    """Counted pair by pair; a prompt's formula leaves out the half of the diagonal, or of the last rows' triangle."""
    N, K, H, B, S = SMALL
    flops = cases.build(kernel, SMALL, "float32", 0.8, "xla").work.flops
    if kernel in cases.DECODE:
        M = S if kernel == "dense_decode" else 16
        assert flops == sum(2 * H + 2 * H for _ in range(B * N * M))
        return
    queries = range(S - cases.WINDOW, S) if kernel == "prompt_mass_rows" else range(S)
    pairs = B * N * sum(i + 1 for i in queries)
    products = 2 if kernel == "flash_prefill" else 1
    exact = products * 2 * H * pairs
    assert exact / flops == pytest.approx(1.0, abs=cases.WINDOW / S / 2 if kernel == "prompt_mass_rows" else 1 / S)


@pytest.mark.parametrize("peer", [peers.XLA, peers.GQA, peers.PAGED])
def test_bytes_of_peers_are_those_of_their_arrays(peer):
    for causal in (False, True)[: 2 if peer == peers.XLA else 1]:
        case = peers.build(peer, causal, SMALL, "bfloat16", interpret=True)
        args, outs = shaped(case)
        assert (case.work.read_bytes, case.work.written_bytes) == (nbytes(args[:3]), nbytes(outs))


def test_inputs_are_varied_and_lists_are_ordered():
    q, k, v, index, bias = jax.jit(cases.build("sparse_decode", SMALL, "float32", 0.8, "xla").inputs)(jnp.uint32(1))
    for x in (k, v):
        x = np.asarray(x)
        assert len(np.unique(x)) > 0.99 * x.size
        assert abs(x.mean()) < 0.05
        assert abs(x.std() - 1.0) < 0.05
    assert abs(np.corrcoef(np.asarray(k).ravel(), np.asarray(v).ravel())[0, 1]) < 0.05
    assert (np.diff(np.asarray(index)) > 0).all()
    assert index.min() >= 0
    assert index.max() < SMALL.context
    assert len({tuple(row) for row in np.asarray(index)[:, 0].tolist()}) == SMALL.batch


# ---- the loop


def entry(compiled) -> list[str]:
    """Operations of a compiled program outside its loop, but for those that hold or pass on what is there."""
    text = compiled.as_text()
    lines = text[text.index("ENTRY ") :].splitlines()[1:]
    found = [re.search(r"%?([\w.-]+) = .*?[\]\})] ([a-z-]+)\(", line) for line in lines]
    passing = ("parameter", "constant", "tuple", "get-tuple-element", "while", "copy", "bitcast")
    return [m[1] for m in found if m and m[2] not in passing and "copy" not in m[1]]


@pytest.mark.parametrize("kernel", ["sparse_decode_int8_token", "dense_decode"])
def test_all_of_a_call_is_inside_the_loop_and_nothing_is_copied(kernel):
    """A plain loop is the counter-example: there XLA makes the one call that it needs, before the loop."""
    case = cases.build(kernel, SMALL, "bfloat16", 0.8, "xla")
    args, outs = shaped(case)
    made = timing.program(case.function, 3, args, outs)
    assert "while(" in made.as_text()
    assert entry(made) == []
    memory = made.memory_analysis()
    assert memory.alias_size_in_bytes == memory.argument_size_in_bytes
    plain = lambda args, outs: jax.lax.fori_loop(0, 3, lambda _, carry: (args, case.function(*args)), (args, outs))
    hoisted = jax.jit(plain, donate_argnums=(0, 1)).lower(args, outs).compile()
    assert len(entry(hoisted)) > 3


def test_every_call_happens_and_sees_what_the_last_one_returned():
    seen = []

    def function(x, y):
        note = lambda x, y: seen.append((float(x[0, 0]), y.tolist())) or np.float32([1.0, np.nan][len(seen) % 2])
        return jnp.broadcast_to(jax.pure_callback(note, jax.ShapeDtypeStruct((), jnp.float32), x, y), (2, 3)), y

    x, y = jnp.full((2, 2), 7.0), jnp.arange(3.0)
    args, outs = jax.jit(timing.loop(function, 5))((x, y), (jnp.zeros((2, 3)), y))
    jax.block_until_ready(outs)
    assert [first for first, _ in seen] == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert {tuple(y) for _, y in seen} == {(0.0, 1.0, 2.0)}
    np.testing.assert_array_equal(args[0], [[0.0, 7.0], [7.0, 7.0]])
    np.testing.assert_array_equal(outs[0], np.full((2, 3), np.nan))


def test_the_loop_returns_what_the_last_call_returned():
    case = cases.build("packed_decode", SMALL, "float32", 0.8, "xla")
    found = timing.measure(case, calls=3, repeats=1, max_bytes=1e9)
    q, *rest = jax.jit(case.inputs)(jnp.uint32(timing.SEED))
    want = jax.jit(case.function)(q.at[0, 0, 0].set(0.0), *rest)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6), found.outs, want)
    assert 0 < found.time_min_s <= found.time_s <= found.time_max_s


def test_the_number_of_calls_follows_from_the_work():
    assert RATES.calls(timing.Work(0, 0, 0)) == timing.MOST_CALLS
    assert RATES.calls(timing.Work(10**10, 0, 0)) == 1
    assert RATES.calls(timing.Work(0, 10**7, 10**6)) == math.ceil(timing.TARGET_S / (1e-3 + timing.LAUNCH_S))
    assert RATES.calls(timing.Work(1, 1, 10**8)) == math.ceil(timing.TARGET_S / (1e-3 + timing.LAUNCH_S))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_loop_lowers_to_kernels_for_a_gpu_that_is_not_here(kernel):
    shape = shapes.named("llama-3-8b/b4/c2048" if kernel in cases.PROMPT else "llama-3-8b/b64/c8192")
    case, reference = (cases.build(kernel, shape, "bfloat16", 0.8, impl) for impl in ("pallas", "xla"))
    assert triton_calls(case, reference) == 1


@pytest.mark.parametrize("name", ["llama-3-8b/b64/c8192", "opt-6.7b/b64/c640"])
@pytest.mark.parametrize("peer", [peers.GQA, peers.PAGED])
def test_kernels_of_jax_lower_in_the_loop(peer, name, monkeypatch):
    monkeypatch.setattr(peers, "_device", lambda: ("gpu", "NVIDIA H200"))
    case = peers.build(peer, False, shapes.named(name), "bfloat16")
    assert triton_calls(case, case) == 1


def triton_calls(case, reference) -> int:
    """Triton kernels in the program that a loop of two calls becomes on an H200. reference: returns what `case` does."""
    text = backend.lower_for("NVIDIA H200", timing.loop(case.function, 2), *shaped(reference))
    assert "stablehlo.while" in text
    assert "stablehlo.optimization_barrier" in text
    return len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", text))


# ---- rows


def test_a_run_prints_consistent_records(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    kernels = ("packed_decode", "dense_decode", "prompt_mass_rows", "swa_layer")
    out = tmp_path / "rows.jsonl"
    code, found, err = run(capsys, *(f"--kernel={k}" for k in kernels), f"--shape={TINY}", f"--out={out}", *QUICK)
    assert code == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == found
    assert len({frozenset(r) for r in found}) == 1  # every row has every field
    by_name = {(r["kernel"], r["contender"]): r for r in found}
    assert [r["kernel"] for r in found if r["contender"] == "kernel"] == list(kernels)
    for r in found:
        assert (r["platform"], r["device_kind"], r["shape"], r["dtype"]) == ("cpu", "cpu", TINY, "float32")
        assert (r["jax"], r["python"]) == (jax.__version__, sys.version.split()[0])
        assert (r["batch"], r["context"], r["n_heads"]) == (1, 64, 32)
        if r["time_s"] is None:
            assert r["note"]
            assert r["basis"] is r["gb_per_s"] is r["calls"] is None
            continue
        assert (r["basis"], r["calls"], r["repeats"], r["warmup"]) == ("measured", 2, 2, timing.WARM_UP)
        moved = (r["read_bytes"] + r["written_bytes"]) / r["time_s"] / 1e9
        assert r["gb_per_s"] == pytest.approx(moved)
        assert r["fraction_of_copy"] == pytest.approx(moved / r["copy_gb_per_s"])
        assert r["tflop_per_s"] == pytest.approx(r["flops"] / r["time_s"] / 1e12)
        assert r["fraction_of_matmul"] == pytest.approx(r["tflop_per_s"] / r["matmul_tflop_per_s"])
    for kernel in kernels:
        r = by_name[kernel, "kernel"]
        assert (r["impl"], r["impl_reason"]) == ("xla", "it needs a GPU, and the device is cpu")
        assert r["attended_tokens"] == {"packed_decode": 13, "swa_layer": 13}.get(kernel, 64)
    assert by_name["dense_decode", peers.CUDNN]["note"] == "it needs a GPU, and the device is cpu"
    assert by_name["dense_decode", peers.TORCH]["note"] == "torch is not installed"
    dense, swa = by_name["dense_decode", "kernel"], by_name["swa_layer", "kernel"]
    assert by_name["swa_layer", "dense_decode"]["time_s"] == dense["time_s"]  # measured once
    assert swa["time_s"] == by_name["packed_decode", "kernel"]["time_s"]
    peer = by_name["swa_layer", peers.XLA]["time_s"]
    best = min(("dense_decode", dense["time_s"]), (peers.XLA, peer), key=lambda pair: pair[1])
    assert (swa["best_peer"], swa["ratio_to_best_peer"]) == (best[0], pytest.approx(best[1] / swa["time_s"]))
    assert by_name["packed_decode", "kernel"]["ratio_to_best_peer"] is None
    table = [line for line in err.splitlines() if line.startswith(kernels)]
    assert len(table) == len(found)
    assert table[-1].endswith("torch is not installed")


def test_an_interpreted_kernel_in_half_precision_agrees_with_its_reference_and_says_so(capsys, monkeypatch):
    monkeypatch.setattr(timing, "ceilings", lambda *_: RATES)
    flags = ("--kernel=packed_decode", "--impl=interpret", "--dtype=bfloat16", "--repeats=1", "--max_bytes=64e6")
    code, (own, reference), _ = run(capsys, *flags, f"--shape={TINY}")
    assert code == 0
    assert (own["impl"], own["impl_reason"], own["calls"], own["dtype"]) == ("interpret", "asked for", 1, "bfloat16")
    assert own["read_bytes"] == 2 * 32 * 128 + 2 * 2 * 8 * 13 * 128 + 4 * 13
    assert (own["best_peer"], reference["contender"], reference["impl"]) == ("xla", "xla", "xla")
    assert 0 < reference["max_error"] < 1e-2


def test_what_does_not_fit_is_oom_with_a_reason(capsys):
    code, (own,), err = run(capsys, "--kernel=packed_decode", "--shape=llama-3-8b/b64/c32768", "--max_bytes=1e6")
    assert code == 0
    assert (own["time_s"], own["basis"], own["gb_per_s"]) == ("OOM", None, None)
    assert re.fullmatch(r"3\.4\d GB of arrays exceed the 0\.001 GB that may be used", own["note"])
    assert re.search(r"packed_decode +llama-3-8b/b64/c32768 +kernel +xla +OOM +-", err)


def test_temporary_arrays_count():
    case = cases.build("sparse_decode_int8_token", SMALL, "float32", 0.8, "xla")
    arrays = nbytes(*shaped(case))
    with pytest.raises(timing.TooLarge, match=r"GB of arrays and .* GB of temporary arrays exceed"):
        timing.measure(case, calls=1, repeats=1, max_bytes=arrays + 1)


@pytest.mark.parametrize(
    ("message", "time_s", "code"),
    [
        ("INTERNAL: the compiler gave up\nat length", None, 1),
        ("RESOURCE_EXHAUSTED: Shared memory size limit exceeded", None, 1),
        ("RESOURCE_EXHAUSTED: Out of memory", "OOM", 0),
    ],
)
def test_a_kernel_that_fails_has_a_row_that_says_how(capsys, monkeypatch, message, time_s, code):
    def fail(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(timing, "ceilings", lambda *_: RATES)
    monkeypatch.setattr(timing, "measure", fail)
    got, (own,), _ = run(capsys, "--kernel=packed_decode", f"--shape={TINY}")
    assert (got, own["time_s"]) == (code, time_s)
    assert " ".join(message.split()) in own["note"]


def test_an_error_that_is_no_number_is_told(capsys):
    assert bench_rows.error_of((jnp.array([1.0, jnp.nan]),), (jnp.ones(2),)) == "nan"
    assert bench_rows.error_of((jnp.array([1.0, 3.0]), jnp.ones(1)), (jnp.array([1.0, 4.0]), jnp.ones(1))) == 0.25
    assert bench_rows.error_of(None, (jnp.ones(2),)) is None


# ---- peers


@pytest.mark.parametrize(("peer", "heads"), [(peers.XLA, 2), (peers.GQA, 2), (peers.GQA, 1), (peers.PAGED, 2)])
def test_peers_of_jax_compute_dense_attention(peer, heads):
    """In the layouts that they are given; their kernels interpreted."""
    shape = SMALL._replace(n_kv_heads=heads, n_heads=4)
    case = peers.build(peer, False, shape, "float32", interpret=True)
    q, k, v, *tables = args = jax.jit(case.inputs)(jnp.uint32(1))
    if peer == peers.PAGED:
        k, v = (jnp.moveaxis(x[:, tables[0]], 0, 1).reshape(3, heads, 80, 32) for x in (k, v))
    elif peer == peers.XLA:
        k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    want, *_ = decode(q, k, v, None, np.zeros((3, 1, 80)), head_major=True)
    assert error(jax.jit(case.function)(*args).reshape(q.shape), want) < 1e-5


def test_torch_computes_the_same_attention_on_inputs_of_its_own():
    torch = pytest.importorskip("torch")
    for causal in (False, True):
        shape = SMALL._replace(batch=1)
        found, note = peers.torch_sdpa(causal, shape, "float32", calls=2, repeats=1, max_bytes=1e9)
        assert note == f"torch {torch.__version__} on cpu, {torch.get_num_threads()} threads"
        assert 0 < found.time_min_s <= found.time_s
        made = torch.Generator().manual_seed(0)
        sizes = (8, 80 if causal else 1), (2, 80), (2, 80)
        q, k, v = (torch.randn(1, n, t, 32, generator=made).double().numpy()[0] for n, t in sizes)
        z = np.einsum("nth,nsh->nts", q, np.repeat(k, 4, 0)) / np.sqrt(32)
        p = np.exp(np.where(np.tril(np.ones((80, 80)))[None] > 0, z, -np.inf) if causal else z)
        want = np.einsum("nts,nsh->nth", p / p.sum(-1, keepdims=True), np.repeat(v, 4, 0))
        assert error(found.outs[0].numpy(), want) < 1e-5
    with pytest.raises(timing.TooLarge, match="GB of arrays exceed"):
        peers.torch_sdpa(False, SMALL, "float32", calls=1, repeats=1, max_bytes=10)


def test_peers_that_cannot_run_say_why(monkeypatch):
    for peer in (peers.CUDNN, peers.GQA, peers.PAGED):
        with pytest.raises(peers.Missing, match="it needs a GPU, and the device is cpu"):
            peers.build(peer, False, SMALL, "float32")
    monkeypatch.setattr(peers, "_device", lambda: ("gpu", "NVIDIA H200"))
    with pytest.raises(peers.Missing, match="takes bfloat16 and float16"):
        peers.build(peers.CUDNN, True, SMALL, "float32")
    with pytest.raises(peers.Missing, match="contexts in multiples of 16, and this one is 77"):
        peers.build(peers.GQA, False, SMALL._replace(context=77), "bfloat16")


def test_contexts_are_split_into_whole_blocks():
    for S in range(16, 4096, 16):
        splits, block = peers.split(S)
        assert S % (splits * block) == 0
        assert block & (block - 1) == 0
    assert peers.split(8192) == (16, 128)
    assert peers.split(640) == (8, 16)


# ---- tilings


def test_neighbours_of_a_tiling_differ_in_one_number():
    start = DecodeTiling(rows=64, splits=0, warps=4, stages=1)
    found = list(bench_rows.neighbours(start))
    assert [sum(a != b for a, b in zip(start, other)) for other in found] == [1] * len(found)
    assert {t.rows for t in found} == {32, 64, 128}
    assert {t.warps for t in found} == {2, 4, 8}
    assert {t.stages for t in found} == {1, 2}  # never 0
    assert all(t.queries <= 256 for t in bench_rows.neighbours(PrefillTiling(256, 16, 16, 6)))


def test_the_climb_ends_at_the_quickest_and_times_nothing_twice():
    best, calls = PrefillTiling(32, 128, 2, 5), []

    def seconds(tiling):
        calls.append(tiling)
        return 1.0 + sum(abs(math.log2(a / b)) for a, b in zip(tiling, best))

    tried = bench_rows.climb(PrefillTiling(128, 32, 8, 2), seconds)
    assert min(tried, key=tried.get) == best
    assert len(calls) == len(set(calls)) == len(tried)
    assert len(bench_rows.climb(PrefillTiling(), lambda _: math.inf)) == 1 + len(
        list(bench_rows.neighbours(PrefillTiling()))
    )


def test_tilings_are_listed_from_the_quickest_on(monkeypatch, capsys):
    start = tilings.tiling_for("packed_decode", "cpu", 128)

    def measure(kernel, contender, name, how, rates, tiling):
        time_s = {16: 1.0, 32: 2.0, 64: 3.0}.get(tiling.rows)
        return {"kernel": kernel, "tiling": str(tiling), "time_s": time_s, "note": None if time_s else "too much"}, None

    monkeypatch.setattr(bench_rows, "measure", measure)
    found = bench_rows.tiled("packed_decode", TINY, HOW, RATES)
    assert found[0]["tiling"].startswith("DecodeTiling(rows=16,")
    assert found[0]["note"] == f"the quickest of {len(found)}"
    assert next(r["note"] for r in found if r["tiling"] == str(start)) == "of the table"
    assert found[-1]["note"] == "too much"


def test_tilings_that_beat_the_table_are_printed(monkeypatch, capsys):
    """As on a GPU: many rows in a tile are quick, and more than 128 do not fit."""

    def measure(case, **_):
        tiling = case.function.keywords["tiling"]
        if tiling.rows > 128:
            raise RuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded")
        return timing.Timed(1 / tiling.rows, 1 / tiling.rows, 1 / tiling.rows, 1, 0, None)

    monkeypatch.setattr(timing, "ceilings", lambda *_: RATES)
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(backend, "choose", lambda _: backend.Choice("pallas", "the device runs the kernels"))
    flags = ("--tilings", "--dtype=bfloat16", f"--shape={TINY}", "--kernel=sparse_decode")
    code, found, err = run(capsys, *flags)
    assert code == 0
    assert (found[0]["impl"], found[0]["time_s"], found[-1]["time_s"]) == ("pallas", 1 / 128, None)
    assert str(DecodeTiling(rows=256)).split(",")[0] in found[-1]["tiling"]
    assert "Shared memory" in found[-1]["note"]
    assert re.search(r"sparse_decode +\S+ +DecodeTiling\(rows=128, .*the quickest of \d+\n", err)
    assert bench.main([*flags, "--dtype=float32"]) == 2
    assert "nothing to time in float32" in capsys.readouterr().err


# ---- mistakes, interruptions, files


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["--shape=opt-7b/b4/c640"],
            r"a shape is MODEL/bBATCH/cCONTEXT, MODEL one of opt-6\.7b.*; got 'opt-7b/b4/c640'",
        ),
        (["--kernel=decode"], r"--kernel must be one of sparse_decode, .*, swa_layer; got 'decode'"),
        (["--dtype=int8"], r"argument --dtype: invalid choice: 'int8'.*"),
        (["--kv_sparsity=1"], r"--kv_sparsity must be at least 0 and below 1; got 1"),
        (["--kv_sparsity=nan"], r"--kv_sparsity must be at least 0 and below 1; got nan"),
        (["--repeats=0"], r"--repeats must be 1 or more; got 0"),
        (["--calls=-1"], r"--calls must be 1 or more; got -1"),
        (["--max_bytes=1"], r"--max_bytes must be 65536 or more; got 1"),
        (
            ["--impl=pallas"],
            r"impl=pallas cannot run: it needs a GPU, and the device is cpu; give impl=auto or impl=xla",
        ),
        (["--tilings"], r"--tilings has nothing to time: it needs a GPU, and the device is cpu"),
        (["--tilings", "--impl=interpret"], r"--tilings has nothing to time: .*"),
        (["--out=/"], r"cannot write rows to /: Is a directory"),
        (["--sparsity=0.8"], r"unrecognized arguments: --sparsity=0.8"),
    ],
)
def test_mistakes_are_told_in_one_sentence_before_any_work(capsys, monkeypatch, argv, sentence):
    monkeypatch.setattr(timing, "ceilings", lambda *_: pytest.fail("work has begun"))
    assert bench.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"error: {sentence}\n", err)


def rows_of(count):
    """`rows.group` that gives so many rows and is then interrupted."""

    def group(kernel, name, how, rates, known):
        if len(known) == count:
            raise KeyboardInterrupt
        known[len(known)] = None
        blank = dict.fromkeys(bench_rows._MEASURED) | {"impl": "xla", "impl_reason": "asked for", "tiling": None}
        return [blank | {"kernel": kernel, "shape": name, "contender": "kernel", "dtype": "float32", "time_s": 0.5}]

    return group


def test_interrupted_runs_keep_whole_lines_and_the_next_run_appends(capsys, monkeypatch, tmp_path):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(timing, "ceilings", lambda *_: RATES)
    for runs in (1, 2):
        monkeypatch.setattr(bench_rows, "group", rows_of(2))
        assert bench.main([f"--out={out}", f"--shape={TINY}"]) == 130
        text, err = capsys.readouterr()
        assert "interrupted" in err
        assert [line.split()[0] for line in text.splitlines() if TINY in line] == list(bench_rows.KERNELS[:2])
        assert [json.loads(x)["kernel"] for x in out.read_text().splitlines()] == [*bench_rows.KERNELS[:2]] * runs
    assert json.loads(out.read_text().splitlines()[0])["time_s"] == 0.5


@pytest.mark.parametrize(
    ("before", "kept", "warned"),
    [(b'{"a": 1}\n{"b": 2', b'{"a": 1}\n', True), (b'{"a": 1}', b'{"a": 1}\n', False), (b"", b"", False)],
)
def test_a_file_that_ends_in_half_a_line_is_mended(capsys, tmp_path, before, kept, warned):
    out = tmp_path / "rows.jsonl"
    out.write_bytes(before)
    bench.append(bench.appendable(str(out)), {"c": 3})
    assert out.read_bytes() == kept + b'{"c": 3}\n'
    assert ("half-written last line of 7 bytes" in capsys.readouterr().err) == warned


def test_a_line_that_does_not_fit_is_taken_back(monkeypatch, tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_bytes(b'{"a": 1}\n')
    write = bench.os.write
    monkeypatch.setattr(bench.os, "write", lambda file, line: write(file, line[:5]))
    with pytest.raises(bench.Mistake, match="the line did not fit"):
        bench.append(str(out), {"c": 3})
    assert out.read_bytes() == b'{"a": 1}\n'


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_default_shapes_are_named_shapes(platform):
    for name in sum(bench.SHAPES[platform], ()):
        assert shapes.named(name).n_heads == 32
    pairs = bench._pairs(bench.parse([]), platform)
    assert {kernel for kernels in pairs.values() for kernel in kernels} == set(bench_rows.KERNELS)
    if platform == "gpu":
        assert "sparse_decode" in pairs["llama-3-8b/b64/c8192"]
        assert "flash_prefill" in pairs["llama-3-8b/b1/c32768"]
