"""How far weights can be trusted: effective sample size, standard error and tail, against known tails and scipy."""

import math

import pytest
import torch
from scipy.stats import genpareto

from pyro_vae.tails import (
    effective_sample_size,
    largest_pareto_k,
    pareto_k,
    standard_error_of_log_mean,
    tail_length,
)

pytestmark = pytest.mark.usefixtures("float64")


def generalised_pareto(k, rows, columns, seed=0):
    """Weights with a tail of known shape, by inversion."""
    u = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return -u.log() if k == 0 else (u**-k - 1) / k


@pytest.mark.parametrize("k", [-0.5, 0, 0.3, 0.5, 0.7, 1.0])
def test_known_tails(k):
    """The shape is found: the spread over 300 repetitions gives the standard error; the prior pulls it to 1/2."""
    num_draws = 5000
    n = tail_length(num_draws)
    found = pareto_k(generalised_pareto(k, num_draws, 300).log())
    expected = (n * k + 10 * 0.5) / (n + 10)
    assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(300) + 0.03  # the fit itself is biased by 1 / n
    assert found.std() < 0.15


@pytest.mark.parametrize("k", [0.3, 0.7, 1.0])
def test_the_fit_agrees_with_maximum_likelihood(k):
    """Against scipy's fit of the same exceedances, the prior on k undone."""
    weights = generalised_pareto(k, 5000, 5, seed=1)
    n = tail_length(5000)
    top = weights.topk(n + 1, dim=0).values
    ours = (pareto_k(weights.log()) * (n + 10) - 5) / n
    for b in range(5):
        theirs, _, _ = genpareto.fit((top[:n, b] - top[n, b]).numpy(), floc=0)
        assert ours[b] == pytest.approx(theirs, abs=0.05)


def by_hand(exceedances):
    """The estimator of Zhang and Stephens (2009), number by number, with the prior of Vehtari et al. (2024)."""
    x = sorted(exceedances)
    n = len(x)
    num_grid, quartile = 30 + int(math.sqrt(n)), x[int(n / 4 + 0.5) - 1]
    grid = [1 / x[-1] + (1 - math.sqrt(num_grid / (j - 0.5))) / (3 * quartile) for j in range(1, num_grid + 1)]
    profile = []
    for b in grid:
        k = sum(math.log1p(-b * value) for value in x) / n
        profile.append(n * (math.log(-b / k) - k - 1))
    weights = [1 / sum(math.exp(other - value) for other in profile) for value in profile]
    b = sum(weight * value for weight, value in zip(weights, grid, strict=True))
    return (sum(math.log1p(-b * value) for value in x) + 5) / (n + 10)


@pytest.mark.parametrize("num_draws", [25, 100, 1000])
@pytest.mark.parametrize("k", [-0.5, 0.4, 1.1])
def test_the_fit_number_by_number(k, num_draws):
    weights = generalised_pareto(k, num_draws, 3, seed=2)
    n = tail_length(num_draws)
    top = weights.topk(n + 1, dim=0).values
    expected = [by_hand(((top[:n, b] - top[n, b]) / top[0, b]).tolist()) for b in range(3)]
    torch.testing.assert_close(pareto_k(weights.log()), torch.tensor(expected), rtol=0, atol=1e-10)


def test_importance_weights_of_a_known_tail():
    """Target N(0, 1), proposal N(0, s): w ~ exp(-z² (1 - s^-2) / 2), whose tail has shape k = 1 - s² (s < 1)."""
    for s, low, high in ((1.2, -math.inf, 0.3), (0.8, 0.2, 0.6), (0.4, 0.65, 1.2)):
        z = s * torch.randn(100_000, 7, generator=torch.Generator().manual_seed(2))
        log_w = -0.5 * z**2 + 0.5 * (z / s) ** 2
        assert low < pareto_k(log_w).mean() < high, s


def test_scale_does_not_matter():
    log_w = generalised_pareto(0.4, 1000, 5).log()
    torch.testing.assert_close(pareto_k(log_w), pareto_k(log_w - 1234.5), rtol=0, atol=1e-8)


def test_weights_without_a_tail():
    assert pareto_k(torch.full((100, 3), -80.0)).tolist() == [0.0] * 3
    assert pareto_k(-80 + 1e-13 * torch.randn(100, 3)).tolist() == [0.0] * 3, "rounding errors are no tail"
    assert pareto_k(torch.full((100, 1), -math.inf)).isnan().all()
    few = torch.full((100, 1), -math.inf)
    few[:3] = 0.0
    assert pareto_k(few) > 1, "three weights of a hundred are all there is"


def test_too_few_draws():
    with pytest.raises(ValueError, match="expected at least 25 draws, found 24"):
        pareto_k(torch.zeros(24, 3))
    assert pareto_k(torch.randn(25, 3)).isfinite().all()


def test_effective_sample_size():
    log_w = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]]).T.log()
    torch.testing.assert_close(effective_sample_size(log_w)[[0, 2]], torch.tensor([36 / 14, 1.0]))


def test_standard_error_of_the_log_mean():
    """The delta method, and what 2000 repetitions show."""
    w = torch.tensor([[1.0, 2.0, 4.0]]).T
    expected = w.std() / w.mean() / math.sqrt(3)
    torch.testing.assert_close(standard_error_of_log_mean(w.log()), expected.reshape(1))
    log_w = 0.5 * torch.randn(400, 2000, generator=torch.Generator().manual_seed(0))
    claimed = standard_error_of_log_mean(log_w).square().mean().sqrt()
    seen = (log_w.logsumexp(0) - math.log(400)).std()
    assert abs(claimed - seen) < 4 * seen / math.sqrt(2 * 2000)


def test_the_threshold():
    assert largest_pareto_k(100) == 0.5
    assert largest_pareto_k(1000) == pytest.approx(2 / 3)
    assert largest_pareto_k(10**6) == 0.7
