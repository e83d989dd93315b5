#!/usr/bin/env python3
"""Writes the tasks that ship with the project: the same rows for the same arguments, on any machine.

python scripts/make_tasks.py scripts/tasks                     the small ones, as they are committed
python scripts/make_tasks.py build/needle --needle 1024,32768  a number to be found in so many tokens of text

Arithmetic and copying show that a model follows; a needle takes the window, the compressed entries and the
indexer to the test; the right choices of `choice` are random, so that whatever picks by habit scores 0.25.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# fmt: off
_WORDS = (
    "river", "lamp", "stone", "garden", "window", "letter", "bridge", "morning", "paper", "silver",
    "engine", "harbour", "winter", "copper", "field", "button", "candle", "forest", "mirror", "ladder",
    "basket", "thunder", "pocket", "island", "feather", "kettle", "market", "saddle", "velvet", "anchor",
    "barrel", "cotton", "dragon", "ember", "falcon", "glacier", "hammer", "ivory", "jungle",
)
# fmt: on
_TOKENS_A_WORD = 1.4  # about, of this text, in the tokenizer of the released checkpoints


def arithmetic(draw: random.Random) -> Iterator[dict]:
    """Sums and differences of one to three digits, after two examples."""
    for number in range(100):
        digits = 1 + number % 3
        a, b = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        sign, result = ("+", a + b) if draw.random() < 0.5 else ("-", a - b)
        prompt = f"3 + 4 = 7\n12 - 5 = 7\n{a} {sign} {b} ="
        yield {
            "id": f"{digits} digits {number}",
            "prompt": prompt,
            "target": str(result),
            "max_tokens": 8,
            "stop": "\n",
        }


def copy(draw: random.Random) -> Iterator[dict]:
    """Words to be said again, three to twelve of them."""
    for number in range(50):
        words = " ".join(draw.choice(_WORDS) for _ in range(3 + number % 10))
        prompt = f"Text: lamp river stone\nCopy: lamp river stone\nText: {words}\nCopy:"
        yield {"id": number, "prompt": prompt, "target": words, "max_tokens": 48, "stop": "\n"}


def choice(draw: random.Random) -> Iterator[dict]:
    """Which word was named; the answer's place is random."""
    for number in range(100):
        words = draw.sample(_WORDS, 4)
        answer = draw.randrange(4)
        prompt = f"Remember the word {words[answer]}. The word was"
        yield {"id": number, "prompt": prompt, "choices": [f" {word}" for word in words], "answer": answer}


def brackets(draw: random.Random) -> Iterator[dict]:
    """How a row of open brackets is closed."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    for number in range(50):
        opened = [draw.choice("([{") for _ in range(2 + number % 6)]
        closed = "".join(pairs[each] for each in reversed(opened))
        prompt = f"Close the brackets.\n( [ -> ] )\n{' '.join(opened)} ->"
        yield {"id": number, "prompt": prompt, "target": " ".join(closed), "max_tokens": 24, "stop": "\n"}


def prose(draw: random.Random) -> Iterator[dict]:
    """Made-up sentences, for perplexity."""
    verbs = ["carries", "watches", "mends", "forgets", "follows", "paints", "hides", "measures"]
    places = ["by the", "under a", "behind the", "near an old", "above the"]
    for number in range(20):
        sentences = []
        for _ in range(12):
            a, b, c = draw.sample(_WORDS, 3)
            sentences.append(f"The {a} {draw.choice(verbs)} the {b} {draw.choice(places)} {c}.")
        yield {"id": number, "text": " ".join(sentences)}


def needle(draw: random.Random, tokens: int) -> Iterator[dict]:
    """A number that is named once in a long text; at five depths, twice each."""
    for number in range(10):
        depth, key, value = (number % 5) / 4, draw.choice(_WORDS), draw.randrange(10_000, 100_000)
        words = [draw.choice(_WORDS) for _ in range(int(tokens / _TOKENS_A_WORD))]
        place = int(depth * len(words))
        fact = f"Remember: the number of the {key} is {value}."
        text = " ".join([*words[:place], fact, *words[place:]])
        prompt = f"{text}\nThe number of the {key} is"
        row = {"id": f"{tokens} at {depth:.2f} {number}", "prompt": prompt, "target": str(value)}
        yield row | {"match": "prefix", "max_tokens": 12, "stop": "\n"}


def conversation(draw: random.Random) -> Iterator[dict]:
    """Questions with one right word, asked as a conversation."""
    for number in range(20):
        a, b = draw.sample(_WORDS, 2)
        messages = [
            {"role": "system", "content": "Answer with one word."},
            {"role": "user", "content": f"I have a {a} and a {b}. Which did I name first?"},
        ]
        yield {"id": number, "messages": messages, "target": a, "match": "contains", "max_tokens": 16}


TASKS = (arithmetic, copy, choice, brackets, prose, conversation)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--needle", metavar="N,N", help="needles in texts of so many tokens, and nothing else"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.needle:
        made = {
            f"needle_{tokens}": needle(random.Random(arguments.seed), tokens)
            for tokens in map(int, arguments.needle.split(","))
        }
    else:
        made = {task.__name__: task(random.Random(arguments.seed)) for task in TASKS}
    for name, rows in made.items():
        path = arguments.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
