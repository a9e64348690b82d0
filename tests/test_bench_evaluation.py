"""The ways to estimate log p(x) that are timed estimate one number, and the table says what was measured."""

import math

import pyro
import pytest
import torch

from pyro_vae import bench_evaluation, log_evidence
from pyro_vae.bench import ratios
from pyro_vae.bench_evaluation import LOOP, loop_with_draws_at_once, loop_with_single_draws, measure_evaluation
from pyro_vae.capture import has_compiler
from pyro_vae.workloads import WORKLOADS, make_vae


@pytest.mark.parametrize("loop", [loop_with_draws_at_once, loop_with_single_draws])
def test_the_loops_estimate_what_log_evidence_does(float64, loop):
    """E exp(estimate) = p(x), for each of 200 copies of one example."""
    torch.manual_seed(0)
    with pyro.get_param_store().scope(), torch.no_grad():
        vae = make_vae(WORKLOADS["tiny"], "vae").double()
        x = torch.ones(1, 7)
        exact = log_evidence(vae, x, 50000).values[0]
        ratios = (torch.tensor(list(loop(vae, x.expand(200, 7), 3))) - exact).exp()
    assert 0.001 < ratios.std() < 1
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / math.sqrt(200)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_all_ways_take_turns():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = measure_evaluation(WORKLOADS["tiny"], 40, repeats=2, seconds=0.001)
    assert list(found)[-1] == "products" and len(found) == 5
    assert all(len(r["wall"]) == len(r["cpu"]) == 2 and min(r["wall"]) > 0 for r in found.values())
    faster = ratios(found, base=LOOP)
    assert faster[LOOP] == (1, 1, 1)
    assert faster["loop over examples and draws"][1] < 1 < faster["log_evidence, eager"][1] < faster["floor"][1]
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert "vae" not in str(list(pyro.get_param_store()))


def test_the_table_has_the_ratios(monkeypatch):
    times = {LOOP: [4e-6, 8e-6, 4e-6], "products": [1e-6, 2e-6, 2e-6]}
    found = {name: {"wall": v, "cpu": [t / 2 for t in v], "build": 1.5} for name, v in times.items()}
    monkeypatch.setattr(bench_evaluation, "measure_evaluation", lambda *_: found)
    result, text = bench_evaluation.bench_evaluation(3)
    assert result["ratios"]["floor"] == (3.0, 4.0, 4.0) and "K=5000" in result["sizes"]
    last = text.splitlines()[-1]
    assert last.split("products")[1].split() == ["2", "4", "(3", "to", "4)", "4", "1.5"], last
