"""What values a distribution has: single numbers, classes, bits, points of a simplex, or no density at all."""

from typing import Any

import torch
from torch import Tensor

from pyro_vae.contracts import Distribution

NO_LIKELIHOOD = "no normalised likelihood: no evidence can be claimed"
"""What every report of a score in the place of p(x | z) says; see :mod:`pyro_vae.comparisons`."""


def elements(p: Any) -> Any:
    """The distribution of the single numbers, without the ``to_event`` around it."""
    while isinstance(p, torch.distributions.Independent):
        p = p.base_dist
    return p


def is_normalised(p: Any) -> bool:
    """Whether p is a distribution, and no score in the place of one (:mod:`pyro_vae.comparisons`)."""
    return getattr(elements(p), "is_normalised", True)


def require_likelihood(p: Any) -> None:
    """Refuse a score in the place of p(x | z): what would be claimed from it is about p(x), and there is none.

    Args:
        p: what the decoder gives.

    Raises:
        ValueError: p is no distribution over x.
    """
    if not is_normalised(p):
        raise ValueError(
            f"expected a likelihood, found a score in the place of p(x | z) ({NO_LIKELIHOOD}): use a likelihood."
        )


def element_support(p: Any) -> Any:
    """The support of the single numbers of x."""
    support = elements(p).support
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    return support


def plain_support(d: Distribution) -> Any:
    """What kind of numbers a distribution draws: its support without what independence or a mixture wrap around it."""
    support = element_support(d)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def kind_of_values(d: Distribution) -> str:
    """What its draws are, in words: "one-hot vectors", "bits", "integers", "real numbers", ..."""
    support = plain_support(d)
    kinds = {"_OneHot": "one-hot vectors", "_Boolean": "bits", "_Simplex": "the simplex", "_Sphere": "the unit sphere"}
    return kinds.get(type(support).__name__, "integers" if support.is_discrete else "real numbers")


def is_discrete(d: Distribution) -> bool:
    """Whether it is over classes, bits or counts; a distribution that does not say counts as continuous."""
    try:
        return bool(plain_support(d).is_discrete)
    except NotImplementedError:
        return False


def is_real(d: Distribution) -> bool:
    """Whether it is over all of R^D; a distribution that does not say counts as such."""
    real = torch.distributions.constraints.real, torch.distributions.constraints.real_vector
    try:
        return plain_support(d) in real
    except NotImplementedError:
        return True


def code(q: Distribution) -> Tensor:
    """The z that stands for q(z | x): its mean; its mode where z is discrete or on the sphere, where a mean is none."""
    try:
        kind = kind_of_values(q)
    except NotImplementedError:
        return q.mean
    return q.mean if kind in ("real numbers", "the simplex") else q.mode


_SUPPORT_REMEDY = {
    "Boolean": (
        "{0, 1}",
        "binarise it (datasets.binarize) or use ContinuousBernoulli (grey in [0, 1]) or Binomial (counts)",
    ),
    "Interval": ("its interval", "rescale it (bytes / 255) or use a likelihood with a wider support"),
    "IntegerInterval": (
        "the integers 0..{hi}",
        "give counts, raise total_count, or use a likelihood for real numbers",
    ),
    "IntegerGreaterThan": ("the integers 0, 1, 2, ...", "give counts or use a likelihood for real numbers"),
}
NO_GAPS = (
    "x has {} values that are NaN, expected finite numbers: fill them in, or, where NaN means missing, wrap the "
    "likelihood in likelihoods.Masked (--likelihood Masked --likelihood.likelihood CLASS)."
)


def check_support(p: Distribution, x: Tensor) -> None:
    """Refuse data that the likelihood gives no probability, naming one offending value.

    Args:
        p: a distribution over x with batch shape [B] or [1].
        x: data, [B, *E].

    Raises:
        ValueError: some value of x lies outside the support of p.
    """
    support = element_support(p)
    inside = support.check(x)
    if bool(inside.all()):
        return
    outside = x[~inside] if inside.shape == x.shape else x
    found = float(outside.flatten()[0])
    if bool(outside.isnan().any()):
        raise ValueError(NO_GAPS.format(int(x.isnan().sum())))
    place, may_miss = "", ""
    while hasattr(support, "base_constraint"):  # what a mixture, or missing numbers, wrap around it
        may_miss = " or NaN" if bool(support.check(torch.full_like(x, float("nan"))).all()) else may_miss
        support = support.base_constraint
    if isinstance(support, torch.distributions.constraints.stack):  # columns of different kinds
        column = int((~inside).flatten(0, -2).any(0).nonzero()[0])
        found, place = float(x[..., column][~inside[..., column]][0]), f" in column {column}"
        support = support.cseq[column]
    kind = type(support).__name__.removeprefix("_")
    where, remedy = _SUPPORT_REMEDY.get(kind, (f"the support {support}", "choose a likelihood that allows it"))
    if kind == "Interval":
        low, high = (float(torch.as_tensor(b).flatten()[0]) for b in (support.lower_bound, support.upper_bound))
        where = f"[{low:g}, {high:g}]"
    if kind == "IntegerInterval":
        where = where.format(hi=int(torch.as_tensor(support.upper_bound).max()))
    raise ValueError(f"x has values outside {where}{may_miss}{place} (found {found:.4g}): {remedy}.")
