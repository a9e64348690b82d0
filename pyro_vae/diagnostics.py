"""Diagnostics: what the latent dimensions of a trained model do, and whether it works at all. Nothing is trained."""

from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from pyro_vae.contracts import untouched
from pyro_vae.estimates import elbo_terms
from pyro_vae.uncertainty import Difference, Estimate, with_error


def kl_per_dimension(vae: Any, x: Tensor, batch_size: int = 1000) -> Tensor:
    r"""The KL of each latent dimension, averaged over the data; exact.

    .. math:: \mathrm{KL}_d = \frac 1 N \sum_n \mathrm{KL}(q(z_d \mid x_n) \,\|\, p(z_d))

    Args:
        vae: a model whose prior and posterior are both diagonal normals.
        x: data, [N, *E].
        batch_size: examples handled at once.

    Returns:
        [D], nats, >= 0; their sum is the KL term of the ELBO.

    Raises:
        ValueError: prior or posterior do not factorise into normals.
    """

    def factors(q: Any, call: str) -> Normal:
        if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
            return q.base_dist
        raise ValueError(
            f"expected diagonal normals, found {call} of type {type(q).__name__}: a KL per dimension exists only where "
            "prior and posterior both factorise; use active_units instead."
        )

    with untouched(vae):
        p = factors(vae.prior(), "prior()")
        total = torch.zeros_like(p.mean)
        for rows in x.split(batch_size):
            total += kl_divergence(factors(vae.encoder(rows), "encoder(x)"), p).sum(0)
    return total / len(x)


def active_units(vae: Any, x: Tensor, threshold: float = 0.01, batch_size: int = 1000) -> Tensor:
    r"""Which latent dimensions carry information about x: those whose posterior mean moves with x.

    .. math:: A_d = \operatorname{Var}_x(\mathbb E_{q(z|x)}[z_d]) > 0.01

    Args:
        vae: a model with an encoder.
        x: data, [N, *E].
        threshold: the variance above which a unit counts as active.
        batch_size: examples handled at once.

    Returns:
        [D], boolean; ``.sum()`` is the number of active units.

    Source: Burda, Grosse, Salakhutdinov (2016), section 5.2, arXiv:1509.00519.
    """
    with untouched(vae):
        means = torch.cat([vae.encoder(rows).mean for rows in x.split(batch_size)])
    return means.var(0, correction=min(1, len(means) - 1)) > threshold  # one example moves nothing


def rate_distortion(vae: Any, x: Tensor, num_particles: int = 10, **settings: Any) -> tuple[Estimate, Estimate]:
    r"""What the code costs and what it leaves unexplained; a sweep of beta draws the curve between them.

    .. math:: R = \mathrm{KL}(q(z|x) \,\|\, p(z)), \qquad D = -\mathbb E_{q(z|x)} \log p(x \mid z), \qquad
        \mathrm{ELBO} = -(R + D)

    Args:
        vae: a model with ``model`` and ``guide``.
        x: data, [N, *E].
        num_particles: number K of draws of z for each example.
        **settings: ``seed``, ``policy``, ``max_elements``, see :func:`pyro_vae.elbo_terms`.

    Returns:
        Estimates of rate and distortion, nats per example, lower is better in each.

    Source: Alemi, Poole, Fischer, Dillon, Saurous, Murphy (2018), Fixing a broken ELBO, arXiv:1711.00464.
    """
    terms = elbo_terms(vae, x, num_particles, **settings)
    distortion = replace(terms["log_px"], name="distortion", values=-terms["log_px"].values)
    return replace(terms["kl"], name="rate"), distortion


