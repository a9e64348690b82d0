"""Commands without a run of their own: ``wrong-loss``, ``derive``, ``summary``, ``members`` and ``bench``."""

import io
import sys
from pathlib import Path
from typing import Any, Literal

from pyro_vae import (
    architecture,
    catalogue,
    datasets,
    derivation,
    presets,
)
from pyro_vae.checkpoints import write_atomically
from pyro_vae.command_numbers import to_json
from pyro_vae.command_training import train
from pyro_vae.configuration import open_run
from pyro_vae.derivation_report import write_derivation
from pyro_vae.parts import UsageError
from pyro_vae.wrong_losses import conventions


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
    from pyro_vae.wrong_loss_plots import draw_figures

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
    numbers = to_json({**rows, "results": [result.summary() for result in results]})
    write_atomically(folder / "table.txt", text + "\n")
    write_atomically(folder / "results.json", numbers)
    print(numbers if json else f"\n{text}\n", end="")
    for name, figure in draw_figures(results, pictures).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        write_atomically(folder / f"{name}.png", buffer.getvalue())
        if not json:
            print(f"wrote      {folder / f'{name}.png'}")


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
        print(to_json({"derivations": [each.to_dict() for each in derivations], "agrees": agrees}), end="")
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
    the time of the step's matrix products and of the optimiser's pass over the parameters alone. NumPyro takes part
    where it is installed.

    Args:
        workloads: which sizes: W1, W1b, Wk, Wc, Wd, tiny, iwae; epoch (60,000 pictures), evaluation (log p(x));
            default: all.
        repeats: rounds.
        threads: threads of torch; default: as many as torch takes.
        out: a folder for bench.json and the picture bench.png.
        quick: the tiny sizes only, two short rounds.
        json: print one JSON object instead of lines to read.
    """
    from pyro_vae import bench as benchmark
    from pyro_vae.bench_epoch import bench_epoch
    from pyro_vae.bench_evaluation import bench_evaluation

    further = {"epoch": bench_epoch, "evaluation": bench_evaluation}
    known = [*benchmark.WORKLOADS, *further]
    names = (["tiny"] if quick else known) if workloads is None else workloads
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"unknown workload {unknown[0]!r}: choose from {', '.join(known)}.")
    for name, value in (("repeats", repeats), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise UsageError(f"--{name}: expected a number >= 1, found {value}.")
    folder = Path(out) if out else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"expected --out to name a folder, found the file {folder}: choose another --out.")

    def told(text: str) -> None:
        if not json:
            print(text, end="\n\n", flush=True)

    result = benchmark.bench(names, 2 if quick else repeats, 0.02 if quick else 0.3, threads, told, further)
    if folder is not None:
        write_atomically(folder / "bench.json", to_json(result))
        steps = {name: one["ratios"] for name, one in result["workloads"].items() if name not in further}
        if steps:
            picture = io.BytesIO()
            figure = benchmark.speed_bars(steps).get_figure(root=True)
            figure.savefig(picture, format="png", dpi=150, bbox_inches="tight")  # type: ignore[union-attr]
            write_atomically(folder / "bench.png", picture.getvalue())
    if json:
        print(to_json(result), end="")
        return
    machine = result["machine"]
    kept = ", freed memory kept" if machine["freed_memory_kept"] else ""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "pyro-ppl", "numpyro") if name in machine)
    print(
        f"{machine['processor']}, {machine['accelerator'] or 'no GPU'}, {machine['threads']} threads{kept}, "
        f"load before {machine['load']}; {versions}; at most {result['peak_memory'] / 2**20:.0f} MiB of memory"
    )
    if folder is not None:
        print(f"wrote      {folder / 'bench.json'}" + (f"\nwrote      {folder / 'bench.png'}" if steps else ""))
