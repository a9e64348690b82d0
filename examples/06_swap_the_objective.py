"""Swap the objective by one argument: ours, beta-weighted, importance-weighted, and Pyro's own.

    python examples/06_swap_the_objective.py

Whatever is maximised, the true ELBO is recorded beside it, and log p(x) is estimated with one and the same K.
"""

import sys

import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    Beta,
    Binomial,
    Decoder,
    DiagonalNormal,
    Mlp,
    StandardNormal,
    datasets,
    elbo_terms,
    fit,
    log_evidence,
)

EPOCHS, K = (2, 10) if "--smoke" in sys.argv else (60, 500)

digits = datasets.Digits()
x, x_test = digits.train.flatten(1).float(), digits.test.flatten(1)

objectives = {
    "ELBO()": ELBO(),
    "ELBO(num_particles=10)": ELBO(num_particles=10),
    "IWAE(num_particles=10)": IWAE(num_particles=10),
    "Beta(beta=4.0)": Beta(beta=4.0),
    "Beta(beta=0.25)  (no bound)": Beta(beta=0.25),
    "pyro.infer.Trace_ELBO()": Trace_ELBO(),
    "pyro.infer.TraceMeanField_ELBO()": TraceMeanField_ELBO(),
    "pyro.infer.RenyiELBO(alpha=0.5, ...)": RenyiELBO(
        alpha=0.5, num_particles=10, vectorize_particles=True, max_plate_nesting=1
    ),
}
print(f"{digits.policy}\n\n{'':38}objective on training data, then held-out, nats per example (K={K})")
for name, objective in objectives.items():
    torch.manual_seed(0)
    vae = VAE(StandardNormal(2), Decoder(Mlp(2, 128, 64), Binomial(16)), DiagonalNormal(Mlp(64, 128, 2 * 2)))
    history = fit(vae, x, objective=objective, epochs=EPOCHS, batch_size=64)
    terms, evidence = elbo_terms(vae, x_test, K), log_evidence(vae, x_test, K)
    print(
        f"{name:38}{history['objective'][-1]:8.1f}   ELBO {terms['elbo'].mean:7.1f} ± "
        f"{terms['elbo'].standard_error:.1f}   KL {terms['kl'].mean:5.2f}   "
        f"log p(x) {evidence.mean:7.1f} ± {evidence.standard_error:.1f}"
    )
