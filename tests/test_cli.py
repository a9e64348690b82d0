"""The command line as a user meets it: five commands, their files, and mistakes told in one line."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import pyro_vae
from pyro_vae import runs
from pyro_vae.arguments import plain
from pyro_vae.checkpoints import alone_in
from pyro_vae.cli import COMMANDS, main
from pyro_vae.parts import PARTS

QUICK = ["--epochs", "1", "--batch_size", "512", "--eval_particles", "3", "--figures", "false"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One small run with everything, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "--out", str(folder), "--epochs", "2", "--batch_size", "512", "--eval_particles", "7"])
    return folder


def refused(capsys, *argv):
    """Run a command that must fail; its one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("pyro-vae: error: ")
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


# ------------------------------------------------------------------------------------------------- the run folder


def test_a_run_is_a_folder(trained):
    files = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    figures = {"curves", "reconstructions", "samples", "latent", "manifold", "kl_per_dimension"}
    assert files == {
        "config.yaml",
        "evaluation.json",
        "metrics.jsonl",
        "model.safetensors",
        "report.html",
        "state/latest.safetensors",
        *(f"figures/{name}.png" for name in figures),
    }
    for name in figures:
        with Image.open(trained / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 200
    evaluation = json.loads((trained / "evaluation.json").read_text(encoding="utf-8"))
    by_name = {estimate["name"]: estimate for estimate in evaluation["estimates"]}
    assert by_name["ELBO"]["num_particles"] == 7 and by_name["ELBO"]["num_examples"] == 359
    assert by_name["ELBO"]["mean"] < by_name["log p(x)"]["mean"] < 0
    assert by_name["ELBO"]["mean"] == pytest.approx(
        by_name["E log p(x|z)"]["mean"] - by_name["KL(q(z|x), p(z))"]["mean"]
    )
    assert all(e["standard_error"] > 0 and e["policy"].startswith("Digits") for e in evaluation["estimates"])


def test_an_epoch_is_a_line_and_the_end_says_what_next(capsys):
    main(["train", *QUICK, "--epochs", "2", "--out", "here"])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 2
    for word in ("objective", "ELBO", "log p(x|z)", "KL", "held-out ELBO", "±", "nats per example", " s"):
        assert word in lines[1]
    assert "wrote      here" in out and "pyro-vae evaluate here" in out
    assert "K=3, n=359" in out


def test_without_out_a_fresh_folder_each_time():
    main(["train", *QUICK])
    main(["train", *QUICK])
    assert len(list(Path("runs").iterdir())) == 2


def test_the_configuration_of_a_run_rebuilds_it(capsys):
    parts = ["--prior", "MixtureOfNormals", "--prior.num_components", "3", "--encoder", "FullNormal"]
    parts += ["--networks", "ConvPair", "--networks.channels", "[4,8]", "--networks.hidden", "16"]
    parts += ["--objective", "IWAE", "--objective.num_particles", "2", "--optimizer", "RMSprop"]
    main(["train", *QUICK, *parts, "--out", "a"])
    main(["train", "--config", "a/config.yaml", "--out", "b"])
    assert Path("a/config.yaml").read_text() == Path("b/config.yaml").read_text()
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    config = yaml.safe_load(Path("a/config.yaml").read_text())
    assert config["likelihood"] == {
        "class_path": "pyro_vae.likelihoods.Binomial",
        "init_args": {"total_count": 16},
    }


@pytest.mark.parametrize(
    "words",
    [
        "--prior VampPrior --prior.num_components 5",
        "--objective Beta --objective.beta 4",
        "--objective Trace_ELBO",
        "--objective pyro.infer.TraceMeanField_ELBO",
        "--objective TraceGraph_ELBO",
        "--optimizer torch.optim.AdamW --optimizer.weight_decay 0.1",
        "--likelihood Normal --likelihood.learn_scale false --start_at_data false --standardize false",
        "--networks.hidden [7,6,5] --latent_dim 3",
        "--encoder PlanarFlow --encoder.num_transforms 2 --prior FlowPrior --prior.num_transforms 2",
        "--likelihood Masked --likelihood.likelihood Binomial --likelihood.likelihood.total_count 16",
    ],
)
def test_every_part_is_an_argument(words):
    main(["train", *QUICK, "--out", "run", *words.split()])
    assert Path("run/evaluation.json").is_file()


def test_a_point_mass_claims_no_bound(capsys):
    main(["train", *QUICK, "--out", "run", "--encoder", "Delta", "--figures", "true"])
    out = capsys.readouterr().out
    assert "log p(x, z) at the code (no bound)" in out and "IWAE bound" not in out
    names = [e["name"] for e in json.loads(Path("run/evaluation.json").read_text(encoding="utf-8"))["estimates"]]
    assert "ELBO" not in names and "log p(x)" not in names


def test_classes_of_your_own(capsys):
    Path("mine.py").write_text(
        textwrap.dedent(
            """
            import torch
            from pyro.distributions import Laplace

            class MyPrior(torch.nn.Module):
                def __init__(self, latent_dim: int, width: float = 1.0):
                    super().__init__()
                    self.register_buffer("loc", torch.zeros(latent_dim))
                    self.width = width

                def forward(self):
                    return Laplace(self.loc, self.width).to_event(1)
            """
        )
    )
    main(["train", *QUICK, "--out", "run", "--prior", "mine.MyPrior", "--prior.width", "0.5"])
    assert yaml.safe_load(Path("run/config.yaml").read_text())["prior"]["init_args"] == {"width": 0.5}
    main(["evaluate", "run", "--num_particles", "2"])
    assert "p(z) MyPrior" in capsys.readouterr().out


def test_a_likelihood_of_your_own_with_two_outputs_for_each_number(capsys):
    text = """
        import torch
        from pyro.distributions import Laplace

        class Wide(torch.nn.Module):
            num_outputs = 2

            def __init__(self, event_dim: int = 1):
                super().__init__()
                self.event_dim = event_dim

            def forward(self, h):
                loc, log_scale = h.chunk(2, -self.event_dim)
                return Laplace(loc, log_scale.exp()).to_event(self.event_dim)

        class Broken(Wide):
            def forward(self, h):
                return Laplace(loc, 1.0)

        class Odd(Wide):
            def forward(self, h):
                a, b, c = h.chunk(2, -self.event_dim)
        """
    Path("wide.py").write_text(textwrap.dedent(text))
    main(["train", *QUICK, "--out", "run", "--likelihood", "wide.Wide"])
    assert "p(x|z) Wide" in capsys.readouterr().out
    line = refused(capsys, "train", *QUICK, "--likelihood", "wide.Odd")
    assert f"expected 3, got 2) (in {Path('wide.py').resolve()}, line 22)" in line
    line = refused(capsys, "train", *QUICK, "--likelihood", "wide.Broken")
    assert f"NameError: name 'loc' is not defined (in {Path('wide.py').resolve()}, line 18)" in line
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------- other commands


def test_evaluate_prints_one_json_object_and_trains_nothing(trained, capsys):
    before = (trained / "model.safetensors").read_bytes()
    outputs = []
    for _ in range(2):
        main(["evaluate", str(trained), "--num_particles", "5", "--json"])
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0] == outputs[1]
    assert outputs[0]["estimates"][0]["num_particles"] == 5
    assert outputs[0] == json.loads((trained / "evaluation.json").read_text(encoding="utf-8"))
    assert (trained / "model.safetensors").read_bytes() == before
    main(["evaluate", str(trained), "--num_particles", "5"])
    assert "log p(x)" in capsys.readouterr().out


