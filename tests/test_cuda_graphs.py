"""A recorded step replays what eager steps compute, and nothing that Python does while it is recorded.

There may be no GPU here: an emulation with the semantics of a CUDA graph takes its place (:mod:`emulated_graph`), and
the graph of operations is looked through for what a GPU could not record. With a GPU the last tests run on it.
"""

import copy
import warnings

import numpy as np
import pyro
import pyro.infer
import pytest
import torch
from emulated_graph import EmulatedGraph
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    Bernoulli,
    Beta,
    Decoder,
    DiagonalNormal,
    FastSVI,
    FullNormal,
    MixtureOfNormals,
    Mlp,
    StandardNormal,
    VampPrior,
    cuda_graphs,
    datasets,
    fit,
    schedules,
    steps,
    training,
)
from pyro_vae.capture import recording
from pyro_vae.compiling import CompiledStep
from pyro_vae.cuda_graphs import Recorded, host_traffic
from pyro_vae.optimizers import Adam
from pyro_vae.parallel import Workers
from pyro_vae.streaming import Rows

E, D, N, B = 7, 2, 29, 8  # 3 whole batches and one of 5 examples
CPU = torch.device("cpu")


@pytest.fixture
def emulated(monkeypatch):
    """CUDA graphs on a CPU: two steps in each, one batch left over and a smaller one."""
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", EmulatedGraph)
    monkeypatch.setattr(steps, "STEPS_PER_REPLAY", 2)
    monkeypatch.setattr(EmulatedGraph, "made", [])
    return EmulatedGraph.made


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


def make_vae(prior=None, family=DiagonalNormal):
    encoder = family(Mlp(E, 11, family.num_outputs(D)))
    vae = VAE(prior(encoder) if prior else StandardNormal(D), Decoder(Mlp(D, 13, E), Bernoulli()), encoder)
    return vae.to(torch.get_default_dtype())


def make_bytes():
    return torch.randint(256, (N, E), dtype=torch.uint8)


