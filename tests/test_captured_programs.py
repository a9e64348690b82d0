"""Other people's Pyro programs under ``FastSVI``, unchanged: eager ``SVI``'s losses, or eager with the reason.

The environment variable PYRO_VAE_STEPS sets the number of steps.
"""

import os

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_vae import FastSVI

STEPS = int(os.environ.get("PYRO_VAE_STEPS", "12"))


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


def allocation():
    """Latent Dirichlet allocation: each word's topic summed out, a plate of words in a plate of documents."""
    num_topics, num_words, length, documents = 3, 11, 6, 4
    net = nn.Sequential(nn.Linear(num_words, 5), nn.Sigmoid(), nn.Linear(5, num_topics), nn.Softmax(-1))

    def model(words):
        with pyro.plate("topics", num_topics):
            weights = pyro.sample("weights", dist.Gamma(1.0 / num_topics, 1.0))
            of_topic = pyro.sample("words_of_topic", dist.Dirichlet(torch.ones(num_words) / num_words))
        with pyro.plate("documents", documents):
            mix = pyro.sample("mix", dist.Dirichlet(weights))
            with pyro.plate("words", length):
                topic = pyro.sample("topic", dist.Categorical(mix), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(of_topic[topic]), obs=words)

    def guide(words):
        weights = pyro.param("weights_q", torch.ones(num_topics), constraint=dist.constraints.positive)
        concentration = pyro.param("words_q", torch.ones(num_topics, num_words), dist.constraints.greater_than(0.5))
        with pyro.plate("topics", num_topics):
            pyro.sample("weights", dist.Delta(weights))
            pyro.sample("words_of_topic", dist.Dirichlet(concentration))
        pyro.module("predictor", net)
        counts = torch.zeros(num_words, documents).scatter_add(0, words, torch.ones(words.shape))
        with pyro.plate("documents", documents):
            pyro.sample("mix", dist.Delta(net(counts.T), event_dim=1))

    return model, guide, TraceEnum_ELBO(max_plate_nesting=2), (torch.randint(num_words, (length, documents)),)


def hidden_markov():
    """Discrete states summed out along a sequence, masked at its end."""
    states, steps, width = 3, 4, 5

    def model(x, mask):
        transition = pyro.sample("transition", dist.Dirichlet(0.9 * torch.eye(states) + 0.1).to_event(1))
        emission = pyro.sample("emission", dist.Beta(0.5, 0.5).expand([states, width]).to_event(2))
        with pyro.plate("sequences", len(x), dim=-2):
            state = 0
            width_plate = pyro.plate("width", width, dim=-1)
            for t in pyro.markov(range(steps)):
                with poutine.mask(mask=mask[:, t : t + 1]):
                    state = pyro.sample(f"z{t}", dist.Categorical(transition[state]), infer={"enumerate": "parallel"})
                    with width_plate:
                        pyro.sample(f"x{t}", dist.Bernoulli(emission[state.squeeze(-1)]), obs=x[:, t])

    guide = AutoDelta(poutine.block(model, expose=["transition", "emission"]))
    x = (torch.rand(4, steps, width) < 0.4).to(torch.get_default_dtype())
    mask = torch.arange(steps) < torch.tensor([4, 3, 2, 4])[:, None]
    return model, guide, TraceEnum_ELBO(max_plate_nesting=2), (x, mask)


def semi_supervised(labelled):
    """A label that is summed over where it is unknown, and a style."""
    width, classes, d = 7, 3, 2
    of_label = nn.Sequential(nn.Linear(width, 6), nn.Softplus(), nn.Linear(6, classes))
    of_style = nn.Sequential(nn.Linear(width + classes, 6), nn.Softplus(), nn.Linear(6, 2 * d))
    net = nn.ModuleList([of_label, of_style, nn.Linear(classes + d, width)])

    def model(x, y=None):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(classes) / classes), obs=y)
            shape = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
            h = torch.cat([z.expand(*shape, -1), y.expand(*shape, -1)], -1)
            pyro.sample("x", dist.Bernoulli(logits=net[2](h)).to_event(1), obs=x)

    def guide(x, y=None):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=net[0](x)))
            shape = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
            h = torch.cat([x.expand(*shape, -1), y.expand(*shape, -1)], -1)
            loc, log_scale = net[1](h).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = (torch.rand(5, width) < 0.4).to(torch.get_default_dtype())
    y = (nn.functional.one_hot(torch.arange(5) % classes, classes).to(x),) if labelled else ()
    objective = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=not labelled)
    return model, config_enumerate(guide), objective, (x, *y)


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


