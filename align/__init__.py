"""Maps K/V from a teacher's geometry to the student's: tokens, time, layers, heads and rotary positions."""
