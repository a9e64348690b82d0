"""Estimates: right on average, with the standard error they claim, counted exactly, and leaving no trace."""

import itertools
import math
import types
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import kstest
from torch import nn

import pyro_vae.estimates
import pyro_vae.passes
import pyro_vae.uncertainty
from pyro_vae import (
    VAE,
    Bernoulli,
    Decoder,
    DiagonalNormal,
    Mlp,
    StandardNormal,
    draw,
    elbo,
    elbo_terms,
    encoders,
    log_evidence,
    tails,
)
from pyro_vae.estimates import elbo_and_log_evidence, log_weights
from pyro_vae.exact import LinearGaussian

K, B, D, E = 3, 5, 2, 7
pytestmark = pytest.mark.usefixtures("float64")


def linear_gaussian():
    weight = torch.tensor([[1.0, 0.2, -0.5, 0.8, 0.0, 0.3, -0.2], [0.3, -0.7, 0.4, 0.5, 0.6, 0.0, 0.1]]).T
    return LinearGaussian(weight, torch.linspace(-1, 1, E), 0.7)


def data(rows, seed=1):
    return torch.randn(rows, E, generator=torch.Generator().manual_seed(seed))


def exact_elbo(lg, x):
    """The ELBO of the best diagonal guide."""
    return lg.log_evidence(x) - lg.diagonal_gap()


def within(values, target, errors=4.0):
    """Whether the mean of independent values is the target within some standard errors."""
    difference = values - target
    return abs(difference.mean()) < errors * difference.std() / math.sqrt(len(values))


# ---------------------------------------------------------------------------------------------------- right


def test_exact_guide_gives_the_evidence():
    lg, x = linear_gaussian(), data(B)
    vae = lg.as_vae()
    for estimate in (log_evidence(vae, x, K), elbo(vae, x, K)):
        torch.testing.assert_close(estimate.values, lg.log_evidence(x), rtol=0, atol=1e-10)


def test_terms_of_the_elbo():
    """E log p(x|z) and the KL of the best diagonal guide are known in closed form."""
    lg, x = linear_gaussian(), data(400)
    vae = lg.as_vae(diagonal=True)
    terms = elbo_terms(vae, x, num_particles=20, policy="grey")
    q = vae.encoder(x)
    kl = torch.distributions.kl_divergence(q, vae.prior().expand([len(x)])).detach()
    torch.testing.assert_close(terms["elbo"].values, terms["log_px"].values - terms["kl"].values, rtol=0, atol=1e-12)
    assert within(terms["kl"].values, kl)
    assert within(terms["elbo"].values, exact_elbo(lg, x))
    assert within(terms["log_px"].values, exact_elbo(lg, x) + kl)
    assert {estimate.policy for estimate in terms.values()} == {"grey"}
    assert {estimate.num_particles for estimate in terms.values()} == {20}
    torch.testing.assert_close(elbo(vae, x, 20).values, terms["elbo"].values)


def test_evidence_is_unbiased_on_the_scale_of_probabilities():
    lg, x = linear_gaussian(), data(1).expand(4000, E)
    for num_particles in (1, K):
        values = log_evidence(lg.as_vae(diagonal=True), x, num_particles).values
        ratio = (values - lg.log_evidence(x)).exp()
        assert ratio.std() > 0.05
        assert within(ratio, 1.0)


def test_evidence_rises_with_particles_to_the_exact_one():
    lg, x = linear_gaussian(), data(300)
    vae, exact = lg.as_vae(diagonal=True), lg.log_evidence(x)
    vae.encoder.net.bias.data[:D] += 0.8
    estimates = [log_evidence(vae, x, k).values for k in (1, 10, 1000)]
    gaps = [exact - values for values in estimates]
    for looser, tighter in itertools.pairwise(gaps):
        difference = looser - tighter
        assert difference.mean() > 4 * difference.std() / math.sqrt(len(x))
    assert gaps[-1].mean() > -4 * gaps[-1].std() / math.sqrt(len(x))
    assert gaps[-1].mean() < 0.1 < gaps[0].mean()


