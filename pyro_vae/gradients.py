r"""Better gradients of the same bounds: the value is the bound's, the gradient another estimator of its derivative.

With z = f(eps, phi), the derivative of log w in the guide's parameters phi has two parts,

.. math:: \frac{d}{d\phi} \log w = \underbrace{\frac{\partial \log w}{\partial z} \frac{\partial z}{\partial \phi}}_{
    \text{path}} - \underbrace{\frac{\partial \log q(z|x)}{\partial \phi}}_{\text{score}}

of which the score has mean 0. ``terms.fixed`` depends on parameters directly only, so its derivative in phi is the
score; this holds for hierarchies of latent variables too. A parameter that model and guide share (the encoder inside a
VampPrior) gets its derivative as part of p in full, and this file's as part of q.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_vae.importance import MIWAE, log_mean_exp
from pyro_vae.objectives import Objective
from pyro_vae.terms import Terms


def follow(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one expression with the gradient of another."""
    return value.detach() + (surrogate - surrogate.detach())


def without_score(terms: Terms) -> Tensor:
    """Log w, [K, B], whose gradient leaves out the score of the guide."""
    assert terms.fixed is not None
    return follow(terms.log_w, terms.log_w + terms.fixed.log_qz)


def without_model(terms: Terms) -> Tensor:
    """Log w, [K, B], whose gradient leaves out the model's direct one: what the guide gets, path and score."""
    assert terms.fixed is not None
    return follow(terms.log_w, terms.log_w - terms.fixed.log_px - terms.fixed.log_pz)


@dataclass(frozen=True)
class StickingTheLanding(Objective):
    r"""The ELBO with the gradient that leaves out the score of the guide.

    .. math:: \nabla_\phi \approx \frac 1 K \sum_k \frac{\partial \log w_k}{\partial z_k}
        \frac{\partial z_k}{\partial \phi}

    Unbiased, for the score has mean 0. Where the guide is the exact posterior, log w does not depend on z, and this
    gradient is 0 for every single draw: its noise vanishes as q comes close. Far from there it may be noisier. Model
    and guide run twice.

    Args:
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better; its value is the ELBO's.

    Raises:
        ValueError: num_particles < 1; a guide site has no reparameterised sampler; model or guide are random beyond
            their sites (dropout).

    Source: Roeder, Wu, Duvenaud (2017), Sticking the landing, arXiv:1703.09194.

    Example:
        >>> StickingTheLanding()
        StickingTheLanding(num_particles=1)
    """

    num_particles: int = 1

    formula = r"\mathbb{E}_{q(z|x)}[\log p(x|z) + \log p(z) - \log q_{\bar\phi}(z|x)]"
    fixes_z = True

    def combine(self, terms: Terms) -> Tensor:
        """The mean log-weight, without the score."""
        return without_score(terms).mean(0)


