r"""What a printed loss is: a distance and a latent loss with weights, and the Pyro model that it really belongs to.

.. math:: \mathrm{loss}(x) = w_x \sum_i \mathrm{distance}(x_i, \hat x_i) + w_z \sum_j \mathrm{latent}(m_j, s_j), \qquad
    \hat x = \mathbb E[x \mid z], \quad z \sim q(z \mid x) = \mathcal N(m, \operatorname{diag} s^2)

The losses themselves are in :mod:`pyro_vae.wrong_losses`.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.objectives import Objective
from pyro_vae.terms import Terms


class Equivalent(NamedTuple):
    """A Pyro model and guide whose ELBO is a printed loss: ``bound = factor * ELBO + constant``, nats per example.

    The ELBO is the one with the analytic KL (``pyro.infer.TraceMeanField_ELBO``); z is drawn as the loss draws it, so
    values and gradients agree draw by draw, not only on average.
    """

    model: Callable[[Tensor], Any]
    guide: Callable[[Tensor], Any]
    factor: float
    constant: float


@dataclass(frozen=True)
class PrintedLoss(Objective):
    r"""A loss in the words of a post; minus it is what ``bound`` returns, so it goes wherever objectives go.

    .. math:: \mathrm{bound}(x) = -w_x \sum_i \mathrm{distance}(x_i, \hat x_i) - w_z \sum_j \mathrm{latent}(m_j, s_j)

    For a model with one observed site and one latent site whose guide is a diagonal normal. A loss that the post
    averages over the batch is scaled back to a sum over examples, as in Pyro: that changes no minimum.

    Args:
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example if one takes the loss at its word, higher is better; no bound.

    Raises:
        ValueError: num_particles < 1, several sites, or a guide that is no diagonal normal.
    """

    post: ClassVar[str] = ""
    """Where it is printed."""

    wrong: ClassVar[str] = ""
    """What is wrong with it."""

    really: ClassVar[str] = ""
    """What it optimises, taken at its word."""

    prior_scale: ClassVar[float] = 1.0
    """Standard deviation of the normal prior that the latent loss belongs to."""

    drops_entropy: ClassVar[bool] = False
    """Whether the latent loss lacks the entropy of q."""

    latent_offset: ClassVar[float] = 0.0
    """Latent loss minus (KL to that prior, plus the entropy where it is dropped), for each latent dimension."""

    @property
    def is_bound(self) -> bool:
        """Never: a weight, a constant or a term is missing."""
        return False

    @property
    def is_tight(self) -> bool:
        """Never."""
        return False

    @staticmethod
    def distance(x: Tensor, x_hat: Tensor) -> Tensor:
        """What is summed over the numbers of x: the squared error, unless overridden."""
        return (x - x_hat).square()

    @staticmethod
    def latent_loss(loc: Tensor, scale: Tensor) -> Tensor:
        """What is summed over the latent dimensions: KL(N(loc, scale^2) || N(0, 1)), unless overridden."""
        return 0.5 * (loc.square() + scale.square() - 1) - scale.log()

    def weights(self, batch_size: int, data_dim: int, latent_dim: int) -> tuple[float, float]:
        """The weights of an example's summed distance and of its summed latent loss; 1 and 1, unless overridden."""
        return 1.0, 1.0

    def effective_beta(self, batch_size: int, data_dim: int, latent_dim: int) -> float:
        """The beta of this loss, in units of its summed distance: weight of the latent loss over that of the distance.

        For squared errors the unit is a decoder with sigma^2 = 1/2, for cross-entropies it is the Bernoulli likelihood.

        Args:
            batch_size: examples a step, B.
            data_dim: numbers of an example, D (pixels).
            latent_dim: latent dimensions, d.
        """
        x_weight, z_weight = self.weights(batch_size, data_dim, latent_dim)
        return z_weight / x_weight if x_weight else math.inf

    def implied_scale(self, batch_size: int, data_dim: int, latent_dim: int) -> float:
        """The decoder's sigma that this loss has at beta = 1, (beta / 2)^(1/2); NaN where there is no such decoder.

        Args:
            batch_size: examples a step, B.
            data_dim: numbers of an example, D (pixels).
            latent_dim: latent dimensions, d.
        """
        if type(self).distance is not PrintedLoss.distance:
            return math.nan
        return math.sqrt(self.effective_beta(batch_size, data_dim, latent_dim) / 2)

    def combine(self, terms: Terms) -> Tensor:
        """Minus the printed loss of each example, from the sites themselves."""
        passes = terms.passes or ((terms.model_trace, terms.guide_trace),)
        num_examples = terms.log_px.shape[-1]
        return -torch.cat([self._losses(*pair, num_examples) for pair in passes]).mean(0)

    def _losses(self, model_trace: Trace, guide_trace: Trace, num_examples: int) -> Tensor:
        """The printed loss of each example in one pass, [K, B]."""
        site, q = _only(model_trace, observed=True), _only(guide_trace, observed=False)["fn"]
        x, p = site["value"], site["fn"]
        base = q.base_dist if isinstance(q, torch.distributions.Independent) else q
        if not isinstance(base, torch.distributions.Normal):
            raise ValueError(
                f"expected a guide with a diagonal normal, found {type(base).__name__}: the posts' latent losses are "
                "functions of its mean and scale; use the encoder DiagonalNormal."
            )
        distance = self.distance(x, p.mean).sum(list(range(-len(p.event_shape), 0)))
        latent = self.latent_loss(base.mean, base.stddev).sum(-1)
        x_weight, z_weight = self.weights(num_examples, p.event_shape.numel(), base.mean.shape[-1])
        return (x_weight * distance + z_weight * latent).reshape(-1, num_examples)

    def equivalent(self, vae: Any, x: Tensor, beta: float | None = None) -> Equivalent:
        """The model and guide of which this loss is the negative ELBO, up to a factor and a constant; exactly.

        Args:
            vae: a model with ``decoder``, ``encoder``, ``prior`` and ``guide``; its parts are used, not copied.
            x: a batch, [B, *E]: only its shape matters.
            beta: for squared errors, the beta to put on the KL, the decoder's variance taking what is left; by default
                sigma^2 = 1/2, and the cross-entropies know only that reading.

        Returns:
            Programs of x, the factor and the constant.

        Raises:
            ValueError: a beta that this loss cannot have.

        Example:
            >>> from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, likelihoods
            >>> from pyro_vae.wrong_losses import AveragedKL
            >>> decoder = Decoder(Mlp(2, 8, 7), likelihoods.Normal())
            >>> vae, x = VAE(StandardNormal(2), decoder, DiagonalNormal(Mlp(7, 8, 4))), torch.ones(5, 7)
            >>> loss, (model, guide, factor, constant) = AveragedKL(), AveragedKL().equivalent(vae, x)
            >>> _ = torch.manual_seed(0)
            >>> printed = loss.bound(vae.model, vae.guide, x).sum()
            >>> _ = torch.manual_seed(0)
            >>> elbo = -pyro.infer.TraceMeanField_ELBO().loss(model, guide, x)
            >>> bool(torch.isclose(printed, torch.tensor(factor * elbo + 5 * constant)))
            True
        """
        (latent_dim,), data_dim = vae.prior().event_shape, x[0].numel()
        x_weight, z_weight = self.weights(len(x), data_dim, latent_dim)
        squared = type(self).distance is PrintedLoss.distance
        if beta is not None and not (squared and beta > 0 and x_weight and z_weight):
            raise ValueError(f"expected no beta of your own for {self!r}, found {beta}: leave it to the loss.")
        if beta is None:
            beta, factor = (z_weight / x_weight, x_weight) if x_weight else (1.0, z_weight)
        else:
            factor = z_weight / beta
        scale = math.sqrt(factor / (2 * x_weight)) if x_weight else 1.0
        constant = 0.0 - z_weight * latent_dim * self.latent_offset
        if squared and x_weight:
            constant += factor * data_dim * math.log(scale * math.sqrt(2 * math.pi))

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                with _weighted(beta):
                    prior = dist.Normal(x.new_zeros(latent_dim), x.new_full((latent_dim,), self.prior_scale))
                    z = pyro.sample("z", prior.to_event(1))
                with _weighted(1.0 if x_weight else 0.0):
                    self.observe(x, vae.decoder(z).mean, scale)

        def guide(x: Tensor) -> None:
            with _weighted(beta):
                vae.guide(x)
                if self.drops_entropy:
                    pyro.factor("entropy", vae.encoder(x).entropy().sum(), has_rsample=True)

        return Equivalent(model, guide, factor, constant)

    @staticmethod
    def observe(x: Tensor, x_hat: Tensor, scale: float) -> None:
        """Score x in a Pyro model whose log-probability is minus the distance: Normal(x_hat, scale), unless overridden.

        Args:
            x: data, [B, *E].
            x_hat: the mean of p(x|z), [B, *E].
            scale: the decoder's standard deviation, for squared errors.
        """
        pyro.sample("x", dist.Normal(x_hat, scale).to_event(x.dim() - 1), obs=x)


def _weighted(weight: float) -> AbstractContextManager[Any]:
    """Count what is inside ``weight`` times; Pyro's scale must be above 0."""
    return poutine.scale(scale=weight) if weight else poutine.mask(mask=False)


def _only(trace: Trace, observed: bool) -> Any:
    """The one observed site of a model's trace, or the one site of a guide's."""
    sites: list[Any] = [s for s in trace.nodes.values() if s["type"] == "sample" and s["is_observed"] == observed]
    if len(sites) != 1:
        raise ValueError(
            f"expected one {'observed' if observed else 'latent'} site, found {[s['name'] for s in sites]}: the posts' "
            "losses are about one x and one z; use ELBO() for other models."
        )
    return sites[0]
