"""The cloud of codes, against draws whose shape is known."""

import math

import pytest
import torch

from pyro_vae.clouds import (
    Ball,
    ball,
    ball_sites,
    fit_mixture,
    fit_normal,
    gap_statistic,
    isotropy,
    prior_radius,
)

pytestmark = pytest.mark.usefixtures("float64")
N, D = 500, 3
CORRELATED = torch.tensor([[2.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.3, -0.2, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_the_ball_holds_exactly_its_share(share):
    z = torch.randn(N, D) + 3
    found = ball(z, share)
    assert torch.allclose(found.centre, z.mean(0))
    assert int(found.contains(z).sum()) == math.ceil(share * N)
    assert not bool(Ball(found.centre, 0.999999 * found.radius).contains(z).sum() == math.ceil(share * N))
    with pytest.raises(ValueError, match="0 < share <= 1"):
        ball(z, 0.0)


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_the_prior_s_radius_is_the_quantile_of_its_draws(dim):
    z, share = torch.randn(100_000, dim), 0.99
    inside = (z.norm(dim=1) <= prior_radius(dim, share)).double()
    assert abs(inside.mean() - share) < 4 * math.sqrt(share * (1 - share) / len(z))
    assert prior_radius(2) == pytest.approx(math.sqrt(-2 * math.log(0.01)))


def test_the_lattice_is_inscribed_in_the_circle_and_reads_from_the_top_left():
    found = Ball(torch.tensor([1.0, -2.0, 5.0]), 3.0)
    z = found.lattice(15)
    assert z.shape == (225, 3) and bool(Ball(found.centre, 3.0 + 1e-9).contains(z).all())
    corners = z[[0, 14, 210, 224]] - found.centre
    assert torch.allclose(corners.norm(dim=1), torch.full((4,), 3.0))
    assert torch.allclose(corners[:, :2].sign(), torch.tensor([[-1.0, 1], [1, 1], [-1, -1], [1, -1]]))
    assert torch.allclose(z[:, 2], torch.tensor(5.0)) and torch.allclose(z[112], found.centre)
    assert torch.allclose(z[1] - z[0], torch.tensor([6 / math.sqrt(2) / 14, 0.0, 0.0]))
    with pytest.raises(ValueError, match="found 1: choose a larger num"):
        found.lattice(1)


def test_the_plane_is_any_two_axes_or_directions():
    found = Ball(torch.tensor([1.0, -2.0, 5.0]), 2.0)
    assert torch.allclose(found.lattice(3, plane=(2, 0))[:, 1], torch.tensor(-2.0))
    assert torch.allclose(found.lattice(3, plane=(2, 0))[2], torch.tensor([1 + 2**0.5, -2.0, 5 + 2**0.5]))
    u, v = torch.linalg.qr(torch.randn(3, 2))[0].T
    z = found.lattice(4, plane=(u, v)) - found.centre
    assert torch.linalg.matrix_rank(torch.cat([z, u[None], v[None]]), atol=1e-9) == 2
    assert torch.allclose(z[3], 2**0.5 * (u + v))
    with pytest.raises(ValueError, match="orthonormal"):
        found.lattice(4, plane=(u, u))
    with pytest.raises(ValueError, match="axes from 0 to 2, found 3"):
        found.lattice(4, plane=(0, 3))


def test_off_the_plane_the_sites_have_the_centre_s_part_or_zero():
    found = Ball(torch.tensor([1.0, -2.0, 5.0]), 2.0)
    at_centre, at_zero = (found.lattice(5, fill=fill) for fill in ("centre", "zero"))
    assert torch.allclose(at_centre[:, :2], at_zero[:, :2])
    assert torch.allclose(at_zero[:, 2], torch.tensor(0.0)) and torch.allclose(at_centre[:, 2], torch.tensor(5.0))
    flat = Ball(torch.tensor([1.0, -2.0, 0.0]), 2.0)  # the same just where the centre is zero there
    assert torch.allclose(flat.lattice(5, fill="centre"), flat.lattice(5, fill="zero"))
    with pytest.raises(ValueError, match="'centre' or 'zero'"):
        found.lattice(5, fill="one")


def test_sites_on_the_circle():
    found = Ball(torch.tensor([1.0, -2.0, 5.0]), 2.0)
    z = found.circle(8)
    assert torch.allclose((z - found.centre).norm(dim=1), torch.full((8,), 2.0))
    assert torch.allclose(z[2], torch.tensor([1.0, 0.0, 5.0]))


def test_normal_draws_look_normal_whatever_their_units():
    found = isotropy(torch.randn(2000, D) @ CORRELATED.T + 7)
    eigenvalues = torch.linalg.eigvalsh(CORRELATED @ CORRELATED.T)
    assert abs(found.ratio.value - eigenvalues[-1] / eigenvalues[0]) < 4 * found.ratio.standard_error
    assert abs(found.kurtosis.value - 1) < 4 * math.sqrt(8 / (D * (D + 2) * 2000))
    assert found.skewness.value < 4 * D * (D + 1) * (D + 2) / 2000
    assert min(found.p_skewness, found.p_kurtosis) > 1e-4


def test_the_p_values_of_normal_draws_are_uniform():
    found = [isotropy(torch.randn(400, 2), num_groups=2) for _ in range(200)]
    for name in ("p_skewness", "p_kurtosis"):
        values = torch.tensor([getattr(each, name) for each in found])
        assert abs(values.mean() - 0.5) < 0.1 and float((values < 0.05).double().mean()) < 0.12


def test_mardia_s_numbers_by_their_double_sums():
    z = torch.randn(40, 2).exp()
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(z.T, correction=0)), (z - z.mean(0)).T, upper=False
    )
    products = white.T @ white
    found = isotropy(z)
    assert found.skewness.value == pytest.approx((products**3).mean().item())
    assert found.kurtosis.value == pytest.approx((products.diagonal() ** 2).mean().item() / 8)
    assert found.p_skewness < 1e-4 and "were it normal" in str(found)


def test_the_jackknife_errors_are_those_of_fresh_draws():
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)  # at a ratio of 1, its smallest value, no such error holds
    found = [isotropy(scale * torch.randn(400, 2).sinh()).ratio for _ in range(60)]
    values, errors = (torch.tensor([getattr(each, name) for each in found]) for name in ("value", "standard_error"))
    assert 0.7 < errors.square().mean().sqrt() / values.std() < 1.4


