"""Experts that several processes share: who holds which, and the exchange of tokens."""
