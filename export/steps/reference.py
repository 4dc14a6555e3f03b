"""The reference model, what it answers to the golden images, and labelled images to judge by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import nn

from cmt_edge.calib.generated import generate, generate_photograph
from cmt_edge.cmt import choose_head
from cmt_edge.cmt.outside import OUTSIDE_FAMILIES
from cmt_edge.cmt.reference import load_reference
from cmt_edge.cmt.weights import LoadedWeights
from cmt_edge.deploy import Bundle, Preprocess
from cmt_edge.deploy.backends.torch import TorchSession
from cmt_edge.deploy.bundle import LOGITS, Golden
from cmt_edge.deploy.measure.labels import match_labels
from cmt_edge.deploy.measure.tolerance import measure_resolution
from cmt_edge.deploy.preprocessing import decode_pixels, normalise
from cmt_edge.deploy.scale.sources import Source, open_source

from ..config import ExportConfig
from ..outputs import identify_outputs, require_finite
from ..refusals import require_single_answers

GOLDEN_IMAGES = 5
"""Number of golden images in a bundle."""

GOLDEN_SEED = 7
"""Seed of the golden images."""

GOLDEN_MARGIN = 1.3
"""Size of a golden image before preprocessing, in sizes of the input, so that resizing is checked too."""


@dataclass(frozen=True)
class Reference:
    """The untouched PyTorch side of every comparison.

    Attributes:
        classifier: the model as it was loaded, in eval mode.
        model: the classifier with the head that was asked for.
        loaded: where its weights came from.
        golden: the golden images and what ``model`` makes of them.
        batch: the golden images preprocessed, float32 ``(K, 3, S, S)``.
        kind: what the outputs of a classifier are: logits, probabilities or scores.
    """

    classifier: nn.Module
    model: nn.Module
    loaded: LoadedWeights
    golden: Golden
    batch: np.ndarray
    kind: str = LOGITS

    @property
    def outputs(self) -> list[np.ndarray]:
        """What ``model`` makes of ``batch``, float32 ``(K, ...)`` each."""
        return self.golden.outputs

    @property
    def resolution(self) -> float:
        """How coarse the model itself rounds its outputs, relative to the largest one; mostly 0."""
        return max(measure_resolution(output) for output in self.outputs)


@dataclass(frozen=True)
class Evaluation:
    """Labelled images, and the logit of each of their class folders."""

    images: Source
    targets: dict[str, int]


def make_reference(config: ExportConfig) -> Reference:
    """The model with the weights that were asked for, and its answers to the golden images.

    Raises:
        WeightsError: the weights cannot be read, or do not fit.
        InputError: the model's answers are no logits and no probabilities, or numbers that it takes from one
            image decide the answer to another one.
    """
    classifier, loaded = load_reference(
        config.subject,
        config.weights,
        img_size=config.img_size,
        num_classes=config.classes,
        seed=config.seed,
        ema=config.ema,
        fresh_head=config.fresh_head,
        resize=config.resize_position_bias,
    )
    model = choose_head(classifier, config.head)
    golden, batch = make_golden(model, config.preprocess)
    require_finite(golden.outputs)
    if config.spec.family in OUTSIDE_FAMILIES:
        require_single_answers(model, batch, golden.outputs)
    kind = identify_outputs(model, batch, golden.logits) if config.head == LOGITS else LOGITS
    return Reference(classifier, model, loaded, golden, batch, kind)


def make_golden(model: nn.Module, spec: Preprocess) -> tuple[Golden, np.ndarray]:
    """Golden images with what ``model`` makes of them, and the images preprocessed, ``(K, 3, S, S)``.

    The last one is a JPEG image that is large enough to be decoded at half its size, where that is asked for.
    """
    sources = generate(
        GOLDEN_IMAGES - 1,
        round(GOLDEN_MARGIN * spec.size),
        seed=GOLDEN_SEED,
    )
    enlarged = 2 * spec.reducing_gap + 0.5
    sources.append(generate_photograph(math.ceil(enlarged * (spec.short_side or spec.size)), GOLDEN_SEED))
    decoded = np.stack([decode_pixels(source, spec) for source in sources])
    batch = normalise(decoded, spec)
    return Golden(sources, decoded, TorchSession(model).run(batch)), batch


def match_evaluation(config: ExportConfig, bundle: Bundle) -> Evaluation:
    """The labelled images for evaluation, matched with the labels of a bundle, of which only the manifest is
    read.

    Raises:
        DataError: the images cannot be used, or their folders are not the labels.
    """
    labelled = open_labelled(config)
    return Evaluation(labelled, match_labels(bundle, labelled, config.by_order))


def open_labelled(config: ExportConfig) -> Source:
    """The labelled images for evaluation.

    Raises:
        DataError: they cannot be used.
        RuntimeMissingError: it is a table or a URL, and pyarrow is not installed.
    """
    if config.eval_data is None:
        raise ValueError("no images for evaluation were given")
    return open_source(config.eval_data)
