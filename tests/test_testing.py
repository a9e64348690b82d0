"""The checks accept every member of the library and refuse members that are wrong on purpose."""

from dataclasses import dataclass

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyro_vae import (
    ELBO,
    IWAE,
    Beta,
    DiagonalNormal,
    FullNormal,
    MixtureOfNormals,
    Mlp,
    Objective,
    StandardNormal,
    VampPrior,
    likelihoods,
)
from pyro_vae.contracts import Encoder, Likelihood, Prior
from pyro_vae.testing import check_distribution, check_encoder, check_likelihood, check_objective, check_prior

B, D, E = 5, 2, 7


def randomised(term: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its starting value, where mistakes hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return term


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


# Every member passes


@pytest.mark.parametrize("encoder", [DiagonalNormal(Mlp(E, 4, 2 * D)), FullNormal(Mlp(E, 4, 5))], ids=repr)
def test_vamp_prior_over_each_encoder(encoder):
    check_prior(randomised(VampPrior(encoder, torch.randn(4, E))))


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 6])
def test_priors(latent_dim):
    check_prior(StandardNormal(latent_dim, scale=0.7))
    check_prior(randomised(MixtureOfNormals(latent_dim, num_components=3)))


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Bernoulli(),
        likelihoods.ContinuousBernoulli(),
        likelihoods.Binomial(16),
        likelihoods.Normal(0.3),
        likelihoods.Normal(0.3, learn_scale=False),
        likelihoods.HeteroscedasticNormal(0.05),
    ],
    ids=repr,
)
@pytest.mark.parametrize("event", [(1,), (3,), (1, 2, 3)], ids=str)
def test_likelihoods(likelihood, event):
    likelihood.event_dim = len(event)
    channels = likelihood.num_outputs * event[0]
    check_likelihood(randomised(likelihood), 1.5 * torch.randn(B, channels, *event[1:]))


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
@pytest.mark.parametrize("family", [DiagonalNormal, FullNormal])
def test_encoders(family, latent_dim):
    net = Mlp(E, 4, family.num_outputs(latent_dim), activation=nn.Tanh)
    check_encoder(randomised(family(net)), torch.randn(B, E))


@pytest.mark.parametrize(
    "objective", [ELBO(), ELBO(3), IWAE(3), IWAE(3, vectorize_particles=False), Beta(), Beta(beta=4.0), Beta(beta=0.5)]
)
def test_objectives(objective):
    check_objective(objective)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dist.Cauchy(double(B, D), double(B, D).exp()).to_event(1),  # no mean
        lambda: dist.Laplace(double(B, D), double(B, D).exp()).to_event(1),  # a kink
        lambda: dist.Beta(double(B).exp() + 0.3, double(B).exp() + 0.3),  # infinite at the border
        lambda: dist.Gamma(double(B).exp(), double(B).exp()),
        lambda: dist.Uniform(-double(B).exp(), double(B).exp()),
        lambda: dist.Dirichlet(double(B, 3).exp() + 0.3),
        lambda: dist.Poisson(double(B).exp()),  # no largest value
        lambda: dist.OneHotCategorical(logits=double(B, 4)),
        lambda: dist.Binomial(torch.tensor([3.0, 5.0, 7.0]), logits=torch.randn(3)),
        lambda: dist.Bernoulli(logits=torch.full((B,), -9.0)),  # never seen in the draws
        lambda: dist.MultivariateNormal(double(2), double(2, 2).new_tensor([[1.0, 0.999], [0.999, 1.0]])),
        lambda: dist.MultivariateNormal(double(30), scale_tril=torch.eye(30).double() + 0.3 * double(30, 30).tril(-1)),
        lambda: dist.Delta(double(B, D)).to_event(1),
        lambda: dist.Normal(torch.randn(B, D), torch.randn(B, D).exp()).to_event(1),  # single precision
    ],
)
def test_other_families(make):
    check_distribution(make())


