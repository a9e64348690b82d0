"""The oracles: the linear-Gaussian VAE against other routes to the same number, and quadrature against both."""

import math

import pytest
import torch
from pyro import distributions as dist
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vae import (
    IWAE,
    VAE,
    Bernoulli,
    Binomial,
    ContinuousBernoulli,
    Decoder,
    DiagonalNormal,
    FullNormal,
    HeteroscedasticNormal,
    MixtureOfNormals,
    Mlp,
    StandardNormal,
    VampPrior,
    draw,
    likelihoods,
)
from pyro_vae.exact import LinearGaussian, linear_vae, log_evidence_by_quadrature

K, B, D, E = 3, 5, 2, 7
pytestmark = pytest.mark.usefixtures("float64")


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_gaussian(latent_dim=D, scale=0.7):
    return LinearGaussian(0.4 + 0.6 * noise(E, latent_dim, seed=3), noise(E, seed=4), scale)


def correlated_data(rows=200):
    x = noise(rows, E) @ (0.5 * noise(E, E, seed=2))
    return x + noise(E, seed=5)


# ----------------------------------------------------------------------------------------------- linear-Gaussian


def test_evidence_is_the_integral_over_z():
    lg, x = linear_gaussian(), noise(B, E)
    prior, decoder = StandardNormal(D), lg.as_vae().decoder
    torch.testing.assert_close(log_evidence_by_quadrature(prior, decoder, x), lg.log_evidence(x), rtol=0, atol=1e-10)


def test_evidence_has_the_moments_of_samples():
    lg = linear_gaussian()
    with torch.no_grad():
        x = lg.as_vae().sample(20_000)
    deviation = x - x.mean(0)
    outer = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
    expected = lg.weight @ lg.weight.T + lg.scale**2 * torch.eye(E)
    assert ((outer.mean(0) - expected).abs() < 5 * outer.std(0) / math.sqrt(len(x))).all()
    assert ((x.mean(0) - lg.loc).abs() < 4.5 * x.std(0) / math.sqrt(len(x))).all()


