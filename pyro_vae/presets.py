"""The nets of five well-known introductions to the VAE, and of Pyro's own, with the settings of their training.

A preset is a set of arguments of ``pyro-vae train``: ``pyro-vae train --preset seed001 --data.root DIR``, any of them
overridden by a further word. The functions build the same nets in Python: ``presets.seed001()``.

Where a text scores grey pixels by the cross-entropy of bits, which is no likelihood of theirs, the pixels are drawn as
bits here (x ~ Bernoulli(pixel / 255) at each presentation): then it is one, and its mean over the bits is the texts'
loss. The last sigmoid is part of the likelihood.
"""

from typing import Any

from torch import nn

from pyro_vae import initialization
from pyro_vae.datasets import MNIST
from pyro_vae.decoders import Decoder
from pyro_vae.encoders import Delta, DiagonalNormal
from pyro_vae.files import ImageFolder
from pyro_vae.layers import OverBatch, Standardize, doubling
from pyro_vae.networks import ConvPair, MlpPair, NetworkPair
from pyro_vae.objectives import ELBO, Beta
from pyro_vae.pairs import SpatialPair
from pyro_vae.priors import StandardNormal
from pyro_vae.proportions import Bernoulli, ContinuousBernoulli
from pyro_vae.reals import Normal
from pyro_vae.vae import VAE


class Seed000Pair(NetworkPair):
    """The convolutions of :func:`seed000`: 28 x 28 pixels to 7 x 7 and back, the way back without biases.

    Example:
        >>> import torch
        >>> Seed000Pair().decoder(20, (1, 28, 28))(torch.zeros(5, 20)).shape
        torch.Size([5, 1, 28, 28])
    """

    def __repr__(self) -> str:
        return "Seed000Pair()"

    def encoder(self, event_shape: Any, num_outputs: int) -> nn.Module:
        """A network [*batch, C, 28, 28] -> [*batch, num_outputs]."""
        _check_size(event_shape)
        layers = [
            nn.Conv2d(event_shape[0], 16, kernel_size=5, stride=2, padding=2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, kernel_size=5, stride=2, padding=2),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, num_outputs),
        ]
        return OverBatch(nn.Sequential(*layers), event_dim=3)

    def decoder(self, latent_dim: int, output_shape: Any) -> nn.Module:
        """A network [*batch, latent_dim] -> [*batch, C, 28, 28]."""
        _check_size(output_shape)
        layers = [
            nn.Linear(latent_dim, 32 * 7 * 7),
            nn.Unflatten(1, (32, 7, 7)),
            nn.ReLU(),
            doubling(32, 16, kernel_size=5, bias=False),
            nn.ReLU(),
            doubling(16, output_shape[0], kernel_size=5, bias=False),
        ]
        return OverBatch(nn.Sequential(*layers), event_dim=1)


def _check_size(shape: Any) -> None:
    if len(shape) != 3 or tuple(shape[1:]) != (28, 28):
        raise ValueError(f"Seed000Pair expected images [C, 28, 28], found {tuple(shape)}: use ConvPair.")


# Arguments of the command train; a part is a class and what it is made with. None of the texts starts the decoder at
# the data's mean or standardises the encoder's input.
_PLAIN = {"start_at_data": False, "standardize": False, "objective": (ELBO, {}), "encoder": (DiagonalNormal, {})}
_BITS = {**_PLAIN, "data": (MNIST, {"binarization": "dynamic"}), "likelihood": (Bernoulli, {})}
# Notebook 004: 0.5 is taken from the input, and KL + cross-entropy / 2 is minimised: beta = 2, a looser bound.
_SEED004 = {**_BITS, "standardize": 0.5, "init": "he", "epochs": 40, "batch_size": 100, "lr": 1e-3}
_SEED004_VAE = {**_SEED004, "objective": (Beta, {"beta": 2.0})}
_SEED004_AE = {**_SEED004, "objective": (Beta, {"beta": 0.0}), "encoder": (Delta, {})}
_TO_2 = {"networks": (MlpPair, {"hidden": (500, 250)}), "latent_dim": 2}
_TO_10 = {"networks": (MlpPair, {"hidden": (500, 250), "decoder_hidden": (10, 250)}), "latent_dim": 10}
_TO_10_MIRRORED = {"networks": (MlpPair, {"hidden": (500, 250)}), "latent_dim": 10}