def test_plain_functions_pass():
    encoder = DiagonalNormal(Mlp(E, 2 * D))
    check_prior(lambda: dist.Normal(torch.zeros(D), 0.7 * torch.ones(D)).to_event(1))
    check_likelihood(lambda h: dist.Poisson(h.exp()).to_event(1), torch.randn(B, 3))
    check_encoder(lambda x: encoder(x), torch.randn(B, E))


class GammaEncoder(Encoder):  # its sampler rejects, so finite differences of the draws are no gradient
    def __init__(self):
        super().__init__()
        self.net = Mlp(E, 2 * D)

    def forward(self, x):
        shape, rate = self.net(x).chunk(2, dim=-1)
        return dist.Gamma(1 + shape.exp(), rate.exp()).to_event(1)


class OneHotEncoder(GammaEncoder):
    def forward(self, x):
        return dist.OneHotCategorical(logits=self.net(x))


def test_encoders_without_finite_differences_or_rsample():
    check_encoder(GammaEncoder(), torch.randn(B, E))
    check_encoder(OneHotEncoder(), torch.randn(B, E))


# Wrong members are caught


class WeightsIgnored(dist.MixtureSameFamily):
    def sample(self, sample_shape=()):
        weights = dist.Categorical(logits=torch.zeros_like(self.mixture_distribution.logits))
        return dist.MixtureSameFamily(weights, self.component_distribution).sample(sample_shape)


class ScaleSquared(dist.Normal):
    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale**2).log_prob(value)


class HalfMass(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) - torch.log(torch.tensor(2.0))


class RandomScore(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 1e-6 * torch.rand(())


class SharedNoise(dist.Normal):
    def rsample(self, sample_shape=()):
        eps = torch.randn(*sample_shape, *self.loc.shape[:-1], 1, dtype=self.loc.dtype)
        return self.loc + self.scale * eps

    sample = rsample


class ScoresMean(dist.MultivariateNormal):
    def log_prob(self, value):
        return super().log_prob(value) / self.event_shape[0]


def mixture(latent_dim):
    loc = torch.arange(2.0 * latent_dim).double().reshape(2, latent_dim)
    components = dist.Normal(loc, torch.full_like(loc, 0.7)).to_event(1)
    return WeightsIgnored(dist.Categorical(probs=torch.tensor([0.3, 0.7]).double()), components)


def scale(*shape):
    return torch.full(shape, 0.7, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixture(1), "has mean .* by log_prob but .* by its draws .*both sample and score"),
        (lambda: mixture(2), "has mean .* by log_prob but"),
        (lambda: mixture(3), "has mean .* by log_prob but"),
        (lambda: ScaleSquared(double(D), scale(D)).to_event(1), "has covariance 0.24.* by log_prob but 0.[45]"),
        (lambda: HalfMass(double(D), scale(D)).to_event(1), "total mass 0.5, expected 1: normalise it"),
        (lambda: RandomScore(double(D), scale(D)).to_event(1), "differs between two calls.*draw nothing when scoring"),
        (lambda: SharedNoise(double(3), scale(3)).to_event(1), "correlated but scores them as independent"),
        (lambda: ScoresMean(double(D), torch.diag(scale(D))), "total mass .*, expected 1"),
        (
            lambda: ScoresMean(double(4), torch.diag(scale(4))),
            "scores another density than it samples: E.*d log p / dz",
        ),
        (lambda: dist.Normal(torch.zeros(D), 1.0), "has batch shape .2,., expected .*end it with .to_event.1."),
        (
            lambda: torch.distributions.Normal(torch.zeros(D), 1.0),
            "expected a Pyro distribution: import Normal from pyro",
        ),
        (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), None),
        (lambda: dist.Normal(double(D), 1e-5 * scale(D)).to_event(1), None),
        (lambda: dist.MultivariateNormal(torch.zeros(2, 3), torch.eye(3)).to_event(1), r"event shape \(2, 3\)"),
    ],
)
def test_wrong_priors(make, message):
    if message is None:
        return check_prior(make)
    with pytest.raises(AssertionError, match=message) as caught:
        check_prior(make)
    assert "\n" not in str(caught.value)


