"""What the platform tells of itself while it works: log lines and traces.

Holds: the one log format of every process, spans from a delivery to its effects, and the ids that both carry. Every room may use it,
but core and services, which do nothing that could be told. Does not belong here: figures out of the database (`store/figures.py`),
their exposition (`ingress/metrics.py`), and any text from outside.
"""
