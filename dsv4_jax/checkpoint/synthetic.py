"""Made-up checkpoints in the exact official layout: random numbers that keep activations in range.

For tests, demonstrations and benchmarks. The model is then correct arithmetic, not language.
"""

import functools
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dsv4_jax.checkpoint.load import progress_bar
from dsv4_jax.checkpoint.names import expected_tensors
from dsv4_jax.config import Config
from dsv4_jax.errors import OutputError
from dsv4_jax.weight_files import DTYPES, INDEX_NAME
from pallas_kernels.formats import e2m1_encode, pack_nibbles

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # safetensors dtype and shape by name

# Some released checkpoints repeat what the MTP head shares with the main model.
_COPIES = {"mtp.0.emb.tok_emb.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}
_EMBEDDINGS = ("embed.weight", "markov_w1.weight")

_DRAW_AT_ONCE = 2**16  # bytes; random numbers still in the cache are looked up twice as fast


def write_checkpoint(
    folder: str | Path,
    config: Config,
    *,
    shards: int = 3,
    seed: int = 0,
    mtp: bool = True,
    scale_dtype: Literal["F8_E8M0", "F32"] | None = None,
    mtp_copies: bool = False,
    unquantised: Collection[str] = (),
    progress: bool = False,
) -> None:
    """Writes config.json, generation_config.json, the index and the shards of a random model.

    A tensor's numbers depend on the seed and its name alone. Takes about the memory of one shard. The folder
    appears when everything is in it, or not at all.

    Args:
      folder: absent, or empty.
      shards: how many files of about the same size the tensors go to.
      mtp: also write what the config drafts with, an MTP head or a DSpark draft.
      scale_dtype: of the block scales; by default E8M0 beside FP4 experts and float32 else, as released.
      mtp_copies: also write `mtp.0.emb.tok_emb.weight` and `mtp.0.head.weight`, copies that loaders ignore.
      unquantised: linears to store as bfloat16 without a scale, by name without `.weight`.
      progress: show a bar on stderr.

    Raises:
      OutputError: the folder is not empty, or cannot be written.
      ValueError: more shards than tensors, or a name in `unquantised` that is not a quantised linear's.
    """
    tensors = _tensors(config, mtp=mtp, scale_dtype=scale_dtype, unquantised=unquantised)
    if mtp_copies:
        tensors |= {copy: tensors[original] for copy, original in _COPIES.items()}
    nbytes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, (dtype, shape) in tensors.items()}
    total = sum(nbytes.values())
    weight_map = {}
    with new_folder(Path(folder)) as unfinished, progress_bar("writing", total, progress) as advance:
        for number, names in enumerate(_split(nbytes, shards), 1):
            shard = f"model-{number:05}-of-{shards:05}.safetensors"
            numbers = {}
            for name in names:
                numbers[name] = _numbers(name, tensors, config, seed)
                weight_map[name] = shard
                advance(nbytes[name])
            save_file(numbers, unfinished / shard, metadata={"format": "pt"})
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(unfinished / INDEX_NAME, index)
        write_json(unfinished / "config.json", config.to_dict())
        write_json(unfinished / "generation_config.json", generation_config(config))


def _tensors(config: Config, *, mtp: bool, scale_dtype: str | None, unquantised: Collection[str]) -> Tensors:
    tensors = expected_tensors(config, mtp=mtp)
    for stem in unquantised:
        if tensors.pop(f"{stem}.scale", None) is None:
            raise ValueError(f"unquantised: {stem!r} is not a quantised linear of this config")
        dtype, (rows, columns) = tensors[f"{stem}.weight"]
        tensors[f"{stem}.weight"] = "BF16", (rows, 2 * columns if dtype == "I8" else columns)
    if scale_dtype is not None:
        scales = {name: shape for name, (_, shape) in tensors.items() if name.endswith(".scale")}
        tensors |= {name: (scale_dtype, shape) for name, shape in scales.items()}
    return tensors


