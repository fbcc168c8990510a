"""What quant/kernels/humming_product.py calls of humming, read from its source, which cannot be imported without CUDA.

pip install --no-deps --target FOLDER 'humming-kernels>=0.1.19,<0.1.20'
PYTHONPATH=FOLDER python -m pytest tests/contracts/test_humming_contract.py
"""

import ast
import importlib.util
from pathlib import Path

import pytest

found = importlib.util.find_spec("humming")
if found is None:
    pytest.skip("humming-kernels is not installed", allow_module_level=True)

LIBRARY = "humming-kernels"
SEEN = ("0.1.19", "0.1.19")
FOLDER = Path(found.submodule_search_locations[0])


def definition(file, name):
    """A function or class of the library by its name, or `class.name`."""
    body = ast.parse((FOLDER / file).read_text()).body
    for part in name.split("."):
        [node] = [each for each in body if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name == part]
        body = node.body
    return node


def arguments(function):
    listed = function.args
    return [each.arg for each in (*listed.posonlyargs, *listed.args, *listed.kwonlyargs)]


def fields(file, name):
    return [each.target.id for each in definition(file, name).body if isinstance(each, ast.AnnAssign)]


FILE_CALLS = [
    ("ops/weight.py", "pack_weight", {"inputs", "num_bits"}),
    ("ops/launcher.py", "launch_kernel", {"configs", "inputs", "weight", "weight_scale", "zero_point", "locks"}),
    ("transform.py", "prepare_layer_config", {"shape_n", "shape_k", "weight_schema", "torch_dtype", "device"}),
    ("tune/__init__.py", "get_heuristics_config", {"layer_config", "shape_m", "device"}),
    ("layer.py", "HummingLayer.load_from_tensors", {"tensors"}),
    ("layer.py", "HummingLayer.transform", set()),
]


@pytest.mark.parametrize(("file", "name", "taken"), FILE_CALLS)
def test_functions_take_what_we_give(file, name, taken):
    """`launch_kernel(...)`, in quant/kernels/humming_product.py: it and the others take arguments of these names."""
    assert taken <= set(arguments(definition(file, name)))


def test_kernels_are_prepared_by_place():
    """`HummingKernel.prepare_kernels(layer, compute, tuning, device)`, in quant/kernels/humming_product.py: these four,
    in this order."""
    prepare = arguments(definition("kernel/humming.py", "HummingKernel.prepare_kernels"))
    assert prepare == ["cls", "layer_config", "compute_config", "tuning_config", "device"]


def test_a_layer_is_described_by_its_schema():
    """`HummingWeightSchema(...)`, in quant/kernels/humming_product.py: a dataclass with these fields."""
    assert {"shape_n", "shape_k", "weight_config", "torch_dtype"} <= set(fields("layer.py", "HummingLayer"))
    wanted = {"b_dtype", "weight_scale_group_size", "has_zero_point", "is_fp_zero_point"}
    assert wanted <= set(fields("schema/humming.py", "HummingWeightSchema"))


def test_a_layer_has_the_tensors_that_a_launch_takes():
    """`HummingLayer(...)`, in quant/kernels/humming_product.py: tensors of these names, and locks of 8 KB."""
    text = (FOLDER / "layer.py").read_text()
    assert 'self.register_buffer("locks", locks)' in text
    assert "torch.zeros((2048,), dtype=torch.int32" in text
    assert '["weight", "weight_scale", "zero_point", "bias", "weight_scale_2"]' in text
    assert "self.humming_config = prepare_layer_config(" in text


def test_kernels_are_found_by_rows():
    """`tuned`, in quant/kernels/humming_product.py: a kernel is for rows above the first number, up to the second."""
    text = (FOLDER / "csrc/launcher/launcher.cpp").read_text()
    assert "if (shape_m > min_val && shape_m <= max_val) return i + 2;" in text


def test_processes_in_the_background_can_be_forgone():
    """`HUMMING_DISABLE_PARALLEL_BUILD`, in quant/kernels/humming.py: read at import, before a process is started."""
    for file in ("ops/utils.py", "utils/nvrtc.py"):
        assert 'os.getenv("HUMMING_DISABLE_PARALLEL_BUILD", "0") == "1"' in (FOLDER / file).read_text()