def test_z_scores_of_repeated_estimates():
    """The Monte-Carlo error of the mean is what the spread over examples says it is."""
    lg, x = linear_gaussian(), data(100)
    vae, exact = lg.as_vae(diagonal=True), exact_elbo(lg, x)
    scores = []
    for seed in range(150):
        error = elbo(vae, x, seed=seed).values - exact
        scores.append(error.mean() / (error.std() / math.sqrt(len(x))))
    scores = torch.stack(scores)
    assert abs(scores.mean()) < 4 / math.sqrt(len(scores))
    assert abs(scores.var() - 1) < 4 * math.sqrt(2 / len(scores))


# ------------------------------------------------------------------------------------------------------ counted


def count_draws(monkeypatch):
    """Record the particles that each example gets (its first number is its name) and the numbers of each pass."""
    counts, sizes = {}, []

    def counting(model, guide, x, num_particles):
        for row in x[:, 0].tolist():
            counts[row] = counts.get(row, 0) + num_particles
        sizes.append(num_particles * x.numel())
        return draw(model, guide, x, num_particles=num_particles)

    monkeypatch.setattr(pyro_vae.passes, "draw", counting)
    return counts, sizes


@pytest.mark.parametrize("max_elements", [1, 3 * E + 1, 64 * E, 100 * E, 500 * E, 2**22])
@pytest.mark.parametrize("num_particles", [1, 13])
@pytest.mark.parametrize("estimator", [elbo, log_evidence])
def test_particles_are_counted_exactly(monkeypatch, estimator, num_particles, max_elements):
    counts, sizes = count_draws(monkeypatch)
    lg, x = linear_gaussian(), data(70)
    x[:, 0] = torch.arange(70)
    estimate = estimator(lg.as_vae(), x, num_particles, max_elements=max_elements)
    assert counts == {float(row): num_particles for row in range(70)}
    assert max(sizes) <= max(max_elements, E)
    torch.testing.assert_close(estimate.values, lg.log_evidence(x))
    assert (estimate.num_particles, estimate.num_examples) == (num_particles, 70)


@pytest.mark.parametrize("estimator", [elbo, log_evidence])
def test_passes_do_not_change_the_distribution(estimator):
    lg, x = linear_gaussian(), data(1000)
    vae = lg.as_vae(diagonal=True)
    whole = estimator(vae, x, 8)
    for max_elements in (64 * E, 300 * E):
        cut = estimator(vae, x, 8, max_elements=max_elements, seed=1)
        assert within(cut.values - whole.values, 0.0)
        exact = exact_elbo(lg, x) if estimator is elbo else lg.log_evidence(x)
        assert (cut.values - exact).std() == pytest.approx((whole.values - exact).std().item(), rel=0.15)


def test_seeds():
    vae, x = linear_gaussian().as_vae(diagonal=True), data(B)
    for estimator in (elbo, log_evidence):
        first, again, other = (estimator(vae, x, K, seed=seed).values for seed in (0, 0, 1))
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        assert not torch.equal(first, other)


