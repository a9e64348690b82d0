"""The data sets: policies, splits, files and refusals, on small files in the real formats."""

import gzip
import math
import os
import random
import struct
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae.datasets import MNIST, DataSet, Digits, FashionMNIST, LinearGaussianData, binarize
from pyro_vae.files import ArrayFile, ImageFolder, Table

SETS = {"MNIST": MNIST, "FashionMNIST": FashionMNIST}
N, M, H, W = 11, 5, 28, 28


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(root, name="MNIST", packed=(), n=N, m=M):
    """The four files of MNIST's format; those numbered in `packed` as .gz. Returns the arrays."""
    draw = np.random.default_rng(7)
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    arrays = []
    for part, count in (("train", n), ("t10k", m)):
        images = draw.integers(0, 256, (count, H, W), dtype=np.uint8)
        images[:, 0], images[:, 1] = 0, 255  # ink that is certain either way
        labels = draw.integers(0, 10, count, dtype=np.uint8)
        arrays += [(f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)]
    for i, (file, array) in enumerate(arrays):
        if i in packed:
            (raw / f"{file}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (raw / file).write_bytes(idx_bytes(array))
    return [torch.from_numpy(array) for _, array in arrays]


def picture(path, shape=(9, 6, 3), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def table(tmp_path, text, name="table.csv"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def rows_of(x):
    return sorted(map(tuple, x.flatten(1).tolist()))


@pytest.fixture
def made(tmp_path):
    """Constructors of every set with a few rows, by name."""
    write_idx(tmp_path)
    write_idx(tmp_path, "FashionMNIST", packed=range(4))
    for i in range(7):
        picture(tmp_path / "pictures" / f"{i}.png", seed=i)
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(13, 3)))
    csv = table(tmp_path, "a,b\n" + "".join(f"{i},{i * i}\n" for i in range(9)))
    root = str(tmp_path)
    return {
        "Digits": lambda seed=0: Digits(seed=seed),
        "MNIST": lambda seed=0: MNIST(root, seed=seed),
        "FashionMNIST": lambda seed=0: FashionMNIST(root, "static", seed=seed),
        "ImageFolder": lambda seed=0: ImageFolder(f"{root}/pictures", 4, binarization="static", seed=seed),
        "ArrayFile": lambda seed=0: ArrayFile(f"{root}/a.npy", seed=seed),
        "Table": lambda seed=0: Table(csv, seed=seed),
        "LinearGaussianData": lambda seed=0: LinearGaussianData(num_train=7, num_test=3, seed=seed),
    }


NAMES = ["Digits", "MNIST", "FashionMNIST", "ImageFolder", "ArrayFile", "Table", "LinearGaussianData"]


# --- the contract of every set


@pytest.mark.parametrize("name", NAMES)
def test_every_set_fulfils_the_contract(made, name):
    data = made[name]()
    assert isinstance(data, DataSet)
    assert data.test.dtype == torch.float32 and data.train.shape[1:] == data.test.shape[1:] == data.event_shape
    x = data.prepare(data.train[:3])
    assert x.dtype == torch.float32 and x.shape == (3, *data.event_shape)
    assert f"{len(data.train)} train / {len(data.test)} test" in data.policy
    assert isinstance(data.natural_likelihood[0], str) and isinstance(data.natural_likelihood[1], dict)
    for labels, rows in ((data.train_labels, data.train), (data.test_labels, data.test)):
        assert labels is None or (labels.dtype == torch.int64 and labels.shape == (len(rows),))


@pytest.mark.parametrize("name", NAMES)
def test_construction_leaves_the_global_random_state_alone(made, name):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    made[name]()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate() and before[2] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_one_set_and_another_gives_another(made, name):
    first, again, other = made[name](3), made[name](3), made[name](4)
    assert torch.equal(first.train, again.train) and torch.equal(first.test, again.test)
    assert not torch.equal(first.test, other.test)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_dtype_does_not_change_what_a_seed_means(made, name):
    first = made[name]()
    torch.set_default_dtype(torch.float64)
    try:
        again = made[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first.train, again.train) and torch.equal(first.test, again.test)
    assert again.test.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_to_moves_every_tensor_and_returns_the_set(made, name):
    data = made[name]()
    assert data.to("meta") is data
    assert {v.device.type for v in vars(data).values() if isinstance(v, torch.Tensor)} == {"meta"}


def test_a_set_of_ones_own_needs_only_the_attributes():
    class Own(DataSet):
        def __init__(self):
            self.name, self.policy, self.natural_likelihood = "Own", "none", ("Normal", {})
            self.train, self.test = torch.ones(5, 7, dtype=torch.float64), torch.zeros(3, 7)

    own = Own()
    assert own.prepare(own.train).dtype == torch.float32
    assert own.event_shape == (7,) and own.train_labels is None and own.test_labels is None


# --- binarize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_binarize_gives_zeros_and_ones_with_the_grey_mean(dtype):
    levels = torch.tensor([0, 51, 128, 204, 255], dtype=torch.uint8)
    grey = levels if dtype == torch.uint8 else levels.to(dtype) / 255
    draws = binarize(grey.expand(20_000, 5), torch.Generator().manual_seed(0))
    p = levels.double() / 255
    assert draws.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert ((draws.double().mean(0) - p).abs() <= 4 * (p * (1 - p) / 20_000).sqrt()).all()


def test_binarize_draws_from_the_generator_it_is_given():
    x = torch.full((3, 50), 0.5)
    before = torch.get_rng_state()
    one, two = (binarize(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(before, torch.get_rng_state())


def test_a_grey_value_of_zero_is_never_ink_even_at_the_smallest_draw(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **how: torch.zeros(shape))
    assert binarize(torch.tensor([0.0, 0.5])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bad", [1.5, -0.25, math.nan])
def test_binarize_refuses_what_is_no_probability(bad):
    with pytest.raises(ValueError, match=rf"expected grey values in \[0, 1\], found {bad:g}: "):
        binarize(torch.tensor([0.5, bad]))


def test_binarize_refuses_whole_numbers():
    with pytest.raises(TypeError, match=r"expected grey values .*, found torch.int64: convert x"):
        binarize(torch.tensor([0, 1]))


# --- digits


def test_digits_are_all_there_once_with_their_labels():
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    data = Digits(test_fraction=0.3, seed=5)
    assert len(data.test) == 539 and data.natural_likelihood == ("Binomial", {"total_count": 16})
    x = torch.cat([data.prepare(data.train), data.test]).flatten(1)
    with_labels = torch.cat([x, torch.cat([data.train_labels, data.test_labels]).unsqueeze(1).float()], 1)
    assert data.train.dtype == torch.uint8 and data.event_shape == (1, 8, 8)
    assert rows_of(with_labels) == rows_of(torch.tensor(np.c_[pixels, classes], dtype=torch.float32))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, math.nan])
def test_test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"expected test_fraction between 0 and 1, found "):
        Digits(test_fraction=fraction)


@pytest.mark.parametrize("seed", [-1, 0.5, True, "1"])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match=r"expected seed to be a whole number of at least 0, found "):
        Digits(seed=seed)


