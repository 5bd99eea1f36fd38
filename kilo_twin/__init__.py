"""The offline world: a stateful twin of GitHub (REST, webhooks, git over HTTP) and a scripted model.

It knows nothing of kilo_pipelines and is reached over HTTP only, exactly like the real services.
"""
