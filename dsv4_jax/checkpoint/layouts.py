"""Parameters in the layouts that this device's kernels read fastest, made once while a checkpoint loads.

The numbers stay the same. What changes is where they lie: the gate and up projections of the routed experts
become one weight in tiles, and linears that read the same input one weight of all their rows. The others of
those are None from then on; `nn` asks for that.
"""

from typing import Any

from pallas_kernels import Target, join_rows, prepare_experts

Path = tuple[str | int, ...]

_EXPERTS = ("w1", "w2", "w3")  # below `experts`
# Below one module, in the order in which `nn` reads their columns; not every module has all of a group.
_TOGETHER = (
    ("wq_a", "wkv"),
    ("w1", "w3"),
    (
        "compressor.wkv",
        "compressor.wgate",
        "indexer.compressor.wkv",
        "indexer.compressor.wgate",
        "indexer.weights_proj",
    ),
)


def lay_out(leaves: dict[Path, Any], arrived: Path, target: Target) -> None:
    """Lays the parameters out, in place, that are complete now that `leaves[arrived]` is there."""
    if arrived[-2] == "experts":
        paths = [(*arrived[:-1], name) for name in _EXPERTS]
        if all(path in leaves for path in paths):
            w1, w2, w3 = (leaves[path] for path in paths)
            prepared = prepare_experts(w1, w2, w3, target)
            leaves.update(zip(paths, prepared, strict=True))
    for names in _TOGETHER:
        parts = [(*name.split("."), "weight") for name in names]
        for part in parts:
            if arrived[-len(part) :] == part:
                _join(leaves, [(*arrived[: -len(part)], *each) for each in parts], target)


def _join(leaves: dict[Path, Any], paths: list[Path], target: Target) -> None:
    """Joins neighbours among these weights, of which some may be joined already and some not there (yet)."""
    for number, path in enumerate(paths):
        before = [each for each in paths[:number] if leaves.get(each) is not None]
        arrived = all(each in leaves for each in paths[: number + 1])
        if before and arrived and leaves[path] is not None:
            leaves[before[-1]], leaves[path] = join_rows(leaves[before[-1]], leaves[path], target)
