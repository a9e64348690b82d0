r"""The geometry of z: distances between posteriors, linear subspaces, nearest points. Nothing is trained.

.. math:: d(q(z|x_1), q(z|x_2)), \qquad \angle(\mathrm{span} A, \mathrm{span} B), \qquad \min_n \| s - z_n \|
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_vae.contracts import untouched

_CHUNK = 2**24  # distances held at once

Distance = Callable[[Normal, Normal], Tensor]


def posterior_normals(vae: Any, x: Tensor, batch_size: int = 1000) -> Normal:
    r"""The diagonal normals q(z | x) of all examples.

    Args:
        vae: a model with an encoder.
        x: data, [N, *E].
        batch_size: examples handled at once.

    Returns:
        A normal of batch shape [N, D].

    Raises:
        ValueError: the posterior is no diagonal normal.
    """
    with untouched(vae):
        found = [vae.encoder(rows) for rows in x.split(batch_size)]
    for q in found:
        if not (isinstance(q, Independent) and isinstance(q.base_dist, Normal)):
            raise ValueError(
                f"expected diagonal normals, found encoder(x) of type {type(q).__name__}: the distances between "
                "posteriors are known for normals only; use posterior_means and Euclidean distances."
            )
    return Normal(torch.cat([q.base_dist.loc for q in found]), torch.cat([q.base_dist.scale for q in found]))


def euclidean(p: Normal, q: Normal) -> Tensor:
    r"""Distance of the means.

    .. math:: d(p, q) = \| \mu_p - \mu_q \|

    Args:
        p: normals of batch shape [Q, D].
        q: normals of batch shape [N, D].

    Returns:
        [Q, N].
    """
    return distances(p.loc, q.loc)


def symmetrised_kl(p: Normal, q: Normal) -> Tensor:
    r"""The mean of the two Kullback-Leibler divergences: half of Jeffreys' divergence.

    .. math:: d(p, q) = \tfrac 1 2 (\mathrm{KL}(p \| q) + \mathrm{KL}(q \| p)) = \sum_d \frac 1 4 \left(
        \frac{\sigma_p^2 + \delta^2}{\sigma_q^2} + \frac{\sigma_q^2 + \delta^2}{\sigma_p^2} - 2 \right), \qquad
        \delta = \mu_p - \mu_q

    Args:
        p: normals of batch shape [Q, D].
        q: normals of batch shape [N, D].

    Returns:
        [Q, N], nats.
    """
    delta, var_p, var_q = _aligned(p, q)
    return 0.25 * ((var_p + delta) / var_q + (var_q + delta) / var_p - 2).sum(-1)


def wasserstein(p: Normal, q: Normal) -> Tensor:
    r"""The 2-Wasserstein distance.

    .. math:: d(p, q)^2 = \| \mu_p - \mu_q \|^2 + \| \sigma_p - \sigma_q \|^2

    Args:
        p: normals of batch shape [Q, D].
        q: normals of batch shape [N, D].

    Returns:
        [Q, N].

    Source: Givens, Shortt (1984), A class of Wasserstein metrics for probability distributions.
    """
    delta, var_p, var_q = _aligned(p, q)
    return (delta + (var_p.sqrt() - var_q.sqrt()).square()).sum(-1).sqrt()


def bhattacharyya(p: Normal, q: Normal) -> Tensor:
    r"""The Bhattacharyya distance: minus the logarithm of the overlap.

    .. math:: d(p, q) = -\log \int \sqrt{p(z) q(z)}\,dz = \sum_d \frac{(\mu_p - \mu_q)^2}{4 (\sigma_p^2 + \sigma_q^2)}
        + \frac 1 2 \log \frac{\sigma_p^2 + \sigma_q^2}{2 \sigma_p \sigma_q}

    Args:
        p: normals of batch shape [Q, D].
        q: normals of batch shape [N, D].

    Returns:
        [Q, N], nats.

    Source: Bhattacharyya (1943), On a measure of divergence between two statistical populations.
    """
    delta, var_p, var_q = _aligned(p, q)
    both = var_p + var_q
    return (delta / (4 * both) + 0.5 * (both / 2).log() - 0.25 * (var_p.log() + var_q.log())).sum(-1)


def neighbours(
    query: Normal, index: Normal, num_neighbours: int, distance: Distance = euclidean
) -> tuple[Tensor, Tensor]:
    """The nearest posteriors of each query, nearest first.

    Args:
        query: q(z | x) of the queries, batch shape [Q, D]; see :func:`posterior_normals`.
        index: q(z | x) of the examples to search, batch shape [N, D].
        num_neighbours: how many, k <= N.
        distance: :func:`euclidean` between means, :func:`symmetrised_kl`, :func:`wasserstein`, :func:`bhattacharyya`,
            or any (p [Q, D], q [N, D]) -> [Q, N].

    Returns:
        Their distances and their rows in ``index``, each [Q, k].

    Raises:
        ValueError: more neighbours than rows, or codes of different sizes.

    Example:
        >>> q = Normal(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[1.0], [3.0], [1.0]]))
        >>> neighbours(q, q, 2)[1][0].tolist(), neighbours(q, q, 2, wasserstein)[0][0].tolist()
        ([0, 1], [0.0, 2.23...])
    """
    if query.loc.shape[1:] != index.loc.shape[1:]:
        found = f"{tuple(query.loc.shape)} and {tuple(index.loc.shape)}"
        raise ValueError(f"expected query [Q, D] and index [N, D], found {found}: take both from one encoder.")
    _check_neighbours(num_neighbours, len(index.loc))
    rows = max(1, _CHUNK // index.loc.numel())
    parts = []
    for loc, scale in zip(query.loc.split(rows), query.scale.split(rows), strict=True):
        parts.append(distance(Normal(loc, scale), index).topk(num_neighbours, largest=False))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


# ------------------------------------------------------------------------------------------------- linear subspaces


@dataclass(frozen=True)
class Principal:
    """The principal components of some data.

    Args:
        loc: the mean, [E].
        directions: orthonormal columns, the largest variance first, [E, D].
    """

    loc: Tensor
    directions: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates [N, D] of x [N, *E]."""
        return (x.flatten(1).double() - self.loc) @ self.directions

    def residual(self, x: Tensor) -> Tensor:
        """What the components leave of x [N, *E]: the squared distance of each example to their span, [N]."""
        centred = x.flatten(1).double() - self.loc
        return (centred - centred @ self.directions @ self.directions.T).square().sum(1)


