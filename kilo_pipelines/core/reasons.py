"""Every reason code of the platform, in one list: what happened and what a person may do (invariant 10)."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Stable machine codes; texts live in `MEANING`, documentation in docs/reasons.md."""

    # ingress
    SIGNATURE_INVALID = "signature_invalid"
    WEBHOOK_SECRET_MISSING = "webhook_secret_missing"  # noqa: S105
    BODY_TOO_LARGE = "body_too_large"
    BODY_NOT_JSON = "body_not_json"
    BODY_TOO_DEEP = "body_too_deep"
    HEADER_MISSING = "header_missing"
    INSTALLATION_ID_MISSING = "installation_id_missing"
    INTEGRATION_UNKNOWN = "integration_unknown"
    INTEGRATION_AMBIGUOUS = "integration_ambiguous"
    INTEGRATION_SUSPENDED = "integration_suspended"
    PAYLOAD_SHAPE_MISMATCH = "payload_shape_mismatch"
    DUPLICATE_DELIVERY = "duplicate_delivery"
    DELIVERY_ID_REUSED = "delivery_id_reused"
    EVENT_UNKNOWN = "event_unknown"
    STORE_UNAVAILABLE = "store_unavailable"
    LIFECYCLE_APPLIED = "lifecycle_applied"
    # repair of missed deliveries
    DELIVERY_REPAIRED = "delivery_repaired"
    DELIVERY_PULLED = "delivery_pulled"
    DELIVERY_EXPIRED = "delivery_expired"
    CALLBACK_REFUSED = "callback_refused"
    CALLBACK_EXPIRED = "callback_expired"
    CALLBACK_CONFLICT = "callback_conflict"
    # the operator's door
    LOGIN_REQUIRED = "login_required"
    ORIGIN_REFUSED = "origin_refused"
    METHOD_REFUSED = "method_refused"
    UI_UNAVAILABLE = "ui_unavailable"
    PASSWORD_WRONG = "password_wrong"  # noqa: S105
    PASSWORD_LOGIN_OFF = "password_login_off"  # noqa: S105
    LOGIN_TOO_OFTEN = "login_too_often"
    OIDC_NOT_CONFIGURED = "oidc_not_configured"
    OIDC_UNREACHABLE = "oidc_unreachable"
    OIDC_DISCOVERY_INVALID = "oidc_discovery_invalid"
    OIDC_STATE_INVALID = "oidc_state_invalid"
    OIDC_REFUSED = "oidc_refused"
    OIDC_TOKEN_INVALID = "oidc_token_invalid"  # noqa: S105
    OIDC_CLOCK_SKEW = "oidc_clock_skew"
    OIDC_EMAIL_UNVERIFIED = "oidc_email_unverified"
    OIDC_NOT_OPERATOR = "oidc_not_operator"
    # the audit chain
    AUDIT_EVENTS_CHANGED = "audit_events_changed"
    AUDIT_CHAIN_BROKEN = "audit_chain_broken"
    AUDIT_HEAD_DIFFERS = "audit_head_differs"
    AUDIT_CHAIN_CUT = "audit_chain_cut"
    # admission
    ACTION_IGNORED = "action_ignored"
    SKIPPED_DRAFT = "skipped_draft"
    REVIEWER_NOT_ENABLED = "reviewer_not_enabled"
    REPOSITORY_NOT_SELECTED = "repository_not_selected"
    REPOSITORY_UNKNOWN = "repository_unknown"
    SKIPPED_BOT_AUTHOR = "skipped_bot_author"
    ALREADY_REVIEWED = "already_reviewed"
    PULL_CLOSED = "pull_closed"
    SUPERSEDED = "superseded"
    ADMISSION_ERROR = "admission_error"
    ACTION_REQUIRED = "action_required"
    # the Security Agent's syncs
    SECURITY_DISABLED = "security_disabled"
    ALERT_OUTDATED = "alert_outdated"
    NOT_SYNCED_YET = "not_synced_yet"
    INSUFFICIENT_CREDITS = "insufficient_credits"
    FINDING_NOT_OPEN = "finding_not_open"
    ANALYSIS_NOT_WANTED = "analysis_not_wanted"
    ANALYSIS_ACTIVE = "analysis_active"
    ANALYSIS_LOOP = "analysis_loop"
    ANALYSED = "analysed"
    ANALYSIS_CONTRADICTED = "analysis_contradicted"
    TRIAGE_UNUSABLE = "triage_unusable"
    NO_REPOSITORIES = "no_repositories"
    ALERT_MALFORMED = "alert_malformed"
    ALERT_REFUSED = "alert_refused"
    SYNC_OUT_OF_TIME = "sync_out_of_time"
    SYNC_FAILED = "sync_failed"
    ALERTS_SYNCED = "alerts_synced"
    SYNC_PARTLY = "sync_partly"
    # reports and the control API of the Security Agent
    REPORT_PERIOD_INVALID = "report_period_invalid"
    REPORT_TOO_LARGE = "report_too_large"
    REPORT_OUT_OF_TIME = "report_out_of_time"
    QUERY_INVALID = "query_invalid"
    SETTINGS_INVALID = "settings_invalid"
    SETTINGS_STALE = "settings_stale"
    OWNER_NOT_NAMED = "owner_not_named"
    ROLE_NOT_ALLOWED = "role_not_allowed"
    # people and keys
    KEY_REFUSED = "key_refused"
    KEY_UNKNOWN = "key_unknown"
    KEY_NOT_LIVE = "key_not_live"
    ROLE_TOO_HIGH = "role_too_high"
    NOT_A_MEMBER = "not_a_member"
    ALREADY_MEMBER = "already_member"
    LAST_OWNER = "last_owner"
    PERSONAL_OWNER = "personal_owner"
    # the control API and the command line that speaks it
    SWITCH_NOT_SET = "switch_not_set"
    SWITCH_HELD = "switch_held"
    SETTINGS_MISSING = "settings_missing"
    API_ADDRESS_REFUSED = "api_address_refused"
    API_KEY_MISSING = "api_key_missing"
    API_UNREACHABLE = "api_unreachable"
    API_ANSWER_UNUSABLE = "api_answer_unusable"
    # notices
    NOTICE_NOT_WANTED = "notice_not_wanted"
    NOTIFIED = "notified"
    CHANNEL_MISSING = "channel_missing"
    CHANNEL_REFUSED = "channel_refused"
    CHANNEL_UNAVAILABLE = "channel_unavailable"
    ADDRESS_REFUSED = "address_refused"
    # dismissal
    INVALID_DISMISS_TARGET = "invalid_dismiss_target"
    DISMISSED = "dismissed"
    AUTO_DISMISS_DISABLED = "auto_dismiss_disabled"
    NEVER_DISMISSED = "never_dismissed"
    CATALOGUE_MISSING = "catalogue_missing"
    ANALYSIS_SPEAKS_AGAINST = "analysis_speaks_against"
    CONFIDENCE_TOO_LOW = "confidence_too_low"
    DISMISSAL_ACTIVE = "dismissal_active"
    GROUND_CHANGED = "ground_changed"
    GROUND_TOO_WIDE = "ground_too_wide"
    # remediation
    FINDING_NOT_FOUND = "finding_not_found"
    REPO_NOT_IN_SCOPE = "repo_not_in_scope"
    ANALYSIS_REQUIRED = "analysis_required"
    SANDBOX_ANALYSIS_REQUIRED = "sandbox_analysis_required"
    STALE_ANALYSIS = "stale_analysis"
    REMEDIATION_ACTIVE = "remediation_active"
    PR_ALREADY_OPENED = "pr_already_opened"
    MONITOR_REQUIRED = "monitor_required"
    EXPLOITABILITY_UNKNOWN = "exploitability_unknown"
    TRIAGE_ONLY = "triage_only"
    ACTION_NOT_CONCRETE = "action_not_concrete"
    NOT_EXPLOITABLE = "not_exploitable"
    MANUAL_REVIEW_REQUIRED = "manual_review_required"
    AUTO_REMEDIATION_DISABLED = "auto_remediation_disabled"
    APPROVAL_REQUIRED = "approval_required"
    INCLUDE_EXISTING_DISABLED = "include_existing_disabled"
    BELOW_THRESHOLD = "below_threshold"
    BEFORE_ENABLEMENT = "before_enablement"
    DUPLICATE_ANALYSIS_RESULT = "duplicate_analysis_result"
    RETRY_NOT_ALLOWED = "retry_not_allowed"
    COVERED_BY_OPEN_PULL = "covered_by_open_pull"
    REMEDIATED = "remediated"
    NO_CHANGES_NEEDED = "no_changes_needed"
    REMEDIATION_BLOCKED = "remediation_blocked"
    # claim and engine
    MOVED_ON = "moved_on"
    NO_SLOT = "no_slot"
    NO_CAPACITY = "no_capacity"
    PAUSED = "paused"
    KILL_SWITCH = "kill_switch"
    OWNER_CHANGED = "owner_changed"
    RETRIES_EXHAUSTED = "retries_exhausted"
    DEADLINE_PASSED = "deadline_passed"
    USER_CANCELLED = "user_cancelled"
    # limits, decided at the claim
    BUDGET_ZERO = "budget_zero"
    BUDGET_RESERVED = "budget_reserved"
    BUDGET_EXHAUSTED = "budget_exhausted"
    PRICE_UNKNOWN = "price_unknown"
    LIMITS_INVALID = "limits_invalid"
    AUTHOR_RATE_LIMITED = "author_rate_limited"
    LOOP_GUARDED = "loop_guarded"
    APPROVAL_NEEDED = "approval_needed"
    APPROVAL_STALE = "approval_stale"
    APPROVAL_REFUSED = "approval_refused"
    APPROVAL_NOTED = "approval_noted"
    OUTSIDER_SKIPPED = "outsider_skipped"
    SUGGEST_ONLY = "suggest_only"
    SUGGESTION_EXPIRED = "suggestion_expired"
    RULE_OF_TWO = "rule_of_two"
    SECRETS_MEET_OUTSIDERS = "secrets_meet_outsiders"
    WRITE_UNAPPROVED = "write_unapproved"
    # sessions
    FETCH_FAILED = "fetch_failed"
    HEAD_MOVED = "head_moved"
    REPOSITORY_TOO_LARGE = "repository_too_large"
    DIFF_TOO_LARGE = "diff_too_large"
    DIFF_EMPTY = "diff_empty"
    SANDBOX_UNAVAILABLE = "sandbox_unavailable"
    CHECKOUT_FAILED = "checkout_failed"
    AGENT_UNAVAILABLE = "agent_unavailable"
    AGENT_CRASHED = "agent_crashed"
    MODEL_UNREACHABLE = "model_unreachable"
    MODEL_REFUSED = "model_refused"
    BUDGET_EXCEEDED = "budget_exceeded"
    SESSION_SILENT = "session_silent"
    SESSION_TIMEOUT = "session_timeout"
    SESSION_LOST = "session_lost"
    WORKER_LOST = "worker_lost"
    WORKER_STOPPING = "worker_stopping"
    RESTORED = "restored"
    INTERRUPTED = "interrupted"
    RESULT_MISSING = "result_missing"
    RESULT_INVALID = "result_invalid"
    RESULT_UNBOUND = "result_unbound"
    NO_TURNS = "no_turns"
    # hosted sessions
    CLOUD_AGENT_UNAVAILABLE = "cloud_agent_unavailable"
    CLOUD_AGENT_BUSY = "cloud_agent_busy"
    CLOUD_AGENT_REFUSED = "cloud_agent_refused"
    CLOUD_AGENT_INVALID = "cloud_agent_invalid"
    CLOUD_AGENT_SESSION_GONE = "cloud_agent_session_gone"
    CLOUD_AGENT_PROTOCOL = "cloud_agent_protocol"
    CLOUD_AGENT_ADDRESS_REFUSED = "cloud_agent_address_refused"
    CLOUD_AGENT_FAILED = "cloud_agent_failed"
    HOSTED_WORK_REFUSED = "hosted_work_refused"
    HOSTED_UNMETERED = "hosted_unmetered"
    SETUP_ELSEWHERE = "setup_elsewhere"
    # changes of write sessions
    NO_CHANGES = "no_changes"
    CHANGE_UNREADABLE = "change_unreadable"
    CHANGE_PACK_REFUSED = "change_pack_refused"
    CHANGE_HISTORY = "change_history"
    CHANGE_NESTED_REPOSITORY = "change_nested_repository"
    CHANGE_GITLINK = "change_gitlink"
    CHANGE_SYMLINK = "change_symlink"
    CHANGE_MODE = "change_mode"
    CHANGE_PATH = "change_path"
    CHANGE_PROTECTED = "change_protected"
    CHANGE_FOREIGN_SOURCE = "change_foreign_source"
    CHANGE_INSTALL_SCRIPT = "change_install_script"
    CHANGE_TOO_LARGE = "change_too_large"
    BRANCH_TAKEN = "branch_taken"
    PUSH_FAILED = "push_failed"
    REGISTRY_UNKNOWN = "registry_unknown"
    REGISTRY_MIRROR_FAILED = "registry_mirror_failed"
    # verdicts
    REVIEWED = "reviewed"
    GATE_FAILED = "gate_failed"
    COVERAGE_GAP = "coverage_gap"
    EVIDENCE_MISSING = "evidence_missing"
    EVIDENCE_MISMATCH = "evidence_mismatch"
    EVIDENCE_REPORTED = "evidence_reported"
    PATH_EXCLUDED = "path_excluded"
    # set-up and doctor
    SETUP_LINK_INVALID = "setup_link_invalid"
    SETUP_STATE_INVALID = "setup_state_invalid"
    MANIFEST_CODE_REFUSED = "manifest_code_refused"
    USER_CODE_REFUSED = "user_code_refused"
    INSTALLATION_NOT_YOURS = "installation_not_yours"
    INSTALLATION_TAKEN = "installation_taken"
    INSTALLATION_REQUESTED = "installation_requested"
    INSTALLATION_GONE = "installation_gone"
    APP_EXISTS = "app_exists"
    APP_KEY_REFUSED = "app_key_refused"
    APP_PERMISSION_MISSING = "app_permission_missing"
    WEBHOOK_ADDRESS_DIFFERS = "webhook_address_differs"
    WEBHOOK_UNREACHED = "webhook_unreached"
    WEBHOOK_NOT_SEEN_YET = "webhook_not_seen_yet"
    CLOCK_SKEW = "clock_skew"
    SECRET_UNREADABLE = "secret_unreadable"  # noqa: S105
    METRICS_TOKEN_MISSING = "metrics_token_missing"  # noqa: S105
    MODEL_MISSING = "model_missing"
    MODEL_KEY_MISSING = "model_key_missing"
    MODEL_KEY_REFUSED = "model_key_refused"
    MODEL_UNKNOWN = "model_unknown"
    MODEL_CANNOT_CALL_TOOLS = "model_cannot_call_tools"
    MODEL_NOT_ALLOWED = "model_not_allowed"
    # providers
    GITHUB_APP_MISSING = "github_app_missing"
    PROVIDER_UNAVAILABLE = "provider_unavailable"
    PROVIDER_RATE_LIMITED = "provider_rate_limited"
    PROVIDER_REFUSED = "provider_refused"
    PROVIDER_NOT_FOUND = "provider_not_found"
    PROVIDER_INVALID = "provider_invalid"
    PROVIDER_AUTH = "provider_auth"
    PERMISSION_MISSING = "permission_missing"
    REPOSITORY_MOVED = "repository_moved"
    ACCESS_BLOCKED = "access_blocked"
    ALERTS_DISABLED = "alerts_disabled"
    ALERT_PAGE_TOO_LARGE = "alert_page_too_large"
    PAGE_LINK_REFUSED = "page_link_refused"
    PAGE_CURSOR_REFUSED = "page_cursor_refused"


