"""The columns of a CSV file: what is read, what kind each column is of, and back to text."""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_vae.data_contract import expect, expect_choice, reading

Kind = Literal["normal", "positive", "count", "binary", "categorical"]
LIKELIHOODS: dict[str, str] = {
    "normal": "HeteroscedasticNormal",
    "positive": "LogNormal",
    "count": "counts.NegativeBinomial",
    "binary": "Bernoulli",
    "categorical": "tables.Nominal",
}
_WIDE = 100  # positive numbers that span more than this factor are told apart by their logarithm


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: its name.
        kind: what it holds; see :func:`read_columns`.
        values: its numbers, or the indices of its levels, float64 [N]; NaN where a cell is missing.
        levels: the texts of a binary or categorical column.
    """

    name: str
    kind: Kind
    values: Tensor
    levels: tuple[str, ...] = ()

    @property
    def likelihood(self) -> tuple[str, dict[str, Any]]:
        """Name and arguments of the likelihood of the column."""
        return LIKELIHOODS[self.kind], {"num_levels": len(self.levels)} if self.kind == "categorical" else {}

    def unit(self, seen: Tensor) -> tuple[float, float]:
        """What to subtract and divide by: mean and standard deviation (divisor N), or a typical size, of training rows.

        Args:
            seen: the training rows of the column, NaN where missing.
        """
        there = seen[~seen.isnan()]
        if self.kind == "normal":
            return there.mean().item(), there.std(correction=0).item()
        return (0.0, there.log().mean().exp().item()) if self.kind == "positive" else (0.0, 1.0)

    def text(self, value: float) -> str:
        """A cell: a number, a whole number, or the nearest level; empty where missing."""
        if math.isnan(value):
            return ""
        if self.levels:
            return self.levels[min(max(round(value), 0), len(self.levels) - 1)]
        return str(max(round(value), 0)) if self.kind == "count" else f"{value:.6g}"


def read_columns(
    file: Path, label: str | None, delimiter: str, kinds: Mapping[str, str], missing: Sequence[str]
) -> tuple[list[Column], list[str]]:
    """Read a CSV file and tell what each column holds.

    Text is ``categorical``, with two different texts ``binary``. Numbers are ``binary`` where all are 0 or 1, ``count``
    where they are whole, not negative and sometimes 0, ``positive`` where they span more than a factor of 100, else
    ``normal``.

    Args:
        file: the file, UTF-8.
        label: name of the column of labels, or None.
        delimiter: the character between cells.
        kinds: the kinds of columns that are known better than that.
        missing: what stands in a cell without a value.

    Returns:
        The columns but the label, and the labels of the rows.

    Raises:
        FileNotFoundError, ValueError: the file, a cell or a kind does not fit.
    """
    header, table = _read_csv(file, label, delimiter)
    expect(
        set(kinds) <= set(header) - {label}, f"kinds of columns of {file}", ", ".join(map(repr, kinds)), "check names"
    )
    columns, texts = [], []
    for place, name in enumerate(header):
        cells = [(line, None if cells[place] in missing else cells[place]) for line, cells in table]
        if name == label:
            for line, cell in cells:
                expect(cell is not None, "a label", f"'' in {file} line {line}, column {name!r}", "fill it in")
            texts = [str(cell) for _, cell in cells]
        else:
            columns.append(_column(name, cells, kinds.get(name), file))
    return columns, texts


def _column(name: str, cells: list[tuple[int, str | None]], kind: str | None, file: Path) -> Column:
    expect_choice(f"the kind of column {name!r}", kind, (None, *get_args(Kind)))
    there = [(line, cell) for line, cell in cells if cell is not None]
    expect(bool(there), f"values in column {name!r} of {file}", "none", "remove the column")
    is_number = [_is_number(cell) for _, cell in there]
    if kind not in ("categorical", "binary") and any(is_number):
        for (line, cell), known in zip(there, is_number, strict=True):
            known = known and math.isfinite(float(cell))
            where = f"{cell!r} in {file} line {line}, column {name!r}"
            remedy = f"correct it, leave it empty where it is missing, or give kinds={{{name!r}: 'categorical'}}"
            expect(known, "a finite number", where, remedy)
        values = [math.nan if cell is None else float(cell) for _, cell in cells]
        numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
        found = kind or _kind_of(numbers[~numbers.isnan()])
        if found != "binary":
            return _numbers(name, found, numbers, file)
    texts = sorted({cell for _, cell in there}, key=lambda text: (float(text) if _is_number(text) else math.inf, text))
    found = kind or ("binary" if len(texts) == 2 else "categorical")
    if kind is None:
        remedy = f"remove the column, or give kinds={{{name!r}: 'categorical'}}"
        few = len(texts) <= max(20, len(cells) // 10)
        expect(few, f"categories in column {name!r} of {file}", f"{len(texts)} different texts", remedy)
    expect(len(texts) > 1, "columns that vary", f"column {name!r} of {file} constant", "remove the column")
    fits = found != "binary" or len(texts) == 2
    expect(fits, f"two values in the binary column {name!r}", len(texts), "make it categorical")
    number = {text: float(i) for i, text in enumerate(texts)}
    indices = [math.nan if cell is None else number[cell] for _, cell in cells]
    values = torch.tensor(indices, dtype=torch.float64, device="cpu")  # type: ignore[assignment]
    return Column(name, found, values, tuple(texts))  # type: ignore[arg-type]


def _kind_of(numbers: Tensor) -> Kind:
    low, high, whole = numbers.min(), numbers.max(), bool((numbers % 1 == 0).all())
    if whole and low == 0:
        return "binary" if high <= 1 else "count"
    return "positive" if low > 0 and high > _WIDE * low else "normal"


def _numbers(name: str, kind: str, numbers: Tensor, file: Path) -> Column:
    there = numbers[~numbers.isnan()]
    fits = {
        "count": bool(((there >= 0) & (there % 1 == 0)).all()),
        "positive": bool((there > 0).all()),
    }.get(kind, True)
    expect(fits, f"{kind} numbers in column {name!r} of {file}", f"{there.min():g} to {there.max():g}", "change kinds")
    return Column(name, kind, numbers)  # type: ignore[arg-type]


def describe(columns: Sequence[Column]) -> str:
    """What the columns are taken for, and what is missing, for the data policy."""
    by_kind: dict[str, list[str]] = {}
    for column in columns:
        by_kind.setdefault(column.kind, []).append(
            f"{column.name} ({len(column.levels)})" if column.kind == "categorical" else column.name
        )
    named = {kind: ", ".join([*names[:6], *(["..."] if len(names) > 6 else [])]) for kind, names in by_kind.items()}
    scaled = "columns standardised by the training mean and standard deviation"
    if set(named) == {"normal"}:
        text = scaled
    else:
        text = "; ".join(f"{kind}: {names}" for kind, names in named.items())
        text += f"; normal {scaled}" if "normal" in named else ""
        text += "; positive columns in units of their geometric mean" if "positive" in named else ""
    gaps = Counter({column.name: int(column.values.isnan().sum()) for column in columns})
    if gaps.total():
        most = ", ".join(f"{name} {count}" for name, count in gaps.most_common(6) if count)
        cells = len(columns) * len(columns[0].values)
        text += f"; {gaps.total()} of {cells} cells missing ({most})"
    return text


def _read_csv(file: Path, label: str | None, delimiter: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and the cells of each row with the number of its line."""
    expect(file.is_file(), "a CSV file", f"no file {file}", "check path", FileNotFoundError)
    with (
        reading("CSV text in UTF-8", file, "convert it"),
        file.open(newline="", encoding="utf-8-sig") as text,
    ):
        reader = csv.reader(text, delimiter=delimiter)
        table = [(reader.line_num, [c.strip() for c in cells]) for cells in reader if cells]
    header = table[0][1] if table else []
    found = ", ".join(map(repr, header)) or "nothing"
    named = bool(header) and "" not in header and len(set(header)) == len(header)
    named = named and not all(_is_number(name) for name in header)
    expect(named, f"a header row of different names in {file}", found, "put the column names first")
    expect(label is None or label in header, f"a column {label!r} in {file}", found, "give one of these")
    expect(header != [label], f"columns beside {label!r} in {file}", "none", "add some")
    for line, cells in table[1:]:
        fits = len(cells) == len(header)
        expect(fits, f"{len(header)} cells", f"{len(cells)} in {file} line {line}", "complete the line")
    return header, table[1:]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
