"""The version of this package."""

VERSION = "0.1.0"
SDK = f"outbox-python/{VERSION}"
"""Names this SDK towards the platform."""
