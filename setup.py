"""Installation. The one place where dependencies are listed; its extra "cpu" pins the pair that runs on a laptop."""
import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "mindrlhf" / "__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="mindrlhf",
    version=version,
    description="Reward models for GLM-4 on MindSpore and MindFormers",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mindrlhf", "mindrlhf.*"]),
    python_requires=">=3.9,<3.12",
    install_requires=[
        "mindspore>=2.4,<2.8",  # an Ascend user's own installation stays as it is
        "mindformers>=1.3,<1.4",
        "numpy>=1.20,<2",
        "sentencepiece>=0.2.0",
        "pyyaml>=6.0",
        "tiktoken>=0.6",
        "tqdm>=4.65",
        "matplotlib>=3.7",
        "safetensors>=0.4",
    ],
    extras_require={
        # What the two scripts install: the pair that is in the package registry and runs on a CPU.
        "cpu": ["mindspore==2.7.2", "mindformers==1.3.2"],
        "dev": ["pytest>=7", "ruff>=0.4", "regex", "hypothesis>=6.100"],
        # What this project is compared with, in an environment of its own (.venv-torch).
        "peers": ["torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "tiktoken>=0.6"],
    },
)
