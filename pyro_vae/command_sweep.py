"""``pyro-vae sweep``."""

import contextlib
import inspect
import io
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from pyro_vae import (
    disentanglement,
    representation,
    sample_quality,
)
from pyro_vae.arguments import dump, train_parser
from pyro_vae.checkpoints import remove_leftovers, write_atomically
from pyro_vae.command_numbers import to_json
from pyro_vae.command_training import fresh_folder, resume, train
from pyro_vae.configuration import open_run
from pyro_vae.parts import UsageError
from pyro_vae.sweep import Run, check_plan, collect, plan
from pyro_vae.vae import VAE


def sweep(
    words: list[str],
    vary: list[str],
    seeds: str = "3",
    out: str | None = None,
    measure: str = "",
    json: bool = False,
) -> None:
    """Train over some values of an argument and some seeds, and put the numbers in one table and one picture.

    All other arguments are those of train, see pyro-vae train --help. Each run is an ordinary run folder below --out.
    What is finished is kept and what was stopped goes on when the same command is given again; more values and more
    seeds may be added. table.md has mean and standard error over the seeds and the differences to the first value,
    paired by seed; sweep.json has all numbers; sweep.png and rate_distortion.png show them. For example:

      pyro-vae sweep --vary objective.beta=0.1,0.5,1,4 --seeds 3 --objective Beta --epochs 50 --out runs/beta

    Args:
        words: the arguments of pyro-vae train, see pyro-vae train --help.
        vary: an argument of pyro-vae train and its values, NAME=VALUE,VALUE,...; of several --vary all combinations.
        seeds: a list such as 0,1,2, or how many.
        out: the folder of the sweep; a fresh one under runs/ by default.
        measure: further numbers of each run, separated by commas: representation (accuracies of what reads the labels
            from z), disentanglement (of a set with known factors: --data Sprites), quality (of samples, in features of
            a classifier).
        json: print one JSON object instead of lines to read.
    """
    kinds = [kind for kind in measure.split(",") if kind]
    unknown = [kind for kind in kinds if kind not in MEASURES]
    if unknown:
        raise UsageError(f"--measure: expected some of {', '.join(MEASURES)}, found {unknown[0]!r}.")
    folder = Path(out) if out else fresh_folder()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"expected --out to name a folder, found the file {folder}: choose another --out.")
    if (folder / "config.yaml").exists():
        raise UsageError(f"expected a folder for a sweep, found the run {folder}: choose another --out.")
    runs = plan(vary, seeds, words, folder)
    configs = {run: train_parser(train, run.words).parse(run.words) for run in runs}  # mistakes first
    check_plan(folder / "plan.json", {str(r.folder.relative_to(folder)): dump(train, c) for r, c in configs.items()})
    remove_leftovers(folder)
    messages = sys.stderr if json else sys.stdout
    failures: dict[Run, str] = {}
    for number, (run, config) in enumerate(configs.items(), 1):
        start = f"[{number}/{len(runs)}] {run.label} seed={run.seed}"
        try:
            kept = _run_of_sweep(run, config)
            _measure(run.folder, kinds)
        except (UsageError, ValueError, TypeError) as error:
            failures[run] = " ".join(str(error).split())
            print(f"{start}: failed: {failures[run]}", file=messages, flush=True)
            continue
        except SystemExit:
            command = shlex.join(["pyro-vae", "sweep", *(f"--vary={text}" for text in vary), *words])
            also = f"--seeds {seeds} --out {shlex.quote(str(folder))}" + (f" --measure {measure}" if measure else "")
            print(f"pyro-vae: or with all of the sweep: {command} {also}", file=sys.stderr)
            raise
        numbers = collect([run], {})
        name = next(iter(numbers.cells))
        cell = numbers.cells[name][run.label]
        print(f"{start}: {name} {cell}{' (kept)' if kept else ''}", file=messages, flush=True)
    if len(failures) == len(runs):
        if not any((run.folder / "config.yaml").exists() for run in runs):  # none began: leave nothing behind
            (folder / "plan.json").unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise UsageError(f"no run of the sweep succeeded; the first: {failures[runs[0]]}")
    found = collect(runs, failures)
    written = found.write(folder)
    if json:
        print(to_json(found.summary()), end="")
    else:
        print("\n" + found.markdown())
        for path in written:
            print(f"wrote      {path}")
    if failures:
        sys.stdout.flush()
        raise SystemExit(1)


def _run_of_sweep(run: Run, config: Namespace) -> bool:
    """Train a run, or go on with it, its lines in a file; whether it was finished before."""
    if (run.folder / "evaluation.json").exists():
        return True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        if (run.folder / "config.yaml").exists():
            resume(str(run.folder))
        else:
            train(config=config, **{key: config[key] for key in inspect.signature(train).parameters if key != "config"})
    write_atomically(run.folder / "log.txt", log.getvalue())
    return False


def _measure(folder: Path, kinds: Sequence[str]) -> None:
    """Add the further numbers that a run lacks to its ``measures.json``."""
    path = folder / "measures.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for kind in kinds:
        if kind not in known:
            _, data, vae = open_run(train, str(folder), "auto")
            numbers = MEASURES[kind](vae, data).items()
            known[kind] = {name: [value, error if math.isfinite(error) else None] for name, (value, error) in numbers}
            write_atomically(path, to_json(known))


def _read_representation(vae: VAE, data: Any) -> dict[str, tuple[float, float]]:
    found = representation.represent(vae, data)
    numbers = {}
    for name, row in (("linear probe", found.probes), ("neighbours", found.neighbours)):
        for key, each in list(row.items())[:-1]:  # raw x is the same in all runs
            numbers[f"{name} of {key.split(',')[0]}"] = each.mean, each.standard_error
    return numbers


def _read_disentanglement(vae: VAE, data: Any) -> dict[str, tuple[float, float]]:
    return {name: (s.value, s.standard_error) for name, s in disentanglement.disentangle(vae, data).items()}


def _read_quality(vae: VAE, data: Any) -> dict[str, tuple[float, float]]:
    found = sample_quality.quality(vae, data)
    numbers = {
        each.name: (each.mean, each.standard_error) for each in (found.precision, found.recall, found.confidence)
    }
    numbers[found.frechet.name] = found.frechet.value, found.frechet.standard_error
    if found.blur is not None:
        numbers["sharpness lost"] = found.blur.difference.mean, found.blur.difference.standard_error
    return numbers


MEASURES: dict[str, Callable[[VAE, Any], dict[str, tuple[float, float]]]] = {
    "representation": _read_representation,
    "disentanglement": _read_disentanglement,
    "quality": _read_quality,
}
