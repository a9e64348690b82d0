"""All numbers that need a GPU, by one command: ``python tests/benchmarks/gpu.py`` prints them and writes gpu.json.

Each section stands by itself: one that fails says so and the next one starts, what is known so far is in the file after
each, and none starts once ``--minutes`` are over. From a checkout, with ``PYTHONPATH=.``; where a command may take ten
minutes only, three of them:

.. code-block:: text

    python tests/benchmarks/gpu.py --only tests steps            is it right, and how fast is a step
    python tests/benchmarks/gpu.py --only fit precision burda    whole epochs, the share in which the GPU computes
    python tests/benchmarks/gpu.py --only evaluation epoch       log p(x), an epoch of MNIST's size

tests: equality with eager Pyro on the GPU. steps: steps a second on Pyro's example at batch 128 for stock Pyro,
hand-written torch in a CUDA graph, and ``FastSVI``. fit: the same within ``fit``, and how much of the time the GPU
computes. precision: what TF32 and bfloat16 give and cost. burda: how long the schedule of Burda et al. would take.
evaluation: log p(x) by passes of several sizes, eager and compiled. epoch: seconds for an epoch of MNIST's size.
``--smoke`` runs every line of it that runs without a GPU, on small sizes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_vae import ELBO, IWAE, FastSVI, datasets, fit, log_evidence, training
from pyro_vae.bench import machine
from pyro_vae.bench_epoch import measure_epoch
from pyro_vae.memory import peak_memory
from pyro_vae.precision import rounded, tensor_cores
from pyro_vae.steps import Steps
from pyro_vae.workloads import WORKLOADS, HandWritten, Workload, make_vae

TESTS = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BURDA_STEPS = sum(3**i for i in range(8)) * 60_000 // 20  # 3^i passes at the i-th learning rate, batches of 20


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds_a_step(step: Callable[[], Any], count: int, rounds: int = 5) -> float:
    """The median over rounds, after a warm-up."""
    for _ in range(10):
        step()
    found = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        found.append((time.perf_counter() - start) / count)
    return statistics.median(found)


def pyro_step(workload: Workload, x: torch.Tensor, svi_class: Any, **settings: Any) -> Callable[[], Any]:
    vae = make_vae(workload, svi_class.__name__).to(DEVICE)
    objective = ELBO() if svi_class is FastSVI else Trace_ELBO()
    svi = svi_class(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), objective, **settings)
    return lambda: svi.step(x)


def by_hand(workload: Workload, x: torch.Tensor) -> Callable[[], Any]:
    """Hand-written torch, its whole step in a CUDA graph, the loss read each time as in ``SVI.step``."""
    module = HandWritten(workload).to(DEVICE)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True, capturable=GPU)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = module(x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    if not GPU:
        return lambda: step().item()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> float:
        graph.replay()
        return loss.item()

    return replay


class Profiled(Steps):
    """Training steps whose ninth epoch is watched: the share of it in which the GPU computes."""

    busy: dict[str, float]

    def epoch(self, order: torch.Tensor, first: int) -> Iterator[int]:
        self.number = getattr(self, "number", 0) + 1
        if self.number != 9 or not GPU:
            yield from super().epoch(order, first)
            return
        try:
            profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            profiler.start()
        except Exception as error:  # no profiler on this machine
            print(f"not profiled: {error}", flush=True)
            yield from super().epoch(order, first)
            return
        wait()
        start = time.perf_counter()
        yield from super().epoch(order, first)
        wait()
        seconds = time.perf_counter() - start
        profiler.stop()
        kernels = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
        self.busy["gpu_busy"] = kernels / seconds


def by_fit(workload: Workload, num_batches: int, how: Any, objective: Any = None, **settings: Any) -> dict[str, Any]:
    """Seconds a step within ``fit``, from bytes binarised at each visit; the share in which the GPU computes."""
    x = (torch.rand(num_batches * workload.batch_size, *workload.event_shape, device=DEVICE) * 255).byte()
    vae = make_vae(workload, "fit").to(DEVICE)
    said: list[str] = []
    Profiled.busy, plain = {}, training.Steps
    training.Steps = Profiled  # type: ignore[misc]
    try:
        history = fit(
            vae,
            x,
            objective=objective,
            epochs=10,
            batch_size=workload.batch_size,
            prepare=datasets.binarize,
            compiled=how,
            note=said.append,
            **settings,
        )
    finally:
        training.Steps = plain  # type: ignore[misc]
    timed = history["seconds"][3:7]  # recorded by then, and not yet profiled
    found = {"seconds_a_step": statistics.median(timed) / num_batches, "elbo": history["elbo"][-1], "said": said}
    return {**found, "first_epoch": history["seconds"][0], **Profiled.busy}


def error_of_precision(workload: Workload, precision: Any) -> float:
    """How far the bound of one batch is from float32's at the same noise, nats per example."""
    x = (torch.rand(workload.batch_size, *workload.event_shape, device=DEVICE) < 0.3).float()
    vae, found = make_vae(workload, "precision").to(DEVICE), []
    for one in ("float32", precision):
        torch.manual_seed(1)
        with tensor_cores(one, DEVICE):
            found.append(float(rounded(lambda: ELBO(64).bound(vae.model, vae.guide, x).mean().detach(), one)()))
    return abs(found[1] - found[0])


