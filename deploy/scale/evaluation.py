"""A bundle and its reference over labelled images on a cluster, with the answers of a serial run."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import has_runtime
from ..bundle import MANIFEST, Bundle
from ..errors import InputError
from ..measure.answering import Answers, Labelled, count_chunk, make_no_reference_error
from ..measure.host import read_versions
from ..measure.parity import check_golden
from ..predictor import Predictor
from . import passes
from .answers import AnswersFolder, require_answers
from .cluster import Cluster
from .passes import Plan, answer_all
from .records import Record
from .sources import Source
from .waiting import LIMIT_S, Waiting
from .worker import Subject

BUNDLE_FOLDER, REFERENCE_FOLDER = "bundle", "reference"
"""Folders of the answers of the bundle, and of those of its reference."""


@dataclass(frozen=True)
class Settings:
    """How the images are answered.

    Attributes:
        address: of the cluster, :data:`.cluster.LOCAL` for one on this machine.
        answers: where the answers are kept; ``None``: nowhere.
        workers: number of them; ``None``: as many as there are cores for.
        backend, device, threads, weights, trusted_model, trusted_engine: as
            :meth:`cmt_edge.deploy.Predictor.load`; one thread by default, because each core has a worker.
        atol: allowed golden logit difference of a worker; default by precision.
        progress: called with what is done, images done and total.
        note: called with what a user should know.
        wait_s: seconds to wait for a cluster without free cores.
    """

    address: str
    answers: Path | None = None
    workers: int | None = None
    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    weights: str | None = None
    trusted_model: str | None = None
    trusted_engine: bool = False
    atol: float | None = None
    progress: Callable[[str, float], None] | None = None
    note: Callable[[str], None] | None = None
    wait_s: float = LIMIT_S


def make_answerer(
    bundle: Bundle,
    reference: Bundle | None,
    settings: Settings,
) -> Callable[[Predictor, Labelled], Answers]:
    """What :func:`cmt_edge.deploy.measure.parity.verify` takes as ``answer``."""

    def answer(predictor: Predictor, labelled: Labelled) -> Answers:
        return answer_both(bundle, reference, predictor, labelled, settings)

    return answer


def answer_both(
    bundle: Bundle,
    reference: Bundle | None,
    predictor: Predictor,
    labelled: Labelled,
    settings: Settings,
) -> Answers:
    """Both sides over the images.

    Args:
        bundle: what is checked.
        reference: another bundle; ``None``: what ``bundle`` recorded, or the PyTorch model.
        predictor: of ``bundle``, on this machine.
        labelled: the images, of a :class:`.sources.Source`.
        settings: where and how.

    Raises:
        RuntimeMissingError: there is no cluster, or nobody knows the reference's answers.
        ClusterError: the cluster cannot go on.
        DataError: images cannot be read.
        InputError: the folder of answers is of something else.
    """
    if not isinstance(labelled.data, Source):
        raise TypeError("a cluster answers the images of open_source()")
    cluster = Cluster(settings.address, settings.threads or 1)
    with cluster, _opened(settings.answers) as folder:
        is_verified = check_golden(bundle, predictor, settings.atol).passed
        run = _Run(cluster, predictor, labelled.data, labelled.items, settings, folder, is_verified)
        ours = run.answer(bundle, None)
        recorded = {} if reference else bundle.reference()
        if recorded and all(digest in recorded for digest in ours.digests):
            theirs = np.array([recorded[digest] for digest in ours.digests])
            return Answers(ours.logits.argmax(1), theirs, ours.digests, None, "the bundle's record")
        if reference is None and not has_runtime("torch"):
            raise make_no_reference_error(bundle)
        expected = run.answer(reference or bundle, REFERENCE_FOLDER, by_torch=reference is None)
    if expected.digests != ours.digests:
        raise InputError(
            "images were changed between the answers of the bundle and those of its reference",
            where=labelled.data.path,
            remedy="run the command again, with a new folder for --answers",
        )
    return Answers(
        ours.logits.argmax(1),
        expected.logits.argmax(1),
        ours.digests,
        np.abs(ours.logits - expected.logits),
        json.loads(expected.workers[0])["runtime"],
    )


@dataclass(frozen=True)
class _Run:
    """What both passes share; ``is_verified``: whether the golden images are answered as recorded here."""

    cluster: Cluster
    predictor: Predictor
    source: Source
    items: Sequence[Record]
    settings: Settings
    folder: Path
    is_verified: bool

    def answer(self, bundle: Bundle, side: str | None, by_torch: bool = False) -> passes.Answers:
        """The answers of one side; ``side`` names the reference's folder."""
        settings, is_reference = self.settings, side is not None
        subject = Subject(
            title=bundle.title,
            bundle=pack_bundle(bundle),
            backend="torch" if by_torch else None if is_reference else settings.backend,
            device=None if is_reference else settings.device,
            threads=settings.threads or 1,
            weights=settings.weights if by_torch else None,
            trusted_model=settings.trusted_model if by_torch else None,
            trusted_engine=settings.trusted_engine,
            check=not is_reference and self.is_verified,
            atol=settings.atol,
            source=self.source.address,
        )
        phase = "the reference's answers" if is_reference else "the bundle's answers"
        plan = Plan(
            self.items,
            count_chunk(self.predictor),
            settings.workers,
            bundle.labels,
            _make_report(settings, phase),
            waiting=Waiting(settings.wait_s, settings.note),
        )
        target = self.folder / (side or BUNDLE_FOLDER)
        answers = answer_all(
            self.cluster, subject, plan, AnswersFolder(target, _describe(bundle, self.source, subject, plan))
        )
        self._tell(phase, answers, plan)
        return answers

    def _tell(self, phase: str, answers: passes.Answers, plan: Plan) -> None:
        """What a user should know of a pass."""
        tell, kept = self.settings.note, len(plan.records) - answers.computed
        if tell is None:
            return
        if kept:
            tell(f"{kept} of {phase} were there already")
        kinds = {(worker["cpu"], *worker["flags"]) for worker in map(json.loads, answers.workers)}
        if len(kinds) > 1:
            names = ", ".join(sorted({kind[0] for kind in kinds}))
            tell(f"{phase} are from {len(kinds)} kinds of processors ({names}), whose last bits may differ")


