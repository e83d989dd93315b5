"""The definition of routing: which experts a token goes to, with which weight, and in what order."""

import jax
import jax.numpy as jnp


def route_by_score(
    logits: jax.Array, bias: jax.Array, top_k: int, scaling_factor: float
) -> tuple[jax.Array, jax.Array]:
    scores = gate_scores(logits)
    experts_NA = choose_experts(scores, bias, top_k)
    return experts_NA, routing_weights(scores, experts_NA, scaling_factor)


def route_by_id(
    logits: jax.Array, ids: jax.Array, table: jax.Array, scaling_factor: float
) -> tuple[jax.Array, jax.Array]:
    experts_NA = table[ids]
    return experts_NA, routing_weights(gate_scores(logits), experts_NA, scaling_factor)


def gate_scores(logits: jax.Array) -> jax.Array:
    return jnp.sqrt(jax.nn.softplus(logits.astype(jnp.float32)))


def choose_experts(scores: jax.Array, bias: jax.Array, top_k: int) -> jax.Array:
    _, experts_NA = jax.lax.top_k(scores + bias, top_k)  # ties: the smaller index
    return experts_NA.astype(jnp.int32)


def routing_weights(scores: jax.Array, experts: jax.Array, scaling_factor: float) -> jax.Array:
    chosen_NA = jnp.take_along_axis(scores, experts, axis=-1)  # without the bias that chose them
    return chosen_NA / chosen_NA.sum(-1, keepdims=True) * scaling_factor


def sort_by_expert(experts: jax.Array, n_routed_experts: int) -> tuple[jax.Array, jax.Array]:
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    group_sizes = jnp.zeros(n_routed_experts, jnp.int32).at[flat].add(1)
    return order, group_sizes
