"""Likelihoods: closed forms, output_bias, state, missing numbers, and what a learned scale learns."""

import importlib
import inspect
import math
import pkgutil

import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam, ClippedAdam
from scipy import stats
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_vae
from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, elbo, fit, likelihoods
from pyro_vae.contracts import Likelihood
from pyro_vae.parts import import_class
from pyro_vae.supports import check_support
from pyro_vae.testing import check_likelihood

K, B, E = 3, 5, 7

MEMBERS = [
    likelihoods.Bernoulli,
    likelihoods.ContinuousBernoulli,
    lambda **options: likelihoods.Binomial(16, **options),
    likelihoods.Normal,
    likelihoods.OptimalNormal,
    likelihoods.LogNormal,
    likelihoods.HeteroscedasticNormal,
    likelihoods.Laplace,
    likelihoods.StudentT,
    likelihoods.Beta,
    lambda event_dim=1: likelihoods.Masked(likelihoods.Bernoulli(event_dim)),
    lambda event_dim=1: likelihoods.Masked(likelihoods.Laplace(event_dim=event_dim)),
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


def test_training_finds_the_mean_squared_error(float64):
    """What would be optimal for each batch, found by one parameter for all of them."""
    x = torch.randn(40, 2) @ torch.randn(2, E) + torch.randn(40, E)
    vae = VAE(StandardNormal(2), Decoder(Mlp(2, E), likelihoods.Normal(2.0)), DiagonalNormal(Mlp(E, 2 * 2))).double()
    vae.decoder.start_at_data(x)
    svi = SVI(
        vae.model,
        vae.guide,
        ClippedAdam({"lr": 0.1, "lrd": 0.98}),
        loss=TraceMeanField_ELBO(num_particles=8, vectorize_particles=True),
    )
    for _ in range(250):
        svi.step(x)
    with torch.no_grad():
        z = vae.encode(x).sample((2000,))
        mse = ((x - vae.decode(z).mean) ** 2).mean()
        assert abs(vae.decoder.likelihood.scale**2 / mse - 1) < 0.02


def test_laplace_and_student_against_scipy(float64):
    h, x = torch.randn(K, B, E), torch.randn(B, E)
    expected = torch.as_tensor(stats.laplace.logpdf(x.numpy(), h.numpy(), 0.3)).sum(-1)
    torch.testing.assert_close(likelihoods.Laplace(0.3).double()(h).log_prob(x), expected, rtol=1e-6, atol=1e-6)
    expected = torch.as_tensor(stats.t.logpdf(x.numpy(), 3.5, h.numpy(), 0.3)).sum(-1)
    torch.testing.assert_close(likelihoods.StudentT(3.5, 0.3).double()(h).log_prob(x), expected, rtol=1e-6, atol=1e-6)


def test_a_learned_laplace_scale_settles_at_the_mean_absolute_error(float64):
    h, x = torch.randn(B, E), torch.randn(B, E)
    likelihood = likelihoods.Laplace((x - h).abs().mean().item())
    likelihood(h).log_prob(x).sum().backward()
    assert abs(likelihood.log_scale.grad.item()) < 1e-10


def test_student_pulls_less_at_an_outlier_than_laplace_and_tends_to_the_normal(float64):
    x = torch.tensor([50.0])

    def pull(likelihood):
        h = torch.zeros(1, requires_grad=True)
        return torch.autograd.grad(likelihood(h).log_prob(x), h)[0].item()

    assert pull(likelihoods.StudentT()) < pull(likelihoods.Laplace()) == 1.0 < pull(likelihoods.Normal())
    h, x = torch.randn(B, E), torch.randn(B, E)
    near, normal = likelihoods.StudentT(df=1e7)(h).log_prob(x), likelihoods.Normal()(h).log_prob(x)
    torch.testing.assert_close(near, normal, rtol=1e-4, atol=1e-4)


def test_beta_against_scipy(float64):
    h, x, limit = torch.randn(K, B, 2 * E), torch.rand(B, E), 50.0
    m, free = h[..., :E].sigmoid(), (1 + h[..., E:].exp()).log()
    c = 2 + 1 / (1 / (limit - 2) + 1 / free)
    expected = torch.as_tensor(stats.beta.logpdf(x.numpy(), (m * c).numpy(), ((1 - m) * c).numpy())).sum(-1)
    p = likelihoods.Beta(limit)(h)
    torch.testing.assert_close(p.log_prob(x), expected)
    torch.testing.assert_close(p.variance, m * (1 - m) / (1 + c))


def test_beta_starts_at_the_scale_too_and_stays_finite(float64):
    data = torch.distributions.Beta(3.0, 5.0).sample((500, E))
    likelihood = likelihoods.Beta()
    p = likelihood(likelihood.output_bias(data.mean(0), data.std(0)))
    torch.testing.assert_close(p.stddev, data.std(0))
    h = torch.tensor([[-300.0, -300.0], [300.0, 300.0], [-300.0, 300.0], [0.0, 1e6]]).float().requires_grad_()
    p = likelihood(h)
    x = p.sample((20,))
    assert bool(((x > 0) & (x < 1)).all())
    p.log_prob(x).sum().backward()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("event", [(3,), (2, 1, 2)], ids=["vectors", "images"])
@pytest.mark.parametrize("make", MEMBERS)
def test_contract(make, event):
    likelihood: Likelihood = make(event_dim=len(event))
    for value in likelihood.parameters():
        value.data.add_(-0.5 * torch.rand_like(value))
    check_likelihood(likelihood, 1.5 * torch.randn(B, likelihood.num_outputs * event[0], *event[1:]))


@pytest.mark.parametrize("make", MEMBERS)
def test_fit_takes_two_epochs_and_moves_everything(make):
    likelihood: Likelihood = make()
    vae = VAE(
        StandardNormal(2), Decoder(Mlp(2, 8, E * likelihood.num_outputs), likelihood), DiagonalNormal(Mlp(E, 8, 4))
    )
    x = likelihood(torch.randn(40, E * likelihood.num_outputs)).sample()
    vae.decoder.start_at_data(x)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    history = fit(vae, x, epochs=2, batch_size=16, lr=0.01)
    assert all(math.isfinite(value) for value in history["elbo"])
    stuck = [name for name, value in vae.named_parameters() if torch.equal(value, before[name])]
    assert not stuck


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
        (
            likelihoods.OptimalNormal(0.2),
            "OptimalNormal(scale=1, momentum=0.2, min_scale=0.001, event_dim=1)",
        ),
        (likelihoods.LogNormal(0.05), "LogNormal(min_scale=0.05, event_dim=1)"),
        (likelihoods.Laplace(0.5), "Laplace(scale=0.5, learn_scale=True, event_dim=1)"),
        (likelihoods.StudentT(4.0, 0.5, False), "StudentT(df=4, scale=0.5, learn_scale=False, event_dim=1)"),
        (likelihoods.Beta(50.0), "Beta(max_concentration=50, event_dim=1)"),
        (likelihoods.Masked(likelihoods.Bernoulli()), "Masked(\n  (likelihood): Bernoulli(event_dim=1)\n)"),
    ],
)
def test_repr_shows_the_arguments(likelihood, text):
    assert repr(likelihood) == text


