r"""A function that runs many times over, recorded once, cut in two, compiled and replayed.

An estimate from many draws of z runs one program again and again: the same x and parameters, fresh noise. Recorded as
a graph (see :mod:`pyro_vae.compiling`), the program falls into two parts:

.. math:: f(x, v) = g(h(x), v, \varepsilon)

h is all that neither noise nor the other arguments v reach: the encoder, a prior's components, transposed weights. It
runs once for each x; g, the rest, runs every time, without Python's handlers between its operations.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pyro_vae.capture import (
    NotCapturable,
    changed_by,
    compile_graph,
    is_view,
    lift,
    owners,
    plain_reason,
    record_graph,
    recording,
    rewound,
    store_kept,
)

TOLERANCE = 1e-5  # relative; float32 sums in another order differ by some 1e-7
Backend = Literal["inductor", "replay"]


class Replay:
    """A function of tensors, recorded at one set of shapes, whose first arguments change more rarely than the others.

    It is checked where it is recorded: from one random state the function itself and the replay must agree, and once
    more on other rows and other noise. Random numbers come from torch's generators in the function's own order, so a
    seed gives the same draws either way. Recording leaves the random state as it was.

    Args:
        function: (\\*fixed, \\*varying) -> tuple of tensors; it changes nothing in place that outlives it.
        fixed: first arguments, which stay for many calls: what depends on them alone is computed once.
        varying: the others.
        backend: "inductor" compiles; "replay" runs the graph operation by operation, exactly as recorded.

    Raises:
        NotCapturable: it is no fixed graph, or the graph gives other numbers. Whatever else goes wrong in recording or
            compiling becomes this error too.

    Example:
        >>> replay = Replay(lambda x, z: (x.exp() * z,), [torch.zeros(3)], [torch.ones(3)], backend="replay")
        >>> replay.at(torch.zeros(3))(torch.full((3,), 2.0))
        (tensor([2., 2., 2.]),)
        >>> replay.explain()
        'replayed, 1 operation each time and 1 once; 0e+00 from eager on the same noise'
    """

    def __init__(
        self,
        function: Callable[..., Any],
        fixed: Sequence[Tensor],
        varying: Sequence[Tensor] = (),
        backend: Backend = "inductor",
    ) -> None:
        try:
            with torch.no_grad():
                self._capture(function, _contiguous(fixed), _contiguous(varying), backend)
        except Exception as error:  # the function itself is still right
            raise NotCapturable(plain_reason(error)) from error

    def at(self, *fixed: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        """The function of the varying arguments alone, with its first ones given: same shapes as where recorded."""
        with torch.no_grad():
            kept = self._first(*self._inputs, *_contiguous(fixed))

        def later(*varying: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return tuple(self._second(*kept, *_contiguous(varying)))

        return later

    def explain(self) -> str:
        """One line."""
        many = f"{self._counts[1]} operation{'s' if self._counts[1] != 1 else ''}"
        return (
            f"{self._how}, {many} each time and {self._counts[0]} once; {self._error:.0e} from eager on the same noise"
        )

    def _capture(
        self, function: Callable[..., Any], fixed: list[Tensor], varying: list[Tensor], backend: Backend
    ) -> None:
        args = [*fixed, *varying]

        def record(*inputs: Tensor) -> tuple[Tensor, ...]:
            with recording():
                return tuple(function(*inputs))

        with rewound([], [], args) as rewind:
            with store_kept():
                graph = record_graph(record, args)
            held, self._inputs = lift(graph)
            self._inputs = [tensor.detach() for tensor in self._inputs]
            self._first, second = _split(graph, len(held) + len(fixed))
            self._counts = tuple(sum(n.op == "call_function" for n in g.graph.nodes) for g in (self._first, second))
            kept = self._first(*self._inputs, *fixed)
            self._second: Callable[..., Any]
            self._how, self._second = "replayed", second
            if backend == "inductor":
                try:
                    self._how, self._second = "compiled", compile_graph(second, [*kept, *varying])
                except Exception as error:  # no C++ compiler, say: the graph still spares Python's part
                    self._how = f"replayed, not compiled ({' '.join(str(error).split())[:200]})"
            self._error = self._compare(function, fixed, varying, rewind)

            def elsewhere() -> None:
                rewind()
                for device in {tensor.device for tensor in args}:
                    torch.rand((), device=device)

            turned = [tensor.roll(1, 0) if tensor.dim() else tensor for tensor in fixed]
            self._compare(function, turned, varying, elsewhere)

    def _compare(
        self, function: Callable[..., Any], fixed: list[Tensor], varying: list[Tensor], rewind: Callable[[], None]
    ) -> float:
        """The largest relative difference from the function itself, from one random state."""
        rewind()
        with store_kept():
            expected = function(*fixed, *varying)
        rewind()
        found = self.at(*fixed)(*varying)
        worst = 0.0
        for a, b in zip(found, expected, strict=True):
            difference = torch.where(a == b, 0.0, a.double() - b.double())  # inf is inf
            error = float(difference.norm() / b.double().norm().clamp(min=1e-12))
            if not error <= TOLERANCE:
                raise NotCapturable(f"the recorded graph differs from the program by {error:.1e} on the same noise")
            worst = max(worst, error)
        return worst


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A graph holds for one layout in memory."""
    return [tensor.contiguous() for tensor in tensors]


