"""A data set in its file is the data set that was loaded, as far as anybody can tell."""

import numpy as np
import pytest
import torch

from pyro_vae import files
from pyro_vae.cli import main
from pyro_vae.mapped import MappedArray

N, E = 53, 7


def save(path, *shape, dtype=np.uint8, top=256, seed=0):
    array = np.random.default_rng(seed).integers(0, top, (N, *shape)).astype(dtype)
    np.save(path, array)
    return array


@pytest.mark.parametrize("binarization", ["grey", "dynamic", "levels"])
def test_policies_are_those_of_a_loaded_array(tmp_path, binarization):
    array = save(tmp_path / "x.npy", 1, 6, 5)
    np.savez(tmp_path / "x.npz", x_train=array[:-11], x_test=array[-11:])
    mapped = MappedArray(str(tmp_path / "x.npy"), num_test=11, binarization=binarization, seed=3)
    loaded = files.ArrayFile(str(tmp_path / "x.npz"), binarization=binarization, seed=3)
    assert torch.equal(mapped.train, loaded.train) and mapped.train.dtype == torch.uint8
    assert torch.equal(mapped.test, loaded.test)
    assert mapped.natural_likelihood == loaded.natural_likelihood
    torch.manual_seed(1)
    x = mapped.prepare(mapped.train[:5])
    torch.manual_seed(1)
    assert torch.equal(x, loaded.prepare(loaded.train[:5]))
    assert mapped.policy.endswith("the last 11 rows held out, 42 train / 11 test")


@pytest.mark.parametrize(
    ("top", "dtype", "scale", "likelihood"),
    [
        (2, np.uint8, 1, "Bernoulli"),
        (2, np.float32, 1, "Bernoulli"),
        (9, np.float32, 8, "ContinuousBernoulli"),
        (9, np.float32, 1, "Normal"),
    ],
)
def test_values_as_they_are(tmp_path, top, dtype, scale, likelihood):
    array = (save(tmp_path / "x.npy", E, top=top, dtype=dtype) / scale).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    mapped = MappedArray(str(tmp_path / "x.npy"), num_test=11)
    assert mapped.natural_likelihood == (likelihood, {})
    assert np.array_equal(mapped.train.numpy(), array[:-11]) and np.array_equal(mapped.test.numpy(), array[-11:])


@pytest.mark.parametrize(("shape", "event"), [((6, 5), (1, 6, 5)), ((6, 5, 3), (3, 6, 5)), ((3, 6, 5), (3, 6, 5))])
def test_images_come_channel_first(tmp_path, shape, event):
    array = save(tmp_path / "x.npy", *shape)
    mapped = MappedArray(str(tmp_path / "x.npy"), num_test=11, binarization="levels")
    assert tuple(mapped.event_shape) == event and mapped.train.shape[1:] == event
    wide = np.moveaxis(array, 3, 1) if shape[-1] == 3 else array.reshape(N, *event)
    assert np.array_equal(mapped.train[[4, 2]].numpy(), wide[[4, 2]])


def test_the_file_stays_a_file(tmp_path):
    save(tmp_path / "x.npy", E)
    mapped = MappedArray(str(tmp_path / "x.npy"), num_test=11, binarization="grey")
    before = mapped.train[0].clone()
    with open(tmp_path / "x.npy", "r+b") as file:  # what is in memory would not see this
        file.seek(-N * E, 2)
        file.write(bytes((before + 1).tolist()))
    assert torch.equal(mapped.train[0], before + 1)


def test_refusals(tmp_path):
    path = str(tmp_path / "x.npy")
    for change, message in (
        (lambda: save(path, E, dtype=np.float64), r"expected uint8 or float32 in .*found torch.float64"),
        (lambda: save(path), r"expected rows \[N, E\].*found shape \[53\]: reshape"),
        (lambda: save(path, E), r"expected floats or bits in .*found bytes up to 255: choose binarization=grey"),
        (lambda: np.save(path, np.full((N, E), np.nan, np.float32)), r"expected finite values in .*found nan to nan"),
        (
            lambda: np.save(path, np.ones((11, E), np.uint8)),
            r"expected more than 11 rows in .*found 11: lower num_test",
        ),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            MappedArray(path, num_test=11)
    save(path, E, top=2)
    with pytest.raises(ValueError, match=r"expected grey values in .*found torch.uint8 from 0 to 1: choose"):
        MappedArray(path, num_test=11, binarization="grey")
    with pytest.raises(ValueError, match="expected binarization to be one of none, grey, dynamic, levels"):
        MappedArray(path, num_test=11, binarization="static")


def test_the_command_line_trains_on_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("x.npy", 1, 6, 5)
    words = ["--epochs", "1", "--eval_particles", "3", "--figures", "false", "--device", "cpu", "--resident", "false"]
    data = ["--data", "MappedArray", "--data.path", "x.npy", "--data.num_test", "11", "--data.binarization", "dynamic"]
    main(["train", *words, *data, "--out", "run"])
    out = capsys.readouterr().out
    assert "the last 11 rows held out, 42 train / 11 test" in out and "read ahead in batches, as asked" in out
