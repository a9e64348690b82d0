"""Data sets of your own: a folder of images, an array file, a table. See :class:`pyro_vae.datasets.DataSet`."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_vae.columns import _read_csv, describe, read_columns
from pyro_vae.data_contract import (
    POLICIES,
    Binarization,
    DataSet,
    _Pixels,
    expect,
    expect_choice,
    expect_grey,
    expect_whole,
    reading,
    row_counts,
    seeded,
    split_rows,
)


class ImageFolder(_Pixels):
    """Every png, jpg, jpeg, bmp and webp below a folder, as bytes [N, C, size, size].

    A picture is turned as its camera noted, cropped to its central square, resized, and made grey or RGB
    (transparency is dropped). First-level sub-folders are the classes, numbered in sorted order; pictures
    straight in root have no labels. Policies as for :class:`~pyro_vae.datasets.MNIST`; ``classes`` names the
    sub-folders.

    Args:
        root: the folder.
        size: height and width of x in pixels.
        channels: 1 for grey, 3 for RGB; None: 3 if any picture has colour, else 1.
        test_fraction: share of the images held out as test (at least one), between 0 and 1.
        seed: seed of the split and of everything that is drawn once.
        binarization: ``grey``, ``static``, ``dynamic`` or ``levels``.

    Raises:
        FileNotFoundError: root is not a folder.
        ValueError: a picture is not readable or not 8-bit, fewer than 2, or an argument out of its range.
    """

    def __init__(
        self,
        root: str,
        size: int = 32,
        channels: Literal[1, 3] | None = None,
        test_fraction: float = 0.1,
        seed: int = 0,
        binarization: Binarization = "grey",
    ) -> None:
        expect_whole("size", size, 1)
        expect_choice("channels", channels, (1, 3, None))
        expect_choice("binarization", binarization, get_args(Binarization))
        folder = Path(root).expanduser().resolve()
        expect(folder.is_dir(), "a folder of images", f"no folder {folder}", "check root", FileNotFoundError)
        endings = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in endings and f.is_file())
        expect(bool(files), f"images ({' '.join(endings)})", f"none below {folder}", "check root")
        generator = seeded(seed)
        train, test = split_rows(len(files), test_fraction, generator)
        tops = [f.relative_to(folder).parts[0] if f.parent != folder else "" for f in files]
        self.classes = sorted(set(tops) - {""})
        if self.classes:
            sorted_in = "" not in tops
            expect(sorted_in, f"all images of {folder} in sub-folders or none", "both", "move the loose ones")
            labels = torch.tensor([self.classes.index(top) for top in tops], device="cpu")
            self.train_labels, self.test_labels = labels[train], labels[test]
        pixels = torch.stack([_picture(f, size, channels or 3) for f in files])
        if channels is None:
            grey = bool((pixels == pixels[:, :1]).all())
            channels = 1 if grey else 3
            pixels = pixels[:, :channels].clone()
        self._store(pixels[train], pixels[test], binarization, generator)
        self.name = folder.name
        self.policy = (
            f"{self.name}, {channels}x{size}x{size}, {POLICIES[binarization].format(seed=seed)}, "
            f"split with seed {seed}, {row_counts(self)}"
        )


class ArrayFile(_Pixels):
    """An array of a .npy or .npz file, one example a row.

    Accepted are [N, E], [N, H, W] (becomes [N, 1, H, W]), [N, C, H, W], and for uint8 also [N, H, W, C] with 1
    or 3 channels last, moved to [N, C, H, W] (where axis 1 is 1 or 3 too, it is read as channels first).
    Under ``none`` the natural likelihood is Bernoulli where all values are 0 or 1, ContinuousBernoulli where
    they stay in [0, 1], else Normal. NaN is a missing value (under ``none``), and the natural likelihood then
    Masked. Labels are whole numbers, one a row.

    Args:
        path: the file.
        key: name of the rows in a .npz; None takes ``x_train``, else ``x``, else the only array. With "train"
            in the name, the array named the same with "test", where there is one, is the test set.
        label_key: name of the labels in a .npz, "train" and "test" paired as for key; None takes ``y_train``
            and ``y_test`` beside ``x_train``, or ``y`` beside ``x``, where present.
        test_fraction: share held out as test (at least one) where the file has no test set, between 0 and 1.
        seed: seed of the split and of everything that is drawn once.
        binarization: ``none`` for values as they are; for grey values (bytes 0..255, or floats in [0, 1])
            ``grey``, ``static`` or ``dynamic`` as for :class:`~pyro_vae.datasets.MNIST`; for bytes also ``levels``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file, a key, a shape, a value or an argument does not fit.
        TypeError: rows that are neither bytes, booleans nor floats, or labels that are not whole numbers.
    """

    def __init__(
        self,
        path: str,
        key: str | None = None,
        label_key: str | None = None,
        test_fraction: float = 0.1,
        seed: int = 0,
        binarization: Literal["none", "grey", "static", "dynamic", "levels"] = "none",
    ) -> None:
        expect_choice("binarization", binarization, ("none", *get_args(Binarization)))
        file = Path(path).expanduser()
        arrays = _arrays(file, key, label_key)
        rows, labels = _rows(arrays["train"], file), _labels(arrays, "train", file)
        generator = seeded(seed)
        if "test" in arrays:
            train, test, split = rows, _rows(arrays["test"], file), "test set of the file"
            found = f"{train.dtype} {list(train.shape)} and {test.dtype} {list(test.shape)}"
            agree = train.shape[1:] == test.shape[1:] and train.dtype == test.dtype and len(train) and len(test)
            expect(bool(agree), f"training and test rows of one kind in {file}", found, "make them agree")
            self.train_labels, self.test_labels = labels, _labels(arrays, "test", file)
        else:
            first, second = split_rows(len(rows), test_fraction, generator)
            train, test, split = rows[first], rows[second], f"split with seed {seed}"
            if labels is not None:
                self.train_labels, self.test_labels = labels[first], labels[second]
        rows = torch.cat([train, test])
        bits, is_bytes = bool(((rows == 0) | (rows == 1)).all()), rows.dtype == torch.uint8
        gaps = int(rows.isnan().sum())
        if binarization == "none":
            remedy = "choose binarization=grey, static, dynamic or levels, or save the array as float32"
            expect(bits or not is_bytes, f"floats or bits in {file}", f"bytes up to {rows.max():.0f}", remedy)
            self._binarization, self.train, self.test = "none", train, test.float()
            there = rows[~rows.isnan()] if gaps else rows
            expect(len(there.flatten()) > 0, f"numbers in {file}", "only NaN", "check the file")
            unit = "ContinuousBernoulli" if there.min() >= 0 and there.max() <= 1 else "Normal"
            only_bits = bits or (gaps > 0 and bool(((there == 0) | (there == 1)).all()))
            natural: tuple[str, dict[str, Any]] = ("Bernoulli" if only_bits else unit, {})
            self.natural_likelihood = ("Masked", {"likelihood": natural}) if gaps else natural
        else:
            # Bits read as bytes would be 0 and 1/255: nearly black pictures, and nobody would be told.
            problem = is_bytes and bits
            expect(not problem, f"bytes 0..255 in {file}", "only 0 and 1", "choose binarization=none for bits")
            known = is_bytes or binarization != "levels"
            expect(known, f"bytes 0..255 (uint8) in {file}", rows.dtype, "save them as uint8, or choose another policy")
            expect_grey(rows, f"rescale {file}, or choose binarization=none")
            self._store(train, test, binarization, generator)
        self.name = file.name
        missing = f"{gaps} of {rows.numel()} values missing (NaN), " if gaps else ""
        self.policy = f"{self.name}, {POLICIES[binarization].format(seed=seed)}, {missing}{split}, {row_counts(self)}"


class Table(DataSet):
    r"""The columns of a CSV file with a header row, each of its own kind; float32 rows [N, E].

    .. math:: x_{ij} = (\text{cell}_{ij} - \mathrm{loc}_j) / \mathrm{scale}_j

    Real numbers are standardised: ``loc`` and ``scale`` ([E], kept) are mean and standard deviation (divisor N) of the
    training rows alone; positive numbers of several sizes (``positive``) are divided by their geometric mean. Counts
    stay as they are (loc 0, scale 1), and a text is the index of its level. What a column is, is read from its cells
    (:func:`pyro_vae.columns.read_columns`), told by ``policy``, and corrected by ``kinds``. The natural likelihood is
    HeteroscedasticNormal where all columns are normal, Bernoulli where all are binary, else MixedColumns; with missing
    cells (NaN in x) it is Masked. Densities are those of x: for the file's units subtract the sum of log ``scale``.
    Blank lines hold no row. ``columns`` names the columns, ``classes`` the labels in sorted order.

    Args:
        path: the file, UTF-8.
        label: name of the column that holds the label (any text), or None.
        test_fraction: share of the rows held out as test (at least one), between 0 and 1.
        seed: seed of the split.
        delimiter: the character between cells.
        kinds: column name -> normal, positive, count, binary or categorical, where the cells mislead.
        missing: what stands in a cell without a value.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a cell is not a finite number in a column of numbers (named by line and column), a column is
            constant or has a text of its own for each row, the header does not fit, fewer than 2 rows, or an argument
            is out of its range.
    """

    def __init__(
        self,
        path: str,
        label: str | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        delimiter: str = ",",
        kinds: dict[str, str] | None = None,
        missing: Sequence[str] = ("", "NA", "NaN", "nan", "?"),
    ) -> None:
        expect(len(delimiter) == 1, "a delimiter of one character", repr(delimiter), "give one")
        file = Path(path).expanduser()
        columns, texts = read_columns(file, label, delimiter, kinds or {}, missing)
        values = torch.stack([column.values for column in columns], 1)
        train, test = split_rows(len(values), test_fraction, seeded(seed))
        seen = values[train]
        for column, numbers in zip(columns, seen.T, strict=True):
            numbers = numbers[~numbers.isnan()]
            # Not scale == 0: the rounded mean of equal numbers need not be that number.
            found = f"column {column.name!r} of {file} constant over the {len(seen)} training rows"
            varies = len(numbers) > 0 and bool(numbers.min() < numbers.max())
            expect(varies, "columns that vary", found, "remove the column")
        units = [column.unit(numbers) for column, numbers in zip(columns, seen.T, strict=True)]
        loc, scale = torch.tensor(units, dtype=torch.float64, device="cpu").T
        x, self.loc, self.scale = ((values - loc) / scale).float(), loc.float(), scale.float()
        gaps = values.isnan()
        held = bool((x.isfinite() | gaps).all() and (self.scale > 0).all() and (self.loc + self.scale).isfinite().all())
        expect(held, f"numbers that float32 holds in {file}", "some too large or too small", "rescale them")
        self.train, self.test = x[train], x[test]
        self.classes = sorted(set(texts))
        if label is not None:
            number = {text: i for i, text in enumerate(self.classes)}
            labels = torch.tensor([number[text] for text in texts], device="cpu")
            self.train_labels, self.test_labels = labels[train], labels[test]
        natural = columns[0].likelihood
        if {column.kind for column in columns} not in ({"normal"}, {"binary"}):
            natural = ("tables.MixedColumns", {"likelihoods": [column.likelihood for column in columns]})
        self.natural_likelihood = ("Masked", {"likelihood": natural}) if gaps.any() else natural
        self.columns, self._columns, self._delimiter = [column.name for column in columns], columns, delimiter
        self._file, self._label, self._missing, self._order = file, label, missing, torch.cat([train, test])
        self.name = file.name
        self.policy = f"{self.name}, {describe(columns)}, split with seed {seed}, {row_counts(self)}"

    def csv(self, x: Tensor) -> str:
        """Rows x [N, E] as CSV text in the units and with the words of the file; a missing number is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, delimiter=self._delimiter, lineterminator="\n")
        writer.writerow(self.columns)
        cells = x.detach().cpu().double() * self.scale.cpu().double() + self.loc.cpu().double()
        for row in cells.tolist():
            writer.writerow([column.text(value) for column, value in zip(self._columns, row, strict=True)])
        return text.getvalue()

    def filled(self, train: Tensor, test: Tensor) -> str:
        """The file as CSV text, its missing cells filled from x; every other cell, and the label, as it is in the file.

        Args:
            train: the training rows without NaN, [N, E].
            test: the test rows without NaN, [M, E].
        """
        header, table = _read_csv(self._file, self._label, self._delimiter)
        x = torch.empty(len(table), len(self._columns), device="cpu")
        x[self._order] = torch.cat([train, test]).detach().cpu()
        text = io.StringIO()
        writer = csv.writer(text, delimiter=self._delimiter, lineterminator="\n")
        writer.writerow(header)
        values = (x.double() * self.scale.cpu().double() + self.loc.cpu().double()).tolist()
        places = [place for place, name in enumerate(header) if name != self._label]
        for (_, cells), row in zip(table, values, strict=True):
            for place, column, value in zip(places, self._columns, row, strict=True):
                if cells[place] in self._missing:
                    cells[place] = column.text(value)
            writer.writerow(cells)
        return text.getvalue()