# --- MNIST and FashionMNIST


@pytest.mark.parametrize("packed", [(), range(4), (1, 2)], ids=["plain", "gz", "mixed"])
@pytest.mark.parametrize("name", SETS)
def test_files_are_read_as_they_lie_and_nothing_is_written(tmp_path, name, packed):
    train, train_labels, test, test_labels = write_idx(tmp_path, name, packed)
    before = sorted(tmp_path.rglob("*"))
    data = SETS[name](str(tmp_path), "grey", download=False)
    assert sorted(tmp_path.rglob("*")) == before
    assert data.train.dtype == torch.uint8 and torch.equal(data.train, train[:, None])
    assert torch.equal(data.test, test[:, None].float() / 255)
    assert torch.equal(data.train_labels, train_labels.long())
    assert torch.equal(data.test_labels, test_labels.long())


def test_grey_presents_pixels_over_255(tmp_path):
    train = write_idx(tmp_path)[0]
    data = MNIST(str(tmp_path), "grey")
    assert torch.equal(data.prepare(data.train), train[:, None].float() / 255)
    assert data.natural_likelihood == ("ContinuousBernoulli", {})
    assert data.policy == "MNIST, grey (pixel / 255), 11 train / 5 test"


def test_static_is_drawn_once(tmp_path):
    write_idx(tmp_path)
    data = MNIST(str(tmp_path), "static", seed=2)
    x = data.prepare(data.train)
    assert data.train.dtype == torch.uint8 and set(x.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(x, data.prepare(data.train)) and data.natural_likelihood == ("Bernoulli", {})
    assert not x[:, :, 0].any() and x[:, :, 1].all()
    assert data.policy == ("MNIST, static binarisation (train and test binarised once, seed 2), 11 train / 5 test")


def test_dynamic_is_drawn_at_each_presentation(tmp_path):
    train = write_idx(tmp_path)[0]
    data = MNIST(str(tmp_path), "dynamic", seed=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, two = data.prepare(data.train), data.prepare(data.train)
    assert torch.equal(data.train, train[:, None]) and not torch.equal(one, two)
    assert set(one.unique().tolist()) == {0.0, 1.0}
    assert not one[:, :, 0].any() and one[:, :, 1].all()
    assert data.policy == "MNIST, dynamic binarisation (test binarised once, seed 2), 11 train / 5 test"


def test_dynamic_draws_have_the_grey_mean(tmp_path):
    write_idx(tmp_path)
    data = MNIST(str(tmp_path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = data.prepare(data.train[:1, :, 2:4].expand(4000, 1, 2, W)).double()
    p = data.train[0, :, 2:4].double() / 255
    error = (p * (1 - p) / 4000).sqrt()
    assert ((x.mean(0) - p).abs() <= 4 * error).all()
    assert abs(float((x.mean(0) - p).sum())) <= 4 * float(error.square().sum().sqrt())


def test_dynamic_presentation_is_one_graph_without_host_values(tmp_path):
    write_idx(tmp_path)
    data = MNIST(str(tmp_path)).to("meta")  # a meta tensor has no values: any branch on one raises
    assert data.prepare(data.train).shape == (N, 1, H, W)


def test_static_and_dynamic_score_the_same_bits(tmp_path):
    write_idx(tmp_path)
    static, dynamic = (MNIST(str(tmp_path), policy, seed=9) for policy in ("static", "dynamic"))
    assert torch.equal(static.test, dynamic.test) and set(static.test.unique().tolist()) == {0.0, 1.0}


def no_network(monkeypatch):
    pytest.importorskip("torchvision")

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)


@pytest.mark.parametrize("name", SETS)
def test_missing_files_without_a_network_are_named_in_one_line(tmp_path, monkeypatch, name):
    no_network(monkeypatch)
    with pytest.raises(FileNotFoundError, match=rf"t10k-labels-idx1-ubyte .*in .*{name}.raw, found no ") as error:
        SETS[name](str(tmp_path))
    line = str(error.value)
    assert "Name or service not known" in line and "with a network" in line and "\n" not in line


def test_download_false_does_not_try(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="found no t10k-images-idx3-ubyte: put them there"):
        MNIST(str(tmp_path), download=False)


def test_missing_files_are_downloaded_by_torchvision(tmp_path, monkeypatch):
    write_idx(tmp_path / "elsewhere")

    def arrive(url, download_root, filename, md5):
        plain = filename.removesuffix(".gz")
        Path(download_root, plain).write_bytes((tmp_path / "elsewhere/MNIST/raw" / plain).read_bytes())

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", arrive)
    assert MNIST(str(tmp_path / "here")).train.shape == (N, 1, H, W)


@pytest.mark.parametrize("packed", [(), range(4)], ids=["plain", "gz"])
def test_a_damaged_file_is_refused(tmp_path, packed):
    write_idx(tmp_path, packed=packed)
    file = next((tmp_path / "MNIST/raw").glob("train-images*"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expected (whole idx files|a whole file), found .*: ") as error:
        MNIST(str(tmp_path))
    assert "\n" not in str(error.value)


def test_labels_that_do_not_match_the_images_are_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(N - 1, dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"expected one label an image .* \[11, 28, 28\] and \[10\]"):
        MNIST(str(tmp_path))


def test_a_torchvision_that_does_not_import_is_one_clear_line(tmp_path, monkeypatch):
    class Mismatched:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Mismatched(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"torchvision::nms does not exist\): install both together"):
        MNIST(str(tmp_path))


def test_an_unknown_policy_is_refused(tmp_path):
    line = "expected binarization to be one of grey, static, dynamic, levels, found 'gray': "
    with pytest.raises(ValueError, match=line):
        MNIST(str(tmp_path), "gray")


def test_the_real_mnist():
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("PYRO_VAE_DATA", default))
    if not list(root.glob("MNIST/raw/train-images-idx3-ubyte*")):
        pytest.skip("no MNIST here: set PYRO_VAE_DATA to the folder that holds MNIST/raw")
    data = MNIST(str(root), "grey", download=False)
    assert data.train.shape == (60_000, 1, 28, 28) and data.test.shape == (10_000, 1, 28, 28)
    assert data.train_labels.bincount().sum() == 60_000 and data.test_labels.bincount().tolist()[0] == 980
    between = ((data.test > 0) & (data.test < 1)).double().mean()
    assert abs(float(between) - 0.1855) < 0.00005


# --- folders of images


@pytest.mark.parametrize(("channels", "ending"), [(1, "png"), (3, "png"), (3, "bmp"), (1, "webp"), (3, "JPG")])
def test_a_folder_becomes_bytes_of_one_size(tmp_path, channels, ending):
    for i in range(5):
        picture(tmp_path / f"{i}.{ending}", seed=i)
    data = ImageFolder(str(tmp_path), 4, channels, test_fraction=0.4)
    assert data.train.shape == (3, channels, 4, 4) and data.train.dtype == torch.uint8
    assert len(data.test) == 2 and data.train_labels is None and data.classes == []
    assert data.policy == (f"{tmp_path.name}, {channels}x4x4, grey (pixel / 255), split with seed 0, 3 train / 2 test")


def test_a_picture_is_cropped_at_its_centre_channel_first(tmp_path):
    pixels = np.zeros((4, 10, 3), dtype=np.uint8)
    pixels[:, 3:7] = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    for i in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = ImageFolder(str(tmp_path), 4, 3)
    assert torch.equal(data.train[0], torch.from_numpy(pixels[:, 3:7]).permute(2, 0, 1))


def test_sub_folders_are_labels(tmp_path):
    for name, level in (("b", 200), ("a", 100)):
        for i in range(3):
            file = tmp_path / name / "deeper" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (5, 5), level + i).save(file)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    data = ImageFolder(str(tmp_path), 2, test_fraction=0.3)
    assert data.classes == ["a", "b"]
    assert torch.equal(data.train_labels, (data.train[:, 0, 0, 0] >= 200).long())
    assert torch.equal(data.test_labels, (data.test[:, 0, 0, 0] > 0.7).long())
    levels = torch.cat([data.train[:, 0, 0, 0].float(), data.test[:, 0, 0, 0] * 255]).round()
    assert sorted(levels.tolist()) == [100, 101, 102, 200, 201, 202]


def test_transparent_and_palette_pictures_are_read(tmp_path):
    Image.new("RGBA", (5, 5), (10, 20, 30, 0)).save(tmp_path / "a.png")
    palette = Image.new("P", (5, 5), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "b.png", transparency=b"\x00")
    data = ImageFolder(str(tmp_path), 2, 3)
    assert data.train[0, :, 0, 0].tolist() == [10, 20, 30]
    assert (data.test[0, :, 0, 0] * 255).round().tolist() == [10, 20, 30]


def test_an_unreadable_picture_is_named(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"expected a readable 8-bit image, found .*broken.png .*: repair or"):
        ImageFolder(str(tmp_path))


def test_a_truncated_picture_is_named(tmp_path):
    for i in range(2):
        file = picture(tmp_path / f"{i}.png", (40, 40, 3))
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"expected a readable 8-bit image, found .*1.png"):
        ImageFolder(str(tmp_path))


def test_sixteen_bit_pictures_are_refused(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((5, 5), 40_000, dtype=np.uint16)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"0.png .*expected 8-bit pixels, found mode I"):
        ImageFolder(str(tmp_path))


def test_loose_pictures_beside_sub_folders_are_refused(tmp_path):
    picture(tmp_path / "a" / "0.png")
    picture(tmp_path / "1.png")
    with pytest.raises(ValueError, match="in sub-folders or none, found both"):
        ImageFolder(str(tmp_path))


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected images \(.png .*\), found none below"):
        ImageFolder(str(tmp_path))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder of images, found no folder"):
        ImageFolder(str(tmp_path / "nowhere"))


def test_one_picture_is_not_enough(tmp_path):
    picture(tmp_path / "0.png")
    with pytest.raises(ValueError, match="expected at least 2 examples, found 1"):
        ImageFolder(str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"size": 0}, "expected size to be a whole number of at least 1, found 0"),
        ({"channels": 2}, "expected channels to be one of 1, 3, None, found 2"),
        ({"binarization": "none"}, "expected binarization to be one of grey, static, dynamic, levels, found 'none'"),
    ],
)
def test_image_folder_refuses_arguments(tmp_path, changed, line):
    with pytest.raises(ValueError, match=line):
        ImageFolder(str(tmp_path), **changed)