def _split(module: GraphModule, num_early: int) -> tuple[GraphModule, GraphModule]:
    """Cut a graph in two: what only the first inputs reach, and the rest, whose first inputs are the first's outputs.

    Views and what is made of no input at all are cheap: they go where they are used, so that the compiler sees them.
    """
    nodes = list(module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    early_inputs, late_inputs = inputs[:num_early], inputs[num_early:]
    late, reached = _late_nodes(nodes, late_inputs), set(inputs)
    for node in nodes:  # what some input reaches, and what is changed by that
        if any(source in reached for source in node.all_input_nodes):
            reached |= {node, *_owners(changed_by(node))}

    first, second = Graph(), Graph()
    in_first = {node: first.node_copy(node) for node in early_inputs}
    for node in nodes:
        if node.op not in ("placeholder", "output") and node not in late:
            in_first[node] = first.node_copy(node, in_first.__getitem__)
    wanted, todo = set(), [node for node in nodes if node in late or node.op == "output"]
    cuts: dict[Node, Node] = {}
    while todo:  # backwards from what is late: go on through views and constants, cut at the rest
        for source in todo.pop().all_input_nodes:
            if source in wanted or source in cuts or source in late:
                continue
            if source.op == "placeholder" or (source in reached and not is_view(source)):
                cuts[source] = source
            else:
                wanted.add(source)
                todo.append(source)
    ordered = [node for node in nodes if node in cuts]
    first.output(tuple(in_first[node] for node in ordered))
    in_second = {node: second.placeholder(f"kept_{i}") for i, node in enumerate(ordered)}
    in_second |= {node: second.node_copy(node) for node in late_inputs}
    for node in nodes:
        if (node in wanted or node in late) and node.op not in ("placeholder", "output"):
            in_second[node] = second.node_copy(node, in_second.__getitem__)
    output = nodes[-1]
    second.output(tuple(in_second[node] for node in output.args[0]))
    first.eliminate_dead_code()
    return GraphModule(module, first), GraphModule(module, second)


def _late_nodes(nodes: list[Node], late_inputs: list[Node]) -> set[Node]:
    """Nodes that noise or a late input reaches, with what they change in place."""
    late = set(late_inputs)
    while True:
        before = len(late)
        for node in nodes:
            if node.op == "placeholder":
                continue
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            if node.op != "output" and (random or any(source in late for source in node.all_input_nodes)):
                late.add(node)
                late |= _owners(changed_by(node))
        if len(late) == before:
            return late


def _owners(changed: list[Node]) -> set[Node]:
    """These nodes and what they are views of; an input among them must not be changed."""
    found = owners(changed)
    if any(node.op == "placeholder" for node in found):
        raise NotCapturable("it changes one of its tensors in place at every call")
    return found
