"""Which arithmetic the model runs in: one value, passed down, that every layer follows."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Precision of what flows between the weights; the weights' own precision is the checkpoint's.

    Attributes:
      dtype: of the residual streams and of every op's result: "float32" or "bfloat16".
      activation: format of the input of quantised linears, "fp8_token128", or None to leave it.
      kv: format of the non-rotary part of cached key-values, "fp8_block64", or None.
      index: format of indexer queries and keys, "fp4_group32", or None.
    """

    dtype: str = "float32"
    activation: str | None = None
    kv: str | None = None
    index: str | None = None

    def __post_init__(self):
        allowed = {
            "dtype": ("float32", "bfloat16"),
            "activation": (None, "fp8_token128"),
            "kv": (None, "fp8_block64"),
            "index": (None, "fp4_group32"),
        }
        for name, values in allowed.items():
            if (found := getattr(self, name)) not in values:
                raise ValueError(f"{name}={found!r}, must be one of {values}")


PLAIN = Numerics()
KVQUANT = Numerics(kv="fp8_block64", index="fp4_group32")
OFFICIAL = Numerics("bfloat16", activation="fp8_token128", kv="fp8_block64", index="fp4_group32")

PRESETS = {"plain": PLAIN, "kvquant": KVQUANT, "official": OFFICIAL}
