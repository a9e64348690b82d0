"""How fast a training step is here: Pyro as it stands, hand-written torch, and the captured step, side by side.

Times drift with what else a machine does, so the ways take turns in one process, and each round gives one ratio. The
floor is what no way of writing can avoid: the matrix products of the step and the optimiser's reads and writes of all
parameters, each timed by itself in the same turns.
"""

import importlib.metadata
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.infer
import pyro.optim
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

from pyro_vae.compiling import FastSVI
from pyro_vae.decoders import Decoder
from pyro_vae.encoders import DiagonalNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.networks import Mlp
from pyro_vae.objectives import ELBO, IWAE
from pyro_vae.optimizers import Adam
from pyro_vae.plots import BLUE, GREY, VERMILION
from pyro_vae.priors import StandardNormal
from pyro_vae.vae import VAE

Step = Callable[[], float]


@dataclass(frozen=True)
class Workload:
    """A fully connected VAE on binary data: sizes as in well-known programs.

    Args:
        widths: inputs and hidden layers of the encoder; the decoder mirrors them.
        latent_dim: number of latent dimensions D.
        activation: between the layers.
        batch_size: examples a step, B.
        num_particles: draws of z for each example, K; more than one: the importance-weighted bound.
        origin: where these sizes come from.
    """

    widths: tuple[int, ...]
    latent_dim: int
    activation: type[nn.Module]
    batch_size: int
    num_particles: int = 1
    origin: str = ""

    def layers(self) -> list[tuple[int, int, int]]:
        """Inputs, outputs and rows of each matrix product of a forward pass."""
        encoder = [*self.widths, 2 * self.latent_dim]
        decoder = [self.latent_dim, *self.widths[::-1]]
        rows = [(encoder, self.batch_size), (decoder, self.batch_size * self.num_particles)]
        return [(i, o, n) for sizes, n in rows for i, o in pairwise(sizes)]

    def describe(self) -> str:
        """Sizes in one line."""
        sizes = "-".join(map(str, self.widths)) + f"-z{self.latent_dim}"
        particles = f", K={self.num_particles}" if self.num_particles > 1 else ""
        return f"{sizes} {self.activation.__name__}, B={self.batch_size}{particles}"


WORKLOADS = {
    "W1": Workload((784, 400), 50, nn.Softplus, 256, origin="Pyro's example"),
    "W1b": Workload((784, 400), 50, nn.Softplus, 128, origin="Pyro's example, half the batch"),
    "Wk": Workload((784, 512), 2, nn.ReLU, 128, origin="Keras tutorials"),
    "Wc": Workload((784, 300, 300), 40, nn.ReLU, 100, origin="three layers"),
    "tiny": Workload((7, 8), 2, nn.ReLU, 32, origin="the smallest"),
    "iwae": Workload((784, 200, 200), 50, nn.Tanh, 20, 50, origin="Burda et al., K=50"),
}


