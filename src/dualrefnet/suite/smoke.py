"""The smoke test of a suite: the same methods and variants in minutes on a CPU, to show that everything works."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

from dualrefnet.models.backbones import backbone_spec
from dualrefnet.recipe import load_recipe
from dualrefnet.suite.grid import Block, SplitCount, Suite, Variant

# What a smoke test trains on: seconds a run on a CPU.
SMOKE = {"image.size": 32, "model.weights": "none", "training.epochs": 1, "evaluation.bootstrap": 50}
SMOKE_BACKBONE = "mobilenet_v2"
# These stand for the data, and for the cost of a run, which a smoke test sets itself.
_NOT_IN_SMOKE = re.compile(
    r"data\.(?!rows$)|image\.size$|training\.epochs$|evaluation\.bootstrap$|model\.(weights|target_weights|members|method|backbone)$|seed$"
)
# Targets of the auxiliary task that a network with downloaded weights makes.
_NETWORK_TARGETS = ("carn_m", "ninasr_b0", "ninasr_b1", "edsr")


def smoke(suite: Suite, root: Path) -> tuple[Suite, list[str]]:
    """Return the suite as a test of the machinery that takes minutes on a CPU, and remarks on what it leaves out.

    Methods and variants stay; data set, recipe, CNNs, size and length become the cheapest; folds and seeds the first.

    Args:
        suite: any suite.
        root: where the drawn sample is, or will be drawn.
    """

    def cheap(backbone: str) -> str:
        return SMOKE_BACKBONE if backbone_spec(backbone).kind == "cnn" else backbone

    remarks = ["a smoke test: drawn pictures, encoders from scratch, one epoch; its numbers mean nothing"]
    blocks: dict[tuple[str, str, str], Block] = {}
    for block in suite.grid:
        recipe = load_recipe(block.recipe)
        model = recipe.model
        # How metadata are read belongs to what is compared.
        read = {name: getattr(recipe, name).model_dump(mode="json") for name in ("metadata", "modality_dropout")}
        for variant in block.variants:
            given = {"model.method": model.method, "model.backbone": model.backbone, **block.set, **variant.set}
            methods = (given["model.method"],) if "model.method" in variant.set else block.methods or (given["model.method"],)
            backbones = (given["model.backbone"],) if "model.backbone" in variant.set else block.backbones or (given["model.backbone"],)
            kept = {key: value for key, value in {**block.set, **variant.set}.items() if not _NOT_IN_SMOKE.match(key)}
            if kept.get("model.target") in _NETWORK_TARGETS:
                remarks.append(f"the target {kept['model.target']} needs a download: bicubic in its place")
                kept["model.target"] = "bicubic"
            for method, backbone in product(methods, dict.fromkeys(map(cheap, backbones))):
                # Blocks of two data sets, of which the first is kept: on the drawn sample they are the same system.
                blocks.setdefault(
                    (method, backbone, variant.name),
                    Block(
                        recipe="sample",
                        set={"data.root": str(root), **read, **SMOKE},
                        methods=(method,),
                        backbones=(backbone,),
                        variants=(Variant(name=variant.name, set=kept),),
                    ),
                )
    splits = (SplitCount(dataset="sample", protocol="grouped", set={"data.root": str(root)}),) if suite.splits else ()
    changed = {
        "name": f"{suite.name}-smoke",
        "title": f"SMOKE TEST ON DRAWN PICTURES: {suite.title}",
        "description": "Drawn pictures, encoders from scratch, one epoch: shows that everything works; the numbers mean nothing.",
        "smoke": True,
    }
    return suite.model_copy(update={**changed, "splits": splits, "grid": tuple(blocks.values())}), list(dict.fromkeys(remarks))
