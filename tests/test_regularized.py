"""Objectives changed on purpose: values by hand, which are bounds, that each compiles, trains and refuses."""

import dataclasses
import math

import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from test_objectives import CASES, Case, assert_equal_to, make_vae, noise, value_and_gradients

from pyro_vae import (
    DIP,
    ELBO,
    WAE,
    BalancedKL,
    Beta,
    BetaTC,
    Capacity,
    EnergyEntropy,
    FastSVI,
    FreeBits,
    InfoVAE,
    Linear,
    ReconstructionKL,
    StickingTheLanding,
    Surgery,
    ThermodynamicVariational,
    draw,
    fit,
)
from pyro_vae.analytic import kl, kl_per_dimension, log_ratios
from pyro_vae.testing import check_objective

K, B, D, E = 3, 5, 2, 7
pytestmark = pytest.mark.usefixtures("float64")

MEMBERS = [
    Capacity(K),
    Capacity(K, over="example", capacity=Linear(10, stop=2.0)),
    FreeBits(K),
    FreeBits(K, per="site", over="example"),
    BalancedKL(K),
    BetaTC(K),
    BetaTC(K, estimator="mws", num_examples=20),
    BetaTC(K, estimator="mss", num_examples=20, beta=Linear(10)),
    DIP(K),
    DIP(K, kind="I"),
    InfoVAE(K),
    WAE(K),
    WAE(K, weight=Linear(5, stop=10.0), kernel="gaussian"),
]


def binary(rows=B):
    return (noise(rows, E) > 0).double()


def at_seed(objective, vae, x):
    torch.manual_seed(0)
    return objective.bound(vae.model, vae.guide, x)


def make_terms(vae, x, num_particles=K):
    torch.manual_seed(0)
    return draw(vae.model, vae.guide, x, num_particles=num_particles)


# ------------------------------------------------------------------------------------------------------- by hand


def test_capacity_by_hand():
    vae, x = make_vae(), binary()
    terms = make_terms(vae, x)
    each, reconstruction = kl(terms)[0], terms.log_px.mean(0)
    middle = each.mean().item()
    assert each.min() < middle < each.max()
    found = at_seed(Capacity(K, gamma=7.0, capacity=middle, over="example"), vae, x)
    torch.testing.assert_close(found, reconstruction - 7 * (each - middle).abs())
    for capacity in (0.0, middle / 2, 0.99 * middle, 1.01 * middle, 2 * middle):
        found = at_seed(Capacity(K, gamma=7.0, capacity=capacity), vae, x)
        torch.testing.assert_close(found.mean(), (reconstruction - 7 * (each.mean() - capacity).abs()).mean())
    torch.testing.assert_close(at_seed(Capacity(K, gamma=1.0, capacity=0.0), vae, x), reconstruction - each)
    scheduled = Capacity(K, capacity=Linear(steps=4, stop=2.0))
    scheduled.at_step(3)
    torch.testing.assert_close(at_seed(scheduled, vae, x), at_seed(Capacity(K, capacity=1.5), vae, x))


def test_free_bits_by_hand():
    vae, x = make_vae(), binary()
    terms = make_terms(vae, x)
    parts, reconstruction = kl_per_dimension(terms)[0], terms.log_px.mean(0)
    means = parts.mean(0)
    between = means.mean().item()  # one dimension lies above, the other below
    found = at_seed(FreeBits(K, nats=between), vae, x)
    torch.testing.assert_close(found.mean(), reconstruction.mean() - means.clamp(min=between).sum())
    found = at_seed(FreeBits(K, nats=between, over="example"), vae, x)
    torch.testing.assert_close(found, reconstruction - parts.clamp(min=between).sum(-1))
    torch.testing.assert_close(at_seed(FreeBits(K, nats=0.0), vae, x), reconstruction - parts.sum(-1))

    case = Case(vae.model, vae.guide, (x,))
    free = value_and_gradients(FreeBits(K, nats=100.0), case)[1]
    alone = value_and_gradients(Beta(num_particles=K, beta=0.0), case)[1]  # below the threshold the KL has no gradient
    assert free.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(free[name], gradient)


@pytest.mark.parametrize("vectorize", [True, False])
def test_free_bits_per_layer(vectorize):
    case = CASES["two layers"]()
    objective = FreeBits(K, nats=0.2, per="site", vectorize_particles=vectorize)
    torch.manual_seed(0)
    terms = objective.draw(case.model, case.guide, *case.args)
    ratios = log_ratios(terms)
    assert list(ratios) == ["z2", "z1"]
    expected = terms.log_px.mean() - sum(ratio.mean().clamp(min=0.2) for ratio in ratios.values())
    torch.testing.assert_close(objective.combine(terms).mean(), expected)


def test_balanced_kl_by_hand():
    case = CASES["two layers"]()
    objective = BalancedKL(K, beta=0.5)
    terms = objective.draw(case.model, case.guide, *case.args)
    one, two = (ratio.mean(0) for ratio in log_ratios(terms).values())
    size = one.mean().abs() + two.mean().abs()
    weighted = 2 * (one.mean().abs() * one + two.mean().abs() * two) / size
    torch.testing.assert_close(objective.combine(terms), terms.log_px.mean(0) - 0.5 * weighted)
    vae = CASES["vae-standard-diagonal"]()
    expected, found = (value_and_gradients(o, vae) for o in (Beta(num_particles=K, beta=2.0), BalancedKL(K, 2.0)))
    assert_equal_to(expected, found)  # one site: its weight is 1


