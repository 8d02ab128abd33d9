"""Programs that measure: run with torchrun, cases as data, JSON lines out."""
