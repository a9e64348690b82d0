"""A step of stochastic variational inference, captured once as one graph, compiled, and replayed.

Why Pyro is slow on small models: each step runs Python for every handler, site and parameter, and the processor waits.
What a step *computes* is the same every time, so it is recorded once and replayed:

1. ``make_fx`` records the tensor operations of one whole step (guide, model, bound, backward pass) with Pyro's
   handlers running: plates, scales, masks and particles become plain tensor operations. Random draws stay random
   operations, so each replay draws fresh noise from torch's generator, the same noise that eager Pyro would draw.
2. Every tensor that the graph holds (parameters, buffers, data in closures) is turned into an input, so changes in
   place are seen. A graph whose shapes depend on values is refused.
3. Inductor compiles the graph for the processor or the GPU.
4. Both ways are run from one random state and compared: loss and all gradients. If they differ, eager Pyro stays.

What cannot be captured runs eagerly, as it would have without this file, and :meth:`CompiledStep.explain` says why.
Python numbers that the model reads while it runs are recorded as they are: pass what changes as an argument.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import pyro
import pyro.poutine
import pyro.util
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-3  # relative, of loss and gradients; float32 sums in another order differ by some 1e-6
# fallback_random keeps eager's noise; rearranged memory layouts cost more than they gain in small convolutions.
_OPTIONS: dict[str, Any] = {"fallback_random": True, "layout_optimization": False}
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class NotCapturable(Exception):
    """A step that cannot become one graph; the message says which operation or difference is in the way."""


class CompiledStep:
    """A function that leaves gradients in parameters, run as one compiled graph from its second call on.

    Args:
        function: tensors -> tensor or tuple of tensors; it calls ``backward`` itself.
        parameters: the leaves whose ``.grad`` it fills.
        module: what is searched for buffers and train/eval flags (a change of flags is captured anew).
        warm: calls of one signature (shapes and types) that stay eager before it is captured.
        backend: "inductor" compiles the graph; "replay" runs it operation by operation (no compiler needed, exactly
            eager's numbers). Where inductor cannot compile, the graph is replayed.

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
    ) -> None:
        self.function, self.parameters, self.module = function, list(parameters), module
        self.warm, self.backend = warm, backend
        self._calls: dict[Any, int] = {}
        self._graphs: dict[Any, _Graph | str] = {}

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
                reason = " ".join(f"{error if isinstance(error, NotCapturable) else repr(error)}".split())[:300]
                self._graphs[key] = reason
                warnings.warn(f"this step runs as eager Pyro, not compiled: {reason}", RuntimeWarning, stacklevel=2)
        graph = self._graphs[key]
        return self._eager(*args) if isinstance(graph, str) else graph(*args)

    def explain(self) -> str:
        """What was captured, or why not; one line for each signature."""
        lines = []
        for key, graph in self._graphs.items():
            shapes = ", ".join(f"{list(shape)} {dtype}".replace("torch.", "") for shape, dtype, _ in key[0])
            lines.append(f"({shapes}): {f'eager, since {graph}' if isinstance(graph, str) else graph.explain()}")
        return "\n".join(lines) or "nothing captured yet: a step is captured on its second call."

    def _eager(self, *args: Tensor) -> Any:
        for parameter in self.parameters:
            parameter.grad = None
        with torch.enable_grad():
            return self.function(*args)

    def _signature(self, args: tuple[Tensor, ...]) -> Any:
        flags = tuple(part.training for part in self.module.modules())
        trained = tuple(parameter.requires_grad for parameter in self.parameters)
        return tuple((a.shape, a.dtype, a.device) for a in args), flags, trained


