"""Flows as posteriors: densities, inverses, the memory of the latest draw, training, refusals."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    AutoregressiveFlow,
    CouplingFlow,
    Decoder,
    DiagonalNormal,
    FastSVI,
    HouseholderFlow,
    LowRankNormal,
    Mlp,
    PlanarFlow,
    RadialFlow,
    SplineFlow,
    StandardNormal,
    SylvesterFlow,
    VampPrior,
    draw,
    encoders,
    fit,
)
from pyro_vae.diagnostics import active_units
from pyro_vae.estimates import log_evidence
from pyro_vae.exact import LinearGaussian
from pyro_vae.flows import MaskedMlp
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.testing import check_distribution, check_encoder

K, B, D, E = 3, 5, 2, 7


class AutoregressiveSplineFlow(SplineFlow):
    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, **settings, kind="autoregressive")


FLOWS = {
    PlanarFlow: ({"num_transforms": 3}, {}),
    RadialFlow: ({"num_transforms": 3}, {}),
    AutoregressiveFlow: ({"context_dim": 4}, {"num_transforms": 3, "hidden": 6}),
    CouplingFlow: ({"context_dim": 4}, {"num_transforms": 3, "hidden": 6}),
    SplineFlow: ({"context_dim": 4}, {"num_transforms": 2, "hidden": 6}),
    AutoregressiveSplineFlow: ({"context_dim": 4}, {"num_transforms": 1, "hidden": 6}),
    HouseholderFlow: ({"num_transforms": 3}, {}),
    SylvesterFlow: ({"num_transforms": 2, "num_reflections": 3}, {}),
}
every_flow = pytest.mark.parametrize("family", FLOWS)


def make(family, latent_dim=D, spread=0.0):
    counted, others = FLOWS[family]
    net = Mlp(E, 4, family.num_outputs(latent_dim, **counted), activation=nn.Tanh)
    encoder = family(net, latent_dim, **counted, **others)
    spread = spread / 3 if issubclass(family, SplineFlow) else spread  # eight bins make narrow peaks of large numbers
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return encoder


def make_vae(family, spread=0.0):
    return VAE(StandardNormal(D), Decoder(Mlp(D, 6, E, activation=nn.Tanh), Bernoulli()), make(family, spread=spread))


@every_flow
@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_samples_what_it_scores(float64, family, latent_dim):
    check_encoder(make(family, latent_dim, spread=0.4), torch.randn(2, E))


@every_flow
@pytest.mark.parametrize("latent_dim", [1, 2, 5])
def test_density_by_the_jacobian(float64, family, latent_dim):
    """The score is log N(z_0) - log |det dz/dz_0|, the determinant by automatic differentiation."""
    encoder = make(family, latent_dim, spread=0.5)
    q = encoder(torch.randn(1, E))
    for _ in range(4):
        start = q.base.sample()
        jacobian = torch.autograd.functional.jacobian(lambda z: q._forward(z)[0], start).squeeze()
        expected = q.base.log_prob(start) - jacobian.reshape(latent_dim, latent_dim).det().abs().log()
        torch.testing.assert_close(q.log_prob(q._forward(start)[0]), expected)


@every_flow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse(family, dtype):
    q = make(family, 5, spread=0.4).to(dtype)(torch.randn(B, E, dtype=dtype))
    start = q.base.sample((K,))
    z, log_det = q._forward(start)
    back, same = q._inverse(z)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(back, start, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(same, log_det, atol=tolerance, rtol=tolerance)
    assert z.dtype == q.log_prob(z).dtype == dtype


def test_planar_inverse_at_the_border_of_invertibility(float64):
    """w^T u far below -1: the map is almost flat in one place, and still one to one."""
    encoder = PlanarFlow(nn.Identity(), 1, num_transforms=1)
    q = encoder(torch.tensor([[0.0, 0.0, -8.0, 1.0, 0.3]]))
    start = torch.linspace(-6, 6, 501).reshape(-1, 1, 1)
    z = q._forward(start)[0]
    assert (z.diff(dim=0) > 0).all()
    torch.testing.assert_close(q._inverse(z)[0], start, atol=1e-7, rtol=1e-7)


@every_flow
def test_scores_its_draws_under_particles(float64, family):
    """What the bound reads, from the memory, is what inverting the same draws gives."""
    vae = make_vae(family, spread=0.4)
    x = torch.rand(B, E).round()
    terms = draw(vae.model, vae.guide, x, num_particles=K)
    site = terms.guide_trace.nodes["z"]
    assert site["fn"].batch_shape == (K, B) and site["fn"]._remembered(site["value"]) is not None
    torch.testing.assert_close(terms.log_qz, vae.encoder(x).log_prob(site["value"]))
    torch.testing.assert_close(terms.log_qz, site["fn"].log_prob(site["value"].clone()))


@every_flow
def test_a_draw_from_before_a_step_is_scored_with_the_new_parameters(float64, family):
    vae = make_vae(family, spread=0.4)
    x = torch.rand(B, E).round()
    z = vae.encoder(x).rsample((K,))
    before = vae.encoder(x).log_prob(z)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.05}), loss=Trace_ELBO())
    svi.step(x)
    q = vae.encoder(x)
    assert not torch.allclose(q.log_prob(z), before)
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))
    with torch.no_grad():  # through the map and back
        torch.testing.assert_close(q._forward(q._inverse(z)[0])[0], z)


@every_flow
def test_memory_is_of_one_draw_unchanged_and_with_its_gradients(float64, family):
    encoder = make(family, spread=0.4)
    q = encoder(torch.randn(B, E))
    older, newer = q.rsample(), q.rsample()
    torch.testing.assert_close(q.log_prob(older), q.log_prob(older.clone()))
    torch.testing.assert_close(q.log_prob(newer), q.log_prob(newer.clone()))
    with torch.no_grad():
        newer.mul_(1.5)
        torch.testing.assert_close(q.log_prob(newer), q.log_prob(newer.clone()))

    def slope(z):
        return torch.autograd.grad(q.log_prob(z).sum(), list(encoder.parameters()), retain_graph=True)

    z = q.sample()  # no gradients then, but the score function needs them
    for a, b in zip(slope(z), slope(z.clone()), strict=True):
        torch.testing.assert_close(a, b)
    z = q.rsample()  # total derivative: through the draw too
    for a, b in zip(slope(z), slope(z.clone()), strict=True):
        torch.testing.assert_close(a, b)


@every_flow
def test_the_gradient_of_the_density_in_z(float64, family):
    q = make(family, 3, spread=0.4)(torch.randn(B, E))
    z = torch.randn(K, B, 3).requires_grad_()
    assert torch.autograd.gradcheck(q.log_prob, z, atol=1e-5)


@every_flow
def test_mean_is_close_and_steady(float64, family):
    encoder = make(family, spread=0.3)
    q = encoder(torch.randn(B, E))
    state = torch.get_rng_state()
    assert torch.equal(q.mean, q.mean) and torch.equal(torch.get_rng_state(), state)
    z = q.sample((20_000,))
    assert ((q.mean - z.mean(0)).abs() < 0.05 * z.std(0)).all()
    assert q.expand((K, B)).mean.shape == (K, B, D)


@pytest.mark.parametrize("family", [AutoregressiveFlow, CouplingFlow])
def test_starts_as_the_diagonal_normal(float64, family):
    encoder, x = make(family), torch.randn(B, E)
    h, q = encoder.net(x), encoder(x)
    torch.testing.assert_close(q.log_prob(q.sample((K,)).clone()), q.base.log_prob(q._latest[3]))
    torch.testing.assert_close(q.mean.sort(-1)[0], h[:, :D].sort(-1)[0])  # the order of z turns round


def test_a_spline_flow_starts_as_the_diagonal_normal_of_its_network(float64):
    encoder, x, z = make(SplineFlow), torch.randn(B, E), torch.randn(K, B, D)
    loc, log_scale, _ = encoder.net(x).split([D, D, 4], dim=-1)
    expected = pyro.distributions.Normal(loc, log_scale.exp()).to_event(1)  # two maps: the halves are back in place
    torch.testing.assert_close(encoder(x).log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(encoder(x).mean, loc)


def test_masks(float64):
    """Outputs of number d do not move with the numbers from d on, but with each before it and the context."""
    net = MaskedMlp(4, 3, hidden=9, activation=nn.Tanh)
    nn.init.normal_(net.out.weight)
    z, context = torch.randn(4), torch.randn(3)
    by_z, by_context = torch.autograd.functional.jacobian(net, (z, context))
    expected = torch.ones(4, 4).tril(-1).bool()
    assert torch.equal(by_z[:4] != 0, expected) and torch.equal(by_z[4:] != 0, expected)
    assert (by_context != 0).all()


@pytest.mark.parametrize("objective", [ELBO(), IWAE(3)], ids=repr)
@every_flow
def test_fit_moves_every_parameter(family, objective):
    vae, x = make_vae(family), torch.rand(40, E).round()
    before = {name: value.clone() for name, value in vae.named_parameters()}
    history = fit(vae, x, objective=objective, epochs=2, batch_size=16, lr=0.01, x_valid=x[:B])
    assert all(math.isfinite(v) for column in ("objective", "elbo", "valid_elbo") for v in history[column])
    assert not [name for name, value in vae.named_parameters() if torch.equal(value, before[name])]
    assert vae.reconstruct(x).shape == (40, E) and active_units(vae, x).shape == (D,)
    assert math.isfinite(log_evidence(vae, x[:B], num_particles=10).mean)


# Single precision: test_captured_members.py captures every member in double, but not the autoregressive splines.
CAPTURED = [PlanarFlow, AutoregressiveFlow, SplineFlow, HouseholderFlow, LowRankNormal, encoders.MixtureOfNormals]


@pytest.mark.parametrize(
    ("family", "dtype"), [*((f, torch.float32) for f in CAPTURED), (AutoregressiveSplineFlow, torch.float64)]
)
def test_a_step_can_be_captured(family, dtype):
    """One graph, without branches on values, that gives what the eager step gives."""
    x, losses = torch.rand(B, E, dtype=dtype).round(), []
    for SVI_ in (SVI, lambda *a, **k: FastSVI(*a, **k, backend="replay")):
        pyro.clear_param_store()
        torch.manual_seed(1)
        encoder = make(family) if family in FLOWS else family(Mlp(E, 4, family.num_outputs(D)))
        vae = VAE(StandardNormal(D), Decoder(Mlp(D, 6, E), Bernoulli()), encoder).to(dtype)
        svi = SVI_(vae.model, vae.guide, Adam({"lr": 0.01}), loss=ELBO(3))
        losses.append([float(svi.step(x)) for _ in range(4)])
    assert "eager, since" not in svi.explain()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 1e-10)


@every_flow
def test_vamp_prior_over_it(float64, family):
    latent_dim = 1 if family in (AutoregressiveSplineFlow, SylvesterFlow) else D  # these are slow to invert
    encoder = make(family, latent_dim, spread=0.4)
    check_distribution(VampPrior(encoder, torch.randn(K, E))(), batch_shape=(), event_shape=(latent_dim,))


def correlated():
    """A linear-Gaussian VAE whose posterior has correlation -0.97 or so; only the encoder is to be trained."""
    weight = torch.tensor([[1.0, 0.9], [0.8, 0.9], [1.1, 1.0], [0.9, 1.0]])
    return LinearGaussian(weight, torch.zeros(4), scale=0.5)


def correlated_world():
    """It, data of it, its decoder, and the weights of the exact posterior's mean."""
    exact = correlated()
    x = torch.randn(64, D) @ exact.weight.T + exact.scale * torch.randn(64, 4)
    decoder = Decoder(nn.Linear(D, 4), Normal(exact.scale, learn_scale=False))
    with torch.no_grad():
        decoder.net.weight.copy_(exact.weight)
        decoder.net.bias.zero_()
    return exact, x, decoder.requires_grad_(False), exact.posterior(torch.eye(4)).mean.T


