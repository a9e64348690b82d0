"""The same bound by other routes, and the closed forms that they are made of: equal in value, refused where not."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from test_objectives import (
    CASES,
    SCALED,
    Case,
    assert_equal_to,
    at_one_seed,
    conjugate,
    linear_gaussian,
    make_vae,
    noise,
    param,
    scale_param,
    value_and_gradients,
)

from pyro_vae import (
    ELBO,
    VAE,
    BalancedKL,
    Beta,
    BetaTC,
    Capacity,
    DReG,
    EnergyEntropy,
    FreeBits,
    LowRankNormal,
    Mlp,
    ReconstructionKL,
    StandardNormal,
    Surgery,
    draw,
)
from pyro_vae.analytic import entropy, kl, kl_per_dimension, log_ratios
from pyro_vae.estimates import elbo_terms

K, B, D, E = 3, 5, 2, 7
pytestmark = pytest.mark.usefixtures("float64")


def top_down():
    """Two layers, the guide in the model's order: z2 first."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            loc = param("w2", 0.7, -0.4) * z2.unsqueeze(-1)
            z1 = pyro.sample("z1", dist.Normal(loc, scale_param("s1", 0.8)).to_event(1))
            pyro.sample("x", dist.Normal(param("w1", 1.3) * z1.sum(-1), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(param("a2", 0.4) * x, scale_param("t2", 0.9)))
            loc = (param("a1", 0.5) * x + z2).unsqueeze(-1) * torch.tensor([1.0, 0.2])
            pyro.sample("z1", dist.Normal(loc, scale_param("t1", 0.6)).to_event(1))

    return Case(model, guide, (noise(B),))


def mean_field_masked():
    """A mask on the guide and the prior, a subsampled plate, and a weight."""
    mask = torch.tensor([True, False, True, True, False])

    def plate(x):
        return pyro.plate("data", 4 * len(x), subsample=torch.arange(len(x)), dim=-1)

    def model(x):
        with plate(x), poutine.mask(mask=mask), poutine.scale(scale=2.0):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), scale_param("s", 0.7)), obs=x)

    def guide(x):
        with plate(x), poutine.mask(mask=mask), poutine.scale(scale=2.0):
            loc = param("a", 0.3, -0.2) * x.unsqueeze(-1)
            pyro.sample("z", dist.Normal(loc, scale_param("t", 0.6)).to_event(1))

    return Case(model, guide, (noise(B),))


NEW = {"top down": top_down, "mean field, masked": mean_field_masked}
CLOSED = [
    "top down",
    "mean field, masked",
    "vae-standard-diagonal",
    "conditional",
    "masked",
    "pixel plate",
    "subsampled pixels",
    "inner latents",
    "two shared plates",
    "no plate",
    "global latent",
    "sequential plate",
]


def get(name):
    return (NEW | CASES)[name]()


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, K])
def test_reconstruction_kl_equals_trace_mean_field_elbo(name, num_particles, vectorize):
    case = get(name)
    settings = {"num_particles": num_particles, "vectorize_particles": vectorize, "max_plate_nesting": case.nesting}
    expected = value_and_gradients(TraceMeanField_ELBO(**settings), case)
    assert_equal_to(expected, value_and_gradients(ReconstructionKL(**settings), case))


@pytest.mark.parametrize("name", [*CLOSED, "two layers", "vae-standard-full", "vae-mixture-full", "vae-vamp-diagonal"])
def test_the_routes_agree_in_the_mean(name):
    case = get(name)
    settings = {"num_particles": 1, "max_plate_nesting": case.nesting}
    objectives = [EnergyEntropy(**settings)]
    if name in CLOSED or name == "vae-standard-full":
        objectives.append(ReconstructionKL(**settings))
    with torch.no_grad():
        terms = draw(
            case.model, case.guide, *case.args, **case.kwargs, num_particles=6000, max_plate_nesting=case.nesting
        )
        for objective in objectives:
            if isinstance(objective, EnergyEntropy):
                difference = -terms.log_qz - entropy(terms)
            else:
                difference = terms.log_pz - terms.log_qz + kl(terms)
            error = difference.std(0) / math.sqrt(len(difference))
            assert (difference.mean(0).abs() <= 4.5 * error + 1e-9).all(), objective
            torch.testing.assert_close(objective.combine(terms), (terms.log_w - difference).mean(0))


@pytest.mark.parametrize("name", CLOSED)
def test_kl_per_dimension_adds_up(name):
    case = get(name)
    for vectorize in (True, False):
        terms = draw(
            case.model,
            case.guide,
            *case.args,
            **case.kwargs,
            num_particles=K,
            vectorize_particles=vectorize,
            max_plate_nesting=case.nesting,
        )
        parts = kl_per_dimension(terms)
        assert parts.shape[:-1] == terms.log_px.shape
        torch.testing.assert_close(parts.sum(-1), kl(terms))
        ratios = log_ratios(terms)
        torch.testing.assert_close(sum(ratios.values()), terms.log_qz - terms.log_pz)
    expected = {"top down": 3, "vae-standard-diagonal": D, "inner latents": 4, "global latent": B + 1}.get(name)
    assert expected is None or parts.shape[-1] == expected


