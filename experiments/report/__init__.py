"""What people read: the page of a run, the tables of a sweep, charts and pictures."""
