"""The epochs that are compared see the same pictures, in whole, and the picture of the example is torchvision's."""

import math

import pytest
import torch

from pyro_vae import bench_epoch
from pyro_vae.bench_epoch import EXAMPLE, measure_epoch
from pyro_vae.bench_epoch import bench_epoch as run


def test_a_picture_becomes_what_torchvision_makes_of_it():
    x = torch.randint(0, 256, (3, 28, 20), dtype=torch.uint8)
    picture = bench_epoch._Pictures(x)[2]
    assert picture.dtype == torch.float32 and picture.shape == (1, 28, 20)
    torch.testing.assert_close(picture[0], x[2] / 255)


def test_each_way_sees_all_pictures_in_each_epoch(monkeypatch):
    seen = []
    step = bench_epoch.SVI.step
    monkeypatch.setattr(bench_epoch.SVI, "step", lambda self, x: (seen.append(len(x)), step(self, x))[1])
    state = torch.get_rng_state()
    found = measure_epoch(repeats=2, num_examples=600)
    torch.set_rng_state(state)
    assert seen == [256, 256, 88] * 2 * 3  # two ways of stock SVI, one epoch that is not timed and two that are
    assert list(found) == [EXAMPLE, "stock SVI, tensors", "floor", "fit, eager", "fit"]
    for times in found.values():
        assert len(times["wall"]) == len(times["cpu"]) == 2
        assert all(0 < t < math.inf for t in times["wall"])


def test_the_table_has_the_ratios(monkeypatch):
    times = {EXAMPLE: [4.0, 8.0, 4.0], "fit": [1.0, 2.0, 2.0]}
    found = {name: {"wall": values, "cpu": [v / 2 for v in values]} for name, values in times.items()}
    monkeypatch.setattr(bench_epoch, "measure_epoch", lambda repeats: found)
    result, text = run(3)
    assert result["ratios"]["fit"] == (3.0, 4.0, 4.0) and result["ratios_by_cpu_time"]["fit"][1] == 4.0
    assert text.splitlines()[-1].split() == ["fit", "2", "4.00", "(3.00", "to", "4.00)", "4.00"]
    assert result["ratios"][EXAMPLE] == pytest.approx((1, 1, 1))
