"""The aggregate posterior: the KL term splits exactly, and its parts are known where examples are few or far apart."""

import math

import pytest
import torch
from pyro import distributions as dist
from torch import nn

from pyro_vae import (
    VAE,
    Bernoulli,
    Decoder,
    DiagonalNormal,
    FullNormal,
    MixtureOfNormals,
    Mlp,
    StandardNormal,
    elbo_terms,
)
from pyro_vae.aggregate import aggregate_posterior, log_aggregate
from pyro_vae.exact import LinearGaussian

pytestmark = pytest.mark.usefixtures("float64")
N, D, E = 13, 2, 7


class Fixed(nn.Module):
    """q(z | x) at means that x holds, of one scale."""

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.as_tensor(scale)

    def forward(self, x):
        return dist.Normal(x[..., :D], self.scale.expand_as(x[..., :D])).to_event(1)


def fixed(scale=(0.5, 0.8), prior=None):
    return VAE(prior or StandardNormal(D), Decoder(Mlp(D, E), Bernoulli()), Fixed(scale))


def codes(rows=N):
    return torch.randn(rows, E, generator=torch.Generator().manual_seed(0))


def by_grid(vae, x, limit=8.0, points=401):
    """I_q, marginal KL, total correlation and dimension-wise KL by sums over a grid: a second route."""
    axis = torch.linspace(-limit, limit, points)
    grid, cell = torch.cartesian_prod(axis, axis), float(axis[1] - axis[0])
    with torch.no_grad():
        log_each = vae.encoder(x).log_prob(grid.unsqueeze(1).expand(-1, len(x), -1))
        log_p = vae.prior().log_prob(grid)
    log_q = log_each.logsumexp(1) - math.log(len(x))
    joint = log_q.exp().reshape(points, points)
    first, second = joint.sum(1) * cell, joint.sum(0) * cell
    log_product = (first.log().unsqueeze(1) + second.log()).flatten()

    def mean(density, value):
        return (density * value.where(density > 1e-300, torch.zeros_like(value))).sum() * cell**2

    information = torch.stack([mean(log_each[:, n].exp(), log_each[:, n] - log_q) for n in range(len(x))]).mean()
    q = log_q.exp()
    return information, mean(q, log_q - log_p), mean(q, log_q - log_product), mean(q, log_product - log_p)


def test_parts_against_a_grid():
    vae, x = fixed(), codes()
    draws = [aggregate_posterior(vae, x, seed=seed) for seed in range(150)]
    expected = by_grid(vae, x)
    names = ("mutual_information", "marginal_kl", "total_correlation", "dimension_kl")
    for name, exact in zip(names, expected, strict=True):
        means = torch.tensor([getattr(draw, name).mean for draw in draws])
        assert abs(means.mean() - exact) < 4 * means.std() / math.sqrt(150), name
        # Stratified draws are at least as certain as the error says.
        claimed = torch.tensor([getattr(draw, name).standard_error for draw in draws]).square().mean().sqrt()
        assert means.std() < 1.2 * claimed, name


@pytest.mark.parametrize("max_elements", [1, 3 * N * D, 2**22])
def test_the_surgery_is_an_identity(max_elements):
    """KL = I + marginal KL = I + TC + dimension-wise KL, draw by draw, to rounding."""
    parts = aggregate_posterior(fixed(), codes(), max_elements=max_elements)
    values = {name: getattr(parts, name).values for name in ("rate", "mutual_information", "marginal_kl")}
    torch.testing.assert_close(values["rate"], values["mutual_information"] + values["marginal_kl"])
    torch.testing.assert_close(
        parts.marginal_kl.values, parts.total_correlation.values + parts.dimension_kl.values, rtol=0, atol=1e-10
    )
    assert parts.rate.values.shape == (N,)


def test_the_rate_is_that_of_the_elbo():
    lg = LinearGaussian(torch.randn(E, D), torch.zeros(E), 0.7)
    vae = lg.as_vae()
    x = vae.sample(300).detach()
    found, other = aggregate_posterior(vae, x).rate, elbo_terms(vae, x, 100)["kl"]
    difference = found.values - other.values
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(300)


