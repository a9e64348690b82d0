"""Does a captured step learn as well? Held-out ELBO on the digits, captured less eager, paired over seeds.

    python tests/benchmarks/learned_quality.py      (some three minutes on one core)

With one noise the two must agree up to rounding; with noise of their own, up to chance. Odd seeds are replayed, even
ones compiled.
"""

import torch

from pyro_vae import VAE, Binomial, Decoder, DiagonalNormal, Estimate, Mlp, StandardNormal, datasets, elbo, fit
from pyro_vae.uncertainty import with_error

SEEDS = range(200, 210)


def learn(seed: int, noise: int, compiled: bool | str) -> Estimate:
    digits = datasets.Digits()
    torch.manual_seed(seed)
    vae = VAE(StandardNormal(2), Decoder(Mlp(2, 64, 64), Binomial(16)), DiagonalNormal(Mlp(64, 64, 4)))
    torch.manual_seed(noise)
    fit(vae, digits.train.flatten(1).float(), epochs=60, batch_size=64, compiled=compiled)
    return elbo(vae, digits.test.flatten(1).float(), 200, seed=1)


def main() -> None:
    rows = []
    for seed in SEEDS:
        captured = learn(seed, seed + 1000, "replay" if seed % 2 else True).mean
        same, other = learn(seed, seed + 1000, False).mean, learn(seed, seed + 5000, False).mean
        rows.append([captured - same, captured - other])
        print(
            f"seed {seed}: same noise {rows[-1][0]:+.3f}, other noise {rows[-1][1]:+.2f} nats per example", flush=True
        )
    for name, values in zip(("same noise", "other noise"), torch.tensor(rows).T, strict=True):
        error = values.std().item() / len(values) ** 0.5
        print(f"{name}: captured less eager {with_error(values.mean().item(), error)} nats per example")


if __name__ == "__main__":
    main()
