"""fit: the same step as pyro.infer.SVI, the closed-form optimum, the state that it leaves and the state it finds."""

import copy

import pyro
import pyro.infer
import pyro.optim
import pytest
import torch

from pyro_vae import (
    ELBO,
    IWAE,
    VAE,
    Bernoulli,
    Beta,
    Decoder,
    DiagonalNormal,
    FullNormal,
    MixtureOfNormals,
    Mlp,
    StandardNormal,
    VampPrior,
    datasets,
    fit,
)
from pyro_vae.exact import LinearGaussian, linear_vae

E, D = 7, 2


def make_vae(name="vae", encoder_outputs=2 * D, family=DiagonalNormal, prior=None):
    encoder = family(Mlp(E, 11, encoder_outputs))
    return VAE(prior(encoder) if prior else StandardNormal(D), Decoder(Mlp(D, 13, E), Bernoulli()), encoder, name)


def make_x(num=50):
    return (torch.rand(num, E) < torch.linspace(0.1, 0.9, E)).to(torch.get_default_dtype())


def parameters(vae):
    return {name: p.detach().clone() for name, p in vae.named_parameters()}


def assert_all_moved(before, vae):
    still = [name for name, p in vae.named_parameters() if torch.equal(before[name], p)]
    assert not still, f"parameters that did not move: {still}"


# ------------------------------------------------------------------------------------------------- equal to Pyro


@pytest.mark.parametrize(
    ("objective", "theirs"),
    [
        (ELBO(), pyro.infer.Trace_ELBO()),
        (
            IWAE(3),
            pyro.infer.RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        ),
        (pyro.infer.TraceMeanField_ELBO(), pyro.infer.TraceMeanField_ELBO()),
    ],
    ids=["ELBO", "IWAE", "TraceMeanField"],
)
def test_fit_takes_the_steps_of_svi(float64, objective, theirs):
    x, vae = make_x(), make_vae()
    twin = copy.deepcopy(vae)

    torch.manual_seed(1)
    history = fit(vae, x, objective=objective, epochs=2, batch_size=16, optimizer=pyro.optim.Adam({"lr": 0.01}))

    torch.manual_seed(1)
    svi = pyro.infer.SVI(twin.model, twin.guide, pyro.optim.Adam({"lr": 0.01}), loss=theirs)
    losses = [[svi.step(x[i]) for i in torch.randperm(len(x)).split(16)] for _ in range(2)]

    for (name, p), q in zip(vae.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=name)
    assert history["objective"] == pytest.approx([-sum(epoch) / len(x) for epoch in losses], abs=1e-10)


def test_the_fused_default_is_adam(float64):
    x, vae = make_x(), make_vae()
    twin = copy.deepcopy(vae)
    torch.manual_seed(1)
    fit(vae, x, epochs=2, batch_size=16, lr=0.01)
    torch.manual_seed(1)
    fit(twin, x, epochs=2, batch_size=16, optimizer=lambda p: torch.optim.Adam(p, lr=0.01, foreach=False))
    for p, q in zip(vae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------- exact


def test_fit_reaches_the_closed_form_maximum(float64):
    x = datasets.LinearGaussianData(latent_dim=D, data_dim=E, num_train=500).train.double()
    best = LinearGaussian.maximum_likelihood(x, D).log_evidence(x).mean().item()
    vae = linear_vae(D, E)
    for lr in (0.03, 0.01, 0.003, 0.001):
        fit(vae, x, epochs=30, batch_size=50, lr=lr)
    decoder = vae.decoder
    trained = LinearGaussian(decoder.net.weight.detach(), decoder.net.bias.detach(), decoder.likelihood.scale.item())
    with torch.no_grad():
        q = vae.encoder(x)
    elbo = trained.elbo(x, q.mean, torch.diag_embed(q.variance)).mean().item()
    assert best - 0.05 < elbo <= trained.log_evidence(x).mean().item() <= best


# ------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    ("family", "outputs", "prior"),
    [
        (DiagonalNormal, 2 * D, None),
        (FullNormal, FullNormal.num_outputs(D), None),
        (DiagonalNormal, 2 * D, lambda e: MixtureOfNormals(D, 3)),
        (DiagonalNormal, 2 * D, lambda e: VampPrior(e, torch.rand(4, E))),
    ],
    ids=["diagonal", "full", "mixture prior", "VampPrior"],
)
@pytest.mark.parametrize(
    "objective", [ELBO(), IWAE(3), Beta(beta=0.5), pyro.infer.Trace_ELBO()], ids=lambda o: type(o).__name__
)
def test_every_parameter_moves(family, outputs, prior, objective):
    vae = make_vae(family=family, encoder_outputs=outputs, prior=prior)
    before = parameters(vae)
    history = fit(vae, make_x(), objective=objective, epochs=2, batch_size=16)
    assert_all_moved(before, vae)
    assert all(torch.isfinite(torch.tensor(history[column])).all() for column in history)


