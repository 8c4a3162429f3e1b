"""Text to text with a tiny random model, against forward passes over the whole text without a
cache."""

from __future__ import annotations

import collections
import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax import lora
from kafjax.core.errors import UserError
from kafjax.core.programs import compiler_options
from kafjax.generation import Generator, Sampling
from kafjax.generation.batching import batches, bucket
from kafjax.generation.config import LONGEST_LIMIT, SHORTEST_LIMIT, GenerationConfig, limit_for
from kafjax.generation.decode import STRIDE, decode, first_token, prefill

# 2 to 35 tokens with BOS: within the window of 7, past it, past the smallest bucket.
PROMPTS = [
    "Whoever asks for the name of the miller will be told three",
    "q",
    "A fox, two hens",
    "The lamp stood by the window and the river ran past the old mill, where nobody had lived since",
    "0123456789 0123456789 abcdefghij XYZ",
    "a fox and the fox",
]
GREEDY = Sampling(max_new_tokens=40, stop=())
WARM = Sampling(max_new_tokens=20, temperature=1.0, stop=(), seed=3)


@pytest.fixture(scope="module")
def natural(naive, params):
    """40 greedy tokens of each prompt, the plain way."""
    return naive(params, PROMPTS, 40)


def tokens_of(replies):
    return [list(reply.tokens) for reply in replies]


def test_greedy_equals_full_forward_passes(generator, params, tokenizer, natural):
    lengths = [len(tokenizer.encode(prompt).ids) for prompt in PROMPTS]
    assert min(lengths) == 2 and max(lengths) > 32  # else this says less than it seems to
    assert all(len(set(tokens)) > 5 for tokens in natural)
    replies = generator.generate(params, PROMPTS, GREEDY)
    assert tokens_of(replies) == natural
    assert [reply.text for reply in replies] == [tokenizer.decode(tokens) for tokens in natural]
    assert [
        (reply.prompt_tokens, reply.cached_tokens, reply.output_tokens) for reply in replies
    ] == [(n, 0, 40) for n in lengths]
    assert all(reply.prefill_seconds > 0 and reply.decode_seconds > 0 for reply in replies)


@pytest.mark.parametrize(
    "n_prefix", [3, 12], ids=["prefix within the window", "prefix past the window"]
)
def test_a_shared_prefix_changes_nothing_but_the_bill(
    generator, params, tokenizer, naive, n_prefix
):
    beginning = tokenizer.decode(tokenizer.encode(PROMPTS[3]).ids[:n_prefix])
    endings = [
        " 9",
        " X, two hens",
        " #the name of the miller will be told three different ones; and each of them",
        " zq q",
    ]
    ids = tokenizer.encode
    for ending in endings:  # the tokenizer does not merge across this border
        assert (
            ids(beginning).ids + ids(ending, add_special_tokens=False).ids
            == ids(beginning + ending).ids
        )
    prefix = generator.prefix(params, beginning)
    assert prefix.n_tokens == n_prefix
    replies = generator.generate(params, endings, GREEDY, prefix)
    assert tokens_of(replies) == naive(params, [beginning + ending for ending in endings], 40)
    assert {reply.cached_tokens for reply in replies} == {n_prefix}
    assert [reply.prompt_tokens for reply in replies] == [
        n_prefix + generator.count(ending) for ending in endings
    ]


def test_replies_do_not_depend_on_batch_or_company(model, generator, tokenizer, params):
    """Replies are sampled, which shows a change of the random numbers as well as one of the
    logits."""
    prompts = PROMPTS[:4]
    expected = generator.generate(params, prompts, WARM)
    for batch, parts in ((1, [1] * 4), (3, [3, 1])):
        done = []
        replies = Generator(model, tokenizer, batch).generate(
            params, prompts, WARM, advance=done.append
        )
        assert [(r.text, r.tokens) for r in replies] == [(r.text, r.tokens) for r in expected]
        assert done == parts


def test_long_prompts_are_read_fewer_at_a_time(model, tokenizer, generator, params):
    prompts = [
        "q",
        "A fox, two hens",
        "the river ran past the old mill " * 7,
        "a fox, two hens and a grey goose " * 6,
    ]
    lengths = [generator.count(prompt) for prompt in prompts]
    assert max(lengths[:2]) < 32 < min(lengths[2:]), lengths
    done = []
    narrow = Generator(model, tokenizer, batch_tokens=64)
    replies = narrow.generate(params, prompts, GREEDY, advance=done.append)
    assert tokens_of(replies) == tokens_of(generator.generate(params, prompts, GREEDY))
    assert done == [2, 1, 1]


