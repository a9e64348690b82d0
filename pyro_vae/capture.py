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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.util
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from pyro_vae.traceable import PlainDraws, dense_enumeration

# fallback_random keeps eager's noise; rearranged memory layouts cost more than they gain in small convolutions.
# CUDA graphs are ours: one of inductor's, which an environment variable turns on, cannot be recorded within another.
_OPTIONS: dict[str, Any] = {"fallback_random": True, "layout_optimization": False, "triton.cudagraphs": False}
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class NotCapturable(Exception):
    """A step that cannot become one graph; the message says which operation or difference is in the way."""


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
    try:
        with pyro.validation_enabled(False), _NoHostCopies(), PlainDraws(), dense_enumeration(), site:
            yield
    except Exception as error:
        error.__dict__.setdefault("site", site.name)
        raise
    finally:
        pyro.util.torch_isnan, pyro.util.torch_isinf, Distribution._validate_sample = old  # type: ignore[method-assign]


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
    machinery = [Path(__file__).with_name(name) for name in ("capture.py", "compiling.py", "traceable.py")]
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
        if not isinstance(result, torch.fx.Node):
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
        raise NotCapturable(_MASK_INDEX.format(target))


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Inductor directly where this torch has it (private, a few per cent faster), else the public way."""
    direct = getattr(importlib.import_module("torch._inductor"), "compile", None)
    if direct is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about itself, which would end it where warnings are errors
            return direct(graph, inputs, options=_OPTIONS)
    return torch.compile(graph, fullgraph=True, dynamic=False, options=_OPTIONS)


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which inductor needs on a processor: the one of CXX, or a usual name."""
    return bool(os.environ.get("CXX")) or any(map(shutil.which, ("c++", "g++", "clang++")))
