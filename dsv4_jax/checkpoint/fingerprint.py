"""Which model a folder holds, told from a sample of its bytes in a second or two."""

import hashlib
from pathlib import Path
from typing import Any

from dsv4_jax.weight_files import WeightFiles, check_folder

_FILES = ("config.json", "tokenizer.json", "manifest.json")
_SAMPLE = 2**16  # bytes, at the beginning, in the middle and at the end of each shard


def fingerprint(folder: str | Path) -> str:
    """Sixteen hex digits that two folders share only if they hold the same model.

    Whole are config.json, tokenizer.json and the headers of the shards; of their numbers it is a sample, so
    it tells checkpoints apart and is no proof against a flipped bit. The manifest of a converted checkpoint
    says what its numbers are.

    Raises:
      CheckpointError: the folder or a file is absent or damaged.
    """
    folder = check_folder(folder)
    digest = hashlib.sha256()
    for name in _FILES:
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    if not (folder / _FILES[-1]).is_file():
        _add_shards(digest, folder)
    return digest.hexdigest()[:16]


def _add_shards(digest: Any, folder: Path) -> None:
    with WeightFiles.open(folder) as files:
        for name, info in sorted(files.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape} {info.file.name} {info.offset}\n".encode())
        for shard in files.shards:
            size = shard.stat().st_size
            digest.update(f"{shard.name} {size}\n".encode())
            with shard.open("rb") as file:
                for start in (0, size // 2, max(size - _SAMPLE, 0)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
