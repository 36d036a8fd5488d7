"""tests/README.md says what is left to `make test-all`."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[2]


def test_every_file_with_slow_tests_is_listed() -> None:
    listed = re.findall(r"^\| `(\S+\.py)` \|", (TESTS / "README.md").read_text(), re.MULTILINE)
    files = {path.relative_to(TESTS).as_posix(): path.read_text() for path in TESTS.rglob("test_*.py")}
    assert listed == sorted(name for name, text in files.items() if "pytest.mark." + "slow" in text)