def test_two_vaes_of_one_name_both_train_and_the_store_is_as_before():
    first, second = make_vae("same"), make_vae("same")
    pyro.param("mine", torch.tensor(3.0))
    for vae in (first, second, first):
        before = parameters(vae)
        fit(vae, make_x(), epochs=1)
        assert_all_moved(before, vae)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.param("mine").item() == 3.0


def test_frozen_parameters_stay():
    vae = make_vae()
    vae.encoder.net[0].weight.requires_grad_(False)
    before = parameters(vae)
    fit(vae, make_x(), epochs=1)
    assert torch.equal(before["encoder.net.0.weight"], vae.encoder.net[0].weight)
    assert not torch.equal(before["encoder.net.0.bias"], vae.encoder.net[0].bias)


def test_both_curves_are_recorded():
    vae, x = make_vae(), make_x()
    history = fit(vae, x, objective=IWAE(20), epochs=2, x_valid=x)
    visited = {"objective", "elbo", "log_px", "kl"}
    held_out = {"valid_elbo", "valid_elbo_se", "valid_log_px", "valid_kl"}
    assert set(history) == {"epoch", "seconds"} | visited | held_out
    assert history["objective"][-1] > history["elbo"][-1]
    assert history["elbo"] == pytest.approx([a - b for a, b in zip(history["log_px"], history["kl"], strict=True)])
    assert "valid_elbo" not in fit(vae, x, epochs=1)


def test_pyros_objectives_show_their_terms_too():
    vae, x = make_vae(), make_x()
    history = fit(vae, x, objective=pyro.infer.Trace_ELBO(), epochs=1)
    assert history["elbo"] == pytest.approx(history["objective"], abs=1e-4)
    assert history["kl"][0] > 0


