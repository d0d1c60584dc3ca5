"""Planted defects of the queue and of what makes it durable: which test notices each?

python -m tests.durability.mutants            all, a table, exit status 1 if one survives
python -m tests.durability.mutants NAME ...   some
"""

from __future__ import annotations

import sys

import alembic.command  # noqa: F401 - imported once, for every fork
import apsw  # noqa: F401
import fastapi.testclient  # noqa: F401
import httpx2  # noqa: F401
import sqlalchemy.orm  # noqa: F401

from tests.planted import Mutant, Plot, main

MUTANTS = (
    Mutant("no fence", "service/store/leases.py",
           'if run.token != token or adapter.token != token or adapter.lease_run != run.id or run.state != "running":',
           "if run.token != token:", "test_fencing.py test_model.py"),
    Mutant("token does not grow", "service/store/leases.py", "    adapter.token += 1\n    run = Run(",
           "    adapter.token = 1\n    run = Run(", "test_fencing.py test_model.py"),
    Mutant("head not compared", "service/store/leases.py", "if adapter.head_n != run.parent_n:", "if False:",
           "test_fencing.py test_model.py"),
    Mutant("promotion does not fence", "service/store/adapters.py", '    fence(s, adapter, now, "superseded")\n',
           "", "test_fencing.py test_model.py"),
    Mutant("cancel does not fence", "service/store/leases.py",
           '        adapter.token += 1\n        _close(adapter, run, "cancelled", now)\n', "", "test_fencing.py"),
    Mutant("lost acknowledgement not looked up", "service/store/leases.py",
           "        if (known := committed(s, run_id)) is not None:", "        if (known := None) is not None:",
           "test_model.py test_fencing.py"),
    Mutant("lost acknowledgement a failure at the door", "service/routes/worker.py",
           "if (known := leases.committed(s, run_id)) is None:", "if (known := leases.committed(s, run_id)) or True:",
           "test_fencing.py"),
    Mutant("lease taken before it is over", "service/store/queue.py", "Adapter.lease_until < now)",
           "Adapter.lease_until < now + 1e9)", "test_leases.py"),
    Mutant("lease not extended", "service/store/leases.py",
           "    adapter.lease_until = now + lease_seconds\n    if beat", "    if beat", "test_leases.py"),
    Mutant("lease for ever", "service/store/leases.py", "adapter.lease_run, adapter.lease_until = run.id, now + "
           "rules.lease_seconds", "adapter.lease_run, adapter.lease_until = run.id, now + 1e12", "test_leases.py"),
    Mutant("attempt not counted", "service/store/retries.py", "        job.attempts += 1\n", "", "test_queue.py"),
    Mutant("lost lease counts no attempt", "service/store/leases.py",
           "            _lost(s, adapter, adapter.lease_run, rules, now)\n",
           '            _close(adapter, s.get_one(Run, adapter.lease_run), "lost", now)\n', "test_queue.py"),
    Mutant("batch formed anew after a crash", "service/store/queue.py", "    if head.together is not None:",
           "    if head.together is None:", "test_queue.py"),
    Mutant("newest feedback first", "service/store/queue.py",
           "    head = s.scalars(waiting.limit(1)).first()\n",
           "    head = s.scalars(waiting.order_by(None).order_by(Job.seq.desc()).limit(1)).first()\n",
           "test_queue.py test_leases.py"),
    Mutant("idempotency key ignored", "service/store/acceptance.py",
           "        if (batch := self._known.get(key)) is None:", "        if (batch := None) is None:",
           "test_idempotency.py"),
    Mutant("acknowledged without a commit", "service/ingest.py", "        with database.write() as s:",
           "        with database.read() as s:", "test_idempotency.py"),
    Mutant("acknowledged before the disk has it", "service/db/engine.py", '"synchronous=FULL"',
           '"synchronous=NORMAL"', "test_power.py::test_what_was_acknowledged_outlives_the_power"),
    Mutant("no sync at all", "service/db/engine.py", '"synchronous=FULL"', '"synchronous=OFF"',
           "test_power.py::test_what_was_acknowledged_outlives_the_power"),
    Mutant("applied twice", "service/store/leases.py",
           "        s.add(Application(job_id=job.id, adapter_id=adapter.id, version_n=n))\n", "", "test_model.py"),
    Mutant("no fsync", "worker/versions.py", "        os.fsync(descriptor)\n", "        pass\n",
           "test_power.py::test_sync_asks_the_kernel"),
    Mutant("files not synced", "worker/versions.py",
           "    for entry in files:\n        sync(staging / entry.name)\n", "", "test_power.py"),
    Mutant("renamed before it is synced", "worker/versions.py",
           "    for entry in files:\n        sync(staging / entry.name)\n"
           "    for directory in (*(staging / part for part in PARTS), staging):\n        sync(directory)\n"
           "    if final.exists():",
           "    if not final.exists():\n        staging.rename(final)\n        staging = final\n"
           "    for entry in files:\n        sync(staging / entry.name)\n"
           "    for directory in (*(staging / part for part in PARTS), staging):\n        sync(directory)\n"
           "    if staging is final:\n        pass\n    elif final.exists():", "test_power.py"),
    Mutant("rename not synced", "worker/versions.py", "    sync(final.parent)\n", "", "test_power.py"),
    Mutant("directory of a killed writer not synced", "worker/versions.py",
           "    staging.parent.mkdir(parents=True, exist_ok=True)\n    sync(staging.parent.parent)",
           "    if not staging.parent.is_dir():\n        staging.parent.mkdir(parents=True, exist_ok=True)\n"
           "        sync(staging.parent.parent)", "test_power.py"),
    Mutant("the secret's name not synced", "service/store/keys.py", "        sync(directory)  # also",
           "        pass  # also", "test_auth.py"),
    Mutant("a webhook recorded before it is sent", "service/webhooks/sender.py",
           "            result = await self._attempt(client, each)\n",
           "            await self._write(lambda s: deliveries.record(s, each, Result(200), self._backoff))\n"
           "            result = await self._attempt(client, each)\n", "test_webhook_kill.py"),
    Mutant("a version overwritten", "worker/versions.py",
           "        if version_digest(scan(final)) != version_digest(files):", "        if False:", "test_versions.py"),
    Mutant("leftovers of a newer run removed", "worker/versions.py", "if found and int(found[1]) <= token:",
           "if found:", "test_versions.py"),
    Mutant("name used again", "service/serving/names.py", 'return f"{adapter_id}-v{n}"',
           'return f"{adapter_id}-v{n % 2}"', "test_publisher.py"),
    Mutant("alias before the version is loaded", "service/serving/publisher.py",
           "having = [r for r in up if not n or name in r.loaded]", "having = up", "test_publisher.py"),
    Mutant("unloaded before it is drained", "service/serving/replica.py",
           "return self.in_flight[name] > 0 or self._last_used.get(name, 0.0) > recently", "return False",
           "test_publisher_races.py test_publisher.py"),
    Mutant("files not verified before a load", "service/storage/local.py",
           "        admission.check_files(directory, files)\n", "",
           "test_publisher.py"),
    Mutant("two publishers", "service/store/election.py", "    if held is None or held.token != token:",
           "    if held is None:", "test_election.py test_two_services.py"),
    Mutant("office taken before it is free", "service/store/election.py",
           "    if held.holder != process and held.until > now:", "    if False:",
           "test_election.py test_two_services.py"),
    Mutant("rejected version stays the head", "service/store/versions.py",
           "    move_head(s, adapter, version.parent_n)\n", "", "test_publisher.py test_model.py"),
)  # fmt: skip

PLOT = Plot(
    MUTANTS,
    copied=("service", "worker", "api_schemas", "tests", "pyproject.toml"),
    linked=("benchmarks", "demo", "docs", "sdpo_core"),
    tests=(
        "tests/durability", "tests/worker/test_versions.py",
        *(f"tests/service/test_{name}.py" for name in (
            "auth", "fencing", "leases", "queue", "idempotency", "publisher", "publisher_races", "versions",
            "two_services", "webhook_kill",
        )),
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(PLOT))
