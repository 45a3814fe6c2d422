"""All rows of the table."""

from tests.fuzz import archive_rows, hub_rows, picture_rows, tensorflow_rows, torch_rows
from tests.fuzz.rows import Row

ROWS: tuple[Row, ...] = (
    *hub_rows.ROWS,
    *torch_rows.ROWS,
    *tensorflow_rows.ROWS,
    *archive_rows.ROWS,
    *picture_rows.ROWS,
)
