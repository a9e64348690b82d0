r"""Sweeps: one argument of ``pyro-vae train`` over some values and seeds, as ordinary run folders, in one table.

.. math:: \bar m_v = \frac 1 S \sum_s m_{vs}, \qquad \mathrm{se} = \mathrm{sd}_s(m_{vs}) / \sqrt S, \qquad
    \Delta_v = \frac 1 S \sum_s (m_{vs} - m_{1s})

The differences to the first value are paired: run by run of one seed, so that what a seed does to all values cancels.
"""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from pyro_vae import sweep_plots, tails
from pyro_vae.checkpoints import write_atomically
from pyro_vae.parts import UsageError
from pyro_vae.uncertainty import with_error

RATE, FIT = "KL(q(z|x), p(z))", "E log p(x|z)"


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Args:
        label: the values that are varied: "objective.beta=4".
        seed: its seed.
        folder: its run folder.
        words: the arguments of ``pyro-vae train`` that make it.
    """

    label: str
    seed: int
    folder: Path
    words: tuple[str, ...]


def plan(vary: Sequence[str], seeds: str, words: Sequence[str], out: Path) -> list[Run]:
    """The runs of a sweep, all seeds of the first value first.

    Args:
        vary: arguments with their values, "objective.beta=0.1,1,4"; of several, all combinations.
        seeds: "0,1,2", or how many: "3" is 0, 1 and 2.
        words: the other arguments of ``pyro-vae train``.
        out: the folder of the sweep.

    Raises:
        UsageError: an argument without values, given twice, or seeds that are no numbers.

    Example:
        >>> [str(run.folder) for run in plan(["lr=0.01,0.1"], "2", ["--epochs", "5"], Path("out"))]
        ['out/lr=0.01/seed=0', 'out/lr=0.01/seed=1', 'out/lr=0.1/seed=0', 'out/lr=0.1/seed=1']
    """
    if not vary:
        raise UsageError("--vary: expected an argument and its values, found none: --vary latent_dim=2,5,10.")
    axes = [_axis(text) for text in vary]
    names = [name for name, _ in axes]
    given = {word.lstrip("-").split("=", 1)[0] for word in words if word.startswith("--")}
    for name in names:
        if names.count(name) > 1 or name in given:
            raise UsageError(f"--vary: {name} is given twice: name it once, with all its values.")
    for name in ("seed", "out"):
        if name in given:
            raise UsageError(f"--{name}: a sweep has --{'seeds 0,1,2' if name == 'seed' else 'out'} in its place.")
    runs = []
    for values in product(*(values for _, values in axes)):
        pairs = list(zip(names, values, strict=True))
        label = " ".join(f"{name}={value}" for name, value in pairs)
        extra = [f"--{name}={value}" for name, value in pairs]
        for seed in _seeds(seeds):
            folder = out / re.sub(r"[^\w.=+,-]+", "_", label) / f"seed={seed}"
            runs.append(Run(label, seed, folder, (*words, *extra, f"--seed={seed}", f"--out={folder}")))
    doubles = {run.folder for run in runs if sum(other.folder == run.folder for other in runs) > 1}
    if doubles:
        raise UsageError(f"--vary: two values share the folder {min(doubles)}: give each value once.")
    return runs


def _axis(text: str) -> tuple[str, list[str]]:
    name, equals, listed = text.lstrip("-").partition("=")
    values = [value.strip() for value in re.split(r",(?![^\[{(]*[\]})])", listed)]  # not inside brackets
    if not equals or not re.fullmatch(r"[\w.]+", name) or not all(values):
        raise UsageError(f"--vary: expected NAME=VALUE,VALUE,..., found {text!r}: --vary objective.beta=0.5,1,4.")
    if name in ("seed", "out"):
        raise UsageError(f"--vary: {name} cannot be varied: use --seeds 0,1,2 for seeds.")
    return name, values


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*,?", text):
        raise UsageError(f"--seeds: expected 0,1,2 or how many (3), found {text!r}.")
    numbers = [int(part) for part in text.split(",") if part]
    if "," not in text:
        if numbers[0] < 1:
            raise UsageError(
                "--seeds: expected one or more, found 0: --seeds 3, or --seeds 0, (with the comma) for seed 0 alone."
            )
        return list(range(numbers[0]))
    return list(dict.fromkeys(numbers))


def check_plan(path: Path, configurations: Mapping[str, str]) -> None:
    """Write down what each run of the folder is; refuse to mix it with a run made otherwise.

    Args:
        path: the file of the plan.
        configurations: run folder -> its configuration as YAML.

    Raises:
        UsageError: the folder holds a run of the same name with another configuration.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise UsageError(f"{path} is not readable: restore or delete it.") from None
    for name, text in configurations.items():
        if not (path.parent / name / "config.yaml").exists():  # planned and never begun
            continue
        lines = zip(known.get(name, text).splitlines(), text.splitlines(), strict=False)
        if known.get(name, text) != text:
            before, now = next(((a.strip(), b.strip()) for a, b in lines if a != b), ("fewer arguments", "more"))
            raise UsageError(
                f"{path.parent} holds a sweep made otherwise ({before!r} there, {now!r} here): choose another --out."
            )
    write_atomically(path, json.dumps({**known, **configurations}, indent=2) + "\n")


