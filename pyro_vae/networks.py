"""Networks: no probability in this file. Functions from tensors to tensors that decoders and encoders are made of."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

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

    A floating-point tensor is copied and keeps its precision; a number or an integer tensor takes the default one.

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
        self.register_buffer("loc", _own_floats(loc))
        self.register_buffer("scale", _own_floats(scale))

    def forward(self, x: Tensor) -> Tensor:
        """(x - loc) / scale."""
        return (x - self.loc) / self.scale


def _own_floats(value: Tensor | float) -> Tensor:
    """A copy, so that no later change of the caller's tensor reaches it."""
    value = torch.as_tensor(value).detach().clone()
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


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
    """

    def __init__(
        self,
        hidden: Sequence[int] = (200, 200),
        activation: type[nn.Module] = nn.ReLU,
        decoder_hidden: Sequence[int] | None = None,
    ):
        self.hidden, self.activation = tuple(hidden), activation
        self.decoder_hidden = self.hidden[::-1] if decoder_hidden is None else tuple(decoder_hidden)

    def __repr__(self) -> str:
        mirrored = self.decoder_hidden == self.hidden[::-1]
        more = "" if mirrored else f", decoder_hidden={self.decoder_hidden}"
        return f"MlpPair(hidden={self.hidden}, activation={self.activation.__name__}{more})"

    def encoder(self, event_shape: Sequence[int], num_outputs: int) -> nn.Module:
        """A network [*batch, *event_shape] -> [*batch, num_outputs]."""
        mlp = Mlp(math.prod(event_shape), *self.hidden, num_outputs, activation=self.activation)
        return nn.Sequential(nn.Flatten(-len(event_shape)), mlp)

    def decoder(self, latent_dim: int, output_shape: Sequence[int]) -> nn.Module:
        """A network [*batch, latent_dim] -> [*batch, *output_shape]."""
        mlp = Mlp(latent_dim, *self.decoder_hidden, math.prod(output_shape), activation=self.activation)
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


def init_he(net: nn.Module) -> nn.Module:
    r"""He initialisation, for networks of rectifiers: normal weights that keep the size of activations; biases 0.

    .. math:: W \sim \mathcal N(0, 2 / n_{\mathrm{in}})

    n_in is the number of inputs that one output of a linear or convolutional layer adds up; where a transposed
    convolution overlaps itself, their average number.

    Args:
        net: a network; all its linear and convolutional layers are drawn anew, in place.

    Returns:
        The same network.

    Source: He et al. (2015), Delving deep into rectifiers, arXiv:1502.01852.

    Example:
        >>> init_he(Mlp(1000, 200, 4))[0].weight.std().round(decimals=3)
        tensor(0.0450, grad_fn=<RoundBackward1>)
    """
    with torch.no_grad():
        for layer, inputs, _ in _weighted_layers(net):
            layer.weight.normal_(std=math.sqrt(2 / inputs))
    return net


def init_glorot(net: nn.Module) -> nn.Module:
    r"""Glorot initialisation, for tanh and linear networks: uniform weights that keep the size of activations and
    gradients; biases 0.

    .. math:: W \sim \mathcal U(-a, a), \qquad a = \sqrt{6 / (n_{\mathrm{in}} + n_{\mathrm{out}})}

    n_in and n_out are the numbers of inputs that one output adds up, and of outputs that one input reaches.

    Args:
        net: a network; all its linear and convolutional layers are drawn anew, in place.

    Returns:
        The same network.

    Source: Glorot, Bengio (2010), Understanding the difficulty of training deep feedforward neural networks,
        https://proceedings.mlr.press/v9/glorot10a.html.

    Example:
        >>> bool(init_glorot(Mlp(3, 200, 4))[0].weight.abs().max() <= (6 / 203) ** 0.5)
        True
    """
    with torch.no_grad():
        for layer, inputs, outputs in _weighted_layers(net):
            bound = math.sqrt(6 / (inputs + outputs))
            layer.weight.uniform_(-bound, bound)
    return net


def _weighted_layers(net: nn.Module) -> Iterator[tuple[Any, float, float]]:
    """Each linear and convolutional layer, its bias set to 0, with the inputs an output adds up, and the reverse."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            inputs, outputs = float(layer.in_features), float(layer.out_features)
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            window, stride = math.prod(layer.kernel_size) / layer.groups, math.prod(layer.stride)
            inputs, outputs = layer.in_channels * window, layer.out_channels * window
            if isinstance(layer, nn.ConvTranspose2d):  # stride spreads the inputs out
                inputs /= stride
            else:
                outputs /= stride
        else:
            continue
        if layer.bias is not None:
            layer.bias.zero_()
        yield layer, inputs, outputs


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
