"""What one process of several does in test_processes.py; one process alone does the same."""

import hashlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv4_jax.batch import answer_to_file, requests_of
from dsv4_jax.checkpoint.convert import convert
from dsv4_jax.checkpoint.load import LoadedModel, load
from dsv4_jax.distributed import init_distributed, leave
from dsv4_jax.llm import LLM
from dsv4_jax.numerics import PLAIN
from dsv4_jax.prompts import PromptRow
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import make_mesh

# dp x ep x tp, and rules: experts, heads and their columns on both sides of the border between processes.
LAYOUTS = [((1, 8, 1), "ep"), ((1, 1, 8), "tp"), ((2, 2, 2), "tp+ep")]
# Sums of two terms only, which are the same in any order: so two processes give one's bits.
SERVING = (4, 1, 2)
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [3] * 40, [4, 5]]


def parts(model: LoadedModel) -> dict[str, str]:
    """The bytes of every part that this process has, by parameter and place, in a few digits each."""
    leaves, _ = jax.tree.flatten_with_path((model.params, model.mtp_params))
    return {
        f"{jax.tree_util.keystr(path)} {shard.index}": hashlib.md5(
            np.asarray(shard.data).tobytes()
        ).hexdigest()
        for path, leaf in leaves
        for shard in leaf.addressable_shards
    }


def run(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Loads, generates, answers a file, converts and restores; `folder` is the same for all processes."""
    found: dict[str, Any] = {"loads": []}
    for sizes, rules in LAYOUTS:
        loaded = load(checkpoint, mtp=True, mesh=make_mesh(*sizes), rules=rules)
        found["loads"].append({"nbytes": loaded.nbytes_read, "parts": parts(loaded)})

    mesh = make_mesh(*SERVING)
    llm = LLM.from_pretrained(checkpoint, mesh=mesh, rules="dp-attention", numerics=PLAIN, max_len=64)
    greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=True)
    drawn = SamplingParams(max_tokens=3, temperature=2.0, top_k=50, seed=1, ignore_eos=True, logprobs=True)
    answers = llm.generate(PROMPTS, [greedy, drawn, greedy, drawn])
    found["answers"] = [[each.token_ids, each.logprobs] for each in answers]

    rows = [
        PromptRow(id=number, prompt=ids, overrides={}, where=f"line {number}")
        for number, ids in enumerate(PROMPTS)
    ]
    answer_to_file(llm, rows, requests_of(llm, rows, greedy), folder / "answers.jsonl", {"model": "wide"})

    together = make_mesh(1, 8, 1) if jax.process_count() > 1 else None
    out = convert(checkpoint, folder / "converted", mesh=together)
    sizes, rules = LAYOUTS[2]
    restored = load(out, mtp=True, mesh=make_mesh(*sizes), rules=rules, verify="full")
    found["restored"] = parts(restored)
    return found


if __name__ == "__main__":
    checkpoint, folder, coordinator, processes, number = sys.argv[1:]
    init_distributed(coordinator, int(processes), int(number), patience=60)
    try:
        found = run(Path(checkpoint), Path(folder))
    except BaseException:
        traceback.print_exc()
        leave(1)  # the other one need not wait for this one
    Path(folder, f"process-{number}.json").write_text(json.dumps(found))
