"""Checks of what arrays hold, which only a run of the program can find out.

Kernels trust nobody: an index that is out of bounds is brought inside, so nothing is read or written
outside. That keeps a mistake from being seen. In a `with checks():` programs look for it on the device, and
end with an error that names the op.
"""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

# Part of the key of every cache of jax.jit: a program traced without checks never serves one with them.
_checking = jax.make_user_context(False)


def checks(wanted: bool = True) -> AbstractContextManager[None]:
    """In a `with`, makes programs that are traced inside it check what they are given.

    One that finds something wrong ends with a `jax.errors.JaxRuntimeError`, whose text says which op it is,
    where its result is waited for. Checks cost time: each is a kernel, and a word with the host.
    """
    return _checking(wanted)


def checking() -> bool:
    """Whether `checks` is on."""
    return _checking.value


def check(op: str, ok: Bool[Array, "..."], complaint: str, values: jax.Array) -> None:
    """Complains of `values` where they are not `ok`, naming `op`; does nothing outside of `checks`.

    Args:
      ok: shaped like `values`.
      complaint: a sentence without its end, which is an offending value and where it stands.
    """
    if not _checking.value:
        return

    def report(wrong, place, value) -> None:
        if wrong:
            at = np.unravel_index(int(place), values.shape)
            raise ValueError(f"{op}: {complaint} {value.item()} at {list(map(int, at))}")

    place = jnp.argmin(ok)
    jax.debug.callback(report, ~ok.all(), place, values.reshape(-1)[place])
