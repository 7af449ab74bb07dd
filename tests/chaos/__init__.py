"""Faults on purpose: every stage of a study is killed, starved of disk, fed with damage; nothing may be lost."""
