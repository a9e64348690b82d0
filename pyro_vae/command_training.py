"""``pyro-vae train`` and ``pyro-vae resume``."""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import Namespace
from tqdm import tqdm

from pyro_vae import parallel
from pyro_vae.arguments import dump, load_config
from pyro_vae.checkpoints import alone_in, remove_leftovers, write_atomically
from pyro_vae.command_numbers import run_numbers, title_of, to_json
from pyro_vae.configuration import build, make
from pyro_vae.contracts import untouched
from pyro_vae.figures import write_figures
from pyro_vae.objectives import Objective
from pyro_vae.parallel import WorkerLost, Workers
from pyro_vae.parts import UsageError
from pyro_vae.report import write_report
from pyro_vae.supports import is_normalised
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
    standardize: bool | float = True,
    init: Literal["torch", "he", "glorot", "normal"] = "torch",
    eval_particles: int = 500,
    compiled: bool | Literal["replay"] | None = None,
    precision: Literal["float32", "tf32", "bf16"] = "float32",
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
        compiled: capture and compile the training step (true: faster epochs after some seconds of compilation), capture
            it only (replay), or neither (false); null decides by the number of steps.
        precision: of the networks' products in training steps; tf32 (GPUs) and bf16 are rougher, and faster where the
            processor has them. Held-out numbers stay float32.
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
        with alone_in(folder) if workers.is_first else nullcontext():
            if workers.is_first:
                _new_folder(str(folder))  # another process may have begun a run there meanwhile
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
    state, metrics = folder / "state" / "latest.safetensors", folder / "metrics.jsonl"
    started = state.exists()  # else it was stopped in its first epoch
    if metrics.exists() and not started:
        raise UsageError(
            f"expected {state} beside {metrics}, found none: restore it, or train anew with pyro-vae train --config "
            f"{folder / 'config.yaml'}."
        )
    with (
        parallel.join(config.device) as workers,
        _quiet_unless_first(workers),
        alone_in(folder) if workers.is_first else nullcontext(),
    ):
        if workers.is_first:
            remove_leftovers(folder)
        data, vae = _build(config, workers, trained=started)
        history = _fit(config, vae, data, folder, resume=started, workers=workers)
    if workers.is_first:
        write_atomically(folder / "config.yaml", dump(train, config))
        _finish(config, vae, data, folder, history)


def fresh_folder() -> Path:
    """A new name under runs/, made of date and time."""
    stem = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{i}" for i in range(2, 1000))]:
        folder = Path("runs") / f"{stem}{suffix}"
        if not folder.exists():
            return folder
    raise UsageError("expected a free name under runs/, found none: choose one with --out.")


def _new_folder(out: str | None) -> Path:
    folder = Path(out) if out else fresh_folder()
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
            note=tqdm.write,
            compiled=config.compiled,
            precision=config.precision,
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
    result, _ = run_numbers(vae, data, config.eval_particles, seed=0)
    write_atomically(folder / "evaluation.json", to_json(result))
    if config.figures:
        objective_name = config.objective.class_path.rsplit(".", 1)[-1]
        write_figures(vae, data, history, folder / "figures", objective_name=objective_name)
    page = write_report(folder, title=title_of(config, data))
    print(f"wrote      {folder}")
    print(f"look at    {page}")
    quoted = shlex.quote(str(folder))
    print(f"next       pyro-vae evaluate {quoted} --num_particles 5000")
    print(f"           pyro-vae sample {quoted}")


def _has_likelihood(vae: VAE) -> bool:
    return is_normalised(vae.decoder(vae.prior().sample((1,))))


def _describe(vae: VAE) -> str:
    likelihood = getattr(vae.decoder, "likelihood", vae.decoder)
    inside = getattr(likelihood, "likelihood", None)  # Masked(MixedColumns)
    name = type(likelihood).__name__ + (f"({type(inside).__name__})" if inside is not None else "")
    return (
        f"p(z) {type(vae.prior).__name__}, p(x|z) {name}, q(z|x) {type(vae.encoder).__name__}, "
        f"latent_dim {vae.prior().event_shape[0]}"
    )