# --- arrays


def saved(tmp_path, *array, **arrays):
    file = tmp_path / ("a.npy" if array else "a.npz")
    if array:
        np.save(file, array[0])
    else:
        np.savez(file, **arrays)
    return str(file)


@pytest.mark.parametrize(
    ("shape", "event"),
    [((9, 4), (4,)), ((9, 5, 4), (1, 5, 4)), ((9, 2, 5, 4), (2, 5, 4)), ((9, 3, 5, 3), (3, 5, 3))],
)
def test_array_shapes_become_rows(tmp_path, shape, event):
    data = ArrayFile(saved(tmp_path, np.random.default_rng(0).random(shape, dtype=np.float32)))
    assert data.event_shape == event and data.train.dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_bytes_are_moved_first(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 4, channels), dtype=np.uint8)
    data = ArrayFile(saved(tmp_path, pixels), binarization="grey")
    x = torch.cat([data.train.float(), (data.test * 255).round()])
    assert data.event_shape == (channels, 5, 4)
    assert rows_of(x) == rows_of(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())


def test_training_and_test_rows_are_disjoint_and_complete(tmp_path):
    values = np.arange(40.0).reshape(20, 2)
    data = ArrayFile(saved(tmp_path, values), test_fraction=0.25)
    assert len(data.test) == 5
    assert rows_of(torch.cat([data.train, data.test])) == rows_of(torch.from_numpy(values))


