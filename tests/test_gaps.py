"""Gaps: on the linear-Gaussian model each is known; refining never harms and changes nothing of the model."""

import math

import pytest
import torch

from pyro_vae import (
    VAE,
    Bernoulli,
    Decoder,
    DiagonalNormal,
    Estimate,
    Mlp,
    PlanarFlow,
    StandardNormal,
    elbo,
    log_evidence,
)
from pyro_vae.exact import LinearGaussian
from pyro_vae.gaps import GapReport, gap_report, generalisation_gap, refine

pytestmark = pytest.mark.usefixtures("float64")
B, D, E = 5, 2, 7


def linear_gaussian():
    weight = torch.tensor([[1.0, 0.2, -0.5, 0.8, 0.0, 0.3, -0.2], [0.8, -0.6, 0.15, 0.9, 0.6, 0.15, 0.0]]).T
    return LinearGaussian(weight, torch.linspace(-1, 1, E), 0.7)


def exactly(lg, x):
    return Estimate("log p(x)", lg.log_evidence(x), 0, "exact")


def spoiled(lg, diagonal):
    """The best encoder, moved away from its optimum."""
    vae = lg.as_vae(diagonal=diagonal)
    vae.encoder.net.bias.data[:D] += 0.4
    vae.encoder.net.bias.data[D : 2 * D] += 0.3
    return vae


@pytest.mark.parametrize("diagonal", [True, False], ids=["diagonal", "full"])
def test_gaps_of_the_linear_gaussian_model(diagonal):
    """Approximation: ½ (Σ log M_ii - log |M|), 0 for the full family. Amortisation: the KL that the spoiling cost."""
    lg = linear_gaussian()
    vae = spoiled(lg, diagonal)
    x = vae.sample(40).detach()
    report = gap_report(vae, x, exactly(lg, x), num_particles=2000)
    best = lg.diagonal_gap() if diagonal else 0.0
    q = vae.encoder(x)
    covariance = torch.diag_embed(q.variance) if diagonal else q.covariance_matrix
    exact = lg.elbo(x, q.mean, covariance).detach()
    tolerance = 4 * report.elbo.monte_carlo_error + 1e-3
    assert abs(report.elbo.mean - exact.mean()) < tolerance
    assert abs(report.approximation.mean - best) < 4 * report.refined.monte_carlo_error + 0.01
    assert abs(report.amortisation.mean - (lg.log_evidence(x) - best - exact).mean()) < tolerance + 0.01
    assert (report.refined.values >= report.elbo.values).all()
    torch.testing.assert_close(report.total.values, report.approximation.values + report.amortisation.values)
    assert report.warning == "" and {report.elbo.policy, report.refined.policy} == {"exact"}
    assert "amortisation" in str(report)


@pytest.mark.parametrize("diagonal", [True, False], ids=["diagonal", "full"])
def test_refined_members_are_the_best_ones(diagonal):
    lg = linear_gaussian()
    vae = spoiled(lg, diagonal)
    x = vae.sample(B).detach()
    found, best = refine(vae, x), lg.as_vae(diagonal=diagonal).encoder(x)
    assert (found.mean - best.mean).abs().max() < 0.05
    assert (found.variance / best.variance).log().abs().max() < 0.15
    assert type(found) is type(best) and found.batch_shape == best.batch_shape


def test_the_best_q_gains_nothing():
    """Where the encoder is optimal already, each example keeps it or an equal one."""
    lg = linear_gaussian()
    vae = lg.as_vae()
    x = vae.sample(20).detach()
    report = gap_report(vae, x, exactly(lg, x), num_steps=30, num_particles=200)
    assert (report.amortisation.values >= 0).all() and report.amortisation.mean < 0.01
    assert report.approximation.values.abs().max() < 0.01


def test_errors_of_the_gaps():
    """The Monte-Carlo error of the ELBO counts antithetic pairs, not draws: seen over 300 copies of one example."""
    lg = linear_gaussian()
    vae = spoiled(lg, True)
    x = vae.sample(1).detach().expand(300, E)
    report = gap_report(vae, x, exactly(lg, x), num_steps=1, num_particles=200)
    seen = report.elbo.values.std()
    assert abs(report.elbo.errors.square().mean().sqrt() - seen) < 4 * seen / math.sqrt(2 * 300)


@pytest.mark.parametrize("max_elements", [16 * E, 2**22])
def test_passes(max_elements):
    lg = linear_gaussian()
    vae = spoiled(lg, True)
    x = vae.sample(B).detach()
    report = gap_report(vae, x, exactly(lg, x), num_steps=40, num_particles=26, max_elements=max_elements)
    assert report.elbo.values.shape == (B,) and report.elbo.num_particles == 26
    assert (report.refined.values >= report.elbo.values).all()
    assert (report.elbo.values - elbo(vae, x, 5000).values).abs().max() < 3


def test_low_evidence_is_noticed():
    lg = linear_gaussian()
    vae = spoiled(lg, True)
    x = vae.sample(B).detach()
    low = Estimate("log p(x)", lg.log_evidence(x) - 3, 10)
    warning = gap_report(vae, x, low, num_particles=200).warning
    assert "nats below the refined ELBO" in warning and "annealed_log_evidence" in warning


def test_generalisation_gap():
    train = Estimate("ELBO", torch.tensor([-1.0, -3.0]), 7)
    test = Estimate("ELBO", torch.tensor([-4.0, -6.0, -8.0]), 7)
    gap, error = generalisation_gap(train, test)
    assert gap == pytest.approx(4) and error == pytest.approx(math.hypot(1, 2 / math.sqrt(3)))
    for other in (Estimate("ELBO", torch.zeros(3), 8), Estimate("log p(x)", torch.zeros(3), 7)):
        with pytest.raises(ValueError, match=r"expected two estimates of one kind, found ELBO \(K=7\)"):
            generalisation_gap(train, other)


def test_nothing_is_changed():
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 6, E), Bernoulli()), DiagonalNormal(Mlp(E, 6, 2 * D)))
    x = (torch.rand(B, E) < 0.5).double()
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    vae.encoder.eval()
    flags, state = [part.training for part in vae.modules()], torch.get_rng_state()
    reports = [gap_report(vae, x, log_evidence(vae, x, 30), num_steps=5, num_particles=4) for _ in range(2)]
    assert torch.equal(reports[0].refined.values, reports[1].refined.values)
    assert all(torch.equal(t, before[name]) for name, t in vae.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in vae.parameters()), "the next training step would add to it"
    assert flags == [part.training for part in vae.modules()] and torch.equal(state, torch.get_rng_state())
    assert isinstance(reports[0], GapReport) and not reports[0].refined.values.requires_grad
    assert not refine(vae, x, 2).mean.requires_grad


def test_refusals():
    lg = linear_gaussian()
    vae, x = lg.as_vae(), torch.zeros(B, E)
    with pytest.raises(ValueError, match="expected evidence of the same 5 examples, found 4"):
        gap_report(vae, x, exactly(lg, x[:4]))
    for number in (0, 1, 7):
        with pytest.raises(ValueError, match=f"expected num_particles to be an even number >= 2, found {number}"):
            gap_report(vae, x, exactly(lg, x), num_particles=number)
    flow = VAE(StandardNormal(D), vae.decoder, PlanarFlow(Mlp(E, PlanarFlow.num_outputs(D, 2)), D, num_transforms=2))
    with pytest.raises(ValueError, match="expected an encoder that gives diagonal or full normals, found"):
        refine(flow, x)
