"""Distances between sets of pictures against closed forms, and what they say of a set against itself."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy import linalg, stats

from pyro_vae import VAE, Binomial, Decoder, DiagonalNormal, Mlp, StandardNormal, datasets
from pyro_vae.sample_quality import (
    frechet_distance,
    nearest_distance,
    paired_t_test,
    precision_recall,
    quality,
    sharpness,
    train_classifier,
)

N, M, F = 60, 40, 3


def features(num, seed=0, loc=0.0, scale=1.0):
    return loc + scale * torch.randn(num, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_is_the_distance_of_the_two_normals():
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0], [0.3, 0.0, 0.7]], dtype=torch.float64)
    a, b = features(N), features(M, 1, 0.5) @ mix
    first, second = (torch.cov(part.T).numpy() for part in (a, b))
    root = linalg.sqrtm(first @ second).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + float((first + second - 2 * root).trace())
    assert frechet_distance(a, b).value == pytest.approx(expected)
    assert frechet_distance(b, a).value == pytest.approx(expected)
    assert frechet_distance(a, a).value == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2).value == pytest.approx(4 * F)
    assert frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)).value == pytest.approx(4 * first.trace())


def test_the_error_of_frechet_is_that_of_repetitions():
    found = [frechet_distance(features(200, seed), features(150, 1000 + seed, 1.0)) for seed in range(100)]
    spread = torch.tensor([each.value for each in found]).std()
    told = torch.tensor([each.standard_error for each in found]).mean()
    assert 0.7 < float(told / spread) < 1.4


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # distance to the nearest other: 1, 1, 2, 4
    made = torch.tensor([[2.0], [2.1], [12.0]])  # 0.1, 0.1, 9.9
    precision, recall = precision_recall(real, made, 1, policy="toy")
    assert precision.values.tolist() == [1, 1, 0]
    assert recall.values.tolist() == [0, 0, 1, 1]  # 3 and 7 are within 9.9 of 12
    assert precision.policy == "toy" and precision.name == "precision" and recall.name == "recall"
    same = precision_recall(features(N), features(N), 3)
    assert same[0].mean == same[1].mean == 1
    fallen = precision_recall(features(N), features(N, 1, scale=0.01), 3)  # one mode, always the same
    assert fallen[0].mean > 0.9 and fallen[1].mean < 0.1
    with pytest.raises(ValueError, match="expected 1 to 2 neighbours"):
        precision_recall(real, made, 3)


def test_sharpness_is_the_variance_of_the_laplacian():
    i, j = torch.arange(6.0).unsqueeze(1), torch.arange(5.0)
    plane, bowl = 2 * i - 3 * j, i**2 + j**2
    cubic = i**3 + 0 * j  # its Laplacian is 6 i, i = 1..4: variance 36 * 1.25
    x = torch.stack([plane, bowl, cubic]).unsqueeze(1)
    assert torch.allclose(sharpness(x), torch.tensor([0.0, 0.0, 45.0], dtype=torch.float64))
    assert torch.allclose(sharpness(2 * x + 1), 4 * sharpness(x))
    noise = torch.rand(M, 3, 8, 8)
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert bool((sharpness(blurred) < sharpness(noise)).all())
    with pytest.raises(ValueError, match="reshape them"):
        sharpness(noise[0])


def test_the_paired_test_is_scipys():
    a, b = features(M)[:, 0], features(M, 1, 0.4)[:, 0]
    found, expected = paired_t_test(a, b), stats.ttest_rel(a.numpy(), b.numpy())
    assert found.t == pytest.approx(expected.statistic) and found.p_value == pytest.approx(expected.pvalue)
    assert paired_t_test(a, a).p_value == 1 and paired_t_test(a, a).t == 0
    assert paired_t_test(a + 1, a).p_value < 1e-100
    with pytest.raises(ValueError, match="two or more pairs"):
        paired_t_test(a, b[1:])


@pytest.fixture(scope="module")
def digits():
    return datasets.Digits()


@pytest.fixture(scope="module")
def classifier(digits):
    return train_classifier(digits.prepare(digits.train), digits.train_labels, epochs=10)


def test_the_classifier_knows_digits_and_leaves_the_random_state(digits, classifier):
    right = (classifier(digits.test).argmax(1) == digits.test_labels).float().mean()
    assert right > 0.93
    assert classifier.features(digits.test).shape == (359, 32) and not classifier.training
    state = torch.get_rng_state()
    again = train_classifier(digits.train[:100].float(), digits.train_labels[:100], epochs=1)
    other = train_classifier(digits.train[:100].float(), digits.train_labels[:100], epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again(digits.test), other(digits.test))
    with pytest.raises(ValueError, match="one label of two classes"):
        train_classifier(digits.test, digits.test_labels[1:])


def test_the_data_is_better_than_an_untrained_model(digits, classifier):
    vae = VAE(
        StandardNormal(2),
        Decoder(torch.nn.Sequential(Mlp(2, 16, 64), torch.nn.Unflatten(-1, (1, 8, 8))), Binomial(16)),
        DiagonalNormal(torch.nn.Sequential(torch.nn.Flatten(), Mlp(64, 16, 4))),
    )
    state = torch.get_rng_state()
    found = quality(vae, digits, classifier)
    assert torch.equal(torch.get_rng_state(), state) and vae.training
    data, made = found.frechet_of_data, found.frechet
    assert made.value - 4 * made.standard_error > data.value + 4 * data.standard_error
    assert found.precision.mean < 0.5 and found.recall.mean < 0.2 and found.accuracy.mean > 0.93
    assert found.blur is not None and found.blur.difference.mean > 0 and found.blur.p_value < 1e-6
    assert math.isfinite(found.summary()["frechet"]["value"]) and "Fréchet" in str(found)
    assert all(found.policy == each.policy for each in (made, data, found.precision, found.recall))
    unlabelled = SimpleNamespace(name="toy", train_labels=None, test_labels=None)
    with pytest.raises(ValueError, match="with labels, found toy without"):
        quality(vae, unlabelled)


def test_the_nearest_picture_is_the_one_that_all_distances_name():
    x, made = torch.rand(700, 1, 4, 3), torch.rand(600, 1, 4, 3)
    found = nearest_distance(made, x, policy="toy")
    expected = torch.cdist(made.flatten(1), x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert torch.allclose(found.values.float(), expected) and found.policy == "toy"
    assert nearest_distance(x[:5], x).values.abs().max() == 0
    assert str(found).endswith("in units of x (to the nearest of 700, n=600)")
    with pytest.raises(ValueError, match="give both one shape"):
        nearest_distance(made, x.flatten(1))
