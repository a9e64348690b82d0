"""q against the posterior: uniform ranks where it is exact, a U where it is too narrow, and the density on a grid."""

import math

import pytest
import torch
from scipy.stats import chisquare

from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal, discrete, elbo, priors
from pyro_vae.calibration import (
    Ranks,
    posterior_by_nuts,
    posterior_on_grid,
    posterior_predictive_check,
    simulation_based_calibration,
)
from pyro_vae.exact import LinearGaussian, log_evidence_by_quadrature

pytestmark = pytest.mark.usefixtures("float64")
L, B, D, E = 19, 5, 2, 7


def linear_gaussian():
    weight = torch.tensor([[1.0, 0.2, -0.5, 0.8, 0.0, 0.3, -0.2], [0.8, -0.6, 0.15, 0.9, 0.6, 0.15, 0.0]]).T
    return LinearGaussian(weight, torch.linspace(-1, 1, E), 0.7)


def bits_vae():
    torch.manual_seed(3)
    return VAE(StandardNormal(D), Decoder(Mlp(D, 6, E), Bernoulli()), DiagonalNormal(Mlp(E, 6, 2 * D)))


# ------------------------------------------------------------------------------------------------------- calibration


def test_the_exact_posterior_is_calibrated():
    found = simulation_based_calibration(linear_gaussian().as_vae(), 2000, L)
    assert found.ranks.shape == (2000, D) and found.ranks.min() >= 0 and found.ranks.max() == L
    assert (found.p_value > 1e-3).all() and (found.dispersion.abs() < 4).all()
    assert str(found).count("uniform") == D


def test_a_diagonal_posterior_of_a_correlated_one_is_too_narrow():
    """The best diagonal q has variances sigma² / M_ii, less than the marginal ones: the ranks form a U."""
    lg = linear_gaussian()
    lg.weight[:, 1] += lg.weight[:, 0]
    found = simulation_based_calibration(lg.as_vae(diagonal=True), 2000, L)
    assert (found.p_value < 1e-6).all() and (found.dispersion > 4).all()
    counts = found.counts
    assert ((counts[:, 0] + counts[:, -1]) > 1.5 * 2 * counts[:, 5:15].double().mean(1)).all()
    assert str(found).count("too narrow") == D


def test_directions_of_failure():
    vae = linear_gaussian().as_vae()
    vae.encoder.net.bias.data[D : 2 * D] += 1.0
    wide = simulation_based_calibration(vae, 1000, L)
    assert (wide.dispersion < -4).all() and "too wide" in str(wide)
    vae = linear_gaussian().as_vae()
    vae.encoder.net.bias.data[0] += 0.5
    shifted = simulation_based_calibration(vae, 1000, L)
    assert shifted.ranks[:, 0].double().mean() < L / 2 - 2 and shifted.p_value[0] < 1e-6
    assert shifted.p_value[1] > 1e-3


def test_ranks_are_read_right():
    """Uneven counts against scipy's test; a uniform set has none of either."""
    even = Ranks(torch.arange(20).repeat(50).unsqueeze(1), 19)
    assert even.counts.tolist() == [[50] * 20] and even.p_value == 1
    assert abs(even.dispersion) < 1e-10
    torch.manual_seed(0)
    ranks = torch.randint(0, 100, (300, 2))
    ranks[:, 1] = ranks[:, 1] // 2
    found = Ranks(ranks, 99)
    assert found.counts.shape == (2, 20) and found.counts.sum(1).tolist() == [300, 300]
    expected = [chisquare(row.numpy()).pvalue for row in found.counts]
    torch.testing.assert_close(found.p_value, torch.tensor(expected), rtol=1e-6, atol=1e-200)
    assert Ranks(torch.zeros(3, 1, dtype=torch.long), 12).counts.shape == (1, 13)


def test_batches_are_joined():
    vae = linear_gaussian().as_vae()
    found = simulation_based_calibration(vae, 50, L, max_elements=7 * L * D)
    assert found.ranks.shape == (50, D)


# -------------------------------------------------------------------------------------------------------------- grid


