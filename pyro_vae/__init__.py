"""pyro_vae: variational autoencoders as two short Pyro programs, every term visible, swappable and checked.

The public names, in the order of the mathematics. Terms that share a distribution's name are reached through their
module: ``likelihoods.Normal``.
"""

# isort: skip_file
from pyro_vae.contracts import Encoder, Likelihood, Prior, check_vae
from pyro_vae import priors, likelihoods, pixels, counts, networks, encoders
from pyro_vae.priors import LearnedNormal, MixtureOfNormals, SphereUniform, StandardNormal, VampPrior
from pyro_vae.flow_priors import FlowPrior
from pyro_vae.likelihoods import Bernoulli, Binomial, ContinuousBernoulli, HeteroscedasticNormal
from pyro_vae.pixels import DiscretizedLogistic, DiscretizedLogisticMixture
from pyro_vae.counts import Multinomial, NegativeBinomial, Poisson
from pyro_vae.counts import ZeroInflatedNegativeBinomial, ZeroInflatedPoisson
from pyro_vae.networks import ConvPair, GatedMlp, Mlp, MlpPair, OverBatch, Standardize, init_glorot, init_he
from pyro_vae.pairs import GatedMlpPair, ResidualPair
from pyro_vae.decoders import Decoder
from pyro_vae.encoders import DiagonalNormal, FullNormal, LowRankNormal
from pyro_vae.flow_encoders import AutoregressiveFlow, CouplingFlow, PlanarFlow, RadialFlow
from pyro_vae.vae import VAE
from pyro_vae.terms import Terms, draw
from pyro_vae.objectives import ELBO, IWAE, Beta, Objective
from pyro_vae.compiling import FastSVI
from pyro_vae.estimates import Estimate, elbo, elbo_terms, log_evidence
from pyro_vae.training import History, fit
from pyro_vae import datasets, diagnostics, exact, files, testing

__all__ = [
    "ELBO",
    "IWAE",
    "VAE",
    "AutoregressiveFlow",
    "Bernoulli",
    "Beta",
    "Binomial",
    "ContinuousBernoulli",
    "ConvPair",
    "CouplingFlow",
    "Decoder",
    "DiagonalNormal",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Encoder",
    "Estimate",
    "FastSVI",
    "FlowPrior",
    "FullNormal",
    "GatedMlp",
    "GatedMlpPair",
    "HeteroscedasticNormal",
    "History",
    "LearnedNormal",
    "Likelihood",
    "LowRankNormal",
    "MixtureOfNormals",
    "Mlp",
    "MlpPair",
    "Multinomial",
    "NegativeBinomial",
    "Objective",
    "OverBatch",
    "PlanarFlow",
    "Poisson",
    "Prior",
    "RadialFlow",
    "ResidualPair",
    "SphereUniform",
    "StandardNormal",
    "Standardize",
    "Terms",
    "VampPrior",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
    "check_vae",
    "counts",
    "datasets",
    "diagnostics",
    "draw",
    "elbo",
    "elbo_terms",
    "encoders",
    "exact",
    "files",
    "fit",
    "init_glorot",
    "init_he",
    "likelihoods",
    "log_evidence",
    "networks",
    "pixels",
    "priors",
    "testing",
]

__version__ = "0.1.0"
