"""The bounds: equal to Pyro's where Pyro is right, to closed forms, in order, and refused where they would be wrong."""

import copy
import dataclasses
import math
import types
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn

import pyro_vae.objectives
import pyro_vae.terms
from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    Bernoulli,
    Beta,
    Decoder,
    DiagonalNormal,
    FullNormal,
    MixtureOfNormals,
    Mlp,
    Objective,
    StandardNormal,
    VampPrior,
    draw,
)
from pyro_vae.exact import LinearGaussian
from pyro_vae.terms import Terms, collect

K, B, D, E = 3, 5, 2, 7
pytestmark = pytest.mark.usefixtures("float64")


# ---------------------------------------------------------------------------------------------------- programs


class Case(NamedTuple):
    """A model, a guide, and what to call them with."""

    model: Any
    guide: Any
    args: tuple = ()
    kwargs: Any = types.MappingProxyType({})
    nesting: int = 1
    examples: tuple = (B,)


def param(name, *values):
    return pyro.param(name, torch.tensor(values, dtype=torch.float64).squeeze())


def scale_param(name, value):
    return pyro.param(name, torch.tensor(value), constraint=dist.constraints.positive)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_vae(prior="standard", encoder="diagonal"):
    torch.manual_seed(3)
    family = {"diagonal": DiagonalNormal, "full": FullNormal}[encoder]
    q = family(Mlp(E, 6, family.num_outputs(D)))
    p = {
        "standard": lambda: StandardNormal(D),
        "mixture": lambda: MixtureOfNormals(D, num_components=4),
        "vamp": lambda: VampPrior(q, torch.rand(4, E)),
    }[prior]()
    return VAE(p, Decoder(Mlp(D, 6, E), Bernoulli()), q)


def binary(rows=B):
    return (torch.rand(rows, E, generator=torch.Generator().manual_seed(2)) < 0.5).double()


def vae_case(prior="standard", encoder="diagonal"):
    vae = make_vae(prior, encoder)
    return Case(vae.model, vae.guide, (binary(),))


def two_layers():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(param("w2", 0.7) * z2, scale_param("s1", 0.8)))
            pyro.sample("x", dist.Normal(param("w1", 1.3) * z1, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(param("a1", 0.5) * x, scale_param("t1", 0.6)))
            pyro.sample("z2", dist.Normal(param("a2", 0.4) * z1, scale_param("t2", 0.9)))

    return Case(model, guide, (noise(B),))


def conditional():
    def model(x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(param("w", 0.2, -0.3) * y.unsqueeze(-1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + y, scale_param("s", 0.7)), obs=x)

    def guide(x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            loc = torch.stack([param("a", 0.3) * x, param("b", 0.1) * y], -1)
            pyro.sample("z", dist.Normal(loc, scale_param("t", 0.6)).to_event(1))

    return Case(model, guide, (noise(B),), {"y": noise(B, seed=4)})


def with_factor():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("penalty", -param("c", 0.3) * z**2)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(param("a", 0.3) * x, scale_param("t", 0.6)))
            pyro.factor("warp", 0.1 * z, has_rsample=True)

    return Case(model, guide, (noise(B),))


def global_latent():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 4 * len(x), subsample=torch.arange(len(x)), dim=-1):
            z = pyro.sample("z", dist.Normal(w, scale_param("s", 0.9)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(param("m", 0.2), scale_param("r", 0.3)))
        with pyro.plate("data", 4 * len(x), subsample=torch.arange(len(x)), dim=-1):
            pyro.sample("z", dist.Normal(param("a", 0.3) * x, scale_param("t", 0.6)))

    return Case(model, guide, (noise(B),), examples=(1,))


def pixels(full=E, weights=1.0):
    """Pixels in a plate of their own inside the plate of examples, some of them left out if full > E."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", full, subsample=torch.arange(E), dim=-1), poutine.scale(scale=weights):
                pyro.sample("x", dist.Normal(z * param("w", *range(1, E + 1)), scale_param("s", 2.0)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            loc = param("a", 0.05) * x.sum(-1, keepdim=True)
            pyro.sample("z", dist.Normal(loc, scale_param("t", 0.6)))

    return Case(model, guide, (noise(B, E),), nesting=2)


def inner_latents():
    """Several latent variables for each example, in a plate outside that of the examples."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("parts", 4, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-2, keepdim=True), scale_param("s", 0.7)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 4, dim=-2):
            pyro.sample("z", dist.Normal(param("a", 0.2) * x, scale_param("t", 0.6)))

    return Case(model, guide, (noise(B),), nesting=2)


def two_shared_plates():
    def model(x):
        with pyro.plate("rows", 4, dim=-2), pyro.plate("data", B, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale_param("s", 0.7)), obs=x)

    def guide(x):
        with pyro.plate("rows", 4, dim=-2), pyro.plate("data", B, dim=-1):
            pyro.sample("z", dist.Normal(param("a", 0.2) * x, scale_param("t", 0.6)))

    return Case(model, guide, (noise(4, B),), nesting=2, examples=(4, B))


def no_plate():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, scale_param("r", 1.5)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(param("a", 0.2), scale_param("t", 0.6)))

    return Case(model, guide, (torch.tensor(0.8),), examples=(1,))