def test_a_fixed_scale_is_no_parameter_but_is_saved():
    fixed = likelihoods.Normal(0.5, learn_scale=False)
    assert not list(fixed.parameters()) and "log_scale" in fixed.state_dict()
    assert [p.numel() for p in likelihoods.Normal(0.5).parameters()] == [1]
    assert not list(likelihoods.StudentT(learn_scale=False).parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: likelihoods.Bernoulli(event_dim=0), "expected event_dim >= 1, found 0: 1 for vectors, 3 for images"),
        (lambda: likelihoods.Binomial(0), "expected total_count >= 1, found 0"),
        (lambda: likelihoods.Normal(0.0), "expected scale > 0, found 0.0"),
        (lambda: likelihoods.HeteroscedasticNormal(min_scale=-1.0), "expected min_scale > 0, found -1.0"),
        (lambda: likelihoods.OptimalNormal(momentum=0.0), "expected momentum in .0, 1., found 0.0"),
        (lambda: likelihoods.OptimalNormal(min_scale=0.0), "expected min_scale > 0, found 0.0"),
        (lambda: likelihoods.LogNormal(0.0), "expected min_scale > 0, found 0.0"),
        (
            lambda: likelihoods.Masked(likelihoods.OptimalNormal()),
            "found OptimalNormal, which looks at all of x at once",
        ),
        (lambda: likelihoods.Laplace(-1.0), "expected scale > 0, found -1.0"),
        (lambda: likelihoods.StudentT(scale=0.0), "expected scale > 0, found 0.0"),
        (lambda: likelihoods.StudentT(1.0), "expected df > 1, found 1.0: with less, x has no mean"),
        (lambda: likelihoods.Beta(2.0), "expected max_concentration > 2, found 2.0"),
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


def test_beta_refuses_the_end_points():
    p = likelihoods.Beta()(torch.zeros(B, 2 * E))
    check_support(p, torch.full((B, E), 0.5))
    for end in (0.0, 1.0):
        x = torch.full((B, E), 0.5)
        x[3, 2] = end
        with pytest.raises(ValueError, match=f"outside the support 0 < x < 1 .found {end:g}."):
            check_support(p, x)
        with pytest.raises(ValueError, match="within the support"):
            p.log_prob(x)


