r"""Monotone rational-quadratic splines: an invertible map of each number, of almost any shape.

On the interval [-b, b] the map runs through K + 1 knots (x_k, y_k), with slope d_k > 0 in each, and in between it is a
quotient of two quadratic polynomials; outside it is the identity. With xi = (x - x_k) / (x_{k+1} - x_k) and
s = (y_{k+1} - y_k) / (x_{k+1} - x_k),

.. math:: y = y_k + (y_{k+1} - y_k) \frac{s \xi^2 + d_k \xi (1 - \xi)}{s + (d_{k+1} + d_k - 2 s) \xi (1 - \xi)}

Source: Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows, arXiv:1906.04032; Gregory, Delbourgo (1982),
    Piecewise rational quadratic interpolation to monotonic data.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

_LEAST = 1e-2  # of the average width, height and slope: what keeps the map invertible when rounded


def num_parameters(num_bins: int = 8) -> int:
    """How many numbers describe one spline: K widths, K heights, K - 1 slopes."""
    return 3 * num_bins - 1


class Spline:
    r"""A spline for each number; the forward direction and its exact inverse take one pass each.

    At h = 0 it is the identity. Widths and heights are softmaxes, slopes softpluses of the parameters.

    Args:
        h: parameters, [*batch, (3 K - 1) D]: for each kind of parameter the D numbers in a row.
        num_bins: number of bins K.
        bound: the interval's end b.

    Example:
        >>> spline = Spline(torch.randn(5, 2 * num_parameters(8)), num_bins=8)
        >>> z = torch.linspace(-6, 6, 10).reshape(5, 2)
        >>> y, log_slope = spline.forward(z)
        >>> torch.allclose(spline.inverse(y)[0], z, atol=1e-4), torch.equal(y[0, 0], z[0, 0])
        (True, True)
    """

    def __init__(self, h: Tensor, num_bins: int = 8, bound: float = 5.0):
        h = h.unflatten(-1, (num_parameters(num_bins), -1)).movedim(-2, -1)
        self.bound = bound
        part = (_LEAST + (1 - _LEAST) * num_bins * h[..., : 2 * num_bins].unflatten(-1, (2, -1)).softmax(-1)) / num_bins
        places = bound * (2 * part.cumsum(-1)[..., :-1] - 1)
        slope = _LEAST + (1 - _LEAST) * softplus(h[..., None, 2 * num_bins :] + math.log(math.e - 1))
        ends = h.new_tensor([[-bound, bound], [-bound, bound], [1.0, 1.0]]).expand(*places.shape[:-2], 3, 2)
        inner = torch.cat([places, slope], dim=-2)
        self.knots = torch.cat([ends[..., :1], inner, ends[..., 1:]], dim=-1)  # x, y, slope: [*batch, D, 3, K + 1]

    @property
    def x(self) -> Tensor:
        """Where the knots are, [*batch, D, K + 1]."""
        return self.knots[..., 0, :]

    @property
    def y(self) -> Tensor:
        """What the knots are mapped to, [*batch, D, K + 1]."""
        return self.knots[..., 1, :]

    @property
    def slope(self) -> Tensor:
        """The slopes in the knots, [*batch, D, K + 1]; 1 in the first and the last: the tails go on without a kink."""
        return self.knots[..., 2, :]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log dy/dz, both of the shape of z [*batch, D]."""
        inside, value, (x, dx, y, dy, low, high) = self._bin(z, self.x)
        xi = (value - x) / dx
        ratio, rest = dy / dx, xi * (1 - xi)
        bend = ratio + (high + low - 2 * ratio) * rest
        found = y + dy * (ratio * xi**2 + low * rest) / bend
        return torch.where(inside, found, z), self._log_slope(inside, xi, ratio, low, high)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Z and log dy/dz: a quadratic equation, solved by the formula that does not cancel."""
        inside, value, (x, dx, y0, dy, low, high) = self._bin(y, self.y)
        ratio, up = dy / dx, value - y0
        bend = high + low - 2 * ratio
        a, b, c = dy * (ratio - low) + up * bend, dy * low - up * bend, -ratio * up
        root = (b**2 - 4 * a * c).clamp(min=torch.finfo(b.dtype).tiny).sqrt()
        xi = (-2 * c / (b + root)).clamp(0, 1)
        return torch.where(inside, x + xi * dx, y), self._log_slope(inside, xi, ratio, low, high)

    def _bin(self, value: Tensor, knots: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Whether values are inside; they, moved inside; and x, dx, y, dy and both slopes of their bins."""
        inside = value.abs() < self.bound
        value = value.clamp(-self.bound, self.bound)
        first = (value.unsqueeze(-1) >= knots[..., 1:-1]).sum(-1)
        pair = torch.stack([first, first + 1], dim=-1).unsqueeze(-2).expand(*first.shape, 3, 2)
        low, high = self.knots.expand(*first.shape, *self.knots.shape[-2:]).gather(-1, pair).unbind(-1)
        (x, y, low_slope), (dx, dy, _) = low.unbind(-1), (high - low).unbind(-1)
        return inside, value, (x, dx, y, dy, low_slope, high[..., 2])

    @staticmethod
    def _log_slope(inside: Tensor, xi: Tensor, ratio: Tensor, low: Tensor, high: Tensor) -> Tensor:
        rest = xi * (1 - xi)
        above = high * xi**2 + 2 * ratio * rest + low * (1 - xi) ** 2
        below = ratio + (high + low - 2 * ratio) * rest
        return torch.where(inside, 2 * ratio.log() + above.log() - 2 * below.log(), 0.0)