def test_closed_forms_by_hand():
    case = get("mean field, masked")
    terms = draw(case.model, case.guide, *case.args, num_particles=K)
    loc = torch.tensor([0.3, -0.2]) * case.args[0].unsqueeze(-1)
    by_hand = 0.5 * (loc**2 + 0.36 - 1 - math.log(0.36))
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]).unsqueeze(-1)
    torch.testing.assert_close(kl_per_dimension(terms), (by_hand * kept).expand(K, B, D))
    half = 0.5 * math.log(2 * math.pi * math.e * 0.36)
    torch.testing.assert_close(entropy(terms), (2 * half * kept.squeeze(-1)).expand(K, B))
    assert terms.scale == 8.0


def test_full_and_low_rank_normals_have_a_kl():
    vae = make_vae("standard", "full")
    low = LowRankNormal(Mlp(E, 6, LowRankNormal.num_outputs(D, 1)), 1).double()
    x = (noise(B, E) > 0).double()
    for one in (vae, VAE(StandardNormal(D).double(), vae.decoder, low)):
        terms = draw(one.model, one.guide, x)
        q = one.encoder(x)
        covariance, mean = q.covariance_matrix, q.mean
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        expected = 0.5 * (trace + (mean**2).sum(-1) - D - torch.logdet(covariance))
        torch.testing.assert_close(kl(terms), expected.unsqueeze(0))


@pytest.mark.parametrize("objective", [ReconstructionKL(1), EnergyEntropy(1)], ids=str)
def test_exact_value_on_the_linear_gaussian_model(objective):
    lg = linear_gaussian()
    vae = lg.as_vae(diagonal=True)
    x = noise(B, E)
    exact = lg.log_evidence(x) - lg.diagonal_gap()
    with torch.no_grad():
        bounds = objective.bound(vae.model, vae.guide, x.repeat(3000, 1)).reshape(3000, B)
    error = bounds.std(0) / math.sqrt(len(bounds))
    assert ((bounds.mean(0) - exact).abs() < 4.5 * error).all()


