"""The numbers of a run, as several commands print and store them."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import Namespace

from pyro_vae import (
    evaluation,
)
from pyro_vae.annealing import annealed_log_evidence
from pyro_vae.contracts import untouched
from pyro_vae.diagnostics import active_units
from pyro_vae.estimates import elbo_and_log_evidence, elbo_terms
from pyro_vae.exact import log_evidence_by_enumeration
from pyro_vae.parts import UsageError
from pyro_vae.supports import is_discrete
from pyro_vae.uncertainty import Estimate
from pyro_vae.vae import VAE


def take_first(data: Any, num_examples: int | None) -> None:
    """Keep the first held-out examples only, and say so in the data policy."""
    if num_examples is None or num_examples >= len(data.test):
        return
    if num_examples < 1:
        raise UsageError(f"--num_examples: expected a number >= 1, found {num_examples}.")
    data.test = data.test[:num_examples]
    data.test_labels = None if data.test_labels is None else data.test_labels[:num_examples]
    data.policy += f"; the first {num_examples} held-out examples"


def further_estimate(
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


def run_numbers(
    vae: VAE,
    data: Any,
    num_particles: int,
    seed: int,
    quiet: bool = False,
    further: Callable[[VAE, Any], Estimate] | None = None,
) -> tuple[dict[str, Any], list[Estimate]]:
    """ELBO, its terms and log p(x) on the held-out data, printed unless quiet, and as one dictionary."""
    estimate = further(vae, data) if further is not None else None  # first: it may refuse
    # With a point-mass posterior, or a score, there is no ELBO and no log p(x) either.
    is_bound = elbo_terms(vae, data.test[:1], seed=seed)["elbo"].name == "ELBO"
    both = elbo_and_log_evidence if is_bound else elbo_terms
    estimates = list(both(vae, data.test, num_particles, seed=seed, policy=data.policy).values())
    if is_bound:
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


def _is_levels(vae: VAE) -> bool:
    """Whether x is made of levels 0..L-1, L > 2, such as bytes: then bits per dimension compare across models."""
    with untouched(vae, 0):
        support: Any = vae.decoder(vae.prior().sample((1,))).support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    top = getattr(support, "upper_bound", None)
    return bool(support.is_discrete) and top is not None and float(torch.as_tensor(top).max()) > 1


def title_of(config: Namespace, data: Any) -> str:
    """Data set and parts of a run, for the head of its page."""
    names = [config[part].class_path.rsplit(".", 1)[-1] for part in ("prior", "likelihood", "encoder", "objective")]
    return f"{data.name}: " + ", ".join(names)


def to_json(result: dict[str, Any]) -> str:
    """A JSON object and a line's end."""
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"
