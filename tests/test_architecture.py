"""The law of the house (CONTRIBUTING.md): who may import whom, and where the files of an op stand."""

import ast
import re
from pathlib import Path

import pytest
import torch

from pspnet_fast import backends, functional

ROOT = Path(__file__).parents[1]

LEAVES = {"checks", "geometry", "extras", "files", "schema", "terminal", "tracing"}  # know nothing of the rest
STACK = {"models", "nn", "functional", *LEAVES}

# What each layer may import of the project. Layers are the first components below `pspnet_fast`, "" the package itself.
MAY_IMPORT = {
    "geometry": set(),
    "checks": set(),
    "extras": set(),
    "files": set(),
    "terminal": set(),
    "schema": set(),
    "tracing": set(),
    "reference": {"geometry"},
    "kernels": {"kernels"},
    "preference": {"geometry"},
    "backends": {"extras", "preference", "reference"},  # the others lazily, by name
    "ops": {"ops", "backends", *LEAVES},
    "functional": {"ops"},
    "nn": {"nn", "functional", *LEAVES},
    "models": {"models", "nn", "functional", *LEAVES},
    "integrations": {"integrations", "nn", "functional", *LEAVES},
    "checkpoints": {"checkpoints", "config", "data", "models", "nn"},
    "convert": {"checkpoints", "data", "models", *LEAVES},
    "export": {"checkpoints", "data", "models", "nn", *LEAVES},
    "data": {"data", "extras"},
    "metrics": LEAVES,
    "charts": {"extras"},
    "protocol": {"data", *STACK},
    "predict": {"data", "protocol", *STACK},
    "evaluate": {"data", "distributed", "protocol", "predict", "metrics", "charts", *LEAVES},
    "config": {"data", "predict", "protocol", "models", "nn", "schema"},
    "placement": {"config", "models", "nn", "schema"},
    "arguments": {"config", "extras", "placement", "protocol", "schema"},
    "distributed": set(),
    "snapshot": {"config", "models", "schema"},
    "run_folder": {"files", "snapshot", "terminal"},
    "schedule": {"config", "models"},
    "determinism": set(),
    "signals": set(),
    "train": {
        "charts",
        "config",
        "data",
        "determinism",
        "distributed",
        "evaluate",
        "extras",
        "models",
        "nn",
        "placement",
        "predict",
        "run_folder",
        "schedule",
        "schema",
        "signals",
        "snapshot",
    },
    "demo": {"demo", "arguments", "backends", "charts", "config", "data", "evaluate", "predict", "train", *STACK},
    "cli": {
        "",
        "convert",
        "export",
        "protocol",
        "predict",
        "arguments",
        "config",
        "placement",
        "train",
        "evaluate",
        "distributed",
        "backends",
        "data",
        *STACK,
    },
    "testing": {"backends", "geometry"},
    "": {"functional", "backends", "checkpoints", "integrations", "models", "nn"},
}

