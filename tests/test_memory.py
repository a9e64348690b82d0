"""Freed memory that is kept spares the kernel's clearing of pages."""

import platform
import subprocess
import sys

import pytest

from pyro_vae.memory import keep_freed_memory, peak_memory

FAULTS = """
import resource, torch
from pyro_vae.memory import keep_freed_memory
torch.set_num_threads(1)
for kept in (False, True):
    assert not kept or keep_freed_memory()
    torch.ones(12_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12_000_000)  # 48 MB, which glibc would ask the kernel for each time
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_is_not_asked_for_again():
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True).stdout
    as_it_is, kept = map(int, found.split())
    assert 5 * kept < as_it_is


def test_another_c_library(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False


def test_peak_memory_is_at_least_that_of_torch():
    assert peak_memory() > 50 * 2**20
