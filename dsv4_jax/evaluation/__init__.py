"""Scores with error bars: tasks in JSON lines, answered and scored by a loaded model."""
