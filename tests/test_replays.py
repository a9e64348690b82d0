"""Programs recorded once and replayed: the same draws and numbers as eager Pyro, whatever the terms; or a reason."""

import functools
import itertools
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_captured_members import make_data
from test_cross_product import ENCODERS, LIKELIHOODS, PRIORS, B, D, E, make_decoder, make_encoder, make_prior
from torch import nn

import pyro_vae.passes
import pyro_vae.replays
from pyro_vae import (
    VAE,
    Bernoulli,
    Decoder,
    DiagonalNormal,
    Mlp,
    StandardNormal,
    annealed_log_evidence,
    check_vae,
    elbo_terms,
    log_evidence,
    priors,
)
from pyro_vae.annealing import sandwich
from pyro_vae.capture import has_compiler
from pyro_vae.contracts import untouched
from pyro_vae.exact import LinearGaussian
from pyro_vae.passes import even, passes
from pyro_vae.replays import Replay

K = 7
# Of each kind those that differ in how they draw and score; the comparison with eager guards the others as they run.
SCORED = [
    "Bernoulli",
    "Categorical",
    "DiscretizedLogisticMixture",
    "HeteroscedasticNormal",
    "Masked",
    "MixedColumns",
    "StudentT",
]
DRAWN = [
    "AutoregressiveFlow",
    "Bernoulli",
    "FullNormal",
    "MixtureOfNormals",
    "OneHotCategorical",
    "SplineFlow",
    "VonMisesFisher",
]
BEFORE = ["Dirichlet", "FlowPrior", "MixtureOfNormals", "StandardNormal", "StudentT"]  # VampPrior has a test of its own


@pytest.fixture(autouse=True)
def own_store():
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def recorded(monkeypatch):
    """Replay operation by operation, without a compiler; the list of what was recorded."""
    made = []

    def make(*args, **kwargs):
        made.append(Replay(*args, **kwargs, backend="replay"))
        return made[-1]

    monkeypatch.setattr(pyro_vae.passes, "Replay", make)
    return made


def bits_vae(latent_dim=D, **parts):
    torch.manual_seed(3)
    decoder = Decoder(Mlp(latent_dim, 6, E), Bernoulli())
    pieces = {"prior": StandardNormal(latent_dim), "decoder": decoder, "encoder": DiagonalNormal(Mlp(E, 6, 2 * D))}
    return VAE(**(pieces | parts)).double()


def bits(rows=B):
    return (torch.rand(rows, E, generator=torch.Generator().manual_seed(1)) < 0.5).double()


# ----------------------------------------------------------------------------------------------- equal to eager Pyro


def assert_equal(vae, x, recorded):
    """Passes of 3, 3 and 1 particles: what is replayed and what is not, in one random stream."""
    numbers = 15 * x[0].numel()
    eager = log_evidence(vae, x, K, compiled=False, max_elements=numbers, seed=5)
    found = log_evidence(vae, x, K, compiled=True, max_elements=numbers, seed=5)
    assert len(recorded) == 1 and "replayed" in recorded[0].explain()
    torch.testing.assert_close(found.values, eager.values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.errors, eager.errors, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SCORED)
def test_likelihoods(float64, recorded, name):
    torch.manual_seed(0)
    vae = VAE(StandardNormal(D), make_decoder(LIKELIHOODS[name]), DiagonalNormal(Mlp(E, 2 * D))).double()
    assert_equal(vae, make_data(name), recorded)


@pytest.mark.parametrize("name", DRAWN)
def test_encoders(float64, recorded, name):
    torch.manual_seed(0)
    posterior, x = make_encoder(ENCODERS[name]), torch.rand(B, E)
    for prior in PRIORS.values():  # the first that goes with it
        vae = VAE(make_prior(prior, posterior), make_decoder(LIKELIHOODS["Normal"]), posterior).double()
        try:
            check_vae(vae, x)
            break
        except ValueError:
            continue
    assert_equal(vae, x, recorded)


@pytest.mark.parametrize("name", BEFORE)
def test_priors(float64, recorded, name):
    torch.manual_seed(0)
    x = torch.rand(B, E)
    for encoder in ENCODERS.values():
        posterior = make_encoder(encoder)
        vae = VAE(make_prior(PRIORS[name], posterior), make_decoder(LIKELIHOODS["Normal"]), posterior).double()
        try:
            check_vae(vae, x)
            break
        except ValueError:
            continue
    assert_equal(vae, x, recorded)


