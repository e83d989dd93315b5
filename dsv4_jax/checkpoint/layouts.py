"""Parameters in the layouts that this device's kernels read fastest, made once while a checkpoint loads.

The numbers stay the same. What changes is where they lie: the gate and up projections of the routed experts
become one weight in tiles, and linears that read the same input one weight of all their rows. The second of
such a pair is None from then on; `nn` asks for that.
"""

from typing import Any

from pallas_kernels import Target, join_rows, prepare_experts

Path = tuple[str | int, ...]

_EXPERTS = ("w1", "w2", "w3")  # below `experts`
_PAIRS = ((("wq_a", "weight"), ("wkv", "weight")), (("w1", "weight"), ("w3", "weight")))  # below one module


def lay_out(leaves: dict[Path, Any], arrived: Path, target: Target) -> None:
    """Lays the parameters out, in place, that are complete now that `leaves[arrived]` is there."""
    if arrived[-2] == "experts":
        paths = [(*arrived[:-1], name) for name in _EXPERTS]
        if all(path in leaves for path in paths):
            w1, w2, w3 = (leaves[path] for path in paths)
            prepared = prepare_experts(w1, w2, w3, target)
            leaves.update(zip(paths, prepared, strict=True))
    for first, second in _PAIRS:
        if arrived[-2:] in (first, second):
            paths = [(*arrived[:-2], *name) for name in (first, second)]
            if all(path in leaves for path in paths):
                joined = join_rows(leaves[paths[0]], leaves[paths[1]], target)
                leaves.update(zip(paths, joined, strict=True))