def test_single_precision_models_are_summed_in_double():
    torch.set_default_dtype(torch.float32)
    lg = LinearGaussian(torch.full((E, D), 0.5), torch.zeros(E), 0.7)
    estimate = log_evidence(lg.as_vae(), torch.ones(B, E), 1000)
    assert estimate.values.dtype == torch.float64
    torch.testing.assert_close(estimate.values.float(), lg.log_evidence(torch.ones(B, E)), rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------- the number


def test_both_from_the_same_draws(monkeypatch):
    counts, _ = count_draws(monkeypatch)
    vae, x = linear_gaussian().as_vae(diagonal=True), data(70)
    x[:, 0] = torch.arange(70)
    settings = {"seed": 3, "policy": "grey", "max_elements": 192 * E}
    expected = elbo_terms(vae, x, 30, **settings) | {"log_evidence": log_evidence(vae, x, 30, **settings)}
    counts.clear()
    found = elbo_and_log_evidence(vae, x, 30, **settings)
    assert set(counts.values()) == {30} and found.keys() == expected.keys()
    for name, estimate in expected.items():
        for field in ("values", "errors", "effective_sample_size", "pareto_k"):
            a, b = getattr(found[name], field), getattr(estimate, field)
            assert (a is None and b is None) or torch.equal(a, b), (name, field)
        assert found[name].summary() == estimate.summary()


def test_policy_is_carried():
    vae, x = linear_gaussian().as_vae(), data(B)
    assert elbo(vae, x, policy="grey").policy == "grey"
    assert log_evidence(vae, x, K, policy="dynamic, seed 0").policy == "dynamic, seed 0"


# ---------------------------------------------------------------------------------------------------- no trace


def noisy_vae():
    """A VAE with batch normalisation and dropout, parts of it in training mode and parts not."""
    encoder = nn.Sequential(nn.Linear(E, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2 * D))
    vae = VAE(StandardNormal(D), Decoder(Mlp(D, 6, E), Bernoulli()), DiagonalNormal(encoder))
    vae.train()
    vae.decoder.eval()
    encoder[1].eval()
    return vae


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("estimator", [elbo, elbo_terms, log_evidence])
def test_nothing_is_changed(estimator, fails):
    vae, x = noisy_vae(), (data(B) > 0).double()
    pyro.infer.Trace_ELBO().loss_and_grads(vae.model, vae.guide, x)  # parameters in the store, gradients, statistics
    pyro.param("other", torch.tensor(2.0))
    store = pyro.get_param_store()

    def snapshot():
        return (
            {name: t.clone() for name, t in vae.state_dict().items()},
            {name: p.grad.clone() for name, p in vae.named_parameters()},
            {name: part.training for name, part in vae.named_modules()},
            dict(store.named_parameters()),
            torch.get_rng_state(),
            torch.is_grad_enabled(),
        )

    before = snapshot()
    if fails:
        with pytest.raises(ValueError, match="expected num_particles"):
            estimator(vae, x, 0)
    else:
        estimator(vae, x, K)
    after = snapshot()
    for old, new in zip(before[:2], after[:2], strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert before[2] == after[2]
    assert len({*before[2].values()}) == 2
    assert before[3].keys() == after[3].keys()
    assert all(after[3][name] is parameter for name, parameter in before[3].items())
    assert torch.equal(before[4], after[4])
    assert after[5]


def test_evaluated_in_evaluation_mode():
    """Dropout is off: on the exact ELBO it would show."""
    vae, x = noisy_vae(), (data(B) > 0).double()
    training = elbo(vae, x, K).values
    torch.testing.assert_close(training, elbo(vae.eval(), x, K).values)


def test_parameters_of_the_store_are_used():
    """Also a program that keeps its parameters in Pyro's store is evaluated as it stands."""

    class Conjugate(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

        def guide(self, x):
            loc = pyro.param("loc", torch.zeros(()))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(loc, math.sqrt(0.5)))

    x = torch.full((B, 1), 3.0)
    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(3.0))
    assert elbo(Conjugate(), x, 100).mean < exact - 1
    assert "loc" not in pyro.get_param_store()
    pyro.param("loc", torch.tensor(1.5))
    torch.testing.assert_close(elbo(Conjugate(), x, K).values, exact.expand(B))


# --------------------------------------------------------------------------------------- errors, weights, warnings


def normal_kolmogorov(scores):
    """The p-value of Kolmogorov and Smirnov's test for a standard normal."""
    return kstest(scores.numpy(), "norm").pvalue


@pytest.mark.parametrize("estimator", [elbo, log_evidence])
def test_monte_carlo_errors_are_right(estimator):
    """z-scores of 200 repeated estimates are standard normal: mean, variance and the whole distribution."""
    lg, x = linear_gaussian(), data(10)
    vae = lg.as_vae(diagonal=True)
    exact = exact_elbo(lg, x) if estimator is elbo else lg.log_evidence(x)
    scores = []
    for seed in range(200):
        found = estimator(vae, x, 300, seed=seed)
        scores.append((found.mean - exact.mean().item()) / found.monte_carlo_error)
        if seed == 0:
            assert found.data_error**2 + found.monte_carlo_error**2 == pytest.approx(found.standard_error**2)
            assert found.monte_carlo_error < 0.1 * found.data_error
    scores = torch.tensor(scores)
    assert abs(scores.mean()) < 4 / math.sqrt(200)
    assert abs(scores.var() - 1) < 4 * math.sqrt(2 / 200)
    assert normal_kolmogorov(scores) > 1e-3


def test_whole_errors_are_right():
    """And those of 200 fresh test sets, against the expectation over x: the error that is printed."""
    lg = linear_gaussian()
    vae = lg.as_vae(diagonal=True)
    covariance = lg.weight @ lg.weight.T + lg.scale**2 * torch.eye(E)
    entropy = torch.distributions.MultivariateNormal(lg.loc, covariance).entropy()
    scores = []
    for seed in range(200):
        torch.manual_seed(seed)
        x = vae.sample(60).detach()
        found = elbo(vae, x, 5, seed=seed)
        scores.append((found.mean + entropy.item() + lg.diagonal_gap()) / found.standard_error)
    scores = torch.tensor(scores)
    assert abs(scores.mean()) < 4 / math.sqrt(200)
    assert abs(scores.var() - 1) < 4 * math.sqrt(2 / 200) + 0.1  # sixty examples: Student's t, not normal
    assert normal_kolmogorov(scores) > 1e-3


def test_errors_of_each_example():
    """The errors claimed are those seen over 400 copies of one example."""
    lg, x = linear_gaussian(), data(1).expand(400, E)
    vae = lg.as_vae(diagonal=True)
    for found in (log_evidence(vae, x, 200), *elbo_terms(vae, x, 200).values()):
        seen = found.values.std()
        assert abs(found.errors.square().mean().sqrt() - seen) < 4 * seen / math.sqrt(2 * 400), found.name
    assert elbo(vae, x, 1).errors is None and log_evidence(vae, x, 1).errors is None
    assert math.isnan(elbo(vae, x, 1).monte_carlo_error)


def test_weights_are_summarised_for_each_example():
    lg, x = linear_gaussian(), data(70)
    vae = lg.as_vae(diagonal=True)
    log_w = log_weights(vae, x, 100)
    assert log_w.shape == (100, 70)
    for max_elements in (2**22, 200 * E):
        found = log_evidence(vae, x, 100, max_elements=max_elements)
        again = log_weights(vae, x, 100, max_elements=max_elements)
        torch.testing.assert_close(found.values, again.logsumexp(0) - math.log(100))
        torch.testing.assert_close(found.effective_sample_size, tails.effective_sample_size(again))
        torch.testing.assert_close(found.pareto_k, tails.pareto_k(again))
        torch.testing.assert_close(found.errors, tails.standard_error_of_log_mean(again))
    assert log_evidence(vae, x, 24).pareto_k is None
    exact = log_evidence(lg.as_vae(), x, 100)
    torch.testing.assert_close(exact.effective_sample_size, torch.full((70,), 100.0))
    assert exact.warning == "" and exact.monte_carlo_error < 1e-12


def test_a_guide_that_misses_is_said_to():
    lg, x = linear_gaussian(), data(B)
    vae = lg.as_vae(diagonal=True)
    assert log_evidence(vae, x, 1000).warning == ""
    vae.encoder.net.bias.data[D:] -= 2.0  # a seventh of the width
    found = log_evidence(vae, x, 1000, policy="grey")
    assert "K=1000 is too small for 5 of 5 examples (Pareto k > 0.67)" in found.warning
    assert "raise num_particles or use annealed_log_evidence" in found.warning
    assert str(found).endswith("(K=1000, n=5); K too small for 5 of them")
    assert found.summary()["untrusted_examples"] == 5
    assert (found.values < lg.log_evidence(x)).all()


@pytest.mark.parametrize("max_elements", [13 * E, 64 * E, 2**22])
def test_the_encoder_runs_once_for_each_example(max_elements):
    vae, x, seen = linear_gaussian().as_vae(), data(70), []
    hook = vae.encoder.net.register_forward_hook(lambda net, inputs, output: seen.append(len(inputs[0])))
    log_evidence(vae, x, 7, max_elements=max_elements)
    hook.remove()
    assert sum(seen[1:]) == 70, "the first is check_vae's dry run"
    vae.guide = types.MethodType(lambda self, x: VAE.guide(self, x), vae)  # a guide of one's own is run as it is
    assert log_evidence(vae, x, K).num_examples == 70


def test_a_guide_of_a_subclass_is_used():
    class Wide(VAE):
        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                return pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))

    vae = linear_gaussian().as_vae()
    wide = Wide(vae.prior, vae.decoder, vae.encoder)
    assert log_evidence(wide, data(B), 50).effective_sample_size.max() < 40


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("estimator", [elbo, elbo_terms, log_evidence])
def test_refusals(estimator):
    vae = linear_gaussian().as_vae()
    with pytest.raises(ValueError, match="expected at least one example, found none"):
        estimator(vae, data(0))
    for number in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="expected num_particles to be an integer >= 1"):
            estimator(vae, data(B), number)