@pytest.mark.parametrize(
    ("values", "likelihood"),
    [
        ([[0.0, 1.0], [1.0, 0.0]], "Bernoulli"),
        ([[0.0, 1.0], [0.5, 0.0]], "ContinuousBernoulli"),
        ([[0.0, 1.5], [0.5, 0.0]], "Normal"),
        ([[0.0, -0.5], [0.5, 0.0]], "Normal"),
    ],
)
def test_natural_likelihood_follows_the_values(tmp_path, values, likelihood):
    data = ArrayFile(saved(tmp_path, np.array(values)))
    assert data.natural_likelihood == (likelihood, {}) and "values as they are" in data.policy


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8])
def test_bits_are_kept_small_and_presented_as_they_are(tmp_path, dtype):
    bits = np.eye(7, dtype=dtype)
    data = ArrayFile(saved(tmp_path, bits))
    assert data.train.dtype == torch.uint8 and data.natural_likelihood == ("Bernoulli", {})
    assert rows_of(torch.cat([data.prepare(data.train), data.test])) == rows_of(torch.eye(7))


@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_array_policies_read_bytes_and_grey_floats_alike(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 50), dtype=np.uint8)
    path = saved(tmp_path, pixels if kind == "bytes" else pixels.astype(np.float32) / np.float32(255))
    grey, static, dynamic = (ArrayFile(path, binarization=b) for b in ("grey", "static", "dynamic"))
    x = torch.cat([grey.prepare(grey.train), grey.test])
    assert rows_of(x) == rows_of(torch.from_numpy(pixels).float() / 255)
    assert torch.equal(static.test, dynamic.test) and static.train.dtype == torch.uint8
    assert torch.equal(dynamic.train, grey.train)
    assert set(dynamic.prepare(dynamic.train).unique().tolist()) == {0.0, 1.0}