@dataclass(frozen=True)
class DReG(Objective):
    r"""The importance-weighted (or Rényi) bound with doubly reparameterised gradients.

    .. math:: \nabla_\phi \approx \sum_k \big(\alpha \tilde w_k + (1 - \alpha) \tilde w_k^2\big)
        \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}, \qquad
        \nabla_\theta = \sum_k \tilde w_k \frac{\partial \log p(x, z_k)}{\partial \theta}, \qquad
        \tilde w_k \propto w_k^{1 - \alpha}

    The score of the guide is reparameterised once more. Unbiased for the bound's derivative; the encoder's signal no
    longer drowns as K grows, and is 0 for every draw where the guide is the exact posterior. alpha = 0 is the IWAE
    bound, alpha = 1 the ELBO with :class:`StickingTheLanding`.

    Args:
        num_particles: number K of draws of z for each example.
        alpha: order of the Rényi bound, 0 for IWAE.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better; its value is that of ``IWAE`` or ``Renyi``.

    Raises:
        ValueError: alpha not finite; num_particles < 1; a guide site has no reparameterised sampler; model or guide
            are random beyond their sites (dropout).

    Source: Tucker et al. (2019), Doubly reparameterized gradient estimators for Monte Carlo objectives,
        arXiv:1810.04152.

    Example:
        >>> DReG(num_particles=50)
        DReG(num_particles=50, alpha=0.0)
    """

    num_particles: int = 50
    alpha: float = 0.0

    formula = r"\mathbb{E}_{z_{1:K} \sim q(z|x)} \log \frac{1}{K} \sum_k \frac{p(x, z_k)}{q(z_k|x)}"
    fixes_z = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise ValueError(f"expected a finite alpha, found {self.alpha}.")

    @property
    def is_bound(self) -> bool:
        """For alpha >= 0."""
        return self.alpha >= 0

    def combine(self, terms: Terms) -> Tensor:
        """The bound, with the path weighted by squared weights and the model by plain ones."""
        assert terms.fixed is not None
        weight = ((1 - self.alpha) * terms.log_w).softmax(0).detach()
        of_path = self.alpha * weight + (1 - self.alpha) * weight**2
        of_model = (weight - of_path) * (terms.fixed.log_px + terms.fixed.log_pz)
        return follow(log_mean_exp(terms.log_w, 1 - self.alpha), (of_path * without_score(terms) + of_model).sum(0))


@dataclass(frozen=True)
class PIWAE(MIWAE):
    r"""The model learns from the IWAE bound of all M K draws, the guide from their MIWAE bound.

    .. math:: \nabla_\theta \, \mathrm{IWAE}_{MK}(x), \qquad \nabla_\phi \, \mathrm{MIWAE}_{M,K}(x)

    Its value is the IWAE bound. A parameter that model and guide share (the encoder inside a VampPrior) gets the sum:
    as part of p from the first, as part of q from the second.

    Args:
        num_particles: number K of draws in each of the guide's bounds.
        num_outer: number M of them; M K draws are made for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: num_particles or num_outer < 1, or a guide site has no reparameterised sampler.

    Source: Rainforth et al. (2018), Tighter variational bounds are not necessarily better, arXiv:1802.04537.

    Example:
        >>> PIWAE(num_particles=8, num_outer=8)
        PIWAE(num_particles=8, num_outer=8)
    """

    num_particles: int = 8
    num_outer: int = 8

    formula = (
        r"\theta: \mathbb{E} \log \frac{1}{MK} \sum_{m,k} w_{mk}, \quad "
        r"\phi: \frac{1}{M} \sum_m \mathbb{E} \log \frac{1}{K} \sum_k w_{mk}"
    )
    fixes_z = True

    def combine(self, terms: Terms) -> Tensor:
        """The IWAE bound; the guide's gradient is that of MIWAE."""
        assert terms.fixed is not None
        of_model = (terms.log_w.softmax(0).detach() * (terms.fixed.log_px + terms.fixed.log_pz)).sum(0)
        guide_only = without_model(terms).unflatten(0, (self.num_outer, -1)).transpose(0, 1)
        return follow(log_mean_exp(terms.log_w), of_model + log_mean_exp(guide_only).mean(0))


