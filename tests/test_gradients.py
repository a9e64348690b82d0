"""Gradient estimators: unbiased against exact gradients, zero where they must be, and right for shared parameters."""

import itertools
import math
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from test_objectives import (
    CASES,
    Case,
    assert_equal_to,
    discrete,
    linear_gaussian,
    make_vae,
    noise,
    param,
    scale_param,
    value_and_gradients,
)
from torch import nn

from pyro_vae import (
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    VAE,
    VIMCO,
    AutoregressiveFlow,
    Bernoulli,
    Decoder,
    DiagonalNormal,
    DReG,
    EnergyEntropy,
    Mlp,
    ReconstructionKL,
    Renyi,
    ScoreFunction,
    StandardNormal,
    StickingTheLanding,
    Surgery,
    draw,
)
from pyro_vae.gradients import follow, without_model, without_score

K, B, D, E = 3, 5, 2, 7
COPIES = 3000
pytestmark = pytest.mark.usefixtures("float64")


def assert_same_mean(found, expected, errors=4.5):
    """Two sets of gradients [R, ...], or one and an exact value, agree in the mean within standard errors."""
    expected = expected if expected.dim() == found.dim() else expected.expand(2, *expected.shape)
    difference = found.mean(0) - expected.mean(0)
    error = (found.var(0) / len(found) + expected.var(0) / len(expected)).sqrt()
    assert (difference.abs() <= errors * error + 1e-9).all(), (difference / error).abs().max()


# ------------------------------------------------------------------------------ Pyro's own case, many copies of it

DATA = torch.tensor([-0.5, 2.0], dtype=torch.float64)


def copies(full=1, scale=1.0):
    """Copies of z ~ N(0, 1), x | z ~ N(z + shift, 1), x = (-0.5, 2), guide N(loc, width^2), each with parameters."""
    x = DATA.repeat(COPIES)
    count = len(x)

    def plate():
        return pyro.plate("data", full * count, subsample=torch.arange(count), dim=-1)

    def model():
        with plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + pyro.param("shift", torch.zeros(count)), 1.0), obs=x)

    def guide():
        with plate():
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(count)), pyro.param("width", torch.ones(count))))

    return Case(poutine.scale(model, scale=scale), poutine.scale(guide, scale=scale))


def gradients(objective, case, seed=0):
    """The gradients of the loss, [COPIES, 2] for each parameter."""
    found = value_and_gradients(objective, case, seed)[1]
    return {name: g.reshape(COPIES, 2) for name, g in found.items()}


ELBO_ESTIMATORS = [
    ELBO(2),
    StickingTheLanding(2),
    DReG(2, alpha=1.0),
    ReconstructionKL(2),
    EnergyEntropy(2),
    ScoreFunction(2),
    ScoreFunction(1, baseline="examples"),
    ScoreFunction(1, baseline="none"),
    ScoreFunction(2, baseline=-3.0),
    ScoreFunction(2, vectorize_particles=False),
]


@pytest.mark.parametrize("objective", ELBO_ESTIMATORS, ids=str)
def test_gradient_of_the_elbo(objective):
    """Exactly: d(-ELBO)/d loc = -x, d(-ELBO)/d width = 1 each, d(-ELBO)/d shift = -x."""
    found = gradients(objective, copies())
    assert_same_mean(found["loc"], -DATA)
    assert_same_mean(found["width"], torch.ones(2))
    assert_same_mean(found["shift"], -DATA)


@pytest.mark.parametrize(
    "objective", [StickingTheLanding(2), DReG(K), ScoreFunction(2), VIMCO(K), PIWAE(2, 2)], ids=str
)
@pytest.mark.parametrize("settings", [{"full": 10}, {"scale": 10.0}, {"full": 5, "scale": 2.0}], ids=str)
def test_scales_multiply_the_gradient(objective, settings):
    plain, scaled = (gradients(objective, copies(**s)) for s in ({}, settings))
    for name in plain:
        torch.testing.assert_close(scaled[name], 10 * plain[name])


