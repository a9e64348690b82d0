"""Annealing: weights without bias, bounds on both sides of the exact answer, and refusals."""

import math
import types
from pathlib import Path

import pyro
import pytest
import torch
from torch import nn

import pyro_vae.annealing
from pyro_vae import (
    VAE,
    Bernoulli,
    Comparison,
    Decoder,
    DiagonalNormal,
    Mlp,
    SphereUniform,
    StandardNormal,
    discrete,
    encoders,
    log_evidence,
    priors,
    tails,
)
from pyro_vae.annealing import annealed_log_evidence, linear_schedule, sandwich, sigmoidal_schedule
from pyro_vae.comparisons import squared_error
from pyro_vae.exact import LinearGaussian, log_evidence_by_quadrature

pytestmark = pytest.mark.usefixtures("float64")
C, B, D, E, T = 3, 5, 2, 7, 11


def linear_gaussian(scale=0.7):
    weight = torch.tensor([[1.0, 0.2, -0.5, 0.8, 0.0, 0.3, -0.2], [0.3, -0.7, 0.4, 0.5, 0.6, 0.0, 0.1]]).T
    return LinearGaussian(weight, torch.linspace(-1, 1, E), scale)


def bits_vae(prior=None, encoder=None, latent_dim=D):
    torch.manual_seed(3)
    decoder = Decoder(Mlp(latent_dim, 6, E), Bernoulli())
    return VAE(prior or StandardNormal(latent_dim), decoder, encoder or DiagonalNormal(Mlp(E, 6, 2 * latent_dim)))


def bits(rows=B):
    return (torch.rand(rows, E, generator=torch.Generator().manual_seed(1)) < 0.5).double()


# ------------------------------------------------------------------------------------------------------ the weights


def check_weights(module):
    """The mean weight is p(x), and that of the reversed chain 1 / p(x): over 4000 copies of one example."""
    lg, rows = linear_gaussian(scale=1.5), 4000
    torch.manual_seed(0)
    vae = lg.as_vae(diagonal=True)
    vae.encoder.net.bias.data[:D] += 0.7
    x = vae.sample(1).detach().expand(rows, E)
    for from_encoder in (False, True):
        with torch.no_grad():
            path = module._Path(vae, x, from_encoder, sigmoidal_schedule(4), 2)
            steps = torch.full((5, rows), 1.3)  # coarse: many moves are refused
            forward, share = path.forward(path.start(1), steps)
            z = lg.posterior(x).sample()
            backward, _ = path.backward(z.unsqueeze(0), steps)
        assert 0.4 < share.mean() < 0.95, share.mean()
        exact = lg.log_evidence(x[:1])
        for ratio in ((forward[0] - exact).exp(), (exact - backward[0]).exp()):
            assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(rows)
            assert ratio.std() < 3, "a test of the mean that can fail"


def test_weights_have_no_bias():
    check_weights(pyro_vae.annealing)


MUTATIONS = [
    ("torch.rand_like(acceptance) < acceptance", "torch.rand_like(acceptance) < 2"),
    ("(0.5 if last else 1.0)", "1.0"),
    ("(self.betas[t] - self.betas[t - 1]) * state[2]", "self.betas[t] * state[2]"),
    ("moves_first=True)", "moves_first=False)"),
    ("log_base + beta * log_ratio - 0.5", "log_ratio - 0.5"),
    ("(new[3] + beta * new[4])\n        new_energy", "(new[3] + new[4])\n        new_energy"),
    ("+ self.prior.log_prob(z) - log_base", "+ self.prior.log_prob(z)"),
]


@pytest.mark.parametrize("line, mutant", MUTATIONS, ids=range(len(MUTATIONS)))
def test_a_mutation_turns_the_weights_red(line, mutant):
    source = Path(pyro_vae.annealing.__file__).read_text(encoding="utf-8")
    assert source.count(line) == 1, f"the mutated line moved: {line}"
    module = types.ModuleType("mutated_annealing")
    exec(compile(source.replace(line, mutant), "mutated_annealing.py", "exec"), module.__dict__)
    with pytest.raises(AssertionError):
        check_weights(module)


def test_one_temperature_is_importance_sampling():
    vae, x = bits_vae(), bits()
    annealed = annealed_log_evidence(vae, x, C, 1, from_encoder=True, seed=4)
    weighed = log_evidence(vae, x, C, seed=4)
    torch.testing.assert_close(annealed.values, weighed.values)
    torch.testing.assert_close(annealed.errors, weighed.errors)
    torch.testing.assert_close(annealed.effective_sample_size, weighed.effective_sample_size)


