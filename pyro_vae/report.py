"""One self-contained page that shows everything in a run's folder."""

import base64
import json
import math
from pathlib import Path
from typing import Any

from pyro_vae.checkpoints import write_atomically
from pyro_vae.html_page import escape, html_page, table
from pyro_vae.supports import NO_LIKELIHOOD
from pyro_vae.uncertainty import with_error


def write_report(folder: str | Path, title: str | None = None) -> Path:
    """Write ``report.html``, one page without any external resource, from the files in the folder of a run.

    Shown are ``evaluation.json``, ``figures/*.png``, ``metrics.jsonl`` and ``config.yaml``, where they exist.

    Args:
        folder: the run's folder.
        title: heading of the page; the folder's name if None.

    Returns:
        The page.

    Raises:
        ValueError: there is no such folder, or a file in it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder, expected that of a run: check the path.")
    heading = folder.resolve().name if title is None else title
    evaluation = _evaluation(folder / "evaluation.json")
    is_score = NO_LIKELIHOOD in evaluation
    parts = [evaluation, _GLOSSARY, _figures(folder / "figures", is_score)]
    parts += [_metrics(folder / "metrics.jsonl", is_score), _verbatim(folder / "config.yaml", "Configuration")]
    parts += [_verbatim(folder / "evaluation.json", "Complete evaluation")]
    write_atomically(folder / "report.html", html_page(heading, "\n".join(filter(None, parts))))
    return folder / "report.html"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _parse(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}): write it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place} holds a {type(value).__name__}, expected a JSON object: write it again.")
    return value


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _evaluation(path: Path) -> str:
    if not path.exists():
        return ""
    evaluation, rows = _parse(_read(path), path.name), []
    for estimate in evaluation.get("estimates", []):
        mean, error = estimate.get("mean"), estimate.get("standard_error")
        shown = _finite(mean) and _finite(error)
        value = (
            f"<strong>{with_error(mean, error).replace('-', '−')}</strong>" if shown else "not shown: no standard error"
        )
        texts = [escape(estimate.get(key, "–")) for key in ("units", "num_particles", "num_examples")]
        rows.append([escape(estimate.get("name", "–")), value, *texts])
    header = ("estimate", "mean ± standard error", "units", "draws of z (K)", "examples (n)")
    shown_once = dict.fromkeys(e["caveat"] for e in evaluation.get("estimates", []) if "caveat" in e)
    policy = evaluation.get("policy")
    note = f"<p>Data: {escape(policy)}</p>" if policy else ""
    warning = "".join(f"<p><strong>{escape(caveat)}</strong></p>" for caveat in shown_once)
    return "\n".join(["<h2>Evaluation</h2>", table(header, rows) if rows else "", warning, note])


def _figures(folder: Path, is_score: bool = False) -> str:
    order = {name: i for i, name in enumerate(_CAPTIONS)}
    files = sorted(folder.glob("*.png"), key=lambda file: (order.get(file.stem, len(order)), file.stem))
    shown = []
    for file in files:
        caption = _CAPTIONS.get(file.stem, escape(file.stem.replace("_", " ")))
        if is_score:
            caption = caption.replace("the evidence lower bound", "the score less the KL, which bounds nothing")
        source = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")
        name = escape(file.stem.replace("_", " "))
        shown.append(f'<figure><img alt="{name}" src="{source}">\n<figcaption>{caption}</figcaption></figure>')
    return "<h2>Figures</h2>\n" + "\n".join(shown) if shown else ""


def _metrics(path: Path, is_score: bool = False) -> str:
    if not path.exists():
        return ""
    lines = [(i, line) for i, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    try:
        rows = [_parse(line, f"{path.name} line {i}") for i, line in lines]
    except ValueError:  # the table of epochs can be made again by a resumed run; the page is worth having without it
        return ""
    if not rows:
        return ""
    kept = sorted({round(i * (len(rows) - 1) / 19) for i in range(20)})  # the first and the last among them
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(name, rows[i].get(name)) for name in columns] for i in kept]
    some = f"{len(kept)} of {len(rows)} epochs are shown. " if len(kept) < len(rows) else ""
    note = f"<p>{some}All but epoch and seconds in nats per example.</p>"
    headers = [_HEADERS.get(c, escape(c)) for c in columns]
    if is_score:  # no likelihood, so no bound
        headers = [header.replace("ELBO", "score − KL").replace("log p(x | z)", "score") for header in headers]
    return f"<h2>Training</h2>\n{note}\n{table(headers, cells)}"


def _cell(name: str, value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.{1 if name == 'seconds' else 2}f}".replace("-", "−")
    return escape(value)


def _verbatim(path: Path, title: str) -> str:
    if not path.exists():
        return ""
    return f"<details><summary>{title} ({path.name})</summary>\n<pre>{escape(_read(path))}</pre></details>"


_HEADERS = {
    "objective": "objective",
    "elbo": "ELBO",
    "log_px": "log p(x | z)",
    "kl": "KL",
    "valid_elbo": "held-out ELBO",
    "valid_elbo_se": "standard error of the held-out ELBO",
    "valid_log_px": "held-out log p(x | z)",
    "valid_kl": "held-out KL",
}
_CAPTIONS = {
    "curves": "Left: the evidence lower bound, higher is better. A held-out curve that falls while the training "
    "curve rises means overfitting; two flat curves mean that training is done. Right: its two terms. A KL near "
    "zero means that the decoder ignores z.",
    "reconstructions": "Each test picture above what the model makes of its code. Look for what is lost: a blurred "
    "or changed picture shows information that z does not carry.",
    "samples": "Pictures that the model invents from random z. They should look like data and differ from each "
    "other. The mean is drawn, without pixel noise, so soft edges are normal.",
    "latent": "Each point is the code of one test example. Classes that form groups mean that z carries what tells "
    "them apart, although training needs no label. Codes should fill the prior's circle, where one is drawn: "
    "a region without codes decodes to unlikely pictures.",
    "codes": "Above, what each value of z decodes to; below, how many test examples have it as their most probable "
    "one, coloured by class. Bars of one colour mean that a value stands for a class, although training needs no "
    "label; an empty place is a value that the model does not use.",
    "manifold": "What each place of the latent space decodes to. Neighbours should change smoothly. Compare with "
    "the codes: the axes are the same, here covering the middle of the prior, or the whole of a circle.",
    "kl_per_dimension": "How many nats each latent dimension carries about x. Dimensions near zero are unused: the "
    "decoder has learned to do without them.",
    "log_weights": "The importance weights behind log p(x), for the easiest and the hardest example. A long "
    "tail to the right, a Pareto k above 0.7, means that a few draws make the estimate: raise K or anneal.",
    "gaps": "Where nats are lost. Approximation: no member of the posterior's family fits. Amortisation: the encoder "
    "does not find the best member. Generalisation: the ELBO is higher on training data than on test data.",
    "aggregate": "Where the codes of all examples lie, against where the prior draws them. Mass of the prior without "
    "codes decodes to unlikely data; codes outside the prior are never drawn.",
    "posteriors": "The true posterior of a few examples and the encoder's answer. Tilted or bent shapes are out of "
    "reach for a diagonal normal; a shift means that the encoder is off.",
    "marginals": "Each column in the data and in samples of the model. The medians should coincide and the ranges "
    "be equally long; a shorter one means that the model misses rare values.",
}
_GLOSSARY = """<h2>How to read the numbers</h2>
<dl>
<dt>ELBO</dt><dd>Evidence lower bound: log p(x | z) averaged over q(z | x), minus KL. Nats per example, higher is
better, on average never above log p(x).</dd>
<dt>log p(x | z)</dt><dd>How well the decoder explains x given its code. Nats per example, higher is better.</dd>
<dt>KL</dt><dd>KL(q(z | x) || p(z)), what the code costs: the information about x in z. Nats per example, at least 0
(an estimate from draws of z may fall below), lower is cheaper.</dd>
<dt>log p(x)</dt><dd>Log-evidence, estimated from below by the importance-weighted (IWAE) bound with K draws of z,
which rises towards it with K. Nats per example, higher is better.</dd>
</dl>"""
