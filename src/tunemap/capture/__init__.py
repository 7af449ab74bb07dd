"""A short repeat of a run under a profiler: what the device did in a few steps, never how fast the run is."""
