"""The parts of `make next-vllm` that need no network."""

import importlib.util
import zipfile
from pathlib import Path

FILE = Path(__file__).parents[2] / "requirements" / "next_vllm.py"
spec = importlib.util.spec_from_file_location("next_vllm", FILE)
assert spec is not None and spec.loader is not None
next_vllm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(next_vllm)

METADATA = """Metadata-Version: 2.4
Name: vllm
Version: 9.8.7
Requires-Dist: Some_Package>=3
Requires-Dist: torch==9.9; platform_system == "Linux"

Version: of the description
"""


def test_sources_stand_beside_the_compiled_code_of_the_installed_build(tmp_path: Path) -> None:
    wheel, installed, sources = tmp_path / "vllm.whl", tmp_path / "installed", tmp_path / "src"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "x = 1")
        archive.writestr("vllm/_C.abi3.so", "for CUDA")
        archive.writestr("vllm-9.8.7.dist-info/METADATA", METADATA)
    installed.mkdir()
    (installed / "_C.abi3.so").write_text("for the CPU")
    for _ in range(2):
        next_vllm.unpack(wheel, sources, installed)
    assert (sources / "vllm" / "_C.abi3.so").read_text() == "for the CPU"
    assert (sources / "vllm" / "__init__.py").read_text() == "x = 1"
    metadata = (sources / "vllm-9.8.7.dist-info" / "METADATA").read_text()
    assert metadata == METADATA.replace("9.8.7", "9.8.7+cpu")
    assert next_vllm.requirements(sources) == {"some-package", "torch"}


def test_every_name_that_is_imported_is_looked_for() -> None:
    found = set(next_vllm.imports())
    assert ("vllm_longctx/plugin.py", "vllm.engine.arg_utils", "EngineArgs") in found
    assert ("tests/support/vllm_names.py", "vllm.config", "VllmConfig") in found
    assert not [name for _, _, name in found if name == "make_arg_parser"]  # each version has one of two
