"""Missing numbers end to end: the encoder reads them, training ignores them, and they are filled as they should be."""

import math

import pytest
import torch
from torch import nn

from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, fit, likelihoods, log_evidence
from pyro_vae.contracts import mean_and_scale
from pyro_vae.dry_run import check_vae
from pyro_vae.exact import LinearGaussian
from pyro_vae.missing import FillMissing, impute
from pyro_vae.tables import MixedColumns, Nominal

K, B, D, E = 3, 5, 2, 7


def linear(num=B):
    """A linear-Gaussian model with a guide that fills gaps with the mean, and data with gaps."""
    torch.manual_seed(2)
    weight, loc = torch.randn(E, D), torch.randn(E)
    exact = LinearGaussian(weight, loc, scale=0.6)
    vae = exact.as_vae()
    full = loc + torch.randn(num, D) @ weight.T + 0.6 * torch.randn(num, E)
    x = full.masked_fill(torch.rand(num, E) < 0.3, math.nan)
    vae.decoder = Decoder(vae.decoder.net, likelihoods.Masked(likelihoods.Normal(0.6, learn_scale=False))).double()
    net = nn.Sequential(FillMissing(loc), Mlp(E, 2 * D)).double()
    with torch.no_grad():
        net[1][0].weight.mul_(0.2)
        net[1][0].bias.copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    vae.encoder = DiagonalNormal(net)
    return vae, x, weight, loc, 0.6


def conditional(x, weight, loc, scale):
    """Exact mean and covariance of what is missing given what is there, row by row; and the exact log p(x_there)."""
    covariance = weight @ weight.T + scale**2 * torch.eye(E)
    means, variances, log_p = x.clone(), torch.zeros(len(x), E), []
    for row, values in enumerate(x):
        gap, there = values.isnan(), ~values.isnan()
        gain = covariance[gap][:, there] @ torch.linalg.inv(covariance[there][:, there])
        means[row, gap] = loc[gap] + gain @ (values[there] - loc[there])
        variances[row, gap] = (covariance[gap][:, gap] - gain @ covariance[there][:, gap]).diagonal()
        p = torch.distributions.MultivariateNormal(loc[there], covariance[there][:, there])
        log_p.append(p.log_prob(values[there]))
    return means, variances, torch.stack(log_p)


def test_the_evidence_is_that_of_what_is_there(float64):
    vae, x, *parameters = linear()
    estimate = log_evidence(vae, x, 100_000)
    _, _, exact = conditional(x, *parameters)
    assert bool(((estimate.values - exact).abs() < 4 * estimate.errors).all()) and bool((estimate.errors < 0.05).all())


def test_imputation_is_the_conditional_mean_although_the_posterior_is_wrong(float64):
    vae, x, *parameters = linear()
    exact, variance, _ = conditional(x, *parameters)
    found = impute(vae, x, 100_000)
    assert torch.equal(found[~x.isnan()], x[~x.isnan()])
    error = (variance.max() / log_evidence(vae, x, 100_000).effective_sample_size.min()).sqrt()
    assert (found - exact).abs().max() < 4 * error and error < 0.05
    crude = torch.where(x.isnan(), vae.reconstruct(x), x)
    assert (crude - exact).abs().max() > 0.2  # the weights make up for this


def test_draws_have_the_conditional_mean_and_variance(float64):
    vae, x, *parameters = linear(num=3)
    exact, variance, _ = conditional(x, *parameters)
    draws = torch.stack([impute(vae, x, 200, sample=True, seed=seed) for seed in range(200)])
    gap = x.isnan()
    error = (variance / len(draws)).sqrt()
    assert bool((((draws.mean(0) - exact).abs() < 5 * error + 0.02) | ~gap).all())
    ratio = draws.var(0)[gap] / variance[gap]
    assert bool((ratio - 1).abs().max() < 5 * math.sqrt(2 / len(draws)) + 0.05)


def test_categories_are_filled_with_the_most_probable_one(float64):
    """Two columns that always agree: p(x1 | x0) is known by enumeration over a fine grid of z."""
    torch.manual_seed(0)
    likelihood = likelihoods.Masked(MixedColumns([Nominal(3), Nominal(3), likelihoods.Bernoulli()]))
    decoder = Decoder(Mlp(1, 8, 7, activation=nn.Tanh), likelihood)
    with torch.no_grad():
        decoder.net[-1].weight.mul_(4)
    vae = VAE(StandardNormal(1), decoder, DiagonalNormal(nn.Sequential(FillMissing(), Mlp(3, 2)))).double()
    x = torch.tensor([[0.0, math.nan, math.nan], [1.0, math.nan, 1.0], [2.0, math.nan, math.nan]])
    filled = impute(vae, x, 20_000)
    with torch.no_grad():
        z = torch.linspace(-6, 6, 2001).unsqueeze(-1)
        weight = (vae.prior().log_prob(z).unsqueeze(-1) + decoder(z.unsqueeze(1)).log_prob(x)).softmax(0)
        probs = decoder(z).base_dist.base.parts[0].probs[:, 1]  # [N, levels] of the second column
        expected = torch.einsum("nb,nl->bl", weight, probs)
        bit = torch.einsum("nb,n->b", weight, decoder(z).mean[:, 2])
    assert torch.equal(filled[:, 1], expected.argmax(1).double())
    assert expected.topk(2, 1).values.diff(dim=1).abs().min() > 0.05  # no tie
    torch.testing.assert_close(filled[[0, 2], 2], bit[[0, 2]], rtol=0, atol=0.02)


