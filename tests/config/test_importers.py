"""`dpo init --from`: configurations of other trainers, as their examples have them, become files of ours.

The texts are written for these tests, with the keys and kinds of values of recipes/zephyr-7b-beta/dpo and
recipes/smollm3/dpo of alignment-handbook, examples/llama-3 and examples/mistral of axolotl, examples/train_lora of
LLaMA-Factory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import resolve
from tests.helpers import Cli

TRL = """
model_name_or_path: org/sft
torch_dtype: bfloat16
attn_implementation: flash_attention_2
trust_remote_code: true
dataset_mixture:
  datasets:
    - {id: org/pairs, config: default, split: train_prefs, columns: [chosen, rejected], weight: 1.0}
  test_split_size: 2000
bf16: true
beta: 0.05
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.2]
gradient_accumulation_steps: 2
gradient_checkpointing: true
learning_rate: "5.0e-7"
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
max_grad_norm: 0.2
max_length: 2048
max_prompt_length: 512
num_train_epochs: 2.0
optim: adamw_torch
output_dir: out
per_device_train_batch_size: 4
save_steps: 0.5
padding_free: true
seed: 42
warmup_ratio: 0.1
a_new_key: 3
"""
QLORA = """
model_name_or_path: org/sft
use_peft: true
load_in_4bit: true
lora_r: 8
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
dataset_mixer: {org/pairs: 1.0}
dataset_splits: [train_prefs, test_prefs]
beta: 0.01
eval_steps: 100
report_to: [wandb]
"""
AXOLOTL = """
base_model: org/chat
model_type: LlamaForCausalLM
load_in_8bit: true
chat_template: llama3
rl: dpo
rl_beta: 0.3
datasets:
  - {path: org/pairs, split: train, type: chat_template.default, field_messages: conversation}
