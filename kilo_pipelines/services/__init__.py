"""The services: small plug-ins over one engine, the same files in each: config, admission, brief, outcome.

Holds: rules over values. Does not belong here: Dagster, SQL, HTTP, environment, wall clock.
"""
