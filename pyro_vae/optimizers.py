"""One optimiser over all parameters, from what the user of Pyro writes.

``pyro.optim`` makes one torch optimiser for each parameter and runs them one after the other; for small networks that
is a fifth of a step. Here a ``pyro.optim`` optimiser becomes one torch optimiser: the same numbers, one pass over all
parameters. torch's own ``step`` takes as long in Python as its fused kernel: Adam and AdamW call the kernel straight.
"""

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.optim.clipped_adam import ClippedAdam as PyroClippedAdam
from torch import Tensor

from pyro_vae.capture import is_recording


class _Straight:
    """The ``step`` of torch's fused Adam and AdamW without what they look after beside it."""

    param_groups: list[dict[str, Any]]
    state: Any

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
    ) -> None:
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True, **decay)  # type: ignore[call-arg]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            self._move(group, group["eps"])
        return loss

    def _counted(self, key: Any, states: list[dict[str, Any]]) -> tuple[Tensor, list[Tensor]]:
        """The step counters of some parameters, one higher: one tensor, so that one addition counts all, its parts."""
        known = self.__dict__.setdefault("_counts", {})  # a copied or unpickled optimiser comes without it
        steps = [state["step"] for state in states]
        counts, parts = known.get(key, (None, []))
        if len(parts) != len(steps) or not all(map(operator.is_, parts, steps)):  # new parameters, or a loaded state
            counts = torch.stack(steps)
            steps = list(counts.unbind())
            known[key] = counts, steps
            for state, step in zip(states, steps, strict=True):
                state["step"] = step
        counts.add_(1)
        return counts, steps

    def _move(self, group: dict[str, Any], eps: float) -> None:
        kinds: dict[Any, list[Tensor]] = {}  # the kernel takes tensors of one type and device
        for p in group["params"]:
            if p.grad is not None:
                kinds.setdefault((p.dtype, p.device), []).append(p)
        for kind, parameters in kinds.items():
            for p in parameters:
                if not self.state[p]:
                    zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    step = torch.zeros((), dtype=torch.float32, device=p.device)  # the type that CUDA's kernel reads
                    self.state[p] = {"step": step, **zeros}
            states = [self.state[p] for p in parameters]
            counts, steps = self._counted((id(group), *kind), states)
            if is_recording():
                _move_by_operations(parameters, states, counts, group)
                continue
            (torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_)(
                parameters,
                [p.grad for p in parameters],  # type: ignore[misc]  # none is None
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=eps,
                amsgrad=False,
                maximize=False,
            )


def _move_by_operations(
    parameters: list[Tensor], states: list[dict[str, Any]], counts: Tensor, group: dict[str, Any]
) -> None:
    r"""The kernel's step as plain operations, which a compiler fuses with each other and with what stands before.

    .. math:: m \gets \beta_1 m + (1 - \beta_1) g, \quad v \gets \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \gets \theta - \frac{\lambda}{1 - \beta_1^t} \frac{m}{\sqrt v / \sqrt{1 - \beta_2^t} + \epsilon}
    """
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    # By exp, which inductor computes once and keeps; powers it would compute again for each element.
    rise1, rise2 = (1 - (counts.double() * (math.log(b) if b > 0 else -math.inf)).exp() for b in (beta1, beta2))
    rates, corrections = lr / rise1, rise2.rsqrt()
    for i, (p, state) in enumerate(zip(parameters, states, strict=True)):
        g: Any = p.grad
        if decay and group["decoupled_weight_decay"]:
            p.mul_(1 - lr * decay)
        elif decay:
            g = g + decay * p
        m, v = state["exp_avg"].lerp_(g, 1 - beta1), state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.sub_(m * rates[i].to(p.dtype) / (v.sqrt() * corrections[i].to(p.dtype) + group["eps"]))


class Rates:
    """Learning rates as tensors that a recorded step reads: writing into them needs no new recording.

    Args:
        optimizers: whose groups they belong to.
        device: where the parameters are.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
        self._optimizers, self._device = optimizers, device
        self._sent: list[Any] = []
        self._tensors: list[Tensor] = []

    def send(self) -> None:
        """Write the rates that schedules and callers have changed."""
        for i, group in enumerate(self._groups()):
            if isinstance(group["lr"], Tensor) or group["lr"] != self._sent[i]:
                self._sent[i] = group["lr"]
                self._tensors[i].fill_(group["lr"])

    @contextmanager
    def as_tensors(self) -> Iterator[None]:
        """While steps are recorded, the groups hold tensors; else the numbers that everybody expects there."""
        groups = self._groups()
        numbers = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._tensors, strict=True):
                group["lr"] = rate
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

    def _groups(self) -> list[dict[str, Any]]:
        """The groups as they are now, each with its tensor."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        dtype = torch.float32 if self._device.type == "cuda" else torch.float64  # what Adam's kernels read
        for _ in groups[len(self._tensors) :]:
            self._tensors.append(torch.zeros((), dtype=dtype, device=self._device))
            self._sent.append(None)
        return groups


