"""Several processes train as one: the same gradients, each example once, the noise apart, an end that can go on.

This file is also the program of the processes: ``python test_parallel.py FOLDER PORT`` runs :func:`equal` and
:func:`random` in each, and each writes what it found to RANK.safetensors. Then they wait for the file FOLDER/go, and
train from the command line without end: one is killed. (A process takes long to start, so there are only two.)
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pyro_vae import ELBO, VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, OverBatch, StandardNormal, fit, parallel
from pyro_vae.cli import main
from pyro_vae.parallel import Workers, join

E, D, N = 7, 2, 49  # 49 = 3 * 16 + 1: the last batch has one example, and one of two workers none


class GivenNormal(dist.Normal):
    """A normal whose standard normal noise is given, so that it does not depend on who computes."""

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise

    def expand(self, batch_shape, _instance=None):
        wide = GivenNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape))
        wide.noise = self.noise
        return wide


class GivenNoise(nn.Module):
    """A VAE whose noise travels with the examples: the last D columns of x."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Mlp(E, 5, 2 * D), Mlp(D, 5, E)

    def model(self, x):
        pyro.module("given", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x[:, :E])

    def guide(self, x):
        pyro.module("given", self)
        loc, log_scale = self.encoder(x[:, :E]).chunk(2, -1)
        q = GivenNormal(loc, log_scale.exp())
        q.noise = x[:, E:]
        with pyro.plate("data", len(x)):
            pyro.sample("z", q.to_event(1))


def make_x(seed=3):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(N, E, generator=generator, dtype=torch.float64) < 0.4
    return torch.cat([bits, torch.randn(N, D, generator=generator, dtype=torch.float64)], 1)


def make_vae(seed=5, batch_norm=False):
    torch.manual_seed(seed)
    net = nn.Sequential(Mlp(D, E), nn.BatchNorm1d(E)) if batch_norm else Mlp(D, E)
    return VAE(StandardNormal(D), Decoder(OverBatch(net, event_dim=1), Bernoulli()), DiagonalNormal(Mlp(E, 5, 2 * D)))


def state_of(vae, prefix=""):
    return {prefix + name: value.detach().clone() for name, value in vae.state_dict().items()}


WAYS = {"eager": False, "captured": "replay"}
if os.environ.get("PYRO_VAE_BACKEND") == "inductor":  # minutes of compilation
    WAYS["compiled"] = True


def gradient_step(workers, compiled=False):
    """All examples in one batch and plain gradient descent at rate 1: what is subtracted is the gradient."""
    torch.manual_seed(5)
    vae = GivenNoise()
    settings = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "workers": workers, "compiled": compiled}
    fit(vae, make_x(), epochs=1, batch_size=N, **settings)
    return vae


def adam_epoch(workers, compiled=False):
    torch.manual_seed(5 + workers.rank)  # other first weights on each worker: the first one's count
    vae = GivenNoise()
    torch.manual_seed(6)
    history = fit(vae, make_x(), epochs=1, batch_size=16, lr=0.01, workers=workers, compiled=compiled)
    return vae, history


# ------------------------------------------------------------------------------------------------- the processes


def equal(workers):
    """Gradients and an epoch, with each way to step."""
    found = {}
    for way, compiled in WAYS.items():
        vae, history = adam_epoch(workers, compiled)
        found |= state_of(vae, f"{way}.epoch.") | state_of(gradient_step(workers, compiled), f"{way}.step.")
        found[f"{way}.history"] = torch.tensor([history[name][0] for name in ("objective", "elbo", "log_px", "kl")])
    total = workers.sum_(torch.tensor([1.0, workers.rank]))
    return found | {"total": total, "received": torch.tensor(workers.from_first(lambda: [workers.rank, 0.1]))}