def masked():
    mask = torch.tensor([True, False, True, True, False])

    def model(x):
        with pyro.plate("data", len(x), dim=-1), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale_param("s", 0.7)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(param("a", 0.3) * x, scale_param("t", 0.6)))

    return Case(model, guide, (noise(B),))


def sequential():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, scale_param("r", 1.5)))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(param("a", 0.2) * x[i], scale_param("t", 0.6)))

    return Case(model, guide, (noise(B),), examples=(1,))


def auxiliary():
    case = masked()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            aux = dist.Normal(param("b", 0.1) * x, 1.0)
            u = pyro.sample("u", aux, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(param("a", 0.3) * u, scale_param("t", 0.6)))

    return Case(case.model, guide, case.args)


def observations_only():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(param("m", 0.2), scale_param("s", 0.7)), obs=x)

    return Case(model, lambda x: None, (noise(B),))


CASES = {
    **{
        f"vae-{prior}-{encoder}": lambda prior=prior, encoder=encoder: vae_case(prior, encoder)
        for prior in ("standard", "mixture", "vamp")
        for encoder in ("diagonal", "full")
    },
    "two layers": two_layers,
    "conditional": conditional,
    "factor": with_factor,
    "global latent": global_latent,
    "pixel plate": pixels,
    "subsampled pixels": lambda: pixels(full=20),
    "pixel weights": lambda: pixels(weights=torch.linspace(0.5, 2, E)),
    "example weights, two axes": lambda: pixels(weights=torch.linspace(0.5, 2, B).unsqueeze(-1)),
    "inner latents": inner_latents,
    "two shared plates": two_shared_plates,
    "no plate": no_plate,
    "masked": masked,
    "sequential plate": sequential,
    "auxiliary": auxiliary,
    "observations only": observations_only,
}
every_case = pytest.mark.parametrize("name", CASES)


def value_and_gradients(objective, case, seed=5):
    """The loss and the gradient of each parameter, from fresh parameters and one seed."""
    store = pyro.get_param_store()
    store.clear()
    torch.manual_seed(seed)
    loss = objective.loss_and_grads(case.model, case.guide, *case.args, **case.kwargs)
    parameters = dict(store.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    return float(loss), gradients


def assert_equal_to(expected, found, atol=1e-10):
    (loss, gradients), (found_loss, found_gradients) = expected, found
    assert found_loss == pytest.approx(loss, rel=1e-12, abs=atol)
    assert gradients and gradients.keys() == found_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=1e-10, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


# ------------------------------------------------------------------------------------------- Pyro as an oracle


@every_case
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, K])
def test_elbo_equals_trace_elbo(name, num_particles, vectorize):
    case = CASES[name]()
    settings = {"num_particles": num_particles, "vectorize_particles": vectorize, "max_plate_nesting": case.nesting}
    expected = value_and_gradients(Trace_ELBO(**settings), case)
    assert_equal_to(expected, value_and_gradients(ELBO(**settings), case))
    terms = ELBO(**settings).draw(case.model, case.guide, *case.args, **case.kwargs)
    assert terms.log_px.shape == terms.log_pz.shape == terms.log_qz.shape == (num_particles, *case.examples)


@pytest.mark.parametrize(
    "name", [name for name in CASES if "example weights" not in name]
)  # Pyro scales inside the log
@pytest.mark.parametrize("vectorize", [True, False])
def test_iwae_equals_renyi_elbo(name, vectorize):
    case = CASES[name]()
    settings = {"num_particles": K, "vectorize_particles": vectorize, "max_plate_nesting": case.nesting}
    expected = value_and_gradients(RenyiELBO(alpha=0, **settings), case)
    assert_equal_to(expected, value_and_gradients(IWAE(**settings), case))


