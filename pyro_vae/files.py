"""Data sets of your own: a folder of images, an array file, a table. See :class:`pyro_vae.datasets.DataSet`."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyro_vae.datasets import (
    POLICIES,
    Binarization,
    DataSet,
    _counts,
    _expect,
    _expect_choice,
    _expect_grey,
    _expect_whole,
    _generator,
    _Pixels,
    _reading,
    _split,
)


class ImageFolder(_Pixels):
    """Every png, jpg, jpeg, bmp and webp below a folder, as bytes [N, C, size, size].

    A picture is turned as its camera noted, cropped to its central square, resized, and made grey or RGB
    (transparency is dropped). First-level sub-folders are the classes, numbered in sorted order; pictures
    straight in root have no labels. Policies as for :class:`MNIST`; ``classes`` names the sub-folders.

    Args:
        root: the folder.
        size: height and width of x in pixels.
        channels: 1 for grey, 3 for RGB.
        test_fraction: share of the images held out as test (at least one), between 0 and 1.
        seed: seed of the split and of everything that is drawn once.
        binarization: ``grey``, ``static`` or ``dynamic``.

    Raises:
        FileNotFoundError: root is not a folder.
        ValueError: a picture is not readable or not 8-bit, fewer than 2, or an argument out of its range.
    """

    def __init__(
        self,
        root: str,
        size: int = 32,
        channels: Literal[1, 3] = 1,
        test_fraction: float = 0.1,
        seed: int = 0,
        binarization: Binarization = "grey",
    ) -> None:
        _expect_whole("size", size, 1)
        _expect_choice("channels", channels, (1, 3))
        _expect_choice("binarization", binarization, ("grey", "static", "dynamic"))
        folder = Path(root).expanduser().resolve()
        _expect(folder.is_dir(), "a folder of images", f"no folder {folder}", "check root", FileNotFoundError)
        endings = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in endings and f.is_file())
        _expect(bool(files), f"images ({' '.join(endings)})", f"none below {folder}", "check root")
        generator = _generator(seed)
        train, test = _split(len(files), test_fraction, generator)
        tops = [f.relative_to(folder).parts[0] if f.parent != folder else "" for f in files]
        self.classes = sorted(set(tops) - {""})
        if self.classes:
            sorted_in = "" not in tops
            _expect(sorted_in, f"all images of {folder} in sub-folders or none", "both", "move the loose ones")
            labels = torch.tensor([self.classes.index(top) for top in tops], device="cpu")
            self.train_labels, self.test_labels = labels[train], labels[test]
        pixels = torch.stack([_picture(f, size, channels) for f in files])
        self._store(pixels[train], pixels[test], binarization, generator)
        self.name = folder.name
        self.policy = (
            f"{self.name}, {channels}x{size}x{size}, {POLICIES[binarization].format(seed=seed)}, "
            f"split with seed {seed}, {_counts(self)}"
        )


class ArrayFile(_Pixels):
    """An array of a .npy or .npz file, one example a row.

    Accepted are [N, E], [N, H, W] (becomes [N, 1, H, W]), [N, C, H, W], and for uint8 also [N, H, W, C] with 1
    or 3 channels last, moved to [N, C, H, W] (where axis 1 is 1 or 3 too, it is read as channels first).
    Under ``none`` the natural likelihood is Bernoulli where all values are 0 or 1, ContinuousBernoulli where
    they stay in [0, 1], else Normal. Labels are whole numbers, one a row.

    Args:
        path: the file.
        key: name of the rows in a .npz; None takes ``x_train``, else ``x``, else the only array. With "train"
            in the name, the array named the same with "test", where there is one, is the test set.
        label_key: name of the labels in a .npz, "train" and "test" paired as for key; None takes ``y_train``
            and ``y_test`` beside ``x_train``, or ``y`` beside ``x``, where present.
        test_fraction: share held out as test (at least one) where the file has no test set, between 0 and 1.
        seed: seed of the split and of everything that is drawn once.
        binarization: ``none`` for values as they are; for grey values (bytes 0..255, or floats in [0, 1])
            ``grey``, ``static`` or ``dynamic`` as for :class:`MNIST`.

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
        binarization: Literal["none", "grey", "static", "dynamic"] = "none",
    ) -> None:
        _expect_choice("binarization", binarization, ("none", "grey", "static", "dynamic"))
        file = Path(path).expanduser()
        arrays = _arrays(file, key, label_key)
        rows, labels = _rows(arrays["train"], file), _labels(arrays, "train", file)
        generator = _generator(seed)
        if "test" in arrays:
            train, test, split = rows, _rows(arrays["test"], file), "test set of the file"
            found = f"{train.dtype} {list(train.shape)} and {test.dtype} {list(test.shape)}"
            agree = train.shape[1:] == test.shape[1:] and train.dtype == test.dtype and len(train) and len(test)
            _expect(bool(agree), f"training and test rows of one kind in {file}", found, "make them agree")
            self.train_labels, self.test_labels = labels, _labels(arrays, "test", file)
        else:
            first, second = _split(len(rows), test_fraction, generator)
            train, test, split = rows[first], rows[second], f"split with seed {seed}"
            if labels is not None:
                self.train_labels, self.test_labels = labels[first], labels[second]
        rows = torch.cat([train, test])
        bits, is_bytes = bool(((rows == 0) | (rows == 1)).all()), rows.dtype == torch.uint8
        if binarization == "none":
            remedy = "choose binarization=grey, static or dynamic, or save the array as float32"
            _expect(bits or not is_bytes, f"floats or bits in {file}", f"bytes up to {int(rows.max())}", remedy)
            self._binarization, self.train, self.test = "none", train, test.float()
            unit = "ContinuousBernoulli" if rows.min() >= 0 and rows.max() <= 1 else "Normal"
            self.natural_likelihood = ("Bernoulli" if bits else unit, {})
        else:
            # Bits read as bytes would be 0 and 1/255: nearly black pictures, and nobody would be told.
            problem = is_bytes and bits
            _expect(not problem, f"bytes 0..255 in {file}", "only 0 and 1", "choose binarization=none for bits")
            _expect_grey(rows, f"rescale {file}, or choose binarization=none")
            self._store(train, test, binarization, generator)
        self.name = file.name
        self.policy = f"{self.name}, {POLICIES[binarization].format(seed=seed)}, {split}, {_counts(self)}"


