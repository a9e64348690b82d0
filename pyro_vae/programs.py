r"""Whole training steps, optimiser and all, as one program.

A captured step (:mod:`pyro_vae.compiling`) leaves gradients, and an optimiser moves the parameters by them: Python
between the two, and each gradient is written and read once more. Here both are recorded as one graph,

.. math:: (x, \theta, m, v, t) \to \nabla L(x) \to (\theta, m, v, t),

which on a processor inductor compiles to code that changes all of these tensors in place. On a GPU the captured step
and the optimiser's kernel become one CUDA graph (:mod:`pyro_vae.cuda_graphs`).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae.capture import (
    Differs,
    NotCapturable,
    agreement,
    changed_by,
    compile_graph,
    has_compiler,
    lift,
    owners,
    plain_reason,
    record_graph,
    recording,
    rewound,
    store_kept,
)
from pyro_vae.compiling import CompiledStep
from pyro_vae.cuda_graphs import Recorded, can_record
from pyro_vae.memory import keep_freed_memory
from pyro_vae.optimizers import Rates, is_recordable, numbers_of, tensors_of

Way = Literal["compile", "record"] | None


class Programs:
    """A function that takes whole steps, compiled or recorded once for each signature (shapes and types).

    A compiled program is compared with the function itself before its first use; where it differs, or something in
    it cannot be compiled, the function runs as it is, a warning says so once, and the captured step within it is
    compiled by itself.

    Args:
        function: tensors -> tensor or tuple of tensors; it calls ``step`` and then the optimisers' ``step``.
        step: what leaves the gradients; of backend "replay" where it becomes part of a compiled program.
        optimizers: those that the function steps.
        state: other tensors that the function changes in place, such as totals.
        shape: compile only for first arguments of this shape; None: for any.
        device: where the parameters are.
        way: "compile", "record", or None, with which the function runs as it is: see :func:`way_of`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        step: CompiledStep,
        optimizers: Sequence[Any],
        state: Sequence[Tensor] = (),
        shape: tuple[int, ...] | None = None,
        device: torch.device | None = None,
        way: Way = None,
    ) -> None:
        self.function, self.step, self.optimizers, self.shape = function, step, list(optimizers), shape
        self.state, self.device, self.way = list(state), device or torch.device("cpu"), way
        self.rates = Rates(self.optimizers, self.device)
        self.recorded = Recorded(self._at_rates, self.device)
        self._programs: dict[Any, _Program | None] = {}
        self._held: Any = None  # tensors of the optimisers, after the call before

    def __call__(self, *args: Tensor) -> Any:
        """Take the steps."""
        return self._ready(args)(*args)

    def repeat(self, count: int, *args: Tensor) -> list[Any]:
        """Take the steps so often, with nothing between them; what each returned."""
        take = self._ready(args)
        return [take(*args) for _ in range(count)]

    def explain(self) -> str:
        """What was captured, or why not; one line for each signature."""
        waiting = {key[1]: program for key, program in reversed(self._programs.items()) if program is not None}
        lines = []
        for state, line in self.step.lines():
            program = waiting.pop(state, None)
            if self.is_recorded:
                line += ", with its optimiser in a CUDA graph"
            lines.append(line if program is None else f"{line.split(': ', 1)[0]}: {program.explain()}")
        return "\n".join(lines) or self.step.explain()

    @property
    def is_recorded(self) -> bool:
        """Whether a CUDA graph of whole steps is replayed."""
        return self.recorded.num_recorded > 0 and self.recorded.failure is None

    def _ready(self, args: tuple[Tensor, ...]) -> Callable[..., Any]:
        """What takes the steps, as things stand now."""
        if self.way is None or (self.way == "record" and self.step.obstacle is not None):
            return self.function
        if self.way == "compile" and self.shape is not None and args[0].shape != self.shape:
            return self.function
        numbers = tuple(map(numbers_of, self.optimizers))
        if self._held != self._tensors():  # a state was loaded
            self.recorded = Recorded(self._at_rates, self.device)
            self._programs.clear()
        if self.way == "record":
            self.rates.send()
            return lambda *args: self._replay(args, (self.step.state_key(), numbers))
        key = tuple((a.shape, a.dtype) for a in args), self.step.state_key(), numbers
        if key not in self._programs:
            self._programs[key] = self._compiled(args)
            self._held = self._tensors()  # the first trial has made some
        self.rates.send()
        return self._programs[key] or self.function

    def _tensors(self) -> Any:
        return [tensors_of(optimizer) for optimizer in self.optimizers]

    def _at_rates(self, *args: Tensor) -> Any:
        """The function by learning rates that are read from tensors."""
        with self.rates.as_tensors():
            return self.function(*args)

    def _replay(self, args: tuple[Tensor, ...], also: Any) -> Any:
        self.recorded.generators = self.step.generators
        out = self.recorded(*args, also=also)
        self._held = self._tensors()
        copies = tuple(torch.as_tensor(value).clone() for value in _values(out))  # a replay writes there again
        return copies if isinstance(out, tuple) else copies[0] if copies else None

    def _compiled(self, args: tuple[Tensor, ...]) -> "_Program | None":
        try:
            program = _Program(self, args)
        except Exception as error:  # whatever goes wrong in tracing or compiling, the steps themselves are still right
            if not self.step.was_eager:
                reason = plain_reason(error)
                warnings.warn(f"the optimiser's step is not compiled: {reason}", RuntimeWarning, stacklevel=4)
                self.way = None
                self.step.compile_by_itself()
            return None
        keep_freed_memory()  # a program gives back all that it used at its end, to take it again at once
        return program


