"""The fastest tiles measured, written by `scripts/bench/block_matmul.py --tune`.

By arch, by what x holds, and by (rows, columns) of the weight; then by the most tokens a tile is for. A tile
has the fields of `tiles.Tile` in their order.
"""

TUNED: dict[str, dict[str, dict[tuple[int, int], dict[int, tuple[int, ...]]]]] = {}
