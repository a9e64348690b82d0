"""ELBO against IWAE-50 on MNIST, after 5, 20 and 50 epochs: the table of the README.

    python examples/07_mnist_table.py --root DIR     (DIR holds MNIST/raw; some 75 minutes on one CPU core)

The recipe is the one-layer model of Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519: tanh 200-200, 50 latent
dimensions, dynamic binarisation, decoder bias at the data's mean; Adam at 1e-3, batches of 100. What must come out as
in their table 1: training with IWAE-50 gives a better log p(x) and more active units.
"""

import argparse
import json
from pathlib import Path

from pyro_vae.cli import main

RECIPE = """--latent_dim 50 --networks MlpPair --networks.hidden [200,200] --networks.activation torch.nn.Tanh
--batch_size 100 --lr 1e-3 --start_at_data true --standardize false --eval_particles 500"""
OBJECTIVES = {
    "Trace_ELBO": "--objective Trace_ELBO",
    "IWAE(50)": "--objective IWAE --objective.num_particles 50",
}


def run(root: str, out: Path, checkpoints: list[int], data: str) -> str:
    lines = ["| objective | epochs | test ELBO | test log p(x) | active units |", "|---|---|---|---|---|"]
    for name, objective in OBJECTIVES.items():
        folder = str(out / name.strip(")").replace("(", "_").lower())  # trace_elbo, iwae_50
        for epochs in checkpoints:
            if epochs == checkpoints[0]:
                where = f"--data {data}" + (f" --data.root {root}" if data == "MNIST" else "")
                command = f"train --out {folder} --epochs {epochs} {where} {RECIPE} {objective}"
                main(command.split())
            else:  # the same run goes on, bit for bit
                main(["resume", folder, "--epochs", str(epochs)])
            result = json.loads(Path(folder, "evaluation.json").read_text(encoding="utf-8"))
            numbers = {e["name"]: f"{e['mean']:.2f} ± {e['standard_error']:.2f}" for e in result["estimates"]}
            lines.append(
                f"| `{name}` | {epochs} | {numbers['ELBO']} | {numbers['log p(x)']} | {result['active_units']} of 50 |"
            )
    k, n = result["estimates"][-1]["num_particles"], result["estimates"][-1]["num_examples"]
    lines += ["", f"Nats per example, ± standard error over n = {n} test images; K = {k}. {result['policy']}."]
    table = "\n".join(lines) + "\n"
    (out / "table.md").write_text(table, encoding="utf-8")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="the folder that holds MNIST/raw; downloaded there if missing")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_table"), help="where the two runs go")
    parser.add_argument("--smoke", action="store_true", help="two epochs on the embedded digits, to see that it works")
    arguments = parser.parse_args()
    if arguments.smoke:
        RECIPE = RECIPE.replace("500", "20") + " --likelihood Binomial --likelihood.total_count 16 --figures false"
        OBJECTIVES["IWAE(50)"] = OBJECTIVES["IWAE(50)"].replace("50", "5")
        print(run(arguments.root, arguments.out, [1, 2], "Digits"))
    else:
        print(run(arguments.root, arguments.out, [5, 20, 50], "MNIST"))
