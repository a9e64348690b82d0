"""From words to objects: the arguments of ``pyro-vae train``, its YAML, and the VAE that they describe.

Everything is read off signatures and docstrings. With ``cli.py`` the only place where things are named by strings.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pyro.infer
import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace
from torch import Tensor, nn

from pyro_vae import (
    aggregate_objectives,
    comparisons,
    counts,
    datasets,
    discrete,
    encoders,
    files,
    flow_encoders,
    flow_priors,
    gradients,
    importance,
    initialization,
    layers,
    likelihoods,
    mapped,
    missing,
    networks,
    objectives,
    orthogonal_flows,
    pairs,
    pixels,
    presets,
    priors,
    regularized,
    relaxed_priors,
    routes,
    spherical_encoders,
    sprites,
    tables,
)
from pyro_vae.checkpoints import load_model
from pyro_vae.contracts import NO_LIKELIHOOD, Encoder, Likelihood, Prior, mean_and_scale
from pyro_vae.decoders import Decoder
from pyro_vae.streaming import place
from pyro_vae.vae import VAE


class UsageError(Exception):
    """A mistake in what the user wrote: one line, exit code 2."""


# The parts of a run: what a class of the part derives from, and the modules where its short name is looked up.
PARTS: dict[str, tuple[type, tuple[Any, ...]]] = {
    "data": (datasets.DataSet, (datasets, files, mapped, sprites)),
    "prior": (Prior, (priors, flow_priors, relaxed_priors)),
    "likelihood": (Likelihood, (likelihoods, pixels, counts, tables, comparisons)),
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


class Parser(ArgumentParser):
    """A parser whose errors are exceptions, so that they can be told in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(message)

    def parse(self, argv: Sequence[str]) -> Namespace:
        """The arguments; a mistake is told in plain words."""
        try:
            return self.parse_args(list(argv))
        except (UsageError, ArgumentError) as error:
            raise UsageError(plain(str(error))) from None


class Formatter(DefaultHelpFormatter):
    """Keep the paragraphs of a docstring."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(super(Formatter, self)._fill_text(part, width, indent) for part in paragraphs)


def plain(message: str) -> str:
    """A parser's message in words a person would use."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", " ".join(message.split())).replace("typing.", "")
    part = (re.search(r'Parser key "(\w+)', text) or ["", ""])[1]
    of_class = f"see --{part}.help CLASS for its arguments" if part in PARTS else "see pyro-vae COMMAND --help"
    patterns = [
        (r'key "([\w.]+)":? Expected an? (.+?)\. Got value: (\S+)', "--{0}: expected {1}, found {2}."),
        (r"Problem with given class_path '([\w.]+)': (.+?) - ", "--{part}: {1} (in the arguments of {0}): {of_class}."),
        (r"arguments are required: ([\w, ]+?)(?: -|$)", "--{part} needs --{part}.{0}: give it, or {of_class}."),
        (
            r"Parameter '(\w+)' from '(\S+)\.__init__' does not specify",
            "{1} needs the Python object {0}: use it in Python.",
        ),
        (
            r"Option '([\w.]+)' is not accepted",
            "--{part}.{0} is no argument of the {part} chosen: name the class first (--{part} CLASS), or {of_class}."
            if part in PARTS
            else "{0!r} is no argument: {of_class} for those that are.",
        ),
        (r"[Uu]nrecognized arguments: (.+)", "{0} is no argument: {of_class} for those that are."),
        (
            r'key "(\w+)":? Does not validate .*Errors: (- Expected .+) Given value type.* Given value: (.+)',
            "--{0}: found {2} {1}.",
        ),
    ]
    for pattern, words in patterns:
        found = re.search(pattern, text)
        if found:
            values = list(found.groups())
            if words.startswith("--{0}") and part in PARTS and values[0] != part:
                values[0] = f"{part}.{values[0]}"
            return words.format(*values, part=part, of_class=of_class).replace(".init_args", "")
    return text


def description(command: Callable[..., None]) -> str:
    """The docstring of a command up to its arguments."""
    return (inspect.getdoc(command) or "").split("\n\nArgs:")[0]


def class_names(part: str) -> list[str]:
    """The short names of a part's classes, in alphabetical order."""
    base, modules = PARTS[part]
    modules = modules[::-1]  # of two of one name (ELBO) the first counts, as in import_class
    classes = {name: value for m in modules for name, value in vars(m).items() if inspect.isclass(value)}
    own = {name for name, c in classes.items() if issubclass(c, base) and c is not base and not inspect.isabstract(c)}
    return sorted(name for name in own if not name.startswith("_"))


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
                f"unknown {part} {path!r}: choose one of {', '.join(class_names(part))}, or give the dotted path of a "
                "class of your own."
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