def test_sample_and_reconstruct_write_pictures_and_arrays(trained):
    main(["sample", str(trained), "--num", "12", "--out", "s.png"])
    main(["sample", str(trained), "--num", "12", "--out", "s.npy", "--mean", "false"])
    draws = np.load("s.npy")
    assert draws.shape == (12, 1, 8, 8) and set(np.unique(draws)) <= set(range(17))
    main(["reconstruct", str(trained), "--index", "3", "--out", "r.npy"])
    assert np.load("r.npy").shape == (1, 1, 8, 8)
    main(["reconstruct", str(trained), "--index", "[1,3,7]", "--out", "r.npy"])
    main(["reconstruct", str(trained)])
    assert np.load("r.npy").shape == (3, 1, 8, 8)
    for picture in ("s.png", trained / "reconstructions.png"):
        with Image.open(picture) as image:
            assert image.size[0] > 100
    os.remove(trained / "reconstructions.png")


def test_resume_goes_on_bit_for_bit():
    main(["train", *QUICK, "--epochs", "4", "--out", "straight"])
    main(["train", *QUICK, "--epochs", "2", "--out", "stopped"])
    main(["resume", "stopped", "--epochs", "4"])
    assert Path("straight/model.safetensors").read_bytes() == Path("stopped/model.safetensors").read_bytes()
    assert len(Path("stopped/metrics.jsonl").read_text().splitlines()) == 4
    assert yaml.safe_load(Path("stopped/config.yaml").read_text())["epochs"] == 4


