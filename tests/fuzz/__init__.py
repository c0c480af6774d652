"""Fuzzing of everything that reads a stranger's file: see README.md."""
