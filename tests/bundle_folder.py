"""A bundle that nobody trained: its network says how bright the image is. It is written in milliseconds."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
from onnx import TensorProto, helper, numpy_helper

from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import DatasetSchema, MetadataField
from dualrefnet.deploy.hub import copy_runtime, write_sums
from dualrefnet.files import sha256_of_file, write_json
from dualrefnet.recipe import ImageSection, MetadataSection

SIDE, CLASSES = 32, ["DARK", "BRIGHT", "NEVER"]
AGE = MetadataField(name="age", kind="numeric", minimum=0, maximum=120)
WIDTH = MetadataField(name="width", kind="numeric")
SCHEMA = DatasetSchema(name="toy", title="Toy", classes=tuple(CLASSES), fields=(AGE, WIDTH))


def write_network(file: Path, weights: tuple[float, ...] = (-1.0, 1.0, 0.0), side: int = SIDE) -> None:
    """Write a network whose logits are the brightness times the weights, plus the width for the last class."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", side, side, 3])
    metadata = helper.make_tensor_value_info("metadata", TensorProto.FLOAT, ["N", 2])
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(weights)]),
        helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["N", 1]),
    ]
    fields = np.zeros((2, len(weights)), np.float32)
    fields[1, -1] = 1e30
    constants = {
        "weights": np.array([weights], np.float32),
        "bias": np.array([1, -1, -4], np.float32)[: len(weights)],
        "fields": fields,
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "axis"], ["column"]),
        helper.make_node("Mul", ["column", "unit"], ["vector"]),
        helper.make_node("Gemm", ["vector", "weights", "bias"], ["seen"]),
        helper.make_node("MatMul", ["metadata", "fields"], ["told"]),
        helper.make_node("Add", ["seen", "told"], ["logits"]),
    ]
    constants |= {"axis": np.array([1]), "unit": np.array(4 / 255, np.float32)}
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "toy", [image, metadata], outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), file)


def write_bundle(folder: Path, weights: tuple[float, ...] = (-1.0, 1.0, 0.0), **changes: Any) -> Path:
    """Write a whole bundle, of which some entries of `bundle.json` are others; those of `image` are merged."""
    folder.mkdir(parents=True, exist_ok=True)
    networks = {}
    for variant, name in (("float32", "model.onnx"), ("int8", "model.int8.onnx")):
        write_network(folder / name, weights)
        networks[variant] = {"file": name, "sha256": sha256_of_file(folder / name)}
    table = pd.DataFrame({"age": [20.0, 40.0], "width": [1.0, 3.0]})
    encoder = MetadataEncoder.fit(table, SCHEMA, MetadataSection(tier="M2", imputation="zero"))
    description = {
        "format": 1,
        "name": "toy",
        "dataset": {"title": "Toy"},
        "classes": CLASSES,
        "class_names": {},
        "malignant": ["BRIGHT"],
        "image": ImageSection(size=SIDE, clahe_grid=2).model_dump(),
        "metadata": encoder.to_json(),
        "calibration": None,
        "learned_tokens": False,
        "reads_image": True,
        "reads_metadata": True,
        "networks": networks,
        "measured": None,
    }
    description["image"] |= changes.pop("image", {})
    write_json(folder / "bundle.json", description | changes)
    (folder / "README.md").write_text("# The card\n")
    copy_runtime(folder)
    write_sums(folder)
    return folder
