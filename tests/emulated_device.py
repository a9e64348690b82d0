"""A second device, on a CPU: tensors that say they are elsewhere, hold their numbers, and refuse what a GPU refuses.

An operation that mixes them with tensors of the CPU fails as it would on a GPU (a CPU tensor of no dimensions is a
number there, where an operation takes numbers), and so does NumPy. What is asked of their values is answered.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CARD = torch.device("lazy")  # torch's own name of a device that this build knows, and autograd runs on this thread

_LITERALS = (torch.tensor, torch.as_tensor, torch.asarray)
_COPIES = ("_to_copy", "copy", "copy_")
_NO_NUMBERS = ("cat", "stack", "mm", "addmm", "bmm", "dot", "gather", "scatter", "index_select", "native_layer_norm")


class OnCard(Tensor):
    """A tensor of the other device; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnCard":
        kind = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=CARD, **kind)
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    ours = any(isinstance(value, OnCard) for value in given)
    host = [value for value in given if not isinstance(value, OnCard)]
    if name == "index":
        host = host[:1] if not isinstance(args[0], OnCard) else []  # indices may be on the host
    if ours and name not in _COPIES:
        mixed = [value for value in host if value.dim() > 0 or name in _NO_NUMBERS]
        assert not mixed, f"{func} takes a tensor {list(mixed[0].shape)} of the CPU and one of the other device"
    device = kwargs.get("device")
    to_card = ours if device is None else torch.device(device).type == CARD.type
    generator = kwargs.get("generator")
    assert not (to_card and generator is not None), f"{func} draws on the other device from a generator of the CPU"
    kwargs = {
        key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
    if name == "copy_":
        to_card = isinstance(args[0], OnCard)
    held = pytree.tree_map_only(OnCard, lambda value: value.held, (args, kwargs))
    out = func(*held[0], **held[1])
    if not to_card:
        return out
    known = {id(value.held): value for value in given if isinstance(value, OnCard)}  # changed in place, and given back
    return pytree.tree_map_only(Tensor, lambda value: known[id(value)] if id(value) in known else OnCard(value), out)


class Literals(TorchFunctionMode):
    """What torch does with numbers and lists below the place where a dispatch mode sees it.

    Args:
        send: a tensor of the CPU -> the same on the other device.
    """

    def __init__(self, send=lambda made: made.to(CARD)):
        super().__init__()
        self.send = send

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], OnCard):
            return args[0].detach().cpu().tolist()
        if func is Tensor.__getitem__ and isinstance(args[0], OnCard):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in index))
        if func is Tensor.new_tensor and args[0].device.type == CARD.type:
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": CARD, **kwargs}
        device = kwargs.get("device")
        if func in _LITERALS and device is not None and torch.device(device).type == CARD.type:
            del kwargs["device"]
            made = func(*args, **kwargs)
            return made if made.device.type == CARD.type else self.send(made)
        return func(*args, **kwargs)


class Card(TorchDispatchMode):
    """Within it the other device is there."""

    def __enter__(self):
        self.literals = Literals()
        self.literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.literals.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})
