"""More pairs of networks for encoder and decoder: gated, residual, and with a picture for z."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pyro_vae.layers import (
    OverBatch,
    check_normalization,
    doubling,
    halved,
    halving,
    normalization,
    repr_normalization,
)
from pyro_vae.networks import GatedMlp, NetworkPair


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
            layers += [*normalization(channels, batch_norm, num_groups, event_dim=3), activation()]
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
        if blocks < 0:
            raise ValueError(f"expected blocks >= 0, found {blocks}: 0 for plain convolutions.")
        check_normalization(channels, batch_norm, num_groups)
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
        return [*normalization(width, self.batch_norm, self.num_groups, event_dim=3), self.activation()]

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


class SpatialPair(NetworkPair):
    r"""A pair of convolutional networks whose z is itself a small picture: each number of z sees a part of x.

    .. math:: z \in \mathbb R^{c \times h \times w}, \quad h = H / 2^{n+1},\ w = W / 2^{n+1},\ n \text{ hidden layers}

    There is no linear layer between x and z. Outside z stays a vector of D = c h w numbers, row by row and channel
    after channel, so any prior and posterior over R^D goes with it and the KL sums over all of them; latent_dim
    decides how many channels it has: 196 makes 4 x 7 x 7 of 28 x 28 pixels and one hidden layer. Where a posterior's
    number of outputs is no multiple of h w, a linear layer follows its last halving.

    Args:
        channels: channels after each halving but the last, which gives z; may be empty.
        activation: the class of the activation, for example torch.nn.SiLU.
        kernel_size: height and width of the convolutions: one number, or one for each halving.
        pool: halve by taking the largest of 2 x 2 pixels after the convolution.
        batch_norm: normalise each channel over the batch in training, by running averages in evaluation.
        num_groups: normalise in so many groups of channels, each example by itself; 0: not.

    Raises:
        ValueError: kernel sizes below 2 or not one for each halving, a number of channels below 1, both
            normalisations, or groups that do not divide the channels; later, sizes that do not fit the picture.

    Example:
        >>> import torch
        >>> pair = SpatialPair((32,), kernel_size=(5, 3), pool=True)
        >>> pair.latent_shape(196, (1, 28, 28)), pair.encoder((1, 28, 28), 2 * 196)(torch.zeros(5, 1, 28, 28)).shape
        ((4, 7, 7), torch.Size([5, 392]))
    """

    def __init__(
        self,
        channels: Sequence[int] = (32,),
        activation: type[nn.Module] = nn.ReLU,
        kernel_size: int | Sequence[int] = 4,
        pool: bool = False,
        batch_norm: bool = False,
        num_groups: int = 0,
    ):
        times = len(channels) + 1
        sizes = (kernel_size,) * times if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(sizes) != times or min(sizes) < 2 or min(channels, default=1) < 1:
            raise ValueError(
                f"expected channels >= 1 and one kernel_size >= 2 for each of {times} halvings, "
                f"found {tuple(channels)} and {kernel_size}."
            )
        check_normalization(channels, batch_norm, num_groups)
        self.channels, self.activation, self.kernel_sizes = tuple(channels), activation, sizes
        self.pool, self.batch_norm, self.num_groups = pool, batch_norm, num_groups

    def __repr__(self) -> str:
        more = (", pool=True" if self.pool else "") + repr_normalization(self.batch_norm, self.num_groups)
        return (
            f"SpatialPair(channels={self.channels}, activation={self.activation.__name__}, "
            f"kernel_size={self.kernel_sizes}{more})"
        )

    def latent_shape(self, latent_dim: int, image_shape: Sequence[int]) -> tuple[int, int, int]:
        """The shape (c, h, w) that a z of latent_dim numbers has for images of shape [C, H, W].

        Raises:
            ValueError: an image whose sides cannot be halved so often, or a latent_dim that no c gives.
        """
        height, width = halved("SpatialPair", image_shape, len(self.kernel_sizes))
        size = height * width
        if latent_dim % size:
            raise ValueError(
                f"SpatialPair expected latent_dim to be a multiple of {size} (z has {height} x {width} pixels), "
                f"found {latent_dim}: choose {size}, {2 * size}, ..., or more channels for a smaller picture."
            )
        return latent_dim // size, height, width

    def _activate(self, width: int) -> list[nn.Module]:
        return [*normalization(width, self.batch_norm, self.num_groups, event_dim=3), self.activation()]

    def encoder(self, event_shape: Sequence[int], num_outputs: int) -> nn.Module:
        """A network [*batch, C, H, W] -> [*batch, num_outputs]."""
        size = math.prod(halved("SpatialPair", event_shape, len(self.kernel_sizes)))
        widths = [event_shape[0], *self.channels]
        fits = num_outputs % size == 0
        layers: list[nn.Module] = []
        for (inputs, outputs), kernel in zip(pairwise(widths), self.kernel_sizes[:-1], strict=True):
            conv, *pool = halving(inputs, outputs, kernel, self.pool, bias=not self.batch_norm)
            layers += [conv, *self._activate(outputs), *pool]
        last = num_outputs // size if fits else widths[-1]
        layers += [*halving(widths[-1], last, self.kernel_sizes[-1], self.pool), nn.Flatten()]
        layers += [] if fits else [self.activation(), nn.Linear(last * size, num_outputs)]
        return OverBatch(nn.Sequential(*layers), event_dim=3)

    def decoder(self, latent_dim: int, output_shape: Sequence[int]) -> nn.Module:
        """A network [*batch, latent_dim] -> [*batch, C, H, W]."""
        shape = self.latent_shape(latent_dim, output_shape)
        widths = [shape[0], *reversed(self.channels)]
        layers: list[nn.Module] = [nn.Unflatten(1, shape)]
        for (inputs, outputs), kernel in zip(pairwise(widths), reversed(self.kernel_sizes[1:]), strict=True):
            layers += [doubling(inputs, outputs, kernel, bias=not self.batch_norm), *self._activate(outputs)]
        layers += [doubling(widths[-1], output_shape[0], self.kernel_sizes[0])]
        return OverBatch(nn.Sequential(*layers), event_dim=1)