class HandWritten(nn.Module):
    """The same model without Pyro: the loss of a batch from the densities' formulas, as one would write it in torch."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        widths, d = workload.widths, workload.latent_dim
        self.num_particles = workload.num_particles
        self.encoder = Mlp(*widths, 2 * d, activation=workload.activation)
        self.decoder = Mlp(d, *widths[::-1], activation=workload.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Minus the bound, summed over the batch."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn(self.num_particles, *loc.shape, device=x.device)
        z = loc + log_scale.exp() * noise
        h = self.decoder(z)
        log_px = -nn.functional.binary_cross_entropy_with_logits(h, x.expand_as(h), reduction="none").sum(-1)
        log_w = log_px + (-0.5 * z.square() + 0.5 * noise.square() + log_scale).sum(-1)  # the constants cancel
        return -(log_w.logsumexp(0) - math.log(self.num_particles)).sum()


def make_vae(workload: Workload, name: str) -> VAE:
    """The same model as two Pyro programs."""
    widths, d = workload.widths, workload.latent_dim
    decoder = Decoder(Mlp(d, *widths[::-1], activation=workload.activation), Bernoulli())
    encoder = DiagonalNormal(Mlp(*widths, 2 * d, activation=workload.activation))
    return VAE(StandardNormal(d), decoder, encoder, name=name)


def _pyro_step(workload: Workload, x: Tensor, name: str, objective: Any, svi_class: Any = SVI) -> Step:
    vae = make_vae(workload, name).to(x.device)
    adam = pyro.optim.Adam({"lr": 1e-3})  # type: ignore[attr-defined]  # made at import
    svi = svi_class(vae.model, vae.guide, adam, objective)
    return lambda: svi.step(x)


def _stock(workload: Workload, x: Tensor) -> Step:
    k = workload.num_particles
    many = {"num_particles": k, "vectorize_particles": True, "max_plate_nesting": 1}
    return _pyro_step(workload, x, "stock", Trace_ELBO() if k == 1 else RenyiELBO(alpha=0, **many))


def _jit(workload: Workload, x: Tensor) -> Step:
    return _pyro_step(workload, x, "jit", JitTrace_ELBO(ignore_jit_warnings=True))


def _captured(workload: Workload, x: Tensor) -> Step:
    k = workload.num_particles
    return _pyro_step(workload, x, "captured", ELBO() if k == 1 else IWAE(num_particles=k), FastSVI)


def _by_hand(workload: Workload, x: Tensor, compiled: bool = False) -> Step:
    module = HandWritten(workload).to(x.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
    loss_of = torch.compile(module, fullgraph=True) if compiled else module

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _compiled_by_hand(workload: Workload, x: Tensor) -> Step:
    return _by_hand(workload, x, compiled=True)


WAYS: dict[str, Callable[[Workload, Tensor], Step]] = {
    "stock SVI": _stock,
    "JitTrace_ELBO": _jit,
    "torch by hand": _by_hand,
    "torch.compile by hand": _compiled_by_hand,
    "FastSVI": _captured,
}


def products(workload: Workload, device: torch.device) -> Step:
    """The matrix products of one step alone, forward and backward."""
    work: list[tuple[Tensor, Tensor]] = []
    for place, (i, o, rows) in enumerate(workload.layers()):
        x, weight, gradient = (torch.randn(s, device=device) for s in ((rows, i), (o, i), (rows, o)))
        work += [(x, weight.T), (gradient.T, x)] + [(gradient, weight)] * (place > 0)

    def step() -> float:
        for left, right in work:
            torch.mm(left, right)
        return 0.0

    return step


def update(workload: Workload, device: torch.device) -> Step:
    """The optimiser alone: Adam's kernel reads parameters, gradients and two means, and writes three of them back."""
    parameters = [nn.Parameter(torch.randn(o, i, device=device)) for i, o, _ in workload.layers()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = Adam(parameters)

    def step() -> float:
        optimizer.step()
        return 0.0

    return step


def num_operations(workload: Workload) -> int:
    """Multiplications and additions of the matrix products of one step."""
    return sum(2 * i * o * n * (2 + (place > 0)) for place, (i, o, n) in enumerate(workload.layers()))


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
    x = (torch.rand(workload.batch_size, workload.widths[0], device=device) < 0.3).float()
    steps: dict[str, Step] = {}
    results: dict[str, dict[str, Any]] = {}
    with pyro.get_param_store().scope():
        for name, make in WAYS.items():
            if name == "JitTrace_ELBO" and workload.num_particles > 1:
                results[name] = {"skipped": "Pyro has no compiled importance-weighted bound"}
                continue
            torch.manual_seed(seed)
            start = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    step = make(workload, x)
                    first = [step() for _ in range(3)]
            except Exception as error:  # a way that does not run here, no compiler say, is told and left out
                results[name] = {"skipped": " ".join(str(error).split())[:200]}
                continue
            steps[name] = step
            results[name] = {"build": time.perf_counter() - start, "first_loss": first[0]}
        steps |= {"products": products(workload, device), "update": update(workload, device)}
        results |= {"products": {}, "update": {}}
        counts = {name: _count(step, seconds, device) for name, step in steps.items()}
        for result in results.values():
            if "skipped" not in result:
                result.update(wall=[], cpu=[])
        for _ in range(repeats):
            for name, step in steps.items():
                wall, cpu = _time(step, counts[name], device)
                results[name]["wall"].append(wall)
                results[name]["cpu"].append(cpu)
    return results


def _time(step: Step, count: int, device: torch.device) -> tuple[float, float]:
    """Seconds a step, on the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def _count(step: Step, seconds: float, device: torch.device) -> int:
    return max(1, min(1000, round(seconds / max(_time(step, 2, device)[0], 1e-6))))


def ratios(results: dict[str, dict[str, Any]], clock: str = "wall") -> dict[str, tuple[float, float, float]]:
    """How many times as fast as stock SVI each way is: lower quartile, median, upper quartile over the rounds.

    The last entry, "floor", has the matrix products and the optimiser's update alone.

    Args:
        results: what :func:`measure` gave.
        clock: "wall", or "cpu" for the processor's own time, which other programs disturb less.

    Example:
        >>> one = {"stock SVI": {"wall": [4.0, 4.0]}, "products": {"wall": [1.0, 1.0]}, "update": {"wall": [1.0, 1.0]}}
        >>> ratios(one)
        {'stock SVI': (1.0, 1.0, 1.0), 'floor': (2.0, 2.0, 2.0)}
    """
    stock = results["stock SVI"][clock]
    times = {name: r[clock] for name, r in results.items() if clock in r and name not in ("products", "update")}
    pairs = zip(results["products"][clock], results["update"][clock], strict=True)
    times["floor"] = [a + b for a, b in pairs]
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
    }


def _load() -> float:
    try:
        with open("/proc/loadavg", encoding="utf-8") as file:
            return float(file.read().split()[0])
    except OSError:
        return math.nan


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


def table(name: str, results: dict[str, dict[str, Any]]) -> str:
    """One workload in lines to read."""
    workload = WORKLOADS[name]
    wall, cpu = ratios(results), ratios(results, "cpu")
    lines = [
        f"{name}: {workload.describe()} ({workload.origin})",
        f"  {'':24}{'ms/step':>9}{'faster than stock (quartiles)':>32}{'by CPU time':>14}{'build s':>10}",
    ]
    for way in [*WAYS, "floor"]:
        if way != "floor" and "skipped" in results[way]:
            lines.append(f"  {way:24}not run: {results[way]['skipped']}")
            continue
        parts = ("products", "update") if way == "floor" else (way,)
        milliseconds = 1e3 * sum(statistics.median(results[part]["wall"]) for part in parts)
        low, middle, high = wall[way]
        spread = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        build = "" if way == "floor" else f"{results[way]['build']:.1f}"
        lines.append(f"  {way:24}{milliseconds:9.3g}{spread:>32}{cpu[way][1]:14.2f}{build:>10}")
    operations, best = num_operations(workload), min(results["products"]["wall"])
    lines.append(
        f"  floor: {operations / 1e9:.3g} G operations in matrix products, at {operations / best / 1e9:.0f} G/s here, "
        "and Adam's pass over the parameters"
    )
    return "\n".join(lines)


def speed_bars(found: dict[str, dict[str, tuple[float, float, float]]], ax: Axes | None = None) -> Axes:
    """Each workload's ways as bars: how many times as fast as stock SVI, quartiles as whiskers, the floor as a line.

    Args:
        found: workload -> what :func:`ratios` gave.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.
    """
    ways = [name for name in WAYS if any(name in r for r in found.values())]
    if ax is None:
        ax = Figure(figsize=(1.6 + 1.5 * len(found), 4.2), layout="constrained").add_subplot()
    colours = ["0.75", "#E69F00", "#56B4E9", VERMILION, BLUE]
    width = 0.8 / len(ways)
    for j, way in enumerate(ways):
        places = [(i, r[way]) for i, r in enumerate(found.values()) if way in r]
        x = [i - 0.4 + (j + 0.5) * width for i, _ in places]
        low, middle, high = (np.array([r[k] for _, r in places]) for k in range(3))
        colour = colours[list(WAYS).index(way)]
        ax.bar(x, middle, width, color=colour, label=way, yerr=(middle - low, high - middle), ecolor=GREY)
    for i, r in enumerate(found.values()):
        label = "matrix products and Adam alone" if i == 0 else None
        ax.plot([i - 0.45, i + 0.45], [r["floor"][1]] * 2, color="black", ls=(0, (4, 2)), lw=1.4, label=label)
    values = [v[1] for r in found.values() for v in r.values()]
    if max(values) > 8:
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(range(len(found)), list(found))
    ax.set_ylabel("steps a second, stock pyro.infer.SVI = 1")
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


def bench(
    names: Sequence[str], repeats: int, seconds: float, threads: int | None, on_result: Callable[[str], None]
) -> dict[str, Any]:
    """Measure several workloads; the number of threads is put back.

    Args:
        names: keys of ``WORKLOADS``.
        repeats: rounds.
        seconds: about how long one turn lasts.
        threads: threads of torch; None: as they are.
        on_result: called with each workload's table.

    Returns:
        Machine, and for each workload its sizes, times and ratios: what ``pyro-vae bench --json`` prints.
    """
    before = torch.get_num_threads()
    state = torch.get_rng_state()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        result: dict[str, Any] = {"machine": machine(), "repeats": repeats, "workloads": {}}
        for name in names:
            times = measure(WORKLOADS[name], repeats, seconds)
            result["workloads"][name] = {
                "sizes": WORKLOADS[name].describe(),
                "operations": num_operations(WORKLOADS[name]),
                "ratios": ratios(times),
                "ratios_by_cpu_time": ratios(times, "cpu"),
                "times": times,
            }
            on_result(table(name, times))
        result["peak_memory"] = peak_memory()
    finally:
        torch.set_num_threads(before)
        torch.set_rng_state(state)
    return result
