r"""Scores that compare x with a picture of it, in place of a likelihood: any differentiable distance.

.. math:: \log p(x \mid z) \quad\text{is replaced by}\quad -\lambda \, d(x, \hat x(z))

A distance is any function (x, x_hat) -> [B] of two tensors [B, *E]; x comes first. exp(-lambda d) does not integrate to
one over x, so no bound on log p(x) is left, and every report says so. See :class:`Comparison`.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import conv2d, huber_loss

from pyro_vae.contracts import Distribution, Likelihood

Distance = Callable[..., Any]  # (x [B, *E], x_hat [B, *E]) -> [B]; loose, so that the command line takes any function


def _sum(value: Tensor) -> Tensor:
    return value.flatten(1).sum(1)


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    r"""Sum of squares, \sum_i (x_i - \hat x_i)^2; lambda = 1 is a normal likelihood with variance 1/2, unnormalised.

    Args:
        x: data, [B, *E].
        x_hat: what the decoder makes of it, [B, *E].

    Returns:
        [B], >= 0.
    """
    return _sum((x - x_hat) ** 2)


def absolute_error(x: Tensor, x_hat: Tensor) -> Tensor:
    r"""Sum of absolute differences, \sum_i |x_i - \hat x_i|.

    Args:
        x: data, [B, *E].
        x_hat: what the decoder makes of it, [B, *E].

    Returns:
        [B], >= 0.
    """
    return _sum((x - x_hat).abs())


def huber(x: Tensor, x_hat: Tensor, delta: float = 0.1) -> Tensor:
    r"""Huber's loss: half the square of differences below delta, and linear above.

    .. math:: \sum_i \begin{cases} r_i^2 / 2 & |r_i| \le \delta \\ \delta (|r_i| - \delta / 2) & \text{else} \end{cases}
        \qquad r = x - \hat x

    Args:
        x: data, [B, *E].
        x_hat: what the decoder makes of it, [B, *E].
        delta: where it becomes linear.

    Returns:
        [B], >= 0.

    Source: Huber (1964), Robust estimation of a location parameter.
    """
    return _sum(huber_loss(x_hat, x, reduction="none", delta=delta))


def binary_cross_entropy(x: Tensor, x_hat: Tensor) -> Tensor:
    r"""Cross-entropy of pixels in [0, 1]; for x in {0, 1} it is minus the Bernoulli log-likelihood.

    .. math:: -\sum_i x_i \log \hat x_i + (1 - x_i) \log(1 - \hat x_i)

    The order matters: exchanged, it is linear in x_hat and drives pixels to 0 and 1. For grey x its smallest value is
    the entropy of x, not 0.

    Args:
        x: data in [0, 1], [B, *E].
        x_hat: what the decoder makes of it, in (0, 1), [B, *E].

    Returns:
        [B], >= 0.
    """
    smallest = torch.finfo(x_hat.dtype).tiny
    return -_sum(x * x_hat.clamp(min=smallest).log() + (1 - x) * (1 - x_hat).clamp(min=smallest).log())


def structural_dissimilarity(x: Tensor, x_hat: Tensor) -> Tensor:
    r"""1 - SSIM, the mean structural similarity of pictures with values in [0, 1].

    .. math:: \mathrm{SSIM} = \frac{(2 \mu_x \mu_{\hat x} + c_1)(2 \sigma_{x \hat x} + c_2)}
        {(\mu_x^2 + \mu_{\hat x}^2 + c_1)(\sigma_x^2 + \sigma_{\hat x}^2 + c_2)}, \quad c_1 = 0.01^2, \; c_2 = 0.03^2

    Local means and covariances under a Gaussian window of 11x11 pixels with a standard deviation of 1.5 (a smaller one
    where the picture is smaller), averaged over its places inside the picture and over the channels.

    Args:
        x: pictures in [0, 1], [B, C, H, W].
        x_hat: what the decoder makes of them, in [0, 1], [B, C, H, W].

    Returns:
        [B], from 0 to 2, and 0 for equal pictures.

    Raises:
        ValueError: x is no batch of pictures.

    Source: Wang, Bovik, Sheikh, Simoncelli (2004), Image quality assessment: from error visibility to structural
        similarity.
    """
    if x.dim() != 4:
        raise ValueError(f"expected pictures [B, C, H, W], found shape {tuple(x.shape)}: use another distance.")
    channels, width = x.shape[1], min(11, *((size - 1) // 2 * 2 + 1 for size in x.shape[2:]))
    offset = torch.arange(width, dtype=x.dtype, device=x.device) - width // 2
    line = (-0.5 * (offset / 1.5) ** 2).exp()
    line = line / line.sum()
    window = (line.unsqueeze(1) * line).expand(channels, 1, width, width)

    def smooth(picture: Tensor) -> Tensor:
        return conv2d(picture, window, groups=channels)

    mean, mean_hat = smooth(x), smooth(x_hat)
    variance, variance_hat = smooth(x**2) - mean**2, smooth(x_hat**2) - mean_hat**2
    covariance = smooth(x * x_hat) - mean * mean_hat
    c1, c2 = 0.01**2, 0.03**2
    light = (2 * mean * mean_hat + c1) / (mean**2 + mean_hat**2 + c1)
    structure = (2 * covariance + c2) / (variance + variance_hat + c2)
    return 1 - (light * structure).flatten(1).mean(1)


class Perceptual(nn.Module):
    r"""Distance in the feature space of a network that is frozen: pictures are alike if it sees the same in them.

    .. math:: d(x, \hat x) = \sum_l w_l \, \lVert f_l(x) - f_l(\hat x) \rVert^2

    The network is copied; the copy is never trained and always in evaluation mode. It is saved with the model.

    Args:
        network: any network of x [B, *E], for example a classifier.
        layers: names of the sub-modules whose outputs f_l are compared ("0", "features.3", see ``named_modules``);
            None takes the output of the network.
        weights: the weight w_l of each layer; 1 by default.

    Raises:
        ValueError: a layer that the network does not have, or another number of weights.

    Source: Hou, Shen, Sun, Qiu (2017), Deep feature consistent variational autoencoder, arXiv:1610.00291.

    Example:
        >>> network = nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> Perceptual(network, layers=["0", "2"])(torch.ones(5, 7), torch.ones(5, 7))
        tensor([0., 0., 0., 0., 0.])
    """

    def __init__(self, network: nn.Module, layers: Sequence[str] | None = None, weights: Sequence[float] | None = None):
        super().__init__()
        self.layers = [""] if layers is None else list(layers)
        self.weights = [1.0] * len(self.layers) if weights is None else [float(weight) for weight in weights]
        known = [name for name, _ in network.named_modules()]
        unknown = [name for name in self.layers if name not in known]
        if unknown or not self.layers:
            raise ValueError(
                f"expected names of the network's layers, found {unknown or 'none'}: it has {', '.join(known[1:])}."
            )
        if len(self.weights) != len(self.layers):
            raise ValueError(
                f"expected {len(self.layers)} weights, found {len(self.weights)}: give one for each of the layers."
            )
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    def extra_repr(self) -> str:
        """Show what is compared."""
        return f"layers={self.layers}, weights={self.weights}"

    def train(self, mode: bool = True) -> "Perceptual":
        """The frozen network stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def _features(self, x: Tensor) -> list[Tensor]:
        found: dict[str, Tensor] = {}
        hooks = [
            self.network.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name: found.__setitem__(name, output)  # type: ignore[misc]
            )
            for name in self.layers
        ]
        try:
            self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[name] for name in self.layers]

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The distance, [B], >= 0."""
        pairs = zip(self.weights, self._features(x), self._features(x_hat), strict=True)
        return torch.stack([weight * squared_error(a, b) for weight, a, b in pairs]).sum(0)


class Score(TorchDistribution):
    """What stands in the place of p(x | z) without being a distribution: -weight * distance(x, x_hat), and no draws.

    Args:
        x_hat: what the decoder makes of z, [*batch, *E].
        distance: (x, x_hat) -> [N], both [N, *E].
        weight: factor of the distance.
        event_dim: number of axes of E.
        values: what a number of x can be: constraints.unit_interval where x_hat is.
        validate_args: check values (None: as Pyro is set).
    """

    arg_constraints = {}  # noqa: RUF012  # torch's convention
    is_normalised = False

    def __init__(
        self,
        x_hat: Tensor,
        distance: Distance,
        weight: float,
        event_dim: int,
        values: Any = constraints.real,
        validate_args: bool | None = None,
    ):
        self.x_hat, self.distance, self.weight, self.values = x_hat, distance, weight, values
        axis = x_hat.dim() - event_dim
        super().__init__(x_hat.shape[:axis], x_hat.shape[axis:], validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Any:
        """Any real numbers, or those of the unit interval."""
        return constraints.independent(self.values, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Score":
        """The same score with a larger batch."""
        x_hat = self.x_hat.expand(torch.Size(batch_shape) + self.event_shape)
        return Score(x_hat, self.distance, self.weight, len(self.event_shape), self.values, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """-weight * distance, [*batch]: no log-probability."""
        if self._validate_args:
            self._validate_sample(value)
        x, x_hat = torch.broadcast_tensors(value, self.x_hat)
        batch = torch.Size(x.shape[: x.dim() - len(self.event_shape)])  # TraceGraph_ELBO's tensors give a tuple
        distance = self.distance(x.reshape(-1, *self.event_shape), x_hat.reshape(-1, *self.event_shape))
        if distance.shape != (batch.numel(),):
            raise ValueError(
                f"the distance gave shape {tuple(distance.shape)}, expected ({batch.numel()},), one number for each "
                "example: sum over all axes but the first."
            )
        return -self.weight * distance.reshape(batch)

    @property
    def mean(self) -> Tensor:
        """What the decoder makes of z."""
        return self.x_hat

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Refused: a score is no distribution."""
        raise NotImplementedError("expected a likelihood to draw from, found a comparison, which is none: use .mean.")


