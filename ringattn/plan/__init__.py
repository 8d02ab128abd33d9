"""Floor 2: who sends what to whom, when, and which exchange does it best. No torch."""
