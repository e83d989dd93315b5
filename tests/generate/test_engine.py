"""Requests that come and go: each gets what it gets alone, and nothing compiles while they do."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import engine as engine_module
from dsv4_jax.checkpoint.load import LoadedModel, load
from dsv4_jax.compiles import count_compiles
from dsv4_jax.engine import PIECES, PIECES_ON_GPU, Engine
from dsv4_jax.errors import MemoryPlanError, RequestError
from dsv4_jax.llm import LLM
from dsv4_jax.numerics import PLAIN
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import make_mesh
from pallas_kernels.target import Target

SLOTS, MAX_LEN = 4, 320

Answers = dict[int, tuple[list[int], list[float], str]]


def started(loaded: LoadedModel, draft_tokens: int, **more) -> Engine:
    sizes = {"slots": SLOTS, "max_len": MAX_LEN, "pieces": (8, 32)} | more
    return Engine(loaded, numerics=PLAIN, draft_tokens=draft_tokens, **sizes)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((0, 1), id="k=0", marks=pytest.mark.slow),
        pytest.param((2, 4), id="k=2, four steps at once"),
        *[pytest.param((k, 8), id=f"k={k} on a GPU", marks=pytest.mark.gpu) for k in (0, 2)],
    ],
)
def engine(tiny_fp4, shallow, request) -> Engine:
    draft_tokens, steps_at_once = request.param
    return started(shallow(tiny_fp4.loaded), draft_tokens, steps_at_once=steps_at_once)


def made_up(count: int, seed: int = 0) -> list[tuple[list[int], SamplingParams]]:
    """Requests of all lengths and all kinds of sampling."""
    random = np.random.default_rng(seed)
    return [
        (
            random.integers(2, 512, random.integers(1, 140)).tolist(),
            SamplingParams(
                max_tokens=int(random.integers(1, 20)),
                temperature=float(random.choice([0.0, 0.8])),
                top_k=int(random.choice([0, 5])),
                seed=number,
                ignore_eos=True,
            ),
        )
        for number, _ in enumerate(range(count))
    ]


def answers(engine: Engine) -> Answers:
    """Of all requests, once none is left."""
    found: dict[int, tuple[list[int], list[float], str]] = {}
    for event in engine.run():
        tokens, logprobs, reason = found.get(event.request, ([], [], ""))
        assert not reason  # nothing comes after the end
        found[event.request] = (
            tokens + event.token_ids,
            logprobs + event.logprobs,
            event.finish_reason or reason,
        )
    return found


def test_each_request_gets_what_it_gets_alone_bit_for_bit(engine):
    requests = made_up(14)
    alone = []
    for ids, sampling in requests:
        number = engine.add(ids, sampling)
        alone.append(answers(engine)[number])

    with count_compiles() as compiles:
        numbers = [engine.add(*each) for each in requests[:9]]
        found = {}
        for _ in range(12):  # the others come while these are under way
            for event in engine.step():
                tokens, logprobs, _ = found.get(event.request, ([], [], ""))
                both = tokens + event.token_ids, logprobs + event.logprobs
                found[event.request] = (*both, event.finish_reason or "")
        numbers += [engine.add(*each) for each in requests[9:]]
        for number, (tokens, logprobs, reason) in answers(engine).items():
            before = found.get(number, ([], [], ""))
            found[number] = before[0] + tokens, before[1] + logprobs, reason

    assert compiles.count == 0
    assert [found[number] for number in numbers] == alone
    assert [len(tokens) for tokens, _, _ in alone] == [sampling.max_tokens for _, sampling in requests]
    assert {reason for _, _, reason in alone} == {"length"}
    assert not engine.busy


def test_events_tell_of_each_step_how_many_drafts_stood(engine):
    requests = made_up(6, seed=2)
    numbers = [engine.add(*each) for each in requests]
    stood: dict[int, list[int]] = {number: [] for number in numbers}

    for event in engine.run():
        stood[event.request] += event.stood

    for number, (_, sampling) in zip(numbers, requests, strict=True):
        steps, after_first = stood[number], sampling.max_tokens - 1
        if engine.draft_tokens and after_first:
            assert all(0 <= count <= engine.draft_tokens for count in steps)
            # A step brings what stood and one token more, if there is room for that.
            assert len(steps) + sum(steps) - after_first in (0, 1)
        else:
            assert not steps


def test_the_engine_says_what_generate_says(engine):
    requests = [(ids, dataclasses.replace(each, temperature=0.0)) for ids, each in made_up(4, seed=1)]
    numbers = [engine.add(*each) for each in requests]

    found = answers(engine)

    llm = LLM(engine.model, numerics=PLAIN)
    expected = llm.generate([ids for ids, _ in requests], [sampling for _, sampling in requests])
    assert [found[number][0] for number in numbers] == [each.token_ids for each in expected]


def test_a_request_that_is_told_its_tokens_gets_them(engine):
    ids, greedy = [3, 4, 5], SamplingParams(max_tokens=11, temperature=0.0, ignore_eos=True)
    number = engine.add(ids, greedy)
    tokens, logprobs, _ = answers(engine)[number]

    told = engine.add(ids, greedy, forced=tokens)
    other = engine.add(ids, greedy, forced=[(token + 1) % 512 for token in tokens])
    free = engine.add(ids, greedy)  # beside those
    found = answers(engine)

    assert found[free] == (tokens, logprobs, "length")
    assert found[told][0] == tokens
    np.testing.assert_allclose(
        found[told][1], logprobs, atol=1e-4
    )  # where drafts stood, more were read at once
    assert found[other][0] == [(token + 1) % 512 for token in tokens]


def test_a_cancelled_request_ends_and_the_others_go_on(engine):
    requests = made_up(6, seed=2)
    expected = []
    for each in requests:
        number = engine.add(*each)
        expected.append(answers(engine)[number])

    numbers = [engine.add(*each) for each in requests]
    engine.step()
    for place in (0, 5):  # one under way, one that waits
        engine.cancel(numbers[place])
    found = answers(engine)

    for place, number in enumerate(numbers):
        if place in (0, 5):
            assert found[number][2] == "cancelled"
            assert found[number][0] == expected[place][0][: len(found[number][0])]
        else:
            assert found[number] == expected[place]
    again = engine.add(*requests[0])
    assert answers(engine)[again] == expected[0]


def test_a_nan_ends_its_request_and_no_other_and_none_after_it(tiny_fp4, shallow):
    loaded = shallow(tiny_fp4.loaded)
    params = loaded.params | {"embed": {"weight": loaded.params["embed"]["weight"].at[77].set(jnp.nan)}}
    engine = started(dataclasses.replace(loaded, params=params), 2, steps_at_once=4)
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)

    healthy = engine.add([5, 6, 7], greedy)
    spoiled = engine.add([77] * 200, greedy)  # fills its slot's window and entries
    found = answers(engine)

    assert found[spoiled] == ([], [], "error")
    assert found[healthy][2] == "length"
    assert np.isfinite(found[healthy][1]).all()

    cancelled = engine.add([77] * 200, greedy)  # ends before any logits could tell
    engine.step()
    engine.cancel(cancelled)
    answers(engine)
    again = [engine.add([5, 6, 7], greedy) for _ in range(2)]
    after = answers(engine)
    assert [after[number] for number in again] == [found[healthy]] * 2


def test_an_end_of_sentence_ends_a_request(engine, ending_with):
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    number = engine.add([3, 4, 5], greedy)
    tokens = answers(engine)[number][0]
    last = next(token for place, token in enumerate(tokens) if place > 2 and token not in tokens[:place])
    ending, sizes = ending_with(engine.model, last), {"steps_at_once": engine.steps_at_once}
    stopping = started(ending, engine.draft_tokens, **sizes)

    number = stopping.add([3, 4, 5], dataclasses.replace(greedy, ignore_eos=False))

    found = answers(stopping)[number]
    assert found[0] == [*tokens[: tokens.index(last)], ending.config.eos_token_id]
    assert found[2] == "stop"


@pytest.mark.parametrize(
    ("free", "prefix_bytes", "message"),
    [
        (1000, 0, "4 slots with 320 tokens take"),
        (2**32, 2**32, r"4 slots with 320 tokens and 4\.00 GiB of prefixes take"),
    ],
    ids=["caches", "prefixes"],
)
def test_memory_is_refused_before_anything_is_allocated(tiny_fp4, monkeypatch, free, prefix_bytes, message):
    monkeypatch.setattr(engine_module, "free_bytes", lambda: free)
    live = len(jax.live_arrays())

    with pytest.raises(MemoryPlanError, match=message):
        started(tiny_fp4.loaded, 0, prefix_bytes=prefix_bytes)

    assert len(jax.live_arrays()) == live


@pytest.mark.parametrize(
    ("ids", "max_tokens", "forced", "message"),
    [
        ([], 1, (), "the prompt is empty"),
        ([1] * 320, 1, (), "320 tokens and max_tokens 1 more exceed max_len 320"),
        ([1], 320, (), "1 tokens and max_tokens 320 more exceed max_len 320"),
        ([1, 512], 1, (), r"integers in \[0, 512\)"),
        ([-1], 1, (), r"integers in \[0, 512\)"),
        ([1, 2.0], 1, (), r"integers in \[0, 512\)"),
        ([1], 1, [512], r"integers in \[0, 512\)"),
    ],
    ids=["empty", "long", "long answer", "past the vocabulary", "negative", "float", "forced"],
)
def test_what_cannot_be_served_is_refused(engine, ids, max_tokens, forced, message):
    with pytest.raises(RequestError, match=message):
        engine.add(ids, SamplingParams(max_tokens=max_tokens), forced)

    assert not engine.busy


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_mesh_serves_as_one_device_does_without_a_compile(text_checkpoint):
    requests = made_up(6, seed=3)
    serving, alone = (
        started(load(text_checkpoint, mesh=mesh), 0, pieces=(32,), prefix_bytes=2**24)
        for mesh in (make_mesh(dp=2, tp=2), None)
    )
    serving.warm_up()

    with count_compiles() as compiles:
        numbers = [serving.add(*each) for each in requests]
        found = answers(serving)

    assert compiles.count == 0
    expected = [alone.add(*each) for each in requests]
    wanted = answers(alone)
    assert [found[number][0] for number in numbers] == [wanted[number][0] for number in expected]


def test_a_gpu_reads_long_prompts_in_long_pieces_unless_their_beginnings_are_kept(tiny_fp4, monkeypatch):
    monkeypatch.setattr(engine_module, "current_target", lambda: Target("cuda", "sm_90"))
    sizes: dict[str, Any] = {"numerics": PLAIN, "slots": 1, "max_len": 64}

    def pieces(**more) -> tuple[int, ...]:
        return Engine(tiny_fp4.loaded, **sizes, **more)._pieces

    assert pieces() == PIECES_ON_GPU
    assert pieces(prefix_bytes=2**27) == PIECES
    assert pieces(pieces=(16,)) == (16,)


def test_drafts_need_the_head(tiny_fp4):
    with pytest.raises(RequestError, match="MTP head"):
        started(dataclasses.replace(tiny_fp4.loaded, mtp_params=None), 1)
