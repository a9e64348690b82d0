"""The contracts, executable: checks that a prior, likelihood, encoder or objective of your own keeps its promises.

Each check returns None, or raises an AssertionError of one line: what was expected, what was found, what to do. What is
checked is a copy in double precision and evaluation mode; the object itself, the random state and Pyro's parameter
store stay as they are. The statistical checks have fixed seeds and allow five standard errors.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.distributions import Delta
from torch import Tensor, nn

from pyro_vae.contracts import EncoderLike, LikelihoodLike, PriorLike
from pyro_vae.density_checks import check_density, expect, require
from pyro_vae.dry_run import batch_remedy, require_distribution
from pyro_vae.exact import LinearGaussian
from pyro_vae.gradient_checks import check_gradient, check_loss
from pyro_vae.supports import elements


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
            remedy = batch_remedy(name, tuple(d.batch_shape), tuple(batch_shape))
            expect(name, "batch shape", tuple(d.batch_shape), tuple(batch_shape), remedy)
        if event_shape is not None:
            remedy = "change the width of what it is made of, or its .to_event(...)"
            expect(name, "event shape", tuple(d.event_shape), tuple(event_shape), remedy)
        _check_draws(d, dtype, name)
        check_density(d, name, num_samples)


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
        expect(f"{name} with a particle axis", "batch shape", tuple(stacked.batch_shape), (3, len(h)))
        x = d.sample()
        same = torch.allclose(stacked.log_prob(x), d.log_prob(x).expand(3, -1))
        require(same, f"{name} scores a stack of three h otherwise than one h: count its axes from the end.")
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
            check_gradient(encoder, x, name)


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
        require(kind, f"{name} is no pyro.infer.ELBO with bound(model, guide, x) -> [B]: {remedy}.")
        weight, loc = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
        exact = LinearGaussian(weight, loc, scale=0.7)
        x = loc + torch.randn(5, 2, dtype=torch.float64) @ weight.T + 0.7 * torch.randn(5, 7).double()
        objective = copy.deepcopy(objective)  # its steps are counted
        vae, loose = exact.as_vae(), exact.as_vae(diagonal=True)
        with torch.no_grad():
            list(loose.parameters())[-1].add_(0.1)  # mean and scale off: a guide with a gap
        check_loss(objective, loose, x, name)
        if getattr(objective, "is_bound", True):
            log_px = exact.log_evidence(x)
            with torch.no_grad():
                draws = torch.stack([objective.bound(loose.model, loose.guide, x) for _ in range(200)])
            excess = draws.mean(0) - log_px
            allowed = 4 * draws.std(0) / math.sqrt(len(draws)) + 1e-8
            worst = int((excess - allowed).argmax())
            require(
                bool((excess <= allowed).all()),
                f"{name} exceeds log p(x) by {excess[worst]:.3g} nats (4 standard errors are {allowed[worst]:.2g}), "
                "expected a lower bound: look for a wrong sign or a missing term, or set is_bound = False.",
            )
            if getattr(objective, "is_tight", True):
                with torch.no_grad():
                    gap = (objective.bound(vae.model, vae.guide, x) - log_px).abs().max().item()
                require(
                    gap < 1e-8,
                    f"{name} differs from log p(x) by {gap:.3g} nats although the guide is the exact posterior, "
                    "expected equality: look for a missing term, or set is_tight = False.",
                )


# Helpers of all checks


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
        return require_distribution(value, name)
    except TypeError as error:
        raise AssertionError(str(error)) from None


def _check_vector(d: Any, batch: tuple[int, ...], name: str) -> None:
    remedy = batch_remedy(name, tuple(d.batch_shape), batch)
    expect(name, "batch shape", tuple(d.batch_shape), batch, remedy)
    found = tuple(d.event_shape)
    require(len(found) == 1, f"{name} has event shape {found}, expected (D,): z is a vector, flatten it.")


def _check_draws(d: Any, dtype: torch.dtype | None, name: str) -> None:
    shape = tuple(d.batch_shape + d.event_shape)
    for extra in ((), (3,), (3, 2)):
        z = d.sample(torch.Size(extra))
        expect(f"a sample({extra}) of {name}", "shape", tuple(z.shape), extra + shape)
        if not isinstance(elements(d), Delta):
            inside = bool(d.support.check(z).all())
            require(inside, f"{name} draws values outside its support {d.support}: make the two agree.")
        log_p = d.log_prob(z)
        what = f"log_prob of a sample({extra}) of {name}"
        expect(what, "shape", tuple(log_p.shape), extra + tuple(d.batch_shape), "sum over the event axes only")
        require(bool(torch.isfinite(log_p).all()), f"{what} is infinite or NaN, expected finite numbers.")
        same = torch.equal(log_p, d.log_prob(z))
        require(same, f"{what} differs between two calls, expected the same: draw nothing when scoring.")
    if dtype is not None and z.is_floating_point():
        remedy = "create tensors with the dtype of the parameters (new_zeros, full_like, register_buffer)"
        expect(f"a sample of {name}", "dtype", z.dtype, dtype, remedy)
    same = torch.allclose(d.log_prob(z[1, 1]), log_p[1, 1])
    require(same, f"{name} scores a draw alone otherwise than in a stack: count its axes from the end.")


def _check_examples_apart(term: Callable[[Tensor], Any], x: Tensor, d: Any, name: str) -> None:
    value = d.sample()
    same = torch.allclose(term(x.flip(0)).log_prob(value.flip(0)), d.log_prob(value).flip(0))
    same = same and torch.allclose(term(x[:1]).log_prob(value[:1]), d.log_prob(value)[:1])
    require(same, f"{name} mixes the examples of a batch, expected each by itself: compute along later axes.")


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
    expect("output_bias(mean, scale)", "shape", tuple(bias.shape), tuple(h.shape[1:]), "give one number for each of h")
    off = (likelihood(bias.unsqueeze(0)).mean[0] - mean).abs().max().item()
    require(
        off <= 1e-2 * scale.max().item(),
        f"likelihood(output_bias(mean, scale)) has a mean that is {off:.3g} off, expected the mean given: invert the "
        "map from h to the mean.",
    )
