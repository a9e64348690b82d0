r"""Sample quality: how far pictures from the model are from pictures of the data, in features of a classifier.

.. math:: x \xrightarrow{\ \text{classifier trained here}\ } \phi(x) \in \mathbb R^F

The features come from a small network trained on the labels at hand, not from Inception: none of these numbers compares
with a published one, only with its own kind, made with the same classifier, policy and numbers of pictures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.contracts import untouched
from pyro_vae.geometry import distances
from pyro_vae.networks import Mlp
from pyro_vae.uncertainty import Difference, Estimate, Score, with_error


class Classifier(nn.Module):
    """A perceptron whose last hidden layer gives the features.

    Args:
        loc: what is subtracted from x.
        scale: what it is divided by then.
        body: x, flattened -> features.
        head: features -> one number a class.
    """

    def __init__(self, loc: float, scale: float, body: nn.Module, head: nn.Module):
        super().__init__()
        self.loc, self.scale, self.body, self.head = loc, scale, body, head

    def features(self, x: Tensor) -> Tensor:
        """The numbers of the last hidden layer: [N, F] of x [N, *E]."""
        return torch.relu(self.body((x.flatten(1) - self.loc) / self.scale))

    def forward(self, x: Tensor) -> Tensor:
        """One number a class, before the softmax: [N, C] of x [N, *E]."""
        return self.head(self.features(x))


def train_classifier(
    x: Tensor,
    labels: Tensor,
    num_hidden: int = 128,
    num_features: int = 32,
    epochs: int = 30,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> Classifier:
    """Train the small classifier whose features the distances below are taken in: seconds on the digits.

    Args:
        x: pictures, [N, *E].
        labels: classes, [N], integers from 0.
        num_hidden: numbers in the first hidden layer.
        num_features: in the last one, F.
        epochs: passes over the data.
        batch_size: examples a step.
        lr: Adam's learning rate.
        seed: seed of everything; the random state outside is untouched.

    Returns:
        The classifier, in evaluation mode, its parameters without gradients.

    Raises:
        ValueError: labels that do not fit x, or fewer than two classes.
    """
    if labels.shape != x.shape[:1] or labels.is_floating_point() or len(labels.unique()) < 2:
        raise ValueError(
            f"expected one label of two classes or more for each x, found {labels.dtype} {tuple(labels.shape)} for x "
            f"{tuple(x.shape)}: give the labels of these rows."
        )
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        scale = max(float(x.float().std()), 1e-6)
        body, head = Mlp(x[0].numel(), num_hidden, num_features), nn.Linear(num_features, int(labels.max()) + 1)
        classifier = Classifier(float(x.float().mean()), scale, body, head).to(x.device)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)
        for _ in range(epochs):
            for rows in torch.randperm(len(x), device=x.device).split(batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(classifier(x[rows].float()), labels[rows]).backward()
                optimizer.step()
    return classifier.eval().requires_grad_(False)


def frechet_distance(real: Tensor, generated: Tensor, num_groups: int = 10, *, policy: str = "") -> Score:
    r"""The Fréchet distance between normals fitted to the features of real and of generated pictures.

    .. math:: d^2 = \| \mu_r - \mu_g \|^2 + \operatorname{tr} \Sigma_r + \operatorname{tr} \Sigma_g
        - 2 \operatorname{tr} (\Sigma_r \Sigma_g)^{1/2}

    The squared 2-Wasserstein distance of the two normals. Few pictures make it too large: set it beside that of real
    pictures from other real ones, as many. The standard error is that of a jackknife over groups of both sets.

    Args:
        real: features, [N, F].
        generated: features, [M, F].
        num_groups: of the jackknife.
        policy: the data policy to carry.

    Returns:
        The squared distance and its standard error; 0 is best.

    Raises:
        ValueError: fewer than two of either, features that are not finite or of different sizes.

    Source: Dowson, Landau (1982), The Fréchet distance between multivariate normal distributions; for pictures
        Heusel et al. (2017), arXiv:1706.08500, with the features of another network.

    Example:
        >>> a = torch.tensor([[-1.0], [1.0]])
        >>> round(frechet_distance(a, a + 3).value, 6)
        9.0
    """
    _check_features(real, generated)
    a, b = real.double(), generated.double()
    value = _frechet(a, b)
    groups = min(num_groups, len(a) // 2, len(b) // 2)
    error = math.nan
    if groups >= 2:
        chosen = [torch.arange(len(part), device=part.device) % groups for part in (a, b)]
        squares = []  # the errors of the two sets are independent: their squares add up
        for left_a, left_b in ((True, False), (False, True)):
            parts = [
                _frechet(a[chosen[0] != g] if left_a else a, b[chosen[1] != g] if left_b else b) for g in range(groups)
            ]
            squares.append((groups - 1) * torch.tensor(parts, dtype=torch.float64).var(correction=0).item())
        error = math.sqrt(sum(squares))
    return Score("squared Fréchet distance", value, error, len(a) + len(b), f"{a.shape[1]} features", policy)


def precision_recall(
    real: Tensor, generated: Tensor, num_neighbours: int = 3, *, policy: str = ""
) -> tuple[Estimate, Estimate]:
    r"""How many generated pictures look real, and how many real ones the model can make.

    .. math:: \text{precision} = \frac 1 M \sum_m \max_n 1[\| g_m - r_n \| \le \rho_k(r_n)], \qquad
        \text{recall} = \frac 1 N \sum_n \max_m 1[\| r_n - g_m \| \le \rho_k(g_m)]

    where rho_k is the distance of a point to its k-th nearest neighbour in its own set.

    Args:
        real: features, [N, F].
        generated: features, [M, F]; the paper takes as many of both.
        num_neighbours: k.
        policy: the data policy to carry.

    Returns:
        Precision [M] and recall [N], values 0 and 1; higher is better. Their errors hold the sets' balls fixed.

    Raises:
        ValueError: k or fewer pictures in a set, features that are not finite or of different sizes.

    Source: Kynkäänniemi, Karras, Laine, Lehtinen, Aila (2019), Improved precision and recall metric for assessing
        generative models, arXiv:1904.06991.

    Example:
        >>> real, made = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.5], [9.0], [9.5]])
        >>> precision, recall = precision_recall(real, made, num_neighbours=1)
        >>> precision.values.tolist(), recall.values.tolist()
        ([1.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    """
    _check_features(real, generated)
    smallest = min(len(real), len(generated))
    if not 1 <= num_neighbours < smallest:
        raise ValueError(f"expected 1 to {smallest - 1} neighbours, found {num_neighbours}: give more pictures.")
    found = []
    for name, points, support in (("precision", generated, real), ("recall", real, generated)):
        support = support.double()
        radius = distances(support, support).kthvalue(num_neighbours + 1, dim=1).values  # the first is the point itself
        inside = torch.cat(
            [(distances(rows, support) <= radius).any(1).double() for rows in points.double().split(1000)]
        )
        method = f"{num_neighbours} nearest neighbours"
        found.append(
            Estimate(name, inside, 0, policy, torch.zeros_like(inside), method=method, units="of the pictures")
        )
    return found[0], found[1]


def nearest_distance(generated: Tensor, x: Tensor, *, policy: str = "") -> Estimate:
    r"""The distance of each generated picture to the nearest one of the data, in pixels.

    .. math:: d_m = \min_n \| g_m - x_n \|

    Small is near the data, and zero a copy of it: set it beside that of held-out pictures from as many training ones.
    A blurred picture is nearer to all others than a sharp one.

    Args:
        generated: pictures, [M, *E].
        x: of the data, [N, *E].
        policy: the data policy to carry.

    Returns:
        An estimate, [M], in units of x.

    Raises:
        ValueError: no pictures, or of two shapes.

    Example:
        >>> nearest_distance(torch.tensor([[0.0, 0.0], [3.0, 3.0]]), torch.tensor([[0.0, 1.0], [3.0, 5.0]])).mean
        1.5
    """
    if generated.shape[1:] != x.shape[1:] or not len(x) or not len(generated):
        found = f"{tuple(generated.shape)} and {tuple(x.shape)}"
        raise ValueError(f"expected pictures [M, *E] and [N, *E], found {found}: give both one shape.")
    made, data = generated.flatten(1).double(), x.flatten(1).double()
    # Products are faster than differences, and of 16 digits they lose none that matters to which one is nearest.
    squares = data.square().sum(1)
    chosen = torch.cat([(squares - 2 * rows @ data.T).argmin(1) for rows in made.split(500)])
    away = (made - data[chosen]).norm(dim=1)
    method = f"to the nearest of {len(x)}"
    return Estimate("nearest distance", away, 0, policy, torch.zeros_like(away), method=method, units="in units of x")


def sharpness(x: Tensor) -> Tensor:
    r"""The variance of the Laplacian of each picture: low where it is blurred.

    .. math:: s(x) = \operatorname{Var}_{ij} (x_{i-1,j} + x_{i+1,j} + x_{i,j-1} + x_{i,j+1} - 4 x_{ij})

    Over all pixels with four neighbours; no border is made up. It measures noise as well as edges.

    Args:
        x: pictures, [N, C, H, W], H and W >= 3; channels are averaged first.

    Returns:
        [N], in squares of x's units.

    Raises:
        ValueError: x is no set of pictures, or too small.

    Source: Pech-Pacheco, Cristóbal, Chamorro-Martínez, Fernández-Valdivia (2000), Diatom autofocusing in brightfield
        microscopy.

    Example:
        >>> x = torch.zeros(1, 1, 4, 3)
        >>> x[0, 0, 1, 1] = 1.0  # the Laplacian is -4 there and 1 below it
        >>> sharpness(x).tolist()
        [6.25]
    """
    if x.ndim != 4 or min(x.shape[2:]) < 3:
        raise ValueError(f"expected pictures [N, C, H, W] of 3x3 or more, found {tuple(x.shape)}: reshape them.")
    grey = x.double().mean(1)
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (around - 4 * inner).flatten(1).var(1, correction=0)


@dataclass(frozen=True)
class PairedTest:
    """Student's t-test of paired differences.

    Args:
        difference: a - b of each pair.
        t: the mean difference in its standard errors.
        p_value: the probability of a |t| as large, were the mean difference 0; two-sided.
    """

    difference: Difference
    t: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.difference}; t = {self.t:.2f}, p = {self.p_value:.2g} (two-sided)"


def paired_t_test(a: Tensor, b: Tensor, name: str = "sharpness", units: str = "") -> PairedTest:
    r"""Whether one number of each picture, such as its sharpness, is larger before than after.

    .. math:: t = \frac{\bar d}{\mathrm{sd}(d) / \sqrt N}, \quad d_n = a_n - b_n, \qquad
        p = P(|T_{N - 1}| \ge |t|)

    Args:
        a: [N].
        b: [N], of the same pictures.
        name: what is compared.
        units: of both.

    Raises:
        ValueError: the two differ in shape, or there are fewer than two pairs.

    Source: Student (1908), The probable error of a mean.

    Example:
        >>> print(paired_t_test(torch.tensor([3.0, 5.0, 7.0]), torch.tensor([2.0, 3.0, 4.0]), units="units"))
        2.00 ± 0.58 units (paired, n=3); t = 3.46, p = 0.074 (two-sided)
    """
    from scipy.special import stdtr  # here: scikit-learn brings it

    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"expected two or more pairs, found {tuple(a.shape)} and {tuple(b.shape)}: give both [N].")
    difference = Difference(name, a.double() - b.double(), units)
    error = difference.standard_error
    t = difference.mean / error if error > 0 else math.copysign(math.inf, difference.mean) if difference.mean else 0.0
    return PairedTest(difference, t, float(2 * stdtr(len(a) - 1, -abs(t))))


@dataclass(frozen=True)
class Quality:
    """How good the pictures of a model are, by features of a classifier trained on the data's labels.

    Args:
        accuracy: of the classifier on held-out pictures: its features mean nothing if this is low.
        frechet: of the model's pictures from the held-out ones.
        frechet_of_data: of as many training pictures from the held-out ones: what a perfect model reaches.
        precision: share of the model's pictures inside the data.
        recall: share of the held-out pictures inside the model's.
        confidence: the classifier's largest class probability, of each of the model's pictures.
        blur: sharpness of held-out pictures less that of their reconstructions; None where x is no picture.
        policy: the data policy.
    """

    accuracy: Estimate
    frechet: Score
    frechet_of_data: Score
    precision: Estimate
    recall: Estimate
    confidence: Estimate
    blur: PairedTest | None
    policy: str

    def summary(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON."""
        named = {"accuracy": self.accuracy, "precision": self.precision, "recall": self.recall}
        result: dict[str, Any] = {name: each.summary() for name, each in named.items()}
        result |= {"confidence": self.confidence.summary(), "frechet": self.frechet.summary()}
        result["frechet_of_data"] = self.frechet_of_data.summary()
        if self.blur is not None:
            mean, error = self.blur.difference.mean, self.blur.difference.standard_error
            result["blur"] = {"mean": mean, "standard_error": error, "t": self.blur.t, "p_value": self.blur.p_value}
        return result

    def __str__(self) -> str:
        rows = {
            "classifier": f"{with_error(self.accuracy.mean, self.accuracy.standard_error)} right on held-out pictures",
            "Fréchet distance²": f"{self.frechet}; training pictures: {self.frechet_of_data}",
            "precision": str(self.precision),
            "recall": str(self.recall),
            "confidence": f"{self.confidence}; {float((self.confidence.values > 0.9).double().mean()):.2f} exceed 0.9",
        }
        if self.blur is not None:
            rows["sharpness lost"] = str(self.blur)
        return "\n".join(f"{name:20} {text}" for name, text in rows.items())


def quality(
    vae: Any,
    data: Any,
    classifier: Classifier | None = None,
    num_neighbours: int = 3,
    seed: int = 0,
    sampler: Callable[[int], Tensor] | None = None,
) -> Quality:
    """Compare as many pictures of the model as there are held-out ones, means of p(x | z) with z from the prior.

    Args:
        vae: a model with ``prior``, ``decode`` and ``reconstruct``.
        data: a data set with labels: ``train``, ``prepare``, ``test``, ``train_labels``, ``test_labels``, ``policy``.
        classifier: of :func:`train_classifier`; None trains one. To compare models, give all of them the same.
        num_neighbours: k of precision and recall.
        seed: seed of the draws.
        sampler: number -> codes z [number, D]; None draws from the prior. An autoencoder's rival: a normal fitted to
            its codes.

    Raises:
        ValueError: the data has no labels.
    """
    if data.train_labels is None or data.test_labels is None:
        raise ValueError(f"expected a data set with labels, found {data.name} without: the classifier needs them.")
    x, policy = data.test, data.policy
    with untouched(vae, seed):
        x_train = data.prepare(data.train)
    classifier = train_classifier(x_train, data.train_labels) if classifier is None else classifier
    with untouched(vae, seed):
        z = vae.prior().sample((len(x),)) if sampler is None else sampler(len(x))
        generated = torch.cat([vae.decode(rows).mean for rows in z.split(1000)])
        reconstructed = torch.cat([vae.reconstruct(rows) for rows in x.split(1000)])
        some = x_train[torch.randperm(len(x_train), device=x_train.device)[: len(x)]]
        real, made, other = (classifier.features(part) for part in (x, generated, some))
        right = (classifier(x).argmax(1) == data.test_labels).double()
        sure = classifier(generated).softmax(1).amax(1).double()
    exact = {"method": "classifier", "errors": torch.zeros_like(right), "num_particles": 0, "policy": policy}
    precision, recall = precision_recall(real, made, num_neighbours, policy=policy)
    blur = None
    if x.ndim == 4 and min(x.shape[2:]) >= 3:
        blur = paired_t_test(sharpness(x), sharpness(reconstructed), units="squared units of x")
    return Quality(
        Estimate("accuracy", right, units="of the labels", **exact),
        frechet_distance(real, made, policy=policy),
        frechet_distance(real, other, policy=policy),
        precision,
        recall,
        Estimate("confidence", sure, units="probability", **exact),
        blur,
        policy,
    )


def _frechet(a: Tensor, b: Tensor) -> float:
    covariances = [torch.cov(part.T).reshape(part.shape[1], -1) for part in (a, b)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The eigenvalues of A^(1/2) B A^(1/2) are those of A B, and it is symmetric.
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * cross
    return max(((a.mean(0) - b.mean(0)).square().sum() + spread).item(), 0.0)


def _check_features(real: Tensor, generated: Tensor) -> None:
    shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
    fits = real.ndim == generated.ndim == 2 and real.shape[1] == generated.shape[1]
    if not fits or min(len(real), len(generated)) < 2:
        raise ValueError(f"expected features [N, F] and [M, F] of two pictures or more, found {shapes}: take features.")
    if not bool(real.isfinite().all() and generated.isfinite().all()):
        raise ValueError("expected finite features, found infinite values or NaN: the model that made them diverged.")
