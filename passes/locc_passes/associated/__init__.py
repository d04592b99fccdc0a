"""Associated learning: a folded network whose halves meet."""
