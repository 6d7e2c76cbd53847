"""What an error of the database says."""

from __future__ import annotations

# A rule or another transaction stood in the way: PostgreSQL's own answer to COMMIT.
_ROLLED_BACK = frozenset({"22", "23", "25", "27", "40", "42", "44", "P0"})
_COMPLETION_UNKNOWN = "40003"


def certainly_rolled_back(error: BaseException | None) -> bool:
    """Tells whether an error of COMMIT means that the transaction is rolled back.

    That is so only when PostgreSQL itself says, in answer to COMMIT, that a rule or another transaction stood in the way: a
    deferred constraint, a serialization failure. Everything else (a broken connection, a cancelled task, a server that shuts
    down, an error a pooler may have made up) leaves the outcome unknown. Knows the errors of asyncpg, psycopg and psycopg2, also
    inside those of SQLAlchemy and Django.
    """
    seen = 0
    while error is not None and seen < 10:
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        severity = _severity(error)
        if isinstance(state, str) and len(state) == 5 and severity:
            return severity == "ERROR" and state != _COMPLETION_UNKNOWN and state[:2] in _ROLLED_BACK
        error = getattr(error, "orig", None) or error.__cause__
        seen += 1
    return False


def _severity(error: BaseException) -> str:
    """Returns the severity, in English whatever the server speaks where it tells; empty: not an answer of the server."""
    diag = getattr(error, "diag", None)
    for holder, names in ((error, ("severity_en", "severity")), (diag, ("severity_nonlocalized", "severity"))):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, str):
                return value
    return ""


def sqlstate(error: BaseException | None) -> str:
    """Returns the SQLSTATE of a driver's error; empty: it has none."""
    for _ in range(10):
        if error is None:
            break
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if isinstance(state, str):
            return state
        error = getattr(error, "orig", None) or error.__cause__
    return ""
