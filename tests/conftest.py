"""Where tests run and how they compile, and the golden checkpoints, each loaded once."""

import dataclasses
import functools
import gc
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.chat.made_up import write_tokenizer
from dsv4_jax.checkpoint.load import LoadedModel, load
from dsv4_jax.checkpoint.synthetic import write_checkpoint
from dsv4_jax.config import TINY, Config
from pallas_kernels import QuantArray, dequantize

TESTS = Path(__file__).parent
MOST_MAPS = 20_000  # of a process's memory, at the end of a file

# Eight fake devices make meshes. Tests run tiny programs once, so compiling them well costs more than it
# saves, but slow ones run them often. On a GPU it does not pay either to try out which way to multiply is
# fastest. What the user's own XLA_FLAGS say goes first.
_CPU_FLAGS = ("--xla_force_host_platform_device_count=8",)
_QUICK_FLAGS = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
_GPU_FLAGS = ("--xla_gpu_autotune_level=0",)


def _wants(config: pytest.Config, mark: str) -> bool:
    """Whether `-m gpu`, or another mark, was asked for."""
    return re.search(rf"(?<!not )\b{mark}\b", config.getoption("markexpr")) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Sets what JAX reads when a test first uses it; without `-m gpu` that is a CPU, on any machine."""
    gpu = _wants(config, "gpu")
    flags = _GPU_FLAGS if gpu else _CPU_FLAGS if _wants(config, "slow") else (*_CPU_FLAGS, *_QUICK_FLAGS)
    users = os.environ.get("XLA_FLAGS", "")
    named = {flag.partition("=")[0] for flag in users.split()}
    added = [flag for flag in flags if flag.partition("=")[0] not in named]
    os.environ["XLA_FLAGS"] = " ".join([users, *added])
    # Tracing makes many objects, few of them garbage, and programs need not say which lines they come from.
    gc.set_threshold(100_000, 20, 20)
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    if gpu:
        return
    # In the environment too, for the commands that tests start. What the user says goes first.
    jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
    # Barriers of Pallas' interpreter block threads of JAX's pool, one for each core: with few, all do.
    os.environ.setdefault("NPROC", "32")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A GPU's test is skipped on a CPU, unless it was asked for: then it fails."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        refuse = pytest.fail if _wants(item.config, "gpu") else pytest.skip
        refuse("needs a GPU, and JAX sees none")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a file's tests compiled programs go, once there are many.

    Each program maps memory, and Linux lets a process have 65,530 maps by default: beyond, XLA's compiler
    ends the process.
    """
    if nextitem is not None and nextitem.path == item.path:
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@dataclasses.dataclass(frozen=True)
class Golden:
    """A checkpoint in the official format, and what the official implementation computes for it.

    Attributes:
      loaded: parameters of the model and its MTP head.
      expected: arrays of expected.npz, whole-model outputs, with their inputs under "in/".
      fixtures: arrays of fixtures.npz, the same for single modules.
      tolerances: for each output how far one may be off.
    """

    loaded: LoadedModel
    expected: dict[str, np.ndarray]
    fixtures: dict[str, np.ndarray]
    tolerances: dict[str, dict[str, float]]

    def assert_agrees(self, key: str, found: np.ndarray) -> None:
        """Holds an output against the golden one, under the tolerance written beside it.

        Where rounding may flip a decision, a share `rows` of the rows may be off by up to `row_bound`.
        """
        golden = (self.expected | self.fixtures)[key]
        tolerance = self.tolerances[key]
        assert found.shape == golden.shape
        if tolerance.get("exact"):
            wrong, bounded = found.astype(np.int64) != golden.astype(np.int64), True
        else:
            error = np.abs(found.astype(np.float64) - golden.astype(np.float64))
            wrong = ~(error <= tolerance["max_abs"])  # a NaN is wrong too
            bounded = (error[wrong] <= tolerance.get("row_bound", 0)).all()
        bad_rows = wrong.reshape(len(wrong), -1).any(axis=1)
        assert bad_rows.mean() <= tolerance.get("rows", 0), f"{key}: rows {np.flatnonzero(bad_rows)} are off"
        assert bounded, f"{key} is off by {error.max():.2e}"


