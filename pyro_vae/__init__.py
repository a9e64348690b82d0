"""pyro_vae: variational autoencoders as two short Pyro programs, every term visible, swappable and checked.

The public names, in the order of the mathematics. Terms that share a distribution's name are reached through their
module: ``likelihoods.Normal``.
"""

# isort: skip_file
from pyro_vae.contracts import Encoder, Likelihood, Prior
from pyro_vae.dry_run import check_vae
from pyro_vae import priors, likelihoods, pixels, counts, networks, encoders
from pyro_vae.priors import LearnedNormal, MixtureOfNormals, SphereUniform, StandardNormal, VampPrior
from pyro_vae.flow_priors import FlowPrior
from pyro_vae import relaxed_priors
from pyro_vae.likelihoods import Bernoulli, Binomial, ContinuousBernoulli, HeteroscedasticNormal, OptimalNormal
from pyro_vae.pixels import DiscretizedLogistic, DiscretizedLogisticMixture
from pyro_vae.counts import Multinomial, NegativeBinomial, Poisson
from pyro_vae.counts import ZeroInflatedNegativeBinomial, ZeroInflatedPoisson
from pyro_vae import tables, comparisons
from pyro_vae.tables import MixedColumns
from pyro_vae.comparisons import Comparison
from pyro_vae.layers import OverBatch, Standardize
from pyro_vae.networks import ConvPair, GatedMlp, Mlp, MlpPair
from pyro_vae.initialization import init_glorot, init_he, init_normal
from pyro_vae.pairs import GatedMlpPair, ResidualPair, SpatialPair
from pyro_vae.decoders import Decoder
from pyro_vae.encoders import DiagonalNormal, FullNormal, LowRankNormal
from pyro_vae.spherical_encoders import PowerSpherical, VonMisesFisher
from pyro_vae.flow_encoders import AutoregressiveFlow, CouplingFlow, PlanarFlow, RadialFlow, SplineFlow
from pyro_vae.orthogonal_flows import HouseholderFlow, SylvesterFlow
from pyro_vae import discrete
from pyro_vae.discrete import StraightThrough
from pyro_vae.vae import VAE
from pyro_vae.terms import Terms, draw
from pyro_vae import missing
from pyro_vae.missing import impute
from pyro_vae import analytic, aggregate_terms
from pyro_vae.schedules import Cosine, Cyclical, Linear
from pyro_vae.objectives import ELBO, IWAE, Beta, Objective
from pyro_vae.routes import EnergyEntropy, ReconstructionKL, Surgery
from pyro_vae.importance import CIWAE, MIWAE, Renyi, ThermodynamicVariational
from pyro_vae.gradients import PIWAE, VIMCO, DReG, ScoreFunction, StickingTheLanding
from pyro_vae.regularized import BalancedKL, Capacity, FreeBits
from pyro_vae.aggregate_objectives import DIP, WAE, BetaTC, InfoVAE
from pyro_vae.estimates import elbo, elbo_and_log_evidence, elbo_terms, log_evidence
from pyro_vae.fast_svi import FastSVI
from pyro_vae.uncertainty import Estimate, paired_difference
from pyro_vae.annealing import annealed_log_evidence, sandwich
from pyro_vae.ledger import Ledger, ledger
from pyro_vae.training import History, fit
from pyro_vae.memory import keep_freed_memory
from pyro_vae import aggregate, calibration, gaps, tails
from pyro_vae import datasets, diagnostics, exact, files, mapped, parallel, presets, streaming, testing
from pyro_vae import derivation
from pyro_vae import gradient_variance, wrong_losses
from pyro_vae import anomalies, clouds, disentanglement, geometry, representation, sample_quality
from pyro_vae.sprites import Sprites

__all__ = [
    "CIWAE",
    "DIP",
    "ELBO",
    "IWAE",
    "MIWAE",
    "PIWAE",
    "VAE",
    "VIMCO",
    "WAE",
    "AutoregressiveFlow",
    "BalancedKL",
    "Bernoulli",
    "Beta",
    "BetaTC",
    "Binomial",
    "Capacity",
    "Comparison",
    "ContinuousBernoulli",
    "ConvPair",
    "Cosine",
    "CouplingFlow",
    "Cyclical",
    "DReG",
    "Decoder",
    "DiagonalNormal",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Encoder",
    "EnergyEntropy",
    "Estimate",
    "FastSVI",
    "FlowPrior",
    "FreeBits",
    "FullNormal",
    "GatedMlp",
    "GatedMlpPair",
    "HeteroscedasticNormal",
    "History",
    "HouseholderFlow",
    "InfoVAE",
    "LearnedNormal",
    "Ledger",
    "Likelihood",
    "Linear",
    "LowRankNormal",
    "MixedColumns",
    "MixtureOfNormals",
    "Mlp",
    "MlpPair",
    "Multinomial",
    "NegativeBinomial",
    "Objective",
    "OptimalNormal",
    "OverBatch",
    "PlanarFlow",
    "Poisson",
    "PowerSpherical",
    "Prior",
    "RadialFlow",
    "ReconstructionKL",
    "Renyi",
    "ResidualPair",
    "ScoreFunction",
    "SpatialPair",
    "SphereUniform",
    "SplineFlow",
    "Sprites",
    "StandardNormal",
    "Standardize",
    "StickingTheLanding",
    "StraightThrough",
    "Surgery",
    "SylvesterFlow",
    "Terms",
    "ThermodynamicVariational",
    "VampPrior",
    "VonMisesFisher",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
    "aggregate",
    "aggregate_terms",
    "analytic",
    "annealed_log_evidence",
    "anomalies",
    "calibration",
    "check_vae",
    "clouds",
    "comparisons",
    "counts",
    "datasets",
    "derivation",
    "diagnostics",
    "discrete",
    "disentanglement",
    "draw",
    "elbo",
    "elbo_and_log_evidence",
    "elbo_terms",
    "encoders",
    "exact",
    "files",
    "fit",
    "gaps",
    "geometry",
    "gradient_variance",
    "impute",
    "init_glorot",
    "init_he",
    "init_normal",
    "keep_freed_memory",
    "ledger",
    "likelihoods",
    "log_evidence",
    "mapped",
    "missing",
    "networks",
    "paired_difference",
    "parallel",
    "pixels",
    "presets",
    "priors",
    "relaxed_priors",
    "representation",
    "sample_quality",
    "sandwich",
    "streaming",
    "tables",
    "tails",
    "testing",
    "wrong_losses",
]

__version__ = "0.1.0"