def _split(nbytes: dict[str, int], shards: int) -> list[list[str]]:
    """The names in order, cut into `shards` lists of about as many bytes each, none of them empty."""
    if not 1 <= shards <= len(nbytes):
        raise ValueError(f"{len(nbytes)} tensors cannot fill {shards} shards")
    lists: list[list[str]] = [[]]
    left = sum(nbytes.values())
    room = left / shards
    for place, (name, size) in enumerate(nbytes.items()):
        to_come = shards - len(lists)
        last_chance = len(nbytes) - place == to_come
        if lists[-1] and to_come and (last_chance or size > 2 * room):  # most of it lies beyond the cut
            lists.append([])
            room = left / to_come
        lists[-1].append(name)
        room, left = room - size, left - size
    return lists


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` at the end if all went well, and is gone if not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = "is not empty" if folder.is_dir() else "is a file"
        raise OutputError(f"{folder}: {found}", hint="name a folder that does not exist yet")
    target = folder.resolve()
    # Beside the target: a rename is atomic only within one file system.
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.replace(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{folder}: cannot be written: {reason}", hint="name a folder that is writable and has room"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def generation_config(config: Config) -> dict:
    return {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "transformers_version": "4.46.3",
    }


# --- numbers: every value is one of 256, chosen by a random byte, which writes gigabytes in seconds


def _normal_quantiles(count: int) -> np.ndarray:
    """`count` equally likely numbers that stand for the standard normal distribution."""
    return np.array([NormalDist().inv_cdf((rank + 0.5) / count) for rank in range(count)])


_NORMAL = _normal_quantiles(256)

# By how much the scales of blocks differ: by powers of two where only those can be stored.
_SPREAD = {"F8_E8M0": np.repeat([0.5, 1.0, 1.0, 2.0], 64), "F32": np.linspace(0.5, 2.0, 256)}

# Codes get a standard deviation from half to all of this: well inside the range of their format.
_CODE_STD = {"F8_E4M3": 32.0, "I8": 2.5}


def _numbers(name: str, tensors: Tensors, config: Config, seed: int) -> np.ndarray:
    """The values of one tensor."""
    name = _COPIES.get(name, name)
    dtype, shape = tensors[name]
    random = np.random.default_rng([seed, *name.encode()])
    stem, _, kind = name.rpartition(".")
    if dtype == "I64":
        return _expert_ids(random, shape, config.n_routed_experts)
    if f"{stem}.scale" in tensors:
        weight_dtype, (_, columns) = tensors[f"{stem}.weight"]
        codes, scales = _block_tables(weight_dtype, tensors[f"{stem}.scale"][0], columns)
        return _draw(random, scales if kind == "scale" else codes, shape)
    mean, std = _mean_and_std(name, shape)
    return _draw(random, (mean + std * _NORMAL).astype(DTYPES[dtype]), shape)


def _mean_and_std(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Of an unquantised parameter."""
    if name.endswith(_EMBEDDINGS):
        return 0.0, 1.0
    if name.endswith(("norm.weight", "_scale")):
        return 1.0, 0.1
    if name.endswith((".weight", "_fn")):  # linears: out of numbers of size 1 come numbers of size 1
        return 0.0, shape[-1] ** -0.5
    return 0.0, 0.1  # what is added: hc bases, ape, sinks, gate biases


@functools.cache
def _block_tables(weight_dtype: str, scale_dtype: str, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and block scales to draw from: their products are like the numbers of an unquantised linear."""
    fp4 = weight_dtype == "I8"
    std = (2 * columns if fp4 else columns) ** -0.5
    spread = _SPREAD[scale_dtype]
    std /= float(np.sqrt(np.mean(spread**2)))
    exponent = math.ceil(math.log2(std / _CODE_STD[weight_dtype]))
    code_std = std / 2.0**exponent
    if fp4:
        codes = e2m1_encode(jnp.asarray(code_std * _normal_quantiles(16)))
        pairs = jnp.stack(jnp.meshgrid(codes, codes), axis=-1)  # two independent codes a byte
        code_table = np.asarray(pack_nibbles(pairs)).reshape(256).view(DTYPES[weight_dtype])
    else:
        code_table = (code_std * _NORMAL).astype(DTYPES[weight_dtype])
    # numpy rounds float32 to E8M0, and powers of two are exact there.
    return code_table, (2.0**exponent * spread).astype(np.float32).astype(DTYPES[scale_dtype])


def _expert_ids(random: np.random.Generator, shape: tuple[int, ...], experts: int) -> np.ndarray:
    """Distinct experts for each token: a start, and steps that do not come round to it again."""
    tokens, chosen = shape
    start = random.integers(experts, size=(tokens, 1))
    step = random.integers(1, experts // chosen, size=(tokens, 1), endpoint=True)
    return (start + step * np.arange(chosen)) % experts


def _draw(random: np.random.Generator, table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array of entries of `table`, which has 256, each chosen by one random byte."""
    words = table.view(f"u{table.itemsize}")  # numpy copies plain integers fastest
    out = np.empty(math.prod(shape), words.dtype)
    for start in range(0, out.size, _DRAW_AT_ONCE):
        part = out[start : start + _DRAW_AT_ONCE]
        index = np.frombuffer(random.bytes(part.size), np.uint8)
        np.take(words, index, out=part, mode="clip")  # no index is out of range, and "raise" copies `out`
    return out.view(table.dtype).reshape(shape)
