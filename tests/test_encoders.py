"""Encoders: closed forms, shapes, refusals. Their distributions are checked in test_testing.py."""

import math

import pytest
import torch
from torch import nn

from pyro_vae import ConvPair, DiagonalNormal, FullNormal, Mlp

K, B, D, E = 3, 5, 2, 7
FAMILIES = [DiagonalNormal, FullNormal]


def test_diagonal_normal_by_hand(float64):
    net = Mlp(E, 4, 2 * D)
    x, z = torch.randn(B, E), torch.randn(K, B, D)
    loc, log_scale = net(x)[:, :D], net(x)[:, D:]
    expected = -0.5 * ((z - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(DiagonalNormal(net)(x).log_prob(z), expected.sum(-1))


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 4])
def test_full_normal_by_hand(float64, latent_dim):
    h = torch.randn(B, FullNormal.num_outputs(latent_dim))
    q = FullNormal(nn.Identity())(h)
    for b in range(B):
        factor, place = torch.zeros(latent_dim, latent_dim), 2 * latent_dim
        for i in range(latent_dim):
            factor[i, i] = h[b, latent_dim + i].exp()
            for j in range(i):
                factor[i, j] = h[b, place]
                place += 1
        torch.testing.assert_close(q.covariance_matrix[b], factor @ factor.T)
        torch.testing.assert_close(q.mean[b], h[b, :latent_dim])
        eps = torch.randn(latent_dim)
        z = h[b, :latent_dim] + factor @ eps
        expected = -0.5 * eps @ eps - factor.diagonal().log().sum() - latent_dim / 2 * math.log(2 * math.pi)
        torch.testing.assert_close(q.log_prob(z)[b], expected)


def test_full_normal_without_its_lower_part_is_diagonal(float64):
    latent_dim = 3
    h, z = torch.randn(B, 2 * latent_dim), torch.randn(K, B, latent_dim)
    full = FullNormal(nn.Identity())(torch.cat([h, torch.zeros(B, 3)], dim=-1))
    torch.testing.assert_close(full.log_prob(z), DiagonalNormal(nn.Identity())(h).log_prob(z))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("latent_dim", [1, 2, 3, 16])
def test_shapes_and_gradients(family, latent_dim):
    encoder = family(Mlp(E, 4, family.num_outputs(latent_dim)))
    q = encoder(torch.randn(K, B, E))
    assert (q.batch_shape, q.event_shape, q.has_rsample) == ((K, B), (latent_dim,), True)
    (q.rsample() ** 2).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_images(family):
    q = family(ConvPair((4,), hidden=6).encoder((1, 4, 6), family.num_outputs(D)))(torch.randn(B, 1, 4, 6))
    assert (q.batch_shape, q.event_shape) == ((B,), (D,))


@pytest.mark.parametrize("outputs", [1, 3, 4, 6])
def test_full_normal_refuses_a_width_that_fits_no_latent_dim(outputs):
    with pytest.raises(ValueError, match=rf"2 D \+ D \(D - 1\) / 2 outputs of its network, found {outputs}: make the"):
        FullNormal(Mlp(E, outputs))(torch.zeros(B, E))


@pytest.mark.parametrize("outputs", [1, 3, 5])
def test_diagonal_normal_refuses_an_odd_width(outputs):
    with pytest.raises(ValueError, match=f"2 D outputs of its network, found {outputs}"):
        DiagonalNormal(Mlp(E, outputs))(torch.zeros(B, E))


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_dtype_and_repr(family):
    make = lambda: family(Mlp(E, 4, family.num_outputs(D)))  # noqa: E731
    one, two, x = make(), make(), torch.randn(B, E)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x).mean, two(x).mean)
    assert repr(one).startswith(family.__name__) and "Linear" in repr(one)
    q = one.to(torch.float64)(x.double())
    assert q.sample().dtype == q.log_prob(q.sample()).dtype == torch.float64
