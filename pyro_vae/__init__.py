"""pyro_vae: variational autoencoders as two short Pyro programs, every term visible, swappable and checked.

The public names, in the order of the mathematics. Terms that share a distribution's name are reached through their
module: ``likelihoods.Normal``.
"""

# isort: skip_file
from pyro_vae.contracts import Encoder, Likelihood, Prior, check_vae
from pyro_vae import priors, likelihoods, networks
from pyro_vae.priors import MixtureOfNormals, StandardNormal, VampPrior
from pyro_vae.likelihoods import Bernoulli, Binomial, ContinuousBernoulli, HeteroscedasticNormal
from pyro_vae.networks import ConvPair, Mlp, MlpPair, OverBatch, Standardize
from pyro_vae.decoders import Decoder
from pyro_vae.encoders import DiagonalNormal, FullNormal
from pyro_vae.vae import VAE
from pyro_vae.terms import Terms, draw
from pyro_vae.objectives import ELBO, IWAE, Beta, Objective
from pyro_vae.estimates import Estimate, elbo, elbo_terms, log_evidence
from pyro_vae.training import History, fit
from pyro_vae import datasets, diagnostics, exact, testing

__all__ = [
    "ELBO",
    "IWAE",
    "VAE",
    "Bernoulli",
    "Beta",
    "Binomial",
    "ContinuousBernoulli",
    "ConvPair",
    "Decoder",
    "DiagonalNormal",
    "Encoder",
    "Estimate",
    "FullNormal",
    "HeteroscedasticNormal",
    "History",
    "Likelihood",
    "MixtureOfNormals",
    "Mlp",
    "MlpPair",
    "Objective",
    "OverBatch",
    "Prior",
    "StandardNormal",
    "Standardize",
    "Terms",
    "VampPrior",
    "check_vae",
    "datasets",
    "diagnostics",
    "draw",
    "elbo",
    "elbo_terms",
    "exact",
    "fit",
    "likelihoods",
    "log_evidence",
    "networks",
    "priors",
    "testing",
]

__version__ = "0.1.0"
