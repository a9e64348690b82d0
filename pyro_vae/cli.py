"""The command line: each command is made from the signature and docstring of a function below."""

import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from jsonargparse import ArgumentError, Namespace
from safetensors.torch import save as save_tensors
from torch import Tensor
from tqdm import tqdm

import pyro_vae
from pyro_vae import (
    architecture,
    catalogue,
    datasets,
    derivation,
    disentanglement,
    evaluation,
    parallel,
    plots,
    presets,
    report,
    representation,
    sample_quality,
)
from pyro_vae.annealing import annealed_log_evidence
from pyro_vae.checkpoints import remove_leftovers, write_atomically
from pyro_vae.configuration import (
    Formatter,
    Parser,
    UsageError,
    build,
    description,
    dump,
    load_config,
    make,
    open_run,
    train_parser,
)
from pyro_vae.contracts import NO_LIKELIHOOD, is_discrete, is_normalised, untouched
from pyro_vae.derivation_report import write_derivation
from pyro_vae.diagnostics import active_units
from pyro_vae.estimates import Estimate, elbo_terms, log_evidence
from pyro_vae.exact import log_evidence_by_enumeration
from pyro_vae.objectives import Objective
from pyro_vae.parallel import WorkerLost, Workers
from pyro_vae.sweep import Run, check_plan, collect, plan
from pyro_vae.training import History, fit
from pyro_vae.vae import VAE
from pyro_vae.wrong_losses import conventions


