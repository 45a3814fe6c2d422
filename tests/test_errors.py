"""Messages and names are one line that every terminal and file takes."""

import pytest

from maxmap.errors import UserError, printable, sentence


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("photo 1.jpg", "photo 1.jpg"),
        ("Zürich/東京\u3000駅.png", "Zürich/東京\u3000駅.png"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        (b"caf\xe9.png".decode("utf-8", "surrogateescape"), r"caf\xe9.png"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\u2028b\ud800", r"a\u2028b\ud800"),
    ],
)
def test_names_are_one_line(name, printed):
    assert printable(name) == printed
    assert printed.encode("utf-8") and printed.splitlines() == [printed]
    assert printable(printed) == printed


def test_a_message_is_one_line():
    assert sentence(UserError("no file caf\udce9\n  here.")) == r"no file caf\xe9 here."
