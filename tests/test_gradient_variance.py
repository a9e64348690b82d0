"""Gradient noise: against exact variances, against quadrature, and the laws that were published about it."""

import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch import nn

from pyro_vae import ELBO, IWAE, VAE, Beta, Decoder, DiagonalNormal, Mlp, StandardNormal, likelihoods
from pyro_vae.exact import LinearGaussian
from pyro_vae.gradient_variance import (
    GradientMoments,
    gradient_variance,
    log_log_slope,
    pathwise_gradients,
    score_gradients,
    signal_to_noise,
    squared_norm_variances,
    tighter_bounds_toy,
)
from pyro_vae.gradients import DReG, ScoreFunction, StickingTheLanding
from pyro_vae.routes import EnergyEntropy, ReconstructionKL
from pyro_vae.schedules import Linear

B, D, E = 5, 2, 7

pytestmark = pytest.mark.usefixtures("float64")


def squared_norm(z):
    return z.square().sum(-1)


def assert_within_errors(estimate, exact, error, times=4.0):
    estimate, exact, error = (torch.as_tensor(t, dtype=torch.float64) for t in (estimate, exact, error))
    assert (error > 0).all()
    distance = ((estimate - exact) / error).abs().max().item()
    assert distance < times, f"{distance:.1f} standard errors away"


# ------------------------------------------------------------------------------------------ E |z|^2, exactly


@pytest.mark.parametrize("dim", [1, 2, 10, 50])
def test_exact_variances_of_pathwise_and_score(dim):
    torch.manual_seed(100 + dim)
    loc, num = torch.zeros(dim), 60_000
    estimators = {
        "pathwise": pathwise_gradients(squared_norm, loc, num),
        "score function": score_gradients(squared_norm, loc, num),
        "score function, baseline E f": score_gradients(squared_norm, loc, num, baseline=float(dim)),
    }
    exact = squared_norm_variances(dim)
    expected = {1: (4, 15, 10), 2: (4, 24, 12), 10: (4, 168, 28), 50: (4, 2808, 108)}[dim]
    assert tuple(exact.values()) == expected
    for name, gradients in estimators.items():
        assert gradients.shape == (num, dim)
        mean, variance = gradients.mean(0), gradients.var(0)
        assert_within_errors(mean, torch.zeros(dim), (variance / num).sqrt())
        fourth = (gradients - mean).pow(4).mean(0)
        assert_within_errors(variance, torch.full((dim,), exact[name]), ((fourth - variance**2) / num).sqrt())


@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_both_estimators_are_unbiased_away_from_the_optimum(baseline):
    torch.manual_seed(0)
    loc, num = torch.tensor([0.7, -1.2, 0.1]), 60_000
    for gradients in (
        pathwise_gradients(squared_norm, loc, num),
        score_gradients(squared_norm, loc, num, baseline),
    ):
        assert_within_errors(gradients.mean(0), 2 * loc, gradients.std(0) / math.sqrt(num))


def test_the_score_function_needs_no_derivative_of_f():
    torch.manual_seed(0)
    loc = torch.tensor([0.3])
    steps = score_gradients(lambda z: (z[:, 0] > 0).to(z), loc, 60_000)
    exact = math.exp(-0.5 * 0.3**2) / math.sqrt(2 * math.pi)  # the density of N(0.3, 1) at 0
    assert_within_errors(steps.mean(0), [exact], steps.std(0) / math.sqrt(len(steps)))
    with pytest.raises(RuntimeError, match="does not require grad"):
        pathwise_gradients(lambda z: (z[:, 0] > 0).to(z), loc, 3)


# ---------------------------------------------------------------------------------- sample() and rsample()


def test_sample_gives_no_gradient_where_rsample_does():
    encoder, decoder = DiagonalNormal(Mlp(E, 6, 2 * D)), Decoder(Mlp(D, 6, E), likelihoods.Normal())
    x = torch.randn(B, E)
    for draw, reaches in (("sample", False), ("rsample", True)):
        encoder.zero_grad(), decoder.zero_grad()
        decoder(getattr(encoder(x), draw)()).log_prob(x).sum().backward()
        assert all((p.grad is not None and bool(p.grad.any())) == reaches for p in encoder.parameters())
        assert all(p.grad is not None for p in decoder.net.parameters())


