"""What another version of vLLM means for this checkout: `make next-vllm VERSION=0.34.0`.

It downloads vLLM's wheel for CUDA, without what that needs. It unpacks the Python sources in build/, beside
the installed vLLM's compiled code, as a build for the CPU. There it looks for the seams, for the names that
are imported, for the diffs of patches/ and for mypy's errors, and runs fast tests. The report is printed, and
written to build/vllm-VERSION/report.md.
"""

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True}
TESTS = ["test_seams.py", "test_processes.py", "engine", "scheduling", "serving", "startup", "cuda"]
PATCHES = "test_patches.py"  # its slow tests, too, which run the tests of the diffs


def download(version: str, directory: Path) -> Path:
    found = list(directory.glob("*.whl"))
    if not found:
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(directory), f"vllm=={version}")
        found = list(directory.glob("*.whl"))
    (wheel,) = found
    return wheel


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments[1:]], check=True)


def unpack(wheel: Path, directory: Path, installed: Path) -> None:
    """Python sources and data to `directory`, with links to the compiled code of an installed vLLM.

    Its metadata call it a build for the CPU: by its version, vLLM decides which platform it is on.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if ".so" not in Path(name).name:
                archive.extract(name, directory)
    for library in installed.glob("*.so"):
        link = directory / "vllm" / library.name
        link.unlink(missing_ok=True)
        link.symlink_to(library)
    (metadata,) = directory.glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(re.sub(r"(?m)^(Version: [^+\n]+)$", r"\1+cpu", text, count=1), encoding="utf-8")


def requirements(wheel_sources: Path) -> set[str]:
    """The names of the packages that this vLLM requires."""
    (metadata,) = wheel_sources.glob("*.dist-info/METADATA")
    names = re.findall(r"(?m)^Requires-Dist: ([\w.-]+)", metadata.read_text(encoding="utf-8"))
    return {name.lower().replace("_", "-") for name in names}


def imports() -> Iterator[tuple[str, str, str]]:
    """(file, module, name) of each name of vLLM's that package, tests and benchmarks import.

    Without those for which there is another one, in `try` and `except ImportError`.
    """
    for folder in ("vllm_longctx", "tests", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "node_modules" in file.parts:
                continue
            tree = ast.parse(file.read_text(encoding="utf-8"))
            tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and node.handlers]
            either = {child for node in tries for child in ast.walk(node)}
            for node in ast.walk(tree):
                is_vllms = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
                if is_vllms and node not in either:
                    for alias in node.names:
                        yield str(file.relative_to(ROOT)), str(node.module), alias.name


def look() -> None:
    """In the other vLLM's environment: print what is not there. `module X` names a package to install."""
    from vllm_longctx import seams

    for file, module, name in sorted(set(imports())):
        try:
            if not hasattr(importlib.import_module(module), name):
                importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError as e:
            if not (e.name or "").startswith("vllm"):
                print("module", e.name)
            print(f"- {file}: {module} has no {name}")
        except (ImportError, RuntimeError, OSError) as e:
            print(f"- {file}: {module}.{name}: {type(e).__name__}: {e}")
    for problem in seams.problems():
        print(f"- seam: {problem}")


class Report:
    def __init__(self, file: Path):
        self.file, self.failed = file, 0
        file.write_text("", encoding="utf-8")

    def add(self, text: str) -> None:
        print(text, flush=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def run(self, title: str, environment: dict[str, str], *command: str, lines: int = 40) -> None:
        """A part of the report: what a command prints, its last lines."""
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, **CAPTURED)
        self.failed += done.returncode != 0
        tail = "\n".join(done.stdout.strip().splitlines()[-lines:])
        verdict = "passed" if done.returncode == 0 else "FAILED"
        self.add(f"\n## {title}: {verdict}\n\n```\n{tail or done.stderr.strip()[-2000:]}\n```")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("version", help="of vLLM, as 0.34.0")
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.look:
        look()
        return 0
    home = ROOT / "build" / f"vllm-{arguments.version}"
    sources, packages = home / "src", home / "packages"
    home.mkdir(parents=True, exist_ok=True)
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    unpack(download(arguments.version, home), sources, Path(spec.origin).parent)
    path = os.pathsep.join(map(str, (sources, packages, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "MYPYPATH": str(sources), "OMP_NUM_THREADS": "1"}
    report = Report(home / "report.md")
    report.add(f"# vLLM {arguments.version} beside {importlib.metadata.version('vllm')}")
    for _ in range(3):  # a package that was missing may hide another one
        command = [sys.executable, __file__, arguments.version, "--look"]
        seen = subprocess.run(command, cwd=ROOT, env=environment, **CAPTURED)
        missing = set(re.findall(r"(?m)^module (\w+)", seen.stdout + seen.stderr))
        missing |= set(re.findall(r"No module named '(\w+)'", seen.stderr))
        wanted = sorted(requirements(sources) & {name.lower().replace("_", "-") for name in missing})
        if not wanted:
            break
        report.add(f"\nIt needs {', '.join(wanted)}.")
        pip("install", "--no-deps", "--upgrade", "--target", str(packages), *wanted)
    here = subprocess.run(command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, **CAPTURED)
    # What the installed one lacks, too, needs another machine.
    lines, known = seen.stdout.splitlines(), set(here.stdout.splitlines())
    problems = [line for line in lines if line.startswith("- ") and line not in known]
    report.failed += bool(problems) or seen.returncode != 0
    report.add("\n## Names and seams\n")
    report.add("\n".join(problems) or ("All are there." if seen.returncode == 0 else seen.stderr[-2000:]))
    doctor = ["-m", "vllm_longctx.cli.main", "doctor"]
    report.run("doctor", {**environment, "COLUMNS": "160"}, *doctor, lines=200)
    report.run("mypy", environment, "-m", "mypy", "--cache-dir", str(home / "mypy"))
    for test in (*TESTS, PATCHES):
        chosen = "" if test == PATCHES else "not slow and not alone"
        marks = ["-m", chosen, "-q", "--tb=line", "-p", "no:cacheprovider"]
        report.run(f"tests/fast/{test}", environment, "-m", "pytest", f"tests/fast/{test}", *marks)
    report.add(f"\n{report.failed} parts failed. This is also in {report.file.relative_to(ROOT)}.")
    return int(report.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
