"""Trains or fine-tunes a model on class folders, ready for cmt-export.

The settings are those that the embedded cmt_nano was trained with.

python examples/train_cifar10.py --init pretrained --data flowers/train --eval-data flowers/test --epochs 10
-o flowers.pt
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cmt_edge.cmt import create_model, find_model, find_published_labels, load_pretrained, load_weights
from cmt_edge.deploy.cli.console import make_parser, run_command
from cmt_edge.deploy.cli.output import say
from cmt_edge.deploy.cli.ranges import parse_finite
from cmt_edge.deploy.decoding import NamedBytes
from cmt_edge.deploy.errors import DataError, GateError, InputError, OutputError, RuntimeMissingError
from cmt_edge.deploy.files import write_atomic, writing
from cmt_edge.deploy.folders import Item
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.preprocessing import Preprocess, decode_pixels, normalise
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.report import to_json
from cmt_edge.export import ExportConfig

SMOOTHING = 0.1
"""Share of the target that is spread over all classes (label smoothing)."""

DECAY = 0.05
"""Weight decay of AdamW, for the matrices and kernels."""

EMA_DECAY = 0.999
"""Share of the averaged weights that a step keeps."""

CLIP = 5.0
"""Largest norm of a gradient."""

WARM_UP = 0.05
"""Share of the training in which the learning rate rises."""

CACHE_BYTES = 4 << 30
"""Bytes of decoded images that are kept in memory."""

EVAL_BATCH = 256
"""Images that are classified at once in evaluation."""

SETTINGS = ("model", "imgsz", "epochs", "batch", "lr", "drop_path", "seed", "limit")
"""Flags that must be the same when a training is resumed."""


class Photos:
    """Labelled images, decoded, resized and cropped as ``spec`` says.

    ``photos[indices]`` is uint8 ``(B, size, size, 3)``.
    """

    def __init__(
        self, data: ImageSet, classes: list[str], spec: Preprocess, args: argparse.Namespace
    ) -> None:
        self.data = data
        self.items = _choose_evenly(data, args.limit)
        self.spec = spec
        self.labels = np.array([classes.index(str(item.label)) for item in self.items])
        self.decode = lru_cache(CACHE_BYTES // (3 * spec.size**2))(self._decode)
        self.pool = ThreadPoolExecutor(args.threads)

    def __getitem__(self, chosen: np.ndarray) -> np.ndarray:
        return np.stack([*self.pool.map(self.decode, chosen.tolist())])

    def _decode(self, index: int) -> np.ndarray:
        item = self.items[index]
        name = str(self.data.path / item.name)
        return decode_pixels(NamedBytes(self.data.read(item), name), self.spec)


def _choose_evenly(data: ImageSet, limit: int | None) -> list[Item]:
    """At most ``limit`` images of each class, spread evenly over its images."""
    chosen = []
    for name in data.classes:
        items = [item for item in data if item.label == name]
        places = np.linspace(0, len(items) - 1, limit or len(items)).astype(int)
        chosen += [items[place] for place in np.unique(places)]
    return chosen


def augment(batch: np.ndarray, spec: Preprocess, rng: np.random.Generator) -> np.ndarray:
    """``(B, frame, frame, 3)`` uint8 -> ``(B, size, size, 3)`` float32.

    Images are shifted by up to 1/8, flipped, made brighter or darker, and a square is cut out.
    """
    size, frame = spec.size, batch.shape[1]
    pad = max(0, size // 8 - (frame - size) // 2)
    hole = size // 4
    batch = np.pad(batch, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    out = np.empty((len(batch), size, size, 3), np.float32)
    for image, source in zip(out, batch, strict=True):
        y, x = rng.integers(0, frame + 2 * pad - size + 1, 2)
        v, u = rng.integers(0, size - hole + 1, 2)
        direction = rng.choice((-1, 1))
        brightness = rng.uniform(0.8, 1.2)
        image[:] = source[y : y + size, x : x + size][:, ::direction] * brightness
        image[v : v + hole, u : u + hole] = 255 * np.array(spec.mean)
    return out.clip(0, 255, out=out)


class Learner:
    """A model, the average of its weights and statistics, which is deployed, and an optimizer."""

    def __init__(self, args: argparse.Namespace, classes: list[str]) -> None:
        self.settings: dict[str, Any] = {name: getattr(args, name) for name in SETTINGS}
        self.settings["classes"] = classes
        self.device = args.device
        self.epoch = 0
        self.model = _first_model(args, classes).to(args.device)
        self.ema = copy.deepcopy(self.model).eval()
        self.optimizer = _optimizer(self.model)

    def save(self, path: Path) -> None:
        """Write a file that :func:`cmt_edge.cmt.load_weights` and :meth:`resume` read."""
        content = {
            "model": self.model.state_dict(),
            "model_ema": self.ema.state_dict(),
            "classes": self.settings["classes"],
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "settings": self.settings,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomic(path, buffer.getvalue())

    def resume(self, path: Path) -> None:
        """Continue the training of :meth:`save`; refuse a damaged file, another model and other settings."""
        load_weights(self.model, path, ema=False)
        content = torch.load(path, map_location="cpu", weights_only=True)
        was = content.get("settings", {})
        now = self.settings
        changed = [f"{key} was {was.get(key)}, is {now[key]}" for key in now if was.get(key) != now[key]]
        if changed:
            raise InputError(
                "was made with other settings",
                where=path,
                why="; ".join(changed),
                remedy="give the same flags",
            )
        load_weights(self.ema, path, ema=True)
        self.epoch = content["epoch"]
        self.optimizer.load_state_dict(content["optimizer"])

    def train_epoch(self, photos: Photos, spec: Preprocess, progress: Progress) -> str:
        """Train on all images once, in an order that only the seed and the epoch decide."""
        rng = np.random.default_rng([self.settings["seed"], self.epoch])
        begin = time.perf_counter()
        torch.manual_seed(int(rng.integers(1 << 31)))  # for dropout and drop path
        order = rng.permutation(len(photos.labels))
        batch = min(self.settings["batch"], len(order))
        steps = len(order) // batch  # the images that do not fill a batch wait for another epoch
        first = self.epoch * steps
        losses = []
        self.model.train()
        for done, chosen in enumerate(order[: steps * batch].reshape(steps, batch), 1):
            x = torch.from_numpy(normalise(augment(photos[chosen], spec, rng), spec)).to(self.device)
            y = torch.from_numpy(photos.labels[chosen]).to(self.device)
            step = first + done
            losses.append(self._step(x, y, step, step / (steps * self.settings["epochs"])))
            progress.count(done, steps)
        progress.finish()
        self.epoch += 1
        return f"  loss {np.mean(losses):.4f}  {time.perf_counter() - begin:.1f} s"

    def _step(self, x: torch.Tensor, y: torch.Tensor, step: int, share: float) -> float:
        """One step of the optimizer; ``share`` of the whole training is done after it. Returns the loss."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = F.cross_entropy(self.model(x), y, label_smoothing=SMOOTHING)
        if not math.isfinite(loss.item()):
            raise GateError(
                "training diverged: the loss is not finite", remedy="start again with a smaller --lr"
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * _schedule(share)
        self.optimizer.step()
        self._update_average(min(EMA_DECAY, step / (9 + step)))
        return loss.item()

    def _update_average(self, decay: float) -> None:
        averages, values = self.ema.state_dict().values(), self.model.state_dict().values()
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)


