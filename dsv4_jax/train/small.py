"""The shape of the small model: every kind of layer and of routing, in 8 MB."""

import dataclasses

from dsv4_jax.config import FLASH
from dsv4_jax.train.words import VOCAB_SIZE

SMALL = dataclasses.replace(
    FLASH,
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    num_hidden_layers=5,
    compress_ratios=(0, 4, 128, 4, 0, 0),
    num_attention_heads=8,
    head_dim=96,
    qk_rope_head_dim=32,
    q_lora_rank=96,
    o_groups=2,
    o_lora_rank=128,
    sliding_window=64,
    index_n_heads=16,
    index_head_dim=64,
    index_topk=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_hash_layers=1,
    moe_intermediate_size=128,
    hc_sinkhorn_iters=4,
    rope_scaling=dataclasses.replace(FLASH.rope_scaling, original_max_position_embeddings=8192, factor=2),
    max_position_embeddings=16384,
)
