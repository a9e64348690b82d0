"""What a VAE is made of, layer by layer: shapes and numbers of parameters of encoder, z and decoder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.contracts import untouched
from pyro_vae.supports import elements

_SYMBOLS = {"loc": "mean μ(x)", "scale": "standard deviation σ(x)", "scale_tril": "Cholesky factor L(x)"}


class Layer(NamedTuple):
    """One layer of a VAE: which part it is in, its class, the shape of its output for one example, its parameters."""

    part: str
    name: str
    shape: tuple[int, ...]
    num_parameters: int


def layers(vae: Any, event_shape: Sequence[int]) -> list[Layer]:
    """The layers in the order in which x passes them: those of the encoder, z, those of the decoder.

    Found by running one example of zeros; nothing changes. A layer that runs several times is listed, with its
    parameters, the first time only. Parameters outside of layers that run (a learned scale, say) stand in a line
    "further parameters" of their part, those of the prior in that of z; each is counted once.

    Args:
        vae: a model with ``prior``, ``encoder`` and ``decoder``.
        event_shape: shape of one example x.

    Returns:
        The layers; their parameters add up to those of the VAE.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> [(layer.part, *layer.shape) for layer in layers(vae, (7,)) if layer.num_parameters]
        [('encoder', 8), ('encoder', 4), ('decoder', 8), ('decoder', 7)]
    """
    like = next((p for p in vae.parameters()), torch.zeros(()))
    x = torch.zeros(1, *event_shape, dtype=like.dtype, device=like.device)
    counted: set[int] = set()

    def count(parameters: Iterator[nn.Parameter]) -> int:
        fresh = [p for p in parameters if id(p) not in counted]
        counted.update(map(id, fresh))
        return sum(p.numel() for p in fresh)

    with untouched(vae, seed=0), pyro.validation_enabled(False):
        with _watched(vae.encoder, "encoder", count) as rows:
            q = vae.encoder(x)
        z = q.sample()
        further = count(_parameters(vae.encoder))
        rows += [Layer("encoder", "further parameters", (), further)] if further else []
        rows += [Layer("z", *found, 0) for found in _contents(q)]
        rows += [Layer("z", "z", tuple(z.shape[1:]), 0)]
        further = count(_parameters(vae.prior))
        rows += [Layer("z", "further parameters", (), further)] if further else []
        with _watched(vae.decoder, "decoder", count) as more:
            vae.decoder(z)
        rows += more
    further = count(vae.parameters())
    return rows + ([Layer("decoder", "further parameters", (), further)] if further else [])


def summary(vae: Any, event_shape: Sequence[int]) -> str:
    """The layers as a table to read, with subtotals.

    Args:
        vae: a model with ``prior``, ``encoder`` and ``decoder``.
        event_shape: shape of one example x.

    Returns:
        Lines of text.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> print(summary(vae, (7,)))
                                       output  parameters
        x                                   7
        encoder q(z | x): DiagonalNormal              100
          Linear                            8          64
          ReLU                              8
          Linear                            4          36
        latent z, prior p(z): StandardNormal            0
          mean μ(x)                         2
          standard deviation σ(x)           2
          z                                 2
        decoder p(x | z): Bernoulli                    87
          Linear                            8          24
          ReLU                              8
          Linear                            7          63
        all                                           187
    """
    rows = layers(vae, event_shape)
    likelihood = getattr(vae.decoder, "likelihood", vae.decoder)
    table = [("", "output", "parameters"), ("x", _times(event_shape), "")]
    for part, title in (
        ("encoder", f"encoder q(z | x): {type(vae.encoder).__name__}"),
        ("z", f"latent z, prior p(z): {type(vae.prior).__name__}"),
        ("decoder", f"decoder p(x | z): {type(likelihood).__name__}"),
    ):
        own = [row for row in rows if row.part == part]
        total = sum(row.num_parameters for row in own)
        table += [(title, "", f"{total:,}")]
        table += [(f"  {r.name}", _times(r.shape), f"{r.num_parameters:,}" if r.num_parameters else "") for r in own]
    table += [("all", "", f"{sum(row.num_parameters for row in rows):,}")]
    first, second, third = (max(len(row[i]) for row in table) for i in range(3))
    lines = [f"{a:<{first}}  {b:>{second}}  {c:>{third}}".rstrip() for a, b, c in table]
    return "\n".join(lines)


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _parameters(part: Any) -> Iterator[nn.Parameter]:
    return part.parameters() if isinstance(part, nn.Module) else iter(())


def _contents(q: Any) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors that the encoder's distribution is made of: [("mean μ(x)", (2,)), ...]."""
    q = elements(q)
    names = [name for name in q.arg_constraints if isinstance(vars(q).get(name), Tensor)]
    return [(_SYMBOLS.get(name, f"{name}(x)"), tuple(getattr(q, name).shape[1:])) for name in names]


@contextmanager
def _watched(part: Any, name: str, count: Callable[[Iterator[nn.Parameter]], int]) -> Iterator[list[Layer]]:
    """The layers of a part that run inside the block, as they run."""
    rows: list[Layer] = []
    seen: set[nn.Module] = set()

    def note(layer: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor) and layer not in seen:
            seen.add(layer)
            rows.append(Layer(name, type(layer).__name__, tuple(out.shape[1:]), count(layer.parameters())))

    with ExitStack() as stack:
        for layer in part.modules() if isinstance(part, nn.Module) else ():
            if not list(layer.children()):
                stack.callback(layer.register_forward_hook(note).remove)
        yield rows
