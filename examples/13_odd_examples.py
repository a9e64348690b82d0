"""How well a VAE tells odd pictures from ordinary ones, against baselines that need no training to speak of.

    python examples/13_odd_examples.py --root DIR      (DIR holds MNIST/raw and FashionMNIST/raw; ten minutes)
    python examples/13_odd_examples.py --data Digits

First other data (Fashion-MNIST; of the small digits themselves, upside down), over several seeds; then each class in
turn, held out of the training. Scores: -ELBO, -log p(x), the reconstruction error; against them the residual of
principal components and the mere amount of ink. AUROC: the probability that an odd picture scores higher than an
ordinary one.
"""

import argparse
import math
import statistics

import torch
from matplotlib.figure import Figure

from pyro_vae import (
    VAE,
    Bernoulli,
    Binomial,
    Decoder,
    DiagonalNormal,
    Mlp,
    StandardNormal,
    datasets,
    diagnostics,
    elbo,
    fit,
    log_evidence,
    representation_plots,
)
from pyro_vae.anomalies import anomaly_score, auroc, auroc_difference
from pyro_vae.geometry import principal_components
from pyro_vae.uncertainty import with_error

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=["Digits", "MNIST"], default="MNIST")
parser.add_argument("--root", default="data", help="the folder that holds MNIST/raw and FashionMNIST/raw")
parser.add_argument("--seeds", type=int, default=3, help="models for the first table; the second has one a class")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--examples", type=int, default=20_000, help="training pictures, from the first")
parser.add_argument("--held_out", type=int, default=2000, help="test pictures of either kind at most, from the first")
parser.add_argument("--classes", type=int, nargs="*", default=range(10), help="which to hold out in turn")
parser.add_argument("--smoke", action="store_true", help="the digits, two seeds, two classes, one epoch")
arguments = parser.parse_args()
if arguments.smoke:
    arguments.data, arguments.seeds, arguments.epochs, arguments.classes = "Digits", 2, 1, range(2)
LATENT_DIM, K = 10, 5 if arguments.smoke else 50

if arguments.data == "MNIST":
    data = datasets.MNIST(arguments.root, binarization="static")
    fashion = datasets.FashionMNIST(arguments.root, binarization="static")
    likelihood, other, other_name = Bernoulli, fashion.test.flatten(1), "Fashion-MNIST (bits drawn once)"
else:
    data = datasets.Digits()
    likelihood, other, other_name = (
        lambda: Binomial(16),
        data.test.flip(2, 3).flatten(1),
        "the test pictures upside down",
    )
x, labels = data.train[: arguments.examples].flatten(1).float(), data.train_labels[: arguments.examples]
x_test, size = data.test.flatten(1), data.test[0].numel()
few = arguments.held_out


def trained(x: torch.Tensor, seed: int) -> VAE:
    torch.manual_seed(seed)
    encoder = DiagonalNormal(Mlp(size, 256, 128, 2 * LATENT_DIM))
    vae = VAE(StandardNormal(LATENT_DIM), Decoder(Mlp(LATENT_DIM, 128, 256, size), likelihood()), encoder)
    fit(vae, x, epochs=arguments.epochs, batch_size=100, compiled=not arguments.smoke)
    return vae


def scores(vae: VAE, x: torch.Tensor, train: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> how odd each example is, higher is odder."""
    pca = principal_components(train[:5000], LATENT_DIM)
    return {
        "-log p(x)": anomaly_score(vae, x, K, estimator=log_evidence).values,
        "-ELBO": anomaly_score(vae, x, K, estimator=elbo).values,
        "reconstruction": diagnostics.rate_distortion(vae, x, K)[1].values,
        "PCA residual": pca.residual(x),
        "ink": x.double().sum(1),
    }


def line(name: str, ordinary: dict[str, torch.Tensor], odd: dict[str, torch.Tensor]) -> dict[str, float]:
    """Print a row of AUROCs with their errors over the examples; the AUROCs."""
    found = {key: auroc(ordinary[key], odd[key]) for key in ordinary}
    names = list(found)
    pairs = [(ordinary[key], odd[key]) for key in (names[0], names[3])]
    less = auroc_difference(*pairs)
    cells = "".join(f"{with_error(each.value, each.standard_error):>20}" for each in found.values())
    print(f"{name:12}{cells}{with_error(less.value, less.standard_error):>22}", flush=True)
    return {key: each.value for key, each in found.items()} | {"less PCA": less.value}


def share(flags: torch.Tensor) -> str:
    """A share with its binomial standard error."""
    values = flags.double()
    return with_error(float(values.mean()), float(values.std() / math.sqrt(len(values))))


def threshold_line(name: str, ordinary: torch.Tensor, odd: torch.Tensor) -> None:
    """Print what the 95 % quantile of one half of the ordinary scores does on the other half and on the odd ones."""
    first, second = ordinary[0::2], ordinary[1::2]
    limit = first.quantile(0.95)
    print(f"  above the 95 % quantile, {name:14} odd {share(odd > limit)}, ordinary {share(second > limit)}")


def mean_line(name: str, rows: list[dict[str, float]]) -> None:
    """Print mean ± standard error of such rows, of which there are several."""
    cells = []
    for key in rows[0]:
        values = [row[key] for row in rows]
        error = statistics.stdev(values) / math.sqrt(len(values))
        cells.append(with_error(statistics.mean(values), error) if error > 1e-9 else f"{values[0]:.4f}")
    print(f"{name:12}" + "".join(f"{cell:>20}" for cell in cells[:-1]) + f"{cells[-1]:>22}")


print(f"{data.policy}; trained on the first {len(x)}, {arguments.epochs} epochs, {LATENT_DIM} latent dimensions")
print(f"scores in nats per example with K={K} draws of z; errors over the examples (DeLong) or as the row says")
names = ["-log p(x)", "-ELBO", "reconstruction", "PCA residual", "ink"]
head = f"{'AUROC':12}" + "".join(f"{name:>20}" for name in names) + f"{'-log p(x) less PCA':>22}"

print(f"\nOrdinary: {len(x_test[:few])} test pictures; odd: {len(other[:few])} of {other_name}\n{head}")
rows = []
for seed in range(arguments.seeds):
    vae = trained(x, seed)
    ordinary, odd = scores(vae, x_test[:few], x), scores(vae, other[:few], x)
    rows.append(line(f"seed {seed}", ordinary, odd))
mean_line("over seeds", rows)
for name in (names[0], names[3]):  # of the last model
    threshold_line(name, ordinary[name], odd[name])
figure = Figure(figsize=(11.0, 6.0), layout="constrained")
for i, name in enumerate(names):
    ax = figure.add_subplot(2, 3, i + 1)
    kinds = (f"{data.name}, held out", other_name.split(" (")[0])
    units = ", nats per example" if i < 3 else ""
    representation_plots.odd_scores(ordinary[name], odd[name], f"{name}{units}", kinds, ax)
    ax.set_title(f"AUROC {rows[-1][name]:.3f}", fontsize=10)
figure.savefig("odd_examples.png", dpi=110)

if arguments.classes:
    print(f"\nOne class held out of the training (seed 0): how odd its test pictures are among the others'\n{head}")
rows = []
for held_out in arguments.classes:
    train = x[labels != held_out]
    vae = trained(train, 0)
    others = data.test_labels != held_out
    ordinary, odd = (scores(vae, x_test[chosen][:few], train) for chosen in (others, ~others))
    rows.append(line(f"class {held_out}", ordinary, odd))
if len(rows) > 1:
    mean_line("over classes", rows)
print("\nwrote odd_examples.png")
