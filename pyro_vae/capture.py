"""From a step that Python runs to a graph of tensor operations: recording, what is refused, compiling.

The pieces that a captured training step (:mod:`pyro_vae.compiling`) and a replayed estimate (:mod:`pyro_vae.replays`)
are made of. The private or experimental parts of torch and Pyro that they need are named here only.
"""

import importlib
import os
import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyro
import pyro.util
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyro_vae.traceable import PlainDraws, dense_enumeration

# fallback_random keeps eager's noise; rearranged memory layouts cost more than they gain in small convolutions.
# CUDA graphs are ours: one of inductor's, which an environment variable turns on, cannot be recorded within another.
_OPTIONS: dict[str, Any] = {"fallback_random": True, "layout_optimization": False, "triton.cudagraphs": False}
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


_is_recording = False


_MACHINERY = ("capture.py", "compiling.py", "programs.py", "fast_svi.py", "optimizers.py", "traceable.py")


class NotCapturable(Exception):
    """A step that cannot become one graph; the message says which operation or difference is in the way."""


class Differs(NotCapturable):
    """A graph gives other numbers than the program that it was recorded from."""


def agreement(
    compare: Callable[[Callable[[], None]], float], go_to: Callable[[int], None], places: Sequence[int]
) -> float:
    """The error at the first of several places where a graph and its program agree.

    A kink may lie between the two at one place (a ReLU's input of about 0, of either sign by rounding); what is wrong
    in earnest is wrong at all of them.

    Args:
        compare: something that goes to a place -> relative difference there; raises ``Differs`` where it is too large.
        go_to: sets noise and parameters to those of a place.
        places: numbers of the places.
    """
    for place in places:
        try:
            return compare(lambda place=place: go_to(place))  # type: ignore[misc]
        except Differs as error:
            found = error
    raise found


_MASK_INDEX = "{} gives a shape that depends on values: use torch.where instead of a mask index"


class _NoHostCopies(TorchFunctionMode):
    """While recording, ``.item()`` in Pyro's bookkeeping stays a tensor: its value only leaves the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            raise NotCapturable(_MASK_INDEX.format("x[mask]"))  # here, where the line that does it is known
        return args[0].detach() if func is torch.Tensor.item else func(*args, **(kwargs or {}))


class _LastSite(Messenger):
    """Notes the sample site that is being drawn or scored, to name it where recording fails."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]


@contextmanager
def recording() -> Iterator[None]:
    """Validation and NaN warnings branch on values, which a graph cannot; they are off while it is recorded."""
    old = pyro.util.torch_isnan, pyro.util.torch_isinf, Distribution._validate_sample
    pyro.util.torch_isnan = pyro.util.torch_isinf = lambda value: False  # type: ignore[assignment]
    Distribution._validate_sample = lambda self, value: None  # type: ignore[method-assign]  # of those that were made before, with validation on
    site = _LastSite()
    global _is_recording
    before, _is_recording = _is_recording, True
    try:
        with pyro.validation_enabled(False), _NoHostCopies(), PlainDraws(), dense_enumeration(), site:
            yield
    except Exception as error:
        error.__dict__.setdefault("site", site.name)
        raise
    finally:
        _is_recording = before
        pyro.util.torch_isnan, pyro.util.torch_isinf, Distribution._validate_sample = old  # type: ignore[method-assign]


def is_recording() -> bool:
    """Whether a step is being recorded now: what is itself a graph gives its operations then, no compiled code."""
    return _is_recording


def record_graph(function: Callable[..., Any], args: Sequence[Tensor]) -> GraphModule:
    """The tensor operations of one call on real tensors, draws included."""
    with _one_fake_mode():
        return make_fx(function, tracing_mode="real")(*args)


def _one_fake_mode() -> AbstractContextManager[Any]:
    """One fake mode (private) describes all nodes; by itself make_fx makes one for each, in twice the time."""
    try:
        guards, fakes = importlib.import_module("torch._guards"), importlib.import_module("torch._subclasses")
        shapes = importlib.import_module("torch.fx.experimental.symbolic_shapes").ShapeEnv()
        return guards.tracing(guards.TracingContext(fakes.FakeTensorMode(shape_env=shapes)))
    except (ImportError, AttributeError, TypeError):
        return nullcontext()


