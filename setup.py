"""Installs ds_llmpq with its configuration, small model and demonstration prompts inside the package."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a build's own process does not start in this folder
from ds_llmpq.versions import EXTRAS, REQUIREMENTS, format_requirements

setup(
    name="ds_llmpq",
    version="0.1.0",
    description="Serve large language models offline on heterogeneous devices, with a plan that can be trusted.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[
        *find_packages(include=["ds_llmpq", "ds_llmpq.*"]),
        # top-level folders of a checkout that an installed wheel carries inside the package
        "ds_llmpq.conf",
        "ds_llmpq.assets.launch",
        "ds_llmpq.assets.tiny_llama",
    ],
    package_dir={
        "ds_llmpq.conf": "conf",
        "ds_llmpq.assets.launch": "launch",
        "ds_llmpq.assets.tiny_llama": "tests/assets/tiny-llama",
    },
    package_data={
        "ds_llmpq": ["py.typed", "models/texts/*.txt"],
        "ds_llmpq.conf": ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
        "ds_llmpq.assets.launch": ["*.jsonl"],
        "ds_llmpq.assets.tiny_llama": ["*"],
    },
    install_requires=format_requirements(REQUIREMENTS),
    extras_require={extra: format_requirements(versions) for extra, versions in EXTRAS.items()},
    entry_points={"console_scripts": ["ds-llmpq = ds_llmpq.cli:main"]},
)
