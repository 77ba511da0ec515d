"""Before a run: what it needs, whether it fits, where its tokens would live, and what each controller would reach.

    python -m eval.plan --model=opt_30b --hardware=h100_80gb --batch=64 --prompt_tokens=128 --new_tokens=512
    python -m eval.plan --model=opt_6.7b --hardware=v100_16gb --batch=16 --codec='int8(axis=token)' --json
    python -m eval.plan --model=FOLDER --hardware=this_machine --device_kv_bytes=0.33x --host_kv_bytes=2GB
    python -m eval.plan --profile --out=this_machine.json
    python -m eval.plan --models > configs/models.md

Nothing is loaded and nothing runs: this is `alisa_jax.plan` as a command. Its flags are the arguments of the function. Byte
flags take 2GB, 512MiB, or a multiple of the dense KV such as 0.33x; the default device budget is what weights and
activations leave, the default host budget is the host's memory. A device is a page of `configs/hardware`.

--profile measures this machine (copies both ways, a product of matrices, a read) and writes what --hardware reads. --models
prints the named shapes with their parameters, weights and KV as Markdown; `configs/models.md` is that page.
"""

import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from absl import flags

import alisa_jax
from alisa_jax import planning
from alisa_jax.planning.request import READS, TRAFFICS
from alisa_jax.planning.workload import ELEMENT_BYTES
from eval.modelled import hardware_profile, machines, shapes
from eval.script import common, inputs, tables
from eval.script.common import UserError

# The arguments of `alisa_jax.plan` with a default, which are flags of the same names.
SETTINGS = MappingProxyType(
    {
        name: argument.default
        for name, argument in inspect.signature(alisa_jax.plan).parameters.items()
        if argument.default is not argument.empty
    }
)


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked one by one; raises UserError."""
    values = flags.FlagValues()
    where = {"flag_values": values}

    def setting(define, name: str, help_text: str, *choices) -> None:
        define(name, SETTINGS[name], *choices, help_text, **where)

    flags.DEFINE_string("model", "bundled", "A shape such as opt_30b, bundled, or a folder.", **where)
    flags.DEFINE_string("hardware", "h100_80gb", "A page of configs/hardware, this_machine, or a profile.", **where)
    setting(flags.DEFINE_integer, "batch", "Sequences.")
    setting(flags.DEFINE_integer, "prompt_tokens", "Tokens of each prompt.")
    setting(flags.DEFINE_integer, "new_tokens", "New tokens of each sequence.")
    setting(flags.DEFINE_float, "kv_sparsity", "Share of the context that SWA leaves out.")
    setting(flags.DEFINE_string, "window", "SWA's window: k, 2k or a number of rows; it decides the statistics.")
    setting(flags.DEFINE_string, "codec", "How K and V are stored.")
    setting(flags.DEFINE_enum, "dtype", "Type of weights and of raw K and V.", tuple(ELEMENT_BYTES))
    setting(flags.DEFINE_string, "device_kv_bytes", "Device budget of the cache. Default: what is left.")
    setting(flags.DEFINE_string, "host_kv_bytes", "Host budget of the cache. Default: the host's memory.")
    setting(flags.DEFINE_multi_string, "placement", "Further controllers to price under SWA, such as alisa(lag=1).")
    setting(flags.DEFINE_enum, "read", "What can be read from host pages.", READS)
    setting(flags.DEFINE_enum, "traffic", "Which traffic the search assumes.", TRAFFICS)
    setting(flags.DEFINE_float, "entering_tokens", "Tokens that enter a selection per step.")
    setting(flags.DEFINE_float, "selection_us", "Microseconds that selecting adds to each layer and step.")
    setting(flags.DEFINE_float, "matmul_efficiency", "Reached share of the published operations per second.")
    setting(flags.DEFINE_float, "read_efficiency", "Reached share of the published memory rate.")
    flags.DEFINE_bool("models", False, "Print the page of the named shapes.", **where)
    flags.DEFINE_bool("profile", False, "Measure this machine and write --out.", **where)
    flags.DEFINE_string("out", None, f"Records; with --profile the file, default {machines.THIS_MACHINE}.", **where)
    flags.DEFINE_bool("json", False, "The record on stdout, one JSON line; the table on stderr.", **where)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", **where)
    return common.parse(values, argv, f"{__doc__}\n{planning.__doc__}")


def main(argv: Sequence[str]) -> None:
    """flags -> plan -> record."""
    values = config(argv)
    if values.models:
        return print(models(), end="")
    if values.profile:
        return _profile(values.out or machines.THIS_MACHINE)
    results = inputs.results(values.out)
    try:
        found = alisa_jax.plan(values.model, values.hardware, **{name: values[name].value for name in SETTINGS})
    except ValueError as error:
        raise UserError(f"--{error}") from None
    record = inputs.record(results, found.cell, found.values, found.wall_s, {"measured": False})
    common.emit([record], str(found), values.json)


def models() -> str:
    """The page `configs/models.md`."""
    return f"# Shapes of models\n\n{tables.markdown(shapes.named())}\n"


def _profile(path: str) -> None:
    if not Path(path).parent.is_dir():
        raise UserError(f"--out: there is no folder {str(Path(path).parent)!r}")
    found = hardware_profile.profile()
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from None
    rows = [(name, value if isinstance(value, str) else f"{value:.4g}") for name, value in found.items()]
    print(common.table(("measured", "value"), rows))


if __name__ == "__main__":
    sys.exit(common.run(main))
