"""What holds for every likelihood of the library: exact evidence, one captured step, state, one command."""

import copy
import inspect
import math

import pyro
import pytest
import torch
from pyro.infer import SVI
from safetensors.torch import load, save
from torch import nn

from pyro_vae import (
    IWAE,
    VAE,
    Decoder,
    DiagonalNormal,
    FastSVI,
    Mlp,
    StandardNormal,
    comparisons,
    counts,
    fit,
    likelihoods,
    log_evidence,
    pixels,
    tables,
)
from pyro_vae.contracts import Likelihood
from pyro_vae.exact import log_evidence_by_quadrature
from pyro_vae.missing import FillMissing
from pyro_vae.testing import check_likelihood

B, D, E = 5, 1, 3


def mixed():
    each = [likelihoods.HeteroscedasticNormal(), tables.Nominal(3), likelihoods.Bernoulli()]
    return tables.MixedColumns(each)


MEMBERS = {
    "Bernoulli": likelihoods.Bernoulli,
    "ContinuousBernoulli": likelihoods.ContinuousBernoulli,
    "Binomial": lambda: likelihoods.Binomial(4),
    "Normal": lambda: likelihoods.Normal(0.7),
    "OptimalNormal": likelihoods.OptimalNormal,
    "HeteroscedasticNormal": likelihoods.HeteroscedasticNormal,
    "LogNormal": likelihoods.LogNormal,
    "Laplace": likelihoods.Laplace,
    "StudentT": likelihoods.StudentT,
    "Beta": likelihoods.Beta,
    "Masked": lambda: likelihoods.Masked(likelihoods.Laplace()),
    "Masked MixedColumns": lambda: likelihoods.Masked(mixed()),
    "Categorical": lambda: pixels.Categorical(4),
    "DiscretizedLogistic": lambda: pixels.DiscretizedLogistic(9),
    "DiscretizedLogisticMixture": lambda: pixels.DiscretizedLogisticMixture(2, 9),
    "Poisson": counts.Poisson,
    "NegativeBinomial": counts.NegativeBinomial,
    "ZeroInflatedPoisson": counts.ZeroInflatedPoisson,
    "ZeroInflatedNegativeBinomial": counts.ZeroInflatedNegativeBinomial,
    "Multinomial": lambda: counts.Multinomial(6),
    "Nominal": lambda: tables.Nominal(3),
    "MixedColumns": mixed,
}
NOT_NORMALISED = {"Comparison"}


def make(name, latent_dim=D):
    torch.manual_seed(3)
    likelihood = MEMBERS[name]()
    outputs = likelihood.output_shape((E,))[0]
    decoder = Decoder(Mlp(latent_dim, 5, outputs, activation=nn.Tanh), likelihood)
    with torch.no_grad():
        for parameter in decoder.net.parameters():
            parameter.mul_(1.5)
    encoder = DiagonalNormal(nn.Sequential(FillMissing(), Mlp(E, 8, 2 * latent_dim)))
    vae = VAE(StandardNormal(latent_dim), decoder, encoder).to(torch.get_default_dtype())
    with torch.no_grad():
        x = vae.sample(B) if not isinstance(likelihood, likelihoods.OptimalNormal) else vae.eval().sample(B)
    if "Masked" in name:
        x[torch.arange(B), torch.arange(B) % E] = math.nan
    return vae.train(), x


def test_no_member_is_left_out():
    classes = {
        name
        for module in (likelihoods, pixels, counts, tables, comparisons)
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Likelihood) and not inspect.isabstract(value)
        if not name.startswith("_")
    }
    assert classes == {name.split()[-1] for name in MEMBERS} | NOT_NORMALISED


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("name", MEMBERS)
def test_evidence_by_quadrature_and_by_importance_sampling_agree(float64, name, latent_dim):
    """Two routes to log p(x), within 4 of the standard errors of the one that draws."""
    vae, x = make(name, latent_dim)
    vae.encoder = Wide(latent_dim)
    exact = log_evidence_by_quadrature(vae.eval().prior, vae.decoder, x, num_points=401 if latent_dim == 1 else 161)
    num_particles = 40_000
    estimate = log_evidence(vae, x, num_particles)
    error = estimate.errors
    assert error is not None and bool((error < 0.1).all())
    assert bool(((estimate.values - exact).abs() < 4 * error + 1e-9).all())
    wrong = exact + 6 * error + 0.05  # were the density off by a twentieth of a nat, it would show
    assert not bool(((estimate.values - wrong).abs() < 4 * error).any())


