"""`LLM`: batches, buckets, text, and what it refuses."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from dsv4_jax.compiles import count_compiles
from dsv4_jax.errors import MemoryPlanError, RequestError, TokenizerError
from dsv4_jax.llm import LLM
from dsv4_jax.numerics import OFFICIAL, PLAIN
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "data" / "tiny-fp4"
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(2, 42)), [9] * 17]


@pytest.fixture(scope="module")
def llm(tiny_fp4, shallow) -> LLM:
    """With the slots for all tests from the first one on: they share what is compiled."""
    llm = LLM(shallow(tiny_fp4.loaded, 1), numerics=PLAIN)
    llm.generate(PROMPTS, dataclasses.replace(GREEDY, max_tokens=1))
    return llm


def test_one_prompt_or_a_list_of_them(llm):
    one = llm.generate(PROMPTS[1], GREEDY)
    listed = llm.generate([PROMPTS[1]], GREEDY)

    assert len(one) == len(listed) == 1
    assert one[0].prompt_token_ids == PROMPTS[1]
    assert one[0].token_ids == listed[0].token_ids
    assert len(one[0].token_ids) == 8


def test_a_prompt_gets_in_a_batch_what_it_gets_alone(llm):
    sampling = [GREEDY, SamplingParams(max_tokens=5, seed=3, ignore_eos=True), GREEDY]

    together = llm.generate(PROMPTS, sampling)
    alone = [llm.generate(prompt, params)[0] for prompt, params in zip(PROMPTS, sampling, strict=True)]

    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert [len(each.token_ids) for each in together] == [8, 5, 8]


def test_more_prompts_than_fit_are_answered_in_turns(llm):
    small = LLM(llm.model, numerics=PLAIN, max_batch=4)

    outputs = small.generate(PROMPTS[::-1] + PROMPTS, GREEDY)

    expected = [each.token_ids for each in llm.generate(PROMPTS, GREEDY)]
    assert [each.token_ids for each in outputs] == expected[::-1] + expected


def test_a_second_prompt_of_a_bucket_compiles_nothing(llm):
    llm.generate(PROMPTS[0], GREEDY)

    with count_compiles() as compiles:
        other = SamplingParams(max_tokens=9, temperature=0.7, top_p=0.9, seed=4)
        outputs = llm.generate([3, 1, 4, 1, 5, 9, 2, 6], other)

    assert compiles.count == 0
    assert outputs[0].timings.compiles == 0


def test_eos_ends_an_answer_unless_it_is_ignored(llm, ending_with):
    # The third greedy token becomes the EOS, so the answer must end there.
    third = llm.generate(PROMPTS[0], GREEDY)[0].token_ids[2]
    stopping = LLM(ending_with(llm.model, third), numerics=PLAIN)
    stopping.generate(PROMPTS, dataclasses.replace(GREEDY, max_tokens=1))  # as many slots as `llm` has

    stopped = stopping.generate(PROMPTS[0], dataclasses.replace(GREEDY, ignore_eos=False))[0]
    ignored = stopping.generate(PROMPTS[0], GREEDY)[0]

    assert stopped.finish_reason == "stop"
    assert stopped.token_ids[-1] == llm.model.config.eos_token_id
    assert len(stopped.token_ids) <= 3
    assert ignored.finish_reason == "length"
    assert len(ignored.token_ids) == 8


def test_a_stream_gives_the_same_tokens_as_they_come(llm):
    expected = llm.generate(PROMPTS[1], GREEDY)[0]

    events = list(llm.stream(PROMPTS[1], GREEDY))

    assert [token for event in events for token in event.token_ids] == expected.token_ids
    assert [event.finish_reason for event in events] == [None] * 7 + ["length"]


def test_a_stream_that_is_left_early_leaves_nothing_behind(llm):
    expected = llm.generate(PROMPTS, GREEDY)

    for event in llm.stream(PROMPTS[2], GREEDY):
        if event.token_ids:
            break

    again = llm.generate(PROMPTS, GREEDY)
    assert [each.token_ids for each in again] == [each.token_ids for each in expected]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_score_is_what_generation_reported_bit_for_bit(llm, temperature):
    sampling = SamplingParams(max_tokens=9, temperature=temperature, logprobs=True, ignore_eos=True)
    answer = llm.generate(PROMPTS[1], sampling)[0]

    scores = llm.score([*PROMPTS[1], *answer.token_ids], start=len(PROMPTS[1]))

    assert scores == answer.logprobs


def test_a_score_is_that_of_the_tokens_given_and_not_of_the_likeliest(llm):
    ids = [5, 6, 7, 8, 9, 10]

    scores = llm.score(ids)

    assert len(scores) == 5
    by_prefix = [llm.score(ids[: end + 1], start=end)[0] for end in range(1, len(ids))]
    # Other pieces of a prompt round otherwise: by up to 1.4e-5 in a logit of this model in float32.
    np.testing.assert_allclose(scores, by_prefix, atol=1e-4)
    with pytest.raises(RequestError, match="start must be in"):
        llm.score([5], start=1)


def test_nothing_else_is_answered_while_a_stream_is_under_way(llm):
    stream = llm.stream(PROMPTS[1], GREEDY)
    next(stream)

    for ask in (lambda: llm.generate(PROMPTS[0], GREEDY), lambda: llm.score(PROMPTS[1])):
        with pytest.raises(RequestError, match="a stream is under way"):
            ask()

    rest = [token for event in stream for token in event.token_ids]
    assert rest == llm.generate(PROMPTS[1], GREEDY)[0].token_ids[-len(rest) :]


def test_drafts_change_no_greedy_answer_and_are_counted(llm):
    drafting = LLM(llm.model, numerics=PLAIN, draft_tokens=1)

    found, expected = drafting.generate(PROMPTS, GREEDY), llm.generate(PROMPTS, GREEDY)

    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert all(each.drafted >= 1 and each.accepted <= each.drafted for each in found)
    assert [each.drafted for each in expected] == [0] * 3


def test_prompts_that_begin_alike_are_read_once(llm, monkeypatch):
    monkeypatch.setattr("dsv4_jax.engine.PIECES", (32,))  # so that a prompt of 40 tokens begins with a block
    keeping = LLM(llm.model, numerics=PLAIN, prefix_bytes=2**24)

    first, second = (keeping.generate(PROMPTS, GREEDY) for _ in range(2))  # as many slots as `llm` has

    assert [each.token_ids for each in first] == [each.token_ids for each in second]
    assert keeping._engine.prefix_tokens == 32
    with pytest.raises(RequestError, match="prefix_bytes must be at least 0, got -1"):
        LLM(llm.model, prefix_bytes=-1)


def test_parameters_that_do_not_fit_are_refused_before_any_is_read(monkeypatch):
    monkeypatch.setattr("dsv4_jax.llm.free_bytes", lambda: 1000)
    monkeypatch.setattr("dsv4_jax.llm.load", None)

    for mesh in (None, make_mesh(tp=2)):
        with pytest.raises(MemoryPlanError, match=r"parameters take 0\.00 GiB of each device") as refused:
            LLM.from_pretrained(GOLDEN, mesh=mesh)
        assert refused.value.exit_code == 77


def test_drafts_are_refused_without_the_head_or_in_large_numbers(llm):
    without = dataclasses.replace(llm.model, mtp_params=None)
    with pytest.raises(RequestError, match="needs the MTP head"):
        LLM(without, draft_tokens=1)
    with pytest.raises(RequestError, match=r"draft_tokens must be in \[0, 4\], got 5"):
        LLM.from_pretrained("/no such folder", draft_tokens=5)


@pytest.fixture(scope="module")
def official(text_checkpoint) -> LLM:
    return LLM.from_pretrained(text_checkpoint, numerics=OFFICIAL)


def test_the_released_arithmetic_runs(official):
    output = official.generate("the quick dog", GREEDY)[0]

    assert len(output.token_ids) == 8
    assert np.isfinite(output.logprob_sum)


def test_text_goes_in_and_comes_out_where_there_is_a_tokenizer(official, text_checkpoint):
    tokenizer = Tokenizer.from_file(str(text_checkpoint / "tokenizer.json"))

    output = official.generate("the quick dog", GREEDY)[0]

    assert output.prompt_token_ids == tokenizer.encode("the quick dog").ids
    assert output.text == tokenizer.decode(output.token_ids)


def test_a_damaged_tokenizer_is_an_error_of_its_own(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN, folder)
    (folder / "tokenizer.json").write_text("{")

    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        LLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("prompts", "sampling", "said"),
    [
        ([], GREEDY, "prompts is empty"),
        ([[]], GREEDY, "prompt 0 is empty"),
        ([[1], [1, 2.0]], GREEDY, "prompt 1"),
        ([[1, 512]], GREEDY, r"outside \[0, 512\)"),
        ([[1, -1]], GREEDY, r"outside \[0, 512\)"),
        ([[1] * 1024], GREEDY, "1024 tokens"),
        ([[1] * 1020], GREEDY, "max_tokens 8 more exceed max_len 1024"),
        ([[1], [2]], [GREEDY], "1 sampling parameters for 2 prompts"),
        (["text"], GREEDY, "no tokenizer.json"),
    ],
    ids=[
        "no prompts",
        "an empty prompt",
        "a float",
        "an id past the vocabulary",
        "a negative id",
        "a prompt that fills the cache",
        "a prompt that leaves too little room",
        "too few sampling parameters",
        "text without a tokenizer",
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(llm, prompts, sampling, said):
    with pytest.raises(RequestError, match=said) as refused:
        llm.generate(prompts, sampling)

    assert refused.value.exit_code == 2
