"""Discrete codes: members by hand, exact sums against autograd, relaxations against quadrature, refusals."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch import nn

from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    Decoder,
    DiagonalNormal,
    Mlp,
    StandardNormal,
    StraightThrough,
    VampPrior,
    check_vae,
    discrete,
    draw,
    fit,
    likelihoods,
    log_evidence,
    priors,
    relaxed_priors,
)
from pyro_vae.compiling import CompiledStep
from pyro_vae.discrete import all_values, enumerated_terms
from pyro_vae.exact import joint_by_enumeration, log_evidence_by_enumeration
from pyro_vae.testing import check_encoder, check_prior

K, B, C, E = 3, 5, 4, 7
FAMILIES = [discrete.OneHotCategorical, discrete.Bernoulli, discrete.RelaxedOneHotCategorical, StraightThrough]
PARTNERS = {
    discrete.OneHotCategorical: lambda dim: priors.OneHotCategorical(dim, learn=True),
    discrete.Bernoulli: lambda dim: priors.Bernoulli(dim, probs=0.3),
    discrete.RelaxedOneHotCategorical: lambda dim: relaxed_priors.RelaxedOneHotCategorical(dim, temperature=0.7),
    StraightThrough: priors.OneHotCategorical,
}
ENUMERABLE = [discrete.OneHotCategorical, discrete.Bernoulli]


def randomised(module: nn.Module, size: float = 0.5) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def make(family, dim: int = C) -> VAE:
    decoder = Decoder(Mlp(dim, 6, E, activation=nn.Tanh), likelihoods.Bernoulli())
    vae = VAE(PARTNERS[family](dim), decoder, family(Mlp(E, 6, family.num_outputs(dim), activation=nn.Tanh)))
    return randomised(vae)


def binary(num: int = B) -> torch.Tensor:
    return torch.rand(num, E).round()


def exact_posterior(prior: nn.Module) -> VAE:
    """With a linear decoder of bits, log p(x, z) is linear in x for each class: so is the encoder's best output."""
    net, encoder_net = nn.Linear(C, E), nn.Linear(E, C)
    vae = VAE(prior, Decoder(net, likelihoods.Bernoulli()), discrete.OneHotCategorical(encoder_net))
    with torch.no_grad():
        eta = net.weight + net.bias.unsqueeze(1)  # [E, C], the logits of x in each class
        encoder_net.weight.copy_(eta.T)
        encoder_net.bias.copy_(prior().logits - nn.functional.softplus(eta).sum(0))
    return vae


# The members


@pytest.mark.parametrize("latent_dim", [2, 3, 5])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f is not StraightThrough])
def test_samples_what_it_scores(float64, family, latent_dim):
    check_encoder(randomised(family(Mlp(E, 4, latent_dim, activation=nn.Tanh))), torch.randn(B, E))


@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.5])
@pytest.mark.parametrize("latent_dim", [2, 3, 6])
def test_the_relaxed_prior_samples_what_it_scores(float64, latent_dim, temperature):
    check_prior(relaxed_priors.RelaxedOneHotCategorical(latent_dim, temperature))


def test_by_hand(float64):
    h = torch.randn(B, C)
    z = torch.eye(C)[torch.arange(B) % C]
    one_hot = discrete.OneHotCategorical(nn.Identity())(h)
    torch.testing.assert_close(one_hot.log_prob(z), (h.log_softmax(-1) * z).sum(-1))
    torch.testing.assert_close(StraightThrough(nn.Identity())(h).log_prob(z), one_hot.log_prob(z))
    bits = torch.randint(2, (B, C)).double()
    found = discrete.Bernoulli(nn.Identity())(h).log_prob(bits)
    torch.testing.assert_close(found, (bits * h - nn.functional.softplus(h)).sum(-1))
    z, tau = torch.rand(B, C).softmax(-1), 0.7
    log_alpha = h.log_softmax(-1)
    expected = math.lgamma(C) + (C - 1) * math.log(tau) + (log_alpha - (tau + 1) * z.log()).sum(-1)
    expected = expected - C * (log_alpha - tau * z.log()).logsumexp(-1)
    found = discrete.RelaxedOneHotCategorical(nn.Identity(), temperature=tau)(h).log_prob(z)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # h is squashed ever so little


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_dtype_and_modes(family):
    encoder = family(Mlp(E, 4, C))
    q = encoder(torch.randn(K, B, E))
    assert (q.batch_shape, q.event_shape) == ((K, B), (C,))
    assert q.has_rsample == (family in (discrete.RelaxedOneHotCategorical, StraightThrough))
    wide = q.expand((2, K, B))
    assert wide.sample().shape == (2, K, B, C) and wide.log_prob(q.sample()).shape == (2, K, B)
    assert q.sample((6,)).shape == (6, K, B, C) and q.mean.shape == (K, B, C)
    q = encoder.double()(torch.randn(B, E).double())
    assert q.sample().dtype == q.log_prob(q.sample()).dtype == q.mean.dtype == torch.float64
    if family is not discrete.RelaxedOneHotCategorical:
        assert q.log_prob(q.mode).ge(q.log_prob(q.sample((50,)))).all()
    assert repr(encoder).startswith(family.__name__)