@pytest.mark.parametrize(
    ("objective", "plain"),
    [
        (DReG(K), IWAE(K)),
        (DReG(K, alpha=0.5), Renyi(K, alpha=0.5)),
        (DReG(K, alpha=2.0), Renyi(K, alpha=2.0)),
        (VIMCO(K), IWAE(K)),
    ],
    ids=str,
)
def test_gradient_of_bounds_of_several_draws(objective, plain):
    found, expected = gradients(objective, copies()), gradients(plain, copies(), seed=1)
    for name in ("loc", "width", "shift"):
        assert_same_mean(found[name], expected[name])


def test_piwae_gives_the_model_one_bound_and_the_guide_another():
    found = gradients(PIWAE(2, 2), copies())
    of_guide, of_model = gradients(MIWAE(2, 2), copies()), gradients(IWAE(4), copies())  # the same draws
    torch.testing.assert_close(found["loc"], of_guide["loc"])
    torch.testing.assert_close(found["width"], of_guide["width"])
    torch.testing.assert_close(found["shift"], of_model["shift"])
    assert not torch.allclose(of_guide["shift"], of_model["shift"])


@pytest.mark.parametrize(
    "name", ["two layers", "conditional", "masked", "inner latents", "pixel plate", "vae-vamp-full"]
)
@pytest.mark.parametrize("vectorize", [True, False])
def test_values_are_those_of_the_plain_bounds(name, vectorize):
    case = CASES[name]()
    settings = {"vectorize_particles": vectorize, "max_plate_nesting": case.nesting}
    for objective, plain in (
        (StickingTheLanding(K, **settings), ELBO(K, **settings)),
        (ScoreFunction(K, **settings), ELBO(K, **settings)),
        (DReG(K, **settings), IWAE(K, **settings)),
        (VIMCO(K, **settings), IWAE(K, **settings)),
        (DReG(K, alpha=0.3, **settings), Renyi(K, alpha=0.3, **settings)),
        (PIWAE(2, 2, **settings), IWAE(4, **settings)),
    ):
        loss, expected = (value_and_gradients(o, case)[0] for o in (objective, plain))
        assert loss == pytest.approx(expected, abs=1e-9), objective
    equal = value_and_gradients(DReG(K, alpha=1.0, **settings), case)
    assert_equal_to(value_and_gradients(StickingTheLanding(K, **settings), case), equal)


@cache
def repeated_gradients(name, objective):
    """Of 120 seeds, all parameters in a row; the plain bounds' are compared with two estimators each."""
    case = CASES[name]()
    draws = [value_and_gradients(objective, case, seed)[1] for seed in range(120)]
    return torch.stack([torch.cat([g.flatten() for g in d.values()]) for d in draws])


@pytest.mark.parametrize("name", ["two layers", "vae-vamp-diagonal"])
@pytest.mark.parametrize(
    ("objective", "plain"),
    [(StickingTheLanding(K), ELBO(K)), (DReG(K), IWAE(K)), (ScoreFunction(K), ELBO(K)), (VIMCO(K), IWAE(K))],
    ids=lambda o: type(o).__name__,
)
def test_unbiased_in_hierarchies_and_for_shared_parameters(name, objective, plain):
    """Two layers bottom up; a VampPrior, whose encoder is part of both model and guide."""
    difference = repeated_gradients(name, objective) - repeated_gradients(name, plain)  # seed by seed: the same draws
    assert_same_mean(difference, torch.zeros(difference.shape[1]), errors=5.0)


