"""Forty-five combinations of model, guide and objective in plain Pyro: eager ``SVI``'s losses and parameters, captured.

Nothing of this library but ``FastSVI``. The environment variable PYRO_VAE_STEPS sets the number of steps.
"""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoMultivariateNormal
from test_captured_members import assert_equal_to_eager
from torch import nn
from torch.distributions import constraints

from pyro_vae import IWAE

B, D, E, K, C = 5, 2, 7, 3, 4


def mlp(num_inputs, num_outputs, bias=True):
    return nn.Sequential(nn.Linear(num_inputs, 6), nn.Tanh(), nn.Linear(6, num_outputs, bias=bias))


def bits():
    return (torch.rand(B, E) < 0.4).to(torch.get_default_dtype())


def standard(z_dim=D):
    return dist.Normal(torch.zeros(z_dim), 1.0).to_event(1)


def normal(h):
    loc, log_scale = h.chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def bernoulli(h):
    return dist.Bernoulli(logits=h).to_event(1)


def vae(
    prior=standard,
    posterior=normal,
    likelihood=bernoulli,
    objective=Trace_ELBO,
    x=bits,
    z_dim=D,
    num_outputs=E,
    num_posterior=2 * D,
    parts=(),
    infer=None,
    middle=(),
):
    """A VAE of plain functions: () -> p(z), h -> q(z | x), h -> p(x | z); ``parts`` are modules that these hold."""
    # A bias before a batch norm has no gradient but rounding errors, of which Adam makes steps of full size.
    decoder, encoder = mlp(z_dim, num_outputs), mlp(E, num_posterior, bias=not middle)
    net = nn.ModuleList([decoder, nn.Sequential(encoder, *middle), *parts])

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            return pyro.sample("x", likelihood(net[0](z)), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", posterior(net[1](x)), infer=infer or {})

    return model, guide, objective(), (x(),)


# ------------------------------------------------------------------------------------------------- likelihoods


def continuous_bernoulli():
    def p(h):
        return dist.ContinuousBernoulli(logits=h).to_event(1)

    return vae(likelihood=p, x=lambda: torch.rand(B, E))


def gaussian_with_learned_scale():
    def p(h):
        scale = pyro.param("scale", torch.tensor(0.7), constraints.positive)
        return dist.Normal(h, scale).to_event(1)

    return vae(likelihood=p, x=lambda: torch.randn(B, E))


def categorical_256():
    def p(h):
        return dist.Categorical(logits=h.unflatten(-1, (E, 256))).to_event(1)

    def x():
        return torch.randint(256, (B, E)).to(torch.get_default_dtype())

    return vae(likelihood=p, num_outputs=256 * E, x=x)


def laplace_likelihood():
    return vae(likelihood=lambda h: dist.Laplace(h, 0.5).to_event(1), x=lambda: torch.randn(B, E))


def student_t_likelihood():
    return vae(likelihood=lambda h: dist.StudentT(4.0, h, 0.5).to_event(1), x=lambda: torch.randn(B, E))


def beta_likelihood():
    def p(h):
        a, b = nn.functional.softplus(h).chunk(2, -1)
        return dist.Beta(a, b).to_event(1)

    return vae(likelihood=p, num_outputs=2 * E, x=lambda: 0.01 + 0.98 * torch.rand(B, E))


# ------------------------------------------------------------------------------------------------- priors


def mixture_prior():
    loc, logits = nn.Parameter(torch.randn(C, D)), nn.Parameter(torch.zeros(C))
    held = nn.ParameterList([loc, logits])

    def p():
        return dist.MixtureSameFamily(dist.Categorical(logits=held[1]), dist.Normal(held[0], 1.0).to_event(1))

    return vae(prior=p, parts=[held])


def vamp_prior():
    pseudo, encoder = nn.ParameterList([nn.Parameter(torch.rand(C, E))]), mlp(E, 2 * D)

    def p():
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(C)), normal(encoder(pseudo[0])))

    return vae(prior=p, parts=[pseudo, encoder])


def flow_prior():
    flow = transforms.affine_coupling(D, hidden_dims=[5])
    return vae(prior=lambda: dist.TransformedDistribution(standard(), [flow]), parts=[flow])


# ------------------------------------------------------------------------------------------------- posteriors


def flow_guide(make):
    def build():
        flow = make()
        return vae(posterior=lambda h: dist.TransformedDistribution(normal(h), [flow]), parts=[flow])

    return build


def householder():
    return transforms.Householder(D, count_transforms=2)


