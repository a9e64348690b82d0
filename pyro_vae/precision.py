"""Reduced precision of the networks' products, in training steps only.

Parameters, activations, densities, sums and the optimiser stay in float32; estimates, held-out numbers and checkpoints
never see it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Precision = Literal["float32", "tf32", "bf16"]

# How far a captured step may be from the eager one at the same precision: products of other rounding, summed otherwise.
TOLERANCES = {"float32": 1e-3, "tf32": 1e-2, "bf16": 3e-2}

_functional = torch.nn.functional
_PRODUCTS = {_functional.linear}
_PRODUCTS |= {getattr(_functional, f"conv{transposed}{d}d") for transposed in ("", "_transpose") for d in (1, 2, 3)}


def check_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what this device or these parameters do not have.

    Args:
        precision: "float32", "tf32" or "bf16".
        device: where training computes.
        dtype: the parameters' type.

    Raises:
        ValueError: it is none of the three, TF32 is asked for where there is none, or parameters are no float32.
    """
    if precision not in TOLERANCES:
        raise ValueError(f"expected precision float32, tf32 or bf16, found {precision!r}: choose one of them.")
    if precision != "float32" and dtype != torch.float32:
        raise ValueError(f"expected float32 parameters with precision={precision}, found {dtype}: use vae.float().")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"expected a model on a GPU with precision=tf32, found it on {device}: use bf16 or float32.")


def rounded(function: Callable[..., Any], precision: Precision) -> Callable[..., Any]:
    """A function whose products of networks (linear maps and convolutions) are those of bfloat16, if so asked.

    The factors of each product, and its result, are rounded to 8 bits of precision. At fresh weights, batch 128 and the
    same noise this moved the ELBO of a batch (some -550 nats per example) by 0.024 nats per example on a 784-400-z50
    network and by 0.034 on a convolutional one, and the gradient by 0.3 % of its length; replayed steps took 0.78 of
    their time, on one core of a CPU with AVX512-BF16.

    Args:
        function: what computes, captured or not.
        precision: "bf16"; for the others the function stays as it is.

    Example:
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = layer.weight.data.fill_(1 / 3)
        >>> rounded(layer, "bf16")(torch.ones(1)).item()
        0.333984375
    """
    if precision != "bf16":
        return function

    def shorter(*args: Any) -> Any:
        with _Rounded(torch.bfloat16):
            return function(*args)

    return shorter


@contextmanager
def tensor_cores(precision: Precision, device: torch.device) -> Iterator[None]:
    """On a GPU, float32 products by TF32 (10 bits of precision) or, with "float32", not: torch's settings, put back.

    Args:
        precision: "float32" turns TF32 off, for convolutions too, where torch has it on; "tf32" turns it on.
        device: where training computes; on a processor nothing is set.
    """
    if device.type != "cuda":
        yield
        return
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made at import
    before = _older_settings(), matmul.fp32_precision, conv.fp32_precision
    try:
        _set_older("high" if precision == "tf32" else "highest", precision == "tf32")
        yield
    finally:
        _set_older(*before[0])
        matmul.fp32_precision, conv.fp32_precision = before[1:]


def _older_settings() -> tuple[str, bool]:
    """As torch's older interface has them; where the newer one was used, reading the older one fails."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return "highest", True


def _set_older(matmul: str, conv: bool) -> None:
    """The older interface writes what the newer one reads, and inductor reads both."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = conv


class _Rounded(TorchFunctionMode):
    """Products of float32 tensors by way of a shorter type; what they give is float32 again."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        out = func(*map(self._shorter, args), **{name: self._shorter(value) for name, value in kwargs.items()})
        return out.float() if out.dtype == self.dtype else out

    def _shorter(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value
