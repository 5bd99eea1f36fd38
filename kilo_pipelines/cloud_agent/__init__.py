"""Cloud Agent: the session protocol, the self-hosted runner (git, sandbox, model proxy, agent adapters), scripted agent.

Holds: everything that touches git, a sandbox or a model. Does not belong here: the database, Dagster, services' rules.
"""
