"""Scores, intervals, costs, error budgets, and the tables, figures and report that show them."""
