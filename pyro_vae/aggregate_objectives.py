r"""Objectives changed on purpose: what the aggregate posterior q(z) shall be, independent, uncorrelated, or the prior.

None of them is the ELBO; :func:`pyro_vae.fit` logs the true one beside them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pyro_vae.aggregate_terms import Estimator, aggregate_terms, draws, mmd, moments, prior_draws, trace_data
from pyro_vae.objectives import Objective
from pyro_vae.schedules import Weight, check_weight
from pyro_vae.terms import Program, Terms


@dataclass(frozen=True)
class BetaTC(Objective):
    r"""The ELBO with the three parts of its KL weighted apart: information, total correlation, dimensions.

    .. math:: \mathbb E_{q(z|x)} \log p(x|z) - \alpha \, I_q(x; z) - \beta \, \mathrm{KL}\Big(q(z) \,\Big\|\,
        \prod_d q(z_d)\Big) - \gamma \sum_d \mathrm{KL}(q(z_d) \,\|\, p(z_d))

    With all weights equal the aggregate posterior q(z) cancels: 1, 1, 1 is the ELBO, draw by draw. Otherwise it has to
    be estimated; :func:`pyro_vae.aggregate_terms.aggregate_terms` has the three estimators and their biases. ``exact``
    over a ``dataset`` has none. Over the batch alone, and with ``mws`` and ``mss``, the reported value is biased and
    only the gradient means something; the ELBO that ``fit`` logs beside it does not use q(z).

    Args:
        alpha: weight of the mutual information, >= 0.
        beta: weight of the total correlation, >= 0, or a schedule.
        gamma: weight of the dimension-wise KL, >= 0.
        estimator: "exact" (over ``dataset``, or over the batch), "mws" (the published choice) or "mss".
        num_examples: N, the size of the data set, for "mws" and "mss".
        dataset: all examples, [N, *E], encoded anew at each step, for "exact".
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better; meaningful as a mean over examples.

    Raises:
        ValueError: a weight < 0; num_examples missing; a posterior that does not factorise; several latent sites.

    Source: Chen et al. (2018), Isolating sources of disentanglement in variational autoencoders, arXiv:1802.04942.

    Example:
        >>> BetaTC(beta=6.0)
        BetaTC(num_particles=1, alpha=1.0, beta=6.0, gamma=1.0, estimator='exact', num_examples=None)
    """

    num_particles: int = 1
    alpha: float = 1.0
    beta: Weight = 6.0
    gamma: float = 1.0
    estimator: Estimator = "exact"
    num_examples: int | None = None
    dataset: Tensor | None = field(default=None, repr=False, compare=False)

    formula = (
        r"\mathbb{E}_{q(z|x)} \log p(x|z) - \alpha I_q(x; z) - \beta \mathrm{KL}(q(z) \,\|\, \prod_d q(z_d)) "
        r"- \gamma \sum_d \mathrm{KL}(q(z_d) \,\|\, p(z_d))"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "gamma"):
            check_weight(name, getattr(self, name))
        if self.estimator not in ("exact", "mws", "mss"):
            raise ValueError(f"expected the estimator 'exact', 'mws' or 'mss', found {self.estimator!r}.")
        if self.estimator != "exact" and self.dataset is not None:
            raise ValueError(f"expected estimator='exact' with a dataset, found {self.estimator!r}: leave one out.")
        if self.estimator != "exact" and (self.num_examples is None or self.num_examples < 1):
            raise ValueError(
                f"expected num_examples >= 1 for the estimator {self.estimator!r}, found {self.num_examples}: give the "
                "size of the data set."
            )

    @property
    def is_bound(self) -> bool:
        """With all weights 1."""
        return self.alpha == self.beta == self.gamma == 1

    @property
    def is_tight(self) -> bool:
        """With all weights 1."""
        return self.is_bound

    @property
    def mixes_examples(self) -> bool:
        """Unless all weights are equal."""
        return not self.alpha == self.beta == self.gamma

    def draw(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """Draw the terms, and trace the guide on all of the data if they were given."""
        terms = super().draw(model, guide, *args, **kwargs)
        return terms if self.dataset is None else terms._replace(data_guide=trace_data(guide, self.dataset))

    def combine(self, terms: Terms) -> Tensor:
        """The mean reconstruction less the three weighted parts."""
        if self.alpha == self.beta == self.gamma:  # no aggregate posterior is needed, and no factorising one
            return (terms.log_px - self.alpha * (terms.log_qz - terms.log_pz)).mean(0)
        log_qz, log_qz_factors = aggregate_terms(terms, self.estimator, self.num_examples, terms.data_guide)
        assert log_qz_factors is not None
        information = self.alpha * (terms.log_qz - log_qz)
        correlation = self.weigh(self.beta) * (log_qz - log_qz_factors)
        dimensions = self.gamma * (log_qz_factors - terms.log_pz)
        return (terms.log_px - information - correlation - dimensions).mean(0)


@dataclass(frozen=True)
class DIP(Objective):
    r"""The ELBO, and an aggregate posterior whose covariance is drawn to the identity.

    .. math:: \mathrm{ELBO}(x) - \lambda_o \sum_{i \ne j} C_{ij}^2 - \lambda_d \sum_i (C_{ii} - 1)^2, \qquad
        C = \operatorname{Cov}_x(\mathbb E_{q(z|x)} z) \ \text{(I)}, \quad
        C = \operatorname{Cov}_{q(z)}(z) = \mathbb E_x \operatorname{Cov}_{q(z|x)}(z) + \operatorname{Cov}_x(\mathbb E_{
        q(z|x)} z) \ \text{(II)}

    The covariances over x are those of the batch. Being at most the ELBO, it is a lower bound.

    Args:
        off_diagonal: lambda_o, >= 0.
        diagonal: lambda_d, >= 0; the authors take 10 lambda_o for I and lambda_o for II.
        kind: "I" (of the posterior means) or "II" (of the draws).
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: a weight < 0; the posterior knows no covariance; several latent sites.

    Source: Kumar, Sattigeri, Balakrishnan (2018), Variational inference of disentangled latent concepts from unlabeled
        observations, arXiv:1711.00848.

    Example:
        >>> DIP(off_diagonal=10.0, diagonal=10.0, kind="II")
        DIP(num_particles=1, off_diagonal=10.0, diagonal=10.0, kind='II')
    """

    num_particles: int = 1
    off_diagonal: float = 10.0
    diagonal: float = 10.0
    kind: Literal["I", "II"] = "II"

    formula = r"\mathbb{E}_{q(z|x)} \log w - \lambda_o \sum_{i \ne j} C_{ij}^2 - \lambda_d \sum_i (C_{ii} - 1)^2"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("off_diagonal", self.off_diagonal)
        check_weight("diagonal", self.diagonal)
        if self.kind not in ("I", "II"):
            raise ValueError(f"expected kind 'I' or 'II', found {self.kind!r}.")

    @property
    def is_tight(self) -> bool:
        """Without penalty only."""
        return self.off_diagonal == self.diagonal == 0

    @property
    def mixes_examples(self) -> bool:
        """The covariance is that of the batch."""
        return not self.is_tight

    def combine(self, terms: Terms) -> Tensor:
        """The mean log-weight less the penalty, the same for each example."""
        mean, covariance = moments(terms)
        centred = mean - mean.mean(0)
        total = centred.T @ centred / len(centred)
        if self.kind == "II":
            total = total + covariance.mean(0)
        diagonal = total.diagonal()
        off = total.square().sum() - diagonal.square().sum()
        penalty = self.off_diagonal * off + self.diagonal * (diagonal - 1).square().sum()
        return terms.log_w.mean(0) - penalty


@dataclass(frozen=True)
class InfoVAE(Objective):
    r"""Reconstruction, less of the KL, and the distance of the aggregate posterior from the prior.

    .. math:: \mathbb E_{q(z|x)} \log p(x|z) - (1 - \alpha) \, \mathrm{KL}(q(z|x) \,\|\, p(z)) -
        (\alpha + \lambda - 1) \, \mathrm{MMD}^2(q(z), p(z))

    alpha = 0, lambda = 1 is the ELBO; alpha = 1 has no KL, so that information about x costs nothing (MMD-VAE). The
    distance is between the batch's draws and as many of the prior.

    Args:
        alpha: how much of the information cost is taken away.
        weight: lambda, with alpha + lambda >= 1.
        kernel: "multiquadric" or "gaussian"; see :func:`pyro_vae.aggregate_terms.mmd`.
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: alpha + weight < 1; several latent sites; a trained prior without ``rsample``.

    Source: Zhao, Song, Ermon (2019), InfoVAE: balancing learning and inference in variational autoencoders,
        arXiv:1706.02262.

    Example:
        >>> InfoVAE(alpha=1.0, weight=10.0)
        InfoVAE(num_particles=1, alpha=1.0, weight=10.0, kernel='gaussian')
    """

    num_particles: int = 1
    alpha: float = 1.0
    weight: float = 10.0
    kernel: Literal["multiquadric", "gaussian"] = "gaussian"

    formula = (
        r"\mathbb{E}_{q(z|x)} \log p(x|z) - (1 - \alpha) \mathrm{KL}(q(z|x) \,\|\, p(z)) "
        r"- (\alpha + \lambda - 1) \mathrm{MMD}^2(q(z), p(z))"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha + self.weight >= 1:
            raise ValueError(
                f"expected alpha + weight >= 1, found {self.alpha} + {self.weight}: it weights a distance."
            )
        _check_kernel(self.kernel)

    @property
    def is_bound(self) -> bool:
        """At alpha = 0, weight = 1 only, where it is the ELBO."""
        return self.alpha == 0 and self.weight == 1

    @property
    def is_tight(self) -> bool:
        """At alpha = 0, weight = 1."""
        return self.is_bound

    @property
    def mixes_examples(self) -> bool:
        """The distance is that of the batch."""
        return self.alpha + self.weight != 1

    def combine(self, terms: Terms) -> Tensor:
        """The mean reconstruction less KL and distance, each weighted."""
        distance = mmd(draws(terms), prior_draws(terms), self.kernel)
        divergence = terms.log_qz - terms.log_pz
        return (terms.log_px - (1 - self.alpha) * divergence - (self.alpha + self.weight - 1) * distance).mean(0)


@dataclass(frozen=True)
class WAE(Objective):
    r"""The Wasserstein autoencoder: reconstruction, and an aggregate posterior close to the prior.

    .. math:: \mathbb E_{q(z|x)} \log p(x|z) - \lambda \, \mathrm{MMD}^2(q(z), p(z))

    The cost of transport is -log p(x|z) (a squared distance for a normal likelihood). No KL, so point encoders serve as
    well.

    Args:
        weight: lambda, >= 0, or a schedule.
        kernel: "multiquadric" or "gaussian"; see :func:`pyro_vae.aggregate_terms.mmd`.
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better; no bound.

    Raises:
        ValueError: weight < 0; several latent sites; a trained prior without ``rsample``.

    Source: Tolstikhin et al. (2018), Wasserstein auto-encoders, arXiv:1711.01558 (WAE-MMD).

    Example:
        >>> WAE(weight=10.0)
        WAE(num_particles=1, weight=10.0, kernel='multiquadric')
    """

    num_particles: int = 1
    weight: Weight = 10.0
    kernel: Literal["multiquadric", "gaussian"] = "multiquadric"

    formula = r"\mathbb{E}_{q(z|x)} \log p(x|z) - \lambda \, \mathrm{MMD}^2(q(z), p(z))"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("weight", self.weight)
        _check_kernel(self.kernel)

    @property
    def is_bound(self) -> bool:
        """Never: there is no KL."""
        return False

    @property
    def is_tight(self) -> bool:
        """Never."""
        return False

    @property
    def mixes_examples(self) -> bool:
        """The distance is that of the batch."""
        return True

    def combine(self, terms: Terms) -> Tensor:
        """The mean reconstruction less the weighted distance."""
        distance = mmd(draws(terms), prior_draws(terms), self.kernel)
        return (terms.log_px - self.weigh(self.weight) * distance).mean(0)


def _check_kernel(kernel: str) -> None:
    if kernel not in ("multiquadric", "gaussian"):
        raise ValueError(f"expected the kernel 'multiquadric' or 'gaussian', found {kernel!r}.")
