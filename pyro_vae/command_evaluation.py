"""``pyro-vae evaluate`` and ``pyro-vae compare``."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as save_tensors

from pyro_vae import (
    evaluation,
    report,
)
from pyro_vae.checkpoints import write_atomically
from pyro_vae.command_numbers import further_estimate, run_numbers, take_first, title_of, to_json
from pyro_vae.command_training import train
from pyro_vae.configuration import open_run
from pyro_vae.parts import UsageError
from pyro_vae.uncertainty import Estimate
from pyro_vae.vae import VAE


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
    take_first(data, num_examples)
    settings = num_chains, num_temperatures, leapfrog_steps, from_encoder
    further = further_estimate(estimator, seed, *settings)
    result, estimates = run_numbers(vae, data, num_particles, seed, quiet=json, further=further)
    if diagnostics:
        note = (lambda line: None) if json else print
        figures = Path(run) / "figures"
        result["diagnostics"] = evaluation.diagnose(vae, data, figures, num_particles, seed=seed, note=note)
    values = {estimate.name: estimate.values.contiguous().cpu() for estimate in estimates}
    write_atomically(Path(run) / "evaluation.safetensors", save_tensors(values))
    write_atomically(Path(run) / "evaluation.json", to_json(result))
    report.write_report(Path(run), title=title_of(config, data))
    if json:
        print(to_json(result), end="")


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
    further = further_estimate(estimator, seed, num_chains, num_temperatures, leapfrog_steps, from_encoder)
    opened: dict[str, tuple[Any, VAE]] = {}
    for run in names:  # first all, so that a mistake is told before anything is computed
        _, data, vae = open_run(train, run, device)
        take_first(data, num_examples)
        first = next(iter(opened.values()), (data, vae))[0]
        if data.policy != first.policy or not torch.equal(data.test, first.test):
            raise UsageError(
                f"expected runs of one data policy, found {first.policy!r} in {names[0]} and {data.policy!r} in {run}: "
                "numbers about different data cannot be compared; train both on one data set, binarisation and seed."
            )
        opened[run] = data, vae
    found: dict[str, dict[str, Estimate]] = {}
    for run, (data, vae) in opened.items():
        _, estimates = run_numbers(vae, data, num_particles, seed, quiet=True, further=further)
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
        print(to_json(result), end="")
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
