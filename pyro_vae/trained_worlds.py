"""The world of a VAE of yours: expectations by draws of z, log p(x) and p(z | x) by quadrature or from below."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from pyro_vae import testing
from pyro_vae.contracts import untouched
from pyro_vae.dry_run import check_vae
from pyro_vae.estimates import has_point_mass, log_weights
from pyro_vae.exact import joint_by_enumeration
from pyro_vae.passes import passes
from pyro_vae.supports import is_discrete, is_normalised
from pyro_vae.terms import check_num_particles
from pyro_vae.worlds import World, diagonal_of, grid_between, normal_of

_QUADRATURE_ERROR = 0.02  # nats; a grid whose integrals change by more when it is half as fine is not used
_POINTS_AT_ONCE = 2**14  # a prior of many components takes that many numbers for each
_BOUND_PARTICLES, _NUM_BOUNDS = 500, 20  # K of the importance-weighted bound, and how often it is drawn


def of_vae(vae: Any, x: Tensor, num_particles: int = 1000, *, seed: int = 0, max_elements: int = 2**22) -> World:
    """A VAE of yours, trained or not, on data of yours: expectations are means over draws z ~ q(z | x).

    All numbers are computed in double precision, on a copy: the VAE, the parameter store and the random state stay as
    they are. Where z has one or two dimensions, log p(x) and the posterior come from a grid that is fitted to each
    example's posterior and used only if half as fine a grid gives the same to 0.001 nats. Where z has more, or the grid
    is too coarse, log p(x) is bracketed from below, by the importance-weighted bound.

    Args:
        vae: a VAE with ``prior``, ``decoder`` and ``encoder``.
        x: data, [B, *E].
        num_particles: number K of draws of z for each example.
        seed: seed of the draws.
        max_elements: numbers of x handled in one pass; memory is some 20 times their bytes.

    Returns:
        A world.

    Raises:
        TypeError: the VAE lacks a part.
        ValueError: num_particles < 2, the parts do not fit, p(x | z) is not normalised, x lies outside its support,
            q is a point mass, or a discrete z has too many values to sum over.
    """
    check_num_particles(num_particles)
    if num_particles < 2:
        raise ValueError("expected num_particles >= 2, found 1: a standard error needs two draws.")
    missing = [part for part in ("model", "guide", "prior", "decoder", "encoder") if not hasattr(vae, part)]
    if missing:
        raise TypeError(
            f"expected a VAE with model, guide, prior, decoder and encoder, found {type(vae).__name__} without "
            f"{missing}: use the ledger, which takes any model and guide."
        )
    with untouched(vae, seed):
        vae = copy.deepcopy(vae).double().eval()
        x = x.double() if isinstance(x, Tensor) and x.is_floating_point() else x  # others are refused
        check_vae(vae, x)
        check_normalised(vae)
        p, q = vae.prior(), vae.encoder(x)
        if is_discrete(p) and is_discrete(q):
            return _enumeration(vae, x)
        normal = normal_of(q)
        standard = normal if _is_standard_normal(p) else None
        z, log_px, log_pz, log_qz = _draws(vae, x, num_particles, max_elements)
        draws = f"expectations: means over K={num_particles:,} draws z ~ q(z|x); log p(x)"
        try:
            found = _quadrature(vae, x, z, max_elements)
            note = f"{draws} and p(z|x): quadrature over z"
        except _NoQuadrature as reason:
            found = {"evidence_bound": _evidence_bound(vae, x, seed, max_elements)}
            note = f"{draws} is known from below only, IWAE with K={_BOUND_PARTICLES} ({reason})"
        return World(
            type(vae).__name__,
            log_px,
            log_pz,
            log_qz,
            z=z,
            kl_to_prior=_analytic_kl(q, p),
            normal=normal,
            standard=standard,
            diagonal=diagonal_of(standard),
            tolerance=1e-6,
            note=note,
            **found,
        )


def check_normalised(vae: Any) -> None:
    """Refuse a VAE whose p(x | z) is no density and no probability: then p(x), and a bound on it, mean nothing.

    Args:
        vae: a VAE.

    Raises:
        ValueError: the likelihood says so (``is_normalised = False``), or its total mass is not 1.
    """
    likelihood = getattr(vae.decoder, "likelihood", None)
    message = (
        f"expected a normalised likelihood, found {type(likelihood or vae.decoder).__name__} ({{}}): without p(x|z) "
        "there is no p(x) to derive a bound on; train with a likelihood that sums to 1 over x."
    )
    twin = copy.deepcopy(vae).double().eval()
    p = twin.decoder(twin.prior().sample((1,)))
    if not is_normalised(p) or not getattr(likelihood, "is_normalised", True):
        raise ValueError(message.format("it says is_normalised = False"))
    try:  # what else this checks is between the user and pyro_vae.testing; the mass is what a bound stands on
        testing.check_distribution(p, name="p(x|z)", num_samples=1000)
    except AssertionError as error:
        found = re.search(r"total mass (\S+),", str(error))
        if found:
            raise ValueError(message.format(f"its total mass is {found[1]}")) from None


def _is_standard_normal(p: Any) -> bool:
    found = normal_of(p)
    return (
        found is not None
        and bool((found[0] == 0).all())
        and torch.equal(found[1], torch.eye(len(found[0])).to(found[1]))
    )


def _analytic_kl(q: Any, p: Any) -> Tensor | None:
    """KL(q || p), [B], where torch has a formula."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _draws(vae: Any, x: Tensor, num_particles: int, max_elements: int) -> tuple[Tensor, ...]:
    """Draws z [K, B, D] of the guide and the three terms [K, B], by Pyro's traces of model and guide."""
    columns: dict[int, list[list[Tensor]]] = {}
    for rows, terms in passes(vae, x, num_particles, max_elements):
        if has_point_mass(terms):
            raise ValueError(
                "expected a guide with a density, found a point mass (Delta): there is no bound to derive; use another "
                "posterior, for example DiagonalNormal."
            )
        sites: list[Any] = [site for site in terms.guide_trace.nodes.values() if site["type"] == "sample"]
        if len(sites) != 1:
            raise ValueError(
                f"expected one latent site, found {[site['name'] for site in sites]}: use the ledger, which takes any."
            )
        z = sites[0]["value"].reshape(*terms.log_px.shape, -1)
        values = [z, terms.log_px, terms.log_pz, terms.log_qz]
        columns.setdefault(rows.start, []).append(values)
    parts = [[torch.cat(pieces) for pieces in zip(*column, strict=True)] for column in columns.values()]
    return tuple(torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))