def test_variance_is_lower_where_the_kl_is_no_noise():
    """Without a likelihood that depends on z nothing is left to sample."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    case = Case(model, conjugate(noise(B)).guide)
    guide = case.guide
    bounds = [ReconstructionKL(1).bound(model, lambda x: guide(), noise(B)) for _ in range(2)]
    torch.testing.assert_close(bounds[0], bounds[1])


@pytest.mark.parametrize("how", SCALED)
@pytest.mark.parametrize(
    "objective", [ReconstructionKL(K), EnergyEntropy(K), FreeBits(K, nats=0.2), Capacity(K), Surgery(K)], ids=str
)
def test_scale_stays_outside_the_bound(objective, how):
    x, settings = noise(B), dict(SCALED[how])
    settings["full"] = settings.get("full", 1) * B
    bound, loss = at_one_seed(objective, conjugate(x))
    scaled_bound, scaled_loss = at_one_seed(objective, conjugate(x, **settings))
    torch.testing.assert_close(scaled_bound, bound, rtol=0, atol=1e-10)
    torch.testing.assert_close(scaled_loss, 10 * loss)


EVERY = [
    ELBO,
    ReconstructionKL,
    EnergyEntropy,
    Surgery,
    FreeBits,
    Capacity,
    DReG,
    lambda **k: FreeBits(per="site", nats=1.0, **k),
    lambda **k: BalancedKL(beta=0.5, **k),
    lambda **k: BetaTC(beta=3.0, **k),
    lambda **k: Beta(beta=3.0, **k),
]


@pytest.mark.parametrize("make", EVERY, ids=lambda m: getattr(m, "__name__", "other"))
@pytest.mark.parametrize("name", ["top down", "mean field, masked", "vae-standard-diagonal", "conditional"])
def test_particles_one_by_one_give_the_same(make, name, monkeypatch):
    """Both ways get the same noise, particle by particle: value and gradients are equal."""
    case, bank, calls = get(name), {}, itertools.count()

    def at_once(shape, dtype, device):
        bank[next(calls)] = torch.randn(shape, generator=torch.Generator().manual_seed(len(bank)), dtype=dtype)
        return bank[len(bank) - 1]

    def one_by_one(shape, dtype, device):
        particle, call = divmod(next(calls), len(bank))
        return bank[call][particle].reshape(shape)

    results = []
    for vectorize, source in ((True, at_once), (False, one_by_one)):
        monkeypatch.setattr(torch.distributions.normal, "_standard_normal", source)
        calls = itertools.count()
        objective = make(num_particles=K, vectorize_particles=vectorize)
        try:
            results.append(value_and_gradients(objective, case))
        except ValueError as error:  # no aggregate of a hierarchy or under a mask
            assert "one latent site" in str(error) or "unmasked" in str(error)
            return
    assert_equal_to(*results)


# --------------------------------------------------------------------------------------------------------- surgery


def test_surgery_is_the_elbo_draw_by_draw():
    vae, x = make_vae(), (noise(B, E) > 0).double()
    case = Case(vae.model, vae.guide, (x,))
    expected = value_and_gradients(ELBO(K), case)
    for objective in (Surgery(K), Surgery(K, dataset=torch.cat([x, 1 - x]))):
        assert_equal_to(expected, value_and_gradients(objective, case), atol=1e-9)
    beta, weighted = (
        value_and_gradients(o, case)
        for o in (Beta(num_particles=K, beta=3.0), Surgery(K, information=3.0, marginal=3.0))
    )
    assert_equal_to(beta, weighted, atol=1e-9)


def test_parts_of_the_surgery():
    """Mutual information and marginal KL of two narrow codes: log 2 and the rest."""
    x = torch.tensor([-1.0, 1.0]).repeat(1000)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(2 * x, 0.05))

    torch.manual_seed(0)
    full = Surgery(1).bound(model, guide, x)
    torch.manual_seed(0)
    free = Surgery(1, information=0.0).bound(model, guide, x)
    information = (free - full).mean()
    assert information.item() == pytest.approx(math.log(2), abs=1e-9)  # the codes do not overlap
    assert Surgery().is_bound and not Surgery(information=0.0).is_bound and Surgery(information=0.0).mixes_examples


def test_the_logged_elbo_is_the_true_one():
    """The terms that fit adds up are the sampled ones, whatever the objective makes of them."""
    vae, x = make_vae(), (noise(B, E) > 0).double()
    expected = elbo_terms(vae, x, 3000)["elbo"].values
    for objective in (ReconstructionKL(3000), FreeBits(3000, nats=2.0), Surgery(20, information=0.0)):
        with torch.no_grad():
            log_w = objective.draw(vae.model, vae.guide, x).log_w
        error = log_w.std(0) * math.sqrt(1 / len(log_w) + 1 / 3000)
        assert ((log_w.mean(0) - expected).abs() < 4.5 * error).all()


# -------------------------------------------------------------------------------------------------------- refusals


def test_refuses_what_has_no_closed_form():
    x = (noise(B, E) > 0).double()
    mixture = make_vae("mixture")
    with pytest.raises(ValueError, match=r"KL divergence has a closed form, found Normal and .* at site 'z': use ELBO"):
        ReconstructionKL().bound(mixture.model, mixture.guide, x)
    full = make_vae("standard", "full")
    with pytest.raises(ValueError, match=r"factorises over its dimensions, found MultivariateNormal at site 'z'"):
        FreeBits().bound(full.model, full.guide, x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            mix = dist.Categorical(logits=torch.zeros(2))
            pyro.sample("z", dist.MixtureSameFamily(mix, dist.Normal(torch.zeros(2), 1.0)))

    message = r"entropy has a closed form, found MixtureSameFamily at site 'z': use ELBO"
    with pytest.raises(ValueError, match=message), torch.no_grad():
        EnergyEntropy().bound(lambda x: conjugate(x).model(), guide, noise(B))


def test_refuses_another_order():
    """Given the z2 that was drawn from z1, the KL of z1 is not that of the model's conditional."""
    case = get("two layers")
    with pytest.raises(ValueError, match=r"in one order, found \['z2', 'z1'\] and \['z1', 'z2'\]"):
        ReconstructionKL().bound(case.model, case.guide, *case.args)
    EnergyEntropy().bound(case.model, case.guide, *case.args)


def test_refuses_weights_and_masks_of_one_side():
    x = noise(B)
    plain = conjugate(x)
    cases = {
        "one scale in model and guide": conjugate(x, prior_scale=2.0).model,
        "one mask in model and guide": conjugate(x, mask=torch.tensor([True, False, True, True, False])).model,
    }
    for message, model in cases.items():
        with pytest.raises(ValueError, match=message):
            ReconstructionKL().bound(model, plain.guide)


def test_refuses_sites_of_the_guide_only():
    for name in ("auxiliary", "factor"):
        case = get(name)
        with pytest.raises(ValueError, match=r"latent sites of the model, found .* in the guide only"):
            ReconstructionKL().bound(case.model, case.guide, *case.args)


def test_refuses_negative_weights():
    for settings in ({"information": -1.0}, {"marginal": math.nan}):
        with pytest.raises(ValueError, match="expected weights >= 0"):
            Surgery(**settings)
