"""The contracts, executable: checks that a prior, likelihood, encoder or objective of your own keeps its promises.

Each check returns None, or raises an AssertionError of one line: what was expected, what was found, what to do. What is
checked is a copy in double precision and evaluation mode; the object itself, the random state and Pyro's parameter
store stay as they are. The statistical checks have fixed seeds and allow five standard errors.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.distributions import Delta, MultivariateStudentT
from pyro.distributions.constraints import sphere
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.distributions import Independent, biject_to, constraints

from pyro_vae.contracts import EncoderLike, LikelihoodLike, PriorLike, _batch_remedy, _require_distribution
from pyro_vae.exact import LinearGaussian

_ERRORS = 5.0  # standard errors
_MAX_NUMBERS = 4096  # in one batch; the checks take some thousand draws of it


def check_distribution(
    d: Any,
    batch_shape: tuple[int, ...] | None = None,
    event_shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    name: str = "the distribution",
    num_samples: int = 20_000,
) -> None:
    r"""Check that a distribution samples what it scores, is normalised, and has the right shapes.

    .. math:: \int p(z) \, dz = 1, \qquad \int f(z) \, p(z) \, dz = \mathbb E_{z \sim p} f(z)
        \quad \text{for } f = z,\ z z^\top,\ -\log p

    The left sides come from the density alone: by enumeration (discrete), on a grid (one or two dimensions), or by
    importance sampling (more, as long as enough weights count), where E[d log p / dz_i] = 0 and
    E[z_i d log p / dz_j] = -1[i = j] are checked too. Weights of distant modes in many dimensions escape: check a
    small version. A member with ``to_event`` is checked number by number, and for independence of the numbers.

    Args:
        d: the distribution; a few numbers are enough, double precision is best.
        batch_shape: the expected one (None: any).
        event_shape: the expected one (None: any).
        dtype: the expected type of continuous draws (None: any).
        name: how messages name it.
        num_samples: number of draws, fewer for large shapes.

    Raises:
        AssertionError: what is wrong, in one line.

    Example:
        >>> from pyro import distributions as dist
        >>> check_distribution(dist.Normal(torch.zeros(5, 2), 1.0), batch_shape=(5,))
        Traceback (most recent call last):
        AssertionError: the distribution has batch shape (5, 2), expected (5,): end it with .to_event(1) (or raise its
        event_dim by 1).
    """
    with _aside(name):
        d = _distribution(d, name)
        if batch_shape is not None:
            remedy = _batch_remedy(name, tuple(d.batch_shape), tuple(batch_shape))
            _expect(name, "batch shape", tuple(d.batch_shape), tuple(batch_shape), remedy)
        if event_shape is not None:
            remedy = "change the width of what it is made of, or its .to_event(...)"
            _expect(name, "event shape", tuple(d.event_shape), tuple(event_shape), remedy)
        _check_draws(d, dtype, name)
        _check_density(d, name, num_samples)


def check_prior(prior: PriorLike) -> None:
    """Check a prior: ``prior()`` has batch shape (), event shape (D,), and samples what it scores.

    Args:
        prior: the prior, at parameters that are not special (a scale of 1 hides a scale squared).

    Raises:
        AssertionError: what is wrong, in one line.

    Example:
        >>> from pyro_vae import MixtureOfNormals
        >>> check_prior(MixtureOfNormals(2, num_components=3))
    """
    with _aside("prior()"):
        prior, dtype = _private(prior)
        d = _distribution(prior(), "prior()")
        _check_vector(d, (), "prior()")
        check_distribution(d, batch_shape=(), dtype=dtype, name="prior()")


def check_likelihood(likelihood: LikelihoodLike, h: Tensor) -> None:
    """Check a likelihood: shapes with one and two batch axes, examples apart, density, and ``output_bias``.

    Args:
        likelihood: the likelihood, at parameters that are not special.
        h: a network's output, [B, num_outputs * E[0], *E[1:]], B >= 2; few numbers, not all alike.

    Raises:
        AssertionError: what is wrong, in one line.

    Example:
        >>> from pyro_vae import Bernoulli
        >>> check_likelihood(Bernoulli(), torch.randn(5, 3))
    """
    name = "likelihood(h)"
    with _aside(name):
        likelihood, dtype = _private(likelihood)
        h = _detached(h, dtype)
        d = _distribution(likelihood(h), name)
        num_outputs, event_shape = getattr(likelihood, "num_outputs", None), None
        if num_outputs is not None:
            event_shape = (h.shape[1] // num_outputs, *h.shape[2:])
        check_distribution(d, (len(h),), event_shape, dtype, name)
        _check_examples_apart(likelihood, h, d, name)
        stacked = likelihood(h.expand(3, *h.shape))
        _expect(f"{name} with a particle axis", "batch shape", tuple(stacked.batch_shape), (3, len(h)))
        x = d.sample()
        same = torch.allclose(stacked.log_prob(x), d.log_prob(x).expand(3, -1))
        _require(same, f"{name} scores a stack of three h otherwise than one h: count its axes from the end.")
        _check_output_bias(likelihood, h, d)


def check_encoder(encoder: EncoderLike, x: Tensor) -> None:
    """Check an encoder: batch shape [B], event shape (D,), examples apart, density, and the gradient of ``rsample``.

    A family without ``rsample`` passes without the gradient: train it with ``pyro.infer.TraceGraph_ELBO``, or with
    ``pyro.infer.TraceEnum_ELBO`` if it can be enumerated.

    Args:
        encoder: the encoder, at parameters that are not special.
        x: data, [B, *E], B >= 2; few numbers, not all alike.

    Raises:
        AssertionError: what is wrong, in one line.

    Example:
        >>> from pyro_vae import FullNormal, Mlp
        >>> check_encoder(FullNormal(Mlp(7, 5)), torch.randn(3, 7))
    """
    name = "encoder(x)"
    with _aside(name):
        encoder, dtype = _private(encoder)
        x = _detached(x, dtype)
        d = _distribution(encoder(x), name)
        _check_vector(d, (len(x),), name)
        check_distribution(d, (len(x),), dtype=dtype, name=name)
        _check_examples_apart(encoder, x, d, name)
        if d.has_rsample:
            _check_gradient(encoder, x, name)


def check_objective(objective: Any) -> None:
    r"""Check an objective on the linear-Gaussian VAE, where log p(x) and the posterior are known.

    .. math:: \mathtt{loss} = -\sum_b s_b \, \mathtt{bound}_b, \qquad \mathbb E[\mathtt{bound}_b] \le \log p(x_b)

    If it ``is_bound``, it must not exceed log p(x), and equal it when the guide is the exact posterior. (A bound that
    is looser by design says ``is_tight = False``.)

    Args:
        objective: a ``pyro.infer.ELBO`` with ``bound(model, guide, x) -> [B]``.

    Raises:
        AssertionError: what is wrong, in one line.

    Example:
        >>> from pyro_vae import IWAE
        >>> check_objective(IWAE(num_particles=3))
    """
    name = repr(objective)
    with _aside(name):
        kind = isinstance(objective, pyro.infer.ELBO) and callable(getattr(objective, "bound", None))
        remedy = "derive it from pyro_vae.Objective and give it combine(terms)"
        _require(kind, f"{name} is no pyro.infer.ELBO with bound(model, guide, x) -> [B]: {remedy}.")
        weight, loc = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
        exact = LinearGaussian(weight, loc, scale=0.7)
        x = loc + torch.randn(5, 2, dtype=torch.float64) @ weight.T + 0.7 * torch.randn(5, 7).double()
        objective = copy.deepcopy(objective)  # its steps are counted
        vae, loose = exact.as_vae(), exact.as_vae(diagonal=True)
        with torch.no_grad():
            list(loose.parameters())[-1].add_(0.1)  # mean and scale off: a guide with a gap
        _check_loss(objective, loose, x, name)
        if getattr(objective, "is_bound", True):
            log_px = exact.log_evidence(x)
            with torch.no_grad():
                draws = torch.stack([objective.bound(loose.model, loose.guide, x) for _ in range(200)])
            excess = draws.mean(0) - log_px
            allowed = 4 * draws.std(0) / math.sqrt(len(draws)) + 1e-8
            worst = int((excess - allowed).argmax())
            _require(
                bool((excess <= allowed).all()),
                f"{name} exceeds log p(x) by {excess[worst]:.3g} nats (4 standard errors are {allowed[worst]:.2g}), "
                "expected a lower bound: look for a wrong sign or a missing term, or set is_bound = False.",
            )
            if getattr(objective, "is_tight", True):
                with torch.no_grad():
                    gap = (objective.bound(vae.model, vae.guide, x) - log_px).abs().max().item()
                _require(
                    gap < 1e-8,
                    f"{name} differs from log p(x) by {gap:.3g} nats although the guide is the exact posterior, "
                    "expected equality: look for a missing term, or set is_tight = False.",
                )


# Helpers of all checks


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise AssertionError(message)


def _expect(name: str, what: str, found: Any, expected: Any, remedy: str = "look for an axis too many") -> None:
    _require(found == expected, f"{name} has {what} {found}, expected {expected}: {remedy}.")


@contextmanager
def _aside(name: str) -> Iterator[None]:
    """Random numbers, gradient mode and parameter store of our own; any other error becomes one line."""
    devices = list(range(torch.cuda.device_count()))
    store = pyro.get_param_store()
    with torch.random.fork_rng(devices=devices), torch.no_grad(), store.scope(store.get_state()):
        torch.manual_seed(0)
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AssertionError(
                f"{name} failed ({type(error).__name__}: {reason}), expected an answer: "
                "check shapes, support, and that its tensors are parameters or buffers (they follow .to)."
            ) from error


def _private(term: Any) -> tuple[Any, torch.dtype | None]:
    """A copy in double precision and evaluation mode; a plain function stays itself, in whatever precision it has."""
    if not isinstance(term, nn.Module):
        return term, None
    return copy.deepcopy(term).double().eval(), torch.float64


def _detached(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.detach().clone().to(dtype if dtype and x.is_floating_point() else x.dtype)


def _distribution(value: Any, name: str) -> Any:
    try:
        return _require_distribution(value, name)
    except TypeError as error:
        raise AssertionError(str(error)) from None


def _check_vector(d: Any, batch: tuple[int, ...], name: str) -> None:
    remedy = _batch_remedy(name, tuple(d.batch_shape), batch)
    _expect(name, "batch shape", tuple(d.batch_shape), batch, remedy)
    found = tuple(d.event_shape)
    _require(len(found) == 1, f"{name} has event shape {found}, expected (D,): z is a vector, flatten it.")


# Draws and their scores


def _check_draws(d: Any, dtype: torch.dtype | None, name: str) -> None:
    shape = tuple(d.batch_shape + d.event_shape)
    for extra in ((), (3,), (3, 2)):
        z = d.sample(torch.Size(extra))
        _expect(f"a sample({extra}) of {name}", "shape", tuple(z.shape), extra + shape)
        if not isinstance(_elements(d), Delta):
            inside = bool(d.support.check(z).all())
            _require(inside, f"{name} draws values outside its support {d.support}: make the two agree.")
        log_p = d.log_prob(z)
        what = f"log_prob of a sample({extra}) of {name}"
        _expect(what, "shape", tuple(log_p.shape), extra + tuple(d.batch_shape), "sum over the event axes only")
        _require(bool(torch.isfinite(log_p).all()), f"{what} is infinite or NaN, expected finite numbers.")
        same = torch.equal(log_p, d.log_prob(z))
        _require(same, f"{what} differs between two calls, expected the same: draw nothing when scoring.")
    if dtype is not None and z.is_floating_point():
        remedy = "create tensors with the dtype of the parameters (new_zeros, full_like, register_buffer)"
        _expect(f"a sample of {name}", "dtype", z.dtype, dtype, remedy)
    same = torch.allclose(d.log_prob(z[1, 1]), log_p[1, 1])
    _require(same, f"{name} scores a draw alone otherwise than in a stack: count its axes from the end.")


def _elements(d: Any) -> Any:
    while isinstance(d, Independent):
        d = d.base_dist
    return d


def _check_examples_apart(term: Callable[[Tensor], Any], x: Tensor, d: Any, name: str) -> None:
    value = d.sample()
    same = torch.allclose(term(x.flip(0)).log_prob(value.flip(0)), d.log_prob(value).flip(0))
    same = same and torch.allclose(term(x[:1]).log_prob(value[:1]), d.log_prob(value)[:1])
    _require(same, f"{name} mixes the examples of a batch, expected each by itself: compute along later axes.")


# The density against the draws


class _Points(NamedTuple):
    """Points z [N, *batch, *event] with weights [N, *batch] such that sums over N are integrals of the density."""

    z: Tensor
    log_p: Tensor
    weight: Tensor
    is_random: bool


def _check_density(d: Any, name: str, num_samples: int) -> None:
    base = _elements(d)
    if isinstance(base, Delta):
        return  # a point mass has no density
    if hasattr(base, "parts"):  # columns of different kinds: each kind by itself
        z = base.sample((num_samples // 4,))
        whole = base.log_prob(z).sum(-1)
        _require(torch.allclose(d.log_prob(z), whole), f"log_prob of {name} is not the sum over its columns.")
        _check_independence(z.reshape(len(z), -1, 1), name)
        for part in base.parts:
            _check_density(part, name, num_samples)
        return
    batch, event = base.batch_shape.numel(), base.event_shape.numel()
    _require(
        batch * event <= _MAX_NUMBERS,
        f"{name} has {batch * event} numbers, expected at most {_MAX_NUMBERS} for a check: use a smaller batch.",
    )
    num_samples = int(min(num_samples, max(1000, 4e6 / (batch * event**2))))
    z = base.sample((num_samples,))
    log_p = base.log_prob(z)
    whole = log_p.reshape(num_samples, *d.batch_shape, -1).sum(-1)
    _require(
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
        _require(spread, f"{name} draws the same again and again, expected a density: use Delta for a point mass.")
        limits = _limits(z)
        z = z.clamp(*limits)
        if u.shape[-1] <= 2:
            points = _grid(density, u, name)
        else:
            _check_stein(density, u, name)
            points = _importance(density, u)
        if points is not None:
            _compare(points._replace(z=points.z.clamp(*limits)), z, log_p, name)
    _check_independence(z.reshape(num_samples, batch, event), name)


def _limits(z: Tensor) -> tuple[Tensor, Tensor]:
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
        _require(
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
    u = u.clamp(*_limits(u))
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
    _require(
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
        _require(
            bool(errors < _ERRORS),
            f"{name} scores another density than it samples: {what} is {errors:.1f} standard errors from 0 "
            "over its draws: one object must both sample and score.",
        )


def _require_mass(mass: Tensor, error: Tensor, name: str) -> None:
    off = (mass - 1).abs() - _ERRORS * error
    worst = mass.flatten()[off.argmax()].item()
    _require(bool((off < 1e-3).all()), f"log_prob of {name} has total mass {worst:.4g}, expected 1: normalise it.")


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
        excess = (expected - found).abs() - _ERRORS * error - 1e-3 * variance.sqrt() - 1e-6
        worst = excess.argmax()
        _require(
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
    _require(
        bool((errors < _ERRORS).all()),
        f"{name} draws numbers that are correlated but scores them as independent: give each its own noise.",
    )


# What only one kind of term has


def _check_output_bias(likelihood: Any, h: Tensor, d: Any) -> None:
    """The bias for a mean that the likelihood can have (halfway to the overall mean) leads to that mean."""
    try:
        mean, scale = d.mean.mean(0), d.variance.mean(0).sqrt()
        mean = (mean + mean.mean()) / 2
        bias = likelihood.output_bias(mean, scale)
    except (AttributeError, NotImplementedError):
        return  # start_at_data refuses such a likelihood
    if not bool(torch.isfinite(mean).all()):
        return  # a class label has no mean
    _expect("output_bias(mean, scale)", "shape", tuple(bias.shape), tuple(h.shape[1:]), "give one number for each of h")
    off = (likelihood(bias.unsqueeze(0)).mean[0] - mean).abs().max().item()
    _require(
        off <= 1e-2 * scale.max().item(),
        f"likelihood(output_bias(mean, scale)) has a mean that is {off:.3g} off, expected the mean given: invert the "
        "map from h to the mean.",
    )


def _check_gradient(encoder: Any, x: Tensor, name: str) -> None:
    """The gradient of E f(rsample) along random directions of the parameters, against two others.

    First finite differences with the same random numbers; a sampler that jumps (by rejection, say) fails those but
    may still be right, so then the score-function gradient within standard errors.
    """
    leaves: list[Tensor] = list(encoder.parameters()) if isinstance(encoder, nn.Module) else []
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if not leaves:
        if not x.is_floating_point():
            return
        leaves = [x.requires_grad_()]
    steps: list[Tensor] = []
    rounding = torch.finfo(leaves[0].dtype).eps
    eps = rounding ** (1 / 3)
    low, high = _limits(encoder(x).sample((1000,)))
    centre, width = (low + high) / 2, (high - low) / 25  # about the mean and the standard deviation

    def f(z: Tensor) -> Tensor:
        z = (z - centre) / width
        return (z.sin() + z.cos()).flatten(2).sum(2)

    def slope(value: Callable[..., Tensor], argument: Any) -> Tensor:
        """(value at +eps - value at -eps) / 2 eps, along the steps."""
        results = []
        for sign in (1, -2):
            for leaf, step in zip(leaves, steps, strict=True):
                leaf.data.add_(step, alpha=sign * eps)
            results.append(value(argument))
        for leaf, step in zip(leaves, steps, strict=True):
            leaf.data.add_(step, alpha=eps)
        return (results[0] - results[1]) / (2 * eps)

    def by_rsample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return f(encoder(x).rsample((500,))).mean(0).sum()

    def log_prob(z: Tensor) -> Tensor:
        return encoder(x).log_prob(z)

    def pathwise(seed: int) -> float:
        with torch.enable_grad():
            value = by_rsample(seed)
            _require(
                value.requires_grad,
                f"{name}.rsample() has no gradient: keep it differentiable in the parameters (no detach, no no_grad), "
                "or set has_rsample = False.",
            )
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        return sum((g * s).sum().item() for g, s in zip(gradients, steps, strict=True) if g is not None)

    for direction in range(3):
        torch.manual_seed(direction)
        steps[:] = [torch.randn_like(leaf) for leaf in leaves]
        exact = float(slope(by_rsample, 0))
        if abs(pathwise(0) - exact) <= rounding**0.25 * (1 + abs(exact)):
            continue
        ours = torch.tensor([pathwise(seed) for seed in range(40)])
        z = encoder(x).sample((20_000,))
        value = f(z)
        score = ((value - value.mean(0)) * slope(log_prob, z)).sum(1)
        error = math.sqrt(float(ours.var()) / len(ours) + float(score.var()) / len(score))
        _require(
            abs(float(ours.mean() - score.mean())) <= _ERRORS * error,
            f"the gradient of {name}.rsample() is {ours.mean():.4g} along a direction, expected {score.mean():.4g} "
            f"(standard error {error:.2g}): keep it differentiable in all parameters (no detach).",
        )


def _check_loss(objective: Any, vae: Any, x: Tensor, name: str) -> None:
    """Shape and scale of bound and loss, the gradient, and one step of SVI."""

    def at_seed(method: Callable[..., Any], model: Any = vae.model, guide: Any = vae.guide) -> Any:
        torch.manual_seed(1)
        if callable(getattr(objective, "at_step", None)):
            objective.at_step(0)  # of its schedules
        return method(model, guide, x)

    with torch.enable_grad():
        x = x.clone().requires_grad_()
        bound = at_seed(objective.bound)
        _expect(f"bound of {name}", "shape", tuple(bound.shape), (len(x),), "one value for each example")
        _require(bool(torch.isfinite(bound).all()), f"bound of {name} is infinite or NaN, expected finite numbers.")
        (of_x,) = torch.autograd.grad(bound[0], x)
        apart = bool((of_x[1:] == 0).all())
        _require(
            apart or getattr(objective, "mixes_examples", False),
            f"bound of {name} mixes the examples, expected each by itself: average over particles only (or, if it is "
            "meant to, set mixes_examples = True).",
        )
        for scale in (1.0, 2.5):
            programs = poutine.scale(vae.model, scale), poutine.scale(vae.guide, scale)
            expected = -scale * bound.sum().item()
            for method in (objective.loss, objective.differentiable_loss, objective.loss_and_grads):
                found = torch.as_tensor(at_seed(method, *programs)).item()
                _require(
                    math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9),
                    f"{method.__name__} of {name} is {found:.6g}, expected {expected:.6g} = -(scale * bound).sum() "
                    f"at scale {scale}: sum over the examples, with a minus sign.",
                )
        parameters = list(vae.parameters())
        gradients = torch.autograd.grad(at_seed(objective.differentiable_loss), parameters, allow_unused=True)
        vae.zero_grad()
        at_seed(objective.loss_and_grads)
        for (parameter, p), g in zip(vae.named_parameters(), gradients, strict=True):
            same = p.grad is g if p.grad is None or g is None else torch.allclose(p.grad, g, rtol=1e-9, atol=1e-9)
            _require(same, f"loss_and_grads of {name} and differentiable_loss differ in the gradient of {parameter}.")
        copied = copy.deepcopy(vae)
        svi = pyro.infer.SVI(copied.model, copied.guide, Adam({"lr": 1e-2}), loss=objective)
        loss = svi.step(x.detach())
        moved = any(not torch.equal(a, b) for a, b in zip(copied.parameters(), parameters, strict=True))
        _require(math.isfinite(loss) and moved, f"SVI(loss={name}).step moves nothing, expected a finite step.")
