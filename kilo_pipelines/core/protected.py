"""Paths whose change decides who may do what, or what runs or is obeyed without being asked; a person changes these."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

PROTECTED = (
    # What runs in continuous integration, and who must approve.
    ".github/*",
    ".gitlab*",
    ".circleci/*",
    ".buildkite/*",
    ".drone.yml",
    ".travis.yml",
    "azure-pipelines.yml",
    "bitbucket-pipelines.yml",
    "Jenkinsfile",
    "REVIEW.md",
    "CODEOWNERS",
    "*/CODEOWNERS",
    # What agents and editors obey, at any depth.
    *(
        pattern
        for name in ("AGENTS.md", "CLAUDE.md", "GEMINI.md", ".kilo*", ".claude/*", ".cursor/*", ".opencode/*", ".mcp.json")
        for pattern in (name, f"*/{name}")
    ),
    "opencode.json*",
    "kilo.json*",
    ".vscode/*",
    ".devcontainer/*",
    # What git and package managers run or read without being asked.
    ".gitattributes",
    "*/.gitattributes",
    ".gitmodules",
    ".githooks/*",
    ".pre-commit-config.yaml",
    ".envrc",
    "*.npmrc",
    "*.yarnrc*",
    "*.pnpmfile.cjs",
    "*pip.conf",
    # Programs and settings of build tools, at any depth: what a build starts with, and packages as archives that nobody reads.
    *(
        pattern
        for name in (
            ".husky/*",
            "lefthook.y*ml",
            ".lefthook.y*ml",
            ".yarn/*",
            ".pnp.*",
            "binding.gyp",
            ".mvn/*",
            "mvnw*",
            "gradle/wrapper/*",
            "gradlew*",
            ".cargo/config*",
            "nuget.config",
            ".bundle/config",
        )
        for pattern in (name, f"*/{name}")
    ),
)


def is_protected(path: str, allowed: Iterable[str] = ()) -> bool:
    """Whether a path is protected and none of the patterns in `allowed` lets it through.

    Letter case doesn't count: some file systems read `.GitHub/workflows` as what it looks like.
    """
    lowered = path.lower()
    return any(fnmatchcase(lowered, pattern.lower()) for pattern in PROTECTED) and not any(
        fnmatchcase(path, pattern) for pattern in allowed
    )
