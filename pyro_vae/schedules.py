r"""Schedules: a weight that changes during training, a plain function step -> weight.

A schedule goes where an objective takes a weight: ``Beta(beta=Linear(steps=1000))``. Steps are counted by the objective
(:meth:`pyro_vae.Objective.advance`); evaluating does not count.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Schedule(ABC):
    """A weight that depends on the number of steps taken: a function of a 0-d tensor, without branches on its value."""

    @abstractmethod
    def __call__(self, step: Tensor) -> Tensor:
        """The weight at a step (0 for the first), a 0-d tensor."""


Weight = float | Schedule
"""A number, or a schedule of it."""


def check_weight(name: str, weight: Weight, low: float = 0.0) -> None:
    """Refuse a weight that is neither a schedule nor a number >= low.

    Args:
        name: what messages call it.
        weight: the weight.
        low: the smallest number allowed.

    Raises:
        ValueError: it is below, NaN or infinite.
        TypeError: it is neither a number nor callable.
    """
    if callable(weight):
        return
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"expected {name} to be a number or a schedule step -> weight, found {weight!r:.60}.")
    if not low <= weight < math.inf:
        raise ValueError(f"expected {name} >= {low:g}, found {weight}: give a finite number, or a schedule.")


def _check_steps(steps: int, name: str = "steps", low: int = 1) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < low:
        raise ValueError(f"expected {name} to be an integer >= {low}, found {steps!r}: it counts optimisation steps.")


def _progress(step: Tensor, steps: int) -> Tensor:
    return (step / steps).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Linear(Schedule):
    r"""A straight line from one weight to another, and then the second one: KL warm-up.

    .. math:: w(t) = a + (b - a) \min(1, t / T)

    Args:
        steps: T, how many steps it takes.
        start: a, the weight at step 0.
        stop: b, the weight from step T on.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: steps < 1.

    Source: Bowman et al. (2016), Generating sentences from a continuous space, arXiv:1511.06349; Sønderby et al.
        (2016), Ladder variational autoencoders, arXiv:1602.02282.

    Example:
        >>> Linear(steps=100)(torch.tensor(25))
        tensor(0.2500)
    """

    steps: int = 1000
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def __call__(self, step: Tensor) -> Tensor:
        """The weight at a step."""
        return self.start + (self.stop - self.start) * _progress(step, self.steps)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""Half a cosine wave from one weight to another, and then the second one: slow at both ends.

    .. math:: w(t) = a + (b - a) \, \tfrac 1 2 (1 - \cos(\pi \min(1, t / T)))

    Args:
        steps: T, how many steps it takes.
        start: a, the weight at step 0.
        stop: b, the weight from step T on.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: steps < 1.

    Source: the definition.

    Example:
        >>> Cosine(steps=100)(torch.tensor(50))
        tensor(0.5000)
    """

    steps: int = 1000
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def __call__(self, step: Tensor) -> Tensor:
        """The weight at a step."""
        wave = (1 - torch.cos(math.pi * _progress(step, self.steps))) / 2
        return self.start + (self.stop - self.start) * wave


@dataclass(frozen=True)
class Cyclical(Schedule):
    r"""A straight line up and a plateau, again and again.

    .. math:: w(t) = a + (b - a) \min\!\left(1, \frac{(t \bmod T) / T}{r}\right)

    Each restart of the weight lets the encoder take up more before the KL presses again.

    Args:
        steps: T, the length of one cycle.
        cycles: how many cycles there are; afterwards the weight stays at b.
        rise: r, the part of a cycle in which the weight rises, in (0, 1].
        start: a, the weight at the beginning of each cycle.
        stop: b, the weight at its end.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: steps or cycles < 1, or rise outside (0, 1].

    Source: Fu et al. (2019), Cyclical annealing schedule: a simple approach to mitigating KL vanishing,
        arXiv:1903.10145.

    Example:
        >>> schedule = Cyclical(steps=100, cycles=2)
        >>> [schedule(torch.tensor(step)).item() for step in (0, 25, 50, 99, 100, 250)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 1.0]
    """

    steps: int = 1000
    cycles: int = 4
    rise: float = 0.5
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        _check_steps(self.cycles, "cycles")
        if not 0 < self.rise <= 1:
            raise ValueError(f"expected rise in (0, 1], found {self.rise}: it is the rising part of a cycle.")

    def __call__(self, step: Tensor) -> Tensor:
        """The weight at a step."""
        phase = torch.remainder(step, self.steps) / self.steps
        phase = torch.where(step < self.cycles * self.steps, phase, 1.0)
        return self.start + (self.stop - self.start) * (phase / self.rise).clamp(max=1.0)
