"""A support agent that refunds orders: it survives kills, waits for a person, and pays once."""
