#!/usr/bin/env python3
# ruff: noqa
"""Golden-vector checker for self-distillation losses and their helpers.

Usage
-----
    python check.py --set public --adapter mypkg.golden_adapter:adapter
    python check.py --set public --set heldout --adapter path/to/file.py:adapter --family verl_sdpo --json report.json

Needs only torch and numpy.  From a test:  ``report = check.run("public", adapter)``.

Adapter contract
----------------
``adapter(family: str, settings: dict, inputs: dict) -> dict | None``

* ``inputs`` holds torch tensors (float32, bfloat16, int64) or plain Python values, named as in SPEC below.
  Whatever tensor the case differentiates (``case["grad_wrt"]``) arrives as a fresh leaf with
  ``requires_grad=True``; do not call backward, the checker does it on ``out["loss"]``.
* Return ``None`` for a family or setting you do not implement: the case counts as "skipped".
* Otherwise return a dict.  Loss families must hold a scalar tensor ``loss`` still attached to the graph.
  ``per_token_loss`` (B,T) is optional: the value before masking, after every per-token weight (IS ratio,
  rollout weight), compared only where the case's mask is on.  ``metrics`` is an optional flat dict of floats.
  Other families return the named outputs listed in SPEC.

SPEC (family -> inputs -> outputs)
----------------------------------
verl_sdpo      student_logits, teacher_logits (B,T,V), response_ids (B,T), response_mask (B,T), old_log_probs (B,T),
               self_distillation_mask (B,) or None, rollout_is_weights (B,T) or None
               settings: mode = full | topk | sampled, alpha, topk, add_tail, is_clip (None = no ratio at all), loss_agg_mode
               -> loss, [per_token_loss].  Top-k support comes from the STUDENT logits.
trl_sdpo       same tensors, self_distillation mask already folded in ``loss_mask`` -> loss (mean of per-row means over
               every row), [per_token_loss], [metrics.distillation_loss] (token mean)
claas_sdpo     student_logits (B,T,V), teacher_logprobs / teacher_indices (B,T,K; TEACHER support), base_logprobs,
               old_student_logprobs, response_mask, response_ids (B,T); settings alpha, is_clip, kl_reg_weight
               -> loss, [per_token_loss = divergence * ratio, without the base KL],
               [metrics: distill_loss, kl_reg, mean_is_ratio, clip_fraction]
openclaw_topk  student_logits (T,V), teacher_topk_log_probs, teacher_topk_indices (T,K) -> loss (token mean), [per_token_loss]
openclaw_combine  log_probs, old_log_probs, teacher_log_probs, advantages (T,), settings eps_clip, eps_clip_high, w_opd, w_rl
               -> loss (token mean); grad w.r.t. log_probs
ui_offline     logps_x, logps_xo, mask (B,T) -> loss; grad w.r.t. logps_x
ui_online      logps, old_logps, token_advantages, mask (B,T), settings epsilon_low/high -> loss; grad w.r.t. logps
agg            loss_mat, loss_mask (B,T), settings loss_agg_mode, loss_scale_factor -> value
ema            teacher, student (list of tensors), settings rate, steps -> teacher (list)
trust_region   ref_logits, student_logits, settings mix -> teacher_logits
rollout_weights log_ratio, response_mask, settings level, threshold, batch_normalize -> weights
entropy_mask   entropies, mask, settings top_entropy_quantile -> keep (bool as float)
tinker_adv     student_logprobs, teacher_logprobs (T,), prompt_len, settings kl_coef -> advantages (T,), kl_gain,
               effective_kl_coef, shifted_logprobs, shifted_advantages (L-1,)
reprompt       plain values: prompts (list of message lists), uids, scores, responses (texts), feedback (list), settings
               -> messages (list of message lists), mask (list of 0/1 floats), metrics (dict)
claas_steps    policy (ToyPolicy below; trainable parameters policy.A and policy.B), samples (list of dicts with full_ids,
               teacher_ids, response_start, teacher_response_start, response_ids, behavior_logprobs), settings: training
               values, steps_per_batch, refresh -> metrics_per_step (list of dicts: total_loss, distill_loss, kl_reg,
               mean_is_ratio, clip_fraction, grad_norm), A, B (final)

Case kinds: ``match`` = compare with the reference; ``finite`` = the reference itself returns NaN/Inf or a
meaningless value there, so loss and gradient must be finite, and equal to ``expect`` where that is given (float64 log-space value).
"""
from __future__ import annotations

import argparse, importlib, importlib.util, json, math, os, sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
DT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64, "float64": torch.float64}
LOSS_FAMILIES = {"verl_sdpo", "trl_sdpo", "claas_sdpo", "openclaw_topk", "openclaw_combine", "ui_offline", "ui_online"}


