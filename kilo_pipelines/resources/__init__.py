"""Dagster resources: the store, the GitHub App, the self-hosted Cloud Agent.

Holds: how ops reach the outside, built from `Settings` at first use in the process that runs the op.
Does not belong here: what is done with them (ops), or any rule (core, services).
"""
