"""Likelihoods: closed forms, output_bias, state. Their distributions are checked in test_testing.py."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_vae import likelihoods
from pyro_vae.contracts import Likelihood

K, B, E = 3, 5, 7

MEMBERS = [
    likelihoods.Bernoulli,
    likelihoods.ContinuousBernoulli,
    lambda **options: likelihoods.Binomial(16, **options),
    likelihoods.Normal,
    likelihoods.HeteroscedasticNormal,
]


def test_bernoulli_is_minus_the_cross_entropy(float64):
    h, x = torch.randn(K, B, E), torch.randint(2, (B, E)).double()
    expected = -binary_cross_entropy_with_logits(h, x.expand(K, B, E), reduction="none").sum(-1)
    torch.testing.assert_close(likelihoods.Bernoulli()(h).log_prob(x), expected)


def test_normal_is_the_squared_error_and_a_constant(float64):
    h, x, scale = torch.randn(K, B, E), torch.randn(B, E), 0.3
    expected = -((x - h) ** 2).sum(-1) / (2 * scale**2) - E / 2 * math.log(2 * math.pi * scale**2)
    torch.testing.assert_close(likelihoods.Normal(scale).to(torch.float64)(h).log_prob(x), expected)


def test_a_learned_scale_settles_at_the_mean_squared_error(float64):
    h, x = torch.randn(B, E), torch.randn(B, E)
    rmse = ((x - h) ** 2).mean().sqrt()
    likelihood = likelihoods.Normal(rmse.item())
    likelihood(h).log_prob(x).sum().backward()
    assert abs(likelihood.log_scale.grad.item()) < 1e-10


def test_heteroscedastic_normal_by_hand(float64):
    h, x, floor = torch.randn(K, B, 2 * E), torch.randn(B, E), 0.05
    loc, s = h[..., :E], floor + (1 + h[..., E:].exp()).log()
    expected = (-((x - loc) ** 2) / (2 * s**2) - s.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(likelihoods.HeteroscedasticNormal(floor)(h).log_prob(x), expected)


def test_continuous_bernoulli_is_normalised_and_cross_entropy_is_not(float64):
    # torch replaces the constant by a Taylor polynomial near lambda = 1/2, good to some 1e-6
    x = torch.linspace(0, 1, 20_001).unsqueeze(-1)
    for logit in (-6.0, -1.0, -0.01, 0.0, 0.01, 2.0, 9.0):
        p = likelihoods.ContinuousBernoulli()(torch.tensor([logit]))
        mass = torch.trapezoid(p.log_prob(x).exp(), x.squeeze(-1)).item()
        assert abs(mass - 1) < 1e-5, logit
        cross_entropy = binary_cross_entropy_with_logits(torch.full_like(x, logit), x, reduction="none").squeeze(-1)
        assert torch.trapezoid((-cross_entropy).exp(), x.squeeze(-1)).item() < 0.51


def test_continuous_bernoulli_constant(float64):
    x = torch.tensor([0.3])
    half = likelihoods.ContinuousBernoulli()(torch.zeros(1)).log_prob(x) + math.log(2)  # log C(1/2) = log 2
    assert abs(half.item() - math.log(2)) < 1e-12
    lam = torch.tensor(0.2)
    constant = 2 * torch.atanh(1 - 2 * lam) / (1 - 2 * lam)
    expected = constant.log() + x * lam.log() + (1 - x) * (1 - lam).log()
    torch.testing.assert_close(likelihoods.ContinuousBernoulli()(lam.logit().reshape(1)).log_prob(x), expected[0])


def test_binomial_of_one_is_bernoulli_and_of_many_has_the_binomial_coefficient(float64):
    h, x = torch.randn(K, B, E), torch.randint(2, (B, E)).double()
    torch.testing.assert_close(likelihoods.Binomial(1)(h).log_prob(x), likelihoods.Bernoulli()(h).log_prob(x))
    p = torch.tensor(0.3)
    found = likelihoods.Binomial(16)(p.logit().reshape(1)).log_prob(torch.tensor([5.0]))
    expected = math.log(math.comb(16, 5)) + 5 * math.log(0.3) + 11 * math.log(0.7)
    assert abs(found.item() - expected) < 1e-10


@pytest.mark.parametrize("make", MEMBERS)
def test_output_bias_gives_the_mean(float64, make):
    likelihood: Likelihood = make(event_dim=3)
    data = torch.rand(50, 2, 4, 5) * getattr(likelihood, "total_count", 1)
    mean, scale = data.mean(0), data.std(0)
    bias = likelihood.output_bias(mean, scale)
    p = likelihood(bias.unsqueeze(0))
    assert p.event_shape == (2, 4, 5)
    torch.testing.assert_close(p.mean[0], mean, rtol=1e-6, atol=1e-6)
    if isinstance(likelihood, likelihoods.HeteroscedasticNormal):
        torch.testing.assert_close(p.stddev[0], scale)


@pytest.mark.parametrize("make", MEMBERS)
def test_output_bias_of_constant_data_is_finite(make):
    likelihood: Likelihood = make()
    for constant in (0.0, 1.0):
        assert likelihood.output_bias(torch.full((E,), constant), torch.zeros(E)).isfinite().all()


@pytest.mark.parametrize("make", MEMBERS)
def test_shapes_dtype_and_state(make):
    likelihood: Likelihood = make(event_dim=3)
    h = torch.randn(K, B, 2 * likelihood.num_outputs, 4, 6)
    p = likelihood(h)
    assert (p.batch_shape, p.event_shape) == ((K, B), (2, 4, 6))
    other = make(event_dim=3)
    for value in likelihood.state_dict().values():
        value.add_(0.3)
    other.load_state_dict(likelihood.state_dict())
    x = p.sample()
    assert torch.equal(other(h).log_prob(x), likelihood(h).log_prob(x))
    p = likelihood.to(torch.float64)(h.double())
    assert p.sample().dtype == p.log_prob(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("likelihood", "text"),
    [
        (likelihoods.Bernoulli(), "Bernoulli(event_dim=1)"),
        (likelihoods.ContinuousBernoulli(3), "ContinuousBernoulli(event_dim=3)"),
        (likelihoods.Binomial(16), "Binomial(total_count=16, event_dim=1)"),
        (likelihoods.Normal(0.5), "Normal(scale=0.5, learn_scale=True, event_dim=1)"),
        (likelihoods.HeteroscedasticNormal(0.05), "HeteroscedasticNormal(min_scale=0.05, event_dim=1)"),
    ],
)
def test_repr_shows_the_arguments(likelihood, text):
    assert repr(likelihood) == text


def test_a_fixed_scale_is_no_parameter_but_is_saved():
    fixed = likelihoods.Normal(0.5, learn_scale=False)
    assert not list(fixed.parameters()) and "log_scale" in fixed.state_dict()
    assert [p.numel() for p in likelihoods.Normal(0.5).parameters()] == [1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: likelihoods.Bernoulli(event_dim=0), "expected event_dim >= 1, found 0: 1 for vectors, 3 for images"),
        (lambda: likelihoods.Binomial(0), "expected total_count >= 1, found 0"),
        (lambda: likelihoods.Normal(0.0), "expected scale > 0, found 0.0"),
        (lambda: likelihoods.HeteroscedasticNormal(min_scale=-1.0), "expected min_scale > 0, found -1.0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_heteroscedastic_normal_refuses_unequal_halves():
    with pytest.raises(ValueError, match="expected 2 E outputs of the network, found 3 on axis -1"):
        likelihoods.HeteroscedasticNormal()(torch.zeros(B, 3))
    with pytest.raises(ValueError, match="found 3 on axis -3"):
        likelihoods.HeteroscedasticNormal(event_dim=3)(torch.zeros(B, 3, 4, 6))


def test_grey_pixels_are_refused_by_bernoulli():
    with pytest.raises(ValueError, match="within the support"):
        likelihoods.Bernoulli()(torch.zeros(B, E)).log_prob(torch.full((B, E), 0.37))