@every_case
def test_loss_is_minus_the_bound(name):
    case = CASES[name]()
    for objective in (ELBO(K, max_plate_nesting=case.nesting), IWAE(K, max_plate_nesting=case.nesting)):
        torch.manual_seed(0)
        loss = objective.loss(case.model, case.guide, *case.args, **case.kwargs)
        torch.manual_seed(0)
        bound = objective.bound(case.model, case.guide, *case.args, **case.kwargs)
        assert bound.shape == case.examples and not loss.requires_grad
        if "weights" not in name:
            torch.testing.assert_close(loss, -bound.sum())


def test_svi_step_is_one_torch_step():
    vae, x = make_vae(), binary()
    plain = copy.deepcopy(vae)
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss=IWAE(K))
    torch.manual_seed(7)
    loss = svi.step(x)

    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    torch.manual_seed(7)
    q = plain.encoder(x)
    z = q.rsample((K,))
    log_w = plain.decoder(z).log_prob(x) + plain.prior().log_prob(z) - q.log_prob(z)
    expected = -(log_w.logsumexp(0) - math.log(K)).sum()
    expected.backward()
    optimizer.step()

    assert loss == pytest.approx(expected.item(), abs=1e-12)
    start = dict(make_vae().named_parameters())
    for (name, ours), theirs in zip(vae.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        assert not torch.equal(ours, start[name]), f"{name} did not move"


def test_evaluate_loss_takes_no_gradient():
    case = vae_case()
    svi = pyro.infer.SVI(case.model, case.guide, pyro.optim.Adam({"lr": 0.01}), loss=ELBO())
    assert isinstance(svi.evaluate_loss(*case.args), float)
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())


def test_traces_of_pyros_own_objectives_are_read():
    case = vae_case()
    torch.manual_seed(0)
    pyros = Trace_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    (traces,) = pyros._get_traces(case.model, case.guide, case.args, {})
    torch.manual_seed(0)
    ours = draw(case.model, case.guide, *case.args, num_particles=K)
    torch.testing.assert_close(collect(*traces).log_w, ours.log_w)


# ----------------------------------------------------------------------------- a conjugate model, by hand

SCALE = 10


def conjugate(x, full=None, subsample_size=None, wrap=None, prior_scale=1.0, mask=None, loc=0.3, scale=0.8):
    """The model z ~ N(0, 1), x | z ~ N(z, 1), guide N(loc, scale^2); p(x) = N(0, 2)."""
    full = full or len(x)
    rows = torch.arange(len(x)) if subsample_size is None else None

    def plate():
        return pyro.plate("data", full, subsample=rows, subsample_size=subsample_size, dim=-1)

    def model():
        with plate() as index, poutine.mask(mask=mask) if mask is not None else poutine.scale(scale=1.0):
            with poutine.scale(scale=prior_scale):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide():
        with (
            plate(),
            poutine.mask(mask=mask) if mask is not None else poutine.scale(scale=1.0),
            poutine.scale(scale=prior_scale),
        ):
            pyro.sample("z", dist.Normal(param("loc", loc), scale_param("scale", scale)))

    wrap = wrap or (lambda program: program)
    return Case(wrap(model), wrap(guide))


def log_evidence(x):
    return dist.Normal(0.0, math.sqrt(2)).log_prob(x)


def at_one_seed(objective, case, seed=0):
    """The bound of each example and the loss, from the same draws."""
    torch.manual_seed(seed)
    bound = objective.bound(case.model, case.guide, *case.args)
    torch.manual_seed(seed)
    return bound.detach(), objective.loss(case.model, case.guide, *case.args)


SCALED = {
    "subsample": {"full": SCALE},
    "poutine.scale": {"wrap": lambda program: poutine.scale(program, scale=float(SCALE))},
    "scale tensor": {"wrap": lambda program: poutine.scale(program, scale=torch.tensor(float(SCALE)))},
    "both": {"full": 2, "wrap": lambda program: poutine.scale(program, scale=SCALE / 2)},
}


@pytest.mark.parametrize("how", SCALED)
@pytest.mark.parametrize("objective", [ELBO(K), IWAE(K), Beta(num_particles=K, beta=0.5)], ids=str)
def test_scale_stays_outside_the_bound(objective, how):
    x, settings = noise(B), dict(SCALED[how])
    settings["full"] = settings.get("full", 1) * B
    bound, loss = at_one_seed(objective, conjugate(x))
    scaled_bound, scaled_loss = at_one_seed(objective, conjugate(x, **settings))
    torch.testing.assert_close(scaled_bound, bound, rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled_loss, SCALE * loss)