def test_imputing_changes_nothing_and_one_particle_will_do(float64):
    vae, x, *_ = linear()
    state = torch.get_rng_state()
    assert torch.equal(impute(vae, x, 1, seed=1), impute(vae, x, 1, seed=1))
    assert impute(vae, x, 1, sample=True).isfinite().all()
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="expected num_particles to be an integer >= 1"):
        impute(vae, x, 0)


def test_fill_missing(float64):
    x = torch.tensor([[1.0, math.nan, 3.0]])
    assert torch.equal(FillMissing(torch.tensor([7.0, 8.0, 9.0]))(x), torch.tensor([[1.0, 8.0, 3.0]]))
    pictures = torch.zeros(K, B, 2, 4, 3)
    pictures[0, 0, 1, 2, 0] = math.nan
    out = FillMissing(event_dim=3, append_gaps=True)(pictures)
    assert out.shape == (K, B, 4, 4, 3) and out[0, 0, 3, 2, 0] == 1 and out.sum() == 1
    assert repr(FillMissing(append_gaps=True)) == "FillMissing(event_dim=1, append_gaps=True)"


def test_training_with_gaps_finds_what_training_without_them_finds():
    torch.manual_seed(1)
    weight = torch.randn(E, 1)
    full = torch.randn(400, 1) @ weight.T + 0.3 * torch.randn(400, E)
    x = full.masked_fill(torch.rand(400, E) < 0.3, math.nan)
    results = []
    for data in (full, x):
        torch.manual_seed(0)
        encoder = DiagonalNormal(nn.Sequential(FillMissing(append_gaps=True), Mlp(2 * E, 16, 2)))
        vae = VAE(StandardNormal(1), Decoder(nn.Linear(1, E), likelihoods.Masked(likelihoods.Normal())), encoder)
        vae.decoder.start_at_data(data)
        fit(vae, data, x_valid=data[:50], epochs=20, batch_size=50, lr=0.03)
        results.append((vae.decoder.likelihood.likelihood.scale.item(), vae))
    assert abs(results[1][0] - 0.3) < 0.05 and abs(results[0][0] - 0.3) < 0.05
    error = (impute(results[1][1], x, 200) - full)[x.isnan()].square().mean().sqrt().item()
    assert error < 0.5 < full.std()


def test_a_gap_elsewhere_than_in_the_first_batch_is_seen_and_refused_in_words():
    x = torch.rand(30, E)
    x[29, 3] = math.nan
    plain = VAE(StandardNormal(D), Decoder(Mlp(D, E), likelihoods.Normal()), DiagonalNormal(Mlp(E, 2 * D)))
    with pytest.raises(ValueError, match=r"x has 1 values that are NaN.*--likelihood Masked --likelihood.likelihood"):
        fit(plain, x, epochs=1, batch_size=10)
    with pytest.raises(ValueError, match="x has 1 infinite values"):
        check_vae(plain, torch.full((1, 1), math.inf).expand(1, E)[:, :1])
    masked = Decoder(Mlp(D, E), likelihoods.Masked(likelihoods.Normal()))
    unable = VAE(StandardNormal(D), masked, DiagonalNormal(Mlp(E, 2 * D)))
    with pytest.raises(ValueError, match=r"encoder\(x\) is NaN where x has missing numbers"):
        check_vae(unable, x[25:])
    check_vae(unable, x[:5])


def test_mean_and_scale_leave_gaps_out(float64):
    x = torch.randn(20, E)
    torch.testing.assert_close(mean_and_scale(x), (x.mean(0), x.std(0)))
    gappy = x.masked_fill(torch.rand_like(x) < 0.3, math.nan)
    gappy[:, 2], gappy[1:, 3], gappy[0, 3] = math.nan, math.nan, 5.0
    mean, scale = mean_and_scale(gappy)
    there = gappy[:, 0][~gappy[:, 0].isnan()]
    torch.testing.assert_close(torch.stack([mean[0], scale[0]]), torch.stack([there.mean(), there.std()]))
    assert mean[2] == scale[2] == scale[3] == 0 and mean[3] == 5
