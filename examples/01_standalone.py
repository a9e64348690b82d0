"""A whole variational autoencoder in torch and Pyro, without this package: there is no secret.

    python examples/01_standalone.py

Handwritten digits, 8x8 pixels that count 0..16 inked points, so p(x|z) is Binomial(16). Everything that the package
does to a VAE is here once, in its plainest form; the package adds checks, standard errors, pictures and speed.
"""

import sys

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from sklearn.datasets import load_digits
from torch import nn

EPOCHS = 2 if "--smoke" in sys.argv else 60
LATENT_DIM = 2


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 2 * LATENT_DIM))
        self.decoder = nn.Sequential(nn.Linear(LATENT_DIM, 200), nn.ReLU(), nn.Linear(200, 64))

    def p_x(self, z):
        return dist.Binomial(16, logits=self.decoder(z)).to_event(1)

    def q_z(self, x):
        loc, log_scale = self.encoder(x / 16).chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def model(self, x):  # p(x, z) = p(z) p(x | z)
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", self.p_x(z), obs=x)

    def guide(self, x):  # q(z | x)
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q_z(x))


@torch.no_grad()
def log_weights(vae, x, num_particles):
    """The weights log p(x|z) + log p(z) - log q(z|x) for z ~ q(z|x), [K, B]: the ELBO is their mean."""
    q = vae.q_z(x)
    z = q.sample((num_particles,))
    prior = dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1)
    return vae.p_x(z).log_prob(x) + prior.log_prob(z) - q.log_prob(z)


pyro.set_rng_seed(0)
x = torch.tensor(load_digits().data, dtype=torch.float32)
x = x[torch.randperm(len(x))]
train, test = x[:1438], x[1438:]

vae = VAE()
svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), loss=Trace_ELBO())
for epoch in range(1, EPOCHS + 1):
    loss = sum(svi.step(batch) for batch in train[torch.randperm(len(train))].split(64))
    if epoch % 10 == 0 or epoch == EPOCHS:
        log_w = log_weights(vae, test, 100)
        elbo = log_w.mean(0)
        print(
            f"epoch {epoch:2}: training ELBO {-loss / len(train):7.1f}, "
            f"held-out ELBO {elbo.mean():7.1f} ± {elbo.std() / len(test) ** 0.5:.1f} nats per example"
        )
log_px = log_weights(vae, test, 1000).logsumexp(0) - torch.tensor(1000.0).log()
print(f"held-out log p(x) {log_px.mean():.1f} ± {log_px.std() / len(test) ** 0.5:.1f} (K=1000, n={len(test)})")