PRESETS: dict[str, dict[str, Any]] = {
    "seed000": {
        **_BITS,
        **{"networks": (Seed000Pair, {}), "latent_dim": 20, "init": "normal"},
        **{"epochs": 10, "batch_size": 100, "lr": 1e-3},
    },
    "seed001": {
        **_PLAIN,
        **{"data": (MNIST, {"binarization": "grey"}), "likelihood": (Normal, {"scale": 0.5, "learn_scale": False})},
        **{"networks": (MlpPair, {"hidden": (256,)}), "latent_dim": 2, "init": "glorot"},
        **{"epochs": 30, "batch_size": 128, "lr": 1e-3},
    },
    "seed003": {
        **_BITS,
        **{"networks": (MlpPair, {"hidden": (512,)}), "latent_dim": 2, "init": "glorot"},
        **{"epochs": 10, "batch_size": 50, "lr": 1e-3},
    },
    "seed004-2d-ae": {**_SEED004_AE, **_TO_2},
    "seed004-2d-vae": {**_SEED004_VAE, **_TO_2},
    "seed004-10d-ae": {**_SEED004_AE, **_TO_10},
    "seed004-10d-vae": {**_SEED004_VAE, **_TO_10},
    "seed004-10d-ae-mirrored": {**_SEED004_AE, **_TO_10_MIRRORED},
    "seed004-10d-vae-mirrored": {**_SEED004_VAE, **_TO_10_MIRRORED},
    "seed004-conv": {
        **_SEED004_VAE,
        **{"networks": (SpatialPair, {"channels": (32,), "kernel_size": (5, 3), "pool": True}), "latent_dim": 196},
    },
    "seed004-faces": {
        **_SEED004,
        **{"data": (ImageFolder, {"size": 64, "channels": 3}), "likelihood": (ContinuousBernoulli, {})},
        **{"networks": (ConvPair, {"channels": (32, 64, 128, 256), "hidden": 0, "pool": True}), "latent_dim": 100},
    },
    "pyro": {
        **_BITS,
        **{"networks": (MlpPair, {"hidden": (400,), "activation": nn.Softplus}), "latent_dim": 50, "init": "torch"},
        **{"epochs": 100, "batch_size": 256, "lr": 1e-3},
    },
}
"""The arguments of ``pyro-vae train`` of each preset; a part is a class with its arguments."""


def make(name: str) -> VAE:
    """The untrained VAE of a preset, by name.

    Args:
        name: a key of ``PRESETS``.

    Returns:
        A VAE of images [1, 28, 28] (of [3, 64, 64] for "seed004-faces").

    Raises:
        ValueError: there is no such preset.

    Example:
        >>> sum(p.numel() for p in make("seed001").parameters())
        404244
    """
    preset = arguments(name)
    event_shape = image_shape(name)
    (family, _), (kind, options) = preset["encoder"], preset["likelihood"]
    likelihood = kind(**options, event_dim=3)
    pair, dim = preset["networks"][0](**preset["networks"][1]), preset["latent_dim"]
    to_z = pair.encoder(event_shape, family.num_outputs(dim))
    to_x = pair.decoder(dim, (likelihood.num_outputs * event_shape[0], *event_shape[1:]))
    for net in (to_z, to_x):
        initialization.STARTS[preset["init"]](net)
    shift = preset["standardize"]
    encoder = family(nn.Sequential(*([Standardize(shift, 1.0)] if shift else []), to_z))
    return VAE(StandardNormal(dim), Decoder(to_x, likelihood), encoder)


def arguments(name: str) -> dict[str, Any]:
    """The arguments of ``pyro-vae train`` that a preset stands for.

    Args:
        name: a key of ``PRESETS``.

    Returns:
        Argument -> value; for a part of the run (data, likelihood, ...) a class and its arguments.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"expected a preset out of {', '.join(PRESETS)}, found {name!r}.")
    return PRESETS[name]


def image_shape(name: str) -> tuple[int, int, int]:
    """The shape [C, H, W] of one image of a preset's data."""
    options = arguments(name)["data"][1]
    size = options.get("size", 28)
    return options.get("channels", 1), size, size


