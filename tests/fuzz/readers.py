"""All rows of the table."""

from tests.fuzz import hub_rows, tensorflow_rows, torch_rows
from tests.fuzz.rows import Row

ROWS: tuple[Row, ...] = (
    *hub_rows.ROWS,
    *torch_rows.ROWS,
    *tensorflow_rows.ROWS,
)
