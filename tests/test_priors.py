"""Priors: closed forms, gradients, state. Their distributions are checked in test_testing.py."""

import math

import pytest
import torch
from torch import Tensor

from pyro_vae import DiagonalNormal, FullNormal, MixtureOfNormals, Mlp, StandardNormal, VampPrior

C, D, E, K, B = 4, 2, 7, 3, 5


def log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log N(z; loc, diag scale^2), by hand."""
    return (-0.5 * ((z - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


@pytest.fixture
def mixture(float64) -> MixtureOfNormals:
    prior = MixtureOfNormals(D, num_components=C, spread=2.0)
    with torch.no_grad():
        prior.logits.normal_()
        prior.log_scale.normal_(std=0.5)
    return prior


def test_standard_normal(float64):
    z = torch.randn(K, B, D)
    p = StandardNormal(D, scale=0.7)()
    assert (p.batch_shape, p.event_shape) == ((), (D,))
    torch.testing.assert_close(p.log_prob(z), log_normal(z, torch.zeros(D), torch.full((D,), 0.7)))


def test_mixture_of_normals_is_a_logsumexp(mixture):
    z = torch.randn(K, B, D)
    each = [log_normal(z, m, s.exp()) for m, s in zip(mixture.loc, mixture.log_scale, strict=True)]
    expected = (torch.stack(each, dim=-1) + mixture.logits.log_softmax(0)).logsumexp(-1)
    torch.testing.assert_close(mixture().log_prob(z), expected)
    mixture().log_prob(z).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixture.parameters())


def test_mixture_starts_as_it_says():
    torch.manual_seed(0)
    prior = MixtureOfNormals(D, num_components=4000, spread=2.0)
    assert prior.logits.eq(0).all() and prior.log_scale.eq(0).all()
    assert abs(prior.loc.std().item() - 2.0) < 4 * 2.0 / math.sqrt(2 * prior.loc.numel())


@pytest.mark.parametrize("family", [DiagonalNormal, FullNormal])
def test_vamp_prior_is_the_average_of_the_encoder(float64, family):
    encoder = family(Mlp(E, 6, family.num_outputs(D)))
    prior = VampPrior(encoder, torch.randn(C, E))
    z = torch.randn(K, B, D)
    with torch.no_grad():
        each = torch.stack([encoder(u.unsqueeze(0)).log_prob(z) for u in prior.pseudo_inputs])
        torch.testing.assert_close(prior().log_prob(z), each.logsumexp(0) - math.log(C))

    prior().log_prob(z).sum().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_vamp_prior_counts_the_shared_encoder_once():
    encoder = DiagonalNormal(Mlp(E, 2 * D))
    both = torch.nn.ModuleList([encoder, VampPrior(encoder, torch.randn(C, E))])
    assert sum(p.numel() for p in both.parameters()) == (E + 1) * 2 * D + C * E


def test_vamp_prior_starts_at_rows_of_the_data():
    encoder, x = DiagonalNormal(Mlp(E, 2 * D)), torch.randn(50, E)
    few = VampPrior(encoder, x, num_components=C).pseudo_inputs
    assert few.shape == (C, E) and all((x == row).all(1).any() for row in few)
    every = VampPrior(encoder, x).pseudo_inputs
    assert torch.equal(every, x) and every.data_ptr() != x.data_ptr()
    assert VampPrior(encoder, torch.ones(C, E, dtype=torch.uint8)).pseudo_inputs.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: StandardNormal(D, scale=0.7), "StandardNormal(latent_dim=2, scale=0.7)"),
        (lambda: MixtureOfNormals(D, num_components=C), "MixtureOfNormals(latent_dim=2, num_components=4)"),
        (lambda: VampPrior(DiagonalNormal(Mlp(E, 2 * D)), torch.randn(C, E)), "num_components=4"),
    ],
)
def test_repr_state_dict_and_dtype(make, text):
    prior, other = make(), make()
    assert text in repr(prior)
    other.load_state_dict(prior.state_dict())
    z = torch.randn(B, D)
    assert torch.equal(other().log_prob(z), prior().log_prob(z))
    prior.to(torch.float64)
    assert prior().sample().dtype == prior().log_prob(z.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StandardNormal(0), "expected latent_dim > 0, found 0"),
        (lambda: StandardNormal(D, scale=-1.0), "expected scale > 0, found -1.0"),
        (lambda: StandardNormal(D, scale=math.nan), "expected scale > 0, found nan"),
        (lambda: MixtureOfNormals(D, num_components=0), "expected num_components > 0, found 0"),
        (lambda: MixtureOfNormals(D, spread=0.0), "expected spread > 0, found 0.0"),
        (lambda: VampPrior(Mlp(E, 4), torch.zeros(E)), r"pseudo_inputs has shape \(7,\), expected \[N, \*E\]"),
        (lambda: VampPrior(Mlp(E, 4), torch.zeros(0, E)), "pass rows of the training data"),
        (lambda: VampPrior(Mlp(E, 4), torch.zeros(1, E), num_components=0), "expected num_components > 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