# ------------------------------------------------------------------------------------------------- data of one's own


def test_a_table(capsys):
    x = np.random.default_rng(0).normal(size=(60, 3)) @ np.array([[1, 2, 0], [0, 1, 1], [0, 0, 0.5]])
    np.savetxt("t.csv", x, delimiter=",", header="a,b,c", comments="")
    main(["train", *QUICK, "--figures", "true", "--out", "run", "--data", "Table", "--data.path", "t.csv"])
    assert "HeteroscedasticNormal" in capsys.readouterr().out
    main(["sample", "run", "--num", "4"])
    lines = Path("run/samples.csv").read_text().splitlines()
    assert lines[0] == "a,b,c" and len(lines) == 5
    main(["sample", "run", "--num", "4", "--out", "samples.npy"])
    assert np.load("samples.npy").shape == (4, 3)


def test_a_table_of_mixed_columns_with_gaps(capsys):
    """Text becomes categories, empty cells are missing, and what is written has the words of the file."""
    rng = np.random.default_rng(0)
    rows = [
        [f"{z:.2f}", "Rome" if z > 0 else rng.choice(["Oslo", "Bonn"]), rng.poisson(2)] for z in rng.normal(size=80)
    ]
    for row in rows[::7]:
        row[1] = ""
    Path("t.csv").write_text("size,city,visits\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    main(["train", *QUICK, "--figures", "true", "--out", "run", "--data", "Table", "--data.path", "t.csv"])
    out = capsys.readouterr().out
    assert "p(x|z) Masked(MixedColumns)" in out and "categorical: city (3); count: visits" in out
    assert "12 of 240 cells missing (city 12)" in out
    config = yaml.safe_load(Path("run/config.yaml").read_text())["likelihood"]
    assert config["class_path"].endswith("Masked")
    main(["evaluate", "run", "--num_particles", "7"])
    assert "log p(x)" in capsys.readouterr().out
    main(["reconstruct", "run", "--num", "5"])
    lines = [line.split(",") for line in Path("run/reconstructions.csv").read_text().splitlines()]
    assert lines[0] == ["size", "city", "visits"] and len(lines) == 6
    assert {line[1] for line in lines[1:]} <= {"Rome", "Oslo", "Bonn"} and all(line[2].isdigit() for line in lines[1:])
    main(["train", "--config", "run/config.yaml", "--out", "again"])
    assert Path("again/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()
    words = ["--data", "Table", "--data.path", "t.csv", "--likelihood", "HeteroscedasticNormal"]
    message = refused(capsys, "train", *QUICK, "--out", "no", *words)
    assert "values that are NaN" in message and "--likelihood Masked --likelihood.likelihood CLASS" in message
    words[-1:] = ["Masked", "--likelihood.likelihood", "HeteroscedasticNormal"]
    main(["train", *QUICK, "--out", "yes", *words])


def test_missing_cells_are_imputed_and_all_others_kept(capsys):
    rng = np.random.default_rng(0)
    rows = [
        [f"{z:.12f}", "hot" if z > 0 else "cold", str(rng.poisson(3)), f"id{i}"]
        for i, z in enumerate(rng.normal(size=90))
    ]
    gaps = [(i, j) for i in range(len(rows)) for j in range(3) if rng.random() < 0.2 and i > 4]
    for i, j in gaps:
        rows[i][j] = ""
    text = "heat,word,visits,name\n" + "".join(",".join(row) + "\n" for row in rows)
    Path("t.csv").write_text(text)
    words = ["--data", "Table", "--data.path", "t.csv", "--data.label", "name"]
    main(["train", *QUICK, "--epochs", "300", "--lr", "0.01", "--out", "run", *words])
    main(["impute", "run", "--num_particles", "50"])
    assert f"filled     {len(gaps)} of 270 cells with means, K=50" in capsys.readouterr().out
    filled = [line.split(",") for line in Path("run/imputed.csv").read_text().splitlines()]
    assert filled[0] == ["heat", "word", "visits", "name"] and len(filled) == 91
    for i, (old, new) in enumerate(zip(rows, filled[1:], strict=True)):
        assert all(new) and all(b == a for j, (a, b) in enumerate(zip(old, new, strict=True)) if (i, j) not in gaps)
    assert {row[1] for row in filled[1:]} == {"hot", "cold"} and all(row[2].isdigit() for row in filled[1:])
    known = [row for row, old in zip(filled[1:], rows, strict=True) if not old[1] and old[0]]
    assert np.mean([(float(row[0]) > 0) == (row[1] == "hot") for row in known]) > 0.8  # the heat tells the word
    vae, data = runs.load("run")
    again = pyro_vae.impute(vae, data.test, 50, seed=1)
    line = data.csv(again).splitlines()[1].split(",")
    assert line[2] in {row[2] for row in filled[1:]} and not again.isnan().any()
    main(["train", *QUICK, "--out", "digits"])
    assert "expected a run on a table (--data Table), found Digits" in refused(capsys, "impute", "digits")
    with pytest.raises(ValueError, match="found none in nowhere"):
        runs.load("nowhere")


def test_levels_train_and_report_bits_per_dimension(capsys):
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, size=(40, 4, 4), dtype=np.uint8))
    data = ["--data", "ArrayFile", "--data.path", "x.npy", "--data.binarization", "levels"]
    for i, words in enumerate(([], ["--likelihood", "Categorical"], ["--likelihood", "DiscretizedLogisticMixture"])):
        main(["train", *QUICK, "--out", str(i), *data, *words])
        bits = float(re.search(r"([\d.]+) ± [\d.]+ bits per dimension", capsys.readouterr().out)[1])
        nats = json.loads(Path(f"{i}/evaluation.json").read_text())["estimates"]
        assert abs(bits * 16 * np.log(2) + next(e["mean"] for e in nats if e["name"] == "log p(x)")) < 1
        assert bits > 7.5  # uniform bytes cost 8
    main(["train", *QUICK, "--out", "density", *data, "--likelihood", "Normal"])
    assert "bits per dimension" not in capsys.readouterr().out


