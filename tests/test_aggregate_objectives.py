"""Objectives of the aggregate posterior: values by hand, reductions to the ELBO, and what they do to it."""

import dataclasses
import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from test_objectives import Case, assert_equal_to, linear_gaussian, make_vae, noise, value_and_gradients
from torch import nn

from pyro_vae import (
    DIP,
    ELBO,
    VAE,
    WAE,
    BalancedKL,
    BetaTC,
    InfoVAE,
    draw,
    fit,
)
from pyro_vae.aggregate_terms import aggregate_terms, draws, mmd, prior_draws, trace_data

K, B, D, E = 3, 5, 2, 7
pytestmark = pytest.mark.usefixtures("float64")


def binary(rows=B):
    return (noise(rows, E) > 0).double()


def at_seed(objective, vae, x):
    torch.manual_seed(0)
    return objective.bound(vae.model, vae.guide, x)


def make_terms(vae, x, num_particles=K):
    torch.manual_seed(0)
    return draw(vae.model, vae.guide, x, num_particles=num_particles)


def test_dip_by_hand():
    vae, x = make_vae(), binary()
    q = vae.encoder(x)
    centred = q.mean - q.mean.mean(0)
    means = torch.einsum("bi,bj->ij", centred, centred) / B
    both = means + torch.diag(q.variance.mean(0))
    for kind, c in (("I", means), ("II", both)):
        penalty = 3 * 2 * c[0, 1] ** 2 + 5 * ((c[0, 0] - 1) ** 2 + (c[1, 1] - 1) ** 2)
        found = at_seed(DIP(K, off_diagonal=3.0, diagonal=5.0, kind=kind), vae, x)
        torch.testing.assert_close(found, at_seed(ELBO(K), vae, x) - penalty)


def test_dip_of_the_exact_posterior_of_data_from_the_model():
    """Then the aggregate posterior is the prior: the covariance of the draws is the identity, that of means is not."""
    lg = linear_gaussian()
    vae = lg.as_vae()
    x = vae.sample(20_000)
    with torch.no_grad():
        terms = draw(vae.model, vae.guide, x)
        evidence = lg.log_evidence(x)
        assert (evidence - DIP(kind="II").combine(terms)).abs().max() < 0.05
        assert (evidence - DIP(kind="I").combine(terms)).mean() > 0.1


def test_distances_by_hand():
    vae, x = make_vae(), binary()
    for objective, kernel in ((InfoVAE(K, alpha=0.25, weight=3.0), "gaussian"), (WAE(K, weight=4.0), "multiquadric")):
        torch.manual_seed(0)
        terms = draw(vae.model, vae.guide, x, num_particles=K)
        distance = mmd(draws(terms), prior_draws(terms), kernel).mean(0)
        divergence = (terms.log_qz - terms.log_pz).mean(0)
        weights = (0.75, 2.25) if isinstance(objective, InfoVAE) else (0.0, 4.0)
        expected = terms.log_px.mean(0) - weights[0] * divergence - weights[1] * distance
        torch.testing.assert_close(at_seed(objective, vae, x), expected)


def test_total_correlation_by_hand():
    vae, x = make_vae(), binary()
    terms = make_terms(vae, x)
    q = vae.encoder(x).base_dist
    z = terms.guide_trace.nodes["z"]["value"]
    each = dist.Normal(q.loc, q.scale).log_prob(z.unsqueeze(2))  # [K, B, B', D]
    log_qz = each.sum(-1).logsumexp(-1) - math.log(B)
    log_factors = (each.logsumexp(-2) - math.log(B)).sum(-1)
    expected = (
        terms.log_px - 0.5 * (terms.log_qz - log_qz) - 4.0 * (log_qz - log_factors) - 2.0 * (log_factors - terms.log_pz)
    ).mean(0)
    objective = BetaTC(K, alpha=0.5, beta=4.0, gamma=2.0)
    torch.testing.assert_close(at_seed(objective, vae, x), expected)
    torch.testing.assert_close(at_seed(dataclasses.replace(objective, dataset=x), vae, x), expected)
    more = dataclasses.replace(objective, dataset=binary(20))
    assert more == objective and not torch.allclose(at_seed(more, vae, x), expected)
    assert trace_data(vae.guide, x).nodes["z"]["fn"].batch_shape == (B,)


def test_minibatch_estimators_differ_by_constants_from_the_batch():
    """With mws it is the aggregate of the batch but for log N: the same gradient, another value."""
    vae, x = make_vae(), binary()
    case = Case(vae.model, vae.guide, (x,))
    batch = value_and_gradients(BetaTC(K, alpha=1.0, beta=4.0, gamma=2.0), case)
    mws = value_and_gradients(BetaTC(K, alpha=1.0, beta=4.0, gamma=2.0, estimator="mws", num_examples=100), case)
    assert_equal_to((0.0, batch[1]), (0.0, mws[1]))
    # log N enters the information once, the correlation D - 1 times, the dimensions -D times
    shift = B * math.log(100) * (1.0 * 1 + 4.0 * (D - 1) - 2.0 * D)
    assert mws[0] - batch[0] == pytest.approx(shift)


@pytest.mark.parametrize(
    "objective",
    [
        BetaTC(K, beta=1.0),
        BetaTC(K, alpha=1.0 + 1e-15, beta=1.0),  # through the aggregate posterior, which cancels
        BetaTC(K, alpha=1.0 + 1e-15, beta=1.0, estimator="mss", num_examples=50),
        DIP(K, off_diagonal=0.0, diagonal=0.0),
        InfoVAE(K, alpha=0.0, weight=1.0),
        BalancedKL(K),
    ],
    ids=str,
)
def test_reduces_to_the_elbo(objective):
    vae = make_vae()
    case = Case(vae.model, vae.guide, (binary(),))
    expected = value_and_gradients(ELBO(K), case)
    torch.manual_seed(5)
    assert_equal_to(expected, value_and_gradients(objective, case), atol=1e-8)


def test_total_correlation_falls():
    """Two codes that copy one another are pulled apart by beta."""
    torch.manual_seed(0)
    lg = linear_gaussian()
    x = lg.as_vae().sample(300)

    def trained(beta):
        torch.manual_seed(0)
        vae = lg.as_vae(diagonal=True)
        with torch.no_grad():  # both codes see the same
            vae.encoder.net.weight[1] = 0.9 * vae.encoder.net.weight[0]
        for p in vae.decoder.parameters():
            p.requires_grad_(False)
        fit(vae, x, objective=BetaTC(beta=beta), epochs=15, batch_size=100, lr=0.01)
        with torch.no_grad():
            terms = draw(vae.model, vae.guide, x)
            log_qz, log_factors = aggregate_terms(terms)
        return (log_qz - log_factors).mean()

    assert trained(50.0) < trained(0.0) / 4


def test_point_encoders_and_wae():
    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(E, D)

        def forward(self, x):
            return dist.Delta(self.net(x), event_dim=1)

    vae = make_vae()
    vae = VAE(vae.prior, vae.decoder, Point().double())
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.02}), loss=WAE(weight=5.0))
    losses = [svi.step(binary(20)) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
