"""Distributions on the sphere: normalisers and means against Bessel and Beta functions, draws, gradients, KL."""

import math

import pytest
import torch
from pyro.distributions import VonMises
from scipy import special
from torch.autograd import grad
from torch.distributions import kl_divergence

from pyro_vae import SphereUniform
from pyro_vae.spherical import OnSphere, PowerSpherical, VonMisesFisher
from pyro_vae.testing import check_distribution, check_prior

K, B = 3, 5
every_family = pytest.mark.parametrize("family", [VonMisesFisher, PowerSpherical])
DIMS = [2, 3, 4, 10, 101]
KAPPAS = [1e-6, 0.3, 2.0, 30.0, 1e4]


def direction(*shape, dtype=None):
    z = torch.randn(*shape, dtype=dtype)
    return z / z.norm(dim=-1, keepdim=True)


def log_area(dim):
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


def log_bessel(order, kappa):
    """Log I(kappa) - kappa, where scipy can: elsewhere by its expansion for large order."""
    value = special.ive(order, kappa)
    if value > 1e-200:
        return math.log(value)
    return (
        order * math.log(kappa / 2) - math.lgamma(order + 1) + math.log(special.hyp0f1(order + 1, kappa**2 / 4)) - kappa
    )


# Densities


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_von_mises_fisher_has_the_bessel_function_in_its_density_and_mean(float64, dim, kappa):
    q = VonMisesFisher(direction(dim), torch.tensor(kappa))
    z = direction(B, dim)
    order = dim / 2 - 1
    constant = order * math.log(kappa) - dim / 2 * math.log(2 * math.pi) - log_bessel(order, kappa)
    torch.testing.assert_close(q.log_prob(z), constant + kappa * (z @ q.loc - 1), rtol=1e-9, atol=1e-8)
    length = math.exp(log_bessel(order + 1, kappa) - log_bessel(order, kappa))
    torch.testing.assert_close(q.mean, length * q.loc, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_power_spherical_is_a_beta_distribution_along_the_mean(float64, dim, kappa):
    """Its density and mean, as in the paper's definition."""
    q = PowerSpherical(direction(dim), torch.tensor(kappa))
    z = direction(B, dim)
    alpha, beta = (dim - 1) / 2 + kappa, (dim - 1) / 2
    log_norm = (alpha + beta) * math.log(2) + beta * math.log(math.pi) + special.gammaln(alpha)
    log_norm -= special.gammaln(alpha + beta)
    torch.testing.assert_close(q.log_prob(z), kappa * (z @ q.loc).log1p() - log_norm, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(q.mean, (alpha - beta) / (alpha + beta) * q.loc, rtol=1e-12, atol=1e-12)


def test_the_circle_is_von_mises(float64):
    angle, centre, kappa = torch.linspace(-3, 3, 13), torch.tensor(0.7), torch.tensor(2.3)
    z = torch.stack([angle.cos(), angle.sin()], -1)
    q = VonMisesFisher(torch.stack([centre.cos(), centre.sin()]), kappa)
    torch.testing.assert_close(q.log_prob(z), VonMises(centre, kappa).log_prob(angle), rtol=1e-6, atol=1e-6)
    z = q.sample((20_000,))
    ours, theirs = torch.atan2(z[:, 1], z[:, 0]) - centre, VonMises(centre, kappa).sample((20_000,)) - centre
    for f in (torch.sin, torch.cos, lambda a: torch.cos(2 * a)):
        a, b = f(ours), f(theirs)
        assert abs(a.mean() - b.mean()) < 4 * math.sqrt((a.var() + b.var()) / 20_000)


@every_family
@pytest.mark.parametrize("dim", [2, 3, 7, 60])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 100.0, 1e5])
def test_single_precision(family, dim, kappa):
    """Draws of single precision, scored in both: closer than 2e-6 for each dimension, also where kappa is large."""
    q = family(direction(dim), torch.tensor(kappa))
    z = q.sample((50,))
    exact = family(q.loc.double() / q.loc.double().norm(), q.concentration.double())
    score = exact.log_prob(z.double() / z.double().norm(dim=-1, keepdim=True))
    assert z.dtype == q.log_prob(z).dtype == q.mean.dtype == q.entropy().dtype == torch.float32
    torch.testing.assert_close(q.log_prob(z).double(), score, rtol=1e-6, atol=2e-6 * dim)


