"""The losses of well-known posts: what each really optimises, and what becomes of a model trained with it.

    python examples/09_wrong_losses.py      (two minutes; writes wrong_losses.png and three_panels.png)

Sums and means, weights, beta and the decoder's variance are one knob. So a loss that adds a mean to a sum is not
broken, it is another model: first the proof on one batch, then eleven models trained alike, measured alike. The same
as a command, with MNIST by option: pyro-vae wrong-loss --data MNIST --root DIR --epochs 10
"""

import sys

import pyro
from pyro.infer import TraceMeanField_ELBO

from pyro_vae import datasets
from pyro_vae.wrong_loss_lab import explanations, grey_pictures, make_vae, run, table
from pyro_vae.wrong_loss_plots import draw_figures
from pyro_vae.wrong_losses import LOSSES, SummedSquares, conventions

EPOCHS = 2 if "--smoke" in sys.argv else 60

pictures = grey_pictures(datasets.Digits())
x = pictures.x[:100].double()
print(conventions(batch_size=100, data_dim=64, latent_dim=2), "\n\n" + explanations())

print("\nEach loss against the ELBO of the model it belongs to (Pyro's engine, one batch, the same draws of z):")
vae = make_vae(pictures).double()
for loss in (family() for family in LOSSES):
    model, guide, factor, constant = loss.equivalent(vae, x)
    pyro.set_rng_seed(0)
    printed = -loss.differentiable_loss(vae.model, vae.guide, x).item() / len(x)
    pyro.set_rng_seed(0)
    elbo = -TraceMeanField_ELBO().loss(model, guide, x) / len(x)
    print(
        f"  {type(loss).__name__:20} {printed:11.6f} = {factor:.6g} * {elbo:.6f} {constant:+.6f} "
        f"nats per example (difference {abs(printed - factor * elbo - constant):.0e})"
    )

print("\nOne loss, SSE + KL / 2, as three models (beta, sigma):", end=" ")
half = SummedSquares(x_weight=1.0, z_weight=0.5)
for beta in (0.5, 1.0, 4.0):
    print(f"({beta:g}, {(0.5 / (2 * beta)) ** 0.5:.3f})", end=" ")
    half.equivalent(vae, x, beta)  # a Pyro model and guide, to be trained by any SVI

print("\n\nTrained on the same data with the same budget:\n")
results = run(pictures, epochs=EPOCHS)
print(table(results, pictures))
for name, figure in draw_figures(results, pictures).items():
    figure.savefig(f"{name}.png", dpi=150)
    print(f"wrote {name}.png")
