"""The whole stack on one machine: what is checked before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from service.local import LocalConfig, LocalStack, PartFailed


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    """Otherwise the readiness of whoever holds it would be taken for ours."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = int(other.getsockname()[1])
        stack = LocalStack(LocalConfig(tmp_path / "data", tmp_path, "base", port=port))
        with pytest.raises(PartFailed, match=f"port {port} .* is taken"), stack:
            pass
    assert stack.processes == {}


def test_the_data_directory_is_the_owners_alone(tmp_path: Path) -> None:
    """The database in it holds prompts and remarks."""
    LocalStack(LocalConfig(tmp_path / "data", tmp_path, "base", port=0))
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