@every_family
@pytest.mark.parametrize(("dim", "kappa"), [(2, 0.4), (2, 50.0), (3, 2.0), (3, 80.0), (5, 1.5), (20, 9.0)])
def test_samples_what_it_scores(float64, family, dim, kappa):
    q = family(direction(2, dim), torch.tensor([kappa, 1.3 * kappa]))
    check_distribution(q, batch_shape=(2,), event_shape=(dim,), dtype=torch.float64)


@pytest.mark.parametrize("latent_dim", [2, 3, 5, 12])
def test_uniform(latent_dim):
    check_prior(SphereUniform(latent_dim))


@pytest.mark.parametrize("latent_dim", [2, 3, 6])
def test_the_check_finds_a_wrong_concentration_and_a_wrong_direction(latent_dim):
    class Sharper(VonMisesFisher):
        def rsample(self, sample_shape=()):
            return VonMisesFisher(self.loc, 1.3 * self.concentration).rsample(sample_shape)

    class Turned(VonMisesFisher):
        def rsample(self, sample_shape=()):
            return super().rsample(sample_shape).roll(1, -1)

    class HalfMass(VonMisesFisher):
        def log_prob(self, value):
            return super().log_prob(value) - math.log(2)

    loc = direction(latent_dim, dtype=torch.float64)
    for wrong, message in ((Sharper, "score"), (Turned, "score"), (HalfMass, r"total mass 0\.(50|5|49)")):
        q = wrong(loc, torch.tensor(2.0).double(), torch.Size([]))
        with pytest.raises(AssertionError, match=message):
            check_distribution(q)


# Draws and their gradients


def quantiles(q, u):
    """The angle to the mean below which the share u lies, and its derivative in the concentration."""
    angle = q._angle(u)
    slopes = [grad(a, q.concentration, retain_graph=True)[0] for a in angle]
    return angle.detach(), torch.stack(slopes)


U = [1e-4, 0.01, 0.1, 0.4, 0.7, 0.95, 0.999]


@pytest.mark.parametrize("kappa", [0.1, 3.0, 500.0])
def test_angles_in_three_dimensions_have_a_closed_form(float64, kappa):
    """1 - cos(theta) = -log(1 - u (1 - exp(-2 kappa))) / kappa, and so has their derivative."""
    u, kappa = torch.tensor(U), torch.tensor(kappa).requires_grad_()
    expected = (1 + (1 - u * (1 - (-2 * kappa).exp())).log() / kappa).acos()
    slopes = torch.stack([grad(a, kappa, retain_graph=True)[0] for a in expected])
    found, ours = quantiles(VonMisesFisher(torch.eye(3)[0], kappa), u)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, slopes, rtol=2e-4, atol=0)


@pytest.mark.parametrize("dim", [3, 4, 11])
@pytest.mark.parametrize("kappa", [0.7, 3.0, 500.0])
def test_angles_of_the_power_spherical_are_those_of_a_beta_distribution(float64, dim, kappa):
    def exact(kappa):
        alpha, beta = (dim - 1) / 2 + kappa, (dim - 1) / 2
        far = special.betaincinv(beta, alpha, U)  # the share (1 - cos(theta)) / 2
        return 2 * torch.as_tensor(far).sqrt().asin()

    eps = 1e-4 * kappa
    slopes = (exact(kappa + eps) - exact(kappa - eps)) / (2 * eps)
    q = PowerSpherical(torch.eye(dim)[0], torch.tensor(kappa).requires_grad_())
    found, ours = quantiles(q, torch.tensor(U))
    torch.testing.assert_close(found, exact(kappa), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, slopes, rtol=2e-4, atol=0)


@every_family
@pytest.mark.parametrize("dim", [2, 3, 6, 40])
def test_the_gradient_in_the_concentration_is_that_of_the_expectation(float64, family, dim):
    """Along a midpoint rule in u the pathwise derivative adds up to dE cos(theta) / dkappa, the one of the mean."""
    for value in (0.9, 7.0, 300.0):
        kappa = torch.tensor(value).requires_grad_()
        q = family(torch.eye(dim)[0], kappa)
        u = (torch.arange(4000) + 0.5) / 4000
        mean = q._angle(u).cos().mean()
        torch.testing.assert_close(mean, q.mean[0], rtol=2e-4, atol=1e-6)
        (ours,), (expected,) = grad(mean, kappa), grad(q.mean[0], kappa)
        torch.testing.assert_close(ours, expected, rtol=5e-3, atol=0)


