"""Every estimator of log p(x) with every prior and every likelihood, against sums over z that share no code with them.

The members are found by looking, so a new one takes part as soon as it exists. For each kind of z (the line, the plane,
circle, sphere, simplex, classes, bits) a rule of points and weights gives p(x), the ELBO and the KL to the posterior.
The error of an estimate, in units of the standard error that it claims, is a z-score: over all cases they must be
standard normal.
"""

import inspect
import itertools
import math
import zlib
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binom, kstest, multivariate_normal, t
from test_cross_product import LIKELIHOODS, PRIORS, E, make
from torch import nn

import pyro_vae.annealing
import pyro_vae.estimates
import pyro_vae.exact
from pyro_vae import (
    VAE,
    Decoder,
    DiagonalNormal,
    Estimate,
    Mlp,
    StandardNormal,
    VonMisesFisher,
    discrete,
    evaluation,
    gaps,
    likelihoods,
)
from pyro_vae.annealing import linear_schedule
from pyro_vae.calibration import (
    posterior_by_nuts,
    posterior_on_grid,
    posterior_predictive_check,
    simulation_based_calibration,
)
from pyro_vae.exact import LinearGaussian, joint_by_enumeration, log_evidence_by_enumeration, log_evidence_by_quadrature
from pyro_vae.missing import FillMissing
from pyro_vae.supports import NO_LIKELIHOOD, is_normalised, is_real, kind_of_values
from pyro_vae.terms import Terms

pytestmark = pytest.mark.usefixtures("float64")
N = 3  # examples
SCORE = f"expected a likelihood, found a score in the place of p.x . z. .{NO_LIKELIHOOD}.: use"

# ------------------------------------------------------------------------------------------------------- what is exact


def panels(low, high, num_panels, order):
    """Gauss and Legendre's points and weights on equal panels."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(order))
    half = (high - low) / (2 * num_panels)
    middles = low + half * (2 * torch.arange(num_panels) + 1)
    return (middles.unsqueeze(1) + half * points).flatten(), (half * weights).repeat(num_panels)


def line(num_panels, order):
    """All real numbers: z = sinh s reaches far into heavy tails; a panel ends at 0, where a prior may have a kink."""
    s, weight = panels(-7.0, 7.0, num_panels, order)
    return s.sinh(), weight * s.cosh()


def stick(num_panels, order):
    """The unit interval: v = 1 / (1 + exp(-sinh s)), as fine as need be near its ends; v, 1 - v, the weight of dv."""
    s, weight = panels(-4.8, 4.8, num_panels, order)
    v, rest = s.sinh().sigmoid(), (-s.sinh()).sigmoid()
    return v, rest, weight * s.cosh() * v * rest


@cache
def rule(kind, latent_dim):
    """Points [S, D] and weights [S]: sums over them are integrals with the measure that densities of this kind have."""
    if kind == "real numbers":
        z, weight = line(120, 6) if latent_dim == 1 else line(30, 4)
        return (
            torch.cartesian_prod(*[z] * latent_dim).reshape(-1, latent_dim),
            torch.cartesian_prod(*[weight] * latent_dim).reshape(-1, latent_dim).prod(1),
        )
    if kind == "the unit sphere":
        turn, arc = panels(0.0, 2 * math.pi, 200, 2) if latent_dim == 2 else panels(0.0, 2 * math.pi, 40, 2)
        if latent_dim == 2:
            return torch.stack([turn.cos(), turn.sin()], 1), arc
        height, rise = panels(-1.0, 1.0, 10, 4)
        height, turn = torch.cartesian_prod(height, turn).unbind(1)
        radius = (1 - height**2).sqrt()
        points = torch.stack([radius * turn.cos(), radius * turn.sin(), height], 1)
        return points, torch.cartesian_prod(rise, arc).prod(1)
    if kind == "the simplex":  # densities are those of the first D - 1 numbers
        if latent_dim == 2:
            v, rest, weight = stick(120, 6)
            return torch.stack([v, rest], 1), weight
        i, j = torch.cartesian_prod(*[torch.arange(4 * 26)] * 2).unbind(1)
        v, rest, weight = stick(26, 4)
        return torch.stack([v[i], rest[i] * v[j], rest[i] * rest[j]], 1), weight[i] * rest[i] * weight[j]
    values = (
        torch.eye(latent_dim).tolist()
        if kind == "one-hot vectors"
        else list(itertools.product((0.0, 1.0), repeat=latent_dim))
    )
    return torch.tensor(values), torch.ones(len(values))


class Exact(NamedTuple):
    """What the sums give, each [N], nats."""

    log_px: torch.Tensor
    elbo: torch.Tensor
    kl_to_prior: torch.Tensor
    kl_to_posterior: torch.Tensor


def log_sum(log_values, weight):
    peak = log_values.amax(0)
    return (weight.unsqueeze(1) * (log_values - peak).exp()).sum(0).log() + peak


def mean_under(log_q, values, weight):
    """The integral of q times values, 0 where q is."""
    return (weight.unsqueeze(1) * torch.where(log_q > -700, log_q.exp() * values, 0.0)).sum(0)


@torch.no_grad()
def exact(vae, x, kind, latent_dim, log_pz=None, log_pxz=None):
    """Log p(x), ELBO and KLs by the rule; the KL to the posterior is not taken from the other two."""
    z, weight = rule(kind, latent_dim)
    log_pz = vae.prior().log_prob(z).unsqueeze(1) if log_pz is None else log_pz
    log_pxz = vae.decoder(z.unsqueeze(1)).log_prob(x) if log_pxz is None else log_pxz
    log_q = vae.encoder(x).log_prob(z.unsqueeze(1).expand(-1, len(x), -1))
    log_px = log_sum(log_pxz + log_pz, weight)
    log_posterior = log_pxz + log_pz - log_px
    return Exact(
        log_px,
        mean_under(log_q, log_pxz + log_pz - log_q, weight),
        mean_under(log_q, log_q - log_pz, weight),
        mean_under(log_q, log_q - log_posterior, weight),
    )


# ----------------------------------------------------------------------------------------------------------- the cases


class Wide(nn.Module):
    """A posterior with heavier tails than any prior: weights that are bounded, so that their errors can be right.

    The ELBO's error needs light tails, for log w falls as z^2: it has a guide of its own.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        loc = self.net(x)
        return dist.StudentT(4.0, loc, torch.full_like(loc, 1.2)).to_event(1)


