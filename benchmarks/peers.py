"""DualRefNet beside other tools that learn from images and tables: scores, time and memory on the same patients.

Each system lives in a virtual environment of its own, which is made here and measured. All get the same images and
metadata of PAD-UFES-20, the same patient-disjoint split, the same torch, encoder, ImageNet weights, image size, batch
size and epochs. What else they do is their own: AutoGluon MultiModal and pytorch-widedeep with their defaults, the
Trainer of Hugging Face and a plain loop with MetaBlock as a careful user would write them. Each fits, and predicts, in
a process of its own; one function measures the probabilities of all.
"""

from __future__ import annotations

import json
import pickle
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The systems run this file in their environments, where only what they need is installed.
if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

HERE = Path(__file__).resolve().parent
BACKBONE = "tf_efficientnet_lite0"
NUMERIC = ("age", "diameter_1", "diameter_2")
BATCH, LEARNING_RATE, WEIGHT_DECAY = 32, 1e-3, 0.02
# Single predictions that are timed.
ROUNDS = 10

# One copy for all, the newest that AutoGluon allows; `===` keeps pip from another build of the same version.
TORCH = ("torch===2.13.0", "torchvision==0.28.0")
# What `pip install` is given, and what is imported once, so that no compilation to bytecode counts as fitting.
REQUIREMENTS = {
    "dualrefnet": (f"{HERE.parent}[export]",),
    "autogluon": ("autogluon.multimodal==1.6.3",),
    "widedeep": ("pytorch-widedeep==1.7.0", "timm==1.0.31"),
    "trainer": ("transformers[torch]==5.24.0", "timm==1.0.31", "pandas"),
    "metablock": ("timm==1.0.31", "pandas"),
}
IMPORTS = {
    "dualrefnet": "dualrefnet.training.train, dualrefnet.deploy.export, dualrefnet.deploy.network",
    "autogluon": "autogluon.multimodal",
    "widedeep": "timm, pytorch_widedeep, pytorch_widedeep.models, pytorch_widedeep.preprocessing",
    "trainer": "timm, pandas, transformers; transformers.Trainer",
    "metablock": "timm, pandas, torchvision.transforms",
}
# Trained in the environment of the first word.
SYSTEMS = {
    "dualrefnet": "DualRefNet",
    "dualrefnet one view": "DualRefNet, model.views=1",
    "dualrefnet m3": "DualRefNet, recipe pad_ufes_20_m3",
    "autogluon": "AutoGluon MultiModal",
    "widedeep": "pytorch-widedeep",
    "trainer": "Hugging Face Trainer",
    "metablock": "MetaBlock, plain loop",
}


# Within the environments: `fit` trains and leaves a model, `load` returns what predicts a table.

Predict = Callable[["pd.DataFrame"], "np.ndarray"]


def sides(work: Path) -> dict[str, pd.DataFrame]:
    """Return the rows of train, val and test."""
    import pandas as pd

    table = pd.read_csv(work / "table.csv", dtype={"fitspatrick": str}, keep_default_na=False, na_values=[""])
    return {side: rows.reset_index(drop=True) for side, rows in table.groupby("split")}


def settings(work: Path) -> dict[str, Any]:
    """Return epochs, size and classes."""
    found: dict[str, Any] = json.loads((work / "settings.json").read_text())
    return found


def encoder(work: Path) -> torch.nn.Module:
    """Return the image encoder with its ImageNet weights, without classifier."""
    import timm
    import torch

    model = timm.create_model(BACKBONE, num_classes=0)
    model.load_state_dict(torch.load(work / "encoder" / "pytorch_model.bin", weights_only=True))
    return model


