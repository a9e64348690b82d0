"""A density against its own draws: mass, mean, covariance, entropy and score by log_prob and by sample.

The machinery behind :func:`pyro_vae.testing.check_distribution`.
"""

import math
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta, MultivariateStudentT
from pyro.distributions.constraints import sphere
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.supports import elements

ERRORS = 5.0  # standard errors
_MAX_NUMBERS = 4096  # in one batch; the checks take some thousand draws of it


def require(ok: bool, message: str) -> None:
    """An AssertionError unless it holds."""
    if not ok:
        raise AssertionError(message)


def expect(name: str, what: str, found: Any, expected: Any, remedy: str = "look for an axis too many") -> None:
    """An AssertionError that says what was found and expected, unless the two are equal."""
    require(found == expected, f"{name} has {what} {found}, expected {expected}: {remedy}.")


class _Points(NamedTuple):
    """Points z [N, *batch, *event] with weights [N, *batch] such that sums over N are integrals of the density."""

    z: Tensor
    log_p: Tensor
    weight: Tensor
    is_random: bool


def check_density(d: Any, name: str, num_samples: int) -> None:
    """Check that a distribution is normalised and samples what it scores.

    Args:
        d: the distribution.
        name: how messages name it.
        num_samples: number of draws, fewer for large shapes.
    """
    base = elements(d)
    if isinstance(base, Delta):
        return  # a point mass has no density
    if hasattr(base, "parts"):  # columns of different kinds: each kind by itself
        z = base.sample((num_samples // 4,))
        whole = base.log_prob(z).sum(-1)
        require(torch.allclose(d.log_prob(z), whole), f"log_prob of {name} is not the sum over its columns.")
        _check_independence(z.reshape(len(z), -1, 1), name)
        for part in base.parts:
            check_density(part, name, num_samples)
        return
    batch, event = base.batch_shape.numel(), base.event_shape.numel()
    require(
        batch * event <= _MAX_NUMBERS,
        f"{name} has {batch * event} numbers, expected at most {_MAX_NUMBERS} for a check: use a smaller batch.",
    )
    num_samples = int(min(num_samples, max(1000, 4e6 / (batch * event**2))))
    z = base.sample((num_samples,))
    log_p = base.log_prob(z)
    whole = log_p.reshape(num_samples, *d.batch_shape, -1).sum(-1)
    require(
        torch.allclose(d.log_prob(z), whole),
        f"log_prob of {name} is not the sum over its independent numbers: sum over the event axes.",
    )
    z = z.to(log_p.dtype)
    points: _Points | None
    support: Any = base.support
    while hasattr(support, "base_constraint") and not isinstance(support, constraints.independent):
        support = support.base_constraint  # what a mixture wraps around its components' support
    if support.is_discrete:
        _compare(_enumerate(base, z, support, name), z, log_p, name)
    elif support is sphere:
        points = _on_sphere(base, z)
        _check_stein_on_sphere(base, z, name)
        if points is not None:
            _compare(points, z, log_p, name)
    else:
        density = _Density(base, support, z[0])
        u = biject_to(support).inv(z).reshape(num_samples, *base.batch_shape, -1)
        spread = bool((u.std(0) > 0).all())
        require(spread, f"{name} draws the same again and again, expected a density: use Delta for a point mass.")
        limits = limits_of(z)
        z = z.clamp(*limits)
        if u.shape[-1] <= 2:
            points = _grid(density, u, name)
        else:
            _check_stein(density, u, name)
            points = _importance(density, u)
        if points is not None:
            _compare(points._replace(z=points.z.clamp(*limits)), z, log_p, name)
    _check_independence(z.reshape(num_samples, batch, event), name)


def limits_of(z: Tensor) -> tuple[Tensor, Tensor]:
    """Limits far outside the bulk of the draws z [n, ...]: clipped there, heavy tails have moments too."""
    low, high = torch.quantile(z, torch.tensor([0.005, 0.995], dtype=z.dtype, device=z.device), dim=0)
    return low - 2 * (high - low), high + 2 * (high - low)


class _Density:
    """A density on the reals: u [N, *batch, D] -> the value z it stands for, log p(z), and log p(u)."""

    def __init__(self, d: Any, support: Any, example: Tensor):
        self.d, self.support, self.example, self.to_z = d, support, example, biject_to(support)

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = (len(u), *self.d.batch_shape)
        u = u.reshape(len(u), *self.to_z.inverse_shape(self.example.shape))
        z = self.to_z(u)
        inside = self.support.check(z).reshape(*batch, -1).all(-1)  # rounding can land on an open border
        z = torch.where(inside.reshape(*batch, *[1] * len(self.d.event_shape)), z, self.example)
        log_p = self.d.log_prob(z).masked_fill(~inside, -math.inf)
        log_jacobian = self.to_z.log_abs_det_jacobian(u, z).reshape(*batch, -1).sum(-1)
        return z, log_p, (log_p + log_jacobian).nan_to_num(nan=-math.inf, posinf=-math.inf)


def _enumerate(d: Any, z: Tensor, support: Any, name: str) -> _Points:
    """Every value, or for counts without a limit every value far beyond the largest draw."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    try:
        values = d.enumerate_support(expand=True)
    except NotImplementedError:
        low, high = getattr(support, "lower_bound", 0), getattr(support, "upper_bound", None)
        if high is None:
            high = 1 if support is constraints.boolean else 2 * int(z.max()) + 20
        low, high = int(torch.as_tensor(low).min()), int(torch.as_tensor(high).max())
        places = d.event_shape.numel()
        require(
            (high - low + 1) ** places <= 20_000,
            f"{name} has more values than can be enumerated: give it enumerate_support, or check a smaller event.",
        )
        line = torch.arange(low, high + 1, dtype=z.dtype, device=z.device)
        values = torch.cartesian_prod(*[line] * places).reshape(-1, *[1] * len(d.batch_shape), *d.event_shape)
    values = values.expand(len(values), *d.batch_shape, *d.event_shape)
    inside = d.support.check(values)
    values = torch.where(inside.reshape(*inside.shape, *[1] * (values.dim() - inside.dim())), values, z[0])
    log_p = d.log_prob(values).masked_fill(~inside, -math.inf)
    return _Points(values.to(log_p.dtype), log_p, log_p.exp(), is_random=False)


def _whitening(u: Tensor) -> tuple[Tensor, Tensor]:
    u = u.clamp(*limits_of(u))
    loc = u.mean(0)
    covariance = torch.einsum("n...i,n...j->...ij", u - loc, u - loc) / len(u)
    return loc, torch.linalg.cholesky(covariance)


def _grid(density: _Density, u: Tensor, name: str) -> _Points:
    """A grid around the draws u that is fine in the middle and reaches 500 standard deviations out."""
    loc, factor = _whitening(u)
    dim, masses = u.shape[-1], []
    reach = 9 if dim == 1 else 7
    for num_points in (801, 6401) if dim == 1 else (281, 701):
        axis = torch.linspace(-reach, reach, num_points, dtype=u.dtype, device=u.device)
        offsets = torch.cartesian_prod(*[axis.sinh()] * dim).reshape(-1, dim)
        stretch = torch.cartesian_prod(*[axis.cosh().log()] * dim).reshape(-1, dim).sum(-1)
        log_cell = stretch + dim * math.log(2 * reach / (num_points - 1))
        log_cell = log_cell.reshape(-1, *[1] * (loc.dim() - 1)) + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        grid = loc + torch.einsum("nj,...ij->n...i", offsets, factor)
        parts = [density(part) for part in grid.split(max(1, 400_000 // loc.numel()))]
        z, log_p, log_density = (torch.cat(part) for part in zip(*parts, strict=True))
        weight = (log_density + log_cell).exp()
        masses.append(weight.sum(0))
        if bool(((masses[-1] - 1).abs() < 1e-3).all()):
            return _Points(z, log_p, weight, is_random=False)
    require(
        torch.allclose(masses[0], masses[1], rtol=1e-3, atol=1e-3) and bool((masses[1] > 1e-2).all()),
        f"{name} is too wide or has too narrow peaks for a grid of {num_points} points: check it at milder parameters.",
    )
    _require_mass(masses[-1], torch.zeros_like(masses[-1]), name)
    return _Points(z, log_p, weight, is_random=False)


def _importance(density: _Density, u: Tensor) -> _Points | None:
    """Weighted draws of a heavy-tailed proposal fitted to u; None if too few of the weights count."""
    loc, factor = _whitening(u)
    proposal = MultivariateStudentT(torch.full_like(loc[..., 0], 5.0), loc, 1.1 * factor)
    u = proposal.sample((len(u),))
    z, log_p, log_density = density(u)
    weight = (log_density - proposal.log_prob(u)).exp() / len(u)
    effective = weight.sum(0) ** 2 / (weight**2).sum(0)
    return _Points(z, log_p, weight, is_random=True) if bool((effective > 0.02 * len(u)).all()) else None


def _check_stein(density: _Density, u: Tensor, name: str) -> None:
    """The score s of the density that was sampled has E[s_j] = 0 and E[u_i s_j] = -1[i = j], in any dimension."""
    with torch.enable_grad():
        leaf = u.detach().clone().requires_grad_()
        (score,) = torch.autograd.grad(density(leaf)[2].sum(), leaf)
    eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    product = (u - u.mean(0)).unsqueeze(-1) * score.unsqueeze(-2) + eye
    _require_zero({"E[d log p / dz]": score, "E[z d log p / dz] + 1": product}, name)


def _on_sphere(d: Any, z: Tensor) -> _Points | None:
    """Points of the sphere with weights: a grid of angles in two or three dimensions, else uniform draws."""
    dim, num = z.shape[-1], 400
    turn = (torch.arange(num, dtype=z.dtype, device=z.device) + 0.5) * (2 * math.pi / num)
    if dim == 2:
        points, area = torch.stack([turn.cos(), turn.sin()], -1), torch.ones_like(turn)
    elif dim == 3:
        tilt, turn = torch.cartesian_prod(turn / 2, turn).unbind(-1)
        points = torch.stack([tilt.sin() * turn.cos(), tilt.sin() * turn.sin(), tilt.cos()], -1)
        area = tilt.sin()
    else:
        points = torch.randn(len(z), dim, dtype=z.dtype, device=z.device)
        points = points / points.norm(dim=-1, keepdim=True)
        area = torch.ones_like(points[:, 0])
    area = area / area.sum() * math.exp(math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2))
    points = points.reshape(len(points), *[1] * len(d.batch_shape), dim).expand(-1, *d.batch_shape, dim)
    log_p = d.log_prob(points)
    weight = log_p.exp() * area.reshape(-1, *[1] * len(d.batch_shape))
    effective = weight.sum(0) ** 2 / (weight**2).sum(0)
    enough = dim <= 3 or bool((effective > 0.02 * len(z)).all())
    return _Points(points, log_p, weight, is_random=dim > 3) if enough else None


def _check_stein_on_sphere(d: Any, z: Tensor, name: str) -> None:
    """The score s along the sphere has E[s] = (D - 1) E[z] and E[z_i s_j] = D E[z_i z_j] - 1[i = j]."""
    with torch.enable_grad():
        leaf = z.detach().clone().requires_grad_()
        (score,) = torch.autograd.grad(d.log_prob(leaf).sum(), leaf)
    score = score - (score * z).sum(-1, keepdim=True) * z
    dim = z.shape[-1]
    eye = torch.eye(dim, dtype=z.dtype, device=z.device)
    product = z.unsqueeze(-1) * (score - dim * z).unsqueeze(-2) + eye
    parts = {"E[d log p / dz - (D - 1) z]": score - (dim - 1) * z, "E[z d log p / dz - D z z] + 1": product}
    _require_zero(parts, name)


def _require_zero(parts: dict[str, Tensor], name: str) -> None:
    for what, values in parts.items():
        errors = (values.mean(0).abs() / (values.std(0) / math.sqrt(len(values)) + 1e-9)).max()
        require(
            bool(errors < ERRORS),
            f"{name} scores another density than it samples: {what} is {errors:.1f} standard errors from 0 "
            "over its draws: one object must both sample and score.",
        )


def _require_mass(mass: Tensor, error: Tensor, name: str) -> None:
    off = (mass - 1).abs() - ERRORS * error
    worst = mass.flatten()[off.argmax()].item()
    require(bool((off < 1e-3).all()), f"log_prob of {name} has total mass {worst:.4g}, expected 1: normalise it.")


def _compare(points: _Points, z: Tensor, log_p: Tensor, name: str) -> None:
    """Mass, mean, covariance and entropy: by the density's weighted points and by the draws."""
    num, weight = len(z), points.weight
    random = float(points.is_random)
    _require_mass(weight.sum(0), random * weight.std(0) * math.sqrt(len(weight)), name)
    by_points = points.z.reshape(*weight.shape, -1)
    by_draws = z.reshape(*log_p.shape, -1)
    centre = by_draws.mean(0)

    def outer(values: Tensor) -> Tensor:
        return (values - centre).unsqueeze(-1) * (values - centre).unsqueeze(-2)

    surprise = (-points.log_p).masked_fill(weight == 0, 0.0).unsqueeze(-1)
    for what, a, b in (
        ("mean", by_points, by_draws),
        ("covariance", outer(by_points), outer(by_draws)),
        ("entropy", surprise, -log_p.unsqueeze(-1)),
    ):
        w = weight.reshape(*weight.shape, *[1] * (a.dim() - weight.dim()))
        expected, found = (w * a).sum(0), b.mean(0)
        variance = torch.maximum((w * (a - expected) ** 2).sum(0), b.var(0))
        error = (variance / num + random * (w * a).var(0) * len(a)).sqrt()
        excess = (expected - found).abs() - ERRORS * error - 1e-3 * variance.sqrt() - 1e-6
        worst = excess.argmax()
        require(
            bool((excess <= 0).all()),
            f"{name} has {what} {expected.flatten()[worst]:.4g} by log_prob but {found.flatten()[worst]:.4g} by its "
            f"draws (standard error {error.flatten()[worst]:.2g}): one object must both sample and score.",
        )


def _check_independence(z: Tensor, name: str) -> None:
    """Draws z [n, B, E] of different batch entries are uncorrelated (the first 64 numbers)."""
    owner = torch.arange(z.shape[1], device=z.device).repeat_interleave(z.shape[2])[:64]
    z = z.flatten(1)[:, :64]
    z = ((z - z.mean(0)) / z.std(0)).nan_to_num()
    mean, square = z.T @ z / len(z), (z**2).T @ z**2 / len(z)
    errors = mean.abs() / ((square - mean**2).clamp(min=0) / len(z)).sqrt().clamp(min=1e-9)
    errors = errors.masked_fill(owner == owner.unsqueeze(-1), 0.0)
    require(
        bool((errors < ERRORS).all()),
        f"{name} draws numbers that are correlated but scores them as independent: give each its own noise.",
    )