def test_mixtures_of_narrow_peaks_are_refused_rather_than_passed():
    loc = torch.tensor([[0.0, 0.0], [3.0, 1.0]]).double()
    narrow = dist.Normal(loc, torch.full_like(loc, 1e-4)).to_event(1)
    with pytest.raises(AssertionError, match=r"too wide or has too narrow peaks for a grid .*milder parameters"):
        check_distribution(dist.MixtureSameFamily(dist.Categorical(probs=torch.ones(2).double()), narrow))


def test_expected_shapes_and_size():
    normal = dist.Normal(torch.zeros(B, D), 1.0).to_event(1)
    with pytest.raises(AssertionError, match=r"q has event shape \(2,\), expected \(3,\)"):
        check_distribution(normal, event_shape=(3,), name="q")
    with pytest.raises(AssertionError, match=r"batch shape \(5,\), expected \(5, 1\): lower the number"):
        check_distribution(normal, batch_shape=(B, 1))
    with pytest.raises(AssertionError, match="10000 numbers, expected at most 4096"):
        check_distribution(dist.Normal(torch.zeros(10_000), 1.0).to_event(1))


class BorrowedFloats(Prior):
    def forward(self):
        return dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1)


def test_draws_follow_the_dtype_of_the_module():
    with pytest.raises(AssertionError, match=r"has dtype torch.float32, expected torch.float64: create tensors with"):
        check_prior(BorrowedFloats())


class Detached(DiagonalNormal):
    parts = (True, True)

    def forward(self, x):
        normal = super().forward(x).base_dist
        loc, scale = (p.detach() if cut else p for p, cut in zip((normal.loc, normal.scale), self.parts, strict=True))

        class Family(dist.Normal):
            def rsample(self, sample_shape=()):
                return dist.Normal(loc, scale).rsample(sample_shape)

        return Family(normal.loc, normal.scale).to_event(1)


class HalfDetached(Detached):
    parts = (False, True)


class MixesExamples(DiagonalNormal):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class ForgotEvent(DiagonalNormal):
    def forward(self, x):
        return super().forward(x).base_dist