def _evidence_bound(vae: Any, x: Tensor, seed: int, max_elements: int) -> Tensor:
    """Some draws of the importance-weighted bound on log p(x), [K', B]."""
    log_w = log_weights(vae, x, _NUM_BOUNDS * _BOUND_PARTICLES, seed=seed + 1, max_elements=max_elements)
    return log_w.unflatten(0, (_NUM_BOUNDS, _BOUND_PARTICLES)).logsumexp(1) - math.log(_BOUND_PARTICLES)


def _enumeration(vae: Any, x: Tensor) -> World:
    """A VAE whose z has a few values: every expectation is a sum over them."""
    states, log_joint = joint_by_enumeration(vae, x)
    p, q = vae.prior(), vae.encoder(x)
    z = states.unsqueeze(1).expand(len(states), len(x), *states.shape[1:])
    log_px, log_pz, log_qz = vae.decoder(z).log_prob(x), p.log_prob(z), q.log_prob(z)
    posterior, weight = Categorical(logits=log_joint.T), log_qz.exp()
    return World(
        type(vae).__name__,
        log_px,
        log_pz,
        log_qz,
        weight=weight,
        log_posterior=posterior.logits.T,
        log_evidence=log_joint.logsumexp(0),
        log_integral=(log_pz.exp() * (log_px - log_px.amax(0)).exp()).sum(0).log() + log_px.amax(0),
        kl_to_posterior=kl_divergence(Categorical(weight.T), posterior),
        kl_integral=torch.where(weight > 0, weight * (log_qz - posterior.logits.T), 0.0).sum(0),
        kl_to_prior=_analytic_kl(q, p),
        tolerance=1e-6,
        note=f"sums over all {len(states)} values of z",
    )


def _takes_real_numbers(p: Any, z: Tensor) -> bool:
    """Whether p is a density on all of R^D."""
    try:
        return not is_discrete(p) and bool(p.support.check(z).all())
    except NotImplementedError:
        return True  # it does not say; the grid will tell


class _NoQuadrature(Exception):
    """Why log p(x) is not found by quadrature."""


