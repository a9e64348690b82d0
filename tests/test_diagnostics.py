"""What the latent dimensions do: exact on principal component analysis, where every number is known."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, FullNormal, MixtureOfNormals, Mlp, StandardNormal
from pyro_vae.diagnostics import Health, active_units, health, kl_per_dimension, rate_distortion
from pyro_vae.estimates import elbo_terms
from pyro_vae.exact import LinearGaussian
from pyro_vae.uncertainty import Difference, Estimate

K, B, D, E = 3, 5, 4, 7
EIGENVALUES = (4.0, 2.0, 1.02, 1.005)  # the first D of the data's covariance; the others are 1
pytestmark = pytest.mark.usefixtures("float64")


def data_of_known_covariance(rows=1000):
    """Rows whose covariance has exactly the eigenvalues above, and 1 for the noise."""
    x = torch.randn(rows, E)
    x = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(rows)  # covariance I, exactly
    directions = torch.linalg.qr(torch.randn(E, E)).Q
    scales = torch.tensor([*EIGENVALUES, *[1.0] * (E - D)]).sqrt()
    return (x * scales) @ directions.T + torch.arange(E)


def principal_components(x):
    return LinearGaussian.maximum_likelihood(x, D).as_vae(diagonal=True)


def digits_vae(prior=None, encoder=None):
    return VAE(
        prior or StandardNormal(D),
        Decoder(Mlp(D, 6, E), Bernoulli()),
        encoder or DiagonalNormal(Mlp(E, 6, 2 * D)),
    )


def binary(rows=B):
    return (torch.rand(rows, E) < 0.5).double()


@pytest.mark.parametrize("batch_size", [1000, 300])
def test_kl_of_principal_components(batch_size):
    """At the optimum, each dimension's KL is half the logarithm of its eigenvalue over the noise: its information."""
    x = data_of_known_covariance()
    kl = kl_per_dimension(principal_components(x), x, batch_size=batch_size)
    torch.testing.assert_close(kl, 0.5 * torch.tensor(EIGENVALUES).log(), rtol=0, atol=1e-10)


def test_kl_of_a_hand_made_posterior():
    class Fixed(nn.Module):
        def forward(self, x):
            loc = torch.stack([x[..., 0], torch.zeros(x.shape[:-1])], -1)
            return dist.Normal(loc, torch.tensor([1.0, 0.5])).to_event(1)

    vae = VAE(StandardNormal(2, scale=2.0), Decoder(Mlp(2, E), Bernoulli()), Fixed())
    x = torch.zeros(2, E)
    x[:, 0] = torch.tensor([1.0, 3.0])  # mean of squares 5
    first = math.log(2) + (1 + 5) / 8 - 0.5
    second = math.log(4) + 0.25 / 8 - 0.5
    torch.testing.assert_close(kl_per_dimension(vae, x), torch.tensor([first, second]))


def test_kl_sums_to_the_term_of_the_elbo():
    vae, x = digits_vae(), binary(50)
    kl = kl_per_dimension(vae, x)
    assert kl.shape == (D,) and (kl >= 0).all() and not kl.requires_grad
    num_particles = 500
    sampled = elbo_terms(vae, x, num_particles)["kl"]
    q = vae.encoder(x)
    exact = torch.distributions.kl_divergence(q, vae.prior().expand([len(x)])).detach()
    assert kl.sum() == pytest.approx(exact.mean().item(), abs=1e-12)
    error = sampled.values - exact  # of independent draws
    assert abs(sampled.mean - kl.sum()) < 4 * error.std() / math.sqrt(len(x))


def test_active_units_of_principal_components():
    """The posterior means have variance 1 - noise / eigenvalue: active where the eigenvalue exceeds noise / 0.99."""
    x = data_of_known_covariance()
    vae = principal_components(x)
    means = vae.encoder(x).mean
    variance = means.var(0, correction=0)
    torch.testing.assert_close(variance, 1 - 1 / torch.tensor(EIGENVALUES), rtol=0, atol=1e-10)
    active = active_units(vae, x)
    assert active.dtype == torch.bool
    assert active.tolist() == [value > 1 / 0.99 for value in EIGENVALUES] == [True, True, True, False]
    assert active_units(vae, x, threshold=0.6).tolist() == [True, False, False, False]
    assert active_units(vae, x, batch_size=300).equal(active)


