"""Pure functions on arrays: the arithmetic that models are made of."""
