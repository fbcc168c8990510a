"""One rank of a training step on uneven parts: prints the loss of each of two steps, for test_planned_module.py."""

import json
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from deepspeed.pipe import LayerSpec
from torch import nn

from ds_llmpq.engine.pipeline_module import PlannedPipelineModule
from ds_llmpq.plan import read_plan

MICRO_BATCH, MICRO_BATCHES, SIZE = 2, 2, 8


def layers() -> list[LayerSpec]:
    """An embedding, four layers in place of decoder layers, and a head."""
    return [LayerSpec(nn.Linear, SIZE, SIZE) for _ in range(6)]


def weights(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    drawn = {"weight": torch.randn(SIZE, SIZE, generator=generator), "bias": torch.randn(SIZE, generator=generator)}
    return {name: value / SIZE**0.5 for name, value in drawn.items()}


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(100)
    pair = (MICRO_BATCHES, 2, MICRO_BATCH, SIZE)
    return [(inputs, labels) for inputs, labels in torch.randn(*pair, generator=generator)]


def main(plan_file: str) -> None:
    # else DeepSpeed compiles a shared-memory all-reduce
    deepspeed.ops.__compatible_ops__.update(dict.fromkeys(deepspeed.ops.__compatible_ops__, False))
    deepspeed.init_distributed("gloo", verbose=False)
    plan = read_plan(plan_file)
    module = PlannedPipelineModule(layers(), plan=plan, loss_fn=nn.functional.mse_loss)
    own = range(module.parts[module.stage_id], module.parts[module.stage_id + 1])
    for layer, index in zip(module.forward_funcs, own, strict=True):
        layer.load_state_dict(weights(index))
    ds_config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "gradient_clipping": 1e9,  # left out, DeepSpeed clips to a norm of 1
    }
    engine, *_ = deepspeed.initialize(model=module, config=ds_config, model_parameters=list(module.parameters()))
    losses = [float(engine.train_batch(iter(batches()))) for _ in range(2)]
    print("FOUND " + json.dumps({"layers": list(own), "losses": losses}), flush=True)
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
