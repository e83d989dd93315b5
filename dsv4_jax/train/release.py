"""A trained model to a folder in the official format: FP4 experts, FP8 linears, tokenizer, configs."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from dsv4_jax.checkpoint.names import Parameter, expected_tensors, parameters
from dsv4_jax.checkpoint.synthetic import generation_config, new_folder, write_json
from dsv4_jax.config import Config
from dsv4_jax.train.forward import Weights
from dsv4_jax.train.straight_through import stored
from dsv4_jax.train.words import write_tokenizer
from dsv4_jax.weight_files import DTYPES, INDEX_NAME
from pallas_kernels import QuantArray

SHARD = "model-00001-of-00001.safetensors"


def release(folder: str | Path, config: Config, masters: Weights) -> None:
    """Writes the checkpoint of `masters`; it appears when all of it is there.

    Raises:
      OutputError: the folder is not empty, or cannot be written.
    """
    tensors = {}
    for each in parameters(config, mtp=True):
        value: Any = masters
        for key in each.path:
            value = value[key]
        tensors |= _tensors(each, value)
    expected = expected_tensors(config, mtp=True)
    tensors = {name: tensors[name].astype(DTYPES[dtype], copy=False) for name, (dtype, _) in expected.items()}
    nbytes = sum(each.nbytes for each in tensors.values())
    with new_folder(Path(folder)) as unfinished:
        save_file(tensors, unfinished / SHARD, metadata={"format": "pt"})
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict.fromkeys(tensors, SHARD)}
        write_json(unfinished / INDEX_NAME, index)
        write_json(unfinished / "config.json", config.to_dict())
        write_json(unfinished / "generation_config.json", generation_config(config))
        write_tokenizer(unfinished)


def _tensors(parameter: Parameter, master: jax.Array) -> dict[str, np.ndarray]:
    """What the files hold of one parameter, by name."""
    value, stems = stored(parameter, master), parameter.stems()
    if not isinstance(value, QuantArray):
        return {stems[0]: np.asarray(value)}
    dtypes = {name: DTYPES[dtype] for name, dtype, _ in parameter.tensors()}
    parts = {"weight": np.asarray(value.values), "scale": np.asarray(value.scale)}
    found = {}
    for expert, stem in enumerate(stems):
        for part, array in parts.items():
            name = f"{stem}.{part}"
            found[name] = (array[expert] if parameter.stacked else array).view(dtypes[name])
    return found
