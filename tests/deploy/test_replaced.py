"""``cmt-verify`` and ``cmt-bench`` of a bundle that is replaced after they opened it: they answer about one
of the two, or they say that it was replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmt_edge.__main__ import main
from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import bundle as bundle_module
from helpers.bundles import LABELS, make_bundle

COMMANDS = {
    "verify": ("verify", "{}", "-q"),
    "bench": ("bench", "{}", "--iters", "2", "--seconds", "0", "--warmup", "1", "--no-throughput", "-q"),
}
"""The words of each command."""


def make_old(target: Path) -> Bundle:
    return make_bundle(target)


def make_new(target: Path) -> Bundle:
    """With other classes and another number of them."""
    return make_bundle(target, labels=(*LABELS, "grey"))


@pytest.fixture
def looks(monkeypatch):
    """How often a bundle's folder or members are looked at, and what happens just before the one that is
    chosen."""

    class Looks:
        count, chosen, act = 0, -1, staticmethod(lambda: None)

        def note(self) -> None:
            self.count += 1
            if self.count == self.chosen:
                self.act()

    seen = Looks()

    def watch(owner, name: str) -> None:
        real = getattr(owner, name)

        def noted(*args, **named):
            seen.note()
            return real(*args, **named)

        monkeypatch.setattr(owner, name, noted)

    watch(bundle_module, "read_state")
    watch(bundle_module.Bundle, "file")
    watch(bundle_module.Golden, "from_file")
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bundle_that_is_replaced_after_it_was_opened(tmp_path, capsys, looks, command):
    """At every moment in which the command looks at it."""
    place = tmp_path / "tiny"
    words = [word.format(place) for word in COMMANDS[command]]
    make_old(place)
    looks.count = 0
    assert main(words) == 0
    moments = looks.count
    assert moments > 3
    replaced = 0
    capsys.readouterr()
    for moment in range(1, moments + 1):
        looks.chosen = -1
        make_old(place)
        looks.count, looks.chosen, looks.act = 0, moment, lambda: make_new(place)
        code = main(words)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if code == 0:
            assert out
        else:
            assert (code, out) == (2, ""), (moment, err)
            assert "the bundle was replaced while it was being read" in err, moment
            replaced += 1
        assert err.count("error:") == (code != 0)
    assert replaced or command == "verify"
