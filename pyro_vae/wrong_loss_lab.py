r"""What becomes of a model that is trained with a post's loss: the right one and each wrong one, on the same data.

The networks, their first weights, the data, its order and the budget are the same in every row; only the objective
differs. The numbers are not the losses, which have no common unit, but measured on held-out pictures:

.. math:: \bar s, \quad \big(\operatorname{Var}_x m + \mathbb E_x s^2\big)^{1/2}, \quad \mathrm{KL}(q(z|x) \| N(0, I)),
    \quad \mathrm{SSE}, \quad \mathrm{ELBO}, \quad 2 \mathbb E \|X - Y\| - \mathbb E \|X - X'\| - \mathbb E \|Y - Y'\|
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from pyro_vae import likelihoods
from pyro_vae.contracts import untouched
from pyro_vae.decoders import Decoder
from pyro_vae.encoders import DiagonalNormal
from pyro_vae.estimates import elbo_terms
from pyro_vae.initialization import set_output_bias
from pyro_vae.layers import Standardize
from pyro_vae.networks import Mlp
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.printed_loss import PrintedLoss
from pyro_vae.priors import StandardNormal
from pyro_vae.training import fit
from pyro_vae.uncertainty import with_error
from pyro_vae.vae import VAE
from pyro_vae.wrong_losses import LOSSES, GreyCrossEntropy, SummedSquares

RIGHT = "ELBO"
OBJECTIVES: dict[str, Objective] = {
    RIGHT: ELBO(),
    **{family.__name__: family() for family in LOSSES},
    "ReconstructionOnly": SummedSquares(1.0, 0.0),
    "KLOnly": SummedSquares(0.0, 1.0),
}


class Pictures(NamedTuple):
    """Grey pictures between 0 and 1, as rows of numbers.

    ``x`` [N, E] and ``x_test`` [M, E]; their labels, or None; the picture's shape (H, W); the data policy.
    """

    x: Tensor
    x_test: Tensor
    labels: Tensor | None
    labels_test: Tensor | None
    shape: tuple[int, int]
    policy: str


def grey_pictures(data: Any) -> Pictures:
    """The pictures of a data set as grey values between 0 and 1.

    Args:
        data: a :class:`pyro_vae.datasets.DataSet` of pictures with one channel: bytes or grey values (divided by their
            largest value, 16 for the embedded digits).

    Raises:
        ValueError: it holds no pictures with one channel.
    """
    if data.test.dim() != 4 or data.test.shape[1] != 1:
        raise ValueError(
            f"expected pictures with one channel [N, 1, H, W], found {tuple(data.test.shape)}: choose another data set."
        )
    x, x_test = data.prepare(data.train).flatten(1), data.test.flatten(1)
    largest = max(1.0, float(x.max()))
    policy = data.policy if largest == 1 else f"{data.policy}; divided by {largest:g}"
    height, width = data.test.shape[2:]
    return Pictures(x / largest, x_test / largest, data.train_labels, data.test_labels, (height, width), policy)


@dataclass(frozen=True)
class Result:
    """What one objective led to; numbers about held-out pictures.

    Args:
        name: the objective's name.
        beta: its effective beta; NaN where the decoder's scale was learned.
        loss: the objective as printed, per example, at the end of training.
        scale: mean posterior scale s.
        spread: standard deviation of z over pictures and noise, (Var m + E s^2)^(1/2), root mean square over z's axes.
        kl: KL(q(z|x) || N(0, I)), nats per example.
        squared_error: sum of squared errors of the mean of p(x|z), z ~ q(z|x), per example.
        cross_entropy: sum of binary cross-entropies of the grey pixels, likewise (what several posts report).
        mean_image_error: the squared error for the mean of the training pictures, for every x.
        thresholded: share of the grey pixels (between 0.2 and 0.8) that a reconstruction draws as 0 or 1, to 0.01.
        elbo: the ELBO with the decoder's scale refitted to its mean squared error, nats per example.
        elbo_error: its standard error.
        decoder_scale: that scale.
        distance: energy distance of decoded prior draws from the held-out pictures; 0 only if equally distributed.
        accuracy: share of held-out z whose ten nearest training z vote for the right label; NaN without labels.
        x_hat: reconstructions of the first held-out pictures, [n, E].
        samples: means of p(x|z) at prior draws, [n, E].
        z: draws of q(z|x) of the held-out pictures, [M, D].
    """

    name: str
    beta: float
    loss: float
    scale: float
    spread: float
    kl: float
    squared_error: float
    cross_entropy: float
    mean_image_error: float
    thresholded: float
    elbo: float
    elbo_error: float
    decoder_scale: float
    distance: float
    accuracy: float
    x_hat: Tensor = field(repr=False)
    samples: Tensor = field(repr=False)
    z: Tensor = field(repr=False)

    @property
    def verdict(self) -> str:
        """What happened, read off the numbers alone."""
        if self.kl < 0.01:
            return "nothing is encoded: every picture gets the same reconstruction"
        if self.scale < 0.05:
            return "no noise is left: a plain autoencoder"
        if self.thresholded > 0.5:
            return f"{100 * self.thresholded:.0f} % of the grey pixels are drawn black or white"
        if not 0.8 < self.spread < 1.5:
            return f"z is spread with {self.spread:.2f}, the prior with 1: samples miss the codes"
        return ""

    def summary(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON; NaN is None."""
        numbers = {k: v for k, v in vars(self).items() if not isinstance(v, Tensor)}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        return {**finite, "verdict": self.verdict}


