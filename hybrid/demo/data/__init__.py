"""Conversations without end, from grammars and word lists of our own."""
