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
from typing import Any, Literal

import pyro
import pyro.infer
import pyro.poutine
import torch
from torch import Tensor, nn

from pyro_vae.capture import (
    Differs,
    NotCapturable,
    agreement,
    compile_graph,
    is_recording,
    lift,
    plain_reason,
    record_graph,
    recording,
    refuse_constants,
    rewound,
    store_kept,
)
from pyro_vae.cuda_graphs import Recorded, can_record, generators_of, host_traffic
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
        self.was_eager = True  # the last call

    def __call__(self, *args: Tensor) -> Any:
        """Run the function; gradients are set anew, not added."""
        key = self._signature(args)
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        self.was_eager = calls <= self.warm
        if self.was_eager:
            return self._eager(*args)
        if key not in self._graphs:
            try:
                self._graphs[key] = _Graph(self, args)
            except Exception as error:  # whatever goes wrong in tracing or compiling, eager Pyro is still right
                self._fall_back(key, plain_reason(error))
        graph = self._graphs[key]
        if isinstance(graph, str):
            self.was_eager = True
            return self._eager(*args)
        return graph(*args)

    def explain(self) -> str:
        """What was captured, or why not; one line for each signature."""
        lines = [line for _, line in self.lines()]
        return "\n".join(lines) or "nothing captured yet: a step is captured on its second call."

    def lines(self) -> list[tuple[Any, str]]:
        """For each signature, on what it depends beside its arguments, and the line about it."""
        lines = []
        for (shapes, *state), graph in self._graphs.items():
            found = ", ".join(f"{list(shape)} {dtype}".replace("torch.", "") for shape, dtype, _ in shapes)
            how = f"eager, since {graph}" if isinstance(graph, str) else graph.explain()
            lines.append((tuple(state), f"({found}): {how}"))
        return lines

    @property
    def obstacle(self) -> str | None:
        """Why not all that was captured so far can be recorded in a CUDA graph; None if it can."""
        found = (graph if isinstance(graph, str) else graph.obstacle for graph in self._graphs.values())
        return next(filter(None, found), None)

    def compile_by_itself(self) -> None:
        """From now on with the compiler, where graphs were replayed."""
        self.backend = "inductor"
        self._graphs.clear()

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators that what was captured so far draws from, beside torch's own."""
        graphs = [graph for graph in self._graphs.values() if isinstance(graph, _Graph)]
        return list({id(one): one for graph in graphs for one in graph.generators}.values())

    def state_key(self) -> Any:
        """What a captured step depends on beside its arguments: train or eval, and what is trained."""
        flags = tuple(part.training for part in self._parts)
        return flags, tuple((p.requires_grad, p.data_ptr()) for p in self.parameters), self._changes

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

    def changing(self) -> list[Tensor]:
        """The tensors besides the parameters that a step may change: buffers, counters, what Pyro's store holds."""
        trained = {id(p) for p in self.parameters}
        others = [p for _, p in pyro.get_param_store().named_parameters() if id(p) not in trained]
        return [*self.module.buffers(), *self.state, *others]

    def _fall_back(self, key: Any, reason: str) -> None:
        self._graphs[key] = reason
        warnings.warn(f"this step runs as eager Pyro, not compiled: {reason}", RuntimeWarning, stacklevel=3)

    def _eager(self, *args: Tensor) -> Any:
        for parameter in [*self.parameters, *self.module.parameters()]:  # of what is not trained too: it would add up
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
        buffers = step.changing()
        with rewound(step.parameters, buffers, args) as rewind, torch.no_grad():
            with store_kept():
                graph = record_graph(record, args)
            graph.graph.eliminate_dead_code()  # a plate counts its examples, say; draws stay
            held, lifted = lift(graph)
            known = [*step.parameters, *buffers, *args]
            refuse_constants(graph, dict(zip(held, lifted, strict=True)), known, self.names)
            self.held, self.inputs = lifted, [tensor.detach() for tensor in lifted]
            rewind()
            self.run: Callable[..., Any]
            self.num_operations = sum(node.op == "call_function" for node in graph.graph.nodes)
            self.graph = graph
            self.how, self.run = "replayed", graph
            if compiles:
                try:
                    self.how, self.run = "compiled", compile_graph(graph, [*self.inputs, *args])
                except Exception as error:  # no C++ compiler, say: the graph still spares the Python of each step
                    reason = " ".join(str(error).split())[:200]
                    warnings.warn(f"not compiled, replayed as it is: {reason}", RuntimeWarning, stacklevel=4)
            self.error = self._agreement(args, rewind)
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
            if is_recording():  # the parameters themselves, as an optimiser knows them
                return self.graph(*self.held, *args)
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
                raise Differs(
                    f"{name} of the captured step differs from eager Pyro by {error:.1e} {where}: pass what changes "
                    "from step to step as a tensor, and compute with tensors throughout"
                )
        return max(errors)

    def _agreement(self, args: tuple[Tensor, ...], rewind: Callable[[], None]) -> float:
        """The error on the same noise; what was recorded as a constant shows on other noise, parameters and rows."""

        def go_to(place: int) -> None:
            rewind()
            for device in {t.device for t in [*self.step.parameters, *args]}:
                torch.rand(place, device=device)
            for parameter in self.step.parameters:
                parameter.mul_(1 + 0.01 * place)

        error = agreement(lambda go: self.compare(args, go), go_to, (0, 2, 4))
        turned = tuple(a.roll(1, 0) if a.dim() else a for a in args)
        go_to(1)
        try:
            with store_kept():
                self.step._eager(*turned)
        except Exception:  # rows that must stand in order, such as sequences by their length
            turned = args
        words = "once noise, parameters or data are others"
        agreement(lambda go: self.compare(turned, go, words), go_to, (1, 3, 5))
        return error

    def __call__(self, *args: Tensor) -> Any:
        out = (self._run if self.recorded is None or is_recording() else self.recorded)(*args)
        count = len(out) - len(self.parameters)
        for parameter, gradient in zip(self.parameters, out[count:], strict=True):
            parameter.grad = gradient
        for parameter in self.without_gradient:
            parameter.grad = None
        values = out[:count]
        if self.recorded is not None and not is_recording():  # the next replay writes into the same memory
            values = [value.clone() if isinstance(value, Tensor) else value for value in values]
        return tuple(values) if self.is_tuple else values[0]

    def explain(self) -> str:
        """One line."""
        recorded = ", in a CUDA graph" if self.recorded is not None and self.recorded.failure is None else ""
        how = f"{self.how}{recorded}, {self.num_operations} operations"
        return f"{how}; {self.error:.0e} from eager Pyro on the same noise"
