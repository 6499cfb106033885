"""Measurements of time, memory and bytes. Each prints one JSON object as its last line."""
