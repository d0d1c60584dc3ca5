"""Planted defects: does the fast test suite notice each of them?

    python tests/sdpo_core/mutants.py            all, a table, exit status 1 if one survives
    python tests/sdpo_core/mutants.py NAME ...   some

Each defect is an exact text replacement in a temporary copy of the library and its tests; the working tree is never
touched. A text that is not there exactly once is an error, so the list cannot rot silently. The copy without a defect
must pass first: otherwise every defect would look caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import peft  # noqa: F401 - imported once, for every fork
import pytest
import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

ROOT = Path(__file__).parents[2]
COPIED = ("sdpo_core", "tests/sdpo_core", "tests/golden", "pyproject.toml")
LINKED = ("demo", "docs")
TESTS = ("tests/sdpo_core", "tests/golden")


@dataclass(frozen=True)
class Mutant:
    """One defect: in `file`, the only `old` becomes `new`. `first` are the tests to run before all others."""

    name: str
    file: str
    old: str
    new: str
    first: str = ""


MUTANTS = (
    Mutant("swapped mixture", "divergence.py",
           "torch.logaddexp(student_logp + _log(1.0 - alpha), teacher_logp + _log(alpha))",
           "torch.logaddexp(student_logp + _log(alpha), teacher_logp + _log(1.0 - alpha))", "test_divergence.py"),
    Mutant("swapped ends", "divergence.py",
           "    if spec.limits and spec.alpha == 0.0:\n        return _kl(teacher_logp, student_logp)",
           "    if spec.limits and spec.alpha == 0.0:\n        return _kl(student_logp, teacher_logp)",
           "test_divergence.py"),
    Mutant("double softmax", "divergence.py", "return Scores(logits, log_probs(logits))",
           "return Scores(logits, log_probs(log_probs(logits).exp()))", "test_divergence.py"),
    Mutant("teacher has gradient", "divergence.py", "logp_V = log_probs(teacher_logits_V.detach())",
           "logp_V = log_probs(teacher_logits_V)", "test_terms.py test_properties.py"),
    Mutant("tail dropped", "divergence.py",
           "    return _append(student_K, student_tail), _append(teacher_K, teacher_tail.detach())",
           "    return student_K, teacher_K", "test_divergence.py"),
    Mutant("tail as a complement", "divergence.py",
           "    return torch.logsumexp(rest_V, dim=-1).clamp(min=TAIL_FLOOR)",
           "    return torch.log1p(-logp_V.gather(-1, index_K).exp().sum(-1).clamp(max=1.0)).clamp(min=TAIL_FLOOR)",
           "test_divergence.py"),
    Mutant("forbidden tokens stay -inf", "divergence.py", "dim=-1).clamp(min=LOGP_FLOOR)\n\n\n@dataclass",
           "dim=-1)\n\n\n@dataclass", "test_divergence.py"),
    Mutant("ratio with gradient", "weights.py",
           "bounded_log_ratio(student_logp.detach(), behaviour_logp.detach()).exp()",
           "bounded_log_ratio(student_logp, behaviour_logp.detach()).exp()", "test_properties.py test_terms.py"),
    Mutant("ratio of the live student", "terms.py", "ratio = importance_ratio(logp_BT, behaviour, is_clip)",
           "ratio = importance_ratio(student_BT, behaviour, None) * "
           "(student_BT - behaviour).exp().clamp(max=is_clip or 1e9)", "test_terms.py"),
    Mutant("missing clip", "weights.py", ".exp().clamp(max=clip)", ".exp()", "test_terms.py"),
    Mutant("clip on both sides", "weights.py", ".exp().clamp(max=clip)", ".exp().clamp(1 / clip, clip)",
           "test_terms.py"),
    Mutant("masked positions leak", "terms.py",
           "    logits = torch.where(on_BT1, student_logits_BTV, torch.zeros_like(student_logits_BTV))",
           "    logits = student_logits_BTV * on_BT1", "test_terms.py"),
    Mutant("k3 upside down", "weights.py", "    return torch.expm1(d) - d", "    return torch.expm1(-d) + d",
           "test_terms.py"),
    Mutant("mean of micro-batch means", "loop.py",
           "weights_B = torch.tensor([self.weights[r] for r in rows], device=self.policy.device)",
           "weights_B = torch.tensor(row_weights([len(s.response_ids) for s in samples], self.options.aggregation)) "
           "/ len(self.groups)", "test_loop.py"),
    Mutant("masked samples in the denominator", "loop.py",
           "lengths = [len(s.response_ids) if s.live else 0 for s in samples]",
           "lengths = [max(1, len(s.response_ids)) for s in samples]", "test_loop.py"),
    Mutant("dead rows left out of TRL's mean", "loop.py",
           "    weights = row_weights(lengths, options.aggregation)\n",
           "    weights = iter(row_weights([n for n in lengths if n], options.aggregation))\n"
           "    weights = [next(weights) if n else 0.0 for n in lengths]\n", "test_loop_options.py"),
    Mutant("off by one position", "samples.py", "(starts_B1 - 1 + steps_T)", "(starts_B1 + steps_T)", "test_loop.py"),
    Mutant("teacher sees the plain prompt", "scoring.py",
           "token_batch([s.teacher_prompt_ids for s in samples]", "token_batch([s.prompt_ids for s in samples]",
           "test_loop.py"),
    Mutant("teacher pass with the adapter on", "scoring.py",
           "            logits_BTV = response_logits(self.policy, batch, adapter=False)\n        if",
           "            logits_BTV = response_logits(self.policy, batch, adapter=True)\n        if", "test_loop.py"),
    Mutant("base pass with the adapter on", "scoring.py", "self._plain(samples, adapter=False)",
           "self._plain(samples, adapter=True)", "test_loop.py"),
    Mutant("adapter never off", "lora.py",
           "        with torch.no_grad(), self.model.disable_adapter():\n            return self._forward(batch)",
           "        with torch.no_grad():\n            return self._forward(batch)", "test_lora.py"),
    Mutant("stale live teacher", "loop.py", 'if self.options.teacher == "live" and self.history',
           'if self.options.teacher == "never" and self.history', "test_teachers.py"),
    Mutant("stale behaviour", "loop.py",
           "            self.behaviour = [None] * len(self.live)",
           "            self.behaviour = list(self.behaviour)", "test_loop.py"),
    Mutant("refresh always", "loop.py", "        if self.options.refresh:", "        if True:", "test_loop.py"),
    Mutant("base not looked up anew per row", "loop.py", "[self.fixed.base[r] for r in rows]",
           "self.fixed.base[: len(rows)]", "test_loop.py"),
    Mutant("gradients pile up", "loop.py", "        self.optimizer.zero_grad(set_to_none=True)\n", "",
           "test_loop.py"),
    Mutant("non-finite step taken", "loop.py",
           '        if not (math.isfinite(norm) and math.isfinite(peak_gap)):\n            return "non_finite"\n', "",
           "test_loop.py"),
    Mutant("gradients not clipped", "loop.py", "clip_grad_norm_(parameters, self.options.max_grad_norm)",
           "clip_grad_norm_(parameters, 1e9)", "test_loop_options.py test_golden.py"),
    Mutant("saved rate wins", "optimizer.py",
           "    named = dict(policy.trainable())\n",
           "    named = dict(policy.trainable())\n    optimizer.param_groups[0]['lr'] = 1e-2\n", "test_lora.py"),
    Mutant("moments dropped", "optimizer.py",
           '        optimizer.state[parameter] = {"step": torch.tensor(float(count)), **moments}\n',
           "        del count, moments\n", "test_lora.py test_loop.py"),
    Mutant("average of the factors", "ema.py",
           "name: weighted_sum([(1.0 - rate, old), (rate, current[name])], max_rank)",
           "name: weighted_sum([(1.0, LowRank((1 - rate) * old.left + rate * current[name].left, "
           "(1 - rate) * old.right + rate * current[name].right))], max_rank)", "test_teachers.py"),
    Mutant("average moves every step", "loop.py", "        self.optimizer.step()\n",
           "        self.optimizer.step()\n        self.scorer.ema and self.scorer.ema.update("
           "self.policy, self.options.teacher_rate, 64)\n", "test_teachers.py"),
    Mutant("average moves without an update", "loop.py",
           '        if not any(m.outcome == "updated" for m in self.history):\n            return\n', "",
           "test_teachers.py"),
    Mutant("hook stays behind", "lora.py", "hooks.callback(layer.register_forward_hook(_adding(deltas[name])).remove)",
           "layer.register_forward_hook(_adding(deltas[name]))", "test_teachers.py"),
    Mutant("stop before looking", "loop.py", 'return "gap_closed" if closed else "updated"', 'return "updated"',
           "test_loop.py"),
    Mutant("base left with an adapter", "lora.py", "    base: nn.Module = policy.model.unload()",
           "    base: nn.Module = policy.model.merge_and_unload()", "test_lora.py"),
    Mutant("standing remarks cut from the newest", "teacher_prompt.py", "said = [*older[first:], ",
           "said = [*older[: len(older) - first], ", "test_chat.py"),
)  # fmt: skip


def plant(mutant: Mutant, library: Path) -> str:
    """Put the defect in; returns the file's text before. Raises ValueError when the place is not there exactly once."""
    path = library / mutant.file
    before = path.read_text()
    if before.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: the text is {before.count(mutant.old)} times in {mutant.file}, not once")
    path.write_text(before.replace(mutant.old, mutant.new))
    return before


