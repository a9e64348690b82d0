r"""Losses as well-known posts print them, trainable, each with the Pyro model that it really belongs to.

.. math:: \mathrm{loss}(x) = w_x \sum_i \mathrm{distance}(x_i, \hat x_i) + w_z \sum_j \mathrm{latent}(m_j, s_j), \qquad
    \hat x = \mathbb E[x \mid z], \quad z \sim q(z \mid x) = \mathcal N(m, \operatorname{diag} s^2)

Sum or mean, weight, beta and the decoder's variance are one knob. For squared errors (SSE), whatever beta > 0 is named,

.. math:: w_x \, \mathrm{SSE} + w_z \, \mathrm{KL} = \frac{w_z}{\beta} \left( \frac{\mathrm{SSE}}{2 \sigma^2}
    + \beta \, \mathrm{KL} \right) \qquad \text{with} \quad \sigma^2 = \frac{w_z}{2 \beta w_x}

None of these is a bound on log p(x); train with ``ELBO()`` and a normalised likelihood instead.
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

_EPSILON = 1e-7  # Keras keeps predictions this far from 0 and 1 inside its cross-entropy


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


@dataclass(frozen=True)
class SummedSquares(PrintedLoss):
    r"""Sum of squared errors plus KL: consistent, with a decoder variance that nobody chose.

    .. math:: w_x \sum_i (x_i - \hat x_i)^2 + w_z \sum_j \tfrac 1 2 (m_j^2 + s_j^2 - 1 - \ln s_j^2)

    With both weights 1 it is minus the ELBO of Normal(x_hat, sigma^2 = 1/2), without the constant (D/2) ln pi.

    Args:
        x_weight: weight of the squared error.
        z_weight: weight of the KL.

    Source: Rybkin, Daniilidis, Levine (2021), Simple and effective VAE training with calibrated decoders,
        arXiv:2006.13202, on the variance that such a loss implies.

    Example:
        >>> SummedSquares(x_weight=0.5, z_weight=2.0).effective_beta(batch_size=128, data_dim=784, latent_dim=2)
        4.0
    """

    x_weight: float = 1.0
    z_weight: float = 1.0

    post = "none: the consistent form"
    formula = r"\sum_i (x_i - \hat{x}_i)^2 + \mathrm{KL}(q(z|x) \,\|\, p(z))"
    wrong = "nothing but a hidden choice: sigma^2 = 1/2 whatever the data's unit, and no constant"
    really = "the ELBO of Normal(x_hat, sigma = 0.7071)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.x_weight >= 0 and self.z_weight >= 0 and self.x_weight + self.z_weight > 0):
            raise ValueError(
                f"expected weights >= 0, one of them > 0, found x_weight={self.x_weight}, z_weight={self.z_weight}."
            )

    def weights(self, batch_size: int, data_dim: int, latent_dim: int) -> tuple[float, float]:
        """As given."""
        return self.x_weight, self.z_weight


@dataclass(frozen=True)
class EntropyDropped(PrintedLoss):
    r"""Squared errors plus a latent loss without -ln s^2 and -1.

    .. math:: \sum_i (x_i - \hat x_i)^2 + \tfrac 1 2 \sum_j (m_j^2 + s_j^2)

    The latent loss is the cross-entropy from q to N(0, I) less (d/2) ln 2 pi: the KL with the entropy of q dropped. Its
    derivative in s is s, not s - 1/s, so nothing keeps the noise up: s goes to 0 and an autoencoder with an L2 penalty
    on its codes is left.

    Source: kvfrans, Variational Autoencoders Explained (2016): the "simplified" latent loss of the text; the code
        beside it has the full KL.
    """

    post = "kvfrans, as simplified in the text"
    formula = r"\sum_i (x_i - \hat{x}_i)^2 + \frac{1}{2} \sum_j (m_j^2 + s_j^2)"
    wrong = "-ln s^2 - 1 is missing from the KL: the entropy of q"
    really = "E_q[log p(x, z)]: a plain autoencoder with an L2 penalty on codes (s -> 0, no noise, no bound)"
    drops_entropy = True
    latent_offset = -0.5 * math.log(2 * math.pi)

    @staticmethod
    def latent_loss(loc: Tensor, scale: Tensor) -> Tensor:
        """Half the squares."""
        return 0.5 * (loc.square() + scale.square())


@dataclass(frozen=True)
class MeanSquares(PrintedLoss):
    r"""Squared error averaged over batch and pixels, KL summed over both.

    .. math:: \frac{1}{B D} \sum_{b, i} (x_{bi} - \hat x_{bi})^2 + \sum_b \mathrm{KL}_b

    Multiplied through: beta = B D for summed squares, a decoder with sigma^2 = B D / 2 (sigma = 198 for 100 images of
    784 pixels between 0 and 1). Nothing is worth encoding: the KL goes to 0 and every input gets the mean image.

    Source: kvfrans, Variational Autoencoders Explained (2016): the loss of the text; the code beside it sums both.
    """

    post = "kvfrans, as printed in the text"
    formula = r"\frac{1}{B D} \sum_{b,i} (x_{bi} - \hat{x}_{bi})^2 + \sum_b \mathrm{KL}_b"
    wrong = "a mean over batch and pixels is added to a sum over batch and latent dimensions"
    really = "beta = B D: a decoder with sigma = (B D / 2)^(1/2), for which all images are alike"

    def weights(self, batch_size: int, data_dim: int, latent_dim: int) -> tuple[float, float]:
        """1 / (B D) and 1."""
        return 1 / (batch_size * data_dim), 1.0


@dataclass(frozen=True)
class AveragedKL(PrintedLoss):
    r"""Summed squares plus the KL averaged over batch and latent dimensions.

    .. math:: \sum_i (x_i - \hat x_i)^2 + \frac 1 d \sum_j \tfrac 1 2 (m_j^2 + s_j^2 - 1 - \ln s_j^2)

    Exactly beta = 1 / d, or sigma^2 = 1 / (2 d) at beta = 1; what looks like one recipe is another one for each d.

    Source: Dagang Wei, Demystifying Neural Networks: Variational Autoencoders (Medium).

    Example:
        >>> AveragedKL().effective_beta(batch_size=128, data_dim=784, latent_dim=2)
        0.5
    """

    post = "Dagang Wei"
    formula = r"\sum_i (x_i - \hat{x}_i)^2 + \frac{1}{d} \mathrm{KL}(q(z|x) \,\|\, p(z))"
    wrong = "the KL is averaged over the latent dimensions, the squared error is summed over the pixels"
    really = "beta = 1/d, or a decoder with sigma^2 = 1/(2 d)"

    def weights(self, batch_size: int, data_dim: int, latent_dim: int) -> tuple[float, float]:
        """1 and 1 / d."""
        return 1.0, 1 / latent_dim


@dataclass(frozen=True)
class LostHalf(PrintedLoss):
    r"""Summed squares plus a KL that has lost the factor 1/2 of two of its terms.

    .. math:: \sum_i (x_i - \hat x_i)^2 + \sum_j (m_j^2 + s_j^2 - \ln s_j - \tfrac 1 2)

    It is KL(q || N(0, I/2)) plus (d/2) ln 2: a right loss of another prior. Its minimum is at s = 0.7071, where it is
    0.3466 and not 0; whoever then samples z from N(0, I) decodes codes that are spread too far.

    Source: avandekleut, Variational AutoEncoders (VAE) with PyTorch (2020).
    """

    post = "avandekleut"
    formula = r"\sum_i (x_i - \hat{x}_i)^2 + \sum_j (m_j^2 + s_j^2 - \ln s_j - \frac{1}{2})"
    wrong = "the factor 1/2 is lost on m^2 and s^2"
    really = "the KL to the prior N(0, I/2), plus 0.3466 for each latent dimension"
    prior_scale = math.sqrt(0.5)
    latent_offset = 0.5 * math.log(2)

    @staticmethod
    def latent_loss(loc: Tensor, scale: Tensor) -> Tensor:
        """As printed."""
        return loc.square() + scale.square() - scale.log() - 0.5


@dataclass(frozen=True)
class GreyCrossEntropy(PrintedLoss):
    r"""Binary cross-entropy of grey pixels plus KL.

    .. math:: -\sum_i [x_i \ln \hat x_i + (1 - x_i) \ln(1 - \hat x_i)] + \mathrm{KL}(q(z|x) \,\|\, p(z)),
        \qquad x_i \in [0, 1]

    Right for x in {0, 1}. Between them exp(-loss) does not integrate to 1 over x (at x_hat = 1/2 it gives 1/2 for each
    pixel): it is a continuous Bernoulli without its constant, and a perfect reconstruction still costs the entropy of
    the pixels. Read another way it bounds E[log p(b)] of the bits b ~ Bernoulli(x), with an encoder that sees the grey
    picture; a number about the bits, not about x.

    Source: wiseodd, Variational Autoencoder: Intuition and Implementation (2016); the code of kvfrans; Pyro's tutorial.
    """

    post = "wiseodd; kvfrans' code; Pyro's tutorial"
    formula = r"-\sum_i [x_i \ln \hat{x}_i + (1 - x_i) \ln(1 - \hat{x}_i)] + \mathrm{KL}(q(z|x) \,\|\, p(z))"
    wrong = "exp(-cross-entropy) is no density of a grey pixel: it does not integrate to 1"
    really = "the ELBO of a continuous Bernoulli without its constant; of pixels redrawn as bits, on average"

    @staticmethod
    def distance(x: Tensor, x_hat: Tensor) -> Tensor:
        """The cross-entropy of each pixel."""
        p = x_hat.clamp(_EPSILON, 1 - _EPSILON)
        return -(x * p.log() + (1 - x) * (1 - p).log())

    @staticmethod
    def observe(x: Tensor, x_hat: Tensor, scale: float) -> None:
        """A continuous Bernoulli, and its log-constant taken off again."""
        pixels = x.dim() - 1
        p = dist.ContinuousBernoulli(probs=x_hat)
        pyro.sample("x", p.to_event(pixels), obs=x)
        pyro.factor("no_constant", -p._cont_bern_log_norm().flatten(1).sum(-1))


@dataclass(frozen=True)
class HalvedCrossEntropy(GreyCrossEntropy):
    r"""Half the binary cross-entropy plus the KL.

    .. math:: \tfrac 1 2 \, \mathrm{BCE}(x, \hat x) + \mathrm{KL}(q(z|x) \,\|\, p(z))

    Exactly beta = 2, and half the loss: comparing its printed value with that of an autoencoder's cross-entropy makes
    the VAE look twice as good as it is.

    Source: the code of Comp Three, Variational Autoencoders are Beautiful: default weights 1 and 0.5.
    """

    post = "Comp Three's code"
    formula = r"\frac{1}{2} \mathrm{BCE}(x, \hat{x}) + \mathrm{KL}(q(z|x) \,\|\, p(z))"
    wrong = "the cross-entropy counts half, and the sum is reported as the loss (grey pixels besides)"
    really = "half of the loss with beta = 2"

    def weights(self, batch_size: int, data_dim: int, latent_dim: int) -> tuple[float, float]:
        """1/2 and 1."""
        return 0.5, 1.0


@dataclass(frozen=True)
class SwappedCrossEntropy(PrintedLoss):
    r"""Cross-entropy with target and prediction swapped.

    .. math:: -\sum_i [\hat x_i \ln x_i + (1 - \hat x_i) \ln(1 - x_i)] + \mathrm{KL}(q(z|x) \,\|\, p(z))

    Linear in x_hat, with slope -logit(x): every pixel is driven to 0 or 1, whichever side of 1/2 x lies on, and never
    to its value. As a function of x it is a Beta(1 + x_hat, 2 - x_hat) density without its constant, which depends on
    x_hat. x is kept 1e-7 away from 0 and 1, as Keras keeps whatever comes second.

    Source: wiseodd, Variational Autoencoder: Intuition and Implementation (2016), code for Keras 1 run under Keras 2,
        where the order of the arguments has changed.
    """

    post = "wiseodd's code under Keras >= 2"
    formula = r"-\sum_i [\hat{x}_i \ln x_i + (1 - \hat{x}_i) \ln(1 - x_i)] + \mathrm{KL}(q(z|x) \,\|\, p(z))"
    wrong = "binary_crossentropy(output, target) became (target, output): data and prediction are swapped"
    really = "a score linear in x_hat: thresholds x at 1/2 and drives x_hat to 0 or 1"

    @staticmethod
    def distance(x: Tensor, x_hat: Tensor) -> Tensor:
        """The cross-entropy of each pixel, arguments swapped."""
        return GreyCrossEntropy.distance(x_hat, x)

    @staticmethod
    def observe(x: Tensor, x_hat: Tensor, scale: float) -> None:
        """A beta density, and its constant taken off again."""
        pixels, inside = x.dim() - 1, x.clamp(_EPSILON, 1 - _EPSILON)
        pyro.sample("x", dist.Beta(1 + x_hat, 2 - x_hat).to_event(pixels), obs=inside)
        log_constant = torch.lgamma(1 + x_hat) + torch.lgamma(2 - x_hat) - math.log(2)  # log of the beta function
        pyro.factor("no_constant", log_constant.flatten(1).sum(-1))


LOSSES: tuple[type[PrintedLoss], ...] = (
    SummedSquares,
    EntropyDropped,
    MeanSquares,
    AveragedKL,
    LostHalf,
    GreyCrossEntropy,
    HalvedCrossEntropy,
    SwappedCrossEntropy,
)


def conventions(batch_size: int, data_dim: int, latent_dim: int) -> str:
    """The table of loss conventions: what each post's weights amount to.

    Args:
        batch_size: examples a step, B.
        data_dim: numbers of an example, D (pixels).
        latent_dim: latent dimensions, d.

    Returns:
        Lines of text.

    Example:
        >>> print(conventions(batch_size=100, data_dim=784, latent_dim=2))
        loss                  weights of x and z   beta      sigma at beta 1  prior        printed by
        ...
        MeanSquares           1.276e-05, 1         7.84e+04  198              N(0, I)      kvfrans, ...
    """
    lines = ["loss                  weights of x and z   beta      sigma at beta 1  prior        printed by"]
    for loss in (family() for family in LOSSES):
        sizes = batch_size, data_dim, latent_dim
        weights = ", ".join(f"{weight:.4g}" for weight in loss.weights(*sizes))
        scale = loss.implied_scale(*sizes)
        prior = "N(0, I)" if loss.prior_scale == 1 else f"N(0, {loss.prior_scale**2:.3g} I)"
        lines.append(
            f"{type(loss).__name__:21} {weights:20} {loss.effective_beta(*sizes):<9.4g} "
            f"{'none' if math.isnan(scale) else f'{scale:.4g}':16} {prior:12} {loss.post}"
        )
    return "\n".join(lines)


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
