"""Every estimator of log p(x) against an exact one, for many priors and likelihoods; and the two commands on top."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from pyro_vae import (
    VAE,
    Bernoulli,
    Binomial,
    ContinuousBernoulli,
    Decoder,
    DiagonalNormal,
    DiscretizedLogistic,
    Estimate,
    FlowPrior,
    HeteroscedasticNormal,
    LearnedNormal,
    MixtureOfNormals,
    Mlp,
    NegativeBinomial,
    Poisson,
    StandardNormal,
    VampPrior,
    discrete,
    elbo,
    likelihoods,
    log_evidence,
    priors,
)
from pyro_vae.annealing import annealed_log_evidence
from pyro_vae.cli import main
from pyro_vae.evaluation import differences, enumeration, quadrature
from pyro_vae.exact import LinearGaussian

B, D, E = 5, 2, 7

PRIORS = {
    "StandardNormal": lambda: StandardNormal(D, scale=1.2),
    "LearnedNormal": lambda: LearnedNormal(D),
    "Laplace": lambda: priors.Laplace(D),
    "StudentT": lambda: priors.StudentT(D, df=30.0),
    "MixtureOfNormals": lambda: MixtureOfNormals(D, num_components=4),
    "VampPrior": lambda: VampPrior(DiagonalNormal(Mlp(E, 6, 2 * D)), torch.randn(4, E)),
    "FlowPrior": lambda: FlowPrior(D, num_transforms=2, hidden=5),
}
LIKELIHOODS = {
    "Bernoulli": (Bernoulli, lambda x: (x > 0).double()),
    "Binomial": (lambda: Binomial(9), lambda x: (4.5 + 2 * x).round().clamp(0, 9)),
    "Normal": (lambda: likelihoods.Normal(0.8), lambda x: x),
    "StudentT": (lambda: likelihoods.StudentT(5.0), lambda x: x),
    "ContinuousBernoulli": (ContinuousBernoulli, torch.sigmoid),
    "HeteroscedasticNormal": (lambda: HeteroscedasticNormal(min_scale=0.3), lambda x: x),
    "Poisson": (Poisson, lambda x: (2 + x).round().clamp(min=0)),
    "NegativeBinomial": (NegativeBinomial, lambda x: (2 + x).round().clamp(min=0)),
    "DiscretizedLogistic": (lambda: DiscretizedLogistic(num_levels=8), lambda x: (4 + x).round().clamp(0, 7)),
}
PAIRS = [(prior, "Bernoulli") for prior in PRIORS]
PAIRS += [("StandardNormal", likelihood) for likelihood in LIKELIHOODS if likelihood != "Bernoulli"]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def case(request):
    """A small nonlinear model, data that suit it, and log p(x) by quadrature."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    prior, likelihood = request.param
    make, to_data = LIKELIHOODS[likelihood]
    p = make()
    decoder = Decoder(Mlp(D, 6, E * p.num_outputs, activation=nn.Tanh), p)
    encoder = DiagonalNormal(Mlp(E, 6, 2 * D))
    nn.init.zeros_(encoder.net[-1].weight)
    encoder.net[-1].bias.data = torch.tensor([0.0, 0.0, 0.5, 0.5])  # wider than any posterior: weights are bounded
    vae = VAE(PRIORS[prior](), decoder, encoder)
    x = to_data(torch.randn(B, E))
    yield vae, x, quadrature(vae, x)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
def test_importance_sampling_against_quadrature(case):
    vae, x, exact = case
    found = log_evidence(vae, x, 4000)
    assert found.errors.max() < 0.1
    assert ((found.values - exact.values).abs() < 4.5 * found.errors + found.errors**2 + 1e-6).all()


