"""An engine that came with a bundle is native code: it is opened for a signature or for the user's word."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import PORTABLE_ENGINE, BundleWriter
from cmt_edge.deploy.cli import bench, predict, verify
from cmt_edge.deploy.errors import BundleError, RuntimeMissingError, SignatureError
from cmt_edge.deploy.measure.benchmark import benchmark
from cmt_edge.deploy.measure.parity import verify as run_verify
from cmt_edge.deploy.measure.timing import Protocol
from helpers.bundles import edit_manifest
from helpers.images import RED
from helpers.trt import forget_fakes, make_plan, make_rtx_bundle

pytest.importorskip("cryptography", reason="signatures need the extra 'sign'")

from helpers.keys import write_pair

COMMANDS = {
    predict: (),
    verify: (),
    bench: ("--iters", "2", "--seconds", "0", "--warmup", "1", "--no-throughput"),
}
"""Command -> its flags besides those of a test."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("keys"), "sign")


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    """With an engine from another machine, unsigned."""
    return make_rtx_bundle(tmp_path / "tiny_fp16_rtx")


@pytest.fixture
def signed(bundle, keys, tmp_path) -> Bundle:
    """The same, signed as ``cmt-export --sign`` does."""
    with BundleWriter(tmp_path / "signed") as writer:
        for name in bundle.manifest.files:
            (writer.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(bundle.path / name, writer.folder / name)
        return writer.commit(bundle.manifest, keys[0])


def run(command, bundle: Bundle, *flags: object) -> int:
    forget_fakes()
    image = bundle.path.parent / "red.png"
    image.write_bytes(RED)
    words = [bundle.path, *([image] if command is predict else []), *COMMANDS[command], *flags]
    return command.main([*map(str, words), "-q"])


@pytest.mark.parametrize("command", COMMANDS)
def test_without_key_or_flag_it_stays_closed(gpu_machine, signed, capsys, command):
    assert run(command, signed) == 3
    said = capsys.readouterr().err
    assert "built on another machine" in said
    for way in ("cmt-build", "--key KEY", "--trust-engine"):
        assert way in said
    assert not gpu_machine.exists(), "nothing was deserialised"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_key_that_signed_it_opens_it(gpu_machine, signed, keys, capsys, command):
    assert run(command, signed, "--key", keys[1]) == 0, capsys.readouterr().err
    assert gpu_machine.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_another_key_is_refused(gpu_machine, signed, tmp_path, capsys, command):
    _, other = write_pair(tmp_path, "other")
    assert run(command, signed, "--key", other) == 1
    assert "another key" in capsys.readouterr().err
    assert run(command, signed, "--key", other, "--trust-engine") == 1, "the flag replaces no wrong key"
    assert not gpu_machine.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flag_opens_it_without_a_signature(gpu_machine, bundle, keys, capsys, command):
    assert run(command, bundle, "--key", keys[1]) == 1
    assert "not signed" in capsys.readouterr().err
    assert not gpu_machine.exists()
    assert run(command, bundle, "--trust-engine") == 0, capsys.readouterr().err
    assert gpu_machine.exists()


def test_in_python(gpu_machine, signed, keys, tmp_path):
    with Predictor.load(signed.path, key=keys[1]) as predictor:
        assert predictor(RED).label == "red"
    with pytest.raises(RuntimeMissingError, match="another machine") as caught:
        Predictor.load(signed.path)
    assert "trusted_engine=True" in caught.value.remedy
    _, other = write_pair(tmp_path, "other")
    with pytest.raises(SignatureError, match="another key"):
        Predictor.load(signed.path, key=other, trusted_engine=True)


def test_verifying_and_measuring_in_python(gpu_machine, bundle):
    protocol = Protocol(iters=2, seconds=0.0, warmup_iters=1, warmup_seconds=0.0)
    with pytest.raises(RuntimeMissingError, match="another machine"):
        run_verify(bundle)
    with pytest.raises(RuntimeMissingError, match="another machine"):
        benchmark([bundle], protocol=protocol)
    assert not gpu_machine.exists()
    assert run_verify(bundle, trusted_engine=True).passed
    assert benchmark([bundle], protocol=protocol, trusted_engine=True).results


def test_the_flag_counts_for_the_reference(gpu_machine, bundle, capsys):
    assert run(verify, bundle, "--reference", bundle.path) == 3
    assert run(verify, bundle, "--reference", bundle.path, "--trust-engine") == 0, capsys.readouterr().err


def test_a_changed_engine_stays_closed_even_with_the_flag(gpu_machine, signed, keys):
    (signed.path / PORTABLE_ENGINE).write_bytes(make_plan() + b" ")
    for flags in ({"trusted_engine": True}, {"key": keys[1]}):
        with pytest.raises(BundleError):
            Predictor.load(signed.path, **flags)
    assert not gpu_machine.exists()


def test_an_exchanged_engine_breaks_the_signature(gpu_machine, signed, keys):
    """Whoever can write the bundle can make its hashes right, but cannot sign them."""
    engine = make_plan() + b" "
    (signed.path / PORTABLE_ENGINE).write_bytes(engine)

    def exchange(content: dict) -> None:
        entry = {"size": len(engine), "sha256": hashlib.sha256(engine).hexdigest()}
        content["files"][PORTABLE_ENGINE] = entry

    edit_manifest(signed, exchange)
    with pytest.raises(SignatureError, match="changed after"):
        Predictor.load(signed.path, key=keys[1])
    with pytest.raises(RuntimeMissingError, match="another machine"):
        Predictor.load(signed.path)
    assert not gpu_machine.exists()