@pytest.mark.parametrize("estimator", [elbo, log_evidence])
def test_refuses_a_latent_variable_that_examples_share(estimator):
    class Shared(nn.Module):
        def model(self, x):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

        def guide(self, x):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match=r"expected terms of shape \(3, 5\).*found \(3, 1\).*one plate"):
        estimator(Shared(), data(B), K)


# ---------------------------------------------------------------------------------------------- the tests themselves


def check_core(estimates):
    """Exact statements that pin the estimates down; `estimates` is the module or a mutant of it."""
    lg, x = linear_gaussian(), data(B)
    vae = lg.as_vae()
    for max_elements in (2 * E, 3 * B * E, 2**22):
        for estimate in (estimates.log_evidence, estimates.elbo):
            values = estimate(vae, x, 7, max_elements=max_elements).values
            torch.testing.assert_close(values, lg.log_evidence(x), rtol=0, atol=1e-10)

    vae = lg.as_vae(diagonal=True)
    torch.manual_seed(0)
    with torch.no_grad():
        terms = draw(vae.model, vae.guide, x, num_particles=K)
    found = estimates.elbo_terms(vae, x, K)
    state = torch.get_rng_state()
    torch.testing.assert_close(found["log_px"].values, terms.log_px.mean(0))
    torch.testing.assert_close(found["kl"].values, (terms.log_qz - terms.log_pz).mean(0))
    torch.testing.assert_close(found["elbo"].values, terms.log_w.mean(0))
    torch.testing.assert_close(estimates.log_evidence(vae, x, K).values, terms.log_w.logsumexp(0) - math.log(K))
    assert torch.equal(torch.get_rng_state(), state)
    for name, draws in (("elbo", terms.log_w), ("log_px", terms.log_px), ("kl", terms.log_qz - terms.log_pz)):
        torch.testing.assert_close(found[name].errors, draws.std(0) / math.sqrt(K))
    weighed = estimates.log_evidence(vae, x, K)
    torch.testing.assert_close(weighed.effective_sample_size, tails.effective_sample_size(terms.log_w))
    torch.testing.assert_close(weighed.errors, tails.standard_error_of_log_mean(terms.log_w))
    assert weighed.monte_carlo_error == pytest.approx((weighed.errors.square().sum().sqrt() / B).item())
    assert found["elbo"].num_particles == K
    assert found["elbo"].standard_error == pytest.approx(math.sqrt(found["elbo"].values.var() / B))
    assert found["elbo"].mean == pytest.approx(float(terms.log_w.mean()))