# Missing numbers


class ZeroForMissing(nn.Module):
    def forward(self, x):
        return x.nan_to_num()


def _with_gaps(x):
    return x.masked_fill(torch.rand_like(x) < 0.3, math.nan)


@pytest.mark.parametrize("make", [make for make in MEMBERS[:-2] if make is not likelihoods.OptimalNormal])
def test_masked_scores_what_is_there_and_its_gradient_is_finite(float64, make):
    inner: Likelihood = make()
    h = torch.randn(K, B, E * inner.num_outputs, requires_grad=True)
    full = inner(h).sample()[0]
    x = _with_gaps(full)
    p = likelihoods.Masked(inner)(h)
    single = make()(h).base_dist.log_prob(full)
    expected = torch.where(x.isnan(), torch.zeros_like(single), single).sum(-1)
    torch.testing.assert_close(p.log_prob(x), expected)
    torch.testing.assert_close(p.log_prob(full), inner(h).log_prob(full))
    assert torch.equal(p.log_prob(torch.full_like(x, math.nan)), torch.zeros(K, B))
    assert torch.equal(p.mean, inner(h).mean) and p.expand((2, K, B)).batch_shape == (2, K, B)
    check_support(p, x.expand(K, B, E))
    p.log_prob(x).sum().backward()
    assert h.grad.isfinite().all()
    gaps = x.isnan().repeat(1, inner.num_outputs)
    assert bool((h.grad[:, gaps] == 0).all())


def test_masked_still_refuses_what_is_there_and_wrong():
    p = likelihoods.Masked(likelihoods.Bernoulli())(torch.zeros(B, E))
    x = torch.full((B, E), math.nan)
    x[1, 2] = 0.37
    with pytest.raises(ValueError, match=r"outside \{0, 1\} or NaN \(found 0.37\): binarise it"):
        check_support(p, x)
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(x)
    with pytest.raises(ValueError, match=r"outside the integers 0..4 or NaN \(found 0.37\)"):
        check_support(likelihoods.Masked(likelihoods.Binomial(4))(torch.zeros(B, E)), x)
    with pytest.raises(
        ValueError, match=r"NaN, expected finite numbers.*likelihoods.Masked"
    ):  # without the wrapper a gap is refused
        check_support(likelihoods.Normal()(torch.zeros(B, E)), torch.full((B, E), math.nan))


def test_masked_in_pyro_trains_on_data_with_gaps_and_fills_them():
    x = (torch.randn(60, 1) > 0).float().expand(60, E).contiguous()  # a number is told by the others
    gappy = _with_gaps(x)
    encoder = DiagonalNormal(nn.Sequential(ZeroForMissing(), Mlp(E, 16, 4)))
    vae = VAE(StandardNormal(2), Decoder(Mlp(2, 16, E), likelihoods.Masked(likelihoods.Bernoulli())), encoder)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.02}), loss=Trace_ELBO(num_particles=3, vectorize_particles=True))
    losses = [svi.step(gappy) for _ in range(150)]
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < 0.5 * losses[0]
    filled = torch.where(gappy.isnan(), vae.reconstruct(gappy), gappy)
    assert (filled.round() == x).float().mean() > 0.97


def test_masked_refuses_a_joint_distribution():
    class Joint(Likelihood):
        def forward(self, h):
            from pyro import distributions as dist

            return dist.MultivariateNormal(h, torch.eye(h.shape[-1]))

    with pytest.raises(ValueError, match=r"independent numbers, found MultivariateNormal with event shape .7,."):
        likelihoods.Masked(Joint())(torch.zeros(B, E))


# The optimal scale


def _fitted(likelihood, x, epochs=100):
    torch.manual_seed(0)
    vae = VAE(StandardNormal(2), Decoder(Mlp(2, 16, E), likelihood), DiagonalNormal(Mlp(E, 16, 4)))
    vae.decoder.start_at_data(x)
    fit(vae, x, epochs=epochs, batch_size=64, lr=0.01)
    return vae


def test_optimal_scale_is_the_mean_squared_error_of_the_batch(float64):
    h, x = torch.randn(K, B, E, requires_grad=True), torch.randn(B, E)
    likelihood = likelihoods.OptimalNormal().double()
    log_p = likelihood(h).log_prob(x)
    mse = ((x - h) ** 2).mean()
    assert torch.equal(likelihood.mean_square, mse.detach())
    fixed = likelihoods.Normal(mse.sqrt().item(), learn_scale=False)(h).log_prob(x)
    torch.testing.assert_close(log_p, fixed, rtol=1e-6, atol=1e-6)
    for scale in (0.9, 1.1):  # no other scale scores higher
        other = likelihoods.Normal(scale * mse.sqrt().item(), learn_scale=False)(h).log_prob(x)
        assert other.sum() < log_p.sum()
    # The envelope theorem: the gradient is that of the profile likelihood, in which the scale moves with h.
    profile = -K * B * E / 2 * mse.log()
    expected, found = (torch.autograd.grad(value.sum(), h)[0] for value in (profile, log_p))
    torch.testing.assert_close(found, expected)


