"""A step of stochastic variational inference, captured once as one graph, compiled, and replayed.

Why Pyro is slow on small models: each step runs Python for every handler, site and parameter, and the processor waits.
What a step *computes* is the same every time, so it is recorded once and replayed:

1. ``make_fx`` records the tensor operations of one whole step (guide, model, bound, backward pass) with Pyro's
   handlers running: plates, scales, masks and particles become plain tensor operations. Random draws stay random
   operations, so each replay draws fresh noise from torch's generator, the same noise that eager Pyro would draw.
2. Every tensor that the graph holds (parameters, buffers, data in closures) is turned into an input, so changes in
   place are seen. A graph whose shapes depend on values is refused.
3. Inductor compiles the graph for the processor or the GPU; on a GPU the whole of it then becomes one CUDA graph
   (:mod:`pyro_vae.cuda_graphs`).
4. Both ways are run from one random state and compared: loss and all gradients; then once more on other noise, other
   parameters and other data, since a value that was recorded as a constant agrees where it was recorded. If they
   differ, eager Pyro stays.

What cannot be captured runs eagerly, as it would have without this file, and :meth:`CompiledStep.explain` says why.
Python numbers that the model reads while it runs are recorded as they are: pass what changes as an argument.
"""

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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pyro_vae.capture import (
    NotCapturable,
    compile_graph,
    lift,
    plain_reason,
    recording,
    refuse_constants,
    rewound,
    store_kept,
)
from pyro_vae.cuda_graphs import Recorded, can_record, generators_of, host_traffic
from pyro_vae.optimizers import register, torch_optimizer
from pyro_vae.traceable import assigned_in_place

TOLERANCE = 1e-3  # relative, of loss and gradients; float32 sums in another order differ by some 1e-6


