"""A real S3 protocol over HTTP (moto's server), and a link to it that can be cut."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from moto.server import ThreadedMotoServer

from service.storage.bucket import Bucket

SECRET = "a-secret-access-key"
PATIENCE = 30.0


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a server of our own, without buckets."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def environment(endpoint: str) -> dict[str, str]:
    """What a process needs to reach it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "an-access-key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


def make_bucket(endpoint: str) -> str:
    """A new bucket; the URL of a prefix in it, as the settings have it."""
    name = f"bucket-{secrets.token_hex(4)}"
    assert httpx2.put(f"{endpoint}/{name}", timeout=120.0).status_code == 200
    return f"s3://{name}/some/prefix"


@dataclass
class Stored:
    """What tests look at in the bucket, behind the service's back."""

    url: str
    bucket: Bucket

    def keys(self, prefix: str = "") -> set[str]:
        return set(self.bucket.written(prefix))

    def put(self, key: str, body: bytes, tmp_path: Path) -> None:
        path = tmp_path / "object"
        path.write_bytes(body)
        self.bucket.put(key, path)


class Link:
    """A TCP proxy. While it is cut, connections break and new ones are refused."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._whole = True
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        with self._lock:
            self._whole = False
            for side in self._open:
                with suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        with self._lock:
            self._whole = True

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._target, PATIENCE)
        except OSError:
            near.close()
            return
        with self._lock:
            whole = self._whole
            if whole:
                self._open |= {near, far}
        if whole:
            other = threading.Thread(target=_pump, args=(far, near), daemon=True)
            other.start()
            _pump(near, far)
            other.join()
        with self._lock:
            self._open -= {near, far}
        for side in (near, far):
            side.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for side in (source, sink):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)


@contextmanager
def link(url: str) -> Iterator[Link]:
    target = httpx2.URL(url)
    made = Link(target.host, target.port or 80)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def at(monkeypatch: Any, endpoint: str) -> Iterator[None]:
    """This process's own environment, for the block."""
    with monkeypatch.context() as patch:
        for name, value in environment(endpoint).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        yield url
