"""Versions: the ranges, the lock that is made from them, and what a process says of a package outside its range."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.specifiers import SpecifierSet

from ds_llmpq import versions
from ds_llmpq.errors import UserError

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def locked(name, python="3.11"):
    """Package -> version of one requirements file, for a Python on Linux."""
    pins = {}
    for package, version, marker in re.findall(
        r"^([\w.-]+)==([\w.+!]+)(?: ; ([^\\\n]+))?", (LOCK / name).read_text(), re.M
    ):
        environment = {
            "python_version": python, "python_full_version": f"{python}.5", "sys_platform": "linux",
            "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix",
        }  # fmt: skip
        if not marker or Marker(marker).evaluate(environment):
            assert package not in pins, f"{name} pins {package} twice for Python {python}"
            pins[package.lower().replace("_", "-")] = version
    return pins


def wanted(*extras):
    ranges = dict(versions.REQUIREMENTS)
    for extra in extras:
        ranges |= versions.EXTRAS[extra]
    return {name.lower().replace("_", "-"): SpecifierSet(spec) for name, spec in ranges.items()}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("name", "extra"), [("cpu.txt", "cpu"), ("cuda.txt", "gpu"), ("dev.txt", "dev")])
def test_the_lock_holds_every_requirement_within_its_range_on_every_python(name, extra, python):
    pins = locked(name, python) | locked("torch.txt", python)
    for package, spec in wanted(extra).items():
        assert spec.contains(pins[package]), f"{package} {pins[package]} is outside {spec}; run scripts/lock.sh"


def test_the_locks_agree_with_each_other():
    dev = locked("dev.txt")
    for name in ("cpu.txt", "cuda.txt"):
        differing = {package for package, version in locked(name).items() if dev.get(package, version) != version}
        assert not differing, f"{name} and dev.txt differ in {differing}"


def test_every_locked_package_but_torch_has_hashes():
    for name in ("cpu.txt", "cuda.txt", "dev.txt", "build.txt"):
        text = (LOCK / name).read_text()
        for block in re.split(r"^(?=\w)", text, flags=re.M)[1:]:
            assert "--hash=sha256:" in block, f"{name}: {block.splitlines()[0]} has no hash"
    assert "hash" not in (LOCK / "torch.txt").read_text()


def test_the_lowest_versions_are_the_lower_ends_of_the_ranges():
    pins = locked("lowest.txt")
    for package, spec in wanted("dev").items():
        if package == "torch":
            continue
        low = next(part.version for part in spec if part.operator == ">=")
        assert SpecifierSet(f"=={low}.*").contains(pins[package]), (
            f"{package} {pins[package]} is not the lowest of {spec}"
        )


def test_every_range_has_two_ends():
    for extra in versions.EXTRAS:
        for package, spec in wanted(extra).items():
            assert {part.operator for part in spec} == {">=", "<"}, f"{package}{spec}"


def test_the_installed_metadata_is_the_list():
    stated = {line.split(";")[0].strip() for line in metadata.requires("ds_llmpq") if "extra ==" not in line}
    parsed = {re.split(r"[<>]", line)[0]: SpecifierSet(re.sub(r"^[\w.-]+", "", line)) for line in stated}
    assert parsed == {name: SpecifierSet(spec) for name, spec in versions.REQUIREMENTS.items()}


def test_a_version_outside_its_range_is_one_sentence_with_range_and_remedy(monkeypatch):
    monkeypatch.delenv(versions.ANY_VERSION, raising=False)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "5.99.0" if name == "transformers" else real(name))
    with pytest.raises(UserError) as said:
        versions.check_versions()
    spec = versions.REQUIREMENTS["transformers"]
    assert str(said.value).startswith(
        f"transformers 5.99.0 is installed, but ds_llmpq is tested with transformers{spec};"
    )
    assert f"pip install 'transformers{spec}'" in str(said.value)
    monkeypatch.setenv(versions.ANY_VERSION, "1")
    versions.check_versions()


@pytest.mark.parametrize(
    ("found", "good"),
    [("2.11.0", True), ("2.11.0a0+nv25.10", True), ("2.13.9+cu130", True), ("2.10.1", False), ("2.14.0", False)],
)
def test_vendor_builds_are_taken_for_their_release(monkeypatch, found, good):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    if good:
        versions.check_version("torch", ">=2.11,<2.14")
    else:
        with pytest.raises(UserError, match=re.escape(found)):
            versions.check_version("torch", ">=2.11,<2.14")


def test_a_missing_package_is_named_and_an_optional_one_not_missed(monkeypatch):
    def not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_found)
    with pytest.raises(UserError, match=r"torch is not installed; install it with: pip install 'torch>=2\.11'"):
        versions.check_version("torch", ">=2.11")
    versions.check_version("humming-kernels", ">=0.5", required=False)


def test_the_command_line_says_it_before_anything_else(tmp_path):
    """A package that hides the installed one, as an upgrade beside the lock would."""
    fake = tmp_path / "transformers-9.0.0.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.0.0\n")
    env = {name: value for name, value in os.environ.items() if name != versions.ANY_VERSION}
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from ds_llmpq.cli import main; main(['plan'])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env=env
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("error: transformers 9.0.0 is installed, but ds_llmpq is tested with transformers>=")
    assert len(run.stderr.splitlines()) == 1