@every_family
def test_draws_and_scores_have_all_gradients(float64, family):
    """Of a smooth function of one draw in kappa and in the direction, against finite differences at the same noise."""
    raw, log_kappa = torch.randn(B, 4).requires_grad_(), torch.randn(B).requires_grad_()

    def f(raw, log_kappa):
        torch.manual_seed(5)
        q = family(raw / raw.norm(dim=-1, keepdim=True), log_kappa.exp())
        z = q.rsample()
        return z, q.log_prob(z), q.entropy(), q.mean

    assert torch.autograd.gradcheck(f, (raw, log_kappa), atol=1e-4, rtol=1e-3)


@every_family
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_mean_directions_along_an_axis_have_finite_gradients(float64, family, axis, sign):
    """A reflection that turns e_1 into the mean direction is undefined at e_1 itself; ours goes the other way round."""
    loc = (sign * torch.eye(3)[axis]).requires_grad_()
    z = family(loc, torch.tensor(4.0)).rsample((1000,))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(1000))
    assert abs((z @ loc).mean() - family(loc, torch.tensor(4.0)).mean.norm()) < 0.05
    gradient = grad(z.pow(2)[:, 1].sum(), loc)[0]
    assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e4


# Entropy and KL


@every_family
@pytest.mark.parametrize("dim", [2, 3, 8])
def test_kl_to_uniform_and_entropy(float64, family, dim):
    log_kappa = torch.tensor([-3.0, 0.5, 4.0]).requires_grad_()
    q, p = family(direction(dim), log_kappa.exp()), SphereUniform(dim)()
    kl = kl_divergence(q, p)
    torch.testing.assert_close(q.entropy() + kl, torch.full((3,), log_area(dim)))
    torch.testing.assert_close(kl_divergence(q.expand((K, 3)), p.expand((K, 3))), kl.expand(K, 3))
    z = q.sample((20_000,))
    ratio = q.log_prob(z) - p.log_prob(z)
    assert ((ratio.mean(0) - kl).abs() < 4 * ratio.std(0) / math.sqrt(20_000)).all() and (kl > 0).all()
    assert torch.autograd.gradcheck(lambda t: kl_divergence(family(q.loc, t.exp()), p), log_kappa)
    assert kl_divergence(p, p) == 0 and p.entropy() == pytest.approx(log_area(dim))


@every_family
def test_without_concentration_it_is_uniform(float64, family):
    q = family(direction(4), torch.tensor(1e-12))
    assert abs(q.kl_to_uniform()) < 1e-12 and q.mean.norm() < 1e-11
    torch.testing.assert_close(q.log_prob(direction(B, 4)), torch.full((B,), -log_area(4)))


# Shapes, types, refusals


@every_family
def test_shapes_and_expansion(float64, family):
    q = family(direction(B, 4), torch.rand(B) + 0.5)
    wide = q.expand((K, B))
    assert wide.batch_shape == (K, B) and wide.event_shape == (4,)
    z = wide.rsample((7,))
    assert z.shape == (7, K, B, 4) and wide.log_prob(z).shape == (7, K, B)
    assert wide.mean.shape == wide.mode.shape == (K, B, 4) and wide.entropy().shape == (K, B)
    assert torch.equal(wide.log_prob(z), q.log_prob(z)) and wide.log_prob(z[0, 0]).shape == (K, B)
    assert OnSphere(torch.zeros(3), (B,)).expand((K, B)).entropy().shape == (K, B)
    assert not torch.equal(z[0, 0], z[0, 1])
    assert torch.equal(q.mode, q.loc)
    one = family(direction(4), torch.rand(B) + 0.5)
    assert one.batch_shape == (B,) and one.sample().shape == (B, 4) and one.mode.shape == (B, 4)


@every_family
def test_refusals(family):
    with pytest.raises(ValueError, match="loc"):
        family(torch.ones(3), torch.tensor(1.0))
    with pytest.raises(ValueError, match="concentration"):
        family(direction(3), torch.tensor(-1.0))
    with pytest.raises(ValueError, match="within the support"):
        family(direction(3), torch.tensor(1.0)).log_prob(torch.ones(3))
