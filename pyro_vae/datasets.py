r"""Data sets: the stored training rows, the x that is scored, and the policy that belongs to every number.

.. math:: \text{stored rows} \xrightarrow{\ \texttt{prepare}\ } x

Training rows are stored as compactly as they come (bytes stay bytes) and become x when they are presented.
The test x is made once and never changes, so two numbers of one policy are numbers about the same data.
A constructor draws from its own generator: torch's global random state stays as it was.
"""

import gzip
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
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
        """Turn stored rows into x: pixel / 255 (grey), fixed bits (static), new bits (dynamic), or 0..255 (levels)."""
        if self._binarization == "dynamic":
            return _bernoulli(_grey(rows), None)
        return _grey(rows) if self._binarization == "grey" else rows.float()

    def _store(self, train: Tensor, test: Tensor, binarization: str, generator: torch.Generator) -> None:
        self._binarization = binarization
        of_policy = {"grey": "ContinuousBernoulli", "levels": "pixels.DiscretizedLogistic"}
        self.natural_likelihood = (of_policy.get(binarization, "Bernoulli"), {})
        self.train, self.test = train, test.float() if binarization == "levels" else _grey(test)
        # The test is drawn before the training rows: static and dynamic score the same bits for one seed.
        if binarization in ("static", "dynamic"):
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
        _expect_choice("binarization", binarization, get_args(Binarization))
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
    numbers for those files are numbers about another draw. ``levels``: x is the byte 0..255 itself, for a likelihood of
    levels such as :class:`pyro_vae.pixels.DiscretizedLogistic`, whose scores compare in bits per dimension.

    Args:
        root: folder with ``MNIST/raw/train-images-idx3-ubyte`` and its three companions, plain or .gz.
        binarization: ``grey`` (pixel / 255), ``static`` (drawn once), ``dynamic`` (drawn at each presentation) or
            ``levels`` (bytes as they are).
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
        binarization: ``grey``, ``static``, ``dynamic`` or ``levels``, see :class:`MNIST`.
        seed: seed of everything that is drawn once.
        download: fetch missing files into root (by torchvision, with its progress bar).

    Raises:
        FileNotFoundError: files are missing and not to be had.
        ValueError: a file is damaged, or an argument is out of its range.
        ImportError: torchvision does not import.
    Source: Xiao, Rasul, Vollgraf (2017), Fashion-MNIST, arXiv:1708.07747.
    """

    _set = "FashionMNIST"


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
