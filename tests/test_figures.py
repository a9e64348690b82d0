"""The figures of a run."""

from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pyro_vae import (
    Comparison,
    VonMisesFisher,
    curve_plots,
    diagnostics,
    figures,
    image_plots,
    latent_plots,
    report,
    representation_plots,
    table_plots,
)
from pyro_vae.spherical import OnSphere

POLICY = "toy, static binarisation with seed 3, 5 test"
HISTORY = {"epoch": [1, 2], "objective": [-9.0, -8.0], "elbo": [-9.0, -8.0], "log_px": [-8.0, -6.0], "kl": [1.0, 2.0]}


class Toy(nn.Module):
    """Nearly a VAE: the three callables that pictures need, with dropout and in training mode."""

    def __init__(self, event, latent_dim=2, scale=1.0):
        super().__init__()
        self.event, self.latent_dim, self.scale = torch.Size(event), latent_dim, scale
        self.drop = nn.Dropout(0.5)
        self.out, self.back = nn.Linear(latent_dim, self.event.numel()), nn.Linear(self.event.numel(), latent_dim)
        self.rows = []

    def prior(self):
        return dist.Normal(torch.zeros(self.latent_dim), self.scale).to_event(1)

    def encoder(self, x):
        assert not torch.is_grad_enabled()
        self.rows.append(len(x))
        return dist.Normal(self.back(self.drop(x.flatten(1) / 16)), 0.5).to_event(1)

    def decoder(self, z):
        self.rows.append(len(z))
        h = self.out(self.drop(z)).unflatten(-1, self.event)
        return dist.Binomial(16, logits=h).to_event(len(self.event))


def data_set(event, n=5, labels=True, **attributes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(17, (n, *event), generator=generator).float()
    y = torch.arange(n) % 3 if labels else None
    return SimpleNamespace(test=x, test_labels=y, name="toy", policy=POLICY, **attributes)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Pictures of few pixels, for speed."""
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, file, **options: savefig(figure, file, **options | {"dpi": 30})
    )


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each plot."""
    seen = {}

    def spy(module, name):
        function = getattr(module, name)

        def wrapped(*args, **kwargs):
            seen[name] = (args, kwargs)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    for name in ("curves", "terms"):
        spy(curve_plots, name)
    for name in ("image_grid", "reconstructions", "manifold"):
        spy(image_plots, name)
    for name in ("latent_scatter", "kl_per_dimension"):
        spy(latent_plots, name)
    spy(table_plots, "table_marginals")
    return seen


def stems(files):
    return [file.stem for file in files]


def test_figures_of_images(tmp_path, calls):
    vae, data = Toy((1, 4, 3)), data_set((1, 4, 3), value_range=(0.0, 16.0))
    files = figures.write_figures(vae, data, HISTORY, tmp_path / "deep" / "figures")
    names = ["curves", "reconstructions", "samples", "latent", "manifold", "kl_per_dimension"]
    assert stems(files) == names
    assert sorted(path.name for path in (tmp_path / "deep" / "figures").iterdir()) == sorted(f"{n}.png" for n in names)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)

    vae.eval()
    with torch.no_grad():
        z = vae.encoder(data.test).mean
        (x, x_hat), options = calls["reconstructions"]
        assert torch.equal(x, data.test) and torch.allclose(x_hat, vae.decoder(z).mean)
        assert options["value_range"] == (0.0, 16.0)
        (shown, labels, names), options = calls["latent_scatter"]
        assert torch.allclose(shown, z) and torch.equal(labels, data.test_labels) and names is None
        assert options == {"prior_circle": True}
        (decode,), options = calls["manifold"]
        assert torch.allclose(decode(z), vae.decoder(z).mean) and options["quantiles"]
    assert calls["image_grid"][0][0].shape == (100, 1, 4, 3)


