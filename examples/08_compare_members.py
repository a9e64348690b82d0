"""Priors, posteriors and likelihoods on MNIST at equal budget, over several seeds: the tables of the README.

    python examples/08_compare_members.py --root DIR        (DIR holds MNIST/raw; an hour or two on one CPU core)
    python examples/08_compare_members.py --root DIR --table priors --epochs 5 --seeds 1

One recipe for all: tanh 200-200, 40 latent dimensions, Adam at 1e-3, batches of 100, the decoder's bias at the data's
mean. Only the named part differs. A run that is already in the output folder is not trained again, one that was
stopped goes on. Differences are paired: the same seed, the same test images.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from pyro_vae.cli import main

RECIPE = "--latent_dim 40 --networks.hidden [200,200] --networks.activation torch.nn.Tanh --standardize false"
RECIPE += " --figures false --lr 1e-3 --batch_size 100"
BINARY = "--data.binarization dynamic"
GREY = "--data.binarization grey"
LEVELS = "--data.binarization levels"
HALF = "--likelihood Normal --likelihood.scale 0.5"

TABLES = {
    "priors": {
        "StandardNormal": "",
        "priors.Laplace": "--prior Laplace",
        "MixtureOfNormals(50)": "--prior MixtureOfNormals --prior.num_components 50",
        "VampPrior(500)": "--prior VampPrior --prior.num_components 500",
        "FlowPrior, autoregressive": "--prior FlowPrior --prior.kind autoregressive",
    },
    "posteriors": {
        "DiagonalNormal": "",
        "FullNormal": "--encoder FullNormal",
        "PlanarFlow(8)": "--encoder PlanarFlow",
        "CouplingFlow(4)": "--encoder CouplingFlow",
        "AutoregressiveFlow(2)": "--encoder AutoregressiveFlow",
    },
    "likelihoods": {
        "Bernoulli": "",
        "ContinuousBernoulli": f"--likelihood ContinuousBernoulli {GREY}",
        "likelihoods.Normal, scale 0.5": f"{HALF} --likelihood.learn_scale false {GREY}",
        "likelihoods.Normal, learned scale": f"{HALF} {GREY}",
        "OptimalNormal": f"--likelihood OptimalNormal {GREY}",
        "DiscretizedLogistic": f"--likelihood DiscretizedLogistic {LEVELS}",
    },
}


def train(name: str, words: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One run, or what is left of it; its numbers."""
    folder = arguments.out / f"{name if words else 'StandardNormal, DiagonalNormal'}, seed {seed}"
    if not (folder / "evaluation.json").exists():
        if (folder / "state").exists():
            main(["resume", str(folder), "--epochs", str(arguments.epochs)])
        else:
            data = [*(["Digits"] if arguments.smoke else ["MNIST", "--data.root", arguments.root])]
            given = f"{words if 'binarization' in words else f'{words} {BINARY}'} {RECIPE}"
            given += f" --epochs {arguments.epochs} --seed {seed} --eval_particles {arguments.particles}"
            given += f" --compiled {str(not arguments.smoke).lower()}"
            if arguments.smoke:
                given = given.replace(BINARY, "--likelihood Binomial --likelihood.total_count 16")
            main(["train", "--out", str(folder), "--data", *data, *given.split()])
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    numbers = {e["name"]: e["mean"] for e in result["estimates"]}
    return {"ELBO": numbers["ELBO"], "log p(x)": numbers["log p(x)"], "active units": result["active_units"]}


def with_error(values: list[float], digits: int = 2) -> str:
    """Mean ± standard error over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def table(part: str, arguments: argparse.Namespace) -> str:
    """Train the members of one table and write it down."""
    members = TABLES[part]
    runs = {
        name: [train(name, words, seed, arguments) for seed in range(arguments.seeds)]
        for name, words in members.items()
    }
    reference = next(iter(runs.values()))
    comparable = part != "likelihoods"
    last = "log p(x) minus the first row's" if comparable else "bits per pixel"
    lines = [f"| {part[:-1]} | ELBO | log p(x) | active units | {last} |", "|---|---|---|---|---|"]
    for name, results in runs.items():
        columns = [with_error([r[column] for r in results]) for column in ("ELBO", "log p(x)", "active units")]
        if comparable:
            pairs = zip(results, reference, strict=True)
            columns.append(
                "" if results is reference else with_error([a["log p(x)"] - b["log p(x)"] for a, b in pairs])
            )
        else:
            levels = LEVELS in members[name]
            bits = [-r["log p(x)"] / 784 / math.log(2) for r in results]
            columns.append(with_error(bits, digits=3) if levels else "")
        lines.append(f"| `{name}` | {' | '.join(columns)} |")
    lines.append("")
    lines.append(
        f"Nats per example on the test images, {arguments.epochs} epochs, K = {arguments.particles}; "
        f"mean ± standard error over {arguments.seeds} seeds."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="the folder that holds MNIST/raw; downloaded there if missing")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_members"), help="where the runs go")
    parser.add_argument("--table", choices=sorted(TABLES), action="append", help="which tables; default: all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--particles", type=int, default=100, help="K of the estimate of log p(x)")
    parser.add_argument("--smoke", action="store_true", help="two priors, one epoch, on the embedded digits")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.epochs, arguments.seeds, arguments.particles, arguments.table = 1, 2, 5, ["priors"]
        TABLES["priors"] = {name: TABLES["priors"][name] for name in ("StandardNormal", "priors.Laplace")}
    for part in arguments.table or TABLES:
        text = table(part, arguments)
        print(text)
        (arguments.out / f"{part}.md").write_text(text, encoding="utf-8")