def _picture(file: Path, size: int, channels: int) -> Tensor:
    """One image file as bytes [C, size, size]."""
    from PIL import Image, ImageOps

    with reading("a readable 8-bit image", file, "repair or remove it"), Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        # Making bytes of 16-bit or float pixels would clip them.
        expect(image.mode[0] not in "IF", "8-bit pixels", f"mode {image.mode}", "convert it")
        if image.has_transparency_data:
            image = image.convert("RGBA")
        image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.reshape(size, size, channels).permute(2, 0, 1).contiguous()


def _arrays(file: Path, key: str | None, label_key: str | None) -> dict[str, np.ndarray]:
    """The arrays "train" and, where the file has them, "test", "train labels" and "test labels"."""
    expect(file.is_file(), "a .npy or .npz file", f"no file {file}", "check path", FileNotFoundError)
    rule = (
        "an array file without Python objects",
        file,
        "save numeric arrays with numpy.save or numpy.savez",
    )
    with reading(*rule):
        loaded = np.load(file, allow_pickle=False)
        arrays: Mapping[str, np.ndarray] = {"its only array": loaded} if isinstance(loaded, np.ndarray) else loaded
    names = list(arrays)
    if key is None:
        usual = [n for n in ("x_train", "x") if n in names] or names
        clear = len(names) == 1 or usual is not names
        expect(clear, f"x_train, x or one array in {file}", ", ".join(names) or "none", "give key")
        key = usual[0]
    for name in (key, label_key):
        there = name is None or name in names
        expect(there, f"{name!r} in {file}", ", ".join(names), "take a name that is there, or leave it out")
    wanted = {"train": key, "train labels": label_key or {"x_train": "y_train", "x": "y"}.get(key, "")}
    partners = {part.replace("train", "test"): name.replace("train", "test") for part, name in wanted.items()}
    wanted |= {part: name for part, name in partners.items() if name not in wanted.values()}
    with reading(*rule):
        return {part: arrays[name] for part, name in wanted.items() if name in names}


