"""What the device at hand can do."""

import dataclasses
import functools
import importlib
from contextlib import AbstractContextManager
from typing import Literal

import jax

Vendor = Literal["cpu", "cuda", "rocm"]


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device, as far as choosing and compiling a kernel goes.

    Attributes:
      vendor: whose compiler takes the kernel.
      arch: the compiler's own name of the chip: "sm_90", "gfx942", or "" on a CPU.
    """

    vendor: Vendor
    arch: str

    @property
    def has_e4m3(self) -> bool:
        """Whether the chip's matrix units take float8_e4m3fn; gfx942's take another FP8, sm_80's none."""
        if self.vendor == "cuda":
            return int(self.arch.removeprefix("sm_")) >= 90
        return self.vendor == "rocm" and self.arch == "gfx950"

    @property
    def has_e4m3fnuz(self) -> bool:
        """Whether the chip's matrix units take float8_e4m3fnuz, CDNA3's FP8: half the range, one zero."""
        return self.vendor == "rocm" and self.arch == "gfx942"


# In place of JAX's default backend; part of the key of every cache of jax.jit.
_assumed = jax.make_user_context(None)


def assume(target: Target) -> AbstractContextManager[None]:
    """In a `with`, makes ops traced inside it those of this target: to compile for what is not at hand."""
    return _assumed(target)


def current_target() -> Target:
    """The target of JAX's default backend, or the one that is assumed."""
    return _assumed.value or _target_at_hand()


@functools.cache
def _target_at_hand() -> Target:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return Target("cpu", "")
    if device.platform != "gpu":
        raise NotImplementedError(f"platform {device.platform!r}: have cpu, cuda and rocm")
    capability = str(device.compute_capability)  # "9.0" from CUDA, "gfx942:sramecc+:xnack-" from ROCm
    if capability.startswith("gfx"):
        return Target("rocm", capability.split(":")[0])
    return Target("cuda", f"sm_{capability.replace('.', '')}")


def name_kernel_libraries() -> None:
    """Tells XLA where functions lie that kernels of a program call, before one that was kept is loaded.

    Mosaic's module does so when it is imported, for a program that is compiled as its kernels are traced.
    """
    if current_target().vendor == "cuda":
        importlib.import_module("jax.experimental.mosaic.gpu")
