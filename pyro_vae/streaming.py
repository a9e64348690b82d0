"""Training rows that stay outside the device: read ahead in batches, while the device computes.

Data on the model's device is indexed there. Data that would take more than half of its free memory stays where it is,
in memory or in a file (:func:`memory_mapped`), and each batch comes as it is needed:

.. code-block:: text

    reader thread   | gather batch 2 into buffer 0 | gather batch 3 into buffer 1 | ...
    copy stream     |         copy batch 1 (buffer 1) |      copy batch 2 (buffer 0) | ...
    compute stream  |                  step 0         |               step 1         | ...

The buffers are page-locked, so that a copy runs beside the step. On a processor there is nothing to copy: the thread
only reads ahead. The order of the examples is the same either way, and so is every number.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST_SHARE = 0.5  # of the free memory of the device; the rest is for activations


@dataclass(frozen=True)
class Rows:
    """Training rows and how they come to the device.

    Args:
        x: all rows, [N, *E], where they are kept.
        device: where batches shall be.
        streamed: whether they are read ahead; else they are on the device.
        note: what was decided, and why: one line.
    """

    x: Tensor
    device: torch.device
    streamed: bool
    note: str

    def first(self, count: int) -> Tensor:
        """The first rows, on the device."""
        return self.x[:count].to(self.device)

    def blocks(self, count: int) -> Iterator[Tensor]:
        """All rows in their order, ``count`` at a time, on the device."""
        for block in self.x.split(count):
            yield block.to(self.device)

    def read(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The batches ``x[index]`` one after the other, on the device.

        Args:
            indices: one index a batch, on the device of x.
        """
        if not self.streamed:
            for index in indices:
                yield self.x[index]
            return
        longest = max(map(len, indices))
        cuda = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if cuda else None
        buffers: list[Any] = [
            _PinnedBuffer(self.x, longest, stream) if cuda else _NoBuffer(self.x, self.device) for _ in range(2)
        ]
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(buffers[0].gather, indices[0])
            for step in range(len(indices)):
                rows = buffers[step % 2].send(ahead.result())
                if step + 1 < len(indices):
                    other = buffers[(step + 1) % 2]
                    other.wait()  # for the copy of the batch before this one
                    ahead = reader.submit(other.gather, indices[step + 1])
                yield rows


class _NoBuffer:
    """On a processor a batch is used where it was gathered; any other device gets a copy."""

    def __init__(self, x: Tensor, device: torch.device) -> None:
        self.x, self.device = x, device

    def gather(self, index: Tensor) -> Tensor:
        return self.x[index]

    def send(self, rows: Tensor) -> Tensor:
        return rows.to(self.device)

    def wait(self) -> None:
        pass


class _PinnedBuffer:
    """Page-locked memory for one batch, and the copy of it to the device on a stream of its own."""

    def __init__(self, x: Tensor, longest: int, stream: Any) -> None:
        self.x, self.stream = x, stream
        self.memory = torch.empty((longest, *x.shape[1:]), dtype=x.dtype, pin_memory=True)
        self.copied = torch.cuda.Event()

    def gather(self, index: Tensor) -> Tensor:
        """In the reader thread; it makes no CUDA call, which could break a graph being captured in the main thread."""
        return torch.index_select(self.x, 0, index, out=self.memory[: len(index)])

    def send(self, rows: Tensor) -> Tensor:
        """Start the copy; what is computed after this call waits for it on the device, not here."""
        with torch.cuda.stream(self.stream):
            there = torch.empty(rows.shape, dtype=rows.dtype, device=self.stream.device)
            there.copy_(rows, non_blocking=True)
            self.copied.record(self.stream)
        now = torch.cuda.current_stream(self.stream.device)
        now.wait_event(self.copied)
        there.record_stream(now)  # else the allocator could hand its memory out while a step still reads it
        return there

    def wait(self) -> None:
        """Until the copy has left the buffer."""
        self.copied.synchronize()


def place(x: Tensor, device: torch.device, resident: bool | None = None) -> Rows:
    """Decide where training rows are kept.

    Args:
        x: all rows, [N, *E], on the device or on the CPU.
        device: the model's.
        resident: True: on the device; False: where they are, read ahead; None: on the device if they take at most half
            of its free memory.

    Raises:
        ValueError: x is on another device, or is to be streamed from the device itself.

    Example:
        >>> place(torch.zeros(5, 7), torch.device("cpu")).note
        '140 bytes on cpu'
    """
    size = size_in_words(x.nbytes)
    if x.device == device and (resident or (x.device.type != "cpu" and resident is None)):
        return Rows(x, device, False, f"{size} on {device}")
    if x.device.type != "cpu":
        there = f"on {x.device}"
        raise ValueError(f"expected x on the CPU or on {device}, to be read from there, found it {there}: use x.cpu().")
    free = free_memory(device)
    share = LARGEST_SHARE if device.type != "cpu" else 1.0  # on a processor nothing is copied
    fits = x.nbytes <= share * free
    if fits if resident is None else resident:
        return Rows(x.to(device), device, False, f"{size} on {device}")
    why = "as asked" if resident is False else f"too large for {size_in_words(free)} of free memory on {device}"
    return Rows(x, device, True, f"{size} read ahead in batches, {why}")


def free_memory(device: torch.device) -> float:
    """How many bytes are free on a device; infinity where nobody can tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return float("inf")
    try:  # what the system would give, its file cache included
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def memory_mapped(path: str | Path) -> Tensor:
    """The array of a .npy file as a tensor that stays in the file: only what is indexed is read.

    Args:
        path: the file.

    Returns:
        The array, [N, *E], on the CPU; what is written to it does not reach the file.

    Raises:
        ValueError: it is no .npy file, or of a type that torch does not have.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/x.npy", np.arange(6, dtype=np.uint8).reshape(3, 2))
        ...     memory_mapped(f"{folder}/x.npy")[[2, 0]]
        tensor([[4, 5],
                [0, 1]], dtype=torch.uint8)
    """
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)  # "r" would make torch warn at each tensor
        if not isinstance(array, np.ndarray):
            raise TypeError("an archive of arrays")
        return torch.from_numpy(array)
    except FileNotFoundError:
        raise ValueError(f"expected a .npy file {path}, found none: check the path.") from None
    except (TypeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"expected a .npy file of numbers, found {path} ({reason}): write it with numpy.save."
        ) from None


def size_in_words(count: float) -> str:
    """A number of bytes with a unit."""
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(np.log10(count)) // 3, 4)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B"
