#!/usr/bin/env python3
"""Runs the model on the inputs of an npz of reference vectors and writes its own outputs under the same keys.

INPUTS.npz holds arrays under `in/...`; what is computed follows from which of them are there:

  in/plain/...      whole model without any quantisation of activations: prefill of all but the decode
                    tokens, single steps, streams after blocks, MTP logits
  in/greedyN/prompt greedy continuation
  in/kvquant/...    block by block, keys and values through FP8 and index keys through FP4

All arithmetic is float32.
"""

import argparse
import functools
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_jax.cache import CompressedCache, LayerCache, make_cache
from dsv4_jax.checkpoint.load import LoadedModel, load
from dsv4_jax.config import Config
from dsv4_jax.decode import Requests
from dsv4_jax.errors import DSV4Error
from dsv4_jax.generate import decode_step, generate, prefill
from dsv4_jax.model import bind, declare
from dsv4_jax.mtp import bind_mtp, make_mtp_cache
from dsv4_jax.nn.rope import rope_frequencies, rotation
from dsv4_jax.numerics import KVQUANT, PLAIN, Numerics
from dsv4_jax.sampling import SamplingArrays, SamplingParams
from pallas_kernels import decode_rows

LISTED_ENTRIES = 12  # of a cache, the newest


def room(tokens: int) -> int:
    """Cache length for so many tokens: whole windows of the widest compressor."""
    return -(-tokens // 128) * 128


def read(config: Config, params, ids, position, length, cache):
    """`prefill` of arguments placed as results of calls are: so all calls of a size are one program."""
    placed = jax.device_put((ids, position, length, cache), jax.devices()[0])
    return prefill(config, PLAIN, params, *placed)


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: Config, params, ids, position, cache):
    """Streams after every block, logits of every token, and the cache."""
    model = bind(config, PLAIN, params)
    length = jnp.full(ids.shape[0], ids.shape[1], jnp.int32)
    before: Any = jnp.repeat(model.embed(ids)[:, :, None], config.hc_mult, axis=2)
    after = []
    for layer, block in enumerate(model.layers):
        before, _ = block(before, ids, position, length, cache[layer])
        after.append(before.written())
    return after, model.logits(after[-1])


