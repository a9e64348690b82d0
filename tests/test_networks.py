"""Networks: shapes, parameter counts, refusals."""

import pytest
import torch
from torch import nn

from pyro_vae import ConvPair, GatedMlp, Mlp, MlpPair, OverBatch, Standardize, init_glorot, init_he
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


@pytest.mark.parametrize("init", [init_he, init_glorot])
def test_initialisations_start_biases_at_zero_and_return_the_network(init):
    net = ConvPair((4, 6), hidden=5).decoder(D, (1, 8, 8))
    assert init(net) is net
    layers = [m for m in net.modules() if hasattr(m, "weight")]
    assert len(layers) == 4 and all((layer.bias == 0).all() and (layer.weight != 0).all() for layer in layers)
    init(nn.Sequential(nn.Linear(D, E, bias=False), nn.BatchNorm1d(E)))  # nothing to set to zero, nothing to draw


@pytest.mark.parametrize(
    ("layer", "num_in", "num_out"),
    [
        (nn.Linear(300, 200), 300, 200),
        (nn.Conv2d(30, 40, 5), 30 * 25, 40 * 25),
        (nn.Conv2d(30, 40, 4, stride=2), 30 * 16, 40 * 4),
        (nn.Conv2d(30, 60, 3, groups=3), 10 * 9, 20 * 9),
        (nn.ConvTranspose2d(30, 40, 4, stride=2), 30 * 4, 40 * 16),
    ],
    ids=str,
)
def test_sizes_of_initial_weights(layer, num_in, num_out):
    weight = init_he(layer).weight
    assert weight.std().item() == pytest.approx((2 / num_in) ** 0.5, rel=0.03)
    assert weight.abs().max() > 3 * weight.std()  # normal
    weight, bound = init_glorot(layer).weight, (6 / (num_in + num_out)) ** 0.5
    assert 0.99 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.mark.parametrize("layer", [nn.Conv2d(20, 20, 4, stride=2), nn.ConvTranspose2d(20, 20, 4, stride=2)], ids=str)
def test_he_keeps_the_size_of_activations(layer):
    x = torch.randn(40, 20, 16, 16)
    out = init_he(nn.Sequential(nn.ReLU(), layer))(x)[..., 2:-2, 2:-2]
    assert (out**2).mean().item() == pytest.approx(1.0, rel=0.15)


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


def test_standardize_copies_and_keeps_the_precision():
    loc, scale = torch.randn(E, dtype=torch.float64), torch.ones(E, dtype=torch.float64)
    exact, layer = loc.clone(), Standardize(loc, scale)
    loc.zero_()
    scale.zero_()
    assert torch.equal(layer.loc, exact) and torch.equal(layer.scale, torch.ones(E, dtype=torch.float64))
    assert Standardize(torch.tensor(8), 4).loc.dtype == Standardize(8, 4.0).scale.dtype == torch.float32
    assert not Standardize(torch.zeros(E, requires_grad=True), 1.0).loc.requires_grad


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
