"""The figures of a run and its page."""

import json
import re
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pyro_vae import Comparison, VonMisesFisher, diagnostics, plots, report, representation_plots
from pyro_vae.contracts import NO_LIKELIHOOD
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

    def spy(name):
        function = getattr(plots, name)

        def wrapped(*args, **kwargs):
            seen[name] = (args, kwargs)
            return function(*args, **kwargs)

        monkeypatch.setattr(plots, name, wrapped)

    for name in ("curves", "image_grid", "reconstructions", "latent_scatter", "manifold", "kl_per_dimension"):
        spy(name)
    spy("table_marginals")
    spy("terms")
    return seen


def stems(files):
    return [file.stem for file in files]


def test_figures_of_images(tmp_path, calls):
    vae, data = Toy((1, 4, 3)), data_set((1, 4, 3), value_range=(0.0, 16.0))
    files = report.write_figures(vae, data, HISTORY, tmp_path / "deep" / "figures")
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
    first = [file.read_bytes() for file in report.write_figures(vae, data, HISTORY, tmp_path)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in vae.modules()] == modes and torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    torch.rand(3)  # the pictures depend on the seed alone
    assert first == [file.read_bytes() for file in report.write_figures(vae, data, HISTORY, tmp_path)]
    other = report.write_figures(vae, data, HISTORY, tmp_path / "other", seed=1)
    assert first[2] != other[2].read_bytes() and first[1] == other[1].read_bytes()


def test_rows_go_through_in_batches_and_are_limited(tmp_path, calls):
    vae, data = Toy((7,)), data_set((7,), n=5200)
    report.write_figures(vae, data, HISTORY, tmp_path)
    assert max(vae.rows) <= 1000
    assert len(calls["latent_scatter"][0][0]) == 5000


def test_tables_get_marginals_instead_of_pictures(tmp_path, calls):
    data = data_set((7,), labels=False, columns=list("abcdefg"))
    assert stems(report.write_figures(Toy((7,)), data, HISTORY, tmp_path)) == [
        *("curves", "marginals", "latent", "kl_per_dimension")
    ]
    x, generated, names = calls["table_marginals"][0]
    assert torch.equal(x, data.test) and generated.shape == x.shape and names == data.columns
    assert (generated == generated.round()).all()  # draws, not means


def test_other_events_and_latent_dimensions(tmp_path):
    assert stems(report.write_figures(Toy((2, 4, 3), 3), data_set((2, 4, 3)), {}, tmp_path)) == [
        *("latent", "kl_per_dimension")
    ]
    assert "manifold" not in stems(report.write_figures(Toy((4, 3), 3), data_set((4, 3)), {}, tmp_path))
    assert stems(report.write_figures(Toy((70,), 1), data_set((70,)), {}, tmp_path)) == ["latent", "kl_per_dimension"]


def test_value_range_falls_back_on_the_data(tmp_path, calls):
    data = data_set((4, 3))
    report.write_figures(Toy((4, 3)), data, {}, tmp_path)
    assert calls["image_grid"][1]["value_range"] == (0.0, data.test.max().item())
    data.test.zero_()
    report.write_figures(Toy((4, 3)), data, {}, tmp_path)
    assert calls["image_grid"][1]["value_range"] == (0.0, 1.0)


@pytest.mark.parametrize("flow", [False, True])
def test_other_priors_get_no_circle_and_their_own_range(tmp_path, calls, flow):
    vae = Toy((4, 3), scale=2.0)
    if flow:  # built upon a standard normal, but none itself
        scale = torch.distributions.AffineTransform(torch.zeros(2), torch.full((2,), 2.0), event_dim=1)
        base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        vae.prior = lambda: dist.TransformedDistribution(base, [scale])
    report.write_figures(vae, data_set((4, 3)), {}, tmp_path)
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
    names = stems(report.write_figures(vae, data_set((4, 3)), HISTORY, tmp_path))
    assert names == ["curves", "reconstructions", "samples", "latent", "manifold"] and "manifold" not in calls
    z = calls["latent_scatter"][0][0]
    assert torch.allclose(z.norm(dim=1), torch.ones(5)) and calls["latent_scatter"][1] == {"prior_circle": False}
    assert len(seen) == 1
    vae.prior = lambda: dist.Dirichlet(torch.ones(2))
    vae.encoder = lambda x: dist.Dirichlet(1 + x.flatten(1)[:, :2])
    assert stems(report.write_figures(vae, data_set((4, 3)), {}, tmp_path / "simplex")) == [
        *("reconstructions", "samples", "latent")
    ]