class CompiledStep:
    """A function that leaves gradients in parameters, run as one compiled graph from its second call on.

    Args:
        function: tensors -> tensor or tuple of tensors; it calls ``backward`` itself.
        parameters: the leaves whose ``.grad`` it fills.
        module: what is searched for buffers and train/eval flags (a change of flags is captured anew).
        warm: calls of one signature (shapes and types) that stay eager before it is captured.
        backend: "inductor" compiles the graph; "replay" runs it operation by operation (no compiler needed, exactly
            eager's numbers). Where inductor cannot compile, the graph is replayed.
        state: tensors besides the module's buffers that the function changes in place, such as a step counter.
        record: on a GPU, record the graph in a CUDA graph; False where the caller records more than this step.
        tolerance: of the comparison with eager Pyro, relative.
        rows: compile only calls whose first argument has so many rows; others, such as the last batch of an epoch, are
            too rare for it and are replayed.

    Example:
        >>> weight = torch.ones(3, requires_grad=True)
        >>> def function(x):
        ...     loss = (weight * x).square().sum()
        ...     loss.backward()
        ...     return loss.detach()
        >>> step = CompiledStep(function, [weight], nn.Module())
        >>> for _ in range(3):
        ...     weight.grad = None
        ...     loss = step(torch.ones(3))
        >>> weight.grad
        tensor([2., 2., 2.])
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: Sequence[Tensor],
        module: nn.Module,
        warm: int = 1,
        backend: Literal["inductor", "replay"] = "inductor",
        state: Sequence[Tensor] = (),
        record: bool = True,
        tolerance: float = TOLERANCE,
        rows: int | None = None,
    ) -> None:
        self.function, self.parameters, self.module, self.state = function, list(parameters), module, list(state)
        self.warm, self.backend, self.record, self.tolerance = warm, backend, record, tolerance
        self.rows = rows
        self._parts = list(module.modules())
        self.assigned: dict[str, Tensor] = {}  # entries of Pyro's store that the function assigns
        self._calls: dict[Any, int] = {}
        self._graphs: dict[Any, _Graph | str] = {}
        self._changes = 0  # found by ``check``

    def __call__(self, *args: Tensor) -> Any:
        """Run the function; gradients are set anew, not added."""
        key = self._signature(args)
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls <= self.warm:
            return self._eager(*args)
        if key not in self._graphs:
            try:
                self._graphs[key] = _Graph(self, args)
            except Exception as error:  # whatever goes wrong in tracing or compiling, eager Pyro is still right
                self._fall_back(key, plain_reason(error))
        graph = self._graphs[key]
        return self._eager(*args) if isinstance(graph, str) else graph(*args)

    def explain(self) -> str:
        """What was captured, or why not; one line for each signature."""
        lines = []
        for key, graph in self._graphs.items():
            shapes = ", ".join(f"{list(shape)} {dtype}".replace("torch.", "") for shape, dtype, _ in key[0])
            lines.append(f"({shapes}): {f'eager, since {graph}' if isinstance(graph, str) else graph.explain()}")
        return "\n".join(lines) or "nothing captured yet: a step is captured on its second call."

    @property
    def obstacle(self) -> str | None:
        """Why not all that was captured so far can be recorded in a CUDA graph; None if it can."""
        found = (graph if isinstance(graph, str) else graph.obstacle for graph in self._graphs.values())
        return next(filter(None, found), None)

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators that what was captured so far draws from, beside torch's own."""
        graphs = [graph for graph in self._graphs.values() if isinstance(graph, _Graph)]
        return list({id(one): one for graph in graphs for one in graph.generators}.values())

    def state_key(self) -> Any:
        """What a captured step depends on beside its arguments: train or eval, and what is trained."""
        flags = tuple(part.training for part in self._parts)
        return flags, tuple(parameter.requires_grad for parameter in self.parameters), self._changes

    def check(self, *args: Tensor) -> None:
        """Compare with eager Pyro once more, without a trace, and stay eager if they differ by now.

        For callers between whose calls a program's Python numbers may have been changed.
        """
        key = self._signature(args)
        graph = self._graphs.get(key)
        if isinstance(graph, _Graph):
            try:
                with rewound(self.parameters, [*self.module.buffers(), *self.state], args) as rewind, torch.no_grad():
                    graph.compare(args, rewind, "by now")
            except NotCapturable as error:
                self._changes += 1
                self._fall_back(self._signature(args), str(error))

    def _fall_back(self, key: Any, reason: str) -> None:
        self._graphs[key] = reason
        warnings.warn(f"this step runs as eager Pyro, not compiled: {reason}", RuntimeWarning, stacklevel=3)

    def _eager(self, *args: Tensor) -> Any:
        for parameter in self.parameters:
            parameter.grad = None
        with torch.enable_grad(), assigned_in_place(self.assigned):
            return self.function(*args)

    def _name(self, parameter: Tensor) -> str:
        named = [*pyro.get_param_store().named_parameters(), *self.module.named_parameters()]
        return next((name for name, p in named if p is parameter), f"a parameter {list(parameter.shape)}")

    def _signature(self, args: tuple[Tensor, ...]) -> Any:
        return (tuple((a.shape, a.dtype, a.device) for a in args), *self.state_key())


def capturable(function: Callable[..., Any], *args: Tensor) -> bool:
    """Whether a function of tensors is one graph of tensor operations, on other numbers too; it leaves no trace.

    Args:
        function: tensors -> tensor or tuple of tensors.
        args: what to try it on.

    Example:
        >>> capturable(lambda x: x / 255, torch.arange(3.0)), capturable(lambda x: x[x > 0], torch.arange(3.0))
        (True, False)
    """
    try:
        _Graph(CompiledStep(function, [], nn.Module(), backend="replay", record=False), args)
    except Exception:  # whatever it is, the function runs outside the graph
        return False
    return True


