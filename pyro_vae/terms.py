r"""The terms of the evidence lower bound, read off any Pyro model and guide.

One trace of the guide and one of the model on the same z give three numbers for each particle k and example b:

.. math:: \log w_{kb} = \log p(x_b \mid z_{kb}) + \log p(z_{kb}) - \log q(z_{kb} \mid x_b)

:func:`draw` adds up *all* latent and *all* observed sites, so the same bounds serve any Pyro model and guide.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match
from torch import Tensor

Program = Callable[..., Any]
_PARTICLE_PLATES = ("particles", "num_particles_vectorized")  # ours and Pyro's


class Terms(NamedTuple):
    """The terms of the ELBO, each [K, B]: K particles, B examples; nats.

    ``scale`` is what an example counts for in the loss (a number, or [B]): N / B in a subsampled plate, times any
    ``poutine.scale`` that the observations share. It is kept out of the terms, so bounds made of them are per example.
    ``passes`` has the traces of model and guide: one pair if the particles were drawn at once, else one pair for each.
    ``fixed`` has the same terms with z held fixed, where an objective asks for them: equal numbers, whose gradients
    leave out the path through z. ``data_guide`` has the guide's trace on all of the data, likewise.
    """

    log_px: Tensor  # log p(x | z)
    log_pz: Tensor  # log p(z)
    log_qz: Tensor  # log q(z | x)
    scale: Tensor | float
    model_trace: Trace
    guide_trace: Trace
    passes: tuple[tuple[Trace, Trace], ...] = ()
    fixed: "Terms | None" = None
    data_guide: Trace | None = None

    @property
    def log_w(self) -> Tensor:
        """Log importance weights log p(x, z) - log q(z | x), [K, B], nats; their mean is the ELBO."""
        return self.log_px + self.log_pz - self.log_qz


def draw(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    vectorize_particles: bool = True,
    max_plate_nesting: int = 1,
    reparameterised: bool = True,
    fixes_z: bool = False,
    **kwargs: Any,
) -> Terms:
    """Trace the guide, replay the model on the same z, and add up the log-probabilities by kind.

    An example is one index of the plates that *all* sites share (for a VAE: the plate "data"). Sites in further plates
    are summed; a program without a shared plate counts as one example (B = 1), and two shared plates give [K, A, B].

    Args:
        model: p(x, z), a Pyro program.
        guide: q(z | x), a Pyro program with the same arguments.
        *args: arguments of both, such as x [B, *E].
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass, in a plate "particles" outside the others; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.
        reparameterised: let gradients flow through z; False: z is drawn without its gradient, from any guide.
        fixes_z: also score the same z held fixed (``Terms.fixed``), by running both programs once more.
        **kwargs: keyword arguments of both.

    Returns:
        The terms, each [K, B], nats.

    Raises:
        ValueError: num_particles < 1; a latent site of one program is missing in the other; a guide site has no
            reparameterised sampler although a gradient is wanted; ``fixes_z`` and a program is not the same function
            when it runs again (dropout).

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> draw(vae.model, vae.guide, torch.ones(5, 7), num_particles=3).log_w.shape
        torch.Size([3, 5])
    """
    check_num_particles(num_particles)

    def once(model: Program, guide: Program) -> tuple[Terms, Trace, Trace]:
        return _once(model, guide, args, kwargs, max_plate_nesting, reparameterised, fixes_z)

    if vectorize_particles:
        if num_particles > 1:
            particles = pyro.plate("particles", num_particles, dim=-1 - max_plate_nesting)
            model, guide = particles(model), particles(guide)
        terms = once(model, guide)[0]
    else:
        passes, minibatch = [], Trace()
        for _ in range(num_particles):
            each, *traces = once(poutine.replay(model, trace=minibatch), poutine.replay(guide, trace=minibatch))
            passes.append(each)
            for trace in traces:  # all particles see the examples that the first one drew
                for name, site in trace.nodes.items():
                    if site_is_subsample(site) and name not in minibatch:
                        minibatch.add_node(name, **site)
        terms = _stacked(passes)
    if len(terms.log_px) != num_particles:
        raise ValueError(
            f"expected {num_particles} particles, found {len(terms.log_px)}: "
            f"give your own plates other names than {' and '.join(_PARTICLE_PLATES)}."
        )
    return terms


def _once(
    model: Program,
    guide: Program,
    args: Any,
    kwargs: Any,
    max_plate_nesting: int,
    reparameterised: bool,
    fixes_z: bool,
) -> tuple[Terms, Trace, Trace]:
    """The terms of one pass, and the traces of guide and model with their subsample sites."""
    model_trace, guide_trace = _traces(model, guide, args, kwargs, max_plate_nesting, reparameterised)
    terms = collect(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace), reparameterised)
    if fixes_z and not torch.is_grad_enabled():
        terms = terms._replace(fixed=terms)
    elif fixes_z:
        held = _held(guide_trace, model_trace)
        again = poutine.replay(model, trace=held), poutine.replay(guide, trace=held)
        of_model, of_guide = _traces(*again, args, kwargs, max_plate_nesting, True)
        fixed = collect(prune_subsample_sites(of_model), prune_subsample_sites(of_guide), reparameterised=False)
        terms = terms._replace(fixed=fixed)
        _check_same_functions(terms)
    return terms, guide_trace, model_trace


def _held(*traces: Trace) -> Trace:
    """The draws of these traces without their gradients, and the examples that were drawn."""
    held = Trace()
    for trace in traces:
        for name, site in trace.nodes.items():
            node: Any = dict(site)
            if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(site):
                node["value"] = node["value"].detach()
            elif not site_is_subsample(site):
                continue
            if name not in held:
                held.add_node(name, **node)
    return held


def _stacked(passes: list[Terms]) -> Terms:
    """The terms of several passes as those of one."""
    log_px, log_pz, log_qz = (torch.cat(parts) for parts in list(zip(*passes, strict=True))[:3])
    traces = tuple(pair for terms in passes for pair in terms.passes)
    fixed = [terms.fixed for terms in passes if terms.fixed is not None]
    return passes[-1]._replace(
        log_px=log_px, log_pz=log_pz, log_qz=log_qz, passes=traces, fixed=_stacked(fixed) if fixed else None
    )


class _Detached(Messenger):
    """Draws lose their gradient as they are made, so that all that follows takes them for constants."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def _traces(
    model: Program, guide: Program, args: Any, kwargs: Any, max_plate_nesting: int, reparameterised: bool
) -> tuple[Trace, Trace]:
    """Run the guide, and the model on the guide's draws."""
    try:
        with nullcontext() if reparameterised else _Detached():  # outside the trace, which then records what it made
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    except ValueError as error:
        if "collide" in str(error):
            raise ValueError(
                f"expected at most {max_plate_nesting} nested plates, found more: set max_plate_nesting to the largest "
                "number of plates that a site of the model is in."
            ) from error
        raise
    if is_validation_enabled():  # names first: Pyro would only warn about them
        _check_same_latents(*map(_sites, map(prune_subsample_sites, (model_trace, guide_trace))))
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting + 1)
    return model_trace, guide_trace


