"""Asking a language model over an OpenAI-compatible endpoint: one client for all who ask.

[`client`] sends, [`cache`] keeps what was answered, and [`replies`] reads it.
"""
