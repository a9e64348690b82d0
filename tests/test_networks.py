"""Networks: shapes, parameter counts, refusals."""

import pytest
import torch
from torch import nn

from pyro_vae import ConvPair, Mlp, MlpPair, OverBatch, Standardize
from pyro_vae.networks import NetworkPair, set_output_bias

K, B, D, E = 3, 5, 2, 7


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_mlp():
    mlp = Mlp(E, 6, 4, D, activation=nn.Tanh)
    assert [type(layer) for layer in mlp] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert mlp(torch.zeros(K, B, E)).shape == (K, B, D)
    assert count(mlp) == (E * 6 + 6) + (6 * 4 + 4) + (4 * D + D)
    assert len(Mlp(E, D)) == 1


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (3, -1, 2)])
def test_mlp_refuses(sizes):
    with pytest.raises(ValueError, match=r"expected at least two sizes >= 1, found .*Mlp\(inputs, hidden"):
        Mlp(*sizes)


@pytest.mark.parametrize("batch", [(), (B,), (K, B), (2, K, B)])
def test_over_batch(batch):
    conv = nn.Conv2d(1, 4, 3)
    x = torch.randn(*batch, 1, 8, 9)
    out = OverBatch(conv, event_dim=3)(x)
    assert out.shape == (*batch, 4, 6, 7)
    torch.testing.assert_close(out.reshape(-1, 4, 6, 7), conv(x.reshape(-1, 1, 8, 9)))


def test_standardize():
    data = torch.randn(50, E) * torch.arange(1.0, E + 1) + 3
    z = Standardize(data.mean(0), data.std(0))(data)
    torch.testing.assert_close(z.mean(0), torch.zeros(E), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(E))
    assert set(Standardize(1.0, 2.0).state_dict()) == {"loc", "scale"}
    assert Standardize(1, 2).to(torch.float64)(torch.zeros(E).double()).dtype == torch.float64
    assert not list(Standardize(1.0, 2.0).parameters())
    for bad in (0.0, -1.0, torch.tensor([1.0, 0.0]), float("nan")):
        with pytest.raises(ValueError, match=r"expected scale > 0, .*drop constant columns first"):
            Standardize(0.0, bad)


def test_mlp_pair():
    pair = MlpPair(hidden=(6, 4), activation=nn.Tanh)
    encoder, decoder = pair.encoder((1, 3, 4), 2 * D), pair.decoder(D, (2, 3, 4))
    assert encoder(torch.zeros(K, B, 1, 3, 4)).shape == (K, B, 2 * D)
    assert decoder(torch.zeros(K, B, D)).shape == (K, B, 2, 3, 4)
    assert count(encoder) == (12 * 6 + 6) + (6 * 4 + 4) + (4 * 2 * D + 2 * D)
    assert count(decoder) == (D * 4 + 4) + (4 * 6 + 6) + (6 * 24 + 24)
    assert repr(pair) == "MlpPair(hidden=(6, 4), activation=Tanh)"
    assert pair.encoder((E,), 4)(torch.zeros(B, E)).shape == (B, 4)


def test_pairs_build_fresh_networks():
    pair = MlpPair(hidden=(6,))
    first, second = pair.encoder((E,), 4), pair.encoder((E,), 4)
    assert not set(first.parameters()) & set(second.parameters())


def test_conv_pair_under_particles():
    pair = ConvPair(channels=(4, 6), hidden=5, activation=nn.SiLU)
    encoder, decoder = pair.encoder((1, 8, 12), 2 * D), pair.decoder(D, (2, 8, 12))
    x, z = torch.randn(K, B, 1, 8, 12), torch.randn(K, B, D)
    assert encoder(x).shape == (K, B, 2 * D) and encoder(x[0]).shape == (B, 2 * D)
    assert decoder(z).shape == (K, B, 2, 8, 12)
    torch.testing.assert_close(encoder(x)[1], encoder(x[1]))
    torch.testing.assert_close(decoder(z)[1], decoder(z[1]))
    assert count(encoder) == (16 * 4 + 4) + (16 * 4 * 6 + 6) + (6 * 2 * 3 * 5 + 5) + (5 * 2 * D + 2 * D)
    assert count(decoder) == (D * 5 + 5) + (5 * 36 + 36) + (16 * 6 * 4 + 4) + (16 * 4 * 2 + 2)
    assert repr(pair) == "ConvPair(channels=(4, 6), hidden=5, activation=SiLU)"


@pytest.mark.parametrize("shape", [(1, 8, 10), (1, 6, 8), (64,), (2, 1, 8, 8)])
def test_conv_pair_refuses(shape):
    pair = ConvPair(channels=(4, 6))
    message = (
        r"images \[C, H, W\] with H and W multiples of 4, found .*use fewer channels, resize the images, or use Mlp"
    )
    with pytest.raises(ValueError, match=message):
        pair.encoder(shape, 4)
    with pytest.raises(ValueError, match=message):
        pair.decoder(D, shape)


def test_a_pair_of_your_own_has_two_methods():
    with pytest.raises(TypeError, match="decoder, encoder"):
        NetworkPair()


def test_set_output_bias():
    bias = torch.randn(E)
    mlp = Mlp(D, 6, E)
    set_output_bias(mlp, bias)
    assert torch.equal(mlp[-1].bias, bias) and mlp[-1].bias.requires_grad

    image = torch.randn(2, 8, 12)
    net = MlpPair((6,)).decoder(D, (2, 8, 12))
    set_output_bias(net, image)
    torch.testing.assert_close(net[0][-1].bias.reshape(2, 8, 12), image)

    net = ConvPair((4, 6), hidden=5).decoder(D, (2, 8, 12))
    set_output_bias(net, image)
    torch.testing.assert_close(net.net[-1].bias, image.mean((1, 2)))


@pytest.mark.parametrize(
    ("net", "found"),
    [(Mlp(D, 6), "a bias of 6"), (nn.Tanh(), "no bias at all"), (nn.Linear(D, E, bias=False), "no bias at all")],
)
def test_set_output_bias_refuses(net, found):
    with pytest.raises(ValueError, match=f"expected a last layer with a bias of 7 numbers, found {found}"):
        set_output_bias(net, torch.zeros(E))
    with pytest.raises(ValueError, match="a bias of 6"):  # an earlier layer is not meant
        set_output_bias(nn.Sequential(nn.Linear(D, E), nn.Linear(E, 6)), torch.zeros(E))
