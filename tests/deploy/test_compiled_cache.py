"""Compiled models that are kept: the same bits, only what this machine sealed, and never a reason to fail."""

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

from cmt_edge.deploy import Bundle, Predictor  # noqa: E402
from cmt_edge.deploy import cache as cache_module  # noqa: E402
from cmt_edge.deploy import files as files_module  # noqa: E402
from cmt_edge.deploy.backends import openvino_cache  # noqa: E402
from cmt_edge.deploy.bundle import ONNX  # noqa: E402
from cmt_edge.deploy.cli import bench as cmt_bench  # noqa: E402
from cmt_edge.deploy.cli import predict as cmt_predict  # noqa: E402
from cmt_edge.deploy.cli import verify as cmt_verify  # noqa: E402
from cmt_edge.deploy.errors import BundleError, CacheWarning  # noqa: E402
from helpers.bundles import SIZE, make_bundle  # noqa: E402
from helpers.images import coloured_folder  # noqa: E402
from helpers.paths import ROOT  # noqa: E402

BATCH = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)
SECONDS = 120
"""A process that takes longer hangs."""


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Every test has an empty cache and a secret of its own."""
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(cache_module, "_reported", set())


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "tiny", format="openvino")


def answer(bundle: Bundle | Path, **options) -> tuple[bytes, bool]:
    """The bits of an answer, and whether the model came from the cache."""
    path = bundle.path if isinstance(bundle, Bundle) else bundle
    with Predictor.load(path, **options) as predictor:
        assert predictor.loading.is_from_cache == predictor.session.is_from_cache
        return predictor.logits(BATCH).tobytes(), predictor.loading.is_from_cache


def list_blobs() -> list[Path]:
    return sorted((Path(os.environ["CMT_EDGE_CACHE"]) / "openvino").glob("*.blob"))


def list_all() -> list[str]:
    return sorted(path.name for path in (Path(os.environ["CMT_EDGE_CACHE"]) / "openvino").iterdir())


def test_the_second_start_compiles_nothing_and_gives_the_same_bits(bundle, monkeypatch):
    expected, _ = answer(bundle, cache=False)
    assert list_blobs() == []
    assert answer(bundle) == (expected, False)
    assert [Path(name).suffix for name in list_all()] == [".blob", ".seal"]
    monkeypatch.setattr(ov.Core, "compile_model", lambda *_: pytest.fail("it was compiled"))
    assert answer(bundle) == (expected, True)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_real_model_gives_the_same_bits(request, precision):
    bundle = request.getfixturevalue(f"{precision}_bundle")
    size = bundle.preprocess.size
    batch = np.random.default_rng(1).standard_normal((1, 3, size, size)).astype(np.float32)
    found = []
    for _ in range(2):
        with Predictor.load(bundle.path, threads=1) as predictor:
            found.append((predictor.session.is_from_cache, predictor.logits(batch).tobytes()))
            executed = predictor.session.executed(batch, repeats=1).operations
            kinds = {name for name, count in executed.items() if count}
            found[-1] += (tuple(sorted(kinds)),)
    (first, *answers), (second, *others) = found
    assert (first, second) == (False, True)
    assert answers == others


def test_the_settings_are_part_of_the_key(bundle, monkeypatch):
    answer(bundle)
    for options in ({"threads": 1}, {"throughput": True}, {"threads": 1, "throughput": True}):
        assert not answer(bundle, **options)[1], options
        assert answer(bundle, **options)[1], options
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not answer(bundle)[1]


def test_the_runtime_the_machine_and_the_files_are_part_of_the_key(bundle, tmp_path, monkeypatch):
    answer(bundle)
    with monkeypatch.context() as patch:
        patch.setattr(ov, "__version__", "2030.1")
        assert not answer(bundle)[1]
    with monkeypatch.context() as patch:
        patch.setattr(openvino_cache, "PROCESSORS", tmp_path / "cpuinfo")
        (tmp_path / "cpuinfo").write_text("flags : avx2\n\nflags : avx2\n")
        assert not answer(bundle)[1]
    other = make_bundle(tmp_path / "other", format="openvino", labels=("a", "b"))
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
    (other,) = [path for path in list_blobs() if path != blob]
    for suffix in (".blob", ".seal"):
        shutil.copy(other.with_suffix(suffix), blob.with_suffix(suffix))


def change_secret(blob: Path) -> None:
    """The entry comes from another machine."""
    (Path(os.environ["CMT_EDGE_STATE"]) / "machine.key").write_bytes(b"x" * 32)


@pytest.mark.parametrize("damage", [flip, truncate, empty, break_seal, take_another, change_secret])
def test_what_this_machine_did_not_write_so_is_never_opened(bundle, tmp_path, monkeypatch, damage):
    expected, _ = answer(bundle)
    (blob,) = list_blobs()
    answer(make_bundle(tmp_path / "other", format="openvino", labels=("a", "b")))
    damage(blob)
    with monkeypatch.context() as patch:
        patch.setattr(ov.Core, "import_model", lambda *_: pytest.fail("it was opened"))
        with pytest.warns(CacheWarning) as told:
            assert answer(bundle) == (expected, False)
    text = "compiled model in the cache was not used, because it is not as this machine wrote it"
    assert sum(text in str(warning.message) for warning in told) == 1
    assert answer(bundle) == (expected, True)


def test_a_sealed_model_that_the_runtime_refuses_is_made_again(bundle, monkeypatch):
    expected, _ = answer(bundle)

    def refuse(*_):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(ov.Core, "import_model", refuse)
        with pytest.warns(CacheWarning, match="cannot be opened; it was made again"):
            assert answer(bundle) == (expected, False)


def test_half_an_entry_is_none(bundle):
    expected, _ = answer(bundle)
    (blob,) = list_blobs()
    blob.unlink()
    assert answer(bundle) == (expected, False)
    blob.with_suffix(".seal").unlink()
    assert answer(bundle) == (expected, False)
    assert answer(bundle) == (expected, True)


def test_no_cache_reads_and_writes_nothing(bundle, monkeypatch, tmp_path, call):
    image = next(coloured_folder(tmp_path / "images").rglob("*.png"))
    answer(bundle, cache=False)
    assert call(cmt_predict.main, bundle.path, image, "--no-cache")[0] == 0
    monkeypatch.setenv("CMT_EDGE_NO_CACHE", "1")
    answer(bundle)
    assert not Path(os.environ["CMT_EDGE_CACHE"]).exists()
    assert not Path(os.environ["CMT_EDGE_STATE"]).exists()
    monkeypatch.setenv("CMT_EDGE_NO_CACHE", "0")
    answer(bundle)
    assert list_blobs()
    assert not answer(bundle, cache=False)[1]


def test_verifying_and_measuring_compile_anew(bundle, call):
    answer(bundle)
    before = {path: path.stat().st_mtime_ns for path in list_blobs()}
    time.sleep(0.01)
    assert call(cmt_verify.main, bundle.path)[0] == 0
    assert call(cmt_bench.main, bundle.path, "--iters", 1, "--seconds", 0.01, "--warmup", 1)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in list_blobs()} == before, "the use of an entry is dated"


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
def test_who_may_not_read_the_bundle_may_not_read_what_is_kept(bundle):
    (bundle.path / ONNX).chmod(0o600)
    answer(bundle)
    (blob,) = list_blobs()
    assert stat.S_IMODE(blob.stat().st_mode) == 0o600


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_nothing_costs_only_the_keeping(bundle, monkeypatch, number):
    expected, _ = answer(bundle, cache=False)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files_module, "_write_new", refuse)
    (Path(os.environ["CMT_EDGE_STATE"])).mkdir()
    (Path(os.environ["CMT_EDGE_STATE"]) / "machine.key").write_bytes(b"s" * 32)
    with pytest.warns(CacheWarning, match="results are not kept for the next run"):
        assert answer(bundle) == (expected, False)
    assert list_blobs() == []


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


def test_a_graph_that_the_manifest_does_not_describe_is_refused_from_the_cache_too(bundle, tmp_path):
    answer(bundle)
    wrong = make_bundle(tmp_path / "wrong", format="openvino", labels=("a", "b"))
    content = (bundle.path / ONNX).read_bytes()
    other = make_bundle(tmp_path / "again", format="openvino", labels=("a", "b"), members={ONNX: content})
    assert other.manifest.files[ONNX] == bundle.manifest.files[ONNX] != wrong.manifest.files[ONNX]
    with pytest.raises(BundleError, match="not what the manifest says"):
        answer(other)


def test_a_file_that_changes_while_it_is_compiled_is_never_kept(bundle, tmp_path, monkeypatch):
    """Its hash would stand for another model at every later start."""
    compile_model = ov.Core.compile_model

    def exchange(*args):
        compiled = compile_model(*args)
        content = (bundle.path / ONNX).read_bytes()
        (bundle.path / ONNX).write_bytes(content[:-1] + b"\0")
        return compiled

    monkeypatch.setattr(ov.Core, "compile_model", exchange)
    with pytest.raises(BundleError, match="changed while it was being compiled"):
        answer(bundle)
    assert list_blobs() == []


def test_models_that_were_not_used_for_longest_are_dropped(bundle, monkeypatch):
    monkeypatch.setattr(openvino_cache, "KEEP", 2)
    for threads in (1, 2, 3):
        answer(bundle, threads=threads)
        for path in list_blobs():
            os.utime(path, (path.stat().st_mtime - 60, path.stat().st_mtime - 60))
    assert len(list_blobs()) == 2
    assert [answer(bundle, threads=threads)[1] for threads in (2, 3)] == [True, True]
    monkeypatch.setattr(openvino_cache, "MOST_BYTES", 1)
    answer(bundle, threads=4)
    assert len(list_blobs()) == 1


LOAD = """
import sys
from cmt_edge import Predictor
import numpy as np
with Predictor.load(sys.argv[1]) as predictor:
    size = predictor.spec.size
    print(predictor.logits(np.ones((1, 3, size, size), np.float32)).tobytes().hex())
"""
"""Opens a bundle and prints the bits of an answer."""


def start(bundle: Bundle, code: str = LOAD) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-W", "error", "-c", code, str(bundle.path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_that_start_at_once_do_not_disturb_each_other(bundle):
    processes = [start(bundle) for _ in range(4)]
    answers = {process.communicate(timeout=SECONDS)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(answers) == 1
    assert [Path(name).suffix for name in list_all()] == [".blob", ".seal"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_that_is_killed_leaves_nothing_half_written(int8_bundle):
    """At many moments; what the next process finds is whole or is not there."""
    for delay in np.linspace(0.4, 1.6, 7):
        process = start(int8_bundle)
        time.sleep(delay)
        process.kill()
        process.communicate()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        with Predictor.load(int8_bundle.path) as predictor:
            assert predictor.loading
    assert all(stat.S_ISREG(path.stat().st_mode) for path in list_blobs())


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