@hypothesis.given(
    lengths=st.lists(st.integers(1, 300), max_size=30),
    batch=st.integers(1, 9),
    batch_tokens=st.integers(1, 700),
)
def test_batches_hold_all_prompts_and_no_more_tokens_than_allowed(lengths, batch, batch_tokens):
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    made = list(batches(by_length, lengths, batch, batch_tokens))
    assert [i for numbers in made for i in numbers] == by_length
    for numbers in made:
        padded = bucket(max(lengths[i] for i in numbers))
        assert len(numbers) == 1 or (
            len(numbers) <= batch and len(numbers) * padded <= batch_tokens
        )


def test_replies_come_in_the_order_of_the_prompts(generator, params, natural):
    order = [3, 0, 5, 1, 4, 2]
    assert tokens_of(generator.generate(params, [PROMPTS[i] for i in order], GREEDY)) == [
        natural[i] for i in order
    ]


def test_a_seed_gives_the_same_replies_and_another_one_others(generator, params):
    prompts = ["A fox"] * 3
    first, again, other = (
        tokens_of(generator.generate(params, prompts, dataclasses.replace(WARM, seed=seed)))
        for seed in (3, 3, 4)
    )
    assert first == again
    # also equal prompts draw each for itself
    assert len({tuple(tokens) for tokens in first + other}) == 6


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_sampling_from_next_to_nothing_is_greedy(generator, params, natural, narrow):
    replies = generator.generate(
        params,
        PROMPTS,
        Sampling(**{"max_new_tokens": 40, "temperature": 1.3, "stop": (), **narrow}),
    )
    assert tokens_of(replies) == natural


def test_an_adapter_is_heard(generator, params, naive):
    spec = lora.Spec(rank=2, alpha=4, targets=r"(q|down)_proj")
    adapters = lora.init(spec, params, jax.random.key(0))
    rng = np.random.default_rng(0)
    for pair in adapters.values():
        # it starts at zero
        pair["b"] = jnp.asarray(rng.normal(0, 0.3, pair["b"].shape), jnp.float32)
    attached = lora.attach(params, adapters, spec)
    replies = tokens_of(generator.generate(attached, PROMPTS[:2], GREEDY))
    assert replies == naive(attached, PROMPTS[:2], 40)
    assert replies != tokens_of(generator.generate(params, PROMPTS[:2], GREEDY))


def test_in_bfloat16_each_token_is_nearly_the_likeliest(model, tokenizer, params):
    model = dataclasses.replace(model, dtype=jnp.bfloat16)
    apply = jax.jit(model.apply, compiler_options=compiler_options("cpu"))
    prefix = "The lamp "
    generator = Generator(model, tokenizer)
    for reply, prompt in zip(
        generator.generate(params, PROMPTS, GREEDY, generator.prefix(params, prefix)),
        PROMPTS,
        strict=True,
    ):
        given = (
            tokenizer.encode(prefix).ids + tokenizer.encode(prompt, add_special_tokens=False).ids
        )
        row = [*given, *reply.tokens]
        logits_TxV = apply(params, jnp.asarray([row + [0] * (128 - len(row))]))[
            0, len(given) - 1 : len(row) - 1
        ]
        chosen = jnp.take_along_axis(logits_TxV, jnp.asarray(reply.tokens)[:, None], axis=1)[:, 0]
        assert jnp.max(jnp.max(logits_TxV, axis=1) - chosen) < 0.05 * jnp.std(logits_TxV)


