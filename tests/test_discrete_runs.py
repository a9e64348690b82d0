"""Discrete codes in whole runs: fit, its history, resuming, compiling, the command line, pictures."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn

from pyro_vae import (
    ELBO,
    VAE,
    Decoder,
    DiagonalNormal,
    Mlp,
    StandardNormal,
    StraightThrough,
    discrete,
    figures,
    fit,
    image_plots,
    latent_plots,
    likelihoods,
    priors,
    relaxed_priors,
)
from pyro_vae.cli import main
from pyro_vae.exact import joint_by_enumeration
from pyro_vae.supports import is_discrete

B, C, E = 5, 4, 7
QUICK = ["--epochs", "1", "--batch_size", "512", "--eval_particles", "3", "--networks.hidden", "[11]"]
QUICK += ["--device", "cpu", "--figures", "false"]


def make(family=discrete.OneHotCategorical, prior=priors.OneHotCategorical) -> VAE:
    decoder = Decoder(Mlp(C, 6, E, activation=nn.Tanh), likelihoods.Bernoulli())
    return VAE(prior(C), decoder, family(Mlp(E, 6, C, activation=nn.Tanh)))


def binary(num: int = 50) -> torch.Tensor:
    return torch.rand(num, E).round()


@pytest.mark.parametrize(
    ("family", "prior"),
    [(discrete.OneHotCategorical, priors.OneHotCategorical), (discrete.Bernoulli, priors.Bernoulli)],
)
def test_the_history_has_the_exact_terms(float64, family, prior):
    vae, x = make(family, prior), binary()
    z, log_joint = joint_by_enumeration(vae, x)
    with torch.no_grad():
        log_q = vae.encoder(x).log_prob(z.unsqueeze(1))
        kl = (log_q.exp() * (log_q - vae.prior().log_prob(z).unsqueeze(1))).sum(0).mean().item()
        elbo = (log_q.exp() * (log_joint - log_q)).sum(0).mean().item()
    history = fit(vae, x, objective=TraceEnum_ELBO(), epochs=1, batch_size=len(x))
    assert history["objective"] == pytest.approx([elbo]) == history["elbo"]
    assert history["kl"] == pytest.approx([kl]) and history["log_px"] == pytest.approx([elbo + kl])


@pytest.mark.parametrize(
    ("objective", "family", "prior"),
    [
        (TraceEnum_ELBO, discrete.OneHotCategorical, lambda dim: priors.OneHotCategorical(dim, learn=True)),
        (TraceEnum_ELBO, discrete.Bernoulli, priors.Bernoulli),
        (TraceGraph_ELBO, discrete.OneHotCategorical, priors.OneHotCategorical),
        (Trace_ELBO, discrete.Bernoulli, priors.Bernoulli),
        (ELBO, discrete.RelaxedOneHotCategorical, relaxed_priors.RelaxedOneHotCategorical),
        (ELBO, StraightThrough, priors.OneHotCategorical),
    ],
)
def test_every_parameter_moves_and_training_helps(objective, family, prior):
    vae, x = make(family, prior), binary(100)
    x[:] = x[:, :1]  # one bit: something for the code to say
    before = {name: value.clone() for name, value in vae.named_parameters()}
    history = fit(vae, x, objective=objective(), epochs=10, batch_size=10, lr=0.03, x_valid=x[:B])
    assert not [name for name, value in vae.named_parameters() if torch.equal(value, before[name])]
    assert all(math.isfinite(v) for name in ("objective", "elbo", "kl", "valid_elbo") for v in history[name])
    assert history["elbo"][-1] > history["elbo"][0] + 0.5
    assert vae.reconstruct(x).shape == vae.reconstruct(x, sample=True).shape == x.shape


def test_enumeration_with_particles_and_a_learned_number_of_plates(float64):
    vae, x = make(), binary()
    twin = copy.deepcopy(vae)
    one = fit(vae, x, objective=TraceEnum_ELBO(max_plate_nesting=1), epochs=1, batch_size=len(x))
    several = TraceEnum_ELBO(num_particles=3, vectorize_particles=True)
    three = fit(twin, x, objective=several, epochs=1, batch_size=len(x))
    assert several.max_plate_nesting == 2
    for name in ("objective", "elbo", "log_px", "kl"):  # exact: three particles are one three times
        assert three[name] == pytest.approx(one[name])


@pytest.mark.parametrize(
    "objective",
    [TraceEnum_ELBO, lambda: Trace_ELBO(num_particles=2, vectorize_particles=True), TraceGraph_ELBO],
    ids=["enumerated", "vectorised", "drawn"],
)
def test_a_resumed_run_is_the_same_run(tmp_path, objective):
    x = torch.rand(50, E)
    vae = make()
    twin = copy.deepcopy(vae)
    settings = {"batch_size": 16, "lr": 0.01, "prepare": lambda rows: torch.bernoulli(rows)}
    torch.manual_seed(1)
    fit(vae, x, objective=objective(), epochs=3, folder=tmp_path / "whole", **settings)
    torch.manual_seed(1)
    fit(twin, x, objective=objective(), epochs=1, folder=tmp_path / "parts", **settings)
    torch.manual_seed(9)
    fit(twin, x, objective=objective(), epochs=3, folder=tmp_path / "parts", resume=True, **settings)
    for (name, one), other in zip(vae.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_finding_the_number_of_plates_draws_nothing():
    vae, x = make(), binary()
    twin = copy.deepcopy(vae)
    for model, objective in ((vae, TraceEnum_ELBO()), (twin, TraceEnum_ELBO(max_plate_nesting=1))):
        torch.manual_seed(1)
        fit(model, x, objective=objective, epochs=1, batch_size=16)
    for (name, one), other in zip(vae.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_number_of_plates_from_yaml_is_a_whole_one():
    for objective in (TraceEnum_ELBO(max_plate_nesting=1.0), Trace_ELBO(2, 1.0, vectorize_particles=True)):
        fit(make(), binary(), objective=objective, epochs=1)
        assert isinstance(objective.max_plate_nesting, int)


@pytest.mark.parametrize("family", [discrete.OneHotCategorical, discrete.Bernoulli])
def test_a_captured_step_of_the_score_function_reports_what_it_does(float64, family):
    """Its history too: what Pyro's provenance wraps must not be recorded as a constant."""
    prior = priors.Bernoulli if family is discrete.Bernoulli else priors.OneHotCategorical
    vae, x = make(family, prior), binary()
    twin = copy.deepcopy(vae)
    torch.manual_seed(1)
    eager = fit(vae, x, objective=TraceGraph_ELBO(), epochs=3, batch_size=25, lr=0.01)
    torch.manual_seed(1)
    captured = fit(twin, x, objective=TraceGraph_ELBO(), epochs=3, batch_size=25, lr=0.01, compiled="replay")
    for name in ("objective", "elbo", "log_px", "kl"):
        assert captured[name] == pytest.approx(eager[name]), name
    assert len(set(eager["objective"])) == 3


