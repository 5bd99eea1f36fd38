"""The seeded world: a small web service with history, and pull requests of known kinds.

The five planted classes: SQL built from input, a shell command built from input, a credential in the code, a swallowed
error, a mutable default argument. The clean kind touches the same places soundly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_DB = '''"""Access to the orders database."""

import sqlite3


def connect(path):
    """A connection with rows by name."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    return connection


def order(connection, order_id):
    """One order, or None."""
    return connection.execute("select * from orders where id = ?", (order_id,)).fetchone()
'''

_EXPORT = '''"""Exports of orders."""

import csv


def write_csv(path, orders):
    """Writes orders as CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "customer", "total"])
        for order in orders:
            writer.writerow([order["id"], order["customer"], order["total"]])
'''

_CONFIG = '''"""Configuration from the environment."""

import os


def database_path():
    """Where the database lies."""
    return os.environ.get("ORDERS_DB", "orders.db")
'''

_TOTALS = '''"""Totals of orders."""


def total(lines):
    """Sum of quantity times price."""
    return sum(line["quantity"] * line["price"] for line in lines)


def with_tax(amount, rate):
    """Amount and tax."""
    return round(amount * (1 + rate), 2)
'''

_APP = '''"""The web application."""

from orders import config, db, totals


def show_order(order_id):
    """An order as JSON."""
    row = db.order(db.connect(config.database_path()), order_id)
    if row is None:
        return {"error": "not found"}, 404
    return {"id": row["id"], "total": totals.with_tax(row["total"], 0.2)}, 200
'''

_TEST = '''"""Tests of totals."""

from orders.totals import total, with_tax


def test_total():
    assert total([{"quantity": 2, "price": 3}]) == 6


def test_with_tax():
    assert with_tax(10, 0.2) == 12.0
'''

_REVIEW_MD = """# What reviewers look at