def _make_report(settings: Settings, phase: str) -> Callable[[int, int], None] | None:
    progress = settings.progress
    if progress is None:
        return None
    return lambda done, total: progress(phase, done / max(1, total))


def _describe(bundle: Bundle, source: Source, subject: Subject, plan: Plan) -> dict[str, Any]:
    """Everything that answers depend on, for their folder."""
    return {
        "bundle": hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest(),
        "preprocessing": bundle.preprocess.to_json(),
        "source": source.path,
        "backend": subject.backend,
        "device": subject.device,
        "threads": subject.threads,
        "weights": subject.weights,
        "model": subject.trusted_model,
        "chunk": plan.chunk,
        "versions": read_versions(),
    }


def pack_bundle(bundle: Bundle) -> bytes:
    """A bundle as the bytes of one file, for workers that do not see its folder."""
    with tempfile.TemporaryDirectory(prefix="cmt-edge-") as folder, bundle.kept():
        file = Path(folder) / "bundle.cmtb"
        bundle.pack(file)
        return file.read_bytes()


@contextmanager
def _opened(answers: Path | None) -> Iterator[Path]:
    """The folder for the answers, or one that ends with the run."""
    if answers is not None:
        require_answers(answers, (BUNDLE_FOLDER, REFERENCE_FOLDER))
        yield answers
        return
    with tempfile.TemporaryDirectory(prefix="cmt-edge-answers-") as name:
        yield Path(name)
