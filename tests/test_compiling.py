"""The captured step is eager Pyro's step: same noise, same losses, same parameters; and what cannot be, stays eager.

Most cases replay the captured graph operation by operation, which is exact and fast to build; two go through inductor.
"""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.ops.provenance import track_provenance
from torch import nn

from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    Bernoulli,
    Decoder,
    DiagonalNormal,
    FastSVI,
    Mlp,
    OverBatch,
    StandardNormal,
    datasets,
    fit,
)
from pyro_vae.capture import has_compiler
from pyro_vae.compiling import CompiledStep

B, D, E = 5, 2, 7
STEPS = 6
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="inductor needs a C++ compiler, and there is none")


def make_vae(prior=None, likelihood=None, family=DiagonalNormal):
    likelihood = likelihood or Bernoulli()
    encoder = family(Mlp(E, 11, family.num_outputs(D)))
    decoder = Decoder(Mlp(D, 13, likelihood.num_outputs * E), likelihood)
    return VAE(prior(encoder) if prior else StandardNormal(D), decoder, encoder).to(torch.get_default_dtype())


def run(svi_class, program, objective, x, optim=None, **settings):
    """Losses and final parameters of a few steps from one seed."""
    pyro.clear_param_store()
    model, guide = program()
    torch.manual_seed(3)
    optim = optim or pyro.optim.Adam({"lr": 0.01})
    svi = svi_class(model, guide, optim, objective, **settings)
    losses = [svi.step(x) for _ in range(STEPS)]
    parameters = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    return losses, parameters, svi


def assert_same_steps(program, objective, x, captured=True, atol=1e-10, **settings):
    expected, parameters, _ = run(SVI, program, objective, x)
    found, ours, svi = run(FastSVI, program, objective, x, **{"backend": "replay", **settings})
    assert found == pytest.approx(expected, rel=0, abs=max(atol, 1e-9))
    assert ours.keys() == parameters.keys() and len(ours) > 0
    for name in ours:
        torch.testing.assert_close(ours[name], parameters[name], rtol=0, atol=atol, msg=name)
    assert ("eager, since" in svi.explain()) != captured, svi.explain()
    return svi


def of(vae):
    def program():
        twin = copy.deepcopy(vae)
        return twin.model, twin.guide

    return program


def binary():
    return (torch.rand(B, E) < 0.4).to(torch.get_default_dtype())


# ------------------------------------------------------------------ particles; each member: test_captured_members.py


@pytest.mark.parametrize(
    "objective",
    [
        ELBO(),
        IWAE(3),
        IWAE(3, vectorize_particles=False),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ],
    ids=lambda o: f"{type(o).__name__}-{o.num_particles}-{getattr(o, 'vectorize_particles', '')}",
)
def test_objectives(float64, objective):
    assert_same_steps(of(make_vae()), objective, binary())


# ------------------------------------------------------------------------------------------------- any Pyro program


def scaled():
    def model(x):
        with pyro.plate("data", 40, subsample=torch.arange(B)), poutine.scale(scale=0.1):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.3)), 1.0))
            with poutine.mask(mask=x[:, 0] > 0):
                pyro.sample(
                    "x", dist.Normal(z, pyro.param("s", torch.tensor(2.0), dist.constraints.positive)), obs=x[:, 1]
                )

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.7))
        with pyro.plate("data", 40, subsample=torch.arange(B)), poutine.scale(scale=0.1):
            pyro.sample("z", dist.Normal(loc * x[:, 0], pyro.param("q", torch.tensor(0.5), dist.constraints.positive)))

    return model, guide


def two_layers():
    torch.manual_seed(8)
    down, up = Mlp(3, 2), Mlp(E, 4)

    def model(x):
        pyro.module("down", down)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(down(z2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1.sum(-1, keepdim=True).expand(*z1.shape[:-1], E), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        with pyro.plate("data", len(x)):
            loc, log_scale = up(x).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("z2", dist.Normal(z1.sum(-1, keepdim=True).expand(*z1.shape[:-1], 3), 1.0).to_event(1))

    return model, guide


def auto_guide():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x[:, 0])

    return model, AutoNormal(model)


def score_function():
    """A discrete latent site, whose gradient is Pyro's score-function estimator."""

    def model(x):
        p = pyro.param("p", torch.tensor(0.4), dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        logits = pyro.param("logits", torch.zeros(B))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    return model, guide


def dropout_and_batch_norm():
    torch.manual_seed(9)
    net = OverBatch(nn.Sequential(Mlp(E, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2 * D)), 1)
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, E), Bernoulli()), DiagonalNormal(net))
    return vae.model, vae.guide


