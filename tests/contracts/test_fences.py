"""Fences: which of our files may use what is private or undocumented in another library.

`MODULES` are modules that may break with any release, `NAMES` attributes and keywords of other libraries' objects. A
private name that is neither defined by us nor listed here fails. Every name has a contract test that says what is
relied on (`test_LIBRARY_contract.py`); a further use belongs into a file that is listed already, if it can be there.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ds_llmpq"
FILES = {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}

_PIPELINE = ("engine/pipeline_engine.py", "engine/pipeline_module.py", "engine/schedules.py")
_OPENVINO = (
    "quant/kernels/openvino_graph/single_product.py", "quant/kernels/openvino_graph/constants.py",
    "quant/kernels/openvino_graph/decoder_layer.py", "quant/kernels/openvino_graph/stage_graph.py",
    "quant/kernels/openvino_graph/head_graph.py", "quant/kernels/openvino_graph/tensors.py",
)  # fmt: skip
# module, or name in one -> files that may import it or what is below it
MODULES = {
    "deepspeed": ("engine/rank_context.py", *_PIPELINE),
    "transformers.models": (),  # our own block runs
    "transformers.integrations": (),
    "transformers.AttentionInterface": (),
    "hqq.core.optimize": ("quant/optimize.py",),
    "hqq.core.quantize.Quantizer": ("quant/hqq.py", "quant/optimize.py", "quant/unpacked_weight.py"),
    "hqq.core.quantize.BaseQuantizeConfig": ("quant/hqq.py",),
    "openvino": _OPENVINO,
    "hydra._internal": ("hydra_app.py",),
    "humming": ("quant/kernels/humming_product.py",),
    "openvino.op": ("quant/kernels/openvino_graph/decoder_layer.py",),
    "lm_eval": ("evaluation/harness.py",),
    "highspy": ("planner/linear.py", "planner/milp/model.py"),
    "torch.distributed.rendezvous": ("launch/rendezvous.py",),
}
# what a library has beside those, which all may import
PUBLIC = {
    "transformers": {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "PreTrainedConfig",
                     "PreTrainedModel"},
    "hqq.core.quantize": {"HQQLinear"},
}  # fmt: skip
# library -> attribute or keyword -> files that may use it
NAMES = {
    "deepspeed": {
        "__compatible_ops__": ("engine/rank_context.py",),
        "_partition_layers": ("engine/pipeline_module.py",),
        "_set_bounds": ("engine/pipeline_module.py",),
        "_topo": ("engine/pipeline_module.py",),
        "_broadcast_model": ("engine/pipeline_engine.py",),
        "_exec_schedule": ("engine/pipeline_engine.py",),
        "_INSTRUCTION_MAP": ("engine/pipeline_engine.py",),
    },
    "transformers": {
        "all_tied_weights_keys": ("quant/pretrained.py",),
    },
    "hqq": {
        "optimize_weights": ("quant/optimize.py",),
        "optimize_weights_proximal_legacy_step": ("quant/optimize.py",),
        "bit_to_packing": ("quant/hqq.py",),
        "unpack_view_dtype": ("quant/hqq.py",),
    },
    "omegaconf": {
        "_metadata": ("overrides.py",),
        "_get_node": ("overrides.py",),
        "_is_none": ("overrides.py",),
    },
    "openvino": {"get_rt_info": ("quant/kernels/openvino_graph/decoder_layer.py",)},
    "torch": {
        "_reorder_linear_weight": ("quant/onednn_linear.py",),
        "_linear_pointwise": ("quant/onednn_linear.py",),
        "_is_mkldnn_bf16_supported": ("quant/onednn_linear.py",),
        "_dynamo": ("engine/runner/fusion.py",),
        "master_listen_fd": ("launch/rendezvous.py",),
    },
    "lm_eval": {"_loglikelihood_tokens": ("evaluation/harness.py",)},
    "highspy": {
        "HandleKeyboardInterrupt": ("planner/milp/model.py",),
        "enableCallbacks": ("planner/linear.py",),
    },
}
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_exit"}  # of named tuples, and of os


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of all that a file imports, at any depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def used(tree: ast.AST) -> set[str]:
    """Names of attributes, methods, class attributes, keywords and keys that a file uses or defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return found


def private_attributes(tree: ast.AST) -> set[str]:
    """Of any object."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in attributes if name.startswith("_") and not name.endswith("__")}


def defined(tree: ast.AST) -> set[str]:
    """Names that are a file's own: functions, classes, variables, fields, and attributes that it gives to `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def wrong_imports(name: str, tree: ast.AST) -> list[str]:
    """What a file imports though it is not listed for it."""
    wrong = []
    for found in sorted(imports(tree)):
        fences = [fence for fence in MODULES if found == fence or found.startswith(f"{fence}.")]
        if any(name not in MODULES[fence] for fence in fences):
            wrong.append(found)
        library = next((public for public in PUBLIC if found.startswith(f"{public}.")), None)
        if library and not fences and found.removeprefix(f"{library}.") not in PUBLIC[library]:
            wrong.append(found)
    return wrong


def test_modules_of_other_libraries_stay_behind_their_fence():
    for name, tree in FILES.items():
        wrong = wrong_imports(name, tree)
        assert not wrong, f"{name} imports {wrong}: use a file that MODULES lists, or list it with a contract test"


@pytest.mark.parametrize("library", NAMES)
def test_private_names_stay_behind_their_fence(library):
    for private, allowed in NAMES[library].items():
        users = {name for name, tree in FILES.items() if private in used(tree)}
        assert users == set(allowed), f"{private} of {library} is used in {sorted(users)}; listed is {sorted(allowed)}"


@pytest.mark.parametrize("library", NAMES)
def test_every_private_name_has_a_contract(library):
    contracts = (Path(__file__).parent / f"test_{library}_contract.py").read_text()
    held = {word for call in re.findall(r'"""`([^`]+)`', contracts) for word in re.findall(r"\w+", call)}
    said = {word for text in re.findall(r'"""(`.*?)"""', contracts, re.DOTALL) for word in re.findall(r"\w+", text)}
    missing = [name for name in NAMES[library] if name not in held | said]
    assert not missing, f"test_{library}_contract.py does not say what is relied on in {missing}"


def test_no_other_private_name_is_used():
    own = set().union(*map(defined, FILES.values()))
    listed = {name for names in NAMES.values() for name in names}
    for name, tree in FILES.items():
        foreign = private_attributes(tree) - own - listed - DOCUMENTED
        assert not foreign, f"{name} uses {sorted(foreign)}, private in another library: list it with a contract test"


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("import deepspeed", ["deepspeed"]),
        ("from transformers.cache_utils import Cache", ["transformers.cache_utils.Cache"]),
        ("from transformers.models.opt import modeling_opt", ["transformers.models.opt.modeling_opt"]),
        ("def late():\n    from hqq.core.quantize import Quantizer", ["hqq.core.quantize.Quantizer"]),
        ("from transformers import AutoTokenizer\nfrom hqq.core.quantize import HQQLinear", []),
    ],
)
def test_a_new_import_elsewhere_is_seen(line, wrong):
    assert wrong_imports("batch/detokenizer.py", ast.parse(line)) == wrong


def test_a_new_private_name_is_seen():
    tree = ast.parse("def step(model):\n    model._update_cache()\n    own._mine = model.__class__")
    assert private_attributes(tree) - defined(tree) == {"_update_cache", "_mine"}
