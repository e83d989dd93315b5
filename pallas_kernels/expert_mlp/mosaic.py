"""Routed experts on Hopper's tensor cores: which of two kernels takes how many tokens."""

import jax
import jax.numpy as jnp

from pallas_kernels.expert_mlp import mosaic_few, mosaic_many
from pallas_kernels.expert_mlp.mosaic_config import configs_for, few_config_for
from pallas_kernels.expert_mlp.plan import plan
from pallas_kernels.expert_mlp.tiles import ExpertTiles
from pallas_kernels.target import Target

MANY = 26  # rows of an expert, on average, beyond which tiles of 64 tokens and more are filled


def few_fits(target: Target, x, experts, weights, w1, w2, w3, limit, activation) -> bool:
    """Whether `few_tokens` takes these: FP4 in tiles, few rows for each expert, on Hopper."""
    prepared = w3 is None and isinstance(w1, ExpertTiles) and isinstance(w2, ExpertTiles)
    if target.arch != "sm_90" or not prepared or x.dtype != jnp.bfloat16 or x.size == 0:
        return False
    return few_config_for(experts.size, w1.shape, activation) is not None


def many_fits(target: Target, x, experts, weights, w1, w2, w3, limit, activation) -> bool:
    """Whether `many_tokens` takes these: FP4 in tiles by quantised activations, many rows each, on Hopper."""
    prepared = w3 is None and isinstance(w1, ExpertTiles) and isinstance(w2, ExpertTiles)
    if target.arch != "sm_90" or not prepared or x.dtype != jnp.bfloat16 or x.size == 0:
        return False
    even = w1.shape[1] % 256 == 0 and w2.shape[1] % 256 == 0
    return activation is not None and even and experts.size > MANY * w1.shape[0]


def few_tokens(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    w1: ExpertTiles,
    w2: ExpertTiles,
    w3: None,
    limit: float,
    activation: str | None,
) -> jax.Array:
    """See `pallas_kernels.expert_mlp`; `few_fits` says which arguments it is for."""
    config = few_config_for(experts.size, w1.shape, activation)
    assert config is not None
    planned = plan(experts, w1.shape[0], config.tokens)
    return mosaic_few.planned_mlp(x, planned, weights, w1, w2, limit, config)


def many_tokens(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    w1: ExpertTiles,
    w2: ExpertTiles,
    w3: None,
    limit: float,
    activation: str,
) -> jax.Array:
    """See `pallas_kernels.expert_mlp`; `many_fits` says which arguments it is for."""
    configs = configs_for(experts.size, w1.shape[0])
    planned = plan(experts, w1.shape[0], configs.gate_up.tokens)
    return mosaic_many.planned_mlp(x, planned, weights, w1, w2, limit, configs)
