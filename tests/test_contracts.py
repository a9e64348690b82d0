"""check_vae: every message, and that looking changes nothing."""

import math
import random

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, check_vae, likelihoods
from pyro_vae.contracts import Encoder, Likelihood, Prior, untouched
from pyro_vae.supports import check_support

K, B, D, E = 3, 5, 2, 7


def make(prior=None, decoder=None, encoder=None) -> VAE:
    return VAE(
        prior or StandardNormal(D),
        decoder or Decoder(Mlp(D, 4, E), likelihoods.Bernoulli()),
        encoder or DiagonalNormal(Mlp(E, 4, 2 * D)),
    )


def normal(*shape: int) -> dist.Normal:
    return dist.Normal(torch.zeros(shape), 1.0)


x = torch.ones(B, E)


@pytest.mark.parametrize(
    ("vae", "data", "message"),
    [
        # the data
        (make(), [1.0], r"x is list, expected a floating-point tensor \[B, \*E\]: convert it with x.float\(\)"),
        (make(), x.long(), "x is a tensor of torch.int64, expected a floating-point tensor"),
        (make(), x[0], r"x has shape \(7,\), expected \[B, \*E\] with B >= 1: a single example is x.unsqueeze\(0\)"),
        (make(), x[:0], r"x has shape \(0, 7\), expected"),
        (
            make(),
            x.clone().fill_diagonal_(math.nan),
            r"x has 5 values that are NaN, expected finite numbers: fill .* wrap the likelihood in likelihoods.Masked",
        ),
        (
            make(decoder=Decoder(Mlp(D, 4, E), likelihoods.Masked(likelihoods.Bernoulli()))),
            x.clone().fill_diagonal_(math.nan),
            r"encoder\(x\) is NaN where x has missing numbers \(NaN\): let its network begin with missing.FillMissing",
        ),
        (make(), x / 0, "x has 35 infinite values, expected finite ones: clean the data"),
        # no Pyro distribution
        (
            make(prior=lambda: torch.distributions.Normal(torch.zeros(D), 1.0)),
            x,
            r"prior\(\) returned Normal, expected a Pyro distribution: import Normal from pyro.distributions",
        ),
        (
            make(encoder=Mlp(E, D)),
            x,
            r"encoder\(x\) returned Tensor, expected .*: return an object of pyro",
        ),
        (make(decoder=Mlp(D, E)), x, r"decoder\(z\) with z of shape \(2, 5, 2\) returned Tensor, expected a Pyro"),
        # batch and event shapes
        (
            make(prior=lambda: normal(D)),
            x,
            r"prior\(\) has batch shape \(2,\), expected \(\): end it with .to_event\(1\)",
        ),
        (
            make(encoder=lambda x: normal(len(x), D)),
            x,
            r"encoder\(x\) has batch shape \(5, 2\), expected \(5,\): end it with .to_event\(1\)",
        ),
        (
            make(encoder=lambda x: normal(len(x), D).to_event(2)),
            x,
            r"encoder\(x\) has batch shape \(\), expected \(5,\): lower the number in its .to_event\(...\).* by 1",
        ),
        (
            make(encoder=lambda x: normal(1 + len(x), D).to_event(1)),
            x,
            r"encoder\(x\) has batch shape \(6,\), expected \(5,\): make the first axis of what encoder",
        ),
        (
            make(encoder=DiagonalNormal(Mlp(E, 6))),
            x,
            r"prior\(\) has event shape \(2,\) but encoder\(x\) has \(3,\): give both the same latent_dim",
        ),
        (
            make(decoder=lambda z: normal(*z.shape[:-1], E)),
            x,
            r"decoder\(z\) with z of shape \(2, 5, 2\) has batch shape \(2, 5, 7\), expected \(2, 5\): end",
        ),
        (
            make(decoder=lambda z: normal(z.shape[-2], E).to_event(1)),
            x,
            r"with z of shape \(2, 5, 2\) has batch shape \(5,\), expected \(2, 5\): lower the number",
        ),
        (
            make(decoder=Decoder(Mlp(D, 6), likelihoods.Bernoulli())),
            x,
            r"has event shape \(6,\) but x has \(7,\): make the last layer of the decoder's network as wide as x",
        ),
        (
            make(decoder=Decoder(Mlp(D, 2 * E), likelihoods.Bernoulli())),
            x,
            r"\(14,\) but x has \(7,\): .*times the likelihood's num_outputs",
        ),
        # errors from inside
        (
            make(encoder=DiagonalNormal(Mlp(6, 2 * D))),
            x,
            r"encoder\(x\) failed on an input of shape \(5, 7\) \(.*shapes cannot be multiplied.*make the first layer",
        ),
        (
            make(decoder=Decoder(nn.Sequential(nn.Flatten(), nn.Linear(D, E)), likelihoods.Normal())),
            x,
            r"decoder\(z\) with z of shape \(2, 5, 2\) failed .*wrap a network that takes one batch axis in OverBatch",
        ),
        # supports
        (
            make(prior=lambda: dist.LogNormal(torch.zeros(D), 1.0).to_event(1)),
            x,
            r"prior\(\) gives draws of encoder\(x\) no density .*choose a posterior whose support lies within",
        ),
        (
            make(),
            0.37 * x,
            r"x has values outside \{0, 1\} \(found 0.37\): binarise it \(datasets.binarize\)",
        ),
        (
            make(decoder=Decoder(Mlp(D, E), likelihoods.ContinuousBernoulli())),
            255 * x,
            r"x has values outside \[0, 1\] \(found 255\): rescale it \(bytes / 255\)",
        ),
        (
            make(decoder=Decoder(Mlp(D, E), likelihoods.Binomial(16))),
            17 * x,
            r"x has values outside the integers 0..16 \(found 17\): give counts, raise total_count",
        ),
        (
            make(decoder=lambda z: dist.Poisson(torch.ones(*z.shape[:-1], E)).to_event(1)),
            -x,
            r"x has values outside the integers 0, 1, 2, ... \(found -1\): give counts",
        ),
        (
            make(decoder=lambda z: dist.LogNormal(torch.zeros(*z.shape[:-1], E), 1.0).to_event(1)),
            -x,
            r"x has values outside the support .* \(found -1\): choose a likelihood that allows it",
        ),
    ],
)
def test_check_vae_says_what_does_not_fit(vae, data, message):
    expected = TypeError if "returned" in message or "floating-point tensor" in message else ValueError
    with pytest.raises(expected, match=message) as caught:
        check_vae(vae, data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [1, B])
