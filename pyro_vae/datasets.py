r"""Data sets: the stored training rows, the x that is scored, and the policy that belongs to every number.

.. math:: \text{stored rows} \xrightarrow{\ \texttt{prepare}\ } x

Training rows are stored as compactly as they come (bytes stay bytes) and become x when they are presented.
The test x is made once and never changes, so two numbers of one policy are numbers about the same data.
A constructor draws from its own generator: torch's global random state stays as it was.
"""

import csv
import gzip
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

Binarization = Literal["grey", "static", "dynamic"]
POLICIES = {
    "none": "values as they are",
    "grey": "grey (pixel / 255)",
    "static": "static binarisation (train and test binarised once, seed {seed})",
    "dynamic": "dynamic binarisation (test binarised once, seed {seed})",
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
        natural_likelihood: name and arguments of the likelihood of x: ("Binomial", {"total_count": 16}).
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


def binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw black-and-white pixels with the grey values as probabilities.

    .. math:: b_{ij} \sim \mathrm{Bernoulli}(x_{ij}), \qquad x_{ij} \in [0, 1] \text{ or a byte} / 255

    Args:
        x: grey values in [0, 1] (floating) or bytes 0..255 (uint8), any shape.
        generator: source of the draws, on x's device; None takes torch's global one.

    Returns:
        Zeros and ones in x's shape and dtype (float32 for bytes).

    Raises:
        ValueError: a value lies outside [0, 1], or the generator is on another device.
        TypeError: x is neither floating nor uint8.
    Source: Salakhutdinov, Murray (2008), On the Quantitative Analysis of Deep Belief Networks.

    Example:
        >>> binarize(torch.tensor([0.0, 1.0, 1.0]))
        tensor([0., 1., 1.])
        >>> binarize(torch.full((2, 3), 128, dtype=torch.uint8), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    known = x.dtype == torch.uint8 or x.is_floating_point()
    _expect(known, "grey values as floats or bytes as uint8", x.dtype, "convert x", TypeError)
    _expect_grey(x, "divide bytes by 255, or choose a likelihood for these values")
    if generator is not None:
        same = generator.device.type == x.device.type
        _expect(same, f"a generator on {x.device}", generator.device, "make torch.Generator(x.device)")
    return _bernoulli(_grey(x), generator).to(x.dtype if x.is_floating_point() else torch.float32)


class Digits(DataSet):
    r"""Scikit-learn's 1,797 handwritten digits, 8x8 counts 0..16; nothing to download.

    .. math:: x_{ij} \in \{0, \dots, 16\} \text{ inked of 4x4 points}, \quad x_{ij} \sim \mathrm{Binomial}(16, p_{ij})

    The split is a shuffle by ``seed``; rows are stored as uint8 [N, 1, 8, 8] and labelled 0..9.

    Args:
        test_fraction: share of the examples held out as test, between 0 and 1.
        seed: seed of the split.

    Raises:
        ValueError: an argument is out of its range.
    Source: Alpaydin, Kaynak (1998), Optical Recognition of Handwritten Digits, UCI repository.

    Example:
        >>> digits = Digits()
        >>> digits.train.shape, digits.test.shape, digits.train.dtype
        (torch.Size([1438, 1, 8, 8]), torch.Size([359, 1, 8, 8]), torch.uint8)
        >>> digits.policy
        'Digits, pixel counts 0..16, split with seed 0, 1438 train / 359 test'
    """

    def __init__(self, test_fraction: float = 0.2, seed: int = 0) -> None:
        from sklearn.datasets import load_digits  # here: slow to import, and only this set needs it

        pixels, classes = load_digits(return_X_y=True)
        rows = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 8, 8)
        labels = torch.from_numpy(classes.astype(np.int64))
        train, test = _split(len(rows), test_fraction, _generator(seed))
        self.train, self.train_labels = rows[train], labels[train]
        self.test, self.test_labels = rows[test].float(), labels[test]
        self.natural_likelihood = ("Binomial", {"total_count": 16})
        self.name = "Digits"
        self.policy = f"Digits, pixel counts 0..16, split with seed {seed}, {_counts(self)}"


class _Pixels(DataSet):
    """Rows under one of the policies; ``none`` presents the values as they are."""

    _binarization: str

    def prepare(self, rows: Tensor) -> Tensor:
        """Turn stored rows into x: pixel / 255 (grey), fixed bits (static), or new bits (dynamic)."""
        if self._binarization == "dynamic":
            return _bernoulli(_grey(rows), None)
        return _grey(rows) if self._binarization == "grey" else rows.float()

    def _store(self, train: Tensor, test: Tensor, binarization: str, generator: torch.Generator) -> None:
        self._binarization = binarization
        self.natural_likelihood = ("ContinuousBernoulli" if binarization == "grey" else "Bernoulli", {})
        self.train, self.test = train, _grey(test)
        # The test is drawn before the training rows: static and dynamic score the same bits for one seed.
        if binarization != "grey":
            self.test = _bernoulli(self.test, generator)
        if binarization == "static":
            self.train = _bernoulli(_grey(train), generator).to(torch.uint8)


class _TorchvisionSet(_Pixels):
    """A set in MNIST's four files, read by torchvision."""

    _set: ClassVar[str]
    _files: ClassVar[tuple[str, ...]] = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )

    def __init__(
        self, root: str = "data", binarization: Binarization = "dynamic", seed: int = 0, download: bool = True
    ) -> None:
        _expect_choice("binarization", binarization, ("grey", "static", "dynamic"))
        generator = _generator(seed)
        train, self.train_labels, test, self.test_labels = self._load(Path(root).expanduser(), download)
        self._store(train, test, binarization, generator)
        self.name = self._set
        self.policy = f"{self.name}, {POLICIES[binarization].format(seed=seed)}, {_counts(self)}"

    def _load(self, root: Path, download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        try:
            from torchvision import datasets  # here: wheels that do not match torch raise anything
        except Exception as error:
            raise ImportError(
                f"expected a torchvision made for torch {torch.__version__}, found none that imports "
                f"({_one_line(error)}): install both together, pip install --upgrade torch torchvision"
            ) from error
        make, raw = getattr(datasets, self._set), root / self._set / "raw"
        found = {name: [f for f in (raw / name, raw / f"{name}.gz") if f.is_file()] for name in self._files}
        if all(files and files[0].suffix != ".gz" for files in found.values()):
            return _read(make, root, raw)
        if all(found.values()):
            # Unpacked elsewhere: what is in the folder is the user's, and it may be read-only.
            with tempfile.TemporaryDirectory() as scratch:
                (folder := Path(scratch, self._set, "raw")).mkdir(parents=True)
                for name, files in found.items():
                    _unpack(files[0], folder / name)
                return _read(make, Path(scratch), raw)
        missing = f"no {', '.join(name for name, files in found.items() if not files)}"
        if download:
            try:
                make(str(root), download=True)
            except Exception as error:  # no network, no right to write, a broken transfer: one remedy
                missing += f" and no way to download ({_one_line(error)})"
            else:
                return _read(make, root, raw)
        raise FileNotFoundError(
            f"expected {', '.join(self._files)} (or .gz) in {raw}, found {missing}: "
            "put them there, or use download=True with a network"
        )


class MNIST(_TorchvisionSet):
    """Handwritten digits, 60,000 + 10,000 images of 28x28 bytes, stored [N, 1, 28, 28].

    ``grey``: x = pixel / 255. ``static``: training and test rows are drawn once, x ~ Bernoulli(pixel / 255).
    ``dynamic``: training rows are drawn anew at each presentation, test rows once. The test bits of static and
    dynamic are the same for one seed. They are not those of the fixed files of Larochelle and Murray (2011):
    numbers for those files are numbers about another draw.

    Args:
        root: folder with ``MNIST/raw/train-images-idx3-ubyte`` and its three companions, plain or .gz.
        binarization: ``grey`` (pixel / 255), ``static`` (drawn once) or ``dynamic`` (drawn at each presentation).
        seed: seed of everything that is drawn once.
        download: fetch missing files into root (by torchvision, with its progress bar).

    Raises:
        FileNotFoundError: files are missing and not to be had.
        ValueError: a file is damaged, or an argument is out of its range.
        ImportError: torchvision does not import.
    Source: LeCun, Bottou, Bengio, Haffner (1998), Gradient-Based Learning Applied to Document Recognition.
    """

    _set = "MNIST"


class FashionMNIST(_TorchvisionSet):
    """Pictures of clothing in the format of MNIST, 60,000 + 10,000 images, stored [N, 1, 28, 28].

    Policies as for :class:`MNIST`.

    Args:
        root: folder with ``FashionMNIST/raw/train-images-idx3-ubyte`` and its three companions, plain or .gz.
        binarization: ``grey``, ``static`` or ``dynamic``, see :class:`MNIST`.
        seed: seed of everything that is drawn once.
        download: fetch missing files into root (by torchvision, with its progress bar).

    Raises:
        FileNotFoundError: files are missing and not to be had.
        ValueError: a file is damaged, or an argument is out of its range.
        ImportError: torchvision does not import.
    Source: Xiao, Rasul, Vollgraf (2017), Fashion-MNIST, arXiv:1708.07747.
    """

    _set = "FashionMNIST"


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


class LinearGaussianData(DataSet):
    r"""Draws of a linear-Gaussian model, of which log p(x) is known exactly.

    .. math:: x = W z + \mu + \sigma \epsilon, \quad \log p(x) = \log \mathcal{N}(x; \mu, WW^\top + \sigma^2 I)

    ``weight`` W [E, D] and ``loc`` mu [E] are standard normal draws, ``scale`` is sigma. An estimate of the
    log-evidence can be held against ``log_evidence(test)``; on average no model scores higher.

    Args:
        latent_dim: dimension D of z.
        data_dim: dimension E of x.
        num_train: number of training rows.
        num_test: number of test rows.
        scale: standard deviation sigma of the noise.
        seed: seed of the weight, the loc and the rows.

    Raises:
        ValueError: a size is too small, or scale is not positive.
    Source: Tipping, Bishop (1999), Probabilistic Principal Component Analysis, J. R. Statist. Soc. B 61(3).

    Example:
        >>> data = LinearGaussianData(latent_dim=2, data_dim=7)
        >>> data.train.shape, data.weight.shape
        (torch.Size([1000, 7]), torch.Size([7, 2]))
        >>> data.log_evidence(data.test).shape
        torch.Size([500])
    """

    def __init__(
        self,
        latent_dim: int = 2,
        data_dim: int = 7,
        num_train: int = 1000,
        num_test: int = 500,
        scale: float = 0.5,
        seed: int = 0,
    ) -> None:
        sizes = {"latent_dim": latent_dim, "data_dim": data_dim, "num_train": num_train, "num_test": num_test}
        for key, value in sizes.items():
            _expect_whole(key, value, 2 if key == "num_train" else 1)
        _expect(0 < scale < math.inf, "a positive scale", scale, "give the noise's standard deviation")
        generator = _generator(seed)

        def normal(*shape: int) -> Tensor:
            # dtype and device are spelled out: torch's defaults must not change what a seed means.
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

        self.weight, self.loc, self.scale = normal(data_dim, latent_dim), normal(data_dim), float(scale)
        z, noise = normal(num_train + num_test, latent_dim), normal(num_train + num_test, data_dim)
        x = z @ self.weight.T + self.loc + self.scale * noise
        self.train, self.test = x[:num_train].clone(), x[num_train:].clone()  # each with memory of its own
        self.natural_likelihood = ("Normal", {})
        self.name = "LinearGaussianData"
        self.policy = (
            f"LinearGaussianData, latent_dim {latent_dim}, data_dim {data_dim}, scale {self.scale:g}, "
            f"drawn with seed {seed}, {_counts(self)}"
        )

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x), computed in float64.

        Args:
            x: rows, [B, E].

        Returns:
            [B] float64 on x's device, nats per example, higher is better.

        Raises:
            ValueError: x is not [B, E].
        """
        dim = len(self.loc)
        fits = x.dim() == 2 and x.shape[1] == dim
        _expect(fits, f"x of shape [B, {dim}]", list(x.shape), "give rows of this set")
        weight, residual = self.weight.to(x.device).double(), x.double() - self.loc.to(x.device).double()
        covariance = weight @ weight.T + self.scale**2 * torch.eye(dim, dtype=torch.float64, device=x.device)
        quadratic = (residual * torch.linalg.solve(covariance, residual.T).T).sum(-1)
        return -0.5 * (dim * math.log(2 * math.pi) + torch.linalg.slogdet(covariance)[1] + quadratic)


def _grey(rows: Tensor) -> Tensor:
    """Bytes 0..255 or grey values -> grey values in [0, 1]."""
    return rows.float() / 255 if rows.dtype == torch.uint8 else rows


def _bernoulli(grey: Tensor, generator: torch.Generator | None) -> Tensor:
    """One draw a pixel, never ink at 0 and always at 1; unchecked, so that nothing waits for the device."""
    uniform = torch.rand(grey.shape, generator=generator, dtype=torch.float32, device=grey.device)
    return (uniform < grey).float()


def _counts(data: DataSet) -> str:
    return f"{len(data.train)} train / {len(data.test)} test"


def _generator(seed: int) -> torch.Generator:
    _expect_whole("seed", seed, 0)
    return torch.Generator(device="cpu").manual_seed(seed)


def _split(count: int, test_fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the test rows: a shuffle, at least one row each."""
    _expect(0 < test_fraction < 1, "test_fraction between 0 and 1", test_fraction, "give the share to hold out")
    _expect(count >= 2, "at least 2 examples", count, "training and test need one each")
    order = torch.randperm(count, generator=generator, device="cpu")
    held_out = min(max(round(count * test_fraction), 1), count - 1)
    return order[held_out:], order[:held_out]