@dataclass(frozen=True)
class Cell:
    """One number of one value: of each seed, and together.

    Args:
        values: seed -> number.
        error_of_one: the standard error of a single run over the held-out examples.
    """

    values: Mapping[int, float]
    error_of_one: float = math.nan

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return sum(self.values.values()) / len(self.values)

    @property
    def standard_error(self) -> float:
        """Over the seeds, their held-out examples held fixed; of one seed, over the held-out examples."""
        num = len(self.values)
        if num < 2:
            return self.error_of_one
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.values.values()) / (num - 1) / num)

    def less(self, other: "Cell") -> "Cell":
        """The differences, seed by seed, of the seeds that both have."""
        return Cell({seed: value - other.values[seed] for seed, value in self.values.items() if seed in other.values})

    def __str__(self) -> str:
        if not self.values:
            return "-"
        error = self.standard_error
        return f"{self.mean:.4g}" if math.isnan(error) else with_error(self.mean, error)


@dataclass(frozen=True)
class Sweep:
    """The numbers of a sweep.

    Args:
        labels: the values, in the order given.
        seeds: the seeds.
        cells: metric -> label -> numbers; metrics that some run lacks have fewer.
        policies: the data policies found, one if the numbers compare.
        failures: "label seed=0" -> why it has no numbers.
        folders: "label seed=0" -> run folder.
        draws: the K behind each log p(x), and for how many examples it is too small.
    """

    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: Mapping[str, Mapping[str, Cell]]
    policies: tuple[str, ...]
    failures: Mapping[str, str]
    folders: Mapping[str, str]
    draws: tuple[str, ...] = ()

    @property
    def differences(self) -> dict[str, dict[str, Cell]]:
        """Metric -> label -> difference to the first value, paired by seed; none across data policies."""
        if len(self.policies) > 1:
            return {}
        first, *others = self.labels
        return {
            metric: {label: row[label].less(row[first]) for label in others if first in row and label in row}
            for metric, row in self.cells.items()
        }

    @property
    def error_text(self) -> str:
        """What the standard errors are about."""
        if len(self.seeds) > 1:
            return f"± standard error over {len(self.seeds)} seeds"
        return "± standard error over the held-out examples: one seed says nothing about others"

    def markdown(self) -> str:
        """The numbers and the differences as two tables in Markdown, a line for each metric."""
        name, ticks = _ticks(self.labels)
        rows = [[metric, *(self._text(metric, label) for label in self.labels)] for metric in self.cells]
        lines = [
            *_markdown([name, *ticks], rows),
            "",
            f"{self.error_text}; nats per example where not said otherwise.",
            "",
        ]
        lines += [f"- held-out: {policy}" for policy in self.policies]
        lines += [f"- log p(x): {draws}" for draws in self.draws]
        lines += [f"- failed: {run}: {reason}" for run, reason in self.failures.items()]
        if len(self.policies) > 1:
            lines += ["", "Numbers about different data: they cannot be compared, and no difference is shown."]
        elif len(self.labels) > 1:
            how = "paired by seed" if len(self.seeds) > 1 else "one seed: without standard errors"
            rows = [
                [metric, *(str(row.get(label, Cell({}))) for label in self.labels[1:])]
                for metric, row in self.differences.items()
            ]
            lines += ["", f"Less `{self.labels[0]}`, {how}:", "", *_markdown([name, *ticks[1:]], rows)]
        return "\n".join(lines) + "\n"

    def _text(self, metric: str, label: str) -> str:
        cell = self.cells[metric].get(label, Cell({}))
        part = f" ({len(cell.values)} of {len(self.seeds)})" if 0 < len(cell.values) < len(self.seeds) else ""
        return f"{cell}{part}"

    def summary(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON; a standard error that is none is None."""

        def plain(table: Mapping[str, Mapping[str, Cell]]) -> dict[str, Any]:
            rows: dict[str, Any] = {}
            for metric, row in table.items():
                for label, cell in row.items():
                    if not cell.values:
                        continue
                    error = cell.standard_error if math.isfinite(cell.standard_error) else None
                    numbers = {"mean": cell.mean, "standard_error": error, "by_seed": dict(cell.values)}
                    rows.setdefault(label, {})[metric] = numbers
            return rows

        return {
            "policies": list(self.policies),
            "draws": list(self.draws),
            "seeds": list(self.seeds),
            "errors": self.error_text,
            "values": plain(self.cells),
            "differences": {"against": self.labels[0], "values": plain(self.differences)},
            "runs": dict(self.folders),
            "failures": dict(self.failures),
        }

    def figures(self) -> dict[str, Axes]:
        """Name -> picture: each metric against the values and, where there are several, rate against distortion."""
        numbers = {
            metric: [list(row[label].values.values()) if label in row else [] for label in self.labels]
            for metric, row in self.cells.items()
            if metric != "seconds" and row
        }
        name, ticks = _ticks(self.labels)
        drawn = {"sweep": sweep_plots.sweep(ticks, numbers, name)} if numbers else {}
        both = [label for label in self.labels if all(label in self.cells.get(m, {}) for m in (RATE, FIT))]
        if len(both) > 1 and len(self.policies) == 1:
            rates, fits = ([self.cells[m][label].values for label in both] for m in (RATE, FIT))
            points = [[(r[s], -d[s]) for s in r if s in d] for r, d in zip(rates, fits, strict=True)]
            drawn["rate_distortion"] = sweep_plots.rate_distortion(points, _ticks(both)[1], name)
        return drawn

    def write(self, folder: Path) -> list[Path]:
        """Write ``table.md``, ``sweep.json`` and the pictures, each file whole or not at all."""
        texts = {"table.md": self.markdown(), "sweep.json": json.dumps(self.summary(), indent=2) + "\n"}
        written = []
        for name, text in texts.items():
            write_atomically(folder / name, text)
            written.append(folder / name)
        for name, ax in self.figures().items():
            buffer = io.BytesIO()
            figure = ax.get_figure(root=True)
            assert figure is not None
            figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
            write_atomically(folder / f"{name}.png", buffer.getvalue())
            written.append(folder / f"{name}.png")
        return written


def collect(runs: Sequence[Run], failures: Mapping[Run, str]) -> Sweep:
    """Read the evaluations of the runs.

    Args:
        runs: all runs of the sweep.
        failures: those without an evaluation, and why.

    Raises:
        UsageError: a run folder whose evaluation is missing or not readable.
    """
    cells: dict[str, dict[str, Cell]] = {}
    policies: dict[str, None] = {}
    for run in runs:
        if run in failures:
            continue
        numbers, policy = read_numbers(run.folder)
        policies[policy] = None
        for metric, (value, error) in numbers.items():
            row = cells.setdefault(metric, {})
            before = row[run.label].values if run.label in row else {}
            row[run.label] = Cell({**before, run.seed: value}, error)
    order = [*(metric for metric in cells if metric != "seconds"), *(["seconds"] if "seconds" in cells else [])]
    return Sweep(
        tuple(dict.fromkeys(run.label for run in runs)),
        tuple(dict.fromkeys(run.seed for run in runs)),
        {metric: cells[metric] for metric in order},
        tuple(policies),
        {f"{run.label} seed={run.seed}": reason for run, reason in failures.items()},
        {f"{run.label} seed={run.seed}": str(run.folder) for run in runs},
        _draws([run.folder for run in runs if run not in failures]),
    )


def _draws(folders: Sequence[Path]) -> tuple[str, ...]:
    """One line for each K: what the estimates of log p(x) in these run folders say of their draws."""
    few: dict[int, list[int]] = {}
    examples = 0
    for folder in folders:
        for found in json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["estimates"]:
            if found["name"] == "log p(x)" and found.get("num_particles"):
                few.setdefault(found["num_particles"], []).append(found.get("untrusted_examples") or 0)
                examples = found["num_examples"]
    return tuple(
        f"IWAE bound, from below, K={k}"
        + (f"; K too small for up to {max(counts)} of {examples} examples of a run" if any(counts) else "")
        + ("; K too small to judge" if k < tails.FEWEST_DRAWS else "")
        for k, counts in few.items()
    )


def read_numbers(folder: Path) -> tuple[dict[str, tuple[float, float]], str]:
    """Metric -> (value, standard error over the held-out examples) of a run folder, and its data policy.

    Args:
        folder: the run folder; its ``measures.json``, where there is one, adds to its ``evaluation.json``.
    """
    try:
        found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        numbers = {_metric(e): (e["mean"], _number(e["standard_error"])) for e in found["estimates"]}
        if found.get("active_units") is not None:
            numbers["active units"] = (float(found["active_units"]), math.nan)
        if (folder / "measures.json").exists():
            measures = json.loads((folder / "measures.json").read_text(encoding="utf-8"))
            for measure in measures.values():
                numbers |= {name: (value, _number(error)) for name, (value, error) in measure.items()}
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        numbers["seconds"] = (sum(json.loads(line).get("seconds") or 0.0 for line in lines), math.nan)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot read the numbers of {folder} ({reason}): delete it, and sweep again.") from None
    finite = {name: pair for name, pair in numbers.items() if pair[0] is not None and math.isfinite(pair[0])}
    return finite, found["policy"]


def _metric(estimate: Mapping[str, Any]) -> str:
    units = estimate.get("units", "nats per example")
    return estimate["name"] if units == "nats per example" else f"{estimate['name']}, {units}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _ticks(labels: Sequence[str]) -> tuple[str, list[str]]:
    """What is varied and its values: "objective.beta" and "0.1", "1"; of several arguments the labels themselves."""
    if all(label.count("=") == 1 for label in labels):
        return labels[0].split("=")[0], [label.split("=")[1] for label in labels]
    return "", list(labels)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """An aligned table in Markdown: as easy to read as text."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [list(head), *map(list, rows)]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    text = [f"| {' | '.join(row)} |" for row in padded]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [text[0], rule, *text[1:]]
