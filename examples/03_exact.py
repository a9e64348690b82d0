"""Where everything can be computed: the ELBO climbs to the known log-evidence, and the gap is the KL to the posterior.

    python examples/03_exact.py

Data from a linear-Gaussian model, a VAE with a linear decoder and encoder. The best parameters and their log p(x) are
known in closed form (probabilistic PCA), so each number has its exact answer beside it.
"""

import sys

import torch
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vae import datasets, elbo_terms, fit, log_evidence
from pyro_vae.exact import LinearGaussian, linear_vae

EPOCHS = 30 if "--smoke" in sys.argv else 300

torch.manual_seed(0)
x = datasets.LinearGaussianData(latent_dim=2, data_dim=7).train.double()
best = LinearGaussian.maximum_likelihood(x, latent_dim=2).log_evidence(x).mean().item()
print(f"best possible mean log p(x) (closed form)   {best:9.4f} nats per example")

vae = linear_vae(latent_dim=2, data_dim=7).double()
for part in range(5):
    fit(vae, x, epochs=EPOCHS // 5, batch_size=100, lr=0.01 / 3**part)
    print(f"  ELBO after {EPOCHS // 5 * (part + 1):3} epochs                     {elbo_terms(vae, x, 100)['elbo']}")

# The trained model is linear-Gaussian too: read its parameters off, and compare with what sampling says.
net, likelihood = vae.decoder.net, vae.decoder.likelihood
trained = LinearGaussian(net.weight.detach(), net.bias.detach(), likelihood.scale.item())
exact = trained.log_evidence(x)
with torch.no_grad():
    q = vae.encoder(x)
elbo = trained.elbo(x, q.mean, torch.diag_embed(q.variance))
gap = kl_divergence(MultivariateNormal(q.mean, torch.diag_embed(q.variance)), trained.posterior(x))

print("\nthe trained model, exact against estimated")
print(f"  log p(x)               {exact.mean():9.4f}   {log_evidence(vae, x, 500)}")
print(f"  ELBO                   {elbo.mean():9.4f}   {elbo_terms(vae, x, 500)['elbo']}")
print(f"  KL(q(z|x), p(z|x))     {gap.mean():9.4f}   = log p(x) - ELBO to {(exact - elbo - gap).abs().max():.0e} nats")
print(f"  left to the optimum    {best - elbo.mean().item():9.4f}")
