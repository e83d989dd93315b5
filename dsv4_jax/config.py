"""config.json of a DeepSeek-V4 checkpoint: one frozen, hashable value, checked before anything is allocated.

Field names are config.json's own. The annotation of a field is also its check: the range of a number, the
words that a string may be.
"""

import dataclasses
import reprlib  # cuts long values short: a file may hold them, a message may not
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from dsv4_jax.errors import CheckpointError, ConfigError
from dsv4_jax.weight_files import WeightFiles, check_folder, read_json_object

MAX_CONFIG_NBYTES = 10_000_000


class ConfigWarning(UserWarning):
    """A config.json asks for something that this package does not know, and will not do."""


@dataclass(frozen=True)
class Between:
    """Inclusive bounds of a number; the upper ones are far beyond real models."""

    low: float
    high: float
    multiple_of: int = 1

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high and (self.multiple_of == 1 or number % self.multiple_of == 0)

    def __str__(self) -> str:
        multiple = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"from {self.low} to {self.high}{multiple}"


Count = Annotated[int, Between(1, 2**20)]
Width = Annotated[int, Between(32, 2**20, multiple_of=32)]  # FP4 weights are scaled in groups of 32
Layers = Annotated[int, Between(0, 2**12)]
TokenId = Annotated[int, Between(0, 2**24)]
Positions = Annotated[int, Between(1, 2**31 - 1)]  # a position is an int32
Positive = Annotated[float, Between(1e-30, 1e30)]
Theta = Annotated[float, Between(1.001, 1e30)]  # YaRN divides by its logarithm


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN on the layers that compress, at every length: low frequencies are divided by `factor`."""

    type: Literal["yarn"]
    factor: Annotated[float, Between(1, 1e6)]
    beta_fast: Positive  # rotations over the original length: the ramp begins here
    beta_slow: Positive  # and ends here
    original_max_position_embeddings: Positions

    def __post_init__(self):
        _check_fields(self, "rope_scaling.")
        if self.beta_fast <= self.beta_slow:
            raise ConfigError(
                f"rope_scaling.beta_fast {self.beta_fast} is not above its beta_slow {self.beta_slow}"
            )


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """FP8 weights: e4m3 values, one scale per 128 x 128 block, where the last blocks may be partial."""

    quant_method: Literal["fp8"] = "fp8"
    fmt: Literal["e4m3"] = "e4m3"
    scale_fmt: Literal["ue8m0"] = "ue8m0"  # Base checkpoints say this too, and store float32
    activation_scheme: Literal["dynamic"] = "dynamic"
    weight_block_size: tuple[Literal[128], ...] = (128, 128)
    ignored_layers: tuple[str, ...] = ()  # as written; the loader goes by each tensor's dtype

    def __post_init__(self):
        _check_fields(self, "quantization_config.")
        if len(self.weight_block_size) != 2:
            raise ConfigError(
                f"quantization_config.weight_block_size is {self.weight_block_size}, want two numbers"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape, routing and formats of one DeepSeek-V4 model; hashable, so static under jit.

    Source: config.json of the released DeepSeek-V4-Flash and DeepSeek-V4-Pro.

    Raises:
      ConfigError: a value of the wrong type or out of range, or two that contradict each other.
    """

    vocab_size: Annotated[int, Between(1, 2**24)]
    hidden_size: Width
    num_hidden_layers: Annotated[int, Between(1, 2**12)]
    num_nextn_predict_layers: Layers  # MTP blocks; 1 also where DSpark's three stages take their place
    compress_ratios: tuple[Literal[0, 4, 128], ...]  # one per layer, then one per draft layer

    num_attention_heads: Count
    num_key_value_heads: Literal[1]
    head_dim: Width
    qk_rope_head_dim: Annotated[int, Between(2, 2**20, multiple_of=2)]  # the last channels of a head
    q_lora_rank: Width
    o_groups: Count
    o_lora_rank: Width
    sliding_window: Count
    index_n_heads: Count
    index_head_dim: Width
    index_topk: Count

    n_routed_experts: Count
    n_shared_experts: Literal[1]
    num_experts_per_tok: Count
    num_hash_layers: Layers  # the first layers, routed by token id
    moe_intermediate_size: Width
    norm_topk_prob: Literal[True]
    routed_scaling_factor: Positive
    scoring_func: Literal["sqrtsoftplus"]
    topk_method: Literal["noaux_tc"]
    swiglu_limit: Positive
    expert_dtype: Literal["fp4", "fp8", "bf16"]  # of the routed experts, in the checkpoint

    hc_mult: Annotated[int, Between(1, 64)]  # residual streams
    hc_sinkhorn_iters: Annotated[int, Between(1, 1000)]
    hc_eps: Positive
    rms_norm_eps: Positive

    rope_theta: Theta  # of the layers that do not compress
    compress_rope_theta: Theta  # of those that do
    rope_scaling: RopeScaling
    max_position_embeddings: Positions

    quantization_config: QuantizationConfig | None = None
    bos_token_id: TokenId = 0
    eos_token_id: TokenId = 1
    attention_bias: Literal[False] = False
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: Literal[False] = False

    dspark_block_size: Count | None = None
    dspark_noise_token_id: TokenId | None = None
    dspark_target_layer_ids: tuple[Layers, ...] | None = None
    dspark_markov_rank: Count | None = None

    def __post_init__(self):
        _check_fields(self)
        if contradictions := list(self._contradictions()):
            raise ConfigError("; ".join(contradictions))

    def _contradictions(self) -> Iterator[str]:
        """Fields that are each in range and cannot be true together."""
        layers, drafts = self.num_hidden_layers, self.num_draft_layers
        if drafts < 1 if self.draft == "dspark" else drafts != self.num_nextn_predict_layers:
            total = f"num_hidden_layers {layers} + num_nextn_predict_layers {self.num_nextn_predict_layers}"
            yield f"{len(self.compress_ratios)} compress_ratios for {total}"
        elif any(self.compress_ratios[layers:]):
            yield f"compress_ratios end in {reprlib.repr(self.compress_ratios[layers:])}, want 0 for drafts"
        if self.num_hash_layers > layers:
            yield f"num_hash_layers {self.num_hash_layers} is above num_hidden_layers {layers}"

        if self.num_attention_heads % self.o_groups:
            yield f"num_attention_heads {self.num_attention_heads} do not fill o_groups {self.o_groups}"
        if self.nope_head_dim < 64 or self.nope_head_dim % 64:  # cached keys are scaled in blocks of 64
            widths = f"head_dim {self.head_dim} - qk_rope_head_dim {self.qk_rope_head_dim}"
            yield f"{widths} is {self.nope_head_dim}, want a positive multiple of 64"
        if self.index_head_dim.bit_count() != 1:
            yield f"index_head_dim {self.index_head_dim} is not a power of two, the size of a Hadamard matrix"
        if self.index_head_dim < self.qk_rope_head_dim:
            yield f"index_head_dim {self.index_head_dim} is below qk_rope_head_dim {self.qk_rope_head_dim}"
        if self.num_experts_per_tok > self.n_routed_experts:
            chosen = self.num_experts_per_tok
            yield f"num_experts_per_tok {chosen} is above n_routed_experts {self.n_routed_experts}"

        for name in ("bos_token_id", "eos_token_id", "dspark_noise_token_id"):
            if (getattr(self, name) or 0) >= self.vocab_size:
                yield f"{name} {getattr(self, name)} is outside vocab_size {self.vocab_size}"

        dspark = [field.name for field in dataclasses.fields(self) if field.name.startswith("dspark_")]
        absent = [name for name in dspark if getattr(self, name) is None]
        if absent and len(absent) < len(dspark):
            yield f"a DSpark draft also needs {', '.join(absent)}"
        targets = self.dspark_target_layer_ids
        if targets is not None and (not targets or max(targets) >= layers):
            yield f"dspark_target_layer_ids {list(targets)} must name some of the {layers} main layers"

    @property
    def main_ratios(self) -> tuple[int, ...]:
        """The compression ratio of every main layer; the draft's are left out."""
        return self.compress_ratios[: self.num_hidden_layers]

    @property
    def draft(self) -> Literal["mtp", "dspark"] | None:
        """What the checkpoint drafts with; DSpark shows in its own keys, not in num_nextn_predict_layers."""
        if self.dspark_block_size is not None:
            return "dspark"
        return "mtp" if self.num_nextn_predict_layers else None

    @property
    def num_draft_layers(self) -> int:
        """Blocks named mtp.0, mtp.1, ... in the checkpoint."""
        return len(self.compress_ratios) - self.num_hidden_layers

    @property
    def nope_head_dim(self) -> int:
        """The first channels of a head, which are not rotated."""
        return self.head_dim - self.qk_rope_head_dim

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The config of a checkpoint folder; its tensors tell `expert_dtype`, which the first upload lacks.

        Raises:
          CheckpointError: the folder or its config.json is absent (exit code 66).
          ConfigError: config.json does not describe a DeepSeek-V4 model.
        """
        folder = check_folder(folder)
        path = folder / "config.json"
        raw = read_json_object(path, MAX_CONFIG_NBYTES, ConfigError)
        if raw.get("expert_dtype") is not None:
            return cls.from_dict(raw, str(path))
        stand_in = cls.from_dict(raw | {"expert_dtype": "fp4"}, str(path))  # what else is wrong comes first
        return dataclasses.replace(stand_in, expert_dtype=_expert_dtype_of_tensors(folder))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> Self:
        """The config in a parsed config.json; a null counts as absent. Messages begin with `where`.

        Raises:
          ConfigError: it does not describe a DeepSeek-V4 model. Keys unknown here give a ConfigWarning.
        """
        model_type = raw.get("model_type")
        if model_type != "deepseek_v4":
            raise ConfigError(
                f"{where}: model_type is {reprlib.repr(model_type)}; this package runs deepseek_v4 only"
            )
        nested = {"rope_scaling": RopeScaling, "quantization_config": QuantizationConfig}
        try:
            values = _values(cls, raw, where)
            for name in (name for name in nested if name in values):
                values[name] = nested[name](**_values(nested[name], values[name], where, f"{name}."))
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}", hint=error.hint) from None

    def to_dict(self) -> dict[str, Any]:
        """A config.json of this model, with the keys that other packages read; `from_dict` takes it back."""
        return {**_FOR_OTHERS, **_to_json(self)}


# Keys of the released files that the model does not need.
_FOR_OTHERS = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
}
_IGNORED = {*_FOR_OTHERS, "dtype", "pad_token_id", "_name_or_path"}
_SPELLINGS = {"rope_type": "type", "modules_to_not_convert": "ignored_layers"}  # of later transformers

_EXPERT_TENSOR = "layers.0.ffn.experts.0.w1.weight"
_EXPERT_DTYPES = {"I8": "fp4", "F8_E4M3": "fp8", "BF16": "bf16"}  # I8: two FP4 values a byte


def _values(kind: Any, raw: Any, where: str, prefix: str = "") -> dict[str, Any]:
    """The arguments of the dataclass `kind` in a JSON object; `prefix` goes before a key in a message."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} is {reprlib.repr(raw)}, want an object")
    keys = {_SPELLINGS.get(key, key): value for key, value in raw.items() if value is not None}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [f"{prefix}{name}" for name in required if name not in keys]:
        raise ConfigError(f"lacks {', '.join(missing)}", hint="is it the whole config.json of a DeepSeek-V4?")
    if unknown := [f"{prefix}{key}" for key in keys if key not in fields and key not in _IGNORED]:
        warnings.warn(f"{where}: ignores {', '.join(unknown)}", ConfigWarning, stacklevel=3)
    values = {name: keys[name] for name in fields if name in keys}
    return {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}