@contextmanager
def store_kept() -> Iterator[None]:
    """Refuse a step that assigns entries of the parameter store, which a replay would not do; put them back."""
    store = pyro.get_param_store()
    before = dict(store.named_parameters())
    state = store.get_state()
    try:
        yield
    finally:
        assigned = [name for name, p in store.named_parameters() if name in before and before[name] is not p]
        store.set_state(state)
    if assigned:
        raise NotCapturable(
            f"the step gives {assigned[0]!r} in Pyro's parameter store another tensor, and a gradient or another "
            "shape: change it in place"
        )


# What torch says where a step cannot be recorded, and what a person can do about it.
_REMEDIES = (
    (
        "value out of a tracing tensor|data-dependent|_local_scalar_dense|GuardOnDataDependent",
        "a Python number or branch is made of a tensor's value: use torch.where, or keep the tensor",
    ),
    ("numpy", "a tensor becomes a NumPy array: compute with torch"),
)


def plain_reason(error: Exception) -> str:
    """One line: what happened, at which line of the user's program and near which site."""
    text = " ".join(str(error).split())
    if not isinstance(error, NotCapturable):
        remedies = (remedy for pattern, remedy in _REMEDIES if re.search(pattern, text))
        text = next(remedies, f"{type(error).__name__}: {text[:200]}")
    frames = traceback.extract_tb(error.__traceback__)
    inner = Path(pyro.__file__).parent  # type: ignore[arg-type]
    users = [frame for frame in frames if _is_users(frame.filename)]
    places = users or [frame for frame in frames if Path(frame.filename).is_relative_to(inner)]
    if places:
        text += f" (in {Path(places[-1].filename).name}:{places[-1].lineno}, {places[-1].line!r})"
    site = getattr(error, "site", None)
    return text + (f" (at or after site {site!r})" if site else "")


def _is_users(filename: str) -> bool:
    """Whether a line of code is the user's, or of this library's terms, rather than the machinery's."""
    inner = [Path(module.__file__).parent for module in (torch, pyro)]  # type: ignore[arg-type]
    path = Path(filename)
    machinery = [Path(__file__).with_name(name) for name in _MACHINERY]
    return not filename.startswith("<") and path not in machinery and not any(map(path.is_relative_to, inner))


@contextmanager
def rewound(parameters: Sequence[Tensor], buffers: Sequence[Tensor], args: Sequence[Tensor]) -> Iterator[Any]:
    """Trials leave no trace: all that they change is put back by ``rewind()``, and at the end."""
    devices = sorted({t.device for t in [*parameters, *buffers, *args] if t.device.type == "cuda"}, key=str)
    state, cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    changing = [*parameters, *buffers]
    values = [tensor.detach().clone() for tensor in changing]

    def rewind() -> None:
        torch.set_rng_state(state)
        for device, device_state in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(device_state, device)
        with torch.no_grad():
            for tensor, value in zip(changing, values, strict=True):
                tensor.copy_(value)
        for parameter in parameters:
            parameter.grad = None

    try:
        yield rewind
    finally:
        rewind()


def lift(module: GraphModule) -> tuple[list[Any], list[Tensor]]:
    """Turn the tensors that a graph holds into its first inputs, in place; these inputs, and the tensors."""
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
            inputs[id(tensor)][0].meta["val"] = tensor  # its type is asked for where it is an index
        node.replace_all_uses_with(inputs[id(tensor)][0])
        graph.erase_node(node)
    module.recompile()
    return [node for node, _ in inputs.values()], [tensor for _, tensor in inputs.values()]


def refuse_constants(
    module: GraphModule, held: dict[Any, Tensor], known: Sequence[Tensor], names: Sequence[str]
) -> None:
    """A result that no argument, parameter, buffer or draw reaches, but a tensor made while recording, has lost them.

    A tensor subclass that hides its tensor does that (Pyro's provenance), and so does a way through NumPy.
    """
    storages = {t.untyped_storage().data_ptr() for t in known}
    output = next(node for node in module.graph.nodes if node.op == "output")
    for name, result in zip(names, output.args[0], strict=True):
        if not isinstance(result, Node):
            continue  # a number, the same each time
        seen, todo, frozen = {result}, [result], False
        while todo:
            node = todo.pop()
            tensor = held.get(node)
            unknown = tensor is not None and tensor.untyped_storage().data_ptr() not in storages
            frozen |= unknown
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            if random or (node.op == "placeholder" and not unknown):
                break
            fresh = set(node.all_input_nodes) - seen
            seen |= fresh
            todo += fresh
        else:
            if frozen:
                raise NotCapturable(
                    f"{name} is a constant in the captured graph, since it came by a tensor subclass, NumPy or a list: "
                    "compute it with plain tensors (detach_provenance for Pyro's)"
                )


