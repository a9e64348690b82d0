"""Readers of the code against hand-counted answers, scikit-learn, and what is known of ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, likelihoods
from pyro_vae.representation import (
    class_distances,
    confusions,
    knn_accuracy,
    knn_predict,
    linear_probe,
    posterior_means,
    represent,
    top_confusions,
)
from pyro_vae.uncertainty import paired_difference

pytestmark = pytest.mark.usefixtures("float64")
N, M, D, E, C = 60, 40, 2, 7, 3


def clusters(num, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % C
    centres = torch.tensor([[0.0, 4.0], [4.0, -4.0], [-4.0, -4.0]])
    return centres[labels] + spread * torch.randn(num, D, generator=generator), labels


def test_separated_classes_are_read_and_permuted_labels_are_not():
    (z, y), (tz, ty) = clusters(N, 0.1), clusters(M, 0.1, seed=1)
    for reader in (linear_probe, knn_accuracy):
        found = reader(z, y, tz, ty, policy="toy")
        assert found.mean == 1.0 and found.values.shape == (M,) and found.policy == "toy"
    z, y = clusters(1200, 3.0)
    permuted = y[torch.randperm(len(y))]
    for reader in (linear_probe, knn_accuracy):
        chance = reader(z[:600], permuted[:600], z[600:], permuted[600:])
        assert abs(chance.mean - 1 / 3) < 4 * chance.standard_error


def test_the_standard_error_is_the_binomial_one():
    z, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    found = knn_accuracy(z, y, torch.tensor([[-1.0], [1.0], [1.0], [-1.0]]), torch.tensor([0, 1, 0, 0]), 1)
    assert found.values.tolist() == [1, 1, 0, 1]
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert str(found) == "0.75 ± 0.25 of the labels (1 nearest neighbours, n=4)"


def test_a_linear_probe_cannot_read_what_is_not_linear():
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]).repeat(5, 1)
    y = torch.tensor([0, 0, 1, 1]).repeat(5)
    assert linear_probe(z, y, z, y).mean <= 0.75
    assert knn_accuracy(z, y, z, y, 3).mean == 1.0


def test_a_probe_does_not_depend_on_units():
    (z, y), (tz, ty) = clusters(N, 2.0), clusters(M, 2.0, seed=1)
    scale, loc = torch.tensor([1e-3, 1e3]), torch.tensor([5.0, -70.0])
    assert torch.equal(linear_probe(z, y, tz, ty).values, linear_probe(z * scale + loc, y, tz * scale + loc, ty).values)


def test_votes_agree_with_scikit_learn_and_ties_go_to_the_nearer():
    from sklearn.neighbors import KNeighborsClassifier

    (z, y), (tz, _) = clusters(N, 3.0), clusters(M, 3.0, seed=1)
    for k in (1, 3, 5):
        theirs = KNeighborsClassifier(k).fit(z.numpy(), y.numpy()).predict(tz.numpy())
        ours = knn_predict(z, y, tz, k)
        votes = torch.nn.functional.one_hot(y[torch.cdist(tz, z).topk(k, largest=False).indices], C).sum(1)
        clear = votes.sort(1).values[:, -1] > votes.sort(1).values[:, -2]
        assert torch.equal(ours[clear], torch.from_numpy(theirs)[clear])
    z, y = torch.tensor([[1.0], [2.0], [-3.0], [-4.0]]), torch.tensor([1, 1, 0, 0])
    assert knn_predict(z, y, torch.tensor([[0.0], [-0.9]]), 4).tolist() == [1, 1]
    assert knn_predict(z, y, torch.tensor([[-1.1]]), 4).tolist() == [0]


def test_confusions_and_distances_of_classes():
    table = confusions(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
    assert table.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # one 2 was taken for a 1
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 4.0]])
    assert torch.allclose(class_distances(z, torch.tensor([0, 0, 1])), torch.tensor([[0.0, 5.0], [5.0, 0.0]]))


def model():
    return VAE(StandardNormal(D), Decoder(Mlp(D, E), likelihoods.Normal()), DiagonalNormal(Mlp(E, 2 * D)))


def test_a_report_reads_z_and_its_two_baselines():
    vae = model()
    z, y = clusters(N + M, 0.5)
    x = torch.cat([z, 0.1 * torch.randn(N + M, E - D)], 1)
    data = SimpleNamespace(
        name="toy",
        policy="toy policy",
        train=x[:N],
        test=x[N:],
        train_labels=y[:N],
        test_labels=y[N:],
        prepare=lambda rows: rows,
    )
    found = represent(vae, data, num_neighbours=3)
    assert list(found.probes) == ["z", "PCA, D = 2", "raw x, E = 7"]
    expected = linear_probe(posterior_means(vae, x[:N]), y[:N], posterior_means(vae, x[N:]), y[N:])
    assert torch.equal(found.probes["z"].values, expected.values)
    assert found.neighbours["PCA, D = 2"].mean == 1.0 and found.neighbours["raw x, E = 7"].policy == "toy policy"
    less = paired_difference(found.probes["z"], found.probes["PCA, D = 2"])
    assert f"{less.mean:.2f}"[:5] in str(found) and "paired" in str(found)
    assert found.summary()["linear probe"]["z"]["mean"] == found.probes["z"].mean
    data.train_labels = None
    with pytest.raises(ValueError, match="with labels, found toy without"):
        represent(vae, data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.zeros(N - 1, dtype=torch.long)}, "one label for each"),
        ({"codes": torch.zeros(N, D + 1)}, "flatten each code"),
        ({"codes": torch.full((N, D), math.nan)}, "expected finite codes"),
        ({"labels": torch.zeros(N, dtype=torch.long)}, "two classes or more"),
    ],
)
def test_refusals(change, words):
    (z, y), (tz, ty) = clusters(N, 1.0), clusters(M, 1.0)
    arguments = {"codes": z, "labels": y, "test_codes": tz, "test_labels": ty} | change
    with pytest.raises(ValueError, match=words):
        linear_probe(**arguments)
    with pytest.raises(ValueError, match="expected 1 to 60 neighbours"):
        knn_accuracy(z, y, tz, ty, N + 1)


def test_the_top_confusions_are_shares_of_the_true_class():
    counts = torch.tensor([[90, 10, 0], [0, 15, 5], [1, 0, 1]])
    found = top_confusions(counts, 3)
    assert [pair[:2] for pair in found] == [(2, 0), (1, 2), (0, 1)]
    assert [pair[2].value for pair in found] == [0.5, 0.25, 0.1]
    assert found[1][2].standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 19))
    assert top_confusions(counts, 6)[-1][2].value == 0
    with pytest.raises(ValueError, match="use confusions"):
        top_confusions(counts, 7)