GUIDES = {
    "real numbers": (Wide, lambda d: d),
    "the unit sphere": (VonMisesFisher, VonMisesFisher.num_outputs),
    "the simplex": (discrete.RelaxedOneHotCategorical, discrete.RelaxedOneHotCategorical.num_outputs),
    "one-hot vectors": (discrete.OneHotCategorical, discrete.OneHotCategorical.num_outputs),
    "bits": (discrete.Bernoulli, discrete.Bernoulli.num_outputs),
}
ON_R = "real numbers"


def number(*names):
    """A seed of its own for each case: a new member changes no other's numbers."""
    return zlib.crc32(" ".join(map(str, names)).encode())


def seed(*names):
    torch.manual_seed(number(*names))


def make_guide(kind, latent_dim):
    """The guide whose weights are averaged, and the one whose logarithms are: the same but on R^D."""
    cls, num_outputs = GUIDES[kind]
    scaled = nn.LayerNorm(E, elementwise_affine=False)

    def net(num_outputs):
        return nn.Sequential(FillMissing(), scaled, nn.Linear(E, num_outputs), nn.Tanh())

    wide = cls(net(num_outputs(latent_dim)))
    return wide, DiagonalNormal(net(2 * latent_dim)) if kind == ON_R else wide


@cache
def place(prior, kind, latent_dim):
    """A prior away from where it starts, and the guides that live where it does."""
    seed(prior, kind, latent_dim)
    guide, narrow = make_guide(kind, latent_dim)
    flow = "autoregressive_spline" if latent_dim == 1 else "coupling"
    made = make(PRIORS[prior], latent_dim=latent_dim, encoder=guide, pseudo_inputs=torch.randn(9, E), kind=flow)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith("encoder"):
                parameter += 0.2 * torch.randn_like(parameter)
    return made, guide, narrow


def places():
    """(prior, kind of z, D): one and two dimensions of z, classes and bits included."""
    torch.set_default_dtype(torch.float64)
    found: list[tuple[str, str, int]] = []
    for prior, latent_dim in itertools.product(PRIORS, (1, 2, 3)):
        of_encoder = "encoder" in inspect.signature(PRIORS[prior]).parameters
        for kind in GUIDES:
            dims = (1, 2) if kind in (ON_R, "bits") else (2, 3)
            if latent_dim not in dims:
                continue
            try:
                made, *_ = place(prior, kind, latent_dim)
            except ValueError as error:
                assert "expected latent_dim >= 2" in str(error), (prior, error)
                continue
            if of_encoder or kind_of_values(made()) == kind:
                found.append((prior, kind, latent_dim))
    place.cache_clear()
    torch.set_default_dtype(torch.float32)
    return found