def test_the_parts_of_the_derivative():
    """With z = a x + t eps, the score, the path and the model's part by hand, for a guide of two layers."""
    case = CASES["two layers"]()
    pyro.clear_param_store()
    terms = draw(case.model, case.guide, *case.args, num_particles=K, fixes_z=True)
    parameters = dict(pyro.get_param_store().named_parameters())
    z1 = terms.guide_trace.nodes["z1"]["value"].detach()
    x = case.args[0]

    def gradient(value, name):
        (g,) = torch.autograd.grad(value.sum(), parameters[name], retain_graph=True, allow_unused=True)
        return torch.zeros(()) if g is None else g

    score = ((z1 - 0.5 * x) * x / 0.6**2).sum()  # d log N(z1; a1 x, 0.6) / d a1 at fixed z1
    torch.testing.assert_close(gradient(terms.fixed.log_qz, "a1"), score)
    torch.testing.assert_close(gradient(without_score(terms) - terms.log_w, "a1"), score)
    assert gradient(terms.fixed.log_px, "a1") == gradient(terms.fixed.log_pz, "a1") == 0
    assert gradient(without_model(terms), "w1") == gradient(without_model(terms), "w2") == 0
    torch.testing.assert_close(gradient(without_model(terms), "a1"), gradient(terms.log_w, "a1"))
    for fixed, value in zip(terms.fixed[:3], terms[:3], strict=True):
        torch.testing.assert_close(fixed, value)


# --------------------------------------------------------------------------------------------- the exact posterior


def exact_two_layers():
    """z2 ~ N(0, 1), z1 | z2 ~ N(2 z2, 0.5), x | z1 ~ N(z1, 0.7), and its posterior, drawn bottom up."""
    w, s, r = 2.0, 0.5, 0.7
    v1 = w**2 + s**2  # marginal variance of z1

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(w * z2, s))
            pyro.sample("x", dist.Normal(z1, r), obs=x)

    def guide(x):
        gain, back = v1 / (v1 + r**2), w / v1
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(param("a1", gain) * x, scale_param("t1", math.sqrt(gain) * r)))
            pyro.sample("z2", dist.Normal(param("a2", back) * z1, scale_param("t2", math.sqrt(1 - back * w))))

    return Case(model, guide, (noise(B),)), dist.Normal(0.0, math.sqrt(v1 + r**2)).log_prob(noise(B))


@pytest.mark.parametrize("vectorize", [True, False])
def test_at_the_exact_posterior_of_two_layers(vectorize):
    case, evidence = exact_two_layers()
    settings = {"vectorize_particles": vectorize}
    for objective in (StickingTheLanding(1, **settings), StickingTheLanding(K, **settings), DReG(K, **settings)):
        loss, found = value_and_gradients(objective, case)
        assert loss == pytest.approx(-evidence.sum().item(), abs=1e-10)
        assert {"a1", "a2"} <= found.keys()
        assert all(g.abs().max() < 1e-9 for g in found.values()), objective
    for plain in (ELBO(K), IWAE(K)):
        assert all(g.abs().max() > 1e-3 for g in value_and_gradients(plain, case)[1].values())


@pytest.mark.parametrize("objective", [StickingTheLanding(1), DReG(K), DReG(50), DReG(K, alpha=0.5)], ids=str)
def test_encoder_gradients_vanish_at_the_exact_posterior(objective):
    lg, x = linear_gaussian(), noise(B, E)
    vae = lg.as_vae()
    bound = objective.bound(vae.model, vae.guide, x)
    torch.testing.assert_close(bound, lg.log_evidence(x))
    for value in bound:  # of every single draw
        for gradient in torch.autograd.grad(value, list(vae.encoder.parameters()), retain_graph=True):
            assert gradient.abs().max() < 1e-8
    (plain,) = torch.autograd.grad(ELBO(1).bound(vae.model, vae.guide, x)[0], [vae.encoder.net.bias])
    assert plain.abs().max() > 1e-3


def test_flows_are_scored_at_fixed_draws():
    torch.manual_seed(0)
    net = Mlp(E, 6, AutoregressiveFlow.num_outputs(D))
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 6, E), Bernoulli()), AutoregressiveFlow(net, D)).double()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = (noise(B, E) > 0).double()
    terms = draw(vae.model, vae.guide, x, num_particles=2000, fixes_z=True)
    torch.testing.assert_close(terms.fixed.log_qz, terms.log_qz, rtol=1e-5, atol=1e-5)
    bias = net[-1].bias if isinstance(net, nn.Sequential) else list(net.parameters())[-1]
    scores = torch.stack(
        [torch.autograd.grad(chunk.mean(), bias, retain_graph=True)[0] for chunk in terms.fixed.log_qz.split(50)]
    )
    assert scores.abs().max() > 1e-4
    assert_same_mean(scores, torch.zeros_like(scores[0]))


