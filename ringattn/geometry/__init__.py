"""Floor 1: positions as integers. Layouts and masks meet here and become tiles, before any tensor exists."""