def test_every_example_is_seen_once_an_epoch_in_a_new_order():
    x = torch.arange(10.0).unsqueeze(1).expand(-1, E).contiguous()
    seen = []

    def prepare(rows):
        if torch.is_grad_enabled():
            seen.append(rows[:, 0].tolist())
        return torch.ones_like(rows)

    fit(make_vae(), x, epochs=2, batch_size=4, prepare=prepare)
    assert [len(batch) for batch in seen] == [4, 4, 2, 4, 4, 2]
    epochs = [[i for batch in seen[start : start + 3] for i in batch] for start in (0, 3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_watching_held_out_data_changes_nothing():
    x, vae = make_x(), make_vae()
    twin = copy.deepcopy(vae)
    for model, valid in ((vae, make_x(9)), (twin, None)):
        torch.manual_seed(5)
        fit(model, x, epochs=3, batch_size=16, x_valid=valid)
    for p, q in zip(vae.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_modes_are_put_back():
    vae = make_vae()
    vae.eval()
    vae.decoder.train()
    fit(vae, make_x(), epochs=1)
    assert not vae.training and not vae.encoder.training and vae.decoder.training and vae.decoder.net.training


def test_any_pyro_program_can_be_fitted():
    """Two latent layers, written by hand."""

    class TwoLayers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.top = Mlp(E, 6), Mlp(3, 4)
            self.down, self.out = Mlp(2, 3), Mlp(3, E)

        def model(self, x):
            pyro.module("two", self)
            with pyro.plate("data", len(x)):
                z2 = pyro.sample("z2", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))
                z1 = pyro.sample("z1", pyro.distributions.Normal(self.down(z2), 1.0).to_event(1))
                pyro.sample("x", pyro.distributions.Bernoulli(logits=self.out(z1)).to_event(1), obs=x)

        def guide(self, x):
            pyro.module("two", self)
            with pyro.plate("data", len(x)):
                loc, log_scale = self.up(x).chunk(2, -1)
                z1 = pyro.sample("z1", pyro.distributions.Normal(loc, log_scale.exp()).to_event(1))
                loc, log_scale = self.top(z1).chunk(2, -1)
                pyro.sample("z2", pyro.distributions.Normal(loc, log_scale.exp()).to_event(1))

    vae = TwoLayers()
    before = parameters(vae)
    history = fit(vae, make_x(), objective=IWAE(3), epochs=5, lr=0.01)
    assert_all_moved(before, vae)
    assert history["objective"][-1] > history["objective"][0]


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("objective", [ELBO(), pyro.infer.Trace_ELBO()], ids=["ours", "Pyro's"])
def test_stopped_and_resumed_is_bit_for_bit_the_same(tmp_path, objective):
    x, vae = make_x(), make_vae()
    twin = copy.deepcopy(vae)
    prepare = datasets.binarize  # draws: the random stream must go on too
    settings = {"objective": objective, "batch_size": 16, "prepare": prepare, "x_valid": x}
    torch.manual_seed(7)
    straight = fit(vae, x * 0.5, epochs=5, **settings)

    torch.manual_seed(7)
    fit(twin, x * 0.5, epochs=2, folder=tmp_path, **settings)
    torch.manual_seed(999)  # another process: other random numbers, another initial model
    other = make_vae()
    resumed = fit(other, x * 0.5, epochs=5, folder=tmp_path, resume=True, **settings)

    for p, q in zip(vae.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [{**row, "seconds": 0} for row in resumed.rows] == [{**row, "seconds": 0} for row in straight.rows]


def test_an_interrupted_epoch_is_done_again(tmp_path):
    x, vae = make_x(), make_vae()
    twin, third = copy.deepcopy(vae), copy.deepcopy(vae)
    torch.manual_seed(7)
    fit(vae, x, epochs=3, batch_size=16)

    calls = 0

    def killed(rows):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == 6:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return rows

    torch.manual_seed(7)
    with pytest.raises(KeyboardInterrupt):
        fit(twin, x, epochs=3, batch_size=16, folder=tmp_path, prepare=killed)
    fit(third, x, epochs=3, batch_size=16, folder=tmp_path, resume=True)
    for p, q in zip(vae.parameters(), third.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------------------------------------- refusals


def test_refusals(tmp_path):
    vae, x = make_vae(), make_x()
    with pytest.raises(ValueError, match=r"expected epochs to be an integer >= 1, found 0"):
        fit(vae, x, epochs=0)
    with pytest.raises(ValueError, match=r"expected batch_size to be an integer >= 1, found 2.5"):
        fit(vae, x, batch_size=2.5)
    with pytest.raises(ValueError, match=r"expected lr > 0, found -1"):
        fit(vae, x, lr=-1)
    with pytest.raises(TypeError, match=r"expected an objective such as ELBO\(\).*pass an instance"):
        fit(vae, x, objective=ELBO)
    with pytest.raises(ValueError, match=r"expected training data \[N, \*E\] with N >= 1, found \(0, 7\)"):
        fit(vae, x[:0])
    with pytest.raises(ValueError, match=r"x has values outside \{0, 1\} \(found 0.5\): binarise it"):
        fit(vae, torch.cat([x, torch.full((1, E), 0.5)]), batch_size=16)  # not in the first batch
    with pytest.raises(ValueError, match="values that are NaN, expected"):
        fit(vae, torch.cat([x, torch.full((1, E), torch.nan)]), batch_size=16)
    with pytest.raises(ValueError, match=r"encoder\(x\) failed on an input of shape \(50, 8\)"):
        fit(vae, torch.ones(50, 8))
    with pytest.raises(ValueError, match=r"expected a folder to resume from"):
        fit(vae, x, resume=True)
    with pytest.raises(ValueError, match=r"expected a file .*latest.safetensors, found none"):
        fit(vae, x, folder=tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match=r"expected a model with parameters to train, found none"):
        fit(make_vae().requires_grad_(False), x)
    with pytest.raises(ValueError, match="with one dictionary of arguments"):
        fit(vae, x, optimizer=pyro.optim.Adam(lambda name: {"lr": 0.1}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": "Adam"}, TypeError, "expected a pyro.optim optimiser or a function"),
        ({"optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])}, TypeError, "for example lambda p"),
        ({"lr": "a"}, ValueError, "expected lr > 0, found 'a'"),
        (
            {"x_valid": torch.ones(E)},
            ValueError,
            r"expected held-out data x_valid \[M, \*E\] with M >= 1, found \(7,\)",
        ),
        ({"x_valid": torch.ones(4, E + 1)}, ValueError, r"encoder\(x\) failed on an input of shape \(4, 8\)"),
        ({"objective": pyro.infer.ReweightedWakeSleep(num_particles=2)}, ValueError, "gives several losses"),
    ],
)
def test_more_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        fit(make_vae(), make_x(), epochs=1, **arguments)


def test_what_is_no_model_is_refused():
    for wrong in (None, VAE, torch.nn.Linear(E, E)):
        with pytest.raises(TypeError, match="expected a model with model, guide and parameters"):
            fit(wrong, make_x())


def test_divergence_is_called_so_when_validation_finds_it_first():
    with pytest.raises(ValueError, match=r"the objective became .* in epoch \d+, .*lower the learning rate"):
        fit(make_vae(), make_x(), epochs=5, batch_size=16, lr=1e30)


def test_a_refused_fit_changes_nothing():
    vae, x = make_vae(), make_x()
    before, state = parameters(vae), torch.get_rng_state()
    with pytest.raises(ValueError, match="outside"):
        fit(vae, x * 0.5)
    assert all(torch.equal(before[name], p) for name, p in vae.named_parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_folder_is_not_overwritten_and_settings_must_agree(tmp_path):
    x = make_x()
    fit(make_vae(), x, epochs=1, folder=tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        fit(make_vae(), x, epochs=1, folder=tmp_path)
    with pytest.raises(ValueError, match=r"batch_size=128, found batch_size=16"):
        fit(make_vae(), x, epochs=2, folder=tmp_path, resume=True, batch_size=16)
    with pytest.raises(ValueError, match=r"objective='ELBO\(num_particles=1\)', found objective='IWAE"):
        fit(make_vae(), x, epochs=2, folder=tmp_path, resume=True, objective=IWAE(5))


def test_a_diverged_objective_is_told_and_the_last_good_epoch_kept(tmp_path):
    x, calls = make_x(), 0
    vae = make_vae()

    def poison(rows):
        nonlocal calls
        calls += torch.is_grad_enabled()
        return rows * torch.nan if calls > 4 else rows

    told = pytest.raises(ValueError, match=r"the objective became nan in epoch 2, .*lower the learning rate")
    with told, pyro.validation_enabled(False):
        fit(vae, x, epochs=3, batch_size=16, folder=tmp_path, prepare=poison)
    history = fit(make_vae(), x, epochs=3, batch_size=16, folder=tmp_path, resume=True)
    assert history["epoch"] == [1, 2, 3]