def train(
    config: Namespace,
    out: str | None = None,
    latent_dim: int = 2,
    epochs: int = 200,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    start_at_data: bool = True,
    standardize: bool | float = True,
    init: Literal["torch", "he", "glorot", "normal"] = "torch",
    eval_particles: int = 500,
    compiled: bool = False,
    resident: bool | None = None,
    figures: bool = True,
) -> None:
    """Train a VAE, evaluate it on held-out data, draw its pictures.

    Without arguments: the handwritten digits that scikit-learn carries, a two-dimensional z, under a minute on a
    laptop. Every part is swapped by class name with its arguments, for example --prior MixtureOfNormals
    --prior.num_components 10, or by the dotted path of a class of your own. --prior.help CLASS explains one. Several
    processes or GPUs share the batches of one run: torchrun --nproc-per-node=2 -m pyro_vae train.

    Args:
        config: the parsed configuration.
        out: the run folder; a fresh one under runs/ by default.
        latent_dim: number of latent dimensions D.
        epochs: passes over the training data.
        batch_size: examples a step, over all processes.
        lr: learning rate.
        seed: seed of the initial weights, the shuffling and the draws of z.
        device: where to compute; auto takes a GPU if there is one.
        start_at_data: start the decoder's output bias at the data's mean.
        standardize: give the encoder's network inputs of mean 0 and standard deviation 1 (one number for all of x); a
            number is what to subtract instead, without scaling.
        init: where the weights of both networks start: he for rectifiers, glorot for tanh, normal (scale 0.02), or as
            their layers of torch start.
        eval_particles: draws K of z for each held-out example in the estimate of log p(x).
        compiled: capture and compile the training step: faster epochs after some seconds of compilation.
        resident: keep the training data on the device (true) or read it in batches from memory or its file (false);
            null decides by its size.
        figures: draw the pictures.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("eval_particles", eval_particles)):
        if value < 1:
            raise UsageError(f"--{name}: expected a number >= 1, found {value}.")
    if not 0 < lr < float("inf"):
        raise UsageError(f"--lr: expected a number > 0, found {lr}.")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed: expected a number from 0 to 2**63 - 1, found {seed}.")
    with parallel.join(device) as workers, _quiet_unless_first(workers):
        folder = Path(workers.from_first(lambda: str(_new_folder(out))))
        data, vae = _build(config, workers)
        _check_density(vae, data)
        _make_paths_absolute(config)
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        if workers.is_first:
            write_atomically(folder / "config.yaml", dump(train, config))
        try:
            history = _fit(config, vae, data, folder, resume=False, workers=workers)
        except Exception:
            # Refused before the first epoch: leave nothing behind.
            if workers.is_first and not (folder / "state").exists():
                (folder / "config.yaml").unlink()
                for path in new:
                    path.rmdir()
            raise
    if workers.is_first:
        _finish(config, vae, data, folder, history)


def resume(run: str, epochs: int | None = None, device: Literal["auto", "cpu", "cuda"] | None = None) -> None:
    """Go on with a run that was stopped or killed, as if it had never been: bit for bit on the same machine.

    With another number of processes (torchrun --nproc-per-node=2 -m pyro_vae resume RUN) it goes on with other noise.

    Args:
        run: the run folder.
        epochs: passes over the training data in all; default: as configured.
        device: where to compute; default: as configured.
    """
    config = load_config(train, run)
    folder = Path(run)
    changes = {"epochs": epochs, "device": device}
    for key, value in changes.items():
        if value is not None:
            config[key] = value
    started = (folder / "state" / "latest.safetensors").exists()  # else it was stopped in its first epoch
    with parallel.join(config.device) as workers, _quiet_unless_first(workers):
        if workers.is_first:
            remove_leftovers(folder)
        data, vae = _build(config, workers, trained=started)
        history = _fit(config, vae, data, folder, resume=started, workers=workers)
    if workers.is_first:
        write_atomically(folder / "config.yaml", dump(train, config))
        _finish(config, vae, data, folder, history)


def evaluate(
    run: str,
    num_particles: int = 1000,
    estimator: Literal["importance", "annealing", "quadrature", "enumeration"] = "importance",
    num_examples: int | None = None,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    leapfrog_steps: int = 10,
    from_encoder: bool = False,
    diagnostics: bool = False,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> None:
    """Estimate the ELBO and log p(x) of a run on its held-out data; nothing is trained.

    Args:
        run: the run folder.
        num_particles: draws K of z for each example.
        estimator: a second estimate of log p(x) beside importance sampling: annealing (AIS; slow, tight), quadrature
            (one or two latent dimensions) or enumeration (a discrete z), the last two exact.
        num_examples: how many held-out examples, from the first; default: all.
        num_chains: chains of each example, for annealing.
        num_temperatures: steps from the start to the posterior, for annealing.
        leapfrog_steps: steps of each Hamiltonian trajectory, for annealing.
        from_encoder: start the annealing at q(z | x) instead of the prior.
        diagnostics: also look for collapse, and measure mutual information, gaps and calibration, with pictures.
        seed: seed of the draws.
        device: where to compute; auto takes a GPU if there is one.
        json: print one JSON object instead of lines to read.
    """
    config, data, vae = open_run(train, run, device)
    _take(data, num_examples)
    settings = num_chains, num_temperatures, leapfrog_steps, from_encoder
    further = _further(estimator, seed, *settings)
    result, estimates = _evaluate(vae, data, num_particles, seed, quiet=json, further=further)
    if diagnostics:
        note = (lambda line: None) if json else print
        figures = Path(run) / "figures"
        result["diagnostics"] = evaluation.diagnose(vae, data, figures, num_particles, seed=seed, note=note)
    values = {estimate.name: estimate.values.contiguous().cpu() for estimate in estimates}
    write_atomically(Path(run) / "evaluation.safetensors", save_tensors(values))
    write_atomically(Path(run) / "evaluation.json", _json(result))
    report.write_report(Path(run), title=_title(config, data))
    if json:
        print(_json(result), end="")


def compare(
    runs: list[str],
    num_particles: int = 1000,
    estimator: Literal["importance", "annealing", "quadrature", "enumeration"] = "importance",
    num_examples: int | None = None,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    leapfrog_steps: int = 10,
    from_encoder: bool = False,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> None:
    """Compare runs on their common held-out data: differences to the first, paired over the examples.

    Args:
        runs: the run folders, two or more.
        num_particles: draws K of z for each example.
        estimator: a second estimate of log p(x) beside importance sampling, see pyro-vae evaluate --help.
        num_examples: how many held-out examples, from the first; default: all.
        num_chains: chains of each example, for annealing.
        num_temperatures: steps from the start to the posterior, for annealing.
        leapfrog_steps: steps of each Hamiltonian trajectory, for annealing.
        from_encoder: start the annealing at q(z | x) instead of the prior.
        seed: seed of the draws.
        device: where to compute; auto takes a GPU if there is one.
        json: print one JSON object instead of lines to read.
    """
    names = list(dict.fromkeys(runs))
    if len(names) < 2:
        raise UsageError(f"expected two different runs or more, found {' '.join(names)}: pyro-vae compare RUN RUN ...")
    further = _further(estimator, seed, num_chains, num_temperatures, leapfrog_steps, from_encoder)
    opened: dict[str, tuple[Any, VAE]] = {}
    for run in names:  # first all, so that a mistake is told before anything is computed
        _, data, vae = open_run(train, run, device)
        _take(data, num_examples)
        first = next(iter(opened.values()), (data, vae))[0]
        if data.policy != first.policy or not torch.equal(data.test, first.test):
            raise UsageError(
                f"expected runs of one data policy, found {first.policy!r} in {names[0]} and {data.policy!r} in {run}: "
                "numbers about different data cannot be compared; train both on one data set, binarisation and seed."
            )
        opened[run] = data, vae
    found: dict[str, dict[str, Estimate]] = {}
    for run, (data, vae) in opened.items():
        _, estimates = _evaluate(vae, data, num_particles, seed, quiet=True, further=further)
        found[run] = {estimate.name: estimate for estimate in estimates}
    rows = evaluation.differences(found)
    if json:
        result = {
            "policy": first.policy,
            "seed": seed,
            "runs": {run: [estimate.summary() for estimate in by_name.values()] for run, by_name in found.items()},
            "differences": [
                {"run": run, "against": against, "name": row.name, "mean": row.mean, "units": row.units}
                | {"standard_error": None if row.standard_error != row.standard_error else row.standard_error}
                for run, against, row in rows
            ],
        }
        print(_json(result), end="")
        return
    print(f"held-out   {first.policy}")
    for run, by_name in found.items():
        print(run)
        for name, estimate in by_name.items():
            print(f"  {name:22} {estimate}")
        for line in filter(None, (estimate.warning for estimate in by_name.values())):
            print(f"  warning: {line}")
        if any(other == run for other, _, _ in rows):
            print(f"  less {names[0]}:")
        for other, _, row in rows:
            if other == run:
                print(f"    {row.name:20} {row}")


def sample(
    run: str,
    num: int = 64,
    out: str | None = None,
    seed: int = 0,
    mean: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Draw examples from the prior of a run: z ~ p(z), then x.

    Args:
        run: the run folder.
        num: how many.
        out: a picture (.png), a table (.csv) or an array (.npy); default: samples.png, samples.csv for a table with
            named columns, samples.npy for other rows, in the run folder.
        seed: seed of the draws.
        mean: show the mean of p(x | z) instead of a draw from it.
        device: where to compute; auto takes a GPU if there is one.
    """
    if num < 1:
        raise UsageError(f"--num: expected a number >= 1, found {num}.")
    _, data, vae = open_run(train, run, device)
    with untouched(vae, seed):
        p = vae.decode(vae.prior().sample((num,)))
        if not mean and not is_normalised(p):
            raise UsageError(f"expected a likelihood to draw x from, found a score ({NO_LIKELIHOOD}): use --mean true.")
        x = p.mean if mean else p.sample()
    _write_x(x, data, Path(out) if out else Path(run) / "samples", f"{num} {'means' if mean else 'draws'} of p(x | z)")


