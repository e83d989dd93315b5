#!/usr/bin/env python3
"""Whether one layer still finds what it looks for in a long text: our kernels against a dense oracle.

A CSA layer at full width, with made-up weights, reads texts of growing length in pieces, its caches in FP8
and FP4. At 10, 50 and 90% of a text, and at its end, the heads' results of one token are held against an
oracle, as a decode step gives them and as the first token of the next piece. The oracle keeps no cache and
reads no pieces: from the whole text it makes every entry and every index key anew, in float32 and rounded
where the model rounds; it scores all of them, takes the best, and attends with one dense softmax.

  error      of the results, relative to the oracle's, where both attend to what the layer chose
  in common  chosen entries that the oracle would choose too: rounding decides between about equal ones
  gap        how much better, at most, an entry is that was not chosen, in spreads of all scores (of both
             these the worse of decode step and piece)
  by chance  the gap of the oracle's own choice if its products are off as a tensor core's are: FP4 makes
             much of little, since a number near the border of two codes takes the other one
  own error  as error, where the oracle attends to what it would have chosen itself

  python scripts/bench/needle.py --results scripts/bench/results/needle/h200.json
  python scripts/bench/needle.py --contexts 2k 27k
  python scripts/bench/needle.py --model tiny --contexts 90 250 --piece 128     without a GPU
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent))

from harness import facts
from made_up import made_up_params

from dsv4_jax.cache import LayerCache
from dsv4_jax.config import PRESETS, Config
from dsv4_jax.model import declare
from dsv4_jax.nn.attention import Attention
from dsv4_jax.nn.rope import rope_frequencies, rotation
from dsv4_jax.numerics import OFFICIAL
from pallas_kernels import QuantArray, dequantize, fake_quantize
from pallas_kernels.dispatch import choose

CONTEXTS = ("1900", "3600", "5300", "7000", "27k", "84k", "256k", "1M")
DEPTHS = (0.1, 0.5, 0.9, 1.0)
RATIO, PIECE, AT_ONCE = 4, 4096, 8192  # tokens that the layer, that the oracle reads at once
ROOMS = (2**13, 2**17, 2**20)  # tokens of the caches: contexts share them, and their programs
ATTENTION = ("layers", 0, "attn")
# Else XLA leaves out roundings between the steps of a program, in the layer other ones than in the oracle.
_AS_WRITTEN = {"xla_allow_excess_precision": False}
# Both round alike, but where a sum is off by its last bit an FP8 number of the caches may be its neighbour.
MOST_ERROR = 2e-2
# FP8 tensor cores keep about 14 bits of a sum over 32 columns; at least twice that error is drawn, and what
# is chosen may be worse by twice the worst of the draws, or by 0.1 where these are fortunate.
NOISE, DRAWS, TIMES, MOST_GAP = 2.0**-12, 8, 2.0, 0.1


def one_layer(config: Config) -> Config:
    """A model of a single CSA layer."""
    return dataclasses.replace(config, num_hidden_layers=1, num_hash_layers=0, compress_ratios=(RATIO, 0))


@functools.partial(jax.jit, static_argnums=(0, 2))
def text(hidden: int, piece: jax.Array, tokens: int) -> jax.Array:
    """[1, tokens, hidden] bfloat16: what the layer is given of a piece of the text."""
    key = jax.random.fold_in(jax.random.key(7, impl="rbg"), piece)
    return jax.random.normal(key, (1, tokens, hidden), jnp.bfloat16)


# --- the layer


@dataclasses.dataclass
class Layer:
    """Our attention, and what it remembers of a text of up to `max_len` tokens."""

    config: Config
    params: Any
    max_len: int

    def __post_init__(self):
        self.forget()

    def forget(self) -> None:
        max_len = self.max_len + PIECE
        self.cache = LayerCache.zeros(self.config, OFFICIAL, RATIO, batch=1, max_len=max_len, max_draft=0)

    def compile(self, piece: int, implementation: str | None) -> None:
        x = {
            tokens: jax.ShapeDtypeStruct((1, tokens, self.config.hidden_size), jnp.bfloat16)
            for tokens in (1, piece)
        }
        row = jax.ShapeDtypeStruct((1,), jnp.int32)
        with choose(implementation):
            read, peek = (
                jax.jit(
                    functools.partial(function, self.config),
                    donate_argnums=donated,
                    compiler_options=_AS_WRITTEN,
                )
                for function, donated in ((_read, 3), (_peek, ()))
            )
            self.read_piece = read.lower(self.params, x[piece], row, self.cache, row).compile()
            self.peek = peek.lower(self.params, x[1], row, self.cache).compile()


def _attention(config: Config, params: Any) -> Attention:
    return nnx.merge(nnx.split(declare(config, OFFICIAL).layers[0].attn)[0], params)


def _read(config: Config, params: Any, x, position, cache, length):
    """The first token's results and the entries that it chose; the cache with all tokens in it."""
    attention = _attention(config, params)
    out, after = attention.attend(x, position, length, cache)
    positions = position[:, None] + jnp.arange(x.shape[1])
    turns = rotation(positions, rope_frequencies(config, RATIO))
    q_latent, _, _ = attention.latents(x, turns, after.window, position, length)
    chosen = attention.choose(attention.projected(x), q_latent, turns, positions, after)
    return (out[0, 0], chosen[0, 0]), after


