"""Every prior with every likelihood and every posterior: two steps of training, or a refusal in words.

The members are found by looking, so a new one takes part as soon as it exists. ``python tests/test_cross_product.py``
writes docs/combinations.md, the table of what goes with what; a test keeps it current.
"""

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.infer
import pytest
import torch
from torch import Tensor, nn

from pyro_vae import ELBO, VAE, Bernoulli, Decoder, Mlp, Poisson, StandardNormal, check_vae, likelihoods
from pyro_vae.parts import PARTS

PAGE = Path(__file__).parents[1] / "docs" / "combinations.md"
B, D, E = 4, 3, 5

# Arguments that a member cannot do without, or that make it small.
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "Binomial": lambda: {"total_count": 3},
    "Multinomial": lambda: {"total_count": 6},
    "Masked": lambda: {"likelihood": Bernoulli()},
    "MixedColumns": lambda: {"likelihoods": [likelihoods.Normal(), Bernoulli(), Poisson(), Bernoulli(), Poisson()]},
    "Nominal": lambda: {"num_levels": 3},
    "Categorical": lambda: {"num_levels": 4},
    "DiscretizedLogistic": lambda: {"num_levels": 4},
    "DiscretizedLogisticMixture": lambda: {"num_levels": 4, "num_components": 2},
}
SMALL = {"num_components": 2, "num_transforms": 2, "hidden": 4, "context_dim": 3, "num_bins": 3}


def members(part: str) -> dict[str, type]:
    """The classes of a part that this library defines, by name."""
    base, modules = PARTS[part]
    found = {name: cls for module in modules for name, cls in vars(module).items() if inspect.isclass(cls)}
    return {
        name: cls
        for name, cls in sorted(found.items())
        if issubclass(cls, base) and cls is not base and not inspect.isabstract(cls) and not name.startswith("_")
    }


PRIORS, LIKELIHOODS, ENCODERS = (members(part) for part in ("prior", "likelihood", "encoder"))


def make(cls: type, **given: Any) -> Any:
    """A small member: what it needs, what is given, and few of everything else."""
    parameters = inspect.signature(cls).parameters
    arguments = ARGUMENTS.get(cls.__name__, dict)()
    few = {k: v for k, v in SMALL.items() if k in parameters and isinstance(parameters[k].default, int)}
    arguments = few | {name: value for name, value in given.items() if name in parameters} | arguments
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    assert not missing, f"{cls.__name__} needs {missing}: write it into ARGUMENTS of tests/test_cross_product.py"
    return cls(**arguments)


def few_outputs(cls: Any) -> int:
    """Outputs of the network of a small posterior."""
    accepted = inspect.signature(cls.num_outputs).parameters
    return cls.num_outputs(D, **{name: value for name, value in SMALL.items() if name in accepted})


def make_encoder(cls: type) -> nn.Module:
    """A small posterior; each x is scaled by itself first, whatever its likelihood."""
    scaled = nn.LayerNorm(E, elementwise_affine=False)
    return make(cls, net=nn.Sequential(scaled, Mlp(E, 4, few_outputs(cls), activation=nn.Tanh)), latent_dim=D)


def make_prior(cls: type, encoder: nn.Module) -> nn.Module:
    return make(cls, latent_dim=D, encoder=encoder, pseudo_inputs=torch.rand(9, E))


def make_decoder(cls: type) -> Decoder:
    likelihood = make(cls)
    return Decoder(Mlp(D, 4, *likelihood.output_shape((E,)), activation=nn.Tanh), likelihood)


@cache
def data(name: str) -> Tensor:
    """Examples that a likelihood can have drawn; of a score, which draws nothing, what it compares."""
    torch.manual_seed(0)
    with torch.no_grad():
        p = make_decoder(LIKELIHOODS[name])(torch.randn(B, D))
        return p.sample() if getattr(p, "is_normalised", True) and name != "Comparison" else torch.rand(B, E)


def gradients(vae: VAE, x: Tensor, exact: bool) -> float:
    """Leave the gradients of one step by the objective that the posterior calls for, exact if it can be; the loss."""
    with torch.no_grad(), pyro.validation_enabled(False):
        q = vae.encoder(x)
    if q.has_rsample:
        return float(ELBO().loss_and_grads(vae.model, vae.guide, x))
    if q.has_enumerate_support and exact:
        guide = pyro.infer.config_enumerate(vae.guide, default="parallel")
        return pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(vae.model, guide, x)
    return pyro.infer.TraceGraph_ELBO().loss_and_grads(vae.model, vae.guide, x)


def failure(vae: VAE, x: Tensor) -> str:
    """What two steps of training show to be wrong; "" if nothing."""
    parameters = dict(vae.named_parameters())
    reached: set[str] = set()
    for step in range(2):
        for parameter in parameters.values():
            parameter.grad = None
        try:
            with pyro.validation_enabled(step == 0):  # the same checks again would only take time
                loss = gradients(vae, x, exact=step == 0)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not abs(loss) < float("inf"):
            return f"the loss is {loss}"
        moved = {name: p for name, p in parameters.items() if p.grad is not None}
        if not all(bool(p.grad.isfinite().all()) for p in moved.values()):
            return "a gradient is not finite"
        reached |= {name for name, p in moved.items() if bool(p.grad.any())}
        with torch.no_grad():
            for parameter in moved.values():
                parameter -= 1e-3 * parameter.grad
    missed = sorted(set(parameters) - reached)
    return f"no gradient reaches {missed}" if missed else ""


