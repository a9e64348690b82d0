"""A data set that stays in its file: arrays larger than memory. See :class:`pyro_vae.datasets.DataSet`."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pyro_vae.data_contract import POLICIES, _Pixels, expect, expect_choice, expect_whole, row_counts, seeded
from pyro_vae.streaming import memory_mapped

_BLOCK = 10_000  # rows looked at in one pass


class MappedArray(_Pixels):
    """The array of a .npy file, one example a row, read batch by batch while training; it may exceed the memory.

    Accepted are bytes and float32, [N, E], [N, H, W] (becomes [N, 1, H, W]), [N, C, H, W], and for bytes also
    [N, H, W, C] with 1 or 3 channels last. The last ``num_test`` rows are the test set and are loaded: shuffle a sorted
    file before. Policies are those of :class:`pyro_vae.files.ArrayFile`, without ``static``, which would draw a second
    array as large. Under ``none`` the natural likelihood is Bernoulli where all values are 0 or 1, ContinuousBernoulli
    where they stay in [0, 1], else Normal. Training rows that the device holds are kept there, others are streamed.

    Args:
        path: the file.
        num_test: how many rows are held out, from the end.
        binarization: ``none`` for values as they are; for grey values (bytes, or floats in [0, 1]) ``grey`` or
            ``dynamic``; for bytes also ``levels``.
        seed: seed of the binarised test rows.

    Raises:
        ValueError: the file, its type, its shape, a value or an argument does not fit.
    """

    def __init__(
        self,
        path: str,
        num_test: int = 1000,
        binarization: Literal["none", "grey", "dynamic", "levels"] = "none",
        seed: int = 0,
    ) -> None:
        expect_choice("binarization", binarization, ("none", "grey", "dynamic", "levels"))
        expect_whole("num_test", num_test, 1)
        file = Path(path).expanduser()
        generator, rows = seeded(seed), _channels_first(memory_mapped(file), file)
        expect(len(rows) > num_test, f"more than {num_test} rows in {file}", len(rows), "lower num_test")
        least, most, bits = _range(rows, file)
        train, test = rows[:-num_test], rows[-num_test:].clone()
        is_bytes = rows.dtype == torch.uint8
        if binarization == "none":
            remedy = "choose binarization=grey, dynamic or levels, or save the array as float32"
            expect(bits or not is_bytes, f"floats or bits in {file}", f"bytes up to {most:g}", remedy)
            self._binarization, self.train, self.test = "none", train, test.float()
            unit = "ContinuousBernoulli" if least >= 0 and most <= 1 else "Normal"
            self.natural_likelihood = ("Bernoulli" if bits else unit, {})
        else:
            known = is_bytes or (binarization != "levels" and least >= 0 and most <= 1)
            found = f"{rows.dtype} from {least:g} to {most:g}"
            expect(known and not (is_bytes and bits), f"grey values in {file}", found, "choose binarization=none")
            self._store(train, test, binarization, generator)
        self.name = file.name
        policy = POLICIES[binarization].format(seed=seed)
        self.policy = f"{self.name}, {policy}, the last {num_test} rows held out, {row_counts(self)}"


def _channels_first(rows: Tensor, file: Path) -> Tensor:
    known = rows.dtype in (torch.uint8, torch.float32)
    expect(known, f"uint8 or float32 in {file}", rows.dtype, "convert it: values of other types would be copied")
    fits = rows.dim() in (2, 3, 4) and 0 not in rows.shape[1:]
    expected = f"rows [N, E], [N, H, W], [N, C, H, W] or [N, H, W, C] in {file}"
    expect(fits, expected, f"shape {list(rows.shape)}", "reshape the array")
    if rows.dim() == 3:
        return rows[:, None]
    last = rows.dim() == 4 and rows.dtype == torch.uint8 and rows.shape[3] in (1, 3) and rows.shape[1] not in (1, 3)
    return rows.movedim(3, 1) if last else rows


def _range(rows: Tensor, file: Path) -> tuple[float, float, bool]:
    """Least and largest value, and whether all are 0 or 1: one pass over the file."""
    least, most, bits = torch.inf, -torch.inf, True
    for block in rows.split(_BLOCK):
        # A NaN or an infinite value makes the sum of least and largest no number.
        low, high = block.min().item(), block.max().item()
        expect(abs(low + high) < torch.inf, f"finite values in {file}", f"{low:g} to {high:g}", "clean the data")
        least, most = min(least, low), max(most, high)
        bits = bits and bool(((block == 0) | (block == 1)).all())
    return least, most, bits
