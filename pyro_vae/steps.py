r"""The steps of an epoch as one function over tensors that stay on the device.

One step draws rows by their indices, prepares the batch, leaves the gradients, moves the parameters, counts itself and
adds its sums to four totals:

.. math:: x_B \to \nabla L(x_B) \to \mathrm{Adam} \to t + 1, \quad
    \mathrm{totals} + (\mathrm{objective}, \mathrm{ELBO}, \log p(x|z), \mathrm{KL})

Nothing of it is read by Python, so on a GPU several such steps are recorded as one CUDA graph and replayed through the
epoch (:mod:`pyro_vae.cuda_graphs`): learning rates, the step's number and the optimiser's counters are tensors there,
and what changes them needs no new recording. On a processor the same function simply runs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pyro_vae.capture import has_compiler
from pyro_vae.compiling import TOLERANCE, CompiledStep, capturable
from pyro_vae.contracts import untouched
from pyro_vae.objectives import Objective
from pyro_vae.parallel import Workers
from pyro_vae.programs import Programs, way_of
from pyro_vae.streaming import Rows, size_in_words

How = bool | Literal["replay"]

STEPS_PER_REPLAY = 16
# From times on one core: capturing costs what it saves in some 500 steps of a 64-64-64-z2 network, compiling (20 s,
# without inductor's cache) what it saves in some 7,000 of 784-400-400-z2, batch 128: fifteen epochs of MNIST.
WORTH_CAPTURING = 500  # steps in all
WORTH_COMPILING = 200  # steps an epoch


def how_to_step(num_batches: int, epochs: int, device: torch.device) -> How:
    """Whether training steps are worth capturing, and compiling.

    Replayed steps are eager ones to the last bit (on a GPU up to the rounding of the learning rate, which kernels read
    in float32), compiled ones up to rounding. So that a run gives the same numbers whether it is stopped and prolonged
    or not, the number of epochs has no say in the second choice.

    Args:
        num_batches: steps an epoch.
        epochs: epochs of the whole run.
        device: where they are computed.

    Returns:
        False (eager), "replay" (captured) or True (captured and compiled, where there is a compiler).

    Example:
        >>> how_to_step(23, 10, torch.device("cpu")), how_to_step(23, 200, torch.device("cpu"))
        (False, 'replay')
    """
    if num_batches >= WORTH_COMPILING and (device.type != "cpu" or has_compiler()):
        return True
    return "replay" if num_batches * epochs >= WORTH_CAPTURING else False


class Steps:
    """Training steps over shuffled rows.

    Args:
        data: the rows, and where they are kept.
        to_batch: rows -> the batch that the model sees.
        gradients: batch -> [4] sums over it (objective, ELBO, log p(x|z), KL); adds gradients to the parameters.
        parameters: what is trained.
        vae: whose buffers and train/eval flags a step depends on.
        optimizer: what moves the parameters.
        objective: whose steps are counted; None for Pyro's own, which have no count.
        batch_size: examples a step, over all workers.
        workers: the processes that share each batch.
        how: False: eager steps; "replay": captured ones; True: captured and compiled ones.
        tolerance: how far a captured step may be from the eager one, relative.
        per_replay: steps in one recording on a GPU.
    """

    def __init__(
        self,
        data: Rows,
        to_batch: Callable[[Tensor], Tensor],
        gradients: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        vae: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective | None,
        batch_size: int,
        workers: Workers,
        how: How,
        tolerance: float = TOLERANCE,
        per_replay: int | None = None,
    ) -> None:
        self.data, self.to_batch, self.gradients, self.parameters, self.vae = data, to_batch, gradients, parameters, vae
        self.optimizer, self.objective, self.batch_size, self.workers = optimizer, objective, batch_size, workers
        self.per_replay = STEPS_PER_REPLAY if per_replay is None else per_replay
        self.totals = torch.zeros(4, dtype=torch.float64, device=data.device)
        self.captured: CompiledStep | None = None
        self.programs: Programs | None = None
        self.is_prepared_within = False
        if not how:
            return
        usual = workers.part(torch.arange(min(batch_size, len(data.x))))
        self.usual_rows = len(usual)
        self.is_prepared_within = capturable(to_batch, data.first(self.usual_rows))
        within = (lambda rows: gradients(to_batch(rows))) if self.is_prepared_within else gradients
        # No other worker, no reading ahead and no preparation by Python may stand between a step and the next.
        alone = not data.streamed and workers.size == 1 and self.is_prepared_within
        way = way_of(data.device, [optimizer]) if alone else None
        if way == "compile" and how == "replay":
            way = None
        self.captured = CompiledStep(
            within,
            parameters,
            vae,
            warm=0,
            backend="replay" if how == "replay" or way == "compile" else "inductor",
            record=way is None,
            tolerance=tolerance,
            rows=self.usual_rows,
        )
        if objective is not None:
            objective.at_step(0, data.device)
        counter = [] if objective is None else [objective.step]
        usual_shape = (1, self.usual_rows)
        self.programs = Programs(
            self._take, self.captured, [optimizer], [*counter, self.totals], usual_shape, data.device, way
        )

    def epoch(self, order: Tensor, first: int) -> Iterator[int]:
        """Take the steps of one epoch; ``totals`` holds the sums of this worker afterwards.

        Args:
            order: indices of the examples, in batches one after the other.
            first: number of the first step.

        Yields:
            How many examples the steps taken since the last time had, over all workers.
        """
        self.totals.zero_()
        if self.objective is not None:
            self.objective.at_step(first, self.data.device)  # set: a resumed run goes on at its step
        if self.data.streamed or self.workers.size > 1:
            yield from self._one_by_one(order)
            return
        records = self.programs is not None and self.programs.way == "record"
        together = self.per_replay if records else 1
        whole = len(order) // self.batch_size
        several = whole // together * together * self.batch_size
        chunks = [*order[:several].split(together * self.batch_size), *order[several:].split(self.batch_size)]
        for chunk in filter(len, chunks):
            (self.programs or self._take)(chunk.view(-1, min(self.batch_size, len(chunk))))
            yield len(chunk)

    def _take(self, index: Tensor) -> None:
        """Several steps, one for each row of [k, B] indices."""
        for rows in index.unbind():
            self.totals.add_(self._sums(self.data.x.index_select(0, rows)))
            self.optimizer.step()
            self._count()

    def _sums(self, rows: Tensor) -> Tensor:
        """The sums over a batch; its gradients are in the parameters then."""
        if self.captured is not None:
            return self.captured(rows if self.is_prepared_within else self.to_batch(rows))
        self.optimizer.zero_grad(set_to_none=True)
        return self.gradients(self.to_batch(rows))

    def _one_by_one(self, order: Tensor) -> Iterator[int]:
        """Batches that are read ahead, or shared by several workers, whose gradients are summed before each move."""
        batches = order.to(self.data.x.device).split(self.batch_size)
        shards = self.data.read([self.workers.part(batch) for batch in batches])
        for batch, shard in zip(batches, shards, strict=True):
            if len(shard) > 0:  # the last batch may have fewer examples than there are workers
                self.totals.add_(self._sums(shard))
            else:
                self.optimizer.zero_grad(set_to_none=True)
            self.workers.sum_gradients_(self.parameters)
            self.optimizer.step()
            self._count()
            yield len(batch)

    def _count(self) -> None:
        if self.objective is not None:
            self.objective.advance()

    def check(self) -> None:
        """Compare the captured step with the eager one again: Python may have changed numbers since."""
        if self.captured is not None:
            rows = self.data.first(self.usual_rows)
            if not self.is_prepared_within:
                with untouched(self.vae):
                    rows = self.to_batch(rows)
            self.captured.check(rows)

    def explain(self) -> str:
        """How steps are taken, in one line."""
        if self.programs is None:
            return "eager"
        several = f", {self.per_replay} steps at a time" if self.programs.is_recorded else ""
        return self.programs.explain().splitlines()[0].split(": ", 1)[-1] + several


def memory_in_words(data: Rows, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> str:
    """What training keeps in memory, in one line; on a GPU also the most that was ever taken there.

    Args:
        data: the rows.
        parameters: what is trained.
        optimizer: its means are counted as they are by now.
    """
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    rows = "rows in batches" if data.streamed else f"rows {size_in_words(data.x.nbytes)}"
    words = f"{rows}, parameters {size_in_words(sum(p.nbytes for p in parameters))}"
    words += f", optimiser {size_in_words(sum(value.nbytes for value in states))}"
    if data.device.type == "cuda":
        words += f"; at most {size_in_words(torch.cuda.max_memory_allocated(data.device))} on {data.device}"
    return words
