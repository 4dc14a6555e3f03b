"""Trains or fine-tunes a model on class folders, ready for cmt-export; after the recipe of the embedded
cmt_nano.

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
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cmt_edge.cmt import create_model, labels_of, load_pretrained, load_weights, model_spec
from cmt_edge.deploy.cli.console import parser, run
from cmt_edge.deploy.errors import DataError, GateError, InputError, OutputError, RuntimeMissingError
from cmt_edge.deploy.files import write_atomic, writing
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.preprocessing import NamedBytes, Preprocess, normalise, pixels
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.report import to_json
from cmt_edge.export import ExportConfig

SMOOTHING, DECAY, EMA_DECAY, CLIP, WARM_UP, CACHE_BYTES = (
    0.1,
    0.05,
    0.999,
    5.0,
    0.05,
    4 << 30,
)  # cache: of decoded images


class Photos:
    """Labelled images, decoded, resized and cropped as ``spec`` says; ``photos[indices]`` is uint8 ``(B,
    size, size, 3)``."""

    def __init__(
        self, data: ImageSet, classes: list[str], spec: Preprocess, args: argparse.Namespace
    ) -> None:
        groups = [[item for item in data if item.label == name] for name in data.classes]
        items = [
            g[k]
            for g in groups
            for k in np.unique(np.linspace(0, len(g) - 1, args.limit or len(g)).astype(int))
        ]
        self.spec, self.labels = spec, np.array([classes.index(str(item.label)) for item in items])
        decode = lambda i: pixels(NamedBytes(data.read(items[i]), str(data.path / items[i].name)), spec)  # noqa: E731
        self.decode, self.pool = (
            lru_cache(CACHE_BYTES // (3 * spec.size**2))(decode),
            ThreadPoolExecutor(args.threads),
        )

    def __getitem__(self, chosen: np.ndarray) -> np.ndarray:
        return np.stack([*self.pool.map(self.decode, chosen.tolist())])


def augment(batch: np.ndarray, spec: Preprocess, rng: np.random.Generator) -> np.ndarray:
    """``(B, frame, frame, 3)`` uint8 -> ``(B, size, size, 3)`` float32: shifts up to 1/8, flips, brightness,
    a square cut out."""
    size, frame = spec.size, batch.shape[1]
    pad = max(0, size // 8 - (frame - size) // 2)
    batch = np.pad(batch, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    out = np.empty((len(batch), size, size, 3), np.float32)
    for image, source in zip(out, batch, strict=True):
        y, x, v, u = (
            *rng.integers(0, frame + 2 * pad - size + 1, 2),
            *rng.integers(0, size - size // 4 + 1, 2),
        )
        image[:] = source[y : y + size, x : x + size][:, :: rng.choice((-1, 1))] * rng.uniform(0.8, 1.2)
        image[v : v + size // 4, u : u + size // 4] = 255 * np.array(spec.mean)
    return out.clip(0, 255, out=out)


class Learner:
    """A model with its first weights, the average of its weights and statistics, which is deployed, and an
    optimizer."""

    def __init__(self, args: argparse.Namespace, classes: list[str]) -> None:
        spec, names = (
            model_spec(args.model),
            (
                "model",
                "imgsz",
                "epochs",
                "batch",
                "lr",
                "drop_path",
                "seed",
                "limit",
            ),
        )
        self.settings = {name: getattr(args, name) for name in names} | {"classes": classes}
        drop = {"drop_path": args.drop_path} if hasattr(spec.config, "drop_path") else {}
        self.model = create_model(
            args.model, img_size=args.imgsz, num_classes=len(classes), seed=args.seed, **drop
        )
        if args.init != "random":
            head = {key: self.model.state_dict()[key].clone() for key in spec.head_keys}
            load = load_pretrained if args.init == "pretrained" else partial(load_weights, path=args.init)
            loaded = load(self.model, fresh_head=True, resize=True)
            if [*(loaded.classes or [name for name, _ in labels_of(spec, len(classes)) or ()])] != classes:
                self.model.load_state_dict(head, strict=False)  # also where nobody says what its logits mean
                print(
                    f"a new classifier: {loaded.source} is not known to have these {len(classes)} classes",
                    file=sys.stderr,
                )
        self.model.to(args.device)
        self.ema, self.epoch, self.device = copy.deepcopy(self.model).eval(), 0, args.device
        kernels, others = (
            [p for p in self.model.parameters() if (p.ndim in (2, 4)) == wanted] for wanted in (True, False)
        )
        self.optimizer = torch.optim.AdamW(kernels, weight_decay=DECAY)
        self.optimizer.add_param_group({"params": others, "weight_decay": 0.0})

    def save(self, path: Path) -> None:
        """A container that :func:`cmt_edge.cmt.load_weights` reads, and :meth:`resume`."""
        content = {
            "model": self.model.state_dict(),
            "model_ema": self.ema.state_dict(),
            "classes": self.settings["classes"],
        }
        content |= {"optimizer": self.optimizer.state_dict(), "epoch": self.epoch, "settings": self.settings}
        torch.save(content, buffer := io.BytesIO())
        write_atomic(path, buffer.getvalue())

    def resume(self, path: Path) -> None:
        load_weights(self.model, path, ema=False)  # refuses what is damaged or of another model
        content = torch.load(path, map_location="cpu", weights_only=True)
        was, now = content.get("settings", {}), self.settings
        if changed := [f"{key} was {was.get(key)}, is {now[key]}" for key in now if was.get(key) != now[key]]:
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
        """One pass in an order that the seed and the epoch alone decide."""
        rng, begin, losses = (
            np.random.default_rng([self.settings["seed"], self.epoch]),
            time.perf_counter(),
            [],
        )
        torch.manual_seed(int(rng.integers(1 << 31)))  # dropout and drop path
        order, batch = rng.permutation(len(photos.labels)), min(self.settings["batch"], len(photos.labels))
        steps = len(order) // batch  # what does not fill a batch waits for another epoch
        self.model.train()
        for step, chosen in enumerate(order[: steps * batch].reshape(steps, batch), self.epoch * steps + 1):
            x = torch.from_numpy(normalise(augment(photos[chosen], spec, rng), spec)).to(self.device)
            y = torch.from_numpy(photos.labels[chosen]).to(self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                loss = F.cross_entropy(self.model(x), y, label_smoothing=SMOOTHING)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise GateError(
                    "training diverged: the loss is not finite", remedy="start again with a smaller --lr"
                )
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            share = step / (
                steps * self.settings["epochs"]
            )  # the rate goes up in a line, then down half a cosine
            for group in self.optimizer.param_groups:
                group["lr"] = (
                    self.settings["lr"] * min(1, share / WARM_UP) * (1 + math.cos(math.pi * share)) / 2
                )
            self.optimizer.step()
            for mean, value in zip(
                self.ema.state_dict().values(), self.model.state_dict().values(), strict=True
            ):
                (
                    mean.lerp_(value, 1 - min(EMA_DECAY, step / (9 + step)))
                    if mean.is_floating_point()
                    else mean.copy_(value)
                )
            progress.count(step - self.epoch * steps, steps)
        progress.finish()
        self.epoch += 1
        return f"  loss {np.mean(losses):.4f}  {time.perf_counter() - begin:.1f} s"


@torch.inference_mode()
def top1(model: nn.Module, photos: Photos, device: str) -> str:
    """Right answers in percent, on the very inputs that a bundle sees."""
    n, feed = (
        len(photos.labels),
        lambda part: torch.from_numpy(normalise(photos[part], photos.spec)).to(device),
    )
    answers = [
        model(feed(part)).argmax(1).cpu().numpy() for part in np.array_split(np.arange(n), math.ceil(n / 256))
    ]
    return f"  top-1 on {n} images {100 * np.mean(np.concatenate(answers) == photos.labels):.2f} %"


def check(args: argparse.Namespace, data: ImageSet, tests: ImageSet | None) -> None:
    """Raise what is wrong with the request before anything takes time."""
    if len(data.classes) < 2:
        raise DataError(
            f"has {len(data.classes)} class folders, not 2 or more",
            where=data.path,
            remedy="one folder a class",
        )
    if tests and (unknown := {str(item.label) for item in tests} - {*data.classes}):
        raise DataError(
            f"classes that --data has not: {sorted(unknown)[:8]}",
            where=tests.path,
            remedy="rename the folders",
        )
    if args.output.suffix == ".safetensors":
        raise OutputError("training state needs a PyTorch file", where=args.output, remedy="name it .pt")
    if args.output.exists() and not args.resume:
        raise OutputError(
            "is there already", where=args.output, remedy="--resume to go on with it, or another --output"
        )
    if min(args.epochs, args.batch - 1, args.lr, args.limit or 1, args.threads or 1) <= 0:
        raise InputError(
            "--epochs, --lr, --limit and --threads must be positive, --batch 2 or more", remedy="correct them"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeMissingError("this PyTorch can use no CUDA device", remedy="--device cpu")
    with writing(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)


def train(args: argparse.Namespace) -> int:
    data, tests = ImageSet(args.data), ImageSet(args.eval_data) if args.eval_data else None
    check(args, data, tests)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    learner, spec = Learner(args, data.classes), ExportConfig(args.model, imgsz=args.imgsz).preprocess
    if args.output.exists():
        learner.resume(args.output)
    photos = Photos(
        data, data.classes, replace(spec, size=spec.short_side or spec.size), args
    )  # cropped by `augment`
    judged, said = tests and Photos(tests, data.classes, spec, args), ""
    while True:
        score = top1(learner.ema, judged, learner.device) if judged else ""
        print(
            f"epoch {learner.epoch}/{args.epochs}{said}{score}",
            file=io.StringIO() if args.quiet else sys.stderr,
        )
        if learner.epoch == args.epochs:
            break
        said = learner.train_epoch(photos, spec, Progress(args.quiet))
        learner.save(args.output)
    command = ["cmt-export", "--model", args.model, "--num-classes", str(len(data.classes))]
    command += [
        "--imgsz",
        str(spec.size),
        "--weights",
        str(args.output),
        *(["--eval-data", args.eval_data] if tests else []),
    ]
    result = {"weights": str(args.output), "result": score.strip(), "next": shlex.join(command)}
    text = (
        f"{args.output}:{score}\n\nnext:\n  {result['next']}\n(int8: --precision int8 --data"
        f" {shlex.quote(args.data)})"
    )
    print(to_json(result) if args.json else text)
    return 0


def main(argv: list[str] | None = None) -> int:
    p = parser("train_cifar10.py", *str(__doc__).split("\n", 1))
    p.add_argument("--data", required=True, help="training images: class folders, or ARCHIVE.tar[/FOLDER]")
    p.add_argument("--eval-data", help="test images, to print top-1 after every epoch")
    p.add_argument(
        "-o", "--output", required=True, type=Path, help="checkpoint, written after every epoch: FILE.pt"
    )
    p.add_argument(
        "--resume", action="store_true", help="go on with --output where it exists; all other flags as before"
    )
    p.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="cuda computes partly in bfloat16"
    )
    for name, kind, default, text in (
        ("model", str, "cmt_nano", "see cmt-export --list-models"),
        ("init", str, "random", "first weights: or pretrained, or FILE"),
        ("imgsz", int, None, "pixels"),
        ("epochs", int, 22, "passes"),
        ("batch", int, 128, "images a step"),
        ("lr", float, 1e-3, "highest"),
        ("drop-path", float, 0.05, "stochastic depth"),
        ("seed", int, 0, ""),
        ("threads", int, None, ""),
        ("limit", int, None, "images a class"),
    ):
        p.add_argument(
            f"--{name}", type=kind, default=default, help=text + (f" (default {default})" if default else "")
        )
    return run(train, p.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
