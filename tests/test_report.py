"""The page of a run."""

import json
import re

import pytest

from pyro_vae import report
from pyro_vae.supports import NO_LIKELIHOOD

POLICY = "toy, static binarisation with seed 3, 5 test"


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


def test_the_page_of_a_score_calls_nothing_a_bound(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curves.png").write_bytes(b"")
    bound = "Left: the evidence lower bound"
    assert bound in report.write_report(tmp_path).read_text()
    estimate = {"name": "score - KL (no bound)", "mean": -3.0, "standard_error": 0.1, "caveat": NO_LIKELIHOOD}
    (tmp_path / "evaluation.json").write_text(json.dumps({"estimates": [estimate], "policy": POLICY}))
    page = report.write_report(tmp_path).read_text()
    assert bound not in page and "Left: the score less the KL, which bounds nothing" in page