def random(workers, folder):
    """Which examples were seen with which noise; stopped and resumed."""
    seen, noise = [], []

    def prepare(rows):
        if torch.is_grad_enabled():
            seen.extend(rows[:, 0].tolist())
            noise.append(torch.rand(3))
        return (torch.rand(len(rows), E) < 0.4).double()

    x = torch.arange(N)[:, None].expand(N, E).double()
    x_valid = (torch.rand(11, E) < 0.5).double()
    settings = {"batch_size": 14, "prepare": prepare, "x_valid": x_valid, "workers": workers}
    vae = make_vae(batch_norm=True)
    straight = fit(vae, x, epochs=3, **settings)
    found = {"seen": torch.tensor(seen), "noise": torch.stack(noise)} | state_of(vae, "straight.")

    vae = make_vae(batch_norm=True)
    mine = folder / str(workers.rank)
    told = []
    fit(vae, x, epochs=2, folder=mine, on_epoch=told.append, **settings)
    vae = make_vae(seed=99 + workers.rank, batch_norm=True)
    resumed = fit(vae, x, epochs=3, folder=mine, resume=True, **settings)
    found |= state_of(vae, "resumed.") | {"told": torch.tensor(len(told))}
    assert [{**row, "seconds": 0} for row in straight.rows] == [{**row, "seconds": 0} for row in resumed.rows]
    (folder / f"history{workers.rank}.json").write_text(json.dumps([{**row, "seconds": 0} for row in straight.rows]))
    return found


