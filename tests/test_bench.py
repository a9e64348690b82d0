"""The benchmark compares the same model, counts what it says it counts, and runs in seconds with --quick."""

import json
import math
import shutil

import pyro
import pytest
import torch
from matplotlib.figure import Figure

from pyro_vae import ELBO, IWAE, bench
from pyro_vae.cli import main
from pyro_vae.optimizers import torch_optimizer

has_compiler = any(map(shutil.which, ("g++", "clang++", "c++")))


@pytest.mark.parametrize("name", ["tiny", "iwae"])
def test_the_hand_written_model_is_the_same_model(float64, name):
    """Same weights: the losses of both agree in the mean over the noise."""
    workload = bench.WORKLOADS[name]
    torch.manual_seed(0)
    vae = bench.make_vae(workload, "vae").double()
    hand = bench.HandWritten(workload).double()
    hand.encoder.load_state_dict(vae.encoder.net.state_dict())
    hand.decoder.load_state_dict(vae.decoder.net.state_dict())
    x = (torch.rand(workload.batch_size, workload.widths[0]) < 0.3).double()
    k = workload.num_particles
    objective = ELBO() if k == 1 else IWAE(num_particles=k)
    with torch.no_grad():
        ours = torch.stack([objective.loss(vae.model, vae.guide, x) for _ in range(60)])
        theirs = torch.stack([hand(x) for _ in range(60)])
    error = ((ours.var() + theirs.var()) / 60).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert error < 0.01 * ours.mean().abs()


def test_operations_are_those_that_torch_counts():
    """By torch's own counter, for a step of the hand-written model."""
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("tiny", "Wc", "iwae"):
        workload = bench.WORKLOADS[name]
        module = bench.HandWritten(workload)
        x = (torch.rand(workload.batch_size, workload.widths[0]) < 0.3).float()
        with FlopCounterMode(display=False) as counter:
            module(x).backward()
        assert bench.num_operations(workload) == counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            bench.products(workload, torch.device("cpu"))()
        assert bench.num_operations(workload) == counter.get_total_flops()


def test_ratios_are_of_one_round_each():
    times = {"stock SVI": [4.0, 8.0, 12.0], "FastSVI": [2.0, 2.0, 2.0], "products": [1.0] * 3, "update": [1.0] * 3}
    found = bench.ratios({name: {"wall": values} for name, values in times.items()} | {"torch": {"skipped": "none"}})
    assert found == {"stock SVI": (1, 1, 1), "FastSVI": (3, 4, 5), "floor": (3, 4, 5)}


def test_the_picture_shows_the_ratios():
    found = {
        "W1": {"stock SVI": (1.0, 1.0, 1.0), "FastSVI": (1.9, 2.0, 2.2), "floor": (2.4, 2.5, 2.6)},
        "tiny": {"stock SVI": (1.0, 1.0, 1.0), "FastSVI": (9.0, 12.0, 13.0), "floor": (40.0, 50.0, 60.0)},
    }
    ax = bench.speed_bars(found, Figure().add_subplot())
    heights = [bar.get_height() for bars in ax.containers for bar in getattr(bars, "patches", [])]
    assert heights == [1.0, 1.0, 2.0, 12.0]
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [2.5, 50.0]
    assert ax.get_yscale() == "log" and [t.get_text() for t in ax.get_xticklabels()] == ["W1", "tiny"]


def test_command(tmp_path, capsys):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    main(["bench", "--quick", "--threads", "1", "--out", str(tmp_path / "b"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert printed == stored and (tmp_path / "b" / "bench.png").stat().st_size > 10_000
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads
    assert {"processor", "threads", "torch", "pyro-ppl", "load"} <= printed["machine"].keys()
    one = printed["workloads"]["tiny"]
    assert one["ratios"]["stock SVI"] == [1.0, 1.0, 1.0]
    ran = [name for name, times in one["times"].items() if "skipped" not in times]
    assert {"stock SVI", "JitTrace_ELBO", "torch by hand", "FastSVI", "products", "update"} <= set(ran)
    assert not has_compiler or "torch.compile by hand" in ran
    for name in ran:
        assert len(one["times"][name]["wall"]) == 2 and all(0 < t < math.inf for t in one["times"][name]["wall"])


def test_mistakes_are_one_line(tmp_path, capsys):
    for words, message in (
        (["--workloads", "W9"], "unknown workload 'W9': choose from W1, "),
        (["--repeats", "0"], "--repeats: expected a number >= 1, found 0"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["bench", *words])
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_optimisers_of_pyro_become_one():
    weight = torch.nn.Parameter(torch.zeros(3))
    assert type(torch_optimizer(pyro.optim.Adam({"lr": 0.1}))([weight])).__name__ == "Adam"