val_set_size: 0.05
sequence_len: 4096
sample_packing: false
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
learning_rate: 0.0002
adam_beta2: 0.95
bf16: auto
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
deepspeed: zero2.json
"""
LLAMA_FACTORY = """
model_name_or_path: org/instruct
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
pref_beta: 0.2
pref_loss: simpo
simpo_gamma: 1.0
pref_ftx: 0.1
dataset: first, second
template: llama3
cutoff_len: 1024
max_samples: 1000
output_dir: saves
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
"""


def imported(dpo: Cli, text: str, *more: Any) -> tuple[TrainOptions, dict[str, str]]:
    """Our options, as `dpo train --config` resolves the file, and what was left out."""
    Path("theirs.yaml").write_text(text)
    done = dpo("init", "--from", "theirs.yaml", "run.yaml", "--json", "--force", *more)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    written = Path("run.yaml").read_text()
    assert all(f"#   {key}: " in written for key in result["left_out"]), "the file names them too"
    return resolve(TrainOptions, {}, "run.yaml"), result["left_out"]


def test_trl(dpo: Cli) -> None:
    options, left = imported(dpo, TRL, "--devices", 8)
    assert options == TrainOptions(
        model="org/sft",
        data=["org/pairs:train_prefs"],
        loss="sigmoid=1.0,sft=0.2",
        beta=0.05,
        lr=5e-7,
        lr_scheduler="cosine",
        min_lr=5e-8,
        warmup_ratio=0.1,
        max_grad_norm=0.2,
        batch_size=4 * 2 * 8,
        epochs=2,
        max_length=2048,
        seed=42,
        gradient_checkpointing=True,
    )
    assert left.keys() == {
        *("torch_dtype", "attn_implementation", "trust_remote_code", "type of org/pairs:train_prefs"),
        *("test_split_size", "bf16", "max_prompt_length", "optim", "output_dir", "save_steps", "padding_free"),
        "a_new_key",
    }
    assert "rows are packed always" in left["padding_free"] and "no counterpart" in left["a_new_key"]


def test_trl_with_an_adapter_and_its_defaults(dpo: Cli) -> None:
    options, left = imported(dpo, QLORA)
    assert (options.data, options.eval_data) == (["org/pairs:train_prefs"], ["org/pairs:test_prefs"])
    assert (options.lora_rank, options.lora_alpha, options.lora_targets) == (8, 32, "q_proj,v_proj")
    assert options.load_in_4bit and options.eval_steps == 100 and options.trackers == ["wandb"]
    theirs = (options.lr, options.batch_size, options.epochs, options.warmup_ratio, options.max_length, options.seed)
    assert theirs == (1e-6, 8, 3, 0, 1024, 42), "where the file is silent, their defaults hold, not ours"
    assert left.keys() == {"lora_dropout", "loss_type"}
    assert "# default of TRL" in Path("run.yaml").read_text()


def test_a_fraction_of_a_data_set_is_no_share(dpo: Cli) -> None:
    text = TRL.replace("weight: 1.0", "weight: 0.5")
    options, left = imported(dpo, text)
    assert options.data == ["org/pairs:train_prefs"]
    assert "a part of that data set" in left["weight of org/pairs:train_prefs"]


def test_axolotl(dpo: Cli) -> None:
    options, left = imported(dpo, AXOLOTL)
    assert options == TrainOptions(
        model="org/chat",
        data=["org/pairs:train"],
        eval_fraction=0.05,
        beta=0.3,
        seed=42,
        lora_rank=32,
        lora_alpha=16,
        load_in_8bit=True,
        max_length=4096,
        batch_size=8,
        epochs=4,
        lr=2e-4,
        lr_scheduler="cosine",
        warmup_ratio=0.03,
        adam_beta2=0.95,
    )
    assert left.keys() == {
        *("model_type", "chat_template", "type of org/pairs:train", "sample_packing", "lora_dropout", "optimizer"),
        *("bf16", "flash_attention", "warmup_steps", "evals_per_epoch", "deepspeed"),
    }
    assert "10: the warm-up is a share of the steps" in left["warmup_steps"]
    simpo, _ = imported(dpo, AXOLOTL.replace("rl: dpo", "rl: simpo\nsimpo_gamma: 0.8\ncpo_alpha: 0"))
    assert (simpo.loss, simpo.loss_options) == ("simpo", "simpo_gamma=0.8")
    orpo, _ = imported(dpo, AXOLOTL.replace("rl: dpo\nrl_beta: 0.3", "rl: orpo\norpo_alpha: 0.2"))
    assert (orpo.loss, orpo.beta) == ("orpo", 0.2)


def test_llama_factory(dpo: Cli) -> None:
    options, left = imported(dpo, LLAMA_FACTORY)
    assert options == TrainOptions(
        model="org/instruct",
        data=["first", "second"],
        eval_fraction=0.1,
        loss="simpo=1,sft=0.1",
        loss_options="simpo_gamma=1.0",
        beta=0.2,
        lora_rank=4,
        max_length=1024,
        batch_size=8,
        epochs=3,
        lr=5e-6,
        lr_scheduler="cosine",
        warmup_ratio=0.1,
        seed=42,
    )
    assert left.keys() == {"do_train", "dataset", "template", "max_samples", "output_dir", "bf16", "ddp_timeout"}
    assert "dataset_info.json" in left["dataset"]
    named, left = imported(dpo, LLAMA_FACTORY, "--data", "my.jsonl")
    assert named.data == ["my.jsonl"] and "dataset" not in left
    full, _ = imported(dpo, LLAMA_FACTORY.replace("finetuning_type: lora", "finetuning_type: full"))
    assert full.lora_rank is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("base_model: org/m\ndatasets: [{path: org/d}]\n", "trains SFT"),
        ("base_model: org/m\nrl: kto\ndatasets: [{path: org/d}]\n", "trains KTO"),
        ("base_model: org/m\nrl: grpo\n", "trains GRPO"),
        ("model_name_or_path: m\nstage: sft\n", "trains SFT"),
        ("model_name_or_path: m\nstage: ppo\n", "trains PPO"),
        ("model_name_or_path: m\nstage: dpo\nfinetuning_type: freeze\n", "finetuning_type freeze"),
        ("model_name_or_path: m\nnum_generations: 8\nbeta: 0.1\n", "trains GRPO"),
        ("model_name_or_path: m\ndesirable_weight: 1.0\nbeta: 0.1\n", "trains KTO"),
        ("model_name_or_path: m\ndataset_name: d\n", "nothing in it is of DPO"),
        ("model_name_or_path: m\ndataset_name: d\nloss_type: kto_pair\n", "the loss kto_pair"),
        ("model_name_or_path: m\nbeta: 0.1\n", "--data is missing"),
        ("model: m\ndata: pairs.jsonl\n", "not recognised as a configuration of"),
        ("- a\n", "--from theirs.yaml: must be a mapping"),
    ],
)
def test_what_is_no_dpo_is_refused(text: str, why: str, dpo: Cli) -> None:
    Path("theirs.yaml").write_text(text)
    done = dpo("init", "--from", "theirs.yaml", "run.yaml")
    assert done.returncode == 2 and why in done.stderr and not Path("run.yaml").exists()


def test_devices_are_of_a_configuration(dpo: Cli) -> None:
    done = dpo("init", "--devices", 2)
    assert done.returncode == 2 and "--devices" in done.stderr