def _chosen(argv: Sequence[str], part: str) -> list[type]:
    """Classes that the arguments or the configuration files name for a part, so that the parser can learn of them."""
    names: list[Any] = []
    for i, word in enumerate(argv):
        follows = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("-") else None
        for key in (f"--{part}", f"--{part}.class_path", f"--{part}.help"):
            if word == key:
                names.append(follows)
            elif word.startswith(key + "="):
                names.append(word.split("=", 1)[1])
        if word.startswith("--config"):
            file = word.split("=", 1)[1] if "=" in word else follows
            value = _read_yaml(Path(file)).get(part) if file else None
            names.append(value.get("class_path") if isinstance(value, dict) else value)
    return [import_class(name, part) for name in names if isinstance(name, str) and re.fullmatch(r"[\w.]+", name)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the configuration {path} ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict):
        raise UsageError(f"expected {path} to hold a mapping of arguments, found {type(content).__name__}.")
    return content


def train_parser(command: Callable[..., None], argv: Sequence[str]) -> Parser:
    """The parser of ``train``: each part by class, then the command's own arguments.

    Args:
        command: the function behind ``train``.
        argv: its words, searched for classes that the parser must know of.
    """
    parser = Parser(prog="pyro-vae train", description=description(command), formatter_class=Formatter)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with any of these arguments.")
    parser.add_argument("--preset", help=f"The arguments of a well-known text: {', '.join(presets.PRESETS)}.")
    for part, (base, _) in PARTS.items():
        allowed = tuple(dict.fromkeys([base, *_chosen(argv, part)]))
        parser.add_subclass_arguments(allowed, part, skip=PROVIDED, required=False, help=HELP[part] + ".")
        if parser.groups and part in parser.groups:
            parser.groups[part].title = HELP[part].split("; null")[0]
    parser.add_function_arguments(command, skip={"config"})
    defaults = {part: {"class_path": path} for part, path in DEFAULTS.items()} | _preset(argv)
    # Where the words name a class there is no default: it would hand its arguments on, one particle to the IWAE.
    parser.set_defaults({name: v for name, v in defaults.items() if name not in PARTS or not _chosen(argv, name)})
    return parser


def _preset(argv: Sequence[str]) -> dict[str, Any]:
    """The defaults that ``--preset NAME`` among the words stands for; a further word overrides each."""
    names = [word.split("=", 1)[1] for word in argv if word.startswith("--preset=")]
    names += [follows for word, follows in pairwise([*argv, ""]) if word == "--preset"]
    if not names:
        return {}
    try:
        chosen = presets.arguments(names[-1])
    except ValueError as error:
        raise UsageError(f"--preset: {error}") from None
    return {name: _as_words(value) if name in PARTS else value for name, value in chosen.items()}


def _as_words(part: tuple[type, dict[str, Any]]) -> dict[str, Any]:
    cls, arguments = part
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    plain = {key: f"{v.__module__}.{v.__qualname__}" if isinstance(v, type) else v for key, v in plain.items()}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", **({"init_args": plain} if plain else {})}


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

    output_shape = event_shape
    if hasattr(likelihood, "output_shape"):
        output_shape = likelihood.output_shape(event_shape)
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
    inside = likelihood.likelihood if isinstance(likelihood, likelihoods.Masked) else likelihood
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
    if isinstance(likelihood, likelihoods.Masked):
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


def dump(command: Callable[..., None], config: Namespace) -> str:
    """A configuration as YAML that ``train --config`` reads; the folder of the run is no part of it."""
    config = config.clone()
    config.out = None
    config.pop("config", None)
    config.pop("preset", None)  # all that it stands for is written out
    chosen = [word for part in PARTS if config.get(part) for word in (f"--{part}", config[part].class_path)]
    return train_parser(command, chosen).dump(config)


def load_config(command: Callable[..., None], run: str) -> Namespace:
    """The configuration of a run folder.

    Raises:
        UsageError: there is none.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UsageError(f"expected a run folder with a config.yaml, found none in {run}: pyro-vae train --out {run}")
    argv = ["--config", str(path)]
    return train_parser(command, argv).parse(argv)


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
    load_model(Path(run) / "model.safetensors", vae)
    return config, data, vae
