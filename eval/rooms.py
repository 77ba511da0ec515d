"""Through how many rooms one key of one token goes: the modules entered while one layer is traced, counted.

    python -m eval.rooms                on 2 CPU cores about half a minute
    python -m eval.rooms --list
    python -m eval.rooms --json

Each run is one of the bundled model on a new engine, so its programs are traced. A profile function hears of every Python
function that is entered meanwhile. It notes modules from the call of `Decoder.block` for the first layer to its return: the
projections, the rotation, the write of the key, attention and the MLP. A step has one token in the block, a prefill many.
Sets that are exchanged after all layers belong to the step as well: the first call of a function `exchange...` behind the
block and outside of all blocks, to its return.

A file counts if it is a module of `alisa_jax` or `pallas_kernels` and a function of its text was entered. Policies, with
their statistics, and `axes` are left out. A room is a module, but `ops` is one room, and the codec with its helpers is one.
In the placed run the newest tokens lie in a ring on the device, the others on the host. Its rows count one layer too: what
brings rows between two steps is left out, and so is what takes the pages of a prompt to the host.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType

import jax
from absl import flags

import alisa_jax
from eval.script import common

REPOSITORY = Path(alisa_jax.__file__).resolve().parent.parent
PACKAGES = ("alisa_jax", "pallas_kernels")
LEFT_OUT = ("alisa_jax.policies", "alisa_jax.axes")
SHARED = MappingProxyType({"ops": "alisa_jax.ops", "codec": "alisa_jax.codecs"})  # rooms of several modules: packages
BLOCK = ("alisa_jax.models.decoder", "Decoder.block")  # module and name of a function
EXCHANGES = "alisa_jax.attention.layer"  # module of the functions `exchange...`

PROMPT_TOKENS, NEW_TOKENS = 128, 2
DEVICE_KV_BYTES = 180_000  # less than the placed run would take, so the oldest tokens leave
RUNS = (  # name, policy, codec, controller, what is counted
    ("dense raw", "dense", "raw", None, ("step",)),
    ("swa raw", "swa(kv_sparsity=0.8)", "raw", None, ("step",)),
    ("swa int8 channel", "swa(kv_sparsity=0.8)", "int8(axis=channel)", None, ("step",)),
    ("swa int8 token", "swa(kv_sparsity=0.8)", "int8(axis=token)", None, ("step",)),
    ("placed swa int8 token", "swa(kv_sparsity=0.8)", "int8(axis=token)", "alisa", ("step", "prefill")),
)


def main(argv: Sequence[str]) -> None:
    """flags -> runs -> table."""
    values = flags.FlagValues()
    where = {"flag_values": values}
    flags.DEFINE_bool("list", False, "The rooms of each row as well, in the order in which they are entered.", **where)
    flags.DEFINE_bool("json", False, "One record a row on stdout; the table on stderr.", **where)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", **where)
    common.parse(values, argv, __doc__)
    found = [record for run in RUNS for record in rows(*run)]
    common.emit(found, report(found, values.list), values.json)


def module_of(path: str) -> str | None:
    """The module of the project whose file is `path`; None for all other files."""
    file = Path(path)
    if not file.is_absolute() or not file.is_relative_to(REPOSITORY):
        return None
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__") if parts[0] in PACKAGES else None


def within(module: str, names: Iterable[str]) -> bool:
    """`module` is one of `names` or lies in one."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def room_of(module: str) -> str | None:
    """The room of a module; None for what is left out."""
    if within(module, LEFT_OUT):
        return None
    shared = (room for room, package in SHARED.items() if within(module, (package,)))
    return next(shared, module.removeprefix("alisa_jax."))


class Watch:
    """A profile function that notes the modules entered between the call of a function and its return.

    `opens(module, frame)` says of a function, as it is called, that it begins what is watched.
    """

    def __init__(self, opens: Callable[[str, FrameType], bool]):
        self.opens, self.inside = opens, None
        self.modules: dict[str, str | None] = {}  # by path
        self.entered: dict[str, None] = {}  # in order

    def __call__(self, frame: FrameType, event: str, _) -> None:
        if event == "return" and frame is self.inside:
            self.inside = None
        if event != "call":
            return
        path = frame.f_code.co_filename
        if path not in self.modules:
            self.modules[path] = module_of(path)
        module = self.modules[path]
        if module is None or frame.f_code.co_name == "<module>":
            return
        if self.inside is None and self.opens(module, frame):
            self.inside = frame
        if self.inside is not None:
            self.entered.setdefault(module)


def layer_of(phase: str) -> Callable[[str, FrameType], bool]:
    """What opens a `Watch` of one layer of a "step" or a "prefill"."""
    seen = set()

    def opens(module: str, frame: FrameType) -> bool:
        name = frame.f_code.co_qualname
        if (module, name) == BLOCK:
            one = frame.f_locals["x"].shape[1] == 1
            what = "block" if one == (phase == "step") else None
        else:
            exchanges = module == EXCHANGES and name.startswith("exchange") and not in_block(frame)
            what = "exchange" if exchanges and phase == "step" and "block" in seen else None
        if what is None or what in seen:
            return False
        seen.add(what)
        return True

    return opens


def in_block(frame: FrameType | None) -> bool:
    """`frame` was called, by however many calls, from the block of a layer."""
    while frame is not None and frame.f_code.co_qualname != BLOCK[1]:
        frame = frame.f_back
    return frame is not None


def rows(name: str, policy: str, codec: str, controller: str | None, phases: Sequence[str]) -> list[dict]:
    """A record for each of `phases` of one run."""
    model = alisa_jax.load("bundled")
    prompt = [model.encode(Path(__file__).read_text(encoding="utf-8"))[:PROMPT_TOKENS]]
    watches = {phase: Watch(layer_of(phase)) for phase in phases}

    def profile(frame, event, arg):
        for watch in watches.values():
            watch(frame, event, arg)

    jax.clear_caches()  # a program that is there already is not traced again
    budget = math.inf if controller is None else DEVICE_KV_BYTES
    engine = alisa_jax.Engine(model, policy, codec, controller or "resident", budget)
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run = engine.generate(prompt, NEW_TOKENS, eos_ids=())
    finally:
        sys.setprofile(before)
    if controller is not None and not run.placement.stored_rows:
        raise RuntimeError(f"{name}: nothing left the device, so no layer with a ring was traced")
    if missed := [phase for phase, watch in watches.items() if not watch.entered]:
        raise RuntimeError(f"{name}: no {missed[0]} entered {'.'.join(BLOCK)}")
    return [record(f"{name}: {p}" if controller else name, p, watch.entered) for p, watch in watches.items()]


def record(name: str, phase: str, entered: Iterable[str]) -> dict:
    """Files and rooms of a row, from the modules that were entered, in order."""
    files = [module for module in entered if room_of(module) is not None]
    return {"row": name, "phase": phase, "files": files, "rooms": list(dict.fromkeys(map(room_of, files)))}


def report(found: Sequence[dict], listed: bool) -> str:
    """The table for people."""
    cells = [(r["row"], str(len(r["files"])), str(len(r["rooms"]))) for r in found]
    text = common.table(("one layer of", "files", "rooms"), cells)
    if not listed:
        return text
    return text + "\n\n" + "\n".join(f"{r['row']}: {' '.join(r['rooms'])}" for r in found)


if __name__ == "__main__":
    sys.exit(common.run(main))
