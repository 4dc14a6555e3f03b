"""What models return: the logits are found where they are unmistakable, and anything else is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import weakref
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmt_edge.cmt import choose_head, create_model
from cmt_edge.cmt.outputs import (
    Probe,
    TwoLabels,
    find_last_operation,
    is_one_probability,
    settle_output,
)
from cmt_edge.deploy.errors import InputError

CLASSES = 5
EXAMPLE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)

Named = namedtuple("Named", "logits aux_logits")
Two = namedtuple("Two", "first second")


@dataclasses.dataclass
class Record:
    scores: Tensor
    extra: Tensor | None = None


class ModelOutput(OrderedDict):
    """As in Hugging Face's transformers: a mapping whose values are attributes too."""


class Model(nn.Module):
    """Returns what ``form(logits, map)`` makes of its logits ``(N, classes)`` and a map ``(N, 4, 8, 8)``."""

    def __init__(self, form, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, classes)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        maps = self.conv(x)
        return self.form(self.fc(maps.mean((2, 3))), maps)


def logits_of(model: nn.Module, x: Tensor = EXAMPLE) -> Tensor:
    with torch.inference_mode():
        return model.eval()(x)


FOUND = {
    "a tensor": lambda y, m: y,
    "halves": lambda y, m: y.half(),
    "bfloat16": lambda y, m: y.bfloat16(),
    "doubles": lambda y, m: y.double(),
    "a map of one pixel": lambda y, m: y[..., None, None],
    "a vector of one column": lambda y, m: y[..., None],
    "a dictionary": lambda y, m: {"out": y},
    "a dictionary of a label": lambda y, m: {"label": y},
    "a dictionary of pooled features": lambda y, m: {"pool": y},
    "a dictionary of auxiliary logits": lambda y, m: {"aux_logits": y},
    "pooled logits": lambda y, m: {"pooled_logits": y},
    "pooled logits and hidden states": lambda y, m: {"hidden": m.mean((2, 3)), "pooled_logits": y},
    "logits of a token and the token": lambda y, m: {"cls_token": y * 2, "cls_token_logits": y},
    "logits by attention and the attention": lambda y, m: {"attn": y * 2, "attn_logits": y},
    "logits of labels and the labels": lambda y, m: {"label_logits": y, "label": y.softmax(1)},
    "scores and auxiliary logits": lambda y, m: {"scores": y, "aux_logits": y * 2},
    "scores and logits of a mask": lambda y, m: {"scores": y, "mask_logits": y * 2},
    "scores and logits of a loss": lambda y, m: {"scores": y, "loss_logits": y * 2},
    "logits and features": lambda y, m: {"features": m.mean((2, 3)), "logits": y},
    "one entry that can be logits": lambda y, m: {"pred": y, "embedding": m.mean((2, 3))},
    "logits among scores": lambda y, m: {"logits": y, "scores": y.softmax(1)},
    "logits and indices": lambda y, m: {"pred": y, "best": y.argmax(1)},
    "a tuple of logits and their argmax": lambda y, m: (y, y.argmax(1)),
    "logits and a mask": lambda y, m: {"vector": y, "mask": y > 0},
    "a ModelOutput": lambda y, m: ModelOutput(loss=None, logits=y, hidden_states=(m, m)),
    "a dataclass": lambda y, m: Record(y),
    "a named tuple": lambda y, m: Named(y, y),
    "a tuple of one": lambda y, m: (y,),
    "a list of one": lambda y, m: [y],
    "logits and nothing": lambda y, m: (y, None),
    "logits and a map": lambda y, m: (y, m),
    "a map and logits": lambda y, m: (m, y),
    "logits and a list of maps": lambda y, m: (y, [m, m]),
}


@pytest.mark.parametrize("form", FOUND)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_logits_are_found(form, count):
    model, plain = Model(FOUND[form]), Model(FOUND["a tensor"])
    assert settle_output(model, EXAMPLE, "m") == CLASSES
    x = torch.ones(count, 3, 8, 8)
    found = logits_of(model, x)
    assert (found.shape, found.dtype) == ((count, CLASSES), torch.float32)
    torch.testing.assert_close(found, logits_of(plain, x), atol=2e-2, rtol=0)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_plain_model_gets_no_hook_and_others_one_for_good():
    plain, odd = Model(FOUND["a tensor"]), Model(FOUND["a dictionary"])
    for _ in range(2):
        settle_output(plain, EXAMPLE, "m")
        settle_output(odd, EXAMPLE, "m")
    assert len(plain._forward_hooks) == 0  # noqa: SLF001 - PyTorch has no public name for it
    assert len(odd._forward_hooks) == 1  # noqa: SLF001
    assert torch.equal(logits_of(copy.deepcopy(odd)), logits_of(plain))


