"""Settings from anywhere: whatever a file or a command line holds, it is a recipe, or one sentence that names the setting."""

import contextlib
import dataclasses
import math
import random
import re
import time
from pathlib import Path

import pytest
import torch
import yaml

from pspnet_fast.arguments import LARGEST_FILE, Evaluating, parse
from pspnet_fast.config import ConfigError, Recipe, plain, recipe_of, snapshot_network, trained_network
from pspnet_fast.data.augmentation import Augmentation
from pspnet_fast.models.checkpoint import CheckpointError
from pspnet_fast.placement import device_of
from pspnet_fast.schema import from_plain, shown
from pspnet_fast.train import Run

HUGE = 10**5000


def test_every_setting_survives():
    recipe = Recipe(
        data=Path("/a"),
        bins=(1, 2),
        augmentation=Augmentation(scale=(1, 1.5), aspect=(0.5, 2.0)),
        scales=(0.5, 1),
        ohem_threshold=0.7,
        classes=150,
        base_size=None,
    )
    assert recipe_of(plain(recipe)) == recipe
    assert recipe_of({}) == Recipe()
    assert isinstance(recipe_of({"base_lr": 1}).base_lr, float)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, "settings must be names and values, got None"),
        ([("width", 64)], "settings must be names and values, got ..'width', 64.."),
        ("/etc/passwd", "settings must be names and values, got '/etc/passwd'"),
        ({"config": {}}, "there is no setting 'config'"),
        ({"widht": 64}, "there is no setting 'widht', did you mean 'width'."),
        ({3: 64}, "there is no setting 3"),
        ({"width": "64"}, "width must be a whole number, got '64'"),
        ({"width": 64.0}, "width must be a whole number, got 64.0"),
        ({"width": True}, "width must be a whole number, got True"),
        ({"width": HUGE}, "width must be a whole number of at most 64 bits, got a number of 16610 bits"),
        ({"base_lr": "0.1"}, "base_lr must be a number, got '0.1'"),
        ({"base_lr": HUGE}, "base_lr must be a number of at most 64 bits, got a number of 16610 bits"),
        ({"flip": 1}, "flip must be true or false, got 1"),
        ({"data": ""}, "data must be a path, got ''"),
        ({"data": "a\0b"}, "data must be a path, got "),
        ({"data": Path("a\0b")}, "data must be a path, got "),
        ({"data": 3}, "data must be a path, got 3"),
        ({"layers": "50"}, "layers must be one of 18, 34, 50, 101, 152, 269, got '50'"),
        ({"stages": True}, "stages must be one of 2, 3, 4, got True"),
        ({"stem": ["deep"]}, "stem must be one of deep, v1c, plain, got .'deep'."),
        ({"bins": 3}, "bins must be a list, got 3"),
        ({"bins": "1236"}, "bins must be a list, got '1236'"),
        ({"bins": [1, None]}, "bins must be a whole number, got None"),
        ({"kernel_sizes": [3]}, "kernel_sizes must be a list of 2, got .3."),
        ({"augmentation": 3}, "augmentation must be names and values, got 3"),
        ({"augmentation": {"scale": "12"}}, "augmentation.scale must be a list of 2, got '12'"),
        ({"augmentation": {"miror": 1}}, "there is no setting 'augmentation.miror', did you mean 'mirror'"),
        ({"augmentation": {"mirror": 2}}, "augmentation: mirror must be a probability"),
        ({"iterations": "x" * 10**6}, "iterations must be a whole number, got 'x{20,40}...x{20,40}'$"),
    ],
)
def test_settings_of_another_type(settings, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        recipe_of(settings)


BOUNDS = [
    *((Recipe, name, 512, None) for name in ("width",)),
    *((Recipe, name, 2**13, None) for name in ("crop",)),
    (Recipe, "batch_size", 2**16, None),
    (Recipe, "base_size", 2**15, None),
    *((Recipe, name, 2**14, None) for name in ("reduction_channels", "bottleneck_channels", "aux_channels")),
    *((Recipe, name, 10**9, None) for name in ("iterations", "epochs", "warmup", "ohem_min_kept")),
    *((Recipe, name, 1e30, 0) for name in ("aux_weight", "base_lr", "head_lr_factor", "weight_decay")),
    *((Recipe, name, 1, 0) for name in ("momentum", "label_smoothing", "ohem_threshold")),
    (Recipe, "power", 100, 0),
    (Run, "clip_norm", 1e30, None),
    (Run, "workers", 512, 0),
    (Run, "seed", 2**63 - 1, 0),
    (Run, "accumulate", 2**16, None),
    *((Run, name, 10**9, None) for name in ("checkpoint_every", "validate_every", "validate_images", "log_every")),
    (Evaluating, "images", 10**9, None),
    (Evaluating, "windows", 2**10, None),
]


def made(kind, **settings):
    return kind(**settings, **({"weights": Path("w.pth")} if kind is Evaluating else {}))


@pytest.mark.parametrize(
    ("kind", "name", "most", "least"), BOUNDS, ids=lambda each: getattr(each, "__name__", str(each))
)
def test_numbers_have_bounds(kind, name, most, least):
    """The largest is taken, more is not, nor less than the least, and the message says the bound."""
    made(kind, **{name: most})
    for wrong in (most * 2, HUGE, math.inf):
        with pytest.raises(ConfigError, match=f"^{name} must be .*{re.escape(str(most))}.*, got "):
            made(kind, **{name: wrong})
    for wrong in (-1 if least is None else least - 1, math.nan, -math.inf):
        with pytest.raises(ConfigError, match=f"^{name} must be .*, got "):
            made(kind, **{name: wrong})


def test_every_number_is_in_the_table():
    """A new setting needs its bounds."""
    own = {"layers", "output_stride", "stages", "dropout", "classes"}  # choices, and what has tests of its own
    for kind in (Recipe, Run, Evaluating):
        numbers = {f.name for f in dataclasses.fields(kind) if "int" in str(f.type) or "float" in str(f.type)}
        lists = {f.name for f in dataclasses.fields(kind) if "tuple" in str(f.type)}
        assert numbers - lists - own == {name for of, name, *_ in BOUNDS if of is kind}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scales": (math.nan,)}, "scales must be from 0.01 to 100, and one at least, got .nan."),
        ({"scales": (1.0, math.inf)}, "scales must be from 0.01 to 100"),
        ({"scales": (1.0,) * 33}, "scales must be 32 at most, got 33"),
        ({"scales": ()}, "scales must be from .*, and one at least"),
        ({"bins": (2**32,)}, "bins must be from 1 to 256, and 1 to 16 of them, got .4294967296."),
        ({"bins": (1,) * 17}, "bins must be .* 1 to 16 of them"),
        ({"width": 3}, "width must be even, got 3"),
        ({"augmentation": Augmentation(scale=(0.5, 1e9))}, "augmentation: scale and aspect must be from 0.01 to 100"),
        ({"augmentation": Augmentation(aspect=(1e-9, 1))}, "augmentation: scale and aspect must be from 0.01 to 100"),
        ({"optimizer": "adamw", "momentum": 1}, "momentum must be below 1 with optimizer adamw"),
        ({"ohem_threshold": 0}, "ohem_threshold must be above 0"),
        ({"dropout": math.nan}, "dropout must be in"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        Recipe(**settings)


def test_values_are_shown_short():
    for value in (
        "x" * 10**6,
        ["x"] * 10**6,
        {1: {2: {3: {4: {5: {6: {7: 8}}}}}}},
        HUGE,
        [HUGE],
        "a\nb\x1b[2J",
        object(),
    ):
        assert len(shown(value)) < 400
        assert shown(value).isprintable()


def test_random_plain_values():
    """Whatever a recipe in a checkpoint holds: a recipe, or a ConfigError."""
    values = [
        None,
        True,
        0,
        -1,
        1,
        3,
        50,
        2**70,
        0.5,
        math.nan,
        math.inf,
        "",
        "deep",
        "a",
        [],
        [1],
        [1, 2],
        [None],
        {},
        {"a": 1},
        b"x",
    ]
    names = [*plain(Recipe()), "config", "x", 3]
    chance = random.Random(0)
    said = []
    for _ in range(2000):
        settings = {chance.choice(names): chance.choice(values) for _ in range(chance.randint(1, 3))}
        try:
            recipe_of(settings)
        except ConfigError as error:
            said.append(str(error))
    assert 200 < len(said) < 2000
    assert "\n" not in "".join(said)


def parsed(path, *more, kind=Run):
    return parse("prog", [str(path), *more], kind, "Words.")


FILES = [
    ("", "the file must hold names and values, such as 'crop: 473'"),
    ("null", "the file must hold names and values"),
    ("[1]", "the file must hold names and values"),
    ("root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1:daemon", "the file must hold names and values"),
    ("config: {}", "line 1: there is no option 'config'"),
    ("config: /etc/passwd", "line 1: there is no option 'config'"),
    ("layers: 18\nconfig: other.yaml", "line 2: there is no option 'config'"),
    ("augmentation: /etc/passwd", "augmentation must hold names and values"),
    ("augmentation: 3", "augmentation must hold names and values"),
    ("augmentation: null", "augmentation must hold names and values"),
    (
        "augmentation:\n  miror: 1",
        "line 2: there is no option 'augmentation.miror', did you mean 'augmentation.mirror'",
    ),
    ("print_config: x", "line 1: there is no option 'print_config'"),
    ("1: 2", "line 1: there is no option '1'"),
    ("? [1]\n: 2", "line 1: there is no option ''"),
    ("layers: 18\nlayers: 34", "line 2: layers is there twice"),
    ("bins: &b [1, 2]\nscales: *b", "line 1: settings are written out, without anchors, aliases and tags"),
    ("data: !!python/object/apply:os.system ['echo hi']", "line 1: settings are written out, without anchors"),
    ("data: !!binary aGVsbG8=", "line 1: settings are written out, without anchors, aliases and tags"),
    ("layers: [", "line 1: is not YAML|line 2: is not YAML"),
    ("a: b: c", "line 1: is not YAML: mapping values are not allowed here"),
    ("\x00", "is not YAML text"),
    ("layers: 18 # " + "x" * LARGEST_FILE, f"a file of settings must have at most {LARGEST_FILE} bytes"),
    ("bins: " + "[" * 5000, "line 1: settings are not lists in lists"),
    ("bins:\n" + "".join(f"{' ' * i}- \n" for i in range(1, 300)), "line 5: settings are not lists in lists"),
    ("width: " + "9" * 5000, "width|integer string conversion"),
]


@pytest.mark.parametrize(("text", "words"), FILES, ids=range(len(FILES)))
def test_files_that_hold_no_settings(tmp_path, text, words):
    pytest.importorskip("jsonargparse")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    for argv in ([str(path)], ["ade20k_pspnet50", "--config", str(path)], ["ade20k_pspnet50", f"--config={path}"]):
        with pytest.raises(ConfigError, match=words) as error:
            parse("prog", argv, Run, "Words.")
        assert len(str(error.value)) < 600
        assert "\n" not in str(error.value)


def test_what_is_in_a_file_is_not_repeated(tmp_path):
    """Files that are no settings may hold secrets."""
    pytest.importorskip("jsonargparse")
    path = tmp_path / "passwd"
    path.write_text("root:x:0:0:SECRET:/root:/bin/bash\ndaemon: [SECRET\n")
    outer = tmp_path / "outer.yaml"
    for text in (f"config: {path}", f"augmentation: {path}", f"data: {path}", f"train_list: {path}", f"resume: {path}"):
        outer.write_text(text)
        with contextlib.suppress(ConfigError):
            recipe, run = parsed(outer)
            assert "SECRET" not in f"{recipe}{run}"
            continue
        with pytest.raises(ConfigError) as refused:
            parsed(outer)
        assert "SECRET" not in str(refused.value)
    for argv in ([str(path)], ["--config", str(path)], ["ade20k_pspnet50", "--augmentation", str(path)]):
        with pytest.raises(ConfigError) as refused:
            parse("prog", argv, Run, "Words.")
        assert "SECRET" not in str(refused.value)
    (tmp_path / "binary").write_bytes(b"\xff\xfeSECRET\x00\x80")
    with pytest.raises(ConfigError, match="binary: is not YAML text .UnicodeDecodeError.$"):
        parsed(tmp_path / "binary")


def test_aliases_do_not_multiply(tmp_path):
    """A thousand million entries in a few hundred bytes, refused before they are made."""
    pytest.importorskip("jsonargparse")
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    start = time.monotonic()
    with pytest.raises(ConfigError, match="line 1: settings are written out, without anchors, aliases and tags"):
        parsed(path)
    assert time.monotonic() - start < 10


def test_random_yaml(tmp_path):
    pytest.importorskip("jsonargparse")
    names = [*plain(Recipe()), *plain(Run()), "config", "x", "augmentation.mirror"]
    values = [
        "1",
        "-1",
        "64",
        ".nan",
        "1e400",
        "'64'",
        "yes",
        "null",
        "[]",
        "[1, 2]",
        "{}",
        "{a: 1}",
        "2020-01-01",
        "1:30",
        "~",
        "''",
    ]
    chance = random.Random(0)
    path = tmp_path / "mine.yaml"
    said = []
    for _ in range(60):
        path.write_text(
            "".join(f"{chance.choice(names)}: {chance.choice(values)}\n" for _ in range(chance.randint(1, 2)))
        )
        try:
            parsed(path)
        except ConfigError as error:
            said.append(str(error))
    assert 0 < len(said) < 60
    assert "\n" not in "".join(said)


def test_a_group_of_settings_is_given_by_its_parts():
    pytest.importorskip("jsonargparse")
    with pytest.raises(ConfigError, match="^augmentation is given by its parts, such as --augmentation.scale$"):
        parsed("ade20k_pspnet50", "--augmentation", "3")
    assert parsed("ade20k_pspnet50", "--augmentation", "{mirror: 0.1}")[0].augmentation.mirror == 0.1


def test_recipes_of_checkpoints_that_cannot_be(tmp_path):
    """They are named with the file, in one sentence, before a network is made."""
    for recipe, words in (
        ({"dataset": "scenes", "width": 2_000_000}, "its recipe cannot be: width must be at most 512, got 2000000"),
        ({"dataset": "scenes", "layers": "x"}, "its recipe cannot be: layers must be one of"),
        ({"dataset": "list", "classes": 70_000}, "its recipe cannot be: classes must be at most 65536"),
        ({"dataset": "scenes", "bin1_norm": False, "pooling": "max"}, "its recipe cannot be: bin1_norm false needs"),
        ("text", "its recipe cannot be: settings must be names and values, got 'text'"),
    ):
        torch.save({"model": {}, "recipe": recipe}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=f"a.pth: {words}"):
            trained_network(tmp_path / "a.pth", Recipe(dataset="scenes"))
        with pytest.raises(CheckpointError, match=f"^the snapshot: {words}"):
            snapshot_network({"model": {}, "recipe": recipe})


def test_a_network_that_the_file_does_not_hold_is_not_made():
    """A small file that describes a network of gigabytes: shapes are compared first, and nothing is allocated."""
    recipe = {"dataset": "scenes", "layers": 269, "width": 512}
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="does not fit, nothing was loaded"):
        snapshot_network({"model": {"a": torch.zeros(1)}, "recipe": recipe})
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("name", ["meta", "gpu", "cpu:x", "", "x" * 1000])
def test_devices_that_are_none(name):
    if name:
        with pytest.raises(ConfigError, match="^device must be cpu, cuda or cuda:1, got '.{1,70}'$"):
            device_of(name)
    else:
        assert device_of(name).type in ("cpu", "cuda")


def test_what_is_no_dataclass_of_ours():
    """The schema asks nothing of recipes."""

    @dataclasses.dataclass(frozen=True)
    class Own:
        count: int
        names: tuple[str, ...] = ()

    assert from_plain(Own, {"count": 3, "names": ["a"]}) == Own(3, ("a",))
    with pytest.raises(ValueError, match="names must be text, got 1"):
        from_plain(Own, {"count": 3, "names": [1]})
    assert yaml.safe_load(yaml.safe_dump(plain(Own(1)))) == {"count": 1, "names": []}