@pytest.fixture(scope="session")
def load_golden() -> Callable[[str], Golden]:
    """Gives a golden checkpoint by the name of its folder, read once."""

    @functools.cache
    def of_name(name: str) -> Golden:
        folder = TESTS / "data" / name
        archives = {}
        for part in ("expected", "fixtures"):
            with np.load(folder / f"{part}.npz", allow_pickle=False) as archive:
                archives[part] = dict(archive)
        tolerances = json.loads((folder / "tolerances.json").read_text())
        return Golden(load(folder, mtp=True), **archives, tolerances=tolerances)

    return of_name


@pytest.fixture(scope="session")
def tiny_fp4(load_golden: Callable[[str], Golden]) -> Golden:
    return load_golden("tiny-fp4")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up checkpoint with two layers, one of each kind that compresses, and its MTP head.

    It splits in many ways: eight heads in four groups, sixteen experts, three blocks of an expert's columns.
    """
    config = dataclasses.replace(
        TINY,
        num_hidden_layers=2,
        num_hash_layers=1,
        compress_ratios=(4, 128, 0),
        num_attention_heads=8,
        o_groups=4,
        o_lora_rank=256,
        n_routed_experts=16,
        moe_intermediate_size=384,
    )
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder, config)
    return folder


@pytest.fixture(scope="session")
def as_numbers() -> Callable[[LoadedModel], LoadedModel]:
    """Decodes all weights: bfloat16 holds them exactly, and programs without the decoding compile sooner."""

    decode = jax.jit(dequantize, static_argnums=1)

    def decoded(leaf: Any) -> Any:
        return decode(leaf, leaf.exact_dtype) if isinstance(leaf, QuantArray) else leaf

    def of(loaded: LoadedModel) -> LoadedModel:
        params, mtp_params = jax.tree.map(
            decoded, (loaded.params, loaded.mtp_params), is_leaf=lambda leaf: isinstance(leaf, QuantArray)
        )
        return dataclasses.replace(loaded, params=params, mtp_params=mtp_params)

    return of


@pytest.fixture(scope="session")
def shallow(as_numbers: Callable[[LoadedModel], LoadedModel]) -> Callable[..., LoadedModel]:
    """Cuts tiny-fp4 to some of its layers: few compile sooner.

    Layer 0 is SWA, 1 CSA, both routed by token id; 2 is HCA, routed by score. The last two hold every module
    there is together with the MTP head, which is SWA. Weights are decoded unless `quantised`.
    """

    def cut(loaded: LoadedModel, *layers: int, quantised: bool = False) -> LoadedModel:
        layers = layers or (1, 2)
        main, hashed = loaded.config.main_ratios, loaded.config.num_hash_layers
        config = dataclasses.replace(
            loaded.config,
            num_hidden_layers=len(layers),
            num_hash_layers=sum(layer < hashed for layer in layers),
            compress_ratios=(*[main[layer] for layer in layers], 0),
        )
        kept = {place: loaded.params["layers"][layer] for place, layer in enumerate(layers)}
        few = dataclasses.replace(loaded, config=config, params=loaded.params | {"layers": kept})
        return few if quantised else as_numbers(few)

    return cut


@pytest.fixture(scope="session")
def ending_with() -> Callable[[LoadedModel, int], LoadedModel]:
    """Has a model write its end of sentence where it wrote another token; no program is another one."""

    def swapped(loaded: LoadedModel, token: int) -> LoadedModel:
        head, eos = loaded.params["head"]["weight"], loaded.config.eos_token_id
        head = head.at[jnp.array([eos, token])].set(head[jnp.array([token, eos])])
        return dataclasses.replace(loaded, params=loaded.params | {"head": {"weight": head}})

    return swapped


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up checkpoint of one layer with MTP head and tokenizer, which compiles in seconds."""
    folder = tmp_path_factory.mktemp("text") / "checkpoint"
    tiny = Config.from_pretrained(TESTS / "data" / "tiny-fp4")
    config = dataclasses.replace(tiny, num_hidden_layers=1, num_hash_layers=0, compress_ratios=(4, 0))
    write_checkpoint(folder, config, shards=1)
    write_tokenizer(folder, config.vocab_size)
    return folder


@pytest.fixture(scope="session")
def dump_outputs() -> ModuleType:
    """scripts/dump_outputs.py, which computes every golden whole-model output, as a module."""
    path = TESTS.parent / "scripts" / "dump_outputs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