@cache
def refusals() -> dict[tuple[str, str], str]:
    """(prior, posterior) -> why check_vae refuses them together."""
    found = {}
    torch.manual_seed(0)
    decoder, x = make_decoder(likelihoods.Normal), data("Normal")
    for encoder_name, encoder_class in ENCODERS.items():
        encoder = make_encoder(encoder_class)
        for prior_name, prior_class in PRIORS.items():
            try:
                check_vae(VAE(make_prior(prior_class, encoder), decoder, encoder), x)
            except ValueError as error:
                found[prior_name, encoder_name] = str(error)
    return found


def page() -> str:
    """The table of what goes with what."""
    refused = refusals()
    partners = {e: [p for p in PRIORS if (p, e) not in refused] for e in ENCODERS}
    count = sum(map(len, partners.values())) * len(LIKELIHOODS)
    lines = [
        "# What goes with what",
        "",
        f"Made by `python tests/test_cross_product.py`, which also trains each of the {count:,} combinations of prior,",
        "likelihood and posterior that are not refused, two steps each (`pytest tests/test_cross_product.py`).",
        "",
        "## Posteriors and their priors",
        "",
        "Each goes with every likelihood: " + ", ".join(f"`{name}`" for name in LIKELIHOODS) + ".",
        "",
        "| posterior | priors | train it with |",
        "|---|---|---|",
    ]
    with torch.no_grad():
        qs = {name: make_encoder(cls)(data("Normal")) for name, cls in ENCODERS.items()}
    for name, q in qs.items():
        exact = ["`TraceEnum_ELBO`"] if q.has_enumerate_support else []
        ways = ["`ELBO` and its kin"] if q.has_rsample else [*exact, "`TraceGraph_ELBO`"]
        lines.append(f"| `{name}` | {', '.join(f'`{p}`' for p in partners[name])} | {', '.join(ways)} |")
    lines += ["", "## Refused, with the remedy", "", "| priors | posteriors | what `check_vae` says |", "|---|---|---|"]
    said: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # those who hear the same stand in one row
    for prior in PRIORS:
        for message in sorted({refused[prior, e] for e in ENCODERS if (prior, e) in refused}):
            others = tuple(e for e in ENCODERS if refused.get((prior, e)) == message)
            said.setdefault((message, others), []).append(prior)
    for (message, others), prior_names in said.items():
        left, right = (", ".join(f"`{name}`" for name in names) for names in (prior_names, others))
        lines.append(f"| {left} | {right} | {message} |")
    return "\n".join(lines) + "\n"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/test_cross_product.py"


def test_refusals_are_one_line_and_name_a_remedy():
    assert refusals()
    for pair, message in refusals().items():
        assert ": " in message and message.endswith(".") and "\n" not in message, pair
        assert not message.startswith(("Expected value", "Expected parameter")), pair


def test_every_member_has_a_partner():
    open_to = {(p, e) for p in PRIORS for e in ENCODERS} - set(refusals())
    assert {p for p, _ in open_to} == set(PRIORS) and {e for _, e in open_to} == set(ENCODERS)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_check_vae_allows_what_is_trained(likelihood):
    """Each likelihood with each posterior, the priors in turn: the dry run before training has no objection."""
    torch.manual_seed(0)
    decoder, x = make_decoder(LIKELIHOODS[likelihood]), data(likelihood)
    for i, (name, cls) in enumerate(ENCODERS.items(), start=list(LIKELIHOODS).index(likelihood)):
        partners = [prior for prior in PRIORS if (prior, name) not in refusals()]
        encoder = make_encoder(cls)
        check_vae(VAE(make_prior(PRIORS[partners[i % len(partners)]], encoder), decoder, encoder), x)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_two_steps(encoder):
    """Each combination of this posterior with a prior that is not refused and any likelihood."""
    torch.manual_seed(0)
    decoders = {name: make_decoder(cls) for name, cls in LIKELIHOODS.items()}
    failures = []
    for prior_name, prior_class in PRIORS.items():
        if (prior_name, encoder) in refusals():
            continue
        posterior = make_encoder(ENCODERS[encoder])
        prior = make_prior(prior_class, posterior)
        for likelihood, decoder in decoders.items():
            wrong = failure(VAE(prior, decoder, posterior), data(likelihood))
            if wrong:
                failures.append(f"{prior_name}, {likelihood}, {encoder}: {wrong}")
    assert not failures, "\n".join(failures)


def test_a_failure_is_seen():
    """The test of the test: an unreached parameter, a loss without bound and a crash are told."""
    encoder, x = make_encoder(ENCODERS["DiagonalNormal"]), data("Bernoulli")
    decoder = make_decoder(Bernoulli)
    assert failure(VAE(StandardNormal(D), decoder, encoder), x) == ""
    decoder.idle = nn.Parameter(torch.zeros(1))
    assert failure(VAE(StandardNormal(D), decoder, encoder), x) == "no gradient reaches ['decoder.idle']"
    deaf = make_encoder(ENCODERS["DiagonalNormal"])
    deaf.net.insert(0, nn.Threshold(torch.inf, 0.0))  # hears nothing of x
    wrong = failure(VAE(StandardNormal(D), make_decoder(Bernoulli), deaf), x)
    assert wrong == "no gradient reaches ['encoder.net.2.0.weight']"
    with torch.no_grad():
        decoder.net[-1].bias.fill_(torch.inf)
    assert failure(VAE(StandardNormal(D), decoder, encoder), x) != ""
    assert "Error: " in failure(VAE(StandardNormal(D + 1), make_decoder(Bernoulli), encoder), x)


if __name__ == "__main__":
    pyro.enable_validation(True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