def test_what_fits_passes(batch):
    assert check_vae(make(), torch.ones(batch, E)) is None
    image = make(
        decoder=Decoder(nn.Sequential(Mlp(D, 12), nn.Unflatten(-1, (1, 3, 4))), likelihoods.Normal(event_dim=3)),
        encoder=DiagonalNormal(nn.Sequential(nn.Flatten(-3), Mlp(12, 2 * D))),
    )
    check_vae(image, torch.randn(batch, 1, 3, 4))
    check_vae(make().to(torch.float64), torch.ones(batch, E).double())


def test_multivariate_support_names_a_value():
    p = dist.Dirichlet(torch.ones(B, 3))
    with pytest.raises(ValueError, match="x has values outside the support"):
        check_support(p, torch.ones(B, 3))


def test_check_vae_changes_nothing():
    net = nn.Sequential(nn.Linear(E, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2 * D))
    vae = make(encoder=DiagonalNormal(net))
    vae.train()
    net[2].eval()
    pyro.param("mine", torch.zeros(()))
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    flags = [part.training for part in vae.modules()]
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for data in (x, 0.37 * x):  # one that passes, one that is refused
        try:
            check_vae(vae, data)
        except ValueError as error:
            assert "binarise" in str(error)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1] and (np.random.get_state()[1] == random_states[2]).all()
    assert [part.training for part in vae.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.is_grad_enabled() and dist.Normal(0.0, 1.0)._validate_args


def test_untouched():
    part, state = nn.Sequential(nn.Dropout(0.5), nn.Linear(E, D)), torch.get_rng_state()
    with untouched(part, seed=3):
        first = torch.rand(2)
        assert not part.training and not torch.is_grad_enabled() and not part[1](x).requires_grad
        pyro.param("inside", torch.zeros(()))
    with untouched(part, seed=3):
        assert torch.equal(torch.rand(2), first) and "inside" not in pyro.get_param_store()
    with pytest.raises(KeyError), untouched(part):
        raise KeyError
    assert part.training and part[0].training and torch.equal(torch.get_rng_state(), state)
    expected = torch.rand(2, generator=torch.Generator().set_state(state))
    with untouched(part):  # without a seed the numbers go on from where they are
        assert torch.equal(torch.rand(2), expected)


def test_the_three_classes_only_say_what_to_give():
    for kind in (Prior, Likelihood, Encoder):
        with pytest.raises(TypeError, match=f"abstract class {kind.__name__}.*forward"):
            kind()

    class Poisson(Likelihood):
        def forward(self, h):
            return dist.Poisson(h.exp()).to_event(self.event_dim)

    with pytest.raises(NotImplementedError):
        Poisson().output_bias(x, x)
    with pytest.raises(NotImplementedError):
        Encoder.num_outputs(D)
    with pytest.raises(ValueError, match=r"expected event_dim >= 1, found 0: 1 for vectors, 3 for images \[C, H, W\]"):
        Poisson(event_dim=0)
    assert repr(Poisson(3)) == "Poisson(event_dim=3)"