def test_npz_with_its_own_test_set(tmp_path):
    draw = np.random.default_rng(0)
    x_train, x_test = draw.normal(size=(6, 4)), draw.normal(size=(3, 4))
    path = saved(tmp_path, x_train=x_train, x_test=x_test, y_train=np.arange(6), y_test=np.arange(3)[:, None])
    data = ArrayFile(path)
    assert torch.equal(data.train, torch.tensor(x_train, dtype=torch.float32))
    assert torch.equal(data.test, torch.tensor(x_test, dtype=torch.float32))
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4, 5] and data.test_labels.tolist() == [0, 1, 2]
    assert data.policy == "a.npz, values as they are, test set of the file, 6 train / 3 test"


def test_npz_split_keeps_labels_with_rows(tmp_path):
    data = ArrayFile(saved(tmp_path, x=np.arange(20.0).reshape(10, 2), y=np.arange(10), more=np.zeros(3)))
    assert torch.equal(data.train[:, 0], 2.0 * data.train_labels)
    assert torch.equal(data.test[:, 0], 2.0 * data.test_labels)


def test_npz_with_one_array_needs_no_key(tmp_path):
    assert len(ArrayFile(saved(tmp_path, anything=np.random.default_rng(0).normal(size=(6, 4)))).train) == 5


def test_npz_keys_choose_and_pair(tmp_path):
    a = np.arange(8.0).reshape(4, 2)
    path = saved(tmp_path, train_a=a, test_a=-a[:3], train_l=np.arange(4), test_l=np.arange(3), x=a + 50)
    data = ArrayFile(path, "train_a", "train_l")
    assert torch.equal(data.test, -torch.tensor(a[:3], dtype=torch.float32))
    assert data.test_labels.tolist() == [0, 1, 2]


def test_an_object_array_is_refused(tmp_path):
    file = tmp_path / "objects.npy"
    np.save(file, np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"expected an array file without Python objects, found .*objects.npy"):
        ArrayFile(str(file))


