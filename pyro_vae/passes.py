"""N examples by K draws of z, in passes of bounded memory; long runs of passes are recorded once and replayed."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
from torch import Tensor

from pyro_vae.capture import NotCapturable
from pyro_vae.dry_run import check_vae
from pyro_vae.replays import Replay
from pyro_vae.terms import Program, Terms, check_num_particles, draw
from pyro_vae.vae import VAE

# Numbers of x in one pass. On a processor, of 784-200-200-z50, passes of 2^17 take 2.6 times as long as those of 2^20
# (Python between the operations), and larger ones no less (every layer is fresh memory). Not measured on a GPU.
_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}
# Numbers of x in all, from which the seconds of compilation come back: on a processor a million draws for MNIST.
_WORTH = {"cpu": 2**30, "cuda": 2**36}


def at_once(x: Tensor, max_elements: int | None) -> int:
    """How many examples of x, copies for each draw of z included, are handled in one pass: at least one."""
    if max_elements is None:
        max_elements = _AT_ONCE.get(x.device.type, 2**22)
    return max(1, max_elements // max(1, x[0].numel()))


def even(total: int, most: int) -> int:
    """A size, at most ``most`` and more than half of it, that cuts the total into equal parts, or leaves little over.

    Example:
        >>> even(10000, 52), even(101, 52), even(7, 52)
        (50, 50, 7)
    """
    most = min(total, most)
    return min(range(most // 2 + 1, most + 1), key=lambda size: (total % size, -size))


def replayed(
    function: Callable[..., Any],
    fixed: Sequence[Tensor],
    varying: Sequence[Tensor],
    numbers: int,
    compiled: bool | None,
) -> Replay | None:
    """The function recorded and compiled; None where that is not wanted or not possible, which is told.

    Args:
        function: (\\*fixed, \\*varying) -> tensors.
        fixed: see :class:`pyro_vae.replays.Replay`.
        varying: likewise.
        numbers: how many numbers of x it will handle in all.
        compiled: None: where it comes back; True: in any case; False: not.
    """
    device = [*fixed, *varying][0].device.type
    if compiled is False or (compiled is None and numbers < _WORTH.get(device, 2**30)):
        return None
    try:
        return Replay(function, fixed, varying)
    except NotCapturable as error:
        warnings.warn(f"evaluated by eager Pyro, not compiled: {error}", RuntimeWarning, stacklevel=2)
        return None


def passes(
    vae: Any, x: Tensor, num_particles: int, max_elements: int | None = None, compiled: bool | None = False
) -> Iterator[tuple[slice, Terms]]:
    """Cut N examples by K particles into passes; every particle of every example comes once.

    Args:
        vae: a model with ``model`` and ``guide``. The encoder of a :class:`VAE` runs once for each example.
        x: data, [N, *E].
        num_particles: number K of draws of z for each example.
        max_elements: numbers of x handled in one pass, K included; None: what suits the device.
        compiled: record the passes after the first and replay them: the same numbers up to rounding. Their terms carry
            the traces of the first pass. None: where compilation takes less time than it saves.

    Yields:
        Which rows, and their terms, [k, b] each: k of the K particles. All particles of some rows come before the next.

    Raises:
        ValueError: num_particles < 1, no example, or a program without one plate over the examples.
    """
    if isinstance(x, Tensor) and x.dim() and len(x) == 0:
        raise ValueError("expected at least one example, found none: x has length 0.")
    if all(hasattr(vae, part) for part in ("prior", "decoder", "encoder")):
        check_vae(vae, x[:2] if isinstance(x, Tensor) and x.dim() else x)
    check_num_particles(num_particles)
    most = at_once(x, max_elements)
    kept = max(1, most * x[0].numel() // num_particles)  # the weights themselves are kept for the batch
    batch = even(len(x), min(most, max(64, most // num_particles), kept))
    first: Terms | None = None
    replay: Replay | None = None
    shape = None
    for start in range(0, len(x), batch):
        rows = slice(start, min(start + batch, len(x)))
        particles = even(num_particles, max(1, most // (rows.stop - rows.start)))
        guide: Program | None = None
        run = replay.at(x[rows]) if replay is not None and shape == (rows.stop - rows.start, particles) else None
        for done in range(0, num_particles, particles):
            count = min(particles, num_particles - done)
            if run is not None and first is not None and count == particles:
                log_px, log_pz, log_qz = run()
                yield rows, first._replace(log_px=log_px, log_pz=log_pz, log_qz=log_qz, passes=())
                continue
            guide = guide or _encoded_once(vae, x[rows])
            terms = _terms(vae, guide, x[rows], count)
            yield rows, terms
            if shape is None:  # the first pass, which has shown that the programs run and what sites they have
                shape = (rows.stop - rows.start, count)
                replay = replayed(_pass(vae, count), [x[rows]], (), x.numel() * num_particles, compiled)
                if replay is not None:
                    first, run = terms, replay.at(x[rows])


def _pass(vae: Any, count: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """One pass with the encoder in it, as a function of x alone."""
    return lambda x: _terms(vae, _encoded_once(vae, x), x, count)[:3]


def _terms(vae: Any, guide: Program, x: Tensor, count: int) -> Terms:
    terms = draw(vae.model, guide, x, num_particles=count)
    if terms.log_px.shape != (count, len(x)):
        raise ValueError(
            f"expected terms of shape {(count, len(x))} (particles, examples), found "
            f"{tuple(terms.log_px.shape)}: put all sites of model and guide in one plate over the examples."
        )
    return terms


def _encoded_once(vae: Any, x: Tensor) -> Program:
    """The guide at x, its encoder run here and now instead of in every pass; a guide of the user's own as it is."""
    if not isinstance(vae, VAE) or type(vae).guide is not VAE.guide:
        return vae.guide
    q = vae.encoder(x)

    def guide(x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", q)

    return guide
