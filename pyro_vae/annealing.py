r"""The log-evidence by annealed importance sampling, from below; and from above too on data that the model made.

Between a start p_0(z), the prior or q(z|x), and the posterior lie the densities

.. math:: f_t(z) = p_0(z)^{1 - \beta_t} \, p(x, z)^{\beta_t}, \qquad 0 = \beta_0 < \dots < \beta_T = 1

A chain that visits each by Hamiltonian Monte Carlo has the weight
:math:`w = \prod_t f_t(z_{t-1}) / f_{t-1}(z_{t-1})`, whose mean is p(x) exactly, however badly the chain mixes; so the
logarithm of an average of weights is on average too low, by less the longer the chain. Run backwards from an exact
draw of the posterior, the same chain estimates 1 / p(x) and bounds log p(x) from above.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import tails
from pyro_vae.contracts import untouched
from pyro_vae.dry_run import check_vae
from pyro_vae.passes import at_once, even, replayed
from pyro_vae.replays import Replay
from pyro_vae.supports import elements, plain_support, require_likelihood
from pyro_vae.uncertainty import Estimate

Schedule = Callable[[int], Tensor]
State = tuple[Tensor, ...]  # z, then what _Path.evaluate gives there

TARGET_ACCEPTANCE = 0.65
_PILOT_CHAINS = 4
_PILOT_MOVES = 100  # at least, so that short schedules are tuned too; a fifth more at the first temperature


def linear_schedule(num_temperatures: int) -> Tensor:
    """Equal steps from 0 to 1, [T + 1]."""
    return torch.linspace(0, 1, num_temperatures + 1, dtype=torch.float64)


def sigmoidal_schedule(num_temperatures: int) -> Tensor:
    r"""Small steps at both ends, [T + 1]: the logistic function on [-4, 4], scaled to run from 0 to 1.

    Source: Grosse, Ghahramani, Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo,
        arXiv:1511.02543.
    """
    s = torch.sigmoid(4 * torch.linspace(-1, 1, num_temperatures + 1, dtype=torch.float64))
    return (s - s[0]) / (s[-1] - s[0])


@dataclass(frozen=True)
class Sandwich:
    """The log-evidence of data that the model made, from below and from above.

    Args:
        lower: on average at most log p(x).
        upper: on average at least log p(x); over the examples only, and without a Monte-Carlo error, since the chains
            of an example all start at the z that made it.
        x: the data, [N, *E].
        acceptance: share of accepted moves of each example, [N].
    """

    lower: Estimate
    upper: Estimate
    x: Tensor
    acceptance: Tensor

    @property
    def gap(self) -> float:
        """The mean of upper - lower, nats: on average at least what is wrong with either."""
        return (self.upper.values - self.lower.values).mean().item()

    def __str__(self) -> str:
        difference = self.upper.values - self.lower.values
        error = (difference.std() / math.sqrt(len(difference))).item()
        return (
            f"{self.lower.mean:.2f} .. {self.upper.mean:.2f} nats per example, gap {self.gap:.3f} ± {error:.3f} "
            f"(bounds on average over draws, not for each example: n={len(difference)} examples that the model made)"
        )


def annealed_log_evidence(
    vae: Any,
    x: Tensor,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    leapfrog_steps: int = 10,
    *,
    from_encoder: bool = False,
    schedule: Schedule = sigmoidal_schedule,
    seed: int = 0,
    policy: str = "",
    max_elements: int | None = None,
    compiled: bool | None = None,
) -> Estimate:
    r"""The log-evidence log p(x) by annealed importance sampling with Hamiltonian Monte Carlo.

    .. math:: \log \hat p(x) = \log \frac 1 C \sum_{c=1}^C \prod_{t=1}^T
        \left( \frac{p(x, z_{c,t-1})}{p_0(z_{c,t-1})} \right)^{\beta_t - \beta_{t-1}}

    On average a lower bound on log p(x), usually far tighter than importance sampling at equal cost where q(z|x) is
    poor, since it needs q only as a start, or not at all. Each example has its own step size at each temperature, tuned
    towards 65 % accepted moves by a pilot run of four chains and then frozen: tuning on the chains that count would
    bias their weights. T = 1 is plain importance sampling.

    Args:
        vae: a model with ``prior`` and ``decoder`` (and ``encoder`` for ``from_encoder``), z in R^D.
        x: data, [N, *E].
        num_chains: number C of independent chains for each example.
        num_temperatures: number T of steps from the start to the posterior.
        leapfrog_steps: steps of each Hamiltonian trajectory; the cost is C T times as many decoder gradients.
        from_encoder: start at q(z|x) instead of the prior.
        schedule: T -> the betas, [T + 1], from 0 to 1.
        seed: seed of the draws; the random state outside is untouched.
        policy: the data policy to carry.
        max_elements: numbers of x handled in one pass, C included; memory is some 30 times their bytes. None: what
            suits the device.
        compiled: record the density's gradient and compile it; see :func:`log_evidence`.

    Returns:
        An estimate, nats per example, higher is better; its Monte-Carlo error is from the spread over the chains.

    Raises:
        ValueError: z is not on R^D, p(x|z) is a score, an argument below 1, a schedule that does not rise from 0 to 1.
        TypeError: ``vae`` lacks a piece.

    Source: Neal (2001), Annealed importance sampling, arXiv:physics/9803008; for VAEs Wu, Burda, Salakhutdinov, Grosse
        (2017), On the quantitative analysis of decoder-based generative models, arXiv:1611.04273.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> print(annealed_log_evidence(vae, torch.ones(5, 7), num_chains=3, num_temperatures=10, leapfrog_steps=2))
        -... ± ... nats per example (AIS: 3 chains, T=10, 2 leapfrog steps, from the prior, n=5)
    """
    betas = _check(vae, x, num_chains, num_temperatures, leapfrog_steps, from_encoder, schedule)
    log_w = []
    with untouched(vae, seed):
        for _, path in _paths(vae, x, num_chains, from_encoder, betas, leapfrog_steps, max_elements, compiled):
            step_sizes = path.pilot(min(num_chains, _PILOT_CHAINS))
            log_w.append(path.forward(path.start(num_chains), step_sizes)[0])
    return _estimate(torch.cat(log_w, 1), num_temperatures, leapfrog_steps, from_encoder, policy)


def sandwich(
    vae: Any,
    num_examples: int = 100,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    leapfrog_steps: int = 10,
    *,
    from_encoder: bool = False,
    schedule: Schedule = sigmoidal_schedule,
    seed: int = 0,
    max_elements: int | None = None,
    compiled: bool | None = None,
) -> Sandwich:
    r"""Bounds from both sides on the log-evidence of data that the model made: bidirectional Monte Carlo.

    .. math:: z \sim p(z), \; x \sim p(x \mid z): \qquad
        \mathbb E \log \hat p(x) \;\le\; \log p(x) \;\le\; \mathbb E \left[ -\log \widehat{1 / p(x)} \right]

    The z that made x is an exact draw of its posterior, from which the chain can be run backwards. A small gap shows
    that the chain is long enough for such data; for real data it is evidence, not proof.

    Args:
        vae: a model with ``prior`` and ``decoder`` (and ``encoder`` for ``from_encoder``), z in R^D.
        num_examples: how many examples N to make.
        num_chains: number C of chains in each direction for each example.
        num_temperatures: number T of steps between the start and the posterior.
        leapfrog_steps: steps of each Hamiltonian trajectory.
        from_encoder: start at q(z|x) instead of the prior.
        schedule: T -> the betas, [T + 1], from 0 to 1.
        seed: seed of the data and the draws; the random state outside is untouched.
        max_elements: numbers of x handled in one pass, C included; memory is some 30 times their bytes. None: what
            suits the device.
        compiled: record the density's gradient and compile it; see :func:`log_evidence`.

    Returns:
        The two bounds, the data made, the share of accepted moves.

    Raises:
        ValueError: z is not on R^D, p(x|z) is a score, an argument below 1, a schedule that does not rise from 0 to 1.
        TypeError: ``vae`` lacks a piece.

    Source: Grosse, Ghahramani, Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo,
        arXiv:1511.02543; Wu, Burda, Salakhutdinov, Grosse (2017), arXiv:1611.04273.

    Example:
        >>> from pyro_vae.exact import LinearGaussian
        >>> model = LinearGaussian(torch.eye(3, 2), torch.zeros(3), 0.5)
        >>> found = sandwich(model.as_vae(), num_examples=50, num_chains=5, num_temperatures=30, leapfrog_steps=3)
        >>> bool(found.lower.mean < model.log_evidence(found.x).mean() + 0.05 < found.upper.mean + 0.1)
        True
    """
    if not isinstance(num_examples, int):
        raise TypeError(
            f"expected num_examples, how many examples the model shall make, found {type(num_examples).__name__}: the "
            "upper bound needs exact draws of the posterior, which only such examples have; for data of yours use "
            "annealed_log_evidence."
        )
    if num_examples < 1:
        raise ValueError(f"expected num_examples >= 1, found {num_examples}: make at least one.")
    _require(vae, "prior", "decoder")
    with untouched(vae, seed):
        z = vae.prior().sample((num_examples,))
        p = vae.decoder(z)
        require_likelihood(p)
        x = p.sample()
        betas = _check(vae, x, num_chains, num_temperatures, leapfrog_steps, from_encoder, schedule)
        lower, upper, shares = [], [], []
        for rows, path in _paths(vae, x, num_chains, from_encoder, betas, leapfrog_steps, max_elements, compiled):
            step_sizes = path.pilot(min(num_chains, _PILOT_CHAINS))
            below, share = path.forward(path.start(num_chains), step_sizes)
            above, back = path.backward(z[rows].expand(num_chains, *z[rows].shape), step_sizes)
            lower.append(below)
            upper.append(-above)
            shares.append((share + back) / 2)
    settings = (num_temperatures, leapfrog_steps, from_encoder, "data drawn from the model")
    high = _estimate(torch.cat(upper, 1), *settings)
    return Sandwich(
        _estimate(torch.cat(lower, 1), *settings),
        # The chains of an example start at the one z that made it, so their spread is not the error: it has none.
        Estimate("upper bound on log p(x)", -high.values, num_chains, high.policy, method=high.method),
        x,
        torch.cat(shares),
    )


class _Path:
    """The annealed densities of some examples, and how to walk along them."""

    def __init__(
        self,
        vae: Any,
        x: Tensor,
        from_encoder: bool,
        betas: Tensor,
        leapfrog_steps: int,
        record: Callable[[Tensor, Tensor], Replay | None] = lambda x, z: None,
    ):
        self.record = record  # x, z -> the densities at such shapes, recorded
        self.recorded: dict[torch.Size, Callable[..., tuple[Tensor, ...]] | None] = {}  # by the shape of z
        self.prior, self.decoder, self.x = vae.prior(), vae.decoder, x
        self.base = vae.encoder(x) if from_encoder else self.prior
        self.from_encoder, self.betas, self.leapfrog_steps = from_encoder, betas.tolist(), leapfrog_steps

    def start(self, num_chains: int) -> Tensor:
        """Draws of the start, [C, B, D]."""
        return self.base.sample((num_chains,) if self.from_encoder else (num_chains, len(self.x)))

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At z [C, B, D]: log p_0(z), log p(x, z) / p_0(z), each [C, B], and their gradients.

        All temperatures are combinations of the two, so a new temperature costs nothing.
        """
        if z.shape not in self.recorded:
            replay = self.record(self.x, z)
            self.recorded[z.shape] = None if replay is None else replay.at(self.x)
        run = self.recorded[z.shape]
        return self.densities(z) if run is None else run(z)  # type: ignore[return-value]

    def densities(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What :meth:`evaluate` gives, by the pieces themselves."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_base = self.base.log_prob(z)
            log_ratio = self.decoder(z).log_prob(self.x)
            if self.from_encoder:
                log_ratio = log_ratio + self.prior.log_prob(z) - log_base
            gradients = [
                torch.autograd.grad(value.sum(), z, retain_graph=True, allow_unused=True)[0]
                for value in (log_base, log_ratio)
            ]
        of_base, of_ratio = (torch.zeros_like(z) if g is None else g for g in gradients)
        return log_base.detach(), log_ratio.detach(), of_base, of_ratio

    def move(self, state: State, beta: float, step_size: Tensor) -> tuple[State, Tensor]:
        """One Hamiltonian trajectory that leaves f_beta invariant, and the probability of its acceptance, [C, B]."""
        z, log_base, log_ratio, of_base, of_ratio = state
        momentum = torch.randn_like(z)
        step = step_size.unsqueeze(-1)
        energy = log_base + beta * log_ratio - 0.5 * momentum.square().sum(-1)
        new = state
        momentum = momentum + 0.5 * step * (of_base + beta * of_ratio)
        for i in range(self.leapfrog_steps):
            z = z + step * momentum
            new = (z, *self.evaluate(z))
            last = i == self.leapfrog_steps - 1
            momentum = momentum + (0.5 if last else 1.0) * step * (new[3] + beta * new[4])
        new_energy = new[1] + beta * new[2] - 0.5 * momentum.square().sum(-1)
        acceptance = (new_energy - energy).clamp(max=0).exp().nan_to_num(nan=0.0)  # nan: a trajectory that diverged
        accepted = torch.rand_like(acceptance) < acceptance
        mixed = tuple(
            torch.where(accepted if old.dim() == accepted.dim() else accepted.unsqueeze(-1), proposed, old)
            for old, proposed in zip(state, new, strict=True)
        )
        return mixed, acceptance

    def pilot(self, num_chains: int) -> Tensor:
        """Step sizes for each temperature and example, [T + 1, B], tuned on chains of their own."""
        if len(self.betas) == 2:  # plain importance sampling: nothing moves
            return self.x.new_ones(2, len(self.x))
        z = self.start(num_chains)
        state: State = (z, *self.evaluate(z))
        log_step = z.new_full((len(self.x),), math.log(0.5 / z.shape[-1] ** 0.25))
        chosen = [log_step]
        for t, beta in enumerate(self.betas[1:-1]):
            repeats = math.ceil(_PILOT_MOVES / len(self.betas)) + (_PILOT_MOVES // 5 if t == 0 else 0)
            for i in range(repeats):
                state, acceptance = self.move(state, beta, log_step.exp())
                log_step = log_step + (acceptance.mean(0) - TARGET_ACCEPTANCE) / (2 + min(i, 3))
            chosen.append(log_step)
        return torch.stack([*chosen, log_step]).exp()

    def forward(self, z: Tensor, step_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Log-weights of chains from draws z of the start, [C, B], and the share of accepted moves, [B]."""
        return self._walk(z, step_sizes, range(1, len(self.betas)), moves_first=False)

    def backward(self, z: Tensor, step_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The same chain in reverse, from draws z of the posterior: exp(-log-weight) has mean 1 / p(x)."""
        return self._walk(z, step_sizes, range(len(self.betas) - 1, 0, -1), moves_first=True)

    def _walk(self, z: Tensor, step_sizes: Tensor, order: range, moves_first: bool) -> tuple[Tensor, Tensor]:
        state: State = (z, *self.evaluate(z))
        log_w = torch.zeros_like(state[1], dtype=torch.float64)
        share = torch.zeros_like(state[1][0])
        for t in order:
            if moves_first and t < len(self.betas) - 1:
                state, acceptance = self.move(state, self.betas[t], step_sizes[t])
                share = share + acceptance.mean(0)
            log_w += (self.betas[t] - self.betas[t - 1]) * state[2].double()
            if not moves_first and t < len(self.betas) - 1:  # the last move would change no weight
                state, acceptance = self.move(state, self.betas[t], step_sizes[t])
                share = share + acceptance.mean(0)
        return log_w, share / max(1, len(order) - 1)


def _paths(
    vae: Any,
    x: Tensor,
    num_chains: int,
    from_encoder: bool,
    betas: Tensor,
    leapfrog_steps: int,
    max_elements: int | None,
    compiled: bool | None,
) -> Iterator[tuple[slice, _Path]]:
    """The paths of a few examples after another; what one records serves all that have its shapes."""
    replays: dict[Any, Replay | None] = {}
    gradients = 2 * x.numel() * len(betas) * leapfrog_steps  # numbers of x to be handled for each chain, there and back

    def densities(x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return _Path(vae, x, from_encoder, betas, leapfrog_steps).densities(z)

    def record(x: Tensor, z: Tensor) -> Replay | None:
        if z.shape not in replays:
            replays[z.shape] = replayed(densities, [x], [z], gradients * len(z), compiled)
        return replays[z.shape]

    batch = even(len(x), max(1, at_once(x, max_elements) // num_chains))
    for start in range(0, len(x), batch):
        rows = slice(start, min(start + batch, len(x)))
        yield rows, _Path(vae, x[rows], from_encoder, betas, leapfrog_steps, record)


def _estimate(log_w: Tensor, num_temperatures: int, leapfrog_steps: int, from_encoder: bool, policy: str) -> Estimate:
    num_chains = len(log_w)
    start = "q(z|x)" if from_encoder else "the prior"
    return Estimate(
        "log p(x)",
        log_w.logsumexp(0) - math.log(num_chains),
        num_chains,
        policy,
        tails.standard_error_of_log_mean(log_w) if num_chains > 1 else None,
        tails.effective_sample_size(log_w),
        tails.pareto_k(log_w) if num_chains >= tails.FEWEST_DRAWS else None,
        method=f"AIS: {num_chains} chains, T={num_temperatures}, {leapfrog_steps} leapfrog steps, from {start}",
    )


def _require(vae: Any, *parts: str) -> None:
    missing = [part for part in parts if not hasattr(vae, part)]
    if missing:
        raise TypeError(
            f"expected a VAE with {', '.join(parts)}, found {type(vae).__name__} without {', '.join(missing)}: "
            "annealing needs its pieces; use log_evidence for other Pyro programs."
        )


def _check(
    vae: Any,
    x: Tensor,
    num_chains: int,
    num_temperatures: int,
    leapfrog_steps: int,
    from_encoder: bool,
    schedule: Schedule,
) -> Tensor:
    """Refuse what cannot be annealed; the betas."""
    _require(vae, "prior", "decoder", *(["encoder"] if from_encoder else []))
    for name, value in (
        ("num_chains", num_chains),
        ("num_temperatures", num_temperatures),
        ("leapfrog_steps", leapfrog_steps),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"expected {name} to be an integer >= 1, found {value!r}.")
    if isinstance(x, Tensor) and x.dim() and len(x) == 0:
        raise ValueError("expected at least one example, found none: x has length 0.")
    if hasattr(vae, "encoder"):
        check_vae(vae, x[:2])
    with untouched(vae):
        require_likelihood(vae.decoder(vae.prior().sample((1,))))
        pieces = {"prior()": vae.prior()} | ({"encoder(x)": vae.encoder(x[:1])} if from_encoder else {})
    for call, p in pieces.items():
        base = elements(p)
        point = type(base).__name__ == "Delta"
        if point or plain_support(p) not in (constraints.real, constraints.real_vector):
            raise ValueError(
                f"expected z on R^D, found {call} of type {type(base).__name__} with support "
                f"{'of one point' if point else p.support}: Hamiltonian Monte Carlo moves freely in R^D only; use "
                "log_evidence, or enumeration for a discrete z."
            )
    betas = schedule(num_temperatures)
    rises = betas.shape == (num_temperatures + 1,) and bool((betas.diff() >= 0).all())
    if not rises or betas[0] != 0 or betas[-1] != 1:
        raise ValueError(
            f"expected schedule({num_temperatures}) to be {num_temperatures + 1} numbers rising from 0 to 1, found "
            f"{tuple(betas.shape)} from {betas.flatten()[0]:g} to {betas.flatten()[-1]:g}: see linear_schedule."
        )
    return betas
