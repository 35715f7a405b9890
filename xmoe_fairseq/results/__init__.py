"""Results as data: what commands write to JSON and read again."""