@pytest.mark.parametrize(
    ("program", "objective"),
    [
        (scaled, ELBO()),
        (scaled, IWAE(3)),
        (scaled, Trace_ELBO()),
        (two_layers, ELBO()),
        (auto_guide, Trace_ELBO()),
        (score_function, Trace_ELBO()),
        (score_function, TraceGraph_ELBO()),
        (dropout_and_batch_norm, ELBO()),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_programs(float64, program, objective):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*KL.*|.*kl_divergence.*")
        assert_same_steps(program, objective, binary())


def test_batch_norm_statistics_are_those_of_eager_pyro(float64):
    x = binary()
    kept = []
    for svi_class, settings in ((SVI, {}), (FastSVI, {"backend": "replay"})):
        pyro.clear_param_store()
        model, guide = dropout_and_batch_norm()
        torch.manual_seed(3)
        svi = svi_class(model, guide, pyro.optim.Adam({"lr": 0.01}), ELBO(), **settings)
        for _ in range(STEPS):
            svi.step(x)
        norm = model.__self__.encoder.net.net[1]
        kept.append((norm.running_mean.clone(), norm.num_batches_tracked.item()))
    torch.testing.assert_close(kept[0][0], kept[1][0], rtol=0, atol=1e-12)
    assert kept[0][1] == kept[1][1] == STEPS


def per_parameter(name):
    return {"lr": 0.03 if name.startswith("decoder") else 0.01, "weight_decay": 0.1}


OPTIMISERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)}),
    "Adam, amsgrad": lambda: pyro.optim.Adam({"lr": 0.01, "amsgrad": True}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.01}),
    "SGD": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "clip_norm": 0.2, "lrd": 0.9, "weight_decay": 0.1}),
    "ClippedAdam, centred": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "centered_variance": True}),
    "AdagradRMSProp": lambda: pyro.optim.AdagradRMSProp({"eta": 0.1}),
    "clip_norm": lambda: pyro.optim.SGD({"lr": 0.01}, {"clip_norm": 0.5}),
    "clip_value": lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_value": 0.01}),
    "clip by name": lambda: pyro.optim.SGD({"lr": 0.01}, lambda module, name: {"clip_norm": 0.1 * len(name)}),
    "by name": lambda: pyro.optim.Adam(per_parameter),
    "by name, SGD": lambda: pyro.optim.SGD(per_parameter),
}


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_optimisers(float64, make):
    x, program = binary(), of(make_vae())
    expected, parameters, _ = run(SVI, program, ELBO(), x, make())
    found, ours, _ = run(FastSVI, program, ELBO(), x, make(), backend="replay")
    assert found == pytest.approx(expected, abs=1e-9)
    for name in ours:
        torch.testing.assert_close(ours[name], parameters[name], rtol=0, atol=1e-10)


def scheduler():
    return pyro.optim.StepLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "step_size": 2, "gamma": 0.3}, {"clip_norm": 5.0}
    )


def on_plateau():
    return pyro.optim.ReduceLROnPlateau(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "patience": 0, "factor": 0.1}
    )


@pytest.mark.parametrize("make", [scheduler, on_plateau])
def test_schedulers(float64, make):
    """The user steps the scheduler, as with SVI."""
    x, program, kept = binary(), of(make_vae()), []
    for svi_class, settings in ((SVI, {}), (FastSVI, {"backend": "replay"})):
        pyro.clear_param_store()
        torch.manual_seed(3)
        optim = make()
        svi = svi_class(*program(), optim, ELBO(), **settings)
        losses = []
        for _ in range(12):
            losses.append(svi.step(x))
            optim.step(*([losses[-1]] if make is on_plateau else []))
        kept.append(losses)
    assert kept[1] == pytest.approx(kept[0], abs=1e-9)


@pytest.mark.parametrize("name", ["Adam", "ClippedAdam", "by name", "SGD", "StepLR"])
def test_the_state_of_an_optimiser_goes_from_one_svi_to_the_other(float64, name):
    """Eager Pyro writes it and the captured step goes on with it, and the other way round, as if nothing had been."""
    x, vae = binary(), make_vae()
    make = OPTIMISERS.get(name, scheduler)

    def steps(svi_class, vae, optim, n, **settings):
        svi = svi_class(vae.model, vae.guide, optim, ELBO(), **settings)
        return [svi.step(x) for _ in range(n)]

    losses = []
    for first, then in ((SVI, SVI), (SVI, FastSVI), (FastSVI, SVI)):
        pyro.clear_param_store()
        torch.manual_seed(3)
        twin, optim = copy.deepcopy(vae), make()
        steps(first, twin, optim, 5, **({"backend": "replay"} if first is FastSVI else {}))
        other = make()
        other.set_state(copy.deepcopy(optim.get_state()))
        losses.append(steps(then, twin, other, 5, **({"backend": "replay"} if then is FastSVI else {})))
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], abs=1e-9)


