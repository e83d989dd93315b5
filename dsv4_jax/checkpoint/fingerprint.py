"""Which model a folder holds, told from a sample of its bytes in a second or two."""

import hashlib
from pathlib import Path

from dsv4_jax.weight_files import WeightFiles

_FILES = ("config.json", "tokenizer.json")
_SAMPLE = 2**16  # bytes, at the beginning, in the middle and at the end of each shard


def fingerprint(folder: str | Path) -> str:
    """Sixteen hex digits that two folders share only if they hold the same model.

    Whole are config.json, tokenizer.json and the headers of the shards; of their numbers it is a sample, so
    it tells checkpoints apart and is no proof against a flipped bit.

    Raises:
      CheckpointError: the folder or a file is absent or damaged.
    """
    folder = Path(folder)
    with WeightFiles.open(folder) as files:
        digest = hashlib.sha256()
        for name in _FILES:
            path = folder / name
            digest.update(path.read_bytes() if path.is_file() else b"")
        for name, info in sorted(files.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape} {info.file.name} {info.offset}\n".encode())
        for shard in files.shards:
            size = shard.stat().st_size
            digest.update(f"{shard.name} {size}\n".encode())
            with shard.open("rb") as file:
                for start in (0, size // 2, max(size - _SAMPLE, 0)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
