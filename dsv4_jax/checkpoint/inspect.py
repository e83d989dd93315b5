"""What a checkpoint folder holds, held against what its config needs; from the headers alone."""

import collections
import dataclasses
from pathlib import Path
from typing import Any

from dsv4_jax.checkpoint.load import (
    Mismatch,
    as_stored,
    holds_draft,
    mismatches,
    missing_and_unexpected,
)
from dsv4_jax.checkpoint.names import SCALE_DTYPES, Parameter, parameters
from dsv4_jax.config import Config
from dsv4_jax.weight_files import WeightFiles
from pallas_kernels import QuantArray

_LAYER_KINDS = {0: "SWA", 4: "CSA", 128: "HCA"}  # by compression ratio
_DRAFTS = {"mtp": "MTP head", "dspark": "DSpark draft (not run)"}
_LISTED = 10  # of each kind of fault, for humans


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What `inspect_checkpoint` found.

    Attributes:
      folder: as given.
      config: its config.json.
      shards: files.
      tensors: in all shards.
      nbytes: of all tensors.
      dtypes: safetensors dtype to (tensors, bytes).
      main_parameters: numbers that the main model of this config has, without block scales and hash tables.
      draft_parameters: those of the draft the folder holds.
      expert_format: "fp4", "fp8" or "bf16".
      scale_dtype: of the block scales, "F8_E8M0" or "F32"; both if linears differ, "none" if there are none.
      draft: "MTP head", "DSpark draft (not run)" or "none".
      missing: names that the model needs.
      unexpected: names that it has no place for.
      mismatched: tensors of another dtype or shape than it needs.
    """

    folder: Path
    config: Config
    shards: int
    tensors: int
    nbytes: int
    dtypes: dict[str, tuple[int, int]]
    main_parameters: int
    draft_parameters: int
    expert_format: str
    scale_dtype: str
    draft: str
    missing: list[str]
    unexpected: list[str]
    mismatched: list[Mismatch]

    @property
    def ok(self) -> bool:
        """Whether the folder holds exactly what its config needs."""
        return not (self.missing or self.unexpected or self.mismatched)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it; the config as a config.json has it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "folder": str(self.folder),
            "config": self.config.to_dict(),
            "dtypes": {
                name: {"tensors": count, "nbytes": nbytes} for name, (count, nbytes) in self.dtypes.items()
            },
            "mismatched": [each._asdict() for each in self.mismatched],
            "ok": self.ok,
        }

    def lines(self) -> list[str]:
        """The report in a few lines for humans, long lists cut short."""
        config = self.config
        dtypes = ", ".join(f"{name} {count:,}" for name, (count, _) in self.dtypes.items())
        ratios = collections.Counter(config.main_ratios)
        layers = ", ".join(f"{ratios[ratio]} {kind}" for ratio, kind in _LAYER_KINDS.items() if ratios[ratio])
        model = f"{_brief(self.main_parameters)} parameters"
        if self.draft_parameters:
            model += f" + {self.draft} {_brief(self.draft_parameters)}"
        faults = {"missing": self.missing, "unexpected": self.unexpected}
        faults["mismatched"] = [
            f"{name} is {found}, expected {want}" for name, found, want in self.mismatched
        ]
        counts = ", ".join(f"{len(names):,} {fault}" for fault, names in faults.items())
        size = _brief(self.nbytes, " GB", " MB")
        return [
            f"{self.shards} shard{'s' * (self.shards > 1)}, {self.tensors:,} tensors, {size}: {dtypes}",
            f"DeepSeek-V4: {config.num_hidden_layers} layers ({layers}), hidden {config.hidden_size},"
            f" {config.n_routed_experts} experts ({self.expert_format}), {model}",
            f"schema: {'OK ' if self.ok else 'WRONG '}({counts})",
            *(line for fault, names in faults.items() for line in _listed(fault, names)),
        ]


def inspect_checkpoint(folder: str | Path) -> CheckpointReport:
    """Holds the tensors of a folder against those its config needs; takes seconds for any size.

    Linears may be stored in bfloat16 and scales in float32 or E8M0, as `checkpoint.load` takes them. What is
    missing, unexpected or of another shape is reported, not raised.

    Raises:
      CheckpointError: the folder or a file is absent or damaged.
      ConfigError: its config.json does not describe a model that this package runs.
    """
    config = Config.from_pretrained(folder)
    with WeightFiles.open(folder) as files:
        mtp = holds_draft(config, files)
        missing, unexpected = missing_and_unexpected(config, files, mtp=mtp)
    stored = [as_stored(parameter, files) for parameter in parameters(config, mtp=mtp)]
    drafting = [parameter for parameter in stored if parameter.path[0] == "mtp"]
    return CheckpointReport(
        folder=Path(folder),
        config=config,
        shards=len(files.shards),
        tensors=len(files.tensors),
        nbytes=files.nbytes,
        dtypes=_by_dtype(files),
        main_parameters=_count(stored) - _count(drafting),
        draft_parameters=_count(drafting),
        expert_format=config.expert_dtype,
        scale_dtype=_scale_dtypes(stored),
        draft=_DRAFTS[config.draft] if config.draft and mtp else "none",
        missing=missing,
        unexpected=unexpected,
        mismatched=[each for parameter in stored for each in mismatches(parameter, files)],
    )


def _by_dtype(files: WeightFiles) -> dict[str, tuple[int, int]]:
    counts, nbytes = collections.Counter(), collections.Counter()
    for info in files.tensors.values():
        counts[info.dtype] += 1
        nbytes[info.dtype] += info.nbytes
    return {dtype: (counts[dtype], nbytes[dtype]) for dtype in sorted(counts)}


def _count(stored: list[Parameter]) -> int:
    return sum(parameter.value.size for parameter in stored if parameter.entry.stored != "I64")


def _scale_dtypes(stored: list[Parameter]) -> str:
    values = (parameter.value for parameter in stored)
    found = {SCALE_DTYPES[value.scale.dtype.name] for value in values if isinstance(value, QuantArray)}
    return ", ".join(sorted(found)) or "none"


def _brief(number: int, billions: str = "B", millions: str = "M") -> str:
    return f"{number / 1e9:,.1f}{billions}" if number >= 1e8 else f"{number / 1e6:,.1f}{millions}"


def _listed(fault: str, names: list[str]) -> list[str]:
    more = [f"  and {len(names) - _LISTED:,} more {fault}"] if len(names) > _LISTED else []
    return [f"  {fault}: {name}" for name in names[:_LISTED]] + more
