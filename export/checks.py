"""What can be known to be wrong with the settings of an export before anything is loaded."""

from __future__ import annotations

import re

from cmt_edge.calib.data import SYNTHETIC
from cmt_edge.cmt.features import require_head
from cmt_edge.cmt.spec import check_size
from cmt_edge.deploy.bundle import LOGITS
from cmt_edge.deploy.bundle.sections import FORMATS
from cmt_edge.deploy.bundle.signature import read_private_key
from cmt_edge.deploy.cli.ranges import CLASS_COUNTS
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.preprocessing import MAX_SHORT_SIDE, RESAMPLING
from cmt_edge.startup import name_program

from .derived import DerivedSettings
from .first_look import require_checkpoint
from .options import (
    check_values,
    list_changed_flags,
    require_choice,
    require_range,
)
from .settings import AUTO, TENSORRT

LONGEST_NAME = 200
"""Bytes of the longest name of a bundle's folder. File systems allow 255, and while the bundle is written the
name is longer."""

NOT_COMPUTED = {
    "onnx": "ONNX Runtime computes in it on no CPU",
    "trt": "its typed graphs are fp32, fp16 or int8",
    "rtx": "its typed graphs are fp32, fp16 or int8",
}
"""Format -> why it lacks a precision that others have."""

COMPUTE_CAPABILITIES = ("75", "80", "86", "89", "120", "121")
"""Compute capabilities that TensorRT for RTX 1.4 to 1.7 builds for, without the point."""


def check_settings(config: DerivedSettings) -> None:
    """Raise the first :class:`~cmt_edge.deploy.errors.InputError` among everything that can be known
    without loading."""
    check_values(config)
    _check_model(config)
    _check_preprocessing(config)
    _check_name(config)
    _check_files(config)
    _check_auto_options(config)
    _check_auto(config)
    _check_pair(config)
    _check_data(config)
    _check_cluster(config)


def _check_model(config: DerivedSettings) -> None:
    """Size, head and classes that the model can have."""
    spec = config.spec
    check_size(spec, config.img_size)
    require_range("--num-classes", config.classes, CLASS_COUNTS)
    require_head(spec, config.head)
    if config.head != LOGITS and (config.eval_data is not None or config.labels is not None):
        raise InputError(
            "--eval-data and --labels are for classes, which feature maps do not have",
            remedy="leave them out, or use --head logits",
        )
    fixed = spec.resize is not None and not config.resize_position_bias
    if config.weights == "pretrained" and config.img_size != spec.img_size and fixed:
        raise InputError(
            f"the pretrained weights of {spec.name} are for {spec.img_size} pixels, not {config.img_size}",
            remedy="--resize-position-bias to interpolate them, then check the accuracy",
        )


def _check_preprocessing(config: DerivedSettings) -> None:
    """Values and the filter that preprocessing can use."""
    if config.crop_ratio and config.img_size / config.crop_ratio > MAX_SHORT_SIDE:
        raise InputError(
            f"--crop-ratio {config.crop_ratio:g} would resize images to more than {MAX_SHORT_SIDE} pixels",
            remedy="give the share of the short side that the crop keeps, 0.875 for instance",
        )
    if min(config.preprocess.std) <= 0:
        raise InputError(
            "--std must be above 0",
            remedy="leave it out for the model's own",
        )
    if config.spec.interpolation not in RESAMPLING:
        raise InputError(
            f"{config.spec.name} resizes by {config.spec.interpolation!r}; known: {', '.join(RESAMPLING)}",
            remedy="change interpolation in the model's default_cfg",
        )


def _check_name(config: DerivedSettings) -> None:
    """A name that is one part of a path, on every system, and shows in a listing."""
    if config.name is not None and not re.fullmatch(r"\w[\w.-]*", config.name):
        raise InputError(
            f"--name {config.name!r} is not the name of a folder",
            remedy="use letters, digits, '_', '-' and '.'; -o DIR says where the folder is made",
        )
    if len(config.folder.encode()) > LONGEST_NAME:
        raise InputError(
            f"the bundle's folder would have a name of {len(config.folder.encode())} bytes",
            remedy=f"give a --name that is short enough: {LONGEST_NAME} bytes in all",
        )


def _check_files(config: DerivedSettings) -> None:
    """Files that exist and can be read."""
    require_checkpoint(config.weights)
    if config.signing_key is not None:
        read_private_key(config.signing_key)
    config.read_labels()


def _check_auto_options(config: DerivedSettings) -> None:
    """Options of ``auto`` only with it, and those of int8 only without."""
    flags = list_changed_flags(config, AUTO)
    if flags and config.precision != "auto":
        raise InputError(
            f"{' and '.join(flags)}: only --precision auto measures and chooses",
            remedy="leave it out, or use --precision auto",
        )
    if config.keep_float is not None and config.precision != "int8":
        raise InputError(
            f"--keep-float is for int8, not {config.precision}",
            remedy="leave it out, or use --precision int8",
        )


