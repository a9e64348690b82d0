"""The decoder: network, likelihood, start at the data."""

import pytest
import torch
from pyro import distributions as dist
from torch import nn

from pyro_vae import ConvPair, Decoder, Mlp, likelihoods
from pyro_vae.contracts import Likelihood

K, B, D, E = 3, 5, 2, 7


def test_a_decoder_is_the_likelihood_of_the_network(float64):
    net, likelihood = Mlp(D, 4, 2 * E), likelihoods.HeteroscedasticNormal(0.05)
    decoder, z, x = Decoder(net, likelihood), torch.randn(K, B, D), torch.randn(B, E)
    p = decoder(z)
    assert (p.batch_shape, p.event_shape) == ((K, B), (E,))
    torch.testing.assert_close(p.log_prob(x), likelihood(net(z)).log_prob(x))
    assert torch.equal(decoder(z).log_prob(x), p.log_prob(x))


def test_conv_decoder_under_particles():
    decoder = Decoder(ConvPair((4,), hidden=6).decoder(D, (1, 4, 6)), likelihoods.Bernoulli(event_dim=3))
    p = decoder(torch.randn(K, B, D))
    assert (p.batch_shape, p.event_shape) == ((K, B), (1, 4, 6))
    assert p.log_prob(torch.ones(B, 1, 4, 6)).shape == (K, B)


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Bernoulli(),
        likelihoods.ContinuousBernoulli(),
        likelihoods.Binomial(1),
        likelihoods.Normal(),
        likelihoods.HeteroscedasticNormal(),
    ],
    ids=repr,
)
def test_start_at_data(likelihood):
    x = 0.1 + 0.8 * torch.rand(50, E)
    decoder = Decoder(Mlp(D, 4, E * likelihood.num_outputs), likelihood)
    decoder.start_at_data(x)
    last = decoder.net[-1]
    with torch.no_grad():
        last.weight.zero_()
    torch.testing.assert_close(decoder(torch.randn(B, D)).mean, x.mean(0).expand(B, E), rtol=1e-3, atol=1e-4)
    assert last.bias.requires_grad


def test_start_at_data_refuses_what_has_no_bias():
    class Plain(nn.Module):
        def forward(self, h):
            return dist.Normal(h, 1.0).to_event(1)

    class Inherits(Likelihood):
        forward = Plain.forward

    for likelihood in (Plain(), Inherits()):
        with pytest.raises(ValueError, match=r"has no output_bias\(mean, scale\).*add it, or skip start_at_data"):
            Decoder(Mlp(D, E), likelihood).start_at_data(torch.rand(B, E))
    with pytest.raises(ValueError, match="expected a last layer with a bias of 7 numbers"):
        Decoder(nn.Linear(D, E, bias=False), likelihoods.Normal()).start_at_data(torch.rand(B, E))


def test_likelihoods_that_are_functions():
    decoder = Decoder(Mlp(D, E), lambda h: dist.Poisson(h.exp()).to_event(1))
    assert decoder(torch.zeros(K, B, D)).batch_shape == (K, B)


def test_state_dict_dtype_and_repr():
    make = lambda: Decoder(Mlp(D, 4, E), likelihoods.Normal(0.5))  # noqa: E731
    one, two, z = make(), make(), torch.randn(B, D)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(z).mean, two(z).mean)
    assert "likelihood.log_scale" in one.state_dict() and "Normal(scale=0.5" in repr(one)
    assert one.to(torch.float64)(z.double()).sample().dtype == torch.float64
