"""Floor 4: inference. Which rank keeps which tokens, their keys and values, and attention to them."""
