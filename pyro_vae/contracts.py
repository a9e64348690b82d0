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
from collections.abc import Callable, Iterator, Sequence
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

NO_LIKELIHOOD = "no normalised likelihood: no evidence can be claimed"
"""What every report of a score in the place of p(x | z) says; see :mod:`pyro_vae.comparisons`."""


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

    is_normalised: bool = True
    """Whether ``forward`` gives a density or probabilities; a score that is neither allows no claim about p(x)."""

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

    def output_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of h for one example of shape E: (num_outputs * E[0], *E[1:])."""
        return (self.num_outputs * event_shape[0], *event_shape[1:])

    def bias_at(self, x: Tensor) -> Tensor:
        """The output h at which p(x | h) starts at data x [N, *E]: ``output_bias`` of what is there, NaN left out."""
        return self.output_bias(*mean_and_scale(x))


class Encoder(nn.Module, ABC):
    """An approximate posterior q(z | x): called with x [*batch, *E], it returns a distribution over z [*batch, D]."""

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """How many numbers the encoder's network must give for D latent dimensions."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x), batch shape ``x.shape[:-event_dim]``."""


def mean_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (divisor N - 1) of each number over the examples; NaN, a missing one, is left out.

    Args:
        x: data, [N, *E].

    Returns:
        Two tensors [*E]; 0 where nothing is there, and a scale of 0 where there is but one number.
    """
    there = ~x.isnan()
    count = there.sum(0)
    mean = x.nan_to_num(nan=0.0).sum(0) / count.clamp(min=1)
    residual = torch.where(there, x - mean, 0.0)
    return mean, ((residual**2).sum(0) / (count - 1).clamp(min=1)).sqrt()


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
        prior = _require_distribution(vae.prior(), "prior()")
        if tuple(prior.batch_shape) != ():
            remedy = _batch_remedy("prior()", tuple(prior.batch_shape), ())
            raise ValueError(f"prior() has batch shape {_shape(prior.batch_shape)}, expected (): {remedy}.")

        if gaps and not _takes_nan(_run(vae.decoder, prior.sample(batch), "decoder(z)"), x):
            raise ValueError(_NO_GAPS.format(gaps))
        q = _require_distribution(_run(vae.encoder, x, "encoder(x)"), "encoder(x)")
        if tuple(q.batch_shape) != batch:
            remedy = _batch_remedy("encoder(x)", tuple(q.batch_shape), batch)
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


_NO_GAPS = (
    "x has {} values that are NaN, expected finite numbers: fill them in, or, where NaN means missing, wrap the "
    "likelihood in likelihoods.Masked (--likelihood Masked --likelihood.likelihood CLASS)."
)


def _takes_nan(p: Any, x: Tensor) -> bool:
    """Whether NaN, a missing number, belongs to the support of p(x | z)."""
    gap = x.new_full(tuple(p.batch_shape + p.event_shape), float("nan"))
    return bool(_element_support(p).check(gap).all())


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
        of_prior, of_encoder = _kind_of_values(prior), _kind_of_values(q)
    except NotImplementedError:
        return  # a distribution of the user's own that does not say where its draws lie
    # The density does not always tell: a flat Dirichlet's formula has a value everywhere.
    if of_prior == of_encoder or not {of_prior, of_encoder} <= set(_AT_HOME):
        return
    raise ValueError(
        f"prior() is over {of_prior} but encoder(x) over {of_encoder}, expected one kind of z: choose the prior "
        f"{_AT_HOME[of_encoder][0]}, or the encoder {_AT_HOME[of_prior][1]}."
    )


def _kind_of_values(d: Distribution) -> str:
    support = plain_support(d)
    kinds = {"_OneHot": "one-hot vectors", "_Boolean": "bits", "_Simplex": "the simplex", "_Sphere": "the unit sphere"}
    return kinds.get(type(support).__name__, "integers" if support.is_discrete else "real numbers")


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


def is_normalised(p: Any) -> bool:
    """Whether p is a distribution, and no score in the place of one (:mod:`pyro_vae.comparisons`)."""
    while isinstance(p, torch.distributions.Independent):
        p = p.base_dist
    return getattr(p, "is_normalised", True)


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


def check_support(p: Distribution, x: Tensor) -> None:
    """Refuse data that the likelihood gives no probability, naming one offending value.

    Args:
        p: a distribution over x with batch shape [B] or [1].
        x: data, [B, *E].

    Raises:
        ValueError: some value of x lies outside the support of p.
    """
    support = _element_support(p)
    inside = support.check(x)
    if bool(inside.all()):
        return
    outside = x[~inside] if inside.shape == x.shape else x
    found = float(outside.flatten()[0])
    if bool(outside.isnan().any()):
        raise ValueError(_NO_GAPS.format(int(x.isnan().sum())))
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


def _element_support(p: Any) -> Any:
    """The support of the single numbers of x."""
    while isinstance(p, torch.distributions.Independent):
        p = p.base_dist
    support = p.support
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    return support


def plain_support(d: Distribution) -> Any:
    """What kind of numbers a distribution draws: its support without what independence or a mixture wrap around it."""
    support = _element_support(d)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


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
        kind = _kind_of_values(q)
    except NotImplementedError:
        return q.mean
    return q.mean if kind in ("real numbers", "the simplex") else q.mode


def _check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"expected {name} > 0, found {value}: choose a positive number.")


def _check_several(latent_dim: int) -> None:
    if latent_dim < 2:
        raise ValueError(f"expected latent_dim >= 2, found {latent_dim}: this prior needs two numbers or more.")