MEANING: dict[Reason, tuple[str, str]] = {
    Reason.SIGNATURE_INVALID: ("The webhook's signature is missing or wrong.", "Set the same webhook secret at GitHub and here."),
    Reason.WEBHOOK_SECRET_MISSING: (
        "No webhook secret is configured, so no webhook can be trusted.",
        "Run `kilo-pipelines setup github`.",
    ),
    Reason.BODY_TOO_LARGE: ("The body is larger than 25 MB, GitHub's own cap.", "Nothing; GitHub doesn't send such bodies."),
    Reason.BODY_NOT_JSON: ("The body is not JSON.", "Set the webhook's content type to application/json."),
    Reason.BODY_TOO_DEEP: ("The body is nested deeper than any event.", "Nothing; it isn't an event of GitHub."),
    Reason.HEADER_MISSING: ("A header that GitHub always sends is missing.", "Check proxies between GitHub and the platform."),
    Reason.INSTALLATION_ID_MISSING: (
        "The event names no installation of the App.",
        "Send App webhooks, not repository webhooks.",
    ),
    Reason.INTEGRATION_UNKNOWN: (
        "No owner has connected this installation.",
        "Connect it: `kilo-pipelines setup github`.",
    ),
    Reason.INTEGRATION_AMBIGUOUS: ("More than one owner holds this installation.", "Disconnect all but one."),
    Reason.INTEGRATION_SUSPENDED: ("The integration or its owner is suspended.", "Unsuspend the installation at GitHub."),
    Reason.PAYLOAD_SHAPE_MISMATCH: (
        "The body is not what its event header says.",
        "Nothing; a replayed or forged event looks like this.",
    ),
    Reason.DUPLICATE_DELIVERY: ("This event was admitted before.", "Nothing."),
    Reason.DELIVERY_ID_REUSED: ("A known delivery id came with another body.", "Nothing; a forged header looks like this."),
    Reason.EVENT_UNKNOWN: ("No service handles this event.", "Nothing; unsubscribe it at the App to save traffic."),
    Reason.STORE_UNAVAILABLE: ("The database could not take the event.", "Look at the database; redeliver at GitHub."),
    Reason.LIFECYCLE_APPLIED: ("An installation event was applied to the integration.", "Nothing."),
    Reason.DELIVERY_REPAIRED: (
        "A missed webhook came by a redelivery.",
        "Nothing; docs/deliveries.md says how often is too often.",
    ),
    Reason.DELIVERY_PULLED: ("A missed webhook was taken out of GitHub's log of deliveries.", "Nothing."),
    Reason.DELIVERY_EXPIRED: (
        "A missed webhook could not be had before GitHub forgot it (three days).",
        "See why repair didn't work (docs/deliveries.md), then act by hand: `reviews dispatch`, `security sync`.",
    ),
    Reason.CALLBACK_REFUSED: (
        "A callback with a wrong token or for an unknown session.",
        "Nothing; forged callbacks look like this.",
    ),
    Reason.CALLBACK_EXPIRED: ("A callback after its token's end.", "Nothing; the session was settled without it."),
    Reason.CALLBACK_CONFLICT: ("A second callback with another body.", "Look at the session's events: somebody knew its token."),
    Reason.LOGIN_REQUIRED: ("The UI is the operator's.", "Log in at `/login` of the admin address."),
    Reason.ORIGIN_REFUSED: (
        "The request comes from a page that isn't ours.",
        "Open the UI under its own address; behind a proxy set KILO_ADMIN_ORIGIN.",
    ),
    Reason.METHOD_REFUSED: ("GraphQL goes through as POST with JSON only.", "Use the UI, or POST with a JSON body."),
    Reason.UI_UNAVAILABLE: ("Dagster's webserver doesn't answer.", "Look at `dagster-ui.log`; it is started again."),
    Reason.PASSWORD_WRONG: ("That is not the operator's password.", "`kilo-pipelines password reset` makes a new one."),
    Reason.PASSWORD_LOGIN_OFF: (
        "Logging in with the password is switched off.",
        "Log in at the issuer; in an emergency start the platform with KILO_PASSWORD_LOGIN=true.",
    ),
    Reason.LOGIN_TOO_OFTEN: ("Logins were tried faster than people do.", "Wait half a minute."),
    Reason.OIDC_NOT_CONFIGURED: (
        "No OpenID Connect issuer is configured.",
        "Set KILO_OIDC_ISSUER and KILO_OIDC_CLIENT_ID (docs/login.md), or log in with the password.",
    ),
    Reason.OIDC_UNREACHABLE: (
        "The OpenID Connect issuer doesn't answer, or not with what it should.",
        "Try again; `kilo-pipelines doctor` says what of it can't be reached.",
    ),
    Reason.OIDC_DISCOVERY_INVALID: (
        "The issuer's description of itself isn't one that can be trusted.",
        "Write KILO_OIDC_ISSUER exactly as the issuer names itself; `kilo-pipelines doctor` says what is wrong.",
    ),
    Reason.OIDC_STATE_INVALID: (
        "This login wasn't begun in this browser, took longer than ten minutes, or was finished before.",
        "Begin again at `/login`, in one tab, under the address that you began with.",
    ),
    Reason.OIDC_REFUSED: (
        "The issuer refused the login.",
        "Ask who runs the issuer whether you may use this application; an operator compares client id, secret and redirect address.",
    ),
    Reason.OIDC_TOKEN_INVALID: (
        "The issuer's answer could not be verified.",
        "Try again; if it stays, the operator finds what was wrong in the ingress's log. A forged answer looks like this.",
    ),
    Reason.OIDC_CLOCK_SKEW: (
        "The clocks of the issuer and of this machine differ by more than a minute.",
        "Set this machine's clock (NTP); `kilo-pipelines doctor` shows the difference.",
    ),
    Reason.OIDC_EMAIL_UNVERIFIED: (
        "The issuer doesn't say that this e-mail address is yours.",
        "Verify the address at the issuer, or have the operator name your `sub` in place of it.",
    ),
    Reason.OIDC_NOT_OPERATOR: (
        "You are logged in at the issuer, and not one of this platform's operators.",
        "Ask an operator to add you to KILO_OIDC_OPERATORS or to the operators' group.",
    ),
    Reason.AUDIT_EVENTS_CHANGED: (
        "Events of this seal were changed, removed or slipped in.",
        "Somebody wrote to the database past the platform: compare with a backup.",
    ),
    Reason.AUDIT_CHAIN_BROKEN: (
        "This seal doesn't follow the one before it.",
        "Somebody wrote to the database past the platform: compare with a backup.",
    ),
    Reason.AUDIT_HEAD_DIFFERS: (
        "The chain was written anew: its head isn't the exported one.",
        "Trust the exported heads; compare the database with a backup.",
    ),
    Reason.AUDIT_CHAIN_CUT: (
        "The exported heads go further than the database.",
        "Was a backup restored? The database is older than the heads.",
    ),
    Reason.ACTION_IGNORED: ("This action of the event is not reviewed.", "Nothing."),
    Reason.SKIPPED_DRAFT: ("The pull request is a draft.", "Mark it ready for review."),
    Reason.REVIEWER_NOT_ENABLED: ("Code Review is not enabled for this owner.", "Enable it in the owner's settings."),
    Reason.REPOSITORY_NOT_SELECTED: ("The repository is not selected for reviews.", "Add it to the selected repositories."),
    Reason.REPOSITORY_UNKNOWN: ("The repository is not in the installation.", "Give the App access to it at GitHub."),
    Reason.SKIPPED_BOT_AUTHOR: (
        "The pull request was opened by a bot.",
        "Turn `skip_bot_pull_requests` off to review those too.",
    ),
    Reason.ALREADY_REVIEWED: ("This head has an active or completed review.", "Dispatch a review by hand to repeat it."),
    Reason.PULL_CLOSED: ("The pull request is closed.", "Reopen it."),
    Reason.SUPERSEDED: ("A newer commit or base replaced what was reviewed.", "Nothing; the newer review is on its way."),
    Reason.ADMISSION_ERROR: ("The admission failed five times.", "Look at the log; this is a defect of the platform."),
    Reason.ACTION_REQUIRED: (
        "The service is off for this owner until a person acts.",
        "Mend what `kilo-pipelines services list` names, then `kilo-pipelines services enable`.",
    ),
    Reason.SECURITY_DISABLED: ("The Security Agent is off for this owner.", "Switch it on: `kilo-pipelines services enable`."),
    Reason.NO_REPOSITORIES: (
        "No repository of the owner is selected and within reach.",
        "Give the App access to repositories and select some.",
    ),
    Reason.ALERT_MALFORMED: (
        "An alert isn't in GitHub's shape and was set aside.",
        "`kilo-pipelines security quarantine` names its fields; the others were taken.",
    ),
    Reason.ALERT_REFUSED: (
        "The database refused an alert, and it was set aside.",
        "The quarantine names the database's error; this is a defect of the platform. The others were taken.",
    ),
    Reason.ALERTS_SYNCED: ("The alerts of every selected repository were read.", "Nothing."),
    Reason.SYNC_PARTLY: (
        "Some repositories were not read in a sync that somebody asked for.",
        "Look at each repository's outcome; the next sync goes on where this one stopped.",
    ),
    Reason.REPORT_PERIOD_INVALID: (
        "The period of a report begins after its end, ends in the future, has more than 90 days, or is named for a VEX export.",
        "Name two UTC days, or none; a VEX export tells the present and takes no period.",
    ),
    Reason.REPORT_TOO_LARGE: (
        "A report would hold more than 10,000 events or findings, or 8 MiB.",
        "Narrow the period, or name one repository.",
    ),
    Reason.REPORT_OUT_OF_TIME: (
        "A report could not be read within 25 s, or one of its statements within 8 s.",
        "Narrow the period, or name one repository; look at the database's load.",
    ),
    Reason.QUERY_INVALID: ("A request names an unknown filter or a value out of bounds.", "Correct the named fields."),
    Reason.SETTINGS_INVALID: ("Settings are not what the service takes.", "Correct the named fields."),
    Reason.SETTINGS_STALE: ("The settings were changed by somebody else since they were read.", "Read them again."),
    Reason.OWNER_NOT_NAMED: ("The operator has several owners and the request names none.", "Name one with `owner`."),
    Reason.ROLE_NOT_ALLOWED: ("The role of whoever asks doesn't allow this.", "Ask somebody with a higher role."),
    Reason.KEY_REFUSED: (
        "The API key is missing, unknown, expired or revoked, or its person is no member any more. Which of these is told to nobody.",
        "Use a live key: an owner's `kilo-pipelines keys list` shows which ones are.",
    ),
    Reason.KEY_UNKNOWN: ("There is no such key of this owner.", "Look at `kilo-pipelines keys list`."),
    Reason.KEY_NOT_LIVE: (
        "The key is expired, revoked or rotated already, or its person is no member any more.",
        "Make a new one: `kilo-pipelines keys create`.",
    ),
    Reason.ROLE_TOO_HIGH: (
        "A key was asked for that may more than its person.",
        "Ask for a lower role, or give the person a higher one first.",
    ),
    Reason.NOT_A_MEMBER: (
        "The person is no member of this owner.",
        "Look at `kilo-pipelines members list`; `members add` makes somebody a member.",
    ),
    Reason.ALREADY_MEMBER: ("The person is a member of this owner.", "Change the role: `kilo-pipelines members change`."),
    Reason.LAST_OWNER: ("An organization that has an owner keeps one.", "Make somebody else an owner first."),
    Reason.PERSONAL_OWNER: (
        "A person's own owner belongs to exactly that person.",
        "Create an organization for several people; name the person's login for an owner of kind `user`.",
    ),
    Reason.SWITCH_NOT_SET: (
        "Nothing is switched in this scope: it isn't paused or stopped, or isn't in suggest-only mode.",
        "Name the scope as it was switched.",
    ),
    Reason.SWITCH_HELD: ("The operator switched this scope.", "Ask the operator; only the operator releases it."),
    Reason.SETTINGS_MISSING: ("The owner has no settings of this service.", "Save some first; saving doesn't switch it on."),
    Reason.API_ADDRESS_REFUSED: (
        "The control API's address isn't https, or isn't an address: a key would go over the wire in the clear.",
        "Set KILO_API_URL to an https address; plain http is for this machine alone.",
    ),
    Reason.API_KEY_MISSING: (
        "There is no API key to ask the control API with.",
        "Set KILO_API_KEY_FILE or KILO_API_KEY; on the platform's machine, start it: `kilo-pipelines up`.",
    ),
    Reason.API_UNREACHABLE: (
        "The control API doesn't answer.",
        "Is the platform running? On its machine `kilo-pipelines status` tells; elsewhere look at KILO_API_URL.",
    ),
    Reason.API_ANSWER_UNUSABLE: (
        "What answers at the control API's address is something else, or of another version.",
        "Look at KILO_API_URL: redirects are not followed.",
    ),
    Reason.SYNC_OUT_OF_TIME: (
        "The owner's share of the run was used up.",
        "Nothing; the next sync goes on with what was left.",
    ),
    Reason.SYNC_FAILED: (
        "A repository's alerts could not be taken: something failed that no rule foresees.",
        "The run's log names it and where; the other repositories were read, and the next sync tries again.",
    ),
    Reason.REPO_NOT_IN_SCOPE: (
        "The finding's repository isn't selected, or no working installation sees it.",
        "Select it in the owner's settings, or let the App see it.",
    ),
    Reason.ANALYSIS_REQUIRED: ("The finding has no completed analysis.", "Start one with `kilo-pipelines security analyze`."),
    Reason.SANDBOX_ANALYSIS_REQUIRED: (
        "Only the alert's metadata were analysed, not the repository.",
        "Start a deep analysis: `kilo-pipelines security analyze --deep`.",
    ),
    Reason.STALE_ANALYSIS: (
        "The finding, or what of the repository its analysis rests on, changed since it was analysed.",
        "Analyse it again.",
    ),
    Reason.REMEDIATION_ACTIVE: ("A remediation of the finding or of its package waits or runs.", "Wait for it, or cancel it."),
    Reason.PR_ALREADY_OPENED: (
        "A pull request for the finding is open, or was merged and its fix has not shown yet.",
        "Merge or close it.",
    ),
    Reason.MONITOR_REQUIRED: (
        "The analysis says to watch the finding, not to change anything.",
        "Analyse it again when that changed.",
    ),
    Reason.EXPLOITABILITY_UNKNOWN: (
        "The analysis couldn't tell whether the finding can be exploited.",
        "Analyse it again, or start the remediation by hand where the analysis names an action.",
    ),
    Reason.TRIAGE_ONLY: ("The analysis asks for no change to the repository.", "Analyse it again if a change is wanted."),
    Reason.ACTION_NOT_CONCRETE: (
        "Neither a patched version nor a fix in words is known.",
        "Wait for a patched version, or mend it by hand.",
    ),
    Reason.NOT_EXPLOITABLE: (
        "The analysis says that the finding can't be exploited.",
        "Dismiss it, or start the remediation by hand.",
    ),
    Reason.MANUAL_REVIEW_REQUIRED: ("The analysis wants a person to look first.", "Look, then start the remediation by hand."),
    Reason.AUTO_REMEDIATION_DISABLED: ("Automatic remediation is off.", "Switch `auto_remediation_enabled` on."),
    Reason.APPROVAL_REQUIRED: (
        "A person has to start each remediation.",
        "Start it by hand, or switch `auto_remediation_require_approval` off.",
    ),
    Reason.INCLUDE_EXISTING_DISABLED: (
        "What was analysed before is left alone by a remediation of all findings.",
        "Switch `auto_remediation_include_existing` on.",
    ),
    Reason.BELOW_THRESHOLD: (
        "The finding's severity is below the owner's threshold.",
        "Change `auto_remediation_min_severity`, or start it by hand.",
    ),
    Reason.BEFORE_ENABLEMENT: (
        "The finding was analysed before automatic remediation was switched on.",
        "Start it by hand or for all findings at once.",
    ),
    Reason.DUPLICATE_ANALYSIS_RESULT: (
        "The same analysis led to a remediation already.",
        "Analyse the finding again, or try again with `--retry`.",
    ),
    Reason.RETRY_NOT_ALLOWED: (
        "No remediation of the finding ended in a way that can be tried again.",
        "Start it without `--retry`.",
    ),
    Reason.COVERED_BY_OPEN_PULL: (
        "Another open pull request of ours changes the same package in the same manifest.",
        "Merge or close that one first.",
    ),
    Reason.REMEDIATED: ("The change is pushed; its pull request is being opened.", "Review the pull request."),
    Reason.NO_CHANGES_NEEDED: (
        "The agent found nothing to change.",
        "Read its summary; the next sync shows whether the alert is gone.",
    ),
    Reason.REMEDIATION_BLOCKED: (
        "The agent could not make the change, and says why.",
        "Read its summary, then mend it by hand or try again with `--retry`.",
    ),
    Reason.INSUFFICIENT_CREDITS: (
        "The model's provider wants to be paid first.",
        "Add credit there; what needs the model waits and goes on by itself.",
    ),
    Reason.FINDING_NOT_FOUND: ("There is no such finding of this owner.", "Look at `kilo-pipelines security findings`."),
    Reason.FINDING_NOT_OPEN: ("The finding is fixed or ignored.", "Nothing; reopen it at its source to have it looked at."),
    Reason.ANALYSIS_NOT_WANTED: (
        "The finding is not due to automatic analysis any more.",
        "Nothing; start an analysis by hand to have one after all.",
    ),
    Reason.ANALYSIS_ACTIVE: ("The finding is being analysed.", "Wait for it, or start it over with `--restart`."),
    Reason.ANALYSIS_LOOP: (
        "The finding came back more often than it is analysed again by itself.",
        "Look why it is reopened, then start an analysis by hand.",
    ),
    Reason.ANALYSED: ("The finding was analysed.", "Nothing."),
    Reason.ANALYSIS_CONTRADICTED: (
        "The analysis says not exploitable, and the repository has uses that it doesn't name, or it names nothing to look for.",
        "Look yourself, or start the analysis over with `--restart`.",
    ),
    Reason.TRIAGE_UNUSABLE: (
        "The model's answer about the metadata can't be used.",
        "Nothing; the repository decides. Look at the model if it happens again.",
    ),
    Reason.ALERT_OUTDATED: ("A later state of the alert is known.", "Nothing; events come late and in any order."),
    Reason.NOT_SYNCED_YET: ("The owner's alerts were never read.", "Nothing; the first sync brings this one too."),
    Reason.INVALID_DISMISS_TARGET: ("The alert's number isn't one.", "Dismiss it at its source."),
    Reason.DISMISSED: ("The finding was dismissed.", "Nothing."),
    Reason.AUTO_DISMISS_DISABLED: ("Automatic dismissal is off for this owner.", "Switch `auto_dismiss_enabled` on."),
    Reason.NEVER_DISMISSED: ("Critical and known exploited vulnerabilities are dismissed by people only.", "Dismiss it by hand."),
    Reason.CATALOGUE_MISSING: (
        "There is no catalogue of exploited vulnerabilities, so nothing is dismissed automatically.",
        "Set KILO_KNOWN_EXPLOITED_FILE to a readable one.",
    ),
    Reason.ANALYSIS_SPEAKS_AGAINST: (
        "The analysis doesn't say that the finding can be dismissed.",
        "Read it: `kilo-pipelines security show`.",
    ),
    Reason.CONFIDENCE_TOO_LOW: (
        "The analysis is less sure than the owner's settings ask for.",
        "Dismiss it by hand, or lower `auto_dismiss_confidence`.",
    ),
    Reason.DISMISSAL_ACTIVE: ("The finding is being dismissed.", "Nothing."),
    Reason.GROUND_CHANGED: ("What a dismissal rested on has changed.", "Have the finding analysed again."),
    Reason.GROUND_TOO_WIDE: (
        "The texts that a dismissal rests on stand in more lines than can be looked at again.",
        "Have the finding analysed again, or dismiss it by hand.",
    ),
    Reason.NOTICE_NOT_WANTED: ("What was to be told doesn't hold any more.", "Nothing."),
    Reason.NOTIFIED: ("The people who are to be told are told.", "Nothing; `security notices list` shows each message."),
    Reason.CHANNEL_MISSING: (
        "The channel isn't configured.",
        "Set KILO_SMTP_URL and KILO_SMTP_FROM, or store the Slack token; then `effects retry`.",
    ),
    Reason.CHANNEL_REFUSED: ("The receiver refused the message.", "Mend the address or the access, then `effects retry`."),
    Reason.CHANNEL_UNAVAILABLE: ("The receiver can't be reached now.", "Nothing; it is tried again."),
    Reason.ADDRESS_REFUSED: (
        "The webhook's host is not a public address.",
        "Name one that is reachable from the internet over https.",
    ),
    Reason.MOVED_ON: ("The item is not waiting any more.", "Nothing; another run has it."),
    Reason.NO_SLOT: ("The owner has as many active reviews as its plan allows.", "Wait, or raise the plan."),
    Reason.NO_CAPACITY: ("The host runs as many sessions as it can.", "Wait, raise KILO_AGENTS_MAX, or add a host."),
    Reason.PAUSED: ("An operator paused the work.", "Remove the pause."),
    Reason.KILL_SWITCH: ("An operator pulled the kill switch.", "Release it."),
    Reason.OWNER_CHANGED: ("The repository left the owner's installation meanwhile.", "Nothing; nothing is posted any more."),
    Reason.RETRIES_EXHAUSTED: ("Every try of the launch failed.", "Look at the runs' logs, then re-execute."),
    Reason.DEADLINE_PASSED: ("The item was not finished before its deadline.", "Look at the session, then re-execute."),
    Reason.USER_CANCELLED: ("A person cancelled it.", "Re-execute to review after all."),
    Reason.BUDGET_ZERO: (
        "A daily budget of the owner or of this service is zero: nothing that asks a model runs.",
        "Raise it or unset it: `kilo-pipelines budgets set`; the operator's cap: `kilo-pipelines budgets cap`.",
    ),
    Reason.BUDGET_RESERVED: (
        "What is left of the day's budget is reserved by running sessions.",
        "Nothing: it starts when one of them ends. Smaller sessions (`session_tokens`) run beside each other.",
    ),
    Reason.BUDGET_EXHAUSTED: (
        "The day's budget of the owner or of this service is spent.",
        "Wait for the next UTC day, or raise it: `kilo-pipelines budgets set` (the operator's cap: `budgets cap`); waiting work is looked at again at once.",
    ),
    Reason.PRICE_UNKNOWN: (
        "Money is bounded, and nobody knows what this model costs.",
        "Name its price in KILO_MODEL_PRICES, or bound tokens instead.",
    ),
    Reason.LIMITS_INVALID: (
        "The owner's stored limits can't be read, so nothing is spent.",
        "Set them anew: `kilo-pipelines budgets set`; the operator's cap: `kilo-pipelines budgets cap`.",
    ),
    Reason.AUTHOR_RATE_LIMITED: (
        "This author started more in this repository than the owner's settings allow.",
        "Nothing: it starts by itself a little later. A person's own request isn't counted.",
    ),
    Reason.LOOP_GUARDED: (
        "Automation would start the same thing over and over, or answer itself.",
        "Look at what causes the events; a person may start it at any time.",
    ),
    Reason.APPROVAL_NEEDED: (
        "The pull request comes from a fork, or its author may not write here.",
        "Somebody who may write comments `/ok-to-test`, or `kilo-pipelines reviews approve`.",
    ),
    Reason.APPROVAL_STALE: (
        "What was approved isn't what is there now: another head, or another content.",
        "Look at what is there now and approve that.",
    ),
    Reason.APPROVAL_REFUSED: (
        "Whoever approved may not write to the repository.",
        "Somebody who may write has to approve.",
    ),
    Reason.APPROVAL_NOTED: (
        "The comment approves a pull request's head; whether its author may is asked at the claim.",
        "Nothing.",
    ),
    Reason.OUTSIDER_SKIPPED: (
        "The owner leaves pull requests of outsiders alone.",
        "Set `outsiders` to `approve` or `review` to have them looked at; a person may ask for one by hand.",
    ),
    Reason.SUGGEST_ONLY: (
        "In suggest-only mode nothing is written outside by itself.",
        "`kilo-pipelines effects show`, then `effects approve`; or end the mode.",
    ),
    Reason.SUGGESTION_EXPIRED: (
        "Nobody approved what was held within two weeks, and what it speaks of has moved on.",
        "Ask for the work again.",
    ),
    Reason.RULE_OF_TWO: (
        "The session would see outsiders' text, hold secrets and have effects that nobody approved.",
        "Take one of the three away.",
    ),
    Reason.SECRETS_MEET_OUTSIDERS: (
        "The session would hold secrets beside text of somebody without write access.",
        "Take the secrets out of its profile, or have a member ask.",
    ),
    Reason.WRITE_UNAPPROVED: (
        "A session that writes would follow the text of somebody without write access.",
        "Somebody who may write approves the text first.",
    ),
    Reason.FETCH_FAILED: ("The repository could not be fetched.", "Check the App's access to contents and the network."),
    Reason.HEAD_MOVED: ("The head moved while it was fetched.", "Nothing; the newer push has its own turn."),
    Reason.REPOSITORY_TOO_LARGE: ("The tree is larger than a checkout may be.", "Raise the caps if this is a real repository."),
    Reason.DIFF_TOO_LARGE: ("The diff doesn't fit the parts a review may have.", "Split the pull request or raise `max_parts`."),
    Reason.DIFF_EMPTY: ("There is nothing to review between base and head.", "Nothing."),
    Reason.SANDBOX_UNAVAILABLE: ("This machine can't make the sandbox.", "`doctor` says what is missing."),
    Reason.CHECKOUT_FAILED: ("The head could not be checked out in the sandbox.", "Look at the session's events."),
    Reason.AGENT_UNAVAILABLE: ("The agent's program is not installed.", "Run `make deps`."),
    Reason.AGENT_CRASHED: ("The agent ended with an error.", "Look at the session's events, then re-execute."),
    Reason.MODEL_UNREACHABLE: ("The model didn't answer.", "Check the model's address and key."),
    Reason.MODEL_REFUSED: ("The model's provider refused the key or the model.", "Check the model's key and name."),
    Reason.BUDGET_EXCEEDED: ("The session used up its turns or tokens.", "Raise the limits if the work deserves it."),
    Reason.SESSION_SILENT: ("The session gave no sign of life.", "Look at the session's events, then re-execute."),
    Reason.SESSION_TIMEOUT: ("The session ran into its hard cap.", "Split the pull request or raise the cap."),
    Reason.SESSION_LOST: ("The session's worker died three times.", "Look at memory and the worker's log."),
    Reason.WORKER_LOST: ("The session's worker died; it is started again.", "Nothing."),
    Reason.RESTORED: (
        "It was still to be sent when the backup was made that this database was restored from.",
        "The lost platform may have sent it: ask the receiver, then `effects retry` or leave it.",
    ),
    Reason.WORKER_STOPPING: ("The platform was stopped; the session is started again.", "Nothing."),
    Reason.INTERRUPTED: ("The session was interrupted.", "Re-execute to review after all."),
    Reason.RESULT_MISSING: ("The agent left no result.", "Re-execute; look at the model if it happens again."),
    Reason.RESULT_INVALID: (
        "The agent's result doesn't follow the schema.",
        "Re-execute; look at the model if it happens again.",
    ),
    Reason.RESULT_UNBOUND: ("The result is not what the model wrote.", "Treat the pull request as hostile."),
    Reason.NO_TURNS: ("The model completed no turn.", "Re-execute; look at the model if it happens again."),
    Reason.CLOUD_AGENT_UNAVAILABLE: (
        "The hosted Cloud Agent doesn't answer, or answers with an error of its own.",
        "Nothing at first: it is asked again, then tried as a new attempt. Look at the service's status page.",
    ),
    Reason.CLOUD_AGENT_BUSY: (
        "The hosted Cloud Agent takes no more turns of this session now.",
        "Nothing: it is asked again later.",
    ),
    Reason.CLOUD_AGENT_REFUSED: (
        "The hosted Cloud Agent refuses the token, the internal key or the account's access to the repository.",
        "Renew `secrets/cloud-agent-token` or `secrets/cloud-agent-internal-key`; give the account access to the repository.",
    ),
    Reason.CLOUD_AGENT_INVALID: (
        "The hosted Cloud Agent doesn't take what was asked.",
        "Look at the session's detail; the model's name is the usual cause.",
    ),
    Reason.CLOUD_AGENT_SESSION_GONE: (
        "The hosted Cloud Agent knows nothing of the session.",
        "Nothing: the review is tried once more.",
    ),
    Reason.CLOUD_AGENT_PROTOCOL: (
        "The hosted Cloud Agent answers something that its contract doesn't know.",
        "Let KILO_CLOUD_AGENT_URL be the service's own address, without a login page before it.",
    ),
    Reason.CLOUD_AGENT_ADDRESS_REFUSED: (
        "KILO_CLOUD_AGENT_URL is not an https address on the public internet.",
        "Correct it; only the offline twin may be on this machine.",
    ),
    Reason.CLOUD_AGENT_FAILED: (
        "The hosted Cloud Agent's sandbox or agent failed.",
        "Nothing: the review is tried once more. The session's detail names the service's code.",
    ),
    Reason.HOSTED_UNMETERED: (
        "What a hosted session uses can't be counted, and the owner has a budget.",
        "Let this platform's own agents review (KILO_AGENT), or take the owner's budgets away: `kilo-pipelines budgets set`, `budgets cap`.",
    ),
    Reason.SETUP_ELSEWHERE: (
        "This process has its secrets from an orchestrator: what a set-up stores here would be lost, and no other process would see it.",
        "Make the App and the model's key with a platform of one machine or by hand, put the files into the bundle: docs/deploy.md.",
    ),
    Reason.HOSTED_WORK_REFUSED: (
        "Hosted agents only review: their changes and analyses couldn't be checked by the platform.",
        "Run this service with KILO_AGENT=kilo.",
    ),
    Reason.NO_CHANGES: ("The agent changed nothing.", "Read its result; re-execute if a change was expected."),
    Reason.CHANGE_UNREADABLE: (
        "The tree that the agent left can't be read as a change.",
        "Look at the detail: unreadable directories and special files do this.",
    ),
    Reason.CHANGE_PACK_REFUSED: (
        "The objects of the change are damaged or more than a change may have.",
        "Treat the repository as hostile; re-execute.",
    ),
    Reason.CHANGE_HISTORY: ("The change brought commits or tags of its own.", "Treat the repository as hostile."),
    Reason.CHANGE_NESTED_REPOSITORY: (
        "The change holds a repository within the repository.",
        "Remove it, or have it ignored by `.gitignore`.",
    ),
    Reason.CHANGE_GITLINK: ("The change adds, moves or removes a submodule.", "Change submodules by hand."),
    Reason.CHANGE_SYMLINK: ("The change adds or moves a symbolic link.", "Make links by hand."),
    Reason.CHANGE_MODE: ("A file's mode is none that a change may have.", "Treat the repository as hostile."),
    Reason.CHANGE_PATH: ("A file's name is read differently on other systems.", "Rename the file by hand."),
    Reason.CHANGE_PROTECTED: (
        "The change touches a protected path: workflows, owners, hooks, build tools' programs, instructions for agents.",
        "Make that part by hand, or let the path through in the owner's settings.",
    ),
    Reason.CHANGE_FOREIGN_SOURCE: (
        "A manifest or lock file of the change takes packages from where none came from before.",
        "Treat the repository as hostile; or allow that registry, or make the change by hand.",
    ),
    Reason.CHANGE_INSTALL_SCRIPT: (
        "The change adds or changes a script that runs by itself at an install.",
        "Treat the repository as hostile, or make the change by hand.",
    ),
    Reason.CHANGE_TOO_LARGE: ("The change has more files or bytes than anybody reads.", "Split the work."),
    Reason.BRANCH_TAKEN: ("The attempt's branch holds another commit.", "Start a new attempt; look who made the branch."),
    Reason.PUSH_FAILED: ("The branch could not be pushed.", "Check the App's permission contents:write and branch rules."),
    Reason.REGISTRY_UNKNOWN: ("A package registry isn't among the platform's.", "Add it to KILO_REGISTRIES."),
    Reason.REGISTRY_MIRROR_FAILED: ("The mirror of package registries doesn't start.", "Look at memory and the worker's log."),
    Reason.REVIEWED: ("The whole change was reviewed.", "Nothing."),
    Reason.GATE_FAILED: ("The review found what the gate forbids.", "Mend the findings and push."),
    Reason.COVERAGE_GAP: ("A part of the change never reached the model.", "Re-execute."),
    Reason.EVIDENCE_MISSING: ("The session left no evidence.", "Re-execute."),
    Reason.EVIDENCE_MISMATCH: ("The evidence is of another head, base or pull request.", "Re-execute."),
    Reason.EVIDENCE_REPORTED: (
        "The evidence was reported, not observed.",
        "Allow it in the owner's settings, or host the agent yourself.",
    ),
    Reason.PATH_EXCLUDED: ("The owner's settings exclude this path.", "Change `exclude_paths`."),
    Reason.GITHUB_APP_MISSING: ("No GitHub App is configured.", "Run `kilo-pipelines setup github`."),
    Reason.PROVIDER_UNAVAILABLE: ("GitHub didn't answer.", "Nothing; it is tried again."),
    Reason.PROVIDER_RATE_LIMITED: ("GitHub's rate limit was met.", "Nothing; it is tried again when the limit ends."),
    Reason.PROVIDER_REFUSED: ("GitHub refused the App's token.", "Check the App's permissions and installation."),
    Reason.PROVIDER_NOT_FOUND: ("GitHub doesn't know the repository or pull request.", "Check the App's access."),
    Reason.PROVIDER_INVALID: ("GitHub refused what was sent.", "This is a defect of the platform: report it."),
    Reason.PROVIDER_AUTH: ("GitHub took the App's token for invalid.", "Check the App's key and that it is installed."),
    Reason.PERMISSION_MISSING: (
        "The installation doesn't grant a permission that the work needs.",
        "Accept the App's permissions at GitHub, Dependabot alerts among them.",
    ),
    Reason.REPOSITORY_MOVED: (
        "The repository has another name at GitHub than the one that was looked up for it.",
        "Nothing; its name is looked up again at the next sync.",
    ),
    Reason.ACCESS_BLOCKED: ("GitHub blocks access to the repository.", "Ask GitHub's support."),
    Reason.ALERTS_DISABLED: (
        "Dependabot alerts are off, or the repository is archived.",
        "Turn them on in the repository's security settings.",
    ),
    Reason.ALERT_PAGE_TOO_LARGE: (
        "A page of alerts is larger than a hundred of the longest advisories.",
        "Nothing is taken from it; report it with the repository's name.",
    ),
    Reason.PAGE_LINK_REFUSED: (
        "The link to the next page leads to another server.",
        "Look at what stands between the platform and GitHub.",
    ),
    Reason.PAGE_CURSOR_REFUSED: (
        "GitHub doesn't take the place at which a list was to go on.",
        "Nothing; the list is read from its beginning.",
    ),
    Reason.SETUP_LINK_INVALID: (
        "The set-up link was used already, is over or is of another browser.",
        "Make a new one: `kilo-pipelines setup github`.",
    ),
    Reason.SETUP_STATE_INVALID: (
        "An answer of GitHub doesn't belong to the step that is open: it came twice, late or into another browser.",
        "Go on at the set-up page; nothing was changed.",
    ),
    Reason.MANIFEST_CODE_REFUSED: (
        "GitHub takes the code of the new App no more: it was used already or is older than an hour.",
        "Delete that App at GitHub and create it again from the set-up page.",
    ),
    Reason.USER_CODE_REFUSED: (
        "GitHub takes the person's authorization no more: its code was used already or is too old.",
        "Authorize again from the set-up page.",
    ),
    Reason.INSTALLATION_NOT_YOURS: (
        "GitHub doesn't say that this person administers the installation.",
        "Let an owner of that organization open a set-up link of their own.",
    ),
    Reason.INSTALLATION_TAKEN: (
        "Another owner has connected this installation.",
        "Disconnect it there first, or name that owner with `--owner`.",
    ),
    Reason.INSTALLATION_REQUESTED: (
        "The installation waits until an owner of the organization approves it.",
        "When it is approved: `kilo-pipelines setup github --installation NUMBER`.",
    ),
    Reason.INSTALLATION_GONE: (
        "An owner holds an installation that the App has no more at GitHub.",
        "Install the App there again and connect it: `kilo-pipelines setup github`.",
    ),
    Reason.APP_EXISTS: (
        "This platform has a GitHub App already.",
        "Install it from the set-up page; `--new-app` makes another one in its place.",
    ),
    Reason.APP_KEY_REFUSED: (
        "GitHub doesn't take the App's private key: it was deleted there, is of another App, or is no key.",
        "Make a new key at the App's page and store it: `kilo-pipelines setup github key FILE`.",
    ),
    Reason.APP_PERMISSION_MISSING: (
        "The App itself doesn't ask for a permission or event that a service needs.",
        "Add it at the App's page under Permissions & events; every installation must then accept it.",
    ),
    Reason.WEBHOOK_ADDRESS_DIFFERS: (
        "The App's webhook leads to another address than this platform's, or isn't JSON over verified TLS.",
        "`kilo-pipelines setup github webhook` sets it at GitHub.",
    ),
    Reason.WEBHOOK_UNREACHED: (
        "GitHub's newest deliveries didn't arrive here.",
        "Look at the way from GitHub to the public port: name, TLS proxy, firewall.",
    ),
    Reason.WEBHOOK_NOT_SEEN_YET: (
        "GitHub has sent nothing yet.",
        "Install the App or push something, then look again.",
    ),
    Reason.CLOCK_SKEW: (
        "This machine's clock and the provider's are apart; GitHub refuses an App whose clock is wrong.",
        "Let the clock be set by NTP: `timedatectl set-ntp true`.",
    ),
    Reason.SECRET_UNREADABLE: (
        "A stored secret can't be opened: its file may be read by others, is damaged, or was sealed with another key.",
        "Restore it together with `encryption.key` from one backup, or run the set-up again.",
    ),
    Reason.METRICS_TOKEN_MISSING: (
        "There is no token for scrapers: every scrape is refused.",
        "The next start makes it; where secrets come from a bundle, repeat `kilo-pipelines bundle`.",
    ),
    Reason.MODEL_MISSING: (
        "No model is set up.",
        "Run `kilo-pipelines setup model`.",
    ),
    Reason.MODEL_KEY_MISSING: (
        "There is no key for the model.",
        "Run `kilo-pipelines setup model` with `--key-file`.",
    ),
    Reason.MODEL_KEY_REFUSED: (
        "The model's address doesn't take the key.",
        "Make a new key there: `kilo-pipelines setup model` with `--key-file`.",
    ),
    Reason.MODEL_UNKNOWN: (
        "The address knows no model of this name, or this key may not use it.",
        "Name a model that it lists: `kilo-pipelines setup model --model NAME`.",
    ),
    Reason.MODEL_CANNOT_CALL_TOOLS: (
        "The model answered without calling the tool that it was told to call.",
        "Choose a model with tool calling: without it no session works.",
    ),
    Reason.MODEL_NOT_ALLOWED: (
        "The owner, or the platform, doesn't allow this model.",
        "Allow it: `kilo-pipelines setup model --owner ID --allow MODEL`; the platform's own list is KILO_MODELS.",
    ),
}