with torch.random.fork_rng():
    PLACES = places()
NORMALISED = [name for name, cls in LIKELIHOODS.items() if cls.is_normalised]


@cache
def likelihoods_at(where):
    """All, if this kind of z is there in one dimension; else every other one, so that two places share them out.

    Each prior with each likelihood for each kind of z, in one of the dimensions; each dimension with each likelihood.
    """
    of_pair = [d for prior, kind, d in PLACES if (prior, kind) == where[:2]]
    if len(of_pair) == 1:
        return NORMALISED
    assert len(of_pair) == 2, of_pair
    return NORMALISED[(list(PRIORS).index(where[0]) + of_pair.index(where[2])) % 2 :: 2]


@cache
def decoder_and_data(likelihood, latent_dim):
    """A decoder that makes much of z, and a few examples of its own."""
    seed(likelihood, latent_dim)
    member = make(LIKELIHOODS[likelihood])
    decoder = Decoder(Mlp(latent_dim, 4, *member.output_shape((E,)), activation=nn.Tanh), member).eval()
    with torch.no_grad():
        for parameter in decoder.net.parameters():
            parameter.mul_(1.5)
        if likelihood not in NORMALISED:
            return decoder, torch.rand(N, E)
        x = decoder(torch.randn(N, latent_dim)).sample()
    if likelihood == "Masked":
        x[0, 1] = math.nan
    return decoder, x


def case(where, likelihood):
    """One VAE for weights, one for the ELBO, and their data."""
    prior, *guides = place(*where)
    decoder, x = decoder_and_data(likelihood, where[2])
    return *(VAE(prior, decoder, guide).eval() for guide in guides), x


@cache
@torch.no_grad()
def prior_at_points(where):
    return place(*where)[0]().log_prob(rule(*where[1:])[0]).unsqueeze(1)


@cache
@torch.no_grad()
def likelihood_at_points(likelihood, kind, latent_dim):
    decoder, x = decoder_and_data(likelihood, latent_dim)
    return decoder(rule(kind, latent_dim)[0].unsqueeze(1)).log_prob(x)


@cache
def truth_of(where, likelihood):
    """What is exact of a case, the ELBO that of its second VAE."""
    _, narrow, x = case(where, likelihood)
    return exact(narrow, x, *where[1:], prior_at_points(where), likelihood_at_points(likelihood, *where[1:]))


def of_probabilities(found, log_px):
    """(p_K - p) / se(p_K): it is p_K, not its logarithm, that has no bias."""
    return -(log_px - found.values).expm1() / found.errors


@contextmanager
def short_pilot(moves=4):
    """Weights are right with any step sizes: here they need not be tuned well."""
    kept = pyro_vae.annealing._PILOT_MOVES
    pyro_vae.annealing._PILOT_MOVES = moves
    try:
        yield
    finally:
        pyro_vae.annealing._PILOT_MOVES = kept


def of_estimates(where, likelihood):
    """Estimator -> its errors in units of the standard errors that it claims, [N]."""
    wide, narrow, x = case(where, likelihood)
    truth, first = truth_of(where, likelihood), number(*where, likelihood)
    terms = pyro_vae.estimates.elbo_terms(narrow, x, 1000, seed=first)
    return {
        "ELBO": (terms["elbo"].values + truth.kl_to_posterior - truth.log_px) / terms["elbo"].errors,
        "E log p(x|z)": (terms["log_px"].values - truth.elbo - truth.kl_to_prior) / terms["log_px"].errors,
        "KL": (terms["kl"].values - truth.kl_to_prior) / terms["kl"].errors,
        "importance": of_probabilities(pyro_vae.estimates.log_evidence(wide, x, 1500, seed=first + 1), truth.log_px),
    }


def of_annealing(where, likelihood):
    """The same of annealing, from the prior or from the guide; nothing where z does not move freely."""
    if where[1] != ON_R:
        return {}
    wide, _, x = case(where, likelihood)
    first = number(*where, likelihood)
    settings: dict[str, Any] = {"from_encoder": first % 2 == 0, "schedule": linear_schedule}
    with short_pilot():
        found = pyro_vae.annealing.annealed_log_evidence(wide, x, 250, 3, 1, seed=first + 2, **settings)
    return {"annealing": of_probabilities(found, truth_of(where, likelihood).log_px)}