class Table(DataSet):
    r"""The numeric columns of a CSV file with a header row, standardised; float32 rows [N, E].

    .. math:: x_{ij} = (\text{cell}_{ij} - \mathrm{loc}_j) / \mathrm{scale}_j

    ``loc`` and ``scale`` ([E], kept) are mean and standard deviation (divisor N) of the training rows alone.
    Densities are those of the standardised x: for the file's units subtract the sum of log ``scale``. Blank
    lines hold no row. ``columns`` names the columns, ``classes`` the labels in sorted order.

    Args:
        path: the file, UTF-8.
        label: name of the column that holds the label (any text), or None.
        test_fraction: share of the rows held out as test (at least one), between 0 and 1.
        seed: seed of the split.
        delimiter: the character between cells.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a cell is empty, not a number or not finite (named by line and column), a column is
            constant, the header does not fit, fewer than 2 rows, or an argument is out of its range.
    """

    def __init__(
        self,
        path: str,
        label: str | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        delimiter: str = ",",
    ) -> None:
        _expect(len(delimiter) == 1, "a delimiter of one character", repr(delimiter), "give one")
        file = Path(path).expanduser()
        self.columns, values, texts = _read_csv(file, label, delimiter)
        train, test = _split(len(values), test_fraction, _generator(seed))
        seen = values[train]
        for name, column in zip(self.columns, seen.T, strict=True):
            # Not scale == 0: the rounded mean of equal numbers need not be that number.
            found = f"column {name!r} of {file} constant over the {len(seen)} training rows"
            _expect(bool(column.min() < column.max()), "columns that vary", found, "remove the column")
        loc, scale = seen.mean(0), seen.std(0, correction=0)
        x, self.loc, self.scale = ((values - loc) / scale).float(), loc.float(), scale.float()
        held = bool(x.isfinite().all() and (self.scale > 0).all() and (self.loc + self.scale).isfinite().all())
        _expect(held, f"numbers that float32 holds in {file}", "some too large or too small", "rescale them")
        self.train, self.test = x[train], x[test]
        self.classes = sorted(set(texts))
        if label is not None:
            number = {text: i for i, text in enumerate(self.classes)}
            labels = torch.tensor([number[text] for text in texts], device="cpu")
            self.train_labels, self.test_labels = labels[train], labels[test]
        self.natural_likelihood = ("HeteroscedasticNormal", {})
        self.name = file.name
        self.policy = (
            f"{self.name}, columns standardised by the training mean and standard deviation, "
            f"split with seed {seed}, {_counts(self)}"
        )


def _picture(file: Path, size: int, channels: int) -> Tensor:
    """One image file as bytes [C, size, size]."""
    from PIL import Image, ImageOps

    with _reading("a readable 8-bit image", file, "repair or remove it"), Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        # Making bytes of 16-bit or float pixels would clip them.
        _expect(image.mode[0] not in "IF", "8-bit pixels", f"mode {image.mode}", "convert it")
        if image.has_transparency_data:
            image = image.convert("RGBA")
        image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.reshape(size, size, channels).permute(2, 0, 1).contiguous()


