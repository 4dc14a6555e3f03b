"""What the values of the manifest's entries may be: known words, and ranges of numbers."""

from __future__ import annotations

from typing import Annotated

from ..record import Between, Matches

LOGITS = "logits"
"""Name of a classifier's output, and of its head; feature maps are called ``stage1`` and so on."""
PROBABILITIES = "probabilities"
"""Kind of an output whose values are the classes' probabilities and sum to 1, as after a softmax."""
SCORES = "scores"
"""Kind of an output that gives each class a probability of its own, as after a sigmoid."""
MAX_TOTAL = 8 << 30
"""The largest size of all files of a bundle together, bytes."""
Count = Annotated[int, Between(0)]
"""A number of things; none is possible."""
Size = Annotated[int, Between(1)]
"""A number of things of which there is at least one."""
Sha256 = Annotated[str, Matches("[0-9a-f]{64}", "64 hexadecimal digits")]
"""A SHA-256 as text."""
OutputKind = Annotated[
    str,
    Matches(f"{PROBABILITIES}|{SCORES}", f"{PROBABILITIES!r} or {SCORES!r}"),
]
"""What the values of an output are, where they are no logits."""
Duration = Annotated[float, Between(0)]
"""Milliseconds of a measurement."""
Difference = Annotated[float, Between(0)]
"""The size of a difference of outputs, or what is allowed of it."""
Share = Annotated[float, Between(0, 1.001)]
"""A part of a whole; sums of shares may end a rounding above 1."""
Percent = Annotated[float, Between(0, 100.1)]
"""A share in percent."""
