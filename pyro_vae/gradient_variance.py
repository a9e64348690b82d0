r"""How noisy a gradient is: its mean, variance and signal-to-noise ratio, for any objective, model and guide.

.. math:: \mathrm{SNR} = \frac{\|\mathbb E \, g\|}{\sqrt{\operatorname{tr} \operatorname{Cov} g}}, \qquad
    g = \nabla \, \widehat{\mathrm{objective}}

Two small cases where the answer is known exactly stand beside it: the gradient of E |z|^2, for which pathwise and
score-function estimators have variances 4 and (d + 2)(d + 4), and the model of Rainforth et al., on which tighter
bounds drown the gradient of the encoder.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.infer
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyro_vae.contracts import Distribution, Encoder, Prior, untouched
from pyro_vae.objectives import Objective
from pyro_vae.vae import VAE

_MOST_BLOCKS = 25  # of repeats, for standard errors: sums of gradients are kept for each


@dataclass(frozen=True)
class GradientMoments:
    """Moments of one group of parameters' gradient, estimated from independent repeats.

    Standard errors are those of a jackknife over blocks of repeats.

    Args:
        group: name of the parameters: "encoder", "decoder", "prior".
        mean: mean gradient, [P], of the objective per example.
        variance: variance of each entry, [P].
        repeats: number R of independent gradients.
        block_sums: sums of the gradients over blocks of repeats, [G, P].
        block_squares: sums of their squared norms, [G].
        block_sizes: repeats in each block, [G].
    """

    group: str
    mean: Tensor
    variance: Tensor
    repeats: int
    block_sums: Tensor
    block_squares: Tensor
    block_sizes: Tensor

    @property
    def mean_error(self) -> Tensor:
        """Standard error of each entry of the mean, [P]."""
        return (self.variance / self.repeats).sqrt()

    @property
    def total_variance(self) -> float:
        """The trace of the covariance: the sum of the entries' variances."""
        return self._statistics(slice(None))[0]

    @property
    def total_variance_error(self) -> float:
        """Its standard error."""
        return self._jackknife(0)

    @property
    def signal(self) -> float:
        """Norm of the expected gradient, corrected for the noise that is left in the mean; 0 where noise hides it."""
        return self._statistics(slice(None))[1]

    @property
    def signal_error(self) -> float:
        """Its standard error."""
        return self._jackknife(1)

    @property
    def signal_to_noise(self) -> float:
        """The signal over the root of the total variance."""
        return self._statistics(slice(None))[2]

    @property
    def signal_to_noise_error(self) -> float:
        """Its standard error."""
        return self._jackknife(2)

    def _statistics(self, blocks: Any) -> tuple[float, float, float]:
        """Total variance, signal and signal-to-noise ratio of some blocks."""
        count = self.block_sizes[blocks].sum().item()
        mean = self.block_sums[blocks].sum(0) / count
        variance = (self.block_squares[blocks].sum() - count * mean.square().sum()) / (count - 1)
        signal = (mean.square().sum() - variance / count).clamp(min=0).sqrt()
        return variance.item(), signal.item(), (signal / variance.clamp(min=1e-300).sqrt()).item()

    def _jackknife(self, which: int) -> float:
        """Standard error of one of the three, leaving out a block at a time."""
        blocks = torch.arange(len(self.block_sizes))
        left_out = torch.tensor([self._statistics(blocks[blocks != g])[which] for g in blocks.tolist()])
        return math.sqrt((len(blocks) - 1) * left_out.double().var(correction=0).item())


