"""All numbers that need a GPU, by one command: ``python tests/benchmarks/gpu.py`` prints them and writes gpu.json.

Equality with eager Pyro (the tests of CUDA graphs), steps a second on Pyro's example at batch 128 for stock Pyro,
hand-written torch in a CUDA graph, ``FastSVI`` and ``fit``, the share of time in which the GPU computes, what TF32 and
bfloat16 give and cost, seconds for an epoch of MNIST's size, and how long the schedule of Burda et al. would take.
``--smoke`` runs every line of it that runs without a GPU, on small sizes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_vae import ELBO, IWAE, FastSVI, datasets, fit
from pyro_vae.bench import machine
from pyro_vae.bench_epoch import measure_epoch
from pyro_vae.memory import peak_memory
from pyro_vae.precision import rounded, tensor_cores
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


def by_fit(workload: Workload, num_batches: int, how: Any, objective: Any = None, **settings: Any) -> dict[str, Any]:
    """Seconds a step within ``fit``, from bytes binarised at each visit; the share in which the GPU computes."""
    x = (torch.rand(num_batches * workload.batch_size, *workload.event_shape, device=DEVICE) * 255).byte()
    busy: dict[str, Any] = {}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if GPU else None

    def watch(row: dict[str, Any]) -> None:
        if profiler is not None and row["epoch"] == 8:
            wait()
            busy["start"] = time.perf_counter()
            profiler.start()
        if profiler is not None and row["epoch"] == 10:
            wait()
            seconds = time.perf_counter() - busy.pop("start")
            profiler.stop()
            kernels = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
            busy["gpu_busy"] = kernels / seconds

    vae = make_vae(workload, "fit").to(DEVICE)
    history = fit(
        vae,
        x,
        objective=objective,
        epochs=10,
        batch_size=workload.batch_size,
        prepare=datasets.binarize,
        compiled=how,
        on_epoch=watch,
        **settings,
    )
    timed = history["seconds"][3:7]  # recorded by then, and not yet profiled
    return {"seconds_a_step": statistics.median(timed) / num_batches, "elbo": history["elbo"][-1], **busy}


def error_of_precision(workload: Workload, precision: Any) -> float:
    """How far the bound of one batch is from float32's at the same noise, nats per example."""
    x = (torch.rand(workload.batch_size, *workload.event_shape, device=DEVICE) < 0.3).float()
    vae, found = make_vae(workload, "precision").to(DEVICE), []
    for one in ("float32", precision):
        torch.manual_seed(1)
        with tensor_cores(one, DEVICE):
            found.append(float(rounded(lambda: ELBO(64).bound(vae.model, vae.guide, x).mean().detach(), one)()))
    return abs(found[1] - found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small sizes, without a GPU too")
    parser.add_argument("--out", default="gpu.json", help="where the numbers go")
    arguments = parser.parse_args()
    if not GPU and not arguments.smoke:
        sys.exit("expected a CUDA device, found none: --smoke runs what can be run without one.")
    smoke = arguments.smoke
    result: dict[str, Any] = {"machine": machine(), "on_gpu": GPU}
    print(json.dumps(result["machine"]), flush=True)

    if not smoke:
        words = f"-m pytest -q -n0 -p no:cacheprovider {TESTS / 'test_cuda_graphs.py'}".split()
        tests = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        result["tests"] = tests.stdout.strip().splitlines()[-1]
        print(f"equality: {result['tests']}", flush=True)

    workload = WORKLOADS["tiny" if smoke else "W1b"]
    x = (torch.rand(workload.batch_size, *workload.event_shape, device=DEVICE) < 0.3).float()
    count = 3 if smoke else 300
    steps = {"stock Pyro": seconds_a_step(pyro_step(workload, x, SVI), count)}
    steps["torch by hand, CUDA graph"] = seconds_a_step(by_hand(workload, x), count)
    hows = ("replay",) if smoke else ("replay", True)
    for how in hows:
        backend = "replay" if how == "replay" else "inductor"
        steps[f"FastSVI, {backend}"] = seconds_a_step(pyro_step(workload, x, FastSVI, backend=backend), count)
    result["seconds_a_step"], result["fit"], result["precision"] = steps, {}, {}
    batches = 3 if smoke else 480
    for how in hows:
        backend = "replay" if how == "replay" else "inductor"
        result["fit"][backend] = by_fit(workload, batches, how)
        steps[f"fit, {backend}"] = result["fit"][backend]["seconds_a_step"]
    for name, seconds in steps.items():
        ratio = steps["stock Pyro"] / seconds
        print(f"{workload.describe()}  {name:28}{1e6 * seconds:9.1f} us/step {ratio:7.2f} x stock Pyro", flush=True)
    for backend, found in result["fit"].items():
        print(f"fit, {backend}: GPU busy {found.get('gpu_busy', float('nan')):.0%} of the time", flush=True)

    for precision in ("tf32", "bf16") if GPU else ("bf16",):
        found = by_fit(workload, batches, hows[-1], precision=precision)
        found["error"] = error_of_precision(workload, precision)
        result["precision"][precision] = found
        print(
            f"{precision}: {1e6 * found['seconds_a_step']:.1f} us/step, "
            f"bound {found['error']:.2g} nats per example from float32 at the same noise",
            flush=True,
        )

    if not smoke:  # it compiles
        epoch = measure_epoch(3)
        result["epoch"] = {name: statistics.median(times["wall"]) for name, times in epoch.items()}
        for name, seconds in result["epoch"].items():
            print(f"epoch of MNIST's size  {name:24}{seconds:9.3f} s", flush=True)

    iwae = WORKLOADS["tiny" if smoke else "iwae"]
    found = by_fit(iwae, 3 if smoke else 3000, hows[-1], IWAE(num_particles=5 if smoke else 50))
    hours = BURDA_STEPS * found["seconds_a_step"] / 3600
    result["burda"] = found | {"steps": BURDA_STEPS, "hours": hours}
    print(
        f"{iwae.describe()}: {1 / found['seconds_a_step']:.0f} steps/s; the schedule of Burda et al., {BURDA_STEPS:,} "
        f"steps, would take {hours:.1f} hours" + " (of the small sizes)" * smoke
    )
    result["peak_memory"] = peak_memory()
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
