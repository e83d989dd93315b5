"""config.json: the released models' values, and one clear line for each way to get it wrong."""

import dataclasses
import json
import struct
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.config import FLASH, FLASH_BASE, PRESETS, PRO, PRO_BASE, TINY, Config, ConfigWarning
from dsv4_jax.errors import CheckpointError, ConfigError

RAW = TINY.to_dict()
DSPARK = {
    "compress_ratios": [0, 4, 128, 4, 128, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_noise_token_id": 511,
    "dspark_target_layer_ids": [2, 3, 4],
    "dspark_markov_rank": 16,
}


def without(*names: str) -> dict:
    return {name: value for name, value in RAW.items() if name not in names}


def refusal(raw: dict) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(raw)
    assert caught.value.exit_code == 65
    assert caught.value.message.startswith("config.json: ")
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    return tmp_path


# The models.


@pytest.mark.parametrize(
    ("config", "swa", "csa", "hca"),
    [(FLASH, 2, 21, 20), (PRO, 0, 30, 31), (TINY, 1, 2, 2)],
    ids=["flash", "pro", "tiny"],
)
def test_layer_kinds_are_those_of_the_report(config, swa, csa, hca):
    assert [config.main_ratios.count(ratio) for ratio in (0, 4, 128)] == [swa, csa, hca]
    assert len(config.main_ratios) == config.num_hidden_layers
    assert config.compress_ratios == (*config.main_ratios, 0)


@pytest.mark.parametrize(("config", "billions"), [(FLASH, 284), (PRO, 1573)], ids=["flash", "pro"])
def test_expert_weights_dominate_the_published_parameter_count(config, billions):
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    experts = config.num_hidden_layers * (config.n_routed_experts + config.n_shared_experts) * expert

    assert 0.97 * billions < experts / 1e9 < billions


def test_base_models_differ_in_the_expert_format_only():
    assert dataclasses.replace(FLASH, expert_dtype="fp8") == FLASH_BASE
    assert dataclasses.replace(PRO, expert_dtype="fp8") == PRO_BASE


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json_and_is_hashable(name):
    config = PRESETS[name]

    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))

    assert again == config
    assert hash(again) == hash(config)


