"""How steps are taken: decided by their number, kept by a resumed run, told; reduced precision.

How workers share captured steps stands in test_parallel.py.
"""

import copy

import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_vae import (
    ELBO,
    VAE,
    Bernoulli,
    Decoder,
    DiagonalNormal,
    Mlp,
    StandardNormal,
    datasets,
    fit,
    steps,
    training,
)
from pyro_vae.capture import has_compiler
from pyro_vae.checkpoints import read_bytes, read_settings
from pyro_vae.compiling import CompiledStep
from pyro_vae.optimizers import Adam
from pyro_vae.precision import TOLERANCES, check_precision, rounded, tensor_cores
from pyro_vae.steps import how_to_step, memory_in_words
from pyro_vae.streaming import place

E, D, N, B = 7, 2, 29, 8
CPU = torch.device("cpu")


def make_vae():
    return VAE(StandardNormal(D), Decoder(Mlp(D, 13, E), Bernoulli()), DiagonalNormal(Mlp(E, 11, 2 * D)))


def make_bits():
    return (torch.rand(N, E) < 0.4).to(torch.get_default_dtype())


def equal(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------- the decision


def test_the_numbers_of_steps_decide(monkeypatch):
    few, many = steps.WORTH_CAPTURING - 1, steps.WORTH_COMPILING
    monkeypatch.setenv("CXX", "some compiler")
    cases = (1, 1), (1, few), (1, few + 1), (many - 1, 10**6), (many, 1), (many, 10**6)
    assert [how_to_step(*case, CPU) for case in cases] == [False, False, "replay", "replay", True, True]
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert how_to_step(many, 10, CPU) == "replay"


def test_a_prolonged_run_is_the_longer_one(tmp_path, monkeypatch):
    """More epochs are worth capturing, which changes no bit; compiled and not are two runs."""
    monkeypatch.setattr(steps, "WORTH_CAPTURING", 3 * 4)
    x, runs = make_bits(), []
    for first in (2, 3, 5):  # eager, replayed, in one go
        torch.manual_seed(2)
        vae, folder = make_vae(), tmp_path / str(first)
        fit(vae, x, epochs=first, batch_size=B, folder=folder)
        fit(vae, x, epochs=5, batch_size=B, folder=folder, resume=True)
        runs.append(vae)
    assert equal(runs[0], runs[2]) and equal(runs[1], runs[2])
    state = folder / "state" / "latest.safetensors"
    assert read_settings(state, read_bytes(state))["compiled"] is False
    with pytest.raises(ValueError, match="was trained with compiled=False, found compiled=True"):
        fit(vae, x, epochs=6, batch_size=B, folder=folder, resume=True, compiled=True)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_a_compiled_run_stays_compiled(uncompiled, tmp_path, monkeypatch):
    x, vae = make_bits(), make_vae()
    fit(vae, x, epochs=1, batch_size=B, folder=tmp_path, compiled=True)
    seen = []
    monkeypatch.setattr("pyro_vae.training.Steps", lambda *args: seen.append(args[9]) or steps.Steps(*args))
    fit(vae, x, epochs=2, batch_size=B, folder=tmp_path, resume=True)
    assert seen == [True]


def test_replayed_steps_are_eager_steps_to_the_last_bit():
    x, vae = (torch.rand(N, E) * 255).byte(), make_vae()
    twin = copy.deepcopy(vae)
    for model, how in ((vae, False), (twin, "replay")):
        torch.manual_seed(1)
        fit(model, x, epochs=3, batch_size=B, prepare=datasets.binarize, compiled=how)
    assert equal(vae, twin)


@pytest.mark.parametrize("captured", ["replay", True])
def test_a_number_that_on_epoch_changes_is_noticed(uncompiled, captured):
    """A captured program holds Python's numbers; the steps go on eagerly, and not one is wrong."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.vae = 1.0, make_vae()

        def model(self, x):
            with poutine.scale(scale=self.weight):
                return self.vae.model(x)

        def guide(self, x):
            with poutine.scale(scale=self.weight):
                return self.vae.guide(x)

    x, first, found = make_bits(), Weighted(), []
    for how in (False, captured):
        twin = copy.deepcopy(first)

        def halve(row, twin=twin):
            twin.weight /= 1 + (row["epoch"] == 2)

        torch.manual_seed(2)
        run = lambda twin=twin, how=how, halve=halve: fit(  # noqa: E731
            twin, x, epochs=4, batch_size=B, lr=0.01, on_epoch=halve, compiled=how
        )
        if how:
            with pytest.warns(RuntimeWarning, match="differs from eager Pyro by .* by now"):
                run()
        else:
            run()
        found.append(twin)
    for p, q in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0 if captured == "replay" else 1e-5)


def test_what_is_told():
    told = []
    fit(make_vae(), make_bits(), epochs=2, batch_size=B, note=told.append)
    assert told[0] == "steps      eager: 8 of them are not worth capturing"
    num = sum(p.numel() for p in make_vae().parameters())
    assert told[1].startswith(f"memory     rows 812 bytes, parameters {4 * num / 1000:.1f} kB, optimiser ")
    assert len(told) == 2
    fit(make_vae(), make_bits(), epochs=2, batch_size=B, note=told.append, compiled="replay")
    assert told[2].startswith("steps      replayed, ") and len(told) == 4


def test_memory():
    parameters = [nn.Parameter(torch.zeros(250))]
    optimizer = Adam(parameters)
    data = place(torch.zeros(5, 7, dtype=torch.uint8), CPU)
    assert memory_in_words(data, parameters, optimizer) == "rows 35 bytes, parameters 1.0 kB, optimiser 0 bytes"
    parameters[0].grad = torch.ones(250)
    optimizer.step()
    assert memory_in_words(data, parameters, optimizer).endswith("optimiser 2.0 kB")


# ------------------------------------------------------------------------------------------------- precision


def test_bf16_rounds_products_and_nothing_else():
    layer, x = nn.Linear(E, 3), torch.randn(5, E)
    expected = torch.nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()
    found = rounded(layer, "bf16")(x)
    assert torch.equal(found, expected) and found.dtype == torch.float32 and not torch.equal(found, layer(x))
    found.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(rounded(torch.exp, "bf16")(x), x.exp()) and rounded(layer, "float32") is layer
    assert rounded(nn.Conv2d(1, 2, 3), "bf16")(torch.rand(5, 1, E, E)).dtype == torch.float32


def test_bf16_changes_the_bound_by_little_and_only_in_training():
    """Relative to its size; and what is held out is computed in float32."""
    x, vae = make_bits(), make_vae()
    torch.manual_seed(3)
    exact = training._gradients_of(ELBO(), vae)(x)[0]
    torch.manual_seed(3)
    shorter = rounded(training._gradients_of(ELBO(), vae), "bf16")(x)[0]
    assert 0 < abs(shorter / exact - 1) < 1e-2
    twins = [copy.deepcopy(vae) for _ in range(3)]
    for twin, precision, how in zip(twins, ("float32", "bf16", "bf16"), (False, False, "replay"), strict=True):
        torch.manual_seed(4)
        fit(twin, x, epochs=2, batch_size=B, precision=precision, compiled=how)
    assert equal(twins[1], twins[2]) and not equal(twins[0], twins[1])


def test_precision_is_part_of_a_run(tmp_path):
    vae, x = make_vae(), make_bits()
    fit(vae, x, epochs=1, folder=tmp_path, precision="bf16")
    with pytest.raises(ValueError, match="trained with precision='bf16', found precision='float32'"):
        fit(vae, x, epochs=2, folder=tmp_path, resume=True)


def test_precisions_that_are_refused():
    with pytest.raises(ValueError, match="expected precision float32, tf32 or bf16, found 'half'"):
        fit(make_vae(), make_bits(), epochs=1, precision="half")
    with pytest.raises(ValueError, match="expected a model on a GPU with precision=tf32, found it on cpu"):
        fit(make_vae(), make_bits(), epochs=1, precision="tf32")
    with pytest.raises(ValueError, match=r"expected float32 parameters with precision=bf16, found torch\.float64"):
        check_precision("bf16", CPU, torch.float64)


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_torchs_settings_are_put_back(precision):
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = settings()
    with tensor_cores(precision, torch.device("cuda")):  # only settings: no device is needed
        assert settings() == (("high", True) if precision == "tf32" else ("highest", False))
    assert settings() == before
    with tensor_cores(precision, CPU):
        assert settings() == before


def test_the_comparison_allows_for_rounding():
    vae = make_vae()
    gradients = rounded(training._gradients_of(ELBO(), vae), "bf16")
    step = CompiledStep(gradients, list(vae.parameters()), vae, warm=0, backend="replay", tolerance=TOLERANCES["bf16"])
    step(make_bits())
    assert step.obstacle is None and "replayed" in step.explain()
