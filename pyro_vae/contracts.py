"""The whole interface on one screen: what a prior, a likelihood, an encoder and a VAE are, and how to check them.

=============  ==============================================  =======================================
term           is any callable                                 swapped by
=============  ==============================================  =======================================
Prior          ``() -> Distribution`` over z                   ``VAE(prior=...)``, ``--prior``
Likelihood     ``h -> Distribution`` over x                    ``Decoder(net, likelihood)``, ``--likelihood``
Decoder        ``z -> Distribution`` over x                    ``VAE(decoder=...)``
Encoder        ``x -> Distribution`` over z                    ``VAE(encoder=...)``, ``--encoder``
Objective      a ``pyro.infer.ELBO`` with a ``bound``          ``fit(objective=...)``, ``--objective``
=============  ==============================================  =======================================

One object both samples and scores. The three classes below only say what the members of this library share;
a plain function or any ``nn.Module`` of the same shape is as good.

Shapes: ``z`` is ``[*batch, D]``, ``x`` is ``[*batch, *E]``; a distribution has ``batch_shape == batch`` and
``event_shape`` ``(D,)`` or ``E``. K particles put one more axis in front: ``z`` is ``[K, B, D]``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # Pyro's distributions share a mixin without types; this sibling has them
    from pyro.distributions import TorchDistribution as Distribution
else:
    from pyro.distributions import Distribution

PriorLike = Callable[[], Distribution]
LikelihoodLike = Callable[[Tensor], Distribution]
DecoderLike = Callable[[Tensor], Distribution]
EncoderLike = Callable[[Tensor], Distribution]


class Prior(nn.Module, ABC):
    """A prior p(z): called without arguments, it returns a distribution with batch shape ()."""

    @abstractmethod
    def forward(self) -> Distribution:
        """The distribution p(z), batch shape ``()``, event shape ``(D,)``."""


class Likelihood(nn.Module, ABC):
    """A likelihood p(x | z): called with a network's output h, it returns a distribution over x.

    Args:
        event_dim: how many of the last axes of x make up one example: 1 for vectors [E], 3 for images [C, H, W].
    """

    num_outputs: int = 1
    """Numbers that the network gives for each number of x: h is [*batch, num_outputs * E[0], *E[1:]]."""

    def __init__(self, event_dim: int = 1):
        super().__init__()
        if event_dim < 1:
            raise ValueError(f"expected event_dim >= 1, found {event_dim}: 1 for vectors, 3 for images [C, H, W].")
        self.event_dim = event_dim

    def extra_repr(self) -> str:
        """Show the event rank."""
        return f"event_dim={self.event_dim}"

    @abstractmethod
    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h), batch shape ``h.shape[:-event_dim]``."""

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The output h, [num_outputs * E[0], *E[1:]], at which p(x | h) has the data's mean (and scale), each [*E]."""
        raise NotImplementedError


class Encoder(nn.Module, ABC):
    """An approximate posterior q(z | x): called with x [*batch, *E], it returns a distribution over z [*batch, D]."""

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """How many numbers the encoder's network must give for D latent dimensions."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x), batch shape ``x.shape[:-event_dim]``."""


