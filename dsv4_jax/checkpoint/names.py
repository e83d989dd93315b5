"""The checkpoint's tensors and the model's parameters: one table, read both ways.

A row is one fact: what the checkpoint calls a parameter, where it lies in the model, how it is stored.
Shapes are not here: modules declare them. Source: the published tensor lists of DeepSeek-V4.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import Config
from dsv4_jax.model import Params, declare
from dsv4_jax.mtp import declare_mtp
from dsv4_jax.nn.block import Block
from dsv4_jax.nn.hyper_connection import HyperHead
from dsv4_jax.nn.linear import Linear
from dsv4_jax.nn.norm import RMSNorm
from dsv4_jax.nn.parameter import parameter
from dsv4_jax.numerics import PLAIN
from pallas_kernels import QuantArray


class Entry(NamedTuple):
    """`tensor` may hold {layer} and {expert}; `parameter` is the path in the model, {layer} included.

    `stored` is a safetensors dtype, or "quantized": `tensor` is then a stem with .weight and .scale.
    """

    tensor: str
    parameter: str
    stored: str


_HYPER_HEAD = (
    ("hc_head_fn", "hc_head.fn", "F32"),
    ("hc_head_base", "hc_head.base", "F32"),
    ("hc_head_scale", "hc_head.scale", "F32"),
    ("norm.weight", "norm.weight", "BF16"),
)

_COMPRESSOR = (
    ("ape", "ape", "F32"),
    ("wkv.weight", "wkv.weight", "BF16"),
    ("wgate.weight", "wgate.weight", "BF16"),
    ("norm.weight", "norm.weight", "BF16"),
)

_BLOCK = (
    ("hc_attn_fn", "hc_attn.fn", "F32"),
    ("hc_attn_base", "hc_attn.base", "F32"),
    ("hc_attn_scale", "hc_attn.scale", "F32"),
    ("attn_norm.weight", "attn_norm.weight", "BF16"),
    ("attn.attn_sink", "attn.attn_sink", "F32"),
    ("attn.wq_a", "attn.wq_a.weight", "quantized"),
    ("attn.q_norm.weight", "attn.q_norm.weight", "BF16"),
    ("attn.wq_b", "attn.wq_b.weight", "quantized"),
    ("attn.wkv", "attn.wkv.weight", "quantized"),
    ("attn.kv_norm.weight", "attn.kv_norm.weight", "BF16"),
    ("attn.wo_a", "attn.wo_a.weight", "quantized"),
    ("attn.wo_b", "attn.wo_b.weight", "quantized"),
    *((f"attn.compressor.{name}", f"attn.compressor.{path}", stored) for name, path, stored in _COMPRESSOR),
    ("attn.indexer.wq_b", "attn.indexer.wq_b.weight", "quantized"),
    ("attn.indexer.weights_proj.weight", "attn.indexer.weights_proj.weight", "BF16"),
    *(
        (f"attn.indexer.compressor.{name}", f"attn.indexer.compressor.{path}", stored)
        for name, path, stored in _COMPRESSOR
    ),
    ("hc_ffn_fn", "hc_ffn.fn", "F32"),
    ("hc_ffn_base", "hc_ffn.base", "F32"),
    ("hc_ffn_scale", "hc_ffn.scale", "F32"),
    ("ffn_norm.weight", "ffn_norm.weight", "BF16"),
    ("ffn.gate.weight", "ffn.gate.weight", "BF16"),
    ("ffn.gate.bias", "ffn.gate.bias", "F32"),
    ("ffn.gate.tid2eid", "ffn.gate.tid2eid", "I64"),
    ("ffn.experts.{expert}.w1", "ffn.experts.w1", "quantized"),
    ("ffn.experts.{expert}.w2", "ffn.experts.w2", "quantized"),
    ("ffn.experts.{expert}.w3", "ffn.experts.w3", "quantized"),
    ("ffn.shared_experts.w1", "ffn.shared_experts.w1.weight", "quantized"),
    ("ffn.shared_experts.w2", "ffn.shared_experts.w2.weight", "quantized"),
    ("ffn.shared_experts.w3", "ffn.shared_experts.w3.weight", "quantized"),
)

TABLE = (
    Entry("embed.weight", "embed.weight", "BF16"),
    Entry("head.weight", "head.weight", "BF16"),
    *(Entry(*row) for row in _HYPER_HEAD),
    *(Entry(f"layers.{{layer}}.{name}", f"layers.{{layer}}.{path}", stored) for name, path, stored in _BLOCK),
    Entry("mtp.{layer}.enorm.weight", "mtp.{layer}.enorm.weight", "BF16"),
    Entry("mtp.{layer}.hnorm.weight", "mtp.{layer}.hnorm.weight", "BF16"),
    Entry("mtp.{layer}.e_proj", "mtp.{layer}.e_proj.weight", "quantized"),
    Entry("mtp.{layer}.h_proj", "mtp.{layer}.h_proj.weight", "quantized"),
    Entry("mtp.{layer}.main_proj", "mtp.{layer}.main_proj.weight", "quantized"),
    Entry("mtp.{layer}.main_norm.weight", "mtp.{layer}.main_norm.weight", "BF16"),
    Entry("mtp.{layer}.markov_head.markov_w1.weight", "mtp.{layer}.markov_w1", "BF16"),
    Entry("mtp.{layer}.markov_head.markov_w2.weight", "mtp.{layer}.markov_w2", "BF16"),
    Entry("mtp.{layer}.confidence_head.proj.weight", "mtp.{layer}.confidence", "BF16"),
    *(Entry(f"mtp.{{layer}}.{name}", f"mtp.{{layer}}.{path}", stored) for name, path, stored in _HYPER_HEAD),
    *(Entry(f"mtp.{{layer}}.{name}", f"mtp.{{layer}}.block.{path}", stored) for name, path, stored in _BLOCK),
)

_BY_PARAMETER = {entry.parameter: entry for entry in TABLE}

# safetensors' word for how the values of a quantised parameter are stored.
VALUES_DTYPES = {"fp8_block128": "F8_E4M3", "fp4_group32": "I8"}
SCALE_DTYPES = {"uint8": "F8_E8M0", "float32": "F32"}


class Parameter(NamedTuple):
    """One parameter the model declares, and where its numbers come from.

    Attributes:
      path: keys that lead to it in the params, ("layers", 3, "attn", "wq_a", "weight").
      entry: its row of the table.
      value: ShapeDtypeStruct, or a QuantArray of them.
      axes: logical axes, one per dimension.
    """

    path: tuple[str | int, ...]
    entry: Entry
    value: jax.ShapeDtypeStruct | QuantArray
    axes: tuple[str | None, ...]

    @property
    def stacked(self) -> bool:
        """Whether its first axis runs over experts that the checkpoint stores one by one."""
        return "{expert}" in self.entry.tensor

    def stems(self) -> list[str]:
        """Its names in the checkpoint, one per expert; without .weight and .scale if it is quantised."""
        layer = next((key for key in self.path if isinstance(key, int)), None)
        experts = range(self.value.shape[0]) if self.stacked else (None,)
        return [self.entry.tensor.format(layer=layer, expert=expert) for expert in experts]

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, safetensors dtype and shape of each tensor the declared value is stored as."""
        for stem in self.stems():
            if isinstance(self.value, QuantArray):
                values, scale = self.value.values, self.value.scale
                skip = 1 if self.stacked else 0
                yield f"{stem}.weight", VALUES_DTYPES[self.value.format], values.shape[skip:]
                yield f"{stem}.scale", SCALE_DTYPES[scale.dtype.name], scale.shape[skip:]
            elif self.entry.stored == "quantized":
                yield f"{stem}.weight", "BF16", self.value.shape[1:] if self.stacked else self.value.shape
            else:
                yield stem, self.entry.stored, self.value.shape


