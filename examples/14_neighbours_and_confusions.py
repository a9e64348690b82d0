"""What two dimensions keep of a digit: what its reconstruction is taken for, and which digits are near it in z.

    python examples/14_neighbours_and_confusions.py --root DIR      (MNIST: three minutes on one CPU core)
    python examples/14_neighbours_and_confusions.py --data Digits

A classifier, trained on pictures, reads the test pictures and their reconstructions; only pictures that it reads
rightly count. The neighbours of a picture are sought in z, by four distances between posteriors, among as many
principal components, and among raw pixels. No label is used but to judge. Writes confusions.png and neighbours.png.
"""

import argparse
import math
import statistics

import torch

from pyro_vae import (
    VAE,
    Bernoulli,
    Binomial,
    Decoder,
    DiagonalNormal,
    Mlp,
    StandardNormal,
    datasets,
    elbo,
    fit,
    representation_plots,
    sample_quality,
)
from pyro_vae.geometry import (
    bhattacharyya,
    euclidean,
    nearest,
    neighbours,
    posterior_normals,
    principal_components,
    symmetrised_kl,
    wasserstein,
)
from pyro_vae.representation import class_distances, confusions, posterior_means, top_confusions
from pyro_vae.uncertainty import with_error

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=["Digits", "MNIST"], default="MNIST")
parser.add_argument("--root", default="data", help="the folder that holds MNIST/raw; downloaded there if missing")
parser.add_argument("--latent_dim", type=int, default=2)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--examples", type=int, default=20_000, help="training pictures, from the first")
parser.add_argument("--smoke", action="store_true", help="the digits, two seeds, five epochs")
arguments = parser.parse_args()
if arguments.smoke:
    arguments.data, arguments.seeds, arguments.epochs = "Digits", 2, 5
dim, NEAR, QUERIES, INDEX = arguments.latent_dim, 8, 1000, 10_000

# Pictures are read in grey; the models are trained on bits drawn from the grey values, which have a likelihood.
if arguments.data == "MNIST":
    data = datasets.MNIST(arguments.root, binarization="grey")
    to_x, likelihood, highest = datasets.binarize, Bernoulli, 1.0
else:
    data = datasets.Digits()
    to_x, likelihood, highest = data.prepare, lambda: Binomial(16), 16.0
generator = torch.Generator().manual_seed(0)
shape, size = data.event_shape, data.test[0].numel()
rows, labels = data.train[: arguments.examples].flatten(1), data.train_labels[: arguments.examples]
grey, grey_test, test_labels = data.prepare(rows), data.test.flatten(1), data.test_labels
x, x_test = (datasets.binarize(part, generator) if highest == 1.0 else part for part in (grey, grey_test))
classifier = sample_quality.train_classifier(grey, labels)
right = classifier(grey_test).argmax(1) == test_labels


def trained(seed: int) -> VAE:
    torch.manual_seed(seed)
    encoder = DiagonalNormal(Mlp(size, 256, 128, 2 * dim))
    vae = VAE(StandardNormal(dim), Decoder(Mlp(dim, 128, 256, size), likelihood()), encoder)
    fit(vae, rows, epochs=arguments.epochs, batch_size=100, prepare=to_x, compiled=not arguments.smoke)
    return vae


def over_seeds(values: list[float]) -> str:
    return with_error(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))