def principal_components(x: Tensor, num_components: int) -> Principal:
    """The directions of largest variance: the linear autoencoder that a code of D dimensions is compared with.

    Args:
        x: data, [N, *E].
        num_components: how many, D, at most E and N.

    Raises:
        ValueError: more components than numbers in x or examples.
    """
    flat = x.flatten(1).double()
    if not 1 <= num_components <= min(flat.shape):
        raise ValueError(
            f"expected 1 to {min(flat.shape)} components of x [N, E] = {list(flat.shape)}, found {num_components}: "
            "choose fewer."
        )
    loc = flat.mean(0)
    directions = torch.linalg.svd(flat - loc, full_matrices=False)[2][:num_components].T
    return Principal(loc, directions)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    r"""The angles between two linear subspaces, smallest first; all 0 where one holds the other.

    .. math:: \cos \theta_i = \sigma_i(Q_a^\top Q_b), \qquad \sin \theta_i = \sigma_i((I - Q_a Q_a^\top) Q_b)

    The sines are used for small angles, whose cosines round to 1.

    Args:
        a: columns that span the first, [E, D].
        b: columns that span the second, [E, F].

    Returns:
        [min(D, F)], degrees, 0 to 90.

    Raises:
        ValueError: the two do not live in one space.

    Source: Björck, Golub (1973), Numerical methods for computing angles between linear subspaces.

    Example:
        >>> a, b = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> principal_angles(a, b).tolist()
        [45.0...]
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        found = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"expected columns [E, D] and [E, F], found {found}: span both in the space of x.")
    if a.shape[1] < b.shape[1]:
        a, b = b, a  # project the smaller on the larger: as many sines as cosines
    first, second = torch.linalg.qr(a.double())[0], torch.linalg.qr(b.double())[0]
    inner = first.T @ second
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(second - first @ inner).clamp(max=1).flip(0)
    return torch.rad2deg(torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos()))


def tangent(vae: Any, z: Tensor) -> Tensor:
    r"""The directions in which the mean of p(x | z) moves with z; of a linear normal decoder, its weight matrix.

    .. math:: J = \partial\, \mathbb E[x \mid z] / \partial z

    Args:
        vae: a model with a decoder.
        z: one code, [D].

    Returns:
        [E, D], x flattened: columns for :func:`principal_angles`.
    """
    with untouched(vae), torch.enable_grad():
        return torch.autograd.functional.jacobian(lambda code: vae.decoder(code.unsqueeze(0)).mean.flatten(), z)


# ------------------------------------------------------------------------------------------------- nearest points


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances, by differences: products lose the digits of small ones.

    Args:
        a: [A, D].
        b: [B, D].

    Returns:
        [A, B].
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(queries: Tensor, points: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The nearest points of each query, nearest first, in chunks of bounded memory.

    Args:
        queries: [Q, D].
        points: [N, D].
        num: how many, k <= N.

    Returns:
        Their distances and their rows in ``points``, each [Q, k].

    Raises:
        ValueError: more neighbours than points.
    """
    _check_neighbours(num, len(points))
    chunks = queries.split(max(1, _CHUNK // len(points)))
    parts = [distances(rows, points).topk(num, largest=False) for rows in chunks]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _aligned(p: Normal, q: Normal) -> tuple[Tensor, Tensor, Tensor]:
    """Squared differences of the means [Q, N, D] and both variances, [Q, 1, D] and [1, N, D]."""
    delta = (p.loc.unsqueeze(1) - q.loc.unsqueeze(0)).square()
    return delta, p.scale.square().unsqueeze(1), q.scale.square().unsqueeze(0)


def _check_neighbours(num_neighbours: int, most: int) -> None:
    if not 1 <= num_neighbours <= most:
        raise ValueError(f"expected 1 to {most} neighbours, found {num_neighbours}: there are {most} to choose from.")
