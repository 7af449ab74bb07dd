"""Training one run: launcher, worker, the step loop, checkpoints."""
