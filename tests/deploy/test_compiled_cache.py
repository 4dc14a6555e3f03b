"""What runtimes have made of a graph and is kept: the same bits, only what this machine sealed, and never a
reason to fail."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

ov = pytest.importorskip("openvino")
ort = pytest.importorskip("onnxruntime")

from cmt_edge.deploy import Bundle, Predictor  # noqa: E402
from cmt_edge.deploy import cache as cache_module  # noqa: E402
from cmt_edge.deploy import files as files_module  # noqa: E402
from cmt_edge.deploy.backends import keeping  # noqa: E402
from cmt_edge.deploy.bundle import ONNX  # noqa: E402
from cmt_edge.deploy.cli import bench as cmt_bench  # noqa: E402
from cmt_edge.deploy.cli import predict as cmt_predict  # noqa: E402
from cmt_edge.deploy.cli import verify as cmt_verify  # noqa: E402
from cmt_edge.deploy.errors import BundleError, CacheWarning  # noqa: E402
from helpers.images import coloured_folder  # noqa: E402
from helpers.kept_models import WAYS, Way, answer  # noqa: E402
from helpers.paths import ROOT  # noqa: E402

REAL = [
    ("fp32_bundle", None),
    ("int8_bundle", None),
    ("int8_bundle", "onnxruntime"),
    ("int8_onnx_bundle", None),
]
"""Bundles of a real model, and what runs them."""
pytestmark = pytest.mark.usefixtures("own_folders")
SECONDS = 120
"""A process that takes longer hangs."""


@pytest.fixture(params=list(WAYS))
def way(request) -> Way:
    return WAYS[request.param]


@pytest.fixture
def bundle(tmp_path, way) -> Bundle:
    return way.make_bundle(tmp_path / "tiny")


def test_the_second_start_makes_nothing_anew_and_gives_the_same_bits(bundle, way, monkeypatch):
    expected, _ = answer(bundle, cache=False)
    assert way.list_entries() == []
    assert answer(bundle) == (expected, False)
    assert way.list_suffixes() == sorted([way.suffix, ".seal"])
    way.instead_of_making(monkeypatch, lambda: pytest.fail("it was made anew"))
    assert answer(bundle) == (expected, True)


@pytest.mark.parametrize(("name", "backend"), REAL)
def test_a_real_model_gives_the_same_bits(request, name, backend):
    bundle = request.getfixturevalue(name)
    size = bundle.preprocess.size
    batch = np.random.default_rng(1).standard_normal((1, 3, size, size)).astype(np.float32)
    found = []
    for cache in (False, True, True):
        with Predictor.load(bundle.path, backend=backend, threads=1, cache=cache) as predictor:
            found.append((predictor.session.is_from_cache, predictor.logits(batch).tobytes()))
    assert [is_from_cache for is_from_cache, _ in found] == [False, False, True]
    assert len({logits for _, logits in found}) == 1


def test_the_settings_are_part_of_the_key(tmp_path):
    bundle = WAYS["openvino"].make_bundle(tmp_path / "tiny")
    answer(bundle)
    for options in ({"threads": 1}, {"throughput": True}, {"threads": 1, "throughput": True}):
        assert not answer(bundle, **options)[1], options
        assert answer(bundle, **options)[1], options


def test_variables_of_the_runtime_are_part_of_the_key(bundle, way, monkeypatch):
    answer(bundle)
    is_openvino = way.format == "openvino"
    own, other = ("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ORT_LOAD_CONFIG_FROM_MODEL", "0")
    with monkeypatch.context() as patch:
        patch.setenv(*(own if is_openvino else other))
        assert not answer(bundle)[1]
    monkeypatch.setenv(*(other if is_openvino else own))
    assert answer(bundle)[1]


def test_the_runtime_the_machine_and_the_files_are_part_of_the_key(bundle, way, tmp_path, monkeypatch):
    answer(bundle)
    with monkeypatch.context() as patch:
        patch.setattr(ov if way.format == "openvino" else ort, "__version__", "2030.1")
        assert not answer(bundle)[1]
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "PROCESSORS", tmp_path / "cpuinfo")
        (tmp_path / "cpuinfo").write_text("flags : avx2\n\nflags : avx2\n")
        assert not answer(bundle)[1]
    other = way.make_bundle(tmp_path / "other", labels=("a", "b"))
    assert not answer(other)[1]
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    assert answer(copy)[1], "the same files in another place"
    assert answer(bundle)[1]


def flip(blob: Path) -> None:
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)


def truncate(blob: Path) -> None:
    os.truncate(blob, blob.stat().st_size // 2)


def empty(blob: Path) -> None:
    blob.write_bytes(b"")


def break_seal(blob: Path) -> None:
    blob.with_suffix(".seal").write_bytes(b"\xff" * 64)


def take_another(blob: Path) -> None:
    """Put an entry that this machine sealed under another key in the place of this one."""
    (other,) = [path for path in blob.parent.glob(f"*{blob.suffix}") if path != blob]
    for suffix in (blob.suffix, ".seal"):
        shutil.copy(other.with_suffix(suffix), blob.with_suffix(suffix))


def change_secret(blob: Path) -> None:
    """The entry comes from another machine."""
    (Path(os.environ["CMT_EDGE_STATE"]) / "machine.key").write_bytes(b"x" * 32)


@pytest.mark.parametrize("damage", [flip, truncate, empty, break_seal, take_another, change_secret])
def test_what_this_machine_did_not_write_so_is_never_opened(bundle, way, tmp_path, monkeypatch, damage):
    expected, _ = answer(bundle)
    (blob,) = way.list_entries()
    answer(way.make_bundle(tmp_path / "other", labels=("a", "b")))
    damage(blob)
    with monkeypatch.context() as patch:
        way.instead_of_opening(patch, lambda: pytest.fail("it was opened"))
        with pytest.warns(CacheWarning) as told:
            assert answer(bundle) == (expected, False)
    text = f"{way.what} in the cache was not used, because it is not as this machine wrote it"
    assert sum(text in str(warning.message) for warning in told) == 1
    assert answer(bundle) == (expected, True)


@pytest.mark.skipif(os.name != "posix", reason="needs permissions of POSIX")
@pytest.mark.parametrize(("name", "mode"), [("machine.key", 0o644), ("machine.key", 0o602), (".", 0o777)])
def test_a_secret_that_every_user_knows_or_replaces_seals_nothing(bundle, name, mode):
    expected, _ = answer(bundle)
    (Path(os.environ["CMT_EDGE_STATE"]) / name).chmod(mode)
    with pytest.warns(CacheWarning, match="every user may"):
        assert answer(bundle) == (expected, False)


def test_a_sealed_model_that_the_runtime_refuses_is_made_again(bundle, way, monkeypatch):
    expected, _ = answer(bundle)

    def refuse():
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        way.instead_of_opening(patch, refuse)
        with pytest.warns(CacheWarning, match="cannot be opened; it was made again"):
            assert answer(bundle) == (expected, False)


def test_half_an_entry_is_none(bundle, way):
    expected, _ = answer(bundle)
    (blob,) = way.list_entries()
    blob.unlink()
    assert answer(bundle) == (expected, False)
    blob.with_suffix(".seal").unlink()
    assert answer(bundle) == (expected, False)
    assert answer(bundle) == (expected, True)


def test_no_cache_reads_and_writes_nothing(bundle, way, monkeypatch, tmp_path, call):
    image = next(coloured_folder(tmp_path / "images").rglob("*.png"))
    answer(bundle, cache=False)
    assert call(cmt_predict.main, bundle.path, image, "--no-cache")[0] == 0
    monkeypatch.setenv("CMT_EDGE_NO_CACHE", "1")
    answer(bundle)
    assert not Path(os.environ["CMT_EDGE_CACHE"]).exists()
    assert not Path(os.environ["CMT_EDGE_STATE"]).exists()
    monkeypatch.setenv("CMT_EDGE_NO_CACHE", "0")
    answer(bundle)
    assert way.list_entries()
    assert not answer(bundle, cache=False)[1]


def test_verifying_and_measuring_compile_anew(bundle, way, call):
    answer(bundle)
    before = {path: path.stat().st_mtime_ns for path in way.list_entries()}
    time.sleep(0.01)
    assert call(cmt_verify.main, bundle.path)[0] == 0
    assert call(cmt_bench.main, bundle.path, "--iters", 1, "--seconds", 0.01, "--warmup", 1)[0] == 0
    after = {path: path.stat().st_mtime_ns for path in way.list_entries()}
    assert after == before, "the use of an entry is dated"


def test_verbose_tells_where_the_time_went(bundle, tmp_path, call):
    image = next(coloured_folder(tmp_path / "images").rglob("*.png"))
    for source in ("compiling the model", "opening the compiled model from the cache"):
        code, out, err = call(cmt_predict.main, bundle.path, image, "-v")
        assert code == 0
        assert len(out.splitlines()) == 1
        (line,) = err.splitlines()
        assert line.startswith("time: ")
        parts = (
            "opening and hashing",
            "importing the runtime",
            source,
            "decoding",
            "inference",
            "first answer",
        )
        for part in parts:
            assert part in line
    assert "time:" not in call(cmt_predict.main, bundle.path, image)[2]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_who_may_not_read_the_bundle_may_not_read_what_is_kept(bundle, way):
    (bundle.path / ONNX).chmod(0o600)
    answer(bundle)
    (blob,) = way.list_entries()
    assert stat.S_IMODE(blob.stat().st_mode) == 0o600


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_nothing_costs_only_the_keeping(bundle, way, monkeypatch, number):
    expected, _ = answer(bundle, cache=False)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files_module, "_write_new", refuse)
    (Path(os.environ["CMT_EDGE_STATE"])).mkdir()
    (Path(os.environ["CMT_EDGE_STATE"]) / "machine.key").write_bytes(b"s" * 32)
    with pytest.warns(CacheWarning, match="results are not kept for the next run"):
        assert answer(bundle) == (expected, False)
    assert way.list_entries() == []


def test_without_a_secret_nothing_is_kept(bundle, monkeypatch, tmp_path):
    expected, _ = answer(bundle, cache=False)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "file" / "state"))
    with pytest.warns(CacheWarning, match="CMT_EDGE_STATE"):
        assert answer(bundle) == (expected, False)
    assert not Path(os.environ["CMT_EDGE_CACHE"]).exists()


def test_a_read_only_cache_that_is_filled_serves(bundle, monkeypatch):
    expected, _ = answer(bundle)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache_module, "locked", refuse)
    monkeypatch.setattr(files_module, "_write_new", refuse)
    assert answer(bundle) == (expected, True)


def test_a_graph_that_the_manifest_does_not_describe_is_refused_from_the_cache_too(bundle, way, tmp_path):
    answer(bundle)
    wrong = way.make_bundle(tmp_path / "wrong", labels=("a", "b"))
    content = (bundle.path / ONNX).read_bytes()
    other = way.make_bundle(tmp_path / "again", labels=("a", "b"), members={ONNX: content})
    assert other.manifest.files[ONNX] == bundle.manifest.files[ONNX] != wrong.manifest.files[ONNX]
    with pytest.raises(BundleError, match="not what the manifest says"):
        answer(other)


def test_a_file_that_changes_while_it_is_compiled_is_never_kept(bundle, way, tmp_path, monkeypatch):
    """Its hash would stand for another model at every later start."""

    def exchange():
        content = (bundle.path / ONNX).read_bytes()
        (bundle.path / ONNX).write_bytes(content[:-1] + b"\0")

    way.instead_of_making(monkeypatch, exchange, first=True)
    with pytest.raises(BundleError, match="changed while it was being opened"):
        answer(bundle)
    assert way.list_entries() == []


def test_models_that_were_not_used_for_longest_are_dropped(way, monkeypatch, tmp_path):
    bundles = [way.make_bundle(tmp_path / labels, labels=tuple(labels)) for labels in ("ab", "abc", "abcd")]
    monkeypatch.setattr(way.module, "KEEP", 2)
    for bundle in bundles:
        answer(bundle)
        for path in way.list_entries():
            os.utime(path, (path.stat().st_mtime - 60, path.stat().st_mtime - 60))
    assert len(way.list_entries()) == 2
    assert [answer(bundle)[1] for bundle in bundles[1:]] == [True, True]
    monkeypatch.setattr(way.module, "MOST_BYTES", 1)
    answer(bundles[0])
    assert len(way.list_entries()) == 1


LOAD = """
import sys
from cmt_edge import Predictor
import numpy as np
with Predictor.load(sys.argv[1], backend=sys.argv[2] or None) as predictor:
    size = predictor.spec.size
    print(predictor.logits(np.ones((1, 3, size, size), np.float32)).tobytes().hex())