def test_core():
    check_core(pyro_vae.estimates)


MUTATIONS = [
    ("log_w.logsumexp(0) - math.log(self.num_particles)", "log_w.mean(0)"),
    ("log_w.logsumexp(0) - math.log(self.num_particles)", "log_w.logsumexp(0)"),
    ("log_w = torch.cat(self.parts)", "log_w = torch.cat(self.parts[-2:])"),
    ("            self.parts.clear()\n", ""),
    ("means, squares = self.sums / num_particles", "means, squares = self.sums"),
    ("self.sums[:, :, rows] +=", "self.sums[:, :, rows] ="),
    ("torch.stack([terms.log_w, terms.log_px, terms.log_qz - terms.log_pz])", "torch.stack([terms.log_w] * 3)"),
    ("terms.log_qz - terms.log_pz]", "terms.log_pz - terms.log_qz]"),
    ("values.square().sum(1)", "values.sum(1)"),
    ("/ (num_particles - 1)).sqrt()", "/ num_particles).sqrt()"),
    ("errors[rows] = tails.standard_error_of_log_mean(log_w)", "errors[rows] = log_w.std(0)"),
    ("sizes[rows] = tails.effective_sample_size(log_w)", "sizes[rows] = self.num_particles"),
    (
        "self.values.std() / math.sqrt(len(self.values))).item()\n\n    @property\n    def monte",
        "self.values.std() / len(self.values)).item()\n\n    @property\n    def monte",
    ),
    ("square().sum().sqrt() / len(self.values)", "square().sum().sqrt()"),
]


