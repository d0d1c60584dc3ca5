"""Serving: versions on one or several engines, each loaded before it is used and unloaded after."""
