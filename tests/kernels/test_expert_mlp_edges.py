"""Every kernel of the experts at its edges, for compute-sanitizer: launches of few small arrays, unchecked.

Experts without tokens, tiles with one and with all of their tokens, the last of all rows, choices of none.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_expert_mlp import random_fp8_layer, random_layer

from pallas_kernels import Target, prepare_experts
from pallas_kernels.expert_mlp.plan import plan

kernels = pytest.importorskip("pallas_kernels.expert_mlp.triton")
few = pytest.importorskip("pallas_kernels.expert_mlp.mosaic_few")
many = pytest.importorskip("pallas_kernels.expert_mlp.mosaic_many")
configs = pytest.importorskip("pallas_kernels.expert_mlp.mosaic_config")

H200 = Target("cuda", "sm_90")
EXPERTS, HIDDEN, INNER, LIMIT = 5, 512, 512, 10.0


def prepared(layer) -> tuple:
    w13, w2, _ = prepare_experts(*layer(EXPERTS, HIDDEN, INNER), H200)
    return w13, w2


def routings(tokens: int) -> list[jax.Array]:
    """Two experts of each token: all but the first in turn; the last for nearly all of them; mostly none."""
    turn = np.arange(2 * tokens).reshape(tokens, 2) % (EXPERTS - 1) + 1
    skewed = np.stack([np.full(tokens, EXPERTS - 1), np.arange(tokens) // 9 % 2], 1)
    none = np.where(np.arange(tokens)[:, None] % 9, EXPERTS, turn)
    return [jnp.asarray(each, jnp.int32) for each in (turn, skewed, none)]


def requests(tokens: int, tile_rows: int):
    """Activations, plans and routing weights."""
    x = jax.random.normal(jax.random.key(tokens), (tokens, HIDDEN), jnp.bfloat16)
    for chosen in routings(tokens):
        yield x, plan(chosen, EXPERTS, tile_rows), jnp.where(chosen < EXPERTS, 0.5, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "fp8_token128"], ids=["A16", "A8"])
@pytest.mark.parametrize("layer", [random_layer, random_fp8_layer], ids=["FP4", "FP8"])
def test_triton_stays_inside_its_arrays_at_the_edges(layer, activation):
    weights = prepared(layer)
    operands = kernels.operands(weights[0], activation)
    for tokens in (1, 17, 600):
        sizes = kernels.tilings_for("sm_90", operands, 2048 if tokens == 1 else 6 * tokens)
        for request in requests(tokens, sizes.tile_rows):
            out = kernels.planned_mlp(*request, *weights, LIMIT, activation, sizes)
            assert bool(jnp.isfinite(out).all())


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "fp8_token128"], ids=["A16", "A8"])
def test_the_kernel_for_few_tokens_stays_inside_its_arrays_at_the_edges(activation):
    weights = prepared(random_layer)
    for tokens, tile in ((1, 8), (3, 8), (17, 16), (129, 24)):
        config = configs.deepest_few(HIDDEN, tile, terms=1 if activation else 2)
        for request in requests(tokens, tile):
            assert bool(jnp.isfinite(few.planned_mlp(*request, *weights, LIMIT, config)).all())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "each", [each for _, each in configs.CONFIGS], ids=lambda each: str(each.gate_up.tokens)
)
def test_the_kernel_for_many_tokens_stays_inside_its_arrays_at_the_edges(each):
    weights = prepared(random_layer)
    for tokens in (1, 129):
        for request in requests(tokens, each.gate_up.tokens):
            assert bool(jnp.isfinite(many.planned_mlp(*request, *weights, LIMIT, each)).all())