@cache
def scores_of(where):
    """Estimator -> likelihood -> z-scores."""
    found: dict[str, dict[str, Any]] = {}
    for likelihood in likelihoods_at(where):
        both = of_estimates(where, likelihood) | of_annealing(where, likelihood)
        for estimator, scores in both.items():
            found.setdefault(estimator, {})[likelihood] = scores.detach()
    return found


def assert_standard_normal(scores, about):
    """Mean, variance and the whole distribution."""
    mean, variance, n = scores.mean().item(), scores.var().item(), len(scores)
    fit = kstest(scores.numpy(), "norm").pvalue
    said = f"{about}: mean {mean:.3f}, variance {variance:.3f}, Kolmogorov-Smirnov p = {fit:.2g} of {n} scores"
    assert abs(mean) < 4 / math.sqrt(n) and abs(variance - 1) < 4 * math.sqrt(2 / n) and fit > 1e-3, said


def ids(where):
    return f"{where[0]}-{where[1].split()[-1]}-{where[2]}"


# ------------------------------------------------------------------------------------------- every prior x likelihood


def test_no_member_is_left_out():
    assert {prior for prior, *_ in PLACES} == set(PRIORS)
    assert set(LIKELIHOODS) - set(NORMALISED) == {"Comparison"}, "scores are refused below"
    assert {kind for prior, kind, _ in PLACES if prior == "VampPrior"} == set(GUIDES)
    assert {d for _, kind, d in PLACES if kind == ON_R} == {1, 2}


@pytest.mark.parametrize("where", PLACES, ids=ids)
def test_every_estimate_is_within_its_error(where):
    """Five standard errors of each of some 5 000 numbers; those of all together are tested below."""
    mass = prior_at_points(where).squeeze(1).exp() @ rule(*where[1:])[1]
    assert abs(mass - 1) < 1e-4, "the rule resolves the prior"
    for likelihood in likelihoods_at(where):
        truth = truth_of(where, likelihood)
        assert (truth.elbo + truth.kl_to_posterior - truth.log_px).abs().max() < 1e-4, "ELBO + KL = log p(x)"
        assert (truth.kl_to_posterior > 0).all() and (truth.kl_to_prior > 0).all()
    far = [
        (estimator, likelihood, scores.tolist())
        for estimator, of_likelihood in scores_of(where).items()
        for likelihood, scores in of_likelihood.items()
        if not (scores.abs() < 5).all()
    ]
    assert not far
    assert ("annealing" in scores_of(where)) == (where[1] == ON_R)


@pytest.mark.parametrize("estimator", ["ELBO", "E log p(x|z)", "KL", "importance", "annealing"])
def test_z_scores_of_all_cases_are_standard_normal(estimator):
    """A bias of a fifth of a standard error would show."""
    scores = [s for where in PLACES for s in scores_of(where).get(estimator, {}).values()]
    pairs = {(*where[:2], name) for where in PLACES for name in likelihoods_at(where)}
    assert pairs == {(*where[:2], name) for where in PLACES for name in NORMALISED}, "every prior, every likelihood"
    assert len(scores) == sum(kind == ON_R or estimator != "annealing" for _, kind, _ in pairs)
    assert_standard_normal(torch.cat(scores), estimator)


@pytest.mark.parametrize("where", [w for w in PLACES if w[1] != ON_R], ids=ids)
def test_what_cannot_move_freely_is_not_annealed(where):
    vae, _, x = case(where, "Bernoulli")
    said = r"expected z on R\^D, found prior\(\) of type .*: Hamiltonian .*; use log_evidence, or enumeration for a"
    with pytest.raises(ValueError, match=said):
        pyro_vae.annealing.annealed_log_evidence(vae, x)
    with pytest.raises(ValueError, match=r"expected z on R\^D, found prior\(\)"):
        posterior_by_nuts(vae, x, 1, 1)


# ------------------------------------------------------------------------------------- closed forms, sums, quadrature