def test_collapsed_dimensions():
    x = data_of_known_covariance()
    vae = principal_components(x)
    with torch.no_grad():
        vae.encoder.net.weight[1], vae.encoder.net.bias[1] = 0, 0  # the mean of dimension 1 ...
        vae.encoder.net.weight[D + 1], vae.encoder.net.bias[D + 1] = 0, 0  # ... and the logarithm of its scale
    assert kl_per_dimension(vae, x)[1] == 0
    assert active_units(vae, x).tolist() == [True, False, True, False]


def test_active_units_need_a_mean_only():
    encoder = FullNormal(Mlp(E, 6, FullNormal.num_outputs(D)))
    vae = digits_vae(MixtureOfNormals(D, num_components=3), encoder)
    assert active_units(vae, binary(50)).shape == (D,)


@pytest.mark.parametrize(
    ("prior", "encoder", "message"),
    [
        (lambda: MixtureOfNormals(D, num_components=3), lambda: None, r"found prior\(\) of type Mixture"),
        (lambda: None, lambda: FullNormal(Mlp(E, 6, FullNormal.num_outputs(D))), r"found encoder\(x\) of type Multi"),
    ],
    ids=["mixture prior", "full normal"],
)
def test_kl_per_dimension_refuses_what_does_not_factorise(prior, encoder, message):
    with pytest.raises(ValueError, match=f"expected diagonal normals, {message}.*use active_units instead"):
        kl_per_dimension(digits_vae(prior(), encoder()), binary())


def use_of_code(vae, x, batch_size=1000):
    return health(vae, x, batch_size=batch_size).use_of_code.values


