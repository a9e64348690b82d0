"""``pyro-vae impute``."""

from pathlib import Path
from typing import Literal

from pyro_vae import missing
from pyro_vae.checkpoints import write_atomically
from pyro_vae.command_training import train
from pyro_vae.configuration import open_run
from pyro_vae.parts import UsageError


def impute(
    run: str,
    num_particles: int = 1000,
    sample: bool = False,
    out: str | None = None,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Fill the missing cells of a run's table with what the model expects there, given the other cells of the row.

    All rows of the file, in its order; what was there stays as it was. A number gets its mean, a category or bit the
    most probable value.

    Args:
        run: the run folder.
        num_particles: draws K of z for each row.
        sample: draw the missing cells in place of their mean: with other seeds, multiple imputation.
        out: the table to write; default: imputed.csv in the run folder.
        seed: seed of the draws.
        device: where to compute; auto takes a GPU if there is one.
    """
    _, data, vae = open_run(train, run, device)
    if not hasattr(data, "filled"):
        raise UsageError(f"expected a run on a table (--data Table), found {data.name}: in Python, pyro_vae.impute.")
    parts = [x.to(data.test.device) for x in (data.train, data.test)]
    gaps = sum(int(x.isnan().sum()) for x in parts)
    if not gaps:
        raise UsageError(f"expected missing cells in {data.name}, found none: nothing is left to fill.")
    train_rows, test_rows = (
        missing.impute(vae, x, num_particles, sample=sample, seed=seed + i) for i, x in enumerate(parts)
    )
    path = Path(out) if out else Path(run) / "imputed.csv"
    write_atomically(path, data.filled(train_rows, test_rows))
    cells = sum(x.numel() for x in parts)
    print(f"filled     {gaps} of {cells} cells with {'draws' if sample else 'means'}, K={num_particles}")
    print(f"wrote      {path}")
