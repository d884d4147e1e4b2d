"""Installation. The one place where dependencies are listed.

MindSpore and MindFormers come as a pair, and each pair is an extra, for several distributions (mindspore,
mindspore-dev, a wheel that came with CANN) own the same folder `mindspore/`: were one of them required, pip would lay
it over another one.
"""
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
    python_requires=">=3.9,<3.13",
    install_requires=[
        "numpy>=1.20,<2",
        "sentencepiece>=0.2.0",
        "pyyaml>=6.0",
        "tiktoken>=0.6",
        "tqdm>=4.65",
        "matplotlib>=3.7",
    ],
    extras_require={
        # What the README's two commands install.
        "cpu": ["mindspore==2.9.0", "mindformers==1.9.0"],
        # PAIR=production: MindFormers 1.3.0 with the MindSpore nearest to 2.4 that a package registry has; Python 3.10.
        "production": ["mindspore-dev==2.5.0.dev20250119", "mindformers==1.3.0"],
        # PAIR=newest: MindFormers 2.1.0 asks for MindSpore 2.11 and hyper-parallel, which package registries lack. In
        # graph mode it needs neither, so it is installed without what it asks for (extra "nodeps"), and the rest of its
        # list stands here. A pyarrow after 23 needs NumPy 2, which MindFormers refuses.
        "newest": ["mindspore==2.10.0", "astunparse>=1.6.3", "datasets>=5.0.1", "deprecated>=1.2.0", "ftfy>=6.1.1",
                   "jieba>=0.42.1", "jinja2", "mindpet==1.0.4", "opencv-python-headless", "pyarrow==23.0.1", "pybind11",
                   "regex>=2022.10.31", "rouge_chinese>=1.0.3", "setproctitle", "setuptools>=83.0.0", "tensorboardX",
                   "tokenizers", "transformers>=5.3.0"],
        "nodeps": ["mindformers==2.1.0"],
        # For a cluster that has MindSpore's own wheel already: leaves it as it is. Two, for MindFormers 1.9 asks for
        # MindSpore 2.9: one range over both would have pip put the one for CPUs in the place of an older one.
        "ascend": ["mindspore>=2.9,<2.10", "mindformers>=1.9,<1.10"],
        "ascend13": ["mindspore>=2.4,<2.8", "mindformers>=1.3,<1.4"],
        "tensorboard": ["tensorboardX>=2.6"],  # for the YAML's block of this name
        "dev": ["pytest>=7", "pytest-xdist>=3", "ruff>=0.4", "regex", "hypothesis>=6.100", "safetensors>=0.4",
                "tensorboardX>=2.6"],
        # What this project is compared with, in an environment of its own (.venv-torch).
        "peers": ["torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "tiktoken>=0.6"],
    },
)
