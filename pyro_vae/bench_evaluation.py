"""How fast log p(x) is estimated here: :func:`log_evidence` beside the loops over examples that most programs ship.

The ways take turns in one process, as in :mod:`pyro_vae.bench`, and all are counted in seconds a draw: one z of one
example, decoded and weighed. The floor is the matrix products of the decoder alone, on as many rows as one pass has.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.bench import Products, comparison
from pyro_vae.contracts import untouched
from pyro_vae.estimates import MeanWeights
from pyro_vae.passes import at_once, passes
from pyro_vae.vae import VAE
from pyro_vae.workloads import WORKLOADS, Workload, make_vae

Turn = Callable[[], int]  # does some of the work; how many draws it was
LOOP = "loop over examples, K draws at once"


def _log_weight(vae: VAE, x: Tensor) -> Tensor:
    """Log p(x, z) - log q(z|x) of one draw of z for each row of x, by Pyro's traces of the guide and of the model."""
    guide_trace = poutine.trace(vae.guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(vae.model, trace=guide_trace)).get_trace(x)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
    z, x_site = model_trace.nodes["z"], model_trace.nodes["x"]
    return x_site["log_prob"] + z["log_prob"] - guide_trace.nodes["z"]["log_prob"]


def loop_with_draws_at_once(vae: VAE, x: Tensor, num_particles: int) -> Iterator[float]:
    """For each example by itself: its copies for K draws through guide and model, log p(x) as a number.

    Example:
        >>> from pyro_vae.workloads import WORKLOADS
        >>> vae = make_vae(WORKLOADS["tiny"], "vae")
        >>> len(list(loop_with_draws_at_once(vae, torch.ones(5, 7), 3)))
        5
    """
    for example in x:
        log_w = _log_weight(vae, example.expand(num_particles, *example.shape))
        yield (log_w.logsumexp(0) - math.log(num_particles)).item()


def loop_with_single_draws(vae: VAE, x: Tensor, num_particles: int) -> Iterator[float]:
    """For each example and each of its K draws: guide and model once, the weight as a number.

    Example:
        >>> from pyro_vae.workloads import WORKLOADS
        >>> vae = make_vae(WORKLOADS["tiny"], "vae")
        >>> len(list(loop_with_single_draws(vae, torch.ones(5, 7), 3)))
        5
    """
    for example in x:
        log_w = [_log_weight(vae, example.unsqueeze(0)).item() for _ in range(num_particles)]
        yield torch.tensor(log_w).logsumexp(0).item() - math.log(num_particles)


def _loop(loop: Callable[..., Iterator[float]], vae: VAE, x: Tensor, num_particles: int) -> Turn:
    def turn() -> int:
        with untouched(vae):
            next(loop(vae, x, num_particles))
        return num_particles

    return turn


def _ours(vae: VAE, x: Tensor, num_particles: int, compiled: bool) -> Turn:
    """Rows of x until their K draws are there, then on with the next rows: what log_evidence does."""
    many = x[:1].expand(10**6, *x.shape[1:])  # one example in the memory
    every = passes(vae, many, num_particles, compiled=compiled)
    weights = MeanWeights(num_particles)

    def turn() -> int:
        count, rows, terms = 0, slice(0), None
        with untouched(vae):
            while terms is None or weights.parts:
                rows, terms = next(every)
                weights.add(rows, terms, many)
                count += terms.log_px.numel()
        return count

    return turn


def _floor(vae: VAE, x: Tensor) -> Turn:
    rows = at_once(x, None)
    with torch.no_grad(), Products() as products:
        vae.decoder(torch.randn(rows, *vae.prior().event_shape, device=x.device))

    def turn() -> int:
        with torch.no_grad():
            for func, (args, kwargs) in products.calls:
                func(*args, **kwargs)
        return rows

    return turn


def measure_evaluation(
    workload: Workload, num_particles: int = 5000, repeats: int = 7, seconds: float = 0.3, seed: int = 0
) -> dict[str, Any]:
    """Let the ways to estimate log p(x) take turns on one workload.

    Args:
        workload: the model.
        num_particles: draws K of z for each example; of the loop over single draws, 100 at most are timed.
        repeats: rounds; each way has one turn in each.
        seconds: how long one turn lasts at least.
        seed: seed of weights, data and noise.

    Returns:
        For each way and for the products: seconds and processor seconds a draw in each round, seconds to build; where
        something was not run, why.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, dict[str, Any]] = {}
    turns: dict[str, Turn] = {}
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(seed)
        vae, x = make_vae(workload, "vae").to(device), workload.draw(device)
        ways: dict[str, Callable[[], Turn]] = {
            "loop over examples and draws": lambda: _loop(loop_with_single_draws, vae, x, min(100, num_particles)),
            LOOP: lambda: _loop(loop_with_draws_at_once, vae, x, num_particles),
            "log_evidence, eager": lambda: _ours(vae, x, num_particles, False),
            "log_evidence, compiled": lambda: _ours(vae, x, num_particles, True),
            "products": lambda: _floor(vae, x),
        }
        for name, make in ways.items():
            start = time.perf_counter()
            turns[name] = make()
            for _ in range(2):  # what is compiled is recorded after the first pass
                turns[name]()
            results[name] = {"build": time.perf_counter() - start, "wall": [], "cpu": []}
        for _ in range(repeats):
            for name, turn in turns.items():
                wall, cpu = _time(turn, seconds, device)
                results[name]["wall"].append(wall)
                results[name]["cpu"].append(cpu)
    return results


def _time(turn: Turn, seconds: float, device: torch.device) -> tuple[float, float]:
    """Seconds a draw, on the clock and of the processor."""
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while not count or time.process_time() - cpu < seconds:
        count += turn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def bench_evaluation(repeats: int) -> tuple[dict[str, Any], str]:
    """The ways of :func:`measure_evaluation` on the model of Burda et al. with K = 5000, and all in lines to read.

    Args:
        repeats: rounds.
    """
    workload, num_particles = WORKLOADS["iwae"], 5000
    times = measure_evaluation(workload, num_particles, repeats)
    sizes = f"log p(x) of {workload.describe().rsplit(', B', 1)[0]}, K={num_particles}"
    found, lines = comparison(
        times, LOOP, "us/draw", 1e6, "faster than the loop", digits=".3g", floor="floor: matrix products"
    )
    return {"sizes": sizes, **found}, "\n".join([f"evaluation: {sizes}", *lines])