def test_a_comparison_claims_no_evidence_anywhere(capsys):
    Path("features.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(1, 3, 3), nn.ReLU())\n\n\n"
        "def mine(x, x_hat):\n    return (x - x_hat).abs().flatten(1).sum(1)\n"
    )
    says = "no normalised likelihood: no evidence can be claimed"
    score = ["--likelihood", "Comparison", "--likelihood.bounded", "false"]
    perceptual = ["--likelihood.distance", "pyro_vae.comparisons.Perceptual"]
    perceptual += ["--likelihood.distance.network", "features.Net", "--likelihood.distance.layers", '["0"]']
    for i, words in enumerate(([], ["--likelihood.distance", "features.mine"], perceptual)):
        main(["train", *QUICK, "--out", f"run{i}", *score, *words])
        out = capsys.readouterr().out
        assert out.count(says) >= 3 and "  ELBO  " not in out and "log p(x) " not in out
        assert says in Path(f"run{i}/report.html").read_text()
        evaluation = json.loads(Path(f"run{i}/evaluation.json").read_text())
        assert says in evaluation["policy"] and evaluation["estimates"][0]["caveat"] == says
        main(["evaluate", f"run{i}", "--num_particles", "7"])
        assert says in capsys.readouterr().out
    assert f"found a score ({says}): use --mean true" in refused(capsys, "sample", "run0", "--mean", "false")
    main(["sample", "run0", "--num", "4"])


