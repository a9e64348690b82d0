"""The text is part of the product: the README's code runs, and so does every example."""

import re
import runpy
import sys
from pathlib import Path

import pyro.infer
import pytest

import pyro_vae

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


def test_the_two_commands_stand_in_the_readme():
    lines = README.splitlines()
    assert "pip install . && pyro-vae train" in lines
    assert "pip install -e '.[test]' && pytest" in lines


@pytest.mark.parametrize("block", range(1, 4))
def test_readme_code_runs(block, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 4  # the first is an excerpt of vae.py
    exec(compile(blocks[block], f"README.md, block {block}", "exec"), {"__name__": "readme"})
    if block == 1:
        assert re.search(r"-\d+\.\d+ ± \d+\.\d+ nats per example \(K=1000, n=359\)", capsys.readouterr().out)
    if block == 3:
        assert re.search(
            r"(compiled with its optimiser|replayed), \d+ operations; \de-\d+ from eager Pyro", capsys.readouterr().out
        )


def test_the_readme_names_things_that_exist():
    for name in re.findall(r"\]\(((?:examples|pyro_vae|docs)/[\w.]+)\)", README):
        assert (ROOT / name).is_file(), name
    table = README.split("## What there is")[1].split("<details>")[0]
    for name in re.findall(r"`([A-Za-z_.]+)`", table):
        owners = [pyro_vae, pyro_vae.datasets, pyro_vae.files, pyro.infer]
        value = None
        for owner in owners:
            value = owner
            for part in name.removeprefix("pyro.infer.").split("."):
                value = getattr(value, part, None)
            if value is not None:
                break
        assert value is not None, name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(path, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke"])
    runpy.run_path(str(path), run_name="__main__")
    assert "nats per example" in capsys.readouterr().out or path.stem.startswith("07")


def test_no_module_is_imported_from_below():
    """The order of reading is the order of the mathematics: a module imports only from modules above it."""
    order = [
        "contracts",
        "supports",
        "dry_run",
        "simplex",
        "spherical",
        "priors",
        "flows",
        "splines",
        "flow_priors",
        "relaxed_priors",
        "reals",
        "proportions",
        "masked",
        "pixels",
        "counts",
        "tables",
        "comparisons",
        "likelihoods",
        "layers",
        "networks",
        "initialization",
        "pairs",
        "decoders",
        "encoders",
        "spherical_encoders",
        "flow_encoders",
        "orthogonal_flows",
        "discrete",
        "vae",
        "architecture",
        "terms",
        "analytic",
        "aggregate_terms",
        "missing",
        "schedules",
        "objectives",
        "routes",
        "importance",
        "gradients",
        "gradient_variance",
        "printed_loss",
        "wrong_losses",
        "regularized",
        "aggregate_objectives",
        "memory",
        "traceable",
        "capture",
        "optimizers",
        "cuda_graphs",
        "compiling",
        "programs",
        "fast_svi",
        "replays",
        "passes",
        "checkpoints",
        "tails",
        "uncertainty",
        "estimates",
        "ledger",
        "parallel",
        "streaming",
        "precision",
        "steps",
        "training",
        "exact",
        "annealing",
        "aggregate",
        "gaps",
        "calibration",
        "diagnostics",
        "geometry",
        "representation",
        "anomalies",
        "clouds",
        "disentanglement",
        "sample_quality",
        "data_contract",
        "datasets",
        "sprites",
        "columns",
        "files",
        "mapped",
        "presets",
        "plot_style",
        "curve_plots",
        "image_plots",
        "table_plots",
        "latent_plots",
        "evaluation_plots",
        "sweep_plots",
        "representation_plots",
        "wrong_loss_lab",
        "wrong_loss_plots",
        "html_page",
        "figures",
        "report",
        "evaluation",
        "density_checks",
        "gradient_checks",
        "testing",
        "worlds",
        "trained_worlds",
        "derivation_steps",
        "derivation",
        "derivation_report",
        "workloads",
        "bench",
        "bench_evaluation",
        "bench_epoch",
        "parts",
        "arguments",
        "configuration",
        "catalogue",
        "sweep",
        "command_numbers",
        "command_training",
        "command_evaluation",
        "command_pictures",
        "command_imputation",
        "runs",
        "command_sweep",
        "command_laboratory",
        "cli",
    ]
    files = {path.stem for path in Path(pyro_vae.__file__).parent.glob("*.py")} - {"__init__", "__main__"}
    assert files == set(order)
    for i, name in enumerate(order):
        text = Path(pyro_vae.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        # Doctests may use the public names; they are indented.
        used = set(re.findall(r"^from pyro_vae\.(\w+) import", text, flags=re.MULTILINE))
        for line in re.findall(r"^from pyro_vae import \(?([\w, ]+)", text, flags=re.MULTILINE):
            used |= {word for word in line.replace(" ", "").split(",") if word in files}
        assert used <= set(order[:i]), f"{name} imports {sorted(used - set(order[:i]))}"
