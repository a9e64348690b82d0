"""Every objective and every member, captured: the losses and parameters of eager ``SVI`` on the same noise.

Members are found by looking, so a new one takes part as soon as it exists. One that stays eager passes only if it
stands in STAYS_EAGER with its reason. The environment variable PYRO_VAE_STEPS sets the number of steps, and
PYRO_VAE_BACKEND=inductor compiles each graph instead of replaying it (minutes).
"""

import inspect
import os
import re
import warnings

import pyro
import pyro.infer
import pytest
import torch
from pyro.infer import SVI
from test_cross_product import ENCODERS, LIKELIHOODS, PRIORS, B, D, E, make_decoder, make_encoder, make_prior
from torch import nn

from pyro_vae import ELBO, IWAE, VAE, FastSVI, StandardNormal, check_vae
from pyro_vae.parts import PARTS

STEPS = int(os.environ.get("PYRO_VAE_STEPS", "4"))
BACKEND = os.environ.get("PYRO_VAE_BACKEND", "replay")

# What stays eager, and why: a pattern of the sentence that it gives. Of this library and of Pyro's objectives, nothing.
STAYS_EAGER: dict[str, str] = {}

# Objectives of Pyro that are no losses of one program, or compile by themselves.
NOT_HERE = {
    "Trace_MMD": "compares samples by a kernel; it is no bound",
    "JitTraceEnum_ELBO": "compiles itself",
    "JitTraceGraph_ELBO": "compiles itself",
    "JitTraceMeanField_ELBO": "compiles itself",
    "JitTrace_ELBO": "compiles itself",
}


def objectives():
    base, modules = PARTS["objective"]
    found = {name: cls for module in modules for name, cls in vars(module).items() if inspect.isclass(cls)}
    return {
        name: cls
        for name, cls in sorted(found.items())
        if issubclass(cls, base) and cls is not base and not inspect.isabstract(cls) and name not in NOT_HERE
    }


def small_objective(cls):
    given = {
        "num_particles": 3,
        "num_examples": 20,
        "max_plate_nesting": 1,
        "num_groups": 1,
        "weight": 0.5,
        "alpha": 0.5,
    }
    parameters = inspect.signature(cls).parameters
    always = ("num_particles", "max_plate_nesting")
    needed = {name for name, p in parameters.items() if name in always or p.default is p.empty}
    arguments = {name: value for name, value in given.items() if name in needed}
    if cls is pyro.infer.TraceTailAdaptive_ELBO:
        arguments["vectorize_particles"] = True
    return cls(**arguments)


def make_data(likelihood):
    with torch.no_grad():
        p = make_decoder(LIKELIHOODS[likelihood])(torch.randn(B, D))
        drawn = getattr(p, "is_normalised", True) and likelihood != "Comparison"
        return p.sample() if drawn else torch.rand(B, E)


def steps(svi_class, build, **settings):
    pyro.clear_param_store()
    torch.manual_seed(1)
    model, guide, objective, args = build()
    torch.manual_seed(3)
    svi = svi_class(model, guide, pyro.optim.Adam({"lr": 1e-3}), objective, **settings)
    losses = [svi.step(*args) for _ in range(STEPS)]
    owner = getattr(model, "__self__", None)
    kept = dict(owner.named_buffers()) if isinstance(owner, nn.Module) else {}  # a running scale, say
    # TraceTailAdaptive_ELBO has gradients only; Pyro gives inf for its value.
    assert isinstance(objective, pyro.infer.TraceTailAdaptive_ELBO) or torch.tensor(losses).isfinite().all()
    kept |= dict(pyro.get_param_store().items())
    return losses, {name: value.detach().clone() for name, value in kept.items()}, svi


def assert_equal_to_eager(name, build, table=STAYS_EAGER):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this step runs as eager")
        warnings.filterwarnings("ignore", category=UserWarning)
        expected, parameters, _ = steps(SVI, build)
        found, ours, svi = steps(FastSVI, build, backend=BACKEND)
    reason = svi.explain()
    if name in table:
        assert "eager, since" in reason and re.search(table[name], reason), reason
    else:
        assert reason.startswith("(") and "eager" not in reason.replace("from eager Pyro", ""), reason
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-8, atol=1e-8)
    assert ours.keys() == parameters.keys() and ours
    for key in ours:
        torch.testing.assert_close(ours[key], parameters[key], rtol=1e-6, atol=1e-8, msg=key)


def vae_of(prior=StandardNormal, likelihood="Bernoulli", encoder="DiagonalNormal", num_particles=1):
    posterior = make_encoder(ENCODERS[encoder])
    vae = VAE(make_prior(prior, posterior), make_decoder(LIKELIHOODS[likelihood]), posterior)
    x = make_data(likelihood)
    with torch.no_grad(), pyro.validation_enabled(False):
        q = posterior(x)
    objective = ELBO(num_particles) if q.has_rsample else pyro.infer.TraceGraph_ELBO()
    return vae.to(torch.float64).model, vae.guide, objective, (x,)


@pytest.mark.parametrize("name", objectives())
def test_objectives(float64, name):
    def build():
        model, guide, _, args = vae_of()
        return model, guide, small_objective(objectives()[name]), args

    assert_equal_to_eager(name, build)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods(float64, name):
    def build():
        model, guide, _, args = vae_of(likelihood=name)
        return model, guide, IWAE(3), args

    assert_equal_to_eager(name, build)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(float64, name):
    torch.manual_seed(0)
    posterior, x = make_encoder(ENCODERS[name]), torch.rand(B, E)
    for prior in PRIORS.values():  # the first that goes with it
        try:
            check_vae(VAE(make_prior(prior, posterior), make_decoder(LIKELIHOODS["Normal"]), posterior), x)
            break
        except ValueError:
            continue
    assert_equal_to_eager(name, lambda: vae_of(prior, "Normal", name, num_particles=3))


@pytest.mark.parametrize("name", PRIORS)
def test_priors(float64, name):
    torch.manual_seed(0)
    x = torch.rand(B, E)
    for encoder in ENCODERS:  # the first that goes with it
        posterior = make_encoder(ENCODERS[encoder])
        try:
            check_vae(VAE(make_prior(PRIORS[name], posterior), make_decoder(LIKELIHOODS["Normal"]), posterior), x)
            break
        except ValueError:
            continue
    assert_equal_to_eager(name, lambda: vae_of(PRIORS[name], "Normal", encoder))