@contextmanager
def untouched(module: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Look at a model without changing it: no gradients, evaluation mode, and everything put back afterwards.

    Inside, ``module`` is in evaluation mode, autograd is off, Pyro's parameter store is a copy and torch's
    random numbers start at ``seed`` (None: they go on from where they are). On leaving, each submodule's
    train/eval flag, the parameter store and the random state of the CPU and of the module's devices are as before.

    Args:
        module: the model.
        seed: seed of the random numbers drawn inside.
    """
    flags = {part: part.training for part in module.modules()}
    devices = {t.device for t in [*module.parameters(), *module.buffers()] if t.device.type == "cuda"}
    store = pyro.get_param_store()
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)), store.scope(store.get_state()):
        try:
            module.eval()
            if seed is not None:
                torch.default_generator.manual_seed(seed)
                for device in devices:  # not torch.manual_seed: it would reseed the devices that are not put back
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(seed)
            yield
        finally:
            for part, flag in flags.items():
                part.training = flag


def _shape(shape: Any) -> str:
    return str(tuple(shape))


def _require_distribution(value: Any, call: str) -> Distribution:
    if not isinstance(value, Distribution):
        hint = (
            f"import {type(value).__name__} from pyro.distributions instead of torch.distributions"
            if isinstance(value, torch.distributions.Distribution)
            else "return an object of pyro.distributions"
        )
        raise TypeError(f"{call} returned {type(value).__name__}, expected a Pyro distribution: {hint}.")
    return value


def _batch_remedy(name: str, found: tuple, expected: tuple) -> str:
    extra = len(found) - len(expected)
    if extra > 0 and found[: len(expected)] == expected:
        return f"end it with .to_event({extra}) (or raise its event_dim by {extra})"
    if extra < 0:
        return f"lower the number in its .to_event(...) (or its event_dim) by {-extra}"
    return f"make the first axis of what {name} returns the batch of its input"


def check_vae(vae: Any, x: Tensor) -> None:
    """Say in words which pieces of a VAE do not fit each other or the data; one dry run, nothing changed.

    Checked: x is a non-empty batch of finite floating-point numbers; ``prior()``, ``encoder(x)`` and
    ``decoder(z)`` return Pyro distributions with the right batch and event shapes, also with a particle axis in
    front; the posterior's draws have positive prior density; x lies in the support of p(x | z).

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
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"x has {bad} values that are NaN or infinite, expected finite ones: clean or mask them.")
    batch, event = tuple(x.shape[:1]), tuple(x.shape[1:])

    with untouched(vae), pyro.validation_enabled(False):
        prior = _require_distribution(vae.prior(), "prior()")
        if tuple(prior.batch_shape) != ():
            remedy = _batch_remedy("prior()", tuple(prior.batch_shape), ())
            raise ValueError(f"prior() has batch shape {_shape(prior.batch_shape)}, expected (): {remedy}.")

        q = _require_distribution(_run(vae.encoder, x, "encoder(x)"), "encoder(x)")
        if tuple(q.batch_shape) != batch:
            remedy = _batch_remedy("encoder(x)", tuple(q.batch_shape), batch)
            raise ValueError(f"encoder(x) has batch shape {_shape(q.batch_shape)}, expected {_shape(batch)}: {remedy}.")
        if q.event_shape != prior.event_shape:
            raise ValueError(
                f"prior() has event shape {_shape(prior.event_shape)} but encoder(x) has {_shape(q.event_shape)}: "
                "give both the same latent_dim."
            )

        z = q.sample()
        for particles in ((2,), ()):
            zs = z.expand(particles + z.shape)
            call = "decoder(z)" if not particles else f"decoder(z) with z of shape {_shape(zs.shape)}"
            p = _require_distribution(_run(vae.decoder, zs, call), call)
            if tuple(p.batch_shape) != particles + batch:
                remedy = _batch_remedy("decoder(z)", tuple(p.batch_shape), particles + batch)
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


def check_support(p: Distribution, x: Tensor) -> None:
    """Refuse data that the likelihood gives no probability, naming one offending value.

    Args:
        p: a distribution over x with batch shape [B] or [1].
        x: data, [B, *E].

    Raises:
        ValueError: some value of x lies outside the support of p.
    """
    base: Any = p
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    support = base.support
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    inside = support.check(x)
    if bool(inside.all()):
        return
    outside = x[~inside] if inside.shape == x.shape else x
    found = float(outside.flatten()[0])
    kind = type(support).__name__.removeprefix("_")
    where, remedy = _SUPPORT_REMEDY.get(kind, (f"the support {support}", "choose a likelihood that allows it"))
    if kind == "Interval":
        low, high = (float(torch.as_tensor(b).flatten()[0]) for b in (support.lower_bound, support.upper_bound))
        where = f"[{low:g}, {high:g}]"
    if kind == "IntegerInterval":
        where = where.format(hi=int(torch.as_tensor(support.upper_bound).max()))
    raise ValueError(f"x has values outside {where} (found {found:.4g}): {remedy}.")