class _Graph:
    """One captured and compiled signature."""

    def __init__(self, step: CompiledStep, args: tuple[Tensor, ...]) -> None:
        self.step = step
        self.parameters = step.parameters
        self.is_tuple = False
        self.names: list[str] = []

        def record(*inputs: Tensor) -> list[Any]:
            with recording():
                out = step._eager(*inputs)
            self.is_tuple = isinstance(out, tuple)
            self.parameters = [p for p in step.parameters if p.grad is not None]  # an optimiser skips the others
            device = next((t.device for t in [*step.parameters, *inputs]), None)
            values = [torch.as_tensor(value, device=device) for value in (out if self.is_tuple else (out,))]  # inf, say
            self.names = ["the loss"] if len(values) == 1 else [f"value {i} of the loss" for i in range(len(values))]
            self.names += [f"the gradient of {step._name(p)}" for p in self.parameters]
            return [*values, *(p.grad for p in self.parameters)]

        compiles = step.backend == "inductor" and step.rows in (None, len(args[0]) if args else None)
        trained = {id(p) for p in step.parameters}
        others = [p for _, p in pyro.get_param_store().named_parameters() if id(p) not in trained]
        buffers = [*step.module.buffers(), *step.state, *others]
        with rewound(step.parameters, buffers, args) as rewind, torch.no_grad():
            with store_kept():
                graph = make_fx(record, tracing_mode="real")(*args)
            graph.graph.eliminate_dead_code()  # a plate counts its examples, say; draws stay
            held, lifted = lift(graph)
            known = [*step.parameters, *buffers, *args]
            refuse_constants(graph, dict(zip(held, lifted, strict=True)), known, self.names)
            self.inputs = [tensor.detach() for tensor in lifted]
            rewind()
            self.run: Callable[..., Any]
            if compiles:
                graph = make_fx(graph, tracing_mode="fake")(*self.inputs, *args)  # gives each node its shape and type
            self.num_operations = sum(node.op == "call_function" for node in graph.graph.nodes)
            self.how, self.run = "replayed", graph
            if compiles:
                try:
                    self.how, self.run = "compiled", compile_graph(graph, [*self.inputs, *args])
                except Exception as error:  # no C++ compiler, say: the graph still spares the Python of each step
                    reason = " ".join(str(error).split())[:200]
                    warnings.warn(f"not compiled, replayed as it is: {reason}", RuntimeWarning, stacklevel=4)
            self.error = self.compare(args, rewind)
            self._compare_elsewhere(args, rewind)
        reached = {id(p) for p in self.parameters}
        self.without_gradient = [p for p in step.parameters if id(p) not in reached]
        device = next((t.device for t in [*step.parameters, *args]), torch.device("cpu"))
        self.obstacle = host_traffic(graph, device)
        self.generators = generators_of(graph)
        self.recorded: Recorded | None = None
        if step.record and self.obstacle is None and can_record(device):
            self.recorded = Recorded(self._run, device, self.generators)

    def _run(self, *args: Tensor) -> Any:
        with torch.no_grad():
            return self.run(*self.inputs, *args)

    def compare(self, args: tuple[Tensor, ...], rewind: Callable[[], None], where: str = "on the same noise") -> float:
        """The largest relative difference from eager Pyro from one random state."""
        rewind()
        with store_kept():
            out = self.step._eager(*args)
        values = [torch.as_tensor(value) for value in (out if self.is_tuple else (out,))]
        if any((p.grad is None) == any(p is q for q in self.parameters) for p in self.step.parameters):
            raise NotCapturable("its gradients reach other parameters from one step to the next")
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        kept = [tensor.detach().clone() for tensor in self.step.assigned.values()]
        rewind()
        captured = [torch.as_tensor(t).clone() for t in self.run(*self.inputs, *args)]
        captured += [tensor.detach() for tensor in self.step.assigned.values()]
        size = torch.stack([g.double().norm() for g in gradients] or [torch.zeros(())]).norm()  # one for all gradients
        scales = [value.double().norm() for value in values] + [size] * len(gradients)
        scales += [tensor.double().norm() for tensor in kept]
        pairs = zip(captured, [*values, *gradients, *kept], scales, strict=True)
        differences = [
            (torch.where(a == b, 0.0, a.double() - b.double()), scale) for a, b, scale in pairs
        ]  # inf is inf
        errors = [float(difference.norm() / scale.clamp(min=1e-12)) for difference, scale in differences]
        for error, name in zip(errors, [*self.names, *self.step.assigned], strict=True):
            if not error <= self.step.tolerance:
                raise NotCapturable(
                    f"{name} of the captured step differs from eager Pyro by {error:.1e} {where}: pass what changes "
                    "from step to step as a tensor, and compute with tensors throughout"
                )
        return max(errors)

    def _compare_elsewhere(self, args: tuple[Tensor, ...], rewind: Callable[[], None]) -> None:
        """Other noise, parameters and rows: what was recorded as a constant shows where it was not recorded."""

        def elsewhere() -> None:
            rewind()
            for device in {t.device for t in [*self.step.parameters, *args]}:
                torch.rand((), device=device)
            for parameter in self.step.parameters:
                parameter.mul_(1.01)

        turned = tuple(a.roll(1, 0) if a.dim() else a for a in args)
        elsewhere()
        try:
            with store_kept():
                self.step._eager(*turned)
        except Exception:  # rows that must stand in order, such as sequences by their length
            turned = args
        self.compare(turned, elsewhere, "once noise, parameters or data are others")

    def __call__(self, *args: Tensor) -> Any:
        out = (self.recorded or self._run)(*args)
        count = len(out) - len(self.parameters)
        for parameter, gradient in zip(self.parameters, out[count:], strict=True):
            parameter.grad = gradient
        for parameter in self.without_gradient:
            parameter.grad = None
        values = out[:count]
        if self.recorded is not None:  # the next replay writes into the same memory
            values = [value.clone() if isinstance(value, Tensor) else value for value in values]
        return tuple(values) if self.is_tuple else values[0]

    def explain(self) -> str:
        """One line."""
        recorded = ", in a CUDA graph" if self.recorded is not None and self.recorded.failure is None else ""
        how = f"{self.how}{recorded}, {self.num_operations} operations"
        return f"{how}; {self.error:.0e} from eager Pyro on the same noise"