def wake_sleep():
    vae = make_vae()

    def guide(x, observations=None):
        return vae.guide(x)

    return vae.model, guide


def test_a_tuple_of_losses(float64):
    objective = pyro.infer.ReweightedWakeSleep(num_particles=3, max_plate_nesting=1)
    torch.manual_seed(1)
    pair, x = wake_sleep(), binary()
    found, _, svi = run(FastSVI, lambda: copy.deepcopy(pair), objective, x, backend="replay")
    assert "replayed" in svi.explain() and isinstance(found[-1], tuple) and len(found[-1]) == 2
    expected, _, _ = run(SVI, lambda: copy.deepcopy(pair), objective, x)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-9)
    assert isinstance(svi.evaluate_loss(x), tuple)


def test_a_loss_that_is_a_function(float64):
    def loss(model, guide, x):
        return Trace_ELBO().differentiable_loss(model, guide, x) / len(x)

    program, x = of(make_vae()), binary()
    expected, _, _ = run(SVI, program, loss, x)
    found, _, svi = run(FastSVI, program, loss, x, backend="replay")
    assert found == pytest.approx(expected, abs=1e-9) and "replayed" in svi.explain()


def test_tensors_anywhere_in_the_arguments(float64):
    vae, x = make_vae(), binary()
    seen = []

    def model(rows, *, weights):
        seen.append(1)
        with poutine.scale(scale=weights["all"]):
            return vae.model(rows[0])

    svi = FastSVI(
        model, lambda rows, weights: vae.guide(rows[0]), pyro.optim.SGD({"lr": 0.0}), ELBO(), backend="replay"
    )
    for scale in (1.0, 2.0, 3.0):
        torch.manual_seed(5)
        loss = svi.step([x], weights={"all": torch.tensor(scale)})
        torch.manual_seed(5)
        guide_scaled = ELBO().loss(vae.model, vae.guide, x)
        count = len(seen)
    assert "replayed" in svi.explain() and count < 10 and loss != pytest.approx(guide_scaled.item())
    before = len(seen)
    svi.step([x], weights={"all": torch.tensor(4.0)})
    assert len(seen) == before  # replayed


def test_numbers_that_change_each_step_are_told():
    vae, x = make_vae(), binary()

    def model(x, beta):
        with poutine.scale(scale=beta):
            return vae.model(x)

    svi = FastSVI(model, lambda x, beta: vae.guide(x), pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), backend="replay")
    with pytest.warns(RuntimeWarning, match="pass them as tensors"):
        for step in range(25):
            svi.step(x, 0.1 + step / 100)


def test_a_parameter_without_gradient_is_left_alone(float64):
    """As eager Pyro does: weight decay would move it."""
    vae = make_vae()
    vae.decoder.idle = nn.Parameter(torch.ones(3))
    program = of(vae)
    _, parameters, _ = run(FastSVI, program, ELBO(), binary(), pyro.optim.AdamW({"lr": 0.01}), backend="replay")
    idle = next(value for name, value in parameters.items() if name.endswith("idle"))
    assert torch.equal(idle, torch.ones(3))


# ------------------------------------------------------------------------------------------------- what stays eager


def branch_on_data():
    vae = make_vae()

    def model(x):
        if x.sum() > 1e6:
            raise RuntimeError
        return vae.model(x)

    return model, vae.guide


def boolean_index():
    vae = make_vae()

    def model(x):
        return vae.model(x[x[:, 0] >= 0])

    return model, vae.guide


@pytest.mark.parametrize("program", [branch_on_data, boolean_index])
def test_what_cannot_be_captured_stays_eager_and_says_why(float64, program):
    torch.manual_seed(2)
    pair = program()

    with pytest.warns(RuntimeWarning, match="this step runs as eager Pyro, not compiled: "):
        _, _, svi = run(FastSVI, lambda: pair, ELBO(), binary(), backend="replay")
    assert "eager, since" in svi.explain()
    assert svi.step(binary()) > 0