def dense(x, loc, covariance):
    return torch.from_numpy(np.atleast_1d(multivariate_normal(loc.numpy(), covariance.numpy()).logpdf(x.numpy())))


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_closed_forms(latent_dim):
    """A linear decoder of normals, under a normal prior, a mixture of them, classes and bits: p(x) is a mixture."""
    seed("closed forms", latent_dim)
    W, b, scale = torch.randn(E, latent_dim + 1), torch.randn(E), 0.8
    x, noise = torch.randn(N, E), scale**2 * torch.eye(E)
    for where in PLACES:
        prior, kind, dim = where
        if prior not in ("StandardNormal", "LearnedNormal", "MixtureOfNormals", "OneHotCategorical", "Bernoulli"):
            continue
        if dim != latent_dim + (kind == "one-hot vectors"):
            continue
        made, guide, narrow = place(*where)
        net = nn.Linear(dim, E)
        with torch.no_grad():
            net.weight.copy_(W[:, :dim])
            net.bias.copy_(b)
            A, p = W[:, :dim], made()
            if kind == ON_R:
                parts = getattr(p, "component_distribution", p)
                means, scales = parts.mean.reshape(-1, dim), parts.variance.reshape(-1, dim).sqrt()
                shares = p.mixture_distribution.probs if parts is not p else torch.ones(1)
            else:
                means, shares = rule(kind, dim)[0], p.log_prob(rule(kind, dim)[0]).exp()
                scales = torch.zeros_like(means)
            closed = torch.stack(
                [
                    share.log() + dense(x, A @ mean + b, A @ torch.diag(s**2) @ A.T + noise)
                    for share, mean, s in zip(shares, means, scales, strict=True)
                ]
            ).logsumexp(0)
            vae = VAE(made, Decoder(net, likelihoods.Normal(scale)), guide).eval()
            torch.testing.assert_close(exact(vae, x, kind, dim).log_px, closed, rtol=0, atol=2e-5)
            if kind == ON_R:
                torch.testing.assert_close(log_evidence_by_quadrature(made, vae.decoder, x), closed, rtol=0, atol=2e-5)
            else:
                torch.testing.assert_close(log_evidence_by_enumeration(vae, x), closed, rtol=0, atol=1e-10)
            if prior == "StandardNormal":
                model = LinearGaussian(A, b, scale)
                torch.testing.assert_close(model.log_evidence(x), closed, rtol=0, atol=1e-10)
                q = VAE(made, vae.decoder, narrow).encoder(x)
                truth = exact(VAE(made, vae.decoder, narrow), x, kind, dim)
                found = model.elbo(x, q.mean, torch.diag_embed(q.variance))
                torch.testing.assert_close(found, truth.elbo, rtol=0, atol=1e-4)
                z = torch.randn(7, N, dim)
                bayes = p.log_prob(z) + vae.decoder(z).log_prob(x) - closed
                torch.testing.assert_close(model.posterior(x).log_prob(z), bayes, rtol=0, atol=1e-10)


@pytest.mark.parametrize("where", [w for w in PLACES if w[1] == ON_R], ids=ids)
def test_quadrature_states_its_error(monkeypatch, where):
    """Also of a prior whose tails the grid cuts off; where it cuts off too much it refuses."""
    monkeypatch.setattr(evaluation, "_POINTS", 121)
    largest = 0.0
    for likelihood in likelihoods_at(where):
        vae, _, x = case(where, likelihood)
        truth = truth_of(where, likelihood).log_px
        try:
            found = evaluation.quadrature(vae, x)
        except ValueError as refusal:
            assert "whose mass" in str(refusal) and where[0] in ("VampPrior", "Laplace"), refusal
            continue
        off = (found.values - truth).abs()
        assert (off < 1.2 * found.errors + 5e-5).all(), (likelihood, off, found.errors)
        largest = max(largest, off.max().item())
        assert torch.equal(log_evidence_by_quadrature(vae.prior, vae.decoder, x, num_points=121), found.values)
    assert largest < 5e-3


@pytest.mark.parametrize("where", PLACES, ids=ids)
def test_quadrature_and_enumeration_keep_to_their_kind_of_z(where):
    _, kind, latent_dim = where
    for likelihood in NORMALISED:
        vae, _, x = case(where, likelihood)
        if kind in ("bits", "one-hot vectors"):
            z, joint = joint_by_enumeration(vae, x)
            assert sorted(z.tolist()) == sorted(rule(kind, latent_dim)[0].tolist())
            truth = truth_of(where, likelihood).log_px
            for found in (joint.logsumexp(0), evaluation.enumeration(vae, x).values):
                torch.testing.assert_close(found, truth, rtol=0, atol=1e-10)
    if kind not in ("bits", "one-hot vectors"):
        with pytest.raises(
            ValueError, match=r"expected z to be a one-hot vector or a vector of bits, found .*estimate"
        ):
            log_evidence_by_enumeration(vae, x)
    if kind == ON_R:
        return
    with pytest.raises(
        ValueError, match=r"expected (z on R\^D, found prior|at most 2 latent dim).*: .*use log_evidence"
    ):
        log_evidence_by_quadrature(vae.prior, vae.decoder, x)
    with pytest.raises(ValueError, match="expected one or two continuous latent dimensions for quadrature, found"):
        evaluation.quadrature(vae, x)
    if latent_dim == 2:
        with pytest.raises(ValueError, match=r"expected z on R\^2, found prior\(\) with support"):
            posterior_on_grid(vae, x)


