"""The chips that kernels are compiled for: one of each vendor in every run, all of them in slow ones."""

import pytest

EVERY_ARCH = ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"]
_SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in EVERY_ARCH if arch not in ("sm_90", "gfx942")]
COMPILED_ARCH = pytest.mark.parametrize("arch", ["sm_90", "gfx942", *_SLOW])
