"""The laboratory: what the wrong losses are said to do is what they do, on real digits at a tiny scale."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pyro_vae import datasets, fit
from pyro_vae.cli import main
from pyro_vae.uncertainty import with_error
from pyro_vae.wrong_loss_lab import (
    OBJECTIVES,
    RIGHT,
    energy_distance,
    explanations,
    grey_pictures,
    make_vae,
    measure,
    run,
    table,
)
from pyro_vae.wrong_loss_plots import draw_figures, draw_three_panels
from pyro_vae.wrong_losses import LOSSES, SummedSquares


@pytest.fixture(scope="module")
def pictures():
    all_of_them = grey_pictures(datasets.Digits())
    return all_of_them._replace(x=all_of_them.x[:500], labels=all_of_them.labels[:500])


@pytest.fixture(scope="module")
def results(pictures):
    return {r.name: r for r in run(pictures, hidden=32, epochs=40, batch_size=100, lr=1e-2, num_particles=5)}


def test_every_loss_and_the_two_limits_are_trained(results):
    assert list(results) == [RIGHT, *(family.__name__ for family in LOSSES), "ReconstructionOnly", "KLOnly"]
    assert math.isnan(results[RIGHT].beta)
    assert results["AveragedKL"].beta == 0.5 and results["MeanSquares"].beta == pytest.approx(100 * 64)


def test_without_entropy_the_noise_vanishes(results):
    right, wrong = results[RIGHT], results["EntropyDropped"]
    assert wrong.scale < 0.02 < 0.08 < right.scale
    assert wrong.kl > right.kl + 3 and wrong.elbo < right.elbo
    assert wrong.spread < 0.5 and wrong.distance > right.distance  # draws of the prior miss its codes
    assert wrong.verdict == results["ReconstructionOnly"].verdict == "no noise is left: a plain autoencoder"


def test_a_mean_against_a_sum_encodes_nothing(results, pictures):
    wrong = results["MeanSquares"]
    assert wrong.kl < 0.01 and wrong.scale == pytest.approx(1, abs=0.05)
    assert wrong.squared_error == pytest.approx(wrong.mean_image_error, rel=0.03)
    assert (wrong.x_hat - pictures.x.mean(0)).abs().max() < 0.1  # the mean image, for every input
    assert "every picture gets the same reconstruction" in wrong.verdict


def test_averaging_the_kl_weighs_it_less(results):
    wrong, right = results["AveragedKL"], results["SummedSquares"]
    assert wrong.kl > 2 * right.kl and wrong.squared_error < right.squared_error


def test_a_lost_half_narrows_the_prior(results):
    assert results["LostHalf"].spread == pytest.approx(math.sqrt(0.5), abs=0.05)
    assert results["SummedSquares"].spread == pytest.approx(1, abs=0.06)
    assert results["LostHalf"].verdict.startswith("z is spread with 0.7")


def test_half_the_cross_entropy_is_twice_the_kl(results):
    assert results["HalvedCrossEntropy"].kl < results["GreyCrossEntropy"].kl
    assert results["HalvedCrossEntropy"].cross_entropy > results["GreyCrossEntropy"].cross_entropy


def test_swapped_arguments_threshold_the_picture(results):
    assert results["SwappedCrossEntropy"].thresholded > 0.5 > 0.1 > results["GreyCrossEntropy"].thresholded
    assert "drawn black or white" in results["SwappedCrossEntropy"].verdict


def test_the_right_loss_is_best_in_its_own_unit(results):
    best = max(results.values(), key=lambda r: r.elbo)
    assert best.name == RIGHT and not best.verdict
    assert best.decoder_scale**2 == pytest.approx(best.squared_error / 64, rel=0.1)


def test_the_three_limits(results):
    reconstruction, kl, both = (results[name] for name in ("ReconstructionOnly", "KLOnly", RIGHT))
    assert reconstruction.kl > 2 * both.kl > 50 * kl.kl and kl.kl < 0.01
    assert reconstruction.spread > 1.5 * both.spread
    assert both.accuracy > 0.4 and kl.accuracy < 0.2  # a tenth by chance


def test_with_the_kl_alone_the_decoder_learns_nothing_and_later_only_the_mean_image(pictures):
    torch.manual_seed(0)
    vae = make_vae(pictures, hidden=32)
    before = [p.detach().clone() for p in vae.decoder.parameters()]
    fit(vae, pictures.x, objective=SummedSquares(0.0, 1.0), epochs=30, batch_size=100, lr=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, vae.decoder.parameters(), strict=True))
    vae.zero_grad()
    SummedSquares(0.0, 1.0).loss_and_grads(vae.model, vae.guide, pictures.x)
    assert all(p.grad is None or not p.grad.any() for p in vae.decoder.parameters())
    vae.encoder.requires_grad_(False)
    fit(vae, pictures.x, objective=SummedSquares(1.0, 0.0), epochs=30, batch_size=100, lr=1e-2)
    later = measure(vae, pictures, "later")
    assert later.squared_error == pytest.approx(later.mean_image_error, rel=0.03)
    assert "every picture" in later.verdict


def test_energy_distance():
    torch.manual_seed(1)
    a, b = torch.randn(2, 300, 3).double()
    assert abs(energy_distance(a, b).item()) < 0.1 < energy_distance(a, b + 1).item()
    x, y = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[2.0], [6.0]])
    assert energy_distance(x, y).item() == pytest.approx(2 * (2 + 6 + 1 + 5 + 1 + 3) / 6 - (1 + 3 + 2) / 3 - 4)


def test_the_table_says_what_was_measured(results, pictures):
    text = table(list(results.values()), pictures)
    for name, r in results.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert f"{r.scale:.4f}" in line and f"{r.kl:.3f}" in line and line.endswith(with_error(r.elbo, r.elbo_error))
    assert pictures.policy in text and "nats per example" in text
    words = explanations()
    assert all(f"{family.__name__} (printed by: {family.post})" in words for family in LOSSES[1:])
    assert "ReconstructionOnly" not in words


def test_the_pictures(results, pictures, tmp_path):
    figures = draw_figures(list(results.values()), pictures)
    assert set(figures) == {"wrong_losses", "three_panels"}
    texts = [t.get_text() for ax in figures["wrong_losses"].axes for t in ax.texts]
    assert all(name in texts for name in results)
    left, middle, right = figures["three_panels"].axes
    assert left.get_xlim() == middle.get_xlim() == right.get_ylim()
    points = np.concatenate([c.get_offsets() for c in middle.collections])
    assert len(points) == len(pictures.x_test) and len(middle.collections) == 10
    assert np.allclose(np.sort(points[:, 0]), np.sort(results["KLOnly"].z[:, 0].numpy()))
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=50)
        assert imread(tmp_path / f"{name}.png").std() > 0.05
    without = draw_figures([results[RIGHT]], pictures._replace(labels_test=None))
    assert list(without) == ["wrong_losses"]
    draw_three_panels([results[RIGHT]] * 3, pictures._replace(labels_test=None)).canvas.draw()


def test_training_alike(pictures):
    """Each row starts from the same weights and sees the same order; the random state outside stays."""
    state = torch.get_rng_state()
    one, two = run(pictures, {"a": SummedSquares(), "b": SummedSquares()}, hidden=8, epochs=1, latent_dim=1)
    assert one.summary() | {"name": "b"} == two.summary()
    assert torch.equal(torch.get_rng_state(), state)
    assert draw_figures([one, two], pictures)  # one latent dimension


def test_only_pictures_with_one_channel():
    with pytest.raises(ValueError, match=r"expected pictures with one channel \[N, 1, H, W\], found \(9, 7\)"):
        grey_pictures(SimpleNamespace(test=torch.zeros(9, 7)))


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--epochs", "1", "--loss", "[AveragedKL,LostHalf]", "--out", "lab"]
    main(["wrong-loss", *words])
    shown = capsys.readouterr().out
    assert "nats per example" in shown and "really  beta = 1/d" in shown and "lab/wrong_losses.png" in shown
    files = {path.name for path in (tmp_path / "lab").iterdir()}
    assert files == {"table.txt", "results.json", "wrong_losses.png"}
    main(["wrong-loss", *words, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["results"]] == [RIGHT, "AveragedKL", "LostHalf"]
    assert printed["results"][0]["beta"] is None and printed == json.loads((tmp_path / "lab/results.json").read_text())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--loss", "Average"], "unknown loss 'Average': choose from ELBO, SummedSquares"),
        (["--epochs", "0"], "--epochs: expected a number >= 1, found 0"),
        (["--batch_size", "0"], "--batch_size: expected a number >= 1, found 0"),
        (["--latent_dim", "0"], "--latent_dim: expected a number >= 1, found 0"),
        (["--data", "Penguins"], "--data: expected"),
    ],
)
def test_a_mistake_is_one_line(words, expected, capsys):
    with pytest.raises(SystemExit) as left:
        main(["wrong-loss", *words])
    message = capsys.readouterr().err
    assert left.value.code == 2 and expected in message and message.count("\n") == 1


def test_the_objectives_are_named_by_their_class():
    assert all(type(OBJECTIVES[family.__name__]) is family for family in LOSSES)