def noisy_vae():
    """Batch normalisation and dropout, parts in training mode and parts not."""
    net = nn.Sequential(nn.Linear(E, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2 * D))
    vae = bits_vae(encoder=DiagonalNormal(net))
    vae.train()
    net[1].eval()
    return vae


def test_nothing_is_changed(float64, recorded):
    vae, x = noisy_vae(), bits()
    pyro.infer.Trace_ELBO().loss_and_grads(vae.model, vae.guide, x)
    parameters = dict(pyro.get_param_store().named_parameters())
    tensors = {name: t.clone() for name, t in vae.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in vae.named_parameters()}
    flags, state = [part.training for part in vae.modules()], torch.get_rng_state()
    assert_equal(vae, x, recorded)
    annealed_log_evidence(vae, x, 3, 4, 2, compiled=True)
    assert len(recorded) == 2
    assert all(torch.equal(t, tensors[name]) for name, t in vae.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in vae.named_parameters())
    assert flags == [part.training for part in vae.modules()] and torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    store = dict(pyro.get_param_store().named_parameters())
    assert store.keys() == parameters.keys() and all(store[name] is p for name, p in parameters.items())


def test_terms_of_the_elbo(float64, recorded):
    vae, x = bits_vae(), bits()
    eager, found = (elbo_terms(vae, x, K, compiled=c, max_elements=15 * E) for c in (False, True))
    assert len(recorded) == 1
    for name, estimate in eager.items():
        torch.testing.assert_close(found[name].values, estimate.values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[name].errors, estimate.errors, rtol=1e-6, atol=1e-9)


def test_two_latent_variables_of_any_program(float64, recorded):
    class TwoLayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(E, 2)

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                above = pyro.sample("above", dist.Normal(torch.zeros(()), 1.0))
                z = pyro.sample("z", dist.Normal(above, 0.5))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, E]).to_event(1), obs=x)

        def guide(self, x):
            loc, other = self.net(x).unbind(-1)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("above", dist.Normal(loc, 0.7))
                pyro.sample("z", dist.Normal(other, 0.3))

    torch.manual_seed(0)
    assert_equal(TwoLayers().double(), torch.rand(B, E), recorded)