def test_a_captured_step_that_differs_is_refused(float64):
    """A step that keeps a counter in Python computes something else each time; the comparison finds it."""
    vae, calls = make_vae(), [0]

    def function(x):
        calls[0] += 1
        loss = -ELBO().bound(vae.model, vae.guide, x * calls[0]).sum()
        loss.backward()
        return loss.detach()

    step = CompiledStep(function, list(vae.parameters()), vae, warm=0, backend="replay")
    with pytest.warns(RuntimeWarning, match="differs from eager Pyro by"), pyro.validation_enabled(False):
        step(binary())


def test_optimisers_that_cannot_be_one_are_refused():
    vae = make_vae()
    with pytest.raises(ValueError, match="one gradient a step, found LBFGS"):
        FastSVI(vae.model, vae.guide, pyro.optim.PyroOptim(torch.optim.LBFGS, {"lr": 0.1}), ELBO())
    with pytest.raises(TypeError, match=r"expected a pyro\.optim optimiser or a function"):
        FastSVI(vae.model, vae.guide, "Adam", ELBO())
    with pytest.raises(ValueError, match="by parameter name, which is known to SVI only: use FastSVI"):
        fit(vae, binary(), epochs=1, optimizer=pyro.optim.Adam(per_parameter))
    with pytest.raises(ValueError, match="one gradient a step, found LBFGS"):
        fit(vae, binary(), epochs=1, optimizer=torch.optim.LBFGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "expected model to be a Pyro program, found None"),
        ({"guide": 3}, "expected guide to be a Pyro program, found 3"),
        ({"loss": "elbo"}, "expected loss to be an objective such as ELBO.* found 'elbo': pass an instance"),
        ({"loss": ELBO}, "expected loss to be an objective such as ELBO.* found <class .*: pass an instance"),
        ({"backend": "fast"}, "expected backend to be 'inductor' or 'replay', found 'fast'"),
    ],
)
def test_arguments_that_are_refused(change, message):
    vae = make_vae()
    arguments = {"model": vae.model, "guide": vae.guide, "optim": pyro.optim.Adam({"lr": 0.1}), "loss": ELBO()}
    with pytest.raises((TypeError, ValueError), match=message):
        FastSVI(**arguments | change)


# ------------------------------------------------------------------------------------------------- constants


def constant_step(finish):
    """A step whose result passes through ``finish``."""
    vae = make_vae()

    def function(x):
        loss = ELBO().differentiable_loss(vae.model, vae.guide, x)
        loss.backward()
        return finish(loss.detach())

    return CompiledStep(function, list(vae.parameters()), vae, warm=0, backend="replay")


@pytest.mark.parametrize(
    ("finish", "what"),
    [
        (lambda loss: track_provenance(loss, frozenset({"z"})), "the loss is a constant in the captured graph"),
        (lambda loss: (loss, track_provenance(2 * loss, frozenset("z"))), "value 1 of the loss is a constant"),
        (lambda loss: torch.from_numpy(loss.numpy().copy()) * 2, "the loss (is a constant|of the captured step)"),
    ],
    ids=["provenance", "in a tuple", "NumPy"],
)
def test_a_constant_result_is_refused(float64, finish, what):
    """Compared on the same noise it is right; each later step would show the numbers of the first one."""
    step = constant_step(finish)
    x, losses = binary(), []
    with pytest.warns(RuntimeWarning, match=what), pyro.validation_enabled(False):
        losses += [torch.as_tensor(step(x)).flatten()[0] for _ in range(3)]
    assert len(set(map(float, losses))) == 3


def test_a_constant_within_is_refused(float64):
    """The loss depends on the parameters, but one factor was recorded as it was for the first data."""
    vae = make_vae()

    def function(x):
        weight = torch.from_numpy(x.numpy().mean(keepdims=True))
        loss = weight * ELBO().differentiable_loss(vae.model, vae.guide, x) * x.new_tensor(x.numpy()[0, 0] + 1)
        loss.backward()
        return loss.detach()

    step = CompiledStep(function, list(vae.parameters()), vae, warm=0, backend="replay")
    x = binary()
    x[:, 0] = torch.tensor([0.0, 1, 1, 0, 1])
    with pytest.warns(RuntimeWarning, match="differs from eager Pyro by .* once noise, parameters or data are others"):
        step(x)


