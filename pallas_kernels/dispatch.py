"""Which implementation of an op runs: the one asked for, or the fastest that fits."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.target import Target, current_target

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      name: "reference", "triton" or "mosaic".
      run: the function; all implementations of an op share one signature.
      fits: whether `run` works on a target, given the op's own arguments.
    """

    name: str
    run: Callable[..., Any]
    fits: Callable[..., bool] = lambda target, *args, **kwargs: True


@functools.cache
def _log_fall_back(op: str, target: Target) -> None:
    _log.warning("%s runs its reference on %s: no kernel takes these arguments", op, target.arch)


def select(implementations: Sequence[Implementation], name: str | None, *args: Any, **kwargs: Any) -> Any:
    """Runs the implementation called `name`, or with None the first that fits, on the arguments.

    `implementations` go from fastest to slowest and end with the reference. A named one never
    falls back; a GPU that is left with the reference logs it once per op.

    Raises:
      ValueError: no implementation has this name.
      NotImplementedError: the named implementation does not take this device or these arguments.
    """
    target = current_target()
    if name is not None:
        named = [each for each in implementations if each.name == name]
        if not named:
            known = ", ".join(each.name for each in implementations)
            raise ValueError(f"implementation={name!r} is unknown here, have {known}")
        if not named[0].fits(target, *args, **kwargs):
            raise NotImplementedError(f"implementation={name!r} does not take these arguments on {target}")
        return named[0].run(*args, **kwargs)
    chosen = next(each for each in implementations if each.fits(target, *args, **kwargs))
    if chosen.name == "reference" and target.vendor != "cpu":
        _log_fall_back(chosen.run.__module__.split(".")[-2], target)
    return chosen.run(*args, **kwargs)
