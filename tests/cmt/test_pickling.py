"""What ``create_model`` returns can be pickled: saved whole, sent to another process, copied."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cmt_edge.cmt import create_model, find_model, fuse
from cmt_edge.cmt.objects import make_object_spec
from cmt_edge.cmt.outside import make_outside_spec
from cmt_edge.cmt.user_files import find_path, import_file, make_name
from cmt_edge.deploy.errors import InputError

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    img_size = 32

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return {"logits": self.fc(self.body(x)), "embedding": x}

def build(num_classes=3):
    torch.manual_seed(0)
    return Net(num_classes)
"""

LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)), sys.argv[2])
"""
"""A process that knows nothing but the saved model."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with ``pickled_net.py``, the current one."""
    (tmp_path / "pickled_net.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    make_outside_spec.cache_clear()
    yield tmp_path
    make_outside_spec.cache_clear()
    for name in [name for name in sys.modules if "pickled_net" in name]:
        del sys.modules[name]


def answer(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))


NAMES = ["pickled_net.py:build", "pickled_net:build"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_users_model_is_copied_and_pickled(folder, name, again):
    model = create_model(name, num_classes=4)
    other = again(model)
    assert torch.equal(answer(other), answer(model))
    assert other.spec == model.spec
    assert torch.equal(answer(fuse(other)), answer(fuse(model)))
    built = other.spec.constructor(other.spec.config, img_size=32, num_classes=5)
    assert built.num_classes == 5


def load_elsewhere(saved: Path, where: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD, str(saved), str(where / "answer.pt")]
    return subprocess.run(command, cwd=where, capture_output=True, check=False, text=True, timeout=120)


def test_a_whole_model_of_a_file_is_loaded_by_another_process(folder):
    model = create_model("pickled_net.py:build")
    torch.save(model, folder / "whole.pt")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    done = load_elsewhere(folder / "whole.pt", elsewhere)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(elsewhere / "answer.pt")
    torch.testing.assert_close(theirs, answer(model).clone())


def test_a_whole_model_of_a_file_that_is_gone_says_so(folder):
    torch.save(create_model("pickled_net.py:build"), folder / "whole.pt")
    (folder / "pickled_net.py").rename(folder / "moved.py")
    done = load_elsewhere(folder / "whole.pt", folder)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"classes of the file {folder / 'pickled_net.py'}, which does not exist here" in last
    assert "state_dict()" in last


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pickled_net.py:build", "pickled_net:build", "cmt_nano"])
def test_a_spawned_process_gets_the_model(folder, name):
    """As ``torch.multiprocessing.spawn`` does for DistributedDataParallel."""
    model = create_model(name, img_size=32, seed=0)
    script = folder / "spawn.py"
    script.write_text(
        "import sys, torch, torch.multiprocessing as mp\n"
        "from cmt_edge.cmt import create_model\n"
        "def work(rank, model, path):\n"
        "    torch.save(model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)), path)\n"
        "if __name__ == '__main__':\n"
        "    model = torch.load(sys.argv[1], weights_only=False)\n"
        "    mp.spawn(work, (model, sys.argv[2]), nprocs=1)\n"
    )
    torch.save(model, folder / "model.pt")
    command = [sys.executable, str(script), str(folder / "model.pt"), str(folder / "answer.pt")]
    subprocess.run(command, check=True, cwd=folder, timeout=120)
    torch.testing.assert_close(torch.load(folder / "answer.pt"), answer(model).clone())


def test_a_module_object_does_not_travel_with_its_copy(folder):
    net = find_model("pickled_net.py:build").constructor(None, img_size=32, num_classes=3)
    copied = create_model(net)
    other = pickle.loads(pickle.dumps(copied))
    assert torch.equal(answer(other), answer(copied))
    with pytest.raises(InputError, match="does not exist any more"):
        other.spec.constructor(other.spec.config, img_size=32, num_classes=3)
    assert make_object_spec(other).num_classes == 3


# --- the names of modules in files ----------------------------------------------------------------


@pytest.mark.parametrize("path", ["/a/b.py", "/ä/ö net.v2.py", "/" + "long/" * 40 + "x.py"])
def test_the_name_of_a_module_tells_its_file(path):
    name = make_name(Path(path))
    assert find_path(name) == Path(path)
    assert "." not in name.removeprefix("cmt_edge.cmt.user_files.")


@pytest.mark.parametrize("name", ["blocks", "my_blocks", "net_a", "net_mfrgg"])
def test_another_name_tells_none(name):
    assert find_path(f"cmt_edge.cmt.user_files.{name}") is None
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        __import__(f"cmt_edge.cmt.user_files.{name}")


def test_a_file_named_like_a_module_of_ours_hides_nothing(folder):
    (folder / "cmt.py").write_text(SOURCE)
    (folder / "torch.py").write_text(SOURCE)
    for name in ("cmt.py", "torch.py"):
        assert import_file(folder / name).Net.__module__.startswith("cmt_edge.cmt.user_files.")
    assert sys.modules["torch"] is torch