def test_eos_ends_each_row_for_itself(model, tokenizer, params, natural):
    # The token that ends the rows at the most different places takes the part of EOS.
    places = {
        t: [row.index(t) if t in row else None for row in natural] for row in natural for t in row
    }
    eos = max(places, key=lambda t: len(set(places[t])))
    assert len(set(places[eos])) >= 3 and None in places[eos]
    beside_another = dataclasses.replace(
        model, config=dataclasses.replace(model.config, also_eos_ids=(eos,))
    )
    replies = Generator(beside_another, tokenizer).generate(params, PROMPTS, GREEDY)
    expected = [
        row if at is None else row[: at + 1] for row, at in zip(natural, places[eos], strict=True)
    ]
    assert tokens_of(replies) == expected
    assert [reply.text for reply in replies] == [
        tokenizer.decode([t for t in row if t != eos]) for row in expected
    ]
    # Few of max_new_tokens: the limit and EOS do not get into each other's way.
    ending = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_id=eos))
    for n in (1, 2):
        few = Generator(ending, tokenizer).generate(
            params, PROMPTS, dataclasses.replace(GREEDY, max_new_tokens=n)
        )
        assert tokens_of(few) == [row[:n] for row in expected]


@pytest.mark.parametrize("first", [0, 1, 7, 13, 14, 15, 16, 17, 30, 31, 37])
def test_a_stop_string_over_several_tokens_ends_the_reply(
    generator, params, tokenizer, natural, first
):
    """The string is made of three tokens of the first reply, on every side of the border of a
    stride."""
    assert STRIDE == 16
    stop = tokenizer.decode(natural[0][first : first + 3])
    replies = generator.generate(params, PROMPTS, dataclasses.replace(GREEDY, stop=(stop,)))
    for reply, row in zip(replies, natural, strict=True):
        sizes = [n for n in range(1, 41) if stop in tokenizer.decode(row[:n])]
        kept = row[: sizes[0]] if sizes else row
        assert list(reply.tokens) == kept
        assert reply.text == tokenizer.decode(kept).split(stop)[0]
    assert replies[0].output_tokens <= first + 3


def test_the_first_of_many_stop_strings_ends_the_reply(generator, params, tokenizer, natural):
    stops = ("t", "the ", "\n", "he l", "zzz")
    for reply, row in zip(
        generator.generate(params, PROMPTS, dataclasses.replace(GREEDY, stop=stops)),
        natural,
        strict=True,
    ):
        whole = tokenizer.decode(row)
        at = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
        assert reply.text == whole[:at]
        assert not any(stop in reply.text for stop in stops)


def test_new_lengths_seeds_and_stops_find_their_programs_compiled(model, tokenizer, params):
    fresh = dataclasses.replace(model)  # of which nothing is compiled yet
    generator = Generator(fresh, tokenizer)

    def compiled() -> list[int]:
        return [program.n_compiled("cpu") for program in (prefill, first_token, decode)]

    def generate(prompts, **changes):
        generator.generate(params, prompts, dataclasses.replace(WARM, **changes))
        return compiled()

    before = compiled()
    once = generate(["abc", "q"])
    assert once == [n + 1 for n in before]
    for n_rows in range(2, 9):
        assert generate([PROMPTS[n_rows % 3][:n_rows]] * n_rows) == once
    assert generate(["the " * 10, "q"], seed=99, stop=("zz", "\n"), max_new_tokens=17) == once
    assert generate(["abc", "q"], max_new_tokens=32) == once
    # Where it has to, it does compile: a longer bucket has a prefill and, with its longer cache, a
    # loop of its own.
    assert generate([PROMPTS[4], "q"]) == [once[0] + 1, once[1], once[2] + 1]


def test_what_does_not_fit_or_cannot_be_completed_is_refused(generator, model, tokenizer, params):
    room = model.config.max_length - 20
    fits = "#" * (room - 1)  # one token each, and BOS
    assert len(tokenizer.encode(fits).ids) == room
    assert (
        generator.generate(params, [fits], dataclasses.replace(WARM, max_new_tokens=20))[
            0
        ].output_tokens
        == 20
    )
    with pytest.raises(
        UserError,
        match=r"prompt '#{40}\.\.\.' needs 129 tokens with its reply, the model's context has 128",
    ):
        generator.generate(params, ["q", fits + "#"], dataclasses.replace(WARM, max_new_tokens=20))
    prefix = generator.prefix(params, "##")
    with pytest.raises(UserError, match="needs 129 tokens"):
        generator.generate(params, [fits[1:]], dataclasses.replace(WARM, max_new_tokens=20), prefix)
    with pytest.raises(UserError, match="needs 129 tokens, the model's context has 128"):
        generator.prefix(params, "#" * 128)
    for some_prefix in (None, prefix):
        with pytest.raises(UserError, match="empty prompt"):
            generator.generate(params, ["q", ""], WARM, some_prefix)
    smaller = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=100))
    with pytest.raises(UserError, match=r"not this model's: token [0-9]+ of a vocabulary of 100"):
        Generator(smaller, tokenizer).generate(params, [PROMPTS[0]], WARM)
    with pytest.raises(UserError, match="batch=0"):
        Generator(model, tokenizer, batch=0)