def reconstruct(
    run: str,
    index: int | list[int] | None = None,
    num: int = 10,
    out: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Show held-out examples above their reconstructions, the mean of p(x | z) at the posterior mean.

    Args:
        run: the run folder.
        index: which held-out examples, for example 3 or [1, 3, 7]; default: the first ones.
        num: how many, where no index is given.
        out: a picture (.png), a table (.csv) or an array (.npy); default: reconstructions.png in the run folder.
        device: where to compute; auto takes a GPU if there is one.
    """
    if num < 1:
        raise UsageError(f"--num: expected a number >= 1, found {num}.")
    _, data, vae = open_run(train, run, device)
    rows = list(range(min(num, len(data.test)))) if index is None else [index] if isinstance(index, int) else index
    bad = [i for i in rows if not 0 <= i < len(data.test)]
    if bad or not rows:
        raise UsageError(f"expected indices 0..{len(data.test) - 1} of held-out examples, found {bad or rows}.")
    x = data.test[rows]
    with untouched(vae):
        x_hat = vae.reconstruct(x)
    path = Path(out) if out else Path(run) / "reconstructions"
    _write_x(x_hat, data, path, "reconstructions", originals=x)


def wrong_loss(
    loss: str | list[str] | None = None,
    data: Literal["Digits", "MNIST", "FashionMNIST"] = "Digits",
    root: str = "data",
    epochs: int = 60,
    latent_dim: int = 2,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    out: str = "runs/wrong-loss",
    json: bool = False,
) -> None:
    """Train the right loss and the wrong ones of well-known posts on the same data, and show what becomes of each.

    A table of the noise that is left, the KL, reconstructions and samples, and a picture of them. Without arguments:
    every loss, on the embedded digits, in some minutes.

    Args:
        loss: which losses beside the right one, for example AveragedKL or [AveragedKL,EntropyDropped]; default: all.
        data: the data set.
        root: folder with MNIST/raw or FashionMNIST/raw; downloaded there if missing.
        epochs: passes over the training data.
        latent_dim: number of latent dimensions D.
        batch_size: examples a step.
        lr: learning rate.
        seed: seed of the first weights, the order of the data and the draws: the same for each loss.
        out: the folder for table and pictures.
        json: print one JSON object instead of lines to read.
    """
    from pyro_vae import wrong_loss_lab as lab

    names = [loss] if isinstance(loss, str) else list(lab.OBJECTIVES) if loss is None else loss
    unknown = [name for name in names if name not in lab.OBJECTIVES]
    if unknown:
        raise UsageError(f"unknown loss {unknown[0]!r}: choose from {', '.join(lab.OBJECTIVES)}.")
    for name, value in (("epochs", epochs), ("latent_dim", latent_dim), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"--{name}: expected a number >= 1, found {value}.")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"expected --out to name a folder, found the file {folder}: choose another --out.")
    source = datasets.Digits() if data == "Digits" else getattr(datasets, data)(root, binarization="grey")
    pictures = lab.grey_pictures(source)
    objectives = {name: lab.OBJECTIVES[name] for name in dict.fromkeys([lab.RIGHT, *names])}
    if not json:
        print(conventions(batch_size, pictures.x.shape[1], latent_dim), lab.explanations(objectives), sep="\n\n")
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    results = lab.run(pictures, objectives, latent_dim=latent_dim, **settings, progress=True)
    text = lab.table(results, pictures)
    rows = {"policy": pictures.policy, "units": "nats per example", "latent_dim": latent_dim, **settings}
    numbers = _json({**rows, "results": [result.summary() for result in results]})
    write_atomically(folder / "table.txt", text + "\n")
    write_atomically(folder / "results.json", numbers)
    print(numbers if json else f"\n{text}\n", end="")
    for name, figure in lab.draw_figures(results, pictures).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        write_atomically(folder / f"{name}.png", buffer.getvalue())
        if not json:
            print(f"wrote      {folder / f'{name}.png'}")


def summary(run: str) -> None:
    """Print the layers of encoder, z and decoder: shapes and numbers of parameters.

    Args:
        run: a run folder, or the name of a preset such as seed001.
    """
    if run in presets.PRESETS and not Path(run).exists():
        vae, event_shape = presets.make(run), presets.image_shape(run)
    else:
        _, data, vae = open_run(train, run, "cpu")
        event_shape = tuple(data.test.shape[1:])
    print(architecture.summary(vae, event_shape))


def derive(
    run: str | None = None,
    num_particles: int = 1000,
    num_examples: int = 10,
    out: str | None = None,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> None:
    """Derive the ELBO line by line and check each line: in exactly solvable worlds, or on a run.

    Without a run: a z of ten states with random tables, and the linear-Gaussian model, where each line holds to
    rounding. With one: its held-out data, each side with its standard error; derivation.html and derivation.png go into
    its folder. The exit code is 1 if a line disagrees.

    Args:
        run: the run folder; default: the exact worlds.
        num_particles: draws K of z for each example of a run.
        num_examples: how many held-out examples of a run, from the first.
        out: a folder for the page and the picture; default: the run folder, or none.
        seed: seed of the tables or draws.
        device: where to compute; auto takes a GPU if there is one.
        json: print one JSON object instead of lines to read.
    """
    if num_examples < 1:
        raise UsageError(f"--num_examples: expected a number >= 1, found {num_examples}.")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed: expected a number from 0 to 2**63 - 1, found {seed}.")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UsageError(f"expected --out to name a folder, found the file {out}: choose another --out.")
    if run is None:
        derivations = [derivation.evaluate_in(world) for world in derivation.exact_worlds(seed)]
    else:
        _, data, vae = open_run(train, run, device)
        x = data.test[:num_examples]
        name = Path(run).resolve().name
        derivations = [derivation.evaluate(vae, x, num_particles, seed=seed, name=name, policy=data.policy)]
    verdict = "; ".join(each.verdict for each in derivations)
    if json:
        agrees = all(each.agrees for each in derivations)
        print(_json({"derivations": [each.to_dict() for each in derivations], "agrees": agrees}), end="")
    else:
        print("\n\n".join(map(str, derivations)) + "\n")
    folder = out if out is not None else run
    for path in write_derivation(derivations, folder) if folder is not None else []:
        print(f"wrote      {path}", file=sys.stderr if json else sys.stdout)
    if not json:
        print(f"verdict    {verdict}")
    if not all(each.agrees for each in derivations):
        sys.stdout.flush()
        raise SystemExit(1)


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
    folder = Path(out) if out else _fresh_folder()
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
        print(_json(found.summary()), end="")
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
            write_atomically(path, _json(known))


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


def members(
    part: Literal["prior", "likelihood", "encoder", "networks", "objective"] | None = None, markdown: bool = False
) -> None:
    """List what can be swapped in: every prior, likelihood, posterior, pair of networks and objective.

    Args:
        part: list this part only.
        markdown: all of them as a page of tables with formulas and sources.
    """
    if markdown:
        print(catalogue.markdown(), end="")
        return
    print("\n\n".join(catalogue.text(name) for name in ([part] if part else catalogue.TITLES)))
    print("\nThe arguments of one: pyro-vae train --prior.help NAME (or --likelihood.help, --encoder.help, ...).")


def bench(
    workloads: list[str] | None = None,
    repeats: int = 7,
    threads: int | None = None,
    out: str | None = None,
    quick: bool = False,
    json: bool = False,
) -> None:
    """Measure how fast a training step is on this machine: stock Pyro, hand-written torch, torch.compile, and FastSVI.

    On random binary data, so nothing is downloaded. The ways take turns; ratios are of one round each. The floor is
    the time of the step's matrix products and of the optimiser's pass over the parameters alone.

    Args:
        workloads: which sizes: W1, W1b, Wk, Wc, tiny, iwae; default: all.
        repeats: rounds.
        threads: threads of torch; default: as many as torch takes.
        out: a folder for bench.json and the picture bench.png.
        quick: the tiny sizes only, two short rounds.
        json: print one JSON object instead of lines to read.
    """
    from pyro_vae import bench as benchmark

    names = (["tiny"] if quick else list(benchmark.WORKLOADS)) if workloads is None else workloads
    unknown = [name for name in names if name not in benchmark.WORKLOADS]
    if unknown:
        raise UsageError(f"unknown workload {unknown[0]!r}: choose from {', '.join(benchmark.WORKLOADS)}.")
    for name, value in (("repeats", repeats), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise UsageError(f"--{name}: expected a number >= 1, found {value}.")
    folder = Path(out) if out else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"expected --out to name a folder, found the file {folder}: choose another --out.")

    def told(text: str) -> None:
        if not json:
            print(text, end="\n\n", flush=True)

    result = benchmark.bench(names, 2 if quick else repeats, 0.02 if quick else 0.3, threads, told)
    if folder is not None:
        write_atomically(folder / "bench.json", _json(result))
        picture = io.BytesIO()
        ax = benchmark.speed_bars({name: one["ratios"] for name, one in result["workloads"].items()})
        ax.get_figure(root=True).savefig(picture, format="png", dpi=150, bbox_inches="tight")  # type: ignore[union-attr]
        write_atomically(folder / "bench.png", picture.getvalue())
    if json:
        print(_json(result), end="")
        return
    machine = result["machine"]
    print(
        f"{machine['processor']}, {machine['accelerator'] or 'no GPU'}, {machine['threads']} threads, load before "
        f"{machine['load']}; torch {machine['torch']}, pyro-ppl {machine['pyro-ppl']}; "
        f"at most {result['peak_memory'] / 2**20:.0f} MiB of memory"
    )
    if folder is not None:
        print(f"wrote      {folder / 'bench.json'}\nwrote      {folder / 'bench.png'}")


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "reconstruct": reconstruct,
    "resume": resume,
    "summary": summary,
    "wrong-loss": wrong_loss,
    "compare": compare,
    "derive": derive,
    "sweep": sweep,
    "members": members,
    "bench": bench,
}


FLAGS = {  # arguments without a value
    "json": "Print one JSON object instead of lines to read.",
    "markdown": "Print all as tables in Markdown.",
    "quick": "The tiny sizes only, two short rounds.",
}


def _fresh_folder() -> Path:
    stem = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{i}" for i in range(2, 1000))]:
        folder = Path("runs") / f"{stem}{suffix}"
        if not folder.exists():
            return folder
    raise UsageError("expected a free name under runs/, found none: choose one with --out.")


def _new_folder(out: str | None) -> Path:
    folder = Path(out) if out else _fresh_folder()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"expected --out to name a folder, found the file {folder}: choose another --out.")
    if (folder / "config.yaml").exists():
        raise UsageError(
            f"{folder} already holds a run, expected a fresh folder: choose another --out, or: pyro-vae resume {folder}"
        )
    return folder


@contextmanager
def _quiet_unless_first(workers: Workers) -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, nullcontext() if workers.is_first else redirect_stdout(nowhere):
        yield


def _build(config: Namespace, workers: Workers, trained: bool = False) -> tuple[Any, VAE]:
    """The first worker before the others: a data set may have to be fetched, once."""
    built = build(config, trained) if workers.is_first else None
    workers.from_first(lambda: None)
    return built or build(config, trained)


def _fit(config: Namespace, vae: VAE, data: Any, folder: Path, resume: bool, workers: Workers) -> History:
    objective = make(config, "objective", num_examples=len(data.train))
    optimizer = None
    if config.optimizer is not None:
        optimizer = lambda params: make(config, "optimizer", params=params, lr=config.lr)  # noqa: E731
    count = sum(p.numel() for p in vae.parameters())
    device = next(vae.parameters()).device
    name = repr(objective) if isinstance(objective, Objective) else f"pyro.infer.{type(objective).__name__}"
    print(f"data       {data.policy}")
    if workers.size > 1 and getattr(objective, "mixes_examples", False):
        name += ", estimated by each process from its part of a batch"
    shared = "" if workers.size == 1 else f", each batch shared by {workers.size} processes"
    print(f"model      {_describe(vae)}; {count:,} parameters on {device}{shared}")
    print(f"objective  {name}" + ("" if resume is False else f"; going on with {folder}"), flush=True)

    with untouched(vae, 0):  # a score in the place of a likelihood leaves no bound
        bound, fit_of_x = ("ELBO", "log p(x|z)") if _has_likelihood(vae) else ("score - KL", "score")

    def line(row: dict[str, Any]) -> None:
        tqdm.write(
            f"epoch {row['epoch']:>{len(str(config.epochs))}}/{config.epochs}  objective {row['objective']:9.2f}  "
            f"{bound} {row['elbo']:9.2f}  {fit_of_x} {row['log_px']:9.2f}  KL {row['kl']:6.2f}  "
            f"held-out {bound} {row['valid_elbo']:9.2f} ± {row['valid_elbo_se']:.2f}  "
            f"nats per example  {row['seconds']:.2f} s"
        )

    try:
        return fit(
            vae,
            data.train,
            objective=objective,
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            optimizer=optimizer,
            prepare=data.prepare,
            x_valid=data.test,
            folder=folder,
            resume=resume,
            on_epoch=line,
            progress=True,
            compiled=config.compiled,
            resident=config.resident,
            workers=workers,
        )
    except KeyboardInterrupt:
        if workers.is_first:
            _stopped(folder, workers)
        raise SystemExit(130) from None
    except WorkerLost as error:
        _stopped(folder, workers, str(error))
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        how = config.optimizer.class_path if config.optimizer else "Adam"
        raise UsageError(
            f"training with {name} and {how} failed ({reason}): "
            "choose another objective, optimiser or part; in Python, pyro_vae.fit shows where."
        ) from error


def _stopped(folder: Path, workers: Workers, why: str = "stopped") -> NoReturn:
    again = "pyro-vae" if workers.size == 1 else f"torchrun --nproc-per-node={workers.size} -m pyro_vae"
    print(f"\npyro-vae: {why}; go on with: {again} resume {shlex.quote(str(folder))}", file=sys.stderr)
    raise SystemExit(130)


def _check_density(vae: VAE, data: Any) -> None:
    """A density on {0, 1} grows without bound: its nats mean nothing."""
    if getattr(data, "natural_likelihood", (None,))[0] != "Bernoulli":
        return
    with untouched(vae, 0):
        support = vae.decoder(vae.prior().sample((1,))).support
    if not getattr(support, "is_discrete", True):
        raise UsageError(
            f"x is binary ({data.policy}), expected a likelihood of {{0, 1}}, found a density: "
            "use --likelihood Bernoulli, or grey values where the data set has them (--data.binarization grey)."
        )


def _make_paths_absolute(config: Namespace) -> None:
    """So that the run can be evaluated from any folder."""
    arguments = config.data.get("init_args") or Namespace()
    for key in ("root", "path"):
        if isinstance(arguments.get(key), str):
            arguments[key] = str(Path(arguments[key]).resolve())


def _finish(config: Namespace, vae: VAE, data: Any, folder: Path, history: History) -> None:
    """What comes after training: the evaluation, the pictures, the page."""
    try:
        _evaluate_and_draw(config, vae, data, folder, history)
    except KeyboardInterrupt:
        _stopped(folder, Workers())


def _evaluate_and_draw(config: Namespace, vae: VAE, data: Any, folder: Path, history: History) -> None:
    print(f"evaluating {len(data.test)} held-out examples ...", flush=True)
    result, _ = _evaluate(vae, data, config.eval_particles, seed=0)
    write_atomically(folder / "evaluation.json", _json(result))
    if config.figures:
        report.write_figures(vae, data, history, folder / "figures")
    page = report.write_report(folder, title=_title(config, data))
    print(f"wrote      {folder}")
    print(f"look at    {page}")
    quoted = shlex.quote(str(folder))
    print(f"next       pyro-vae evaluate {quoted} --num_particles 5000")
    print(f"           pyro-vae sample {quoted}")


def _take(data: Any, num_examples: int | None) -> None:
    """Keep the first held-out examples only, and say so in the data policy."""
    if num_examples is None or num_examples >= len(data.test):
        return
    if num_examples < 1:
        raise UsageError(f"--num_examples: expected a number >= 1, found {num_examples}.")
    data.test = data.test[:num_examples]
    data.test_labels = None if data.test_labels is None else data.test_labels[:num_examples]
    data.policy += f"; the first {num_examples} held-out examples"


def _further(
    estimator: str, seed: int, num_chains: int, num_temperatures: int, leapfrog_steps: int, from_encoder: bool
) -> Callable[[VAE, Any], Estimate] | None:
    """The second estimate of log p(x) that was asked for."""
    if estimator == "annealing":

        def anneal(vae: VAE, data: Any) -> Estimate:
            settings = num_chains, num_temperatures, leapfrog_steps
            return annealed_log_evidence(
                vae, data.test, *settings, from_encoder=from_encoder, seed=seed, policy=data.policy
            )

        return anneal
    if estimator == "importance":
        return None

    def exactly(vae: VAE, data: Any) -> Estimate:
        exact = evaluation.quadrature if estimator == "quadrature" else evaluation.enumeration
        return exact(vae, data.test, data.policy)

    return exactly


def _evaluate(
    vae: VAE,
    data: Any,
    num_particles: int,
    seed: int,
    quiet: bool = False,
    further: Callable[[VAE, Any], Estimate] | None = None,
) -> tuple[dict[str, Any], list[Estimate]]:
    estimate = further(vae, data) if further is not None else None  # first: it may refuse
    terms = elbo_terms(vae, data.test, num_particles, seed=seed, policy=data.policy)
    estimates = list(terms.values())
    if terms["elbo"].name == "ELBO":  # with a point-mass posterior there is none, and no log p(x) either
        estimates.append(log_evidence(vae, data.test, num_particles, seed=seed, policy=data.policy))
        estimates += _summed_over_z(vae, data)
        if estimate is not None:
            method = "annealed" if estimate.num_particles else "exact"
            estimates = [e for e in estimates if e.name != f"log p(x), {method}"]
            estimates.append(dataclasses.replace(estimate, name=f"log p(x), {method}"))
        if _is_levels(vae) and not bool(data.test.isnan().any()):
            estimates.append(estimates[-1].bits_per_dim(data.test[0].numel()))
    try:
        active = active_units(vae, data.test)
    except NotImplementedError:  # a posterior whose mean has no formula
        active = None
    result: dict[str, Any] = {
        "policy": data.policy,
        "seed": seed,
        "estimates": [estimate.summary() for estimate in estimates],
        "active_units": None if active is None else int(active.sum()),
        "latent_dim": None if active is None else len(active),
    }
    if not quiet:
        print(f"held-out   {data.policy}")
        for estimate in estimates:
            bound = "  (IWAE bound, from below)" if estimate.name == "log p(x)" else ""
            print(f"  {estimate.name:18} {estimate}{bound}")
            if estimate.name.startswith("log p(x)") and len(estimate.values) > 1 and estimate.num_particles > 1:
                parts = f"{estimate.data_error:.2g} from the data, {estimate.monte_carlo_error:.2g} from the draws"
                print(
                    f"  {'':18} error: {parts}; smallest ESS {estimate.summary()['smallest_effective_sample_size']:.1f}"
                )
        if active is not None:
            print(f"  {'active units':18} {int(active.sum())} of {len(active)} (Var_x E[z|x] > 0.01)")
        for line in filter(None, (estimate.warning for estimate in estimates)):
            print(f"  warning: {line}")
    return result, estimates


def _summed_over_z(vae: VAE, data: Any) -> list[Estimate]:
    """The exact log p(x), where z is discrete with few enough values."""
    with untouched(vae):
        if not is_discrete(vae.prior()):
            return []
    try:
        values = log_evidence_by_enumeration(vae, data.test)
    except ValueError:  # too many
        return []
    return [Estimate("log p(x), exact", values, 0, data.policy, torch.zeros_like(values))]


def _has_likelihood(vae: VAE) -> bool:
    return is_normalised(vae.decoder(vae.prior().sample((1,))))


def _is_levels(vae: VAE) -> bool:
    """Whether x is made of levels 0..L-1, L > 2, such as bytes: then bits per dimension compare across models."""
    with untouched(vae, 0):
        support: Any = vae.decoder(vae.prior().sample((1,))).support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    top = getattr(support, "upper_bound", None)
    return bool(support.is_discrete) and top is not None and float(torch.as_tensor(top).max()) > 1


def _describe(vae: VAE) -> str:
    likelihood = getattr(vae.decoder, "likelihood", vae.decoder)
    inside = getattr(likelihood, "likelihood", None)  # Masked(MixedColumns)
    name = type(likelihood).__name__ + (f"({type(inside).__name__})" if inside is not None else "")
    return (
        f"p(z) {type(vae.prior).__name__}, p(x|z) {name}, q(z|x) {type(vae.encoder).__name__}, "
        f"latent_dim {vae.prior().event_shape[0]}"
    )


def _title(config: Namespace, data: Any) -> str:
    names = [config[part].class_path.rsplit(".", 1)[-1] for part in ("prior", "likelihood", "encoder", "objective")]
    return f"{data.name}: " + ", ".join(names)


def _json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"


def _write_x(x: Tensor, data: Any, path: Path, title: str, originals: Tensor | None = None) -> None:
    """Write examples as a picture where they are images, as CSV where they are rows of one, as an array on demand."""
    image, table = x.dim() == 4 and x.shape[1] in (1, 3), hasattr(data, "csv")
    kinds = [".png"] * image + [".csv"] * table + [".npy"]
    path = path if path.suffix else path.with_suffix(kinds[0])
    if path.suffix not in kinds:
        why = "" if image else " (these examples are no images)"
        raise UsageError(f"expected --out to end in {' or '.join(kinds)}{why}, found {path.name}.")
    buffer = io.BytesIO()
    if path.suffix == ".csv":
        buffer.write(data.csv(x).encode("utf-8"))
    elif path.suffix == ".npy":
        np.save(buffer, x.cpu().numpy(), allow_pickle=False)
    else:
        value_range = (0.0, max(1.0, float(data.test.nan_to_num(nan=0.0).max())))
        if originals is None:
            ax = plots.image_grid(x.cpu(), value_range=value_range, title=title)
        else:
            ax = plots.reconstructions(originals.cpu(), x.cpu(), value_range=value_range)
        figure = ax.get_figure(root=True)
        assert figure is not None
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    write_atomically(path, buffer.getvalue())
    print(f"wrote      {path}")


def _parse(argv: Sequence[str]) -> tuple[str, Namespace]:
    top = f"""pyro-vae {pyro_vae.__version__}: variational autoencoders as two short Pyro programs.

usage: pyro-vae COMMAND [ARGUMENTS]

commands:
""" + "".join(f"  {name:12} {description(command).splitlines()[0]}\n" for name, command in COMMANDS.items())
    top += """
pyro-vae COMMAND --help explains one. To begin:

  pyro-vae train
  pyro-vae train --prior MixtureOfNormals --prior.num_components 10 --objective IWAE --objective.num_particles 50
  pyro-vae train --data MNIST --data.root DIR --latent_dim 50 --epochs 20
  pyro-vae train --preset seed001 --data.root DIR
"""
    if not argv or argv[0] in ("-h", "--help"):
        print(top, end="")
        raise SystemExit(0)
    if argv[0] == "--version":
        print(pyro_vae.__version__)
        raise SystemExit(0)
    name, rest = argv[0], list(argv[1:])
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}.")
    if name == "sweep":
        return name, _parse_sweep(rest)
    if name == "train":
        parser = train_parser(train, rest)
    else:
        command = COMMANDS[name]
        parser = Parser(prog=f"pyro-vae {name}", description=description(command), formatter_class=Formatter)
        optional_run = inspect.signature(command).parameters.get("run", inspect.Parameter).default is None
        skip: set[str | int] = {"runs", "workloads", *FLAGS, *(["run"] if optional_run else [])}
        parser.add_function_arguments(command, as_positional=True, skip=skip)
        if optional_run:
            parser.add_argument("run", nargs="?", help="The run folder.")
        if "runs" in inspect.signature(command).parameters:
            parser.add_argument("runs", nargs="+", help="The run folders, two or more.")
        if "workloads" in inspect.signature(command).parameters:
            parser.add_argument("--workloads", nargs="+", help="Which: W1, W1b, Wk, Wc, tiny, iwae; default: all.")
        for flag in FLAGS.keys() & inspect.signature(command).parameters.keys():
            parser.add_argument(f"--{flag}", action="store_true", help=FLAGS[flag])
    return name, parser.parse(rest)


def _parse_sweep(argv: Sequence[str]) -> Namespace:
    """The sweep's own arguments; what is left is for ``train``."""
    own: list[str] = []
    words: list[str] = []
    names = [f"--{name}" for name in inspect.signature(sweep).parameters if name != "words"]
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name = word.split("=", 1)[0]
        if name in ("-h", "--help") or name in names:
            own.append("--vary+=" + word.split("=", 1)[1] if name == "--vary" and "=" in word else word)
            if name == "--vary" and "=" not in word:
                own[-1] = f"--vary+={rest.pop(0)}" if rest else "--vary+="
            elif name in names and name != "--json" and "=" not in word and rest:
                own.append(rest.pop(0))
        else:
            words.append(word)
    parser = Parser(prog="pyro-vae sweep", description=description(sweep), formatter_class=Formatter)
    parser.add_function_arguments(sweep, skip={"words", "json"}, as_positional=False)
    parser.add_argument("--json", action="store_true", help=FLAGS["json"])
    if not own or not any(word in ("-h", "--help") or word.startswith("--vary") for word in own):
        raise UsageError("--vary: expected an argument and its values, found none: --vary latent_dim=2,5,10.")
    found = parser.parse(own)
    return Namespace(**vars(found), words=words)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; mistakes are told in one line and end with exit code 2.

    Args:
        argv: the words after ``pyro-vae``; those of this process by default.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that --prior mine.MyPrior finds mine.py here
    try:
        name, arguments = _parse(list(sys.argv[1:] if argv is None else argv))
        if name == "train":
            options = {key: arguments[key] for key in inspect.signature(train).parameters if key != "config"}
            train(config=arguments, **options)
        else:
            COMMANDS[name](**vars(arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except WorkerLost as error:
        print(f"pyro-vae: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("pyro-vae: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        known = error.errno is not None and error.filename is not None
        _fail(f"cannot use {error.filename} ({error.strerror}): choose another path." if known else str(error))
    except (UsageError, ArgumentError, ValueError, TypeError, ImportError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"pyro-vae: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)