TRAIN = ["train", "--out", "run", "--epochs", "9999", "--batch_size", "512", "--device", "cpu", "--figures", "false"]
TRAIN += ["--eval_particles", "3"]


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for(files, processes):
    """Until all files are there; a process that ends before that says why."""
    patience = time.monotonic() + 600  # of a machine that has much else to do
    while not all(file.exists() for file in files):
        ended = [process for process in processes if process.poll() not in (None, 0)]
        assert not ended, ended[0].communicate(timeout=60)[1][-3000:]
        assert time.monotonic() < patience, f"none of {files} after 10 minutes"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The folder of two processes that have computed and now wait, and the processes."""
    folder = tmp_path_factory.mktemp("workers")
    port, other_port = free_ports(2)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, __file__, str(folder), other_port]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environments = [{**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [subprocess.Popen(words, env=environment, cwd=folder, **pipes) for environment in environments]
    try:
        wait_for([folder / f"{rank}.safetensors" for rank in range(2)], processes)
        yield folder, processes
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def launched(running):
    """The folder of two processes, and what each found."""
    folder, _ = running
    return folder, [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


# ------------------------------------------------------------------------------------------------- equal to one


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_unequal_parts_is_that_of_the_whole_batch(launched, float64, way):
    torch.manual_seed(5)
    vae = GivenNoise()
    with pyro.get_param_store().scope():
        ELBO().loss_and_grads(vae.model, vae.guide, make_x())
    for found in launched[1]:
        for name, p in vae.named_parameters():
            torch.testing.assert_close(p.detach() - found[f"{way}.step.{name}"], p.grad, rtol=1e-10, atol=1e-10)
            assert p.grad.abs().max() > 1e-2


@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_of_two_workers_is_an_epoch_of_one(launched, float64, way):
    vae, history = adam_epoch(Workers())
    for found in launched[1]:
        for name, p in vae.named_parameters():
            torch.testing.assert_close(found[f"{way}.epoch.{name}"], p.detach(), rtol=0, atol=1e-6)
            assert torch.equal(found[f"{way}.epoch.{name}"], launched[1][0][f"{way}.epoch.{name}"])
        one = [history[name][0] for name in ("objective", "elbo", "log_px", "kl")]
        assert found[f"{way}.history"].tolist() == pytest.approx(one, abs=1e-6)
        assert found["total"].tolist() == [2.0, 1.0]
        assert found["received"].tolist() == [0.0, 0.1]


# ------------------------------------------------------------------------------------------------- random numbers


def test_each_epoch_sees_each_example_once(launched):
    _, (first, second) = launched
    half = len(first["seen"]) // 3, len(second["seen"]) // 3
    assert half == (25, 24)  # of 49 in batches of 14, 14, 14 and 7
    for epoch in range(3):
        parts = [f["seen"][epoch * n : (epoch + 1) * n] for f, n in zip((first, second), half, strict=True)]
        assert sorted(torch.cat(parts).tolist()) == list(range(N))
    assert first["seen"][:25].tolist() != first["seen"][25:50].tolist()  # another order


def test_the_noise_of_workers_and_epochs_differs(launched):
    _, (first, second) = launched
    draws = torch.cat([first["noise"], second["noise"]])
    assert len(draws) == 24 and len(draws.unique(dim=0)) == 24


def test_stopped_and_resumed_is_bit_for_bit_the_same(launched):
    _, found = launched
    names = [name.removeprefix("straight.") for name in found[0] if name.startswith("straight.")]
    assert any("running_mean" in name for name in names)
    for name in names:
        assert torch.equal(found[0][f"straight.{name}"], found[0][f"resumed.{name}"]), name
        if "running" not in name:  # each worker's own until the next epoch begins
            assert torch.equal(found[0][f"straight.{name}"], found[1][f"straight.{name}"]), name


def test_only_the_first_worker_writes_and_calls_back_but_all_know_the_history(launched):
    folder, found = launched
    assert (folder / "0" / "state" / "latest.safetensors").exists() and not (folder / "1").exists()
    assert [f["told"].item() for f in found] == [2, 0]
    first, second = (json.loads((folder / f"history{rank}.json").read_text()) for rank in range(2))
    assert first == second and "valid_elbo" in first[0] and len(first) == 3


def test_a_run_goes_on_with_another_number_of_workers(launched, float64):
    folder, _ = launched
    vae = make_vae(batch_norm=True)
    x = torch.arange(N)[:, None].expand(N, E).double()
    prepare = lambda rows: (torch.rand(len(rows), E) < 0.4).double()  # noqa: E731
    x_valid = (torch.rand(11, E) < 0.5).double()
    settings = {"batch_size": 14, "prepare": prepare, "x_valid": x_valid}
    history = fit(vae, x, epochs=4, folder=folder / "0", resume=True, **settings)
    assert history["epoch"] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------- ends


def test_a_killed_worker_ends_the_others_in_plain_words_and_the_run_can_go_on(running, monkeypatch, capsys):
    folder, processes = running
    monkeypatch.chdir(folder)
    (folder / "go").touch()
    metrics = folder / "run" / "metrics.jsonl"
    wait_for([metrics], processes)
    processes[1].kill()
    (out, err), (other_out, other_err) = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [130, -signal.SIGKILL]
    assert "; go on with: torchrun --nproc-per-node=2 -m pyro_vae resume run" in err
    assert "pyro-vae: process 0 of 2 stopped, since another one has ended" in err and err.count("pyro-vae:") == 1
    assert "Traceback" not in err + other_err
    assert "each batch shared by 2 processes" in out and "epoch    1/9999" in out and other_out == ""
    rows = metrics.read_text().splitlines()
    main(["resume", "run", "--epochs", str(len(rows) + 1), "--device", "cpu"])
    assert f"epoch {len(rows) + 1}/" in capsys.readouterr().out
    assert not list((folder / "run").rglob(".*"))


# ------------------------------------------------------------------------------------------------- alone, and refusals


def test_torchrun_ends_a_process_as_the_keyboard_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), parallel._interrupted_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_process_is_left_as_it_is(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join("cpu") as workers:
        assert (workers.rank, workers.size, workers.is_first) == (0, 1, True)
    parameter = nn.Parameter(torch.ones(3))
    workers.sum_gradients_([parameter])
    assert parameter.grad is None  # not zeros: the optimiser leaves it alone
    torch.manual_seed(1)
    order = workers.shuffle(5, torch.device("cpu"))
    torch.manual_seed(1)
    assert torch.equal(order, torch.randperm(5))
    assert workers.from_first(lambda: {"a": 1}) == {"a": 1}


@pytest.mark.parametrize("count", [1, 5, 12])
def test_parts_make_up_the_batch(count):
    index = torch.randperm(count)
    parts = [Workers(rank, 3).part(index) for rank in range(3)]
    assert torch.equal(torch.cat(parts), index)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match=r"expected a rank from 0 to 1, found 2"):
        Workers(2, 2)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    told = pytest.raises(
        ValueError, match=r"expected also RANK, LOCAL_RANK, MASTER_ADDR, found none: start with torchrun"
    )
    with told, join("cpu"):
        pass
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"expected at most 1 processes on this machine.*LOCAL_RANK=1"), join("cuda"):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    place = Path(sys.argv[1])
    with parallel.join("cpu") as us:
        results = equal(us) | random(us, place)
    part = place / f"{us.rank}.part"
    save_file({name: value.contiguous() for name, value in results.items()}, part)
    part.rename(place / f"{us.rank}.safetensors")
    torch.set_default_dtype(torch.float32)
    while not (place / "go").exists():
        time.sleep(0.05)
    os.environ["MASTER_PORT"] = sys.argv[2]  # the first port may still be held
    main(TRAIN)
