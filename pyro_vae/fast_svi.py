"""``pyro.infer.SVI`` as captured steps: for any Pyro program, unchanged."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import pyro
import pyro.infer
import pyro.poutine
import torch
from pyro.infer.util import torch_item
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_vae.compiling import CompiledStep
from pyro_vae.optimizers import register, torch_optimizer
from pyro_vae.programs import Programs, way_of
from pyro_vae.traceable import assigned_in_place


class FastSVI:
    """``pyro.infer.SVI`` with the same steps, captured once and compiled.

    For any Pyro model and guide, objective (this library's or Pyro's) and ``pyro.optim`` optimiser. The first step of
    each signature (shapes, types, other arguments) is eager Pyro's and creates the parameters; from the second on the
    captured graph runs, with one optimiser over all parameters, and on a processor that optimiser's step (Adam's or
    AdamW's) is compiled with it. What cannot be captured stays eager and is told once.
    Tensors may stand anywhere in the arguments, within lists and dictionaries too. A compiled step lets the C library
    keep freed memory for the whole process (:func:`pyro_vae.keep_freed_memory`).

    Args:
        model: p(x, z), a Pyro program.
        guide: q(z | x), a Pyro program with the same arguments.
        optim: a ``pyro.optim`` optimiser or scheduler, which keeps its use (arguments per parameter, clipping,
            ``step`` of a scheduler, ``get_state``, ``set_state``), or a function parameters -> torch optimiser.
        loss: an objective such as ``Trace_ELBO()`` or ``IWAE(num_particles=50)``, or a function
            (model, guide, arguments) -> differentiable loss.
        backend: see :class:`CompiledStep`.

    Raises:
        TypeError, ValueError: an argument is not what it should be, or the optimiser needs several gradients a step.

    Example:
        >>> from pyro_vae import ELBO, VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> svi = FastSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), ELBO(), backend="replay")
        >>> losses = [svi.step(torch.ones(5, 7)) for _ in range(30)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: Any,
        backend: Literal["inductor", "replay"] = "inductor",
    ) -> None:
        _check(model, guide, loss, backend)
        self.model, self.guide, self.optim, self.objective, self.backend = model, guide, optim, loss, backend
        self._make_optimizer = torch_optimizer(optim)
        self._module = nn.ModuleList(_modules_of(model, guide))
        self._named: dict[str, Tensor] = {}
        self._optimizers: list[torch.optim.Optimizer] = []  # one more where a later step brings new parameters
        self._steps: dict[Any, Programs] = {}
        self._numbers = 0

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one optimisation step; returns the loss, or the tuple of losses, as ``SVI.step`` does."""
        loss = self.step_on_device(*args, **kwargs)
        return tuple(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)

    def step_on_device(self, *args: Any, **kwargs: Any) -> Any:
        """Take one optimisation step; the loss stays a tensor, so that nothing waits for the device."""
        key, tensors, build = self._key(args, kwargs)
        known = key is not None and key in self._steps and not self._store_changed()
        if not known or pyro.poutine.runtime.am_i_wrapped():
            loss = self._first(*args, **kwargs)
            if key is not None and key not in self._steps:
                self._steps[key] = self._captured(build)
                self._count_numbers(key)
            self._move()
            return loss
        return self._steps[key](*tensors)

    def run(self, num_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Take several steps on the same arguments, with as little as can be between them.

        Args:
            num_steps: how many.
            args: as for :meth:`step`.
            kwargs: as for :meth:`step`.

        Returns:
            The losses on the device, [num_steps]; for a tuple of losses a tuple of such.

        Raises:
            ValueError: there is no step to take.

        Example:
            >>> from pyro.infer import Trace_ELBO
            >>> def model():
            ...     pyro.sample("z", pyro.distributions.Normal(3.0, 1.0))
            >>> guide = pyro.infer.autoguide.AutoDelta(model)
            >>> svi = FastSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend="replay")
            >>> losses = svi.run(100)
            >>> losses.shape, guide()["z"].item() > 2.5
            (torch.Size([100]), True)
        """
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"expected num_steps to be an integer >= 1, found {num_steps!r}.")
        losses: list[Any] = []
        while len(losses) < num_steps:
            key, tensors, _ = self._key(args, kwargs)
            if losses and key in self._steps and not pyro.poutine.runtime.am_i_wrapped():
                losses += self._steps[key].repeat(num_steps - len(losses), *tensors)
            else:
                losses.append(self.step_on_device(*args, **kwargs))
        if isinstance(losses[0], tuple):
            return tuple(torch.stack([torch.as_tensor(loss[i]) for loss in losses]) for i in range(len(losses[0])))
        return torch.stack([torch.as_tensor(loss) for loss in losses])

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss without a step, as ``SVI.evaluate_loss`` gives it."""
        evaluate = getattr(self.objective, "loss", self.objective)
        with torch.no_grad():
            loss = evaluate(self.model, self.guide, *args, **kwargs)
        return tuple(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)

    def explain(self) -> str:
        """What was captured, or why not; one line for each signature."""
        return "\n".join(step.explain() for step in self._steps.values()) or "no step that could be captured was taken."

    def _loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self.objective, "loss_and_grads"):
            return self.objective.loss_and_grads(self.model, self.guide, *args, **kwargs)
        loss = self.objective(self.model, self.guide, *args, **kwargs)
        if getattr(loss, "requires_grad", False):
            loss.backward()
        return loss.detach() if isinstance(loss, Tensor) else loss

    def _move(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()
        for parameter in self._named.values():
            parameter.grad = None

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        """Eager Pyro; notes the parameters that it used."""
        with pyro.poutine.trace(param_only=True) as used, assigned_in_place({}):
            loss = self._loss_and_grads(*args, **kwargs)
        sites = {name: _unconstrained(site["value"]) for name, site in used.trace.nodes.items()}
        named = {name: p for name, p in sites.items() if p.grad is not None}
        ours = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        new = [p for p in {id(p): p for p in named.values()}.values() if id(p) not in ours]
        if new:
            store = pyro.get_param_store()  # entries that were replaced (a store cleared, another model) move no more
            self._named = {n: p for n, p in self._named.items() if n in store and _unconstrained(store[n]) is p} | named
            self._steps.clear()  # the graphs do not know these
            self._optimizers.append(self._make_optimizer(new))
            register(self.optim, self._optimizers[-1], new)
        return loss

    def _captured(self, build: Callable[[Sequence[Tensor]], tuple[Any, Any]]) -> Programs:
        def function(*tensors: Tensor) -> Any:
            args, kwargs = build(tensors)
            return self._loss_and_grads(*args, **kwargs)

        counter = getattr(self.objective, "step", None)  # this library's objectives count their steps
        state = [counter] if isinstance(counter, Tensor) else []
        parameters = list({id(p): p for p in self._named.values()}.values())
        device = next((p.device for p in parameters), torch.device("cpu"))
        way = way_of(device, self._optimizers)
        if way == "compile" and self.backend == "replay":
            way = None
        backend = "replay" if way == "compile" else self.backend
        step = CompiledStep(function, parameters, self._module, 0, backend, state, record=way is None)

        def take(*tensors: Tensor) -> Any:
            loss = step(*tensors)
            self._move()
            return loss

        return Programs(take, step, self._optimizers, device=device, way=way)

    def _key(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Tensor], Callable[[Sequence[Tensor]], tuple[Any, Any]]]:
        """What tells one captured step from another (None where that cannot be told), its tensors, and the way back."""
        if not kwargs and all(isinstance(arg, Tensor) for arg in args):  # mostly, and a walk takes as long as a step
            shapes = tuple((arg.shape, arg.dtype, arg.device) for arg in args)
            return ("", (), shapes), list(args), lambda tensors: (tuple(tensors), {})
        leaves, structure = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def build(tensors: Sequence[Tensor]) -> tuple[Any, Any]:
            full = list(fixed)
            for place, tensor in zip(places, tensors, strict=True):
                full[place] = tensor
            return pytree.tree_unflatten(full, structure)

        shapes = tuple((leaves[i].shape, leaves[i].dtype, leaves[i].device) for i in places)
        key: Any = (str(structure), tuple((type(value), value) for value in fixed), shapes)
        try:
            hash(key)
        except TypeError:
            key = None
        return key, [leaves[i] for i in places], build

    def _count_numbers(self, key: Any) -> None:
        """Tell once that a number among the arguments makes each step another one."""
        self._numbers += 1
        numbers = [value for _, value in key[1] if isinstance(value, float)]
        if self._numbers == 20 and numbers:
            warnings.warn(
                f"the arguments hold numbers that change from step to step (now {numbers}), and each is a step of its "
                "own that stays eager: pass them as tensors",
                RuntimeWarning,
                stacklevel=4,
            )

    def _store_changed(self) -> bool:
        """Whether the parameter store holds other tensors by now (cleared, loaded, or taken over by another model)."""
        stored = dict(pyro.get_param_store().named_parameters())
        return any(stored.get(name) is not p for name, p in self._named.items())


def _check(model: Any, guide: Any, loss: Any, backend: Any) -> None:
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(
                f"expected {name} to be a Pyro program, found {program!r:.60}: pass a function or a module."
            )
    if isinstance(loss, type) or not (callable(loss) or hasattr(loss, "loss_and_grads")):
        raise TypeError(
            f"expected loss to be an objective such as ELBO() or Trace_ELBO(), or a function (model, guide, ...) -> "
            f"loss, found {loss!r:.60}: pass an instance."
        )
    if backend not in ("inductor", "replay"):
        raise ValueError(f"expected backend to be 'inductor' or 'replay', found {backend!r:.60}.")


def _unconstrained(value: Any) -> Tensor:
    """The tensor behind a parameter of Pyro's store, the one that an optimiser moves."""
    return value.unconstrained()


def _modules_of(*programs: Any) -> list[nn.Module]:
    """The modules that Pyro programs hold: themselves, owners of methods, what functions close over."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    todo: list[Any] = list(programs)
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[id(value)] = value
            continue
        todo += [getattr(value, name, None) for name in ("__self__", "__wrapped__", "func", "fn")]
        cells = getattr(value, "__closure__", None) or ()
        for cell in cells:
            with suppress(ValueError):  # an empty cell
                todo.append(cell.cell_contents)
    return list(found.values())
