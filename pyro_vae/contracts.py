"""The whole interface on one screen: what a prior, a likelihood, an encoder and an objective are.

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
a plain function or any ``nn.Module`` of the same shape is as good. :func:`pyro_vae.check_vae` says in words which
pieces of a VAE do not fit each other; :mod:`pyro_vae.testing` checks that one keeps its promises.

Shapes: ``z`` is ``[*batch, D]``, ``x`` is ``[*batch, *E]``; a distribution has ``batch_shape == batch`` and
``event_shape`` ``(D,)`` or ``E``. K particles put one more axis in front: ``z`` is ``[K, B, D]``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

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


def split_outputs(likelihood: Likelihood, h: Tensor) -> Sequence[Tensor]:
    """The num_outputs parts of a network's output, each [*batch, *E].

    Args:
        likelihood: says how many parts, and how many axes E has.
        h: the network's output, [*batch, num_outputs * E[0], *E[1:]].

    Raises:
        ValueError: the parts would not be equal.
    """
    parts, axis = likelihood.num_outputs, -likelihood.event_dim
    if h.shape[axis] % parts:  # unequal parts would broadcast
        raise ValueError(
            f"{type(likelihood).__name__} expected {parts} E outputs of the network, found {h.shape[axis]} on axis "
            f"{axis}: make its last layer {'twice' if parts == 2 else f'{parts} times'} as wide as x."
        )
    return h.chunk(parts, dim=axis)


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


def check_positive(**arguments: float) -> None:
    """Refuse an argument that is not above 0."""
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"expected {name} > 0, found {value}: choose a positive number.")


def check_at_least_one(**arguments: int) -> None:
    """Refuse a number of things below 1."""
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"expected {name} >= 1, found {value}: choose a positive number.")


def check_several(latent_dim: int) -> None:
    """Refuse a single latent dimension where a prior needs several."""
    if latent_dim < 2:
        raise ValueError(f"expected latent_dim >= 2, found {latent_dim}: this prior needs two numbers or more.")
