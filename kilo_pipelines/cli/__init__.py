"""The command line and the supervisor. Holds: composition of everything for people. Does not belong here: business rules."""
