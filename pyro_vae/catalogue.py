"""Every member of every part, read off the docstrings: the tables of the README and of ``pyro-vae members``.

The docstring is the one place where a formula stands; nothing here repeats one.
"""

import inspect
import re
from typing import NamedTuple

from pyro_vae.parts import class_names, import_class

TITLES = {
    "prior": "Priors p(z)",
    "likelihood": "Likelihoods p(x|z)",
    "encoder": "Posteriors q(z|x)",
    "networks": "Pairs of networks",
    "objective": "Objectives",
}


class Member(NamedTuple):
    """What the docstring of a class says.

    Args:
        name: what the command line calls it.
        sentence: its first sentence.
        formula: the displayed formula in LaTeX, "" if there is none.
        remark: what it says after the formula, as one paragraph.
        source: where it comes from.
    """

    name: str
    sentence: str
    formula: str
    remark: str
    source: str

    @property
    def in_short(self) -> str:
        """The first sentence, and the first of the remark."""
        return f"{self.sentence} {re.split(r'(?<=[.:])[ ](?=[A-Z])', self.remark)[0]}".strip()


def members(part: str) -> list[Member]:
    """The members of a part that this library defines, in alphabetical order.

    Args:
        part: "prior", "likelihood", "encoder", "networks" or "objective".

    Raises:
        ValueError: there is no such part.

    Example:
        >>> next(m for m in members("prior") if m.name == "StandardNormal").formula
        'p(z) = \\\\mathcal N(z; 0, s^2 I)'
    """
    if part not in TITLES:
        raise ValueError(f"unknown part {part!r}: choose one of {', '.join(TITLES)}.")
    classes = {name: import_class(name, part) for name in class_names(part)}
    return [_read(name, cls) for name, cls in classes.items() if cls.__module__.startswith("pyro_vae.")]


def text(part: str) -> str:
    """The members of a part for a terminal: name and first sentence, in columns."""
    rows = members(part)
    width = max(len(member.name) for member in rows)
    return "\n".join([TITLES[part], *(f"  {m.name:{width}}  {_plain(m.sentence)}" for m in rows)])


def markdown() -> str:
    """All tables in Markdown, formulas typeset."""
    lines: list[str] = []
    for part, title in TITLES.items():
        lines += [f"**{title}**", "", "| | formula | | source |", "|---|---|---|---|"]
        for m in members(part):
            formula = f"$`{_cell(m.formula)}`$" if m.formula else ""
            lines.append(f"| `{m.name}` | {formula} | {_cell(_links(m.in_short))} | {_cell(_links(m.source))} |")
        lines.append("")
    return "\n".join(lines)


def _read(name: str, cls: type) -> Member:
    paragraphs = re.split(r"\n\s*\n", (inspect.getdoc(cls) or "").strip())
    body = [p for p in paragraphs if not re.match(r"(Args|Returns|Raises|Example|Source):?", p)]
    formulas = [_joined(p.removeprefix(".. math::")) for p in body if p.startswith(".. math::")]
    remarks = [_joined(p) for p in body[1:] if not p.startswith(".. math::")]
    source = next((_joined(p.removeprefix("Source:")) for p in paragraphs if p.startswith("Source:")), "the definition")
    return Member(name, _joined(body[0]), r" \quad ".join(formulas), " ".join(remarks), source)


def _joined(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _plain(words: str) -> str:
    """Without the marks of reStructuredText."""
    return re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", words).replace("``", "")


def _links(words: str) -> str:
    words = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", words).replace("``", "`")
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", words)


def _cell(words: str) -> str:
    """A vertical bar would end the cell of the table."""
    return words.replace(r"\|", r"\Vert ").replace("|", r"\vert " if "\\" in words else r"\|")
