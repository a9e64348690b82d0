"""Priors: the contract, closed forms, gradients, training, state."""

import copy
import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.distributions import ComposeTransform, kl_divergence

from pyro_vae import (
    ELBO,
    VAE,
    Decoder,
    DiagonalNormal,
    FastSVI,
    FlowPrior,
    FullNormal,
    LearnedNormal,
    MixtureOfNormals,
    Mlp,
    SphereUniform,
    StandardNormal,
    VampPrior,
    check_vae,
    draw,
    fit,
    likelihoods,
    priors,
)
from pyro_vae.exact import log_evidence_by_quadrature
from pyro_vae.testing import check_prior

C, D, E, K, B = 4, 2, 7, 3, 5


def log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log N(z; loc, diag scale^2), by hand."""
    return (-0.5 * ((z - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def randomised(prior, std: float = 0.5):
    """Every parameter away from its starting value, where mistakes hide."""
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return prior


REAL = {  # priors on R^D
    "StandardNormal": lambda: StandardNormal(D, scale=0.7),
    "LearnedNormal": lambda: LearnedNormal(D),
    "Laplace": lambda: priors.Laplace(D, scale=0.7),
    "StudentT": lambda: priors.StudentT(D, df=4.0, scale=0.7),
    "MixtureOfNormals": lambda: MixtureOfNormals(D, num_components=C),
    "coupling": lambda: FlowPrior(D, "coupling", num_transforms=3, hidden=6),
    "autoregressive": lambda: FlowPrior(D, "autoregressive", num_transforms=2, hidden=6),
    "spline": lambda: FlowPrior(D, "spline", num_transforms=2, hidden=6),
    "autoregressive_spline": lambda: FlowPrior(D, "autoregressive_spline", num_transforms=2, hidden=6),
}
OTHER = {  # priors on something else
    "LogisticNormal": lambda: priors.LogisticNormal(3, scale=0.7),
    "Dirichlet": lambda: priors.Dirichlet(3, concentration=1.7),
    "SphereUniform": lambda: SphereUniform(3),
    "OneHotCategorical": lambda: priors.OneHotCategorical(4),
    "OneHotCategorical, learned": lambda: priors.OneHotCategorical(4, learn=True),
    "Bernoulli": lambda: priors.Bernoulli(3, probs=0.3),
}
ALL = REAL | OTHER
KINDS = ["coupling", "autoregressive", "spline", "autoregressive_spline"]
FLOWS = [REAL[kind] for kind in KINDS]
every_flow = pytest.mark.parametrize("make", FLOWS, ids=KINDS)


@pytest.fixture
def mixture(float64) -> MixtureOfNormals:
    prior = MixtureOfNormals(D, num_components=C, spread=2.0)
    with torch.no_grad():
        prior.logits.normal_()
        prior.log_scale.normal_(std=0.5)
    return prior


# The contract


@pytest.mark.parametrize("name", ALL)
def test_contract(name):
    check_prior(randomised(ALL[name](), std=0.2 if "spline" in name else 0.5))


@pytest.mark.parametrize(
    "prior",
    [
        LearnedNormal(1),
        LearnedNormal(5),
        priors.Laplace(1),
        priors.Laplace(4, scale=1.3),
        priors.StudentT(1, df=1.0),
        priors.StudentT(3, df=2.5, scale=1.3),
        FlowPrior(3, "coupling", num_transforms=2, hidden=5),
        FlowPrior(3, "autoregressive", num_transforms=1, hidden=5),
        FlowPrior(6, "coupling", num_transforms=2, hidden=8),
        FlowPrior(6, "autoregressive", num_transforms=2, hidden=8),
        priors.LogisticNormal(2, scale=1.5),
        priors.LogisticNormal(5),
        priors.Dirichlet(2, concentration=0.7),
        priors.Dirichlet(5),
        priors.Bernoulli(1, probs=0.9),
        FlowPrior(1, "autoregressive_spline", num_transforms=2, hidden=3),
        FlowPrior(3, "autoregressive_spline", num_transforms=1, hidden=5),
        FlowPrior(4, "spline", num_transforms=2, hidden=5),
    ],
    ids=lambda prior: f"{type(prior).__name__}({prior.extra_repr()})",
)
def test_contract_in_other_dimensions(prior):
    check_prior(randomised(prior, std=0.3))


@pytest.mark.parametrize("name", ALL)
def test_shapes_with_particles_and_in_a_plate(name, float64):
    prior = randomised(ALL[name]())
    (width,) = prior().event_shape
    z = prior().sample((K, B))
    log_p = prior().log_prob(z)
    assert z.shape == (K, B, width) and log_p.shape == (K, B)
    torch.testing.assert_close(torch.stack([prior().log_prob(part) for part in z]), log_p)

    def model():
        with pyro.plate("particles", K, dim=-2), pyro.plate("data", B, dim=-1):
            return pyro.sample("z", prior())

    site = pyro.poutine.trace(model).get_trace().nodes["z"]
    assert site["value"].shape == (K, B, width) and site["fn"].batch_shape == (K, B)
    log_p = site["fn"].log_prob(site["value"])
    assert log_p.shape == (K, B)
    torch.testing.assert_close(prior().log_prob(site["value"].clone()), log_p)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_every_parameter(name):
    prior = randomised(ALL[name]())
    z = prior().sample((B,))
    parameters = dict(prior.named_parameters())
    if parameters:
        prior().log_prob(z).sum().backward()
    for parameter_name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


# Closed forms


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


def test_learned_normal_has_a_closed_form_kl(float64):
    prior = LearnedNormal(D)
    assert torch.equal(prior().log_prob(torch.ones(D)), StandardNormal(D)().log_prob(torch.ones(D)))
    randomised(prior)
    q = DiagonalNormal(Mlp(E, 2 * D))(torch.randn(B, E))
    m, s, scale = q.base_dist.loc, q.base_dist.scale, prior.log_scale.exp()
    expected = ((scale / s).log() + (s**2 + (m - prior.loc) ** 2) / (2 * scale**2) - 0.5).sum(-1)
    kl = kl_divergence(q, prior())
    torch.testing.assert_close(kl, expected)
    gradients = [torch.autograd.grad(k.sum(), list(prior.parameters()), retain_graph=True) for k in (kl, expected)]
    torch.testing.assert_close(*gradients)


def test_laplace_and_student_t_by_hand(float64):
    z = torch.randn(K, B, D)
    torch.testing.assert_close(REAL["Laplace"]()().log_prob(z), (-z.abs() / 0.7 - math.log(2 * 0.7)).sum(-1))
    # four degrees of freedom: 3/8 (1 + t^2 / 4)^(-5/2)
    expected = (math.log(3 / 8 / 0.7) - 2.5 * (1 + (z / 0.7) ** 2 / 4).log()).sum(-1)
    torch.testing.assert_close(REAL["StudentT"]()().log_prob(z), expected)


def test_tails(float64):
    """Beyond some point the normal lies below the Laplace, and that below the Student t; the limit of t is normal."""
    z = torch.arange(8.0, 40.0).unsqueeze(-1)
    normal, laplace, student = (
        prior().log_prob(z) for prior in (StandardNormal(1), priors.Laplace(1), priors.StudentT(1))
    )
    assert (normal < laplace).all() and (laplace < student)[20:].all()
    near = torch.linspace(-3, 3, 13).unsqueeze(-1)
    student, normal = priors.StudentT(1, df=1e7)().log_prob(near), StandardNormal(1)().log_prob(near)
    torch.testing.assert_close(student, normal, atol=1e-5, rtol=0)


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


# Flows


@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
@pytest.mark.parametrize("latent_dim", [2, 3, 5])
def test_flow_is_a_change_of_variables(float64, kind, latent_dim):
    p = randomised(FlowPrior(latent_dim, kind, num_transforms=3, hidden=6))()
    to_z = ComposeTransform(p.transforms)
    for x in torch.randn(B, latent_dim):
        log_det = torch.linalg.slogdet(jacobian(to_z, x)).logabsdet
        expected = log_normal(x, torch.zeros(latent_dim), torch.ones(latent_dim)) - log_det
        torch.testing.assert_close(p.log_prob(to_z(x).clone()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["spline", "autoregressive_spline"])
@pytest.mark.parametrize("latent_dim", [2, 3, 5])
def test_spline_flow_is_a_change_of_variables(float64, kind, latent_dim):
    p = randomised(FlowPrior(latent_dim, kind, num_transforms=3, hidden=6))()
    for x in torch.randn(B, latent_dim):
        log_det = torch.linalg.slogdet(jacobian(lambda value: p._forward(value)[0], x)).logabsdet
        expected = log_normal(x, torch.zeros(latent_dim), torch.ones(latent_dim)) - log_det
        torch.testing.assert_close(p.log_prob(p._forward(x)[0]), expected, rtol=1e-8, atol=1e-8)


@every_flow
def test_flow_starts_as_the_standard_normal(make):
    z = torch.randn(K, B, D)
    torch.testing.assert_close(make()().log_prob(z), StandardNormal(D)().log_prob(z))


def test_one_autoregressive_transform_is_normal_given_the_dimensions_before(float64):
    """The score is quadratic in the last dimension, and x_d is a function of z_1, ..., z_d alone."""
    p = randomised(FlowPrior(3, "autoregressive", num_transforms=1, hidden=6))()
    z = torch.randn(B, 3)
    last = torch.linspace(-4, 4, 9)
    along = torch.cat([z[:1, :2].expand(9, 2), last.unsqueeze(-1)], dim=-1)
    curvature = p.log_prob(along).diff(n=2)
    torch.testing.assert_close(curvature, curvature[:1].expand(7))
    x = p.transforms[0].inv
    triangle = jacobian(lambda value: x(value), z[0])
    assert torch.equal(triangle, triangle.tril()) and (triangle.diagonal() > 0).all()
    assert (triangle.tril(-1) != 0).sum() == 3


@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
def test_every_dimension_of_a_flow_is_transformed_in_the_end(float64, kind):
    """One transform leaves the first half (coupling) or the mean and scale of z_1 (masked) alone; two do not."""
    z = torch.randn(B, 3)
    for num_transforms, complete in ((1, False), (2, True)):
        p = randomised(FlowPrior(3, kind, num_transforms=num_transforms, hidden=6))()
        to_x = ComposeTransform(p.transforms).inv
        depends = (jacobian(lambda one, f=to_x: f(one), z[0]) != 0)[0]
        assert bool(depends[1:].any()) == complete


def test_one_autoregressive_spline_gives_each_dimension_a_density_given_those_before(float64):
    """p(z_1) p(z_2 | z_1) p(z_3 | z_1, z_2): noise x_d grows with z_d, and sees those before it alone."""
    p = randomised(FlowPrior(3, "autoregressive_spline", num_transforms=1, hidden=6))()
    triangle = jacobian(lambda z: p._inverse(z)[0].flip(-1), torch.randn(3).clamp(-2, 2))
    assert torch.equal(triangle != 0, torch.ones(3, 3).tril().bool()) and (triangle.diagonal() > 0).all()


@every_flow
def test_a_flow_scores_in_one_pass_of_each_network(make):
    prior, calls = make(), []
    for net in prior.nets:
        net.register_forward_hook(lambda *_: calls.append(1))
    prior().log_prob(torch.randn(B, D))
    assert len(calls) == len(prior.nets)


@every_flow
def test_flow_answers_from_its_present_parameters(float64, make):
    prior = randomised(make(), std=0.2)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-3)
    z = prior().sample((B,))  # the very same tensor, which a cached transform would recognise
    values = []
    for _ in range(2):
        optimizer.zero_grad()
        value = prior().log_prob(z).mean()
        (-value).backward()
        values.append(value.item())
        fresh = make()
        fresh.load_state_dict(prior.state_dict())
        fresh().log_prob(z.clone()).mean().backward()
        for ours, theirs in zip(prior.parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, -theirs.grad)
        optimizer.step()
        fresh.load_state_dict(prior.state_dict())
        torch.testing.assert_close(prior().log_prob(z), fresh().log_prob(z.clone()))
    assert values[1] > values[0]
    copy.deepcopy(prior)  # refused if a graph of the past hung on it
    held = [v for module in prior.modules() for v in vars(module).values() if isinstance(v, Tensor) and v.requires_grad]
    assert not held


@pytest.mark.parametrize("make", FLOWS[:2], ids=KINDS[:2])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_flow_samples_and_inverts_in_its_own_type(make, default):
    prior = randomised(make()).to(torch.float64)
    torch.set_default_dtype(default)
    x = torch.randn(B, D, dtype=torch.float64)
    z = ComposeTransform(prior().transforms)(x)
    torch.testing.assert_close(ComposeTransform(prior().transforms).inv(z), x, rtol=1e-12, atol=1e-12)
    assert prior().rsample().dtype == torch.float64


def test_flow_learns_a_density_that_no_normal_has():
    """Most of the gap between the best normal and a banana is closed in a few hundred steps."""
    noise = torch.randn(512, 2)
    z = torch.stack([noise[:, 0], 0.3 * noise[:, 1] + noise[:, 0] ** 2 - 1], dim=-1)
    entropy = 1 + math.log(2 * math.pi) + math.log(0.3)
    scores = []
    for prior in (LearnedNormal(2), FlowPrior(2, num_transforms=2, hidden=16)):
        optimizer = torch.optim.Adam(prior.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            loss = -prior().log_prob(z).mean()
            loss.backward()
            optimizer.step()
        scores.append(loss.item())
    normal, flow = scores
    assert normal - entropy > 1.0 and flow - entropy < 0.25


def test_a_spline_learns_three_modes_in_one_dimension():
    """One transform of one number, within a twentieth of a nat of the truth, where shift and scale reach the normal."""
    z = 0.3 * torch.randn(600, 1) + torch.tensor([-2.5, 0.0, 2.5]).repeat(200).unsqueeze(-1)
    truth = torch.stack([log_normal(z, torch.full((1,), m), torch.full((1,), 0.3)) for m in (-2.5, 0.0, 2.5)])
    best = truth.logsumexp(0).mean() - math.log(3)
    prior = FlowPrior(1, "autoregressive_spline", num_transforms=1, hidden=3)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -prior().log_prob(z).mean()
        loss.backward()
        optimizer.step()
    normal = -0.5 * math.log(2 * math.pi * math.e * z.var().item())
    assert best - (-loss) < 0.05 < best - normal - 0.5


# Simplex, sphere, bits


def test_simplex_priors_by_hand(float64):
    z = priors.LogisticNormal(3)().sample((B,))
    torch.testing.assert_close(z.sum(-1), torch.ones(B))
    sticks = torch.stack([z[:, 0], z[:, 1] / (1 - z[:, 0])], dim=-1)
    x = sticks.logit() + torch.tensor([2.0, 1.0]).log()
    stretch = sticks.log() + (1 - sticks).log()  # log dv/dx
    log_det = stretch.sum(-1) + (1 - z[:, 0]).log()  # dz_1 = dv_1, dz_2 = (1 - v_1) dv_2 + ...
    expected = log_normal(x, torch.zeros(2), torch.full((2,), 0.7)) - log_det
    torch.testing.assert_close(priors.LogisticNormal(3, scale=0.7)().log_prob(z), expected)

    constant = math.lgamma(3 * 1.7) - 3 * math.lgamma(1.7)
    torch.testing.assert_close(priors.Dirichlet(3, 1.7)().log_prob(z), constant + 0.7 * z.log().sum(-1))


@pytest.mark.parametrize(("latent_dim", "area"), [(2, 2 * math.pi), (3, 4 * math.pi), (4, 2 * math.pi**2)])
def test_sphere(float64, latent_dim, area):
    p, n = SphereUniform(latent_dim)(), 40_000
    z = p.sample((n,))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(n))
    torch.testing.assert_close(p.log_prob(z), torch.full((n,), -math.log(area)))
    assert (p.mean == 0).all() and (p.variance == 1 / latent_dim).all()

    products = torch.einsum("ni,nj->nij", z, z)
    for values, expected in ((z, torch.zeros(latent_dim)), (products, torch.eye(latent_dim) / latent_dim)):
        error = values.std(0) / math.sqrt(n) + 1e-12
        assert ((values.mean(0) - expected).abs() < 4.5 * error).all()
    # mean and covariance leave the shape open; the uniform law has E z_1^4 = 3 / (D (D + 2))
    fourth = z[:, 0] ** 4
    assert abs(fourth.mean() - 3 / (latent_dim * (latent_dim + 2))) < 4.5 * fourth.std() / math.sqrt(n)


def test_sphere_has_no_density_elsewhere():
    prior, z = SphereUniform(3), torch.randn(B, 3)
    with pytest.raises(ValueError, match="within the support"):
        prior().log_prob(z)
    with pyro.validation_enabled(False):
        assert (prior().log_prob(z) == -math.inf).all()
    vae = VAE(prior, Decoder(Mlp(3, E), likelihoods.Normal()), DiagonalNormal(Mlp(E, 6)))
    with pytest.raises(ValueError, match="choose the prior StandardNormal, or the encoder VonMisesFisher or PowerSph"):
        check_vae(vae, torch.randn(B, E))
    assert prior().expand((K, B)).rsample().shape == (K, B, 3)


def test_discrete_priors_by_hand(float64):
    learned = randomised(priors.OneHotCategorical(4, learn=True))
    torch.testing.assert_close(learned().log_prob(torch.eye(4)), learned.logits.log_softmax(0))
    torch.testing.assert_close(priors.OneHotCategorical(4)().log_prob(torch.eye(4)), torch.full((4,), -math.log(4)))
    bits = torch.tensor([0.0, 1.0, 1.0])
    expected = torch.tensor(0.7 * 0.3**2).log()
    torch.testing.assert_close(priors.Bernoulli(3, probs=0.3)().log_prob(bits), expected)


# In a VAE


@pytest.mark.parametrize("name", [*REAL, "VampPrior"])
def test_fit_moves_every_parameter(name):
    x = torch.randn(40, E)
    encoder = DiagonalNormal(Mlp(E, 6, 2 * D))
    prior = VampPrior(encoder, x, num_components=C) if name == "VampPrior" else REAL[name]()
    vae = VAE(prior, Decoder(Mlp(D, 6, E), likelihoods.Normal()), encoder)
    before = copy.deepcopy(dict(vae.named_parameters()))
    history = fit(vae, x, epochs=2, batch_size=16, lr=0.01)
    assert all(math.isfinite(value) for row in history.rows for value in row.values())
    for parameter_name, parameter in vae.named_parameters():
        assert not torch.equal(parameter, before[parameter_name]), parameter_name
    with torch.no_grad():
        assert torch.isfinite(vae.sample(3)).all() and vae.sample(3).shape == (3, E)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_log_evidence_by_quadrature(float64, monkeypatch, name, latent_dim):
    """Importance sampling with many particles agrees with a sum over a grid of z within three standard errors."""
    if latent_dim == 1 and name in ("coupling", "autoregressive", "spline"):
        pytest.skip("needs two dimensions or more")
    monkeypatch.setitem(globals(), "D", latent_dim)
    prior = randomised(REAL[name](), std=0.3)
    decoder = Decoder(Mlp(latent_dim, 6, E, activation=nn.Tanh), likelihoods.Normal(0.6))
    vae = VAE(prior, decoder, DiagonalNormal(Mlp(E, 6, 2 * latent_dim)))
    with torch.no_grad():
        vae.encoder.net[-1].bias[latent_dim:] += 0.3  # wide enough for every weight to be bounded in practice
        x = vae.sample(B)
        expected = log_evidence_by_quadrature(prior, decoder, x, limit=12.0)
        terms = draw(vae.model, vae.guide, x, num_particles=20_000)
    weight = (terms.log_w - expected).exp()
    error = weight.std(0) / math.sqrt(len(weight))
    assert (error < 0.1).all() and ((weight.mean(0) - 1).abs() < 3 * error).all()


@pytest.mark.parametrize("name", [*KINDS, "StudentT", "VampPrior"])
def test_a_step_can_be_captured(name):
    """One graph, without branches on values, that gives what the eager step gives."""
    x, losses = torch.randn(B, E), []
    for SVI_ in (SVI, lambda *a, **k: FastSVI(*a, **k, backend="replay")):
        pyro.clear_param_store()
        torch.manual_seed(1)
        encoder = DiagonalNormal(Mlp(E, 6, 2 * D))
        prior = VampPrior(encoder, torch.randn(C, E)) if name == "VampPrior" else REAL[name]()
        vae = VAE(prior, Decoder(Mlp(D, 6, E), likelihoods.Normal()), encoder)
        svi = SVI_(vae.model, vae.guide, Adam({"lr": 0.01}), loss=ELBO(3))
        losses.append([float(svi.step(x)) for _ in range(3)])
    assert "eager, since" not in svi.explain()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_encoder_of_the_label_is_a_prior_that_depends_on_it(float64):
    """p(z | y) = N(m_y, diag s_y^2), in a model of one's own; exact, with the same as guide."""
    labels = torch.eye(C)[torch.tensor([0, 3, 1, 1, 2])]
    prior = DiagonalNormal(nn.Linear(C, 2 * D))
    decoder = Decoder(Mlp(D, 6, E), likelihoods.Normal())

    def model(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("x", decoder(pyro.sample("z", prior(y))), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior(y))

    terms = draw(model, guide, torch.randn(B, E), labels, num_particles=K)
    torch.testing.assert_close(terms.log_w, terms.log_px)
    (loc, log_scale) = prior.net(labels).chunk(2, -1)
    z = terms.guide_trace.nodes["z"]["value"]
    torch.testing.assert_close(terms.log_pz, log_normal(z, loc, log_scale.exp()))


@pytest.mark.parametrize("s", [0.1, 3.0])
def test_a_scale_of_the_prior_changes_nothing(float64, s):
    """KL(N(s m, s^2 v), N(0, s^2)) = KL(N(m, v), N(0, 1)), and the whole bound follows if the networks rescale z."""
    loc, scale = torch.randn(B, D), torch.randn(B, D).exp()
    normal = pyro.distributions.Normal
    kl = kl_divergence(normal(loc, scale).to_event(1), StandardNormal(D)())
    scaled = kl_divergence(normal(s * loc, s * scale).to_event(1), StandardNormal(D, scale=s)())
    torch.testing.assert_close(scaled, kl, rtol=1e-12, atol=1e-12)
    by_hand = (-scale.log() + (scale**2 + loc**2 - 1) / 2).sum(-1)
    torch.testing.assert_close(kl, by_hand, rtol=1e-12, atol=1e-12)

    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 6, E), likelihoods.Normal()), DiagonalNormal(Mlp(E, 6, 2 * D)))
    other = copy.deepcopy(vae)
    other.prior = StandardNormal(D, scale=s)
    heads, first = other.encoder.net[-1], other.decoder.net[0]
    with torch.no_grad():
        heads.weight[:D] *= s
        heads.bias[:D] *= s
        heads.bias[D:] += math.log(s)
        first.weight /= s
    x = torch.randn(B, E)
    bounds, terms = [], []
    for one in (vae, other):
        torch.manual_seed(1)
        bounds.append(ELBO(num_particles=K).bound(one.model, one.guide, x))
        torch.manual_seed(1)
        terms.append(draw(one.model, one.guide, x, num_particles=K))
    torch.testing.assert_close(*bounds, rtol=0, atol=1e-10)
    torch.testing.assert_close(terms[0].log_px, terms[1].log_px, rtol=0, atol=1e-10)
    shift = D * math.log(s)  # a density of z changes with its unit, the bound does not
    torch.testing.assert_close(terms[1].log_pz, terms[0].log_pz - shift, rtol=0, atol=1e-10)


