"""The derivation as something to show: a picture, and a page without any external resource."""

import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath

from pyro_vae.checkpoints import write_atomically
from pyro_vae.derivation import Derivation, texts
from pyro_vae.derivation_steps import Line
from pyro_vae.html_page import escape, html_page, table
from pyro_vae.plot_style import GREEN, GREY, VERMILION

_TITLE = "The evidence lower bound, derived and checked"
_SECTIONS = {  # above which line each stands
    "D1": "What is wanted: the evidence, an integral over all z",
    "D2": "How far q(z|x) is from the posterior p(z|x)",
    "D4": "Bayes' rule: what the model knows",
    "D7": "The evidence and its lower bound",
    "D10": "The KL to the prior, for a normal q",
    "D14": "Drawing z",
}
_MARKS = {"agrees": ("✓", GREEN), "DISAGREES": ("✗", VERMILION)}
_BAND = "#EFEFEF"
_ROW, _HEAD, _MARGIN = 0.58, 0.34, 0.35  # inches


def picture(derivations: Sequence[Derivation], ax: Axes | None = None) -> Axes:
    """Draw the derivation: the formula of each line, its reason, both sides and the verdict.

    Args:
        derivations: the same lines in one or more worlds; one column of numbers each.
        ax: where to draw, best about 12 by 12 inches; a new figure if None.

    Returns:
        The axes; one inch is one unit.
    """
    one = len(derivations) == 1
    sides, step_width = (("left side", "right side", "difference"), 1.65) if one else (("left side", "right side"), 1.0)
    column = step_width * len(sides) + (0.45 if one else 0.55)
    right = 7.0 + column * len(derivations)
    ends = [right - column * i for i in reversed(range(len(derivations)))]
    remarks = [f"{d.summary} ({d.note}.)" for d in derivations]
    remarks = [part for remark in remarks for part in textwrap.wrap(remark, round(13 * right))]
    lines = derivations[0].lines
    height = 1.75 + _ROW * len(lines) + _HEAD * len(_SECTIONS) + 0.22 * len(remarks)
    if ax is None:
        ax = Figure(figsize=(right + _MARGIN, height)).add_axes((0, 0, 1, 1))
    ax.set_xlim(0, right + _MARGIN)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    _write(ax, _MARGIN, 0.45, _TITLE, fontsize=17, weight="bold")
    _write(ax, _MARGIN, 1.06, "nats per example, mean over the examples", fontsize=8.5, color=GREY)
    for d, end in zip(derivations, ends, strict=True):
        _write(ax, end, 0.8, d.world.name, fontsize=10.5, weight="bold", ha="right")
        for i, side in enumerate(sides, 1):
            _write(ax, end - column + step_width * i, 1.06, side, fontsize=8.5, color=GREY, ha="right")
    y = 1.2
    for index, step in enumerate(line.step for line in lines):
        if step.key in _SECTIONS:
            ax.plot((_MARGIN, right), (y + 0.05,) * 2, color="0.6", lw=0.7)
            _write(ax, _MARGIN, y + 0.2, _SECTIONS[step.key], fontsize=9.5, weight="bold", color=GREY)
            y += _HEAD
        if step.key in ("D9", "D9b"):
            ax.fill_between((0.2, right + 0.15), y, y + _ROW, color=_BAND, lw=0, zorder=0)
        _write(ax, _MARGIN, y + 0.23, step.key, fontsize=10, weight="bold")
        _write(ax, 0.95, y + 0.22, f"${step.latex}$", fontsize=13, math_fontfamily="stix")
        _write(ax, 0.95, y + 0.48, step.reason, fontsize=7.8, color=GREY)
        for d, end in zip(derivations, ends, strict=True):
            line = d.lines[index]
            if (line.left is None and line.right is None) or line.verdict == "does not apply":
                note = f"{line.verdict}: {line.note}" if one and len(line.note) < 60 else line.verdict
                _write(ax, end, y + 0.23, note, fontsize=8.5, color=GREY, style="italic", ha="right")
                continue
            for i, text in enumerate(texts(line)[: len(sides)], 1):
                colour = GREY if text == "unknown" else "black"
                place = end - column + step_width * i
                _write(ax, place, y + 0.23, text.replace("-", "−"), fontsize=9.5, color=colour, ha="right")
            mark, colour = _MARKS.get(line.verdict, (line.verdict, GREY))
            _write(ax, end, y + 0.23, mark, fontsize=13 if len(mark) == 1 else 8.5, color=colour, ha="right")
        y += _ROW
    ax.plot((_MARGIN, right), (y + 0.05,) * 2, color="0.6", lw=0.7)
    for i, text in enumerate(remarks):
        _write(ax, _MARGIN, y + 0.3 + 0.22 * i, text, fontsize=9)
    return ax


