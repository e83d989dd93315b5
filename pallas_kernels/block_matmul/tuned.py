"""The fastest tiles measured, by arch, operand and shape; `scripts/bench/block_matmul.py --tune` writes this.

A shape is (rows, columns) of the weight; under it stand the tiles by the most tokens they are for, each with
the fields of `tiles.Tile` in their order. Nothing is in it yet: these are what we expect to be fast.
"""

TUNED: dict[str, dict[str, dict[tuple[int, int], dict[int, tuple[int, ...]]]]] = {}