def both(vae, x, **settings):
    """The same training by eager steps and by recorded ones: models and histories."""
    found = []
    for compiled in (False, "replay"):
        pyro.clear_param_store()
        twin = copy.deepcopy(vae)
        torch.manual_seed(7)
        made = {name: value() if name == "optimizer" else value for name, value in settings.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*KL.*|.*kl_divergence.*")
            history = fit(twin, x, **{"epochs": 4, "batch_size": B, "lr": 0.01, **made}, compiled=compiled)
        found.append((twin, history))
    return found


def assert_equal(found, atol=1e-10):
    (eager, its_history), (recorded, history) = found
    for (name, p), q in zip(eager.named_parameters(), recorded.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=atol, msg=name)
    for column in ("objective", "elbo", "log_px", "kl"):
        assert history[column] == pytest.approx(its_history[column], abs=1e-8, nan_ok=True), column


# ------------------------------------------------------------------------------------------------- whole steps


@pytest.mark.parametrize(
    "objective",
    [
        ELBO(),
        IWAE(3),
        Beta(beta=schedules.Linear(20)),
        pyro.infer.Trace_ELBO(),
        pyro.infer.TraceMeanField_ELBO(),
    ],
    ids=lambda o: type(o).__name__,
)
def test_recorded_steps_are_eager_steps(float64, emulated, objective):
    """Those of pyro.infer.SVI: bytes binarised anew at each visit, KL warm-up, batches left over, at the same noise."""
    x, vae = make_bytes(), make_vae()
    twin, theirs = copy.deepcopy(vae), copy.deepcopy(objective)
    prepare = lambda rows: datasets.binarize(rows).double()  # noqa: E731
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*KL.*|.*kl_divergence.*")
        torch.manual_seed(7)
        svi = pyro.infer.SVI(twin.model, twin.guide, pyro.optim.Adam({"lr": 0.01}), theirs)
        losses = [[svi.step(prepare(x[i])) for i in torch.randperm(N).split(B)] for _ in range(4)]
        torch.manual_seed(7)
        history = fit(vae, x, objective=objective, epochs=4, batch_size=B, lr=0.01, prepare=prepare, compiled="replay")
    for (name, p), q in zip(vae.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=name)
    assert history["objective"] == pytest.approx([-sum(epoch) / N for epoch in losses], abs=1e-9)
    assert sorted(graph.num_replays for graph in emulated) == [3, 3, 3]  # 4 epochs; the first visit is the warm-up


def test_members(float64, emulated):
    vae = make_vae(lambda e: VampPrior(e, torch.rand(4, E)), FullNormal)
    assert_equal(both(vae, make_bytes(), prepare=datasets.binarize, epochs=3))
    assert len(emulated) == 3


def test_learning_rates_change_without_a_new_recording(float64, emulated):
    made = []

    def optimizer(parameters):
        made.append(Adam(parameters, lr=0.02))
        return made[-1]

    def halve(row):
        made[-1].param_groups[0]["lr"] /= 2

    found = both(make_vae(), make_bytes(), prepare=datasets.binarize, optimizer=lambda: optimizer, on_epoch=halve)
    assert_equal(found)
    assert len(emulated) == 3 and made[-1].param_groups[0]["lr"] == 0.02 / 16
    with pytest.raises(AssertionError):  # this test can fail: another rate is another run
        assert_equal([found[0], both(make_vae(), make_bytes(), prepare=datasets.binarize)[1]])


def test_other_options_of_the_optimiser_are_recorded_anew(float64, emulated):
    made = []

    def optimizer(parameters):
        made.append(Adam(parameters, lr=0.02))
        return made[-1]

    def decay(row):
        made[-1].param_groups[0]["weight_decay"] = 0.1 * (row["epoch"] == 2)

    settings = {"optimizer": lambda: optimizer, "on_epoch": decay, "epochs": 6}
    assert_equal(both(make_vae(), make_bytes(), prepare=datasets.binarize, **settings))


@pytest.mark.parametrize("together", [(2, 1), (1, 16)])
def test_a_resumed_run_is_bit_for_bit_the_same_at_any_place_of_a_replay(emulated, monkeypatch, tmp_path, together):
    x, vae = make_bytes(), make_vae()
    twin, other = copy.deepcopy(vae), make_vae()
    settings = {"batch_size": B, "prepare": datasets.binarize, "compiled": "replay", "objective": IWAE(3)}
    torch.manual_seed(7)
    straight = fit(vae, x, epochs=4, **settings)
    monkeypatch.setattr(steps, "STEPS_PER_REPLAY", together[0])
    torch.manual_seed(7)
    fit(twin, x, epochs=2, folder=tmp_path, **settings)
    monkeypatch.setattr(steps, "STEPS_PER_REPLAY", together[1])
    torch.manual_seed(999)
    resumed = fit(other, x, epochs=4, folder=tmp_path, resume=True, **settings)
    assert all(torch.equal(p, q) for p, q in zip(vae.parameters(), other.parameters(), strict=True))
    assert [{**row, "seconds": 0} for row in resumed.rows] == [{**row, "seconds": 0} for row in straight.rows]


def test_nothing_is_read_back_within_an_epoch(emulated):
    """Each recorded operation was looked at by the emulation; this is what was recorded."""
    fit(make_vae(), make_bytes(), epochs=3, batch_size=B, prepare=datasets.binarize, compiled="replay")
    for graph in emulated:
        recorded = {str(call[0]).split(".")[1] for call in graph.calls}
        assert {"index_select", "mm", "_fused_adam_"} <= recorded


# ------------------------------------------------------------------------------------------------- parts of steps


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99}),
        lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.1}),
    ],
    ids=["SGD", "ClippedAdam", "clip_norm"],
)
def test_other_optimisers_step_beside_the_recording(float64, emulated, optimizer):
    assert_equal(both(make_vae(), make_bytes(), optimizer=optimizer, prepare=datasets.binarize))
    assert len(emulated) == 2  # whole batches and the last one
    assert all("_fused_adam_" not in str(call[0]) for graph in emulated for call in graph.calls)


def test_data_that_is_read_ahead(float64, emulated):
    assert_equal(both(make_vae(), make_bytes(), prepare=datasets.binarize, resident=False))
    assert len(emulated) == 2


