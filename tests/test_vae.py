"""The VAE: two Pyro programs, and the four things one does with it."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae import (
    VAE,
    Decoder,
    DiagonalNormal,
    MixtureOfNormals,
    Mlp,
    StandardNormal,
    VampPrior,
    check_vae,
    draw,
    likelihoods,
)

K, B, D, E = 3, 5, 2, 7


def make(name: str = "vae", prior=None) -> VAE:
    return VAE(
        prior or MixtureOfNormals(D, num_components=4),
        Decoder(Mlp(D, 6, E, activation=nn.Tanh), likelihoods.Normal(0.5)),
        DiagonalNormal(Mlp(E, 6, 2 * D, activation=nn.Tanh)),
        name=name,
    )


def svi(vae: VAE) -> SVI:
    return SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), loss=Trace_ELBO())


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_every_parameter_moved(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, p in module.named_parameters():
        assert not torch.equal(p, before[name]), f"{name} did not move"


@pytest.mark.parametrize("batch", [1, E, 50])
def test_traces(batch):
    vae, x = make(), torch.randn(batch, E)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    guide.compute_log_prob()
    model.compute_log_prob()
    for trace, name, event in ((guide, "z", D), (model, "z", D), (model, "x", E)):
        site = trace.nodes[name]
        assert site["fn"].batch_shape == site["log_prob"].shape == (batch,)
        assert site["fn"].event_shape == (event,) and site["value"].shape == (batch, event)
        (frame,) = site["cond_indep_stack"]
        assert (frame.name, frame.dim, frame.size) == ("data", -1, batch)
    assert model.nodes["z"]["value"] is guide.nodes["z"]["value"]
    assert model.nodes["x"]["is_observed"] and not model.nodes["z"]["is_observed"]
    assert set(guide.stochastic_nodes) - {"data"} == {"z"}
    assert model.nodes["_RETURN"]["value"] is x


def test_the_log_probabilities_are_those_of_the_three_terms(float64):
    vae, x = make().double(), torch.randn(B, E)
    guide = poutine.trace(vae.guide).get_trace(x)
    z = guide.nodes["z"]["value"]
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    expected = vae.prior().log_prob(z) + vae.decoder(z).log_prob(x)
    torch.testing.assert_close(model.log_prob_sum(), expected.sum())
    torch.testing.assert_close(guide.log_prob_sum(), vae.encoder(x).log_prob(z).sum())


def test_particles():
    vae, x = make(), torch.randn(B, E)
    loss = Trace_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    assert torch.tensor(loss.loss(vae.model, vae.guide, x)).isfinite()


@pytest.mark.parametrize("batch", [1, E, 50])
def test_sample_encode_decode_reconstruct(batch):
    vae, x = make(), torch.randn(batch, E)
    q, z = vae.encode(x), torch.randn(K, batch, D)
    assert (q.batch_shape, q.event_shape) == ((batch,), (D,))
    assert (vae.decode(z).batch_shape, vae.decode(z).event_shape) == ((K, batch), (E,))
    assert vae.sample(batch).shape == vae.reconstruct(x).shape == vae.reconstruct(x, sample=True).shape == (batch, E)
    assert torch.equal(vae.reconstruct(x), vae.reconstruct(x))
    assert not torch.equal(vae.reconstruct(x, sample=True), vae.reconstruct(x, sample=True))
    assert not torch.equal(vae.sample(batch), vae.sample(batch))
    torch.testing.assert_close(vae.reconstruct(x), vae.decoder(vae.encoder(x).mean).mean)
    state = torch.get_rng_state()
    vae.decode(z), vae.encode(x), vae.reconstruct(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_have_the_moments_of_the_model(float64):
    prior = StandardNormal(D, scale=0.7)
    net = nn.Linear(D, E)
    vae = VAE(prior, Decoder(net, likelihoods.Normal(0.5)), DiagonalNormal(Mlp(E, 2 * D))).double()
    num = 20_000
    with torch.no_grad():
        x = vae.sample(num)
        covariance = 0.49 * net.weight @ net.weight.T + 0.25 * torch.eye(E)
        assert (x.mean(0) - net.bias).abs().le(5 * covariance.diagonal().div(num).sqrt()).all()
        error = (covariance**2 + covariance.diagonal().outer(covariance.diagonal())).div(num).sqrt()
        assert (x.T.cov() - covariance).abs().le(5 * error).all()


@pytest.mark.parametrize("names", [("vae", "vae"), ("one", "two")])
def test_two_vaes_in_one_process_both_train(names):
    x = torch.randn(B, E)
    first, second = (make(name) for name in names)
    steps = svi(first), svi(second)
    for _ in range(2):  # interleaved, each step moves everything
        for vae, step in zip((first, second), steps, strict=True):
            before = snapshot(vae)
            step.step(x)
            assert_every_parameter_moved(vae, before)


def test_the_second_vae_does_not_touch_the_first():
    x, first, second = torch.randn(B, E), make(), make()
    svi(first).step(x)
    before = snapshot(first)
    svi(second).step(x)
    for name, p in first.named_parameters():
        assert torch.equal(p, before[name]), f"{name} moved"


def test_training_goes_on_after_the_store_was_cleared():
    x, vae = torch.randn(B, E), make()
    step = svi(vae)
    step.step(x)
    pyro.clear_param_store()
    before = snapshot(vae)
    step.step(x)
    assert_every_parameter_moved(vae, before)


def test_one_step_is_one_step_of_torch():
    x, one, two = torch.randn(B, E), make("one"), make("two")
    two.load_state_dict(one.state_dict())
    optimiser = torch.optim.Adam(two.parameters(), lr=1e-2)
    step = svi(one)
    for seed in range(3):
        torch.manual_seed(seed)
        step.step(x)
        torch.manual_seed(seed)
        q = two.encoder(x)
        z = q.rsample()
        loss = -(two.decoder(z).log_prob(x) + two.prior().log_prob(z) - q.log_prob(z)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_vamp_prior_trains_with_its_encoder():
    x, encoder = torch.randn(B, E), DiagonalNormal(Mlp(E, 6, 2 * D, activation=nn.Tanh))
    vae = VAE(VampPrior(encoder, x[:4]), Decoder(Mlp(D, E), likelihoods.Normal()), encoder)
    before = snapshot(vae)
    svi(vae).step(x)
    assert_every_parameter_moved(vae, before)
    assert vae.prior.encoder is vae.encoder


def test_frozen_parameters_stay_and_do_not_warn():  # warnings are errors
    x, vae = torch.randn(B, E), make()
    vae.decoder.requires_grad_(False)
    before = snapshot(vae)
    step = svi(vae)
    step.step(x)
    for name, p in vae.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("decoder"), name
    vae.decoder.requires_grad_(True)
    step.step(x)
    assert_every_parameter_moved(vae, before)
    vae.requires_grad_(False)
    assert step.evaluate_loss(x) > 0


def test_parameters_in_the_store_carry_the_name():
    vae = make("digits")
    vae.model(torch.randn(B, E))
    assert set(pyro.get_param_store().keys()) == {f"digits$$${name}" for name, _ in vae.named_parameters()}


def test_pure_functions_are_as_good():
    encoder, decoder = Mlp(E, 2 * D), Mlp(D, E)
    vae = VAE(
        prior=lambda: dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1),
        decoder=lambda z: dist.Bernoulli(logits=decoder(z)).to_event(1),
        encoder=lambda x: dist.Normal(encoder(x)[..., :D], encoder(x)[..., D:].exp()).to_event(1),
    )
    x = torch.ones(B, E)
    check_vae(vae, x)
    assert vae.sample(K).shape == (K, E) and vae.reconstruct(x).shape == (B, E)
    assert not list(vae.parameters())  # functions hide theirs: pass modules to train
    assert svi(vae).evaluate_loss(x) > 0


def test_state_dict_dtype_and_repr():
    one, two, x = make(), make(), torch.randn(B, E)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.reconstruct(x), two.reconstruct(x))
    one.to(torch.float64)
    assert one.sample(K).dtype == one.reconstruct(x.double(), sample=True).dtype == torch.float64
    order = [repr(one).index(part) for part in ("MixtureOfNormals", "Decoder", "DiagonalNormal")]
    assert order == sorted(order)


@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_the_scale_of_the_prior_changes_nothing_for_free_networks(float64, scale):
    """Encoder heads times s, the decoder's first weights over s: the same ELBO, draw by draw, under N(0, s^2)."""
    one = make(prior=StandardNormal(D))
    other = make(prior=StandardNormal(D, scale=scale))
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        last, first = (
            [part for part in net.modules() if isinstance(part, nn.Linear)]
            for net in (other.encoder.net, other.decoder.net)
        )
        last[-1].weight[:D] *= scale  # the mean
        last[-1].bias[:D] *= scale
        last[-1].bias[D:] += math.log(scale)  # the logarithm of the standard deviation
        first[0].weight /= scale
    x = torch.randn(B, E)
    bounds = []
    for vae in (one, other):
        torch.manual_seed(1)
        bounds.append(draw(vae.model, vae.guide, x, num_particles=K).log_w)
    torch.testing.assert_close(bounds[0], bounds[1], rtol=0, atol=1e-10)
    divergences = [kl_divergence(vae.encode(x), vae.prior()) for vae in (one, other)]
    torch.testing.assert_close(divergences[0], divergences[1], rtol=0, atol=1e-10)
    with torch.no_grad():  # the prior alone, without the networks, is not the same
        other.load_state_dict(one.state_dict())
        assert not torch.allclose(divergences[0], kl_divergence(other.encode(x), other.prior()), atol=0.1)