@pytest.mark.parametrize("line, mutant", MUTATIONS, ids=range(len(MUTATIONS)))
def test_a_mutation_turns_the_core_red(line, mutant):
    paths = [Path(module.__file__) for module in (pyro_vae.uncertainty, pyro_vae.estimates)]
    source = "".join(path.read_text(encoding="utf-8") for path in paths)  # as one module: the mutant calls itself
    source = source.replace("from pyro_vae.uncertainty import Estimate\n", "")
    assert source.count(line) == 1, f"the mutated line moved: {line}"
    module = types.ModuleType("mutated_estimates")
    exec(compile(source.replace(line, mutant), "mutated_estimates.py", "exec"), module.__dict__)
    with pytest.raises((AssertionError, RuntimeError)):
        check_core(module)


def test_a_point_mass_gives_no_evidence():
    vae = VAE(StandardNormal(2), Decoder(Mlp(2, 7), Bernoulli()), encoders.Delta(Mlp(7, 2)))
    x = torch.ones(5, 7)
    assert "no bound" in elbo_terms(vae, x)["elbo"].name
    for estimate in (log_evidence, elbo_and_log_evidence):
        with pytest.raises(ValueError, match=r"found a point mass \(Delta\): log p\(x\) cannot be estimated"):
            estimate(vae, x, num_particles=3)


@pytest.mark.parametrize("estimate", [log_evidence, elbo_terms])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(5, 8), ValueError, r"encoder\(x\) failed on an input of shape \(2, 8\)"),
        (torch.ones(7), ValueError, r"expected \[B, \*E\]"),
        (torch.ones(5, 7, dtype=torch.int64), TypeError, r"convert it with x.float\(\)"),
        (torch.full((5, 7), torch.nan), ValueError, "values that are NaN, expected"),
        (torch.full((5, 7), 0.5), ValueError, r"x has values outside \{0, 1\}"),
        (torch.ones(5, 7).numpy(), TypeError, "expected a floating-point tensor"),
    ],
)
def test_data_that_does_not_fit_is_refused_in_words(estimate, x, error, message):
    vae = VAE(StandardNormal(2), Decoder(Mlp(2, 7), Bernoulli()), DiagonalNormal(Mlp(7, 4))).float()
    with pytest.raises(error, match=message):
        estimate(vae, x, num_particles=2)
