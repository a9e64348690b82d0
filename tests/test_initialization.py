"""Initialisation: sizes of weights, biases, the output's bias."""

import pytest
import torch
from torch import nn

from pyro_vae import ConvPair, Mlp, MlpPair, init_glorot, init_he, init_normal
from pyro_vae.initialization import set_output_bias

K, B, D, E = 3, 5, 2, 7


@pytest.mark.parametrize("init", [init_he, init_glorot, init_normal])
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


def test_a_last_layer_without_bias_is_not_stood_in_for_by_an_earlier_one():
    net = nn.Sequential(nn.Linear(D, E), nn.Linear(E, E, bias=False))
    with pytest.raises(ValueError, match="of 7 numbers, found no bias at all"):
        set_output_bias(net, torch.zeros(E))


def test_init_normal():
    weight = init_normal(nn.Linear(300, 200), scale=0.1).weight.double()
    assert weight.abs().max() <= 0.2 and weight.abs().max() > 0.199
    # A standard normal within two standard deviations has the variance 1 - 4 phi(2) / (2 Phi(2) - 1).
    assert weight.std().item() == pytest.approx(0.1 * 0.7737413**0.5, rel=0.01)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected scale > 0"):
            init_normal(nn.Linear(D, E), scale=scale)