def start_at_the_best_diagonal(net, mean, exact):
    """Mean and scale of the best posterior that has no correlation: 1 / scale^2 is the precision's diagonal."""
    precision = torch.linalg.inv(exact.posterior(torch.zeros(1, 4)).covariance_matrix[0])
    with torch.no_grad():
        net.weight[:D], net.bias[:D] = mean, 0.0
        net.weight[D:] *= 0.1
        net.bias[D : 2 * D] = -0.5 * precision.diagonal().log()


def elbo_of(vae, x):
    with torch.no_grad():
        return ELBO(200).bound(vae.model, vae.guide, x).mean().item()


def test_the_best_diagonal_normal_on_a_correlated_posterior(float64):
    """The gap in closed form that the flows are to close."""
    exact, x, decoder, mean = correlated_world()
    net = nn.Linear(4, 2 * D)
    start_at_the_best_diagonal(net, mean, exact)
    net.weight.data[D:] = 0.0
    with torch.no_grad():
        vae = VAE(StandardNormal(D), decoder, DiagonalNormal(net))
        drawn = ELBO(1).bound(vae.model, vae.guide, x.repeat(500, 1)).reshape(500, 64).mean(1)
    error = drawn.std() / math.sqrt(len(drawn))
    assert error < 0.02 and abs(drawn.mean() - exact.log_evidence(x).mean() + exact.diagonal_gap()) < 4 * error