def test_an_object_array_in_an_npz_is_refused_only_where_it_is_wanted(tmp_path):
    path = saved(tmp_path, x=np.zeros((4, 2)), names=np.array([{}], dtype=object))
    assert len(ArrayFile(path).train) == 3
    with pytest.raises(ValueError, match="expected an array file without Python objects, found "):
        ArrayFile(path, "names")


def test_byte_counts_need_a_policy(tmp_path):
    with pytest.raises(ValueError, match=r"found bytes up to 16: choose binarization=grey, static, dynamic or levels"):
        ArrayFile(saved(tmp_path, np.arange(17, dtype=np.uint8)[:, None]))


def test_bits_stored_as_bytes_are_not_read_as_grey(tmp_path):
    with pytest.raises(ValueError, match="found only 0 and 1: choose binarization=none"):
        ArrayFile(saved(tmp_path, np.eye(5, dtype=np.uint8)), binarization="static")


def test_floats_outside_grey_need_no_policy(tmp_path):
    with pytest.raises(ValueError, match=r"expected grey values in \[0, 1\], found 3: rescale"):
        ArrayFile(saved(tmp_path, np.array([[0.5], [3.0]])), binarization="dynamic")


@pytest.mark.parametrize("bad", [np.inf, 1e300])
def test_values_that_float32_cannot_hold_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="expected finite float32 values"):
        ArrayFile(saved(tmp_path, np.array([[0.5], [bad]])))


@pytest.mark.parametrize("dtype", ["int64", "complex64", "U3"])
def test_other_types_are_refused(tmp_path, dtype):
    with pytest.raises(TypeError, match=r"expected uint8, bool or floats in .*, found .*: convert it"):
        ArrayFile(saved(tmp_path, np.ones((3, 2)).astype(dtype)))


@pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 1, 2, 3, 5)])
def test_other_shapes_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"expected rows \[N, E\], .*, found shape \[4"):
        ArrayFile(saved(tmp_path, np.zeros(shape)))