def _peek(config: Config, params: Any, x, position, cache):
    """As `_read` of one token; the cache stays as it is."""
    return _read(config, params, x, position, cache, jnp.ones(1, jnp.int32))[0]


# --- the oracle


def _wide(weight: jax.Array | QuantArray) -> jax.Array:
    return dequantize(weight) if isinstance(weight, QuantArray) else weight.astype(jnp.float32)


def _rounded(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def _product(x: jax.Array, weight: jax.Array | QuantArray, noise: jax.Array | None = None) -> jax.Array:
    """In float32; a quantised weight takes its input rounded, as the model was trained.

    `noise` is a key, of errors in the size of a tensor core's.
    """
    quantized = isinstance(weight, QuantArray)
    x = fake_quantize(x, "fp8_token128") if quantized else x
    product = jnp.einsum("...i,oi->...o", x, _wide(weight), precision="highest")
    if noise is not None:
        product += NOISE * jnp.std(product) * jax.random.normal(noise, product.shape)
    return _rounded(product) if quantized else product


def _normed(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    return _rounded(x if weight is None else x * weight.astype(jnp.float32))


def _turned(config: Config, x: jax.Array, position: jax.Array, inverse: bool = False) -> jax.Array:
    """The last columns as complex numbers, times those of the positions."""
    plain, pairs = x[..., : -config.qk_rope_head_dim], x[..., -config.qk_rope_head_dim :]
    angle = position[..., None].astype(jnp.float32) * rope_frequencies(config, RATIO)
    turn = jnp.exp((-1j if inverse else 1j) * angle)
    turned = jax.lax.complex(pairs[..., ::2], pairs[..., 1::2]) * turn
    turned = _rounded(jnp.stack([turned.real, turned.imag], -1).reshape(pairs.shape))
    return jnp.concatenate([plain, turned], -1)


def _kept(config: Config, x: jax.Array) -> jax.Array:
    """Keys and values as the cache holds them."""
    plain, turned = x[..., : -config.qk_rope_head_dim], x[..., -config.qk_rope_head_dim :]
    return jnp.concatenate([fake_quantize(plain, "fp8_block64"), turned], -1)


def _transformed(x: jax.Array) -> jax.Array:
    """Each pair of halves becomes sum and difference, again and again; then as the cache holds index keys."""
    size = x.shape[-1]
    for width in (1 << bit for bit in range(size.bit_length() - 1)):
        pairs = x.reshape(*x.shape[:-1], -1, 2, width)
        x = jnp.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
        x = x.reshape(*x.shape[:-3], size)
    return fake_quantize(_rounded(x * size**-0.5), "fp4_group32")


def _pooled(config: Config, params: Any, x: jax.Array, position: jax.Array, first: jax.Array) -> jax.Array:
    """[entries, head_dim] of the tokens x, which stand from `first` on, a window before the first entry."""
    kv, score = (_product(x, params[name]["weight"]) for name in ("wkv", "wgate"))
    windows = len(x) // RATIO
    score = score.reshape(windows, RATIO, -1) + params["ape"]
    score = jnp.where((jnp.arange(windows) * RATIO + first < 0)[:, None, None], -jnp.inf, score)
    kv, width = kv.reshape(windows, RATIO, -1), kv.shape[-1] // 2
    # An entry sees the window before its own through the first half of the channels.
    kv = jnp.concatenate([kv[:-1, :, :width], kv[1:, :, width:]], 1)
    score = jnp.concatenate([score[:-1, :, :width], score[1:, :, width:]], 1)
    pooled = _rounded((jax.nn.softmax(score, 1) * kv).sum(1))
    return _turned(config, _normed(pooled, params["norm"]["weight"], config.rms_norm_eps), position)


@functools.partial(jax.jit, static_argnums=0, compiler_options=_AS_WRITTEN)
def entries_of(config: Config, params: Any, x: jax.Array, before: jax.Array, first: jax.Array):
    """Entries and index keys of tokens x [T, hidden], from `first` on, and the window `before` them."""
    x = jnp.concatenate([before, x]).astype(jnp.float32)
    position = first + jnp.arange(len(x) // RATIO - 1) * RATIO
    entries = _pooled(config, params["compressor"], x, position, first - RATIO)
    keys = _pooled(config, params["indexer"]["compressor"], x, position, first - RATIO)
    return _kept(config, entries), _transformed(keys)


def _latent(config: Config, params: Any, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    """What the queries of token x are made of."""
    product = _product(x, params["wq_a"]["weight"], noise)
    return _normed(product, params["q_norm"]["weight"], config.rms_norm_eps)


def _scores(config: Config, params: Any, x: jax.Array, position: jax.Array, keys: jax.Array, noise: Any):
    """Of all entries for token x, -infinity of those to come; `noise` is a key or None."""
    index, shape = params["indexer"], (config.index_n_heads, config.index_head_dim)
    first, second, third = (None,) * 3 if noise is None else jax.random.split(noise, 3)
    latent = _latent(config, params, x, first)
    asked = _product(latent, index["wq_b"]["weight"], second).reshape(shape)
    asked = _transformed(_turned(config, asked, position))
    weights = _rounded(_product(x, index["weights_proj"]["weight"], third))
    weights = _rounded(weights * _rounded(jnp.float32((shape[0] * shape[1]) ** -0.5)))
    scores = jnp.einsum("ij,sj->is", asked, keys, precision="highest")
    scores = jnp.einsum("i,is->s", weights, jax.nn.relu(scores), precision="highest")
    return jnp.where(jnp.arange(len(keys)) < (position + 1) // RATIO, scores, -jnp.inf)


def _mask(size: int, index: jax.Array, there: jax.Array) -> jax.Array:
    return jnp.zeros(size, bool).at[jnp.where(there, index, size)].set(True, mode="drop")


def _best(config: Config, scores: jax.Array) -> jax.Array:
    """The best of them as a mask."""
    best, index = jax.lax.top_k(scores, min(config.index_topk, len(scores)))
    return _mask(len(scores), index, best > -jnp.inf)


@functools.partial(jax.jit, static_argnums=0, compiler_options=_AS_WRITTEN)
def choice_by_chance(config: Config, params: Any, x: jax.Array, position: jax.Array, keys, noise):
    """[draws, entries]: the oracle's choice for token x, as masks, by products that are off."""

    def one(noise: jax.Array) -> jax.Array:
        return _best(config, _scores(config, params, x.astype(jnp.float32), position, keys, noise))

    return jax.lax.map(one, noise)


@functools.partial(jax.jit, static_argnums=0, compiler_options=_AS_WRITTEN)
def oracle(config: Config, params: Any, recent: jax.Array, position: jax.Array, entries, keys, chosen):
    """Results by the entries chosen, and by its own choice; its scores [entries], its choice as a mask.

    `recent` are the tokens of the window, the last of which asks; of entries and keys all there are room for.
    """
    eps, heads, head_dim = config.rms_norm_eps, config.num_attention_heads, config.head_dim
    recent = recent.astype(jnp.float32)
    positions = position - jnp.arange(len(recent))[::-1]
    latent = _latent(config, params, recent[-1])
    q = _product(latent, params["wq_b"]["weight"]).reshape(heads, head_dim)
    q = _turned(config, _normed(q, None, eps), position)
    kv = _normed(_product(recent, params["wkv"]["weight"]), params["kv_norm"]["weight"], eps)
    kv = jnp.concatenate([_kept(config, _turned(config, kv, positions)), entries])

    scores = _scores(config, params, recent[-1], position, keys, None)

    def attended(taken: jax.Array) -> jax.Array:
        seen = jnp.concatenate([positions >= 0, taken])
        logits = jnp.einsum("hd,kd->hk", q, kv, precision="highest") * head_dim**-0.5
        logits = jnp.where(seen, logits, -jnp.inf)
        with_sink = jnp.concatenate([logits, params["attn_sink"][:, None]], 1)
        weights = jax.nn.softmax(with_sink, 1)[:, :-1]
        out = jnp.einsum("hk,kd->hd", weights, kv, precision="highest")
        return _turned(config, out, position, inverse=True)

    own = _best(config, scores)
    return attended(_mask(len(keys), chosen, chosen >= 0)), attended(own), scores, own


class Oracle:
    """Entries and index keys of the first tokens of the text, made once for all contexts."""

    def __init__(self, config: Config, params: Any, longest: int):
        self.config, self.params = config, params
        before = jnp.zeros((RATIO, config.hidden_size), jnp.bfloat16)
        found = []
        for piece in range(-(-longest // AT_ONCE)):
            x = text(config.hidden_size, jnp.int32(piece), AT_ONCE)[0]
            found.append(entries_of(config, params, x, before, jnp.int32(piece * AT_ONCE)))
            before = x[-RATIO:]
        self.entries, self.keys = (jnp.concatenate(parts) for parts in zip(*found, strict=True))

    def compare(self, recent: jax.Array, position: int, told: dict[str, tuple[jax.Array, jax.Array]]):
        """The row of one token, of whose results and chosen entries there is more than one account."""
        # Entries to come are left out in sizes that repeat, so that few programs are compiled.
        room = max(512, 1 << (position // RATIO).bit_length())
        entries, keys = self.entries[:room], self.keys[:room]
        draws = jax.random.split(jax.random.key(position), DRAWS)
        by_chance = np.asarray(
            choice_by_chance(self.config, self.params, recent[-1], jnp.int32(position), keys, draws)
        )
        row: dict[str, float] = {"own_error": 0.0, "in_common": 1.0, "gap": 0.0, "by_chance": 0.0}
        for name, (out, chosen) in told.items():
            by_theirs, by_own, scores, own = oracle(
                self.config, self.params, recent, jnp.int32(position), entries, keys, chosen
            )
            scores, best = np.asarray(scores), np.asarray(own)
            mine, places = np.zeros_like(best), np.asarray(chosen)
            mine[places[places >= 0]] = True
            row[name] = _error(out, by_theirs)
            row["own_error"] = max(row["own_error"], _error(out, by_own))
            row["in_common"] = min(row["in_common"], float((best & mine).sum() / max(best.sum(), 1)))
            row["gap"] = max(row["gap"], _gap(scores, best, mine))
            row["by_chance"] = max(row["by_chance"], *(_gap(scores, best, each) for each in by_chance))
            row |= {"chosen": int(mine.sum()), "visible": int(np.isfinite(scores).sum())}
        return row


def _gap(scores: np.ndarray, best: np.ndarray, taken: np.ndarray) -> float:
    """How far the best that was not taken is above the worst that was, in spreads of all scores."""
    missed, visible = scores[best & ~taken], np.isfinite(scores)
    if not missed.size:
        return 0.0
    return float((missed.max() - scores[taken].min(initial=np.inf)) / max(scores[visible].std(), 1e-30))


def _error(found: jax.Array, expected: jax.Array) -> float:
    ours, right = (np.asarray(each, np.float64) for each in (found, expected))
    return float(np.linalg.norm(ours - right) / np.linalg.norm(right))


# --- the ladder


def rungs(context: int) -> list[int]:
    """Positions that are asked at."""
    return sorted({max(int(context * depth) - 1, 0) for depth in DEPTHS})


def climb(layer: Layer, oracle: Oracle, context: int, piece: int) -> list[dict[str, Any]]:
    """Reads a text from rung to rung; the rows of all of them."""
    hidden, window, rows = layer.config.hidden_size, layer.config.sliding_window, []
    pieces = -(-context // AT_ONCE)
    x = jnp.concatenate([text(hidden, jnp.int32(number), AT_ONCE) for number in range(pieces)], 1)
    x = jnp.pad(x, ((0, 0), (window, piece), (0, 0)))  # so that all that is cut out of it is there

    def cut(start: int, tokens: int) -> jax.Array:
        return jax.lax.dynamic_slice(x, (0, start + window, 0), (1, tokens, hidden))

    def read(start: int, end: int) -> jax.Array:
        arguments = layer.params, cut(start, piece), jnp.array([start]), layer.cache, jnp.array([end - start])
        first, layer.cache = layer.read_piece(*arguments)
        return first

    layer.forget()
    place = 0
    for rung in rungs(context):
        while place < rung:
            end = min(place + piece, rung)
            read(place, end)
            place = end
        decode = layer.peek(layer.params, cut(rung, 1), jnp.array([rung]), layer.cache)
        told = {"decode": decode, "prefill": read(rung, rung + 1)}  # what it writes is written again
        row = oracle.compare(cut(rung - window + 1, window)[0], rung, told)
        rows.append({"context": context, "position": rung} | row)
    return rows


def right(row: dict[str, Any]) -> bool:
    """Whether the layer gave what it should; a NaN is wrong."""
    most = max(MOST_GAP, TIMES * row["by_chance"])
    return max(row["decode"], row["prefill"]) <= MOST_ERROR and row["gap"] <= most


def room(context: int) -> int:
    """Tokens of the caches for it."""
    return next((each for each in ROOMS if each >= context), context)


def _number(text: str) -> int:
    unit = {"k": 2**10, "M": 2**20}.get(text[-1])
    return int(text[:-1]) * unit if unit else int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(PRESETS), default="flash")
    parser.add_argument("--contexts", type=_number, nargs="+", default=[_number(each) for each in CONTEXTS])
    parser.add_argument("--piece", type=int, default=PIECE, help="tokens that are read at once")
    parser.add_argument("--implementation", help="as the command line's option; by default the fastest")
    parser.add_argument(
        "--seconds", type=float, default=120, help="of reading, after which no new context is begun"
    )
    parser.add_argument("--results", type=Path, help="JSON file to write rows to")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()

    config = one_layer(PRESETS[options.model])
    contexts = sorted(set(options.contexts))
    raw, laid_out = (
        made_up_params(config, within=ATTENTION, laid_out=each)[0]["layers"][0]["attn"]
        for each in (False, True)
    )
    oracle = Oracle(config, raw, contexts[-1])
    with ThreadPoolExecutor() as pool:
        layers = {size: Layer(config, laid_out, size) for size in {*map(room, contexts)}}
        compiled = [
            pool.submit(layer.compile, options.piece, options.implementation) for layer in layers.values()
        ]
        for future in compiled:
            future.result()
    print(f"# compiled; {time.perf_counter() - begun:.0f} s", flush=True)

    begun, rows = time.perf_counter(), []
    for context in contexts:
        if time.perf_counter() - begun > options.seconds:
            print(f"{context}: left out, {time.perf_counter() - begun:.0f} s have passed", flush=True)
            continue
        found = climb(layers[room(context)], oracle, context, options.piece)
        for row in found:
            print(
                f"{context:8} at {row['position']:8}: error {row['decode']:.1e} decode, {row['prefill']:.1e}"
                f" prefill; {row['in_common']:.4f} of {row['chosen']} in common, gap {row['gap']:.1e}, by"
                f" chance {row['by_chance']:.1e}, own error {row['own_error']:.1e}"
                f"{'' if right(row) else '  WRONG'}",
                flush=True,
            )
        rows += found
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        here = facts() | {"implementation": options.implementation or "default"}
        lines = ",\n".join(json.dumps(row | here) for row in rows)
        options.results.write_text(f"[\n{lines}\n]\n")
    return 0 if rows and all(map(right, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
