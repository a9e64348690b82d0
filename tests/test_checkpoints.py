"""Files appear whole or not at all; nothing is unpickled; what does not fit is refused and changes nothing."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, OverBatch, StandardNormal, VampPrior, fit
from pyro_vae.checkpoints import alone_in, load_model, remove_leftovers, save_model, write_atomically


def make_vae(hidden=5, vamp=False):
    encoder = DiagonalNormal(Mlp(7, hidden, 4))
    prior = VampPrior(encoder, torch.rand(3, 7)) if vamp else StandardNormal(2)
    net = OverBatch(torch.nn.Sequential(Mlp(2, 7), torch.nn.BatchNorm1d(7)), event_dim=1)
    return VAE(prior, Decoder(net, Bernoulli()), encoder)


def tensors(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


@pytest.mark.parametrize("vamp", [False, True])
def test_a_model_comes_back_with_its_buffers_and_shared_parameters(tmp_path, vamp):
    vae, other = make_vae(vamp=vamp), make_vae(vamp=vamp)
    vae.decoder.net.net[1].running_mean.fill_(3.0)
    save_model(tmp_path / "m.safetensors", vae)
    load_model(tmp_path / "m.safetensors", other)
    for name, value in tensors(vae).items():
        assert torch.equal(value, other.state_dict()[name]), name
    if vamp:
        assert other.prior.encoder is other.encoder
        with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
            assert sum("encoder" in name and "net.0.weight" in name for name in file.keys()) == 1  # noqa: SIM118


def test_a_model_that_does_not_fit_is_refused_and_unchanged(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, make_vae(5))
    other = make_vae(6)
    before = tensors(other)
    with pytest.raises(ValueError, match=r"has encoder.net.0.bias of shape \(5,\), expected \(6,\)"):
        load_model(path, other)
    with pytest.raises(ValueError, match=r"does not fit this model \(missing \['prior.encoder"):
        load_model(path, make_vae(vamp=True))
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_damaged_and_missing_files(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"expected a file .*m.safetensors, found none"):
        load_model(path, make_vae())
    save_model(path, make_vae())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_model(path, make_vae())
    torch.save({"a": 1}, path)  # a pickle
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_model(path, make_vae())


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "file.txt"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_names_the_file_that_was_wanted(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "model.safetensors", "new")
    assert caught.value.filename == str(tmp_path / "model.safetensors") and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(dir, prefix):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{dir}/{prefix}ab12cd34")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "x.csv", "new")
    assert caught.value.filename == str(tmp_path / "x.csv")


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "run"
    with alone_in(folder):
        with (
            pytest.raises(ValueError, match=r"expected no other process that trains in .*run, found one: wait"),
            alone_in(folder),
        ):
            pass
        with alone_in(tmp_path / "another"):
            pass
    with alone_in(folder):
        assert not list(folder.iterdir())


def test_new_files_have_the_usual_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        write_atomically(tmp_path / "f", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644


KILLED = """
import sys, torch
from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal, fit
torch.set_num_threads(1)
torch.manual_seed(0)
vae = VAE(StandardNormal(2), Decoder(Mlp(2, 5, 7), Bernoulli()), DiagonalNormal(Mlp(7, 5, 4)))
x = (torch.rand(40, 7) < 0.3).float()
resume, folder, epochs = sys.argv[1] == "resume", sys.argv[2], int(sys.argv[3])
told = lambda row: print(row["epoch"], flush=True)
fit(vae, x, epochs=epochs, batch_size=8, folder=folder, resume=resume, on_epoch=told)
"""


def run(*arguments, kill_after=None):
    process = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    with process:
        for line in process.stdout:
            if kill_after is not None and int(line) >= kill_after:
                process.kill()
                break
    return process.returncode


def test_a_killed_process_resumes_bit_for_bit(tmp_path):
    assert run("train", tmp_path / "straight", 40) == 0
    assert run("train", tmp_path / "killed", 4000, kill_after=7) != 0  # SIGKILL, wherever it happens to be
    rows = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert 6 <= len(rows) < 40
    assert run("resume", tmp_path / "killed", 40) == 0
    first, second = (
        {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        for f in (safe_open(tmp_path / p / "model.safetensors", "pt") for p in ("straight", "killed"))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    leftovers = [p.name for p in (tmp_path / "killed").rglob(".*")]
    assert len(leftovers) <= 1  # at most the file that was being written when the process died


def test_nothing_in_the_package_unpickles():
    from pathlib import Path

    import pyro_vae

    for source in Path(pyro_vae.__file__).parent.glob("*.py"):
        text = source.read_text(encoding="utf-8")
        assert "torch.load(" not in text and "pickle.load" not in text and "allow_pickle=True" not in text, source.name


def test_metrics_are_strict_json(tmp_path):

    vae = make_vae()
    fit(vae, (torch.rand(20, 7) < 0.5).float(), epochs=2, folder=tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_only_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / "state").mkdir()
    write_atomically(tmp_path / "model.safetensors", "kept")
    (tmp_path / ".kept").write_text("kept")
    (tmp_path / "state" / ".latest.safetensors-ab12cd34").write_text("half")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".kept", "model.safetensors"]
