"""Two editions of the World Factbook: the newer one from its package, an older one made of it."""

from __future__ import annotations

import json

import pytest

from kafjax.core.errors import UserError
from kafjax.corpus import editions
from kafjax.corpus.stream import draw, start
from kafjax.corpus.worlds import open_world


def entry(president: str, age: str, online: str, airports: str) -> dict:
    """A country as the older edition has it."""
    return {
        "Government": {
            "Country name": {"conventional short form": {"text": "X"}},
            "Executive branch": {"chief of state": {"text": president}},
        },
        "People and Society": {"Median age": {"total": {"text": age}}},
        "Communications": {"Internet users": {"percent of population": {"text": online}}},
        "Transportation": {"Airports": {"text": airports}},
    }


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """An older edition of every country that the newer one has: all values differ."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "europe").mkdir()
    for code in editions.newer():
        data = entry(
            "President Ada Q. LOVE (since 1 May 2010)", "11.1 years", "11.1% (2014)", "9,999 (2013)"
        )
        data["Government"]["Executive branch"]["chief of state"]["text"] = (
            "President Ada de LOVE Vega (since 1 May 2010); Vice President A. B (since 2)"
        )
        (folder / "europe" / f"{code}.json").write_text(json.dumps(data))
    (folder / "package.json").write_text("{}")
    return folder


def test_both_editions_are_read_alike(old):
    facts = editions.older(old)["fr"].facts
    assert facts == {
        "president": ("Ada de Love Vega", "Love"),
        "median_age": ("11.1 years", "11.1"),
        "internet_users": ("11.1%", "11.1 percent"),
        "airports": ("9,999", "9999"),
    }
    france = editions.newer()["fr"]
    assert france.name == "France" and france.facts.keys() > facts.keys()
    assert france.facts["president"] == ("Emmanuel Macron", "Macron")


@pytest.mark.parametrize(
    "text",
    [
        "King FREDERIK X (since 14 January 2024)",
        "President of the Swiss Confederation Guy PARMELIN (since 1 January 2026)",
        "President Brig. Gen. (Ret.) Teodoro Obiang NGUEMA MGASOGO (since 3 August 1979)",
        "",
    ],
)
def test_what_is_no_plain_president_is_left_out(text):
    assert editions.president(entry(text, "", "", "")) == ()


def test_edits_bring_the_value_of_the_newer_edition_and_newcomers_have_it(old):
    world = open_world("factbook", 8, 3, 4, 0, old)
    new = {f"country-{code}": country for code, country in editions.newer().items()}
    older = {("Ada de Love Vega", "Love"), ("11.1 years", "11.1"), ("9,999", "9999")}
    assert set(start(world).values()) == older | {("11.1%", "11.1 percent")}
    for step in draw(world, 3, added=1, edited=3, deleted=1, seed=0):
        for change in step:
            if change.after is not None:
                subject, attribute = change.key
                assert change.after == new[subject].facts[attribute]
        assert sum(change.before is None for change in step) == 4
    more = open_world("factbook", 8, 5, 4, 0, old)
    assert more.subjects[:11] == world.subjects


def test_bad_editions_are_named(old, tmp_path):
    for folder, message in (
        (None, "--old=DIR"),
        (tmp_path / "none", "no such folder; `npm pack"),
        (tmp_path, "holds no files such as europe/gm.json"),
    ):
        with pytest.raises(UserError, match=message):
            open_world("factbook", 4, 1, 2, 0, folder)
    with pytest.raises(
        UserError, match=r"countries have all 4 attributes in both editions, not 500"
    ):
        open_world("factbook", 400, 100, 4, 0, old)
    with pytest.raises(UserError, match="must be 1 to 5, got 6"):
        open_world("factbook", 4, 1, 6, 0, old)
    (tmp_path / "xx.json").write_text("[]")
    with pytest.raises(UserError, match=r"xx.json: expected a JSON object"):
        open_world("factbook", 4, 1, 2, 0, tmp_path)
