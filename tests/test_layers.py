"""Layers: any leading axes, normalisation in training and evaluation, pictures halved and doubled."""

import pytest
import torch
from torch import nn

from pyro_vae import OverBatch, Standardize
from pyro_vae.layers import BatchNorm, check_normalization, doubling, halved, halving, normalization

K, B, D, E = 3, 5, 2, 7


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


def test_batch_norm_of_one_example_takes_the_running_averages(float64):
    layer, x = BatchNorm(E), 3 + 2 * torch.randn(20, E)
    with torch.no_grad():
        layer.weight.uniform_(1, 2)
        layer.bias.uniform_(1, 2)
    expected = (x - x.mean(0)) / (x.var(0, unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(layer(x), expected)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    alone = layer(x[:1])  # still in training
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(alone, layer.eval()(x[:1])) and not torch.allclose(alone, expected[:1])
    (alone**2).sum().backward()
    assert all((p.grad != 0).all() for p in layer.parameters())


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("shape", [(4,), (4, 6, 7)])
def test_leading_axes_are_one_batch_to_a_normalisation(float64, batch_norm, shape):
    [layer] = normalization(4, batch_norm, 0 if batch_norm else 2, event_dim=len(shape))
    layer = layer if isinstance(layer, OverBatch) else OverBatch(layer, event_dim=3)
    x = 3 + torch.randn(K, B, *shape)
    torch.testing.assert_close(layer(x), layer(x.flatten(0, 1)).unflatten(0, (K, B)))
    over = [0, 1, *range(3, x.dim())]
    means = layer(x).mean(over)  # of each number or channel, over all particles and examples
    assert torch.allclose(means, torch.zeros(4), atol=1e-10) == batch_norm
    assert torch.allclose(layer(x)[0, 0], layer(x[:1, :1])[0, 0]) != batch_norm  # a group is an example's own


def test_no_normalisation_is_no_layer():
    assert normalization(4, False, 0, event_dim=1) == normalization(4, False, 0, event_dim=3) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((6,), True, 2), "expected one normalisation, found batch_norm and num_groups: choose one of them"),
        (((6, 8), False, 3), r"expected sizes that 3 groups divide, found \(6, 8\): change them or num_groups"),
        (((6,), False, -1), "expected num_groups >= 0, found -1: 0 for no"),
        (((6,), False, 6, 2), r"that 6 groups divide into two or more each, found \(6,\)"),
    ],
)
def test_refused_normalisations(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_normalization(*arguments)
    check_normalization((6,), False, 6)  # each channel of a picture by itself


@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5, 6])
def test_halving_and_doubling(float64, kernel_size):
    x = torch.randn(B, 2, 8, 12)
    for pool in (False, True):
        half = nn.Sequential(*halving(2, 3, kernel_size, pool))(x)
        assert half.shape == (B, 3, 4, 6)
    double = doubling(3, 2, kernel_size)
    zeros = torch.zeros(B, 3, 8, 12)
    zeros[..., ::2, ::2] = half  # zeros between the pixels, then a plain transposed convolution
    plain = nn.functional.conv_transpose2d(zeros, double.weight, double.bias, padding=(kernel_size - 1) // 2)
    torch.testing.assert_close(double(half), plain[..., :8, :12])


def test_halved_refuses():
    assert halved("Pair", (3, 8, 12), 2) == (2, 3)
    for shape in [(1, 8, 10), (1, 6, 8), (64,), (2, 1, 8, 8)]:
        message = r"Pair expected images \[C, H, W\] with H and W multiples of 4, found .*use fewer channels, resize"
        with pytest.raises(ValueError, match=message):
            halved("Pair", shape, 2)
