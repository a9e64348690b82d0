r"""The lines of the derivation, D1 to D15: what each says, why, and both its sides in any world.

.. math:: \log p(x) - \mathrm{KL}(q(z|x) \,\|\, p(z|x)) = \mathbb E_q \log p(x \mid z)
    - \mathrm{KL}(q(z|x) \,\|\, p(z))

Both sides of a line are computed by different routes wherever there are two.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.worlds import World

_ERRORS = 4.0  # standard errors


@dataclass(frozen=True)
class Line:
    """A step of the derivation, evaluated in a world: both sides, averaged over the examples, nats.

    Args:
        step: the step.
        left: the left side, None where it is unknown.
        left_error: its Monte-Carlo standard error, 0 where it is exact.
        right: the right side.
        right_error: its standard error.
        difference: left minus right, averaged; of exact numbers, and of a line that holds at each z, the largest one.
        difference_error: its standard error; draws that the two sides share cancel.
        agrees: whether the relation holds to 4 standard errors and rounding; None: there is nothing to judge.
        note: why there is nothing to judge.
    """

    step: "Step"
    left: float | None = None
    left_error: float = 0.0
    right: float | None = None
    right_error: float = 0.0
    difference: float | None = None
    difference_error: float = 0.0
    agrees: bool | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """In words."""
        open_or_not = "open" if self.note == _BELOW else "does not apply"
        return {True: "agrees", False: "DISAGREES", None: open_or_not}[self.agrees]

    def to_dict(self) -> dict[str, Any]:
        """The line as plain Python, for JSON."""
        step = {"key": self.step.key, "formula": self.step.formula, "relation": self.step.relation}
        return step | {key: value for key, value in asdict(self).items() if key != "step"} | {"verdict": self.verdict}


@dataclass(frozen=True)
class Step:
    """One line of the derivation.

    A side is what a world has for it: a number of each example [B]; or what it is the expectation of under q, [K, B],
    or one for each latent dimension, [K, B, D].

    Args:
        key: its name, "D1".
        formula: the line in plain text.
        latex: the line in LaTeX.
        reason: why it follows, in a sentence.
        left: the left side in a world.
        right: the right side in a world.
        left_needs: quantities of the world without which the left side is unknown.
        right_needs: the same for the right side.
        relation: "=" or ">=".
        pointwise: the line is claimed, and judged, at each z.

    Example:
        >>> from pyro_vae import worlds
        >>> print(STEPS[0].evaluate(worlds.finite()).verdict)
        agrees
    """

    key: str
    formula: str
    latex: str
    reason: str
    left: Callable[[Any], Tensor]
    right: Callable[[Any], Tensor]
    left_needs: tuple[str, ...] = ()
    right_needs: tuple[str, ...] = ()
    relation: str = "="
    pointwise: bool = False

    def evaluate(self, world: World) -> Line:
        """Both sides in a world, and whether they agree."""
        unknown = {name for name in (*self.left_needs, *self.right_needs) if getattr(world, name) is None}
        left = None if unknown & set(self.left_needs) else self.left(world)
        right = None if unknown & set(self.right_needs) else self.right(world)
        shown: dict[str, Any] = {}
        for name, side in (("left", left), ("right", right)):
            if side is not None:
                value, error = _mean(world, side)
                shown |= {name: value.mean().item(), f"{name}_error": _combined(error)}
        if left is None or right is None:
            return Line(self, **shown, note=_WHY_OPEN[min(unknown, key=list(_WHY_OPEN).index)])

        allowed = world.tolerance * (1 + abs(shown["left"]))
        if {"log_evidence", "log_posterior", "kl_to_posterior"} & {*self.left_needs, *self.right_needs}:
            allowed += world.quadrature_error
        if self.pointwise:
            each = (left - right).flatten()
            worst = each[each.abs().nan_to_num(nan=math.inf).argmax()].item()
            return Line(self, **shown, difference=worst, agrees=abs(worst) <= allowed)
        if left.shape == right.shape or min(left.dim(), right.dim()) == 1:  # draws that both sides share cancel
            difference, error = _mean(world, left - right)
        else:
            (a, a_error), (b, b_error) = _mean(world, left), _mean(world, right)
            difference, error = a - b, (a_error**2 + b_error**2).sqrt()
        mean, mean_error = difference.mean().item(), _combined(error)
        allowed += _ERRORS * mean_error
        if world.weight is not None and self.relation == "=":  # exact: example by example
            mean = difference[difference.abs().nan_to_num(nan=math.inf).argmax()].item()
        agrees = mean >= -allowed if self.relation == ">=" else abs(mean) <= allowed
        if self.relation == ">=" and world.weight is not None:
            agrees = bool((difference >= -allowed).all())
        return Line(self, **shown, difference=mean, difference_error=mean_error, agrees=agrees)


def _mean(world: World, side: Tensor) -> tuple[Tensor, Tensor]:
    """The expectation of a side for each example and its Monte-Carlo standard error, both [B]."""
    side = side.mean(-1) if side.dim() == 3 else side
    if side.dim() == 1:
        return side, torch.zeros_like(side)
    if world.weight is not None:
        value = torch.where(world.weight == 0, 0.0, world.weight * side).sum(0)
        return value, torch.zeros_like(value)
    return side.mean(0), side.std(0) / math.sqrt(len(side))


def _combined(error: Tensor) -> float:
    """The standard error of the mean over the examples."""
    return (error.square().sum().sqrt() / len(error)).item()


# Notation of the Gaussian lines: q = N(m, S), S = L L^T; standard deviations s where S is diagonal.


def _matrix_kl(world: Any) -> Tensor:
    loc, factor = world.standard
    covariance = factor @ factor.mT
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (trace + (loc**2).sum(-1) - loc.shape[-1] - torch.logdet(covariance))


def _log_product(values: Tensor) -> Tensor:
    """The logarithm of the product over the last axis, kept from underflow by taking out the powers of two."""
    mantissa, exponent = torch.frexp(values)
    return mantissa.prod(-1).log() + exponent.sum(-1).to(values) * math.log(2)


def _product_kl(world: Any) -> Tensor:
    loc, scale = world.diagonal
    ones = torch.ones_like(loc).sum(-1)
    return 0.5 * ((scale**2).sum(-1) + (loc**2).sum(-1) - ones - _log_product(scale**2))


def _summed_kl(world: Any) -> Tensor:
    loc, scale = world.diagonal
    return 0.5 * (scale**2 + loc**2 - 1 - (scale**2).log()).sum(-1)


def _log_variance_kl(world: Any) -> Tensor:
    loc, scale = world.diagonal
    return kl_of_log_variance(loc, 2 * scale.log())


def kl_of_log_variance(loc: Tensor, log_variance: Tensor) -> Tensor:
    r"""KL(N(m, diag s^2) || N(0, I)) from l = log s^2, the form that no variance can underflow in (line D13).

    .. math:: \tfrac 1 2 \sum_d (e^{l_d} + m_d^2 - 1 - l_d)

    Args:
        loc: m, [*batch, D].
        log_variance: l, [*batch, D].

    Returns:
        [*batch], nats, >= 0.
    """
    return 0.5 * (log_variance.exp() + loc**2 - 1 - log_variance).sum(-1)


def _restored(world: Any) -> Tensor:
    loc, factor = world.normal
    standardised = torch.linalg.solve_triangular(factor, (world.z - loc).unsqueeze(-1), upper=False)
    return loc + (factor @ standardised).squeeze(-1)


def _log_density_of_noise(world: Any) -> Tensor:
    loc, factor = world.normal
    noise = torch.linalg.solve_triangular(factor, (world.z - loc).unsqueeze(-1), upper=False).squeeze(-1)
    log_noise = -0.5 * (noise**2 + math.log(2 * math.pi)).sum(-1)
    return log_noise - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


_BELOW = "log p(x) is known from below only, and with it p(z|x)"
_WHY_OPEN = {  # the first that is missing is named
    "log_evidence": _BELOW,
    "log_integral": _BELOW,
    "log_posterior": _BELOW,
    "kl_to_posterior": _BELOW,
    "kl_integral": _BELOW,
    "z": "needs a z of real numbers",
    "normal": "needs a normal q",
    "standard": "needs a normal q and the prior N(0, I)",
    "diagonal": "needs a diagonal normal q and the prior N(0, I)",
}

_KL_POST, _KL_PRIOR = "KL(q(z|x) || p(z|x))", "KL(q(z|x) || p(z))"
_KL_POST_TEX = r"\mathrm{KL}(q(z|x) \,\Vert\, p(z|x))"
_KL_PRIOR_TEX = r"\mathrm{KL}(q(z|x) \,\Vert\, p(z))"

STEPS: tuple[Step, ...] = (
    Step(
        "D1",
        "log p(x) = log ∫ p(x|z) p(z) dz",
        r"\log p(x) = \log \int\, p(x|z)\, p(z)\, dz",
        "Any z can have made x: the joint p(x, z) = p(x|z) p(z), integrated over z (summed, where z is discrete).",
        left=lambda w: w.log_evidence,
        right=lambda w: w.log_integral,
        left_needs=("log_evidence",),
        right_needs=("log_integral",),
    ),
    Step(
        "D2",
        f"{_KL_POST} = ∫ q(z|x) log [q(z|x) / p(z|x)] dz",
        _KL_POST_TEX + r" = \int\, q(z|x)\, \log \frac{q(z|x)}{p(z|x)}\, dz",
        "The definition: never negative, 0 only for q(z|x) = p(z|x), and no distance: swapped, it is another number.",
        left=lambda w: w.kl_to_posterior,
        right=lambda w: w.kl_integral,
        left_needs=("kl_to_posterior",),
        right_needs=("kl_integral",),
    ),
    Step(
        "D3",
        f"{_KL_POST} = E_q[log q(z|x) - log p(z|x)]",
        _KL_POST_TEX + r" = \mathbb{E}_q[\log q(z|x) - \log p(z|x)]",
        "An integral against q is an expectation under q, and the logarithm of a ratio is a difference.",
        left=lambda w: w.kl_integral,
        right=lambda w: w.log_qz - w.log_posterior,
        left_needs=("kl_integral",),
        right_needs=("log_posterior",),
    ),
    Step(
        "D4",
        "log p(z|x) = log p(x|z) + log p(z) - log p(x)",
        r"\log p(z|x) = \log p(x|z) + \log p(z) - \log p(x)",
        "Bayes' rule, at each z: it brings in what the model is made of.",
        left=lambda w: w.log_posterior,
        right=lambda w: w.log_px + w.log_pz - w.log_evidence,
        left_needs=("log_posterior",),
        right_needs=("log_evidence",),
        pointwise=True,
    ),
    Step(
        "D5",
        "log q(z|x) - log p(z|x) = log q(z|x) - log p(x|z) - log p(z) + log p(x)",
        r"\log q(z|x) - \log p(z|x) = \log q(z|x) - \log p(x|z) - \log p(z) + \log p(x)",
        "Bayes' rule, put into the bracket of D3, at each z.",
        left=lambda w: w.log_qz - w.log_posterior,
        right=lambda w: w.log_qz - w.log_px - w.log_pz + w.log_evidence,
        left_needs=("log_posterior",),
        right_needs=("log_evidence",),
        pointwise=True,
    ),
    Step(
        "D6",
        "E_q[log p(x)] = log p(x)",
        r"\mathbb{E}_q[\log p(x)] = \log p(x)",
        "log p(x) leaves the expectation: log p(x|z) + log p(z) - log p(z|x) is the same number at each z.",
        left=lambda w: w.log_px + w.log_pz - w.log_posterior,
        right=lambda w: w.log_evidence,
        left_needs=("log_posterior",),
        right_needs=("log_evidence",),
        pointwise=True,
    ),
    Step(
        "D7",
        f"{_KL_POST} - log p(x) = E_q[log q(z|x) - log p(x|z) - log p(z)]",
        _KL_POST_TEX + r" - \log p(x) = \mathbb{E}_q[\log q(z|x) - \log p(x|z) - \log p(z)]",
        "D3 with D5 and D6: what can be computed is on the right, what cannot on the left.",
        left=lambda w: w.kl_to_posterior - w.log_evidence,
        right=lambda w: w.log_qz - w.log_px - w.log_pz,
        left_needs=("kl_to_posterior", "log_evidence"),
    ),
    Step(
        "D8",
        f"log p(x) - {_KL_POST} = E_q[log p(x|z)] - E_q[log q(z|x) - log p(z)]",
        r"\log p(x) - " + _KL_POST_TEX + r" = \mathbb{E}_q[\log p(x|z)] - \mathbb{E}_q[\log q(z|x) - \log p(z)]",
        "Signs changed, and the terms grouped.",
        left=lambda w: w.log_evidence - w.kl_to_posterior,
        right=lambda w: w.log_px - (w.log_qz - w.log_pz),
        left_needs=("kl_to_posterior", "log_evidence"),
    ),
    Step(
        "D9",
        f"log p(x) - {_KL_POST} = E_q[log p(x|z)] - {_KL_PRIOR}",
        r"\log p(x) - " + _KL_POST_TEX + r" = \mathbb{E}_q[\log p(x|z)] - " + _KL_PRIOR_TEX,
        "The second expectation is the KL to the prior, which has a formula; the one on the left, to the posterior, "
        "has none.",
        left=lambda w: w.log_evidence - w.kl_to_posterior,
        right=lambda w: w.log_px - w.kl_or_draws,
        left_needs=("kl_to_posterior", "log_evidence"),
    ),
    Step(
        "D9b",
        f"log p(x) ≥ E_q[log p(x|z)] - {_KL_PRIOR}",
        r"\log p(x) \geq \mathbb{E}_q[\log p(x|z)] - " + _KL_PRIOR_TEX,
        "KL(q(z|x) || p(z|x)) is never negative: the right side, the ELBO, is a lower bound, and the gap is that KL.",
        left=lambda w: w.highest_evidence,
        right=lambda w: w.log_px - w.kl_or_draws,
        relation=">=",
    ),
    Step(
        "D10",
        f"{_KL_PRIOR} = ½ (tr S + mᵀm - D - log det S)",
        _KL_PRIOR_TEX + r" = \frac{1}{2} (\mathrm{tr}\, S + m^{\mathsf{T}} m - D - \log \det S)",
        "For normal q(z|x) = N(m, S) and p(z) = N(0, I) the integral has this form; D is the dimension of z.",
        left=lambda w: w.kl_or_draws,
        right=_matrix_kl,
        right_needs=("standard",),
    ),
    Step(
        "D11",
        f"{_KL_PRIOR} = ½ (Σ s² + Σ m² - Σ 1 - log Π s²)",
        _KL_PRIOR_TEX + r" = \frac{1}{2} (\sum_d s_d^2 + \sum_d m_d^2 - \sum_d 1 - \log \prod_d s_d^2)",
        "S = diag(s²): its trace is a sum, its determinant a product.",
        left=lambda w: w.kl_or_draws,
        right=_product_kl,
        right_needs=("diagonal",),
    ),
    Step(
        "D12",
        f"{_KL_PRIOR} = ½ Σ (s² + m² - 1 - log s²)",
        _KL_PRIOR_TEX + r" = \frac{1}{2} \sum_d (s_d^2 + m_d^2 - 1 - \log s_d^2)",
        "The logarithm of a product is a sum: each latent dimension has its own term.",
        left=_product_kl,
        right=_summed_kl,
        left_needs=("diagonal",),
        right_needs=("diagonal",),
    ),
    Step(
        "D13",
        f"{_KL_PRIOR} = ½ Σ (exp l + m² - 1 - l),  l = log s²",
        _KL_PRIOR_TEX + r" = \frac{1}{2} \sum_d (e^{l_d} + m_d^2 - 1 - l_d), \quad l_d = \log s_d^2",
        "The network gives l, which may be any number: no variance has to be kept positive, and none underflows.",
        left=_summed_kl,
        right=_log_variance_kl,
        left_needs=("diagonal",),
        right_needs=("diagonal",),
    ),
    Step(
        "D14",
        "z = m + L z_std,  z_std = L⁻¹ (z - m),  S = L Lᵀ",
        r"z = m + L\, z_{\mathrm{std}}, \quad z_{\mathrm{std}} = L^{-1} (z - m), \quad S = L L^{\mathsf{T}}",
        "A normal variable can be standardised, and the standardising reverted; L is a square root of S.",
        left=lambda w: w.z,
        right=_restored,
        left_needs=("z",),
        right_needs=("normal",),
        pointwise=True,
    ),
    Step(
        "D15",
        "z = m(x) + L(x) ε,  ε ~ N(0, I):  log q(z|x) = log N(ε; 0, I) - log det L(x)",
        r"z = m(x) + L(x)\, \varepsilon, \quad \varepsilon \sim \mathcal{N}(0, I): \quad "
        r"\log q(z|x) = \log \mathcal{N}(\varepsilon; 0, I) - \log \det L(x)",
        "So z is drawn: noise that has no parameters, moved and stretched; gradients reach m and L through z.",
        left=lambda w: w.log_qz,
        right=_log_density_of_noise,
        right_needs=("normal",),
        pointwise=True,
    ),
)
