"""How far reading or writing has come."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn


@contextmanager
def progress_bar(label: str, nbytes: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar by bytes on stderr, or nothing; gives a function that moves it on."""
    if not shown:
        yield lambda nbytes: None
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)