def test_the_kl_needs_no_draw_for_its_gradient():
    loc, scale = torch.randn(B, D, requires_grad=True), torch.rand(B, D).add(0.2).requires_grad_()
    state = torch.get_rng_state()
    kl = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(torch.zeros(B, D), 1.0)).sum()
    of_loc, of_scale = torch.autograd.grad(kl, [loc, scale])
    torch.testing.assert_close(of_loc, loc)
    torch.testing.assert_close(of_scale, scale - 1 / scale)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_reparameterised_draw_is_a_function_of_its_parameters():
    loc, scale = torch.tensor([0.4, -2.0], requires_grad=True), torch.tensor([0.3, 1.7], requires_grad=True)
    torch.manual_seed(1)
    z = dist.Normal(loc, scale).rsample()
    torch.manual_seed(1)
    noise = torch.randn(2)
    of_loc, of_scale = torch.autograd.grad(z.sum(), [loc, scale])
    torch.testing.assert_close((of_loc, of_scale), (torch.ones(2), noise))  # dz/dm = 1, dz/ds = eps
    assert torch.autograd.gradcheck(lambda m, s: (m + s * noise).pow(3), (loc, scale))
    draws = dist.Normal(loc[0], scale[0]).rsample((4000,)).detach().numpy()
    assert stats.kstest(draws, "norm", args=(0.4, 0.3)).pvalue > 0.01


# ------------------------------------------------------------------------- any objective, any model and guide


class NormalNormal(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1), q = N(loc, scale) for each of two x: Pyro's own test case for gradients."""

    x = (-0.5, 2.0)

    def __init__(self):
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        pyro.param("loc", self.loc), pyro.param("scale", self.scale)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc, self.scale))


