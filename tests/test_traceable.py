"""Pyro's sums over values and assigned names, in a form that can be captured: equal, and gone afterwards."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate, traceenum_elbo
from pyro.infer import util as infer_util
from test_discrete import ENUMERABLE, binary, make
from torch import nn

from pyro_vae import FastSVI, fit
from pyro_vae.traceable import PlainDraws, assigned_in_place, dense_enumeration

B, C = 5, 4


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, retain_graph=True)


# Sums over values


@pytest.mark.parametrize("infinite", [False, True])
def test_values_without_probability_count_nothing(float64, infinite):
    """The guide has classes of probability exactly 0, their cost perhaps infinite: Pyro leaves them out; so do we."""
    logits = torch.tensor([[0.3, -0.2, 0.1, -800.0], [900.0, 0.0, 0.0, 0.0]]).requires_grad_()
    locs = torch.randn(C).requires_grad_()
    x = torch.randn(2)

    def model():
        p = torch.tensor([0.2, 0.3, 0.5, 0.0]) if infinite else torch.ones(C) / C
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Categorical(logits=p.log()))
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    def guide():
        pyro.module("net", torch.nn.ParameterList([logits, locs]))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Categorical(logits=logits))

    objective, guide = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(guide)
    losses = [objective.differentiable_loss(model, guide)]
    with dense_enumeration():
        losses.append(objective.differentiable_loss(model, guide))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    assert losses[0].isfinite()
    for ours, theirs in zip(*(gradients(loss, [logits, locs]) for loss in losses), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert theirs.isfinite().all() and theirs.any()


def test_a_scale_may_be_a_tensor(float64):
    """Annealed sums over values: the scale is an argument, and each step has another."""

    def model(x, scale):
        weights = pyro.param("weights", torch.ones(C) / C, dist.constraints.simplex)
        locs = pyro.param("locs", torch.randn(C))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    x, found = torch.randn(B), []
    for svi_class, settings in ((SVI, {}), (FastSVI, {"backend": "replay"})):
        pyro.clear_param_store()
        torch.manual_seed(2)
        objective = TraceEnum_ELBO(max_plate_nesting=1)
        svi = svi_class(model, lambda x, scale: None, pyro.optim.Adam({"lr": 0.1}), objective, **settings)
        found.append([svi.step(x, torch.tensor(0.1 * step)) for step in range(1, 8)])
    assert "replayed" in svi.explain()
    assert found[1] == pytest.approx(found[0], abs=1e-10) and len({*found[0]}) == 7


@pytest.mark.parametrize("family", ENUMERABLE)
def test_fit_sums_over_values_captured(float64, family):
    histories, parameters = [], []
    for compiled in (False, "replay"):
        torch.manual_seed(0)
        vae, x = make(family), binary(23)  # the last batch is smaller
        histories.append(fit(vae, x, objective=TraceEnum_ELBO(), epochs=3, batch_size=10, lr=0.01, compiled=compiled))
        parameters.append(list(vae.parameters()))
    for name in ("objective", "elbo", "log_px", "kl"):
        assert histories[1][name] == pytest.approx(histories[0][name], abs=1e-9)
    for p, q in zip(*parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def a_coin_and_a_draw(enumerate_):
    """A guide with one site summed out, in one pass or in a loop (which Pyro does outside plates), beside one drawn."""

    def model(x):
        y = pyro.sample("y", dist.Bernoulli(0.4))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + y, 1.0), obs=x[0])

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.1))
        y = pyro.sample("y", dist.Bernoulli(pyro.param("p", torch.tensor(0.3))), infer={"enumerate": enumerate_})
        pyro.sample("z", dist.Normal(loc - y, 1.0))

    return model, guide


@pytest.mark.parametrize("enumerate_", ["parallel", "sequential"])
def test_a_sum_beside_a_draw(float64, enumerate_):
    found, x = [], torch.randn(B)
    for svi_class, settings in ((SVI, {}), (FastSVI, {"backend": "replay"})):
        pyro.clear_param_store()
        torch.manual_seed(2)
        objective = TraceEnum_ELBO(max_plate_nesting=0)
        svi = svi_class(*a_coin_and_a_draw(enumerate_), pyro.optim.Adam({"lr": 0.01}), objective, **settings)
        found.append([svi.step(x) for _ in range(6)])
    assert "replayed" in svi.explain(), svi.explain()
    assert found[1] == pytest.approx(found[0], abs=1e-10)
    assert len(set(found[0])) == 6


def test_pyro_is_as_it_was():
    parts = (lambda: infer_util.Dice.compute_expectation, lambda: infer_util._fulldot)
    parts += (lambda: traceenum_elbo._get_common_scale,)
    before = [part() for part in parts]
    with pytest.raises(RuntimeError, match="on purpose"), dense_enumeration():
        assert all(part() is not b for part, b in zip(parts, before, strict=True))
        raise RuntimeError("on purpose")
    assert [part() for part in parts] == before
    assert not bool(torch.zeros(2).bool().all())


# Assigned names


def averaged(num_rows=B, shape_changes=False):
    """Assigns a running mean, and reads it before and after."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc, store = pyro.param("loc", torch.zeros(num_rows)), pyro.get_param_store()
        mean = pyro.param("mean", torch.tensor(1.0), dist.constraints.positive).detach()
        store["mean"] = 0.9 * mean + 0.1 * x.square().mean()
        after = store["mean"].detach()
        if shape_changes:
            store["seen"] = torch.zeros(len(store["seen"]) + 1 if "seen" in store else 1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[: len(x)] * mean, after))

    return model, guide


