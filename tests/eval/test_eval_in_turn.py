"""`python -m eval.in_turn`: the steps of two checkouts in one process, real ones of a small size; resuming; refusals."""

import json

import pytest

from eval import checkouts, in_turn
from eval.script import common

pytestmark = pytest.mark.slow

SMALL = ("--cells=bundled/swa-int8", "--batch=2", "--context=160", "--steps=4", "--rounds=2")


def test_the_steps_of_both_checkouts_run_in_turn_and_a_finished_cell_is_kept(other, tmp_path, capsys):
    argv = ["in_turn", f"--other={other}", f"--out={tmp_path / 'out.jsonl'}", "--json", *SMALL]
    assert common.run(in_turn.main, argv) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (record["model"], record["row"], record["equal_sequences"]) == ("bundled", "swa-int8", 2)
    assert len(record["time_ratios"]) == len(record["self_ratios"]) == 2 and min(record["time_ratios"]) > 0
    assert record["this_code"] == record["other_code"] and record["basis"] == "measured"

    def nothing(*_):
        raise AssertionError("a finished cell was measured again")

    assert common.run(lambda a: in_turn.main(a, nothing), argv) == 0
    assert json.loads(capsys.readouterr().out) == record


@pytest.mark.parametrize(
    "flags, says",
    [
        ((), "--other is missing"),
        (("--other={other}", "--cells=bundled/none"), "--cells: unknown name 'bundled/none'; known: bundled/dense"),
        (("--other={other}", "--context=50"), "--context: 50 tokens have no room for 48 steps and 8 to warm up"),
        (("--other={here}",), "is this checkout; give the folder of another one"),
    ],
)
def test_mistakes_are_told_in_one_sentence(other, capsys, flags, says):
    given = [flag.format(other=other, here=checkouts.ROOT) for flag in flags]
    assert common.run(in_turn.main, ["in_turn", *given]) == 2
    assert says in capsys.readouterr().err
