"""What many tests share: a small synthetic data set, and one tiny trained run."""

import os
from pathlib import Path

# Before torch is imported: threads that wait must not spin, or two test runs on two cores stop each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

from dualrefnet.analysis.opened_run import OpenedRun, open_run
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.schema import Dataset
from dualrefnet.data.synthetic import make_synthetic
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run
from dualrefnet.suite.results import SuiteResults, aggregate, paper

# Machines are noisy: how long an example takes says nothing about the software.
settings.register_profile("noisy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy")

# The smallest honest training: a real encoder from scratch on 32 px images, seconds on two cores.
TINY = {
    "image.size": 32,
    "model.backbone": "mobilenet_v2",
    "model.weights": "none",
    "training.epochs": 2,
    "training.selection": "balanced_accuracy",
    # Tier M3, so that flags of what is missing are tested too; the default with learned tokens has tests of its own.
    "metadata.tier": "M3",
    "metadata.imputation": "neural",
    "modality_dropout": {},
    "training.device": "cpu",
    "evaluation.bootstrap": 50,
}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep prepared images of tests out of the user's cache."""
    os.environ["DUALREFNET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # pytest-xdist runs a worker a core.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set of 120 images; don't change it."""
    return make_synthetic(tmp_path_factory.mktemp("sample") / "data", images=120, side=64)


@pytest.fixture(scope="session")
def large_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set large enough for statements about its metadata; don't change it."""
    return make_synthetic(tmp_path_factory.mktemp("large") / "data", images=420, side=64)


@pytest.fixture(scope="session")
def tiny_recipe(sample_root: Path) -> Recipe:
    """The recipe of `tiny_run`."""
    return load_recipe("sample", {"data.root": str(sample_root), **TINY})


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run; don't change it."""
    from dualrefnet.training.train import train_recipe

    return train_recipe(tiny_recipe, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def opened(tiny_run: Run) -> OpenedRun:
    """The shared run, opened."""
    return open_run(tiny_run, device=torch.device("cpu"))


def _shared(variable: str, name: str) -> Path:
    root = os.environ.get(variable)
    if not root or not (Path(root) / name).exists():
        pytest.skip(f"{variable} doesn't hold {name}")
    return Path(root) / name


@pytest.fixture(scope="session")
def real_pad() -> Path:
    """The real PAD-UFES-20 folder; the test is skipped where there is none."""
    return _shared("DUALREFNET_DATA", "pad_ufes_20")


@pytest.fixture(scope="session")
def real_isic() -> Path:
    """The real ISIC-2019 folder; the test is skipped where there is none."""
    return _shared("DUALREFNET_DATA", "isic_2019")


@pytest.fixture(scope="session")
def pad(real_pad: Path) -> Dataset:
    return load_dataset("pad_ufes_20", real_pad)


@pytest.fixture(scope="session")
def isic(real_isic: Path) -> Dataset:
    return load_dataset("isic_2019", real_isic)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite of known predictions; don't change it."""
    from suite_folder import SUITE, write_suite

    return write_suite(tmp_path_factory.mktemp("suite") / "small", SUITE)


@pytest.fixture
def small_table_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 1 with the counts of the runs that `paper_suite` writes: they are the paper's experiment then."""
    from suite_folder import CLASSES, IMAGES

    images = dict.fromkeys(CLASSES, IMAGES // len(CLASSES))
    monkeypatch.setitem(paper()["splits"], "pad_ufes_20", {"train": {}, "val": images, "test": images})


@pytest.fixture(scope="session")
def small_results(small: Path) -> SuiteResults:
    """The results of `small`."""
    return aggregate(small)
