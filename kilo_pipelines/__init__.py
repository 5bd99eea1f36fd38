"""kilo-pipelines: a self-hosted automation platform for coding agents, orchestrated by Dagster."""

__version__ = "0.1.0"
