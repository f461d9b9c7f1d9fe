"""Targets of the auxiliary task that a super-resolution network makes: computed once from the stored pictures."""

from __future__ import annotations

from typing import Any

import torch

from dualrefnet.data.derived_store import DerivedStore, Part, fill_derived_store
from dualrefnet.data.image_store import ImageStore
from dualrefnet.models.superresolution_networks import NETWORKS, enlarge, load_network
from dualrefnet.progress import progress_bar, remark
from dualrefnet.recipe import Recipe


def fill_targets(recipe: Recipe, store: ImageStore, device: torch.device) -> tuple[DerivedStore | None, dict[str, Any] | None]:
    """Return the enlarged pictures (part `target`, (2S, 2S, 3) bytes) and the record of the network's weights.

    Both None if the recipe's target isn't a network's, or nothing is rebuilt.

    Raises:
        WeightsError: the network's weights aren't to be had.
        DataError: the disk has no room.
    """
    name = recipe.model.target
    if not recipe.rebuilds_image or name not in NETWORKS:
        return None, None
    network, source = load_network(name, recipe.model.target_weights)
    network.to(device)
    remark(f"targets of the auxiliary task: {NETWORKS[name].title}, {source.description}")
    side = 2 * store.side
    with progress_bar(f"targets of {name}") as show:
        targets = fill_derived_store(
            store,
            f"targets-{name}",
            {"network": name, "weights": source.sha256},
            {"target": Part("uint8", (side, side, 3))},
            lambda pictures: {"target": enlarge(network, pictures)},
            batch=4,
            progress=show,
        )
    return targets, source.as_dict()
