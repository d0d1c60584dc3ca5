"""Our answers to the golden vectors: each family mapped onto the library's own functions, nothing recomputed here.

`check.py` documents what goes in and out. claas_steps runs the product's training loop on the checker's toy policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdpo_core import Options, Sample, TokenBatch, claas, make_optimizer, train_batch
from sdpo_core.aggregation import aggregate
from sdpo_core.divergence import (
    DivergenceSpec,
    Support,
    Target,
    floor_outside_top_k,
    log_tail_from_kept,
    teacher_target,
    token_log_probs,
)
from sdpo_core.reprompt import RepromptRules, Rollout, reprompt, reprompt_metrics
from sdpo_core.signals import (
    centred_hindsight_loss,
    clipped_policy_loss,
    combined_advantage,
    gained_advantage,
    hindsight_loss,
    shifted_for_next_token,
)
from sdpo_core.teachers import ema_update, trust_region_logits
from sdpo_core.terms import TokenTerms, token_terms
from sdpo_core.weights import rollout_weights, top_entropy_mask

Values = dict[str, Any]
Terms = Callable[..., TokenTerms]
"""`token_terms`, or something with its signature."""

_SUPPORTS: dict[str, Support] = {"full": "full", "topk": "student", "sampled": "sampled"}


def adapter(family: str, settings: Values, inputs: Values) -> Values | None:
    """One golden case through the library."""
    if family in LOSSES:
        return LOSSES[family](settings, inputs, token_terms)
    if family == "claas_steps":
        return claas_steps(settings, inputs, ToyPolicyPort(inputs["policy"]))
    handler = _FAMILIES.get(family)
    return None if handler is None else handler(settings, inputs)


def _verl_spec(s: Values) -> DivergenceSpec:
    outside = "tail" if s["add_tail"] else "renormalise"
    return DivergenceSpec(s["alpha"], _SUPPORTS[s["mode"]], s["topk"], outside)  # type: ignore[arg-type]


def _verl_terms(s: Values, x: Values, mask_BT: Tensor, terms: Terms) -> TokenTerms:
    spec = _verl_spec(s)
    target = teacher_target(x["teacher_logits"], x["response_ids"], spec)
    return terms(
        x["student_logits"], target, x["response_ids"], mask_BT, spec,
        is_clip=s["is_clip"], behaviour_BT=x["old_log_probs"], token_weights_BT=x.get("rollout_is_weights"),
    )  # fmt: skip


def _verl(s: Values, x: Values, terms_of: Terms) -> Values:
    mask_BT = x["response_mask"]
    if x["self_distillation_mask"] is not None:
        mask_BT = mask_BT * x["self_distillation_mask"].unsqueeze(-1)
    terms = _verl_terms(s, x, mask_BT, terms_of)
    return {"loss": aggregate(terms.distill, mask_BT, s["loss_agg_mode"]), "per_token_loss": terms.distill}


def _trl(s: Values, x: Values, terms_of: Terms) -> Values:
    terms = _verl_terms(s, x, x["loss_mask"], terms_of)
    return {
        "loss": aggregate(terms.distill, x["loss_mask"], "row-mean-token-mean"),
        "per_token_loss": terms.distill,
        "metrics": {"distillation_loss": float(aggregate(terms.distill.detach(), x["loss_mask"], "token-mean"))},
    }


def _claas(s: Values, x: Values, terms_of: Terms) -> Values:
    teacher_K, index_K, ids_BT, mask_BT = (
        x[k] for k in ("teacher_logprobs", "teacher_indices", "response_ids", "response_mask")
    )
    if s["alpha"] == 1.0:
        spec = DivergenceSpec(1.0, "sampled", teacher_K.shape[-1])
        hit = (index_K == ids_BT.unsqueeze(-1)).float().argmax(-1)
        target = Target(floor_outside_top_k(token_log_probs(teacher_K, hit), index_K, ids_BT, spec.sampled_floor))
    else:
        spec = DivergenceSpec(s["alpha"], "teacher", teacher_K.shape[-1], "renormalise", limits=False)
        target = Target(teacher_K, index_K)
    terms = terms_of(
        x["student_logits"], target, ids_BT, mask_BT, spec,
        is_clip=s["is_clip"], behaviour_BT=x["old_student_logprobs"], base_logp_BT=x["base_logprobs"],
    )  # fmt: skip

    def mean(x_BT: Tensor) -> Tensor:
        return aggregate(x_BT, mask_BT, "token-mean")

    distill, anchor = mean(terms.distill), mean(terms.anchor)
    return {
        "loss": distill + s["kl_reg_weight"] * anchor,
        "per_token_loss": terms.distill,
        "metrics": {
            "distill_loss": float(distill.detach()),
            "kl_reg": float(anchor.detach()),
            "mean_is_ratio": float(mean(terms.ratio)),
            "clip_fraction": float(mean((terms.ratio >= s["is_clip"]).float())),
        },
    }


class ToyPolicyPort:
    """The checker's toy model behind the policy protocol of the training loop."""

    device = torch.device("cpu")
    path = "plain"
    """That it must be trained on: it has no hidden states."""

    def __init__(self, toy: Any) -> None:
        self.toy = toy

    def logits(self, batch: TokenBatch, *, adapter: bool) -> Tensor:
        with torch.set_grad_enabled(adapter and torch.is_grad_enabled()):
            logits_BNV: Tensor = self.toy.logits(batch.ids_BN, adapter=adapter)
        return logits_BNV[:, batch.first_logit :]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [("A", self.toy.A), ("B", self.toy.B)]