def exact_moments(gradient):
    """Mean and variance of a function of one standard normal number, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    values = np.array([gradient(eps) for eps in nodes]).T  # [..., nodes]
    mean = values @ weights / weights.sum()
    return mean, (values - mean[..., None]) ** 2 @ weights / weights.sum()


@pytest.mark.parametrize("objective", [ELBO(), Trace_ELBO(), ELBO(num_particles=3)], ids=lambda o: type(o).__name__)
def test_means_and_variances_are_those_of_pyros_test_case(objective):
    """D log w / d loc = x - 2 z and d log w / d scale = (x - 2 z) eps + 1, at loc 0 and scale 1: two examples."""
    vae, x = NormalNormal(), torch.tensor(NormalNormal.x)
    repeats, particles = 500, objective.num_particles
    moments = gradient_variance(objective, vae, x, repeats)
    assert set(moments) == {"loc", "scale"}
    numbers = x.numpy()
    loc_mean, loc_variance = exact_moments(lambda eps: (numbers - 2 * eps) / 2)  # per example: half
    scale_mean, scale_variance = exact_moments(lambda eps: ((numbers - 2 * eps) * eps + 1) / 2)
    np.testing.assert_allclose(loc_mean, [-0.25, 1.0], atol=1e-12)  # Pyro: [0.5, -2] for the loss of both
    np.testing.assert_allclose(2 * scale_mean, [-1.0, -1.0], atol=1e-12)
    np.testing.assert_allclose(4 * loc_variance, [4.0, 4.0], atol=1e-9)
    np.testing.assert_allclose(4 * scale_variance, numbers**2 + 8, atol=1e-9)
    for name, mean, variance in (("loc", loc_mean, loc_variance), ("scale", scale_mean, scale_variance)):
        found = moments[name]
        assert_within_errors(found.mean, torch.tensor(mean), found.mean_error)
        assert_within_errors(found.total_variance, variance.sum() / particles, found.total_variance_error)
        assert found.variance.sum().item() == pytest.approx(found.total_variance)
        signal = np.linalg.norm(mean)
        assert_within_errors(found.signal, signal, found.signal_error)
        ratio = signal / math.sqrt(variance.sum() / particles)
        assert_within_errors(found.signal_to_noise, ratio, found.signal_to_noise_error)


@pytest.mark.parametrize("objective", [ScoreFunction(1, baseline="none"), ScoreFunction(1, baseline=-1.5)])
def test_the_score_functions_variance_by_quadrature(objective):
    vae, x = NormalNormal(), torch.tensor(NormalNormal.x)
    baseline = 0.0 if objective.baseline == "none" else objective.baseline
    found = gradient_variance(objective, vae, x, 500)["loc"]
    numbers = x.numpy()

    def gradient(eps):  # (log w - b) dlog q / d loc, with log q and log p(z) equal
        return (-0.5 * (numbers - eps) ** 2 - 0.5 * math.log(2 * math.pi) - baseline) * eps / 2

    mean, variance = exact_moments(gradient)
    np.testing.assert_allclose(mean, [-0.25, 1.0], atol=1e-12)  # the same gradient
    assert_within_errors(found.mean, torch.tensor(mean), found.mean_error)
    assert_within_errors(found.total_variance, variance.sum(), found.total_variance_error)


def test_pyros_score_function_is_measured_too():
    class NotReparameterised(NormalNormal):
        def guide(self, x):
            pyro.param("loc", self.loc), pyro.param("scale", self.scale)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.testing.fakes.NonreparameterizedNormal(self.loc, self.scale))

    x = torch.tensor(NormalNormal.x)
    found = gradient_variance(TraceGraph_ELBO(), NotReparameterised(), x, 150)["loc"]
    assert_within_errors(found.mean, x / 2, found.mean_error)
    pathwise = gradient_variance(ELBO(), NormalNormal(), x, 150)["loc"]
    assert found.total_variance > pathwise.total_variance + 4 * found.total_variance_error


def test_standard_errors_are_the_spread_of_repetitions():
    vae, x = NormalNormal(), torch.tensor(NormalNormal.x)
    runs = [gradient_variance(ELBO(), vae, x, 50, seed=s)["scale"] for s in range(40)]
    for name in ("total_variance", "signal_to_noise"):
        spread = torch.tensor([getattr(run, name) for run in runs]).std().item()
        claimed = torch.tensor([getattr(run, f"{name}_error") for run in runs]).mean().item()
        assert 0.6 < claimed / spread < 1.7


def make_vae():
    decoder = Decoder(Mlp(D, 6, E), likelihoods.Normal(0.5))
    return VAE(StandardNormal(D), decoder, DiagonalNormal(Mlp(E, 6, 2 * D)))


def test_forms_of_one_bound_have_one_gradient_and_different_noise():
    torch.manual_seed(2)
    vae, x = make_vae(), torch.randn(B, E)
    forms = [ELBO(), ReconstructionKL(), EnergyEntropy(), StickingTheLanding(), Trace_ELBO(), TraceMeanField_ELBO()]
    moments = [gradient_variance(form, vae, x, 150, seed=s)["encoder"] for s, form in enumerate(forms)]
    for a, b in pairwise(moments):
        assert_within_errors(a.mean, b.mean, torch.hypot(a.mean_error, b.mean_error).clamp(min=1e-12), times=4.5)
    joint, closed, pyro_joint, pyro_closed = (moments[i] for i in (0, 1, 4, 5))
    for ours, pyros in ((joint, pyro_joint), (closed, pyro_closed)):
        error = math.hypot(ours.total_variance_error, pyros.total_variance_error)
        assert_within_errors(ours.total_variance, pyros.total_variance, error)
    gap = joint.total_variance - closed.total_variance
    assert abs(gap) > 4 * math.hypot(joint.total_variance_error, closed.total_variance_error)


def test_at_the_exact_posterior_the_landing_is_silent():
    generator = torch.Generator().manual_seed(0)
    model = LinearGaussian(torch.randn(E, D, generator=generator), torch.randn(E, generator=generator), 0.5)
    vae, x = model.as_vae(), torch.randn(B, E, generator=generator)
    noisy, silent = (gradient_variance(o, vae, x, 30)["encoder"] for o in (ELBO(), StickingTheLanding()))
    assert silent.total_variance < 1e-20 < 1e-3 < noisy.total_variance
    assert silent.mean.abs().max() < 1e-10


def test_nothing_is_changed():
    vae, x = make_vae().train(), torch.randn(B, E)
    vae.decoder.likelihood.requires_grad_(False)
    ELBO().loss_and_grads(vae.model, vae.guide, x)
    before = {name: (p.detach().clone(), p.grad) for name, p in vae.named_parameters()}
    state, store = torch.get_rng_state(), dict(pyro.get_param_store().items())
    objective = Beta(beta=Linear(steps=10, start=0.5))
    for chosen in (objective, Trace_ELBO()):
        first = gradient_variance(chosen, vae, x, 5, seed=3)
        again = gradient_variance(chosen, vae, x, 5, seed=3)
        assert torch.equal(first["encoder"].mean, again["encoder"].mean)
        assert set(first) == {"encoder", "decoder"}
    assert int(objective.step) == 0
    assert vae.training and torch.equal(torch.get_rng_state(), state)
    assert dict(pyro.get_param_store().items()).keys() == store.keys()
    for name, p in vae.named_parameters():
        value, gradient = before[name]
        assert torch.equal(p, value) and p.grad is gradient
    assert "decoder.likelihood.log_scale" not in first


def test_moments_of_given_gradients():
    gradients = torch.randn(4, 3) + torch.tensor([1.0, 0.0, 2.0])
    moments = GradientMoments(
        "encoder", gradients.mean(0), gradients.var(0), 4, gradients, gradients.square().sum(1), torch.ones(4)
    )
    assert moments.total_variance == pytest.approx(gradients.var(0).sum().item())
    corrected = gradients.mean(0).square().sum() - gradients.var(0).sum() / 4
    assert moments.signal == pytest.approx(corrected.sqrt().item())
    assert moments.signal_to_noise == pytest.approx((corrected / gradients.var(0).sum()).sqrt().item())
    noise = gradients - gradients.mean(0)  # no signal at all
    hidden = GradientMoments("encoder", noise.mean(0), noise.var(0), 4, noise, noise.square().sum(1), torch.ones(4))
    assert hidden.signal == hidden.signal_to_noise == 0.0


# --------------------------------------------------------------------------- tighter bounds, noisier encoder


def test_signal_to_noise_falls_for_the_encoder_and_grows_for_the_model():
    """Rainforth et al.: slopes -1/2 and +1/2 under the IWAE bound; Tucker et al.: DReG undoes the first."""
    vae, x = tighter_bounds_toy(dim=5, num_examples=40, distance=0.05)
    sizes, repeats = (16, 64, 256), 60
    iwae = [gradient_variance(IWAE(num_particles=k), vae, x, repeats, seed=1) for k in sizes]
    dreg = [gradient_variance(DReG(num_particles=k), vae, x, repeats, seed=2) for k in sizes]
    for plain, double in zip(iwae, dreg, strict=True):  # one gradient
        a, b = plain["encoder"], double["encoder"]
        assert_within_errors(a.mean, b.mean, torch.hypot(a.mean_error, b.mean_error), times=4.5)
    points = {
        "encoder, IWAE": [signal_to_noise(b["encoder"], a["encoder"]) for a, b in zip(iwae, dreg, strict=True)],
        "encoder, DReG": [(m["encoder"].signal_to_noise, m["encoder"].signal_to_noise_error) for m in dreg],
        "model, IWAE": [(m["prior"].signal_to_noise, m["prior"].signal_to_noise_error) for m in iwae],
    }
    slopes = {name: log_log_slope(sizes, *zip(*found, strict=True)) for name, found in points.items()}
    for name, exact in (("encoder, IWAE", -0.5), ("encoder, DReG", 0.5), ("model, IWAE", 0.5)):
        slope, error = slopes[name]
        assert error < 0.03
        assert abs(slope - exact) < 4 * error, (name, slope, error)  # an asymptotic law, seen from K = 16 on


def test_the_toy_is_where_it_should_be():
    vae, x = tighter_bounds_toy(dim=4, num_examples=9, distance=0.0, seed=3)
    assert x.shape == (9, 4) and x.dtype == torch.float64
    posterior = LinearGaussian(torch.eye(4), vae.prior.loc.detach(), 1.0).posterior(x)  # of z - mu
    torch.testing.assert_close(vae.encode(x).mean, posterior.mean + vae.prior.loc)
    torch.testing.assert_close(vae.encode(x).variance, torch.full((9, 4), 2 / 3))
    torch.testing.assert_close(vae.prior.loc, x.mean(0))
    state = torch.get_rng_state()
    off, _ = tighter_bounds_toy(dim=4, num_examples=9, distance=0.1, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.02 < (off.encoder.bias - vae.encoder.bias).abs().mean() < 0.3


def test_slopes():
    sizes = torch.tensor([1.0, 3.0, 10.0, 30.0])
    slope, error = log_log_slope(sizes.tolist(), (2 * sizes**0.7).tolist(), (0.1 * sizes**0.7).tolist())
    design = torch.stack([torch.ones(4), sizes.log()], 1)
    assert slope == pytest.approx(0.7)
    assert error == pytest.approx((torch.linalg.inv(design.T @ design)[1, 1].sqrt() * 0.05).item())
    # A bad point with a large error counts for little.
    assert log_log_slope([1, 2, 4], [1.0, 2.0, 100.0], [1e-3, 1e-3, 1e3])[0] == pytest.approx(1.0, abs=1e-3)


def test_refusals():
    vae, x = make_vae(), torch.randn(B, E)
    for repeats in (2, 2.5, True):
        with pytest.raises(ValueError, match="expected repeats to be an integer >= 3"):
            gradient_variance(ELBO(), vae, x, repeats)
    with pytest.raises(ValueError, match="found none that require gradients"):
        gradient_variance(ELBO(), make_vae().requires_grad_(False), x)
    for sizes, values in (([1], [1.0]), ([1, 2], [1.0, 0.0])):
        with pytest.raises(ValueError, match="expected at least two points, all positive"):
            log_log_slope(sizes, values, [1.0] * len(sizes))
