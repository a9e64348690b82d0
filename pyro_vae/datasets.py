"""Data sets: digits, MNIST and its sibling, a world that is solved exactly; see :mod:`pyro_vae.data_contract`."""

import gzip
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data_contract import (
    POLICIES,
    Binarization,
    DataSet,
    _Pixels,
    as_grey,
    draw_bits,
    expect,
    expect_choice,
    expect_grey,
    expect_whole,
    one_line,
    reading,
    row_counts,
    seeded,
    split_rows,
)


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
    expect(known, "grey values as floats or bytes as uint8", x.dtype, "convert x", TypeError)
    expect_grey(x, "divide bytes by 255, or choose a likelihood for these values")
    if generator is not None:
        same = generator.device.type == x.device.type
        expect(same, f"a generator on {x.device}", generator.device, "make torch.Generator(x.device)")
    return draw_bits(as_grey(x), generator).to(x.dtype if x.is_floating_point() else torch.float32)


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
        train, test = split_rows(len(rows), test_fraction, seeded(seed))
        self.train, self.train_labels = rows[train], labels[train]
        self.test, self.test_labels = rows[test].float(), labels[test]
        self.natural_likelihood = ("Binomial", {"total_count": 16})
        self.name = "Digits"
        self.policy = f"Digits, pixel counts 0..16, split with seed {seed}, {row_counts(self)}"


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
        expect_choice("binarization", binarization, get_args(Binarization))
        generator = seeded(seed)
        train, self.train_labels, test, self.test_labels = self._load(Path(root).expanduser(), download)
        self._store(train, test, binarization, generator)
        self.name = self._set
        self.policy = f"{self.name}, {POLICIES[binarization].format(seed=seed)}, {row_counts(self)}"

    def _load(self, root: Path, download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        try:
            from torchvision import datasets  # here: wheels that do not match torch raise anything
        except Exception as error:
            raise ImportError(
                f"expected a torchvision made for torch {torch.__version__}, found none that imports "
                f"({one_line(error)}): install both together, pip install --upgrade torch torchvision"
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
                missing += f" and no way to download ({one_line(error)})"
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
            expect_whole(key, value, 2 if key == "num_train" else 1)
        expect(0 < scale < math.inf, "a positive scale", scale, "give the noise's standard deviation")
        generator = seeded(seed)

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
            f"drawn with seed {seed}, {row_counts(self)}"
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
        expect(fits, f"x of shape [B, {dim}]", list(x.shape), "give rows of this set")
        weight, residual = self.weight.to(x.device).double(), x.double() - self.loc.to(x.device).double()
        covariance = weight @ weight.T + self.scale**2 * torch.eye(dim, dtype=torch.float64, device=x.device)
        quadratic = (residual * torch.linalg.solve(covariance, residual.T).T).sum(-1)
        return -0.5 * (dim * math.log(2 * math.pi) + torch.linalg.slogdet(covariance)[1] + quadratic)


def _unpack(source: Path, target: Path) -> None:
    opener = gzip.GzipFile if source.suffix == ".gz" else open
    with reading("a whole file", source, "replace it"), opener(source, "rb") as rows, target.open("wb") as out:
        shutil.copyfileobj(rows, out)


def _read(make: Any, root: Path, raw: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 1, H, W] and labels [N] of the training and the test part, by a torchvision class."""
    parts: list[Tensor] = []
    for is_train in (True, False):
        with reading("whole idx files", raw, "fetch them again"):
            part = make(str(root), train=is_train, download=False)
        fits = part.data.dim() == 3 and len(part.data) and part.targets.shape == part.data.shape[:1]
        found = f"{list(part.data.shape)} and {list(part.targets.shape)}"
        expect(bool(fits), f"one label an image in {raw}", found, "fetch the files again")
        parts += [part.data.unsqueeze(1), part.targets.long()]
    return parts[0], parts[1], parts[2], parts[3]
