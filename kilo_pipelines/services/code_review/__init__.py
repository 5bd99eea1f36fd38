"""Code Review: an automatic review of pull requests with an earned verdict."""