@pytest.mark.parametrize("how", SCALED)
def test_scale_stays_outside_the_logarithm(how):
    """Pyro's RenyiELBO scales inside it: what it returns lies above log p(x)."""
    x = torch.tensor([0.5, -1.0, 2.0, 0.1]).repeat(250)
    settings = dict(SCALED[how])
    settings["full"] = settings.get("full", 1) * len(x)
    case = conjugate(x, **settings)
    bound, loss = at_one_seed(IWAE(50), case)
    gap = log_evidence(x) - bound
    standard_error = gap.std() / math.sqrt(len(x))
    assert gap.mean() > -4 * standard_error
    assert gap.mean() < 0.02 + 4 * standard_error
    assert -loss / SCALE / len(x) == pytest.approx(bound.mean().item())

    pyros = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    excess = -pyros.loss(case.model, case.guide) / SCALE - log_evidence(x).sum()
    assert excess / len(x) > 0.5


def test_weights_of_examples():
    x, weights = noise(B), torch.linspace(0.5, 3, B)
    bound, _ = at_one_seed(IWAE(K), conjugate(x))
    weighted = conjugate(x, wrap=lambda program: poutine.scale(program, scale=weights))
    weighted_bound, loss = at_one_seed(IWAE(K), weighted)
    torch.testing.assert_close(weighted_bound, bound)
    torch.testing.assert_close(loss, -(weights * bound).sum())


def test_one_weighted_observation_of_two_stays_inside():
    """A weight on some of the observations (the labels, say) is part of the model, whichever comes first."""

    def make(weight, overall, label_first):
        def observe_label(z):
            with poutine.scale(scale=weight):
                pyro.sample("y", dist.Normal(2 * z, 1.0), obs=torch.linspace(-1, 1, B))

        def model():
            with pyro.plate("data", B, dim=-1), poutine.scale(scale=overall):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                if label_first:
                    observe_label(z)
                pyro.sample("x", dist.Normal(z, 1.0), obs=noise(B))
                if not label_first:
                    observe_label(z)

        def guide():
            with pyro.plate("data", B, dim=-1), poutine.scale(scale=overall):
                pyro.sample("z", dist.Normal(torch.full((), 0.2), 0.7))

        return Case(model, guide)

    torch.manual_seed(0)
    z = 0.2 + 0.7 * torch.randn(K, B)
    log_w = dist.Normal(0, 1).log_prob(z) - dist.Normal(0.2, 0.7).log_prob(z)
    log_w = log_w + dist.Normal(z, 1.0).log_prob(noise(B))
    log_w = log_w + 0.3 * dist.Normal(2 * z, 1.0).log_prob(torch.linspace(-1, 1, B))
    expected = log_w.logsumexp(0) - math.log(K)
    for overall in (1.0, 6.0):
        for label_first in (True, False):
            bound, loss = at_one_seed(IWAE(K), make(0.3, overall, label_first))
            torch.testing.assert_close(bound, expected)
            torch.testing.assert_close(loss, -overall * expected.sum())


@pytest.mark.parametrize("beta", [0.25, 4.0])
def test_tempered_prior_is_beta(beta):
    x = noise(B)
    tempered = at_one_seed(ELBO(K), conjugate(x, prior_scale=beta))
    torch.testing.assert_close(tempered, at_one_seed(Beta(num_particles=K, beta=beta), conjugate(x)))
    both = conjugate(x, prior_scale=beta, full=SCALE * B)
    bound, loss = at_one_seed(ELBO(K), both)
    torch.testing.assert_close((bound, loss), (tempered[0], SCALE * tempered[1]))


def test_mask_and_scale_together():
    x, mask = noise(B), torch.tensor([True, False, True, True, False])
    bound, loss = at_one_seed(IWAE(K), conjugate(x, mask=mask, full=SCALE * B))
    unmasked, _ = at_one_seed(IWAE(K), conjugate(x))
    torch.testing.assert_close(bound, torch.where(mask, unmasked, 0.0))
    torch.testing.assert_close(loss, -SCALE * bound.sum())


def test_subsampled_pixels_keep_their_factor():
    x = noise(B, E)
    torch.manual_seed(0)
    few = draw(*pixels()[:2], x, num_particles=K, max_plate_nesting=2)
    torch.manual_seed(0)
    many = draw(*pixels(full=4 * E)[:2], x, num_particles=K, max_plate_nesting=2)
    torch.testing.assert_close(many.log_px, 4 * few.log_px)
    torch.testing.assert_close(many.log_pz - many.log_qz, few.log_pz - few.log_qz)
    assert many.scale == few.scale == 1


