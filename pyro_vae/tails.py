r"""How far importance weights can be trusted: their effective sample size and the tail they are drawn from.

Both read log-weights [K, B]: K draws for each of B examples, an estimate being the mean of their exponentials.
"""

import math

import torch
from torch import Tensor

FEWEST_DRAWS = 25  # a fifth of them are the tail, and a tail needs five


def effective_sample_size(log_w: Tensor) -> Tensor:
    r"""The number of equal weights that would be as good as these.

    .. math:: \mathrm{ESS} = \frac{(\sum_k w_k)^2}{\sum_k w_k^2} \in [1, K]

    Kish's formula; large weights that were never drawn do not show in it, so read it with :func:`pareto_k`.

    Args:
        log_w: log-weights, [K, B].

    Returns:
        [B], between 1 and K; nan where every weight is 0.

    Source: Kish (1965), Survey Sampling.

    Example:
        >>> effective_sample_size(torch.tensor([[0.0, 0.0], [0.0, -50.0]]))
        tensor([2., 1.])
    """
    return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()


def standard_error_of_log_mean(log_w: Tensor) -> Tensor:
    r"""The Monte-Carlo standard error of log (1/K) sum_k w_k, to first order in the weights' relative spread.

    .. math:: \mathrm{se} = \frac{1}{\bar w} \sqrt{\frac{\widehat{\operatorname{Var}}(w)}{K}}
        = \sqrt{\frac{K / \mathrm{ESS} - 1}{K - 1}}

    Args:
        log_w: log-weights, [K, B], K >= 2.

    Returns:
        [B], nats. The logarithm is also low by about half its square.

    Example:
        >>> standard_error_of_log_mean(torch.zeros(3, 5))
        tensor([0., 0., 0., 0., 0.])
    """
    relative = (log_w - log_w.logsumexp(0)).exp() * len(log_w)  # of mean 1; K / ESS - 1 would cancel
    return relative.std(0) / math.sqrt(len(log_w))


def tail_length(num_draws: int) -> int:
    """How many of K draws make up the tail: min(K / 5, 3 sqrt(K))."""
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def pareto_k(log_w: Tensor) -> Tensor:
    r"""The shape of the generalised Pareto distribution that fits the largest weights of each example.

    .. math:: P(w > u + t \mid w > u) \approx (1 + k t / \sigma)^{-1/k}

    The weights have finite moments up to 1/k. Below :func:`largest_pareto_k` an estimate and its standard error can be
    trusted; above, the draws that matter most are missing from it: it is too low, and so is its standard error.

    Args:
        log_w: log-weights, [K, B], K >= 25.

    Returns:
        [B]; 0 where the largest weights are all equal, nan where they are not finite.

    Raises:
        ValueError: fewer than 25 draws.

    Source: Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling, arXiv:1507.02646; the fit
        is that of Zhang, Stephens (2009), with the former's prior on k and the finer grid of their software.

    Example:
        >>> u = (torch.arange(1000, dtype=torch.float64).flip(0) + 0.5) / 1000
        >>> pareto_k(torch.stack([-0.3 * u.log(), -1.2 * u.log()], 1)).round(decimals=1)
        tensor([0.3000, 1.1000], dtype=torch.float64)
    """
    num_draws = len(log_w)
    if num_draws < FEWEST_DRAWS:
        raise ValueError(f"expected at least {FEWEST_DRAWS} draws, found {num_draws}: a tail needs five of them.")
    n = tail_length(num_draws)
    top = log_w.double().topk(n + 1, dim=0).values  # descending
    top = (top - top[0]).exp()
    x = (top[:n] - top[n]).flip(0)  # exceedances of the largest weight left out, ascending: [n, B]
    flat = ~(x[-1] > 1e-9)  # rounding errors have no tail; nan counts as flat here
    x = torch.where(flat, torch.linspace(1 / n, 1, n, dtype=x.dtype, device=x.device).unsqueeze(1), x)

    # Profile likelihood of b = -k / sigma on a grid, averaged with the likelihood as weight.
    quartile = x[math.floor(n / 4 + 0.5) - 1].clamp(min=1e-12)
    num_grid = 30 + math.floor(math.sqrt(n))
    steps = torch.arange(1, num_grid + 1, dtype=x.dtype, device=x.device).unsqueeze(1) - 0.5
    b = 1 / x[-1] + (1 - (num_grid / steps).sqrt()) / (3 * quartile)  # [grid, B], all below 1 / max(x)
    k = torch.stack([torch.log1p(-row * x).mean(0) for row in b])
    log_likelihood = n * ((-b / k).log() - k - 1)
    best = (log_likelihood.softmax(0) * b).sum(0)
    fitted = torch.log1p(-best * x).mean(0)
    shrunk = (n * fitted + 10 * 0.5) / (n + 10)  # ten observations' worth of prior at 1/2: tames small K
    return torch.where(flat, torch.where(log_w[0].isfinite(), 0.0, math.nan).to(x), shrunk)


def largest_pareto_k(num_draws: int) -> float:
    r"""The largest k at which K draws still give an estimate to be trusted.

    .. math:: \min(1 - 1 / \log_{10} K, \; 0.7)

    Args:
        num_draws: number of draws K, at least 25.

    Source: Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling, section 3.2.4,
        arXiv:1507.02646.

    Example:
        >>> largest_pareto_k(100), largest_pareto_k(5000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(num_draws), 0.7)