def _arrays(file: Path, key: str | None, label_key: str | None) -> dict[str, np.ndarray]:
    """The arrays "train" and, where the file has them, "test", "train labels" and "test labels"."""
    _expect(file.is_file(), "a .npy or .npz file", f"no file {file}", "check path", FileNotFoundError)
    rule = (
        "an array file without Python objects",
        file,
        "save numeric arrays with numpy.save or numpy.savez",
    )
    with _reading(*rule):
        loaded = np.load(file, allow_pickle=False)
        arrays: Mapping[str, np.ndarray] = {"its only array": loaded} if isinstance(loaded, np.ndarray) else loaded
    names = list(arrays)
    if key is None:
        usual = [n for n in ("x_train", "x") if n in names] or names
        clear = len(names) == 1 or usual is not names
        _expect(clear, f"x_train, x or one array in {file}", ", ".join(names) or "none", "give key")
        key = usual[0]
    for name in (key, label_key):
        there = name is None or name in names
        _expect(there, f"{name!r} in {file}", ", ".join(names), "take a name that is there, or leave it out")
    wanted = {"train": key, "train labels": label_key or {"x_train": "y_train", "x": "y"}.get(key, "")}
    partners = {part.replace("train", "test"): name.replace("train", "test") for part, name in wanted.items()}
    wanted |= {part: name for part, name in partners.items() if name not in wanted.values()}
    with _reading(*rule):
        return {part: arrays[name] for part, name in wanted.items() if name in names}


def _rows(array: np.ndarray, file: Path) -> Tensor:
    """Rows as uint8 or finite float32, images channel first."""
    kind, shape = array.dtype.kind, array.shape
    known = array.dtype == np.uint8 or kind in "bf"
    remedy = "convert it with .astype('uint8') (bytes) or .astype('float32')"
    _expect(known, f"uint8, bool or floats in {file}", array.dtype, remedy, TypeError)
    known = array.ndim in (2, 3, 4) and 0 not in shape[1:]
    expected = f"rows [N, E], [N, H, W], [N, C, H, W] or [N, H, W, C] in {file}"
    _expect(known, expected, f"shape {list(shape)}", "reshape the array")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.dtype == np.uint8 and shape[3] in (1, 3) and shape[1] not in (1, 3):
        array = np.moveaxis(array, 3, 1)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        rows = torch.from_numpy(np.array(array, dtype=np.float32 if kind == "f" else np.uint8, order="C"))
    finite = bool(rows.isfinite().all())
    _expect(finite, f"finite float32 values in {file}", "NaN or infinity", "remove or replace them")
    return rows


def _labels(arrays: dict[str, np.ndarray], part: str, file: Path) -> Tensor | None:
    if f"{part} labels" not in arrays:
        return None
    array, count = arrays[f"{part} labels"], len(arrays[part])
    whole = array.dtype.kind in "iu"
    _expect(whole, f"whole-number labels in {file}", array.dtype, "number the classes from 0", TypeError)
    fits = array.shape in ((count,), (count, 1))
    _expect(fits, f"{count} labels in {file}", f"shape {list(array.shape)}", "give one label a row")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def _read_csv(file: Path, label: str | None, delimiter: str) -> tuple[list[str], Tensor, list[str]]:
    """Names of the numeric columns, their float64 values [N, E], and the label texts."""
    _expect(file.is_file(), "a CSV file", f"no file {file}", "check path", FileNotFoundError)
    with (
        _reading("CSV text in UTF-8", file, "convert it"),
        file.open(newline="", encoding="utf-8-sig") as text,
    ):
        reader = csv.reader(text, delimiter=delimiter)
        table = [(reader.line_num, [c.strip() for c in cells]) for cells in reader if cells]
    header = table[0][1] if table else []
    found = ", ".join(map(repr, header)) or "nothing"
    named = bool(header) and "" not in header and len(set(header)) == len(header)
    named = named and not all(_is_finite(name) for name in header)
    _expect(named, f"a header row of different names in {file}", found, "put the column names first")
    _expect(label is None or label in header, f"a column {label!r} in {file}", found, "give one of these")
    _expect(header != [label], f"numeric columns beside {label!r} in {file}", "none", "add some")
    rows: list[list[float]] = []
    texts: list[str] = []
    for line, cells in table[1:]:
        fits = len(cells) == len(header)
        _expect(fits, f"{len(header)} cells", f"{len(cells)} in {file} line {line}", "complete the line")
        for name, cell in zip(header, cells, strict=True):
            if not (cell if name == label else _is_finite(cell)):
                where = f"{file} line {line}, column {name!r}"
                expected = "a label" if name == label else "a finite number"
                _expect(False, expected, f"{cell!r} in {where}", "fill it in (only label names text)")
        rows.append([float(c) for name, c in zip(header, cells, strict=True) if name != label])
        texts += [c for name, c in zip(header, cells, strict=True) if name == label]
    columns = [name for name in header if name != label]
    return columns, torch.tensor(rows, dtype=torch.float64, device="cpu"), texts


def _is_finite(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