@pytest.mark.parametrize(
    "family", [LowRankNormal, PlanarFlow, AutoregressiveFlow, CouplingFlow, HouseholderFlow, SylvesterFlow]
)
def test_beats_the_diagonal_normal_on_a_correlated_posterior(float64, family):
    """Trained from there, it closes more than half of the gap of the best diagonal normal, and exceeds no evidence."""
    exact, x, decoder, mean = correlated_world()
    counted = {PlanarFlow: 4, HouseholderFlow: 1, SylvesterFlow: 4}
    options = {"num_transforms": counted[family]} if family in counted else {"context_dim": 4}
    options = {} if family is LowRankNormal else options
    sizes = {} if family is LowRankNormal else {"latent_dim": D}
    net = nn.Linear(4, family.num_outputs(D, **options))
    encoder = family(net, **sizes, **options)
    if family is HouseholderFlow:  # its mean is reflected, too
        with torch.no_grad():
            net.weight[2 * D :] = 0.0
            (v,) = encoder(x).maps[0].normals
            mean = mean - 2 * torch.outer(v[0], v[0]) @ mean
    start_at_the_best_diagonal(net, mean, exact)
    vae = VAE(StandardNormal(D), decoder, encoder)
    settings = {"epochs": 150, "lr": 0.05} if family is SylvesterFlow else {"epochs": 100, "lr": 0.03}
    fit(vae, x, objective=ELBO(4), batch_size=64, **settings)
    best = exact.log_evidence(x).mean().item()
    assert best - 0.5 * exact.diagonal_gap() < elbo_of(vae, x) < best + 0.02


