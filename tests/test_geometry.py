"""Distances, subspaces and holes against closed forms, torch's own divergences and integrals."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from pyro_vae import VAE, Decoder, DiagonalNormal, FullNormal, Mlp, StandardNormal, likelihoods
from pyro_vae.geometry import (
    bhattacharyya,
    euclidean,
    nearest,
    neighbours,
    posterior_normals,
    principal_angles,
    principal_components,
    symmetrised_kl,
    tangent,
    wasserstein,
)

pytestmark = pytest.mark.usefixtures("float64")
Q, N, D, E = 3, 5, 2, 7


def normals(num, seed):
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(num, D, generator=generator)
    return Normal(loc, 0.3 + torch.rand(num, D, generator=generator))


def pairwise(p, q):
    return Normal(p.loc[:, None], p.scale[:, None]), Normal(q.loc[None], q.scale[None])


def test_distances_equal_their_definitions():
    p, q = normals(Q, 0), normals(N, 1)
    a, b = pairwise(p, q)
    assert torch.allclose(euclidean(p, q), (a.loc - b.loc).square().sum(-1).sqrt())
    both = 0.5 * (kl_divergence(a, b) + kl_divergence(b, a)).sum(-1)
    assert torch.allclose(symmetrised_kl(p, q), both)
    # Wasserstein-2 couples equal quantiles: an integral over them.
    u = (torch.arange(20_000) + 0.5) / 20_000
    gap = a.loc[..., None] - b.loc[..., None] + (a.scale - b.scale)[..., None] * Normal(0.0, 1.0).icdf(u)
    assert torch.allclose(wasserstein(p, q), gap.square().mean(-1).sum(-1).sqrt(), rtol=1e-4)
    z = torch.linspace(-12, 12, 4001)
    overlap = (0.5 * (a.log_prob(z[:, None, None, None]) + b.log_prob(z[:, None, None, None]))).exp().sum(0) * (
        z[1] - z[0]
    )
    assert torch.allclose(bhattacharyya(p, q), -overlap.log().sum(-1))
    for distance in (euclidean, symmetrised_kl, wasserstein, bhattacharyya):
        assert distance(p, q).shape == (Q, N)
        assert torch.allclose(distance(p, p).diagonal(), torch.zeros(Q), atol=1e-12)


def test_neighbours_are_the_sorted_distances_and_depend_on_the_distance():
    p, q = normals(Q, 2), normals(N, 3)
    for distance in (euclidean, symmetrised_kl, wasserstein, bhattacharyya):
        values, rows = neighbours(p, q, 3, distance)
        expected = distance(p, q).sort(1)
        assert torch.equal(rows, expected.indices[:, :3]) and torch.allclose(values, expected.values[:, :3])
    # A near mean with another spread against a farther mean with the same one.
    query = Normal(torch.zeros(1, 1), torch.ones(1, 1))
    index = Normal(torch.tensor([[0.5], [1.0]]), torch.tensor([[5.0], [1.0]]))
    assert neighbours(query, index, 1)[1].item() == 0
    assert neighbours(query, index, 1, symmetrised_kl)[1].item() == 1
    assert neighbours(query, index, 1, wasserstein)[1].item() == 1
    with pytest.raises(ValueError, match="expected 1 to 2 neighbours, found 3"):
        neighbours(query, index, 3)
    with pytest.raises(ValueError, match="from one encoder"):
        neighbours(query, q, 1)


def test_chunks_do_not_change_the_neighbours(monkeypatch):
    p, q = normals(Q, 2), normals(N, 3)
    whole, near = neighbours(p, q, 2), nearest(p.loc, q.loc, 2)
    monkeypatch.setattr("pyro_vae.geometry._CHUNK", 1)
    assert torch.equal(neighbours(p, q, 2)[1], whole[1]) and torch.equal(nearest(p.loc, q.loc, 2)[1], near[1])


def test_posterior_normals_are_the_encoders_and_need_diagonal_ones():
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, E), likelihoods.Normal()), DiagonalNormal(Mlp(E, 2 * D)))
    x = torch.randn(N, E)
    found = posterior_normals(vae, x, batch_size=2)
    q = vae.encoder(x).base_dist
    assert torch.allclose(found.loc, q.loc) and torch.allclose(found.scale, q.scale) and vae.training
    full = VAE(StandardNormal(D), vae.decoder, FullNormal(Mlp(E, FullNormal.num_outputs(D))))
    with pytest.raises(ValueError, match="expected diagonal normals"):
        posterior_normals(full, x)


def test_principal_angles_of_planes_at_known_angles():
    for degrees in (0.0, 1e-7, 0.001, 30.0, 44.9, 45.1, 89.9, 90.0):
        t = math.radians(degrees)
        a = torch.eye(E)[:, :2]
        b = torch.stack([torch.eye(E)[0], math.cos(t) * torch.eye(E)[1] + math.sin(t) * torch.eye(E)[2]], 1)
        mixed = b @ torch.tensor([[1.0, 2.0], [-3.0, 0.5]])  # the span, not its basis
        assert torch.allclose(principal_angles(a, mixed), torch.tensor([0.0, degrees]), atol=1e-11 + 1e-7 * degrees)
        assert principal_angles(a[:, 1:], mixed).shape == (1,)
    with pytest.raises(ValueError, match="span both in the space of x"):
        principal_angles(torch.ones(3, 1), torch.ones(4, 1))


def test_a_linear_decoder_spans_its_weight_and_principal_components_find_it():
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, E), likelihoods.Normal()), DiagonalNormal(Mlp(E, 2 * D)))
    weight = vae.decoder.net[0].weight.detach()
    assert torch.allclose(tangent(vae, torch.randn(D)), weight)
    x = torch.randn(200, D) @ weight.T + 3
    pca = principal_components(x, D)
    assert float(principal_angles(weight, pca.directions).max()) < 1e-5
    assert torch.allclose(pca.residual(x), torch.zeros(200), atol=1e-20)
    assert torch.allclose(pca.encode(x) @ pca.directions.T + pca.loc, x)
    off = x + 2 * torch.linalg.qr(weight, mode="complete")[0][:, -1]  # two away from the plane
    assert torch.allclose(pca.residual(off), torch.full((200,), 4.0))
    one = principal_components(x, 1)
    assert one.encode(x).var() > (x @ torch.nn.functional.normalize(torch.randn(E), dim=0)).var()
    with pytest.raises(ValueError, match="expected 1 to 7 components"):
        principal_components(x, E + 1)


def test_nothing_touches_the_random_state():
    vae = VAE(StandardNormal(D), Decoder(nn.Linear(D, E), likelihoods.Normal()), DiagonalNormal(nn.Linear(E, 2 * D)))
    state = torch.get_rng_state()
    tangent(vae, torch.zeros(D))
    assert torch.equal(torch.get_rng_state(), state)
