"""Likelihoods of counts: closed forms, start at the data, support."""

import math

import pytest
import torch
from pyro import distributions as dist
from scipy import stats

from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, counts, fit
from pyro_vae.contracts import Likelihood
from pyro_vae.dry_run import check_vae
from pyro_vae.supports import check_support
from pyro_vae.testing import check_likelihood

K, B, E = 3, 5, 7

SINGLE = [
    counts.Poisson,
    counts.NegativeBinomial,
    counts.ZeroInflatedPoisson,
    counts.ZeroInflatedNegativeBinomial,
]
MEMBERS = [*SINGLE, lambda **options: counts.Multinomial(9, **options)]


@pytest.mark.parametrize("event", [(3,), (2, 1, 2)], ids=["vectors", "images"])
@pytest.mark.parametrize("make", MEMBERS)
def test_contract(make, event):
    likelihood: Likelihood = make(event_dim=len(event))
    check_likelihood(likelihood, torch.randn(B, likelihood.num_outputs * event[0], *event[1:]))


@pytest.mark.parametrize("make", MEMBERS)
def test_shapes_dtype_and_expand(make):
    likelihood: Likelihood = make(event_dim=3)
    h = torch.randn(K, B, 2 * likelihood.num_outputs, 4, 6)
    p = likelihood(h)
    assert (p.batch_shape, p.event_shape) == ((K, B), (2, 4, 6))
    x = p.sample()
    assert torch.equal(p.expand((2, K, B)).log_prob(x), p.log_prob(x).expand(2, K, B))
    assert p.mean.shape == p.variance.shape == x.shape
    assert not list(likelihood.parameters())
    p = likelihood.to(torch.float64)(h.double())
    assert p.sample().dtype == p.log_prob(x.double()).dtype == p.mean.dtype == torch.float64


def _inflated(log_p, x, gate):
    return torch.where(x == 0, (gate + (1 - gate) * log_p.exp()).log(), (1 - gate).log() + log_p)


def test_single_counts_against_scipy(float64):
    h, x = torch.randn(K, B, 3 * E), torch.randint(4, (B, E)).double()
    first, second, third = h.chunk(3, dim=-1)
    mean, count = first.exp().numpy(), second.exp().numpy()
    poisson = torch.as_tensor(stats.poisson.logpmf(x.numpy(), mean))
    negative = torch.as_tensor(stats.nbinom.logpmf(x.numpy(), count, count / (count + mean)))
    two = torch.cat([first, third], dim=-1)
    for likelihood, outputs, expected in (
        (counts.Poisson(), first, poisson),
        (counts.NegativeBinomial(), h[..., : 2 * E], negative),
        (counts.ZeroInflatedPoisson(), two, _inflated(poisson, x, third.sigmoid())),
        (counts.ZeroInflatedNegativeBinomial(), h, _inflated(negative, x, third.sigmoid())),
    ):
        torch.testing.assert_close(likelihood(outputs).log_prob(x), expected.sum(-1))


def test_multinomial_against_scipy_and_its_total_is_over_the_whole_picture(float64):
    h = torch.randn(B, 2, 1, 3)
    p = counts.Multinomial(9, event_dim=3)(h)
    x = p.sample()
    assert torch.equal(x.sum((1, 2, 3)), torch.full((B,), 9.0))
    probs = h.flatten(1).softmax(-1)
    expected = [stats.multinomial.logpmf(a.numpy(), 9, b.numpy()) for a, b in zip(x.flatten(1), probs, strict=True)]
    torch.testing.assert_close(p.log_prob(x), torch.tensor([float(e) for e in expected]))
    torch.testing.assert_close(p.mean.flatten(1), 9 * probs)


def test_pyros_multinomial_sums_to_more_than_one(float64):
    """Why there is one of our own: Pyro's scores every vector with a smaller total as if it were an outcome."""
    p = dist.Multinomial(2, logits=torch.zeros(2))
    smaller = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert p.log_prob(smaller).exp().sum() > 1.9
    with pytest.raises(ValueError, match="within the support"):
        counts.Multinomial(2)(torch.zeros(2)).log_prob(smaller)
    with pytest.raises(AssertionError, match="total mass 10, expected 1"):
        check_likelihood(lambda h: dist.Multinomial(9, logits=h), torch.randn(B, 3))


def test_zero_inflated_scores_the_same_before_and_after_a_draw():
    """Pyro's own scores with the rounded gate after a draw."""
    h, x = torch.tensor([0.0, 25.0]), torch.tensor([3.0])
    ours, pyros = counts.ZeroInflatedPoisson()(h), dist.ZeroInflatedPoisson(torch.ones(1), gate_logits=h[1:])
    before = ours.log_prob(x), pyros.log_prob(x)
    for p in (ours, pyros):
        p.sample()
    assert torch.equal(ours.log_prob(x), before[0]) and before[0].isfinite()
    assert not torch.equal(pyros.log_prob(x), before[1])