def test_a_flat_cloud_is_refused():
    with pytest.raises(ValueError, match="found a plane"):
        isotropy(torch.randn(N, 2)[:, [0, 1, 1]])
    with pytest.raises(ValueError, match="more codes than dimensions"):
        isotropy(torch.randn(3, 3))


def test_the_fitted_normal_has_the_codes_moments():
    z = torch.randn(N, D) @ CORRELATED.T + 7
    p = fit_normal(z)
    assert p.event_shape == (D,) and p.sample((5,)).shape == (5, D)
    assert torch.allclose(p.mean, z.mean(0)) and torch.allclose(p.covariance_matrix, torch.cov(z.T))
    with pytest.raises(ValueError, match="more codes than dimensions"):
        fit_normal(z[:3])


def test_the_fitted_mixture_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 20.0]])
    place = torch.arange(600) % 6 // 2  # as many of each
    z = centres[place] + torch.randn(600, 2)
    p = fit_mixture(z, 3)
    order = p.component_distribution.mean.norm(dim=1).argsort()
    assert torch.allclose(p.component_distribution.mean[order], centres, atol=4 / math.sqrt(200) * 1.5)
    assert torch.allclose(p.mixture_distribution.probs, torch.full((3,), 1 / 3), atol=1e-3)
    assert p.log_prob(z).mean() > fit_normal(z).log_prob(z).mean() + 1
    assert torch.allclose(fit_mixture(z, 1).log_prob(z), fit_normal(z).log_prob(z), atol=0.05)
    with pytest.raises(ValueError, match="1 to N components"):
        fit_mixture(z, 601)


def test_gap_statistic_counts_the_sites_without_a_code():
    codes = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    sites = torch.tensor([[0.5, 0.0], [5.0, 0.0], [10.0, 0.9], [10.0, 1.1]])
    found = gap_statistic(codes, sites, 1.0, policy="toy")
    assert found.values.tolist() == [0, 1, 0, 1] and found.policy == "toy"
    assert found.standard_error == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    with pytest.raises(ValueError, match="radius > 0"):
        gap_statistic(codes, sites, 0.0)


def test_uniform_codes_leave_the_holes_of_a_poisson_process():
    # n codes in a disk of radius 1: a site away from its edge has none within r with probability exp(-n r^2).
    n, r = 2000, 0.02
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    codes = ball_sites(corners, n, share=1.0, seed=1)
    sites = 0.95 * ball_sites(corners, 5000, share=1.0, seed=2)
    found = gap_statistic(codes, sites, r)
    assert abs(found.mean - math.exp(-n * r**2)) < 4 * 2 * found.standard_error  # neighbouring sites share their hole


def test_ball_sites_fill_the_ball_evenly():
    codes = torch.randn(1000, 3) + 2
    sites = ball_sites(codes, 20_000, share=0.9)
    radius = (codes - codes.mean(0)).norm(dim=1).quantile(0.9)
    share = ((sites - codes.mean(0)).norm(dim=1) / radius) ** 3  # uniform on [0, 1] in three dimensions
    assert float(share.max()) <= 1 + 1e-9
    assert abs(float(share.mean()) - 0.5) < 4 / math.sqrt(12 * 20_000)
    assert torch.equal(sites, ball_sites(codes, 20_000, share=0.9))


def test_nothing_touches_the_random_state():
    state = torch.get_rng_state()
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    ball_sites(z, 10)
    isotropy(z)
    fit_mixture(z, 2)
    assert torch.equal(torch.get_rng_state(), state)