def test_a_circle_is_diagnosed_without_the_pictures_of_a_plane(tmp_path):
    vae, *_ = case(("SphereUniform", "the unit sphere", 2), "Bernoulli")
    rows = (torch.rand(20, E) < 0.5).double()
    data = SimpleNamespace(train=rows, test=rows[:5], policy="", prepare=lambda x: x, name="bits")
    lines: list[str] = []
    found = evaluation.diagnose(vae, data, tmp_path, 100, note=lines.append)
    assert found["calibration"] and any("no gaps: expected an encoder that gives" in line for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"gaps.png", "log_weights.png"}


# ------------------------------------------------------------------------------------------ a score is no likelihood


@pytest.mark.parametrize(
    "claim",
    [
        pyro_vae.estimates.log_evidence,
        pyro_vae.annealing.annealed_log_evidence,
        lambda vae, x: log_evidence_by_quadrature(vae.prior, vae.decoder, x),
        evaluation.quadrature,
        gaps.refine,
        lambda vae, x: gaps.gap_report(vae, x, Estimate("log p(x)", torch.zeros(N), 0)),
        posterior_on_grid,
        lambda vae, x: posterior_by_nuts(vae, x, 1, 1),
        lambda vae, x: posterior_predictive_check(vae, x, lambda x: x.sum(1), 1),
        lambda vae, x: simulation_based_calibration(vae, 1, 1),
    ],
)
def test_nothing_is_claimed_from_a_score(claim):
    """One sentence, whoever is asked; nothing that the score itself would raise."""
    _, vae, x = case(("StandardNormal", ON_R, 2), "Comparison")
    with pytest.raises(ValueError, match=SCORE):
        claim(vae, x)


def test_nothing_is_summed_from_a_score():
    vae, _, x = case(("OneHotCategorical", "one-hot vectors", 3), "Comparison")
    for claim in (joint_by_enumeration, log_evidence_by_enumeration, evaluation.enumeration):
        with pytest.raises(ValueError, match=SCORE):
            claim(vae, x)
    assert not is_normalised(vae.decoder(torch.zeros(1, 3))) and is_real(StandardNormal(2)())


# ---------------------------------------------------------------------------------- two hundred repeated estimates

REPEATS = 200
FEW = {"Bernoulli": 2, "Nominal": 3}  # values of a number of x, where all x can be summed over
WORLDS = [
    (("StandardNormal", ON_R, 2), "Bernoulli"),
    (("StudentT", ON_R, 1), "Nominal"),
    (("Dirichlet", "the simplex", 3), "Bernoulli"),
    (("OneHotCategorical", "one-hot vectors", 3), "Nominal"),
]
MORE_WORLDS = [
    (("SphereUniform", "the unit sphere", 3), "Bernoulli"),
    (("Laplace", ON_R, 2), "Poisson"),
    (("MixtureOfNormals", ON_R, 1), "Masked"),
    (("Bernoulli", "bits", 2), "HeteroscedasticNormal"),
]


def in_groups(found):
    """An estimate of many examples, as one estimate for each of the 200 groups of them."""
    values, errors = found.values.detach().reshape(REPEATS, -1), found.errors.detach().reshape(REPEATS, -1)
    return [replace(found, values=value, errors=error) for value, error in zip(values, errors, strict=True)]


def repeated(estimator, where, likelihood, x, draws):
    """One of the estimators, and what it estimates of these examples."""
    wide, narrow, _ = case(where, likelihood)
    if estimator == "ELBO":
        return pyro_vae.estimates.elbo(narrow, x, draws)
    if estimator == "importance":
        return pyro_vae.estimates.log_evidence(wide, x, draws)
    return pyro_vae.annealing.annealed_log_evidence(wide, x, draws, 3, 1, schedule=linear_schedule)


def worlds(estimator, among):
    return [world for world in among if estimator != "annealing" or world[0][1] == ON_R]


