"""All decoder layers of a stage as one OpenVINO graph: products, norms, rotary positions, attention and cache.

A pass is one call: no Python between layers, and no switching between OpenVINO's threads and torch's. Rows are not
padded, and attention reads only the filled part of the cache. A pass of many tokens runs in chunks of `GRAPH_TOKENS`,
which bounds the graph's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy
import openvino
import torch
from openvino import opset13
from torch import nn

from ds_llmpq.models.block import Block
from ds_llmpq.models.spec import DecoderSpec
from ds_llmpq.models.step import Step
from ds_llmpq.quant.kernels.openvino import CACHE_BLOCK, GRAPH_TOKENS, OPENVINO_GRAPH
from ds_llmpq.quant.kernels.openvino_graph.constants import (
    Constants,
    build_threading_properties,
    convert,
    core,
    drop_pages_meanwhile,
    input_group,
    widen,
)
from ds_llmpq.quant.kernels.openvino_graph.decoder_layer import LayerNodes, Rows, cache_parameter
from ds_llmpq.quant.kernels.openvino_graph.tensors import KINDS, share
from ds_llmpq.quant.packing import UNQUANTIZED_BITS

_TABLES = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")


class PagedStore(Protocol):
    """A store of keys and values in blocks."""

    def blocks(self, layer_idx: int) -> torch.Tensor:
        """[2, blocks, kv_heads, CACHE_BLOCK, head_dim]: keys and values of a layer."""

    def block_table(self, slot: int, tokens: int, shared: int) -> list[int]:
        """The blocks of a slot's sequence, as far as its first `tokens` go; `shared` of those are a prefix whose blocks
        other sequences have too."""


class PagedCache(Protocol):
    """What the graph needs of a `Step`'s cache."""

    store: PagedStore

    def row_places(self) -> list[tuple[int, int, int]]:
        """(slot, tokens stored already, those of them that are a shared prefix) for each row."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a row of a pass. The row's cache is `slot`, and `past` tokens are then stored, of which
    `shared` are a prefix."""

    row: int
    start: int
    stop: int
    slot: int
    past: int
    shared: int = 0