def make_vae(pictures: Pictures, latent_dim: int = 2, hidden: int = 128, learn_scale: bool = False) -> VAE:
    """The model of every row: a normal decoder whose mean is a sigmoid, started at the mean image.

    Args:
        pictures: the data.
        latent_dim: number of latent dimensions D.
        hidden: width of the one hidden layer in either network.
        learn_scale: learn the decoder's scale, as the right loss does; else it is 0.7071, as in "sum of squares + KL".
    """
    x = pictures.x
    net = Mlp(latent_dim, hidden, x.shape[1])
    set_output_bias(net, x.mean(0).clamp(0.01, 0.99).logit())
    likelihood = likelihoods.Normal(0.3 if learn_scale else math.sqrt(0.5), learn_scale)
    standardize = Standardize(x.mean(), x.std())
    encoder = DiagonalNormal(nn.Sequential(standardize, Mlp(x.shape[1], hidden, 2 * latent_dim)))
    return VAE(StandardNormal(latent_dim), Decoder(nn.Sequential(net, nn.Sigmoid()), likelihood), encoder)


def run(
    pictures: Pictures,
    objectives: Mapping[str, Objective] = OBJECTIVES,
    *,
    latent_dim: int = 2,
    hidden: int = 128,
    epochs: int = 60,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    num_particles: int = 20,
    progress: bool = False,
) -> list[Result]:
    """Train one model with each objective, on the same data with the same budget, and measure all alike.

    Args:
        pictures: the data.
        objectives: name -> objective; :class:`PrintedLoss` or any other of this library.
        latent_dim: number of latent dimensions D.
        hidden: width of the networks' hidden layer.
        epochs: passes over the data.
        batch_size: examples a step.
        lr: learning rate.
        seed: seed of the first weights, the order of the data and the draws: the same in each row.
        num_particles: draws of z for each held-out picture in the ELBO.
        progress: show progress bars on a terminal.

    Returns:
        One result for each objective.
    """
    results = []
    with torch.random.fork_rng():
        for name, objective in objectives.items():
            torch.manual_seed(seed)
            wrong = isinstance(objective, PrintedLoss)
            vae = make_vae(pictures, latent_dim, hidden, learn_scale=not wrong)
            settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "progress": progress}
            history = fit(vae, pictures.x, objective=objective, **settings)
            sizes = batch_size, pictures.x.shape[1], latent_dim
            beta = objective.effective_beta(*sizes) if isinstance(objective, PrintedLoss) else math.nan
            results.append(measure(vae, pictures, name, beta, -history["objective"][-1], num_particles))
    return results


def measure(
    vae: VAE, pictures: Pictures, name: str, beta: float = math.nan, loss: float = math.nan, num_particles: int = 20
) -> Result:
    """Measure a trained model of :func:`make_vae` on the held-out pictures; its decoder's scale is refitted.

    Args:
        vae: the model.
        pictures: the data.
        name: what to call it.
        beta: the effective beta it was trained with.
        loss: the loss it ended with.
        num_particles: draws of z for each held-out picture in the ELBO.
    """
    x, x_test = pictures.x, pictures.x_test
    with untouched(vae, seed=0):
        error = (vae.reconstruct(x, sample=True) - x).square().mean()
        vae.decoder.likelihood.log_scale.fill_(0.5 * error.log())  # type: ignore[attr-defined]  # of make_vae
        q: Any = vae.encoder(x_test)
        z, z_train = q.rsample(), vae.encoder(x).rsample()
        prior = Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
        samples = vae.decode(vae.prior().sample((len(x_test),))).mean
        x_hat, decoded = vae.reconstruct(x_test), vae.decode(z).mean
        spread = (q.mean.var(0) + q.variance.mean(0)).mean().sqrt()
        elbo = elbo_terms(vae, x_test, num_particles)["elbo"]
        return Result(
            name=name,
            beta=beta,
            loss=loss,
            scale=q.stddev.mean().item(),
            spread=spread.item(),
            kl=kl_divergence(q.base_dist, prior).sum(-1).mean().item(),
            squared_error=(decoded - x_test).square().sum(-1).mean().item(),
            cross_entropy=GreyCrossEntropy.distance(x_test, decoded).sum(-1).mean().item(),
            mean_image_error=(x.mean(0) - x_test).square().sum(-1).mean().item(),
            thresholded=((x_hat - 0.5).abs() > 0.49)[(x_test - 0.5).abs() < 0.3].float().mean().item(),
            elbo=elbo.mean,
            elbo_error=elbo.standard_error,
            decoder_scale=error.sqrt().item(),
            distance=energy_distance(samples, x_test).item(),
            accuracy=_accuracy(z_train, pictures.labels, z, pictures.labels_test),
            x_hat=x_hat[:20],
            samples=samples[:20],
            z=z,
        )