def backend_of(how: Any) -> str:
    return "replay" if how == "replay" else "inductor"


class Sections:
    """What is measured; each method fills its part of ``result`` as it goes."""

    def __init__(self, smoke: bool) -> None:
        self.smoke = smoke
        self.result: dict[str, Any] = {"machine": machine(), "on_gpu": GPU, "failed": {}}
        self.workload = WORKLOADS["tiny" if smoke else "W1b"]
        self.hows: tuple[Any, ...] = ("replay",) if smoke else ("replay", True)
        self.batches = 3 if smoke else 480

    def tests(self) -> None:
        if self.smoke:
            return
        options = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
        options += ["-o", "addopts=", "-W", "default"]
        words = [*options, *(str(TESTS / name) for name in ("test_cuda_graphs.py", "test_on_gpu.py"))]
        try:
            run = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=300)
            said = run.stdout
        except subprocess.TimeoutExpired as error:
            said = f"{(error.stdout or b'').decode(errors='replace')}\nstopped after 300 s"
        self.result["tests"] = said[-6000:]
        print(said[-3000:], flush=True)

    def steps(self) -> None:
        workload, count = self.workload, 3 if self.smoke else 300
        x = (torch.rand(workload.batch_size, *workload.event_shape, device=DEVICE) < 0.3).float()
        ways: dict[str, Callable[[], Callable[[], Any]]] = {
            "stock Pyro": lambda: pyro_step(workload, x, SVI),
            "torch by hand, CUDA graph": lambda: by_hand(workload, x),
        }
        for how in self.hows:
            ways[f"FastSVI, {backend_of(how)}"] = lambda how=how: pyro_step(  # type: ignore[misc]
                workload, x, FastSVI, backend=backend_of(how)
            )
        found = self.result["seconds_a_step"] = {}
        for name, make in ways.items():
            pyro.clear_param_store()
            found[name] = seconds_a_step(make(), count)
            self.tell_step(name, found[name])

    def tell_step(self, name: str, seconds: float) -> None:
        stock = self.result.get("seconds_a_step", {}).get("stock Pyro")
        ratio = f"{stock / seconds:7.2f} x stock Pyro" if stock else ""
        print(f"{self.workload.describe()}  {name:28}{1e6 * seconds:9.1f} us/step {ratio}", flush=True)

    def fit(self) -> None:
        found = self.result["fit"] = {}
        for how in self.hows:
            one = found[backend_of(how)] = by_fit(self.workload, self.batches, how)
            self.tell_step(f"fit, {backend_of(how)}", one["seconds_a_step"])
            busy = f"GPU busy {one.get('gpu_busy', float('nan')):.0%} of the time"
            print(f"fit, {backend_of(how)}: {busy}; first epoch {one['first_epoch']:.1f} s", flush=True)
            print("\n".join(one["said"]), flush=True)

    def precision(self) -> None:
        found = self.result["precision"] = {}
        for precision in ("tf32", "bf16") if GPU else ("bf16",):
            one = found[precision] = by_fit(self.workload, self.batches, self.hows[-1], precision=precision)
            one["error"] = error_of_precision(self.workload, precision)
            print(
                f"{precision}: {1e6 * one['seconds_a_step']:.1f} us/step, "
                f"bound {one['error']:.2g} nats per example from float32 at the same noise",
                flush=True,
            )

    def burda(self) -> None:
        workload, smoke = WORKLOADS["tiny" if self.smoke else "iwae"], self.smoke
        one = by_fit(workload, 3 if smoke else 3000, self.hows[-1], IWAE(num_particles=5 if smoke else 50))
        hours = BURDA_STEPS * one["seconds_a_step"] / 3600
        self.result["burda"] = one | {"steps": BURDA_STEPS, "hours": hours}
        print(
            f"{workload.describe()}: {1 / one['seconds_a_step']:.0f} steps/s; the schedule of Burda et al., "
            f"{BURDA_STEPS:,} steps, would take {hours:.1f} hours" + " (of the small sizes)" * smoke,
            flush=True,
        )

    def evaluation(self) -> None:
        """Log p(x) of a thousand examples: how large a pass, and whether compiling comes back."""
        rows, draws = (20, 10) if self.smoke else (1000, 1000)
        vae = make_vae(self.workload, "evaluation").to(DEVICE)
        x = (torch.rand(rows, *self.workload.event_shape, device=DEVICE) < 0.3).float()
        found = self.result["evaluation"] = {}
        ways = [(f"passes of 2^{power}", 2**power, False) for power in (22, 25, 28)]
        for name, most, compiled in [*ways, *([] if self.smoke else [("compiled, 2^25", 2**25, True)])]:
            log_evidence(vae, x[:2], 2)
            wait()
            start = time.perf_counter()
            log_p = log_evidence(vae, x, draws, max_elements=most, compiled=compiled).mean
            wait()
            found[name] = {"seconds": time.perf_counter() - start, "log_p": log_p}
            each = 1e6 * found[name]["seconds"] / (rows * draws)
            print(f"log p(x), {rows} x {draws} draws, {name:18}{each:9.4f} us a draw, {log_p:.3f} nats", flush=True)

    def epoch(self) -> None:
        if self.smoke:
            return  # it compiles
        epoch = measure_epoch(3)
        self.result["epoch"] = {name: statistics.median(times["wall"]) for name, times in epoch.items()}
        for name, seconds in self.result["epoch"].items():
            print(f"epoch of MNIST's size  {name:24}{seconds:9.3f} s", flush=True)


