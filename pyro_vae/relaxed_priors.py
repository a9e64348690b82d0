"""The Concrete (Gumbel-softmax) distribution: a discrete code relaxed to a point of the simplex, as a prior."""

import math
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyro_vae.contracts import Distribution, Prior

_LEAST_RANGE = 5.0  # of log-odds: one class may be e^5 times as probable as another


class RelaxedOneHotCategorical(Prior):
    r"""The relaxation of D equally probable classes: D positive numbers that sum to 1.

    .. math:: p(z) = (D - 1)! \, \tau^{D - 1} \Big(\sum_d z_d^{-\tau}\Big)^{-D} \prod_d z_d^{-\tau - 1}

    At a low temperature most of the mass lies near the corners, at a high one in the middle. Its largest number is at
    each place with probability 1/D, whatever the temperature. Partner of ``discrete.RelaxedOneHotCategorical``.

    Args:
        latent_dim: number of classes D.
        temperature: the temperature tau.

    Returns:
        A distribution with batch shape () and event shape (D,), with ``rsample``; its ``mean`` is approximate. The
        density is with respect to the first D - 1 numbers, as a Dirichlet's.

    Raises:
        ValueError: latent_dim < 2, temperature <= 0, or (when called) a temperature whose draws would underflow.

    Source: Maddison, Mnih, Teh (2017), The Concrete distribution, arXiv:1611.00712; Jang, Gu, Poole (2017),
        Categorical reparameterization with Gumbel-softmax, arXiv:1611.01144.

    Example:
        >>> RelaxedOneHotCategorical(4)().sample().sum().round(decimals=4)
        tensor(1.)
    """

    logits: Tensor

    def __init__(self, latent_dim: int, temperature: float = 0.5):
        super().__init__()
        if latent_dim < 2:
            raise ValueError(f"expected latent_dim >= 2, found {latent_dim}: a single class says nothing.")
        check_temperature(temperature)
        self.latent_dim, self.temperature = latent_dim, temperature
        self.register_buffer("logits", torch.zeros(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, temperature={self.temperature}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return concrete(self.logits, self.temperature)


def concrete(logits: Tensor, temperature: float) -> Distribution:
    r"""The Concrete distribution, its log-odds kept where draws cannot underflow.

    .. math:: z = \mathrm{softmax}((a + g) / \tau), \qquad a = \tfrac r 2 \tanh(2 h / r), \quad g_d \sim \mathrm{Gumbel}

    A number of z that rounds to 0 has no density, and clamping it would push the "bound" above log p(x): q is small at
    the clamp although its draws pile up there. So the log-odds h are squashed to a range r that leaves room for the
    noise: +-12 at temperature 0.5 in single precision, where tanh is the identity for all practical purposes.

    Args:
        logits: h, [*batch, D].
        temperature: the temperature tau.

    Returns:
        A distribution on the simplex with batch shape ``batch``.

    Raises:
        ValueError: the temperature leaves no room in this precision.
    """
    least, noise = _headroom(logits.shape[-1], logits.dtype)
    room = temperature * least - noise
    if room < _LEAST_RANGE:
        needed = math.ceil(100 * (_LEAST_RANGE + noise) / least) / 100
        raise ValueError(
            f"expected a temperature >= {needed} in {logits.dtype}, found {temperature}: below, draws underflow to 0, "
            "where they have no density; raise it, or compute in double precision."
        )
    bounded = room / 2 * torch.tanh(2 * logits / room)
    return _Concrete(bounded.new_full((), temperature), logits=bounded)


def _headroom(dim: int, dtype: torch.dtype) -> tuple[float, float]:
    """How small log z may be, and how far apart two draws of torch's Gumbel noise (from clamped uniforms) may be."""
    info = torch.finfo(dtype)
    noise = -math.log(-math.log1p(-info.eps)) + math.log(-math.log(info.eps))
    return -math.log(info.tiny) - math.log(dim), noise


class _Concrete(dist.RelaxedOneHotCategorical):
    """The distribution, with a mean: it has no closed form, so it is the average over 256 fixed points of the noise."""

    @property
    def mean(self) -> Tensor:
        dim = self.event_shape[0]
        uniform = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0).draw(256, dtype=torch.float64)
        gumbel = -(-uniform.clamp(1e-9, 1 - 1e-9).log()).log()
        points = gumbel.to(self.logits).reshape(256, *[1] * len(self.batch_shape), dim)
        return ((self.logits + points) / self.temperature).softmax(-1).mean(0)


def check_temperature(temperature: Any) -> None:
    """Refuse a temperature that is not a positive number."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"expected temperature > 0, found {temperature}: about 0.3 to 1 is usual.")