def _expect(ok: bool, expected: str, found: object, remedy: str, error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(f"expected {expected}, found {found}: {remedy}")


def _expect_whole(name: str, value: int, least: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63
    _expect(ok, f"{name} to be a whole number of at least {least}", repr(value), f"change {name}")


def _expect_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    _expect(value in choices, f"{name} to be one of {', '.join(map(str, choices))}", repr(value), "choose one")


def _expect_grey(x: Tensor, remedy: str) -> None:
    if x.dtype != torch.uint8:
        outside = x[~((x >= 0) & (x <= 1))]  # so written, a NaN is outside too
        if len(outside):
            _expect(False, "grey values in [0, 1]", f"{outside[0].item():g}", remedy)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def _reading(expected: str, file: Path, remedy: str) -> Iterator[None]:
    """Put any failure inside into one line: readers raise everything from OSError to AssertionError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"expected {expected}, found {file} ({_one_line(error)}): {remedy}") from error


def _unpack(source: Path, target: Path) -> None:
    opener = gzip.GzipFile if source.suffix == ".gz" else open
    with _reading("a whole file", source, "replace it"), opener(source, "rb") as rows, target.open("wb") as out:
        shutil.copyfileobj(rows, out)


def _read(make: Any, root: Path, raw: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 1, H, W] and labels [N] of the training and the test part, by a torchvision class."""
    parts: list[Tensor] = []
    for is_train in (True, False):
        with _reading("whole idx files", raw, "fetch them again"):
            part = make(str(root), train=is_train, download=False)
        fits = part.data.dim() == 3 and len(part.data) and part.targets.shape == part.data.shape[:1]
        found = f"{list(part.data.shape)} and {list(part.targets.shape)}"
        _expect(bool(fits), f"one label an image in {raw}", found, "fetch the files again")
        parts += [part.data.unsqueeze(1), part.targets.long()]
    return parts[0], parts[1], parts[2], parts[3]


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
