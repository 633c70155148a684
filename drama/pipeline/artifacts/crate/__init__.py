"""A campaign as an RO-Crate: a folder to archive, that says how each file came about."""