def full_covariance():
    def q(h):
        loc, rest = h[..., :D], h[..., D:]
        diagonal, below = rest[..., :D].exp(), rest[..., D:]
        zero = torch.zeros_like(below[..., 0])
        first = torch.stack([diagonal[..., 0], zero], -1)
        second = torch.stack([below[..., 0], diagonal[..., 1]], -1)
        return dist.MultivariateNormal(loc, scale_tril=torch.stack([first, second], -2))

    return vae(posterior=q, num_posterior=5)


def positive_pair(family):
    """Latents of two positive parameters."""

    def q(h):
        a, b = (0.5 + nn.functional.softplus(h)).chunk(2, -1)
        return family(a, b).to_event(1)

    return lambda: vae(prior=lambda: family(torch.ones(D), 1.0 * torch.ones(D)).to_event(1), posterior=q)


def dirichlet_latent():
    def q(h):
        return dist.Dirichlet(0.5 + nn.functional.softplus(h))

    return vae(prior=lambda: dist.Dirichlet(torch.ones(C)), posterior=q, z_dim=C, num_posterior=C)


def laplace_latent():
    def q(h):
        loc, log_scale = h.chunk(2, -1)
        return dist.Laplace(loc, log_scale.exp()).to_event(1)

    return vae(prior=lambda: dist.Laplace(torch.zeros(D), 1.0).to_event(1), posterior=q)


def logistic_normal_latent():
    def onto_the_simplex(base):
        return dist.TransformedDistribution(base, [torch.distributions.transforms.StickBreakingTransform()])

    return vae(lambda: onto_the_simplex(standard()), lambda h: onto_the_simplex(normal(h)), z_dim=D + 1)


def gumbel_softmax_latent():
    def family(logits):
        return dist.RelaxedOneHotCategorical(torch.tensor(0.7), logits=logits)

    return vae(lambda: family(torch.zeros(C)), family, z_dim=C, num_posterior=C)


def straight_through_latent():
    def q(h):
        return dist.RelaxedBernoulliStraightThrough(torch.tensor(0.7), logits=h).to_event(1)

    def prior():
        return dist.RelaxedBernoulliStraightThrough(torch.tensor(0.7), logits=torch.zeros(D)).to_event(1)

    return vae(prior, q, num_posterior=D)


def coins(objective=Trace_ELBO, infer=None, parts=()):
    """Bernoulli latents, by the score function."""
    half = lambda: dist.Bernoulli(0.5 * torch.ones(D)).to_event(1)  # noqa: E731
    return vae(half, bernoulli, objective=objective, num_posterior=D, infer=infer, parts=parts)


def coins_with_a_baseline_network():
    baseline = mlp(1, B)
    infer = {"baseline": {"nn_baseline": lambda x: baseline(x).squeeze(0), "nn_baseline_input": torch.ones(1, 1)}}
    return coins(TraceGraph_ELBO, infer, [baseline])


def coins_with_an_averaged_baseline():
    return coins(TraceGraph_ELBO, {"baseline": {"use_decaying_avg_baseline": True}})


# ------------------------------------------------------------------------------------------------- objectives


def particles(vectorised):
    return lambda: vae(objective=lambda: Trace_ELBO(K, vectorize_particles=vectorised, max_plate_nesting=1))


def renyi():
    return vae(objective=lambda: RenyiELBO(0.5, K, vectorize_particles=True, max_plate_nesting=1))


def wake_sleep():
    model, guide, objective, (x,) = vae(objective=lambda: ReweightedWakeSleep(K, max_plate_nesting=1))
    return model, lambda x, observations=None: guide(x), objective, (x,)


# ------------------------------------------------------------------------------------------------- handlers, structure


def scaled():
    model, guide, objective, args = vae()
    return poutine.scale(model, 0.3), poutine.scale(guide, 0.3), objective, args


def masked():
    model, guide, objective, (x,) = vae()
    mask = torch.arange(B) != 2
    return poutine.mask(model, mask), poutine.mask(guide, mask), objective, (x,)


def factor():
    model, guide, objective, args = vae()

    def penalised(x):
        model(x)
        pyro.factor("small", -0.1 * pyro.param("extra", torch.tensor(0.7)).square())

    return penalised, guide, objective, args


