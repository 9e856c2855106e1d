"""Corpora on disk: .bin, .idx, .lang, and their manifest."""
