"""What the columns of a CSV file are taken for, what is missing, and the way back to text."""

import math

import pytest
import torch

from pyro_vae import likelihoods, tables
from pyro_vae.columns import describe, read_columns
from pyro_vae.files import Table

TEXT = """height,city,visits,member,income,flag,rank
170.5,Rome,0,yes,10.5,1,3
165.0,Oslo,2,no,2000,0,4
181.25,,1,yes,31.5,0,5
,Bonn,4,no,77,1,3
177.0,Rome,NA,no,?,,4
160.0,Oslo,3,yes,512,0,5
171.0,Rome,2,no,48,1,3
"""
KINDS = ["normal", "categorical", "count", "binary", "positive", "binary", "normal"]


def write(tmp_path, text=TEXT):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    return tmp_path / "t.csv"


def read(tmp_path, text=TEXT, label=None, kinds=None, missing=("", "NA", "?")):
    return read_columns(write(tmp_path, text), label, ",", kinds or {}, missing)[0]


def test_kinds_are_read_from_the_cells(tmp_path):
    columns = read(tmp_path)
    assert [column.kind for column in columns] == KINDS
    assert columns[1].levels == ("Bonn", "Oslo", "Rome") and columns[3].levels == ("no", "yes")
    assert columns[5].levels == ("0", "1")
    nan = math.nan
    expected = torch.tensor([2, 1, nan, 0, 2, 1, 2]).double()
    torch.testing.assert_close(columns[1].values, expected, equal_nan=True)
    torch.testing.assert_close(columns[2].values[:3], torch.tensor([0.0, 2, 1]).double())
    assert [int(column.values.isnan().sum()) for column in columns] == [1, 1, 1, 0, 1, 1, 0]


def test_kinds_can_be_told(tmp_path):
    columns = read(
        tmp_path, kinds={"rank": "categorical", "visits": "normal", "income": "normal", "flag": "categorical"}
    )
    assert [column.kind for column in columns] == [
        "normal",
        "categorical",
        "normal",
        "binary",
        "normal",
        "categorical",
        "categorical",
    ]
    assert columns[6].levels == ("3", "4", "5") and columns[5].levels == ("0", "1")
    assert read(tmp_path, "a,b\n2,x\n10,y\n1,z\n", kinds={"a": "categorical"})[0].levels == ("1", "2", "10")
    assert read(tmp_path, "a,b\n7,1\n9,2\n7,4\n", kinds={"a": "binary"})[0].levels == ("7", "9")


@pytest.mark.parametrize(
    ("text", "kinds", "message"),
    [
        (TEXT, {"nothing": "count"}, "expected kinds of columns of .*, found 'nothing'"),
        (TEXT, {"city": "rainbow"}, "expected the kind of column 'city' to be one of None, normal.*found 'rainbow'"),
        (TEXT, {"height": "count"}, "expected count numbers in column 'height' of .*, found 160 to 181.25"),
        (TEXT, {"visits": "positive"}, "expected positive numbers in column 'visits'"),
        (TEXT, {"city": "binary"}, "expected two values in the binary column 'city', found 3: make it categorical"),
        (TEXT.replace("171.0", "171,O"), {}, "expected 7 cells, found 8 in .* line 8"),
        (TEXT.replace("171.0", "171.O"), {}, "found '171.O' in .* line 8, column 'height': correct it"),
        (TEXT.replace("171.0", "inf"), {}, "found 'inf' in .* line 8, column 'height'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, text, kinds, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text, kinds=kinds)


def test_the_policy_says_what_was_read_and_what_is_missing(tmp_path):
    text = describe(read(tmp_path))
    assert "categorical: city (3)" in text and "count: visits" in text and "binary: member, flag" in text
    assert "5 of 49 cells missing (height 1, " in text
    assert describe(read(tmp_path, "a,b\n1,2\n3,5\n")) == (
        "columns standardised by the training mean and standard deviation"
    )


def test_a_table_of_all_kinds(tmp_path):
    data = Table(str(write(tmp_path)), test_fraction=0.3, missing=("", "NA", "?"), kinds={"rank": "categorical"})
    assert data.natural_likelihood[0] == "Masked"
    name, arguments = data.natural_likelihood[1]["likelihood"]
    assert name == "tables.MixedColumns" and arguments["likelihoods"][1] == ("tables.Nominal", {"num_levels": 3})
    each = {"HeteroscedasticNormal": likelihoods, "LogNormal": likelihoods, "Bernoulli": likelihoods}
    assert all(hasattr(each.get(n, tables), n) for n, _ in arguments["likelihoods"] if "." not in n)
    x = torch.cat([data.train, data.test])
    seen = data.train[:, 0]
    assert abs(seen.nanmean()) < 1e-6 and data.loc[[1, 2, 3, 5]].eq(0).all() and data.scale[[1, 2, 3, 5]].eq(1).all()
    assert abs(data.train[:, 4].log().nanmean()) < 1e-6 and data.loc[4] == 0
    # Back to text: every line of the file, in another order.
    lines = data.csv(x).splitlines()
    assert lines[0] == TEXT.splitlines()[0]
    plain = TEXT.replace("NA", "").replace("?", "").replace("170.5", "170.5").replace(".0,", ",")
    assert sorted(lines[1:]) == sorted(plain.splitlines()[1:])
    assert data.csv(torch.tensor([[0.0, 9.0, 1.7, 0.4, 1.0, -3.0, 0.6]])).splitlines()[1].split(",")[1:4] == [
        "Rome",
        "2",
        "no",
    ]


def test_tables_of_one_kind_keep_a_plain_likelihood(tmp_path):
    assert Table(str(write(tmp_path, "a,b\n1,2\n3,5\n4,1\n"))).natural_likelihood == ("HeteroscedasticNormal", {})
    bits = "a,b\n" + "0,1\n1,0\n" * 5
    assert Table(str(write(tmp_path, bits))).natural_likelihood == ("Bernoulli", {})
    gap = "a,b\n" + "1,2\n3,5\n,1\n" * 4
    assert Table(str(write(tmp_path, gap))).natural_likelihood == (
        "Masked",
        {"likelihood": ("HeteroscedasticNormal", {})},
    )