def test_negative_binomial_with_a_large_count_is_nearly_poisson(float64):
    log_mean, x = torch.randn(B, E), torch.randint(4, (B, E)).double()
    found = counts.NegativeBinomial()(torch.cat([log_mean, torch.full((B, E), 50.0)], -1)).log_prob(x)
    torch.testing.assert_close(found, counts.Poisson()(log_mean).log_prob(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("make", MEMBERS)
def test_output_bias_gives_the_mean(float64, make):
    likelihood: Likelihood = make(event_dim=3)
    mean = 5 * torch.rand(2, 4, 5) + 0.1
    if isinstance(likelihood, counts.Multinomial):
        mean = 9 * mean / mean.sum()
    p = likelihood(likelihood.output_bias(mean, 1.7 * mean.sqrt()).unsqueeze(0))
    torch.testing.assert_close(p.mean[0], mean, rtol=1e-6, atol=1e-6)
    if isinstance(likelihood, counts.NegativeBinomial):
        torch.testing.assert_close(p.stddev[0], 1.7 * mean.sqrt())


def test_output_bias_gives_the_scale_where_it_can(float64):
    mean = torch.tensor([2.0, 3.0, 5.0])
    for likelihood, variance in (
        (counts.ZeroInflatedPoisson(), 2 * mean),
        (counts.ZeroInflatedNegativeBinomial(), 2 * mean),
    ):
        p = likelihood(likelihood.output_bias(mean, variance.sqrt()))
        torch.testing.assert_close(p.variance, variance)


@pytest.mark.parametrize("make", MEMBERS)
def test_output_bias_of_constant_data_is_finite(make):
    for constant in (0.0, 9 / E):
        assert make().output_bias(torch.full((E,), constant), torch.zeros(E)).isfinite().all()


@pytest.mark.parametrize("make", SINGLE)
def test_values_that_are_no_counts_are_refused(make):
    likelihood: Likelihood = make()
    p = likelihood(torch.zeros(B, E * likelihood.num_outputs))
    good = torch.randint(9, (B, E)).float()
    check_support(p, good)
    for bad in (-1.0, 0.37):
        x = good.clone()
        x[3, 2] = bad
        with pytest.raises(ValueError, match=rf"outside the integers 0, 1, 2, ... \(found {bad:.4g}\): give counts"):
            check_support(p, x)


def test_multinomial_refuses_another_total():
    p = counts.Multinomial(9)(torch.zeros(B, 3))
    good = torch.tensor([4.0, 0.0, 5.0]).expand(B, 3)
    check_support(p, good)
    for bad in ([4.0, 0.0, 4.0], [10.0, -1.0, 0.0], [4.5, 0.5, 4.0]):
        x = good.clone()
        x[3] = torch.tensor(bad)
        with pytest.raises(ValueError, match=r"outside the support of counts with the total 9 \(found"):
            check_support(p, x)


@pytest.mark.parametrize("make", MEMBERS)
def test_fit_takes_two_epochs_and_moves_everything(make):
    likelihood: Likelihood = make()
    vae = VAE(
        StandardNormal(2), Decoder(Mlp(2, 8, E * likelihood.num_outputs), likelihood), DiagonalNormal(Mlp(E, 8, 4))
    )
    x = likelihood(torch.randn(40, E * likelihood.num_outputs)).sample()
    vae.decoder.start_at_data(x)
    check_vae(vae, x)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    history = fit(vae, x, epochs=2, batch_size=16, lr=0.01)
    assert all(math.isfinite(value) for value in history["elbo"])
    stuck = [name for name, value in vae.named_parameters() if torch.equal(value, before[name])]
    assert not stuck


@pytest.mark.parametrize("make", SINGLE)
def test_extreme_outputs_stay_finite_and_close_to_double_precision(make):
    likelihood: Likelihood = make()
    h = (30 * torch.randn(50, E * likelihood.num_outputs)).requires_grad_()
    x = torch.randint(10_000, (50, E)).float()
    x[:20] = 0.0
    log_px = likelihood(h).log_prob(x)
    log_px.sum().backward()
    assert bool(log_px.isfinite().all()) and bool(h.grad.isfinite().all())
    torch.testing.assert_close(log_px.double(), likelihood(h.double()).log_prob(x.double()), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    ("likelihood", "text"),
    [
        (counts.Poisson(), "Poisson(event_dim=1)"),
        (counts.NegativeBinomial(3), "NegativeBinomial(event_dim=3)"),
        (counts.ZeroInflatedPoisson(), "ZeroInflatedPoisson(event_dim=1)"),
        (counts.ZeroInflatedNegativeBinomial(), "ZeroInflatedNegativeBinomial(event_dim=1)"),
        (counts.Multinomial(9), "Multinomial(total_count=9, event_dim=1)"),
    ],
)
def test_repr_shows_the_arguments(likelihood, text):
    assert repr(likelihood) == text


def test_refusals():
    with pytest.raises(ValueError, match="expected total_count >= 1, found 0: it is the sum of x"):
        counts.Multinomial(0)
    with pytest.raises(ValueError, match=r"NegativeBinomial expected 2 E outputs .* found 3 on axis"):
        counts.NegativeBinomial()(torch.zeros(B, 3))
    with pytest.raises(ValueError, match=r"ZeroInflatedNegativeBinomial expected 3 E outputs .* found 4 on axis -3"):
        counts.ZeroInflatedNegativeBinomial(event_dim=3)(torch.zeros(B, 4, 2, 2))
