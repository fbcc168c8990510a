"""Other engines on the same checkpoint and prompts, each in a process of its own: times of one batch, as JSON.

    python scripts/bench/peers.py NAME MODEL --batch 8 --prompt 128 --generate 64 --threads 2 [--cache DIR]

NAME: transformers-bf16, transformers-hqq4, ctranslate2-bf16, ctranslate2-int8, llamacpp-bf16, llamacpp-q8, llamacpp-q4,
vllm-bf16, openvino-genai-bf16, openvino-genai-int8, openvino-genai-int4 (which optimum-intel converts). Greedy, the
end-of-sequence token ignored. `first_seconds`: until every prompt has its first token; `all_seconds`: until all have
all of theirs; loading and one warm-up do not count. `--cache`: where converted checkpoints are kept.

`--lengths FILE`: a JSON list, how many tokens each of so many requests is to get; at most `--batch` of them are under
way at a time, and `first_seconds` is left out. The slots of vLLM, OpenVINO GenAI and llama.cpp take the next request as
one ends (the last by a loop like its server's); transformers and CTranslate2, given one length a batch, go on to its
longest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

Run = Callable[[list[list[int]], list[int]], None]  # prompts, tokens to generate for each

LLAMACPP_TYPES = {"bf16": "BF16", "q8": "Q8_0", "q4": "Q4_0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("model")
    for name, default in (("batch", 8), ("prompt", 128), ("generate", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cache", default="peer_models")
    parser.add_argument("--lengths")
    options = parser.parse_args()
    lengths = json.loads(Path(options.lengths).read_text()) if options.lengths else [options.generate] * options.batch
    options.generate = max(lengths)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    engine, _, precision = options.name.rpartition("-")
    makers = {
        "transformers": transformers, "ctranslate2": ctranslate2, "llamacpp": llamacpp, "vllm": vllm,
        "openvino-genai": openvino_genai,
    }  # fmt: skip
    run = makers[engine](precision, options)
    prompts = random_prompts(len(lengths), options.prompt)
    run(prompts[:1], [2])
    times = {} if options.lengths else {"first_seconds": timed(run, prompts, [1] * len(prompts))}
    print(json.dumps(times | {"all_seconds": timed(run, prompts, lengths)}))


def random_prompts(batch: int, tokens: int, vocabulary: int = 4000) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(3, vocabulary) for _ in range(tokens)] for _ in range(batch)]


def timed(run: Run, prompts: list[list[int]], lengths: list[int]) -> float:
    start = time.perf_counter()
    run(prompts, lengths)
    return time.perf_counter() - start


def batches(prompts: list[list[int]], lengths: list[int], size: int) -> Iterator[tuple[list[list[int]], int]]:
    """In order, each with the longest of its lengths."""
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size], max(lengths[start : start + size])


def transformers(precision: str, options: argparse.Namespace) -> Run:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, HqqConfig

    torch.set_num_threads(options.threads)
    quantized = {"quantization_config": HqqConfig(nbits=4, group_size=64)} if precision == "hqq4" else {}
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, device_map="cpu", **quantized)

    def run(prompts: list[list[int]], lengths: list[int]) -> None:
        for own, generate in batches(prompts, lengths, options.batch):
            settings = GenerationConfig(
                do_sample=False, max_new_tokens=generate, min_new_tokens=generate, pad_token_id=0, eos_token_id=None
            )
            ids = torch.tensor(own)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            assert out.shape[1] == ids.shape[1] + generate

    return torch.inference_mode()(run)


def ctranslate2(precision: str, options: argparse.Namespace) -> Run:
    import ctranslate2 as library
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    kind = {"bf16": "bfloat16", "int8": "int8"}[precision]
    folder = Path(options.cache) / f"ct2-{Path(options.model).name}-{precision}"
    if not folder.is_dir():
        TransformersConverter(options.model, low_cpu_mem_usage=True).convert(str(folder), quantization=kind)
    generator = library.Generator(str(folder), compute_type=kind, inter_threads=1, intra_threads=options.threads)
    names = AutoTokenizer.from_pretrained(options.model)

    def run(prompts: list[list[int]], lengths: list[int]) -> None:
        for own, generate in batches(prompts, lengths, options.batch):
            tokens = [names.convert_ids_to_tokens([id % len(names) for id in prompt]) for prompt in own]
            found = generator.generate_batch(
                tokens, max_length=generate, min_length=generate, include_prompt_in_result=False, end_token=[]
            )
            assert all(len(each.sequences_ids[0]) == generate for each in found)

    return run


def llamacpp(precision: str, options: argparse.Namespace) -> Run:
    import llama_cpp as library

    file = Path(options.cache) / f"{Path(options.model).name}-{precision}.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(Path(options.model), file, LLAMACPP_TYPES[precision])
    library.llama_backend_init()
    settings = library.llama_model_default_params()
    model = library.llama_model_load_from_file(str(file).encode(), settings)
    parameters = library.llama_context_default_params()
    capacity = options.batch * (options.prompt + options.generate)
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = capacity, options.batch * (options.prompt + 1), 512
    parameters.n_seq_max, parameters.n_threads, parameters.n_threads_batch = options.batch, *[options.threads] * 2
    parameters.kv_unified = False
    context = library.llama_init_from_model(model, parameters)
    vocabulary = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]

    def decode(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, sequence, wanted) each; the greedy token of each that is wanted."""
        batch = library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        assert library.llama_decode(context, batch) == 0
        import numpy as np

        found = []
        for place, (*_, wanted) in enumerate(tokens):
            if wanted:
                logits = library.llama_get_logits_ith(context, place)
                found.append(int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax()))
        library.llama_batch_free(batch)
        return found

    def run(prompts: list[list[int]], lengths: list[int]) -> None:
        memory = library.llama_get_memory(context)
        library.llama_memory_clear(memory, True)
        waiting, free = deque(range(len(prompts))), list(range(options.batch))
        running: dict[int, tuple[int, int]] = {}  # slot -> (request, tokens generated)
        newest: dict[int, int] = {}
        while waiting or running:
            while waiting and free:
                running[free.pop(0)] = (waiting.popleft(), 0)
            rows = []
            for slot, (request, count) in sorted(running.items()):  # unsorted ones it would take one by one
                prompt = prompts[request]
                if count:
                    rows.append((newest[slot], len(prompt) + count - 1, slot, True))
                else:
                    rows += [(token, place, slot, place + 1 == len(prompt)) for place, token in enumerate(prompt)]
            newest = dict(zip([row[2] for row in rows if row[3]], decode(rows), strict=True))
            running = {slot: (request, count + 1) for slot, (request, count) in running.items()}
            for slot in [slot for slot, (request, count) in running.items() if count == lengths[request]]:
                del running[slot]
                free = sorted([*free, slot])
                library.llama_memory_seq_rm(memory, slot, -1, -1)

    return run


