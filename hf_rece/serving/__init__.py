"""Serving: approximate search, files of users, exported encoders."""
