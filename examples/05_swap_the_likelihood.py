"""Swap p(x|z) by one argument: which numbers may be compared, and which may not.

    python examples/05_swap_the_likelihood.py

Bernoulli and Binomial give probabilities (of other data: binarised pixels, counts), Normal and ContinuousBernoulli
densities, whose nats depend on the unit of x. Only the four rows of grey x describe the same x on the same scale.
"""

import sys

import torch

from pyro_vae import (
    VAE,
    Bernoulli,
    Binomial,
    ContinuousBernoulli,
    Decoder,
    DiagonalNormal,
    HeteroscedasticNormal,
    Mlp,
    StandardNormal,
    datasets,
    fit,
    likelihoods,
    log_evidence,
)

EPOCHS, K = (2, 10) if "--smoke" in sys.argv else (60, 500)

digits = datasets.Digits()
counts = torch.cat([digits.train.flatten(1).float(), digits.test.flatten(1)])
grey = counts / 16
binary = datasets.binarize(grey, torch.Generator().manual_seed(0))

cases = [  # name, likelihood, data
    ("counts 0..16     Binomial", Binomial(16), counts),
    ("binarised {0,1}  Bernoulli", Bernoulli(), binary),
    ("grey [0,1]       ContinuousBernoulli", ContinuousBernoulli(), grey),
    ("grey [0,1]       Normal, learned scale", likelihoods.Normal(scale=0.3), grey),
    ("grey [0,1]       Normal, scale 1 fixed", likelihoods.Normal(1.0, learn_scale=False), grey),
    ("grey [0,1]       HeteroscedasticNormal", HeteroscedasticNormal(), grey),
]
print(f"{digits.policy}; binarised with seed 0\nheld-out log p(x):")
for name, likelihood, x in cases:
    torch.manual_seed(0)
    x, x_test = x[: len(digits.train)], x[len(digits.train) :]
    decoder = Decoder(Mlp(2, 128, likelihood.num_outputs * 64), likelihood)
    decoder.start_at_data(x)
    vae = VAE(StandardNormal(2), decoder, DiagonalNormal(Mlp(64, 128, 2 * 2)))
    fit(vae, x, epochs=EPOCHS, batch_size=64)
    print(f"  {name:38} {log_evidence(vae, x_test, K)}")
    if isinstance(likelihood, likelihoods.Normal):
        with torch.no_grad():
            error = (vae.reconstruct(x, sample=True) - x).square().mean().sqrt()
        print(f"  {'':38} scale {likelihood.scale.item():.3f}, root mean squared error {error.item():.3f}")

print("\nand what is refused:")
try:
    fit(VAE(StandardNormal(2), Decoder(Mlp(2, 8, 64), Bernoulli()), DiagonalNormal(Mlp(64, 8, 4))), grey)
except ValueError as error:
    print(f"  grey pixels under Bernoulli: {error}")
