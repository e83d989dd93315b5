"""The routed experts of a layer: sort, gate and up, activation, down, weighted sum."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.expert_mlp import reference
from pallas_kernels.expert_mlp.interleave import interleave
from pallas_kernels.expert_mlp.rows import ExpertRows, to_rows
from pallas_kernels.expert_mlp.tiles import ExpertTiles, tileable, to_tiles
from pallas_kernels.formats import QuantArray
from pallas_kernels.target import Target

Experts = Float[Array, "E F M"] | QuantArray | ExpertTiles | ExpertRows


def _run_triton(*args, **kwargs):
    from pallas_kernels.expert_mlp import triton  # Triton is an extra that a CPU does without

    return triton.expert_mlp(*args, **kwargs)


def _run_few(*args, **kwargs):
    from pallas_kernels.expert_mlp import mosaic

    return mosaic.few_tokens(*args, **kwargs)


def _run_many(*args, **kwargs):
    from pallas_kernels.expert_mlp import mosaic

    return mosaic.many_tokens(*args, **kwargs)


def _few_fits(target: Target, *args) -> bool:
    if target.arch != "sm_90":
        return False
    from pallas_kernels.expert_mlp import mosaic

    return mosaic.few_fits(target, *args)


def _many_fits(target: Target, *args) -> bool:
    if target.arch != "sm_90":
        return False
    from pallas_kernels.expert_mlp import mosaic

    return mosaic.many_fits(target, *args)


def _triton_fits(target: Target, x, experts, weights, w1, w2, w3, limit, activation) -> bool:
    prepared = w3 is None and all(isinstance(w, ExpertTiles | ExpertRows) for w in (w1, w2))
    return target.vendor != "cpu" and prepared and x.dtype == jnp.bfloat16 and x.size > 0


IMPLEMENTATIONS = (
    Implementation("mosaic", _run_few, fits=_few_fits),
    Implementation("mosaic", _run_many, fits=_many_fits),
    Implementation("triton", _run_triton, fits=_triton_fits),
    Implementation("reference", reference.expert_mlp),
)


def expert_mlp(
    x: Float[Array, "N M"],
    experts: Int32[Array, "N A"],
    weights: Float32[Array, "N A"],
    w1: Experts,
    w2: Experts,
    w3: Experts | None,
    *,
    limit: float,
    activation: str | None = None,
    implementation: str | None = None,
) -> Float32[Array, "N M"]:
    """sum_a w2[e_a] @ (weights_a * silu(min(w1[e_a] @ x, limit)) * clip(w3[e_a] @ x, -limit, limit)).

    Products accumulate in float32 and are rounded to the dtype of `x`, the sum over a token's experts is
    float32 and always runs in the order of its choices. Source: `Expert.forward` and `MoE.forward` of the
    released inference/model.py.

    Args:
      experts: the experts of each token; E stands for none.
      weights: their routing weights, which multiply before the down projection; of none it is 0.
      w1, w2, w3: gate [E, F, M], down [E, M, F] and up [E, F, M] of all experts as stored, or what
        `prepare_experts` made of them.
      limit: `swiglu_limit`.
      activation: "fp8_token128" quantises the input of quantised products.

    Raises:
      ValueError: shapes do not belong together.
    """
    experts_count, inner, hidden = w1.shape
    if w3 is None:
        inner //= 2
    together = w2.shape == (experts_count, hidden, inner) and x.shape[1] == hidden
    if not together or (w3 is not None and w3.shape != w1.shape):
        w3_shape = None if w3 is None else w3.shape
        raise ValueError(f"x {x.shape}, w1 {w1.shape}, w2 {w2.shape}, w3 {w3_shape} do not match")
    return select(IMPLEMENTATIONS, implementation, x, experts, weights, w1, w2, w3, limit, activation)


def prepare_experts(
    w1: Experts, w2: Experts, w3: Experts, target: Target
) -> tuple[Experts, Experts, Experts | None]:
    """The layout in which this device reads a layer's experts fastest; to be called once, at load.

    Always the same numbers: weights that have no exact form in it keep the checkpoint's layout.

    Returns:
      w1, w2, w3 for `expert_mlp`. Laid out anew, w1 holds the rows of gate and up and w3 is None.
    """
    if not (isinstance(w1, QuantArray) and isinstance(w2, QuantArray) and isinstance(w3, QuantArray)):
        return w1, w2, w3
    stacks = (w1, w2, w3)
    if target.vendor == "cpu" or any(w.shape[-2] % 128 or w.shape[-1] % 128 for w in stacks):
        return stacks
    if all(w.format == "fp8_block128" for w in stacks):
        return interleave(to_rows(w1), to_rows(w3)), to_rows(w2), None
    fp4 = all(w.format == "fp4_group32" and w.scale.dtype == jnp.uint8 for w in stacks)
    if fp4 and all(tileable(w) for w in stacks):
        return to_tiles(interleave(w1, w3)), to_tiles(w2), None
    return stacks