@pytest.mark.parametrize("latent_dim", [1, 3, 6])
def test_householder_flow_is_a_normal_with_correlations(float64, latent_dim):
    """Draws are H z_0: mean H m and covariance H diag(s^2) H^T, with H = H_T ... H_1 written out."""
    q = make(HouseholderFlow, latent_dim, spread=0.5)(torch.randn(B, E))
    h = torch.eye(latent_dim).expand(B, -1, -1)
    for v in q.maps[0].normals:  # H_1 ... H_T as the map applies them
        h = h @ (torch.eye(latent_dim) - 2 * v.unsqueeze(-1) * v.unsqueeze(-2))
    loc, scale = q.base.base_dist.loc.unsqueeze(-1), torch.diag_embed(q.base.base_dist.scale)
    expected = torch.distributions.MultivariateNormal((h @ loc).squeeze(-1), h @ scale**2 @ h.mT)
    z = torch.randn(K, B, latent_dim)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(q.mean, expected.mean)
    torch.testing.assert_close(h @ h.mT, torch.eye(latent_dim).expand(B, -1, -1))


def test_sylvester_inverse_at_the_border_of_invertibility():
    """Diagonals as close to -1 and 1 as single precision has them, and large numbers above them."""
    encoder = SylvesterFlow(nn.Identity(), 3, num_transforms=1, num_reflections=1)
    dim, above = 3, 3
    row = [*[0.0] * 2 * dim, 1.0, 0.5, 0.2, *[0.0] * dim, *[30.0] * dim, *[-30.0] * dim, *[2.0] * 2 * above]
    q = encoder(torch.tensor([row]))
    start = torch.cat([torch.zeros(1, 1, dim), q.base.sample((500,))])  # at 0 the map is flattest
    z, log_det = q._forward(start)
    assert torch.isfinite(log_det).all() and torch.isfinite(q.log_prob(z.clone())).all()
    torch.testing.assert_close(q._forward(q._inverse(z)[0])[0], z, atol=1e-3, rtol=1e-3)