def test_signal_of_the_encoder_does_not_drown():
    """Noise over signal of the encoder's gradient: it grows with K for IWAE and falls for DReG."""

    def ratio(objective):
        found = gradients(objective, copies())["loc"][:, 1]
        return (found.std() / found.mean().abs()).item()

    assert ratio(IWAE(64)) > 1.5 * ratio(IWAE(2))
    assert ratio(DReG(64)) < ratio(DReG(2)) < ratio(IWAE(2))


# ------------------------------------------------------------------------------------------------- discrete guides

STATES = 3


def categorical():
    """One of three states for each of many copies; everything by enumeration."""
    x = torch.tensor([0.3, -1.2], dtype=torch.float64).repeat(COPIES)

    def logits(name, *values):
        return pyro.param(name, torch.tensor(values).expand(len(x), STATES).clone())

    def model():
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=logits("prior", 0.2, -0.1, 0.4)))
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.5, 2.0])[z], 0.8), obs=x)

    def guide():
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Categorical(logits=logits("posterior", 0.1, 0.5, -0.3)))

    return Case(model, guide), x[:2]


def enumerated(num_particles):
    """The exact gradient of the bound of K draws, summing over all of their states."""
    x = categorical()[1]
    prior = torch.tensor([0.2, -0.1, 0.4]).expand(2, STATES).clone().requires_grad_()
    posterior = torch.tensor([0.1, 0.5, -0.3]).expand(2, STATES).clone().requires_grad_()
    log_q = posterior.log_softmax(-1)
    log_px = dist.Normal(torch.tensor([-1.0, 0.5, 2.0]), 0.8).log_prob(x.unsqueeze(-1))
    log_w = prior.log_softmax(-1) + log_px - log_q
    bound = 0.0
    for states in itertools.product(range(STATES), repeat=num_particles):
        value = log_w[:, list(states)].logsumexp(1) - math.log(num_particles)
        bound = bound + log_q[:, list(states)].sum(1).exp() * value
    return bound.detach(), dict(
        zip(("prior", "posterior"), torch.autograd.grad(-bound.sum(), [prior, posterior]), strict=True)
    )


@pytest.mark.parametrize(
    ("objective", "num_particles"),
    [
        (ScoreFunction(K), 1),
        (ScoreFunction(1), 1),
        (ScoreFunction(1, baseline="none"), 1),
        (VIMCO(2), 2),
        (VIMCO(3), 3),
    ],
    ids=str,
)
def test_unbiased_by_enumeration(objective, num_particles):
    case, _ = categorical()
    bound, exact = enumerated(num_particles)
    found = value_and_gradients(objective, case)[1]
    torch.manual_seed(9)
    values = objective.bound(case.model, case.guide).detach().reshape(COPIES, 2)
    assert_same_mean(values, bound)
    for name in ("prior", "posterior"):
        assert_same_mean(found[name].reshape(COPIES, 2, STATES), exact[name])


