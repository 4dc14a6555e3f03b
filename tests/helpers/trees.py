"""Trees of dictionaries and lists, as JSON has them."""

from __future__ import annotations

from typing import Any


def list_places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all entries below ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in [(*way, key), *list_places(item, (*way, key))]]
