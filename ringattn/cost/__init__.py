"""Floor 2: numbers that a plan is judged by: links, compute, lower bounds."""
