"""The kinds of experts, and the options that each declares."""