def copy_tree(target: Path) -> None:
    """The library, its tests, and links to what they read."""
    for name in COPIED:
        source, place = ROOT / name, target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__", "test_mutants.py"))
        else:
            shutil.copy(source, place)
    for name in LINKED:
        (target / name).symlink_to(ROOT / name)


def run_tests(tree: Path, paths: list[str]) -> str | None:
    """The first failing test, or None when all pass.

    In a fork of this process, which has imported the heavy libraries and nothing of ours: seconds saved per defect.
    """
    log = tree / "pytest.log"
    child = os.fork()
    if child == 0:
        _pytest(tree, paths, log)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return None
    output = log.read_text()
    failed = [line.split(" ")[1] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code not in (1, 2) or not failed:
        raise RuntimeError(f"pytest ended with {code}:\n{output[-2000:]}")
    return failed[0].removeprefix("tests/")


def _pytest(tree: Path, paths: list[str], log: Path) -> None:
    """Become pytest in `tree`. Never returns."""
    code = 70
    try:
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.chdir(tree)
        sys.path[0] = str(tree)
        sys.dont_write_bytecode = True
        flags = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        flags += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-m"]  # anyio came in with the heavy libraries
        code = int(pytest.main([*flags, "not slow", *paths]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def hunt(mutant: Mutant, tree: Path) -> str | None:
    """The test that notices the defect, or None: it survives. Likely tests first, then all fast ones."""
    before = plant(mutant, tree / "sdpo_core")
    try:
        likely = [str(p.relative_to(tree)) for name in mutant.first.split() for p in tree.glob(f"tests/*/{name}")]
        return (run_tests(tree, likely) if likely else None) or run_tests(tree, list(TESTS))
    finally:
        (tree / "sdpo_core" / mutant.file).write_text(before)


def check(mutants: tuple[Mutant, ...], *, baseline: bool = True) -> list[str]:
    """Hunt each, print the table, give back the names of the survivors."""
    survivors = []
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        copy_tree(tree)
        if baseline and (failed := run_tests(tree, list(TESTS))):
            raise SystemExit(f"without any defect, {failed} fails: nothing can be learnt from mutants")
        for mutant in mutants:
            started = time.perf_counter()
            caught = hunt(mutant, tree)
            survivors += [] if caught else [mutant.name]
            seconds = time.perf_counter() - started
            print(f"{mutant.name:42} {caught or 'SURVIVES':90} {seconds:5.1f} s", flush=True)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} defects caught")
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description="Does a test notice each planted defect?")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a defect first")
    parser.add_argument("names", nargs="*", help="defects by name; all when none is given")
    arguments = parser.parse_args()
    wanted = arguments.names
    torch.set_num_threads(1)
    if unknown := set(wanted) - {m.name for m in MUTANTS}:
        parser.error(f"no such defect: {', '.join(sorted(unknown))}")
    chosen = tuple(m for m in MUTANTS if not wanted or m.name in wanted)
    return 1 if check(chosen, baseline=not arguments.no_baseline) else 0


if __name__ == "__main__":
    sys.exit(main())
