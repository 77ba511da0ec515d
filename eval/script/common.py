"""What every evaluation script shares: flags, mistakes in one sentence, tables, and where output goes.

With `--json`, stdout holds one JSON line per record and everything else goes to stderr; without it, the table
goes to stdout. Exit codes: 0 done, 2 a mistake on the command line or in its files, 130 interrupted (the
finished cells are kept).
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

from absl import flags

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130


class UserError(Exception):
    """A mistake of the person at the keyboard: its text is one sentence, printed without a traceback."""


class HelpRequested(Exception):
    """`--help` was given; its text is what to print."""


def shared_flags(model: str, text: str, out: str | None) -> flags.FlagValues:
    """Flags that every script has, in a fresh container: nothing is global, scripts are functions."""
    values = flags.FlagValues()
    where = {"flag_values": values}
    flags.DEFINE_string(
        "model",
        model,
        "A Hugging Face folder, a .gguf file, random:NAME, bundled, or smollm2-135m.",
        **where,
    )
    flags.DEFINE_string("text", text, "A UTF-8 file, or bundled:heldout (held-out standard library source).", **where)
    flags.DEFINE_integer("seed", 0, "Seed of everything drawn at random; written into every record.", **where)
    flags.DEFINE_string(
        "out", out, "JSON-lines file of records; a cell that is finished there is not run again.", **where
    )
    flags.DEFINE_bool("rerun", False, "Run finished cells again.", **where)
    flags.DEFINE_string(
        "compile_cache",
        "auto",
        "Folder of compiled programs, which the next run need not compile; none; or auto: what JAX_COMPILATION_CACHE_DIR"
        " says, else alisa_jax in the user's folder of caches.",
        **where,
    )
    flags.DEFINE_bool("json", False, "Records on stdout, one JSON line each; all else on stderr.", **where)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", **where)
    return values


DTYPES = ("auto", "float32", "bfloat16", "float16")


def dtype_flag(values: flags.FlagValues) -> None:
    """`--dtype`, for the scripts that load a model."""
    flags.DEFINE_enum(
        "dtype",
        "auto",
        DTYPES,
        "Type that the weights are held in and computed with; auto: float32 on a CPU, elsewhere that of the model's file.",
        flag_values=values,
    )


def impl_flag(values: flags.FlagValues) -> None:
    """`--attention_impl`, for the scripts that run an engine or two."""
    flags.DEFINE_enum(
        "attention_impl",
        "auto",
        ("auto", "xla", "pallas", "interpret"),
        "What computes attention: XLA, the GPU kernels, the kernels interpreted (slow), or kernels where they run.",
        flag_values=values,
    )


def placement_flags(values: flags.FlagValues) -> None:
    """`--placement` and its budgets, for the scripts that run an engine under one."""
    where = {"flag_values": values}
    flags.DEFINE_string("placement", "resident", "Where the cache lives: resident, waves, flexgen, alisa, ...", **where)
    help_text = "{} budget of the cache, as in 2GB or 0.33x, a share of the dense K and V of a batch. Default: none."
    flags.DEFINE_string("device_kv_bytes", "inf", help_text.format("Device"), **where)
    flags.DEFINE_string("host_kv_bytes", "inf", help_text.format("Host"), **where)


def placement_fields(values: flags.FlagValues) -> dict:
    """What they add to a cell: the placement, and the budgets that were given."""
    budgets = {name: getattr(values, name) for name in ("device_kv_bytes", "host_kv_bytes")}
    return {"placement": values.placement} | {name: given for name, given in budgets.items() if given != "inf"}


RESIDENT = MappingProxyType({"placement": "resident"})  # what `placement_fields` gives where no flag is given


def impl_field(impl: str) -> dict:
    """What `--attention_impl` adds to a cell: nothing, unless it was given."""
    return {} if impl == "auto" else {"attention_impl": impl}


def parse(values: flags.FlagValues, argv: Sequence[str], doc: str) -> flags.FlagValues:
    """Read `argv`, program name first; raises UserError naming the bad flag, HelpRequested for --help."""
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if values.help:
        raise HelpRequested(f"{doc}\n\n{values.get_help()}")
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every setting is a flag (--name=value)")
    if "compile_cache" in values:
        keep_programs(values.compile_cache)
    return values


def keep_programs(where: str) -> None:
    """Have JAX keep what it compiles in the folder `where`; "auto" and "none" as `--compile_cache` says.

    Raises UserError for a folder that cannot be made; under "auto" that is said, and nothing is kept.
    """
    if where == "none" or (where == "auto" and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "alisa_jax" if where == "auto" else Path(where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if where != "auto":
            raise UserError(f"--compile_cache: cannot make the folder {where!r}: {error.strerror}") from None
        say(f"compiled programs are not kept: no folder of caches ({error.strerror})")
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and turn its mistakes into one sentence on stderr; returns the exit code."""
    argv = sys.argv if argv is None else argv
    try:
        main(argv)
    except HelpRequested as text:
        print(text)
    except UserError as error:
        say(f"error: {error}")
        return EXIT_MISTAKE
    except FloatingPointError as error:  # what the model computed is no number: nothing is reported of it
        say(f"error: {error}")
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        say("interrupted: finished cells are kept in --out, the same command goes on from there")
        return EXIT_INTERRUPTED
    return 0


def say(text: str) -> None:
    """One line for the reader, on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(records: Iterable[dict], text: str, as_json: bool) -> None:
    """The end of a script: with `--json` records on stdout and table on stderr, else table on stdout."""
    if as_json:
        for record in records:
            print(json.dumps(record, allow_nan=False))
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


def write(path: Path, text: str) -> None:
    """Write a text file in one step, its folder with it: it is there whole or as it was before. Raises UserError."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path.name!r}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Text table; the first `left` columns are aligned left, the others right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * w for w in widths])
    pad = [str.ljust if i < left else str.rjust for i in range(len(head))]
    return "\n".join("  ".join(p(c, w) for p, c, w in zip(pad, line, widths, strict=True)).rstrip() for line in lines)


def number(value, form: str = ".3f", scale: float = 1.0, stderr: float | None = None) -> str:
    """A cell of a table; `-` for a missing number, `value ±stderr` where there is one, a text unchanged."""
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    text = format(value * scale, form)
    return text if stderr is None else f"{text} ±{format(stderr * scale, form)}"


def ratio_stderr(totals: Sequence[float], counts: Sequence[float]) -> float | None:
    """Standard error of sum(totals) / sum(counts) over clusters (windows, episodes) of unequal size.

    First-order (linearised) variance of a ratio, with the n / (n - 1) correction; None for fewer than two
    clusters.
    """
    clusters = len(totals)
    if clusters < 2:
        return None
    ratio = math.fsum(totals) / math.fsum(counts)
    squares = math.fsum((t - ratio * c) ** 2 for t, c in zip(totals, counts, strict=True))
    return math.sqrt(squares * clusters / (clusters - 1)) / math.fsum(counts)
