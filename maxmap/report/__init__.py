"""The report of a checkpoint: one HTML page that says how good it is, where it errs and how it was made."""
