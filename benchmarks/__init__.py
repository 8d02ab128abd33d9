"""Programs that measure: one process or torchrun, cases as data, JSON lines out."""
