"""The store: tables, named statements, queue, inbox, outbox, ledger of owners, migrations, embedded PostgreSQL.

Holds: every SQL statement. Does not belong here: rules that need no database (core, services), Dagster, providers.
"""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.store.analyses import Analyses
from kilo_pipelines.store.api_keys import ApiKeys, NewKey, prefix_of
from kilo_pipelines.store.approvals import Approval, Approvals
from kilo_pipelines.store.audit import Audit, Seal
from kilo_pipelines.store.budget import Budgets, Cost
from kilo_pipelines.store.crypto import Cipher
from kilo_pipelines.store.database import Database, DatabaseAwayError, Listener
from kilo_pipelines.store.delivery_gaps import STALE, DeliveryGaps, DueGap, Position
from kilo_pipelines.store.figures import BOUNDS, Ended, Figures, Now
from kilo_pipelines.store.finding_lists import OUTCOMES, Wanted
from kilo_pipelines.store.findings import DEADLINE_COLUMNS, Change, Findings, NotDisposedError, PageCount, noted
from kilo_pipelines.store.handover import Handover
from kilo_pipelines.store.hosted import Hosted, HostedClaim
from kilo_pipelines.store.inbox import AdmissionTx, Inbox
from kilo_pipelines.store.invariants import Invariants
from kilo_pipelines.store.keys import Keys
from kilo_pipelines.store.notices import Notices
from kilo_pipelines.store.outbox import Outbox
from kilo_pipelines.store.owners import AmbiguousInstallationError, Owners, Reviews, StaleRevisionError
from kilo_pipelines.store.people import People
from kilo_pipelines.store.queue import HOST_SEEN_SECONDS, Queue
from kilo_pipelines.store.recovery import RECONCILERS, Recovery
from kilo_pipelines.store.remediations import Remediations, note_all
from kilo_pipelines.store.reports import Limits, PeriodRead, PresentRead, Reports
from kilo_pipelines.store.retention import Ages, Retention
from kilo_pipelines.store.rows import (
    AnalysisRow,
    ApiKey,
    Claimed,
    ClaimedEffect,
    DeliveryRow,
    FindingEventRow,
    FindingRow,
    Integration,
    ItemRow,
    ItemView,
    Member,
    NewDelivery,
    NewFindingEvent,
    NewItem,
    Offer,
    Owner,
    Person,
    Principal,
    Receipt,
    Refused,
    RemediationRow,
    Repository,
    ReviewRow,
    ServiceConfig,
    SessionClaim,
    SessionRow,
    SlaRow,
    SyncRow,
    SyncTarget,
)
from kilo_pipelines.store.sessions import Sessions
from kilo_pipelines.store.settle import Settlements, SettleTx
from kilo_pipelines.store.setup_links import SetupLink, SetupLinks
from kilo_pipelines.store.spend import Spend
from kilo_pipelines.store.system_statements import INVARIANTS, SECURITY_CHECKS

__all__ = [
    "BOUNDS",
    "DEADLINE_COLUMNS",
    "HOST_SEEN_SECONDS",
    "INVARIANTS",
    "OUTCOMES",
    "RECONCILERS",
    "SECURITY_CHECKS",
    "STALE",
    "AdmissionTx",
    "Ages",
    "AmbiguousInstallationError",
    "AnalysisRow",
    "ApiKey",
    "Approval",
    "Budgets",
    "Change",
    "Cipher",
    "Claimed",
    "ClaimedEffect",
    "Cost",
    "DatabaseAwayError",
    "DeliveryRow",
    "DueGap",
    "Ended",
    "Figures",
    "FindingEventRow",
    "FindingRow",
    "HostedClaim",
    "Integration",
    "ItemRow",
    "ItemView",
    "Limits",
    "Listener",
    "Member",
    "NewDelivery",
    "NewFindingEvent",
    "NewItem",
    "NewKey",
    "NotDisposedError",
    "Now",
    "Offer",
    "Owner",
    "PageCount",
    "PeriodRead",
    "Person",
    "Position",
    "PresentRead",
    "Principal",
    "Receipt",
    "Refused",
    "RemediationRow",
    "Repository",
    "ReviewRow",
    "SQLAlchemyError",
    "Seal",
    "ServiceConfig",
    "SessionClaim",
    "SessionRow",
    "SettleTx",
    "SetupLink",
    "SlaRow",
    "StaleRevisionError",
    "Store",
    "SyncRow",
    "SyncTarget",
    "Wanted",
    "note_all",
    "noted",
    "prefix_of",
]


class Store:
    """All of it over one pair of logins."""

    def __init__(self, app_url: str, system_url: str, cipher: Cipher, clock: Clock) -> None:
        self.database = Database(app_url, system_url)
        self.cipher = cipher
        self.clock = clock
        self.inbox = Inbox(self.database, clock)
        self.queue = Queue(self.database, clock)
        self.sessions = Sessions(self.database, clock, cipher)
        self.hosted = Hosted(self.database, clock, cipher)
        self.settlements = Settlements(self.database, clock)
        self.outbox = Outbox(self.database, clock)
        self.approvals = Approvals(self.database, clock)
        self.budgets = Budgets(self.database)
        self.spend = Spend(self.database, clock)
        self.invariants = Invariants(self.database, clock)
        self.audit = Audit(self.database, clock)
        self.retention = Retention(self.database, clock)
        self.keys = Keys(self.database, cipher)
        self.people = People(self.database, clock)
        self.api_keys = ApiKeys(self.database, clock)
        self.recovery = Recovery(self.database, clock)
        self.handover = Handover(self.database, clock)
        self.owners = Owners(self.database, clock)
        self.setup_links = SetupLinks(self.database, clock)
        self.reviews = Reviews(self.database, clock)
        self.findings = Findings(self.database, clock)
        self.analyses = Analyses(self.database, clock)
        self.reports = Reports(self.database, clock)
        self.remediations = Remediations(self.database, clock)
        self.notices = Notices(self.database, clock)
        self.figures = Figures(self.database, clock)
        self.delivery_gaps = DeliveryGaps(self.database, clock)
        self.listener = self.database.listener
