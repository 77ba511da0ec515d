"""One command that settles a GPU: which kernels are right there, how fast, and what placement is worth.

    make gpu                                          # python3 -m eval.gpu --out=build/gpu --minutes=8
    python3 -m eval.gpu --out=card --minutes=8        # the same command again goes on where it stopped
    python3 -m eval.gpu --take=card                   # file the results under eval/results/gpu, print a page of them
    python3 -m eval.gpu --dry --out=dry               # every path with tiny shapes, on a CPU: its numbers say nothing

It takes the interpreter that it is run with, installs and downloads nothing, and needs no test data. It says first what it
found: packages, the project's modules that import, the device. A part whose needs are missing is switched off by name.

    a correct   which kernels compile and are right: the cases of the tests, compiled, in the order of a seed
    b rates     what a copy and a matrix product reach, the limits of all that follows
    c beside    each kernel beside XLA, cuDNN, jax's own kernels and torch, with its share of these limits
    d pinned    pinned host memory: kinds, reads in place or of whole pages, bandwidth each way, overlap with compute
    e layer     one layer's decode step under SWA beside dense, at 8k and 32k tokens
    f placed    tokens per second of OPT-6.7B's shape, 128 + 512 tokens, in the KV bytes that a V100 of 16 GB leaves
    g whole     the bundled model from end to end, kernels beside XLA: the same tokens
    h tiles     tilings beside those of the table

Each part has a share of the time; what is left in the end goes to those that were not through. A part that fails is
recorded with its message and the next one runs, in a fresh process where the device may be broken. --out gets two files:
records.jsonl (whole lines at any moment) and log.txt. Flags are argparse's, for a card's machine may lack all but jax.

Exit codes: 0 every part had its turn, 1 the time was up before, 2 a mistake on the command line, 3 there is no GPU, 130
interrupted.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.card import page, records, watch
from eval.card.parts import PARTS

DONE, OVER, MISTAKE, NOTHING, INTERRUPTED = 0, 1, 2, 3, 130
RESULTS = records.ROOT / "eval" / "results" / "gpu"


class Mistake(Exception):
    """Of the person at the keyboard; the text is one sentence."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Mistake(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, checked. Raises Mistake."""
    names = ", ".join(part.name for part in PARTS)
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m eval.gpu", description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--out", metavar="FOLDER", help="where records and log go (build/gpu)")
    add("--minutes", type=float, default=8.0, help="the time of this run (8)")
    add("--only", metavar="PART,PART", default="", help=f"these parts alone, of {names}")
    add("--seed", type=int, default=0, help="of the inputs and of the order of cases (0)")
    add("--dry", action="store_true", help="tiny shapes on a CPU")
    add("--take", metavar="FOLDER", help="file the records of FOLDER and print a page of them; nothing runs")
    add("--results", metavar="FOLDER", default=str(RESULTS), help="where --take files them (eval/results/gpu)")
    flags = parser.parse_args(argv)
    flags.only = tuple(filter(None, re.split(r"[, ]+", flags.only)))
    unknown = [name for name in flags.only if name not in {part.name for part in PARTS}]
    if unknown:
        raise Mistake(f"--only: there is no part {unknown[0]!r}; there are {names}")
    if not 0 < flags.minutes <= 24 * 60:
        raise Mistake(f"--minutes must be above 0 and at most {24 * 60}; got {flags.minutes:g}")
    if not 0 <= flags.seed < 2**32:
        raise Mistake(f"--seed must be in 0..{2**32 - 1}; got {flags.seed}")
    if flags.take is not None and (flags.out is not None or flags.dry or flags.only):
        raise Mistake("--take files what a run has left: it goes with --results alone")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """flags -> processes -> records, or records -> page; returns the exit code."""
    try:
        flags = parse(sys.argv[1:] if argv is None else argv)
        if flags.take is not None:
            print(page.take(Path(flags.take), Path(flags.results)))
            return DONE
        folder = Path(flags.out or "build/gpu")
        folder.mkdir(parents=True, exist_ok=True)
        turned = watch.run(folder, flags.minutes, flags.dry, flags.seed, flags.only)
        _say(f"records: {folder / records.RECORDS}; python -m eval.gpu --take={folder} prints a page of them")
        if not turned:
            _say("the time was up before every part had its turn; the same command goes on from there")
        return DONE if turned else OVER
    except (Mistake, page.NothingToTake) as mistake:
        _say(f"error: {mistake}")
        return MISTAKE
    except OSError as error:
        _say(f"error: {error.strerror or error}: {error.filename or '--out'}")
        return MISTAKE
    except watch.Refused as reason:
        _say(f"error: {reason}")
        return NOTHING
    except KeyboardInterrupt:
        _say("interrupted: finished cells are kept, the same command goes on from there")
        return INTERRUPTED


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
