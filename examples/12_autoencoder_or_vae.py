"""A plain autoencoder against a VAE: the clouds of their codes, and what each makes of codes that no picture had.

    python examples/12_autoencoder_or_vae.py --root DIR      (MNIST: a quarter of an hour on one CPU core)
    python examples/12_autoencoder_or_vae.py --data Digits --seeds 3

Both have the same nets, to 2 and to 10 dimensions; the autoencoder's q is a point and its objective has no KL. Codes
to decode are taken from a lattice in the ball that holds 99 % of the codes, from N(0, I), and, so that the autoencoder
has a fair chance, from a normal and from a mixture of normals fitted to its codes. Trained models are kept in --out.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure

from pyro_vae import (
    ELBO,
    VAE,
    Bernoulli,
    Beta,
    Binomial,
    Decoder,
    DiagonalNormal,
    MlpPair,
    StandardNormal,
    clouds,
    datasets,
    elbo_terms,
    encoders,
    fit,
    image_plots,
    presets,
    representation_plots,
    sample_quality,
)
from pyro_vae.checkpoints import load_model, save_model
from pyro_vae.contracts import Distribution, untouched
from pyro_vae.diagnostics import health
from pyro_vae.representation import posterior_means
from pyro_vae.uncertainty import with_error

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=["Digits", "MNIST"], default="MNIST")
parser.add_argument("--root", default="data", help="the folder that holds MNIST/raw; downloaded there if missing")
parser.add_argument("--out", type=Path, default=Path("runs/autoencoder_or_vae"), help="where models and pictures go")
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--examples", type=int, default=20_000, help="training pictures, from the first")
parser.add_argument("--smoke", action="store_true", help="the digits, two seeds, three epochs")
arguments = parser.parse_args()
if arguments.smoke:
    arguments.data, arguments.seeds, arguments.epochs = "Digits", 2, 3
arguments.out.mkdir(parents=True, exist_ok=True)
DIMS, HELD_OUT, SHOWN = (2, 10), 2000, 15

# Grey pixels are what pictures are judged by; the models are trained on bits drawn from them, which have a likelihood.
if arguments.data == "MNIST":
    data = datasets.MNIST(arguments.root, binarization="grey")
    to_x, likelihood, highest = datasets.binarize, lambda: Bernoulli(event_dim=3), 1.0
    x_test = datasets.binarize(data.test, torch.Generator().manual_seed(0))
else:
    data = datasets.Digits()
    to_x, likelihood, highest = data.prepare, lambda: Binomial(16, event_dim=3), 16.0
    x_test = data.test
shape = tuple(data.event_shape)
rows, labels = data.train[: arguments.examples], data.train_labels[: arguments.examples]
pictures, x_test, test_labels = data.test[:HELD_OUT], x_test[:HELD_OUT], data.test_labels[:HELD_OUT]
policy = f"{data.policy}; trained on the first {len(rows)}, measured on {len(pictures)}"
judged = SimpleNamespace(
    train=rows,
    prepare=data.prepare,
    test=pictures,
    train_labels=labels,
    test_labels=test_labels,
    policy=policy,
    name=data.name,
)


def trained(kind: str, dim: int, seed: int) -> VAE:
    """An autoencoder (AE) or a VAE, trained here or read from the folder."""
    path = arguments.out / f"{kind}-{dim}d-seed{seed}.safetensors"
    torch.manual_seed(seed)
    pair = MlpPair((256, 128))
    family = encoders.Delta if kind == "AE" else DiagonalNormal
    encoder = family(pair.encoder(shape, family.num_outputs(dim)))
    vae = VAE(StandardNormal(dim), Decoder(pair.decoder(dim, shape), likelihood()), encoder)
    if path.exists():
        load_model(path, vae)
        return vae
    objective = Beta(beta=0.0) if kind == "AE" else ELBO()
    settings = {"epochs": arguments.epochs, "batch_size": 100, "compiled": not arguments.smoke}
    fit(vae, rows, objective=objective, prepare=to_x, **settings)
    save_model(path, vae)
    return vae


def posterior_draws(vae: VAE, x: torch.Tensor, seed: int) -> torch.Tensor:
    """One draw of q(z | x) for each example; of an autoencoder its code."""
    with untouched(vae, seed):
        return torch.cat([vae.encoder(part).sample() for part in x.split(1000)])


def drawn(p: Distribution) -> Callable[[int], torch.Tensor]:
    """A sampler for sample_quality: number -> codes."""
    return lambda num: p.sample((num,))


def over_seeds(values: list[float]) -> str:
    """Mean ± standard error over the seeds."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return "–" if not known else f"{known[0]:.2f}"
    return with_error(statistics.mean(known), statistics.stdev(known) / math.sqrt(len(known)))


