"""Routers, the plans that they make, and what they report."""
