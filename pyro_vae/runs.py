"""A run folder, opened in Python: the model that ``pyro-vae train`` left there, and its data."""

from pathlib import Path
from typing import Any, Literal

from pyro_vae.command_training import train
from pyro_vae.configuration import open_run
from pyro_vae.parts import UsageError
from pyro_vae.vae import VAE


def load(run: str | Path, device: Literal["auto", "cpu", "cuda"] = "auto") -> tuple[VAE, Any]:
    """The trained VAE of a run folder, and its data set.

    Args:
        run: the run folder.
        device: where to put both; auto takes a GPU if there is one.

    Returns:
        The VAE with its trained parameters, and the data set: ``test`` in the form that the model sees, ``train`` as
        it is stored, which ``prepare`` brings into that form.

    Raises:
        ValueError: no run is there, its data set is missing, or its files do not fit together.
    """
    try:
        _, data, vae = open_run(train, str(run), device)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return vae, data
