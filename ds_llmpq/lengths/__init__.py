"""Predictors of output length."""