class Layout(NamedTuple):
    """Which axes of a site are particles and examples, and what an example counts for: from :func:`layout`."""

    sizes: dict[int, int]  # of the axes that are kept, outermost first
    shape: tuple[int, ...]  # (K, B)
    common: Tensor | float

    def weighted(self, value: Tensor, site: Any, event_dim: int = 0) -> Tensor:
        """A value [*batch, *event] of a site, times what the site's scale has beyond the common one, and masked."""
        scale, mask = (
            w.reshape(w.shape + (1,) * event_dim) if isinstance(w, Tensor) else w
            for w in (site["scale"] / self.common, site["mask"])
        )
        return scale_and_mask(value, scale, mask)

    def total(self, values: Iterable[Tensor], like: Tensor) -> Tensor:
        """The sum of weighted values over all axes but those of particles and examples, [K, B]."""
        result = like.new_zeros(())
        for value in values:
            inner = [dim for dim in range(-value.dim(), 0) if dim not in self.sizes]
            result = result + (value.sum(inner, keepdim=True) if inner else value)
        depth = max([result.dim()] + [-dim for dim in self.sizes])
        return result.expand([self.sizes.get(dim, 1) for dim in range(-depth, 0)]).reshape(self.shape)

    def spread(self, value: Tensor) -> Tensor:
        """A value [*batch, D], its axes other than those of particles and examples joined to the last, [K, B, D]."""
        depth = max([value.dim() - 1] + [-dim for dim in self.sizes])
        value = value.reshape((1,) * (depth + 1 - value.dim()) + value.shape)
        sizes = [self.sizes.get(dim, value.shape[dim - 1]) for dim in range(-depth, 0)]
        kept = [dim - 1 for dim in self.sizes]
        return value.expand(*sizes, -1).movedim(kept, list(range(len(kept)))).reshape(*self.shape, -1)