class Comparison(Likelihood):
    r"""Any differentiable comparison of pictures in place of a likelihood. No evidence can be claimed from it.

    .. math:: \text{score}(x \mid h) = -\lambda \, d(x, \hat x), \qquad \hat x = \sigma(h) \text{ or } h

    Take it for pictures that please the eye, with a frozen network (:class:`Perceptual`) or
    :func:`structural_dissimilarity`; lambda sets its weight against the KL. exp(-lambda d) is no density, so what is
    maximised is no bound on log p(x), and reports, estimates and ``log_evidence`` say so. There is nothing to draw:
    ``.mean`` shows x_hat. On x in {0, 1}, :func:`binary_cross_entropy` gives the numbers of a Bernoulli likelihood.

    Args:
        distance: (x, x_hat) -> [B], both [B, *E]: a function, or a network such as :class:`Perceptual`.
        weight: lambda > 0.
        bounded: x_hat = sigmoid(h), for x in [0, 1]; False: x_hat = h.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: weight <= 0; a distance that does not give one number for each example.

    Source: for feature spaces Hou, Shen, Sun, Qiu (2017), Deep feature consistent variational autoencoder,
        arXiv:1610.00291.

    Example:
        >>> Comparison(squared_error, bounded=False)(torch.zeros(3, 5, 7)).log_prob(torch.ones(5, 7)).shape
        torch.Size([3, 5])
    """

    is_normalised = False

    def __init__(
        self, distance: Distance = squared_error, weight: float = 1.0, bounded: bool = True, event_dim: int = 1
    ):
        super().__init__(event_dim)
        if not weight > 0:
            raise ValueError(f"expected weight > 0, found {weight}: it multiplies a distance.")
        self.distance, self.weight, self.bounded = distance, weight, bounded

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        name = "" if isinstance(self.distance, nn.Module) else f"distance={getattr(self.distance, '__name__', '?')}, "
        return f"{name}weight={self.weight}, bounded={self.bounded}, {super().extra_repr()}"

    def forward(self, h: Tensor) -> Distribution:
        """The score of x given h; not a distribution."""
        if self.bounded:
            return Score(h.sigmoid(), self.distance, self.weight, self.event_dim, constraints.unit_interval)
        return Score(h, self.distance, self.weight, self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The output whose x_hat is the mean, clipped to [0.001, 0.999] where it is bounded."""
        return mean.clamp(1e-3, 1 - 1e-3).logit() if self.bounded else mean
