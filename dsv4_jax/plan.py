"""What a model takes of each device's memory, part by part, before there is any device."""

import collections
import dataclasses
import html
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from dsv4_jax.cache import LayerCache
from dsv4_jax.checkpoint.names import parameters
from dsv4_jax.config import Config
from dsv4_jax.numerics import Numerics
from dsv4_jax.parallel import Along
from dsv4_jax.sharding import (
    MESH_AXES,
    Placement,
    Rules,
    check_mesh,
    placements,
    resolve,
    spec,
    under_rules,
    ways,
)

PIECE = 512  # tokens of a prompt that are read at once
_MOST_SLOTS = 2**16


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device, and what fits beside them.

    Attributes:
      parts: "experts", "dense", "window", "entries", "index keys", "raw rows" and "workspace", in bytes.
      device_nbytes: what a device has.
      slots, max_len: requests under way, and tokens that each may have.
      most_slots: requests of `max_len` tokens that fit; 0 if none does.
      longest: tokens that each of `slots` requests may have; 0 if none.
    """

    parts: dict[str, int]
    device_nbytes: int
    slots: int
    max_len: int
    most_slots: int
    longest: int

    @property
    def nbytes(self) -> int:
        """Of everything."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.nbytes <= self.device_nbytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return dataclasses.asdict(self) | {"nbytes": self.nbytes, "fits": self.fits}

    def lines(self) -> list[str]:
        """A table."""
        rows = [*self.parts.items(), ("all", self.nbytes), ("device", self.device_nbytes)]
        free = (self.device_nbytes - self.nbytes) / 2**30
        verdict = f"fits, {free:.1f} GiB are left" if self.fits else f"does not fit: {-free:.1f} GiB too much"
        return [
            *(f"{name:<12}{size / 2**30:>9.2f} GiB" for name, size in rows),
            f"{self.slots} requests of {self.max_len:,} tokens: {verdict}",
            f"most requests of {self.max_len:,} tokens: {self.most_slots:,}",
            f"longest of {self.slots} requests: {self.longest:,} tokens",
        ]

    def svg(self) -> str:
        """A bar of the parts, and a line where the device ends."""
        width, height, scale = 720, 120, 640 / max(self.nbytes, self.device_nbytes)
        shapes, x = [], 40.0
        for (name, size), colour in zip(self.parts.items(), _COLOURS, strict=True):
            label = f"{html.escape(name)} {size / 2**30:.2f} GiB"
            shapes.append(
                f'<rect x="{x:.1f}" y="40" width="{size * scale:.1f}" height="40" fill="{colour}">'
                f"<title>{label}</title></rect>"
            )
            if size * scale > 60:
                shapes.append(f'<text x="{x + 4:.1f}" y="64">{html.escape(name)}</text>')
            x += size * scale
        end = 40 + self.device_nbytes * scale
        shapes.append(f'<line x1="{end:.1f}" x2="{end:.1f}" y1="30" y2="90" stroke="black"/>')
        title = f"{self.nbytes / 2**30:.1f} of {self.device_nbytes / 2**30:.0f} GiB a device"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' font-family="sans-serif" font-size="12"><text x="40" y="20">{title}</text>'
            f"{''.join(shapes)}</svg>\n"
        )


_COLOURS = ("#4e79a7", "#76b7b2", "#f28e2b", "#e15759", "#edc948", "#b07aa1", "#bab0ac")