def test_nothing_to_do_is_done_at_once(generator, params):
    calls = collections.Counter()
    assert generator.generate(params, [], GREEDY, advance=calls.update) == []
    assert not calls


def test_count_is_without_bos(generator, tokenizer):
    assert generator.count(PROMPTS[0]) == len(tokenizer.encode(PROMPTS[0]).ids) - 1


SPECS = (lora.Spec(2, 4.0, r"(q|down)_proj"), lora.Spec(5, 10.0), lora.Spec(3, 6.0, "v_proj"))


@pytest.fixture(scope="module")
def adapters(params):
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(
            lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), lora.abstract(spec, params)
        )
        for spec in SPECS
    ]


def in_slots(params, adapters, order, n_slots=4):
    shapes = lora.lanes.padded_shapes(SPECS, params)
    slots = lora.lanes.empty_slots(params, shapes, n_slots)
    for slot, which in enumerate(order):
        padded, scales = (
            lora.lanes.pad(adapters[which], shapes),
            lora.lanes.scales(SPECS[which], params, shapes),
        )
        slots = lora.lanes.put(slots, slot, padded, scales)
    return slots


@pytest.mark.parametrize("beginning", [None, "The lamp "], ids=["whole prompts", "a shared prefix"])
def test_rows_with_adapters_of_their_own_are_answered_as_alone(
    generator, params, adapters, beginning
):
    """One batch mixes ranks, targets and an empty slot, in prefill and in decoding."""

    def answers(params, prompts, **more):
        prefix = None if beginning is None else generator.prefix(params, beginning)
        return tokens_of(generator.generate(params, prompts, GREEDY, prefix, **more))

    alone = [
        *(
            lora.attach(params, adapter, spec)
            for adapter, spec in zip(adapters, SPECS, strict=True)
        ),
        params,
    ]
    expected = [answers(weights, PROMPTS[:4]) for weights in alone]
    assert len({str(replies) for replies in expected}) == 4  # each is heard
    slots = in_slots(params, adapters, [0, 1, 2])
    pairs = [(prompt, slot) for slot in (3, 1, 0, 2) for prompt in range(4)]
    replies = answers(
        slots, [PROMPTS[prompt] for prompt, _ in pairs], adapters=[slot for _, slot in pairs]
    )
    assert replies == [expected[slot][prompt] for prompt, slot in pairs]


def test_adapters_swap_places_without_a_compile(generator, params, adapters):
    before = in_slots(params, adapters, [0, 1])
    first = tokens_of(generator.generate(before, PROMPTS[:4], GREEDY, adapters=[0, 1, 0, 1]))
    programs = [p.n_compiled("cpu") for p in (prefill, first_token, decode)]
    after = in_slots(params, adapters, [1, 0])
    assert tokens_of(generator.generate(after, PROMPTS[:4], GREEDY, adapters=[1, 0, 1, 0])) == first
    assert tokens_of(generator.generate(after, PROMPTS[:4], GREEDY, adapters=[0, 1, 0, 1])) != first
    assert [p.n_compiled("cpu") for p in (prefill, first_token, decode)] == programs


def test_a_slot_that_is_not_there_is_told(generator, params, adapters):
    with pytest.raises(UserError, match="no adapter slot 4"):
        generator.generate(in_slots(params, adapters, [0]), PROMPTS[:1], GREEDY, adapters=[4])
    with pytest.raises(UserError, match="no adapter slot 0: these parameters have 0"):
        generator.generate(params, PROMPTS[:1], GREEDY, adapters=[0])


def test_a_limit_that_nobody_chose_has_room_for_the_answers():
    assert GenerationConfig().limit == limit_for([]) == limit_for([3, 8]) == SHORTEST_LIMIT
    assert limit_for([3, 40]) == 44 and limit_for([10_000]) == LONGEST_LIMIT
    assert GenerationConfig(max_new_tokens=5).limit == 5
