"""Networks: no probability in this file. Functions from tensors to tensors that decoders and encoders are made of."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Mlp(nn.Sequential):
    """A multilayer perceptron: linear layers of the sizes given, an activation between each two.

    Works on the last axis; any number of axes in front.

    Args:
        *sizes: input size, hidden sizes, output size: at least two.
        activation: the class of the activation, without parameters.

    Raises:
        ValueError: fewer than two sizes, or one below 1.

    Example:
        >>> Mlp(64, 128, 4)(torch.zeros(3, 5, 64)).shape
        torch.Size([3, 5, 4])
    """

    def __init__(self, *sizes: int, activation: type[nn.Module] = nn.ReLU):
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"expected at least two sizes >= 1, found {sizes}: Mlp(inputs, hidden, ..., outputs).")
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])


class OverBatch(nn.Module):
    """Let a network that takes exactly one batch axis (a convolution, say) take any number of them.

    Args:
        net: a network [B, *inputs] -> [B, *outputs].
        event_dim: number of axes of one input.

    Example:
        >>> OverBatch(nn.Conv2d(1, 2, 3), event_dim=3)(torch.zeros(3, 5, 1, 8, 8)).shape
        torch.Size([3, 5, 2, 6, 6])
    """

    def __init__(self, net: nn.Module, event_dim: int):
        super().__init__()
        self.net, self.event_dim = net, event_dim

    def forward(self, x: Tensor) -> Tensor:
        """The network's output with the leading axes of x."""
        batch = x.shape[: x.dim() - self.event_dim]
        out = self.net(x.reshape(-1, *x.shape[x.dim() - self.event_dim :]))
        return out.reshape(*batch, *out.shape[1:])


class Standardize(nn.Module):
    """Shift and scale the input to mean 0 and standard deviation 1, by fixed numbers taken from the data.

    Args:
        loc: what is subtracted; a number or a tensor that broadcasts with the input.
        scale: what is divided by; positive.

    Raises:
        ValueError: a scale that is not positive.

    Example:
        >>> Standardize(8.0, 4.0)(torch.tensor([8.0, 12.0]))
        tensor([0., 1.])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor | float, scale: Tensor | float):
        super().__init__()
        if not bool((torch.as_tensor(scale) > 0).all()):
            raise ValueError("expected scale > 0, found a number that is not: drop constant columns first.")
        self.register_buffer("loc", torch.as_tensor(loc, dtype=torch.get_default_dtype()))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """(x - loc) / scale."""
        return (x - self.loc) / self.scale


class NetworkPair(ABC):
    """Recipes for the two networks of a VAE; each call builds a fresh one. One of your own has these two methods."""

    @abstractmethod
    def encoder(self, event_shape: Sequence[int], num_outputs: int) -> nn.Module:
        """A network x [*batch, *event_shape] -> [*batch, num_outputs]."""

    @abstractmethod
    def decoder(self, latent_dim: int, output_shape: Sequence[int]) -> nn.Module:
        """A network z [*batch, latent_dim] -> h [*batch, *output_shape]."""


class MlpPair(NetworkPair):
    """A pair of perceptrons, the encoder's hidden layers in reverse order for the decoder.

    Args:
        hidden: sizes of the encoder's hidden layers.
        activation: the class of the activation, for example torch.nn.Tanh.
    """

    def __init__(self, hidden: Sequence[int] = (200, 200), activation: type[nn.Module] = nn.ReLU):
        self.hidden, self.activation = tuple(hidden), activation

    def __repr__(self) -> str:
        return f"MlpPair(hidden={self.hidden}, activation={self.activation.__name__})"

    def encoder(self, event_shape: Sequence[int], num_outputs: int) -> nn.Module:
        """A network [*batch, *event_shape] -> [*batch, num_outputs]."""
        mlp = Mlp(math.prod(event_shape), *self.hidden, num_outputs, activation=self.activation)
        return nn.Sequential(nn.Flatten(-len(event_shape)), mlp)

    def decoder(self, latent_dim: int, output_shape: Sequence[int]) -> nn.Module:
        """A network [*batch, latent_dim] -> [*batch, *output_shape]."""
        mlp = Mlp(latent_dim, *reversed(self.hidden), math.prod(output_shape), activation=self.activation)
        return nn.Sequential(mlp, nn.Unflatten(-1, tuple(output_shape)))


class ConvPair(NetworkPair):
    """A pair of convolutional networks: each layer halves the picture on the way in, doubles it on the way out.

    Height and width must be multiples of 2 ** len(channels).

    Args:
        channels: channels after each halving.
        hidden: size of the linear layer between the convolutions and z.
        activation: the class of the activation, for example torch.nn.SiLU.
    """

    def __init__(self, channels: Sequence[int] = (32, 64), hidden: int = 256, activation: type[nn.Module] = nn.ReLU):
        self.channels, self.hidden, self.activation = tuple(channels), hidden, activation

    def __repr__(self) -> str:
        return f"ConvPair(channels={self.channels}, hidden={self.hidden}, activation={self.activation.__name__})"

    def _small(self, shape: Sequence[int]) -> tuple[int, int, int]:
        factor = 2 ** len(self.channels)
        if len(shape) != 3 or shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"ConvPair expected images [C, H, W] with H and W multiples of {factor}, found {tuple(shape)}: "
                "use fewer channels, resize the images, or use MlpPair."
            )
        return self.channels[-1], shape[1] // factor, shape[2] // factor

    def encoder(self, event_shape: Sequence[int], num_outputs: int) -> nn.Module:
        """A network [*batch, C, H, W] -> [*batch, num_outputs]."""
        small = self._small(event_shape)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([event_shape[0], *self.channels]):
            layers += [nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1), self.activation()]
        layers += [nn.Flatten(), nn.Linear(math.prod(small), self.hidden), self.activation()]
        return OverBatch(nn.Sequential(*layers, nn.Linear(self.hidden, num_outputs)), event_dim=3)

    def decoder(self, latent_dim: int, output_shape: Sequence[int]) -> nn.Module:
        """A network [*batch, latent_dim] -> [*batch, C, H, W]."""
        small = self._small(output_shape)
        layers: list[nn.Module] = [nn.Linear(latent_dim, self.hidden), self.activation()]
        layers += [nn.Linear(self.hidden, math.prod(small)), nn.Unflatten(1, small)]
        widths = [*reversed(self.channels), output_shape[0]]
        for inputs, outputs in pairwise(widths):
            layers += [
                self.activation(),
                nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1),
            ]
        return OverBatch(nn.Sequential(*layers), event_dim=1)


def set_output_bias(net: nn.Module, bias: Tensor) -> None:
    """Set the bias of a network's last layer so that its output starts at the values given.

    A convolution has one bias a channel: it gets the mean over the picture.

    Args:
        net: a network whose last layer with parameters is linear or a convolution.
        bias: the wanted output, [*E].

    Raises:
        ValueError: the last layer has no bias of that size.
    """
    biases = [b for b in (getattr(m, "bias", None) for m in net.modules()) if isinstance(b, Tensor)]
    size = biases[-1].numel() if biases else 0
    if size == bias.numel():
        value = bias.flatten()
    elif size == len(bias) and bias.dim() == 3:
        value = bias.mean((1, 2))
    else:
        found = f"a bias of {size}" if biases else "no bias at all"
        raise ValueError(
            f"expected a last layer with a bias of {bias.numel()} numbers, found {found}: "
            "end the decoder's network in a linear layer or a convolution, or leave its bias as it is."
        )
    with torch.no_grad():
        biases[-1].copy_(value)