def test_the_mode_of_an_even_bit_is_a_code():
    assert torch.equal(discrete.Bernoulli(nn.Identity())(torch.zeros(B, C)).mode, torch.zeros(B, C))


def test_the_mean_of_the_relaxation(float64):
    q = discrete.RelaxedOneHotCategorical(nn.Identity(), temperature=0.6)(torch.randn(B, C))
    torch.testing.assert_close(q.mean.sum(-1), torch.ones(B))
    assert (q.mean - q.sample((40_000,)).mean(0)).abs().max() < 0.02
    state = torch.get_rng_state()
    assert torch.equal(q.mean, q.mean) and torch.equal(torch.get_rng_state(), state)


def test_all_values():
    q = discrete.Bernoulli(nn.Identity())(torch.zeros(B, 3))
    values = all_values(q)
    assert values.unique(dim=0).shape == (8, 3) and torch.equal(values[6], torch.tensor([1.0, 1.0, 0.0]))
    assert q.enumerate_support().shape == (8, B, 3) and q.enumerate_support(expand=False).shape == (8, 1, 3)
    torch.testing.assert_close(q.log_prob(q.enumerate_support(expand=False)).logsumexp(0), torch.zeros(B))
    assert torch.equal(all_values(priors.OneHotCategorical(C)()), torch.eye(C))
    vamp = VampPrior(discrete.OneHotCategorical(Mlp(E, C)), binary(3))
    assert torch.equal(all_values(vamp()), torch.eye(C))


# Sums over all values


def by_hand(vae: VAE, x: torch.Tensor) -> torch.Tensor:
    """The ELBO of each example, written out."""
    z = all_values(vae.prior())
    total = torch.zeros(len(x))
    for value in z:
        log_q = vae.encoder(x).log_prob(value)
        log_px = vae.decoder(value.expand(len(x), -1)).log_prob(x)
        total = total + log_q.exp() * (log_px + vae.prior().log_prob(value) - log_q)
    return total


@pytest.mark.parametrize("family", ENUMERABLE)
def test_trace_enum_is_the_sum_by_hand(float64, family):
    vae, x = make(family), binary()
    expected = by_hand(vae, x).sum()
    gradients = torch.autograd.grad(-expected, list(vae.parameters()))
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    loss = objective.differentiable_loss(vae.model, config_enumerate(vae.guide), x)
    torch.testing.assert_close(-loss, expected)
    for (name, _), ours, theirs in zip(
        vae.named_parameters(), gradients, torch.autograd.grad(loss, list(vae.parameters())), strict=True
    ):
        torch.testing.assert_close(theirs, ours, msg=name)