def way_of(device: torch.device, optimizers: Sequence[Any]) -> Way:
    """What whole steps on this device, with these optimisers, can be made: a compiled program, a recording, or none."""
    if not all(map(is_recordable, optimizers)):
        return None
    if can_record(device):
        return "record"
    return "compile" if device.type == "cpu" and has_compiler() else None


class _Program:
    """One compiled signature."""

    def __init__(self, programs: Programs, args: tuple[Tensor, ...]) -> None:
        self.programs, self.parameters = programs, programs.step.parameters
        state = [*programs.step.changing(), *programs.state]
        with rewound(self.parameters, state, args), _optimisers_kept(programs.optimizers):
            programs.function(*args)  # captures the step, and makes the optimisers' tensors
        if programs.step.was_eager:
            raise NotCapturable("the step itself is eager")
        states = [(p, state) for optimizer in programs.optimizers for p, state in optimizer.state.items()]
        self._kinds = {id(v): (name, p) for p, state in states for name, v in state.items()}
        self._kinds |= {id(p): ("parameters", p) for p, _ in states}
        self._squares = {id(p): state["exp_avg_sq"] for p, state in states}
        moments = [value for _, state in states for value in state.values()]
        counters = [state["step"] for _, state in states]

        def record(*inputs: Tensor) -> list[Any]:
            with recording():
                out = programs._at_rates(*inputs)
            self._gives = type(out)
            return [torch.as_tensor(value) for value in _values(out)]

        state = [*programs.step.changing(), *programs.state, *moments]
        programs.rates.send()
        with rewound(self.parameters, state, args) as rewind, torch.no_grad():
            with store_kept():
                graph = record_graph(record, args)
            graph.graph.eliminate_dead_code()
            held, lifted = lift(graph)
            changing = [node for one in graph.graph.nodes for node in changed_by(one)]
            nodes = {node for node in owners(changing) if node.op == "placeholder"}
            self._changed = [tensor for node, tensor in zip(held, lifted, strict=True) if node in nodes]
            storages = {tensor.untyped_storage().data_ptr() for tensor in [*self.parameters, *state]}
            unknown = [t for t in self._changed if t.untyped_storage().data_ptr() not in storages]
            if unknown or len(self._changed) < len(nodes):
                raise NotCapturable("the step changes a tensor in place that is neither a parameter nor a buffer")
            self._inputs = [tensor.detach() for tensor in lifted]
            self._num_operations = sum(node.op == "call_function" for node in graph.graph.nodes)
            rewind()
            self._run = compile_graph(graph, [*self._inputs, *args])

            def go_to(place: int) -> None:
                rewind()
                torch.rand(place)
                for parameter in self.parameters:
                    parameter.mul_(1 + 0.01 * place)
                for counter in counters:
                    counter.add_(place)

            self._error, _ = (
                agreement(lambda go: self._compare(args, go), go_to, places) for places in ((0, 2, 4), (1, 3, 5))
            )

    def __call__(self, *args: Tensor) -> Any:
        with torch.no_grad():
            out = self._run(*self._inputs, *args)
        return tuple(out) if self._gives is tuple else out[0] if out else None

    def explain(self) -> str:
        """One line."""
        how = f"compiled with its optimiser, {self._num_operations} operations"
        return f"{how}; {self._error:.0e} from eager Pyro on the same noise"

    def _compare(self, args: tuple[Tensor, ...], go: Callable[[], None]) -> float:
        """The largest relative difference from the function itself."""
        go()
        before = [tensor.detach().clone() for tensor in self._changed]
        out = self.programs.function(*args)
        values = [torch.as_tensor(value).clone() for value in _values(out)]
        after = [tensor.detach().clone() for tensor in self._changed]
        weights = {key: square.double().sqrt() for key, square in self._squares.items()}
        go()
        found = [torch.as_tensor(value) for value in self._run(*self._inputs, *args)]
        parts: dict[Any, list[tuple[Tensor, Tensor]]] = {}  # kind -> differences and what they are held against
        for i, (a, b) in enumerate(zip(found, values, strict=True)):
            parts[f"value {i} of the step"] = [(_difference(a, b), b.double())]
        for i, (tensor, old, new) in enumerate(zip(self._changed, before, after, strict=True)):
            kind, parameter = self._kinds.get(id(tensor), (f"a tensor {list(tensor.shape)} of its state ({i})", None))
            difference, size = _difference(tensor.detach(), new), new.double()
            if kind == "parameters":  # where a gradient is rounding alone, Adam's step has the sign of the rounding
                weight = weights[id(parameter)]
                difference, size = difference * weight, (size - old.double()) * weight
            parts.setdefault(kind, []).append((difference, size))
        errors = {
            kind: _norm(d for d, _ in pairs) / max(_norm(s for _, s in pairs), 1e-30) for kind, pairs in parts.items()
        }
        for kind, error in errors.items():
            if not error <= self.programs.step.tolerance:
                raise Differs(f"{kind} after a compiled step differ from eager ones by {error:.1e}")
        return max(errors.values())


def _values(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else () if out is None else (out,)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, 0.0, a.double() - b.double())  # inf is inf


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


@contextmanager
def _optimisers_kept(optimizers: Sequence[Any]) -> Iterator[None]:
    """Put back what a trial step does to the optimisers; tensors that it made stay, at 0 as they were made."""
    before = {
        (p, name): value.clone() for o in optimizers for p, state in o.state.items() for name, value in state.items()
    }
    try:
        yield
    finally:
        for optimizer in optimizers:
            for p, state in optimizer.state.items():
                for name, value in state.items():
                    value.copy_(before[p, name]) if (p, name) in before else value.zero_()
