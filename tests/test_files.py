import pytest

from pspnet_fast.files import replacing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fails_half_way():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fails_half_way()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "before"
    with replacing(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after"


def test_what_cannot_be_written_is_named(tmp_path):
    class WrongError(ValueError):
        pass

    def write(**options):
        with replacing(tmp_path / "absent" / "a.txt", **options) as temporary:
            temporary.write_text("after")

    with pytest.raises(OSError, match=r"absent/a\.txt: cannot be written: No such file or directory"):
        write()
    with pytest.raises(WrongError, match="absent.a.txt: cannot be written"):
        write(error=WrongError)


def test_the_ending_stays(tmp_path):
    """Writers that go by it see the right one."""
    with replacing(tmp_path / "a.onnx") as temporary:
        temporary.write_text("")
        assert temporary.suffix == ".onnx"
