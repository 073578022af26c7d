"""Training: setup, batches of a step, the step, the loop, optimizer, memory, checkpoints, trackers."""