def _refuse_dynamic_shapes(node: Node) -> None:
    """Boolean indexing and its kin give another number of elements each time; a replay would be wrong."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return
    dynamic = torch.Tag.dynamic_output_shape in target.tags
    if target.overloadpacket in _INDEXING:
        masks = [i for i in node.args[1] if i is not None]  # type: ignore[union-attr]
        dynamic = any((i.meta.get("tensor_meta") or i.meta["val"]).dtype == torch.bool for i in masks)  # type: ignore
    if dynamic:
        raise NotCapturable(_MASK_INDEX.format(target))


def changed_by(node: Node) -> list[Node]:
    """The nodes whose values an operation changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    pairs = zip(schema.arguments, node.args, strict=False)
    changed = [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]
    return [value for value in changed if isinstance(value, Node)]


def is_view(node: Node) -> bool:
    """Whether a node's value shares the memory of its first input."""
    schema = getattr(node.target, "_schema", None)
    returns = schema.returns if schema is not None else []
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def owners(changed: list[Node]) -> set[Node]:
    """These nodes and what they are views of."""
    found: set[Node] = set()
    todo = list(changed)
    while todo:
        node = todo.pop()
        found.add(node)
        if is_view(node) or changed_by(node):
            todo += node.all_input_nodes[:1]
    return found


_SMALL = 4096  # multiplications below which a product in plain loops costs less than a call of a library


def _small_product(a: Tensor, b: Tensor) -> Any:
    """A matrix product as sums, which inductor fuses with what stands around it."""
    if a.device.type != "cpu" or a.shape[0] * a.shape[1] * b.shape[1] > _SMALL:
        return NotImplemented
    return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)


def _small_affine(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _small_product(a, b)
    return product if product is NotImplemented else beta * c + alpha * product


_DECOMPOSITIONS: dict[Any, Any] = {
    torch.ops.aten.mm.default: _small_product,
    torch.ops.aten.addmm.default: _small_affine,
}


_DRAWS = {
    torch.ops.aten.normal_.default: ((0.0, 1.0), torch.ops.aten.randn.default),
    torch.ops.aten.uniform_.default: ((0.0, 1.0), torch.ops.aten.rand.default),
}


def _draw_at_once(module: GraphModule) -> None:
    """``empty(...).normal_()`` as ``randn(...)``: the same numbers, without a copy that stands in for the change."""
    for node in [node for node in module.graph.nodes if node.target in _DRAWS]:
        usual, draw = _DRAWS[node.target]
        source, given = node.args[0], node.args[1:]
        fresh = source.target is torch.ops.aten.empty.memory_format and len(source.users) == 1
        if not fresh or node.kwargs or (*given, *usual[len(given) :]) != usual:
            continue
        value = node.meta["val"]
        kind = {"dtype": value.dtype, "device": value.device}
        with module.graph.inserting_before(node):
            drawn = module.graph.call_function(draw, (list(value.shape),), kind)
        drawn.meta["val"] = value
        node.replace_all_uses_with(drawn)
        module.graph.erase_node(node)
        module.graph.erase_node(source)
    module.recompile()


def compile_graph(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Inductor directly where this torch has it (private, a few per cent faster), else the public way."""
    # Traced once more: each node gets its shape and type, small products become sums.
    graph = make_fx(module, tracing_mode="fake", decomposition_table=_DECOMPOSITIONS)(*inputs)
    _draw_at_once(graph)
    direct = getattr(importlib.import_module("torch._inductor"), "compile", None)
    if direct is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about itself, which would end it where warnings are errors
            with _one_fake_mode():
                return direct(graph, inputs, options=_OPTIONS)
    return torch.compile(graph, fullgraph=True, dynamic=False, options=_OPTIONS)


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which inductor needs on a processor: the one of CXX, or a usual name."""
    return bool(os.environ.get("CXX")) or any(map(shutil.which, ("c++", "g++", "clang++")))
