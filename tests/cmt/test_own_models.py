"""Models of the user's own with habits that break exporters: what is exported, what is refused, and why."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from cmt_edge.cmt import count_macs, create_model, find_model, try_macs
from cmt_edge.cmt.outside import make_outside_spec
from cmt_edge.deploy.errors import InputError, UnknownNameError
from cmt_edge.export import ExportConfig, run

pytestmark = pytest.mark.usefixtures("brief_measurements")

SOURCE = '''
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

class Base(nn.Module):
    img_size = 32

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, 5)

    def mid(self, x):
        return x

    def forward(self, x):
        return self.fc(self.mid(self.stem(x)).mean((2, 3)))

class PlainTensor(Base):
    def __init__(self):
        super().__init__()
        self.pos = torch.randn(1, 16, 8, 8)
    def mid(self, x):
        return x + self.pos

class ListOfTensors(Base):
    def __init__(self):
        super().__init__()
        self.grids = [torch.randn(1, 16, 8, 8) for _ in range(2)]
    def mid(self, x):
        return x + self.grids[0] + self.grids[1]

class MadeInForward(Base):
    def mid(self, x):
        return x / torch.tensor([0.2, 0.3] * 8).view(16, 1, 1)

class FromNumpy(Base):
    def mid(self, x):
        return x * torch.from_numpy(np.linspace(0, 1, 8, dtype=np.float32))

class Item(Base):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(2.0))
    def mid(self, x):
        return x * self.t.item()

class Hook(Base):
    def __init__(self):
        super().__init__()
        self.seen = []
        self.stem.register_forward_hook(lambda module, args, out: self.seen.append(out.mean().item()))

class Kept(Base):
    """Keeps a map of a call that was made with gradients."""
    def __init__(self):
        super().__init__()
        self.last = None
        self(torch.zeros(2, 3, 32, 32))
    def mid(self, x):
        self.last = x * 2
        return self.last

class Training(Base):
    def __init__(self):
        super().__init__()
        self.train()

class Drop(Base):
    def mid(self, x):
        return F.dropout(x, 0.3)

class RareDrop(Base):
    def mid(self, x):
        return x * (torch.rand(x.shape[0], 1, 1, 1) > 0.1)

class NumpyNoise(Base):
    def mid(self, x):
        return x + float(np.random.rand())

class Counting(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0
    def mid(self, x):
        self.calls += 1
        return x * self.calls

class EvalIgnored(Base):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)
    def train(self, mode=True):
        return self
    def mid(self, x):
        return self.drop(x)

class BatchNorm(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(16, track_running_stats=False)
    def mid(self, x):
        return self.norm(x)

class BatchMean(Base):
    def mid(self, x):
        return x - x.mean(0, keepdim=True)

class SlightBatchMean(Base):
    def mid(self, x):
        return x - 1e-2 * x.mean(0, keepdim=True)

class Unique(Base):
    def mid(self, x):
        return x * torch.unique(x.round()).numel()

class Chosen(Base):
    """Scales every answer of the batch by a number that it takes from the first image."""
    def forward(self, x):
        y = super().forward(x)
        k = int(100 * x[0].mean().abs())
        return y * (k + 1)

class ChosenBySlice(Base):
    def forward(self, x):
        y = super().forward(x)
        shift = y[0].max().item()
        return y + round(shift, 1)

class ChosenAlone(Base):
    """Logs a number of each image, which changes nothing."""
    def forward(self, x):
        self.last = float(x[0].mean())
        return super().forward(x)

class Squeezed(Base):
    def forward(self, x):
        return super().forward(x).squeeze()

class OwnGenerator(Base):
    def mid(self, x):
        generator = torch.Generator().manual_seed(1)
        return x + torch.randn(x.shape[1:], generator=generator)

class Autocast(Base):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)

class InNumpy(Base):
    def forward(self, x):
        y = super().forward(x)
        return -y if np.mean(x.numpy()) < -1.5 else y

class ItemBranch(Base):
    def forward(self, x):
        y = super().forward(x)
        return -y if x.mean().item() < -1.5 else y

class ListBranch(Base):
    def forward(self, x):
        means = x.mean((1, 2, 3)).tolist()
        return torch.stack([-r if m < -1.5 else r for r, m in zip(super().forward(x), means)])

class UnusedNoise(Base):
    """Draws numbers without any use of them."""
    def mid(self, x):
        torch.rand(1)
        return x

model = Base()
wrong = [Base()]

def scripted():
    return torch.jit.script(Base().eval())

def traced():
    return torch.jit.trace(Base().eval(), torch.zeros(1, 3, 32, 32))

class Sized(Base):
    """Takes 48 pixels alone, and does not say so."""
    img_size = None
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16 * 12 * 12, 5)
    def forward(self, x):
        return self.fc(self.stem(x).flatten(1))
'''

EXPORTED = ["PlainTensor", "ListOfTensors", "MadeInForward", "FromNumpy", "Item", "Hook", "Kept", "Training"]

REFUSED = {
    "Drop": ("asked twice", "random numbers"),
    "RareDrop": ("asked twice", "random numbers"),
    "NumpyNoise": ("asked twice", "from call to call"),
    "Counting": ("asked twice", "from call to call"),
    "EvalIgnored": ("asked twice", "drop (Dropout)"),
    "BatchNorm": ("beside another one", "norm (BatchNorm2d)"),
    "SlightBatchMean": ("beside another one", "look into SlightBatchMean.forward"),
    "Unique": ("beside another one", "look into Unique.forward"),
    "Squeezed": (r"shape \(5,\), not \(1, 5\)", "batch axis is lost"),
    "BatchMean": ("beside another one", "look into BatchMean.forward"),
    "scripted": ("TorchScript module", "(Base)"),
    "traced": ("TorchScript module", "(Base)"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with ``habits.py``, the current one."""
    (tmp_path / "habits.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "habits", raising=False)
    make_outside_spec.cache_clear()
    yield tmp_path
    make_outside_spec.cache_clear()


@pytest.mark.parametrize("name", EXPORTED)
def test_a_habit_is_exported(folder, name):
    made = run(ExportConfig(f"habits:{name}", format="onnx", output="out"))
    entry = json.loads((made.path / "manifest.json").read_text())["model"]
    assert entry["macs"] > 1000
    assert entry["weights"]["source"] == "as built"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("name", REFUSED)
def test_a_habit_is_refused_with_its_reason(folder, name):
    what, why = REFUSED[name]
    with pytest.raises(InputError, match=what) as error:
        ExportConfig(f"habits:{name}").check()
    assert why in str(error.value)
    assert error.value.remedy


UNTRACED = {
    "OwnGenerator": ("torch.Generator", "self.mid("),
    "Autocast": ("bfloat16", "self.stem(x)"),
    "InNumpy": ("NumPy", "np.mean(x.numpy())"),
    "ItemBranch": ("values of the image", "x.mean().item() < -1.5"),
    "ListBranch": ("values of the image", "torch.stack([-r if m < -1.5"),
}
"""Factory -> what a refusal of the trace says, and the user's code that it names."""


@pytest.mark.parametrize("name", UNTRACED)
def test_what_cannot_be_traced_is_refused_with_the_line_and_without_noise(folder, name, capsys):
    what, line = UNTRACED[name]
    with pytest.raises(InputError, match=what) as error:
        run(ExportConfig(f"habits:{name}", format="onnx", output="out"))
    assert line in str(error.value)
    assert "\x1b" not in str(error.value)
    assert error.value.remedy
    assert capsys.readouterr().err.count("\n") < 5


CHOSEN = {
    "Chosen": "k = int(100 * x[0].mean().abs())",
    "ChosenBySlice": "shift = y[0].max().item()",
}


@pytest.mark.parametrize("name", CHOSEN)
def test_numbers_of_one_image_that_decide_of_another_are_named(folder, name, monkeypatch):
    """Where a probe with two images of noise does not see them, the golden images do."""
    monkeypatch.setattr("cmt_edge.cmt.single_answers._require_one_answer", lambda *_: None)
    with pytest.raises(InputError, match="takes a Python number from the values of one image") as error:
        run(ExportConfig(f"habits:{name}", format="onnx", output="out"))
    assert CHOSEN[name] in str(error.value.where)
    assert "torch.where" in error.value.remedy


def test_numbers_that_decide_nothing_are_no_fault(folder):
    assert run(ExportConfig("habits:ChosenAlone", format="onnx", output="out")).manifest


def test_a_module_object_in_a_file_is_taken(folder):
    spec = find_model("habits.py:model")
    assert spec.num_classes == 5
    first, second = create_model("habits.py:model"), create_model("habits.py:model")
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert first.fc.weight is not second.fc.weight
    with pytest.raises(UnknownNameError):
        find_model("habits.py:wrong")


def test_a_file_without_a_factory_gets_its_names(folder):
    (folder / "net.py").write_text("raise OSError\nclass Net: pass\ndef _own(): pass\ndef build(): pass\n")
    with pytest.raises(InputError, match="needs the name of the factory") as error:
        find_model("net.py")
    assert error.value.remedy == "give PATH/FILE.py:FACTORY, for example net.py:build, net.py:Net"
    (folder / "net.py").write_bytes(b"\x00(")
    with pytest.raises(InputError, match="needs the name of the factory"):
        find_model("./net.py")
    with pytest.raises(InputError, match="no such file"):
        find_model("gone/net.py")


def test_numbers_that_are_drawn_but_not_used_are_no_fault(folder):
    assert find_model("habits:UnusedNoise").num_classes == 5


def test_the_size_that_was_asked_for_is_tried(folder):
    with pytest.raises(InputError, match="224 pixels") as error:
        ExportConfig("habits:Sized").check()
    assert "--imgsz" in error.value.remedy
    made = run(ExportConfig("habits:Sized", imgsz=48, format="onnx", output="out"))
    assert made.manifest.input.shape[-1] == 48


@pytest.mark.parametrize("path", ["habits.py", "./habits.py", "sub/cmt.py"])
def test_a_factory_in_a_file(folder, path):
    (folder / "sub").mkdir()
    (folder / "sub" / "cmt.py").write_text("import beside\nfrom beside import build as PlainTensor")
    (folder / "sub" / "beside.py").write_text(f"{SOURCE}\ndef build():\n    return PlainTensor()")
    assert find_model(f"{path}:PlainTensor").num_classes == 5
    assert find_model(f"{folder / path}:PlainTensor").num_classes == 5


def test_a_file_that_is_not_there_or_cannot_be_imported(folder):
    with pytest.raises(InputError, match="no such file"):
        find_model("gone.py:build")
    (folder / "broken.py").write_text("raise OSError('no disk')")
    for _ in range(2):  # what failed once is not taken for imported
        with pytest.raises(InputError, match="OSError: no disk"):
            find_model("broken.py:build")


def test_macs_that_cannot_be_counted_are_unknown():
    class Picky(nn.Module):
        img_size = 32

        def forward(self, x):
            raise RuntimeError("not under a counter")

    assert try_macs(Picky()) is None
    with pytest.raises(RuntimeError):
        count_macs(Picky())


def test_counting_leaves_the_model_as_it_was():
    model = create_model("cmt_nano", seed=0)
    model.stages[0].train()
    before = {name: module.training for name, module in model.named_modules()}
    mean = model.stem[0].norm.running_mean.clone()
    count_macs(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(model.stem[0].norm.running_mean, mean)


def test_the_fused_attention_of_pytorch_is_counted():
    """In eval mode, these modules call operations that a counter does not know."""

    class Encoder(nn.Module):
        img_size = 8

        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, x):
            return self.layer(x.flatten(2).transpose(1, 2).repeat(1, 1, 6)[..., :16]).mean(1)

    tokens, width = 64, 16
    linears = 3 * width * width + width * width + 2 * width * 32
    products = 2 * tokens * width
    assert count_macs(Encoder().eval()) == tokens * (linears + products)
    assert torch.backends.mha.get_fastpath_enabled()


class Indexed(nn.Module):
    """A buffer that has the name which torch.onnx gives to the result of indexing."""

    img_size = 32

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 16, 3, 4, 1), nn.Linear(16, 5)
        self.bias = nn.Parameter(torch.randn(9, 16))
        self.register_buffer("index", torch.arange(64).reshape(8, 8) % 9)

    def forward(self, x):
        q, k = self.stem(x).chunk(2, 1)
        x = torch.cat([k, q], 1) + self.bias[self.index].permute(2, 0, 1)
        return self.fc(x.mean((2, 3)))


def test_a_buffer_may_be_called_like_an_operation(tmp_path):
    made = run(ExportConfig(Indexed(), format="onnx", output=str(tmp_path)))
    assert made.manifest.verification.passed
