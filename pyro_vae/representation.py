r"""What a code is good for: how much of the labels and of their distances can be read from it.

.. math:: x \xrightarrow{\ q(z|x)\ } z \xrightarrow{\ \text{a simple reader}\ } y

Every number has its baseline here: the same reader on raw x, and on as many principal components as z has dimensions.
Nothing of the model is trained. An accuracy is an estimate over the test examples (1 where the reader is right, else 0)
with the binomial standard error, so that two readers compare pairwise by ``paired_difference``.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.contracts import untouched
from pyro_vae.geometry import distances, nearest, principal_components
from pyro_vae.uncertainty import Estimate, Score, paired_difference, with_error


def posterior_means(vae: Any, x: Tensor, batch_size: int = 1000) -> Tensor:
    r"""The mean of q(z | x) of each example: the code that the readers below get.

    Args:
        vae: a model with an encoder whose posterior has a mean.
        x: data, [N, *E].
        batch_size: examples handled at once.

    Returns:
        [N, D].
    """
    with untouched(vae):
        return torch.cat([vae.encoder(rows).mean for rows in x.split(batch_size)])


def linear_probe(
    codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor, *, policy: str = ""
) -> Estimate:
    r"""The accuracy of a multinomial logistic regression on the codes: what can be read linearly.

    .. math:: p(y \mid z) = \mathrm{softmax}(W z + b), \qquad \text{accuracy} = \frac 1 M \sum_m 1[\hat y_m = y_m]

    Codes are standardised by the mean and standard deviation of the training codes; the penalty is that of
    scikit-learn (C = 1).

    Args:
        codes: of the training examples, [N, D].
        labels: their classes, [N], integers.
        test_codes: of the held-out examples, [M, D].
        test_labels: their classes, [M].
        policy: the data policy to carry.

    Returns:
        An estimate with values 0 and 1, [M]; higher is better.

    Raises:
        ValueError: shapes that do not fit, codes that are not finite, or a single class.

    Source: Alain, Bengio (2017), Understanding intermediate layers using linear classifier probes, arXiv:1610.01644.

    Example:
        >>> z, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> linear_probe(z, y, torch.tensor([[-1.5], [1.5], [1.0]]), torch.tensor([0, 1, 0])).values.tolist()
        [1.0, 1.0, 0.0]
    """
    from sklearn.linear_model import LogisticRegression  # here: slow to import

    _check_pairs(codes, labels, test_codes, test_labels)
    if len(labels.unique()) < 2:
        raise ValueError("expected labels of two classes or more, found one: a probe tells classes apart.")
    loc, scale = codes.double().mean(0), codes.double().std(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    inputs, test_inputs = (((part.double() - loc) / scale).cpu().numpy() for part in (codes, test_codes))
    reader = LogisticRegression(max_iter=5000).fit(inputs, labels.cpu().numpy())
    predicted = torch.from_numpy(reader.predict(test_inputs)).to(test_labels.device)
    return _accuracy("linear probe", predicted, test_labels, "logistic regression", policy)


def knn_predict(codes: Tensor, labels: Tensor, test_codes: Tensor, num_neighbours: int = 10) -> Tensor:
    """The class that most of the nearest training codes have; of classes that tie, the one with the nearer neighbours.

    Args:
        codes: of the training examples, [N, D].
        labels: their classes, [N], integers from 0.
        test_codes: [M, D].
        num_neighbours: how many vote, at most N.

    Returns:
        Classes, [M].
    """
    chosen = nearest(test_codes.double(), codes.double(), num_neighbours)[1]
    # Powers of two add up to less than one vote, and order the classes of a tie by their nearest neighbour.
    weight = 1 + 0.5 ** torch.arange(2.0, num_neighbours + 2, dtype=torch.float64, device=codes.device)
    votes = torch.nn.functional.one_hot(labels[chosen], int(labels.max()) + 1).double()
    return (votes * weight.unsqueeze(-1)).sum(1).argmax(-1)


def knn_accuracy(
    codes: Tensor,
    labels: Tensor,
    test_codes: Tensor,
    test_labels: Tensor,
    num_neighbours: int = 10,
    *,
    policy: str = "",
) -> Estimate:
    r"""The accuracy of the vote of the k nearest training codes: whether neighbours in z are of one class.

    .. math:: \hat y(z) = \arg\max_c \sum_{n \in \mathrm{kNN}(z)} 1[y_n = c]

    Args:
        codes: of the training examples, [N, D]; or raw x, flattened.
        labels: their classes, [N], integers from 0.
        test_codes: of the held-out examples, [M, D].
        test_labels: their classes, [M].
        num_neighbours: how many vote.
        policy: the data policy to carry.

    Returns:
        An estimate with values 0 and 1, [M]; higher is better.

    Raises:
        ValueError: shapes that do not fit, codes that are not finite, or more neighbours than codes.

    Source: Cover, Hart (1967), Nearest neighbor pattern classification.

    Example:
        >>> z, y = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1])
        >>> knn_accuracy(z, y, torch.tensor([[0.4], [6.0]]), torch.tensor([0, 1]), num_neighbours=1).mean
        1.0
    """
    _check_pairs(codes, labels, test_codes, test_labels)
    predicted = knn_predict(codes, labels, test_codes, num_neighbours)
    return _accuracy("kNN accuracy", predicted, test_labels, f"{num_neighbours} nearest neighbours", policy)


def confusions(predicted: Tensor, labels: Tensor) -> Tensor:
    """How often each class was taken for each other: [C, C] counts, the true class along the first axis.

    Args:
        predicted: classes, [M], integers from 0.
        labels: the true ones, [M].
    """
    num = int(max(predicted.max(), labels.max())) + 1
    return torch.bincount(labels * num + predicted, minlength=num * num).reshape(num, num)


def top_confusions(counts: Tensor, num: int = 5) -> list[tuple[int, int, Score]]:
    """The classes most often taken for others, and how often, as a share of the true class.

    Args:
        counts: of :func:`confusions`, [C, C].
        num: how many pairs, at most C (C - 1).

    Returns:
        The true class, the one it was taken for, and the share with its binomial standard error; largest first.

    Raises:
        ValueError: the counts are not [C, C], or fewer pairs than asked for.

    Example:
        >>> for true, taken, share in top_confusions(torch.tensor([[8, 2], [1, 9]]), num=1):
        ...     print(true, "->", taken, share)
        0 -> 1 0.20 ± 0.13 (n=10)
    """
    num_classes = len(counts)
    if counts.shape != (num_classes, num_classes) or not 1 <= num <= num_classes * (num_classes - 1):
        raise ValueError(
            f"expected counts [C, C] and 1 to C (C - 1) pairs, found {tuple(counts.shape)} and {num}: use confusions."
        )
    of_class = counts.sum(1)
    shares = counts.double() / of_class.clamp(min=1).unsqueeze(1)
    shares = shares.masked_fill(torch.eye(num_classes, dtype=torch.bool, device=counts.device), -1)
    found = []
    for place in shares.flatten().argsort(descending=True, stable=True)[:num].tolist():
        true, taken = divmod(place, num_classes)
        n, p = int(of_class[true]), max(float(shares[true, taken]), 0.0)
        error = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan
        found.append((true, taken, Score(f"{true} taken for {taken}", p, error, n)))
    return found


def class_distances(codes: Tensor, labels: Tensor) -> Tensor:
    """How far the mean codes of the classes lie from each other: [C, C], Euclidean.

    Args:
        codes: [N, D].
        labels: classes, [N], integers from 0.
    """
    centres = torch.stack([codes[labels == c].double().mean(0) for c in range(int(labels.max()) + 1)])
    return distances(centres, centres)


@dataclass(frozen=True)
class Representation:
    """How well the labels can be read from z, from as many principal components, and from raw x.

    Args:
        probes: accuracy of a linear probe by what it reads.
        neighbours: accuracy of the vote of nearest neighbours by what they are near in.
        latent_dim: the number of dimensions of z.
        policy: the data policy.
    """

    probes: dict[str, Estimate]
    neighbours: dict[str, Estimate]
    latent_dim: int
    policy: str

    def summary(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON."""
        rows = {"linear probe": self.probes, "nearest neighbours": self.neighbours}
        return {name: {key: each.summary() for key, each in found.items()} for name, found in rows.items()}

    def __str__(self) -> str:
        lines = [f"{'accuracy':24}{'linear probe':>18}{'neighbours':>18}"]
        for key in self.probes:
            cells = [with_error(e.mean, e.standard_error) for e in (self.probes[key], self.neighbours[key])]
            lines.append(f"{key:24}{cells[0]:>18}{cells[1]:>18}")
        other = [key for key in self.probes if key.startswith("PCA")]
        if other:
            less = [paired_difference(found["z"], found[other[0]]) for found in (self.probes, self.neighbours)]
            cells = [with_error(d.mean, d.standard_error) for d in less]
            lines.append(f"{'z less PCA (paired)':24}{cells[0]:>18}{cells[1]:>18}")
        return "\n".join(lines)


