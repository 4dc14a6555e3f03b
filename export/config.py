"""What an export is asked to do, checked before anything is loaded, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .checkpoint_settings import describe_by_weights, find_settings_by_shapes
from .checks import check_settings
from .derived import DerivedSettings
from .first_look import make_nameless_error
from .options import (
    read_defaults,
    read_mapping,
)
from .settings import AUTO, NAMED_WEIGHTS

OPSET = 20
"""Version of ONNX's operations: it has GELU as one operation, and it is the highest that TensorRT 10 and 11
parse completely."""


@dataclass(frozen=True)
class ExportConfig(DerivedSettings):
    """One export.

    The fields are the command line's flags with underscores; :class:`~cmt_edge.export.settings.Settings` and
    ``docs/cli.md`` say what each means. Only ``model`` has no default.

    >>> ExportConfig("cmt_nano", format="onnx", precision="int8", data="generated").folder
    'cmt_nano_int8_onnx'

    The model may also be a module object, which is copied and stays as it is. Its bundle cannot name it, so
    ``verify`` needs it again.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    >>> config = ExportConfig(model=net, imgsz=64, labels=["cat", "dog"], mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    >>> config.folder
    'Sequential_fp32_openvino'
    >>> bundle = export(config)                                                             # doctest: +SKIP
    >>> verify(bundle, data=ImageSet("photos/test"), trusted_model=net)                     # doctest: +SKIP
    """

    @classmethod
    def from_mapping(
        cls,
        values: Mapping[str, Any],
        where: object = None,
    ) -> ExportConfig:
        """From a settings file's content; keys are field names or flags.

        Raises:
            UnknownNameError: a key is no option.
            InputError: a value has the wrong type, or no model was named.
        """
        found = read_mapping(values, cls, where)
        found = describe_by_weights(found) | found
        found = find_settings_by_shapes(found) | found
        if "model" not in found:
            silent = found.get("weights", "pretrained") not in NAMED_WEIGHTS
            why = f"{found['weights']} does not say which model it belongs to" if silent else None
            raise make_nameless_error(where, why)
        return cls(**found)

    def named(self, precision: str, keep_float: Sequence[str]) -> ExportConfig:
        """The export of one precision that ``auto`` chose."""
        quantizes = precision == "int8"
        return replace(
            self,
            precision=precision,
            keep_float=",".join(keep_float) or None,
            max_drop=self.allowed_drop,
            data=self.data if quantizes else None,
            calib_size=self.calib_size if quantizes else None,
            **read_defaults(type(self), AUTO),
        )

    def check(self) -> None:
        """Raise the first :class:`~cmt_edge.deploy.errors.InputError` among everything that can be known
        without loading."""
        check_settings(self)
