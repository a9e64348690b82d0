"""The benchmark compares the same model, counts what it says it counts, and runs in seconds with --quick."""

import json
import math
from itertools import pairwise

import pyro
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from pyro_vae import ELBO, IWAE, bench
from pyro_vae.capture import has_compiler
from pyro_vae.cli import main
from pyro_vae.optimizers import torch_optimizer
from pyro_vae.workloads import WORKLOADS, HandWritten, make_vae


@pytest.mark.parametrize("name", ["tiny", "iwae", "Wd"])
def test_the_hand_written_model_is_the_same_model(float64, name):
    """Same weights: the losses of both agree in the mean over the noise."""
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    vae = make_vae(workload, "vae").double()
    hand = HandWritten(workload).double()
    hand.encoder.load_state_dict(vae.encoder.net.state_dict())
    hand.decoder.load_state_dict(vae.decoder.net.state_dict())
    x = workload.draw(torch.device("cpu")).double()
    k = workload.num_particles
    objective = ELBO() if k == 1 else IWAE(num_particles=k)
    with torch.no_grad():
        ours = torch.stack([objective.loss(vae.model, vae.guide, x) for _ in range(30)])
        theirs = torch.stack([hand(x) for _ in range(30)])
    error = ((ours.var() + theirs.var()) / 30).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert error < 0.01 * ours.mean().abs()


@pytest.mark.parametrize("name", ["tiny", "Wc", "iwae"])
def test_the_floor_is_the_products_of_all_layers(name):
    """Forward, weights' gradients, and inputs' gradients but for the first layer: counted from the sizes."""
    workload = WORKLOADS[name]
    widths, d, b = [*workload.event_shape, *workload.networks.hidden], workload.latent_dim, workload.batch_size
    encoder, decoder = [*widths, 2 * d], [d, *widths[::-1]]
    rows = [(encoder, b), (decoder, b * workload.num_particles)]
    layers = [(i, o, n) for sizes, n in rows for i, o in pairwise(sizes)]
    expected = sum(2 * i * o * n * (2 + (place > 0)) for place, (i, o, n) in enumerate(layers))
    assert bench.num_operations(workload) == expected
    run = bench.products(workload, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        run(3)
    assert counter.get_total_flops() == 3 * expected


def test_convolutions_are_counted_too():
    """32 and 64 channels of 4 x 4 kernels on 14 x 14 and 7 x 7 pixels, twice, the linear layers between them."""
    workload = WORKLOADS["Wd"]
    first, second = 14 * 14 * 32 * 16, 7 * 7 * 64 * 32 * 16  # multiplications of one convolution, one example
    linear = 3136 * 32 + 16 * 3136
    forward = 2 * 128 * (2 * first + 2 * second + linear)
    assert bench.num_operations(workload) == 3 * forward - 2 * 128 * first


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
    bars = [bar for bars in ax.containers for bar in getattr(bars, "patches", [])]
    assert [bar.get_y() for bar in bars] == [1, 1] and [bar.get_y() + bar.get_height() for bar in bars] == [2.0, 12.0]
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [2.5, 50.0]
    assert ax.get_yscale() == "log" and [t.get_text().split("\n")[:2] for t in ax.get_xticklabels()] == [
        ["W1", "784-400-z50"],
        ["tiny", "7-8-z2"],
    ]


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
    assert not has_compiler() or "torch.compile by hand" in ran
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