def subsampled():
    """4 of 40 examples drawn anew in each run, and the exact posterior of each as guide."""
    data = torch.linspace(-30, 31, 40)

    def model():
        with pyro.plate("data", 40, subsample_size=4, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def guide():
        with pyro.plate("data", 40, subsample_size=4, dim=-1) as index:
            pyro.sample("z", dist.Normal(data[index] / 2, math.sqrt(0.5)))

    return model, guide


@pytest.mark.parametrize("vectorize", [True, False])
def test_all_particles_see_the_same_subsample(vectorize):
    terms = draw(*subsampled(), num_particles=K, vectorize_particles=vectorize)
    evidence = log_evidence(terms.model_trace.nodes["x"]["value"])
    assert evidence.unique().shape == (4,)
    torch.testing.assert_close(terms.log_w, evidence.expand(K, 4))
    assert terms.scale == SCALE


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("subsampled", [False, True])
def test_gradients_of_a_conjugate_model(subsampled, scale):
    """At N(0, 1) as guide of x = (-0.5, 2): d(-ELBO)/d loc = -x, d(-ELBO)/d scale = 2."""
    data, num_particles = torch.tensor([-0.5, 2.0]), 20_000

    def model(index):
        with pyro.plate("data", 2, subsample=index, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def guide(index):
        loc, width = pyro.param("loc", torch.zeros(2)), pyro.param("width", torch.ones(1))
        with pyro.plate("data", 2, subsample=index, dim=-1):
            pyro.sample("z", dist.Normal(loc[index], width))

    model, guide = poutine.scale(model, scale=scale), poutine.scale(guide, scale=scale)
    batches = [torch.tensor([0]), torch.tensor([1])] if subsampled else [torch.arange(2)]
    for index in batches:
        ELBO(num_particles).loss_and_grads(model, guide, index)
    gradients = {name: p.grad / len(batches) for name, p in pyro.get_param_store().named_parameters()}
    tolerance = scale * 4 * 5 / math.sqrt(num_particles)  # 4 standard errors of a deviation of at most 5
    torch.testing.assert_close(gradients["loc"], scale * torch.tensor([0.5, -2.0]), rtol=0, atol=tolerance)
    torch.testing.assert_close(gradients["width"], scale * torch.tensor([2.0]), rtol=0, atol=tolerance)


# -------------------------------------------------------------------------------------------- exact and in order


def linear_gaussian():
    weight = torch.tensor([[1.0, 0.2, -0.5, 0.8, 0.0, 0.3, -0.2], [0.3, -0.7, 0.4, 0.5, 0.6, 0.0, 0.1]]).T
    return LinearGaussian(weight, torch.linspace(-1, 1, E), 0.7)


@pytest.mark.parametrize("objective", [ELBO(), ELBO(K), IWAE(K), IWAE(2 * K)], ids=str)
def test_exact_posterior_gives_the_evidence(objective):
    lg, x = linear_gaussian(), noise(B, E)
    vae = lg.as_vae()
    terms = objective.draw(vae.model, vae.guide, x)
    torch.testing.assert_close(terms.log_w, lg.log_evidence(x).expand(objective.num_particles, B), rtol=0, atol=1e-10)
    torch.testing.assert_close(objective.combine(terms), lg.log_evidence(x), rtol=0, atol=1e-10)


def test_bounds_are_in_order():
    lg = linear_gaussian()
    vae = lg.as_vae(diagonal=True)
    vae.encoder.net.bias.data[:D] += 0.5  # a guide that is off
    x = vae.sample(3000)
    with torch.no_grad():
        log_w = draw(vae.model, vae.guide, x, num_particles=8).log_w
    exact = lg.log_evidence(x)

    def bound(objective, rows):
        return objective.combine(Terms(log_w[rows], torch.zeros(()), torch.zeros(()), 1.0, None, None))

    elbo, iwae2, iwae4, iwae8 = (
        bound(ELBO(8), slice(8)),
        torch.stack([bound(IWAE(2), slice(i, i + 2)) for i in range(0, 8, 2)]).mean(0),
        torch.stack([bound(IWAE(4), slice(i, i + 4)) for i in range(0, 8, 4)]).mean(0),
        bound(IWAE(8), slice(8)),
    )
    for looser, tighter in ((elbo, iwae2), (iwae2, iwae4), (iwae4, iwae8)):
        difference = tighter - looser  # paired: from the same draws it is never negative (Jensen)
        assert (difference > -1e-12).all()
        assert difference.mean() > 4 * difference.std() / math.sqrt(len(x))
    gap = exact - iwae8
    assert gap.mean() > 4 * gap.std() / math.sqrt(len(x))

    with torch.no_grad():  # and from draws of their own
        torch.manual_seed(1)
        difference = IWAE(16).bound(vae.model, vae.guide, x) - IWAE(2).bound(vae.model, vae.guide, x)
    assert difference.mean() > 4 * difference.std() / math.sqrt(len(x))


def test_special_cases_at_one_seed():
    case = vae_case("vamp", "full")
    for equal in (IWAE(1), Beta(num_particles=1, beta=1.0), ELBO(1, vectorize_particles=False)):
        expected, found = value_and_gradients(ELBO(1), case), value_and_gradients(equal, case)
        assert_equal_to(expected, found, atol=1e-12)
    assert_equal_to(
        value_and_gradients(ELBO(K), case), value_and_gradients(Beta(num_particles=K, beta=1.0), case), atol=1e-12
    )
    torch.manual_seed(0)
    terms = draw(case.model, case.guide, *case.args, num_particles=K)
    torch.testing.assert_close(Beta(num_particles=K, beta=0.0).combine(terms), terms.log_px.mean(0))


def test_particles_one_by_one_have_the_same_distribution():
    x = torch.tensor([0.5, -1.0, 2.0, 0.1]).repeat(1000)
    case = conjugate(x)
    at_once, _ = at_one_seed(IWAE(K), case, seed=0)
    one_by_one, _ = at_one_seed(IWAE(K, vectorize_particles=False), case, seed=1)
    difference = at_once - one_by_one
    assert difference.mean().abs() < 4 * difference.std() / math.sqrt(len(x))
    spread = torch.tensor([at_once.std(), one_by_one.std()])
    assert spread[0] == pytest.approx(spread[1].item(), rel=0.1)


def test_without_randomness_particles_one_by_one_are_equal():
    x = noise(B)

    def guide():
        with pyro.plate("data", B, dim=-1):
            pyro.sample("z", dist.Delta(param("loc", 0.3) * x))

    model = conjugate(x).model
    once, loop = (draw(model, guide, num_particles=K, vectorize_particles=v) for v in (True, False))
    torch.testing.assert_close(once.log_w, loop.log_w)
    torch.testing.assert_close(once.log_w, (once.log_px + once.log_pz)[:1].expand(K, B))  # a Delta scores 0


@pytest.mark.parametrize("vectorize", [True, False])
def test_number_of_particles_is_honoured(vectorize):
    case, shapes = vae_case(), []

    def guide(x):
        shapes.append(case.guide(x).shape)

    terms = draw(case.model, guide, *case.args, num_particles=K, vectorize_particles=vectorize)
    assert shapes == ([(K, B, D)] if vectorize else [(B, D)] * K)
    assert terms.log_w.shape == (K, B)
    assert len({*terms.log_w[:, 0].tolist()}) == K, "particles are independent draws"


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("objective", [ELBO, IWAE, Beta])
@pytest.mark.parametrize("number", [0, -1, True, 2.0, "3"])
def test_refuses_a_wrong_number_of_particles(objective, number):
    with pytest.raises(ValueError, match=r"expected num_particles to be an integer >= 1, found"):
        objective(num_particles=number)
    with pytest.raises(ValueError, match=r"expected num_particles to be an integer >= 1, found"):
        draw(*vae_case()[:2], binary(), num_particles=number)


@pytest.mark.parametrize("beta", [-0.1, math.nan])
def test_refuses_a_negative_beta(beta):
    with pytest.raises(ValueError, match="expected beta >= 0"):
        Beta(beta=beta)


@pytest.mark.parametrize("validate", [True, False])
def test_refuses_programs_that_do_not_match(validate):
    def sites(*names):
        def program():
            with pyro.plate("data", B, dim=-1):
                for name in names:
                    pyro.sample(name, dist.Normal(torch.zeros(()), 1.0))

        return program

    with pyro.validation_enabled(validate):
        with pytest.raises(ValueError, match=r"expected a guide site for each latent site .* \['w'\]"):
            draw(sites("z", "w"), sites("z"))
        with pytest.raises(ValueError, match=r"expected a latent model site for each guide site.*\['w'\]"):
            draw(sites("z"), sites("z", "w"))
        with pytest.raises(ValueError, match="expected a model with sample sites, found none"):
            draw(lambda: None, lambda: None)


def discrete(with_parameters):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(torch.full((), 0.5)))
            pyro.sample("x", dist.Normal(z, scale_param("s", 0.7)), obs=x)

    def guide(x):
        logit = param("logit", 0.3) if with_parameters else torch.tensor(0.3)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=logit))

    return Case(model, guide, (noise(B),))


