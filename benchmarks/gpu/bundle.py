"""vLLM for CUDA and this project for a host without a network, in files of at most 64 MiB.

    pip freeze > FREEZE                                         # on the host
    python benchmarks/gpu/bundle.py needs FREEZE                # here: what vLLM's wheel asks of the host
    python benchmarks/gpu/bundle.py pack FREEZE PARTS           # here: what the host lacks, in PARTS
    python benchmarks/gpu/bundle.py unpack PARTS SITE           # on the host, beside this checkout

What is needed comes from the wheels' own metadata, beginning with vLLM's, and is written down nowhere else. A
package that the host has in another version than is asked for is an error: replace it there, or pass it over
(`--although torch`) if you know better.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PART_BYTES = 64 << 20
MANIFEST = "parts.json"
VLLM = "vllm==0.32.0"
TESTS = ("pytest", "hypothesis")  # which `run_all.py` runs on the device
ROOT = Path(__file__).parents[2]
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]

app = typer.Typer(add_completion=False, help=__doc__.partition("\n")[0], rich_markup_mode=None)
Fetch = Callable[[Requirement], Path]


def environment(python: str) -> dict[str, str]:
    """Of markers, on the host."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    return {
        **linux,
        "platform_machine": "x86_64",
        "python_version": python,
        "python_full_version": f"{python}.0",
    }


def asked_by(wheel: Path, extras: Iterable[str], python: str) -> Iterator[Requirement]:
    """What a wheel asks for, by its METADATA."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA"))
        lines = HeaderParser().parsestr(file.read(name).decode()).get_all("Requires-Dist", [])
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        wanted = [{**environment(python), "extra": extra} for extra in ("", *extras)]
        if marker is None or any(marker.evaluate(one) for one in wanted):
            yield requirement


def frozen(path: Path) -> dict[str, Version]:
    """By canonical name, what `pip freeze` says of the host; of what has no version, 0."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, version = line.partition("==")
        if version:
            found[canonicalize_name(name)] = Version(version)
        elif " @ " in line:
            found[canonicalize_name(line.partition(" @ ")[0])] = Version("0")
    return found


def missing(
    roots: Iterable[str], host: dict[str, Version], although: Iterable[str], python: str, fetch: Fetch
) -> dict[str, Path]:
    """By name, the wheels that the host lacks for `roots`, and for what these ask.

    Raises ValueError naming what the host has in another version than is asked for, and by whom.
    """
    wheels: dict[str, Path] = {}
    kept, wrong = {canonicalize_name(name) for name in although}, []
    todo = [(Requirement(root), "you") for root in roots]
    while todo:
        requirement, asker = todo.pop(0)
        name = canonicalize_name(requirement.name)
        if name in host and name not in kept and not requirement.specifier.contains(host[name], True):
            wrong.append(
                f"{requirement.name} {host[name]} is there, {asker} asks for {requirement.specifier}"
            )
        if name in host or name in wheels:
            continue
        wheels[name] = fetch(requirement)
        todo += [(one, name) for one in asked_by(wheels[name], requirement.extras, python)]
    if wrong:
        raise ValueError(
            "\n".join([*sorted(wrong), "replace these on the host, or pass them over with --although"])
        )
    return wheels


def downloads(into: Path, python: str) -> Fetch:
    """From the package index, by pip."""

    def fetch(requirement: Requirement) -> Path:
        folder = into / canonicalize_name(requirement.name)
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", python, "--implementation", "cp", *platforms, "-d", str(folder)]
        subprocess.run([*command, f"{requirement.name}{requirement.specifier}"], check=True)
        return next(folder.glob("*.whl"))

    return fetch


def own_wheel(into: Path) -> Path:
    """Of this project: vLLM finds plugins by the entry points of what is installed."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(into), str(ROOT)], check=True)
    return next(into.glob("vllm_longctx-*.whl"))


class Parts(io.RawIOBase):
    """Writes files PARTS/part-000, ... of at most `size` bytes."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.names, self._left = folder, size, [], 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        left = memoryview(data).cast("B")  # type: ignore[arg-type]
        count = len(left)
        while left:
            if not self._left:
                self.names.append(f"part-{len(self.names):03}")
                self._left = self.size
            with (self.folder / self.names[-1]).open("ab") as file:
                file.write(left[: self._left])
            self._left, left = self._left - len(left[: self._left]), left[self._left :]
        return count


def write_parts(wheels: Iterable[Path], folder: Path, size: int = PART_BYTES) -> list[str]:
    """The wheels as one tar file in parts, and their checksums. Raises ValueError for a folder in use."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give another folder")
    parts = Parts(folder, size)
    with io.BufferedWriter(parts, 1 << 20) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for wheel in wheels:
            tar.add(wheel, wheel.name)
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in parts.names}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n")
    return parts.names


def read_parts(folder: Path, into: Path) -> list[Path]:
    """The wheels. Raises ValueError naming parts that are missing or damaged."""
    sums = json.loads((folder / MANIFEST).read_text())
    whole, wrong = into / "wheels.tar", []
    with whole.open("wb") as file:
        for name, expected in sums.items():
            data = (folder / name).read_bytes() if (folder / name).is_file() else b""
            if hashlib.sha256(data).hexdigest() != expected:
                wrong.append(name)
            file.write(data)
    if wrong:
        raise ValueError(f"{folder}: {', '.join(wrong)} missing or damaged; copy them again")
    with tarfile.open(whole) as tar:
        tar.extractall(into, filter="data")
    return sorted(into.glob("*.whl"))


Freeze = Annotated[Path, typer.Argument(help="What `pip freeze` prints on the host.")]
Python = Annotated[str, typer.Option(help="Of the host.")]
Although = Annotated[
    list[str], typer.Option(help="A package of the host that is to stay, whatever its version.")
]


@app.command()
def needs(freeze: Freeze, python: Python = "3.12") -> None:
    """What vLLM's wheel asks for, and what the host has."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = downloads(Path(folder), python)(Requirement(VLLM))
        host = frozen(freeze)
        for one in asked_by(wheel, (), python):
            has = host.get(canonicalize_name(one.name))
            fits = has is not None and one.specifier.contains(has, True)
            state = "missing" if has is None else f"{has}{'' if fits else ' DOES NOT FIT'}"
            print(f"{one.name}{one.specifier}: {state}")


@app.command()
def pack(freeze: Freeze, parts: Path, python: Python = "3.12", although: Although = []) -> None:  # noqa: B006
    """Write what the host lacks."""
    with tempfile.TemporaryDirectory() as folder:
        found = missing((VLLM, *TESTS), frozen(freeze), although, python, downloads(Path(folder), python))
        names = write_parts([*found.values(), own_wheel(Path(folder))], parts)
    print(f"{len(found) + 1} packages in {len(names)} parts")


@app.command()
def unpack(parts: Path, site: Path) -> None:
    """Install them into a directory for PYTHONPATH."""
    with tempfile.TemporaryDirectory() as folder:
        wheels = map(str, read_parts(parts, Path(folder)))
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
        ]
        subprocess.run([*command, "--target", str(site), *wheels], check=True)


if __name__ == "__main__":
    app()