def test_captured_enumeration_is_eager_enumeration(float64):
    vae, x = make(), binary()
    twin = copy.deepcopy(vae)
    torch.manual_seed(1)
    eager = fit(vae, x, objective=TraceEnum_ELBO(), epochs=2, batch_size=25)
    torch.manual_seed(1)
    captured = fit(twin, x, objective=TraceEnum_ELBO(), epochs=2, batch_size=25, compiled="replay")
    for name in ("objective", "elbo", "log_px", "kl"):
        assert captured[name] == pytest.approx(eager[name]), name


# The command line


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_from_end_to_end(elsewhere, capsys):
    words = "--prior OneHotCategorical --encoder OneHotCategorical --latent_dim 10 --objective TraceEnum_ELBO"
    main(["train", *QUICK, *words.split(), "--figures", "true", "--out", "run"])
    main(["resume", "run", "--epochs", "2"])
    capsys.readouterr()
    main(["evaluate", "run", "--num_particles", "300"])
    out = capsys.readouterr().out
    assert "log p(x), exact" in out and "(exact, n=359)" in out
    main(["sample", "run", "--num", "12"])
    main(["reconstruct", "run", "--index", "[1,3]"])
    pictures = sorted(path.name for path in Path("run/figures").iterdir())
    assert pictures == ["codes.png", "curves.png", "reconstructions.png", "samples.png"]
    assert "what each value of z decodes to" in Path("run/report.html").read_text(encoding="utf-8")
    estimates = {e["name"]: e for e in json.loads(Path("run/evaluation.json").read_text())["estimates"]}
    exact, sampled = estimates["log p(x), exact"], estimates["log p(x)"]
    assert exact["num_particles"] == 0 and abs(exact["mean"] - sampled["mean"]) < 0.5
    assert estimates["ELBO"]["mean"] < exact["mean"]
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and all(math.isfinite(row["kl"]) for row in rows)


