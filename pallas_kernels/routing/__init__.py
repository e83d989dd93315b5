"""Routing of tokens to experts, by score or by token id."""

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.dispatch import Implementation, select
from pallas_kernels.routing import reference

SCORES = (Implementation("reference", reference.gate_scores),)
CHOICE = (Implementation("reference", reference.choose_experts),)
WEIGHTS = (Implementation("reference", reference.routing_weights),)
ORDER = (Implementation("reference", reference.sort_by_expert),)


def gate_scores(logits: Float[Array, "N E"], *, implementation: str | None = None) -> Float32[Array, "N E"]:
    """sqrt(softplus(logits)): the affinity of each token to each expert (`scoring_func` sqrtsoftplus)."""
    return select(SCORES, implementation, logits)


def choose_experts(
    scores: Float32[Array, "N E"],
    bias: Float32[Array, " E"],
    top_k: int,
    *,
    implementation: str | None = None,
) -> Int32[Array, "N A"]:
    """The `top_k` experts with the highest score + bias, best first, ties to the smaller index.

    Source: report, 2.1 (auxiliary-loss-free balancing); `Gate.forward` of the released inference/model.py.
    """
    return select(CHOICE, implementation, scores, bias, top_k)


def routing_weights(
    scores: Float32[Array, "N E"],
    experts: Int32[Array, "N A"],
    scaling_factor: float,
    *,
    implementation: str | None = None,
) -> Float32[Array, "N A"]:
    """Scores of the chosen experts, normalised to the sum `scaling_factor` (no epsilon, no bias)."""
    return select(WEIGHTS, implementation, scores, experts, scaling_factor)


def sort_by_expert(
    experts: Int32[Array, "N A"], n_routed_experts: int, *, implementation: str | None = None
) -> tuple[Int32[Array, "N*A"], Int32[Array, " E"]]:
    """Order that sorts the N*A (token, choice) pairs by expert, stably, and how many each expert gets.

    Pair p belongs to token p // A.
    """
    return select(ORDER, implementation, experts, n_routed_experts)