print(f"{data.policy}; trained on the first {len(rows)}, {arguments.epochs} epochs, {dim} latent dimensions")
print(f"the classifier reads {float(right.double().mean()):.3f} of the {len(right)} test pictures rightly")
distances = {
    "means": euclidean,
    "symmetrised KL": symmetrised_kl,
    "Wasserstein": wasserstein,
    "Bhattacharyya": bhattacharyya,
}
tables, centres, kept, near = [], [], [], {}
for seed in range(arguments.seeds):
    vae = trained(seed)
    bound = elbo(vae, x_test[:2000], 10)
    with torch.no_grad():
        taken = classifier(vae.reconstruct(x_test)).argmax(1)
    tables.append(confusions(taken[right], test_labels[right]))
    kept.append(float((taken[right] == test_labels[right]).double().mean()))
    print(f"seed {seed}: ELBO {bound}; {kept[-1]:.3f} of the reconstructions are read as their picture")
    away = class_distances(posterior_means(vae, x_test), test_labels)
    centres.append(away / away[~torch.eye(len(away), dtype=torch.bool)].mean())
    query, index = posterior_normals(vae, x_test[:QUERIES]), posterior_normals(vae, x[:INDEX])
    found = {name: neighbours(query, index, NEAR, distance)[1] for name, distance in distances.items()}
    pca = principal_components(x[:INDEX], dim)
    found[f"PCA, D = {dim}"] = nearest(pca.encode(x_test[:QUERIES]), pca.encode(x[:INDEX]), NEAR)[1]
    found["pixels"] = nearest(x_test[:QUERIES], x[:INDEX], NEAR)[1] if seed == 0 else near["pixels"][0]
    for name, chosen in found.items():
        near.setdefault(name, []).append(chosen)

print(f"\nAll together: {over_seeds(kept)} of the reconstructions are read as their picture")
shares = torch.stack([table.double() / table.sum(1, keepdim=True) for table in tables])
print("The most frequent confusions, share of the true class (± over the seeds; in brackets: of seed 0, over pictures)")
first = {(a, b): share for a, b, share in top_confusions(tables[0], 90)}
order = [(a, b) for a, b, _ in top_confusions(sum(tables), 90)]
wanted = [(5, 3), (5, 8), (4, 9)]
for rank, (a, b) in enumerate(order, 1):
    if rank <= 10 or (a, b) in wanted:
        told = over_seeds(shares[:, a, b].tolist())
        mark = "  <- told by eye: a 5 looks like a 3 or an 8, a 4 like a 9" if (a, b) in wanted else ""
        print(f"  {rank:2}. {a} -> {b}   {told}   [{first[a, b]}]{mark}")
away = torch.stack(centres)
pairs = sorted((away[:, a, b].mean().item(), a, b) for a in range(len(away[0])) for b in range(a))
print("\nThe classes whose mean codes are closest (1: the average pair)")
print("  " + ", ".join(f"{b}-{a}: {over_seeds(away[:, a, b].tolist())}" for _, a, b in pairs[:6]))

print(f"\nShare of the {NEAR} nearest training pictures with the label of the test picture, {QUERIES} queries at most")
of_query = test_labels[:QUERIES].unsqueeze(1)
for name, chosen in near.items():
    values = [(labels[:INDEX][part] == of_query).double().mean(1) for part in chosen]
    told = over_seeds([float(v.mean()) for v in values]) if len({float(v.mean()) for v in values}) > 1 else "–"
    error = float(values[0].std() / math.sqrt(len(values[0])))
    print(f"  {name:16} {told:18} [seed 0, over queries: {with_error(float(values[0].mean()), error)}]")

ax = representation_plots.confusion(shares.mean(0))
ax.set_title(f"{data.name}: what reconstructions are taken for, % of the true class", fontsize=10)
ax.figure.savefig("confusions.png", dpi=120, bbox_inches="tight")
chosen = [int((test_labels == c).nonzero()[0]) for c in (3, 4, 5, 9)]
pictures, index_pictures = grey_test.unflatten(1, shape), grey[:INDEX].unflatten(1, shape)
ax = representation_plots.neighbours(
    pictures[chosen],
    {name: index_pictures[part[0][chosen]] for name, part in near.items()},
    test_labels[chosen].tolist(),
    {name: labels[:INDEX][part[0][chosen]].tolist() for name, part in near.items()},
    (0.0, highest),
)
ax.set_title(f"{data.name}: nearest training pictures; red: another digit", fontsize=10)
ax.figure.savefig("neighbours.png", dpi=120, bbox_inches="tight")
print("wrote confusions.png and neighbours.png")