@pytest.mark.parametrize(
    ("arrays", "arguments", "error", "line"),
    [
        ({"a": (4, 2), "b": (4, 2)}, {}, ValueError, "expected x_train, x or one array in .*, found a, b: give"),
        ({"a": (4, 2)}, {"key": "c"}, ValueError, "expected 'c' in .*, found a: "),
        ({"x": (4, 2)}, {"label_key": "c"}, ValueError, "expected 'c' in .*, found x: "),
        ({"x": (4, 2), "y": (4,)}, {}, TypeError, "expected whole-number labels in .*, found float64"),
        ({"x_train": (4, 2), "x_test": (3, 5)}, {}, ValueError, "expected training and test rows of one kind"),
        ({"x_train": (4, 2), "x_test": (0, 2)}, {}, ValueError, "expected training and test rows of one kind"),
        ({"x": (1, 2)}, {}, ValueError, "expected at least 2 examples, found 1"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path, arrays, arguments, error, line):
    path = saved(tmp_path, **{name: np.zeros(shape) for name, shape in arrays.items()})
    with pytest.raises(error, match=line):
        ArrayFile(path, **arguments)


def test_labels_of_another_count_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected 4 labels in .*, found shape \[3\]"):
        ArrayFile(saved(tmp_path, x=np.zeros((4, 2)), y=np.arange(3)))


def test_a_file_that_is_no_array_is_refused(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"text")
    with pytest.raises(ValueError, match="expected an array file without Python objects, found "):
        ArrayFile(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("make", [ArrayFile, Table])
def test_a_file_that_is_not_there_is_refused(tmp_path, make):
    with pytest.raises(FileNotFoundError, match=r"expected a .* file, found no file .*: check path"):
        make(str(tmp_path / "nothing"))


# --- tables


def test_table_is_standardised_by_the_training_rows(tmp_path):
    values = np.random.default_rng(0).normal([3.0, -50.0], [0.1, 20.0], size=(31, 2))
    path = table(tmp_path, "a,b\n" + "\n".join(",".join(map(repr, map(float, row))) for row in values))
    data = Table(path)
    train = data.train.double()
    assert data.columns == ["a", "b"] and data.natural_likelihood == ("HeteroscedasticNormal", {})
    assert data.train.dtype == torch.float32 and len(data.test) == 6
    assert train.mean(0).abs().max() < 1e-6 and (train.std(0, correction=0) - 1).abs().max() < 1e-6
    raw = torch.cat([data.train, data.test]) * data.scale + data.loc
    order = raw[:, 0].argsort()
    assert torch.allclose(raw[order].double(), torch.from_numpy(values[values[:, 0].argsort()]), rtol=1e-5)
    assert "columns standardised by the training mean and standard deviation" in data.policy


def test_table_labels_are_numbered_in_sorted_order(tmp_path):
    lines = [f"{i},{'zebra' if i % 3 else 'ant, big'!r}".replace("'", '"') for i in range(12)]
    data = Table(table(tmp_path, "\ufeffsize,kind\n\n" + "\n".join(lines) + "\n\n"), label="kind")
    assert data.classes == ["ant, big", "zebra"] and data.columns == ["size"]
    for x, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        size = (x[:, 0] * data.scale + data.loc).round().long()
        assert torch.equal(labels, (size % 3 != 0).long())


def test_table_takes_another_delimiter(tmp_path):
    assert Table(table(tmp_path, "a;b\n1;2\n3;4\n5;7\n"), delimiter=";").columns == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a,b\n1,2\n3,x\n", "expected a finite number, found 'x' in .* line 3, column 'b'"),
        ("a,b\n1,NaNa\n3,4\n", "found 'NaNa' in .* line 2, column 'b': correct it, leave it empty where it is missing"),
        ("a,b\n1,\n3,\n5,\n", "expected values in column 'b' of .*, found none: remove the column"),
        ("a,b\n1,x\n2,x\n3,x\n", "expected columns that vary, found column 'b' of .* constant"),
        ("a,b\n" + "".join(f"{i},t{i}\n" for i in range(30)), "found 30 different texts: remove .*kinds={'b': 'categ"),
        ("a,b\n1,2\n-inf,4\n", "found '-inf' in .* line 3, column 'a'"),
        ("a,b\n1,2\n\n3\n", "expected 2 cells, found 1 in .* line 4"),
        ("1,2\n3,4\n5,6\n", "expected a header row of different names in .*, found '1', '2'"),
        ("a,a\n3,4\n5,6\n", "expected a header row of different names in .*, found 'a', 'a'"),
        ("", "expected a header row of different names in .*, found nothing"),
        ("a,b\n1,2\n", "expected at least 2 examples, found 1"),
        ("a,b\n1,2\n1,4\n1,5\n", "found column 'a' of .* constant over the 2 training rows"),
        ("a,b\n1,1e200\n2,2e200\n3,3e200\n", "expected numbers that float32 holds"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, text, line):
    with pytest.raises(ValueError, match=line):
        Table(table(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "label", "line"),
    [
        ("a,b\n1,2\n3,4\n", "c", "expected a column 'c' in .*, found 'a', 'b'"),
        ("a,b\n1,2\n3,\n", "b", "expected a label, found '' in .* line 3, column 'b'"),
        ("b\nx\ny\n", "b", "expected columns beside 'b'"),
    ],
)
def test_a_label_column_that_does_not_fit_is_refused(tmp_path, text, label, line):
    with pytest.raises(ValueError, match=line):
        Table(table(tmp_path, text), label=label)


def test_a_table_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes("a,b\n1,ü\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"expected CSV text in UTF-8, found .*t.csv .*: convert it"):
        Table(str(tmp_path / "t.csv"))


def test_a_delimiter_of_two_characters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a delimiter of one character, found '::'"):
        Table(table(tmp_path, "a::b\n"), delimiter="::")


# --- linear-Gaussian data


@pytest.mark.parametrize(("latent_dim", "data_dim"), [(2, 7), (5, 3)])
def test_log_evidence_is_the_multivariate_normal(latent_dim, data_dim):
    data = LinearGaussianData(latent_dim, data_dim, 20, 10, scale=0.3, seed=1)
    weight = data.weight.double()
    covariance = weight @ weight.T + 0.3**2 * torch.eye(data_dim, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(data.loc.double(), covariance).log_prob(data.test.double())
    value = data.log_evidence(data.test)
    assert value.dtype == torch.float64 and value.shape == (10,)
    assert torch.allclose(value, exact, rtol=0, atol=1e-9)


def test_draws_have_the_mean_and_covariance_of_the_model():
    data = LinearGaussianData(2, 3, 40_000, 1, scale=0.5)
    x, weight, n = data.train.double(), data.weight.double(), 40_000
    covariance = weight @ weight.T + 0.25 * torch.eye(3, dtype=torch.float64)
    variance = covariance.diagonal()
    error = ((variance[:, None] * variance + covariance**2) / n).sqrt()  # of a Gaussian sample covariance
    assert ((x.mean(0) - data.loc).abs() <= 4 * (variance / n).sqrt()).all()
    assert ((x.T.cov() - covariance).abs() <= 4 * error).all()


def test_mean_log_evidence_is_minus_the_entropy():
    data = LinearGaussianData(num_train=2, num_test=4000)
    value, weight = data.log_evidence(data.test), data.weight.double()
    covariance = weight @ weight.T + data.scale**2 * torch.eye(7, dtype=torch.float64)
    entropy = torch.distributions.MultivariateNormal(data.loc.double(), covariance).entropy()
    assert abs(float(value.mean() + entropy)) <= 4 * float(value.std()) / math.sqrt(4000)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"latent_dim": 0}, "expected latent_dim to be a whole number of at least 1, found 0"),
        ({"num_train": 1}, "expected num_train to be a whole number of at least 2, found 1"),
        ({"scale": 0.0}, "expected a positive scale, found 0.0"),
        ({"scale": math.nan}, "expected a positive scale, found nan"),
    ],
)
def test_linear_gaussian_data_refuses_arguments(changed, line):
    with pytest.raises(ValueError, match=line):
        LinearGaussianData(**changed)


def test_log_evidence_refuses_another_width():
    with pytest.raises(ValueError, match=r"expected x of shape \[B, 7\], found \[5, 3\]"):
        LinearGaussianData().log_evidence(torch.zeros(5, 3))


# --- levels, colour, gaps


@pytest.mark.parametrize("name", SETS)
def test_levels_are_the_bytes_themselves(tmp_path, name):
    train, _, test, _ = write_idx(tmp_path, name)
    data = SETS[name](str(tmp_path), "levels")
    assert data.train.dtype == torch.uint8 and data.test.dtype == torch.float32
    assert torch.equal(data.prepare(data.train), train[:, None].float()) and torch.equal(
        data.test, test[:, None].float()
    )
    assert data.natural_likelihood == ("pixels.DiscretizedLogistic", {})
    assert data.policy == f"{name}, levels 0..255 (bytes as they are), 11 train / 5 test"


def test_levels_of_arrays_and_folders(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 4, 3), dtype=np.uint8)
    data = ArrayFile(saved(tmp_path, pixels), binarization="levels")
    x = torch.cat([data.prepare(data.train), data.test])
    assert rows_of(x) == rows_of(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())
    with pytest.raises(ValueError, match=r"expected bytes 0..255 \(uint8\) in .*, found torch.float32"):
        ArrayFile(saved(tmp_path, np.random.default_rng(0).random((9, 4))), binarization="levels")
    for i in range(4):
        picture(tmp_path / "p" / f"{i}.png", seed=i)
    assert ImageFolder(str(tmp_path / "p"), 4, binarization="levels").test.max() > 1


