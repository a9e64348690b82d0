"""How fast an epoch is here: Pyro's example as shipped, with its data made ready beforehand, and ``fit``.

The example takes one picture after the other from bytes to PIL and to a tensor, then SVI steps over batches. Random
black and white pictures of MNIST's shape stand for the data. Between two epochs of ``fit`` the others take their turns.
"""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from PIL import Image
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_vae.bench import comparison, products, update
from pyro_vae.training import fit
from pyro_vae.workloads import WORKLOADS, Workload, make_vae

EXAMPLE = "Pyro's example"


class _Pictures(Dataset[Tensor]):
    """Bytes, one picture at a time to PIL and to floats in [0, 1], as torchvision's MNIST with ToTensor does it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.fromarray(self.x[index].numpy())
        return torch.from_numpy(np.array(image, copy=True))[None].float().div(255)


class _Epochs:
    """Stock SVI over the batches of a loader; each call is one epoch."""

    def __init__(self, workload: Workload, loader: Any, device: torch.device, name: str) -> None:
        self.vae = make_vae(workload, name).to(device)
        adam = pyro.optim.Adam({"lr": 1e-3})  # type: ignore[attr-defined]  # made at import
        self.svi = SVI(self.vae.model, self.vae.guide, adam, Trace_ELBO())
        self.loader, self.device = loader, device

    def __call__(self) -> None:
        for batch in self.loader:
            x = batch[0] if isinstance(batch, list | tuple) else batch
            self.svi.step(x.to(self.device).reshape(len(x), -1))


def measure_epoch(repeats: int = 5, num_examples: int = 60_000, seed: int = 0) -> dict[str, Any]:
    """Let the ways of an epoch take turns, on the sizes of Pyro's example (W1).

    Args:
        repeats: epochs of each way that are timed, after one that is not.
        num_examples: pictures an epoch, N.
        seed: seed of pictures, weights and noise.

    Returns:
        For each way seconds and processor seconds of each epoch, as :func:`pyro_vae.bench.measure` gives them.
    """
    workload = WORKLOADS["W1"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    pictures = 255 * torch.randint(0, 2, (num_examples, 28, 28), dtype=torch.uint8, generator=generator)
    torch.manual_seed(seed)
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ready = TensorDataset(pictures.flatten(1).float().div(255))
        others: dict[str, Callable[[], Any]] = {
            EXAMPLE: _Epochs(
                workload, DataLoader(_Pictures(pictures), workload.batch_size, shuffle=True), device, "example"
            ),
            "stock SVI, tensors": _Epochs(
                workload, DataLoader(ready, workload.batch_size, shuffle=True), device, "tensors"
            ),
        }
        step = products(workload, device), update(workload, device)
        count = math.ceil(num_examples / workload.batch_size)
        others["floor"] = lambda: [run(count) for run in step]
        names = [*others, "fit, eager", "fit"]
        results: dict[str, Any] = {name: {"wall": [], "cpu": []} for name in names}

        def timed(name: str, start: tuple[float, float], count: int) -> None:
            if count > 0:  # the first epoch warms up, captures and compiles
                results[name]["wall"].append(time.perf_counter() - start[0])
                results[name]["cpu"].append(time.process_time() - start[1])

        def train(name: str, compiled: bool | None, between: Any) -> None:
            vae = make_vae(workload, name.replace(", ", "_")).to(device)
            start = _now()

            def on_epoch(row: dict[str, Any]) -> None:
                nonlocal start
                timed(name, start, row["epoch"] - 1)
                between(row["epoch"] - 1)
                start = _now()

            fit(
                vae,
                pictures.flatten(1).to(device),
                epochs=repeats + 1,
                batch_size=workload.batch_size,
                prepare=lambda x: x.float().div(255),
                compiled=compiled,
                on_epoch=on_epoch,
            )

        def others_take_turns(count: int) -> None:
            for name, epoch in others.items():
                start = _now()
                epoch()
                timed(name, start, count)

        train("fit, eager", False, lambda count: None)
        train("fit", True, others_take_turns)
    return results


def _now() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def bench_epoch(repeats: int) -> tuple[dict[str, Any], str]:
    """The epochs of :func:`measure_epoch` with their ratios, and both in lines to read.

    Args:
        repeats: epochs of each way that are timed.
    """
    times = measure_epoch(repeats)
    sizes = f"{WORKLOADS['W1'].describe()}, 60,000 pictures"
    found, lines = comparison(times, EXAMPLE, "s/epoch", 1, "faster than the example")
    return {"sizes": sizes, **found}, "\n".join([f"epoch: {sizes} (Pyro's example)", *lines])