def test_nothing_is_changed(tmp_path):
    vae, data = Toy((4, 3)), data_set((4, 3))
    vae.back.eval()
    state, modes = torch.get_rng_state(), [part.training for part in vae.modules()]
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    first = [file.read_bytes() for file in figures.write_figures(vae, data, HISTORY, tmp_path)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in vae.modules()] == modes and torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    torch.rand(3)  # the pictures depend on the seed alone
    assert first == [file.read_bytes() for file in figures.write_figures(vae, data, HISTORY, tmp_path)]
    other = figures.write_figures(vae, data, HISTORY, tmp_path / "other", seed=1)
    assert first[2] != other[2].read_bytes() and first[1] == other[1].read_bytes()


def test_rows_go_through_in_batches_and_are_limited(tmp_path, calls):
    vae, data = Toy((7,)), data_set((7,), n=5200)
    figures.write_figures(vae, data, HISTORY, tmp_path)
    assert max(vae.rows) <= 1000
    assert len(calls["latent_scatter"][0][0]) == 5000


def test_tables_get_marginals_instead_of_pictures(tmp_path, calls):
    data = data_set((7,), labels=False, columns=list("abcdefg"))
    assert stems(figures.write_figures(Toy((7,)), data, HISTORY, tmp_path)) == [
        *("curves", "marginals", "latent", "kl_per_dimension")
    ]
    x, generated, names = calls["table_marginals"][0]
    assert torch.equal(x, data.test) and generated.shape == x.shape and names == data.columns
    assert (generated == generated.round()).all()  # draws, not means


def test_other_events_and_latent_dimensions(tmp_path):
    assert stems(figures.write_figures(Toy((2, 4, 3), 3), data_set((2, 4, 3)), {}, tmp_path)) == [
        *("latent", "kl_per_dimension")
    ]
    assert "manifold" not in stems(figures.write_figures(Toy((4, 3), 3), data_set((4, 3)), {}, tmp_path))
    assert stems(figures.write_figures(Toy((70,), 1), data_set((70,)), {}, tmp_path)) == ["latent", "kl_per_dimension"]


def test_value_range_falls_back_on_the_data(tmp_path, calls):
    data = data_set((4, 3))
    figures.write_figures(Toy((4, 3)), data, {}, tmp_path)
    assert calls["image_grid"][1]["value_range"] == (0.0, data.test.max().item())
    data.test.zero_()
    figures.write_figures(Toy((4, 3)), data, {}, tmp_path)
    assert calls["image_grid"][1]["value_range"] == (0.0, 1.0)


@pytest.mark.parametrize("flow", [False, True])
def test_other_priors_get_no_circle_and_their_own_range(tmp_path, calls, flow):
    vae = Toy((4, 3), scale=2.0)
    if flow:  # built upon a standard normal, but none itself
        scale = torch.distributions.AffineTransform(torch.zeros(2), torch.full((2,), 2.0), event_dim=1)
        base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        vae.prior = lambda: dist.TransformedDistribution(base, [scale])
    figures.write_figures(vae, data_set((4, 3)), {}, tmp_path)
    assert calls["latent_scatter"][1] == {"prior_circle": False}
    options = calls["manifold"][1]
    assert not options["quantiles"]
    for low, high in options["limits"]:
        assert (low, high) == pytest.approx((-4.65, 4.65), abs=0.8)  # the 1 % and 99 % quantiles


def test_a_prior_on_the_circle_gets_the_circle_and_one_on_the_simplex_no_manifold(tmp_path, calls, monkeypatch):
    vae, seen = Toy((4, 3)), []
    circle = representation_plots.circle

    def spy(decode, **options):
        seen.append(decode)
        return circle(decode, **options)

    monkeypatch.setattr(representation_plots, "circle", spy)
    vae.prior = lambda: OnSphere(torch.zeros(2))
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, VonMisesFisher.num_outputs(2)))
    posterior = VonMisesFisher(net)
    vae.encoder = lambda x: posterior(x)  # a module would hide behind Toy's method
    names = stems(figures.write_figures(vae, data_set((4, 3)), HISTORY, tmp_path))
    assert names == ["curves", "reconstructions", "samples", "latent", "manifold"] and "manifold" not in calls
    z = calls["latent_scatter"][0][0]
    assert torch.allclose(z.norm(dim=1), torch.ones(5)) and calls["latent_scatter"][1] == {"prior_circle": False}
    assert len(seen) == 1
    vae.prior = lambda: dist.Dirichlet(torch.ones(2))
    vae.encoder = lambda x: dist.Dirichlet(1 + x.flatten(1)[:, :2])
    assert stems(figures.write_figures(vae, data_set((4, 3)), {}, tmp_path / "simplex")) == [
        *("reconstructions", "samples", "latent")
    ]


