"""The layers of a VAE: shapes by hand, every parameter once, nothing changed by looking."""

import pytest
import torch
from torch import nn

from pyro_vae import (
    VAE,
    AutoregressiveFlow,
    Bernoulli,
    Decoder,
    DiagonalNormal,
    FullNormal,
    LearnedNormal,
    Mlp,
    MlpPair,
    OverBatch,
    StandardNormal,
    VampPrior,
    likelihoods,
)
from pyro_vae.architecture import layers, summary

B, D, E = 5, 2, 7


def make(encoder=None, prior=None, likelihood=None) -> VAE:
    decoder = Decoder(Mlp(D, 3, E), likelihood or Bernoulli())
    return VAE(prior or StandardNormal(D), decoder, encoder or DiagonalNormal(Mlp(E, 6, 4, 2 * D)))


def test_layers_by_hand():
    assert [tuple(layer) for layer in layers(make(), (E,))] == [
        ("encoder", "Linear", (6,), E * 6 + 6),
        ("encoder", "ReLU", (6,), 0),
        ("encoder", "Linear", (4,), 6 * 4 + 4),
        ("encoder", "ReLU", (4,), 0),
        ("encoder", "Linear", (2 * D,), 4 * 2 * D + 2 * D),
        ("z", "mean μ(x)", (D,), 0),
        ("z", "standard deviation σ(x)", (D,), 0),
        ("z", "z", (D,), 0),
        ("decoder", "Linear", (3,), D * 3 + 3),
        ("decoder", "ReLU", (3,), 0),
        ("decoder", "Linear", (E,), 3 * E + E),
    ]


def test_each_parameter_is_counted_once():
    pair = MlpPair((4,), batch_norm=True)
    encoder = AutoregressiveFlow(pair.encoder((E,), AutoregressiveFlow.num_outputs(D)), latent_dim=D)
    for vae in (
        make(encoder, VampPrior(encoder, torch.rand(9, E), num_components=3)),
        make(FullNormal(Mlp(E, 5)), LearnedNormal(D), likelihoods.Normal()),
    ):
        rows = layers(vae, (E,))
        assert sum(row.num_parameters for row in rows) == sum(p.numel() for p in vae.parameters())
        assert {row.part for row in rows if row.name == "further parameters"} >= {"z"}
    assert ("decoder", "further parameters", (), 1) in [tuple(row) for row in rows]
    assert ("z", "Cholesky factor L(x)", (D, D), 0) in [tuple(row) for row in rows]

    shared = nn.Linear(6, 6)  # twice in one network
    rows = layers(make(DiagonalNormal(nn.Sequential(nn.Linear(E, 6), shared, shared, nn.Linear(6, 2 * D)))), (E,))
    assert [row.num_parameters for row in rows if row.part == "encoder"] == [E * 6 + 6, 42, 6 * 4 + 4]


def test_pictures_and_plain_functions():
    conv = OverBatch(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 2 * 4, 2 * D)), event_dim=3)
    vae = make(DiagonalNormal(conv))
    assert [row.shape for row in layers(vae, (1, 4, 6)) if row.part == "encoder"] == [(3, 2, 4), (24,), (2 * D,)]
    net = vae.decoder
    vae = VAE(lambda: StandardNormal(D)(), lambda z: net(z), lambda x: StandardNormal(D)().expand(x.shape[:1]))
    assert [row.name for row in layers(vae, (E,))] == ["mean μ(x)", "standard deviation σ(x)", "z"]


def test_looking_changes_nothing():
    vae = make(DiagonalNormal(MlpPair((4,), batch_norm=True).encoder((E,), 2 * D)))
    state, random_state = {k: v.clone() for k, v in vae.state_dict().items()}, torch.get_rng_state()
    layers(vae, (E,))
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state) and vae.training
    assert not any(module._forward_hooks for module in vae.modules())
    with pytest.raises(RuntimeError):
        layers(vae, (E + 1,))
    assert not any(module._forward_hooks for module in vae.modules()) and vae.training


def test_the_summary_names_both_heads_once_and_adds_up():
    text = summary(make(), (E,))
    assert text.count("μ(x)") == text.count("σ(x)") == 1
    lines = [line.split() for line in text.splitlines()]
    assert ["x", "7"] in lines and ["z", "2"] in lines and lines[-1] == ["all", "133"]
    assert "encoder q(z | x): DiagonalNormal" in text and "decoder p(x | z): Bernoulli" in text
    assert max(map(len, text.splitlines())) <= 80
