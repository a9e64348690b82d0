"""All likelihoods p(x | z) by name, ``likelihoods.Normal``; each is written with those of its kind of x.

Each turns a network's output h = [*batch, num_outputs * E[0], *E[1:]] into a normalised distribution with batch shape
``batch`` and event shape E. Scores are nats, summed over the E axes.
"""

from pyro_vae.comparisons import Comparison
from pyro_vae.counts import Multinomial, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial, ZeroInflatedPoisson
from pyro_vae.masked import Masked
from pyro_vae.pixels import Categorical, DiscretizedLogistic, DiscretizedLogisticMixture
from pyro_vae.proportions import Bernoulli, Beta, Binomial, ContinuousBernoulli
from pyro_vae.reals import HeteroscedasticNormal, Laplace, LogNormal, Normal, OptimalNormal, StudentT
from pyro_vae.tables import MixedColumns, Nominal

__all__ = [
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "Comparison",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "HeteroscedasticNormal",
    "Laplace",
    "LogNormal",
    "Masked",
    "MixedColumns",
    "Multinomial",
    "NegativeBinomial",
    "Nominal",
    "Normal",
    "OptimalNormal",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
]
