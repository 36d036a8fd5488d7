from tests.support.architectures import ARCHITECTURES
from tests.support.matrix import COLUMNS, REFUSED, TOLERANCE
from tests.support.model_table import PAGE, results, with_table


def test_the_page_has_the_table_of_the_last_run() -> None:
    page = PAGE.read_text()
    assert with_table(page) == page, "run python -m tests.support.model_table"


def test_the_last_run_had_every_cell() -> None:
    found = results()
    assert list(found) == list(ARCHITECTURES)
    for row, cells in found.items():
        assert list(cells) == list(COLUMNS), row
        for column, cell in cells.items():
            if isinstance(cell, str):
                assert cell == REFUSED[row, column]
            else:
                assert cell <= TOLERANCE
                assert (row, column) not in REFUSED