class ToyPolicy(torch.nn.Module):
    """Tiny frozen causal scorer plus a low-rank trainable adapter; ``adapter=False`` gives the frozen base."""

    def __init__(self, E, W, A, B):
        super().__init__()
        self.register_buffer("E", E.clone()); self.register_buffer("W", W.clone())
        self.A = torch.nn.Parameter(A.clone()); self.B = torch.nn.Parameter(B.clone())

    def logits(self, ids, adapter=True):
        e = self.E[ids]
        n = torch.arange(1, ids.shape[-1] + 1, dtype=e.dtype).view(1, -1, 1)
        h = torch.tanh(e.cumsum(1) / n + e)
        w = self.W + self.A @ self.B if adapter else self.W
        return h @ w


class Bundle:
    def __init__(self, root: Path):
        self.root = root
        self.index = json.loads((root / "index.json").read_text())
        packed = np.load(root / "vectors.npz")
        self.flat = {"f": packed["f"], "i": packed["i"].astype(np.int64)}

    def tensor(self, ref):
        kind, off, shape = self.index["arrays"][ref["key"]]
        n = int(np.prod(shape)) if shape else 1
        t = torch.from_numpy(self.flat[kind][off:off + n].reshape(shape).copy())
        return t.to(DT[ref["dtype"]])

    def value(self, v):
        if isinstance(v, dict) and set(v) == {"key", "dtype"}:
            return self.tensor(v)
        if isinstance(v, list):
            return [self.value(x) for x in v]
        if isinstance(v, dict):
            return {k: self.value(x) for k, x in v.items()}
        if isinstance(v, str) and v.startswith("float:"):
            return float(v[6:])
        return v


def load(name_or_path) -> Bundle:
    p = Path(name_or_path)
    return Bundle(p if p.is_dir() and (p / "index.json").exists() else HERE / str(name_or_path))


def build_inputs(bundle, case):
    inputs = {k: bundle.value(v) for k, v in case["inputs"].items()}
    if case["family"] == "claas_steps":
        inputs["policy"] = ToyPolicy(*(inputs.pop(k) for k in ("E", "W", "A", "B")))
    g = case.get("grad_wrt")
    if g:
        inputs[g] = inputs[g].clone().requires_grad_(True)
    return inputs


def _cmp(got, exp, mask=None):
    got = torch.as_tensor(got).detach().to(torch.float64)
    exp = torch.as_tensor(exp).detach().to(torch.float64)
    if got.shape != exp.shape:
        return math.inf, float(exp.abs().max()) if exp.numel() else 0.0
    if mask is not None:
        m = mask.bool().expand_as(exp)
        got, exp = got[m], exp[m]
    if exp.numel() == 0:
        return 0.0, 0.0
    d = (got - exp).abs()
    if not torch.isfinite(d).all():
        same = (got == exp) | (torch.isnan(got) & torch.isnan(exp))
        d = torch.where(same, torch.zeros_like(d), d)
        if not torch.isfinite(d).all():
            return math.inf, float(exp.abs().max())
    return float(d.max()), float(exp.abs().max())


