import pytest

from pspnet_fast.data.classes import CLASSES


@pytest.mark.parametrize(("dataset", "count"), [("ade20k", 150), ("voc2012", 21), ("cityscapes", 19)])
def test_tables(dataset, count):
    classes = CLASSES[dataset]
    assert len(classes.names) == len(classes.colours) == len(set(classes.names)) == count
    assert all(0 <= channel <= 255 for colour in classes.colours for channel in colour)


def test_known_rows():
    assert CLASSES["ade20k"].names[:3] == ("wall", "building", "sky")
    assert CLASSES["ade20k"].names[149] == "flag"
    assert CLASSES["voc2012"].names[15] == "person"
    assert CLASSES["voc2012"].colours[15] == (192, 128, 128)
    assert CLASSES["cityscapes"].names[18] == "bicycle"
    assert CLASSES["cityscapes"].colours[0] == (128, 64, 128)
