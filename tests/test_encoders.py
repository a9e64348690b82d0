"""Encoders: closed forms, shapes, refusals. Their distributions are checked in test_testing.py."""

import math

import pytest
import torch
from torch import nn

from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    Beta,
    ConvPair,
    Decoder,
    DiagonalNormal,
    FullNormal,
    LowRankNormal,
    Mlp,
    StandardNormal,
    VampPrior,
    check_vae,
    draw,
    encoders,
    fit,
)
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.testing import check_distribution, check_encoder

K, B, D, E = 3, 5, 2, 7
FAMILIES = [DiagonalNormal, FullNormal, LowRankNormal, encoders.Laplace, encoders.MixtureOfNormals, encoders.Delta]


def randomised(encoder: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return encoder


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


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        (LowRankNormal, {"rank": 1}),
        (LowRankNormal, {"rank": 2}),
        (encoders.Laplace, {}),
        (encoders.MixtureOfNormals, {"num_components": 1}),
        (encoders.MixtureOfNormals, {"num_components": 3}),
    ],
)
def test_samples_what_it_scores(float64, family, options, latent_dim):
    net = Mlp(E, 4, family.num_outputs(latent_dim, **options), activation=nn.Tanh)
    check_encoder(randomised(family(net, **options)), torch.randn(B, E))


def test_low_rank_normal_by_hand(float64):
    latent_dim, rank = 4, 3
    h, z = torch.randn(B, latent_dim * (2 + rank)), torch.randn(K, B, latent_dim)
    q = LowRankNormal(nn.Identity(), rank=rank)(h)
    factor = h[:, 2 * latent_dim :].reshape(B, latent_dim, rank)
    covariance = factor @ factor.mT + torch.diag_embed((2 * h[:, latent_dim : 2 * latent_dim]).exp())
    dense = torch.distributions.MultivariateNormal(h[:, :latent_dim], covariance)
    torch.testing.assert_close(q.covariance_matrix, covariance)
    torch.testing.assert_close(q.log_prob(z), dense.log_prob(z))
    torch.testing.assert_close(q.entropy(), dense.entropy())
    assert torch.equal(q.mean, h[:, :latent_dim])


def test_laplace_by_hand(float64):
    h, z = torch.randn(B, 2 * D), torch.randn(K, B, D)
    q, scale = encoders.Laplace(nn.Identity())(h), h[:, D:].exp()
    torch.testing.assert_close(q.log_prob(z), (-(z - h[:, :D]).abs() / scale - (2 * scale).log()).sum(-1))
    torch.testing.assert_close(q.stddev, math.sqrt(2) * scale)


def test_mixture_by_hand(float64):
    num = 3
    h, z = torch.randn(B, num * (2 * D + 1)), torch.randn(K, B, D)
    q = encoders.MixtureOfNormals(nn.Identity(), num_components=num)(h)
    weight = h[:, :num].softmax(-1)
    loc, log_scale = h[:, num : num + num * D].reshape(B, num, D), h[:, num + num * D :].reshape(B, num, D)
    density = sum(
        weight[:, c] * torch.distributions.Normal(loc[:, c], log_scale[:, c].exp()).log_prob(z).sum(-1).exp()
        for c in range(num)
    )
    torch.testing.assert_close(q.log_prob(z).exp(), density)
    torch.testing.assert_close(q.mean, (weight.unsqueeze(-1) * loc).sum(1))


def test_gradient_of_the_mixture(float64):
    """E[cos z_1 + sin z_2] of a mixture is known: so is its gradient, in the weights too."""
    num = 3
    h = torch.randn(1, num * (2 * D + 1)).requires_grad_()
    q = encoders.MixtureOfNormals(nn.Identity(), num_components=num)(h)
    loc, log_scale = h[0, num : num + num * D].reshape(num, D), h[0, num + num * D :].reshape(num, D)
    damped = (-0.5 * (2 * log_scale).exp()).exp()
    exact = (h[0, :num].softmax(0) * (loc[:, 0].cos() * damped[:, 0] + loc[:, 1].sin() * damped[:, 1])).sum()
    (expected,) = torch.autograd.grad(exact, h, retain_graph=True)
    z = q.rsample((40, 2000))
    values = (z[..., 0].cos() + z[..., 1].sin()).mean((1, 2))
    found = torch.stack([torch.autograd.grad(value, h, retain_graph=True)[0] for value in values])
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected).abs() < 4.5 * error).all()
    assert error[:, :num].max() < 0.01 < expected[:, :num].abs().max()


