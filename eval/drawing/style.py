"""What all figures share: colours, a recipe, opening and saving. matplotlib is an extra; without it a script goes on."""

import importlib.util
import os
from pathlib import Path
from types import MappingProxyType

from eval.script.common import UserError

# Okabe and Ito's colours, which stay apart for colour-blind readers; the markers do without colour.
STYLES = MappingProxyType(
    {
        "dense": ("dense", "#000000", "--", ""),
        "local": ("local", "#E69F00", "-", "s"),
        "strided": ("strided", "#56B4E9", "-", "^"),
        "swa": ("SWA", "#D55E00", "-", "o"),
        "swa+int8": ("SWA, INT8", "#0072B2", ":", "D"),
    }
)
SERIES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
RECIPE = MappingProxyType({"font.family": "serif", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
WITHOUT = "no figure: matplotlib is not installed (it comes with the extra 'plots')"


def pyplot():
    """matplotlib.pyplot without a screen, or None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path: Path) -> str:
    """Write the PNG, whole or not at all, and say so; raises UserError."""
    from matplotlib import pyplot

    part = path.with_name(path.name + ".part")
    try:
        figure.savefig(part, dpi=200, format="png")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write the figure {path.name!r}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
        part.unlink(missing_ok=True)
    return f"figure: {path}"


def line(method: str) -> dict:
    """Label, colour, line and marker of a method, for matplotlib."""
    return dict(zip(("label", "color", "linestyle", "marker"), STYLES[method], strict=True))
