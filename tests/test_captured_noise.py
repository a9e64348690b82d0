"""The noise of a captured step is fresh: independent from step to step, and of the right distribution.

Draws leave the graph beside the loss, so the noise itself is looked at, over thousands of replays.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

from pyro_vae.capture import has_compiler
from pyro_vae.compiling import CompiledStep

B, REPLAYS = 5, 1500
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler, and there is none")

# Each draw with the distribution that its replays must have.
CONTINUOUS = {
    "Normal": (lambda: dist.Normal(torch.zeros(B), 1.0), stats.norm()),
    "Laplace": (lambda: dist.Laplace(torch.zeros(B), 1.0), stats.laplace()),
    "Gamma": (lambda: dist.Gamma(0.7 * torch.ones(B), 1.0), stats.gamma(0.7)),
    "Beta": (lambda: dist.Beta(0.7 * torch.ones(B), 2.0), stats.beta(0.7, 2.0)),
    "StudentT": (lambda: dist.StudentT(4.0, torch.zeros(B), 1.0), stats.t(4.0)),
    "Gumbel": (lambda: dist.Gumbel(torch.zeros(B), 1.0), stats.gumbel_r()),
}
DISCRETE = {
    "Bernoulli": (lambda: dist.Bernoulli(0.3 * torch.ones(B)), [0.7, 0.3]),
    "Categorical": (lambda: dist.Categorical(torch.tensor([0.2, 0.3, 0.5]).expand(B, 3)), [0.2, 0.3, 0.5]),
    "Poisson": (lambda: dist.Poisson(0.8 * torch.ones(B)), stats.poisson(0.8).pmf(range(3)).tolist()),
}


def replays(draw, backend="replay", count=REPLAYS):
    """What a captured step drew, [count, B]: a parameter moves as well, so that there is something to train."""
    weight = nn.Parameter(torch.ones(()))

    def function(x):
        z = draw()
        (weight * (x + z).square().sum()).backward()
        return weight.detach().clone(), z.detach()

    step = CompiledStep(function, [weight], nn.Module(), warm=0, backend=backend)
    with pyro.validation_enabled(False):
        found = torch.stack([step(torch.ones(B))[1].clone() for _ in range(count)])
    assert ("replayed" if backend == "replay" else "compiled") in step.explain(), step.explain()
    return found


def assert_uncorrelated(z):
    """Step with next step, and neighbours within a step: as for independent draws, to 4 standard errors."""
    z = (z - z.mean()) / z.std()
    for lag in (1, 2, 7):
        product = z[lag:] * z[:-lag]
        assert product.mean().abs() < 4 * product.std() / math.sqrt(product.numel()), lag
    product = z[:, 1:] * z[:, :-1]
    assert product.mean().abs() < 4 * product.std() / math.sqrt(product.numel())


def assert_distributed(z, expected):
    """Kolmogorov and Smirnov's distance; beyond 2 / sqrt(n) with a probability of 7e-4."""
    assert stats.kstest(z.flatten().numpy(), expected.cdf).statistic < 2 / math.sqrt(z.numel())


@pytest.mark.parametrize("name", CONTINUOUS)
def test_replays_draw_anew_from_the_distribution(float64, name):
    make, expected = CONTINUOUS[name]
    z = replays(lambda: make().rsample())
    assert len(z.unique()) == z.numel()
    assert_distributed(z, expected)
    if name != "StudentT":  # whose fourth moment, of which the standard error is made, is infinite
        assert_uncorrelated(z)


@pytest.mark.parametrize("name", DISCRETE)
def test_replays_draw_anew_from_the_classes(float64, name):
    make, probs = DISCRETE[name]
    z = replays(lambda: make().sample()).double()
    assert_uncorrelated(z)
    for value, p in enumerate(probs):
        assert abs((z == value).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / z.numel())


def test_dropout_and_the_order_of_rows_are_drawn_anew(float64):
    kept = replays(lambda: nn.functional.dropout(torch.ones(B), 0.3)) > 0
    assert abs(kept.double().mean() - 0.7) < 4 * math.sqrt(0.21 / kept.numel())
    assert_uncorrelated(kept.double())
    order = replays(lambda: torch.randperm(B).double())
    assert torch.equal(order.sort(1).values, torch.arange(B).double().expand(len(order), B))
    for place in range(B):  # each row comes first equally often
        share = (order[:, 0] == place).double().mean().item()
        assert abs(share - 1 / B) < 4 * math.sqrt((1 / B) * (1 - 1 / B) / len(order))


@needs_compiler
def test_compiled_noise_is_that_of_eager_torch_draw_by_draw():
    """Single precision and inductor: the same stream, over many steps and not only where it was compared."""
    torch.manual_seed(4)
    z = replays(lambda: torch.randn(B) + dist.Bernoulli(0.3 * torch.ones(B)).sample(), "inductor", 300)
    torch.manual_seed(4)
    eager = torch.stack([torch.randn(B) + dist.Bernoulli(0.3 * torch.ones(B)).sample() for _ in range(300)])
    torch.testing.assert_close(z, eager)
    assert len(z.unique()) == z.numel()


def test_a_replay_that_repeats_its_noise_would_be_seen(float64):
    """The checks above see a generator that starts anew at each step, or every tenth."""
    for every in (1, 10):
        torch.manual_seed(0)
        z = []
        for step in range(REPLAYS):
            if step % every == 0:
                torch.manual_seed(0)
            z.append(torch.randn(B))
        stack = torch.stack(z)
        assert len(stack.unique()) < stack.numel()
        with pytest.raises(AssertionError):
            assert_distributed(stack, stats.norm())