def _expert_dtype_of_tensors(folder: Path) -> str:
    try:
        with WeightFiles.open(folder) as files:
            tensor = files.tensors.get(_EXPERT_TENSOR)
        found = f"{_EXPERT_TENSOR} is {tensor.dtype if tensor else 'absent'}"
    except CheckpointError as error:
        tensor, found = None, error.message
    if tensor is None or tensor.dtype not in _EXPERT_DTYPES:
        raise ConfigError(
            f"{folder / 'config.json'}: lacks expert_dtype, and the weights do not tell: {found}",
            hint='add "expert_dtype": "fp4" or "fp8"',
        )
    return _EXPERT_DTYPES[tensor.dtype]


def _check_fields(value: Any, prefix: str = "") -> None:
    for name, kind in typing.get_type_hints(type(value), include_extras=True).items():
        _check(prefix + name, kind, getattr(value, name))


def _check(name: str, kind: Any, value: object) -> None:
    """Raises ConfigError unless `value` is what the annotation `kind` asks for."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # all of ours are X | None
        if value is not None:
            _check(name, args[0], value)
        return
    if origin is tuple and isinstance(value, tuple):
        for place, item in enumerate(value):
            _check(f"{name}[{place}]", args[0], item)
        return
    if origin is Annotated:
        base, between = args
        numbers = (int,) if base is int else (int, float)
        fits = isinstance(value, numbers) and not isinstance(value, bool) and value in between
        wanted = f"{'an integer' if base is int else 'a number'} {between}"
    elif origin is Literal:
        fits = any(value == each and type(value) is type(each) for each in args)  # True == 1
        wanted = " or ".join(map(repr, args))
    else:
        fits = isinstance(value, origin or kind)
        wanted = f"a {(origin or kind).__name__}"
    if not fits:
        raise ConfigError(f"{name} is {reprlib.repr(value)}, want {wanted}")


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _to_json(each) for name, each in fields.items() if each not in (None, ())}
    return list(value) if isinstance(value, tuple) else value


FLASH = Config(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_nextn_predict_layers=1,
    compress_ratios=(0, 0) + (4, 128) * 20 + (4,) + (0,),
    num_attention_heads=64,
    num_key_value_heads=1,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=6,
    num_hash_layers=3,
    moe_intermediate_size=2048,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    scoring_func="sqrtsoftplus",
    topk_method="noaux_tc",
    swiglu_limit=10.0,
    expert_dtype="fp4",
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    rope_theta=10000,
    compress_rope_theta=160000,
    rope_scaling=RopeScaling(
        type="yarn", factor=16, beta_fast=32, beta_slow=1, original_max_position_embeddings=65536
    ),
    max_position_embeddings=1048576,
    quantization_config=QuantizationConfig(),
)
FLASH_BASE = dataclasses.replace(FLASH, expert_dtype="fp8")
PRO = dataclasses.replace(
    FLASH,
    hidden_size=7168,
    num_hidden_layers=61,
    compress_ratios=(128, 128) + (4, 128) * 29 + (4,) + (0,),
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    index_topk=1024,
    n_routed_experts=384,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
)
PRO_BASE = dataclasses.replace(PRO, expert_dtype="fp8")

# Every kind of layer and of routing, at sizes a laptop runs: a window that wraps, a clamp that bites, and
# enough index heads that no score is exactly zero, which would make the top-k a matter of ties.
TINY = dataclasses.replace(
    FLASH,
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=5,
    compress_ratios=(0, 4, 128, 4, 128, 0),
    num_attention_heads=4,
    head_dim=128,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    sliding_window=16,
    index_n_heads=16,
    index_topk=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_hash_layers=2,
    moe_intermediate_size=128,
    swiglu_limit=1.0,
    rope_scaling=dataclasses.replace(FLASH.rope_scaling, original_max_position_embeddings=64),
    max_position_embeddings=1024,
)
PRESETS = {"flash": FLASH, "flash-base": FLASH_BASE, "pro": PRO, "pro-base": PRO_BASE, "tiny": TINY}
