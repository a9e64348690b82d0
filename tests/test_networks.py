"""Networks: shapes, parameter counts, refusals."""

import pytest
import torch
from torch import nn

from pyro_vae import ConvPair, GatedMlp, Mlp, MlpPair
from pyro_vae.networks import NetworkPair

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


def test_gated_mlp_by_hand(float64):
    mlp, x = GatedMlp(E, 6, 4, D), torch.randn(K, B, E)
    h = x
    for layer in (mlp[0], mlp[2]):
        value, gate = (layer.weight @ h.unsqueeze(-1)).squeeze(-1).add(layer.bias).chunk(2, dim=-1)
        h = value / (1 + (-gate).exp())
    torch.testing.assert_close(mlp(x), mlp[4](h))
    assert count(mlp) == 2 * (E * 6 + 6) + 2 * (6 * 4 + 4) + (4 * D + D)
    assert len(GatedMlp(E, D)) == 1


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (3, -1, 2)])
def test_gated_mlp_refuses(sizes):
    with pytest.raises(ValueError, match=r"expected at least two sizes >= 1, found .*GatedMlp\(inputs, hidden"):
        GatedMlp(*sizes)


def test_mlp_pair():
    pair = MlpPair(hidden=(6, 4), activation=nn.Tanh)
    encoder, decoder = pair.encoder((1, 3, 4), 2 * D), pair.decoder(D, (2, 3, 4))
    assert encoder(torch.zeros(K, B, 1, 3, 4)).shape == (K, B, 2 * D)
    assert decoder(torch.zeros(K, B, D)).shape == (K, B, 2, 3, 4)
    assert count(encoder) == (12 * 6 + 6) + (6 * 4 + 4) + (4 * 2 * D + 2 * D)
    assert count(decoder) == (D * 4 + 4) + (4 * 6 + 6) + (6 * 24 + 24)
    assert repr(pair) == "MlpPair(hidden=(6, 4), activation=Tanh)"
    assert pair.encoder((E,), 4)(torch.zeros(B, E)).shape == (B, 4)


@pytest.mark.parametrize(
    ("pair", "latent_dim", "parameters"),
    [  # perceptrons of well-known examples on 28 x 28 pixels, biases included
        (MlpPair((256,)), 2, 200_960 + 514 + 514 + 768 + 201_488),
        (MlpPair((512,)), 2, 401_920 + 1026 + 1026 + 1536 + 402_192),
        (MlpPair((500, 250)), 2, 392_500 + 125_250 + 502 + 502 + 750 + 125_500 + 392_784),
        (MlpPair((500, 250), decoder_hidden=(10, 250)), 10, 392_500 + 125_250 + 2 * 2510 + 110 + 2750 + 196_784),
    ],
    ids=repr,
)
def test_number_of_parameters(pair, latent_dim, parameters):
    encoder, decoder = pair.encoder((1, 28, 28), 2 * latent_dim), pair.decoder(latent_dim, (1, 28, 28))
    assert count(encoder) + count(decoder) == parameters
    assert decoder(torch.zeros(B, latent_dim)).shape == (B, 1, 28, 28)


def test_mlp_pair_with_a_decoder_of_its_own():
    pair = MlpPair((6,), decoder_hidden=(3, 4))
    assert [layer.out_features for layer in pair.decoder(D, (E,))[0] if isinstance(layer, nn.Linear)] == [3, 4, E]
    assert repr(pair) == "MlpPair(hidden=(6,), activation=ReLU, decoder_hidden=(3, 4))"


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


@pytest.mark.parametrize("normalization", [{"batch_norm": True}, {"num_groups": 2}], ids=str)
def test_normalised_mlp(float64, normalization):
    mlp, x = Mlp(E, 6, 4, D, activation=nn.Tanh, **normalization), 3 + torch.randn(K, B, E)
    h = x.reshape(K * B, E)
    for linear, norm in ((mlp[0], mlp[1].net), (mlp[3], mlp[4].net)):
        h = h @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        if "batch_norm" in normalization:
            m, v = h.mean(0), h.var(0, unbiased=False)
        else:
            halves = h.unflatten(1, (2, -1))
            m = halves.mean(-1).repeat_interleave(halves.shape[-1], dim=-1)
            v = halves.var(-1, unbiased=False).repeat_interleave(halves.shape[-1], dim=-1)
        h = torch.tanh((h - m) / (v + norm.eps).sqrt() * norm.weight + norm.bias)
    expected = h @ mlp[6].weight.T + mlp[6].bias
    torch.testing.assert_close(mlp(x), expected.reshape(K, B, D))
    assert (mlp[0].bias is None) == ("batch_norm" in normalization)  # what a mean would take away


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("pool", [False, True])
def test_conv_pair_without_a_hidden_layer(kernel_size, pool):
    pair = ConvPair((4, 6), hidden=0, kernel_size=kernel_size, pool=pool)
    encoder, decoder = pair.encoder((3, 8, 12), 2 * D), pair.decoder(D, (3, 8, 12))
    square, small = kernel_size**2, 6 * 2 * 3
    assert encoder(torch.randn(B, 3, 8, 12)).shape == (B, 2 * D)
    assert decoder(torch.randn(K, B, D)).shape == (K, B, 3, 8, 12)
    assert count(encoder) == (square * 12 + 4) + (square * 24 + 6) + (small * 2 * D + 2 * D)
    assert count(decoder) == (D * small + small) + (square * 24 + 4) + (square * 12 + 3)
    assert ("pool=True" in repr(pair)) == pool and f"hidden=0, activation=ReLU, kernel_size={kernel_size}" in repr(pair)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": ()}, "expected one or more channels >= 1"),
        ({"channels": (4, 0)}, "expected one or more channels >= 1"),
        ({"hidden": -1}, "hidden >= 0"),
        ({"kernel_size": 1}, r"kernel_size >= 2, found \(32, 64\), 256 and 1"),
        ({"num_groups": 5}, "sizes that 5 groups divide"),
    ],
    ids=str,
)
def test_conv_pair_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvPair(**arguments)


def test_mlps_refuse_groups_of_one():
    for make in (lambda: Mlp(E, 6, D, num_groups=6), lambda: MlpPair((6,), num_groups=6)):
        with pytest.raises(ValueError, match=r"6 groups divide into two or more each, found .*change them"):
            make()


def test_a_pair_of_your_own_has_two_methods():
    with pytest.raises(TypeError, match="decoder, encoder"):
        NetworkPair()
