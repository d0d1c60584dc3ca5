"""The fast path: the same loss and gradient as sdpo_core.loop's plain path, from hidden states, in chunks of tokens.

docs/speed.md says what it saves and when it stands back for the plain path.
"""