def test_to_dict_is_a_config_json_others_can_read():
    raw = FLASH.to_dict()

    assert raw["architectures"] == ["DeepseekV4ForCausalLM"]
    assert raw["model_type"] == "deepseek_v4"
    assert raw["compress_ratios"][:4] == [0, 0, 4, 128]
    assert raw["rope_scaling"]["factor"] == 16
    assert raw["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    assert len(raw) == 48  # as many keys as the released file
    assert not [name for name in raw if name.startswith("dspark")]


def test_head_dims_and_draft_follow_from_the_fields():
    assert (FLASH.nope_head_dim, TINY.nope_head_dim) == (448, 64)
    assert (FLASH.draft, FLASH.num_draft_layers) == ("mtp", 1)


def test_dspark_is_told_by_its_keys():
    config = Config.from_dict(RAW | DSPARK)

    assert config.num_nextn_predict_layers == 1
    assert (config.draft, config.num_draft_layers) == ("dspark", 3)
    assert config.main_ratios == TINY.main_ratios
    assert config.dspark_target_layer_ids == (2, 3, 4)
    assert Config.from_dict(config.to_dict()) == config


def test_a_model_may_have_no_draft():
    config = Config.from_dict(RAW | {"num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 128, 4, 128]})

    assert (config.draft, config.num_draft_layers) == (None, 0)


# Reading config.json.


def test_a_folder_gives_its_config(folder):
    assert Config.from_pretrained(folder) == Config.from_pretrained(str(folder)) == TINY


@pytest.mark.parametrize(
    ("name", "reason"), [("absent", "no such directory"), ("v4.gguf", "GGUF is not supported")]
)
def test_a_path_that_is_no_folder_is_an_absent_input(tmp_path, name, reason):
    (tmp_path / "v4.gguf").touch()

    with pytest.raises(CheckpointError, match=reason) as caught:
        Config.from_pretrained(tmp_path / name)

    assert caught.value.exit_code == 66
    assert caught.value.hint.startswith("Expected a Hugging Face snapshot")


def test_a_folder_without_config_json_is_an_absent_input(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file") as caught:
        Config.from_pretrained(tmp_path)

    assert caught.value.exit_code == 66
    assert caught.value.hint.startswith("Expected a Hugging Face snapshot")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (b"", ":1:1: empty"),
        (b" \n", ":1:1: empty"),
        (b'{"model_type":\n  deepseek_v4}', ":2:3: not JSON: Expecting value"),
        (b"[]", ":1:1: want a JSON object, found []"),
        (b'"deepseek_v4"', ":1:1: want a JSON object, found 'deepseek_v4'"),
        (b"\xff\xfe\xfa", ": not usable JSON: "),
        (b'{"a":' + b"[" * 100_000, ": not usable JSON: nested too deeply"),
        (b"[" + b" " * 10_000_000 + b"]", ": longer than 10,000,000 bytes"),
    ],
    ids=["empty", "blank", "not JSON", "array", "string", "not UTF-8", "deep", "large"],
)
def test_a_file_that_is_not_a_json_object_is_refused_with_its_place(tmp_path, text, where):
    (tmp_path / "config.json").write_bytes(text)

    with pytest.raises(ConfigError) as caught:
        Config.from_pretrained(tmp_path)

    assert caught.value.exit_code == 65
    assert caught.value.message.startswith(f"{tmp_path / 'config.json'}{where}")


def test_messages_begin_with_the_path(folder):
    (folder / "config.json").write_text(json.dumps(RAW | {"hidden_size": -1}))

    with pytest.raises(ConfigError) as caught:
        Config.from_pretrained(folder)

    assert caught.value.message.startswith(f"{folder / 'config.json'}: hidden_size is -1, want an integer")


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama", "deepseek_v41", None, 4])
def test_other_models_are_turned_away(model_type):
    error = refusal({"model_type": model_type})

    assert error.message == f"config.json: model_type is {model_type!r}; this package runs deepseek_v4 only"


def test_all_missing_keys_are_listed():
    assert (
        "lacks hidden_size, compress_ratios, swiglu_limit"
        in refusal(without("swiglu_limit", "compress_ratios", "hidden_size")).message
    )
    assert "lacks rope_scaling.factor" in refusal(RAW | {"rope_scaling": {"type": "yarn"}}).message
    assert "lacks vocab_size" in refusal(RAW | {"vocab_size": None}).message


def test_what_the_release_leaves_to_the_reader_has_a_default():
    config = Config.from_dict(
        without("bos_token_id", "eos_token_id", "tie_word_embeddings", "hidden_act", "quantization_config")
    )

    assert config == dataclasses.replace(TINY, quantization_config=None)
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)


def test_unknown_keys_are_named_in_a_warning():
    with pytest.warns(ConfigWarning, match="config.json: ignores vision_dim, moe_dropout$"):
        config = Config.from_dict(RAW | {"vision_dim": 1024, "moe_dropout": 0.5})
    assert config == TINY

    with pytest.warns(ConfigWarning, match=r"ignores rope_scaling\.mscale"):
        Config.from_dict(RAW | {"rope_scaling": RAW["rope_scaling"] | {"mscale": 1.0}})


def test_keys_that_every_config_json_has_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config.from_dict(
            RAW | {"dtype": "bfloat16", "pad_token_id": 2, "_name_or_path": "x", "use_cache": False}
        )


def test_later_spellings_of_transformers_are_read():
    scaling = {
        ("rope_type" if name == "type" else name): value for name, value in RAW["rope_scaling"].items()
    }
    quantization = RAW["quantization_config"] | {"modules_to_not_convert": ["lm_head", "mtp.0.e_proj"]}

    config = Config.from_dict(RAW | {"rope_scaling": scaling, "quantization_config": quantization})

    assert config.rope_scaling == TINY.rope_scaling
    assert config.quantization_config is not None
    assert config.quantization_config.ignored_layers == ("lm_head", "mtp.0.e_proj")
    assert Config.from_dict(config.to_dict()) == config


# Values.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "7168"),
        ("hidden_size", 128.0),
        ("hidden_size", True),
        ("hidden_size", [128]),
        ("hidden_size", -1),
        ("hidden_size", 0),
        ("hidden_size", 2**40),
        ("hidden_size", float("inf")),
        ("hidden_size", 100),
        ("moe_intermediate_size", 48),
        ("q_lora_rank", 33),
        ("o_lora_rank", 2**21),
        ("vocab_size", 2**31),
        ("num_hidden_layers", 10**9),
        ("n_routed_experts", 2**32),
        ("max_position_embeddings", 2**31),
        ("qk_rope_head_dim", 63),
        ("index_topk", 0),
        ("num_hash_layers", -1),
        ("rope_theta", 1),
        ("rope_theta", float("nan")),
        ("compress_rope_theta", "160000"),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", True),
        ("swiglu_limit", float("inf")),
        ("routed_scaling_factor", -1.5),
        ("hc_sinkhorn_iters", 10**9),
        ("num_key_value_heads", 8),
        ("n_shared_experts", 2),
        ("norm_topk_prob", False),
        ("norm_topk_prob", 1),
        ("scoring_func", "sigmoid"),
        ("topk_method", "greedy"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("expert_dtype", "int4"),
        ("expert_dtype", 4),
        ("eos_token_id", [1, 2]),
        ("compress_ratios", 4),
        ("compress_ratios", {"0": 4}),
        ("rope_scaling", 16),
        ("rope_scaling", []),
        ("quantization_config", "fp8"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_named(name, value):
    error = refusal(RAW | {name: value})

    assert error.message.startswith(f"config.json: {name} is ")
    assert ", want " in error.message


def test_numbers_too_large_for_a_float_are_refused():
    assert (
        "hidden_size is inf" in refusal(json.loads(json.dumps(RAW)[:-1] + ', "hidden_size": 1e400}')).message
    )


def test_a_long_value_is_cut_short_in_the_message():
    assert len(refusal(RAW | {"scoring_func": "x" * 10**6}).message) < 200


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("rope_scaling", "type", "linear"),
        ("rope_scaling", "factor", 0.5),
        ("rope_scaling", "beta_fast", "32"),
        ("rope_scaling", "original_max_position_embeddings", 65536.0),
        ("quantization_config", "quant_method", "awq"),
        ("quantization_config", "fmt", "e5m2"),
        ("quantization_config", "weight_block_size", [128]),
        ("quantization_config", "activation_scheme", "static"),
        ("quantization_config", "ignored_layers", "lm_head"),
    ],
)
def test_a_wrong_value_inside_an_object_is_named_with_it(section, name, value):
    error = refusal(RAW | {section: RAW[section] | {name: value}})

    assert error.message.startswith(f"config.json: {section}.{name} is ")
    assert ", want " in error.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compress_ratios": [0, 4, 128]},
            "3 compress_ratios for num_hidden_layers 5 + num_nextn_predict_layers 1",
        ),
        ({"compress_ratios": [0] * 7}, "7 compress_ratios for"),
        (
            {"num_nextn_predict_layers": 3},
            "6 compress_ratios for num_hidden_layers 5 + num_nextn_predict_layers 3",
        ),
        ({"compress_ratios": [0, 4, 16, 4, 128, 0]}, "compress_ratios[2] is 16, want 0 or 4 or 128"),
        ({"compress_ratios": [0, 4, "128", 4, 128, 0]}, "compress_ratios[2] is '128', want 0 or 4 or 128"),
        ({"compress_ratios": [0, 4, 128, 4, 128, 4]}, "compress_ratios end in (4,), want 0 for drafts"),
        ({"o_groups": 3}, "num_attention_heads 4 do not fill o_groups 3"),
        ({"head_dim": 64}, "head_dim 64 - qk_rope_head_dim 64 is 0, want a positive multiple of 64"),
        ({"head_dim": 160}, "head_dim 160 - qk_rope_head_dim 64 is 96, want a positive multiple of 64"),
        ({"index_head_dim": 96}, "index_head_dim 96 is not a power of two"),
        ({"index_head_dim": 32}, "index_head_dim 32 is below qk_rope_head_dim 64"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is above n_routed_experts 8"),
        ({"num_hash_layers": 6}, "num_hash_layers 6 is above num_hidden_layers 5"),
        ({"eos_token_id": 512}, "eos_token_id 512 is outside vocab_size 512"),
        (
            {"rope_scaling": RAW["rope_scaling"] | {"beta_slow": 32}},
            "beta_fast 32 is not above its beta_slow 32",
        ),
        (
            {"dspark_block_size": 5},
            "a DSpark draft also needs dspark_noise_token_id, dspark_target_layer_ids",
        ),
        (DSPARK | {"compress_ratios": [0, 4, 128, 4, 128]}, "5 compress_ratios for num_hidden_layers 5"),
        (DSPARK | {"compress_ratios": [0, 4, 128, 4, 128, 0, 0, 4]}, "compress_ratios end in (0, 0, 4)"),
        (DSPARK | {"dspark_target_layer_ids": [3, 4, 5]}, "dspark_target_layer_ids [3, 4, 5] must name some"),
        (DSPARK | {"dspark_target_layer_ids": []}, "dspark_target_layer_ids [] must name some"),
        (DSPARK | {"dspark_noise_token_id": 512}, "dspark_noise_token_id 512 is outside vocab_size 512"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_values_that_contradict_each_other_are_refused(changes, message):
    assert message in refusal(RAW | changes).message


def test_all_contradictions_are_told_at_once():
    message = refusal(RAW | {"o_groups": 3, "num_experts_per_tok": 9}).message

    assert message == (
        "config.json: num_attention_heads 4 do not fill o_groups 3;"
        " num_experts_per_tok 9 is above n_routed_experts 8"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted({*RAW, *DSPARK, "extra"})), JSON, max_size=3))
