"""The help of a command: its options in groups, those of every day first, and two examples."""

PANELS = {
    "Everyday options": "data eval_data eval_fraction model output beta lr epochs batch_size lora_rank",
    "Data": "columns format max_length control_tokens train_turns pairs margin_per_score chat_template on_bad_row row "
    "examples fix strict",
    "Model": "base_model ref_model trust_remote_code dtype device",
    "Training": "config resume dry_run trace card loss loss_options label_smoothing f_divergence ld_alpha wpo "
    "max_steps lr_scheduler min_lr warmup_ratio weight_decay adam_beta1 adam_beta2 max_grad_norm router_aux_loss_coef "
    "seed",
    "Adapter": "lora_type lora_alpha lora_targets modules_to_save load_in_4bit load_in_8bit",
    "Memory": "memory max_tokens gradient_checkpointing fsdp",
    "Evaluation": "eval_steps kl save_best show_answers samples sample_prompts sample_tokens reward judge judge_model "
    "gate per_pair report full",
    "Output": "export export_dtype logging_steps save_steps save_total_limit report_to json quiet log_json debug",
}
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
OTHERS = "Advanced"
FEW = 20  # options of a command that are one group
LONGEST = 60  # characters of choices that are shown in place of a type
EXAMPLES = {
    "check": ("dpo check --data my-pairs.jsonl", "dpo check --data my-pairs.jsonl --fix clean.jsonl"),
    "explain": ("dpo explain --data my-pairs.jsonl", "dpo explain --data my-pairs.jsonl --row 7"),
    "train": (
        "dpo train --data my-pairs.jsonl --eval-fraction 0.1 --lr 2e-5 --batch-size 8 --output runs/mine",
        "dpo train --data my-pairs.jsonl --eval-fraction 0.1 --lora-rank 16 --lr 2e-4 --output runs/lora",
    ),
    "chat": ("dpo chat runs/mine", "dpo chat runs/mine --save more-pairs.jsonl"),
    "generate": ('dpo generate runs/mine "How do I clean a pan?"', 'dpo generate runs/mine "Hello" --json'),
    "eval": (
        "dpo eval --data test.jsonl --model runs/mine --report report.html",
        "dpo eval --data test.jsonl --model runs/mine --model runs/lora",
    ),
    "sweep": (
        "dpo sweep --data my-pairs.jsonl --eval-data test.jsonl --lr 1e-6,1e-5",
        "dpo sweep --data my-pairs.jsonl --eval-data test.jsonl --beta 0.1,0.3",
    ),
    "init": ("dpo init --data my-pairs.jsonl", "dpo init experiment.yaml"),
    "losses": ("dpo losses", "dpo losses simpo"),
    "precompute-ref": (
        "dpo precompute-ref --data my-pairs.jsonl",
        "dpo precompute-ref --data my-pairs.jsonl --verify 8",
    ),
    "list": ("dpo cache list", "dpo cache list --json"),
    "prune": ("dpo cache prune --older-than 30", "dpo cache prune --model SmolLM2 --yes"),
    "merge": (
        "dpo merge --model runs/lora --output merged",
        "dpo merge --model runs/lora --output merged --export-dtype bfloat16",
    ),
    "export": ("dpo export runs/mine --gguf mine.gguf", "dpo export runs/mine --gguf mine.gguf --quantization q8_0"),
    "push": ("dpo push runs/mine me/my-model", "dpo push runs/mine me/my-model --public"),
}
