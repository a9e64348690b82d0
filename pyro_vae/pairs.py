"""More pairs of networks for encoder and decoder: gated, residual, and those of some well-known small examples."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pyro_vae.networks import GatedMlp, NetworkPair, OverBatch


class GatedMlpPair(NetworkPair):
    """A pair of gated perceptrons, the encoder's hidden layers in reverse order for the decoder.

    Args:
        hidden: sizes of the encoder's hidden layers.

    Source: Tomczak, Welling (2018), VAE with a VampPrior, arXiv:1705.07120.

    Example:
        >>> GatedMlpPair().decoder(2, (1, 8, 8))[-1]
        Unflatten(dim=-1, unflattened_size=(1, 8, 8))
    """

    def __init__(self, hidden: Sequence[int] = (300, 300)):
        self.hidden = tuple(hidden)

    def __repr__(self) -> str:
        return f"GatedMlpPair(hidden={self.hidden})"

    def encoder(self, event_shape: Sequence[int], num_outputs: int) -> nn.Module:
        """A network [*batch, *event_shape] -> [*batch, num_outputs]."""
        mlp = GatedMlp(math.prod(event_shape), *self.hidden, num_outputs)
        return nn.Sequential(nn.Flatten(-len(event_shape)), mlp)

    def decoder(self, latent_dim: int, output_shape: Sequence[int]) -> nn.Module:
        """A network [*batch, latent_dim] -> [*batch, *output_shape]."""
        mlp = GatedMlp(latent_dim, *reversed(self.hidden), math.prod(output_shape))
        return nn.Sequential(mlp, nn.Unflatten(-1, tuple(output_shape)))


class ResidualBlock(nn.Module):
    r"""Two convolutions whose result is added to their input; the picture keeps its size.

    .. math:: f(x) = x + \mathrm{conv}(a(n(\mathrm{conv}(a(n(x))))))

    Activation a and normalisation n come before each convolution, so that the sum itself is left alone.

    Args:
        channels: channels of the picture.
        activation: the class of the activation.
        batch_norm: normalise each channel over the batch (in training) or by running averages (in evaluation).
        num_groups: normalise in so many groups of channels, each example by itself; 0: not.

    Source: He et al. (2016), Identity mappings in deep residual networks, arXiv:1603.05027.

    Example:
        >>> import torch
        >>> ResidualBlock(4)(torch.zeros(5, 4, 7, 9)).shape
        torch.Size([5, 4, 7, 9])
    """

    def __init__(
        self, channels: int, activation: type[nn.Module] = nn.ReLU, batch_norm: bool = False, num_groups: int = 0
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [*_normalization(channels, batch_norm, num_groups), activation()]
            layers += [nn.Conv2d(channels, channels, kernel_size=3, padding=1)]
        self.change = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The picture and what the convolutions make of it."""
        return x + self.change(x)


class ResidualPair(NetworkPair):
    """A pair of residual networks for pictures of any size and number of channels.

    On the way in each stage halves the picture (28, 14, 7, 4 for three of them: halves are rounded up) and refines it
    by residual blocks; the decoder goes the same way back by repeating pixels and convolving. Batch normalisation makes
    the training objective of an example depend on its batch, so that it is a bound in evaluation mode only;
    normalisation in groups does not.

    Args:
        channels: channels after each halving.
        blocks: residual blocks after each halving.
        hidden: size of the linear layer between the convolutions and z.
        activation: the class of the activation, for example torch.nn.SiLU.
        batch_norm: normalise each channel over the batch; running averages are used in evaluation.
        num_groups: normalise in so many groups of channels, each example by itself; 0: not.

    Raises:
        ValueError: both normalisations at once, num_groups divides some number of channels not, or blocks < 0.

    Source: He et al. (2016), Identity mappings in deep residual networks, arXiv:1603.05027.

    Example:
        >>> import torch
        >>> ResidualPair((8, 16), hidden=32).encoder((3, 28, 28), 4)(torch.zeros(5, 3, 28, 28)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        hidden: int = 256,
        activation: type[nn.Module] = nn.ReLU,
        batch_norm: bool = False,
        num_groups: int = 0,
    ):
        if blocks < 0 or num_groups < 0:
            raise ValueError(f"expected blocks and num_groups >= 0, found {blocks} and {num_groups}.")
        if batch_norm and num_groups:
            raise ValueError("expected one normalisation, found batch_norm and num_groups: choose one of them.")
        if num_groups and any(width % num_groups for width in channels):
            raise ValueError(
                f"expected numbers of channels that {num_groups} groups divide, found {tuple(channels)}: "
                "change channels or num_groups."
            )
        self.channels, self.blocks, self.hidden, self.activation = tuple(channels), blocks, hidden, activation
        self.batch_norm, self.num_groups = batch_norm, num_groups

    def __repr__(self) -> str:
        return (
            f"ResidualPair(channels={self.channels}, blocks={self.blocks}, hidden={self.hidden}, "
            f"activation={self.activation.__name__}, batch_norm={self.batch_norm}, num_groups={self.num_groups})"
        )

    def _sizes(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Height and width before and after each halving."""
        if len(shape) != 3:
            raise ValueError(f"ResidualPair expected images [C, H, W], found {tuple(shape)}: use MlpPair.")
        sizes = [(shape[1], shape[2])]
        for _ in self.channels:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        return sizes

    def _refine(self, width: int) -> list[nn.Module]:
        return [ResidualBlock(width, self.activation, self.batch_norm, self.num_groups) for _ in range(self.blocks)]

    def _activate(self, width: int) -> list[nn.Module]:
        return [*_normalization(width, self.batch_norm, self.num_groups), self.activation()]

    def encoder(self, event_shape: Sequence[int], num_outputs: int) -> nn.Module:
        """A network [*batch, C, H, W] -> [*batch, num_outputs]."""
        small = self._sizes(event_shape)[-1]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([event_shape[0], *self.channels]):
            layers += self._activate(inputs) if layers else []
            layers += [nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1), *self._refine(outputs)]
        last = self.channels[-1]
        layers += [*self._activate(last), nn.Flatten(), nn.Linear(last * math.prod(small), self.hidden)]
        layers += [self.activation(), nn.Linear(self.hidden, num_outputs)]
        return OverBatch(nn.Sequential(*layers), event_dim=3)

    def decoder(self, latent_dim: int, output_shape: Sequence[int]) -> nn.Module:
        """A network [*batch, latent_dim] -> [*batch, C, H, W]."""
        sizes, first = self._sizes(output_shape), self.channels[-1]
        layers: list[nn.Module] = [nn.Linear(latent_dim, self.hidden), self.activation()]
        layers += [nn.Linear(self.hidden, first * math.prod(sizes[-1])), nn.Unflatten(1, (first, *sizes[-1]))]
        widths = [*reversed(self.channels), output_shape[0]]
        for (inputs, outputs), size in zip(pairwise(widths), reversed(sizes[:-1]), strict=True):
            layers += [*self._refine(inputs), *self._activate(inputs), nn.Upsample(size=size)]
            layers += [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)]
        return OverBatch(nn.Sequential(*layers), event_dim=1)


def _normalization(channels: int, batch_norm: bool, num_groups: int) -> list[nn.Module]:
    if batch_norm:
        return [nn.BatchNorm2d(channels)]
    return [nn.GroupNorm(num_groups, channels)] if num_groups else []
