"""A program of whole steps changes what eager steps change, and sees what they see.

Most cases run the recorded program operation by operation, which is fast to build; two in test_compiling.py compile it.
"""

import copy

import pyro
import pyro.infer
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae import (
    ELBO,
    VAE,
    Bernoulli,
    Beta,
    Decoder,
    DiagonalNormal,
    FastSVI,
    Mlp,
    StandardNormal,
    VampPrior,
    capture,
    datasets,
    fit,
    programs,
    schedules,
)
from pyro_vae.capture import Differs, NotCapturable, agreement, recording
from pyro_vae.optimizers import Adam, AdamW, ClippedAdam

B, D, E = 5, 2, 7


def make_vae(prior=None, encoder=None):
    encoder = DiagonalNormal(encoder or Mlp(E, 11, 2 * D))
    decoder = Decoder(Mlp(D, 13, E), Bernoulli())
    return VAE(prior(encoder) if prior else StandardNormal(D), decoder, encoder).to(torch.get_default_dtype())


def binary(n=B):
    return (torch.rand(n, E) < 0.4).to(torch.get_default_dtype())


def both(vae, optim, take, objective=ELBO):
    """What ``take`` makes of eager SVI and of programs, from one random state, and the parameters of each."""
    found = []
    for svi_class in (SVI, FastSVI):
        pyro.clear_param_store()
        twin, optimizer = copy.deepcopy(vae), optim()
        torch.manual_seed(3)
        svi = svi_class(twin.model, twin.guide, optimizer, objective())
        losses = take(svi, optimizer, twin)
        if svi_class is FastSVI:
            assert "compiled with its optimiser" in svi.explain()
        found.append((losses, [p.detach().clone() for p in twin.parameters()]))
    return found


def assert_equal(found):
    (expected, parameters), (losses, ours) = found
    assert losses == pytest.approx(expected, rel=0, abs=1e-9)
    for p, q in zip(parameters, ours, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def steps(x, count=12):
    return lambda svi, optim, vae: [svi.step(x) for _ in range(count)]


# ------------------------------------------------------------------------------------------------- the optimiser


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Adam, {}),
        (Adam, {"betas": (0.0, 0.9), "eps": 1e-3}),
        (Adam, {"weight_decay": 0.3}),
        (AdamW, {"lr": 0.05}),
        (AdamW, {"lr": 0.05, "weight_decay": 0.0}),
    ],
)
def test_operations_do_what_the_kernel_does(float64, cls, options):
    sizes = [(3, 2), (5,), ()]
    one = [nn.Parameter(torch.randn(size)) for size in sizes]
    other = [nn.Parameter(p.detach().clone()) for p in one]
    kernel, plain = cls(one, **options), cls(other, **options)
    for _ in range(20):
        for i, (p, q) in enumerate(zip(one, other, strict=True)):
            p.grad = torch.randn(p.shape) if i != 1 else None
            q.grad = p.grad if p.grad is None else p.grad.clone()
        kernel.step()
        with recording():
            plain.step()
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
        for name in kernel.state[p]:
            torch.testing.assert_close(kernel.state[p][name], plain.state[q][name], rtol=1e-12, atol=0)


OPTIMISERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.02}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.02, "weight_decay": 0.1}),
    "two rates": lambda: pyro.optim.Adam(lambda name: {"lr": 0.05 if "decoder" in name else 0.01}),
}


@pytest.mark.parametrize("optim", OPTIMISERS.values(), ids=OPTIMISERS)
def test_programs_are_eager_steps(float64, uncompiled, optim):
    assert_equal(both(make_vae(), optim, steps(binary())))


def test_rates_and_states_that_change_between_steps(float64, uncompiled):
    x = binary()

    def optim():
        return pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.7})

    def take(svi, optim, vae):
        losses = []
        for _ in range(6):
            losses.append(svi.step(x))
            optim.step()
        return losses

    assert_equal(both(make_vae(), optim, take))

    def reload(svi, optim, vae):
        losses, state = [svi.step(x) for _ in range(4)], copy.deepcopy(optim.get_state())
        losses += [svi.step(x) for _ in range(4)]
        optim.set_state(state)
        return losses + [svi.step(x) for _ in range(4)]

    found = both(make_vae(), OPTIMISERS["Adam"], reload)
    assert_equal(found)
    with pytest.raises(AssertionError):  # this test can fail: without loading the state the steps are others
        assert_equal([found[0], both(make_vae(), OPTIMISERS["Adam"], steps(x))[1]])


def test_a_state_that_a_torch_optimiser_loads(float64, uncompiled):
    """Torch puts other groups and other tensors in place of the old ones."""
    vae, x, found = make_vae(), binary(), []
    for cls, how in ((torch.optim.Adam, "replay"), (Adam, "inductor")):
        pyro.clear_param_store()
        twin, made = copy.deepcopy(vae), []
        torch.manual_seed(3)
        make = lambda p, cls=cls, made=made: made.append(cls(p, lr=0.05)) or made[-1]  # noqa: E731
        svi = FastSVI(twin.model, twin.guide, make, ELBO(), backend=how)
        losses = [svi.step(x) for _ in range(4)]
        state = copy.deepcopy(made[0].state_dict())
        losses += [svi.step(x) for _ in range(4)]
        made[0].load_state_dict(state)
        losses += [svi.step(x) for _ in range(2)]
        made[0].param_groups[0]["lr"] = 0.01
        losses += [svi.step(x) for _ in range(4)]
        found.append((losses, [p.detach().clone() for p in twin.parameters()]))
    assert "compiled with its optimiser" in svi.explain()
    assert_equal(found)


