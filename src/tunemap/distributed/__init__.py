"""How a run is spread over devices: the process's place in the world, and the four strategies."""