def test_a_spline_flow_has_two_modes_where_an_affine_one_has_one(float64):
    """The decoder sees z^2 only, so the posterior has both signs; log 2 nats are lost by a posterior with one."""
    x = torch.full((40, 1), 1.5) + 0.2 * torch.randn(40, 1)

    def square(z):
        return pyro.distributions.Normal(z**2, 0.6).to_event(1)

    gaps = {}
    grid = torch.linspace(-4, 4, 4001).reshape(-1, 1, 1)
    log_joint = StandardNormal(1)().log_prob(grid) + square(grid.expand(-1, 40, 1)).log_prob(x)
    evidence = (log_joint.logsumexp(0) + math.log(8 / 4000)).mean()
    for name, family, settings in (
        ("spline", SplineFlow, {"num_transforms": 1}),
        ("affine", CouplingFlow, {"num_transforms": 2}),
    ):
        torch.manual_seed(0)
        encoder = family(nn.Linear(1, family.num_outputs(1, context_dim=4)), 1, hidden=8, context_dim=4, **settings)
        for parameter in encoder.net.parameters():
            nn.init.zeros_(parameter)  # in the middle: a posterior that starts at one of the modes stays there
        vae = VAE(StandardNormal(1), square, encoder)
        fit(vae, x, objective=ELBO(20), epochs=150, batch_size=40, lr=0.05)
        with torch.no_grad():
            gaps[name] = evidence - ELBO(500).bound(vae.model, vae.guide, x).mean()
    assert -0.02 < gaps["spline"] < 0.06 and gaps["affine"] > 0.6


@every_flow
def test_state_dict_dtype_and_repr(family):
    one, two, x = make(family, spread=0.3), make(family, spread=0.3), torch.randn(B, E)
    assert not any(name.endswith(("points", "mask_in", "mask_out")) for name in one.state_dict())
    two.load_state_dict(one.state_dict())
    z = torch.randn(K, B, D)
    torch.testing.assert_close(one(x).log_prob(z), two(x).log_prob(z))
    assert repr(one).startswith(family.__name__) and "latent_dim=2, num_transforms=" in repr(one)
    q = one.to(torch.float64)(x.double())
    assert q.sample().dtype == q.log_prob(q.sample()).dtype == q.mean.dtype == torch.float64


@every_flow
def test_refusals(family):
    with pytest.raises(ValueError, match=rf"{family.__name__} expected \d+ outputs of its network, found 3: make the"):
        family(Mlp(E, 3), D)(torch.zeros(B, E))
    with pytest.raises(ValueError, match="expected num_transforms >= 1, found 0"):
        family(Mlp(E, 3), D, num_transforms=0)
    with pytest.raises(ValueError, match="expected latent_dim >= 1, found 0"):
        family(Mlp(E, 3), 0)
    if family is SplineFlow:
        with pytest.raises(ValueError, match="expected kind 'coupling' or 'autoregressive', found 'spline'"):
            family(Mlp(E, 3), 2, kind="spline")
    if family is SylvesterFlow:
        with pytest.raises(ValueError, match="expected num_reflections >= 1, found 0"):
            family(Mlp(E, 3), 2, num_reflections=0)
    q = make(family)(torch.zeros(B, E))
    with pytest.raises(ValueError, match="within the support"):
        q.log_prob(torch.full((B, D), math.nan))