def test_refuses_a_biased_gradient_only():
    case = discrete(with_parameters=True)
    objective = ELBO(K)
    with pytest.raises(ValueError, match=r"guide site 'z' \(.*\) has no reparameterised sampler.*TraceGraph_ELBO"):
        objective.loss_and_grads(case.model, case.guide, *case.args)
    assert torch.isfinite(objective.loss(case.model, case.guide, *case.args))
    with torch.no_grad():
        assert objective.bound(case.model, case.guide, *case.args).shape == (B,)

    free = discrete(with_parameters=False)
    settings = {"num_particles": K, "vectorize_particles": True, "max_plate_nesting": 1}
    assert_equal_to(value_and_gradients(Trace_ELBO(**settings), free), value_and_gradients(objective, free))


def test_refuses_a_chain_through_a_discrete_draw():
    """The parameters reach the discrete site only through another draw."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(param("a", 0.1), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Bernoulli(logits=u))

    case = discrete(with_parameters=True)
    with pytest.raises(ValueError, match="guide site 'z'"):
        ELBO().bound(case.model, guide, *case.args)


def test_refuses_a_factor_of_a_draw_that_is_not_reparameterised():
    case = with_factor()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(param("a", 0.3) * x, 0.6))
            pyro.factor("hidden", param("a", 0.3) * x, has_rsample=False)

    with pytest.raises(ValueError, match="guide site 'hidden'"):
        ELBO().bound(case.model, guide, *case.args)


def test_refuses_enumerated_sites():
    case = discrete(with_parameters=True)
    guide = poutine.enum(pyro.infer.config_enumerate(case.guide), first_available_dim=-3)
    with pytest.raises(ValueError, match=r"site 'z' was enumerated.*TraceEnum_ELBO"):
        draw(case.model, guide, *case.args)


def test_refuses_more_plates_than_announced():
    case = pixels()
    with pytest.raises(ValueError, match="expected at most 1 nested plates, found more: set max_plate_nesting"):
        ELBO(K).bound(case.model, case.guide, *case.args)


def test_other_errors_come_through():
    def model():
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine"):
        draw(model, lambda: None)


@pytest.mark.parametrize("num_particles", [1, K])
def test_refuses_a_plate_that_has_the_particles_name(num_particles):
    def program():
        with pyro.plate("particles", B, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match="particles"):
        draw(program, program, num_particles=num_particles)


# -------------------------------------------------------------------------------------------- objectives as objects


class Halves(nn.Module):
    """One half of a VAE as a module whose forward is a Pyro program."""

    def __init__(self, vae, half):
        super().__init__()
        self.vae, self.half = vae, half

    def forward(self, x):
        return getattr(self.vae, self.half)(x)


@pytest.mark.parametrize("objective", [ELBO(K), IWAE(K), Beta(beta=0.5)], ids=str)
def test_as_a_torch_module(objective):
    vae, x = make_vae(), binary()
    module = objective(Halves(vae, "model"), Halves(vae, "guide"))
    assert isinstance(module, nn.Module)
    assert {*module.parameters()} == {*vae.parameters()}
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10]) - 10


@pytest.mark.parametrize("objective", [ELBO(2), IWAE(2), Beta(num_particles=2, beta=3.0)], ids=str)
def test_objectives_are_values(objective):
    other = type(objective)(num_particles=4)
    twin = dataclasses.replace(objective)
    assert isinstance(objective, Objective) and isinstance(objective, pyro.infer.ELBO)
    assert twin == objective and hash(twin) == hash(objective) and twin is not objective
    assert copy.deepcopy(objective) == objective != other
    assert objective != dataclasses.replace(objective, vectorize_particles=False)
    assert len({objective, twin, other}) == 2
    assert eval(repr(objective), {type(objective).__name__: type(objective)}) == objective
    assert objective.formula and objective.formula.count("{") == objective.formula.count("}")
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.num_particles = 7


def test_what_is_a_bound():
    assert ELBO().is_bound and IWAE().is_bound and Beta(beta=1.0).is_bound and Beta(beta=4.0).is_bound
    assert not Beta(beta=0.5).is_bound
    assert ELBO().is_tight and IWAE().is_tight and Beta(beta=1.0).is_tight and not Beta(beta=4.0).is_tight


def test_a_new_objective_is_one_line():
    @dataclasses.dataclass(frozen=True)
    class Best(Objective):
        def combine(self, terms):
            return terms.log_w.max(0).values

    case = vae_case()
    torch.manual_seed(0)
    bound = Best(num_particles=K).bound(case.model, case.guide, *case.args)
    torch.manual_seed(0)
    terms = draw(case.model, case.guide, *case.args, num_particles=K)
    torch.testing.assert_close(bound, terms.log_w.max(0).values)
    with pytest.raises(TypeError, match="combine"):
        Objective()


# ---------------------------------------------------------------------------------------------- the tests themselves


def check_core(objectives):
    """A few exact statements that pin the bounds down; `objectives` is the module or a mutant of it."""
    elbo, iwae = objectives.ELBO(K), objectives.IWAE(K)
    settings = {"num_particles": K, "vectorize_particles": True, "max_plate_nesting": 1}
    for case in (vae_case("mixture"), masked()):
        assert_equal_to(value_and_gradients(Trace_ELBO(**settings), case), value_and_gradients(elbo, case))
        expected = value_and_gradients(RenyiELBO(alpha=0, **settings), case)
        assert_equal_to(expected, value_and_gradients(iwae, case))
    case = pixels(full=20)
    expected = value_and_gradients(Trace_ELBO(K, max_plate_nesting=2, vectorize_particles=True), case)
    assert_equal_to(expected, value_and_gradients(objectives.ELBO(K, max_plate_nesting=2), case))

    x = noise(B)
    bound, loss = at_one_seed(iwae, conjugate(x))
    for how in ("subsample", "poutine.scale"):
        settings = dict(SCALED[how])
        settings["full"] = settings.get("full", 1) * B
        scaled = at_one_seed(iwae, conjugate(x, **settings))
        torch.testing.assert_close(scaled, (bound, SCALE * loss))
    tempered = at_one_seed(elbo, conjugate(x, prior_scale=3.0))
    torch.testing.assert_close(at_one_seed(objectives.Beta(num_particles=K, beta=3.0), conjugate(x)), tempered)

    lg, x = linear_gaussian(), noise(B, E)
    vae = lg.as_vae()
    for vectorize in (True, False):
        terms = objectives.draw(vae.model, vae.guide, x, num_particles=K, vectorize_particles=vectorize)
        torch.testing.assert_close(terms.log_w, lg.log_evidence(x).expand(K, B))

    log_w = objectives.draw(*subsampled(), num_particles=K, vectorize_particles=False).log_w
    torch.testing.assert_close(log_w, log_w[:1].expand(K, 4))

    case = discrete(with_parameters=True)
    with pytest.raises(ValueError, match="no reparameterised sampler"):
        elbo.bound(case.model, case.guide, *case.args)
    with pytest.raises(ValueError, match="integer >= 1"):
        objectives.ELBO(True)


def test_core():
    check_core(pyro_vae.objectives)


MUTATIONS = [
    ("self.log_px + self.log_pz - self.log_qz", "self.log_px + self.log_pz"),
    ("self.log_px + self.log_pz - self.log_qz", "self.log_px + self.log_pz + self.log_qz"),
    ("self.log_px + self.log_pz - self.log_qz", "self.log_px - self.log_qz"),
    ("return terms.log_w.mean(0)", "return terms.log_w.sum(0)"),
    ("return terms.log_w.logsumexp(0) - math.log(len(terms.log_w))", "return terms.log_w.mean(0)"),
    ("terms.log_w.logsumexp(0) - math.log(len(terms.log_w))", "terms.log_w.logsumexp(0)"),
    ("-(terms.scale * self.combine(terms)).sum()", "-self.combine(terms).sum()"),
    ("-(terms.scale * self.combine(terms)).sum()", "-(terms.scale * self.combine(terms)).mean()"),
    ("-(terms.scale * self.combine(terms)).sum()", "(terms.scale * self.combine(terms)).sum()"),
    ('site["scale"] / self.common', 'site["scale"]'),
    ("common = common * _plate_scale(shared)", "pass"),
    ('site["scale"] / self.common, site["mask"]', 'site["scale"] / self.common, None'),
    ("value.sum(inner, keepdim=True)", "value.mean(inner, keepdim=True)"),
    ("weigh(self.beta) * (terms.log_qz - terms.log_pz)", "weigh(self.beta) * terms.log_qz - terms.log_pz"),
    ("and name not in minibatch", "and False"),
    ("_check_reparameterised(site, log_prob)", "pass"),
    ("isinstance(num_particles, bool) or", ""),
    ("poutine.replay(model, trace=guide_trace)", "model"),
]


@pytest.mark.parametrize("line, mutant", MUTATIONS, ids=range(len(MUTATIONS)))
def test_a_mutation_turns_the_core_red(line, mutant):
    paths = [Path(module.__file__) for module in (pyro_vae.terms, pyro_vae.objectives)]
    source = "".join(path.read_text(encoding="utf-8") for path in paths)  # as one module: the mutant calls itself
    source = source.replace("from pyro_vae.terms import Program, Terms, check_num_particles, draw\n", "")
    assert source.count(line) == 1, f"the mutated line moved: {line}"
    module = types.ModuleType("mutated_objectives")
    exec(compile(source.replace(line, mutant), "mutated_objectives.py", "exec"), module.__dict__)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_core(module)