@pytest.mark.filterwarnings("ignore::dsv4_jax.config.ConfigWarning")
def test_any_json_is_a_config_or_a_config_error(changes):
    raw = RAW | changes
    try:
        config = Config.from_dict(raw)
    except ConfigError as error:
        assert error.message  # noqa: PT017
        return
    assert Config.from_dict(config.to_dict()) == config


# The upload without expert_dtype.


def write_expert(folder: Path, name: str, dtype: str, item_nbytes: int) -> None:
    header = json.dumps({name: {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * item_nbytes]}}).encode()
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(4 * item_nbytes)
    )


@pytest.mark.parametrize(
    ("dtype", "item_nbytes", "expert_dtype"), [("I8", 1, "fp4"), ("F8_E4M3", 1, "fp8"), ("BF16", 2, "bf16")]
)
def test_without_expert_dtype_an_expert_tensor_tells(folder, dtype, item_nbytes, expert_dtype):
    (folder / "config.json").write_text(json.dumps(without("expert_dtype")))
    write_expert(folder, "layers.0.ffn.experts.0.w1.weight", dtype, item_nbytes)

    config = Config.from_pretrained(folder)

    assert config == dataclasses.replace(TINY, expert_dtype=expert_dtype)
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("layers.0.ffn.experts.0.w1.weight", "F32", "layers.0.ffn.experts.0.w1.weight is F32"),
        ("layers.0.attn_norm.weight", "F32", "layers.0.ffn.experts.0.w1.weight is absent"),
        (None, "", "no *.safetensors"),
    ],
)
def test_without_expert_dtype_and_a_tensor_to_tell_the_hint_is_to_add_it(folder, name, dtype, reason):
    (folder / "config.json").write_text(json.dumps(without("expert_dtype")))
    if name:
        write_expert(folder, name, dtype, 4)

    with pytest.raises(ConfigError) as caught:
        Config.from_pretrained(folder)

    assert caught.value.exit_code == 65
    assert f"{folder / 'config.json'}: lacks expert_dtype" in caught.value.message
    assert reason in caught.value.message
    assert caught.value.hint == 'add "expert_dtype": "fp4" or "fp8"'


def test_without_expert_dtype_other_mistakes_come_first(folder):
    (folder / "config.json").write_text(json.dumps(without("expert_dtype", "compress_ratios")))

    with pytest.raises(ConfigError, match="lacks compress_ratios"):
        Config.from_pretrained(folder)
