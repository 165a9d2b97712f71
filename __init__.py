"""The repository root: the folders beside this file import as `hocket.<folder>`; no code lives here."""
