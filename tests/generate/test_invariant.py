"""`invariant`: how a request is served changes no bit of its answer, in arithmetic that amplifies any."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import decode, slots
from dsv4_jax import engine as engine_module
from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint.load import LoadedModel
from dsv4_jax.decode import Requests, read, read_one_by_one
from dsv4_jax.engine import Engine
from dsv4_jax.errors import RequestError
from dsv4_jax.generate import generate
from dsv4_jax.llm import LLM
from dsv4_jax.model import bind
from dsv4_jax.numerics import OFFICIAL
from dsv4_jax.sampling import SamplingParams

SLOTS, MAX_LEN, PIECE = 3, 160, 32
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=True)

Asked = tuple[list[int], SamplingParams]
Bits = tuple[list[int], list[float]]  # tokens and their logprobs
Start = Callable[..., Engine]


@pytest.fixture(scope="module")
def loaded(tiny_fp4, shallow) -> LoadedModel:
    return shallow(tiny_fp4.loaded, 1, quantised=True)


@pytest.fixture(scope="module", autouse=True)
def short_pieces() -> Iterator[None]:
    """So that short prompts have several, and their beginnings are kept."""
    modules = engine_module, importlib.import_module("dsv4_jax.generate")  # the package has the function
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "INVARIANT_PIECE", PIECE)
        yield


@pytest.fixture(scope="module")
def start(loaded) -> Start:
    """Makes engines that are invariant."""

    def engine(draft_tokens: int, **more) -> Engine:
        sizes = {"slots": SLOTS, "max_len": MAX_LEN, "invariant": True} | more
        return Engine(loaded, numerics=OFFICIAL, draft_tokens=draft_tokens, **sizes)

    return engine


def prompts(count: int, longest: int, vocab: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(2, vocab, random.integers(1, longest)).tolist() for _ in range(count)]


def answers(engine: Engine, asked: list[Asked]) -> tuple[list[Bits], int]:
    """Of requests that are there together; and how many of their tokens are drafts."""
    numbers = [engine.add(*each) for each in asked]
    found: dict[int, Bits] = {number: ([], []) for number in numbers}
    accepted = 0
    for event in engine.run():
        tokens, logprobs = found[event.request]
        found[event.request] = tokens + event.token_ids, logprobs + event.logprobs
        accepted += event.accepted
    return [found[number] for number in numbers], accepted


def each_alone(engine: Engine, asked: list[Asked]) -> list[Bits]:
    return [answers(engine, [each])[0][0] for each in asked]


@pytest.fixture(scope="module")
def alone(start) -> tuple[list[Asked], list[Bits]]:
    """Requests with their numbers as seeds, and what each gets by itself, without drafts."""
    asked = [
        (ids, dataclasses.replace(GREEDY, seed=number)) for number, ids in enumerate(prompts(7, 120, 512))
    ]
    return asked, each_alone(start(0), asked)


def test_a_full_batch_a_kept_beginning_and_drafts_change_no_bit(start, alone, monkeypatch):
    asked, expected = alone
    known = jnp.asarray([tokens for tokens, _ in expected], jnp.int32)

    def draft(models, requests, sequences, streams, tokens, reads, count, k):
        """In place of the head: of its drafts a known number is right, another for each request and step."""
        seed, vocab = requests.sampling.seed.astype(jnp.int32), models.main.head.weight.shape[0]
        place = jnp.minimum(count[:, None] + jnp.arange(k), known.shape[1] - 1)
        right = jnp.take_along_axis(known[seed], place, axis=1)
        wrong = (right + 1) % vocab
        drafts = jnp.where(jnp.arange(k) < ((seed + count) % (k + 1))[:, None], right, wrong)
        return drafts, jnp.zeros((*drafts.shape, vocab)), sequences.caches.head

    programs = slots.begin, slots.take_steps
    monkeypatch.setattr(decode, "_draft", draft)
    drafting = start(3, prefix_bytes=2**26)
    before = slots.read_piece._cache_size()

    try:
        for backwards in (1, -1):  # the second time they are in other slots, and their beginnings are there
            found, accepted = answers(drafting, asked[::backwards])
            assert found == expected[::backwards]
            assert accepted > 20
    finally:
        for program in programs:
            program.clear_cache()  # they were traced with the drafts from above

    assert drafting.prefix_hits >= 4
    assert slots.read_piece._cache_size() == before  # the very same program has read


def test_a_score_is_what_generation_reported_also_with_drafts(loaded, alone):
    asked, expected = alone
    llm = LLM(loaded, numerics=OFFICIAL, max_batch=SLOTS, max_len=MAX_LEN, draft_tokens=1, invariant=True)

    outputs = llm.generate([ids for ids, _ in asked[:4]], GREEDY)

    assert [(each.token_ids, each.logprobs) for each in outputs] == expected[:4]
    for each in outputs:
        ids = [*each.prompt_token_ids, *each.token_ids]
        assert llm.score(ids, start=len(each.prompt_token_ids)) == each.logprobs


def test_a_loop_reads_several_tokens_as_single_ones_and_reading_them_at_once_does_not(tiny_fp4, shallow):
    loaded, tokens = shallow(tiny_fp4.loaded, 0, quantised=True), 3
    config, start = loaded.config, jnp.zeros(1, jnp.int32)
    ids = jnp.asarray(np.random.default_rng(1).integers(2, 512, (1, tokens)), jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(how, params, ids, position, cache):
        return how(bind(config, OFFICIAL, params), ids, position, jnp.full(1, ids.shape[1]), cache)

    empty = make_cache(config, OFFICIAL, batch=1, max_len=MAX_LEN, max_draft=4)
    empty = jax.device_put(empty, jax.devices()[0])  # placed, as caches that come back are: one program
    looped, _ = run(read_one_by_one, loaded.params, ids, start, empty)
    at_once, _ = run(read, loaded.params, ids, start, empty)
    cache = empty
    for place in range(tokens):
        one, cache = run(read_one_by_one, loaded.params, ids[:, place : place + 1], start + place, cache)
        for found, expected in zip(looped, one, strict=True):
            np.testing.assert_array_equal(found[:, place], expected[:, 0])

    assert (np.asarray(at_once.logits) != looped.logits).any()


def written(loaded: LoadedModel, rows: list[list[int]], width: int, k: int, **more) -> list[Bits]:
    """What `generate` gives for prompts that are padded to `width`, each of `max_tokens` 10."""
    ids = np.zeros((len(rows), width), np.int32)
    for row, prompt in enumerate(rows):
        ids[row, : len(prompt)] = prompt
    requests = Requests.stack([dataclasses.replace(GREEDY, max_tokens=10)] * len(rows))
    drafts = {"mtp_params": loaded.mtp_params, "draft_tokens": k} if k else {}
    length = np.array([len(prompt) for prompt in rows], np.int32)
    sizes = {"max_new": 10, "max_len": MAX_LEN, "invariant": True} | drafts | more
    result = generate(loaded.config, OFFICIAL, loaded.params, ids, length, requests, **sizes)
    return list(zip(np.asarray(result.tokens).tolist(), np.asarray(result.logprobs).tolist(), strict=True))


def test_generate_gives_a_row_the_same_bits_beside_any_others_with_any_padding_and_drafts(tiny_fp4, shallow):
    loaded = shallow(tiny_fp4.loaded, 0, quantised=True)
    a, b, c, d = prompts(4, 90, 512, seed=2)

    plain = written(loaded, [a, b, c], 96, 0)
    drafting = written(loaded, [d, c, a], 130, 1)

    assert plain[0] == drafting[2]
    assert plain[2] == drafting[1]
    assert plain[1] not in drafting


def test_more_drafts_than_the_caches_have_room_for_are_refused(loaded, start):
    with pytest.raises(RequestError, match="invariant allows 4 at most"):
        start(5)
    with pytest.raises(ValueError, match="invariant allows 4 at most"):
        written(loaded, [[1]], 1, 5)


WHOLE = [(name, slots) for name in ("tiny-fp4", "tiny-fp8") for slots in (1, 4)]


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        *[pytest.param(*each, marks=pytest.mark.slow) for each in WHOLE],
        *[pytest.param(*each, marks=pytest.mark.gpu, id=f"{each} on a GPU") for each in WHOLE[1:3]],
    ],
)
def test_whole_models_with_any_number_of_drafts(load_golden, monkeypatch, name, slots):
    monkeypatch.setattr(engine_module, "INVARIANT_PIECE", 512)
    jax.clear_caches()  # a process maps only so many pieces of compiled programs
    loaded = load_golden(name).loaded
    asked = [(ids, dataclasses.replace(GREEDY, max_tokens=24)) for ids in prompts(10, 700, 384)]

    def found(k: int, *, invariant: bool) -> list[Bits]:
        sizes = {"slots": slots, "max_len": 730, "prefix_bytes": 2**27, "invariant": invariant}
        engine = Engine(loaded, numerics=OFFICIAL, draft_tokens=k, **sizes)
        if k == 0:
            assert answers(engine, asked[:4])[0] == each_alone(engine, asked[:4])
        return answers(engine, asked)[0]

    expected, default = found(0, invariant=True), found(0, invariant=False)
    for k in (1, 2, 3, 4):
        assert found(k, invariant=True) == expected
    if jax.default_backend() == "cpu":  # what the mode is for; kernels of a GPU may need it less
        assert found(4, invariant=False) != default

    rows = [ids[:90] for ids, _ in asked[:slots]]
    assert written(loaded, rows, 90, 4) == written(loaded, rows, 100, 0)
