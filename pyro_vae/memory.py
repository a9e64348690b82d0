"""What the process takes from the system's memory, and what it keeps of it."""

import ctypes
import platform

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT = 2**29


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that tensors free, up to 512 MiB, and give it to the next ones.

    Without this, glibc hands large blocks back to the kernel, which clears each page anew at the next step. For the
    convolutions of ``pyro-vae bench`` that is a fifth to a third of a step on a processor; for small networks, whose
    blocks stay below its limits, nothing. It holds for the whole process and cannot be undone. The command line does
    it, and so do compiled steps; another program calls it once at its start.

    Returns:
        Whether it was done: there is a glibc, and it agreed.

    Source: mallopt(3) of the Linux manual.

    Example:
        >>> isinstance(keep_freed_memory(), bool)
        True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system, another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT // 2)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes; on a GPU, what torch allocated there; 0: unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
