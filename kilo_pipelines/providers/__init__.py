"""Providers: clients and signature checks of the outside world; GitHub first.

Holds: how a provider is asked and answered, its errors in our reason codes. Does not belong here: the database, Dagster, decisions.
"""