def _steps_options(s: Values) -> Options:
    return claas(
        s["alpha"],
        top_k=s["teacher_top_k"],
        is_clip=s["is_clip"],
        refresh=s["refresh"],
        base_kl_weight=s["kl_reg_weight"],
        measure_base_kl=True,
        steps=s["steps_per_batch"],
        learning_rate=s["learning_rate"],
        max_grad_norm=s["max_grad_norm"],
    )


def _steps_sample(x: Values) -> Sample:
    return Sample(
        prompt_ids=tuple(x["full_ids"][0, : x["response_start"]].tolist()),
        response_ids=tuple(x["response_ids"][0].tolist()),
        teacher_prompt_ids=tuple(x["teacher_ids"][0, : x["teacher_response_start"]].tolist()),
        behaviour_logprobs=tuple(x["behavior_logprobs"][0].tolist()),
    )


def claas_steps(s: Values, x: Values, policy: ToyPolicyPort) -> Values:
    """The product's training loop on the checker's toy policy."""
    options = _steps_options(s)
    samples = [_steps_sample(sample) for sample in x["samples"]]
    result = train_batch(policy, make_optimizer(policy, options), samples, options)
    metrics = [
        {
            "total_loss": m.loss,
            "distill_loss": m.distill_loss,
            "kl_reg": m.anchor_loss,
            "mean_is_ratio": m.mean_ratio,
            "clip_fraction": m.clip_fraction,
            "grad_norm": m.grad_norm,
        }
        for m in result.steps
    ]
    assert {m.path for m in result.steps} == {policy.path}
    return {"metrics_per_step": metrics, "A": policy.toy.A, "B": policy.toy.B}


def _openclaw_topk(_: Values, x: Values, terms_of: Terms) -> Values:
    logits_BTV = x["student_logits"].unsqueeze(0)
    teacher_K, index_K = x["teacher_topk_log_probs"].unsqueeze(0), x["teacher_topk_indices"].unsqueeze(0)
    target = Target(teacher_K, index_K, log_tail_from_kept(teacher_K))
    spec = DivergenceSpec(1.0, "teacher", teacher_K.shape[-1], "tail")
    mask_BT = torch.ones(logits_BTV.shape[:2])
    terms = terms_of(logits_BTV, target, index_K[..., 0], mask_BT, spec, is_clip=None)
    return {"loss": aggregate(terms.distill, mask_BT, "token-mean"), "per_token_loss": terms.distill[0]}


def _agg(s: Values, x: Values) -> Values:
    return {"value": aggregate(x["loss_mat"], x["loss_mask"], s["loss_agg_mode"], scale=s["loss_scale_factor"])}