def _quadrature(vae: Any, x: Tensor, z: Tensor, max_elements: int) -> dict[str, Any]:
    """What a grid over z tells: log p(x) and its check by importance sampling, p(z | x) and the KL to it."""
    p, q = vae.prior(), vae.encoder(x)
    latent_dim = z.shape[-1]
    if latent_dim > 2:
        raise _NoQuadrature(f"z has {latent_dim} dimensions, quadrature takes 2")
    if not _takes_real_numbers(p, grid_between(z.amin(0) - 9, z.amax(0) + 9, 3)[0]):
        raise _NoQuadrature("quadrature takes a z of real numbers")

    def in_parts(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        at_once = min(max_elements // x.numel(), _POINTS_AT_ONCE // len(x))
        return torch.cat([function(part) for part in z.split(max(1, at_once))])

    def log_prior(z: Tensor) -> Tensor:
        return in_parts(p.log_prob, z)

    def log_joint(z: Tensor) -> Tensor:
        return in_parts(lambda part: vae.decoder(part).log_prob(x) + p.log_prob(part), z)

    joint_of_draws = log_joint(z)
    low, high = _where_the_posterior_is(log_joint, z, joint_of_draws, p.sample((2000, len(x))))
    width = z.std(0)
    low, high = torch.minimum(low, z.amin(0) - 2 * width), torch.maximum(high, z.amax(0) + 2 * width)
    num_points = 161 if latent_dim == 2 else 4001
    grid, log_cell = grid_between(low, high, num_points)
    log_p, log_q = log_joint(grid), in_parts(q.log_prob, grid)

    def integrals(stride: int) -> tuple[Tensor, Tensor]:
        """Log p(x) and the KL to the posterior, from each ``stride``-th line of the grid."""
        size, every = (num_points,) * latent_dim, (slice(None, None, stride),) * latent_dim
        joint, of_q = (t.unflatten(0, size)[every].flatten(0, latent_dim - 1) for t in (log_p, log_q))
        cell = log_cell + latent_dim * math.log(stride)
        evidence, mass = joint.logsumexp(0) + cell, of_q.exp()
        kl = torch.where(mass > 0, mass * (of_q - joint + evidence), 0.0).sum(0) * cell.exp()
        return evidence, kl

    (log_evidence, kl), (coarse_evidence, coarse_kl) = integrals(1), integrals(2)
    off = max((log_evidence - coarse_evidence).abs().max().item(), (kl - coarse_kl).abs().max().item())
    if not off < _QUADRATURE_ERROR:
        raise _NoQuadrature(f"quadrature is off by up to {off:.2g} nats")
    place, log_near = _near_the_posterior(low, high, log_p, 4 * len(z), num_points)
    far = p.sample(place.shape[:2])
    place = torch.where(torch.rand_like(place[..., :1]) < 0.5, place, far)
    log_w = log_joint(place) - torch.logaddexp(log_near(place), log_prior(place)) + math.log(2)
    return {
        "log_evidence": log_evidence,
        "log_integral": _jackknife(log_w),
        "log_posterior": joint_of_draws - log_evidence,
        "kl_to_posterior": kl,
        "kl_integral": coarse_kl,
        "quadrature_error": off,
    }


def _where_the_posterior_is(
    log_joint: Callable[[Tensor], Tensor], z: Tensor, joint_of_draws: Tensor, from_prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Corners [B, D] of a box that holds the posterior but for e^-24 of its peak, zoomed in from all of the prior."""
    latent_dim = z.shape[-1]
    num_points, margin = (61, 0.05) if latent_dim == 2 else (1001, 0.003)
    bulk = from_prior.quantile(torch.tensor([0.005, 0.995]).to(z), dim=0)
    low, high = torch.minimum(bulk[0], z.amin(0)), torch.maximum(bulk[1], z.amax(0))
    low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
    for _ in range(4):
        grid, _ = grid_between(low, high, num_points)
        points, log_p = torch.cat([grid, z]), torch.cat([log_joint(grid), joint_of_draws])
        outside = (log_p < log_p.amax(0) - 24).unsqueeze(-1)
        room = margin * (high - low)  # the peak may be between two points
        low, high = (
            torch.maximum(low, points.masked_fill(outside, math.inf).amin(0) - room),
            torch.minimum(high, points.masked_fill(outside, -math.inf).amax(0) + room),
        )
    return low, high


def _near_the_posterior(
    low: Tensor, high: Tensor, log_p: Tensor, num_draws: int, num_points: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Draws [num_draws, B, D] of the histogram that a grid makes of the posterior, and the logarithm of its density."""
    latent_dim = low.shape[-1]
    grid, log_cell = grid_between(low, high, num_points)
    step, cells = (high - low) / (num_points - 1), Categorical(logits=log_p.T)
    chosen = torch.stack([grid[index, b] for b, index in enumerate(cells.sample((num_draws,)).T)], 1)

    def log_density(z: Tensor) -> Tensor:
        index = ((z - low) / step).round()
        inside = ((index >= 0) & (index < num_points)).all(-1)
        index = index.clamp(0, num_points - 1).long()
        flat = index[..., 0] if latent_dim == 1 else index[..., 0] * num_points + index[..., 1]
        return (cells.logits.T.gather(0, flat) - log_cell).masked_fill(~inside, -math.inf)

    return chosen + (torch.rand_like(chosen) - 0.5) * step, log_density


def _jackknife(log_w: Tensor) -> Tensor:
    """Numbers [K, B]: their mean is the logarithm of the mean weight, its bias removed, their spread its error."""
    K = len(log_w)
    log_sum = log_w.logsumexp(0)
    without = log_sum + torch.log1p(-(log_w - log_sum).exp())
    return K * (log_sum - math.log(K)) - (K - 1) * (without - math.log(K - 1))