def represent(vae: Any, data: Any, num_neighbours: int = 10, most: int = 5000, seed: int = 0) -> Representation:
    """Read the labels of a data set from z, from principal components, and from raw x.

    Args:
        vae: a model whose posterior has a mean.
        data: a data set with labels: ``train``, ``prepare``, ``test``, ``train_labels``, ``test_labels``, ``policy``.
        num_neighbours: how many neighbours vote.
        most: training examples used at most, from the first.
        seed: seed of what ``prepare`` draws.

    Raises:
        ValueError: the data has no labels, or x has missing values.
    """
    if data.train_labels is None or data.test_labels is None:
        raise ValueError(f"expected a data set with labels, found {data.name} without: name its column of labels.")
    with untouched(vae, seed):
        x = data.prepare(data.train[:most])
    if bool(x.isnan().any() or data.test.isnan().any()):
        raise ValueError("expected x without missing values, found NaN: impute them first.")
    labels, test_labels = data.train_labels[:most], data.test_labels
    codes, test_codes = posterior_means(vae, x), posterior_means(vae, data.test)
    found = {"z": (codes, test_codes)}
    if codes.shape[1] <= min(x.flatten(1).shape):
        pca = principal_components(x, codes.shape[1])
        found[f"PCA, D = {codes.shape[1]}"] = pca.encode(x), pca.encode(data.test)
    found[f"raw x, E = {x[0].numel()}"] = x.flatten(1), data.test.flatten(1)
    probes, votes = {}, {}
    for name, (train, test) in found.items():
        probes[name] = linear_probe(train, labels, test, test_labels, policy=data.policy)
        votes[name] = knn_accuracy(train, labels, test, test_labels, num_neighbours, policy=data.policy)
    return Representation(probes, votes, codes.shape[1], data.policy)


def _accuracy(name: str, predicted: Tensor, labels: Tensor, method: str, policy: str) -> Estimate:
    right = (predicted == labels).double()
    return Estimate(name, right, 0, policy, torch.zeros_like(right), method=method, units="of the labels")


def _check_pairs(codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (codes, labels, test_codes, test_labels)]
    fits = codes.ndim == test_codes.ndim == 2 and shapes[0][1] == shapes[2][1] and len(codes) and len(test_codes)
    if not fits or shapes[1] != shapes[0][:1] or shapes[3] != shapes[2][:1]:
        raise ValueError(
            f"expected codes [N, D], labels [N], test codes [M, D] and test labels [M], found {shapes}: "
            "flatten each code, and give one label for each."
        )
    if not bool(codes.isfinite().all() and test_codes.isfinite().all()):
        raise ValueError("expected finite codes, found infinite values or NaN: the model that made them diverged.")