class FastSVI:
    """``pyro.infer.SVI`` with the same steps, captured once and compiled.

    For any Pyro model and guide, objective (this library's or Pyro's) and ``pyro.optim`` optimiser. The first step of
    each signature (shapes, types, other arguments) is eager Pyro's and creates the parameters; from the second on the
    captured graph runs, with one optimiser over all parameters. What cannot be captured stays eager and is told once.
    Tensors may stand anywhere in the arguments, within lists and dictionaries too.

    Args:
        model: p(x, z), a Pyro program.
        guide: q(z | x), a Pyro program with the same arguments.
        optim: a ``pyro.optim`` optimiser or scheduler, which keeps its use (arguments per parameter, clipping,
            ``step`` of a scheduler, ``get_state``, ``set_state``), or a function parameters -> torch optimiser.
        loss: an objective such as ``Trace_ELBO()`` or ``IWAE(num_particles=50)``, or a function
            (model, guide, arguments) -> differentiable loss.
        backend: see :class:`CompiledStep`.

    Raises:
        TypeError, ValueError: the optimiser is none, or needs several gradients a step.

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
        self.model, self.guide, self.optim, self.objective, self.backend = model, guide, optim, loss, backend
        self._make_optimizer = torch_optimizer(optim)
        self._module = nn.ModuleList(_modules_of(model, guide))
        self._named: dict[str, Tensor] = {}
        self._optimizers: list[torch.optim.Optimizer] = []  # one more where a later step brings new parameters
        self._steps: dict[Any, CompiledStep] = {}
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
        else:
            loss = self._steps[key](*tensors)
        for optimizer in self._optimizers:
            optimizer.step()
        for parameter in self._named.values():
            parameter.grad = None
        return loss

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

    def _captured(self, build: Callable[[Sequence[Tensor]], tuple[Any, Any]]) -> CompiledStep:
        def function(*tensors: Tensor) -> Any:
            args, kwargs = build(tensors)
            return self._loss_and_grads(*args, **kwargs)

        counter = getattr(self.objective, "step", None)  # this library's objectives count their steps
        state = [counter] if isinstance(counter, Tensor) else []
        parameters = list({id(p): p for p in self._named.values()}.values())
        return CompiledStep(function, parameters, self._module, 0, self.backend, state)

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
