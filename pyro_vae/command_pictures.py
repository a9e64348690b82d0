"""``pyro-vae sample`` and ``pyro-vae reconstruct``."""

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from pyro_vae import (
    image_plots,
)
from pyro_vae.checkpoints import write_atomically
from pyro_vae.command_training import train
from pyro_vae.configuration import open_run
from pyro_vae.contracts import untouched
from pyro_vae.parts import UsageError
from pyro_vae.supports import NO_LIKELIHOOD, is_normalised


def sample(
    run: str,
    num: int = 64,
    out: str | None = None,
    seed: int = 0,
    mean: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Draw examples from the prior of a run: z ~ p(z), then x.

    Args:
        run: the run folder.
        num: how many.
        out: a picture (.png), a table (.csv) or an array (.npy); default: samples.png, samples.csv for a table with
            named columns, samples.npy for other rows, in the run folder.
        seed: seed of the draws.
        mean: show the mean of p(x | z) instead of a draw from it.
        device: where to compute; auto takes a GPU if there is one.
    """
    if num < 1:
        raise UsageError(f"--num: expected a number >= 1, found {num}.")
    _, data, vae = open_run(train, run, device)
    with untouched(vae, seed):
        p = vae.decode(vae.prior().sample((num,)))
        if not mean and not is_normalised(p):
            raise UsageError(f"expected a likelihood to draw x from, found a score ({NO_LIKELIHOOD}): use --mean true.")
        x = p.mean if mean else p.sample()
    _write_x(x, data, Path(out) if out else Path(run) / "samples", f"{num} {'means' if mean else 'draws'} of p(x | z)")


def reconstruct(
    run: str,
    index: int | list[int] | None = None,
    num: int = 10,
    out: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Show held-out examples above their reconstructions, the mean of p(x | z) at the posterior mean.

    Args:
        run: the run folder.
        index: which held-out examples, for example 3 or [1, 3, 7]; default: the first ones.
        num: how many, where no index is given.
        out: a picture (.png), a table (.csv) or an array (.npy); default: reconstructions.png in the run folder.
        device: where to compute; auto takes a GPU if there is one.
    """
    if num < 1:
        raise UsageError(f"--num: expected a number >= 1, found {num}.")
    _, data, vae = open_run(train, run, device)
    rows = list(range(min(num, len(data.test)))) if index is None else [index] if isinstance(index, int) else index
    bad = [i for i in rows if not 0 <= i < len(data.test)]
    if bad or not rows:
        raise UsageError(f"expected indices 0..{len(data.test) - 1} of held-out examples, found {bad or rows}.")
    x = data.test[rows]
    with untouched(vae):
        x_hat = vae.reconstruct(x)
    path = Path(out) if out else Path(run) / "reconstructions"
    _write_x(x_hat, data, path, "reconstructions", originals=x)


def _write_x(x: Tensor, data: Any, path: Path, title: str, originals: Tensor | None = None) -> None:
    """Write examples as a picture where they are images, as CSV where they are rows of one, as an array on demand."""
    image, table = x.dim() == 4 and x.shape[1] in (1, 3), hasattr(data, "csv")
    kinds = [".png"] * image + [".csv"] * table + [".npy"]
    path = path if path.suffix else path.with_suffix(kinds[0])
    if path.suffix not in kinds:
        why = "" if image else " (these examples are no images)"
        raise UsageError(f"expected --out to end in {' or '.join(kinds)}{why}, found {path.name}.")
    buffer = io.BytesIO()
    if path.suffix == ".csv":
        buffer.write(data.csv(x).encode("utf-8"))
    elif path.suffix == ".npy":
        np.save(buffer, x.cpu().numpy(), allow_pickle=False)
    else:
        value_range = (0.0, max(1.0, float(data.test.nan_to_num(nan=0.0).max())))
        if originals is None:
            ax = image_plots.image_grid(x.cpu(), value_range=value_range, title=title)
        else:
            ax = image_plots.reconstructions(originals.cpu(), x.cpu(), value_range=value_range)
        figure = ax.get_figure(root=True)
        assert figure is not None
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    write_atomically(path, buffer.getvalue())
    print(f"wrote      {path}")