def test_arrays_and_folders_of_images():
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.integers(0, 2, size=(40, 5)).astype(np.float32))
    main(["train", *QUICK, "--out", "a", "--data", "ArrayFile", "--data.path", "x.npy"])
    for i in range(12):
        Path("pictures").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, size=(9, 12), dtype=np.uint8)).save(f"pictures/{i}.png")
    words = ["--data", "ImageFolder", "--data.root", "pictures", "--data.size", "8", "--data.binarization", "dynamic"]
    main(["train", *QUICK, "--out", "b", *words])
    config = yaml.safe_load(Path("b/config.yaml").read_text())
    assert config["likelihood"]["class_path"].endswith("Bernoulli")


def test_mnist(real_data, capsys):
    words = ["--data", "MNIST", "--data.root", str(real_data)]
    main(["train", *QUICK, "--batch_size", "5000", "--out", "run", *words, "--networks.hidden", "[8]"])
    out = capsys.readouterr().out
    assert "MNIST, dynamic binarisation (test binarised once, seed 0), 60000 train / 10000 test" in out
    assert "n=10000" in out


def test_grey_pixels_under_bernoulli_are_refused(real_data, capsys):
    words = ["--data", "FashionMNIST", "--data.root", real_data, "--data.binarization", "grey"]
    line = refused(capsys, "train", *QUICK, "--out", "run", *words, "--likelihood", "Bernoulli")
    assert "x has values outside {0, 1}" in line and "binarise it" in line
    assert not Path("run").exists()


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fly", "unknown command 'fly': choose one of train, evaluate, sample, reconstruct, impute"),
        ("train --prior Nix", "unknown prior 'Nix': choose one of Bernoulli, Dirichlet, FlowPrior"),
        ("train --prior nix.Nix", "cannot import prior 'nix.Nix'"),
        ("train --prior math.pi", "expected prior 'math.pi' to be a class, found float"),
        ("train --epochs ten", "--epochs: expected int, found ten."),
        ("train --epochs 0", "--epochs: expected a number >= 1, found 0."),
        ("train --eval_particles 0", "--eval_particles: expected a number >= 1, found 0."),
        ("train --seed 99999999999999999999999", "--seed: expected a number from 0 to"),
        ("train --likelihood Binomial", "--likelihood needs --likelihood.total_count: give it"),
        (
            "train --data MNIST --data.binarization foo",
            "--data.binarization: expected Literal['grey', 'static', 'dynamic', 'levels']",
        ),
        ("train --networks.activation torch.nn.Foo", "--networks: module 'torch.nn' has no attribute 'Foo'"),
        ("train --objective Trace_MMD", "pyro.infer.Trace_MMD needs the Python object kernel"),
        (
            "train --objective ReweightedWakeSleep --objective.num_particles 1",
            "cannot make the objective ReweightedWakeSleep (Reweighted Wake Sleep needs",
        ),
        ("train --optimizer SparseAdam", "training with ELBO(num_particles=1) and torch.optim.SparseAdam failed"),
        ("train --lr 1e6 --epochs 3", "lower the learning rate (lr=1e+06"),
        ("train --out list.yaml", "expected --out to name a folder, found the file list.yaml"),
        ("train --data ArrayFile --data.path bits.npy --likelihood Normal", "x is binary"),
        (
            "reconstruct nowhere --index a",
            "--index: expected int or list[int], found a: see pyro-vae reconstruct --help",
        ),
        ("reconstruct nowhere --index [1,x]", "--index: expected int or list[int], found [1, 'x']"),
        ("tain", "unknown command 'tain' (did you mean train?): choose one of"),
        ("train --prior mixtureofnormal", "'mixtureofnormal' (did you mean MixtureOfNormals?): choose one of"),
        ("train --preset seed01", "found 'seed01'. (did you mean seed001?)"),
        (
            "train --prior MixtureOfNormals --prior.num_component 3",
            "--prior.num_component is no argument of MixtureOfNormals (did you mean num_components?): it has num_comp",
        ),
        (
            "train --prior SphereUniform --prior.radius 3",
            "--prior.radius is no argument of SphereUniform: it has none.",
        ),
        ("train --objective Beta --objective.beta Lin", "--objective.beta: expected float or Schedule, found Lin: see"),
        ("train --latentdim 3", "--latentdim 3 is no argument (did you mean --latent_dim?): see pyro-vae train --help"),
        ("train --lr inf", "--lr: expected a finite number, found inf."),
        ("train --latent_dim 0", "--latent_dim: expected a number >= 1, found 0"),
        ("train --lr -1", "--lr: expected a number > 0, found -1"),
        ("train --prior.num_components 3", "--prior.num_components is no argument of the prior chosen"),
        ("train --prior MixtureOfNormals --prior.num_components x", "num_components"),
        ("train --nonsense 3", "--nonsense"),
        ("train --config none.yaml", "cannot read the configuration none.yaml"),
        ("train --config list.yaml", "expected list.yaml to hold a mapping"),
        ("train --config odd.yaml", "odd"),
        ("train --likelihood Bernoulli", "x has values outside {0, 1} (found"),
        ("train --networks ConvPair --networks.channels [4,4,4,4]", "H and W multiples of 16, found (1, 8, 8)"),
        ("train --data MNIST --data.root nowhere --data.download false", "train-images-idx3-ubyte"),
        ("train --data Table --data.path none.csv", "none.csv"),
        ("train --data Table", "--data needs --data.path"),
        ("evaluate nowhere", "expected a run folder with a config.yaml, found none in nowhere"),
        ("evaluate", "run"),
        ("resume nowhere", "expected a run folder"),
        ("sample nowhere --num x", "--num: expected int, found x"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, expected):
    Path("list.yaml").write_text("- 1\n")
    Path("odd.yaml").write_text("odd: 1\n")
    np.save("bits.npy", np.eye(8, dtype=np.float32))
    line = refused(capsys, *words.split()[:1], *(QUICK if words.startswith("train") else []), *words.split()[1:])
    assert expected in line
    assert not Path("runs").exists()


