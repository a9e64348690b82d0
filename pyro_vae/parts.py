"""The parts of a run and the classes that each can be: from a short name or a dotted path to a class.

With ``cli.py`` the only place where things are named by strings.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

import pyro.infer
import torch

from pyro_vae import (
    aggregate_objectives,
    datasets,
    discrete,
    encoders,
    files,
    flow_encoders,
    flow_priors,
    gradients,
    importance,
    likelihoods,
    mapped,
    networks,
    objectives,
    orthogonal_flows,
    pairs,
    priors,
    regularized,
    relaxed_priors,
    routes,
    spherical_encoders,
    sprites,
)
from pyro_vae.contracts import Encoder, Likelihood, Prior


class UsageError(Exception):
    """A mistake in what the user wrote: one line, exit code 2."""


# The parts of a run: what a class of the part derives from, and the modules where its short name is looked up.
PARTS: dict[str, tuple[type, tuple[Any, ...]]] = {
    "data": (datasets.DataSet, (datasets, files, mapped, sprites)),
    "prior": (Prior, (priors, flow_priors, relaxed_priors)),
    "likelihood": (Likelihood, (likelihoods,)),
    "encoder": (Encoder, (encoders, spherical_encoders, flow_encoders, orthogonal_flows, discrete)),
    "networks": (networks.NetworkPair, (networks, pairs)),
    "objective": (
        pyro.infer.ELBO,
        (objectives, routes, importance, gradients, regularized, aggregate_objectives, pyro.infer),
    ),
    "optimizer": (torch.optim.Optimizer, (torch.optim,)),
}
DEFAULTS = {
    "data": "pyro_vae.datasets.Digits",
    "prior": "pyro_vae.priors.StandardNormal",
    "encoder": "pyro_vae.encoders.DiagonalNormal",
    "networks": "pyro_vae.networks.MlpPair",
    "objective": "pyro_vae.objectives.ELBO",
}
HELP = {
    "data": "The data set",
    "prior": "The prior p(z)",
    "likelihood": "The likelihood p(x | z); null: the one that fits the data set (Binomial for counts, Bernoulli for "
    "binarised pixels, ContinuousBernoulli for grey ones, a normal for tables)",
    "encoder": "The family of the posterior q(z | x)",
    "networks": "The pair of networks inside decoder and encoder",
    "objective": "What is maximised: an objective of this library or of pyro.infer, such as Trace_ELBO",
    "optimizer": "The optimiser, any of torch.optim; null: Adam, fused over all parameters",
}

# Constructor arguments that the run itself knows: sizes, data, the encoder that a VampPrior shares.
PROVIDED = {"latent_dim", "event_dim", "encoder", "pseudo_inputs", "net", "params", "lr", "num_examples", "dataset"}


def class_names(part: str) -> list[str]:
    """The short names of a part's classes, in alphabetical order."""
    base, modules = PARTS[part]
    modules = modules[::-1]  # of two of one name (ELBO) the first counts, as in import_class
    classes = {name: value for m in modules for name, value in vars(m).items() if inspect.isclass(value)}
    own = {name for name, c in classes.items() if issubclass(c, base) and c is not base and not inspect.isabstract(c)}
    return sorted(name for name in own if not name.startswith("_"))


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The name that is nearest to a word, as " (did you mean NAME?)"; nothing where none is near."""
    spelt = {name.lower(): name for name in names}
    found = difflib.get_close_matches(word.lower(), spelt, n=1, cutoff=0.7)
    return f" (did you mean {spelt[found[0]]}?)" if found else ""


def import_class(path: str, part: str) -> type:
    """The class behind a short name or a dotted path.

    Args:
        path: "VampPrior", or "my_module.MyPrior".
        part: which part of the run it is for.

    Raises:
        UsageError: there is no such class.
    """
    if "." not in path:
        if path not in class_names(part):
            raise UsageError(
                f"unknown {part} {path!r}{did_you_mean(path, class_names(part))}: choose one of "
                f"{', '.join(class_names(part))}, or give the dotted path of a class of your own."
            )
        return next(getattr(m, path) for m in PARTS[part][1] if hasattr(m, path))
    module_name, name = path.rsplit(".", 1)
    try:
        value = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"cannot import {part} {path!r} ({error}): check the path and the current folder.") from None
    if not inspect.isclass(value):
        raise UsageError(f"expected {part} {path!r} to be a class, found {type(value).__name__}.")
    return value