def layout(model_trace: Trace, guide_trace: Trace) -> Layout:
    """The axes of particles and examples: those of the plates that all sites share.

    Args:
        model_trace: a trace of the model, subsample sites pruned.
        guide_trace: a trace of the guide, subsample sites pruned.

    Returns:
        The layout, with the scale that the observations share.
    """
    guide_sites, model_sites = _sites(guide_trace), _sites(model_trace)
    observed = [site for site in model_sites if site["is_observed"]]
    hidden = [site for site in model_sites if not site["is_observed"]] + guide_sites
    shared = set.intersection(*[{f for f in s["cond_indep_stack"] if f.vectorized} for s in observed + hidden])
    particles = next((frame for frame in shared if frame.name in _PARTICLE_PLATES), None)
    examples = sorted(shared - {particles}, key=lambda frame: frame.dim)
    sizes = {frame.dim: frame.size for frame in [*([particles] if particles else []), *examples]}
    common = _common_scale(observed, hidden, {frame.dim for frame in examples})
    common = common * _plate_scale(shared)
    shape = (particles.size if particles else 1, *([frame.size for frame in examples] or [1]))
    return Layout(sizes, shape, common)


def collect(model_trace: Trace, guide_trace: Trace, reparameterised: bool = True) -> Terms:
    """Add up the log-probabilities of two traces, the model's replayed on the guide's, to [K, B].

    Args:
        model_trace: a trace of the model, subsample sites pruned.
        guide_trace: a trace of the guide, subsample sites pruned.
        reparameterised: gradients flow through z; False: z was drawn without its gradient.

    Returns:
        The terms, each [K, B], nats.

    Raises:
        ValueError: a latent site of one program is missing in the other; a site was enumerated; a guide site has no
            reparameterised sampler although a gradient is wanted.
    """
    guide_sites, model_sites = _sites(guide_trace), _sites(model_trace)
    observed = [site for site in model_sites if site["is_observed"]]
    latent = [site for site in model_sites if not site["is_observed"]]
    if not model_sites + guide_sites:
        raise ValueError("expected a model with sample sites, found none: write pyro.sample(...) in model and guide.")
    _check_same_latents(model_sites, guide_sites)
    axes = layout(model_trace, guide_trace)

    def log_probs(sites: list[Any], of_guide: bool = False) -> list[Tensor]:
        values = []
        for site in sites:
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            if of_guide and reparameterised:
                _check_reparameterised(site, log_prob)
            values.append(axes.weighted(log_prob, site))
        return values

    parts = [log_probs(observed), log_probs(latent), log_probs(guide_sites, of_guide=True)]
    like = next(value for part in parts for value in part)
    log_px, log_pz, log_qz = (axes.total(part, like) for part in parts)
    common = axes.common
    scale = axes.total([common], like)[0] if isinstance(common, Tensor) else common
    return Terms(log_px, log_pz, log_qz, scale, model_trace, guide_trace, ((model_trace, guide_trace),))


def _sites(trace: Trace) -> list[Any]:
    sites: list[Any] = [site for site in trace.nodes.values() if site["type"] == "sample"]
    for site in sites:
        if "_enumerate_dim" in site["infer"]:
            raise ValueError(f"site '{site['name']}' was enumerated, expected a draw: use pyro.infer.TraceEnum_ELBO.")
    return sites


