"""Layers that torch lacks: any number of batch axes, normalisation under them, pictures halved and doubled."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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


class BatchNorm(nn.BatchNorm1d):
    r"""Batch normalisation of vectors that has an answer for a batch of one: the running averages.

    .. math:: y_i = \gamma_i \frac{x_i - m_i}{\sqrt{v_i + \epsilon}} + \beta_i

    m and v are mean and variance over the batch in training, running averages of them in evaluation. torch's refuses
    the single example that an epoch may end on.

    Args:
        num_features: size of a vector.

    Source: Ioffe, Szegedy (2015), Batch normalization, arXiv:1502.03167.

    Example:
        >>> BatchNorm(2)(torch.ones(1, 2)).shape
        torch.Size([1, 2])
    """

    def forward(self, x: Tensor) -> Tensor:
        """The normalised vectors, [N, num_features]."""
        if self.training and len(x) == 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(x)


def normalization(width: int, batch_norm: bool, num_groups: int, event_dim: int) -> list[nn.Module]:
    """The layer that normalises vectors [*, width] (event_dim 1) or pictures [N, width, H, W] (3), or none.

    Args:
        width: how many numbers, or channels.
        batch_norm: over the batch, by running averages in evaluation.
        num_groups: in so many groups, each example by itself; 0: not.
        event_dim: axes of one example.
    """
    if not batch_norm and not num_groups:
        return []
    if event_dim == 3:
        return [nn.BatchNorm2d(width) if batch_norm else nn.GroupNorm(num_groups, width)]
    return [OverBatch(BatchNorm(width) if batch_norm else nn.GroupNorm(num_groups, width), event_dim=1)]


def check_normalization(widths: Sequence[int], batch_norm: bool, num_groups: int, smallest: int = 1) -> None:
    """Refuse two normalisations at once, and groups that do not divide the widths.

    Args:
        widths: how many numbers or channels each normalised layer has.
        batch_norm: whether there is batch normalisation.
        num_groups: number of groups; 0: none.
        smallest: the fewest members of a group: 2 for vectors, where a number less its own mean is nothing.

    Raises:
        ValueError: what does not fit.
    """
    if num_groups < 0:
        raise ValueError(f"expected num_groups >= 0, found {num_groups}: 0 for no normalisation in groups.")
    if batch_norm and num_groups:
        raise ValueError("expected one normalisation, found batch_norm and num_groups: choose one of them.")
    if num_groups and any(width % num_groups or width // num_groups < smallest for width in widths):
        members = " into two or more each" if smallest > 1 else ""
        raise ValueError(
            f"expected sizes that {num_groups} groups divide{members}, found {tuple(widths)}: "
            "change them or num_groups."
        )


def repr_normalization(batch_norm: bool, num_groups: int) -> str:
    """What a pair's repr says of its normalisation: nothing if there is none."""
    return ", batch_norm=True" if batch_norm else f", num_groups={num_groups}" if num_groups else ""


def halved(name: str, shape: Sequence[int], times: int) -> tuple[int, int]:
    """Height and width of an image [C, H, W] halved so many times.

    Args:
        name: the pair, for the message.
        shape: shape of the image.
        times: how many times.

    Raises:
        ValueError: no image, or odd sizes on the way.
    """
    factor = 2**times
    if len(shape) != 3 or shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"{name} expected images [C, H, W] with H and W multiples of {factor}, found {tuple(shape)}: "
            "use fewer channels, resize the images, or use MlpPair."
        )
    return shape[1] // factor, shape[2] // factor


def halving(inputs: int, outputs: int, kernel_size: int, pool: bool, bias: bool = True) -> list[nn.Module]:
    """A convolution that halves an even picture: by a step of two pixels, or followed by the largest of 2 x 2."""
    if pool:  # an even kernel leaves one row and column too many, which the pooling drops
        conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)
        return [conv, nn.MaxPool2d(2)]
    return [nn.Conv2d(inputs, outputs, kernel_size, stride=2, padding=(kernel_size - 1) // 2, bias=bias)]


def doubling(inputs: int, outputs: int, kernel_size: int, bias: bool = True) -> nn.Module:
    """A transposed convolution that doubles a picture."""
    padding, odd = (kernel_size - 1) // 2, kernel_size % 2
    return nn.ConvTranspose2d(inputs, outputs, kernel_size, stride=2, padding=padding, output_padding=odd, bias=bias)