# ------------------------------------------------------------------------------------------------------- the bounds


@pytest.mark.parametrize("from_encoder", [False, True])
def test_the_sandwich_contains_the_exact_value(from_encoder):
    lg = linear_gaussian()
    vae = lg.as_vae(diagonal=True)
    vae.encoder.net.bias.data[:D] += 0.5
    coarse, fine = (sandwich(vae, 150, C, t, 3, from_encoder=from_encoder, seed=2) for t in (T, 10 * T))
    for found in (coarse, fine):
        exact = lg.log_evidence(found.x)
        below, above = exact - found.lower.values, found.upper.values - exact
        for excess in (below, above):
            assert excess.mean() > -3 * excess.std() / math.sqrt(150)
    assert abs(fine.gap) < 0.15
    assert coarse.gap > fine.gap
    assert 0.5 < fine.acceptance.mean() < 0.8, "tuned to 0.65"
    assert "gap" in str(fine) and fine.x.shape == (150, E)
    assert fine.upper.name == "upper bound on log p(x)"


def test_the_sandwich_says_what_it_bounds():
    found = sandwich(linear_gaussian().as_vae(), num_examples=4, num_chains=2, num_temperatures=3, leapfrog_steps=1)
    assert str(found).endswith("on average over draws, not for each example: n=4 examples that the model made)")
    with pytest.raises(TypeError, match=r"found Tensor: .* for data of yours use annealed_log_evidence"):
        sandwich(linear_gaussian().as_vae(), torch.zeros(3, E))


def test_the_sandwich_of_a_nonlinear_model():
    vae = bits_vae()
    found = sandwich(vae, 100, C, 30, 3)
    exact = log_evidence_by_quadrature(vae.prior, vae.decoder, found.x, num_points=121)
    assert found.lower.mean - 0.02 < exact.mean() < found.upper.mean + 0.02
    assert found.gap < 0.1


def test_errors_are_right():
    """z-scores of 200 repeated estimates: of copies of one example, the spread over chains is the error."""
    lg = linear_gaussian()
    vae = lg.as_vae(diagonal=True)
    x = torch.zeros(1, E).expand(200, E)
    found = annealed_log_evidence(vae, x, 50, 20, 2, from_encoder=True)
    scores = (found.values - lg.log_evidence(x[:1])) / found.errors
    assert abs(scores.mean()) < 4 / math.sqrt(200) + found.errors.mean()
    assert abs(scores.var() - 1) < 4 * math.sqrt(2 / 200) + 0.1


def test_the_order_of_the_bounds():
    """ELBO <= importance sampling <= annealing <= exact, where the encoder is poor: paired over the examples."""
    lg = linear_gaussian()
    vae = lg.as_vae(diagonal=True)
    vae.encoder.net.bias.data[:D] += 2.0
    x = vae.sample(60).detach()
    weighed = log_evidence(vae, x, 30).values
    annealed = annealed_log_evidence(vae, x, 8, 150, 3).values
    for tighter, looser in ((annealed, weighed), (lg.log_evidence(x) + 0.02, annealed)):
        difference = tighter - looser
        assert difference.mean() > -2 * difference.std() / math.sqrt(60)
    assert (annealed - weighed).mean() > 0.3
    assert (lg.log_evidence(x) - annealed).mean() < 0.1


# --------------------------------------------------------------------------------------------------- what is counted


def test_passes_cover_every_example_once():
    lg = linear_gaussian()
    x = torch.randn(13, E)
    for max_elements in (7 * C * E, 2**22):
        found = annealed_log_evidence(lg.as_vae(), x, C, T, 2, from_encoder=True, max_elements=max_elements)
        torch.testing.assert_close(found.values, lg.log_evidence(x), rtol=0, atol=1e-8)  # q is exact: every weight is
    assert found.method == f"AIS: {C} chains, T={T}, 2 leapfrog steps, from q(z|x)"
    assert found.num_particles == C and found.pareto_k is None
    assert annealed_log_evidence(lg.as_vae(), x[:2], tails.FEWEST_DRAWS, 2, 1).pareto_k is not None