class Wide(nn.Module):
    """The prior as the posterior: safe weights for any likelihood."""

    def __init__(self, latent_dim):
        super().__init__()
        self.latent_dim = latent_dim

    def forward(self, x):
        return pyro.distributions.Normal(x.new_zeros(len(x), self.latent_dim), 1.0).to_event(1)


@pytest.mark.parametrize("name", ["Masked MixedColumns"])  # the others are captured in test_captured_members.py
def test_the_captured_step_is_the_eager_step(float64, name):
    vae, x = make(name)
    objective, results = IWAE(3), []
    for svi_class, options in ((SVI, {}), (FastSVI, {"backend": "replay"})):
        pyro.clear_param_store()
        twin = copy.deepcopy(vae)
        torch.manual_seed(1)
        svi = svi_class(twin.model, twin.guide, pyro.optim.Adam({"lr": 0.01}), objective, **options)
        losses = [svi.step(x) for _ in range(3)]
        results.append((losses, [value.detach().clone() for value in twin.state_dict().values()]))
    assert "eager, since" not in svi.explain(), svi.explain()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9, abs=1e-9)
    for a, b in zip(results[0][1], results[1][1], strict=True):  # parameters, and buffers too
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MEMBERS)
def test_saved_and_loaded_it_scores_the_same_and_shows_itself(name):
    vae, x = make(name)
    fit(vae, x.repeat(4, 1), epochs=1, batch_size=10)
    other, _ = make(name)
    other.load_state_dict(load(save({k: v.contiguous() for k, v in vae.state_dict().items()})))
    z = torch.randn(B, D)
    assert torch.equal(vae.eval().decode(z).log_prob(x), other.eval().decode(z).log_prob(x))
    assert name.split()[0] in repr(vae.decoder.likelihood)


@pytest.mark.parametrize("batch", [1, 7, 50])
@pytest.mark.parametrize("name", ["Bernoulli", "OptimalNormal", "MixedColumns", "Masked MixedColumns"])
def test_any_batch_is_encoded_scored_and_reconstructed(name, batch):
    """A batch size written into the noise fails for all others; here the shape comes from x."""
    vae, x = make(name)
    x = x[:1].expand(batch, E)
    assert vae.encode(x).rsample((3,)).shape == (3, batch, D)
    assert vae.reconstruct(x).shape == (batch, E)
    assert vae.decode(torch.zeros(3, batch, D)).log_prob(x).shape == (3, batch)
    assert log_evidence(vae, x, 10).values.shape == (batch,)


@pytest.mark.parametrize("name", ["LogNormal", "OptimalNormal", "Nominal"])
def test_contract(name):
    likelihood = MEMBERS[name]()
    check_likelihood(likelihood, 0.7 * torch.randn(B, likelihood.output_shape((E,))[0]))


def test_scoring_has_no_order_of_arguments_to_mistake(float64):
    """p.log_prob(x): probabilities in the place of binary x are refused; exchanged cross-entropy is another number."""
    h, x = torch.tensor([[0.3, -2.0, 1.7]]), torch.tensor([[1.0, 0.0, 1.0]])
    p = likelihoods.Bernoulli()(h)
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(p.mean)
    right = comparisons.binary_cross_entropy(x, h.sigmoid())
    torch.testing.assert_close(right, -p.log_prob(x))
    exchanged = comparisons.binary_cross_entropy(h.sigmoid(), x.clamp(1e-6, 1 - 1e-6))
    assert (exchanged - right).abs() > 1


def test_cross_entropy_of_grey_pixels_is_no_density_and_the_continuous_bernoulli_is(float64):
    x = torch.linspace(0, 1, 20_001)
    for p, mass in ((0.5, 0.5), (0.2, None)):
        x_hat = torch.full_like(x, p)
        density = (-comparisons.binary_cross_entropy(x.unsqueeze(1), x_hat.unsqueeze(1))).exp()
        found = torch.trapezoid(density, x).item()
        constant = math.log((1 - p) / p) / (1 - 2 * p) if p != 0.5 else 2.0  # C(lambda) of the continuous Bernoulli
        assert abs(found - 1 / constant) < 1e-6 and found < 0.6
        assert mass is None or abs(found - mass) < 1e-9
        continuous = likelihoods.ContinuousBernoulli()(torch.tensor([p]).logit())
        assert abs(torch.trapezoid(continuous.log_prob(x.unsqueeze(1)).exp(), x).item() - 1) < 1e-5