def plan_memory(
    config: Config,
    sizes: tuple[int, int, int],
    rules: Rules,
    numerics: Numerics,
    *,
    slots: int,
    max_len: int,
    device_nbytes: int,
    mtp: bool = False,
) -> MemoryPlan:
    """The plan of a mesh of dp x ep x tp devices.

    Raises:
      MemoryPlanError: the model cannot be split so; exit code 2.
    """
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    check_mesh(config, mesh.shape, rules)
    weights = _weights(config, mesh, rules, mtp=mtp)

    def total(slots: int, max_len: int) -> int:
        return sum(parts_of(slots, max_len).values())

    def parts_of(slots: int, max_len: int) -> dict[str, int]:
        caches = _caches(config, mesh, rules, numerics, slots, max_len, mtp=mtp)
        rows = slots // ways(resolve(rules, mesh.shape, {"batch": slots}).batch, mesh.shape)
        a_slot = sum(caches.values()) // max(rows, 1)
        return weights | caches | {"workspace": _workspace(config, mesh, rules, slots, max_len, a_slot)}

    def most(fits, limit: int) -> int:
        """The largest number up to `limit` that fits, of those that are 0 or at least 1."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    return MemoryPlan(
        parts=parts_of(slots, max_len),
        device_nbytes=device_nbytes,
        slots=slots,
        max_len=max_len,
        most_slots=most(lambda number: total(number, max_len) <= device_nbytes, _MOST_SLOTS),
        longest=most(lambda number: total(slots, number) <= device_nbytes, config.max_position_embeddings),
    )


def _weights(config: Config, mesh: AbstractMesh, rules: Rules, *, mtp: bool) -> dict[str, int]:
    parts = {"experts": 0, "dense": 0}
    for parameter in parameters(config, mtp=mtp and config.draft == "mtp"):
        places = placements(config, mesh, rules, parameter.axes, parameter.value)  # type: ignore[arg-type]
        found = jax.tree.leaves(places, is_leaf=lambda each: isinstance(each, Placement))
        for place, leaf in zip(found, jax.tree.leaves(parameter.value), strict=True):
            shape = place.sharding.shard_shape(place.shape)
            parts["experts" if "experts" in parameter.path else "dense"] += (
                math.prod(shape) * leaf.dtype.itemsize
            )
    return parts


def _caches(
    config: Config,
    mesh: AbstractMesh,
    rules: Rules,
    numerics: Numerics,
    slots: int,
    max_len: int,
    *,
    mtp: bool,
) -> dict[str, int]:
    parts = {"window": 0, "entries": 0, "index keys": 0, "raw rows": 0}
    sizes = {"batch": slots, "max_len": max_len, "max_draft": 0}
    layers = collections.Counter(config.main_ratios) + collections.Counter({0: int(mtp)})
    for ratio, count in layers.items():
        with under_rules(mesh, rules):
            layer = jax.eval_shape(lambda ratio=ratio: LayerCache.zeros(config, numerics, ratio, **sizes))
        axes = layer.axes
        pairs = [("window", layer.window, axes.window)]
        for name, kept, along in (
            ("entries", layer.compressed, axes.compressed),
            ("index keys", layer.index, axes.index),
        ):
            if kept is not None:
                pairs.append((name, kept.entries, along.entries))
                pairs.append(("raw rows", (kept.kv, kept.score), (along.kv, along.score)))
        for name, tree, along in pairs:
            parts[name] += count * _part_nbytes(tree, along, mesh, rules)
    return parts


def _part_nbytes(tree: Any, along: Any, mesh: AbstractMesh, rules: Rules) -> int:
    def of_leaf(along: Along, leaf: jax.ShapeDtypeStruct) -> int:
        own = resolve(rules, mesh.shape, {"batch": leaf.shape[0]})
        split = spec(*along.axes, rules=own)
        names = [(axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in split]
        return leaf.size // math.prod(ways(each, mesh.shape) for each in names) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, along, tree)))


def _workspace(
    config: Config, mesh: AbstractMesh, rules: Rules, slots: int, max_len: int, a_slot: int
) -> int:
    """What the larger of two programs keeps beside its arguments: a decode step, and a piece of a prompt.

    The streams in several forms, and the indexer's scores by head. That the one takes its scores once and
    the other four times is what XLA's own analysis says (docs/benchmarks.md). `a_slot`: bytes of the caches
    of one slot, which travel to all devices that read a prompt.
    """
    batch = {"batch": slots}
    rows = slots // ways(resolve(rules, mesh.shape, batch).batch, mesh.shape)
    tokens = min(PIECE, max_len)
    streams = 32 * config.hc_mult * config.hidden_size
    entries = -(-max_len // 4) // ways(rules.cache_slots, mesh.shape) if 4 in config.main_ratios else 0
    scores = 4 * config.index_n_heads * entries
    piece = tokens * streams + 4 * min(tokens, 64) * scores + (3 * a_slot if rows < slots else 0)
    return max(rows * (streams + scores), piece)