def two_layers():
    net = nn.ModuleList([mlp(E, 2 * D), mlp(D, 2 * K), mlp(K, 2 * D), mlp(D, E)])

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            top = pyro.sample("z2", standard(K))
            z = pyro.sample("z1", normal(net[2](top)))
            pyro.sample("x", bernoulli(net[3](z)), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z1", normal(net[0](x)))
            pyro.sample("z2", normal(net[1](z)))

    return model, guide, Trace_ELBO(), (bits(),)


def auto_guide():
    def model(x):
        loc = pyro.sample("loc", standard(E))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    return model, AutoMultivariateNormal(model), Trace_ELBO(), (torch.randn(B, E),)


def batch_norm():
    return vae(middle=[nn.BatchNorm1d(2 * D)])


def dropout():
    return vae(middle=[nn.Dropout(0.3)])


def enumerated():
    model, guide, _, args = vae(
        lambda: dist.OneHotCategorical(logits=torch.zeros(C)),
        lambda h: dist.OneHotCategorical(logits=h),
        z_dim=C,
        num_posterior=C,
    )
    return model, config_enumerate(guide), TraceEnum_ELBO(max_plate_nesting=1), args


def own_subsample():
    net = nn.ModuleList([mlp(E, 2 * D), mlp(D, E)])

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", standard())
            pyro.sample("x", bernoulli(net[1](z)), obs=x[index])

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x), subsample_size=3) as index:
            pyro.sample("z", normal(net[0](x[index])))

    return model, guide, Trace_ELBO(), (bits(),)


# ------------------------------------------------------------------------------------------------- what stays eager


def von_mises_latent():
    def q(h):
        loc, log_concentration = h.chunk(2, -1)
        return dist.VonMises(loc, log_concentration.exp()).to_event(1)

    return vae(lambda: dist.VonMises(torch.zeros(D), 1.0).to_event(1), q, objective=TraceGraph_ELBO)


def branch_on_data():
    model, guide, objective, args = vae()

    def branching(x):
        return model(1 - x if x.sum() < 0 else x)

    return branching, guide, objective, args


def named(name, build):
    build.__name__ = name
    return build


COMBINATIONS = [
    named("bernoulli", lambda: vae()),
    continuous_bernoulli,
    gaussian_with_learned_scale,
    categorical_256,
    laplace_likelihood,
    student_t_likelihood,
    beta_likelihood,
    mixture_prior,
    vamp_prior,
    flow_prior,
    named("planar_flow", flow_guide(lambda: transforms.planar(D))),
    named("radial_flow", flow_guide(lambda: transforms.radial(D))),
    named("coupling_flow", flow_guide(lambda: transforms.affine_coupling(D, hidden_dims=[5]))),
    named("autoregressive_flow", flow_guide(lambda: transforms.affine_autoregressive(D, hidden_dims=[5]))),
    named("householder_flow", flow_guide(householder)),
    named("sylvester_flow", flow_guide(lambda: transforms.sylvester(D, count_transforms=2))),
    named("spline_flow", flow_guide(lambda: transforms.spline(D, count_bins=3))),
    full_covariance,
    named("gamma_latent", positive_pair(dist.Gamma)),
    named("beta_latent", positive_pair(dist.Beta)),
    dirichlet_latent,
    laplace_latent,
    logistic_normal_latent,
    gumbel_softmax_latent,
    straight_through_latent,
    named("reinforce", coins),
    coins_with_a_baseline_network,
    coins_with_an_averaged_baseline,
    von_mises_latent,
    named("analytic_kl", lambda: vae(objective=TraceMeanField_ELBO)),
    named("particles_vectorised", particles(True)),
    named("particles_looped", particles(False)),
    renyi,
    named("iwae", lambda: vae(objective=lambda: IWAE(K))),
    wake_sleep,
    scaled,
    masked,
    factor,
    two_layers,
    auto_guide,
    batch_norm,
    dropout,
    enumerated,
    own_subsample,
    branch_on_data,
]

STAYS_EAGER = {
    "spline_flow": r"boolean|mask index",
    "von_mises_latent": r"value",
    "branch_on_data": r"branch is made of a tensor's value.*\(in test_captured_combinations.py:\d+, .*x.sum\(\) < 0",
}


def test_there_are_forty_five():
    assert len({build.__name__ for build in COMBINATIONS}) == len(COMBINATIONS) == 45


@pytest.mark.parametrize("build", COMBINATIONS, ids=[build.__name__ for build in COMBINATIONS])
@pytest.mark.filterwarnings("ignore:Found auxiliary vars in the model:UserWarning")
def test_combinations(float64, build):
    assert_equal_to_eager(build.__name__, build, STAYS_EAGER)