- Queries take parameters; SQL is never built from values.
- Commands get argument lists.
- Secrets come from the environment.
- An error is handled or passed on.
"""


def seed_history() -> list[tuple[str, dict[str, str | None]]]:
    """Commits of the default branch: message and changed files."""
    return [
        (
            "Start of the orders service",
            {"README.md": "# orders\n\nA small service.\n", "orders/__init__.py": "", "orders/totals.py": _TOTALS},
        ),
        ("Keep orders in SQLite", {"orders/db.py": _DB, "orders/config.py": _CONFIG}),
        ("Show an order over HTTP", {"orders/app.py": _APP}),
        ("Export orders as CSV", {"orders/export.py": _EXPORT, "tests/test_totals.py": _TEST}),
        ("Say what reviewers look at", {"REVIEW.md": _REVIEW_MD}),
    ]


@dataclass(frozen=True)
class PullSeed:
    """A pull request to open; files with None are deleted."""

    title: str
    body: str
    head_ref: str
    files: dict[str, str | None] = field(default_factory=dict)
    author: str = "grace"
    author_type: str = "User"


_PLANTED_DB = (
    _DB
    + '''

def orders_of(connection, customer):
    """Orders of a customer."""
    return connection.execute(f"select * from orders where customer = '{customer}' order by id").fetchall()
'''
)

_PLANTED_EXPORT = (
    _EXPORT.replace("import csv\n", "import csv\nimport subprocess\n")
    + '''

def archive(path, name):
    """Packs an export for a customer."""
    subprocess.run(f"tar czf /tmp/{name}.tar.gz {path}", shell=True, check=True)
'''
)

_PLANTED_CONFIG = (
    _CONFIG
    + '''

MAIL_PASSWORD = "hunter2-mail-prod"


def mail_login():
    """User and password of the mail server."""
    return "orders", MAIL_PASSWORD
'''
)

_PLANTED_TOTALS = (
    _TOTALS
    + '''

def discounts(codes, seen=[]):
    """Codes that count, each once."""
    for code in codes:
        if code not in seen:
            seen.append(code)
    return seen
'''
)

_PLANTED_APP = (
    _APP
    + '''

def refresh(cache, order_id):
    """Puts an order into the cache."""
    try:
        cache[order_id] = show_order(order_id)
    except Exception:
        pass
'''
)

_CLEAN_DB = (
    _DB
    + '''

def orders_of(connection, customer):
    """Orders of a customer."""
    return connection.execute("select * from orders where customer = ? order by id", (customer,)).fetchall()
'''
)

_CLEAN_EXPORT = (
    _EXPORT.replace("import csv\n", "import csv\nimport subprocess\n")
    + '''

def archive(path, target):
    """Packs an export."""
    subprocess.run(["tar", "czf", target, "--", path], check=True)
'''
)

_CLEAN_CONFIG = (
    _CONFIG
    + '''

def mail_login():
    """User and password of the mail server; KeyError when they are not configured."""
    return os.environ["MAIL_USER"], os.environ["MAIL_PASSWORD"]
'''
)

_CLEAN_TOTALS = (
    _TOTALS
    + '''

def discounts(codes, seen=None):
    """Codes that count, each once."""
    known = list(seen or [])
    for code in codes:
        if code not in known:
            known.append(code)
    return known
'''
)

_CLEAN_APP = (
    _APP
    + '''

def refresh(cache, order_id):
    """Puts an order into the cache; a missing order stays out."""
    try:
        cache[order_id] = show_order(order_id)
    except KeyError as error:
        return {"error": f"order {error} is incomplete"}
    return cache[order_id]
'''
)

_PLANTED: dict[str, str | None] = {
    "orders/db.py": _PLANTED_DB,
    "orders/export.py": _PLANTED_EXPORT,
    "orders/config.py": _PLANTED_CONFIG,
    "orders/totals.py": _PLANTED_TOTALS,
    "orders/app.py": _PLANTED_APP,
}
_CLEAN: dict[str, str | None] = {
    "orders/db.py": _CLEAN_DB,
    "orders/export.py": _CLEAN_EXPORT,
    "orders/config.py": _CLEAN_CONFIG,
    "orders/totals.py": _CLEAN_TOTALS,
    "orders/app.py": _CLEAN_APP,
}

KINDS = ("planted", "clean", "hidden", "large")


def pull(kind: str, variant: int) -> PullSeed:
    """A pull request of a kind; `variant` makes branch names differ."""
    if kind == "planted":
        return PullSeed("Customers, archives and discounts", "Adds what the shop asked for.", f"shop-{variant}", dict(_PLANTED))
    if kind == "clean":
        return PullSeed(
            "Customers and archives, done carefully", "Parameters, lists, errors.", f"careful-{variant}", dict(_CLEAN)
        )
    if kind == "hidden":
        files: dict[str, str | None] = {".gitattributes": "*.py -diff\n*.py binary\n", "orders/db.py": _PLANTED_DB}
        return PullSeed("Attributes", "Only formatting.", f"attributes-{variant}", files)
    if kind == "large":
        rows = "\n".join(f"    {number}: 'value {number}'," for number in range(12_000))
        return PullSeed(
            "A table",
            "Generated.",
            f"table-{variant}",
            {f"orders/table_{part}.py": f"ROWS = {{\n{rows}\n}}\n" for part in range(3)},
        )
    raise ValueError(f"kind must be one of {', '.join(KINDS)}")


def next_push(variant: int) -> dict[str, str | None]:
    """A further commit on a planted pull request: one defect mended, one added."""
    mended = _CLEAN_DB if variant % 2 else _PLANTED_DB
    note = f'"""Notes of the {variant}. push."""\n\n\ndef label(name, tags=[]):\n    """A label with its tags."""\n    tags.append(name)\n    return tags\n'
    return {"orders/db.py": mended, f"orders/labels_{variant}.py": note}
