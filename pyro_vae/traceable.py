"""What Pyro does by looking at values or by assigning names, in a form that a captured step can hold.

Nothing of Pyro changes beyond the ``with`` blocks: outside them, and in other programs, it is as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer import traceenum_elbo
from pyro.infer import util as infer_util
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _AllTrue(TorchFunctionMode):
    """``mask.all()`` is taken to be true."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch.Tensor.all else func(*args, **(kwargs or {}))


class PlainDraws(TorchFunctionMode):
    """The same draws of coins and one-hot vectors, by operations that a captured and compiled step can hold.

    Double-precision coins on the processor become a comparison with the uniform numbers behind them: inductor would
    take uniform numbers of single precision, other coins than eager torch's. (In single precision they are the same.)
    ``one_hot`` checks the values of its indices, which a graph cannot; here they are scattered. ``normal`` checks its
    scales and ``multinomial`` its weights within the kernel, unseen, which a CUDA graph cannot; here they are not.

    Example:
        >>> p = torch.full((100,), 0.3, dtype=torch.float64)
        >>> _ = torch.manual_seed(0)
        >>> expected = torch.bernoulli(p)
        >>> _ = torch.manual_seed(0)
        >>> with PlainDraws():
        ...     torch.equal(torch.bernoulli(p), expected)
        True
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.bernoulli and len(args) == 1 and not kwargs:
            (probs,) = args
            if probs.dtype == torch.float64 and probs.device.type == "cpu":
                return (torch.rand_like(probs) < probs).to(probs.dtype)
        if func is torch.normal and len(args) == 2 and not kwargs and all(isinstance(a, Tensor) for a in args):
            loc, scale = args
            noise = torch.randn(torch.broadcast_shapes(loc.shape, scale.shape), dtype=loc.dtype, device=loc.device)
            return (noise * scale + loc).detach()
        if func is torch.multinomial and len(args) > 1 and args[1] == 1 and not kwargs:
            return (args[0] / torch.empty_like(args[0]).exponential_()).argmax(-1, keepdim=True)
        if func is nn.functional.one_hot and len(args) == 2 and args[1] > 0:
            index, num_classes = args
            return index.new_zeros(*index.shape, num_classes).scatter(-1, index.unsqueeze(-1), 1)
        return func(*args, **(kwargs or {}))


@contextmanager
def dense_enumeration() -> Iterator[None]:
    r"""Sum over *all* enumerated values, a fixed number of them, as ``TraceEnum_ELBO`` does for a captured step.

    .. math:: \sum_z q(z) \, c(z) = \sum_z q(z) \, [c(z) \text{ if } q(z) > 0 \text{ else } 0]

    Pyro picks the values of positive probability by a mask index where some have none, since their cost may be
    infinite: another number of terms each time. Here their cost is replaced by 0 before it is multiplied: the same
    value and gradient. It also compares the scales of enumerated sites, which reads them; eager steps do that.

    Example:
        >>> from pyro.infer import TraceEnum_ELBO, config_enumerate
        >>> from pyro_vae import VAE, Bernoulli, Decoder, Mlp, discrete, priors
        >>> encoder = discrete.OneHotCategorical(Mlp(7, 8, 3))
        >>> vae = VAE(priors.OneHotCategorical(3), Decoder(Mlp(3, 8, 7), Bernoulli()), encoder)
        >>> elbo, guide = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(vae.guide)
        >>> expected = elbo.differentiable_loss(vae.model, guide, torch.ones(5, 7))
        >>> with dense_enumeration():
        ...     loss = elbo.differentiable_loss(vae.model, guide, torch.ones(5, 7))
        >>> torch.equal(loss, expected)
        True
    """
    dice: Any = infer_util.Dice
    expectation, dot, common = dice.compute_expectation, infer_util._fulldot, traceenum_elbo._get_common_scale

    def dense(self: Any, costs: Any) -> Any:
        with _AllTrue():  # only here, where no line of the user's runs
            return expectation(self, costs)

    dice.compute_expectation = dense
    infer_util._fulldot = lambda prob, cost: dot(prob, torch.where(prob > 0, cost, 0.0))
    traceenum_elbo._get_common_scale = lambda scales: scales[0]
    try:
        yield
    finally:
        dice.compute_expectation = expectation
        infer_util._fulldot, traceenum_elbo._get_common_scale = dot, common


@contextmanager
def assigned_in_place(assigned: dict[str, Tensor]) -> Iterator[None]:
    """What a step assigns in Pyro's parameter store is, at its end, written into the tensor that was there before.

    A captured step knows tensors, not names, so a decaying-average baseline must keep its tensor to be seen by the
    next replay. Within the step names are assigned as ever. A parameter that the step also gives a gradient, or that
    changes its shape, stays as it was assigned.

    Args:
        assigned: receives the tensors that were written into, by name.

    Example:
        >>> mean, seen = pyro.param("mean", torch.tensor(1.0)), {}
        >>> with assigned_in_place(seen):
        ...     pyro.get_param_store()["mean"] = torch.tensor(3.0)
        >>> mean.item(), list(seen), pyro.get_param_store()["mean"] is mean
        (3.0, ['mean'], True)
    """
    store = pyro.get_param_store()
    before, state = dict(store.named_parameters()), store.get_state()
    yield
    after = dict(store.named_parameters())
    for name, old in before.items():
        new = after.get(name)
        if new is None or new is old or old.grad is not None or (new.shape, new.dtype) != (old.shape, old.dtype):
            continue
        with torch.no_grad():
            old.copy_(new)
        constraint = state["constraints"][name]
        store.set_state({"params": {name: old}, "constraints": {name: constraint}})
        assigned[name] = old