def _rows(array: np.ndarray, file: Path) -> Tensor:
    """Rows as uint8 or float32 (NaN where missing), images channel first."""
    kind, shape = array.dtype.kind, array.shape
    known = array.dtype == np.uint8 or kind in "bf"
    remedy = "convert it with .astype('uint8') (bytes) or .astype('float32')"
    expect(known, f"uint8, bool or floats in {file}", array.dtype, remedy, TypeError)
    known = array.ndim in (2, 3, 4) and 0 not in shape[1:]
    expected = f"rows [N, E], [N, H, W], [N, C, H, W] or [N, H, W, C] in {file}"
    expect(known, expected, f"shape {list(shape)}", "reshape the array")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.dtype == np.uint8 and shape[3] in (1, 3) and shape[1] not in (1, 3):
        array = np.moveaxis(array, 3, 1)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        rows = torch.from_numpy(np.array(array, dtype=np.float32 if kind == "f" else np.uint8, order="C"))
    expect(not rows.isinf().any(), f"finite float32 values in {file}", "infinity", "remove or replace it")
    return rows


def _labels(arrays: dict[str, np.ndarray], part: str, file: Path) -> Tensor | None:
    if f"{part} labels" not in arrays:
        return None
    array, count = arrays[f"{part} labels"], len(arrays[part])
    whole = array.dtype.kind in "iu"
    expect(whole, f"whole-number labels in {file}", array.dtype, "number the classes from 0", TypeError)
    fits = array.shape in ((count,), (count, 1))
    expect(fits, f"{count} labels in {file}", f"shape {list(array.shape)}", "give one label a row")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))
