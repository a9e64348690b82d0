"""The figures of a run, and one self-contained page that shows everything in the run's folder."""

import base64
import html
import io
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro.distributions import Delta, constraints
from torch import Tensor

from pyro_vae import diagnostics, plots, representation_plots
from pyro_vae.checkpoints import write_atomically
from pyro_vae.contracts import NO_LIKELIHOOD, code, is_discrete, is_normalised, plain_support, untouched
from pyro_vae.estimates import with_error

_BATCH, _MOST_CODES, _MOST_COLUMNS, _MOST_VALUES = 1000, 5000, 60, 40


def write_figures(vae: Any, data: Any, history: plots.History, folder: str | Path, seed: int = 0) -> list[Path]:
    """Draw what there is to see of a trained model, one PNG each.

    Always curves and latent (codes where z is discrete); kl_per_dimension where prior and posterior factorise into
    normals; for images reconstructions, samples and, with two latent dimensions, manifold (of a prior on the circle
    the circle; none where z has fewer dimensions than numbers otherwise, as on a simplex); for tables of up to 60
    columns marginals. Neither the model nor the state of the random numbers is changed.

    Args:
        vae: the model, with ``prior()``, ``encoder(x)`` and ``decoder(z)``.
        data: the data set, with ``name``, ``policy``, ``test`` [M, *E] and ``test_labels`` [M] or None. Used where
            present: ``value_range`` (else 0 and the largest value of ``test``), ``classes``, ``columns`` (names).
        history: columns with one value an epoch, see :class:`pyro_vae.training.History`.
        folder: where the files go; made if missing.
        seed: seed of the samples shown.

    Returns:
        The files written, in reading order.
    """
    folder, written = Path(folder), []

    def save(name: str, ax: Axes, title: str, small: str = "") -> None:
        figure = ax.get_figure(root=True)
        assert figure is not None
        (figure.suptitle if len(figure.axes) > 1 else ax.set_title)(plots._plain(f"{data.name}: {title}"))
        if small:
            note = "\n".join(textwrap.wrap(small, 110))
            figure.supxlabel(plots._plain(note), fontsize=7, color=plots.GREY, x=0.99, ha="right")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        write_atomically(folder / f"{name}.png", buffer.getvalue())
        written.append(folder / f"{name}.png")

    device = next((t.device for t in [*vae.parameters(), *vae.buffers()]), data.test.device)
    if any(len(values) for values in history.values()):
        whole, *parts = _names(vae, data.test[:1].to(device))
        left, right = Figure(figsize=(11.0, 4.4), layout="constrained").subplots(1, 2)
        plots.curves(history, left, whole)
        plots.terms(history, right, (parts[0], parts[1]))
        kind = "the bound" if whole == "ELBO" else f"{whole}, no bound"
        save("curves", left, f"{kind} (left) and its two terms (right)", data.policy)

    with untouched(vae, seed):
        x = data.test[:_MOST_CODES]
        prior = vae.prior()
        decode = _batched(lambda z: _mean(vae.decoder(z)), device)
        discrete, sphere = is_discrete(prior), _on_sphere(prior)
        z = _batched(lambda rows: (code if discrete or sphere else _mean)(vae.encoder(rows)), device)(x).flatten(1)
        place = "most probable z" if discrete else "mode of q(z | x)" if sphere else "mean of q(z | x)"
        policy = f"{data.policy}; n = {len(x)}"

        if _is_image(x):
            known = data.test.nan_to_num(nan=0.0)  # NaN: a missing pixel
            lowest, highest = min(0.0, float(known.min())), float(known.max())
            values = getattr(data, "value_range", None) or (lowest, highest if highest > lowest else 1.0)
            x_hat = decode(z[:20])
            title = f"first test pictures, reconstructed from the {place}"
            save("reconstructions", plots.reconstructions(x[:20].cpu(), x_hat, value_range=values), title)
            ax = plots.image_grid(decode(prior.sample((100,))), value_range=values)
            save("samples", ax, "mean of p(x | z) for 100 draws z ~ p(z)")
        elif x.ndim == 2 and x.shape[1] <= _MOST_COLUMNS and is_normalised(vae.decoder(prior.sample((1,)).to(device))):
            generated = _batched(lambda z: vae.decoder(z).sample(), device)(prior.sample((len(x),)))
            ax = plots.table_marginals(x, generated, getattr(data, "columns", None))
            save("marginals", ax, f"test data and {len(x)} draws from the model", policy)

        standard = _is_standard_normal(prior)
        labels = None if data.test_labels is None else data.test_labels[: len(x)]
        if discrete:
            codes, names, index = _codes(z)
            shown = index < len(codes)
            heights = [0.3 + 0.85 * math.ceil(len(codes) / 10)] * _is_image(x) + [3.6]
            figure = Figure(figsize=(7.2, sum(heights)), layout="constrained")
            axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
            of_shown = None if labels is None else labels[shown]
            plots.code_usage(index[shown], names, of_shown, getattr(data, "classes", None), axes[-1])
            if _is_image(x):
                plots.code_pictures(decode(codes), names, values, axes[0])
            more = "" if bool(shown.all()) else f" (the {len(codes)} most frequent)"
            save("codes", axes[0], f"values of z{more}: mean of p(x | z), and whose they are", policy)
            return written
        ax = plots.latent_scatter(z, labels, getattr(data, "classes", None), prior_circle=standard)
        save("latent", ax, f"{place} of the test data", policy)

        if _is_image(x) and z.shape[1] == 2 and sphere:
            save("manifold", representation_plots.circle(decode, value_range=values), "mean of p(x | z) on the circle")
        elif _is_image(x) and z.shape[1] == 2 and _free(prior):
            # Quantiles of N(0, 1) mean nothing to another prior: span where it puts its draws instead.
            ends = prior.sample((2000,)).flatten(1).cpu().quantile(torch.tensor([0.01, 0.99]), dim=0).T.tolist()
            limits = ((ends[0][0], ends[0][1]), (ends[1][0], ends[1][1]))
            ax = plots.manifold(decode, value_range=values, quantiles=standard, limits=limits)
            save("manifold", ax, "mean of p(x | z) at each z")

    try:
        kl = diagnostics.kl_per_dimension(vae, x.to(device))
    except ValueError:  # prior and posterior do not factorise: there is no such number
        return written
    save("kl_per_dimension", plots.kl_per_dimension(kl), "KL per latent dimension", policy)
    return written


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
    heading = _escape(folder.resolve().name if title is None else title)
    evaluation = _evaluation(folder / "evaluation.json")
    is_score = NO_LIKELIHOOD in evaluation
    parts = [evaluation, _GLOSSARY, _figures(folder / "figures", is_score)]
    parts += [_metrics(folder / "metrics.jsonl", is_score), _verbatim(folder / "config.yaml", "Configuration")]
    parts += [_verbatim(folder / "evaluation.json", "Complete evaluation")]
    page = _PAGE.format(style=_STYLE, title=heading, body="\n".join(filter(None, parts)))
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def _batched(function: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function on the model's device, some rows at a time, its results on the CPU."""
    return lambda rows: torch.cat([function(part.to(device)).cpu() for part in rows.split(_BATCH)])


def _mean(distribution: Any) -> Tensor:
    """The mean; where the distribution does not know it (a flow, say), that of 64 draws."""
    try:
        mean = distribution.mean
        if not mean.isnan().all():  # torch's Categorical answers with nan
            return mean
    except NotImplementedError:
        pass
    return distribution.sample((64,)).float().mean(0)


def _codes(z: Tensor) -> tuple[Tensor, list[str], Tensor]:
    """The values of a discrete z [N, D] to show, [S, D], their names, and which of them each example has, [N].

    One-hot vectors: all classes, used or not; else the most frequent vectors, S for the others.
    """
    if bool((z.sum(1) == 1).all() and (z.max(1).values == 1).all()) and z.shape[1] <= _MOST_VALUES:
        return torch.eye(z.shape[1], dtype=z.dtype), [str(c + 1) for c in range(z.shape[1])], z.argmax(1)
    values, index, counts = z.unique(dim=0, return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:_MOST_VALUES]
    place = torch.full((len(values),), len(order))
    place[order] = torch.arange(len(order))
    names = ["".join(f"{int(number)}" for number in value) for value in values[order]]
    return values[order], names, place[index]


def _is_image(x: Tensor) -> bool:
    return x.ndim == 3 or (x.ndim == 4 and x.shape[1] in (1, 3))


def _names(vae: Any, x: Tensor) -> tuple[str, str, str]:
    """What the ELBO and its two terms are here: with a score for a likelihood, or a point mass for q, it is none."""
    with untouched(vae, 0):
        q = vae.encoder(x)
        scored = not is_normalised(vae.decoder(q.sample()))
    while isinstance(q, torch.distributions.Independent):
        q = q.base_dist
    if isinstance(q, Delta):
        whole, of_x = ("score + log p(z)", "score") if scored else ("log p(x, z)", "log p(x | z)")
        return f"{whole} at the code", f"{of_x} at the code", "−log p(z) at the code"
    return (
        ("score − KL", "score", "KL(q(z | x) || p(z))") if scored else ("ELBO", "log p(x | z)", "KL(q(z | x) || p(z))")
    )


def _on_sphere(prior: Any) -> bool:
    try:
        return isinstance(plain_support(prior), type(constraints.sphere))
    except NotImplementedError:
        return False


def _free(prior: Any) -> bool:
    """Whether each number of z may have any value of its range, whatever the others have."""
    try:
        return plain_support(prior).event_dim == 0
    except NotImplementedError:
        return True


def _is_standard_normal(prior: Any) -> bool:
    base = prior.base_dist if isinstance(prior, torch.distributions.Independent) else prior
    if not isinstance(base, torch.distributions.Normal):
        return False
    return bool((base.loc == 0).all() and (base.scale == 1).all())


def _escape(text: object) -> str:
    return html.escape(str(text))


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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


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
        texts = [_escape(estimate.get(key, "–")) for key in ("units", "num_particles", "num_examples")]
        rows.append([_escape(estimate.get("name", "–")), value, *texts])
    header = ("estimate", "mean ± standard error", "units", "draws of z (K)", "examples (n)")
    shown_once = dict.fromkeys(e["caveat"] for e in evaluation.get("estimates", []) if "caveat" in e)
    policy = evaluation.get("policy")
    note = f"<p>Data: {_escape(policy)}</p>" if policy else ""
    warning = "".join(f"<p><strong>{_escape(caveat)}</strong></p>" for caveat in shown_once)
    return "\n".join(["<h2>Evaluation</h2>", _table(header, rows) if rows else "", warning, note])


def _figures(folder: Path, is_score: bool = False) -> str:
    order = {name: i for i, name in enumerate(_CAPTIONS)}
    files = sorted(folder.glob("*.png"), key=lambda file: (order.get(file.stem, len(order)), file.stem))
    shown = []
    for file in files:
        caption = _CAPTIONS.get(file.stem, _escape(file.stem.replace("_", " ")))
        if is_score:
            caption = caption.replace("the evidence lower bound", "the score less the KL, which bounds nothing")
        source = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")
        name = _escape(file.stem.replace("_", " "))
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
    headers = [_HEADERS.get(c, _escape(c)) for c in columns]
    if is_score:  # no likelihood, so no bound
        headers = [header.replace("ELBO", "score − KL").replace("log p(x | z)", "score") for header in headers]
    return f"<h2>Training</h2>\n{note}\n{_table(headers, cells)}"


def _cell(name: str, value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.{1 if name == 'seconds' else 2}f}".replace("-", "−")
    return _escape(value)


def _verbatim(path: Path, title: str) -> str:
    if not path.exists():
        return ""
    return f"<details><summary>{title} ({path.name})</summary>\n<pre>{_escape(_read(path))}</pre></details>"


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

_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #595959; --line: #d0d0d0; --back: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ececec; --soft: #b0b0b0; --line: #4a4a4a; --back: #161616; }
}
@media print { :root { --text: #000000; --soft: #404040; --line: #b0b0b0; --back: #ffffff; } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); }
h1 { line-height: 1.2; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
strong { font-size: 1.5rem; } figcaption, dd { color: var(--soft); }
dt { font-weight: bold; } dd { margin: 0 0 0.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } td { white-space: nowrap; }
figure { margin: 1.5rem 0; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; margin: auto; background: #ffffff; border-radius: 4px; }
figcaption { max-width: 45rem; margin: 0.5rem auto 0; }
details { margin: 1.5rem 0; } summary { cursor: pointer; } pre { overflow-x: auto; font-size: 0.875rem; }
@media print { .wide, pre { overflow: visible; } pre { white-space: pre-wrap; } table { font-size: 0.75rem; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
