"""The end of a study: tables of points and comparisons, figures, and one page that answers the questions."""
