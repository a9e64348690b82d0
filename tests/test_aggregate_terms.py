"""The aggregate posterior: against known covariances and enumerated batches, with the biases of its estimators."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from test_objectives import CASES, Case, make_vae, noise

from pyro_vae import VAE, AutoregressiveFlow, Bernoulli, BetaTC, Decoder, Mlp, StandardNormal, draw
from pyro_vae.aggregate import log_aggregate
from pyro_vae.aggregate_terms import aggregate_terms, draws, log_q_pairs, mmd, moments, prior_draws, trace_data

K, B, D, E = 3, 5, 2, 7
pytestmark = pytest.mark.usefixtures("float64")


def gaussian(mean, width):
    """A model and a guide q(z|x_n) = N(mean_n, width^2): data are row numbers [N, 1]."""
    dim = mean.shape[1]

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(mean[x[:, 0].long()], width).to_event(1))

    rows = torch.arange(len(mean), dtype=torch.float64).unsqueeze(1)
    return Case(model, guide, (rows,))


def correlated(count, covariance, width, seed=0):
    """Codes such that the aggregate posterior is N(0, covariance), up to 1/N."""
    dim = len(covariance)
    factor = torch.linalg.cholesky(covariance - width**2 * torch.eye(dim))
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(points.clamp(1e-9, 1 - 1e-9))
    normal = normal - normal.mean(0)
    normal = torch.linalg.solve_triangular(torch.linalg.cholesky(normal.T @ normal / count), normal.T, upper=False).T
    return normal @ factor.T


COVARIANCE = torch.tensor([[1.5, 0.9], [0.9, 1.1]], dtype=torch.float64)
WIDTH = 0.5


def mean_parts(terms, estimated):
    """Mutual information, total correlation and dimension-wise KL of each draw, [K B]."""
    parts = (
        terms.log_qz - estimated.log_qz,
        estimated.log_qz - estimated.log_qz_factors,
        estimated.log_qz_factors - terms.log_pz,
    )
    return [part.flatten() for part in parts]


def exact_parts(covariance, width):
    log_det, log_diagonal = torch.logdet(covariance), covariance.diagonal().log()
    information = 0.5 * (log_det - len(covariance) * math.log(width**2))
    dimensions = 0.5 * (covariance.diagonal() - 1 - log_diagonal).sum()
    return information, 0.5 * (log_diagonal.sum() - log_det), dimensions


def test_parts_of_a_gaussian_aggregate():
    """I = 1/2 log |S| / w^2D, TC = 1/2 (sum log S_ii - log |S|), dimension-wise KL = sum KL(N(0, S_ii), N(0, 1))."""
    mean = correlated(4096, COVARIANCE, WIDTH)
    case = gaussian(mean, WIDTH)
    with torch.no_grad():
        whole = trace_data(case.guide, *case.args)
        torch.manual_seed(1)
        batch = case.args[0][torch.randperm(4096)[:1500]]
        terms = draw(case.model, case.guide, batch)
        parts = mean_parts(terms, aggregate_terms(terms, data_guide=whole))
        everything = draw(case.model, case.guide, case.args[0][:1024])
    for found, exact in zip(parts, exact_parts(COVARIANCE, WIDTH), strict=True):
        error = found.std() / math.sqrt(len(found))
        assert (found.mean() - exact).abs() < 4 * error + 5e-3, (found.mean(), exact, error)
    torch.testing.assert_close(sum(parts), (terms.log_qz - terms.log_pz).flatten())
    batch_only = mean_parts(everything, aggregate_terms(everything))
    assert (batch_only[0].mean() - exact_parts(COVARIANCE, WIDTH)[0]).abs() < 0.15


def test_equal_to_the_evaluation_of_a_trained_model():
    """``aggregate.log_aggregate`` is another program for the same mixture."""
    vae, x = make_vae(), (noise(9, E) > 0).double()
    with torch.no_grad():
        terms = draw(vae.model, vae.guide, x[:B], num_particles=K)
        found = aggregate_terms(terms, data_guide=trace_data(vae.guide, x)).log_qz
        z = terms.guide_trace.nodes["z"]["value"].reshape(K * B, D)
        torch.testing.assert_close(found.flatten(), log_aggregate(vae, x, z))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, K])
def test_pairs_by_hand(vectorize, num_particles):
    vae, x = make_vae(), (noise(B, E) > 0).double()
    terms = draw(vae.model, vae.guide, x, num_particles=num_particles, vectorize_particles=vectorize)
    q = vae.encoder(x)
    z = draws(terms)
    assert z.shape == (num_particles, B, D)
    loc, scale = q.base_dist.loc, q.base_dist.scale
    each = torch.empty(num_particles, B, B, D)
    for k, b, n in itertools.product(range(num_particles), range(B), range(B)):
        each[k, b, n] = dist.Normal(loc[n], scale[n]).log_prob(z[k, b])
    torch.testing.assert_close(log_q_pairs(terms, per_dimension=True), each)
    torch.testing.assert_close(log_q_pairs(terms), each.sum(-1))
    torch.testing.assert_close(log_q_pairs(terms).diagonal(dim1=1, dim2=2), terms.log_qz)


def test_pairs_of_correlated_posteriors_and_flows():
    torch.manual_seed(0)
    flow = AutoregressiveFlow(Mlp(E, 6, AutoregressiveFlow.num_outputs(D)), D)
    x = (noise(B, E) > 0).double()
    for vae in (
        make_vae("standard", "full"),
        VAE(StandardNormal(D), Decoder(Mlp(D, 6, E), Bernoulli()), flow).double(),
    ):
        terms = draw(vae.model, vae.guide, x, num_particles=K)
        pairs = log_q_pairs(terms)
        torch.testing.assert_close(pairs.diagonal(dim1=1, dim2=2), terms.log_qz, rtol=1e-6, atol=1e-6)
        aside = vae.encoder(x[1:2]).log_prob(draws(terms)[2, 4].unsqueeze(0))
        torch.testing.assert_close(pairs[2, 4, 1], aside[0], rtol=1e-6, atol=1e-6)
        assert aggregate_terms(terms, per_dimension=False).log_qz.shape == (K, B)


def test_minibatch_estimators_by_enumeration():
    """Over all batches that hold an example: mss is unbiased for q(z), mws is not, and both by hand."""
    count, size, mean = 6, 3, noise(6, D)
    q = dist.Normal(mean, 0.6).to_event(1)
    z = q.sample()[0]  # a draw of example 0
    density = q.log_prob(z).exp()  # q(z|x_n) of all examples
    found = {"mss": [], "mws": []}
    for others in itertools.combinations(range(1, count), size - 1):
        rows = torch.tensor([*([n] for n in others), [0]], dtype=torch.float64)
        case = gaussian(mean, 0.6)
        held = dist.Delta(torch.stack([*mean[list(others)], z]), event_dim=1)
        trace = poutine.trace(poutine.condition(case.guide, {})).get_trace(rows)
        trace.nodes["z"]["value"] = held.v
        terms = draw(poutine.replay(case.model, trace=trace), poutine.replay(case.guide, trace=trace), rows)
        for name, values in found.items():
            values.append(aggregate_terms(terms, name, count, per_dimension=False).log_qz[0, -1].exp())
    mss, mws = (torch.stack(found[name]).mean() for name in ("mss", "mws"))
    torch.testing.assert_close(mss, density.mean())
    by_hand = (density[0] + (size - 1) * density[1:].mean()) / (count * size)
    torch.testing.assert_close(mws, by_hand)


def test_stated_biases():
    """N = 2000, D = 4, B = 65, total correlation 0.139: mws about (D - 1) log N too high, mss too low, exact right."""
    covariance = torch.eye(4, dtype=torch.float64)
    covariance[0, 1] = covariance[1, 0] = covariance[2, 3] = covariance[3, 2] = math.sqrt(1 - math.exp(-0.139))
    exact = exact_parts(covariance, 0.5)[1]
    assert exact.item() == pytest.approx(0.139)
    mean = correlated(2000, covariance, 0.5)
    case = gaussian(mean, 0.5)
    whole = trace_data(case.guide, *case.args)
    torch.manual_seed(0)
    totals = {"exact": [], "mws": [], "mss": []}
    for _ in range(20):
        terms = draw(case.model, case.guide, case.args[0][torch.randperm(2000)[:65]])
        for name, values in totals.items():
            with_data = whole if name == "exact" else None
            values.append(mean_parts(terms, aggregate_terms(terms, name, 2000, with_data))[1].mean())
    found = {name: torch.stack(values).mean().item() for name, values in totals.items()}
    error = torch.stack(totals["exact"]).std().item() / math.sqrt(20)
    assert abs(found["exact"] - exact) < 4 * error + 0.02
    assert found["mws"] - exact == pytest.approx(3 * math.log(2000), abs=3.0)
    assert found["mss"] < 0 < exact - 0.1


def test_independent_codes_have_no_total_correlation():
    mean = correlated(2048, torch.diag(torch.tensor([1.5, 0.8], dtype=torch.float64)), WIDTH)
    case = gaussian(mean, WIDTH)
    terms = draw(case.model, case.guide, case.args[0][:600])
    total = mean_parts(terms, aggregate_terms(terms, data_guide=trace_data(case.guide, *case.args)))[1]
    assert total.mean().abs() < 4 * total.std() / math.sqrt(len(total)) + 3e-3


# ---------------------------------------------------------------------------------------- moments, draws, distance


def test_moments():
    x = (noise(B, E) > 0).double()
    for encoder in ("diagonal", "full"):
        vae = make_vae("standard", encoder)
        for count in (1, K):
            terms = draw(vae.model, vae.guide, x, num_particles=count)
            mean, covariance = moments(terms)
            q = vae.encoder(x)
            torch.testing.assert_close(mean, q.mean)
            expected = q.covariance_matrix if encoder == "full" else torch.diag_embed(q.variance)
            torch.testing.assert_close(covariance, expected)


def test_prior_draws():
    x = (noise(B, E) > 0).double()
    vae = make_vae("standard")
    terms = draw(vae.model, vae.guide, x.repeat(400, 1), num_particles=K)
    y = prior_draws(terms)
    assert y.shape == (K, 400 * B, D) and y.mean().abs() < 0.06 and (y.var() - 1).abs() < 0.1
    mixture = make_vae("mixture")
    with pytest.raises(ValueError, match="expected a prior with a reparameterised sampler"):
        prior_draws(draw(mixture.model, mixture.guide, x))
    with torch.no_grad():
        assert prior_draws(draw(mixture.model, mixture.guide, x)).shape == (1, B, D)
    mixture.prior.requires_grad_(False)
    assert prior_draws(draw(mixture.model, mixture.guide, x)).shape == (1, B, D)


def test_mmd_of_normals():
    """The Gaussian kernel of two normals in closed form."""
    torch.manual_seed(0)
    z, y = 0.7 * torch.randn(200, 50, D) + 0.4, torch.randn(200, 50, D)

    def kernel(variance, shift):  # E exp(-r / 2D), r the squared distance of two normals
        return (1 + variance / D) ** (-D / 2) * math.exp(-D * shift**2 / (2 * (D + variance)))

    exact = kernel(2 * 0.49, 0.0) + kernel(2.0, 0.0) - 2 * kernel(1.49, 0.4)
    found = mmd(z, y, "gaussian").mean(1)
    assert (found.mean() - exact).abs() < 4 * found.std() / math.sqrt(len(found))
    same = mmd(torch.randn(200, 50, D), y).mean(1)
    assert same.mean().abs() < 4 * same.std() / math.sqrt(len(same))
    assert mmd(z, y).mean() > 0.02


def test_mmd_by_hand():
    z, y = noise(1, 4, D), noise(1, 4, D, seed=2)

    def k(a, b):
        r = ((a - b) ** 2).sum()
        return sum(2 * D * s / (2 * D * s + r) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    pairs = [(i, j) for i in range(4) for j in range(4)]
    within = sum(k(z[0, i], z[0, j]) + k(y[0, i], y[0, j]) for i, j in pairs if i != j) / 12
    between = sum(k(z[0, i], y[0, j]) for i, j in pairs) / 16
    torch.testing.assert_close(mmd(z, y).mean(), within - 2 * between)
    assert torch.isfinite(mmd(z[:, :1], y[:, :1])).all()


# -------------------------------------------------------------------------------------------------------- refusals


def test_refusals():
    layers = CASES["two layers"]()
    with pytest.raises(ValueError, match=r"one latent site in one plate of examples|in one order"):
        aggregate_terms(draw(layers.model, layers.guide, *layers.args))
    masked = CASES["masked"]()
    with pytest.raises(ValueError, match="one unmasked draw for each example"):
        aggregate_terms(draw(masked.model, masked.guide, *masked.args))
    vae, x = make_vae("standard", "full"), (noise(B, E) > 0).double()
    with pytest.raises(ValueError, match="factorises over its dimensions"):
        aggregate_terms(draw(vae.model, vae.guide, x))
    diagonal = make_vae()
    terms = draw(diagonal.model, diagonal.guide, x)
    with pytest.raises(ValueError, match="expected num_examples for the estimator 'mws'"):
        aggregate_terms(terms, "mws")
    with pytest.raises(ValueError, match="expected the estimator 'exact', 'mws' or 'mss', found 'other'"):
        aggregate_terms(terms, "other", 10)
    for settings in ({"estimator": "mss"}, {"estimator": "mws", "num_examples": 0}):
        with pytest.raises(ValueError, match="expected num_examples >= 1"):
            BetaTC(**settings)
    with pytest.raises(ValueError, match="with a dataset"):
        BetaTC(estimator="mws", num_examples=3, dataset=x)
