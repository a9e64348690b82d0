r"""Normalising flows: a distribution that is a diagonal normal, bent by a chain of invertible maps; and the maps.

.. math:: z_0 \sim p_0, \qquad z = f_T \circ \dots \circ f_1(z_0), \qquad
    \log p(z) = \log p_0(z_0) - \sum_t \log |\det \partial f_t|

Every map here can be inverted, so a flow scores any z, not only its own draws; those it scores without inverting.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.contracts import Distribution

_NO_SHAPE = torch.Size()
_NUM_POINTS = 256


class Map(Protocol):
    """An invertible map of vectors; both directions return the logarithm of the determinant of the forward one."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Z [*batch, D] -> y [*batch, D] and log |det dy/dz| [*batch]."""

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Y [*batch, D] -> z [*batch, D] and log |det dy/dz| [*batch]."""


class Flow(TorchDistribution):
    r"""The distribution of f_T(... f_1(z_0)) with z_0 from a base distribution.

    The latest draw is remembered with its z_0, so that scoring it costs nothing and rounds nothing. A draw made without
    gradients is inverted like any other z when its score needs them, and nothing is shared between two distributions:
    after an optimiser's step a new one knows no old draw.

    Args:
        base: the diagonal normal of z_0, batch shape ``batch``, event shape (D,).
        maps: f_1, ..., f_T.
        points: standard normal points [N, D] for the mean.

    Example:
        >>> from pyro.distributions import Normal
        >>> base = Normal(torch.zeros(5, 2), 1.0).to_event(1)
        >>> Flow(base, [], torch.zeros(1, 2)).sample((3,)).shape
        torch.Size([3, 5, 2])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Distribution, maps: Sequence[Map], points: Tensor, validate_args: bool | None = None):
        self.base, self.maps, self.points = base, list(maps), points
        self._latest: tuple[Tensor, int, bool, Tensor, Tensor] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Flow":
        """The same distribution with a larger batch shape."""
        return Flow(self.base.expand(batch_shape), self.maps, self.points, validate_args=self._validate_args)

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """A draw z, [*sample_shape, *batch, D], differentiable in the parameters."""
        start = self.base.rsample(sample_shape)
        z, log_det = self._forward(start)
        if not z.is_inference():
            self._latest = z, z._version, torch.is_grad_enabled(), start, log_det
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q of z [*any, *batch, D], nats."""
        if self._validate_args:
            self._validate_sample(value)
        start, log_det = self._remembered(value) or self._inverse(value)
        return self.base.log_prob(start) - log_det

    @property
    def mean(self) -> Tensor:
        """The mean, [*batch, D], approximately: over fixed points z_0, the same at each call; exact for affine maps."""
        normal = self.base.base_dist
        points = self.points.reshape(-1, *[1] * len(self.batch_shape), self.points.shape[-1])
        return self._forward(normal.loc + normal.scale * points)[0].mean(0)

    def _forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(z.shape[:-1])
        for f in self.maps:
            z, more = f.forward(z)
            log_det = log_det + more
        return z, log_det

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(torch.broadcast_shapes(z.shape[:-1], self.batch_shape))
        for f in reversed(self.maps):
            z, more = f.inverse(z)
            log_det = log_det + more
        return z, log_det

    def _remembered(self, value: Tensor) -> tuple[Tensor, Tensor] | None:
        if self._latest is None:
            return None
        z, version, with_gradients, start, log_det = self._latest
        same = value is z and z._version == version  # not changed in place
        return (start, log_det) if same and (with_gradients or not torch.is_grad_enabled()) else None


class Planar:
    r"""z + u tanh(w^T z + b), with u [*batch, D] moved along w [*batch, D] so far that w^T u > -1; b [*batch, 1]."""

    def __init__(self, u: Tensor, w: Tensor, b: Tensor):
        wu = (w * u).sum(-1, keepdim=True)
        extra = softplus(wu + math.log(math.e - 1)) - 1 - wu
        square = (w**2).sum(-1, keepdim=True)
        self.u = u + extra * w / (square + 1e-12)  # both vanish together where w does
        self.w, self.b = w, b
        self.slope = (w * self.u).sum(-1, keepdim=True)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log |det dy/dz|."""
        bend = ((z * self.w).sum(-1, keepdim=True) + self.b).tanh()
        return z + self.u * bend, torch.log1p(self.slope * (1 - bend**2)).squeeze(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """With a = w^T z: a + slope tanh(a + b) = w^T y."""
        root = solve_bend((y * self.w).sum(-1, keepdim=True), self.slope, torch.ones_like(self.slope), self.b)
        bend = (root + self.b).tanh()
        return y - self.u * bend, torch.log1p(self.slope * (1 - bend**2)).squeeze(-1)


def solve_bend(target: Tensor, height: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """The number a with a + height tanh(slope a + shift) = target, by bisection; it needs height slope > -1."""
    with torch.no_grad():
        low, high = target - height.abs(), target + height.abs()
        for _ in range(25 if target.dtype == torch.float32 else 55):
            middle = (low + high) / 2
            above = middle + height * (slope * middle + shift).tanh() > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        root = (low + high) / 2
    bend = (slope * root + shift).tanh()  # one step of Newton's method gives the root its derivatives
    return root - (root + height * bend - target) / (1 + height * slope * (1 - bend**2))


class Radial:
    """A pull towards a centre [*batch, D]; log_alpha and b [*batch, 1], beta = alpha (exp(b) - 1)."""

    def __init__(self, centre: Tensor, log_alpha: Tensor, b: Tensor):
        self.centre, self.alpha = centre, log_alpha.exp()
        self.beta = self.alpha * b.expm1()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log |det dy/dz|."""
        offset = z - self.centre
        radius = offset.norm(dim=-1, keepdim=True)
        return z + self.beta / (self.alpha + radius) * offset, self._log_det(radius, z.shape[-1])

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The radius r of z solves r (1 + beta / (alpha + r)) = |y - c|, a quadratic equation."""
        offset = y - self.centre
        outer = offset.norm(dim=-1, keepdim=True)
        half = (self.alpha + self.beta - outer) / 2
        radius = (half**2 + self.alpha * outer).sqrt() - half
        z = self.centre + offset / (1 + self.beta / (self.alpha + radius))
        return z, self._log_det(radius, y.shape[-1])

    def _log_det(self, radius: Tensor, dim: int) -> Tensor:
        pull = self.beta / (self.alpha + radius)
        along = torch.log1p(pull * self.alpha / (self.alpha + radius))
        return ((dim - 1) * torch.log1p(pull) + along).squeeze(-1)


class Affine:
    """Shift and scale each number; h is [*batch, 2 D], and the logarithm of a scale stays within (-2, 2)."""

    def __init__(self, h: Tensor):
        self.shift, a = h.chunk(2, dim=-1)
        self.log_scale = 2 * (a / 2).tanh()  # a chain of maps stays invertible in single precision

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log dy/dz, of each number."""
        return z * self.log_scale.exp() + self.shift, self.log_scale

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Z and log dy/dz, of each number."""
        return (y - self.shift) * (-self.log_scale).exp(), self.log_scale


class Autoregressive:
    """Move each number by a function of those before it and a context, then turn the order round.

    What a number's parameters do to it is ``bend``: parameters h -> a map like :class:`Affine`.
    """

    def __init__(self, net: nn.Module, context: Tensor, bend: Callable[[Tensor], Any] = Affine):
        self.net, self.context, self.bend = net, context, bend

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log |det dy/dz|."""
        y, log_slope = self.bend(self.net(z, self.context)).forward(z)
        return y.flip(-1), log_slope.sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Each pass gets one more number right, for all that a number needs are those before it."""
        y = y.flip(-1)
        z = y
        for _ in range(y.shape[-1]):
            z, log_slope = self.bend(self.net(z, self.context)).inverse(y)
        return z, log_slope.sum(-1)


class Coupling:
    """Move all but the first ``kept`` numbers by a function of those and a context, then swap the parts."""

    def __init__(self, net: nn.Module, context: Tensor, kept: int, bend: Callable[[Tensor], Any] = Affine):
        self.net, self.context, self.kept, self.bend = net, context, kept, bend

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log |det dy/dz|."""
        first, bend = self._bend(z[..., : self.kept])
        second, log_slope = bend.forward(z[..., self.kept :])
        return torch.cat([second, first], dim=-1), log_slope.sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Z and log |det dy/dz|."""
        moved = y.shape[-1] - self.kept
        first, bend = self._bend(y[..., moved:])
        second, log_slope = bend.inverse(y[..., :moved])
        return torch.cat([first, second], dim=-1), log_slope.sum(-1)

    def _bend(self, first: Tensor) -> tuple[Tensor, Any]:
        batch = torch.broadcast_shapes(first.shape[:-1], self.context.shape[:-1])
        first = first.expand(*batch, -1)
        return first, self.bend(self.net(torch.cat([first, self.context.expand(*batch, -1)], dim=-1)))


class ShiftScale:
    """loc + exp(log_scale) z, with numbers [*batch, D]."""

    def __init__(self, loc: Tensor, log_scale: Tensor):
        self.loc, self.log_scale = loc, log_scale

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log |det dy/dz|."""
        return self.loc + self.log_scale.exp() * z, self.log_scale.sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Z and log |det dy/dz|."""
        return (y - self.loc) * (-self.log_scale).exp(), self.log_scale.sum(-1)


class Inverse:
    """A map run backwards: for priors, which score other z than their own draws far more often than they draw."""

    def __init__(self, map_: Map):
        self.map = map_

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log |det dy/dz|."""
        y, log_det = self.map.inverse(z)
        return y, -log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Z and log |det dy/dz|."""
        z, log_det = self.map.forward(y)
        return z, -log_det


class MaskedMlp(nn.Module):
    """(z, context) -> [*batch, P D], where the P outputs of number d see only z_1, ..., z_{d-1} and the context.

    Hidden unit j may see the first j mod D numbers; number d, counted from 0, may see the hidden units that see d at
    most. The context may be empty (context_dim = 0).
    """

    mask_in: Tensor
    mask_out: Tensor

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        hidden: int,
        activation: type[nn.Module],
        num_parameters: int = 2,
    ):
        super().__init__()
        self.from_z = nn.Linear(latent_dim, hidden)
        self.from_context = nn.Linear(context_dim, hidden, bias=False) if context_dim else None
        self.activation, self.out = activation(), nn.Linear(hidden, num_parameters * latent_dim)
        start_at_zero(self, self.out)
        seen, number = torch.arange(hidden) % latent_dim, torch.arange(latent_dim)
        masks = number < seen.unsqueeze(1), seen <= number.repeat(num_parameters).unsqueeze(1)
        self.register_buffer("mask_in", masks[0].to(self.out.weight.dtype), persistent=False)
        self.register_buffer("mask_out", masks[1].to(self.out.weight.dtype), persistent=False)

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """[*batch, P D]."""
        hidden = nn.functional.linear(z, self.from_z.weight * self.mask_in, self.from_z.bias)
        if self.from_context is not None:
            hidden = hidden + self.from_context(context)
        return nn.functional.linear(self.activation(hidden), self.out.weight * self.mask_out, self.out.bias)


def start_at_zero(net: nn.Module, last: nn.Module) -> nn.Module:
    """The network with the parameters of its last layer set to 0."""
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()
    return net


def normal_points(dim: int) -> Tensor:
    """Points [256, D] that spread like a standard normal, and whose mean is 0; no random state is touched."""
    uniform = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0).draw(_NUM_POINTS // 2, dtype=torch.float64)
    points = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    return torch.cat([points, -points]).to(torch.get_default_dtype())