def test_the_grid_holds_both_posteriors():
    lg = linear_gaussian()
    vae = lg.as_vae(diagonal=True)
    x = vae.sample(B).detach()
    found = posterior_on_grid(vae, x, limit=6.0, num_points=201)
    grid = torch.cartesian_prod(found.axis, found.axis)
    for b in range(B):
        exact = lg.posterior(x[b : b + 1]).log_prob(grid).exp().reshape(201, 201)
        torch.testing.assert_close(found.posterior[b], exact, rtol=0, atol=1e-6)
        mean = (found.posterior[b].sum(1) * found.axis).sum() * found.cell
        assert mean == pytest.approx(lg.posterior(x[b : b + 1]).mean[0, 0].item(), abs=1e-6), "z1 comes first"
    torch.testing.assert_close(found.posterior.sum((1, 2)) * found.cell, torch.ones(B))
    torch.testing.assert_close(found.log_evidence, lg.log_evidence(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.kl, torch.full((B,), lg.diagonal_gap()), rtol=0, atol=1e-5)


def test_the_gap_of_the_elbo_is_the_kl_on_the_grid():
    """On a nonlinear model: log p(x) - KL(q || posterior) = ELBO."""
    vae = bits_vae()
    x = (torch.rand(B, E) < 0.5).double()
    found = posterior_on_grid(vae, x, limit=7.0, num_points=201)
    torch.testing.assert_close(
        found.log_evidence, log_evidence_by_quadrature(vae.prior, vae.decoder, x, num_points=201)
    )
    bound = elbo(vae, x, 20_000)
    assert ((found.log_evidence - found.kl - bound.values).abs() < 4 * bound.errors).all()


def test_the_grid_needs_two_dimensions():
    vae = VAE(StandardNormal(3), Decoder(Mlp(3, E), Bernoulli()), DiagonalNormal(Mlp(E, 6)))
    with pytest.raises(ValueError, match=r"expected two latent dimensions, found event shape \(3,\): use NUTS"):
        posterior_on_grid(vae, torch.ones(B, E))


# -------------------------------------------------------------------------------------------------------------- NUTS


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_nuts_draws_from_the_posterior():
    lg = linear_gaussian()
    vae = lg.as_vae()
    x, state = vae.sample(1).detach(), torch.get_rng_state()
    z = posterior_by_nuts(vae, x, num_samples=150, warmup_steps=100)
    assert z.shape == (150, 1, D) and torch.equal(state, torch.get_rng_state())
    exact = lg.posterior(x)
    scale = exact.variance[0].sqrt()
    assert ((z.mean(0)[0] - exact.mean[0]).abs() < 5 * scale / math.sqrt(150 / 2)).all()
    assert ((z.std(0)[0] / scale).log().abs() < 0.4).all()


# ------------------------------------------------------------------------------------------ posterior predictive check


def test_a_predictive_check_finds_what_is_wrong():
    lg = linear_gaussian()
    vae = lg.as_vae()
    x = vae.sample(200).detach()
    right = posterior_predictive_check(vae, x, lambda x: x[:, 0], num_draws=50)
    assert 0.4 < right.mean() < 0.6 and ((right == 0) | (right == 1)).double().mean() < 0.1
    outliers = x.clone()
    outliers[:, 4] += 8.0
    assert posterior_predictive_check(vae, outliers, lambda x: x.amax(1), num_draws=50).mean() < 0.05
    ties = posterior_predictive_check(vae, x, lambda x: torch.zeros(len(x)), num_draws=3)
    assert ties.tolist() == [0.5] * 200


def test_refusals_and_state():
    vae, x = bits_vae(), torch.ones(B, E)
    for settings in ({"num_examples": 0}, {"num_draws": 0}):
        with pytest.raises(ValueError, match=r"expected num_\w+ >= 1, found 0"):
            simulation_based_calibration(vae, **settings)
    classes = VAE(priors.Bernoulli(D), Decoder(Mlp(D, E), Bernoulli()), discrete.Bernoulli(Mlp(E, D)))
    with pytest.raises(ValueError, match="expected a continuous z, found a discrete one"):
        simulation_based_calibration(classes)
    with pytest.raises(ValueError, match=r"expected statistic\(x\) of shape \(5,\), found \(5, 7\)"):
        posterior_predictive_check(vae, x, lambda x: x)
    state = torch.get_rng_state()
    simulation_based_calibration(vae, 3, L)
    posterior_predictive_check(vae, x, lambda x: x.sum(1), 3)
    assert torch.equal(state, torch.get_rng_state()) and vae.training
