"""Swap the objective by one argument: every objective of this library, and Pyro's own, on one VAE.

    python examples/06_swap_the_objective.py                              (the digits; some ten minutes on one CPU core)
    python examples/06_swap_the_objective.py --data MNIST --root DIR --epochs 5

Whatever is maximised, the true ELBO is recorded beside it, and log p(x) is estimated with one and the same K.
"""

import argparse

import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import VAE, Decoder, DiagonalNormal, Mlp, StandardNormal, datasets, elbo_terms, fit, log_evidence

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=["Digits", "MNIST"], default="Digits")
parser.add_argument("--root", default="data", help="the folder that holds MNIST/raw; downloaded there if missing")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--smoke", action="store_true", help="one epoch, to see that it works")
arguments = parser.parse_args()
EPOCHS, K = (1, 10) if arguments.smoke else (arguments.epochs, 500)

if arguments.data == "MNIST":
    data, likelihood = datasets.MNIST(arguments.root, binarization="static"), pv.Bernoulli
else:
    data, likelihood = datasets.Digits(), lambda: pv.Binomial(16)
x, x_test = data.train.flatten(1).float(), data.test.flatten(1).float()
size, steps = x.shape[1], EPOCHS * -(-len(x) // 64)

families = {
    "the same bound": [pv.ELBO(), pv.ELBO(8), pv.ReconstructionKL(), pv.EnergyEntropy(), pv.Surgery()],
    "tighter": [pv.IWAE(8), pv.MIWAE(4, 2), pv.PIWAE(4, 2), pv.CIWAE(8), pv.Renyi(8), pv.ThermodynamicVariational(8)],
    "other gradients": [pv.StickingTheLanding(), pv.DReG(8), pv.ScoreFunction(8), pv.VIMCO(8)],
    "changed on purpose": [
        pv.Beta(beta=4.0),
        pv.Beta(beta=0.25),
        pv.Beta(beta=pv.Linear(steps // 2)),
        pv.Capacity(),
        pv.FreeBits(),
        pv.BetaTC(beta=4.0, num_examples=len(x)),
        pv.DIP(),
        pv.InfoVAE(),
        pv.WAE(),
    ],
    "Pyro's": [
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        RenyiELBO(alpha=0.5, num_particles=8, vectorize_particles=True, max_plate_nesting=1),
    ],
}
print(f"{data.policy}\nobjective on training data, then held-out; nats per example (K={K}, n={len(x_test)})")
for family, objectives in families.items():
    print(f"\n{family}")
    for objective in objectives:
        torch.manual_seed(0)
        centre = nn.Sequential(pv.Standardize(x.mean(), x.std()), Mlp(size, 128, 2 * 2))
        vae = VAE(StandardNormal(2), Decoder(Mlp(2, 128, size), likelihood()), DiagonalNormal(centre))
        history = fit(vae, x, objective=objective, epochs=EPOCHS, batch_size=64)
        terms, evidence = elbo_terms(vae, x_test, 20), log_evidence(vae, x_test, K)
        name = repr(objective) if isinstance(objective, pv.Objective) else f"pyro {type(objective).__name__}"
        print(
            f"  {name:64.64}{history['objective'][-1]:9.1f}   ELBO {terms['elbo'].mean:7.1f} ± "
            f"{terms['elbo'].standard_error:.1f}   KL {terms['kl'].mean:5.2f}   "
            f"log p(x) {evidence.mean:7.1f} ± {evidence.standard_error:.1f}"
        )