NAMES = ("tests", "steps", "fit", "precision", "burda", "evaluation", "epoch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, without a GPU too")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="sections; default: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="no section starts after so many")
    parser.add_argument("--out", default="gpu.json", help="where the numbers go")
    arguments = parser.parse_args()
    if not GPU and not arguments.smoke:
        sys.exit("expected a CUDA device, found none: --smoke runs what can be run without one.")
    end = time.monotonic() + 60 * arguments.minutes
    sections = Sections(arguments.smoke)
    result = sections.result
    print(json.dumps(result["machine"]), flush=True)
    for name in arguments.only:
        start = time.monotonic()
        if start > end:
            result["failed"][name] = f"not started: {arguments.minutes:g} minutes were over"
        else:
            try:
                pyro.clear_param_store()
                getattr(sections, name)()
            except Exception:  # the others are worth having
                result["failed"][name] = traceback.format_exc()[-4000:]
                print(f"{name} failed:\n{traceback.format_exc()[-2000:]}", flush=True)
        result.setdefault("seconds", {})[name] = time.monotonic() - start
        result["peak_memory"] = peak_memory()
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, text in result["failed"].items():
        print(f"{name}: {text.strip().splitlines()[-1]}", flush=True)
    sys.exit(1 if result["failed"] else 0)


if __name__ == "__main__":
    main()