@pytest.mark.usefixtures("float64")
def test_annealing_against_quadrature(case):
    vae, x, exact = case
    found = annealed_log_evidence(vae, x, 24, 25, 3)
    assert ((found.values - exact.values).abs() < 4.5 * found.errors + found.errors**2 + 1e-6).all()
    bound = elbo(vae, x, 400)
    assert (bound.values < exact.values + 4 * bound.errors).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("prior", "encoder", "width"),
    [(priors.Bernoulli, discrete.Bernoulli, 4), (priors.OneHotCategorical, discrete.OneHotCategorical, 4)],
)
def test_importance_sampling_against_enumeration(prior, encoder, width):
    vae = VAE(prior(width), Decoder(Mlp(width, 6, E), Bernoulli()), encoder(Mlp(E, 6, width)))
    x = (torch.rand(B, E) < 0.5).double()
    exact, found = enumeration(vae, x, "bits"), log_evidence(vae, x, 4000)
    assert ((found.values - exact.values).abs() < 4 * found.errors + 1e-6).all()
    assert (exact.num_particles, exact.policy, exact.monte_carlo_error, exact.method) == (0, "bits", 0, "enumeration")
    with pytest.raises(ValueError, match="found a discrete z: use enumeration"):
        quadrature(vae, x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_quadrature_states_its_own_error(latent_dim):
    lg = LinearGaussian(torch.randn(E, latent_dim), torch.zeros(E), 0.7)
    vae, x = lg.as_vae(), torch.randn(B, E)
    found = quadrature(vae, x)
    assert ((found.values - lg.log_evidence(x)).abs() <= found.errors + 1e-9).all() and found.errors.max() < 1e-6
    narrow = LinearGaussian(lg.weight, lg.loc, 0.02)
    rough = quadrature(narrow.as_vae(), narrow.as_vae().sample(B).detach())
    assert rough.errors.max() > 0.01, "a posterior between the grid's points is noticed"
    with pytest.raises(ValueError, match=r"found one whose mass there is 0.84"):
        quadrature(VAE(StandardNormal(1, scale=5.7), Decoder(Mlp(1, E), Bernoulli()), nn.Identity()), x)
    with pytest.raises(ValueError, match="found 3 latent dimensions"):
        quadrature(LinearGaussian(torch.randn(E, 3), torch.zeros(E), 0.7).as_vae(), x)


def test_differences_are_to_the_first_run():
    runs = {
        name: {"ELBO": Estimate("ELBO", torch.tensor(values), 1), name: Estimate(name, torch.zeros(2), 1)}
        for name, values in {"a": [1.0, 2.0], "b": [2.0, 4.0], "c": [0.0, 0.0]}.items()
    }
    assert [(run, against, d.name, d.mean) for run, against, d in differences(runs)] == [
        ("b", "a", "ELBO", 1.5),
        ("c", "a", "ELBO", -1.5),
    ]


# ------------------------------------------------------------------------------------------------------ the commands

QUICK = ["--epochs", "1", "--batch_size", "512", "--eval_particles", "3", "--figures", "false"]
WORDS = ["--num_particles", "30", "--num_examples", "9"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small runs on the same data, one on other data."""
    folder = tmp_path_factory.mktemp("evaluated")
    main(["train", *QUICK, "--out", str(folder / "a")])
    main(["train", *QUICK, "--out", str(folder / "b"), "--encoder", "FullNormal", "--networks.hidden", "[9]"])
    main(["train", *QUICK, "--out", str(folder / "c"), "--data.seed", "1"])
    return folder


@pytest.mark.parametrize("estimator", ["importance", "annealing", "quadrature"])
def test_evaluate_by_each_estimator(runs, capsys, estimator):
    capsys.readouterr()
    chains = ["--num_chains", "4", "--num_temperatures", "10", "--leapfrog_steps", "2", "--from_encoder", "true"]
    before = (runs / "a" / "model.safetensors").read_bytes()
    main(["evaluate", str(runs / "a"), *WORDS, "--estimator", estimator, *chains, "--json"])
    result = json.loads(capsys.readouterr().out)
    by_name = {estimate["name"]: estimate for estimate in result["estimates"]}
    assert result["policy"].endswith("; the first 9 held-out examples")
    assert all(e["num_examples"] == 9 for e in by_name.values())
    assert by_name["log p(x)"]["monte_carlo_error"] > 0
    assert by_name["log p(x)"]["data_error"] < by_name["log p(x)"]["standard_error"]
    assert by_name["log p(x)"]["smallest_effective_sample_size"] >= 1
    further = {"annealing": "log p(x), annealed", "quadrature": "log p(x), exact"}.get(estimator)
    if further:
        assert by_name["ELBO"]["mean"] < by_name[further]["mean"]
        assert by_name[f"-{further}"]["mean"] == pytest.approx(-by_name[further]["mean"] / (64 * math.log(2)))
        assert by_name[further]["method"].startswith({"annealing": "AIS: 4 chains, T=10"}.get(estimator, "quadrature"))
    values = load_file(runs / "a" / "evaluation.safetensors")
    assert values.keys() == by_name.keys()
    assert values["ELBO"].mean().item() == pytest.approx(by_name["ELBO"]["mean"])
    assert (runs / "a" / "model.safetensors").read_bytes() == before


def test_evaluate_with_diagnostics(runs, capsys):
    capsys.readouterr()
    main(["evaluate", str(runs / "b"), *WORDS, "--diagnostics", "true"])
    out = capsys.readouterr().out
    for words in ("error: ", "smallest ESS", "I_q(x; z)", "amortisation gap", "generalisation gap", "dispersion"):
        assert words in out
    for name in ("gaps", "log_weights", "aggregate", "posteriors"):
        with Image.open(runs / "b" / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 200 and np.asarray(picture).std() > 1
    result = json.loads((runs / "b" / "evaluation.json").read_text(encoding="utf-8"))["diagnostics"]
    assert {"health", "aggregate", "calibration", "gaps", "generalisation_gap"} <= result.keys()
    parts = {part["name"]: part["mean"] for part in result["aggregate"]}
    assert parts["KL(q(z|x), p(z))"] == pytest.approx(parts["I_q(x; z)"] + parts["KL(q(z), p(z))"])
    assert "Where nats are lost" in (runs / "b" / "report.html").read_text(encoding="utf-8")


def test_compare(runs, capsys):
    capsys.readouterr()
    main(["compare", str(runs / "a"), str(runs / "b"), *WORDS, "--json"])
    result = json.loads(capsys.readouterr().out)
    first, second = ({estimate["name"]: estimate for estimate in result["runs"][str(runs / run)]} for run in ("a", "b"))
    for row in result["differences"]:
        assert (row["run"], row["against"]) == (str(runs / "b"), str(runs / "a"))
        assert row["mean"] == pytest.approx(second[row["name"]]["mean"] - first[row["name"]]["mean"])
    paired = {row["name"]: row["standard_error"] for row in result["differences"]}
    apart = math.hypot(first["ELBO"]["standard_error"], second["ELBO"]["standard_error"])
    assert 0 < paired["ELBO"] < apart, "both runs find the same digits hard"
    main(["compare", str(runs / "a"), str(runs / "b"), *WORDS])
    out = capsys.readouterr().out
    assert f"less {runs / 'a'}:" in out and "(paired, n=9)" in out


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("compare", ["a", "c"], "expected runs of one data policy, found 'Digits"),
        ("compare", ["a"], "expected two different runs or more, found"),
        ("compare", ["a", "a"], "expected two different runs or more, found"),
        ("compare", ["a", "nowhere"], "expected a run folder with a config.yaml, found none"),
        ("evaluate", ["a", "--estimator", "enumeration"], "expected z to be a one-hot vector or a vector of bits"),
        ("evaluate", ["a", "--num_examples", "0"], "--num_examples: expected a number >= 1, found 0"),
        ("evaluate", ["a", "--estimator", "ais"], "--estimator: expected"),
        ("evaluate", ["a", *WORDS, "--estimator", "annealing", "--num_chains", "0"], "expected num_chains to be an"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, command, words, expected):
    capsys.readouterr()
    words = [str(runs / word) if len(word) == 1 and word.isalpha() else word for word in words]
    with pytest.raises(SystemExit) as stop:
        main([command, *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error
    assert not Path("nowhere").exists()
