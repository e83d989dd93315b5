"""Caches in FP8 and FP4: what is kept in them changes no bit of what attention gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.cache import LayerCache
from dsv4_jax.model import declare
from dsv4_jax.numerics import KVQUANT, OFFICIAL, Numerics
from pallas_kernels import QuantArray, QuantKV, decode_rows

TOKENS, PREFILL, DRAFTS = (
    75,
    61,
    2,
)  # past the window of 16, its wrap and the 8 entries that the indexer takes


def run(golden, layer: int, numerics: Numerics, kept: Numerics):
    """One attention over a text, first most of it at once, then some tokens at a time; outputs and cache."""
    config = golden.loaded.config
    cache = LayerCache.zeros(
        config, kept, config.main_ratios[layer], batch=2, max_len=TOKENS, max_draft=DRAFTS
    )
    graphdef, _ = nnx.split(declare(config, numerics).layers[layer].attn)

    @jax.jit
    def attend(params, x, start, cache):
        positions = jnp.full(2, start)
        return nnx.merge(graphdef, params)(x, positions, jnp.full(2, x.shape[1]), cache)

    x = jax.random.normal(jax.random.key(layer), (2, TOKENS, config.hidden_size), jnp.dtype(numerics.dtype))
    params, outs = golden.loaded.params["layers"][layer]["attn"], []
    for start, end in [(0, PREFILL), *((at, at + 2) for at in range(PREFILL, TOKENS, 2))]:
        out, cache = attend(params, x[:, start:end], start, cache)
        outs.append(out)
    return outs, cache


@pytest.mark.parametrize(("layer", "numerics"), [(1, OFFICIAL), (2, KVQUANT)], ids=["CSA", "HCA"])
def test_a_cache_of_codes_gives_the_bits_of_a_cache_of_numbers(tiny_fp4, layer, numerics):
    numbers = dataclasses.replace(numerics, kv=None, index=None)

    outs, cache = run(tiny_fp4, layer, numerics, kept=numerics)
    expected, plain = run(tiny_fp4, layer, numerics, kept=numbers)

    assert isinstance(cache.window.rows, QuantKV)
    assert isinstance(cache.compressed.entries, QuantKV)
    assert layer != 1 or isinstance(cache.index.entries, QuantArray)
    for found, right in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(right, np.float32))
    for found, right in ((cache.window.rows, plain.window.rows), (cache.compressed, plain.compressed)):
        found, right = (getattr(each, "entries", each) for each in (found, right))
        np.testing.assert_array_equal(decode_rows(found, jnp.float32), decode_rows(right, jnp.float32))
