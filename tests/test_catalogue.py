"""The catalogue: every member with a formula of its own, told once, in its docstring."""

import re
from pathlib import Path

import pytest

from pyro_vae import catalogue
from pyro_vae.cli import main

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("part", sorted(catalogue.TITLES))
def test_every_member_says_what_it_is_and_where_it_is_from(part):
    found = catalogue.members(part)
    assert len(found) >= 5
    for member in found:
        assert member.sentence.endswith(".") and "\n" not in member.sentence, member.name
        assert member.source, member.name
        if part != "networks":
            assert member.formula, f"{member.name} shows no formula"
            assert member.formula.count("{") == member.formula.count("}"), member.name


def test_one_member_read_by_hand():
    vamp = next(m for m in catalogue.members("prior") if m.name == "VampPrior")
    assert vamp.formula == r"p(z) = \frac 1 C \sum_{c=1}^C q(z \mid u_c)"
    assert vamp.remark.startswith("It shares the encoder's parameters")
    assert vamp.source == "Tomczak, Welling (2018), VAE with a VampPrior, arXiv:1705.07120."


def test_the_readme_is_current():
    """Else: paste what ``pyro-vae members --markdown`` prints between the two marks."""
    page = README.read_text(encoding="utf-8").split("<!-- members -->")[1].split("<!-- end of members -->")[0]
    assert page.strip() == catalogue.markdown().strip()


def test_each_row_has_four_cells():
    rows = [line for line in catalogue.markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(catalogue.members(part)) for part in catalogue.TITLES)
    for row in rows:
        assert len(re.split(r"(?<!\\)\|", row)) == 6, row


def test_the_command_lists_every_name(capsys):
    main(["members"])
    out = capsys.readouterr().out
    for part in catalogue.TITLES:
        assert all(f"  {member.name} " in out for member in catalogue.members(part))
    main(["members", "--part", "prior"])
    assert "Likelihoods" not in capsys.readouterr().out


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(ValueError, match="unknown part 'priors': choose one of prior, "):
        catalogue.members("priors")
    with pytest.raises(SystemExit) as stopped:
        main(["members", "--part", "priors"])
    assert stopped.value.code == 2
    assert "pyro-vae: error" in capsys.readouterr().err
