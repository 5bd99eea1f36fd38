"""Ops: thin; resolve resources, call one function of core or services, write through the store, return.

Holds: the hands that carry work along (admission, launch, session, settle, effects).
Does not belong here: SQL, HTTP clients, rules that could be decided without I/O.
"""
