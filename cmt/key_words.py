"""What the keys of a checkpoint say: words for weights, for averages and for what only training needs."""

from __future__ import annotations

import functools
import re

AVERAGE = re.compile(
    r"(?:^|[^a-z])(?:model|net|params)?_?(?:ema|swa|avg|averaged?|averaging|polyak|shadow)"
    r"(?:model|net|params|weights)?(?:[^a-z]|$)",
    re.IGNORECASE,
)
"""Fits the words of keys that name weights averaged over training: ``model_ema``, ``ema_state_dict``,
``swa_model``. It fits other averages too; see :func:`names_average`."""

USUAL = {
    "model",
    "models",
    "module",
    "state",
    "dict",
    "statedict",
    "net",
    "network",
    "param",
    "params",
    "parameter",
    "parameters",
    "weight",
    "weights",
    "backbone",
    "checkpoint",
    "ckpt",
    "best",
    "last",
    "latest",
    "final",
}
"""Words of which the keys of weights are usually made. Nobody but the user knows whether the best or the last
ones are meant, so that none of them is more usual than the others."""

BESIDE_AVERAGE = USUAL | {
    "average",
    "avg",
    "callback",
    "callbacks",
    "copy",
    "cpu",
    "decay",
    "ema",
    "helper",
    "moving",
    "obj",
    "object",
    "shadow",
    "stochastic",
    "swa",
    "teacher",
    "variables",
}
"""Words that stand beside the one that names an average, where it is one of weights."""

MOMENTS = {
    "exp_avg",
    "exp_avg_sq",
    "exp_inf",
    "max_exp_avg_sq",
    "momentum_buffer",
}
"""Keys of what PyTorch's optimizers keep of the gradients, in the shapes of the weights."""

OTHERS = {
    "optimizer",
    "optimizers",
    "optim",
    "opt",
    "adam",
    "adamw",
    "scheduler",
    "schedulers",
    "scaler",
    "amp",
    "rng",
    "grad",
    "grads",
    "gradients",
    "momentum",
    "loops",
    "discriminator",
}
"""Words in keys below which no weights of the model are looked for."""

COUNTERS = {
    "total_ops",
    "total_params",
    "n_averaged",
    "num_updates",
    "initted",
    "step",
    "global_step",
    "epoch",
    "decay",
}
"""Last parts of names of what profilers (thop) and averaging put beside weights."""

TRAINING = {
    "criterion",
    "criterions",
    "loss",
    "losses",
    "metric",
    "metrics",
    "acc",
    "accuracy",
    "auroc",
    "confmat",
    "train",
    "val",
    "valid",
    "validation",
    "test",
    "teacher",
    "aux",
    "auxiliary",
    "discriminator",
}
"""Words in the first part of names that belong to training, not to the model."""


CACHED_KEYS = 1 << 16
"""Number of keys whose meaning is remembered: the same ones are compared with many prefixes."""


def split_words(key: str) -> set[str]:
    """The words that a key is made of, in lower case."""
    split = re.sub(r"([a-z])([A-Z])", r"\1_\2", key)
    return {word for word in re.split(r"[^a-z0-9]+", split.lower()) if word}


@functools.lru_cache(maxsize=CACHED_KEYS)
def names_average(key: str) -> bool:
    """Whether ``key`` names averaged weights: a word for an average, and beside it only usual words.

    ``exp_avg``, ``avg_activations`` and ``ema_fisher`` are averages of something else.
    """
    if not AVERAGE.search(key):
        return False
    others = split_words(AVERAGE.sub(" ", key))
    return all(word in BESIDE_AVERAGE or word.isdecimal() for word in others)


@functools.lru_cache(maxsize=CACHED_KEYS)
def is_of_training(key: str) -> bool:
    """Whether no weights of the model are looked for below ``key``."""
    return key.lower() in MOMENTS or bool(OTHERS & split_words(key))


@functools.lru_cache(maxsize=CACHED_KEYS)
def is_training_only(key: str) -> bool:
    """Whether a name beside a model's belongs to its training, and not to its answers."""
    parts = key.split(".")
    return parts[-1] in COUNTERS or bool(TRAINING & split_words(parts[0]))