def test_colour_is_seen_and_grey_stays_one_channel(tmp_path):
    for i in range(3):
        picture(tmp_path / "grey" / f"{i}.png", (9, 6), seed=i)
        shade = np.random.default_rng(i).integers(0, 256, (9, 6, 1), dtype=np.uint8)
        Image.fromarray(shade.repeat(3, 2)).save(tmp_path / "grey" / f"rgb{i}.png")  # grey, stored as RGB
    assert ImageFolder(str(tmp_path / "grey"), 4).event_shape == (1, 4, 4)
    one = ImageFolder(str(tmp_path / "grey"), 4, channels=1)
    assert torch.equal(one.train, ImageFolder(str(tmp_path / "grey"), 4).train)
    picture(tmp_path / "grey" / "colour.png", seed=9)
    mixed = ImageFolder(str(tmp_path / "grey"), 4)
    assert mixed.event_shape == (3, 4, 4) and "3x4x4" in mixed.policy
    assert ImageFolder(str(tmp_path / "grey"), 4, channels=1).event_shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("values", "inside"), [([0.0, 1.0], "Bernoulli"), ([0.2, 0.9], "ContinuousBernoulli"), ([-3.0, 2.0], "Normal")]
)
def test_nan_in_an_array_is_missing(tmp_path, values, inside):
    rows = np.array([[values[0], np.nan], [values[1], values[0]], [np.nan, values[1]]])
    data = ArrayFile(saved(tmp_path, rows))
    assert data.natural_likelihood == ("Masked", {"likelihood": (inside, {})})
    assert "2 of 6 values missing (NaN)" in data.policy
    with pytest.raises(ValueError, match=r"expected grey values in \[0, 1\], found (nan|-3)"):
        ArrayFile(saved(tmp_path, rows), binarization="grey")
    with pytest.raises(ValueError, match=r"expected numbers in .*, found only NaN"):
        ArrayFile(saved(tmp_path, np.full((3, 2), np.nan)))
