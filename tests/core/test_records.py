from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kafjax.core.records import Prediction
from kafjax.core.rundir import write_jsonl
from kafjax.core.schema import read_rows

words = st.lists(st.text(max_size=5), max_size=2).map(tuple)
# JSON has neither
numbers = st.dictionaries(
    st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=2
)
predictions = st.builds(
    Prediction,
    answers=words,
    passages=words,
    gold_passages=words,
    output_tokens=...,
    correct=...,
    score=numbers,
    seconds=numbers,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(predictions, max_size=2))
def test_predictions_come_back_from_a_file_as_they_were(tmp_path, made):
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [prediction.to_json() for prediction in made])
    assert read_rows(Prediction, path) == made