REFUSED = {
    "indices": (lambda y, m: y.argmax(1), "int64 (2,)"),
    "indices of one column": (lambda y, m: y.argmax(1, keepdim=True), "int64 (2, 1)"),
    "a mask": (lambda y, m: y > 0, "bool (2, 5)"),
    "a map": (lambda y, m: m, "float32 (2, 4, 8, 8)"),
    "a scalar": (lambda y, m: y.sum(), "float32 ()"),
    "two alike": (lambda y, m: (y, y), "0: float32 (2, 5), 1: float32 (2, 5)"),
    "two names": (lambda y, m: {"cls": y, "dist": y}, "cls: float32 (2, 5), dist: float32 (2, 5)"),
    "logits of two tokens": (
        lambda y, m: {"cls_token_logits": y, "dist_token_logits": y},
        "dist_token_logits: float32 (2, 5)",
    ),
    "logits and scores": (lambda y, m: {"label_logits": y, "scores": y}, "scores: float32 (2, 5)"),
    "features and nothing": (lambda y, m: {"embedding": y, "logs": None}, "embedding: float32 (2, 5)"),
    "a named tuple": (lambda y, m: Two(y, y), "first: float32 (2, 5)"),
    "topk": (lambda y, m: y.topk(3), "torch.topk"),
    "max": (lambda y, m: y.max(1), "torch.max"),
    "sort": (lambda y, m: y.sort(1), "torch.sort"),
    "topk in a dictionary": (
        lambda y, m: {"pred": y.topk(3).values, "best": y.topk(3).indices},
        "pred: float32 (2, 3), best: int64 (2, 3)",
    ),
    "topk in a tuple": (lambda y, m: tuple(y.topk(3)), "0: float32 (2, 3), 1: int64 (2, 3)"),
    "a score and a class": (
        lambda y, m: {"score": y.amax(1, keepdim=True), "class": y.argmax(1)},
        "class: int64 (2,)",
    ),
    "boxes": (lambda y, m: {"boxes": y[:, :4], "ids": y.argmax(1)}, "boxes: float32 (2, 4)"),
    "a tuple with other numbers": (lambda y, m: (y, y.argmin(1)), "1: int64 (2,)"),
    "a backbone": (
        lambda y, m: {"last_hidden_state": m.flatten(2), "pooler_output": y},
        "pooler_output: float32 (2, 5)",
    ),
    "integer logits": (lambda y, m: {"logits": y.long()}, "int64 (2, 5)"),
    "text": (lambda y, m: "cat", "str"),
    "nothing": (lambda y, m: None, "NoneType"),
    "an empty tuple": (lambda y, m: (), "tuple"),
    "an empty vector": (lambda y, m: y[:, :0], "float32 (2, 0)"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_logits_is_refused(form):
    make, named = REFUSED[form]
    with pytest.raises(InputError) as caught:
        settle_output(Model(make), EXAMPLE, "net:build")
    assert "net:build" in str(caught.value)
    assert named in str(caught.value)
    assert "float32 (N, classes)" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_type_becomes_a_float32_one(dtype):
    model, plain = Model(FOUND["a tensor"]).to(dtype), Model(FOUND["a tensor"])
    assert settle_output(model, EXAMPLE, "m") == CLASSES
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits_of(model), logits_of(plain), atol=2e-2, rtol=0)


def test_an_error_of_the_model_comes_out():
    with pytest.raises(ZeroDivisionError):
        settle_output(Model(lambda y, m: 1 / 0), EXAMPLE, "m")


# --- one logit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda y, m: y, lambda y, m: y.squeeze(-1), lambda y, m: y[:, 0]])
def test_one_logit_counts_as_one_class(form):
    model = Model(form, classes=1)
    assert settle_output(model, EXAMPLE, "m") == 1
    assert logits_of(model).shape == (2, 1)


def test_one_logit_becomes_two_classes():
    inner = Model(FOUND["a tensor"], classes=1)
    logit, pair = logits_of(inner), logits_of(TwoLabels(inner, False))
    assert pair.shape == (2, 2)
    positive = torch.sigmoid(logit)
    torch.testing.assert_close(pair.softmax(1), torch.cat([1 - positive, positive], 1))


@pytest.mark.parametrize("sure", [1.0, 100.0])
def test_one_probability_becomes_two(sure):
    inner = Model(lambda y, m: (sure * y).sigmoid(), classes=1)
    assert find_last_operation(inner.eval(), EXAMPLE).name == "sigmoid"
    pair = logits_of(TwoLabels(inner, True))
    torch.testing.assert_close(pair[:, 1:], logits_of(inner))
    torch.testing.assert_close(pair.sum(1), torch.ones(2))


def test_a_model_of_the_registry_with_one_class_has_two_labels():
    model = create_model("cmt_nano", num_classes=1, seed=0)
    x = torch.randn(3, 3, model.img_size, model.img_size, generator=torch.Generator().manual_seed(1))
    headed = choose_head(model, "logits")
    assert isinstance(headed, TwoLabels)
    assert not headed.probability
    torch.testing.assert_close(logits_of(headed, x)[:, 1:], logits_of(model, x))
    assert pickle.dumps(TwoLabels(nn.Identity(), True))


LAST = {
    "sigmoid": lambda y, m: y.sigmoid(),
    "softmax": lambda y, m: y.softmax(1),
    "log_softmax": lambda y, m: y.log_softmax(1),
    "one_hot": lambda y, m: nn.functional.one_hot(y.argmax(1), CLASSES),
    "linear": lambda y, m: y,
}


@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: y.half().float(), lambda y: y.squeeze().view(2, -1)])
def test_the_last_operation(name, wrap):
    model = Model(lambda y, m: wrap(LAST[name](y, m)))
    assert find_last_operation(model.eval(), EXAMPLE).name == name