def plain(loaded: LoadedModel, inputs: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
    """Keys plain/...: `steps` of the input tokens are fed one at a time."""
    config, params = loaded.config, loaded.params
    ids = jnp.asarray(inputs["in/plain/input_ids"], jnp.int32)
    batch, total = ids.shape
    prompt = total - steps
    start, whole = jnp.zeros(batch, jnp.int32), jnp.full(batch, prompt, jnp.int32)

    cache = make_cache(config, PLAIN, batch=batch, max_len=room(total))
    whole_text, logits = _forward(config, params, ids, start, cache)
    after, logits = [streams[:, :prompt] for streams in whole_text], logits[:, :prompt]
    out = {f"plain/block_out/{layer}": streams for layer, streams in enumerate(after)}
    out = {key: value[:, inputs["in/plain/block_out_positions"]] for key, value in out.items()}
    out["plain/final_stream"] = after[-1][..., ::16].astype(jnp.float16)
    out["plain/argmax_all"] = logits.argmax(-1).astype(jnp.int16)
    out["plain/logits_all_sample"] = logits[..., inputs["in/plain/sample_token_ids"]]

    last, cache = read(config, params, ids[:, :prompt], start, whole, cache)
    out["plain/prefill_last_logits"] = last
    rows = []
    for position in range(prompt, total):
        row, cache = decode_step(config, PLAIN, params, ids[:, position], jnp.full(batch, position), cache)
        rows.append(row)
    stepped = jnp.stack(rows, 1)
    out["plain/decode_logits"] = stepped[0]
    out["plain/decode_logits_row1"] = stepped[1][:, inputs["in/plain/decode_row1_token_ids"]]
    out["plain/decode_argmax"] = stepped.argmax(-1).astype(jnp.int16)
    if loaded.mtp_params is not None:
        out |= _mtp(loaded, inputs, ids, prompt, whole_text[-1])
    return {key: np.asarray(value) for key, value in out.items()}


@functools.partial(jax.jit, static_argnums=0)
def _mtp_forward(config: Config, params, mtp_params, streams, next_ids, position, cache):
    model, head = bind(config, PLAIN, params), bind_mtp(config, PLAIN, mtp_params)
    length = jnp.full(next_ids.shape[0], next_ids.shape[1], jnp.int32)
    streams, cache = head(model, streams, next_ids, position, length, cache)
    return head.logits(model, streams), cache


def _mtp(loaded: LoadedModel, inputs, ids: jax.Array, prompt: int, streams) -> dict[str, jax.Array]:
    """Those of the head, from the main model's streams of all tokens."""
    config, steps = loaded.config, 4
    batch, total = ids.shape
    start = jnp.zeros(batch, jnp.int32)
    run = functools.partial(_mtp_forward, config, loaded.params, loaded.mtp_params)

    window = make_mtp_cache(config, PLAIN, batch=batch, max_len=room(total))
    logits, window = run(streams[:, :prompt], ids[:, 1 : prompt + 1], start, window)
    rows = []
    for position in range(prompt, prompt + steps):
        here, token = streams[:, position, None], ids[:, position + 1, None]
        row, window = run(here, token, jnp.full(batch, position), window)
        rows.append(row[:, 0])
    return {
        "plain/mtp_logits": logits[:, inputs["in/plain/mtp_positions"]],
        "plain/mtp_step_logits": jnp.stack(rows, 1),
    }


def greedy(
    loaded: LoadedModel, prompts: dict[str, np.ndarray], tokens: int = 32, like: tuple[int, int] = (0, 0)
) -> dict[str, np.ndarray]:
    """Keys greedyN/...: the continuation, and the logits that choose its first and last token.

    All prompts are rows of one batch, each padded to the longest.

    Args:
      like: tokens to read at once, and in all, at least: with those of `plain` its program reads these too.
    """
    if not prompts:
        return {}
    config, params = loaded.config, loaded.params
    lengths = jnp.array([prompt.shape[1] for prompt in prompts.values()], jnp.int32)
    batch, longest = len(prompts), max(int(lengths.max()), tokens - 1)
    ids = np.stack([np.pad(prompt[0], (0, longest - prompt.shape[1])) for prompt in prompts.values()])
    ids, max_len = jnp.asarray(ids, jnp.int32), room(max(longest + tokens, like[1]))
    sampling = SamplingArrays.stack([SamplingParams(temperature=0.0)] * batch)
    requests = Requests(sampling, jnp.full(batch, tokens), jnp.zeros(batch, bool))
    written = generate(config, PLAIN, params, ids, lengths, requests, max_new=tokens, max_len=max_len).tokens

    cache = make_cache(config, PLAIN, batch=batch, max_len=max_len)
    ids = jnp.pad(ids, ((0, 0), (0, max(0, like[0] - longest))))
    first, cache = read(config, params, ids, jnp.zeros_like(lengths), lengths, cache)
    again = jnp.zeros_like(ids).at[:, : tokens - 1].set(written[:, :-1])  # the last token is not read back
    last, _ = read(config, params, again, lengths, jnp.full_like(lengths, tokens - 1), cache)
    out = {}
    for row, name in enumerate(prompts):
        out[f"{name}/tokens"] = written[row, None].astype(jnp.int16)
        out[f"{name}/first_logits"], out[f"{name}/last_logits"] = first[row, None], last[row, None]
    return {key: np.asarray(value) for key, value in out.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_block(config: Config, graphdef, params, streams, ids, cache: LayerCache):
    """One block over a whole text, its cache, and the entries its indexer chose (None without one)."""
    block = nnx.merge(graphdef, params)
    start, length = jnp.zeros(1, jnp.int32), jnp.full(1, ids.shape[1], jnp.int32)
    out, after = block(streams, ids, start, length, cache)
    out = out.written()
    if block.attn.ratio != 4:
        return out, after, None
    attention, x = block.attn, block.hc_attn.read(streams, block.attn_norm)[0]
    positions = jnp.arange(ids.shape[1])[None]
    turns = rotation(positions, rope_frequencies(config, attention.ratio))
    q_latent, *_ = attention.latents(x, turns, after.window, start, length)
    return out, after, attention.choose(attention.projected(x), q_latent, turns, positions, after)


def kvquant(loaded: LoadedModel, inputs: dict[str, np.ndarray], numerics: Numerics = KVQUANT):
    """Keys kvquant/...: each block alone on a stored input, a batch of one from position 0."""
    config, out = loaded.config, {}
    ids = jnp.asarray(inputs["in/kvquant/input_ids"], jnp.int32)[None]
    tokens = ids.shape[1]
    for layer, ratio in enumerate(config.main_ratios):
        step = inputs[f"in/kvquant/block_in_step/{layer}"]
        streams = jnp.asarray(inputs[f"in/kvquant/block_in/{layer}"].astype(np.float32) * step)[None]
        empty = LayerCache.zeros(config, numerics, ratio, batch=1, max_len=room(tokens), max_draft=0)
        graphdef, _ = nnx.split(declare(config, numerics).layers[layer])
        params = loaded.params["layers"][layer]
        block_out, cache, chosen = _one_block(config, graphdef, params, streams, ids, empty)
        window = min(config.sliding_window, tokens)
        out[f"kvquant/block_out/{layer}"] = block_out[0, inputs["in/kvquant/block_out_positions"]]
        out[f"kvquant/window_kv/{layer}"] = cache.window.before(jnp.full(1, tokens), window)[0]
        if ratio:
            out[f"kvquant/compressed_kv/{layer}"] = newest(cache.compressed, tokens // ratio)
        if chosen is not None:
            out[f"kvquant/indexer_k/{layer}"] = newest(cache.index, tokens // ratio)
            out[f"kvquant/indexer_selected/{layer}"] = ascending(np.asarray(chosen[0]))
    return {key: np.asarray(value) for key, value in out.items()}


def newest(cache: CompressedCache | None, count: int) -> jax.Array:
    """The last of the first sequence's `count` entries, as many as are listed."""
    assert cache is not None, "the layer's ratio says it has entries"
    return decode_rows(cache.entries)[0, max(0, count - LISTED_ENTRIES) : count]


def ascending(chosen: np.ndarray) -> np.ndarray:
    """Each row sorted, its -1 padding last."""
    last = np.iinfo(np.int32).max
    ordered = np.sort(np.where(chosen < 0, last, chosen), axis=-1)
    return np.where(ordered == last, -1, ordered).astype(np.int16)


def outputs(loaded: LoadedModel, inputs: dict[str, np.ndarray], only: str | None) -> dict[str, np.ndarray]:
    """All outputs that the inputs ask for, or those of one numeric mode."""
    out: dict[str, np.ndarray] = {}
    like = 0, 0
    if "in/plain/input_ids" in inputs and only != "kvquant":
        steps = inputs["plain/decode_logits"].shape[0] if "plain/decode_logits" in inputs else 40
        total = inputs["in/plain/input_ids"].shape[1]
        like = total - steps, total
        out |= plain(loaded, inputs, steps)
    if only != "kvquant":
        prompts = {
            match[1]: value
            for key, value in inputs.items()
            if (match := re.fullmatch(r"in/(\w+)/prompt", key))
        }
        out |= greedy(loaded, prompts, like=like)
    if "in/kvquant/input_ids" in inputs and only != "plain":
        out |= kvquant(loaded, inputs)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder in the official format")
    parser.add_argument("inputs", type=Path, help="npz with keys in/...")
    parser.add_argument("out", type=Path, help="npz to write")
    parser.add_argument("--numerics", choices=["plain", "kvquant"], help="only this mode (default: both)")
    arguments = parser.parse_args()
    if not arguments.inputs.is_file():
        parser.error(f"no such file: {arguments.inputs}")
    with np.load(arguments.inputs, allow_pickle=False) as archive:
        inputs = dict(archive)
    try:
        config = Config.from_pretrained(arguments.checkpoint)
        loaded = load(arguments.checkpoint, mtp=config.draft == "mtp")
    except DSV4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    out = outputs(loaded, inputs, arguments.numerics)
    if not out:
        parser.error(f"{arguments.inputs} holds none of in/plain/..., in/greedy*/prompt, in/kvquant/...")
    np.savez(arguments.out, allow_pickle=False, **out)
    print(f"{len(out)} arrays written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
