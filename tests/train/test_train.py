"""The training of the small model: its text, its forward pass, what is stored, runs that end early."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint.load import load
from dsv4_jax.checkpoint.names import parameters
from dsv4_jax.config import TINY
from dsv4_jax.errors import NumericError
from dsv4_jax.model import bind
from dsv4_jax.mtp import bind_mtp, make_mtp_cache
from dsv4_jax.numerics import KVQUANT, PLAIN
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.train import data
from dsv4_jax.train.forward import Setting, forward
from dsv4_jax.train.initial import initial
from dsv4_jax.train.loss import loss, simulated
from dsv4_jax.train.problems import recall
from dsv4_jax.train.release import release
from dsv4_jax.train.run import train
from dsv4_jax.train.small import SMALL
from dsv4_jax.train.step import Phase
from dsv4_jax.train.words import NOUNS, TOKENS, VOCAB_SIZE, write_tokenizer
from pallas_kernels import QuantArray, dequantize

ROOT = Path(__file__).parents[2]
CONFIG = dataclasses.replace(
    TINY,
    num_hidden_layers=2,
    compress_ratios=(4, 128, 0),
    num_hash_layers=1,
    hc_sinkhorn_iters=2,
    sliding_window=32,
    vocab_size=VOCAB_SIZE,
)
PHASE = Phase(share=1, rows=2, tokens=128, recall=0.5, level=data.Level(4, 2), choose=False)


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@pytest.fixture(scope="module")
def masters():
    """Initial weights, with numbers where they would be 0, so that nothing is left out unnoticed."""
    random = np.random.default_rng(0)

    def shaken(leaf):
        small = leaf.dtype == jnp.float32 and leaf.size < 3000
        return leaf + 0.1 * random.standard_normal(leaf.shape).astype(np.float32) if small else leaf

    return jax.tree.map(shaken, initial(CONFIG, 0))


make_texts = jax.jit(lambda key: data.batch(key, 4, 256, 0.5, data.Level()))


@pytest.fixture(scope="module")
def texts():
    return make_texts(jax.random.key(5))


def test_text_is_the_same_for_the_same_seed_and_becomes_the_same_tokens_again(texts, tmp_path):
    again = make_texts(jax.random.key(5))
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path, VOCAB_SIZE)

    for ids, same in zip(np.asarray(texts[0]), np.asarray(again[0]), strict=True):
        assert ids.tolist() == same.tolist()
        assert tokenizer.encode(tokenizer.decode(ids.tolist())) == ids[1:].tolist()


def test_answers_in_the_text_are_right(tmp_path):
    write_tokenizer(tmp_path)
    ids = np.concatenate([make_texts(jax.random.key(seed))[0] for seed in range(4)])
    tokenizer = Tokenizer.from_pretrained(tmp_path, VOCAB_SIZE)
    partner = {"(": ")", "[": "]", "{": "}"}
    facts, seen = {}, set()

    def number(digits: str) -> int:  # the units come first
        return int(digits[::-1])

    for row in ids.tolist():
        facts.clear()
        for line in tokenizer.decode(row).split("\n")[:-1]:
            asked, _, answer = line.partition("=")
            command, *given = asked.split()
            if line.startswith(" "):
                command, (*key, word) = "fact", line.split()
                assert facts.setdefault(tuple(key), word) == word
            seen.add(command if command.isalpha() else "sum")
            match command:
                case "copy":
                    assert answer.split() == given
                case "sort":
                    assert answer.split() == sorted(given)
                case "close":
                    assert answer.split() == [partner[each] for each in reversed(given)]
                case "fact" | "the":
                    pass
                case _:
                    a, sign, b = re.fullmatch(r"(\d{3})([+-])(\d{3})", command).groups()
                    sum_or_difference = number(a) + number(b) if sign == "+" else number(a) - number(b)
                    assert number(answer) == sum_or_difference
    assert seen == {"copy", "sort", "close", "fact", "the", "sum"}


def test_each_answer_is_marked_with_its_task(texts):
    ids, task = map(np.asarray, texts)
    words = np.array(TOKENS)

    assert set(np.unique(task)) == {0, *range(1, 1 + len(data.TASKS))}
    for number, name in enumerate(data.TASKS, start=1):
        answers = {each.strip("Ġ") for each in words[ids[task == number]]}
        wanted = {
            "arithmetic": {*"0123456789", "Ċ"},
            "sort": {*"0123456789", "Ċ"},
            "close": {*")]}", "Ċ"},
            "copy": {*NOUNS, "Ċ"},
            "recall": {*NOUNS},
        }
        assert answers <= wanted[name], name


def test_a_problem_asks_for_what_stands_so_many_tokens_before(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path, VOCAB_SIZE)

    for problem in recall(400, 3, seed=1):
        *facts, asked = problem.prompt.removeprefix(TOKENS[0]).split("\n")
        (place,) = [at for at, fact in enumerate(facts) if fact.startswith(asked + " ")]
        assert facts[place] == f"{asked} {problem.target}"
        assert len(tokenizer.encode("\n".join([*facts[place:], asked]))) == 400 + 2


# Two orders of float32 sums. These texts have no number at a tie of FP8 or FP4: one would change its code
# and some logits by 1e-3 to 1e-1, as far as the model moves from itself if its embedding moves by 1e-6.
@pytest.mark.parametrize("numerics", [PLAIN, KVQUANT], ids=["plain", "kvquant"])
def test_the_forward_pass_of_training_is_that_of_the_model(masters, texts, numerics):
    ids, weights = texts[0][:2, :256], jax.jit(simulated, static_argnums=0)(CONFIG, masters)
    position, length = jnp.zeros(2, jnp.int32), jnp.full(2, 256)

    @jax.jit
    def served(weights):
        model = bind(CONFIG, numerics, {key: each for key, each in weights.items() if key != "mtp"})
        streams, _ = model(ids, position, length, make_cache(CONFIG, numerics, batch=2, max_len=256))
        head, cache = (
            bind_mtp(CONFIG, numerics, weights["mtp"][0]),
            make_mtp_cache(CONFIG, numerics, batch=2, max_len=256),
        )
        drafts, _ = head(model, streams, jnp.roll(ids, -1, 1), position, length, cache)
        return model.logits(streams), head.logits(model, drafts)

    logits, drafts = served(weights)
    got_logits, got_drafts, _ = jax.jit(lambda w: forward(ids, w, Setting(CONFIG, numerics, choose=True)))(
        weights
    )

    np.testing.assert_allclose(got_logits, logits, atol=1e-4)
    np.testing.assert_allclose(got_drafts[:, :-1], drafts[:, :-1], atol=1e-4)


@pytest.mark.slow  # compiles the backward pass
def test_every_weight_has_a_finite_gradient(masters, texts):
    ids, task = (each[:2] for each in texts)  # 256 tokens: no answer sees the 128th's entry in fewer
    setting = Setting(CONFIG, KVQUANT, choose=False)
    gradients, parts = jax.jit(jax.grad(lambda m: loss(m, ids, task, setting), has_aux=True, allow_int=True))(
        masters
    )

    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        if path[-1].key not in ("tid2eid", "bias"):
            assert np.isfinite(gradient).all(), path
            assert np.abs(gradient).max() > 0, path
    assert all(np.isclose(load.sum(), CONFIG.num_experts_per_tok) for load in parts.loads.values())


def test_a_released_checkpoint_decodes_to_the_numbers_that_training_simulated(masters, tmp_path):
    release(tmp_path / "model", CONFIG, masters)
    model = load(tmp_path / "model", mtp=True, strict=True)

    wanted = jax.jit(simulated, static_argnums=0)(CONFIG, masters)  # as training has it
    for each in parameters(CONFIG, mtp=True):
        of_mtp = each.path[0] == "mtp"
        found = at(model.mtp_params, each.path[2:]) if of_mtp else at(model.params, each.path)
        numbers = dequantize(found) if isinstance(found, QuantArray) else found.astype(jnp.float32)
        np.testing.assert_array_equal(numbers, at(wanted, each.path), err_msg=str(each.path))


def test_the_small_model_takes_less_than_8_mb(tmp_path):
    release(tmp_path / "model", SMALL, initial(SMALL, 0))

    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) < 8_000_000


@pytest.mark.slow  # compiles the backward pass
def test_a_run_goes_on_to_the_same_numbers_and_stops_at_a_nan_with_its_step(tmp_path, monkeypatch):
    arguments = {"seconds": 0, "seed": 0, "chunk": 1}
    monkeypatch.setattr("dsv4_jax.train.run._SAVE_EVERY", 0)  # after every step

    def run(name, peak, report=print):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "plan.json").write_text('{"ends": [4]}')
        setting = Setting(CONFIG, KVQUANT, choose=False)
        return train(tmp_path / name, setting, (PHASE,), peak=peak, report=report, **arguments)

    def kill(line):
        if json.loads(line)["step"] == 3:
            raise KeyboardInterrupt

    whole = run("whole", 1e-3)
    with pytest.raises(KeyboardInterrupt):
        run("killed", 1e-3, kill)
    resumed = run("killed", 1e-3)

    assert int(whole.step) == int(resumed.step) == 4
    for one, other in zip(jax.tree.leaves(whole.masters), jax.tree.leaves(resumed.masters), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(
        NumericError, match=r"step 2: a loss is not a finite number.*last good state is of step 1"
    ):
        run("nan", float("nan"))


def test_without_a_gpu_training_says_how_long_it_would_take(tmp_path):
    command = [sys.executable, ROOT / "scripts/train_small/train.py", tmp_path / "run", tmp_path / "model"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT}
    )

    assert done.returncode == 69
    assert done.stderr.count("\n") == 1
    assert "would take 2.7 days (--cpu" in done.stderr