@dataclass(frozen=True)
class Health:
    """Whether a VAE uses its code, and whether its networks are alive.

    Args:
        kl: E_q [log q(z|x) - log p(z)] of each example.
        use_of_code: log p(x|z) with each example's own code, less that with the code of another example.
        active: which latent dimensions move with x, [D]; None where the posterior has no mean.
        dead_units: of each layer of ReLUs, the share of units that are 0 for all of x.
        infinite: names of parameters with values that are NaN or infinite.
    """

    kl: Estimate
    use_of_code: Difference
    active: Tensor | None
    dead_units: dict[str, float]
    infinite: tuple[str, ...]

    @property
    def collapsed(self) -> bool:
        """Whether the posterior is the prior: a KL below 0.01 nats, or below that a dimension where none is active."""
        still = self.active is not None and not bool(self.active.any())
        return not self.infinite and self.kl.mean < 0.01 * (len(self.active) if still else 1)  # type: ignore[arg-type]

    @property
    def ignores_code(self) -> bool:
        """Whether the code's use is surely (by four standard errors) less than a tenth of what it costs, the KL."""
        most = self.use_of_code.mean + 4 * self.use_of_code.standard_error
        return not self.infinite and most < 0.1 * max(self.kl.mean, 0.1)

    @property
    def warnings(self) -> list[str]:
        """What is wrong and what to try, one line each; empty for a healthy model."""
        found = []
        if self.infinite:
            found.append(
                f"diverged: {', '.join(self.infinite)} hold NaN or infinite values; lower the learning rate and train "
                "again."
            )
        elif self.collapsed:
            found.append(
                f"posterior collapse: KL = {with_error(self.kl.mean, self.kl.standard_error)} nats, z carries nothing; "
                "raise beta slowly from 0, use fewer latent dimensions or a weaker decoder, or a tighter bound (IWAE)."
            )
        elif self.ignores_code:
            found.append(
                "dead decoder: another example's code serves as well "
                f"({with_error(self.use_of_code.mean, self.use_of_code.standard_error)} nats worse, for a code that "
                f"costs {self.kl.mean:.2f}), so every output is the average of the data; start again with another "
                "seed, a lower learning rate, or wider layers next to z."
            )
        elif self.active is not None and 2 * int(self.active.sum()) < len(self.active):
            found.append(
                f"only {int(self.active.sum())} of {len(self.active)} latent dimensions are active: the others cost "
                "nothing and do nothing; a smaller latent_dim would do as well."
            )
        dead = {name: share for name, share in self.dead_units.items() if share > 0.5}
        if dead:
            layers = ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in dead.items())
            found.append(
                f"dead units: more than half of the ReLUs of {layers} are 0 for all of x; use LeakyReLU or Softplus, a "
                "lower learning rate, or another seed."
            )
        return found

    def __str__(self) -> str:
        return "\n".join(self.warnings) or "healthy: the code is used and the networks are alive"


def health(vae: Any, x: Tensor, *, seed: int = 0, batch_size: int = 1000) -> Health:
    r"""Look for posterior collapse, a decoder that ignores the code, dead units and NaN.

    .. math:: \Delta_n = \mathbb E_{q(z|x_n)} \log p(x_n \mid z) - \mathbb E_{q(z|x_{\pi(n)})} \log p(x_n \mid z)

    with pi a random permutation. A working model loses much with another's code; a dead one, whose every output is the
    average of the data, loses nothing, and neither does a collapsed one.

    Args:
        vae: a model with ``prior``, ``decoder`` and ``encoder``.
        x: data, [N, *E], N >= 2; a thousand examples are plenty.
        seed: seed of the draws and the permutation; the random state outside is untouched.
        batch_size: examples handled at once.

    Returns:
        What was found; ``warnings`` says it in words.

    Raises:
        ValueError: fewer than two examples.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> _ = nn.init.zeros_(vae.decoder.net[0].weight)  # nothing of z comes through
        >>> health(vae, torch.eye(7)).ignores_code
        True
    """
    if len(x) < 2:
        raise ValueError(f"expected at least two examples, found {len(x)}: codes are swapped between them.")
    infinite = tuple(name for name, p in vae.named_parameters() if not bool(p.isfinite().all()))
    fired: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            fires = (output > 0).any(0)
            fired[name] = fired[name] | fires if name in fired else fires

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in vae.named_modules() if isinstance(m, nn.ReLU)]
    gain = []
    try:
        with untouched(vae, seed), pyro.validation_enabled(False):  # a diverged model is to be named, not refused
            prior = vae.prior()
            order = torch.randperm(len(x), device=x.device)
            q = [vae.encoder(rows) for rows in x.split(batch_size)]
            z = torch.cat([part.sample() for part in q])
            log_qz = [part.log_prob(rows) for part, rows in zip(q, z.split(batch_size), strict=True)]
            kl = (torch.cat(log_qz) - prior.log_prob(z)).double()
            other = z[order.roll(1)[order.argsort()]]  # along one cycle: nobody keeps their own
            for rows, own, swapped in zip(*(t.split(batch_size) for t in (x, z, other)), strict=True):
                gain.append((vae.decoder(own).log_prob(rows) - vae.decoder(swapped).log_prob(rows)).double())
    finally:
        for handle in hooks:
            handle.remove()
    try:
        active = active_units(vae, x) if not infinite else None
    except NotImplementedError:  # a posterior whose mean has no formula
        active = None
    dead = {name: 1 - fires.float().mean().item() for name, fires in fired.items()}
    return Health(
        Estimate("KL(q(z|x), p(z))", kl, 1),
        Difference("use of the code", torch.cat(gain)),
        active,
        dead,
        infinite,
    )
