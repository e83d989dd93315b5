"""The numbers that training begins with, in float32."""

import math

import jax.numpy as jnp
import numpy as np

from dsv4_jax.checkpoint.names import Parameter, nest, parameters
from dsv4_jax.config import Config
from dsv4_jax.train.forward import Weights


def initial(config: Config, seed: int) -> Weights:
    """Master weights of the model and its MTP head, as nested as its parameters are."""
    random = np.random.default_rng(seed)
    found = {each.path: _numbers(each, config, random) for each in parameters(config, mtp=True)}
    for path in found:
        if path[-4:] == ("attn", "compressor", "wkv", "weight"):  # entries begin as means of key-values
            of_tokens = found[*path[:-3], "wkv", "weight"]
            found[path] = np.tile(of_tokens, (found[path].shape[0] // of_tokens.shape[0], 1))
    return nest({path: jnp.asarray(each) for path, each in found.items()})


def _numbers(parameter: Parameter, config: Config, random: np.random.Generator) -> np.ndarray:
    path, shape = parameter.path, parameter.value.shape
    name = ".".join(map(str, path))
    if name.endswith("tid2eid"):
        experts = np.tile(np.arange(config.n_routed_experts), (shape[0], 1))
        return random.permuted(experts, axis=1)[:, : shape[1]].astype(np.int32)
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    if name.endswith((".hc_attn.base", ".hc_ffn.base")):
        return _hyper_base(config.hc_mult)
    if name.endswith("hc_head.base"):
        return np.full(shape, -math.log(config.hc_mult - 1), np.float32)
    if name.endswith(".scale"):
        return np.full(shape, 0.1, np.float32)
    if name.endswith(("attn_sink", "bias", "ape")):
        return np.zeros(shape, np.float32)
    std = shape[-1] ** -0.5
    if name.endswith(("wo_b.weight", "w2", "w2.weight")):  # what is added to the streams begins small
        std *= (2 * config.num_hidden_layers) ** -0.5
    if name == "embed.weight":
        std = 0.5
    return (std * random.standard_normal(shape)).astype(np.float32)


def _hyper_base(n: int) -> np.ndarray:
    """Each sub-layer reads the mean of the streams, writes to all of them alike, and they stay apart."""
    pre, post, comb = np.full(n, -math.log(n - 1)), np.zeros(n), 4 * np.eye(n)
    return np.concatenate([pre, post, comb.ravel()]).astype(np.float32)
