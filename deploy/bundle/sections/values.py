"""What the values of the manifest's entries may be: known words, and ranges of numbers."""

from __future__ import annotations

from typing import Annotated

from ..record import Between, Matches, OneOf

LOGITS = "logits"
"""Name of a classifier's output, and of its head; feature maps are called ``stage1`` and so on."""
FEATURES = "features"
"""Head of a model that gives the feature maps of its stages."""
BATCH = "batch"
"""What stands in a shape for a batch size that is dynamic."""
FLOAT32 = "float32"
"""Type of every input and output."""
FORMATS = {
    "onnx": ("fp32", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "trt": ("fp32", "fp16", "int8"),
    "rtx": ("fp32", "fp16", "int8"),
}
"""Format of a bundle that can be exported -> the precisions that it can have."""
AUTO_PRECISIONS = {**FORMATS, "openvino": ("fp32", "bf16", "int8")}
"""Format -> the precisions that ``auto`` chooses between. OpenVINO's fp16 is for devices that the exporting
machine need not have."""
TYPED_FORMATS = ("trt", "rtx")
"""Formats whose graphs have the precision written into them, and whose engines NVIDIA's compilers build."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
"""Every precision of a bundle."""
LABELS_SOURCES = ("file", "checkpoint", "published", "numbered", "none")
"""Where the labels may come from."""
PROBABILITIES = "probabilities"
"""Kind of an output whose values are the classes' probabilities and sum to 1, as after a softmax."""
SCORES = "scores"
"""Kind of an output that gives each class a probability of its own, as after a sigmoid."""
MAX_DIMENSION = 1 << 24
"""The largest dimension of a tensor."""
MAX_ELEMENTS = 1 << 30
"""The largest number of elements of an input or an output: 4 GiB of float32."""
MAX_TOTAL = 8 << 30
"""The largest size of all files of a bundle together, bytes."""
Count = Annotated[int, Between(0)]
"""A number of things; none is possible."""
Seed = Annotated[int, Between(0, (1 << 64) - 1)]
"""Where a generator of random numbers began: what PyTorch takes."""
Size = Annotated[int, Between(1)]
"""A number of things of which there is at least one."""
Sha256 = Annotated[str, Matches("[0-9a-f]{64}", "64 hexadecimal digits")]
"""A SHA-256 as text."""
OutputKind = Annotated[str, OneOf((PROBABILITIES, SCORES))]
"""What the values of an output are, where they are no logits."""
Head = Annotated[str, OneOf((LOGITS, FEATURES))]
"""What the model gives."""
Precision = Annotated[str, OneOf(PRECISIONS)]
"""What was asked for."""
Format = Annotated[str, OneOf(tuple(FORMATS))]
"""The runtime that the bundle is for."""
LabelsSource = Annotated[str, OneOf(LABELS_SOURCES)]
"""Where the labels come from."""
DataType = Annotated[str, OneOf((FLOAT32,))]
"""Type of the values of a tensor."""
Dimension = Annotated[int, Between(1, MAX_DIMENSION)]
"""One dimension of a tensor."""
DynamicDimension = Annotated[str, OneOf((BATCH,))]
"""A dimension that any batch size may take."""
Duration = Annotated[float, Between(0)]
"""Milliseconds of a measurement."""
OutputDifference = Annotated[float, Between(0)]
"""The size of a difference of outputs, or what is allowed of it."""
Share = Annotated[float, Between(0, 1.001)]
"""A part of a whole; sums of shares may end a rounding above 1."""
Percent = Annotated[float, Between(0, 100.1)]
"""A share in percent."""
Points = Annotated[float, Between(-100.1, 100.1)]
"""A difference of shares, percentage points."""
Speedup = Annotated[float, Between(0)]
"""How many times as fast one thing is as another."""
