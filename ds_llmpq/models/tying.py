"""Whether a checkpoint's lm_head is tied to its embedding. The stored tensors decide, whatever config.json says. No
torch.

As in transformers, both are used if both are stored and differ; if only one is stored, it serves as both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

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

    If they are equal, both are read to their end. Unreadable files are reported when the model is read.
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
    with _Tensor(folder / shards[HEAD], HEAD) as head, _Tensor(folder / shards[embedding], embedding) as table:
        return head.kind != table.kind or any(a != b for a, b in zip(head.pieces(), table.pieces(), strict=True))


def _shards(folder: Path) -> Mapping[str, str]:
    """Tensor name -> file name."""
    if (folder / _INDEX).is_file():
        return read_index(folder / _INDEX)
    with open_regular(folder / _SINGLE, "Shard", REMEDY) as file:
        return dict.fromkeys(read_header(file, f"Shard {folder / _SINGLE}")[0], _SINGLE)


class _Tensor:
    """The bytes of one tensor in its shard. `kind`: dtype and shape."""

    def __init__(self, shard: Path, name: str):
        self._file = open_regular(shard, "Shard", REMEDY)
        try:
            tensors, begin = read_header(self._file, f"Shard {shard}")
            entry = find_tensor(tensors, name, f"Shard {shard}")
        except UserError:
            self._file.close()
            raise
        self.kind = (entry.dtype, entry.shape)
        start, stop = entry.data_offsets
        self._begin, self._bytes = begin + start, stop - start

    def pieces(self):
        for start in range(0, self._bytes, _PIECE_BYTES):
            self._file.seek(self._begin + start)
            yield self._file.read(min(_PIECE_BYTES, self._bytes - start))

    def __enter__(self) -> _Tensor:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
