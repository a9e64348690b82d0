"""Save and load: files appear whole or not at all, and nothing is ever unpickled.

A training state is ONE safetensors file (parameters, buffers, optimiser, random state) with the history in its header,
so that a process killed at any instant leaves the state of a finished epoch behind.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file beside its place and rename it, so that a reader never sees half of it.

    Args:
        path: where the file goes; its folder is made.
        content: text (UTF-8) or bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:  # name the file that was wanted, here and below
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; these are for everybody
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse a second process that would write into a run folder; the lock ends with the process, even a killed one.

    Args:
        folder: the run folder; it is made.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"expected no other process that trains in {folder}, found one: wait for it, or choose another folder."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what :func:`write_atomically` was writing when its process was killed; no process may be writing now.

    Args:
        folder: where the files are, its sub-folders included.
    """
    for path in folder.rglob(".*-????????"):
        if path.is_file():
            path.unlink()


def _module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each shared one once (the VampPrior's encoder, say)."""
    seen: dict[int, str] = {}
    tensors = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if seen.setdefault(id(value), name) == name:
            tensors[name] = value.detach().contiguous()
    return tensors


def read_bytes(path: Path) -> bytes:
    """The content of a file of this module.

    Args:
        path: the file.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"expected a file {path}, found none: train a run first.") from None
    except OSError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): restore or delete it.") from None


def _parse(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = dict(sorted(load(content).items()))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): restore or delete it.") from None
    length = int.from_bytes(content[:8], "little")  # of the header, which is JSON
    return tensors, json.loads(content[8 : 8 + length]).get("__metadata__", {})


def _fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    own = _module_tensors(module)
    if own.keys() != tensors.keys():
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        raise ValueError(
            f"{path} does not fit this model (missing {missing[:3]}, unknown {extra[:3]}): "
            "build the model with the configuration that it was trained with."
        )
    for name, value in tensors.items():
        if own[name].shape != value.shape:
            raise ValueError(
                f"{path} has {name} of shape {tuple(value.shape)}, expected {tuple(own[name].shape)}: "
                "build the model with the configuration that it was trained with."
            )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def save_model(path: Path, vae: nn.Module) -> None:
    """Write the parameters and buffers of a model as safetensors, atomically.

    Args:
        path: the file.
        vae: the model.
    """
    write_atomically(path, save(_module_tensors(vae), {"format": "pt"}))


def load_model(path: Path, vae: nn.Module) -> None:
    """Fill a model with the parameters and buffers of a file.

    Args:
        path: a file that :func:`save_model` wrote.
        vae: a model of the same configuration.

    Raises:
        ValueError: the file is missing, damaged or of another model; the model is then unchanged.
    """
    tensors, _ = _parse(read_bytes(Path(path)), Path(path))
    _fill(vae, tensors, Path(path))


def save_state(
    path: Path,
    vae: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    """Write all that training needs to go on bit for bit, in one file, atomically.

    Args:
        path: the file.
        vae: the model.
        optimizer: its optimiser.
        rows: the history so far, one dictionary an epoch.
        settings: what must be the same when training goes on.
    """
    state = optimizer.state_dict()
    tensors = {f"model.{name}": value for name, value in _module_tensors(vae).items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value.detach().contiguous()
            else:
                plain.setdefault(str(index), {})[key] = value
    tensors["random.cpu"] = torch.get_rng_state()
    for device in _cuda_devices(vae):
        tensors[f"random.{device}"] = torch.cuda.get_rng_state(device)
    header = {
        "rows": list(rows),
        "settings": settings,
        "param_groups": state["param_groups"],
        "optimizer_plain": plain,
    }
    # One entry: safetensors writes several in random order, and equal states shall be equal files.
    write_atomically(path, save(tensors, {"state": json.dumps(header)}))


def read_settings(path: Path, content: bytes) -> dict[str, Any]:
    """The settings that a training state was written under.

    Args:
        path: its file, for messages.
        content: what the file holds.

    Raises:
        ValueError: it is damaged, or no training state.
    """
    _, metadata = _parse(content, path)
    if "state" not in metadata:
        raise ValueError(f"{path} holds no training state, expected a file of save_state: resume another folder.")
    return json.loads(metadata["state"])["settings"]


def load_state(
    path: Path,
    vae: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    content: bytes | None = None,
) -> list[dict[str, Any]]:
    """Put back what :func:`save_state` wrote: parameters, optimiser, random state.

    Args:
        path: the file.
        vae: a model of the same configuration.
        optimizer: an optimiser of the same kind over its parameters.
        settings: the settings of this call.
        content: what the file holds, where another process has read it.

    Returns:
        The history so far.

    Raises:
        ValueError: the file is damaged, of another model, or was written under other settings (the first is named).
    """
    tensors, metadata = _parse(read_bytes(path) if content is None else content, path)
    if "state" not in metadata:
        raise ValueError(f"{path} holds no training state, expected a file of save_state: resume another folder.")
    header = json.loads(metadata["state"])
    stored = header["settings"]
    for key in settings:
        if stored.get(key) != settings[key]:
            raise ValueError(
                f"{path} was trained with {key}={stored.get(key)!r}, found {key}={settings[key]!r}: "
                "go on with the same settings, or start another run."
            )

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

    _fill(vae, part("model."), path)
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in header["optimizer_plain"].items()}
    for name, value in part("optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": header["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    for device in _cuda_devices(vae):
        if f"random.{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.{device}"], device)
    return header["rows"]


def _cuda_devices(vae: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in vae.parameters() if p.device.type == "cuda"}, key=str)