def test_optimal_scale_in_evaluation_mode_is_the_running_one_and_looking_changes_nothing(float64):
    likelihood, optima = likelihoods.OptimalNormal(momentum=0.25).double(), []
    for i in range(6):
        h, x = torch.randn(B, E), (i + 1) * torch.randn(B, E)
        likelihood(h).log_prob(x)
        optima.append(((x - h) ** 2).mean())
    running = torch.stack(optima[:4]).mean()  # 1, 1/2, 1/3, 1/4, then 1/4 for each
    for optimum in optima[4:]:
        running = 0.75 * running + 0.25 * optimum
    torch.testing.assert_close(likelihood.scale**2, running)
    before = likelihood.state_dict()["mean_square"].clone()
    with torch.no_grad():
        likelihood(h).log_prob(x)
    p = likelihood.eval()(h)
    assert isinstance(p.base_dist, torch.distributions.Normal) and torch.equal(p.stddev, likelihood.scale.expand(B, E))
    p.log_prob(x)
    assert torch.equal(likelihood.mean_square, before)
    assert bool(likelihoods.OptimalNormal(min_scale=0.5)(x).log_prob(x).isfinite().all())


def test_training_with_the_optimal_scale_beats_one_half_and_ends_at_the_mean_squared_error():
    torch.manual_seed(1)
    x = torch.randn(256, 2) @ torch.randn(2, E) + 0.3 * torch.randn(256, E)
    elbos = {}
    for name, likelihood in {
        "half": likelihoods.Normal(math.sqrt(0.5), learn_scale=False),
        "optimal": likelihoods.OptimalNormal(),
    }.items():
        vae = _fitted(likelihood, x)
        elbos[name] = elbo(vae, x, 20).mean
    assert elbos["optimal"] > elbos["half"] + 0.5
    with torch.no_grad():
        mse = ((x - vae.eval().decode(vae.encode(x).sample((50,))).mean) ** 2).mean()
    assert abs(vae.decoder.likelihood.scale**2 / mse - 1) < 0.08  # a batch of 64 x 7 numbers scatters by 7 %


@pytest.mark.parametrize("compiled", [False, True])
def test_the_running_scale_is_saved_and_resumed(tmp_path, compiled, uncompiled):
    x, twins = torch.randn(40, E), []
    for stops in ((4,), (2, 4)):
        torch.manual_seed(0)
        vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, E), likelihoods.OptimalNormal()), DiagonalNormal(Mlp(E, 8, 4)))
        torch.manual_seed(1)
        for i, epochs in enumerate(stops):
            folder = tmp_path / str(len(stops))
            fit(vae, x, epochs=epochs, batch_size=16, folder=folder, resume=i > 0, compiled=compiled, x_valid=x)
        twins.append(vae)
    for a, b in zip(twins[0].state_dict().values(), twins[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert twins[0].decoder.likelihood.num_batches == 4 * 3  # three batches an epoch, and nothing else counts


def test_log_normal_against_scipy(float64):
    h, x = torch.randn(K, B, 2 * E), torch.rand(B, E) + 0.1
    s = 0.05 + (1 + h[..., E:].exp()).log()
    expected = torch.as_tensor(stats.lognorm.logpdf(x.numpy(), s.numpy(), scale=h[..., :E].exp().numpy())).sum(-1)
    torch.testing.assert_close(likelihoods.LogNormal(0.05)(h).log_prob(x), expected)
    data = torch.randn(5000, E).exp() * 30
    likelihood = likelihoods.LogNormal()
    p = likelihood(likelihood.output_bias(data.mean(0), data.std(0)))
    torch.testing.assert_close(p.stddev, data.std(0))


def test_every_likelihood_of_the_package_has_its_name_here():
    names = [module.name for module in pkgutil.iter_modules(pyro_vae.__path__) if module.name != "__main__"]
    values = [item for name in names for item in vars(importlib.import_module(f"pyro_vae.{name}")).items()]
    classes = {name: value for name, value in values if inspect.isclass(value) and issubclass(value, Likelihood)}
    found = {name for name, value in classes.items() if not inspect.isabstract(value) and not name.startswith("_")}
    assert found == set(likelihoods.__all__)
    for name in found:  # the path that runs saved before the modules were split name
        assert import_class(f"pyro_vae.likelihoods.{name}", "likelihood") is classes[name]
