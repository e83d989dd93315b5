"""DeepSeek-V4 in JAX: load a released checkpoint, generate, or build on its pure functions."""

from dsv4_jax.answers import ChatOutput, GenerationOutput
from dsv4_jax.cache import make_cache
from dsv4_jax.checkpoint.inspect import inspect_checkpoint
from dsv4_jax.checkpoint.load import LoadedModel, load
from dsv4_jax.config import Config
from dsv4_jax.decode import Requests
from dsv4_jax.errors import DSV4Error
from dsv4_jax.generate import decode_step, generate, prefill
from dsv4_jax.llm import LLM
from dsv4_jax.model import Transformer
from dsv4_jax.mtp import MTPHead
from dsv4_jax.numerics import KVQUANT, OFFICIAL, PLAIN, Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.sharding import make_mesh
from dsv4_jax.tokenizer import Tokenizer

__all__ = [
    "KVQUANT",
    "LLM",
    "OFFICIAL",
    "PLAIN",
    "ChatOutput",
    "Config",
    "DSV4Error",
    "GenerationOutput",
    "LoadedModel",
    "MTPHead",
    "Numerics",
    "Requests",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
    "decode_step",
    "generate",
    "inspect_checkpoint",
    "load",
    "make_cache",
    "make_mesh",
    "prefill",
]
