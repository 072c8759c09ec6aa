"""The course: one file per lab, checks for each, and a grader."""
