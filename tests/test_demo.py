from PIL import Image

from pspnet_fast import demo


def test_demo_compares_and_writes_its_pictures(tmp_path, capsys):
    assert demo.main(["--layers", "18", "--repeats", "1", "--crop", "65", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    difference = float(said.split("largest difference of the logits")[1].split(",")[0])
    assert difference < 1e-3
    assert float(said.split("same label")[1].split("%")[0]) > 99
    assert "head (pyramid, bottleneck, classifier)" in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "street.png",
        *(f"street_{kind}.png" for kind in ("labels", "colour", "overlay")),
    }
    with Image.open(tmp_path / "street_labels.png") as labels:
        assert labels.size == (640, 480)


def test_what_the_demo_cannot_read_is_named(tmp_path, capsys):
    assert demo.main(["--image", str(tmp_path / "absent.jpg"), "--output", str(tmp_path)]) == 2
    assert "absent.jpg: no such file" in capsys.readouterr().err