@pytest.mark.parametrize("schedule", [linear_schedule, sigmoidal_schedule])
def test_schedules(schedule):
    betas = schedule(T)
    assert betas.shape == (T + 1,) and betas[0] == 0 and betas[-1] == 1
    assert (betas.diff() > 0).all()
    torch.testing.assert_close(betas + betas.flip(0), torch.ones(T + 1))
    if schedule is sigmoidal_schedule:
        assert betas.diff()[0] < 0.5 / T < 1.5 / T < betas.diff()[T // 2]


def test_nothing_is_changed():
    net = nn.Sequential(nn.Linear(E, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2 * D))
    vae = bits_vae(encoder=DiagonalNormal(net))
    net[1].eval()
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    flags, state = [part.training for part in vae.modules()], torch.get_rng_state()
    for from_encoder in (False, True):
        first = annealed_log_evidence(vae, bits(), C, T, 2, from_encoder=from_encoder)
        again = annealed_log_evidence(vae, bits(), C, T, 2, from_encoder=from_encoder)
        assert torch.equal(first.values, again.values) and not first.values.requires_grad
        sandwich(vae, B, C, T, 2, from_encoder=from_encoder)
    assert all(torch.equal(t, before[name]) for name, t in vae.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    assert flags == [part.training for part in vae.modules()]
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    assert list(pyro.get_param_store()) == []


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("prior", "encoder", "from_encoder", "message"),
    [
        (lambda: priors.Bernoulli(D), lambda: discrete.Bernoulli(Mlp(E, D)), False, r"prior\(\) of type Bernoulli"),
        (
            lambda: priors.OneHotCategorical(3),
            lambda: discrete.OneHotCategorical(Mlp(E, 3)),
            False,
            r"prior\(\) of type \w*OneHot",
        ),
        (lambda: priors.Dirichlet(3), lambda: None, False, r"prior\(\) of type Dirichlet"),
        (lambda: SphereUniform(3), lambda: None, False, r"prior\(\) of type"),
        (lambda: StandardNormal(D), lambda: encoders.Delta(Mlp(E, D)), True, r"encoder\(x\) of type Delta"),
    ],
    ids=["bits", "classes", "simplex", "sphere", "point mass"],
)
def test_only_z_that_moves_freely_is_annealed(prior, encoder, from_encoder, message):
    prior, encoder = prior(), encoder()
    vae = bits_vae(prior, encoder, latent_dim=prior().event_shape[0])
    if encoder is None:
        del vae.encoder  # no family here lives there: the prior alone decides
    with pytest.raises(ValueError, match=f"expected z on R.D, found {message}.*use log_evidence, or enumeration"):
        annealed_log_evidence(vae, bits(), C, T, from_encoder=from_encoder)


@pytest.mark.parametrize("setting", ["num_chains", "num_temperatures", "leapfrog_steps"])
@pytest.mark.parametrize("value", [0, 2.0, True])
def test_settings_below_one_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"expected {setting} to be an integer >= 1, found {value}"):
        annealed_log_evidence(bits_vae(), bits(), **{setting: value})


@pytest.mark.parametrize("from_encoder", [False, True])
def test_a_score_in_the_place_of_a_likelihood_is_refused(from_encoder):
    vae = bits_vae()
    vae.decoder.likelihood = Comparison(squared_error)
    message = "expected a likelihood, found a score in the place of p.x . z."
    with pytest.raises(ValueError, match=message):
        annealed_log_evidence(vae, bits(), C, T, from_encoder=from_encoder)
    with pytest.raises(ValueError, match=message):
        sandwich(vae, B, C, T, from_encoder=from_encoder)


def test_further_refusals():
    with pytest.raises(ValueError, match="expected at least one example"):
        annealed_log_evidence(bits_vae(), bits(0))
    with pytest.raises(ValueError, match=r"x has values outside \{0, 1\}"):
        annealed_log_evidence(bits_vae(), bits() + 0.5)
    with pytest.raises(ValueError, match="expected num_examples >= 1, found 0"):
        sandwich(bits_vae(), 0)
    with pytest.raises(ValueError, match=r"expected schedule\(11\) to be 12 numbers rising from 0 to 1, found \(3,\)"):
        annealed_log_evidence(bits_vae(), bits(), C, T, schedule=lambda t: torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="rising from 0 to 1"):
        annealed_log_evidence(bits_vae(), bits(), C, T, schedule=lambda t: linear_schedule(t).flip(0))
    with pytest.raises(TypeError, match="found Program without prior, decoder: annealing needs its pieces"):
        annealed_log_evidence(type("Program", (), {})(), bits())