def test_what_is_constant_by_right_is_captured(float64):
    """Numbers, data that a program closes over, and gradients that are the same each step."""
    data, weight = torch.randn(E), torch.randn(E, requires_grad=True)

    def function(x):
        loss = (weight * data).sum() + 0 * x.sum()
        loss.backward()
        return loss.detach(), torch.tensor(100.0), data.sum() + 0 * loss.detach()

    step = CompiledStep(function, [weight], nn.Module(), warm=0, backend="replay")
    assert step(binary())[1] == 100.0
    assert "replayed" in step.explain()
    torch.testing.assert_close(weight.grad, data)


# ------------------------------------------------------------------------------------------------- state


def test_noise_is_fresh_each_step():
    vae = make_vae()
    svi = FastSVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 0.0}), ELBO(), backend="replay")
    x = binary()
    losses = torch.tensor([svi.step(x) for _ in range(400)])
    assert len(losses.unique()) > 390
    fresh = -ELBO(2000).bound(vae.model, vae.guide, x).sum().item()
    assert abs(losses.mean().item() - fresh) < 4 * losses.std().item() / 20 + 0.05


def test_new_shapes_flags_and_stores(float64):
    vae = make_vae()
    svi = FastSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), ELBO(), backend="replay")
    x = binary()
    for rows in (5, 3, 5, 3, 5):
        svi.step(x[:rows])
    assert svi.explain().count("replayed") == 2
    before = [p.detach().clone() for p in vae.parameters()]
    pyro.clear_param_store()
    svi.step(x)
    assert all(not torch.equal(p, q) for p, q in zip(before, vae.parameters(), strict=True))
    vae.eval()
    svi.step(x)
    assert svi.explain().count("replayed") == 3


def test_two_models_of_one_name_both_train(float64):
    first, second = make_vae(), make_vae()
    svis = [FastSVI(v.model, v.guide, pyro.optim.Adam({"lr": 0.01}), ELBO(), backend="replay") for v in (first, second)]
    before = [[p.detach().clone() for p in v.parameters()] for v in (first, second)]
    for _ in range(3):
        for svi in svis:
            svi.step(binary())
    for values, vae in zip(before, (first, second), strict=True):
        assert all(not torch.equal(p, q) for p, q in zip(values, vae.parameters(), strict=True))


def test_a_capture_leaves_no_trace(float64):
    vae, x = make_vae(), binary()

    def function(batch):
        loss = ELBO().differentiable_loss(vae.model, vae.guide, batch)
        loss.backward()
        return loss.detach()

    step = CompiledStep(function, list(vae.parameters()), vae, warm=0, backend="replay")
    torch.manual_seed(4)
    found = step(x)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    expected = ELBO().loss(vae.model, vae.guide, x)
    assert torch.equal(state, torch.get_rng_state())  # one step's worth of noise, no more
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_evaluate_loss_trains_nothing():
    vae, x = make_vae(), binary()
    svi = FastSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.1}), ELBO(), backend="replay")
    for _ in range(3):
        svi.step(x)
    before = [p.detach().clone() for p in vae.parameters()]
    assert svi.evaluate_loss(x) > 0
    assert all(torch.equal(p, q) for p, q in zip(before, vae.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------- inductor


@needs_compiler
def test_compiled_by_inductor(float64):
    svi = assert_same_steps(of(make_vae()), IWAE(3), binary(), atol=1e-9, backend="inductor")
    assert "compiled with its optimiser, " in svi.explain()


@needs_compiler
def test_fit_compiled_is_fit_and_resumes_bit_for_bit(tmp_path):
    x = datasets.binarize(torch.rand(40, E))
    vaes = [make_vae() for _ in range(3)]
    for vae in vaes[1:]:
        vae.load_state_dict(vaes[0].state_dict())
    histories = []
    for vae, compiled in ((vaes[0], False), (vaes[1], True)):
        torch.manual_seed(6)
        histories.append(fit(vae, x, epochs=4, batch_size=20, lr=0.01, compiled=compiled))
    assert histories[1]["elbo"] == pytest.approx(histories[0]["elbo"], rel=1e-4)
    assert histories[1]["kl"] == pytest.approx(histories[0]["kl"], rel=1e-3)
    torch.manual_seed(6)
    fit(vaes[2], x, epochs=2, batch_size=20, lr=0.01, compiled=True, folder=tmp_path)
    torch.manual_seed(77)
    fit(vaes[2], x, epochs=4, batch_size=20, lr=0.01, compiled=True, folder=tmp_path, resume=True)
    for p, q in zip(vaes[1].parameters(), vaes[2].parameters(), strict=True):
        assert torch.equal(p, q)
