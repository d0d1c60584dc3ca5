"""At least once, shown on a real service: it is killed between a delivery and its record, and delivers it again."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from service import context as contexts
from service.db import migrate
from service.settings import Settings
from service.store.keys import CLIENT_SCOPES
from tests.service import peft_files
from tests.service.fake_engine import FakeEngine
from tests.service.processes import ServiceProcess, listening, wait_for
from tests.service.receiver import receiver


@pytest.mark.slow
def test_a_delivery_that_was_not_recorded_before_kill_9_is_made_again(tmp_path: Path, model_dir: Path) -> None:
    with ExitStack() as stack:
        settings: dict[str, Any] = {
            "data_dir": tmp_path,
            "model_dir": model_dir,
            "base_model": peft_files.BASE,
            "engine_url": stack.enter_context(listening(FakeEngine(peft_files.BASE))),
            "webhook_hosts": "localhost",
            "webhook_allow_private": True,
        }
        context = contexts.build(Settings.model_validate(settings))
        stack.callback(context.database.close)
        migrate.migrate(context.database)
        with context.database.write() as s:
            key = context.keys.create(s, tenant="alice", name="test", scopes=CLIENT_SCOPES)
        hook = stack.enter_context(receiver())
        hook.gate.clear()

        def service() -> ServiceProcess:
            started = ServiceProcess(settings, tmp_path / "service.log")
            stack.callback(started.end)
            wait_for("the service", started.answers)
            return started

        first = service()
        alice = first.caller(key)
        alice.create()
        webhook = alice.ok("POST", "/v1/webhooks", {"url": hook.url})
        alice.feedback()
        delivered = hook.next()  # the receiver has all of it; the service waits for the answer
        first.signal(signal.SIGKILL)
        first.process.wait()
        hook.gate.set()

        with context.database.write() as s:  # the time of the attempt that nobody ended is over
            s.connection().exec_driver_sql("UPDATE webhook_deliveries SET due_at = 0")
        alice = service().caller(key)
        again = hook.next()
        assert again.headers["webhook-id"] == delivered.headers["webhook-id"]
        assert again.body == delivered.body
        deliveries = f"/v1/webhooks/{webhook['id']}/deliveries"
        wait_for("its record", lambda: alice.ok("GET", deliveries)["data"][0]["state"] == "delivered")
        [record] = alice.ok("GET", deliveries)["data"]
        assert (record["id"], record["attempts"]) == (delivered.headers["webhook-id"], 2)
