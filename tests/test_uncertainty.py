"""Numbers with their errors: what they say of themselves, and what may be compared."""

import json
import math

import pytest
import torch

from pyro_vae.uncertainty import Estimate, Score, jackknife_error, paired_difference, with_error

pytestmark = pytest.mark.usefixtures("float64")


def test_a_tiny_error_is_not_printed_as_none():
    assert with_error(-84.8312, 0.3) == "-84.83 ± 0.30" and with_error(1.0, 0.0) == "1.00 ± 0.00"
    assert with_error(1.0, 3e-6) == "1.000000 ± 0.000003" and with_error(1.0, 3e-9) == "1.000000 ± 3.0e-09"
    assert with_error(-2.5, 1e-133) == "-2.500000 ± 0"  # less than float64 tells apart


def test_too_few_draws_to_judge_are_told():
    few = Estimate("log p(x)", torch.tensor([-80.0, -84.0]), 10, effective_sample_size=torch.tensor([1.2, 3.4]))
    assert str(few) == "-82.0 ± 2.0 nats per example (K=10, n=2); K too small to judge"
    assert few.warning.startswith("K=10 is too small to tell by the weights whether it is enough (that takes 25 draws)")
    assert not Estimate("ELBO", torch.tensor([-80.0, -84.0]), 10).warning  # no weights: an ELBO is an ELBO


def test_standard_error_and_text():
    estimate = Estimate("ELBO", torch.tensor([-80.0, -84.0, -88.0, -92.0]), 5000, "static binarisation")
    assert estimate.mean == -86
    assert estimate.standard_error == pytest.approx(math.sqrt(80 / 3) / 2)
    assert str(estimate) == "-86.0 ± 2.6 nats per example (K=5000, n=4)"
    assert estimate.summary() == {
        "name": "ELBO",
        "mean": -86.0,
        "standard_error": estimate.standard_error,
        "num_particles": 5000,
        "num_examples": 4,
        "units": "nats per example",
        "policy": "static binarisation",
    }, "what is unknown is left out"
    assert json.loads(json.dumps(estimate.summary()))["num_examples"] == 4


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([-84.0, -84.6], "-84.30 ± 0.30"),
        ([-840.0, -960.0], "-900 ± 60"),
        ([-84.0, -84.004], "-84.0020 ± 0.0020"),
        ([-84.0, -84.0], "-84.00 ± 0.00"),
    ],
)
def test_text_shows_two_digits_of_the_error(values, text):
    assert str(Estimate("ELBO", torch.tensor(values), 3)).startswith(text + " nats per example (K=3, n=")


def test_bits_per_dim():
    estimate = Estimate("log p(x)", torch.tensor([-10.0, -14.0]), 5, "levels", torch.tensor([0.3, 0.4]))
    bits = estimate.bits_per_dim(4)
    torch.testing.assert_close(bits.values, torch.tensor([10.0, 14.0]) / (4 * math.log(2)))
    assert bits.mean == pytest.approx(3 / math.log(2)) and bits.units == "bits per dimension"
    assert bits.standard_error == pytest.approx(estimate.standard_error / (4 * math.log(2)))
    assert bits.monte_carlo_error == pytest.approx(0.25 / (4 * math.log(2)))
    assert "bits per dimension" in str(bits) and bits.policy == "levels"
    with pytest.raises(ValueError, match="expected nats and num_dims >= 1, found bits per dimension"):
        bits.bits_per_dim(4)


def test_paired_differences():
    """The spread that two models share cancels: here all of it but 0.1."""
    generator = torch.Generator().manual_seed(0)
    shared, noise = torch.randn(2, 400, generator=generator)
    a = Estimate("log p(x)", -80 + 10 * shared, 100, "static")
    b = Estimate("log p(x)", -80 + 10 * shared - 0.02 + 0.1 * noise, 100, "static")
    found = paired_difference(a, b)
    assert found.standard_error == pytest.approx(0.1 / 20, rel=0.1)
    assert abs(found.mean - 0.02) < 4 * found.standard_error
    assert a.standard_error > 50 * found.standard_error
    assert str(found).endswith("nats (paired, n=400)")


def test_bounds_of_different_k_are_not_compared():
    def evidence(num_particles, **settings):
        return Estimate("log p(x)", torch.zeros(3), num_particles, **settings)

    for a, b in ((evidence(50), evidence(5000)), (evidence(50).bits_per_dim(7), evidence(60).bits_per_dim(7))):
        with pytest.raises(
            ValueError, match=r"expected equal num_particles, found 50 and \d+: -?log p\(x\) is a bound"
        ):
            paired_difference(a, b)
    annealed = evidence(16, method="AIS: 16 chains")
    for other in (evidence(0), annealed, evidence(50), Estimate("ELBO", torch.zeros(3), 1)):
        paired_difference(evidence(50), other)
    paired_difference(Estimate("ELBO", torch.zeros(3), 1), Estimate("ELBO", torch.zeros(3), 100))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Estimate("ELBO", torch.zeros(3), 1, "dynamic"), "expected equal data policies, found 'static' and 'dynamic'"),
        (Estimate("ELBO", torch.zeros(4), 1, "static"), "expected equal numbers of examples, found 3 and 4"),
        (
            Estimate("ELBO", torch.zeros(3), 1, "static", units="bits per dimension"),
            "expected equal units, found 'nats' and 'bits per dimension'",
        ),
    ],
)
def test_numbers_about_different_data_are_not_compared(other, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(Estimate("ELBO", torch.zeros(3), 1, "static"), other)


def test_one_example_has_no_standard_error():
    assert str(Estimate("ELBO", torch.tensor([-84.0]), 3)) == "-84.00 nats (K=3, one example: no standard error)"


def test_a_score_says_what_it_is():
    score = Score("AUROC", 0.9312, 0.021, 30, policy="toy")
    assert str(score) == "0.931 ± 0.021 (n=30)"
    assert Score("x", 0.5, math.nan, 3).summary() == {
        "name": "x", "value": 0.5, "standard_error": None, "num_examples": 3
    }  # fmt: skip


def test_the_jackknife_takes_the_same_rows_from_all_sets_and_several_numbers():
    z, y = torch.randn(30, 2), torch.arange(30)
    errors = jackknife_error(lambda a, b: (a.mean().item(), float(len(a) - len(b))), z, y, num_groups=30)
    assert errors[1] == 0 and errors[0] == pytest.approx((z.mean(1).std() / math.sqrt(30)).item())
    assert jackknife_error(lambda a, b: float((a - b).abs().sum()), z[:, 0], z[:, 0], num_groups=5) == 0