def vllm(precision: str, options: argparse.Namespace) -> Run:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    engine = LLM(
        options.model, dtype={"bf16": "bfloat16"}[precision], max_num_seqs=options.batch, skip_tokenizer_init=True,
        max_model_len=options.prompt + options.generate, enable_prefix_caching=False,
    )  # fmt: skip

    def run(prompts: list[list[int]], lengths: list[int]) -> None:
        each = [
            SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
            for count in lengths
        ]
        found = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], each, use_tqdm=False)
        assert [len(one.outputs[0].token_ids) for one in found] == lengths

    return run


def openvino_genai(precision: str, options: argparse.Namespace) -> Run:
    """4 bits: asymmetric, groups of 64, lm_head and embedding 8 bits; 8 bits: a scale a row. Its KV cache is 8 bits."""
    import numpy as np
    import openvino_genai as library
    from openvino import Tensor

    folder = Path(options.cache) / f"ir-{Path(options.model).name}-{precision}"
    if not folder.is_dir():
        kind = {"bf16": ["fp16"], "int8": ["int8"], "int4": ["int4", "--group-size", "64", "--ratio", "1.0"]}[precision]
        line = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", options.model]
        line += ["--task", "text-generation-with-past", "--weight-format", *kind, str(folder)]
        subprocess.run(line, check=True, stdout=sys.stderr)
    scheduler = library.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.enable_prefix_caching = 2, options.batch, False
    engine = library.ContinuousBatchingPipeline(
        str(folder), scheduler, "CPU", {"INFERENCE_NUM_THREADS": options.threads, "INFERENCE_PRECISION_HINT": "bf16"}
    )

    ended = library.GenerationStatus.FINISHED, library.GenerationStatus.IGNORED

    def run(prompts: list[list[int]], lengths: list[int]) -> None:
        settings = []
        for count in lengths:
            each = library.GenerationConfig()
            each.max_new_tokens, each.min_new_tokens, each.ignore_eos, each.do_sample = count, count, True, False
            settings.append(each)
        waiting = deque(zip(range(len(prompts)), prompts, settings, strict=True))
        running = {}
        while waiting or running:  # `generate` would start all of them: max_num_seqs does not bound mixed passes
            while waiting and len(running) < options.batch:
                number, prompt, each = waiting.popleft()
                running[number] = engine.add_request(number, Tensor(np.array([prompt], np.int64)), each)
            engine.step()
            for number in [number for number, handle in running.items() if handle.get_status() in ended]:
                (found,) = running.pop(number).read_all()
                assert len(found.generated_ids) == lengths[number]

    return run


def write_gguf(model: Path, file: Path, kind: str) -> None:
    """A Llama checkpoint as GGUF without a vocabulary, since prompts are token ids."""
    import gguf
    import numpy as np
    import torch
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    quant = gguf.GGMLQuantizationType[kind]
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- not a mapping
                value, path = tensors.get_tensor(name).to(torch.float32).numpy(), name.removesuffix(".weight")
                if path in outer:
                    target = outer[path]
                else:
                    _, _, layer, inner = path.split(".", 3)
                    target = f"blk.{layer}.{names[inner]}"
                    if names[inner] in ("attn_q", "attn_k"):
                        value = interleaved(value, heads if names[inner] == "attn_q" else kv_heads)
                own = quant if value.ndim == 2 else gguf.GGMLQuantizationType.F32
                data = gguf.quants.quantize(np.ascontiguousarray(value), own)
                writer.add_tensor(f"{target}.weight", data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight, heads: int):
    """Rotary halves as GGUF has them: pairs next to each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    sys.exit(main())
