"""Compiled programs in a folder: the next process that wants one neither traces nor compiles it.

JAX's own cache of compiled programs, in whose folder these are, is asked with the lowered program, and making
that takes seconds for each. Here a program is found by what it would be made from.
"""

import hashlib
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from dsv4_jax.distributed import code_fingerprint
from pallas_kernels import debug
from pallas_kernels.target import name_kernel_libraries

_log = logging.getLogger(__name__)


def compiled(function: Any, static: tuple[Any, ...], arguments: tuple[Any, ...], choice: str | None) -> Any:
    """`function(*static, ...)`, jitted with that many arguments static, compiled for `arguments`.

    With a folder of compiled programs (`jax_compilation_cache_dir`) it comes from there, if some process has
    left it. A file of that folder is run as it is, so it is read only if it is this user's and no other can
    write to it.

    Args:
      arguments: arrays, or shapes with a sharding where arrays will be.
      choice: the implementation that was chosen, as part of the program's name.
    """
    cache = jax.config.jax_compilation_cache_dir
    if not cache:
        return function.lower(*static, *arguments).compile()
    file = Path(cache) / "programs" / _name(function, static, arguments, choice)
    try:
        status = file.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError("is another user's, or others can write to it")
        devices = [*jax.tree.leaves(arguments)[0].sharding.device_set]
        name_kernel_libraries()
        return deserialize_and_load(*pickle.loads(file.read_bytes()), execution_devices=devices)
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever XLA and pickle raise: it is compiled anew
        _log.warning("%s: %s", file, error)
    made = function.lower(*static, *arguments).compile()
    try:
        file.parent.mkdir(exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.touch(0o600)
        unfinished.write_bytes(pickle.dumps(serialize(made)))
        unfinished.rename(file)
    except Exception as error:  # what cannot be kept runs all the same
        _log.warning("%s: %s", file, error)
    return made


def _name(function: Any, static: tuple[Any, ...], arguments: tuple[Any, ...], choice: str | None) -> str:
    """Of everything that the program depends on."""
    leaves, tree = jax.tree.flatten(arguments)
    device = jax.devices()[0]
    parts = [
        *(code_fingerprint(), jaxlib.version.__version__, os.environ.get("XLA_FLAGS")),
        *(device.device_kind, device.client.platform_version, jax.device_count()),
        *(function.__name__, static, tree, choice, debug.checking()),
        *((leaf.shape, str(leaf.dtype), str(getattr(leaf, "sharding", None))) for leaf in leaves),
    ]
    return f"{function.__name__}-{hashlib.sha256(repr(parts).encode()).hexdigest()}"