class _Graph:
    """One captured and compiled signature."""

    def __init__(self, step: CompiledStep, args: tuple[Tensor, ...]) -> None:
        self.parameters = step.parameters
        self.is_tuple = False

        def record(*inputs: Tensor) -> list[Tensor]:
            with _recording():
                out = step._eager(*inputs)
            self.is_tuple = isinstance(out, tuple)
            return [*(out if self.is_tuple else (out,)), *self._gradients()]

        buffers = list(step.module.buffers())
        with _rewound(step.parameters, buffers, args) as rewind, torch.no_grad():
            graph = make_fx(record, tracing_mode="real")(*args)
            lifted = _lift(graph)
            self.inputs = [tensor.detach() for tensor in lifted]
            rewind()
            self.run: Callable[..., Any]
            graph = make_fx(graph, tracing_mode="fake")(*self.inputs, *args)  # gives each node its shape and type
            self.num_operations = sum(node.op == "call_function" for node in graph.graph.nodes)
            self.how, self.run = "replayed", graph
            if step.backend == "inductor":
                try:
                    self.how, self.run = "compiled", _compile(graph, [*self.inputs, *args])
                except Exception as error:  # no C++ compiler, say: the graph still spares the Python of each step
                    reason = " ".join(str(error).split())[:200]
                    warnings.warn(f"not compiled, replayed as it is: {reason}", RuntimeWarning, stacklevel=4)
            self.error = self._compare(step, args, rewind)

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def _compare(self, step: CompiledStep, args: tuple[Tensor, ...], rewind: Callable[[], None]) -> float:
        """The largest relative difference from eager Pyro on the same noise."""
        rewind()
        captured = [t.clone() for t in self.run(*self.inputs, *args)]
        rewind()
        out = step._eager(*args)
        values = [torch.as_tensor(value) for value in (out if self.is_tuple else (out,))]
        gradients = self._gradients()
        size = torch.stack([g.double().norm() for g in gradients]).norm()  # one scale for all gradients
        scales = [value.double().norm() for value in values] + [size] * len(gradients)
        pairs = zip(captured, [*values, *gradients], scales, strict=True)
        error = max(float((a.double() - b.double()).norm() / scale.clamp(min=1e-12)) for a, b, scale in pairs)
        if not error <= TOLERANCE:
            raise NotCapturable(f"the captured step differs from eager Pyro by {error:.1e} on the same noise")
        return error

    def __call__(self, *args: Tensor) -> Any:
        with torch.no_grad():
            out = self.run(*self.inputs, *args)
        count = len(out) - len(self.parameters)
        for parameter, gradient in zip(self.parameters, out[count:], strict=True):
            parameter.grad = gradient
        return tuple(out[:count]) if self.is_tuple else out[0]

    def explain(self) -> str:
        """One line."""
        return f"{self.how}, {self.num_operations} operations; {self.error:.0e} from eager Pyro on the same noise"


class _NoHostCopies(TorchFunctionMode):
    """While recording, ``.item()`` in Pyro's bookkeeping stays a tensor: its value only leaves the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].detach() if func is torch.Tensor.item else func(*args, **(kwargs or {}))


@contextmanager
def _recording() -> Iterator[None]:
    """Validation and NaN warnings branch on values, which a graph cannot; they are off while it is recorded."""
    old = pyro.util.torch_isnan, pyro.util.torch_isinf
    pyro.util.torch_isnan = pyro.util.torch_isinf = lambda value: False  # type: ignore[assignment]
    try:
        with pyro.validation_enabled(False), _NoHostCopies():
            yield
    finally:
        pyro.util.torch_isnan, pyro.util.torch_isinf = old


@contextmanager
def _rewound(parameters: Sequence[Tensor], buffers: Sequence[Tensor], args: Sequence[Tensor]) -> Iterator[Any]:
    """Trials leave no trace: random state, buffers and gradients are put back by ``rewind()``, and at the end."""
    devices = sorted({t.device for t in [*parameters, *buffers, *args] if t.device.type == "cuda"}, key=str)
    state, cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    values = [buffer.clone() for buffer in buffers]

    def rewind() -> None:
        torch.set_rng_state(state)
        for device, device_state in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(device_state, device)
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
        for parameter in parameters:
            parameter.grad = None

    try:
        yield rewind
    finally:
        rewind()


def _lift(module: GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into its first inputs, in place, and return them."""
    graph = module.graph
    inputs: dict[int, tuple[Any, Tensor]] = {}
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op == "call_function":
            _refuse_dynamic_shapes(node)
        if node.op != "get_attr" or not isinstance(getattr(module, node.target), Tensor):
            continue
        if all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users):
            continue  # a literal such as torch.tensor(0.5): a constant indeed
        tensor = getattr(module, node.target)
        if id(tensor) not in inputs:
            with graph.inserting_before(first):
                inputs[id(tensor)] = (graph.placeholder(f"held_{len(inputs)}"), tensor)
        node.replace_all_uses_with(inputs[id(tensor)][0])
        graph.erase_node(node)
    module.recompile()
    return [tensor for _, tensor in inputs.values()]


def _refuse_dynamic_shapes(node: torch.fx.Node) -> None:
    """Boolean indexing and its kin give another number of elements each time; a replay would be wrong."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return
    dynamic = torch.Tag.dynamic_output_shape in target.tags
    if target.overloadpacket in _INDEXING:
        masks = [i for i in node.args[1] if i is not None]  # type: ignore[union-attr]
        dynamic = any((i.meta.get("tensor_meta") or i.meta["val"]).dtype == torch.bool for i in masks)  # type: ignore
    if dynamic:
        raise NotCapturable(f"{target} gives a shape that depends on values (use torch.where instead of a mask index)")


def _compile(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Inductor directly where this torch has it (private, a few per cent faster), else the public way."""
    direct = getattr(importlib.import_module("torch._inductor"), "compile", None)
    if direct is not None:
        return direct(graph, inputs, options=_OPTIONS)
    return torch.compile(graph, fullgraph=True, dynamic=False, options=_OPTIONS)


