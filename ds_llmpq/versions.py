"""The versions of other packages that ds_llmpq is tested with, and a check of those installed.

The only list: `setup.py` reads `REQUIREMENTS` and `EXTRAS`, `scripts/lock.sh` derives the exact versions in
`requirements/`, and every process checks them at start, because a changed library fails minutes later with an error
that names neither the library nor its version.
"""

from __future__ import annotations

import os
from importlib import metadata

from ds_llmpq.errors import UserError

# Both ends of a range are tested: scripts/test_ends.sh. A library whose private interfaces are used, or that changes
# calls from one release to the next, ends at the newest release that was tested; others at their next major version.
REQUIREMENTS = {
    "accelerate": ">=1.10,<2",
    "annotated-types": ">=0.7,<1",
    "deepspeed": ">=0.19.0,<0.20",
    "gurobipy": ">=12.0.3,<14",
    "highspy": ">=1.12,<2",
    "hqq": ">=0.2.8,<0.2.9",
    "hydra-core": ">=1.3.2,<1.4",
    "hydra-joblib-launcher": ">=1.2,<1.3",
    "matplotlib": ">=3.10,<4",
    "numpy": ">=2.1,<3",
    "omegaconf": ">=2.3,<2.4",
    "packaging": ">=24,<27",
    "psutil": ">=6.0,<8",
    "pydantic": ">=2.11,<3",
    "safetensors": ">=0.8,<1",
    "scikit-learn": ">=1.7,<2",
    "scipy": ">=1.15,<2",
    "torch": ">=2.11,<2.14",
    "tqdm": ">=4.66,<5",
    "transformers": ">=5.17,<5.25",
}
EXTRAS = {
    "cpu": {"openvino": ">=2026.2,<2026.5"},  # fast products with quantized weights
    "cuda": {"humming-kernels": ">=0.1.19,<0.1.20"},  # fast products with quantized weights on NVIDIA GPUs
    "gpu": {"nvidia-ml-py": ">=12.0,<14"},
    "eval": {"lm_eval": ">=0.4.11,<0.5"},
    "slurm": {"hydra-submitit-launcher": ">=1.2,<2"},  # sweeps as Slurm jobs
    "mlflow": {"mlflow": ">=3.0,<4"},
    "optuna": {"optuna": ">=4.0,<5"},  # scripts/tune_theta.py
    "lengths": {"pyarrow": ">=18,<27"},  # parquet files of past answers
    "test": {
        "hypothesis": ">=6.100,<7",
        "pytest": ">=8.3,<10",
        "pytest-timeout": ">=2.3,<3",
        "ruff": ">=0.17,<0.18",
    },
}
EXTRAS["dev"] = EXTRAS["cpu"] | EXTRAS["eval"] | EXTRAS["lengths"] | EXTRAS["test"]
# set to any value, it allows untested versions, as tests of new releases do
ANY_VERSION = "DS_LLMPQ_ANY_VERSION"
_TRIED = ("cpu", "cuda", "gpu", "eval", "lengths")  # extras whose packages are used wherever they are installed


def check_versions() -> None:
    """`UserError` naming the first package that is missing or outside its tested range, and the remedy."""
    if os.environ.get(ANY_VERSION):
        return
    for name, wanted in REQUIREMENTS.items():
        check_version(name, wanted)
    for extra in _TRIED:
        for name, wanted in EXTRAS[extra].items():
            check_version(name, wanted, required=False)


def check_version(name: str, wanted: str, required: bool = True) -> None:
    """`UserError` if package `name` is outside `wanted`, or missing although it is `required`."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        if required:
            raise UserError(f"{name} is not installed; install it with: pip install '{name}{wanted}'.") from None
        return
    # a vendor's build (2.11.0a0+nv25.10) counts as the release
    if not SpecifierSet(wanted).contains(Version(found).base_version):
        raise UserError(
            f"{name} {found} is installed, but ds_llmpq is tested with {name}{wanted}; install one of these with: "
            f"pip install '{name}{wanted}' (or set {ANY_VERSION}=1 to try it as it is)."
        )


def format_requirements(versions: dict[str, str]) -> list[str]:
    """As `setup.py` wants them: `name>=low,<high`."""
    return [f"{name}{wanted}" for name, wanted in versions.items()]
