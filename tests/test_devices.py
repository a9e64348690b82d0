"""Nothing is left on the processor: every member and every estimate on a second device, which is emulated.

A training step of each member is traced with tensors that have a device and no numbers: an operation that mixes devices
fails, and :func:`host_traffic` finds what a CUDA graph could not hold. What reads numbers (estimates, diagnostics,
pictures, the command line) runs on :mod:`emulated_device`, which has them.
"""

import warnings
from contextlib import contextmanager, nullcontext
from itertools import cycle

import pyro
import pyro.distributions as dist
import pytest
import torch
from emulated_device import CARD, Card, Literals
from test_captured_members import make_data, objectives, small_objective
from test_cross_product import ENCODERS, LIKELIHOODS, PRIORS, D, make_decoder, make_encoder, make_prior, refusals
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae
from pyro_vae import (
    ELBO,
    VAE,
    Bernoulli,
    Decoder,
    DiagonalNormal,
    Mlp,
    ScoreFunction,
    StandardNormal,
    aggregate,
    annealing,
    anomalies,
    calibration,
    checkpoints,
    clouds,
    configuration,
    diagnostics,
    discrete,
    disentanglement,
    estimates,
    evaluation,
    exact,
    fit,
    gaps,
    geometry,
    gradient_variance,
    likelihoods,
    missing,
    parallel,
    priors,
    representation,
    sample_quality,
    tails,
)
from pyro_vae.capture import recording
from pyro_vae.cli import main
from pyro_vae.cuda_graphs import RECORDERS, CudaGraph, Recorded, host_traffic
from pyro_vae.optimizers import Adam, torch_optimizer
from pyro_vae.precision import tensor_cores
from pyro_vae.traceable import PlainDraws

# What keeps a step from being one CUDA graph, by member; such a step is right, and waits for the host.
WAITS = {"LowRankNormal": "_linalg_check_errors"}  # torch.distributions factorises, and looks whether it could


def on_fake_card(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Parameters and buffers elsewhere, as ``to`` would move them; whatever else a part holds stays."""
    made: dict[int, torch.Tensor | None] = {id(None): None}

    def moved(tensor):
        if id(tensor) not in made:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CARD)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    with mode:
        for part in module.modules():
            part._parameters = {name: moved(value) for name, value in part._parameters.items()}
            part._buffers = {name: moved(value) for name, value in part._buffers.items()}
    return module


def traffic_of_a_step(vae, objective, x):
    """What of a training step's graph touches the host; mixed devices raise."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parameters = list(on_fake_card(vae, mode).parameters())

    def step(x):
        loss = objective.loss_and_grads(vae.model, vae.guide, x)
        losses = loss if isinstance(loss, tuple) else (loss,)
        return [*losses, *(p.grad for p in parameters if p.grad is not None)]

    like = lambda made: torch.empty(made.shape, dtype=made.dtype, device=CARD)  # noqa: E731  # a constant there
    with mode, recording(), Literals(like):
        if hasattr(objective, "at_step"):
            objective.at_step(0, CARD)
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CARD)
        graph = make_fx(step, tracing_mode="real")(x)
    graph.graph.eliminate_dead_code()
    assert {p.grad.device for p in parameters if p.grad is not None} == {CARD}
    return host_traffic(graph, CARD)


def combinations():
    """(posterior, prior, likelihood), none refused, that every member stands in."""
    refused, unused = refusals(), list(PRIORS)
    pairs = []
    for encoder in [*ENCODERS, *["DiagonalNormal"] * (len(LIKELIHOODS) - len(ENCODERS))]:
        partners = [prior for prior in PRIORS if (prior, encoder) not in refused]
        prior = next((prior for prior in partners if prior in unused), partners[0])
        unused = [other for other in unused if other != prior]
        pairs.append((encoder, prior))
    pairs += [(next(e for e in ENCODERS if (prior, e) not in refused), prior) for prior in unused]
    return [(*pair, likelihood) for pair, likelihood in zip(pairs, cycle(LIKELIHOODS), strict=False)]


def vae_of(encoder, prior, likelihood, device="cpu"):
    """A VAE of these members, an objective for it, and data."""
    posterior = make_encoder(ENCODERS[encoder])
    vae = VAE(make_prior(PRIORS[prior], posterior), make_decoder(LIKELIHOODS[likelihood]), posterior)
    x = make_data(likelihood)
    with torch.no_grad(), pyro.validation_enabled(False):
        objective = ELBO() if posterior(x).has_rsample else ScoreFunction(num_particles=3)
    return vae.to(device), objective, x.to(device)


