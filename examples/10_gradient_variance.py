"""Gradients through a draw: none, noisy, or quiet; and how noise depends on the form of the bound and on K.

    python examples/10_gradient_variance.py      (three minutes; writes gradient_variance.png)

Forms of one bound have one gradient on average; they differ in variance. Tighter bounds have other gradients, and the
encoder's drowns as K grows, unless it is estimated doubly reparameterised.
"""

import math
import sys

import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_vae import ELBO, IWAE, VAE, Binomial, Decoder, DiagonalNormal, Mlp, StandardNormal, datasets, fit
from pyro_vae.gradient_variance import (
    gradient_variance,
    log_log_slope,
    pathwise_gradients,
    score_gradients,
    signal_to_noise,
    squared_norm_variances,
    tighter_bounds_toy,
)
from pyro_vae.gradients import DReG, ScoreFunction, StickingTheLanding
from pyro_vae.objectives import Objective
from pyro_vae.plot_style import BLUE, GREEN, VERMILION
from pyro_vae.routes import EnergyEntropy, ReconstructionKL
from pyro_vae.uncertainty import with_error

SMOKE = "--smoke" in sys.argv
torch.manual_seed(0)
digits = datasets.Digits()
x, x_test = digits.train.flatten(1).float(), digits.test.flatten(1)
vae = VAE(StandardNormal(2), Decoder(Mlp(2, 64, 64), Binomial(16)), DiagonalNormal(Mlp(64, 64, 2 * 2)))

print("1. sample() and rsample(): the gradient of log p(x | z) that reaches the encoder")
for draw in ("sample", "rsample"):
    vae.zero_grad()
    z = getattr(vae.encode(x_test), draw)()
    vae.decode(z).log_prob(x_test).mean().backward()
    gradients = [p.grad for p in vae.encoder.parameters() if p.grad is not None]
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    print(f"   z = q.{draw + '()':10} {f'a gradient of norm {norm:.1f}' if gradients else 'None'}")

print("\n2. the gradient of E |z|^2 in m_1, z ~ N(m, I), at m = 0: variances, measured and exact")
num, dims = (2000, [1, 10]) if SMOKE else (200_000, [1, 2, 5, 10, 20, 50])
measured = {}
for d in dims:
    loc = torch.zeros(d, dtype=torch.float64)
    draws = {
        "pathwise": pathwise_gradients(lambda z: z.square().sum(-1), loc, num),
        "score function": score_gradients(lambda z: z.square().sum(-1), loc, num),
        "score function, baseline E f": score_gradients(lambda z: z.square().sum(-1), loc, num, baseline=d),
    }
    for name, exact in squared_norm_variances(d).items():
        variance = draws[name].var(0)  # every m_i has the same
        measured.setdefault(name, []).append(variance.mean().item())
        print(f"   d = {d:2}  {name:30} {variance.mean():10.2f}   exact {exact:7.0f}")

print("\n3. forms of the same bound, on a VAE of the digits after some epochs: one gradient, another noise")
torch.manual_seed(0)
fit(vae, x, epochs=1 if SMOKE else 20, batch_size=64)
forms = {
    "ELBO()": ELBO(),
    "ReconstructionKL()": ReconstructionKL(),
    "EnergyEntropy()": EnergyEntropy(),
    "StickingTheLanding()": StickingTheLanding(),
    "pyro Trace_ELBO()": Trace_ELBO(),
    "pyro TraceMeanField_ELBO()": TraceMeanField_ELBO(),
    "ELBO(num_particles=8)": ELBO(num_particles=8),
    "ScoreFunction(8)": ScoreFunction(8),
    "ScoreFunction(8, baseline='none')": ScoreFunction(8, baseline="none"),
}
batch, repeats = x_test[:64], 10 if SMOKE else 300
noise = {}
print(f"   {'':35}value, nats per example{'encoder: variance':>18}{'signal / noise':>20}{'decoder: variance':>24}")
for name, form in forms.items():
    moments = gradient_variance(form, vae, batch, repeats)
    noise[name] = encoder = moments["encoder"]
    with torch.no_grad():
        if isinstance(form, Objective):
            values = torch.stack([form.bound(vae.model, vae.guide, batch).mean() for _ in range(repeats)])
        else:
            values = torch.tensor([-form.loss(vae.model, vae.guide, batch) / len(batch) for _ in range(repeats)])
    print(
        f"   {name:35}{values.mean():8.2f} ± {values.std() / math.sqrt(repeats):.2f}"
        f"{with_error(encoder.total_variance, encoder.total_variance_error):>24}"
        f"{with_error(encoder.signal_to_noise, encoder.signal_to_noise_error):>20}"
        f"{with_error(moments['decoder'].total_variance, moments['decoder'].total_variance_error):>24}"
    )

