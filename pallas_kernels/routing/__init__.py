"""Routing of tokens to experts, by score or by token id."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.routing import reference
from pallas_kernels.target import Target


def _run_by_score(logits, bias, top_k, scaling_factor):
    from pallas_kernels.routing import triton  # Triton is an extra that a CPU does without

    return triton.route_by_score(logits, bias, top_k, scaling_factor)


def _run_by_id(logits, ids, table, scaling_factor):
    from pallas_kernels.routing import triton

    return triton.route_by_id(logits, ids, table, scaling_factor)


def _logits_fit(target: Target, logits) -> bool:
    """A warp holds a row of logits in registers."""
    return (
        target.vendor != "cpu" and logits.dtype == jnp.float32 and logits.size > 0 and logits.shape[1] <= 1024
    )


def _scores_fit(target: Target, logits, bias, top_k, scaling_factor) -> bool:
    return _logits_fit(target, logits) and bias.dtype == jnp.float32 and 0 < top_k <= min(32, logits.shape[1])


def _ids_fit(target: Target, logits, ids, table, scaling_factor) -> bool:
    integers = ids.dtype == table.dtype == jnp.int32
    return _logits_fit(target, logits) and integers and table.size > 0 and table.shape[1] <= 32


BY_SCORE = (
    Implementation("triton", _run_by_score, fits=_scores_fit),
    Implementation("reference", reference.route_by_score),
)
BY_ID = (
    Implementation("triton", _run_by_id, fits=_ids_fit),
    Implementation("reference", reference.route_by_id),
)


def route_by_score(
    logits: Float32[Array, "N E"],
    bias: Float32[Array, " E"],
    top_k: int,
    scaling_factor: float,
    *,
    implementation: str | None = None,
) -> tuple[Int32[Array, "N A"], Float32[Array, "N A"]]:
    """The `top_k` experts of each token with the highest score + bias, best first, and their weights.

    A score is sqrt(softplus(logit)) (`scoring_func` sqrtsoftplus), ties go to the smaller index. Weights are
    the chosen scores without bias, normalised to the sum `scaling_factor` (no epsilon). Source: report, 2.1
    (auxiliary-loss-free balancing); `Gate.forward` of the released inference/model.py.

    Raises:
      ValueError: shapes do not belong together.
    """
    if logits.shape[1:] != bias.shape or not 0 < top_k <= bias.size:
        raise ValueError(f"logits {logits.shape}, bias {bias.shape} and top_k={top_k} do not match")
    return select(BY_SCORE, implementation, logits, bias, top_k, scaling_factor)


def route_by_id(
    logits: Float32[Array, "N E"],
    ids: Int32[Array, " N"],
    table: Int32[Array, "V A"],
    scaling_factor: float,
    *,
    implementation: str | None = None,
) -> tuple[Int32[Array, "N A"], Float32[Array, "N A"]]:
    """The experts that `table` lists for each token id, and their weights by score as in `route_by_score`.

    Args:
      ids: token ids, 0 to V - 1.
      table: `tid2eid`, experts 0 to E - 1 of each token id.

    Raises:
      ValueError: shapes do not belong together.
    """
    if logits.shape[:1] != ids.shape:
        raise ValueError(f"logits {logits.shape} and ids {ids.shape} do not match")
    return select(BY_ID, implementation, logits, ids, table, scaling_factor)