def _check_auto(config: DerivedSettings) -> None:
    """What ``auto`` needs."""
    if config.precision != "auto":
        return
    if config.format == "rtx":
        _check_auto_by_compiler(config)
    if config.format == "trt":
        raise InputError(
            "--precision auto measures on this machine, but TensorRT engines run on their device",
            remedy="export fp16 and int8 with --no-build, then use"
            f" {name_program('build')} and {name_program('bench')} on both, on the device",
        )
    if config.head != LOGITS:
        raise InputError(
            "--precision auto judges by classes, which feature maps do not have",
            remedy="let it choose for --head logits, then export the maps with that --precision and"
            " --keep-float",
        )
    if config.data is None:
        raise InputError(
            "auto needs calibration images, for its int8 candidates",
            remedy="--data FOLDER with images like those the model will see; add --eval-data with"
            " labelled ones to judge by top-1",
        )
    if config.isa is not None and config.format != "openvino":
        raise InputError(
            "--isa needs --format openvino: ONNX Runtime asks the CPU itself and has no switch for it",
            remedy="leave --isa out, or use --format openvino",
        )


def _check_auto_by_compiler(config: DerivedSettings) -> None:
    """What a compiler cannot tell, and that it is asked."""
    flags = list_changed_flags(config, AUTO)
    if flags:
        raise InputError(
            f"{' and '.join(flags)}: auto measures nothing with --format rtx",
            why="it chooses by the kernels and bytes that the compiler reports",
            remedy="leave it out",
        )
    if not config.build:
        raise InputError(
            "--precision auto with --format rtx asks the compiler, which --no-build leaves out",
            remedy="leave --no-build out, or name a --precision",
        )


def _check_pair(config: DerivedSettings) -> None:
    """A format that has the precision, and no options of another format."""
    known = FORMATS[config.format]
    if config.precision not in ("auto", *known):
        others = [name for name, precisions in FORMATS.items() if config.precision in precisions]
        raise InputError(
            f"--format {config.format} has no {config.precision}: {NOT_COMPUTED[config.format]}",
            remedy=f"--format {' or '.join(others)}, or --precision {' or '.join(reversed(known))}",
        )
    flags = list_changed_flags(config, TENSORRT)
    if flags and not config.has_engine:
        raise InputError(
            f"{' and '.join(flags)}: only --format trt or rtx builds engines",
            remedy="leave it out, or use --format trt or rtx",
        )
    _check_compute(config)


def _check_compute(config: DerivedSettings) -> None:
    """Compute capabilities that exist, and no GPU where none is used."""
    if config.format == "rtx" and config.device is not None:
        raise InputError(
            "--device: --format rtx builds without a GPU",
            remedy="leave it out; --compute-capability names the GPUs that the engine is for",
        )
    if config.format != "rtx" and config.compute_capability is not None:
        raise InputError(
            "--compute-capability is for --format rtx; TensorRT builds for the GPU of the machine",
            remedy="leave it out, or use --format rtx",
        )
    for name in config.compute:
        require_choice("compute capability", name, COMPUTE_CAPABILITIES)


def _check_data(config: DerivedSettings) -> None:
    """Images where they are needed, and only there."""
    if config.precision == "int8" and config.data is None:
        raise InputError(
            "int8 needs calibration images",
            remedy="--data FOLDER with images like those the model will see, or --data generated if there"
            " are none",
        )
    unused = config.data is not None or config.calib_size is not None
    if unused and not (config.quantizes or config.precision == "fp16"):
        raise InputError(
            f"--data and --calib-size are for int8 calibration and fp16 ranges, not {config.precision}",
            remedy="leave them out; to measure accuracy use --eval-data",
        )
    if config.data == SYNTHETIC and config.weights == "random":
        raise InputError(
            "synthetic images need trained weights",
            why="they are made from the statistics that training left in the batch norms",
            remedy="--weights PATH or pretrained, or --data generated",
        )


def _check_cluster(config: DerivedSettings) -> None:
    """A cluster where it has something to do, and its options only with it."""
    given = {"--answers": config.answers, "--workers": config.workers, "--ray-wait": config.ray_wait}
    alone = [flag for flag, value in given.items() if value is not None]
    if alone and config.ray is None:
        raise InputError(f"{alone[0]} means nothing without --ray", remedy="add --ray")
    if config.ray is None:
        return
    if not config.quantizes:
        raise InputError(
            f"--ray is for calibration and for --precision auto, and {config.precision} needs neither",
            remedy=f"leave it out; {name_program('verify')} --ray measures the accuracy of the bundle",
        )
    if config.isa is not None:
        raise InputError(
            "--isa limits the runtime on this machine, and not on the workers of a cluster",
            remedy="leave --ray or --isa out",
        )
    if config.answers is not None and not config.answers_elsewhere:
        raise InputError(
            "--answers keeps what the candidates of --precision auto answer to --eval-data",
            remedy="leave it out, or give both",
        )
