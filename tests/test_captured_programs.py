"""Other people's Pyro programs under ``FastSVI``, unchanged: eager ``SVI``'s losses, or eager with the reason."""

import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_vae import FastSVI

STEPS = 12


def eight_schools(make_guide):
    y, sigma = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(25.0))
        with pyro.plate("schools", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    return model, make_guide(model), Trace_ELBO(), (sigma, y)


def regression(make_guide):
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](3, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

        def forward(self, x, y=None):
            sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)

    model, x = Regression(), torch.randn(17, 3)
    return model, make_guide(model), Trace_ELBO(), (x, x @ torch.tensor([1.0, -2, 0.5]) + 0.3)


def mixture():
    @config_enumerate
    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    guide = AutoDelta(poutine.block(model, expose=["weights", "locs", "scale"]))
    return model, guide, TraceEnum_ELBO(max_plate_nesting=1), (torch.tensor([0.0, 1, 10, 11, 12]),)


def topics():
    """ProdLDA: dropout and batch norm in encoder and decoder, a logistic-normal over topics."""
    words, num_topics = 19, 4
    net = nn.Sequential(nn.Linear(words, 11), nn.Softplus(), nn.Dropout(0.2))
    heads = [nn.Sequential(nn.Linear(11, num_topics), nn.BatchNorm1d(num_topics, affine=False)) for _ in range(2)]
    beta = nn.Sequential(nn.Dropout(0.2), nn.Linear(num_topics, words, bias=False), nn.BatchNorm1d(words, affine=False))
    encoder, decoder = nn.ModuleList([net, *heads]), nn.ModuleList([beta])

    def model(docs):
        pyro.module("decoder", decoder)
        with pyro.plate("documents", len(docs)):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(num_topics), 1.0).to_event(1))
            probs = decoder[0](theta.softmax(-1)).softmax(-1)
            pyro.sample("obs", dist.Multinomial(40, probs), obs=docs)

    def guide(docs):
        pyro.module("encoder", encoder)
        with pyro.plate("documents", len(docs)):
            h = encoder[0](docs)
            scale = (0.5 * encoder[2](h)).exp()
            pyro.sample("theta", dist.Normal(encoder[1](h), scale).to_event(1))

    docs = dist.Multinomial(40, torch.rand(8, words)).sample()
    return model, guide, TraceMeanField_ELBO(), (docs,)


def markov():
    """As the deep Markov model: a recurrent guide, masked steps of a sequence, annealed terms."""
    steps, width, d = 4, 6, 3
    transition, emission, rnn = nn.Linear(d, 2 * d), nn.Linear(d, width), nn.GRU(width, 5, batch_first=True)
    combine, net = nn.Linear(5 + d, 2 * d), nn.ModuleList()
    net.extend([transition, emission, rnn, combine])

    def model(x, reverse, mask, factor):
        pyro.module("dmm", net)
        z = torch.zeros(d).expand(len(x), d)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(steps)):
                loc, log_scale = transition(z).chunk(2, -1)
                with poutine.scale(scale=factor):
                    q = dist.Normal(loc, log_scale.exp()).mask(mask[:, t : t + 1]).to_event(1)
                    z = pyro.sample(f"z{t}", q)
                logits = emission(z)
                pyro.sample(f"x{t}", dist.Bernoulli(logits=logits).mask(mask[:, t : t + 1]).to_event(1), obs=x[:, t])

    def guide(x, reverse, mask, factor):
        pyro.module("dmm", net)
        h, _ = rnn(reverse)
        z = torch.zeros(d).expand(len(x), d)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(steps)):
                loc, log_scale = combine(torch.cat([h[:, steps - 1 - t], z], -1)).chunk(2, -1)
                with poutine.scale(scale=factor):
                    q = dist.Normal(loc, log_scale.exp()).mask(mask[:, t : t + 1]).to_event(1)
                    z = pyro.sample(f"z{t}", q)

    x = (torch.rand(7, steps, width) < 0.4).to(torch.get_default_dtype())
    lengths = torch.tensor([4, 4, 3, 3, 2, 1, 1])
    mask = torch.arange(steps) < lengths[:, None]
    return model, guide, Trace_ELBO(), (x, x.flip(1), mask, torch.tensor(0.3))


