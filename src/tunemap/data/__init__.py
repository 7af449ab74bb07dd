"""Rows of a task, the tokens they become, the order in which they are trained on, and how outputs are scored."""