def test_mistakes_about_an_existing_run(trained, capsys, tmp_path):
    assert "already holds a run" in refused(capsys, "train", "--out", trained)
    assert "expected indices 0..358" in refused(capsys, "reconstruct", trained, "--index", "[359]")
    assert "--num: expected a number >= 1" in refused(capsys, "sample", trained, "--num", "0")
    assert "expected --out to end in .png or .npy" in refused(capsys, "sample", trained, "--out", "x.gif")
    assert "expected num_particles to be an integer >= 1" in refused(
        capsys, "evaluate", trained, "--num_particles", "0"
    )
    if not torch.cuda.is_available():
        assert "expected a CUDA device" in refused(capsys, "evaluate", trained, "--device", "cuda")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    assert f"none: train a first epoch with pyro-vae resume {damaged}" in refused(capsys, "evaluate", damaged)
    for nothing in (tmp_path, tmp_path / "none"):
        assert f"found none in {nothing}: the latest there are {damaged}." in refused(capsys, "evaluate", nothing)
    (damaged / "model.safetensors").write_bytes(b"nonsense")
    assert "not a readable safetensors file" in refused(capsys, "evaluate", damaged)


def test_a_refused_run_leaves_nothing_behind(capsys):
    refused(capsys, "train", *QUICK, "--likelihood", "Bernoulli", "--out", "run")
    assert not Path("run").exists()


