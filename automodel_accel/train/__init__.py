"""Training: optimizers, schedules, logs and the loop."""
