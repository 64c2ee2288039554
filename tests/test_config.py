import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import yaml

from pspnet_fast import config
from pspnet_fast.arguments import Evaluating, find_recipe, parse, recipes
from pspnet_fast.config import ConfigError, Recipe, dataset_of, plain, protocol_of, recipe_of, trained_network
from pspnet_fast.data.augmentation import Augmentation
from pspnet_fast.models.checkpoint import CheckpointError
from pspnet_fast.models.resnet import LAYERS
from pspnet_fast.nn.plain_ppm import PlainPPM
from pspnet_fast.placement import placed

pytest.importorskip("jsonargparse")

DEEP = {"ade20k": 150_000, "voc2012": 30_000, "cityscapes": 90_000}


@dataclass(frozen=True)
class Own:
    """A command's own settings.

    Args:
        output: where to.
        quick: or not.
        limits: some.
    """

    output: Path = Path("out")
    quick: bool = False
    limits: tuple[float, ...] | None = None


def parsed(*argv):
    return parse("prog", argv, Own, "Words.")


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("layers", [50, 101])
def test_the_papers_recipes(name, layers):
    """Zhao et al., CVPR 2017, section 5.1."""
    recipe, _ = parsed(f"{name}_pspnet{layers}")
    assert (recipe.dataset, recipe.layers, recipe.iterations, recipe.epochs) == (name, layers, DEEP[name], None)
    assert (recipe.crop, recipe.base_size) == ((713, 2048) if name == "cityscapes" else (473, 512))
    assert (recipe.batch_size, recipe.base_lr, recipe.head_lr_factor, recipe.power) == (16, 0.01, 10, 0.9)
    assert (recipe.momentum, recipe.weight_decay, recipe.aux_weight) == (0.9, 1e-4, 0.4)
    assert recipe.bins == (1, 2, 3, 6)
    assert recipe.augmentation == Augmentation()


def test_every_recipe_is_found_and_makes_a_network():
    assert {f"{name}_pspnet{layers}" for name in DEEP for layers in (50, 101)} <= set(recipes())
    for name in recipes():
        recipe, _ = parsed(name)
        with torch.device("meta"):
            net = recipe.network()
        assert net.cls[4].out_channels == len(recipe.class_table().names)
        assert yaml.safe_load(find_recipe(name).read_text()).keys() <= plain(recipe).keys()


@pytest.mark.parametrize("layers", sorted(LAYERS))
def test_depths_from_the_command_line(layers):
    assert parsed("ade20k_pspnet50", "--layers", str(layers))[0].layers == layers


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bins", "1"], {"bins": (1,)}),
        (["--bins", "1", "2", "3", "6"], {"bins": (1, 2, 3, 6)}),
        (["--bins=[1,2]"], {"bins": (1, 2)}),
        (["--pooling", "max", "--no-reduction"], {"pooling": "max", "reduction": False}),
        (["--aux-weight", "0.9"], {"aux_weight": 0.9}),
        (["--epochs", "100"], {"epochs": 100, "iterations": None}),
        (["--iterations=7"], {"epochs": None, "iterations": 7}),
        (["--scales", "0.5", "1", "--flip"], {"scales": (0.5, 1.0), "flip": True}),
        (["--base-size", "null", "--crop", "65"], {"base_size": None, "crop": 65}),
        (["--augmentation.rotate", "-5", "5", "--augmentation.photometric"], {}),
        (["--flip=false"], {"flip": False}),
        (["--backbone", "torchvision"], {"backbone": Path("torchvision")}),
    ],
)
def test_command_line(argv, expected):
    recipe, own = parsed("ade20k_pspnet50", *argv)
    assert dataclasses.asdict(recipe).items() >= expected.items()
    assert own == Own()
    if "--augmentation.rotate" in argv:
        assert recipe.augmentation == Augmentation(rotate=(-5.0, 5.0), photometric=True)


