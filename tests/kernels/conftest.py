"""Plain functions in the place of our own PTX, so that Pallas' interpreter can run kernels that use it."""

import collections
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl


def plain_product(a: Any, b: Any, slot: Any, a_row: Any, b_row: Any, spent: jax.Array) -> jax.Array:
    """`wgmma.start`, finished at once."""
    height, width = spent.shape
    a_rows, b_rows = a[slot, pl.ds(a_row, height)], b[slot, pl.ds(b_row, width)]
    return a_rows.astype(jnp.float32) @ b_rows.astype(jnp.float32).T


class Mail:
    """What the programs of a cluster send each other (`cluster_sum`), through the host.

    `axes` tell clusters of one launch apart.
    """

    def __init__(self, *axes: str):
        self.axes, self.pieces, self.news = axes, collections.defaultdict(dict), threading.Condition()

    def _to(self, *owner: Any) -> tuple[Any, ...]:
        return *map(lax.axis_index, self.axes), *owner

    def send(self, _: Any, sums: Any, owner: Any, received: Any, arrived: Any, group: Any) -> None:
        def put(sums: Any, sender: Any, *to: Any) -> None:
            with self.news:
                self.pieces[tuple(map(int, to))][int(sender)] = np.asarray(sums)
                self.news.notify_all()

        io_callback(put, None, sums, lax.axis_index("split"), *self._to(owner, group))

    def receive(self, exchange: Any, sums: Any, received: Any, arrived: Any, group: Any) -> jax.Array:
        def take(sums: Any, *to: Any) -> np.ndarray:
            inbox = self.pieces[tuple(map(int, to))]
            with self.news:
                assert self.news.wait_for(lambda: len(inbox) == exchange.splits - 1, timeout=60)
            return np.asarray(sums) + sum(inbox.values())

        me = self._to(lax.axis_index("split"), group)
        return io_callback(take, jax.ShapeDtypeStruct(sums.shape, jnp.float32), sums, *me)


@pytest.fixture
def without_ptx(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the PTX of FP8 products; the arguments are the axes that tell clusters apart."""
    from pallas_kernels.block_matmul import cluster_sum, wgmma

    def replace(*axes: str) -> None:
        mail = Mail(*axes)
        monkeypatch.setattr(wgmma, "start", plain_product)
        monkeypatch.setattr(wgmma, "finish", lambda sums, later=0: sums)
        monkeypatch.setattr(cluster_sum, "prepare", lambda *_: None)
        monkeypatch.setattr(cluster_sum, "meet", lambda: None)
        monkeypatch.setattr(cluster_sum, "send", mail.send)
        monkeypatch.setattr(cluster_sum, "receive", mail.receive)

    return replace
