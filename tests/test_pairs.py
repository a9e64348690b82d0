"""More pairs of networks: shapes, parameter counts, normalisation in training and evaluation, refusals."""

import math

import pytest
import torch
from torch import nn

from pyro_vae import VAE, Decoder, DiagonalNormal, GatedMlpPair, ResidualPair, StandardNormal, fit
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.networks import set_output_bias
from pyro_vae.pairs import ResidualBlock

K, B, D, E = 3, 5, 2, 7


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_gated_mlp_pair():
    pair = GatedMlpPair(hidden=(6, 4))
    encoder, decoder = pair.encoder((1, 3, 4), 2 * D), pair.decoder(D, (2, 3, 4))
    assert encoder(torch.zeros(K, B, 1, 3, 4)).shape == (K, B, 2 * D)
    assert decoder(torch.zeros(K, B, D)).shape == (K, B, 2, 3, 4)
    assert count(encoder) == 2 * (12 * 6 + 6) + 2 * (6 * 4 + 4) + (4 * 2 * D + 2 * D)
    assert count(decoder) == 2 * (D * 4 + 4) + 2 * (4 * 6 + 6) + (6 * 24 + 24)
    assert repr(pair) == "GatedMlpPair(hidden=(6, 4))"
    set_output_bias(decoder, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("normalization", [{}, {"batch_norm": True}, {"num_groups": 2}], ids=str)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 64, 64), (1, 8, 8), (1, 13, 9)], ids=str)
def test_residual_pair(shape, normalization):
    pair = ResidualPair((4, 6, 8), blocks=1, hidden=5, **normalization)
    encoder, decoder = pair.encoder(shape, 2 * D), pair.decoder(D, (2 * shape[0], *shape[1:]))
    assert encoder(torch.randn(K, B, *shape)).shape == (K, B, 2 * D) and encoder(torch.randn(B, *shape)).dim() == 2
    assert decoder(torch.randn(K, B, D)).shape == (K, B, 2 * shape[0], *shape[1:])
    set_output_bias(decoder, torch.zeros(2 * shape[0], *shape[1:]))
    for net, size in ((encoder, shape), (decoder, (D,))):
        (net(torch.randn(B, *size)) ** 2).sum().backward()
        assert all(p.grad is not None for p in net.parameters())


def test_residual_pair_count_and_repr():
    pair = ResidualPair((4, 6), blocks=2, hidden=5, activation=nn.SiLU)

    def conv(inputs, outputs):
        return 9 * inputs * outputs + outputs

    blocks = 2 * 2 * conv(4, 4) + 2 * 2 * conv(6, 6)
    small = 6 * 7 * 7
    encoder = conv(1, 4) + conv(4, 6) + blocks + (small * 5 + 5) + (5 * 4 + 4)
    decoder = (D * 5 + 5) + (5 * small + small) + blocks + conv(6, 4) + conv(4, 2)
    assert count(pair.encoder((1, 28, 28), 4)) == encoder
    assert count(pair.decoder(D, (2, 28, 28))) == decoder
    assert repr(pair) == (
        "ResidualPair(channels=(4, 6), blocks=2, hidden=5, activation=SiLU, batch_norm=False, num_groups=0)"
    )
    assert not set(pair.encoder((1, 8, 8), 4).parameters()) & set(pair.encoder((1, 8, 8), 4).parameters())


def test_residual_block_adds_to_its_input():
    block, x = ResidualBlock(4, num_groups=2), torch.randn(B, 4, 6, 5)
    torch.testing.assert_close(block(x) - x, block.change(x))
    nn.init.zeros_(block.change[-1].weight)
    nn.init.zeros_(block.change[-1].bias)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("normalization", [{}, {"batch_norm": True}, {"num_groups": 2}], ids=str)
def test_evaluation_keeps_the_examples_apart(float64, normalization):
    pair = ResidualPair((4, 6), hidden=5, **normalization)
    for net, size in ((pair.encoder((1, 9, 8), 4), (1, 9, 8)), (pair.decoder(D, (1, 9, 8)), (D,))):
        x = torch.randn(B, *size)
        for _ in range(3):
            net(3 + 2 * torch.randn(20, *size))  # running averages far from where they start
        together = net(x)
        alone = torch.cat([net(torch.cat([x[:1], x[:1] + 1]))[:1], together[1:]])
        assert torch.allclose(together, alone) == ("batch_norm" not in normalization)
        averages = {name: value.clone() for name, value in net.state_dict().items()}
        net.eval()
        torch.testing.assert_close(torch.cat([net(row) for row in x.split(1)]), net(x))
        stacked = torch.stack([x, -x])
        torch.testing.assert_close(net(stacked)[0], net(x))
        assert all(torch.equal(value, averages[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("normalization", [{}, {"batch_norm": True}, {"num_groups": 2}], ids=str)
def test_fit_with_a_residual_pair(normalization):
    pair, x = ResidualPair((4,), hidden=5, activation=nn.SiLU, **normalization), torch.rand(20, 1, 6, 5).round()
    decoder = Decoder(pair.decoder(D, (1, 6, 5)), Bernoulli(event_dim=3))
    vae = VAE(StandardNormal(D), decoder, DiagonalNormal(pair.encoder((1, 6, 5), 2 * D)))
    before = {name: value.clone() for name, value in vae.named_parameters()}
    history = fit(vae, x, epochs=2, batch_size=10, lr=0.01)
    assert all(math.isfinite(value) for value in history["elbo"])
    assert not [name for name, value in vae.named_parameters() if torch.equal(value, before[name])]


def test_refusals():
    with pytest.raises(ValueError, match="expected one normalisation, found batch_norm and num_groups"):
        ResidualPair(batch_norm=True, num_groups=2)
    with pytest.raises(ValueError, match=r"channels that 3 groups divide, found \(6, 8\): change channels or num"):
        ResidualPair((6, 8), num_groups=3)
    with pytest.raises(ValueError, match="expected blocks and num_groups >= 0, found -1 and 0"):
        ResidualPair(blocks=-1)
    with pytest.raises(ValueError, match=r"expected images \[C, H, W\], found \(64,\): use MlpPair"):
        ResidualPair().encoder((64,), 4)
