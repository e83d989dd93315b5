"""Likelihoods of given texts, and what the model chose while it read them."""

import numpy as np
import pytest

from dsv4_jax.errors import NumericError, RequestError
from dsv4_jax.evaluation.insight import expert_load, look
from dsv4_jax.evaluation.likelihood import likelihoods
from dsv4_jax.llm import LLM
from dsv4_jax.numerics import PLAIN


@pytest.fixture(scope="module")
def llm(text_checkpoint) -> LLM:
    return LLM.from_pretrained(text_checkpoint, numerics=PLAIN, max_len=256)


def texts() -> list[tuple[list[int], int]]:
    draw = np.random.default_rng(0)
    return [
        (draw.integers(0, 512, n).tolist(), start) for n, start in ((5, 1), (33, 10), (34, 33), (140, 100))
    ]


def test_pieces_give_what_one_token_a_step_gives(llm):
    found = dict(likelihoods(llm, texts()))

    assert sorted(found) == [0, 1, 2, 3]
    for place, (ids, start) in enumerate(texts()):
        assert len(found[place].logprobs) == len(ids) - start
        # Pieces of other lengths round otherwise: by up to 1.4e-5 in a logit of such a model in float32.
        np.testing.assert_allclose(found[place].logprobs, llm.score(ids, start), atol=1e-4)


def test_a_text_gets_the_same_bits_in_any_company(llm):
    together = dict(likelihoods(llm, texts()))
    reversed_ = dict(likelihoods(llm, texts()[::-1]))

    for place, (ids, start) in enumerate(texts()):
        assert dict(likelihoods(llm, [(ids, start)]))[0] == together[place] == reversed_[3 - place]


def test_the_likeliest_tokens_are_said_to_be_so(llm):
    from dsv4_jax.sampling import SamplingParams

    prompt = [5, 6, 7]
    answer = llm.generate(prompt, SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))[0].token_ids
    other = [*answer[:-1], (answer[-1] + 1) % 512]

    found = dict(likelihoods(llm, [([*prompt, *answer], 3), ([*prompt, *other], 3)]))

    assert found[0].greedy == [True] * 5
    assert found[1].greedy == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (([5], 1), "text 1: 1 tokens, scored from token 1 on"),
        (([5, 6], 0), "scored from token 0 on"),
        (([5] * 257, 1), "text 1 has 257 tokens, and max_len is 256"),
        (([5, 512], 1), r"text 1: token ids lie in \[0, 512\)"),
    ],
)
def test_a_text_that_cannot_be_scored_is_named(llm, text, said):
    with pytest.raises(RequestError, match=said):
        list(likelihoods(llm, [([5, 6], 1), text]))


def test_logits_that_are_no_numbers_are_an_error(llm, monkeypatch):
    spoilt = llm.model.params | {"norm": {"weight": llm.model.params["norm"]["weight"] * np.nan}}
    monkeypatch.setattr(llm, "model", type(llm.model)(llm.model.config, spoilt, None, None))

    with pytest.raises(NumericError, match="logits of text 0 were not finite numbers"):
        list(likelihoods(llm, [([5, 6], 1)]))


def test_every_token_is_seen_at_its_experts_and_entries(llm):
    ids = [int(id) for id in np.random.default_rng(2).integers(0, 512, 100)]

    insight = look(llm, ids)

    config = llm.model.config
    load = expert_load(insight, config.n_routed_experts)
    assert load.shape == (1, config.n_routed_experts)
    assert load.sum() == 100 * config.num_experts_per_tok
    entries = insight.entries[0]
    assert entries.shape == (100, config.index_topk)
    for token, chosen in enumerate(entries):
        real = chosen[chosen >= 0]
        assert len(set(real)) == len(real) == min((token + 1) // 4, config.index_topk)
        assert (real < (token + 1) // 4).all()  # what has not ended yet cannot be chosen


def test_a_text_longer_than_the_cache_is_not_looked_at(llm):
    with pytest.raises(RequestError, match="257 tokens cannot be read, max_len is 256"):
        look(llm, [5] * 257)
