"""Bounds of several draws: their order at the same draws, their limits, Pyro's own, and the exact posterior."""

import itertools
import math

import pytest
import torch
from pyro.infer import RenyiELBO
from test_objectives import (
    CASES,
    SCALED,
    assert_equal_to,
    at_one_seed,
    conjugate,
    linear_gaussian,
    noise,
    value_and_gradients,
)

from pyro_vae import CIWAE, ELBO, IWAE, MIWAE, PIWAE, Renyi, ThermodynamicVariational, draw
from pyro_vae.importance import log_mean_exp
from pyro_vae.terms import Terms

K, B, D, E = 3, 5, 2, 7
pytestmark = pytest.mark.usefixtures("float64")

MEMBERS = [
    MIWAE(K, 2),
    PIWAE(K, 2),
    CIWAE(K, 0.3),
    Renyi(K, 0.5),
    Renyi(K, 1.0),
    Renyi(K, 3.0),
    Renyi(K, -1.0),
    ThermodynamicVariational(K),
]


def some(log_w):
    """Terms with these log-weights."""
    zero = torch.zeros(())
    return Terms(log_w, zero, zero, 1.0, None, None)


def weights(draws=12, rows=200):
    return 3 * torch.randn(draws, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 80


@pytest.mark.parametrize("objective", MEMBERS, ids=str)
def test_exact_posterior_gives_the_evidence(objective):
    lg, x = linear_gaussian(), noise(B, E)
    vae = lg.as_vae()
    for _ in range(2):
        bound = objective.bound(vae.model, vae.guide, x)
        torch.testing.assert_close(bound, lg.log_evidence(x), rtol=0, atol=1e-9)
    assert objective.is_tight


@pytest.mark.parametrize("objective", MEMBERS, ids=str)
@pytest.mark.parametrize("how", SCALED)
def test_scale_stays_outside_the_bound(objective, how):
    x, settings = noise(B), dict(SCALED[how])
    settings["full"] = settings.get("full", 1) * B
    bound, loss = at_one_seed(objective, conjugate(x))
    scaled_bound, scaled_loss = at_one_seed(objective, conjugate(x, **settings))
    torch.testing.assert_close(scaled_bound, bound, rtol=0, atol=1e-11)
    torch.testing.assert_close(scaled_loss, 10 * loss)


def test_special_cases():
    log_w = weights()
    elbo, iwae = ELBO(12).combine(some(log_w)), IWAE(12).combine(some(log_w))
    for objective in (
        Renyi(12, 1.0),
        CIWAE(12, 1.0),
        MIWAE(1, 12),
        ThermodynamicVariational(12, 1),
        Renyi(12, 1 + 1e-14),
        Renyi(12, 1 - 1e-12),
    ):
        torch.testing.assert_close(objective.combine(some(log_w)), elbo, rtol=0, atol=1e-9, msg=str(objective))
    for objective in (Renyi(12, 0.0), CIWAE(12, 0.0), MIWAE(12, 1)):
        torch.testing.assert_close(objective.combine(some(log_w)), iwae, rtol=0, atol=1e-11, msg=str(objective))
    halves = (log_w[:6].logsumexp(0) + log_w[6:].logsumexp(0)) / 2 - math.log(6)
    torch.testing.assert_close(MIWAE(6, 2).combine(some(log_w)), halves)
    torch.testing.assert_close(CIWAE(12, 0.25).combine(some(log_w)), 0.25 * elbo + 0.75 * iwae)


def test_order_at_the_same_draws():
    terms = some(weights())
    elbo, iwae = ELBO(12).combine(terms), IWAE(12).combine(terms)
    alphas = [Renyi(12, alpha).combine(terms) for alpha in (4.0, 1.5, 1.0, 0.999, 0.5, 0.0, -1.0)]
    for lower, upper in itertools.pairwise(alphas):
        assert (upper - lower > -1e-10).all()
    points = [ThermodynamicVariational(12, n).combine(terms) for n in (1, 2, 5, 20, 400)]
    for lower, upper in itertools.pairwise(points):
        assert (upper - lower).mean() > 0
    for between in (*points, CIWAE(12, 0.5).combine(terms), MIWAE(4, 3).combine(terms), MIWAE(6, 2).combine(terms)):
        assert (between - elbo > -1e-10).all() and (iwae - between > -1e-10).all()
    assert (MIWAE(6, 2).combine(terms) - MIWAE(3, 4).combine(terms)).mean() > 0
    few = ThermodynamicVariational(12, 4, first=0.999)  # all points but the first next to 1
    torch.testing.assert_close(few.combine(terms), 0.999 * elbo + 0.001 * few_last(terms), atol=1e-3, rtol=1e-4)
    fine = ThermodynamicVariational(12, 4000, first=1e-4).combine(terms)
    torch.testing.assert_close(fine, iwae, rtol=0, atol=0.05)


def few_last(terms):
    return (terms.log_w.softmax(0) * terms.log_w).sum(0)


def test_riemann_sum_by_hand():
    objective = ThermodynamicVariational(12, 3, first=0.01)
    assert objective.points == pytest.approx((0.0, 0.01, 0.1))
    log_w = weights()
    tilted = [((beta * log_w).softmax(0) * log_w).sum(0) for beta in (0.0, 0.01, 0.1)]
    expected = 0.01 * tilted[0] + 0.09 * tilted[1] + 0.9 * tilted[2]
    torch.testing.assert_close(objective.combine(some(log_w)), expected)


@pytest.mark.parametrize(
    "name", [name for name in CASES if "example weights" not in name]
)  # Pyro scales inside the log
@pytest.mark.parametrize("vectorize", [True, False])
def test_renyi_equals_pyros(name, vectorize):
    case = CASES[name]()
    settings = {"num_particles": K, "vectorize_particles": vectorize, "max_plate_nesting": case.nesting}
    expected = value_and_gradients(RenyiELBO(alpha=0.4, **settings), case)
    assert_equal_to(expected, value_and_gradients(Renyi(alpha=0.4, **settings), case))


@pytest.mark.parametrize("alpha", [1 - 1e-6, 1.0, 1 + 1e-6])
def test_renyi_near_one_has_the_gradient_of_the_elbo(alpha):
    case = CASES["two layers"]()
    expected, found = (value_and_gradients(o, case) for o in (ELBO(K), Renyi(K, alpha)))
    assert_equal_to(expected, found, atol=1e-4)


def test_power_mean():
    log_w = weights()
    for power in (-2.0, -0.01, 1e-2, 0.5, 1.0):
        direct = ((power * log_w).exp().mean(0)).log() / power
        torch.testing.assert_close(log_mean_exp(log_w, power), direct)
    near, there = log_mean_exp(log_w, 0.99e-3), log_mean_exp(log_w, 1.01e-3)  # on both sides of the change of formula
    assert (there > near).all() and (there - near < 1e-3).all()
    torch.testing.assert_close(log_mean_exp(log_w, 1e-300), log_w.mean(0))
    assert torch.isfinite(log_mean_exp(1e3 * log_w)).all()


def test_bounds_stay_below_the_evidence():
    lg = linear_gaussian()
    vae = lg.as_vae(diagonal=True)
    vae.encoder.net.bias.data[:D] += 0.5
    x = vae.sample(4000)
    exact = lg.log_evidence(x)
    with torch.no_grad():
        for objective in MEMBERS:
            gap = exact - objective.bound(vae.model, vae.guide, x)
            assert (gap.mean() > -4 * gap.std() / math.sqrt(len(x))) or not objective.is_bound, objective
        terms = draw(vae.model, vae.guide, x, num_particles=8)
    growing = [MIWAE(k, 8 // k).combine(terms).mean() for k in (1, 2, 4, 8)]
    assert growing == sorted(growing)
    assert not Renyi(alpha=-1.0).is_bound and Renyi(alpha=2.0).is_bound


@pytest.mark.parametrize("vectorize", [True, False])
def test_number_of_draws(vectorize):
    case = CASES["vae-standard-diagonal"]()
    for objective in (MIWAE(3, 2, vectorize_particles=vectorize), PIWAE(3, 2, vectorize_particles=vectorize)):
        assert objective.num_draws == 6
        assert objective.draw(case.model, case.guide, *case.args).log_w.shape == (6, B)


def test_refusals():
    with pytest.raises(ValueError, match="expected num_outer to be an integer >= 1, found 0"):
        MIWAE(3, 0)
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"expected beta in \[0, 1\]"):
            CIWAE(beta=beta)
    for alpha in (math.inf, math.nan):
        with pytest.raises(ValueError, match="expected a finite alpha"):
            Renyi(alpha=alpha)
    with pytest.raises(ValueError, match="expected num_points to be an integer >= 1"):
        ThermodynamicVariational(num_points=0)
    for first in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"expected first in \(0, 1\)"):
            ThermodynamicVariational(first=first)
    for cls in (MIWAE, CIWAE, Renyi, ThermodynamicVariational):
        with pytest.raises(ValueError, match="expected num_particles to be an integer >= 1"):
            cls(num_particles=0)
