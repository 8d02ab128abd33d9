"""What the tests share: rank pool, oracle, comparison, cases, poison."""
