"""More pairs of networks: shapes, parameter counts, normalisation in training and evaluation, refusals."""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae import (
    ELBO,
    VAE,
    ConvPair,
    Decoder,
    DiagonalNormal,
    GatedMlpPair,
    MlpPair,
    ResidualPair,
    SpatialPair,
    StandardNormal,
    fit,
)
from pyro_vae.cli import main
from pyro_vae.compiling import CompiledStep
from pyro_vae.initialization import set_output_bias
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.pairs import ResidualBlock
from pyro_vae.parts import PARTS

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


PAIRS = [
    lambda **more: MlpPair((6, 4), **more),
    lambda **more: ConvPair((4, 6), hidden=5, **more),
    lambda **more: ConvPair((4, 6), hidden=0, kernel_size=3, pool=True, **more),
    lambda **more: SpatialPair((4,), **more),
    lambda **more: SpatialPair((4,), kernel_size=(5, 3), pool=True, **more),
    lambda **more: ResidualPair((4, 6), hidden=5, **more),
]
NORMALIZATIONS = [{}, {"batch_norm": True}, {"num_groups": 2}]


@pytest.mark.parametrize("normalization", NORMALIZATIONS, ids=str)
@pytest.mark.parametrize("pair", range(len(PAIRS)))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 64, 64), (5, 8, 12)], ids=str)
def test_pictures_of_any_size_and_number_of_channels(shape, pair, normalization):
    pair, dim = PAIRS[pair](**normalization), shape[1] * shape[2] // 16
    encoder, decoder = pair.encoder(shape, 2 * dim), pair.decoder(dim, (2 * shape[0], *shape[1:]))
    x, z = torch.randn(2, B, *shape), torch.randn(K, B, dim)
    assert encoder(x).shape == (2, B, 2 * dim) and encoder(x[0]).dim() == 2
    assert decoder(z).shape == (K, B, 2 * shape[0], *shape[1:])
    set_output_bias(decoder, torch.zeros(2 * shape[0], *shape[1:]))
    for net, value in ((encoder, x[0]), (decoder, z[0])):
        (net(value) ** 2).sum().backward()
        assert all((p.grad != 0).any() for p in net.parameters())


@pytest.mark.parametrize("shape", [(1, 13, 9), (3, 7, 8)], ids=str)
def test_residual_pair_takes_odd_sizes(shape):
    pair = ResidualPair((4, 6, 8), hidden=5)
    assert pair.encoder(shape, 4)(torch.randn(K, B, *shape)).shape == (K, B, 4)
    assert pair.decoder(D, shape)(torch.randn(K, B, D)).shape == (K, B, *shape)


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