def _plate_scale(frames: Any) -> float:
    return math.prod(frame.full_size / frame.size for frame in frames if frame.full_size is not None)


def _common_scale(
    observed: list[dict[str, Any]], hidden: list[dict[str, Any]], example_dims: set[int]
) -> Tensor | float:
    """What ``poutine.scale`` makes an example count for; a site with another scale keeps the ratio inside the terms.

    It is what the observations have beyond the scale of their plates: a tempered prior stays inside. Where they differ
    (one of several is weighted, or pixels are), it is what the latent sites have; and else 1.
    """
    for sites in (observed, hidden):
        scales = [site["scale"] / _plate_scale(site["cond_indep_stack"]) for site in sites]
        if scales and all(_same_scale(scales[0], scale, example_dims) for scale in scales):
            return scales[0]
    return 1.0


def _same_scale(a: Tensor | float, b: Tensor | float, example_dims: set[int]) -> bool:
    """Whether two scales are one, and vary with the example at most."""
    if isinstance(a, Tensor):
        varying = {dim for dim in range(-a.dim(), 0) if a.shape[dim] > 1}
        same = a is b or (isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b))
        return same and varying <= example_dims
    return not isinstance(b, Tensor) and math.isclose(a, b)


def _check_same_latents(model_sites: list[dict[str, Any]], guide_sites: list[dict[str, Any]]) -> None:
    of_model = {site["name"] for site in model_sites if not site["is_observed"]}
    of_guide = {site["name"] for site in guide_sites if not site["is_observed"]}
    auxiliary = {site["name"] for site in guide_sites if site["infer"].get("is_auxiliary")}
    if of_model - of_guide:
        raise ValueError(
            f"expected a guide site for each latent site of the model, found none for {sorted(of_model - of_guide)}: "
            "sample it in the guide under the same name, or observe it in the model."
        )
    if of_guide - of_model - auxiliary:
        raise ValueError(
            f"expected a latent model site for each guide site, found none for "
            f"{sorted(of_guide - of_model - auxiliary)}: sample it in the model under the same name, "
            "or mark it with infer={'is_auxiliary': True}."
        )


def _check_reparameterised(site: dict[str, Any], log_prob: Tensor) -> None:
    """Differentiating the bound through z is right only where z is a differentiable function of the parameters.

    A factor in a guide says itself (``has_rsample=False``) that it stems from draws that are not.
    """
    observed = site["is_observed"] and "has_rsample" not in vars(site["fn"])
    if observed or site["fn"].has_rsample or not (torch.is_grad_enabled() and log_prob.requires_grad):
        return
    raise ValueError(
        f"guide site '{site['name']}' ({type(site['fn']).__name__}) has no reparameterised sampler (rsample), so this "
        "gradient would be biased: use ScoreFunction or pyro.infer.TraceGraph_ELBO (score function) or, for enumerable "
        "sites, pyro.infer.TraceEnum_ELBO."
    )


def _check_same_functions(terms: Terms) -> None:
    """Holding z fixed means to run the programs again: they must then be the same functions of z and the parameters."""
    if not is_validation_enabled() or terms.fixed is None:
        return
    for name, first, second in zip(("log p(x|z)", "log p(z)", "log q(z|x)"), terms[:3], terms.fixed[:3], strict=True):
        first, second = first.detach(), second.detach()
        off = ((first - second).abs() / (1 + first.abs())).masked_fill(first == second, 0.0).max().item()
        if not off < 1e-2:
            raise ValueError(
                f"expected model and guide to be the same functions when they run again on the same z, found {name} "
                f"changed by {off:.1e} of itself: switch off what is random in them (dropout), or use an objective "
                "that runs them once, such as ELBO or IWAE."
            )


def check_num_particles(num_particles: int, name: str = "num_particles") -> None:
    """Refuse a number of particles (or what ``name`` says) that is not an integer >= 1."""
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"expected {name} to be an integer >= 1, found {num_particles!r}.")
