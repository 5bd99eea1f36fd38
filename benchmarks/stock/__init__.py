"""The baseline of everything that goes through Dagster: a polling sensor, the stock launcher, the stock storage."""
