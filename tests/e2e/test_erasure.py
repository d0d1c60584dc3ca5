"""An erased item is nowhere in the stack's files, and the rebuilt adapter is one that never saw it, bit for bit."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from demo.client import Client, Json
from demo.run import BASE_MODEL
from service.local import LocalStack
from tests.e2e.conftest import Running, start

SECRET = "end with: quetzal-9031-marmalade"
BEARERS = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")


def inline(prompt: str, response: str, feedback: str) -> Json:
    return {"messages": [{"role": "user", "content": prompt}], "response": response, "feedback": feedback}


def about(client: Client, prompt: str, feedback: str) -> Json:
    """A remark on an answer of the base model, kept with its token ids and log-probs."""
    return {"completion_id": client.chat(BASE_MODEL, prompt, temperature=1.0).id, "feedback": feedback}


def teach(client: Client, adapter: str, items: list[Json], seed: int) -> Json:
    training = {"seed": seed, "steps": 3, "learning_rate": 1.5e-3}
    sent = client.call("POST", "/v1/feedback", json={"adapter": adapter, "items": items, "training": training})
    done = client.follow(sent["job_id"], lambda _: None)
    assert done["status"] == "succeeded", done
    return sent | {"version": done["version"]}


def files_of(data: Path, client: Client, adapter: str, n: int) -> dict[str, bytes]:
    """What a version's weights, configuration and optimizer are. Its card and provenance name runs and items by id."""
    adapter_id = client.call("GET", f"/v1/adapters/{adapter}")["id"]
    version = client.call("GET", f"/v1/adapters/{adapter}/versions/{n}")
    for run in (data / "adapters" / adapter_id).glob("run_*"):
        about_it = json.loads((run / "adapter" / "perennial.json").read_text())
        parent = about_it["parent"]["version"] if about_it["parent"] else 0
        if (about_it["feedback_ids"], parent) == (version["feedback_ids"], version["parent"]):
            names = [*BEARERS, *(f"trainer/{p.name}" for p in sorted((run / "trainer").iterdir()))]
            return {name: (run / name).read_bytes() for name in names}
    raise AssertionError(f"no files of {adapter}@v{n}")


def containing(data: Path, words: list[bytes]) -> list[str]:
    return [str(p) for p in sorted(data.rglob("*")) if p.is_file() and any(w in p.read_bytes() for w in words)]


def token_words(client: Client, completion_id: str, data: Path) -> list[bytes]:
    """The stored answer's token ids, as the database writes them."""
    with sqlite3.connect(f"file:{data / 'perennial.db'}?mode=ro", uri=True) as database:
        query = "SELECT prompt_token_ids, response_token_ids FROM rollouts WHERE id = ?"
        (row,) = database.execute(query, (completion_id,)).fetchall()
    database.close()
    return [text.strip("[]").encode() for text in row]


def doctor(stack: LocalStack) -> Json:
    """What `perennial doctor` says beside the running stack."""
    environment = os.environ | {
        "PERENNIAL_DATA_DIR": str(stack.data), "PERENNIAL_BASE_MODEL": BASE_MODEL,
        "PERENNIAL_ENGINE_URL": f"http://127.0.0.1:{stack.engine_port}",
    }  # fmt: skip
    command = [sys.executable, "-m", "service.cli", "doctor", "--json", "--grace", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_the_rebuilt_adapter_is_bit_for_bit_one_that_never_saw_the_item(tmp_path: Path) -> None:
    with start(tmp_path, PERENNIAL_DRAIN_SECONDS="0") as stack, Client(stack.url, stack.api_key) as client:
        running = Running(stack, client)
        running.create("saw")
        running.create("never")
        secret = about(client, "capital of the quetzal-9031 marmalade?", SECRET)
        first = [
            about(client, "capital of peru?", "lower case, please"),
            inline("capital of chile?", "Santiago.", "short"),
        ]
        second = [about(client, "capital of france?", "end with: hope that helps!")]
        third = [inline("capital of italy?", "Rome", "no emoji"), about(client, "capital of japan?", "in quotes")]
        fourth = [about(client, "capital of spain?", "end with: hope that helps!")]
        teach(client, "saw", first, seed=11)
        erased_batch = teach(client, "saw", [*second, secret], seed=12)
        teach(client, "saw", third, seed=13)
        teach(client, "saw", fourth, seed=14)
        for items, seed in ((first, 11), (second, 12), (third, 13), (fourth, 14)):
            teach(client, "never", items, seed)
        data = stack.data
        assert files_of(data, client, "saw", 1) == files_of(data, client, "never", 1)
        tainted = files_of(data, client, "saw", 4)
        control = files_of(data, client, "never", 4)
        name = "adapter/adapter_model.safetensors"
        assert tainted[name] != control[name], "the item had taught something"

        words = [SECRET.encode(), b"quetzal-9031", *token_words(client, secret["completion_id"], data)]
        assert containing(data, words) != []
        batch = client.call("GET", f"/v1/feedback/{erased_batch['id']}")
        (item,) = [i["id"] for i in batch["items"] if i["feedback"] == SECRET]
        erased = client.call("DELETE", f"/v1/feedback/items/{item}")
        assert containing(data, words) == [], "database, version directories and logs"
        assert erased["learnt_by"] == [{"adapter": "saw", "versions": [2, 3, 4]}]
        assert erased["completions"] == [secret["completion_id"]]

        rebuilt = client.call("POST", "/v1/adapters/saw/rebuild", json={})
        assert rebuilt["from_version"] == 1
        for job in rebuilt["job_ids"]:
            assert client.follow(job, lambda _: None)["status"] == "succeeded"
        assert client.call("GET", "/v1/adapters/saw")["live_version"] == 7
        for n, same in ((5, 2), (6, 3), (7, 4)):
            made, wanted = files_of(data, client, "saw", n), files_of(data, client, "never", same)
            assert made.keys() == wanted.keys()
            assert {k for k in made if made[k] != wanted[k]} == set()
            views = [client.call("GET", f"/v1/adapters/{a}/versions/{v}") for a, v in (("saw", n), ("never", same))]
            assert views[0]["standing_feedback"] == views[1]["standing_feedback"]
        greedy = [client.chat(a, "capital of peru?", temperature=0).text for a in ("saw", "never")]
        assert greedy[0] == greedy[1]
        assert containing(data, words) == []
        assert doctor(stack) == {"ok": True, "findings": []}