def test_own_settings_and_files(tmp_path):
    """YAML may hold both; what is on the command line wins."""
    path = tmp_path / "mine.yaml"
    path.write_text("layers: 18\nquick: true\nlimits: [1, 2.5]\naugmentation:\n  mirror: 0.25\n")
    recipe, own = parsed(str(path), "--output", "there", "--layers", "34")
    assert (recipe.layers, recipe.augmentation.mirror) == (34, 0.25)
    assert own == Own(Path("there"), True, (1.0, 2.5))
    assert parsed("--config", str(path))[0].layers == 18


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["ade20k_pspnet50", "--no-flip=true"], "--no-flip takes no value, got 'true'"),
        (["ade20k_pspnet50", "--no-flip", "false"], "--no-flip takes no value, got 'false'"),
        ([], "^CONFIG is missing: one of ade20k_pspnet101, "),
        (["ade20k_pspnet5"], "^no recipe 'ade20k_pspnet5', did you mean 'ade20k_pspnet50'"),
        (["ade20k_pspnet50", "--layer", "50"], "^there is no option 'layer', did you mean 'layers'\\?$"),
        (["ade20k_pspnet50", "--outputs=x"], "^there is no option 'outputs', did you mean 'output'"),
        (
            ["ade20k_pspnet50", "--augmentation.miror", "1"],
            "no option 'augmentation.miror', did you mean 'augmentation.mirror'",
        ),
        (["ade20k_pspnet50", "--layers", "51"], "layers.*51"),
        (["ade20k_pspnet50", "--batch-size", "many"], "batch_size.*many"),
        (["ade20k_pspnet50", "stray"], "stray"),
        (["ade20k_pspnet50", "--crop", "4"], "^crop must be at least output_stride = 8, got 4$"),
        (["ade20k_pspnet50", "--warmup", "-1"], "^warmup must be at least 0, got -1$"),
        (["ade20k_pspnet50", "--classes", "0"], "^classes must be at least 1, got 0$"),
        (["ade20k_pspnet50", "--bins", "0"], "^bins must be from 1 to 256"),
        (["ade20k_pspnet50", "--scales", "0"], "^scales must be from 0.01 to 100"),
        (["ade20k_pspnet50", "--dropout", "1"], "^dropout must be in"),
        (["ade20k_pspnet50", "--base-lr", "nan"], "base_lr.*nan"),
        (["ade20k_pspnet50", "--dataset", "list"], "^dataset 'list' needs classes"),
        (["ade20k_pspnet50", "--augmentation.mirror", "2"], "mirror must be a probability"),
    ],
)
def test_what_is_refused(argv, words):
    with pytest.raises(ConfigError, match=words):
        parsed(*argv)


