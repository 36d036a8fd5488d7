"""A bundle for a host without a network: what it lacks, in parts of bounded size. No network is used."""

import zipfile
from pathlib import Path

import pytest
from gpu import bundle
from packaging.requirements import Requirement
from packaging.version import Version

# By name: what its metadata asks for.
INDEX = {
    "vllm": [
        "torch==2.13.0",
        "zmq>=25 ; sys_platform == 'linux'",
        "winonly ; sys_platform == 'win32'",
        "Fast_API[standard]",
    ],
    "fast-api": ["starlette<2", "uvicorn>=1 ; extra == 'standard'", "docs ; extra == 'docs'"],
    "starlette": [],
    "uvicorn": ["zmq"],
    "zmq": [],
    "torch": [],
}


def wheel(folder: Path, name: str, asks: list[str], size: int = 0) -> Path:
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {x}" for x in asks)]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n\nText\nRequires-Dist: none\n")
        file.writestr("data", bytes(range(256)) * (size // 256))
    return path


def found(tmp_path: Path, host: dict[str, str], although: tuple[str, ...] = ()) -> set[str]:
    def fetch(requirement: Requirement) -> Path:
        name = bundle.canonicalize_name(requirement.name)
        return wheel(tmp_path, name, INDEX[name])

    versions = {name: Version(version) for name, version in host.items()}
    return set(bundle.missing(["vllm==0.32.0"], versions, although, "3.12", fetch))


def test_what_wheels_ask_for_and_the_host_lacks_is_found(tmp_path: Path) -> None:
    """Also what these ask for, by the markers of the host and the extras asked for."""
    assert found(tmp_path, {"torch": "2.13.0"}) == {"vllm", "zmq", "fast-api", "starlette", "uvicorn"}
    assert found(tmp_path, {"torch": "2.13.0+cu130", "fast-api": "1"}) == {"vllm", "zmq"}


def test_a_version_that_does_not_fit_is_named(tmp_path: Path) -> None:
    host = {"torch": "2.11.0", "zmq": "24"}
    with pytest.raises(
        ValueError, match=r"(?s)torch 2.11.0 is there, vllm asks for ==2.13.0.*zmq 24 .* >=25"
    ):
        found(tmp_path, host)
    assert "torch" not in found(tmp_path, host, ("Torch", "zmq"))


def test_pips_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "freeze"
    path.write_text("Fast_API==1.2\n# comment\ntorch==2.13.0+cu130\nown @ file:///x\n-e git+https://x\n")
    assert {n: str(v) for n, v in bundle.frozen(path).items()} == {
        "fast-api": "1.2",
        "torch": "2.13.0+cu130",
        "own": "0",
    }


@pytest.mark.parametrize("size", [1000, 4096, 100_000])
def test_parts_are_bounded_and_make_the_same_wheels(size: int, tmp_path: Path) -> None:
    wheels = [wheel(tmp_path, "a", [], 9000), wheel(tmp_path, "b", [], 300)]
    parts, out = tmp_path / "parts", tmp_path / "out"
    names = bundle.write_parts(wheels, parts, size)
    out.mkdir()
    assert max((parts / name).stat().st_size for name in names) <= size
    assert [w.read_bytes() for w in bundle.read_parts(parts, out)] == [w.read_bytes() for w in wheels]
    with pytest.raises(ValueError, match="is not empty"):
        bundle.write_parts(wheels, parts, size)


def test_a_missing_or_damaged_part_is_named(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    first, second, *_ = bundle.write_parts([wheel(tmp_path, "a", [], 9000)], parts, 1000)
    (parts / first).unlink()
    (parts / second).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{first}, {second} missing or damaged"):
        bundle.read_parts(parts, tmp_path)


def test_parts_are_of_at_most_64_mib() -> None:
    assert bundle.PART_BYTES == 64 << 20