def test_curves_of_what_is_no_elbo_say_so(tmp_path, calls):
    vae, data = Toy((4, 3)), data_set((4, 3))
    report.write_figures(vae, data, HISTORY, tmp_path)
    assert calls["curves"][0][2] == "ELBO" and calls["terms"][0][2] == ("log p(x | z)", "KL(q(z | x) || p(z))")
    vae.encoder = lambda x: dist.Delta(vae.back(x.flatten(1)), event_dim=1)
    report.write_figures(vae, data, HISTORY, tmp_path)
    assert calls["curves"][0][2] == "log p(x, z) at the code"
    vae = Toy((4, 3))
    decode = Comparison(event_dim=2)
    vae.decoder = lambda z: decode(vae.out(z).unflatten(-1, vae.event))
    report.write_figures(vae, data, HISTORY, tmp_path)
    assert calls["curves"][0][2] == "score − KL" and calls["terms"][0][2][0] == "score"


def test_the_page_of_a_score_calls_nothing_a_bound(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curves.png").write_bytes(b"")
    bound = "Left: the evidence lower bound"
    assert bound in report.write_report(tmp_path).read_text()
    estimate = {"name": "score - KL (no bound)", "mean": -3.0, "standard_error": 0.1, "caveat": NO_LIKELIHOOD}
    (tmp_path / "evaluation.json").write_text(json.dumps({"estimates": [estimate], "policy": POLICY}))
    page = report.write_report(tmp_path).read_text()
    assert bound not in page and "Left: the score less the KL, which bounds nothing" in page


def test_distributions_without_a_mean_are_averaged(tmp_path, calls):
    vae = Toy((4, 3))
    shift = torch.distributions.AffineTransform(3.0, torch.ones(2), event_dim=1)
    vae.encoder = lambda x: dist.TransformedDistribution(dist.Normal(torch.zeros(len(x), 2), 0.1).to_event(1), [shift])
    vae.decoder = lambda z: dist.Categorical(logits=torch.zeros(len(z), 4, 3, 5)).to_event(2)
    names = stems(report.write_figures(vae, data_set((4, 3)), {}, tmp_path))
    assert names == ["reconstructions", "samples", "latent", "manifold"]
    assert torch.allclose(calls["latent_scatter"][0][0], torch.full((5, 2), 3.0), atol=0.1)
    assert abs(calls["image_grid"][0][0].mean() - 2) < 0.1


def test_kl_is_left_out_where_there_is_none(tmp_path, monkeypatch):
    def refuse(vae, x):
        raise ValueError("the posterior does not factorise")

    monkeypatch.setattr(diagnostics, "kl_per_dimension", refuse)
    assert stems(report.write_figures(Toy((7,)), data_set((7,)), {}, tmp_path)) == ["marginals", "latent"]


def test_titles_and_policy(tmp_path, monkeypatch):
    texts = {}

    def savefig(figure, file, **options):
        title = figure.get_suptitle() or figure.axes[0].get_title()
        texts[len(texts)] = (title, figure.get_supxlabel())
        file.write(b"picture")

    monkeypatch.setattr(Figure, "savefig", savefig)
    data = data_set((4, 3))
    data.name = "toy $5$"
    files = report.write_figures(Toy((4, 3)), data, HISTORY, tmp_path)
    titles = dict(zip(stems(files), texts.values(), strict=True))
    assert all(title.startswith(r"toy \$5\$: ") for title, _ in titles.values())
    assert "mean of p(x | z)" in titles["samples"][0]
    assert {name for name, (_, small) in titles.items() if POLICY in small} == {"curves", "latent", "kl_per_dimension"}


@pytest.fixture
def run(tmp_path):
    """The folder of a run."""
    folder = tmp_path / "run <1>"
    (folder / "figures").mkdir(parents=True)
    for name in ("latent", "curves", "own & other"):
        (folder / "figures" / f"{name}.png").write_bytes(b"\x89PNG" + name.encode())
    (folder / "config.yaml").write_text("prior: <script>alert(1)</script>\nbraces: {title}\n", encoding="utf-8")
    rows = [{"epoch": i, "elbo": -100.123 + i, "kl": 3.0, "valid_elbo": None, "seconds": 0.26} for i in range(1, 301)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    estimates = [
        {"name": "ELBO", "mean": -84.812, "standard_error": 0.312, "num_particles": 50, "num_examples": 1000},
        {"name": "log p(x) <K>", "mean": -80.04, "standard_error": 0.0123, "num_particles": 5000, "num_examples": 7},
        {"name": "alone", "mean": -77.5, "standard_error": None, "num_particles": 1, "num_examples": 1},
    ]
    for estimate in estimates:
        estimate["units"] = "nats per example"
    (folder / "evaluation.json").write_text(json.dumps({"policy": POLICY + " & more", "estimates": estimates}))
    return folder


def test_report_shows_the_run(run):
    page = report.write_report(run)
    assert page == run / "report.html"
    text = page.read_text(encoding="utf-8")
    assert "<title>run &lt;1&gt;</title>" in text
    assert "<strong>−84.81 ± 0.31</strong>" in text and "<strong>−80.040 ± 0.012</strong>" in text
    assert "log p(x) &lt;K&gt;" in text and "<td>5000</td>" in text
    assert "not shown: no standard error" in text and "−77.5" not in text
    assert f"{POLICY} &amp; more" in text
    pictures = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,[A-Za-z0-9+/=]+">', text)
    assert pictures == ["curves", "latent", "own &amp; other"]
    assert text.count("<figcaption>") == 3
    for word in ("ELBO", "log p(x | z)", "KL", "log p(x)"):
        assert f"<dt>{word}</dt>" in text


def test_report_is_self_contained_and_escaped(run):
    text = report.write_report(run, title="<b>{body}</b>").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;\nbraces: {title}" in text
    assert "<h1>&lt;b&gt;{body}&lt;/b&gt;</h1>" in text
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "url(" not in text and "@import" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and "@media print" in text


def test_long_tables_are_thinned(run):
    text = report.write_report(run).read_text(encoding="utf-8")
    training = text[text.index("<h2>Training</h2>") :]
    epochs = [int(epoch) for epoch in re.findall(r"<tr><td>(\d+)</td>", training)]
    assert len(epochs) == 20 and epochs[0] == 1 and epochs[-1] == 300 and epochs == sorted(epochs)
    assert "20 of 300 epochs are shown." in training
    assert "<td>−99.12</td><td>3.00</td><td>–</td><td>0.3</td>" in training
    assert "<th>held-out ELBO</th>" in training


def test_short_tables_are_whole(run):
    (run / "metrics.jsonl").write_text('{"epoch": 1, "kl": NaN}\n\n{"epoch": 2, "kl": 0.5, "own": 7}\n')
    text = report.write_report(run).read_text(encoding="utf-8")
    assert "epochs are shown" not in text
    assert "<tr><td>1</td><td>–</td><td>–</td></tr>" in text and "<tr><td>2</td><td>0.50</td><td>7</td></tr>" in text


def test_missing_files_are_left_out(tmp_path):
    text = report.write_report(tmp_path, "empty").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", text) == ["How to read the numbers"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "evaluation.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    report.write_report(tmp_path)


def test_a_report_of_figures_that_were_drawn(tmp_path):
    report.write_figures(Toy((4, 3)), data_set((4, 3)), HISTORY, tmp_path / "figures")
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert text.count("<img") == 6


def test_unreadable_files_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder, expected that of a run"):
        report.write_report(tmp_path / "nowhere")
    (run / "evaluation.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"evaluation.json holds a list, expected a JSON object"):
        report.write_report(run)
    assert not (run / "report.html").exists()


def test_an_interrupted_write_leaves_the_old_page(run, monkeypatch):
    page = report.write_report(run)
    old = page.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(run, "new")
    assert page.read_bytes() == old
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_a_damaged_table_of_epochs_is_left_out(run):
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    assert "<h2>Training</h2>" not in report.write_report(run).read_text(encoding="utf-8")
