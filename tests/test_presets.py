"""Presets: layer shapes and parameter counts of the texts, the same net from Python and from the command line."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from pyro_vae import presets
from pyro_vae.architecture import layers
from pyro_vae.arguments import load_config
from pyro_vae.cli import _parse, main, train
from pyro_vae.configuration import build
from pyro_vae.encoders import Delta
from pyro_vae.objectives import ELBO, Beta

MLP_2 = [(500, 392_500), (250, 125_250)], [(250, 750), (500, 125_500), (784, 392_784)]
MLP_10 = MLP_2[0], [(10, 110), (250, 2750), (784, 196_784)]
MLP_10_MIRRORED = MLP_2[0], [(250, 2750), (500, 125_500), (784, 392_784)]

# Of the layers with parameters: (size or shape, parameters); of the encoder without its last, which gives mean and
# standard deviation: so many numbers for each.
NETS = {
    "seed000": (
        [((16, 14, 14), 416), ((32, 7, 7), 12_832)],
        [(1568, 32_928), ((16, 14, 14), 12_800), ((1, 28, 28), 400)],
        *(20, 2 * 31_380, 122_136),
    ),
    "seed001": ([(256, 200_960)], [(256, 768), (784, 201_488)], 2, 514 + 514, 404_244),
    "seed003": ([(512, 401_920)], [(512, 1536), (784, 402_192)], 2, 1026 + 1026, 807_700),
    "seed004-2d-ae": (*MLP_2, 2, 502, 1_037_286),
    "seed004-2d-vae": (*MLP_2, 2, 2 * 502, 1_037_788),
    "seed004-10d-ae": (*MLP_10, 10, 2510, 719_904),
    "seed004-10d-vae": (*MLP_10, 10, 2 * 2510, 722_414),
    "seed004-10d-ae-mirrored": (*MLP_10_MIRRORED, 10, 2510, 1_041_294),
    "seed004-10d-vae-mirrored": (*MLP_10_MIRRORED, 10, 2 * 2510, 1_043_804),
    "seed004-conv": (
        [((32, 28, 28), 832)],
        [((32, 14, 14), 1184), ((1, 28, 28), 801)],
        *(196, 2 * 1156, 5129),
    ),
    "seed004-faces": (
        [((32, 65, 65), 1568), ((64, 33, 33), 32_832), ((128, 17, 17), 131_200), ((256, 9, 9), 524_544)],
        [(4096, 413_696), ((128, 8, 8), 524_416), ((64, 16, 16), 131_136), ((32, 32, 32), 32_800), ((3, 64, 64), 1539)],
        *(100, 2 * 409_700, 2_613_131),
    ),
    "pyro": ([(400, 314_000)], [(400, 20_400), (784, 314_384)], 50, 2 * 20_050, 688_884),
}
SETTINGS = {  # epochs, batch size, learning rate, beta
    "seed000": (10, 100, 1e-3, 1),
    "seed001": (30, 128, 1e-3, 1),
    "seed003": (10, 50, 1e-3, 1),
    **{f"seed004-{d}-ae": (40, 100, 1e-3, 0) for d in ("2d", "10d")},
    **{f"seed004-{d}-vae": (40, 100, 1e-3, 2) for d in ("2d", "10d")},
    "seed004-10d-ae-mirrored": (40, 100, 1e-3, 0),
    "seed004-10d-vae-mirrored": (40, 100, 1e-3, 2),
    "seed004-conv": (40, 100, 1e-3, 2),
    "seed004-faces": (40, 100, 1e-3, 1),
    "pyro": (100, 256, 1e-3, 1),
}
FUNCTIONS = {name: getattr(presets, name.replace("-", "_"), None) for name in presets.PRESETS}
FUNCTIONS["seed004-10d-ae-mirrored"] = lambda: presets.seed004_10d_ae(mirrored=True)
FUNCTIONS["seed004-10d-vae-mirrored"] = lambda: presets.seed004_10d_vae(mirrored=True)


def test_every_preset_is_tested():
    assert set(NETS) == set(SETTINGS) == set(presets.PRESETS) == set(FUNCTIONS)


@pytest.mark.parametrize("name", NETS)
def test_layers_and_parameters(name):
    to_z, to_x, dim, heads, total = NETS[name]
    vae = FUNCTIONS[name]()
    rows = [row for row in layers(vae, presets.image_shape(name)) if row.num_parameters]
    found = {
        part: [(r.shape if len(r.shape) == 3 else r.shape[0], r.num_parameters) for r in rows if r.part == part]
        for part in ("encoder", "decoder")
    }
    *hidden, (_, head_parameters) = found["encoder"]
    assert (hidden, found["decoder"]) == (to_z, to_x)
    assert head_parameters == heads and vae.prior().event_shape == (dim,)
    assert sum(p.numel() for p in vae.parameters()) == total


def test_faces_go_over_32_16_8_4():
    rows = layers(presets.seed004_faces(), (3, 64, 64))
    assert [row.shape for row in rows if row.name == "MaxPool2d"] == [
        *((32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4)),
    ]
    assert presets.seed004_conv().decoder.net.net[0].unflattened_size == (4, 7, 7)


def test_which_biases_are_absent():
    missing = {
        name: [type(m) for m in presets.make(name).modules() if hasattr(m, "bias") and m.bias is None] for name in NETS
    }
    assert missing.pop("seed000") == 2 * [nn.ConvTranspose2d] and not any(missing.values())


def test_how_the_weights_start():
    weights = {name: presets.make(name).encoder.net[-1] for name in ("seed000", "seed001", "seed004-2d-vae")}
    assert all((p == 0).all() for net in weights.values() for name, p in net.named_parameters() if "bias" in name)
    first = {name: next(p for p in net.parameters() if p.dim() > 1) for name, net in weights.items()}
    assert first["seed000"].abs().max() <= 0.04
    assert first["seed001"].abs().max() <= math.sqrt(6 / (784 + 256)) < 1.001 * first["seed001"].abs().max()
    assert first["seed004-2d-vae"].std().item() == pytest.approx(math.sqrt(2 / 784), rel=0.01)
    shift = presets.seed004_2d_vae().encoder.net[0]
    assert torch.equal(shift(torch.tensor([0.0, 1.0])), torch.tensor([-0.5, 0.5]))


def test_half_of_minus_the_elbo_is_the_loss_of_seed001(float64):
    vae, x = presets.seed001().double(), torch.rand(5, 1, 28, 28)
    torch.manual_seed(1)
    bound = ELBO().draw(vae.model, vae.guide, x)
    z, q = bound.guide_trace.nodes["z"]["value"], vae.encode(x).base_dist
    squares = ((vae.decode(z).mean - x) ** 2).sum((1, 2, 3))
    constant = 784 * math.log(0.5 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(-bound.log_px[0], 2 * squares + constant)
    kl = 0.5 * (q.loc**2 + q.scale**2 - 2 * q.scale.log() - 1).sum(1)
    loss = squares + kl / 2  # a mean over the two dimensions
    torch.testing.assert_close(2 * loss, (-bound.log_px[0] - constant) + kl)


@pytest.mark.parametrize("batch", [1, 7, 50, 10_000])
def test_any_number_of_examples(batch):
    vae = presets.seed003()
    with torch.no_grad():
        assert vae.reconstruct(torch.rand(batch, 1, 28, 28)).shape == (batch, 1, 28, 28)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    np.save(folder / "1.npy", random.integers(0, 256, (40, 28, 28), dtype=np.uint8))
    np.save(folder / "3.npy", random.integers(0, 256, (12, 3, 64, 64), dtype=np.uint8))
    return folder


def words(name: str, pictures: Path) -> list[str]:
    """The preset on random pictures in place of its own."""
    channels, policy = presets.image_shape(name)[0], presets.arguments(name)["data"][1].get("binarization", "grey")
    data = f"--data ArrayFile --data.path {pictures / f'{channels}.npy'} --data.binarization {policy}"
    return ["--preset", name, *data.split()]


@pytest.mark.parametrize("name", NETS)
def test_the_command_line_builds_the_same_net(name, pictures):
    config = _parse(["train", *words(name, pictures)])[1]
    _, vae = build(config)
    mine = presets.make(name)
    assert repr(vae) == repr(mine)
    shapes = {key: value.shape for key, value in mine.state_dict().items()}
    assert {key: value.shape for key, value in vae.state_dict().items()} == shapes
    epochs, batch_size, lr, beta = SETTINGS[name]
    assert (config.epochs, config.batch_size, config.lr, config.start_at_data) == (epochs, batch_size, lr, False)
    objective, options = presets.arguments(name)["objective"]
    assert (objective, options.get("beta", 1)) == (ELBO if beta == 1 else Beta, beta)
    assert isinstance(vae.encoder, Delta) == name.startswith(("seed004-2d-ae", "seed004-10d-ae"))
    for one, other in zip(vae.buffers(), mine.buffers(), strict=True):  # what is taken from the input
        assert torch.equal(one, other)
    for (key, one), other in zip(vae.named_parameters(), mine.parameters(), strict=True):  # how the weights start
        if one.dim() == 1:
            assert bool((one == 0).all()) == bool((other == 0).all()) == (name != "pyro"), key
        elif one.numel() > 10_000:
            assert one.std().item() == pytest.approx(other.std().item(), rel=0.05), key


def test_any_argument_overrides_a_preset(pictures, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    more = "--epochs 1 --networks.hidden [5] --latent_dim 3 --objective IWAE --init glorot --eval_particles 2"
    main(["train", *words("seed004-2d-vae", pictures), *more.split(), "--figures", "false", "--out", "run"])
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert "preset" not in config and config["networks"]["init_args"]["hidden"] == [5]
    assert (config["latent_dim"], config["init"], config["standardize"]) == (3, "glorot", 0.5)
    assert config["objective"]["class_path"].endswith("IWAE") and config["batch_size"] == 100
    assert config["objective"]["init_args"]["num_particles"] == 50  # its own default, not that of what it replaces
    main(["train", "--config", "run/config.yaml", "--out", "again"])
    for file in ("config.yaml", "model.safetensors"):
        assert Path("run", file).read_bytes() == Path("again", file).read_bytes()
    assert load_config(train, "run").epochs == 1
    capsys.readouterr()
    main(["summary", "run"])
    assert "784" in (out := capsys.readouterr().out) and "μ(x)" in out and f"{784 * 5 + 5:,}" in out
    assert "Standardize" in out


def test_a_preset_in_one_word_and_the_summary_by_name(capsys, pictures):
    given = words("seed001", pictures)
    assert _parse(["train", f"--preset={given[1]}", *given[2:]])[1].latent_dim == 2
    main(["summary", "seed001"])
    assert capsys.readouterr().out.rstrip().endswith("404,244")


def test_refusals(capsys):
    with pytest.raises(ValueError, match=r"expected a preset out of seed000, .*found 'seed002'"):
        presets.make("seed002")
    with pytest.raises(ValueError, match=r"Seed000Pair expected images \[C, 28, 28\], found \(1, 8, 8\): use ConvPair"):
        presets.Seed000Pair().encoder((1, 8, 8), 4)
    for wrong in (["train", "--preset", "seed002"], ["train", "--preset"], ["train", "--init", "none"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
