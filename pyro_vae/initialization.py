"""Where the weights of a network start: He, Glorot, plainly normal; and an output bias taken from the data."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


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
        >>> from pyro_vae import Mlp
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
        >>> from pyro_vae import Mlp
        >>> bool(init_glorot(Mlp(3, 200, 4))[0].weight.abs().max() <= (6 / 203) ** 0.5)
        True
    """
    with torch.no_grad():
        for layer, inputs, outputs in _weighted_layers(net):
            bound = math.sqrt(6 / (inputs + outputs))
            layer.weight.uniform_(-bound, bound)
    return net


def init_normal(net: nn.Module, scale: float = 0.02) -> nn.Module:
    r"""Normal weights of one standard deviation whatever the layer's size, none beyond two of them; biases 0.

    .. math:: W \sim \mathcal N(0, s^2) \text{ given } |W| \le 2 s

    The habit of early convolutional generators; the size of activations depends on the widths.

    Args:
        net: a network; all its linear and convolutional layers are drawn anew, in place.
        scale: the standard deviation s before the tails are cut off.

    Returns:
        The same network.

    Raises:
        ValueError: scale <= 0.

    Source: Radford, Metz, Chintala (2016), Unsupervised representation learning with deep convolutional generative
        adversarial networks, arXiv:1511.06434 (whose normal is not cut off).

    Example:
        >>> from pyro_vae import Mlp
        >>> bool(init_normal(Mlp(3, 200, 4))[0].weight.abs().max() <= 0.04)
        True
    """
    if not scale > 0:
        raise ValueError(f"expected scale > 0, found {scale}: it is a standard deviation.")
    for layer, _, _ in _weighted_layers(net):
        nn.init.trunc_normal_(layer.weight, std=scale, a=-2 * scale, b=2 * scale)
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
            nn.init.zeros_(layer.bias)
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
    layers = [m for m in net.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    last = getattr(layers[-1], "bias", None) if layers else None
    size = 0 if last is None else last.numel()
    if size == bias.numel():
        value = bias.flatten()
    elif size == len(bias) and bias.dim() == 3:
        value = bias.mean((1, 2))
    else:
        found = "no bias at all" if last is None else f"a bias of {size}"
        raise ValueError(
            f"expected a last layer with a bias of {bias.numel()} numbers, found {found}: "
            "end the decoder's network in a linear layer or a convolution, or leave its bias as it is."
        )
    with torch.no_grad():
        last.copy_(value)  # type: ignore[union-attr]


STARTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda net: net,
    "he": init_he,
    "glorot": init_glorot,
    "normal": init_normal,
}
"""How the command line calls them; "torch" leaves a network as its layers made it."""