@pytest.mark.parametrize("diagnostic", [kl_per_dimension, active_units, use_of_code])
def test_nothing_is_changed(diagnostic):
    encoder = nn.Sequential(nn.Linear(E, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2 * D))
    vae, x = digits_vae(encoder=DiagonalNormal(encoder)), binary(50)
    encoder[0].eval()
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    flags, state = [part.training for part in vae.modules()], torch.get_rng_state()
    first = diagnostic(vae, x)
    assert first.equal(diagnostic(vae, x, batch_size=50)), "evaluation mode: batches do not matter, nothing is drawn"
    assert all(torch.equal(t, before[name]) for name, t in vae.state_dict().items())
    assert flags == [part.training for part in vae.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert list(pyro.get_param_store()) == []


# ------------------------------------------------------------------------------------------------------------ health


def test_rate_and_distortion_are_the_terms():
    vae, x = digits_vae(), binary(50)
    rate, distortion = rate_distortion(vae, x, K, policy="bits")
    terms = elbo_terms(vae, x, K)
    torch.testing.assert_close(rate.values, terms["kl"].values)
    torch.testing.assert_close(-rate.values - distortion.values, terms["elbo"].values)
    assert (rate.name, distortion.name, rate.policy, distortion.policy) == ("rate", "distortion", "bits", "bits")
    assert distortion.errors.equal(terms["log_px"].errors)


def test_a_code_that_hardly_moves_is_not_called_healthy():
    used = Difference("use of the code", torch.tensor([0.02, -0.02, 0.01, 0.03]))  # too noisy to be surely nothing
    still = torch.zeros(5, dtype=torch.bool)
    found = Health(Estimate("KL", torch.tensor([0.01, 0.03, 0.02, 0.016]), 1), used, still, {}, ())
    assert found.collapsed and found.warnings[0].startswith("posterior collapse: KL = 0.0190 ± 0.0042 nats")
    costly = Health(
        Estimate("KL", torch.tensor([3.0, 2.0, 4.0, 3.0]), 1), Difference("", used.values + 1), still, {}, ()
    )
    assert not costly.collapsed and costly.warnings[0].startswith("only 0 of 5 latent dimensions are active")


def test_a_working_model_is_healthy():
    x = data_of_known_covariance()
    found = health(principal_components(x), x)
    assert found.warnings == [] and str(found).startswith("healthy")
    assert found.use_of_code.mean > 4 * found.use_of_code.standard_error
    terms = elbo_terms(principal_components(x), x, 20)["kl"]
    assert abs(found.kl.mean - terms.mean) < 4 * math.hypot(found.kl.standard_error, terms.standard_error)


def test_use_of_the_code_is_the_loss_with_anothers():
    """Exactly: a decoder of unit scale that copies z, a posterior that copies x, and so x scored against another x."""

    class Copy(nn.Module):
        def forward(self, z):
            return dist.Normal(z, 1.0).to_event(1)

    class Point(nn.Module):
        def forward(self, x):
            return dist.Normal(x, 1e-9).to_event(1)

    x = torch.randn(400, D)
    found = health(VAE(StandardNormal(D), Copy(), Point()), x, batch_size=150)
    values = found.use_of_code.values
    pairs = 0.5 * torch.cdist(x, x) ** 2
    matches = (pairs - values.unsqueeze(1)).abs() < 1e-5
    matches.fill_diagonal_(False)
    assert matches.any(1).all(), "each was scored against one other"
    assert len(set(matches.double().argmax(1).tolist())) > 390, "and each other once"


def test_posterior_collapse_is_called_so():
    vae, x = digits_vae(), binary(60)
    nn.init.zeros_(vae.encoder.net[-1].weight), nn.init.zeros_(vae.encoder.net[-1].bias)
    found = health(vae, x)
    assert found.collapsed and found.warnings[0].startswith("posterior collapse: KL = 0.00 ± 0.00 nats")
    assert "raise beta slowly" in str(found)


def test_a_dead_decoder_is_called_so():
    """A narrow layer of rectifiers behind z that never fires: every output is the average of the data."""
    decoder = nn.Sequential(nn.Linear(D, 3), nn.ReLU(), nn.Linear(3, E))
    nn.init.constant_(decoder[0].bias, -100.0)
    vae = VAE(StandardNormal(D), Decoder(decoder, Bernoulli()), DiagonalNormal(Mlp(E, 6, 2 * D)))
    nn.init.constant_(vae.encoder.net[-1].bias, 1.0)
    found = health(vae, binary(60))
    assert found.ignores_code and not found.collapsed
    assert found.dead_units["decoder.net.1"] == 1
    assert found.warnings[0].startswith("dead decoder: another example's code serves as well (0.00 ± 0.00 nats worse,")
    assert "dead units: more than half of the ReLUs of decoder.net.1 (100 %)" in found.warnings[1]
    assert not decoder[1]._forward_hooks


def test_dead_units_are_counted():
    decoder = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, E))
    with torch.no_grad():
        decoder[0].bias[:] = torch.tensor([-100.0, 100.0, 100.0, -100.0])
    vae = VAE(StandardNormal(D), Decoder(decoder, Bernoulli()), DiagonalNormal(Mlp(E, 2 * D)))
    assert health(vae, binary(60)).dead_units == {"decoder.net.1": 0.5}


def test_mostly_inactive_and_diverged_models():
    x = data_of_known_covariance()
    vae = principal_components(x)
    with torch.no_grad():
        for d in (1, 2, 3):
            vae.encoder.net.weight[d], vae.encoder.net.bias[d] = 0, 0
            vae.encoder.net.weight[D + d], vae.encoder.net.bias[D + d] = 0, 0
    assert "only 1 of 4 latent dimensions are active" in health(vae, x).warnings[0]
    with torch.no_grad():
        vae.decoder.net.weight[0, 0] = math.nan
    found = health(vae, x)
    assert found.warnings == [
        "diverged: decoder.net.weight hold NaN or infinite values; lower the learning rate and train again."
    ]
    with pytest.raises(ValueError, match="expected at least two examples, found 1"):
        health(vae, x[:1])


def test_few_examples_raise_no_false_alarm():
    """A code of some use is not called dead for want of examples."""
    kl = Estimate("KL", torch.full((4,), 2.0), 1)
    for values, dead in (
        ([3.0, -1.0, 2.0, -2.0], False),
        ([0.0, 0.02, 0.01, 0.0], True),
        ([9.0, 8.0, 9.0, 7.0], False),
        ([1.0, 1.0, 1.0, 1.01], False),
    ):
        found = Health(kl, Difference("use of the code", torch.tensor(values)), None, {}, ())
        assert found.ignores_code == dead == bool(found.warnings)
