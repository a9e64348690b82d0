r"""The cloud of codes: how round it is, where its holes are, the ball that holds it, and how to draw from it.

.. math:: z_1, \dots, z_N \in \mathbb R^D, \qquad \bar z = \frac 1 N \sum_n z_n, \qquad
    \{ z : \| z - \bar z \| \le r \}

An autoencoder has codes but no prior: what stands here draws from it all the same, so that it and a VAE can be
compared by what they make. Nothing of the model is trained.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pyro import distributions as dist
from torch import Tensor

from pyro_vae.contracts import Distribution
from pyro_vae.geometry import nearest
from pyro_vae.uncertainty import Estimate, Score, jackknife_error

Plane = tuple[int, int] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Ball:
    r"""A ball in z, and the sites in it along a plane through its centre.

    .. math:: \{ c + a u + b v : |a|, |b| \le r / \sqrt 2 \}, \qquad \{ c + r (u \cos t + v \sin t) \}

    Args:
        centre: c, [D].
        radius: r.
    """

    centre: Tensor
    radius: float

    def contains(self, z: Tensor) -> Tensor:
        """Which codes lie inside: [N] booleans of z [N, D]."""
        return (z - self.centre).norm(dim=1) <= self.radius

    def lattice(self, num: int = 15, plane: Plane = (0, 1), fill: Literal["centre", "zero"] = "centre") -> Tensor:
        """A square lattice inscribed in the great circle of a plane: its four corners lie on the circle.

        Args:
            num: sites in each direction, at least 2.
            plane: the two axes of z, or two orthonormal directions u and v, each [D].
            fill: what the sites have off the plane: the centre's part, or zero.

        Returns:
            [num * num, D] in reading order, from the top left: u to the right, v upwards.

        Raises:
            ValueError: num < 2, or the plane has no two orthonormal directions.

        Example:
            >>> Ball(torch.tensor([1.0, 3.0, 5.0]), 2**0.5).lattice(2).round().tolist()
            [[0.0, 4.0, 5.0], [2.0, 4.0, 5.0], [0.0, 2.0, 5.0], [2.0, 2.0, 5.0]]
        """
        if num < 2:
            raise ValueError(f"expected 2 or more sites in each direction, found {num}: choose a larger num.")
        step = torch.linspace(-1, 1, num, dtype=self.centre.dtype, device=self.centre.device)
        rows, columns = torch.meshgrid(step.flip(0), step, indexing="ij")
        return self._sites(torch.stack([columns.flatten(), rows.flatten()], 1) / math.sqrt(2), plane, fill)

    def circle(self, num: int = 16, plane: Plane = (0, 1), fill: Literal["centre", "zero"] = "centre") -> Tensor:
        """Sites on the great circle of a plane, counterclockwise from u: [num, D]; arguments of :meth:`lattice`."""
        angle = torch.arange(num, dtype=self.centre.dtype, device=self.centre.device) * (2 * math.pi / num)
        return self._sites(torch.stack([angle.cos(), angle.sin()], 1), plane, fill)

    def _sites(self, places: Tensor, plane: Plane, fill: str) -> Tensor:
        directions = self._directions(plane)
        if fill not in ("centre", "zero"):
            raise ValueError(f"expected fill 'centre' or 'zero', found {fill!r}: choose one.")
        within = directions.T @ (directions @ self.centre)  # the centre's part in the plane
        return (self.centre if fill == "centre" else within) + self.radius * places @ directions

    def _directions(self, plane: Plane) -> Tensor:
        """The two directions as rows, [2, D]."""
        dim = len(self.centre)
        rows = []
        for part in plane:
            if not isinstance(part, Tensor):
                if not 0 <= part < dim:
                    raise ValueError(f"expected axes from 0 to {dim - 1}, found {part}: z has {dim} dimensions.")
                part = torch.eye(dim)[part]
            rows.append(part.to(self.centre))
        found = torch.stack(rows)
        if found.shape != (2, dim) or not torch.allclose(found @ found.T, torch.eye(2).to(found), atol=1e-4):
            raise ValueError(
                f"expected two orthonormal directions [{dim}], found {tuple(found.shape)} with the products "
                f"{(found @ found.T).flatten().tolist()}: take two axes, or torch.linalg.qr of two directions."
            )
        return found


def ball(codes: Tensor, share: float = 0.99) -> Ball:
    r"""The ball around the mean code that holds the given share of the codes, all D dimensions counted.

    .. math:: c = \bar z, \qquad r = \| z - \bar z \|_{(\lceil s N \rceil)}

    an order statistic: exactly that many codes lie inside. Draws of a standard normal have
    :func:`prior_radius`; a projection on two dimensions does not show r, since most of it lies in the others.

    Args:
        codes: [N, D].
        share: of the codes inside, above 0 and at most 1.

    Returns:
        The ball, in float64 on the device of the codes.

    Raises:
        ValueError: no codes [N, D], or a share out of its range.

    Example:
        >>> ball(torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.5], [0.0, -0.5]]), share=0.5).radius
        0.5
    """
    if codes.ndim != 2 or not len(codes) or not 0 < share <= 1:
        raise ValueError(f"expected codes [N, D] and 0 < share <= 1, found {tuple(codes.shape)} and {share}.")
    centre = codes.double().mean(0)
    lengths = (codes.double() - centre).norm(dim=1)
    return Ball(centre, lengths.kthvalue(math.ceil(share * len(codes) - 1e-9)).values.item())


def prior_radius(latent_dim: int, share: float = 0.99) -> float:
    r"""The radius of the ball around 0 that holds a share of a standard normal: the quantile of chi with D degrees.

    .. math:: P(\| z \| \le r) = s, \qquad z \sim \mathcal N(0, I_D)

    Args:
        latent_dim: D.
        share: s.

    Example:
        >>> round(prior_radius(2), 4), round(prior_radius(10), 3)  # sqrt(-2 log 0.01) in two dimensions
        (3.0349, 4.818)
    """
    from scipy.special import chdtri  # here: scikit-learn brings it

    return float(chdtri(latent_dim, 1 - share)) ** 0.5


@dataclass(frozen=True)
class Isotropy:
    r"""How far a cloud of codes is from a round normal one, whatever its centre and its size.

    .. math:: \frac{\lambda_{\max}}{\lambda_{\min}}, \qquad
        b_1 = \frac{1}{N^2} \sum_{nm} (y_n^\top y_m)^3, \qquad
        b_2 = \frac 1 N \sum_n \| y_n \|^4, \qquad y_n = \Sigma^{-1/2} (z_n - \bar z)

    Args:
        ratio: of the largest to the smallest eigenvalue of the covariance; 1 is round.
        skewness: Mardia's b_1; near 0 of a normal, from draws of it D (D + 1) (D + 2) / N on average.
        kurtosis: Mardia's b_2, as a multiple of a normal's D (D + 2); 1 is a normal's.
        p_skewness: the probability of so large a b_1, were the cloud normal.
        p_kurtosis: the probability of a b_2 as far from its mean, were it normal; two-sided.
    """

    ratio: Score
    skewness: Score
    kurtosis: Score
    p_skewness: float
    p_kurtosis: float

    def __str__(self) -> str:
        parts = "\n".join(f"{each.name:24} {each}" for each in (self.ratio, self.skewness, self.kurtosis))
        return f"{parts}\np were it normal         {self.p_skewness:.2g} (skewness), {self.p_kurtosis:.2g} (kurtosis)"


def isotropy(codes: Tensor, num_groups: int = 10, *, policy: str = "") -> Isotropy:
    """Eigenvalue ratio, and Mardia's skewness and kurtosis, each with a jackknife error; see :class:`Isotropy`.

    Args:
        codes: [N, D], N > D.
        num_groups: of the jackknife.
        policy: the data policy to carry.

    Raises:
        ValueError: too few codes, or codes in a plane of fewer than D dimensions.

    Source: Mardia (1970), Measures of multivariate skewness and kurtosis with applications.
    """
    from scipy.special import chdtrc, ndtr  # here: scikit-learn brings it

    if codes.ndim != 2 or len(codes) <= codes.shape[1]:
        raise ValueError(f"expected more codes than dimensions, found {tuple(codes.shape)}: give more examples.")
    num, dim = codes.shape
    ratio, skewness, kurtosis = _moments(codes.double())
    if not 0 < ratio < 1e12:  # also where rounding makes the smallest negative
        raise ValueError("expected codes that vary in all D dimensions, found a plane: take its coordinates.")
    errors = jackknife_error(_moments, codes.double(), num_groups=min(num_groups, num // (dim + 1)))
    names = ("eigenvalue ratio", "Mardia's skewness", "Mardia's kurtosis, ratio")
    round_, skewed, heavy = (
        Score(name, value, error, num, policy=policy)
        for name, value, error in zip(names, (ratio, skewness, kurtosis), errors, strict=True)
    )
    degrees = dim * (dim + 1) * (dim + 2) / 6
    standard = (kurtosis - 1) * math.sqrt(num * dim * (dim + 2) / 8)
    return Isotropy(round_, skewed, heavy, float(chdtrc(degrees, num * skewness / 6)), float(2 * ndtr(-abs(standard))))


def _moments(codes: Tensor) -> tuple[float, float, float]:
    centred = codes - codes.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(codes))
    white = centred @ vectors / values.clamp(min=1e-300).sqrt()
    third = torch.einsum("ni,nj,nk->ijk", white, white, white) / len(codes)
    dim = codes.shape[1]
    kurtosis = white.square().sum(1).square().mean().item() / (dim * (dim + 2))
    return (values[-1] / values[0]).item(), third.square().sum().item(), kurtosis


# ------------------------------------------------------------------------------------------------- to draw from codes


def fit_normal(codes: Tensor) -> Distribution:
    r"""The normal with the mean and the covariance of the codes: the simplest prior that codes can be given afterwards.

    .. math:: p(z) = \mathcal N(z; \bar z, \Sigma)

    Args:
        codes: [N, D], N > D.

    Returns:
        A distribution with event shape (D,).

    Raises:
        ValueError: too few codes.

    Source: Ghosh, Sajjadi, Vergari, Black, Schölkopf (2020), From variational to deterministic autoencoders,
        arXiv:1903.12436.
    """
    if codes.ndim != 2 or len(codes) <= codes.shape[1]:
        raise ValueError(f"expected more codes than dimensions, found {tuple(codes.shape)}: give more examples.")
    covariance = torch.cov(codes.double().T).reshape(codes.shape[1], -1).to(codes.dtype)
    return dist.MultivariateNormal(codes.double().mean(0).to(codes.dtype), covariance)


def fit_mixture(codes: Tensor, num_components: int = 10, seed: int = 0) -> Distribution:
    r"""A mixture of normals fitted to the codes by expectation maximisation.

    .. math:: p(z) = \sum_c \pi_c \, \mathcal N(z; \mu_c, \Sigma_c)

    Args:
        codes: [N, D].
        num_components: C, at most N.
        seed: of the start.

    Returns:
        A distribution with event shape (D,).

    Raises:
        ValueError: more components than codes.

    Source: as :func:`fit_normal`; Dempster, Laird, Rubin (1977), Maximum likelihood from incomplete data via the EM
        algorithm.
    """
    from sklearn.mixture import GaussianMixture  # here: slow to import

    if codes.ndim != 2 or not 1 <= num_components <= len(codes):
        found = f"{num_components} for codes {tuple(codes.shape)}"
        raise ValueError(f"expected codes [N, D] and 1 to N components, found {found}: choose fewer.")
    fitted = GaussianMixture(num_components, random_state=seed, max_iter=200).fit(codes.detach().cpu().double().numpy())
    weights, loc, covariance = (
        torch.from_numpy(part).to(codes) for part in (fitted.weights_, fitted.means_, fitted.covariances_)
    )
    components = dist.MultivariateNormal(loc, covariance)
    return dist.MixtureSameFamily(dist.Categorical(weights / weights.sum()), components)


# -------------------------------------------------------------------------------------------------------------- holes


def ball_sites(codes: Tensor, num_sites: int = 2000, share: float = 0.99, seed: int = 0) -> Tensor:
    """Points spread evenly over the ball, around the mean code, that holds the given share of the codes.

    Args:
        codes: [N, D].
        num_sites: how many.
        share: of the codes inside the ball, above 0 and at most 1.
        seed: seed of the points.

    Returns:
        [num_sites, D] float64 on the device of the codes.
    """
    generator = torch.Generator().manual_seed(seed)
    inside = ball(codes, share)
    direction = torch.randn(num_sites, codes.shape[1], generator=generator, dtype=torch.float64)
    length = torch.rand(num_sites, 1, generator=generator, dtype=torch.float64) ** (1 / codes.shape[1])
    unit = torch.nn.functional.normalize(direction, dim=1) * length
    return inside.centre + inside.radius * unit.to(codes.device)


def gap_statistic(codes: Tensor, sites: Tensor, radius: float, *, policy: str = "") -> Estimate:
    r"""The share of sites in z that no code comes near: holes, whose decoded x nothing has taught.

    .. math:: g_r = \frac 1 S \sum_s 1[\min_n \| s - z_n \| > r]

    Sites from the prior ask whether the prior finds holes; sites over the ball of the codes (:func:`ball_sites`) put
    the same question to an autoencoder, which has no prior: choose r in units of that ball's radius to compare the two.

    Args:
        codes: draws or means of q(z | x), [N, D].
        sites: where to look, [S, D].
        radius: what counts as near, > 0.
        policy: the data policy to carry.

    Returns:
        An estimate with values 0 and 1, [S]; 0 is a code without holes.

    Raises:
        ValueError: radius <= 0, or codes and sites of different sizes.

    Example:
        >>> gap_statistic(torch.zeros(1, 2), torch.tensor([[0.5, 0.0], [2.0, 0.0]]), radius=1.0).mean
        0.5
    """
    if not radius > 0 or codes.ndim != 2 or sites.shape[1:] != codes.shape[1:]:
        found = f"radius {radius}, codes {tuple(codes.shape)}, sites {tuple(sites.shape)}"
        raise ValueError(f"expected a radius > 0, codes [N, D] and sites [S, D], found {found}: change what differs.")
    far = nearest(sites.double(), codes.double(), 1)[0][:, 0] > radius
    method = f"no code within {radius:.3g}"
    return Estimate(
        "gaps", far.double(), 0, policy, torch.zeros(len(far)).double(), method=method, units="of the sites"
    )
