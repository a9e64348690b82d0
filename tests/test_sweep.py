"""Sweeps: which runs they are, what is kept, and the numbers by hand."""

import json
import math
from pathlib import Path

import pytest

from pyro_vae.cli import main
from pyro_vae.parts import UsageError
from pyro_vae.sweep import Cell, Run, collect, plan

QUICK = ["--epochs", "2", "--batch_size", "512", "--eval_particles", "3", "--figures", "false"]
BETA = ["sweep", "--vary", "objective.beta=0.5,4", "--objective", "Beta", *QUICK, "--out", "out"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1
    return captured.err


def write_run(folder, elbo, kl=1.0, policy="p"):
    folder.mkdir(parents=True)
    names = {"ELBO": elbo, "E log p(x|z)": elbo + kl, "KL(q(z|x), p(z))": kl}
    rows = [{"name": name, "mean": value, "standard_error": 0.5, "policy": policy} for name, value in names.items()]
    result = {"policy": policy, "estimates": rows, "active_units": 2}
    (folder / "evaluation.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"seconds": 1.5}\n{"seconds": 2.5}\n', encoding="utf-8")


def test_the_runs_of_a_plan():
    runs = plan(["latent_dim=2,5", "prior=StandardNormal"], "0,7", ["--epochs", "3"], Path("out"))
    assert [(run.label, run.seed) for run in runs] == [
        (f"latent_dim={d} prior=StandardNormal", seed) for d in (2, 5) for seed in (0, 7)
    ]
    words = ("--epochs", "3", "--latent_dim=2", "--prior=StandardNormal", "--seed=0")
    assert runs[0].words == (*words, f"--out={runs[0].folder}")
    assert runs[0].folder == Path("out/latent_dim=2_prior=StandardNormal/seed=0")
    assert [run.seed for run in plan(["lr=1"], "3", [], Path())] == [0, 1, 2]
    assert [run.seed for run in plan(["lr=1"], "3,", [], Path())] == [3]
    lists = plan(["networks.hidden=[64,32],[8]"], "1", [], Path())
    assert [run.label for run in lists] == ["networks.hidden=[64,32]", "networks.hidden=[8]"]


@pytest.mark.parametrize(
    ("vary", "seeds", "words", "message"),
    [
        ([], "1", [], "found none"),
        (["lr"], "1", [], "expected NAME=VALUE"),
        (["lr=1,,2"], "1", [], "expected NAME=VALUE"),
        (["lr=1,1"], "1", [], "each value once"),
        (["lr=1", "lr=2"], "1", [], "given twice"),
        (["lr=1"], "1", ["--lr", "2"], "given twice"),
        (["seed=1,2"], "1", [], "use --seeds"),
        (["lr=1"], "1", ["--seed=3"], "--seeds 0,1,2 in its place"),
        (["lr=1"], "x", [], "--seeds: expected"),
        (["lr=1"], "0", [], "expected one or more"),
    ],
)
def test_plans_that_make_no_sense(vary, seeds, words, message):
    with pytest.raises(UsageError, match=message):
        plan(vary, seeds, words, Path("out"))


def test_a_cell_by_hand():
    a, b = Cell({0: 1.0, 1: 3.0, 2: 8.0}), Cell({0: 0.0, 1: 1.0, 2: 5.0, 3: 100.0})
    assert a.mean == 4 and a.standard_error == pytest.approx(math.sqrt(13 / 3))
    less = a.less(b)
    assert less.values == {0: 1.0, 1: 2.0, 2: 3.0} and less.standard_error == pytest.approx(1 / math.sqrt(3))
    assert Cell({0: 1.0}, 0.25).standard_error == 0.25 and math.isnan(Cell({0: 1.0}).standard_error)
    assert str(Cell({0: 1.0}, 0.25)) == "1.00 ± 0.25" and str(Cell({})) == "-"


def runs_of(numbers, policies=("p", "p")):
    runs = []
    for (value, by_seed), policy in zip(numbers.items(), policies, strict=True):
        for seed, elbo in by_seed.items():
            folder = Path(f"out/b={value}/seed={seed}")
            write_run(folder, elbo, kl=float(value), policy=policy)
            runs.append(Run(f"b={value}", seed, folder, ()))
    return runs


def test_the_table_has_means_errors_and_paired_differences():
    # A seed moves both values alike: the differences are far more certain than the means.
    runs = runs_of({"1": {0: -10.0, 1: -20.0}, "4": {0: -12.0, 1: -22.1}})
    found = collect(runs, {})
    elbo = found.cells["ELBO"]
    assert elbo["b=1"].mean == -15 and elbo["b=1"].standard_error == pytest.approx(5)
    less = found.differences["ELBO"]["b=4"]
    assert less.mean == pytest.approx(-2.05) and less.standard_error == pytest.approx(0.05)
    assert found.cells["seconds"]["b=1"].mean == 4 and list(found.cells)[-1] == "seconds"
    text = found.markdown()
    assert "| ELBO              | -15.0 ± 5.0 | -17.1 ± 5.1 |" in text or "-15.0 ± 5.0" in text
    assert "Less `b=1`, paired by seed" in text and "-2.050 ± 0.050" in text and "over 2 seeds" in text
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["values"]["b=4"]["ELBO"]["by_seed"] == {"0": -12.0, "1": -22.1}
    assert summary["differences"]["values"]["b=4"]["ELBO"]["mean"] == pytest.approx(-2.05)
    points = found.figures()["rate_distortion"]
    means = points.lines[-1].get_xydata().tolist()
    assert means == [[1.0, 14.0], [4.0, pytest.approx(13.05)]]  # rate 1 and 4, distortion -(ELBO + KL)
    assert not list(Path("out").glob("*.png"))
    written = {path.name for path in found.write(Path("out"))}
    assert written == {"table.md", "sweep.json", "sweep.png", "rate_distortion.png"}


def test_the_table_says_how_many_draws_are_behind_log_evidence_and_if_they_are_enough():
    runs = runs_of({"1": {0: -10.0, 1: -20.0}, "4": {0: -12.0, 1: -22.1}})
    for run, untrusted in zip(runs, (None, 3, 5, None), strict=True):
        file = run.folder / "evaluation.json"
        content = json.loads(file.read_text())
        estimate = {**content["estimates"][0], "name": "log p(x)", "num_particles": 30, "num_examples": 9}
        content["estimates"].append(estimate | ({"untrusted_examples": untrusted} if untrusted else {}))
        file.write_text(json.dumps(content))
    found = collect(runs, {})
    line = "IWAE bound, from below, K=30; K too small for up to 5 of 9 examples of a run"
    assert f"- log p(x): {line}\n" in found.markdown() and found.summary()["draws"] == [line]


def test_numbers_about_different_data_are_not_compared():
    found = collect(runs_of({"1": {0: -10.0}, "4": {0: -12.0}}, ("p", "other")), {})
    assert found.differences == {} and "cannot be compared" in found.markdown()
    assert list(found.figures()) == ["sweep"]


def test_failed_runs_are_counted_and_one_seed_has_no_error_of_its_difference():
    runs = runs_of({"1": {0: -10.0, 1: -11.0}, "4": {0: -12.0, 1: -13.0}})
    found = collect(runs, {runs[3]: "diverged"})
    assert "(1 of 2)" in found.markdown() and "failed: b=4 seed=1: diverged" in found.markdown()
    one = collect([run for run in runs if run.seed == 0], {})
    assert "one seed: without standard errors" in one.markdown() and "one seed says nothing" in one.markdown()
    assert one.summary()["differences"]["values"]["b=4"]["ELBO"]["standard_error"] is None


def test_an_evaluation_that_is_not_readable_is_named():
    (run,) = runs_of({"1": {0: -10.0}}, ("p",))
    (run.folder / "evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"cannot read the numbers of out.b=1.seed=0"):
        collect([run], {})


def test_a_sweep_trains_keeps_and_grows(capsys, monkeypatch):
    main([*BETA, "--seeds", "1", "--measure", "representation", "--json"])
    first = json.loads(capsys.readouterr().out)
    folder = Path("out/objective.beta=0.5/seed=0")
    kl = {label: row["KL(q(z|x), p(z))"]["mean"] for label, row in first["values"].items()}
    assert kl["objective.beta=0.5"] > kl["objective.beta=4"]
    assert 0 < first["values"]["objective.beta=4"]["linear probe of z"]["mean"] <= 1
    assert (folder / "model.safetensors").exists() and "epoch 2/2" in (folder / "log.txt").read_text(encoding="utf-8")
    assert json.loads(Path("out/sweep.json").read_text(encoding="utf-8")) == first
    before = (folder / "evaluation.json").stat().st_mtime_ns

    # Stopped after its training: it goes on; the other is kept, and a second seed is new.
    Path("out/objective.beta=4/seed=0/evaluation.json").unlink()
    main([*BETA, "--seeds", "2"])
    out = capsys.readouterr().out
    assert (folder / "evaluation.json").stat().st_mtime_ns == before
    assert out.count("(kept)") == 1 and "± standard error over 2 seeds" in out
    second = json.loads(Path("out/sweep.json").read_text(encoding="utf-8"))
    for label in first["values"]:
        assert second["values"][label]["ELBO"]["by_seed"]["0"] == pytest.approx(first["values"][label]["ELBO"]["mean"])

    message = refused(capsys, *BETA, "--seeds", "1", "--latent_dim", "3")
    assert "made otherwise ('latent_dim: 2' there, 'latent_dim: 3' here)" in message


def test_mistakes_are_told_in_one_line_and_leave_nothing(capsys):
    assert "found none" in refused(capsys, "sweep", *QUICK)
    assert "--measure: expected some of" in refused(capsys, *BETA, "--measure", "beauty")
    assert "unknown prior 'Nix'" in refused(capsys, "sweep", "--vary", "prior=Nix", "--out", "out")
    assert "--lr: expected float" in refused(capsys, "sweep", "--vary", "lr=1,x", "--out", "out")
    message = refused(capsys, "sweep", "--vary", "epochs=0,-1", "--seeds", "1", "--out", "out")
    assert "no run of the sweep succeeded; the first: --epochs: expected a number >= 1" in message
    assert not Path("out").exists()
    Path("file").write_text("", encoding="utf-8")
    assert "found the file" in refused(capsys, "sweep", "--vary", "lr=1", "--out", "file")


def test_a_run_that_diverges_does_not_stop_the_others(capsys):
    words = ["sweep", "--vary", "lr=1e-3,1e30", "--seeds", "1", *QUICK, "--out", "out"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "lr=1e30 seed=0: failed" in out and "ELBO" in out
    assert Path("out/table.md").exists()


def test_help_tells_both_kinds_of_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--vary" in out and "--seeds" in out and "--measure" in out and "pyro-vae train --help" in out