@pytest.mark.parametrize("family", ENUMERABLE)
def test_the_terms_of_an_enumerated_step(float64, family):
    vae, x = make(family), binary()
    seen = {}

    def recorded(name, program):
        def run(x):
            seen[name] = poutine.trace(program).get_trace(x)

        return run

    objective = TraceEnum_ELBO(max_plate_nesting=1)
    programs = recorded("model", poutine.scale(vae.model, 2.0)), recorded("guide", poutine.scale(vae.guide, 2.0))
    loss = objective.loss(programs[0], config_enumerate(programs[1]), x)
    traces = (poutine.util.prune_subsample_sites(seen[name]) for name in ("model", "guide"))
    log_px, log_pz, log_qz = enumerated_terms(*traces)
    z, log_joint = joint_by_enumeration(vae, x)
    log_q = vae.encoder(x).log_prob(z.unsqueeze(1))
    torch.testing.assert_close(log_qz, 2 * (log_q.exp() * log_q).sum())
    torch.testing.assert_close(log_px + log_pz, 2 * (log_q.exp() * log_joint).sum())
    assert math.isclose(-loss, (log_px + log_pz - log_qz).item(), rel_tol=1e-12)


@pytest.mark.parametrize("learn", [False, True])
def test_at_the_exact_posterior_the_bound_is_the_evidence(float64, learn):
    vae, x = exact_posterior(randomised(priors.OneHotCategorical(C, learn=learn))), binary()
    z, log_joint = joint_by_enumeration(vae, x)
    expected = log_evidence_by_enumeration(vae, x)
    classes = [vae.decoder(z[c].expand(B, -1)).log_prob(x) + vae.prior().log_prob(z[c]) for c in range(C)]
    torch.testing.assert_close(expected, torch.stack(classes).logsumexp(0))
    torch.testing.assert_close(vae.encoder(x).probs, log_joint.softmax(0).T)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(vae.model, config_enumerate(vae.guide), x)
    assert math.isclose(-loss, expected.sum().item(), rel_tol=1e-12)
    with torch.no_grad():  # every draw has the same weight
        torch.testing.assert_close(draw(vae.model, vae.guide, x, num_particles=K).log_w, expected.expand(K, -1))


@pytest.mark.parametrize("family", ENUMERABLE)
def test_the_evidence_sums_to_one_and_agrees_with_sampling(float64, family):
    vae = make(family)
    every_x = torch.cartesian_prod(*[torch.arange(2.0)] * E)
    torch.testing.assert_close(log_evidence_by_enumeration(vae, every_x).logsumexp(0), torch.tensor(0.0))
    x = binary(40)
    fit(vae, x, objective=TraceEnum_ELBO(), epochs=5, batch_size=10, lr=0.01)
    exact, sampled = log_evidence_by_enumeration(vae, x), log_evidence(vae, x, num_particles=2000)
    assert sampled.errors is not None
    off = (sampled.values - exact).abs()
    assert (off <= 5 * sampled.errors + 1e-9).all() and off.mean() < 0.02


def test_enumeration_changes_nothing():
    vae, x = make(discrete.OneHotCategorical), binary()
    vae.train()
    state = torch.get_rng_state()
    log_evidence_by_enumeration(vae, x)
    assert torch.equal(torch.get_rng_state(), state) and all(part.training for part in vae.modules())
    many = binary(300)
    torch.testing.assert_close(log_evidence_by_enumeration(vae, many)[:3], log_evidence_by_enumeration(vae, many[:3]))


@pytest.mark.parametrize("family", ENUMERABLE)
def test_score_function_and_enumeration_agree(float64, family):
    """The gradient of a trained model: exactly, and by many draws of the score function."""
    vae, x = make(family, dim=3), binary(20)
    fit(vae, x, objective=TraceEnum_ELBO(), epochs=3, batch_size=10, lr=0.01)
    parameters = list(vae.parameters())
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vae.model, config_enumerate(vae.guide), x)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    drawn = TraceGraph_ELBO(num_particles=60, vectorize_particles=True, max_plate_nesting=1)
    found = []
    for _ in range(60):
        vae.zero_grad()
        drawn.loss_and_grads(vae.model, vae.guide, x)
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
    stack = torch.stack(found)
    error = stack.std(0) / math.sqrt(len(stack))
    assert ((stack.mean(0) - exact).abs() <= 5 * error + 1e-9).all()
    assert error.max() < 0.2 * exact.abs().max()  # otherwise agreement would mean nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_can_be_captured(family):
    vae, x = make(family), binary()
    objective = TraceGraph_ELBO() if family in ENUMERABLE else ELBO()

    def function(x):
        return objective.loss_and_grads(vae.model, vae.guide, x)

    step = CompiledStep(function, list(vae.parameters()), vae, warm=0, backend="replay")
    step(x)
    assert "replayed" in step.explain(), step.explain()