@pytest.mark.parametrize(
    "words",
    [
        "--prior Bernoulli --encoder Bernoulli --objective TraceEnum_ELBO",
        "--prior Bernoulli --encoder Bernoulli --latent_dim 20 --objective TraceGraph_ELBO",
        "--prior RelaxedOneHotCategorical --encoder RelaxedOneHotCategorical --encoder.temperature 0.6",
        "--prior OneHotCategorical --encoder StraightThrough --encoder.temperature 0.6",
        "--prior VampPrior --prior.num_components 5 --encoder OneHotCategorical --objective TraceEnum_ELBO",
        "--objective Trace_ELBO --objective.num_particles 3",
    ],
)
def test_every_member_is_an_argument(elsewhere, words):
    main(["train", *QUICK, "--latent_dim", "3", "--out", "run", *words.split()])
    assert Path("run/evaluation.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--encoder OneHotCategorical", "choose the prior priors.OneHotCategorical"),
        ("--prior OneHotCategorical", "or the encoder discrete.OneHotCategorical"),
        ("--prior OneHotCategorical --encoder OneHotCategorical", "pyro.infer.TraceGraph_ELBO (score function)"),
        ("--prior OneHotCategorical --encoder RelaxedOneHotCategorical", "the prior relaxed_priors.RelaxedOneHot"),
        (
            "--prior Bernoulli --encoder Bernoulli --latent_dim 20 --objective TraceEnum_ELBO",
            "expected at most 4096 values of z to sum over, found 2^20",
        ),
    ],
)
def test_mistakes_are_one_line(elsewhere, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *QUICK, "--latent_dim", "3", "--out", "run", *words.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not Path("run").exists()


# Pictures


def test_code_usage_counts():
    codes, labels = torch.tensor([0, 2, 2, 2, 1]), torch.tensor([0, 1, 1, 0, 1])
    ax = latent_plots.code_usage(codes, ["a", "b", "c"], labels, ["cat", "dog"])
    heights = [[bar.get_height() for bar in container] for container in ax.containers]
    assert heights == [[1, 0, 1], [0, 1, 2]]
    assert [bar.get_y() for bar in ax.containers[1]] == [1, 0, 1]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["cat", "dog"]
    (only,) = latent_plots.code_usage(codes, ["a", "b", "c"]).containers
    assert [bar.get_height() for bar in only] == [1, 1, 3]


def test_code_pictures_are_named():
    ax = image_plots.code_pictures(torch.rand(13, 4, 3), [f"${i}" for i in range(13)])
    assert [text.get_text() for text in ax.texts] == [rf"\${i}" for i in range(13)]
    across, down = zip(*(text.get_position() for text in ax.texts), strict=True)
    assert len(set(down)) == 2 and across[0] == across[10] and across[1] > across[0] and down[10] > down[0]
    with pytest.raises(ValueError, match="names has 2 entries, expected 13"):
        image_plots.code_pictures(torch.rand(13, 4, 3), ["a", "b"])


class Pictures:
    """A data set of a few small pictures."""

    name, policy = "toys", "grey"

    def __init__(self, num: int = 30, labels: bool = True):
        self.test = torch.rand(num, 4, 3).round()
        self.test_labels = torch.arange(num) % 3 if labels else None


class Flat(nn.Sequential):
    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, 12), nn.Unflatten(-1, (4, 3)))


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(("family", "prior", "dim"), [("OneHotCategorical",) * 2 + (C,), ("Bernoulli",) * 2 + (8,)])
def test_figures_of_a_discrete_code(tmp_path, monkeypatch, family, prior, dim, labels):
    seen = {}
    monkeypatch.setattr(latent_plots, "code_usage", lambda *args: seen.update(usage=args) or draw_usage(*args))
    monkeypatch.setattr(image_plots, "code_pictures", lambda *args: seen.update(shown=args) or draw_codes(*args))
    encoder = getattr(discrete, family)(nn.Sequential(nn.Flatten(-2), nn.Linear(12, dim)))
    vae = VAE(getattr(priors, prior)(dim), Decoder(Flat(dim), likelihoods.Bernoulli(event_dim=2)), encoder)
    data = Pictures(labels=labels)
    with torch.no_grad():
        encoder.net[1].weight.mul_(30)
    files = figures.write_figures(vae, data, {}, tmp_path)
    assert [file.stem for file in files] == ["reconstructions", "samples", "codes"]
    index, names = seen["usage"][:2]
    pictures = seen["shown"][0]
    with torch.no_grad():
        modes = encoder(data.test).mode
        assert len(index) == len(data.test)
        for place, mode in zip(index.tolist(), modes, strict=True):
            expected = (
                str(int(mode.argmax()) + 1) if family == "OneHotCategorical" else "".join(map(str, mode.int().tolist()))
            )
            assert names[place] == expected
            torch.testing.assert_close(pictures[place], vae.decoder(mode).mean)
    if family == "OneHotCategorical":
        assert names == ["1", "2", "3", "4"]  # all classes, used or not
    else:
        counts = torch.bincount(index, minlength=len(names))
        assert (counts > 0).all() and (counts.diff() <= 0).all()  # the most frequent first
    assert (seen["usage"][2] is not None) == labels


draw_usage, draw_codes = latent_plots.code_usage, image_plots.code_pictures


def test_only_the_most_frequent_codes_are_shown():
    z = torch.eye(64)[torch.arange(100) % 64].flip(1)
    z[:, 0] = 1  # no longer one-hot
    codes, names, index = figures._codes(z)
    assert len(codes) == len(names) == 40 and index.max() == 40
    assert torch.bincount(index)[:-1].min() >= 1


def test_reconstruct_decodes_a_code_and_not_a_mean():
    vae, x = make(), binary(B)
    torch.testing.assert_close(vae.reconstruct(x), vae.decoder(vae.encoder(x).mode).mean)
    normal = VAE(StandardNormal(C), vae.decoder, DiagonalNormal(Mlp(E, 2 * C)))
    torch.testing.assert_close(normal.reconstruct(x), vae.decoder(normal.encoder(x).mean).mean)


def test_a_distribution_that_does_not_say_its_support_counts_as_continuous():
    class Silent(dist.Normal):
        @property
        def support(self):
            raise NotImplementedError

    assert not is_discrete(Silent(0.0, 1.0))
