"""The card of the small model that is in the repository."""

import importlib.util
import json
import re
from pathlib import Path

from dsv4_jax.config import Config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models/small"


def written(scores, card: str) -> str:
    """The card that evaluate.py makes of the scores; how long training took is known from the card alone."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "scripts/train_small/evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    evaluate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evaluate)
    found = re.search(r"in (\d+) steps and (\d+) s", card)
    assert found is not None
    curve = [{"step": int(found[1]), "seconds": int(found[2]), "answers": {}, "others": 0.0, "mtp": 0.0}]
    nbytes = sum(each.stat().st_size for each in FOLDER.glob("*.safetensors"))
    return evaluate.card(scores, curve, Config.from_pretrained(FOLDER), nbytes)


def test_the_card_says_what_the_scores_say():
    card, scores = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "scores.json").read_text())

    head, curve = card.split("## Loss while training")

    assert head == written(scores, card).split("## Loss while training")[0]
    assert curve.count("\n| ") > 10