def encode(train: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Standardise numbers and make each category, missing ones too, a column: (N, M) float32."""
    import numpy as np

    columns = []
    for name in train.columns[train.columns.get_loc("split") + 1 :]:
        if name in NUMERIC:
            known = train[name].dropna()
            values = (rows[name].fillna(known.mean()) - known.mean()) / known.std()
            columns += [values.to_numpy(), rows[name].isna().to_numpy()]
        else:
            categories = sorted(train[name].fillna("missing").astype(str).unique())
            words = rows[name].fillna("missing").astype(str)
            columns += [(words == category).to_numpy() for category in categories]
    return np.stack(columns, axis=1).astype(np.float32)


def weights(train: pd.DataFrame, classes: list[str]) -> list[float]:
    """Return a weight a class, inverse to its frequency."""
    return [len(train) / (len(classes) * max(1, int((train["label"] == name).sum()))) for name in classes]


def transforms(size: int, training: bool) -> Callable[..., torch.Tensor]:
    """Return the usual transforms of torchvision, with the encoder's mean and standard deviation."""
    from torchvision import transforms as v

    crop = [v.RandomResizedCrop(size, (0.25, 1)), v.RandomHorizontalFlip(), v.RandomVerticalFlip()]
    light = [v.ColorJitter(0.25, 0.25, 0.25)]
    steps = [*crop, *light] if training else [v.Resize((size, size))]
    return v.Compose([*steps, v.ToTensor(), v.Normalize([0.5] * 3, [0.5] * 3)])


class Cases:
    """A data set for torch: images, metadata and labels."""

    def __init__(self, work: Path, rows: pd.DataFrame, training: bool) -> None:
        about = settings(work)
        self.paths = list(rows["image"])
        self.metadata = encode(sides(work)["train"], rows)
        self.labels = [about["classes"].index(label) for label in rows["label"]]
        self.transform = transforms(about["size"], training)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        from PIL import Image

        image = self.transform(Image.open(self.paths[row]).convert("RGB"))
        return {"images": image, "metadata": self.metadata[row], "labels": self.labels[row]}


def fit_dualrefnet(work: Path, folder: Path, recipe: str = "pad_ufes_20", **overrides: Any) -> None:
    import dualrefnet

    about = settings(work)
    chosen = {"training__epochs": about["epochs"], "image__size": about["size"], "training__device": "cpu"}
    dualrefnet.train(recipe, out=folder, overwrite=True, **chosen, **overrides)


def fit_dualrefnet_one_view(work: Path, folder: Path) -> None:
    fit_dualrefnet(work, folder, model__views=1)


def fit_dualrefnet_m3(work: Path, folder: Path) -> None:
    fit_dualrefnet(work, folder, "pad_ufes_20_m3")


def load_dualrefnet(work: Path, folder: Path) -> Predict:
    from dualrefnet import Predictor

    predictor = Predictor.load(folder)
    columns = [f"prob_{name}" for name in settings(work)["classes"]]
    return lambda rows: predictor.predict(rows.drop(columns=["label", "split", "patient_id"]))[columns].to_numpy()


def fit_autogluon(work: Path, folder: Path) -> None:
    from autogluon.multimodal import MultiModalPredictor

    about, parts = settings(work), sides(work)
    MultiModalPredictor(label="label", path=str(folder)).fit(
        train_data=parts["train"].drop(columns=["split", "patient_id"]),
        tuning_data=parts["val"].drop(columns=["split", "patient_id"]),
        seed=0,
        hyperparameters={
            "model.names": ["ft_transformer", "timm_image", "fusion_mlp"],
            # A folder with config.json and pytorch_model.bin is read without a network.
            "model.timm_image.checkpoint_name": str(work / "encoder"),
            "model.timm_image.image_size": about["size"],
            "model.timm_image.image_norm": "inception",
            "optim.max_epochs": about["epochs"],
            "env.batch_size": BATCH,
            "env.per_gpu_batch_size": BATCH,
            "env.num_gpus": 0,
        },
    )


def load_autogluon(work: Path, folder: Path) -> Predict:
    from autogluon.multimodal import MultiModalPredictor

    predictor, classes = MultiModalPredictor.load(str(folder)), settings(work)["classes"]
    return lambda rows: predictor.predict_proba(rows.drop(columns=["label", "split", "patient_id"]))[classes].to_numpy()


def widedeep_parts(work: Path) -> tuple[Any, ...]:
    """Return the fitted preprocessors, the untrained model and what an image goes through in training."""
    from pytorch_widedeep.models import TabMlp, WideDeep
    from pytorch_widedeep.preprocessing import ImagePreprocessor, TabPreprocessor
    from torch import nn
    from torchvision import transforms as v

    class Image(nn.Module):
        """Its ImagePreprocessor reads blue, green, red."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.output_dim = encoder(work), 1280

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.encoder(images.flip(1))

    about, train = settings(work), filled(sides(work)["train"])
    names = list(train.columns[train.columns.get_loc("split") + 1 :])
    tab = TabPreprocessor(
        cat_embed_cols=[name for name in names if name not in NUMERIC], continuous_cols=list(NUMERIC), scale=True
    ).fit(train)
    image = ImagePreprocessor("image", "", about["size"], about["size"], verbose=0).fit(train)
    columns = {"column_idx": tab.column_idx, "cat_embed_input": tab.cat_embed_input, "continuous_cols": list(NUMERIC)}
    model = WideDeep(deeptabular=TabMlp(**columns), deepimage=Image(), pred_dim=len(about["classes"]))
    steps = [v.ToTensor(), v.RandomHorizontalFlip(), v.RandomVerticalFlip(), v.Normalize([0.5] * 3, [0.5] * 3)]
    return tab, image, model, steps


def filled(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows without gaps: the word `missing`, or the mean."""
    return rows.assign(
        **{
            name: rows[name].fillna(50 if name == "age" else 10)
            if name in NUMERIC
            else rows[name].fillna("missing").astype(str)
            for name in rows.columns[rows.columns.get_loc("split") + 1 :]
        }
    )


def fit_widedeep(work: Path, folder: Path) -> None:
    import numpy as np
    import torch
    from pytorch_widedeep import Trainer

    about, train = settings(work), filled(sides(work)["train"])
    torch.manual_seed(0)
    tab, image, model, steps = widedeep_parts(work)
    optimizers = {
        name: torch.optim.AdamW(getattr(model, name).parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for name in ("deeptabular", "deepimage")
    }
    each, epochs = len(train) // BATCH + 1, about["epochs"]
    schedules = {
        name: torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps_per_epoch=each, epochs=epochs)
        for name, optimizer in optimizers.items()
    }
    trainer = Trainer(
        model,
        objective="multiclass",
        optimizers=optimizers,
        lr_schedulers=schedules,
        transforms=steps,
        class_weight=weights(train, about["classes"]),
        device="cpu",
        num_workers=0,
        verbose=0,
    )
    target = np.array([about["classes"].index(label) for label in train["label"]])
    trainer.fit(
        X_tab=tab.transform(train), X_img=image.transform(train), target=target, n_epochs=epochs, batch_size=BATCH
    )
    torch.save(trainer.model.state_dict(), folder / "model.pt")
    (folder / "image.pickle").write_bytes(pickle.dumps(image))


def load_widedeep(work: Path, folder: Path) -> Predict:
    import torch
    from pytorch_widedeep import Trainer

    tab, _, model, steps = widedeep_parts(work)
    image = pickle.loads((folder / "image.pickle").read_bytes())
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    still = [steps[0], steps[-1]]
    trainer = Trainer(model, objective="multiclass", transforms=still, device="cpu", num_workers=0, verbose=0)

    def predict(rows: pd.DataFrame) -> np.ndarray:
        rows = filled(rows)
        found: np.ndarray = trainer.predict_proba(
            X_tab=tab.transform(rows), X_img=image.transform(rows), batch_size=BATCH
        )
        return found

    return predict


def two_inputs(work: Path) -> torch.nn.Module:
    """Return a network with an image and a metadata branch, concatenated, as the Trainer wants it."""
    import torch
    from torch import nn

    about, train = settings(work), sides(work)["train"]

    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            columns = encode(train, train[:1]).shape[1]
            self.encoder = encoder(work)
            self.metadata = nn.Sequential(nn.Linear(columns, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 320))
            self.head = nn.Sequential(
                nn.Dropout(0.3), nn.Linear(1600, 256), nn.ReLU(), nn.Linear(256, len(about["classes"]))
            )
            self.register_buffer("weights", torch.tensor(weights(train, about["classes"])))

        def forward(
            self, images: torch.Tensor, metadata: torch.Tensor, labels: torch.Tensor | None = None
        ) -> dict[str, torch.Tensor]:
            logits = self.head(torch.cat([self.encoder(images), self.metadata(metadata)], 1))
            if labels is None:
                return {"logits": logits}
            return {"loss": nn.functional.cross_entropy(logits, labels, self.weights), "logits": logits}

    return TwoInputs()


def hugging_face_trainer(work: Path, folder: Path, model: torch.nn.Module) -> Any:
    from transformers import Trainer, TrainingArguments

    about, cases = settings(work), Cases(work, sides(work)["train"], training=True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        num_train_epochs=about["epochs"],
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="cosine",
        warmup_steps=about["epochs"] * len(cases) // BATCH // 4,
        dataloader_drop_last=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        seed=0,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=cases)


def fit_trainer(work: Path, folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = two_inputs(work)
    hugging_face_trainer(work, folder, model).train()
    torch.save(model.state_dict(), folder / "model.pt")


def load_trainer(work: Path, folder: Path) -> Predict:
    import torch

    model = two_inputs(work)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return torch_predict(work, lambda batch: model.eval()(batch["images"], batch["metadata"])["logits"])


def metablock(work: Path) -> torch.nn.Module:
    """Return the encoder with the block of Pacheco and Krohling (2021), as they published it."""
    import torch
    from torch import nn

    about, train = settings(work), sides(work)["train"]

    class MetaBlock(nn.Module):
        def __init__(self, maps: int, columns: int) -> None:
            super().__init__()
            self.fb = nn.Sequential(nn.Linear(columns, maps), nn.BatchNorm1d(maps))
            self.gb = nn.Sequential(nn.Linear(columns, maps), nn.BatchNorm1d(maps))

        def forward(self, maps: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
            scaled = torch.tanh(maps * self.fb(metadata).unsqueeze(-1))
            return torch.sigmoid(scaled + self.gb(metadata).unsqueeze(-1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.block = encoder(work), MetaBlock(40, encode(train, train[:1]).shape[1])
            self.classifier = nn.Linear(1280, len(about["classes"]))

        def forward(self, images: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
            maps = self.encoder(images).view(len(images), 40, 32)
            return self.classifier(self.block(maps, metadata).flatten(1))

    return Net()


def fit_metablock(work: Path, folder: Path) -> None:
    import torch
    from torch.utils.data import DataLoader

    about, train = settings(work), sides(work)["train"]
    torch.manual_seed(0)
    model = metablock(work).train()
    batches = DataLoader(Cases(work, train, training=True), BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, steps_per_epoch=len(batches), epochs=about["epochs"]
    )
    loss_of = torch.nn.CrossEntropyLoss(torch.tensor(weights(train, about["classes"])))
    for _ in range(about["epochs"]):
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model(batch["images"], batch["metadata"]), batch["labels"]).backward()
            optimizer.step()
            schedule.step()
    torch.save(model.state_dict(), folder / "model.pt")


def load_metablock(work: Path, folder: Path) -> Predict:
    import torch

    model = metablock(work)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return torch_predict(work, lambda batch: model.eval()(batch["images"], batch["metadata"]))


def torch_predict(work: Path, logits: Callable[[dict[str, Any]], torch.Tensor]) -> Predict:
    import torch
    from torch.utils.data import DataLoader

    def predict(rows: pd.DataFrame) -> np.ndarray:
        with torch.inference_mode():
            batches: Any = DataLoader(Cases(work, rows, training=False), BATCH)
            return torch.cat([logits(batch).softmax(1) for batch in batches]).numpy()

    return predict


def seconds() -> tuple[float, float]:
    """Return wall and CPU seconds, those of ended children too."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


def milliseconds(call: Callable[[], object], images: int) -> tuple[float, float]:
    """Return wall and CPU milliseconds an image of one call."""
    before = seconds()
    call()
    return tuple(1000 * (now - then) / images for now, then in zip(seconds(), before, strict=True))


def run_system(step: str, name: str, work: Path, folder: Path) -> None:
    """Fit a system, or load it and predict the test rows, in this process."""
    kind = name.split()[0]
    if step == "fit":
        folder.mkdir(parents=True, exist_ok=True)
        globals()[f"fit_{name.replace(' ', '_')}"](work, folder)
        return
    predict, test = globals()[f"load_{kind}"](work, folder), sides(work)["test"]
    import pandas as pd

    pd.DataFrame(predict(test), columns=settings(work)["classes"]).to_csv(folder.with_suffix(".csv"), index=False)
    together = [milliseconds(lambda: predict(test), len(test))]
    single = [
        milliseconds(lambda row=row: predict(test.iloc[[row]].reset_index(drop=True)), 1) for row in range(ROUNDS)
    ]
    found = {
        f"{what}_{unit}": statistics.median(time[place] for time in times)
        for what, times in (("single", single), ("batch", together))
        for place, unit in enumerate(("ms", "cpu_ms"))
    }
    folder.with_suffix(".json").write_text(json.dumps(found))


# Here: environments, data, and the measures.


def make_environment(name: str, work: Path) -> dict[str, float]:
    """Make the environment of a system if it isn't there; return its MB, with and without torch and its libraries."""
    torch, environment, mark = work / "torch", work / name / "env", work / name / "env.json"
    if not mark.is_file():
        python = environment / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-cache-dir", "--no-compile"]
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        if not torch.is_dir():
            subprocess.run([*pip, "--target", torch.with_suffix(".partial"), *TORCH], check=True)
            torch.with_suffix(".partial").rename(torch)
        packages = next((environment / "lib").glob("python3*")) / "site-packages"
        # pip takes what it finds behind this path for installed.
        (packages / "torch.pth").write_text(f"{torch}\n")
        subprocess.run([*pip, *REQUIREMENTS[name]], check=True)
        subprocess.run([python, "-c", f"import {IMPORTS[name]}"], check=True)
        own = size_of(environment)
        mark.write_text(json.dumps({"install_mb": own + size_of(torch), "install_mb_without_torch": own}))
    found: dict[str, float] = json.loads(mark.read_text())
    return found


def size_of(folder: Path) -> float:
    """Return MB on disk."""
    return sum(file.lstat().st_blocks * 512 for file in folder.rglob("*")) / 1e6


def prepare(work: Path, epochs: int, size: int) -> None:
    """Write the rows with their split, and the encoder in the layout that AutoGluon reads."""
    import torch

    from dualrefnet.data.adapters import load_dataset
    from dualrefnet.data.protocols import split_dataset
    from dualrefnet.files import write_csv, write_json
    from dualrefnet.models.encoders import create_encoder

    dataset = load_dataset("pad_ufes_20")
    split = split_dataset(dataset).set_index("image_id")
    rows = dataset.with_image
    names = [field.name for field in dataset.schema.fields]
    table = rows.assign(
        image=rows["image_path"],
        split=split.loc[rows["image_id"], "split"].to_numpy(),
        patient_id=split.loc[rows["image_id"], "patient_id"].to_numpy(),
    )
    write_csv(work / "table.csv", table[["image", "label", "patient_id", "split", *names]])
    write_json(work / "settings.json", {"epochs": epochs, "size": size, "classes": list(dataset.schema.classes)})
    body = create_encoder("efficientnet_lite0", image_size=size).body
    config = {"architecture": BACKBONE, "num_features": 1280, "num_classes": 0, "pretrained_cfg": body.default_cfg}
    write_json(work / "encoder" / "config.json", config)
    torch.save(dict(body.state_dict()), work / "encoder" / "pytorch_model.bin")


def measure_scores(work: Path, folder: Path) -> dict[str, float]:
    """Return balanced accuracy and AUC with their 95% intervals over patients."""
    import pandas as pd

    from dualrefnet.evaluation.bootstrap import Bootstrap
    from dualrefnet.evaluation.comparison import metrics_with_intervals

    test, classes = sides(work)["test"], settings(work)["classes"]
    probabilities = pd.read_csv(folder.with_suffix(".csv"))[classes].to_numpy()
    labels = pd.Index(classes).get_indexer(pd.Index(test["label"]))
    metrics = metrics_with_intervals(labels, probabilities, Bootstrap(test["patient_id"], 1000, 0), classes)
    result = {}
    for key in ("balanced_accuracy", "auc_macro_ovr"):
        low, high = metrics[f"{key}_ci95"]
        result |= {key: metrics[key], f"{key}_low": low, f"{key}_high": high}
    return result


def measure(name: str, work: Path) -> list[dict[str, Any]]:
    """Return the rows of a system: itself, and for ours its bundle too."""
    from record import measure_process

    kind, folder = name.split()[0], work / name.split()[0] / name.replace(" ", "-")
    mark = folder.with_suffix(".rows.json")
    if mark.is_file():
        rows: list[dict[str, Any]] = json.loads(mark.read_text())
        return rows
    installed, python = make_environment(kind, work), work / kind / "env" / "bin" / "python"

    # Only what is in the environment counts, and no image that an earlier run prepared.
    variables = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "DUALREFNET_CACHE": str(folder.with_suffix(".cache"))}

    def step(what: str, target: Path) -> dict[str, float]:
        log = target.with_suffix(f".{what}.log")
        return measure_process([python, HERE / "peers.py", what, name, work, target], log, variables)

    def predicted(target: Path) -> dict[str, float]:
        peak = step("predict", target)["peak_mib"]
        return {**json.loads(target.with_suffix(".json").read_text()), "predict_peak_mib": peak}

    fitted = folder.with_suffix(".fit.json")
    if not fitted.is_file():
        fitted.write_text(json.dumps({f"fit_{key}": value for key, value in step("fit", folder).items()}))
    fit: dict[str, float] = json.loads(fitted.read_text())
    rows = [{"system": SYSTEMS[name], **fit, **predicted(folder), **measure_scores(work, folder), **installed}]
    if name == "dualrefnet one view" or name == "dualrefnet":
        bundle = folder.with_name(f"{folder.name}-bundle")
        export = [python, "-m", "dualrefnet", "export", folder, "--out", bundle, "--accept-missingness-shortcut"]
        measure_process(export, bundle.with_suffix(".log"), variables)
        rows.append({"system": f"{SYSTEMS[name]}, bundle", **predicted(bundle), **measure_scores(work, bundle)})
    mark.write_text(json.dumps(rows))
    return rows


def main() -> None:
    """Measure in the folder of the first argument, where a call that was cut short goes on; further ones: systems."""
    import argparse

    import pandas as pd

    from record import RESULTS, record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for environments, models and logs; 8 GB")
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"default: {', '.join(SYSTEMS)}")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="side of the images, pixels")
    parser.add_argument("--delete", action="store_true", help="delete each environment once it is measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_intermixed_args()
    work = given.work.resolve()
    unknown = [name for name in given.systems if name not in SYSTEMS]
    if unknown:
        parser.error(f"there is no system {', '.join(unknown)}; there are: {', '.join(SYSTEMS)}")
    if not (work / "settings.json").is_file():
        work.mkdir(parents=True, exist_ok=True)
        prepare(work, given.epochs, given.size)
    rows, chosen = [], given.systems or list(SYSTEMS)
    for place, name in enumerate(chosen):
        rows += measure(name, work)
        kind = name.split()[0]
        if given.delete and not any(other.split()[0] == kind for other in chosen[place + 1 :]):
            subprocess.run(["rm", "-rf", work / kind / "env"], check=True)
    about, parts = settings(work), sides(work)
    versions = [*TORCH, *(one for name, all_of in REQUIREMENTS.items() if name != "dualrefnet" for one in all_of)]
    counts = ", ".join(f"{len(parts[side])} {side}" for side in ("train", "val", "test"))
    note = (
        f"PAD-UFES-20, protocol grouped, {counts} images; {BACKBONE}, ImageNet weights, {about['size']} px, "
        f"{about['epochs']} epochs, batches of {BATCH}, seed 0, one thread a process; fit and predict: whole "
        f"processes, children too; memory: PSS; 95% intervals over patients; ms: an image, median of {ROUNDS} single "
        f"ones, and one pass over the test images, warm, decoding included; {' '.join(versions)}"
    )
    record("peers", pd.DataFrame(rows), note, given.out)


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] in ("fit", "predict"):
        run_system(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
