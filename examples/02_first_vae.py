"""The first VAE with this package: plain Pyro, then one swapped word, then `fit`, then log p(x).

python examples/02_first_vae.py
"""

import sys

import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_vae import IWAE, VAE, Binomial, Decoder, DiagonalNormal, Mlp, StandardNormal, datasets, fit, log_evidence

EPOCHS = 1 if "--smoke" in sys.argv else 30

torch.manual_seed(0)
digits = datasets.Digits()
x, x_test = digits.train.flatten(1).float(), digits.test.flatten(1)  # [N, 64], counts 0..16

vae = VAE(
    prior=StandardNormal(2),  # p(z)
    decoder=Decoder(Mlp(2, 128, 64), Binomial(16)),  # p(x | z)
    encoder=DiagonalNormal(Mlp(64, 128, 2 * 2)),  # q(z | x)
)

# Plain Pyro: the VAE is two Pyro programs, vae.model and vae.guide.
svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), loss=Trace_ELBO())
for _ in range(EPOCHS):
    loss = sum(svi.step(batch) for batch in x[torch.randperm(len(x))].split(64))
print(f"Trace_ELBO   {-loss / len(x):.1f} nats per example (training, n={len(x)}, K=1)")

# One word swapped: the importance-weighted bound.
svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), loss=IWAE(num_particles=50))
for _ in range(EPOCHS):
    loss = sum(svi.step(batch) for batch in x[torch.randperm(len(x))].split(64))
print(f"IWAE(50)     {-loss / len(x):.1f} nats per example (training, n={len(x)}, K=50)")

# The same with everything around it: checks, shuffling, both curves.
history = fit(vae, x, objective=IWAE(num_particles=50), epochs=EPOCHS, batch_size=64, x_valid=x_test)
print(f"fit          objective {history['objective'][-1]:.1f}, its ELBO {history['elbo'][-1]:.1f} (training)")
print(f"held-out     log p(x) {log_evidence(vae, x_test, num_particles=1000)}")