@pytest.mark.parametrize("from_encoder", [False, True])
def test_annealing(float64, recorded, from_encoder):
    """The pilot's chains and those that count are recorded once each, and serve all examples."""
    vae, x = bits_vae(), bits(6)
    settings = {"from_encoder": from_encoder, "max_elements": 3 * 5 * E}  # three rows at once
    eager, found = (annealed_log_evidence(vae, x, 5, 6, 2, compiled=c, **settings) for c in (False, True))
    assert len(recorded) == 2
    torch.testing.assert_close(found.values, eager.values, rtol=1e-9, atol=1e-9)
    below, above = (sandwich(vae, 6, 5, 6, 2, compiled=c, **settings) for c in (False, True))
    assert len(recorded) == 4
    torch.testing.assert_close(above.lower.values, below.lower.values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(above.upper.values, below.upper.values, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled(monkeypatch):
    """By the compiler, in single precision: importance sampling and annealing."""
    made = []

    def make(*args, **kwargs):
        made.append(Replay(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(pyro_vae.passes, "Replay", make)
    vae, x = bits_vae(encoder=DiagonalNormal(Mlp(E, 6, 2 * D))).float(), bits().float()
    eager, found = (log_evidence(vae, x, 30, compiled=c, max_elements=15 * E) for c in (False, True))
    torch.testing.assert_close(found.values, eager.values, rtol=1e-5, atol=1e-5)
    settings = {"num_chains": 4, "num_temperatures": 3, "leapfrog_steps": 2, "seed": 1}
    eager, found = (annealed_log_evidence(vae, x, compiled=c, **settings) for c in (False, True))
    torch.testing.assert_close(found.values, eager.values, rtol=1e-4, atol=1e-4)
    assert len(made) == 2 and all(replay.explain().startswith("compiled, ") for replay in made), made


# ------------------------------------------------------------------------------------------------------ what is cut


def test_what_x_alone_decides_runs_once(float64, recorded):
    """The networks of the encoder and of VampPrior's components run once for each batch of rows, not in every pass."""
    torch.manual_seed(0)
    vae = bits_vae(prior=priors.VampPrior(encoder := DiagonalNormal(Mlp(E, 6, 2 * D)), bits(4)), encoder=encoder)
    assert_equal(vae, bits(), recorded)
    replay = recorded[0]
    first, second = (
        [node.target for node in g.graph.nodes if node.target is torch.ops.aten.addmm.default]
        for g in (replay._first, replay._second)
    )
    assert len(first) == 4 and len(second) == 2, "two layers for x and for the pseudo-inputs; the decoder's"
    assert "operations each time and" in replay.explain()


def test_changes_in_place_stay_together(float64):
    """A buffer made of nothing, filled anew each time, belongs to the part that runs each time."""

    def function(x):
        total = torch.zeros(3)
        view = total[:2]
        view.add_(torch.rand(2))
        total += x.exp()
        noise = x.exp().uniform_()
        kept = torch.zeros(3)
        kept[:2].add_(x[:2].cos())
        return total, noise * 2, kept * torch.rand(3)

    replay = Replay(function, [torch.ones(3)], backend="replay")
    torch.manual_seed(0)
    expected = [function(torch.zeros(3)) for _ in range(3)]
    torch.manual_seed(0)
    run = replay.at(torch.zeros(3))
    found = [run() for _ in range(3)]
    torch.testing.assert_close(found, expected)


def test_parameters_changed_in_place_are_seen(float64):
    weight = torch.ones(3)
    replay = Replay(lambda x: (weight * torch.rand(3) * x,), [torch.ones(3)], backend="replay")
    weight.mul_(2)
    state = torch.get_rng_state()
    found = replay.at(torch.ones(3))()[0]
    torch.set_rng_state(state)
    torch.testing.assert_close(found, 2 * torch.rand(3))


# ------------------------------------------------------------------------------------------------------- eager again


class Branching(VAE):
    def guide(self, x):
        q = self.encoder(x)
        if q.mean.sum() > 100:
            raise AssertionError
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", q)


class Counting(VAE):
    calls = 0

    def guide(self, x):
        Counting.calls += 1
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Normal(0.1 * Counting.calls * torch.ones(len(x), D), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (Branching, r"a Python number or branch is made of a tensor's value.*test_replays.py:\d+, .*if q.mean.sum"),
        (Counting, "the recorded graph differs from the program by"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(float64, program, reason):
    vae = bits_vae()
    vae, x = program(vae.prior, vae.decoder, vae.encoder), bits()
    Counting.calls = 0
    eager = log_evidence(vae, x, K, compiled=False, max_elements=15 * E)
    Counting.calls = 0
    with pytest.warns(RuntimeWarning, match=f"evaluated by eager Pyro, not compiled: {reason}"):
        found = log_evidence(vae, x, K, compiled=True, max_elements=15 * E)
    assert eager.values.isfinite().all()
    if program is Branching:
        torch.testing.assert_close(found.values, eager.values, rtol=0, atol=0)


def test_other_layouts_in_memory(float64):
    replay = Replay(lambda x, z: (x.exp().view(-1) * z.view(-1),), [torch.ones(3, 2)], [torch.ones(3, 2)], "replay")
    x, z = torch.rand(2, 3).T, torch.rand(2).expand(3, 2)
    torch.testing.assert_close(replay.at(x)(z)[0], (x.exp() * z).reshape(-1))


def test_without_a_compiler_the_graph_is_replayed(float64, monkeypatch):
    def fail(*args):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(pyro_vae.replays, "compile_graph", fail)
    replay = Replay(lambda x: (x + torch.rand(3),), [torch.ones(3)])
    assert replay.explain().startswith("replayed, not compiled (no compiler here), 2 operations")
    assert replay.at(torch.ones(3))()[0].shape == (3,)


def test_short_runs_are_not_compiled(float64, recorded):
    vae, x = bits_vae(), bits()
    log_evidence(vae, x, K)
    annealed_log_evidence(vae, x, 3, 4, 2)
    assert recorded == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyro_vae.passes._WORTH["cpu"], old = x.numel() * K, pyro_vae.passes._WORTH["cpu"]
        try:
            log_evidence(vae, x, K)
        finally:
            pyro_vae.passes._WORTH["cpu"] = old
    assert len(recorded) == 1


# ------------------------------------------------------------------------------------------------------------ passes


def test_even():
    for total, most in itertools.product(range(1, 40), range(1, 45)):
        size = even(total, most)
        assert min(total, most) / 2 < size <= min(total, most)
        assert all(total % size <= total % other for other in range(min(total, most) // 2 + 1, min(total, most) + 1))
    assert even(10000, 52) == 50


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("max_elements", [1, 9 * E, 40 * E, None])
def test_every_particle_of_every_example_comes_once(float64, recorded, compiled, max_elements):
    lg = LinearGaussian(torch.eye(E, D), torch.zeros(E), 0.5)
    counts = torch.zeros(11)
    for rows, terms in passes(lg.as_vae(), torch.randn(11, E), K, max_elements, compiled):
        assert terms.log_w.shape[1] == rows.stop - rows.start
        counts[rows] += len(terms.log_w)
        assert terms.log_w.numel() * E <= max(E, max_elements or 2**20)
    assert counts.tolist() == [K] * 11


def check_passes(module):
    """Each particle of each example once, in the terms that the right passes have; `module` may be a mutant of it."""
    torch.manual_seed(0)
    vae, x = bits_vae(), bits(71)  # two times 35 rows in passes of 3, 3 and 1 particles, and one row
    with untouched(vae):
        state = torch.get_rng_state()
        eager = list(passes(vae, x, K, 192 * E, False))
        for compiled in (False, True):
            torch.set_rng_state(state)
            found = list(module.passes(vae, x, K, 192 * E, compiled))
            assert [rows for rows, _ in found] == [rows for rows, _ in eager]
            for (_, a), (_, b) in zip(found, eager, strict=True):
                torch.testing.assert_close(a[:3], b[:3], rtol=1e-10, atol=1e-10)
    assert [(rows.start, len(terms.log_w)) for rows, terms in eager] == [
        *((start, count) for start in (0, 35) for count in (3, 3, 1)),
        (70, 7),
    ]


MUTATIONS = [
    ("min(particles, num_particles - done)", "particles"),
    ("range(0, num_particles, particles)", "range(0, num_particles - particles, particles)"),
    ("slice(start, min(start + batch, len(x)))", "slice(0, batch)"),
    ("and count == particles", ""),
    ("run = replay.at(x[rows]) if", "run = replay.at(x[:batch]) if"),
    ("log_px, log_pz, log_qz = run()", "log_px, log_qz, log_pz = run()"),
    ("_terms(vae, _encoded_once(vae, x), x, count)[:3]", "_terms(vae, _encoded_once(vae, x * 0), x, count)[:3]"),
]


@pytest.mark.parametrize(
    "line, mutant", [("import pyro\n", "import pyro\n"), *MUTATIONS], ids=range(len(MUTATIONS) + 1)
)
def test_a_mutation_of_the_passes_is_seen(float64, line, mutant):
    source = Path(pyro_vae.passes.__file__).read_text(encoding="utf-8")
    assert source.count(line) == 1, f"the mutated line moved: {line}"
    module = types.ModuleType("mutated_passes")
    exec(compile(source.replace(line, mutant), "mutated_passes.py", "exec"), module.__dict__)
    module.Replay = functools.partial(Replay, backend="replay")
    if line == mutant:
        check_passes(module)
        return
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check_passes(module)


def test_memory_does_not_grow_with_the_number_of_examples():
    """The most that a process holds, for 200 times as many examples: less than half of their weights comes on top."""
    code = """if True:
        import resource, torch
        from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal, log_evidence
        vae = VAE(StandardNormal(2), Decoder(Mlp(2, 4, 10), Bernoulli()), DiagonalNormal(Mlp(10, 4, 4)))
        for rows in (20, 4000):
            log_evidence(vae, torch.ones(rows, 10), 2000, max_elements=2**18)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    few, many = map(int, run.stdout.split())
    assert many - few < 0.5 * 4000 * 2000 * 8, (few, many)
