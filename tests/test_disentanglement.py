"""The four scores on codes whose scores are known: perfect, permuted, mixed, constant; and formulas by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
from pyro_vae.disentanglement import (
    dci,
    dci_of_importance,
    disentangle,
    factor_vae_score,
    jackknife_error,
    mig,
    mutual_information,
    sap,
)
from pyro_vae.sprites import Sprites

pytestmark = pytest.mark.usefixtures("float64")
FACTORS = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5)).repeat(6, 1)  # [360, 3]
PERFECT = FACTORS.double()
PERMUTED = torch.stack([-2 * PERFECT[:, 2] + 7, torch.zeros(360), 0.5 * PERFECT[:, 0], PERFECT[:, 1] - 100], 1)
ROTATION = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
MIXED = (PERFECT - PERFECT.mean(0)) / PERFECT.std(0) @ ROTATION
CONSTANT = torch.full((360, 2), 0.3)
SCORES = {
    "mig": mig,
    "sap": sap,
    "disentanglement": lambda z, v: dci(z, v, 5).disentanglement,
    "completeness": lambda z, v: dci(z, v, 5).completeness,
    "factor": lambda z, v: factor_vae_score(z, v, 200).mean,
}


@pytest.mark.parametrize("name", SCORES)
def test_perfect_and_permuted_codes_score_one_and_mixed_ones_less(name):
    for codes in (PERFECT, PERMUTED):
        assert SCORES[name](codes, FACTORS) == pytest.approx(1, abs=1e-9)
    assert SCORES[name](MIXED, FACTORS) < 0.8


def test_constant_codes_say_nothing():
    assert mig(CONSTANT, FACTORS) == sap(CONSTANT, FACTORS) == 0
    assert sap(CONSTANT, FACTORS, categorical=[0]) == pytest.approx(0)
    assert dci(CONSTANT, FACTORS, 5).disentanglement == dci(CONSTANT, FACTORS, 5).completeness == 0
    assert factor_vae_score(0.1 * PERFECT, FACTORS, threshold=0.0).mean == 1  # small, but not still
    chance = factor_vae_score(CONSTANT, FACTORS)
    assert abs(chance.mean - 1 / 3) < 4 * chance.standard_error


def test_two_copies_of_a_factor_have_no_gap_but_are_disentangled():
    codes = PERFECT[:, [0, 0, 1, 1, 2, 2]]
    assert mig(codes, FACTORS) == pytest.approx(0) and sap(codes, FACTORS) == pytest.approx(0)
    found = dci(codes, FACTORS, 30)
    assert found.disentanglement == pytest.approx(1) and found.completeness < 0.9


def test_mutual_information_by_hand():
    # z is v, but for one quarter of the examples where it is the other value: a binary channel.
    v = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).unsqueeze(1)
    z = torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 0]).unsqueeze(1)
    expected = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert mutual_information(z, v).item() == pytest.approx(expected)
    assert mig(z, v) == pytest.approx(expected / math.log(2))
    both = torch.cat([z, v.double()], 1)
    assert mig(both, v) == pytest.approx(1 - expected / math.log(2))
    # Equal-width bins: 0..3 in two bins is 0, 0, 1, 1.
    u = torch.arange(4).unsqueeze(1)
    assert mutual_information(u.double(), u, num_bins=2).item() == pytest.approx(math.log(2))


def test_a_factor_with_one_value_is_left_out_of_the_gap():
    more = torch.cat([FACTORS, torch.zeros(360, 1, dtype=torch.long)], 1)
    assert mig(PERFECT, more) == pytest.approx(1)


def test_sap_by_hand():
    v = torch.tensor([0, 1, 2, 3]).unsqueeze(1)
    z = torch.tensor([[0.0, 1.0], [1.0, -1.0], [2.0, -1.0], [3.0, 2.0]])
    # Cov = 0.375, Var z = 1.6875, Var v = 1.25
    second = 0.375**2 / (1.6875 * 1.25)
    assert sap(z, v) == pytest.approx(1 - second)
    assert sap(z[:, :1], v) == pytest.approx(1)
    # Without order: three classes on a line, the middle one found as well; the other dimension knows one of them.
    v = torch.tensor([0, 0, 1, 1, 2, 2]).unsqueeze(1)
    z = torch.tensor([[2.0, 0], [2, 0], [0, 0], [0, 0], [1, 5], [1, 5]])
    assert sap(z, v, categorical=[0]) == pytest.approx(1 - 2 / 3)
    assert sap(z[:, :1], v, categorical=[0]) == pytest.approx(1 - 1 / 3)
    assert sap(z, v) == pytest.approx(0.75 - 0.25)  # squared correlations, were the same numbers ordered
    # Balanced: a rare class counts as much as a frequent one; one cut at most for two classes.
    v = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]).unsqueeze(1)
    z = torch.arange(8.0).unsqueeze(1)
    assert sap(z, v, categorical=[0]) == pytest.approx(0.5)
    v = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1]).unsqueeze(1)
    assert sap(z, v, categorical=[0]) == pytest.approx(0.75 - 0.5)


def test_dci_of_a_table_by_hand():
    table = torch.tensor([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    found = dci_of_importance(table)
    mixed = 1 + (0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert found.disentanglement == pytest.approx(4 / 6 * mixed + 2 / 6 * 1)
    third = 1 + (1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3)) / math.log(3)
    assert found.completeness == pytest.approx((1 + third) / 2)
    assert dci_of_importance(torch.ones(3, 2)).disentanglement == pytest.approx(0)
    assert dci_of_importance(torch.ones(3, 2)).completeness == pytest.approx(0)
    with pytest.raises(ValueError, match="absolute values"):
        dci_of_importance(-table)


def test_informativeness_is_the_accuracy_on_unseen_examples():
    good, none = dci(PERFECT, FACTORS, 5), dci(torch.randn(360, 3), FACTORS, 5)
    assert [each.mean for each in good.informativeness] == [1, 1, 1]
    assert all(len(each.values) == 90 for each in good.informativeness)
    for each, values in zip(none.informativeness, (3, 4, 5), strict=True):
        assert abs(each.mean - 1 / values) < 4.5 * each.standard_error


def test_jackknife_of_a_mean_is_its_standard_error():
    z = torch.randn(300, 1)
    error = jackknife_error(lambda codes, _: codes.mean().item(), z, FACTORS[:300], num_groups=300)
    assert error == pytest.approx((z.std() / math.sqrt(300)).item())
    with pytest.raises(ValueError, match="2 to 300 groups"):
        jackknife_error(mig, z, FACTORS[:300], num_groups=1)


@pytest.mark.parametrize("score", [mig, sap, dci, factor_vae_score])
def test_refusals(score):
    with pytest.raises(ValueError, match="integers from 0"):
        score(PERFECT, PERFECT)
    with pytest.raises(ValueError, match="expected codes"):
        score(PERFECT[1:], FACTORS)
    with pytest.raises(ValueError, match="finite codes"):
        score(PERFECT * math.nan, FACTORS)


def test_all_scores_of_a_model_leave_it_alone():
    torch.set_default_dtype(torch.float32)
    data = Sprites(16, num_scales=2, num_rotations=2, num_positions=4, test_fraction=0.5)
    net = torch.nn.Sequential(torch.nn.Flatten(), Mlp(256, 6))
    vae = VAE(StandardNormal(3), Decoder(Mlp(3, 256), Bernoulli()), DiagonalNormal(net))
    state = torch.get_rng_state()
    found = disentangle(vae, data)
    assert torch.equal(torch.get_rng_state(), state) and vae.training
    names = ["MIG", "SAP", "DCI disentanglement", "DCI completeness", "DCI informativeness", "FactorVAE score"]
    assert list(found) == names and all(0 <= each.value <= 1 for each in found.values())
    assert all(found[name].standard_error > 0 for name in names) and found["MIG"].policy == data.policy
    with pytest.raises(ValueError, match="known factors, found none"):
        disentangle(vae, SimpleNamespace(name="none"))


def test_the_error_of_dci_is_not_less_than_what_other_examples_change():
    def once(seed):
        codes = PERFECT + 0.7 * torch.randn(PERFECT.shape, generator=torch.Generator().manual_seed(seed))
        return codes, dci(codes, FACTORS, 5).disentanglement

    values = torch.tensor([once(seed)[1] for seed in range(20)])
    error = jackknife_error(lambda z, v: dci(z, v, 5).disentanglement, once(0)[0], FACTORS, num_groups=10)
    assert 0.6 * values.std() < error < 8 * values.std()