def _write(ax: Axes, x: float, y: float, text: str, **look: Any) -> None:
    ax.text(x, y, text, va="center", **look)


def page(derivations: Sequence[Derivation]) -> str:
    """The derivation as one self-contained page; formulas are drawn, and carry their plain text for screen readers."""
    header = ["", "formula and reason", *(escape(d.world.name) for d in derivations)]
    rows = []
    for index, step in enumerate(line.step for line in derivations[0].lines):
        words = f'{formula(step.latex, step.formula)}<div class="why">{escape(step.reason)}</div>'
        rows.append([f"<b>{step.key}</b>", words, *(_cell(d.lines[index]) for d in derivations)])
    summaries = [f"<p>{escape(d.summary)}</p>" for d in derivations]
    notes = [f'<p class="why">{escape(d.world.name)}: {escape(d.note)}</p>' for d in derivations]
    body = "\n".join([*summaries, table(header, rows), *notes])
    return html_page(_TITLE, body, _MORE_STYLE)


def _cell(line: Line) -> str:
    """Both sides of a line, their difference and the verdict."""
    if line.difference is None and line.verdict == "does not apply":
        return f'<div class="why">{escape(line.note)}</div>'
    left, right, difference = (text.replace("-", "−") for text in texts(line))
    sign = "≥" if line.step.relation == ">=" else "="
    mark, colour = _MARKS.get(line.verdict, ("", "inherit"))
    verdict = f'<span style="color: {colour}">{mark} {line.verdict}</span>'
    detail = line.note if line.difference is None else f"difference {difference}"
    return f'{left} {sign} {right}<div class="why">{escape(detail)} {verdict}</div>'


def formula(latex: str, plain: str, size: float = 20.0) -> str:
    """A formula as a drawing (SVG) in the colour of the text around it.

    Args:
        latex: the formula, in the LaTeX that matplotlib knows.
        plain: the same in plain text, for those who do not see the drawing.
        size: height of the letters.
    """
    path = TextPath((0, 0), f"${latex}$", size=size, prop=FontProperties(math_fontfamily="stix"))
    box = path.get_extents()
    pieces = []
    for points, code in path.iter_segments(simplify=False, curves=True):
        pairs = " ".join(f"{value:.2f}" for value in points * ([1, -1] * (len(points) // 2)))
        pieces.append(_COMMANDS[int(code)] + ("" if code == Curve.CLOSEPOLY else pairs))
    view = f"{box.x0 - 1:.1f} {-box.y1 - 1:.1f} {box.width + 2:.1f} {box.height + 2:.1f}"
    return (
        f'<svg role="img" aria-label="{html.escape(plain)}" viewBox="{view}" width="{box.width + 2:.0f}" '
        f'height="{box.height + 2:.0f}"><title>{html.escape(plain)}</title><path fill="currentColor" '
        f'd="{"".join(pieces)}"/></svg>'
    )


def write_derivation(derivations: Sequence[Derivation], folder: str | Path) -> list[Path]:
    """Write ``derivation.html`` and ``derivation.png`` into a folder, which is made if missing.

    Args:
        derivations: the same lines in one or more worlds.
        folder: where the files go.

    Returns:
        The two files.
    """
    folder = Path(folder)
    figure = picture(derivations).get_figure(root=True)
    assert figure is not None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(folder / "derivation.html", page(derivations))
    write_atomically(folder / "derivation.png", buffer.getvalue())
    return [folder / "derivation.html", folder / "derivation.png"]


_COMMANDS = {
    int(Curve.MOVETO): "M",
    int(Curve.LINETO): "L",
    int(Curve.CURVE3): "Q",
    int(Curve.CURVE4): "C",
    int(Curve.CLOSEPOLY): "Z",
}

_MORE_STYLE = """
body { max-width: 90rem; } svg { display: block; margin: 0.15rem 0 0.3rem; } td { vertical-align: top; }
td:nth-child(2), th:nth-child(2) { text-align: left; } td:nth-child(2) .why { white-space: normal; max-width: 42rem; }
.why { color: var(--soft); font-size: 0.875rem; }
"""