print("\n4. signal to noise against the number of particles K (a Gaussian model, close to its optimum)")
toy, x_toy = tighter_bounds_toy(dim=5, num_examples=40, distance=0.05)
sizes, repeats = ([2, 8], 10) if SMOKE else ([1, 4, 16, 64, 256, 1024], 150)
iwae = [gradient_variance(IWAE(num_particles=k), toy, x_toy, repeats, seed=1) for k in sizes]
dreg = [gradient_variance(DReG(num_particles=k), toy, x_toy, repeats, seed=2) for k in sizes]
curves = {
    "model, IWAE": [(m["prior"].signal_to_noise, m["prior"].signal_to_noise_error) for m in iwae],
    "encoder, IWAE": [signal_to_noise(b["encoder"], a["encoder"]) for a, b in zip(iwae, dreg, strict=True)],
    "encoder, DReG": [(m["encoder"].signal_to_noise, m["encoder"].signal_to_noise_error) for m in dreg],
}
slopes = {}
for name, points in curves.items():
    late = [(k, *p) for k, p in zip(sizes, points, strict=True) if SMOKE or k >= 16]
    slopes[name] = log_log_slope(*zip(*late, strict=True)) if all(p[1] > 0 for p in late) else (math.nan, math.nan)
    print(f"   {name:14} slope {slopes[name][0]:+.3f} ± {slopes[name][1]:.3f} from K = {late[0][0]} on")

figure = Figure(figsize=(15.5, 4.6), layout="constrained")
left, middle, right = figure.subplots(1, 3)
looks = [(BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "^", "-.")]
axis = torch.linspace(dims[0], dims[-1], 100).tolist()
for (name, points), (colour, marker, dash) in zip(measured.items(), looks, strict=True):
    left.plot(axis, [squared_norm_variances(d)[name] for d in axis], color=colour, ls=dash, lw=1.2)
    left.plot(dims, points, color=colour, marker=marker, ls="", label=name)
left.set(xscale="log", yscale="log", xlabel="dimension d of z", ylabel="variance of the gradient in $m_1$")
left.set_title("gradient of E |z|²: measured, and exact (lines)", fontsize=11)
left.legend(frameon=False, fontsize=9)

names = list(noise)
where = range(len(names))
values, errors = [noise[n].total_variance for n in names], [noise[n].total_variance_error for n in names]
middle.errorbar(values, where, xerr=errors, color=BLUE, marker="o", ls="", capsize=3)
for i, (value, error) in enumerate(zip(values, errors, strict=True)):
    left_side = value > 1e5
    middle.annotate(
        with_error(value, error),
        (value, i),
        xytext=(-8 if left_side else 8, 0),
        textcoords="offset points",
        ha="right" if left_side else "left",
        va="center",
        fontsize=8,
    )
middle.set_yticks(where, labels=names, fontsize=9)
middle.invert_yaxis()
middle.grid(axis="both", color="0.9", lw=0.8)
middle.set(xscale="log", xlabel="total variance of the encoder's gradient\n(nats per example per unit of weight)²")
middle.set_title("forms of one bound, digits", fontsize=11)

for (name, points), (colour, marker, dash) in zip(curves.items(), looks, strict=True):
    values, errors = zip(*points, strict=True)
    label = f"{name}: slope {slopes[name][0]:+.2f} ± {slopes[name][1]:.2f}"
    right.errorbar(sizes, values, yerr=errors, color=colour, marker=marker, ls=dash, capsize=3, label=label)
right.set(xscale="log", yscale="log", xlabel="particles K", ylabel="signal-to-noise ratio of the gradient")
right.set_ylim(top=8 * max(p[0] for points in curves.values() for p in points))
right.set_title("tighter bounds drown the encoder's gradient", fontsize=11)
right.legend(frameon=False, fontsize=9, loc="upper left")
figure.savefig("gradient_variance.png", dpi=150)
print("wrote gradient_variance.png")