def test_delta_is_a_penalised_reconstruction(float64):
    x = torch.rand(B, E).round()
    net = Mlp(E, 4, D)
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 4, E), Bernoulli()), encoders.Delta(net))
    check_vae(vae, x)
    log_px = vae.decoder(net(x)).log_prob(x)
    torch.testing.assert_close(ELBO(3).bound(vae.model, vae.guide, x), log_px + vae.prior().log_prob(net(x)))
    torch.testing.assert_close(IWAE(3).bound(vae.model, vae.guide, x), log_px + vae.prior().log_prob(net(x)))
    torch.testing.assert_close(Beta(beta=0.0).bound(vae.model, vae.guide, x), log_px)
    assert (draw(vae.model, vae.guide, x, num_particles=K).log_qz == 0).all()
    assert torch.equal(vae.encode(x).mean, net(x)) and torch.equal(vae.encode(x).variance, torch.zeros(B, D))
    assert torch.equal(vae.encode(x).log_prob(net(x) + 1), torch.full((B,), -math.inf))


@pytest.mark.parametrize("objective", [ELBO(), IWAE(3)], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_fit_moves_every_parameter(family, objective):
    x = torch.rand(40, E).round()
    decoder = Decoder(Mlp(D, 6, E, activation=nn.Tanh), Bernoulli())
    vae = VAE(StandardNormal(D), decoder, family(Mlp(E, 6, family.num_outputs(D), activation=nn.Tanh)))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    history = fit(vae, x, objective=objective, epochs=2, batch_size=16, lr=0.01, x_valid=x[:B])
    assert all(math.isfinite(v) for column in ("objective", "elbo", "valid_elbo") for v in history[column])
    assert not [name for name, value in vae.state_dict().items() if torch.equal(value, before[name])]
    assert vae.reconstruct(x).shape == (40, E)


@pytest.mark.parametrize("family", [LowRankNormal, encoders.Laplace, encoders.MixtureOfNormals])
def test_vamp_prior_over_it(float64, family):
    encoder = randomised(family(Mlp(E, 4, family.num_outputs(D), activation=nn.Tanh)))
    check_distribution(VampPrior(encoder, torch.randn(4, E))(), batch_shape=(), event_shape=(D,))


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (LowRankNormal(Mlp(E, 7)), r"D \(r \+ 2\) outputs of its network, found 7 for r = 2: make the last layer"),
        (encoders.Laplace(Mlp(E, 3)), "2 D outputs of its network, found 3: make the last layer Laplace.num"),
        (
            encoders.MixtureOfNormals(Mlp(E, 12), num_components=3),
            r"C \(2 D \+ 1\) outputs of its network, found 12 for C = 3: make .*\(latent_dim, num_components=3",
        ),
        (encoders.MixtureOfNormals(Mlp(E, 3), num_components=3), "found 3 for C = 3"),
    ],
)
def test_other_families_refuse_a_width_that_fits_no_latent_dim(encoder, message):
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(B, E))


def test_refused_arguments():
    with pytest.raises(ValueError, match="expected rank >= 1, found 0"):
        LowRankNormal(Mlp(E, 4), rank=0)
    with pytest.raises(ValueError, match="expected num_components >= 1, found -1"):
        encoders.MixtureOfNormals(Mlp(E, 4), num_components=-1)


def test_repr_shows_the_arguments():
    assert "rank=3" in repr(LowRankNormal(Mlp(E, 10), rank=3))
    assert "num_components=3" in repr(encoders.MixtureOfNormals(Mlp(E, 9), num_components=3))


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_dtype_and_repr(family):
    make = lambda: family(Mlp(E, 4, family.num_outputs(D)))  # noqa: E731
    one, two, x = make(), make(), torch.randn(B, E)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x).mean, two(x).mean)
    assert repr(one).startswith(family.__name__) and "Linear" in repr(one)
    q = one.to(torch.float64)(x.double())
    assert q.sample().dtype == q.log_prob(q.sample()).dtype == torch.float64
