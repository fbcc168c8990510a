"""The contract tests themselves: each says what it holds, and holds something that is used."""

import ast
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ds_llmpq.versions import EXTRAS, REQUIREMENTS

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "ds_llmpq"
RANGES = REQUIREMENTS | EXTRAS["cpu"] | EXTRAS["cuda"] | EXTRAS["eval"]
_FORM = re.compile(r"`([^`]+)`(?: = [^,]+)?, in ((?:\w+/)*\w+\.py): \S")
MODULES = sorted(HERE.glob("test_*_contract.py"))


def contracts_of(module: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(module.read_text())
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def constant(module: Path, name: str):
    return next(
        ast.literal_eval(node.value)
        for node in ast.parse(module.read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name
    )


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_each_contract_names_a_call_that_a_file_of_ours_uses(module):
    for test in contracts_of(module):
        said = " ".join((ast.get_docstring(test) or "").split())
        form = _FORM.match(said)
        assert form, f"{module.name}, {test.name}: say '`CALL`, in FILE.py: what is relied on', not {said!r}"
        call, file = form[1], PACKAGE / form[2]
        assert file.is_file(), f"{module.name}, {test.name}: there is no {form[2]}"
        name = re.findall(r"\w[\w =]*", call.split("(")[0])[-1]
        assert name in file.read_text(), f"{module.name}, {test.name}: {form[2]} does not use {name!r} any more"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_contracts_were_seen_from_the_lowest_allowed_version_on(module):
    library, (first, last) = constant(module, "LIBRARY"), constant(module, "SEEN")
    allowed = SpecifierSet(RANGES[library])
    assert Version(first) in allowed
    assert Version(last) in allowed
    lowest = next(Version(bound.version) for bound in allowed if bound.operator == ">=")
    assert Version(first) == lowest, f"{module.name}: versions.py allows {library} {lowest}; see it there first"


def test_a_broken_contract_says_which_call_of_which_library(request):
    """As where `PipelineModule._set_bounds` is gone."""
    import test_deepspeed_contract as module

    plugin = request.config.pluginmanager.get_plugin(str(HERE / "conftest.py"))
    running = plugin.pytest_pyfunc_call(SimpleNamespace(module=module, function=module.test_bounds_of_a_stage))
    next(running)
    with pytest.raises(plugin.ContractBroken) as broken:
        running.throw(AttributeError("type object 'PipelineModule' has no attribute '_set_bounds'"))
    assert str(broken.value).startswith(f"deepspeed {metadata.version('deepspeed')} is not as it was in 0.19.0 to ")
    assert "`PipelineModule._set_bounds(start, stop)`, in engine/pipeline_module.py" in str(broken.value)
    assert "AttributeError: type object 'PipelineModule' has no attribute '_set_bounds'" in str(broken.value)
