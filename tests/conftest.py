"""Shared by all tests: no state leaks from one to the next, and where real data is found."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start; before torch reads it

import pyro
import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def clean_slate():
    """A fixed seed, an empty parameter store, float32 by default and validation on; put back afterwards."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64():
    """Numbers that are compared are computed in double precision."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def uncompiled(monkeypatch):
    """What would be compiled is run as recorded: the same operations on the same tensors, and no compiler needed."""
    for name in ("compiling", "programs"):
        monkeypatch.setattr(f"pyro_vae.{name}.compile_graph", lambda graph, inputs: graph)
    monkeypatch.setattr("pyro_vae.programs.has_compiler", lambda: True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real image sets: the environment variable PYRO_VAE_DATA, or shared/data beside the project."""
    folder = Path(os.environ.get("PYRO_VAE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST/raw in {folder}: set PYRO_VAE_DATA to a folder that holds it")
    return folder