def test_what_a_graph_cannot_hold_is_prepared_outside(float64, emulated):
    """NumPy's noise would be the same in each replay."""
    noise = []

    def prepare(rows):
        if torch.is_grad_enabled():
            noise.append(len(rows))
        return (rows.double() / 255 > torch.from_numpy(np.random.default_rng(len(noise)).random(rows.shape))).double()

    vae, x, found = make_vae(), make_bytes(), []
    for compiled in (False, "replay"):
        noise.clear()
        twin = copy.deepcopy(vae)
        torch.manual_seed(7)
        history = fit(twin, x, epochs=3, batch_size=B, prepare=prepare, compiled=compiled)
        found.append((twin, history))
    assert len(noise) >= 3 * 4  # called at each step
    assert len(emulated) == 2 and all("_fused_adam_" not in str(c[0]) for g in emulated for c in g.calls)


def test_fast_svi(float64, emulated):
    """Losses that nobody reads in between are not overwritten by later steps."""
    vae, x = make_vae(), (torch.rand(5, E) < 0.4).double()
    losses = []
    for svi_class in (pyro.infer.SVI, FastSVI):
        pyro.clear_param_store()
        torch.manual_seed(3)
        twin = copy.deepcopy(vae)
        ours = svi_class is FastSVI
        settings = {"backend": "replay"} if ours else {}
        objective, optim = Beta(beta=schedules.Linear(5)), pyro.optim.Adam({"lr": 0.01})
        svi = svi_class(twin.model, twin.guide, optim, objective, **settings)
        kept = [svi.step_on_device(x.roll(i, 0)) if ours else svi.step(x.roll(i, 0)) for i in range(8)]
        losses.append([float(value) for value in kept])
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)
    assert len(emulated) == 1 and svi.explain().endswith(", with its optimiser in a CUDA graph")
    assert any("_fused_adam_" in str(call[0]) for call in emulated[0].calls)


# ------------------------------------------------------------------------------------------------- Recorded


def test_the_emulation_does_what_a_graph_does(emulated):
    """Numbers of Python are held, tensors are read anew, recording computes nothing, results share one memory."""
    count, total, weight = [0.0], torch.zeros(2), torch.ones(2)

    def function(x):
        count[0] += 1
        total.add_(x + count[0])
        return weight * x + torch.rand(2)

    recorded = Recorded(function, CPU)
    torch.manual_seed(1)
    first = recorded(torch.ones(2))
    assert total.tolist() == [2.0, 2.0]
    outs = [recorded(torch.full((2,), float(i))) for i in (10, 20, 30)]
    assert outs[0] is outs[2] and count[0] == 2
    assert total.tolist() == [2 + 60 + 3 * 2.0] * 2  # 2, not 2, 3, 4: the number was recorded
    weight.fill_(100.0)
    torch.manual_seed(1)
    noise = [torch.rand(2) for _ in range(5)]
    torch.testing.assert_close(first, 1 + noise[0])
    torch.testing.assert_close(outs[2], 30 + noise[3])  # fresh noise each time, none spent on the recording
    torch.manual_seed(1)
    torch.testing.assert_close(recorded(torch.ones(2)), 100 + noise[0])


def test_another_shape_or_option_is_another_recording(emulated):
    recorded = Recorded(lambda x: 2 * x, CPU)
    for rows in (3, 3, 4, 4, 4, 3):
        torch.testing.assert_close(recorded(torch.ones(rows)), torch.full((rows,), 2.0))
    recorded(torch.ones(3), also=1)
    recorded(torch.ones(3), also=1)
    assert recorded.num_recorded == len(emulated) == 3


def test_a_recording_that_fails_leaves_the_function(monkeypatch):
    def refuses(function, device, generators):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", refuses)
    total = torch.zeros(())
    recorded = Recorded(lambda x: total.add_(x.sum()), CPU)
    recorded(torch.ones(3))
    with pytest.warns(RuntimeWarning, match="not recorded in a CUDA graph: RuntimeError: operation not permitted"):
        recorded(torch.ones(3))
    recorded(torch.ones(3))
    assert total == 9 and recorded.num_recorded == 0


# ------------------------------------------------------------------------------------------------- host traffic

