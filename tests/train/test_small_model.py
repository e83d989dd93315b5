"""The small model that is in the repository answers as well as its scores say."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsv4_jax.evaluation.small import DRAFTS, Small
from dsv4_jax.train.data import Level

FOLDER = Path(__file__).parents[2] / "models/small"
ROWS = 50
SLACK = 0.06  # three of the rows: a machine that rounds sums otherwise may answer otherwise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.exists(), reason="models/small: no trained model is in the repository yet"),
]


@pytest.fixture(scope="module")
def scores():
    return json.loads((FOLDER / "scores.json").read_text())


@pytest.fixture(scope="module")
def small(scores):
    return Small(FOLDER, rows=ROWS, level=Level(**scores["level"]))


def test_it_answers_as_well_as_its_scores_say(small, scores):
    for task, share in small.exact().items():
        assert share >= scores["exact"][task] - SLACK, task


def test_its_loss_is_the_one_in_its_scores(small, scores):
    found, kept = small.loss(), scores["faults"]["none"]

    assert found["loss"] == pytest.approx(kept["loss"], rel=5e-3)
    assert found["answer_loss"] <= 3 * kept["answer_loss"]
    faults = scores["faults"].keys() - {"none"}
    assert all(scores["faults"][name]["answer_loss"] > 10 * kept["answer_loss"] for name in faults)


def test_it_finds_far_facts_and_finds_them_by_its_indexer(small, scores):
    far = max(scores["recall"], key=int)

    assert small.recall([int(far)], rows=10)[far] >= scores["recall"][far] - 0.2  # two of ten
    assert small.recall_by_random_choice([int(far)], rows=10)[far] <= 0.3


def test_its_drafts_are_accepted_and_change_no_token(small, scores):
    few = Small(FOLDER, rows=30, level=small.level)
    device = next(iter(scores["drafts"].values()))  # drafts stand alike on all

    found = few.alone((0, *DRAFTS), invariant=True)

    for drafts in DRAFTS:
        for task, answers in found[drafts].items():
            assert answers.tokens == found[0][task].tokens, task
            stood = np.array(device[str(drafts)][task]["by_position"])
            variance = (stood * np.arange(1, 2 * drafts, 2)).sum() - stood.sum() ** 2  # of how many stand
            steps = sum(each.draft_steps for each in answers.outputs)
            slack = 3 * np.sqrt(max(variance, 0) / steps)  # these are other texts: three standard errors
            assert answers.scores()["tokens_a_step"] >= 1 + stood.sum() - slack - 1e-3, task