def _ema(s: Values, x: Values) -> Values:
    teacher = [t.clone() for t in x["teacher"]]
    for _ in range(s["steps"]):
        ema_update(teacher, x["student"], s["rate"])
    return {"teacher": teacher}


def _trust_region(s: Values, x: Values) -> Values:
    return {"teacher_logits": trust_region_logits(x["ref_logits"], x["student_logits"], s["mix"])}


def _rollout_weights(s: Values, x: Values) -> Values:
    weights_BT = rollout_weights(
        x["log_ratio"], x["response_mask"],
        level=s["level"], threshold=s["threshold"], batch_normalise=s["batch_normalize"],
    )  # fmt: skip
    return {"weights": weights_BT}


def _entropy_mask(s: Values, x: Values) -> Values:
    return {"keep": top_entropy_mask(x["entropies"], x["mask"], s["top_entropy_quantile"])}


def _openclaw_combine(s: Values, x: Values) -> Values:
    advantages = combined_advantage(
        x["teacher_log_probs"], x["old_log_probs"], x["advantages"], distill_weight=s["w_opd"], reward_weight=s["w_rl"]
    )
    losses = clipped_policy_loss(x["log_probs"], x["old_log_probs"], advantages, s["eps_clip"], s["eps_clip_high"])
    return {"loss": losses.mean()}


def _ui_offline(_: Values, x: Values) -> Values:
    return {"loss": hindsight_loss(x["logps_x"], x["logps_xo"], x["mask"])}


def _ui_online(s: Values, x: Values) -> Values:
    loss = centred_hindsight_loss(
        x["logps"], x["old_logps"], x["token_advantages"], x["mask"],
        clip_low=s["epsilon_low"], clip_high=s["epsilon_high"],
    )  # fmt: skip
    return {"loss": loss}


def _tinker(s: Values, x: Values) -> Values:
    gained = gained_advantage(x["student_logprobs"], x["teacher_logprobs"], s["kl_coef"])
    return {
        "advantages": gained.advantages,
        "kl_gain": gained.gain,
        "effective_kl_coef": gained.gain * s["kl_coef"],
        "shifted_logprobs": shifted_for_next_token(x["student_logprobs"], x["prompt_len"]),
        "shifted_advantages": shifted_for_next_token(gained.advantages, x["prompt_len"]),
    }


def _reprompt(s: Values, x: Values) -> Values:
    rules = RepromptRules(
        template=s["reprompt_template"],
        solution_template=s["solution_template"].replace("{successful_previous_attempt}", "{solution}"),
        feedback_template=s["feedback_template"].replace("{feedback_raw}", "{feedback}"),
        success_threshold=s["success_reward_threshold"],
        exclude_self=s["dont_reprompt_on_self_success"],
        use_feedback=s["include_environment_feedback"],
        feedback_only_without_solution=s["environment_feedback_only_without_solution"],
        strip_thinking=s["remove_thinking_from_demonstration"],
    )
    columns = (x["prompts"], x["uids"], x["scores"], x["responses"], x["feedback"])
    rollouts = [Rollout(*row) for row in zip(*columns, strict=True)]
    results = reprompt(rollouts, rules)
    metrics = reprompt_metrics(rollouts, results, rules)
    return {
        "messages": [r.messages for r in results],
        "mask": [1.0 if r.taught else 0.0 for r in results],
        "metrics": {f"self_distillation/{name}": value for name, value in metrics.items()},
    }


LOSSES: dict[str, Callable[[Values, Values, Terms], Values]] = {
    "verl_sdpo": _verl,
    "trl_sdpo": _trl,
    "claas_sdpo": _claas,
    "openclaw_topk": _openclaw_topk,
}
"""Families that end in a per-token loss, however it is computed."""
_FAMILIES: dict[str, Callable[[Values, Values], Values]] = {
    "agg": _agg,
    "ema": _ema,
    "trust_region": _trust_region,
    "rollout_weights": _rollout_weights,
    "entropy_mask": _entropy_mask,
    "openclaw_combine": _openclaw_combine,
    "ui_offline": _ui_offline,
    "ui_online": _ui_online,
    "tinker_adv": _tinker,
    "reprompt": _reprompt,
}
