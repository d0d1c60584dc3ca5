"""`perennial jobs watch` on the service's own streams, over a connection that breaks off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from tests.service.harness import Stack
from tests.service.lease_calls import expire

Watch = Callable[..., Result]


@pytest.fixture
def asked() -> list[str | None]:
    """`Last-Event-ID` of each request."""
    return []


@pytest.fixture
def watch(helper: Stack, asked: list[str | None]) -> Iterator[Watch]:
    """Runs the command; what the service says reaches it in full only at the third request."""

    class Breaking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("last-event-id"))
            names = ("authorization", "last-event-id")
            answer = helper.client.get(self.path, headers={n: v for n in names if (v := self.headers.get(n))})
            self.send_response(answer.status_code)
            self.end_headers()
            self.wfile.write(answer.content[: 350 if len(asked) < 3 and answer.status_code == 200 else None])

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Breaking) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        environment = {
            "PERENNIAL_URL": f"http://127.0.0.1:{server.server_port}",
            "PERENNIAL_API_KEY": helper.alice.key,
        }
        yield lambda job: CliRunner(env=environment).invoke(app, ["jobs", "watch", job])
        server.shutdown()
        thread.join()


def test_it_tells_everything_once_over_a_broken_connection(
    helper: Stack, watch: Watch, asked: list[str | None]
) -> None:
    job = str(helper.alice.feedback()["job_id"])
    first = helper.worker.must_lease()
    helper.worker.call(first, "heartbeat", metrics=[{"step": 1, "loss": 0.5}])
    expire(helper)
    helper.worker.train()
    result = watch(job)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    kinds = ["job.queued", "job.running", "job.step", "job.queued", "job.running", "job.step", "job.succeeded"]
    assert [line[0] for line in lines] == kinds
    assert lines[2][1:3] == ["step=1", "loss=0.5"]
    assert lines[-1][-1] == "version=1"
    assert asked[0] is None
    assert len(asked) == 3
    assert None not in asked[1:]


def test_a_job_that_fails_ends_it_with_status_1_and_one_that_is_not_there_with_a_sentence(
    helper: Stack, watch: Watch
) -> None:
    job = str(helper.alice.feedback()["job_id"])
    helper.worker.fail(helper.worker.must_lease(), retryable=False)
    result = watch(job)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("job.failed")
    missing = watch("job_00")
    assert (missing.exit_code, missing.output.split(":")[0]) == (1, "job_not_found")
