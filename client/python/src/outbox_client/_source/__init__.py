"""What happens in a source database: markers, spilled requests, verdicts, upkeep. It imports no driver; see driver.py."""