@pytest.mark.parametrize("num_particles", [1, K])
def test_score_function_without_baseline_is_trace_graph_elbo(num_particles):
    """Both leave out the derivative of -log q, which has mean 0."""
    case = discrete(with_parameters=True)
    settings = {"num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 1}
    expected = value_and_gradients(TraceGraph_ELBO(**settings), case)
    assert_equal_to(expected, value_and_gradients(ScoreFunction(baseline="none", **settings), case))


def test_vimco_by_hand():
    case = discrete(with_parameters=True)
    pyro.clear_param_store()
    terms = VIMCO(K).draw(case.model, case.guide, *case.args)
    log_w, expected = terms.log_w.detach(), 0.0
    bound = log_w.logsumexp(0) - math.log(K)
    for k in range(K):
        others = [log_w[j] for j in range(K) if j != k]
        without = torch.stack([*others, sum(others) / (K - 1)]).logsumexp(0) - math.log(K)
        expected = expected + (bound - without) * terms.log_qz[k] + log_w.softmax(0)[k] * terms.log_w[k]
    logit = pyro.get_param_store()["logit"]
    by_hand, found = (
        torch.autograd.grad(v.sum(), logit, retain_graph=True) for v in (expected, VIMCO(K).combine(terms))
    )
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(VIMCO(K).combine(terms), bound)


def test_baselines_lower_the_variance():
    case, _ = categorical()

    def spread(objective):
        return value_and_gradients(objective, case)[1]["posterior"].var(0).sum().item()

    none = spread(ScoreFunction(K, baseline="none"))
    assert spread(ScoreFunction(K, baseline="particles")) < 0.6 * none
    assert spread(ScoreFunction(K, baseline="examples")) < 0.8 * none


def test_reparameterised_guides_give_no_path():
    vae, x = make_vae(), (noise(B, E) > 0).double()
    terms = ScoreFunction(K).draw(vae.model, vae.guide, x)
    assert not terms.guide_trace.nodes["z"]["value"].requires_grad
    assert not terms.model_trace.nodes["z"]["value"].requires_grad
    assert vae.guide(x).requires_grad


def test_training_with_bits():
    """A guide without rsample learns: the gradient moves q towards the posterior."""
    case = discrete(with_parameters=True)
    for objective in (ScoreFunction(4), VIMCO(4)):
        pyro.clear_param_store()
        svi = pyro.infer.SVI(case.model, case.guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
        losses = [svi.step(*case.args) for _ in range(100)]
        assert sum(losses[-40:]) < sum(losses[:40])


# ------------------------------------------------------------------------------------------------------ refusals


def test_refuses_programs_that_are_not_functions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(E, 20), nn.Dropout(0.5), nn.Linear(20, 2 * D))
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 6, E), Bernoulli()), DiagonalNormal(net)).double()
    x = (noise(B, E) > 0).double()
    for objective in (StickingTheLanding(), DReG(K), PIWAE(2, 2)):
        with pytest.raises(ValueError, match=r"same functions when they run again.*found log q.*dropout"):
            objective.loss_and_grads(vae.model, vae.guide, x)
        assert torch.isfinite(objective.loss(vae.model, vae.guide, x))
        vae.eval()
        objective.loss_and_grads(vae.model, vae.guide, x)
        vae.train()


def test_refuses_guides_without_rsample():
    case = discrete(with_parameters=True)
    for objective in (StickingTheLanding(), DReG(K), PIWAE(2, 2)):
        with pytest.raises(ValueError, match=r"no reparameterised sampler.*ScoreFunction"):
            objective.loss_and_grads(case.model, case.guide, *case.args)


def test_refuses_wrong_numbers():
    with pytest.raises(ValueError, match="expected a finite alpha"):
        DReG(alpha=math.inf)
    for baseline in ("mean", math.nan, True):
        with pytest.raises(ValueError, match="expected a baseline among"):
            ScoreFunction(baseline=baseline)
    with pytest.raises(ValueError, match="num_particles >= 2 for the baseline"):
        ScoreFunction(1, baseline="particles")
    with pytest.raises(ValueError, match="num_particles >= 2"):
        VIMCO(1)
    with pytest.raises(ValueError, match="expected num_outer to be an integer >= 1"):
        PIWAE(2, 0)
    for cls in (StickingTheLanding, DReG, ScoreFunction, VIMCO, PIWAE):
        with pytest.raises(ValueError, match="expected num_particles to be an integer >= 1"):
            cls(num_particles=0)


def test_follow():
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    value = follow(a * b, a**2)
    assert value == 6
    assert torch.autograd.grad(value, [a, b], allow_unused=True) == (4, None)


def test_what_is_a_bound():
    for objective in (StickingTheLanding(), DReG(), ScoreFunction(), VIMCO(), PIWAE(), DReG(alpha=2.0), Surgery()):
        assert objective.is_bound and objective.is_tight and objective.formula
    assert not DReG(alpha=-0.5).is_bound
