"""Benchmarks: the figures of our goals, each measured with its baseline in the same run (`make bench`, docs/performance.md).

Holds: load, clocks around what the platform does, honest conditions. Does not belong here: assertions about speed (no test
waits for a figure), short cuts that a user of the platform doesn't have. Loopback only.
"""
