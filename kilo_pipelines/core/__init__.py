"""The engine's pure rules: owners, work states, leases, slots, effects, verdicts, callbacks, clock.

Holds: values and decisions without I/O. Does not belong here: Dagster, SQL, HTTP, environment, wall clock.
"""