def is_recordable(optimizer: Any) -> bool:
    """Whether all that changes from step to step in this optimiser is kept in tensors."""
    return type(optimizer) in (Adam, AdamW) and not optimizer._optimizer_step_pre_hooks


def numbers_of(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """What a recorded step holds of an optimiser as numbers: another value is recorded anew."""
    changing = ("params", "lr", "initial_lr")
    pairs = [(k, v) for group in optimizer.param_groups for k, v in group.items() if k not in changing]
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in pairs)  # betas of a loaded state


def tensors_of(optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    """Which tensors an optimiser keeps: a recorded step writes into these, and into no others put in their place."""
    return tuple(id(value) for state in optimizer.state.values() for value in state.values())


class Adam(_Straight, torch.optim.Adam):
    """torch's fused Adam with its kernel called straight: the same numbers to the last bit, less Python.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: how slowly the two running means forget.
        eps: what keeps the denominator from 0.
        weight_decay: factor of the L2 penalty.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = Adam([weight], lr=0.1)
        >>> weight.grad = torch.ones(3)
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 0.9000, 0.9000])
    """


class AdamW(_Straight, torch.optim.AdamW):
    """torch's fused AdamW with its kernel called straight: the same numbers to the last bit, less Python.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: how slowly the two running means forget.
        eps: what keeps the denominator from 0.
        weight_decay: decay of the parameters themselves; torch's 0.01 by default.
    """


class ClippedAdam(_Straight, torch.optim.Adam):
    r"""``pyro.optim.ClippedAdam`` by torch's fused kernel: gradients clamped, the learning rate decayed at each step.

    Pyro adds :math:`\epsilon` to :math:`\sqrt{v}`, torch to :math:`\sqrt{v / (1 - \beta_2^t)}`: the kernel is given
    :math:`\epsilon / \sqrt{1 - \beta_2^t}`, which makes the two one. Centred variances are left to Pyro's class.

    Args:
        params: parameters or groups of them.
        lr: learning rate before the first step.
        betas: how slowly the two running means forget.
        eps: what keeps the denominator from 0.
        weight_decay: factor of the L2 penalty.
        clip_norm: each component of a gradient is clamped to [-clip_norm, clip_norm].
        lrd: factor of the learning rate at each step.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float = 10.0,
        lrd: float = 1.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own = {"clip_norm": clip_norm, "lrd": lrd, "centered_variance": False, "taken": 0}
        self.defaults |= own
        for group in self.param_groups:
            group.update({name: group.get(name, value) for name, value in own.items()})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["lr"] *= group["lrd"]
            group["taken"] += 1  # of a parameter that sat out some steps, eps (and only it) is off by a factor near 1
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.clamp_(-group["clip_norm"], group["clip_norm"])
            self._move(group, group["eps"] / (1 - group["betas"][1] ** group["taken"]) ** 0.5)
        return loss


_FUSED: dict[Any, Any] = {torch.optim.Adam: Adam, torch.optim.AdamW: AdamW, PyroClippedAdam: ClippedAdam}


_SEVERAL_GRADIENTS = "expected an optimiser of one gradient a step, found LBFGS: take Adam, or LBFGS outside SVI."


def _of_one_gradient(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(_SEVERAL_GRADIENTS)
    return optimizer


def torch_optimizer(optim: Any) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    """A function parameters -> one torch optimiser over them, from a ``pyro.optim`` one (or from such a function).

    Arguments and clipping that depend on the parameter's name are those that Pyro would have used: parameters of
    equal arguments form a group, each gradient is clipped by itself. The names are looked up in Pyro's store.

    Args:
        optim: a ``pyro.optim.PyroOptim``, or the function. Its schedulers are made by :class:`pyro_vae.FastSVI`.

    Returns:
        The function.

    Raises:
        TypeError: it is neither.
        ValueError: its steps evaluate the loss several times (LBFGS).
    """
    if not isinstance(optim, PyroOptim):
        if isinstance(optim, torch.optim.Optimizer) or not callable(optim):
            raise TypeError(
                f"expected a pyro.optim optimiser or a function parameters -> torch optimiser, found {optim!r:.60}: "
                "for example lambda p: torch.optim.AdamW(p, lr=1e-3)."
            )
        return lambda parameters: _of_one_gradient(optim(parameters))
    constructor: Any = optim.pt_optim_constructor
    if constructor is torch.optim.LBFGS:
        raise ValueError(_SEVERAL_GRADIENTS)

    def make(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = []
        store = pyro.get_param_store()
        for parameter in parameters:
            if callable(optim.pt_optim_args) and store.param_name(parameter) is None:
                raise ValueError(
                    "expected an optimiser with one dictionary of arguments, found arguments by parameter name, which "
                    "is known to SVI only: use FastSVI, or pass a function parameters -> torch optimiser."
                )
            arguments = dict(optim._get_optim_args(parameter))  # type: ignore[arg-type]
            same = [g for g in groups if {k: v for k, v in g.items() if k != "params"} == arguments]
            if same:
                same[0]["params"].append(parameter)
            else:
                groups.append({"params": [parameter], **arguments})
        one = _FUSED.get(constructor)
        known = set() if one is None else set(inspect.signature(one).parameters)
        if one is None or any(set(group) - known - {"params"} for group in groups):
            one = constructor
            on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
            has_kernel = one is not torch.optim.Adagrad or on_cpu  # torch 2.11 has none for GPUs, and says so in a step
            if "fused" in inspect.signature(one).parameters and has_kernel:
                groups = [{"fused": True, **group} for group in groups]  # one pass over all parameters
        shared = {k: v for k, v in groups[0].items() if k != "params"} if len(groups) == 1 else {}
        if len(groups) > 1 and any("lr" in group for group in groups):
            shared = {"lr": groups[0].get("lr", 1e-3)}  # SGD and others once demanded a default
        optimizer = one(groups if len(groups) > 1 else groups[0]["params"], **shared)
        if optim.pt_clip_args:
            optimizer.register_step_pre_hook(_Clipping(optim))
        return optimizer

    return make


class _Clipping:
    """Clips each gradient by itself, as ``pyro.optim`` does; called before each step of an optimiser."""

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = optim
        self.clips: dict[Tensor, Callable[..., None] | None] = {}

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in self.clips:
                    self.clips[parameter] = self.optim._get_grad_clip(parameter)
                clip = self.clips[parameter]
                if clip is not None and parameter.grad is not None:
                    clip(parameter)


class OneOfMany:
    """What ``pyro.optim`` keeps for one parameter, where one optimiser moves them all: its share of the state.

    So ``get_state``, ``set_state``, ``save`` and ``load`` of the ``pyro.optim`` object go on working, in Pyro's format.

    Args:
        optimizer: the one optimiser.
        parameter: the parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        self._all, self._parameter = optimizer, parameter

    def _group(self) -> dict[str, Any]:
        return next(g for g in self._all.param_groups if any(p is self._parameter for p in g["params"]))

    def state_dict(self) -> dict[str, Any]:
        """As torch writes it for an optimiser of this parameter alone."""
        state = dict(self._all.state[self._parameter])
        if "step" in state and isinstance(self._all, ClippedAdam):
            state["step"] = int(state["step"])  # Pyro's class counts in Python, and would compute in float32 else
        group = {k: v for k, v in self._group().items() if k not in ("params", "taken")}
        return {"state": {0: state} if state else {}, "param_groups": [group | {"params": [0]}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of this parameter, and the options of its group."""
        group = self._group()
        group.update({k: v for k, v in state["param_groups"][0].items() if k not in ("params", "fused")})
        for value in state["state"].values():
            own = self._all.state[self._parameter]
            for name, entry in value.items():
                if name == "step" and isinstance(self._all, ClippedAdam):
                    group["taken"] = int(entry)
                    entry = torch.tensor(float(entry), dtype=torch.float32, device=self._parameter.device)
                own[name] = entry.to(self._parameter.device, copy=True) if isinstance(entry, Tensor) else entry


class OneOfManySchedules(OneOfMany):
    """The same under a scheduler of learning rates: ``pyro.optim`` steps each parameter's; only the first one does.

    Args:
        scheduler: the one scheduler.
        optimizer: the one optimiser.
        parameter: the parameter.
        is_first: whether this is the parameter whose ``step`` counts.
    """

    def __init__(self, scheduler: Any, optimizer: torch.optim.Optimizer, parameter: Tensor, is_first: bool) -> None:
        super().__init__(optimizer, parameter)
        self.optimizer, self.scheduler, self.is_first = OneOfMany(optimizer, parameter), scheduler, is_first

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the scheduler, once for all parameters."""
        if self.is_first:
            self.scheduler.step(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into the scheduler."""
        self.scheduler.load_state_dict(state)


def register(optim: Any, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """Tell a ``pyro.optim`` object about the one optimiser that works for it: schedules, and state kept or given.

    Args:
        optim: what the user gave; anything but a ``PyroOptim`` needs nothing.
        optimizer: the one optimiser.
        parameters: those that it moves.
    """
    if not isinstance(optim, PyroOptim):
        return
    schedules = isinstance(optim, PyroLRScheduler)
    scheduler = optim.pt_scheduler_constructor(optimizer, **optim.kwargs) if schedules else None  # type: ignore[attr-defined]
    for i, parameter in enumerate(parameters):
        one = (
            OneOfManySchedules(scheduler, optimizer, parameter, i == 0)
            if schedules
            else OneOfMany(optimizer, parameter)
        )
        optim.optim_objs[parameter] = one
        name = pyro.get_param_store().param_name(parameter)
        waiting = optim._state_waiting_to_be_consumed.pop(name, None)
        if waiting is not None:
            _load(one, waiting)


def _load(one: OneOfMany, state: dict[str, Any]) -> None:
    if isinstance(one, OneOfManySchedules):
        one.load_state_dict(state["scheduler"])
        one.optimizer.load_state_dict(state["optimizer"])
    else:
        one.load_state_dict(state)