@pytest.mark.parametrize("estimator", ["ELBO", "importance", "annealing"])
def test_monte_carlo_errors_are_right(estimator):
    """The same few examples again and again: the error left is that of the draws of z."""
    draws = {"ELBO": 200, "importance": 400, "annealing": 100}[estimator]
    for where, likelihood in worlds(estimator, WORLDS + MORE_WORLDS):
        x, truth = case(where, likelihood)[2], truth_of(where, likelihood)
        expected = (truth.elbo if estimator == "ELBO" else truth.log_px).mean().item()
        groups = in_groups(repeated(estimator, where, likelihood, x.repeat(REPEATS, 1), draws))
        scores = torch.tensor([(group.mean - expected) / group.monte_carlo_error for group in groups])
        assert_standard_normal(scores, (estimator, where, likelihood))


@pytest.mark.parametrize("estimator", ["ELBO", "importance", "annealing"])
def test_whole_errors_are_right(estimator):
    """Fresh data each time, against the expectation over x: the error that is printed. Sums over all x are exact."""
    for where, likelihood in worlds(estimator, WORLDS):
        vae, narrow, _ = case(where, likelihood)
        values = torch.arange(float(FEW[likelihood]))
        every = torch.cartesian_prod(*[values] * E)
        truth = exact(narrow, every, *where[1:])
        assert abs(truth.log_px.exp().sum() - 1) < 1e-4, "all x there are"
        expected = (truth.log_px.exp() * (truth.elbo if estimator == "ELBO" else truth.log_px)).sum().item()
        seed(estimator, *where, likelihood)
        with torch.no_grad():
            x = vae.sample(REPEATS * 40)
        draws = {"ELBO": 5, "importance": 100, "annealing": 20}[estimator]
        groups = in_groups(repeated(estimator, where, likelihood, x, draws))
        scores = torch.tensor([(group.mean - expected) / group.standard_error for group in groups])
        assert_standard_normal(scores, (estimator, where, likelihood))


# --------------------------------------------------------------------------------------------------- the sandwich

SANDWICHES = [
    (("StandardNormal", ON_R, 2), "Bernoulli"),
    (("MixtureOfNormals", ON_R, 1), "Poisson"),
    (("Laplace", ON_R, 1), "Normal"),
    (("StudentT", ON_R, 1), "NegativeBinomial"),
    (("FlowPrior", ON_R, 2), "Beta"),
    (("VampPrior", ON_R, 1), "DiscretizedLogistic"),
]
GROUP = 20


def both_sides(where, likelihood):
    """Log p(x) minus the lower bound and the upper one minus log p(x), [examples]."""
    vae, narrow, _ = case(where, likelihood)
    first = number("sandwich", *where, likelihood)
    with short_pilot(20):
        found = pyro_vae.annealing.sandwich(vae, 10 * GROUP, 8, 6, 2, seed=first, from_encoder=first % 2 == 0)
    truth = exact(narrow, found.x, *where[1:]).log_px
    return truth - found.lower.values.detach(), found.upper.values.detach() - truth


def check_sandwich():
    """Means of twenty: contained up to two standard errors on either side, as often as a t of 19 degrees at least."""
    contained = []
    for where, likelihood in SANDWICHES:
        for excess in both_sides(where, likelihood):
            groups = excess.reshape(-1, GROUP)
            contained.append(groups.mean(1) > -2 * groups.std(1) / math.sqrt(GROUP))
            weight = (-excess).exp()  # its mean is 1, exactly
            assert abs(weight.mean() - 1) < 4 * weight.std() / math.sqrt(len(weight)), (where, likelihood)
            for beyond in (0.05, 0.2, 0.5):  # Markov's inequality
                assert (excess < -beyond).sum() <= binom.ppf(1 - 1e-4, len(excess), math.exp(-beyond))
    share = torch.cat(contained).double().mean().item()
    least = 1 - t.sf(2, GROUP - 1)
    count = sum(map(len, contained))
    assert share > least - 4 * math.sqrt(least * (1 - least) / count), f"{share:.3f} of {count}, expected {least:.3f}"


def test_the_sandwich_contains_log_evidence_as_often_as_it_should():
    check_sandwich()


def test_the_sandwich_closes_with_longer_chains():
    vae, narrow, _ = case(*SANDWICHES[1])
    short, long = (pyro_vae.annealing.sandwich(vae, 60, 4, steps, 2, seed=1) for steps in (2, 40))
    assert 0 < long.gap + 0.02 < 0.5 * short.gap
    truth = exact(narrow, long.x, *SANDWICHES[1][0][1:]).log_px
    assert (long.lower.values - truth).abs().mean() < 0.5 * (short.lower.values - truth).abs().mean()