def _schedule(share: float) -> float:
    """The learning rate as a share of the highest: it rises in a line and falls along half a cosine."""
    return min(1, share / WARM_UP) * (1 + math.cos(math.pi * share)) / 2


def _first_model(args: argparse.Namespace, classes: list[str]) -> nn.Module:
    """The model with its first weights, and a new classifier where the known one has other classes."""
    spec = find_model(args.model)
    options = {"drop_path": args.drop_path} if hasattr(spec.config, "drop_path") else {}
    model = create_model(args.model, img_size=args.imgsz, num_classes=len(classes), seed=args.seed, **options)
    if args.init == "random":
        return model
    new_head = {key: model.state_dict()[key].clone() for key in spec.head_keys}
    if args.init == "pretrained":
        loaded = load_pretrained(model, fresh_head=True, resize=True)
    else:
        loaded = load_weights(model, args.init, fresh_head=True, resize=True)
    known = loaded.classes or [name for name, _ in find_published_labels(spec, len(classes)) or ()]
    if list(known) != classes:  # also where nobody knows what its logits mean
        model.load_state_dict(new_head, strict=False)
        print(
            f"a new classifier: {loaded.source} is not known to have these {len(classes)} classes",
            file=sys.stderr,
        )
    return model


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW; biases, norms and tables of positions have no weight decay."""
    kernels = [p for p in model.parameters() if p.ndim in (2, 4)]
    others = [p for p in model.parameters() if p.ndim not in (2, 4)]
    optimizer = torch.optim.AdamW(kernels, weight_decay=DECAY)
    optimizer.add_param_group({"params": others, "weight_decay": 0.0})
    return optimizer


@torch.inference_mode()
def measure_top1(model: nn.Module, photos: Photos, device: str) -> str:
    """Correct answers in percent, on the same inputs that a bundle gets."""
    count = len(photos.labels)
    correct = 0
    for part in np.array_split(np.arange(count), math.ceil(count / EVAL_BATCH)):
        x = torch.from_numpy(normalise(photos[part], photos.spec)).to(device)
        answers = model(x).argmax(1).cpu().numpy()
        correct += int((answers == photos.labels[part]).sum())
    return f"  top-1 on {count} images {100 * correct / count:.2f} %"


def check(args: argparse.Namespace, data: ImageSet, tests: ImageSet | None) -> None:
    """Raise what is wrong with the request before anything takes time."""
    if len(data.classes) < 2:
        raise DataError(
            f"has {len(data.classes)} class folders, not 2 or more",
            where=data.path,
            remedy="give each class a folder of its own",
        )
    unknown = {str(item.label) for item in tests or ()} - {*data.classes}
    if tests and unknown:
        raise DataError(
            f"has classes that --data does not have: {sorted(unknown)[:8]}",
            where=tests.path,
            remedy="rename the folders",
        )
    if args.output.suffix == ".safetensors":
        raise OutputError("training state needs a PyTorch file", where=args.output, remedy="name it .pt")
    if args.output.exists() and not args.resume:
        raise OutputError(
            "already exists", where=args.output, remedy="--resume to continue it, or another --output"
        )
    if min(args.epochs, args.batch - 1, args.lr, args.limit or 1, args.threads or 1) <= 0:
        raise InputError(
            "--epochs, --lr, --limit and --threads must be positive, --batch 2 or more", remedy="correct them"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeMissingError("this PyTorch cannot use a CUDA device", remedy="--device cpu")
    with writing(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)


def train(args: argparse.Namespace) -> int:
    """Train as the flags say, and print the command that exports the result."""
    data = ImageSet(args.data)
    tests = ImageSet(args.eval_data) if args.eval_data else None
    check(args, data, tests)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    spec = ExportConfig(args.model, imgsz=args.imgsz).preprocess
    learner = Learner(args, data.classes)
    if args.output.exists():
        learner.resume(args.output)
    uncropped = replace(spec, size=spec.short_side or spec.size)  # `augment` crops
    photos = Photos(data, data.classes, uncropped, args)
    judged = Photos(tests, data.classes, spec, args) if tests else None
    said = ""
    while True:
        score = measure_top1(learner.ema, judged, learner.device) if judged else ""
        if not args.quiet:
            print(f"epoch {learner.epoch}/{args.epochs}{said}{score}", file=sys.stderr)
        if learner.epoch == args.epochs:
            break
        said = learner.train_epoch(photos, spec, Progress(args.quiet))
        learner.save(args.output)
    report(args, len(data.classes), spec.size, score)
    return 0


def report(args: argparse.Namespace, classes: int, imgsz: int, score: str) -> None:
    """Print the result and the next commands, which can be pasted as they stand."""
    command = ["cmt-export", "--model", args.model, "--num-classes", str(classes)]
    command += ["--imgsz", str(imgsz), "--weights", str(args.output)]
    if args.eval_data:
        command += ["--eval-data", args.eval_data]
    quantized = [*command, "--precision", "int8", "--data", args.data]
    result: dict[str, Any] = {
        "weights": str(args.output),
        "result": score.strip(),
        "next": shlex.join(command),
        "next_int8": shlex.join(quantized),
    }
    if args.json:
        say(to_json(result))
        return
    say(f"{args.output}:{score}\n\nnext:\n  {result['next']}\nor in int8:\n  {result['next_int8']}")


# fmt: off
FLAGS = (
    # flag        type   default      help
    ("model",     str,   "cmt_nano",  "see cmt-export --list-models"),
    ("init",      str,   "random",    "first weights: random, pretrained, or FILE"),
    ("imgsz",     int,   None,        "height and width of the input in pixels (default: the model's)"),
    ("epochs",    int,   22,          "number of times that each image is seen"),
    ("batch",     int,   128,         "images in a step"),
    ("lr",        float, 1e-3,        "highest learning rate"),
    ("drop-path", float, 0.05,        "share of residual branches that stochastic depth drops"),
    ("seed",      int,   0,           "of weights, order and augmentation"),
    ("threads",   int,   None,        "CPU threads (default: all cores)"),
    ("limit",     int,   None,        "images of each class (default: all)"),
)
"""Flags with one value."""
# fmt: on


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    p = make_parser("train_cifar10.py", *str(__doc__).split("\n", 1))
    p.add_argument("--data", required=True, help="training images: class folders, or ARCHIVE.tar[/FOLDER]")
    p.add_argument("--eval-data", help="test images, to print top-1 after every epoch")
    p.add_argument(
        "-o", "--output", required=True, type=Path, help="checkpoint, written after every epoch: FILE.pt"
    )
    p.add_argument(
        "--resume", action="store_true", help="continue --output if it exists; give all other flags as before"
    )
    p.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="cuda computes partly in bfloat16"
    )
    for name, kind, default, text in FLAGS:
        shown = text if default is None else f"{text} (default {default})"
        p.add_argument(f"--{name}", type=parse_finite if kind is float else kind, default=default, help=shown)
    return run_command(train, p.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
