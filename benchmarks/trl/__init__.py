"""Speed and numbers, side by side with TRL's DPOTrainer."""
