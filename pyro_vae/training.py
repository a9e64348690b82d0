"""Training: SVI steps over shuffled batches, both curves, checkpoints.

A step does what ``pyro.infer.SVI.step`` does, with one optimiser over all parameters and no copy to the host: losses
add up on the device and are read once an epoch. Several processes can share the steps (:mod:`pyro_vae.parallel`), and
data that is too large for the device is read ahead in batches (:mod:`pyro_vae.streaming`).
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance
from pyro.optim import Adam, PyroOptim  # type: ignore[attr-defined]  # made at import
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.checkpoints import load_state, read_bytes, read_settings, save_model, save_state, write_atomically
from pyro_vae.contracts import untouched
from pyro_vae.discrete import enumerated_terms, is_enumerated
from pyro_vae.dry_run import check_vae
from pyro_vae.estimates import elbo_terms
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.optimizers import torch_optimizer
from pyro_vae.parallel import Workers
from pyro_vae.precision import TOLERANCES, Precision, check_precision, rounded, tensor_cores
from pyro_vae.steps import Steps, how_to_step, memory_in_words
from pyro_vae.streaming import Rows, place
from pyro_vae.supports import check_support
from pyro_vae.terms import Terms, collect

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class History(Mapping[str, list[float]]):
    """What training recorded: ``history["elbo"]`` is one number an epoch, ``history.rows`` one dictionary an epoch.

    Columns: ``epoch``; ``objective``, ``elbo``, ``log_px``, ``kl``: means over the training examples as they were
    visited, nats per example; ``valid_elbo``, ``valid_elbo_se``, ``valid_log_px``, ``valid_kl``: held-out data at the
    end of the epoch; ``seconds``.

    Args:
        rows: one dictionary an epoch.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = list(rows)

    def __getitem__(self, column: str) -> list[float]:
        if not self.rows or column not in self.rows[0]:
            raise KeyError(column)
        return [row[column] for row in self.rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows[0] if self.rows else {})

    def __len__(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    def __repr__(self) -> str:
        return f"History({len(self.rows)} epochs: {', '.join(self)})"


def fit(
    vae: Any,
    x: Tensor,
    *,
    objective: pyro.infer.ELBO | None = None,
    epochs: int = 50,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: MakeOptimizer | PyroOptim | None = None,
    prepare: Callable[[Tensor], Tensor] | None = None,
    x_valid: Tensor | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = False,
    note: Callable[[str], None] | None = None,
    compiled: bool | Literal["replay"] | None = None,
    precision: Precision = "float32",
    resident: bool | None = None,
    workers: Workers | None = None,
) -> History:
    """Train a VAE by stochastic variational inference, and record the objective and the true ELBO.

    Every epoch visits every example once in a new random order; the last batch may be smaller, none is dropped. The
    loss of a batch is minus the sum of the objective over its examples, as in Pyro. Random numbers come from torch's
    global state: call ``torch.manual_seed`` (or ``pyro.set_rng_seed``) before. Pyro's parameter store is left as found.

    Args:
        vae: a model with ``model``, ``guide`` and parameters, on the device where it shall be trained.
        x: training data, [N, *E], on the same device or on the CPU (perhaps a file, see
            :func:`pyro_vae.streaming.memory_mapped`); may be compact (bytes) if ``prepare`` makes floats of it.
        objective: what to maximise: an objective of this library or of ``pyro.infer``; the ELBO by default.
            ``TraceEnum_ELBO`` sums over all values of a discrete z: the guide's enumerable sites are configured for it.
        epochs: passes over the data, those of a resumed run included.
        batch_size: examples a step, over all workers.
        lr: learning rate of Adam, when no optimizer is given.
        optimizer: parameters -> torch optimiser, or a ``pyro.optim`` one.
        prepare: rows of x -> the batch that the model sees (binarisation, scaling); default: to floats.
        x_valid: held-out data, [M, *E] in the model's own form; evaluated after each epoch without touching training.
        folder: a run folder: after each epoch its state, model and metrics are replaced atomically.
        resume: go on from the state in ``folder``, bit for bit; False refuses a folder that holds one.
        on_epoch: called after each epoch with its row, by the first worker.
        progress: show a progress bar on a terminal.
        note: called by the first worker with a line each on streaming, on how steps are taken, and on memory.
        compiled: capture the step as one graph and compile it (True), capture it and replay its operations one by one
            ("replay": no compiler), or neither (False), see :class:`pyro_vae.compiling.CompiledStep`; None decides by
            the numbers of steps, see :func:`pyro_vae.steps.how_to_step`. When captured, ``prepare`` and the model run
            as Python once; where ``on_epoch`` changes numbers that they read, this is noticed at the end of the epoch,
            and the steps go on eagerly.
        precision: of the networks' products in training steps, see :mod:`pyro_vae.precision`: "float32"; "tf32" on a
            GPU; "bf16". Held-out numbers and checkpoints stay float32.
        resident: keep x on the device (True) or read it in batches from where it is (False), with the same numbers;
            None decides by the free memory, see :func:`pyro_vae.streaming.place`.
        workers: the processes that share each batch, from :func:`pyro_vae.parallel.join`; each calls ``fit`` with the
            same arguments, and the first one writes ``folder``. Batch norm, and objectives that mix examples, see a
            worker's part of a batch. By default this process alone.

    Returns:
        The history; see :class:`History`.

    Raises:
        TypeError, ValueError: the pieces or the data do not fit (see :func:`pyro_vae.check_vae`), a number is out of
            range, the folder holds another run, or the objective became NaN.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> _ = torch.manual_seed(0)
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> history = fit(vae, torch.ones(50, 7), epochs=3, batch_size=16, lr=0.01)
        >>> history["elbo"][0] < history["elbo"][-1]
        True
    """
    _check_range("epochs", epochs, 1)
    _check_range("batch_size", batch_size, 1)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"expected lr > 0, found {lr!r}.")
    parts = ("model", "guide", "parameters")
    if isinstance(vae, type) or not all(callable(getattr(vae, name, None)) for name in parts):
        raise TypeError(f"expected a model with model, guide and parameters, found {vae!r:.80}: pass a VAE instance.")
    objective = ELBO() if objective is None else objective
    if not isinstance(objective, pyro.infer.ELBO):
        raise TypeError(
            f"expected an objective such as ELBO() or pyro.infer.Trace_ELBO(), found {objective!r}: pass an instance."
        )
    parameters = [p for p in vae.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("expected a model with parameters to train, found none that require gradients.")
    dtype, device = parameters[0].dtype, parameters[0].device
    to_batch = _floats(prepare, dtype)
    _check_shapes(x, x_valid, device)
    workers = Workers() if workers is None else workers
    data, x_valid = place(x, device, resident), None if x_valid is None else x_valid.to(device)
    _check_data(vae, data, x_valid, to_batch, batch_size)

    check_precision(precision, device, dtype)
    optim = torch_optimizer(optimizer or Adam({"lr": lr}))(parameters)
    if not isinstance(objective, Objective):
        _settle_plates(objective, vae, data.first(batch_size), to_batch)
    num_batches = -(-len(x) // batch_size)
    how = how_to_step(num_batches, epochs, device) if compiled is None else compiled
    settings: dict[str, Any] = {
        "objective": repr(objective) if isinstance(objective, Objective) else type(objective).__name__,
        "batch_size": batch_size,
        "num_examples": len(x),
        "optimizer": f"{type(optim).__name__}({', '.join(f'{k}={v}' for k, v in sorted(optim.defaults.items()))})",
        "compiled": how is True,  # captured and replayed, or eager: the same to the last bit
    }
    if precision != "float32":
        settings["precision"] = precision
    rows = _open(folder, resume, vae, optim, settings, workers, decided=compiled is not None)
    if len(rows) > epochs:
        raise ValueError(f"{folder} has {len(rows)} epochs behind it, expected more, found epochs={epochs}.")
    if settings["compiled"] != (how is True):  # begun otherwise, and nobody decided now
        how = True if settings["compiled"] else "replay"

    steps = Steps(
        data,
        to_batch,
        rounded(_gradients_of(objective, vae), precision),
        parameters,
        vae,
        optim,
        objective if isinstance(objective, Objective) else None,
        batch_size,
        workers,
        how,
        TOLERANCES[precision],
    )

    modes = {part: part.training for part in vae.modules()}
    progress, first_epoch = progress and workers.is_first, len(rows) + 1
    bar = tqdm(total=epochs * len(x), initial=len(rows) * len(x), unit="ex", disable=None if progress else True)
    note = note if note is not None and workers.is_first else lambda line: None
    if data.streamed:
        note(f"streaming  {data.note}")
    try:
        with pyro.get_param_store().scope(), bar:
            for epoch in range(first_epoch, epochs + 1):
                start = time.perf_counter()
                bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
                vae.train()
                workers.equalize_(vae)
                order = workers.shuffle(len(x), device)
                try:
                    with tensor_cores(precision, device):
                        for count in steps.epoch(order, (epoch - 1) * num_batches):
                            bar.update(count)
                except ValueError as error:  # validation finds a scale of 0 or NaN before the objective does
                    if not _DIVERGED.search(str(error)):
                        raise
                    raise _diverged("undefined", epoch, lr) from error
                row = _row(epoch, workers.sum_(steps.totals.clone()) / len(x), lr)
                if x_valid is not None:
                    row |= workers.from_first(lambda: _held_out(vae, x_valid.to(dtype)))
                rows.append(row | {"seconds": time.perf_counter() - start})
                if epoch == first_epoch:
                    few = f": {epochs * num_batches:,} of them are not worth capturing" * (compiled is None)
                    note(f"steps      {steps.explain()}{few * (not how)}")
                    note(f"memory     {memory_in_words(data, parameters, optim)}")
                if folder is not None and workers.is_first:
                    _save(Path(folder), vae, optim, rows, settings)
                if on_epoch is not None:
                    if workers.is_first:
                        on_epoch(rows[-1])
                    if epoch < epochs:
                        steps.check()
    finally:
        for part, mode in modes.items():
            part.training = mode
    return History(rows)


def _check_range(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"expected {name} to be an integer >= {low}, found {value!r}.")


def _floats(prepare: Callable[[Tensor], Tensor] | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if prepare is None:
        return lambda rows: rows.to(dtype)
    return lambda rows: prepare(rows).to(dtype)


def _check_shapes(x: Tensor, x_valid: Tensor | None, device: torch.device) -> None:
    if not isinstance(x, Tensor) or x.dim() < 2 or len(x) == 0:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected training data [N, *E] with N >= 1, found {found}: pass a tensor of examples.")
    if x_valid is not None and (not isinstance(x_valid, Tensor) or x_valid.dim() < 2 or len(x_valid) == 0):
        found = tuple(x_valid.shape) if isinstance(x_valid, Tensor) else type(x_valid).__name__
        raise ValueError(
            f"expected held-out data x_valid [M, *E] with M >= 1, found {found}: pass a tensor of examples."
        )
    elsewhere = {str(data.device) for data in (x, x_valid) if data is not None} - {"cpu", str(device)}
    if elsewhere:
        raise ValueError(f"expected data on the CPU or the model's {device}, found it on {elsewhere}: use .to(device).")


def _check_data(
    vae: Any, data: Rows, x_valid: Tensor | None, to_batch: Callable[[Tensor], Tensor], batch_size: int
) -> None:
    """One dry run on the first rows, then the support of p(x | z) on all of the data; the random state is untouched."""
    with untouched(vae):
        first = to_batch(data.first(batch_size))
    if not all(hasattr(vae, part) for part in ("prior", "decoder", "encoder")):
        return  # any other Pyro program: its own validation speaks
    check_vae(vae, first)
    if x_valid is not None:
        check_vae(vae, x_valid[:batch_size].to(first.dtype))
    with untouched(vae), pyro.validation_enabled(False):
        p = vae.decoder(vae.encoder(first[:1]).mean)
        held_out = () if x_valid is None else x_valid.split(10_000)
        for block in chain(map(to_batch, data.blocks(10_000)), held_out):  # one at a time
            if bool(block.isinf().any()):
                raise ValueError("x has infinite values, expected finite ones: clean the data.")
            check_support(p, block)


def _settle_plates(objective: Any, vae: Any, rows: Tensor, to_batch: Callable[[Tensor], Tensor]) -> None:
    """Give one of Pyro's objectives its number of nested plates before the first step.

    Pyro guesses it by an extra run within the first step, whose draws a resumed run would repeat; from YAML it comes
    as a float, which cannot index.
    """
    vectorised = objective.vectorize_particles and objective.num_particles > 1
    if objective.max_plate_nesting != math.inf:
        objective.max_plate_nesting = int(objective.max_plate_nesting)
    elif vectorised or isinstance(objective, pyro.infer.TraceEnum_ELBO):
        with untouched(vae):
            batch = to_batch(rows)
            guide = poutine.trace(vae.guide).get_trace(batch)
            model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(batch)
        sites = [site for trace in (guide, model) for site in trace.nodes.values() if site["type"] == "sample"]
        dims = [frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
        objective.max_plate_nesting = -min(dims, default=0) + int(vectorised)


def _gradients_of(objective: pyro.infer.ELBO, vae: Any) -> Callable[[Tensor], Tensor]:
    """A function that leaves the gradients of a batch and returns its sums: objective, ELBO, log p(x|z), KL."""

    def own(x: Tensor) -> Tensor:
        assert isinstance(objective, Objective)
        terms = objective.draw(vae.model, vae.guide, x)
        loss = objective.loss_of(terms)
        loss.backward()
        return _sums(-loss.detach(), terms)

    enumerates = isinstance(objective, pyro.infer.TraceEnum_ELBO)
    program = pyro.infer.config_enumerate(vae.guide, default="parallel") if enumerates else vae.guide
    model, guide = _Recorder(vae.model), _Recorder(program)  # once: Pyro's Jit objectives compile by program

    def pyros(x: Tensor) -> Tensor:
        model.trace = guide.trace = None
        loss = objective.loss_and_grads(model, guide, x)  # type: ignore[attr-defined]  # each subclass has it
        if isinstance(loss, tuple):
            raise ValueError(
                f"{type(objective).__name__} gives several losses, expected one: train with it by pyro.infer.SVI."
            )
        value = -torch.as_tensor(loss, dtype=torch.float64, device=x.device)
        unknown = torch.stack([value, *value.new_full((3,), math.nan)])
        if model.trace is None or guide.trace is None:  # a compiled replay runs no program
            return unknown
        try:
            with torch.no_grad():
                traces = prune_subsample_sites(model.trace), prune_subsample_sites(guide.trace)
                if enumerates and is_enumerated(traces[1]):
                    log_px, log_pz, log_qz = (term.double() for term in enumerated_terms(*traces))
                    return torch.stack([value, log_px + log_pz - log_qz, log_px, log_qz - log_pz])
                terms = collect(*traces)
        except (ValueError, RuntimeError, NotImplementedError):
            return unknown
        return detach_provenance(_sums(value, terms))  # TraceGraph_ELBO's wrapper would be captured as a constant

    return own if isinstance(objective, Objective) else pyros


class _Recorder:
    """A Pyro program that keeps the trace of its latest run, so that Pyro's own objectives show their terms too."""

    def __init__(self, program: Callable[..., Any]):
        self.program = program
        self.trace: Trace | None = None

    def __call__(self, *args: Any) -> Any:
        trace = poutine.trace(self.program).get_trace(*args)
        self.trace = trace
        return trace.nodes["_RETURN"]["value"]


def _sums(objective: Tensor, terms: Terms) -> Tensor:
    log_px, kl = terms.log_px.detach(), (terms.log_qz - terms.log_pz).detach()
    sums = [(terms.scale * part).mean(0).sum().double() for part in (log_px - kl, log_px, kl)]
    return torch.stack([objective.double(), *sums])


def _row(epoch: int, means: Tensor, lr: float) -> dict[str, Any]:
    objective, elbo, log_px, kl = means.tolist()
    if not math.isfinite(objective):
        raise _diverged(objective, epoch, lr)
    return {"epoch": epoch, "objective": objective, "elbo": elbo, "log_px": log_px, "kl": kl}


def _held_out(vae: Any, x_valid: Tensor) -> dict[str, float]:
    valid = elbo_terms(vae, x_valid)
    means = {f"valid_{name}": estimate.mean for name, estimate in valid.items()}
    return means | {"valid_elbo_se": valid["elbo"].standard_error}


_DIVERGED = re.compile("Expected (parameter|value argument) |while computing log_prob")


def _diverged(objective: float | str, epoch: int, lr: float) -> ValueError:
    return ValueError(
        f"the objective became {objective} in epoch {epoch}, expected a finite number: lower the learning rate "
        f"(lr={lr:g} unless an optimizer was given), standardise the encoder's input, or start at the data's mean."
    )


def _open(
    folder: str | Path | None,
    resume: bool,
    vae: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    workers: Workers,
    decided: bool,
) -> list[dict[str, Any]]:
    """The epochs behind a run; where nobody ``decided`` how to step, the run goes on as it was begun."""
    if folder is None:
        if resume:
            raise ValueError("expected a folder to resume from, found none: pass folder=...")
        return []
    state = Path(folder) / "state" / "latest.safetensors"
    if resume:
        content = workers.from_first(lambda: read_bytes(state))  # perhaps on its machine only
        before = read_settings(state, content)
        if not decided:
            settings["compiled"] = before.get("compiled") is True
        if "precision" in before:  # float32 is not written
            settings.setdefault("precision", "float32")
        return load_state(state, vae, optimizer, settings, content)
    if workers.is_first and state.exists():
        raise ValueError(f"{folder} already holds a run, expected a fresh folder: choose another, or pass resume=True.")
    return []


def _save(
    folder: Path,
    vae: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    """The state first: the other two files can be made again from it."""
    save_state(folder / "state" / "latest.safetensors", vae, optimizer, rows, settings)
    save_model(folder / "model.safetensors", vae)
    finite = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # JSON has no NaN
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in finite))