def test_the_last_operation_is_found_without_keeping_activations():
    alive = []

    class Deep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            hidden = x.flatten(1) * 2
            seen = weakref.ref(hidden)
            hidden = hidden + 1
            alive.append(seen() is not None)
            return hidden.sigmoid()

    assert find_last_operation(Deep().eval(), EXAMPLE).name == "sigmoid"
    assert alive == [False]


@pytest.mark.parametrize(
    "last", [nn.Sigmoid(), nn.Sequential(nn.Identity(), nn.Sigmoid()), nn.functional.sigmoid, torch.sigmoid_]
)
def test_a_sigmoid_in_other_words(last):
    assert find_last_operation(Model(lambda y, m: last(y)).eval(), EXAMPLE).name == "sigmoid"


ONE = {
    "sigmoid": (lambda y, m: y.sigmoid(), True),
    "written out": (lambda y, m: 1 / (1 + (-y).exp()), True),
    "clamped": (lambda y, m: y.sigmoid().clamp(1e-6, 1 - 1e-6), True),
    "averaged": (lambda y, m: (y.sigmoid() + (1.1 * y).sigmoid()) / 2, True),
    "a logit": (lambda y, m: y, False),
    "a logit within 0 and 1": (lambda y, m: 0.5 + 1e-3 * y, False),
    "a rectified logit": (lambda y, m: (0.5 + 1e-3 * y).relu(), False),
    "tanh": (lambda y, m: y.tanh() - 0.1, False),
    "percent": (lambda y, m: 100 * y.sigmoid(), False),
}
"""What a model of one output returns, and whether it is a probability."""


@pytest.mark.parametrize("name", ONE)
def test_one_output_is_a_probability_where_nothing_takes_it_out_of_its_bounds(name):
    form, expected = ONE[name]
    model = Model(form, classes=1).eval()
    assert is_one_probability(model, EXAMPLE) is expected


def test_a_probe_finds_the_operation_that_decides_and_leaves_the_model_alone():
    """The last linear operation belongs to a head that is not returned."""

    class TwoHeads(Model):
        def forward(self, x):
            y = super().forward(x)
            self.fc(torch.zeros(1, 4))
            return y * 1.0

    model = TwoHeads(FOUND["a tensor"]).eval()
    before = logits_of(model)
    assert Probe(model, EXAMPLE).answers(1e3).abs().max() > 100 * before.abs().max()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("name", ["sort", "topk"])
def test_the_values_of_a_tuple_remember_their_operation(name):
    argument = 3 if name == "topk" else 1
    model = Model(lambda y, m: getattr(y, name)(argument)[0])
    assert find_last_operation(model, EXAMPLE).name == name