@dataclass(frozen=True)
class ScoreFunction(Objective):
    r"""The ELBO with the score-function gradient (REINFORCE): for guides without ``rsample``, such as discrete ones.

    .. math:: \nabla_\phi \approx \frac 1 K \sum_k (\log w_k - b_k) \, \nabla_\phi \log q(z_k|x), \qquad
        \nabla_\theta = \frac 1 K \sum_k \nabla_\theta \log p(x, z_k)

    Unbiased for any guide whose density can be differentiated, and noisy: the baseline b matters. It is taken from
    other draws, so that it does not bias: the mean log w of the example's other particles (``particles``, K >= 2), of
    the batch's other examples (``examples``), a number, or 0 (``none``). ``auto`` takes particles if there are several
    and else examples. Gradients do not flow through z, also where they could.

    Args:
        num_particles: number K of draws of z for each example.
        baseline: which baseline.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better; its value is the ELBO's.

    Raises:
        ValueError: num_particles < 1, or another baseline.

    Source: Williams (1992), Simple statistical gradient-following algorithms; Mnih, Gregor (2014), Neural variational
        inference and learning, arXiv:1402.0030; Kool et al. (2019), Buy 4 REINFORCE samples, get a baseline for free!

    Example:
        >>> ScoreFunction(num_particles=8)
        ScoreFunction(num_particles=8, baseline='auto')
    """

    num_particles: int = 8
    baseline: Literal["auto", "particles", "examples", "none"] | float = "auto"

    formula = r"\mathbb{E}_{q(z|x)}[\log p(x|z) + \log p(z) - \log q(z|x)]"
    reparameterised = False

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("auto", "particles", "examples", "none")
        if self.baseline not in names and (isinstance(self.baseline, bool | str) or not math.isfinite(self.baseline)):
            raise ValueError(f"expected a baseline among {', '.join(names)}, or a number, found {self.baseline!r}.")
        if self.baseline == "particles" and self.num_particles == 1:
            raise ValueError(
                "expected num_particles >= 2 for the baseline 'particles', found 1: raise it, or 'examples'."
            )

    def combine(self, terms: Terms) -> Tensor:
        """The mean log-weight; each score is weighted by how far log w lies above the baseline."""
        advantage = (terms.log_w - self._baseline(terms.log_w)).detach()
        return follow(terms.log_w, terms.log_px + terms.log_pz + advantage * terms.log_qz).mean(0)

    def _baseline(self, log_w: Tensor) -> Tensor | float:
        if not isinstance(self.baseline, str):
            return self.baseline
        axis = {"auto": 0 if len(log_w) > 1 else 1, "particles": 0, "examples": 1}.get(self.baseline)
        if axis is None or log_w.shape[axis] == 1:
            return 0.0
        return (log_w.sum(axis, keepdim=True) - log_w) / (log_w.shape[axis] - 1)


@dataclass(frozen=True)
class VIMCO(Objective):
    r"""The importance-weighted bound with a score-function gradient: for guides without ``rsample``.

    .. math:: \nabla \approx \sum_k (\hat L - \hat L_{-k}) \, \nabla \log q(z_k|x) +
        \sum_k \tilde w_k \nabla \log \frac{p(x, z_k)}{q(z_k|x)}

    L is the bound's estimate and L_{-k} the same with log w_k replaced by the mean of the others, so that each draw is
    judged by what it adds. Unbiased.

    Args:
        num_particles: number K >= 2 of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better; its value is that of ``IWAE``.

    Raises:
        ValueError: num_particles < 2.

    Source: Mnih, Rezende (2016), Variational inference for Monte Carlo objectives, arXiv:1602.06725.

    Example:
        >>> VIMCO(num_particles=8)
        VIMCO(num_particles=8)
    """

    num_particles: int = 8

    formula = r"\mathbb{E}_{z_{1:K} \sim q(z|x)} \log \frac{1}{K} \sum_k \frac{p(x, z_k)}{q(z_k|x)}"
    reparameterised = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_particles == 1:
            raise ValueError("expected num_particles >= 2, found 1: the baseline is made of the other draws.")

    def combine(self, terms: Terms) -> Tensor:
        """The logarithm of the mean weight; each score is weighted by what its draw adds to it."""
        log_w = terms.log_w.detach()
        count = len(log_w)
        value = log_mean_exp(log_w)
        others = (log_w.sum(0) - log_w) / (count - 1)
        own = torch.eye(count, dtype=torch.bool, device=log_w.device).reshape(count, count, *[1] * (log_w.dim() - 1))
        without = log_mean_exp(torch.where(own, others.unsqueeze(0), log_w.unsqueeze(1)))
        surrogate = (value - without) * terms.log_qz + log_w.softmax(0) * terms.log_w
        return follow(value, surrogate.sum(0))
