"""In the training loops that people have: Trainer, accelerate, TRL, plain loops, and scripts that change no line."""