def gradient_variance(
    objective: pyro.infer.ELBO, vae: Any, x: Tensor, repeats: int = 100, *, seed: int = 0
) -> dict[str, GradientMoments]:
    r"""Mean, variance and signal-to-noise ratio of an objective's gradient, for each group of parameters.

    .. math:: \bar g = \frac 1 R \sum_r g_r, \qquad \operatorname{tr} \hat{\operatorname{Cov}} g =
        \frac{1}{R - 1} \sum_r \|g_r - \bar g\|^2

    The same x in every repeat: only the draws of z differ. The gradient is that of the objective (to be maximised) per
    example. Nothing is trained: parameters, their gradients, the random state and train/eval modes are put back; the
    model is in evaluation mode. Memory: some 25 times the parameters.

    Args:
        objective: an objective of this library or of ``pyro.infer``.
        vae: any module with ``model`` and ``guide``; a group is the first part of a parameter's name.
        x: data, [B, *E].
        repeats: number R of independent gradients, >= 3.
        seed: seed of the draws.

    Returns:
        The moments of each group that has trainable parameters, by name.

    Raises:
        ValueError: repeats < 3, or nothing to train.

    Source: Rainforth et al. (2018), Tighter variational bounds are not necessarily better, arXiv:1802.04537, on the
        signal-to-noise ratio (theirs is of each parameter by itself: ``abs(mean) / variance ** 0.5``).

    Example:
        >>> from pyro_vae import ELBO, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> moments = gradient_variance(ELBO(), vae, torch.ones(5, 7), repeats=50)
        >>> sorted(moments), moments["encoder"].total_variance > 0
        (['decoder', 'encoder'], True)
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 3:
        raise ValueError(f"expected repeats to be an integer >= 3, found {repeats!r}: a variance needs several.")
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in vae.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(name.split(".")[0], []).append(parameter)
    if not groups:
        raise ValueError("expected a model with parameters to train, found none that require gradients.")
    num_blocks = min(_MOST_BLOCKS, repeats)
    sizes = torch.bincount(torch.arange(repeats) % num_blocks).double()
    totals = {}
    for name, parameters in groups.items():
        like, count = parameters[0], sum(p.numel() for p in parameters)
        zeros = torch.zeros(num_blocks + 1, count, dtype=torch.float64, device=like.device)  # the last row: squares
        totals[name] = zeros, zeros.new_zeros(num_blocks)
    before = [(p, p.grad) for parameters in groups.values() for p in parameters]
    try:
        with untouched(vae, seed), torch.enable_grad():
            for r in range(repeats):
                for p, _ in before:
                    p.grad = None
                _backward(objective, vae, x)
                for name, parameters in groups.items():
                    sums, squares = totals[name]
                    gradient = -torch.cat([_gradient(p) for p in parameters]) / len(x)
                    sums[r % num_blocks] += gradient
                    sums[-1] += gradient.square()
                    squares[r % num_blocks] += gradient.square().sum()
    finally:
        for p, kept in before:
            p.grad = kept
    result = {}
    for name, (sums, squares) in totals.items():
        mean = sums[:-1].sum(0) / repeats
        variance = ((sums[-1] - repeats * mean.square()) / (repeats - 1)).clamp(min=0)
        block_sizes = sizes.to(sums.device)
        result[name] = GradientMoments(name, mean, variance, repeats, sums[:-1], squares, block_sizes)
    return result


def _backward(objective: pyro.infer.ELBO, vae: Any, x: Tensor) -> None:
    """Leave the gradient of the loss; a schedule's count of steps stays."""
    if isinstance(objective, Objective):
        loss = objective.differentiable_loss(vae.model, vae.guide, x)
        if loss.requires_grad:
            loss.backward()
    else:
        objective.loss_and_grads(vae.model, vae.guide, x)  # type: ignore[attr-defined]  # each subclass has it


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().flatten().double()


def signal_to_noise(signal: GradientMoments, noise: GradientMoments) -> tuple[float, float]:
    """The signal-to-noise ratio of one estimator, its signal taken from a quieter one of the same gradient.

    Args:
        signal: moments of an estimator with little noise, such as ``DReG``'s; from other draws.
        noise: moments of the estimator in question, such as ``IWAE``'s.

    Returns:
        The ratio and its standard error.
    """
    ratio = signal.signal / math.sqrt(noise.total_variance)
    of_signal = signal.signal_error / max(signal.signal, 1e-300)
    return ratio, ratio * math.hypot(of_signal, 0.5 * noise.total_variance_error / noise.total_variance)