# Relaxations


def log_evidence_of_two_classes(vae: VAE, x: torch.Tensor) -> torch.Tensor:
    """The integral over the one-dimensional simplex, in the log-odds of z."""
    u = torch.linspace(-60, 60, 24_001)
    z = torch.stack([torch.sigmoid(u), torch.sigmoid(-u)], dim=-1)
    log_jacobian = nn.functional.logsigmoid(u) + nn.functional.logsigmoid(-u)
    log_pz = vae.prior().log_prob(z) + log_jacobian
    log_px = vae.decoder(z.unsqueeze(1)).log_prob(x)
    return (log_pz.unsqueeze(1) + log_px).logsumexp(0) + math.log(120 / 24_000)


def test_the_relaxed_bound_is_one_and_tightens(float64):
    vae, x = make(discrete.RelaxedOneHotCategorical, dim=2), binary()
    with torch.no_grad():
        exact = log_evidence_of_two_classes(vae, x)
        weights = draw(vae.model, vae.guide, x, num_particles=100_000).log_w
    elbo = weights.mean(0)  # more than 4 standard errors below, not at log p(x)
    assert (elbo < exact - 4 * weights.std(0) / math.sqrt(len(weights))).all()
    ratio = (weights - exact).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(len(ratio))).all()
    assert (ratio.std(0) / math.sqrt(len(ratio)) < 0.02).all()


@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0])
def test_sharp_posteriors_do_not_underflow(temperature):
    h = torch.tensor([[0.0] * 10, [80.0] + [-80.0] * 9, [3.0, -200.0, *[0.0] * 8]]).requires_grad_()
    q = discrete.RelaxedOneHotCategorical(nn.Identity(), temperature)(h)
    z = q.rsample((20_000,))
    log_q = q.log_prob(z)
    assert (z >= torch.finfo(z.dtype).tiny).all() and log_q.isfinite().all()
    p = relaxed_priors.RelaxedOneHotCategorical(10, temperature)()
    assert p.log_prob(z).isfinite().all()
    (log_q.mean() + z.square().mean()).backward()
    assert h.grad.isfinite().all()


def test_moderate_outputs_are_not_squashed():
    """What keeps draws from underflowing does not touch a usual posterior."""
    h = torch.tensor([[2.0, -1.0, 0.0]])
    found = discrete.RelaxedOneHotCategorical(nn.Identity())(h).logits
    torch.testing.assert_close(found - found[:, :1], h - h[:, :1], rtol=0.02, atol=0.02)


def test_low_temperatures_need_double_precision():
    encoder = discrete.RelaxedOneHotCategorical(nn.Identity(), temperature=0.1)
    with pytest.raises(ValueError, match=r"expected a temperature >= 0.28 in torch.float32, found 0.1: below, draws"):
        encoder(torch.zeros(B, C))
    assert encoder(torch.zeros(B, C).double()).sample((1000,)).gt(0).all()
    with pytest.raises(ValueError, match=r"in torch.float32, found 0.25"):
        relaxed_priors.RelaxedOneHotCategorical(C, temperature=0.25)()


def test_straight_through_has_the_value_of_the_discrete_model(float64):
    """Draws are one-hot to the last bit with the right frequencies; the ELBO's mean is the exact sum."""
    vae, x = make(StraightThrough), binary()
    q = vae.encoder(x)
    z = q.rsample((40_000,))
    assert torch.equal(z.detach(), z.detach().round()) and torch.equal(z.detach().sum(-1), torch.ones(40_000, B))
    error = (q.probs * (1 - q.probs) / 40_000).sqrt()
    assert ((z.detach().mean(0) - q.probs).abs() < 4.5 * error).all()
    with torch.no_grad():
        values = draw(vae.model, vae.guide, x, num_particles=40_000).log_w
        error = values.std(0) / math.sqrt(len(values))
        assert ((values.mean(0) - by_hand(vae, x)).abs() < 4.5 * error).all()