def table(head: str, numbers: dict[str, dict[str, list[float]]]) -> None:
    """Rows of name -> column -> one number a seed."""
    columns = list(next(iter(numbers.values())))
    print(f"\n{head:20}" + "".join(f"{column:>19}" for column in columns))
    for name, row in numbers.items():
        print(f"{name:20}" + "".join(f"{over_seeds(row[column]):>19}" for column in columns))


seeds = range(arguments.seeds)
models = {(kind, dim, seed): trained(kind, dim, seed) for dim in DIMS for kind in ("AE", "VAE") for seed in seeds}
dead = [key for key, vae in models.items() if health(vae, x_test[:1000]).ignores_code]
print(f"{policy}; {arguments.epochs} epochs; mean ± standard error over {arguments.seeds} seeds")
print(f"dead models (every output the average picture): {dead or 'none'}; they are left out below")
alive = {key: vae for key, vae in models.items() if key not in dead}

# ------------------------------------------------------------------------------------ the clouds of the codes
shapes: dict[str, dict[str, list[float]]] = {}
balls = {key: clouds.ball(posterior_draws(vae, x_test, key[2])) for key, vae in models.items()}
for (kind, dim, seed), vae in alive.items():
    codes, draws = posterior_means(vae, x_test), posterior_draws(vae, x_test, seed)
    ball = balls[kind, dim, seed]
    form = clouds.isotropy(draws)
    gaps = clouds.gap_statistic(draws, clouds.ball_sites(draws), ball.radius / 20).mean if dim == 2 else math.nan
    found = {
        "log p(x | z)": elbo_terms(vae, x_test, 1 if kind == "AE" else 20)["log_px"].mean,
        "radius of draws": ball.radius,
        "radius of means": clouds.ball(codes).radius,
        "largest/smallest": form.ratio.value,
        "kurtosis/normal": form.kurtosis.value,
        "gaps": gaps,
    }
    for column, value in found.items():
        shapes.setdefault(f"{kind} {dim}-D", {}).setdefault(column, []).append(value)
print("\nCodes of held-out pictures; log p(x | z) in nats per example. Radius: 99 % inside; of N(0, I):", end=" ")
print(", ".join(f"{clouds.prior_radius(dim):.2f} ({dim}-D)" for dim in DIMS))
print("gaps: the share of the ball that no code comes nearer to than a twentieth of its radius")
table("cloud", shapes)