def test_every_member_computes_where_its_parameters_are():
    found = {}
    for key in combinations():
        torch.manual_seed(0)
        pyro.clear_param_store()
        try:
            found[key] = traffic_of_a_step(*vae_of(*key))
        except Exception as error:
            found[key] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    wrong = {key: text for key, text in found.items() if text is not None and WAITS.get(key[0], "|") not in text}
    assert not wrong
    for place, members in enumerate((ENCODERS, PRIORS, LIKELIHOODS)):
        assert {key[place] for key in found} == set(members)


@pytest.mark.parametrize("name", sorted(objectives().keys() - {"TraceGraph_ELBO"}))  # its draws are tensors of a class
def test_every_objective_computes_where_its_model_does(name):
    encoder = make_encoder(ENCODERS["DiagonalNormal"])
    vae = VAE(StandardNormal(D), make_decoder(LIKELIHOODS["Bernoulli"]), encoder)
    assert traffic_of_a_step(vae, small_objective(objectives()[name]), make_data("Bernoulli")) is None


def test_mixed_devices_are_seen():
    """The test of the tests: a tensor that no one registered, in a model, and in an estimate."""
    encoder = make_encoder(ENCODERS["DiagonalNormal"])
    prior = lambda: dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1)  # noqa: E731
    vae = VAE(prior, make_decoder(LIKELIHOODS["Bernoulli"]), encoder)
    with pytest.raises(Exception, match="device"):
        traffic_of_a_step(vae, ELBO(), make_data("Bernoulli"))
    with Card():
        x = torch.ones(3, device=CARD)
        for mixed in (lambda: x + torch.ones(3), lambda: torch.stack([x[0], torch.tensor(1.0)]), x.numpy):
            with pytest.raises((AssertionError, TypeError, RuntimeError)):
                mixed()
        assert (x + torch.tensor(1.0)).device == CARD and x.sum().item() == 3.0


# ------------------------------------------------------------------------------------------------- with numbers


