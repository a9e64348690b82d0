"""Likelihoods of pixel levels: masses, logistic densities, bits, start at the data, support."""

import math

import pytest
import torch
from scipy import integrate, stats

from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, fit, pixels
from pyro_vae.contracts import Likelihood
from pyro_vae.dry_run import check_vae
from pyro_vae.supports import check_support
from pyro_vae.testing import check_likelihood

K, B, E = 3, 5, 7

MEMBERS = [pixels.Categorical, pixels.DiscretizedLogistic, pixels.DiscretizedLogisticMixture]


@pytest.mark.parametrize("event", [(3,), (2, 1, 2)], ids=["vectors", "images"])
@pytest.mark.parametrize("num_levels", [2, 9, 256])
@pytest.mark.parametrize("make", MEMBERS)
def test_contract(make, num_levels, event):
    likelihood: Likelihood = make(num_levels=num_levels, event_dim=len(event))
    check_likelihood(likelihood, 1.5 * torch.randn(B, likelihood.num_outputs * event[0], *event[1:]))


@pytest.mark.parametrize("make", MEMBERS)
def test_shapes_dtype_and_expand(make):
    likelihood: Likelihood = make(num_levels=9, event_dim=3)
    h = torch.randn(K, B, 2 * likelihood.num_outputs, 4, 6)
    p = likelihood(h)
    assert (p.batch_shape, p.event_shape) == ((K, B), (2, 4, 6))
    x = p.sample()
    assert torch.equal(p.expand((2, K, B)).log_prob(x), p.log_prob(x).expand(2, K, B))
    assert p.mean.shape == p.variance.shape == x.shape
    assert not list(likelihood.parameters())
    p = likelihood.to(torch.float64)(h.double())
    assert p.sample().dtype == p.log_prob(x.double()).dtype == p.mean.dtype == torch.float64


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_masses_sum_to_one_at_every_scale(dtype, tolerance):
    loc = torch.linspace(-20, 280, 101, dtype=dtype).unsqueeze(-1)
    for exponent in torch.linspace(-3, 3, 25):
        log_scale = torch.full_like(loc, float(exponent) * math.log(10))
        p = pixels.LogisticLevels(torch.zeros_like(loc), loc, log_scale, 256)
        log_p = p.log_prob(p.enumerate_support())
        assert bool(log_p.isfinite().all())
        assert (log_p.exp().sum(0) - 1).abs().max() < tolerance


def test_a_mass_in_single_precision_keeps_its_digits_however_small():
    loc, log_scale = 300 * torch.rand(200, 1), torch.linspace(-7, 7, 200).unsqueeze(-1)
    x = torch.randint(256, (200,)).float()
    found = pixels.LogisticLevels(torch.zeros(200, 1), loc, log_scale, 256).log_prob(x)
    exact = pixels.LogisticLevels(torch.zeros(200, 1).double(), loc.double(), log_scale.double(), 256).log_prob(
        x.double()
    )
    assert exact.min() < -1e4 and bool(found.isfinite().all())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_a_mass_is_the_integral_of_the_logistic_density(float64, scale):
    loc = 4.3
    p = pixels.LogisticLevels(torch.zeros(1), torch.tensor([loc]), torch.tensor([scale]).log(), 9)
    density = stats.logistic(loc, scale).pdf
    for x in range(9):
        low, high = x - 0.5 if x else loc - 800 * scale, x + 0.5 if x < 8 else loc + 800 * scale
        peak = [min(max(loc + k * scale, low), high) for k in (-30, 0, 30)]
        expected = integrate.quad(density, low, high, points=peak, limit=500, epsabs=1e-14)[0]
        assert abs(p.log_prob(torch.tensor(float(x))).exp().item() - expected) < 1e-10


def test_discretized_logistic_outputs_are_half_ranges_around_the_middle(float64):
    h, x = torch.randn(K, B, 2 * E), torch.randint(256, (B, E)).double()
    p = pixels.LogisticLevels(
        torch.zeros(K, B, E, 1),
        127.5 * (1 + h[..., :E, None]),
        (127.5 * h[..., E:, None].exp()).log(),
        256,
    )
    torch.testing.assert_close(pixels.DiscretizedLogistic()(h).log_prob(x), p.log_prob(x).sum(-1))


def test_a_mixture_of_equal_parts_is_one_and_of_unequal_ones_their_average(float64):
    x = torch.randint(9, (B, E)).double()
    parts = torch.randn(2, 2, B, E)  # loc and raw scale of two components
    one, two = (pixels.DiscretizedLogistic(9)(part.transpose(0, 1).reshape(B, 2 * E)).base_dist for part in parts)
    weight = torch.randn(B, E)
    h = torch.cat([weight, torch.zeros(B, E), parts[0, 0], parts[1, 0], parts[0, 1], parts[1, 1]], dim=-1)
    found = pixels.DiscretizedLogisticMixture(2, 9)(h).log_prob(x)
    w = weight.sigmoid()
    expected = (w * one.log_prob(x).exp() + (1 - w) * two.log_prob(x).exp()).log().sum(-1)
    torch.testing.assert_close(found, expected)
    alone = torch.cat([weight, parts[0, 0], parts[0, 1]], dim=-1)
    torch.testing.assert_close(pixels.DiscretizedLogisticMixture(1, 9)(alone).log_prob(x), one.log_prob(x).sum(-1))