def test_curves_of_what_is_no_elbo_say_so(tmp_path, calls):
    vae, data = Toy((4, 3)), data_set((4, 3))
    figures.write_figures(vae, data, HISTORY, tmp_path)
    assert calls["curves"][0][2] == "ELBO" and calls["terms"][0][2] == ("log p(x | z)", "KL(q(z | x) || p(z))")
    vae.encoder = lambda x: dist.Delta(vae.back(x.flatten(1)), event_dim=1)
    figures.write_figures(vae, data, HISTORY, tmp_path)
    assert calls["curves"][0][2] == "log p(x, z) at the code"
    vae = Toy((4, 3))
    decode = Comparison(event_dim=2)
    vae.decoder = lambda z: decode(vae.out(z).unflatten(-1, vae.event))
    figures.write_figures(vae, data, HISTORY, tmp_path)
    assert calls["curves"][0][2] == "score − KL" and calls["terms"][0][2][0] == "score"


def test_distributions_without_a_mean_are_averaged(tmp_path, calls):
    vae = Toy((4, 3))
    shift = torch.distributions.AffineTransform(3.0, torch.ones(2), event_dim=1)
    vae.encoder = lambda x: dist.TransformedDistribution(dist.Normal(torch.zeros(len(x), 2), 0.1).to_event(1), [shift])
    vae.decoder = lambda z: dist.Categorical(logits=torch.zeros(len(z), 4, 3, 5)).to_event(2)
    names = stems(figures.write_figures(vae, data_set((4, 3)), {}, tmp_path))
    assert names == ["reconstructions", "samples", "latent", "manifold"]
    assert torch.allclose(calls["latent_scatter"][0][0], torch.full((5, 2), 3.0), atol=0.1)
    assert abs(calls["image_grid"][0][0].mean() - 2) < 0.1


def test_kl_is_left_out_where_there_is_none(tmp_path, monkeypatch):
    def refuse(vae, x):
        raise ValueError("the posterior does not factorise")

    monkeypatch.setattr(diagnostics, "kl_per_dimension", refuse)
    assert stems(figures.write_figures(Toy((7,)), data_set((7,)), {}, tmp_path)) == ["marginals", "latent"]


def test_titles_and_policy(tmp_path, monkeypatch):
    texts = {}

    def savefig(figure, file, **options):
        title = figure.get_suptitle() or figure.axes[0].get_title()
        texts[len(texts)] = (title, figure.get_supxlabel())
        file.write(b"picture")

    monkeypatch.setattr(Figure, "savefig", savefig)
    data = data_set((4, 3))
    data.name = "toy $5$"
    files = figures.write_figures(Toy((4, 3)), data, HISTORY, tmp_path)
    titles = dict(zip(stems(files), texts.values(), strict=True))
    assert all(title.startswith(r"toy \$5\$: ") for title, _ in titles.values())
    assert "mean of p(x | z)" in titles["samples"][0]
    assert {name for name, (_, small) in titles.items() if POLICY in small} == {"curves", "latent", "kl_per_dimension"}


def test_a_report_of_figures_that_were_drawn(tmp_path):
    figures.write_figures(Toy((4, 3)), data_set((4, 3)), HISTORY, tmp_path / "figures")
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert text.count("<img") == 6
