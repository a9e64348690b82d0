r"""A function over tensors, recorded once as a CUDA graph and replayed: one launch where Python would ask for hundreds.

A replay computes with the same kernels on the same memory. So all that differs between two replays lies in tensors that
stay: inputs are copied into static ones, counters and learning rates are kept on the device, and random draws come from
torch's generator, whose state a CUDA graph reads and advances itself. A number that Python hands to a kernel, a copy to
or from the host, or a shape that depends on values has no place there: :func:`host_traffic` finds them in a graph of
operations before anything is recorded.

On a processor nothing is recorded and the function itself runs. ``RECORDERS`` is the one place where that is decided.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

Function = Callable[..., Any]


class CudaGraph:
    """A function of no arguments, recorded on the present device; recording computes nothing.

    Args:
        function: what to record; it has run on this device before.
        device: a CUDA device.
        generators: random generators that it draws from, beside torch's own.
    """

    def __init__(
        self, function: Callable[[], Any], device: torch.device, generators: Sequence[torch.Generator]
    ) -> None:
        with torch.cuda.device(device):
            self._graph = torch.cuda.CUDAGraph()
            for generator in generators:
                self._graph.register_generator_state(generator)
            present = torch.cuda.current_stream()
            try:
                # Only this thread is watched: another one may gather the next batch meanwhile.
                with torch.cuda.graph(self._graph, stream=_side_stream(device), capture_error_mode="thread_local"):
                    self.out = function()
            except BaseException:
                torch.cuda.set_stream(present)  # torch 2.11 leaves its own, and its generator as if recording went on:
                with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=_side_stream(device)):
                    torch.zeros((), device=device)  # another recording, which ends well, ends that too
                raise

    def replay(self) -> None:
        """Compute; ``out`` then holds the results, in the same memory each time."""
        self._graph.replay()


RECORDERS: dict[str, Any] = {"cuda": CudaGraph}
"""What records on a kind of device; others run the function each time."""


def can_record(device: torch.device) -> bool:
    """Whether functions are recorded on this device."""
    return device.type in RECORDERS


class Recorded:
    """A function of tensors that is recorded at the second call of each signature (shapes and types), and replayed.

    The first call runs it as it is, on a stream of its own: libraries and memory are set up by it. Where recording
    fails, the function goes on to run as it is, and a warning says so once.

    Args:
        function: static tensors -> tensors or nothing. It may change tensors in place that outlive it, and must not
            replace them.
        device: where it computes.
        generators: random generators that it draws from, beside torch's own.

    Returns:
        What the function returns. A replay writes it into the same memory again: copy what shall stay.

    Example:
        >>> total = torch.zeros(())
        >>> recorded = Recorded(lambda x: total.add_(x.sum()), torch.device("cpu"))
        >>> [recorded(torch.ones(3)).item() for _ in range(2)]
        [3.0, 6.0]
    """

    def __init__(self, function: Function, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        self.function, self.device, self.generators = function, device, list(generators)
        self.failure: str | None = None
        self._static: dict[Any, list[Tensor]] = {}
        self._graphs: dict[Any, Any] = {}

    def __call__(self, *args: Tensor, also: Any = ()) -> Any:
        """Run or replay.

        Args:
            args: tensors on the device.
            also: what else a recording depends on, hashable: another value is another recording.
        """
        recorder = RECORDERS.get(self.device.type)
        if recorder is None or self.failure is not None:
            return self.function(*args)
        key = (tuple((a.shape, a.dtype) for a in args), also)
        first = key not in self._static
        if first:
            self._static[key] = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in args]
        static = self._static[key]
        with torch.no_grad():
            for place, value in zip(static, args, strict=True):
                place.copy_(value)
        if first:
            with _beside(self.device):
                return self.function(*static)
        if key not in self._graphs:
            try:
                self._graphs[key] = recorder(lambda: self.function(*static), self.device, self.generators)
            except Exception as error:  # whatever the device refuses, the function itself is still right
                while isinstance(error.__context__, Exception):  # the end of a broken recording fails too
                    error = error.__context__
                self.failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                warnings.warn(f"not recorded in a CUDA graph: {self.failure}", RuntimeWarning, stacklevel=2)
                return self.function(*args)
        self._graphs[key].replay()
        return self._graphs[key].out

    @property
    def num_recorded(self) -> int:
        """How many signatures were recorded."""
        return len(self._graphs)


@cache
def _side_stream(device: torch.device) -> Any:
    """The stream of first calls and recordings: what a library keeps for each stream is there before it records."""
    return torch.cuda.Stream(device)


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """On a side stream of a GPU, as torch asks for before a recording; elsewhere nothing."""
    if device.type != "cuda":
        yield
        return
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


_READS_BACK = ("_local_scalar_dense", "is_nonzero", "equal", "item", "_linalg_check_errors", "multinomial")
_READS_SCALES = ("normal.Tensor_Tensor", "normal.float_Tensor")  # torch checks them on the host
_INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put")  # only a mask's values count
_COPIES = ("_to_copy", "copy", "copy_", "_copy_from")


def host_traffic(graph: GraphModule, device: torch.device) -> str | None:
    """The first thing in a graph of operations that a CUDA graph cannot hold, in words; None if there is none.

    Args:
        graph: what ``make_fx`` recorded, each node with its value's description.
        device: where all of it shall be computed.
    """
    for node in graph.graph.nodes:
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if name in _READS_BACK or str(node.target).endswith(_READS_SCALES):
            return f"{node.target} reads a value back to the host"
        dynamic = torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())
        if name in _INDEXING:
            dynamic = any(v.dtype == torch.bool for i in node.args[1] if isinstance(i, Node) for v in _described(i))
        if dynamic:
            return f"{node.target} gives a shape that depends on values"
        values = [value for one in (node, *node.all_input_nodes) for value in _described(one)]
        elsewhere = [value for value in values if value.device.type != device.type]
        crosses = name in _COPIES and 0 < len(elsewhere) < len(values)
        if crosses or any(v.dim() > 0 or node.op == "placeholder" for v in elsewhere):  # a literal is a constant
            what = node.target if node.op == "call_function" else "the step"
            return f"{what} has a tensor {list(elsewhere[0].shape)} on {elsewhere[0].device}: move it to {device}"
    return None


def _described(node: Node) -> list[Any]:
    found = node.meta.get("val")
    values = found if isinstance(found, list | tuple) else [found]
    return [value for value in values if isinstance(value, Tensor)]


def generators_of(graph: GraphModule) -> list[torch.Generator]:
    """The random generators that a graph of operations names, beside torch's own."""
    named = [v for node in graph.graph.nodes for v in (*node.args, *node.kwargs.values())]
    return list({id(v): v for v in named if isinstance(v, torch.Generator)}.values())