@pytest.fixture
def card():
    """The other device is there; modules move to it by getting new parameters."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Card():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def a_vae():
    return VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4))).to(CARD)


def some(count=40):
    return (torch.rand(count, 7) < 0.5).float().to(CARD)


VAES = {
    "terms": lambda vae, x: estimates.elbo_terms(vae, x, 5),
    "log p(x)": lambda vae, x: estimates.log_evidence(vae, x, 20),
    "paired": lambda vae, x: pyro_vae.paired_difference(pyro_vae.elbo(vae, x, 5), pyro_vae.elbo(vae, x, 6, seed=1)),
    "annealing": lambda vae, x: annealing.annealed_log_evidence(vae, x[:3], 2, 5, 2),
    "sandwich": lambda vae, x: annealing.sandwich(vae, 5, 2, 5, 2),
    "quadrature": lambda vae, x: evaluation.quadrature(vae, x[:3]),
    "ledger": lambda vae, x: pyro_vae.ledger(vae, x[:4], num_particles=10),
    "per dimension": lambda vae, x: diagnostics.kl_per_dimension(vae, x),
    "units": lambda vae, x: diagnostics.active_units(vae, x),
    "rate": lambda vae, x: diagnostics.rate_distortion(vae, x),
    "health": lambda vae, x: diagnostics.health(vae, x),
    "aggregate": lambda vae, x: aggregate.aggregate_posterior(vae, x, 20),
    "gaps": lambda vae, x: gaps.gap_report(vae, x[:4], estimates.log_evidence(vae, x[:4], 20), 3, 10),
    "ranks": lambda vae, x: calibration.simulation_based_calibration(vae, 30, 9),
    "grid": lambda vae, x: calibration.posterior_on_grid(vae, x[:3], num_points=41),
    "NUTS": lambda vae, x: calibration.posterior_by_nuts(vae, x[:1], 3, 3),
    "predictive": lambda vae, x: calibration.posterior_predictive_check(vae, x[:4], lambda x: x.sum(-1), 20),
    "normals": lambda vae, x: geometry.neighbours(*[geometry.posterior_normals(vae, x)] * 2, 3, geometry.wasserstein),
    "tangent": lambda vae, x: geometry.tangent(vae, x[:4, :2]),
    "odd": lambda vae, x: anomalies.anomaly_score(vae, x, 10),
    "gradients": lambda vae, x: gradient_variance.gradient_variance(ELBO(), vae, x[:5], 20),
    "pictures": lambda vae, x: (vae.sample(3), vae.reconstruct(x), vae.encode(x)),
}


@pytest.mark.parametrize("name", VAES)
def test_what_is_measured_of_a_model(card, name):
    assert str(VAES[name](a_vae(), some()))


@pytest.mark.filterwarnings("ignore")  # of a probe that 40 codes do not settle
def test_what_is_measured_of_codes(card):
    codes, labels = torch.randn(40, 3).to(CARD), torch.arange(40).to(CARD) % 4
    factors, log_w = torch.stack([labels, labels // 2], 1), torch.randn(100, 5).to(CARD)
    basis = torch.linalg.qr(codes)[0]
    found = [
        geometry.principal_components(codes, 2),
        geometry.principal_angles(basis, basis.roll(1, 0)),
        geometry.nearest(codes, codes, 3),
        representation.linear_probe(codes, labels, codes, labels),
        representation.knn_accuracy(codes, labels, codes, labels, 3),
        representation.confusions(labels.roll(1), labels),
        representation.class_distances(codes, labels),
        disentanglement.mig(codes, factors),
        disentanglement.sap(codes, factors),
        disentanglement.dci(codes, factors, 3),
        disentanglement.factor_vae_score(codes, factors, 20, 5),
        clouds.ball(codes),
        clouds.isotropy(codes),
        clouds.fit_normal(codes).sample(),
        clouds.fit_mixture(codes, 2).sample(),
        clouds.gap_statistic(codes, clouds.ball_sites(codes, 20), 1.0),
        sample_quality.frechet_distance(codes, codes.roll(1, 1)),
        sample_quality.precision_recall(codes, codes + 0.1),
        sample_quality.nearest_distance(codes, codes + 0.1),
        sample_quality.train_classifier(torch.rand(40, 1, 8, 8, device=CARD), labels, 8, 4, 1),
        tails.pareto_k(log_w),
        tails.standard_error_of_log_mean(log_w),
    ]
    assert all(map(str, found))


def test_other_models(card):
    """A discrete z summed over, missing numbers, the model whose answers are exact."""
    x = some(5)
    coins = VAE(
        priors.OneHotCategorical(3), Decoder(Mlp(3, 8, 7), Bernoulli()), discrete.OneHotCategorical(Mlp(7, 8, 3))
    )
    coins.to(CARD)
    assert str(evaluation.enumeration(coins, x)) and str(pyro_vae.ledger(coins, x, num_particles=10))
    holes = x.clone()
    holes[0, 1] = torch.nan
    filled = DiagonalNormal(nn.Sequential(missing.FillMissing(0.5), Mlp(7, 8, 4)))
    vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), likelihoods.Masked(likelihoods.Normal())), filled).to(CARD)
    assert missing.impute(vae, holes, 20, sample=True).device == CARD
    linear = exact.LinearGaussian(torch.ones(7, 2, device=CARD), torch.zeros(7, device=CARD), 0.5)
    assert str(estimates.elbo(linear.as_vae(), x, 3)) and linear.log_evidence(x).device == CARD


@pytest.fixture
def runs(card, monkeypatch):
    """Files can be written: safetensors reads memory, which the emulation has elsewhere."""
    save = checkpoints.save
    there = lambda tensors, words=None: save({name: value.cpu() for name, value in tensors.items()}, words)  # noqa: E731
    monkeypatch.setattr(checkpoints, "save", there)


def test_a_run_goes_on(runs, tmp_path):
    x, vae, twin = some(), a_vae(), a_vae()
    twin.load_state_dict(vae.state_dict())
    torch.manual_seed(7)
    whole = fit(vae, x, epochs=2, batch_size=16, x_valid=x)
    torch.manual_seed(7)
    fit(twin, x, epochs=1, batch_size=16, x_valid=x, folder=tmp_path)
    other = a_vae()
    parts = fit(other, x, epochs=2, batch_size=16, x_valid=x, folder=tmp_path, resume=True)
    assert parts["elbo"] == whole["elbo"] and parts["valid_elbo"] == whole["valid_elbo"]


def test_the_command_line(runs, monkeypatch, tmp_path, capsys):
    """Train from rows that stay outside, with pictures, evaluate, reconstruct: as on a GPU."""

    @contextmanager
    def join(device):
        yield parallel.Workers(device=CARD)

    monkeypatch.setattr(parallel, "join", join)
    monkeypatch.setattr(configuration, "_device", lambda name: CARD)
    run = str(tmp_path / "run")
    brief = ["--epochs", "1", "--eval_particles", "3", "--compiled", "false", "--batch_size", "512"]
    main(["train", "--out", run, *brief, "--resident", "false"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few draws
        main(["evaluate", run, "--num_examples", "10", "--num_particles", "10"])
    main(["reconstruct", run])
    said = capsys.readouterr()
    assert "parameters on lazy" in said.out and "error" not in said.err


# ------------------------------------------------------------------------------------------------- draws, settings


@pytest.mark.parametrize("shape", [(3,), (5, 7)])
def test_draws_without_checks_are_the_same(shape):
    """``normal`` and ``multinomial`` wait for the host within their kernels; what stands for them does not."""
    loc, scale, weight = torch.randn(shape), torch.rand(shape[-1:]) + 0.1, torch.rand(shape)
    draws = (lambda: torch.normal(loc, scale), lambda: torch.multinomial(weight, 1, True))
    for draw in draws:
        torch.manual_seed(1)
        expected = draw()
        torch.manual_seed(1)
        with PlainDraws():
            assert torch.equal(draw(), expected)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: torch.multinomial(x.exp(), 2, True), "aten.multinomial.default reads a value back to the host"),
        (lambda x: torch.normal(x, x.exp()), "aten.normal.Tensor_Tensor reads a value back to the host"),
        (lambda x: torch.linalg.cholesky(x @ x.T), "aten._linalg_check_errors.default reads a value back to the host"),
        (lambda x: x[torch.arange(2)], None),
        (lambda x: x[x > 0], "aten.index.Tensor gives a shape that depends on values"),
    ],
    ids=["multinomial", "normal", "cholesky", "index", "mask"],
)
def test_what_waits_for_the_host_unseen(function, found):
    cpu = torch.device("cpu")
    assert host_traffic(make_fx(function, tracing_mode="real")(torch.randn(3, 3)), cpu) == found


def test_counters_have_the_type_of_the_kernel():
    """CUDA's fused Adam reads each counter as four bytes, whatever the default type."""
    torch.set_default_dtype(torch.float64)
    weight = nn.Parameter(torch.ones(3))
    optimizer = Adam([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[weight]["step"].dtype == torch.float32 and weight.dtype == torch.float64


@pytest.mark.parametrize("name", ["Adam", "AdamW", "ClippedAdam", "Adagrad", "RMSprop"])
def test_optimisers(card, name):
    weight = nn.Parameter(torch.ones(3).to(CARD))
    optimizer = torch_optimizer(getattr(pyro.optim, name)({"lr": 0.1}))([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.device == CARD and weight.sum().item() < 3


@pytest.mark.parametrize("newer", [False, True])
def test_settings_of_products_are_put_back(newer):
    """Where torch's newer interface was used, reading the older one fails."""
    matmul = torch.backends.cuda.matmul
    try:
        if newer:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("medium")
        before = matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
        for precision, found in (("float32", "highest"), ("tf32", "high")):
            with tensor_cores(precision, torch.device("cuda")):
                assert torch.get_float32_matmul_precision() == found
                assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        assert before == (matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
        assert newer or torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"


def test_a_broken_recording_is_followed_by_one_that_ends_well(monkeypatch):
    """Streams as they were, and the reason is the first error, not that of the recording's end."""
    happened = []

    class Graph:
        def __init__(self, graph, stream, capture_error_mode="global"):
            happened.append("begin")

        def __enter__(self):
            return self

        def __exit__(self, kind, *rest):
            happened.append("end")
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    stands_in = {
        "device": lambda device: nullcontext(),
        "CUDAGraph": object,
        "graph": Graph,
        "Stream": lambda device: "side",
        "current_stream": lambda: "present",
        "set_stream": happened.append,
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setitem(RECORDERS, "cpu", CudaGraph)
    calls = []

    def refuses(x):
        calls.append(x)
        if len(calls) == 2:
            raise ValueError("waits for the host")
        return x + 1

    recorded = Recorded(refuses, torch.device("cpu"))
    with pytest.warns(RuntimeWarning, match="not recorded in a CUDA graph: ValueError: waits for the host"):
        outs = [recorded(torch.ones(2)).tolist() for _ in range(3)]
    assert outs == [[2.0, 2.0]] * 3 and happened == ["begin", "end", "present", "begin", "end"]
