"""A room imports only rooms to its right, and planning needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ds_llmpq"
# left may import right; rooms of one group may not import each other unless listed further to the right
ORDER = [
    "commands",
    "research",
    "report",
    "serving",
    "evaluation",
    "profiling",
    "engine",
    "launch",
    "batch",
    "lengths",
    "planner",
    "scheduler",
    "plan",
    "cost",
    "sensitivity",
    "quant",
    "models",
    "cluster",
]
SHARED = {"errors", "fields", "files", "integers", "shipped", "validation", "versions", "wording"}  # importable by all
BORDER = {
    "api",
    "cli",
    "config",
    "hydra_app",
    "__main__",
}  # these know configuration


def imported_rooms(file: Path) -> set[str]:
    """First path component below ds_llmpq of everything a file imports, at any depth."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "ds_llmpq" else [f"ds_llmpq.{alias.name}" for alias in node.names]
        rooms.update(name.split(".")[1] for name in names if name.startswith("ds_llmpq."))
    return rooms


def forbidden(room: str) -> set[str]:
    return set(ORDER[: ORDER.index(room)]) | (BORDER if room != "commands" else {"cli", "__main__"})


@pytest.mark.parametrize("room", [room for room in ORDER if (PACKAGE / room).is_dir()])
def test_a_room_imports_only_rooms_to_its_right(room):
    for file in sorted((PACKAGE / room).rglob("*.py")):
        wrong = imported_rooms(file) & forbidden(room)
        assert not wrong, f"{file.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_every_room_is_in_the_order():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= set(ORDER)


def test_the_shared_modules_import_no_room():
    for name in SHARED:
        assert imported_rooms(PACKAGE / f"{name}.py") <= SHARED


@pytest.mark.parametrize(
    "module",
    ["planner", "planner.build", "cluster.cluster", "cost.latency", "commands.plan", "serving.planning", "cli"],
)
def test_planning_loads_no_heavy_framework(module):
    heavy = ("torch", "deepspeed", "transformers", "scipy", "sklearn", "matplotlib", "gurobipy", "highspy")
    code = f"import sys, ds_llmpq.{module}; print([n for n in {heavy} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


def test_the_command_line_begins_without_hydra_and_numpy():
    code = "import sys, ds_llmpq.cli; print([n for n in ('hydra', 'numpy', 'pydantic') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


def test_an_embedding_loads_no_compiler():
    """On `meta`, as a rank builds it."""
    code = (
        "import sys, torch; from ds_llmpq.models.ends import _make_embedding\n"
        "with torch.device('meta'): _make_embedding(8, 4)\n"
        "print([n for n in ('torch._dynamo', 'torch._inductor') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout.strip() == "[]"


def test_plans_load_no_solver_and_no_heavy_framework():
    """Every rank reads one."""
    code = "import sys, ds_llmpq.plan; print([n for n in sys.modules if n in ('torch', 'deepspeed') or 'planner' in n])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


def test_the_api_imports_no_command():
    assert not imported_rooms(PACKAGE / "api.py") & {"commands", "cli", "hydra_app", "research", "__main__"}
