"""What is reported of a run before its first step: device, steps, tokens, memory, disk, and what to change."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch

from dpo_cli.data.batching import row_costs
from dpo_cli.data.pairs import trained_on
from dpo_cli.evaluation.diagnostics import HOLD_OUT
from dpo_cli.models.loading import export_dtype
from dpo_cli.training.memory import usable_bytes
from dpo_cli.training.optimizer import BYTES, learning_rate
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter

if TYPE_CHECKING:
    from dpo_cli.training.setup import Run

# The sum of the steps' learning rates is about the most that AdamW moves a weight. Each 1e-6 of it moved the margin of
# an easy preference by 0.17 nats on the packaged model, and by 0.009 with an adapter: below these it stays under a nat.
MOVES, MOVES_ADAPTER = 5e-6, 1e-4
KEPT = {
    "full": "weights and moments float32",
    "split": "weights bfloat16 with their lower halves, moments 8 bits",
    "in-backward": "weights bfloat16 with their lower halves, moments 8 bits, updated in the backward pass",
}


def report_plan(run: Run, reporter: Reporter) -> None:
    """Report what the run will do and take; warn of too little memory or disk, and of held-out pairs trained on."""
    options, runner, trained = run.options, run.runner, run.fitted.step_bytes.parameters
    if not options.objective.reference:
        reporter.info("reference", f"none: --loss {options.objective.name} reads none, so nothing is scored or cached")
    threads = f", {torch.get_num_threads()} threads" if runner.device.type == "cpu" else ""
    if (several := distributed.world_size()) > 1:
        share = "a share of the model" if options.fsdp else "the whole model"
        here = distributed.local_world_size()
        reporter.info("ranks", f"{several} processes, {here} of them here; each keeps {share}")
    reporter.info("device", f"{runner.device.type}{threads}; compute {options.dtype}; {_kept(run)}")
    parameters = run.model.num_parameters()
    share = f"{trained:,} of them trained ({trained / parameters:.2%})" if options.lora_rank else "all trained"
    reporter.info("parameters", f"{parameters:,}, {share}")
    steps, padded_costs = [[i for each in step for i in each] for step in run.plan], row_costs(run.pairs, "padded")
    forwards = f"{sum(map(len, run.plan)):,} forwards of at most {runner.max_tokens:,} tokens"
    reporter.info("plan", f"{len(steps):,} steps of {options.batch_size} pairs in {forwards}")
    tokens = sum(run.costs[i] for step in steps for i in step)
    plain = sum(len(step) * max(padded_costs[i] for i in step) for step in steps)
    padded = f"padded batches of {options.batch_size} would take {plain:,} ({plain / tokens:.1f} times)"
    reporter.info("tokens", f"{tokens:,} to train on; {padded}")
    _report_room(run, reporter)
    least, tried = (MOVES_ADAPTER, 2e-4) if options.lora_rank else (MOVES, 2e-5)
    if sum(learning_rate(step, len(steps), options) for step in range(1, len(steps) + 1)) < least:
        count = f"{len(steps):,} step{'s' * (len(steps) > 1)} at lr {options.lr:g}"
        more = f"for a few hundred pairs try --lr {tried:g} --batch-size 8" if options.lr < tried else "take more steps"
        reporter.info("hint", f"{count} will hardly move the model: {more}")
    if not run.held_out:
        reporter.info("held out", f"no pairs: nothing will show whether the model learns the preference; {HOLD_OUT}")
    elif overlap := trained_on(run.held_out, run.trained, "will be")["text"]:
        reporter.warning(overlap)


def _report_room(run: Run, reporter: Reporter) -> None:
    """Report what the run takes of memory and disk, by estimates, and what there is of either."""
    fitted, state, unit = run.fitted, run.fitted.step_bytes, 2**30
    need, room = fitted.estimate(run.plan, run.costs, run.pairs, run.runner), usable_bytes(run.runner.device)
    kept = (state.frozen + state.parameters * sum(BYTES[fitted.memory]) / state.shards) / unit
    again = ", activations computed again in the backward pass" if fitted.recompute else ""
    parts = f"{kept:.1f} of them weights, gradients and moments{again}"
    reporter.info("memory", f"about {need / unit:.1f} GiB at most (estimate), {parts}")
    disk, free = _disk_bytes(run), shutil.disk_usage(next(p for p in run.folder.absolute().parents if p.exists())).free
    reporter.info("disk", f"about {disk / unit:.1f} GiB at most, for checkpoints and exports")
    for what, size, there, remedy in (
        ("memory", need, room, "a lower --max-length or --max-tokens"),
        ("disk", disk, free, "a lower --save-total-limit or --export-dtype bfloat16"),
    ):
        if size > there:
            reporter.warning(f"{what}: that is more than the {there / unit:.1f} GiB that are free: try {remedy}")


def _kept(run: Run) -> str:
    if not run.options.lora_rank:
        return KEPT[run.fitted.memory]
    base = run.options.quantize or ("bfloat16" if run.model.dtype == torch.bfloat16 else "float32")
    return f"frozen base {base}, adapter and its moments float32"


def _disk_bytes(run: Run) -> int:
    """What a run's folder takes at most: the checkpoints it keeps, its exports, and one of each being written."""
    options, trained, steps = run.options, run.fitted.step_bytes.parameters, len(run.plan)
    weight, _, moments = BYTES[run.fitted.memory]
    checkpoint, exported = trained * (weight + moments), trained * 4
    if not options.lora_rank or options.export == "merged":
        exported = run.model.num_parameters() * export_dtype(options.export_dtype, run.policy.source).itemsize
    if not options.lora_rank:
        checkpoint += 4 * (run.model.num_parameters() - trained)
    checkpoints = min(options.save_total_limit + 1, 1 + (steps - 1) // options.save_steps if options.save_steps else 1)
    return checkpoints * checkpoint + exported * (3 if options.save_best else 1)
