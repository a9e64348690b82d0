r"""Objectives: each a bound, one line on the terms of the ELBO. Then here.

With log w = log p(x|z) + log p(z) - log q(z|x), [K, B], from :func:`pyro_vae.draw`: ``log_w.mean(0)`` is the ELBO,
``log_w.logsumexp(0) - log(K)`` the importance-weighted bound. An objective of your own is a subclass with ``combine``.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.infer
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.schedules import Weight, check_weight
from pyro_vae.terms import Program, Terms, check_num_particles, draw


@dataclass(frozen=True)
class Objective(pyro.infer.ELBO):
    """What a bound is: a small description that turns :class:`Terms` into nats per example.

    A subclass gives ``combine`` and ``formula``; everything else is here, once. It is a ``pyro.infer.ELBO``, so it goes
    wherever Pyro's own do: ``SVI(model, guide, optim, loss=IWAE(num_particles=50))``. The value of ``combine`` is the
    objective, its gradient the estimator; an estimator that needs more than the terms says so by ``reparameterised``
    and ``fixes_z``. The steps taken are counted beside the fields: schedules look there (:meth:`weigh`).

    Args:
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop (slower, less memory, any network).
        max_plate_nesting: the largest number of nested plates in model and guide.
    """

    num_particles: int = field(default=1, kw_only=True)
    vectorize_particles: bool = field(default=True, repr=False, kw_only=True)
    max_plate_nesting: int = field(default=1, repr=False, kw_only=True)

    formula: ClassVar[str] = ""
    """The bound in LaTeX."""
    reparameterised: ClassVar[bool] = True
    """Whether gradients flow through z; False: z is drawn without its gradient, from any guide."""
    fixes_z: ClassVar[bool] = False
    """Whether ``combine`` reads ``terms.fixed``, the terms scored once more at the same z held fixed."""

    def __post_init__(self) -> None:
        check_num_particles(self.num_particles)

    @property
    def is_bound(self) -> bool:
        """Whether its expectation is at most log p(x) (given a normalised likelihood)."""
        return True

    @property
    def is_tight(self) -> bool:
        """Whether it equals log p(x) when the guide is the exact posterior."""
        return True

    @property
    def mixes_examples(self) -> bool:
        """Whether the value for one example depends on the others of its batch."""
        return False

    @property
    def num_draws(self) -> int:
        """How many draws of z it takes for each example."""
        return self.num_particles

    @property
    def step(self) -> Tensor:
        """How many optimisation steps were taken: a 0-d tensor, changed in place; not a field."""
        if "_step" not in vars(self):
            object.__setattr__(self, "_step", torch.zeros((), dtype=torch.int64))
        return vars(self)["_step"]

    def at_step(self, step: int, device: torch.device | str | None = None) -> None:
        """Set the number of steps taken (what :func:`pyro_vae.fit` does before each step).

        Args:
            step: the number.
            device: where the counter shall be; by default where it is.
        """
        if device is not None and self.step.device != torch.device(device):
            object.__setattr__(self, "_step", self.step.to(device))
        self.step.fill_(step)

    def advance(self) -> None:
        """Count one optimisation step; ``loss_and_grads`` does."""
        self.step.add_(1)

    def weigh(self, weight: Weight) -> Tensor | float:
        """A weight at the present step: the number itself, or what the schedule gives."""
        return weight(self.step) if callable(weight) else weight

    @abstractmethod
    def combine(self, terms: Terms) -> Tensor:
        """The objective from its terms: [B], nats per example, higher is better."""

    def draw(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """Draw the terms with this objective's particles; see :func:`draw`."""
        return draw(
            model,
            guide,
            *args,
            num_particles=self.num_draws,
            vectorize_particles=self.vectorize_particles,
            max_plate_nesting=self.max_plate_nesting,
            reparameterised=self.reparameterised,
            fixes_z=self.fixes_z,
            **kwargs,
        )

    def bound(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The objective of each example, [B], nats, higher is better; differentiable."""
        return self.combine(self.draw(model, guide, *args, **kwargs))

    def loss_of(self, terms: Terms) -> Tensor:
        """The scalar to minimise: minus the objective, summed over the examples with their scale.

        The one place where a bound is negated.
        """
        if self.step.device != terms.log_px.device:  # once, before anything is captured
            object.__setattr__(self, "_step", self.step.to(terms.log_px.device))
        return -(terms.scale * self.combine(terms)).sum()

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a differentiable scalar (what ``objective(model, guide)(x)`` returns)."""
        return self.loss_of(self.draw(model, guide, *args, **kwargs))

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss without gradients (what ``SVI.evaluate_loss`` reads)."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, its gradients added to the parameters (what ``SVI.step`` calls); counts one step."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        self.advance()
        return loss.detach()

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        terms = self.draw(model, guide, *args, **kwargs)
        return terms.model_trace, terms.guide_trace


@dataclass(frozen=True)
class ELBO(Objective):
    r"""The evidence lower bound.

    .. math:: \mathrm{ELBO}(x) = \mathbb E_{z \sim q(z|x)} [\log p(x, z) - \log q(z \mid x)] \le \log p(x)

    The gap is KL(q(z|x) || p(z|x)). More particles lower the variance of the estimate and its gradient, not the gap.

    Args:
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: num_particles < 1, or a guide site has no reparameterised sampler.

    Source: Kingma, Welling (2014), section 2.2, arXiv:1312.6114.

    Example:
        >>> ELBO()
        ELBO(num_particles=1)
    """

    num_particles: int = 1

    formula = r"\mathbb{E}_{q(z|x)}[\log p(x|z) + \log p(z) - \log q(z|x)]"

    def combine(self, terms: Terms) -> Tensor:
        """The mean log-weight."""
        return terms.log_w.mean(0)


@dataclass(frozen=True)
class IWAE(Objective):
    r"""Importance-weighted lower bound on the log-evidence.

    .. math:: \mathrm{IWAE}_K(x) = \mathbb{E}_{z_{1:K} \sim q(z|x)} \log \tfrac{1}{K} \sum_k \frac{p(x, z_k)}{q(z_k|x)}
        \le \log p(x)

    K = 1 is the ELBO; the bound grows with K and tends to log p(x). Example by example: right under subsampled plates
    and ``poutine.scale``, where ``pyro.infer.RenyiELBO`` puts the scale inside the logarithm.

    Args:
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: num_particles < 1, or a guide site has no reparameterised sampler.

    Source: Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders, L_k in section 3, arXiv:1509.00519.

    Example:
        >>> IWAE(num_particles=50)
        IWAE(num_particles=50)
    """

    num_particles: int = 50

    formula = r"\mathbb{E}_{z_{1:K} \sim q(z|x)} \log \frac{1}{K} \sum_k \frac{p(x, z_k)}{q(z_k|x)}"

    def combine(self, terms: Terms) -> Tensor:
        """The logarithm of the mean weight."""
        return terms.log_w.logsumexp(0) - math.log(len(terms.log_w))


@dataclass(frozen=True)
class Beta(Objective):
    r"""The ELBO with the KL weighted by beta.

    .. math:: \mathbb E_{q(z|x)} [\log p(x \mid z) - \beta (\log q(z \mid x) - \log p(z))]

    beta = 1 is the ELBO. beta > 1 is still a lower bound on log p(x), a looser one; beta < 1 is none. With a schedule
    (:mod:`pyro_vae.schedules`) the weight changes from step to step, such as KL warm-up: ``Beta(beta=Linear(1000))``.

    Args:
        beta: weight of the KL, >= 0, or a schedule of it.
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: beta < 0, num_particles < 1, or a guide site has no reparameterised sampler.

    Source: Higgins et al. (2017), beta-VAE, https://openreview.net/forum?id=Sy2fzU9gl.

    Example:
        >>> Beta(beta=4.0)
        Beta(num_particles=1, beta=4.0)
    """

    beta: Weight = 1.0

    formula = r"\mathbb{E}_{q(z|x)}[\log p(x|z) - \beta (\log q(z|x) - \log p(z))]"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("beta", self.beta)

    @property
    def is_bound(self) -> bool:
        """For a number beta >= 1."""
        return not callable(self.beta) and self.beta >= 1

    @property
    def is_tight(self) -> bool:
        """For beta = 1."""
        return self.beta == 1

    def combine(self, terms: Terms) -> Tensor:
        """The weighted mean of the terms."""
        return (terms.log_px - self.weigh(self.beta) * (terms.log_qz - terms.log_pz)).mean(0)