def seed000() -> VAE:
    """Two convolutions to 20 latent dimensions and back: 122,136 parameters.

    5 x 5 kernels in steps of two, 1-16-32 channels, leaky rectifiers (0.2); two heads 1568-20; 20-1568, rectifiers, two
    transposed convolutions without biases. Weights start as a normal of scale 0.02, cut off at twice that. The standard
    deviation is an exponential here, so that it is positive.

    Source: the code of Kevin Frans (2016), Variational Autoencoders Explained,
        https://github.com/kvfrans/variational-autoencoder.
    """
    return make("seed000")


def seed001() -> VAE:
    """784-256-(2, 2) and 2-256-784 with rectifiers: 404,244 parameters.

    Its loss, the sum of squares plus KL / 2, is half of minus the ELBO (but for a constant) of a normal likelihood of
    standard deviation 1/2, which is what is used here, on grey pixels; the sigmoid at the end is left out.

    Source: Dagang Wei, Demystifying Neural Networks: Variational Autoencoders.
    """
    return make("seed001")


def seed003() -> VAE:
    """784-512-(2, 2) and 2-512-784 with rectifiers: 807,700 parameters.

    Source: Agustinus Kristiadi (2016), Variational Autoencoder: Intuition and Implementation.
    """
    return make("seed003")


def seed004_2d_ae() -> VAE:
    """The plain autoencoder 784-500-250-2-250-500-784: a point mass for q, no KL; 1,037,286 parameters.

    Source: the code of Comp Three (2019), Variational Autoencoders are Beautiful,
        https://github.com/compthree/variational-autoencoder.
    """
    return make("seed004-2d-ae")


def seed004_2d_vae() -> VAE:
    """784-500-250-(2, 2) and 2-250-500-784, trained at beta = 2: 1,037,788 parameters. Source: seed004_2d_ae."""
    return make("seed004-2d-vae")


def seed004_10d_ae(mirrored: bool = False) -> VAE:
    """The plain autoencoder 784-500-250-10 with the published decoder 10-10-250-784, or the mirrored 10-250-500-784.

    719,904 parameters, mirrored 1,041,294. The ten rectifiers first in the published decoder may all die.
    Source: seed004_2d_ae.

    Args:
        mirrored: mirror the encoder.
    """
    return make("seed004-10d-ae-mirrored" if mirrored else "seed004-10d-ae")


def seed004_10d_vae(mirrored: bool = False) -> VAE:
    """The VAE of :func:`seed004_10d_ae`, beta = 2: 722,414 parameters, mirrored 1,043,804.

    Args:
        mirrored: mirror the encoder.
    """
    return make("seed004-10d-vae-mirrored" if mirrored else "seed004-10d-vae")


def seed004_conv() -> VAE:
    """Convolutions with pooling to a z of 4 x 7 x 7 and back, beta = 2: 5,129 parameters.

    5 x 5 to 32 channels and 3 x 3 to four, each followed by the largest of 2 x 2 pixels; the way back mirrors it.
    Source: seed004_2d_ae.
    """
    return make("seed004-conv")


def seed004_faces() -> VAE:
    """Colour pictures of 64 x 64 pixels over 32, 16, 8 and 4 to 100 numbers and back: 2,613,131 parameters.

    Four times a 4 x 4 convolution (32, 64, 128, 256 channels) and the largest of 2 x 2 pixels; back by zeros between
    the pixels and transposed convolutions. Grey values in [0, 1] under a continuous Bernoulli. The text gives no number
    of epochs and no batch size for it: those of its other nets are used. Source: seed004_2d_ae.
    """
    return make("seed004-faces")


def pyro() -> VAE:
    """784-400-(50, 50) and 50-400-784 with softplus: 688,884 parameters.

    Source: Pyro's tutorial Variational Autoencoders, https://pyro.ai/examples/vae.html.
    """
    return make("pyro")
