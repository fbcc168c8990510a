"""Installs ds_llmpq with its configuration, small model and demonstration prompts inside the package."""

from pathlib import Path

from setuptools import find_packages, setup

CPU = ["openvino>=2026.4"]  # fast products with quantized weights
GPU = ["gemlite>=0.5.1", "nvidia-ml-py>=12.0"]
EVAL = ["lm_eval>=0.4.13"]
SLURM = ["hydra-submitit-launcher>=1.2"]  # sweeps as Slurm jobs
MLFLOW = ["mlflow>=3.0"]
OPTUNA = ["optuna>=4.0"]  # scripts/tune_theta.py
LENGTHS = ["pyarrow>=18"]  # parquet files of past answers
DEV = [
    *CPU,
    *EVAL,
    *LENGTHS,
    "hypothesis>=6.100",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "ruff>=0.17",
]

setup(
    name="ds_llmpq",
    version="0.1.0",
    description="Serve large language models offline on unlike devices, with a plan that can be trusted.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["ds_llmpq", "ds_llmpq.*"]),
        # top-level folders of a checkout that an installed wheel carries inside the package
        "ds_llmpq.conf",
        "ds_llmpq.launch",
        "ds_llmpq.assets.tiny_llama",
    ],
    package_dir={
        "ds_llmpq.conf": "conf",
        "ds_llmpq.launch": "launch",
        "ds_llmpq.assets.tiny_llama": "tests/assets/tiny-llama",
    },
    package_data={
        "ds_llmpq.cost": ["*.json"],
        "ds_llmpq.conf": ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
        "ds_llmpq.launch": ["*.jsonl"],
        "ds_llmpq.assets.tiny_llama": ["*"],
    },
    install_requires=[
        "accelerate>=1.15",
        "deepspeed>=0.19.8",
        "gurobipy>=13.0",
        "highspy>=1.15",
        "hqq>=0.2.8",
        "hydra-core>=1.3.8",
        "hydra-joblib-launcher>=1.2",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "omegaconf>=2.3.1",
        "psutil>=5.9",
        "safetensors>=0.8",
        "scikit-learn>=1.7",
        "scipy>=1.17",
        "torch>=2.13",
        "tqdm>=4.66",
        "transformers>=5.23",
    ],
    extras_require={
        "cpu": CPU,
        "dev": DEV,
        "eval": EVAL,
        "gpu": GPU,
        "lengths": LENGTHS,
        "mlflow": MLFLOW,
        "optuna": OPTUNA,
        "slurm": SLURM,
    },
    entry_points={"console_scripts": ["ds-llmpq = ds_llmpq.cli:main"]},
)
