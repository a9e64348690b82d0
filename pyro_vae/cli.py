"""The command line: five commands, made from the signatures and docstrings below."""

import inspect
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from jsonargparse import ArgumentError, Namespace
from torch import Tensor
from tqdm import tqdm

import pyro_vae
from pyro_vae import plots, report
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
from pyro_vae.contracts import untouched
from pyro_vae.diagnostics import active_units
from pyro_vae.estimates import elbo_terms, log_evidence
from pyro_vae.objectives import Objective
from pyro_vae.training import History, fit
from pyro_vae.vae import VAE


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
    standardize: bool = True,
    eval_particles: int = 500,
    compiled: bool = False,
    figures: bool = True,
) -> None:
    """Train a VAE, evaluate it on held-out data, draw its pictures.

    Without arguments: the handwritten digits that scikit-learn carries, a two-dimensional z, under a minute on a
    laptop. Every part is swapped by class name with its arguments, for example --prior MixtureOfNormals
    --prior.num_components 10, or by the dotted path of a class of your own. --prior.help CLASS explains one.

    Args:
        config: the parsed configuration.
        out: the run folder; a fresh one under runs/ by default.
        latent_dim: number of latent dimensions D.
        epochs: passes over the training data.
        batch_size: examples a step.
        lr: learning rate.
        seed: seed of the initial weights, the shuffling and the draws of z.
        device: where to compute; auto takes a GPU if there is one.
        start_at_data: start the decoder's output bias at the data's mean.
        standardize: give the encoder's network inputs of mean 0 and standard deviation 1 (one number for all of x).
        eval_particles: draws K of z for each held-out example in the estimate of log p(x).
        compiled: capture and compile the training step: faster epochs after some seconds of compilation.
        figures: draw the pictures.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("eval_particles", eval_particles)):
        if value < 1:
            raise UsageError(f"--{name}: expected a number >= 1, found {value}.")
    if not 0 < lr < float("inf"):
        raise UsageError(f"--lr: expected a number > 0, found {lr}.")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed: expected a number from 0 to 2**63 - 1, found {seed}.")
    folder = Path(out) if out else _fresh_folder()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"expected --out to name a folder, found the file {folder}: choose another --out.")
    if (folder / "config.yaml").exists():
        raise UsageError(
            f"{folder} already holds a run, expected a fresh folder: choose another --out, or: pyro-vae resume {folder}"
        )
    data, vae = build(config)
    _check_density(vae, data)
    _make_paths_absolute(config)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    write_atomically(folder / "config.yaml", dump(train, config))
    try:
        history = _fit(config, vae, data, folder, resume=False)
    except Exception:
        if not (folder / "state").exists():  # refused before the first epoch: leave nothing behind
            (folder / "config.yaml").unlink()
            for path in new:
                path.rmdir()
        raise
    _finish(config, vae, data, folder, history)


def resume(run: str, epochs: int | None = None, device: Literal["auto", "cpu", "cuda"] | None = None) -> None:
    """Go on with a run that was stopped or killed, as if it had never been: bit for bit on the same machine.

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
    remove_leftovers(folder)
    data, vae = build(config, trained=started)
    history = _fit(config, vae, data, folder, resume=started)
    write_atomically(folder / "config.yaml", dump(train, config))
    _finish(config, vae, data, folder, history)


