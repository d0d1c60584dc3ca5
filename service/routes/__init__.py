"""Thin routes: parse, call one function, answer."""
