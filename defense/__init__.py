"""Repairing models and sets: TSBD, and the baselines it is compared with, under one signature."""
