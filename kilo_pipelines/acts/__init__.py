"""What people, and settings in their place, ask of a service: the rules applied to the store, in one call each.

Holds: functions that take the acting role and answer with what was opened or with the reason why not. The command line, the
control API and ops call the same ones.
Does not belong here: Dagster, providers, HTTP, or a rule that needs no store (services).
"""