def test_categorical_is_minus_the_cross_entropy(float64):
    h, x = torch.randn(B, 9, 2, 4, 6), torch.randint(9, (B, 2, 4, 6))
    expected = -torch.nn.functional.cross_entropy(h, x, reduction="none").sum((1, 2, 3))
    found = pixels.Categorical(9, event_dim=3)(h.flatten(1, 2)).log_prob(x.double())
    torch.testing.assert_close(found, expected)


def test_a_uniform_guess_of_bytes_costs_eight_bits(float64):
    x = torch.randint(256, (B, E)).double()
    uniform = -pixels.Categorical(256)(torch.zeros(B, 256 * E)).log_prob(x) / (E * math.log(2))
    torch.testing.assert_close(uniform, torch.full((B,), 8.0))


@pytest.mark.parametrize("make", MEMBERS)
def test_mean_and_variance_by_enumeration(float64, make):
    likelihood: Likelihood = make(num_levels=9)
    p = likelihood(2 * torch.randn(K, B, E * likelihood.num_outputs)).base_dist
    levels = p.enumerate_support()
    mass = p.log_prob(levels).exp()
    torch.testing.assert_close(p.mean, (mass * levels).sum(0))
    torch.testing.assert_close(p.variance, (mass * (levels - p.mean) ** 2).sum(0))


@pytest.mark.parametrize("make", MEMBERS)
def test_output_bias_gives_the_mean_and_about_the_scale(float64, make):
    likelihood: Likelihood = make(event_dim=3)
    mean = 255 * torch.rand(2, 4, 5)
    scale = torch.rand(2, 4, 5) * torch.minimum(mean, 255 - mean) + 3
    p = likelihood(likelihood.output_bias(mean, scale).unsqueeze(0))
    assert p.event_shape == (2, 4, 5)
    torch.testing.assert_close(p.mean[0], mean.clamp(0.255, 254.745), rtol=1e-6, atol=1e-6)
    ratio = (p.stddev[0] / scale).median()
    assert 0.7 < ratio < 1.4
    for constant in (0.0, 255.0):
        bias = likelihood.output_bias(torch.full((2, 4, 5), constant), torch.zeros(2, 4, 5))
        p = likelihood(bias.unsqueeze(0).float())
        assert bool(bias.isfinite().all()) and (p.mean - constant).abs().max() < 0.3


@pytest.mark.parametrize("make", MEMBERS)
def test_values_that_are_no_levels_are_refused(make):
    likelihood: Likelihood = make(num_levels=256)
    p = likelihood(torch.zeros(B, E * likelihood.num_outputs))
    good = torch.randint(256, (B, E)).float()
    check_support(p, good)
    for bad in (256.0, -1.0, 0.37):
        x = good.clone()
        x[3, 2] = bad
        with pytest.raises(ValueError, match=rf"outside the integers 0..255 \(found {bad:.4g}\)"):
            check_support(p, x)
        with pytest.raises(ValueError, match="within the support"):
            p.log_prob(x)


@pytest.mark.parametrize("make", MEMBERS)
def test_fit_takes_two_epochs_and_moves_everything(make):
    likelihood: Likelihood = make(num_levels=16)
    vae = VAE(
        StandardNormal(2), Decoder(Mlp(2, 8, E * likelihood.num_outputs), likelihood), DiagonalNormal(Mlp(E, 8, 4))
    )
    x = torch.randint(16, (40, E)).float()
    vae.decoder.start_at_data(x)
    check_vae(vae, x)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    history = fit(vae, x, epochs=2, batch_size=16, lr=0.01)
    assert all(math.isfinite(value) for value in history["elbo"])
    stuck = [name for name, value in vae.named_parameters() if torch.equal(value, before[name])]
    assert not stuck


@pytest.mark.parametrize("make", MEMBERS)
def test_gradients_are_finite_at_extreme_outputs(make):
    likelihood: Likelihood = make()
    h = (100 * torch.randn(B, E * likelihood.num_outputs)).requires_grad_()
    x = torch.randint(256, (B, E)).float()
    x[0], x[1] = 0.0, 255.0
    log_px = likelihood(h).log_prob(x)
    log_px.sum().backward()
    assert bool(log_px.isfinite().all()) and bool(h.grad.isfinite().all())


@pytest.mark.parametrize(
    ("likelihood", "text"),
    [
        (pixels.Categorical(), "Categorical(num_levels=256, event_dim=1)"),
        (pixels.DiscretizedLogistic(16, 3), "DiscretizedLogistic(num_levels=16, event_dim=3)"),
        (
            pixels.DiscretizedLogisticMixture(5),
            "DiscretizedLogisticMixture(num_components=5, num_levels=256, event_dim=1)",
        ),
    ],
)
def test_repr_shows_the_arguments(likelihood, text):
    assert repr(likelihood) == text


def test_refusals():
    for make in MEMBERS:
        with pytest.raises(ValueError, match=r"expected num_levels >= 2, found 1: levels are 0..num_levels-1"):
            make(num_levels=1)
    with pytest.raises(ValueError, match="expected num_components >= 1, found 0: 1 is DiscretizedLogistic"):
        pixels.DiscretizedLogisticMixture(0)
    with pytest.raises(
        ValueError, match=r"DiscretizedLogistic expected 2 E outputs .* found 3 on axis -1: .* twice as"
    ):
        pixels.DiscretizedLogistic()(torch.zeros(B, 3))
    with pytest.raises(ValueError, match=r"Categorical expected 4 E outputs .* found 6 on axis -3: .* 4 times as wide"):
        pixels.Categorical(4, event_dim=3)(torch.zeros(B, 6, 2, 2))