# -------------------------------------------------------------------------- what is decoded from codes of no picture
classifier = sample_quality.train_classifier(data.prepare(rows), labels)
near = data.prepare(rows[:10_000])
made: dict[str, dict[str, list[float]]] = {}
shown: dict[tuple[str, str], torch.Tensor] = {}
for (kind, dim, seed), vae in alive.items():
    of_training = posterior_draws(vae, to_x(rows), seed)
    side = math.ceil(math.sqrt(len(pictures)))
    lattice = balls[kind, dim, seed].lattice(side).float()
    ways = {"N(0, I)": vae.prior()}
    if kind == "AE":
        ways |= {"normal fit": clouds.fit_normal(of_training), "mixture fit": clouds.fit_mixture(of_training)}
    for way, sampler in {"lattice": lambda num, sites=lattice: sites, **{k: drawn(p) for k, p in ways.items()}}.items():
        result = sample_quality.quality(vae, judged, classifier, seed=seed, sampler=sampler)
        torch.manual_seed(seed)
        x = vae.decode(sampler(1000)[:: max(1, side**2 // 1000) if way == "lattice" else 1]).mean.detach()
        found = {
            "confidence": result.confidence.mean,
            "above 0.9": float((result.confidence.values > 0.9).double().mean()),
            "nearest picture": sample_quality.nearest_distance(x, near).mean,
            "Fréchet distance²": result.frechet.value,
            "precision": result.precision.mean,
            "recall": result.recall.mean,
        }
        for column, value in found.items():
            made.setdefault(f"{kind} {dim}-D {way}", {}).setdefault(column, []).append(value)
        shown.setdefault((f"{kind} {dim}-D", way), x[:SHOWN] if way != "lattice" else x[:: len(x) // SHOWN][:SHOWN])
sure = classifier(pictures).softmax(1).amax(1).double()
limits = {
    "confidence": [float(sure.mean())],
    "above 0.9": [float((sure > 0.9).double().mean())],
    "nearest picture": [sample_quality.nearest_distance(pictures[:1000], near).mean],
    "Fréchet distance²": [result.frechet_of_data.value],
    "precision": [math.nan],
    "recall": [math.nan],
}
table("decoded from", {**made, "held-out pictures": limits})

print("\nPaired by seed: VAE with its prior less the autoencoder, by way of drawing")
for dim in DIMS:
    both = [seed for seed in seeds if ("AE", dim, seed) in alive and ("VAE", dim, seed) in alive]
    order = {kind: [key[2] for key in alive if key[:2] == (kind, dim)] for kind in ("AE", "VAE")}
    for way in ("lattice", "N(0, I)", "normal fit", "mixture fit"):
        if not both:
            continue
        cells = []
        for column in ("confidence", "nearest picture", "Fréchet distance²"):
            ours, theirs = made[f"VAE {dim}-D N(0, I)"][column], made[f"AE {dim}-D {way}"][column]
            less = [ours[order["VAE"].index(seed)] - theirs[order["AE"].index(seed)] for seed in both]
            cells.append(f"{column} {over_seeds(less)}")
        print(f"  {dim}-D, AE {way:12} {', '.join(cells)}")
if all(("AE", dim, seed) in alive for dim in DIMS for seed in seeds):
    less = [
        b - a for a, b in zip(made["AE 2-D lattice"]["confidence"], made["AE 10-D lattice"]["confidence"], strict=True)
    ]
    print(f"  AE on its lattice, 10-D less 2-D: confidence {over_seeds(less)}")

# ----------------------------------------------------------------- the 10-D autoencoder of notebook 004, seed by seed
if arguments.data == "MNIST":
    stuck = []
    for seed in seeds:
        torch.manual_seed(seed)
        vae = presets.make("seed004-10d-ae")
        fit(vae, rows, objective=Beta(beta=0.0), prepare=to_x, epochs=2, batch_size=100)
        stuck.append((health(vae, x_test[:1000]).ignores_code, elbo_terms(vae, x_test)["log_px"].mean))
    print("\nA decoder that begins with ten rectifiers (preset seed004-10d-ae), two epochs; log p(x | z) by seed:")
    print("  " + ", ".join(f"{value:.1f}{' (dead)' if gone else ''}" for gone, value in stuck))

# ----------------------------------------------------------------------------------------------------------- pictures
spread = Figure(figsize=(13.0, 11.5), layout="constrained")
panels = Figure(figsize=(13.0, 13.6), layout="constrained")
for place, (kind, dim) in enumerate((kind, dim) for dim in DIMS for kind in ("AE", "VAE")):
    seed = next((s for s in seeds if (kind, dim, s) in alive), 0)
    vae, ball = models[kind, dim, seed], balls[kind, dim, seed]
    draws = posterior_draws(vae, x_test, seed)
    sites = ball.lattice(SHOWN).float()
    ax = representation_plots.cloud(draws, ball, test_labels, sites=sites, ax=spread.add_subplot(2, 2, place + 1))
    ax.set_title(f"{kind}, {dim}-D, seed {seed}. {ax.get_title()}", fontsize=9)
    title = f"{kind}, {dim}-D, seed {seed}: decoded from the lattice in its circle"
    ax = panels.add_subplot(2, 2, place + 1)
    image_plots.image_grid(vae.decode(sites).mean.detach(), SHOWN, (0.0, highest), ax, title)
strips = Figure(figsize=(10.0, 0.78 * len(shown)), layout="constrained")
tiles = torch.cat([part[:SHOWN] for part in shown.values()])
ax = image_plots.image_grid(tiles, SHOWN, (0.0, highest), strips.add_subplot())
height = ax.images[0].get_array().shape[0] / len(shown)
ax.set_yticks([height * (i + 0.5) for i in range(len(shown))], labels=[f"{a}: {b}" for a, b in shown])
for name, figure in (("clouds", spread), ("lattices", panels), ("drawn", strips)):
    figure.savefig(arguments.out / f"{name}.png", dpi=110, bbox_inches="tight")
    print(f"wrote {arguments.out / name}.png")
