"""Mixture of experts: routed by token id in the first layers, by score after, plus a shared expert."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax import parallel
from dsv4_jax.config import Config
from dsv4_jax.nn.expert_parallel import on_owners
from dsv4_jax.nn.linear import Linear, products
from dsv4_jax.nn.parameter import parameter, quantized_parameter, scale_dtype
from dsv4_jax.numerics import Numerics
from pallas_kernels import (
    QuantArray,
    block_matmul,
    expert_mlp,
    route_by_id,
    route_by_score,
    swiglu,
    swiglu_quant,
)

EXPERT_FORMATS = {"fp4": "fp4_group32", "fp8": "fp8_block128"}


class Gate(nnx.Module):
    """The router. `hashed` layers look experts up by token id and only weigh them by score."""

    def __init__(self, config: Config, *, hashed: bool):
        experts, top_k = config.n_routed_experts, config.num_experts_per_tok
        self.weight = parameter((experts, config.hidden_size), jnp.bfloat16, None, "hidden")
        if hashed:
            self.tid2eid = parameter((config.vocab_size, top_k), jnp.int32, None, None)
        else:
            self.bias = parameter((experts,), jnp.float32, None)
        self.config, self.hashed = config, hashed

    def __call__(
        self, x: Float[Array, "N M"], ids: Int32[Array, " N"]
    ) -> tuple[Int32[Array, "N A"], Float32[Array, "N A"]]:
        """The experts of each token and their weights, which sum to `routed_scaling_factor`."""
        logits = block_matmul(x, self.weight.get_value(), out_dtype=jnp.float32)
        scaling = self.config.routed_scaling_factor
        if self.hashed:
            return route_by_id(logits, ids, self.tid2eid.get_value(), scaling)
        return route_by_score(logits, self.bias.get_value(), self.config.num_experts_per_tok, scaling)


class Experts(nnx.Module):
    """The routed experts, each parameter one stack."""

    def __init__(self, config: Config, numerics: Numerics):
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size

        def stack(rows: int, columns: int, *axes: str) -> nnx.Param:
            shape, axes = (experts, rows, columns), ("experts", *axes)
            if config.expert_dtype == "bf16":
                return parameter(shape, jnp.bfloat16, *axes)
            return quantized_parameter(shape, EXPERT_FORMATS[config.expert_dtype], scale_dtype(config), *axes)

        self.w1 = stack(inner, hidden, "expert_hidden", "hidden")  # gate
        self.w2 = stack(hidden, inner, "hidden", "expert_hidden")  # down
        self.w3 = stack(inner, hidden, "expert_hidden", "hidden")  # up
        self.config, self.numerics = config, numerics

    def __call__(
        self, x: Float[Array, "N M"], experts: Int32[Array, "N A"], weights: Float32[Array, "N A"]
    ) -> Float32[Array, "N M"]:
        """The weighted sum of the outputs of each token's experts; on a mesh, a term of it."""
        stacks = [stack.get_value() for stack in (self.w1, self.w2, self.w3)]
        limit, activation = self.config.swiglu_limit, self.numerics.activation

        def run(x, experts, weights):
            return expert_mlp(x, experts, weights, *stacks, limit=limit, activation=activation)

        return on_owners(run, x, experts, weights, stacks[0].shape[0])


class SharedExpert(nnx.Module):
    """The expert every token goes to; its activation is clamped too."""

    def __init__(self, config: Config, numerics: Numerics):
        hidden, inner = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.w1 = Linear((inner, hidden), ("shared_hidden", "hidden"), config, numerics)
        self.w2 = Linear((hidden, inner), ("hidden", "shared_hidden"), config, numerics)
        self.w3 = Linear((inner, hidden), ("shared_hidden", "hidden"), config, numerics)
        self.config, self.numerics = config, numerics

    def __call__(self, x: Float[Array, "N M"]) -> Float[Array, "N M"]:
        """Its output; on a mesh, a term of it."""
        limit, partial = self.config.swiglu_limit, parallel.parts("shared_hidden") > 1
        gate, up = products(x, self.w1, self.w3)
        w2 = self.w2.weight.get_value()
        if self.numerics.activation is None or not isinstance(w2, QuantArray):
            return self.w2(swiglu(gate, up, limit=limit, out_dtype=self.numerics.dtype), partial=partial)
        return self.w2(swiglu_quant(gate, up, limit=limit), partial=partial)


class MoE(nnx.Module):
    """Router, routed experts, shared expert: `ffn` of a block."""

    def __init__(self, config: Config, numerics: Numerics, *, hashed: bool):
        self.gate = Gate(config, hashed=hashed)
        self.experts = Experts(config, numerics)
        self.shared_experts = SharedExpert(config, numerics)

    def __call__(self, x: Float[Array, "B T M"], ids: Int32[Array, "B T"]) -> Float[Array, "B T M"]:
        flat = x.reshape(-1, x.shape[-1])
        experts, weights = self.gate(flat, ids.reshape(-1))
        routed = self.experts(flat, experts, weights)
        shared = self.shared_experts(flat).astype(jnp.float32)
        terms = (routed, ("experts", "expert_hidden")), (shared, ("shared_hidden",))
        out = parallel.total_of_terms(*terms, apart_from="batch")
        return out.astype(x.dtype).reshape(x.shape)