@pytest.mark.parametrize("name", sorted(plain(Recipe()) | {"output": "", "quick": True}))
def test_nothing_for_a_setting(tmp_path, name):
    """As YAML says it by leaving a value out: for what may be null, or refused by name."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"crop: 65\n{name}:\n" if name != "crop" else "crop:\nflip: true\n")
    hints = get_type_hints(Recipe) | get_type_hints(Own)
    if type(None) in get_args(hints[name]):
        assert getattr(parsed(str(path))[0], name) is None
    else:
        with pytest.raises(ConfigError, match=f"{name} must "):
            parsed(str(path))


def test_unknown_keys_of_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    for text, words in (("layer: 18", "'layer', did you mean 'layers'"), ("augmentation: {miror: 1}", "miror")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            parsed(str(path))


def test_print_config(capsys):
    """What is printed is a recipe, and makes the same settings."""
    with pytest.raises(SystemExit) as ended:
        parsed("voc2012_pspnet101", "--bins", "1", "--print_config")
    assert not ended.value.code
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["bins"] == [1]
    assert (
        recipe_of({k: v for k, v in yaml.safe_load(text).items() if k in plain(Recipe())})
        == (parsed("voc2012_pspnet101", "--bins", "1")[0])
    )


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    for name in (*plain(Recipe()), "quick", "augmentation.cat_max_ratio"):
        assert f"--{name}" in text
    assert "weight of the auxiliary loss" in text or "of the auxiliary loss" in text


def test_recipes_survive_plain_values():
    recipe = Recipe(data=Path("/a"), bins=(1, 2), augmentation=Augmentation(scale=(1.0, 1.5)), scales=(0.5, 1.0))
    assert recipe_of(plain(recipe)) == recipe
    assert yaml.safe_load(yaml.safe_dump(plain(recipe))) == plain(recipe)


def test_list_files_have_numbers_for_names(tmp_path):
    recipe = Recipe(dataset="list", classes=7)
    table = recipe.class_table()
    assert table.names == tuple("0123456")
    assert len(set(table.colours)) == 7
    many = Recipe(dataset="list", classes=2**16, data=tmp_path).class_table()
    assert len(set(many.colours)) == len(set(many.names)) == 2**16
    assert many.colours[:7] == table.colours
    with pytest.raises(ConfigError, match="classes must be at most 65536, got 65537"):
        Recipe(dataset="list", classes=2**16 + 1).class_table()
    with pytest.raises(
        ConfigError, match="classes of labelled data must be at most 255, label 255 is ignored, got 256"
    ):
        dataset_of(Recipe(dataset="list", classes=256, data=tmp_path), "val")
    with pytest.raises(ConfigError, match="ade20k has 150 classes: leave classes out, got 151"):
        Recipe(classes=151).class_table()


@pytest.mark.parametrize(
    ("name", "crop", "kind"), [("semseg", 473, "semseg"), ("caffe", 473, "caffe"), ("whole", None, "semseg")]
)
def test_protocols(name, crop, kind):
    protocol = protocol_of(Recipe(protocol=name, scales=(0.5, 1.0), flip=True, base_size=100))
    assert (protocol.crop, protocol.kind, protocol.base_size, protocol.scales, protocol.flip) == (
        crop,
        kind,
        100,
        (0.5, 1),
        True,
    )


def test_ablations_make_their_networks():
    tiny = {"dataset": "scenes", "layers": 18, "width": 4}
    assert isinstance(Recipe(**tiny, pooling="max").network().ppm, PlainPPM)
    assert not Recipe(**tiny, reduction=False).network().ppm.state_dict()
    assert Recipe(**tiny, bins=(1,)).network().ppm.bins == (1,)
    assert Recipe(**tiny, aux_weight=0).network().aux is None
    net = Recipe(**tiny, ohem_threshold=0.7, ohem_min_kept=5, label_smoothing=0.1, align_corners=False).network()
    loss = net.criterion
    assert (loss.ohem_threshold, loss.ohem_min_kept, loss.label_smoothing, loss.align_corners) == (0.7, 5, 0.1, False)
    assert net.ppm.align_corners is False


def test_placing_keeps_values():
    net = Recipe(dataset="scenes", layers=18, width=4).network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net = placed(net, torch.device("cpu"), channels_last=True)
    assert net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def snapshot_of(recipe, path):
    net = recipe.network()
    torch.save({"model": net.state_dict(), "recipe": plain(recipe)}, path)
    return net


def test_a_snapshot_knows_its_network(tmp_path, caplog):
    """The settings of the network come from it, those of the evaluation from the recipe."""
    saved = Recipe(dataset="scenes", layers=18, width=4, bins=(1, 2), aux_weight=0.4)
    net = snapshot_of(saved, tmp_path / "best.pth")
    wanted = Recipe(dataset="scenes", layers=50, scales=(0.5,))
    loaded, recipe = trained_network(tmp_path / "best.pth", wanted)
    assert (recipe.layers, recipe.width, recipe.bins, recipe.scales) == (18, 4, (1, 2), (0.5,))
    assert not loaded.training
    assert loaded.aux is None
    assert torch.equal(loaded.cls[4].weight, net.cls[4].weight)
    assert "the network is the snapshot's: layers 18 instead of 50, width 4 instead of 64, bins [1, 2]" in caplog.text
    with pytest.raises(CheckpointError, match=r"has 11 classes \(scenes\), and ade20k 150"):
        trained_network(tmp_path / "best.pth", Recipe())


def test_a_checkpoint_that_knows_nothing_must_fit(tmp_path):
    recipe = Recipe(dataset="scenes", layers=18, width=4)
    torch.save(recipe.network().state_dict(), tmp_path / "bare.pth")
    trained_network(tmp_path / "bare.pth", recipe)
    with pytest.raises(CheckpointError, match="mismatched"):
        trained_network(tmp_path / "bare.pth", dataclasses.replace(recipe, width=6))
    with pytest.raises(FileNotFoundError):
        trained_network(tmp_path / "none.pth", recipe)


def test_evaluation_needs_weights():
    with pytest.raises(ConfigError, match="weights"):
        parse("prog", ["ade20k_pspnet50"], Evaluating, "Words.")
    _, settings = parse("prog", ["ade20k_pspnet50", "--weights", "w.pth", "--json", "x.json"], Evaluating, "Words.")
    assert (settings.weights, settings.json) == (Path("w.pth"), Path("x.json"))
    with pytest.raises(ConfigError, match="windows must be at least 1, got 0"):
        parse("prog", ["ade20k_pspnet50", "--weights", "w.pth", "--windows", "0"], Evaluating, "Words.")


def test_data_is_found_by_the_recipe(tmp_path):
    with pytest.raises(ConfigError, match="^data is missing: --data FOLDER$"):
        dataset_of(Recipe(), "train")
    with pytest.raises(ValueError, match=f"ade20k: expected a folder at {tmp_path}/none"):
        dataset_of(Recipe(data=tmp_path / "none"), "train")


def test_names_of_the_network_are_settings():
    assert set(config.NETWORK) <= {field.name for field in dataclasses.fields(Recipe)}