# State


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: StandardNormal(D, scale=0.7), "StandardNormal(latent_dim=2, scale=0.7)"),
        (lambda: MixtureOfNormals(D, num_components=C), "MixtureOfNormals(latent_dim=2, num_components=4)"),
        (lambda: VampPrior(DiagonalNormal(Mlp(E, 2 * D)), torch.randn(C, E)), "num_components=4"),
        (REAL["LearnedNormal"], "LearnedNormal(latent_dim=2)"),
        (REAL["Laplace"], "Laplace(latent_dim=2, scale=0.7)"),
        (REAL["StudentT"], "StudentT(latent_dim=2, df=4.0, scale=0.7)"),
        (REAL["coupling"], "latent_dim=2, kind='coupling', num_transforms=3, hidden=6"),
        (REAL["autoregressive"], "latent_dim=2, kind='autoregressive', num_transforms=2, hidden=6"),
        (REAL["spline"], "latent_dim=2, kind='spline', num_transforms=2, hidden=6"),
        (OTHER["LogisticNormal"], "LogisticNormal(latent_dim=3, scale=0.7)"),
        (OTHER["Dirichlet"], "Dirichlet(latent_dim=3, concentration=1.7)"),
        (OTHER["SphereUniform"], "SphereUniform(latent_dim=3)"),
        (OTHER["OneHotCategorical"], "OneHotCategorical(latent_dim=4, learn=False)"),
        (OTHER["OneHotCategorical, learned"], "OneHotCategorical(latent_dim=4, learn=True)"),
        (OTHER["Bernoulli"], "Bernoulli(latent_dim=3, probs=0.3)"),
    ],
)
def test_repr_state_dict_and_dtype(make, text):
    prior, other = randomised(make()), make()
    assert text in repr(prior)
    assert set(prior.state_dict()) >= {name for name, _ in prior.named_parameters()}
    other.load_state_dict(prior.state_dict())
    z = prior().sample((B,))
    assert torch.equal(other().log_prob(z), prior().log_prob(z))
    prior.to(torch.float64)
    z = prior().sample((B,))
    assert z.dtype == prior().log_prob(z).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StandardNormal(0), "expected latent_dim > 0, found 0"),
        (lambda: StandardNormal(D, scale=-1.0), "expected scale > 0, found -1.0"),
        (lambda: StandardNormal(D, scale=math.nan), "expected scale > 0, found nan"),
        (lambda: MixtureOfNormals(D, num_components=0), "expected num_components > 0, found 0"),
        (lambda: MixtureOfNormals(D, spread=0.0), "expected spread > 0, found 0.0"),
        (lambda: LearnedNormal(0), "expected latent_dim > 0, found 0"),
        (lambda: priors.Laplace(D, scale=0.0), "expected scale > 0, found 0.0"),
        (lambda: priors.StudentT(D, df=0.0), "expected df > 0, found 0.0"),
        (lambda: FlowPrior(1), "expected latent_dim >= 2, found 1"),
        (lambda: FlowPrior(1, "spline"), "expected latent_dim >= 2, found 1"),
        (lambda: FlowPrior(0, "autoregressive_spline"), "expected latent_dim > 0, found 0"),
        (lambda: FlowPrior(D, "planar"), "expected kind to be one of 'coupling', 'autoreg.*, found 'planar'"),
        (lambda: FlowPrior(5, "autoregressive_spline", hidden=4), r"expected hidden >= 5 \(latent_dim\), found 4"),
        (lambda: FlowPrior(D, num_transforms=0), "expected num_transforms > 0, found 0"),
        (lambda: FlowPrior(D, hidden=0), "expected hidden > 0, found 0"),
        (lambda: FlowPrior(5, "autoregressive", hidden=4), r"expected hidden >= 5 \(latent_dim\), found 4"),
        (lambda: priors.LogisticNormal(1), "expected latent_dim >= 2, found 1"),
        (lambda: priors.LogisticNormal(3, scale=0.0), "expected scale > 0"),
        (lambda: priors.Dirichlet(3, concentration=0.0), "expected concentration > 0, found 0.0"),
        (lambda: SphereUniform(1), "expected latent_dim >= 2, found 1: this prior needs two numbers or more"),
        (lambda: priors.OneHotCategorical(1), "expected latent_dim >= 2"),
        (lambda: priors.Bernoulli(3, probs=1.0), "expected 0 < probs < 1, found 1.0"),
        (lambda: VampPrior(Mlp(E, 4), torch.zeros(E)), r"pseudo_inputs has shape \(7,\), expected \[N, \*E\]"),
        (lambda: VampPrior(Mlp(E, 4), torch.zeros(0, E)), "pass rows of the training data"),
        (lambda: VampPrior(Mlp(E, 4), torch.zeros(1, E), num_components=0), "expected num_components > 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_of_normals_scores_as_torchs_own(dtype):
    """By matrix products, also where scales are small and the multiplied square cancels digits; also expanded."""
    prior = MixtureOfNormals(D, num_components=4).to(dtype)
    with torch.no_grad():
        prior.log_scale.copy_(torch.linspace(-6, 1, 8).view(4, D))
        prior.logits.normal_()
    p = prior()
    z = p.sample((K, B)).requires_grad_()
    ours = p.expand((B,)).log_prob(z)
    theirs = dist.MixtureSameFamily(p.mixture_distribution, p.component_distribution).log_prob(z)
    assert ours.dtype == dtype and ours.shape == (K, B)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(t.sum(), [z, *prior.parameters()], retain_graph=True) for t in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if dtype == torch.float32 else 1e-8, atol=1e-4)
    assert p.expand((K, B)).log_prob(z[0]).shape == (K, B)
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.full((D,), math.nan))