def test_straight_through_is_drawn_by_trace_enum(float64):
    """Pyro would sum over its values without their probabilities, as it has an rsample."""
    vae, x = make(StraightThrough), binary()
    objective = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    losses = torch.tensor([objective.loss(vae.model, config_enumerate(vae.guide), x) for _ in range(200)])
    error = losses.std() / math.sqrt(len(losses))
    assert (losses.mean() + by_hand(vae, x).sum()).abs() < 4.5 * error < 2.0


def test_the_gradient_of_straight_through_is_biased(float64):
    """As it says: far outside the standard error of the exact one, and the public check notices."""
    vae, x = make(StraightThrough), binary()
    parameters = list(vae.encoder.parameters())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(by_hand(vae, x).sum(), parameters)])
    found = []
    for _ in range(100):
        value = ELBO(200).bound(vae.model, vae.guide, x).sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]))
    stack = torch.stack(found)
    error = stack.std(0) / 10
    assert ((stack.mean(0) - exact).abs() / error).max() > 10
    assert nn.functional.cosine_similarity(stack.mean(0), exact, dim=0) > 0.5  # but of use
    with pytest.raises(AssertionError, match=r"the gradient of encoder\(x\).rsample\(\) is"):
        check_encoder(vae.encoder, x)


# Refusals


def parts(prior, encoder) -> VAE:
    return VAE(prior, Decoder(Mlp(C, 6, E), likelihoods.Bernoulli()), encoder)


@pytest.mark.parametrize(
    ("prior", "encoder", "message"),
    [
        (
            StandardNormal(C),
            discrete.OneHotCategorical(Mlp(E, C)),
            r"prior\(\) is over real numbers but encoder\(x\) over one-hot vectors, expected one kind of z: choose the "
            "prior priors.OneHotCategorical, or the encoder DiagonalNormal",
        ),
        (StandardNormal(C), discrete.Bernoulli(Mlp(E, C)), "choose the prior priors.Bernoulli"),
        (StandardNormal(C), StraightThrough(Mlp(E, C)), "choose the prior priors.OneHotCategorical"),
        (
            StandardNormal(C),
            discrete.RelaxedOneHotCategorical(Mlp(E, C)),
            "over the simplex, .* choose the prior relaxed_priors.RelaxedOneHotCategorical or priors.Dirichlet",
        ),
        (
            priors.OneHotCategorical(C),
            discrete.RelaxedOneHotCategorical(Mlp(E, C)),
            "over the simplex.* or the encoder discrete.OneHotCategorical or discrete.StraightThrough",
        ),
        (priors.OneHotCategorical(C), DiagonalNormal(Mlp(E, 2 * C)), "real numbers.* encoder discrete.OneHotCat"),
        (priors.OneHotCategorical(C), discrete.Bernoulli(Mlp(E, C)), "bits.* choose the prior priors.Bernoulli, or"),
        (priors.Bernoulli(C), discrete.OneHotCategorical(Mlp(E, C)), "or the encoder discrete.Bernoulli"),
        (priors.Bernoulli(C), DiagonalNormal(Mlp(E, 2 * C)), "or the encoder discrete.Bernoulli"),
        (relaxed_priors.RelaxedOneHotCategorical(C), StraightThrough(Mlp(E, C)), "discrete.RelaxedOneHotCategorical"),
        (
            relaxed_priors.RelaxedOneHotCategorical(C),
            DiagonalNormal(Mlp(E, 2 * C)),
            r"over the simplex but encoder\(x\) over real numbers",
        ),
        (
            VampPrior(discrete.OneHotCategorical(Mlp(E, C)), torch.rand(3, E)),
            DiagonalNormal(Mlp(E, 2 * C)),
            "over one-hot vectors but",
        ),
    ],
)
def test_wrong_pairs_are_refused_in_words(prior, encoder, message):
    with pytest.raises(ValueError, match=message):
        check_vae(parts(prior, encoder), binary())
    with pytest.raises(ValueError, match=message):
        fit(parts(prior, encoder), binary(), epochs=1)


@pytest.mark.parametrize(
    ("prior", "encoder"),
    [
        (priors.Dirichlet(C), discrete.RelaxedOneHotCategorical(Mlp(E, C))),
        (priors.LogisticNormal(C), discrete.RelaxedOneHotCategorical(Mlp(E, C))),
        *[(PARTNERS[family](C), family(Mlp(E, C))) for family in FAMILIES],
    ],
)
def test_right_pairs_are_not_refused(prior, encoder):
    check_vae(parts(prior, encoder), binary())