def test_posterior_obeys_bayes_rule():
    lg, x, z = linear_gaussian(), noise(B, E), noise(K, B, D, seed=6)
    vae = lg.as_vae()
    joint = vae.prior().log_prob(z) + vae.decoder(z).log_prob(x)
    torch.testing.assert_close(lg.posterior(x).log_prob(z), joint - lg.log_evidence(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_exact_guide_is_the_posterior(default):
    """Also when the library runs in single precision and the example in double."""
    lg, x = linear_gaussian(), noise(B, E)
    torch.set_default_dtype(default)
    vae = lg.as_vae()
    posterior = lg.posterior(x)
    q = vae.encoder(x)
    torch.testing.assert_close(q.mean, posterior.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(q.covariance_matrix, posterior.covariance_matrix, rtol=0, atol=1e-12)
    log_w = draw(vae.model, vae.guide, x, num_particles=K).log_w
    torch.testing.assert_close(log_w, lg.log_evidence(x).expand(K, B), rtol=0, atol=1e-10)
    assert log_w.var(0).max() < 1e-20


def test_the_full_normal_encoder_holds_the_exact_posterior():
    """Where the diagonal one cannot: the columns of W are correlated, and so is z given x."""
    lg, x = linear_gaussian(), noise(B, E)
    posterior = lg.posterior(x)
    factor = torch.linalg.cholesky(posterior.covariance_matrix[0])
    assert factor[1, 0].abs() > 0.05
    shift = lg.posterior(torch.zeros(1, E)).mean[0]
    net = nn.Linear(E, D + D + 1)
    with torch.no_grad():
        net.weight.zero_()
        net.weight[:D] = (lg.posterior(torch.eye(E)).mean - shift).mT
        net.bias[:D], net.bias[D : 2 * D], net.bias[2 * D] = shift, factor.diagonal().log(), factor[1, 0]
    exact = lg.as_vae()
    vae = VAE(exact.prior, exact.decoder, FullNormal(net))
    log_w = draw(vae.model, vae.guide, x, num_particles=K).log_w
    torch.testing.assert_close(log_w, lg.log_evidence(x).expand(K, B), rtol=0, atol=1e-10)
    gap = lg.log_evidence(x) - lg.elbo(x, posterior.mean, posterior.covariance_matrix[0].diagonal().diag())
    assert (gap > 0.01).all()


def test_the_diagonal_guide_has_the_gap():
    lg, x = linear_gaussian(), noise(B, E)
    vae = lg.as_vae(diagonal=True)
    q = vae.encoder(x)
    covariance = torch.diag_embed(q.variance)
    torch.testing.assert_close(q.variance, (lg.scale**2 / lg.precision_core.diagonal()).expand(B, D))

    gap = lg.diagonal_gap()
    assert gap > 0.01
    exact = lg.log_evidence(x) - gap
    torch.testing.assert_close(lg.elbo(x, q.mean, covariance), exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        kl_divergence(MultivariateNormal(q.mean, covariance), lg.posterior(x)), torch.full((B,), gap)
    )
    with torch.no_grad():
        log_w = draw(vae.model, vae.guide, x, num_particles=20_000).log_w
    assert ((log_w.mean(0) - exact).abs() < 4 * log_w.std(0) / math.sqrt(len(log_w))).all()
    assert (log_w.std(0) > 0.05).all()


def test_the_diagonal_guide_is_the_best_diagonal_one():
    lg, x = linear_gaussian(), noise(B, E)
    mean = lg.posterior(x).mean.requires_grad_()
    log_variance = (lg.scale**2 / lg.precision_core.diagonal()).log().requires_grad_()
    lg.elbo(x, mean, log_variance.exp().diag()).sum().backward()
    torch.testing.assert_close(mean.grad, torch.zeros(B, D), rtol=0, atol=1e-10)
    torch.testing.assert_close(log_variance.grad, torch.zeros(D), rtol=0, atol=1e-10)


def test_elbo_of_any_normal_guide():
    """ELBO = log p(x) - KL(q, posterior), for one covariance and for one of each example."""
    lg, x = linear_gaussian(), noise(B, E)
    mean, factor = noise(B, D, seed=7), torch.tril(noise(B, D, D, seed=8)) + 2 * torch.eye(D)
    for covariance in (factor @ factor.mT, (factor @ factor.mT)[0]):
        gap = kl_divergence(MultivariateNormal(mean, covariance), lg.posterior(x))
        assert (gap > 0.1).all()
        torch.testing.assert_close(lg.elbo(x, mean, covariance), lg.log_evidence(x) - gap, rtol=0, atol=1e-10)


def test_no_gap_for_orthogonal_columns():
    orthogonal = torch.linalg.qr(noise(E, D)).Q * torch.tensor([2.0, 0.5])
    assert LinearGaussian(orthogonal, torch.zeros(E), 0.7).diagonal_gap() == pytest.approx(0, abs=1e-14)


# -------------------------------------------------------------------------------------------- maximum likelihood


def test_maximum_likelihood_is_stationary():
    x = correlated_data()
    best = LinearGaussian.maximum_likelihood(x, D)
    parameters = [best.weight, best.loc, torch.tensor(best.scale)]
    for p in parameters:
        p.requires_grad_()
    total = LinearGaussian(*parameters).log_evidence(x).sum()
    total.backward()
    for p in parameters:
        torch.testing.assert_close(p.grad, torch.zeros_like(p), rtol=0, atol=1e-8)
    with torch.no_grad():
        for seed in range(20):  # and nothing near it is better
            moved = [p + 0.03 * noise(*p.shape, seed=seed) for p in parameters]
            assert LinearGaussian(*moved).log_evidence(x).sum() < total


def test_maximum_likelihood_is_principal_component_analysis():
    """scikit-learn divides the covariance by N - 1, the likelihood asks for N: shrink its data by the ratio."""
    x = correlated_data()
    best = LinearGaussian.maximum_likelihood(x, D)
    shrunk = x.mean(0) + (x - x.mean(0)) * math.sqrt((len(x) - 1) / len(x))
    pca = PCA(D, svd_solver="full").fit(shrunk.numpy())
    torch.testing.assert_close(best.log_evidence(x), torch.from_numpy(pca.score_samples(x.numpy())), rtol=0, atol=1e-10)
    assert best.scale**2 == pytest.approx(pca.noise_variance_)
    assert best.log_evidence(x).mean() > PCA(D).fit(x.numpy()).score(x.numpy())


def test_maximum_likelihood_makes_the_elbo_tight():
    x = correlated_data()
    best = LinearGaussian.maximum_likelihood(x, D)
    assert best.diagonal_gap() == pytest.approx(0, abs=1e-12)
    norms = best.weight.norm(dim=0)
    assert (norms.diff() < 0).all(), "the leading direction comes first"
    vae = best.as_vae(diagonal=True)
    log_w = draw(vae.model, vae.guide, x[:B], num_particles=K).log_w
    torch.testing.assert_close(log_w, best.log_evidence(x[:B]).expand(K, B), rtol=0, atol=1e-9)


def test_maximum_likelihood_finds_the_model_of_its_data():
    lg = linear_gaussian()
    with torch.no_grad():
        x = lg.as_vae().sample(50_000)
    found = LinearGaussian.maximum_likelihood(x, D)
    assert found.scale == pytest.approx(lg.scale, rel=0.01)
    torch.testing.assert_close(found.weight @ found.weight.T, lg.weight @ lg.weight.T, rtol=0, atol=0.05)
    advantage = found.log_evidence(x) - lg.log_evidence(x)
    assert 0 < advantage.sum() < 3 * E * (D + 1), "half the number of parameters, by the likelihood-ratio law"


@pytest.mark.parametrize("latent_dim", [0, E, E + 1])
def test_maximum_likelihood_refuses(latent_dim):
    with pytest.raises(ValueError, match=f"expected 1 <= latent_dim < {E} .*found {latent_dim}"):
        LinearGaussian.maximum_likelihood(correlated_data(), latent_dim)


def test_linear_vae_contains_the_optimum():
    """The untrained linear VAE has the parts of the exact one, so training it can reach it."""
    vae, exact = linear_vae(D, E), linear_gaussian().as_vae(diagonal=True)
    vae.load_state_dict(exact.state_dict())
    x = noise(B, E)
    torch.testing.assert_close(vae.encoder(x).mean, exact.encoder(x).mean)
    torch.testing.assert_close(vae.decoder(noise(B, D)).log_prob(x), exact.decoder(noise(B, D)).log_prob(x))
    assert all(p.requires_grad for p in vae.parameters())


# --------------------------------------------------------------------------------------------------- quadrature


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_quadrature_is_exact_where_the_answer_is_known(latent_dim):
    lg, x = linear_gaussian(latent_dim), noise(B, E)
    vae = lg.as_vae()
    found = log_evidence_by_quadrature(vae.prior, vae.decoder, x)
    assert found.shape == (B,) and not found.requires_grad
    torch.testing.assert_close(found, lg.log_evidence(x), rtol=0, atol=1e-10)


def test_quadrature_settings():
    lg, x = linear_gaussian(1), noise(B, E)
    vae = lg.as_vae()
    coarse = log_evidence_by_quadrature(vae.prior, vae.decoder, x, limit=7.0, num_points=101)
    torch.testing.assert_close(coarse, lg.log_evidence(x), rtol=0, atol=1e-8)
    narrow = log_evidence_by_quadrature(vae.prior, vae.decoder, x, limit=0.2)
    assert (narrow < lg.log_evidence(x)).all(), "a part of the mass only"


def test_quadrature_refuses_three_dimensions():
    vae = linear_gaussian(3).as_vae()
    with pytest.raises(ValueError, match="expected at most 2 latent dimensions for quadrature, found 3"):
        log_evidence_by_quadrature(vae.prior, vae.decoder, noise(B, E))


PRIORS = {
    "StandardNormal": lambda: StandardNormal(D, scale=1.2),
    "MixtureOfNormals": lambda: MixtureOfNormals(D, num_components=4),
    "VampPrior": lambda: VampPrior(DiagonalNormal(Mlp(E, 6, 2 * D)), noise(4, E)),
}
LIKELIHOODS = {
    "Bernoulli": (Bernoulli, lambda x: (x > 0).double()),
    "Binomial": (lambda: Binomial(9), lambda x: (4.5 + 2 * x).round().clamp(0, 9)),
    "Normal": (lambda: likelihoods.Normal(0.8), lambda x: x),
    "ContinuousBernoulli": (ContinuousBernoulli, torch.sigmoid),
    "HeteroscedasticNormal": (lambda: HeteroscedasticNormal(min_scale=0.3), lambda x: x),
}


class WideNormal(nn.Module):
    """A guide that ignores x and is wider than any posterior here, so that weights are bounded."""

    def forward(self, x):
        return dist.Normal(torch.zeros(*x.shape[:-1], D), 1.6).to_event(1)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_quadrature_agrees_with_importance_weighting(prior, likelihood):
    """Two independent routes to log p(x) of a nonlinear decoder, for every prior with every likelihood."""
    make, to_data = LIKELIHOODS[likelihood]
    p = make()
    decoder = Decoder(Mlp(D, 6, E * p.num_outputs, activation=nn.Tanh), p)
    vae = VAE(PRIORS[prior](), decoder, WideNormal())
    x, num_particles = to_data(noise(B, E)), 20_000
    exact = log_evidence_by_quadrature(vae.prior, vae.decoder, x, num_points=121)
    objective = IWAE(num_particles)
    with torch.no_grad():
        terms = objective.draw(vae.model, vae.guide, x)
        bound = objective.combine(terms)
    weights = (terms.log_w - bound).exp()  # of mean 1
    standard_error = weights.std(0) / math.sqrt(num_particles)
    assert standard_error.max() < 0.05
    bias = standard_error**2 / 2
    assert ((bound - exact).abs() < 4 * standard_error + bias).all()