class Crashes(DiagonalNormal):
    def forward(self, x):
        return super().forward(x[:, 1:])


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (Detached, "encoder.x..rsample.. has no gradient: keep it differentiable"),
        (HalfDetached, "the gradient of encoder.x..rsample.. is .*no detach"),
        (MixesExamples, "mixes the examples of a batch"),
        (ForgotEvent, r"batch shape \(5, 2\), expected \(5,\): end it with .to_event\(1\)"),
        (Crashes, "encoder.x. failed .RuntimeError: .*mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_wrong_encoders(family, message):
    with pytest.raises(AssertionError, match=message) as caught:
        check_encoder(family(Mlp(E, 4, 2 * D)), torch.randn(B, E))
    assert "\n" not in str(caught.value)


class WrongBias(likelihoods.Bernoulli):
    def output_bias(self, mean, scale):
        return mean


class BiasShape(likelihoods.HeteroscedasticNormal):
    def output_bias(self, mean, scale):
        return mean


class SplitsFirstAxis(likelihoods.HeteroscedasticNormal):
    def forward(self, h):
        loc, raw = h.chunk(2, dim=1)  # right for [B, 2 E], wrong for [K, B, 2 E]
        return dist.Normal(loc, raw.exp()).to_event(1)


class MeanForSum(likelihoods.Normal):
    def forward(self, h):
        class Family(dist.Normal):
            def log_prob(self, value):
                return super().log_prob(value) / h.shape[-1]

        return Family(h, self.scale.expand_as(h)).to_event(1)


class CrossEntropyOfGrey(likelihoods.ContinuousBernoulli):
    def forward(self, h):
        class Family(dist.ContinuousBernoulli):
            def log_prob(self, value):
                return -nn.functional.binary_cross_entropy_with_logits(h.expand_as(value), value, reduction="none")

        return Family(logits=h).to_event(1)


class OutsideSupport(likelihoods.Bernoulli):
    def forward(self, h):
        class Family(dist.Bernoulli):
            def sample(self, sample_shape=()):
                return 0.5 * super().sample(sample_shape)

        return Family(logits=h).to_event(1)


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (WrongBias(), "has a mean that is .* off, expected the mean given"),
        (BiasShape(), r"output_bias.mean, scale. has shape \(3,\), expected \(6,\)"),
        (SplitsFirstAxis(), "likelihood.h. failed .*check shapes"),
        (MeanForSum(0.5), "total mass .*, expected 1: normalise it"),
        (CrossEntropyOfGrey(), "total mass .*, expected 1: normalise it"),
        (OutsideSupport(), "draws values outside its support"),
        (likelihoods.Normal(event_dim=2), r"has batch shape \(\), expected \(5,\): lower the number"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_wrong_likelihoods(likelihood: Likelihood, message: str):
    with pytest.raises(AssertionError, match=message) as caught:
        check_likelihood(likelihood, torch.randn(B, 3 * likelihood.num_outputs))
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class FlippedSign(Objective):
    def combine(self, terms):
        return -terms.log_w.mean(0)


@dataclass(frozen=True)
class MeanLoss(ELBO):
    def loss_of(self, terms):
        return -(terms.scale * self.combine(terms)).mean()


@dataclass(frozen=True)
class ForgotScale(ELBO):
    def loss_of(self, terms):
        return -self.combine(terms).sum()


@dataclass(frozen=True)
class DropsLogQ(Objective):
    def combine(self, terms):
        return (terms.log_px + terms.log_pz).mean(0)


@dataclass(frozen=True)
class DropsPrior(Objective):
    def combine(self, terms):
        return (terms.log_px - terms.log_qz).mean(0) - 100.0


@dataclass(frozen=True)
class AllParticles(Objective):
    def combine(self, terms):
        return terms.log_w


@dataclass(frozen=True)
class AveragesExamples(Objective):
    def combine(self, terms):
        return terms.log_w.mean().expand(terms.log_w.shape[1])


@dataclass(frozen=True)
class Unnormalised(Objective):
    def combine(self, terms):
        return terms.log_w.logsumexp(0)


@dataclass(frozen=True)
class OtherGradient(ELBO):
    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        (2 * loss).backward()
        return loss.detach()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (FlippedSign(), "exceeds log p.x. by .* nats .*wrong sign"),
        (MeanLoss(), r"^loss of .* expected .* = -\(scale \* bound\).sum\(\) at scale 1"),
        (ForgotScale(), r"^loss of .* at scale 2.5"),
        (DropsLogQ(), "log p.x. by .*missing term"),
        (DropsPrior(), "differs from log p.x. by .* although the guide is the exact posterior"),
        (AllParticles(num_particles=3), r"has shape \(3, 5\), expected \(5,\): one value for each example"),
        (AveragesExamples(), "mixes the examples"),
        (Unnormalised(num_particles=3), "exceeds log p.x."),
        (OtherGradient(), "differ in the gradient of decoder.net.weight|differ in the gradient"),
        (pyro.infer.Trace_ELBO(), "is no pyro.infer.ELBO with bound.*derive it from pyro_vae.Objective"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_wrong_objectives(objective, message):
    with pytest.raises(AssertionError, match=message) as caught:
        check_objective(objective)
    assert "\n" not in str(caught.value)


# The object stays as it is


def test_checks_leave_no_trace():
    net = nn.Sequential(nn.Linear(E, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2 * D))
    encoder = DiagonalNormal(net)
    net[2].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    flags = [part.training for part in encoder.modules()]
    pyro.clear_param_store()
    pyro.param("mine", torch.zeros(()))
    random_state = torch.get_rng_state()
    x, h = torch.randn(B, E, generator=torch.Generator()), torch.zeros(B, 3)

    check_encoder(encoder, x)
    check_prior(StandardNormal(D))
    check_likelihood(likelihoods.Normal(), h)
    check_objective(ELBO())
    check_distribution(dist.Poisson(torch.ones(2)))

    assert torch.equal(torch.get_rng_state(), random_state)
    assert [part.training for part in encoder.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in encoder.parameters())
    assert not x.requires_grad and list(pyro.get_param_store().keys()) == ["mine"]
    pyro.clear_param_store()
