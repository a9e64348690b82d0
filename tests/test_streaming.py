"""Rows that are read in batches give the numbers of rows that lie on the device."""

import copy
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal, datasets, fit, streaming
from pyro_vae.cli import main
from pyro_vae.streaming import Rows, free_memory, memory_mapped, place

E, D, N = 7, 2, 53
CPU = torch.device("cpu")


def make_vae():
    torch.manual_seed(5)
    return VAE(StandardNormal(D), Decoder(Mlp(D, 5, E), Bernoulli()), DiagonalNormal(Mlp(E, 5, 2 * D)))


def make_bytes(num=N):
    return torch.randint(256, (num, E), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def train(x, **settings):
    vae = make_vae()
    torch.manual_seed(7)
    prepare = lambda rows: datasets.binarize(rows)  # noqa: E731  # random: the stream of numbers must be the same
    history = fit(vae, x, epochs=3, batch_size=16, prepare=prepare, **settings)
    return vae, [{**row, "seconds": 0} for row in history.rows]


# ------------------------------------------------------------------------------------------------- equal


@pytest.mark.parametrize("in_file", [False, True], ids=["memory", "file"])
def test_streamed_training_is_resident_training_bit_for_bit(tmp_path, in_file):
    x = make_bytes()
    if in_file:
        np.save(tmp_path / "x.npy", x.numpy())
    streamed = memory_mapped(tmp_path / "x.npy") if in_file else x
    vae, rows = train(x)
    other, other_rows = train(streamed, resident=False)
    assert rows == other_rows
    for (name, p), q in zip(vae.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name


def test_a_streamed_run_resumes_as_a_resident_one(tmp_path):
    x = make_bytes()
    vae, _ = train(x)
    twin = make_vae()
    torch.manual_seed(7)
    settings = {"batch_size": 16, "prepare": datasets.binarize, "folder": tmp_path}
    fit(twin, x, epochs=2, resident=False, **settings)
    other = make_vae()
    fit(other, x, epochs=3, resume=True, **settings)
    assert all(torch.equal(p, q) for p, q in zip(vae.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("size", [1, 16, N])
def test_batches_come_whole_and_in_order(size):
    x = make_bytes()
    indices = list(torch.randperm(N).split(size))
    rows = place(x, CPU, resident=False)
    assert rows.streamed and not place(x, CPU).streamed
    for kept in (rows, place(x, CPU)):
        batches = list(kept.read(indices))
        assert [len(batch) for batch in batches] == [len(index) for index in indices]
        assert torch.equal(torch.cat(batches), x[torch.cat(indices)])
        assert torch.equal(torch.cat(list(kept.blocks(10))), x) and torch.equal(kept.first(5), x[:5])
    assert [len(batch) for batch in rows.read([indices[0], indices[0][:0]])] == [len(indices[0]), 0]  # an idle worker


def test_the_next_batch_is_read_while_the_present_one_is_used():
    read = threading.Event()

    class Watched(torch.Tensor):
        def __getitem__(self, index):
            if index[0] == 1:
                read.set()
            return super().__getitem__(index)

    rows = Rows(make_bytes().as_subclass(Watched), CPU, True, "")
    batches = rows.read([torch.tensor([0]), torch.tensor([1])])
    next(batches)
    assert read.wait(timeout=10)  # nobody has asked for it yet
    batches.close()


def test_leaving_the_loop_early_ends_the_reader():
    before = threading.active_count()
    for _ in place(make_bytes(), CPU, resident=False).read(list(torch.randperm(N).split(8))):
        break
    assert threading.active_count() == before


# ------------------------------------------------------------------------------------------------- page-locked buffers


class FakeGpu:
    """What the calls for a GPU do, on a CPU, as late as they may: a copy runs only when the host waits for its event.

    ``log`` has the calls in their order. What the real ones would do to real streams is not tested here.
    """

    def __init__(self, monkeypatch):
        self.log, self.waiting = [], {}
        self.started = None
        gpu, empty = self, torch.empty

        class Stream:
            def __init__(self, device):
                self.device = CPU

            def wait_event(self, event):
                gpu.log.append("device waits")

        class Event:
            def record(self, stream):
                gpu.log.append("copy")
                gpu.waiting[self] = gpu.started

            def synchronize(self):
                gpu.log.append("host waits")
                gpu.run(self)

        def make(*args, pin_memory=False, **options):
            self.log += ["page-locked"] * pin_memory
            return empty(*args, **options).fill_(0)

        def copy(there, rows, non_blocking=False):
            assert non_blocking
            self.started = there, rows

        computing = Stream(CPU)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda there, on: self.log.append(on is computing))
        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        monkeypatch.setattr(torch, "empty", make)

    def run(self, event):
        if event in self.waiting:
            there, rows = self.waiting.pop(event)
            there.data = rows.clone()


def test_two_page_locked_buffers_take_turns(monkeypatch):
    x = make_bytes()
    indices = list(torch.randperm(N).split(8))
    assert len(indices) == 7
    gpu = FakeGpu(monkeypatch)
    batches = list(Rows(x, torch.device("cuda"), True, "").read(indices))
    for event in list(gpu.waiting):
        gpu.run(event)
    # Filling a buffer before its copy has left it, or copying before it is filled, would give other rows.
    assert torch.equal(torch.cat(batches), x[torch.cat(indices)])
    send = ["copy", "device waits", True]
    assert gpu.log == ["page-locked"] * 2 + [*send, "host waits"] * 6 + send


# ------------------------------------------------------------------------------------------------- the switch


def test_the_switch_is_by_size_against_free_memory(monkeypatch):
    x = make_bytes()
    assert x.nbytes == 371
    monkeypatch.setattr(streaming, "free_memory", lambda device: 371.0)
    assert not place(x, CPU).streamed  # on a processor nothing is copied
    gpu = torch.device("meta")  # any other device
    assert place(x, gpu) == Rows(
        x, gpu, True, "371 bytes read ahead in batches, too large for 371 bytes of free memory on meta"
    )
    monkeypatch.setattr(streaming, "free_memory", lambda device: 742.0)
    placed = place(x, gpu)
    assert not placed.streamed and placed.x.device.type == "meta"
    assert place(x, gpu, resident=False).streamed and place(x, gpu, resident=False).note.endswith("as asked")
    monkeypatch.setattr(streaming, "free_memory", lambda device: 370.0)
    assert place(x, CPU).streamed and place(x, CPU, resident=True).streamed is False
    assert place(x, gpu, resident=True).x.device.type == "meta"
    assert not place(x.to("meta"), gpu).streamed
    with pytest.raises(ValueError, match=r"expected x on the CPU or on meta, .* found it on meta: use x.cpu\(\)"):
        place(x.to("meta"), gpu, resident=False)


def test_the_switch_is_said(monkeypatch):
    told = []
    monkeypatch.setattr(streaming, "free_memory", lambda device: 0.0)
    train(make_bytes(), note=told.append)
    words = "streaming  371 bytes read ahead in batches, too large for 0 bytes of free memory on cpu"
    assert told[0] == words
    monkeypatch.undo()
    train(make_bytes(), note=told.append)
    assert sum("streaming" in line for line in told) == 1


def test_free_memory_is_a_number_of_bytes():
    assert free_memory(CPU) > 2**20
    assert free_memory(torch.device("meta")) == float("inf")


def test_data_on_the_cpu_is_checked_for_its_values_all_the_same():
    x = torch.ones(N, E)
    x[-1, -1] = 0.5
    with pytest.raises(ValueError, match=r"x has values outside \{0, 1\} \(found 0.5\)"):
        fit(copy.deepcopy(make_vae()), x, resident=False)


def test_the_command_line_takes_the_switch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--epochs", "1", "--batch_size", "512", "--eval_particles", "3", "--figures", "false", "--device", "cpu"]
    main(["train", *words, "--resident", "false", "--out", "a"])
    assert "read ahead in batches, as asked" in capsys.readouterr().out
    main(["train", *words, "--out", "b"])
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert "resident: false" in (tmp_path / "a" / "config.yaml").read_text()


# ------------------------------------------------------------------------------------------------- files


def test_a_mapped_file_is_read_where_it_is_indexed_and_never_written(tmp_path):
    array = np.arange(35, dtype=np.float32).reshape(5, 7)
    np.save(tmp_path / "x.npy", array)
    x = memory_mapped(tmp_path / "x.npy")
    assert torch.equal(x, torch.from_numpy(array)) and x.dtype == torch.float32
    x.zero_()
    assert np.array_equal(np.load(tmp_path / "x.npy"), array)


def test_files_that_are_no_arrays_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a .npy file .*none.npy, found none: check the path"):
        memory_mapped(tmp_path / "none.npy")
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "x.npz", x=np.ones(3))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    for name in ("text.npy", "x.npz", "words.npy"):
        with pytest.raises(ValueError, match=rf"expected a .npy file of numbers, found .*{name}.*numpy.save"):
            memory_mapped(tmp_path / name)