def subsampling():
    """A plate that draws which rows it takes, under a scale and a mask."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with (
            poutine.scale(scale=0.5),
            pyro.plate("data", len(x), subsample_size=4) as index,
            poutine.mask(mask=x[index] > -1),
        ):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])

    def guide(x):
        m, s = pyro.param("m", torch.tensor(0.1)), pyro.param("s", torch.tensor(0.7), dist.constraints.positive)
        with poutine.scale(scale=0.5), pyro.plate("data", len(x), subsample_size=4):
            pass
        pyro.sample("loc", dist.Normal(m, s))

    return model, guide, Trace_ELBO(), (torch.randn(23),)


def averaged_baseline():
    """A discrete latent site whose baseline is a decaying average, kept in the parameter store."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits), infer={"baseline": {"use_decaying_avg_baseline": True}})

    return model, guide, TraceGraph_ELBO(), (torch.randn(6),)


def of(program, make_guide):
    build = lambda: program(make_guide)  # noqa: E731
    build.__name__ = f"{program.__name__}-{make_guide.__name__}"
    return build


def low_rank(model):
    return AutoLowRankMultivariateNormal(model, rank=2)


# Each program with what it says where it stays eager; None: captured.
PROGRAMS = [
    (of(eight_schools, AutoNormal), None),
    (of(eight_schools, AutoDiagonalNormal), None),
    (of(eight_schools, low_rank), None),
    (of(regression, AutoNormal), None),
    (of(regression, AutoDiagonalNormal), None),
    (of(regression, low_rank), None),
    (mixture, r"branch is made of a tensor's value.* \(in util.py:\d+, .*mask.all"),
    (topics, None),
    (markov, None),
    (subsampling, None),
    (averaged_baseline, "assigns '__baseline_avg_downstream_cost_z' in Pyro's parameter store"),
]


def steps(svi_class, build, **settings):
    pyro.clear_param_store()
    torch.manual_seed(1)
    model, guide, objective, args = build()
    torch.manual_seed(3)
    svi = svi_class(model, guide, pyro.optim.ClippedAdam({"lr": 0.01}), objective, **settings)
    losses = [svi.step(*args) for _ in range(STEPS)]
    return losses, {name: p.detach().clone() for name, p in pyro.get_param_store().items()}, svi


@pytest.mark.parametrize(("build", "reason"), PROGRAMS, ids=[build.__name__ for build, _ in PROGRAMS])
def test_programs_of_others(float64, build, reason):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this step runs as eager")
        expected, parameters, _ = steps(SVI, build)
        found, ours, svi = steps(FastSVI, build, backend="replay")
    said = svi.explain()
    if reason is None:
        assert "replayed, " in said and "eager, since" not in said, said
    else:
        assert "eager, since" in said and re.search(reason, said), said
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=1e-9)
    assert len(set(found)) == STEPS
    for name in ours:
        if not name.startswith("__baseline"):
            torch.testing.assert_close(ours[name], parameters[name], rtol=1e-7, atol=1e-9, msg=name)


def test_a_place_in_the_program_is_named(float64):
    """Where a value becomes a Python number, the line and the site before it are told."""

    def model(x):
        z = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        if z > 1e6:
            raise RuntimeError
        pyro.sample("x", dist.Normal(0.0, z).expand([len(x)]).to_event(1), obs=x)

    svi = FastSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), backend="replay")
    said = r"use torch.where, or keep the tensor \(in test_captured_programs.py:\d+, 'if z > 1e6:'\) .*site 'scale'"
    with pytest.warns(RuntimeWarning, match=said):
        for _ in range(3):
            svi.step(torch.randn(5))


def test_a_place_of_a_mask_index_is_named(float64):
    def model(x):
        z = pyro.sample("loc", dist.Normal(0.0, 1.0))
        rows = x[x > 0]
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(rows)]).to_event(1), obs=rows)

    svi = FastSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), backend="replay")
    with pytest.warns(
        RuntimeWarning,
        match=r"torch.where instead of a mask index \(in test_captured_programs.py:\d+, 'rows = x\[x > 0\]'\)",
    ):
        for _ in range(3):
            svi.step(torch.randn(5).abs())