META = torch.device("meta")  # tensors without memory: what would need their values fails, and a copy is seen


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: x / 2 + torch.tensor(0.5), None),
        (lambda x: torch.rand_like(x).mul_(x.sum()), None),
        (lambda x: x + torch.ones(3).to(META), "aten.ones.default has a tensor [3] on cpu: move it to meta"),
        (lambda x: x + torch.ones(3).sum(), "aten.ones.default has a tensor [3] on cpu: move it to meta"),
        (lambda x: x + torch.tensor(0.5).to(META), "aten._to_copy.default has a tensor [] on cpu: move it to meta"),
    ],
    ids=["numbers", "draws", "a copy", "computed on the host", "a copied number"],
)
def test_host_traffic(function, found):
    graph = make_fx(function, tracing_mode="real")(torch.zeros(3, device=META))
    assert host_traffic(graph, META) == found


def test_a_number_that_is_kept_on_the_host_is_an_obstacle():
    """A kernel takes it as it was when it was recorded."""
    beta, weight = torch.tensor(1.0), torch.ones(E, requires_grad=True)

    def function(x):
        loss = (beta * weight * x).sum()
        loss.backward()
        return loss.detach()

    step = CompiledStep(function, [weight], torch.nn.Module(), warm=0, backend="replay")
    step(torch.ones(3, E))
    (graph,) = step._graphs.values()
    assert step.obstacle is None
    for node in graph.run.graph.nodes:  # as if all but beta were on another device
        if node.op == "call_function" or node.meta.get("val", beta).dim() > 0:
            node.meta["val"] = node.meta["val"].to(META)
    assert host_traffic(graph.run, META) == "the step has a tensor [] on cpu: move it to meta"


@pytest.mark.parametrize(
    ("objective", "family", "prior"),
    [
        (ELBO(), DiagonalNormal, lambda e: VampPrior(e, torch.rand(4, E))),
        (IWAE(3), FullNormal, lambda e: MixtureOfNormals(D, 3)),
        (Beta(beta=schedules.Linear(20)), DiagonalNormal, None),
    ],
    ids=["VampPrior", "full, mixture, IWAE", "warm-up"],
)
def test_whole_steps_on_a_device_have_no_host_traffic(objective, family, prior):
    """Traced on a device that has no values to give: every operation of three steps computes there."""
    vae, objective = make_vae(prior, family).to(META), copy.deepcopy(objective)
    parameters = list(vae.parameters())
    data = Rows(torch.zeros(N, E, dtype=torch.uint8, device=META), META, False, "")
    take = steps.Steps(
        data,
        lambda rows: datasets.binarize(rows).float(),
        training._gradients_of(objective, vae),
        parameters,
        vae,
        Adam(parameters),
        objective,
        B,
        Workers(),
        how=False,
    )
    objective.at_step(0, META)
    index = torch.zeros(3, B, dtype=torch.int64, device=META)
    with recording():
        graph = make_fx(lambda index: take._take(index), tracing_mode="real")(index)
    graph.graph.eliminate_dead_code()  # Pyro's plates count their examples on the host, and nobody asks
    names = [str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("aten.")]
    assert host_traffic(graph, META) is None
    assert names.count("index_select") >= 3 and names.count("mm") > 20
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
    assert {value.device for value in values if isinstance(value, torch.Tensor) and value.dim()} == {META}


# ------------------------------------------------------------------------------------------------- on a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@on_gpu
@pytest.mark.parametrize("compiled", ["replay", True])
def test_on_a_gpu(watched, compiled):
    """Recorded for good: the same noise, so the same numbers up to rounding."""
    vae, x, found = make_vae().cuda(), make_bytes().cuda(), []
    for how in (False, compiled):
        twin = copy.deepcopy(vae)
        torch.manual_seed(7)
        history = fit(twin, x, epochs=5, batch_size=B, lr=0.01, prepare=datasets.binarize, compiled=how)
        found.append((twin, history))
    for p, q in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert found[1][1]["elbo"] == pytest.approx(found[0][1]["elbo"], rel=1e-4)
    assert watched[-1].programs.recorded.num_recorded >= 2


@on_gpu
def test_fast_svi_on_a_gpu():
    vae, x = make_vae().cuda(), (torch.rand(5, E) < 0.4).float().cuda()
    losses = []
    for svi_class in (pyro.infer.SVI, FastSVI):
        pyro.clear_param_store()
        torch.manual_seed(3)
        twin = copy.deepcopy(vae)
        svi = svi_class(twin.model, twin.guide, pyro.optim.Adam({"lr": 0.01}), ELBO())
        losses.append([svi.step(x) for _ in range(8)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert "in a CUDA graph" in svi.explain()
