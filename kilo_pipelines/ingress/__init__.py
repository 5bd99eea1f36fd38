"""Ingress: the ASGI applications of the public listener (webhooks, callbacks) and the admin listener (control API, metrics).

Holds: verify, store, answer. Does not belong here: Dagster, pandas, provider clients, decisions about work.
"""