def attend_infer_repeat():
    """Attend, infer, repeat with a fixed number of objects: a spatial transformer, presence by the score function.

    A recurrent guide, a recurrent baseline, everything about an object masked where it is absent.
    """
    side, window, what, width, objects = 7, 3, 2, 6, 2
    cell, baseline_cell = nn.LSTMCell(side**2 + 3 + what + 1, width), nn.LSTMCell(side**2 + 3 + what + 1, width)
    net = nn.ModuleList([cell, nn.Linear(width, 7), nn.Linear(window**2, 2 * what), nn.Linear(what, window**2)])
    baseline = nn.ModuleList([baseline_cell, nn.Linear(width, 1)])
    place = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.1, 1.0, 1.0])

    def moved(images, where, size):
        """Images seen through windows: where = (scale, x, y)."""
        zero = torch.zeros_like(where[:, 0])
        rows = [torch.stack([where[:, 0], zero, where[:, 1]], -1), torch.stack([zero, where[:, 0], where[:, 2]], -1)]
        grid = nn.functional.affine_grid(torch.stack(rows, -2), [len(images), 1, size, size], align_corners=False)
        return nn.functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]

    def model(x):
        pyro.module("decoder", net[3])
        with pyro.plate("data", len(x)):
            image, present = torch.zeros(len(x), side, side), torch.ones(len(x), 1)
            for t in range(objects):
                present = pyro.sample(f"present{t}", dist.Bernoulli(0.5 * present).to_event(1))
                with poutine.mask(mask=present.squeeze(-1).bool()):
                    where = pyro.sample(f"where{t}", dist.Normal(*place).expand([len(x), 3]).to_event(1))
                    z = pyro.sample(f"what{t}", dist.Normal(torch.zeros(len(x), what), 1.0).to_event(1))
                drawn = moved(net[3](z).sigmoid().unflatten(-1, (window, window)), where, side)
                image = image + drawn * present[:, :, None]
            pyro.sample("x", dist.Normal(image, 0.3).to_event(2), obs=x)

    def guide(x):
        pyro.module("guide", net)
        pyro.module("baseline", baseline)
        with pyro.plate("data", len(x)):
            where, z, present = torch.zeros(len(x), 3), torch.zeros(len(x), what), torch.ones(len(x), 1)
            state = other = (torch.zeros(len(x), width), torch.zeros(len(x), width))
            for t in range(objects):
                seen = torch.cat([x.flatten(1), where, z, present], -1)
                state, other = cell(seen, state), baseline_cell(seen.detach(), other)
                h = net[1](state[0])
                value = (baseline[1](other[0]) * present).squeeze(-1)
                q = dist.Bernoulli(h[:, :1].sigmoid() * present).to_event(1)
                present = pyro.sample(f"present{t}", q, infer={"baseline": {"baseline_value": value}})
                with poutine.mask(mask=present.squeeze(-1).bool()):
                    q = dist.Normal(place[0] + h[:, 1:4], place[1] * nn.functional.softplus(h[:, 4:7]))
                    where = pyro.sample(f"where{t}", q.to_event(1))
                    back = torch.stack([1 / where[:, 0], *(-where[:, 1:] / where[:, :1]).unbind(-1)], -1)
                    loc, log_scale = net[2](moved(x, back, window).flatten(1)).chunk(2, -1)
                    z = pyro.sample(f"what{t}", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, TraceGraph_ELBO(), (torch.rand(4, side, side),)


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


GUIDES = [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, low_rank]


def with_labels():
    return semi_supervised(labelled=True)


def without_labels():
    return semi_supervised(labelled=False)


PROGRAMS = [
    *(of(program, guide) for program in (eight_schools, regression) for guide in GUIDES),
    mixture,
    allocation,
    hidden_markov,
    with_labels,
    without_labels,
    topics,
    markov,
    attend_infer_repeat,
    subsampling,
    averaged_baseline,
]


def steps(svi_class, build, **settings):
    pyro.clear_param_store()
    torch.manual_seed(1)
    model, guide, objective, args = build()
    torch.manual_seed(3)
    svi = svi_class(model, guide, pyro.optim.ClippedAdam({"lr": 0.01}), objective, **settings)
    losses = [svi.step(*args) for _ in range(STEPS)]
    return losses, {name: p.detach().clone() for name, p in pyro.get_param_store().items()}, svi


@pytest.mark.parametrize("build", PROGRAMS, ids=[build.__name__ for build in PROGRAMS])
def test_programs_of_others(float64, build):
    expected, parameters, _ = steps(SVI, build)
    found, ours, svi = steps(FastSVI, build, backend="replay")
    said = svi.explain()
    assert "replayed, " in said and "eager, since" not in said, said
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=1e-9)
    assert len(set(found)) == STEPS
    assert ours.keys() == parameters.keys() and ours
    for name in ours:
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
