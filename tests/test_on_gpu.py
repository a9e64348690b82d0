"""What only a GPU can show: recorded steps are eager ones, resumed and streamed runs the same, and failures mend.

``PYRO_VAE_DEVICE=cpu`` runs these lines on a processor, where nothing is recorded and everything is equal anyway.
"""

import copy
import os
import warnings

import pyro
import pyro.infer
import pytest
import torch
from test_captured_members import objectives, small_objective
from test_cross_product import D, E
from test_devices import combinations, vae_of

from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    Bernoulli,
    Beta,
    Decoder,
    DiagonalNormal,
    FastSVI,
    Mlp,
    StandardNormal,
    datasets,
    estimates,
    fit,
    schedules,
    steps,
    training,
)
from pyro_vae.cuda_graphs import Recorded

DEVICE = torch.device(os.environ.get("PYRO_VAE_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
N, B = 150, 8  # 18 whole batches, sixteen of them together, and one of 6 examples

pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device")


def a_vae():
    torch.manual_seed(5)
    return VAE(StandardNormal(D), Decoder(Mlp(D, 13, E), Bernoulli()), DiagonalNormal(Mlp(E, 11, 2 * D))).to(DEVICE)


def some_bytes(device=DEVICE):
    return torch.randint(256, (N, E), generator=torch.Generator().manual_seed(3), dtype=torch.uint8).to(device)


def train(x, compiled, epochs=4, **settings):
    vae = a_vae()
    torch.manual_seed(7)
    settings = {"batch_size": B, "lr": 0.01, "prepare": datasets.binarize, **settings}
    return vae, fit(vae, x, epochs=epochs, compiled=compiled, **settings)


def assert_close(found, expected, **tolerance):
    for (name, p), q in zip(expected[0].named_parameters(), found[0].parameters(), strict=True):
        torch.testing.assert_close(q, p, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    assert found[1]["elbo"] == pytest.approx(expected[1]["elbo"], rel=1e-4)


@pytest.fixture
def watched(monkeypatch):
    """The ``Steps`` that ``fit`` makes."""
    made = []

    class Watched(steps.Steps):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(training, "Steps", Watched)
    return made


@pytest.mark.parametrize("compiled", ["replay", True])
@pytest.mark.parametrize(
    "objective", [ELBO(), IWAE(5), Beta(beta=schedules.Linear(40))], ids=["ELBO", "IWAE", "warm-up"]
)
def test_recorded_steps_are_eager_ones(watched, compiled, objective):
    expected = train(some_bytes(), False, objective=copy.deepcopy(objective))
    found = train(some_bytes(), compiled, objective=copy.deepcopy(objective))
    assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if ON_GPU:
        assert watched[-1].recorded.failure is None and watched[-1].recorded.num_recorded == 3


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole = train(some_bytes(), "replay", folder=tmp_path / "whole")
    train(some_bytes(), "replay", epochs=2, folder=tmp_path / "parts")
    parts = train(some_bytes(), "replay", folder=tmp_path / "parts", resume=True)
    for p, q in zip(whole[0].parameters(), parts[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("compiled", [False, "replay"])
def test_streamed_rows_give_the_same(compiled):
    expected = train(some_bytes("cpu"), compiled)
    found = train(some_bytes("cpu"), compiled, resident=False)
    assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not ON_GPU, reason="records")
def test_a_recording_that_breaks_leaves_streams_and_noise_as_they_were():
    total = torch.zeros((), device=DEVICE)

    def function(x):
        total.add_(x.sum() + torch.rand((), device=DEVICE))
        return x * float(total)  # waits for the GPU, which a recording cannot

    recorded, stream = Recorded(function, DEVICE), torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="not recorded in a CUDA graph"):
        for _ in range(3):
            recorded(torch.ones(3, device=DEVICE))
    assert recorded.failure is not None and torch.cuda.current_stream() == stream
    assert 9 < float(total) < 12 and torch.rand(3, device=DEVICE).std() > 0
    works = Recorded(lambda x: x + torch.rand_like(x), DEVICE)
    outs = [works(torch.zeros(5, device=DEVICE)).clone() for _ in range(4)]
    assert works.num_recorded == 1 and len({float(out.sum()) for out in outs}) == 4


@pytest.mark.parametrize("precision", ["tf32", "bf16"] if ON_GPU else ["bf16"])
def test_reduced_precision_learns_the_same(precision):
    expected = train(some_bytes(), "replay")[1]["elbo"][-1]
    assert train(some_bytes(), "replay", precision=precision)[1]["elbo"][-1] == pytest.approx(expected, rel=0.05)


def in_steps(svi_class, build, num=5):
    """Losses of some steps from one seed."""
    pyro.clear_param_store()
    torch.manual_seed(1)
    vae, objective, x = build()
    torch.manual_seed(3)
    svi = svi_class(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), objective, **SETTINGS[svi_class])
    return [svi.step(x) for _ in range(num)], svi


SETTINGS = {pyro.infer.SVI: {}, FastSVI: {"backend": "replay"}}


def assert_captured(build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, _ = in_steps(pyro.infer.SVI, build)
        found, svi = in_steps(FastSVI, build)
    assert "not recorded" not in svi.explain() and "eager, since" not in svi.explain(), svi.explain()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-3, equal_nan=True)
    return svi


def test_every_member():
    failures = {}
    for key in combinations():
        try:
            assert_captured(lambda key=key: vae_of(*key, DEVICE))
        except Exception as error:
            failures[key] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    assert not failures, failures


def test_every_objective():
    failures = {}
    for name in objectives():

        def build(name=name):
            vae, _, x = vae_of("DiagonalNormal", "StandardNormal", "Bernoulli", DEVICE)
            return vae, small_objective(objectives()[name]), x

        try:
            assert_captured(build)
        except Exception as error:
            failures[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    assert not failures, failures


def test_estimates_are_those_of_the_processor():
    vae, x = a_vae(), (some_bytes() > 127).float()
    there = estimates.log_evidence(vae, x, 2000)
    compiled = estimates.log_evidence(vae, x, 2000, compiled=True)
    here = estimates.log_evidence(copy.deepcopy(vae).cpu(), x.cpu(), 2000)
    assert there.mean == pytest.approx(here.mean, abs=0.02) and compiled.mean == pytest.approx(there.mean, abs=1e-3)