# ------------------------------------------------------------------------------------------------- help


def test_a_run_stopped_in_its_first_epoch_is_resumed_from_its_start(monkeypatch, capsys):
    main(["train", *QUICK, "--out", "straight"])

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("pyro_vae.terms.collect", stop)
        main(["train", *QUICK, "--out", "stopped"])
    assert stopped.value.code == 130
    assert "go on with: pyro-vae resume stopped" in capsys.readouterr().err
    main(["resume", "stopped"])
    assert Path("straight/model.safetensors").read_bytes() == Path("stopped/model.safetensors").read_bytes()


def test_two_processes_do_not_train_in_one_folder(capsys):
    main(["train", *QUICK, "--out", "run"])
    with alone_in(Path("run")):
        assert "expected no other process that trains in run" in refused(capsys, "resume", "run", "--epochs", "2")
    with alone_in(Path("new")):
        assert "expected no other process that trains in new" in refused(capsys, "train", *QUICK, "--out", "new")
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 1 and not list(Path("new").iterdir())


def test_a_run_whose_state_was_lost_is_not_begun_anew(capsys):
    main(["train", *QUICK, "--out", "run"])
    before = Path("run/model.safetensors").read_bytes()
    Path("run/state/latest.safetensors").unlink()
    line = refused(capsys, "resume", "run", "--epochs", "2")
    assert "expected run/state/latest.safetensors beside run/metrics.jsonl, found none: restore it" in line
    assert Path("run/model.safetensors").read_bytes() == before


def test_a_run_is_not_shortened_or_changed_by_resuming(capsys):
    main(["train", *QUICK, "--epochs", "3", "--out", "run"])
    assert "has 3 epochs behind it" in refused(capsys, "resume", "run", "--epochs", "2")
    text = Path("run/config.yaml").read_text()
    Path("run/config.yaml").write_text(text.replace("lr: 0.001", "lr: 0.5"))
    assert "lr=0.001" in refused(capsys, "resume", "run", "--epochs", "4")


def test_a_run_is_found_from_any_folder(capsys, monkeypatch):
    np.savetxt("t.csv", np.random.default_rng(0).normal(size=(40, 3)), delimiter=",", header="a,b,c", comments="")
    main(["train", *QUICK, "--out", "run", "--data", "Table", "--data.path", "t.csv"])
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    main(["evaluate", "../run", "--num_particles", "2"])


def test_help(capsys):
    for argv in ([], ["--help"], *([name, "--help"] for name in COMMANDS), ["train", "--prior.help", "VampPrior"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        out = capsys.readouterr().out
        assert stop.value.code == 0 and "usage" in out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for part in PARTS:
        assert f"--{part}.help" in out
    for words in ("The prior p(z)", "pyro_vae.VampPrior", "number of latent dimensions D", "pyro_vae.files.Table"):
        assert words in out


def test_messages_made_plain():
    text = "Parser key \"epochs\": Expected a <class 'int'>. Got value: ten"
    assert plain(text) == "--epochs: expected int, found ten."
    assert plain("something else\n  over two lines") == "something else over two lines"


def test_as_a_module_and_with_the_exit_code(monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out.strip().count(".") == 2
    monkeypatch.setenv("PYTHONPATH", str(Path(pyro_vae.__file__).parents[1]))
    command = [sys.executable, "-m", "pyro_vae", "evaluate", "nowhere"]
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
