"""Swap p(z) by one argument: the same VAE under three priors.

python examples/04_swap_the_prior.py
"""

import sys

import torch

from pyro_vae import (
    VAE,
    Binomial,
    Decoder,
    DiagonalNormal,
    MixtureOfNormals,
    Mlp,
    StandardNormal,
    VampPrior,
    datasets,
    elbo_terms,
    fit,
    log_evidence,
)

EPOCHS, K = (2, 10) if "--smoke" in sys.argv else (60, 500)

digits = datasets.Digits()
x, x_test = digits.train.flatten(1).float(), digits.test.flatten(1)

priors = {
    "StandardNormal": lambda encoder: StandardNormal(2),
    "MixtureOfNormals": lambda encoder: MixtureOfNormals(2, num_components=20),
    "VampPrior": lambda encoder: VampPrior(encoder, x, num_components=100),
}
print(digits.policy)
for name, make_prior in priors.items():
    torch.manual_seed(0)
    encoder = DiagonalNormal(Mlp(64, 128, 2 * 2))
    vae = VAE(make_prior(encoder), Decoder(Mlp(2, 128, 64), Binomial(16)), encoder)
    fit(vae, x, epochs=EPOCHS, batch_size=64)
    terms = elbo_terms(vae, x_test, K)
    print(f"\n{name}")
    print(f"  held-out ELBO      {terms['elbo']}")
    print(f"  held-out KL        {terms['kl']}")
    print(f"  held-out log p(x)  {log_evidence(vae, x_test, K)}")
