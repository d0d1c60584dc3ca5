"""Webhooks: what the outbox says, posted to the endpoints of its tenant, signed, at least once."""
