"""Every reader of files of strangers takes blind mutations for a moment; ``scripts/fuzz.py`` takes longer."""

from __future__ import annotations

import importlib.util
import random

import pytest

from cmt_edge.deploy.errors import InputError, StepError
from helpers.fuzzing import Findings, Target, fuzz, list_targets, mutations, seal

SECONDS = 1.0
"""Time of each target."""

NAMES = (
    "manifest", "signature", "graph", "golden vectors", "reference answers", "packed bundle", "image",
    "image, turned", "JPEG scan", "archive", "settings", "labels", "labels in JSON", "checkpoint",
    "safetensors",
)  # fmt: skip
"""Every target."""


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMT_EDGE_CACHE", "")
        yield list_targets(tmp_path_factory.mktemp("fuzz"))


def test_the_list_is_complete(targets):
    assert tuple(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_read(targets, name):
    """Otherwise mutations would only find what is refused at once."""
    target = targets[name]
    require(target)
    findings = Findings()
    for data in target.seeds:
        findings.attempt(target, data)
    assert (findings.found, findings.refused) == ({}, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_only_errors_of_ours_come_out(targets, name):
    require(targets[name])
    findings = fuzz(targets[name], SECONDS)
    assert findings.found == {}
    assert findings.executions > len(targets[name].seeds)


def require(target: Target) -> None:
    if target.needs and importlib.util.find_spec(target.needs) is None:
        pytest.skip(f"needs {target.needs}")


def test_what_is_no_error_of_ours_is_found():
    def run(data: bytes) -> None:
        if data.startswith(b"a"):
            raise InputError("refused")
        if data.startswith(b"b"):
            raise StepError("exit code 4")
        raise KeyError(data)

    findings = Findings()
    for data in (b"a", b"b", b"c", b"c"):
        findings.attempt(Target("x", run, ()), data)
    assert (findings.executions, findings.refused, len(findings.found)) == (4, 2, 2)


def test_the_same_seed_makes_the_same_inputs():
    target = Target("x", len, (b'{"a": [1, {"b": 2}]}', b'{"c": ""}'), is_json=True)
    first, second = (mutations(target, random.Random(3)) for _ in range(2))
    made = [next(first) for _ in range(300)]
    assert made == [next(second) for _ in range(300)]
    assert len(set(made)) > 100


def test_the_seal_of_a_manifest_is_right(targets):
    (data, _) = targets["manifest"].seeds
    targets["manifest"].run(seal(data.replace(b'"checksum": "', b'"checksum": "0')))
    with pytest.raises(InputError, match="checksum"):
        targets["manifest"].run(b" " + data.replace(b'"checksum": "', b'"checksum": "0'))