def test_parameters_whose_data_are_others(float64, uncompiled):
    """As ``load_state_dict(assign=True)`` or a user does it: the tensor is the same, its memory is not."""
    x = binary()

    def take(svi, optim, vae):
        losses = [svi.step(x) for _ in range(4)]
        for p in vae.parameters():
            p.data = p.data * 0.5
        return losses + [svi.step(x) for _ in range(4)]

    assert_equal(both(make_vae(), OPTIMISERS["Adam"], take))


@pytest.mark.parametrize("other", ["SGD", "clipping", "ClippedAdam"])
def test_other_optimisers_stay_beside_the_compiled_step(float64, uncompiled, other):
    optim = {
        "SGD": lambda: pyro.optim.SGD({"lr": 0.01}),
        "clipping": lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 1.0}),
        "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.01}),
    }[other]()
    vae = make_vae()
    svi = FastSVI(vae.model, vae.guide, optim, ELBO())
    svi._first(binary())
    assert programs.way_of(torch.device("cpu"), svi._optimizers) is None
    assert programs.way_of(torch.device("cpu"), [Adam(vae.parameters())]) == "compile"
    assert programs.way_of(torch.device("cuda"), [Adam(vae.parameters())]) == "record"
    assert isinstance(svi._optimizers[0], ClippedAdam) == (other == "ClippedAdam")


# ------------------------------------------------------------------------------------------------- the step


def test_buffers_and_baselines_change_too(float64, uncompiled):
    encoder = nn.Sequential(nn.Linear(E, 11, bias=False), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 2 * D))
    vae, x = make_vae(encoder=encoder), binary()
    statistics = []

    def take(svi, optim, vae):
        losses = steps(x)(svi, optim, vae)
        statistics.append([b.clone() for b in vae.buffers()])
        return losses

    assert_equal(both(vae, OPTIMISERS["Adam"], take))
    for a, b in zip(*statistics, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)

    def model(x):
        z = pyro.sample("z", pyro.distributions.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    def guide(x):
        p = pyro.param("p", torch.tensor(0.5), constraint=pyro.distributions.constraints.unit_interval)
        baseline = {"use_decaying_avg_baseline": True, "baseline_beta": 0.7}
        pyro.sample("z", pyro.distributions.Bernoulli(p), infer={"baseline": baseline})

    kept = []
    for svi_class in (SVI, FastSVI):
        pyro.clear_param_store()
        torch.manual_seed(5)
        svi = svi_class(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceGraph_ELBO())
        losses = [svi.step(torch.tensor(1.2)) for _ in range(12)]
        kept.append((losses, {name: value.item() for name, value in pyro.get_param_store().items()}))
    assert "compiled with its optimiser" in svi.explain() and len(kept[0][1]) == 2
    assert kept[1][0] == pytest.approx(kept[0][0], abs=1e-9)
    assert kept[1][1] == pytest.approx(kept[0][1], abs=1e-9)


def test_train_and_eval_are_two_programs(float64, uncompiled):
    encoder, x = nn.Sequential(nn.Linear(E, 11), nn.Dropout(0.5), nn.Linear(11, 2 * D)), binary()

    def take(svi, optim, vae):
        losses = [svi.step(x) for _ in range(3)]
        vae.eval()
        losses += [svi.step(x) for _ in range(3)]
        vae.train()
        losses += [svi.step(x) for _ in range(3)]
        if isinstance(svi, FastSVI):
            assert svi.explain().count("compiled with its optimiser") == 2
        return losses

    assert_equal(both(make_vae(encoder=encoder), OPTIMISERS["Adam"], take))


@pytest.mark.parametrize("compiled", ["replay", True])
def test_fit_steps_in_programs(float64, uncompiled, compiled):
    """Bytes binarised anew at each visit, KL warm-up, a smaller last batch: all within."""
    x = (255 * torch.rand(29, E)).to(torch.uint8)
    prepare = lambda rows: datasets.binarize(rows).double()  # noqa: E731
    vae, found, told = make_vae(lambda e: VampPrior(e, torch.rand(4, E))), [], []
    for how in (False, compiled):
        twin = copy.deepcopy(vae)
        torch.manual_seed(7)
        objective = Beta(beta=schedules.Linear(9))
        settings = {"epochs": 4, "batch_size": 8, "lr": 0.01, "prepare": prepare, "compiled": how, "note": told.append}
        history = fit(twin, x, objective=objective, **settings)
        found.append((history["objective"], [p.detach().clone() for p in twin.parameters()]))
    assert_equal(found)
    assert any("compiled with its optimiser" in line for line in told) == (compiled is True)


def test_building_leaves_no_trace(float64, uncompiled):
    vae, x = make_vae(), binary()
    adam = Adam(vae.parameters())
    vae_state = copy.deepcopy(vae.state_dict())
    svi = FastSVI(vae.model, vae.guide, lambda parameters: adam, ELBO())
    svi.step(x)
    before, state = copy.deepcopy(vae.state_dict()), copy.deepcopy(adam.state_dict())
    torch.manual_seed(11)
    random = torch.get_rng_state()
    program = svi._steps[svi._key((x,), {})[0]]._ready((x,))
    assert program.explain().startswith("compiled") and torch.equal(torch.get_rng_state(), random)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name]) and not torch.equal(value, vae_state[name])
    for key, values in adam.state_dict()["state"].items():
        assert all(torch.equal(values[name], state["state"][key][name]) for name in values)


