"""A study: a grid of distillations under one budget, a record of each, a report from the records (extra: study)."""
