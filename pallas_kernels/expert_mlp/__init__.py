"""The routed experts of a layer: sort, gate and up, activation, down, weighted sum."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.expert_mlp import reference
from pallas_kernels.expert_mlp.tiles import TILE, ExpertTiles, tileable, to_tiles
from pallas_kernels.formats import QuantArray
from pallas_kernels.target import Target


def _run_triton(*args, **kwargs):
    from pallas_kernels.expert_mlp import triton  # Triton is an extra that a CPU does without

    return triton.expert_mlp(*args, **kwargs)


def _triton_fits(target: Target, x, experts, weights, w1, w2, w3, limit, activation) -> bool:
    tiled = all(isinstance(weight, ExpertTiles) for weight in (w1, w2, w3))
    operands = x.dtype == jnp.bfloat16 and (activation is None or target.has_e4m3)
    return target.vendor != "cpu" and tiled and operands


IMPLEMENTATIONS = (
    Implementation("triton", _run_triton, fits=_triton_fits),
    Implementation("reference", reference.expert_mlp),
)


def expert_mlp(
    x: Float[Array, "N M"],
    experts: Int32[Array, "N A"],
    weights: Float32[Array, "N A"],
    w1: Float[Array, "E F M"] | QuantArray | ExpertTiles,
    w2: Float[Array, "E M F"] | QuantArray | ExpertTiles,
    w3: Float[Array, "E F M"] | QuantArray | ExpertTiles,
    *,
    limit: float,
    activation: str | None = None,
    implementation: str | None = None,
) -> Float32[Array, "N M"]:
    """sum_a w2[e_a] @ (weights_a * silu(min(w1[e_a] @ x, limit)) * clip(w3[e_a] @ x, -limit, limit)).

    Products accumulate in float32 and are rounded to the dtype of `x`, the sum over a token's experts is
    float32. Source: `Expert.forward` and `MoE.forward` of the released inference/model.py.

    Args:
      experts: the experts of each token.
      weights: their routing weights, which multiply before the down projection.
      w1, w2, w3: gate, down and up of all experts, as stored or as `prepare_experts` lays them out.
      limit: `swiglu_limit`.
      activation: "fp8_token128" quantises the input of quantised products.

    Raises:
      ValueError: shapes do not belong together.
    """
    if (
        w1.shape != w3.shape
        or w2.shape != (w1.shape[0], w1.shape[2], w1.shape[1])
        or x.shape[1] != w1.shape[2]
    ):
        raise ValueError(f"x {x.shape}, w1 {w1.shape}, w2 {w2.shape}, w3 {w3.shape} do not match")
    return select(IMPLEMENTATIONS, implementation, x, experts, weights, w1, w2, w3, limit, activation)


def prepare_experts(weight: QuantArray, target: Target) -> QuantArray | ExpertTiles:
    """The layout in which this device reads a stack of expert weights fastest; to be called once, at load.

    Always the same numbers: a weight that has no exact form in tiles keeps the checkpoint's layout.
    """
    right_format = weight.format == "fp4_group32" and weight.scale.dtype == jnp.uint8
    right_shape = weight.shape[-2] % TILE == 0 and weight.shape[-1] % TILE == 0
    if target.vendor == "cpu" or not right_format or not right_shape or not tileable(weight):
        return weight
    return to_tiles(weight)