def test_a_program_that_differs_is_refused(float64, uncompiled, monkeypatch):
    def wrong(graph, inputs):
        def run(*args):
            out = graph(*args)
            args[0].mul_(1.001)
            return out

        return run

    monkeypatch.setattr(programs, "compile_graph", wrong)
    vae, x = make_vae(), binary()
    svi = FastSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), ELBO())
    svi.step(x)
    with pytest.warns(RuntimeWarning, match="the optimiser's step is not compiled: .* differ from eager ones by"):
        svi.step(x)
    svi.step(x)
    assert ": compiled, " in svi.explain()  # the gradients, at least


# ------------------------------------------------------------------------------------------------- many steps


@pytest.mark.parametrize("backend", ["inductor", "replay"])
def test_run_is_so_many_steps(float64, uncompiled, backend):
    x, vae, found = binary(), make_vae(), []
    for runs in (False, True):
        pyro.clear_param_store()
        twin = copy.deepcopy(vae)
        torch.manual_seed(3)
        svi = FastSVI(twin.model, twin.guide, pyro.optim.Adam({"lr": 0.02}), ELBO(), backend=backend)
        losses = torch.cat([svi.run(n, x) for n in (1, 7, 4)]).tolist() if runs else [svi.step(x) for _ in range(12)]
        found.append((losses, [p.detach().clone() for p in twin.parameters()]))
    assert_equal(found)


def test_run_for_programs_of_other_kinds(float64, uncompiled):
    """A tuple of losses, an argument that cannot be told from another, a store that was cleared."""
    vae, x = make_vae(), binary()
    adam = pyro.optim.Adam({"lr": 0.02})

    class Two:
        def loss_and_grads(self, model, guide, *args):
            loss = Trace_ELBO().differentiable_loss(model, guide, *args)
            loss.backward()
            return loss.detach(), 2 * loss.detach()

    one, two = FastSVI(vae.model, vae.guide, adam, Two()).run(5, x)
    assert one.shape == two.shape == (5,) and torch.equal(two, 2 * one)

    def program(x, key):
        return vae.model(x)

    svi = FastSVI(program, lambda x, key: vae.guide(x), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    assert svi.run(3, x, {1, 2}).shape == (3,)
    pyro.clear_param_store()
    guide = AutoNormal(vae.model)
    svi = FastSVI(vae.model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    assert svi.run(4, x).isfinite().all()


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, "3"])
def test_run_refuses(num_steps):
    vae = make_vae()
    svi = FastSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), ELBO())
    with pytest.raises(ValueError, match="expected num_steps to be an integer >= 1, found"):
        svi.run(num_steps, binary())


# ------------------------------------------------------------------------------------------------- parts


def test_agreement_at_one_of_several_places():
    def compare(go):
        go()
        if at[-1] < 2:
            raise Differs(f"at {at[-1]}")
        return 0.25

    at: list[int] = []
    assert agreement(compare, at.append, (0, 2, 4)) == 0.25 and at == [0, 2]
    with pytest.raises(NotCapturable, match="at 1"):
        agreement(compare, at.append, (0, 1))


def test_small_products_and_draws(float64, monkeypatch):
    """What the compiler is given: the same numbers from the same generator, without copies and small calls."""
    graphs = []
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs, options: graphs.append(graph) or graph)

    def function(a, b, c):
        noise = torch.empty(3, 5).normal_() + torch.empty(3, 5).uniform_() + torch.empty(3, 5).normal_(1.0, 2.0)
        return torch.addmm(c, a, b) + (a @ b) + noise, (a @ a.mT) @ a, torch.empty(200, 2) @ torch.empty(2, 300)

    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    run = capture.compile_graph(make_fx(function)(a, b, c), [a, b, c])
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert targets.count("aten.mm.default") == 1 and "aten.addmm.default" not in targets  # the large one
    assert targets.count("aten.normal_.default") == 1  # of mean 1
    assert "aten.randn.default" in targets and "aten.rand.default" in targets
    torch.manual_seed(2)
    expected = function(a, b, c)
    torch.manual_seed(2)
    for found, value in zip(run(a, b, c)[:2], expected[:2], strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-14)
