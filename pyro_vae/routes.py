r"""The same bound by other routes: equal to the ELBO in value, different in what is sampled and so in variance.

.. math:: \mathbb E_q[\log p(x, z) - \log q(z|x)]
    = \mathbb E_q \log p(x|z) - \mathrm{KL}(q(z|x) \,\|\, p(z))
    = \mathbb E_q \log p(x, z) + H[q(z|x)]
    = \mathbb E_q \log p(x|z) - I_q(x; z) - \mathrm{KL}(q(z) \,\|\, p(z))
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyro_vae.aggregate_terms import aggregate_terms, trace_data
from pyro_vae.analytic import entropy, kl
from pyro_vae.objectives import Objective
from pyro_vae.terms import Program, Terms


@dataclass(frozen=True)
class ReconstructionKL(Objective):
    r"""The ELBO as reconstruction minus KL, the KL in closed form.

    .. math:: \mathbb E_{q(z|x)} \log p(x \mid z) - \mathrm{KL}(q(z \mid x) \,\|\, p(z))

    Only the reconstruction is sampled. The variance is smaller than the ELBO's far from the optimum; near it the
    noise of log p(x|z) is no longer cancelled by that of log q(z|x), and the sampled form can win. With the exact
    posterior as guide the expectation is log p(x), but a single draw is not.

    Args:
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: num_particles < 1; torch has no formula for the KL (it is never sampled instead); model and guide
            draw their sites in different order; a guide site has no reparameterised sampler.

    Source: Kingma, Welling (2014), the second estimator of section 2.3, arXiv:1312.6114.

    Example:
        >>> ReconstructionKL()
        ReconstructionKL(num_particles=1)
    """

    num_particles: int = 1

    formula = r"\mathbb{E}_{q(z|x)} \log p(x|z) - \mathrm{KL}(q(z|x) \,\|\, p(z))"

    @property
    def is_tight(self) -> bool:
        """Only on average: single values scatter about log p(x)."""
        return False

    def combine(self, terms: Terms) -> Tensor:
        """The mean reconstruction less the KL."""
        return terms.log_px.mean(0) - kl(terms).mean(0)


@dataclass(frozen=True)
class EnergyEntropy(Objective):
    r"""The ELBO as energy plus entropy, the entropy in closed form.

    .. math:: \mathbb E_{q(z|x)} \log p(x, z) + H[q(z \mid x)]

    For any prior; its gradient leaves out the noise of log q(z|x), which would cancel that of log p(x, z) near the
    optimum. With the exact posterior as guide the expectation is log p(x), but a single draw is not.

    Args:
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: num_particles < 1; torch has no formula for the entropy (flows, mixtures); a guide site has no
            reparameterised sampler.

    Source: Roeder, Wu, Duvenaud (2017), Sticking the landing, section 2, arXiv:1703.09194.

    Example:
        >>> EnergyEntropy()
        EnergyEntropy(num_particles=1)
    """

    num_particles: int = 1

    formula = r"\mathbb{E}_{q(z|x)} \log p(x, z) + H[q(z|x)]"

    @property
    def is_tight(self) -> bool:
        """Only on average: single values scatter about log p(x)."""
        return False

    def combine(self, terms: Terms) -> Tensor:
        """The mean energy plus the entropy."""
        return (terms.log_px + terms.log_pz).mean(0) + entropy(terms).mean(0)


@dataclass(frozen=True)
class Surgery(Objective):
    r"""The ELBO with its KL cut in two: what z knows about x, and how far all codes together are from the prior.

    .. math:: \mathbb E_{q(z|x)} \log p(x|z) - \underbrace{\mathbb E \log \tfrac{q(z|x)}{q(z)}}_{I_q(x; z)} -
        \underbrace{\mathbb E \log \tfrac{q(z)}{p(z)}}_{\mathrm{KL}(q(z) \| p(z))}, \qquad
        q(z) = \tfrac 1 N \sum_n q(z|x_n)

    With both weights 1 the aggregate posterior cancels draw by draw, so it is the ELBO itself, gradient included; its
    use is to see the two parts, or to weight them: ``information=0`` leaves information free (Makhzani, Frey 2017).
    q(z) is over ``dataset`` if it is given, and otherwise over the batch, whose mutual information is at most log B.

    Args:
        num_particles: number K of draws of z for each example.
        information: weight of the mutual information, >= 0.
        marginal: weight of KL(q(z) || p(z)), >= 0.
        dataset: all examples, [N, *E], encoded anew at each step.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better; a weighted one is meaningful as a mean over examples.

    Raises:
        ValueError: num_particles < 1, a weight < 0, or the guide has not one latent site with ``rsample``.

    Source: Hoffman, Johnson (2016), ELBO surgery: yet another way to carve up the variational evidence lower bound.

    Example:
        >>> Surgery()
        Surgery(num_particles=1, information=1.0, marginal=1.0)
    """

    num_particles: int = 1
    information: float = 1.0
    marginal: float = 1.0
    dataset: Tensor | None = field(default=None, repr=False, compare=False)

    formula = r"\mathbb{E}_{q(z|x)} \log p(x|z) - I_q(x; z) - \mathrm{KL}(q(z) \,\|\, p(z))"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.information >= 0 and self.marginal >= 0):
            raise ValueError(f"expected weights >= 0, found information={self.information}, marginal={self.marginal}.")

    @property
    def is_bound(self) -> bool:
        """With both weights 1 (a weighted one is, on average over the examples, if both are >= 1)."""
        return self.information == self.marginal == 1

    @property
    def is_tight(self) -> bool:
        """With both weights 1."""
        return self.information == self.marginal == 1

    @property
    def mixes_examples(self) -> bool:
        """Unless both weights are 1."""
        return self.information != self.marginal

    def draw(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """Draw the terms, and trace the guide on all of the data if they were given."""
        terms = super().draw(model, guide, *args, **kwargs)
        return terms if self.dataset is None else terms._replace(data_guide=trace_data(guide, self.dataset))

    def combine(self, terms: Terms) -> Tensor:
        """Reconstruction less the two parts of the KL."""
        log_qz = aggregate_terms(terms, data_guide=terms.data_guide, per_dimension=False).log_qz
        information, marginal = terms.log_qz - log_qz, log_qz - terms.log_pz
        return (terms.log_px - self.information * information - self.marginal * marginal).mean(0)
