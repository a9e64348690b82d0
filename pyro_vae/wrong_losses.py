r"""Losses as well-known posts print them, trainable, each with the Pyro model that it really belongs to.

.. math:: \mathrm{loss}(x) = w_x \sum_i \mathrm{distance}(x_i, \hat x_i) + w_z \sum_j \mathrm{latent}(m_j, s_j), \qquad
    \hat x = \mathbb E[x \mid z], \quad z \sim q(z \mid x) = \mathcal N(m, \operatorname{diag} s^2)

Sum or mean, weight, beta and the decoder's variance are one knob. For squared errors (SSE), whatever beta > 0 is named,

.. math:: w_x \, \mathrm{SSE} + w_z \, \mathrm{KL} = \frac{w_z}{\beta} \left( \frac{\mathrm{SSE}}{2 \sigma^2}
    + \beta \, \mathrm{KL} \right) \qquad \text{with} \quad \sigma^2 = \frac{w_z}{2 \beta w_x}

None of these is a bound on log p(x); train with ``ELBO()`` and a normalised likelihood instead.
"""

import math
from dataclasses import dataclass

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from pyro_vae.printed_loss import PrintedLoss

_EPSILON = 1e-7  # Keras keeps predictions this far from 0 and 1 inside its cross-entropy


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