SOURCES = sorted([*(ROOT / "pspnet_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def module_of(path):
    """`pspnet_fast/nn/ppm.py` is ("nn", "ppm"), `kernels/geometry.py` is ("kernels", "geometry")."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "pspnet_fast" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path):
    """The layers a file imports from, lazily imported ones included."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                module = ("pspnet_fast", *package[: len(package) - node.level + 1], *module)
            targets = [(*module, alias.name) for alias in node.names] if module == ("pspnet_fast",) else [module]
        else:
            continue
        for head, *rest in targets:
            if head == "pspnet_fast":
                yield rest[0] if rest and rest[0] in MAY_IMPORT else ""


def test_imports_are_seen():
    """The reader of imports above reads relative, absolute and lazy ones."""
    assert set(imports_of(ROOT / "pspnet_fast" / "nn" / "ppm.py")) >= {"functional", "checks", "geometry"}
    assert set(imports_of(ROOT / "pspnet_fast" / "__init__.py")) >= {"functional", "nn", "backends"}
    assert "kernels" in set(imports_of(ROOT / "kernels" / "pyramid_pool.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_law(path):
    layer = (*module_of(path), "")[0]
    assert layer in MAY_IMPORT, f"{layer} has no row in MAY_IMPORT"
    assert set(imports_of(path)) <= MAY_IMPORT[layer]


def test_csrc_keeps_torch_out_of_kernels_and_geometry():
    """Only dispatching files know torch: the kernels, compiled for each instruction set, do not."""
    for path in (ROOT / "csrc").rglob("*.*"):
        knows_torch = re.search(r"#include <(torch|ATen|c10)/", path.read_text()) is not None
        if path.name in ("geometry.h", "vec.h", "kernel.h") or "_kernels" in path.name or "_avx" in path.name:
            assert not knows_torch, path


@pytest.mark.parametrize("op", backends.ops())
def test_an_op_has_its_files(op):
    """One op, one name, one file in every folder."""
    for folder in ("pspnet_fast/ops", "pspnet_fast/reference", "kernels"):
        assert (ROOT / folder / f"{op}.py").is_file()
    assert (ROOT / "csrc" / "cpu" / f"{op}.cpp").is_file()
    assert (ROOT / "csrc" / "cuda" / f"{op}.cu").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()
    assert op in functional.__all__
    assert op in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
@pytest.mark.parametrize("op", backends.ops())
def test_a_backend_has_every_direction(op, backend):
    for direction in backends.directions(op):
        found = backends.find(op, direction, backend)
        if isinstance(found, backends.NotBuilt):
            pytest.skip(found)
        assert callable(found)


# A schema may gain arguments with defaults; what stands here goes on working.
SCHEMAS = """
pyramid_pool(Tensor x, int[] bins) -> Tensor
pyramid_pool_concat(Tensor x, int[] bins, SymInt channels, SymInt first_channel) -> (Tensor, Tensor)
pyramid_pool_backward(Tensor grad, Tensor? grad_input, SymInt[] size, int[] bins, bool channels_last) -> Tensor
pyramid_project(Tensor pyramid, Tensor[] weight, int[] bins, Tensor? scale, Tensor? shift, bool relu) -> Tensor
pyramid_project_backward(Tensor grad, Tensor pyramid, Tensor[] weight, int[] bins) -> (Tensor, Tensor)
pyramid_conv2d(Tensor taps, SymInt[] size, int[] bins, int kernel_size, int padding, bool align_corners, \
ScalarType dtype, bool channels_last) -> Tensor
pyramid_conv2d_update(Tensor(a!) out, Tensor taps, Tensor? scale, Tensor? shift, bool add, bool relu, SymInt[] size, \
int[] bins, int kernel_size, int padding, bool align_corners) -> ()
pyramid_conv2d_taps(Tensor pyramid, Tensor weight, int[] bins) -> Tensor
pyramid_conv2d_taps_backward(Tensor dz, Tensor pyramid, Tensor weight, int[] bins) -> (Tensor, Tensor)
pyramid_conv2d_backward(Tensor grad, SymInt[] size, int[] bins, int kernel_size, int padding, bool align_corners) -> Tensor
pyramid_norm_statistics(Tensor y, int[] bins) -> (Tensor, Tensor)
pyramid_norm(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, int[] bins, bool relu) -> Tensor
pyramid_norm_sums(Tensor grad, Tensor y, Tensor out, Tensor mean, Tensor invstd, int[] bins, bool relu) -> (Tensor, Tensor)
pyramid_norm_backward(Tensor grad, Tensor y, Tensor out, Tensor mean, Tensor invstd, Tensor weight, Tensor? mean_grad, \
Tensor? mean_grad_normal, int[] bins, bool relu) -> Tensor
pyramid_norm_training(Tensor y, Tensor[] weight, Tensor[] bias, Tensor(a!)[] running_mean, Tensor(b!)[] running_var, \
int[] bins, float[] momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)
pyramid_norm_training_backward(Tensor grad, Tensor y, Tensor out, Tensor mean, Tensor invstd, Tensor[] weight, \
int[] bins, bool relu) -> (Tensor, Tensor, Tensor)
upsample_argmax(Tensor logits, SymInt[] size, bool align_corners, ScalarType dtype) -> Tensor
upsample_argmax_confidence(Tensor logits, SymInt[] size, bool align_corners, ScalarType dtype) -> (Tensor, Tensor)
upsample_concat(Tensor x, Tensor pyramid, int[] bins, int[] order, bool align_corners) -> Tensor
upsample_concat_fill(Tensor(a!) out, Tensor pyramid, int[] bins, int[] order, bool align_corners) -> ()
upsample_concat_backward(Tensor grad, SymInt channels, int[] bins, int[] order, bool align_corners) -> Tensor
upsample_cross_entropy_losses(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, \
bool align_corners, bool check_targets) -> Tensor
upsample_cross_entropy_sums(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, int ignore_index, \
float label_smoothing, bool align_corners, bool check_targets, bool gradient) -> (Tensor, Tensor)
upsample_softmax_add(Tensor(a!) total, Tensor logits, int[] corners, SymInt[] size, bool align_corners, bool flip, \
float weight) -> ()
""".strip().splitlines()


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas_stay_backward_compatible(schema):
    name = schema.partition("(")[0]
    now = getattr(torch.ops.pspnet_fast, name).default._schema
    assert now.is_backward_compatible_with(torch._C.parse_schema(f"pspnet_fast::{schema}"))


def test_every_op_is_in_the_list_of_schemas():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pspnet_fast::")}
    assert registered == {f"pspnet_fast::{schema.partition('(')[0]}" for schema in SCHEMAS}
