"""Each module against the official implementation: every array of fixtures.npz, in plain float32."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.cache import CompressedCache, LayerCache
from dsv4_jax.config import FLASH, Config
from dsv4_jax.model import declare
from dsv4_jax.nn.attention import Attention
from dsv4_jax.nn.rope import rope_frequencies, rotation
from dsv4_jax.numerics import PLAIN
from pallas_kernels import attention_unrotate, decode_rows, hc_post, index_scores
from pallas_kernels.attention_inputs.reference import rotate

CHECKPOINTS = ["tiny-fp4", "tiny-fp8"]
DATA = Path(__file__).parents[1] / "data"
PREFILL = 120  # tokens before the single steps
STEPS_LISTED, ENTRIES_LISTED, STEP_ENTRIES_LISTED = 12, 20, 4  # the newest ones

Outputs = dict[str, jax.Array]


def reference_keys(checkpoint: str) -> list[str]:
    with np.load(DATA / checkpoint / "fixtures.npz", allow_pickle=False) as archive:
        return [key for key in archive.files if not key.startswith(("in/", "info/"))]


def _submodule(module: nnx.Module, params, *path):
    """A part of a module, and its parameters, found by the same path in both."""
    for key in path:
        module = module[key] if isinstance(key, int) else getattr(module, key)
        params = params[key]
    return module, params


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(call: Callable, graphdef, params, *arguments):
    return call(nnx.merge(graphdef, params), *arguments)


def run(golden, call: Callable, *arguments, path: tuple = ()):
    """`call` on the part of the model that `path` leads to, jitted, and then `arguments`."""
    module, params = _submodule(declare(golden.loaded.config, PLAIN), golden.loaded.params, *path)
    return _apply(call, nnx.split(module)[0], params, *arguments)


def inputs(golden) -> jax.Array:
    """The normalised input of attention, router and experts."""
    return jnp.asarray(golden.fixtures["in/x"].astype(np.float32) / 32)


def streams(golden) -> jax.Array:
    return jnp.asarray(golden.fixtures["in/streams"].astype(np.float32) / 32)


def ids(golden) -> jax.Array:
    return jnp.asarray(golden.fixtures["in/ids"], jnp.int32)


# One function a family of keys, named by the first part of the key.


def _hyper_connection(connection, streams):
    x, residual = connection.read(streams, None)
    out = {"pre_out": x, "post": residual.post, "comb": residual.comb}
    return out | {"post_out": hc_post(x, *residual)}


def hyper_connections(golden) -> Outputs:
    out = {"hc/head_out": run(golden, lambda model, x: model.hc_head(x), streams(golden))}
    for kind in ("attn", "ffn"):
        found = run(golden, _hyper_connection, streams(golden), path=("layers", 0, f"hc_{kind}"))
        out |= {f"hc/{kind}/{name}": value for name, value in found.items()}
    return out


def head(golden) -> Outputs:
    normed = run(golden, lambda model, x: model.norm(model.hc_head(x)), streams(golden))
    return {
        "head/norm_out": normed,
        "head/logits": run(golden, lambda model, x: model.logits(x), streams(golden)),
    }


def rope(golden) -> Outputs:
    x, position = golden.fixtures["in/rope_in"], jnp.asarray(golden.fixtures["in/rope_positions"], jnp.int32)
    turn = jax.jit(rotate)
    out = {}
    for kind, ratio in {"plain": 0, "yarn": 4}.items():
        frequencies = rope_frequencies(golden.loaded.config, ratio)
        cos, sin = (each[None] for each in rotation(position, frequencies))
        out[f"rope/{kind}/forward"] = turn(x, cos[:, :, None], sin[:, :, None])
        out[f"rope/{kind}/inverse"] = attention_unrotate(x, cos, sin)
    return out


def _prefill_and_steps(attention: Attention, x, whole: LayerCache, stepped: LayerCache):
    """Attention over all of `x` at once; and over its beginning at once, then token by token."""
    start, tokens = jnp.zeros(1, jnp.int32), x.shape[1]
    out, whole = attention(x, start, jnp.full(1, tokens), whole)
    _, stepped = attention(x[:, :PREFILL], start, jnp.full(1, PREFILL), stepped)

    def step(cache, position):
        one = jax.lax.dynamic_slice_in_dim(x, position, 1, axis=1)
        out, cache = attention(one, position[None], jnp.ones(1, jnp.int32), cache)
        return cache, out[0, 0]

    stepped, steps = jax.lax.scan(step, stepped, jnp.arange(PREFILL, tokens))
    return out[0], whole, steps, stepped


def _indexer(attention: Attention, x, cache: LayerCache):
    """Scores of all queries for all entries, and the entries chosen."""
    assert cache.index is not None
    positions, start, length = jnp.arange(x.shape[1])[None], jnp.zeros(1, jnp.int32), jnp.full(1, x.shape[1])
    turns = rotation(positions, rope_frequencies(attention.config, attention.ratio))
    q_latent, *_ = attention.latents(x, turns, cache.window, start, length)
    projected = attention.projected(x)
    q, weights = attention.indexer.queries(projected, attention.compressor.columns, q_latent, turns)
    scores = index_scores(q, cache.index.entries, weights)[0]
    return scores, attention.choose(projected, q_latent, turns, positions, cache)[0]


def attention(golden, ratio: int) -> Outputs:
    config: Config = golden.loaded.config
    x, tokens = inputs(golden), golden.fixtures["in/x"].shape[1]
    at = jnp.asarray(golden.fixtures["in/attn_positions"])
    path = ("layers", config.main_ratios.index(ratio), "attn")
    empty = LayerCache.zeros(config, PLAIN, ratio, batch=1, max_len=tokens, max_draft=0)
    out, cache, steps, stepped = run(golden, _prefill_and_steps, x, empty, empty, path=path)

    end, name = jnp.full(1, tokens), f"attn_m{ratio}"
    found = {
        f"{name}/out": out[at],
        f"{name}/step_out": steps[-STEPS_LISTED:],
        f"{name}/window_kv": cache.window.before(end, config.sliding_window)[0],
    }
    if cache.compressed is not None:
        entries = newest(cache.compressed, tokens // ratio, ENTRIES_LISTED)
        found[f"{name}/compressor/entries"] = entries
        entries_step = newest(stepped.compressed, tokens // ratio, STEP_ENTRIES_LISTED)
        found[f"{name}/compressor/entries_step"] = entries_step
        # The official state holds the tokens of the window under way, and of the one before where windows
        # overlap. Ours keeps raw rows by position, so these are simply the last ones.
        pending = tokens % ratio + (ratio if ratio == 4 else 0)
        found[f"{name}/compressor/kv_state"] = cache.compressed.kv.before(end, pending)[0]
        found[f"{name}/compressor/score_state"] = cache.compressed.score.before(end, pending)[0]
    if cache.index is not None:
        scores, chosen = run(golden, _indexer, x, cache, path=path)
        visible = jnp.arange(tokens // ratio) < (at[:, None] + 1) // ratio
        found[f"{name}/indexer/scores"] = jnp.where(visible, scores[at, : tokens // ratio], 0)
        found[f"{name}/indexer/selected"] = ascending(chosen)
        found[f"{name}/indexer/keys"] = newest(cache.index, tokens // ratio, ENTRIES_LISTED)
    return found


def newest(cache: CompressedCache, count: int, listed: int) -> jax.Array:
    return decode_rows(cache.entries)[0, max(0, count - listed) : count]


def ascending(chosen: jax.Array) -> jax.Array:
    last = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(chosen < 0, last, chosen), axis=-1)
    return jnp.where(ordered == last, -1, ordered)


def _routed(gate, x, ids):
    experts, weights = gate(x, ids)
    order = jnp.argsort(experts, axis=-1)
    return jnp.take_along_axis(experts, order, -1), jnp.take_along_axis(weights, order, -1)


def router(golden) -> Outputs:
    last = golden.loaded.config.num_hidden_layers - 1
    out = {}
    for kind, layer in {"hash": 0, "topk": last}.items():
        arguments = inputs(golden)[0, :16], ids(golden)[:16]
        experts, weights = run(golden, _routed, *arguments, path=("layers", layer, "ffn", "gate"))
        out |= {f"router/{kind}/experts": experts, f"router/{kind}/weights": weights}
    return out


def experts(golden) -> Outputs:
    path = ("layers", golden.loaded.config.num_hidden_layers - 1, "ffn")
    x = inputs(golden)[0, :16]
    one, weights = jnp.ones((16, 1), jnp.int32), jnp.asarray(golden.fixtures["router/topk/weights"][:, :1])
    return {
        "expert/routed1": run(golden, lambda moe, *rest: moe.experts(*rest), x, one, weights, path=path),
        "expert/shared": run(golden, lambda moe, x: moe.shared_experts(x), x, path=path),
    }


def mixture(golden) -> Outputs:
    path = ("layers", golden.loaded.config.num_hidden_layers - 1, "ffn")
    arguments = inputs(golden)[:, :16], ids(golden)[None, :16]
    return {"moe/out": run(golden, lambda moe, x, ids: moe(x, ids)[0], *arguments, path=path)}


FAMILIES: dict[str, Callable[..., Outputs]] = {
    "hc": hyper_connections,
    "head": head,
    "rope": rope,
    "attn_m0": functools.partial(attention, ratio=0),
    "attn_m4": functools.partial(attention, ratio=4),
    "attn_m128": functools.partial(attention, ratio=128),
    "router": router,
    "expert": experts,
    "moe": mixture,
}


@pytest.fixture(scope="module")
def outputs(load_golden) -> Callable[[str, str], dict[str, np.ndarray]]:
    """What our modules give for a family of keys, computed once."""

    @functools.cache
    def of_family(checkpoint: str, family: str) -> dict[str, np.ndarray]:
        return {key: np.asarray(value) for key, value in FAMILIES[family](load_golden(checkpoint)).items()}

    return of_family


@pytest.mark.parametrize(
    ("checkpoint", "key"),
    [(checkpoint, key) for checkpoint in CHECKPOINTS for key in reference_keys(checkpoint)],
)
def test_a_module_gives_what_the_official_one_gives(checkpoint, key, load_golden, outputs):
    found = outputs(checkpoint, key.split("/")[0])

    load_golden(checkpoint).assert_agrees(key, found[key])


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_reference_array_is_tested(checkpoint, outputs):
    keys = reference_keys(checkpoint)

    families = {key.split("/")[0] for key in keys}
    found = [key for family in families for key in outputs(checkpoint, family)]

    assert sorted(found) == sorted(keys)


def test_yarn_keeps_fast_frequencies_and_slows_the_others_down():
    frequencies = rope_frequencies(FLASH, 4)

    # A ramp from pair 15 to pair 25, a sixteenth after it; written with seven digits.
    pairs = [0, 1, 14, 15, 16, 17, 20, 24, 25, 31]
    expected = [1, 0.6876560, 5.286857e-3, 3.635539e-3, 2.265625e-3, 1.396801e-3]
    expected += [2.969778e-4, 1.953125e-5, 5.372312e-6, 5.680529e-7]
    np.testing.assert_allclose(frequencies[pairs], expected, rtol=5e-7)


def test_layers_that_do_not_compress_turn_at_plain_frequencies():
    frequencies = rope_frequencies(FLASH, 0)

    np.testing.assert_allclose(frequencies, [10000 ** (-2 * pair / 64) for pair in range(32)], rtol=2**-23)
