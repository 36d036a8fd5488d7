from tests.support.architectures import ARCHITECTURES
from tests.support.matrix import METHODS, REFUSED, TOLERANCE
from tests.support.model_table import PAGE, results, with_table
from vllm_longctx.models import longllama
from vllm_longctx.models.properties import TESTED


def test_the_page_has_the_table_of_the_last_run() -> None:
    page = PAGE.read_text()
    assert with_table(page) == page, "run python -m tests.support.model_table"


def test_the_last_run_had_every_cell() -> None:
    found = results()
    assert list(found) == list(ARCHITECTURES)
    for row, cells in found.items():
        assert list(cells) == list(METHODS), row
        for column, cell in cells.items():
            if isinstance(cell, str):
                assert cell == REFUSED[row, column]
            else:
                assert cell <= TOLERANCE
                assert (row, column) not in REFUSED


def test_what_is_known_as_tested_has_a_row() -> None:
    """LongLLaMA and MPT's own name for itself are in tests of their own."""
    run = (row for name, row in ARCHITECTURES.items() if not all((name, c) in REFUSED for c in METHODS))
    assert set(TESTED) == {row.architecture for row in run} | {longllama.ARCHITECTURE, "MPTForCausalLM"}
