"""Posterior collapse, and its remedies: warm-up, cycles, free bits, a tighter bound.

    python examples/11_posterior_collapse.py      (three minutes; writes posterior_collapse.png)

With two hidden layers on either side the plain ELBO first learns that z is noise, makes q(z|x) the prior, and stays
there: every reconstruction is the mean image (beta = 4 only confirms it). Warm-up, cycles and free bits keep the KL
cheap until z has become useful; IWAE forgives draws that miss. Whatever is maximised, the numbers are the true ELBO
and log p(x) on held-out digits, of the same model after the same budget.
"""

import sys

import torch
from matplotlib.figure import Figure

from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    Bernoulli,
    Beta,
    Decoder,
    DiagonalNormal,
    Mlp,
    StandardNormal,
    datasets,
    elbo_terms,
    fit,
    log_evidence,
)
from pyro_vae.diagnostics import active_units, kl_per_dimension
from pyro_vae.regularized import FreeBits
from pyro_vae.schedules import Cyclical, Linear

EPOCHS, K, LATENT_DIM = (2, 10, 16) if "--smoke" in sys.argv else (40, 500, 16)

digits = datasets.Digits()
generator = torch.Generator().manual_seed(0)
x, x_test = (datasets.binarize(rows.flatten(1).float() / 16, generator) for rows in (digits.train, digits.test))
steps = EPOCHS * -(-len(x) // 64)

objectives = {
    "ELBO": ELBO(),
    "beta = 4": Beta(beta=4.0),
    "warm-up": Beta(beta=Linear(steps=steps // 2)),
    "cyclical": Beta(beta=Cyclical(steps=steps // 4)),
    "free bits 0.1": FreeBits(nats=0.1),
    "free bits 0.25": FreeBits(nats=0.25),
    "IWAE, K = 10": IWAE(num_particles=10),
}
print(f"{digits.policy}; binarised with seed 0; {LATENT_DIM} latent dimensions, {EPOCHS} epochs; nats per example\n")
print(f"{'trained with':16}{'KL':>7}{'active':>8}   {'ELBO (K=' + str(K) + ')':18}{'log p(x) (K=' + str(K) + ')':18}")
curves, bars = {}, {}
for name, objective in objectives.items():
    torch.manual_seed(0)
    decoder = Decoder(Mlp(LATENT_DIM, 128, 128, 64), Bernoulli())
    vae = VAE(StandardNormal(LATENT_DIM), decoder, DiagonalNormal(Mlp(64, 128, 128, 2 * LATENT_DIM)))
    curves[name] = fit(vae, x, objective=objective, epochs=EPOCHS, batch_size=64, lr=2e-3)["kl"]
    bars[name] = kl_per_dimension(vae, x_test).sort(descending=True).values
    bound, evidence = elbo_terms(vae, x_test, K)["elbo"], log_evidence(vae, x_test, K)
    print(
        f"{name:16}{bars[name].sum():7.2f}{int(active_units(vae, x_test).sum()):5} of {LATENT_DIM}"
        f"{bound.mean:10.2f} ± {bound.standard_error:.2f}{evidence.mean:12.2f} ± {evidence.standard_error:.2f}"
    )
mean_image = Bernoulli()(x.mean(0).clamp(0.001, 0.999).logit()).log_prob(x_test)
print(f"\nwithout z at all (the pixels' means): log p(x) = {mean_image.mean():.2f} nats per example")
print("active: dimensions whose posterior mean varies by more than 0.01 over x (of 16); free bits count them all")

colours = ["#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7"]  # Okabe and Ito
figure = Figure(figsize=(12.0, 4.6), layout="constrained")
left, right = figure.subplots(1, 2)
for (name, curve), colour, marker in zip(curves.items(), colours, "os^vDPX", strict=True):
    look = {"color": colour, "marker": marker, "ms": 5, "lw": 1.6, "mec": "white", "mew": 0.4}
    left.plot(range(1, EPOCHS + 1), curve, markevery=max(1, EPOCHS // 8), label=name, **look)
    right.plot(range(1, LATENT_DIM + 1), bars[name].clamp(min=1e-5), **look)
left.set(yscale="log", xlabel="epoch", ylabel="KL(q(z | x) || p(z)), nats per example")
left.set_title("training: the KL falls to nothing, and stays there unless it is kept cheap", fontsize=10)
right.set(yscale="log", xlabel="latent dimension, largest first", ylabel="its KL, nats per example")
right.axhline(0.01, color="0.5", lw=0.8, ls=":")
right.set_title("held-out digits: which dimensions carry something (dotted: 0.01)", fontsize=10)
for ax in (left, right):
    ax.grid(color="0.92", lw=0.7)
    ax.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside right center", frameon=False, title="trained with")
figure.savefig("posterior_collapse.png", dpi=150)
print("wrote posterior_collapse.png")