def log_log_slope(sizes: Sequence[float], values: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    r"""The exponent of a power law through points with errors, and its standard error.

    .. math:: \log y \approx a + b \log K \qquad \text{weighted by } (y / \operatorname{error})^2

    Args:
        sizes: K, positive, at least two of them.
        values: y, positive.
        errors: their standard errors, positive.

    Returns:
        b and its standard error.

    Raises:
        ValueError: fewer than two points, or one that is not positive.

    Example:
        >>> slope, error = log_log_slope([1, 4, 16], [3.0, 1.5, 0.75], [0.1, 0.1, 0.1])
        >>> round(slope, 6)
        -0.5
    """
    if len(sizes) < 2 or not all(value > 0 for value in [*sizes, *values, *errors]):
        raise ValueError(f"expected at least two points, all positive, found {list(zip(sizes, values, strict=True))}.")
    u, v, e = (torch.tensor(numbers, dtype=torch.float64) for numbers in (sizes, values, errors))
    weight, u, v = (v / e) ** 2, u.log(), v.log()
    u = u - (weight * u).sum() / weight.sum()
    information = (weight * u**2).sum()
    return ((weight * u * v).sum() / information).item(), information.rsqrt().item()


# ------------------------------------------------------------------------------------- E |z|^2, known exactly


def pathwise_gradients(f: Callable[[Tensor], Tensor], loc: Tensor, num_draws: int) -> Tensor:
    r"""Draws of the pathwise estimator of the gradient of E f(z), z ~ N(loc, I): it differentiates f.

    .. math:: \nabla_m \mathbb E f(z) = \mathbb E \, \nabla f(m + \epsilon), \qquad \epsilon \sim \mathcal N(0, I)

    Args:
        f: z [S, D] -> [S].
        loc: m, [D].
        num_draws: S.

    Returns:
        [S, D]; each row is unbiased.

    Source: Kingma, Welling (2014), section 2.4, arXiv:1312.6114.
    """
    z = (loc.detach() + torch.randn(num_draws, len(loc), dtype=loc.dtype, device=loc.device)).requires_grad_()
    return torch.autograd.grad(f(z).sum(), z)[0]


def score_gradients(f: Callable[[Tensor], Tensor], loc: Tensor, num_draws: int, baseline: float = 0.0) -> Tensor:
    r"""Draws of the score-function estimator of the same gradient: f is only evaluated, z never differentiated.

    .. math:: \nabla_m \mathbb E f(z) = \mathbb E \, (f(z) - b) \, \nabla_m \log \mathcal N(z; m, I) =
        \mathbb E \, (f(z) - b) (z - m)

    Args:
        f: z [S, D] -> [S].
        loc: m, [D].
        num_draws: S.
        baseline: the constant b.

    Returns:
        [S, D]; each row is unbiased.

    Source: Williams (1992), Simple statistical gradient-following algorithms.
    """
    with torch.no_grad():
        noise = torch.randn(num_draws, len(loc), dtype=loc.dtype, device=loc.device)
        return (f(loc + noise) - baseline).unsqueeze(-1) * noise


def squared_norm_variances(dim: int) -> dict[str, float]:
    r"""Exact variances of the estimators of the gradient in m_1 of E |z|^2 at m = 0.

    .. math:: 4, \qquad (d + 2)(d + 4), \qquad 2 d + 8

    Args:
        dim: d.

    Returns:
        "pathwise", "score function", and "score function, baseline E f".

    Source: moments of the normal distribution.

    Example:
        >>> squared_norm_variances(10)
        {'pathwise': 4.0, 'score function': 168.0, 'score function, baseline E f': 28.0}
    """
    return {
        "pathwise": 4.0,
        "score function": float((dim + 2) * (dim + 4)),
        "score function, baseline E f": float(2 * dim + 8),
    }


# --------------------------------------------------------------------------------- tighter bounds, noisier encoder


class _Loc(Prior):
    """z ~ N(loc, I)."""

    def __init__(self, loc: Tensor):
        super().__init__()
        self.loc = nn.Parameter(loc)

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return dist.Normal(self.loc, 1.0).to_event(1)


class _Affine(Encoder):
    """z ~ N(A x + b, 2/3 I): wider than the true posterior, so that weights have all their moments."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        return dist.Normal(x @ self.weight.T + self.bias, math.sqrt(2 / 3)).to_event(1)


def _unit_normal(z: Tensor) -> Distribution:
    """Decode z as N(z, I)."""
    return dist.Normal(z, 1.0).to_event(1)


def tighter_bounds_toy(
    dim: int = 20, num_examples: int = 64, distance: float = 0.1, seed: int = 0
) -> tuple[VAE, Tensor]:
    r"""The Gaussian model on which the signal of the encoder's gradient falls with the number of particles.

    .. math:: z \sim \mathcal N(\mu, I), \quad x \mid z \sim \mathcal N(z, I), \quad
        q(z \mid x) = \mathcal N(A x + b, \tfrac 2 3 I)

    The best is A = I/2, b = mu/2, and mu the mean of the data; all three start ``distance`` away (a normal draw).
    Under the IWAE bound the signal-to-noise ratio grows like K^(1/2) for mu and falls like K^(-1/2) for A and b.

    Args:
        dim: dimension of x and z.
        num_examples: size of the data set.
        distance: standard deviation of each parameter's distance from its optimum.
        seed: seed of data and parameters; the global random state is untouched.

    Returns:
        The VAE (groups "prior" with mu, "encoder" with A and b) and x, [num_examples, dim], both float64.

    Source: Rainforth et al. (2018), Tighter variational bounds are not necessarily better, arXiv:1802.04537, the
        Gaussian example.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(dim) + math.sqrt(2) * normal(num_examples, dim)
    loc = x.mean(0)
    encoder = _Affine(
        0.5 * torch.eye(dim, dtype=torch.float64) + distance * normal(dim, dim) / math.sqrt(dim),
        0.5 * loc + distance * normal(dim),
    )
    return VAE(_Loc(loc + distance * normal(dim)), _unit_normal, encoder, name="toy"), x
