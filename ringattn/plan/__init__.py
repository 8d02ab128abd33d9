"""Floor 2: who sends what to whom, when. Integers only."""