# ----------------------------------------------------------------------------------------------------- reductions


def test_never_above_the_elbo():
    vae, x = make_vae(), binary(50)
    elbo = at_seed(ReconstructionKL(K), vae, x)
    for nats in (0.01, 0.1, 1.0):
        assert (at_seed(FreeBits(K, nats=nats, over="example"), vae, x) <= elbo + 1e-12).all()
        assert at_seed(FreeBits(K, nats=nats), vae, x).mean() <= elbo.mean() + 1e-12
    assert (at_seed(DIP(K), vae, x) <= at_seed(ELBO(K), vae, x)).all()


def test_what_is_a_bound():
    bounds = [DIP(), FreeBits(over="example"), InfoVAE(alpha=0.0, weight=1.0), BetaTC(beta=1.0)]
    others = [Capacity(), FreeBits(), BalancedKL(), BetaTC(), InfoVAE(), WAE(), Beta(beta=Linear())]
    assert all(o.is_bound for o in bounds) and not any(o.is_bound for o in others)
    assert not any(o.is_tight for o in [*others, DIP(), FreeBits(over="example")])
    assert InfoVAE(alpha=0.0, weight=1.0).is_tight and BetaTC(beta=1.0).is_tight
    for objective in MEMBERS:
        assert objective.formula.count("{") == objective.formula.count("}") > 0
        assert eval(repr(objective)) == objective and hash(objective) == hash(dataclasses.replace(objective))


@pytest.mark.parametrize("objective", [*MEMBERS, Surgery(2), EnergyEntropy(), ThermodynamicVariational(3)], ids=str)
def test_check_objective(objective):
    check_objective(objective)


# ------------------------------------------------------------------------------------------------------- learning

# With options; as they are by default, test_captured_members.py captures all objectives.
STEPS = [objective for objective in MEMBERS if objective != type(objective)(K)] + [Surgery(2, information=0.5)]


@pytest.mark.parametrize("objective", STEPS, ids=str)
def test_the_captured_step_is_eager_pyros(objective):
    x, results = binary(), []
    for kind, settings in ((SVI, {}), (FastSVI, {"backend": "replay"})):
        pyro.clear_param_store()
        vae = make_vae()
        torch.manual_seed(1)
        svi = kind(vae.model, vae.guide, Adam({"lr": 0.01}), loss=dataclasses.replace(objective), **settings)
        results.append([svi.step(x) for _ in range(4)])
    assert results[1] == pytest.approx(results[0], abs=1e-8)
    assert "eager, since" not in svi.explain(), svi.explain()


def test_fit_logs_the_objective_and_the_true_elbo():
    x = binary(40)
    for objective in (FreeBits(nats=3.0), BetaTC(beta=3.0), WAE(), StickingTheLanding(), BetaTC(dataset=x, beta=2.0)):
        vae = make_vae()
        history = fit(vae, x, objective=objective, epochs=3, batch_size=16, lr=0.01)
        assert history["elbo"] == pytest.approx([row["log_px"] - row["kl"] for row in history.rows])
        assert all(math.isfinite(value) for value in history["objective"])
        if isinstance(objective, FreeBits):
            assert all(row["objective"] < row["elbo"] for row in history.rows)
        if isinstance(objective, StickingTheLanding):
            assert history["objective"] == pytest.approx(history["elbo"])


# -------------------------------------------------------------------------------------------------------- refusals


def test_refusals():
    for make in (
        lambda: Capacity(gamma=-1.0),
        lambda: Capacity(capacity=-1.0),
        lambda: FreeBits(nats=-1.0),
        lambda: BalancedKL(beta=-1.0),
        lambda: BetaTC(alpha=-1.0),
        lambda: BetaTC(beta=math.nan),
        lambda: DIP(diagonal=-1.0),
        lambda: WAE(weight=-1.0),
    ):
        with pytest.raises(ValueError, match=r"expected \w+ >= 0, found"):
            make()
    with pytest.raises(ValueError, match="expected over='batch' or over='example'"):
        FreeBits(over="all")
    with pytest.raises(ValueError, match="expected per='dimension' or per='site'"):
        FreeBits(per="group")
    with pytest.raises(ValueError, match="expected kind 'I' or 'II'"):
        DIP(kind="III")
    with pytest.raises(ValueError, match="expected the kernel"):
        WAE(kernel="rbf")
    with pytest.raises(ValueError, match=r"expected alpha \+ weight >= 1"):
        InfoVAE(alpha=0.2, weight=0.5)
    with pytest.raises(ValueError, match="expected the estimator"):
        BetaTC(estimator="tc")
    vae, x = make_vae("mixture"), binary()
    with pytest.raises(ValueError, match="expected a prior with a reparameterised sampler"):
        WAE().loss_and_grads(vae.model, vae.guide, x)
    case = CASES["two layers"]()
    for objective in (BetaTC(), DIP(), WAE(), Surgery()):
        with pytest.raises(ValueError, match=r"one order|one latent site"):
            objective.bound(case.model, case.guide, *case.args)
