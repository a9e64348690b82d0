"""Spherical posteriors: the contract, log p(x) by integration over the circle and the sphere, training, refusals."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    Decoder,
    DiagonalNormal,
    FastSVI,
    Mlp,
    PowerSpherical,
    SphereUniform,
    StandardNormal,
    VampPrior,
    VonMisesFisher,
    check_vae,
    draw,
    encoders,
    fit,
    priors,
)
from pyro_vae.cli import main
from pyro_vae.diagnostics import active_units
from pyro_vae.estimates import log_evidence
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.testing import check_distribution, check_encoder

K, B, E = 3, 5, 7
every_family = pytest.mark.parametrize("family", [VonMisesFisher, PowerSpherical])


def make(family, latent_dim=3, spread=0.5):
    encoder = family(Mlp(E, 6, family.num_outputs(latent_dim), activation=nn.Tanh))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return encoder


def make_vae(family, latent_dim=3, likelihood=None):
    decoder = Decoder(Mlp(latent_dim, 6, E, activation=nn.Tanh), likelihood or Bernoulli())
    return VAE(SphereUniform(latent_dim), decoder, make(family, latent_dim))


@every_family
@pytest.mark.parametrize("latent_dim", [2, 3, 5])
def test_contract(family, latent_dim):
    """Density, draws, and the gradient of draws against finite differences."""
    check_encoder(make(family, latent_dim), torch.randn(2, E))


@every_family
def test_concentration_and_direction_are_what_the_network_says(float64, family):
    encoder, x = make(family, 4), torch.randn(B, E)
    q, h = encoder(x), encoder.net(x)
    torch.testing.assert_close(q.loc * h[:, :-1].norm(dim=-1, keepdim=True), h[:, :-1])
    torch.testing.assert_close(q.concentration.log(), h[:, -1])


def sphere_points(latent_dim, num=140):
    """Points with the share of the area that each stands for."""
    turn = (torch.arange(num) + 0.5) * (2 * math.pi / num)
    if latent_dim == 2:
        return torch.stack([turn.cos(), turn.sin()], -1), torch.full((num,), 1 / num)
    tilt, turn = torch.cartesian_prod(turn / 2, turn).unbind(-1)
    z = torch.stack([tilt.sin() * turn.cos(), tilt.sin() * turn.sin(), tilt.cos()], -1)
    return z, tilt.sin() / tilt.sin().sum()


@every_family
@pytest.mark.parametrize("latent_dim", [2, 3])
def test_log_evidence_by_integration(float64, family, latent_dim):
    vae, x = make_vae(family, latent_dim, Normal(0.5)), torch.randn(B, E)
    z, share = sphere_points(latent_dim)
    with torch.no_grad():
        log_px = vae.decode(z.unsqueeze(1).expand(-1, B, -1)).log_prob(x)
        expected = (log_px + share.log().unsqueeze(-1)).logsumexp(0)
        terms = draw(vae.model, vae.guide, x, num_particles=8000)
    weight = (terms.log_w - expected).exp()
    error = weight.std(0) / math.sqrt(len(weight))
    assert (error < 0.1).all() and ((weight.mean(0) - 1).abs() < 3 * error).all()
    found = log_evidence(vae, x, num_particles=8000).values
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    with torch.no_grad():
        bounds = [o.bound(vae.model, vae.guide, x).mean() for o in (ELBO(2000), IWAE(2000))]
    assert bounds[0] < bounds[1] < expected.mean() + 0.05


@every_family
def test_the_closed_kl_is_the_sampled_one(float64, family):
    vae, x = make_vae(family), torch.rand(B, E).round()
    closed = torch.tensor([-TraceMeanField_ELBO().loss(vae.model, vae.guide, x) for _ in range(100)])
    with torch.no_grad():
        sampled = torch.stack([ELBO().bound(vae.model, vae.guide, x).sum() for _ in range(100)])
    error = math.sqrt(float(closed.var() + sampled.var()) / 100)
    assert abs(closed.mean() - sampled.mean()) < 4 * error
    assert closed.std() < sampled.std()


@every_family
def test_particles(float64, family):
    vae, x = make_vae(family), torch.rand(B, E).round()
    terms = draw(vae.model, vae.guide, x, num_particles=K)
    z = terms.guide_trace.nodes["z"]["value"]
    assert z.shape == (K, B, 3) and terms.log_qz.shape == (K, B)
    torch.testing.assert_close(terms.log_qz, vae.encoder(x).log_prob(z))
    torch.testing.assert_close(terms.log_pz, torch.full((K, B), -math.log(4 * math.pi)))


@pytest.mark.parametrize("objective", [IWAE(3), TraceMeanField_ELBO()], ids=lambda o: type(o).__name__)
@every_family
def test_fit_moves_every_parameter(family, objective):
    vae, x = make_vae(family), torch.rand(40, E).round()
    before = {name: value.clone() for name, value in vae.named_parameters()}
    history = fit(vae, x, objective=objective, epochs=2, batch_size=16, lr=0.01, x_valid=x[:B])
    assert all(math.isfinite(v) for column in ("objective", "elbo", "valid_elbo") for v in history[column])
    assert not [name for name, value in vae.named_parameters() if torch.equal(value, before[name])]
    assert active_units(vae, x).shape == (3,) and vae.sample(4).shape == (4, E)


@every_family
def test_reconstructs_from_the_sphere(float64, family):
    vae, x = make_vae(family), torch.rand(B, E).round()
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(vae.encode(x).loc).mean)


@pytest.mark.parametrize(
    ("objective", "dtype"),
    [(ELBO(3), torch.float32), (TraceMeanField_ELBO(), torch.float64)],
    ids=["ELBO", "mean field"],
)
@every_family
def test_a_step_can_be_captured(family, objective, dtype):
    x, losses = torch.rand(B, E, dtype=dtype).round(), []
    for SVI_ in (SVI, lambda *a, **k: FastSVI(*a, **k, backend="replay")):
        pyro.clear_param_store()
        torch.manual_seed(1)
        vae = make_vae(family).to(dtype)
        svi = SVI_(vae.model, vae.guide, Adam({"lr": 0.01}), loss=objective)
        losses.append([float(svi.step(x)) for _ in range(4)])
    assert "eager, since" not in svi.explain()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == torch.float32 else 1e-10)


@every_family
def test_learns_the_circle(family):
    """Data on a circle: one angle explains it, and an encoder on the circle finds it."""
    torch.manual_seed(0)
    angle = 2 * math.pi * torch.rand(300)
    x = torch.stack([angle.cos(), angle.sin()], -1) @ torch.randn(2, 4) + 0.05 * torch.randn(300, 4)
    decoder = Decoder(nn.Linear(2, 4), Normal(0.3))
    vae = VAE(SphereUniform(2), decoder, family(nn.Linear(4, 3)))
    with torch.no_grad():  # in one sense of rotation: a circle that starts out folded stays so
        vae.encoder.net.bias.zero_()
        decoder.net.weight.copy_(vae.encoder.net.weight[:2].T)
    fit(vae, x, epochs=150, batch_size=300, lr=0.1)
    q = vae.encode(x)
    assert decoder.likelihood.log_scale.exp() < 0.15 and q.concentration.median() > 100
    turn = torch.atan2(q.loc[:, 1], q.loc[:, 0])  # the angle itself, up to its origin and its sense
    aligned = [(torch.polar(torch.ones(300), sense * angle - turn)).mean().abs() for sense in (1, -1)]
    assert max(aligned) > 0.95


@every_family
def test_vamp_prior_over_it(float64, family):
    encoder = make(family)
    prior = VampPrior(encoder, torch.randn(K, E))
    check_distribution(prior(), batch_shape=(), event_shape=(3,))
    check_vae(VAE(prior, Decoder(Mlp(3, E), Normal()), encoder), torch.randn(B, E))


@pytest.mark.parametrize(
    ("prior", "encoder", "message"),
    [
        (
            lambda: StandardNormal(3),
            lambda: make(VonMisesFisher),
            "prior.. is over real numbers but encoder.x. over the unit sphere.*the prior SphereUniform, or the enc",
        ),
        (
            lambda: priors.Dirichlet(3),
            lambda: make(PowerSpherical),
            "prior.. is over the simplex but encoder.x. over the unit sphere.*SphereUniform",
        ),
        (
            lambda: SphereUniform(3),
            lambda: DiagonalNormal(Mlp(E, 6)),
            "over the unit sphere but encoder.x. over real numbers.*encoder VonMisesFisher or PowerSpherical",
        ),
        (lambda: SphereUniform(3), lambda: encoders.Delta(Mlp(E, 3)), "over the unit sphere but encoder.x. over real"),
        (lambda: SphereUniform(4), lambda: make(VonMisesFisher), r"event shape \(4,\) but encoder\(x\) has \(3,\)"),
    ],
)
def test_pairs_that_do_not_fit(prior, encoder, message):
    vae = VAE(prior(), Decoder(Mlp(3, E), Normal()), encoder())
    with pytest.raises(ValueError, match=message):
        check_vae(vae, torch.randn(B, E))


@every_family
def test_state_dict_dtype_repr_and_refusals(family):
    one, two, x = make(family), make(family), torch.randn(B, E)
    two.load_state_dict(one.state_dict())
    z = one(x).sample((K,))
    torch.testing.assert_close(one(x).log_prob(z), two(x).log_prob(z))
    assert repr(one).startswith(family.__name__)
    q = one.to(torch.float64)(x.double())
    assert q.sample().dtype == q.log_prob(q.sample()).dtype == q.mean.dtype == torch.float64
    with pytest.raises(ValueError, match=rf"{family.__name__} expected D \+ 1 outputs .* found 2: make the last"):
        family(Mlp(E, 2))(torch.zeros(B, E))


@every_family
def test_scales_and_masks_of_a_site_act_on_it(float64, family):
    """Inside Pyro's handlers it is a distribution like any other."""
    vae, x = make_vae(family), torch.rand(B, E).round()
    with poutine.trace() as tape, poutine.scale(scale=0.5):
        vae.guide(x)
    site = tape.trace.nodes["z"]
    tape.trace.compute_log_prob()
    torch.testing.assert_close(site["log_prob"], 0.5 * vae.encoder(x).log_prob(site["value"]))


@every_family
def test_from_the_command_line(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = f"train --encoder {family.__name__} --prior SphereUniform --latent_dim 3 --epochs 2 --batch_size 512"
    main([*words.split(), "--eval_particles", "3", "--figures", "false", "--out", "run"])
    assert "nats per example" in capsys.readouterr().out
