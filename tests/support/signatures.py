"""The functions of vLLM's that longctx looks for or overrides, with their parameters.

`python -m tests.support.signatures` adds those of the installed vLLM to `vllm_longctx/signatures.json`. Its
version must be in `seams.TESTED_VERSIONS`. Start with the oldest.
"""

import dataclasses
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import vllm

import vllm_longctx
from vllm_longctx import seams


def touched() -> dict[str, str]:
    """The parameters of these functions in the installed vLLM, by path."""
    paths = {look.path for seam in seams.SEAMS for look in seam.check()} | set(overridden())
    found = {path: seams.parameters(seams.find(path)) for path in paths if path.startswith("vllm.")}
    return {path: parameters for path, parameters in sorted(found.items()) if parameters is not None}


def overridden() -> Iterator[str]:
    """Paths of functions of vLLM's that a class of longctx overrides, also as a mixin of another one.

    And of the abstract classes of vLLM's among their bases.
    """
    for cls in classes():
        nearest = next((base for base in cls.__mro__ if base.__module__.startswith("vllm.")), object)
        if inspect.isabstract(nearest):
            yield f"{nearest.__module__}:{nearest.__qualname__}"
        for place, ours in enumerate(cls.__mro__):
            if not ours.__module__.startswith("vllm_longctx."):
                continue
            stock = [base for base in cls.__mro__[place + 1 :] if base.__module__.startswith("vllm.")]
            for name in vars(ours):
                base = next((base for base in stock if name in vars(base)), None)
                if base is None or (name.startswith("__") and name != "__init__"):
                    continue
                if name != "__init__" or not dataclasses.is_dataclass(base):
                    yield f"{base.__module__}:{base.__qualname__}.{name}"


def classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(vllm_longctx.__path__, "vllm_longctx."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and value.__module__ == module.name:
                yield value


def record() -> None:
    version = vllm.__version__.partition("+")[0]
    known = dict(seams.SIGNATURES)
    for path, parameters in touched().items():
        if seams.known_parameters(path, version) != parameters:
            known[path] = {**known.get(path, {}), version: parameters}
    file = Path(seams.__file__).with_name("signatures.json")
    file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