@pytest.mark.parametrize("normalization", NORMALIZATIONS, ids=str)
@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_evaluation_keeps_the_examples_apart(float64, pair, normalization):
    pair, dim = PAIRS[pair](**normalization), 6
    for net, size in ((pair.encoder((1, 8, 12), 2 * dim), (1, 8, 12)), (pair.decoder(dim, (1, 8, 12)), (dim,))):
        x = torch.randn(B, *size)
        for _ in range(3):
            net(3 + 2 * torch.randn(20, *size))  # running averages far from where they start
        together, alone = net(x), net(torch.cat([x[:1], x[:1] + 1]))[:1]
        assert torch.allclose(together[:1], alone) == ("batch_norm" not in normalization)
        averages = {name: value.clone() for name, value in net.state_dict().items()}
        net.eval()
        torch.testing.assert_close(torch.cat([net(row) for row in x.split(1)]), net(x))
        stacked = torch.stack([x, -x])
        torch.testing.assert_close(net(stacked)[0], net(x))
        assert all(torch.equal(value, averages[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("normalization", NORMALIZATIONS, ids=str)
@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_fit_moves_every_parameter(pair, normalization):
    pair, x, dim = PAIRS[pair](activation=nn.SiLU, **normalization), torch.rand(21, 1, 8, 12).round(), 6
    decoder = Decoder(pair.decoder(dim, (1, 8, 12)), Bernoulli(event_dim=3))
    vae = VAE(StandardNormal(dim), decoder, DiagonalNormal(pair.encoder((1, 8, 12), 2 * dim)))
    before = {name: value.clone() for name, value in vae.named_parameters()}
    history = fit(vae, x, epochs=2, batch_size=10, lr=0.01)  # the last batch is one example
    assert all(math.isfinite(value) for value in history["elbo"])
    assert not [name for name, value in vae.named_parameters() if torch.equal(value, before[name])]


def test_a_captured_step_updates_the_running_averages():
    x, runs = torch.rand(20, E).round(), []
    for capture in (False, True):
        torch.manual_seed(1)
        pair = MlpPair((6,), batch_norm=True)
        decoder = Decoder(pair.decoder(D, (E,)), Bernoulli())
        vae = VAE(StandardNormal(D), decoder, DiagonalNormal(pair.encoder((E,), 2 * D)))

        def gradients(x, vae=vae):
            loss = ELBO().differentiable_loss(vae.model, vae.guide, x)
            loss.backward()
            return loss.detach()

        step = CompiledStep(gradients, list(vae.parameters()), vae, warm=1, backend="replay") if capture else gradients
        torch.manual_seed(2)
        losses = [step(x[i : i + 5]) for i in (0, 5, 10)]
        assert not capture or "eager, since" not in step.explain()
        runs.append((torch.stack(losses), *vae.buffers()))
    assert len(runs[0]) > 6
    for eager, captured in zip(*runs, strict=True):
        torch.testing.assert_close(eager, captured)


def test_spatial_pair_by_count():
    pair = SpatialPair((32,), kernel_size=(5, 3), pool=True)
    encoder, decoder = pair.encoder((1, 28, 28), 2 * 196), pair.decoder(196, (1, 28, 28))
    assert pair.latent_shape(196, (1, 28, 28)) == (4, 7, 7)
    assert count(encoder) == (25 * 32 + 32) + 2 * (9 * 32 * 4 + 4)  # mean and scale are four channels each
    assert count(decoder) == (9 * 4 * 32 + 32) + (25 * 32 + 1)
    assert repr(pair) == "SpatialPair(channels=(32,), activation=ReLU, kernel_size=(5, 3), pool=True)"
    decoder = SpatialPair((4, 6), kernel_size=(2, 3, 5)).decoder(12, (1, 16, 24))
    assert [m.kernel_size[0] for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d)] == [5, 3, 2]
    assert count(SpatialPair(()).encoder((1, 8, 8), 2 * 16)) == 16 * 2 + 2  # one convolution, nothing hidden


def test_each_number_of_a_spatial_z_has_its_place(float64):
    pair, dim = SpatialPair((4, 6), activation=nn.SiLU), 3 * 4 * 5
    encoder, decoder = pair.encoder((2, 32, 40), 2 * dim), pair.decoder(dim, (2, 32, 40))
    x, z = torch.randn(B, 2, 32, 40), torch.randn(B, 3, 4, 5)
    for row, column in ((0, 0), (3, 4), (0, 4), (2, 1)):
        there, changed = z.clone(), x.clone()
        there[:, 1, row, column] += 1
        difference = (decoder(there.flatten(1)) != decoder(z.flatten(1))).flatten(0, 1).any(0)
        expected = difference.new_zeros(32, 40)  # 8 pixels and what the kernels add on each side
        rows, columns = slice(max(0, 8 * row - 7), 8 * row + 15), slice(max(0, 8 * column - 7), 8 * column + 15)
        expected[rows, columns] = True
        assert torch.equal(difference, expected)
        changed[:, :, 8 * row + 3, 8 * column + 3] += 1
        mean = (encoder(changed) != encoder(x))[:, :dim].unflatten(1, (3, 4, 5)).flatten(0, 1).any(0)
        near = torch.zeros(4, 5, dtype=torch.bool)
        near[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = True
        assert mean[row, column] and not (mean & ~near).any()


def test_the_kl_of_a_spatial_z_sums_over_all_of_it(float64):
    pair = SpatialPair((4,), kernel_size=(5, 3), pool=True)
    encoder, x = DiagonalNormal(pair.encoder((1, 28, 28), 2 * 196)), torch.rand(B, 1, 28, 28)
    q, (mean, log_scale) = encoder(x), encoder.net(x).unflatten(1, (2, 4, 7, 7)).unbind(1)
    kl = 0.5 * (mean**2 + (2 * log_scale).exp() - 2 * log_scale - 1)
    assert kl.shape == (B, 4, 7, 7)
    torch.testing.assert_close(kl_divergence(q, StandardNormal(196)()), kl.sum((1, 2, 3)))


BASE, MODULES = PARTS["encoder"]
CLASSES = [cls for module in MODULES for name, cls in vars(module).items() if inspect.isclass(cls) and name[0] != "_"]
ENCODERS = sorted({c for c in CLASSES if issubclass(c, BASE) and not inspect.isabstract(c)}, key=lambda c: c.__name__)


@pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.__name__)
def test_a_spatial_z_with_every_posterior(family):
    pair, dim, accepted = SpatialPair((4,)), 2 * 2 * 3, inspect.signature(family).parameters
    net = pair.encoder((1, 8, 12), family.num_outputs(dim))
    encoder = family(net, **({"latent_dim": dim} if "latent_dim" in accepted else {}))
    z = encoder(torch.rand(B, 1, 8, 12)).sample()
    assert z.shape == (B, dim) and pair.decoder(dim, (1, 8, 12))(z.expand(K, B, dim)).shape == (K, B, 1, 8, 12)


@pytest.mark.parametrize(
    "words",
    ["", "--prior MixtureOfNormals --encoder CouplingFlow", "--encoder LowRankNormal --networks.num_groups 2"],
)
def test_a_spatial_z_from_the_command_line(words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    spatial = "--latent_dim 8 --networks SpatialPair --networks.channels [4] --networks.kernel_size [3,5]"
    main(["train", "--epochs", "1", "--eval_particles", "3", "--out", "run", *spatial.split(), *words.split()])
    assert "latent_dim 8" in capsys.readouterr().out and (tmp_path / "run" / "figures" / "latent.png").is_file()


def test_refusals():
    with pytest.raises(ValueError, match="expected one normalisation, found batch_norm and num_groups"):
        ResidualPair(batch_norm=True, num_groups=2)
    with pytest.raises(ValueError, match=r"sizes that 3 groups divide, found \(6, 8\): change them or num_groups"):
        ResidualPair((6, 8), num_groups=3)
    with pytest.raises(ValueError, match="expected blocks >= 0, found -1"):
        ResidualPair(blocks=-1)
    message = r"latent_dim to be a multiple of 49 \(z has 7 x 7 pixels\), found 50: choose 49, 98, "
    with pytest.raises(ValueError, match=message):
        SpatialPair((32,)).decoder(50, (1, 28, 28))
    with pytest.raises(ValueError, match=r"SpatialPair expected images .* multiples of 8, found \(1, 28, 28\)"):
        SpatialPair((4, 4)).encoder((1, 28, 28), 4)
    for arguments in ({"kernel_size": (3,)}, {"kernel_size": 1}, {"channels": (0,)}):
        with pytest.raises(ValueError, match="expected channels >= 1 and one kernel_size >= 2 for each of 2 halvings"):
            SpatialPair(**{"channels": (4,), **arguments})
    with pytest.raises(ValueError, match=r"expected images \[C, H, W\], found \(64,\): use MlpPair"):
        ResidualPair().encoder((64,), 4)