"""
"""Opens a bundle and prints the bits of an answer."""


def start(bundle: Bundle, code: str = LOAD, backend: str = "") -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-W", "error", "-c", code, str(bundle.path), backend]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_that_start_at_once_do_not_disturb_each_other(bundle, way):
    processes = [start(bundle) for _ in range(4)]
    answers = {process.communicate(timeout=SECONDS)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(answers) == 1
    assert way.list_suffixes() == sorted([way.suffix, ".seal"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_process_that_is_killed_leaves_nothing_half_written(int8_bundle, way):
    """At many moments; what the next process finds is whole or is not there."""
    backend = next(name for name, other in WAYS.items() if other is way)
    for delay in np.linspace(0.4, 1.6, 7):
        process = start(int8_bundle, backend=backend)
        time.sleep(delay)
        process.kill()
        process.communicate()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        with Predictor.load(int8_bundle.path, backend=backend) as predictor:
            assert predictor.loading
    assert all(stat.S_ISREG(path.stat().st_mode) for path in way.list_entries())


FORK = """
import faulthandler, os, sys
import numpy as np
from cmt_edge.deploy import Predictor

def answer():
    with Predictor.load(sys.argv[1]) as predictor:
        size = predictor.spec.size
        batch = np.ones((1, 3, size, size), np.float32)
        return predictor.logits(batch).tobytes(), predictor.loading.is_from_cache

