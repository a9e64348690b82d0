r"""Where the nats between the ELBO and the log-evidence go, and those between training and test data.

.. math:: \log p(x) - \mathcal L[q] = \underbrace{\log p(x) - \mathcal L[q^*]}_{\text{approximation gap}} +
    \underbrace{\mathcal L[q^*] - \mathcal L[q]}_{\text{amortisation gap}}

q* is the best member of the posterior's family for each x by itself, found by refining the encoder's answer.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_vae.contracts import Distribution, untouched
from pyro_vae.supports import require_likelihood
from pyro_vae.uncertainty import Difference, Estimate, paired_difference, with_error


@dataclass(frozen=True)
class GapReport:
    """The gaps between ELBO and log-evidence of each example.

    Args:
        elbo: the ELBO of q(z|x) as the encoder gives it.
        refined: the ELBO of the best member of the family for each example.
        evidence: the log-evidence it is held against; a lower bound of it makes the approximation gap too small.
    """

    elbo: Estimate
    refined: Estimate
    evidence: Estimate

    @property
    def approximation(self) -> Difference:
        """Log p(x) - L[q*]: what no member of the family can reach."""
        return paired_difference(self.evidence, self.refined)

    @property
    def amortisation(self) -> Difference:
        """L[q*] - L[q]: what the encoder, one network for all x, leaves on the table."""
        return paired_difference(self.refined, self.elbo)

    @property
    def total(self) -> Difference:
        """Log p(x) - L[q], the sum of both: KL(q(z|x) || p(z|x))."""
        return paired_difference(self.evidence, self.elbo)

    @property
    def warning(self) -> str:
        """One line where log p(x) as given lies below an ELBO, else nothing."""
        gap = self.approximation
        if not gap.mean < -2 * (gap.standard_error if len(gap.values) > 1 else 0.0):
            return ""
        return (
            f"log p(x) lies {-gap.mean:.2f} nats below the refined ELBO, a lower bound of it: it is underestimated; "
            "use annealed_log_evidence, or quadrature."
        )

    def __str__(self) -> str:
        rows: dict[str, Estimate | Difference] = {
            "ELBO": self.elbo,
            "+ amortisation gap": self.amortisation,
            "+ approximation gap": self.approximation,
            "= log p(x)": self.evidence,
        }
        lines = [f"{k:20} {with_error(v.mean, v.standard_error)} nats" for k, v in rows.items()]
        return "\n".join(lines)


def refine(
    vae: Any,
    x: Tensor,
    num_steps: int = 300,
    num_particles: int = 8,
    lr: float = 0.03,
    *,
    seed: int = 0,
) -> Distribution:
    r"""The best member of the encoder's family for each example, by gradient ascent from the encoder's answer.

    .. math:: q^*(z) = \arg\max_{q \in \mathcal Q} \mathbb E_{z \sim q} [\log p(x, z) - \log q(z)]

    Adam with a step that falls to 0, on the mean and scale of each example; the model is not trained.

    Args:
        vae: a model with ``prior``, ``decoder`` and an encoder that gives a diagonal or full normal.
        x: data, [B, *E]; all of it is refined at once.
        num_steps: steps of Adam.
        num_particles: draws of z for each example and step.
        lr: the first step size.
        seed: seed of the draws; the random state outside is untouched.

    Returns:
        A distribution with batch shape [B], of the encoder's family.

    Raises:
        ValueError: the encoder's family is another one, or a score stands in the place of p(x | z).

    Source: Kim, Wiseman, Miller, Sontag, Rush (2018), Semi-amortized variational autoencoders, arXiv:1802.02550.

    Example:
        >>> from pyro_vae.exact import LinearGaussian
        >>> model = LinearGaussian(torch.eye(3, 2), torch.zeros(3), 0.5)
        >>> vae, x = model.as_vae(), torch.ones(1, 3)
        >>> vae.encoder.net.bias.data[:2] += 1.0  # an encoder that is off
        >>> bool((refine(vae, x).mean - model.posterior(x).mean).abs().max() < 0.05)
        True
    """
    with untouched(vae, seed):
        q = vae.encoder(x)
        prior, free = vae.prior(), _free_parameters(q)
        require_likelihood(vae.decoder(free[0][:1]))
        with torch.enable_grad():
            for parameter in free:
                parameter.requires_grad_()
            optimizer = torch.optim.Adam(free, lr=lr)
            for step in range(num_steps):
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - step / num_steps)
                q = _family(free)
                half = torch.randn(num_particles, *free[0].shape, dtype=x.dtype, device=x.device)
                z = _place(free, torch.cat([half, -half]))  # antithetic pairs: odd parts of the noise cancel
                log_w = vae.decoder(z).log_prob(x) + prior.log_prob(z)
                bound = log_w.mean(0) + q.entropy()
                # Of the free parameters only: the model's would collect gradients that its next training step adds to.
                gradients = torch.autograd.grad(-bound.sum(), free)
                for parameter, gradient in zip(free, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        return _family([parameter.detach() for parameter in free])


def gap_report(
    vae: Any,
    x: Tensor,
    evidence: Estimate,
    num_steps: int = 300,
    num_particles: int = 1000,
    *,
    seed: int = 0,
    max_elements: int = 2**22,
) -> GapReport:
    r"""The approximation and the amortisation gap of each example.

    Both ELBOs are estimated from the same noise, so that their difference is far more certain than either. An example
    whose refined q is not better by two standard errors keeps the encoder's: refined >= amortised for every one.

    Args:
        vae: a model with ``prior``, ``decoder`` and an encoder that gives a diagonal or full normal.
        x: data, [N, *E].
        evidence: log p(x) of the same x: exact, annealed or importance-sampled; its policy is carried.
        num_steps: steps of the refinement.
        num_particles: draws of z for each example in both ELBOs, an even number.
        seed: seed of the draws; the random state outside is untouched.
        max_elements: numbers of x handled in one pass; memory is some 20 times their bytes.

    Returns:
        The report, nats per example.

    Raises:
        ValueError: the encoder's family is no normal, ``evidence`` is about another number of examples, or a score
            stands in the place of p(x | z).

    Source: Cremer, Li, Duvenaud (2018), Inference suboptimality in variational autoencoders, arXiv:1801.03558.

    Example:
        >>> from pyro_vae.exact import LinearGaussian
        >>> model = LinearGaussian(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]), torch.zeros(3), 0.5)
        >>> vae, x = model.as_vae(diagonal=True), torch.ones(5, 3)
        >>> report = gap_report(vae, x, Estimate("log p(x)", model.log_evidence(x), 0))
        >>> abs(report.approximation.mean - model.diagonal_gap()) < 0.05, report.amortisation.mean < 0.05
        (True, True)
    """
    if evidence.num_examples != len(x):
        raise ValueError(
            f"expected evidence of the same {len(x)} examples, found {evidence.num_examples}: estimate log p(x) of x."
        )
    if num_particles < 2 or num_particles % 2:
        raise ValueError(f"expected num_particles to be an even number >= 2, found {num_particles}: they are pairs.")
    numbers = max(1, x[0].numel())
    batch = max(1, min(len(x), 256, max_elements // (16 * numbers)))
    particles = max(1, min(num_particles // 2, max_elements // (batch * numbers)))
    sums = torch.zeros(2, 3, len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), batch):
        rows = slice(start, min(start + batch, len(x)))
        best = refine(vae, x[rows], num_steps, seed=seed + 1 + start)
        with untouched(vae, seed + start):
            q, prior = vae.encoder(x[rows]), vae.prior()
            choices = [_free_parameters(q), _free_parameters(best)]
            for done in range(0, num_particles // 2, particles):
                count = min(particles, num_particles // 2 - done)
                half = torch.randn(count, *choices[0][0].shape, dtype=x.dtype, device=x.device)
                both = []
                for free in choices:
                    pair = []
                    for noise in (half, -half):
                        z = _place(free, noise)
                        log_w = vae.decoder(z).log_prob(x[rows]) + prior.log_prob(z) - _family(free).log_prob(z)
                        pair.append(log_w.double())
                    both.append(torch.stack(pair).mean(0))  # of an antithetic pair: the independent unit
                values = torch.stack([*both, both[1] - both[0]])
                sums[:, :, rows] += torch.stack([values.sum(1), values.square().sum(1)])
    pairs = num_particles // 2
    means, squares = sums / pairs
    errors = ((squares - means.square()).clamp(min=0) / max(pairs - 1, 1)).sqrt()
    better = means[2] > 2 * errors[2]  # less could be the luck of these draws, and taking it a bias
    unknown = pairs == 1
    return GapReport(
        Estimate("ELBO", means[0], num_particles, evidence.policy, None if unknown else errors[0]),
        Estimate(
            "ELBO of the refined q",
            torch.where(better, means[1], means[0]),
            num_particles,
            evidence.policy,
            None if unknown else torch.where(better, errors[1], errors[0]),
        ),
        evidence,
    )


def generalisation_gap(train: Estimate, test: Estimate) -> tuple[float, float]:
    r"""How much better the model does on what it was trained on, and the standard error of that.

    .. math:: \bar v_{\text{train}} - \bar v_{\text{test}}, \qquad
        \mathrm{se}^2 = \mathrm{se}_{\text{train}}^2 + \mathrm{se}_{\text{test}}^2

    Args:
        train: an estimate on training data.
        test: the same kind of estimate, with the same K, on test data.

    Returns:
        The gap and its standard error, nats per example; positive where the model overfits.

    Raises:
        ValueError: the two are different quantities or of different K: bounds of unequal tightness.

    Example:
        >>> train = Estimate("ELBO", torch.tensor([-80.0, -82.0]), 100)
        >>> test = Estimate("ELBO", torch.tensor([-84.0, -86.0]), 100)
        >>> generalisation_gap(train, test)
        (4.0, 1.41421...)
    """
    kinds = [(e.name, e.num_particles, e.method, e.units) for e in (train, test)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"expected two estimates of one kind, found {kinds[0][0]} (K={kinds[0][1]}) and {kinds[1][0]} "
            f"(K={kinds[1][1]}): make both with the same function and settings."
        )
    return train.mean - test.mean, math.hypot(train.standard_error, test.standard_error)


def _free_parameters(q: Distribution) -> list[Tensor]:
    """What is refined: mean and logarithm of the scale, or mean and a factor with the logarithm of its diagonal."""
    base = q.base_dist if isinstance(q, Independent) else q
    if isinstance(base, Normal) and isinstance(q, Independent) and q.reinterpreted_batch_ndims == 1:
        return [base.loc.clone(), base.scale.log()]
    if isinstance(q, MultivariateNormal):
        factor = q.scale_tril
        return [q.loc.clone(), factor.tril(-1) + torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1).log())]
    raise ValueError(
        f"expected an encoder that gives diagonal or full normals, found {type(base).__name__}: the members of other "
        "families are not set by a mean and a scale; compare the ELBO with log_evidence instead."
    )


def _factor(raw: Tensor) -> Tensor:
    return raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())


def _family(free: list[Tensor]) -> Distribution:
    loc, raw = free
    if raw.dim() == loc.dim():
        return dist.Normal(loc, raw.exp()).to_event(1)
    return dist.MultivariateNormal(loc, scale_tril=_factor(raw))


def _place(free: list[Tensor], noise: Tensor) -> Tensor:
    """Standard normal noise [K, B, D] as draws of q."""
    loc, raw = free
    if raw.dim() == loc.dim():
        return loc + raw.exp() * noise
    return loc + (_factor(raw) @ noise.unsqueeze(-1)).squeeze(-1)
