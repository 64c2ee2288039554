import io

import pytest

from pspnet_fast.terminal import printable, say


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("plain.png, 1 of 2\n\tçé中 and 🙂", "utf-8", "plain.png, 1 of 2\n\tçé中 and 🙂"),
        ("a\x1b[2Jb\x07\x9bm\r\x7f", "utf-8", r"a\x1b[2Jb\x07\x9bm\r\x7f"),
        ("gnp.\u202egpj", "utf-8", r"gnp.\u202egpj"),  # what turns the direction of writing
        ("caf\udce9.png", "utf-8", r"caf\udce9.png"),  # a name that is no UTF-8
        ("中é", "ascii", r"\u4e2d\xe9"),
        ("中é", "latin-1", r"\u4e2dé"),
        ("a\xa0b", "utf-8", "a\xa0b"),
    ],
)
def test_printable(text, encoding, shown):
    assert printable(text, encoding) == shown
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    say(text, stream)
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == shown + "\n"


def test_say_prints_on_standard_output_and_takes_exceptions(capsys):
    say(ValueError("\x1b[31mred"))
    assert capsys.readouterr().out == "\\x1b[31mred\n"
    stream = io.StringIO()  # has no encoding
    say("中\x1b", stream)
    assert stream.getvalue() == "中\\x1b\n"