def check_case(bundle, case, adapter):
    res = {"name": case["name"], "family": case["family"], "kind": case["kind"], "quantities": {}, "status": "ok"}
    fam = case["family"]
    inputs = build_inputs(bundle, case)
    grad_leaf = inputs.get(case.get("grad_wrt"))
    keep_mask = bundle.value(case["mask"]) if case.get("mask") is not None else None
    try:
        out = adapter(fam, dict(case["settings"]), dict(inputs))
    except Exception as e:  # a crash is a failure, with its reason kept
        res.update(status="FAIL", error=f"{type(e).__name__}: {e}"); return res
    if out is None:
        res["status"] = "skipped"; return res
    exp = {k: bundle.value(v) for k, v in case["expect"].items()}
    tol = case["tol"]

    def note(name, err, scale, atol=None, rtol=None):
        lim = (tol["atol"] if atol is None else atol) + (tol["rtol"] if rtol is None else rtol) * scale
        ok = err <= lim
        res["quantities"][name] = {"err": err, "limit": lim, "ok": ok}
        if not ok:
            res["status"] = "FAIL"

    if fam in LOSS_FAMILIES:
        loss = out.get("loss")
        if loss is None or not torch.is_tensor(loss) or loss.numel() != 1:
            res.update(status="FAIL", error="adapter returned no scalar loss tensor"); return res
        g = None
        if grad_leaf is not None:
            if loss.requires_grad:
                loss.backward()
                g = grad_leaf.grad
            if g is None:
                g = torch.zeros_like(grad_leaf)
        if case["kind"] == "finite":
            bad = (not torch.isfinite(loss).all()) or (g is not None and not torch.isfinite(g).all())
            note("finite", 1.0 if bad else 0.0, 0.0, atol=0.0, rtol=0.0)
        if "loss" in exp:
            note("loss", *_cmp(loss.reshape(()), exp["loss"]))
        if "grad" in exp and g is not None:
            note("grad", *_cmp(g, exp["grad"]))
        if "per_token_loss" in exp and out.get("per_token_loss") is not None:
            note("per_token_loss", *_cmp(out["per_token_loss"], exp["per_token_loss"], keep_mask))
        for k, v in exp.get("metrics", {}).items():
            if out.get("metrics") and k in out["metrics"]:
                note("metrics." + k, *_cmp(float(out["metrics"][k]), v))
    elif fam == "reprompt":
        for k in ("messages", "mask"):
            note(k, 0.0 if out.get(k) == exp[k] else 1.0, 0.0, atol=0.0, rtol=0.0)
        for k, v in exp.get("metrics", {}).items():
            if out.get("metrics") and k in out["metrics"]:
                note("metrics." + k, *_cmp(float(out["metrics"][k]), v))
    elif fam == "claas_steps":
        steps = out["metrics_per_step"]
        note("n_steps", abs(len(steps) - len(exp["metrics_per_step"])), 0.0, atol=0.0, rtol=0.0)
        for i, (got, want) in enumerate(zip(steps, exp["metrics_per_step"])):
            for k, v in want.items():
                if k in got:
                    note(f"step{i+1}.{k}", *_cmp(float(got[k]), v))
        for k in ("A", "B"):
            note(k, *_cmp(out[k], exp[k]))
    else:
        for k, v in exp.items():
            if k not in out:
                res.update(status="FAIL", error=f"missing output {k}"); return res
            if isinstance(v, list):
                for i, (a, b) in enumerate(zip(out[k], v)):
                    note(f"{k}[{i}]", *_cmp(a, b))
            else:
                note(k, *_cmp(out[k], v))
    return res


def run(set_name, adapter, families=None, name_contains=None):
    b = load(set_name)
    return [check_case(b, c, adapter) for c in b.index["cases"]
            if (not families or c["family"] in families) and (not name_contains or name_contains in c["name"])]


def summarize(results):
    s = {}
    for r in results:
        f = s.setdefault(r["family"], {"ok": 0, "FAIL": 0, "skipped": 0, "max_err": 0.0, "of_limit": 0.0})
        f[r["status"]] += 1
        for q in r["quantities"].values():
            f["max_err"] = max(f["max_err"], q["err"])
            if q["limit"] > 0:
                f["of_limit"] = max(f["of_limit"], q["err"] / q["limit"])
    return s


def load_adapter(spec):
    mod, _, attr = spec.rpartition(":")
    if mod.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(mod)))
        sp = importlib.util.spec_from_file_location("golden_adapter", mod)
        m = importlib.util.module_from_spec(sp); sp.loader.exec_module(m)
    else:
        m = importlib.import_module(mod)
    return getattr(m, attr or "adapter")


def main(argv=None):
    ap = argparse.ArgumentParser()
    ap.add_argument("--set", action="append", default=[])
    ap.add_argument("--adapter", required=True)
    ap.add_argument("--family", action="append", default=[])
    ap.add_argument("--name", default=None)
    ap.add_argument("--json", default=None)
    ap.add_argument("-v", action="store_true")
    ap.add_argument("--strict", action="store_true", help="skipped cases count as failures")
    a = ap.parse_args(argv)
    adapter = load_adapter(a.adapter)
    allres, bad = [], 0
    for s in a.set or ["public"]:
        res = run(s, adapter, a.family, a.name)
        for r in res:
            fail = r["status"] == "FAIL" or (a.strict and r["status"] == "skipped")
            bad += fail
            if a.v or fail:
                worst = max(((q["err"], n) for n, q in r["quantities"].items()), default=(0.0, "-"))
                failed = [n for n, q in r["quantities"].items() if not q["ok"]]
                print(f"{r['status']:8s} {s}:{r['name']}  max_abs_err={worst[0]:.3e} ({worst[1]}) {failed or ''} {r.get('error','')}")
        print(f"== set {s}")
        for f, v in summarize(res).items():
            print(f"   {f:18s} ok={v['ok']:3d} FAIL={v['FAIL']:3d} skipped={v['skipped']:3d} max_abs_err={v['max_err']:.3e} worst_err/limit={v['of_limit']:.3f}")
        allres += [{"set": s, **r} for r in res]
    if a.json:
        Path(a.json).write_text(json.dumps(allres, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
