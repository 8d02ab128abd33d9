"""Floor 1: integers only. Layouts and masks meet here and become tiles and plans, before any tensor exists."""
