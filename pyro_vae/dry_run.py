"""Do the pieces of a VAE fit each other and the data: one dry run, and words for what does not."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.contracts import Distribution, untouched
from pyro_vae.supports import NO_GAPS, check_support, element_support, kind_of_values


def check_vae(vae: Any, x: Tensor) -> None:
    """Say in words which pieces of a VAE do not fit each other or the data; one dry run, nothing changed.

    Checked: x is a non-empty batch of finite floating-point numbers (NaN, a missing one, if p(x | z) takes it, see
    :class:`pyro_vae.likelihoods.Masked`); ``prior()``, ``encoder(x)`` and
    ``decoder(z)`` return Pyro distributions with the right batch and event shapes, also with a particle axis in
    front; prior and posterior are over one kind of z (discrete, relaxed, real) and the posterior's draws have positive
    prior density; x lies in the support of p(x | z).

    Args:
        vae: an object with ``prior``, ``decoder`` and ``encoder`` (a :class:`pyro_vae.VAE`).
        x: data, [B, *E].

    Raises:
        TypeError: a piece returns something else than a Pyro distribution, or x is not a floating-point tensor.
        ValueError: shapes or supports do not fit; the message says what was expected, what was found, what to do.

    Example:
        >>> import torch
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal, check_vae
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(3, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 6)))
        >>> check_vae(vae, torch.ones(5, 7))
        Traceback (most recent call last):
        ValueError: prior() has event shape (2,) but encoder(x) has (3,): give both the same latent_dim.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {found}, expected a floating-point tensor [B, *E]: convert it with x.float().")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"x has shape {_shape(x.shape)}, expected [B, *E] with B >= 1: a single example is x.unsqueeze(0)."
        )
    if bool(x.isinf().any()):
        raise ValueError(f"x has {int(x.isinf().sum())} infinite values, expected finite ones: clean the data.")
    gaps = int(x.isnan().sum())
    batch, event = tuple(x.shape[:1]), tuple(x.shape[1:])

    with untouched(vae), pyro.validation_enabled(False):
        prior = require_distribution(vae.prior(), "prior()")
        if tuple(prior.batch_shape) != ():
            remedy = batch_remedy("prior()", tuple(prior.batch_shape), ())
            raise ValueError(f"prior() has batch shape {_shape(prior.batch_shape)}, expected (): {remedy}.")

        if gaps and not _takes_nan(_run(vae.decoder, prior.sample(batch), "decoder(z)"), x):
            raise ValueError(NO_GAPS.format(gaps))
        q = require_distribution(_run(vae.encoder, x, "encoder(x)"), "encoder(x)")
        if tuple(q.batch_shape) != batch:
            remedy = batch_remedy("encoder(x)", tuple(q.batch_shape), batch)
            raise ValueError(f"encoder(x) has batch shape {_shape(q.batch_shape)}, expected {_shape(batch)}: {remedy}.")
        if q.event_shape != prior.event_shape:
            raise ValueError(
                f"prior() has event shape {_shape(prior.event_shape)} but encoder(x) has {_shape(q.event_shape)}: "
                "give both the same latent_dim."
            )
        _check_same_values(prior, q)

        z = _sample_codes(q) if gaps else q.sample()
        for particles in ((2,), ()):
            zs = z.expand(particles + z.shape)
            call = "decoder(z)" if not particles else f"decoder(z) with z of shape {_shape(zs.shape)}"
            p = require_distribution(_run(vae.decoder, zs, call), call)
            if tuple(p.batch_shape) != particles + batch:
                remedy = batch_remedy("decoder(z)", tuple(p.batch_shape), particles + batch)
                raise ValueError(
                    f"{call} has batch shape {_shape(p.batch_shape)}, expected {_shape(particles + batch)}: {remedy}."
                )
            if tuple(p.event_shape) != event:
                raise ValueError(
                    f"{call} has event shape {_shape(p.event_shape)} but x has {_shape(event)}: "
                    "make the last layer of the decoder's network as wide as x (times the likelihood's num_outputs)."
                )
        check_support(p, x)
        log_pz = prior.log_prob(z)
        if not bool(torch.isfinite(log_pz).all()):
            raise ValueError(
                "prior() gives draws of encoder(x) no density (log p(z) is infinite or NaN): "
                "choose a posterior whose support lies within the prior's, and scale the encoder's input."
            )


