"""Several processes train one model: each takes a part of every batch, and gradients are summed.

``torchrun --nproc-per-node=4 -m pyro_vae train`` starts the processes (on several machines by torchrun's own options);
:func:`join` makes :class:`Workers` of them, and :func:`pyro_vae.fit` takes these. Three things differ from one process:

- The first worker draws the order of the examples for all, and a seed for each other one. So no example is lost or
  seen twice in an epoch, the noise of two workers differs, and its state is not needed to go on with a run.
- A loss of this library is a sum over examples, so the gradient of a batch is the *sum* of the gradients of its parts,
  however unequal these are. All gradients travel as one vector: one message a step. (DistributedDataParallel would take
  the mean, wrong for unequal parts, and hooks into ``forward``, which a Pyro program does not go through.)
- Only the first worker writes, prints and looks at held-out data.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_CPU = torch.device("cpu")
PATIENCE = timedelta(hours=2)  # others wait while the first worker looks at held-out data


class WorkerLost(RuntimeError):
    """Another worker has ended, so this one cannot go on."""


@dataclass(frozen=True)
class Workers:
    """The processes that train together; by default this one alone, for which everything here does nothing.

    Args:
        rank: number of this process, 0 to size - 1.
        size: how many there are.
        device: where this one computes.

    Example:
        >>> alone = Workers()
        >>> alone.is_first, alone.part(torch.arange(5))
        (True, tensor([0, 1, 2, 3, 4]))
        >>> Workers(rank=1, size=2).part(torch.arange(5))
        tensor([3, 4])
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"expected a rank from 0 to {self.size - 1}, found {self.rank}: see parallel.join.")

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that writes and prints."""
        return self.rank == 0

    def part(self, index: Tensor) -> Tensor:
        """This worker's part of a batch: consecutive, of sizes that differ by one at most, perhaps empty."""
        return index.tensor_split(self.size)[self.rank]

    def shuffle(self, num_examples: int, device: torch.device) -> Tensor:
        """A new order of all examples, the same for each worker; the noise of each but the first starts anew.

        Args:
            num_examples: how many.
            device: where the order is drawn, from torch's global generator there.

        Returns:
            A permutation of 0 to num_examples - 1, int64, on the device.
        """
        order = torch.randperm(num_examples, device=device)
        if self.size == 1:
            return order
        seeds = torch.randint(2**63 - 1, (self.size,)).to(device)
        drawn = torch.cat([order, seeds])
        self._broadcast(drawn)
        if not self.is_first:
            torch.manual_seed(int(drawn[num_examples + self.rank]))
        return drawn[:num_examples]

    def sum_(self, value: Tensor) -> Tensor:
        """Put the sum over the workers into a tensor, in place."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(value)
        return value

    def sum_gradients_(self, parameters: Sequence[Tensor]) -> None:
        """Give each parameter the sum of the workers' gradients; where one has none, zeros.

        Args:
            parameters: the same on each worker, in the same order.
        """
        if self.size == 1:
            return
        flat = self.sum_(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
        for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = gradient.view_as(p).to(p.dtype)

    def equalize_(self, module: nn.Module) -> None:
        """Give each worker the first one's parameters and buffers (a batch norm's running means drift apart)."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in _tensors(module):
                    value = tensor.detach().contiguous()
                    self._broadcast(value)
                    tensor.copy_(value)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What the first worker makes, handed to all.

        Args:
            make: called on the first worker only; gives bytes, or what JSON can hold.
        """
        value = make() if self.is_first else None
        if self.size == 1:
            return value
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        head = torch.tensor([len(content), isinstance(value, bytes)], device=self.device)
        self._broadcast(head)
        length, is_bytes = head.tolist()
        body = torch.zeros(length, dtype=torch.uint8)
        if self.is_first:
            body = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        body = body.to(self.device)
        self._broadcast(body)
        received = body.cpu().numpy().tobytes()
        return received if is_bytes else json.loads(received)

    def _broadcast(self, value: Tensor) -> None:
        with self._together():
            dist.broadcast(value, src=0)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises when a connection breaks or nobody answers
            raise WorkerLost(
                f"process {self.rank} of {self.size} stopped, since another one has ended (it says why, or was killed)"
            ) from error


@contextmanager
def join(device: str = "auto") -> Iterator[Workers]:
    """Join the other processes that torchrun started; a process started otherwise is alone.

    Reads RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them: gloo on processors, NCCL on GPUs, one GPU a process.
    While joined, SIGTERM (which torchrun sends when another worker failed) is raised as KeyboardInterrupt.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        ValueError: there are fewer GPUs than processes on this machine, or the environment is incomplete.

    Example:
        >>> with join("cpu") as workers:
        ...     workers.size
        1
    """
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Workers(device=torch.device("cuda" if use_cuda else "cpu"))
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size}, expected also {', '.join(missing)}, found none: start with torchrun.")
    local = int(os.environ["LOCAL_RANK"])
    here = torch.device("cpu")
    if use_cuda:
        count = torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"expected at most {count} processes on this machine, one for each GPU, found one more "
                f"(LOCAL_RANK={local}): lower --nproc-per-node, or compute on the CPU."
            )
        here = torch.device("cuda", local)
        torch.cuda.set_device(here)  # so that "cuda" means this one
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"  # each tensor by the one of its device
    dist.init_process_group(backend, timeout=PATIENCE)
    with _interrupted_by_sigterm():
        yield Workers(dist.get_rank(), dist.get_world_size(), here)
    dist.destroy_process_group()  # not after an error: it could wait for the others, whom the end of this process tells


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
