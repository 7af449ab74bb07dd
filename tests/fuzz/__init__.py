"""Mutated inputs: study files, dataset files and traces, of which each must be read rightly or refused in words."""
