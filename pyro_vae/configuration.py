"""From a configuration to objects: the data set and the VAE that the arguments of ``pyro-vae train`` describe."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor, nn

from pyro_vae import (
    initialization,
    layers,
    missing,
    tables,
)
from pyro_vae.arguments import load_config
from pyro_vae.checkpoints import load_model
from pyro_vae.contracts import mean_and_scale
from pyro_vae.decoders import Decoder
from pyro_vae.masked import Masked
from pyro_vae.parts import UsageError, import_class
from pyro_vae.streaming import place
from pyro_vae.supports import NO_LIKELIHOOD
from pyro_vae.vae import VAE


def build(config: Namespace, trained: bool = False) -> tuple[Any, VAE]:
    """The data set and the untrained VAE that a configuration describes, on its device.

    Args:
        config: a parsed configuration of ``train``; its likelihood is filled in where it was left to the data.
        trained: parameters will be loaded, so where they start does not matter.

    Returns:
        The data set and the VAE.

    Raises:
        UsageError, ValueError, TypeError: a part cannot be made.
    """
    if config.latent_dim < 1:
        raise UsageError(f"--latent_dim: expected a number >= 1, found {config.latent_dim}.")
    device = _device(config.device)
    torch.manual_seed(config.seed)
    data = make(config, "data")
    if config.likelihood is None:
        config.likelihood = _natural(*data.natural_likelihood)
    event_shape = tuple(data.test.shape[1:])
    some = torch.randperm(len(data.train))[:10_000]  # enough for a mean and a scale
    x = data.prepare(data.train[some])

    likelihood = make(config, "likelihood", event_dim=len(event_shape))
    pair = make(config, "networks")
    # An encoder class that does not say how many outputs it wants gets a mean and a scale for each dimension.
    family = import_class(config.encoder.class_path, "encoder")
    num_outputs = _num_outputs(family, config) if hasattr(family, "num_outputs") else 2 * config.latent_dim
    inputs, input_shape = _inputs(likelihood, x, config.standardize, _has_gaps(data))
    start = initialization.STARTS[config.init]
    net = nn.Sequential(*inputs, start(pair.encoder(input_shape, num_outputs)))
    encoder = make(config, "encoder", net=net, latent_dim=config.latent_dim)

    if hasattr(likelihood, "output_shape"):
        output_shape = likelihood.output_shape(event_shape)
    else:  # a class of the user's own, which need not be a Likelihood
        output_shape = (getattr(likelihood, "num_outputs", 1) * event_shape[0], *event_shape[1:])
    decoder = Decoder(start(pair.decoder(config.latent_dim, output_shape)), likelihood)
    if config.start_at_data and not trained and hasattr(likelihood, "output_bias"):
        decoder.start_at_data(x)
    seen = torch.where(x.isnan(), mean_and_scale(x)[0], x)
    prior = make(config, "prior", latent_dim=config.latent_dim, encoder=encoder, pseudo_inputs=seen)
    if not getattr(likelihood, "is_normalised", True):  # on every report and under every figure
        data.policy += f"; {NO_LIKELIHOOD}"
    rows, data.train = data.train, data.train[:0]  # perhaps too large for the device
    data = data.to(device)
    placed = place(rows, device, config.get("resident"))
    data.train = placed.x
    return data, VAE(prior, decoder, encoder).to(device)


def _natural(name: str, arguments: dict[str, Any]) -> Namespace:
    """The configuration of a data set's natural likelihood; those inside it too: Masked(MixedColumns([...]))."""

    def inner(value: Any) -> Any:
        if isinstance(value, tuple):
            return _natural(*value)
        return [inner(part) for part in value] if isinstance(value, list) else value

    path = f"pyro_vae.{name}" if "." in name else f"pyro_vae.likelihoods.{name}"
    return Namespace(class_path=path, init_args=Namespace(**{key: inner(value) for key, value in arguments.items()}))


def _has_gaps(data: Any) -> bool:
    rows = [data.test, data.train] if data.train.is_floating_point() else [data.test]
    return any(bool(block.isnan().any()) for part in rows for block in part.split(10_000))


def _inputs(
    likelihood: Any, x: Tensor, standardize: bool | float, gaps: bool
) -> tuple[list[nn.Module], tuple[int, ...]]:
    """What comes before the encoder's network, and the shape of what it gets of one example."""
    inside = likelihood.likelihood if isinstance(likelihood, Masked) else likelihood
    if isinstance(inside, tables.MixedColumns):
        if len(inside.columns()) != x.shape[1] or x.dim() != 2:
            inside.output_shape(tuple(x.shape[1:]))  # says what does not fit
        rows = tables.ColumnInputs(likelihood, x, bool(standardize), append_gaps=gaps)
        return [rows], (rows.num_inputs,)
    before: list[nn.Module] = []
    shape = tuple(x.shape[1:])
    if standardize:
        there = x[~x.isnan()]
        one = standardize is True
        loc, scale = (there.mean(), there.std().clamp(min=1e-6)) if one else (standardize, 1.0)
        before.append(layers.Standardize(loc, scale))
    if isinstance(likelihood, Masked):
        before.append(missing.FillMissing(event_dim=len(shape), append_gaps=gaps))
        shape = (2 * shape[0], *shape[1:]) if gaps else shape
    return before, shape


def _num_outputs(family: Any, config: Namespace) -> int:
    """``num_outputs`` of an encoder class, asked with those of the constructor's arguments that it depends on."""
    arguments = vars(config.encoder.get("init_args") or Namespace())
    accepted = inspect.signature(family.num_outputs).parameters
    return family.num_outputs(config.latent_dim, **{k: v for k, v in arguments.items() if k in accepted})


def make(config: Namespace, part: str, **provided: Any) -> Any:
    """An object of the class that a configuration names, its arguments from there, the rest from the run.

    Args:
        config: the configuration.
        part: which part.
        **provided: what the run can give; only what the constructor asks for is passed.
    """
    return _construct(config[part], part, provided)


def _construct(spec: Namespace, part: str, provided: dict[str, Any]) -> Any:
    cls = import_class(spec.class_path, part)
    arguments = dict(vars(spec.get("init_args") or Namespace()))
    for name, value in arguments.items():
        if isinstance(value, list):
            arguments[name] = [_construct(v, part, provided) if _is_part(v) else v for v in value]
        elif _is_part(value):  # a part inside a part: Masked(Bernoulli())
            arguments[name] = _construct(value, part, provided)
    accepted = inspect.signature(cls).parameters
    arguments |= {name: value for name, value in provided.items() if name in accepted}
    try:
        return cls(**arguments)
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"cannot make the {part} {cls.__name__} ({' '.join(str(error).split())}).") from None


def _is_part(value: Any) -> bool:
    return isinstance(value, Namespace) and "class_path" in value


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("expected a CUDA device, found none that torch can use: choose --device cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def open_run(command: Callable[..., None], run: str, device: str) -> tuple[Namespace, Any, VAE]:
    """The configuration, the data set and the trained VAE of a run folder.

    Args:
        command: the function behind ``train``.
        run: the run folder.
        device: "auto", "cpu" or "cuda".
    """
    config = load_config(command, run)
    config.device = device
    data, vae = build(config, trained=True)
    file = Path(run) / "model.safetensors"
    if not file.is_file():
        raise UsageError(f"expected a file {file}, found none: train a first epoch with pyro-vae resume {run}.")
    load_model(file, vae)
    return config, data, vae
