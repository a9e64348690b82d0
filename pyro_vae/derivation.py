r"""The evidence lower bound derived, each line printed and evaluated: in exact worlds, or on a VAE of yours.

.. math:: \log p(x) - \mathrm{KL}(q(z|x) \,\|\, p(z|x)) = \mathbb E_q \log p(x \mid z)
    - \mathrm{KL}(q(z|x) \,\|\, p(z))

The lines themselves are in :mod:`pyro_vae.derivation_steps`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pyro_vae import trained_worlds, worlds
from pyro_vae.derivation_steps import STEPS, Line, Step
from pyro_vae.uncertainty import with_error
from pyro_vae.worlds import World

_ROUNDING = 1e-9  # a standard error below it is none


@dataclass(frozen=True)
class Derivation:
    """All lines in one world.

    Args:
        world: where they were evaluated.
        lines: the lines, in order.
    """

    world: World
    lines: tuple[Line, ...]

    @property
    def agrees(self) -> bool:
        """Whether no line disagrees."""
        return all(line.agrees is not False for line in self.lines)

    @property
    def note(self) -> str:
        """How the numbers were found, and for how many examples."""
        return f"{self.world.note}; n={self.world.num_examples} examples, nats per example"

    @property
    def jensen_gap(self) -> tuple[float, float]:
        """What the bound loses, log p(x) - ELBO, and its error; at least that, where log p(x) is known from below."""
        line = next(line for line in self.lines if line.step.relation == ">=")
        return (line.difference or 0.0), line.difference_error

    @property
    def summary(self) -> str:
        """What the lines say together: how many agree, how large the gap is, and what it is."""
        world, (gap, error) = self.world, self.jensen_gap
        verdicts = [line.verdict for line in self.lines]
        text = f"{world.name}: {verdicts.count('agrees')} lines agree, {verdicts.count('DISAGREES')} disagree"
        for verdict, words in (("open", "are open"), ("does not apply", "do not apply")):
            text += f", {verdicts.count(verdict)} {words}" if verdict in verdicts else ""
        text += ". "
        amount = with_error(gap, error) if error > _ROUNDING else f"{gap:.6f}"
        if world.kl_to_posterior is None:
            text += f"The Jensen gap log p(x) - ELBO is at least {amount} nats per example; it is KL(q(z|x) || p(z|x))."
        else:
            kl = f"{world.kl_to_posterior.mean().item():.{len(amount.split()[0].partition('.')[2])}f}"
            text += (
                f"The Jensen gap log p(x) - ELBO is {amount} nats per example; it is KL(q(z|x) || p(z|x)) = {kl}, "
                "the divergence from the true posterior."
            )
        if world.random_gaps is not None and world.gap_at_posterior is not None:
            text += (
                f" For {len(world.random_gaps)} random q it is at least {world.random_gaps.min().item():.3g}; "
                f"for q = p(z|x) it is {world.gap_at_posterior.abs().max().item():.1e}."
            )
        return text

    @property
    def verdict(self) -> str:
        """One line: whether every line that can be judged agrees."""
        wrong = [line.step.key for line in self.lines if line.agrees is False]
        if wrong:
            return f"{', '.join(wrong)} of {self.world.name} disagree"
        return f"{sum(line.agrees is True for line in self.lines)} lines of {self.world.name} agree"

    def to_dict(self) -> dict[str, Any]:
        """The lines as plain Python, for JSON."""
        gap, error = self.jensen_gap
        return {
            "world": self.world.name,
            "note": self.world.note,
            "num_particles": self.world.num_particles if self.world.weight is None else None,
            "num_examples": self.world.num_examples,
            "units": "nats per example",
            "lines": [line.to_dict() for line in self.lines],
            "jensen_gap": gap,
            "jensen_gap_error": error,
            "jensen_gap_is_lower_bound": self.world.log_evidence is None,
            "agrees": self.agrees,
            "summary": self.summary,
        }

    def __str__(self) -> str:
        rows = [f"{self.world.name}: {self.note}"]
        for line in self.lines:
            rows.append(f"{line.step.key:>4}  {line.step.formula}")
            rows.append(f"      {line.step.reason}")
            rows.append(f"      {numbers(line)}")
        return "\n".join([*rows, self.summary])


def lines() -> tuple[Step, ...]:
    """The steps of the derivation, D1 to D15, in order.

    Example:
        >>> for step in lines()[:2]:
        ...     print(step.key, step.formula)
        D1 log p(x) = log ∫ p(x|z) p(z) dz
        D2 KL(q(z|x) || p(z|x)) = ∫ q(z|x) log [q(z|x) / p(z|x)] dz
    """
    return STEPS


def evaluate(
    vae: Any,
    x: Tensor,
    num_particles: int = 1000,
    *,
    seed: int = 0,
    name: str = "",
    policy: str = "",
    max_elements: int = 2**22,
) -> Derivation:
    """Evaluate every line on a VAE and data of yours; see :func:`pyro_vae.trained_worlds.of_vae`.

    Args:
        vae: a VAE with ``prior``, ``decoder`` and ``encoder``; it is not changed.
        x: data, [B, *E].
        num_particles: number K of draws of z for each example.
        seed: seed of the draws; the random state outside is untouched.
        name: what the table is headed with; the name of the VAE's class by default.
        policy: the data policy to carry.
        max_elements: numbers of x handled in one pass; memory is some 20 times their bytes.

    Returns:
        The derivation; print it.

    Raises:
        TypeError: the VAE lacks a part.
        ValueError: num_particles < 2, p(x | z) is not normalised or does not fit x, or q is a point mass.

    Example:
        >>> import torch
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(1), Decoder(Mlp(1, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 2)))
        >>> evaluate(vae, torch.ones(3, 7), num_particles=200).agrees
        True
    """
    world = trained_worlds.of_vae(vae, x, num_particles, seed=seed, max_elements=max_elements)
    note = f"{policy}; {world.note}" if policy else world.note
    return evaluate_in(replace(world, name=name or world.name, note=note))


def evaluate_in(world: World) -> Derivation:
    """Evaluate every line in a world.

    Args:
        world: the world, such as :func:`pyro_vae.worlds.finite`.

    Example:
        >>> evaluate_in(worlds.linear_gaussian()).agrees
        True
    """
    return Derivation(world, tuple(step.evaluate(world) for step in STEPS))


def exact_worlds(seed: int = 0) -> tuple[World, ...]:
    """The worlds where each line holds to rounding: ten states of z, and the linear-Gaussian model."""
    return worlds.finite(seed=seed), worlds.linear_gaussian(seed=seed)


def texts(line: Line) -> tuple[str, str, str]:
    """Left side, right side and difference as text; "unknown" where there is no number."""
    errors = [error for error in (line.left_error, line.right_error) if error > _ROUNDING]

    def side(value: float | None, error: float) -> str:
        if value is None:
            return "unknown"
        if error > _ROUNDING:
            return with_error(value, error)
        decimals = min(max(1 - math.floor(math.log10(min(errors))), 2), 6) if errors else 6
        return f"{value:.{decimals}f}"

    if line.difference is None:
        difference = "unknown"
    elif line.difference_error > _ROUNDING:
        difference = with_error(line.difference, line.difference_error)
    else:
        difference = f"{line.difference:.6f}" if line.step.relation == ">=" else f"{line.difference:.1e}"
    return side(line.left, line.left_error), side(line.right, line.right_error), difference


def numbers(line: Line) -> str:
    """Both sides of a line, their difference and the verdict, as text."""
    left, right, difference = texts(line)
    if line.difference is None:
        known = [f"{name} side {text}" for name, text in (("left", left), ("right", right)) if text != "unknown"]
        return "; ".join([f"{line.verdict}: {line.note}", *known])
    sign = "≥" if line.step.relation == ">=" else "="
    return f"{left} {sign} {right}   difference {difference}   {line.verdict}"
