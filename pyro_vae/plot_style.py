"""What all pictures share: colours, a frame, text as it is.

Pictures are functions ``(values, ..., ax=None) -> ax`` that only draw. Without ``ax`` each makes its own figure,
outside pyplot: no window opens, no backend is picked, nothing stays behind. Save it with ``ax.figure.savefig(path)``.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours for the few lines and bars.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.35"

# Ten colours for classes, chosen by search: with simulated protanopia, deuteranopia or tritanopia the closest
# two are still 27 apart in CIELAB (5 in matplotlib's default cycle). Markers differ as well.
CLASS_COLOURS = (
    *("#1010F0", "#C0C000", "#E00000", "#008060", "#F090B0"),
    *("#503070", "#40E080", "#A020C0", "#701010", "#90B0F0"),
)
CLASS_MARKERS = "os^vDPX<>ph"  # one more than colours: no pair returns before 110 classes


def new_axes(width: float, height: float) -> Axes:
    """Axes of a figure of their own, inches."""
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def tidy(ax: Axes, grid_axis: str = "y") -> None:
    """Open to the right and above, with a faint grid behind what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid_axis, color="0.88", lw=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def plain_text(text: object) -> str:
    """Text as it is: a pair of dollar signs in a name would be typeset as mathematics."""
    return str(text).replace("$", r"\$")
