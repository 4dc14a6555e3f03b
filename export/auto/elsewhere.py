"""What candidates answer to labelled images, computed by the workers of a cluster.

The images go through a candidate in the batches of :class:`~cmt_edge.deploy.measure.child.MeasuringProcess`,
so that the answers are those of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.measure.child import count_images_at_once
from cmt_edge.deploy.measure.host import read_versions
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.scale.answers import AnswersFolder
from cmt_edge.deploy.scale.cluster import Cluster
from cmt_edge.deploy.scale.evaluation import pack_bundle
from cmt_edge.deploy.scale.passes import Plan, answer_all
from cmt_edge.deploy.scale.records import Record
from cmt_edge.deploy.scale.sources import Source
from cmt_edge.deploy.scale.worker import Subject

from .. import steps
from ..config import ExportConfig


class ClusterAnswers:
    """The candidates' answers to the images of one source."""

    def __init__(self, cluster: Cluster, config: ExportConfig, source: Source, progress: Progress) -> None:
        self._cluster, self._config, self._source, self._progress = cluster, config, source, progress

    def compute_logits(self, path: Path, key: str, items: Sequence[Record]) -> np.ndarray:
        """Logits, float32 ``(N, classes)``.

        Args:
            path: of the candidate's bundle.
            key: tells the candidate from all others, also in a later run: its precision and its graph.
            items: the images.

        Raises:
            ImageError, DataError: images cannot be read; all others are answered.
            InputError: the folder for answers holds those of something else.
            ClusterError, ray.exceptions.RayError: the cluster cannot go on.
        """
        bundle, config = Bundle.open(path), self._config
        subject = Subject(
            title=key,
            bundle=pack_bundle(bundle),
            threads=config.threads or 1,
            check=bundle.manifest.precision == "fp32",
            source=self._source.address,
        )
        plan = Plan(
            items,
            count_images_at_once(config.batch),
            config.workers,
            bundle.labels,
            self._progress.count,
            waiting=steps.make_waiting(config, self._progress),
        )
        with self._open_folder(key, len(items)) as folder:
            kept = AnswersFolder(folder, self._describe(bundle, key, subject, plan))
            found = answer_all(self._cluster, subject, plan, kept)
        return found.logits

    def _describe(self, bundle: Bundle, key: str, subject: Subject, plan: Plan) -> dict[str, Any]:
        """Everything that answers depend on, for their folder."""
        return {
            "candidate": key,
            "runtime": bundle.manifest.format,
            "preprocessing": bundle.preprocess.to_json(),
            "source": self._source.path,
            "threads": subject.threads,
            "chunk": plan.chunk,
            "versions": read_versions(),
        }

    @contextmanager
    def _open_folder(self, key: str, count: int) -> Iterator[Path]:
        """The folder for a candidate's answers to ``count`` images, or one that ends with the run."""
        if self._config.answers is not None:
            yield Path(self._config.answers) / f"{key}-{count}"
            return
        with tempfile.TemporaryDirectory(prefix="cmt-edge-answers-") as name:
            yield Path(name) / "answers"
