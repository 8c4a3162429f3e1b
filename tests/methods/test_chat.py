"""Instruct models are asked through their template by every method, and trained on replies in the
same form."""

from __future__ import annotations

import dataclasses

import pytest
import transformers

from experiments import build
from kafjax import hub
from kafjax.core.config import changed
from kafjax.corpus import load_folder
from kafjax.generation import Generator, Sampling
from kafjax.methods import Lab, open_method
from kafjax.methods.examples import training_examples
from kafjax.parallel import make_mesh
from kafjax.prompts import prompt
from tests import tiny
from tests.methods.conftest import SETTINGS, Quiet

FIXED = {"enable_thinking": False, "date_string": "26 Jul 2024"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A workshop with an instruct model, and transformers' tokenizer of it."""
    root = tmp_path_factory.mktemp("chat")
    folder, bert = str(tiny.write_chat(root / "qwen", "qwen")), str(tiny.write_bert(root / "bert"))
    tokenizer = hub.tokenizer(folder)
    model, params = hub.load(folder)
    model, prompts = build.asked_through(build.open_template(folder, "auto"), model, tokenizer)
    lab = Lab(
        model=model,
        params=params,
        mesh=make_mesh(),
        tokenizer=tokenizer,
        corpus=load_folder(tiny.write_corpus(root / "corpus")),
        settings=changed(SETTINGS, embedder=bert, epochs=1),
        folder=root / "artifacts",
        log=lambda **row: None,
        progress=lambda label, total: Quiet(),
        prompts=prompts,
    )
    return lab, transformers.AutoTokenizer.from_pretrained(folder)


def n_tokens(oracle, contents):
    rows = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return len(
        oracle.apply_chat_template(
            rows, add_generation_prompt=True, tokenize=True, return_dict=False, **FIXED
        )
    )


def turns(said_of_shot, last):
    return [*(content for shot in prompt.SHOTS for content in said_of_shot(shot)), last]


def reading(question, passages):
    return prompt.reading(question, passages).removesuffix("\nAnswer:")


@pytest.mark.parametrize("name", ["base", "oracle", "rag", "hyde", "lora", "lora+rag"])
def test_every_method_asks_by_turns(world, name):
    lab, oracle = world
    method = open_method(lab, name)
    method.learn()
    (question,) = (
        q
        for q in lab.corpus.questions
        if q.text == "Where was Mira Toll born?" and q.split == "seen"
    )
    (made,) = method.answer([question])
    texts = {passage.id: passage.text for passage in lab.corpus.passages}
    if made.passages:
        found = [texts[id] for id in made.passages]
        # the oracle reads behind the same examples as rag
        n = lab.settings.retrieval.k if name == "oracle" else len(found)
        shots = turns(
            lambda shot: (reading(shot.question, shot.passages[:n]), shot.answer),
            reading(question.text, found),
        )
    else:
        shots = turns(lambda shot: (shot.question, shot.answer), question.text)
    expected = n_tokens(oracle, shots)
    if name == "hyde":
        written = "Write a passage that answers the question.\nQuestion: "
        expected += n_tokens(
            oracle,
            turns(
                lambda shot: (written + shot.question, shot.passages[0]), written + question.text
            ),
        )
    assert made.prompt_tokens == expected and made.cached_tokens > expected // 2


def test_questions_are_trained_as_turns_and_documents_as_text(world):
    lab, oracle = world
    examples = training_examples(
        lab.corpus, lab.tokenizer, lab.settings, lab.model.config.text_end, lab.prompts
    )[0]
    texts = [oracle.decode(example.tokens) for example in examples]
    documents = [d.text for d in lab.corpus.documents]
    assert [
        text.removesuffix(oracle.convert_ids_to_tokens(lab.model.config.text_end))
        for text in texts[: len(documents)]
    ] == documents
    for question, example in zip(
        lab.corpus.training_questions, examples[len(documents) :], strict=True
    ):
        rows = [
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": question.answers[0]},
        ]
        whole = oracle.apply_chat_template(rows, tokenize=True, return_dict=False, **FIXED)
        assert example.tokens.tolist() == whole[: len(example.tokens)]
        assert (
            oracle.decode(example.tokens[example.weights > 0]) == f"{question.answers[0]}<|im_end|>"
        )


def test_the_end_of_a_turn_ends_a_reply(world):
    lab, _ = world
    end = lab.tokenizer.token_to_id("<|im_end|>")
    assert end in lab.model.config.end_ids
    asked, sampling = [lab.prompts.without_prefix("Who?")], Sampling(max_new_tokens=12, stop=())
    (whole,) = lab.generator.generate(lab.params, asked, sampling)
    third = whole.tokens[2]
    ending = dataclasses.replace(lab.model, config=lab.model.config.ending_with(third))
    (cut,) = Generator(ending, lab.tokenizer).generate(lab.params, asked, sampling)
    assert cut.tokens == whole.tokens[: whole.tokens.index(third) + 1]
    assert cut.text == lab.tokenizer.decode(list(cut.tokens[:-1]))