def evaluate(
    run: str,
    num_particles: int = 1000,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> None:
    """Estimate the ELBO and log p(x) of a run on its held-out data; nothing is trained.

    Args:
        run: the run folder.
        num_particles: draws K of z for each example.
        seed: seed of the draws.
        device: where to compute; auto takes a GPU if there is one.
        json: print one JSON object instead of lines to read.
    """
    config, data, vae = open_run(train, run, device)
    result = _evaluate(vae, data, num_particles, seed, quiet=json)
    write_atomically(Path(run) / "evaluation.json", _json(result))
    report.write_report(Path(run), title=_title(config, data))
    if json:
        print(_json(result), end="")


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
        out: a picture (.png) or an array (.npy); default: samples.png in the run folder, samples.npy for tables.
        seed: seed of the draws.
        mean: show the mean of p(x | z) instead of a draw from it.
        device: where to compute; auto takes a GPU if there is one.
    """
    if num < 1:
        raise UsageError(f"--num: expected a number >= 1, found {num}.")
    _, data, vae = open_run(train, run, device)
    with untouched(vae, seed):
        p = vae.decode(vae.prior().sample((num,)))
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
        out: a picture (.png) or an array (.npy); default: reconstructions.png in the run folder.
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


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "reconstruct": reconstruct,
    "resume": resume,
}


def _fresh_folder() -> Path:
    stem = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{i}" for i in range(2, 1000))]:
        folder = Path("runs") / f"{stem}{suffix}"
        if not folder.exists():
            return folder
    raise UsageError("expected a free name under runs/, found none: choose one with --out.")


def _fit(config: Namespace, vae: VAE, data: Any, folder: Path, resume: bool) -> History:
    objective = make(config, "objective")
    optimizer = None
    if config.optimizer is not None:
        optimizer = lambda params: make(config, "optimizer", params=params, lr=config.lr)  # noqa: E731
    count = sum(p.numel() for p in vae.parameters())
    device = next(vae.parameters()).device
    name = repr(objective) if isinstance(objective, Objective) else f"pyro.infer.{type(objective).__name__}"
    print(f"data       {data.policy}")
    print(f"model      {_describe(vae)}; {count:,} parameters on {device}")
    print(f"objective  {name}" + ("" if resume is False else f"; going on with {folder}"), flush=True)

    def line(row: dict[str, Any]) -> None:
        tqdm.write(
            f"epoch {row['epoch']:>{len(str(config.epochs))}}/{config.epochs}  objective {row['objective']:9.2f}  "
            f"ELBO {row['elbo']:9.2f}  log p(x|z) {row['log_px']:9.2f}  KL {row['kl']:6.2f}  "
            f"held-out ELBO {row['valid_elbo']:9.2f} ± {row['valid_elbo_se']:.2f}  "
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
        )
    except KeyboardInterrupt:
        _stopped(folder)
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        how = config.optimizer.class_path if config.optimizer else "Adam"
        raise UsageError(
            f"training with {name} and {how} failed ({reason}): "
            "choose another objective, optimiser or part; in Python, pyro_vae.fit shows where."
        ) from error


def _stopped(folder: Path) -> NoReturn:
    print(f"\npyro-vae: stopped; go on with: pyro-vae resume {shlex.quote(str(folder))}", file=sys.stderr)
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
        _stopped(folder)


def _evaluate_and_draw(config: Namespace, vae: VAE, data: Any, folder: Path, history: History) -> None:
    print(f"evaluating {len(data.test)} held-out examples ...", flush=True)
    result = _evaluate(vae, data, config.eval_particles, seed=0)
    write_atomically(folder / "evaluation.json", _json(result))
    if config.figures:
        report.write_figures(vae, data, history, folder / "figures")
    page = report.write_report(folder, title=_title(config, data))
    print(f"wrote      {folder}")
    print(f"look at    {page}")
    quoted = shlex.quote(str(folder))
    print(f"next       pyro-vae evaluate {quoted} --num_particles 5000")
    print(f"           pyro-vae sample {quoted}")


def _evaluate(vae: VAE, data: Any, num_particles: int, seed: int, quiet: bool = False) -> dict[str, Any]:
    terms = elbo_terms(vae, data.test, num_particles, seed=seed, policy=data.policy)
    estimates = list(terms.values())
    if terms["elbo"].name == "ELBO":  # with a point-mass posterior there is none, and no log p(x) either
        estimates.append(log_evidence(vae, data.test, num_particles, seed=seed, policy=data.policy))
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
        if active is not None:
            print(f"  {'active units':18} {int(active.sum())} of {len(active)} (Var_x E[z|x] > 0.01)")
    return result


def _describe(vae: VAE) -> str:
    likelihood = getattr(vae.decoder, "likelihood", vae.decoder)
    return (
        f"p(z) {type(vae.prior).__name__}, p(x|z) {type(likelihood).__name__}, q(z|x) {type(vae.encoder).__name__}, "
        f"latent_dim {vae.prior().event_shape[0]}"
    )


def _title(config: Namespace, data: Any) -> str:
    names = [config[part].class_path.rsplit(".", 1)[-1] for part in ("prior", "likelihood", "encoder", "objective")]
    return f"{data.name}: " + ", ".join(names)


def _json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"


def _write_x(x: Tensor, data: Any, path: Path, title: str, originals: Tensor | None = None) -> None:
    """Write examples as a picture where they are images, as an array where they are not or where .npy is asked for."""
    image = x.dim() == 4 and x.shape[1] in (1, 3)
    path = path if path.suffix else path.with_suffix(".png" if image else ".npy")
    if path.suffix not in (".png", ".npy") or (path.suffix == ".png" and not image):
        kinds = ".png or .npy" if image else ".npy (these examples are no images)"
        raise UsageError(f"expected --out to end in {kinds}, found {path.name}.")
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, x.cpu().numpy(), allow_pickle=False)
    else:
        value_range = (0.0, max(1.0, float(data.test.max())))
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
    if name == "train":
        parser = train_parser(train, rest)
    else:
        command = COMMANDS[name]
        parser = Parser(prog=f"pyro-vae {name}", description=description(command), formatter_class=Formatter)
        parser.add_function_arguments(command, as_positional=True, skip={"json"})
        if "json" in inspect.signature(command).parameters:
            parser.add_argument("--json", action="store_true", help="Print one JSON object instead of lines to read.")
    return name, parser.parse(rest)


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
