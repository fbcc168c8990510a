"""KL to 16 bits (nats per token) against true bits per weight, of the shipped model, beside published curves.

    ds-llmpq sensitivity model=tiny quant.bits=[2,3,4,8,16] out=o
    python scripts/bench/bits_curve.py --sensitivity o/sensitivity.json --out curve.json

One bit width everywhere, in groups of 32, 64 and 128, with both kinds of `quant.zeros`; and, in groups of 64, the mixed
widths that lose least by the table for a budget of average bits, whatever zeros the table was made with. Bits are of
the decoder layers, scales and zeros of 16 bits counted; lm_head stays at 16 and is counted in the second column. The
shipped model is tiny, and the published ones are not: levels cannot be compared, only how fast KL falls with a bit
more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

import torch

from ds_llmpq.config import asset
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.corpus import EVALUATION, read_text, select_calibration_rows
from ds_llmpq.models.shape import read_shape
from ds_llmpq.models.tokenizer import load_tokenizer
from ds_llmpq.quant.config import ZEROS, QuantConfig
from ds_llmpq.quant.packing import count_bits_per_weight, make_groups
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.sensitivity.layerwise import Layerwise, measure
from ds_llmpq.sensitivity.table import read_sensitivity
from scripts.indicator_experiment import best_bits

BUDGETS = (2.5, 3.5, 5.0, 6.0)
# Source -> (name, bits per weight, KL(full || quantized)). GGUF: file size over 8.03e9 weights.
PUBLISHED = {
    "GGUF, Llama 3 8B, wikitext-2 (llama.cpp, tools/perplexity/README.md)": [
        ("q8_0", 8.51, 0.00136), ("q6_K", 6.57, 0.00545), ("q5_K_M", 5.70, 0.0108), ("q4_K_M", 4.90, 0.0313),
        ("iq4_XS, imatrix", 4.43, 0.0363), ("q3_K_M", 4.00, 0.102), ("iq3_XXS, imatrix", 3.26, 0.184),
        ("q2_K", 3.17, 0.445), ("iq2_XS, imatrix", 2.60, 0.546),
    ],
    "EXL3, Qwen3.5-397B-A17B (NeuroSenko/Qwen3.5-397B-A17B-exl3 on Hugging Face)": [
        ("5.0bpw", 5.0, 0.0079), ("4.0bpw", 4.0, 0.0210), ("3.0bpw", 3.0, 0.0776),
    ],
    "EXL3, Gemma 3 27B, against 6 bits (WeReCooking/Gemma-3-R1984-27B-EXL3 on Hugging Face)": [
        ("5.0bpw", 5.0, 0.015), ("4.0bpw", 4.0, 0.039), ("3.0bpw", 3.0, 0.110), ("2.0bpw", 2.0, 0.450),
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=asset("tiny-llama"))
    parser.add_argument("--sensitivity", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--zeros", choices=ZEROS, nargs="+", default=[*ZEROS])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shape = read_shape(args.model)
    tokens = select_calibration_rows(read_text(None, EVALUATION), load_tokenizer(args.model), args.rows, args.tokens)
    table = read_sensitivity(args.sensitivity)
    uniform = {f"all at {width}": (width,) * shape.layers for width in (8, 4, 3, 2)}
    mixed = {f"mixed, {budget} on average": best_bits(table, budget) for budget in BUDGETS}
    points = [
        point
        for zeros in args.zeros
        for size in (64, 32, 128)
        for point in measure_points(
            args.model, tokens, uniform | (mixed if size == 64 else {}), QuantConfig(group_size=size, zeros=zeros)
        )
    ]
    points.sort(key=lambda point: -point["bits"])
    found = {"model": Path(args.model).name, "tokens": tokens[:, 1:].numel(), "points": points, "published": PUBLISHED}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    rows = [
        [point["name"], str(point["group_size"]), point["zeros"], f"{point['bits']:.2f}",
         f"{point['bits_with_lm_head']:.2f}", f"{point['kl']:.5f}"]
        for point in points
    ]  # fmt: skip
    print(format_table(["widths", "group", "zeros", "bits a weight", "with lm_head", "KL"], rows))
    for source, curve in PUBLISHED.items():
        cells = [[name, f"{bits:.2f}", f"{kl:.5f}"] for name, bits, kl in curve]
        print(f"\n{source}\n{format_table(['format', 'bits a weight', 'KL'], cells)}")


def measure_points(model: str, tokens: torch.Tensor, variants: dict[str, tuple[int, ...]], quant: QuantConfig):
    """A point for each variant, all with `quant`."""
    shape = read_shape(model)
    found = measure(Layerwise(Checkpoint(model), quant, tokens, torch.device("cpu")), list(variants.values()))
    head = shape.lm_head.weights
    layers = shape.layers * sum(linear.weights for linear in shape.linears)
    for name, bits in variants.items():
        counted = count_bits_per_weight(shape, bits, make_groups(quant), 16)
        own = (counted * (layers + head) - 16 * head) / layers
        yield {
            "name": name,
            "group_size": quant.group_size,
            "zeros": quant.zeros,
            "widths": bits,
            "bits": own,
            "bits_with_lm_head": counted,
            "kl": found[bits].kl,
            "loss": found[bits].loss,
            "loss_error": found[bits].loss_error,
        }


if __name__ == "__main__":
    main()