class _DSparkStage(nnx.Module):
    """One stage of a DSpark draft: declared so that its tensors have shapes; nothing runs it.

    The first stage takes in the streams of some layers of the main model, the last one draws tokens.
    """

    def __init__(self, config: Config, *, first: bool, last: bool):
        hidden, vocab, rank = config.hidden_size, config.vocab_size, config.dspark_markov_rank or 0
        self.block = Block(config, PLAIN, ratio=0, hashed=False)
        if first:
            targets = len(config.dspark_target_layer_ids or ())
            self.main_proj = Linear((hidden, targets * hidden), (None, "hidden"), config, PLAIN)
            self.main_norm = RMSNorm(hidden, "hidden", config.rms_norm_eps)
        if last:
            self.norm = RMSNorm(hidden, "hidden", config.rms_norm_eps)
            self.hc_head = HyperHead(config)
            self.markov_w1 = parameter((vocab, rank), jnp.bfloat16, "vocab", None)
            self.markov_w2 = parameter((vocab, rank), jnp.bfloat16, "vocab", None)
            self.confidence = parameter((1, hidden + rank), jnp.bfloat16, None, None)


def parameters(config: Config, *, mtp: bool) -> list[Parameter]:
    """Every parameter of the main model in layer order; with `mtp` its MTP head or DSpark draft after it.

    Raises:
      KeyError: the model declares a parameter that the table does not know.
    """
    found = _declared((), declare(config, PLAIN))
    if mtp and config.draft == "mtp":
        found += _declared(("mtp", 0), declare_mtp(config, PLAIN))
    elif mtp and config.draft == "dspark":
        last = config.num_draft_layers - 1
        for stage in range(last + 1):
            module = _DSparkStage(config, first=stage == 0, last=stage == last)
            found += _declared(("mtp", stage), module)
    return found


def _declared(prefix: tuple[str | int, ...], module: nnx.Module) -> list[Parameter]:
    found = []
    for keys, variable in nnx.to_flat_state(nnx.state(module)):
        path = (*prefix, *(key if isinstance(key, int) else str(key) for key in keys))
        pattern = ".".join("{layer}" if isinstance(key, int) else key for key in path)
        found.append(Parameter(path, _BY_PARAMETER[pattern], variable.get_value(), variable.axes))
    return found


def expected_tensors(config: Config, *, mtp: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor in a checkpoint of this config, with `mtp` those under `mtp.` too."""
    return {
        name: (dtype, shape) for each in parameters(config, mtp=mtp) for name, dtype, shape in each.tensors()
    }


_SHARED_COPY = re.compile(r"mtp\..*emb|mtp\..*head\.weight$")


def is_shared_copy(tensor: str) -> bool:
    """Whether `tensor` repeats the embedding or the head under `mtp.`, as some checkpoints do."""
    return bool(_SHARED_COPY.match(tensor))


def nest(leaves: dict[tuple[str | int, ...], Any]) -> Params:
    """The nested params dict from values by path."""
    params: Params = {}
    for path, value in leaves.items():
        *outer, last = path
        place = params
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    return params