class FastSVI:
    """``pyro.infer.SVI`` with the same steps, captured once and compiled.

    For any Pyro model and guide, objective (this library's or Pyro's) and ``pyro.optim`` optimiser. The first step of
    each signature (shapes, types, other arguments) is eager Pyro's and creates the parameters; from the second on the
    captured graph runs, with one optimiser over all parameters. What cannot be captured stays eager and is told once.

    Args:
        model: p(x, z), a Pyro program.
        guide: q(z | x), a Pyro program with the same arguments.
        optim: a ``pyro.optim`` optimiser with one dictionary of arguments, or a function parameters -> torch optimiser.
        loss: an objective such as ``Trace_ELBO()`` or ``IWAE(num_particles=50)``.
        backend: see :class:`CompiledStep`.

    Raises:
        ValueError: the optimiser has arguments per parameter, or clips gradients.

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
        self.model, self.guide, self.objective, self.backend = model, guide, loss, backend
        self._make_optimizer = torch_optimizer(optim)
        self._module = nn.ModuleList(_modules_of(model, guide))
        self._named: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._steps: dict[Any, CompiledStep] = {}

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one optimisation step; returns the loss, as ``SVI.step`` does."""
        loss = self.step_on_device(*args, **kwargs)
        return loss.item() if isinstance(loss, Tensor) else loss

    def step_on_device(self, *args: Any, **kwargs: Any) -> Any:
        """Take one optimisation step; the loss stays a tensor, so that nothing waits for the device."""
        key, tensors = self._key(args, kwargs)
        known = key is not None and key in self._steps and not self._store_changed()
        if not known or pyro.poutine.runtime.am_i_wrapped():
            loss = self._first(*args, **kwargs)
            if key is not None and key not in self._steps:
                self._steps[key] = self._captured(args, kwargs)
        else:
            loss = self._steps[key](*tensors)
        assert self._optimizer is not None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss without a step, as ``SVI.evaluate_loss`` gives it."""
        with torch.no_grad():
            return float(self.objective.loss(self.model, self.guide, *args, **kwargs))

    def explain(self) -> str:
        """What was captured, or why not; one line for each signature."""
        return "\n".join(step.explain() for step in self._steps.values()) or "no step taken yet."

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        """Eager Pyro; notes the parameters that it used."""
        with pyro.poutine.trace(param_only=True) as used:
            loss = self.objective.loss_and_grads(self.model, self.guide, *args, **kwargs)
        named = {name: _unconstrained(site["value"]) for name, site in used.trace.nodes.items()}
        new = [p for p in {id(p): p for p in named.values()}.values() if all(p is not q for q in self._parameters())]
        if new:
            self._named |= named
            self._steps.clear()  # the graphs do not know these
            if self._optimizer is None:
                self._optimizer = self._make_optimizer(new)
            else:
                self._optimizer.add_param_group({"params": new})
        return loss

    def _parameters(self) -> list[Tensor]:
        return list({id(p): p for p in self._named.values()}.values())

    def _captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompiledStep:
        fixed = list(args)
        places = [i for i, value in enumerate(args) if isinstance(value, Tensor)]

        def function(*tensors: Tensor) -> Any:
            full = list(fixed)
            for place, tensor in zip(places, tensors, strict=True):
                full[place] = tensor
            return self.objective.loss_and_grads(self.model, self.guide, *full, **kwargs)

        return CompiledStep(function, self._parameters(), self._module, warm=0, backend=self.backend)

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """What tells one captured step from another; None where that cannot be told."""
        tensors = [value for value in args if isinstance(value, Tensor)]
        others = [
            value if not isinstance(value, Tensor) else (value.shape, value.dtype, value.device) for value in args
        ]
        try:
            key = (tuple(others), tuple(sorted(kwargs.items())))
            hash(key)
        except TypeError:
            return None, tensors
        return (None if any(isinstance(v, Tensor) for v in kwargs.values()) else key), tensors

    def _store_changed(self) -> bool:
        """Whether the parameter store holds other tensors by now (cleared, loaded, or taken over by another model)."""
        store = pyro.get_param_store()
        return any(name not in store or _unconstrained(store[name]) is not p for name, p in self._named.items())


def torch_optimizer(optim: Any) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    """A function parameters -> torch optimiser from a ``pyro.optim`` one (or from such a function).

    Args:
        optim: a ``pyro.optim.PyroOptim`` with one dictionary of arguments, or the function.

    Raises:
        ValueError: it has arguments per parameter, or clips gradients.
    """
    if not isinstance(optim, PyroOptim):
        if isinstance(optim, torch.optim.Optimizer) or not callable(optim):
            raise TypeError(
                f"expected a pyro.optim optimiser or a function parameters -> torch optimiser, found {optim!r:.60}: "
                "for example lambda p: torch.optim.AdamW(p, lr=1e-3)."
            )
        return optim
    if callable(optim.pt_optim_args) or getattr(optim, "pt_clip_args", None):
        raise ValueError(
            "expected a pyro.optim optimiser with one dictionary of arguments and no clipping, found more: "
            "pass a function parameters -> torch optimiser."
        )
    make: Any = optim.pt_optim_constructor
    arguments: Any = dict(optim.pt_optim_args)
    if "fused" in inspect.signature(make).parameters:
        arguments.setdefault("fused", True)  # one pass over all parameters
    return lambda parameters: make(list(parameters), **arguments)


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
