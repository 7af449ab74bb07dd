"""What a run costs, measured: clock, memory, FLOPs, matmul ceiling, energy, and the environment it ran in."""
