"""docker/compose.yaml as Compose reads it: defaults filled in, anchors merged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
FILE = DOCKER / "compose.yaml"
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")

Service = dict[str, Any]


def variables() -> dict[str, str]:
    """Every variable that the file takes from docker/.env, with its default."""
    return dict(VARIABLE.findall(FILE.read_text()))


def load(values: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file with `values` in place of defaults."""
    given = values or {}
    text = VARIABLE.sub(lambda found: given.get(found[1]) or found[2], FILE.read_text())
    assert "${" not in text, "a variable without a default"
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def services(profile: str | None = None) -> dict[str, Service]:
    """By name; of one profile or of all."""
    every: dict[str, Service] = load()["services"]
    return {name: s for name, s in every.items() if profile is None or profile in s["profiles"]}


def ends(service: Service) -> bool:
    """A one-shot service."""
    return bool(service["restart"] == "no")


def in_order(chosen: Mapping[str, Service]) -> Iterator[tuple[str, Service]]:
    """As `depends_on` asks: every service after what it needs."""
    done: set[str] = set()
    while len(done) < len(chosen):
        ready = [n for n, s in chosen.items() if n not in done and set(s.get("depends_on", {})) <= done]
        assert ready, "depends_on is a circle, or names a service of another profile"
        for name in ready:
            yield name, chosen[name]
        done |= set(ready)


def mounts(service: Service) -> dict[str, tuple[str, bool]]:
    """Path in the container -> (named volume or path on the host, read-only)."""
    split = (volume.split(":") for volume in service.get("volumes", []))
    return {parts[1]: (parts[0], parts[2:] == ["ro"]) for parts in split}