def test_known_information():
    far = torch.zeros(5, E)
    far[:, 0] = 100.0 * torch.arange(5)
    apart = aggregate_posterior(fixed(), far)
    assert apart.mutual_information.mean == pytest.approx(math.log(5)) and "near its largest value" in apart.warning
    assert apart.total_correlation.mean == pytest.approx(0.0, abs=1e-10), "one dimension tells all"
    alike = aggregate_posterior(fixed((1.0, 1.0)), torch.zeros(5, E))
    for part in (alike.rate, alike.mutual_information, alike.marginal_kl, alike.total_correlation):
        assert part.values.abs().max() < 1e-10
    assert alike.warning == ""
    diagonal = torch.zeros(5, E)
    diagonal[:, 0] = diagonal[:, 1] = 100.0 * torch.arange(5)
    assert aggregate_posterior(fixed(), diagonal).total_correlation.mean == pytest.approx(math.log(5))


def test_a_linear_gaussian_model_has_no_hole():
    """q(z) tends to p(z), and the information to ½ log |I + W^T W / sigma²|."""
    lg = LinearGaussian(torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.3, 0.0]]), torch.zeros(3), 0.9)
    vae = lg.as_vae()
    parts = aggregate_posterior(vae, vae.sample(3000).detach(), num_draws=1000)
    exact = 0.5 * torch.logdet(lg.precision_core / lg.scale**2)
    assert abs(parts.mutual_information.mean - exact) < 4 * parts.mutual_information.standard_error + 0.01
    assert parts.marginal_kl.mean < 4 * parts.marginal_kl.standard_error + 0.01
    assert parts.mutual_information.num_examples == 1000 and parts.num_mixed == 3000
    shifted = VAE(StandardNormal(D), vae.decoder, Fixed((1.0, 1.0)))
    x = torch.randn(500, E) * 0.01
    x[:, 0] += 3.0
    assert aggregate_posterior(shifted, x).marginal_kl.mean == pytest.approx(4.5, abs=0.5)


def test_families_without_factors():
    full = VAE(StandardNormal(D), Decoder(Mlp(D, E), Bernoulli()), FullNormal(Mlp(E, FullNormal.num_outputs(D))))
    found = aggregate_posterior(full, codes())
    assert found.total_correlation is None and found.dimension_kl is None
    torch.testing.assert_close(found.rate.values, found.mutual_information.values + found.marginal_kl.values)
    mixture = aggregate_posterior(fixed(prior=MixtureOfNormals(D, num_components=3)), codes())
    assert mixture.total_correlation is not None and mixture.dimension_kl is None
    assert "total correlation" in str(mixture) and "per dimension" not in str(mixture)


def test_the_density_itself():
    vae, x, z = fixed(), codes(), torch.randn(11, D)
    with torch.no_grad():
        each = torch.stack([vae.encoder(row.unsqueeze(0)).log_prob(z) for row in x])
    expected = each.logsumexp(0) - math.log(N)
    for max_elements in (1, 2**22):
        torch.testing.assert_close(log_aggregate(vae, x, z, max_elements=max_elements), expected)


def test_encoders_see_bounded_batches(monkeypatch):
    monkeypatch.setattr("pyro_vae.aggregate._BATCH", 4)
    vae, x = fixed(), codes()
    torch.testing.assert_close(
        log_aggregate(vae, x, x[:3, :D]),
        vae.encoder(x).log_prob(x[:3, :D].unsqueeze(1).expand(-1, N, -1)).logsumexp(1) - math.log(N),
    )
    parts = aggregate_posterior(vae, x, num_draws=5)
    torch.testing.assert_close(parts.rate.values, parts.mutual_information.values + parts.marginal_kl.values)


def test_refusals_and_state():
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, E), Bernoulli()), DiagonalNormal(Mlp(E, 2 * D)))
    for number in (0, N + 1):
        with pytest.raises(ValueError, match=f"expected num_draws between 1 and {N}"):
            aggregate_posterior(vae, codes(), num_draws=number)
    state = torch.get_rng_state()
    first = aggregate_posterior(vae, codes())
    assert torch.equal(first.rate.values, aggregate_posterior(vae, codes()).rate.values)
    assert torch.equal(state, torch.get_rng_state()) and vae.training
    assert not first.rate.values.requires_grad
