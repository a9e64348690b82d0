"""How fast a training step is here: Pyro as it stands, hand-written torch, and the captured step, side by side.

Times drift with what else a machine does, so the ways take turns in one process, and each round gives one ratio. The
floor is what no way of writing can avoid: the matrix products of the step and the optimiser's reads and writes of all
parameters, each timed by itself in the same turns.
"""

import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from pyro_vae.memory import keep_freed_memory, peak_memory
from pyro_vae.optimizers import Adam
from pyro_vae.plot_style import BLUE, GREY, VERMILION
from pyro_vae.workloads import WAYS, WORKLOADS, HandWritten, Run, Workload

_FLOOR = ("products", "update")  # what is measured of it


class Products(TorchDispatchMode):
    """Notes the matrix products and convolutions that run under it, with operands of their shapes and layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in flop_registry:
            self.calls.append((func, tree_map_only(Tensor, Tensor.clone, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def products(workload: Workload, device: torch.device) -> Run:
    """The matrix products and convolutions of one step alone, forward and backward."""
    module, x = HandWritten(workload).to(device), workload.draw(device)
    with Products() as products:
        module(x).backward()

    def run(count: int) -> float:
        with torch.no_grad():
            for _ in range(count):
                for func, (args, kwargs) in products.calls:
                    func(*args, **kwargs)
        return 0.0

    return run


def update(workload: Workload, device: torch.device) -> Run:
    """The optimiser alone: Adam's kernel reads parameters, gradients and two means, and writes three of them back."""
    parameters = [nn.Parameter(p.detach().to(device)) for p in HandWritten(workload).parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = Adam(parameters)

    def run(count: int) -> float:
        for _ in range(count):
            optimizer.step()
        return 0.0

    return run


def num_operations(workload: Workload) -> int:
    """Multiplications and additions of the matrix products and convolutions of one step."""
    module, x = HandWritten(workload), workload.draw(torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        module(x).backward()
    return counter.get_total_flops()


def measure(workload: Workload, repeats: int = 7, seconds: float = 0.3, seed: int = 0) -> dict[str, Any]:
    """Let the ways take turns on one workload.

    Args:
        workload: what to train.
        repeats: rounds; each way runs once in each.
        seconds: about how long one turn lasts.
        seed: seed of weights, data and noise.

    Returns:
        For each way and for both parts of the floor: seconds and processor seconds a step in each round, seconds to
        build, the loss at the end; where something was not run, why.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    x = workload.draw(device)
    runs: dict[str, Run] = {}
    results: dict[str, dict[str, Any]] = {}
    with pyro.get_param_store().scope():
        for name, make in WAYS.items():
            torch.manual_seed(seed)
            start = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run = make(workload, x)
                    first = run(1)
                    run(2)
            except Exception as error:  # a way that does not run here, no compiler say, is told and left out
                results[name] = {"skipped": " ".join(str(error).split())[:200]}
                continue
            runs[name] = run
            results[name] = {"build": time.perf_counter() - start, "first_loss": first}
        runs |= {"products": products(workload, device), "update": update(workload, device)}
        results |= {"products": {}, "update": {}}
        counts = {name: _count(run, seconds, device) for name, run in runs.items()}
        for result in results.values():
            if "skipped" not in result:
                result.update(wall=[], cpu=[])
        for _ in range(repeats):
            for name, run in runs.items():
                wall, cpu = _time(run, counts[name], device)
                results[name]["wall"].append(wall)
                results[name]["cpu"].append(cpu)
    return results


def _time(run: Run, count: int, device: torch.device) -> tuple[float, float]:
    """Seconds a step, on the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(count)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def _count(run: Run, seconds: float, device: torch.device) -> int:
    return max(1, min(1000, round(seconds / max(_time(run, 2, device)[0], 1e-6))))


def ratios(
    results: dict[str, dict[str, Any]], clock: str = "wall", base: str = "stock SVI"
) -> dict[str, tuple[float, float, float]]:
    """How many times as fast as the base each way is: lower quartile, median, upper quartile over the rounds.

    The last entry, "floor", has the matrix products and, where it was measured, the optimiser's update alone.

    Args:
        results: what :func:`measure` gave.
        clock: "wall", or "cpu" for the processor's own time, which other programs disturb less.
        base: what the others are compared with.

    Example:
        >>> one = {"stock SVI": {"wall": [4.0, 4.0]}, "products": {"wall": [1.0, 1.0]}, "update": {"wall": [1.0, 1.0]}}
        >>> ratios(one)
        {'stock SVI': (1.0, 1.0, 1.0), 'floor': (2.0, 2.0, 2.0)}
    """
    stock = results[base][clock]
    times = {name: r[clock] for name, r in results.items() if clock in r and name not in _FLOOR}
    parts = [results[name][clock] for name in _FLOOR if name in results]
    if parts:
        times["floor"] = [sum(part) for part in zip(*parts, strict=True)]
    found = {}
    for name, values in times.items():
        low, middle, high = np.quantile([s / v for s, v in zip(stock, values, strict=True)], [0.25, 0.5, 0.75])
        found[name] = (float(low), float(middle), float(high))
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, threads, load, versions."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    cuda = torch.cuda.is_available()
    return {
        "processor": f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine(),
        "accelerator": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
        "load": round(_load(), 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "pyro-ppl")},
        **{name: importlib.metadata.version(name) for name in ("numpyro", "jax") if importlib.util.find_spec(name)},
    }


def _load() -> float:
    try:
        with open("/proc/loadavg", encoding="utf-8") as file:
            return float(file.read().split()[0])
    except OSError:
        return math.nan


def comparison(
    results: dict[str, dict[str, Any]],
    base: str,
    unit: str,
    scale: float,
    against: str,
    digits: str = ".2f",
    floor: str = "floor",
) -> tuple[dict[str, Any], list[str]]:
    """The ratios of all ways, and a line to read for each.

    Args:
        results: what :func:`measure` or a function of its kind gave.
        base: what the others are compared with.
        unit: of one turn's time, over its column.
        scale: seconds in that unit.
        against: what the base is, over the column of ratios.
        digits: the format of a ratio.
        floor: what the last line is called.

    Returns:
        What JSON stores of it, and the lines with their head.
    """
    wall, cpu = ratios(results, base=base), ratios(results, "cpu", base)
    names = [name for name in results if name not in _FLOOR] + ["floor"] * ("floor" in wall.keys() - results.keys())
    labels = {name: floor if name == "floor" else name for name in names}
    width = max(24, *(len(label) + 3 for label in labels.values()))
    built = any("build" in result for result in results.values())
    lines = [f"  {'':{width}}{unit:>9}{f'{against} (quartiles)':>36}{'by CPU time':>14}{'build s' * built:>10}"]
    for name in names:
        if "skipped" in results.get(name, {}):
            lines.append(f"  {labels[name]:{width}}not run: {results[name]['skipped']}")
            continue
        parts = [results[part] for part in ((name,) if name in results else _FLOOR) if part in results]
        median = scale * sum(statistics.median(part["wall"]) for part in parts)
        low, middle, high = (format(value, digits) for value in wall[name])
        build = f"{parts[0]['build']:.1f}" if "build" in parts[0] else ""
        spread = f"{middle} ({low} to {high})"
        lines.append(f"  {labels[name]:{width}}{median:9.3g}{spread:>36}{format(cpu[name][1], digits):>14}{build:>10}")
    return {"ratios": wall, "ratios_by_cpu_time": cpu, "times": results}, lines


def speed_bars(found: dict[str, dict[str, tuple[float, float, float]]], ax: Axes | None = None) -> Axes:
    """Each workload's ways as bars, how many times as fast as stock SVI: quartiles as whiskers, the floor dashed.

    Args:
        found: workload -> what :func:`ratios` gave.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.
    """
    ways = [name for name in WAYS if name != "stock SVI" and any(name in r for r in found.values())]
    if ax is None:
        ax = Figure(figsize=(1.6 + 1.5 * len(found), 4.2), layout="constrained").add_subplot()
    colours = ["black", "#E69F00", "#56B4E9", VERMILION, "#CC79A7", BLUE, "#0B3C5D", "#009E73"]
    width = 0.8 / len(ways)
    for j, way in enumerate(ways):
        places = [(i, r[way]) for i, r in enumerate(found.values()) if way in r]
        x = [i - 0.4 + (j + 0.5) * width for i, _ in places]
        low, middle, high = (np.array([r[k] for _, r in places]) for k in range(3))
        colour = colours[list(WAYS).index(way)]
        whiskers: dict[str, Any] = {"yerr": (middle - low, high - middle), "ecolor": GREY}
        ax.bar(x, middle - 1, width, bottom=1, color=colour, label=way, **whiskers)
    for i, r in enumerate(found.values()):
        label = "matrix products and Adam alone" if i == 0 else None
        ax.plot([i - 0.45, i + 0.45], [r["floor"][1]] * 2, color="black", ls=(0, (4, 2)), lw=1.4, label=label)
    values = [v[1] for r in found.values() for v in r.values()]
    if max(values) > 8:
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
    ax.axhline(1, color="black", lw=0.8)
    sizes = {name: WORKLOADS[name].describe().replace(", ", "\n").replace(" ", "\n") for name in found}
    ax.set_xticks(range(len(found)), [f"{name}\n{size}" for name, size in sizes.items()], fontsize="small")
    ax.set_ylabel("steps a second, stock pyro.infer.SVI = 1")
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


Further = Callable[[int], tuple[dict[str, Any], str]]  # rounds -> result, lines to read


def bench(
    names: Sequence[str],
    repeats: int,
    seconds: float,
    threads: int | None,
    on_result: Callable[[str], None],
    further: Mapping[str, Further],
) -> dict[str, Any]:
    """Measure several workloads; the number of threads and the processors of this process are put back.

    Args:
        names: keys of ``WORKLOADS`` or of ``further``.
        repeats: rounds.
        seconds: about how long one turn lasts.
        threads: threads of torch; None: as they are; 1: on one processor, so that JAX has one too.
        on_result: called with each workload's table.
        further: what is no training step and measures itself.

    Returns:
        Machine, and for each workload its sizes, times and ratios: what ``pyro-vae bench --json`` prints.
    """
    before = torch.get_num_threads()
    state = torch.get_rng_state()
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None  # Linux
    if threads is not None:
        torch.set_num_threads(threads)
    if threads == 1 and processors is not None:
        os.sched_setaffinity(0, {max(processors)})
    try:
        kept = keep_freed_memory()  # compiled steps do this, for all ways that run beside them
        result: dict[str, Any] = {"machine": machine() | {"freed_memory_kept": kept}, "repeats": repeats}
        result["workloads"] = {}
        for name in names:
            if name in further:
                result["workloads"][name], text = further[name](repeats)
                on_result(text)
                continue
            workload = WORKLOADS[name]
            times, operations = measure(workload, repeats, seconds), num_operations(workload)
            found, lines = comparison(times, "stock SVI", "ms/step", 1e3, "faster than stock")
            result["workloads"][name] = {"sizes": workload.describe(), "operations": operations, **found}
            best = min(times["products"]["wall"])
            lines.insert(0, f"{name}: {workload.describe()} ({workload.origin})")
            lines.append(
                f"  floor: {operations / 1e9:.3g} G operations in matrix products, at {operations / best / 1e9:.0f} "
                "G/s here, and Adam's pass over the parameters"
            )
            on_result("\n".join(lines))
        result["peak_memory"] = peak_memory()
    finally:
        torch.set_num_threads(before)
        torch.set_rng_state(state)
        if processors is not None:
            os.sched_setaffinity(0, processors)
    return result
