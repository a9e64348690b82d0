r"""The ledger: every term of the ELBO of any Pyro model and guide, site by site, each with its two standard errors.

.. math:: \mathrm{ELBO}(x) = \mathbb E_q \Big[ \sum_{\text{observed}} \log p(x_i \mid \cdot)
    + \sum_{\text{latent}} \log p(z_j \mid \cdot) - \sum_{\text{latent}} \log q(z_j \mid \cdot) \Big]
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae.contracts import untouched
from pyro_vae.estimates import has_point_mass
from pyro_vae.passes import passes
from pyro_vae.terms import Terms, check_num_particles, draw, layout
from pyro_vae.uncertainty import Estimate, with_error


@dataclass(frozen=True)
class Row:
    """One term: what it is, and its estimate for each example.

    Args:
        kind: "log_px", "log_pz", "log_qz", "kl_analytic" or "kl_sampled" of a site; of all sites together
            "reconstruction", "elbo", "elbo_analytic" (and, of several latent sites, "kl_analytic", "kl_sampled").
        site: the name of the site, "" for a sum over sites.
        estimate: the term of each example with its Monte-Carlo error, None where there is no such number.
        name: how it is printed.
    """

    kind: str
    site: str
    name: str
    estimate: Estimate | None

    def to_dict(self, per_example: bool = False) -> dict[str, Any]:
        """The numbers as plain Python, for JSON; None where there is none."""
        result: dict[str, Any] = {"kind": self.kind, "site": self.site, "name": self.name}
        e = self.estimate
        for key in ("mean", "standard_error", "monte_carlo_error", "data_error"):
            result[key] = None if e is None else _finite(getattr(e, key))
        if per_example:
            result["values"] = None if e is None else e.values.tolist()
            result["errors"] = None if e is None or e.errors is None else e.errors.tolist()
        return result


@dataclass(frozen=True)
class Ledger:
    """A table of terms, nats per example: print it, or iterate over ``rows``.

    Args:
        rows: the terms: those of each site, then their sums.
        num_particles: draws of z behind each of them, K.
        num_examples: the number of examples n.
        note: what is special about the guide, if anything.
    """

    rows: tuple[Row, ...]
    num_particles: int
    num_examples: int
    note: str = ""

    def __getitem__(self, key: tuple[str, str] | str) -> Estimate:
        """The estimate of a kind of term and a site, ``ledger["log_px", "x"]``, or of a sum, ``ledger["elbo"]``."""
        kind, site = key if isinstance(key, tuple) else (key, "")
        for row in self.rows:
            if (row.kind, row.site) == (kind, site):
                if row.estimate is None:
                    raise KeyError(f"{row.name} is not available: torch has no formula for it here.")
                return row.estimate
        known = [(row.kind, row.site) if row.site else row.kind for row in self.rows]
        raise KeyError(f"no term {key!r}: choose one of {known}.")

    def example(self, index: int) -> "Ledger":
        """The ledger of one example: its standard errors are Monte-Carlo errors only."""
        if not -self.num_examples <= index < self.num_examples:
            raise IndexError(f"expected an index below {self.num_examples}, found {index}.")
        rows = tuple(
            replace(row, estimate=row.estimate and _only(row.estimate, index % self.num_examples)) for row in self.rows
        )
        return replace(self, rows=rows, num_examples=1)

    def to_dict(self, per_example: bool = False) -> dict[str, Any]:
        """The table as plain Python, for JSON.

        Args:
            per_example: also the values of all examples.
        """
        return {
            "units": "nats per example",
            "num_particles": self.num_particles,
            "num_examples": self.num_examples,
            "note": self.note,
            "rows": [row.to_dict(per_example) for row in self.rows],
        }

    def __str__(self) -> str:
        header = ("nats per example", "mean ± standard error", "Monte-Carlo", "data")
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = [f"{row[0]:{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3)) for row in table]
        first_sum = next(i for i, row in enumerate(self.rows, 1) if not row.site)
        rule = "-" * len(lines[0])
        lines = [lines[0], rule, *lines[1:first_sum], rule, *lines[first_sum:]]
        size = f"K={self.num_particles} draws of z for each of n={self.num_examples} examples"
        return "\n".join([*lines, size + (f"; {self.note}" if self.note else "")])

    __repr__ = __str__


def ledger(
    vae: Any,
    *args: Any,
    num_particles: int = 100,
    seed: int = 0,
    vectorize_particles: bool = True,
    max_plate_nesting: int = 1,
    policy: str = "",
    max_elements: int = 2**22,
) -> Ledger:
    r"""Every term of the ELBO of every site, with its Monte-Carlo error and its data error. Nothing is trained.

    .. math:: \mathrm{se}^2 = \mathrm{se}_{\text{data}}^2 + \mathrm{se}_{\text{Monte Carlo}}^2

    The first shrinks with more examples only, the second with more draws of z. The KL of a latent site is shown by
    formula, where torch has one and the site's prior depends on no later draw of the guide, and as the mean of
    log q - log p. A site in further plates is summed over them; names follow the chain rule, log p(z1|z2).

    Args:
        vae: a VAE, any object with ``model`` and ``guide``, or a pair ``(model, guide)`` of Pyro programs.
        *args: their arguments, such as x [B, *E].
        num_particles: number K of draws of z for each example.
        seed: seed of the draws; the random state outside is untouched.
        vectorize_particles: draw them in one pass; else in a loop (for programs that take no plate around them).
        max_plate_nesting: the largest number of nested plates in model and guide.
        policy: the data policy to carry.
        max_elements: numbers of x handled in one pass, K included; other programs than a VAE's run at once.

    Returns:
        The table.

    Raises:
        TypeError: there is no model and guide.
        ValueError: num_particles < 1, or model and guide do not fit each other.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> table = ledger(vae, torch.ones(5, 7), num_particles=3)
        >>> [row.name for row in table.rows][:5]
        ['log p(x|z)', 'log p(z)', 'log q(z|x)', 'KL(z) analytic', 'KL(z) sampled']
    """
    check_num_particles(num_particles)
    pair = vae if isinstance(vae, tuple) else (getattr(vae, "model", None), getattr(vae, "guide", None))
    if len(pair) != 2 or not all(map(callable, pair)):
        raise TypeError(
            f"expected a VAE or a pair (model, guide) of Pyro programs, found {type(vae).__name__}: "
            "call ledger(vae, x) or ledger((model, guide), x)."
        )
    moments: dict[tuple[str, str], _Moments | None] = {}
    names: dict[tuple[str, str], str] = {}
    note = ""
    with untouched(nn.ModuleList(_modules(vae, *pair)), seed):
        for rows, terms in _chunks(
            vae, pair, args, num_particles, vectorize_particles, max_plate_nesting, max_elements
        ):
            if has_point_mass(terms):
                note = "the guide is a point mass: log q is 0 by convention, and the ELBO is no bound"
            for key, (name, values) in _terms_by_site(terms).items():
                names[key] = name
                if values is None or (note and key[0] == "kl_analytic"):
                    moments[key] = None
                    continue
                moments.setdefault(key, _Moments({}))
                moments[key].add(rows, values.double())  # type: ignore[union-attr]
    estimates = {
        key: None if part is None else part.estimate(names[key], num_particles, policy) for key, part in moments.items()
    }
    table = tuple(Row(*key, name=names[key], estimate=estimates[key]) for key in names)
    return Ledger(table, num_particles, estimates["elbo", ""].num_examples, note)  # type: ignore[union-attr]


@dataclass
class _Moments:
    """Mean over K and sum of squares about it for each example, from passes in any order; by the first row of each."""

    parts: dict[int, tuple[int, Tensor, Tensor]]

    def add(self, first_row: int, values: Tensor) -> None:
        """Take in values [K', B] of the examples that start at ``first_row``."""
        mean = values.mean(0)
        count, square = len(values), ((values - mean) ** 2).sum(0)
        if first_row in self.parts:
            before, old_mean, old_square = self.parts[first_row]
            total, step = before + count, mean - old_mean
            square = old_square + square + step**2 * (before * count / total)
            mean, count = old_mean + step * (count / total), total
        self.parts[first_row] = count, mean, square

    def estimate(self, name: str, num_particles: int, policy: str) -> Estimate:
        """The mean of each example and its standard error."""
        means = torch.cat([mean for _, mean, _ in self.parts.values()])
        squares = torch.cat([square for _, _, square in self.parts.values()])
        errors = (squares / (num_particles - 1) / num_particles).sqrt() if num_particles > 1 else None
        return Estimate(name, means, num_particles, policy, errors)


def _chunks(
    vae: Any,
    pair: Any,
    args: tuple[Any, ...],
    num_particles: int,
    vectorize_particles: bool,
    max_plate_nesting: int,
    max_elements: int,
) -> Iterator[tuple[int, Terms]]:
    """The terms in passes with the first row of each: a VAE's of bounded memory, others at once."""
    if all(hasattr(vae, part) for part in ("prior", "decoder", "encoder")) and len(args) == 1 and vectorize_particles:
        for rows, terms in passes(vae, args[0], num_particles, max_elements):
            yield rows.start, terms
        return
    model, guide = pair
    yield (
        0,
        draw(
            model,
            guide,
            *args,
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        ),
    )


def _terms_by_site(terms: Terms) -> dict[tuple[str, str], tuple[str, Tensor | None]]:
    """Every term of every site and their sums, by kind and site: its name and its values [K, N]."""
    passes = [_terms_of_pass(*traces) for traces in terms.passes]
    result: dict[tuple[str, str], tuple[str, Tensor | None]] = {}
    for key, (name, first) in passes[0].items():
        result[key] = name, None if first is None else torch.cat([p[key][1] for p in passes])  # type: ignore[misc]
    log_px = terms.log_px.flatten(1)
    kl, elbo = (terms.log_qz - terms.log_pz).flatten(1), terms.log_w.flatten(1)
    by_formula = [value for (kind, _), (_, value) in result.items() if kind == "kl_analytic"]
    known = [value for value in by_formula if value is not None]
    num_guide_sites = sum(kind == "log_qz" for kind, _ in result)
    total = sum(known[1:], known[0]) if known and len(known) == num_guide_sites else None
    result["reconstruction", ""] = "reconstruction", log_px
    if num_guide_sites > 1:
        result["kl_analytic", ""] = "KL analytic", total
        result["kl_sampled", ""] = "KL sampled", kl
    result["elbo_analytic", ""] = "ELBO, KL analytic", None if total is None else log_px - total
    result["elbo", ""] = "ELBO, KL sampled", elbo
    return result


def _terms_of_pass(model_trace: Trace, guide_trace: Trace) -> dict[tuple[str, str], tuple[str, Tensor | None]]:
    """The terms of the sites of one pair of traces, [K, N]."""
    axes = layout(model_trace, guide_trace)
    of_model: dict[str, Any] = {n: s for n, s in model_trace.nodes.items() if s["type"] == "sample"}
    of_guide: dict[str, Any] = {n: s for n, s in guide_trace.nodes.items() if s["type"] == "sample"}
    latent = [name for name, site in of_model.items() if not site["is_observed"]]
    observed = [name for name, site in of_model.items() if site["is_observed"]]

    def log_prob(site: Any) -> Tensor:
        value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        return axes.total([axes.weighted(value, site)], value).flatten(1)

    def given(names: list[str]) -> str:
        return "|" + ",".join(names) if names else ""

    before = {name: [n for n in list(of_model)[:i] if n in latent] for i, name in enumerate(of_model)}
    before_in_guide = {name: list(of_guide)[:i] for i, name in enumerate(of_guide)}
    log_px = {name: log_prob(of_model[name]) for name in observed}
    log_pz = {name: log_prob(of_model[name]) for name in latent}
    log_qz = {name: log_prob(site) for name, site in of_guide.items()}
    result: dict[tuple[str, str], tuple[str, Tensor | None]] = {}
    result |= {("log_px", n): (f"log p({n}{given(before[n])})", value) for n, value in log_px.items()}
    result |= {("log_pz", n): (f"log p({n}{given(before[n])})", value) for n, value in log_pz.items()}
    result |= {
        ("log_qz", n): (f"log q({n}{given(before_in_guide[n] + observed)})", value) for n, value in log_qz.items()
    }
    for name in latent:
        p, q = of_model[name], of_guide[name]
        formula = None
        if (
            set(before[name]) <= set(before_in_guide[name])
            and _same(p["scale"], q["scale"])
            and _same(p["mask"], q["mask"])
        ):
            try:
                formula = kl_divergence(q["fn"], p["fn"])
            except NotImplementedError:
                pass
            else:
                formula = axes.total([axes.weighted(formula, q)], formula).flatten(1)
        result["kl_analytic", name] = f"KL({name}) analytic", formula
        result["kl_sampled", name] = f"KL({name}) sampled", log_qz[name] - log_pz[name]
    return result


def _same(a: Any, b: Any) -> bool:
    """Whether two scales, or two masks, are one."""
    if a is b:
        return True
    return a is not None and b is not None and torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def _modules(*owners: Any) -> list[nn.Module]:
    """The networks that programs use: they are modules, belong to one, or refer to some by name."""
    found: list[nn.Module] = []
    for owner in owners:
        for part in (owner, getattr(owner, "__self__", None)):
            if part is None or isinstance(part, tuple):
                continue
            candidates = [part, *vars(part).values()] if hasattr(part, "__dict__") else [part]
            if inspect.isfunction(part):
                names = inspect.getclosurevars(part)
                candidates += [*names.nonlocals.values(), *names.globals.values()]
            found += [value for value in candidates if isinstance(value, nn.Module)]
    return list({id(module): module for module in found}.values())


def _only(estimate: Estimate, index: int) -> Estimate:
    """The estimate of one example."""
    errors = None if estimate.errors is None else estimate.errors[index : index + 1]
    return replace(estimate, values=estimate.values[index : index + 1], errors=errors)


def _cells(row: Row) -> tuple[str, str, str, str]:
    """A row as it is printed."""
    e = row.estimate
    if e is None:
        return row.name, "not available", "", ""
    error = e.standard_error if e.num_examples > 1 else e.monte_carlo_error
    mean = f"{e.mean:.5g}" if not error > 0 else with_error(e.mean, error)  # nan: unknown; 0: one example, by formula
    monte_carlo, data = ("-" if math.isnan(part) else f"{part:.2g}" for part in (e.monte_carlo_error, e.data_error))
    return row.name, mean, monte_carlo, data


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
