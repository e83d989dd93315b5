"""Kernels of DeepSeek-V4: arrays in, arrays out; they know no model, no config and no mesh.

Every op is a public function here, a definition in plain jnp (`reference.py` of its folder) and, where one
is faster, kernels that are held against it.
"""

from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.attention_inputs import (
    attention_latents,
    attention_query,
    attention_unrotate,
    compressed_entries,
    index_query,
)
from pallas_kernels.block_matmul import block_diagonal_matmul, block_matmul, join_rows
from pallas_kernels.cached_rows import (
    CachedRows,
    IndexKeys,
    KeyValues,
    QuantKV,
    decode_rows,
    empty_index_keys,
    empty_kv,
    encode_rows,
    read_rows,
    write_rows,
)
from pallas_kernels.compressor import compress
from pallas_kernels.expert_mlp import ExpertTiles, expert_mlp, prepare_experts
from pallas_kernels.formats import FORMATS, QuantArray, dequantize, fake_quantize, quantize
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.hyper_connection import hc_head, hc_post, hc_post_pre, hc_pre
from pallas_kernels.indexer import hadamard, index_scores, index_select
from pallas_kernels.indexer.queries import TiledQueries
from pallas_kernels.routing import route_by_id, route_by_score
from pallas_kernels.sparse_attention import sparse_attention
from pallas_kernels.swiglu import swiglu, swiglu_quant
from pallas_kernels.target import Target, current_target

__all__ = [
    "FORMATS",
    "CachedRows",
    "ExpertTiles",
    "IndexKeys",
    "KeyValues",
    "QuantArray",
    "QuantKV",
    "Target",
    "TiledQueries",
    "activation_quant",
    "attention_latents",
    "attention_query",
    "attention_unrotate",
    "block_diagonal_matmul",
    "block_matmul",
    "compress",
    "compressed_entries",
    "current_target",
    "decode_rows",
    "dequantize",
    "empty_index_keys",
    "empty_kv",
    "encode_rows",
    "expert_mlp",
    "fake_quantize",
    "grouped_matmul",
    "hadamard",
    "hc_head",
    "hc_post",
    "hc_post_pre",
    "hc_pre",
    "index_query",
    "index_scores",
    "index_select",
    "join_rows",
    "prepare_experts",
    "quantize",
    "read_rows",
    "route_by_id",
    "route_by_score",
    "sparse_attention",
    "swiglu",
    "swiglu_quant",
    "write_rows",
]
