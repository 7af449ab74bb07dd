"""What a run will need, before it runs: memory, FLOPs, communication, time, energy and money."""
