"""The chips that kernels are compiled for."""

import pytest

EVERY_ARCH = ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"]
COMPILED_ARCH = pytest.mark.parametrize("arch", EVERY_ARCH)
