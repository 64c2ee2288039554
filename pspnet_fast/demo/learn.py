"""A small PSPNet learns to label scenes that the project draws, and is tried on scenes it has never seen."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import torch
from PIL import Image

from ..arguments import find_recipe, parse
from ..charts import grid
from ..config import Recipe, dataset_of, protocol_of, trained_network
from ..data.datasets import Dataset, read_sample
from ..data.picture import draw_street
from ..data.scenes import write_scenes
from ..evaluate import evaluate, table
from ..predict import colour, predict_file, predict_labels, save
from ..terminal import say
from ..train import Run, train

RECIPE = "scenes_pspnet18"
SHOWN = 6


def learn(output: Path, scenes: int, iterations: int | None) -> None:
    """Draw, train, evaluate and predict; print what comes of it.

    Args:
        output: a folder, which gets the scenes, `run` (snapshots, learning curve; `run_2` where an earlier demonstration's is
            there), `evaluation`, `unseen.png` and the street's overlay.
        scenes: how many are drawn to train on; a fifth as many are unseen.
        iterations: of the training, instead of the recipe's.
    """
    folder = output / f"scenes_{scenes}"
    if not folder.exists():
        write_scenes(folder, scenes)
    places = ["--data", str(folder), "--output", str(_new_folder(output / "run")), "--workers", "1"]
    recipe, run = parse("demo", [RECIPE, *places, "--validate-every", "250", "--validate-images", "30"], Run, "")
    recipe = dataclasses.replace(recipe, iterations=iterations or recipe.iterations)
    unseen = dataset_of(recipe, "val")
    print(
        f"{scenes} drawn scenes to learn from, {len(unseen.samples)} to be tested on, {len(unseen.classes.names)} classes"
    )
    print(
        f"recipe: {find_recipe(RECIPE).name}, {recipe.iterations} iterations of {recipe.batch_size} crops of {recipe.crop}"
    )

    torch.manual_seed(run.seed)
    untrained = evaluate(recipe.network(aux=False).eval(), unseen, protocol_of(recipe), device="cpu")
    start = time.perf_counter()
    train(recipe, run)
    seconds = time.perf_counter() - start
    best = run.output / "best.pth"
    net, recipe = trained_network(best, recipe)
    trained = evaluate(net, unseen, protocol_of(recipe), device="cpu", output=output / "evaluation")
    print(f"\n{table(trained)}")
    print(
        f"\nmIoU on unseen scenes: {untrained.scores.miou:.3f} untrained, {trained.scores.miou:.3f} after {seconds:.0f} s"
    )

    _unseen_sheet(net, unseen, recipe, output / "unseen.png")
    street = output / "street.png"
    draw_street().save(street)
    predict_file(net, street, output, unseen.classes, protocol_of(recipe)._replace(base_size=256))
    for what, path in (
        ("scene, labels, prediction", output / "unseen.png"),
        ("a street of another hand", output / "street_overlay.png"),
        ("learning curve", run.output / "learning_curve.png"),
        ("worst scenes, confusion matrix", output / "evaluation"),
        ("checkpoint", best),
    ):
        say(f"{what:32}{path}")


def _new_folder(folder: Path) -> Path:
    """The folder, or the first of folder_2, folder_3, ... that is not there: a training takes no other's."""
    others = (folder.with_name(f"{folder.name}_{i}") for i in itertools.count(2))
    return next(each for each in itertools.chain([folder], others) if not each.exists())


def _unseen_sheet(net: torch.nn.Module, unseen: Dataset, recipe: Recipe, path: Path) -> None:
    """The first unseen scenes, a row each: the scene, its labels, what the network says."""
    rows = []
    for sample in unseen.samples[:SHOWN]:
        image, truth = read_sample(sample, unseen)
        labels = predict_labels(net, torch.from_numpy(image).permute(2, 0, 1), protocol_of(recipe))
        maps = (torch.from_numpy(truth), labels)
        rows.append([Image.fromarray(image), *(colour(each, unseen.classes) for each in maps)])
    save(grid(rows), path)
