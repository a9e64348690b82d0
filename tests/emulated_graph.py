"""What a CUDA graph does to a program, on a CPU: a recording that computes nothing, and replays without its Python."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

READS_BACK = ("_local_scalar_dense", "is_nonzero", "equal")


class EmulatedGraph(TorchDispatchMode):
    """Stands in for :class:`pyro_vae.cuda_graphs.CudaGraph`.

    Recording notes each operation with the very tensors that it reads and writes, then puts back all that was written
    and the random state. A replay runs the operations in their order and writes each result into the memory that it had
    when it was recorded. A number that Python computed, a tensor that Python replaced, a loss that was kept without
    a copy: all are seen as they would be on a GPU. What a GPU would refuse to record is refused.
    """

    made: ClassVar[list["EmulatedGraph"]] = []

    def __init__(self, function, device, generators) -> None:
        super().__init__()
        assert not generators
        self.calls: list[Any] = []
        self.own: set[int] = set()
        self.outside: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_replays = 0
        state = torch.get_rng_state()
        with self:
            self.out = function()
        torch.set_rng_state(state)
        for there, value in self.outside.values():
            there.copy_(value)
        self.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse(func, args, kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in kwargs:
                self._keep(kwargs[argument.name])
        kept = pytree.tree_map(lambda value: value, (args, kwargs))  # lists as they are now
        read = {memory(t) for t in pytree.tree_leaves(kept) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        self.own |= {memory(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)} - read
        self.calls.append((func, *kept, out))
        return out

    def _keep(self, value: Any) -> None:
        for tensor in pytree.tree_leaves(value):
            if memory(tensor) not in self.own | self.outside.keys():
                there = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.outside[memory(tensor)] = (there, there.clone())

    @torch.no_grad()
    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, out in self.calls:
            now = func(*args, **kwargs)
            for there, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(now), strict=True):
                if isinstance(there, Tensor) and memory(there) != memory(value):
                    there.copy_(value)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def refuse(func, args, kwargs) -> None:
    name = func.overloadpacket.__name__
    assert name not in READS_BACK, f"{func} reads a value back to the host"
    assert torch.Tag.dynamic_output_shape not in func.tags, f"{func} gives a shape that depends on values"
    assert kwargs.get("generator") is None, f"{func} draws from a generator that is not registered"
    if name in ("index", "index_put", "index_put_"):
        assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} with a mask counts on the host"
