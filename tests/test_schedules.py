"""Schedules: values by hand, steps that are counted once, and nothing that is compiled anew."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_vae import (
    VAE,
    Bernoulli,
    Beta,
    BetaTC,
    Cosine,
    Cyclical,
    Decoder,
    DiagonalNormal,
    FastSVI,
    Linear,
    Mlp,
    Objective,
    StandardNormal,
    fit,
)
from pyro_vae.arguments import dump, train_parser
from pyro_vae.capture import has_compiler
from pyro_vae.cli import train
from pyro_vae.compiling import CompiledStep
from pyro_vae.configuration import make
from pyro_vae.parts import class_names, import_class
from pyro_vae.schedules import Schedule, check_weight
from pyro_vae.training import _gradients_of

B, D, E = 5, 2, 7
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler, and there is none")


def make_vae():
    torch.manual_seed(3)
    return VAE(StandardNormal(D), Decoder(Mlp(D, 6, E), Bernoulli()), DiagonalNormal(Mlp(E, 6, 2 * D)))


def binary(rows=B):
    return (torch.rand(rows, E, generator=torch.Generator().manual_seed(2)) < 0.5).float()


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Linear(steps=10), {0: 0.0, 3: 0.3, 10: 1.0, 99: 1.0}),
        (Linear(steps=4, start=2.0, stop=1.0), {0: 2.0, 1: 1.75, 4: 1.0, 5: 1.0}),
        (Cosine(steps=8), {0: 0.0, 2: (1 - math.sqrt(0.5)) / 2, 4: 0.5, 8: 1.0, 9: 1.0}),
        (Cosine(steps=8, start=1.0, stop=3.0), {0: 1.0, 4: 2.0, 8: 3.0}),
        (Cyclical(steps=10, cycles=2, rise=0.5), {0: 0.0, 1: 0.2, 5: 1.0, 9: 1.0, 10: 0.0, 11: 0.2, 19: 1.0, 20: 1.0}),
        (Cyclical(steps=10, cycles=1, rise=1.0, start=1.0, stop=3.0), {0: 1.0, 5: 2.0, 9: 2.8, 10: 3.0, 11: 3.0}),
    ],
    ids=str,
)
def test_values(schedule, values):
    assert isinstance(schedule, Schedule)
    for step, value in values.items():
        found = schedule(torch.tensor(step))
        assert found.shape == () and found.item() == pytest.approx(value, abs=1e-6), step
    assert eval(repr(schedule)) == schedule and hash(schedule) == hash(copy.deepcopy(schedule))
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize("cls", [Linear, Cosine, Cyclical])
@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_refuses_wrong_steps(cls, steps):
    with pytest.raises(ValueError, match="expected steps to be an integer >= 1, found"):
        cls(steps=steps)


def test_refusals():
    with pytest.raises(ValueError, match="expected cycles to be an integer >= 1"):
        Cyclical(cycles=0)
    for rise in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"expected rise in \(0, 1\]"):
            Cyclical(rise=rise)
    check_weight("beta", Linear())
    check_weight("beta", 0)
    with pytest.raises(TypeError, match="expected beta to be a number or a schedule"):
        check_weight("beta", "linear")
    for weight in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected beta >= 0"):
            check_weight("beta", weight)


# ---------------------------------------------------------------------------------------------- who counts the steps


def at_seed(objective, vae, x):
    torch.manual_seed(0)
    with torch.no_grad():
        return objective.bound(vae.model, vae.guide, x)


def test_the_objective_uses_the_weight_of_the_step(float64):
    vae, x = make_vae().double(), binary().double()
    objective = Beta(beta=Linear(steps=10, stop=2.0))
    for step in (0, 3, 10, 40):
        objective.at_step(step)
        beta = min(step, 10) / 5
        torch.testing.assert_close(at_seed(objective, vae, x), at_seed(Beta(beta=beta), vae, x))
    assert not objective.is_bound and not objective.is_tight


def test_only_a_training_step_counts():
    vae, x = make_vae(), binary()
    objective = Beta(beta=Linear(steps=10))
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.01}), loss=objective)
    for step in range(3):
        assert objective.step.item() == step
        svi.evaluate_loss(x)
        objective.bound(vae.model, vae.guide, x)
        objective.differentiable_loss(vae.model, vae.guide, x)
        assert objective.step.item() == step
        svi.step(x)
    assert objective.step.item() == 3
    objective.advance()
    assert objective.step.item() == 4


def test_the_count_is_no_part_of_the_value():
    objective, twin = Beta(beta=Linear()), Beta(beta=Linear())
    objective.at_step(7)
    assert objective == twin and hash(objective) == hash(twin) and repr(objective) == repr(twin)
    assert copy.deepcopy(objective).step.item() == 7 and twin.step.item() == 0


@pytest.mark.parametrize("backend", ["replay", pytest.param("inductor", marks=needs_compiler)])
def test_fast_svi_follows_the_schedule_without_capturing_anew(float64, backend):
    x, results = binary().double(), []
    for kind, settings in ((SVI, {}), (FastSVI, {"backend": backend})):
        pyro.clear_param_store()
        vae, objective = make_vae().double(), Beta(beta=Cyclical(steps=4, cycles=2))
        torch.manual_seed(1)
        svi = kind(vae.model, vae.guide, Adam({"lr": 0.01}), loss=objective, **settings)
        results.append([svi.step(x) for _ in range(10)])
        assert objective.step.item() == 10
    assert results[1] == pytest.approx(results[0], abs=1e-8)
    explanation = svi.explain()
    assert len(explanation.splitlines()) == 1 and "eager, since" not in explanation


def test_a_captured_step_sees_the_counter_of_fit(float64):
    vae, x, objective = make_vae().double(), binary().double(), Beta(beta=Linear(steps=10))
    parameters = list(vae.parameters())
    step = CompiledStep(_gradients_of(objective, vae), parameters, vae, warm=0, backend="replay")
    for count in (0, 4, 10):
        objective.at_step(count)
        torch.manual_seed(5)
        found = step(x)[0]
        torch.manual_seed(5)
        expected = -Beta(beta=count / 10).loss(vae.model, vae.guide, x)
        assert found.item() == pytest.approx(expected.item(), abs=1e-9)
    assert len(step._graphs) == 1


def test_a_resumed_run_goes_on_at_its_step(tmp_path):
    x = binary(20)

    def run(folder, *epochs):
        torch.manual_seed(0)
        vae, history = make_vae(), None
        for i, last in enumerate(epochs):
            objective = Beta(beta=Linear(steps=12))
            history = fit(vae, x, objective=objective, epochs=last, batch_size=8, folder=folder, resume=i > 0)
        return vae, history

    (straight, history), (resumed, again) = run(tmp_path / "a", 4), run(tmp_path / "b", 2, 4)
    for ours, theirs in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert history["objective"] == again["objective"]
    weights = [(row["log_px"] - row["objective"]) / row["kl"] for row in history.rows]
    assert weights[0] < weights[1] < weights[2] < weights[3] < 1  # 3 steps an epoch: 0..11 of 12
    assert weights[3] == pytest.approx(10 / 12, abs=0.05)
    assert all(row["elbo"] == pytest.approx(row["log_px"] - row["kl"], abs=1e-4) for row in history.rows)


def test_from_the_command_line():
    words = ["--objective", "Beta", "--objective.beta", "Cyclical", "--objective.beta.steps", "30"]
    words += ["--objective.beta.rise", "0.8"]
    config = train_parser(train, words).parse(words)
    assert make(config, "objective") == Beta(beta=Cyclical(steps=30, rise=0.8))
    again = train_parser(train, ["--objective", "Beta"]).parse_string(dump(train, config))
    assert make(again, "objective") == make(config, "objective")
    words = ["--objective", "BetaTC", "--objective.estimator", "mws", "--objective.beta", "3"]
    config = train_parser(train, words).parse(words)
    assert make(config, "objective", num_examples=9) == BetaTC(beta=3, estimator="mws", num_examples=9)


def test_every_objective_has_its_word():
    for name in class_names("objective"):
        if name.endswith("ELBO") and name != "ELBO":
            continue  # Pyro's
        cls = import_class(name, "objective")
        if issubclass(cls, Objective):
            words = ["--objective", name]
            assert make(train_parser(train, words).parse(words), "objective") == cls()
    assert {"ELBO", "DReG", "BetaTC", "FreeBits", "Surgery", "MIWAE"} <= set(class_names("objective"))


def test_fit_counts_across_epochs():
    objective = Beta(beta=Linear(steps=5))
    fit(make_vae(), binary(20), objective=objective, epochs=2, batch_size=8)
    assert objective.step.item() == 6  # 2 x 3 steps were taken