def _shape(shape: Any) -> str:
    return str(tuple(shape))


def require_distribution(value: Any, call: str) -> Distribution:
    """What a piece returned, refused where it is no Pyro distribution."""
    if not isinstance(value, Distribution):
        hint = (
            f"import {type(value).__name__} from pyro.distributions instead of torch.distributions"
            if isinstance(value, torch.distributions.Distribution)
            else "return an object of pyro.distributions"
        )
        raise TypeError(f"{call} returned {type(value).__name__}, expected a Pyro distribution: {hint}.")
    return value


def batch_remedy(name: str, found: tuple, expected: tuple) -> str:
    """What to do about a batch shape that is not the expected one."""
    extra = len(found) - len(expected)
    if extra > 0 and found[: len(expected)] == expected:
        return f"end it with .to_event({extra}) (or raise its event_dim by {extra})"
    if extra < 0:
        return f"lower the number in its .to_event(...) (or its event_dim) by {-extra}"
    return f"make the first axis of what {name} returns the batch of its input"


def _run(piece: Callable[[Tensor], Any], value: Tensor, call: str) -> Any:
    """Run one piece; a shape error deep inside torch becomes one line that names the piece."""
    try:
        return piece(value)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{call} failed on an input of shape {_shape(value.shape)} ({reason}): "
            "make the first layer of its network fit (wrap a network that takes one batch axis in OverBatch)."
        ) from error


def _takes_nan(p: Any, x: Tensor) -> bool:
    """Whether NaN, a missing number, belongs to the support of p(x | z)."""
    gap = x.new_full(tuple(p.batch_shape + p.event_shape), float("nan"))
    return bool(element_support(p).check(gap).all())


def _sample_codes(q: Distribution) -> Tensor:
    """Draws of the posterior of examples with missing numbers, which must not be NaN themselves."""
    try:
        z = q.sample()
    except (RuntimeError, ValueError):  # torch refuses to draw with a scale of NaN
        z = torch.tensor(float("nan"))
    if bool(z.isnan().any()):
        raise ValueError(
            "encoder(x) is NaN where x has missing numbers (NaN): let its network begin with missing.FillMissing(...)."
        )
    return z


# What z can be, and who is at home there: priors, encoders.
_AT_HOME = {
    "one-hot vectors": ("priors.OneHotCategorical", "discrete.OneHotCategorical or discrete.StraightThrough"),
    "bits": ("priors.Bernoulli", "discrete.Bernoulli"),
    "the simplex": (
        "relaxed_priors.RelaxedOneHotCategorical or priors.Dirichlet",
        "discrete.RelaxedOneHotCategorical",
    ),
    "the unit sphere": ("SphereUniform", "VonMisesFisher or PowerSpherical"),
    "real numbers": ("StandardNormal", "DiagonalNormal"),
}


def _check_same_values(prior: Distribution, q: Distribution) -> None:
    """Refuse a pair whose densities cannot be compared: one would score as a point what the other holds for a class."""
    try:
        of_prior, of_encoder = kind_of_values(prior), kind_of_values(q)
    except NotImplementedError:
        return  # a distribution of the user's own that does not say where its draws lie
    # The density does not always tell: a flat Dirichlet's formula has a value everywhere.
    if of_prior == of_encoder or not {of_prior, of_encoder} <= set(_AT_HOME):
        return
    raise ValueError(
        f"prior() is over {of_prior} but encoder(x) over {of_encoder}, expected one kind of z: choose the prior "
        f"{_AT_HOME[of_encoder][0]}, or the encoder {_AT_HOME[of_prior][1]}."
    )
