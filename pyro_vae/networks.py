"""Networks: no probability in this file. Functions from tensors to tensors that decoders and encoders are made of."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from pyro_vae.layers import (
    OverBatch,
    check_normalization,
    doubling,
    halved,
    halving,
    normalization,
    repr_normalization,
)
from pyro_vae.layers import Standardize as Standardize


class Mlp(nn.Sequential):
    """A multilayer perceptron: linear layers of the sizes given, an activation between each two.

    Works on the last axis; any number of axes in front, all of which are one batch to a normalisation.

    Args:
        *sizes: input size, hidden sizes, output size: at least two.
        activation: the class of the activation, without parameters.
        batch_norm: normalise each hidden number over the batch in training, by running averages in evaluation.
        num_groups: normalise the hidden numbers in so many groups, each example by itself; 0: not.

    Raises:
        ValueError: fewer than two sizes, or one below 1; both normalisations, or groups that do not divide a size or
            hold one number only.

    Example:
        >>> import torch
        >>> Mlp(64, 128, 4)(torch.zeros(3, 5, 64)).shape
        torch.Size([3, 5, 4])
    """

    def __init__(
        self, *sizes: int, activation: type[nn.Module] = nn.ReLU, batch_norm: bool = False, num_groups: int = 0
    ):
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"expected at least two sizes >= 1, found {sizes}: Mlp(inputs, hidden, ..., outputs).")
        check_normalization(sizes[1:-1], batch_norm, num_groups, smallest=2)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes[:-1]):
            layers += [nn.Linear(inputs, outputs, bias=not batch_norm)]  # the normalisation takes a mean away
            layers += [*normalization(outputs, batch_norm, num_groups, event_dim=1), activation()]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))


class GatedMlp(nn.Sequential):
    r"""A perceptron whose hidden layers are gated: each number is let through by a factor in (0, 1).

    .. math:: h' = (A h + a) \odot \sigma(C h + c)

    The gates take the place of an activation; a hidden layer has twice the parameters of an ungated one.

    Args:
        *sizes: input size, hidden sizes, output size: at least two.

    Raises:
        ValueError: fewer than two sizes, or one below 1.

    Source: Dauphin et al. (2017), Language modeling with gated convolutional networks, arXiv:1612.08083; inside VAEs
        Tomczak, Welling (2018), VAE with a VampPrior, arXiv:1705.07120.

    Example:
        >>> import torch
        >>> GatedMlp(64, 128, 4)(torch.zeros(3, 5, 64)).shape
        torch.Size([3, 5, 4])
    """

    def __init__(self, *sizes: int):
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"expected at least two sizes >= 1, found {sizes}: GatedMlp(inputs, hidden, ..., outputs)."
            )
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes[:-1]):
            layers += [nn.Linear(inputs, 2 * outputs), nn.GLU()]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))


class NetworkPair(ABC):
    """Recipes for the two networks of a VAE; each call builds a fresh one. One of your own has these two methods."""

    @abstractmethod
    def encoder(self, event_shape: Sequence[int], num_outputs: int) -> nn.Module:
        """A network x [*batch, *event_shape] -> [*batch, num_outputs]."""

    @abstractmethod
    def decoder(self, latent_dim: int, output_shape: Sequence[int]) -> nn.Module:
        """A network z [*batch, latent_dim] -> h [*batch, *output_shape]."""


class MlpPair(NetworkPair):
    """A pair of perceptrons, the encoder's hidden layers in reverse order for the decoder unless it has its own.

    Args:
        hidden: sizes of the encoder's hidden layers.
        activation: the class of the activation, for example torch.nn.Tanh.
        decoder_hidden: sizes of the decoder's hidden layers, where they are not the encoder's in reverse.
        batch_norm: normalise each hidden number over the batch in training, by running averages in evaluation.
        num_groups: normalise the hidden numbers in so many groups, each example by itself; 0: not.

    Raises:
        ValueError: both normalisations, or groups that do not divide a size or hold one number only.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (200, 200),
        activation: type[nn.Module] = nn.ReLU,
        decoder_hidden: Sequence[int] | None = None,
        batch_norm: bool = False,
        num_groups: int = 0,
    ):
        self.hidden, self.activation = tuple(hidden), activation
        self.decoder_hidden = self.hidden[::-1] if decoder_hidden is None else tuple(decoder_hidden)
        self.batch_norm, self.num_groups = batch_norm, num_groups
        check_normalization(self.hidden + self.decoder_hidden, batch_norm, num_groups, smallest=2)

    def __repr__(self) -> str:
        mirrored = self.decoder_hidden == self.hidden[::-1]
        more = "" if mirrored else f", decoder_hidden={self.decoder_hidden}"
        more += repr_normalization(self.batch_norm, self.num_groups)
        return f"MlpPair(hidden={self.hidden}, activation={self.activation.__name__}{more})"

    def _mlp(self, *sizes: int) -> nn.Module:
        return Mlp(*sizes, activation=self.activation, batch_norm=self.batch_norm, num_groups=self.num_groups)

    def encoder(self, event_shape: Sequence[int], num_outputs: int) -> nn.Module:
        """A network [*batch, *event_shape] -> [*batch, num_outputs]."""
        mlp = self._mlp(math.prod(event_shape), *self.hidden, num_outputs)
        return nn.Sequential(nn.Flatten(-len(event_shape)), mlp)

    def decoder(self, latent_dim: int, output_shape: Sequence[int]) -> nn.Module:
        """A network [*batch, latent_dim] -> [*batch, *output_shape]."""
        mlp = self._mlp(latent_dim, *self.decoder_hidden, math.prod(output_shape))
        return nn.Sequential(mlp, nn.Unflatten(-1, tuple(output_shape)))