class StageGraph(nn.Module):
    """Layers are added in order as they are read, then compiled together; `first_layer` is the index of the first.
    Called with a `Step`, or with several, it runs all of them. `kv_bits`: 8 where the cache holds keys and values as
    bytes, each vector behind its scale and zero."""

    joins_steps = True

    def __init__(self, first_layer: int, dtype: torch.dtype = torch.bfloat16, kv_bits: int = UNQUANTIZED_BITS):
        super().__init__()
        self.first_layer, self.dtype = first_layer, dtype
        self._kv_bits = kv_bits
        self._kv_dtype = dtype if kv_bits == UNQUANTIZED_BITS else torch.uint8
        self.held_bytes = 0
        self._constants: list[Constants] = []
        self._caches: list[openvino.Node] = []
        self._store: PagedStore | None = None
        self._hidden = self._inputs = self._rows = None
        self._sizes: dict[str, int] = {}  # features of a token's inputs beside the tables
        self._rotary: dict[str, int] = {}  # rotated features by the names of `DecoderSpec.rotary`
        self._bound_tokens = 0

    @property
    def layers(self) -> int:
        return len(self._caches) // 2

    def add(self, layer: Block, weights: Mapping[tuple[str, ...], Constants]) -> None:
        """Adds a decoder layer whose norms and biases are filled, with the `weights` of its linears."""
        if self._hidden is None:
            self._begin(layer.spec)
        attention, kind = layer.spec.attention, KINDS[self._kv_dtype].ours
        vector = OPENVINO_GRAPH.kv_vector_bytes(attention.head_dim, self._kv_bits, self.dtype.itemsize)
        size = vector // self._kv_dtype.itemsize
        caches = [cache_parameter(attention.kv_heads, size, kind) for _ in range(2)]
        self._hidden = LayerNodes(layer, weights).outputs(self._hidden, self._rows, *caches)
        self._caches += caches
        self._constants += weights.values()
        others = [parameter for parameter in layer.parameters() if parameter.device.type != "meta"]
        held = sum(each.nbytes for each in (*weights.values(), *others))
        self.held_bytes += OPENVINO_GRAPH.layer_overhead_bytes + held

    def compile(self) -> None:
        """Packs all weights and allocates all buffers, so that freed memory is returned before serving."""
        kind = KINDS[self.dtype]
        result = opset13.result(convert(self._hidden, kind.ours))
        parameters = [*self._inputs.values(), *self._caches]
        for node, name in zip(self._caches, self._cache_names(), strict=True):
            node.output(0).set_names({name})
        model = openvino.Model([result], parameters)
        properties = build_threading_properties() | {
            "INFERENCE_PRECISION_HINT": kind.theirs,
            "KV_CACHE_PRECISION": KINDS[self._kv_dtype].theirs,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(self._input_group()),
        }
        if self._kv_dtype == torch.uint8:
            properties["KEY_CACHE_QUANT_MODE"] = "BY_TOKEN"
        sizes = {"outputs": self._sizes["hidden"], **self._sizes}
        self._staging = {name: torch.zeros(GRAPH_TOKENS, size, dtype=self.dtype) for name, size in sizes.items()}
        with drop_pages_meanwhile(self._constants):
            self._request = core().compile_model(model, "CPU", properties).create_infer_request()
            del self._hidden, self._inputs, self._rows
            self._warm_up()

    def forward(self, step: Step | list[Step]) -> Step | list[Step]:
        """Runs all layers over a step, or over several in the same calls; hidden states of padding are zeros."""
        steps = step if isinstance(step, list) else [step]
        self._attach(steps[0].cache.store)
        lengths, starts, sources = [], [], []
        for each in steps:
            rows, tokens, features = each.hidden.shape
            lengths += [tokens] * rows if each.last is None or tokens == 1 else (each.last + 1).tolist()
            first = sum(len(source["hidden"]) for source in sources)
            starts += range(first, first + rows * tokens, tokens)
            sources.append({**self._angles(each), "hidden": each.hidden.reshape(-1, features)})
        together = sources[0]
        if len(steps) > 1:
            together = {name: torch.cat([source[name] for source in sources]) for name in together}
        hidden = together["hidden"]
        outputs = torch.zeros_like(hidden) if sum(lengths) < len(hidden) else torch.empty_like(hidden)
        for chunk in chunks(lengths, [place for each in steps for place in each.cache.row_places()]):
            padding = _choose_padding(chunk)
            spans = list(_spans(chunk, starts))
            for name, source in together.items():
                _gather(self._staging[name], source, spans)
            count = self._infer(chunk, padding)
            _scatter(outputs, self._staging["outputs"][:count], spans)
        parts = outputs.split([each.hidden[..., 0].numel() for each in steps])
        for each, part in zip(steps, parts, strict=True):
            each.hidden = part.view(each.hidden.shape)
        return step

    def _angles(self, step: Step) -> dict[str, torch.Tensor]:
        """Cosines and sines of all tokens by the names of the graph's inputs, without signs."""
        found, prepared = {}, step.prepare_inputs()
        for name, features in self._rotary.items():
            cos, signed = (part.reshape(-1, features) for part in prepared[name])
            found[f"cos {name}"], found[f"sin {name}"] = cos, signed[:, features // 2 :].repeat(1, 2)
        return found

    def _begin(self, spec: DecoderSpec) -> None:
        self._rotary = {name: rotary.features for name, rotary in spec.rotary}
        angles = {f"{part} {name}": size for name, size in self._rotary.items() for part in ("cos", "sin")}
        self._sizes = sizes = {"hidden": spec.hidden, **angles}
        inputs = {name: opset13.parameter([-1, size], KINDS[self.dtype].ours) for name, size in sizes.items()}
        inputs |= {name: opset13.parameter([-1], openvino.Type.i32) for name in _TABLES}
        inputs["max_context_len"] = opset13.parameter([], openvino.Type.i32)
        for name, node in inputs.items():
            node.output(0).set_names({name})
        heads = opset13.constant(numpy.array([1, 2]))
        by_head = {name: opset13.unsqueeze(widen(inputs[name]), heads) for name in angles}
        self._inputs, self._hidden = inputs, widen(inputs["hidden"])
        self._rows = Rows(
            {name: (by_head[f"cos {name}"], by_head[f"sin {name}"]) for name in self._rotary},
            **{name: inputs[name] for name in (*_TABLES, "max_context_len")},
        )

    def _input_group(self) -> int:
        """The group of inputs for all products of the graph: the finest that any weight needs. 0 means that inputs are
        not rounded, as in float32, which is meant to be exact, and whose CPUs may lack instructions for integer
        sums."""
        if self.dtype == torch.float32:
            return 0
        wanted = [input_group(w.group_size, w.in_features) for w in self._constants if w.group_size]
        return min(wanted, default=0)

    def _cache_names(self) -> list[str]:
        return [f"{part}{index}" for index in range(self.layers) for part in ("keys", "values")]

    def _attach(self, store: PagedStore) -> None:
        if store is self._store:
            return
        self._store = store
        for index in range(self.layers):
            for part, memory in zip(("keys", "values"), store.blocks(self.first_layer + index), strict=True):
                self._request.set_tensor(f"{part}{index}", share(memory))

    def _infer(self, chunk: list[Piece], padding: int = 0) -> int:
        """Runs the tokens in the buffers. Returns their number. So many more are run behind the last piece's."""
        lengths = [piece.stop - piece.start for piece in chunk]
        count = sum(lengths)
        lengths[-1] += padding
        contexts = [piece.past + length for piece, length in zip(chunk, lengths, strict=True)]
        blocks = [
            self._store.block_table(piece.slot, context, piece.shared)
            for piece, context in zip(chunk, contexts, strict=True)
        ]
        tables = {
            "past_lens": [piece.past for piece in chunk],
            "subsequence_begins": numpy.cumsum([0, *lengths]),
            "block_indices": [*chain.from_iterable(blocks)],
            "block_indices_begins": numpy.cumsum([0, *map(len, blocks)]),
            "max_context_len": max(contexts),
        }
        for name, values in tables.items():
            self._request.set_tensor(name, openvino.Tensor(numpy.array(values, numpy.int32)))
        padded = count + padding
        self._staging["hidden"][count:padded] = 0  # whatever is left of others may be no number
        if padded != self._bound_tokens:
            for name in self._sizes:
                self._request.set_tensor(name, share(self._staging[name][:padded]))
            self._request.set_output_tensor(share(self._staging["outputs"][:padded]))
            self._bound_tokens = padded
        self._request.infer(share_outputs=True)
        return count

    def _warm_up(self) -> None:
        self._attach(_ScratchStore(self._request, self._kv_dtype))
        self._infer([Piece(0, 0, GRAPH_TOKENS, 0, 0)])
        self._infer([Piece(0, 0, 1, 0, 0)])
        self._store = None


class _ScratchStore:
    """A cache for one row of `GRAPH_TOKENS` tokens that all layers share, for warming up."""

    def __init__(self, request: openvino.InferRequest, dtype: torch.dtype):
        _, heads, size, head_dim = request.get_tensor("keys0").shape
        self._count = -(-GRAPH_TOKENS // CACHE_BLOCK)
        self._blocks = torch.zeros(2, self._count, heads, size, head_dim, dtype=dtype)

    def blocks(self, layer_idx: int) -> torch.Tensor:
        return self._blocks

    def block_table(self, slot: int, tokens: int, shared: int) -> list[int]:
        return [*range(-(-tokens // CACHE_BLOCK))]


def chunks(lengths: list[int], places: list[tuple[int, int, int]]) -> Iterator[list[Piece]]:
    """Cuts the tokens of all rows, in order, into chunks of at most `GRAPH_TOKENS`; a row may be split."""
    chunk, room = [], GRAPH_TOKENS
    for row, (length, (slot, past, shared)) in enumerate(zip(lengths, places, strict=True)):
        start = 0
        while start < length:
            stop = min(length, start + room)
            chunk.append(Piece(row, start, stop, slot, past + start, shared))
            room -= stop - start
            start = stop
            if not room:
                yield chunk
                chunk, room = [], GRAPH_TOKENS
    if chunk:
        yield chunk


def _choose_padding(chunk: list[Piece]) -> int:
    """Tokens that make the call one of few sizes. Their keys and values go to places behind a row's own that its next
    tokens take, so a row whose last block has the room is put last; 0 if there is none."""
    count = sum(piece.stop - piece.start for piece in chunk)
    padding = OPENVINO_GRAPH.pad_call(count) - count
    roomy = max(chunk, key=_count_room)
    if not padding or _count_room(roomy) < padding:
        return 0
    chunk.remove(roomy)
    chunk.append(roomy)
    return padding


def _count_room(piece: Piece) -> int:
    """Places behind a piece in its last block, where nothing is read before it is written."""
    return -(piece.past + piece.stop - piece.start) % CACHE_BLOCK


def _spans(chunk: list[Piece], starts: list[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of the pieces in what they are gathered from, where rows begin at `starts`, with neighbours
    joined."""
    begin = end = -1
    for piece in chunk:
        start, stop = starts[piece.row] + piece.start, starts[piece.row] + piece.stop
        if start != end:
            if end > begin:
                yield begin, end
            begin = start
        end = stop
    yield begin, end


def _gather(target: torch.Tensor, source: torch.Tensor, spans: list[tuple[int, int]]) -> None:
    place = 0
    for start, stop in spans:
        target[place : place + stop - start] = source[start:stop]
        place += stop - start


def _scatter(target: torch.Tensor, source: torch.Tensor, spans: list[tuple[int, int]]) -> None:
    place = 0
    for start, stop in spans:
        target[start:stop] = source[place : place + stop - start]
        place += stop - start