faulthandler.dump_traceback_later(100, exit=True)
expected, _ = answer()
child = os.fork()
if child == 0:
    os._exit(0 if answer() == (expected, True) else 5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_opens_what_its_parent_kept(bundle):
    """In a process of its own: a child of the test run would inherit the locks of whatever ran before."""
    process = start(bundle, FORK)
    said = process.communicate(timeout=SECONDS)[0]
    assert (process.returncode, said.strip()) == (0, "0")


def test_one_warning_for_the_whole_cache(bundle, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(CacheWarning) as told:
        answer(bundle)
    assert len(told) == 1
    assert "CMT_EDGE_CACHE=FOLDER" in str(told[0].message)


def test_a_finding_about_a_graph_is_kept_and_never_taken_from_others(bundle, monkeypatch):
    """The hash of every file is compared all the same."""
    from cmt_edge.deploy.bundle import contents

    answer(bundle)
    monkeypatch.setattr(contents, "require_modest_onnx", lambda *_: pytest.fail("it was looked at again"))
    answer(bundle)
    with monkeypatch.context() as patch:
        looked: list[object] = []
        patch.setattr(contents, "require_modest_onnx", looked.append)
        Bundle.open(bundle.path)
        assert len(looked) == 1, "cmt-verify and others look again"
        (finding,) = (Path(os.environ["CMT_EDGE_CACHE"]) / "checked").glob("*.seal")
        finding.write_text("0" * 64)
        with pytest.warns(CacheWarning, match="finding about a bundle's graphs"):
            answer(bundle)
        assert len(looked) == 2
    (bundle.path / ONNX).write_bytes((bundle.path / ONNX).read_bytes()[:-1] + b"\1")
    with pytest.raises(BundleError, match="changed after the export"):
        answer(bundle)
