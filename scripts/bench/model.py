#!/usr/bin/env python3
"""Times whole prefills and decode steps at the width of DeepSeek-V4-Flash, with made-up weights.

Twelve layers, four of each kind of attention: the released 43 do not fit one GPU. Run on a GPU:

  python scripts/bench/model.py --prefill 2048 --batch 1 32 --results scripts/bench/results/h200.json
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from harness import facts, median_us, save
from made_up import made_up_params
from profile_kernels import kernel_times, print_kernel_times

from dsv4_jax.cache import make_cache
from dsv4_jax.config import FLASH
from dsv4_jax.generate import decode_step, prefill
from dsv4_jax.numerics import OFFICIAL
from pallas_kernels.dispatch import choose

KINDS = {"SWA": 0, "CSA": 4, "HCA": 128}


def config_of(layers_of_each: int):
    """Flash with so many layers of each kind."""
    ratios = tuple(ratio for ratio in KINDS.values() for _ in range(layers_of_each))
    return dataclasses.replace(FLASH, num_hidden_layers=len(ratios), compress_ratios=(*ratios, 0))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers-of-each", type=int, default=4)
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--context", type=int, default=2048, help="tokens before a decode step")
    parser.add_argument("--implementation", help="as the command line's option; by default the fastest")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a decode step")
    parser.add_argument("--results", type=Path, help="JSON file to add rows to")
    arguments = parser.parse_args()

    name = arguments.implementation or "default"
    config = config_of(arguments.layers_of_each)
    params = made_up_params(config)
    jax.block_until_ready(params)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"{config.num_hidden_layers} layers, {nbytes / 1e9:.1f} GB of parameters", flush=True)
    label = f"model flash {config.num_hidden_layers} layers"

    def report(case: str, microseconds: float, tokens: int, logits: jax.Array) -> None:
        if not np.isfinite(np.asarray(logits)).all():
            raise SystemExit(f"{case}: logits are not finite")
        rate = tokens / microseconds * 1e6
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
        print(f"{case}: {microseconds / 1e3:.1f} ms, {rate:.1f} tok/s, peak {peak:.1f} GB", flush=True)
        row = {"id": f"{label} {case}", "implementation": name, "us": round(microseconds, 1)}
        row |= {"tokens_per_second": round(rate, 1), "peak_gb": round(peak, 1)} | facts()
        if arguments.results:
            save([row], arguments.results)

    with choose(arguments.implementation):
        measure(arguments, config, params, report)
    return 0


def measure(arguments: argparse.Namespace, config, params, report) -> None:
    """Prefills and decode steps, each told to `report`."""
    random = np.random.default_rng(0)

    def tokens_of(*shape: int) -> jax.Array:
        return jnp.asarray(random.integers(0, config.vocab_size, shape), jnp.int32)

    for length in arguments.prefill:
        ids, zero, whole = tokens_of(1, length), jnp.zeros(1, jnp.int32), jnp.full(1, length)
        logits = []

        def run(ids=ids, zero=zero, whole=whole, length=length, logits=logits):
            cache = make_cache(config, OFFICIAL, batch=1, max_len=length)
            logits[:] = [prefill(config, OFFICIAL, params, ids, zero, whole, cache)[0]]
            return logits[0]

        report(f"prefill {length}", median_us(run, repeats=3), length, run())

    for batch in arguments.batch:
        max_len = 2 * arguments.context
        token, position = tokens_of(batch), jnp.full(batch, arguments.context)
        state = [None, make_cache(config, OFFICIAL, batch=batch, max_len=max_len)]

        def step(token=token, position=position, state=state):
            state[:] = decode_step(config, OFFICIAL, params, token, position, state[1])
            return state[0]

        case = f"decode B={batch} context {arguments.context}"
        report(case, median_us(step, repeats=3, inner=3), batch, step())
        if arguments.profile:
            print_kernel_times(case, kernel_times(step), most=30)


if __name__ == "__main__":
    sys.exit(main())
