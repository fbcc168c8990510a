"""Write a random-weight Hugging Face checkpoint of any shape, one shard at a time.

    python scripts/make_checkpoint.py --preset 135m out_dir
    python scripts/make_checkpoint.py --arch opt --layers 4 --hidden 256 --heads 4 --word-embed-proj-dim 128 out_dir

Names and shapes come from the model built on the meta device; every tensor is then drawn from a generator seeded by
its own name, so its values depend on neither order nor shard size, and memory holds one shard at most. The scales
keep a deep random model's activations near 1 and its logits near a standard deviation of 2; norms and biases are
noisy, so that code which forgets one of them gives other tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed
from ds_llmpq.errors import UserError
from ds_llmpq.models.decoder import Decoder
from ds_llmpq.models.families import describe

ARCHITECTURES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2", "gemma3_text", "opt", "bloom",
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32")
TINY_TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "assets" / "tiny-llama"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
PRESETS = {  # decoder parameters dominate; every width is a multiple of 128; sizes are untied, in bf16
    "135m": {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 4, "intermediate": 2432, "vocab": 32000},
    "850m": {"layers": 24, "hidden": 1536, "heads": 24, "kv_heads": 8, "intermediate": 5376, "vocab": 32000},
    "1gb": {"layers": 24, "hidden": 1280, "heads": 20, "kv_heads": 4, "intermediate": 3584, "vocab": 32000},
}
LOGIT_STD = 2.0
QUERY_KEY_STD = 2.0  # sharp attention: averages over the context would make all positions alike
RESIDUAL_STD = 4.0  # of the weights on all residual branches together
NORM_NOISE_STD = 0.1  # of norm weights around 1 and norm biases around 0
BIAS_STD = 0.05  # of linears'
RESIDUAL_OUTPUTS = re.compile(r"\.(o_proj|out_proj|dense|down_proj|w2|fc2|dense_4h_to_h)\.weight$")
# Activations behind a ReLU or GELU have a positive mean, which would add the same vector at every position and make
# the positions alike: rows that sum to zero cancel it.
FOLLOWS_RELU = re.compile(r"\.(fc2|dense_4h_to_h)\.weight$")
CHUNK_ELEMENTS = 1 << 24


def make_checkpoint(
    out_dir: str | Path,
    arch: str = "llama",
    *,
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    intermediate: int | None = None,
    vocab: int = 2048,
    max_positions: int = 2048,
    tied: bool | None = None,
    word_embed_proj_dim: int | None = None,
    layer_norm_before: bool = True,
    dtype: str = "bfloat16",
    shard_size: int | str = "500MB",
    seed: int = 0,
    tokenizer: str | Path | None = TINY_TOKENIZER,
    config: dict | None = None,
) -> Path:
    """Write config, generation config, tokenizer and weights into `out_dir`, and return it as a `Path`.

    `kv_heads` defaults to `heads`, `head_dim` to hidden / heads, `intermediate` to 4 x hidden (OPT, BLOOM) or 2 x
    hidden, `tied` to what the family does (OPT and BLOOM tie the head to the embedding, the others do not).
    `word_embed_proj_dim` and `layer_norm_before` are OPT's. `shard_size` is in bytes, or "200MB" (decimal units).
    `tokenizer` is a directory to copy the tokenizer from; None, or a vocabulary too small for the default one, copies
    nothing. `config` holds further fields of the transformers config. Raises UserError for shapes that cannot be.
    """
    shape = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads or heads, "head_dim": head_dim}
    shape |= {"intermediate": intermediate, "vocab": vocab, "max_positions": max_positions}
    _check_shape(arch, shape, dtype)
    tied = arch in ("opt", "bloom") if tied is None else tied
    fields = _config_fields(arch, shape, word_embed_proj_dim, layer_norm_before)
    tokenizer = _usable_tokenizer(tokenizer, vocab)
    fields |= {"tie_word_embeddings": tied, "dtype": dtype} | _token_ids(tokenizer) | (config or {})
    out_dir = Path(out_dir)
    if any(out_dir.glob("*.safetensors")):
        raise UserError(f"{out_dir} already holds weights: give an empty directory.")
    out_dir.mkdir(parents=True, exist_ok=True)
    model_config = AutoConfig.for_model(arch, **fields)
    shapes = parameter_shapes(model_config)
    _write_weights(out_dir, shapes, model_config, getattr(torch, dtype), _bytes_of(shard_size), seed)
    for name in TOKENIZER_FILES if tokenizer else ():
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, out_dir / name)
    GenerationConfig(do_sample=False, **_token_ids(tokenizer)).save_pretrained(out_dir)
    model_config.save_pretrained(out_dir)  # last: a run cut short leaves nothing that loads
    return out_dir


def parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape as a checkpoint of this config holds them (a tied head is left out); allocates nothing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    if config.model_type in ("mixtral", "qwen3_moe"):
        return _shapes_with_experts(config)  # which transformers holds as one tensor, and checkpoints one by one
    skipped = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in skipped}


def _shapes_with_experts(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    decoder = Decoder(describe(config.to_dict()))
    with torch.device("meta"):
        parts = [(decoder.embedding(), decoder.embedding_tensors()), (decoder.head(), decoder.head_tensors())]
        parts += [(decoder.layer(index), decoder.layer_tensors(index)) for index in range(config.num_hidden_layers)]
    return {theirs: tuple(part.get_parameter(ours).shape) for part, names in parts for ours, theirs in names.items()}


def random_tensor(name: str, shape: tuple[int, ...], layers: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The tensor of this name: normal values whose mean and scale follow from its role; the same for the same seed."""
    mean, std = _mean_and_std(name, shape, layers)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    out = torch.empty(math.prod(shape), dtype=dtype)
    rows = out.view(shape[0], -1)
    for chunk in rows.split(max(1, CHUNK_ELEMENTS // rows.shape[1])):  # bounds the fp32 copy of a large embedding
        values = torch.randn(chunk.shape, generator=generator).mul_(std).add_(mean)
        if FOLLOWS_RELU.search(name):
            values -= values.mean(1, keepdim=True)
        chunk.copy_(values)
    return out.view(shape)


def _mean_and_std(name: str, shape: tuple[int, ...], layers: int) -> tuple[float, float]:
    """Linears keep a standard deviation near 1; the residual branches together outweigh the embedding by far, since a
    tied head would otherwise repeat the last token for ever."""
    if name.endswith(".bias") and "norm" not in name and "ln_f" not in name:
        return 0.0, BIAS_STD
    if len(shape) == 1:  # BLOOM normalises its embedding to 1: bring it back to an embedding's scale
        scale = LOGIT_STD / math.sqrt(shape[0]) if "word_embeddings_layernorm" in name else 1.0
        mean = QUERY_KEY_STD if "q_norm" in name or "k_norm" in name else scale
        return (0.0 if name.endswith(".bias") else mean), scale * NORM_NOISE_STD
    std = 1 / math.sqrt(shape[1])
    if "lm_head" in name or "embed" in name:
        return 0.0, LOGIT_STD * std
    if RESIDUAL_OUTPUTS.search(name):
        return 0.0, RESIDUAL_STD * std / math.sqrt(2 * layers)
    if "q_proj" in name or "k_proj" in name or "query_key_value" in name:
        return 0.0, QUERY_KEY_STD * std
    return 0.0, std


def _write_weights(out_dir: Path, shapes: dict, config, dtype: torch.dtype, shard_bytes: int, seed: int) -> None:
    shards, sizes = [], []
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if not shards or sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: random_tensor(name, shapes[name], config.num_hidden_layers, dtype, seed) for name in names}
        save_file(tensors, out_dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        parameters = sum(map(math.prod, shapes.values()))
        metadata = {"total_parameters": parameters, "total_size": sum(sizes)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _config_fields(arch: str, shape: dict, word_embed_proj_dim: int | None, layer_norm_before: bool) -> dict:
    """The shape under the names that each family's transformers config gives it."""
    hidden, layers, heads, vocab = shape["hidden"], shape["layers"], shape["heads"], shape["vocab"]
    if arch == "bloom":
        return {"hidden_size": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocab}
    fields = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": shape["max_positions"],
    }
    if arch == "opt":
        return fields | {
            "ffn_dim": shape["intermediate"] or 4 * hidden,
            "word_embed_proj_dim": word_embed_proj_dim or hidden,
            "do_layer_norm_before": layer_norm_before,
        }
    fields |= {"intermediate_size": shape["intermediate"] or 2 * hidden, "num_key_value_heads": shape["kv_heads"]}
    if arch != "qwen2":  # Qwen2 derives it from the hidden size
        fields["head_dim"] = shape["head_dim"] or hidden // heads
    if arch == "mistral":
        fields["sliding_window"] = None
    return fields


def _check_shape(arch: str, shape: dict, dtype: str) -> None:
    hidden, heads, kv_heads = shape["hidden"], shape["heads"], shape["kv_heads"]
    if arch not in ARCHITECTURES:
        raise UserError(f"Architecture {arch!r} is unknown: choose one of {', '.join(ARCHITECTURES)}.")
    if dtype not in DTYPES:
        raise UserError(f"Data type {dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
    for name, value in shape.items():
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if hidden % heads and not (shape["head_dim"] and arch in ("llama", "mistral", "qwen3")):
        raise UserError(f"hidden={hidden} is not a multiple of heads={heads}: change one of them.")
    if heads % kv_heads:
        raise UserError(f"heads={heads} is not a multiple of kv_heads={kv_heads}: change one of them.")
    if arch in ("opt", "bloom") and kv_heads != heads:
        raise UserError(f"{arch} has no grouped-query attention: leave kv_heads={kv_heads} out.")
    if arch in ("opt", "bloom", "qwen2") and shape["head_dim"] not in (None, hidden // heads):
        raise UserError(f"{arch} has no head_dim of its own: leave head_dim={shape['head_dim']} out.")
    if arch == "bloom" and shape["intermediate"] not in (None, 4 * hidden):
        raise UserError(f"bloom's intermediate size is 4 x hidden: leave intermediate={shape['intermediate']} out.")


def _usable_tokenizer(tokenizer: str | Path | None, vocab: int) -> Path | None:
    """The directory to copy from; None if the default tokenizer is not there or needs a larger vocabulary."""
    if tokenizer is None:
        return None
    path = Path(tokenizer)
    if not (path / "tokenizer.json").exists():
        if path == TINY_TOKENIZER:
            return None
        raise UserError(f"{path} holds no tokenizer.json: give a directory with a Hugging Face tokenizer.")
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]
    if vocab > max(ids):
        return path
    if path == TINY_TOKENIZER:
        return None
    raise UserError(f"vocab={vocab} is below the tokenizer's {max(ids) + 1}: raise it or leave the tokenizer out.")


def _token_ids(tokenizer: Path | None) -> dict[str, int]:
    """Special token ids of the config: the tokenizer's, or those of the default tokenizer."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if tokenizer is None or not (tokenizer / "tokenizer_config.json").exists():
        return ids
    added = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    id_of = {token["content"]: token["id"] for token in added}
    names = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    for role in ids:
        token = names.get(role.removesuffix("_id"))
        token = token["content"] if isinstance(token, dict) else token
        ids[role] = id_of.get(token, ids["eos_token_id"] if role == "pad_token_id" else None)
    return ids


def _bytes_of(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]?)B?", str(size).upper())
    if not match or int(match[1]) == 0:
        raise UserError(f"Shard size {size!r} is not a size: write bytes, or a number with KB, MB or GB.")
    return int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--preset", choices=PRESETS, help="sizes of a Llama-like shape; other flags override it")
    parser.add_argument("--arch", default="llama", help=", ".join(ARCHITECTURES))
    for name in ("layers", "hidden", "heads", "kv-heads", "head-dim", "intermediate", "vocab", "max-positions"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--word-embed-proj-dim", type=int, help="OPT: width of the embedding, when not hidden")
    parser.add_argument("--layer-norm-before", action=argparse.BooleanOptionalAction, default=True, help="OPT")
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--shard-size", default="500MB", help="for example 200MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default=TINY_TOKENIZER, help="directory to copy the tokenizer from")
    parser.add_argument("--no-tokenizer", dest="tokenizer", action="store_const", const=None)
    parser.add_argument("--config", type=json.loads, help="further config fields as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = vars(_parser().parse_args(argv))
    preset = dict(PRESETS.get(options.pop("preset"), {}))
    if options["arch"] in ("opt", "bloom"):
        preset.pop("kv_heads", None)
    if options["arch"] == "bloom":
        preset.pop("intermediate", None)
    try:
        out_dir = make_checkpoint(**preset | options)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    files = list(out_dir.glob("*.safetensors"))
    print(f"{out_dir}: {len(files)} shard(s), {sum(file.stat().st_size for file in files)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