def test_a_running_mean_is_carried_from_step_to_step(float64):
    """Two batch sizes in turn: two graphs and their eager first steps share one running mean."""
    found = []
    for svi_class, settings in ((SVI, {}), (FastSVI, {"backend": "replay"})):
        pyro.clear_param_store()
        torch.manual_seed(2)
        x = 2 * torch.randn(12, B)
        svi = svi_class(*averaged(), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **settings)
        losses = [svi.step(row if step % 3 else row[:3]) for step, row in enumerate(x)]
        found.append((losses, pyro.param("mean").item()))
    assert svi.explain().count("replayed") == 2, svi.explain()
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-10)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-12) and abs(found[0][1] - 1) > 0.01


def test_a_cleared_store_is_filled_anew(float64):
    svi = FastSVI(*averaged(), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend="replay")
    x = torch.randn(B)
    for _ in range(4):
        svi.step(x)
    pyro.clear_param_store()
    values = []
    for _ in range(4):
        svi.step(x)
        values.append(pyro.param("mean").item())
    expected, mean = [], 1.0
    for _ in range(4):
        mean = 0.9 * mean + 0.1 * x.square().mean().item()
        expected.append(mean)
    assert values == pytest.approx(expected, rel=1e-12)


def test_an_entry_that_grows_stays_eager(float64):
    svi = FastSVI(*averaged(shape_changes=True), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend="replay")
    with pytest.warns(RuntimeWarning, match=r"gives 'seen' in Pyro's parameter store another tensor"):
        for _ in range(3):
            svi.step(torch.randn(B))
    assert len(pyro.param("seen")) == 3


def test_a_parameter_with_a_gradient_is_left_as_assigned():
    pyro.param("loc", torch.tensor(1.0)).square().backward()
    old, seen = pyro.get_param_store()["loc"], {}
    with assigned_in_place(seen):
        pyro.get_param_store()["loc"] = torch.tensor(3.0)
    assert old.item() == 1.0 and not seen and pyro.param("loc").item() == 3.0


# Draws


@pytest.mark.parametrize("shape", [(1,), (7,), (1000,), (3, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_coins_and_the_same_noise_after_them(shape, dtype):
    found = []
    p = torch.rand(shape, dtype=dtype).expand(2, *shape)
    for mode in (None, PlainDraws()):
        torch.manual_seed(1)
        if mode is None:
            found.append((torch.bernoulli(p), torch.rand(3)))
        else:
            with mode:
                found.append((torch.bernoulli(p), torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_hot_vectors_are_the_same():
    index = torch.randint(C, (2, B))
    with PlainDraws():
        ours = nn.functional.one_hot(index, C)
    assert torch.equal(ours, nn.functional.one_hot(index, C)) and ours.dtype == torch.int64


@pytest.mark.parametrize("family", [dist.OneHotCategorical, dist.OneHotCategoricalStraightThrough])
def test_one_hot_latents_of_pyro_are_captured(float64, family):
    x, found = torch.randn(B), []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", family(logits=torch.zeros(C)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(B, C))
        with pyro.plate("data", len(x)):
            pyro.sample("z", family(logits=logits))

    for svi_class, settings in ((SVI, {}), (FastSVI, {"backend": "replay"})):
        pyro.clear_param_store()
        torch.manual_seed(2)
        svi = svi_class(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceGraph_ELBO(), **settings)
        found.append([svi.step(x) for _ in range(8)])
    assert "replayed" in svi.explain(), svi.explain()
    assert found[1] == pytest.approx(found[0], abs=1e-10) and len(set(found[0])) > 4
