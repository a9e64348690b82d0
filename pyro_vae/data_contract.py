r"""What a data set is, and what all of them share: the stored training rows, the x that is scored, and the policy.

.. math:: \text{stored rows} \xrightarrow{\ \texttt{prepare}\ } x

Training rows are stored as compactly as they come (bytes stay bytes) and become x when they are presented.
The test x is made once and never changes, so two numbers of one policy are numbers about the same data.
A constructor draws from its own generator: torch's global random state stays as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

Binarization = Literal["grey", "static", "dynamic", "levels"]
POLICIES = {
    "none": "values as they are",
    "grey": "grey (pixel / 255)",
    "static": "static binarisation (train and test binarised once, seed {seed})",
    "dynamic": "dynamic binarisation (test binarised once, seed {seed})",
    "levels": "levels 0..255 (bytes as they are)",
}


class DataSet:
    """What training and scoring need of a data set; any object with these attributes serves.

    A set of your own assigns ``name``, ``train``, ``test``, ``policy`` and ``natural_likelihood``, and
    overrides ``prepare`` where x is not simply the stored row as float32.

    Attributes:
        name: short name, "MNIST".
        train: stored training rows, [N, *E], in the most compact dtype; images [N, C, H, W], tables [N, E].
        test: the x that is scored, [M, *E] float32, fixed for good.
        train_labels: int64 [N], or None.
        test_labels: int64 [M], or None.
        policy: what was done to the data, with seed and counts: stamped on every number.
        natural_likelihood: name and arguments of the likelihood of x: ("Binomial", {"total_count": 16}); the name is
            that of a class of ``likelihoods`` or, with a dot, of another module: ("pixels.DiscretizedLogistic", {}).
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    policy: str
    natural_likelihood: tuple[str, dict[str, Any]]

    @property
    def event_shape(self) -> torch.Size:
        """Shape E of one example."""
        return self.test.shape[1:]

    def prepare(self, rows: Tensor) -> Tensor:
        """Turn stored training rows into x; a dynamic policy draws it anew from torch's global generator.

        Args:
            rows: some rows of ``train``, [B, *E], on any device.

        Returns:
            x, [B, *E] float32 on the same device; no host synchronisation, so a captured graph may hold it.
        """
        return rows.float()

    def to(self, device: str | torch.device) -> Self:
        """Move every tensor of the set to a device and return the set itself."""
        for key, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, key, value.to(device))
        return self


class _Pixels(DataSet):
    """Rows under one of the policies; ``none`` presents the values as they are."""

    _binarization: str

    def prepare(self, rows: Tensor) -> Tensor:
        """Turn stored rows into x: pixel / 255 (grey), fixed bits (static), new bits (dynamic), or 0..255 (levels)."""
        if self._binarization == "dynamic":
            return draw_bits(as_grey(rows), None)
        return as_grey(rows) if self._binarization == "grey" else rows.float()

    def _store(self, train: Tensor, test: Tensor, binarization: str, generator: torch.Generator) -> None:
        self._binarization = binarization
        of_policy = {"grey": "ContinuousBernoulli", "levels": "pixels.DiscretizedLogistic"}
        self.natural_likelihood = (of_policy.get(binarization, "Bernoulli"), {})
        self.train, self.test = train, test.float() if binarization == "levels" else as_grey(test)
        # The test is drawn before the training rows: static and dynamic score the same bits for one seed.
        if binarization in ("static", "dynamic"):
            self.test = draw_bits(self.test, generator)
        if binarization == "static":
            self.train = draw_bits(as_grey(train), generator).to(torch.uint8)


def as_grey(rows: Tensor) -> Tensor:
    """Bytes 0..255 or grey values -> grey values in [0, 1]."""
    return rows.float() / 255 if rows.dtype == torch.uint8 else rows


def draw_bits(grey: Tensor, generator: torch.Generator | None) -> Tensor:
    """One draw a pixel, never ink at 0 and always at 1; unchecked, so that nothing waits for the device."""
    uniform = torch.rand(grey.shape, generator=generator, dtype=torch.float32, device=grey.device)
    return (uniform < grey).float()


def row_counts(data: DataSet) -> str:
    """How many rows there are of each part, for the policy."""
    return f"{len(data.train)} train / {len(data.test)} test"


def seeded(seed: int) -> torch.Generator:
    """A generator of its own for what a constructor draws."""
    expect_whole("seed", seed, 0)
    return torch.Generator(device="cpu").manual_seed(seed)


def split_rows(count: int, test_fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the test rows: a shuffle, at least one row each."""
    expect(0 < test_fraction < 1, "test_fraction between 0 and 1", test_fraction, "give the share to hold out")
    expect(count >= 2, "at least 2 examples", count, "training and test need one each")
    order = torch.randperm(count, generator=generator, device="cpu")
    held_out = min(max(round(count * test_fraction), 1), count - 1)
    return order[held_out:], order[:held_out]


def expect(ok: bool, expected: str, found: object, remedy: str, error: type[Exception] = ValueError) -> None:
    """Refuse in one line: what was expected, what was found, what to do."""
    if not ok:
        raise error(f"expected {expected}, found {found}: {remedy}")


def expect_whole(name: str, value: int, least: int) -> None:
    """Refuse what is no whole number of at least ``least``."""
    ok = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63
    expect(ok, f"{name} to be a whole number of at least {least}", repr(value), f"change {name}")


def expect_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is none of the choices."""
    expect(value in choices, f"{name} to be one of {', '.join(map(str, choices))}", repr(value), "choose one")


def expect_grey(x: Tensor, remedy: str) -> None:
    """Refuse values outside [0, 1]; bytes are grey as they are."""
    if x.dtype != torch.uint8:
        outside = x[~((x >= 0) & (x <= 1))]  # so written, a NaN is outside too
        if len(outside):
            expect(False, "grey values in [0, 1]", f"{outside[0].item():g}", remedy)


def one_line(error: Exception) -> str:
    """An error as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def reading(expected: str, file: Path, remedy: str) -> Iterator[None]:
    """Put any failure inside into one line: readers raise everything from OSError to AssertionError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"expected {expected}, found {file} ({one_line(error)}): {remedy}") from error