# ----------------------------------------------------------------------------------------------- the tests themselves

CASES = {
    of_estimates: list(itertools.product(PLACES[4::3], ("Bernoulli", "Laplace", "Poisson"))),
    of_annealing: list(itertools.product([w for w in PLACES if w[1] == ON_R], ("Bernoulli", "Laplace"))),
}


def check_scores(scores_of_case):
    """Some of the cases: no score beyond five, and together a standard normal's."""
    found: dict[str, list[torch.Tensor]] = {}
    for where, likelihood in CASES[scores_of_case]:
        for estimator, scores in scores_of_case(where, likelihood).items():
            assert (scores.abs() < 5).all(), (estimator, where, likelihood)  # at once: most mutants end here
            found.setdefault(estimator, []).append(scores.detach())
    for estimator, scores in found.items():
        assert_standard_normal(torch.cat(scores), estimator)


@pytest.mark.parametrize("scores_of_case", CASES)
def test_the_cases_of_the_mutants_pass(scores_of_case):
    check_scores(scores_of_case)


LOG_W = {
    "q forgotten": lambda terms: terms.log_px + terms.log_pz,
    "prior forgotten": lambda terms: terms.log_px - terms.log_qz,
    "both forgotten": lambda terms: terms.log_px,
    "prior and q exchanged": lambda terms: terms.log_px - terms.log_pz + terms.log_qz,
    "likelihood twice": lambda terms: 2 * terms.log_px + terms.log_pz - terms.log_qz,
}
FOUND = {
    "1 / K forgotten": lambda found: replace(found, values=found.values + math.log(found.num_particles)),
    "half an error too high": lambda found: replace(found, values=found.values + 0.6 * found.errors),
    "errors halved": lambda found: replace(found, errors=found.errors / 2),
    "errors doubled": lambda found: replace(found, errors=found.errors * 2),
}
PATH = {
    "prior and guide exchanged": lambda base, ratio: (base + ratio, -ratio),
    "likelihood twice": lambda base, ratio: (base, 2 * ratio),
    "start forgotten": lambda base, ratio: (0 * base, ratio),
}


@pytest.mark.parametrize("name", LOG_W)
def test_mistaken_weights_are_seen(monkeypatch, name):
    monkeypatch.setattr(Terms, "log_w", property(LOG_W[name]))
    with pytest.raises(AssertionError):
        check_scores(of_estimates)


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("scores_of_case", CASES)
def test_mistaken_estimates_are_seen(monkeypatch, scores_of_case, name):
    if scores_of_case is of_estimates:
        module, estimator = pyro_vae.estimates, "log_evidence"
    else:
        module, estimator = pyro_vae.annealing, "annealed_log_evidence"
    right = getattr(module, estimator)
    monkeypatch.setattr(module, estimator, lambda *given, **settings: FOUND[name](right(*given, **settings)))
    with pytest.raises(AssertionError):
        check_scores(scores_of_case)


@pytest.mark.parametrize("name", PATH)
def test_a_mistaken_path_is_seen(monkeypatch, name):
    right = pyro_vae.annealing._Path.evaluate

    def mistaken(path, z):
        base, ratio, *gradients = right(path, z)
        return *PATH[name](base, ratio), *gradients

    monkeypatch.setattr(pyro_vae.annealing._Path, "evaluate", mistaken)
    with pytest.raises(AssertionError):
        check_scores(of_annealing)


def from_the_start(path, z, step_sizes, backward):
    """A backward chain that does not begin at the z that made x."""
    return backward(path, path.start(len(z)), step_sizes)


def forwards(path, z, step_sizes, backward):
    """A chain that goes the wrong way."""
    return path.forward(z, step_sizes)


def of_other_sign(path, z, step_sizes, backward):
    log_w, share = backward(path, z, step_sizes)
    return -log_w, share


@pytest.mark.parametrize("changed", [from_the_start, forwards, of_other_sign])
def test_a_mutant_of_the_sandwich_is_seen(monkeypatch, changed):
    backward = pyro_vae.annealing._Path.backward
    monkeypatch.setattr(pyro_vae.annealing._Path, "backward", lambda *given: changed(*given, backward))
    with pytest.raises(AssertionError):
        check_sandwich()