@pytest.mark.parametrize("family", ENUMERABLE)
@pytest.mark.parametrize("objective", [ELBO(), IWAE(K)], ids=repr)
def test_a_pathwise_objective_refuses_a_discrete_encoder(family, objective):
    with pytest.raises(ValueError, match=r"site 'z' .* no reparameterised sampler .*TraceGraph_ELBO.*TraceEnum_ELBO"):
        fit(make(family), binary(), objective=objective, epochs=1)


def test_too_many_values_are_refused():
    vae, x = make(discrete.Bernoulli, dim=13), binary()
    message = r"expected at most 4096 values of z to sum over, found 2\^13: lower latent_dim, or draw instead"
    with pytest.raises(ValueError, match=message):
        log_evidence_by_enumeration(vae, x)
    with pytest.raises(ValueError, match=message):
        fit(vae, x, objective=TraceEnum_ELBO(), epochs=1)
    fit(vae, x, objective=TraceGraph_ELBO(), epochs=1)
    with pytest.raises(ValueError, match="found 5000"):
        all_values(priors.OneHotCategorical(5000)())


def test_a_continuous_z_cannot_be_listed():
    vae = parts(StandardNormal(C), DiagonalNormal(Mlp(E, 2 * C)))
    with pytest.raises(ValueError, match="expected z to be a one-hot vector or a vector of bits, found Independent"):
        log_evidence_by_enumeration(vae, binary())


@pytest.mark.parametrize(
    "term",
    [
        lambda t: discrete.RelaxedOneHotCategorical(nn.Identity(), temperature=t),
        lambda t: StraightThrough(nn.Identity(), temperature=t),
        lambda t: relaxed_priors.RelaxedOneHotCategorical(C, temperature=t),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_refused_temperatures(term, temperature):
    with pytest.raises(ValueError, match="expected temperature > 0, found"):
        term(temperature)


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="expected latent_dim >= 2, found 1"):
        relaxed_priors.RelaxedOneHotCategorical(1)


def test_terms_need_one_set_of_plates():
    def model(x):
        pyro.sample("y", pyro.distributions.Bernoulli(0.3))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", pyro.distributions.Normal(0.0, 1.0), obs=x)

    def guide(x):
        pyro.sample("y", pyro.distributions.Bernoulli(0.6))

    traces = [poutine.util.prune_subsample_sites(poutine.trace(p).get_trace(torch.zeros(B))) for p in (model, guide)]
    with pytest.raises(ValueError, match="expected all sites in the same plates"):
        enumerated_terms(*traces)


# What the two gradients cost


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_variances_of_pathwise_and_score_function_gradients(float64, dim):
    """For f = |z|^2 and q = N(mu, I) at mu = 0: variances 4, (d + 2)(d + 4), and 2 d + 8 with the baseline E f."""
    num = 400_000
    mu = torch.zeros(num, dim).requires_grad_()
    z = torch.distributions.Normal(mu, 1.0).rsample()
    (gradient,) = torch.autograd.grad(z.square().sum(), mu)
    pathwise = gradient[:, 0]
    with torch.no_grad():
        f = z.square().sum(-1)
        score = f * z[:, 0]  # d log q / d mu_1 = z_1 - mu_1
        with_baseline = (f - dim) * z[:, 0]
    for found, variance in ((pathwise, 4.0), (score, (dim + 2) * (dim + 4)), (with_baseline, 2 * dim + 8)):
        square = (found - found.mean()).square()
        assert found.mean().abs() < 4 * found.std() / math.sqrt(num)  # the exact gradient is 0: all are unbiased
        assert (square.mean() - variance).abs() < 5 * square.std() / math.sqrt(num)


def test_sample_gives_no_gradient_where_rsample_does():
    mu = torch.zeros(B).requires_grad_()
    q = torch.distributions.Normal(mu, 1.0)
    assert not q.sample().requires_grad
    (gradient,) = torch.autograd.grad(q.rsample().sum(), mu)
    assert torch.equal(gradient, torch.ones(B))
