"""Files of checkpoints: told apart by their content, and read without running code."""

from __future__ import annotations

import collections
import contextlib
import functools
import gzip
import os
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cmt_edge.cmt import create_model, load_weights
from cmt_edge.deploy.errors import WeightsError
from helpers.weights import GOOD, holds, nano, result_of, saved, trained


@pytest.mark.parametrize("name", ["m.SAFETENSORS", "m.bin", "m.pth", "m.ckpt", "m"])
def test_safetensors_of_any_name(tmp_path, name):
    saved(tmp_path, GOOD, "m.safetensors").rename(tmp_path / name)
    model = nano()
    load_weights(model, tmp_path / name)
    assert holds(model, GOOD)


@pytest.mark.parametrize("name", ["m.safetensors", "m.PTH", "m.pth.tar", "m.ckpt", "m.bin", "m"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_of_any_name(tmp_path, name, zipped):
    torch.save({"state_dict": GOOD}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    model = nano()
    load_weights(model, tmp_path / name)
    assert holds(model, GOOD)


@pytest.mark.parametrize("text", ["hello", "epoch,loss\n1,0.5\n", "\x00\x01"])
def test_why_a_file_of_something_else_is_refused_is_said_in_words(tmp_path, text):
    (tmp_path / "m.pth").write_text(text)
    with pytest.raises(WeightsError) as caught:
        load_weights(nano(), tmp_path / "m.pth")
    assert re.search("[a-z]{2}", str(caught.value.why))


def make_foreign(path: Path, kind: str) -> None:
    texts = {
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n",
        "saved web page": b"\n <!DOCTYPE html><html><body>Virus scan warning</body></html>",
        "XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "JSON": b'{"weight_map": {}}',
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "GGUF": b"GGUF" + bytes(64),
        "empty": b"",
    }
    if kind in texts:
        path.write_bytes(texts[kind])
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    elif kind == "torch.export":
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    elif kind == "gzip":
        path.write_bytes(gzip.compress(b"weights"))
    elif kind == "tar archive":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "a.py")
    elif kind == "ZIP archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "x")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "kind",
    [
        "Git LFS pointer",
        "saved web page",
        "XML",
        "JSON",
        "HDF5",
        "GGUF",
        "empty",
        "TorchScript",
        "torch.export",
        "npz",
        "gzip",
        "tar archive",
        "ZIP archive",
    ],
)
def test_other_files_are_named_as_what_they_are(tmp_path, kind, suffix):
    path = tmp_path / f"model{suffix}"
    with (
        contextlib.suppress(UserWarning),
        pytest.warns() if kind == "TorchScript" else contextlib.nullcontext(),
    ):
        make_foreign(path, kind)
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint: it is") as error:
        load_weights(nano(), path)
    assert kind in error.value.what
    assert error.value.remedy


class Call:
    """A pickle that calls ``function``."""

    def __init__(self, function, *values) -> None:
        self.function, self.values = function, values

    def __reduce__(self):
        return self.function, self.values


ATTACKS = {
    "os.mkdir": lambda victim: Call(os.mkdir, victim),
    "os.system": lambda victim: Call(os.system, f"mkdir {victim}"),
    "eval": lambda victim: Call(eval, f"__import__('os').mkdir({victim!r})"),
    "exec": lambda victim: Call(exec, f"__import__('os').mkdir({victim!r})"),
    "getattr": lambda victim: Call(getattr, "a", "upper"),
    "np.load": lambda victim: Call(np.load, victim, None, True),
    "np.fromfile": lambda victim: Call(np.memmap, victim, "u1", "w+", 0, (4,)),
    "Path.mkdir": lambda victim: Call(Path.mkdir, Path(victim)),
    "open": lambda victim: Call(open, victim, "w"),
    "torch.load": lambda victim: Call(torch.load, victim),
    "a class of ours": lambda victim: Call(create_model, "cmt_nano"),
    "a partial": lambda victim: Call(__import__("functools").partial, os.mkdir, victim),
    "a dictionary's factory": lambda victim: Call(collections.defaultdict, Call(os.mkdir, victim)),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_checkpoint_runs(tmp_path, attack, zipped):
    victim, path = tmp_path / "victim", tmp_path / "evil.pth"
    content = {"model": GOOD, "x": ATTACKS[attack](str(victim))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="refused: the file asks to run code"):
        load_weights(nano(), path)
    assert not victim.exists()


class ForgedArray:
    """An array whose bytes would be taken for pointers to objects by NumPy's own constructor."""

    def __init__(self, code: str, data: object) -> None:
        self.code, self.data = code, data

    def __reduce__(self):
        make, values, _ = np.zeros(1).__reduce__()
        kind = np.dtype(self.code)
        return make, values, (1, (2,), kind, False, self.data)


@pytest.mark.parametrize(
    ("code", "data"),
    [("O", b"A" * 16), ("f8", b"A" * 3), ("f8", "A" * 3), ("f8", 7)],
)
def test_forged_arrays_are_refused(tmp_path, code, data):
    with pytest.raises(WeightsError, match=r"cannot be read|refused"):
        load_weights(nano(), saved(tmp_path, {"model": GOOD, "x": ForgedArray(code, data)}))


@pytest.mark.parametrize("code", ["V8", "M8[s]", "m8[s]"])
def test_arrays_that_nobody_reads_are_skipped(tmp_path, code):
    result_of(tmp_path, {"model": GOOD, "x": ForgedArray(code, b"A" * 3)})


def test_a_partial_among_the_settings_is_named(tmp_path):
    content = {"model": GOOD, "cfg": {"optimizer": functools.partial(int, base=2)}}
    with pytest.raises(WeightsError, match="refused") as error:
        load_weights(nano(), saved(tmp_path, content))
    assert "functools.partial" in str(error.value.why)
    assert "save the weights without these settings" in error.value.remedy


def test_a_whole_model_is_refused(tmp_path):
    torch.save(trained(), tmp_path / "whole.pt")
    with pytest.raises(WeightsError, match="refused") as error:
        load_weights(nano(), tmp_path / "whole.pt")
    assert "state_dict()" in error.value.remedy


def test_the_allowed_names_are_known():
    """A name that is added here must be looked at by somebody."""
    from cmt_edge.cmt.unpickling import ALLOWED

    modules = {name.rpartition(".")[0] for _, name in ALLOWED}
    assert modules == {
        "argparse",
        "builtins",
        "collections",
        "datetime",
        "decimal",
        "mmengine.logging.history_buffer",
        "numpy",
        "numpy._core.multiarray",
        "numpy.core.multiarray",
        "pathlib",
        "pathlib._local",
        "types",
        "uuid",
    }
    ours = {made.__module__ for made, _ in ALLOWED}
    assert ours == {"argparse", "cmt_edge.cmt.unpickling"}


def test_a_defaultdict_of_another_factory_calls_nothing(tmp_path):
    result_of(tmp_path, {"model": GOOD, "log": collections.defaultdict(int, a=1)})
