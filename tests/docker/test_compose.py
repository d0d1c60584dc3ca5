"""What docker/ promises, read from the files; Docker itself is not needed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.docker import compose
from worker.settings import WorkerSettings

ALL = compose.services()
DOCKERFILES = sorted(compose.DOCKER.glob("*.Dockerfile"))
BIN = Path(sys.executable).parent


def check(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_dockerfiles_pass_the_linter(file: Path) -> None:
    assert check(BIN / "hadolint", "--failure-threshold", "info", file) == ""


def test_the_linter_sees_what_it_should(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /x\n")
    assert "DL3007" in check(BIN / "hadolint", tmp_path / "Dockerfile")


def test_compose_fits_the_schema(tmp_path: Path) -> None:
    schema = (BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    assert check(*schema, compose.FILE) == ""
    (tmp_path / "compose.yaml").write_text("services: {a: {image: x, restrat: always}}\n")
    assert "restrat" in check(*schema, tmp_path / "compose.yaml")


@pytest.mark.parametrize("name", ALL)
def test_every_container_is_confined(name: str) -> None:
    service = ALL[name]
    user, group = service["user"].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & service.keys()
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert len(service["profiles"]) == 1


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_images_run_as_nobody_special_from_pinned_bases_with_no_tools_but_those_that_run(file: Path) -> None:
    text = file.read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE))
    bases = set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) - stages
    assert bases
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-slim-\w+", base) for base in bases)
    final = text[text.index("AS service" if "AS service" in text else "AS runtime") :]
    assert "HEALTHCHECK" in final
    assert "pip uninstall" in final
    assert _run_stages(text)
    for stage in _run_stages(text):
        assert re.findall(r"^USER (.+)", stage, re.MULTILINE)[-1] == "10001:10001"
        installed = re.findall(r"apt-get install --yes --no-install-recommends ([^&\\]+)", stage)
        assert [i.split() for i in installed] == ([["gcc", "libc6-dev"]] if stage.startswith("worker-cuda\n") else [])
        assert stage.count("apt-get") == 2 * len(installed), "update and install"


def _run_stages(text: str) -> list[str]:
    """The stages that set a user, each from its name on."""
    return [stage for stage in re.split(r"^FROM \S+ AS ", text, flags=re.MULTILINE)[1:] if "\nUSER " in stage]


@pytest.mark.parametrize("name", ALL)
def test_every_image_is_pinned(name: str) -> None:
    image, _, tag = ALL[name]["image"].partition(":")
    if image.startswith("perennial/"):
        project = tomllib.loads((compose.ROOT / "pyproject.toml").read_text())["project"]
        assert tag == project["version"]
        build = ALL[name]["build"]
        dockerfile = (compose.DOCKER / build["context"] / build["dockerfile"]).read_text()
        assert f" AS {build.get('target', 'service')}\n" in dockerfile
    else:
        assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-\w+)?", tag)
        assert "build" not in ALL[name]


def test_only_the_gateway_is_published_and_only_on_this_machine() -> None:
    published = {name: s["ports"] for name, s in ALL.items() if "ports" in s}
    assert published.keys() == {"service-cpu", "service"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_engines_and_the_database_are_reachable_from_where_they_are_needed_alone() -> None:
    networks = compose.load()["networks"]
    assert {n for n, v in networks.items() if not v.get("internal")} == {"front"}
    members = {n: {name for name, s in ALL.items() if n in s.get("networks", [])} for n in networks}
    assert members == {
        "front": {"service-cpu", "service"},
        "engine": {"engine-cpu", "service-cpu", "vllm", "service"},
        "work": {"worker-cpu", "service-cpu", "worker", "service"},
        "database": {"postgres", "init", "service"},
    }
    assert all("networks" in s or s["network_mode"] == "none" for s in ALL.values())


@pytest.mark.parametrize("name", ALL)
def test_what_runs_is_watched_and_what_ends_is_awaited(name: str) -> None:
    service = ALL[name]
    if compose.ends(service):
        assert service["healthcheck"] == {"disable": True}
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
        assert re.fullmatch(r"\d+(s|m)", service["healthcheck"]["start_period"])
    for needed, how in service.get("depends_on", {}).items():
        wanted = "service_completed_successfully" if compose.ends(ALL[needed]) else "service_healthy"
        assert how == {"condition": wanted}
        assert ALL[needed]["profiles"] == service["profiles"]


def test_both_profiles_start_in_order() -> None:
    cpu = [name for name, _ in compose.in_order(compose.services("cpu"))]
    assert cpu == ["init-cpu", "engine-cpu", "service-cpu", "worker-cpu"]
    gpu = [name for name, _ in compose.in_order(compose.services("gpu"))]
    assert sorted(gpu[:2]) == ["postgres", "preflight"]
    assert gpu[2:] == ["init", "vllm", "service", "worker"]


def test_every_variable_is_one_that_the_settings_know() -> None:
    service = {f"PERENNIAL_{field}".upper() for field in Settings.model_fields}
    worker = {f"PERENNIAL_WORKER_{field}".upper() for field in WorkerSettings.model_fields}
    known = service | {f"{name}_FILE" for name in service} | worker
    for name, s in ALL.items():
        ours = {v for v in s.get("environment", {}) if v.startswith("PERENNIAL_")}
        assert ours <= known, name
    dockerfiles = "".join(f.read_text() for f in DOCKERFILES)
    assert set(re.findall(r"^(?:ENV|   ) +(PERENNIAL_\w+)=", dockerfiles, re.MULTILINE)) <= known


def test_the_example_of_the_environment_file_is_whole() -> None:
    lines = (compose.DOCKER / ".env.example").read_text().splitlines()
    assert dict(line.split("=", 1) for line in lines if line and not line.startswith("#")) == compose.variables()


def test_secrets_come_from_files() -> None:
    for name, s in ALL.items():
        for variable, value in s.get("environment", {}).items():
            if re.search(r"PASSWORD|TOKEN$|SECRET|KEY$|TOKEN_FILE", variable):
                assert variable.endswith("_FILE"), (name, variable)
                assert str(value).startswith(("/run/secrets/", "/worker-key/"))


def test_state_is_in_named_volumes_and_the_model_is_read_only() -> None:
    volumes = set(compose.load()["volumes"])
    writers: dict[str, set[str]] = {}
    for name, s in ALL.items():
        for path, (source, read_only) in compose.mounts(s).items():
            if path == "/model":
                assert read_only
                assert (compose.DOCKER / source / "config.json").exists()
            else:
                assert source in volumes
                if not read_only:
                    writers.setdefault(source, set()).add(name)
    assert writers["worker-key"] == {"init"}
    assert writers["data"] == {"init", "service"}
    assert writers["adapters"] == {"init", "service", "worker"}


def test_gpus_are_reserved_where_they_are_used() -> None:
    def reserved(service: dict[str, Any]) -> bool:
        resources = service.get("deploy", {}).get("resources", {})
        return bool(resources.get("reservations", {}).get("devices"))

    assert {name for name, s in ALL.items() if reserved(s)} == {"vllm", "worker", "preflight"}
    assert all("limits" in s["deploy"]["resources"] for name, s in ALL.items() if name in ("service", "worker-cpu"))


def test_preflight_plans_with_what_vllm_and_the_worker_get() -> None:
    flags = dict(f.split("=") for f in ALL["preflight"]["command"][1:])
    vllm = dict(f.split("=") for f in ALL["vllm"]["command"] if "=" in f)
    shared = ("--max-lora-rank", "--max-loras", "--gpu-memory-utilization", "--max-model-len", "--model")
    assert {f: flags[f] for f in shared} == {f: vllm[f] for f in shared}
    assert flags["--quantise"] == ALL["worker"]["environment"]["PERENNIAL_WORKER_QUANTISE"]
    assert flags["--batch-tokens"] == str(ALL["worker"]["environment"]["PERENNIAL_WORKER_BATCH_TOKENS"])
