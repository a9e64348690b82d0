"""Odd examples: ranks against hand-counted answers, and errors against repetitions."""

import math

import pytest
import torch

from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, elbo, likelihoods, log_evidence
from pyro_vae.anomalies import anomaly_score, auroc, auroc_difference

pytestmark = pytest.mark.usefixtures("float64")
N, D, E = 60, 2, 7


@pytest.mark.parametrize(
    ("ordinary", "odd", "area"),
    [([1, 2, 3], [4, 5], 1.0), ([4, 5], [1, 2, 3], 0.0), ([1, 1, 1], [1, 1], 0.5), ([1, 2, 3], [2, 4], 0.75)],
)
def test_auroc_by_hand(ordinary, odd, area):
    s, t = torch.tensor(ordinary, dtype=torch.float64), torch.tensor(odd, dtype=torch.float64)
    found = auroc(s, t)
    assert found.value == pytest.approx(area)
    terms = (t[:, None] > s).double() + 0.5 * (t[:, None] == s).double()
    error = (terms.mean(1).var() / len(t) + terms.mean(0).var() / len(s)).sqrt()
    assert found.standard_error == pytest.approx(error.item())
    assert auroc(s.exp(), t.exp()).value == pytest.approx(area)  # ranks only


def test_the_error_of_auroc_is_that_of_repetitions():
    generator = torch.Generator().manual_seed(0)
    truth = 0.5 * (1 + math.erf(0.5))  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    found = [auroc(torch.randn(50, generator=generator), 1 + torch.randn(30, generator=generator)) for _ in range(400)]
    z = torch.tensor([(each.value - truth) / each.standard_error for each in found])
    assert abs(float(z.mean())) < 4 / math.sqrt(400) * 1.2
    assert 0.85 < float(z.std()) < 1.2


def test_anomaly_scores_are_negated_estimates_and_find_what_is_far():
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, E), likelihoods.Normal()), DiagonalNormal(Mlp(E, 2 * D)))
    x = torch.randn(N, E)
    state = torch.get_rng_state()
    found = anomaly_score(vae, x, 20, policy="toy")
    assert torch.equal(torch.get_rng_state(), state)
    assert found.name == "-log p(x)" and found.policy == "toy"
    assert torch.equal(found.values, -log_evidence(vae, x, 20).values)
    assert torch.equal(anomaly_score(vae, x, 20, estimator=elbo).values, -elbo(vae, x, 20).values)
    assert auroc(found.values, anomaly_score(vae, x + 10, 20).values).value == 1.0


def test_the_difference_of_aurocs_is_paired():
    ordinary, odd = torch.randn(200), torch.randn(150) + 1
    noise = [0.1 * torch.randn(len(part)) for part in (ordinary, odd)]
    other = ordinary + noise[0], odd + noise[1]
    found, one, two = auroc_difference((ordinary, odd), other), auroc(ordinary, odd), auroc(*other)
    assert found.value == pytest.approx(one.value - two.value)
    assert 0 < found.standard_error < 0.4 * math.hypot(one.standard_error, two.standard_error)
    assert auroc_difference(other, other).standard_error == 0
    with pytest.raises(ValueError, match="of the same examples"):
        auroc_difference((ordinary, odd), (ordinary, odd[1:]))


def test_the_error_of_the_difference_is_that_of_repetitions():
    def one():
        ordinary, odd = torch.randn(60), torch.randn(50) + 1
        return auroc_difference((ordinary, odd), (ordinary + torch.randn(60), odd + torch.randn(50)))

    found = [one() for _ in range(200)]
    values, errors = (torch.tensor([getattr(each, name) for each in found]) for name in ("value", "standard_error"))
    assert 0.85 < errors.square().mean().sqrt() / values.std() < 1.18


def test_refusals():
    with pytest.raises(ValueError, match="found NaN"):
        auroc(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="give more examples"):
        auroc(torch.tensor([1.0]), torch.tensor([1.0, 2.0]))