def energy_distance(a: Tensor, b: Tensor, most: int = 2000) -> Tensor:
    r"""How far two sets of pictures are from being draws of one distribution.

    .. math:: 2 \mathbb E \|X - Y\| - \mathbb E \|X - X'\| - \mathbb E \|Y - Y'\| \ge 0

    Args:
        a: draws of one, [N, E].
        b: draws of the other, [M, E].
        most: how many of each are used.

    Returns:
        A scalar, in the unit of x; on average 0 for equal distributions.

    Source: Székely, Rizzo (2013), Energy statistics: a class of statistics based on distances.

    Example:
        >>> energy_distance(torch.zeros(3, 1), torch.ones(2, 1))
        tensor(2.)
    """
    a, b = a[:most], b[:most]

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return 2 * torch.cdist(a, b).mean() - within(a) - within(b)


def _accuracy(z: Tensor, labels: Tensor | None, z_test: Tensor, labels_test: Tensor | None, most: int = 5000) -> float:
    """Share of test codes whose ten nearest training codes vote for the right label."""
    if labels is None or labels_test is None:
        return math.nan
    nearest = torch.cdist(z_test[:most], z[:most]).topk(10, largest=False).indices
    votes = labels[:most][nearest].mode(1).values
    return (votes == labels_test[:most]).float().mean().item()


def table(results: Sequence[Result], pictures: Pictures) -> str:
    """The numbers as text: a line for each objective, and a line for each that went wrong.

    Args:
        results: what :func:`run` returned.
        pictures: the data.
    """
    columns = {"beta": 9, "mean s": 9, "spread z": 10, "KL": 8, "SSE": 8, "BCE": 8, "samples": 9, "kNN": 6}
    head = f"{'trained with':20}" + "".join(f"{name:>{width}}" for name, width in columns.items())
    lines = [
        f"{pictures.policy}; means over {len(pictures.x_test)} held-out pictures",
        "",
        f"{head}   ELBO, nats per example",
    ]
    for r in results:
        beta = "sigma" if math.isnan(r.beta) else f"{r.beta:.4g}"
        lines.append(
            f"{r.name:20}{beta:>9}{r.scale:>9.4f}{r.spread:>10.2f}{r.kl:>8.3f}{r.squared_error:>8.2f}{r.cross_entropy:>8.2f}"
            f"{r.distance:>9.3f}{r.accuracy:>6.2f}   {with_error(r.elbo, r.elbo_error)}"
        )
    lines += [
        "",
        "beta: weight of the KL for sums of squares (or cross-entropies); sigma: none, the decoder's scale is learned",
        "spread z: standard deviation of z over pictures and noise; the prior's is 1",
        f"SSE, BCE: summed squared errors and cross-entropies at z ~ q(z|x); SSE of the mean image: "
        f"{results[0].mean_image_error:.2f}",
        "samples: energy distance of decoded draws of N(0, I) from the pictures; kNN: labels voted by 10 neighbours",
        "ELBO: with the decoder's sigma refitted in each row, so that all are about one x in one unit",
        "",
    ]
    lines += [f"{r.name:20}{r.verdict}" for r in results if r.verdict]
    return "\n".join(lines)


def explanations(objectives: Mapping[str, Objective] = OBJECTIVES) -> str:
    """Who prints each loss, what is wrong with it, and what it really optimises, as text.

    Args:
        objectives: name -> objective; those that no post prints are left out.
    """
    words = [
        f"{name} (printed by: {loss.post})\n  wrong   {loss.wrong}\n  really  {loss.really}"
        for name, loss in objectives.items()
        if isinstance(loss, PrintedLoss) and not isinstance(loss, SummedSquares)
    ]
    return "\n".join(words)
