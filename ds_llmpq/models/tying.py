"""Checks whether a checkpoint's lm_head is tied to its embedding: the stored tensors decide, not config.json. No torch.

As in transformers, both are used if both are stored and differ; if only one is stored, it serves as both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.files import open_regular
from ds_llmpq.models.family import Family
from ds_llmpq.models.index import REMEDY, find_tensor, read_header, read_index

HEAD = "lm_head.weight"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PIECE_BYTES = 4 << 20


def list_embedding_names(family: Family) -> tuple[str, ...]:
    """The names under which a checkpoint may store its embedding; some omit the first part."""
    name = family.embedding_tensor
    return name, name.split(".", 1)[1]


def stores_own_head(path: str | Path, family: Family) -> bool:
    """Whether the folder holds an lm_head whose bytes differ from those of its embedding.

    If they are equal, both are read to the end. Unreadable files are reported when the model is read.
    """
    folder = Path(path)
    try:
        files = sorted(folder.glob("*.safetensors"))
        state = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
        return _stores_own_head(folder, list_embedding_names(family), state)
    except (UserError, OSError, ValueError):
        return False


@lru_cache(maxsize=64)
def _stores_own_head(folder: Path, embeddings: tuple[str, ...], state: tuple) -> bool:
    """`state` is a cache key: a command asks several times."""
    shards = _shards(folder)
    embedding = next((name for name in embeddings if name in shards), None)
    if embedding is None or HEAD not in shards:
        return False
    both = (_read_tensor(folder / shards[name], name) for name in (HEAD, embedding))
    return any(a != b for a, b in zip(*both, strict=True))


def _shards(folder: Path) -> Mapping[str, str]:
    """Tensor name -> file name."""
    if (folder / _INDEX).is_file():
        return read_index(folder / _INDEX)
    with open_regular(folder / _SINGLE, "Shard", REMEDY) as file:
        return dict.fromkeys(read_header(file, f"Shard {folder / _SINGLE}")[0], _SINGLE)


def _read_tensor(shard: Path, name: str) -> Iterator[Any]:
    """The dtype and shape of one tensor, then its bytes, piece by piece."""
    with open_regular(shard, "Shard", REMEDY) as file:
        tensors, begin = read_header(file, f"Shard {shard}")
        entry = find_tensor(tensors, name, f"Shard {shard}")
        yield entry.dtype, entry.shape
        start, stop = (begin + offset for offset in entry.data_offsets)
        for place in range(start, stop, _PIECE_BYTES):
            file.seek(place)
            yield file.read(min(_PIECE_BYTES, stop - place))