class ConvPair(NetworkPair):
    """A pair of convolutional networks: each layer halves the picture on the way in, doubles it on the way out.

    Height and width must be multiples of 2 ** len(channels); any number of channels. Pictures are halved by a step of
    two pixels or by taking the largest of four. They are doubled by a transposed convolution with a step of two: the
    same as putting zeros between the pixels and convolving.

    Args:
        channels: channels after each halving.
        hidden: size of the linear layer between the convolutions and z; 0: none.
        activation: the class of the activation, for example torch.nn.SiLU.
        kernel_size: height and width of the convolutions.
        pool: halve by taking the largest of 2 x 2 pixels after the convolution.
        batch_norm: normalise each channel over the batch in training, by running averages in evaluation.
        num_groups: normalise in so many groups of channels, each example by itself; 0: not.

    Raises:
        ValueError: a size below its least, both normalisations, or groups that do not divide the channels.

    Example:
        >>> import torch
        >>> ConvPair((8, 16), hidden=32).encoder((3, 28, 28), 4)(torch.zeros(5, 3, 28, 28)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        activation: type[nn.Module] = nn.ReLU,
        kernel_size: int = 4,
        pool: bool = False,
        batch_norm: bool = False,
        num_groups: int = 0,
    ):
        if not channels or min(channels) < 1 or hidden < 0 or kernel_size < 2:
            raise ValueError(
                "expected one or more channels >= 1, hidden >= 0 and kernel_size >= 2, "
                f"found {tuple(channels)}, {hidden} and {kernel_size}."
            )
        check_normalization(channels, batch_norm, num_groups)
        self.channels, self.hidden, self.activation = tuple(channels), hidden, activation
        self.kernel_size, self.pool, self.batch_norm, self.num_groups = kernel_size, pool, batch_norm, num_groups

    def __repr__(self) -> str:
        more = "" if self.kernel_size == 4 else f", kernel_size={self.kernel_size}"
        more += ", pool=True" if self.pool else ""
        more += repr_normalization(self.batch_norm, self.num_groups)
        return f"ConvPair(channels={self.channels}, hidden={self.hidden}, activation={self.activation.__name__}{more})"

    def _small(self, shape: Sequence[int]) -> tuple[int, int, int]:
        height, width = halved("ConvPair", shape, len(self.channels))
        return self.channels[-1], height, width

    def _activate(self, width: int) -> list[nn.Module]:
        return [*normalization(width, self.batch_norm, self.num_groups, event_dim=3), self.activation()]

    def encoder(self, event_shape: Sequence[int], num_outputs: int) -> nn.Module:
        """A network [*batch, C, H, W] -> [*batch, num_outputs]."""
        size = math.prod(self._small(event_shape))
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([event_shape[0], *self.channels]):
            conv, *pool = halving(inputs, outputs, self.kernel_size, self.pool, bias=not self.batch_norm)
            layers += [conv, *self._activate(outputs), *pool]
        layers += [nn.Flatten()]
        if self.hidden:
            layers += [nn.Linear(size, self.hidden), self.activation()]
        return OverBatch(nn.Sequential(*layers, nn.Linear(self.hidden or size, num_outputs)), event_dim=3)

    def decoder(self, latent_dim: int, output_shape: Sequence[int]) -> nn.Module:
        """A network [*batch, latent_dim] -> [*batch, C, H, W]."""
        small = self._small(output_shape)
        layers: list[nn.Module] = [nn.Linear(latent_dim, self.hidden), self.activation()] if self.hidden else []
        layers += [nn.Linear(self.hidden or latent_dim, math.prod(small)), nn.Unflatten(1, small)]
        layers += self._activate(self.channels[-1])
        for inputs, outputs in pairwise(reversed(self.channels)):
            layers += [doubling(inputs, outputs, self.kernel_size, bias=not self.batch_norm), *self._activate(outputs)]
        layers += [doubling(self.channels[0], output_shape[0], self.kernel_size)]
        return OverBatch(nn.Sequential(*layers), event_dim=1)
