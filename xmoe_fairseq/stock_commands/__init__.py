"""Checks of what fairseq's own commands are given."""
