"""The cost of one feedback batch: the fast path against the plain one and against a plain baseline."""
